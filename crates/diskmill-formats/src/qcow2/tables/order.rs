//! When and in which order changes reach the disk.

use std::ops::Range;

use diskmill_core::{HostOffset, Result, SECTOR};

use super::{Dropped, ENTRIES_PER_SECTOR, Reclaim, Table, Tables};
use crate::qcow2::fence::{Fence, Part};
use crate::qcow2::map::L1Entry;

/// Dropped references kept in memory before they are settled.
pub(super) const MAX_DROPPED: usize = 4096;
/// Host bytes they may keep occupied.
const MAX_DROPPED_BYTES: u64 = 1 << 30;

/// Where the header keeps the L1 table's entries (4 bytes) and, behind that, its offset (8 bytes).
const HEADER_L1_AT: usize = 36;

impl Tables {
    /// Settles dropped references if there are many.
    pub(crate) fn settle_if_many(&mut self) -> Result<()> {
        if self.dropped.len() > MAX_DROPPED
            || self.dropped_clusters > MAX_DROPPED_BYTES >> self.geometry.cluster_bits().get()
        {
            self.write_back(true)
        } else {
            Ok(())
        }
    }

    /// Writes all changes, in the order the module describes. With `durable`, returns when they are on stable storage,
    /// and settles dropped references.
    pub(crate) fn write_back(&mut self, durable: bool) -> Result<()> {
        self.refcounts.write_blocks(&mut self.fence)?;
        if self.refcounts.table_is_dirty() {
            self.fence.barrier()?;
            self.refcounts.write_table(&mut self.fence)?;
        }
        if self.l2.values().any(|table| !table.dirty.is_empty()) {
            self.fence.barrier()?;
            for (at, table) in &mut self.l2 {
                write_table(&mut self.fence, *at, table)?;
            }
        }
        if !self.dirty_l1.is_empty() {
            self.fence.barrier()?;
            self.write_l1()?;
        }
        if durable {
            self.fence.sync()?;
            self.settle()?;
        }
        Ok(())
    }

    /// Whether there is anything to write back or to settle.
    pub(crate) fn is_dirty(&self) -> bool {
        self.refcounts.is_dirty()
            || !self.dirty_l1.is_empty()
            || !self.dropped.is_empty()
            || self.l2.values().any(|table| !table.dirty.is_empty())
    }

    /// Makes all that was written durable and reachable.
    pub(crate) fn flush(&mut self) -> Result<()> {
        if self.packed_at.is_some() && !self.fence.file().hints().fixed_len {
            // Readers may insist on whole sectors.
            let len = self.fence.file().len()?;
            if !len.is_multiple_of(SECTOR) {
                self.fence.file().set_len(len.next_multiple_of(SECTOR))?;
            }
        }
        self.write_back(true)
    }

    fn write_l1(&mut self) -> Result<()> {
        while let Some(sector) = self.dirty_l1.first().copied() {
            let first = sector * ENTRIES_PER_SECTOR;
            let mut raw: Vec<u8> = self
                .l1
                .iter()
                .skip(first)
                .take(ENTRIES_PER_SECTOR)
                .flat_map(|entry| entry.0.to_be_bytes())
                .collect();
            // The rest of the table's last cluster is its own; whole sectors are not torn.
            raw.resize(ENTRIES_PER_SECTOR * 8, 0);
            self.fence
                .write(Part::ActiveL1, self.l1_at.get() + first as u64 * 8, &raw)?;
            self.dirty_l1.remove(&sector);
        }
        Ok(())
    }

    /// Lowers the counts of clusters whose references are durably gone.
    pub(super) fn settle(&mut self) -> Result<()> {
        let bits = self.geometry.cluster_bits().get();
        let dropped = std::mem::take(&mut self.dropped);
        self.dropped_clusters = 0;
        for Dropped {
            first,
            count,
            times,
            reclaim,
        } in dropped
        {
            let reclaim = reclaim == Reclaim::Always || reclaim == Reclaim::IfAsked && self.unmap;
            let mut free: Option<Range<u64>> = None;
            for cluster in first..first.saturating_add(count) {
                if self.refcounts.lower_by(&mut self.fence, cluster, times)? > 0 {
                    continue;
                }
                self.unpack_from(cluster);
                match &mut free {
                    Some(range) if range.end == cluster => range.end += 1,
                    _ => {
                        let done = free.replace(cluster..cluster + 1);
                        self.reclaim(done.filter(|_| reclaim), bits)?;
                    }
                }
            }
            self.reclaim(free.filter(|_| reclaim), bits)?;
        }
        self.refcounts.write_blocks(&mut self.fence)
    }

    /// Gives the host back the space of clusters that are free.
    fn reclaim(&mut self, free: Option<Range<u64>>, bits: u32) -> Result<()> {
        let Some(free) = free else {
            return Ok(());
        };
        let range = free.start << bits..free.end << bits;
        self.fence.check(Part::Data, range.clone())?;
        let len = self.fence.file().len()?;
        let range = range.start..range.end.min(len);
        if range.start < range.end {
            self.fence
                .file()
                .discard(HostOffset::new(range.start)..HostOffset::new(range.end))?;
        }
        Ok(())
    }

    /// Moves the L1 table to a place where it has `entries` entries; the header is switched in one write.
    pub(crate) fn grow_l1(&mut self, entries: u64) -> Result<()> {
        let cluster = self.geometry.cluster_size();
        let bits = self.geometry.cluster_bits().get();
        self.write_back(true)?;
        let old = self.l1_at.get()..self.l1_at.get() + self.l1.len() as u64 * 8;
        let clusters = (entries * 8).div_ceil(cluster);
        let (first, _) = self.allocate(clusters, clusters)?;
        let at = HostOffset::new(first << bits);
        let mut l1 = self.l1.clone();
        l1.resize(usize::try_from(entries).unwrap_or(0), L1Entry::default());
        let mut raw: Vec<u8> = l1.iter().flat_map(|entry| entry.0.to_be_bytes()).collect();
        raw.resize(usize::try_from(clusters * cluster).unwrap_or(0), 0);
        self.refcounts.write_blocks(&mut self.fence)?;
        if self.refcounts.table_is_dirty() {
            self.fence.barrier()?;
            self.refcounts.write_table(&mut self.fence)?;
        }
        self.fence.write(Part::ActiveL1, at.get(), &raw)?;
        self.fence.barrier()?;
        let mut pointer = [0; 12];
        let (count, place) = pointer.split_at_mut(4);
        count.copy_from_slice(&u32::try_from(entries).unwrap_or(u32::MAX).to_be_bytes());
        place.copy_from_slice(&at.get().to_be_bytes());
        self.fence.write_header(HEADER_L1_AT, &pointer)?;
        self.fence.sync()?;

        self.fence.unprotect(old.start);
        self.fence
            .protect(at.get()..at.get() + entries * 8, Part::ActiveL1);
        (self.l1, self.l1_at) = (l1, at);
        if old.start < old.end {
            self.drop_clusters(
                old.start >> bits,
                (old.end - old.start).div_ceil(cluster),
                Reclaim::Keep,
            );
        }
        self.settle()
    }

    /// Writes header bytes at `at` and makes them durable.
    pub(crate) fn write_header(&mut self, at: usize, bytes: &[u8]) -> Result<()> {
        self.fence.write_header(at, bytes)?;
        self.fence.sync()
    }

    /// Ends the file behind the last cluster in use. All changes must have been written back.
    pub(crate) fn truncate(&mut self) -> Result<()> {
        if self.fence.file().hints().fixed_len {
            return Ok(());
        }
        self.refcounts.drop_empty_blocks(&mut self.fence)?;
        let end = self.refcounts.used_end(&mut self.fence)? << self.geometry.cluster_bits().get();
        if end > 0 && end < self.fence.file().len()? {
            self.fence.file().set_len(end)?;
        }
        Ok(())
    }
}

fn write_table(fence: &mut Fence, at: u64, table: &mut Table) -> Result<()> {
    if table.dirty.is_empty() {
        return Ok(());
    }
    // Whole sectors of 64 words.
    let start = table.dirty.start & !63;
    let end = table.dirty.end.next_multiple_of(64).min(table.words.len());
    if let Some(words) = table.words.get(start..end) {
        let raw: Vec<u8> = words.iter().flat_map(|word| word.to_be_bytes()).collect();
        fence.write(Part::ActiveL2, at + start as u64 * 8, &raw)?;
    }
    table.dirty = 0..0;
    Ok(())
}
