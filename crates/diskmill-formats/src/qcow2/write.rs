//! A qcow2 image open for changing in place.
//!
//! Tables are looked up and changed under one lock, in memory; data is read and written without it. In between, the
//! guest clusters of a request are held in [`Flights`], so that requests for different clusters run side by side and
//! those for the same one after another.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use diskmill_core::{
    Amendment, BackingName, BitmapFacts, Bitmaps, Chain, DirtyRuns, Encoder, Error, ErrorKind, Extent, Facts,
    FileIndex, FilesMut, Format, GuestOffset, HostOffset, HostSpan, Job, Layer, LayerMut, OpenSpec, Repair,
    Reserve, Result, Secrets, SnapshotFacts, Snapshots, State as RunState, Storage, StorageMut, Stored,
    ZeroHow,
};

use super::bitmap::Store;
use super::crypto::{EncryptionError, Sealing};
use super::flight::{Flights, Hold};
use super::header::{Autoclear, Header, Incompatible, Version};
use super::layer::{data_index, decoders};
use super::map::{CompressedSpan, Geometry};
use super::slot::{Place, Slot};
use super::snapshot;
use super::snapshot::write::SnapshotTable;
use super::tables::{Reclaim, Tables, past_end};
use crate::codec::Decoders;

/// Where the header keeps its incompatible features.
const HEADER_INCOMPATIBLE_AT: usize = 72;
/// Where the header keeps its autoclear features.
const HEADER_AUTOCLEAR_AT: usize = 88;

/// Why an image cannot be written.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum WriteError {
    #[error("the image is marked corrupt; it cannot be written before it is repaired")]
    Corrupt,
    #[error("an earlier change of the header or the refcount table failed; the image must be opened again")]
    Adrift,
    #[error("the image was not closed properly, and it cannot be repaired")]
    Dirty,
    #[error("the refcount table has no clusters; the image cannot be written before it is repaired")]
    NoRefcounts,
    #[error("{len} bytes at {at:#x} are not within the disk of {size} bytes")]
    OutOfBounds { at: u64, len: u64, size: u64 },
    #[error(
        "a compressed unit is {len} bytes at {at:#x}, must be 1 to {max} bytes at a multiple of the cluster size"
    )]
    PackedUnit { at: u64, len: u64, max: u64 },
    #[error("compressed clusters are not supported with an external data file")]
    PackedInDataFile,
}

pub(super) fn refuse(kind: ErrorKind, error: WriteError) -> Error {
    Error::new(kind, error).format(Format::Qcow2)
}

#[derive(Debug)]
struct State {
    tables: Tables,
    snapshots: SnapshotTable,
    bitmaps: Store,
    incompatible: Incompatible,
}

/// A qcow2 image open for changing in place.
#[derive(Debug)]
pub(crate) struct Image {
    pub(super) facts: Facts,
    pub(super) geometry: Geometry,
    pub(super) decoders: Decoders,
    pub(super) sealing: Sealing,
    pub(super) secrets: Secrets,
    /// Whether the version is 3: it can be changed, the rest of `geometry` cannot.
    pub(super) is_v3: AtomicBool,
    /// Whether there is a backing image, as the header says.
    pub(super) backed: AtomicBool,
    /// Whether the external data file is a raw image on its own: if data is encrypted it is none, whatever is said.
    pub(super) raw_data_file: bool,
    pub(super) unmap: bool,
    readable: Vec<Arc<dyn Storage>>,
    /// Where guest data is.
    pub(super) data: Arc<dyn StorageMut>,
    data_index: FileIndex,
    pub(super) size: AtomicU64,
    state: Mutex<State>,
    pub(super) flights: Flights,
}

impl Image {
    /// Opens the image with header `header`.
    ///
    /// An image that was not closed properly is repaired first. Bits for readers that do not know them are cleared at
    /// once. The dirty bit is never set: with lazy refcounts the
    /// order of writes is kept all the same, so that there is nothing to repair after a power cut.
    pub(crate) fn open(header: &Header, facts: Facts, files: FilesMut, how: &OpenSpec) -> Result<Self> {
        if header.incompatible.has(Incompatible::CORRUPT) {
            return Err(refuse(ErrorKind::Corrupt, WriteError::Corrupt));
        }
        if header.incompatible.has(Incompatible::DIRTY) {
            // Whoever wrote it last put refcounts off.
            let report = super::check::repair::run(header, &files, how, Repair::All, Job::silent())?;
            if report.check_errors + report.corruptions > 0 {
                return Err(refuse(ErrorKind::Corrupt, WriteError::Dirty));
            }
            let main = files
                .first()
                .ok_or_else(|| Error::new(ErrorKind::Usage, "an image needs a file"))?;
            let repaired = super::read_header(main.1.as_ref())?;
            return Self::open(&repaired, facts, files, how);
        }
        if header.refcount_table_clusters == 0 {
            return Err(refuse(ErrorKind::Corrupt, WriteError::NoRefcounts));
        }
        let readable: Vec<Arc<dyn Storage>> = files
            .iter()
            .map(|(_, file)| Arc::clone(file) as Arc<dyn Storage>)
            .collect();
        let data_index = data_index(header, files.iter().map(|(role, _)| *role))?;
        let mut files = files.into_iter().map(|(_, file)| file);
        let main = files
            .next()
            .ok_or_else(|| Error::new(ErrorKind::Usage, "an image needs a file"))?;
        let geometry = header.geometry();
        let data_file = match usize::from(data_index.0).checked_sub(1) {
            None => None,
            Some(index) => files.nth(index),
        };
        let data = data_file.clone().unwrap_or_else(|| Arc::clone(&main));
        let (snapshots, snapshots_end) = snapshot::read_table(main.as_ref(), header, &how.limits)?;
        let sealing = Sealing::of(header, main.as_ref(), how)?;
        let mut tables = Tables::load(header, main, data_file, how.unmap)?;
        let table_at = header.snapshots_offset;
        let bytes = if snapshots.is_empty() {
            0
        } else {
            snapshots_end.since(table_at)
        };
        let snapshots = SnapshotTable::load(&mut tables, snapshots, table_at, bytes);
        let bitmaps = Store::load(&mut tables, header, &how.limits)?;
        let known = header.autoclear.bits() & !header.autoclear.unknown().bits();
        if known != header.autoclear.bits() {
            tables.write_header(HEADER_AUTOCLEAR_AT, &known.to_be_bytes())?;
        }
        let incompatible = header.incompatible;
        Ok(Self {
            facts,
            geometry,
            decoders: decoders(header.compression_type, geometry),
            is_v3: AtomicBool::new(geometry.version() == Version::V3),
            backed: AtomicBool::new(header.backing_name.is_some()),
            raw_data_file: geometry.data_file()
                && header.autoclear.has(Autoclear::RAW_DATA_FILE)
                && !sealing.is_encrypted(),
            sealing,
            secrets: how.secrets.clone(),
            unmap: how.unmap,
            readable,
            data,
            data_index,
            size: AtomicU64::new(header.virtual_size()),
            state: Mutex::new(State {
                tables,
                snapshots,
                bitmaps,
                incompatible,
            }),
            flights: Flights::default(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic under the lock is a bug that tests would show; the caches are still coherent, since a table is
        // marked as changed in the step that changes it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks at the tables. Contradictions found mark the image as corrupt.
    pub(super) fn look<T>(&self, look: impl FnOnce(&mut Tables) -> Result<T>) -> Result<T> {
        let mut state = self.lock();
        let result = look(&mut state.tables);
        self.notice(&mut state, result)
    }

    /// Changes the tables, unless the image is corrupt. Contradictions found mark it as corrupt.
    pub(super) fn change<T>(&self, change: impl FnOnce(&mut Tables) -> Result<T>) -> Result<T> {
        self.change_all(|tables, _, _| change(tables))
    }

    /// Changes the tables and the bitmaps, unless the image is corrupt.
    pub(super) fn with_bitmaps<T>(
        &self,
        change: impl FnOnce(&mut Tables, &mut Store) -> Result<T>,
    ) -> Result<T> {
        self.change_all(|tables, _, bitmaps| change(tables, bitmaps))
    }

    /// Notes in the bitmaps that guest bytes `range`, whose clusters are held, are about to be changed.
    pub(super) fn mark(&self, range: &Range<u64>) -> Result<()> {
        self.with_bitmaps(|tables, bitmaps| bitmaps.mark(tables, range))
    }

    /// Changes the tables, the snapshot table and the bitmaps, unless the image is corrupt.
    pub(super) fn change_all<T>(
        &self,
        change: impl FnOnce(&mut Tables, &mut SnapshotTable, &mut Store) -> Result<T>,
    ) -> Result<T> {
        let mut state = self.lock();
        if state.incompatible.has(Incompatible::CORRUPT) {
            return Err(refuse(ErrorKind::Corrupt, WriteError::Corrupt));
        }
        if state.tables.fence.is_adrift() {
            return Err(refuse(ErrorKind::Io, WriteError::Adrift));
        }
        let State {
            tables,
            snapshots,
            bitmaps,
            ..
        } = &mut *state;
        let result = change(tables, snapshots, bitmaps);
        self.notice(&mut state, result)
    }

    /// The version, as it is now.
    pub(super) fn version(&self) -> Version {
        match self.is_v3.load(Ordering::Acquire) {
            true => Version::V3,
            false => Version::V2,
        }
    }

    /// Whether there is a backing image, as the header says.
    pub(super) fn is_backed(&self) -> bool {
        self.backed.load(Ordering::Acquire)
    }

    /// The internal snapshots.
    pub(super) fn snapshot_facts(&self) -> Vec<SnapshotFacts> {
        let state = self.lock();
        state
            .snapshots
            .entries
            .iter()
            .map(|snapshot| snapshot.facts.clone())
            .collect()
    }

    /// The dirty bitmaps.
    pub(super) fn bitmap_facts(&self) -> Vec<BitmapFacts> {
        self.lock().bitmaps.facts()
    }

    /// Marks the image as corrupt if `result` says that it contradicts itself.
    fn notice<T>(&self, state: &mut State, result: Result<T>) -> Result<T> {
        if let Err(error) = &result
            && error.kind() == ErrorKind::Corrupt
        {
            self.mark_corrupt(state);
        }
        result.map_err(|error| error.format(Format::Qcow2))
    }

    /// Sets the corrupt bit, so that nothing is written before a repair. Version 2 has no such bit: there it holds
    /// until the image is closed.
    fn mark_corrupt(&self, state: &mut State) {
        if state.incompatible.has(Incompatible::CORRUPT) {
            return;
        }
        state.incompatible = state.incompatible.with(Incompatible::CORRUPT, true);
        if self.version() == Version::V3 {
            let bits = state.incompatible.bits().to_be_bytes();
            // The caller gets the contradiction as its error; that the mark could not be set adds nothing.
            let _ = state.tables.write_header(HEADER_INCOMPATIBLE_AT, &bits);
        }
    }

    /// Fails unless `len` bytes at `at` are within the disk.
    pub(super) fn within(&self, at: GuestOffset, len: u64) -> Result<()> {
        let size = self.size.load(Ordering::Acquire);
        match at.get().checked_add(len) {
            Some(end) if end <= size => Ok(()),
            _ => Err(refuse(
                ErrorKind::Usage,
                WriteError::OutOfBounds {
                    at: at.get(),
                    len,
                    size,
                },
            )),
        }
    }

    /// The guest clusters that `range` touches.
    pub(super) fn clusters(&self, range: &Range<u64>) -> Range<u64> {
        let bits = self.geometry.cluster_bits().get();
        range.start >> bits..range.end.div_ceil(1 << bits)
    }

    /// What the bytes from `at` are, and how many are alike: at most up to `end`.
    pub(super) fn run(&self, tables: &mut Tables, at: GuestOffset, end: u64) -> Result<Extent> {
        let geometry = self.geometry;
        let first = self.piece(tables, at, end)?;
        let mut len = first.len;
        let table_end = at
            .align_down(geometry.l1_entry_covers())
            .saturating_add(geometry.l1_entry_covers());
        while at.get() + len < end {
            let next_at = at.plus(len)?;
            if next_at >= table_end && first.state != RunState::Absent {
                break;
            }
            if next_at >= table_end && tables.has_l2(next_at)? {
                break;
            }
            let next = self.piece(tables, next_at, end)?;
            if !follows(first.state, len, next.state) {
                break;
            }
            len += next.len;
        }
        let state = match first.state {
            RunState::Data(span) => {
                len = self.clip(span.at, len)?;
                RunState::Data(HostSpan { len, ..span })
            }
            RunState::Zero { reserved: Some(span) } => RunState::Zero {
                reserved: Some(HostSpan { len, ..span }),
            },
            other => other,
        };
        Ok(Extent { len, state })
    }

    /// Cuts a run of data behind the last cluster of the file; fails if it begins there. The last cluster may not have
    /// been written to its end: the rest of it reads as zeros.
    fn clip(&self, host: HostOffset, len: u64) -> Result<u64> {
        let cluster = self.geometry.cluster_size();
        let file_len = self.data.len()?;
        let room = file_len.next_multiple_of(cluster).saturating_sub(host.get());
        if room == 0 {
            return Err(past_end("a cluster", host.get(), file_len));
        }
        Ok(len.min(room))
    }

    /// The state of the bytes from `at` up to the end of their cluster, or less.
    fn piece(&self, tables: &mut Tables, at: GuestOffset, end: u64) -> Result<Extent> {
        let geometry = self.geometry;
        if !tables.has_l2(at)? {
            let covers = geometry.l1_entry_covers();
            return Ok(Extent {
                len: (covers - at.within(covers)).min(end - at.get()),
                state: RunState::Absent,
            });
        }
        let slot = tables.slot(at)?;
        let inside = at.within(geometry.cluster_size());
        if let Some(CompressedSpan { at: host, len }) = slot.packed(geometry) {
            return Ok(Extent {
                len: (geometry.cluster_size() - inside).min(end - at.get()),
                state: RunState::Compressed(HostSpan {
                    file: FileIndex::MAIN,
                    at: host,
                    len,
                }),
            });
        }
        let first = geometry.subcluster(at);
        let kind = |index: u32| (slot.stored >> index & 1, slot.zero >> index & 1);
        let count = super::slot::all(geometry).count_ones();
        let last = (first + 1..count)
            .find(|index| kind(*index) != kind(first))
            .unwrap_or(count);
        let run_end = u64::from(last) << geometry.granule_bits();
        let len = (run_end - inside).min(end - at.get());
        let span = match slot.place {
            Place::At { host, .. } => Some(HostSpan {
                file: self.data_index,
                at: host.plus(inside)?,
                len,
            }),
            _ => None,
        };
        let state = match (kind(first), span) {
            ((1, _), Some(span)) => RunState::Data(span),
            ((_, 1), reserved) => RunState::Zero { reserved },
            _ => RunState::Absent,
        };
        Ok(Extent { len, state })
    }

    /// Reads guest bytes from `at` on that are stored at `host`.
    pub(super) fn read_host(&self, at: GuestOffset, host: HostOffset, buf: &mut [u8]) -> Result<()> {
        // A cluster at the end of the file may not have been written to its end.
        let read = |host, buf: &mut [u8]| self.data.read_padded(host, buf);
        self.sealing.read(at, host, buf, read)
    }

    /// Reads what the guest sees. Its clusters are held. What is absent comes from `below`.
    pub(super) fn read_held(&self, at: GuestOffset, buf: &mut [u8], below: &Chain) -> Result<()> {
        let end = at.plus(buf.len() as u64)?.get();
        let (mut at, mut rest) = (at, buf);
        while !rest.is_empty() {
            let run = self.look(|tables| self.run(tables, at, end))?;
            let len = usize::try_from(run.len).unwrap_or(usize::MAX).min(rest.len());
            let (now, later) = rest.split_at_mut(len);
            match run.state {
                RunState::Data(span) => self.read_host(at, span.at, now)?,
                RunState::Compressed(span) => {
                    let whole = self.unpack(CompressedSpan {
                        at: span.at,
                        len: span.len,
                    })?;
                    let inside =
                        usize::try_from(at.within(self.geometry.cluster_size())).unwrap_or(usize::MAX);
                    match whole.get(inside..).and_then(|part| part.get(..len)) {
                        Some(part) => now.copy_from_slice(part),
                        None => now.fill(0),
                    }
                }
                RunState::Absent => below.read_at(at, now)?,
                _ => now.fill(0),
            }
            at = at.plus(run.len)?;
            rest = later;
        }
        Ok(())
    }

    /// Fails unless clusters can be stored compressed.
    fn may_pack(&self) -> Result<()> {
        if self.sealing.is_encrypted() {
            return Err(EncryptionError::Compressed.refuse());
        }
        if self.geometry.data_file() {
            return Err(refuse(ErrorKind::Unsupported, WriteError::PackedInDataFile));
        }
        Ok(())
    }

    /// Stores one compressed unit.
    fn write_packed(&self, at: GuestOffset, bytes: &[u8]) -> Result<()> {
        let cluster = self.geometry.cluster_size();
        let len = bytes.len() as u64;
        self.may_pack()?;
        if !at.is_aligned(cluster) || len == 0 || len >= cluster {
            return Err(refuse(
                ErrorKind::Usage,
                WriteError::PackedUnit {
                    at: at.get(),
                    len,
                    max: cluster - 1,
                },
            ));
        }
        self.within(at, 1)?;
        let _flight = self
            .flights
            .hold(self.clusters(&(at.get()..at.get() + 1)), Hold::Alone);
        self.mark(&(at.get()..at.saturating_add(cluster).get()))?;
        let entry = self.change(|tables| tables.allocate_packed(len))?;
        let slot = Slot {
            place: Place::Packed(entry),
            ..Slot::ABSENT
        };
        let stored = self
            .data
            .write_at(entry.span(self.geometry).at, bytes)
            .and_then(|()| {
                self.change(|tables| {
                    let old = tables.slot(at)?;
                    tables.set_slot(at, slot)?;
                    tables.drop_slot(old, Reclaim::Keep);
                    tables.settle_if_many()
                })
            });
        if stored.is_err() {
            // Nothing refers to it yet; if it cannot be given back it leaks.
            let _ = self.change(|tables| tables.release_slot(slot));
        }
        stored
    }
}

/// Whether a run of `len` bytes in `state` goes on with bytes in state `next`.
fn follows(state: RunState, len: u64, next: RunState) -> bool {
    let joins =
        |span: HostSpan, next: HostSpan| span.file == next.file && span.at.checked_add(len) == Some(next.at);
    match (state, next) {
        (RunState::Data(span), RunState::Data(next)) => joins(span, next),
        (RunState::Zero { reserved: Some(span) }, RunState::Zero { reserved: Some(next) }) => {
            joins(span, next)
        }
        (RunState::Zero { reserved: None }, RunState::Zero { reserved: None })
        | (RunState::Absent, RunState::Absent) => true,
        _ => false,
    }
}

impl Layer for Image {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn virtual_size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn map(&self, at: GuestOffset, max: u64) -> Result<Extent> {
        self.within(at, 1)?;
        let end = at.saturating_add(max.max(1)).get().min(self.virtual_size());
        let extent = self.look(|tables| self.run(tables, at, end))?;
        Ok(match extent.state {
            RunState::Data(span) if self.sealing.is_encrypted() => Extent {
                state: RunState::Encrypted(span),
                ..extent
            },
            _ => extent,
        })
    }

    fn read_at(&self, at: GuestOffset, buf: &mut [u8]) -> Result<()> {
        let end = at.plus(buf.len() as u64)?.get();
        self.within(at, buf.len() as u64)?;
        let _flight = self.flights.hold(self.clusters(&(at.get()..end)), Hold::Shared);
        self.read_held(at, buf, &Chain::default())
    }

    fn file(&self, index: FileIndex) -> Option<&Arc<dyn Storage>> {
        self.readable.get(usize::from(index.0))
    }

    fn dirty(&self, name: &str) -> Result<Box<dyn DirtyRuns>> {
        self.dirty_runs(name)
    }
}

impl LayerMut for Image {
    fn write_at(&self, at: GuestOffset, buf: &[u8], below: &Chain) -> Result<()> {
        self.within(at, buf.len() as u64)?;
        if buf.is_empty() {
            return Ok(());
        }
        let range = at.get()..at.get() + buf.len() as u64;
        let _flight = self.flights.hold(self.clusters(&range), Hold::Alone);
        self.mark(&range)?;
        self.write_held(at, buf, below)
    }

    fn write_encoded(&self, at: GuestOffset, unit: Stored<'_>, below: &Chain) -> Result<()> {
        match unit {
            Stored::Plain(bytes) => self.write_at(at, bytes, below),
            Stored::Packed(bytes) => self.write_packed(at, bytes),
        }
    }

    fn encoder(&self) -> Result<Box<dyn Encoder>> {
        self.may_pack()?;
        Ok(Box::new(self.decoders.encoder()?))
    }

    fn zero(&self, range: Range<GuestOffset>, how: ZeroHow, below: &Chain) -> Result<()> {
        self.within(range.start, range.end.since(range.start))?;
        let range = range.start.get()..range.end.get();
        if range.is_empty() {
            return Ok(());
        }
        let _flight = self.flights.hold(self.clusters(&range), Hold::Alone);
        self.mark(&range)?;
        self.zero_held(range, how, below)
    }

    fn discard(&self, range: Range<GuestOffset>) -> Result<()> {
        self.within(range.start, range.end.since(range.start))?;
        let range = range.start.get()..range.end.get();
        if range.is_empty() {
            return Ok(());
        }
        let _flight = self.flights.hold(self.clusters(&range), Hold::Alone);
        self.mark(&range)?;
        self.discard_held(range)
    }

    fn clear(&self) -> Result<()> {
        let _flight = self.flights.hold(0..u64::MAX, Hold::Alone);
        self.clear_held()
    }

    fn resize(&self, size: u64, below: &Chain) -> Result<()> {
        let _flight = self.flights.hold(0..u64::MAX, Hold::Alone);
        self.resize_held(size, below)
    }

    fn reserve(&self, range: Range<GuestOffset>, how: Reserve) -> Result<()> {
        self.within(range.start, range.end.since(range.start))?;
        let range = range.start.get()..range.end.get();
        if range.is_empty() {
            return Ok(());
        }
        let _flight = self.flights.hold(self.clusters(&range), Hold::Alone);
        self.reserve_held(range, how)
    }

    fn set_backing(&self, backing: Option<&BackingName>) -> Result<()> {
        self.change_backing(backing)
    }

    fn amend(&self, wish: &Amendment, below: &Chain, job: Job<'_>) -> Result<()> {
        self.amend_all(wish, below, job)
    }

    fn snapshots(&self) -> Option<&dyn Snapshots> {
        Some(self)
    }

    fn bitmaps(&self) -> Option<&dyn Bitmaps> {
        Some(self)
    }

    fn flush(&self) -> Result<()> {
        self.with_bitmaps(|tables, bitmaps| bitmaps.flush(tables))
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        let mut state = self.lock();
        let sound = !state.incompatible.has(Incompatible::CORRUPT) && !state.tables.fence.is_adrift();
        let State { tables, bitmaps, .. } = &mut *state;
        if sound && bitmaps.is_marked() {
            // Whoever needs to know has flushed. What fails here leaves bitmaps that say so themselves.
            let _ = bitmaps.flush(tables);
        } else if sound && tables.is_dirty() {
            // What is written here spares a leak, no more.
            let _ = tables.write_back(true);
        }
    }
}
