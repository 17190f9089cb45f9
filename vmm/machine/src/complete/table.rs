//! The instructions that are completed.

use iced_x86::Mnemonic;

use super::{Handler, integer, state, system};

/// The function that completes an instruction; `None` if there is none, unless [`super::native`]
/// knows it.
pub(super) fn handler(mnemonic: Mnemonic) -> Option<Handler> {
    use Mnemonic as M;
    Some(match mnemonic {
        // Exceptions and software interrupts.
        M::Int3 => system::int3,
        M::Int => system::int,
        M::Int1 => system::int1,
        M::Ud0 | M::Ud1 | M::Ud2 => system::ud,
        // Flags and time.
        M::Stac => system::stac,
        M::Clac => system::clac,
        M::Rdtscp => system::rdtscp,
        M::Rdpid => system::rdpid,
        M::Rdrand | M::Rdseed => system::random,
        // System registers.
        M::Swapgs => system::swapgs,
        M::Rdfsbase | M::Rdgsbase => system::read_base,
        M::Wrfsbase | M::Wrgsbase => system::write_base,
        M::Xgetbv => system::xgetbv,
        M::Xsetbv => system::xsetbv,
        M::Invpcid => system::invpcid,
        // The emulator and the exit order everything already.
        M::Lfence | M::Sfence | M::Mfence | M::Serialize => system::nothing,
        // Waits for x87 exceptions, which kernels keep masked.
        M::Wait => system::nothing,
        // Flushes buffers of the host's CPU, which the host does itself.
        M::Verw => system::verw,
        // Hints, and reads of a shadow stack, which the guest does not have.
        M::Pause | M::Nop | M::Tpause | M::Endbr64 | M::Endbr32 | M::Rdsspd | M::Rdsspq => {
            system::nothing
        }
        M::Prefetchnta
        | M::Prefetcht0
        | M::Prefetcht1
        | M::Prefetcht2
        | M::Prefetch
        | M::Prefetchw
        | M::Prefetchwt1
        | M::Prefetchit0
        | M::Prefetchit1
        | M::Cldemote => system::nothing,
        // Guest memory is coherent ordinary memory. The line must be readable.
        M::Clflush | M::Clflushopt | M::Clwb => system::flush_line,
        M::Wbnoinvd => system::nothing_in_ring0,
        // Waiting for a store may end at any time, also at once.
        M::Monitor | M::Mwait => system::nothing_in_ring0,
        // Extended state.
        M::Xsave | M::Xsave64 | M::Xsaveopt | M::Xsaveopt64 => state::xsave,
        M::Xsavec | M::Xsavec64 | M::Xsaves | M::Xsaves64 => state::xsavec,
        M::Xrstor | M::Xrstor64 | M::Xrstors | M::Xrstors64 => state::xrstor,
        M::Fxsave | M::Fxsave64 => state::fxsave,
        M::Fxrstor | M::Fxrstor64 => state::fxrstor,
        M::Ldmxcsr | M::Vldmxcsr => state::ldmxcsr,
        M::Stmxcsr | M::Vstmxcsr => state::stmxcsr,
        M::Rdpkru => state::rdpkru,
        M::Wrpkru => state::wrpkru,
        // Integer arithmetic.
        M::Popcnt => integer::popcnt,
        M::Lzcnt => integer::lzcnt,
        M::Tzcnt => integer::tzcnt,
        M::Andn => integer::andn,
        M::Bextr => integer::bextr,
        M::Blsi => integer::blsi,
        M::Blsmsk => integer::blsmsk,
        M::Blsr => integer::blsr,
        M::Bzhi => integer::bzhi,
        M::Mulx => integer::mulx,
        M::Pdep => integer::pdep,
        M::Pext => integer::pext,
        M::Rorx => integer::rorx,
        M::Sarx => integer::sarx,
        M::Shlx => integer::shlx,
        M::Shrx => integer::shrx,
        M::Adcx => integer::adcx,
        M::Adox => integer::adox,
        M::Crc32 => integer::crc32,
        M::Movbe => integer::movbe,
        M::Cmpxchg16b => integer::cmpxchg16b,
        _ => return None,
    })
}
