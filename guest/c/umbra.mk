# SPDX-License-Identifier: MIT OR Apache-2.0
#
# Compiler flags for kernels that Umbra checks. Include this from a Makefile. Compile checked code
# with $(UMBRA_CFLAGS) $(UMBRA_SANITIZE), and code that runs before the shadow is mapped with
# $(UMBRA_CFLAGS) alone. Link $(UMBRA_LIB).
#
#   CC             gcc (12 or later) or clang (14 or later)
#   UMBRA          folder with umbra.h and the libraries (`cargo xtask guest --lib` makes it)
#   UMBRA_CHECKS   outline (the default): each check is a call; or inline

UMBRA ?= $(dir $(lastword $(MAKEFILE_LIST)))
UMBRA_CHECKS ?= outline
ifeq ($(UMBRA_CHECKS),inline)
UMBRA_LIB := $(UMBRA)/libumbra_rt_inline.a
# Checks read the check shadow, in KASAN's place.
umbra_threshold := 10000
umbra_offset := 0xdffffc0000000000
umbra_poisoning := 64
else
UMBRA_LIB := $(UMBRA)/libumbra_rt.a
# With this offset the compiler's own stores to a stack's shadow go where the runtime looks: to the
# address shifted right arithmetically by 3.
umbra_threshold := 0
umbra_offset := 0xe000000000000000
umbra_poisoning := 0
endif

# No vector registers; frame pointers, which reports walk; addresses in the highest 2 GiB.
UMBRA_CFLAGS := -I$(UMBRA) -ffreestanding -fno-pic -fno-pie -mcmodel=kernel -mno-red-zone \
	-mgeneral-regs-only -fno-omit-frame-pointer -fno-optimize-sibling-calls \
	-fno-stack-protector -fcf-protection=none -fno-asynchronous-unwind-tables

# There are redzones around stack variables, globals and alloca, and checks for use after scope.
#
# Copies and fills call __asan_memcpy() and so on, which check, where the compiler can do that (gcc
# 13, clang 16). Otherwise they call the kernel's own memcpy() if it has one, which must then be
# checked itself, or the runtime's.
umbra_if_known = $(if $(shell $(CC) -fsanitize=kernel-address $(1) -c -x c /dev/null -o /dev/null \
	2>/dev/null && echo known),$(1))
ifneq (,$(findstring clang,$(shell $(CC) --version)))
UMBRA_SANITIZE := -fsanitize=kernel-address $(addprefix -mllvm -asan-, \
	instrumentation-with-call-threshold=$(umbra_threshold) \
	max-inline-poisoning-size=$(umbra_poisoning) \
	mapping-offset=$(umbra_offset) stack=1 globals=1 use-after-scope=1 \
	instrument-dynamic-allocas=1)
UMBRA_SANITIZE += $(call umbra_if_known,-mllvm -asan-kernel-mem-intrinsic-prefix=1)
else
UMBRA_SANITIZE := -fsanitize=kernel-address -fasan-shadow-offset=$(umbra_offset) \
	-fsanitize-address-use-after-scope $(addprefix --param asan-, \
	instrumentation-with-call-threshold=$(umbra_threshold) stack=1 globals=1 \
	instrument-allocas=1)
UMBRA_SANITIZE += $(call umbra_if_known,--param asan-kernel-mem-intrinsic-prefix=1)
endif
