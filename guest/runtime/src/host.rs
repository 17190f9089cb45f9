//! The way to the VMM: discovery by CPUID, and the hypercall.

use core::arch::asm;
use core::arch::x86_64::{__cpuid, CpuidResult};

use umbra_shadow::abi::{self, call};

/// The VMM's offer, as its CPUID leaves tell it.
#[derive(Clone, Copy)]
pub struct Offer {
    /// [`abi::features`] bits.
    pub features: u32,
    /// ABI version of the VMM.
    pub version: u32,
    /// Guest-physical start and bytes of the page-shadow window; 0 bytes if there is none.
    pub page_window: (u64, u64),
    /// Guest-physical start and bytes of the byte-shadow window; 0 bytes if there is none.
    pub byte_window: (u64, u64),
    /// Bytes of virtual memory that may have shadow of its own.
    pub virtual_bytes: u64,
    /// Bytes that a CPU may put into the quarantine between two drains; 0 if there is none.
    pub quarantine_batch: u64,
    /// [`abi::redzone`] setting.
    pub redzone: u32,
}

fn pair(leaf: CpuidResult) -> (u64, u64) {
    let join = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
    (join(leaf.eax, leaf.ebx), join(leaf.ecx, leaf.edx))
}

/// Looks for Umbra's CPUID block. `None` on any other machine.
pub fn discover() -> Option<Offer> {
    // ECX bit 31 of leaf 1 says that a hypervisor is there; without it the leaves below mean
    // nothing.
    if __cpuid(1).ecx & 1 << 31 == 0 {
        return None;
    }
    let base =
        (0..abi::CPUID_BLOCKS).map(|i| abi::CPUID_FIRST + i * abi::CPUID_STEP).find(|&base| {
            let leaf = __cpuid(base);
            [leaf.ebx, leaf.ecx, leaf.edx] == abi::CPUID_SIGNATURE
        })?;
    let about = __cpuid(base + abi::CPUID_LEAF_FEATURES);
    let settings = if __cpuid(base).eax >= base + abi::CPUID_LEAF_SETTINGS {
        __cpuid(base + abi::CPUID_LEAF_SETTINGS)
    } else {
        CpuidResult { eax: 0, ebx: abi::redzone::ADAPTIVE, ecx: 0, edx: 0 }
    };
    Some(Offer {
        version: about.eax,
        features: about.ecx,
        page_window: pair(__cpuid(base + abi::CPUID_LEAF_PAGE_WINDOW)),
        byte_window: pair(__cpuid(base + abi::CPUID_LEAF_BYTE_WINDOW)),
        virtual_bytes: pair(__cpuid(base + abi::CPUID_LEAF_VIRTUAL)).0,
        quarantine_batch: settings.eax.into(),
        redzone: settings.ebx,
    })
}

/// Makes one hypercall. Callers have found Umbra by [`discover`] before; elsewhere this would be a
/// write to an unused port. Always inlined: the VMM takes the caller's frame for the first of the
/// stack.
#[inline(always)]
pub fn hypercall(number: u32, rdi: u64, rsi: u64, rcx: u64, r8: u64) -> u64 {
    let result;
    // SAFETY: an `out` to Umbra's port reads the named registers and changes rax only; memory that
    // the VMM writes (shadow, ring header) is accessed by volatile or atomic accesses on this side.
    unsafe {
        asm!("out dx, eax", inout("rax") u64::from(number) => result, in("dx") abi::PORT,
             in("rdi") rdi, in("rsi") rsi, in("rcx") rcx, in("r8") r8, options(nostack));
    }
    result
}

/// Reports a violation: [`call::REPORT`] with `fp` as the frame pointer, for the VMM to walk the
/// stack from.
pub fn report(fp: u64, address: u64, size: u64, word: u64, ip: u64) {
    // SAFETY: as in `hypercall`; rbp is back before anything else uses it.
    unsafe {
        asm!("xchg rbp, {fp}", "out dx, eax", "xchg rbp, {fp}", fp = inout(reg) fp => _,
             inout("rax") u64::from(call::REPORT) => _, in("dx") abi::PORT,
             in("rdi") address, in("rsi") size, in("rcx") word, in("r8") ip, options(nostack));
    }
}

/// Whether a hypercall's result is an error.
pub fn is_error(result: u64) -> bool {
    result >= abi::ERR_MIN
}

/// Ends the guest.
pub fn exit(reason: u64, rsi: u64, rcx: u64, r8: u64) -> ! {
    hypercall(call::EXIT, reason, rsi, rcx, r8);
    loop {
        // SAFETY: stops this CPU for good; nothing else is left to do.
        unsafe { asm!("cli", "hlt", options(nomem, nostack)) }
    }
}
