// SPDX-License-Identifier: MIT OR Apache-2.0
/* Bugs of the shapes that public reports about small kernels describe. */
#include "kernel.h"

static noinline void copy_name(char *to, const char *from, size_t n)
{
	size_t i;

	for (i = 0; i < n; i++)
		to[i] = from[i];
	to[i] = 0;
}

SCENARIO(copied_terminator, "slab-out-of-bounds Write 1 256",
	 "copies a name with its NUL into a buffer that has no room for the NUL")
{
	char *from = kmalloc(256), *to = kmalloc(256);

	memset(from, 'n', 256);
	copy_name(opaque(to), from, 256);
	kfree(from);
	kfree(to);
}

static noinline void send_frame(const char *payload, size_t room, size_t bytes)
{
	char frame[room];

	memcpy(opaque(&frame[0]), payload, bytes);
	read8(&frame[0]);
}

SCENARIO(short_frame, "alloca-out-of-bounds Write 60 -",
	 "copies 60 bytes into a variable-length array of 40")
{
	static const char payload[64] = "data";

	send_frame(opaque(&payload[0]), opaque(40ul), opaque(60ul));
}

static uint16_t global_screen[80 * 25];

/* A function of its own, so that no compiler unrolls the loop: one access is at fault. */
static noinline void copy_cell(uint16_t *to, const uint16_t *from)
{
	*to = *from;
}

static noinline void scroll_up(void)
{
	for (unsigned row = 0; row < 25; row++)
		for (unsigned column = 0; column < 80; column++)
			copy_cell(&global_screen[row * 80 + column],
				  &global_screen[(row + 1) * 80 + column]);
}

SCENARIO(screen_scroll, "global-out-of-bounds Read 2 4000",
	 "scrolls a text screen by a line more than it has")
{
	scroll_up();
}

struct packed_header {
	uint16_t kind : 4, length : 12;
	uint8_t flags;
} __attribute__((packed));

static noinline unsigned sum_of_kinds(const uint8_t *at, const uint8_t *end)
{
	unsigned sum = 0;

	while (at < end) {
		const struct packed_header *header = (const struct packed_header *)at;

		sum += header->kind;
		at += sizeof(*header) + header->length;
	}
	return sum;
}

SCENARIO(cut_off_header, "slab-out-of-bounds Read 2 21",
	 "walks a list whose last header has only its first byte")
{
	uint8_t *list = kmalloc(21);

	memset(list, 0, 21);
	/* Two items without and with 14 bytes, then one byte of a header. */
	list[3] = (uint8_t)(14 << 4);
	opaque(sum_of_kinds(opaque(list), opaque(list) + 21));
	kfree(list);
}

struct node {
	struct node *next;
	uint64_t value;
};

static noinline void free_list(struct node *head)
{
	for (struct node *at = head; at; at = at->next)
		kfree(at);
}

SCENARIO(list_freed_in_a_walk, "slab-use-after-free Read 8 0",
	 "frees a list by a loop that follows the freed node's link")
{
	struct node *a = kmalloc(sizeof(*a)), *b = kmalloc(sizeof(*b));

	b->next = NULL;
	a->next = b;
	free_list(opaque(a));
}

SCENARIO(bitmap_one_past, "slab-out-of-bounds Read 1 32", "sets bit 256 of a bitmap of 256")
{
	uint8_t *map = kmalloc(256 / 8);
	unsigned frame = opaque(256u);

	memset(map, 0, 256 / 8);
	opaque(map)[frame / 8] |= (uint8_t)(1 << frame % 8);
	kfree(map);
}

SCENARIO(kfree_of_variable, "invalid-free Free 0 0", "frees an array on the stack")
{
	char local[64];

	write8(local, 1);
	kfree(opaque(&local[0]));
}

static char global_buffer[13] = "static";

SCENARIO(kfree_of_global, "invalid-free Free 0 0", "frees a global variable")
{
	kfree(opaque(&global_buffer[0]));
}

/* An allocator that believes the header before the memory. */
struct block {
	uint64_t slot;
	uint64_t used;
};

static noinline char *block_alloc(char *pool, size_t bytes)
{
	struct block *block = (struct block *)pool;

	block->slot = (bytes + 15) / 16 * 16 + 32;
	block->used = 1;
	umbra_alloc((uint64_t)(block + 1), bytes, block->slot, UMBRA_SLAB_REDZONE, 0);
	return (char *)(block + 1);
}

static noinline void block_free(char *at)
{
	const struct block *block = (const struct block *)at - 1;
	uint64_t start = (uint64_t)at;

	if (block->used)
		umbra_free(start, start, block->slot, UMBRA_SLAB_FREE);
}

static noinline void fake_header(char *at)
{
	struct block *block = (struct block *)at;

	block->slot = 16;
	block->used = 1;
}

SCENARIO(header_invalid_free, "invalid-free Free 0 16",
	 "frees an address inside an object, where something looks like an allocator's header")
{
	char *pool = page_alloc(0);
	char *object = block_alloc(pool, 64);

	fake_header(object);
	block_free(opaque(object + 16));
	block_free(object);
	page_free(pool);
}

SCENARIO(header_free_of_variable, "invalid-free Free 0 16",
	 "frees an address in an array on the stack, behind what looks like an allocator's header")
{
	char local[64] __attribute__((aligned(16)));

	fake_header(opaque(&local[0]));
	block_free(opaque(&local[16]));
}
