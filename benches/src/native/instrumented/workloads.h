/* SPDX-License-Identifier: MIT OR Apache-2.0 */
#ifndef WORKLOADS_H
#define WORKLOADS_H

#include <stddef.h>
#include <stdint.h>

/* Steps of a run. */
#define WORK (1u << 21)

typedef uint64_t workload(uint8_t *set, size_t bytes, uint32_t seed);

workload list, hash, sort, lz, parse;

#endif
