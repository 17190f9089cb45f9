//! Symbols and debug information of hostile files: the kernel's ELF file and those of its modules,
//! with the bounds that the symbol worker has, but in this process.

use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{LazyLock, Mutex, PoisonError};

use arbitrary::{Arbitrary, Unstructured};
use umbra::report::symbols::{Module, ModuleSymbol, Position, Symbols};
use umbra::report::{AccessKind, Distinct, Finding, Findings, Frame, Variable, json, text};
use umbra_testkit::elf::ElfBuilder;

use crate::{request, show};

/// Where modules are in a guest.
const MODULE: u64 = 0xffff_ffff_c000_0000;
/// The kernel's first address.
const KERNEL: u64 = 0x10_0000;
/// Most frames of one address.
const FRAMES_MAX: usize = 65;
/// Names of sections with debug information.
const SECTIONS: [&str; 16] = [
    ".debug_info",
    ".debug_abbrev",
    ".debug_line",
    ".debug_str",
    ".debug_line_str",
    ".debug_ranges",
    ".debug_rnglists",
    ".debug_addr",
    ".debug_aranges",
    ".debug_str_offsets",
    ".debug_types",
    ".debug_loclists",
    ".zdebug_info",
    ".data",
    ".rela.debug_info",
    ".modinfo",
];

/// An ELF file in parts, which a mutation of bytes would seldom keep whole.
#[derive(Debug, Arbitrary)]
struct Parts {
    functions: Vec<(u8, u16, u16)>,
    sections: Vec<(u8, Vec<u8>)>,
    code: u8,
    addresses: [u16; 4],
}

/// A folder for the files of modules, which its process removes.
struct Folder(PathBuf);

/// The folder, and whoever writes to it.
static FOLDER: LazyLock<io::Result<Mutex<Folder>>> = LazyLock::new(|| {
    let shared = PathBuf::from("/dev/shm");
    let parent = if shared.is_dir() { shared } else { std::env::temp_dir() };
    let folder = parent.join(format!("umbra-fuzz-{}", std::process::id()));
    std::fs::create_dir_all(&folder)?;
    extern "C" fn remove() {
        if let Ok(folder) = &*FOLDER {
            let folder = folder.lock().unwrap_or_else(PoisonError::into_inner);
            // There is nobody to report an error to.
            let _ = std::fs::remove_dir_all(&folder.0);
        }
    }
    // SAFETY: the function may be called at any time.
    unsafe { libc::atexit(remove) };
    Ok(Mutex::new(Folder(folder)))
});

/// Reads the file that the bytes are or describe. A relocatable ELF file is one of a module.
pub fn run(data: &[u8]) {
    let is_elf = data.starts_with(b"\x7fELF");
    if is_elf && data.get(16) == Some(&1) {
        return module(data);
    }
    let (file, more) = if is_elf { (data.to_vec(), Vec::new()) } else { parts(data) };
    let symbols = Symbols::from_elf(file);
    let field = data.get(24..32).and_then(|field| field.try_into().ok());
    let entry = field.map_or(KERNEL, u64::from_le_bytes);
    let image = symbols.image();
    let middle = image.start.wrapping_add(image.end.wrapping_sub(image.start) / 2);
    let mut addresses = vec![entry, image.start, middle, image.end, KERNEL + 1, u64::MAX];
    addresses.extend(more);
    ask(&symbols, &addresses, image);
}

/// Builds a file. Returns addresses to look up, too.
fn parts(data: &[u8]) -> (Vec<u8>, Vec<u64>) {
    let Ok(parts) = Parts::arbitrary_take_rest(Unstructured::new(data)) else {
        return Default::default();
    };
    show(&parts);
    let mut elf = ElfBuilder::new(KERNEL).segment(KERNEL, vec![parts.code; 256]);
    for (name, start, size) in parts.functions {
        // Names that are mangled in one way or another.
        let name = match name % 4 {
            0 => format!("f{name}"),
            1 => format!("_ZN4core3f{name}17h0123456789abcdefE"),
            2 => format!("_RNvC{name}"),
            _ => "_ZN".repeat(name.into()),
        };
        elf = elf.function(name, KERNEL + u64::from(start), size.into());
    }
    for (name, contents) in parts.sections {
        elf = elf.section(SECTIONS[usize::from(name) % SECTIONS.len()], contents);
    }
    (elf.build(), parts.addresses.map(|at| KERNEL + u64::from(at)).into())
}

/// The file of a module, which is relocated before it is read.
fn module(data: &[u8]) {
    let Ok(folder) = &*FOLDER else { return };
    let folder = folder.lock().unwrap_or_else(PoisonError::into_inner);
    if std::fs::write(folder.0.join("m.ko"), data).is_err() {
        return;
    }
    let symbols = Symbols::from_elf(Vec::new()).with_modules_in(Some(folder.0.clone()));
    let symbol = |(name, start): (&str, u64)| ModuleSymbol {
        name: name.into(),
        start: MODULE + start,
        size: 16,
        code: true,
    };
    let known = [("f", 0), ("main", 0x10), ("init_module", 0x20), ("x", 0x40)].map(symbol);
    let parts = [(MODULE, 0x1000), (MODULE + 0x10_0000, 0x1000)];
    symbols.add_module(Module::new("m".into(), parts, known.into()));
    let addresses = [0, 1, 0x10, 0x11, 0x20, 0x48, 0xfff, 0x10_0000].map(|at| MODULE + at);
    ask(&symbols, &addresses, 0..0);
}

/// Looks addresses up, and makes a finding of what comes back.
pub fn ask(symbols: &Symbols, addresses: &[u64], image: Range<u64>) {
    let mut frames = Vec::<Frame>::new();
    let mut variable = None;
    for address in addresses {
        symbols.begin();
        for position in [Position::Return, Position::Instruction] {
            let found = request(|| symbols.frames(*address, position));
            assert!(!found.is_empty() && found.len() <= FRAMES_MAX, "{} frames", found.len());
            frames.extend(found);
        }
        request(|| symbols.lookup(*address));
        variable = request(|| symbols.lookup_data(*address));
        let mut declared = Variable { start: *address, ..Variable::default() };
        request(|| symbols.declare(&mut declared));
        variable = variable.or(Some(declared));
    }
    let notes = symbols.notes();
    assert!(notes.len() <= 12, "{notes:?}");
    let finding = Finding { frames, variable, notes, image, ..Finding::new(AccessKind::Read) };
    let mut findings = Findings::new(Distinct::default(), 1);
    findings.add(finding);
    if let Some((finding, _)) = findings.get(0) {
        check(finding);
    }
}

/// Whether a finding is of a size and of characters that can be shown.
pub fn check(finding: &Finding) {
    /// Most bytes of a finding as text, and as JSON (docs/security.md).
    const TEXT_MAX: usize = 64 << 10;
    const JSON_MAX: usize = 512 << 10;
    let text = text::to_string(finding, text::TextStyle::default());
    assert!(text.len() <= TEXT_MAX, "a finding of {} bytes", text.len());
    let bad = text.chars().find(|c| c.is_control() && *c != '\n' && *c != '\t');
    assert!(bad.is_none(), "a finding with {bad:?}: {text}");
    let mut line = Vec::new();
    json::write(&mut line, finding).expect("it is written to memory");
    assert!(line.len() <= JSON_MAX, "a finding of {} bytes", line.len());
    assert_eq!(line.iter().filter(|byte| **byte == b'\n').count(), 1, "one line of JSON");
}
