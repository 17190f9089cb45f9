/* The kernel prints a greeting, and looks at the greeting once more. */
#include "kernel.h"

struct message {
	const char *text;
	unsigned times;
};

static __attribute__((noinline)) void greet(struct message *message)
{
	for (unsigned i = 0; i < message->times; i++)
		print(message->text);
	kfree(message);
}

void kernel_main(void)
{
	struct message *message = kmalloc(sizeof(*message));

	if (!message)
		return;
	message->text = "hello\n";
	message->times = 2;
	greet(message);
	/* A bug: the object is free by now. */
	print_number(message->times);
	print(" times\n");
}
