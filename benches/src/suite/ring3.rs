//! The cost of a check in a guest's ring 3, in nanoseconds. Some hosts emulate ring 0, but the CPU
//! executes ring 3 on every host.
//!
//! The checks are the guest runtime's machine code, taken from the test kernel's file and patched
//! as in `guest/runtime/src/checks.rs`. They are position-independent: they shift the address and
//! load from there. So the guest has nothing but them and a loop, and its page tables are open to
//! ring 3. It checks addresses in the lower half, whose shadow lies at the same shifts. Code that
//! records events or changes shadow disables interrupts, so it cannot run in ring 3.

use std::fmt::Write as _;

use anyhow::{Context as _, Result, bail};
use umbra::machine::loader::Boot;
use umbra::machine::vcpu::{Vcpu, VmExit};
use umbra::machine::{Kvm, Machine, MachineConfig, layout};
use umbra_shadow::codes::{GRANULE, GRANULE_SHIFT, PAGE_BYTES, PAGE_SHIFT, PAGE_VALID};
use vm_memory::GuestAddress;

use crate::clock::thread_cpu;
use crate::figure::Figure;
use crate::host::{SPARE, available_memory};
use crate::native::memory::Map;
use crate::native::{IN_ORDER, SCATTER, size};
use crate::program::one_segment;
use crate::runtime::Checks;

/// Working sets, in bytes of checked memory.
const SETS: [u64; 6] = [SMALL, 2 << 20, 16 << 20, 128 << 20, 1 << 30, LARGE];
const SMALL: u64 = 32 << 10;
const LARGE: u64 = 4 << 30;
/// Turns for the median, and rounds in a turn: for sets that fit the caches, and for others, which
/// must be loaded again after another check's turn. Two more turns only fill caches.
const TURNS: (usize, u64) = (201, 100_000);
const FAR_TURNS: (usize, u64) = (21, 1_000_000);
const WARM: usize = 2;
/// Memory that is accessible as a whole, and memory that is byte-checked. Only its shadow exists:
/// at 2 MiB (which is where the guest's RAM ends), at 3 MiB, and at 1.5 GiB.
const UNTYPED: u64 = 8 << 30;
const BYTES: u64 = UNTYPED + LARGE;
/// Valid bytes of the last granule of a set, where there is a partial one.
const VALID: u8 = 5;
/// Rounds that are subtracted from a turn, with the exit at its end.
const FEW: u64 = 1000;
/// The bit that opens a page to ring 3, in all levels of the page tables.
const USER: u64 = 4;
/// An address without memory: a store there ends a run of the loop. It lies in the hole, and the
/// first page tables map it.
const NOTHING: u64 = 0xd000_0000;
/// Limits for the time of a check relative to a full shadow's: for untyped memory, for a cached set
/// of it, and for a cached set of byte-checked memory.
const LIMITS: [f64; 3] = [1.0 / 3.0, 1.05, 1.2];

/// Factors from a round's number to an address, as in `native`. These always give the same address.
const STAY: [u64; 2] = [0, 1];
/// These give one address for each page of byte shadow, in order.
const SHADOW_PAGES: [u64; 2] = [1 << (PAGE_SHIFT + GRANULE_SHIFT), 1];

/// The loop. `r14` rounds of: any address of a set of `r9` + 1 bytes at `r12`, chosen by `r8` and
/// `r15`, and `r10` bytes are checked by `r13`.
fn code() -> &'static [u8] {
    let (start, end): (*const u8, *const u8);
    // SAFETY: two address calculations; the code goes to a section of its own and is not executed
    // here.
    unsafe {
        std::arch::asm!(
            "lea {0}, [rip + 220f]",
            "lea {1}, [rip + 221f]",
            ".pushsection .rodata.ring3, \"a\"",
            "220:",
            "ret",
            ".balign 64",
            "2:",
            "mov rdi, r14",
            "imul rdi, r8",
            "mov rax, rdi",
            "shr rax, 32",
            "xor rdi, rax",
            "imul rdi, r15",
            "and rdi, r9",
            "add rdi, r12",
            "mov rsi, r10",
            "call r13",
            "dec r14",
            "jnz 2b",
            "mov [rbx], eax",
            "ud2",
            ".balign 64, 0xcc",
            "221:",
            ".popsection",
            out(reg) start,
            out(reg) end,
        );
        std::slice::from_raw_parts(start, end.offset_from(start) as usize)
    }
}

/// Offset of the loop in it.
const LOOP: u64 = 64;

/// A guest in ring 3, with the shadow of a working set.
struct Guest {
    vcpu: Vcpu,
    // Dropped before the memory that it maps.
    _machine: Machine,
    _shadow: [Map; 3],
    /// Addresses of the checks for two-level and for full shadow, and the bytes of each.
    checks: [u64; 2],
    each: u64,
}

/// What a round checks.
#[derive(Clone, Copy)]
struct Access {
    /// Where the check's code lies.
    check: u64,
    /// The first address of the set, the size of the set, and the way through it.
    base: u64,
    set: u64,
    step: [u64; 2],
    /// Bytes, for `loadN`.
    size: u64,
}

impl Guest {
    /// With this shadow of the set's last granule.
    fn new(kvm: &Kvm, kernel: &[u8], set: u64, last: u8) -> Result<Self> {
        let [two_level, full] = ["umbra_templates_two_level", "umbra_templates_full"]
            .map(|name| Checks::new(kernel, name));
        let (two_level, full) = (two_level?, full?);
        let image = [code(), &two_level.code, &full.code].concat();
        let file = one_segment(&image);
        let config = MachineConfig { memory_bytes: layout::MIN_MEMORY, ..MachineConfig::default() };
        let mut machine = Machine::new(kvm, config)?;
        let start = machine.load(&Boot::new(&file, ""))?.entry.0;
        for table in 0..2 + layout::BOOT_PDS {
            for entry in 0..512 {
                let gpa = GuestAddress(layout::BOOT_PML4 + table * layout::PAGE + 8 * entry);
                let value = machine.ram().read_u64(gpa)?;
                machine.ram().write(gpa, &(value | USER).to_le_bytes())?;
            }
        }
        // Small pages, as behind the windows.
        let map = |bytes, value| Map::new(bytes, value, false).context("no host memory for shadow");
        let mut shadow = [
            map(set >> PAGE_SHIFT, PAGE_VALID)?,
            map(set >> PAGE_SHIFT, PAGE_BYTES)?,
            map(set >> GRANULE_SHIFT, 0)?,
        ];
        shadow[2].set((set >> GRANULE_SHIFT) as usize - 1, last);
        for (map, gpa) in
            shadow.iter().zip([UNTYPED >> PAGE_SHIFT, BYTES >> PAGE_SHIFT, BYTES >> GRANULE_SHIFT])
        {
            let bytes = map.bytes();
            // SAFETY: the guest may only read it, and the machine is dropped before it.
            unsafe {
                machine.map(GuestAddress(gpa), bytes.as_ptr().cast_mut(), bytes.len() as u64, true)
            }?;
        }
        let mut vcpu = machine.create_vcpu(0)?;
        let mut sregs = vcpu.sregs()?;
        for segment in [
            &mut sregs.cs,
            &mut sregs.ss,
            &mut sregs.ds,
            &mut sregs.es,
            &mut sregs.fs,
            &mut sregs.gs,
        ] {
            (segment.dpl, segment.selector) = (3, segment.selector | 3);
        }
        vcpu.set_sregs(&sregs)?;
        let first = start + code().len() as u64;
        let checks = [first, first + two_level.code.len() as u64];
        Ok(Self { vcpu, _machine: machine, _shadow: shadow, checks, each: two_level.each as u64 })
    }

    /// CPU time of `rounds` rounds.
    fn run(&mut self, access: Access, rounds: u64) -> Result<f64> {
        let Access { check, base, set, step, size } = access;
        let mut regs = self.vcpu.regs()?;
        (regs.rip, regs.rsp, regs.rflags) = (self.start() + LOOP, layout::BOOT_STACK, 2);
        (regs.rbx, regs.r8, regs.r9, regs.r10) =
            (NOTHING, step[0], (set - 1) & !(GRANULE - 1), size);
        (regs.r12, regs.r13, regs.r14) = (base, check, rounds);
        regs.r15 = step[1];
        self.vcpu.set_regs(&regs)?;
        let begin = thread_cpu();
        loop {
            match self.vcpu.run()? {
                VmExit::Interrupted => {}
                VmExit::MmioWrite { gpa: GuestAddress(NOTHING), .. } => break,
                other => bail!("a check in ring 3 did not come back: {other:?}"),
            }
        }
        Ok((thread_cpu() - begin).as_nanos() as f64)
    }

    /// Nanoseconds of one round of each, with the loop: the median over turns.
    fn times<const N: usize>(
        &mut self,
        all: [Access; N],
        (turns, rounds): (usize, u64),
    ) -> Result<[Vec<f64>; N]> {
        let mut times = [const { Vec::new() }; N];
        for turn in 0..WARM + turns {
            for (access, times) in all.iter().zip(&mut times) {
                // The exit at the end is in both.
                let time = self.run(*access, rounds + FEW)? - self.run(*access, FEW)?;
                if turn >= WARM {
                    times.push(time / rounds as f64);
                }
            }
        }
        Ok(times)
    }

    /// Where the image begins, with a bare `ret`.
    fn start(&self) -> u64 {
        self.checks[0] - code().len() as u64
    }

    /// The check of a name: for two-level shadow, or for a full one.
    fn check(&self, name: &str, full: bool) -> Result<u64> {
        let at = Checks::LOADS.iter().position(|known| *known == name).context("no such check")?;
        Ok(self.checks[usize::from(full)] + at as u64 * self.each)
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Measures. `tick` gets each step. Also returns a table.
///
/// # Errors
/// KVM refuses, or the kernel's checks are not as expected.
pub fn figures(kernel: &[u8], tick: impl Fn(&str)) -> Result<(Vec<Figure>, String)> {
    let kvm = Kvm::open()?;
    tick("checks in ring 3");
    let mut text = String::from(
        "The guest runtime's own code (`guest/runtime/src/checks.rs`), taken out of the test \
         kernel and called in a loop in a guest's ring 3, which a CPU executes on every host. \
         Nanoseconds of a CPU for a round, the loop of eleven instructions included: medians, \
         measured in turns. The shadow is the host's memory in pages of 4 KiB, as behind the \
         windows. (Allocations and what else changes shadow keep interrupts off, which ring 3 \
         cannot: their figures are instructions and exits.)\n\n\
         A bare `ret` may take longer than a check, and so may one check than another that has \
         the same to do: how calls and returns of code this short follow each other is part of \
         it. Differences of about one nanosecond say nothing of the shadow; those of the large \
         sets do.\n\n",
    );
    text.push_str(&sizes(&mut Guest::new(&kvm, kernel, SMALL, VALID)?)?);
    let mut all = Vec::new();
    for (name, step) in [("at random", SCATTER), ("one after the other", IN_ORDER)] {
        // Writing to a string does not fail.
        let _ = write!(
            text,
            "\n\
             ### 8 bytes, {name}\n\n\
             | working set | empty call | two-level, untyped | two-level, byte-checked | full | \
             full to untyped |\n\
             | --- | ---: | ---: | ---: | ---: | ---: |\n"
        );
        for set in SETS {
            tick(&format!("checks in ring 3, {name}, in {} KiB", set >> 10));
            let needed = (set >> GRANULE_SHIFT) + 2 * (set >> PAGE_SHIFT) + SPARE;
            if needed > available_memory() {
                let why = format!("it needs {} MiB of host memory", needed >> 20);
                let skip = umbra_skip::line("this working set", why);
                let _ = writeln!(text, "| {} | {skip} |", size(set));
                continue;
            }
            let mut guest = Guest::new(&kvm, kernel, set, 0)?;
            let of = |base, check| Access { check, base, set, step, size: 8 };
            let (two_level, full) = (guest.check("load8", false)?, guest.check("load8", true)?);
            let accesses = [
                of(UNTYPED, guest.start()),
                of(UNTYPED, two_level),
                of(BYTES, two_level),
                of(BYTES, full),
            ];
            // The first access to each page of shadow is slow.
            for access in &accesses[1..] {
                guest.run(
                    Access { step: SHADOW_PAGES, ..*access },
                    (set / SHADOW_PAGES[0]).max(1),
                )?;
            }
            let times = guest.times(accesses, if set <= SETS[1] { TURNS } else { FAR_TURNS })?;
            let ratio = |i: usize| {
                median(times[i].iter().zip(&times[3]).map(|(time, full)| time / full).collect())
            };
            if step == SCATTER {
                all.extend(ratios(set, ratio(1), ratio(2)));
            }
            let to_untyped = 1.0 / ratio(1);
            let [empty, untyped, bytes, full] = times.map(median);
            let _ = writeln!(
                text,
                "| {} | {empty:.2} | {untyped:.2} | {bytes:.2} | {full:.2} | {to_untyped:.2} |",
                size(set)
            );
        }
    }
    Ok((all, text))
}

/// The figures with limits.
fn ratios(set: u64, untyped: f64, bytes: f64) -> Vec<Figure> {
    const GROUP: &str = "checks in a guest's ring 3, at random, time to that of full";
    let [far, near, near_bytes] = LIMITS;
    let figure = |name: &str, ratio, limit| {
        Figure::new(GROUP, format!("{name}, {}", size(set)), ratio, "ratio")
            .limit(limit)
            .note("median of pairs measured in turns")
    };
    match set {
        SMALL => vec![figure("untyped", untyped, near), figure("byte-checked", bytes, near_bytes)],
        LARGE => vec![figure("untyped", untyped, far)],
        _ => Vec::new(),
    }
}

/// The checks of all sizes, of one address.
fn sizes(guest: &mut Guest) -> Result<String> {
    let mut text = String::from(
        "| check | untyped | untyped, unaligned | byte-checked, whole granule | byte-checked, \
         partial granule | full, whole granule | full, partial granule |\n\
         | --- | ---: | ---: | ---: | ---: | ---: | ---: |\n",
    );
    let at = |check, base, size| Access { check, base, set: GRANULE, step: STAY, size };
    let start = guest.start();
    let [empty] = guest.times([at(start, UNTYPED, 0)], TURNS)?.map(median);
    // Writing to a string does not fail.
    let _ = writeln!(text, "| a bare `ret` | {empty:.2} | | | | | |");
    let partial = BYTES + SMALL - GRANULE;
    for (name, size) in Checks::LOADS.iter().zip([1, 2, 4, 8, 16, u64::from(VALID)]) {
        let (two_level, full) = (guest.check(name, false)?, guest.check(name, true)?);
        let any = *name == "loadN";
        // Only accesses that the fast paths pass: there is no model here.
        let accesses = [
            Some(at(two_level, UNTYPED, size)),
            (size > 1).then(|| at(two_level, UNTYPED + 1, size)),
            Some(at(two_level, BYTES, size)),
            (size < GRANULE).then(|| at(two_level, partial, size)),
            (!any).then(|| at(full, BYTES, size)),
            (size < GRANULE && !any).then(|| at(full, partial, size)),
        ];
        let _ = write!(text, "| `__asan_{name}_noabort`{} |", if any { ", 5 bytes" } else { "" });
        for access in accesses {
            match access {
                Some(access) => {
                    let [time] = guest.times([access], TURNS)?.map(median);
                    let _ = write!(text, " {time:.2} |");
                }
                None => text.push_str(" |"),
            }
        }
        text.push('\n');
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use umbra_skip::need;

    use super::*;

    #[test]
    fn what_is_poisoned_does_not_pass() {
        let kernel = need!(umbra::kernel::test_kernel().ok_or("built without the test kernel"));
        let kvm = need!(Kvm::open());
        let run = |last, offset, full| {
            let mut guest = Guest::new(&kvm, kernel, SMALL, last).unwrap();
            let check = guest.check("load4", full).unwrap();
            let base = BYTES + SMALL - GRANULE + offset;
            guest.run(Access { check, base, set: GRANULE, step: STAY, size: 4 }, 3)
        };
        for full in [false, true] {
            assert!(run(VALID, 0, full).is_ok() && run(0, 4, full).is_ok());
            assert!(run(VALID, 4, full).is_err() && run(0xfc, 0, full).is_err());
        }
    }
}
