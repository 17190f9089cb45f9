//! The headline of a finding, and places in the code as it names them.

use super::identity::is_only_tool;
use super::printable::{NO_SYMBOL, printable};
use super::{Finding, Frame, Names};

impl Finding {
    /// The function of the ELF that has the code of [`Finding::function`].
    fn function_of_the_elf(&self) -> Option<&Frame> {
        let function = self.function()?;
        let mut frames = self.access_frames().iter();
        frames.by_ref().find(|frame| std::ptr::eq(*frame, function))?;
        if function.inlined { frames.find(|frame| !frame.inlined) } else { Some(function) }
    }

    /// The finding in one line, as KASAN prints it: `BUG: KASAN: kind in func+0xoff/0xsize`. It
    /// holds no address, so that equal bugs have equal headlines in every run.
    ///
    /// The function is [`Finding::function`]. If that is inlined, the function of the ELF follows,
    /// unless it is only a tool; with [`Names::Linkage`] it stands alone.
    pub fn headline(&self, names: Names) -> String {
        let of_the_elf = self.function_of_the_elf();
        let place = of_the_elf.and_then(|frame| place(frame, names));
        let inlined = self.function().filter(|frame| frame.inlined && names == Names::Demangled);
        let place = match (inlined.and_then(|frame| frame.name(names)), place) {
            (Some(name), Some(place)) if !of_the_elf.is_some_and(is_only_tool) => {
                Some(format!("{}, inlined into {place}", printable(name)))
            }
            (Some(name), _) => Some(printable(name).into_owned()),
            (None, place) => place,
        };
        format!("BUG: KASAN: {} in {}", self.kind, place.as_deref().unwrap_or(NO_SYMBOL))
    }
}

/// `func+0xoff/0xsize`, if the function is known; with `[module]` if it is of one.
pub(super) fn place(frame: &Frame, names: Names) -> Option<String> {
    let name = frame.name(names)?;
    let place = format!("{}+{:#x}/{:#x}", printable(name), frame.offset, frame.size);
    Some(match &frame.module {
        // As the kernel prints it, for `decode_stacktrace.sh`.
        Some(module) => format!("{place} [{}]", printable(module)),
        None => place,
    })
}
