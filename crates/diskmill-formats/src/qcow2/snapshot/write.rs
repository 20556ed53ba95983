//! Making, applying and deleting snapshots.
//!
//! A snapshot is a copy of the L1 table; everything it refers to is counted once more. In each operation the header is
//! switched in one write, after all that it points to is durable and before anything it no longer points to is given
//! back, so that a power cut in between leaks at worst. (It may also leave COPIED flags that are too cautious or, while
//! a count is still too high, too bold: both are harmless, and a check tells them.)

use std::sync::atomic::Ordering;

use diskmill_core::{
    Chain, Error, ErrorKind, Format, HostOffset, NewSnapshot, Result, SnapshotFacts, Snapshots,
};

use super::super::bitmap::Store;
use super::super::fence::Part;
use super::super::flight::Hold;
use super::super::layout::{L1_BYTES_MAX, SNAPSHOT_TABLE_BYTES_MAX, SNAPSHOTS_MAX};
use super::super::map::L1Entry;
use super::super::tables::Tables;
use super::super::write::Image;
use super::{Snapshot, find};

/// Where the header keeps the number of snapshots (4 bytes) and, behind it, the offset of their table (8 bytes).
const HEADER_SNAPSHOTS_AT: usize = 60;
/// The longest name that QEMU's structures hold.
const NAME_MAX: usize = 255;

/// Why there can be no such snapshot.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum SnapshotWriteError {
    #[error("internal snapshots are not supported with an external data file")]
    DataFile,
    #[error("the name of the snapshot has {0} bytes, must have at most 255")]
    Name(usize),
    #[error("there are {0} snapshots, must be at most 65536")]
    TooMany(usize),
    #[error("the snapshot table would have {0} bytes, must have at most 67108864")]
    TableTooLong(usize),
    #[error("there is a snapshot with id '{0}' already")]
    Id(String),
    #[error(
        "machine state of {end} bytes behind the disk is too large for the l1 table, which may have 4194304 entries"
    )]
    MachineState { end: u64 },
}

fn refuse(error: SnapshotWriteError) -> Error {
    Error::new(ErrorKind::Unsupported, error).format(Format::Qcow2)
}

/// The snapshot table of an image that is being written.
#[derive(Debug)]
pub(crate) struct SnapshotTable {
    pub(crate) entries: Vec<Snapshot>,
    at: HostOffset,
    bytes: u64,
}

impl SnapshotTable {
    /// The table that was read from `at` and takes `bytes` there; protects it and the L1 tables it names.
    pub(crate) fn load(tables: &mut Tables, entries: Vec<Snapshot>, at: HostOffset, bytes: u64) -> Self {
        tables
            .fence
            .protect(at.get()..at.get().saturating_add(bytes), Part::SnapshotTable);
        for snapshot in &entries {
            let at = snapshot.l1_table_offset.get();
            let end = at.saturating_add(u64::from(snapshot.l1_size) * 8);
            tables.fence.protect(at..end, Part::InactiveL1);
        }
        Self { entries, at, bytes }
    }

    /// Makes sure that every entry has the extra data that version 3 wants.
    pub(crate) fn complete(&mut self, tables: &mut Tables) -> Result<()> {
        let complete = |snapshot: &Snapshot| snapshot.extra.len() >= 16;
        match self.entries.iter().all(complete) {
            true => Ok(()),
            false => self.replace(tables, self.entries.clone()),
        }
    }

    /// Puts `entries` in the table's place. When this returns they are durable, and the old table's clusters free.
    fn replace(&mut self, tables: &mut Tables, mut entries: Vec<Snapshot>) -> Result<()> {
        let bits = tables.geometry.cluster_bits().get();
        let cluster = tables.geometry.cluster_size();
        entries.iter_mut().for_each(Snapshot::complete_extra);
        let mut raw: Vec<u8> = entries.iter().flat_map(Snapshot::to_bytes).collect();
        if entries.len() as u64 > u64::from(SNAPSHOTS_MAX) {
            return Err(refuse(SnapshotWriteError::TooMany(entries.len())));
        }
        if raw.len() as u64 > SNAPSHOT_TABLE_BYTES_MAX {
            return Err(refuse(SnapshotWriteError::TableTooLong(raw.len())));
        }
        let bytes = raw.len() as u64;
        let clusters = bytes.div_ceil(cluster);
        let at = if entries.is_empty() {
            0
        } else {
            let (first, _) = tables.allocate(clusters, clusters)?;
            raw.resize(usize::try_from(clusters.saturating_mul(cluster)).unwrap_or(0), 0);
            if let Err(error) = tables.fence.write(Part::SnapshotTable, first << bits, &raw) {
                // The write is what the caller must hear of; what cannot be given back leaks.
                let _ = tables.release(first, clusters);
                return Err(error);
            }
            first << bits
        };
        tables.write_back(true)?;
        let mut pointer = [0; 12];
        let (count, place) = pointer.split_at_mut(4);
        count.copy_from_slice(&u32::try_from(entries.len()).unwrap_or(u32::MAX).to_be_bytes());
        place.copy_from_slice(&at.to_be_bytes());
        tables.write_header(HEADER_SNAPSHOTS_AT, &pointer)?;

        let old = (self.at.get() >> bits, self.bytes.div_ceil(cluster));
        tables.fence.unprotect(self.at.get());
        if bytes > 0 {
            tables
                .fence
                .protect(at..at.saturating_add(bytes), Part::SnapshotTable);
        }
        *self = Self {
            entries,
            at: HostOffset::new(at),
            bytes,
        };
        tables.release(old.0, old.1)?;
        tables.write_back(true)
    }
}

impl Image {
    fn snapshot_of(
        &self,
        table: &SnapshotTable,
        l1: HostOffset,
        l1_size: u32,
        new: &NewSnapshot,
    ) -> Snapshot {
        let last = || {
            let numbers = table
                .entries
                .iter()
                .map(|snapshot| snapshot.facts.id.parse::<u64>());
            numbers.filter_map(Result::ok).max().unwrap_or(0)
        };
        let id = match &new.id {
            Some(id) => id.clone(),
            None => last().saturating_add(1).to_string(),
        };
        Snapshot {
            l1_table_offset: l1,
            l1_size,
            id: id.clone().into_bytes(),
            name: new.name.clone().into_bytes(),
            facts: SnapshotFacts {
                id,
                name: new.name.clone(),
                vm_state_size: new.vm_state_size,
                date_sec: new.date_sec,
                date_nsec: new.date_nsec,
                vm_clock_nsec: new.vm_clock_nsec,
                icount: new.icount,
                disk_size: self.size.load(Ordering::Acquire),
            },
            extra: Vec::new(),
        }
    }

    fn create_snapshot(
        &self,
        tables: &mut Tables,
        table: &mut SnapshotTable,
        new: &NewSnapshot,
    ) -> Result<SnapshotFacts> {
        if table.entries.len() >= usize::try_from(SNAPSHOTS_MAX).unwrap_or(usize::MAX) {
            return Err(refuse(SnapshotWriteError::TooMany(
                table.entries.len().saturating_add(1),
            )));
        }
        let same_id = |id: &String| {
            let mut known = table.entries.iter();
            known.any(|snapshot| snapshot.id == id.as_bytes())
        };
        if let Some(id) = new.id.as_ref().filter(|id| same_id(id)) {
            return Err(refuse(SnapshotWriteError::Id(id.clone())));
        }
        tables.flush()?;
        let l1: Vec<L1Entry> = tables.l1().to_vec();
        tables.raise_tree(&l1)?;
        let at = match tables.write_new_l1(&l1) {
            Ok(at) => at,
            Err(error) => {
                // Nothing names a copy. Should this fail as well, the counts stay too high: a leak.
                let _ = tables.drop_tree(&l1).and_then(|()| tables.write_back(true));
                return Err(error);
            }
        };
        tables.refresh_copied()?;
        tables.write_back(true)?;
        let l1_size = u32::try_from(l1.len()).unwrap_or(u32::MAX);
        let snapshot = self.snapshot_of(table, at, l1_size, new);
        let facts = snapshot.facts.clone();
        let mut entries = table.entries.clone();
        entries.push(snapshot);
        // If this fails the header may name the snapshot all the same: counts that are too high are safe with either.
        table.replace(tables, entries)?;
        let end = at.saturating_add(u64::from(l1_size).saturating_mul(8));
        tables.fence.protect(at.get()..end.get(), Part::InactiveL1);
        // Machine state behind the end of the disk is the snapshot's alone: in the active state it would only be copied.
        let size = self.size.load(Ordering::Acquire);
        self.drop_beyond(tables, size)?;
        Ok(facts)
    }

    /// Takes out of the active state what lies past a disk of `size` bytes.
    fn drop_beyond(&self, tables: &mut Tables, size: u64) -> Result<()> {
        for index in self.geometry.l1_entries(size)..tables.l1_len() {
            tables.drop_table(self.geometry.l1_start(index), super::super::tables::Reclaim::Keep)?;
        }
        tables.write_back(true)
    }

    fn apply_snapshot(
        &self,
        tables: &mut Tables,
        table: &SnapshotTable,
        bitmaps: &mut Store,
        which: &str,
    ) -> Result<()> {
        let (_, snapshot) = find(&table.entries, &which.into())?;
        let disk_size = snapshot.checked_size()?;
        let old_size = self.size.load(Ordering::Acquire);
        let resizes = disk_size != old_size && !bitmaps.is_empty();
        let needed = self.geometry.l1_entries(disk_size);
        let l1 = tables.read_l1(snapshot.l1_table_offset, snapshot.l1_size, needed)?;
        bitmaps.flush(tables)?;
        tables.raise_tree(&l1)?;
        // All of the disk may become another.
        bitmaps.mark(tables, &(0..old_size.max(disk_size)))?;
        let resized = match resizes {
            true => Some(bitmaps.prepare_resize(tables, disk_size)?),
            false => None,
        };
        let place = resized.as_ref().map(|resized| resized.place);
        // If this fails the header may or may not have been switched: counts that are too high are safe with either.
        let old = tables.switch_l1(l1, disk_size, place)?;
        self.size.store(disk_size, Ordering::Release);
        match resized {
            Some(resized) => bitmaps.shown(tables, resized)?,
            None => bitmaps.set_disk_size(disk_size),
        }
        tables.drop_tree(&old)?;
        tables.refresh_copied()?;
        bitmaps.flush(tables)
    }

    fn delete_snapshot(&self, tables: &mut Tables, table: &mut SnapshotTable, which: &str) -> Result<()> {
        let (index, snapshot) = find(&table.entries, &which.into())?;
        let (at, l1_size) = (snapshot.l1_table_offset, snapshot.l1_size);
        let l1 = tables.read_l1(at, l1_size, 0)?;
        tables.flush()?;
        let mut entries = table.entries.clone();
        entries.remove(index);
        table.replace(tables, entries)?;
        tables.fence.unprotect(at.get());
        tables.drop_tree(&l1)?;
        let clusters = (u64::from(l1_size) * 8).div_ceil(tables.geometry.cluster_size());
        tables.release(at.get() >> tables.geometry.cluster_bits().get(), clusters)?;
        tables.write_back(true)?;
        tables.refresh_copied()?;
        tables.write_back(true)
    }
}

impl Snapshots for Image {
    fn list(&self) -> Vec<SnapshotFacts> {
        self.snapshot_facts()
    }

    fn write_machine_state(&self, at: u64, bytes: &[u8]) -> Result<()> {
        if self.geometry.data_file() {
            return Err(refuse(SnapshotWriteError::DataFile));
        }
        let _flight = self.flights.hold(0..u64::MAX, Hold::Alone);
        let size = self.size.load(Ordering::Acquire);
        // It begins with the first L1 entry that the disk does not need.
        let base = self.geometry.l1_start(self.geometry.l1_entries(size));
        let start = base.saturating_add(at);
        let end = start.saturating_add(bytes.len() as u64);
        let entries = self.geometry.l1_entries(end.get());
        if entries > L1_BYTES_MAX / 8 {
            return Err(refuse(SnapshotWriteError::MachineState { end: end.since(base) }));
        }
        self.change(|tables| match tables.l1_len() < entries {
            true => tables.grow_l1(entries),
            false => Ok(()),
        })?;
        self.write_held(start, bytes, &Chain::default())
    }

    fn create(&self, new: &NewSnapshot) -> Result<SnapshotFacts> {
        if self.geometry.data_file() {
            return Err(refuse(SnapshotWriteError::DataFile));
        }
        if new.name.len() > NAME_MAX {
            return Err(refuse(SnapshotWriteError::Name(new.name.len())));
        }
        let _flight = self.flights.hold(0..u64::MAX, Hold::Alone);
        self.change_all(|tables, table, _| self.create_snapshot(tables, table, new))
    }

    fn apply(&self, which: &str) -> Result<()> {
        let _flight = self.flights.hold(0..u64::MAX, Hold::Alone);
        self.change_all(|tables, table, bitmaps| self.apply_snapshot(tables, table, bitmaps, which))
    }

    fn delete(&self, which: &str) -> Result<()> {
        let _flight = self.flights.hold(0..u64::MAX, Hold::Alone);
        self.change_all(|tables, table, _| self.delete_snapshot(tables, table, which))
    }
}
