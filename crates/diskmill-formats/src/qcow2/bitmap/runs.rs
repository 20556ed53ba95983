//! Reading what a bitmap says.

#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

use std::ops::Range;
use std::sync::Arc;

use diskmill_core::{DirtyRuns, GuestOffset, Result, Storage};

use super::table::{self, Bits};
use super::{Bitmap, Shape};

/// Table entries that are read at once.
const ENTRIES: u64 = 512;

/// The dirty runs of a bitmap, read a cluster of bits at a time.
#[derive(Debug)]
pub(crate) struct Runs {
    file: Arc<dyn Storage>,
    bitmap: Bitmap,
    shape: Shape,
    /// Table entries from this one on.
    first: u64,
    entries: Vec<Bits>,
    /// The bits of this table entry.
    loaded: Option<u64>,
    bits: Vec<u8>,
    /// All bits below have been looked at.
    at: u64,
}

impl Runs {
    /// The runs of a sound bitmap in `file`.
    pub(crate) fn new(file: Arc<dyn Storage>, bitmap: &Bitmap, shape: Shape) -> Self {
        Self {
            file,
            bitmap: bitmap.clone(),
            shape,
            first: 0,
            entries: Vec::new(),
            loaded: None,
            bits: Vec::new(),
            at: 0,
        }
    }

    fn entry(&mut self, index: u64) -> Result<Bits> {
        let known = |first: u64, entries: &[Bits]| {
            let index = usize::try_from(index.checked_sub(first)?).ok()?;
            entries.get(index).copied()
        };
        if let Some(bits) = known(self.first, &self.entries) {
            return Ok(bits);
        }
        let count = u64::from(self.bitmap.table_entries)
            .saturating_sub(index)
            .min(ENTRIES);
        let cluster_size = 1 << self.shape.cluster_bits;
        self.entries = table::read(self.file.as_ref(), &self.bitmap, cluster_size, index, count)?;
        self.first = index;
        // A table that is too short has been refused.
        Ok(known(self.first, &self.entries).unwrap_or(Bits::Clear))
    }

    /// The first bit from `self.at` on that is `set`, if there is one.
    fn find(&mut self, set: bool) -> Result<Option<u64>> {
        while self.at < self.shape.bits() {
            let index = self.shape.entry_of(self.at);
            let range = self.shape.bits_of(index);
            let found = match self.entry(index)? {
                Bits::Clear => (!set).then_some(self.at),
                Bits::Set => set.then_some(self.at),
                Bits::At(offset) => {
                    if self.loaded != Some(index) {
                        let len = range.end.saturating_sub(range.start).div_ceil(8);
                        self.bits.resize(usize::try_from(len).unwrap_or(0), 0);
                        self.loaded = None;
                        self.file.read_padded(offset, &mut self.bits)?;
                        self.loaded = Some(index);
                    }
                    let within = self.at.saturating_sub(range.start)..range.end.saturating_sub(range.start);
                    find_bit(&self.bits, within, set).map(|bit| range.start.saturating_add(bit))
                }
            };
            match found {
                Some(bit) => {
                    self.at = bit;
                    return Ok(Some(bit));
                }
                None => self.at = range.end,
            }
        }
        Ok(None)
    }
}

impl DirtyRuns for Runs {
    fn disk_size(&self) -> u64 {
        self.shape.disk_size
    }

    fn next_run(&mut self) -> Result<Option<Range<GuestOffset>>> {
        let Some(start) = self.find(true)? else {
            return Ok(None);
        };
        let end = self.find(false)?.unwrap_or_else(|| self.shape.bits());
        Ok(Some(self.shape.guest(start..end)))
    }
}

/// The first bit of `range` that is `set`.
fn find_bit(bytes: &[u8], range: Range<u64>, set: bool) -> Option<u64> {
    // A word in which no bit is of the wanted sort.
    let (dull, flip) = if set { (0, 0) } else { (u64::MAX, u64::MAX) };
    let mut at = range.start;
    while at < range.end {
        let word_at = usize::try_from(at >> 6).ok()?.checked_mul(8)?;
        let rest = bytes.get(word_at..)?;
        let mut word = [0; 8];
        for (to, from) in word.iter_mut().zip(rest) {
            *to = *from;
        }
        let word = u64::from_le_bytes(word);
        if word != dull {
            let shift = u32::try_from(at & 63).ok()?;
            let seen = (word ^ flip).checked_shr(shift)?;
            if seen != 0 {
                let bit = at.checked_add(seen.trailing_zeros().into())?;
                return (bit < range.end).then_some(bit);
            }
        }
        at = (at | 63).checked_add(1)?;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_found_lowest_first() {
        let mut bytes = vec![0; 40];
        for bit in [0, 7, 8, 63, 64, 200, 319] {
            bytes[bit / 8] |= 1 << (bit % 8);
        }
        let mut found = Vec::new();
        let mut at = 0;
        while let Some(bit) = find_bit(&bytes, at..320, true) {
            found.push(bit);
            at = bit + 1;
        }
        assert_eq!(found, [0, 7, 8, 63, 64, 200, 319]);
        assert_eq!(find_bit(&bytes, 0..320, false), Some(1));
        assert_eq!(find_bit(&bytes, 7..320, false), Some(9));
        assert_eq!(find_bit(&bytes, 201..319, true), None);
        assert_eq!(find_bit(&[0xff; 3], 0..24, false), None);
        assert_eq!(find_bit(&[0xff; 3], 0..20, true), Some(0));
        assert_eq!(find_bit(&[0, 0, 0x80], 0..23, true), None);
    }
}
