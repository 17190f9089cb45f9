/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * umbra.h - Umbra's guest runtime, for kernels in C (C11) and C++.
 *
 * Link libumbra_rt.a, compile with -fsanitize=kernel-address (flags: guest/c/umbra.mk), and at
 * start:
 *
 *   1. umbra_discover()            looks for Umbra and its shadow windows
 *   2. map umbra_mappings()        for every linear region (direct map, kernel image), read-write,
 *      cached
 *   3. umbra_region_add()          for each of them
 *   4. umbra_ring_setup()          if features has UMBRA_RING
 *   5. umbra_activate()            from here on accesses are checked
 *   6. umbra_stack_alloc()         for the stack that runs now, then the constructors
 *      (.init_array), which register the redzones of globals
 *
 * Where the compiler checks inline (UMBRA_CHECKS=inline in umbra.mk), step 0 is umbra_early(), and
 * step 2 has nothing to map.
 *
 * After that allocators call umbra_alloc() and umbra_free(). Without Umbra, or before
 * umbra_activate(), every function except umbra_exit*() does nothing, and a check that is a call is
 * a single `ret`.
 *
 * Code compiled with stack instrumentation stores to the byte shadow of its own stack, from its
 * first frame on (gcc always, clang before 16 for some variables). So compile the code that runs
 * before step 2 without the sanitizer, or map the shadow of the first stack to a scratch page until
 * then. A kernel that also runs without Umbra keeps the scratch page mapped there; see
 * guest/c/kernel/boot.S.
 *
 * Addresses are virtual addresses of the upper half unless they are called gpa (guest-physical).
 * Sizes are bytes. Do not call these functions from a non-maskable interrupt. Several CPUs may call
 * them at once; they turn interrupts off where a change must not be interrupted.
 */
#ifndef UMBRA_H
#define UMBRA_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
#define UMBRA_ASSERT static_assert
#define UMBRA_NORETURN [[noreturn]]
extern "C" {
#else
#define UMBRA_ASSERT _Static_assert
#define UMBRA_NORETURN _Noreturn
#endif

/* ABI version of this header; compare with umbra_offer.version. */
#define UMBRA_VERSION 2u

/* Features of this run (umbra_offer.features). */
#define UMBRA_PER_PAGE (1u << 0) /* two-level shadow: both windows exist */
#define UMBRA_FULL (1u << 1)     /* KASAN's layout: only the byte window exists */
#define UMBRA_RING (1u << 2)     /* the guest writes the shadow; events go to rings */
#define UMBRA_SYNC (1u << 3)     /* windows are read-only; each change is a call to the VMM */

/* Poison codes: the reason why memory is inaccessible. They are KASAN's. */
#define UMBRA_FREE_PAGE 0xff     /* a free page */
#define UMBRA_LARGE_REDZONE 0xfe /* behind an allocation that has pages of its own */
#define UMBRA_SLAB_REDZONE 0xfc  /* inside or behind a slab object */
#define UMBRA_SLAB_FREE 0xfb     /* a freed slab object */
#define UMBRA_VMALLOC_INVALID 0xf8 /* virtual memory: free, or behind what was asked for */
#define UMBRA_STACK_GUARD 0xf1   /* a page that no stack may grow into */

#define UMBRA_PAGE_SHIFT 12
#define UMBRA_GRANULE_SHIFT 3

/* Longest name of a cache or task; the rest is cut off. */
#define UMBRA_NAME_MAX 64

/* What the VMM offers, for the kernel to map. */
struct umbra_offer {
	uint32_t features;          /* UMBRA_* bits; 0 without Umbra, or if it keeps no shadow */
	uint32_t version;           /* ABI version of the VMM; 0 without Umbra */
	uint64_t page_window;       /* guest-physical start of the page-shadow window */
	uint64_t page_window_bytes; /* 0 if there is none */
	uint64_t byte_window;       /* guest-physical start of the byte-shadow window */
	uint64_t byte_window_bytes; /* 0 if there is none */
	uint64_t virtual_bytes;     /* virtual memory that umbra_virtual_add() has shadow for */
};

/*
 * Memory that the kernel maps one to one: `bytes` from `gpa` on, at `start`. All multiples of 4096.
 */
struct umbra_region {
	uint64_t start;
	uint64_t bytes;
	uint64_t gpa;
};

/* A piece of a shadow window to map, in whole pages; 0 bytes: nothing to map. */
struct umbra_mapping {
	uint64_t start; /* virtual address */
	uint64_t gpa;   /* guest-physical address inside a window */
	uint64_t bytes;
};

/*
 * First 64 bytes of a ring; records of 64 bytes follow. Only the runtime and the VMM look inside.
 */
struct umbra_ring_header {
	uint64_t count;
	uint64_t claimed; /* the runtime's own */
	uint64_t reserved[6];
};

/* The registers that umbra_page_fault() reads and changes. */
struct umbra_trap {
	uint64_t rdi;
	uint64_t rsi;
	uint64_t rbp;
	uint64_t rip;
	uint64_t rsp;
};

/* A test compares these with the runtime's types (shadow/tests/abi.rs). */
UMBRA_ASSERT(sizeof(struct umbra_offer) == 48, "umbra_offer");
UMBRA_ASSERT(offsetof(struct umbra_offer, version) == 4, "umbra_offer.version");
UMBRA_ASSERT(offsetof(struct umbra_offer, page_window) == 8, "umbra_offer.page_window");
UMBRA_ASSERT(offsetof(struct umbra_offer, page_window_bytes) == 16, "page_window_bytes");
UMBRA_ASSERT(offsetof(struct umbra_offer, byte_window) == 24, "umbra_offer.byte_window");
UMBRA_ASSERT(offsetof(struct umbra_offer, byte_window_bytes) == 32, "byte_window_bytes");
UMBRA_ASSERT(offsetof(struct umbra_offer, virtual_bytes) == 40, "umbra_offer.virtual_bytes");
UMBRA_ASSERT(sizeof(struct umbra_ring_header) == 64, "umbra_ring_header");
UMBRA_ASSERT(sizeof(struct umbra_trap) == 40, "umbra_trap");
UMBRA_ASSERT(offsetof(struct umbra_trap, rsi) == 8, "umbra_trap.rsi");
UMBRA_ASSERT(offsetof(struct umbra_trap, rbp) == 16, "umbra_trap.rbp");
UMBRA_ASSERT(offsetof(struct umbra_trap, rip) == 24, "umbra_trap.rip");
UMBRA_ASSERT(offsetof(struct umbra_trap, rsp) == 32, "umbra_trap.rsp");

/*
 * Returns CPU and task that run now: umbra_who(cpu, task). Called from any context; keep it short.
 */
typedef uint64_t (*umbra_current_fn)(void);

static inline uint64_t umbra_who(uint16_t cpu, uint32_t task)
{
	return (uint64_t)cpu << 16 | (uint64_t)task << 32;
}

/* ---- Start ----------------------------------------------------------------------------------- */

/*
 * Looks for Umbra and fills `offer`. Returns the features, also stored in `offer`. 0 without Umbra,
 * or if the ABI versions differ; `offer.version` then has the VMM's.
 */
uint32_t umbra_discover(struct umbra_offer *offer);

/* Whether an Umbra of this header's version is underneath, so that umbra_exit() ends the guest. */
static inline bool umbra_present(const struct umbra_offer *offer)
{
	return offer->version == UMBRA_VERSION;
}

static inline struct umbra_mapping
umbra_mapping_of(const struct umbra_region *region, unsigned shift, uint64_t window,
		 uint64_t window_bytes)
{
	const uint64_t mask = ((uint64_t)1 << UMBRA_PAGE_SHIFT) - 1;
	uint64_t first = region->gpa >> shift & ~mask;
	uint64_t end = (((region->gpa + region->bytes) >> shift) + mask) & ~mask;
	struct umbra_mapping mapping;

	if (end > window_bytes)
		end = window_bytes;
	/* The lookup shifts the address arithmetically and adds nothing. */
	mapping.start = (uint64_t)((int64_t)region->start >> shift) & ~mask;
	mapping.gpa = window + first;
	mapping.bytes = end > first ? end - first : 0;
	return mapping;
}

/*
 * The mappings, writable and cached, that put the shadow of `region` where the checks look:
 * `out[0]` for its page shadow, `out[1]` for its byte shadow. Map them once, on all CPUs, and never
 * change them: the VMM adds and removes the memory behind them.
 */
static inline void umbra_mappings(const struct umbra_offer *offer,
				  const struct umbra_region *region, struct umbra_mapping out[2])
{
	out[0] = umbra_mapping_of(region, UMBRA_PAGE_SHIFT, offer->page_window,
				  offer->page_window_bytes);
	out[1] = umbra_mapping_of(region, UMBRA_GRANULE_SHIFT, offer->byte_window,
				  offer->byte_window_bytes);
}

/*
 * Adds a region whose shadow is mapped, or will be by umbra_activate() where the compiler checks
 * inline. False when a table is full (16 regions) or a value is refused.
 */
bool umbra_region_add(uint64_t start, uint64_t bytes, uint64_t gpa);

/*
 * Virtual memory that maps single pages, which come and go (vmalloc, modules, mapped stacks), has
 * its own shadow. This function asks for it, for `bytes` from `start` on (multiples of 4096; in all
 * at most umbra_offer.virtual_bytes). The result is a key, a guest-physical address that stands for
 * `start`, or 0 when the request is refused. Map umbra_mappings() of the region {start, bytes,
 * result} once, before the memory is used. Do not call umbra_region_add() for it. The function may
 * be called at any time after umbra_discover() found Umbra.
 *
 * All of the memory is inaccessible (UMBRA_VMALLOC_INVALID) until an allocator hands it out. An
 * allocator of `n` pages for an object of `bytes` calls umbra_alloc(address, bytes, n * 4096,
 * UMBRA_VMALLOC_INVALID, 0) after it maps them, and umbra_free(address, start, n * 4096,
 * UMBRA_VMALLOC_INVALID) before it unmaps them. A guard page behind them needs no call. The shadow
 * of the pages' other addresses (in the direct map) does not change.
 */
uint64_t umbra_virtual_add(uint64_t start, uint64_t bytes);

/*
 * Gives the runtime a CPU's ring: 64-byte aligned, zeroed memory in a region, `bytes` a multiple of
 * 64 and at least 128; 512 KiB make drains rare. `text_start` is where the kernel's code starts,
 * the same for all rings: stacks are recorded as distances from it. Only where features has
 * UMBRA_RING.
 */
bool umbra_ring_setup(uint64_t cpu, struct umbra_ring_header *memory, uint64_t bytes,
		      uint64_t text_start);

/*
 * Turns checks on. No other CPU may run yet. The kernel's code ends at `text_end`. `current` may be
 * null. Where the compiler checks inline, this maps all windows; false when that fails, and checks
 * stay off then.
 */
bool umbra_activate(uint32_t features, uint64_t text_end, umbra_current_fn current);

/*
 * All steps of the start except the mapping: adds the regions, sets up the first CPU's ring, turns
 * checks on. False when something was refused; checks stay off then. True, without any effect,
 * where there is no Umbra.
 */
static inline bool umbra_start(const struct umbra_offer *offer, const struct umbra_region *regions,
			       size_t count, void *ring, uint64_t ring_bytes, uint64_t text_start,
			       uint64_t text_end, umbra_current_fn current)
{
	size_t i;

	if (!(offer->features & (UMBRA_PER_PAGE | UMBRA_FULL)))
		return true;
	for (i = 0; i < count; i++)
		if (!umbra_region_add(regions[i].start, regions[i].bytes, regions[i].gpa))
			return false;
	if (offer->features & UMBRA_RING &&
	    !umbra_ring_setup(0, (struct umbra_ring_header *)ring, ring_bytes, text_start))
		return false;
	return umbra_activate(offer->features, text_end, current);
}

/*
 * Where the compiler checks inline, the kernel's entry code calls this before any checked code. It
 * maps a scratch page wherever check shadow will be. `table` is the top-level page table, at an
 * address that may be written as long as the kernel runs; nothing else uses its slots 472 to 503,
 * and tables that are made later get these slots from it. `offset` is what the image's addresses
 * are above the guest-physical ones. CR4.PGE and EFER.NXE are set on each CPU before
 * umbra_activate(), and CR0.WP where checked code runs.
 */
void umbra_early(uint64_t *table, uint64_t offset);

/*
 * Where the compiler checks inline, each CPU calls this at its timer's tick, when it was idle, and
 * when it switches to another task: it then finds what other CPUs have freed or poisoned as whole
 * pages until now.
 */
void umbra_tick(void);

/*
 * Runs the constructors between two symbols of the linker script, in order. Those that the compiler
 * makes register the redzones of global variables, so this comes after umbra_start().
 *
 *	.init_array : {
 *		constructors_start = .;
 *		KEEP(*(SORT_BY_INIT_PRIORITY(.init_array.*) .init_array))
 *		constructors_end = .;
 *	}
 */
static inline void umbra_run_constructors(void (*const *start)(void), void (*const *end)(void))
{
	while (start < end)
		(*start++)();
}

/* ---- Allocators ------------------------------------------------------------------------------ */

/*
 * Makes memory inaccessible (`code`: 0x80 or more), or accessible. Slots should be 8-byte aligned.
 */
void umbra_poison(uint64_t address, uint64_t bytes, uint8_t code);
void umbra_unpoison(uint64_t address, uint64_t bytes);

/*
 * An allocator hands out an object of `bytes` at `address`, the start of a slot of `slot` bytes.
 * The object becomes accessible, and the rest of the slot gets `redzone`. `cache` is an id that
 * umbra_name_cache() named, or 0.
 */
void umbra_alloc(uint64_t address, uint64_t bytes, uint64_t slot, uint8_t redzone, uint16_t cache);

/*
 * An allocator takes back `address`; the object starts at `start`, in a slot of `slot` bytes. The
 * slot becomes inaccessible with `code`. False, after a report, when it was free already or
 * `address` is not the start: do not free it then.
 */
bool umbra_free(uint64_t address, uint64_t start, uint64_t slot, uint8_t code);

/*
 * Quarantine: freed memory waits before its allocator gets it back, so that uses of it are found
 * for longer. To use it, an allocator hands over a release function, and frees with
 * umbra_free_later() from then on.
 *
 * The release function gets the object's start, the bytes of its slot and the note that
 * umbra_free_later() got, and `context`. It runs on any CPU, inside a call of umbra_free_later() or
 * umbra_quarantine_drain().
 */
typedef void (*umbra_release_fn)(uint64_t start, uint64_t slot, uint8_t note, void *context);

/*
 * Numbers an allocator, after umbra_activate(). Returns 0, which is no allocator's number, where
 * there is no quarantine: then umbra_free_later() works as umbra_free().
 */
uint8_t umbra_quarantine_add(umbra_release_fn release, void *context);

/*
 * As umbra_free(), but the memory goes into the quarantine, if there is one for `allocator`. True:
 * the caller frees now. False: it must not. Release functions are called from here, for other
 * memory, so the caller holds no lock that they take.
 */
bool umbra_free_later(uint64_t address, uint64_t start, uint64_t slot, uint8_t code,
		      uint8_t allocator, uint8_t note);

/*
 * Empties the quarantine, for an allocator that has no memory left and tries again afterwards.
 * Returns the number of objects that their allocators got back. The caller holds no lock that a
 * release function takes.
 */
uint64_t umbra_quarantine_drain(void);

/*
 * Bytes of redzone that an allocator puts behind objects of `object` bytes. The number is the same
 * during a whole run. 0 without Umbra, or where redzones are switched off: then memory is laid out
 * as without checks.
 */
uint64_t umbra_redzone(uint64_t object);

/*
 * Work on the object that holds `address` is queued, such as work that will free it. A finding on
 * the object shows the stack of the caller. The last two stacks are kept.
 */
void umbra_aux_stack(uint64_t address);

/* Reports a free of something that no allocator knows. */
void umbra_invalid_free(uint64_t address);

/* Checks a range by hand; false when it was reported. */
bool umbra_check(uint64_t address, uint64_t bytes, bool write);

/*
 * Whether the byte at `address` is known to be inaccessible. Nothing is reported. False where there
 * is no shadow.
 */
bool umbra_is_poisoned(uint64_t address);

/*
 * Turns reports off and on again on this CPU, around code that uses poisoned memory on purpose.
 * Calls nest.
 */
void umbra_suppress_begin(void);
void umbra_suppress_end(void);

/*
 * The number of bad accesses and frees so far on all CPUs, reported or not: for a kernel's own
 * tests.
 */
uint64_t umbra_violations(void);

/* ---- Stacks and names ------------------------------------------------------------------------ */

/*
 * A thread gets a stack: page-aligned, in a region. When the thread has ended and nothing runs on
 * its stack any more, umbra_stack_free() makes the stack inaccessible. umbra_alloc(),
 * umbra_stack_alloc() and umbra_unpoison() make it accessible again, and it may be freed by
 * umbra_free().
 */
void umbra_stack_alloc(uint64_t start, uint64_t bytes);
void umbra_stack_free(uint64_t start, uint64_t bytes);

/* Names cache `id`, whose objects have `object` bytes, or task `id`. The name is copied. */
void umbra_name_cache(uint16_t id, const char *name, uint64_t len, uint64_t object);
void umbra_name_task(uint32_t id, const char *name, uint64_t len);

/* ---- Exceptions and the end ------------------------------------------------------------------ */

/*
 * The page-fault handler calls this first, with the registers at the fault. If the fault was a
 * check's, for an address without shadow, the access is reported and the result is true: load rip
 * and rsp from `trap` and return from the interrupt. The access itself then faults again, with the
 * result false. Where the compiler checks inline, the result is true as well if the shadow of a
 * stack can be stored to by now; rip and rsp stay then.
 */
bool umbra_page_fault(struct umbra_trap *trap);

/*
 * Reports a bad access that the kernel found by a fault, such as a stack that has grown into its
 * guard page. The shadow at `address` decides the kind of bug; poison a guard page with
 * UMBRA_STACK_GUARD. `trap` holds the registers at the fault, where the stack of the report begins.
 */
void umbra_report(uint64_t address, uint64_t bytes, bool write, const struct umbra_trap *trap);

/*
 * Ready entry points for interrupt gates of 64-bit kernel code, not to be called. The first handles
 * page faults as umbra_page_fault() does, and ends the guest at any other. The second, for a
 * double fault, needs a stack of its own (an IST entry). It reports the bad access that led to the
 * fault, if a check made it, or a stack that has grown into poisoned memory, such as a guard page
 * with UMBRA_STACK_GUARD. Then it ends the guest.
 */
void umbra_page_fault_entry(void);
void umbra_double_fault_entry(void);

/*
 * End the guest: done (0 is success), panicked, stopped by a CPU exception. Only if
 * umbra_present().
 */
UMBRA_NORETURN void umbra_exit(uint64_t code);
UMBRA_NORETURN void umbra_exit_panic(void);
UMBRA_NORETURN void umbra_exit_fault(uint32_t vector, uint32_t error, uint64_t rip,
				     uint64_t address);

#ifdef __cplusplus
}
#endif
#endif
