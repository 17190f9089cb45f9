//! Draws the shadow around an address: a cell for each granule.

use std::fmt::Write;

use umbra_shadow::codes::*;

use super::super::{Finding, ROW_SHADOW};

/// The meaning of a shadow byte: the class of its cell, and words for the legend.
fn meaning(code: u8) -> (&'static str, &'static str) {
    match code {
        0 => ("valid", "accessible"),
        1..8 => ("part", "first bytes accessible, as many as the digit says"),
        FREE_PAGE => ("freed", "free page"),
        LARGE_REDZONE => {
            ("zone", "redzone of a large allocation, or an object that was never handed out")
        }
        SLAB_REDZONE => ("zone", "slab redzone"),
        GLOBAL_REDZONE => ("zone", "redzone of a global variable"),
        SLAB_FREE => ("freed", "freed object"),
        SLAB_FREE_TRACK => ("freed", "freed object, its free recorded"),
        // The same value as `VMALLOC_INVALID`.
        USE_AFTER_SCOPE => {
            ("stack", "variable out of scope, or virtual memory that is not allocated")
        }
        STACK_LEFT => ("stack", "stack, left redzone"),
        STACK_MID => ("stack", "stack, middle redzone"),
        STACK_RIGHT => ("stack", "stack, right redzone"),
        STACK_PARTIAL => ("stack", "stack, partial redzone"),
        ALLOCA_LEFT => ("stack", "alloca, left redzone"),
        ALLOCA_RIGHT => ("stack", "alloca, right redzone"),
        _ => ("other", "not accessible"),
    }
}

/// Draws the shadow in `finding`, with a legend. All text in it is from this file.
pub fn draw(finding: &Finding) -> String {
    let dump = &finding.shadow;
    if dump.rows.is_empty() {
        return "<p class=note>The address has no shadow.</p>".into();
    }
    let mut out = String::new();
    let caret = dump.caret();
    let object = finding.object.as_ref().filter(|object| object.size > 0);
    let object = object.map(|object| object.start..=object.start.saturating_add(object.size - 1));
    let mut present: Vec<u8> = Vec::new();
    let mut object_seen = false;
    out.push_str(
        "<div class=scroll tabindex=0 role=region aria-label='Shadow around the address'>\
         <table class=shadow>",
    );
    for (i, row) in dump.rows.iter().enumerate() {
        let _ = write!(out, "<tr><th scope=row>{:016x}</th>", row.address);
        for (j, &code) in row.bytes.iter().enumerate() {
            let code_of_group = if (1..8).contains(&code) { 1 } else { code };
            if !present.contains(&code_of_group) {
                present.push(code_of_group);
            }
            let first = row.address.wrapping_add(j as u64 * GRANULE);
            let inside = object.as_ref().is_some_and(|object| {
                first <= *object.end() && first.saturating_add(GRANULE - 1) >= *object.start()
            });
            object_seen |= inside;
            let bad = caret == Some((i, j));
            let class = meaning(code).0;
            let mark = match (inside, bad) {
                (false, false) => "",
                (true, false) => " obj",
                (false, true) => " bad",
                (true, true) => " obj bad",
            };
            if bad {
                let words = meaning(code).1;
                let _ = write!(
                    out,
                    "<td class='{class}{mark}' title='{:#x}: {words}'><b>{code:02x}</b>\
                     <span class=vh> first bad</span>",
                    dump.first_bad
                );
            } else if mark.is_empty() {
                let _ = write!(out, "<td class={class}>{code:02x}");
            } else {
                let _ = write!(out, "<td class='{class}{mark}'>{code:02x}");
            }
        }
        out.push_str("</tr>");
    }
    out.push_str("</table></div><ul class=legend>");
    if caret.is_some() {
        out.push_str("<li><i class='key bad'></i>first bad granule</li>");
    }
    if object_seen {
        out.push_str("<li><i class='key obj'></i>the object</li>");
    }
    present.sort_unstable();
    for code in present {
        let (class, words) = meaning(code);
        let digits = if (1..8).contains(&code) { "01–07".into() } else { format!("{code:02x}") };
        let _ = write!(out, "<li><i class='key {class}'></i><code>{digits}</code> {words}</li>");
    }
    let _ = write!(
        out,
        "</ul><p class=note>A cell is {GRANULE} bytes, a row {} bytes.</p>",
        ROW_SHADOW as u64 * GRANULE
    );
    out
}
