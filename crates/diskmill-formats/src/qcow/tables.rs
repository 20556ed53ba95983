//! The tables of an image that is being changed, and where its next cluster goes.
//!
//! Entries are changed in memory and reach the file in [`Tables::write_back`], in an order that no power cut can make
//! worse than a leak: clusters are durable before an L2 entry names them, and a new L2 table before the L1 table names
//! it. Nothing is ever given back, so that an old entry stays good until the new one is in its place.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

use diskmill_core::{Error, ErrorKind, Format, HostOffset, Job, OpenSpec, Result, Storage, StorageMut};

use super::create::full;
use super::header::Header;
use super::layer::{entry_kind, read_l1, table_place};
use super::layout::HEADER_LEN;
use super::map::{Geometry, L2Entry, MapError};
use crate::codec::PackedSpan;
use crate::tree::{self, Kind, up};

/// Bytes of tables held that have not changed, at most.
const HELD_BYTES: u64 = 16 << 20;
/// Bytes of changed tables from which on they are written back.
const MANY_BYTES: u64 = 4 << 20;

/// An image nobody knows the header of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("an earlier change of the header failed; the image must be opened again")]
struct Adrift;

/// Header and tables of an image that is being changed.
#[derive(Debug)]
pub(super) struct Tables {
    pub(super) file: Arc<dyn StorageMut>,
    pub(super) header: Header,
    pub(super) tree: tree::Geometry,
    /// Places of tables; 0 where there is none.
    pub(super) l1: Vec<u64>,
    /// Where the L1 table is that changes go to: the header's, but while that gives way to a new one.
    pub(super) l1_at: HostOffset,
    held: BTreeMap<usize, Arc<[u8]>>,
    /// Entries that have changed, by table: the first, and the one behind the last.
    dirty: BTreeMap<usize, Range<usize>>,
    /// Tables that the L1 table in the file does not name yet.
    unlisted: BTreeSet<usize>,
    /// The byte behind all that is given out.
    pub(super) next: u64,
    /// Header, name and tables: what they are by their first byte, and the byte behind the last.
    ranges: BTreeMap<u64, (u64, &'static str)>,
    /// Two of these in one place, if there are such: where, and which.
    pub(super) clash: Option<(u64, &'static str, &'static str)>,
    fixed_len: bool,
    /// Whether no entry names what lies from `next` on, where new clusters go.
    vetted: bool,
    adrift: bool,
}

impl Tables {
    /// Takes over an image whose tables do not contradict one another.
    pub(super) fn open(header: Header, file: Arc<dyn StorageMut>, how: &OpenSpec) -> Result<Self> {
        let mut tables = Self::open_any(header, file, how)?;
        for index in 0..tables.l1.len() {
            tables.place(index)?;
        }
        if let Some((at, what, other)) = tables.clash {
            return Err(MapError::Overlap { what, at, other }.into());
        }
        match tables.fixed_len {
            true => tables.next = tables.end_of_use()?,
            // That takes all tables, and whoever only overwrites does not need it.
            false => tables.vetted = false,
        }
        Ok(tables)
    }

    /// Takes over any image.
    pub(super) fn open_any(header: Header, file: Arc<dyn StorageMut>, how: &OpenSpec) -> Result<Self> {
        let l1 = read_l1(&header, file.as_ref() as &dyn Storage, how)?;
        let mut tables = Self {
            tree: header.geometry.tree(header.virtual_size()),
            l1_at: header.l1_table_offset,
            held: BTreeMap::new(),
            dirty: BTreeMap::new(),
            unlisted: BTreeSet::new(),
            // The file may end within its last cluster.
            next: up(file.len()?, header.geometry.cluster_size()),
            ranges: BTreeMap::new(),
            clash: None,
            fixed_len: file.hints().fixed_len,
            vetted: true,
            adrift: false,
            file,
            header,
            l1,
        };
        tables.find_ranges();
        Ok(tables)
    }

    pub(super) fn geometry(&self) -> Geometry {
        self.header.geometry
    }

    /// Finds the bytes that no cluster may be in.
    pub(super) fn find_ranges(&mut self) {
        let header = &self.header;
        let l1_end = self
            .l1_at
            .saturating_add((self.l1.len() as u64).saturating_mul(8));
        let mut ranges = vec![
            (0, HEADER_LEN, "the header"),
            (self.l1_at.get(), l1_end.get(), "the L1 table"),
        ];
        if let Some((at, len)) = header.backing {
            let end = at.saturating_add(len.into());
            ranges.push((at.get(), end.get(), "the name of the backing file"));
        }
        let len = header.geometry.l2_len();
        let places = self.l1.iter().filter(|entry| **entry != 0);
        ranges.extend(places.map(|at| (*at, at.saturating_add(len), "an L2 table")));
        ranges.sort_unstable();
        let mut pairs = ranges.iter().zip(ranges.iter().skip(1));
        let clash = pairs.find(|(one, next)| next.0 < one.1);
        self.clash = clash.map(|(one, next)| (next.0, next.2, one.2));
        self.ranges = ranges
            .into_iter()
            .map(|(start, end, what)| (start, (end, what)))
            .collect();
    }

    /// Whether any of `len` bytes at `at` is one of a table, the header or the name.
    pub(super) fn hits_tables(&self, at: u64, len: u64) -> bool {
        let before = self.ranges.range(..at.saturating_add(len)).next_back();
        before.is_some_and(|(_, (end, _))| *end > at)
    }

    /// The byte behind the last of these.
    fn ranges_end(&self) -> u64 {
        let ends = self.ranges.values().map(|(end, _)| *end);
        ends.max().unwrap_or(HEADER_LEN)
    }

    /// Where all ends that anything refers to: a device does not tell.
    fn end_of_use(&mut self) -> Result<u64> {
        let mut end = self.ranges_end();
        self.each_entry(Job::silent(), &mut |tables, _, _, entry| {
            let geometry = tables.geometry();
            let used = match entry.kind(geometry)? {
                Kind::Data(at) => at.saturating_add(geometry.cluster_size()),
                Kind::Packed(_) => entry.span(geometry).end(),
                Kind::Absent | Kind::Zero => HostOffset::ZERO,
            };
            end = end.max(used.get());
            Ok(())
        })?;
        Ok(end)
    }

    /// Calls `f` with every entry of a table there is that is not 0: with the table, and the place in it.
    pub(super) fn each_entry(
        &mut self,
        job: Job<'_>,
        f: &mut dyn FnMut(&Self, usize, usize, L2Entry) -> Result<()>,
    ) -> Result<()> {
        for index in 0..self.l1.len() {
            job.check()?;
            let Some(table) = self.table(index)? else {
                continue;
            };
            for (slot, entry) in table.as_chunks::<8>().0.iter().enumerate() {
                let entry = L2Entry(u64::from_be_bytes(*entry));
                if entry != L2Entry::ABSENT && self.is_on_disk(index, slot) {
                    f(self, index, slot, entry)?;
                }
            }
        }
        Ok(())
    }

    /// The byte of the disk that an entry is about.
    pub(super) fn guest(&self, index: usize, slot: usize) -> u64 {
        let covers = self.geometry().covers();
        let start = (index as u64).saturating_mul(covers);
        start.saturating_add((slot as u64).saturating_mul(self.geometry().cluster_size()))
    }

    fn is_on_disk(&self, index: usize, slot: usize) -> bool {
        self.guest(index, slot) < self.tree.disk
    }

    /// Fails once the header in the file is not known.
    pub(super) fn usable(&self) -> Result<()> {
        match self.adrift {
            true => Err(Error::new(ErrorKind::Io, Adrift).format(Format::Qcow)),
            false => Ok(()),
        }
    }

    /// From now on nobody knows which header the file has.
    pub(super) fn set_adrift(&mut self) {
        self.adrift = true;
    }

    fn place(&self, index: usize) -> Result<Option<HostOffset>> {
        let entry = self.l1.get(index).copied().unwrap_or(0);
        if self.unlisted.contains(&index) {
            return Ok(Some(HostOffset::new(entry)));
        }
        Ok(table_place(entry, self.geometry(), self.file.len()?)?)
    }

    /// The bytes of a table, if there is one.
    pub(super) fn table(&mut self, index: usize) -> Result<Option<Arc<[u8]>>> {
        if let Some(bytes) = self.held.get(&index) {
            return Ok(Some(Arc::clone(bytes)));
        }
        let Some(at) = self.place(index)? else {
            return Ok(None);
        };
        let most = HELD_BYTES / self.geometry().l2_len();
        if self.held.len() as u64 >= most {
            let dirty = &self.dirty;
            self.held.retain(|index, _| dirty.contains_key(index));
        }
        let mut bytes = vec![0; self.tree.table_len()];
        self.file.read_at(at, &mut bytes)?;
        let bytes: Arc<[u8]> = bytes.into();
        self.held.insert(index, Arc::clone(&bytes));
        Ok(Some(bytes))
    }

    /// The entry of the cluster of byte `at`, whatever it says.
    pub(super) fn entry(&mut self, at: u64) -> Result<L2Entry> {
        let (index, slot) = self.tree.locate(at);
        let table = self.table(index)?;
        let entries = table.as_deref().map_or(&[][..], |table| table.as_chunks::<8>().0);
        Ok(L2Entry(
            entries.get(slot).map_or(0, |entry| u64::from_be_bytes(*entry)),
        ))
    }

    /// What the entry of the cluster of byte `at` says, if it can be believed.
    pub(super) fn look(&mut self, at: u64) -> Result<(L2Entry, Kind)> {
        let entry = self.entry(at)?;
        let kind = entry.kind(self.geometry())?;
        if let Kind::Data(host) = kind {
            self.check_cluster(host.get())?;
        }
        Ok((entry, kind))
    }

    /// Fails unless a data cluster lies in the file, and apart from the tables.
    pub(super) fn check_cluster(&self, at: u64) -> Result<(), MapError> {
        let cluster_size = self.geometry().cluster_size();
        if at.checked_add(cluster_size).is_none_or(|end| end > self.next) {
            return Err(MapError::PastEnd {
                what: "a data cluster",
                at,
                len: cluster_size,
                file_len: self.next,
            });
        }
        match self.hits_tables(at, cluster_size) {
            true => Err(MapError::InTables(at)),
            false => Ok(()),
        }
    }

    /// The run of one kind from `at` on, at most `max` bytes, all on the disk.
    pub(super) fn run(&mut self, at: u64, max: u64) -> Result<(Kind, u64)> {
        let (tree, geometry) = (self.tree, self.geometry());
        let kind = |entry: &[u8]| entry_kind(entry, geometry);
        let (kind, len) = tree::scan(&tree, at, max, &mut |index| self.table(index), &kind)?;
        let Kind::Data(host) = kind else {
            return Ok((kind, len));
        };
        let cluster_size = geometry.cluster_size();
        let into = at % cluster_size;
        let first = host.get().saturating_sub(into);
        self.check_cluster(first)?;
        // As far as the clusters are good.
        let mut good = cluster_size.saturating_sub(into);
        while good < len
            && self
                .check_cluster(first.saturating_add(into).saturating_add(good))
                .is_ok()
        {
            good = good.saturating_add(cluster_size);
        }
        Ok((kind, len.min(good)))
    }

    /// Fails if an entry names a cluster behind the end of the file, as in one that was cut short: what is put there
    /// would become a part of two places of the disk.
    fn vet(&mut self) -> Result<()> {
        if self.vetted {
            return Ok(());
        }
        self.each_entry(Job::silent(), &mut |tables, index, slot, entry| {
            let geometry = tables.geometry();
            let (at, end) = match entry.kind(geometry) {
                Ok(Kind::Data(at)) => (at, at.saturating_add(geometry.cluster_size())),
                Ok(Kind::Packed(at)) => (at, entry.span(geometry).end()),
                // Whoever comes to it will be told.
                _ => return Ok(()),
            };
            match end.get() > tables.next {
                true => Err(MapError::Dangling {
                    guest: tables.guest(index, slot),
                    at: at.get(),
                    file_len: tables.next,
                }
                .into()),
                false => Ok(()),
            }
        })?;
        self.vetted = true;
        Ok(())
    }

    /// Gives out `len` bytes at a multiple of `align`.
    fn take(&mut self, len: u64, align: u64) -> Result<HostOffset> {
        self.usable()?;
        self.vet()?;
        let at = up(self.next, align);
        let end = at.saturating_add(len);
        if self.fixed_len && end > self.file.len()? {
            return Err(full(self.file.len()?, end));
        }
        if end > i64::MAX.unsigned_abs() {
            return Err(full(i64::MAX.unsigned_abs(), end));
        }
        self.next = end;
        Ok(HostOffset::new(at))
    }

    /// Gives out `count` clusters one behind the other.
    pub(super) fn take_clusters(&mut self, count: u64) -> Result<HostOffset> {
        let cluster_size = self.geometry().cluster_size();
        self.take(cluster_size.saturating_mul(count), cluster_size)
    }

    /// Gives out `len` bytes, less than a cluster, for a compressed one: the entry that says so.
    pub(super) fn take_packed(&mut self, len: u64) -> Result<L2Entry> {
        let at = self.take(len, 1)?;
        Ok(L2Entry::packed(PackedSpan { at, len }, self.geometry())?)
    }

    /// Gives out bytes for something that is not a cluster; nobody knows of it yet.
    pub(super) fn take_bytes(&mut self, len: u64) -> Result<HostOffset> {
        self.take(len, self.geometry().cluster_size())
    }

    /// Sees to it that there is a table for byte `at`, one whose entries no power cut can tear.
    pub(super) fn demand_table(&mut self, at: u64) -> Result<()> {
        let (index, _) = self.tree.locate(at);
        let old = match self.place(index)? {
            Some(place) if place.is_aligned(8) => return Ok(()),
            Some(_) => self.table(index)?,
            None => None,
        };
        let place = self.take_bytes(self.geometry().l2_len())?;
        let Some(entry) = self.l1.get_mut(index) else {
            return Err(Error::bare(ErrorKind::Usage).format(Format::Qcow));
        };
        *entry = place.get();
        let len = self.tree.table_len();
        self.held
            .insert(index, old.unwrap_or_else(|| vec![0; len].into()));
        self.dirty.insert(index, 0..len / 8);
        self.unlisted.insert(index);
        let end = place.plus(self.geometry().l2_len())?;
        self.ranges.insert(place.get(), (end.get(), "an L2 table"));
        Ok(())
    }

    /// Changes the entry of the cluster of byte `at`.
    pub(super) fn set(&mut self, at: u64, entry: L2Entry) -> Result<()> {
        self.demand_table(at)?;
        let (index, slot) = self.tree.locate(at);
        self.table(index)?;
        if let Some(bytes) = self.held.get_mut(&index)
            && let Some(place) = Arc::make_mut(bytes).as_chunks_mut::<8>().0.get_mut(slot)
        {
            *place = entry.0.to_be_bytes();
            let end = slot.saturating_add(1);
            let changed = self.dirty.entry(index).or_insert(slot..end);
            *changed = changed.start.min(slot)..changed.end.max(end);
        }
        Ok(())
    }

    /// Gives up a table that is not in the file.
    pub(super) fn drop_table(&mut self, index: usize) -> Result<()> {
        if let Some(entry) = self.l1.get_mut(index) {
            *entry = 0;
            let at = self.l1_at.plus((index as u64).saturating_mul(8))?;
            self.file.write_at(at, &[0; 8])?;
            self.file.sync()?;
        }
        self.find_ranges();
        Ok(())
    }

    /// Whether something waits to be written.
    pub(super) fn is_dirty(&self) -> bool {
        !self.dirty.is_empty()
    }

    /// Writes back if much waits.
    pub(super) fn relieve(&mut self) -> Result<()> {
        let most = MANY_BYTES / self.geometry().l2_len();
        match self.dirty.len() as u64 >= most {
            true => self.write_back(),
            false => Ok(()),
        }
    }

    /// Writes the changed entries, after what they rely on is durable. They themselves are not yet, on return.
    pub(super) fn write_back(&mut self) -> Result<()> {
        self.usable()?;
        if self.dirty.is_empty() {
            return Ok(());
        }
        self.file.sync()?;
        for (index, changed) in &self.dirty {
            let entry = self.l1.get(*index).copied().unwrap_or(0);
            let first = changed.start.saturating_mul(8);
            let part = self.held.get(index).and_then(|bytes| bytes.get(first..));
            let len = changed.len().saturating_mul(8);
            if let Some(part) = part.and_then(|part| part.get(..len)) {
                let at = HostOffset::new(entry).plus(first as u64)?;
                self.file.write_at(at, part)?;
            }
        }
        if !self.unlisted.is_empty() {
            self.file.sync()?;
            if !self.l1_at.is_aligned(8) {
                // Its entries could be torn: it moves, once.
                self.move_l1()?;
                self.header.l1_table_offset = self.l1_at;
                self.switch_header()?;
            }
            for index in &self.unlisted {
                let at = self.l1_at.plus((*index as u64).saturating_mul(8))?;
                let entry = self.l1.get(*index).copied().unwrap_or(0);
                self.file.write_at(at, &entry.to_be_bytes())?;
            }
        }
        self.dirty.clear();
        self.unlisted.clear();
        Ok(())
    }

    /// Writes the L1 table to a new place, where changes go to from now on. The header does not name it yet.
    pub(super) fn move_l1(&mut self) -> Result<()> {
        let len = (self.l1.len() as u64).saturating_mul(8);
        let at = self.take_bytes(len)?;
        let bytes: Vec<u8> = self.l1.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        self.file.write_at(at, &bytes)?;
        self.file.sync()?;
        self.l1_at = at;
        self.find_ranges();
        Ok(())
    }

    /// Writes back, and returns when all of it is durable.
    pub(super) fn settle(&mut self) -> Result<()> {
        self.write_back()?;
        self.file.sync()
    }

    /// Makes a header durable, which is written at once: the host does not tear it. If that fails nobody knows which one
    /// the file has.
    pub(super) fn switch_header(&mut self) -> Result<()> {
        self.usable()?;
        let bytes = self.header.to_bytes();
        let switched = self
            .file
            .write_at(HostOffset::ZERO, &bytes)
            .and_then(|()| self.file.sync());
        self.adrift |= switched.is_err();
        self.find_ranges();
        switched
    }

    /// Forgets all data, and what is held of tables.
    pub(super) fn clear(&mut self) -> Result<()> {
        self.usable()?;
        self.held.clear();
        self.dirty.clear();
        self.unlisted.clear();
        self.l1.fill(0);
        let bytes = vec![0; self.l1.len().saturating_mul(8)];
        self.file.write_at(self.l1_at, &bytes)?;
        self.file.sync()?;
        self.find_ranges();
        let end = self.ranges_end();
        if !self.fixed_len {
            self.file.set_len(end)?;
        }
        self.vetted = true;
        self.next = end;
        Ok(())
    }

    /// Gives the disk another size in memory, and entries for it; the file does not say so yet.
    pub(super) fn resize(&mut self, size: u64) {
        let entries = usize::try_from(self.geometry().l1_entries(size)).unwrap_or(usize::MAX);
        self.tree.disk = size;
        self.l1.resize(entries, 0);
        self.held.retain(|index, _| *index < entries);
        self.find_ranges();
    }

    /// The file, for reading.
    pub(super) fn readable(&self) -> Arc<dyn Storage> {
        Arc::clone(&self.file) as Arc<dyn Storage>
    }
}
