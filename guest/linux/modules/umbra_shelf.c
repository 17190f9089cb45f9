// SPDX-License-Identifier: GPL-2.0-only
/* Keeps a pointer of another module, and uses it when that module may be gone. */
#include <linux/module.h>

#include "umbra_shelf.h"

const volatile u8 *umbra_shelf;
EXPORT_SYMBOL_GPL(umbra_shelf);

static noinline u8 shelf_read(void)
{
	return *umbra_shelf; /* bad: shelf */
}

static int __init shelf_init(void)
{
	return 0;
}

static void __exit shelf_exit(void)
{
	if (umbra_shelf)
		shelf_read();
}

module_init(shelf_init);
module_exit(shelf_exit);
MODULE_LICENSE("GPL");
