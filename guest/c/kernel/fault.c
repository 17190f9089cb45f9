// SPDX-License-Identifier: MIT OR Apache-2.0
/* The interrupt table and the exception handler. */
#include "kernel.h"

#define VECTORS 32
#define PAGE_FAULT 14
#define CODE 0x08

/* The stack, as boot.S leaves it. */
struct frame {
	uint64_t rbp, r11, r10, r9, r8, rdi, rsi, rdx, rcx, rax;
	uint64_t vector, error, rip, cs, rflags, rsp, ss;
};

extern const char fault_stubs[], probe_access[], probe_done[];
static uint64_t idt[VECTORS][2];

void fault(struct frame *frame);

void fault_init(void)
{
	struct table_pointer pointer = {sizeof(idt) - 1, (uint64_t)idt};

	for (uint64_t vector = 0; vector < VECTORS; vector++) {
		uint64_t stub = (uint64_t)fault_stubs + 16 * vector;

		/* An interrupt gate, on the stack that is in use. */
		idt[vector][0] = (stub & 0xffff) | CODE << 16 | 0x8eul << 40 |
				 (stub >> 16 & 0xffff) << 48;
		idt[vector][1] = stub >> 32;
	}
	__asm__ volatile("lidt %0" : : "m"(pointer));
}

void fault(struct frame *frame)
{
	uint64_t address;

	__asm__ volatile("mov %%cr2, %0" : "=r"(address));
	if (frame->vector == PAGE_FAULT) {
		struct umbra_trap trap = {
			.rdi = frame->rdi,
			.rsi = frame->rsi,
			.rbp = frame->rbp,
			.rip = frame->rip,
			.rsp = frame->rsp,
		};

		if (umbra_page_fault(&trap)) {
			frame->rip = trap.rip;
			frame->rsp = trap.rsp;
			return;
		}
		/* A scenario's wild access was reported already, and its result is not used. */
		if (frame->rip == (uint64_t)probe_access) {
			frame->rip = (uint64_t)probe_done;
			return;
		}
	}
	print("exception ");
	print_hex(frame->vector);
	print(" at ");
	print_hex(frame->rip);
	print(", error code ");
	print_hex(frame->error);
	print(", cr2 ");
	print_hex(address);
	print("\n");
	if (on_umbra)
		umbra_exit_fault((uint32_t)frame->vector, (uint32_t)frame->error, frame->rip,
				 address);
	reset();
}
