//! A virtual CPU: runs the guest until an exit, and gives access to its registers.

mod apic;
mod extended;
mod halt;

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use kvm_bindings::{
    KVM_EXIT_IO, KVM_EXIT_IO_IN, KVM_INTERNAL_ERROR_EMULATION,
    KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES, KVM_RUN_X86_SMM, Msrs, kvm_fpu,
    kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs,
};
use kvm_ioctls::{SyncReg, VcpuExit, VcpuFd};
use thiserror::Error;
use vm_memory::GuestAddress;

pub use extended::XsaveArea;

use super::kick::{KickState, Kicker, Running};
use super::layout;
use super::loader::{GDT, GDT_PVH};
use super::vm::Vm;

/// Longest x86 instruction, in bytes.
pub const MAX_INSTRUCTION: usize = 15;

/// A vCPU operation that KVM refused.
#[derive(Debug, Error)]
#[allow(missing_docs)]
pub enum VcpuError {
    #[error("KVM refused {operation} on vCPU {id}: {source}")]
    Kvm { operation: &'static str, id: u8, source: io::Error },
    #[error("the guest touched memory that the host cannot read or write (vCPU {id})")]
    HostMemory { id: u8 },
    #[error("KVM has no model-specific register {index:#x}")]
    NoMsr { index: u32 },
}

/// The bytes of an access, up to 8.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Data {
    bytes: [u8; 8],
    len: u8,
}

impl Data {
    /// The first 8 bytes of `bytes`.
    pub fn new(bytes: &[u8]) -> Self {
        let len = bytes.len().min(8);
        let mut copy = [0; 8];
        copy[..len].copy_from_slice(&bytes[..len]);
        Self { bytes: copy, len: len as u8 }
    }

    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }

    /// The bytes as a little-endian number.
    pub fn value(&self) -> u64 {
        u64::from_le_bytes(self.bytes)
    }
}

impl std::fmt::Debug for Data {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:02x?}", self.as_slice())
    }
}

/// Why the guest stopped.
///
/// After [`VmExit::IoIn`] and [`VmExit::MmioRead`] the caller passes the value to
/// [`Vcpu::complete_read`]; otherwise the guest reads zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VmExit {
    /// The guest reads `len` bytes (1, 2 or 4) from a port.
    IoIn {
        /// The port.
        port: u16,
        /// Bytes wanted.
        len: u8,
    },
    /// The guest writes to a port. `rip` is at the instruction or after it, depending on the host.
    IoOut {
        /// The port.
        port: u16,
        /// 1, 2 or 4 bytes.
        data: Data,
    },
    /// The guest reads memory that has no memslot.
    MmioRead {
        /// Where.
        gpa: GuestAddress,
        /// Bytes wanted, 1 to 8.
        len: u8,
    },
    /// The guest writes memory that has no memslot, or a read-only one. The write has no effect but
    /// this exit.
    MmioWrite {
        /// Where.
        gpa: GuestAddress,
        /// 1 to 8 bytes.
        data: Data,
    },
    /// The guest touched memory whose backing is missing; the access runs again on the next
    /// [`Vcpu::run`].
    MemoryFault {
        /// Start of the range.
        gpa: GuestAddress,
        /// Its bytes.
        size: u64,
        /// KVM's flags.
        flags: u64,
    },
    /// `hlt`.
    Hlt,
    /// A triple fault.
    Shutdown,
    /// KVM reports reset, shutdown or crash.
    SystemEvent {
        /// `KVM_SYSTEM_EVENT_*`.
        kind: u32,
    },
    /// KVM's emulator does not know the instruction at `rip`.
    EmulationFailed {
        /// The instruction and what follows it.
        bytes: [u8; MAX_INSTRUCTION],
        /// The number of valid `bytes`. 0: KVM gave none.
        len: u8,
    },
    /// A kick, another signal, or the start of a vCPU that waited for it; there is nothing to
    /// handle.
    Interrupted,
    /// The guest lowered its task priority (`cr8`) on a machine without interrupt controllers.
    /// Nothing waits for it there: KVM has the new value, and the guest goes on.
    TaskPriority,
    /// KVM's emulator stopped in system management mode, for which this machine has no memory: what
    /// the guest's RAM holds at `rip` is not what the CPU would execute.
    SystemManagement,
    /// The vCPU cannot go on: the guest's state is not valid for the hardware.
    FailEntry {
        /// The hardware's reason.
        reason: u64,
    },
    /// An internal error of KVM.
    InternalError {
        /// `KVM_INTERNAL_ERROR_*`.
        suberror: u32,
    },
    /// An exit that this machine does not use.
    Unsupported {
        /// `KVM_EXIT_*`.
        reason: u32,
    },
}

/// A port access that is not finished: `ins` and `outs` exit once for many items, and `run` hands
/// them out one by one.
#[derive(Clone, Copy, Debug)]
struct PortAccess {
    port: u16,
    size: u8,
    count: u32,
    next: u32,
    input: bool,
    /// Of the data, from the start of `kvm_run`.
    offset: u64,
}

/// The destination of a read's value.
#[derive(Clone, Copy, Debug)]
enum PendingRead {
    None,
    Port { offset: u64, len: u8 },
    Mmio { len: u8 },
}

/// A virtual CPU.
#[derive(Debug)]
pub struct Vcpu {
    fd: VcpuFd,
    id: u8,
    run_bytes: usize,
    /// Registers are read and written through `kvm_run`.
    sync_regs: bool,
    /// `kvm_run` holds the registers (only after the first run).
    synced: bool,
    port: Option<PortAccess>,
    read: PendingRead,
    kick: Arc<KickState>,
    /// Guest memory must outlive the vCPU. Last: dropped after `fd`.
    vm: Arc<Vm>,
}

impl Vcpu {
    pub(super) fn new(mut fd: VcpuFd, id: u8, sync_regs: bool, vm: Arc<Vm>) -> Self {
        if sync_regs {
            fd.set_sync_valid_reg(SyncReg::Register);
            // Many exits read stacks through cr3; this costs far less than an ioctl for each.
            fd.set_sync_valid_reg(SyncReg::SystemRegister);
            // Completed instructions raise exceptions.
            fd.set_sync_valid_reg(SyncReg::VcpuEvents);
        }
        Self {
            run_bytes: vm.fd().run_size(),
            fd,
            id,
            sync_regs,
            synced: false,
            port: None,
            read: PendingRead::None,
            kick: Arc::default(),
            vm,
        }
    }

    /// The vCPU's number.
    pub fn id(&self) -> u8 {
        self.id
    }

    /// A handle for other threads to get this vCPU out of the guest.
    pub fn kicker(&self) -> Kicker {
        Kicker(self.kick.clone())
    }

    fn error(&self, operation: &'static str, e: impl Into<io::Error>) -> VcpuError {
        VcpuError::Kvm { operation, id: self.id, source: e.into() }
    }

    /// Runs the guest until its next exit.
    ///
    /// # Errors
    /// KVM refuses, or the guest touched memory that the host cannot read or write.
    pub fn run(&mut self) -> Result<VmExit, VcpuError> {
        if let Some(exit) = self.next_port_item() {
            return Ok(exit);
        }
        let immediate_exit = &raw mut self.fd.get_kvm_run().immediate_exit;
        let running = Running::start(&self.kick, immediate_exit);
        if self.kick.take() {
            drop(running);
            self.fd.set_kvm_immediate_exit(0);
            return Ok(VmExit::Interrupted);
        }
        self.read = PendingRead::None;
        let result = self.fd.run().map(Raw::from);
        drop(running);
        let run = self.fd.get_kvm_run();
        run.immediate_exit = 0;
        if self.sync_regs {
            run.kvm_dirty_regs = 0;
            self.synced = true;
        }
        match result {
            Ok(raw) => Ok(self.decode(raw)),
            Err(e) => match e.errno() {
                libc::EINTR => {
                    self.kick.take();
                    Ok(VmExit::Interrupted)
                }
                // A vCPU that waited to be started is now: KVM wants to be asked again.
                libc::EAGAIN => Ok(VmExit::Interrupted),
                libc::EFAULT => Err(VcpuError::HostMemory { id: self.id }),
                _ => Err(self.error("KVM_RUN", e)),
            },
        }
    }

    fn decode(&mut self, raw: Raw) -> VmExit {
        match raw {
            Raw::Done(exit) => exit,
            Raw::MmioRead(gpa, len) => {
                self.read = PendingRead::Mmio { len };
                self.complete_read(&[]);
                VmExit::MmioRead { gpa, len }
            }
            Raw::Port => {
                // SAFETY: KVM says that this is a port access, so `io` is the union's member.
                let io = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.io };
                self.port = Some(PortAccess {
                    port: io.port,
                    size: io.size,
                    count: io.count,
                    next: 0,
                    input: u32::from(io.direction) == KVM_EXIT_IO_IN,
                    offset: io.data_offset,
                });
                self.next_port_item().unwrap_or(VmExit::Unsupported { reason: KVM_EXIT_IO })
            }
            Raw::Other => VmExit::Unsupported { reason: self.fd.get_kvm_run().exit_reason },
            Raw::Internal => {
                // SAFETY: KVM says that this is an internal error; all its variants start with
                // `suberror`.
                let internal = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.internal };
                if internal.suberror != KVM_INTERNAL_ERROR_EMULATION {
                    return VmExit::InternalError { suberror: internal.suberror };
                }
                if u32::from(self.fd.get_kvm_run().flags) & KVM_RUN_X86_SMM != 0 {
                    return VmExit::SystemManagement;
                }
                // SAFETY: with this suberror the member is `emulation_failure`; every bit pattern
                // is valid.
                let failure = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.emulation_failure };
                let with_bytes = failure.ndata >= 3
                    && failure.flags
                        & u64::from(KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES)
                        != 0;
                // SAFETY: plain bytes.
                let instruction = unsafe { failure.__bindgen_anon_1.__bindgen_anon_1 };
                let len =
                    if with_bytes { instruction.insn_size.min(MAX_INSTRUCTION as u8) } else { 0 };
                VmExit::EmulationFailed { bytes: instruction.insn_bytes, len }
            }
        }
    }

    /// The next item of an unfinished port access, as an exit.
    fn next_port_item(&mut self) -> Option<VmExit> {
        let access = self.port.as_mut()?;
        if access.next >= access.count || access.size > 8 {
            self.port = None;
            return None;
        }
        let (port, len) = (access.port, access.size);
        let offset = access.offset + u64::from(access.next) * u64::from(len);
        access.next += 1;
        if access.input {
            self.read = PendingRead::Port { offset, len };
            self.complete_read(&[]);
            Some(VmExit::IoIn { port, len })
        } else {
            let data = self.run_area(offset, len).map_or(Data::new(&[]), |bytes| Data::new(bytes));
            Some(VmExit::IoOut { port, data })
        }
    }

    /// `len` bytes at `offset` of the mapping that starts with `kvm_run`.
    fn run_area(&mut self, offset: u64, len: u8) -> Option<&mut [u8]> {
        let end = offset.checked_add(u64::from(len))?;
        if end > self.run_bytes as u64 {
            return None;
        }
        let start = (&raw mut *self.fd.get_kvm_run()).cast::<u8>();
        // SAFETY: kvm-ioctls maps `run_bytes` from `start` on for as long as `fd` lives, the range
        // lies within, and nothing else uses it while `self` is borrowed.
        Some(unsafe {
            std::slice::from_raw_parts_mut(start.add(offset as usize), usize::from(len))
        })
    }

    /// Sets the value of a read, after [`VmExit::IoIn`] or [`VmExit::MmioRead`]. Missing bytes are
    /// zero, those beyond its length are dropped. Does nothing after any other exit.
    pub fn complete_read(&mut self, value: &[u8]) {
        let (to, len) = match self.read {
            PendingRead::None => return,
            PendingRead::Port { offset, len } => (self.run_area(offset, len), len),
            PendingRead::Mmio { len } => {
                // SAFETY: `read` shows that the last exit was MMIO.
                let mmio = unsafe { &mut self.fd.get_kvm_run().__bindgen_anon_1.mmio };
                (mmio.data.get_mut(..usize::from(len)), len)
            }
        };
        if let Some(to) = to {
            let copied = value.len().min(usize::from(len));
            to[..copied].copy_from_slice(&value[..copied]);
            to[copied..].fill(0);
        }
    }

    /// The general registers, `rip` and `rflags`.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn regs(&self) -> Result<kvm_regs, VcpuError> {
        if self.synced {
            return Ok(self.fd.sync_regs().regs);
        }
        self.fd.get_regs().map_err(|e| self.error("KVM_GET_REGS", e))
    }

    /// Sets the general registers, `rip` and `rflags`.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn set_regs(&mut self, regs: &kvm_regs) -> Result<(), VcpuError> {
        if self.synced {
            self.fd.sync_regs_mut().regs = *regs;
            self.fd.set_sync_dirty_reg(SyncReg::Register);
            return Ok(());
        }
        self.fd.set_regs(regs).map_err(|e| self.error("KVM_SET_REGS", e))
    }

    /// Control, segment and table registers.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn sregs(&self) -> Result<kvm_sregs, VcpuError> {
        if self.synced {
            return Ok(self.fd.sync_regs().sregs);
        }
        self.fd.get_sregs().map_err(|e| self.error("KVM_GET_SREGS", e))
    }

    /// Sets control, segment and table registers.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn set_sregs(&mut self, sregs: &kvm_sregs) -> Result<(), VcpuError> {
        // Not through the shared page: KVM would report a refusal only at the next run.
        self.fd.set_sregs(sregs).map_err(|e| self.error("KVM_SET_SREGS", e))?;
        if self.synced {
            self.fd.sync_regs_mut().sregs = *sregs;
        }
        Ok(())
    }

    /// The frequency of the guest's time-stamp counter, in kHz.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn tsc_khz(&self) -> Result<u32, VcpuError> {
        self.fd.get_tsc_khz().map_err(|e| self.error("KVM_GET_TSC_KHZ", e))
    }

    /// A model-specific register.
    ///
    /// # Errors
    /// KVM does not have the register.
    pub fn msr(&self, index: u32) -> Result<u64, VcpuError> {
        let mut msrs = one_msr(index, 0)?;
        match self.fd.get_msrs(&mut msrs) {
            Ok(1) => Ok(msrs.as_slice()[0].data),
            Ok(_) => Err(VcpuError::NoMsr { index }),
            Err(e) => Err(self.error("KVM_GET_MSRS", e)),
        }
    }

    /// Sets a model-specific register.
    ///
    /// # Errors
    /// KVM does not have the register, or refuses the value.
    pub fn set_msr(&mut self, index: u32, value: u64) -> Result<(), VcpuError> {
        match self.fd.set_msrs(&one_msr(index, value)?) {
            Ok(1) => Ok(()),
            Ok(_) => Err(VcpuError::NoMsr { index }),
            Err(e) => Err(self.error("KVM_SET_MSRS", e)),
        }
    }

    /// Puts the vCPU into the start state of the Linux 64-bit boot protocol: long mode, the first 4
    /// GiB mapped one to one, flat segments, interrupts off, `rsi` at `boot_params`. The tables
    /// must be in RAM ([`super::loader::load`] writes them).
    ///
    /// # Errors
    /// KVM refuses.
    pub fn set_boot_state(&mut self, entry: GuestAddress) -> Result<(), VcpuError> {
        let mut sregs = self.sregs()?;
        let flat = kvm_segment { limit: 0xffff_ffff, present: 1, s: 1, g: 1, ..Default::default() };
        sregs.cs = kvm_segment { selector: 0x10, type_: 0xb, l: 1, ..flat };
        let data = kvm_segment { selector: 0x18, type_: 3, db: 1, ..flat };
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        sregs.tr = kvm_segment { limit: 0x67, type_: 0xb, present: 1, ..Default::default() };
        sregs.ldt = kvm_segment { unusable: 1, ..Default::default() };
        sregs.gdt.base = layout::GDT;
        sregs.gdt.limit = (8 * GDT.len() - 1) as u16;
        sregs.idt.base = 0;
        sregs.idt.limit = 0;
        sregs.cr0 = 1 << 31 | 1 << 4 | 1; // PG, ET, PE
        sregs.cr3 = layout::BOOT_PML4;
        sregs.cr4 = 1 << 5; // PAE
        sregs.efer = 1 << 10 | 1 << 8; // LMA, LME
        self.set_sregs(&sregs)?;
        self.set_regs(&kvm_regs {
            rip: entry.0,
            rsp: layout::BOOT_STACK,
            rsi: layout::BOOT_PARAMS,
            rflags: 2,
            ..Default::default()
        })?;
        self.set_fpu_state()
    }

    /// Puts the vCPU into the start state of PVH (Xen, docs/misc/pvh.pandoc): 32-bit protected mode
    /// without paging, flat segments, interrupts off, `ebx` at `hvm_start_info`, which is in RAM
    /// like the GDT.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn set_pvh_state(&mut self, entry: GuestAddress) -> Result<(), VcpuError> {
        let mut sregs = self.sregs()?;
        let flat =
            kvm_segment { limit: 0xffff_ffff, present: 1, s: 1, g: 1, db: 1, ..Default::default() };
        sregs.cs = kvm_segment { selector: 0x10, type_: 0xb, ..flat };
        let data = kvm_segment { selector: 0x18, type_: 3, ..flat };
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        sregs.tr = kvm_segment { limit: 0x67, type_: 0xb, present: 1, ..Default::default() };
        sregs.ldt = kvm_segment { unusable: 1, ..Default::default() };
        sregs.gdt.base = layout::GDT;
        sregs.gdt.limit = (8 * GDT_PVH.len() - 1) as u16;
        sregs.idt.base = 0;
        sregs.idt.limit = 0;
        sregs.cr0 = 1 << 4 | 1; // ET, PE
        sregs.cr3 = 0;
        sregs.cr4 = 0;
        sregs.efer = 0;
        self.set_sregs(&sregs)?;
        self.set_regs(&kvm_regs {
            rip: entry.0,
            rbx: layout::BOOT_PARAMS,
            rflags: 2,
            ..Default::default()
        })?;
        self.set_fpu_state()
    }

    /// Sets up the floating-point unit and string instructions, as firmware does.
    fn set_fpu_state(&mut self) -> Result<(), VcpuError> {
        const IA32_MISC_ENABLE: u32 = 0x1a0;
        const FAST_STRINGS: u64 = 1;
        let fpu = kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() };
        self.fd.set_fpu(&fpu).map_err(|e| self.error("KVM_SET_FPU", e))?;
        // Without it Linux thinks that `rep stos` and `rep movs` are slow. Not every host has the
        // register.
        if let Err(e) = self
            .msr(IA32_MISC_ENABLE)
            .and_then(|v| self.set_msr(IA32_MISC_ENABLE, v | FAST_STRINGS))
        {
            log::debug!("fast strings stay off: {e}");
        }
        Ok(())
    }
}

impl AsRawFd for Vcpu {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

fn one_msr(index: u32, data: u64) -> Result<Msrs, VcpuError> {
    Msrs::from_entries(&[kvm_msr_entry { index, data, ..Default::default() }])
        .map_err(|_| VcpuError::NoMsr { index })
}

/// An exit without the borrow of the vCPU. Exits that need more of `kvm_run` are decoded after the
/// borrow.
enum Raw {
    Done(VmExit),
    Port,
    MmioRead(GuestAddress, u8),
    Internal,
    Other,
}

impl From<VcpuExit<'_>> for Raw {
    fn from(exit: VcpuExit<'_>) -> Self {
        Raw::Done(match exit {
            VcpuExit::IoIn(..) | VcpuExit::IoOut(..) => return Raw::Port,
            VcpuExit::MmioRead(gpa, data) => {
                return Raw::MmioRead(GuestAddress(gpa), data.len() as u8);
            }
            VcpuExit::InternalError => return Raw::Internal,
            VcpuExit::MmioWrite(gpa, data) => {
                VmExit::MmioWrite { gpa: GuestAddress(gpa), data: Data::new(data) }
            }
            VcpuExit::MemoryFault { flags, gpa, size } => {
                VmExit::MemoryFault { gpa: GuestAddress(gpa), size, flags }
            }
            VcpuExit::Hlt => VmExit::Hlt,
            VcpuExit::Shutdown => VmExit::Shutdown,
            VcpuExit::SystemEvent(kind, _) => VmExit::SystemEvent { kind },
            VcpuExit::Intr => VmExit::Interrupted,
            VcpuExit::FailEntry(reason, _) => VmExit::FailEntry { reason },
            VcpuExit::SetTpr => VmExit::TaskPriority,
            _ => return Raw::Other,
        })
    }
}
