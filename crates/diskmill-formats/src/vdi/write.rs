//! Changing an image in place.
//!
//! The map is looked up and changed under one lock, in memory; data is read and written without it. In between, the
//! blocks of a request are held in [`Flights`], so that requests for different blocks run side by side. New blocks are
//! shown by the map in the file only once their data is durable: see [`Tables`].
//!
//! A block never loses its slot to a write of zeros or a discard: what it held becomes a hole of the host. Slots stay
//! dense that way, as other programs expect them to be.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use diskmill_core::{
    BackingName, Chain, Error, ErrorKind, Extent, Facts, FileIndex, Format, GuestOffset, HostOffset,
    Identity, Layer, LayerMut, OpenSpec, Reserve, Result, Storage, StorageMut, Stored, ZeroHow,
};

use super::header::{Header, ImageType};
use super::layout::BLOCK;
use super::map::{BlockMap, Entry, block_of};
use super::tables::Tables;
use super::uuid::Uuid;
use crate::bounds::within;
use crate::flight::{Flights, Hold};
use crate::preallocation::zeros;

/// A vdi image open for changing in place.
#[derive(Debug)]
pub(super) struct Image {
    facts: Facts,
    readable: Arc<dyn Storage>,
    pub(super) file: Arc<dyn StorageMut>,
    diff: AtomicBool,
    /// What the next [`set_backing`](LayerMut::set_backing) makes the parent.
    expected: Mutex<Option<Identity>>,
    pub(super) fixed: bool,
    unmap: bool,
    pub(super) size: AtomicU64,
    touched: AtomicBool,
    tables: Mutex<Tables>,
    pub(super) flights: Flights,
}

/// What a block is to get in front of and behind the bytes that are written to it.
enum Around<'a> {
    Zeros,
    Below(&'a Chain),
}

impl Image {
    pub(super) fn open(
        header: Header,
        facts: Facts,
        file: Arc<dyn StorageMut>,
        how: &OpenSpec,
    ) -> Result<Self> {
        let map = BlockMap::load(file.as_ref(), &header, &how.limits)?;
        let tables = Tables::open(header, map, Arc::clone(&file))?;
        let header = &tables.header;
        Ok(Self {
            facts,
            diff: AtomicBool::new(header.is_diff()),
            expected: Mutex::new(None),
            fixed: header.image_type == ImageType::Fixed,
            unmap: how.unmap,
            size: AtomicU64::new(header.virtual_size()),
            touched: AtomicBool::new(false),
            readable: tables.readable(),
            file,
            tables: Mutex::new(tables),
            flights: Flights::default(),
        })
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Tables> {
        // A panic under the lock is a bug that tests would show; an entry is marked as changed in the step that
        // changes it.
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether absent blocks are the parent's.
    pub(super) fn is_diff(&self) -> bool {
        self.diff.load(Ordering::Acquire)
    }

    /// Before the first change of a session.
    pub(super) fn touch(&self) -> Result<()> {
        if !self.touched.load(Ordering::Acquire) {
            self.lock().touch()?;
            self.touched.store(true, Ordering::Release);
        }
        Ok(())
    }

    /// Where a block is in the file, if it is in a slot.
    fn place(&self, block: u32) -> Option<HostOffset> {
        let tables = self.lock();
        match tables.map.get(block) {
            Entry::Slot(slot) => Some(HostOffset::new(tables.header.slot_at(slot))),
            _ => None,
        }
    }

    /// Calls `f` for the part of `range` in each block: with the block, and the part.
    fn blocks(
        range: &Range<GuestOffset>,
        mut f: impl FnMut(u32, Range<GuestOffset>) -> Result<()>,
    ) -> Result<()> {
        let mut at = range.start;
        while at < range.end {
            let end = at.align_down(BLOCK).saturating_add(BLOCK).min(range.end);
            f(block_of(at), at..end)?;
            at = end;
        }
        Ok(())
    }

    /// Whether `part`, which lies in one block, is all of it that the disk has.
    fn is_whole(&self, part: &Range<GuestOffset>) -> bool {
        part.start.is_aligned(BLOCK)
            && (part.end.is_aligned(BLOCK) || part.end.get() == self.size.load(Ordering::Acquire))
    }

    fn write_part(&self, block: u32, at: GuestOffset, bytes: &[u8], below: &Chain) -> Result<()> {
        let one = || u64::from(block)..u64::from(block).saturating_add(1);
        let in_place = |host: HostOffset| {
            let host = host.plus(at.within(BLOCK))?;
            self.file.write_at(host, bytes).map_err(|error| error.guest(at))
        };
        {
            let _flight = self.flights.hold(one(), Hold::Shared);
            if let Some(host) = self.place(block) {
                return in_place(host);
            }
        }
        let _flight = self.flights.hold(one(), Hold::Alone);
        match self.place(block) {
            Some(host) => in_place(host),
            None => self.write_new(block, at, bytes, below),
        }
    }

    /// Gives a block a slot and fills it: with `bytes` from `at` on, and what the block read as around them. The block
    /// is held alone.
    pub(super) fn write_new(&self, block: u32, at: GuestOffset, bytes: &[u8], below: &Chain) -> Result<()> {
        let around = match self.lock().map.get(block) {
            Entry::Free if self.is_diff() && !below.is_empty() => Around::Below(below),
            _ => Around::Zeros,
        };
        let (slot, fresh, host) = {
            let mut tables = self.lock();
            let (slot, fresh) = tables.take(0)?;
            (slot, fresh, HostOffset::new(tables.header.slot_at(slot)))
        };
        let written = self.fill(host, fresh, at, bytes, &around);
        let mut tables = self.lock();
        match written {
            Ok(()) => {
                tables.enter(block, Entry::Slot(slot));
                tables.settle_if_many()
            }
            Err(error) => {
                tables.slots.remove(slot);
                Err(error.guest(at))
            }
        }
    }

    fn fill(
        &self,
        host: HostOffset,
        fresh: bool,
        at: GuestOffset,
        bytes: &[u8],
        around: &Around<'_>,
    ) -> Result<()> {
        let inner = host.plus(at.within(BLOCK))?;
        match around {
            Around::Zeros => {
                if !fresh {
                    self.file.zero(host..host.plus(BLOCK)?, ZeroHow::MayUnmap)?;
                }
                match bytes {
                    [] => Ok(()),
                    bytes => self.file.write_at(inner, bytes),
                }
            }
            Around::Below(below) => {
                let start = at.align_down(BLOCK);
                let mut whole = vec![0; usize::try_from(BLOCK).unwrap_or(0)];
                // Behind the end of this disk the block is zeros, whatever is below.
                let left = self.size.load(Ordering::Acquire).saturating_sub(start.get());
                let shown = usize::try_from(left).unwrap_or(usize::MAX).min(whole.len());
                below.read_at(start, whole.get_mut(..shown).unwrap_or_default())?;
                let from = usize::try_from(at.within(BLOCK)).unwrap_or(usize::MAX);
                if let Some(part) = whole.get_mut(from..from.saturating_add(bytes.len())) {
                    part.copy_from_slice(bytes);
                }
                self.file.write_at(host, &whole)
            }
        }
    }

    /// Makes a part of a block zeros that is not in a slot, in an image over a parent.
    fn zero_absent(&self, block: u32, part: &Range<GuestOffset>, below: &Chain) -> Result<()> {
        let _flight = self
            .flights
            .hold(u64::from(block)..u64::from(block).saturating_add(1), Hold::Alone);
        let entry = self.lock().map.get(block);
        let len = part.end.since(part.start);
        match entry {
            Entry::Zero => Ok(()),
            Entry::Free if self.is_whole(part) => {
                let mut tables = self.lock();
                tables.enter(block, Entry::Zero);
                tables.settle_if_many()
            }
            Entry::Free => {
                let zeros = vec![0; usize::try_from(len).unwrap_or(0)];
                self.write_new(block, part.start, &zeros, below)
            }
            Entry::Slot(_) => match self.place(block) {
                Some(host) => {
                    let host = host.plus(part.start.within(BLOCK))?;
                    self.file.zero(host..host.plus(len)?, ZeroHow::KeepAllocated)
                }
                None => Ok(()),
            },
        }
    }

    /// Settles everything.
    pub(super) fn settle(&self) -> Result<()> {
        let mut tables = self.lock();
        tables.usable()?;
        tables.settle()
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
        let tables = self.lock();
        tables.map.extent(at, max, &tables.header, tables.file_len)
    }

    fn read_at(&self, at: GuestOffset, buf: &mut [u8]) -> Result<()> {
        let len = buf.len() as u64;
        within(at, len, self.virtual_size())?;
        let mut rest = buf;
        Self::blocks(&(at..at.plus(len)?), |block, part| {
            let len = usize::try_from(part.end.since(part.start)).unwrap_or(usize::MAX);
            let (now, later) = std::mem::take(&mut rest).split_at_mut(len);
            rest = later;
            let block = u64::from(block);
            let _flight = self.flights.hold(block..block.saturating_add(1), Hold::Shared);
            match self.place(block_of(part.start)) {
                Some(host) => {
                    let host = host.plus(part.start.within(BLOCK))?;
                    self.file
                        .read_at(host, now)
                        .map_err(|error| error.guest(part.start))
                }
                None => {
                    now.fill(0);
                    Ok(())
                }
            }
        })
    }

    fn file(&self, index: FileIndex) -> Option<&Arc<dyn Storage>> {
        (index == FileIndex::MAIN).then_some(&self.readable)
    }

    fn identity(&self) -> Option<Identity> {
        let state = self.lock().header.uuid_modify.0;
        self.facts.identity.map(|known| Identity { state, ..known })
    }

    fn is_hollow(&self) -> Result<bool> {
        Ok(self.fixed)
    }
}

impl LayerMut for Image {
    fn write_at(&self, at: GuestOffset, buf: &[u8], below: &Chain) -> Result<()> {
        let len = buf.len() as u64;
        within(at, len, self.virtual_size())?;
        if len == 0 {
            return Ok(());
        }
        self.touch()?;
        let mut rest = buf;
        Self::blocks(&(at..at.plus(len)?), |block, part| {
            let len = usize::try_from(part.end.since(part.start)).unwrap_or(usize::MAX);
            let (now, later) = rest.split_at_checked(len).unwrap_or((rest, &[]));
            rest = later;
            self.write_part(block, part.start, now, below)
        })
    }

    fn write_encoded(&self, at: GuestOffset, unit: Stored<'_>, below: &Chain) -> Result<()> {
        match unit {
            Stored::Plain(bytes) => self.write_at(at, bytes, below),
            Stored::Packed(_) => {
                let text = "a vdi image cannot hold compressed data";
                Err(Error::new(ErrorKind::Unsupported, text).format(Format::Vdi))
            }
        }
    }

    fn zero(&self, range: Range<GuestOffset>, how: ZeroHow, below: &Chain) -> Result<()> {
        within(range.start, range.end.since(range.start), self.virtual_size())?;
        if range.start >= range.end {
            return Ok(());
        }
        self.touch()?;
        Self::blocks(&range, |block, part| {
            {
                let index = u64::from(block);
                let _flight = self.flights.hold(index..index.saturating_add(1), Hold::Shared);
                if let Some(host) = self.place(block) {
                    let start = host.plus(part.start.within(BLOCK))?;
                    let end = start.plus(part.end.since(part.start))?;
                    return self
                        .file
                        .zero(start..end, how)
                        .map_err(|error| error.guest(part.start));
                }
            }
            match self.is_diff() {
                true => self.zero_absent(block, &part, below),
                false => Ok(()),
            }
        })
    }

    /// Blocks that are given up become holes of the host, if discards are passed on at all; they keep their slots.
    fn discard(&self, range: Range<GuestOffset>) -> Result<()> {
        within(range.start, range.end.since(range.start), self.virtual_size())?;
        if !self.unmap || range.start >= range.end {
            return Ok(());
        }
        self.touch()?;
        Self::blocks(&range, |block, part| {
            let index = u64::from(block);
            let _flight = self.flights.hold(index..index.saturating_add(1), Hold::Shared);
            match self.place(block) {
                Some(host) if self.is_whole(&part) => self
                    .file
                    .zero(host..host.plus(part.end.since(part.start))?, ZeroHow::MayUnmap)
                    .map_err(|error| error.guest(part.start)),
                _ => Ok(()),
            }
        })
    }

    fn clear(&self) -> Result<()> {
        self.touch()?;
        let _flight = self.flights.hold(0..u64::MAX, Hold::Alone);
        self.clear_held()
    }

    fn resize(&self, size: u64, below: &Chain) -> Result<()> {
        self.touch()?;
        let _flight = self.flights.hold(0..u64::MAX, Hold::Alone);
        self.resize_held(size, below)
    }

    fn reserve(&self, range: Range<GuestOffset>, how: Reserve) -> Result<()> {
        within(range.start, range.end.since(range.start), self.virtual_size())?;
        self.touch()?;
        Self::blocks(&range, |block, part| {
            let index = u64::from(block);
            let _flight = self.flights.hold(index..index.saturating_add(1), Hold::Alone);
            if self.place(block).is_none() {
                self.write_new(block, part.start, &[], &Chain::default())?;
            }
            let Some(host) = self.place(block) else {
                return Ok(());
            };
            let mut at = host.plus(part.start.within(BLOCK))?;
            let end = at.plus(part.end.since(part.start))?;
            match how {
                Reserve::Place => Ok(()),
                Reserve::Space => self.file.zero(at..end, ZeroHow::KeepAllocated),
                Reserve::Zeros => {
                    while at < end {
                        let piece = zeros(end.since(at));
                        self.file.write_at(at, piece)?;
                        at = at.plus(piece.len() as u64)?;
                    }
                    Ok(())
                }
            }
        })
    }

    fn expect_parent(&self, parent: Option<Identity>) {
        *self.expected.lock().unwrap_or_else(PoisonError::into_inner) = parent;
    }

    /// One write of the first sector says it. An image without a parent does not get one: its free blocks are zeros.
    fn set_backing(&self, backing: Option<&BackingName>) -> Result<()> {
        let refuse = |kind, text: &'static str| Err(Error::new(kind, text).format(Format::Vdi));
        let expected = *self.expected.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.is_diff() {
            return match backing {
                None => Ok(()),
                Some(_) => refuse(
                    ErrorKind::Unsupported,
                    "only a differencing image can get another parent; 'create -b' makes one",
                ),
            };
        }
        let _flight = self.flights.hold(0..u64::MAX, Hold::Alone);
        let mut tables = self.lock();
        tables.settle_for_good()?;
        let header = &mut tables.header;
        match (backing, expected) {
            (None, _) => {
                header.image_type = ImageType::Dynamic;
                (header.uuid_link, header.uuid_parent_modify) = (Uuid::NIL, Uuid::NIL);
            }
            (Some(_), Some(parent)) => {
                (header.uuid_link, header.uuid_parent_modify) = (Uuid(parent.image), Uuid(parent.state));
            }
            (Some(_), None) => {
                return refuse(
                    ErrorKind::Usage,
                    "a vdi image names its parent by UUID, so that must be a vdi image",
                );
            }
        }
        tables.switch_header()?;
        self.diff.store(backing.is_some(), Ordering::Release);
        Ok(())
    }

    fn set_parent_state(&self, state: [u8; 16]) -> Result<()> {
        let mut tables = self.lock();
        if tables.header.is_diff() {
            tables.header.uuid_parent_modify = Uuid(state);
            tables.write_header()?;
            tables.file.sync()?;
        }
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        self.settle()?;
        self.file.sync()
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        let mut tables = self.lock();
        if tables.is_dirty() {
            // Whoever needs to know has flushed. What is written here spares a leak, no more.
            let _ = tables.settle();
        }
    }
}
