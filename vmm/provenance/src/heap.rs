//! Host memory of collections, including the allocator's overhead.

use std::collections::HashMap;

/// Host memory of an allocation of `bytes` bytes: glibc's `malloc` adds 8, and rounds up to a
/// multiple of 16, at least 32.
pub const fn taken(bytes: usize) -> usize {
    if bytes == 0 { 0 } else { usable(bytes) + 8 }
}

/// Usable bytes of an allocation of `bytes` bytes.
pub const fn usable(bytes: usize) -> usize {
    let taken = bytes.saturating_add(8).next_multiple_of(16);
    if taken < 32 { 24 } else { taken - 8 }
}

/// Host memory of a vector.
pub fn of_vec<T>(values: &Vec<T>) -> usize {
    taken(values.capacity() * size_of::<T>())
}

/// Host memory of a hash map.
pub fn of_map<K, V>(map: &HashMap<K, V>) -> usize {
    match map.capacity() {
        0 => 0,
        capacity => taken(of_buckets::<K, V>((capacity * 8 / 7).next_power_of_two())),
    }
}

/// Bytes that a hash map allocates for its buckets (a power of two), with a control byte for each
/// and 16 more.
pub const fn of_buckets<K, V>(buckets: usize) -> usize {
    buckets * (size_of::<(K, V)>() + 1) + 16
}

/// Most bytes of a hash map per value: it has just grown, and 7/16 of its buckets are in use.
pub const fn of_value<K, V>() -> usize {
    ((size_of::<(K, V)>() + 1) * 16).div_ceil(7)
}

/// Reserves room for `more` values, at least an eighth of the length. Doubling would leave up to
/// half unused.
pub fn reserve_little<T>(values: &mut Vec<T>, more: usize) {
    if values.capacity() - values.len() < more {
        values.reserve_exact(more.max(values.len() / 8));
    }
}
