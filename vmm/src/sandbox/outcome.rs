//! How a run ended, as a word, as a sentence and as an exit status.

use std::time::Duration;

use thiserror::Error;
use umbra_machine::complete::CompleteError;
use umbra_machine::vcpu::VcpuError;

use crate::shadow::ShadowError;

/// How a run ended. Display is a sentence for people.
#[derive(Debug, Error)]
pub enum Outcome {
    /// The guest reported success.
    #[error("the guest is done")]
    Done,
    /// The guest reported failure.
    #[error("the guest says that it failed")]
    Failed,
    /// There are as many findings as `stop_at`.
    #[error("stopped after {0} finding{s}", s = if *.0 == 1 { "" } else { "s" })]
    FindingLimit(usize),
    /// The guest reset the machine.
    #[error("the guest reset the machine")]
    Reset,
    /// The guest switched the machine off, or printed that it has halted.
    #[error("the guest switched itself off")]
    PowerOff,
    /// The guest halted for good: there is no interrupt that could wake it.
    #[error("the guest halted")]
    Halted,
    /// The guest wrote to its debug port ([`DebugExit`](super::DebugExit)).
    #[error(
        "the guest exited by its debug port with value {value:#x} (QEMU's exit status {status})",
        status = qemu_status(*value)
    )]
    DebugExit {
        /// The value.
        value: u32,
        /// It is the one that means success.
        success: bool,
    },
    /// The guest panicked.
    #[error("the guest panicked")]
    Panic,
    /// Linux panicked.
    #[error("the guest panicked: {0}")]
    LinuxPanic(String),
    /// Linux had an oops, and went on to a regular end. The first line of the first one.
    #[error("the guest's kernel had an oops and went on: {0}")]
    LinuxOops(String),
    /// All CPUs halted with interrupts off, without a message of Linux.
    #[error("all CPUs of the guest halted with interrupts off, the first at {place}")]
    HaltedForGood {
        /// Where, with its symbol if it is known.
        place: String,
    },
    /// A CPU exception that the guest did not handle.
    #[error(
        "the guest died of exception {vector} ({name}) at {place}, error code {error:#x}, \
         address {address:#x}",
        name = exception(*vector)
    )]
    Fault {
        /// The exception's vector.
        vector: u32,
        /// Its error code.
        error: u32,
        /// The instruction, with its symbol if it is known.
        place: String,
        /// cr2.
        address: u64,
    },
    /// A triple fault.
    #[error("the guest triple-faulted at {place}")]
    TripleFault {
        /// The last instruction, with its symbol if it is known.
        place: String,
    },
    /// An instruction that neither KVM nor Umbra executes.
    #[error("{error} ({place})")]
    Instruction {
        /// What cannot be executed.
        error: CompleteError,
        /// Where, with its symbol if it is known.
        place: String,
    },
    /// The vCPU got into a state that KVM does not run.
    #[error("KVM cannot run the guest any further: {what} at {place}")]
    Stuck {
        /// What KVM says.
        what: String,
        /// The instruction, with its symbol if it is known.
        place: String,
    },
    /// The host does not let go of a vCPU that had to stand still.
    #[error("vCPU {id} does not come out of the guest")]
    Unstoppable {
        /// Its number.
        id: usize,
    },
    /// The time limit.
    #[error("the time limit of {0:?} is over")]
    TimeLimit(Duration),
    /// The user ended the run.
    #[error("interrupted")]
    Interrupted,
    /// The guest's compiler checks inline, and its shadow is read-only.
    #[error(
        "the guest's compiler checks inline, so it must write its shadow itself, which \
         `--notify sync` does not let it do: run it without that, or build it with checks that \
         are calls"
    )]
    InlineInSync,
    /// The guest needs more shadow than it may have.
    #[error("{0}")]
    ShadowLimit(ShadowError),
    /// The host failed to provide shadow.
    #[error("cannot provide shadow memory: {0}")]
    Shadow(ShadowError),
    /// KVM failed.
    #[error("KVM failed: {0}")]
    Host(#[from] VcpuError),
}

/// The exit status of QEMU with `isa-debug-exit`, of which the system keeps 8 bits.
fn qemu_status(value: u32) -> u8 {
    (value << 1 | 1) as u8
}

/// The names of the x86 exceptions (Intel SDM volume 3, table 6-1).
fn exception(vector: u32) -> &'static str {
    match vector {
        0 => "divide error",
        3 => "breakpoint",
        6 => "invalid opcode",
        8 => "double fault",
        12 => "stack fault",
        13 => "general protection",
        14 => "page fault",
        17 => "alignment check",
        _ => "see the CPU's manual",
    }
}

impl Outcome {
    /// The outcome as a word, for figures.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::Failed => "failed",
            Self::FindingLimit(_) => "finding-limit",
            Self::Reset => "reset",
            Self::PowerOff => "power-off",
            Self::Halted => "halted",
            Self::HaltedForGood { .. } => "halted-for-good",
            Self::DebugExit { .. } => "debug-exit",
            Self::Panic | Self::LinuxPanic(_) => "panic",
            Self::LinuxOops(_) => "oops",
            Self::Fault { .. } => "fault",
            Self::TripleFault { .. } => "triple-fault",
            Self::Instruction { .. } => "unknown-instruction",
            Self::Stuck { .. } => "stuck",
            Self::TimeLimit(_) => "time-limit",
            Self::Interrupted => "interrupted",
            Self::InlineInSync => "inline-in-sync",
            Self::ShadowLimit(_) => "shadow-limit",
            Self::Shadow(_) | Self::Host(_) | Self::Unstoppable { .. } => "host-error",
        }
    }

    /// The exit status of a program that runs one guest: 0 clean, 1 findings, 2 usage or host
    /// problem, 3 the guest crashed or failed, 4 time limit, 6 an oops of Linux; 130 after Ctrl-C,
    /// as shells have it.
    pub fn status(&self, findings: bool) -> u8 {
        match self {
            Self::Done
            | Self::Reset
            | Self::PowerOff
            | Self::Halted
            | Self::DebugExit { success: true, .. }
            | Self::FindingLimit(_) => u8::from(findings),
            Self::InlineInSync
            | Self::ShadowLimit(_)
            | Self::Shadow(_)
            | Self::Host(_)
            | Self::Unstoppable { .. } => 2,
            Self::Failed
            | Self::DebugExit { success: false, .. }
            | Self::Panic
            | Self::LinuxPanic(_)
            | Self::HaltedForGood { .. }
            | Self::Fault { .. }
            | Self::TripleFault { .. }
            | Self::Instruction { .. }
            | Self::Stuck { .. } => 3,
            Self::TimeLimit(_) => 4,
            Self::LinuxOops(_) => 6,
            Self::Interrupted => 130,
        }
    }

    /// Whether the guest came to an end of its own.
    pub fn is_regular(&self) -> bool {
        matches!(
            self,
            Self::Done
                | Self::Reset
                | Self::PowerOff
                | Self::Halted
                | Self::DebugExit { success: true, .. }
        )
    }
}

impl From<ShadowError> for Outcome {
    fn from(error: ShadowError) -> Self {
        match error {
            ShadowError::Limit { .. } => Self::ShadowLimit(error),
            error => Self::Shadow(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_debug_exit_is_clean_with_one_value_only() {
        let exit = |value, success| Outcome::DebugExit { value, success };
        assert_eq!([false, true].map(|findings| exit(0x10, true).status(findings)), [0, 1]);
        assert_eq!([false, true].map(|findings| exit(0x10, false).status(findings)), [3, 3]);
        assert!(exit(1, true).is_regular() && !exit(1, false).is_regular());
        for (value, text) in
            [(0x10, "0x10 (QEMU's exit status 33)"), (0, "status 1)"), (u32::MAX, "status 255)")]
        {
            assert!(exit(value, true).to_string().contains(text), "{}", exit(value, true));
        }
    }

    #[test]
    fn crash_and_time_limit_outrank_findings() {
        for findings in [false, true] {
            assert_eq!(Outcome::Done.status(findings), u8::from(findings));
            assert_eq!(Outcome::Panic.status(findings), 3);
            assert_eq!(Outcome::TimeLimit(Duration::from_secs(1)).status(findings), 4);
            let limit = Outcome::from(ShadowError::Limit { limit: 1, needed: 2 });
            assert_eq!((limit.word(), limit.status(findings)), ("shadow-limit", 2));
        }
    }
}
