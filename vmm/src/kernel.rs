//! The test kernel that is built into Umbra, and the expected findings of its scenarios.

use object::{Object as _, ObjectSection as _};
use thiserror::Error;

use crate::sandbox::Irqchip;

/// The section that describes the scenarios.
const SECTION: &str = ".umbra.scenarios";

/// An expected finding of a scenario.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expected {
    /// The kind of bug, as reports name it: `slab-out-of-bounds`.
    pub kind: String,
    /// `Read`, `Write` or `Free`.
    pub access: String,
    /// Bytes of the access.
    pub size: u64,
    /// Offset of the first bad byte from the start of the object or variable; none if there is
    /// neither.
    pub offset: Option<i64>,
}

/// Something that the test kernel does on request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scenario {
    /// Its name on the kernel's command line.
    pub name: String,
    /// Its expected findings, in order; none if it must stay silent.
    pub expected: Vec<Expected>,
    /// What it does, in a few words.
    pub about: String,
}

/// Why the scenarios of a kernel cannot be read.
#[derive(Debug, Error)]
pub enum ScenarioError {
    /// The file is not an ELF file.
    #[error("the test kernel is not an ELF file that can be read")]
    NotElf(#[source] object::Error),
    /// It was built without scenarios, or stripped of them.
    #[error("the test kernel has no section {SECTION}")]
    NoSection,
    /// The section's content is outside of the file.
    #[error("the test kernel's section {SECTION} cannot be read")]
    Unreadable(#[source] object::Error),
    /// The section is not text.
    #[error("the test kernel's section {SECTION} is not text")]
    NotText(#[source] std::str::Utf8Error),
    /// A line is not `name|verdict|description`.
    #[error(
        "the test kernel describes a scenario as {line:?}, which is not `name|verdict|description`"
    )]
    Line {
        /// The line.
        line: String,
    },
    /// A verdict is neither `silent` nor `kind access size offset`.
    #[error("scenario {scenario}: {verdict:?} is neither `silent` nor `kind access size offset`")]
    Verdict {
        /// The scenario's name.
        scenario: String,
        /// The wrong verdict.
        verdict: String,
    },
}

/// The test kernel's ELF file, if Umbra was built with one (`cargo xtask guest` builds it).
pub fn test_kernel() -> Option<&'static [u8]> {
    #[cfg(umbra_kernel)]
    return Some(include_bytes!(env!("UMBRA_KERNEL_FILE")));
    #[cfg(not(umbra_kernel))]
    None
}

/// The interrupt controllers that the test kernel needs: its CPUs start and wake each other through
/// them, and one alone has no use for them. Without them it has less to set up, and what it costs
/// repeats exactly.
pub fn irqchip(cpus: u8) -> Irqchip {
    if cpus > 1 { Irqchip::On } else { Irqchip::Off }
}

/// The scenarios of a test kernel, in the order in which it runs them.
///
/// # Errors
/// `elf` is not a kernel that describes its scenarios, or does so wrongly.
pub fn scenarios(elf: &[u8]) -> Result<Vec<Scenario>, ScenarioError> {
    let file = object::File::parse(elf).map_err(ScenarioError::NotElf)?;
    let section = file.section_by_name(SECTION).ok_or(ScenarioError::NoSection)?;
    let text = section.data().map_err(ScenarioError::Unreadable)?;
    let text = std::str::from_utf8(text).map_err(ScenarioError::NotText)?;
    text.lines().filter(|line| !line.is_empty()).map(scenario).collect()
}

fn scenario(line: &str) -> Result<Scenario, ScenarioError> {
    let mut parts = line.splitn(3, '|');
    let (Some(name), Some(verdict), Some(about)) = (parts.next(), parts.next(), parts.next())
    else {
        return Err(ScenarioError::Line { line: line.to_owned() });
    };
    let expected = match verdict {
        "silent" => Vec::new(),
        findings => {
            let read = |verdict: &str| {
                expected(verdict).ok_or_else(|| ScenarioError::Verdict {
                    scenario: name.to_owned(),
                    verdict: verdict.to_owned(),
                })
            };
            findings.split(';').map(read).collect::<Result<_, _>>()?
        }
    };
    Ok(Scenario { name: name.to_owned(), expected, about: about.to_owned() })
}

fn expected(verdict: &str) -> Option<Expected> {
    let mut words = verdict.split_ascii_whitespace();
    let (kind, access) = (words.next()?, words.next()?);
    let size = words.next()?.parse().ok()?;
    let offset = match words.next()? {
        "-" => None,
        bytes => Some(bytes.parse().ok()?),
    };
    let known = matches!(access, "Read" | "Write" | "Free") && words.next().is_none();
    known.then(|| Expected { kind: kind.to_owned(), access: access.to_owned(), size, offset })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Vec<Scenario>, ScenarioError> {
        scenarios(&umbra_testkit::elf::with_section(SECTION, text.as_bytes()))
    }

    #[test]
    fn verdicts_are_read() {
        let text = "quiet|silent|does no harm | at all\n\
                    wild|wild-memory-access Read 8 -;double-free Free 0 0|two\n\
                    moves|out-of-bounds Read 18446744073709551614 -4|moves -2 bytes\n";
        let of = |kind: &str, access: &str, size, offset| Expected {
            kind: kind.into(),
            access: access.into(),
            size,
            offset,
        };
        let found = read(text).unwrap();
        assert_eq!(
            found.iter().map(|s| s.name.as_str()).collect::<Vec<_>>(),
            ["quiet", "wild", "moves"]
        );
        assert_eq!(found[0].about, "does no harm | at all");
        assert!(found[0].expected.is_empty());
        assert_eq!(
            found[1].expected,
            [of("wild-memory-access", "Read", 8, None), of("double-free", "Free", 0, Some(0))]
        );
        assert_eq!(found[2].expected, [of("out-of-bounds", "Read", u64::MAX - 1, Some(-4))]);
        assert!(read("").unwrap().is_empty());
    }

    #[test]
    fn wrong_descriptions_are_named() {
        for line in ["lonely", "name|silent"] {
            assert!(
                matches!(read(line), Err(ScenarioError::Line { line: named }) if named == line),
                "{line}"
            );
        }
        for bad in [
            "",
            "loud",
            "k Read 1",
            "k Read x 1",
            "k Look 1 1",
            "k Read 1 1 1",
            "k Read 1 1;",
            "k Read -1 0",
        ] {
            let error = read(&format!("s|{bad}|about")).unwrap_err();
            assert!(
                matches!(&error, ScenarioError::Verdict { scenario, .. } if scenario == "s"),
                "{bad}: {error}"
            );
        }
    }

    #[test]
    fn files_without_descriptions_are_refused() {
        assert!(matches!(scenarios(b"not a kernel"), Err(ScenarioError::NotElf(_))));
        assert!(matches!(
            scenarios(&umbra_testkit::elf::with_section(".text", b"")),
            Err(ScenarioError::NoSection)
        ));
        assert!(matches!(
            scenarios(&umbra_testkit::elf::with_section(SECTION, b"\xff|silent|x")),
            Err(ScenarioError::NotText(_))
        ));
        let mut cut = umbra_testkit::elf::with_section(SECTION, b"name|silent|about");
        // `e_shoff` leads to the section headers. The first is empty, the second this section's.
        // Make its `sh_offset` lead out of the file.
        let headers = u64::from_le_bytes(cut[40..48].try_into().unwrap()) as usize;
        cut[headers + 64 + 24..][..8].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(matches!(scenarios(&cut), Err(ScenarioError::Unreadable(_))));
    }

    #[test]
    fn the_built_in_kernel_describes_its_scenarios() {
        let kernel = umbra_skip::need!(test_kernel().ok_or("built without the test kernel"));
        let all = scenarios(kernel).unwrap();
        assert!(all.iter().any(|s| s.name == "kmalloc_oob_right" && !s.expected.is_empty()));
        assert!(all.iter().filter(|s| s.expected.is_empty()).count() >= 10);
    }
}
