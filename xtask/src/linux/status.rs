//! `cargo xtask linux status`: lists the versions of Linux's sources, and whether the series
//! applies.

use std::process::ExitCode;

use anyhow::Result;

use super::source::{PACKAGE, Sources};
use super::versions::{self, Verdict};
use crate::context::Context;

/// Prints the table. Exit status 1 if nothing can be built.
pub fn run(context: &Context) -> Result<ExitCode> {
    let sources = Sources::new(context)?;
    let (offered, known) = (sources.offered()?, sources.known()?);
    let mut rows = Vec::new();
    for version in &offered {
        context.progress.step(&format!("trying the patches on {PACKAGE} {version}"));
        rows.push((version.clone(), sources.verdict(version)?));
    }
    sources.tidy()?;
    context.progress.finish();
    let verdict = |version: &str| {
        let row = rows.iter().find(|(other, _)| other == version);
        row.map_or(Verdict::Gone, |(_, verdict)| verdict.clone())
    };
    let choice = versions::choose(&offered, &known, |version| Ok(verdict(version)))?;
    print!("{}", table(&rows, &known, choice.version.as_deref()));
    if let Some(notice) = choice.notice(PACKAGE) {
        println!("{notice}");
    }
    Ok(if choice.version.is_some() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// A line for each version.
fn table(rows: &[(String, Verdict)], known: &[String], built: Option<&str>) -> String {
    let widest = rows.iter().map(|(version, _)| version.len()).max().unwrap_or(0);
    let width = widest.max(PACKAGE.len());
    let mut table = format!("{PACKAGE:width$}  known to work  patches apply\n");
    for (version, verdict) in rows {
        let is_known = if known.contains(version) { "yes" } else { "no" };
        let applies = match verdict {
            Verdict::Works => "yes".to_owned(),
            Verdict::Refused(fault) => format!("no: {fault}"),
            Verdict::Gone => "unknown: it cannot be downloaded".to_owned(),
        };
        let chosen = if built == Some(version) { "  <- the one to build" } else { "" };
        table += &format!("{version:width$}  {is_known:13}  {applies}{chosen}\n");
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_has_a_line_for_each_version() {
        let rows = [
            (
                "6.1.4-1".to_owned(),
                Verdict::Refused("patch 0002 does not apply: a.c has changed".into()),
            ),
            ("6.1.3-1".to_owned(), Verdict::Gone),
            ("6.1.2-1".to_owned(), Verdict::Works),
        ];
        let table = table(&rows, &["6.1.2-1".to_owned()], Some("6.1.2-1"));
        assert_eq!(
            table,
            "linux-source-6.1  known to work  patches apply\n\
             6.1.4-1           no             no: patch 0002 does not apply: a.c has changed\n\
             6.1.3-1           no             unknown: it cannot be downloaded\n\
             6.1.2-1           yes            yes  <- the one to build\n"
        );
    }
}
