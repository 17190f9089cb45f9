// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * Bugs on objects, pages and addresses that are neither. Names follow Linux's KASAN test suite (mm/kasan/kasan_test.c)
 * where it has the same case.
 */
#include "kernel.h"

SCENARIO(kmalloc_oob_right,
	 "slab-out-of-bounds Write 1 115;slab-out-of-bounds Write 1 120;slab-out-of-bounds Read 1 128",
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
	char *a = kmalloc(24), *b = kmalloc(24);

	read8((a > b ? a : b) - 1);
	kfree(a);
	kfree(b);
}

SCENARIO(kmalloc_pagealloc_oob_right, "slab-out-of-bounds Write 1 4106;slab-out-of-bounds Write 1 8191",
	 "writes behind an allocation that has pages of its own")
{
	char *p = kmalloc(4096 + 10);

	write8(p + 4105, 0);
	write8(p + 4106, 0);
	write8(p + 8191, 0);
	kfree(p);
}

SCENARIO(kmalloc_uaf, "slab-use-after-free Write 1 8", "writes to a freed object")
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

SCENARIO(kmem_cache_oob, "slab-out-of-bounds Read 1 200", "reads behind an object of a cache of its own")
{
	char *p = cache_alloc(cache_create("test_cache", 200));

	read8(p + 200);
	kfree(p);
}

SCENARIO(kmem_cache_double_free, "double-free Free 0 0", "frees an object twice")
{
	char *p = kmalloc(200);

	kfree(p);
	kfree(opaque(p));
}

SCENARIO(kmem_cache_invalid_free, "invalid-free Free 0 1", "frees an address inside an object")
{
	char *p = kmalloc(200);

	kfree(opaque(p + 1));
	kfree(p);
}

SCENARIO(krealloc_less_oob, "slab-out-of-bounds Write 1 201", "writes where an object reached before it shrank")
{
	char *p = krealloc(kmalloc(235), 201);

	write8(p + 200, 0);
	write8(p + 201, 0);
	kfree(p);
}

SCENARIO(kmalloc_memcpy_oob, "slab-out-of-bounds Write 40 32", "copies 40 bytes into an object of 32")
{
	char *from = kmalloc(64), *to = kmalloc(32);

	memcpy(opaque(to), opaque(from), opaque(40ul));
	kfree(from);
	kfree(to);
}

SCENARIO(kmalloc_memset_oob, "slab-out-of-bounds Write 130 128", "fills 130 bytes of an object of 128")
{
	char *p = kmalloc(128);

	memset(opaque(p), 0, opaque(130ul));
	kfree(p);
}

SCENARIO(kmalloc_memmove_negative_size, "out-of-bounds Read 18446744073709551614 4", "moves -2 bytes")
{
	char *p = kmalloc(64);

	memmove(opaque(p), opaque(p + 4), opaque(-2ul));
	kfree(p);
}

SCENARIO(kmalloc_memcmp_oob, "slab-out-of-bounds Read 25 24", "compares 25 bytes of an object of 24")
{
	char *p = kmalloc(24), *q = kmalloc(32);

	memset(p, 0, opaque(24ul));
	memset(q, 0, opaque(32ul));
	opaque(memcmp(opaque(p), opaque(q), opaque(25ul)));
	kfree(p);
	kfree(q);
}

struct words {
	uint64_t word[8];
};

SCENARIO(struct_copy_oob, "slab-out-of-bounds Read 64 56", "assigns a struct of 64 bytes from an object of 56")
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

SCENARIO(kmalloc_unaligned_oob, "slab-out-of-bounds Read 8 64", "reads eight bytes across the end of an object")
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

SCENARIO(pagealloc_uaf, "use-after-free Write 1 0", "writes to a freed page")
{
	char *p = page_alloc(2);

	page_free(p);
	write8(p, 0);
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

SCENARIO(wild_access, "wild-memory-access Read 1 -", "reads an address that no memory belongs to")
{
	probe_read(opaque(0xffffc12345678900ul));
}
