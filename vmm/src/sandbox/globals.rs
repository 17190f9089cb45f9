//! The guest's global variables with redzones, from its compiler's descriptions.
//!
//! Only the addresses of the descriptions are kept. A finding reads them from guest memory.

use umbra_machine::memory::Ram;
use umbra_machine::walk::AddressSpace;
use umbra_report::Variable;
use umbra_report::symbols::demangle;
use umbra_shadow::abi::GLOBAL_BYTES;

use crate::hypercall::CallError;

/// Most arrays of descriptions: one for each compilation unit.
const ARRAYS: usize = 1 << 14;
/// Most descriptions in all of them; each finding on a global may look at all.
const DESCRIPTIONS: u64 = 1 << 17;
/// Most bytes of a variable and its redzone.
const WHOLE_MAX: u64 = 1 << 31;
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

    /// The variable that holds `address`, or whose redzone does.
    pub fn find(&self, address: u64, space: &AddressSpace, ram: &Ram) -> Option<Variable> {
        let word = |at: u64| space.read_u64(ram, at).ok();
        let text = |at: u64| {
            let mut bytes = [0; NAME_MAX];
            let len = space.read_some(ram, at, &mut bytes);
            let text = bytes.get(..len)?.split(|byte| *byte == 0).next()?;
            (!text.is_empty()).then(|| String::from_utf8_lossy(text).into_owned())
        };
        // The newest first: where a module is gone, anything may be in the place of an older one.
        let all = self
            .arrays
            .iter()
            .rev()
            .flat_map(|&(va, count)| (0..count).map(move |i| va + i * GLOBAL_BYTES));
        for at in all {
            let (Some(start), Some(whole)) = (word(at), word(at + 16)) else { continue };
            let Some(size) = word(at + 8).filter(|size| *size <= whole) else { continue };
            if whole > WHOLE_MAX {
                continue;
            }
            if address.checked_sub(start).is_some_and(|offset| offset < whole) {
                let name = word(at + 24).and_then(text)?;
                let module = word(at + 32).and_then(text);
                // gcc, and clang before version 15, say where it is declared: the file's name, line
                // and column.
                let place = word(at + 48).filter(|place| *place != 0);
                let file = place.and_then(word).and_then(text).map(Into::into);
                let line = place.and_then(|place| word(place.checked_add(8)?));
                let line = line.map(|line| line as u32).filter(|line| *line != 0 && file.is_some());
                return Some(Variable { name: demangle(&name), start, size, module, file, line });
            }
        }
        None
    }
}
