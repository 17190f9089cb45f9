//! A run of objects by rising address, in leaves of a few objects that lie one after the other.

use super::coding::{MOST, MOST_MORE, Reader, Writer};
use super::entry::Entry;
use crate::heap;

/// Most objects in a leaf. More of them take less memory and more time.
pub const LEAF: usize = 32;
/// Two leaves that have no more are made one.
const JOINED: usize = LEAF * 3 / 4;
/// Most leaves in a chunk, for how many room is made at a time, and how many two chunks may have
/// together to be made one.
pub const LEAVES: usize = 64;
const STEP: usize = 4;
const LEAVES_JOINED: usize = LEAVES * 3 / 4;

/// Most bytes by which a chunk grows if an object in it changes.
pub const CHANGE_MOST: usize = MOST_MORE + 16;
/// Most bytes by which it grows if one is added: the leaf becomes two, the second one told in full;
/// and so does the chunk.
pub const ADD_MOST: usize = CHANGE_MOST + MOST + 32 + STEP * size_of::<Leaf>() + 32;

/// Bytes before those of the objects.
const HEAD: usize = 2;

/// A few objects. None is empty.
#[derive(Debug)]
struct Leaf {
    /// The start of the first one.
    first: u64,
    /// How many there are, how many bytes are left at the end for what comes, and what a [`Writer`]
    /// wrote.
    bytes: Box<[u8]>,
}

impl Leaf {
    fn new(writer: &Writer) -> Self {
        let mut leaf = Self { first: 0, bytes: Box::default() };
        leaf.set(writer);
        leaf
    }

    fn set(&mut self, writer: &Writer) {
        self.first = writer.first();
        let len = HEAD + writer.bytes().len();
        if self.bytes.len() != heap::usable(len) {
            self.bytes = vec![0; heap::usable(len)].into();
        }
        let rest = self.bytes.len() - len;
        self.bytes[..HEAD].copy_from_slice(&[writer.len() as u8, rest as u8]);
        self.bytes[HEAD..len].copy_from_slice(writer.bytes());
    }

    fn len(&self) -> usize {
        self.bytes.first().copied().unwrap_or(0).into()
    }

    fn entries(&self) -> Reader<'_> {
        let bytes = match &*self.bytes {
            [_, rest, bytes @ ..] => bytes.get(..bytes.len().saturating_sub((*rest).into())),
            _ => None,
        };
        Reader::new(self.first, self.len(), bytes.unwrap_or(&[]))
    }

    /// This leaf and the one behind it as one, if they are small and take no more then.
    fn join(&self, behind: &Self) -> Option<Self> {
        if self.len() + behind.len() > JOINED {
            return None;
        }
        let mut writer = Writer::new(self.bytes.len() + behind.bytes.len() + MOST);
        self.entries().chain(behind.entries()).for_each(|entry| writer.push(&entry));
        Some(Self::new(&writer)).filter(|joined| joined.heap() <= self.heap() + behind.heap())
    }

    /// Bytes on the heap.
    fn heap(&self) -> usize {
        heap::taken(self.bytes.len())
    }
}

/// Some objects. Only a new one is empty, and one whose last object went.
#[derive(Debug, Default)]
pub struct Chunk {
    /// The start of the first one.
    first: u64,
    leaves: Vec<Leaf>,
    /// Bytes of the leaves' objects on the heap.
    bytes: usize,
}

impl Chunk {
    /// The start of the first object.
    pub fn first(&self) -> u64 {
        self.first
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.leaves.is_empty()
    }

    /// Bytes on the heap.
    pub fn heap(&self) -> usize {
        self.bytes + heap::of_vec(&self.leaves)
    }

    /// The leaf that an object which starts at `start` belongs to.
    fn find(&self, start: u64) -> usize {
        self.leaves.partition_point(|leaf| leaf.first <= start).saturating_sub(1)
    }

    /// The last object that starts at `start` or before.
    pub fn up_to(&self, start: u64) -> Option<Entry> {
        let leaf = self.leaves.get(self.find(start))?;
        let (mut entries, mut last) = (leaf.entries(), None);
        while entries.next_start().is_some_and(|next| next <= start) {
            last = entries.next();
        }
        last
    }

    /// The first object that starts at `start` or later.
    pub fn from(&self, start: u64) -> Option<Entry> {
        let leaves = self.leaves.get(self.find(start)..)?.iter().take(2);
        leaves.flat_map(Leaf::entries).find(|entry| entry.start >= start)
    }

    /// Puts what `change` makes of the object that starts at `start` in its place. It starts there
    /// as well.
    pub fn edit(&mut self, start: u64, change: impl FnOnce(Option<Entry>) -> Option<Entry>) {
        let at = self.find(start);
        let old = self.leaves.get(at);
        let mut writer = Writer::new(old.map_or(0, |leaf| leaf.bytes.len()) + MOST_MORE);
        let all = old.map_or(Reader::new(0, 0, &[]), Leaf::entries);
        let mut behind = all.clone();
        while behind.next_start().is_some_and(|next| next < start) {
            behind.next();
        }
        writer.copy_until(&all, &behind);
        let known = if behind.next_start() == Some(start) { behind.next() } else { None };
        let is_last = behind.next_start().is_none();
        if let Some(entry) = change(known) {
            writer.push(&entry);
        }
        writer.copy(behind);
        let before = old.map_or(0, Leaf::len);
        match self.leaves.get_mut(at) {
            _ if writer.len() == 0 => self.remove(at),
            None => self.insert(at, Leaf::new(&writer)),
            Some(leaf) => {
                self.bytes -= leaf.heap();
                leaf.set(&writer);
                self.bytes += leaf.heap();
                if writer.len() > LEAF {
                    // Objects often come by rising address: then the left part stays as it is.
                    self.split(at, if is_last { LEAF } else { LEAF / 2 });
                }
            }
        }
        if writer.len() < before {
            self.join(at);
            self.join(at.wrapping_sub(1));
        }
        self.first = self.leaves.first().map_or(0, |leaf| leaf.first);
    }

    fn insert(&mut self, at: usize, leaf: Leaf) {
        if self.leaves.len() == self.leaves.capacity() {
            self.leaves.reserve_exact(STEP);
        }
        self.bytes += leaf.heap();
        self.leaves.insert(at, leaf);
    }

    fn remove(&mut self, at: usize) {
        if at < self.leaves.len() {
            self.bytes -= self.leaves.remove(at).heap();
            self.shrink();
        }
    }

    fn shrink(&mut self) {
        if self.leaves.capacity() >= self.leaves.len() + 2 * STEP {
            self.leaves.shrink_to(self.leaves.len() + STEP);
        }
    }

    /// Makes two leaves of one: the first one keeps so many objects.
    fn split(&mut self, at: usize, keep: usize) {
        let Some(leaf) = self.leaves.get_mut(at) else { return };
        let (mut left, mut right) = (Writer::new(leaf.bytes.len()), Writer::new(leaf.bytes.len()));
        for (i, entry) in leaf.entries().enumerate() {
            if i < keep { left.push(&entry) } else { right.push(&entry) }
        }
        self.bytes -= leaf.heap();
        leaf.set(&left);
        self.bytes += leaf.heap();
        self.insert(at + 1, Leaf::new(&right));
    }

    /// Makes a leaf and the next one into one, if they are small.
    fn join(&mut self, at: usize) {
        let next = at.wrapping_add(1);
        let joined = self
            .leaves
            .get(at)
            .zip(self.leaves.get(next))
            .and_then(|(left, right)| left.join(right));
        if let Some(joined) = joined {
            self.remove(next);
            self.bytes -= self.leaves[at].heap();
            self.bytes += joined.heap();
            self.leaves[at] = joined;
        }
    }

    /// Shows all objects, which may change but for their starts. Those that are not to be kept go.
    pub fn rewrite(&mut self, change: &mut dyn FnMut(&mut Entry) -> bool) {
        let (mut entries, mut writer) = (Vec::with_capacity(LEAF), Writer::new(LEAF * MOST));
        for leaf in &mut self.leaves {
            entries.clear();
            let mut changed = false;
            for entry in leaf.entries() {
                let mut new = entry;
                let keep = change(&mut new);
                changed |= !keep || new != entry;
                if keep {
                    entries.push(new);
                }
            }
            if changed {
                writer.clear();
                entries.iter().for_each(|entry| writer.push(entry));
                leaf.set(&writer);
            }
        }
        self.leaves.retain(|leaf| leaf.len() > 0);
        self.leaves.dedup_by(|right, left| match left.join(right) {
            Some(joined) => {
                *left = joined;
                true
            }
            None => false,
        });
        self.shrink();
        self.first = self.leaves.first().map_or(0, |leaf| leaf.first);
        self.bytes = self.leaves.iter().map(Leaf::heap).sum();
    }

    /// If it is too large, takes half of it out.
    pub fn halve(&mut self) -> Option<Self> {
        if self.leaves.len() <= LEAVES {
            return None;
        }
        let leaves = self.leaves.split_off(LEAVES / 2);
        self.leaves.shrink_to_fit();
        let bytes = leaves.iter().map(Leaf::heap).sum();
        self.bytes -= bytes;
        Some(Self { first: leaves.first().map_or(0, |leaf| leaf.first), leaves, bytes })
    }

    /// Whether this chunk and the one behind it are small enough to be one.
    pub fn fits(&self, behind: &Self) -> bool {
        self.leaves.len() + behind.leaves.len() <= LEAVES_JOINED
    }

    /// Takes in the chunk behind it.
    pub fn append(&mut self, mut behind: Self) {
        self.leaves.reserve_exact(behind.leaves.len());
        self.leaves.append(&mut behind.leaves);
        self.bytes += behind.bytes;
    }
}

#[cfg(test)]
impl Chunk {
    /// All objects, once it is seen that the chunk is as it should be.
    pub fn checked(&self) -> Vec<Entry> {
        assert!((1..=LEAVES).contains(&self.leaves.len()));
        assert_eq!(self.bytes, self.leaves.iter().map(Leaf::heap).sum::<usize>());
        assert_eq!(self.first, self.leaves[0].first);
        assert!(self.leaves.capacity() < self.leaves.len() + 3 * STEP);
        for leaf in &self.leaves {
            assert!((1..=LEAF).contains(&leaf.len()) && leaf.entries().count() == leaf.len());
            assert_eq!(leaf.entries().next().map(|entry| entry.start), Some(leaf.first));
        }
        self.leaves.iter().flat_map(Leaf::entries).collect()
    }
}
