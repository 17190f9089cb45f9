// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * Runs the scenarios of the command line (`scenarios=a,b`; all without it). Each is a task with the
 * scenario's name.
 */
#include "kernel.h"

extern const struct scenario scenarios_start[], scenarios_end[];
static uint32_t task;

uint64_t current_task(void)
{
	return umbra_who(0, task);
}

/* Whether `name` is in `list`, whose words are separated by commas. A blank ends the list. */
static bool listed(const char *list, const char *name)
{
	for (;;) {
		const char *at = name;

		while (*at && *at == *list)
			at++, list++;
		if (!*at && (*list == ',' || *list == ' ' || !*list))
			return true;
		while (*list && *list != ',' && *list != ' ')
			list++;
		if (*list++ != ',')
			return false;
	}
}

const char *option(const char *command_line, const char *name)
{
	while (*command_line) {
		size_t n = 0;

		while (name[n] && command_line[n] == name[n])
			n++;
		if (!name[n])
			return command_line + n;
		while (*command_line && *command_line++ != ' ')
			;
	}
	return NULL;
}

void scenarios_run(const char *command_line)
{
	const char *list = option(command_line, "scenarios=");

	for (const struct scenario *s = scenarios_start; s < scenarios_end; s++) {
		size_t n = 0;

		if (list && *list && *list != ' ' && !listed(list, s->name))
			continue;
		while (s->name[n])
			n++;
		task++;
		umbra_name_task(task, s->name, n);
		s->body();
		print("ran ");
		print(s->name);
		print("\n");
	}
	task = 0;
}
