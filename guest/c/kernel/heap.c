// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * Bugs on objects, pages and addresses that are neither. Names follow Linux's KASAN test suite
 * (mm/kasan/kasan_test.c) where it has the same case.
 */
#include "kernel.h"

SCENARIO(kmalloc_oob_right,
	 "slab-out-of-bounds Write 1 115;slab-out-of-bounds Write 1 120;"
	 "slab-out-of-bounds Read 1 128",
	 "writes behind a 115-byte object: at its end, a granule further, and past its slot")
{
	char *p = kmalloc(115);

	write8(p + 115, 'x');
	write8(p + 120, 'y');
	read8(p + 128);
	kfree(p);
}

SCENARIO(kmalloc_oob_left, "slab-out-of-bounds Read 1 -1", "reads the byte before an object")
{
	char *a = kmalloc(15), *b = kmalloc(15);

	read8((a > b ? a : b) - 1);
	kfree(a);
	kfree(b);
}

SCENARIO(kmalloc_node_oob_right, "slab-out-of-bounds Read 1 4096",
	 "reads behind an object as large as a page")
{
	char *p = kmalloc(4096);

	read8(p + 4095);
	read8(p + 4096);
	kfree(p);
}

SCENARIO(kmalloc_large_oob_right, "slab-out-of-bounds Write 1 3840",
	 "writes behind a large object of a slab")
{
	char *p = kmalloc(4096 - 256);

	write8(p + 4096 - 256, 0);
	kfree(p);
}

SCENARIO(kmalloc_pagealloc_uaf, "use-after-free Read 1 0", "reads freed pages")
{
	char *p = kmalloc(4096 + 10);

	kfree(p);
	read8(p);
}

SCENARIO(kmalloc_pagealloc_invalid_free, "invalid-free Free 0 1",
	 "frees an address inside of the pages")
{
	char *p = kmalloc(4096 + 10);

	kfree(opaque(p + 1));
	kfree(p);
}

SCENARIO(kmalloc_pagealloc_oob_right,
	 "slab-out-of-bounds Write 1 4106;slab-out-of-bounds Write 1 8191",
	 "writes behind an allocation that has pages of its own")
{
	char *p = kmalloc(4096 + 10);

	write8(p + 4105, 0);
	write8(p + 4106, 0);
	write8(p + 8191, 0);
	kfree(p);
}

SCENARIO(kmalloc_uaf, "slab-use-after-free Read 1 8", "reads a freed object")
{
	char *p = kmalloc(10);

	kfree(p);
	read8(p + 8);
}

SCENARIO(kmalloc_uaf2, "slab-use-after-free Read 1 40",
	 "reads a freed object after another of its size was allocated")
{
	char *p = kmalloc(43), *q;

	kfree(p);
	/* The quarantine holds the first object, so the second is elsewhere. */
	q = kmalloc(43);
	read8(p + 40);
	kfree(q);
}

SCENARIO(kmalloc_uaf_write, "slab-use-after-free Write 1 8", "writes to a freed object")
{
	char *p = kmalloc(10);

	kfree(p);
	write8(p + 8, 'x');
}

SCENARIO(kmalloc_uaf_read8, "slab-use-after-free Read 8 16", "reads eight bytes of a freed object")
{
	char *p = kmalloc(64);

	kfree(p);
	(void)*(volatile uint64_t *)opaque(p + 16);
}

SCENARIO(kmem_cache_oob, "slab-out-of-bounds Read 1 200",
	 "reads behind an object of a cache of its own")
{
	char *p = cache_alloc(cache_create("test_cache", 200));

	read8(p + 200);
	kfree(p);
}

SCENARIO(kmem_cache_double_free, "double-free Free 0 0",
	 "frees an object of a cache of its own twice")
{
	char *p = cache_alloc(cache_create("double_free_cache", 200));

	kfree(p);
	kfree(opaque(p));
}

SCENARIO(kmem_cache_invalid_free, "invalid-free Free 0 1",
	 "frees an address inside an object of a cache of its own")
{
	char *p = cache_alloc(cache_create("invalid_free_cache", 200));

	kfree(opaque(p + 1));
	kfree(p);
}

/* Each write is a finding of its own: no loops. */
SCENARIO(krealloc_more_oob, "slab-out-of-bounds Write 1 235;slab-out-of-bounds Write 1 240",
	 "writes behind an object that has grown in place")
{
	char *p = krealloc(kmalloc(201), 235);

	write8(p + 200, 'x');
	write8(p + 201, 'x');
	write8(p + 218, 'x');
	write8(p + 234, 'x');
	write8(p + 235, 'x');
	write8(p + 240, 'x');
	kfree(p);
}

SCENARIO(krealloc_less_oob,
	 "slab-out-of-bounds Write 1 201;slab-out-of-bounds Write 1 208;"
	 "slab-out-of-bounds Write 1 218;slab-out-of-bounds Write 1 234;"
	 "slab-out-of-bounds Write 1 235",
	 "writes where an object reached before it shrank in place")
{
	char *p = krealloc(kmalloc(235), 201);

	write8(p + 200, 'x');
	write8(p + 201, 'x');
	write8(p + 208, 'x');
	write8(p + 218, 'x');
	write8(p + 234, 'x');
	write8(p + 235, 'x');
	kfree(p);
}

SCENARIO(krealloc_pagealloc_more_oob,
	 "slab-out-of-bounds Write 1 4331;slab-out-of-bounds Write 1 4336",
	 "writes behind an allocation that has grown in place")
{
	char *p = krealloc(kmalloc(4096 + 201), 4096 + 235);

	write8(p + 4296, 'x');
	write8(p + 4297, 'x');
	write8(p + 4314, 'x');
	write8(p + 4330, 'x');
	write8(p + 4331, 'x');
	write8(p + 4336, 'x');
	kfree(p);
}

SCENARIO(krealloc_pagealloc_less_oob,
	 "slab-out-of-bounds Write 1 4297;slab-out-of-bounds Write 1 4304;"
	 "slab-out-of-bounds Write 1 4314;slab-out-of-bounds Write 1 4330;"
	 "slab-out-of-bounds Write 1 4331",
	 "writes where an allocation reached before it shrank in place")
{
	char *p = krealloc(kmalloc(4096 + 235), 4096 + 201);

	write8(p + 4296, 'x');
	write8(p + 4297, 'x');
	write8(p + 4304, 'x');
	write8(p + 4314, 'x');
	write8(p + 4330, 'x');
	write8(p + 4331, 'x');
	kfree(p);
}

SCENARIO(krealloc_uaf, "slab-use-after-free Read 1 0;slab-use-after-free Read 1 0",
	 "changes the size of a freed object, and reads it")
{
	char *p = kmalloc(201);

	kfree(p);
	if (krealloc(opaque(p), 235))
		print("krealloc_uaf: a freed object was given a new size\n");
	read8(p);
}

struct two_words {
	uint64_t word[2];
};

SCENARIO(kmalloc_oob_16, "slab-out-of-bounds Write 16 13", "assigns 16 bytes to an object of 13")
{
	struct two_words *to = kmalloc(13), *from = kmalloc(16);

	*opaque(to) = *opaque(from);
	kfree(to);
	kfree(from);
}

SCENARIO(kmalloc_uaf_16, "slab-use-after-free Read 16 0", "assigns 16 bytes from a freed object")
{
	struct two_words *to = kmalloc(16), *from = kmalloc(16);

	kfree(from);
	*opaque(to) = *opaque(from);
	kfree(to);
}

SCENARIO(ksize_unpoisons_memory, "slab-out-of-bounds Read 1 128",
	 "asks for an object's whole size, and reads behind that")
{
	char *p = kmalloc(123);
	size_t all = ksize(p);

	write8(p + 123, 'x');
	write8(p + all - 1, 'x');
	read8(p + all);
	kfree(p);
}

SCENARIO(ksize_uaf,
	 "slab-use-after-free Read 1 0;slab-use-after-free Read 1 0;slab-use-after-free Read 1 120",
	 "asks for the size of a freed object, and reads it")
{
	char *p = kmalloc(120);

	kfree(p);
	opaque(ksize(opaque(p)));
	read8(p);
	read8(p + 120);
}

SCENARIO(kmalloc_double_kzfree, "slab-use-after-free Read 1 0;double-free Free 0 0",
	 "clears and frees an object twice")
{
	char *p = kmalloc(16);

	kfree_sensitive(p);
	kfree_sensitive(opaque(p));
}

struct words {
	uint64_t word[8];
};

SCENARIO(struct_copy_oob, "slab-out-of-bounds Read 64 56",
	 "assigns a struct of 64 bytes from an object of 56")
{
	struct words *from = kmalloc(56), *to = kmalloc(64);

	*opaque(to) = *opaque(from);
	kfree(from);
	kfree(to);
}

struct bits {
	uint32_t whole;
	uint32_t low : 12, high : 20;
};

SCENARIO(bitfield_oob, "slab-out-of-bounds Read 4 4", "reads a bit-field behind an object")
{
	struct bits *p = kmalloc(4);

	p->whole = 1;
	opaque((uint32_t)opaque(p)->high);
	kfree(p);
}

SCENARIO(kmalloc_unaligned_oob, "slab-out-of-bounds Read 8 64",
	 "reads eight bytes across the end of an object")
{
	struct __attribute__((packed)) unaligned {
		uint64_t value;
	} *p = kmalloc(64);

	opaque(((struct unaligned *)opaque((char *)p + 60))->value);
	kfree(p);
}

SCENARIO(atomic_uaf, "slab-use-after-free Write 4 12", "adds atomically to a freed counter")
{
	char *p = kmalloc(32);

	kfree(p);
	__atomic_fetch_add((uint32_t *)opaque(p + 12), 1, __ATOMIC_SEQ_CST);
}

SCENARIO(pagealloc_uaf, "use-after-free Read 1 0", "reads freed pages")
{
	char *p = page_alloc(4);

	page_free(p);
	read8(p);
}

SCENARIO(page_oob_into_free_neighbour, "use-after-free Read 1 0",
	 "reads behind a page whose neighbour is free")
{
	char *p = page_alloc(0), *q = page_alloc(0);

	if (q != p + 4096)
		print("page_oob_into_free_neighbour: no neighbour\n");
	page_free(q);
	read8(p + 4096);
	page_free(p);
}

SCENARIO(pagealloc_double_free, "double-free Free 0 0", "frees pages twice")
{
	char *p = page_alloc(1);

	page_free(p);
	page_free(opaque(p));
}

SCENARIO(pagealloc_invalid_free, "invalid-free Free 0 8", "frees an address inside a page")
{
	char *p = page_alloc(0);

	page_free(opaque(p + 8));
	page_free(p);
}

SCENARIO(null_deref, "null-ptr-deref Read 1 -", "reads near address 0")
{
	probe_read(opaque(0x28ul));
}

SCENARIO(user_access, "user-memory-access Read 1 -", "reads an address of the lower half")
{
	probe_read(opaque(0x7fff12345678ul));
}

SCENARIO(beyond_memory, "wild-memory-access Write 1 -;wild-memory-access Read 1 -",
	 "writes and reads guest-physical memory that does not exist, through the direct map")
{
	write8(memory_end() + 64, 1);
	read8(memory_end() + 64);
}

SCENARIO(wild_access, "wild-memory-access Read 1 -", "reads an address that no memory belongs to")
{
	probe_read(opaque(0xffffc12345678900ul));
}
