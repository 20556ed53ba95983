//! Changing an image in place.
//!
//! Sectors have their places, so nothing is allocated: data is written where it belongs, and the bits that show it are set
//! in memory, under a lock that is not held while data is written. They reach the file once that data is durable:
//! [`Image::settle`]. Sectors that get their bit are held alone in [`Flights`] meanwhile, those that have it shared.

use std::io::IoSlice;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use diskmill_core::{
    BackingName, Chain, Error, ErrorKind, Extent, Facts, FileIndex, Format, GuestOffset, HostOffset, Layer,
    LayerMut, OpenSpec, Result, SECTOR, Storage, StorageMut, Stored, ZeroHow,
};

use super::header::Header;
use super::layer::read;
use super::map::{Bitmap, sectors};
use crate::bounds::within;
use crate::flight::{Flight, Flights, Hold};

/// Sectors whose bits are set in one go: what they take in memory is bounded.
const STEP: u64 = 1 << 21;

/// A cow image open for changing in place.
#[derive(Debug)]
pub(super) struct Image {
    facts: Facts,
    readable: Arc<dyn Storage>,
    pub(super) file: Arc<dyn StorageMut>,
    /// Whether there is an image below, by the header.
    pub(super) backed: AtomicBool,
    unmap: bool,
    pub(super) size: AtomicU64,
    pub(super) header: Mutex<Header>,
    pub(super) bitmap: Mutex<Bitmap>,
    pub(super) flights: Flights,
    /// Nobody knows which header the file has.
    adrift: AtomicBool,
}

impl Image {
    pub(super) fn open(header: Header, facts: Facts, file: Arc<dyn StorageMut>, how: &OpenSpec) -> Self {
        Self {
            facts,
            readable: Arc::clone(&file) as Arc<dyn Storage>,
            backed: AtomicBool::new(header.backing.is_some()),
            unmap: how.unmap,
            size: AtomicU64::new(header.virtual_size()),
            bitmap: Mutex::new(Bitmap::new(header.geometry())),
            header: Mutex::new(header),
            flights: Flights::default(),
            adrift: AtomicBool::new(false),
            file,
        }
    }

    pub(super) fn bitmap(&self) -> MutexGuard<'_, Bitmap> {
        // A panic under the lock is a bug that tests would show; a byte is marked as changed in the step that changes it.
        self.bitmap.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn header(&self) -> MutexGuard<'_, Header> {
        self.header.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Holds all sectors, alone.
    pub(super) fn hold_all(&self) -> Flight<'_> {
        self.flights.hold(0..u64::MAX, Hold::Alone)
    }

    /// Fails once the header in the file is not known.
    pub(super) fn usable(&self) -> Result<()> {
        match self.adrift.load(Ordering::Acquire) {
            true => {
                let text = "an earlier change of the header failed; the image must be opened again";
                Err(Error::new(ErrorKind::Io, text).format(Format::Cow))
            }
            false => Ok(()),
        }
    }

    /// Writes a part of the header, durably. If that fails nobody knows what it says.
    pub(super) fn switch(&self, at: u64, bytes: &[u8]) -> Result<()> {
        let file = &self.file;
        let done = file
            .write_at(HostOffset::new(at), bytes)
            .and_then(|()| file.sync());
        self.adrift.fetch_or(done.is_err(), Ordering::AcqRel);
        done
    }

    /// Writes the bits that wait, after the data they show is durable. They themselves are not yet, on return.
    pub(super) fn settle(&self) -> Result<()> {
        let mut bitmap = self.bitmap();
        self.settle_locked(&mut bitmap)
    }

    fn settle_locked(&self, bitmap: &mut Bitmap) -> Result<()> {
        self.usable()?;
        if !bitmap.is_dirty() {
            return Ok(());
        }
        self.file.sync()?;
        bitmap.write_back(self.file.as_ref())
    }

    /// Settles, and returns when all of it is durable.
    pub(super) fn settle_for_good(&self) -> Result<()> {
        self.settle()?;
        self.file.sync()
    }

    /// Says that `sectors` are in the file by now.
    pub(super) fn enter(&self, sectors: Range<u64>) -> Result<()> {
        let mut at = sectors.start;
        while at < sectors.end {
            let end = at.saturating_add(STEP).min(sectors.end);
            let mut bitmap = self.bitmap();
            bitmap.set(self.file.as_ref(), at..end)?;
            if bitmap.is_full() {
                self.settle_locked(&mut bitmap)?;
            }
            at = end;
        }
        Ok(())
    }

    fn are_stored(&self, sectors: Range<u64>) -> Result<bool> {
        self.bitmap().all(self.file.as_ref(), sectors)
    }

    /// Calls `f` for the runs of `sectors` that are in the file.
    fn stored_runs(&self, sectors: Range<u64>, mut f: impl FnMut(Range<u64>) -> Result<()>) -> Result<()> {
        let mut at = sectors.start;
        while at < sectors.end {
            let max = sectors.end.saturating_sub(at);
            let (stored, len) = self.bitmap().run(self.file.as_ref(), at, max)?;
            let end = at.saturating_add(len);
            if stored {
                f(at..end)?;
            }
            at = end;
        }
        Ok(())
    }

    /// Where bytes of the disk are in the file.
    fn host(&self, at: GuestOffset) -> HostOffset {
        self.bitmap().geometry.host(at)
    }

    /// Writes bytes to sectors that are held alone and not all in the file.
    fn write_held(&self, at: GuestOffset, buf: &[u8], below: &Chain) -> Result<()> {
        let end = at.plus(buf.len() as u64)?;
        let held = sectors(at, buf.len() as u64);
        let (mut head, mut tail) = (Vec::new(), Vec::new());
        let before = at.within(SECTOR);
        let first = held.start..held.start.saturating_add(1);
        if before > 0 && !self.are_stored(first)? {
            head = shown(at.align_down(SECTOR), before, below)?;
        }
        let last = held.end.saturating_sub(1)..held.end;
        if !end.is_aligned(SECTOR) && !self.are_stored(last)? {
            tail = shown(end, SECTOR.saturating_sub(end.within(SECTOR)), below)?;
        }
        let start = GuestOffset::new(at.get().saturating_sub(head.len() as u64));
        let parts = [IoSlice::new(&head), IoSlice::new(buf), IoSlice::new(&tail)];
        self.file.write_vectored_at(self.host(start), &parts)?;
        self.enter(held)
    }

    /// Makes whole sectors zeros, which are held alone. Those that are not in the file need nothing where they are zeros
    /// anyway.
    fn zero_held(&self, whole: Range<u64>, how: ZeroHow, bare: bool) -> Result<()> {
        if whole.start >= whole.end {
            return Ok(());
        }
        let zero = |run: Range<u64>| {
            let at = |sector: u64| self.host(GuestOffset::new(sector.saturating_mul(SECTOR)));
            self.file.zero(at(run.start)..at(run.end), how)
        };
        if bare {
            return self.stored_runs(whole, zero);
        }
        zero(whole.clone())?;
        self.enter(whole)
    }
}

/// What `len` bytes from `at` on read as in the chain below.
fn shown(at: GuestOffset, len: u64, below: &Chain) -> Result<Vec<u8>> {
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
    below.read_at(at, &mut bytes)?;
    Ok(bytes)
}

impl Layer for Image {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn virtual_size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn map(&self, at: GuestOffset, max: u64) -> Result<Extent> {
        let file_len = self.file.len()?;
        self.bitmap().extent(self.file.as_ref(), file_len, at, max)
    }

    fn read_at(&self, at: GuestOffset, buf: &mut [u8]) -> Result<()> {
        within(at, buf.len() as u64, self.virtual_size())?;
        read(&self.bitmap, self.file.as_ref(), at, buf)
    }

    fn file(&self, index: FileIndex) -> Option<&Arc<dyn Storage>> {
        (index == FileIndex::MAIN).then_some(&self.readable)
    }

    fn is_hollow(&self) -> Result<bool> {
        Ok(true)
    }
}

impl LayerMut for Image {
    fn write_at(&self, at: GuestOffset, buf: &[u8], below: &Chain) -> Result<()> {
        let len = buf.len() as u64;
        within(at, len, self.virtual_size())?;
        self.usable()?;
        if len == 0 {
            return Ok(());
        }
        let touched = sectors(at, len);
        {
            let _flight = self.flights.hold(touched.clone(), Hold::Shared);
            if self.are_stored(touched.clone())? {
                return self
                    .file
                    .write_at(self.host(at), buf)
                    .map_err(|error| error.guest(at));
            }
        }
        let _flight = self.flights.hold(touched, Hold::Alone);
        self.write_held(at, buf, below).map_err(|error| error.guest(at))
    }

    fn write_encoded(&self, at: GuestOffset, unit: Stored<'_>, below: &Chain) -> Result<()> {
        match unit {
            Stored::Plain(bytes) => self.write_at(at, bytes, below),
            Stored::Packed(_) => {
                let text = "a cow image cannot hold compressed data";
                Err(Error::new(ErrorKind::Unsupported, text).format(Format::Cow))
            }
        }
    }

    /// There is no mark for zeros: they are written, as holes where the host has them, wherever anything else could show.
    fn zero(&self, range: Range<GuestOffset>, how: ZeroHow, below: &Chain) -> Result<()> {
        let len = range.end.since(range.start);
        within(range.start, len, self.virtual_size())?;
        self.usable()?;
        if len == 0 {
            return Ok(());
        }
        let touched = sectors(range.start, len);
        let _flight = self.flights.hold(touched.clone(), Hold::Alone);
        let bare = below.is_empty() && !self.backed.load(Ordering::Acquire);
        let whole = range.start.get().div_ceil(SECTOR)..range.end.get() / SECTOR;
        let zero_part = |part: Range<GuestOffset>| {
            let len = part.end.since(part.start);
            if len == 0 || (bare && !self.are_stored(sectors(part.start, len))?) {
                return Ok(());
            }
            let zeros = [0; 512];
            let zeros = usize::try_from(len).ok().and_then(|len| zeros.get(..len));
            self.write_held(part.start, zeros.unwrap_or_default(), below)
        };
        let done = if whole.start > whole.end {
            // All of it lies within one sector.
            zero_part(range.clone())
        } else {
            let at = |sector: u64| GuestOffset::new(sector.saturating_mul(SECTOR));
            zero_part(range.start..at(whole.start))
                .and_then(|()| self.zero_held(whole.clone(), how, bare))
                .and_then(|()| zero_part(at(whole.end)..range.end))
        };
        done.map_err(|error| error.guest(range.start))
    }

    /// Whole sectors that are given up become holes of the host, if discards are passed on at all; they stay in the file,
    /// since what is below must not come to light.
    fn discard(&self, range: Range<GuestOffset>) -> Result<()> {
        let len = range.end.since(range.start);
        within(range.start, len, self.virtual_size())?;
        self.usable()?;
        let whole = range.start.get().div_ceil(SECTOR)..range.end.get() / SECTOR;
        if !self.unmap || whole.start >= whole.end {
            return Ok(());
        }
        let _flight = self.flights.hold(whole.clone(), Hold::Alone);
        self.zero_held(whole, ZeroHow::MayUnmap, true)
            .map_err(|error| error.guest(range.start))
    }

    /// The bits go first. Only when that is durable the file is cut to what it had when it was new.
    fn clear(&self) -> Result<()> {
        self.usable()?;
        let _flight = self.hold_all();
        let mut bitmap = self.bitmap();
        let geometry = bitmap.geometry;
        let (start, end) = (
            HostOffset::new(geometry.bitmap_at()),
            HostOffset::new(geometry.bitmap_end()),
        );
        bitmap.forget(geometry);
        self.file.zero(start..end, ZeroHow::MayUnmap)?;
        self.file.sync()?;
        if !self.file.hints().fixed_len {
            self.file.set_len(end.get())?;
        }
        Ok(())
    }

    fn resize(&self, size: u64, below: &Chain) -> Result<()> {
        self.usable()?;
        let _flight = self.hold_all();
        self.resize_held(size, below)
    }

    fn resizes_in_place(&self, size: u64) -> bool {
        self.keeps_places(size)
    }

    fn set_backing(&self, backing: Option<&BackingName>) -> Result<()> {
        self.usable()?;
        let _flight = self.hold_all();
        self.change_backing(backing)
    }

    fn flush(&self) -> Result<()> {
        self.settle()?;
        self.file.sync()
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        // Whoever needs to know has flushed. What is written here is data nobody was promised.
        let _ = self.settle();
    }
}
