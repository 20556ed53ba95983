//! The tables of a sparse extent that is written, and where its next grain goes.
//!
//! Entries are changed in memory and reach the file in [`Tables::write_back`], in an order that no power cut can make
//! worse than a leak: the grains are durable before a table names them, a new table is durable before the directory
//! names it. The redundant copy gets the same entries at the same time; whoever finds the two different may take either.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

use diskmill_core::{Error, ErrorKind, Format, HostOffset, Result, SECTOR, StorageMut, ZeroHow};

use super::create::full;
use super::header::Header;
use super::layout::COWD_HEADER_LEN;
use super::map::{Geometry, Kind, sector, up};
use super::sparse::{Dialect, is_hole, within, words};

/// Why an extent cannot be written. What it says of itself contradicts itself, and writing could lose data.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TableError {
    /// A grain where tables are.
    #[error("the grain at {0:#x} lies in the tables: the image must be repaired before it is written")]
    InTables(u64),
    /// Tables, directories, header and descriptor are not all in places of their own.
    #[error("grain tables and directories overlap: the image contradicts itself and is only read")]
    Overlap,
    /// Two entries with one grain.
    #[error("two entries name the grain at {0:#x}: the image must be repaired before it is written")]
    Shared(u64),
}

impl From<TableError> for Error {
    fn from(error: TableError) -> Self {
        Error::new(ErrorKind::Corrupt, error).format(Format::Vmdk)
    }
}

/// Tables held that have not changed, at most.
const HELD: usize = 4096;
/// Changed tables from which on somebody should write them back.
const MANY: usize = 512;

/// The tables of one extent.
#[derive(Debug)]
pub(super) struct Tables {
    pub(super) storage: Arc<dyn StorageMut>,
    pub(super) geometry: Geometry,
    pub(super) dialect: Dialect,
    /// Sectors of the tables; 0 where there is none.
    pub(super) directory: Vec<u32>,
    /// Where the directory is, in sectors.
    pub(super) directory_at: u64,
    /// The same of the redundant copy.
    pub(super) redundant: Option<(u64, Vec<u32>)>,
    /// Sectors in front of which no grain is.
    pub(super) overhead: u64,
    /// The sectors of header and descriptor.
    front: Vec<(u64, u64)>,
    held: BTreeMap<usize, Vec<u32>>,
    dirty: BTreeSet<usize>,
    /// Entries of the directories that are new.
    unlisted: BTreeSet<usize>,
    /// The sector where the next grain goes.
    pub(super) next: u64,
    /// Tables and directories, first sector and the one behind the last, merged and sorted.
    ranges: Vec<(u64, u64)>,
}

impl Tables {
    pub(super) fn new(
        storage: Arc<dyn StorageMut>,
        geometry: Geometry,
        dialect: Dialect,
        directory: (u64, Vec<u32>),
        redundant: Option<(u64, Vec<u32>)>,
        overhead: u64,
        front: Vec<(u64, u64)>,
    ) -> Result<Self> {
        let mut tables = Self {
            next: 0,
            storage,
            geometry,
            dialect,
            directory_at: directory.0,
            directory: directory.1,
            redundant,
            overhead,
            front,
            held: BTreeMap::new(),
            dirty: BTreeSet::new(),
            unlisted: BTreeSet::new(),
            ranges: Vec::new(),
        };
        tables.next = tables.grain_up(tables.storage.len()?.div_ceil(SECTOR));
        tables.find_ranges();
        Ok(tables)
    }

    fn grain_sectors(&self) -> u64 {
        (self.geometry.grain / SECTOR).max(1)
    }

    fn grain_up(&self, sector: u64) -> u64 {
        up(sector, self.grain_sectors())
    }

    /// Sectors of a table.
    fn table_sectors(&self) -> u64 {
        (self.geometry.table_len() as u64).div_ceil(SECTOR)
    }

    /// Finds the sectors no grain may be in.
    pub(super) fn find_ranges(&mut self) {
        let len = self.table_sectors();
        let mut ranges = vec![(0, self.overhead.max(1))];
        ranges.extend(self.front.iter().copied());
        let copies = [
            Some((self.directory_at, &self.directory)),
            self.redundant.as_ref().map(|(at, entries)| (*at, entries)),
        ];
        for (at, entries) in copies.into_iter().flatten() {
            let sectors = directory_sectors(entries.len());
            ranges.push((at, at.saturating_add(sectors)));
            let beyond = entries
                .iter()
                .map(|entry| u64::from(*entry))
                .filter(|entry| entry.saturating_add(len) > self.overhead);
            ranges.extend(beyond.map(|entry| (entry, entry.saturating_add(len))));
        }
        ranges.sort_unstable();
        ranges.dedup_by(|next, last| {
            let joins = next.0 <= last.1;
            if joins {
                last.1 = last.1.max(next.1);
            }
            joins
        });
        self.ranges = ranges;
    }

    /// The sector behind all tables.
    pub(super) fn tables_end(&self) -> u64 {
        self.ranges.last().map_or(self.overhead, |range| range.1)
    }

    /// Whether a grain at sector `at` has a sector of a table in it.
    pub(super) fn hits_tables(&self, at: u64) -> bool {
        let end = at.saturating_add(self.grain_sectors());
        let index = self.ranges.partition_point(|range| range.1 <= at);
        self.ranges.get(index).is_some_and(|range| range.0 < end)
    }

    /// The table's entries, read if they are not held; `None` where there is no table.
    fn load(&mut self, index: usize) -> Result<Option<&mut Vec<u32>>> {
        let at = match self.directory.get(index).copied() {
            None | Some(0) => return Ok(None),
            Some(at) => sector(at.into()),
        };
        if !self.held.contains_key(&index) {
            if self.held.len() >= HELD {
                let dirty = &self.dirty;
                self.held.retain(|index, _| dirty.contains(index));
            }
            let len = self.geometry.table_len();
            within("a grain table", at, len as u64, self.storage.len()?)?;
            let mut bytes = vec![0; len];
            self.storage.read_at(at, &mut bytes)?;
            self.held.insert(index, words(&bytes));
        }
        Ok(self.held.get_mut(&index))
    }

    /// Whether table `index` says nothing of the grain of byte `at`, which is one of its own, and of those behind.
    pub(super) fn is_blank(&mut self, index: usize, at: u64) -> Result<bool> {
        let Some(place) = self.directory.get(index).copied().filter(|place| *place != 0) else {
            return Ok(true);
        };
        if !self.held.contains_key(&index) && self.is_hole(place)? {
            return Ok(true);
        }
        let (_, slot) = self.geometry.locate(at);
        let entries = self.load(index)?;
        Ok(entries.is_none_or(|entries| entries.iter().skip(slot).all(|entry| *entry == 0)))
    }

    /// Whether the host knows the table at sector `place` as a hole.
    fn is_hole(&self, place: u32) -> Result<bool> {
        let len = self.geometry.table_len();
        is_hole(&*self.storage, sector(place.into()), len, self.storage.len()?)
    }

    /// The entries of table `index`, if it is there and says anything, as bytes of the file would say them.
    pub(super) fn bytes(&mut self, index: usize) -> Result<Option<Arc<[u8]>>> {
        match self.directory.get(index).copied() {
            Some(place) if place != 0 && !self.held.contains_key(&index) && self.is_hole(place)? => {
                return Ok(None);
            }
            _ => {}
        }
        Ok(self.load(index)?.map(|entries| to_bytes(entries).into()))
    }

    /// What the grain of byte `at` is, as its entry says.
    pub(super) fn kind(&mut self, at: u64) -> Result<(u32, Kind)> {
        let (index, slot) = self.geometry.locate(at);
        let dialect = self.dialect;
        let entry = self
            .load(index)?
            .and_then(|entries| entries.get(slot).copied())
            .unwrap_or(0);
        let kind = dialect.kind(&entry.to_le_bytes())?;
        if let Kind::Data(host) = kind
            && self.hits_tables(host.get() / SECTOR)
        {
            return Err(TableError::InTables(host.get()).into());
        }
        Ok((entry, kind))
    }

    /// Whether entries can say "zeros".
    pub(super) fn marks_zeros(&self) -> bool {
        matches!(self.dialect, Dialect::Hosted { zero_grain: true, .. })
    }

    /// Changes the entry of the grain of byte `at`.
    pub(super) fn set(&mut self, at: u64, entry: u32) -> Result<()> {
        let (index, slot) = self.geometry.locate(at);
        if self.load(index)?.is_none() {
            self.add_table(index)?;
        }
        if let Some(place) = self.load(index)?.and_then(|entries| entries.get_mut(slot)) {
            *place = entry;
        }
        self.dirty.insert(index);
        Ok(())
    }

    /// Gives table `index` a place, in both copies.
    fn add_table(&mut self, index: usize) -> Result<()> {
        let first = self.next;
        let end = self.place_tables(index..index.saturating_add(1))?;
        // A range for each table would be looked through for each that comes: they mostly follow one another.
        match self.ranges.last_mut() {
            Some(last) if last.1 == first => last.1 = end,
            Some(last) if last.1 > first => {
                self.ranges.push((first, end));
                self.ranges.sort_unstable();
            }
            _ => self.ranges.push((first, end)),
        }
        self.held.insert(index, vec![0; self.geometry.entries as usize]);
        self.dirty.insert(index);
        self.unlisted.insert(index);
        Ok(())
    }

    /// Puts new places behind the end into the directories, for all tables in `which`. Returns the sector behind them.
    fn place_tables(&mut self, which: Range<usize>) -> Result<u64> {
        let sectors = self.table_sectors();
        let copies: u64 = if self.redundant.is_some() { 2 } else { 1 };
        let count = which.len() as u64;
        let end = self
            .next
            .saturating_add(count.saturating_mul(copies).saturating_mul(sectors));
        u32::try_from(end).map_err(|_| full())?;
        // Each beside its copy, so that a disk that shrinks again leaves none behind the others.
        let lists = [
            Some(&mut self.directory),
            self.redundant.as_mut().map(|(_, list)| list),
        ];
        for (copy, list) in (0..).zip(lists.into_iter().flatten()) {
            let mut next = self.next.saturating_add(sectors.saturating_mul(copy));
            for entry in list.get_mut(which.clone()).unwrap_or_default() {
                *entry = u32::try_from(next).map_err(|_| full())?;
                next = next.saturating_add(sectors.saturating_mul(copies));
            }
        }
        self.next = self.grain_up(end);
        Ok(end)
    }

    /// Makes the directories `count` entries long, and gives all new tables places of nothing but zeros. Where the
    /// directories have no room to grow they move, and the header is to say so. All of that is durable then, and still
    /// means nothing: the header counts the entries.
    pub(super) fn add_empty(&mut self, count: usize) -> Result<()> {
        let known = self.directory.len();
        if count <= known {
            return Ok(());
        }
        let start = self.next;
        self.directory.resize(count, 0);
        if let Some((_, list)) = &mut self.redundant {
            list.resize(count, 0);
        }
        let need = directory_sectors(count);
        let moved = need > directory_sectors(known);
        if moved {
            self.directory_at = self.next;
            self.next = self.next.saturating_add(need);
            if let Some((at, _)) = &mut self.redundant {
                *at = self.next;
                self.next = self.next.saturating_add(need);
            }
            self.next = self.grain_up(self.next);
        }
        self.place_tables(known..count)?;
        let (from, to) = (sector(start), sector(self.next));
        let have = self.storage.len()?;
        if self.storage.hints().fixed_len && to.get() > have {
            let text = format!("the device has {have} bytes, the tables would end at {to}");
            return Err(Error::new(ErrorKind::NoSpace, text).format(Format::Vmdk));
        }
        if have > from.get() {
            let end = HostOffset::new(have.min(to.get()));
            self.storage.zero(from..end, ZeroHow::KeepAllocated)?;
        }
        if have < to.get() {
            self.storage.set_len(to.get())?;
        }
        self.storage.sync()?;
        let first = if moved { 0 } else { known };
        let copies = [
            Some((self.directory_at, &self.directory)),
            self.redundant.as_ref().map(|(at, list)| (*at, list)),
        ];
        for (at, list) in copies.into_iter().flatten() {
            let entries = list.get(first..).unwrap_or_default();
            let bytes = to_bytes(entries);
            let at = sector(at).plus((first as u64).saturating_mul(4))?;
            self.storage.write_at(at, &bytes)?;
        }
        self.storage.sync()?;
        self.find_ranges();
        Ok(())
    }

    /// Takes room for `count` grains that follow one another: the number of the first sector.
    pub(super) fn take(&mut self, count: u64) -> Result<u32> {
        let at = self.next;
        let end = at.saturating_add(count.saturating_mul(self.grain_sectors()));
        let number = u32::try_from(at).map_err(|_| full())?;
        u32::try_from(end).map_err(|_| full())?;
        let hints = self.storage.hints();
        if hints.fixed_len && end.saturating_mul(SECTOR) > self.storage.len()? {
            let text = "the device is full";
            return Err(Error::new(ErrorKind::NoSpace, text).format(Format::Vmdk));
        }
        self.next = end;
        Ok(number)
    }

    /// Whether so much has changed that it should be written back.
    pub(super) fn is_full(&self) -> bool {
        self.dirty.len() >= MANY
    }

    /// Makes the file say what the tables say. All grains must have been written before.
    pub(super) fn write_back(&mut self) -> Result<()> {
        self.storage.sync()?;
        if self.dirty.is_empty() {
            return Ok(());
        }
        if self.dialect == Dialect::Cowd {
            let next = u32::try_from(self.next).unwrap_or(u32::MAX);
            let at = HostOffset::new(super::layout::COWD_NEXT_FREE);
            self.storage.write_at(at, &next.to_le_bytes())?;
        }
        for index in &self.dirty {
            let Some(entries) = self.held.get(index) else {
                continue;
            };
            let bytes = to_bytes(entries);
            let copies = [
                self.directory.get(*index),
                self.redundant.as_ref().and_then(|(_, list)| list.get(*index)),
            ];
            for at in copies.into_iter().flatten().filter(|at| **at != 0) {
                self.storage.write_at(sector((*at).into()), &bytes)?;
            }
        }
        self.storage.sync()?;
        if !self.unlisted.is_empty() {
            for index in &self.unlisted {
                let into = (*index as u64).saturating_mul(4);
                let copies = [
                    Some((self.directory_at, &self.directory)),
                    self.redundant.as_ref().map(|(at, list)| (*at, list)),
                ];
                for (at, list) in copies.into_iter().flatten() {
                    if let Some(entry) = list.get(*index) {
                        self.storage
                            .write_at(sector(at).plus(into)?, &entry.to_le_bytes())?;
                    }
                }
            }
            self.storage.sync()?;
        }
        self.dirty.clear();
        self.unlisted.clear();
        Ok(())
    }

    /// Where the redundant copy of table `index` differs, [`write_back`](Self::write_back) will make it the same.
    pub(super) fn renew_copy(&mut self, index: usize) -> Result<()> {
        let copy = self.redundant.as_ref().and_then(|(_, list)| list.get(index));
        let Some(at) = copy.filter(|at| **at != 0).map(|at| sector((*at).into())) else {
            return Ok(());
        };
        let len = self.geometry.table_len();
        if is_hole(&*self.storage, at, len, self.storage.len()?)? && self.is_blank(index, 0)? {
            return Ok(());
        }
        let Some(entries) = self.load(index)?.map(|entries| to_bytes(entries)) else {
            return Ok(());
        };
        let mut bytes = vec![0; len];
        self.storage.read_at(at, &mut bytes)?;
        if bytes != entries {
            self.dirty.insert(index);
        }
        Ok(())
    }

    /// Fails if a grain is used twice or lies where tables are: whoever writes such an image may destroy it.
    pub(super) fn demand_sound(&mut self) -> Result<()> {
        let grain = self.grain_sectors();
        let sectors = directory_sectors(self.directory.len());
        let copy = self.redundant.as_ref();
        let places = [Some(self.directory_at), copy.map(|(at, _)| *at)];
        let mut fixed = self.front.clone();
        fixed.extend(
            places
                .into_iter()
                .flatten()
                .map(|at| (at, at.saturating_add(sectors))),
        );
        let lists = [Some(&self.directory), copy.map(|(_, list)| list)];
        if overlap(lists.into_iter().flatten(), self.table_sectors(), fixed) {
            return Err(TableError::Overlap.into());
        }
        let mut seen = Seen::new(self.storage.len()?.div_ceil(SECTOR));
        for index in 0..self.directory.len() {
            let at = match self.directory.get(index).copied() {
                None | Some(0) => continue,
                Some(at) if self.is_hole(at)? => continue,
                Some(at) => sector(at.into()),
            };
            let mut bytes = vec![0; self.geometry.table_len()];
            self.storage.read_at(at, &mut bytes)?;
            for entry in bytes.chunks_exact(4) {
                let Kind::Data(host) = self.dialect.kind(entry)? else {
                    continue;
                };
                let first = host.get() / SECTOR;
                if self.hits_tables(first) {
                    return Err(TableError::InTables(host.get()).into());
                }
                if !seen.add(first, grain) {
                    return Err(TableError::Shared(host.get()).into());
                }
            }
        }
        // What a cut has left at the end may be half a grain; the next one starts behind it.
        self.next = self.next.max(self.grain_up(seen.end));
        Ok(())
    }

    /// Forgets what is held, after the file was changed otherwise.
    pub(super) fn forget(&mut self) {
        self.held.clear();
        self.dirty.clear();
        self.unlisted.clear();
    }

    /// Fails unless the directory's tables are where a file of this length can have them.
    pub(super) fn demand_tables(&self) -> Result<()> {
        let len = self.storage.len()?;
        for list in [
            Some(&self.directory),
            self.redundant.as_ref().map(|(_, list)| list),
        ] {
            for at in list.into_iter().flatten().filter(|at| **at != 0) {
                let bytes = self.geometry.table_len() as u64;
                within("a grain table", sector((*at).into()), bytes, len)?;
            }
        }
        Ok(())
    }
}

/// Entries as a file has them.
fn to_bytes(entries: &[u32]) -> Vec<u8> {
    entries.iter().flat_map(|entry| entry.to_le_bytes()).collect()
}

/// Sectors of a directory.
fn directory_sectors(entries: usize) -> u64 {
    (entries as u64).saturating_mul(4).div_ceil(SECTOR)
}

/// The sectors of the header and of the descriptor behind it.
pub(super) fn front(header: Option<&Header>) -> Vec<(u64, u64)> {
    match header {
        None => vec![(0, COWD_HEADER_LEN / SECTOR)],
        Some(header) => {
            let text = header.descriptor.map(|(at, len)| (at, at.saturating_add(len)));
            std::iter::once((0, 1)).chain(text).collect()
        }
    }
}

/// Whether two tables of `len` sectors, or a table and one of the ranges in `fixed`, or two of these, have a sector in
/// common.
pub(super) fn overlap<'a>(
    lists: impl Iterator<Item = &'a Vec<u32>>,
    len: u64,
    mut fixed: Vec<(u64, u64)>,
) -> bool {
    let mut tables: Vec<u32> = lists.flatten().copied().filter(|at| *at != 0).collect();
    tables.sort_unstable();
    let near = |pair: &[u32]| match pair {
        [first, next] => u64::from(*next) < u64::from(*first).saturating_add(len),
        _ => false,
    };
    if tables.windows(2).any(near) {
        return true;
    }
    fixed.sort_unstable();
    let meet = |pair: &[(u64, u64)]| matches!(pair, [first, next] if next.0 < first.1);
    fixed.windows(2).any(meet)
        || fixed.iter().any(|(start, end)| {
            let first = tables.partition_point(|at| u64::from(*at).saturating_add(len) <= *start);
            tables.get(first).is_some_and(|at| u64::from(*at) < *end)
        })
}

/// Sectors that are in use, in runs: adjoining grains are one.
#[derive(Debug)]
pub(super) struct Seen {
    /// A bit for each 8 sectors, the smallest grain there is but for those that are less.
    bits: Vec<u64>,
    small: BTreeSet<u64>,
    pub(super) end: u64,
}

/// Sectors a bit stands for.
const STEP: u64 = 8;

impl Seen {
    pub(super) fn new(sectors: u64) -> Self {
        // Entries count sectors in 32 bits, so this is 64 MiB at most.
        let bits = sectors.min(1 << 32).div_ceil(STEP).div_ceil(64);
        Self {
            bits: vec![0; usize::try_from(bits).unwrap_or(0)],
            small: BTreeSet::new(),
            end: 0,
        }
    }

    /// Adds a grain of `len` sectors at `at`; false if some of it was there.
    pub(super) fn add(&mut self, at: u64, len: u64) -> bool {
        self.end = self.end.max(at.saturating_add(len));
        if len < STEP || !at.is_multiple_of(STEP) {
            // Odd places are rare, and what they overlap shows if they are exactly the same.
            return self.small.insert(at);
        }
        let mut new = true;
        for step in at / STEP..at.saturating_add(len) / STEP {
            let slot = usize::try_from(step / 64).unwrap_or(usize::MAX);
            if let Some(word) = self.bits.get_mut(slot) {
                let bit = 1_u64 << (step % 64);
                new &= *word & bit == 0;
                *word |= bit;
            }
        }
        new
    }
}
