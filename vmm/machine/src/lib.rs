//! A plain KVM machine: RAM, vCPUs, a kernel loader, and the few devices that a kernel needs. It
//! knows nothing of shadow memory.

#![warn(clippy::missing_errors_doc)]

mod acpi;
pub mod complete;
pub mod cpuid;
pub mod devices;
pub mod ioctls;
mod irqchip;
pub mod kick;
pub mod layout;
pub mod loader;
pub mod memory;
mod mptable;
pub mod probe;
mod rtc;
pub mod stats;
#[cfg(test)]
mod tests;
pub mod vcpu;
mod vm;
pub mod walk;

use std::ffi::CString;
use std::io;
use std::path::Path;
use std::sync::Arc;

use kvm_bindings::{
    CpuId, KVM_API_VERSION, KVM_CAP_EXIT_ON_EMULATION_FAILURE, KVM_MAX_CPUID_ENTRIES,
    KVM_SYNC_X86_EVENTS, KVM_SYNC_X86_REGS, KVM_SYNC_X86_SREGS, kvm_enable_cap,
};
use kvm_ioctls::{Cap, IoEventAddress, NoDatamatch};
use thiserror::Error;
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

use cpuid::{CpuidError, CpuidLeaf};
use loader::{Boot, LoadError, LoadedKernel, StartState};
use memory::{MemoryError, Ram};
use vcpu::{Vcpu, VcpuError};
use vm::Vm;
pub use vm::{MapError, MemslotId};

const DEVICE: &str = "/dev/kvm";

/// Why KVM cannot be used, or a machine cannot be made.
#[derive(Debug, Error)]
#[allow(missing_docs)]
pub enum MachineError {
    #[error(
        "{0} does not exist: load the module kvm_intel or kvm_amd, or allow virtualisation in the \
         firmware"
    )]
    NoDevice(String),
    #[error(
        "no permission to open {0}: add yourself to group kvm (sudo usermod -aG kvm $USER) and log \
         in again"
    )]
    NoPermission(String),
    #[error("cannot open {path}: {source}")]
    Open { path: String, source: io::Error },
    #[error("{0} is not KVM")]
    NotKvm(String),
    #[error("the host's KVM API has version {0}, {KVM_API_VERSION} is needed")]
    ApiVersion(i32),
    #[error("the host's KVM lacks the capability {0}: a newer host kernel is needed")]
    Capability(&'static str),
    #[error("a machine with {cpus} CPUs: 1 to {max} are possible here")]
    Cpus { cpus: u8, max: usize },
    #[error("a machine with {0} CPUs needs interrupt controllers, and they are off")]
    NoIrqchip(u8),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Map(#[from] MapError),
    #[error(transparent)]
    Cpuid(#[from] CpuidError),
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    #[error("KVM refused to {operation}: {source}")]
    Kvm { operation: &'static str, source: io::Error },
}

fn refused(operation: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> MachineError {
    move |e| MachineError::Kvm { operation, source: e.into() }
}

/// An open `/dev/kvm` that has what a machine needs.
#[derive(Debug)]
pub struct Kvm {
    fd: kvm_ioctls::Kvm,
    sync_regs: bool,
    emulation_exits: bool,
    /// The local APIC's timer has a mode in which it waits for a value of the time-stamp counter.
    tsc_deadline: bool,
}

impl Kvm {
    /// Opens `/dev/kvm`.
    ///
    /// # Errors
    /// There is no such device, no permission to open it, or it lacks what a machine needs.
    pub fn open() -> Result<Self, MachineError> {
        Self::open_path(Path::new(DEVICE))
    }

    /// Opens a KVM device elsewhere.
    ///
    /// # Errors
    /// As for [`Kvm::open`].
    pub fn open_path(path: &Path) -> Result<Self, MachineError> {
        let name = path.display().to_string();
        let Ok(c_path) = CString::new(path.as_os_str().as_encoded_bytes()) else {
            return Err(MachineError::NoDevice(name));
        };
        let fd = kvm_ioctls::Kvm::new_with_path(&c_path).map_err(|e| match e.errno() {
            libc::ENOENT | libc::ENODEV | libc::ENXIO => MachineError::NoDevice(name.clone()),
            libc::EACCES | libc::EPERM => MachineError::NoPermission(name.clone()),
            _ => MachineError::Open { path: name.clone(), source: e.into() },
        })?;
        match fd.get_api_version() {
            version if version == KVM_API_VERSION as i32 => {}
            version if version < 0 => return Err(MachineError::NotKvm(name)),
            version => return Err(MachineError::ApiVersion(version)),
        }
        for (cap, name) in [
            (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
            (Cap::ReadonlyMem, "KVM_CAP_READONLY_MEM"),
            (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
            (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
            (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
        ] {
            if !fd.check_extension(cap) {
                return Err(MachineError::Capability(name));
            }
        }
        const SYNC: i32 = (KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS | KVM_SYNC_X86_EVENTS) as i32;
        let sync_regs = fd.check_extension_int(Cap::SyncRegs) & SYNC == SYNC;
        let emulation_exits = fd.check_extension_raw(KVM_CAP_EXIT_ON_EMULATION_FAILURE.into()) > 0;
        let tsc_deadline = fd.check_extension(Cap::TscDeadlineTimer);
        Ok(Self { fd, sync_regs, emulation_exits, tsc_deadline })
    }

    /// Whether registers are read and written without system calls.
    pub fn has_sync_regs(&self) -> bool {
        self.sync_regs
    }
}

/// The configuration of a machine.
#[derive(Clone, Debug)]
pub struct MachineConfig {
    /// Bytes of RAM, a multiple of 4096 from [`layout::MIN_MEMORY`] to [`layout::MAX_MEMORY`].
    pub memory_bytes: u64,
    /// The number of vCPUs, 1 to [`layout::MAX_CPUS`]. More than one need `irqchip`.
    pub cpus: u8,
    /// CPUID leaves beside KVM's own.
    pub extra_cpuid: Vec<CpuidLeaf>,
    /// KVM's interrupt controllers and timers, and an MP table and ACPI tables that describe them.
    /// Without them `hlt` is an exit; with them it waits for an interrupt in the kernel.
    pub irqchip: bool,
}

impl Default for MachineConfig {
    fn default() -> Self {
        Self { memory_bytes: 0, cpus: 1, extra_cpuid: Vec::new(), irqchip: false }
    }
}

/// A machine with RAM and, once loaded, a kernel. Its vCPUs keep it alive.
#[derive(Debug)]
pub struct Machine {
    vm: Arc<Vm>,
    supported: CpuId,
    config: MachineConfig,
    sync_regs: bool,
    kernel: Option<LoadedKernel>,
}

impl Machine {
    /// Makes a machine without vCPUs.
    ///
    /// # Errors
    /// The memory or the number of vCPUs is out of range, several vCPUs have no interrupt
    /// controllers, or the host refuses a step.
    pub fn new(kvm: &Kvm, config: MachineConfig) -> Result<Self, MachineError> {
        let max = kvm.fd.get_max_vcpus().min(layout::MAX_CPUS.into());
        if config.cpus == 0 || usize::from(config.cpus) > max {
            return Err(MachineError::Cpus { cpus: config.cpus, max });
        }
        if config.cpus > 1 && !config.irqchip {
            return Err(MachineError::NoIrqchip(config.cpus));
        }
        let ram = Ram::new(config.memory_bytes)?;
        let mut supported =
            kvm.fd.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(refused("tell its CPUID"))?;
        if kvm.tsc_deadline {
            cpuid::add_tsc_deadline(&mut supported);
        }
        let fd = kvm.fd.create_vm().map_err(refused("create a VM"))?;
        fd.set_tss_address(layout::KVM_TSS as usize).map_err(refused("set the TSS address"))?;
        if kvm.emulation_exits {
            // Instructions of ring 3 that KVM cannot emulate are exits, too, and not a #UD in the
            // guest.
            let cap = kvm_enable_cap {
                cap: KVM_CAP_EXIT_ON_EMULATION_FAILURE,
                args: [1, 0, 0, 0],
                ..Default::default()
            };
            fd.enable_cap(&cap).map_err(refused("exit on emulation failures"))?;
        }
        if config.irqchip {
            irqchip::create(&fd)?;
        }
        kick::install_handler().map_err(|source| MachineError::Kvm {
            operation: "install a signal handler",
            source,
        })?;
        let vm = Arc::new(Vm::new(fd, ram, kvm.fd.get_nr_memslots())?);
        Ok(Self { vm, supported, config, sync_regs: kvm.sync_regs, kernel: None })
    }

    /// The machine's RAM.
    pub fn ram(&self) -> &Ram {
        self.vm.ram()
    }

    /// Loads a kernel with its initrd and command line. The vCPU 0 created next starts there.
    ///
    /// # Errors
    /// A file is not what it should be, or does not fit into RAM.
    pub fn load(&mut self, boot: &Boot) -> Result<LoadedKernel, LoadError> {
        let kernel = loader::load(self.ram(), boot)?;
        if self.config.irqchip {
            mptable::write(self.ram(), self.config.cpus, &self.supported)?;
            let root = acpi::write(self.ram(), self.config.cpus)?;
            loader::tell_acpi_root(self.ram(), kernel.state, root)?;
        }
        self.kernel = Some(kernel);
        Ok(kernel)
    }

    /// Creates a vCPU. Number 0 starts at the loaded kernel's entry. The others, up to the
    /// configured number less one, wait in [`Vcpu::run`] until the guest starts them through its
    /// local APIC (INIT, then SIPI).
    ///
    /// # Errors
    /// There are no vCPUs of this number, the CPUID leaves do not fit, or KVM refuses.
    pub fn create_vcpu(&self, id: u8) -> Result<Vcpu, MachineError> {
        if id >= self.config.cpus {
            return Err(MachineError::Cpus {
                cpus: id.saturating_add(1),
                max: self.config.cpus.into(),
            });
        }
        let fd = self.vm.fd().create_vcpu(u64::from(id)).map_err(refused("create a vCPU"))?;
        let place = cpuid::CpuTopology { id, cpus: self.config.cpus };
        let wanted =
            cpuid::table(&self.supported, &self.config.extra_cpuid, self.config.irqchip, place)?;
        fd.set_cpuid2(&wanted).map_err(refused("set CPUID"))?;
        // Only once: the other vCPUs differ in their number only, and probe guests have no kernel.
        if id == 0
            && self.kernel.is_some()
            && log::log_enabled!(log::Level::Info)
            && let Ok(got) = fd.get_cpuid2(KVM_MAX_CPUID_ENTRIES)
        {
            let differences = cpuid::differences(&wanted, &got);
            if !differences.is_empty() {
                log::info!(
                    "the host's KVM did not take all CPUID bits as set: {}",
                    differences.join(", ")
                );
            }
        }
        let mut vcpu = Vcpu::new(fd, id, self.sync_regs, self.vm.clone());
        if let (0, Some(kernel)) = (id, self.kernel) {
            match kernel.state {
                StartState::Linux64 => vcpu.set_boot_state(kernel.entry)?,
                StartState::Pvh => vcpu.set_pvh_state(kernel.entry)?,
            }
        }
        Ok(vcpu)
    }

    /// Creates all vCPUs, in the order of their numbers, as firmware leaves them: the local APIC of
    /// the first one is enabled.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn create_vcpus(&self) -> Result<Vec<Vcpu>, MachineError> {
        let ids = 0..self.config.cpus;
        let mut vcpus = ids.map(|id| self.create_vcpu(id)).collect::<Result<Vec<_>, _>>()?;
        // Only now: KVM finds a new vCPU by its APIC id after the next change of any APIC's state,
        // and a guest whose APIC is on already may start the others without one.
        if let (true, Some(first)) = (self.config.irqchip, vcpus.first_mut()) {
            first.enable_local_apic()?;
        }
        Ok(vcpus)
    }

    /// Maps host memory into the guest as a memslot. A guest write to a `readonly` one is a
    /// [`vcpu::VmExit::MmioWrite`].
    ///
    /// # Errors
    /// An argument is not a multiple of 4096, all memslots are in use, or KVM refuses.
    ///
    /// # Safety
    /// The `len` bytes at `host` are mapped, the guest may write them at any time (unless
    /// `readonly`), and both hold until [`Machine::unmap`], or until the machine and all its vCPUs
    /// are dropped.
    pub unsafe fn map(
        &self,
        gpa: GuestAddress,
        host: *mut u8,
        len: u64,
        readonly: bool,
    ) -> Result<MemslotId, MapError> {
        // SAFETY: the same promise.
        unsafe { self.vm.map(gpa, host, len, readonly) }
    }

    /// Makes the guest's writes to a port signal `event` instead of being exits.
    ///
    /// # Errors
    /// KVM refuses; then they are exits.
    pub fn signal_on_write(&self, port: u16, event: &EventFd) -> Result<(), MachineError> {
        let port = IoEventAddress::Pio(port.into());
        let registered = self.vm.fd().register_ioevent(event, &port, NoDatamatch);
        registered.map_err(refused("signal an event"))
    }

    /// Removes a memslot. Its number is used again.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn unmap(&self, memslot: MemslotId) -> Result<(), MapError> {
        self.vm.unmap(memslot)
    }

    /// A line of the interrupt controller; `None` when the machine has none.
    pub fn irq_line(&self, irq: u32) -> Option<IrqLine> {
        self.config.irqchip.then(|| IrqLine { vm: self.vm.clone(), irq })
    }
}

/// One input of the interrupt controller.
#[derive(Clone, Debug)]
pub struct IrqLine {
    vm: Arc<Vm>,
    irq: u32,
}

impl IrqLine {
    /// Raises the line and lowers it again.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn pulse(&self) -> io::Result<()> {
        self.vm.fd().set_irq_line(self.irq, true)?;
        Ok(self.vm.fd().set_irq_line(self.irq, false)?)
    }
}
