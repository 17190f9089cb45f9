//! The regions of memory that a guest has added.

use umbra_shadow::codes::PAGE_SIZE;

use super::{CallError, range, wrong};

/// Virtual memory with consecutive keys (`shadow/keys.rs` explains them): it maps guest-physical
/// memory one to one, or has keys of its own. At least a page; neither end wraps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    va: u64,
    len: u64,
    key: u64,
}

impl Region {
    pub(super) fn new(va: u64, len: u64, gpa: u64) -> Result<Self, CallError> {
        for (what, value) in [("region address", va), ("region size", len), ("region memory", gpa)]
        {
            if !value.is_multiple_of(PAGE_SIZE) {
                return Err(wrong(what, value));
            }
        }
        if len == 0 {
            return Err(wrong("region size", len));
        }
        range("region address", va, len)?;
        range("region memory", gpa, len)?;
        Ok(Self { va, len, key: gpa })
    }

    /// Virtual memory that has keys of its own.
    pub(crate) fn virtual_memory(va: u64, len: u64, key: u64) -> Self {
        Self { va, len, key }
    }

    /// Virtual start.
    pub fn va(&self) -> u64 {
        self.va
    }

    /// Bytes.
    pub fn bytes(&self) -> u64 {
        self.len
    }

    /// The key of its start.
    pub fn key(&self) -> u64 {
        self.key
    }

    /// Its last virtual address; its end may be the end of the address space.
    fn last(&self) -> u64 {
        self.va + (self.len - 1)
    }
}

/// The regions that a guest added.
#[derive(Clone, Debug, Default)]
pub struct Regions {
    regions: Vec<Region>,
}

impl Regions {
    /// Most regions that are kept.
    pub const MAX: usize = 64;

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.regions.is_empty()
    }

    /// Adds a region of a guest whose memory ends at `ram_end`.
    ///
    /// # Errors
    /// It reaches beyond guest memory, overlaps a region in virtual memory, or there are too many.
    pub fn add(&mut self, region: Region, ram_end: u64) -> Result<(), CallError> {
        if region.len > ram_end || region.key > ram_end - region.len {
            return Err(wrong("region memory", region.key));
        }
        self.check(&region)?;
        self.regions.push(region);
        Ok(())
    }

    /// Adds `len` bytes of virtual memory at `va` ([`Call::VirtualAdd`](super::Call::VirtualAdd)),
    /// if `key` returns a key for them.
    ///
    /// # Errors
    /// There is no key; or the memory overlaps a region, or there are too many.
    pub fn add_virtual(
        &mut self,
        va: u64,
        len: u64,
        key: impl FnOnce() -> Result<u64, CallError>,
    ) -> Result<u64, CallError> {
        let mut region = Region::virtual_memory(va, len, 0);
        self.check(&region)?;
        region.key = key()?;
        self.regions.push(region);
        Ok(region.key)
    }

    /// Takes back the region that was added last.
    pub fn remove_last(&mut self) {
        self.regions.pop();
    }

    /// Refuses a region whose virtual memory overlaps another's, and any if there are too many.
    fn check(&self, region: &Region) -> Result<(), CallError> {
        if self.regions.iter().any(|other| region.va <= other.last() && other.va <= region.last()) {
            return Err(wrong("region address", region.va));
        }
        if self.regions.len() >= Self::MAX {
            return Err(CallError::Limit { what: "regions", max: Self::MAX as u64 });
        }
        Ok(())
    }

    /// The key of `len` bytes at `va`, if one region holds them all.
    pub fn key_of(&self, va: u64, len: u64) -> Option<u64> {
        self.find(va).filter(|(_, left)| len <= *left).map(|(key, _)| key)
    }

    /// The key of `va`, and how many bytes of its region begin there.
    pub fn find(&self, va: u64) -> Option<(u64, u64)> {
        self.regions.iter().find_map(|region| {
            let offset = va.checked_sub(region.va)?;
            (offset < region.len).then(|| (region.key + offset, region.len - offset))
        })
    }

    /// The virtual address of `key`, in the first region with it that was added.
    pub fn to_va(&self, key: u64) -> Option<u64> {
        self.aliases(key).next()
    }

    /// The virtual addresses of `key`, one for each region that has it.
    pub fn aliases(&self, key: u64) -> impl Iterator<Item = u64> {
        self.regions.iter().filter_map(move |region| {
            let offset = key.checked_sub(region.key)?;
            (offset < region.len).then(|| region.va + offset)
        })
    }

    /// All of them, in the order in which they were added.
    pub fn iter(&self) -> impl Iterator<Item = &Region> {
        self.regions.iter()
    }
}

#[cfg(test)]
mod tests {
    use umbra_shadow::abi;

    use super::*;

    const DIRECT: u64 = 0xffff_8000_0000_0000;
    const IMAGE: u64 = 0xffff_ffff_8000_0000;

    fn region(va: u64, len: u64, gpa: u64) -> Region {
        Region::new(va, len, gpa).unwrap()
    }

    #[test]
    fn regions_translate_both_ways() {
        let ram_end = 256 << 20;
        let mut regions = Regions::default();
        regions.add(region(DIRECT, ram_end, 0), ram_end).unwrap();
        regions.add(region(0u64.wrapping_sub(0x2000), 0x2000, 0x10_0000), ram_end).unwrap();
        assert_eq!(regions.key_of(DIRECT + 5, 100), Some(5));
        assert_eq!(regions.key_of(DIRECT + ram_end - 1, 1), Some(ram_end - 1));
        assert_eq!(regions.key_of(u64::MAX, 1), Some(0x10_1fff));
        for (va, len) in [
            (DIRECT - 1, 2),
            (DIRECT + ram_end - 1, 2),
            (DIRECT + ram_end, 0),
            (DIRECT, u64::MAX),
            (u64::MAX, 2),
            (0, 1),
        ] {
            assert_eq!(regions.key_of(va, len), None, "{va:#x}+{len:#x}");
        }
        assert_eq!(regions.to_va(0x10_1000), Some(DIRECT + 0x10_1000), "the region added first");
        assert_eq!(regions.to_va(ram_end), None);
        let image = 0u64.wrapping_sub(0x2000);
        assert!(regions.aliases(0x10_0000).eq([DIRECT + 0x10_0000, image]));
        assert_eq!(regions.iter().count(), 2);
    }

    #[test]
    fn regions_are_bounded() {
        let ram_end = 16 << 20;
        let mut regions = Regions::default();
        for (len, gpa) in [(ram_end + 0x1000, 0), (0x1000, ram_end), (0x2000, ram_end - 0x1000)] {
            assert_eq!(
                regions.add(region(0, len, gpa), ram_end).unwrap_err().result(),
                abi::ERR_ARGUMENT
            );
        }
        for i in 0..Regions::MAX as u64 {
            // Aliases of one memory are fine.
            regions.add(region(DIRECT + i * 0x2000, 0x2000, 0x3000), ram_end).unwrap();
        }
        for va in [DIRECT, DIRECT + 0x1000, DIRECT - 0x1000] {
            assert_eq!(
                regions.add(region(va, 0x2000, 0), ram_end).unwrap_err().result(),
                abi::ERR_ARGUMENT
            );
        }
        let more = regions.add(region(IMAGE, 0x1000, 0), ram_end);
        assert_eq!(more.unwrap_err().result(), abi::ERR_LIMIT);
        assert_eq!(regions.iter().count(), Regions::MAX);
    }
}
