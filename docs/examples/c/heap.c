/* The heap: blocks of 64 bytes. A free block points to the next one. */
#include "kernel.h"

#define BLOCK 64ul

struct block {
	struct block *next;
};

static char blocks[1024][BLOCK] __attribute__((aligned(64)));
static unsigned used;
static struct block *first_free;

void *kmalloc(size_t bytes)
{
	void *object = first_free;

	if (bytes > BLOCK)
		return NULL;
	if (object)
		first_free = first_free->next;
	else if (used < sizeof(blocks) / BLOCK)
		object = blocks[used++];
	return object;
}

static void *block_of(void *object)
{
	return (void *)((uint64_t)object & ~(BLOCK - 1));
}

static void free_block(struct block *block)
{
	block->next = first_free;
	first_free = block;
}

void kfree(void *object)
{
	free_block(block_of(object));
}
