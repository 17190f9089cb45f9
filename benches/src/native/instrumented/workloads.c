/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Small programs that a compiler instruments: what kernels do all day, on a
 * working set of so many bytes. Each returns a sum that depends on all of its
 * work. None has memory beside the set and a few locals.
 */
#include "workloads.h"

static uint32_t next(uint32_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 17;
	*state ^= *state << 5;
	return *state;
}

struct node {
	struct node *next;
	uint64_t key;
	uint32_t weight;
	uint16_t flags;
	uint8_t kind;
};

/* Walks a list whose nodes lie in any order. */
uint64_t list(uint8_t *set, size_t bytes, uint32_t seed)
{
	struct node *nodes = (struct node *)set;
	size_t count = bytes / sizeof(*nodes);
	uint64_t sum = 0;

	if (nodes[0].next == NULL) {
		/* One cycle through all of them (Sattolo). */
		uint32_t state = seed | 1;

		for (size_t i = 0; i < count; i++)
			nodes[i].key = i;
		for (size_t i = count - 1; i > 0; i--) {
			size_t other = next(&state) % i;
			uint64_t key = nodes[i].key;

			nodes[i].key = nodes[other].key;
			nodes[other].key = key;
		}
		for (size_t i = 0; i < count; i++) {
			nodes[nodes[i].key].next = &nodes[nodes[(i + 1) % count].key];
			nodes[i].weight = next(&state);
			nodes[i].kind = i % 3;
		}
	}
	struct node *at = nodes;

	for (size_t steps = 0; steps < WORK; steps++, at = at->next) {
		if (at->kind == 1)
			at->flags++;
		sum += at->weight ^ at->key;
	}
	return sum;
}

struct entry {
	uint64_t key;
	uint32_t value;
	uint32_t next;
};

/* Looks up, adds and removes keys in a hash table with chains. */
uint64_t hash(uint8_t *set, size_t bytes, uint32_t seed)
{
	size_t count = bytes / 2 / sizeof(struct entry), buckets = 1;
	struct entry *entries = (struct entry *)set;
	uint32_t *heads, state = seed | 1;
	uint64_t sum = 0;

	while (buckets * 2 * sizeof(*heads) <= bytes / 2)
		buckets *= 2;
	heads = (uint32_t *)(set + bytes / 2);
	for (size_t i = 0; i < WORK / 4; i++) {
		uint64_t key = next(&state) % (2 * count) + 1;
		uint32_t *link = &heads[key * 0x9e3779b97f4a7c15u >> 20 & (buckets - 1)];

		while (*link && entries[*link - 1].key != key)
			link = &entries[*link - 1].next;
		if (*link) {
			struct entry *found = &entries[*link - 1];

			sum += found->value;
			if (found->value++ % 4 == 3) {
				*link = found->next;
				found->key = 0;
			}
		} else {
			/* A place of its own for each two keys. */
			struct entry *fresh = &entries[key % count];

			if (fresh->key)
				continue;
			fresh->key = key;
			fresh->value = i;
			fresh->next = 0;
			*link = key % count + 1;
		}
	}
	return sum;
}

static void sift(uint32_t *heap, size_t at, size_t end)
{
	for (;;) {
		size_t child = 2 * at + 1;

		if (child >= end)
			return;
		if (child + 1 < end && heap[child] < heap[child + 1])
			child++;
		if (heap[at] >= heap[child])
			return;
		uint32_t value = heap[at];

		heap[at] = heap[child];
		heap[child] = value;
		at = child;
	}
}

/* Sorts numbers in pieces, which lie anywhere in the set. */
uint64_t sort(uint8_t *set, size_t bytes, uint32_t seed)
{
	const size_t piece = 1024;
	uint32_t *all = (uint32_t *)set, state = seed | 1;
	size_t pieces = bytes / sizeof(*all) / piece;
	uint64_t sum = 0;

	for (size_t turn = 0; turn < WORK / piece / 8; turn++) {
		uint32_t *heap = all + turn * 7919 % pieces * piece;

		for (size_t i = 0; i < piece; i++)
			heap[i] = next(&state);
		for (size_t at = piece / 2; at-- > 0;)
			sift(heap, at, piece);
		for (size_t end = piece - 1; end > 0; end--) {
			uint32_t value = heap[0];

			heap[0] = heap[end];
			heap[end] = value;
			sift(heap, 0, end);
		}
		sum += heap[piece / 2];
	}
	return sum;
}

/* Compresses text by references to what came before, of 3 bytes or more. */
uint64_t lz(uint8_t *set, size_t bytes, uint32_t seed)
{
	size_t in_bytes = bytes / 2, out = 0;
	uint8_t *in = set, *to = set + bytes / 2;
	uint16_t *seen = (uint16_t *)(set + bytes - 8192);
	uint32_t state = seed | 1;
	uint64_t sum = 0;

	for (size_t i = 0; i < in_bytes && in[i] == 0; i++) {
		int again = i > 64 && next(&state) % 8;

		in[i] = again ? in[i - 7 - state % 31] : 'a' + state % 26;
	}
	for (size_t done = 0, at = 0; done < WORK; done++, at++) {
		if (at + 64 >= in_bytes)
			at = 0;
		uint32_t word = in[at] | in[at + 1] << 8 | in[at + 2] << 16;
		uint16_t *slot = &seen[word * 2654435761u >> 20];
		size_t distance = (uint16_t)(at - *slot), length = 0;

		*slot = at;
		if (distance > 0 && distance <= at)
			while (length < 60 && in[at + length] == in[at + length - distance])
				length++;
		if (out + 4 > bytes / 2 - 8192)
			out = 0;
		if (length >= 3) {
			to[out++] = 0x80 | length;
			to[out++] = distance;
			to[out++] = distance >> 8;
			at += length - 1;
			sum += length;
		} else {
			to[out++] = in[at];
		}
	}
	return sum + to[0];
}

/* Reads text of names, numbers and strings. */
uint64_t parse(uint8_t *set, size_t bytes, uint32_t seed)
{
	static const char record[] =
		"{\"name\": \"object\", \"size\": 4096, \"tags\": [1, 22, 333]},\n";
	uint64_t sum = seed;

	if (set[0] == 0)
		for (size_t i = 0; i < bytes; i++)
			set[i] = i + 1 < bytes ? record[i % (sizeof(record) - 1)] : '\n';
	for (size_t done = 0, at = 0; done < 2 * WORK;) {
		size_t start = at;

		if (at + 64 >= bytes)
			start = at = 0;
		if (set[at] == '"') {
			do
				at++;
			while (set[at] != '"');
			at++;
			sum = sum * 31 + set[start + 1];
		} else if (set[at] >= '0' && set[at] <= '9') {
			uint64_t number = 0;

			while (set[at] >= '0' && set[at] <= '9')
				number = number * 10 + (set[at++] - '0');
			sum += number;
		} else {
			at++;
		}
		done += at - start;
	}
	return sum;
}
