// Everything that runs at CPL0: entry, descriptor tables, and the stubs behind the IDT. It keeps to plain integer
// instructions because software implementations of KVM interpret CPL0 code; compiled code runs at CPL3 only.

.section .note.pvh, "a", @note
    .long 4, 4, 18                  // name size, descriptor size, XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .long start32

// PVH entry: 32-bit protected mode, paging off, EBX = address of hvm_start_info.
.section .boot, "ax", @progbits
.code32
.globl start32
start32:
    cli
    cld
    mov eax, cr4
    or eax, 0x620                   // PAE, OSFXSR, OSXMMEXCPT
    mov cr4, eax
    mov eax, offset pml4
    mov cr3, eax
    mov ecx, 0xC0000080             // EFER
    rdmsr
    or eax, 0x100                   // LME
    wrmsr
    mov eax, 0x80010033             // PG, WP, NE, ET, MP, PE
    mov cr0, eax
    lgdt [gdt_register]
    .byte 0xEA                      // far jump to 0x08:start64
    .long start64
    .word 0x08

.code64
start64:
    mov ax, 0x10
    mov ds, ax
    mov es, ax
    mov ss, ax
    xor eax, eax
    mov fs, ax
    mov gs, ax
    mov rsp, offset kernel_stack_top

    // IDT: one interrupt gate for each 16-byte stub.
    mov edi, offset idt
    mov eax, offset stubs
    mov ecx, 96
1:  mov edx, eax
    and edx, 0xFFFF
    or edx, 0x00080000              // code segment 0x08
    mov dword ptr [rdi], edx
    mov edx, eax
    and edx, 0xFFFF0000
    or edx, 0x8E00                  // present, interrupt gate
    mov dword ptr [rdi + 4], edx
    add edi, 16
    add eax, 16
    dec ecx
    jnz 1b
    lidt [idt_register]

    // TSS: where CPL3 enters CPL0, and an I/O bitmap that gives CPL3 all ports.
    mov eax, offset task_state
    mov word ptr [gdt_tss + 2], ax
    shr eax, 16
    mov byte ptr [gdt_tss + 4], al
    mov byte ptr [gdt_tss + 7], ah
    mov ax, 0x28
    ltr ax

    // To CPL3 with interrupts on, EDI = start information.
    mov edi, ebx
    push 0x1B
    mov eax, offset user_stack_top - 8
    push rax
    push 0x202
    push 0x23
    mov eax, offset guest_main
    push rax
    iretq

// Stubs, 16 bytes each: exceptions 0 to 31, then interrupts 0x20 to 0x5F.
.balign 16
stubs:
.set vector, 0
.rept 32
    .balign 16
    .if vector == 8 || (vector >= 10 && vector <= 14) || vector == 17 || vector == 21
    .else
    push 0                          // no error code: one for the common frame
    .endif
    push vector
    jmp exception
    .set vector, vector + 1
.endr
.rept 64
    .balign 16
    push rax
    mov eax, vector
    jmp interrupt
    .set vector, vector + 1
.endr

// Counts the interrupt and ends it. INTx stays asserted until the adapter lets go of it, so that comes first.
interrupt:
    inc qword ptr [interrupt_counts + rax*8]
    cmp eax, 0x41
    jne 1f
    mov rax, qword ptr [intx_register]
    push rcx
    mov ecx, dword ptr [intx_value]
    mov dword ptr [rax], ecx
    pop rcx
1:  mov eax, 0xFEE000B0             // local APIC, end of interrupt
    mov dword ptr [rax], 0
    pop rax
    iretq

// Frame: vector, error code, RIP, CS, RFLAGS, RSP, SS.
exception:
    cmp dword ptr [rsp], 13
    jne fault
    push rax
    mov rax, qword ptr [rsp + 24]
    cmp byte ptr [rax], 0xF4        // a HLT at CPL3 is a request to wait
    pop rax
    jne fault
    // Wait while [RDI] == RSI. Interrupts are off, so none is lost between the look and the halt.
    cmp qword ptr [rdi], rsi
    jne 1f
    sti
    hlt
    cli
1:  inc qword ptr [rsp + 16]
    add rsp, 16
    iretq

// Anything else goes on at CPL3 in guest_fault(vector, error code, RIP, CR2) on a fresh stack.
fault:
    mov edi, dword ptr [rsp]
    mov rsi, qword ptr [rsp + 8]
    mov rdx, qword ptr [rsp + 16]
    mov rcx, cr2
    mov eax, offset guest_fault
    mov qword ptr [rsp + 16], rax
    mov eax, offset fault_stack_top - 8
    mov qword ptr [rsp + 40], rax
    add rsp, 16
    iretq

// Identity map, all of it open to CPL3: 1 GiB from 0, and 3 to 4 GiB uncached for devices.
.section .tables, "aw", @progbits
.balign 4096
pml4:
    .quad pdpt + 0x07
    .fill 511, 8, 0
pdpt:
    .quad low_pages + 0x07, 0, 0, device_pages + 0x07
    .fill 508, 8, 0
low_pages:
.set page, 0
.rept 512
    .quad page + 0x87               // 2 MiB, user, writable, present
    .set page, page + 0x200000
.endr
device_pages:
.set page, 0xC0000000
.rept 512
    .quad page + 0x9F               // the same, uncached
    .set page, page + 0x200000
.endr

.balign 16
gdt:
    .quad 0
    .quad 0x00AF9B000000FFFF        // 0x08 code, CPL0
    .quad 0x00CF93000000FFFF        // 0x10 data, CPL0
    .quad 0x00CFF3000000FFFF        // 0x18 data, CPL3
    .quad 0x00AFFB000000FFFF        // 0x20 code, CPL3
gdt_tss:
    .word 0x2068, 0                 // limit; base is filled in
    .byte 0, 0x89, 0, 0
    .quad 0
gdt_end:
gdt_register:
    .word gdt_end - gdt - 1
    .quad gdt
idt_register:
    .word 96 * 16 - 1
    .quad idt

.balign 16
.globl task_state
task_state:
    .long 0
    .quad kernel_stack_top, 0, 0
    .fill 9, 8, 0
    .word 0, 104                    // the I/O bitmap starts behind the TSS
    .fill 8192, 1, 0
    .byte 0xFF

.section .bss
.balign 16
idt: .skip 96 * 16
.globl interrupt_counts
interrupt_counts: .skip 96 * 8
.globl intx_register
intx_register: .skip 8
.globl intx_value
intx_value: .skip 8
.balign 4096
    .skip 16384
kernel_stack_top:
    .skip 16384
fault_stack_top:
    .skip 262144
user_stack_top:
