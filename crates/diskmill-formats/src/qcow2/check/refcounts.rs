//! Refcount table and blocks against the references that were counted.

use std::collections::HashMap;

use diskmill_core::{FindingKind, HostOffset, Result};

use super::super::layout::{REFCOUNT_BLOCK_MASK, REFCOUNT_TABLE_RESERVED};
use super::super::refcount::get_count;
use super::Check;
use super::refs::PAGE;

/// The refcounts on disk, as far as they are needed again.
#[derive(Debug, Default)]
pub(super) struct Disk {
    /// Offsets of refcount blocks; 0 where there is none.
    blocks: Vec<Block>,
    /// Refcounts of clusters that are referred to, where they differ from the number of references.
    differing: HashMap<u64, u64>,
}

#[derive(Clone, Copy, Debug)]
enum Block {
    /// All refcounts are 0.
    None,
    At(HostOffset),
    /// The refcounts cannot be told.
    Bad,
}

impl Check<'_> {
    /// Base-2 logarithm of the clusters a block counts.
    fn block_bits(&self) -> u32 {
        self.header.refcount_order.block_bits(self.header.cluster_bits)
    }

    /// Counts the references of the refcount table, then compares all refcounts with the references.
    pub(super) fn refcounts(&mut self) -> Result<Disk> {
        let at = self.header.refcount_table_offset;
        let len = u64::from(self.header.refcount_table_clusters) << self.header.cluster_bits.get();
        self.refer("the refcount table", at, len, 1, None);
        // At most 8 MiB: the header has been checked.
        let mut table = vec![0; usize::try_from(len).unwrap_or(0)];
        if !self.is_hole(at, len) && !self.read("the refcount table", at, &mut table) {
            return Ok(Disk::default());
        }
        let mut disk = Disk::default();
        for (index, entry) in table.as_chunks::<8>().0.iter().enumerate() {
            let block = self.block(at, index as u64, u64::from_be_bytes(*entry));
            disk.blocks.push(block);
        }
        self.compare(&mut disk)?;
        Ok(disk)
    }

    /// Counts the reference of an entry of the refcount table.
    fn block(&mut self, table: HostOffset, index: u64, entry: u64) -> Block {
        let entry_at = table.saturating_add(index.saturating_mul(8));
        let reserved = entry & REFCOUNT_TABLE_RESERVED;
        if reserved != 0 {
            self.corruption(1, entry_at, None, || {
                format!("refcount table entry {index} is {entry:#018x}, reserved bits are set")
            });
        }
        let at = HostOffset::new(entry & REFCOUNT_BLOCK_MASK);
        if at == HostOffset::ZERO {
            return Block::None;
        }
        if !at.is_aligned(self.cluster_size) {
            self.corruption(1, entry_at, None, || {
                format!("refcount table entry {index} refers to a block at {at:#x}, must start on a cluster")
            });
            return Block::Bad;
        }
        if reserved == 0 && at.get() >> self.header.cluster_bits.get() >= self.clusters {
            let file_len = self.file_len;
            self.corruption(1, entry_at, None, || {
                format!("refcount block {index} at {at:#x} lies past the end of the file at {file_len:#x}")
            });
            return Block::None;
        }
        // What has reserved bits is read all the same, but not trusted to own its block: repair will replace it.
        if reserved == 0 {
            self.refer("refcount block", at, self.cluster_size, 1, None);
            let references = self.references.get(at.get() >> self.header.cluster_bits.get());
            if references != 1 {
                self.corruption(1, at, None, || {
                    format!("refcount block {index} at {at:#x} is used {references} times, must be once")
                });
            }
        }
        Block::At(at)
    }

    fn compare(&mut self, disk: &mut Disk) -> Result<()> {
        let bits = self.block_bits();
        let mut bytes = vec![0; self.header.cluster_bits.cluster_len()];
        // Blocks that are used several times: how many of their refcounts are not 0.
        let mut known: HashMap<HostOffset, u64> = HashMap::new();
        let mut highest = 0;
        let blocks = std::mem::take(&mut disk.blocks);
        for (index, block) in blocks.iter().enumerate() {
            self.job.check()?;
            let first = match 1_u64
                .checked_shl(bits)
                .and_then(|step| step.checked_mul(index as u64))
            {
                Some(first) if first < self.clusters => first,
                _ => break,
            };
            let end = self.clusters.min(first.saturating_add(1 << bits));
            let at = match *block {
                Block::At(at) if !self.is_hole(at, self.cluster_size) => at,
                Block::Bad => {
                    self.find(FindingKind::Error, end.saturating_sub(first), None, None, || {
                        format!(
                            "the refcounts of clusters {first} to {} cannot be read",
                            end.saturating_sub(1)
                        )
                    });
                    highest = highest.max(self.highest_reference(first, end));
                    continue;
                }
                _ => {
                    self.compare_absent(first, end, &mut highest, disk);
                    continue;
                }
            };
            if let (Some(nonzero), false) = (known.get(&at), self.any_page(first, end)) {
                let nonzero = *nonzero;
                if nonzero > 0 {
                    highest = highest.max(end.saturating_sub(1));
                    self.find(FindingKind::Leak, nonzero, Some(at), None, || {
                        format!(
                            "{nonzero} clusters from {first} to {} leak",
                            end.saturating_sub(1)
                        )
                    });
                }
                continue;
            }
            if !self.read("refcount block", at, &mut bytes) {
                continue;
            }
            let nonzero = self.compare_block(&bytes, first, end, &mut highest, disk);
            if self.references.get(at.get() >> self.header.cluster_bits.get()) > 1 {
                known.insert(at, nonzero);
            }
        }
        let covered = (blocks.len() as u64)
            .checked_shl(bits)
            .filter(|end| end >> bits == blocks.len() as u64);
        if let Some(covered) = covered.filter(|covered| *covered < self.clusters) {
            self.compare_absent(covered, self.clusters, &mut highest, disk);
        }
        disk.blocks = blocks;
        self.report.image_end_offset = Some(HostOffset::new(
            highest.saturating_add(1) << self.header.cluster_bits.get(),
        ));
        Ok(())
    }

    fn any_page(&self, first: u64, end: u64) -> bool {
        self.references
            .pages(first / PAGE..end.div_ceil(PAGE))
            .next()
            .is_some()
    }

    /// The highest cluster in a range that is referred to, or 0.
    fn highest_reference(&self, first: u64, end: u64) -> u64 {
        let mut highest = 0;
        for page in self.references.pages(first / PAGE..end.div_ceil(PAGE)) {
            for cluster in clusters_of(page, first, end) {
                if self.references.get(cluster) > 0 {
                    highest = highest.max(cluster);
                }
            }
        }
        highest
    }

    /// Compares clusters that have no refcount block: all references are wrong.
    fn compare_absent(&mut self, first: u64, end: u64, highest: &mut u64, disk: &mut Disk) {
        let pages: Vec<_> = self.references.pages(first / PAGE..end.div_ceil(PAGE)).collect();
        for page in pages {
            for cluster in clusters_of(page, first, end) {
                self.compare_cluster(cluster, 0, highest, disk);
            }
        }
    }

    /// Compares the clusters from `first` to `end` with their block. Returns how many refcounts are not 0.
    fn compare_block(
        &mut self,
        bytes: &[u8],
        first: u64,
        end: u64,
        highest: &mut u64,
        disk: &mut Disk,
    ) -> u64 {
        let order = self.header.refcount_order;
        let page_bytes = usize::try_from((PAGE << order.get()) / 8).unwrap_or(usize::MAX);
        let mut nonzero = 0_u64;
        let mut next = first;
        while next < end {
            let stop = end.min((next / PAGE).saturating_add(1).saturating_mul(PAGE));
            let from = next.saturating_sub(first);
            let byte = usize::try_from((from << order.get()) / 8).unwrap_or(usize::MAX);
            let part = bytes.get(byte..).unwrap_or_default();
            let part = part.get(..page_bytes.min(part.len())).unwrap_or_default();
            let is_empty = part.iter().fold(0, |all, byte| all | byte) == 0;
            if !is_empty || self.references.has_page(next / PAGE) {
                for cluster in next..stop {
                    let refcount = get_count(bytes, order.get(), cluster.saturating_sub(first));
                    nonzero = nonzero.saturating_add(u64::from(refcount > 0));
                    self.compare_cluster(cluster, refcount, highest, disk);
                }
            }
            next = stop;
        }
        nonzero
    }

    fn compare_cluster(&mut self, cluster: u64, refcount: u64, highest: &mut u64, disk: &mut Disk) {
        let references = self.references.get(cluster);
        if references > 0 || refcount > 0 {
            *highest = (*highest).max(cluster);
        }
        if references == refcount {
            return;
        }
        if references > 0 {
            disk.differing.insert(cluster, refcount);
        }
        let kind = if refcount > references {
            FindingKind::Leak
        } else {
            FindingKind::Corruption
        };
        let at = HostOffset::new(cluster << self.header.cluster_bits.get());
        self.find(kind, 1, Some(at), None, || {
            format!("cluster {cluster} refcount={refcount} reference={references}")
        });
    }

    /// The refcount on disk of the cluster at `at`, or `None` if it cannot be told.
    pub(super) fn refcount_on_disk(&mut self, disk: &Disk, at: HostOffset) -> Option<u64> {
        let cluster = at.get() >> self.header.cluster_bits.get();
        let index = usize::try_from(cluster.checked_shr(self.block_bits())?).ok()?;
        match disk.blocks.get(index) {
            None | Some(Block::None) => Some(0),
            Some(Block::Bad) => None,
            Some(Block::At(_)) if cluster < self.clusters && self.references.get(cluster) > 0 => {
                let counted = self.references.get(cluster);
                Some(disk.differing.get(&cluster).copied().unwrap_or(counted))
            }
            Some(Block::At(block)) => {
                let order = self.header.refcount_order;
                let within = cluster & (1_u64 << self.block_bits()).wrapping_sub(1);
                let byte = (within << order.get()) / 8;
                let mut entry = [0; 8];
                self.main
                    .read_padded(block.saturating_add(byte & !7), &mut entry)
                    .ok()?;
                let first = ((byte & !7) << 3) >> order.get();
                Some(get_count(&entry, order.get(), within.saturating_sub(first)))
            }
        }
    }
}

/// The clusters of a page that lie in a range.
fn clusters_of(page: u64, first: u64, end: u64) -> std::ops::Range<u64> {
    let start = page.saturating_mul(PAGE);
    start.max(first)..start.saturating_add(PAGE).min(end)
}
