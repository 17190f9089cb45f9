//! Names of functions as parts of a bug's identity: without what changes from build to build, and
//! told apart by whether the function is only the tool of its caller.

use super::printable::printable;

/// Crates whose functions do what their caller wants: the memory errors in them are the caller's.
const LIBRARIES: [&str; 6] =
    ["core", "alloc", "std", "compiler_builtins", "__rustc", "umbra_guest"];

/// Functions in C that work on memory or text for their caller, by names without leading
/// underscores. In Rust the last part of a path is looked up here, too. Sorted.
#[rustfmt::skip]
const MEMORY: [&str; 51] = [
    "bcmp", "bcopy", "bzero", "check_region_inline", "instrument_atomic_read",
    "instrument_atomic_read_write", "instrument_atomic_write", "instrument_read",
    "instrument_read_write", "instrument_write", "kasan_check_byte", "kasan_check_range",
    "kasan_check_read", "kasan_check_write", "memchr", "memchr_inv", "memcmp", "memcpy",
    "memcpy_and_pad", "memmove", "memscan", "memset", "memset16", "memset32", "memset64",
    "memzero_explicit", "stpcpy", "strcasecmp", "strcat", "strchr", "strchrnul", "strcmp", "strcpy",
    "strcspn", "strlcat", "strlcpy", "strlen", "strncasecmp", "strncat", "strnchr", "strncmp",
    "strncpy", "strnlen", "strnstr", "strpbrk", "strrchr", "strscpy", "strscpy_pad", "strsep",
    "strspn", "strstr",
];

/// Functions of allocators, by names as in [`MEMORY`].
#[rustfmt::skip]
const ALLOCATORS: [&str; 93] = [
    "aligned_alloc", "alloc_pages", "alloc_pages_bulk", "alloc_pages_bulk_array",
    "alloc_pages_exact", "alloc_pages_node", "cache_free", "calloc", "do_kmalloc",
    "do_kmalloc_node", "do_kmem_cache_free", "do_krealloc", "do_slab_free", "folio_alloc", "free",
    "free_page", "free_pages", "free_pages_exact", "get_free_page", "get_free_pages",
    "get_zeroed_page", "kasan_kmalloc", "kasan_kmalloc_large", "kasan_krealloc",
    "kasan_save_alloc_info", "kasan_save_free_info", "kasan_save_stack", "kasan_set_track",
    "kasan_slab_alloc", "kasan_slab_free", "kcalloc", "kcalloc_node", "kfree", "kfree_const",
    "kfree_sensitive", "kmalloc", "kmalloc_array", "kmalloc_array_node", "kmalloc_large",
    "kmalloc_large_node", "kmalloc_node", "kmalloc_node_trace", "kmalloc_node_track_caller",
    "kmalloc_order", "kmalloc_order_trace", "kmalloc_trace", "kmalloc_track_caller",
    "kmem_cache_alloc", "kmem_cache_alloc_bulk", "kmem_cache_alloc_lru", "kmem_cache_alloc_node",
    "kmem_cache_alloc_trace", "kmem_cache_free", "kmem_cache_free_bulk", "kmem_cache_zalloc",
    "kmemdup", "kmemdup_nul", "krealloc", "krealloc_array", "ksize", "kstrdup", "kstrdup_const",
    "kstrndup", "kvcalloc", "kvfree", "kvfree_sensitive", "kvmalloc", "kvmalloc_array",
    "kvmalloc_node", "kvrealloc", "kvzalloc", "kzalloc", "kzalloc_node", "kzfree", "malloc",
    "memalign", "posix_memalign", "realloc", "slab_alloc", "slab_alloc_node", "slab_free",
    "slab_free_freelist_hook", "slab_free_hook", "slab_post_alloc_hook", "slab_pre_alloc_hook",
    "vfree", "vmalloc", "vmalloc_node", "vmalloc_user", "vrealloc", "vzalloc", "vzalloc_node",
    "zalloc",
];

/// What names of tools in C begin with that compilers, linkers and checkers make.
const TOOL_PREFIXES: [&str; 7] =
    ["__asan_", "__hwasan_", "__kasan_", "__wrap_", "__fortify_", "__builtin_", "umbra_"];

/// What rustc's functions for allocators begin with.
const RUST_PREFIXES: [&str; 3] = ["__rust_", "__rdl_", "__rg_"];

/// A function's name without what changes from build to build: rustc's hashes, the numbers of
/// closures, the values of generic parameters, and what gcc and LLVM add to the names of copies
/// (`.isra.0`, `.cold`). Control characters are replaced.
///
/// `name` is demangled and bounded, as in a frame; the work is linear in its length.
pub(super) fn plain(name: &str) -> String {
    let name = strip_hash(name);
    let mut plain = String::with_capacity(name.len());
    // For each open angle bracket: whether what is in it is dropped.
    let mut open: Vec<bool> = Vec::new();
    let mut dropped = 0_usize;
    let mut chars = name.chars().peekable();
    let mut before = None;
    while let Some(c) = chars.next() {
        let last = before.replace(c);
        match c {
            '<' => {
                let generic = is_generic(&plain) && !rest_begins(&chars, "impl ");
                if generic && dropped == 0 {
                    plain.truncate(plain.trim_end_matches("::").len());
                }
                open.push(generic);
                dropped += usize::from(generic);
                if dropped == 0 {
                    plain.push(c);
                }
            }
            // Not the arrow of a function's type.
            '>' if last != Some('-') => {
                let was_dropped = dropped > 0;
                dropped -= usize::from(open.pop().unwrap_or(false));
                if !was_dropped {
                    plain.push(c);
                }
            }
            _ if dropped > 0 => {}
            // The hash of a crate: `kernel[1a2b3c]`.
            '[' if last.is_some_and(|last| last.is_alphanumeric() || last == '_') => {
                let _ = chars.by_ref().find(|c| *c == ']');
            }
            // `{closure#0}`
            '#' => while chars.next_if(char::is_ascii_digit).is_some() {},
            '.' if open.is_empty() && !plain.is_empty() => break,
            _ => plain.push(c),
        }
    }
    printable(&plain.replace("{{", "{").replace("}}", "}")).into_owned()
}

/// Whether an angle bracket behind `text` begins a list of generic arguments, and not the type of
/// `<Type as Trait>::function`.
fn is_generic(text: &str) -> bool {
    text.ends_with(|c: char| c.is_alphanumeric() || matches!(c, '_' | ':' | '}' | '>' | ']'))
}

fn rest_begins(chars: &std::iter::Peekable<std::str::Chars>, text: &str) -> bool {
    text.chars().eq(chars.clone().take(text.len()))
}

/// The name without the `::h0123456789abcdef` of rustc's older mangling.
fn strip_hash(name: &str) -> &str {
    let hash = |hash: &str| hash.len() == 16 && hash.bytes().all(|b| b.is_ascii_hexdigit());
    match name.rsplit_once("::h") {
        Some((rest, end)) if hash(end) => rest,
        _ => name,
    }
}

/// Whether a function is only the tool of its caller: one of Rust's libraries, a function that
/// copies, fills or compares memory, part of an allocator's interface, or the compiler's glue.
///
/// `plain` is a name from [`plain`]. `file` is the source file of its line. It tells where an
/// inlined function comes from if the debug information has only the end of its name.
pub(super) fn is_tool(plain: &str, file: Option<&str>) -> bool {
    if file.is_some_and(is_in_library) || is_allocator(plain) || plain.contains("{shim") {
        return true;
    }
    if let Some((of, name)) = qualified(plain) {
        let is_library = |path: &str| LIBRARIES.contains(&root(path));
        return match name {
            // What passes a call on to a closure, whoever implements it.
            Some(name) if is_library(name) && ends_with(name, &["Fn", "FnMut", "FnOnce"]) => true,
            Some(name) => is_foreign(of) && is_library(name),
            None => is_foreign(of),
        };
    }
    if plain.contains("::") {
        return LIBRARIES.contains(&root(plain)) || is_listed(plain, &MEMORY);
    }
    is_listed(plain, &MEMORY) || TOOL_PREFIXES.iter().any(|prefix| plain.starts_with(prefix))
}

/// Whether a function belongs to the interface of an allocator. What it calls belongs to the
/// allocator, too. `plain` is a name from [`plain`].
pub(super) fn is_allocator(plain: &str) -> bool {
    match qualified(plain) {
        Some((_, Some(name))) => {
            LIBRARIES.contains(&root(name)) && ends_with(name, &["GlobalAlloc", "Allocator"])
        }
        Some((_, None)) => false,
        None => {
            let last = last_part(plain);
            is_listed(plain, &ALLOCATORS) || RUST_PREFIXES.iter().any(|it| last.starts_with(it))
        }
    }
}

/// A file of Rust's libraries or of Umbra's bindings for Rust.
fn is_in_library(file: &str) -> bool {
    let of_rust = |name: &str| {
        file.split_once(name).is_some_and(|(before, _)| before.is_empty() || before.ends_with('/'))
    };
    ["library/core/src/", "library/alloc/src/", "library/std/src/", "guest/rust/src/"]
        .into_iter()
        .any(of_rust)
}

/// The type and the trait of `<Type as Trait>::function`, or the type of `<Type>::function`.
fn qualified(plain: &str) -> Option<(&str, Option<&str>)> {
    let rest = plain.strip_prefix('<')?;
    let (inside, _) = rest.split_at(closing(rest));
    Some(match split_as(inside) {
        Some((of, name)) => (of, Some(name)),
        None => (inside, None),
    })
}

fn last_part(path: &str) -> &str {
    path.rsplit("::").next().unwrap_or(path)
}

fn is_listed(path: &str, names: &[&str]) -> bool {
    let name = last_part(path).trim_start_matches('_');
    let name = name.strip_suffix("_noprof").unwrap_or(name);
    names.binary_search(&name).is_ok()
}

/// Whether the path of a trait ends in one of these.
fn ends_with(path: &str, names: &[&str]) -> bool {
    names.contains(&last_part(path))
}

/// Whether a type belongs to the language or its libraries, and not to the kernel.
fn is_foreign(of: &str) -> bool {
    let of = of.trim_start_matches(['&', ' ']);
    let of = of.strip_prefix("mut ").unwrap_or(of);
    // Only a reference to a type counts as that type.
    !of.contains("::") || of.starts_with(['*', '[', '(', '<']) || LIBRARIES.contains(&root(of))
}

/// The crate of a path.
fn root(path: &str) -> &str {
    let path = path.trim_start_matches(['&', '<', ' ']);
    let path = path.strip_prefix("dyn ").unwrap_or(path);
    path.split("::").next().unwrap_or(path)
}

/// The length of the text up to the angle bracket that closes one before it.
fn closing(text: &str) -> usize {
    let (mut depth, mut last) = (1_usize, ' ');
    for (at, c) in text.char_indices() {
        match c {
            '<' => depth += 1,
            '>' if last != '-' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return at;
        }
        last = c;
    }
    text.len()
}

/// Splits `Type as Trait` where no bracket is open.
fn split_as(text: &str) -> Option<(&str, &str)> {
    let mut depth = 0_usize;
    for (at, c) in text.char_indices() {
        match c {
            '<' | '(' | '[' => depth += 1,
            '>' | ')' | ']' => depth = depth.saturating_sub(1),
            ' ' if depth == 0 && text[at..].starts_with(" as ") => {
                return Some((&text[..at], &text[at + " as ".len()..]));
            }
            _ => {}
        }
    }
    None
}

/// A name of a variable without what the compiler adds to make it unique (`buffer.0`).
pub(super) fn plain_variable(name: &str) -> String {
    let unique = |end: &str| !end.is_empty() && end.bytes().all(|b| b.is_ascii_digit());
    let name = match name.rsplit_once('.') {
        Some((rest, end)) if unique(end) && !rest.is_empty() => rest,
        _ => name,
    };
    printable(strip_hash(name)).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lists_of_names_are_sorted() {
        assert!(MEMORY.is_sorted() && ALLOCATORS.is_sorted());
    }

    #[test]
    fn what_changes_from_build_to_build_is_dropped() {
        for (name, expected) in [
            ("kmalloc_oob_right", "kmalloc_oob_right"),
            ("kfree_skb.isra.0", "kfree_skb"),
            ("do_exit.cold", "do_exit"),
            ("f.constprop.3.isra.1", "f"),
            ("f.part.0.llvm.1234567", "f"),
            (".hidden", ".hidden"),
            ("kernel::f::h0123456789abcdef", "kernel::f"),
            ("kernel::hello", "kernel::hello"),
            ("kernel[1a2b3c4d]::f", "kernel::f"),
            ("kernel::f::{closure#0}::{closure#12}", "kernel::f::{closure}::{closure}"),
            ("kernel::f::{{closure}}", "kernel::f::{closure}"),
            ("core::ptr::read_volatile::<u8>", "core::ptr::read_volatile"),
            ("kernel::List<u8, Box<T>>::push", "kernel::List::push"),
            ("kernel::f::<fn(u8) -> u8>::g::<7>", "kernel::f::g"),
            ("<kernel::List<u8>>::push::<u8>", "<kernel::List>::push"),
            ("<kernel::A<kernel::B<u8>> as kernel::T<u8>>::f::<u8>", "<kernel::A as kernel::T>::f"),
            (
                "<<kernel::A as kernel::T>::U as kernel::V>::f",
                "<<kernel::A as kernel::T>::U as kernel::V>::f",
            ),
            ("kernel::m::<impl kernel::T<u8> for u8>::f", "kernel::m::<impl kernel::T for u8>::f"),
            ("<[u8]>::get", "<[u8]>::get"),
            ("a\nb\x1b[31m", r"a\u{a}b\u{1b}[31m"),
        ] {
            assert_eq!(plain(name), expected, "{name}");
        }
        assert_eq!(plain_variable("buffer.0"), "buffer");
        assert_eq!(plain_variable("kernel::TABLE"), "kernel::TABLE");
        assert_eq!(plain_variable("a.b"), "a.b");
    }

    #[test]
    fn tools_are_told_from_functions_of_the_kernel() {
        for tool in [
            "core::ptr::read_volatile::<u8>",
            "core::ptr::mut_ptr::<impl *mut T>::write_volatile",
            "<*mut u64>::write_volatile",
            "<[u32]>::get_unchecked::<usize>",
            "<alloc::vec::Vec<kernel::A> as core::ops::Index<usize>>::index",
            "<T as core::convert::Into<U>>::into",
            "<umbra_guest::Checked<kernel::Heap> as core::alloc::global::GlobalAlloc>::dealloc",
            "<kernel::Heap as core::alloc::global::GlobalAlloc>::alloc",
            "<kernel::f::{closure#0} as core::ops::FnOnce<()>>::call_once::{shim:vtable#0}",
            "<&mut kernel::f::{closure#0} as core::ops::function::FnMut<()>>::call_mut",
            "core::ops::function::FnOnce::call_once{{vtable.shim}}",
            "__rustc::__rust_dealloc",
            "__rust_alloc",
            "__rdl_alloc",
            "compiler_builtins::mem::memcpy",
            "memcpy",
            "__memcpy",
            "memset.part.0",
            "__asan_memcpy",
            "__wrap_memcpy",
            "strlen",
            "kfree",
            "__kmalloc",
            "kmem_cache_alloc_noprof",
            "memory::kmalloc",
            "umbra_guest::free_later",
            "umbra_free_later",
        ] {
            assert!(is_tool(&plain(tool), None), "{tool}");
        }
        for function in [
            "kmalloc_oob_right",
            "kfree_via_page",
            "kasan_strings",
            "wrap_around",
            "asan_init",
            "umbra_kernel::scenarios::f",
            "kernel::mem::copy",
            "core_init",
            "<kernel::Buffer>::memcpy_to",
            "<kernel::A as core::fmt::Display>::fmt",
            "<&kernel::A as core::ops::Add>::add",
            "<kernel::A as core::ops::Drop>::drop",
            "<u8 as kernel::T>::f",
            "<core::slice::Iter<u8> as kernel::T>::f",
            "kernel::m::<impl kernel::T for u8>::f",
            "kernel::f::{closure#0}",
            "",
        ] {
            assert!(!is_tool(&plain(function), None), "{function}");
        }
    }

    #[test]
    fn a_file_tells_what_a_short_name_hides() {
        for file in ["library/core/src/slice/mod.rs", "/umbra/guest/rust/src/lib.rs"] {
            assert!(is_tool("check", Some(file)), "{file}");
        }
        for file in ["src/library/core.rs", "my_library/core/src/lib.rs", "src/check.rs"] {
            assert!(!is_tool("check", Some(file)), "{file}");
        }
    }

    #[test]
    fn allocators_are_told_from_other_tools() {
        for name in [
            "kmalloc",
            "__kmem_cache_free",
            "kernel::memory::kfree",
            "__rustc::__rust_alloc",
            "<kernel::Heap as core::alloc::global::GlobalAlloc>::alloc",
        ] {
            assert!(is_allocator(name), "{name}");
        }
        for name in ["memcpy", "core::ptr::read", "<kernel::Heap>::alloc", "kmalloc_oob_right"] {
            assert!(!is_allocator(name), "{name}");
        }
    }

    /// Names are those of a file that may be hostile.
    #[test]
    fn any_text_is_a_name() {
        let parts =
            ["<", ">", "::", " as ", "->", "{closure#", "[", "]", ".", "é", "core", "\u{0}"];
        for first in parts {
            for second in parts {
                for third in parts {
                    let name = [first, second, third, first, second].concat();
                    let short = plain(&name);
                    assert!(short.len() <= printable(&name).len(), "{name:?}");
                    is_tool(&short, Some(&name));
                }
            }
        }
        let deep = "<".repeat(512) + &">".repeat(512);
        is_tool(&plain(&deep), None);
    }
}
