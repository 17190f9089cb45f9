//! Host memory of collections, including the allocator's overhead.

use hashbrown::HashTable;

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

/// Bytes that a hash map allocates for its buckets (a power of two), with a control byte for each
/// and 16 more.
pub const fn of_buckets<K, V>(buckets: usize) -> usize {
    buckets * (size_of::<(K, V)>() + 1) + 16
}

/// Host memory of a hash table.
pub fn of_table<T>(table: &HashTable<T>) -> usize {
    taken(table.allocation_size())
}

/// Most bytes of host memory that the next value adds to a hash table, which may double then.
pub fn growth_of_table<T>(table: &HashTable<T>) -> usize {
    // The first allocation has four or more buckets, and control bytes for a group.
    const FIRST: usize = 128;
    if table.len() < table.capacity() { 0 } else { table.allocation_size() + FIRST }
}

/// How many values more a vector of `len` gets room for if `more` find none: a sixteenth of them at
/// least. Doubling would leave up to half unused.
pub fn little(len: usize, more: usize) -> usize {
    more.max(len / 16)
}

/// Reserves room for `more` values; see [`little`].
pub fn reserve_little<T>(values: &mut Vec<T>, more: usize) {
    if values.capacity() - values.len() < more {
        values.reserve_exact(little(values.len(), more));
    }
}
