//! KVM's interrupt controllers (two 8259A, an I/O APIC, a local APIC for each CPU) and its interval
//! timer (8254), wired as on a PC.

use std::io;

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KVM_PIT_SPEAKER_DUMMY, KvmIrqRouting, kvm_irq_routing_entry,
    kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_irqchip, kvm_irqchip, kvm_pit_config,
    kvm_reinject_control,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::ioctl::ioctl_with_ref;

use super::{MachineError, refused};

/// The timer's line.
pub(super) const TIMER: u8 = 0;
/// The I/O APIC's pin that the timer's line goes to, as on a PC. Every other line goes to the pin
/// with its number. Some kernels do not look this up in the tables.
pub(super) const TIMER_PIN: u8 = 2;
/// The line by which the second of a PC's two old controllers interrupts the first. No device has
/// it.
pub(super) const CASCADE: u8 = 2;
/// Pins of the I/O APIC.
const PINS: u8 = 24;
/// Lines of one of the old controllers.
const PIC_LINES: u8 = 8;

// `KVMIO` of <linux/kvm.h>.
vmm_sys_util::ioctl_io_nr!(KVM_REINJECT_CONTROL, kvm_bindings::KVMIO, 0x71);

/// Creates the interrupt controllers and the timer of a VM that has no vCPU yet.
pub(super) fn create(fd: &VmFd) -> Result<(), MachineError> {
    fd.create_irq_chip().map_err(refused("create an interrupt controller"))?;
    // Port 0x61 is the timer's, too: kernels calibrate with it.
    let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    fd.create_pit2(pit).map_err(refused("create a timer"))?;
    drop_late_ticks(fd)
        .map_err(|source| MachineError::Kvm { operation: "drop the timer's late ticks", source })?;
    // The wrapper takes no more entries than KVM does.
    let routes = KvmIrqRouting::from_entries(&routes()).map_err(|e| MachineError::Kvm {
        operation: "connect interrupts",
        source: io::Error::other(format!("{e:?}")),
    })?;
    fd.set_gsi_routing(&routes).map_err(refused("connect interrupts"))
}

/// Drops ticks that the guest is too slow for, as a PC does. KVM's default is to give all of them
/// later. A guest whose handler takes longer than a tick would then do nothing but handle ticks,
/// for as long as it was late.
fn drop_late_ticks(fd: &VmFd) -> io::Result<()> {
    let control = kvm_reinject_control { pit_reinject: 0, ..Default::default() };
    // SAFETY: the file is a VM, and KVM reads this structure.
    match unsafe { ioctl_with_ref(fd, KVM_REINJECT_CONTROL(), &control) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Where each line goes.
fn routes() -> Vec<kvm_irq_routing_entry> {
    let route = |line: u8, irqchip: u32, pin: u8| kvm_irq_routing_entry {
        gsi: line.into(),
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        u: kvm_irq_routing_entry__bindgen_ty_1 {
            irqchip: kvm_irq_routing_irqchip { irqchip, pin: pin.into() },
        },
        ..Default::default()
    };
    let pic = (0..2 * PIC_LINES).filter(|line| *line != CASCADE).map(|line| {
        if line < PIC_LINES {
            route(line, KVM_IRQCHIP_PIC_MASTER, line)
        } else {
            route(line, KVM_IRQCHIP_PIC_SLAVE, line - PIC_LINES)
        }
    });
    let io_apic = (0..PINS)
        .filter(|line| *line != CASCADE)
        .map(|line| route(line, KVM_IRQCHIP_IOAPIC, io_apic_pin(line)));
    pic.chain(io_apic).collect()
}

/// The I/O APIC's pin of a line.
pub(super) fn io_apic_pin(line: u8) -> u8 {
    if line == TIMER { TIMER_PIN } else { line }
}

/// Whether an entry of an APIC's vector table is on and raises a non-maskable interrupt. The bits
/// are the same in a local APIC and in the I/O APIC (Intel SDM volume 3, figure 11-8; 82093AA).
pub(super) fn raises_nmi(entry: u32) -> bool {
    const MASKED: u32 = 1 << 16;
    const MODE: u32 = 7 << 8;
    const NMI: u32 = 4 << 8;
    entry & (MASKED | MODE) == NMI
}

/// Whether a pin of the I/O APIC raises a non-maskable interrupt.
pub(super) fn io_apic_raises_nmi(fd: &VmFd) -> bool {
    let mut chip = kvm_irqchip { chip_id: KVM_IRQCHIP_IOAPIC, ..Default::default() };
    if fd.get_irqchip(&mut chip).is_err() {
        return false;
    }
    // SAFETY: KVM has filled in the member of the chip that was asked for; it has plain numbers.
    let pins = unsafe { chip.chip.ioapic.redirtbl };
    // SAFETY: both members are the same eight bytes.
    pins.iter().any(|pin| raises_nmi(unsafe { pin.bits } as u32))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_timer_goes_to_pin_2_and_all_else_one_to_one() {
        let mut io_apic = Vec::new();
        let mut pic = Vec::new();
        for entry in routes() {
            // SAFETY: `routes` sets this member.
            let to = unsafe { entry.u.irqchip };
            match to.irqchip {
                KVM_IRQCHIP_IOAPIC => io_apic.push((entry.gsi, to.pin)),
                chip => pic.push((entry.gsi, 8 * chip + to.pin)),
            }
        }
        assert_eq!(io_apic[..3], [(0, 2), (1, 1), (3, 3)]);
        assert!(io_apic[1..].iter().all(|(line, pin)| line == pin));
        assert_eq!((io_apic.len(), io_apic.last()), (23, Some(&(23, 23))));
        assert!(pic.iter().all(|(line, pin)| line == pin && *line != 2));
        assert_eq!((pic.len(), pic.last()), (15, Some(&(15, 15))));
    }

    #[test]
    fn entries_that_raise_nmi() {
        assert!(raises_nmi(0x400) && raises_nmi(0x8430));
        assert!(!raises_nmi(0x1_0400) && !raises_nmi(0x30) && !raises_nmi(0x730));
    }
}
