//! A dispatcher with a CPU, memory and memslots that are not real. Its exits are made by hand.

use kvm_bindings::{kvm_regs, kvm_sregs};
use std::sync::{Arc, Mutex};

use umbra_machine::complete::Cpu;
use umbra_machine::memory::Ram;
use umbra_machine::vcpu::{Data, VcpuError, VmExit, XsaveArea};
use umbra_provenance::objects::DEFAULT_BUDGET;
use umbra_report::Finding;
use umbra_report::symbols::Symbols;
use umbra_shadow::abi::{CallNumber, PORT};
use vm_memory::GuestAddress;

use super::{CPU, RAM};
use crate::sandbox::context::{ExitContext, GuestCpu, OtherVcpus};
use crate::sandbox::counts::{EventStats, ExitStats};
use crate::sandbox::dispatch::Dispatcher;
use crate::sandbox::{Detached, Observer, Outcome};
use crate::shadow::{Layout, MemslotError, Memslots, Mode, Notify};

/// Registers, and what was done to them.
#[derive(Default)]
pub(super) struct FakeCpu {
    pub(super) regs: kvm_regs,
    pub(super) sregs: kvm_sregs,
    pub(super) read: Option<Vec<u8>>,
    pub(super) injected: Vec<u8>,
    /// All register accesses fail.
    pub(super) broken: bool,
}

impl FakeCpu {
    fn check(&self) -> Result<(), VcpuError> {
        if self.broken { Err(VcpuError::HostMemory { id: 0 }) } else { Ok(()) }
    }
}

impl Cpu for FakeCpu {
    fn regs(&self) -> Result<kvm_regs, VcpuError> {
        self.check().map(|()| self.regs)
    }
    fn set_regs(&mut self, regs: &kvm_regs) -> Result<(), VcpuError> {
        self.regs = *regs;
        self.check()
    }
    fn sregs(&self) -> Result<kvm_sregs, VcpuError> {
        self.check().map(|()| self.sregs)
    }
    fn set_sregs(&mut self, sregs: &kvm_sregs) -> Result<(), VcpuError> {
        self.sregs = *sregs;
        self.check()
    }
    fn msr(&self, index: u32) -> Result<u64, VcpuError> {
        Err(VcpuError::NoMsr { index })
    }
    fn set_msr(&mut self, index: u32, _: u64) -> Result<(), VcpuError> {
        Err(VcpuError::NoMsr { index })
    }
    fn xcr0(&self) -> Result<u64, VcpuError> {
        Ok(7)
    }
    fn inject_exception(&mut self, vector: u8, _: Option<u32>) -> Result<(), VcpuError> {
        self.injected.push(vector);
        self.check()
    }
    fn set_xcr0(&mut self, _: u64) -> Result<(), VcpuError> {
        self.check()
    }
    fn xsave(&self) -> Result<Box<XsaveArea>, VcpuError> {
        self.check().map(|()| Box::default())
    }
    fn set_xsave(&mut self, _: &XsaveArea) -> Result<(), VcpuError> {
        self.check()
    }
    fn inject_interrupt(&mut self, vector: u8) -> Result<(), VcpuError> {
        self.injected.push(vector);
        self.check()
    }
    fn inject_single_step(&mut self) -> Result<(), VcpuError> {
        self.check()
    }
    fn end_interrupt_shadow(&mut self) -> Result<(), VcpuError> {
        self.check()
    }
}

impl GuestCpu for FakeCpu {
    fn complete_read(&mut self, value: &[u8]) {
        self.read = Some(value.to_vec());
    }
}

/// The memslots that KVM would have: (gpa, bytes, read-only).
#[derive(Default)]
pub(super) struct FakeMemslots {
    pub(super) memslots: Vec<Option<(u64, u64, bool)>>,
    pub(super) refuse: bool,
}

impl Memslots for FakeMemslots {
    fn map(&mut self, gpa: u64, _: *mut u8, len: u64, readonly: bool) -> Result<u32, MemslotError> {
        if self.refuse {
            return Err(MemslotError::Exhausted(7));
        }
        self.memslots.push(Some((gpa, len, readonly)));
        Ok(self.memslots.len() as u32 - 1)
    }
    fn unmap(&mut self, memslot: u32) -> Result<(), MemslotError> {
        assert!(
            self.memslots[memslot as usize].take().is_some(),
            "memslot {memslot} was not there"
        );
        Ok(())
    }
}

/// Counts how often the other vCPUs were paused, of which there are none.
#[derive(Default)]
pub(super) struct FakeOthers {
    pub(super) stops: u32,
}

impl OtherVcpus for FakeOthers {
    fn pause(&mut self) -> Result<(), Outcome> {
        self.stops += 1;
        Ok(())
    }
}

#[derive(Clone, Default)]
pub(super) struct Heard(pub(super) Arc<Mutex<Vec<Finding>>>);

impl Observer for Heard {
    fn finding(&mut self, finding: &Finding) {
        self.0.lock().unwrap().push(finding.clone());
    }
}

/// A dispatcher and the machine that it believes in.
pub(super) struct Bench {
    pub(super) state: Dispatcher,
    pub(super) cpu: FakeCpu,
    pub(super) ram: Ram,
    pub(super) memslots: FakeMemslots,
    pub(super) others: FakeOthers,
    pub(super) heard: Heard,
    pub(super) layout: Layout,
}

impl Bench {
    pub(super) fn new(
        mode: Option<Mode>,
        notify: Notify,
        limit: Option<u64>,
        stop_at: Option<usize>,
    ) -> Self {
        Self::make(mode, notify, limit, stop_at, 0, false)
    }

    /// A bench with a quarantine of so many bytes, whose guest may be Linux.
    pub(super) fn with(mode: Mode, notify: Notify, quarantine: u64, linux: bool) -> Self {
        Self::make(Some(mode), notify, None, None, quarantine, linux)
    }

    fn make(
        mode: Option<Mode>,
        notify: Notify,
        limit: Option<u64>,
        stop_at: Option<usize>,
        quarantine: u64,
        linux: bool,
    ) -> Self {
        let (mut memslots, heard) = (FakeMemslots::default(), Heard::default());
        let settings = Detached {
            memory: RAM,
            mode,
            notify,
            shadow_limit: limit,
            provenance: DEFAULT_BUDGET,
            quarantine,
            cpus: 1,
            linux,
            stop_at,
        };
        let symbols = Symbols::from_elf(Vec::new());
        let observer = Box::new(heard.clone());
        let state = Dispatcher::detached(&settings, symbols, &mut memslots, observer);
        let mut cpu = FakeCpu::default();
        (cpu.regs.rip, cpu.regs.rsp) = (0x10_0000, 0x20_0000);
        // 64-bit code without paging, which does not exist, but keeps this short.
        (cpu.sregs.efer, cpu.sregs.cs.l) = (1 << 10, 1);
        let layout = Layout::new(RAM).unwrap();
        Self {
            state: state.unwrap(),
            cpu,
            ram: Ram::new(RAM).unwrap(),
            memslots,
            others: FakeOthers::default(),
            heard,
            layout,
        }
    }

    pub(super) fn ring() -> Self {
        Self::new(Some(Mode::PerPage), Notify::Ring, None, None).with_region()
    }

    pub(super) fn sync() -> Self {
        Self::new(Some(Mode::PerPage), Notify::Sync, None, None).with_region()
    }

    pub(super) fn with_region(mut self) -> Self {
        assert_eq!(self.call(CallNumber::RegionAdd, [0, RAM, 0, 0]), 0);
        self
    }

    pub(super) fn exit(&mut self, exit: VmExit) -> Result<(), Outcome> {
        self.with_context(|state, context| state.dispatch(exit, context))
    }

    pub(super) fn with_context<T>(
        &mut self,
        call: impl FnOnce(&mut Dispatcher, &mut ExitContext) -> T,
    ) -> T {
        let mut context = ExitContext {
            id: CPU,
            cpu: &mut self.cpu,
            ram: &self.ram,
            memslots: &mut self.memslots,
            others: &mut self.others,
        };
        call(&mut self.state, &mut context)
    }

    pub(super) fn hypercall(
        &mut self,
        number: impl Into<u32>,
        [rdi, rsi, rcx, r8]: [u64; 4],
    ) -> Result<(), Outcome> {
        (self.cpu.regs.rdi, self.cpu.regs.rsi) = (rdi, rsi);
        (self.cpu.regs.rcx, self.cpu.regs.r8) = (rcx, r8);
        self.exit(VmExit::IoOut { port: PORT, data: Data::new(&number.into().to_le_bytes()) })
    }

    /// A call that the run survives; its result.
    #[track_caller]
    pub(super) fn call(&mut self, number: impl Into<u32>, arguments: [u64; 4]) -> u64 {
        goes_on(self.hypercall(number, arguments));
        self.cpu.regs.rax
    }

    pub(super) fn read(&mut self, gpa: u64, len: u8) -> (Result<(), Outcome>, Option<Vec<u8>>) {
        self.cpu.read = None;
        let handled = self.exit(VmExit::MmioRead { gpa: GuestAddress(gpa), len });
        (handled, self.cpu.read.take())
    }

    pub(super) fn write(&mut self, gpa: u64, data: &[u8]) -> Result<(), Outcome> {
        self.exit(VmExit::MmioWrite { gpa: GuestAddress(gpa), data: Data::new(data) })
    }

    pub(super) fn exits(&self) -> ExitStats {
        self.state.exits()
    }

    pub(super) fn events(&self) -> EventStats {
        self.state.events()
    }

    pub(super) fn kinds(&self) -> Vec<&'static str> {
        self.heard.0.lock().unwrap().iter().map(|finding| finding.kind).collect()
    }
}

/// The outcome of an exit that ends the run.
#[track_caller]
pub(super) fn ended(handled: Result<(), Outcome>) -> Outcome {
    handled.expect_err("the run goes on")
}

#[track_caller]
pub(super) fn goes_on(handled: Result<(), Outcome>) {
    assert!(handled.is_ok(), "{handled:?}");
}
