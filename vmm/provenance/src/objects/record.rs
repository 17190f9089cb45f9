//! What is kept of one object.

use super::origins::Origin;
use crate::Moment;
use crate::pool::Pool;

/// One object, live or freed.
#[derive(Clone, Copy, Debug)]
pub struct Record {
    /// Requested bytes, saturated: 4 GiB stands for that and more.
    pub size: u32,
    /// [`Origin::NONE`] if only its free is known.
    pub allocated: Origin,
    /// [`Origin::NONE`] while it is live.
    pub freed: Origin,
    pub allocated_at: When,
    pub freed_at: When,
    /// Bytes from the start of its page.
    pub offset: u16,
    pub cache: u16,
    /// Granules of redzone in its slot while it is live; saturated.
    pub redzone: u8,
    /// It may reach beyond the page behind its own.
    pub is_span: bool,
    /// How far from its start the previous one starts.
    previous_offset: i16,
    previous: Parts,
}

/// What was freed in its place before: none if `freed` is [`Origin::NONE`].
#[derive(Clone, Copy, Debug, Default)]
struct Parts {
    size: u32,
    allocated: Origin,
    freed: Origin,
}

/// Its share of a page, and of the stacks, come on top.
const _: () = assert!(Pool::<Record>::PLACE == 44);

/// What was freed before another object took its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Previous {
    /// Its start, as distance from that of the one that took its place.
    pub offset: i16,
    pub size: u32,
    pub allocated: Origin,
    pub freed: Origin,
}

impl Record {
    /// A live object, which is nowhere yet.
    pub fn live(size: u64, cache: u16, redzone: u8, allocated: Origin, at: Moment) -> Self {
        Self {
            size: u32::try_from(size).unwrap_or(u32::MAX),
            allocated,
            freed: Origin::NONE,
            allocated_at: When::new(at),
            freed_at: When::default(),
            offset: 0,
            cache,
            redzone,
            is_span: false,
            previous_offset: 0,
            previous: Parts::default(),
        }
    }

    /// Bytes that it takes. An object of no bytes still has a place of its own.
    pub fn bytes(&self) -> u64 {
        self.size.max(1).into()
    }

    /// Whether it was freed.
    pub fn is_freed(&self) -> bool {
        self.freed != Origin::NONE
    }

    /// What was freed in its place before.
    pub fn previous(&self) -> Option<Previous> {
        let (offset, Parts { size, allocated, freed }) = (self.previous_offset, self.previous);
        (freed != Origin::NONE).then_some(Previous { offset, size, allocated, freed })
    }

    /// Takes note of an object that it takes the place of, which starts `distance` bytes from it.
    /// If that was freed, it is the previous one; else, at the same start, this one is what became
    /// of it, and the previous one is the same. Returns the origins that nothing refers to any
    /// more.
    pub fn follows(&mut self, old: &Self, distance: i64) -> [Origin; 4] {
        let (dropped, taken) = (self.previous, old.previous);
        // An object that starts so far away was of another kind, and does not help.
        match i16::try_from(distance) {
            Ok(offset) if old.is_freed() => {
                let Self { size, allocated, freed, .. } = *old;
                self.previous = Parts { size, allocated, freed };
                self.previous_offset = offset;
                [dropped.allocated, dropped.freed, taken.allocated, taken.freed]
            }
            Ok(0) => {
                self.previous = taken;
                self.previous_offset = old.previous_offset;
                [dropped.allocated, dropped.freed, old.allocated, old.freed]
            }
            _ => [old.allocated, old.freed, taken.allocated, taken.freed],
        }
    }

    /// All origins that it refers to.
    pub fn origins(&self) -> [Origin; 4] {
        [self.allocated, self.freed, self.previous.allocated, self.previous.freed]
    }
}

/// A [`Moment`] in six bytes: the CPU, and 40 bits of microseconds, which are 12 days.
#[derive(Clone, Copy, Debug, Default)]
pub struct When([u8; 6]);

impl When {
    /// Stands for a time that is not known, or does not fit.
    const UNKNOWN: u64 = (1 << 40) - 1;

    /// What is kept of a moment. The last CPU stands for those that do not fit.
    pub fn new(moment: Moment) -> Self {
        let cpu = u8::try_from(moment.cpu).unwrap_or(u8::MAX);
        let micros = moment.micros.unwrap_or(Self::UNKNOWN).min(Self::UNKNOWN);
        let [a, b, c, d, e, ..] = micros.to_le_bytes();
        Self([cpu, a, b, c, d, e])
    }

    /// What is kept.
    pub fn moment(self) -> Moment {
        let [cpu, a, b, c, d, e] = self.0;
        let micros = u64::from_le_bytes([a, b, c, d, e, 0, 0, 0]);
        Moment { cpu: cpu.into(), micros: Some(micros).filter(|micros| *micros != Self::UNKNOWN) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_kept_for_12_days() {
        for (cpu, micros) in [(0, 0), (63, 1_234_567_890), (7, (1 << 40) - 2)] {
            let moment = Moment { cpu, micros: Some(micros) };
            assert_eq!(When::new(moment).moment(), moment);
        }
        for micros in [None, Some(1 << 40), Some(u64::MAX)] {
            let far = When::new(Moment { cpu: 256, micros }).moment();
            assert_eq!(far, Moment { cpu: 255, micros: None });
        }
    }
}
