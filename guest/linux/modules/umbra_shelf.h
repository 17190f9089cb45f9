/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef UMBRA_SHELF_H
#define UMBRA_SHELF_H

/* What a module leaves here is read when umbra_shelf is unloaded. */
extern const volatile u8 *umbra_shelf;

#endif
