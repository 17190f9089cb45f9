//! The declaration of a global variable, from the debug information.
//!
//! Each lookup reads the units from the start and keeps nothing: findings on globals are few, and
//! tables of all variables of a kernel would be large. Lookups of variables have a budget of their
//! own, so that a slow one does not cost frames their lines.

use std::sync::Arc;
use std::time::Duration;

use gimli::{AttributeValue, DebugInfoOffset, Operation, Unit, UnitOffset, constants};

use super::contents::Blocks;
use super::dwarf::{lossy, section};
use super::reader::{Limits, Reader};
use super::table::Elf;

/// Time limit of a lookup.
const TIME: Duration = Duration::from_secs(2);

/// A place in the source.
pub(super) struct Declaration {
    /// The path when it was compiled.
    pub file: String,
    /// The directory that the compiler ran in.
    pub directory: Option<String>,
    pub line: Option<u32>,
}

/// The debug information of a kernel.
pub(super) struct Variables {
    sections: gimli::Dwarf<Reader>,
    limits: Arc<Limits>,
}

impl Variables {
    /// Notes the ranges of the sections.
    ///
    /// # Errors
    /// They are incomplete.
    pub(super) fn open(file: &Arc<Blocks>, elf: &Elf) -> Result<Self, String> {
        let limits = Arc::new(Limits::new(file.clone()));
        let sections = gimli::Dwarf::load(|id| {
            Ok::<_, String>(Reader::new(
                &limits,
                section(elf, file.len(), id.name())?.unwrap_or_default(),
            ))
        })?;
        Ok(Self { sections, limits })
    }

    /// The declaration of the variable that begins at `address`; `None` if there is none, or it
    /// cannot be read.
    pub(super) fn find(&self, address: u64) -> Option<Declaration> {
        self.limits.start(TIME);
        let mut units = self.sections.units();
        // A bad unit does not stop the search in the others.
        while let Ok(Some(header)) = units.next() {
            let Ok(unit) = self.sections.unit(header) else { continue };
            if let Ok(Some(found)) = self.find_in(&unit, address) {
                return Some(found);
            }
        }
        None
    }

    fn find_in(&self, unit: &Unit<Reader>, address: u64) -> gimli::Result<Option<Declaration>> {
        let mut entries = unit.header.entries_raw(&unit.abbreviations, None)?;
        while !entries.is_empty() {
            let Some(abbreviation) = entries.read_abbreviation()? else { continue };
            let attributes = abbreviation.attributes();
            let located = |a: &gimli::AttributeSpecification| a.name() == constants::DW_AT_location;
            if abbreviation.tag() != constants::DW_TAG_variable || !attributes.iter().any(located) {
                entries.skip_attributes(attributes)?;
                continue;
            }
            let (mut here, mut file, mut line, mut other) = (false, None, None, None);
            for specification in attributes {
                let attribute = entries.read_attribute(*specification)?;
                match attribute.name() {
                    constants::DW_AT_location => {
                        here = self.is_at(unit, attribute.value(), address)
                    }
                    constants::DW_AT_decl_file => file = attribute.udata_value(),
                    constants::DW_AT_decl_line => line = attribute.udata_value(),
                    // A definition without a place refers to its declaration.
                    constants::DW_AT_specification | constants::DW_AT_abstract_origin => {
                        other = Some(attribute.value());
                    }
                    _ => {}
                }
            }
            if here {
                let declared = other.and_then(|other| declared(unit, other).ok());
                let (declared_file, declared_line) = declared.unwrap_or_default();
                let line = line.or(declared_line).and_then(|line| u32::try_from(line).ok());
                return Ok(file.or(declared_file).and_then(|file| self.place(unit, file, line)));
            }
        }
        Ok(None)
    }

    /// Whether an expression is just this address.
    fn is_at(&self, unit: &Unit<Reader>, value: AttributeValue<Reader>, address: u64) -> bool {
        let AttributeValue::Exprloc(expression) = value else { return false };
        let mut operations = expression.operations(unit.encoding());
        let at = match operations.next() {
            Ok(Some(Operation::Address { address })) => Some(address),
            Ok(Some(Operation::AddressIndex { index })) => self.sections.address(unit, index).ok(),
            _ => None,
        };
        at == Some(address) && matches!(operations.next(), Ok(None))
    }

    fn place(&self, unit: &Unit<Reader>, file: u64, line: Option<u32>) -> Option<Declaration> {
        let text = |value| Some(lossy(&self.sections.attr_string(unit, value).ok()?)?.into_owned());
        let header = unit.line_program.as_ref()?.header();
        let entry = header.file(file)?;
        let directory = unit.comp_dir.as_ref().and_then(|dir| Some(lossy(dir)?.into_owned()));
        let mut path = String::new();
        let parts =
            [directory.clone(), entry.directory(header).and_then(text), text(entry.path_name())];
        for part in parts.into_iter().flatten() {
            if part.starts_with('/') {
                path = part;
            } else if !part.is_empty() {
                if !path.is_empty() && !path.ends_with('/') {
                    path.push('/');
                }
                path.push_str(&part);
            }
        }
        (!path.is_empty()).then_some(Declaration { file: path, directory, line })
    }
}

/// File and line of an entry in the same unit.
fn declared(
    unit: &Unit<Reader>,
    at: AttributeValue<Reader>,
) -> gimli::Result<(Option<u64>, Option<u64>)> {
    let offset = match at {
        AttributeValue::UnitRef(offset) => offset,
        AttributeValue::DebugInfoRef(DebugInfoOffset(offset)) => {
            let inside = DebugInfoOffset(offset).to_unit_offset(&unit.header);
            inside.unwrap_or(UnitOffset(0))
        }
        _ => UnitOffset(0),
    };
    let entry = unit.entry(offset)?;
    let number = |name| entry.attr(name).and_then(|attribute| attribute.udata_value());
    Ok((number(constants::DW_AT_decl_file), number(constants::DW_AT_decl_line)))
}
