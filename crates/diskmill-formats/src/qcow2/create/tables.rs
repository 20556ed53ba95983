//! The tables of a new image, filled in rising guest order.
//!
//! ```text
//! 0  header
//! 1  refcount table, if one cluster is enough for it
//! 2  refcount block 0
//! 3  L1 table, then the first L2 table, then data
//! ```
//!
//! An L2 table is placed before its data, so that a file ends with data. Where tables are small and many, only the
//! first is: later ones wait, as refcount blocks do, until there is a good number of them. That leaves data in one
//! piece and makes few, large writes.

use diskmill_core::{Error, ErrorKind, FileIndex, Format, GuestOffset, HostOffset, Result, Writes};

use super::clusters::Clusters;
use crate::qcow2::header::Header;
use crate::qcow2::layout::L1_BYTES_MAX;
use crate::qcow2::map::{Geometry, L1Entry, L2Entry, Subclusters};
use crate::qcow2::options::{CreateError, Plan};

/// Bytes of full tables that wait to be placed together.
const BATCH: usize = 1 << 20;

/// Clusters from which on an L2 table speaks for so much data that it is worth a place of its own: 64 KiB.
const LARGE_CLUSTER_BITS: u32 = 16;

/// A table that waits for a place.
#[derive(Clone, Copy, Debug)]
enum Owner {
    /// The L2 table of this L1 entry.
    L1Entry(usize),
    /// The refcount block of this index.
    Block(u64),
}

/// The L2 table that is being filled.
#[derive(Debug)]
struct Current {
    l1_index: u64,
    bytes: Vec<u8>,
    /// Its place, if it has one.
    at: Option<HostOffset>,
}

/// See the [module](self).
#[derive(Debug)]
pub(super) struct Tables {
    geometry: Geometry,
    clusters: Clusters,
    l1: Vec<u64>,
    l1_offset: HostOffset,
    /// Where the encryption header goes, if there is one.
    encryption_at: Option<HostOffset>,
    /// Bytes of the clusters set aside for the L1 table.
    l1_room: u64,
    refcount_table: Vec<u64>,
    current: Option<Current>,
    /// Whether the next L2 table is placed before its data.
    before_data: bool,
    waiting: Vec<(Owner, Vec<u8>)>,
    /// Where the file ends so far.
    end: HostOffset,
}

impl Tables {
    /// The tables of an empty image. `have` is the length of the storage if it cannot grow.
    pub fn new(plan: &Plan, have: Option<u64>) -> Result<Self> {
        let geometry = plan.geometry();
        let mut clusters = Clusters::new(plan.cluster_bits, plan.refcount_order, have);
        clusters.take(3)?;
        let entries = geometry.l1_entries(plan.virtual_size);
        let l1_bytes = entries.saturating_mul(8);
        let l1_clusters = plan.cluster_bits.clusters(l1_bytes);
        let l1_offset = clusters.take(l1_clusters)?;
        let mut end = l1_offset.plus(l1_bytes)?;
        let encryption = plan.cluster_bits.clusters(plan.encryption.header_len());
        let mut encryption_at = None;
        if encryption > 0 {
            let at = clusters.take(encryption)?;
            end = at.plus(encryption.saturating_mul(plan.cluster_bits.cluster_size()))?;
            encryption_at = Some(at);
        }
        Ok(Self {
            geometry,
            clusters,
            encryption_at,
            l1: vec![0; to_len(entries)],
            l1_offset,
            l1_room: l1_clusters.saturating_mul(plan.cluster_bits.cluster_size()),
            refcount_table: Vec::new(),
            current: None,
            before_data: true,
            waiting: Vec::new(),
            end,
        })
    }

    /// Where the encryption header goes, if there is one.
    pub fn encryption_at(&self) -> Option<HostOffset> {
        self.encryption_at
    }

    /// Gives out `count` clusters in a row for data at `guest`, behind the L2 table if that is the first.
    pub fn take(&mut self, guest: GuestOffset, count: u64, writes: &mut Writes<'_>) -> Result<HostOffset> {
        self.table_for(guest, writes)?;
        self.clusters.take(count)
    }

    /// Gives out `len` bytes for compressed data at `guest`.
    pub fn pack(&mut self, guest: GuestOffset, len: u64, writes: &mut Writes<'_>) -> Result<HostOffset> {
        self.table_for(guest, writes)?;
        self.clusters.pack(len)
    }

    /// Says that the file has something up to `end`.
    pub fn reaches(&mut self, end: HostOffset) {
        self.end = self.end.max(end);
    }

    /// What is entered for the cluster of `guest`, which is in the table filled now or in a later one.
    pub fn get(&self, guest: GuestOffset) -> (L2Entry, Subclusters) {
        let current = self.current.as_ref();
        let current = current.filter(|current| current.l1_index == self.geometry.l1_index(guest));
        let Some(current) = current else {
            return (L2Entry::UNALLOCATED, Subclusters::default());
        };
        let word = |offset: usize| {
            let place = self.entry_at(guest).saturating_add(offset);
            let bytes = current.bytes.get(place..).and_then(|rest| rest.first_chunk());
            bytes.map_or(0, |bytes| u64::from_be_bytes(*bytes))
        };
        let subclusters = if self.geometry.extended_l2() { word(8) } else { 0 };
        (L2Entry(word(0)), Subclusters(subclusters))
    }

    /// Enters the cluster of `guest`. Without extended L2 entries there are no subclusters to enter.
    pub fn put(
        &mut self,
        guest: GuestOffset,
        entry: L2Entry,
        subclusters: Subclusters,
        writes: &mut Writes<'_>,
    ) -> Result<()> {
        let (at, extended) = (self.entry_at(guest), self.geometry.extended_l2());
        let table = self.table_for(guest, writes)?;
        let Some(place) = table.get_mut(at..).and_then(|rest| rest.first_chunk_mut::<8>()) else {
            return Ok(());
        };
        *place = entry.0.to_be_bytes();
        if extended
            && let Some(place) = table
                .get_mut(at.saturating_add(8)..)
                .and_then(|rest| rest.first_chunk_mut::<8>())
        {
            *place = subclusters.0.to_be_bytes();
        }
        Ok(())
    }

    /// Places full tables once there are many, or all that are full with `all`.
    fn settle(&mut self, all: bool, writes: &mut Writes<'_>) -> Result<()> {
        for (index, block) in self.clusters.take_full() {
            self.waiting.push((Owner::Block(index), block));
        }
        let cluster_len = self.geometry.cluster_bits().cluster_len();
        let bytes = self.waiting.len().saturating_mul(cluster_len);
        if self.waiting.is_empty() || (bytes < BATCH && !all) {
            return Ok(());
        }
        let start = self.clusters.take(self.waiting.len() as u64)?;
        let mut joined = Vec::with_capacity(bytes);
        let mut at = start;
        for (owner, table) in std::mem::take(&mut self.waiting) {
            self.enter(owner, at);
            joined.extend_from_slice(&table);
            at = at.plus(table.len() as u64)?;
        }
        self.reaches(at);
        writes.push(FileIndex::MAIN, start, joined);
        Ok(())
    }

    /// Places all that remains and completes `header`. Returns where the file ends.
    pub fn finish(mut self, header: &mut Header, writes: &mut Writes<'_>) -> Result<HostOffset> {
        self.close(writes)?;
        self.settle(true, writes)?;
        self.place_l1(header, writes)?;
        let cluster_bits = self.geometry.cluster_bits();
        let cluster_size = cluster_bits.cluster_size();
        // The blocks that remain count themselves, and the table too if it has outgrown the cluster kept for it.
        let (mut blocks, mut table) = (0_u64, 1_u64);
        loop {
            let behind = if table > 1 { table } else { 0 };
            let needed_blocks = self.clusters.remaining_with(blocks.saturating_add(behind));
            let entries = self.clusters.handed_out().saturating_add(needed_blocks);
            let needed_table = cluster_bits.clusters(entries.saturating_mul(8)).max(1);
            if (needed_blocks, needed_table) == (blocks, table) {
                break;
            }
            (blocks, table) = (needed_blocks, needed_table);
        }
        let mut table_at = HostOffset::new(cluster_size);
        if table > 1 {
            self.clusters.release(1);
            table_at = self.clusters.take(table)?;
        }
        let mut at = self.clusters.take(blocks)?;
        let taken = HostOffset::new(self.clusters.given().saturating_mul(cluster_size));
        if blocks > 0 || table > 1 {
            self.reaches(taken);
        }
        let first_at = HostOffset::new(cluster_size.saturating_mul(2));
        self.enter(Owner::Block(0), first_at);
        let mut entries = self.refcount_table;
        let (first, rest) = self.clusters.into_blocks();
        writes.push(FileIndex::MAIN, first_at, first);
        for block in rest {
            entries.push(at.get());
            let behind = at.plus(cluster_size)?;
            writes.push(FileIndex::MAIN, at, block);
            at = behind;
        }
        let mut bytes = be_bytes(&entries);
        bytes.resize(to_len(table.saturating_mul(cluster_size)), 0);
        writes.push(FileIndex::MAIN, table_at, bytes);
        if let Some(at) = self.encryption_at {
            header.set_encryption_offset(at);
        }
        header.refcount_table_offset = table_at;
        header.refcount_table_clusters = u32::try_from(table).unwrap_or(u32::MAX);
        Ok(self.end)
    }

    fn place_l1(&mut self, header: &mut Header, writes: &mut Writes<'_>) -> Result<()> {
        let bytes = be_bytes(&self.l1);
        let len = bytes.len() as u64;
        if len > self.l1_room {
            if self.l1_room > 0 {
                return Err(
                    Error::new(ErrorKind::Usage, "the disk is larger than was planned").format(Format::Qcow2),
                );
            }
            // The size was not known before: the table goes behind the data.
            self.l1_offset = self.clusters.take(self.geometry.cluster_bits().clusters(len))?;
            self.reaches(self.l1_offset.plus(len)?);
        }
        if len > 0 {
            header.l1_table_offset = self.l1_offset;
        }
        header.l1_size = u32::try_from(self.l1.len()).unwrap_or(u32::MAX);
        if len > 0 {
            writes.push(FileIndex::MAIN, self.l1_offset, bytes);
        }
        Ok(())
    }

    /// Makes the L1 table long enough for a disk of `size` bytes.
    pub fn covers(&mut self, size: u64) -> Result<()> {
        let entries = self.geometry.l1_entries(size);
        self.l1_reaches(entries)
    }

    fn l1_reaches(&mut self, entries: u64) -> Result<()> {
        let most = L1_BYTES_MAX >> 3;
        if entries > most {
            let covers = self.geometry.l1_entry_covers();
            return Err(CreateError::TooLarge {
                size: entries.saturating_mul(covers),
                most: most.saturating_mul(covers),
            }
            .into());
        }
        let entries = to_len(entries);
        if self.l1.len() < entries {
            self.l1.resize(entries, 0);
        }
        Ok(())
    }

    /// The table that has the entry for `guest`; closes the one before.
    fn table_for(&mut self, guest: GuestOffset, writes: &mut Writes<'_>) -> Result<&mut [u8]> {
        let l1_index = self.geometry.l1_index(guest);
        if self
            .current
            .as_ref()
            .is_some_and(|current| current.l1_index != l1_index)
        {
            self.close(writes)?;
            // Here and nowhere else: the layout must not depend on how many units are placed at once.
            self.settle(false, writes)?;
        }
        if self.current.is_none() {
            self.l1_reaches(l1_index.saturating_add(1))?;
            let cluster_bits = self.geometry.cluster_bits();
            let mut at = None;
            if self.before_data {
                self.before_data = self.geometry.extended_l2() || cluster_bits.get() >= LARGE_CLUSTER_BITS;
                let place = self.clusters.take(1)?;
                self.reaches(place.plus(cluster_bits.cluster_size())?);
                at = Some(place);
            }
            self.current = Some(Current {
                l1_index,
                bytes: vec![0; cluster_bits.cluster_len()],
                at,
            });
        }
        let current = self.current.as_mut();
        Ok(current
            .map(|current| current.bytes.as_mut_slice())
            .unwrap_or_default())
    }

    /// Puts the table being filled where full ones go.
    fn close(&mut self, writes: &mut Writes<'_>) -> Result<()> {
        let Some(current) = self.current.take() else {
            return Ok(());
        };
        let owner = Owner::L1Entry(to_len(current.l1_index));
        match current.at {
            Some(at) => {
                self.enter(owner, at);
                writes.push(FileIndex::MAIN, at, current.bytes);
            }
            None => self.waiting.push((owner, current.bytes)),
        }
        Ok(())
    }

    /// Says where a table is.
    fn enter(&mut self, owner: Owner, at: HostOffset) {
        let (list, index, value) = match owner {
            Owner::L1Entry(index) => (&mut self.l1, index, L1Entry::new(at, true).0),
            Owner::Block(index) => (&mut self.refcount_table, to_len(index), at.get()),
        };
        if list.len() <= index {
            list.resize(index.saturating_add(1), 0);
        }
        if let Some(entry) = list.get_mut(index) {
            *entry = value;
        }
    }

    /// Where the entry for `guest` is in its table.
    fn entry_at(&self, guest: GuestOffset) -> usize {
        to_len(self.geometry.l2_index(guest)).saturating_mul(self.geometry.entry_len())
    }
}

fn be_bytes(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_be_bytes()).collect()
}

/// A count that is known to be small as a length in memory.
fn to_len(count: u64) -> usize {
    usize::try_from(count).unwrap_or(usize::MAX)
}
