//! The check of Linux's generic KASAN in outline mode, written from its description
//! (`Documentation/dev-tools/kasan.rst`, and how `mm/kasan/generic.c` is explained there): the
//! check in `__asan_load8` and its kin.
//!
//! One byte of shadow stands for eight bytes: 0, all are valid; 1 to 7, that many are valid;
//! negative, none is. An access of one byte is bad if its place in the granule is not below a
//! shadow value other than 0. One of up to 8 bytes is judged by its last byte, and, if it reaches
//! into a second granule, by the first granule's value as well, which then must be 0. Before that,
//! an access must not wrap, and must be to an address that has shadow.

use umbra_shadow::codes::{GRANULE, GRANULE_SHIFT};

/// KASAN's shadow. In Linux the offset is a constant of the kernel; here it is a pointer in a
/// register.
#[derive(Clone, Copy)]
pub struct Kasan<'a> {
    shadow: &'a [u8],
    /// The lowest address with shadow, and the end of those with shadow.
    lowest: u64,
    end: u64,
}

impl<'a> Kasan<'a> {
    /// For addresses from 0 to 8 times the shadow's length.
    pub fn new(shadow: &'a [u8]) -> Self {
        Self { shadow, lowest: 0, end: (shadow.len() as u64) << GRANULE_SHIFT }
    }

    #[inline(always)]
    fn value(&self, addr: u64) -> i8 {
        debug_assert!(addr < self.end);
        // SAFETY: in Linux every kernel address has shadow that can be read; here callers stay
        // below the end, as `load`'s say.
        unsafe { *self.shadow.get_unchecked((addr >> GRANULE_SHIFT) as usize) as i8 }
    }

    #[inline(always)]
    fn byte_poisoned(&self, addr: u64) -> bool {
        let value = self.value(addr);
        value != 0 && (addr & (GRANULE - 1)) as i8 >= value
    }

    /// Whether an access to `SIZE` bytes (1 to 8) may be made: `__asan_load8` for 8.
    ///
    /// # Safety
    /// The access lies below the end of what has shadow.
    #[inline(always)]
    pub unsafe fn load<const SIZE: u64>(&self, addr: u64) -> bool {
        if addr.checked_add(SIZE).is_none() || addr < self.lowest {
            return false;
        }
        let last = addr + SIZE - 1;
        let crosses = last & (GRANULE - 1) < SIZE - 1;
        !((SIZE > 1 && crosses && self.value(addr) != 0) || self.byte_poisoned(last))
    }
}

#[cfg(test)]
mod tests {
    use umbra_shadow::codes::{PAGE_SIZE, SLAB_REDZONE};
    use umbra_shadow::{Full, Shadow};

    use super::super::memory::HostMemory;
    use super::*;

    #[test]
    fn it_says_what_full_shadow_says() {
        let mut shadow = vec![0u8; (PAGE_SIZE / 8) as usize];
        shadow[3..9].copy_from_slice(&[5, SLAB_REDZONE, SLAB_REDZONE, 0, 1, SLAB_REDZONE]);
        let page = [0];
        let full = Full::new(HostMemory::new(&page, &shadow, PAGE_SIZE));
        let kasan = Kasan::new(&shadow);
        for addr in 0..PAGE_SIZE - 8 {
            // SAFETY: eight bytes from there are below the end.
            let said =
                unsafe { [kasan.load::<1>(addr), kasan.load::<4>(addr), kasan.load::<8>(addr)] };
            assert_eq!(said, [1, 4, 8].map(|size| full.check(addr, size).is_ok()), "{addr:#x}");
        }
        // SAFETY: it wraps, and is refused before the shadow is looked at.
        assert!(!unsafe { kasan.load::<8>(u64::MAX) });
    }
}
