//! Places for new structures.

use std::ops::Range;

use diskmill_core::Result;

use super::super::refs::Counts;
use super::RepairError;

/// Clusters that nothing uses: not the image as it was, not as it is to become.
pub(super) struct Space<'a> {
    used: Vec<&'a Counts>,
    /// No cluster below is free.
    next: u64,
    /// The clusters of a file that cannot grow.
    end: Option<u64>,
}

impl<'a> Space<'a> {
    pub(super) fn new(used: Vec<&'a Counts>, end: Option<u64>) -> Self {
        Self { used, next: 1, end }
    }

    /// Takes `count` clusters in a row.
    pub(super) fn take(&mut self, target: &mut Counts, count: u64) -> Result<Range<u64>> {
        let mut start = self.next;
        let mut len = 0;
        let mut first = true;
        loop {
            let cluster = start.saturating_add(len);
            if self.end.is_some_and(|end| cluster >= end) {
                return Err(RepairError::Full(count).into());
            }
            if target.get(cluster) == 0 && self.used.iter().all(|used| used.get(cluster) == 0) {
                len = len.saturating_add(1);
                if len >= count {
                    break;
                }
                continue;
            }
            // Gaps that are too short stay for others.
            first &= len == 0;
            start = cluster.saturating_add(1);
            len = 0;
            if first {
                self.next = start;
            }
        }
        let taken = start..start.saturating_add(count);
        if first {
            self.next = taken.end;
        }
        target.add(taken.clone(), 1);
        Ok(taken)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_nobody_uses_is_taken() {
        let (mut old, mut target) = (Counts::default(), Counts::default());
        old.add(1..3, 1);
        target.add(4..6, 2);
        let mut space = Space::new(vec![&old], Some(12));
        assert_eq!(space.take(&mut target, 2).unwrap(), 6..8);
        assert_eq!(space.take(&mut target, 1).unwrap(), 3..4);
        assert_eq!(space.take(&mut target, 4).unwrap(), 8..12);
        space.take(&mut target, 1).unwrap_err();
        assert_eq!((target.get(3), target.get(6), target.get(2)), (1, 1, 0));
    }
}
