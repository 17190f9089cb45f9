#ifndef KERNEL_H
#define KERNEL_H

#include <stddef.h>
#include <stdint.h>

#define DIRECT_MAP 0xffff800000000000ul
#define IMAGE_MAP 0xffffffff80000000ul
#define STACK_BYTES 0x10000ul
/* The memory that this kernel uses, from address 0 on. */
#define MEMORY (32ul << 20)

/* boot.S, link.ld */
extern char stack[], image_end[], text_start[], text_end[];

/* paging.c: maps physical memory, writable, in large pages where both addresses allow it */
void map(uint64_t at, uint64_t physical, uint64_t bytes);

/* heap.c: objects of up to 64 bytes */
void *kmalloc(size_t bytes);
void kfree(void *object);

/* start.c */
void print(const char *text);
void print_number(unsigned number);

/* kernel.c */
void kernel_main(void);

#endif
