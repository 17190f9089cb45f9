//! `docs/scenarios.md`: the expected findings of each scenario of the test kernels, and the results
//! in each configuration.
//!
//! Tests make the tables from their findings, and fail where the file differs. With [`WRITE`] set
//! in the environment, as by `cargo xtask scenarios`, they write it.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use umbra::kernel::Expected;
use umbra::verdicts::Verdict;

/// If this is set in the environment, the tests write the file.
pub const WRITE: &str = "UMBRA_WRITE_TABLES";

/// The cases of Linux 6.1's KASAN suite (`mm/kasan/kasan_test.c`) that apply to its generic mode.
pub const SUITE: [&str; 46] = [
    "kmalloc_oob_right",
    "kmalloc_oob_left",
    "kmalloc_node_oob_right",
    "kmalloc_pagealloc_oob_right",
    "kmalloc_pagealloc_uaf",
    "kmalloc_pagealloc_invalid_free",
    "pagealloc_uaf",
    "kmalloc_large_oob_right",
    "krealloc_more_oob",
    "krealloc_less_oob",
    "krealloc_pagealloc_more_oob",
    "krealloc_pagealloc_less_oob",
    "krealloc_uaf",
    "kmalloc_oob_16",
    "kmalloc_uaf_16",
    "kmalloc_oob_in_memset",
    "kmalloc_oob_memset_2",
    "kmalloc_oob_memset_4",
    "kmalloc_oob_memset_8",
    "kmalloc_oob_memset_16",
    "kmalloc_memmove_negative_size",
    "kmalloc_memmove_invalid_size",
    "kmalloc_uaf",
    "kmalloc_uaf_memset",
    "kmalloc_uaf2",
    "kfree_via_page",
    "kfree_via_phys",
    "kmem_cache_oob",
    "kmem_cache_accounted",
    "kmem_cache_bulk",
    "kasan_global_oob_right",
    "kasan_global_oob_left",
    "kasan_stack_oob",
    "kasan_alloca_oob_left",
    "kasan_alloca_oob_right",
    "ksize_unpoisons_memory",
    "ksize_uaf",
    "kmem_cache_double_free",
    "kmem_cache_invalid_free",
    "kmem_cache_double_destroy",
    "kasan_memchr",
    "kasan_memcmp",
    "kasan_strings",
    "kasan_bitops_generic",
    "kmalloc_double_kzfree",
    "vmalloc_oob",
];

/// The findings in a few words; equal ones that follow each other are counted.
fn in_words(found: &[Expected]) -> String {
    if found.is_empty() {
        return "silent".into();
    }
    let mut words: Vec<(String, usize)> = Vec::new();
    for one in found {
        let offset = one.offset.map(|offset| format!(" at {offset}")).unwrap_or_default();
        let size = if one.access == "Free" { String::new() } else { format!(" {}", one.size) };
        let text = format!("{}: {}{size}{offset}", one.kind, one.access);
        match words.last_mut() {
            Some((last, times)) if *last == text => *times += 1,
            _ => words.push((text, 1)),
        }
    }
    let words: Vec<_> = words
        .into_iter()
        .map(|(text, times)| if times > 1 { format!("{text} ({times} times)") } else { text })
        .collect();
    words.join("; ")
}

/// A cell: that the findings are the expected ones, or the findings.
fn cell(verdict: &Verdict) -> String {
    match (verdict.good(), verdict.found.len()) {
        (true, 0) => "silent".into(),
        (true, 1) => "found".into(),
        (true, n) => format!("all {n} found"),
        (false, _) if !verdict.ran => "did not run to its end".into(),
        (false, _) => format!("**{}**", in_words(&verdict.found)),
    }
}

/// The result of one scenario: what most configurations have, and those that differ.
fn result(configurations: &[(&str, &[Verdict])], row: usize) -> String {
    let mut results: Vec<(String, Vec<&str>)> = Vec::new();
    for (title, verdicts) in configurations {
        assert_eq!(verdicts[row].name, configurations[0].1[row].name);
        let cell = cell(&verdicts[row]);
        match results.iter_mut().find(|(other, _)| *other == cell) {
            Some((_, titles)) => titles.push(title),
            None => results.push((cell, vec![title])),
        }
    }
    results.sort_by_key(|(_, titles)| std::cmp::Reverse(titles.len()));
    let (most, others) = results.split_first().expect("there is a configuration");
    let others = others.iter().map(|(cell, titles)| format!("; {}: {cell}", titles.join(" and ")));
    others.fold(most.0.clone(), |text, other| text + &other)
}

/// A table of the scenarios that `wanted` accepts, with the results of all configurations. All have
/// the same scenarios in the same order.
///
/// # Panics
/// They do not.
pub fn table(configurations: &[(&str, &[Verdict])], wanted: impl Fn(&str) -> bool) -> String {
    let mut text = String::from("| scenario | expected | result |\n| --- | --- | --- |\n");
    let (_, first) = configurations.first().expect("there is one");
    for (row, verdict) in first.iter().enumerate().filter(|(_, verdict)| wanted(&verdict.name)) {
        let _ = write!(text, "| {} | {} | ", verdict.name, in_words(&verdict.expected));
        text.push_str(&result(configurations, row));
        text.push_str(" |\n");
    }
    text
}

/// Compares `content` with a section of the file, which is between two comments that name it; or
/// writes it there.
///
/// # Panics
/// The file differs, or cannot be read or written.
pub fn hold(section: &str, content: &str) {
    static FILE: Mutex<()> = Mutex::new(());
    let _alone = FILE.lock().unwrap_or_else(PoisonError::into_inner);
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../docs/scenarios.md");
    let file = std::fs::read_to_string(&path)
        .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let (begin, end) = (format!("<!-- {section} -->\n"), format!("<!-- end of {section} -->"));
    let parts = file.split_once(&begin).and_then(|(before, rest)| {
        let (old, after) = rest.split_once(&end)?;
        Some((before, old, after))
    });
    let (before, old, after) =
        parts.unwrap_or_else(|| panic!("docs/scenarios.md has no section {section}"));
    let content = format!("\n{}\n\n", content.trim());
    if std::env::var_os(WRITE).is_some() {
        std::fs::write(&path, format!("{before}{begin}{content}{end}{after}"))
            .expect("it can be written");
        return;
    }
    let differs = old.lines().zip(content.lines()).find(|(old, new)| old != new);
    assert!(
        old == content,
        "docs/scenarios.md differs from the findings: `cargo xtask scenarios` writes it. \
         The first difference: {differs:?}"
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(kind: &str, access: &str, size: u64, offset: Option<i64>) -> Expected {
        Expected { kind: kind.into(), access: access.into(), size, offset }
    }

    #[test]
    fn tables_say_what_was_not_as_expected() {
        let expected = vec![one("oob", "Write", 8, Some(9)), one("oob", "Write", 8, Some(9))];
        let verdict =
            |ran, found| Verdict { name: "a".into(), ran, expected: expected.clone(), found };
        let good = [verdict(true, expected.clone())];
        let bad = [verdict(true, vec![one("double-free", "Free", 0, None)])];
        let dead = [verdict(false, expected.clone())];
        assert_eq!(
            table(&[("sync", &bad), ("ring", &good), ("full", &dead), ("off", &dead)], |_| true),
            "| scenario | expected | result |\n| --- | --- | --- |\n\
             | a | oob: Write 8 at 9 (2 times) | did not run to its end; \
             sync: **double-free: Free**; ring: all 2 found |\n"
        );
        assert_eq!(table(&[("ring", &good)], |_| false).lines().count(), 2);
    }
}
