// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * What leads to the runtime's ready interrupt entries, one case in a run: `ready=CASE` on the
 * command line. The interrupt table has these entries and nothing else.
 */
#include "kernel.h"

#define CODE 0x08
#define TASK 0x10
#define DOUBLE_FAULT 8
#define PAGE_FAULT 14

/* Virtual memory with a key of its own: a guard page, a stack above it; one more page at its end */
#define AREA 0xffffc90000000000ul
#define AREA_BYTES (16ul << 20)
#define STACK (AREA + PAGE_SIZE)
#define STACK_BYTES (4 * PAGE_SIZE)
#define LAST_PAGE (AREA + AREA_BYTES - PAGE_SIZE)
/* Pages in no region: one that is mapped, one that is not. */
#define WILD 0xffffb00000000000ul
#define WILD_UNMAPPED (WILD + PAGE_SIZE)

static char pages[6][PAGE_SIZE] __attribute__((aligned(4096)));
static char exception_stack[2 * PAGE_SIZE] __attribute__((aligned(16)));

static uint64_t physical(const void *at)
{
	return (uint64_t)at - IMAGE_MAP;
}

static void map_page(uint64_t at, const void *page)
{
	map(&(struct umbra_mapping){.start = at, .gpa = physical(page), .bytes = PAGE_SIZE});
}

/* Maps the area's pages and their shadow. */
static bool area_init(const struct umbra_offer *offer)
{
	uint64_t key = umbra_virtual_add(AREA, AREA_BYTES);
	const struct umbra_region area = {AREA, AREA_BYTES, key};
	struct umbra_mapping shadow[2];

	if (!key)
		return false;
	umbra_mappings(offer, &area, shadow);
	map(&shadow[0]);
	map(&shadow[1]);
	for (size_t i = 0; i < STACK_BYTES / PAGE_SIZE; i++)
		map_page(STACK + i * PAGE_SIZE, pages[i]);
	map_page(LAST_PAGE, pages[4]);
	map_page(WILD, pages[5]);
	umbra_poison(AREA, PAGE_SIZE, UMBRA_STACK_GUARD);
	umbra_stack_alloc(STACK, STACK_BYTES);
	umbra_unpoison(LAST_PAGE, PAGE_SIZE);
	return true;
}

static uint64_t idt[PAGE_FAULT + 1][2];

static void gate(unsigned vector, void (*entry)(void), uint64_t stack)
{
	uint64_t at = (uint64_t)entry;

	idt[vector][0] = (at & 0xffff) | CODE << 16 | stack << 32 | 0x8eul << 40 |
			 (at >> 16 & 0xffff) << 48;
	idt[vector][1] = at >> 32;
}

/* Loads the table, and a task state whose first IST entry is the stack for double faults. */
static void idt_init(void)
{
	static uint32_t task_state[26];
	static uint64_t gdt[4] = {0, 0x00af9b000000ffff};
	uint64_t at = (uint64_t)task_state;
	uint64_t top = (uint64_t)exception_stack + sizeof(exception_stack);
	struct table_pointer gdt_pointer = {sizeof(gdt) - 1, (uint64_t)gdt};
	struct table_pointer idt_pointer = {sizeof(idt) - 1, (uint64_t)idt};

	task_state[9] = (uint32_t)top;
	task_state[10] = (uint32_t)(top >> 32);
	gdt[2] = (sizeof(task_state) - 1) | (at & 0xffffff) << 16 | 0x89ul << 40 |
		 (at >> 24 & 0xff) << 56;
	gdt[3] = at >> 32;
	__asm__ volatile("lgdt %0\n\tltr %w1\n\tlidt %2"
			 :
			 : "m"(gdt_pointer), "r"(TASK), "m"(idt_pointer)
			 : "memory");
}

/* Reads where the compiler puts no check. */
static noinline uint8_t read_unchecked(uint64_t at)
{
	uint8_t value;

	__asm__ volatile("movb (%1), %0" : "=r"(value) : "r"(at) : "memory");
	return value;
}

static noinline uint8_t read_wild(uint64_t at)
{
	return read8((const void *)at);
}

/*
 * An access beside the area's end. The lookup of its shadow takes a byte of the page behind the
 * area's shadow as well, which is not mapped.
 */
static noinline void read_last(void)
{
	pages[4][PAGE_SIZE - 1] = 7;
	if (*(const volatile uint32_t *)opaque(LAST_PAGE + PAGE_SIZE - 5) != 0 ||
	    read8((const void *)(LAST_PAGE + PAGE_SIZE - 1)) != 7)
		print("read_last: a wrong value\n");
}

static noinline uint64_t too_deep(uint64_t depth)
{
	uint64_t frame[5];
	volatile uint64_t *p = opaque(&frame[0]);

	p[4] = depth;
	return depth ? too_deep(depth - 1) + p[4] : p[0];
}

/* Calls too_deep() on the area's stack. */
static noinline void overflow(void)
{
	__asm__ volatile("mov %%rsp, %%rbx\n\tmov %0, %%rsp\n\tcall *%1\n\tmov %%rbx, %%rsp"
			 :
			 : "r"(STACK + STACK_BYTES), "r"(too_deep), "D"(10000ul)
			 : "rbx", "rax", "rcx", "rdx", "rsi", "r8", "r9", "r10", "r11", "memory");
}

static bool is(const char *name, const char *other)
{
	while (*name && *name == *other)
		name++, other++;
	return !*name && (!*other || *other == ' ');
}

void ready_run(const struct umbra_offer *offer, const char *name)
{
	/* Without the entry for page faults. */
	bool alone = is("double_fault_alone", name);

	if (!area_init(offer)) {
		print("ready: no virtual memory\n");
		return;
	}
	if (!alone)
		gate(PAGE_FAULT, umbra_page_fault_entry, 0);
	gate(DOUBLE_FAULT, umbra_double_fault_entry, 1);
	idt_init();
	pages[5][8] = 42;
	if (is("wild", name) || alone) {
		if (read_wild(WILD + 8) != 42)
			print("ready: a wrong value\n");
	} else if (is("wild_unmapped", name)) {
		read_wild(WILD_UNMAPPED + 8);
	} else if (is("page_fault", name)) {
		read_unchecked(WILD + 8);
		read_unchecked(WILD_UNMAPPED + 8);
	} else if (is("last_page", name)) {
		read_last();
	} else if (is("overflow", name)) {
		overflow();
	} else {
		print("ready: no such case\n");
		return;
	}
	print("ready: done\n");
}
