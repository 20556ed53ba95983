//! Refcount table and blocks against the references that were counted.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use diskmill_core::{FindingKind, HostOffset, Result};

use super::super::layout::{REFCOUNT_BLOCK_MASK, REFCOUNT_TABLE_RESERVED};
use super::super::refcount::get_count;
use super::crew;
use super::ground::Ground;
use super::notes::Notes;
use super::refs::{Counts, References};

/// Clusters that are compared at once.
const GROUP: u64 = 64;

/// What an entry of the refcount table says.
#[derive(Clone, Copy, Debug)]
pub(super) enum Block {
    /// All refcounts are 0.
    None,
    At(HostOffset),
    /// The same, but the entry is not to be trusted: nothing is counted for it.
    Doubtful(HostOffset),
    /// The refcounts cannot be told.
    Bad,
}

/// The refcount table, as far as it could be understood.
#[derive(Clone, Debug, Default)]
pub(super) struct Blocks {
    pub(super) list: Vec<Block>,
    /// Whether table or blocks cannot be used as they are.
    pub(super) broken: bool,
    /// Whether the table lies in the file, so that its clusters are counted.
    pub(super) held: bool,
    /// Whether the table cannot be read at all.
    unread: bool,
}

/// The refcounts on disk, compared with what was counted.
#[derive(Debug, Default)]
pub(super) struct Disk {
    pub(super) blocks: Vec<Block>,
    /// Whether they are what was counted, for all that is referred to.
    pub(super) matches: bool,
    /// Whether they can only be put right by building them anew.
    pub(super) broken: bool,
    /// Whether some are lower, or higher, than what was counted.
    pub(super) low: bool,
    pub(super) high: bool,
    /// Where the last cluster in use ends.
    pub(super) end: Option<HostOffset>,
}

/// Parts of refcount blocks that are held in memory.
#[derive(Debug, Default)]
pub(super) struct Sectors {
    held: HashMap<u64, [u8; 512]>,
}

/// Base-2 logarithm of the clusters a block counts.
pub(super) fn block_bits(ground: &Ground<'_>) -> u32 {
    ground
        .header
        .refcount_order
        .block_bits(ground.header.cluster_bits)
}

/// Counts the references of the refcount table and to its blocks.
pub(super) fn refer(ground: &Ground<'_>, references: &References, notes: &mut Notes) -> Blocks {
    let at = ground.header.refcount_table_offset;
    let len = u64::from(ground.header.refcount_table_clusters) << ground.bits();
    let mut blocks = Blocks::default();
    blocks.held = ground.refer(references, notes, "the refcount table", at, len, 1, None);
    blocks.broken = !blocks.held || len == 0;
    // At most 8 MiB: the header has been checked.
    let mut table = vec![0; usize::try_from(len).unwrap_or(0)];
    if !ground.is_hole(at, len) && !ground.read(notes, "the refcount table", at, &mut table) {
        blocks.unread = true;
        return blocks;
    }
    for (index, entry) in table.as_chunks::<8>().0.iter().enumerate() {
        let before = notes.counters.corruptions;
        let block = refer_block(
            ground,
            references,
            notes,
            at,
            index as u64,
            u64::from_be_bytes(*entry),
        );
        blocks.broken |= notes.counters.corruptions > before;
        blocks.list.push(block);
    }
    blocks
}

/// Counts the reference of an entry of the refcount table.
fn refer_block(
    ground: &Ground<'_>,
    references: &References,
    notes: &mut Notes,
    table: HostOffset,
    index: u64,
    entry: u64,
) -> Block {
    let entry_at = table.saturating_add(index.saturating_mul(8));
    let reserved = entry & REFCOUNT_TABLE_RESERVED;
    if reserved != 0 {
        notes.corruption(1, entry_at, None, || {
            format!("refcount table entry {index} is {entry:#018x}, reserved bits are set")
        });
    }
    let at = HostOffset::new(entry & REFCOUNT_BLOCK_MASK);
    if at == HostOffset::ZERO {
        return Block::None;
    }
    if !at.is_aligned(ground.cluster_size) {
        notes.corruption(1, entry_at, None, || {
            format!("refcount table entry {index} refers to a block at {at:#x}, must start on a cluster")
        });
        return Block::Bad;
    }
    if reserved == 0 && ground.cluster(at) >= ground.clusters {
        let file_len = ground.file_len;
        notes.corruption(1, entry_at, None, || {
            format!("refcount block {index} at {at:#x} lies past the end of the file at {file_len:#x}")
        });
        return Block::None;
    }
    if reserved != 0 {
        return Block::Doubtful(at);
    }
    ground.refer(
        references,
        notes,
        "refcount block",
        at,
        ground.cluster_size,
        1,
        None,
    );
    let count = references.get(ground.cluster(at));
    if count != 1 {
        notes.corruption(1, at, None, || {
            format!("refcount block {index} at {at:#x} is used {count} times, must be once")
        });
    }
    Block::At(at)
}

/// What one worker saw.
#[derive(Debug, Default)]
struct Compared {
    notes: Notes,
    highest: Option<u64>,
    low: bool,
    high: bool,
    broken: bool,
    bytes: Vec<u8>,
}

/// Compares all refcounts with the references.
pub(super) fn compare(
    ground: &Ground<'_>,
    counts: &Counts,
    blocks: Blocks,
    notes: &mut Notes,
) -> Result<Disk> {
    if blocks.unread {
        return Ok(Disk {
            broken: true,
            ..Disk::default()
        });
    }
    let bits = block_bits(ground);
    let within = |index: usize| {
        let first = 1_u64.checked_shl(bits)?.checked_mul(index as u64)?;
        (first < ground.clusters).then_some(first)
    };
    let inside = (0..blocks.list.len())
        .rev()
        .find(|index| within(*index).is_some())
        .map_or(0, |last| last.saturating_add(1));
    // Blocks that are used several times: how many of their refcounts are not 0.
    let known: Mutex<HashMap<HostOffset, u64>> = Mutex::default();
    let list = blocks.list.get(..inside).unwrap_or_default();
    let workers = crew::each(list, ground.job, |index, block, compared: &mut Compared| {
        compared.notes.item = index as u64;
        let first = within(index).unwrap_or(ground.clusters);
        let end = ground.clusters.min(first.saturating_add(1 << bits));
        compared.block(ground, counts, *block, (first, end), &known);
        Ok(())
    })?;
    let mut disk = Disk {
        broken: blocks.broken,
        ..Disk::default()
    };
    let mut rest = Compared::default();
    let covered = (blocks.list.len() as u64)
        .checked_shl(bits)
        .filter(|end| end >> bits == blocks.list.len() as u64);
    if let Some(covered) = covered.filter(|covered| *covered < ground.clusters) {
        rest.notes.item = u64::MAX;
        rest.absent(ground, counts, covered, ground.clusters);
    }
    let mut highest = None;
    let mut all = Vec::new();
    for worker in workers.into_iter().chain([rest]) {
        highest = highest.max(worker.highest);
        disk.low |= worker.low;
        disk.high |= worker.high;
        disk.broken |= worker.broken;
        all.push(worker.notes);
    }
    let errors = notes.counters.check_errors;
    notes.absorb(all);
    disk.broken |= notes.counters.check_errors > errors;
    disk.matches = !disk.low && !disk.high && !disk.broken;
    disk.blocks = blocks.list;
    disk.end = Some(HostOffset::new(
        highest.unwrap_or(0).saturating_add(1) << ground.bits(),
    ));
    Ok(disk)
}

impl Compared {
    fn block(
        &mut self,
        ground: &Ground<'_>,
        counts: &Counts,
        block: Block,
        (first, end): (u64, u64),
        known: &Mutex<HashMap<HostOffset, u64>>,
    ) {
        let last = end.saturating_sub(1);
        let at = match block {
            Block::At(at) | Block::Doubtful(at) if !ground.is_hole(at, ground.cluster_size) => at,
            Block::Bad => {
                let count = end.saturating_sub(first);
                self.notes.find(FindingKind::Error, count, None, None, || {
                    format!("the refcounts of clusters {first} to {last} cannot be read")
                });
                self.highest = self.highest.max(counts.used(first..end).last());
                return;
            }
            _ => {
                self.absent(ground, counts, first, end);
                return;
            }
        };
        let shared = counts.get(ground.cluster(at)) > 1;
        // What is held is whole after every statement.
        let recall = || {
            known
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .get(&at)
                .copied()
        };
        if shared
            && counts.used(first..end).next().is_none()
            && let Some(nonzero) = recall()
        {
            if nonzero > 0 {
                self.high = true;
                self.highest = self.highest.max(Some(last));
                self.notes.find(FindingKind::Leak, nonzero, Some(at), None, || {
                    format!("{nonzero} clusters from {first} to {last} leak")
                });
            }
            return;
        }
        let mut bytes = std::mem::take(&mut self.bytes);
        bytes.resize(ground.header.cluster_bits.cluster_len(), 0);
        if ground.read(&mut self.notes, "refcount block", at, &mut bytes) {
            let nonzero = self.counts(ground, counts, &bytes, first, end);
            if shared {
                known
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .insert(at, nonzero);
            }
        }
        self.bytes = bytes;
    }

    /// Compares clusters that have no refcount block: all references are wrong.
    fn absent(&mut self, ground: &Ground<'_>, counts: &Counts, first: u64, end: u64) {
        for cluster in counts.used(first..end) {
            self.cluster(ground, cluster, counts.get(cluster), 0);
        }
    }

    /// Compares the clusters from `first` to `end` with their block. Returns how many refcounts are not 0.
    fn counts(&mut self, ground: &Ground<'_>, counts: &Counts, bytes: &[u8], first: u64, end: u64) -> u64 {
        let order = ground.header.refcount_order.get();
        // 64 counts are 8 bytes at least, so a group is whole bytes.
        let group_len = 8_usize << order;
        let ones = (0..GROUP).fold(vec![0; group_len], |mut ones, index| {
            super::super::refcount::set_count(&mut ones, order, index, 1);
            ones
        });
        let zeros = vec![0; group_len];
        let mut nonzero = 0_u64;
        let mut start = first;
        for group in bytes.chunks(group_len) {
            if start >= end {
                break;
            }
            let stop = end.min(start.saturating_add(GROUP));
            let whole = stop.saturating_sub(start) == GROUP;
            match counts.bits(start) {
                Some(0) if group == zeros => {}
                Some(u64::MAX) if whole && group == ones => {
                    nonzero = nonzero.saturating_add(GROUP);
                    self.highest = self.highest.max(Some(stop.saturating_sub(1)));
                }
                _ => {
                    for cluster in start..stop {
                        let refcount = get_count(group, order, cluster.saturating_sub(start));
                        nonzero = nonzero.saturating_add(u64::from(refcount > 0));
                        self.cluster(ground, cluster, counts.get(cluster), refcount);
                    }
                }
            }
            start = stop;
        }
        nonzero
    }

    fn cluster(&mut self, ground: &Ground<'_>, cluster: u64, references: u64, refcount: u64) {
        if references > 0 || refcount > 0 {
            self.highest = self.highest.max(Some(cluster));
        }
        if references == refcount {
            return;
        }
        let kind = if refcount > references {
            self.high = true;
            FindingKind::Leak
        } else {
            self.low = true;
            // QEMU too trusts a table that misses what is in use no further.
            self.broken |= refcount == 0;
            FindingKind::Corruption
        };
        let at = HostOffset::new(cluster << ground.bits());
        self.notes.find(kind, 1, Some(at), None, || {
            format!("cluster {cluster} refcount={refcount} reference={references}")
        });
    }
}

impl Disk {
    /// The refcount of a cluster, or `None` if it cannot be told.
    pub(super) fn refcount(&self, ground: &Ground<'_>, sectors: &mut Sectors, cluster: u64) -> Option<u64> {
        let bits = block_bits(ground);
        let index = usize::try_from(cluster.checked_shr(bits)?).ok()?;
        let block = match self.blocks.get(index) {
            None | Some(Block::None) => return Some(0),
            Some(Block::Bad) => return None,
            Some(Block::At(block) | Block::Doubtful(block)) => *block,
        };
        let order = ground.header.refcount_order.get();
        let within = cluster & (1_u64 << bits).wrapping_sub(1);
        let byte = (within << order) / 8;
        let sector = block.saturating_add(byte & !511);
        let bytes = sectors.get(ground, sector)?;
        let first = ((byte & !511) << 3) >> order;
        Some(get_count(bytes, order, within.saturating_sub(first)))
    }
}

impl Sectors {
    /// Sectors that are held at most.
    const HELD: usize = 1024;

    fn get(&mut self, ground: &Ground<'_>, at: HostOffset) -> Option<&[u8; 512]> {
        if !self.held.contains_key(&at.get()) {
            if self.held.len() >= Self::HELD {
                self.held.clear();
            }
            let mut bytes = [0; 512];
            ground.main.read_padded(at, &mut bytes).ok()?;
            self.held.insert(at.get(), bytes);
        }
        self.held.get(&at.get())
    }
}
