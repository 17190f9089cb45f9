//! What Linux is told on its command line.

/// Linux parameters that a run wants, unless the command line has the parameter already: the console on the serial
/// port; a reset by the keyboard controller, first thing; and after a panic at once. Each of them ends the run.
const DEFAULTS: [&str; 3] = ["console=ttyS0", "reboot=k", "panic=-1"];
/// The same where each instruction of the kernel is emulated, so that those count which nobody needs: mitigations, from which
/// each call and each return is longer and which protect nobody in a guest with one user; and the self-tests of ciphers, which are
/// more than all else that a distribution's kernel does until its first program. Nor is what takes long stuck there.
const EMULATED: [&str; 3] = ["mitigations=off", "cryptomgr.notests", "nosoftlockup"];

/// `cmdline` with the defaults for a Linux kernel in front, so that what the user says comes last. Arguments after `--`
/// belong to init. `emulated`: the host emulates ring 0.
pub fn with_defaults(cmdline: &str, emulated: bool) -> String {
    let name = |word: &'static str| word.split_once('=').map_or(word, |(name, _)| name);
    let given: Vec<_> = cmdline
        .split_ascii_whitespace()
        .take_while(|word| *word != "--")
        .map(|word| word.split_once('=').map_or(word, |(name, _)| name))
        .collect();
    let emulated = if emulated { &EMULATED[..] } else { &[] };
    let defaults = DEFAULTS.iter().chain(emulated).copied();
    let mut words: Vec<_> = defaults.filter(|word| !given.contains(&name(word))).collect();
    if !cmdline.is_empty() {
        words.push(cmdline);
    }
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_give_way_to_what_is_said() {
        let all = |cmdline| with_defaults(cmdline, false);
        assert_eq!(all(""), "console=ttyS0 reboot=k panic=-1");
        assert_eq!(all("quiet panic=5"), "console=ttyS0 reboot=k quiet panic=5");
        assert_eq!(all("console=hvc0 panic=0 reboot=t"), "console=hvc0 panic=0 reboot=t");
        assert_eq!(
            all("a -- panic=1"),
            "console=ttyS0 reboot=k panic=-1 a -- panic=1",
            "init's own argument"
        );
        let emulated = with_defaults("mitigations=auto a", true);
        assert_eq!(
            emulated,
            "console=ttyS0 reboot=k panic=-1 cryptomgr.notests nosoftlockup mitigations=auto a"
        );
    }
}
