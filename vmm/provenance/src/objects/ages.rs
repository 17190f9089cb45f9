//! Which freed objects are older: frees are counted in ages, so that each object keeps one byte of
//! it.

/// Ages that there are. They are numbered by rising time.
pub const AGES: usize = 128;
/// Of so many objects, one is freed before the next age begins.
const PART: usize = 64;
/// No age has more than one in so many of the freed objects when ages are merged, but for those
/// that had before.
const MERGED: usize = 32;

/// How many freed objects there are of each age.
#[derive(Debug)]
pub struct Ages {
    counts: [u32; AGES],
    /// The age of what is freed now, and frees in it.
    now: usize,
    frees: usize,
    freed: usize,
}

impl Default for Ages {
    fn default() -> Self {
        Self { counts: [0; AGES], now: 0, frees: 0, freed: 0 }
    }
}

impl Ages {
    /// How many freed objects there are.
    pub fn freed(&self) -> usize {
        self.freed
    }

    /// Whether the next free needs [`Ages::merge`] before, in a table of so many objects.
    pub fn is_full(&self, objects: usize) -> bool {
        self.now + 1 == AGES && self.is_over(objects)
    }

    /// Whether enough was freed for a next age.
    fn is_over(&self, objects: usize) -> bool {
        self.frees >= (objects / PART).max(1)
    }

    /// One more freed object, in a table of so many. Returns its age.
    pub fn add(&mut self, objects: usize) -> u8 {
        if self.is_over(objects) && self.now + 1 < AGES {
            (self.now, self.frees) = (self.now + 1, 0);
        }
        self.frees += 1;
        self.freed += 1;
        self.counts[self.now] += 1;
        self.now as u8
    }

    /// One freed object of this age less.
    pub fn remove(&mut self, age: u8) {
        let Some(count) = self.counts.get_mut(usize::from(age)).filter(|count| **count > 0) else {
            return;
        };
        *count -= 1;
        self.freed -= 1;
    }

    /// The `most` oldest ones: all that are younger than none, and so many of the age that is
    /// returned.
    pub fn oldest(&self, most: usize) -> (u8, usize) {
        let mut left = most;
        for (age, count) in self.counts.iter().enumerate() {
            let count = *count as usize;
            if count >= left {
                return (age as u8, left);
            }
            left -= count;
        }
        (AGES as u8, 0)
    }

    /// Makes neighbouring ages of few objects one. Returns what each age is called from now on.
    pub fn merge(&mut self) -> [u8; AGES] {
        let most = self.freed / MERGED + 1;
        let (mut names, mut new, mut now) = ([0; AGES], Self::default(), 0);
        for (name, count) in names.iter_mut().zip(self.counts) {
            if new.counts[now] > 0 && new.counts[now] as usize + count as usize > most {
                now += 1;
            }
            new.counts[now] += count;
            *name = now as u8;
        }
        // What is freed from now on is younger.
        (new.now, new.freed, new.frees) = (now, self.freed, usize::MAX);
        *self = new;
        names
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn merged_ages_leave_room_for_half_of_all_objects() {
        for objects in [1, 10, 64, 1000, 100_000] {
            let mut ages = Ages::default();
            let fill = |ages: &mut Ages| {
                let mut frees = 0;
                while !ages.is_full(objects) {
                    let age = ages.add(objects);
                    if ages.freed() > objects {
                        ages.remove(age);
                    }
                    frees += 1;
                }
                frees
            };
            for _ in 0..10 {
                let frees = fill(&mut ages);
                assert!(frees >= 31 && frees >= objects / 3, "{frees} {objects}");
                ages.merge();
            }
        }
    }

    proptest! {
        /// A free is never called younger than a later one, and most merged ages stay small.
        #[test]
        fn ages_rise(
            steps in prop::collection::vec((any::<bool>(), any::<prop::sample::Index>()), 1..600),
        ) {
            let (mut ages, mut plain) = (Ages::default(), Vec::new());
            for (free, which) in steps {
                if ages.is_full(plain.len()) {
                    let names = ages.merge();
                    plain.iter_mut().for_each(|age| *age = names[usize::from(*age)]);
                }
                if free || plain.is_empty() {
                    plain.push(ages.add(plain.len()));
                } else {
                    ages.remove(plain.remove(which.index(plain.len())));
                }
                prop_assert!(plain.is_sorted() && ages.freed() == plain.len());
                let mut counts = [0; AGES];
                plain.iter().for_each(|age| counts[usize::from(*age)] += 1);
                prop_assert_eq!(ages.counts, counts);
                let most = which.index(plain.len() + 1);
                let (age, some) = ages.oldest(most);
                prop_assert_eq!(plain.iter().filter(|a| **a < age).count() + some, most);
            }
        }
    }
}
