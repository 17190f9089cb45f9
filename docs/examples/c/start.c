/* The first C code that runs, and the console. */
#include "kernel.h"

static void out8(uint16_t port, uint8_t value)
{
	__asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port));
}

void print(const char *text)
{
	while (*text)
		out8(0x3f8, *text++);
}

void print_number(unsigned number)
{
	if (number > 9)
		print_number(number / 10);
	out8(0x3f8, '0' + number % 10);
}

void start(void)
{
	kernel_main();
	/* Resets the machine. */
	out8(0x64, 0xfe);
	for (;;)
		__asm__ volatile("cli; hlt");
}
