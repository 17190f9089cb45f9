// SPDX-License-Identifier: GPL-2.0-only
/*
 * A module with bugs of its own: `bug` names one, which runs when the module is loaded, or with
 * `late` when it is unloaded.
 */
#include <linux/delay.h>
#include <linux/kthread.h>
#include <linux/module.h>
#include <linux/slab.h>
#include <linux/string.h>
#include <linux/timer.h>

#include "umbra_shelf.h"

static char *bug = "";
module_param(bug, charp, 0);
static bool late;
module_param(late, bool, 0);

static u32 levels[6];
static const u8 steps[21] = { 1 };
static u8 at_start[40] __initdata = { 1 };

/* Hides the origin of an address, so that the compiler cannot tell the size of what is there. */
static void *hidden(const volatile void *at)
{
	OPTIMIZER_HIDE_VAR(at);
	return (void *)at;
}

static noinline void level_set(unsigned int at)
{
	WRITE_ONCE(((u32 *)hidden(levels))[at], 7); /* bad: level */
}

static noinline u8 step_get(unsigned int at)
{
	return READ_ONCE(((const u8 *)hidden(steps))[at]); /* bad: step */
}

static noinline u8 *record_new(void)
{
	return kzalloc(36, GFP_KERNEL); /* allocated */
}

static noinline u8 record_get(const u8 *record, unsigned int at)
{
	return READ_ONCE(((const u8 *)hidden(record))[at]); /* bad: record */
}

static noinline void record_drop(u8 *record)
{
	kfree(record); /* freed */
}

struct ticket {
	struct rcu_head rcu;
	struct timer_list timer;
	unsigned long marks;
};

static noinline void ticket_mark(struct ticket *ticket)
{
	set_bit(3, hidden(&ticket->marks)); /* bad: ticket */
}

static void ticket_reclaim(struct rcu_head *rcu)
{
	kfree(container_of(rcu, struct ticket, rcu)); /* freed: rcu */
}

static void ticket_tick(struct timer_list *timer)
{
	kfree(container_of(timer, struct ticket, timer)); /* freed: timer */
}

/* Uses an object that another context has freed. */
static void ticket_late(bool by_timer)
{
	struct ticket *ticket = kzalloc(sizeof(*ticket), GFP_KERNEL); /* allocated: ticket */

	timer_setup(&ticket->timer, ticket_tick, 0);
	if (by_timer) {
		mod_timer(&ticket->timer, jiffies + 1);
		msleep(100);
	} else {
		call_rcu(&ticket->rcu, ticket_reclaim);
		rcu_barrier();
	}
	ticket_mark(ticket);
}

/* Reads where no object is. The read itself faults as well, and ends the thread. */
static int stray_thread(void *address)
{
	return READ_ONCE(*(u32 *)hidden(address)); /* bad: thread */
}

static void thread_reads(unsigned long address)
{
	kthread_run(stray_thread, (void *)address, "umbra_stray");
	msleep(200);
}

/* All of what there is. */
static void nothing(void)
{
	u8 *record = record_new();

	level_set(0);
	level_set(5);
	step_get(0);
	step_get(20);
	record_get(record, 35);
	record_drop(record);
}

static void run(void)
{
	u8 *record = record_new();

	if (!strcmp(bug, "level")) {
		level_set(6);
	} else if (!strcmp(bug, "step")) {
		step_get(21);
	} else if (!strcmp(bug, "behind")) {
		record_get(record, 36);
	} else if (!strcmp(bug, "freed")) {
		record_drop(record);
		record_get(record, 3);
		return;
	} else if (!strcmp(bug, "left")) {
		umbra_shelf = hidden(&steps[4]);
	} else if (!strcmp(bug, "rcu") || !strcmp(bug, "timer")) {
		ticket_late(!strcmp(bug, "timer"));
	} else if (!strcmp(bug, "null")) {
		thread_reads(0x1f8);
	} else if (!strcmp(bug, "user")) {
		thread_reads(0x12345678);
	} else if (!strcmp(bug, "wild")) {
		thread_reads(0xdead000000000100);
	} else {
		nothing();
	}
	record_drop(record);
}

static int __init stray_init(void)
{
	pr_info("umbra_stray: run() is at %px\n", run);
	if (!strcmp(bug, "init_left"))
		umbra_shelf = hidden(&at_start[2]);
	else if (!late)
		run();
	return 0;
}

static void __exit stray_exit(void)
{
	if (late)
		run();
}

module_init(stray_init);
module_exit(stray_exit);
MODULE_LICENSE("GPL");
