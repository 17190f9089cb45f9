//! Discovery by CPUID, and the hypercall.

use core::arch::asm;
use core::arch::x86_64::{__cpuid, CpuidResult};

use umbra_shadow::abi::{self, CallNumber, ExitReason, Features, Redzone};

/// The contents of the VMM's CPUID leaves.
#[derive(Clone, Copy)]
pub struct Host {
    /// The features it offers.
    pub features: Features,
    /// ABI version of the VMM.
    pub version: u32,
    /// Guest-physical start and bytes of the page-shadow window; 0 bytes if there is none.
    pub page_window: (u64, u64),
    /// Guest-physical start and bytes of the byte-shadow window; 0 bytes if there is none.
    pub byte_window: (u64, u64),
    /// Bytes of virtual memory that can get shadow.
    pub virtual_bytes: u64,
    /// Bytes that a CPU may put into the quarantine between two drains; 0 if there is none.
    pub quarantine_batch: u64,
    /// Redzones behind objects.
    pub redzone: Redzone,
    /// Guest-physical address of the pattern pages; 0 if the VMM makes no check shadow.
    pub patterns: u64,
}

fn pair(leaf: CpuidResult) -> (u64, u64) {
    let join = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
    (join(leaf.eax, leaf.ebx), join(leaf.ecx, leaf.edx))
}

/// Looks for Umbra's CPUID block. `None` on any other machine.
pub fn discover() -> Option<Host> {
    // ECX bit 31 of leaf 1: there is a hypervisor. Without one the leaves below mean nothing.
    if __cpuid(1).ecx & 1 << 31 == 0 {
        return None;
    }
    let base =
        (0..abi::CPUID_BLOCKS).map(|i| abi::CPUID_FIRST + i * abi::CPUID_STEP).find(|&base| {
            let leaf = __cpuid(base);
            [leaf.ebx, leaf.ecx, leaf.edx] == abi::CPUID_SIGNATURE
        })?;
    let about = __cpuid(base + abi::CPUID_LEAF_FEATURES);
    let (quarantine_batch, redzone) = if __cpuid(base).eax >= base + abi::CPUID_LEAF_SETTINGS {
        let settings = __cpuid(base + abi::CPUID_LEAF_SETTINGS);
        (settings.eax.into(), Redzone::from_register(settings.ebx))
    } else {
        (0, Redzone::Adaptive)
    };
    let has_patterns = __cpuid(base).eax >= base + abi::CPUID_LEAF_PATTERNS;
    let patterns = if has_patterns { pair(__cpuid(base + abi::CPUID_LEAF_PATTERNS)).0 } else { 0 };
    Some(Host {
        version: about.eax,
        features: Features::from_bits(about.ecx),
        page_window: pair(__cpuid(base + abi::CPUID_LEAF_PAGE_WINDOW)),
        byte_window: pair(__cpuid(base + abi::CPUID_LEAF_BYTE_WINDOW)),
        virtual_bytes: pair(__cpuid(base + abi::CPUID_LEAF_VIRTUAL)).0,
        quarantine_batch,
        redzone,
        patterns,
    })
}

/// Makes one hypercall. Callers have found Umbra with [`discover`]; elsewhere this would write to
/// an unused port. Always inlined: for the VMM the stack begins with the caller's frame.
#[inline(always)]
pub fn hypercall(number: CallNumber, rdi: u64, rsi: u64, rcx: u64, r8: u64) -> u64 {
    let result;
    // SAFETY: an `out` to Umbra's port reads the named registers and changes rax only; memory that
    // the VMM writes (shadow, ring header) is accessed by volatile or atomic accesses on this side.
    unsafe {
        asm!("out dx, eax", inout("rax") u64::from(number) => result, in("dx") abi::PORT,
             in("rdi") rdi, in("rsi") rsi, in("rcx") rcx, in("r8") r8, options(nostack));
    }
    result
}

/// Asks the VMM to read the rings meanwhile. Nothing happens where it does not offer that.
#[inline(always)]
pub fn ring_doorbell() {
    // SAFETY: an `out` to Umbra's port changes no register and no memory.
    unsafe {
        asm!("out dx, al", in("dx") abi::DOORBELL_PORT, in("al") 0u8,
             options(nostack, preserves_flags));
    }
}

/// Reports a violation: [`CallNumber::Report`] with `fp` as the frame pointer where the VMM starts
/// to walk the stack.
pub fn report(fp: u64, address: u64, size: u64, actor: u64, ip: u64) {
    // SAFETY: as in `hypercall`; rbp is back before anything else uses it.
    unsafe {
        asm!("xchg rbp, {fp}", "out dx, eax", "xchg rbp, {fp}", fp = inout(reg) fp => _,
             inout("rax") u64::from(CallNumber::Report) => _, in("dx") abi::PORT,
             in("rdi") address, in("rsi") size, in("rcx") actor, in("r8") ip, options(nostack));
    }
}

/// Whether a hypercall's result is an error.
pub fn is_error(result: u64) -> bool {
    result >= abi::ERR_MIN
}

/// Ends the guest.
pub fn exit(reason: ExitReason, rsi: u64, rcx: u64, r8: u64) -> ! {
    hypercall(CallNumber::Exit, reason.into(), rsi, rcx, r8);
    loop {
        // SAFETY: stops this CPU for good; nothing else is left to do.
        unsafe { asm!("cli", "hlt", options(nomem, nostack)) }
    }
}
