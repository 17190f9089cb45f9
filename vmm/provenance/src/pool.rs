//! Values in one vector that keep their number, and whose places are used again.

use crate::heap;

/// A place in a [`Pool`].
#[derive(Debug)]
enum Place<T> {
    Used(T),
    /// The next free place.
    Free(u32),
}

/// No place.
pub const NO_PLACE: u32 = u32::MAX;

/// Values by number.
#[derive(Debug)]
pub struct Pool<T> {
    places: Vec<Place<T>>,
    /// The first free place.
    free: u32,
    len: usize,
}

impl<T> Default for Pool<T> {
    fn default() -> Self {
        Self { places: Vec::new(), free: NO_PLACE, len: 0 }
    }
}

impl<T> Pool<T> {
    /// Values in it.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Bytes of a place.
    pub const PLACE: usize = size_of::<Place<T>>();

    /// Host memory, in bytes.
    pub fn bytes(&self) -> usize {
        heap::of_vec(&self.places)
    }

    /// Bytes of host memory that the next value adds; none if there are no more numbers.
    pub fn growth(&self) -> Option<usize> {
        if self.free != NO_PLACE || self.places.len() < self.places.capacity() {
            return Some(0);
        }
        let len = self.places.len();
        let grown = heap::taken((len + heap::little(len, 1)) * Self::PLACE);
        (len < NO_PLACE as usize - 1).then_some(grown - self.bytes())
    }

    /// Puts a value in, and returns its number.
    pub fn insert(&mut self, value: T) -> u32 {
        self.len += 1;
        let place = Place::Used(value);
        if let Some(Place::Free(next)) = self.places.get(self.free as usize) {
            let (at, next) = (self.free, *next);
            self.places[at as usize] = place;
            self.free = next;
            return at;
        }
        heap::reserve_little(&mut self.places, 1);
        self.places.push(place);
        self.places.len() as u32 - 1
    }

    /// Takes a value out.
    pub fn remove(&mut self, at: u32) -> Option<T> {
        let place = self.places.get_mut(at as usize)?;
        if matches!(place, Place::Free(_)) {
            return None;
        }
        let Place::Used(value) = std::mem::replace(place, Place::Free(self.free)) else {
            return None;
        };
        self.free = at;
        self.len -= 1;
        Some(value)
    }

    /// The value with this number.
    pub fn get(&self, at: u32) -> Option<&T> {
        match self.places.get(at as usize)? {
            Place::Used(value) => Some(value),
            Place::Free(_) => None,
        }
    }

    /// The value with this number.
    pub fn get_mut(&mut self, at: u32) -> Option<&mut T> {
        match self.places.get_mut(at as usize)? {
            Place::Used(value) => Some(value),
            Place::Free(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_used_again_and_growth_is_foreseen() {
        let mut pool = Pool::default();
        for i in 0..1000u32 {
            let before = pool.bytes();
            let growth = pool.growth().unwrap();
            assert_eq!(pool.insert(i), i);
            assert_eq!(pool.bytes() - before, growth);
        }
        assert_eq!((pool.remove(7), pool.remove(7), pool.remove(5000)), (Some(7), None, None));
        assert!(pool.get(7).is_none() && pool.get_mut(7).is_none() && pool.len() == 999);
        assert_eq!(pool.remove(9), Some(9));
        assert_eq!((pool.growth(), pool.insert(1), pool.insert(2)), (Some(0), 9, 7));
        assert_eq!((pool.get(7), pool.len()), (Some(&2), 1000));
    }
}
