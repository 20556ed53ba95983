//! Changing an image in place.
//!
//! Tables are looked up and changed under one lock, in memory; data is read and written without it. In between, the
//! clusters of a request are held in [`Flights`], so that requests for different clusters run side by side. An entry in
//! the file names a new cluster only once that is durable: see [`Tables`].
//!
//! A cluster that is written in part gets the rest of what it read as: from the image below, from the compressed cluster
//! in its place, or zeros. That holds for clusters of any size, also where QEMU leaves zeros in place of what is below.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use diskmill_core::{
    BackingName, Chain, Encoder, Error, ErrorKind, Extent, Facts, FileIndex, Format, GuestOffset, HostOffset,
    HostSpan, Layer, LayerMut, OpenSpec, Result, SECTOR, State, Storage, StorageMut, Stored, ZeroHow,
};

use super::header::Header;
use super::key::{Key, refuse};
use super::layer::{decoders, read_data};
use super::map::{Geometry, L2Entry};
use super::options::check_name;
use super::tables::Tables;
use crate::bounds::within;
use crate::codec::{Decoders, PackedSpan};
use crate::crypt::DataCipher;
use crate::flight::{Flight, Flights, Hold};
use crate::preallocation::zeros;
use crate::qcow2::EncryptionError;
use crate::tree::{Kind, reads_zero, up};

/// A qcow image open for changing in place.
#[derive(Debug)]
pub(super) struct Image {
    facts: Facts,
    pub(super) geometry: Geometry,
    readable: Arc<dyn Storage>,
    file: Arc<dyn StorageMut>,
    decoders: Decoders,
    key: Option<Key>,
    /// Whether there is a backing image, as the header says.
    backed: AtomicBool,
    unmap: bool,
    pub(super) size: AtomicU64,
    tables: Mutex<Tables>,
    pub(super) flights: Flights,
}

/// Bytes that are encrypted together on their way into the file.
const PIECE: usize = 1 << 20;

impl Image {
    pub(super) fn open(
        header: Header,
        facts: Facts,
        file: Arc<dyn StorageMut>,
        how: &OpenSpec,
    ) -> Result<Self> {
        let key = Key::of(header.crypt, how)?;
        let geometry = header.geometry;
        let tables = Tables::open(header, Arc::clone(&file), how)?;
        Ok(Self {
            backed: AtomicBool::new(facts.backing.is_some()),
            facts,
            geometry,
            readable: tables.readable(),
            file,
            decoders: decoders(geometry),
            key,
            unmap: how.unmap,
            size: AtomicU64::new(tables.tree.disk),
            tables: Mutex::new(tables),
            flights: Flights::default(),
        })
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Tables> {
        // A panic under the lock is a bug that tests would show; an entry is marked as changed in the step that
        // changes it.
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn cipher(&self) -> Result<Option<&DataCipher>> {
        let cipher = self.key.as_ref().map(Key::get).transpose()?;
        Ok(cipher.map(AsRef::as_ref))
    }

    /// Holds the clusters of `range`.
    fn hold(&self, range: &Range<u64>, hold: Hold) -> Flight<'_> {
        let cluster_size = self.geometry.cluster_size();
        let clusters = range.start / cluster_size..range.end.div_ceil(cluster_size);
        self.flights.hold(clusters, hold)
    }

    fn check_range(&self, range: &Range<GuestOffset>) -> Result<Range<u64>> {
        let size = self.size.load(Ordering::Acquire);
        within(range.start, range.end.since(range.start), size)?;
        Ok(range.start.get()..range.end.get())
    }

    /// What is below, unless the image hides it.
    fn shows<'a>(&self, below: &'a Chain) -> Option<&'a Chain> {
        let backed = self.backed.load(Ordering::Acquire);
        Some(below).filter(|below| backed && !below.is_empty())
    }

    /// Whether all of `range` reads as zeros if this image has nothing there.
    fn zero_below(&self, range: Range<u64>, below: &Chain) -> Result<bool> {
        match self.shows(below) {
            Some(below) => reads_zero(below, range),
            None => Ok(true),
        }
    }

    /// Writes data of the disk from `guest` on to `host`, whole sectors if it is encrypted.
    fn write_data(&self, host: HostOffset, guest: GuestOffset, bytes: &[u8]) -> Result<()> {
        let Some(cipher) = self.cipher()? else {
            return self.file.write_at(host, bytes);
        };
        let (mut host, mut guest) = (host, guest);
        for piece in bytes.chunks(PIECE) {
            let mut sealed = piece.to_vec();
            cipher.encrypt(guest, host, &mut sealed)?;
            self.file.write_at(host, &sealed)?;
            host = host.plus(piece.len() as u64)?;
            guest = guest.plus(piece.len() as u64)?;
        }
        Ok(())
    }

    /// Changes data of the disk from `guest` on that is at `host`, where the rest of its sectors is good.
    fn overwrite(&self, host: HostOffset, guest: GuestOffset, bytes: &[u8]) -> Result<()> {
        let (front, len) = (guest.within(SECTOR), bytes.len() as u64);
        if self.key.is_none() || (front == 0 && len.is_multiple_of(SECTOR)) {
            return self.write_data(host, guest, bytes);
        }
        let whole = up(front.saturating_add(len), SECTOR);
        let mut sectors = vec![0; usize::try_from(whole).unwrap_or(0)];
        let (guest, host) = (
            guest.align_down(SECTOR),
            HostOffset::new(host.get().saturating_sub(front)),
        );
        read_data(self.stored()?, self.cipher()?, host, guest, &mut sectors)?;
        put(&mut sectors, front, bytes);
        self.write_data(host, guest, &sectors)
    }

    /// Makes data of the disk from `guest` on that is at `host` zeros.
    pub(super) fn overwrite_zeros(
        &self,
        host: HostOffset,
        guest: GuestOffset,
        len: u64,
        how: ZeroHow,
    ) -> Result<()> {
        if self.key.is_none() {
            return self.file.zero(host..host.plus(len)?, how);
        }
        // A hole would read as garbage.
        let (mut host, mut guest, mut left) = (host, guest, len);
        while left > 0 {
            // Pieces end with sectors, but for the last.
            let rest = (zeros(left).len() as u64)
                .saturating_sub(guest.within(SECTOR))
                .max(1);
            let piece = zeros(left.min(rest));
            self.overwrite(host, guest, piece)?;
            let done = piece.len() as u64;
            host = host.plus(done)?;
            guest = guest.plus(done)?;
            left = left.saturating_sub(done);
        }
        Ok(())
    }

    /// The file, and where it ends.
    fn stored(&self) -> Result<(&dyn Storage, u64)> {
        Ok((self.readable.as_ref(), self.readable.len()?))
    }

    /// What the cluster of byte `start` reads as, which has no place of its own; behind the end of the disk it is zeros.
    fn read_cluster(&self, start: u64, below: &Chain) -> Result<Vec<u8>> {
        let mut whole = vec![0; usize::try_from(self.geometry.cluster_size()).unwrap_or(0)];
        let (entry, kind) = self.lock().look(start)?;
        match kind {
            Kind::Packed(_) => {
                let (file, file_len) = self.stored()?;
                let span = entry.span(self.geometry);
                self.decoders.read_unit(file, file_len, span, &mut whole)?;
            }
            Kind::Data(host) => {
                let cipher = self.cipher()?;
                read_data(self.stored()?, cipher, host, GuestOffset::new(start), &mut whole)?;
            }
            Kind::Absent | Kind::Zero => {
                if let Some(below) = self.shows(below) {
                    below.read_at(GuestOffset::new(start), &mut whole)?;
                }
            }
        }
        let left = self.size.load(Ordering::Acquire).saturating_sub(start);
        let shown = usize::try_from(left).unwrap_or(usize::MAX);
        if let Some(behind) = whole.get_mut(shown..) {
            behind.fill(0);
        }
        Ok(whole)
    }

    /// Gives the clusters of `range` new places one behind the other, as `fill` puts data there: given the place and its
    /// bytes. They are held alone, and in one table.
    fn store(&self, range: Range<u64>, fill: impl FnOnce(HostOffset, u64) -> Result<()>) -> Result<()> {
        let cluster_size = self.geometry.cluster_size();
        let count = up(range.end, cluster_size).saturating_sub(range.start) / cluster_size;
        let host = {
            let mut tables = self.lock();
            tables.demand_table(range.start)?;
            tables.take_clusters(count)?
        };
        fill(host, count.saturating_mul(cluster_size))?;
        let mut tables = self.lock();
        for index in 0..count {
            let into = index.saturating_mul(cluster_size);
            tables.set(range.start.saturating_add(into), L2Entry::data(host.plus(into)?))?;
        }
        tables.relieve()
    }

    /// Writes some of `buf` at `at`, as much as can be done at once: says how much. The clusters are held alone.
    fn write_some(&self, at: u64, buf: &[u8], below: &Chain) -> Result<usize> {
        let len = buf.len() as u64;
        let (cluster_size, covers) = (self.geometry.cluster_size(), self.geometry.covers());
        let (kind, run) = self.lock().run(at, len)?;
        if let Kind::Data(host) = kind {
            let now = part(buf, run);
            self.overwrite(host, GuestOffset::new(at), now)?;
            return Ok(now.len());
        }
        let into = at % cluster_size;
        let start = at.saturating_sub(into);
        let size = self.size.load(Ordering::Acquire);
        let end = at.saturating_add(len.min(run));
        // Whole clusters up to the end of the table; the last of the disk may be cut short.
        let whole_end = match end == size {
            true => end,
            false => end.saturating_sub(end % cluster_size),
        };
        let table_end = at.saturating_sub(at % covers).saturating_add(covers);
        let whole_end = whole_end.min(table_end);
        if into == 0 && whole_end > at {
            let now = part(buf, whole_end.saturating_sub(at));
            self.store(at..whole_end, |host, stored| {
                let whole = now.len() as u64;
                if whole == stored {
                    return self.write_data(host, GuestOffset::new(at), now);
                }
                let mut padded = now.to_vec();
                padded.resize(usize::try_from(stored).unwrap_or(padded.len()), 0);
                self.write_data(host, GuestOffset::new(at), &padded)
            })?;
            return Ok(now.len());
        }
        let now = part(buf, cluster_size.saturating_sub(into));
        let mut whole = self.read_cluster(start, below)?;
        put(&mut whole, into, now);
        self.store(start..start.saturating_add(cluster_size), |host, _| {
            self.write_data(host, GuestOffset::new(start), &whole)
        })?;
        Ok(now.len())
    }

    /// Makes `range`, whose clusters are held alone, zeros.
    pub(super) fn zero_held(&self, range: Range<u64>, how: ZeroHow, below: &Chain) -> Result<()> {
        let (cluster_size, covers) = (self.geometry.cluster_size(), self.geometry.covers());
        let size = self.lock().tree.disk;
        let mut at = range.start;
        while at < range.end {
            let (kind, run) = self.lock().run(at, range.end.saturating_sub(at))?;
            let run_end = at.saturating_add(run);
            if let Kind::Data(host) = kind {
                self.overwrite_zeros(host, GuestOffset::new(at), run, how)?;
                at = run_end;
                continue;
            }
            let into = at % cluster_size;
            let start = at.saturating_sub(into);
            let packed = matches!(kind, Kind::Packed(_));
            if !packed && self.zero_below(at..run_end, below)? {
                at = run_end;
                continue;
            }
            // What is not zeros by itself is made so cluster by cluster.
            let cluster_end = start.saturating_add(cluster_size).min(size);
            if into > 0 || range.end < cluster_end {
                let end = cluster_end.min(range.end);
                let zeros = zeros(end.saturating_sub(at));
                self.write_some(at, zeros, below)?;
                at = end;
                continue;
            }
            if self.zero_below(start..cluster_end, below)? {
                if packed {
                    self.lock().set(start, L2Entry::ABSENT)?;
                }
                at = cluster_end;
                continue;
            }
            let most = start.saturating_sub(start % covers).saturating_add(covers);
            let end = match run_end.min(range.end).min(most) {
                end if end == size => end,
                end => end.saturating_sub(end % cluster_size).max(cluster_end),
            };
            self.store(start..end, |host, stored| {
                let guest = GuestOffset::new(start);
                self.overwrite_zeros(host, guest, stored, ZeroHow::KeepAllocated)
            })?;
            at = end;
        }
        self.lock().relieve()
    }

    /// Stores a compressed cluster.
    fn write_packed(&self, at: GuestOffset, bytes: &[u8]) -> Result<()> {
        if self.key.is_some() {
            return Err(refuse(EncryptionError::Compressed));
        }
        let (len, cluster_size) = (bytes.len() as u64, self.geometry.cluster_size());
        let size = self.size.load(Ordering::Acquire);
        if !at.is_aligned(cluster_size) || at.get() >= size || !(1..cluster_size).contains(&len) {
            let text = format!(
                "a compressed cluster is {len} bytes at {at}, must be 1 to {} at a multiple of {cluster_size} \
                 within the disk of {size} bytes",
                cluster_size.saturating_sub(1)
            );
            return Err(Error::new(ErrorKind::Usage, text).format(Format::Qcow));
        }
        let _flight = self.hold(&(at.get()..at.get().saturating_add(1)), Hold::Alone);
        let entry = {
            let mut tables = self.lock();
            tables.look(at.get())?;
            tables.demand_table(at.get())?;
            tables.take_packed(len)?
        };
        let PackedSpan { at: host, .. } = entry.span(self.geometry);
        self.file.write_at(host, bytes)?;
        let mut tables = self.lock();
        tables.set(at.get(), entry)?;
        tables.relieve()
    }

    /// Puts the name of a backing file into the file, where nothing is; says where.
    fn put_name(tables: &mut Tables, name: &str) -> Result<(HostOffset, u32)> {
        check_name(name)?;
        let len = name.len() as u64;
        let at = tables.take_bytes(len)?;
        tables.file.write_at(at, name.as_bytes())?;
        tables.file.sync()?;
        Ok((at, u32::try_from(len).unwrap_or(u32::MAX)))
    }
}

/// The first `len` bytes of `buf`, or all.
fn part(buf: &[u8], len: u64) -> &[u8] {
    let len = usize::try_from(len).unwrap_or(usize::MAX);
    buf.get(..len).unwrap_or(buf)
}

/// Puts `bytes` into `whole` from byte `at` on.
pub(super) fn put(whole: &mut [u8], at: u64, bytes: &[u8]) {
    let at = usize::try_from(at).unwrap_or(usize::MAX);
    if let Some(place) = whole.get_mut(at..).and_then(|rest| rest.get_mut(..bytes.len())) {
        place.copy_from_slice(bytes);
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
        let size = self.virtual_size();
        if at.get() >= size || max == 0 {
            return Err(Error::new(
                ErrorKind::Usage,
                format!("{max} bytes at {at} are not within the disk of {size} bytes"),
            ));
        }
        let max = max.min(size.saturating_sub(at.get()));
        let mut tables = self.lock();
        let (kind, len) = tables.run(at.get(), max).map_err(|error| error.guest(at))?;
        let file = FileIndex::MAIN;
        let state = match kind {
            Kind::Absent | Kind::Zero => State::Absent,
            Kind::Data(at) if self.key.is_some() => State::Encrypted(HostSpan { file, at, len }),
            Kind::Data(at) => State::Data(HostSpan { file, at, len }),
            Kind::Packed(host) => State::Compressed(HostSpan {
                file,
                at: host,
                len: tables.look(at.get())?.0.span(self.geometry).len,
            }),
        };
        Ok(Extent { len, state })
    }

    fn read_at(&self, at: GuestOffset, buf: &mut [u8]) -> Result<()> {
        let end = at.plus(buf.len() as u64)?;
        let range = self.check_range(&(at..end))?;
        let _flight = self.hold(&range, Hold::Shared);
        let cluster_size = self.geometry.cluster_size();
        let mut at = at;
        let mut rest = buf;
        while !rest.is_empty() {
            let run = self.lock().run(at.get(), rest.len() as u64);
            let (kind, len) = run.map_err(|error| error.guest(at))?;
            let len = match kind {
                Kind::Packed(_) => len.min(cluster_size.saturating_sub(at.within(cluster_size))),
                _ => len,
            };
            let len = usize::try_from(len).unwrap_or(usize::MAX).min(rest.len());
            let (now, later) = rest.split_at_mut(len);
            match kind {
                Kind::Data(host) => {
                    let cipher = self.cipher()?;
                    read_data(self.stored()?, cipher, host, at, now).map_err(|error| error.guest(at))?;
                }
                Kind::Packed(_) => {
                    let start = at.align_down(cluster_size).get();
                    let whole = self
                        .read_cluster(start, &Chain::default())
                        .map_err(|error| error.guest(at))?;
                    let into = usize::try_from(at.within(cluster_size)).unwrap_or(usize::MAX);
                    if let Some(part) = whole.get(into..).and_then(|rest| rest.get(..now.len())) {
                        now.copy_from_slice(part);
                    }
                }
                Kind::Absent | Kind::Zero => now.fill(0),
            }
            at = at.plus(len as u64)?;
            rest = later;
        }
        Ok(())
    }

    fn file(&self, index: FileIndex) -> Option<&Arc<dyn Storage>> {
        (index == FileIndex::MAIN).then_some(&self.readable)
    }
}

impl LayerMut for Image {
    fn write_at(&self, at: GuestOffset, buf: &[u8], below: &Chain) -> Result<()> {
        let end = at.plus(buf.len() as u64)?;
        let range = self.check_range(&(at..end))?;
        let _flight = self.hold(&range, Hold::Alone);
        let (mut at, mut rest) = (range.start, buf);
        while !rest.is_empty() {
            let len = self
                .write_some(at, rest, below)
                .map_err(|error| error.guest(GuestOffset::new(at)))?;
            rest = rest.get(len..).unwrap_or_default();
            at = at.saturating_add(len as u64);
        }
        Ok(())
    }

    fn write_encoded(&self, at: GuestOffset, unit: Stored<'_>, below: &Chain) -> Result<()> {
        match unit {
            Stored::Plain(bytes) => {
                // The last unit of the disk may come with the zeros it was padded with.
                let left = self.virtual_size().saturating_sub(at.get());
                self.write_at(at, part(bytes, left), below)
            }
            Stored::Packed(bytes) => self.write_packed(at, bytes),
        }
    }

    fn encoder(&self) -> Result<Box<dyn Encoder>> {
        match self.key {
            Some(_) => Err(refuse(EncryptionError::Compressed)),
            None => Ok(Box::new(self.decoders.encoder()?)),
        }
    }

    fn zero(&self, range: Range<GuestOffset>, how: ZeroHow, below: &Chain) -> Result<()> {
        let range = self.check_range(&range)?;
        let _flight = self.hold(&range, Hold::Alone);
        let start = GuestOffset::new(range.start);
        self.zero_held(range, how, below)
            .map_err(|error| error.guest(start))
    }

    /// Clusters that are given up become holes of the host, if discards are passed on at all; they keep their places.
    fn discard(&self, range: Range<GuestOffset>) -> Result<()> {
        let range = self.check_range(&range)?;
        if !self.unmap || self.key.is_some() || self.backed.load(Ordering::Acquire) {
            return Ok(());
        }
        let cluster_size = self.geometry.cluster_size();
        let end = match range.end == self.virtual_size() {
            true => range.end,
            false => range.end.saturating_sub(range.end % cluster_size),
        };
        let _flight = self.hold(&range, Hold::Alone);
        let mut at = up(range.start, cluster_size);
        while at < end {
            let (kind, len) = self.lock().run(at, end.saturating_sub(at))?;
            if let Kind::Data(host) = kind {
                self.file.zero(host..host.plus(len)?, ZeroHow::MayUnmap)?;
            }
            at = at.saturating_add(len);
        }
        Ok(())
    }

    fn clear(&self) -> Result<()> {
        let _flight = self.flights.hold(0..u64::MAX, Hold::Alone);
        self.lock().clear()
    }

    fn resize(&self, size: u64, below: &Chain) -> Result<()> {
        let _flight = self.flights.hold(0..u64::MAX, Hold::Alone);
        self.resize_held(size, below)
    }

    /// The new name goes behind all else; one write of the header shows it.
    fn set_backing(&self, backing: Option<&BackingName>) -> Result<()> {
        let _flight = self.flights.hold(0..u64::MAX, Hold::Alone);
        let mut tables = self.lock();
        tables.settle()?;
        let place = match backing {
            Some(backing) => Some(Self::put_name(&mut tables, &backing.name)?),
            None => None,
        };
        tables.header.backing = place;
        tables.switch_header()?;
        self.backed.store(backing.is_some(), Ordering::Release);
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        self.lock().settle()
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        let mut tables = self.lock();
        if tables.is_dirty() {
            // Whoever needs to know has flushed. What is written here spares a leak, no more.
            let _ = tables.write_back();
        }
    }
}
