// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * The first program of the Linux guests that tests boot, linked statically. Its arguments name the
 * parts to run. Each part ends with the line "program: WORD done", or with an error message, which
 * is the end. In the end it asks Linux to restart the machine.
 */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static void end(void)
{
	fflush(stdout);
	reboot(RB_AUTOBOOT);
	_exit(1);
}

#define CHECK(what)                                                                                \
	do {                                                                                       \
		if (!(what)) {                                                                     \
			printf("program: failed: %s (%s)\n", #what, strerror(errno));              \
			end();                                                                     \
		}                                                                                  \
	} while (0)

/* Files: written, read back, renamed, mapped. */
static void files(void)
{
	char text[] = "written and read back", back[sizeof(text)] = "";
	int fd = open("/file", O_RDWR | O_CREAT | O_EXCL, 0600);

	CHECK(fd >= 0);
	CHECK(write(fd, text, sizeof(text)) == sizeof(text));
	CHECK(rename("/file", "/renamed") == 0);
	CHECK(lseek(fd, 0, SEEK_SET) == 0);
	CHECK(read(fd, back, sizeof(back)) == sizeof(back));
	CHECK(memcmp(text, back, sizeof(text)) == 0);
	char *map = mmap(NULL, sizeof(text), PROT_READ, MAP_PRIVATE, fd, 0);
	CHECK(map != MAP_FAILED);
	CHECK(memcmp(map, text, sizeof(text)) == 0);
	CHECK(close(fd) == 0 && unlink("/renamed") == 0);
}

static volatile sig_atomic_t seen, fault_address_is_right;
static char *const unmapped = (char *)0x10000;

static void on_signal(int number, siginfo_t *info, void *context)
{
	(void)context;
	seen |= 1 << (number == SIGSEGV ? 0 : number == SIGUSR1 ? 1 : 2);
	if (number == SIGSEGV) {
		fault_address_is_right = info->si_addr == unmapped;
		/* The access is tried again and succeeds. */
		mmap(unmapped, 4096, PROT_READ | PROT_WRITE,
		     MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
	}
}

/* Signals: of this process, of a timer, and of a page fault, whose access is then repeated. */
static void signals(void)
{
	struct sigaction action = {.sa_sigaction = on_signal, .sa_flags = SA_SIGINFO};
	volatile double before = 1.5;

	CHECK(sigaction(SIGSEGV, &action, NULL) == 0);
	CHECK(sigaction(SIGUSR1, &action, NULL) == 0);
	CHECK(sigaction(SIGALRM, &action, NULL) == 0);
	CHECK(raise(SIGUSR1) == 0 && (seen & 2));
	*(volatile char *)unmapped = 1;
	CHECK((seen & 1) && fault_address_is_right);
	/* Not pause(): on a busy host the alarm may come before it. */
	alarm(1);
	while (!(seen & 4))
		getppid();
	/* Floating point registers survive all that. */
	CHECK(before * 2 == 3.0);
}

/* Two processes: they talk through pipes, and memory is copied when it is written. */
static void processes(void)
{
	enum { ROUNDS = 200 };
	int down[2], up[2], status, value = 1;

	CHECK(pipe(down) == 0 && pipe(up) == 0);
	pid_t child = fork();
	CHECK(child >= 0);
	if (child == 0) {
		int number;

		for (int i = 0; i < ROUNDS; i++) {
			if (read(down[0], &number, sizeof(number)) != sizeof(number))
				_exit(1);
			number = number * 2 + value;
			if (write(up[1], &number, sizeof(number)) != sizeof(number))
				_exit(1);
		}
		_exit(42);
	}
	value = 7;
	for (int i = 0; i < ROUNDS; i++) {
		int number = i;

		CHECK(write(down[1], &number, sizeof(number)) == sizeof(number));
		CHECK(read(up[0], &number, sizeof(number)) == sizeof(number));
		CHECK(number == 2 * i + 1);
	}
	CHECK(waitpid(child, &status, 0) == child);
	CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 42);

	child = fork();
	CHECK(child >= 0);
	if (child == 0) {
		pause();
		_exit(0);
	}
	CHECK(kill(child, SIGKILL) == 0);
	CHECK(waitpid(child, &status, 0) == child);
	CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
}

/* Writes a word to a file. */
static void put(const char *file, const char *word)
{
	int fd = open(file, O_WRONLY);

	CHECK(fd >= 0);
	CHECK(write(fd, word, strlen(word)) == (ssize_t)strlen(word));
	close(fd);
}

/* Mounts what it may have mounted before. */
static void mount_once(const char *kind, const char *folder)
{
	CHECK(mount(kind, folder, kind, 0, NULL) == 0 || errno == EBUSY);
}

/* Has the kernel do what it must not, by its own module for that (drivers/misc/lkdtm). */
static void misbehave(const char *how)
{
	CHECK(mkdir("/sys", 0700) == 0 || errno == EEXIST);
	mount_once("sysfs", "/sys");
	mount_once("debugfs", "/sys/kernel/debug");
	put("/sys/kernel/debug/provoke-crash/DIRECT", how);
}

/* Loads a module of the initrd: `NAME`, or `NAME:PARAMETER,PARAMETER`. */
static void load(const char *what)
{
	char file[64], parameters[128];
	size_t name = strcspn(what, ":");

	snprintf(file, sizeof(file), "/%.*s.ko", (int)name, what);
	snprintf(parameters, sizeof(parameters), "%s", what[name] ? what + name + 1 : "");
	for (char *at = parameters; *at; at++)
		if (*at == ',')
			*at = ' ';
	int fd = open(file, O_RDONLY);
	CHECK(fd >= 0);
	CHECK(syscall(SYS_finit_module, fd, parameters, 0) == 0);
	close(fd);
}

static void part(const char *what)
{
	if (strcmp(what, "files") == 0)
		files();
	else if (strcmp(what, "signals") == 0)
		signals();
	else if (strcmp(what, "processes") == 0)
		processes();
	else if (*what == '+')
		load(what + 1);
	else if (*what == '-')
		CHECK(syscall(SYS_delete_module, what + 1, O_NONBLOCK) == 0);
	else
		misbehave(what);
	printf("program: %s done\n", what);
}

int main(int argc, char **argv)
{
	setvbuf(stdout, NULL, _IOLBF, 0);
	for (int i = 1; i < argc; i++)
		part(argv[i]);
	end();
}
