//! The guest's global variables with redzones, from its compiler's descriptions.
//!
//! Only the addresses of the descriptions are kept. A finding reads them from guest memory.

use umbra_machine::memory::Ram;
use umbra_machine::walk::AddressSpace;
use umbra_report::Variable;
use umbra_report::symbols::demangle;
use umbra_shadow::abi::GLOBAL_BYTES;
use umbra_shadow::codes::PAGE_SIZE;

use crate::hypercall::CallError;

/// Most arrays of descriptions: one for each compilation unit.
const ARRAYS: usize = 1 << 14;
/// Most descriptions in all of them; each finding on a global may look at all.
const DESCRIPTIONS: u64 = 1 << 17;
/// Most bytes of a variable and its redzone.
const WHOLE_MAX: u64 = 1 << 31;
/// Descriptions that are read at once.
const BLOCK: usize = 64;
/// Most bytes of a name.
const NAME_MAX: usize = 256;

/// Addresses of the descriptions.
#[derive(Debug, Default)]
pub struct Globals {
    arrays: Vec<(u64, u64)>,
}

impl Globals {
    /// Adds `count` descriptions at `va`.
    ///
    /// # Errors
    /// There are too many arrays, or too many descriptions in all.
    pub fn add(&mut self, va: u64, count: u64) -> Result<(), CallError> {
        // The same place again: a module was loaded in the place of another.
        let end = |va: u64, count: u64| va.saturating_add(count.saturating_mul(GLOBAL_BYTES));
        self.arrays.retain(|&(old, many)| end(old, many) <= va || end(va, count) <= old);
        if self.arrays.len() >= ARRAYS {
            return Err(CallError::Limit { what: "arrays of globals", max: ARRAYS as u64 });
        }
        if self.arrays.iter().map(|(_, count)| count).sum::<u64>() + count > DESCRIPTIONS {
            return Err(CallError::Limit { what: "globals", max: DESCRIPTIONS });
        }
        self.arrays.push((va, count));
        Ok(())
    }

    /// The variable that holds one of `addresses`, or whose redzone does; and that address. All
    /// descriptions are read once, however many addresses there are.
    pub fn find(
        &self,
        addresses: &[u64],
        space: &AddressSpace,
        ram: &Ram,
    ) -> Option<(u64, Variable)> {
        let mut sorted = addresses.to_vec();
        sorted.sort_unstable();
        let (first, last) = (*sorted.first()?, *sorted.last()?);
        let holds = |start: u64, whole: u64| {
            // Nearly all of them lie elsewhere.
            if start > last || start.saturating_add(whole) <= first {
                return None;
            }
            let address = *sorted.get(sorted.partition_point(|address| *address < start))?;
            (address - start < whole).then_some(address)
        };
        // The newest first: where a module is gone, anything may be in the place of an older one.
        let mut arrays = self.arrays.iter().rev();
        let (at, address) = arrays.find_map(|array| find_in(*array, space, ram, &holds))?;
        Some((address, read(at, space, ram)?))
    }
}

/// The first description of an array with a start and a size with redzone for which `holds` has an
/// address: where it is, and that address. Those that cannot be read are passed over.
fn find_in(
    (va, count): (u64, u64),
    space: &AddressSpace,
    ram: &Ram,
    holds: &impl Fn(u64, u64) -> Option<u64>,
) -> Option<(u64, u64)> {
    let mut block = [0; BLOCK * GLOBAL_BYTES as usize];
    let mut next = 0;
    while next < count {
        let at = va + next * GLOBAL_BYTES;
        let wanted = (count - next).min(BLOCK as u64);
        let bytes = space.read_some(ram, at, &mut block[..(wanted * GLOBAL_BYTES) as usize]);
        let (descriptions, _) = block[..bytes].as_chunks::<{ GLOBAL_BYTES as usize }>();
        let words = |description: &[u8; GLOBAL_BYTES as usize]| {
            let (words, _) = description.as_chunks();
            [0, 1, 2].map(|word| u64::from_le_bytes(words[word]))
        };
        for ([start, size, whole], i) in descriptions.iter().map(words).zip(0..) {
            let is_good = size <= whole && whole <= WHOLE_MAX;
            if let Some(address) = is_good.then(|| holds(start, whole)).flatten() {
                return Some((at + i * GLOBAL_BYTES, address));
            }
        }
        next += descriptions.len() as u64;
        if (descriptions.len() as u64) < wanted {
            // On to the first one behind the page that cannot be read.
            let unread = (at + bytes as u64) | (PAGE_SIZE - 1);
            next = next.max((unread - va) / GLOBAL_BYTES + 1);
        }
    }
    None
}

/// The variable of the description at `at`.
fn read(at: u64, space: &AddressSpace, ram: &Ram) -> Option<Variable> {
    let word = |at: u64| space.read_u64(ram, at).ok();
    let text = |at: u64| {
        let mut bytes = [0; NAME_MAX];
        let len = space.read_some(ram, at, &mut bytes);
        let text = bytes.get(..len)?.split(|byte| *byte == 0).next()?;
        (!text.is_empty()).then(|| String::from_utf8_lossy(text).into_owned())
    };
    let name = word(at + 24).and_then(text)?;
    let module = word(at + 32).and_then(text);
    // gcc, and clang before version 15, say where it is declared: the file's name, line and column.
    let place = word(at + 48).filter(|place| *place != 0);
    let file = place.and_then(word).and_then(text).map(Into::into);
    let line = place.and_then(|place| word(place.checked_add(8)?));
    let line = line.map(|line| line as u32).filter(|line| *line != 0 && file.is_some());
    let (start, size) = (word(at)?, word(at + 8)?);
    Some(Variable { name: demangle(&name), start, size, module, file, line })
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestAddress;

    use super::*;

    const RAM: u64 = 4 << 20;

    /// Writes a description of 8 bytes, with a redzone of 24, at `at`.
    fn put(ram: &Ram, at: u64, start: u64) {
        for (offset, word) in [(0, start), (8, 8), (16, 32), (24, 0x100)] {
            ram.write(GuestAddress(at + offset), &u64::to_le_bytes(word)).unwrap();
        }
    }

    #[test]
    fn descriptions_are_found_in_one_pass_over_all_of_them() {
        // Without paging, so that all of RAM can be read, and nothing behind it.
        let (ram, space) = (Ram::new(RAM).unwrap(), AddressSpace::new(&Default::default()));
        ram.write(GuestAddress(0x100), b"name\0").unwrap();
        let mut globals = Globals::default();
        let arrays = [(0x1_0020, 300), (RAM - 3 * GLOBAL_BYTES - 8, 500), (0x2_0000, 1)];
        for (va, count) in arrays {
            globals.add(va, count).unwrap();
        }
        let find = |addresses: &[u64]| {
            let found = globals.find(addresses, &space, &ram);
            found.map(|(address, variable)| (address, variable.start))
        };
        assert_eq!(find(&[0x7000]), None);
        // The last of several blocks; across a page; the last before the end of RAM.
        for at in [0x1_0020 + 299 * 64, 0x1_0020 + 63 * 64, RAM - 64 - 8, 0x2_0000] {
            put(&ram, at, 0x7000);
            let all = [u64::MAX, 0x701f, 5, 0x6fff];
            assert_eq!(find(&all), Some((0x701f, 0x7000)), "{at:#x}");
            assert_eq!((find(&[0x6fff]), find(&[0x7020])), (None, None), "{at:#x}");
            put(&ram, at, 0x9_0000);
        }
    }
}
