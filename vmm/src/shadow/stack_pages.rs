//! A set of guest pages that are stack.

use umbra_shadow::codes::{PAGE_SHIFT, PAGE_SIZE};

/// A set of pages, one bit each; it grows to the highest page that was ever in it.
#[derive(Debug, Default)]
pub(super) struct StackPages {
    bits: Vec<u64>,
}

impl StackPages {
    /// Adds the whole pages of `len` bytes at `gpa`, or removes them. The range lies in guest
    /// memory.
    pub fn set(&mut self, gpa: u64, len: u64, stack: bool) {
        for page in gpa.div_ceil(PAGE_SIZE)..gpa.saturating_add(len) >> PAGE_SHIFT {
            let at = (page / 64) as usize;
            if at >= self.bits.len() {
                if !stack {
                    return;
                }
                self.bits.resize(at + 1, 0);
            }
            if let Some(word) = self.bits.get_mut(at) {
                let bit = 1 << (page % 64);
                *word = if stack { *word | bit } else { *word & !bit };
            }
        }
    }

    /// Whether all pages that `len` bytes (not 0) at `gpa` touch are in the set.
    pub fn hold(&self, gpa: u64, len: u64) -> bool {
        let mut pages = gpa >> PAGE_SHIFT..=(gpa + (len - 1)) >> PAGE_SHIFT;
        pages.all(|page| {
            self.bits.get((page / 64) as usize).is_some_and(|word| word >> (page % 64) & 1 != 0)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_pages_are_stack() {
        let mut pages = StackPages::default();
        pages.set(0x1800, 0x4000, true);
        assert!(pages.hold(0x2000, 0x3000) && !pages.hold(0x1fff, 2) && !pages.hold(0x4fff, 2));
        pages.set(0x3001, 0x1fff, false);
        assert!(pages.hold(0x3fff, 1) && !pages.hold(0x4000, 1));
        pages.set(1 << 40, 0x1000, false);
        assert_eq!(pages.bits.len(), 1, "taking out what is not there costs nothing");
        assert!(!pages.hold(1 << 40, 1));
    }
}
