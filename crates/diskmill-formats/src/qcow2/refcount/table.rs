//! The refcount table: moving it when it is full, and taking out of it what nobody needs.

use std::collections::BTreeSet;

use diskmill_core::Result;

use super::count::{get_count, set_count};
use super::{BLOCKS_PAST_END, MAX_TABLE_BYTES, OFFSET_END, RefcountError, Refcounts, no_space};
use crate::qcow2::fence::{Fence, Part};

/// Where the header keeps the refcount table's offset (8 bytes) and, behind it, its clusters (4 bytes).
pub(super) const HEADER_TABLE_AT: usize = 48;

impl Refcounts {
    /// Moves the table to a place where it has room for entry `index` and half as much again.
    ///
    /// The new table, and the blocks that count it and themselves, go behind everything the old one can count. Durable
    /// blocks first, then the table, then the header; only then is the old table given back.
    pub(super) fn grow_table(&mut self, fence: &mut Fence, index: u64) -> Result<()> {
        self.write_blocks(fence)?;
        let per_block = self.per_block();
        let cluster = fence.cluster_size();
        let old_len = self.table.len() as u64;
        let start = old_len * per_block;
        let mut blocks = 1;
        let clusters = loop {
            let entries = (old_len + blocks).max(index + 1);
            let bytes = (entries + entries / 2) * 8;
            let clusters = bytes.div_ceil(cluster);
            if clusters * cluster > MAX_TABLE_BYTES {
                return Err(no_space(RefcountError::TableTooLarge(clusters * cluster)));
            }
            let needed = (blocks + clusters).div_ceil(per_block);
            if needed <= blocks {
                break clusters;
            }
            blocks = needed;
        };
        let used = blocks + clusters;
        if self.room(start)? < used {
            let end = self.end.unwrap_or(OFFSET_END >> self.cluster_bits);
            return Err(no_space(RefcountError::Full { end }));
        }
        self.guard(fence, start, used)?;

        let mut table = self.table.clone();
        table.resize(usize::try_from(clusters * cluster / 8).unwrap_or(0), 0);
        let mut added = Vec::new();
        for number in 0..blocks {
            let mut bytes = vec![0; usize::try_from(cluster).unwrap_or(0)];
            let counted = (used - (number * per_block).min(used)).min(per_block);
            for count in 0..counted {
                set_count(&mut bytes, self.order, count, 1);
            }
            let at = (start + number) << self.cluster_bits;
            fence.write(Part::RefcountBlock, at, &bytes)?;
            if let Some(entry) = usize::try_from(old_len + number)
                .ok()
                .and_then(|index| table.get_mut(index))
            {
                *entry = at;
            }
            added.push(at);
        }
        let table_at = (start + blocks) << self.cluster_bits;
        let raw: Vec<u8> = table.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        fence.barrier()?;
        fence.write(Part::RefcountTable, table_at, &raw)?;
        fence.barrier()?;
        let mut pointer = [0; 12];
        let (place, count) = pointer.split_at_mut(8);
        place.copy_from_slice(&table_at.to_be_bytes());
        count.copy_from_slice(&u32::try_from(clusters).unwrap_or(u32::MAX).to_be_bytes());
        fence.write_header(HEADER_TABLE_AT, &pointer)?;
        fence.sync()?;

        let old =
            self.table_at >> self.cluster_bits..(self.table_at >> self.cluster_bits) + self.table_clusters;
        fence.unprotect(self.table_at);
        fence.protect(table_at..table_at + clusters * cluster, Part::RefcountTable);
        for at in added {
            fence.protect_table(at, Part::RefcountBlock);
        }
        (self.table_at, self.table_clusters, self.table) = (table_at, clusters, table);
        self.dirty_sectors.clear();
        for cluster in old {
            self.lower(fence, cluster)?;
        }
        Ok(())
    }

    /// Takes blocks out of the table that count nothing, or only themselves and one another. All changes must have been
    /// written.
    pub(crate) fn drop_empty_blocks(&mut self, fence: &mut Fence) -> Result<()> {
        let (per_block, order) = (self.per_block(), self.order);
        let file_end = fence.file().len()?.div_ceil(fence.cluster_size());
        let last = (file_end / per_block).saturating_add(BLOCKS_PAST_END);
        let mut gone = BTreeSet::new();
        // From the end, since a block is usually counted by the one before it. The first counts the header.
        for index in (1..=last).rev() {
            let Some(at) = self.entry(index).filter(|at| *at != 0) else {
                continue;
            };
            let place = at >> self.cluster_bits;
            let Some(block) = self.block(fence, index)? else {
                continue;
            };
            let is_empty = (0..per_block).all(|entry| {
                let cluster = index * per_block + entry;
                match get_count(&block.bytes, order, entry) {
                    0 => true,
                    1 => cluster == place || gone.contains(&cluster),
                    _ => false,
                }
            });
            if is_empty {
                gone.insert(place);
                self.blocks.remove(&index);
                self.set_entry(index, 0);
                fence.unprotect_table(at);
            }
        }
        if gone.is_empty() {
            return Ok(());
        }
        let switched = self.write_table(fence).and_then(|()| fence.sync());
        if switched.is_err() {
            // The file may still name blocks whose places count as free here.
            fence.set_adrift();
        }
        switched?;
        for place in gone {
            self.lower(fence, place)?;
        }
        self.write_blocks(fence)
    }
}
