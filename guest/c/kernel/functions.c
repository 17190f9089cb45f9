// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * Bugs in memory and string functions and in bit operations. Names as in Linux's KASAN test suite.
 */
#include "kernel.h"

SCENARIO(kmalloc_memcpy_oob, "slab-out-of-bounds Write 40 32",
	 "copies 40 bytes into an object of 32")
{
	char *from = kmalloc(64), *to = kmalloc(32);

	memcpy(opaque(to), opaque(from), opaque(40ul));
	kfree(from);
	kfree(to);
}

SCENARIO(kmalloc_memset_oob, "slab-out-of-bounds Write 130 128",
	 "fills 130 bytes of an object of 128")
{
	char *p = kmalloc(128);

	memset(opaque(p), 0, opaque(130ul));
	kfree(p);
}

SCENARIO(kmalloc_memmove_negative_size, "out-of-bounds Read 18446744073709551614 4",
	 "moves -2 bytes")
{
	char *p = kmalloc(64);

	memmove(opaque(p), opaque(p + 4), opaque(-2ul));
	kfree(p);
}

SCENARIO(kmalloc_memmove_invalid_size, "slab-out-of-bounds Read 64 64",
	 "moves 64 bytes from within 64")
{
	char *p = kmalloc(64);

	memmove(opaque(p), opaque(p + 4), opaque(64ul));
	kfree(p);
}

/* Fills the last bytes of an object of 120 bytes and `over` more. */
#define memset_over(over, n)                                                                       \
	do {                                                                                       \
		char *p = kmalloc(120);                                                            \
                                                                                                   \
		memset(opaque(p + 120 + (over) - (n)), 0, opaque((size_t)(n)));                    \
		kfree(p);                                                                          \
	} while (0)

SCENARIO(kmalloc_oob_in_memset, "slab-out-of-bounds Write 128 120",
	 "fills 128 bytes of an object of 120")
{
	memset_over(8, 128);
}

SCENARIO(kmalloc_oob_memset_2, "slab-out-of-bounds Write 2 120",
	 "fills 2 bytes across the end of an object")
{
	memset_over(1, 2);
}

SCENARIO(kmalloc_oob_memset_4, "slab-out-of-bounds Write 4 120",
	 "fills 4 bytes across the end of an object")
{
	memset_over(1, 4);
}

SCENARIO(kmalloc_oob_memset_8, "slab-out-of-bounds Write 8 120",
	 "fills 8 bytes across the end of an object")
{
	memset_over(1, 8);
}

SCENARIO(kmalloc_oob_memset_16, "slab-out-of-bounds Write 16 120",
	 "fills 16 bytes across the end of an object")
{
	memset_over(1, 16);
}

SCENARIO(kmalloc_uaf_memset, "slab-use-after-free Write 33 0", "fills a freed object")
{
	char *p = kmalloc(33);

	kfree(p);
	memset(opaque(p), 0, opaque(33ul));
}

static noinline const char *find(const char *text, char wanted, size_t most)
{
	for (; most--; text++)
		if ((char)read8(text) == wanted)
			return text;
	return NULL;
}

SCENARIO(kasan_memchr, "slab-out-of-bounds Read 1 24", "searches 25 bytes of an object of 24")
{
	char *p = kmalloc(24);

	memset(p, 0, opaque(24ul));
	opaque(find(p, '1', 25));
	kfree(p);
}

SCENARIO(kasan_memcmp, "slab-out-of-bounds Read 25 24", "compares 25 bytes of an object of 24")
{
	char *p = kmalloc(24), *q = kmalloc(32);

	memset(p, 0, opaque(24ul));
	memset(q, 0, opaque(32ul));
	opaque(memcmp(opaque(p), opaque(q), opaque(25ul)));
	kfree(p);
	kfree(q);
}

static noinline const char *string_chr(const char *text, char wanted)
{
	for (;; text++) {
		char c = (char)read8(text);

		if (c == wanted)
			return text;
		if (!c)
			return NULL;
	}
}

static noinline const char *string_rchr(const char *text, char wanted)
{
	const char *last = NULL;

	for (;; text++) {
		char c = (char)read8(text);

		if (c == wanted)
			last = text;
		if (!c)
			return last;
	}
}

static noinline int string_cmp(const char *a, const char *b)
{
	for (;; a++, b++) {
		int difference = read8(a) - *b;

		if (difference || !*b)
			return difference;
	}
}

static noinline int string_ncmp(const char *a, const char *b, size_t most)
{
	for (; most--; a++, b++) {
		int difference = read8(a) - *b;

		if (difference || !*b)
			return difference;
	}
	return 0;
}

static noinline size_t string_nlen(const char *text, size_t most)
{
	size_t n = 0;

	while (n < most && read8(text + n))
		n++;
	return n;
}

SCENARIO(kasan_strings,
	 "slab-use-after-free Read 1 16;slab-use-after-free Read 1 16;"
	 "slab-use-after-free Read 1 16;slab-use-after-free Read 1 16;"
	 "slab-use-after-free Read 1 16;slab-use-after-free Read 1 16",
	 "searches, compares and measures a freed string, by six functions")
{
	char *p = kmalloc(24);

	memset(p, 0, opaque(24ul));
	kfree(p);
	/* The first bytes hold the free list. Each function stops at the first byte it reads. */
	p += 16;
	opaque(string_chr(p, '1'));
	opaque(string_rchr(p, '1'));
	opaque(string_cmp(p, "2"));
	opaque(string_ncmp(p, "2", 1));
	opaque(strlen(opaque(p)));
	opaque(string_nlen(p, 1));
}

/*
 * Bit operations that are not atomic are assembly with checks of their own, as in Linux
 * (asm-generic/bitops/instrumented-non-atomic.h).
 */
#define plain_bit(instruction, word, bit)                                                          \
	({                                                                                         \
		bool before;                                                                       \
		umbra_check((uint64_t)(word), 8, true);                                            \
		__asm__ volatile(instruction " %2, %1\n\tsetc %0"                                  \
				 : "=q"(before), "+m"(*(word))                                     \
				 : "r"((uint64_t)(bit))                                            \
				 : "cc");                                                          \
		before;                                                                            \
	})

SCENARIO(kasan_bitops_generic,
	 "slab-out-of-bounds Write 8 9;slab-out-of-bounds Write 8 9;slab-out-of-bounds Write 8 9;"
	 "slab-out-of-bounds Write 8 9;slab-out-of-bounds Write 8 9;slab-out-of-bounds Write 8 9;"
	 "slab-out-of-bounds Write 8 9;slab-out-of-bounds Write 8 9;slab-out-of-bounds Write 8 9;"
	 "slab-out-of-bounds Write 8 9;slab-out-of-bounds Write 8 9;slab-out-of-bounds Write 8 9;"
	 "slab-out-of-bounds Write 8 9;slab-out-of-bounds Write 8 9;slab-out-of-bounds Write 8 9;"
	 "slab-out-of-bounds Read 8 9;slab-out-of-bounds Write 8 9",
	 "sets, clears, flips and tests bits behind the 9 bytes of a bitmap, atomically and not")
{
	char *p = kmalloc(9);
	uint64_t *word = (uint64_t *)(p + 8);
	const uint64_t inside = 1, behind = 1 << 8;

	__atomic_fetch_or(opaque(word), inside, __ATOMIC_RELAXED);
	plain_bit("btsq", word, 0);
	__atomic_fetch_and(opaque(word), ~inside, __ATOMIC_RELAXED);
	plain_bit("btrq", word, 0);
	__atomic_fetch_and(opaque(word), ~inside, __ATOMIC_RELEASE);
	plain_bit("btrq", word, 0);
	__atomic_fetch_xor(opaque(word), inside, __ATOMIC_RELAXED);
	plain_bit("btcq", word, 0);

	opaque(__atomic_fetch_or(opaque(word), behind, __ATOMIC_ACQ_REL));
	opaque(plain_bit("btsq", word, 8));
	opaque(__atomic_fetch_or(opaque(word), behind, __ATOMIC_ACQUIRE));
	opaque(__atomic_fetch_and(opaque(word), ~behind, __ATOMIC_ACQ_REL));
	opaque(plain_bit("btrq", word, 8));
	opaque(__atomic_fetch_xor(opaque(word), behind, __ATOMIC_ACQ_REL));
	opaque(plain_bit("btcq", word, 8));
	opaque(*(volatile uint64_t *)opaque(word) & behind);
	opaque(__atomic_fetch_and(opaque(word), ~behind, __ATOMIC_RELEASE) & 0x80);
	kfree(p);
}
