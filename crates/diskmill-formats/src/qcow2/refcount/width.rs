//! Giving refcounts another width: new blocks and a new table beside the old ones, one switch of the header, and only
//! then the old ones given back.

use std::collections::BTreeSet;

use diskmill_core::{Error, ErrorKind, HostOffset, Result};

use super::count::{get_count, set_count};
use super::{BLOCKS_PAST_END, MAX_TABLE_BYTES, OFFSET_END, RefcountError, Refcounts, no_space};
use crate::qcow2::fence::{Fence, Part};

/// Where the header keeps the refcount table's offset (8 bytes) and, behind it, its clusters (4 bytes).
const TABLE_AT: usize = 48;
/// Where the header keeps the width of refcounts, a base-2 logarithm (4 bytes).
const ORDER_AT: usize = 96;

/// A count that the new width cannot hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the cluster at offset {at:#x} has a refcount of {count}, must have at most {max} with {bits} bits")]
pub struct TooNarrow {
    /// Where the cluster is.
    pub at: u64,
    /// Its count.
    pub count: u64,
    /// The width that was asked for.
    pub bits: u32,
    /// What it can hold.
    max: u64,
}

/// Told whenever a block of the old structures has been looked at, or one of the new ones written.
type Tick<'a> = &'a mut dyn FnMut() -> Result<()>;

/// Structures taken for the new width, which nothing refers to yet.
#[derive(Default)]
struct Taken {
    /// Clusters for blocks.
    blocks: Vec<u64>,
    /// Clusters for the table: the first, and how many.
    table: (u64, u64),
}

impl Refcounts {
    /// Blocks there are: the work of [`change_width`](Self::change_width) is about three times as much.
    pub(crate) fn block_count(&self) -> u64 {
        self.table.iter().filter(|at| **at != 0).count() as u64
    }

    /// Changes the width of all counts to `1 << order` bits. All changes must have been written.
    ///
    /// If it fails before the header is switched, nothing has changed.
    pub(crate) fn change_width(&mut self, fence: &mut Fence, order: u32, tick: Tick<'_>) -> Result<()> {
        let mut taken = Taken::default();
        let written = self
            .take(fence, order, &mut taken, tick)
            .and_then(|indexes| self.write_new(fence, order, &taken, &indexes, tick));
        let table = match written {
            Ok(table) => table,
            Err(error) => {
                // Nothing refers to them. What cannot be given back leaks.
                let (first, count) = taken.table;
                for cluster in taken.blocks.into_iter().chain(first..first + count) {
                    let _ = self.lower(fence, cluster);
                }
                return Err(error);
            }
        };
        let (first, count) = taken.table;
        self.switch(fence, order, table, first, count)
    }

    /// Takes clusters for the new table and blocks, and says which blocks there are to be.
    fn take(
        &mut self,
        fence: &mut Fence,
        order: u32,
        taken: &mut Taken,
        tick: Tick<'_>,
    ) -> Result<BTreeSet<u64>> {
        let cluster = fence.cluster_size();
        let mut indexes = self.indexes(fence, order, tick)?;
        loop {
            let entries = indexes.last().map_or(1, |last| last + 1);
            let clusters = (entries * 8).div_ceil(cluster);
            if clusters * cluster > MAX_TABLE_BYTES {
                return Err(no_space(RefcountError::TableTooLarge(clusters * cluster)));
            }
            let missing = (indexes.len() as u64).saturating_sub(taken.blocks.len() as u64);
            if missing == 0 && taken.table.1 >= clusters {
                return Ok(indexes);
            }
            let per_block = 1 << (self.cluster_bits + 3 - order);
            for _ in 0..missing {
                let (block, _) = self.allocate(fence, 1, 1)?;
                taken.blocks.push(block);
                indexes.insert(block / per_block);
            }
            if taken.table.1 < clusters {
                let old = std::mem::take(&mut taken.table);
                for cluster in old.0..old.0 + old.1 {
                    self.lower(fence, cluster)?;
                }
                // Room for entries of what taking it makes necessary.
                taken.table = self.allocate(fence, clusters, clusters)?;
                let (first, count) = taken.table;
                indexes.extend((first..first + count).map(|cluster| cluster / per_block));
            }
            // Taking clusters may have added blocks to the old structures, which have to be counted until they go.
            indexes.extend(self.own_clusters().map(|cluster| cluster / per_block));
        }
    }

    /// The clusters that hold the table and its blocks.
    fn own_clusters(&self) -> impl Iterator<Item = u64> {
        let first = self.table_at >> self.cluster_bits;
        let bits = self.cluster_bits;
        let blocks = self.table.iter().filter(|at| **at != 0).map(move |at| at >> bits);
        (first..first + self.table_clusters).chain(blocks)
    }

    /// Which blocks the new width needs. An error if a count does not fit into it.
    fn indexes(&mut self, fence: &mut Fence, order: u32, tick: Tick<'_>) -> Result<BTreeSet<u64>> {
        let (old_order, per_block) = (self.order, self.per_block());
        let new_per_block: u64 = 1 << (self.cluster_bits + 3 - order);
        let bits = 1 << order;
        let max = u64::MAX >> (64 - bits);
        let cluster_bits = self.cluster_bits;
        let mut indexes = BTreeSet::new();
        let file_end = fence.file().len()?.div_ceil(fence.cluster_size());
        // A damaged table can name the same block a million times. Far behind the end of the file nothing is counted.
        let last = (file_end / per_block).saturating_add(BLOCKS_PAST_END);
        for index in 0..(self.table.len() as u64).min(last) {
            let Some(block) = self.block(fence, index)? else {
                continue;
            };
            for entry in 0..per_block {
                let count = get_count(&block.bytes, old_order, entry);
                if count == 0 {
                    continue;
                }
                let cluster = index * per_block + entry;
                if count > max {
                    let at = cluster << cluster_bits;
                    let error = TooNarrow { at, count, bits, max };
                    return Err(Error::new(ErrorKind::Usage, error).host(HostOffset::new(at)));
                }
                indexes.insert(cluster / new_per_block);
            }
            tick()?;
        }
        Ok(indexes)
    }

    /// Writes the new blocks and the new table, and makes them durable. Returns the table.
    fn write_new(
        &mut self,
        fence: &mut Fence,
        order: u32,
        taken: &Taken,
        indexes: &BTreeSet<u64>,
        tick: Tick<'_>,
    ) -> Result<Vec<u64>> {
        let cluster = fence.cluster_size();
        let len = |bytes: u64| usize::try_from(bytes).unwrap_or(0);
        let (first, clusters) = taken.table;
        let mut table = vec![0; len(clusters * cluster / 8)];
        for (index, place) in indexes.iter().zip(&taken.blocks) {
            let at = place << self.cluster_bits;
            let mut bytes = vec![0; len(cluster)];
            self.copy_counts(fence, order, *index, &mut bytes)?;
            fence.write(Part::RefcountBlock, at, &bytes)?;
            if let Some(entry) = usize::try_from(*index)
                .ok()
                .and_then(|index| table.get_mut(index))
            {
                *entry = at;
            }
            tick()?;
        }
        let raw: Vec<u8> = table.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        fence.write(Part::RefcountTable, first << self.cluster_bits, &raw)?;
        fence.sync()?;
        Ok(table)
    }

    /// Fills the new block with number `index` with the counts there are.
    fn copy_counts(&mut self, fence: &mut Fence, order: u32, index: u64, bytes: &mut [u8]) -> Result<()> {
        let (old_order, per_block) = (self.order, self.per_block());
        let new_per_block: u64 = 1 << (self.cluster_bits + 3 - order);
        let start = index * new_per_block;
        let end = (start + new_per_block).min(OFFSET_END >> self.cluster_bits);
        let mut at = start;
        while at < end {
            let stop = (at - at % per_block + per_block).min(end);
            if let Some(block) = self.block(fence, at / per_block)? {
                for cluster in at..stop {
                    let count = get_count(&block.bytes, old_order, cluster % per_block);
                    if count > 0 {
                        set_count(bytes, order, cluster - start, count);
                    }
                }
            }
            at = stop;
        }
        Ok(())
    }

    /// Makes the new structures those of the image, and gives the old ones back.
    fn switch(
        &mut self,
        fence: &mut Fence,
        order: u32,
        table: Vec<u64>,
        first: u64,
        clusters: u64,
    ) -> Result<()> {
        let table_at = first << self.cluster_bits;
        let mut fields = [0; ORDER_AT + 4 - TABLE_AT];
        fence
            .file()
            .read_at(HostOffset::new(TABLE_AT as u64), &mut fields)?;
        let pointer = table_at.to_be_bytes().into_iter();
        let pointer = pointer.chain(u32::try_from(clusters).unwrap_or(u32::MAX).to_be_bytes());
        for (to, from) in fields.iter_mut().zip(pointer) {
            *to = from;
        }
        for (to, from) in fields.iter_mut().rev().zip(order.to_be_bytes().into_iter().rev()) {
            *to = from;
        }
        fence.write_header(TABLE_AT, &fields)?;
        if let Err(error) = fence.sync() {
            fence.set_adrift();
            return Err(error);
        }

        let old: Vec<u64> = self.own_clusters().collect();
        fence.unprotect(self.table_at);
        for at in self.table.iter().filter(|at| **at != 0) {
            fence.unprotect_table(*at);
        }
        fence.protect(
            table_at..table_at + clusters * fence.cluster_size(),
            Part::RefcountTable,
        );
        for at in table.iter().filter(|at| **at != 0) {
            fence.protect_table(*at, Part::RefcountBlock);
        }
        self.order = order;
        (self.table_at, self.table_clusters, self.table) = (table_at, clusters, table);
        self.dirty_sectors.clear();
        self.blocks.clear();
        self.hint = 0;
        for cluster in old {
            self.lower(fence, cluster)?;
        }
        Ok(())
    }
}
