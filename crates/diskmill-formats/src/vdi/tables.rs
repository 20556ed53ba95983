//! Header and block map of an image that is being changed, and which slots are taken.
//!
//! Order of writes: what a slot holds; then, if it is a new one, `blocks_allocated`; flush; then the entry that shows it.
//! `blocks_allocated` is at all times above every slot in use, since other programs add blocks there. A power cut leaves
//! slots that nothing refers to, no more; they are the first to be given out again.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;

use diskmill_core::{Error, ErrorKind, Format, HostOffset, Result, Storage, StorageMut, ZeroHow};
use zerocopy::FromBytes;
use zerocopy::byteorder::little_endian::U32;

use super::header::{HEAD_LEN, Header};
use super::layout::{BLOCK, ENTRIES_PER_SECTOR, RawHeader, VERSION_0};
use super::map::{BlockMap, Entry};
use super::uuid::Uuid;
use crate::codec::is_zero;
use crate::slots::Slots;

/// Changed sectors of the map that may wait for a flush: entries of 128 GiB.
const WAITING: usize = 1024;

/// Why an image cannot be changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum TablesError {
    #[error("blocks {0} and {1} are both in slot {2}; the image cannot be written before it is repaired")]
    Shared(u32, u32, u32),
    #[error("images of version 0 can only be read")]
    Version0,
    #[error("an earlier change of the header failed; the image must be opened again")]
    Adrift,
    #[error("the device has {have} bytes, the image needs {need}")]
    Full { have: u64, need: u64 },
    #[error("data_offset would be {0:#x}, must be below 2^32")]
    DataOffset(u64),
}

impl From<TablesError> for Error {
    fn from(error: TablesError) -> Self {
        let kind = match error {
            TablesError::Shared(..) => ErrorKind::Corrupt,
            TablesError::Version0 | TablesError::DataOffset(_) => ErrorKind::Unsupported,
            TablesError::Adrift => ErrorKind::Io,
            TablesError::Full { .. } => ErrorKind::NoSpace,
        };
        Error::new(kind, error).format(Format::Vdi)
    }
}

/// Two blocks in one slot, where there are some.
pub(super) fn shared(map: &BlockMap) -> TablesError {
    let mut seen: Vec<(u32, u32)> = map.slots().map(|(block, slot)| (slot, block)).collect();
    seen.sort_unstable();
    let pair = seen.windows(2).find_map(|pair| match pair {
        [(a, first), (b, second)] if a == b => Some(TablesError::Shared(*first, *second, *a)),
        _ => None,
    });
    pair.unwrap_or(TablesError::Adrift)
}

/// Header, map and slots of an image that is being changed.
#[derive(Debug)]
pub(super) struct Tables {
    pub(super) file: Arc<dyn StorageMut>,
    pub(super) header: Header,
    pub(super) map: BlockMap,
    pub(super) slots: Slots,
    /// Bytes of the file.
    pub(super) file_len: u64,
    pub(super) fixed_len: bool,
    /// The first sector as it is in the file, or is about to be.
    sector: [u8; HEAD_LEN],
    /// Sectors of the map that differ from those in the file.
    dirty: BTreeSet<u32>,
    /// Whether this session has told that it changes the content.
    touched: bool,
    /// Nobody knows which header the file has.
    adrift: bool,
}

impl Tables {
    /// Takes over an image that does not contradict itself.
    pub(super) fn open(header: Header, map: BlockMap, file: Arc<dyn StorageMut>) -> Result<Self> {
        let tables = Self::open_any(header, map, file)?;
        for (block, _) in tables.map.slots() {
            tables.map.place(block, &tables.header, tables.file_len)?;
        }
        let used = tables.map.slots().count();
        if u32::try_from(used).unwrap_or(u32::MAX) != tables.slots.count() {
            return Err(shared(&tables.map).into());
        }
        Ok(tables)
    }

    /// Takes over any image. Slots there cannot be are left out.
    pub(super) fn open_any(header: Header, map: BlockMap, file: Arc<dyn StorageMut>) -> Result<Self> {
        if header.version == VERSION_0 {
            return Err(TablesError::Version0.into());
        }
        let mut sector = [0; HEAD_LEN];
        file.read_padded(HostOffset::ZERO, &mut sector)?;
        let mut tables = Self {
            file_len: file.len()?,
            fixed_len: file.hints().fixed_len,
            sector,
            dirty: BTreeSet::new(),
            touched: false,
            adrift: false,
            file,
            header,
            map,
            slots: Slots::default(),
        };
        tables.recount();
        Ok(tables)
    }

    /// Counts the slots in use anew.
    pub(super) fn recount(&mut self) {
        let limit = self.header.slot_limit();
        self.slots = Slots::default();
        for (_, slot) in self.map.slots().filter(|(_, slot)| *slot < limit) {
            self.slots.add(slot);
        }
    }

    /// Fails once the header in the file is not known.
    pub(super) fn usable(&self) -> Result<()> {
        match self.adrift {
            true => Err(TablesError::Adrift.into()),
            false => Ok(()),
        }
    }

    /// Tells, once a session and before the first change, that the content is another: whoever has this image for a
    /// parent must see that.
    pub(super) fn touch(&mut self) -> Result<()> {
        self.usable()?;
        if !self.touched {
            self.header.uuid_modify = Uuid::random();
            self.write_header()?;
            self.file.sync()?;
            self.touched = true;
        }
        Ok(())
    }

    /// Writes the first sector. The host does not tear it.
    pub(super) fn write_header(&mut self) -> Result<()> {
        self.usable()?;
        let header = &self.header;
        if let Ok((raw, _)) = RawHeader::mut_from_prefix(&mut self.sector) {
            raw.blocks_offset = U32::new(header.blocks_offset);
            raw.data_offset = U32::new(header.data_offset);
            raw.disk_size = header.disk_size.into();
            raw.blocks = U32::new(header.blocks);
            raw.blocks_allocated = U32::new(header.blocks_allocated);
            raw.uuid_modify = header.uuid_modify.0;
            raw.image_type = U32::new(header.image_type.number());
            raw.uuid_link = header.uuid_link.0;
            raw.uuid_parent_modify = header.uuid_parent_modify.0;
        }
        let written = self.file.write_at(HostOffset::ZERO, &self.sector);
        self.adrift |= written.is_err();
        written
    }

    /// Takes a slot from `from` on for a block that has none. Returns it, and whether it holds nothing but zeros.
    pub(super) fn take(&mut self, from: u32) -> Result<(u32, bool)> {
        self.usable()?;
        let slot = self.slots.free_from(from);
        let (start, end) = (
            self.header.slot_at(slot),
            self.header.slot_at(slot.saturating_add(1)),
        );
        let fresh = start >= self.file_len;
        if end > self.file_len {
            self.grow_file(end)?;
        }
        self.slots.add(slot);
        Ok((slot, fresh))
    }

    /// Makes the file at least `end` bytes long.
    pub(super) fn grow_file(&mut self, end: u64) -> Result<()> {
        if end <= self.file_len {
            return Ok(());
        }
        if self.fixed_len {
            let have = self.file_len;
            return Err(TablesError::Full { have, need: end }.into());
        }
        self.file.set_len(end)?;
        self.file_len = end;
        Ok(())
    }

    /// Says where a block is, in memory: [`settle`](Self::settle) writes it.
    pub(super) fn enter(&mut self, block: u32, entry: Entry) {
        self.map.set(block, entry);
        let sector = u64::from(block) / ENTRIES_PER_SECTOR;
        self.dirty.insert(u32::try_from(sector).unwrap_or(u32::MAX));
    }

    /// Whether something waits to be written.
    pub(super) fn is_dirty(&self) -> bool {
        !self.dirty.is_empty()
    }

    /// Settles if much waits.
    pub(super) fn settle_if_many(&mut self) -> Result<()> {
        match self.dirty.len() >= WAITING {
            true => self.settle(),
            false => Ok(()),
        }
    }

    /// Writes the changed entries, after what they rely on is durable. They themselves are not yet, on return.
    pub(super) fn settle(&mut self) -> Result<()> {
        if self.dirty.is_empty() {
            return Ok(());
        }
        let end = self.slots.end();
        if self.header.blocks_allocated < end {
            self.header.blocks_allocated = end;
            self.write_header()?;
        }
        self.usable()?;
        self.file.sync()?;
        let mut sectors = self.dirty.iter().copied().peekable();
        let mut runs: Vec<Range<u32>> = Vec::new();
        while let Some(first) = sectors.next() {
            let mut end = first.saturating_add(1);
            while sectors.next_if_eq(&end).is_some() {
                end = end.saturating_add(1);
            }
            runs.push(first..end);
        }
        for run in runs {
            let per = u32::try_from(ENTRIES_PER_SECTOR).unwrap_or(128);
            self.write_map(run.start.saturating_mul(per)..run.end.saturating_mul(per))?;
        }
        self.dirty.clear();
        Ok(())
    }

    /// Writes the sectors of the map that `blocks` are in, whole: an entry is never torn.
    pub(super) fn write_map(&self, blocks: Range<u32>) -> Result<()> {
        let per = u32::try_from(ENTRIES_PER_SECTOR).unwrap_or(128);
        let end = blocks.end.min(self.map.len());
        let mut first = blocks.start / per * per;
        while first < end {
            let count = end.saturating_sub(first).min(256 << 10);
            let at = HostOffset::new(self.header.blocks_offset.into()).plus(u64::from(first) * 4)?;
            let mut bytes = self
                .map
                .bytes(first, usize::try_from(count).unwrap_or(usize::MAX));
            // Data starts on a sector, so the rest of the last one is free.
            bytes.resize(bytes.len().next_multiple_of(HEAD_LEN), 0);
            self.file.write_at(at, &bytes)?;
            first = first.saturating_add(count);
        }
        Ok(())
    }

    /// Settles, and returns when all of it is durable.
    pub(super) fn settle_for_good(&mut self) -> Result<()> {
        self.settle()?;
        self.file.sync()
    }

    /// Copies slot `from` to slot `to`, which is nobody's.
    pub(super) fn copy(&mut self, from: u32, to: u32, buf: &mut Vec<u8>) -> Result<()> {
        buf.resize(usize::try_from(BLOCK).unwrap_or(0), 0);
        self.file
            .read_padded(HostOffset::new(self.header.slot_at(from)), buf)?;
        let at = self.header.slot_at(to);
        if is_zero(buf) {
            let end = self.header.slot_at(to.saturating_add(1));
            self.file
                .zero(HostOffset::new(at)..HostOffset::new(end), ZeroHow::MayUnmap)
        } else {
            self.file.write_at(HostOffset::new(at), buf)
        }
    }

    /// Moves the last blocks into the slots that nothing is in, so that the slots in use are the first ones; then
    /// gives up what is behind them. Returns how many blocks were moved.
    pub(super) fn pack(&mut self) -> Result<u32> {
        let count = self.slots.count();
        let mut moved = 0_u32;
        if self.slots.end() > count {
            let mut last: Vec<(u32, u32)> = self.map.slots().filter(|(_, slot)| *slot >= count).collect();
            last.sort_unstable_by_key(|(_, slot)| *slot);
            let mut buf = Vec::new();
            let mut old = Vec::with_capacity(last.len());
            for (block, from) in last {
                let to = self.slots.free_from(0);
                self.copy(from, to, &mut buf)?;
                self.slots.add(to);
                self.enter(block, Entry::Slot(to));
                old.push(from);
                moved = moved.saturating_add(1);
            }
            self.settle_for_good()?;
            for slot in old {
                self.slots.remove(slot);
            }
        }
        if self.header.blocks_allocated != count {
            self.header.blocks_allocated = count;
            self.write_header()?;
            self.file.sync()?;
        }
        self.cut()?;
        Ok(moved)
    }

    /// Ends the file behind the last slot in use.
    pub(super) fn cut(&mut self) -> Result<()> {
        let end = self.header.slot_at(self.slots.end());
        if !self.fixed_len && self.file_len > end {
            self.file.set_len(end)?;
            self.file_len = end;
        }
        Ok(())
    }

    /// Makes a header durable that moves things. If that fails nobody knows which one the file has.
    pub(super) fn switch_header(&mut self) -> Result<()> {
        let switched = self.write_header().and_then(|()| self.file.sync());
        self.adrift |= switched.is_err();
        switched
    }

    /// The file, for reading.
    pub(super) fn readable(&self) -> Arc<dyn Storage> {
        Arc::clone(&self.file) as Arc<dyn Storage>
    }
}
