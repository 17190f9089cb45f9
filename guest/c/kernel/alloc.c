// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * The allocators: blocks of pages, described outside of them, and caches of equal objects. A
 * cache's free list runs through the freed objects themselves. It touches poisoned memory on
 * purpose, so it does that with reports off.
 */
#include "kernel.h"

#define CACHES 24
#define NO_PAGE 0u

enum use { UNUSED, FREE, PAGES, SLAB, LARGE };

/* One page. All pages of a block name its first one. */
struct page {
	uint8_t use;
	uint8_t order;
	uint8_t cache;
	uint32_t head;
	uint32_t next; /* of the free blocks of one order */
};

struct cache {
	size_t object; /* bytes that a user gets at most */
	size_t slot;   /* object and redzone */
	unsigned order;
	void *free;
};

static struct page *pages;
static uint32_t next_page, end_page, first_page;
static uint32_t free_blocks[ORDERS];
static struct cache caches[CACHES];
static unsigned cache_count;
static uint8_t quarantine; /* Umbra's number for the caches */

static const struct {
	uint16_t object;
	const char *name;
} kmalloc_sizes[] = {
	{8, "kmalloc-8"},     {16, "kmalloc-16"},   {32, "kmalloc-32"},   {64, "kmalloc-64"},
	{96, "kmalloc-96"},   {128, "kmalloc-128"}, {192, "kmalloc-192"}, {256, "kmalloc-256"},
	{512, "kmalloc-512"}, {1024, "kmalloc-1k"}, {2048, "kmalloc-2k"}, {4096, "kmalloc-4k"},
};

static uint64_t address_of(uint32_t number)
{
	return DIRECT_MAP + number * PAGE_SIZE;
}

/* The first page of the block that holds `at`; NO_PAGE if that was never part of one. */
static uint32_t head_of(const void *at)
{
	uint64_t number = ((uint64_t)at - DIRECT_MAP) / PAGE_SIZE;

	return number >= first_page && number < next_page ? pages[number].head : NO_PAGE;
}

/* Takes a block, which stays poisoned. */
static uint32_t block_take(unsigned order, enum use use)
{
	uint32_t number = free_blocks[order];

	if (number != NO_PAGE) {
		free_blocks[order] = pages[number].next;
	} else {
		if (next_page + (1u << order) > end_page)
			return NO_PAGE;
		number = next_page;
		next_page += 1u << order;
		for (uint32_t i = 0; i < 1u << order; i++)
			pages[number + i].head = number;
	}
	pages[number].use = use;
	pages[number].order = (uint8_t)order;
	return number;
}

static void block_give(uint32_t number)
{
	pages[number].use = FREE;
	pages[number].next = free_blocks[pages[number].order];
	free_blocks[pages[number].order] = number;
}

void *page_alloc(unsigned order)
{
	uint32_t number = order < ORDERS ? block_take(order, PAGES) : NO_PAGE;

	if (number == NO_PAGE)
		return NULL;
	umbra_alloc(address_of(number), PAGE_SIZE << order, PAGE_SIZE << order, 0, 0);
	return (void *)address_of(number);
}

void page_free(void *at)
{
	uint32_t number = head_of(at);

	if (number == NO_PAGE) {
		umbra_invalid_free((uint64_t)at);
		return;
	}
	if (umbra_free((uint64_t)at, address_of(number), PAGE_SIZE << pages[number].order,
		       UMBRA_FREE_PAGE))
		block_give(number);
}

static size_t length(const char *text)
{
	size_t n = 0;

	while (text[n])
		n++;
	return n;
}

struct cache *cache_create(const char *name, size_t object)
{
	struct cache *cache = &caches[cache_count];

	if (cache_count == CACHES || !object || object > PAGE_SIZE)
		return NULL;
	*cache = (struct cache){
		.object = object,
		.slot = (object + umbra_redzone(object) + 15) & ~15ul,
		.order = object > 512 ? 3 : 0,
	};
	cache_count++;
	/* Cache 0 is "none" for Umbra. */
	umbra_name_cache((uint16_t)cache_count, name, length(name), object);
	return cache;
}

static void push_free(struct cache *cache, uint64_t object)
{
	umbra_suppress_begin();
	*(void **)object = cache->free;
	umbra_suppress_end();
	cache->free = (void *)object;
}

/* Takes an object back that has left the quarantine. */
static void release(uint64_t object, uint64_t slot, uint8_t note, void *context)
{
	(void)slot;
	(void)context;
	push_free(&caches[note], object);
}

static void *pop_free(struct cache *cache)
{
	void **object = cache->free;

	umbra_suppress_begin();
	cache->free = *object;
	umbra_suppress_end();
	return object;
}

static bool grow(struct cache *cache)
{
	uint32_t number = block_take(cache->order, SLAB);
	uint64_t slots = (PAGE_SIZE << cache->order) / cache->slot;

	if (number == NO_PAGE)
		return false;
	pages[number].cache = (uint8_t)(cache - caches);
	umbra_poison(address_of(number), PAGE_SIZE << cache->order, UMBRA_SLAB_REDZONE);
	while (slots--)
		push_free(cache, address_of(number) + slots * cache->slot);
	return true;
}

static void *object_alloc(struct cache *cache, size_t bytes)
{
	void *object;

	if (!cache->free && !grow(cache) &&
	    !(umbra_quarantine_drain() && (cache->free || grow(cache))))
		return NULL;
	object = pop_free(cache);
	umbra_alloc((uint64_t)object, bytes, cache->slot, UMBRA_SLAB_REDZONE,
		    (uint16_t)(cache - caches + 1));
	return object;
}

void *cache_alloc(struct cache *cache)
{
	return object_alloc(cache, cache->object);
}

void *kmalloc(size_t bytes)
{
	unsigned order = 0;
	uint32_t number;

	for (size_t i = 0; i < array_size(kmalloc_sizes); i++)
		if (bytes <= kmalloc_sizes[i].object)
			return object_alloc(&caches[i], bytes);
	while (order < ORDERS && PAGE_SIZE << order < bytes)
		order++;
	number = order < ORDERS ? block_take(order, LARGE) : NO_PAGE;
	if (number == NO_PAGE)
		return NULL;
	umbra_alloc(address_of(number), bytes, PAGE_SIZE << order, UMBRA_LARGE_REDZONE, 0);
	return (void *)address_of(number);
}

void kfree(void *at)
{
	uint32_t number = head_of(at);
	uint64_t start = address_of(number);

	if (number == NO_PAGE) {
		umbra_invalid_free((uint64_t)at);
	} else if (pages[number].use == SLAB) {
		struct cache *cache = &caches[pages[number].cache];
		uint64_t object = start + ((uint64_t)at - start) / cache->slot * cache->slot;

		if (umbra_free_later((uint64_t)at, object, cache->slot, UMBRA_SLAB_FREE, quarantine,
				     (uint8_t)(cache - caches)))
			push_free(cache, object);
	} else {
		page_free(at);
	}
}

/* How far an allocation may grow in place. */
static size_t room_of(uint32_t number)
{
	const struct page *page = &pages[number];

	return page->use == SLAB ? caches[page->cache].object : PAGE_SIZE << page->order;
}

/*
 * Makes the whole room of an allocation accessible, and returns its bytes. 0, after a report, if it
 * was freed.
 */
size_t ksize(void *at)
{
	size_t room;

	if (!umbra_check((uint64_t)at, 1, false))
		return 0;
	room = room_of(head_of(at));
	umbra_unpoison((uint64_t)at, room);
	return room;
}

/* Clears the object before it is freed. */
void kfree_sensitive(void *at)
{
	memset(at, 0, ksize(at));
	kfree(at);
}

/*
 * Works in place where the slot allows it. `at` is never null; if it was freed, that is reported.
 */
void *krealloc(void *at, size_t bytes)
{
	uint32_t number = head_of(at);
	struct cache *cache = &caches[pages[number].cache];
	bool slab = pages[number].use == SLAB;
	size_t room = room_of(number);
	void *to;

	if (!umbra_check((uint64_t)at, 1, false))
		return NULL;
	if (bytes <= room) {
		umbra_alloc((uint64_t)at, bytes, slab ? cache->slot : room,
			    slab ? UMBRA_SLAB_REDZONE : UMBRA_LARGE_REDZONE,
			    slab ? pages[number].cache + 1 : 0);
		return at;
	}
	to = kmalloc(bytes);
	if (to) {
		/* The whole old slot is copied: the requested size is not kept. */
		umbra_unpoison((uint64_t)at, room);
		memcpy(to, at, room);
		kfree(at);
	}
	return to;
}

void alloc_init(uint64_t start, uint64_t end)
{
	uint64_t described = (end / PAGE_SIZE) * sizeof(struct page);

	pages = (struct page *)(DIRECT_MAP + start);
	end_page = (uint32_t)(end / PAGE_SIZE);
	first_page = next_page = (uint32_t)((start + described + PAGE_SIZE - 1) / PAGE_SIZE);
	umbra_poison(address_of(first_page), (end_page - first_page) * PAGE_SIZE, UMBRA_FREE_PAGE);
	quarantine = umbra_quarantine_add(release, NULL);
	for (size_t i = 0; i < array_size(kmalloc_sizes); i++)
		cache_create(kmalloc_sizes[i].name, kmalloc_sizes[i].object);
}
