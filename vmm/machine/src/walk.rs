//! Walks the guest's page tables, and reads guest-virtual memory through them.
//!
//! The tables are the guest's and may hold anything: each step reads one bounded entry, and the
//! number of steps is the number of levels.

use kvm_bindings::kvm_sregs;
use thiserror::Error;
use vm_memory::GuestAddress;

use super::memory::Ram;

const CR0_PG: u64 = 1 << 31;
const CR4_LA57: u64 = 1 << 12;
const EFER_LMA: u64 = 1 << 10;
const PRESENT: u64 = 1 << 0;
const WRITE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// Why a guest-virtual address could not be used.
#[derive(Debug, Error, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum WalkError {
    #[error("guest-virtual {gva:#x} is not canonical")]
    NotCanonical { gva: u64 },
    #[error("guest-virtual {gva:#x} is not mapped (level {level})")]
    NotPresent { gva: u64, level: u8 },
    #[error("the level {level} entry for guest-virtual {gva:#x} has reserved bits set")]
    Reserved { gva: u64, level: u8 },
    #[error(
        "the level {level} page table for guest-virtual {gva:#x} is at {gpa:#x}, which is not RAM"
    )]
    TableNotRam { gva: u64, gpa: u64, level: u8 },
    #[error("guest-virtual {gva:#x} is guest-physical {gpa:#x}, which is not RAM")]
    NotRam { gva: u64, gpa: u64 },
    #[error("the guest uses 32-bit paging")]
    NotLongMode,
}

/// The translation of a guest-virtual address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Translation {
    /// The guest-physical address.
    pub gpa: GuestAddress,
    /// Bytes of the page: 4096, 2 MiB or 1 GiB.
    pub page: u64,
    /// Whether all levels allow writes.
    pub writable: bool,
    /// Whether all levels allow user mode.
    pub user: bool,
}

/// The root of one address space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AddressSpace {
    root: u64,
    /// 0: paging is off.
    levels: u8,
    long: bool,
}

impl AddressSpace {
    /// The address space that the vCPU with these registers is in.
    pub fn new(sregs: &kvm_sregs) -> Self {
        let levels = match (sregs.cr0 & CR0_PG != 0, sregs.cr4 & CR4_LA57 != 0) {
            (false, _) => 0,
            (true, false) => 4,
            (true, true) => 5,
        };
        Self { root: sregs.cr3 & ADDRESS, levels, long: levels == 0 || sregs.efer & EFER_LMA != 0 }
    }

    /// Whether addresses are translated at all.
    pub fn is_paged(&self) -> bool {
        self.levels != 0
    }

    /// Whether the upper bits of an address are all equal, as paging requires.
    pub fn is_canonical(&self, gva: u64) -> bool {
        let unused = 64 - (12 + 9 * u32::from(self.levels.max(4)));
        ((gva << unused) as i64 >> unused) as u64 == gva
    }

    /// Translates one address.
    ///
    /// # Errors
    /// No page is mapped there, or a table is not in RAM.
    pub fn translate(&self, ram: &Ram, gva: u64) -> Result<Translation, WalkError> {
        self.walk(ram, gva, |_, _, _| {})
    }

    /// Sets the accessed bits on the way to an address, and the page's dirty bit if it is
    /// `written`, as the hardware does.
    ///
    /// # Errors
    /// As for [`Self::translate`].
    pub fn mark(&self, ram: &Ram, gva: u64, written: bool) -> Result<(), WalkError> {
        self.walk(ram, gva, |gpa, entry, last| {
            let wanted = ACCESSED | if last && written { DIRTY } else { 0 };
            if entry & wanted != wanted {
                ram.set_bits(gpa, wanted);
            }
        })?;
        Ok(())
    }

    /// Translates one address. `visit` gets each entry on the way: its address, its value, and
    /// whether it is the last.
    fn walk(
        &self,
        ram: &Ram,
        gva: u64,
        mut visit: impl FnMut(GuestAddress, u64, bool),
    ) -> Result<Translation, WalkError> {
        if self.levels == 0 {
            return Ok(Translation {
                gpa: GuestAddress(gva),
                page: 4096,
                writable: true,
                user: true,
            });
        }
        if !self.long {
            return Err(WalkError::NotLongMode);
        }
        if !self.is_canonical(gva) {
            return Err(WalkError::NotCanonical { gva });
        }
        let mut table = self.root;
        let mut rights = WRITE | USER;
        for level in (1..=self.levels).rev() {
            let shift = 12 + 9 * (u32::from(level) - 1);
            let gpa = table + 8 * (gva >> shift & 0x1ff);
            let entry = ram.read_u64(GuestAddress(gpa)).map_err(|_| WalkError::TableNotRam {
                gva,
                gpa,
                level,
            })?;
            if entry & PRESENT == 0 {
                return Err(WalkError::NotPresent { gva, level });
            }
            rights &= entry;
            let last = level == 1 || entry & LARGE != 0;
            if last && level > 3 {
                return Err(WalkError::Reserved { gva, level });
            }
            visit(GuestAddress(gpa), entry, last);
            if last {
                let page = 1u64 << shift;
                let gpa = GuestAddress(entry & ADDRESS & !(page - 1) | gva & (page - 1));
                return Ok(Translation {
                    gpa,
                    page,
                    writable: rights & WRITE != 0,
                    user: rights & USER != 0,
                });
            }
            table = entry & ADDRESS;
        }
        Err(WalkError::NotPresent { gva, level: 0 })
    }

    /// Copies guest-virtual memory out. It may cross pages.
    ///
    /// # Errors
    /// A byte cannot be read; the error names the first.
    pub fn read(&self, ram: &Ram, gva: u64, to: &mut [u8]) -> Result<(), WalkError> {
        let mut done = 0;
        while done < to.len() {
            done += self.read_page(ram, gva.wrapping_add(done as u64), &mut to[done..])?;
        }
        Ok(())
    }

    /// Copies as much as can be read, up to all of `to`. Returns the number of bytes.
    pub fn read_some(&self, ram: &Ram, gva: u64, to: &mut [u8]) -> usize {
        let mut done = 0;
        while done < to.len() {
            match self.read_page(ram, gva.wrapping_add(done as u64), &mut to[done..]) {
                Ok(more) => done += more,
                Err(_) => break,
            }
        }
        done
    }

    /// The little-endian number at `gva`.
    ///
    /// # Errors
    /// A byte cannot be read.
    pub fn read_u64(&self, ram: &Ram, gva: u64) -> Result<u64, WalkError> {
        let mut bytes = [0; 8];
        self.read(ram, gva, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// Reads up to the end of the 4 KiB page of `gva`. Returns the number of bytes (not 0 unless
    /// `to` is empty).
    fn read_page(&self, ram: &Ram, gva: u64, to: &mut [u8]) -> Result<usize, WalkError> {
        let gpa = self.translate(ram, gva)?.gpa;
        let len = to.len().min((4096 - (gva & 4095)) as usize);
        ram.read(gpa, &mut to[..len]).map_err(|_| WalkError::NotRam { gva, gpa: gpa.0 })?;
        Ok(len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout;

    const ROOT: u64 = 0x10_0000;

    fn space() -> (Ram, AddressSpace) {
        let ram = Ram::new(layout::MIN_MEMORY).unwrap();
        let sregs =
            kvm_sregs { cr0: CR0_PG, cr3: ROOT | 0xfff, efer: EFER_LMA, ..Default::default() };
        (ram, AddressSpace::new(&sregs))
    }

    fn put(ram: &Ram, gpa: u64, entry: u64) {
        ram.write(GuestAddress(gpa), &entry.to_le_bytes()).unwrap();
    }

    #[test]
    fn pages_of_all_sizes() {
        let (ram, space) = space();
        put(&ram, ROOT, 0x10_1000 | PRESENT | WRITE | USER);
        put(&ram, 0x10_1000, 0x10_2000 | PRESENT | WRITE | USER);
        put(&ram, 0x10_2000, 0x10_3000 | PRESENT | WRITE | USER);
        put(&ram, 0x10_3000 + 8, 0x15_5000 | PRESENT | 1 << 63);
        put(&ram, 0x10_2000 + 8, 0x20_0000 | LARGE | PRESENT | WRITE);
        put(&ram, 0x10_1000 + 8, 0x4000_0000 | LARGE | PRESENT | USER);
        let at = |gva| space.translate(&ram, gva).unwrap();
        assert_eq!(
            at(0x1abc),
            Translation { gpa: GuestAddress(0x15_5abc), page: 4096, writable: false, user: false }
        );
        assert_eq!(
            at(0x20_0000 + 0x12_3456),
            Translation {
                gpa: GuestAddress(0x32_3456),
                page: 2 << 20,
                writable: true,
                user: false
            }
        );
        assert_eq!(
            at(0x4000_0000 + 0x123_4567),
            Translation {
                gpa: GuestAddress(0x4123_4567),
                page: 1 << 30,
                writable: false,
                user: true
            }
        );
        assert_eq!(space.translate(&ram, 0), Err(WalkError::NotPresent { gva: 0, level: 1 }));
        assert_eq!(space.translate(&ram, 1 << 47), Err(WalkError::NotCanonical { gva: 1 << 47 }));
        assert!(matches!(
            space.translate(&ram, u64::MAX),
            Err(WalkError::NotPresent { level: 4, .. })
        ));
        assert!(matches!(space.read_u64(&ram, 0x4000_0000), Err(WalkError::NotRam { .. })));
        assert_eq!(
            space.read_u64(&ram, 0x1ffc),
            Err(WalkError::NotPresent { gva: 0x2000, level: 1 })
        );
        assert_eq!(space.read_some(&ram, 0x1ffc, &mut [0; 8]), 4);
    }

    #[test]
    fn marks_are_the_hardwares() {
        let (ram, space) = space();
        let tables = [ROOT, 0x10_1000, 0x10_2000, 0x10_3000];
        for (table, next) in tables.iter().zip([0x10_1000, 0x10_2000, 0x10_3000, 0x15_5000]) {
            put(&ram, *table, next | PRESENT | WRITE);
        }
        let marks = || tables.map(|t| ram.read_u64(GuestAddress(t)).unwrap() & (ACCESSED | DIRTY));
        space.mark(&ram, 0x123, false).unwrap();
        assert_eq!(marks(), [ACCESSED; 4]);
        space.mark(&ram, 0x123, true).unwrap();
        assert_eq!(marks(), [ACCESSED, ACCESSED, ACCESSED, ACCESSED | DIRTY]);
        assert_eq!(space.translate(&ram, 0x123).unwrap().gpa, GuestAddress(0x15_5123));
    }

    #[test]
    fn hostile_tables() {
        let (ram, space) = space();
        // A table that is its own entry at every level.
        put(&ram, ROOT, ROOT | PRESENT);
        assert_eq!(space.translate(&ram, 0).unwrap().gpa, GuestAddress(ROOT));
        put(&ram, ROOT, ADDRESS | PRESENT);
        assert!(matches!(space.translate(&ram, 0), Err(WalkError::TableNotRam { level: 3, .. })));
        put(&ram, ROOT, ROOT | PRESENT | LARGE);
        assert_eq!(space.translate(&ram, 0), Err(WalkError::Reserved { gva: 0, level: 4 }));
        // Reading around the end of the address space.
        assert!(space.read(&ram, u64::MAX - 3, &mut [0; 8]).is_err());
    }

    #[test]
    fn other_paging_modes() {
        let (ram, _) = space();
        let off = AddressSpace::new(&kvm_sregs::default());
        assert_eq!(off.translate(&ram, 0x1234).unwrap().gpa, GuestAddress(0x1234));
        let old = AddressSpace::new(&kvm_sregs { cr0: CR0_PG, ..Default::default() });
        assert_eq!(old.translate(&ram, 0), Err(WalkError::NotLongMode));
        let five = AddressSpace::new(&kvm_sregs {
            cr0: CR0_PG,
            cr3: ROOT,
            cr4: CR4_LA57,
            efer: EFER_LMA,
            ..Default::default()
        });
        assert_eq!(
            five.translate(&ram, 1 << 47),
            Err(WalkError::NotPresent { gva: 1 << 47, level: 5 })
        );
    }
}
