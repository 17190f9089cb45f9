//! The parts of a CPU's extended state that a guest's kernel has to enable before they are used.

use super::{CR0_EM, CR0_TS, CR4_OSFXSR, CR4_OSXSAVE, Context, DEVICE_NOT_AVAILABLE, Stop};

/// XCR0's bits for SSE and AVX, and with AVX-512's three.
const XCR0_AVX: u64 = 0x06;
const XCR0_AVX512: u64 = 0xe6;

/// The state that a kernel must enable for an instruction; the encoding decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Enabled {
    /// SSE.
    Sse,
    /// AVX.
    Avx,
    /// AVX-512.
    Avx512,
}

/// Raises the CPU's exceptions for state that the guest's kernel did not enable, or whose use it
/// traps.
pub(super) fn enabled(c: &mut Context, needed: Enabled) -> Result<(), Stop> {
    let mut has = |bits| Ok::<_, Stop>(c.sregs.cr4 & CR4_OSXSAVE != 0 && c.xcr0()? & bits == bits);
    let on = match needed {
        Enabled::Sse => c.sregs.cr0 & CR0_EM == 0 && c.sregs.cr4 & CR4_OSFXSR != 0,
        Enabled::Avx => has(XCR0_AVX)?,
        Enabled::Avx512 => has(XCR0_AVX512)?,
    };
    if !on {
        return Err(Stop::UNDEFINED);
    }
    if c.sregs.cr0 & CR0_TS != 0 {
        return Err(Stop::Fault { vector: DEVICE_NOT_AVAILABLE, error: None });
    }
    Ok(())
}
