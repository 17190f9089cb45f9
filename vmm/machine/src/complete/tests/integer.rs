//! Integer instructions, compared with this machine's CPU.

use std::arch::asm;
use std::collections::BTreeSet;

use proptest::prelude::*;
use umbra_skip::{need_cpu, skip, skip_part};

use super::*;

/// The registers after an instruction: rax, rcx, rdx, rbx (by way of rsi) and the flags.
#[derive(Debug, PartialEq, Eq)]
struct Result4 {
    rax: u64,
    rcx: u64,
    rdx: u64,
    rsi: u64,
    flags: u64,
}

/// The bytes of one instruction, and a function that executes it.
macro_rules! native {
    ($text:literal) => {{
        fn execute(
            rax: u64,
            rcx: u64,
            rdx: u64,
            rsi: u64,
            flags: u64,
            memory: &mut [u64; 2],
        ) -> Result4 {
            let mut r = Result4 { rax, rcx, rdx, rsi, flags: flags | 2 };
            // SAFETY: the instruction uses the registers named and the memory at rdi, and changes
            // flags.
            unsafe {
                asm!(
                    "push {flags}", "popfq", $text, "pushfq", "pop {flags}", "cld",
                    flags = inout(reg) r.flags,
                    inout("rax") r.rax, inout("rcx") r.rcx, inout("rdx") r.rdx, inout("rsi") r.rsi,
                    in("rdi") memory.as_mut_ptr(),
                );
            }
            r.flags &= RFLAGS_STATUS;
            r
        }
        let (start, end): (*const u8, *const u8);
        // SAFETY: two address calculations; the code goes to a section of its own and is not
        // executed here.
        let bytes = unsafe {
            asm!(
                "lea {0}, [rip + 230f]", "lea {1}, [rip + 231f]",
                ".pushsection .rodata.native, \"a\"", "230:", $text, "231:", ".popsection",
                out(reg) start, out(reg) end,
            );
            std::slice::from_raw_parts(start, end.offset_from(start) as usize)
        };
        Native { text: $text, bytes, execute }
    }};
}

struct Native {
    text: &'static str,
    bytes: &'static [u8],
    execute: fn(u64, u64, u64, u64, u64, &mut [u64; 2]) -> Result4,
}

const ZF_CF: u64 = RFLAGS_ZF | RFLAGS_CF;
const LOGIC: u64 = RFLAGS_ZF | RFLAGS_SF | RFLAGS_CF | RFLAGS_OF;

/// The instructions, the flags that they define, and their CPU feature, if the CPU lacks it.
fn instructions() -> Vec<(Native, u64, Option<&'static str>)> {
    macro_rules! with {
        ($defined:expr, $feature:tt, [$($text:literal),+ $(,)?]) => {{
            let lacking = (!std::is_x86_feature_detected!($feature)).then_some($feature);
            vec![$((native!($text), $defined, lacking)),+]
        }};
    }
    let all = RFLAGS_STATUS;
    [
        with!(
            all,
            "popcnt",
            [
                "popcnt rax, rcx",
                "popcnt eax, ecx",
                "popcnt ax, cx",
                "popcnt rax, [rdi]",
                "popcnt cx, [rdi + 3]"
            ]
        ),
        with!(
            ZF_CF,
            "lzcnt",
            ["lzcnt rax, rcx", "lzcnt eax, ecx", "lzcnt ax, cx", "lzcnt eax, [rdi + 1]"]
        ),
        with!(
            ZF_CF,
            "bmi1",
            ["tzcnt rax, rcx", "tzcnt eax, ecx", "tzcnt ax, cx", "tzcnt rax, [rdi]"]
        ),
        with!(
            LOGIC,
            "bmi1",
            [
                "andn rax, rcx, rdx",
                "andn eax, ecx, [rdi]",
                "blsi rax, rcx",
                "blsi eax, [rdi]",
                "blsmsk rax, rcx",
                "blsmsk eax, ecx",
                "blsr rax, [rdi]",
                "blsr eax, ecx"
            ]
        ),
        with!(ZF_CF | RFLAGS_OF, "bmi1", ["bextr rax, rcx, rdx", "bextr eax, [rdi], ecx"]),
        with!(LOGIC, "bmi2", ["bzhi rax, rcx, rdx", "bzhi eax, [rdi], ecx"]),
        with!(
            all,
            "bmi2",
            [
                "mulx rax, rcx, rsi",
                "mulx eax, ecx, esi",
                "mulx rax, rax, rsi",
                "mulx rdx, rcx, [rdi]",
                "pdep rax, rcx, rdx",
                "pdep eax, ecx, [rdi]",
                "pext rax, rcx, rdx",
                "pext eax, ecx, [rdi]",
                "rorx rax, rcx, 13",
                "rorx eax, [rdi], 37",
                "sarx rax, rcx, rdx",
                "sarx eax, ecx, edx",
                "shlx rax, [rdi], rdx",
                "shlx eax, ecx, edx",
                "shrx rax, rcx, rdx",
                "shrx eax, [rdi], edx"
            ]
        ),
        with!(all, "adx", ["adcx rax, rcx", "adcx eax, [rdi]", "adox rax, [rdi]", "adox eax, ecx"]),
        with!(
            all,
            "sse4.2",
            [
                "crc32 rax, rcx",
                "crc32 eax, ecx",
                "crc32 eax, cx",
                "crc32 eax, cl",
                "crc32 rax, dl",
                "crc32 eax, ch",
                "crc32 rax, qword ptr [rdi]",
                "crc32 eax, byte ptr [rdi + 7]",
                "crc32 eax, word ptr [rdi + 5]"
            ]
        ),
        with!(
            all,
            "movbe",
            [
                "movbe rax, [rdi]",
                "movbe eax, [rdi + 2]",
                "movbe ax, [rdi + 7]",
                "movbe [rdi + 4], rcx",
                "movbe [rdi], ecx",
                "movbe [rdi + 5], cx"
            ]
        ),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn operand() -> impl Strategy<Value = u64> {
    prop_oneof![
        any::<u64>(),
        (0u32..64).prop_map(|b| 1 << b),
        0u64..256,
        prop_oneof![Just(0), Just(u64::MAX), Just(1 << 31), Just(0xffff_ffff), Just(0xffff)],
    ]
}

/// Completes the CPU's instruction, from the same registers, flags and memory.
fn compare(native: &Native, defined: u64, r: [u64; 4], flags: u64, memory: [u64; 2]) {
    const MEMORY: u64 = 0x2ff8; // across a page
    let ram = ram();
    let mut c = cpu();
    [c.regs.rax, c.regs.rcx, c.regs.rdx, c.regs.rsi] = r;
    (c.regs.rdi, c.regs.rflags) = (MEMORY, flags);
    let bytes = |m: [u64; 2]| [m[0].to_le_bytes(), m[1].to_le_bytes()].concat();
    ram.write(GuestAddress(MEMORY), &bytes(memory)).unwrap();
    run_in(&mut c, &ram, native.bytes).unwrap();
    assert_eq!(
        (c.injected, c.regs.rip),
        (None, RIP + native.bytes.len() as u64),
        "{}",
        native.text
    );
    let mut expected_memory = memory;
    let mut expected = (native.execute)(r[0], r[1], r[2], r[3], flags, &mut expected_memory);
    // Undefined flags are not changed here, and may be anything there.
    expected.flags = expected.flags & defined | flags & !defined;
    let got = Result4 {
        rax: c.regs.rax,
        rcx: c.regs.rcx,
        rdx: c.regs.rdx,
        rsi: c.regs.rsi,
        flags: c.regs.rflags,
    };
    assert_eq!(got, expected, "{} of {r:x?}, {memory:x?}, flags {flags:#x}", native.text);
    let mut after = [0; 16];
    ram.read(GuestAddress(MEMORY), &mut after).unwrap();
    assert_eq!(after[..], bytes(expected_memory), "{}", native.text);
}

#[test]
fn integer_instructions_do_what_the_cpu_does() {
    let all = instructions();
    let lacking: BTreeSet<_> = all.iter().filter_map(|(_, _, lacking)| *lacking).collect();
    let instructions: Vec<_> = all.iter().filter(|(_, _, lacking)| lacking.is_none()).collect();
    if instructions.is_empty() {
        skip!("this machine's CPU lacks all of {lacking:?}");
    }
    for feature in lacking {
        skip_part!(feature, "this machine's CPU lacks it");
    }
    let operands =
        (proptest::array::uniform4(operand()), any::<u64>(), proptest::array::uniform2(operand()));
    proptest!(ProptestConfig::with_cases(128), |((r, flags, memory) in operands)| {
        for (native, defined, _) in &instructions {
            compare(native, *defined, r, flags & RFLAGS_STATUS, memory);
        }
    });
}

#[test]
fn cmpxchg16b_does_what_the_cpu_does() {
    need_cpu!("cmpxchg16b");
    #[repr(align(16))]
    struct Aligned([u64; 2]);
    let ram = ram();
    let numbers = proptest::array::uniform2(any::<u64>());
    let all = (numbers, numbers, numbers);
    proptest!(ProptestConfig::with_cases(64), |((found, other, new) in all, same: bool)| {
        let expected = if same { found } else { other };
        let mut native = Aligned(found);
        let [mut rax, mut rdx] = expected;
        let mut flags: u64;
        // SAFETY: `native` is 16 bytes, aligned; rbx is put back.
        unsafe {
            asm!(
                "xchg rbx, {low}", "lock cmpxchg16b [rdi]", "mov rbx, {low}",
                "pushfq", "pop {flags}",
                low = inout(reg) new[0] => _, flags = out(reg) flags,
                in("rdi") native.0.as_mut_ptr(), inout("rax") rax, inout("rdx") rdx,
                in("rcx") new[1],
            );
        }
        for bytes in [&[0xf0, 0x48, 0x0f, 0xc7, 0x0f][..], &[0x48, 0x0f, 0xc7, 0x0f]] {
            let mut c = cpu();
            [c.regs.rax, c.regs.rdx] = expected;
            [c.regs.rbx, c.regs.rcx] = new;
            (c.regs.rdi, c.regs.rflags) = (0x3010, RFLAGS_STATUS);
            ram.write(GuestAddress(0x3010), &found[0].to_le_bytes()).unwrap();
            ram.write(GuestAddress(0x3018), &found[1].to_le_bytes()).unwrap();
            run_in(&mut c, &ram, bytes).unwrap();
            let after = [0x3010, 0x3018].map(|at| ram.read_u64(GuestAddress(at)).unwrap());
            prop_assert_eq!(after, native.0);
            prop_assert_eq!([c.regs.rax, c.regs.rdx], [rax, rdx]);
            prop_assert_eq!(c.regs.rflags, RFLAGS_STATUS & !RFLAGS_ZF | flags & RFLAGS_ZF);
        }
    });
    let mut c = cpu();
    c.regs.rdi = 0x3018;
    run_in(&mut c, &ram, &[0x48, 0x0f, 0xc7, 0x0f]).unwrap();
    assert_eq!(c.injected, Some((13, Some(0))), "unaligned");
}
