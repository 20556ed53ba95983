//! Refcounts: how often each host cluster is referred to, and which clusters are free.
//!
//! ```text
//! header ──> refcount table: u64 offset of a block, 0 = all refcounts zero (bits 9-63)
//!                 └──> refcount block, one cluster: entries of 1 to 64 bits; below 8 bits the lowest bits come first
//! ```
//!
//! A [`Refcounts`] stands on its own: it knows nothing of guest mapping. It keeps a bounded number of blocks in memory
//! and promises that a block may be written out at any time: raised counts are always safe before the reference to the
//! cluster exists, and its user lowers a count only once the reference is durably gone. Table entries that point to new
//! blocks are written by [`write_table`](Refcounts::write_table) only, after the blocks are durable.

mod count;
mod place;
mod table;
mod width;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use diskmill_core::{Error, ErrorKind, HostOffset, Result};

use super::fence::{Fence, Part};
pub(crate) use count::{get_count, set_count};
pub use width::TooNarrow;

/// The largest refcount table QEMU opens, in bytes.
pub(crate) const MAX_TABLE_BYTES: u64 = 8 << 20;

/// Bytes of blocks kept in memory, unless that is less than [`MIN_BLOCKS`].
const CACHE_BYTES: u64 = 4 << 20;
const MIN_BLOCKS: usize = 4;

/// Blocks without a free cluster that are searched behind the end of the file. A table can name the same full block a
/// million times.
const BLOCKS_PAST_END: u64 = 64;

/// Table entries in one write.
const ENTRIES_PER_SECTOR: usize = 64;

/// The first host offset that a table entry cannot hold.
const OFFSET_END: u64 = 1 << 56;

/// What is wrong with refcounts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum RefcountError {
    /// An entry of the table that cannot be.
    #[error(
        "entry {index} of the refcount table is {value:#x}, must be a multiple of {cluster:#x} within the file of {len:#x} bytes"
    )]
    Entry {
        index: u64,
        value: u64,
        cluster: u64,
        len: u64,
    },
    /// A count that its width cannot hold.
    #[error(
        "the refcount of cluster {cluster:#x} would be above {max}, which is all that {bits} bits can hold"
    )]
    Overflow { cluster: u64, max: u64, bits: u32 },
    /// A fixed-length file is full.
    #[error("no free cluster below the end of the file, which is cluster {end:#x}")]
    Full { end: u64 },
    /// Counts where there is no file.
    #[error(
        "clusters {from:#x} to {to:#x} have refcounts, must have none: the file ends at cluster {from:#x}"
    )]
    PastEnd { from: u64, to: u64 },
    /// Offsets have run out.
    #[error("no free cluster at an offset that a table entry can hold")]
    TooFar,
    /// The refcount table cannot grow.
    #[error("the refcount table would need {0:#x} bytes, must be at most 0x800000")]
    TableTooLarge(u64),
}

fn no_space(error: RefcountError) -> Error {
    Error::new(ErrorKind::NoSpace, error)
}

#[derive(Debug)]
struct Block {
    at: u64,
    bytes: Vec<u8>,
    dirty: Range<usize>,
    used: u64,
}

/// The refcounts of an image, and its allocator.
#[derive(Debug)]
pub(crate) struct Refcounts {
    cluster_bits: u32,
    order: u32,
    table_at: u64,
    table_clusters: u64,
    table: Vec<u64>,
    dirty_sectors: BTreeSet<usize>,
    blocks: BTreeMap<u64, Block>,
    capacity: usize,
    clock: u64,
    /// No cluster below is free.
    hint: u64,
    /// The clusters of a file that cannot grow.
    end: Option<u64>,
}

impl Refcounts {
    /// Reads the refcount table, which the header puts at `table_at`. `order` is `refcount_order`: counts have
    /// `1 << order` bits.
    pub(crate) fn load(fence: &mut Fence, order: u32, table_at: u64, table_clusters: u32) -> Result<Self> {
        let cluster = fence.cluster_size();
        let bytes = u64::from(table_clusters).saturating_mul(cluster);
        if bytes > MAX_TABLE_BYTES {
            return Err(Error::new(
                ErrorKind::Malformed,
                RefcountError::TableTooLarge(bytes),
            ));
        }
        let mut raw = vec![0; usize::try_from(bytes).unwrap_or(0)];
        fence.file().read_padded(HostOffset::new(table_at), &mut raw)?;
        let table: Vec<u64> = raw
            .as_chunks::<8>()
            .0
            .iter()
            .map(|entry| u64::from_be_bytes(*entry))
            .collect();
        fence.protect(table_at..table_at.saturating_add(bytes), Part::RefcountTable);
        for at in table.iter().filter(|at| **at != 0) {
            fence.protect_table(*at, Part::RefcountBlock);
        }
        let end = if fence.file().hints().fixed_len {
            Some(fence.file().len()? / cluster)
        } else {
            None
        };
        Ok(Self {
            cluster_bits: cluster.trailing_zeros(),
            order: order.min(6),
            table_at,
            table_clusters: u64::from(table_clusters),
            table,
            dirty_sectors: BTreeSet::new(),
            blocks: BTreeMap::new(),
            capacity: usize::try_from(CACHE_BYTES / cluster)
                .map_or(MIN_BLOCKS, |blocks| blocks.max(MIN_BLOCKS)),
            clock: 0,
            hint: 0,
            end,
        })
    }

    /// The largest count there can be.
    pub(crate) fn max(&self) -> u64 {
        u64::MAX >> (64 - (1u32 << self.order))
    }

    fn per_block(&self) -> u64 {
        1 << (self.cluster_bits + 3 - self.order)
    }

    /// The entry of the table for `cluster`: `None` past its end, 0 for a missing block.
    fn entry(&self, index: u64) -> Option<u64> {
        self.table.get(usize::try_from(index).ok()?).copied()
    }

    /// The block with number `index`, or `None` if all of its counts are zero.
    fn block(&mut self, fence: &mut Fence, index: u64) -> Result<Option<&mut Block>> {
        let at = match self.entry(index) {
            None | Some(0) => return Ok(None),
            Some(at) => at,
        };
        self.clock += 1;
        let clock = self.clock;
        if !self.blocks.contains_key(&index) {
            let cluster = fence.cluster_size();
            let len = fence.file().len()?;
            if !at.is_multiple_of(cluster) || at >= len.min(OFFSET_END) {
                return Err(Error::new(
                    ErrorKind::Corrupt,
                    RefcountError::Entry {
                        index,
                        value: at,
                        cluster,
                        len,
                    },
                ));
            }
            let mut bytes = vec![0; usize::try_from(cluster).unwrap_or(0)];
            fence.file().read_padded(HostOffset::new(at), &mut bytes)?;
            self.insert(fence, index, at, bytes, 0..0)?;
        }
        let Some(block) = self.blocks.get_mut(&index) else {
            return Ok(None);
        };
        block.used = clock;
        Ok(Some(block))
    }

    fn insert(
        &mut self,
        fence: &mut Fence,
        index: u64,
        at: u64,
        bytes: Vec<u8>,
        dirty: Range<usize>,
    ) -> Result<()> {
        if self.blocks.len() >= self.capacity {
            // Several at once, so that looking for the oldest is not the work of every call.
            let mut ages: Vec<(u64, u64)> = self
                .blocks
                .iter()
                .map(|(index, block)| (block.used, *index))
                .collect();
            ages.sort_unstable();
            for (_, oldest) in ages.into_iter().take(self.capacity / 4 + 1) {
                if let Some(block) = self.blocks.get_mut(&oldest) {
                    write_block(fence, block)?;
                }
                self.blocks.remove(&oldest);
            }
        }
        let used = self.clock;
        let block = Block {
            at,
            bytes,
            dirty,
            used,
        };
        self.blocks.insert(index, block);
        Ok(())
    }

    /// The count of a cluster.
    pub(crate) fn get(&mut self, fence: &mut Fence, cluster: u64) -> Result<u64> {
        let (per_block, order) = (self.per_block(), self.order);
        let block = self.block(fence, cluster / per_block)?;
        Ok(block.map_or(0, |block| get_count(&block.bytes, order, cluster % per_block)))
    }

    fn set(&mut self, fence: &mut Fence, cluster: u64, count: u64) -> Result<()> {
        let (per_block, order) = (self.per_block(), self.order);
        if let Some(block) = self.block(fence, cluster / per_block)? {
            let touched = set_count(&mut block.bytes, order, cluster % per_block, count);
            block.dirty = join(&block.dirty, touched);
        }
        Ok(())
    }

    /// Adds one to the count of a cluster, which must have a count already.
    pub(crate) fn raise(&mut self, fence: &mut Fence, cluster: u64) -> Result<()> {
        self.raise_by(fence, cluster, 1)
    }

    /// Adds `more` to the count of a cluster, which must have a count already.
    pub(crate) fn raise_by(&mut self, fence: &mut Fence, cluster: u64, more: u64) -> Result<()> {
        let count = self.get(fence, cluster)?;
        if more > self.max().saturating_sub(count) {
            return Err(Error::new(
                ErrorKind::Unsupported,
                RefcountError::Overflow {
                    cluster,
                    max: self.max(),
                    bits: 1 << self.order,
                },
            ));
        }
        self.ensure_blocks(fence, cluster..cluster.saturating_add(1))?;
        self.set(fence, cluster, count + more)
    }

    /// Takes one from the count of a cluster and returns what is left. The reference must be durably gone, or never
    /// have been.
    ///
    /// A count that is zero already stays so: the image was wrong before, and with the reference gone it is right.
    pub(crate) fn lower(&mut self, fence: &mut Fence, cluster: u64) -> Result<u64> {
        self.lower_by(fence, cluster, 1)
    }

    /// Takes `less` from the count of a cluster, as [`lower`](Self::lower) takes one.
    pub(crate) fn lower_by(&mut self, fence: &mut Fence, cluster: u64, less: u64) -> Result<u64> {
        let count = self.get(fence, cluster)?;
        let left = count.saturating_sub(less);
        if left != count {
            self.set(fence, cluster, left)?;
        }
        if left == 0 {
            self.hint = self.hint.min(cluster);
        }
        Ok(left)
    }

    /// The first cluster from `from` on whose count is zero.
    fn next_free(&mut self, fence: &mut Fence, from: u64) -> Result<u64> {
        let (per_block, order) = (self.per_block(), self.order);
        let file_end = fence.file().len()?.div_ceil(fence.cluster_size());
        let far = file_end.max(from).saturating_add(BLOCKS_PAST_END * per_block);
        let mut at = from;
        while let Some(block) = self.block(fence, at / per_block)? {
            match (at % per_block..per_block).find(|index| get_count(&block.bytes, order, *index) == 0) {
                Some(index) => return Ok(at - at % per_block + index),
                None => at = at - at % per_block + per_block,
            }
            if at > far {
                return Err(Error::new(
                    ErrorKind::Corrupt,
                    RefcountError::PastEnd {
                        from: file_end,
                        to: at,
                    },
                ));
            }
        }
        Ok(at)
    }

    /// How many clusters from `from` on are free, at most `max`.
    fn free_run(&mut self, fence: &mut Fence, from: u64, max: u64) -> Result<u64> {
        let (per_block, order) = (self.per_block(), self.order);
        let mut len = 0;
        while len < max {
            let at = from + len;
            let rest = (per_block - at % per_block).min(max - len);
            let free = match self.block(fence, at / per_block)? {
                None => rest,
                Some(block) => (0..rest)
                    .find(|step| get_count(&block.bytes, order, at % per_block + step) != 0)
                    .unwrap_or(rest),
            };
            len += free;
            if free < rest {
                break;
            }
        }
        Ok(len)
    }

    /// Takes up to `max` free clusters in one run, at least `min`, and gives each the count 1. Returns the first and
    /// how many there are.
    pub(crate) fn allocate(&mut self, fence: &mut Fence, min: u64, max: u64) -> Result<(u64, u64)> {
        let (min, max) = (min.max(1), max.max(min).max(1));
        let mut from = self.hint;
        let mut advance = true;
        loop {
            let start = self.next_free(fence, from)?;
            if advance {
                self.hint = start;
            }
            let len = self.free_run(fence, start, max)?;
            let room = self.room(start)?;
            if room < min {
                return Err(no_space(RefcountError::Full {
                    end: start.saturating_add(room),
                }));
            }
            let len = len.min(room);
            if len < min {
                // Too short a gap: leave it to smaller requests.
                from = start + len;
                advance = false;
                continue;
            }
            self.guard(fence, start, len)?;
            if self.ensure_blocks(fence, start..start + len)? {
                // A new block took a free cluster, perhaps one of these.
                (from, advance) = (self.hint, true);
                continue;
            }
            for cluster in start..start + len {
                self.set(fence, cluster, 1)?;
            }
            if self.hint == start {
                self.hint = start + len;
            }
            return Ok((start, len));
        }
    }

    /// Clusters from `start` to where the file, or what an entry can say, ends.
    fn room(&self, start: u64) -> Result<u64> {
        match self.end {
            Some(end) => Ok(end.saturating_sub(start)),
            None => match (OFFSET_END >> self.cluster_bits).saturating_sub(start) {
                0 => Err(no_space(RefcountError::TooFar)),
                room => Ok(room),
            },
        }
    }

    /// Fails if clusters that count as free are metadata.
    fn guard(&self, fence: &Fence, start: u64, len: u64) -> Result<()> {
        fence.check(
            Part::Data,
            start << self.cluster_bits..(start + len) << self.cluster_bits,
        )
    }

    /// Makes sure that each of `clusters` has a count that can be set. Returns whether anything had to be done, in
    /// which case clusters that were free before may not be.
    fn ensure_blocks(&mut self, fence: &mut Fence, clusters: Range<u64>) -> Result<bool> {
        let per_block = self.per_block();
        let mut changed = false;
        let last = clusters.end.saturating_sub(1) / per_block;
        for index in clusters.start / per_block..=last {
            loop {
                match self.entry(index) {
                    None => self.grow_table(fence, index)?,
                    Some(0) => self.add_block(fence, index)?,
                    Some(_) => break,
                }
                changed = true;
            }
        }
        Ok(changed)
    }

    /// Adds block `index`, or one below it where the first free cluster has no block either.
    fn add_block(&mut self, fence: &mut Fence, index: u64) -> Result<()> {
        let per_block = self.per_block();
        let place = self.next_free(fence, self.hint)?;
        if self.room(place)? == 0 {
            return Err(no_space(RefcountError::Full { end: place }));
        }
        self.guard(fence, place, 1)?;
        let own = place / per_block;
        let index = match self.entry(own) {
            None => return self.grow_table(fence, own.max(index)),
            // The place has no count yet: the block that will count it is put there and counts itself.
            Some(0) => own,
            Some(_) => {
                self.set(fence, place, 1)?;
                index
            }
        };
        let at = place << self.cluster_bits;
        let mut bytes = vec![0; usize::try_from(fence.cluster_size()).unwrap_or(0)];
        if own == index {
            set_count(&mut bytes, self.order, place % per_block, 1);
        }
        let dirty = 0..bytes.len();
        self.insert(fence, index, at, bytes, dirty)?;
        self.set_entry(index, at);
        fence.protect_table(at, Part::RefcountBlock);
        self.hint = place + 1;
        Ok(())
    }

    fn set_entry(&mut self, index: u64, at: u64) {
        let Ok(index) = usize::try_from(index) else {
            return;
        };
        if let Some(entry) = self.table.get_mut(index) {
            *entry = at;
            self.dirty_sectors.insert(index / ENTRIES_PER_SECTOR);
        }
    }

    /// Writes all changed blocks. They may be durable in any order.
    pub(crate) fn write_blocks(&mut self, fence: &mut Fence) -> Result<()> {
        for block in self.blocks.values_mut() {
            write_block(fence, block)?;
        }
        Ok(())
    }

    /// Whether the table has entries that are not written yet.
    pub(crate) fn table_is_dirty(&self) -> bool {
        !self.dirty_sectors.is_empty()
    }

    /// Whether anything is not written yet.
    pub(crate) fn is_dirty(&self) -> bool {
        self.table_is_dirty() || self.blocks.values().any(|block| !block.dirty.is_empty())
    }

    /// Writes changed table entries. The blocks they point to must be durable.
    pub(crate) fn write_table(&mut self, fence: &mut Fence) -> Result<()> {
        while let Some(sector) = self.dirty_sectors.first().copied() {
            let first = sector * ENTRIES_PER_SECTOR;
            let raw: Vec<u8> = self
                .table
                .iter()
                .skip(first)
                .take(ENTRIES_PER_SECTOR)
                .flat_map(|entry| entry.to_be_bytes())
                .collect();
            fence.write(Part::RefcountTable, self.table_at + first as u64 * 8, &raw)?;
            self.dirty_sectors.remove(&sector);
        }
        Ok(())
    }

    /// The cluster behind the last one in the file whose count is not zero.
    pub(crate) fn used_end(&mut self, fence: &mut Fence) -> Result<u64> {
        let (per_block, order) = (self.per_block(), self.order);
        let file_end = fence.file().len()?.div_ceil(fence.cluster_size());
        for index in (0..file_end.div_ceil(per_block)).rev() {
            if let Some(block) = self.block(fence, index)?
                && let Some(last) = (0..per_block).rfind(|at| get_count(&block.bytes, order, *at) != 0)
            {
                return Ok(index * per_block + last + 1);
            }
        }
        Ok(0)
    }
}

fn write_block(fence: &mut Fence, block: &mut Block) -> Result<()> {
    if block.dirty.is_empty() {
        return Ok(());
    }
    // Whole sectors, so that a host with sectors of 512 bytes has nothing to read first.
    let start = block.dirty.start & !511;
    let end = block.dirty.end.next_multiple_of(512).min(block.bytes.len());
    if let Some(bytes) = block.bytes.get(start..end) {
        fence.write(Part::RefcountBlock, block.at + start as u64, bytes)?;
    }
    block.dirty = 0..0;
    Ok(())
}

fn join(dirty: &Range<usize>, more: Range<usize>) -> Range<usize> {
    if dirty.is_empty() {
        more
    } else {
        dirty.start.min(more.start)..dirty.end.max(more.end)
    }
}

#[cfg(test)]
mod tests;
