/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Runs one of the workloads over a set with shadow, and prints the CPU time of
 * a run in nanoseconds and the result: WORKLOAD BYTES SHADOW RUNS. SHADOW is
 * none, full, patterns, untyped or bytes (page shadow that says: byte-checked).
 *
 * The set begins at an address whose shadow has room: its page shadow lies at
 * address / 4096, its byte shadow at address / 8, as in a guest.
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "workloads.h"

#define SET ((uint8_t *)(1ull << 44))
#define PAGE 4096ull
#define PAGE_SHADOW 12
#define BYTE_SHADOW 3

static void die(const char *what)
{
	perror(what);
	exit(1);
}

/* Maps shadow for `bytes` bytes from `start` on, all of it `value`. */
static void shadow(uintptr_t start, size_t bytes, int shift, int value)
{
	uintptr_t first = start >> shift & ~(PAGE - 1);
	uintptr_t end = ((start + bytes) >> shift) + PAGE;
	int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE;
	void *map = mmap((void *)first, end - first, PROT_READ | PROT_WRITE, flags, -1, 0);

	if (map == MAP_FAILED)
		die("mmap of shadow");
	madvise(map, end - first, MADV_NOHUGEPAGE);
	memset(map, value, end - first);
}

/* Maps the check shadow of the set: a pattern page for each 32 KiB, all of which are accessible. */
static void patterns(size_t bytes)
{
	int file = memfd_create("patterns", MFD_CLOEXEC);

	if (file < 0 || ftruncate(file, PAGE))
		die("memfd_create");
	for (size_t group = 0; group < bytes >> 15; group++) {
		void *at = (void *)(((uintptr_t)SET >> 3) + group * PAGE);
		int flags = MAP_SHARED | MAP_FIXED_NOREPLACE | MAP_POPULATE;

		if (mmap(at, PAGE, PROT_READ, flags, file, 0) == MAP_FAILED)
			die("mmap of patterns");
	}
}

static uint64_t now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
	return time.tv_sec * 1000000000ull + time.tv_nsec;
}

extern const char __executable_start, end;

static workload *find(const char *name)
{
	static const struct {
		const char *name;
		workload *run;
	} all[] = { { "list", list }, { "hash", hash }, { "sort", sort }, { "lz", lz },
		    { "parse", parse } };

	for (size_t i = 0; i < sizeof(all) / sizeof(*all); i++)
		if (!strcmp(all[i].name, name))
			return all[i].run;
	fprintf(stderr, "no workload %s\n", name);
	exit(2);
}

int main(int argc, char **argv)
{
	if (argc != 5)
		return 2;
	workload *run = find(argv[1]);
	size_t bytes = strtoull(argv[2], NULL, 0);
	const char *kind = argv[3];
	int runs = atoi(argv[4]), flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE;
	uintptr_t image = (uintptr_t)&__executable_start, stack = (uintptr_t)&argc - (64 << 10);
	uint8_t *set = mmap(SET, bytes, PROT_READ | PROT_WRITE, flags, -1, 0);

	if (set == MAP_FAILED)
		die("mmap of the set");
	madvise(set, bytes, MADV_NOHUGEPAGE);
	for (int shift = BYTE_SHADOW; shift <= PAGE_SHADOW; shift += PAGE_SHADOW - BYTE_SHADOW) {
		shadow(image, (uintptr_t)&end - image, shift, 0);
		shadow(stack, 128 << 10, shift, 0);
	}
	if (!strcmp(kind, "patterns"))
		patterns(bytes);
	if (!strcmp(kind, "full") || !strcmp(kind, "bytes"))
		shadow((uintptr_t)set, bytes, BYTE_SHADOW, 0);
	if (!strcmp(kind, "untyped") || !strcmp(kind, "bytes"))
		shadow((uintptr_t)set, bytes, PAGE_SHADOW, !strcmp(kind, "bytes"));

	uint64_t result = run(set, bytes, 7), begin = now();

	for (int i = 0; i < runs; i++)
		result += run(set, bytes, 7);
	printf("%llu %llu\n", (unsigned long long)(now() - begin) / runs,
	       (unsigned long long)result);
	return 0;
}

/* What inline checks call. */
#define REPORT(access)                                                          \
	void __asan_report_##access##_noabort(uintptr_t at)                     \
	{                                                                       \
		fprintf(stderr, "a false finding at %#lx\n", (unsigned long)at); \
		exit(3);                                                        \
	}
REPORT(load1) REPORT(load2) REPORT(load4) REPORT(load8) REPORT(load16) REPORT(load_n)
REPORT(store1) REPORT(store2) REPORT(store4) REPORT(store8) REPORT(store16) REPORT(store_n)
