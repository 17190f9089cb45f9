//! KVM's own counters of a vCPU, and their meaning on this host.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::FromRawFd;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

use thiserror::Error;
use vm_memory::GuestAddress;
use vmm_sys_util::ioctl::ioctl;

use super::vcpu::{Vcpu, VcpuError, VmExit};
use super::{Kvm, Machine, MachineConfig, MachineError, layout, loader};

mod nr {
    //! The macro makes a public function, hence the module.
    #![allow(missing_docs)]
    vmm_sys_util::ioctl_io_nr!(KVM_GET_STATS_FD, kvm_bindings::KVMIO, 0xce);
}

/// Most counters of one vCPU that are read; KVM has about 60.
const MAX_COUNTERS: u32 = 4096;
const HEADER_BYTES: usize = 24;
const DESCRIPTOR_BYTES: usize = 16;

/// Why there are no counters.
#[derive(Debug, Error)]
#[allow(missing_docs)]
pub enum StatsError {
    #[error("the host's KVM gives no statistics of a vCPU: {0}")]
    Unavailable(io::Error),
    #[error("cannot read the vCPU's statistics: {0}")]
    Read(io::Error),
    #[error("the vCPU's statistics have an unknown form ({0})")]
    Format(&'static str),
    #[error(transparent)]
    Machine(#[from] MachineError),
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    #[error("the probe guest ended with {0:?}")]
    Probe(VmExit),
}

/// The counters of one vCPU, by name.
#[derive(Debug)]
pub struct VcpuStats {
    file: File,
    /// Offset of each counter's value in the file.
    offsets: BTreeMap<String, u64>,
}

impl VcpuStats {
    /// Finds out which counters KVM has for `vcpu`.
    ///
    /// # Errors
    /// KVM has no statistics, or they cannot be read.
    pub fn open(vcpu: &Vcpu) -> Result<Self, StatsError> {
        // SAFETY: the ioctl takes no argument, and its result is checked.
        let fd = unsafe { ioctl(vcpu, nr::KVM_GET_STATS_FD()) };
        if fd < 0 {
            return Err(StatsError::Unavailable(io::Error::last_os_error()));
        }
        // SAFETY: a new descriptor from KVM, which nobody else has.
        let file = unsafe { File::from_raw_fd(fd) };
        let mut header = [0; HEADER_BYTES];
        file.read_exact_at(&mut header, 0).map_err(StatsError::Read)?;
        let field = |at: usize| u32_at(&header, at);
        let (name_bytes, count, descriptors, data) = (field(4), field(8), field(16), field(20));
        if count > MAX_COUNTERS || name_bytes == 0 || name_bytes > 4096 {
            return Err(StatsError::Format("header"));
        }
        let each = DESCRIPTOR_BYTES + name_bytes as usize;
        let mut table = vec![0; each * count as usize];
        file.read_exact_at(&mut table, u64::from(descriptors)).map_err(StatsError::Read)?;
        let offsets = table
            .chunks_exact(each)
            .map(|d| {
                let name = d[DESCRIPTOR_BYTES..].split(|b| *b == 0).next().unwrap_or_default();
                (
                    String::from_utf8_lossy(name).into_owned(),
                    u64::from(data) + u64::from(u32_at(d, 8)),
                )
            })
            .collect();
        Ok(Self { file, offsets })
    }

    /// The current value of a counter; `None` if KVM has none with that name.
    pub fn get(&self, name: &str) -> Option<u64> {
        let mut value = [0; 8];
        self.file.read_exact_at(&mut value, *self.offsets.get(name)?).ok()?;
        Some(u64::from_le_bytes(value))
    }

    /// Instructions that KVM emulated.
    pub fn instructions_emulated(&self) -> Option<u64> {
        self.get("insn_emulation")
    }

    /// How often the vCPU left guest mode, to KVM or further.
    pub fn exits(&self) -> Option<u64> {
        self.get("exits")
    }

    /// The names of all counters.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.offsets.keys().map(String::as_str)
    }
}

/// The counters of all vCPUs of a machine.
#[derive(Debug)]
pub struct Counters(Vec<VcpuStats>);

impl Counters {
    /// Finds out which counters KVM has for `vcpus`.
    ///
    /// # Errors
    /// As for [`VcpuStats::open`].
    pub fn open(vcpus: &[Vcpu]) -> Result<Self, StatsError> {
        vcpus.iter().map(VcpuStats::open).collect::<Result<_, _>>().map(Self)
    }

    /// Instructions that KVM emulated, on all of them.
    pub fn instructions_emulated(&self) -> Option<u64> {
        self.0.iter().map(VcpuStats::instructions_emulated).sum()
    }

    /// How often they left guest mode, to KVM or further.
    pub fn exits(&self) -> Option<u64> {
        self.0.iter().map(VcpuStats::exits).sum()
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).map_or(0, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
}

/// Whether this host emulates ring 0 instruction by instruction, so that
/// [`VcpuStats::instructions_emulated`] counts a kernel's instructions. A guest with a known number
/// of instructions shows it.
///
/// # Errors
/// KVM refuses the probe's machine, or has no statistics.
pub fn emulates_ring0(kvm: &Kvm) -> Result<bool, StatsError> {
    const ROUNDS: u32 = 1000;
    // mov ecx, ROUNDS; 1: dec ecx; jnz 1b; out 0x80, al
    let mut code = vec![0xb9];
    code.extend_from_slice(&ROUNDS.to_le_bytes());
    code.extend_from_slice(&[0xff, 0xc9, 0x75, 0xfc, 0xe6, 0x80]);
    let (_machine, mut vcpu) = raw_guest(kvm, &code)?;
    let stats = VcpuStats::open(&vcpu)?;
    let Some(before) = stats.instructions_emulated() else { return Ok(false) };
    loop {
        match vcpu.run()? {
            VmExit::Interrupted => {}
            VmExit::IoOut { port: 0x80, .. } => break,
            other => return Err(StatsError::Probe(other)),
        }
    }
    let counted = stats.instructions_emulated().unwrap_or(before).wrapping_sub(before);
    Ok(counted >= u64::from(2 * ROUNDS))
}

/// The frequency of a guest's time-stamp counter, in kHz.
///
/// # Errors
/// KVM refuses the probe's machine.
pub fn tsc_khz(kvm: &Kvm) -> Result<u32, StatsError> {
    let (_machine, vcpu) = raw_guest(kvm, &[])?;
    Ok(vcpu.tsc_khz()?)
}

/// Whether the time stamp counters of this host's CPUs are in step: its kernel checks them as long
/// as it uses them itself. The first call looks; a jail may forbid that later.
pub fn time_stamps_are_in_step() -> bool {
    const CLOCK: &str = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
    static ARE: OnceLock<bool> = OnceLock::new();
    *ARE.get_or_init(|| std::fs::read(CLOCK).is_ok_and(|name| name.trim_ascii_end() == b"tsc"))
}

/// The host's own time stamp counter.
pub fn time_stamp() -> u64 {
    // SAFETY: every x86-64 CPU has it, and Linux lets programs read it unless one asks for a trap.
    unsafe { std::arch::x86_64::_rdtsc() }
}

/// A small machine whose vCPU 0 is about to execute `code` at [`layout::KERNEL_START`] in the boot
/// state.
pub(super) fn raw_guest(kvm: &Kvm, code: &[u8]) -> Result<(Machine, Vcpu), MachineError> {
    let refused = |e: super::memory::NotRam| MachineError::Kvm {
        operation: "hold a probe guest",
        source: io::Error::other(e),
    };
    let machine = Machine::new(
        kvm,
        MachineConfig { memory_bytes: layout::MIN_MEMORY, ..Default::default() },
    )?;
    loader::write_boot_tables(machine.ram()).map_err(refused)?;
    machine.ram().write(GuestAddress(layout::KERNEL_START), code).map_err(refused)?;
    let mut vcpu = machine.create_vcpu(0)?;
    vcpu.set_boot_state(GuestAddress(layout::KERNEL_START))?;
    Ok((machine, vcpu))
}
