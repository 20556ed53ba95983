//! Which places of a file, all of one size, are taken.

/// A set of slots.
#[derive(Clone, Debug, Default)]
pub(crate) struct Slots {
    words: Vec<u64>,
    count: u32,
    /// No slot below is free.
    low: u32,
}

impl Slots {
    fn word(slot: u32) -> (usize, u64) {
        (usize::try_from(slot / 64).unwrap_or(usize::MAX), 1 << (slot % 64))
    }

    /// Adds a slot; `false` if it was there.
    pub(crate) fn add(&mut self, slot: u32) -> bool {
        let (index, bit) = Self::word(slot);
        if self.words.len() <= index {
            self.words.resize(index.saturating_add(1), 0);
        }
        match self.words.get_mut(index) {
            Some(word) if *word & bit == 0 => {
                *word |= bit;
                self.count = self.count.saturating_add(1);
                true
            }
            _ => false,
        }
    }

    /// Removes a slot.
    pub(crate) fn remove(&mut self, slot: u32) {
        let (index, bit) = Self::word(slot);
        if let Some(word) = self.words.get_mut(index)
            && *word & bit != 0
        {
            *word &= !bit;
            self.count = self.count.saturating_sub(1);
            self.low = self.low.min(slot);
        }
    }

    pub(crate) fn has(&self, slot: u32) -> bool {
        let (index, bit) = Self::word(slot);
        self.words.get(index).is_some_and(|word| word & bit != 0)
    }

    /// How many there are.
    pub(crate) fn count(&self) -> u32 {
        self.count
    }

    /// The lowest slot from `from` on that is not in the set.
    pub(crate) fn free_from(&self, from: u32) -> u32 {
        let mut slot = from.max(self.low);
        loop {
            let (index, bit) = Self::word(slot);
            match self.words.get(index) {
                None => return slot,
                Some(&u64::MAX) => slot = (slot / 64).saturating_add(1).saturating_mul(64),
                Some(word) if word & bit == 0 => return slot,
                Some(_) => slot = slot.saturating_add(1),
            }
        }
    }

    /// How many of them are `slot` or above.
    pub(crate) fn above(&self, slot: u32) -> u32 {
        let all = (slot..self.end()).filter(|slot| self.has(*slot)).count();
        u32::try_from(all).unwrap_or(u32::MAX)
    }

    /// One above the highest slot in the set.
    pub(crate) fn end(&self) -> u32 {
        let last = self.words.iter().rposition(|word| *word != 0);
        match last.and_then(|index| Some((index, self.words.get(index)?))) {
            Some((index, word)) => {
                let base = u32::try_from(index).unwrap_or(u32::MAX).saturating_mul(64);
                base.saturating_add(64_u32.saturating_sub(word.leading_zeros()))
            }
            None => 0,
        }
    }
}
