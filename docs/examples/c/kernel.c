/* The kernel prints greetings, and has a bug or two in between. */
#include "kernel.h"

struct message {
	const char *text;
	unsigned times;
};

/* Copies byte by byte, even if the compiler knows better. */
void *memcpy(void *to, const void *from, size_t bytes)
{
	for (size_t i = 0; i < bytes; i++)
		((volatile char *)to)[i] = ((const volatile char *)from)[i];
	return to;
}

static struct message *message_new(const char *text, unsigned times)
{
	struct message *message = kmalloc(sizeof(*message));

	message->text = text;
	message->times = times;
	return message;
}

static __attribute__((noinline)) void greet(struct message *message)
{
	for (unsigned i = 0; i < message->times; i++)
		print(message->text);
	kfree(message);
}

/* Bytes that somebody says a message has. */
static volatile size_t message_bytes = 24;

/* A bug: copies more bytes than a message has. */
static __attribute__((noinline)) void forward(struct message *message, size_t bytes)
{
	char *copy = kmalloc(bytes);

	memcpy(copy, message, bytes);
	kfree(copy);
}

void kernel_main(void)
{
	struct message *message = message_new("hello\n", 2);
	struct message *other;

	greet(message);
	other = message_new("hello again\n", 1);
	/* A bug: the message is free by now, and the other may have its memory. */
	print_number(message->times);
	print(" times\n");
	forward(other, message_bytes);
	/* A bug: no object starts here. */
	kfree(&other->times);
}
