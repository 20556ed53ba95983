//! The tables of an image that is being written, and the order in which they reach the disk.
//!
//! All changes are made in memory first, in bounded caches. [`Tables::write_back`] is the only place that writes them,
//! in an order that a power cut cannot turn into corruption:
//!
//! 1. refcount blocks, then a barrier, then entries of the refcount table that point to new blocks;
//! 2. a barrier: refcounts, and data copied from elsewhere, are durable before anything points to them;
//! 3. L2 tables, then a barrier if an L1 entry will point to a new one;
//! 4. L1 entries;
//! 5. a barrier, after which references that were dropped are durably gone: only now are refcounts lowered, space
//!    given back to the host, and clusters handed out again.
//!
//! So a count on disk is never lower than the number of references on disk; it may be higher, which is a leak. A plain
//! allocating write costs no barrier: barriers are taken when tables are written, on a flush or when a cache is full of
//! changes.

mod expand;
mod order;
mod packed;
mod rewrite;

pub(crate) use expand::L2Tables;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

use diskmill_core::{Error, ErrorKind, GuestOffset, HostOffset, Result, StorageMut};

use super::fence::{Fence, Part};
use super::header::{Header, Version};
use super::map::{Geometry, L1Entry};
use super::refcount::Refcounts;
use super::slot::{Place, Slot};
pub(crate) use rewrite::HeaderRoom;

mod tree;

/// Bytes of L2 tables kept in memory, unless that is less than [`MIN_TABLES`].
const CACHE_BYTES: u64 = 8 << 20;
const MIN_TABLES: usize = 4;

/// L1 entries in one write.
const ENTRIES_PER_SECTOR: usize = 64;

/// What is wrong with a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum TableError {
    /// A table or cluster that is not in the file.
    #[error("{what} is at {at:#x}, must be below the end of the file at {len:#x}")]
    PastEnd { what: &'static str, at: u64, len: u64 },
    /// A guest offset without L1 entry.
    #[error("guest offset {at:#x} is past what the l1 table of {entries} entries covers")]
    PastL1 { at: u64, entries: u64 },
}

/// Whether space that is given back is also given back to the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reclaim {
    /// It stays in the file, for other clusters.
    Keep,
    /// If the image was opened to pass discards on.
    IfAsked,
    /// Always.
    Always,
}

/// References that are gone from the tables in memory.
#[derive(Clone, Copy, Debug)]
struct Dropped {
    first: u64,
    count: u64,
    /// References to each of them.
    times: u64,
    reclaim: Reclaim,
}

#[derive(Debug)]
struct Table {
    words: Vec<u64>,
    dirty: Range<usize>,
    used: u64,
}

impl Table {
    /// Notes that `words` were changed.
    fn mark(&mut self, words: Range<usize>) {
        self.dirty = if self.dirty.is_empty() {
            words
        } else {
            self.dirty.start.min(words.start)..self.dirty.end.max(words.end)
        };
    }
}

/// The tables of an image.
#[derive(Debug)]
pub(crate) struct Tables {
    pub(crate) geometry: Geometry,
    pub(crate) fence: Fence,
    pub(crate) refcounts: Refcounts,
    l1: Vec<L1Entry>,
    l1_at: HostOffset,
    dirty_l1: BTreeSet<usize>,
    l2: BTreeMap<u64, Table>,
    capacity: usize,
    clock: u64,
    dropped: Vec<Dropped>,
    dropped_clusters: u64,
    /// Pass discards on.
    unmap: bool,
    /// Where the next compressed cluster goes, if it fits.
    packed_at: Option<u64>,
}

impl Tables {
    /// Reads the L1 table and the refcount table of the image with header `header`, and protects what they name.
    pub(crate) fn load(
        header: &Header,
        file: Arc<dyn StorageMut>,
        data_file: Option<Arc<dyn StorageMut>>,
        unmap: bool,
    ) -> Result<Self> {
        let geometry = header.geometry();
        let cluster = geometry.cluster_size();
        let len = file.len()?;
        let mut fence = Fence::new(file, data_file, geometry.cluster_bits().get());
        fence.protect(0..cluster, Part::Header);
        protect_encryption(&mut fence, header);
        let refcounts = Refcounts::load(
            &mut fence,
            header.refcount_order.get(),
            header.refcount_table_offset.get(),
            header.refcount_table_clusters,
        )?;
        let l1_at = header.l1_table_offset;
        let l1_len = usize::try_from(header.l1_size).unwrap_or(0) * 8;
        let l1_last = l1_at.get().saturating_add(l1_len as u64).saturating_sub(1);
        if l1_len > 0 && l1_last >= len {
            return Err(past_end("the last byte of the active l1 table", l1_last, len));
        }
        let mut raw = vec![0; l1_len];
        fence.file().read_padded(l1_at, &mut raw)?;
        let l1: Vec<L1Entry> = raw
            .as_chunks::<8>()
            .0
            .iter()
            .map(|entry| L1Entry(u64::from_be_bytes(*entry)))
            .collect();
        fence.protect(l1_at.get()..l1_at.get() + l1_len as u64, Part::ActiveL1);
        for entry in l1.iter().filter(|entry| entry.offset() != HostOffset::ZERO) {
            fence.protect_table(entry.offset().get(), Part::ActiveL2);
        }
        Ok(Self {
            geometry,
            fence,
            refcounts,
            l1,
            l1_at,
            dirty_l1: BTreeSet::new(),
            l2: BTreeMap::new(),
            capacity: usize::try_from(CACHE_BYTES / cluster)
                .map_or(MIN_TABLES, |tables| tables.max(MIN_TABLES)),
            clock: 0,
            dropped: Vec::new(),
            dropped_clusters: 0,
            unmap,
            packed_at: None,
        })
    }

    /// Notes that the image has another version now.
    pub(crate) fn set_version(&mut self, version: Version) {
        let known = self.geometry;
        self.geometry = Geometry::new(
            version,
            known.cluster_bits(),
            known.extended_l2(),
            known.data_file(),
        );
    }

    /// Entries of the L1 table.
    pub(crate) fn l1_len(&self) -> u64 {
        self.l1.len() as u64
    }

    fn l1_entry(&self, at: GuestOffset) -> Result<(usize, L1Entry)> {
        usize::try_from(self.geometry.l1_index(at))
            .ok()
            .and_then(|index| Some((index, *self.l1.get(index)?)))
            .ok_or_else(|| {
                let entries = self.l1.len() as u64;
                Error::new(
                    ErrorKind::Corrupt,
                    TableError::PastL1 {
                        at: at.get(),
                        entries,
                    },
                )
                .guest(at)
            })
    }

    fn set_l1(&mut self, index: usize, entry: L1Entry) {
        if let Some(known) = self.l1.get_mut(index) {
            *known = entry;
            self.dirty_l1.insert(index / ENTRIES_PER_SECTOR);
        }
    }

    /// Whether guest bytes at `at` have an L2 table at all.
    pub(crate) fn has_l2(&self, at: GuestOffset) -> Result<bool> {
        Ok(self.l1_entry(at)?.1.offset() != HostOffset::ZERO)
    }

    /// The L2 table at `at`, read if it is not in memory.
    fn table(&mut self, at: HostOffset) -> Result<&mut Table> {
        if !self.l2.contains_key(&at.get()) {
            let len = self.fence.file().len()?;
            if at.get() >= len {
                return Err(past_end("an l2 table", at.get(), len));
            }
            self.make_room()?;
            let mut raw = vec![0; self.geometry.cluster_bits().cluster_len()];
            self.fence.file().read_padded(at, &mut raw)?;
            let words = raw
                .as_chunks::<8>()
                .0
                .iter()
                .map(|word| u64::from_be_bytes(*word))
                .collect();
            self.l2.insert(
                at.get(),
                Table {
                    words,
                    dirty: 0..0,
                    used: 0,
                },
            );
        }
        self.clock += 1;
        let clock = self.clock;
        match self.l2.get_mut(&at.get()) {
            Some(table) => {
                table.used = clock;
                Ok(table)
            }
            // Not reached: it was put there above.
            None => Err(Error::bare(ErrorKind::Io)),
        }
    }

    /// Makes room for one more table, writing changes back if nothing clean can go.
    fn make_room(&mut self) -> Result<()> {
        if self.l2.len() < self.capacity {
            return Ok(());
        }
        if !self.l2.values().any(|table| table.dirty.is_empty()) {
            self.write_back(false)?;
        }
        // Several at once, so that looking for the oldest is not the work of every call.
        let mut ages: Vec<(u64, u64)> = self
            .l2
            .iter()
            .filter(|(_, table)| table.dirty.is_empty())
            .map(|(at, table)| (table.used, *at))
            .collect();
        ages.sort_unstable();
        for (_, oldest) in ages.into_iter().take(self.capacity / 4 + 1) {
            self.l2.remove(&oldest);
        }
        Ok(())
    }

    /// The state of the cluster with guest byte `at`.
    pub(crate) fn slot(&mut self, at: GuestOffset) -> Result<Slot> {
        let geometry = self.geometry;
        let (_, entry) = self.l1_entry(at)?;
        let Some(table_at) = entry
            .table(geometry)
            .map_err(|error| Error::from(error).guest(at))?
        else {
            return Ok(Slot::ABSENT);
        };
        let index = word_index(geometry, at);
        let table = self.table(table_at)?;
        let words = (
            table.words.get(index).copied().unwrap_or(0),
            if geometry.extended_l2() {
                table.words.get(index + 1).copied().unwrap_or(0)
            } else {
                0
            },
        );
        let start = at.align_down(geometry.cluster_size());
        let mut slot =
            Slot::decode(words, geometry, start).map_err(|error| Error::from(error).guest(start))?;
        if let Place::At { own, .. } = &mut slot.place {
            // In a table that is shared, no cluster is ours alone, whatever the entry says. A data file is never
            // shared.
            *own = *own && entry.copied() || geometry.data_file();
        }
        Ok(slot)
    }

    /// Changes the cluster with guest byte `at` to `slot`. Its L2 table is made, or made ours, first. References that
    /// the old entry held are for the caller to [`drop_slot`](Self::drop_slot).
    pub(crate) fn set_slot(&mut self, at: GuestOffset, slot: Slot) -> Result<()> {
        let geometry = self.geometry;
        let table_at = self.own_table(at)?;
        let index = word_index(geometry, at);
        let (entry, bitmap) = slot.encode(geometry);
        let table = self.table(table_at)?;
        let end = index + if geometry.extended_l2() { 2 } else { 1 };
        if let Some(words) = table.words.get_mut(index..end) {
            for (word, value) in words.iter_mut().zip([entry, bitmap]) {
                *word = value;
            }
        }
        table.mark(index..end);
        Ok(())
    }

    /// The L2 table for guest byte `at`, which may be changed: a new one if there is none, a copy if it is shared.
    fn own_table(&mut self, at: GuestOffset) -> Result<HostOffset> {
        let (index, entry) = self.l1_entry(at)?;
        let old = entry
            .table(self.geometry)
            .map_err(|error| Error::from(error).guest(at))?;
        if let Some(table_at) = old
            && entry.copied()
        {
            return Ok(table_at);
        }
        let words = match old {
            Some(table_at) => self.table(table_at)?.words.clone(),
            None => vec![0; self.geometry.cluster_bits().cluster_len() / 8],
        };
        self.make_room()?;
        let (cluster, _) = self.allocate(1, 1)?;
        let new = HostOffset::new(cluster << self.geometry.cluster_bits().get());
        self.clock += 1;
        let dirty = 0..words.len();
        let used = self.clock;
        self.l2.insert(new.get(), Table { words, dirty, used });
        self.fence.protect_table(new.get(), Part::ActiveL2);
        self.set_l1(index, L1Entry::new(new, true));
        if let Some(old) = old {
            self.forget_table(old);
            self.drop_clusters(old.get() >> self.geometry.cluster_bits().get(), 1, Reclaim::Keep);
        }
        Ok(new)
    }

    /// Forgets an L2 table that an entry of the active L1 table no longer names. What was changed in it and not written is lost.
    fn forget_table(&mut self, at: HostOffset) {
        if self.fence.unprotect_table(at.get()) {
            self.l2.remove(&at.get());
        }
    }

    /// Takes the L2 table for guest byte `at` out of the L1 table, and drops all that it refers to.
    pub(crate) fn drop_table(&mut self, at: GuestOffset, reclaim: Reclaim) -> Result<()> {
        let (index, entry) = self.l1_entry(at)?;
        let Some(table_at) = entry
            .table(self.geometry)
            .map_err(|error| Error::from(error).guest(at))?
        else {
            return Ok(());
        };
        let start = self.geometry.l1_start(index as u64);
        // Only once all of it has been understood: what is noted as dropped must be gone.
        let mut slots = Vec::new();
        for entry in 0..self.geometry.l2_entries() {
            let slot = self.slot(start.plus(entry << self.geometry.cluster_bits().get())?)?;
            if slot.place != Place::Nowhere {
                slots.push(slot);
            }
        }
        for slot in slots {
            self.drop_slot(slot, reclaim);
        }
        self.set_l1(index, L1Entry::default());
        self.forget_table(table_at);
        self.drop_clusters(table_at.get() >> self.geometry.cluster_bits().get(), 1, reclaim);
        Ok(())
    }

    /// Takes up to `max` clusters in one run, at least `min`: the first, and how many there are.
    pub(crate) fn allocate(&mut self, min: u64, max: u64) -> Result<(u64, u64)> {
        match self.refcounts.allocate(&mut self.fence, min, max) {
            Err(error) if error.kind() == ErrorKind::NoSpace && !self.dropped.is_empty() => {
                self.write_back(true)?;
                self.refcounts.allocate(&mut self.fence, min, max)
            }
            other => other,
        }
    }

    /// Gives back clusters that nothing has ever referred to.
    pub(crate) fn release(&mut self, first: u64, count: u64) -> Result<()> {
        for cluster in first..first.saturating_add(count) {
            self.refcounts.lower(&mut self.fence, cluster)?;
            self.unpack_from(cluster);
        }
        Ok(())
    }

    /// Gives back what `slot` refers to, which nothing has ever shown.
    pub(crate) fn release_slot(&mut self, slot: Slot) -> Result<()> {
        let (first, count) = self.host_clusters(slot);
        self.release(first, count)
    }

    /// The clusters of the main file that `slot` refers to: the first, and how many.
    fn host_clusters(&self, slot: Slot) -> (u64, u64) {
        let bits = self.geometry.cluster_bits().get();
        match slot.place {
            Place::Nowhere => (0, 0),
            Place::At { .. } if self.geometry.data_file() => (0, 0),
            Place::At { host, .. } => (host.get() >> bits, 1),
            Place::Packed(entry) => {
                let span = entry.span(self.geometry);
                let first = span.at.get() >> bits;
                let last = span.end().get().saturating_sub(1) >> bits;
                (first, last.saturating_sub(first) + 1)
            }
        }
    }

    /// Notes that the active state no longer refers to what `slot` refers to.
    pub(crate) fn drop_slot(&mut self, slot: Slot, reclaim: Reclaim) {
        let (first, count) = self.host_clusters(slot);
        if count > 0 {
            self.drop_clusters(first, count, reclaim);
        }
    }

    /// Notes that the reference to each of `count` clusters is gone from the tables in memory.
    pub(crate) fn drop_clusters(&mut self, first: u64, count: u64, reclaim: Reclaim) {
        self.drop_clusters_of(first, count, 1, reclaim);
    }

    /// Notes that `times` references to each of `count` clusters are gone from the tables in memory.
    fn drop_clusters_of(&mut self, first: u64, count: u64, times: u64, reclaim: Reclaim) {
        self.dropped_clusters = self.dropped_clusters.saturating_add(count);
        if let Some(last) = self.dropped.last_mut()
            && last.first.checked_add(last.count) == Some(first)
            && (last.reclaim, last.times) == (reclaim, times)
        {
            last.count = last.count.saturating_add(count);
        } else {
            self.dropped.push(Dropped {
                first,
                count,
                times,
                reclaim,
            });
        }
    }
}

/// Protects the encryption header, if there is one.
pub(crate) fn protect_encryption(fence: &mut Fence, header: &Header) {
    if let Some(place) = header.encryption() {
        let end = place.offset.saturating_add(place.length);
        fence.protect(place.offset.get()..end.get(), Part::EncryptionHeader);
    }
}

fn word_index(geometry: Geometry, at: GuestOffset) -> usize {
    let words = geometry.entry_len() / 8;
    usize::try_from(geometry.l2_index(at)).unwrap_or(usize::MAX / 16) * words
}

pub(crate) fn past_end(what: &'static str, at: u64, len: u64) -> Error {
    Error::new(ErrorKind::Corrupt, TableError::PastEnd { what, at, len }).host(HostOffset::new(at))
}
