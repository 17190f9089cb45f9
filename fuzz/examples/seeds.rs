//! Writes those seeds that are made by hand: bad files of every kind, and answers of a worker.
//!
//! `cargo run --package umbra-fuzz --example seeds` writes them to fuzz/seeds.

use std::fs;
use std::io;
use std::path::Path;

use umbra_testkit::elf::ElfBuilder;

/// Where kernels are loaded.
const START: u64 = 0x10_0000;

fn main() -> io::Result<()> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds");
    let all = [("loader", loader()), ("symbols", symbols()), ("answers", answers())];
    for (target, seeds) in all {
        for (name, bytes) in seeds {
            fs::write(folder.join(target).join(name), bytes)?;
        }
    }
    Ok(())
}

type Seeds = Vec<(&'static str, Vec<u8>)>;

/// `bytes` with other ones from `at` on.
fn with(mut bytes: Vec<u8>, at: usize, new: &[u8]) -> Vec<u8> {
    bytes[at..at + new.len()].copy_from_slice(new);
    bytes
}

fn kernel() -> ElfBuilder {
    ElfBuilder::new(START + 4).segment(START, *b"\x90\x90\x90\x90\xf4code")
}

fn loader() -> Seeds {
    let runtime = kernel().function("umbra_activate", START, 1).function("memcpy", START, 1);
    let note = [&[4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0][..], b"Xen\0", &[4, 0, 0x10, 0]].concat();
    let pvh = kernel().segment(0, note).with(|segment| segment.kind = 4);
    let overlapping = (0..20).fold(kernel(), |elf, _| {
        elf.segment(START, *b"abc").with(|segment| segment.offset = Some(0))
    });
    let sparse = kernel().with(|segment| segment.memory_size = Some(1 << 40));
    let wraps = kernel().with(|segment| segment.gpa = u64::MAX - 3);
    let far = kernel().with(|segment| segment.offset = Some(1 << 42));
    vec![
        ("kernel.elf", kernel().build()),
        ("pvh.elf", pvh.build()),
        ("runtime.elf", runtime.build()),
        ("overlapping.elf", overlapping.build()),
        ("terabyte.elf", sparse.build()),
        ("wraps.elf", wraps.build()),
        ("far.elf", far.build()),
        ("headers.elf", with(kernel().build(), 56, &[0xff, 0xff])),
        ("cut-off.elf", kernel().build()[..63].to_vec()),
        ("bzimage", bzimage(&[])),
        ("bomb.bzimage", bzimage(&bomb())),
    ]
}

/// LZ4 of as many bytes as fit into it: one byte, repeated.
fn bomb() -> Vec<u8> {
    let mut block = vec![0x1f, 0x00, 1, 0];
    block.resize(4000, 0xff);
    block.extend([0, 0x50, 0, 0, 0, 0, 0]);
    let mut packed = 0x184c_2102u32.to_le_bytes().to_vec();
    packed.extend((block.len() as u32).to_le_bytes());
    packed.extend(block);
    packed.extend((1u32 << 20).to_le_bytes());
    packed
}

/// A bzImage with this payload. Its size is not that in the header, so that it has no checksum.
fn bzimage(payload: &[u8]) -> Vec<u8> {
    let mut file = vec![0; 2048];
    file.extend_from_slice(payload);
    file.resize(file.len().next_multiple_of(16) + 17, 0);
    let fields: [(usize, &[u8]); 11] = [
        (0x1f1, &[1]),
        (0x1f4, &64u32.to_le_bytes()),
        (0x201, &[0x6a]),
        (0x202, b"HdrS"),
        (0x206, &[0x0f, 2]),
        (0x211, &[1]),
        (0x22c, &0x7fff_ffffu32.to_le_bytes()),
        (0x236, &[1, 0]),
        (0x248, &1024u32.to_le_bytes()),
        (0x24c, &(payload.len() as u32).to_le_bytes()),
        (0x258, &START.to_le_bytes()),
    ];
    let file = fields.iter().fold(file, |file, (at, bytes)| with(file, *at, bytes));
    with(file, 0x260, &(2u32 << 20).to_le_bytes())
}

fn symbols() -> Seeds {
    let named = || kernel().function("f", START, 4).function("_ZN4core1fE", START + 4, 4);
    let all = named().section(".debug_info", [1; 64]).section(".debug_abbrev", [1; 64]).build();
    let table = u64::from_le_bytes(all[40..48].try_into().expect("eight bytes")) as usize;
    let sections = usize::from(all[60]);
    // Offset 0 and the size of the file.
    let whole = [[0; 8], (all.len() as u64).to_le_bytes()].concat();
    let overlapping =
        (1..sections).fold(all.clone(), |file, i| with(file, table + 64 * i + 24, &whole));
    let many = with(with(all.clone(), 60, &[0, 0]), table + 32, &(1u64 << 32).to_le_bytes());
    let huge =
        (1..sections).fold(all.clone(), |file, i| with(file, table + 64 * i + 32, &[0xff; 8]));
    // SHF_COMPRESSED, and a header that promises a terabyte.
    let header = [&1u64.to_le_bytes()[..], &(1u64 << 40).to_le_bytes(), &[1, 0, 0, 0, 0, 0, 0, 0]];
    let zlib = [&header.concat()[..], &[0x78, 0x9c, 0x63, 0x60, 0, 0, 0, 1, 0, 1]].concat();
    let packed = named().section(".debug_info", zlib.clone()).section(".debug_line", zlib).build();
    let at = u64::from_le_bytes(packed[40..48].try_into().expect("eight bytes")) as usize;
    let bomb = (4..6).fold(packed, |file, i| with(file, at + 64 * i + 8, &0x800u64.to_le_bytes()));
    vec![
        ("named.elf", named().build()),
        ("overlapping.elf", overlapping),
        ("4g-sections.elf", many),
        ("huge-sections.elf", huge),
        ("bomb.elf", bomb),
    ]
}

fn answers() -> Seeds {
    let name = r#"{"name":"f\u001b[31m\u202e","linkage":"_f"}"#;
    let symbols = |answer: &str| {
        format!(r#"{{"Symbols":{{"answer":{answer},"notes":["a note\nof two lines"]}}}}"#)
    };
    let places = format!(r#"[{{"function":{name},"path":"/a/../b","file":"b","line":0}},"#)
        + &format!(r#"{{"function":{name},"path":null,"file":"b","line":4294967295}}]"#);
    let code = symbols(&format!(
        r#"{{"Code":{{"symbol":{{"name":{name},"start":18446744073709551615,"size":1}},{}}}}}"#,
        format_args!(r#""sources":{places},"function":[0,18446744073709551615]"#)
    ));
    let data = symbols(&format!(r#"{{"Data":{{"name":{name},"start":1,"size":2}}}}"#));
    let image = symbols(r#"{"Image":{"start":9,"end":3}}"#);
    let place = symbols(r#"{"Declaration":{"file":"a\u0007.c","line":4294967295}}"#);
    let source = r#"{"Source":{"lines":[]}}"#;
    let one = [&code, &code, &data, &data, &place, &image].map(String::as_str).join("\n");
    vec![
        ("all", format!("{one}\n").into_bytes()),
        ("image", format!("{image}\n{image}\n").into_bytes()),
        ("source", format!("{source}\n{code}\n").into_bytes()),
        ("cut-off", code.as_bytes()[..code.len() / 2].to_vec()),
        ("length", [&0xffff_ffffu32.to_le_bytes()[..], b"{}"].concat()),
    ]
}
