// SPDX-License-Identifier: MIT OR Apache-2.0
/* Legal behaviour close to the edge: none of it may be reported. */
#include "kernel.h"

static const uint16_t sizes[] = {1,   7,   8,   9,   16,  31,   32,   64,   96,
				 115, 128, 200, 256, 500, 1024, 2048, 4096, 4097, 9000};

SCENARIO(exact_fit, "silent", "first and last byte of objects of every size class")
{
	for (size_t i = 0; i < array_size(sizes); i++) {
		char *p = kmalloc(sizes[i]);

		write8(p, 1);
		write8(p + sizes[i] - 1, 2);
		kfree(p);
	}
}

SCENARIO(reuse_after_free, "silent", "a freed object's memory is handed out again and used")
{
	for (size_t size = 16; size < 300; size += 41) {
		char *p = kmalloc(size), *q;

		kfree(p);
		q = kmalloc(size);
		memset(q, 1, opaque(size));
		kfree(q);
	}
}

SCENARIO(krealloc_in_place_and_moved, "silent",
	 "an allocation grows, shrinks and moves; all of it is used each time")
{
	static const uint16_t steps[] = {30, 32, 70, 40, 200, 5000, 100, 9000};
	char *p = kmalloc(20);

	for (size_t i = 0; i < array_size(steps); i++) {
		p = krealloc(p, steps[i]);
		memset(p, 1, opaque((size_t)steps[i]));
	}
	kfree(p);
}

SCENARIO(memory_functions, "silent",
	 "copies, moves and compares that end with their objects, or have no length")
{
	char *a = kmalloc(61), *b = kmalloc(61);

	memset(a, 5, opaque(61ul));
	memcpy(b, a, opaque(61ul));
	memmove(a + 7, a, opaque(54ul));
	memmove(a, a + 7, opaque(54ul));
	memmove(a, a + 61, opaque(0ul));
	if (memcmp(a, b, opaque(61ul)))
		print("memory_functions: the copies differ\n");
	kfree(a);
	kfree(b);
}

SCENARIO(page_reuse, "silent", "pages come and go, and are used to their last byte")
{
	for (int i = 0; i < 3; i++) {
		char *p = page_alloc(1);

		write8(p, 1);
		write8(p + 4096, 1);
		write8(p + 8191, 1);
		page_free(p);
	}
}

static noinline uint64_t recurse(uint64_t depth)
{
	uint64_t frame[5];
	volatile uint64_t *p = opaque(&frame[0]);

	p[0] = depth;
	p[4] = 1;
	return depth ? recurse(depth - 1) + p[4] : p[0];
}

SCENARIO(deep_stack, "silent", "recursion over frames with redzones, and the same stack again")
{
	for (int i = 0; i < 3; i++)
		opaque(recurse(20));
}

static noinline uint64_t recurse_and_leave(uint64_t depth)
{
	uint64_t frame[5];
	volatile uint64_t *p = opaque(&frame[0]);

	p[4] = depth;
	if (!depth && opaque(true))
		jump_throw();
	return !depth ? 0 : recurse_and_leave(depth - 1) + p[4];
}

static void leave_deep_frames(void)
{
	opaque(recurse_and_leave(12));
}

static void fill_buffer(char *buffer, size_t bytes)
{
	for (size_t i = 0; i < bytes; i++)
		write8(buffer + i, 0xaa);
}

SCENARIO(no_return_path, "silent",
	 "leaves deep frames without returning, and lets code without redzones use their memory")
{
	for (int i = 0; i < 2; i++) {
		jump_catch(leave_deep_frames);
		jump_with_buffer(fill_buffer);
	}
}

SCENARIO(kfree_via_page, "silent", "frees an object by an address computed from its page")
{
	char *p = kmalloc(8);
	uint64_t number = opaque(((uint64_t)p - DIRECT_MAP) / PAGE_SIZE);

	kfree((void *)(DIRECT_MAP + number * PAGE_SIZE + ((uint64_t)p & (PAGE_SIZE - 1))));
}

SCENARIO(kfree_via_phys, "silent", "frees an object by an address computed from its physical one")
{
	uint64_t physical = (uint64_t)kmalloc(8) - DIRECT_MAP;

	kfree((void *)(opaque(physical) + DIRECT_MAP));
}

SCENARIO(kmem_cache_accounted, "silent", "objects of a cache, one after the other")
{
	struct cache *cache = cache_create("accounted_cache", 200);

	for (int i = 0; i < 5; i++) {
		char *p = cache_alloc(cache);

		write8(p, 'x');
		write8(p + 199, 'x');
		kfree(p);
	}
}

SCENARIO(kmem_cache_bulk, "silent", "objects of a cache, many at once")
{
	struct cache *cache = cache_create("bulk_cache", 200);
	char *objects[10];

	for (size_t i = 0; i < array_size(objects); i++)
		objects[i] = cache_alloc(cache);
	for (size_t i = 0; i < array_size(objects); i++) {
		write8(objects[i], 42);
		write8(objects[i] + 199, 42);
		kfree(objects[i]);
	}
}

SCENARIO(variable_length_arrays, "silent",
	 "arrays of many lengths, all of their bytes, in a loop and in a frame")
{
	for (size_t n = 1; n < 70; n += 9) {
		char array[n];
		char *p = opaque(&array[0]);

		write8(p, 1);
		write8(p + n - 1, 1);
		opaque(recurse(2));
	}
}

SCENARIO(scopes, "silent", "blocks that share stack memory, entered again and again")
{
	for (int i = 0; i < 6; i++) {
		if (i & 1) {
			char odd[24];

			memset(opaque(&odd[0]), i, opaque(24ul));
		} else {
			char even[40];

			memset(opaque(&even[0]), i, opaque(40ul));
		}
	}
}

struct fields {
	uint8_t first : 3, second : 5;
	uint16_t third : 9, fourth : 7;
};

SCENARIO(bitfields, "silent", "bit-fields that end where their object does")
{
	struct fields *p = kmalloc(sizeof(*p));

	memset(p, 0, opaque(sizeof(*p)));
	opaque(p)->second = 9;
	opaque(p)->fourth = 5;
	if (opaque(p)->second + opaque(p)->fourth != 14)
		print("bitfields: wrong values\n");
	kfree(p);
}

struct block {
	char bytes[77];
};

static noinline struct block make_block(char value)
{
	struct block block;

	memset(opaque(&block.bytes[0]), value, sizeof(block));
	return block;
}

SCENARIO(struct_copies, "silent", "structs passed and assigned, to objects of exactly their size")
{
	struct block *p = kmalloc(sizeof(*p)), local = make_block(3);

	*opaque(p) = local;
	local = *opaque(p);
	if (local.bytes[76] != 3)
		print("struct_copies: wrong value\n");
	kfree(p);
}

static const char table[13] = "thirteen byte";

SCENARIO(globals, "silent", "every byte of a global variable of odd size")
{
	for (size_t i = 0; i < sizeof(table); i++)
		read8(opaque(&table[0]) + i);
}

SCENARIO(free_lists, "silent", "many objects of a cache, freed in another order, and again")
{
	struct cache *cache = cache_create("silent_cache", 72);
	char *objects[90];

	for (int round = 0; round < 2; round++) {
		for (size_t i = 0; i < array_size(objects); i++) {
			objects[i] = cache_alloc(cache);
			write8(objects[i] + 71, 1);
		}
		for (size_t i = 0; i < array_size(objects); i++)
			kfree(objects[i * 7 % array_size(objects)]);
	}
}
