//! The extended state: `xsave` and `xrstor` in all their forms, `fxsave`, MXCSR and PKRU.
//!
//! KVM has the state in the standard format of `xsave64` (Intel SDM volume 1, chapter 13). This
//! converts between that and the instruction's format in guest memory. Supervisor state components
//! (IA32_XSS) count as in their initial configuration: KVM does not pass them on.

use std::arch::x86_64::__cpuid_count;
use std::ops::Range;
use std::sync::LazyLock;

use iced_x86::{Code, EncodingKind, Mnemonic};

use super::enabled::{Enabled, enabled};
use super::operand::{OperandLocation, OperandUse};
use super::{CR0_EM, CR0_TS, CR4_OSXSAVE, CR4_PKE, Context, DEVICE_NOT_AVAILABLE, Effect, Stop};
use crate::vcpu::XsaveArea;

/// Offsets in the area.
const FCW: Range<usize> = 0..2;
/// The x87 state, without MXCSR in its middle.
const X87: [Range<usize>; 2] = [0..24, 32..160];
pub(super) const MXCSR: Range<usize> = 24..28;
const MXCSR_MASK: Range<usize> = 28..32;
pub(super) const XMM: Range<usize> = 160..416;
pub(super) const XSTATE_BV: Range<usize> = 512..520;
const XCOMP_BV: Range<usize> = 520..528;
/// End of the legacy region and the header.
const EXTENDED: usize = 576;
/// The upper halves of ymm0 to ymm15, on every CPU that has them.
pub(super) const AVX: Range<usize> = EXTENDED..EXTENDED + 256;

const X87_BIT: u64 = 1 << 0;
const SSE_BIT: u64 = 1 << 1;
const AVX_BIT: u64 = 1 << 2;
const PKRU: usize = 9;
const COMPACT: u64 = 1 << 63;
const INITIAL_FCW: u16 = 0x37f;
const INITIAL_MXCSR: u32 = 0x1f80;
/// The mask of MXCSR where the CPU gives none (Intel SDM volume 1, 11.6.6).
const DEFAULT_MXCSR_MASK: u32 = 0xffbf;
const IA32_XSS: u32 = 0xda0;

/// One state component from 2 on, as CPUID leaf 0xd describes it.
#[derive(Clone, Copy, Debug)]
struct Component {
    size: usize,
    /// In the standard format.
    offset: usize,
    /// The compacted format puts it at a multiple of 64.
    aligned: bool,
}

static COMPONENTS: LazyLock<[Option<Component>; 63]> = LazyLock::new(|| {
    std::array::from_fn(|i| {
        let leaf = __cpuid_count(0xd, i as u32);
        let component = Component {
            size: leaf.eax as usize,
            offset: leaf.ebx as usize,
            aligned: leaf.ecx & 2 != 0,
        };
        (i >= 2 && leaf.eax != 0).then_some(component)
    })
});

fn number(area: &XsaveArea, at: Range<usize>) -> u64 {
    area.0[at].iter().rev().fold(0, |n, byte| n << 8 | u64::from(*byte))
}

/// Which state components are not in their initial configuration.
pub(super) fn xstate_bv(area: &XsaveArea) -> u64 {
    number(area, XSTATE_BV)
}

fn set_xstate_bv(area: &mut XsaveArea, value: u64) {
    area.0[XSTATE_BV].copy_from_slice(&value.to_le_bytes());
}

pub(super) fn mxcsr(area: &XsaveArea) -> u32 {
    number(area, MXCSR) as u32
}

/// Sets MXCSR. KVM takes it only together with a state component in use.
pub(super) fn set_mxcsr(area: &mut XsaveArea, value: u32) {
    area.0[MXCSR].copy_from_slice(&value.to_le_bytes());
    let there = xstate_bv(area);
    if there & SSE_BIT == 0 && value != INITIAL_MXCSR {
        area.0[XMM].fill(0);
        set_xstate_bv(area, there | SSE_BIT);
    }
}

fn mxcsr_mask(area: &XsaveArea) -> u32 {
    match number(area, MXCSR_MASK) as u32 {
        0 => DEFAULT_MXCSR_MASK,
        mask => mask,
    }
}

/// Fills in the values of components that are in their initial configuration.
pub(super) fn fill_in(area: &mut XsaveArea) {
    let there = xstate_bv(area);
    if there & X87_BIT == 0 {
        X87.into_iter().for_each(|range| area.0[range].fill(0));
        area.0[FCW].copy_from_slice(&INITIAL_FCW.to_le_bytes());
    }
    if there & SSE_BIT == 0 {
        area.0[XMM].fill(0);
    }
    for (i, component) in COMPONENTS.iter().enumerate() {
        if let Some(component) = component
            && there >> i & 1 == 0
            && let Some(bytes) = area.0.get_mut(component.offset..component.offset + component.size)
            && component.offset >= EXTENDED
        {
            bytes.fill(0);
        }
    }
}

/// The x87 instruction and data pointers have 64 bits in the forms with REX.W, else 32 and a
/// selector, which CPUs no longer store.
fn narrow_pointers(area: &mut XsaveArea) {
    area.0[12..16].fill(0);
    area.0[20..24].fill(0);
}

/// The components in `mask`, without bits 0 and 1: (number, offset, size).
fn layout(mask: u64, compact: bool) -> Result<Vec<(usize, usize, usize)>, Stop> {
    let mut found = Vec::new();
    let mut next = EXTENDED;
    for i in (2..63).filter(|i| mask >> i & 1 != 0) {
        let component = COMPONENTS[i].ok_or(Stop::Unknown)?;
        let offset = match compact {
            true if component.aligned => next.next_multiple_of(64),
            true => next,
            false => component.offset,
        };
        if offset < EXTENDED {
            return Err(Stop::Unknown);
        }
        next = offset + component.size;
        found.push((i, offset, component.size));
    }
    Ok(found)
}

/// The range of a component in KVM's area.
fn in_area(i: usize) -> Result<Range<usize>, Stop> {
    let component = COMPONENTS.get(i).copied().flatten().ok_or(Stop::Unknown)?;
    let range = component.offset..component.offset + component.size;
    // Behind the area are only components that a process must request first; supervisor components
    // have no place at all.
    if range.start < EXTENDED || range.end > size_of::<XsaveArea>() {
        Err(Stop::Unknown)
    } else {
        Ok(range)
    }
}

/// The common part of `xsave` and `xrstor` in all forms: the checks, and the components.
struct Request {
    address: u64,
    /// All components that the guest's kernel enabled.
    possible: u64,
    /// The requested-feature bitmap, without those that are not enabled.
    wanted: u64,
    /// Of `wanted`, those that belong to the supervisor.
    supervisor: u64,
    /// REX.W.
    wide: bool,
}

impl Request {
    fn new(c: &mut Context, with_supervisor: bool) -> Result<Self, Stop> {
        if c.sregs.cr4 & CR4_OSXSAVE == 0 {
            return Err(Stop::UNDEFINED);
        }
        if c.sregs.cr0 & CR0_TS != 0 {
            return Err(Stop::Fault { vector: DEVICE_NOT_AVAILABLE, error: None });
        }
        if with_supervisor && !c.ring0() {
            return Err(Stop::PROTECTION);
        }
        let address = c.address()?;
        if !address.is_multiple_of(64) {
            return Err(Stop::PROTECTION);
        }
        let asked = c.regs.rax & 0xffff_ffff | c.regs.rdx << 32;
        let supervisor = if with_supervisor { c.cpu.msr(IA32_XSS)? } else { 0 };
        let possible = c.xcr0()? | supervisor;
        Ok(Self {
            address,
            possible,
            wanted: asked & possible,
            supervisor: asked & supervisor,
            wide: is_wide(c.instruction.code()),
        })
    }

    fn place(&self, c: &Context, len: usize, access: OperandUse) -> Result<OperandLocation, Stop> {
        c.place_at(self.address, len, access)
    }
}

fn is_wide(code: Code) -> bool {
    matches!(
        code,
        Code::Xsave64_mem
            | Code::Xsaveopt64_mem
            | Code::Xsavec64_mem
            | Code::Xsaves64_mem
            | Code::Xrstor64_mem
            | Code::Xrstors64_mem
            | Code::Fxsave64_m512byte
            | Code::Fxrstor64_m512byte
    )
}

/// The state for memory: all values filled in.
fn image(c: &mut Context, wide: bool) -> Result<Box<XsaveArea>, Stop> {
    let mut image = Box::new(*c.extended()?);
    fill_in(&mut image);
    if !wide {
        narrow_pointers(&mut image);
    }
    Ok(image)
}

/// `xsave` and `xsaveopt`: the standard format. The latter omits components in their initial
/// configuration.
pub(super) fn xsave(c: &mut Context) -> Result<Effect, Stop> {
    let request = Request::new(c, false)?;
    let wanted = request.wanted;
    let extended = layout(wanted, false)?;
    let len = extended.iter().map(|(_, offset, size)| offset + size).max().unwrap_or(EXTENDED);
    let place = request.place(c, len, OperandUse::Write)?;
    let image = image(c, request.wide)?;
    let in_use = xstate_bv(&image);
    let optimised = matches!(c.instruction.mnemonic(), Mnemonic::Xsaveopt | Mnemonic::Xsaveopt64);
    let saved = if optimised { wanted & in_use } else { wanted };
    let mut header = [0; 8];
    place.read_at(c.ram, XSTATE_BV.start, &mut header)?;
    let header = u64::from_le_bytes(header) & !wanted | in_use & wanted;
    save_legacy(c, &place, &image, saved, wanted & (SSE_BIT | AVX_BIT) != 0)?;
    for (i, offset, size) in extended.into_iter().filter(|(i, ..)| saved >> i & 1 != 0) {
        let from = in_area(i)?;
        place.write_at(c.ram, offset, &image.0[from][..size])?;
    }
    place.write_at(c.ram, XSTATE_BV.start, &header.to_le_bytes())?;
    Ok(Effect::Next)
}

/// `xsavec` and `xsaves`: the compacted format, without components in their initial configuration.
pub(super) fn xsavec(c: &mut Context) -> Result<Effect, Stop> {
    let with_supervisor = matches!(c.instruction.mnemonic(), Mnemonic::Xsaves | Mnemonic::Xsaves64);
    let request = Request::new(c, with_supervisor)?;
    let wanted = request.wanted;
    let extended = layout(wanted, true)?;
    let len = extended.last().map_or(EXTENDED, |(_, offset, size)| offset + size);
    let place = request.place(c, len, OperandUse::Write)?;
    let image = image(c, request.wide)?;
    let mut saved = wanted & xstate_bv(&image) & !request.supervisor;
    if mxcsr(&image) != INITIAL_MXCSR {
        saved |= wanted & SSE_BIT;
    }
    save_legacy(c, &place, &image, saved, saved & SSE_BIT != 0)?;
    for (i, offset, size) in extended.into_iter().filter(|(i, ..)| saved >> i & 1 != 0) {
        let from = in_area(i)?;
        place.write_at(c.ram, offset, &image.0[from][..size])?;
    }
    place.write_at(c.ram, XSTATE_BV.start, &saved.to_le_bytes())?;
    place.write_at(c.ram, XCOMP_BV.start, &(wanted | COMPACT).to_le_bytes())?;
    Ok(Effect::Next)
}

/// Writes x87, SSE and MXCSR to the legacy region.
fn save_legacy(
    c: &Context,
    place: &OperandLocation,
    image: &XsaveArea,
    saved: u64,
    with_mxcsr: bool,
) -> Result<(), Stop> {
    let mut write =
        |range: Range<usize>| place.write_at(c.ram, range.start, &image.0[range.clone()]);
    if saved & X87_BIT != 0 {
        X87.into_iter().try_for_each(&mut write)?;
    }
    if with_mxcsr {
        write(MXCSR.start..MXCSR_MASK.end)?;
    }
    if saved & SSE_BIT != 0 {
        write(XMM)?;
    }
    Ok(())
}

/// `xrstor` from either format, and `xrstors`.
pub(super) fn xrstor(c: &mut Context) -> Result<Effect, Stop> {
    let with_supervisor =
        matches!(c.instruction.mnemonic(), Mnemonic::Xrstors | Mnemonic::Xrstors64);
    let request = Request::new(c, with_supervisor)?;
    let wanted = request.wanted;
    let mut from = XsaveArea::default();
    request.place(c, EXTENDED, OperandUse::Read)?.read(c.ram, &mut from.0[..EXTENDED])?;
    let (there, format) = (xstate_bv(&from), number(&from, XCOMP_BV));
    let compact = format & COMPACT != 0;
    let possible = request.possible;
    let rest = &from.0[XCOMP_BV.end..EXTENDED];
    let good = if compact {
        format & !COMPACT & !possible == 0 && there & !format == 0 && rest.iter().all(|b| *b == 0)
    } else {
        !with_supervisor
            && there & !possible == 0
            && format == 0
            && rest[..8].iter().all(|b| *b == 0)
    };
    if !good {
        return Err(Stop::PROTECTION);
    }
    let loaded = wanted & there;
    if loaded & request.supervisor != 0 {
        return Err(Stop::Unknown);
    }
    let extended = layout(if compact { format & !COMPACT } else { wanted }, compact)?;
    let needed = extended.iter().filter(|(i, ..)| loaded >> i & 1 != 0);
    let len = needed.clone().map(|(_, offset, size)| offset + size).max().unwrap_or(EXTENDED);
    let place = request.place(c, len, OperandUse::Read)?;
    // Into a copy, since a later fault must leave all as it is.
    let mut new = *c.extended()?;
    let mxcsr = match (compact, wanted & (SSE_BIT | AVX_BIT) != 0) {
        (false, true) => Some(mxcsr(&from)),
        (true, _) if loaded & SSE_BIT != 0 => Some(mxcsr(&from)),
        (true, _) if wanted & SSE_BIT != 0 => Some(INITIAL_MXCSR),
        _ => None,
    };
    if mxcsr.is_some_and(|value| value & !mxcsr_mask(&new) != 0) {
        return Err(Stop::PROTECTION);
    }
    if !request.wide {
        narrow_pointers(&mut from);
    }
    if loaded & X87_BIT != 0 {
        X87.into_iter().for_each(|range| new.0[range.clone()].copy_from_slice(&from.0[range]));
    }
    if loaded & SSE_BIT != 0 {
        new.0[XMM].copy_from_slice(&from.0[XMM]);
    }
    for (i, offset, _) in needed {
        let to = in_area(*i)?;
        place.read_at(c.ram, *offset, &mut new.0[to])?;
    }
    let header = xstate_bv(&new) & !wanted | loaded;
    set_xstate_bv(&mut new, header);
    fill_in(&mut new);
    if let Some(value) = mxcsr {
        set_mxcsr(&mut new, value);
    }
    *c.extended_mut()? = new;
    Ok(Effect::Next)
}

/// Makes the checks of `fxsave` and `fxrstor`, and returns their area.
fn fx_place(c: &Context, access: OperandUse) -> Result<OperandLocation, Stop> {
    if c.sregs.cr0 & (CR0_EM | CR0_TS) != 0 {
        return Err(Stop::Fault { vector: DEVICE_NOT_AVAILABLE, error: None });
    }
    let address = c.address()?;
    if !address.is_multiple_of(16) {
        return Err(Stop::PROTECTION);
    }
    c.place_at(address, XSTATE_BV.start, access)
}

pub(super) fn fxsave(c: &mut Context) -> Result<Effect, Stop> {
    let place = fx_place(c, OperandUse::Write)?;
    let image = image(c, is_wide(c.instruction.code()))?;
    place.write_at(c.ram, 0, &image.0[..XMM.end])?;
    Ok(Effect::Next)
}

pub(super) fn fxrstor(c: &mut Context) -> Result<Effect, Stop> {
    let place = fx_place(c, OperandUse::Read)?;
    let mut from = XsaveArea::default();
    place.read(c.ram, &mut from.0[..XMM.end])?;
    if !is_wide(c.instruction.code()) {
        narrow_pointers(&mut from);
    }
    let value = mxcsr(&from);
    if value & !mxcsr_mask(c.extended()?) != 0 {
        return Err(Stop::PROTECTION);
    }
    let area = c.extended_mut()?;
    X87.into_iter().for_each(|range| area.0[range.clone()].copy_from_slice(&from.0[range]));
    area.0[XMM].copy_from_slice(&from.0[XMM]);
    let there = xstate_bv(area) | X87_BIT | SSE_BIT;
    set_xstate_bv(area, there);
    set_mxcsr(area, value);
    Ok(Effect::Next)
}

pub(super) fn ldmxcsr(c: &mut Context) -> Result<Effect, Stop> {
    enabled(c, encoding(c))?;
    let value = c.value(0)? as u32;
    if value & !mxcsr_mask(c.extended()?) != 0 {
        return Err(Stop::PROTECTION);
    }
    if mxcsr(c.extended()?) != value {
        set_mxcsr(c.extended_mut()?, value);
    }
    Ok(Effect::Next)
}

pub(super) fn stmxcsr(c: &mut Context) -> Result<Effect, Stop> {
    enabled(c, encoding(c))?;
    let value = mxcsr(c.extended()?);
    c.set_value(0, value.into())?;
    Ok(Effect::Next)
}

/// The range of PKRU, if `rdpkru` and `wrpkru` may be used.
fn pkru(c: &Context) -> Result<Range<usize>, Stop> {
    if c.sregs.cr4 & CR4_PKE == 0 {
        return Err(Stop::UNDEFINED);
    }
    if c.regs.rcx as u32 != 0 {
        return Err(Stop::PROTECTION);
    }
    let range = in_area(PKRU)?;
    Ok(range.start..range.start + 4)
}

pub(super) fn rdpkru(c: &mut Context) -> Result<Effect, Stop> {
    let at = pkru(c)?;
    let area = c.extended()?;
    let value = if xstate_bv(area) >> PKRU & 1 != 0 { number(area, at) } else { 0 };
    (c.regs.rax, c.regs.rdx) = (value, 0);
    Ok(Effect::Next)
}

pub(super) fn wrpkru(c: &mut Context) -> Result<Effect, Stop> {
    let at = pkru(c)?;
    if c.regs.rdx as u32 != 0 {
        return Err(Stop::PROTECTION);
    }
    let value = c.regs.rax as u32;
    let area = c.extended_mut()?;
    area.0[at].copy_from_slice(&value.to_le_bytes());
    let there = xstate_bv(area) | 1 << PKRU;
    set_xstate_bv(area, there);
    Ok(Effect::Next)
}

fn encoding(c: &Context) -> Enabled {
    match c.instruction.encoding() {
        EncodingKind::VEX => Enabled::Avx,
        _ => Enabled::Sse,
    }
}
