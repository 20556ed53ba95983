//! What moving clusters about needs of refcounts: choosing places, and moving the refcounts themselves.

use diskmill_core::{Error, ErrorKind, Result};

use super::count::{get_count, set_count};
use super::table::HEADER_TABLE_AT;
use super::{RefcountError, Refcounts};
use crate::qcow2::fence::{Fence, Part};

impl Refcounts {
    /// How many clusters have a count that is not zero.
    pub(crate) fn used(&mut self, fence: &mut Fence) -> Result<u64> {
        let (per_block, order) = (self.per_block(), self.order);
        let mut used = 0_u64;
        for index in 0..self.table.len() as u64 {
            if let Some(block) = self.block(fence, index)? {
                let counted = (0..per_block).filter(|at| get_count(&block.bytes, order, *at) != 0);
                used = used.saturating_add(counted.count() as u64);
            }
        }
        Ok(used)
    }

    /// Sets all counts from `cluster` on to zero.
    pub(crate) fn clear_from(&mut self, fence: &mut Fence, cluster: u64) -> Result<()> {
        let (per_block, order) = (self.per_block(), self.order);
        for index in cluster / per_block..self.table.len() as u64 {
            let first = index * per_block;
            let Some(block) = self.block(fence, index)? else {
                continue;
            };
            for at in cluster.saturating_sub(first)..per_block {
                if get_count(&block.bytes, order, at) != 0 {
                    let touched = set_count(&mut block.bytes, order, at, 0);
                    block.dirty = super::join(&block.dirty, touched);
                }
            }
        }
        Ok(())
    }

    /// The first free cluster.
    pub(crate) fn first_free(&mut self, fence: &mut Fence) -> Result<u64> {
        self.hint = self.next_free(fence, self.hint)?;
        Ok(self.hint)
    }

    /// Gives the first `len` free clusters in one run `count` each, if there are any that end at `limit` at the latest.
    pub(crate) fn take_run(
        &mut self,
        fence: &mut Fence,
        len: u64,
        count: u64,
        limit: u64,
    ) -> Result<Option<u64>> {
        if count > self.max() {
            return Ok(None);
        }
        let mut at = self.first_free(fence)?;
        while at.saturating_add(len) <= limit {
            let free = self.free_run(fence, at, len)?;
            if free < len {
                at = self.next_free(fence, at + free)?;
                continue;
            }
            if self.ensure_blocks(fence, at..at + len)? {
                // A new block took a free cluster, perhaps one of these.
                at = self.first_free(fence)?;
                continue;
            }
            self.guard(fence, at, len)?;
            for cluster in at..at + len {
                self.set(fence, cluster, count)?;
            }
            return Ok(Some(at));
        }
        Ok(None)
    }

    /// Gives `cluster` `count`. `false` if it is not free, or nothing counts it yet.
    pub(crate) fn take_one(&mut self, fence: &mut Fence, cluster: u64, count: u64) -> Result<bool> {
        if matches!(self.entry(cluster / self.per_block()), None | Some(0))
            || self.get(fence, cluster)? != 0
            || count > self.max()
            || self.room(cluster)? == 0
        {
            return Ok(false);
        }
        self.guard(fence, cluster, 1)?;
        self.set(fence, cluster, count)?;
        Ok(true)
    }

    /// Adds `count` to the count of a cluster that has one. `false` if its bits cannot hold that.
    pub(crate) fn add(&mut self, fence: &mut Fence, cluster: u64, count: u64) -> Result<bool> {
        let old = self.get(fence, cluster)?;
        match old.checked_add(count) {
            Some(sum) if sum <= self.max() => self.set(fence, cluster, sum).map(|()| true),
            _ => Ok(false),
        }
    }

    /// Takes `count` from the count of a cluster, as [`lower`](Self::lower) does. Returns what is left.
    pub(crate) fn sub(&mut self, fence: &mut Fence, cluster: u64, count: u64) -> Result<u64> {
        let left = self.get(fence, cluster)?.saturating_sub(count);
        self.set(fence, cluster, left)?;
        if left == 0 {
            self.hint = self.hint.min(cluster);
        }
        Ok(left)
    }

    /// The blocks there are: number, and the cluster each is in.
    pub(crate) fn block_places(&self) -> Vec<(u64, u64)> {
        let bits = self.cluster_bits;
        let entries = self.table.iter().enumerate().filter(|(_, at)| **at != 0);
        entries.map(|(index, at)| (index as u64, at >> bits)).collect()
    }

    /// Puts block `index` into `cluster`, which is counted already. The table names the old place until it is written;
    /// until then that place must stay counted.
    pub(crate) fn move_block(&mut self, fence: &mut Fence, index: u64, cluster: u64) -> Result<()> {
        let at = cluster << self.cluster_bits;
        let Some(block) = self.block(fence, index)? else {
            return Ok(());
        };
        let old = std::mem::replace(&mut block.at, at);
        block.dirty = 0..block.bytes.len();
        self.set_entry(index, at);
        fence.unprotect_table(old);
        fence.protect_table(at, Part::RefcountBlock);
        Ok(())
    }

    /// Where the table is: the first cluster, and how many.
    pub(crate) fn table_place(&self) -> (u64, u64) {
        (self.table_at >> self.cluster_bits, self.table_clusters)
    }

    /// Copies the table to clusters from `first` on, which are counted already, and has the header name it. The blocks
    /// must have been written. When this returns nothing durable names the old place.
    pub(crate) fn move_table(&mut self, fence: &mut Fence, first: u64) -> Result<()> {
        self.write_blocks(fence)?;
        fence.barrier()?;
        self.write_table(fence)?;
        let at = first << self.cluster_bits;
        let raw: Vec<u8> = self.table.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        fence.write(Part::RefcountTable, at, &raw)?;
        fence.barrier()?;
        self.name_table(fence, at, self.table_clusters)?;
        fence.unprotect(self.table_at);
        fence.protect(at..at.saturating_add(raw.len() as u64), Part::RefcountTable);
        self.table_at = at;
        Ok(())
    }

    /// Ends the table behind its last entry. Returns the clusters that are free for it, which nothing durable names any
    /// more. All changes must have been written.
    pub(crate) fn shorten_table(&mut self, fence: &mut Fence) -> Result<std::ops::Range<u64>> {
        let first = self.table_at >> self.cluster_bits;
        let entries = self
            .table
            .iter()
            .rposition(|at| *at != 0)
            .map_or(0, |last| last + 1);
        let bytes = entries as u64 * 8;
        let clusters = bytes.div_ceil(fence.cluster_size()).max(1);
        let old = self.table_clusters;
        if clusters >= old {
            return Ok(0..0);
        }
        self.name_table(fence, self.table_at, clusters)?;
        fence.unprotect(self.table_at);
        let len = clusters << self.cluster_bits;
        fence.protect(
            self.table_at..self.table_at.saturating_add(len),
            Part::RefcountTable,
        );
        self.table
            .truncate(usize::try_from(len / 8).unwrap_or(usize::MAX));
        self.dirty_sectors.clear();
        self.table_clusters = clusters;
        Ok(first + clusters..first + old)
    }

    fn name_table(&self, fence: &mut Fence, at: u64, clusters: u64) -> Result<()> {
        let clusters = u32::try_from(clusters)
            .map_err(|_| Error::new(ErrorKind::NoSpace, RefcountError::TableTooLarge(clusters)))?;
        let mut pointer = [0; 12];
        let (place, count) = pointer.split_at_mut(8);
        place.copy_from_slice(&at.to_be_bytes());
        count.copy_from_slice(&clusters.to_be_bytes());
        fence.write_header(HEADER_TABLE_AT, &pointer)?;
        fence.sync()
    }
}
