//! Linux's command line: parameters that a run adds to the user's.

/// Added for every Linux, unless the command line has the parameter already: the console goes to
/// the serial port, a reset uses the keyboard controller, and a panic resets at once. A reset ends
/// the run.
const DEFAULTS: [&str; 3] = ["console=ttyS0", "reboot=k", "panic=-1"];
/// Added where the host emulates each instruction of the kernel, which makes instructions
/// expensive. Mitigations lengthen each call and return, and protect nobody in a guest with one
/// user. The self-tests of ciphers take more instructions than everything else that a
/// distribution's kernel does before its first program. And a slow task there is not stuck.
const EMULATED: [&str; 3] = ["mitigations=off", "cryptomgr.notests", "nosoftlockup"];
/// Added there for a bzImage, which is usually a distribution's kernel. Nearly half of the
/// instructions before its first program prepare the tracing of functions and events: they look for
/// weak functions, put the names of constants into formats, and make thousands of files. A kernel
/// without these functions only parses the list.
const EMULATED_BZIMAGE: &str =
    "initcall_blacklist=ftrace_check_for_weak_functions,trace_eval_init,tracer_init_tracefs";
/// Added there for a clock that runs slower than real time, so that ticks and time-outs come at a
/// rate that fits the speed of instructions. Linux is made to believe that the time-stamp counter
/// is faster than it is.
const SLOW_CLOCK: [&str; 2] = ["no-kvmclock", "tsc=reliable"];
/// Setting any of these on the command line overrides the slow clock.
const CLOCK: [&str; 4] = ["clocksource", "no-kvmclock", "tsc", "tsc_early_khz"];
/// Most slowdown of the clock. Instructions take some hundred times as long as on hardware.
const SLOWER: u32 = 6;
/// Frequency limit of the counter, in kHz: above four times 2^32 Hz Linux's delays overflow
/// (arch/x86/lib/delay.c).
const MAX_TSC_KHZ: u32 = 17_000_000;

/// A host that emulates ring 0, with the kernel to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Emulated {
    /// The guest's time-stamp counter, in kHz; 0: not known.
    pub tsc_khz: u32,
    /// The kernel is a bzImage.
    pub bzimage: bool,
}

impl Emulated {
    /// The frequency of the counter for the slow clock, in kHz.
    fn apparent_tsc_khz(self) -> Option<u32> {
        let slower = MAX_TSC_KHZ.checked_div(self.tsc_khz)?.min(SLOWER);
        (slower > 1).then_some(self.tsc_khz * slower)
    }
}

/// The name of a parameter.
fn name(word: &str) -> &str {
    word.split_once('=').map_or(word, |(name, _)| name)
}

/// `cmdline` with the defaults for a Linux kernel in front, so that the user's parameters come
/// last. Arguments after `--` belong to init.
pub fn with_defaults(cmdline: &str, emulated: Option<Emulated>) -> String {
    let given: Vec<_> =
        cmdline.split_ascii_whitespace().take_while(|word| *word != "--").map(name).collect();
    let mut words: Vec<_> = DEFAULTS.map(str::to_owned).into();
    if let Some(host) = emulated {
        words.extend(EMULATED.map(str::to_owned));
        words.extend(host.bzimage.then(|| EMULATED_BZIMAGE.to_owned()));
        let chosen = given.iter().any(|name| CLOCK.contains(name));
        if let Some(khz) = host.apparent_tsc_khz().filter(|_| !chosen) {
            words.extend(SLOW_CLOCK.map(str::to_owned));
            words.push(format!("tsc_early_khz={khz}"));
        }
    }
    words.retain(|word| !given.contains(&name(word)));
    if !cmdline.is_empty() {
        words.push(cmdline.to_owned());
    }
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_give_way_to_what_is_said() {
        let all = |cmdline| with_defaults(cmdline, None);
        assert_eq!(all(""), "console=ttyS0 reboot=k panic=-1");
        assert_eq!(all("quiet panic=5"), "console=ttyS0 reboot=k quiet panic=5");
        assert_eq!(all("console=hvc0 panic=0 reboot=t"), "console=hvc0 panic=0 reboot=t");
        assert_eq!(
            all("a -- panic=1"),
            "console=ttyS0 reboot=k panic=-1 a -- panic=1",
            "init's own argument"
        );
    }

    #[test]
    fn an_emulated_kernel_gets_more() {
        let given =
            |cmdline, tsc_khz| with_defaults(cmdline, Some(Emulated { tsc_khz, bzimage: false }));
        let first =
            "console=ttyS0 reboot=k panic=-1 mitigations=off cryptomgr.notests nosoftlockup";
        let slow = "no-kvmclock tsc=reliable tsc_early_khz";
        assert_eq!(given("", 2_600_000), format!("{first} {slow}=15600000"));
        assert_eq!(given("", 4_000_000), format!("{first} {slow}=16000000"));
        for unusable in [0, 9_000_000, u32::MAX] {
            assert_eq!(given("a", unusable), format!("{first} a"));
        }
        assert_eq!(
            given("mitigations=auto nosoftlockup a", 1),
            "console=ttyS0 reboot=k panic=-1 cryptomgr.notests no-kvmclock tsc=reliable \
             tsc_early_khz=6 mitigations=auto nosoftlockup a"
        );
        for chosen in
            ["clocksource=kvm-clock", "tsc_early_khz=5", "tsc=nowatchdog a", "no-kvmclock"]
        {
            assert_eq!(given(chosen, 1), format!("{first} {chosen}"));
        }
        let bzimage =
            |cmdline| with_defaults(cmdline, Some(Emulated { tsc_khz: 0, bzimage: true }));
        assert_eq!(bzimage("a"), format!("{first} {EMULATED_BZIMAGE} a"));
        assert_eq!(bzimage("initcall_blacklist= a"), format!("{first} initcall_blacklist= a"));
    }
}
