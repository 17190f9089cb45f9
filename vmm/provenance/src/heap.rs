//! What host memory is taken, with what the allocator adds.

use std::collections::HashMap;

/// Bytes that an allocation of so many bytes takes: glibc's `malloc` keeps 8 beside, and gives
/// multiples of 16, 32 at least.
pub const fn taken(bytes: usize) -> usize {
    if bytes == 0 { 0 } else { usable(bytes) + 8 }
}

/// Bytes that an allocation of so many bytes could have had for the same.
pub const fn usable(bytes: usize) -> usize {
    let taken = bytes.saturating_add(8).next_multiple_of(16);
    if taken < 32 { 24 } else { taken - 8 }
}

/// Bytes that a vector takes.
pub fn of_vec<T>(values: &Vec<T>) -> usize {
    taken(values.capacity() * size_of::<T>())
}

/// Bytes that a hash map takes.
pub fn of_map<K, V>(map: &HashMap<K, V>) -> usize {
    match map.capacity() {
        0 => 0,
        capacity => taken(of_buckets::<K, V>((capacity * 8 / 7).next_power_of_two())),
    }
}

/// Bytes that a hash map of so many buckets asks for: one of control for each, and 16 more. There
/// is a power of two of them.
pub const fn of_buckets<K, V>(buckets: usize) -> usize {
    buckets * (size_of::<(K, V)>() + 1) + 16
}

/// Bytes of a hash map for each value in it at most: it has just grown, and 7/16 of its buckets are
/// in use.
pub const fn of_value<K, V>() -> usize {
    ((size_of::<(K, V)>() + 1) * 16).div_ceil(7)
}

/// Makes room for so many more, and for an eighth of what is there: doubling would leave half of it
/// unused.
pub fn reserve_little<T>(values: &mut Vec<T>, more: usize) {
    if values.capacity() - values.len() < more {
        values.reserve_exact(more.max(values.len() / 8));
    }
}
