//! Guest bytes that were changed and are not in the bitmaps yet.

use std::collections::BTreeMap;
use std::ops::Range;

/// Runs kept in memory.
const MAX_RUNS: usize = 1 << 16;

/// Runs of guest bytes, by start; no two touch.
#[derive(Debug, Default)]
pub(super) struct Changed {
    runs: BTreeMap<u64, u64>,
}

impl Changed {
    /// Adds `range`, in steps of `step` bytes, a power of two.
    pub(super) fn add(&mut self, range: &Range<u64>, step: u64) {
        if range.is_empty() {
            return;
        }
        let mut start = range.start & !(step - 1);
        let mut end = range.end.checked_next_multiple_of(step).unwrap_or(u64::MAX);
        // From the right, so that what is joined is at the end of what is left to look at.
        while let Some((known_start, known_end)) = self.runs.range(..=end).next_back() {
            if *known_end < start {
                break;
            }
            if *known_start <= start && *known_end >= end {
                return;
            }
            (start, end) = (start.min(*known_start), end.max(*known_end));
            let known = *known_start;
            self.runs.remove(&known);
        }
        self.runs.insert(start, end);
    }

    /// Whether there are more runs than should be kept.
    pub(super) fn is_full(&self) -> bool {
        self.runs.len() > MAX_RUNS
    }

    /// All runs, in order.
    pub(super) fn runs(&self) -> impl Iterator<Item = Range<u64>> {
        self.runs.iter().map(|(start, end)| *start..*end)
    }

    /// Forgets all runs.
    pub(super) fn clear(&mut self) {
        self.runs.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_that_touch_are_one() {
        let mut changed = Changed::default();
        for range in [
            5000..5001,
            0..1,
            9000..9000,
            20000..30000,
            8192..8193,
            25000..26000,
        ] {
            changed.add(&range, 4096);
        }
        let runs: Vec<_> = changed.runs().collect();
        assert_eq!(runs, [0..12288, 16384..32768]);
        changed.add(&(12287..16385), 512);
        assert!(changed.runs().eq(std::iter::once(0..32768)));
        changed.add(&(u64::MAX - 1..u64::MAX), 4096);
        assert_eq!(changed.runs().count(), 2);
        changed.clear();
        assert_eq!(changed.runs().count(), 0);
    }
}
