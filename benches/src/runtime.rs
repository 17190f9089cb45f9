//! The guest runtime's checks as machine code, to run outside of a guest kernel.

use anyhow::{Context as _, Result, ensure};
use object::{Object as _, ObjectSection as _, ObjectSymbol as _};

/// The runtime's checks for one kind of shadow, taken from a kernel's file and patched as in
/// `guest/runtime/src/checks.rs`. They are position-independent, except that a bad access leads to
/// nowhere.
pub(crate) struct Checks {
    /// Those of loads, then those of stores.
    pub code: Vec<u8>,
    /// Bytes of each.
    pub each: usize,
}

impl Checks {
    /// What the first of them check, in order. Stores follow.
    pub const LOADS: [&str; 6] = ["load1", "load2", "load4", "load8", "load16", "loadN"];

    /// The symbols of all of them, in order.
    pub fn symbols() -> impl Iterator<Item = String> {
        ["load", "store"].into_iter().flat_map(|kind| {
            Self::LOADS.map(|load| format!("__asan_{}_noabort", load.replace("load", kind)))
        })
    }

    /// The checks of a kernel, patched with the fast paths at the symbol `templates`.
    ///
    /// # Errors
    /// The kernel has no such symbols, or in another order.
    pub fn new(kernel: &[u8], templates: &str) -> Result<Self> {
        let file = object::File::parse(kernel).context("the test kernel is not an ELF file")?;
        let symbol = |name: &str| {
            let found = file.symbols().find(|symbol| symbol.name() == Ok(name));
            found.map(|symbol| (symbol.address(), symbol.size())).with_context(|| {
                format!(
                    "the test kernel has no symbol {name}: it was stripped, or has another runtime"
                )
            })
        };
        let bytes = |at: u64, len: usize| {
            file.sections()
                .find_map(|section| section.data_range(at, len as u64).ok().flatten())
                .with_context(|| format!("the test kernel's file has nothing at {at:#x}"))
        };
        let (first, each) = symbol("__asan_load1_noabort")?;
        let each = usize::try_from(each)?;
        let (from, two, full) = (
            symbol(templates)?.0,
            symbol("umbra_templates_two_level")?.0,
            symbol("umbra_templates_full")?.0,
        );
        // Loads and stores share them.
        let patch = usize::try_from(full.abs_diff(two))? / Self::LOADS.len();
        ensure!(
            (1..each).contains(&patch) && each <= 4096,
            "the test kernel's checks are not as expected"
        );
        let mut code = bytes(first, each * Self::symbols().count())?.to_vec();
        let templates = bytes(from, patch * Self::LOADS.len())?;
        let templates = templates.chunks_exact(patch).cycle();
        for (slot, template) in code.chunks_exact_mut(each).zip(templates) {
            slot[..patch].copy_from_slice(template);
        }
        for (i, name) in Self::symbols().enumerate() {
            ensure!(
                symbol(&name)?.0 == first + (i * each) as u64,
                "the test kernel's checks are in another order"
            );
        }
        Ok(Self { code, each })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::program::one_segment;

    #[test]
    fn another_kernel_is_refused() {
        assert!(Checks::new(b"not a kernel", "umbra_templates_full").is_err());
        let error = Checks::new(&one_segment(&[0x90]), "umbra_templates_full").err().unwrap();
        assert!(error.to_string().contains("no symbol"), "{error}");
    }
}
