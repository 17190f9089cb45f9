//! The model of one finding.

use std::fmt::Write as _;
use std::ops::Range;
use std::sync::Arc;

use serde::{Serialize, Serializer};

use super::frame::StackFrame;

/// Shadow bytes in one row of a [`ShadowDump`].
pub const ROW_SHADOW: usize = 16;
/// Bytes of guest memory that one row of a [`ShadowDump`] describes.
pub const ROW_MEMORY: u64 = ROW_SHADOW as u64 * umbra_shadow::codes::GRANULE;
/// Rows before, and rows after, the row of the first bad address.
pub const ROWS_AROUND: u64 = 2;

/// One memory error of the guest.
///
/// As JSON, addresses (`address`, `ip`, `start`, `first_bad`, the address of a row) are strings
/// such as `"0xffff888000001073"`: a kernel's addresses are beyond 2^53, where many JSON readers
/// lose digits. All other numbers are numbers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// KASAN's name of the bug, such as `slab-out-of-bounds`.
    pub kind: &'static str,
    /// The kind of access.
    pub access: AccessKind,
    /// Bytes of the access; 0 for a free.
    pub size: u64,
    /// Guest-virtual address of the access.
    #[serde(serialize_with = "hex")]
    pub address: u64,
    /// Address of the instruction after the access, a return address like those of `frames`.
    #[serde(serialize_with = "hex")]
    pub ip: u64,
    /// The vCPU.
    pub cpu: u32,
    /// The task that ran.
    pub task: Task,
    /// Its stack, innermost first; the frame of `ip` is the first that is not inlined.
    pub frames: Vec<Frame>,
    /// The object that holds the address, or is next to it.
    pub object: Option<Object>,
    /// The global variable that holds the address, or is before it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub variable: Option<Variable>,
    /// The stack frame that holds the address, with its variables.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stack_frame: Option<StackFrame>,
    /// The object's allocation.
    pub allocated: Option<Track>,
    /// The object's free.
    pub freed: Option<Track>,
    /// The callers that queued work on the object, such as the work that freed it; the last one
    /// first.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub related_work: Vec<Track>,
    /// The object that held the address before, and was freed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub previous: Option<Previous>,
    /// The shadow around the first bad address.
    pub shadow: ShadowDump,
    /// The parts that this finding lacks, and the reasons.
    pub notes: Vec<String>,
    /// The addresses of the kernel's image, for frames without a symbol; empty if not known.
    #[serde(skip)]
    pub image: Range<u64>,
}

/// The guest's operation on the memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum AccessKind {
    /// It loaded from it.
    Read,
    /// It stored to it.
    Write,
    /// It freed it.
    Free,
}

impl Finding {
    /// A finding with only the kind of its access.
    pub fn new(access: AccessKind) -> Self {
        Self {
            kind: "",
            access,
            size: 0,
            address: 0,
            ip: 0,
            cpu: 0,
            task: Task::default(),
            frames: Vec::new(),
            object: None,
            variable: None,
            stack_frame: None,
            allocated: None,
            freed: None,
            related_work: Vec::new(),
            previous: None,
            shadow: ShadowDump::default(),
            notes: Vec::new(),
            image: 0..0,
        }
    }
}

impl AccessKind {
    /// Its name in JSON.
    pub fn word(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Free => "free",
        }
    }
}

impl std::fmt::Display for AccessKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Read => "Read",
            Self::Write => "Write",
            Self::Free => "Free",
        })
    }
}

/// A task of the guest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Task {
    /// Its id in the guest.
    pub id: u32,
    /// Its name; empty if the guest gave none.
    pub name: String,
}

/// One line of a stack. Its texts are shared, since the stacks of a run are much alike.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Frame {
    /// The return address. Inlined frames have that of the function they were inlined into.
    #[serde(serialize_with = "hex")]
    pub ip: u64,
    /// The function, demangled and without the compiler's hash.
    pub symbol: Option<Arc<str>>,
    /// The function's name as the ELF has it, where that differs from `symbol`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub linkage: Option<Arc<str>>,
    /// The kernel's module that the function belongs to, if it is of one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub module: Option<Arc<str>>,
    /// Bytes from the function's start to `ip`; 0 for an inlined frame.
    pub offset: u64,
    /// Bytes of the function; 0 for an inlined frame.
    pub size: u64,
    /// The source file, shortened to the part that identifies it.
    pub file: Option<Arc<str>>,
    /// The line in it, from 1.
    pub line: Option<u32>,
    /// The compiler put this function's code into its caller, the next frame that is not inlined.
    pub inlined: bool,
    /// The path of the source file when the kernel was compiled; not printed.
    #[serde(skip)]
    pub path: Option<Arc<str>>,
}

/// The kind of name that is printed for a function.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Names {
    /// The name in the source.
    #[default]
    Demangled,
    /// The name in the ELF. Linux's `decode_stacktrace.sh` looks it up there, and syzkaller's
    /// parser takes only the characters of a C name. For a C kernel both names are equal.
    Linkage,
}

impl Frame {
    /// A frame with only its address.
    pub fn unknown(ip: u64) -> Self {
        Self { ip, ..Self::default() }
    }

    /// The function's name, if it is known.
    pub fn name(&self, names: Names) -> Option<&str> {
        match names {
            Names::Demangled => self.symbol.as_deref(),
            Names::Linkage => self.linkage.as_deref().or(self.symbol.as_deref()),
        }
    }
}

/// An allocation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Object {
    /// Its guest-virtual address.
    #[serde(serialize_with = "hex")]
    pub start: u64,
    /// The bytes that were asked for.
    pub size: u64,
    /// The cache it came from; none for memory by the page.
    pub cache: Option<String>,
    /// Bytes of one slot of that cache; 0 without a cache.
    pub cache_size: u64,
    /// Bytes from `start` to the first bad address; negative where that is before the object.
    pub offset: i64,
}

/// An object that was freed before another one got its memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Previous {
    /// Its guest-virtual address.
    #[serde(serialize_with = "hex")]
    pub start: u64,
    /// The bytes that were asked for.
    pub size: u64,
    /// Its allocation.
    pub allocated: Option<Track>,
    /// Its free.
    pub freed: Track,
}

/// A global variable.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Variable {
    /// Its name, demangled.
    pub name: String,
    /// Its guest-virtual address.
    #[serde(serialize_with = "hex")]
    pub start: u64,
    /// Its bytes. If only the ELF's symbol is known, with the redzone that an instrumenting
    /// compiler put behind it.
    pub size: u64,
    /// The source file or compilation unit that defines it, as the compiler names it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub module: Option<String>,
    /// The source file of its declaration, shortened as that of a frame.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<Arc<str>>,
    /// The line in it, from 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub line: Option<u32>,
}

/// The allocation or the free of an object: task, CPU, time and stack.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Track {
    /// The task that did it.
    pub task: Task,
    /// The CPU on which it did, if that is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu: Option<u32>,
    /// When, in microseconds since the guest's time stamp counters began, if that is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub micros: Option<u64>,
    /// Its stack, innermost first; empty where it is not known.
    pub frames: Vec<Frame>,
}

impl Track {
    /// Where and when, as KASAN says it (`print_track`, `mm/kasan/report.c`): ` on cpu 1 at
    /// 2.345678s`, as far as it is known.
    pub(crate) fn place_and_time(&self) -> String {
        let cpu = self.cpu.map(|cpu| format!(" on cpu {cpu}")).unwrap_or_default();
        let time =
            self.micros.map(|all| format!(" at {}.{:06}s", all / 1_000_000, all % 1_000_000));
        cpu + &time.unwrap_or_default()
    }
}

/// The shadow around the first bad address.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ShadowDump {
    /// The first bad address of the access.
    #[serde(serialize_with = "hex")]
    pub first_bad: u64,
    /// Rows by rising address. An address without a shadow has no row.
    pub rows: Vec<Row>,
}

/// The shadow of [`ROW_MEMORY`] bytes of memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Row {
    /// Guest-virtual address of the memory that it describes, a multiple of [`ROW_MEMORY`].
    #[serde(serialize_with = "hex")]
    pub address: u64,
    /// The shadow bytes; in JSON a string such as `"00 00 03 fc ..."`.
    #[serde(serialize_with = "hex_bytes")]
    pub bytes: [u8; ROW_SHADOW],
}

impl Row {
    /// The bytes as pairs of hex digits with a blank between them.
    pub fn to_hex(&self) -> String {
        pairs(&self.bytes)
    }
}

impl ShadowDump {
    /// Collects the rows around `first_bad`. `read` returns the shadow of the [`ROW_MEMORY`] bytes
    /// at an address, or `None` where there is no shadow.
    pub fn around(first_bad: u64, mut read: impl FnMut(u64) -> Option<[u8; ROW_SHADOW]>) -> Self {
        let middle = first_bad & !(ROW_MEMORY - 1);
        let before = (1..=ROWS_AROUND).rev().map(|i| middle.checked_sub(i * ROW_MEMORY));
        let after = (0..=ROWS_AROUND).map(|i| middle.checked_add(i * ROW_MEMORY));
        let rows = before
            .chain(after)
            .flatten()
            .filter_map(|address| read(address).map(|bytes| Row { address, bytes }))
            .collect();
        Self { first_bad, rows }
    }

    /// Row and column of the shadow byte of the first bad address; `None` if that has no shadow.
    pub fn caret(&self) -> Option<(usize, usize)> {
        let row = self.rows.iter().position(|row| {
            self.first_bad.checked_sub(row.address).is_some_and(|distance| distance < ROW_MEMORY)
        })?;
        let distance = self.first_bad.checked_sub(self.rows.get(row)?.address)?;
        Some((row, usize::try_from(distance / umbra_shadow::codes::GRANULE).ok()?))
    }
}

impl Finding {
    /// The function that made the access: the frame of [`Finding::ip`] that is a function of the
    /// ELF and not an inlined one.
    pub fn culprit(&self) -> Option<&Frame> {
        self.frames.iter().find(|frame| !frame.inlined && frame.ip == self.ip)
    }
}

fn hex<S: Serializer>(value: &u64, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&format_args!("{value:#x}"))
}

fn hex_bytes<S: Serializer>(bytes: &[u8; ROW_SHADOW], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&pairs(bytes))
}

fn pairs(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(3 * bytes.len());
    for (i, byte) in bytes.iter().enumerate() {
        let separator = if i == 0 { "" } else { " " };
        // Writing to a String cannot fail.
        let _ = write!(text, "{separator}{byte:02x}");
    }
    text
}

#[cfg(test)]
pub(super) mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn frame(ip: u64, symbol: &str, offset: u64, size: u64, file: &str, line: u32) -> Frame {
        Frame {
            ip,
            symbol: Some(symbol.into()),
            offset,
            size,
            file: Some(file.into()),
            line: Some(line),
            ..Frame::default()
        }
    }

    /// A store behind an object of 115 bytes, as the test kernel makes it.
    pub fn finding() -> Finding {
        let culprit = Frame {
            linkage: Some("_RNvCs1_6kernel17kmalloc_oob_right".into()),
            ..frame(
                0xffff_ffff_8000_101d,
                "kernel::kmalloc_oob_right",
                0x1d,
                0x80,
                "kernel/src/oob.rs",
                21,
            )
        };
        let inlined = Frame {
            inlined: true,
            ..frame(
                culprit.ip,
                "core::ptr::write_volatile::<u8>",
                0,
                0,
                "library/core/src/ptr/mod.rs",
                2201,
            )
        };
        let thread =
            frame(0xffff_ffff_8000_2044, "thread_main", 0x44, 0x60, "kernel/src/thread.rs", 7);
        let alloc = frame(0xffff_ffff_8000_3010, "kmalloc", 0x10, 0x90, "kernel/src/slab.rs", 50);
        let object = 0xffff_8000_0020_1000;
        let first_bad = object + 115;
        Finding {
            kind: "slab-out-of-bounds",
            access: AccessKind::Write,
            size: 1,
            address: first_bad,
            ip: culprit.ip,
            cpu: 0,
            task: Task { id: 12, name: "kmalloc_oob_right".into() },
            frames: vec![inlined, culprit, thread.clone()],
            object: Some(Object {
                start: object,
                size: 115,
                cache: Some("kmalloc-128".into()),
                cache_size: 128,
                offset: 115,
            }),
            variable: None,
            stack_frame: None,
            allocated: Some(Track {
                task: Task { id: 12, name: "kmalloc_oob_right".into() },
                cpu: Some(1),
                micros: Some(2_034_567),
                frames: vec![alloc, thread],
            }),
            freed: None,
            related_work: Vec::new(),
            previous: None,
            shadow: ShadowDump::around(first_bad, |row| {
                let mut bytes = [if row < object { 0xfb } else { 0xfc }; ROW_SHADOW];
                if row == object {
                    bytes[..14].fill(0);
                    bytes[14] = 3;
                }
                Some(bytes)
            }),
            notes: vec![],
            image: 0..0,
        }
    }

    #[test]
    fn json_has_the_agreed_fields() {
        let mut line = Vec::new();
        super::super::json::write(&mut line, &finding()).unwrap();
        assert_eq!(line.iter().filter(|b| **b == b'\n').count(), 1);
        let value: Value = serde_json::from_slice(&line).unwrap();
        let task = json!({"id": 12, "name": "kmalloc_oob_right"});
        let fields: Vec<_> = value.as_object().unwrap().keys().map(String::as_str).collect();
        for field in ["kind", "access", "size", "address", "ip", "cpu", "task", "frames", "object"]
        {
            assert!(fields.contains(&field), "{field} in {fields:?}");
        }
        assert_eq!(value["kind"], "slab-out-of-bounds");
        assert_eq!(value["access"], "write");
        assert_eq!(value["size"], 1);
        assert_eq!(value["address"], "0xffff800000201073");
        assert_eq!(value["ip"], "0xffffffff8000101d");
        assert_eq!((&value["cpu"], &value["task"]), (&json!(0), &task));
        assert_eq!(
            value["frames"][2],
            json!({"ip": "0xffffffff80002044", "symbol": "thread_main", "offset": 0x44,
                   "size": 0x60, "file": "kernel/src/thread.rs", "line": 7, "inlined": false})
        );
        assert_eq!(value["frames"][0]["inlined"], true);
        assert_eq!(
            value["object"],
            json!({"start": "0xffff800000201000", "size": 115, "cache": "kmalloc-128",
                   "cache_size": 128, "offset": 115})
        );
        assert_eq!(value["allocated"]["task"], task);
        assert_eq!(value["allocated"]["frames"][0]["symbol"], "kmalloc");
        assert_eq!(value["freed"], Value::Null);
        assert_eq!(value["shadow"]["first_bad"], "0xffff800000201073");
        assert_eq!(
            value["shadow"]["rows"][2],
            json!({"address": "0xffff800000201000",
                   "bytes": "00 00 00 00 00 00 00 00 00 00 00 00 00 00 03 fc"})
        );
    }

    #[test]
    fn headlines_hold_no_address() {
        let mut one = finding();
        assert_eq!(
            one.headline(Names::Demangled),
            "BUG: KASAN: slab-out-of-bounds in kernel::kmalloc_oob_right+0x1d/0x80"
        );
        assert_eq!(
            one.headline(Names::Linkage),
            "BUG: KASAN: slab-out-of-bounds in _RNvCs1_6kernel17kmalloc_oob_right+0x1d/0x80"
        );
        // A frame that is not the access's own must not give its name.
        one.ip += 1;
        assert_eq!(one.headline(Names::Demangled), "BUG: KASAN: slab-out-of-bounds in <no symbol>");
        one.frames.clear();
        assert_eq!(one.headline(Names::Demangled), "BUG: KASAN: slab-out-of-bounds in <no symbol>");
    }

    #[test]
    fn rows_stay_in_the_address_space() {
        for (first_bad, rows, caret) in
            [(0x10, 3, (0, 2)), (0x1000, 5, (2, 0)), (0x107f, 5, (2, 15)), (u64::MAX, 3, (2, 15))]
        {
            let dump = ShadowDump::around(first_bad, |_| Some([0; ROW_SHADOW]));
            assert_eq!((dump.rows.len(), dump.caret()), (rows, Some(caret)), "{first_bad:#x}");
        }
        let hole = ShadowDump::around(0x1000, |row| (row != 0x1000).then_some([0; ROW_SHADOW]));
        assert_eq!((hole.rows.len(), hole.caret()), (4, None));
    }
}
