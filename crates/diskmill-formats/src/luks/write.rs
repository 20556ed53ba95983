//! An image open for changing in place.
//!
//! Sectors are encrypted whole, so a write of less reads the rest of its first and last sector, decrypts it, and writes
//! all of them. Whoever does that holds the sectors alone, or another thread's bytes in them would be lost; writes of
//! whole sectors, and reads, hold them shared. There are no tables: a write is in the file when it returns, and durable
//! after a flush.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use diskmill_core::{
    Amendment, Chain, Error, ErrorKind, Extent, Facts, FileIndex, Format, GuestOffset, Job, Layer, LayerMut,
    Reserve, Result, SECTOR, Secrets, Storage, StorageMut, Stored, ZeroHow,
};

use super::amend;
use super::map::Payload;
use crate::bounds::within;
use crate::crypt::luks::VolumeKey;
use crate::flight::{Flight, Flights, Hold};
use crate::preallocation::zeros;

/// Bytes that are encrypted and written at once.
const STEP: u64 = 512 << 10;

/// Bytes of a sector in memory.
const SECTOR_LEN: usize = 512;

/// Why an image cannot be changed as asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
enum WriteError {
    #[error("a luks image cannot hold compressed data")]
    Packed,
    #[error("a luks image cannot be emptied: it has no backing image")]
    Empty,
    #[error("a luks image has no tables to fill in ahead of data")]
    NoTables,
    #[error("size is {size}, must be {own}: a device keeps its size")]
    Device { size: u64, own: u64 },
    #[error("size is {0}, must leave the file below 2^63 bytes")]
    TooLarge(u64),
}

impl From<WriteError> for Error {
    fn from(error: WriteError) -> Self {
        Error::new(ErrorKind::Unsupported, error).format(Format::Luks)
    }
}

/// An image open for changing in place.
#[derive(Debug)]
pub(super) struct Image {
    facts: Facts,
    payload: Payload,
    /// The key of the disk, if it is known: new slots keep it.
    pub(super) key: Option<VolumeKey>,
    size: AtomicU64,
    pub(super) file: Arc<dyn StorageMut>,
    readable: Arc<dyn Storage>,
    /// Where the header is, if that is another file.
    pub(super) detached: Option<Arc<dyn StorageMut>>,
    pub(super) secrets: Secrets,
    /// Sectors that are being worked on.
    flights: Flights,
    /// Buffers that nobody uses just now.
    spare: Mutex<Vec<Vec<u8>>>,
}

impl Image {
    pub(super) fn new(
        facts: Facts,
        payload: Payload,
        key: Option<VolumeKey>,
        file: Arc<dyn StorageMut>,
        detached: Option<Arc<dyn StorageMut>>,
        secrets: Secrets,
    ) -> Self {
        Self {
            size: AtomicU64::new(facts.virtual_size),
            facts,
            payload,
            key,
            readable: Arc::clone(&file) as Arc<dyn Storage>,
            file,
            detached,
            secrets,
            flights: Flights::default(),
            spare: Mutex::default(),
        }
    }

    /// Holds the sectors of `range`.
    fn hold(&self, range: &Range<GuestOffset>, hold: Hold) -> Flight<'_> {
        self.flights
            .hold(range.start.get() / SECTOR..range.end.get().div_ceil(SECTOR), hold)
    }

    /// Waits for all others, and keeps them waiting.
    pub(super) fn hold_all(&self) -> Flight<'_> {
        self.flights.hold(0..u64::MAX, Hold::Alone)
    }

    /// Writes to `range` what `fill` makes of each part of it, given its distance from the start.
    fn write_with(&self, range: Range<GuestOffset>, fill: impl Fn(u64, &mut [u8])) -> Result<()> {
        within(range.start, range.end.since(range.start), self.virtual_size())?;
        let cipher = self.payload.cipher()?;
        let whole = range.start.is_aligned(SECTOR) && range.end.is_aligned(SECTOR);
        let _flight = self.hold(&range, if whole { Hold::Shared } else { Hold::Alone });
        let mut buffer = self.take_buffer();
        let mut at = range.start;
        while at < range.end {
            let start = at.align_down(SECTOR);
            let stop = start.saturating_add(STEP).min(range.end);
            let end = GuestOffset::new(stop.get().next_multiple_of(SECTOR));
            let len = usize::try_from(end.since(start)).unwrap_or(usize::MAX);
            if buffer.len() < len {
                buffer.resize(len, 0);
            }
            let sealed = buffer.get_mut(..len).unwrap_or_default();
            if start < at {
                self.load(start, sealed)?;
            }
            let last = end.get().saturating_sub(SECTOR);
            if stop < end && (last > start.get() || start == at) {
                let (_, tail) = sealed.split_at_mut(len.saturating_sub(SECTOR_LEN));
                self.load(GuestOffset::new(last), tail)?;
            }
            let from = usize::try_from(at.since(start)).unwrap_or(usize::MAX);
            let to = usize::try_from(stop.since(start)).unwrap_or(usize::MAX);
            if let Some(part) = sealed.get_mut(from..to) {
                fill(at.since(range.start), part);
            }
            let host = self.payload.host(start)?;
            cipher.encrypt(start, host, sealed)?;
            self.file.write_at(host, sealed)?;
            at = stop;
        }
        self.give_back(buffer);
        Ok(())
    }

    /// Decrypts the sector at `at` into the start of `buf`.
    fn load(&self, at: GuestOffset, buf: &mut [u8]) -> Result<()> {
        match buf.get_mut(..SECTOR_LEN) {
            Some(sector) => self.payload.read(self.file.as_ref(), at, sector),
            None => Err(Error::bare(ErrorKind::Usage)),
        }
    }

    fn take_buffer(&self) -> Vec<u8> {
        let mut spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner);
        spare.pop().unwrap_or_default()
    }

    fn give_back(&self, buffer: Vec<u8>) {
        let mut spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner);
        spare.push(buffer);
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
        self.payload.extent(self.virtual_size(), at, max)
    }

    fn read_at(&self, at: GuestOffset, buf: &mut [u8]) -> Result<()> {
        within(at, buf.len() as u64, self.virtual_size())?;
        let _flight = self.hold(&(at..at.plus(buf.len() as u64)?), Hold::Shared);
        self.payload
            .read(self.file.as_ref(), at, buf)
            .map_err(|error| error.guest(at))
    }

    fn file(&self, index: FileIndex) -> Option<&Arc<dyn Storage>> {
        (index == FileIndex::MAIN).then_some(&self.readable)
    }
}

impl LayerMut for Image {
    fn write_at(&self, at: GuestOffset, buf: &[u8], _below: &Chain) -> Result<()> {
        let end = at.plus(buf.len() as u64)?;
        self.write_with(at..end, |done, part| {
            let done = usize::try_from(done).unwrap_or(usize::MAX);
            if let Some(from) = buf.get(done..done.saturating_add(part.len())) {
                part.copy_from_slice(from);
            }
        })
        .map_err(|error| error.guest(at))
    }

    fn write_encoded(&self, at: GuestOffset, unit: Stored<'_>, below: &Chain) -> Result<()> {
        match unit {
            Stored::Plain(bytes) => self.write_at(at, bytes, below),
            Stored::Packed(_) => Err(WriteError::Packed.into()),
        }
    }

    fn stores_zeros(&self) -> bool {
        true
    }

    /// Zeros are encrypted and written: a hole of the host would read as something else.
    fn zero(&self, range: Range<GuestOffset>, _how: ZeroHow, _below: &Chain) -> Result<()> {
        let start = range.start;
        self.write_with(range, |_, part| part.fill(0))
            .map_err(|error| error.guest(start))
    }

    /// What was given up would read as something else, and show which parts of the disk are in use.
    fn discard(&self, range: Range<GuestOffset>) -> Result<()> {
        within(range.start, range.end.since(range.start), self.virtual_size())
    }

    fn clear(&self) -> Result<()> {
        Err(WriteError::Empty.into())
    }

    /// The file gets exactly `size` bytes behind the header; the disk is rounded up to a sector. What is new reads as
    /// what the cipher makes of zeros, as in QEMU: to write all of it could take hours.
    fn resize(&self, size: u64, _below: &Chain) -> Result<()> {
        let start = self.payload.start().get();
        let end = start
            .checked_add(size)
            .filter(|end| *end <= i64::MAX as u64 - SECTOR)
            .ok_or(WriteError::TooLarge(size))?;
        let _flight = self.hold_all();
        if self.file.hints().fixed_len {
            let own = self.file.len()?.saturating_sub(start);
            return if size == own {
                Ok(())
            } else {
                Err(WriteError::Device { size, own }.into())
            };
        }
        self.file.set_len(end)?;
        self.size.store(size.next_multiple_of(SECTOR), Ordering::Release);
        Ok(())
    }

    fn reserve(&self, range: Range<GuestOffset>, how: Reserve) -> Result<()> {
        within(range.start, range.end.since(range.start), self.virtual_size())?;
        let host = self.payload.host(range.start)?..self.payload.host(range.end)?;
        match how {
            _ if host.is_empty() => Ok(()),
            Reserve::Place => Err(WriteError::NoTables.into()),
            Reserve::Space => self.file.zero(host, ZeroHow::KeepAllocated),
            Reserve::Zeros => {
                let mut at = host.start;
                while at < host.end {
                    let piece = zeros(host.end.since(at));
                    self.file.write_at(at, piece)?;
                    at = at.plus(piece.len() as u64)?;
                }
                Ok(())
            }
        }
    }

    fn amend(&self, wish: &Amendment, _below: &Chain, job: Job<'_>) -> Result<()> {
        amend::run(self, wish, job)
    }

    fn flush(&self) -> Result<()> {
        if let Some(header) = &self.detached {
            header.sync()?;
        }
        self.file.sync()
    }
}
