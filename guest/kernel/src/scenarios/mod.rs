//! Scenarios: good and bad code that the kernel runs on request. Each runs in a thread with the
//! scenario's name, which a finding shows.
//!
//! The expected findings are beside the code, in a section of the kernel's ELF that the host reads:
//! one line for each scenario, `name|verdict|description`. A verdict is `silent`, or findings
//! separated by `;`. Each of these is `kind access size offset`. The offset is the distance of the
//! first bad byte from the start of the object or variable, `-` if there is neither.

mod access;
mod allocators;
mod checks;
pub mod churn;
mod functions;
mod heap;
mod large;
mod pages;
mod quarantine;
mod silent;
mod slab;
mod stack;
mod vmalloc;

use crate::{println, thread};

type Scenario = (&'static str, fn());

/// Defines scenarios: functions, their lines for the host, and the table `ALL` of the module.
macro_rules! scenarios {
    ($($name:ident, $verdict:literal, $about:literal, $body:block)*) => {
        $(
            #[doc = $about]
            #[inline(never)]
            pub fn $name() $body
        )*
        pub const ALL: &[$crate::scenarios::Scenario] = &[$((stringify!($name), $name)),*];
        const _: () = {
            const TEXT: &str = concat!($(stringify!($name), "|", $verdict, "|", $about, "\n"),*);
            #[used]
            #[unsafe(link_section = ".umbra.scenarios")]
            static LINES: [u8; TEXT.len()] = match TEXT.as_bytes().first_chunk() {
                Some(bytes) => *bytes,
                None => panic!(),
            };
        };
    };
}
use scenarios;

/// Hides a value's origin from the optimizer.
fn opaque<T>(value: T) -> T {
    core::hint::black_box(value)
}

/// Reads a byte, for real.
#[inline(always)]
fn read(at: u64) -> u8 {
    // SAFETY: the address is mapped. It may be poisoned: a scenario is there to be caught.
    unsafe { (opaque(at) as *const u8).read_volatile() }
}

/// Writes a byte, for real.
#[inline(always)]
fn write(at: u64, value: u8) {
    // SAFETY: as in `read`; bad writes hit redzones and freed memory.
    unsafe { (opaque(at) as *mut u8).write_volatile(value) }
}

/// The name that chooses no scenario.
const NONE: &str = "-";

/// Runs the scenarios of the command line.
pub fn run(command_line: &'static str) {
    let (mut chosen, mut without) = ("", "");
    for word in command_line.split_ascii_whitespace() {
        if let Some(names) = word.strip_prefix("scenarios=") {
            chosen = names;
        } else if let Some(names) = word.strip_prefix("without=") {
            without = names;
        } else if word == "keep" {
            churn::keep();
        } else if let Some(operations) = word.strip_prefix("churn=") {
            match operations.parse() {
                Ok(n) => churn::set_operations(n),
                Err(_) => println!("churn={operations}: not a number"),
            }
        }
    }
    let all = || {
        [
            slab::ALL,
            large::ALL,
            functions::ALL,
            access::ALL,
            checks::ALL,
            pages::ALL,
            vmalloc::ALL,
            stack::ALL,
            heap::ALL,
            allocators::ALL,
            silent::ALL,
            quarantine::ALL,
            churn::ALL,
        ]
        .into_iter()
        .flatten()
    };
    if chosen.is_empty() {
        all()
            .filter(|(name, _)| !without.split(',').any(|left_out| left_out == *name))
            .for_each(run_one);
    }
    // In the order of the command line, and as often.
    for name in chosen.split(',').filter(|name| !name.is_empty() && *name != NONE) {
        match all().find(|(known, _)| *known == name) {
            Some(scenario) => run_one(scenario),
            None => println!("no scenario is called {name}"),
        }
    }
}

fn run_one((name, body): &Scenario) {
    thread::run(name, *body);
    println!("ran {name}");
}
