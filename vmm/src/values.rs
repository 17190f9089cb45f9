//! The values of options: how they are written, and what is said of wrong ones.

use std::time::Duration;

use umbra_provenance::QuarantineSize;

use crate::sandbox::{DebugExit, Redzone};

/// A time limit.
#[derive(Clone, Copy)]
pub(crate) struct Limit(pub(crate) Option<Duration>);

pub(crate) fn parse_time(text: &str) -> Result<Limit, String> {
    if text == "none" {
        return Ok(Limit(None));
    }
    let time = humantime::parse_duration(text).map_err(|e| format!("{e}; try 90s, 5m or none"))?;
    if time.is_zero() {
        Err("no time at all; try 90s, 5m or none".into())
    } else {
        Ok(Limit(Some(time)))
    }
}

/// Sizes are binary, as with other VMMs: 256M are 256 MiB.
pub(crate) fn parse_size(text: &str) -> Result<u64, String> {
    parse_size::Config::new()
        .with_binary()
        .parse_size(text)
        .map_err(|e| format!("{e}; try 256M or 2G"))
}

pub(crate) fn parse_quarantine(text: &str) -> Result<QuarantineSize, String> {
    match text {
        "auto" => Ok(QuarantineSize::Auto),
        "off" => Ok(QuarantineSize::Bytes(0)),
        _ => match parse_size(text).map_err(|e| format!("{e}, off or auto"))? {
            bytes if bytes < QuarantineSize::MIN => {
                Err("less than 64K; try 8M, off or auto".into())
            }
            bytes => Ok(QuarantineSize::Bytes(bytes)),
        },
    }
}

pub(crate) fn parse_redzone(text: &str) -> Result<Redzone, String> {
    const MAX: u64 = Redzone::MAX as u64;
    match text {
        "auto" => Ok(Redzone::Adaptive),
        "off" => Ok(Redzone::Off),
        _ => match parse_size(text).map_err(|_| "not a number of bytes; try 32, off or auto")? {
            bytes @ 8..=MAX if bytes.is_multiple_of(8) => Ok(Redzone::Bytes(bytes as u32)),
            _ => Err(format!("not a multiple of 8 from 8 to {MAX}; try 32, off or auto")),
        },
    }
}

pub(crate) fn parse_debug_exit(text: &str) -> Result<DebugExit, String> {
    match text {
        "auto" => Ok(DebugExit::Auto),
        "off" => Ok(DebugExit::Off),
        _ => match text.strip_prefix("0x") {
            Some(digits) => u32::from_str_radix(digits, 16),
            None => text.parse(),
        }
        .map(DebugExit::Success)
        .map_err(|_| "not a number of 32 bits; try 0x10, off or auto".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_binary_and_bad_ones_say_what_to_try() {
        assert_eq!(parse_size("256M"), Ok(256 << 20));
        assert_eq!(parse_size("2GiB"), Ok(2 << 30));
        assert!(parse_size("lots").is_err_and(|e| e.contains("256M")));
        assert!(parse_size("-1").is_err());
    }

    #[test]
    fn quarantine_and_redzone_are_sizes_or_words() {
        assert_eq!(parse_quarantine("off"), Ok(QuarantineSize::Bytes(0)));
        assert_eq!(parse_quarantine("64K"), Ok(QuarantineSize::Bytes(64 << 10)));
        assert!(parse_quarantine("63K").is_err_and(|e| e.contains("64K")));
        assert!(parse_quarantine("none").is_err_and(|e| e.contains("off")));
        assert_eq!(
            (parse_redzone("auto"), parse_redzone("off")),
            (Ok(Redzone::Adaptive), Ok(Redzone::Off))
        );
        assert_eq!(parse_redzone("4K"), Ok(Redzone::Bytes(4096)));
        for bad in ["0", "1", "12", "4104", "much"] {
            assert!(parse_redzone(bad).is_err_and(|e| e.contains("try 32")), "{bad}");
        }
    }

    #[test]
    fn a_debug_exit_is_a_value_or_a_word() {
        assert_eq!(parse_debug_exit("auto"), Ok(DebugExit::Auto));
        assert_eq!(parse_debug_exit("off"), Ok(DebugExit::Off));
        assert_eq!(parse_debug_exit("0x10"), Ok(DebugExit::Success(16)));
        assert_eq!(parse_debug_exit("0"), Ok(DebugExit::Success(0)));
        assert_eq!(parse_debug_exit("0xffffffff"), Ok(DebugExit::Success(u32::MAX)));
        for bad in ["", "0x", "-1", "0x100000000", "on"] {
            assert!(parse_debug_exit(bad).is_err_and(|e| e.contains("try 0x10")), "{bad}");
        }
    }

    #[test]
    fn times_may_be_none_but_not_nothing() {
        assert!(parse_time("none").is_ok_and(|limit| limit.0.is_none()));
        assert!(parse_time("90s").is_ok_and(|limit| limit.0 == Some(Duration::from_secs(90))));
        assert!(parse_time("0s").is_err());
        assert!(parse_time("soon").is_err());
    }
}
