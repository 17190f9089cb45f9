// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * Page tables and the start of checks. Compiled without the sanitizer: it runs before the shadow is
 * mapped.
 */
#include "kernel.h"

#define RING_BYTES (512ul << 10)
#define PRESENT_WRITABLE 3ul
#define LARGE 0x80ul
#define LARGE_PAGE (2ul << 20)
#define MAPPED_AT_BOOT (1ul << 30)
#define FRAME 0x000ffffffffff000ul

extern uint64_t boot_pml4[512], boot_pd_shadow[512];
extern char boot_stack[], image_end[], text_start[], text_end[];
extern void (*const constructors_start[])(void), (*const constructors_end[])(void);

/* Guest-physical addresses: the next free byte at start, and the end of memory. */
static uint64_t next, end;

_Noreturn void kernel_main(uint64_t boot_params);

/* Takes memory in whole pages. It is zeroed, because nothing has used it yet. */
static uint64_t take(uint64_t bytes)
{
	uint64_t at = next;

	next += (bytes + PAGE_SIZE - 1) & ~(PAGE_SIZE - 1);
	if (next > end) {
		print("not enough memory to start\n");
		if (on_umbra)
			umbra_exit_panic();
		reset();
	}
	return at;
}

void map(const struct umbra_mapping *mapping)
{
	for (uint64_t done = 0; done < mapping->bytes;) {
		uint64_t at = mapping->start + done, gpa = mapping->gpa + done;
		bool large = !((at | gpa) % LARGE_PAGE);
		volatile uint64_t *table = boot_pml4;

		for (int shift = 39; shift > (large ? 21 : 12); shift -= 9) {
			volatile uint64_t *entry = &table[at >> shift & 511];

			if (!(*entry & 1))
				*entry = take(PAGE_SIZE) | PRESENT_WRITABLE;
			table = (uint64_t *)(DIRECT_MAP + (*entry & FRAME));
		}
		table[at >> (large ? 21 : 12) & 511] = gpa | PRESENT_WRITABLE | (large ? LARGE : 0);
		done += large ? LARGE_PAGE : PAGE_SIZE;
	}
}

char *memory_end(void)
{
	return (char *)(DIRECT_MAP + end);
}

/* Drops what the CPU has cached of the old tables. */
static void flush(void)
{
	uint64_t cr3;

	__asm__ volatile("mov %%cr3, %0\n\tmov %0, %%cr3" : "=r"(cr3) : : "memory");
}

/*
 * Reads the zero page at `at` (Documentation/arch/x86/zero-page.rst). Notes the end of memory and
 * returns the command line.
 */
static const char *boot_info(const uint8_t *at)
{
	for (int i = 0; i < at[0x1e8]; i++) {
		struct {
			uint64_t start, bytes;
			uint32_t type;
		} __attribute__((packed)) entry;

		__builtin_memcpy(&entry, at + 0x2d0 + 20 * i, sizeof(entry));
		if (entry.type == 1 && entry.start >= 1 << 20 && entry.start + entry.bytes > end)
			end = (entry.start + entry.bytes) & ~(PAGE_SIZE - 1);
	}
	return (const char *)(DIRECT_MAP + *(const uint32_t *)(at + 0x228));
}

static void start_checks(const struct umbra_offer *offer)
{
	const struct umbra_region regions[] = {
		{DIRECT_MAP, end, 0},
		{IMAGE_MAP, (uint64_t)image_end - IMAGE_MAP, 0},
	};

	if (!offer->features)
		return;
	/* The scratch page goes; nothing that stores shadow runs until the windows are mapped. */
	for (int i = 384; i < 512; i++)
		boot_pd_shadow[i] = 0;
	for (size_t i = 0; i < array_size(regions); i++) {
		struct umbra_mapping shadow[2];

		umbra_mappings(offer, &regions[i], shadow);
		map(&shadow[0]);
		map(&shadow[1]);
	}
	flush();
	if (!umbra_start(offer, regions, array_size(regions),
			 (void *)(DIRECT_MAP + take(RING_BYTES)), RING_BYTES, (uint64_t)text_start,
			 (uint64_t)text_end, current_task)) {
		print("Umbra refused: checks are off\n");
		return;
	}
	umbra_stack_alloc((uint64_t)boot_stack, BOOT_STACK);
}

_Noreturn void kernel_main(uint64_t boot_params)
{
	const char *command_line = boot_info((const uint8_t *)(DIRECT_MAP + boot_params));
	const char *ready;
	struct umbra_offer offer;

	next = (uint64_t)image_end - IMAGE_MAP;
	umbra_discover(&offer);
	on_umbra = umbra_present(&offer);
	if (!on_umbra)
		print("no Umbra underneath: checks are off\n");
	if (end > MAPPED_AT_BOOT)
		map(&(struct umbra_mapping){
			.start = DIRECT_MAP + MAPPED_AT_BOOT,
			.gpa = MAPPED_AT_BOOT,
			.bytes = end - MAPPED_AT_BOOT,
		});
	start_checks(&offer);
	/* Nothing runs at a low address any more. */
	boot_pml4[0] = 0;
	flush();
	fault_init();
	umbra_run_constructors(constructors_start, constructors_end);
	alloc_init(next, end);
	umbra_name_task(0, "kernel", 6);
	ready = option(command_line, "ready=");
	if (ready)
		ready_run(&offer, ready);
	else
		scenarios_run(command_line);
	if (on_umbra)
		umbra_exit(0);
	reset();
}
