//! Making room for tables of several clusters, which need free ones in a row.

use std::ops::Range;

use diskmill_core::Result;

use super::slide::Push;
use super::work::Work;

/// Tables that room is made for before anything else is moved.
const TABLES_AT_ONCE: usize = 16;

impl Work<'_> {
    /// Where tables are that are not looked up cluster by cluster: the runs of clusters of each.
    fn structures(&mut self) -> Result<Vec<Range<u64>>> {
        let bits = self.bits();
        let mut places = vec![(self.header.snapshots_offset.get(), self.snapshot_table_len()?)];
        for table in self.l1_tables()? {
            places.push((table.at, u64::from(table.entries) * 8));
        }
        if let Some((_, at, len)) = self.bitmap_directory()? {
            places.push((at, len));
        }
        for table in self.bitmap_tables()? {
            places.push((table.at, u64::from(table.entries) * 8));
        }
        let (table, clusters) = self.refcounts.table_place();
        places.push((table << bits, clusters << bits));
        let in_clusters = |(at, len): (u64, u64)| at >> bits..at.saturating_add(len).div_ceil(1 << bits);
        Ok(places
            .into_iter()
            .filter(|(_, len)| *len > 0)
            .map(in_clusters)
            .collect())
    }

    /// Empties runs below cluster `limit` for tables that lie behind it and found none. Returns whether there is room now
    /// that was not there before.
    pub(super) fn make_room(&mut self, limit: u64) -> Result<bool> {
        let mut fixed = self.structures()?;
        let mut wanted: Vec<u64> = fixed
            .iter()
            .filter(|place| place.end > limit && place.end - place.start > 1)
            .map(|place| place.end - place.start)
            .collect();
        if wanted.is_empty() {
            return Ok(false);
        }
        wanted.sort_unstable_by_key(|len| std::cmp::Reverse(*len));
        wanted.truncate(TABLES_AT_ONCE);
        fixed.push(0..1);
        fixed.extend(
            self.packed_clusters(limit)?
                .into_iter()
                .map(|at| at..at.saturating_add(1)),
        );
        let mut made = false;
        for len in wanted {
            fixed.sort_unstable_by_key(|place| place.start);
            let Some(window) = self.emptiest(len, limit, &fixed)? else {
                continue;
            };
            made |= self.empty(&window)?;
            fixed.push(window);
        }
        Ok(made)
    }

    /// The run of `len` clusters below `limit` with the fewest in use, none of them in `fixed`, which is sorted.
    fn emptiest(&mut self, len: u64, limit: u64, fixed: &[Range<u64>]) -> Result<Option<Range<u64>>> {
        let mut best: Option<(u64, u64)> = None;
        let mut fixed = fixed.iter();
        let mut barrier = fixed.next();
        let (mut start, mut used) = (0, 0);
        for cluster in 0..limit {
            if cluster % 65_536 == 0 {
                self.job.check()?;
            }
            while barrier.is_some_and(|place| place.end <= cluster) {
                barrier = fixed.next();
            }
            if barrier.is_some_and(|place| place.contains(&cluster)) {
                (start, used) = (cluster.saturating_add(1), 0);
                continue;
            }
            used += u64::from(self.count(cluster)? > 0);
            if cluster.saturating_add(1) - start > len {
                used -= u64::from(self.count(start)? > 0);
                start += 1;
            }
            let whole = cluster.saturating_add(1) - start == len;
            if whole && best.is_none_or(|(fewest, _)| used < fewest) {
                best = Some((used, start));
            }
        }
        Ok(best.map(|(_, start)| start..start.saturating_add(len)))
    }

    /// Moves what is in a run of clusters elsewhere, behind the end of the file if there is no other place. Returns
    /// whether it is all free then.
    fn empty(&mut self, window: &Range<u64>) -> Result<bool> {
        let mut held = Vec::new();
        for cluster in window.clone() {
            // Nothing must be moved to where it is to be moved away from.
            if self.count(cluster)? == 0 && self.refcounts.take_one(&mut self.fence, cluster, 1)? {
                held.push(cluster);
            }
        }
        let push = Push {
            from: window.clone(),
            below: u64::MAX,
        };
        let done = self.move_singles(&push);
        for cluster in held {
            self.refcounts.sub(&mut self.fence, cluster, 1)?;
        }
        done?;
        let mut free = true;
        for cluster in window.clone() {
            free &= self.count(cluster)? == 0;
        }
        Ok(free)
    }
}
