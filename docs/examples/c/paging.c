/* Page tables. */
#include "kernel.h"

#define PRESENT_WRITABLE 3ul
#define LARGE 0x80ul
#define LARGE_PAGE (2ul << 20)
#define FRAME 0x000ffffffffff000ul

extern uint64_t boot_pml4[512];
static uint64_t tables[32][512] __attribute__((aligned(4096)));
static unsigned used;

void map(uint64_t at, uint64_t physical, uint64_t bytes)
{
	uint64_t end = at + bytes;

	while (at < end) {
		int large = (at | physical) % LARGE_PAGE == 0, shift;
		uint64_t *table = boot_pml4;

		for (shift = 39; shift > (large ? 21 : 12); shift -= 9) {
			uint64_t *entry = &table[at >> shift & 511];

			if (!(*entry & 1))
				*entry = ((uint64_t)tables[used++] - IMAGE_MAP) | PRESENT_WRITABLE;
			table = (uint64_t *)(DIRECT_MAP + (*entry & FRAME));
		}
		table[at >> shift & 511] = physical | PRESENT_WRITABLE | (large ? LARGE : 0);
		at += large ? LARGE_PAGE : 4096;
		physical += large ? LARGE_PAGE : 4096;
	}
}
