//! Machine code for small guests.

/// Machine code from lines of Intel syntax, as bytes. It can lie at any address. The labels 220 and
/// 221 are taken.
#[macro_export]
macro_rules! guest {
    ($($line:literal),+ $(,)?) => {{
        let (start, end): (*const u8, *const u8);
        // SAFETY: two address calculations; the code goes to a section of its own and is not
        // executed here.
        unsafe {
            std::arch::asm!(
                "lea {0}, [rip + 220f]", "lea {1}, [rip + 221f]",
                ".pushsection .rodata.guest, \"a\"", "220:", $($line,)+ "221:", ".popsection",
                out(reg) start, out(reg) end,
            );
            std::slice::from_raw_parts(start, end.offset_from(start) as usize)
        }
    }};
}
