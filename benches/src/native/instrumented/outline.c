/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Generic KASAN's outline checks as its documentation describes them, compiled
 * as Linux compiles them: one load for an access in a granule, another one for
 * an access over its end.
 */
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>

#define LIKELY(x) __builtin_expect(!!(x), 1)

/* Where memory with shadow begins: in Linux the shadow of user memory is none. */
static const uintptr_t first = 0x10000;

static inline int8_t shadow(uintptr_t at)
{
	return *(const int8_t *)(at >> 3);
}

static inline bool last_byte_is_good(uintptr_t at)
{
	int8_t value = shadow(at);

	return LIKELY(value == 0) || (int8_t)(at & 7) < value;
}

static inline __attribute__((always_inline)) bool is_good(uintptr_t at, unsigned int size)
{
	if (size == 16)
		return LIKELY(*(const uint16_t *)(at >> 3) == 0) &&
		       (LIKELY(at % 8 == 0) || last_byte_is_good(at + 15));
	if (size > 1 && !LIKELY(((at + size - 1) & 7) >= size - 1))
		return shadow(at) == 0 && last_byte_is_good(at + size - 1);
	return last_byte_is_good(at + size - 1);
}

static inline __attribute__((always_inline)) void check(uintptr_t at, unsigned int size)
{
	if (!LIKELY(at + size > at) || !LIKELY(at >= first) || !LIKELY(is_good(at, size)))
		abort();
}

#define ENTRY(size)                                                             \
	void __asan_load##size##_noabort(uintptr_t at) { check(at, size); }     \
	void __asan_store##size##_noabort(uintptr_t at) { check(at, size); }
ENTRY(1) ENTRY(2) ENTRY(4) ENTRY(8) ENTRY(16)

static bool all_are_good(uintptr_t at, uintptr_t size)
{
	for (uintptr_t granule = at & ~7ul; granule < at + size - 1; granule += 8)
		if (granule + 8 <= at + size && shadow(granule))
			return false;
	return last_byte_is_good(at + size - 1);
}

void __asan_loadN_noabort(uintptr_t at, uintptr_t size)
{
	if (size && !all_are_good(at, size))
		abort();
}

void __asan_storeN_noabort(uintptr_t at, uintptr_t size)
{
	__asan_loadN_noabort(at, size);
}
