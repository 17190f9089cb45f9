//! What Linux is told on its command line.

/// Linux parameters that a run wants, unless the command line has the parameter already: the console on the serial
/// port; a reset by the keyboard controller, first thing; and after a panic at once. Each of them ends the run.
const DEFAULTS: [(&str, &str); 3] = [("console", "ttyS0"), ("reboot", "k"), ("panic", "-1")];

/// `cmdline` with the defaults for a Linux kernel in front, so that what the user says comes last. Arguments after `--`
/// belong to init.
pub fn with_defaults(cmdline: &str) -> String {
    let given: Vec<_> = cmdline
        .split_ascii_whitespace()
        .take_while(|word| *word != "--")
        .map(|word| word.split_once('=').map_or(word, |(name, _)| name))
        .collect();
    let mut words: Vec<_> = DEFAULTS
        .iter()
        .filter(|(name, _)| !given.contains(name))
        .map(|(name, value)| format!("{name}={value}"))
        .collect();
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
        assert_eq!(with_defaults(""), "console=ttyS0 reboot=k panic=-1");
        assert_eq!(with_defaults("quiet panic=5"), "console=ttyS0 reboot=k quiet panic=5");
        assert_eq!(with_defaults("console=hvc0 panic=0 reboot=t"), "console=hvc0 panic=0 reboot=t");
        assert_eq!(
            with_defaults("a -- panic=1"),
            "console=ttyS0 reboot=k panic=-1 a -- panic=1",
            "init's own argument"
        );
    }
}
