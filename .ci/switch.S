# swapcontext and getcontext of x86-64 without the signal mask. hostcuda's threads of a block are contexts; glibc asks the
# kernel for the mask at each switch, which took nine tenths of all time. makecontext, glibc's, sets what is left.
.text
.globl swapcontext, getcontext
.type swapcontext, @function
swapcontext:                                        # (from: rdi, to: rsi): what a call must keep, at glibc's offsets
    mov %rbx, 0x80(%rdi); mov %rbp, 0x78(%rdi); mov %r12, 0x48(%rdi)
    mov %r13, 0x50(%rdi); mov %r14, 0x58(%rdi); mov %r15, 0x60(%rdi)
    mov (%rsp), %rcx; mov %rcx, 0xa8(%rdi)          # where it goes on
    lea 8(%rsp), %rcx; mov %rcx, 0xa0(%rdi)         # and with which stack
    mov 0x80(%rsi), %rbx; mov 0x78(%rsi), %rbp; mov 0x48(%rsi), %r12
    mov 0x50(%rsi), %r13; mov 0x58(%rsi), %r14; mov 0x60(%rsi), %r15
    mov 0xa0(%rsi), %rsp; mov 0xa8(%rsi), %rcx
    xor %eax, %eax
    jmp *%rcx
.type getcontext, @function
getcontext:
    xor %eax, %eax
    ret
.section .note.GNU-stack, "", @progbits
