//! Puts the program into its jail: what a command of the command line reads and writes.

use std::path::Path;
use std::sync::Arc;

use anyhow::Result;
use umbra_machine::layout;

use crate::jail::{Jail, Mode, Profile};
use crate::sandbox::Config;
use crate::shadow::Layout;

/// The files of a command, beside those that are open already.
#[derive(Default)]
pub(crate) struct Places<'a> {
    /// Folders in which reports are made.
    pub(crate) write: Vec<&'a Path>,
    /// Guests run one after the other.
    pub(crate) again: bool,
}

/// Enters the jail for a run of `config`, and says once what the host lacks for it.
///
/// # Errors
/// The host refuses, or lacks what `mode` requires.
pub(crate) fn enter(mode: Mode, config: &Config, places: &Places) -> Result<Option<Arc<Jail>>> {
    if mode == Mode::Off {
        return Ok(None);
    }
    let profile = Profile {
        // Files of modules and sources are read by a process of their own.
        read: Vec::new(),
        write: places.write.iter().map(|folder| (*folder).to_owned()).collect(),
        memory: address_space(config),
        cpus: config.cpus,
        again: places.again,
    };
    let jail = Jail::enter(&profile, mode == Mode::Required)?;
    if !jail.missing().is_empty() {
        log::warn!("the jail is weaker here: {}", jail.missing().join(", and "));
    }
    Ok(Some(Arc::new(jail)))
}

/// Most bytes of address space for guest memory, both windows, and the history.
fn address_space(config: &Config) -> u64 {
    // Memory that is too large is refused later.
    let memory = config.memory.min(layout::MAX_MEMORY);
    let windows = Layout::new(layout::ram_end(memory).next_multiple_of(layout::PAGE));
    let windows = windows.map_or(0, |layout| layout.page.bytes + layout.byte.bytes);
    memory + windows + config.provenance.min(layout::MAX_MEMORY).saturating_mul(2)
}
