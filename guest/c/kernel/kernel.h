/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Declarations that the parts of the C test kernel share. */
#ifndef KERNEL_H
#define KERNEL_H

#include <umbra.h>

#define DIRECT_MAP 0xffff800000000000ul
#define IMAGE_MAP 0xffffffff80000000ul
#define BOOT_STACK 0x10000ul
#define PAGE_SIZE 4096ul

#define noinline __attribute__((noinline))
#define array_size(a) (sizeof(a) / sizeof((a)[0]))

/* The runtime's, checked. */
void *memcpy(void *to, const void *from, size_t n);
void *memmove(void *to, const void *from, size_t n);
void *memset(void *to, int value, size_t n);
size_t strlen(const char *text);
int memcmp(const void *a, const void *b, size_t n);

/* console.c */
void print(const char *text);
void print_hex(uint64_t value);
void out8(uint16_t port, uint8_t value);
extern bool on_umbra;
_Noreturn void reset(void);

/* start.c */
/* The end of memory, as an address of the direct map. */
char *memory_end(void);
/* Maps memory, in large pages where both addresses allow it. */
void map(const struct umbra_mapping *mapping);

/* fault.c */
struct __attribute__((packed)) table_pointer {
	uint16_t limit;
	uint64_t base;
};
void fault_init(void);

/* ready.c */
void ready_run(const struct umbra_offer *offer, const char *name);

/* boot.S: reads a byte at an address that may not be mapped. */
uint8_t probe_read(uint64_t address);
/*
 * boot.S: runs `body`, which may end by jump_throw(); runs `body` with a buffer on the stack that
 * no compiler knows.
 */
void jump_catch(void (*body)(void));
_Noreturn void jump_throw(void);
void jump_with_buffer(void (*body)(char *buffer, size_t bytes));

/* alloc.c: page blocks of 1 << order pages, and objects */
#define ORDERS 6
void alloc_init(uint64_t start, uint64_t end);
void *page_alloc(unsigned order);
void page_free(void *at);
void *kmalloc(size_t bytes);
void *krealloc(void *at, size_t bytes);
void kfree(void *at);
void kfree_sensitive(void *at);
size_t ksize(void *at);
struct cache;
struct cache *cache_create(const char *name, size_t object);
void *cache_alloc(struct cache *cache);

/* scenarios.c */
struct scenario {
	const char *name;
	void (*body)(void);
};
uint64_t current_task(void);
/* The words behind `option` in a command line; null if it is not there. */
const char *option(const char *command_line, const char *name);
void scenarios_run(const char *command_line);

/*
 * Defines a scenario: its function, its line for the host (`name|verdict|description`; a verdict is
 * `silent`, or findings separated by `;`, each `kind access size offset-in-object`), and its entry
 * in the kernel's table.
 */
#define SCENARIO(name, verdict, about)                                                             \
	static void name(void);                                                                    \
	__asm__(".pushsection .umbra.scenarios, \"a\"\n"                                           \
		".ascii \"" #name "|" verdict "|" about "\\n\"\n"                                  \
		".popsection");                                                                    \
	static const struct scenario scenario_##name                                               \
		__attribute__((used, section(".scenarios"), aligned(16))) = {#name, name};         \
	static noinline void name(void)

/* Hides a value's origin from the optimizer. */
#define opaque(value)                                                                              \
	({                                                                                         \
		__auto_type hidden = (value);                                                      \
		__asm__ volatile("" : "+r"(hidden) : : "memory");                                  \
		hidden;                                                                            \
	})

/* Reads or writes a byte, for real. */
static inline uint8_t read8(const void *at)
{
	return *(const volatile uint8_t *)opaque(at);
}

static inline void write8(void *at, uint8_t value)
{
	*(volatile uint8_t *)opaque(at) = value;
}

#endif
