/*
 * From the Linux 64-bit boot protocol's entry (long mode, memory mapped one to one) to C code in
 * the higher half. The page tables map one GiB at 0, as direct map, and as kernel image.
 */
#define IMAGE_MAP 0xffffffff80000000
#define STACK_BYTES 0x10000

	.section .text.boot, "ax"
	.globl boot_entry
boot_entry:
	lea boot_pml4(%rip), %rax
	mov %rax, %cr3
	movabs $boot_high, %rax
	jmp *%rax
boot_high:
	movabs $stack + STACK_BYTES, %rsp
	xor %ebp, %ebp
	call start

	.section .data.boot, "aw"
	.balign 4096
	.globl boot_pml4
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
	.quad 0
boot_pd:
	.set at, 0x83
	.rept 512
	.quad at
	.set at, at + 0x200000
	.endr

	.section .bss.boot, "aw", @nobits
	.balign 4096
	.globl stack
stack:
	.skip STACK_BYTES
	.section .note.GNU-stack, "", @progbits
