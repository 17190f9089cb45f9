/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * From the 64-bit boot protocol's entry (long mode, memory mapped one to one, rsi: boot parameters)
 * to C code in the higher half. The first page tables are part of the image. They map the first GiB
 * three times: at 0, as direct map and as kernel image. The byte shadow of the image is one scratch
 * page, mapped everywhere: compiled code may store the shadow of the first stack before Umbra's
 * windows are mapped, and without Umbra.
 */
#define IMAGE_MAP 0xffffffff80000000
#define BOOT_STACK 0x10000
/* The vectors that push an error code: 8, 10 to 14, 17 and 21. */
#define WITH_ERROR_CODE (1 << 8 | 0x1f << 10 | 1 << 17 | 1 << 21)

	.section .text.boot, "ax"
	.globl boot_entry
boot_entry:
	cld
	lea boot_pml4(%rip), %rax
	mov %rax, %cr3
	movabs $boot_high, %rax
	jmp *%rax
boot_high:
	movabs $boot_stack + BOOT_STACK, %rsp
	lgdt boot_gdt_pointer
	push $0x08
	push $1f
	lretq
1:	xor %eax, %eax
	mov %eax, %ds
	mov %eax, %es
	mov %eax, %ss
	/* End of the frame chain. */
	xor %ebp, %ebp
	/* For inline checks: write protection, global pages, no-execute, and a scratch page. */
	mov %cr0, %rax
	or $0x10000, %rax
	mov %rax, %cr0
	mov %cr4, %rax
	or $0x80, %rax
	mov %rax, %cr4
	mov $0xc0000080, %ecx
	rdmsr
	or $0x800, %eax
	wrmsr
	push %rsi
	push %rsi
	movabs $boot_pml4, %rdi
	movabs $IMAGE_MAP, %rsi
	call umbra_early
	pop %rdi
	pop %rsi
	call kernel_main
	ud2

/*
 * probe_read of kernel.h. Reads a byte as instrumented code does: check, then access. The fault
 * handler skips the access where it faults.
 */
	.text
	.globl probe_read, probe_access, probe_done
	.type probe_read, @function
probe_read:
	push %rbp
	mov %rsp, %rbp
	push %rdi
	sub $8, %rsp
	call __asan_load1_noabort
	mov -8(%rbp), %rdi
probe_access:
	movzbl (%rdi), %eax
probe_done:
	leave
	ret
	.size probe_read, . - probe_read

/* jump_* of kernel.h. The callee-saved registers are on the stack meanwhile. */
	.globl jump_catch, jump_throw, jump_with_buffer
	.type jump_catch, @function
jump_catch:
	push %rbp
	mov %rsp, %rbp
	push %rbx
	push %r12
	push %r13
	push %r14
	push %r15
	sub $8, %rsp
	mov %rbp, jump_frame(%rip)
	call *%rdi
jump_return:
	lea -40(%rbp), %rsp
	pop %r15
	pop %r14
	pop %r13
	pop %r12
	pop %rbx
	pop %rbp
	ret
	.size jump_catch, . - jump_catch
	.type jump_throw, @function
jump_throw:
	mov jump_frame(%rip), %rbp
	jmp jump_return
	.size jump_throw, . - jump_throw
	.type jump_with_buffer, @function
jump_with_buffer:
	push %rbp
	mov %rsp, %rbp
	mov %rdi, %rax
	sub $2048, %rsp
	mov %rsp, %rdi
	mov $2048, %esi
	call *%rax
	leave
	ret
	.size jump_with_buffer, . - jump_with_buffer

/* One stub for each CPU exception. It pushes 0 where the CPU pushes no error code. */
	.macro fault_stub vector
	.balign 16
	.if ((WITH_ERROR_CODE >> \vector) & 1) == 0
	push $0
	.endif
	push $\vector
	jmp fault_common
	.endm
	.balign 16
	.globl fault_stubs
fault_stubs:
	.irp vector, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15
	fault_stub \vector
	.endr
	.irp vector, 16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
	fault_stub \vector
	.endr
fault_common:
	push %rax
	push %rcx
	push %rdx
	push %rsi
	push %rdi
	push %r8
	push %r9
	push %r10
	push %r11
	push %rbp
	mov %rsp, %rdi
	cld
	/* The CPU aligned the stack; 17 words are on it. */
	sub $8, %rsp
	call fault
	add $8, %rsp
	pop %rbp
	pop %r11
	pop %r10
	pop %r9
	pop %r8
	pop %rdi
	pop %rsi
	pop %rdx
	pop %rcx
	pop %rax
	add $16, %rsp
	iretq

	.section .data.boot, "aw"
	.balign 8
boot_gdt:
	.quad 0, 0x00af9b000000ffff
boot_gdt_pointer:
	.word 15
	.quad boot_gdt

	.balign 4096
	.globl boot_pml4, boot_pd_shadow
boot_pml4:
	.quad boot_pdpt_low - IMAGE_MAP + 3
	.fill 255, 8, 0
	.quad boot_pdpt_low - IMAGE_MAP + 3
	.fill 254, 8, 0
	.quad boot_pdpt_high - IMAGE_MAP + 3
boot_pdpt_low:
	.quad boot_pd - IMAGE_MAP + 3
	.fill 511, 8, 0
boot_pdpt_high:
	.fill 510, 8, 0
	.quad boot_pd - IMAGE_MAP + 3
	.quad boot_pd_shadow - IMAGE_MAP + 3
boot_pd:
	.set at, 0x83
	.rept 512
	.quad at
	.set at, at + 0x200000
	.endr
/* The byte shadow of the highest 2 GiB: 0xfffffffff0000000 to the top. */
boot_pd_shadow:
	.fill 384, 8, 0
	.rept 128
	.quad boot_pt_scratch - IMAGE_MAP + 3
	.endr
boot_pt_scratch:
	.rept 512
	.quad boot_scratch - IMAGE_MAP + 3
	.endr

	.section .bss.boot, "aw", @nobits
	.balign 8
jump_frame:
	.skip 8
	.balign 4096
boot_scratch:
	.skip 4096
	.globl boot_stack
boot_stack:
	.skip BOOT_STACK
	.section .note.GNU-stack, "", @progbits
