//! The symbols of a guest's modules, from guest memory.

use umbra_machine::memory::Ram;
use umbra_machine::walk::AddressSpace;
use umbra_report::symbols::{Module, ModuleSymbol};
use umbra_shadow::abi::{MODULE_INFO_BYTES, MODULE_NAME_MAX, MODULE_SYMBOLS_MAX};

/// Bytes of an `Elf64_Sym`.
const SYMBOL_BYTES: usize = 24;
/// Most bytes of a symbol's name.
const SYMBOL_NAME_MAX: usize = 128;
/// Most bytes of all names of a module.
const NAMES_MAX: usize = 1 << 20;
/// The types of symbols (System V ABI, "Symbol Table").
const OBJECT: u8 = 1;
const FUNCTION: u8 = 2;

/// Reads the module that is described at `va` (a [`ModuleInfo`](umbra_shadow::abi::ModuleInfo)).
/// None if the description cannot be read. Symbols that cannot be read are left out.
pub(super) fn read(va: u64, space: &AddressSpace, ram: &Ram) -> Option<Module> {
    let mut info = [0; MODULE_INFO_BYTES as usize];
    space.read(ram, va, &mut info).ok()?;
    let (module, words) = info.split_at(MODULE_NAME_MAX);
    let mut words = words.chunks_exact(8).map(u64_of);
    let mut next = || words.next().unwrap_or_default();
    let parts = [(next(), next()), (next(), next())];
    let (symbols, count, strings) = (next(), next(), next());
    let (mut found, mut names) = (Vec::new(), 0);
    for i in 0..count.min(MODULE_SYMBOLS_MAX) {
        let mut raw = [0; SYMBOL_BYTES];
        let at = i.checked_mul(SYMBOL_BYTES as u64).and_then(|offset| symbols.checked_add(offset));
        let Some(at) = at else { break };
        if space.read(ram, at, &mut raw).is_err() {
            break;
        }
        let (start, size) = (u64_of(&raw[8..]), u64_of(&raw[16..]));
        let code = match raw[4] & 0xf {
            FUNCTION => true,
            OBJECT => false,
            _ => continue,
        };
        let offset = u32::from_le_bytes([raw[0], raw[1], raw[2], raw[3]]);
        let Some(at) = strings.checked_add(offset.into()) else { continue };
        let mut bytes = [0; SYMBOL_NAME_MAX];
        let len = space.read_some(ram, at, &mut bytes);
        let name = text(bytes.get(..len).unwrap_or_default());
        names += name.len();
        if names > NAMES_MAX {
            break;
        }
        if !name.is_empty() {
            found.push(ModuleSymbol { name: name.into(), start, size, code });
        }
    }
    Some(Module::new(text(module), parts, found))
}

/// The text up to the first zero.
fn text(bytes: &[u8]) -> String {
    let text = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(text).into_owned()
}

/// The first eight bytes as a number; 0 if there are fewer.
fn u64_of(bytes: &[u8]) -> u64 {
    bytes.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes))
}
