//! The clock of a PC's CMOS (Motorola MC146818), for kernels without another source of the date. It
//! cannot be set and has no alarm. Without it Linux waits a second for the end of an update that
//! never began.

use std::time::{SystemTime, UNIX_EPOCH};

/// Selects a register. Bit 7 masks NMI and has no effect here.
pub(super) const INDEX: u16 = 0x70;
/// The selected register.
pub(super) const DATA: u16 = 0x71;

/// Register A: the usual divider and rate, and no update in progress.
const STATUS_A: u8 = 0x26;
/// Register B: 24 hours, and numbers in BCD.
const STATUS_B: u8 = 0x02;
/// Register D: the time is valid.
const STATUS_D: u8 = 0x80;

/// The clock.
#[derive(Debug, Default)]
pub(super) struct Rtc {
    index: u8,
}

impl Rtc {
    /// A write to [`INDEX`].
    pub(super) fn select(&mut self, value: u8) {
        self.index = value & 0x7f;
    }

    /// A read of [`DATA`].
    pub(super) fn read(&self) -> u8 {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        register(self.index, now)
    }
}

/// A register, `seconds` after 1970, UTC.
fn register(index: u8, seconds: u64) -> u8 {
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = date(days);
    let bcd = |number: u64| (((number / 10 % 10) << 4) | (number % 10)) as u8;
    match index {
        0x00 => bcd(rest % 60),
        0x02 => bcd(rest / 60 % 60),
        0x04 => bcd(rest / 3600),
        // 1 January 1970 was a Thursday; 1 is Sunday.
        0x06 => bcd((days + 4) % 7 + 1),
        0x07 => bcd(day),
        0x08 => bcd(month),
        0x09 => bcd(year % 100),
        0x0a => STATUS_A,
        0x0b => STATUS_B,
        0x0d => STATUS_D,
        0x32 => bcd(year / 100),
        _ => 0,
    }
}

/// Year, month and day of month, `days` after 1 January 1970.
fn date(mut days: u64) -> (u64, u64, u64) {
    let leap =
        |year: u64| year.is_multiple_of(4) && !year.is_multiple_of(100) || year.is_multiple_of(400);
    // The calendar repeats after 400 years.
    let mut year = 1970 + days / 146_097 * 400;
    days %= 146_097;
    while days >= 365 + u64::from(leap(year)) {
        days -= 365 + u64::from(leap(year));
        year += 1;
    }
    let months = [31, 28 + u64::from(leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 1;
    for length in months {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    (year, month, days + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        for (days, expected) in [
            (0, (1970, 1, 1)),
            (58, (1970, 2, 28)),
            (59, (1970, 3, 1)),
            (364, (1970, 12, 31)),
            (11_016, (2000, 2, 29)),
            (20_058, (2024, 12, 1)),
            (47_540, (2100, 2, 28)),
            (47_541, (2100, 3, 1)),
            (146_097, (2370, 1, 1)),
        ] {
            assert_eq!(date(days), expected, "{days}");
        }
        date(u64::MAX / 86_400);
    }

    #[test]
    fn registers() {
        // 9 February 2009, 23:31:30 UTC was a Monday.
        let at = |index| register(index, 1_234_222_290);
        assert_eq!(
            [0x32, 9, 8, 7, 6, 4, 2, 0].map(at),
            [0x20, 0x09, 0x02, 0x09, 0x02, 0x23, 0x31, 0x30]
        );
        assert_eq!([0xa, 0xb, 0xc, 0xd].map(at), [0x26, 2, 0, 0x80]);
        let mut rtc = Rtc::default();
        rtc.select(0x8d);
        assert_eq!(rtc.read(), 0x80, "the mask of NMI is no part of the number");
        for index in 0..=255 {
            rtc.select(index);
            rtc.read();
        }
    }
}
