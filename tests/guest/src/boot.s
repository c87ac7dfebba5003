// Everything that must run at privilege level 0, and nothing else.
//
// Level 0 may be emulated instruction by instruction (see docs on the PVM-style KVM), so this file
// only enters long mode, drops to ring 3, and offers a handful of gates of a few instructions.
// Tables that need arithmetic on addresses (the IDT, further page tables) are filled from ring 3.

.section .note.Xen, "a", @note
.balign 4
    .long 4, 8, 18              // name size, descriptor size, XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .quad pvh_entry

// ---------------------------------------------------------------- 32-bit entry
.section .text.boot, "ax", @progbits
.code32
.global pvh_entry
pvh_entry:
    cld
    mov dword ptr [start_info_address], ebx

    // An assembler cannot split an address, so the TSS descriptor is finished here.
    mov eax, offset tss
    mov word ptr [gdt_tss + 2], ax
    shr eax, 16
    mov byte ptr [gdt_tss + 4], al
    mov byte ptr [gdt_tss + 7], ah

    mov eax, cr4
    or eax, 0x620               // PAE, and OSFXSR + OSXMMEXCPT because Rust code uses SSE
    mov cr4, eax
    mov eax, offset pml4
    mov cr3, eax
    mov ecx, 0xc0000080         // EFER
    rdmsr
    or eax, 0x100               // LME
    wrmsr
    mov eax, cr0
    and eax, 0xfffffff3         // no EM, no TS: SSE must not trap
    or eax, 0x80000023          // PG, NE, MP, PE
    mov cr0, eax
    lgdt [gdt_pointer]
    mov esp, offset ring0_stack_top
    push 0x18
    mov eax, offset long_mode
    push eax
    retf

.code64
long_mode:
    mov eax, 0x10
    mov ss, eax
    mov eax, 0x23
    mov ds, eax
    mov es, eax
    mov fs, eax
    mov gs, eax
    mov eax, 0x30
    ltr ax
    lidt [idt_pointer]          // still empty: ring 3 fills it before it enables interrupts
    mov rsp, offset ring0_stack_top
    push 0x23
    mov rax, offset ring3_stack_top
    push rax
    push 0x3002                 // IOPL 3 besides the bitmap: each is honoured by some KVMs only
    push 0x2b
    mov rax, offset ring3_entry
    push rax
    iretq

ring3_entry:
    mov rdi, offset __bss_start // a reboot may find old contents
    mov rcx, offset __bss_end
    sub rcx, rdi
    xor eax, eax
    rep stosb
    xor ebp, ebp
    call guest_main
    ud2

// ---------------------------------------------------------------- gates: int3 from ring 3
// The breakpoint is the one way into ring 0 that works everywhere: without hardware virtualization
// `int n` is an unknown instruction and `syscall` arrives in ring 3 still, and real hypervisors let
// breakpoints through without an exit. rax is the service; r8 and r9 are arguments.
.section .text, "ax", @progbits
.global gate
gate:
    mov r10d, 1                 // proof for ring 3 that it has been here
    jmp qword ptr [gates + rax * 8]

// Interrupts are off here, so an interrupt that came after the last look at `wake` is not slept over:
// `sti` takes effect only after `hlt` has begun.
gate_idle:
    cmp dword ptr [wake], 0
    jne 1f
    sti
    hlt
    cli
1:  mov dword ptr [wake], 0
    iretq

gate_rdmsr:
    mov ecx, r8d
    rdmsr
    iretq

gate_wrmsr:
    mov ecx, r8d
    mov eax, r9d
    shr r9, 32
    mov edx, r9d
    wrmsr
    iretq

gate_cpuid:
    mov eax, r8d
    xor ecx, ecx
    cpuid
    iretq

gate_enable_interrupts:
    or qword ptr [rsp + 16], 0x200
    iretq

gate_stop:
    cli
    hlt
    jmp gate_stop

// The next exception finds no handler: a triple fault.
gate_forget_idt:
    lidt [no_idt_pointer]
    iretq

// ---------------------------------------------------------------- interrupts
.macro interrupt name
.global interrupt_\name
interrupt_\name:
    push rax
    inc dword ptr [count_\name]
    mov dword ptr [wake], 1
    mov eax, 0xfee000b0         // local APIC EOI
    mov dword ptr [rax], 0
    pop rax
    iretq
.endm
    interrupt timer
    interrupt disk
    interrupt config

.global interrupt_spurious
interrupt_spurious:             // must not be acknowledged
    inc dword ptr [count_spurious]
    iretq

// ---------------------------------------------------------------- exceptions
// They are reported from ring 3 on a stack of their own, and the guest does not go on.
.macro exception vector, has_error
exception_\vector:
    .if \has_error == 0
    push 0
    .endif
    push \vector
    jmp exception_common
.endm
    exception 0, 0
    exception 1, 0
    exception 2, 0
    exception 3, 0
    exception 4, 0
    exception 5, 0
    exception 6, 0
    exception 7, 0
    exception 8, 1
    exception 9, 0
    exception 10, 1
    exception 11, 1
    exception 12, 1
    exception 13, 1
    exception 14, 1
    exception 15, 0
    exception 16, 0
    exception 17, 1
    exception 18, 0
    exception 19, 0
    exception 20, 0
    exception 21, 1

exception_common:
    pop rax
    mov qword ptr [exception_record], rax
    pop rax
    mov qword ptr [exception_record + 8], rax
    pop rax
    mov qword ptr [exception_record + 16], rax
    pop rax
    mov qword ptr [exception_record + 24], rax
    mov rax, cr2
    mov qword ptr [exception_record + 32], rax
    mov rsp, offset ring0_stack_top
    push 0x23
    mov rax, offset exception_stack_top
    push rax
    push 0x3002
    push 0x2b
    mov rax, offset exception_ring3
    push rax
    iretq

exception_ring3:
    call exception_report
    ud2

// ---------------------------------------------------------------- data
.section .rodata, "a", @progbits
.balign 8
.global exception_table
gates:                          // in the order of gates.rs
    .quad gate_idle, gate_rdmsr, gate_wrmsr, gate_cpuid
    .quad gate_enable_interrupts, gate_stop, gate_forget_idt
exception_table:
    .quad exception_0, exception_1, exception_2, exception_3, exception_4, exception_5
    .quad exception_6, exception_7, exception_8, exception_9, exception_10, exception_11
    .quad exception_12, exception_13, exception_14, exception_15, exception_16, exception_17
    .quad exception_18, exception_19, exception_20, exception_21

.section .data.page, "aw", @progbits
.balign 4096
.global pml4
pml4:
    .quad pdpt + 0x27
    .zero 4096 - 8
pdpt:
    .quad page_directory_0 + 0x27
    .zero 4096 - 8
page_directory_0:               // the first GiB: present, writable, user, accessed, dirty, 2 MiB
    .set address, 0
    .rept 512
    .quad address + 0xe7
    .set address, address + 0x200000
    .endr

// One TSS, one ring-0 stack: a second processor would need its own of both.
.balign 128
tss:
    .long 0
    .quad ring0_stack_top
    .zero 102 - 12
    .word 104                   // the I/O bitmap follows at once
    .zero 8192                  // every port allowed
    .byte 0xff                  // the processor reads one byte past the last port
tss_end:

.section .data, "aw", @progbits
.balign 16
gdt:
    .quad 0
    .quad 0x00cf9b000000ffff    // 0x08 code, 32 bit, ring 0
    .quad 0x00cf93000000ffff    // 0x10 data, ring 0
    .quad 0x00af9b000000ffff    // 0x18 code, 64 bit, ring 0
    .quad 0x00cff3000000ffff    // 0x20 data, ring 3
    .quad 0x00affb000000ffff    // 0x28 code, 64 bit, ring 3
gdt_tss:                        // 0x30
    .word tss_end - tss - 1, 0
    .byte 0, 0x89, 0, 0
    .quad 0
gdt_end:
.balign 8
    .word 0, 0, 0
gdt_pointer:
    .word gdt_end - gdt - 1
    .quad gdt
.balign 8
    .word 0, 0, 0
idt_pointer:
    .word 256 * 16 - 1
    .quad idt
.balign 8
    .word 0, 0, 0
no_idt_pointer:
    .word 0
    .quad 0
.balign 8
.global start_info_address
start_info_address:
    .quad 0

.section .bss, "aw", @nobits
.balign 4096
.global idt
idt:
    .zero 256 * 16
    .zero 4096
ring0_stack_top:
    .zero 16384
exception_stack_top:
    .zero 131072
ring3_stack_top:
    .zero 64
.global wake, count_timer, count_disk, count_config, count_spurious, exception_record
wake:
    .long 0
count_timer:
    .long 0
count_disk:
    .long 0
count_config:
    .long 0
count_spurious:
    .long 0
.balign 8
exception_record:
    .zero 40
