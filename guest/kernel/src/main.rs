//! Umbra's test kernel: boots, sets up its allocators and threads, and runs the scenarios that its
//! command line names. It is an ordinary small kernel, instrumented as any other would be.
//!
//! Command line: `scenarios=a,b` (default: all; `-`: none), `without=a,b` (all others), `churn=N`
//! (operations of the churn scenarios), `keep` (a churn does not free its live objects), `lag` (see
//! [`lag`]),
//! `bench=...` (see [`bench`]), `smp=N` (see [`stress`]), `nmi=N` (see [`nmi`]), `random=...` (see
//! [`random`]), `slots` (prints the slot size of each cache).
#![no_std]
#![no_main]
#![allow(
    missing_docs,
    reason = "a program: its modules and types are documented, its entry points are obvious"
)]

extern crate alloc;

mod apic;
mod bench;
mod boot;
mod console;
mod cpu;
mod fault;
mod heap;
mod lag;
mod layout;
mod memory;
mod nmi;
mod platform;
mod random;
mod replay;
mod scenarios;
mod smp;
mod stress;
mod thread;
mod vmalloc;

use layout::{DIRECT_MAP, IMAGE_MAP};
use memory::{page, slab};
use platform::{on_umbra, reset};
use umbra_guest::{Mapping, Offer, Region, StartConfig};

/// Bytes of the event ring: its header and 8,191 records, so that a drain is rare.
const RING: usize = 512 << 10;
/// Allocates guest-physical memory for page tables and the like, before the allocators are set up.
struct Early {
    next: u64,
    end: u64,
}

impl Early {
    /// Takes memory in whole pages. It is zeroed, because nothing has used it yet.
    fn take(&mut self, bytes: u64) -> u64 {
        let at = self.next;
        self.next += bytes.next_multiple_of(4096);
        assert!(self.next <= self.end, "not enough memory to start");
        at
    }
}

#[unsafe(no_mangle)]
extern "C" fn kernel_main(boot_params: u64) -> ! {
    let info = boot::boot_info(boot_params);
    let offer = umbra_guest::discover();
    platform::set_on_umbra(offer.version == umbra_guest::abi::VERSION);
    let mut early = Early { next: boot::image_end(), end: info.free_end() };
    cpu::set_number(0);
    let cpus = smp::find();
    start_checks(&offer, &info, cpus.count(), &mut early);
    cpu::init(fault::entries());
    boot::run_constructors();
    page::init(early.next, info.free_end());
    thread::init();
    smp::start(&cpus, &offer);
    if info.command_line.split_ascii_whitespace().any(|word| word == "slots") {
        slab::slots().for_each(|bytes| println!("slot of {bytes} bytes"));
    }
    stress::run(info.command_line);
    nmi::run(info.command_line);
    bench::run(&info);
    random::run(info.command_line);
    scenarios::run(info.command_line);
    if on_umbra() {
        umbra_guest::exit(0);
    }
    reset()
}

/// Maps the shadow windows and turns checks on, if Umbra is underneath.
fn start_checks(offer: &Offer, info: &boot::BootInfo, cpus: usize, early: &mut Early) {
    if offer.version == 0 {
        println!("no Umbra underneath: checks are off");
    } else if !on_umbra() {
        println!("Umbra speaks ABI version {}, this kernel another: checks are off", offer.version);
    }
    let end = info.memory.1;
    // The mappings of boot.rs, the second only as far as the image reaches.
    let regions = [
        Region { start: DIRECT_MAP, bytes: end & !0xfff, gpa: 0 },
        Region { start: IMAGE_MAP, bytes: boot::image_end(), gpa: 0 },
    ];
    let mut mappings = [Mapping { start: 0, gpa: 0, bytes: 0 }; 5];
    if offer.checks() {
        for (i, region) in regions.iter().enumerate() {
            mappings[2 * i..][..2].copy_from_slice(&offer.mappings(region));
        }
    }
    if cpus > 1 {
        mappings[4] = Mapping { start: apic::REGISTERS, gpa: apic::GPA, bytes: 4096 };
    }
    boot::map_all(end, &mappings, || early.take(4096));
    let ring = (DIRECT_MAP + early.take(RING as u64)) as *mut u8;
    let config = StartConfig {
        regions: &regions,
        text: boot::text(),
        // SAFETY: this memory was taken for the ring, and is zero as all memory is at start.
        ring: unsafe { core::slice::from_raw_parts_mut(ring, RING) },
        current: Some(cpu::cpu_current),
    };
    // SAFETY: the shadow of both regions was mapped above, or this maps it.
    if let Err(error) = unsafe { umbra_guest::start(offer, config) } {
        println!("Umbra refused: {error:?}; checks are off");
        return;
    }
    umbra_guest::stack_alloc(boot::stack(), boot::BOOT_STACK);
}

/// A panic in the allocators, which cannot format text.
#[unsafe(no_mangle)]
extern "C" fn kernel_memory_panic(line: u32) -> ! {
    panic!("the allocators panicked in line {line} of guest/kernel/memory")
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo) -> ! {
    println!("{info}");
    if on_umbra() {
        umbra_guest::exit_panic();
    }
    reset()
}
