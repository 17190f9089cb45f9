// SPDX-License-Identifier: MIT OR Apache-2.0
/* Bugs on stack and global variables. */
#include "kernel.h"

SCENARIO(kasan_stack_oob, "stack-out-of-bounds Read 1 10", "reads behind an array on the stack")
{
	char stack_array[10];
	char *p = opaque(stack_array);

	write8(p + 9, 1);
	read8(p + 10);
}

SCENARIO(kasan_stack_oob_left, "stack-out-of-bounds Write 1 -1",
	 "writes before an array on the stack")
{
	char stack_array[24];
	char *p = opaque(stack_array);

	write8(p, 1);
	write8(p - 1, 1);
}

SCENARIO(stack_oob_between, "stack-out-of-bounds Read 4 12",
	 "reads behind a variable, where another is not far")
{
	int first[3], second[3];
	int *p = opaque(first), *q = opaque(second);

	p[2] = 1;
	q[2] = 1;
	opaque(*(volatile int *)opaque(p < q ? p + 3 : q + 3));
}

SCENARIO(use_after_scope, "use-after-scope Write 1 3", "writes to a variable whose block has ended")
{
	char *p;

	{
		char inner[40];

		p = opaque(inner);
		write8(p, 1);
	}
	write8(p + 3, 1);
}

struct range {
	char *start;
	size_t bytes;
};

static noinline struct range dangling(void)
{
	char array[512];
	struct range range = {opaque(&array[0]), sizeof(array)};

	write8(range.start, 1);
	return range;
}

static noinline void use_again(struct range stale)
{
	char again[24];
	char *p = opaque(&again[0]);

	write8(p, 1);
	if (p + 24 >= stale.start && p + 24 < stale.start + stale.bytes)
		write8(p + 24, 1);
	else
		print("use_after_return: the stack was not used again\n");
}

static noinline void further_down(struct range stale)
{
	char array[64];

	write8(opaque(&array[0]), 1);
	use_again(stale);
	write8(opaque(&array[0]), 1);
}

SCENARIO(use_after_return, "stack-out-of-bounds Write 1 24",
	 "writes through a pointer to a variable of a function that has returned, when another "
	 "uses that part of the stack")
{
	further_down(dangling());
}

SCENARIO(use_after_scope_in_loop, "use-after-scope Read 1 0",
	 "reads, in a second round, a variable of the first")
{
	char *p = NULL;

	for (int i = 0; i < 2; i++) {
		char inner[16];

		if (i == 0) {
			p = opaque(inner);
			write8(p, 1);
		}
		opaque(i);
	}
	read8(p);
}

SCENARIO(kasan_alloca_oob_left, "alloca-out-of-bounds Read 1 -",
	 "reads before an array of variable length")
{
	char array[opaque(10ul)];

	read8((char *)opaque(&array[0]) - 1);
}

SCENARIO(kasan_alloca_oob_right, "alloca-out-of-bounds Read 1 -;alloca-out-of-bounds Write 1 -",
	 "reads and writes behind an array of variable length")
{
	size_t n = opaque(10ul);
	char array[n];
	char *p = opaque(&array[0]);

	write8(p + n - 1, 1);
	read8(p + n);
	write8(p + 16, 1);
}

SCENARIO(alloca_large_oob, "alloca-out-of-bounds Write 1 -",
	 "writes behind an alloca of pages, then uses the stack again")
{
	for (int i = 0; i < 2; i++) {
		size_t n = opaque(3 * 4096ul);
		char *p = __builtin_alloca(n);

		write8(p, 1);
		write8(p + n - 1, 1);
		if (i == 1)
			write8(p + n, 1);
	}
}

static noinline void allocas_come_and_go(void)
{
	char array[opaque(3 * 4096ul)];

	write8(array, 1);
}

static noinline void deep_frame(void)
{
	char far_down[8192], array[16];
	char *p = opaque(&array[0]);

	write8(opaque(&far_down[0]), 1);
	read8(p + 16);
}

SCENARIO(stack_oob_after_alloca, "stack-out-of-bounds Read 1 16",
	 "overruns an array where an alloca of pages was before")
{
	allocas_come_and_go();
	deep_frame();
}

static char global_array[10] = "global";
static char global_first[13] = "first";
static char global_second[13] = "second";

SCENARIO(kasan_global_oob_right, "global-out-of-bounds Read 1 13", "reads behind a global variable")
{
	char *p = opaque(&global_array[0]);

	read8(p + 9);
	read8(p + 13);
}

/*
 * Compilers put no redzone before a variable: the access hits the one behind its neighbour. A
 * variable of 13 bytes and its redzone take 32 bytes with clang, and 64 with gcc.
 */
#ifdef __clang__
#define BEFORE_NEIGHBOUR "29"
#else
#define BEFORE_NEIGHBOUR "61"
#endif

SCENARIO(kasan_global_oob_left, "global-out-of-bounds Read 1 " BEFORE_NEIGHBOUR,
	 "reads before a global variable that has a neighbour")
{
	char *a = opaque(&global_first[0]), *b = opaque(&global_second[0]);

	read8((a > b ? a : b) - 3);
}
