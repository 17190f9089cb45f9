//! Storage for many small values that keep their places, made for little memory: none beside the values but a pointer for each
//! chunk of them. It does not shrink; a place that was given up is used again.

use super::table::{END, Place};

/// What can be in a [`Slab`]: some of its values mean that nothing is there.
pub trait Slot: Copy {
    /// Nothing, and a place for the [`Slab`] to keep.
    fn vacant(next: Place) -> Self;
    /// The place in it, if nothing is there.
    fn next(&self) -> Option<Place>;
}

/// Values in a chunk, and how many room is made for at a time in the last one.
const CHUNK: usize = 256;
const STEP: usize = 16;

/// Values by place.
#[derive(Debug)]
pub struct Slab<T> {
    /// All are full but the last one.
    chunks: Vec<Vec<T>>,
    /// The first vacant place; each keeps the next.
    vacant: Place,
}

impl<T> Default for Slab<T> {
    fn default() -> Self {
        Self { chunks: Vec::new(), vacant: END }
    }
}

impl<T: Slot> Slab<T> {
    /// Bytes of host memory that it takes.
    pub fn bytes(&self) -> usize {
        let values: usize = self.chunks.iter().map(Vec::capacity).sum();
        values * size_of::<T>() + self.chunks.capacity() * size_of::<Vec<T>>()
    }

    /// The value at a place, if it was ever used.
    pub fn get(&self, place: Place) -> Option<&T> {
        self.chunks.get(place as usize / CHUNK)?.get(place as usize % CHUNK)
    }

    /// [`Slab::get`].
    pub fn get_mut(&mut self, place: Place) -> Option<&mut T> {
        self.chunks.get_mut(place as usize / CHUNK)?.get_mut(place as usize % CHUNK)
    }

    /// All values, in no order.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.chunks.iter_mut().flatten().filter(|value| value.next().is_none())
    }

    /// Finds a place for a value. There are fewer than [`END`].
    pub fn insert(&mut self, value: T) -> Place {
        let place = self.vacant;
        if let Some(slot) = self.get_mut(place)
            && let Some(next) = slot.next()
        {
            *slot = value;
            self.vacant = next;
            return place;
        }
        if self.chunks.last().is_none_or(|chunk| chunk.len() == CHUNK) {
            reserve_little(&mut self.chunks);
            self.chunks.push(Vec::new());
        }
        let before = (self.chunks.len() - 1) * CHUNK;
        let Some(chunk) = self.chunks.last_mut() else { return END };
        if chunk.len() == chunk.capacity() {
            chunk.reserve_exact(STEP);
        }
        chunk.push(value);
        (before + chunk.len() - 1) as Place
    }

    /// Gives a place up.
    pub fn remove(&mut self, place: Place) {
        let next = self.vacant;
        if let Some(slot) = self.get_mut(place).filter(|slot| slot.next().is_none()) {
            *slot = T::vacant(next);
            self.vacant = place;
        }
    }
}

/// Makes room for one more, and for an eighth of what is there: doubling would leave half of it unused.
pub fn reserve_little<T>(values: &mut Vec<T>) {
    if values.len() == values.capacity() {
        values.reserve_exact(values.len() / 8 + 1);
    }
}
