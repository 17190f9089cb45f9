//! Names of functions and paths of sources, as they are shown.

/// Longest name that is kept, in bytes.
pub(super) const NAME_MAX: usize = 1024;

/// The name in the source, if `raw` is a mangled one; bounded.
pub fn demangle(raw: &str) -> String {
    names(raw.to_owned()).0
}

/// The name in the source, and the name in the ELF if that is another.
pub(super) fn names(mut raw: String) -> (String, Option<String>) {
    let demangled = rustc_demangle::try_demangle(&raw).ok().map(|name| format!("{name:#}"));
    shorten_name(&mut raw);
    match demangled {
        Some(mut name) if name != raw => {
            shorten_name(&mut name);
            (name, Some(raw))
        }
        _ => (raw, None),
    }
}

fn shorten_name(name: &mut String) {
    if name.len() > NAME_MAX {
        name.truncate(name.floor_char_boundary(NAME_MAX));
        name.push_str("...");
    }
}

/// The part of a path that identifies the file: without the folder of the standard library, of
/// Cargo's downloads, or of the compiler's current directory.
pub(super) fn shorten<'a>(path: &'a str, directory: Option<&str>) -> &'a str {
    let after = |mark: &str, names: usize| {
        let (_, mut rest) = path.split_once(mark)?;
        for _ in 0..names {
            rest = rest.split_once('/')?.1;
        }
        Some(rest)
    };
    let inside = || {
        let directory = directory?.trim_end_matches('/');
        path.strip_prefix(directory)?.strip_prefix('/').filter(|rest| !rest.is_empty())
    };
    let rustc = || path.strip_prefix("/rustc/")?.split_once('/').map(|(_, rest)| rest);
    let short = rustc()
        .or_else(|| after("/lib/rustlib/src/rust/", 0))
        .or_else(|| after("/registry/src/", 1))
        .or_else(|| after("/git/checkouts/", 0))
        .or_else(inside);
    short.unwrap_or(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_keep_what_tells_the_file() {
        let home = Some("/home/me/kernel/");
        for (path, short) in [
            ("/home/me/kernel/src/main.rs", "src/main.rs"),
            ("/home/me/kernel2/src/main.rs", "/home/me/kernel2/src/main.rs"),
            ("/rustc/0123abc/library/core/src/ptr/mod.rs", "library/core/src/ptr/mod.rs"),
            (
                "/r/toolchains/x/lib/rustlib/src/rust/library/alloc/src/vec.rs",
                "library/alloc/src/vec.rs",
            ),
            ("/h/.cargo/registry/src/index.crates.io-1/talc-4.0/src/lib.rs", "talc-4.0/src/lib.rs"),
            ("src/main.rs", "src/main.rs"),
            ("/home/me/kernel/", "/home/me/kernel/"),
            ("", ""),
        ] {
            assert_eq!(shorten(path, home), short);
        }
    }

    #[test]
    fn names_are_demangled_and_bounded() {
        let hash = "_ZN6kernel4slab5alloc17h0123456789abcdefE";
        assert_eq!(names(hash.into()), ("kernel::slab::alloc".into(), Some(hash.into())));
        assert_eq!(names("kmalloc".into()), ("kmalloc".into(), None));
        assert_eq!(names("é".repeat(2000)).0.len(), NAME_MAX + 3);
    }
}
