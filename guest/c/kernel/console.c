// SPDX-License-Identifier: MIT OR Apache-2.0
/* The machine around the kernel: its serial console (COM1), its reset, and whether it is Umbra. */
#include "kernel.h"

#define COM1 0x3f8

bool on_umbra;

void out8(uint16_t port, uint8_t value)
{
	__asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port));
}

void print(const char *text)
{
	for (; *text; text++) {
		if (*text == '\n')
			out8(COM1, '\r');
		out8(COM1, (uint8_t)*text);
	}
}

void print_hex(uint64_t value)
{
	char digits[19] = "0x";

	for (int i = 0; i < 16; i++)
		digits[2 + i] = "0123456789abcdef"[value >> (60 - 4 * i) & 15];
	digits[18] = 0;
	print(digits);
}

/* Resets the machine through the keyboard controller. */
_Noreturn void reset(void)
{
	out8(0x64, 0xfe);
	for (;;)
		__asm__ volatile("cli; hlt");
}
