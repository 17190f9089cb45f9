//! Integer instructions. Flags that the manuals leave undefined stay as they are.

use iced_x86::Register;

use super::operand::{OperandUse, register_value, set_register};
use super::{Context, Effect, RFLAGS_CF, RFLAGS_OF, RFLAGS_SF, RFLAGS_STATUS, RFLAGS_ZF, Stop};

/// `bits` ones.
fn ones(bits: u32) -> u64 {
    if bits >= 64 { u64::MAX } else { (1 << bits) - 1 }
}

impl Context<'_> {
    fn set_flag(&mut self, flag: u64, on: bool) {
        self.regs.rflags = if on { self.regs.rflags | flag } else { self.regs.rflags & !flag };
    }

    fn has_flag(&self, flag: u64) -> bool {
        self.regs.rflags & flag != 0
    }

    /// ZF and SF of `result` with `bits` bits, CF as given, OF off.
    fn logic_flags(&mut self, result: u64, bits: u32, carry: bool) {
        self.set_flag(RFLAGS_ZF, result == 0);
        self.set_flag(RFLAGS_SF, result >> (bits - 1) & 1 != 0);
        self.set_flag(RFLAGS_CF, carry);
        self.set_flag(RFLAGS_OF, false);
    }
}

pub(super) fn popcnt(c: &mut Context) -> Result<Effect, Stop> {
    let source = c.value(1)?;
    c.set_value(0, source.count_ones().into())?;
    c.regs.rflags &= !RFLAGS_STATUS;
    c.set_flag(RFLAGS_ZF, source == 0);
    Ok(Effect::Next)
}

pub(super) fn lzcnt(c: &mut Context) -> Result<Effect, Stop> {
    let source = c.value(1)?;
    let result = source.leading_zeros() - (64 - c.register_bits(0));
    count(c, source, result)
}

pub(super) fn tzcnt(c: &mut Context) -> Result<Effect, Stop> {
    let source = c.value(1)?;
    let result = source.trailing_zeros().min(c.register_bits(0));
    count(c, source, result)
}

fn count(c: &mut Context, source: u64, result: u32) -> Result<Effect, Stop> {
    c.set_value(0, result.into())?;
    c.set_flag(RFLAGS_CF, source == 0);
    c.set_flag(RFLAGS_ZF, result == 0);
    Ok(Effect::Next)
}

pub(super) fn andn(c: &mut Context) -> Result<Effect, Stop> {
    let result = !c.value(1)? & c.value(2)?;
    c.set_value(0, result)?;
    c.logic_flags(result, c.register_bits(0), false);
    Ok(Effect::Next)
}

pub(super) fn bextr(c: &mut Context) -> Result<Effect, Stop> {
    let (source, control) = (c.value(1)?, c.value(2)?);
    let (start, len) = (control as u32 & 0xff, control as u32 >> 8 & 0xff);
    let result = source.checked_shr(start).unwrap_or(0) & ones(len);
    c.set_value(0, result)?;
    c.set_flag(RFLAGS_ZF, result == 0);
    c.set_flag(RFLAGS_CF | RFLAGS_OF, false);
    Ok(Effect::Next)
}

pub(super) fn blsi(c: &mut Context) -> Result<Effect, Stop> {
    let source = c.value(1)?;
    lowest_bit(c, source & source.wrapping_neg(), source != 0)
}

pub(super) fn blsmsk(c: &mut Context) -> Result<Effect, Stop> {
    let source = c.value(1)?;
    lowest_bit(c, source ^ source.wrapping_sub(1), source == 0)
}

pub(super) fn blsr(c: &mut Context) -> Result<Effect, Stop> {
    let source = c.value(1)?;
    lowest_bit(c, source & source.wrapping_sub(1), source == 0)
}

fn lowest_bit(c: &mut Context, result: u64, carry: bool) -> Result<Effect, Stop> {
    let bits = c.register_bits(0);
    let result = result & ones(bits);
    c.set_value(0, result)?;
    c.logic_flags(result, bits, carry);
    Ok(Effect::Next)
}

pub(super) fn bzhi(c: &mut Context) -> Result<Effect, Stop> {
    let (source, index) = (c.value(1)?, c.value(2)? as u32 & 0xff);
    let bits = c.register_bits(0);
    let result = source & ones(index);
    c.set_value(0, result)?;
    c.logic_flags(result, bits, index >= bits);
    Ok(Effect::Next)
}

pub(super) fn mulx(c: &mut Context) -> Result<Effect, Stop> {
    let bits = c.register_bits(0);
    let rdx = register_value(&c.regs, if bits == 64 { Register::RDX } else { Register::EDX });
    let product = u128::from(rdx) * u128::from(c.value(2)?);
    // The lower half first: where both go to one register, the upper half stays.
    c.set_value(1, product as u64)?;
    c.set_value(0, (product >> bits) as u64)?;
    Ok(Effect::Next)
}

pub(super) fn pdep(c: &mut Context) -> Result<Effect, Stop> {
    let (mut source, mut mask) = (c.value(1)?, c.value(2)?);
    let mut result = 0;
    while mask != 0 {
        let bit = mask & mask.wrapping_neg();
        if source & 1 != 0 {
            result |= bit;
        }
        source >>= 1;
        mask ^= bit;
    }
    c.set_value(0, result)?;
    Ok(Effect::Next)
}

pub(super) fn pext(c: &mut Context) -> Result<Effect, Stop> {
    let (source, mut mask) = (c.value(1)?, c.value(2)?);
    let (mut result, mut to) = (0, 1u64);
    while mask != 0 {
        let bit = mask & mask.wrapping_neg();
        if source & bit != 0 {
            result |= to;
        }
        to <<= 1;
        mask ^= bit;
    }
    c.set_value(0, result)?;
    Ok(Effect::Next)
}

pub(super) fn rorx(c: &mut Context) -> Result<Effect, Stop> {
    let (source, by) = (c.value(1)?, c.value(2)? as u32);
    let result = match c.register_bits(0) {
        32 => (source as u32).rotate_right(by & 31).into(),
        _ => source.rotate_right(by & 63),
    };
    c.set_value(0, result)?;
    Ok(Effect::Next)
}

pub(super) fn sarx(c: &mut Context) -> Result<Effect, Stop> {
    shift(
        c,
        |value, bits, by| {
            if bits == 32 { (value as i32 >> by) as u64 } else { (value as i64 >> by) as u64 }
        },
    )
}

pub(super) fn shlx(c: &mut Context) -> Result<Effect, Stop> {
    shift(c, |value, _, by| value << by)
}

pub(super) fn shrx(c: &mut Context) -> Result<Effect, Stop> {
    shift(c, |value, _, by| value >> by)
}

fn shift(c: &mut Context, by: fn(u64, u32, u32) -> u64) -> Result<Effect, Stop> {
    let bits = c.register_bits(0);
    let count = c.value(2)? as u32 & (bits - 1);
    let result = by(c.value(1)?, bits, count);
    c.set_value(0, result)?;
    Ok(Effect::Next)
}

pub(super) fn adcx(c: &mut Context) -> Result<Effect, Stop> {
    add_with(c, RFLAGS_CF)
}

pub(super) fn adox(c: &mut Context) -> Result<Effect, Stop> {
    add_with(c, RFLAGS_OF)
}

fn add_with(c: &mut Context, flag: u64) -> Result<Effect, Stop> {
    let sum = u128::from(c.value(0)?) + u128::from(c.value(1)?) + u128::from(c.has_flag(flag));
    let bits = c.register_bits(0);
    c.set_value(0, sum as u64)?;
    c.set_flag(flag, sum >> bits != 0);
    Ok(Effect::Next)
}

/// CRC-32C, bit-reflected.
pub(super) fn crc32(c: &mut Context) -> Result<Effect, Stop> {
    const POLYNOMIAL: u32 = 0x82f6_3b78;
    let bytes = match c.is_memory(1) {
        true => c.instruction.memory_size().size(),
        false => c.instruction.op_register(1).size(),
    };
    let mut crc = c.value(0)? as u32;
    for byte in c.value(1)?.to_le_bytes().iter().take(bytes) {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = crc >> 1 ^ if crc & 1 != 0 { POLYNOMIAL } else { 0 };
        }
    }
    c.set_value(0, crc.into())?;
    Ok(Effect::Next)
}

pub(super) fn movbe(c: &mut Context) -> Result<Effect, Stop> {
    let bytes = c.instruction.memory_size().size() as u32;
    let swapped = c.value(1)?.swap_bytes() >> (64 - 8 * bytes.clamp(1, 8));
    c.set_value(0, swapped)?;
    Ok(Effect::Next)
}

/// Atomic, with or without `lock`.
pub(super) fn cmpxchg16b(c: &mut Context) -> Result<Effect, Stop> {
    if c.address()? % 16 != 0 {
        return Err(Stop::PROTECTION);
    }
    let place = c.place(16, OperandUse::Write)?;
    let wide = |low: u64, high: u64| u128::from(low) | u128::from(high) << 64;
    let expected = wide(c.regs.rax, c.regs.rdx);
    let found = place.compare_exchange(c.ram, expected, wide(c.regs.rbx, c.regs.rcx))?;
    if found != expected {
        set_register(&mut c.regs, Register::RAX, found as u64);
        set_register(&mut c.regs, Register::RDX, (found >> 64) as u64);
    }
    c.set_flag(RFLAGS_ZF, found == expected);
    Ok(Effect::Next)
}
