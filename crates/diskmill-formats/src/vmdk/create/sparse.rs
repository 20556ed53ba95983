//! Disks in sparse files: tables in front, both copies, then grains in guest order.

use std::ops::Range;
use std::sync::Arc;

use diskmill_core::{
    Builder, Encoder, Error, ErrorKind, FileIndex, Finish, Format, GuestOffset, HostOffset, HostSpan, Result,
    Run, SECTOR, StorageMut, Stored, Writes, ZeroHow,
};

use super::{Placed, sync_all, text, write_text};
use crate::codec::UnitEncoder;
use crate::vmdk::header::{Flags, Grain, Header};
use crate::vmdk::map::sector;
use crate::vmdk::options::{GRAIN, Plan};

/// Entries of a grain table.
const GTES: u32 = 512;
/// Sectors of a grain table.
pub(in crate::vmdk) const TABLE_SECTORS: u64 = 4;
/// Bytes of the disk that a table covers.
const COVERS: u64 = GRAIN * GTES as u64;
/// Sectors an embedded descriptor has room for.
pub(in crate::vmdk) const TEXT_SECTORS: u64 = 20;

/// Where the tables of a file are, in sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::vmdk) struct Front {
    /// The redundant grain directory; its tables follow.
    pub(in crate::vmdk) rgd: u64,
    /// The grain directory; its tables follow.
    pub(in crate::vmdk) gd: u64,
    /// Sectors of a directory.
    pub(in crate::vmdk) gd_sectors: u64,
    /// How many tables there are.
    pub(in crate::vmdk) tables: u64,
    /// Where grains start.
    pub(in crate::vmdk) overhead: u64,
}

impl Front {
    /// The tables of a part of `len` bytes, behind `first` sectors.
    pub(in crate::vmdk) fn new(first: u64, len: u64) -> Result<Self> {
        let tables = len.div_ceil(COVERS);
        let gd_sectors = tables.saturating_mul(4).div_ceil(SECTOR);
        let copy = gd_sectors.saturating_add(tables.saturating_mul(TABLE_SECTORS));
        let gd = first.saturating_add(copy);
        let overhead = gd.saturating_add(copy).next_multiple_of(Grain::USUAL.sectors());
        if overhead >= u64::from(u32::MAX) {
            let text = format!("a sparse extent of {len} bytes needs more tables than its entries can name");
            return Err(Error::new(ErrorKind::Unsupported, text).format(Format::Vmdk));
        }
        Ok(Self {
            rgd: first,
            gd,
            gd_sectors,
            tables,
            overhead,
        })
    }

    /// Where table `index` of the directory at `directory` is.
    pub(in crate::vmdk) const fn table(&self, directory: u64, index: u64) -> u64 {
        directory
            .saturating_add(self.gd_sectors)
            .saturating_add(index.saturating_mul(TABLE_SECTORS))
    }

    /// The bytes of the directory at `directory`.
    fn directory(&self, directory: u64) -> Vec<u8> {
        (0..self.tables)
            .flat_map(|index| {
                // Below the overhead, which is.
                let at = u32::try_from(self.table(directory, index)).unwrap_or(u32::MAX);
                at.to_le_bytes()
            })
            .collect()
    }
}

/// A file being filled.
#[derive(Debug)]
struct Part {
    file: FileIndex,
    start: u64,
    len: u64,
    front: Front,
    /// The sector behind the last grain.
    next: u64,
    /// The table that is being filled.
    index: u64,
    table: Vec<u32>,
}

#[derive(Debug)]
pub(super) struct SparseBuilder {
    plan: Plan,
    files: Vec<Arc<dyn StorageMut>>,
    parts: Vec<Part>,
    placed: Placed,
}

impl SparseBuilder {
    pub(super) fn new(plan: Plan, files: Vec<Arc<dyn StorageMut>>) -> Result<Self> {
        let one = plan.subformat.is_one_file();
        let mut parts = Vec::with_capacity(plan.extents.len());
        for (index, extent) in plan.extents.iter().enumerate() {
            let file = if one { 0 } else { index.saturating_add(1) };
            let first = if one { TEXT_SECTORS.saturating_add(1) } else { 1 };
            let front = Front::new(first, extent.len)?;
            parts.push(Part {
                file: FileIndex(u16::try_from(file).unwrap_or(u16::MAX)),
                start: extent.start,
                len: extent.len,
                next: front.overhead,
                front,
                index: 0,
                table: vec![0; GTES as usize],
            });
            if let Some(file) = files.get(file)
                && file.hints().fixed_len
            {
                let need = front.overhead.saturating_mul(SECTOR);
                if file.len()? < need {
                    let text = format!("the device has {} bytes, the tables need {need}", file.len()?);
                    return Err(Error::new(ErrorKind::NoSpace, text).format(Format::Vmdk));
                }
                file.zero(HostOffset::ZERO..HostOffset::new(need), ZeroHow::KeepAllocated)?;
            }
        }
        if one && text::render(&plan).len() as u64 > TEXT_SECTORS * SECTOR {
            let text = "the descriptor has no room: the name of the backing file is too long";
            return Err(Error::new(ErrorKind::Usage, text).format(Format::Vmdk));
        }
        Ok(Self {
            plan,
            files,
            parts,
            placed: Placed::default(),
        })
    }

    fn is_device(&self, file: FileIndex) -> bool {
        self.files
            .get(usize::from(file.0))
            .is_some_and(|file| file.hints().fixed_len)
    }

    /// Gives all grains of `range` a place or a mark, and calls `put` for each run of them that has a place: the file,
    /// where in it and how many bytes.
    fn enter<'b>(
        &mut self,
        range: &Range<GuestOffset>,
        mark: Option<u32>,
        writes: &mut Writes<'b>,
        put: &mut dyn FnMut(FileIndex, HostOffset, u64, &mut Writes<'b>),
    ) -> Result<()> {
        self.placed.advance(range, GRAIN)?;
        let (mut at, end) = (range.start.get(), range.end.get());
        let first = self
            .parts
            .partition_point(|part| part.start.saturating_add(part.len) <= at);
        for part in self.parts.iter_mut().skip(first) {
            let stop = end.min(part.start.saturating_add(part.len));
            while at < stop {
                let local = at.saturating_sub(part.start);
                part.turn_to(local / COVERS, writes);
                let rest = COVERS.saturating_sub(local % COVERS);
                let len = rest.min(stop.saturating_sub(at));
                let host = sector(part.next);
                part.enter(local, len, mark)?;
                if mark.is_none() {
                    put(part.file, host, len, writes);
                }
                at = at.saturating_add(len);
            }
            if at >= end {
                break;
            }
        }
        Ok(())
    }
}

impl Part {
    /// Lets go of the table that is full, for table number `index`.
    fn turn_to(&mut self, index: u64, writes: &mut Writes<'_>) {
        if index == self.index {
            return;
        }
        if self.table.iter().any(|entry| *entry != 0) {
            let bytes: Vec<u8> = self.table.iter().flat_map(|entry| entry.to_le_bytes()).collect();
            for directory in [self.front.rgd, self.front.gd] {
                let at = sector(self.front.table(directory, self.index));
                writes.push(self.file, at, bytes.clone());
            }
        }
        self.table.fill(0);
        self.index = index;
    }

    /// Enters the grains of `len` bytes from byte `local`, all in the table at hand: `mark`, or the next places.
    fn enter(&mut self, local: u64, len: u64, mark: Option<u32>) -> Result<()> {
        let first = usize::try_from(local % COVERS / GRAIN).unwrap_or(usize::MAX);
        let count = usize::try_from(len.div_ceil(GRAIN)).unwrap_or(usize::MAX);
        for entry in self.table.iter_mut().skip(first).take(count) {
            *entry = match mark {
                Some(mark) => mark,
                None => {
                    let at = self.next;
                    self.next = at.saturating_add(Grain::USUAL.sectors());
                    u32::try_from(at).map_err(|_| full())?
                }
            };
        }
        Ok(())
    }
}

pub(in crate::vmdk) fn full() -> Error {
    let text = "a sparse extent cannot hold more than 2 TiB of data: its tables count sectors in 32 bits";
    Error::new(ErrorKind::NoSpace, text).format(Format::Vmdk)
}

impl Builder for SparseBuilder {
    fn unit(&self) -> u64 {
        GRAIN
    }

    fn files(&self) -> &[Arc<dyn StorageMut>] {
        &self.files
    }

    fn encoder(&self) -> Result<Box<dyn Encoder>> {
        Ok(Box::new(UnitEncoder::new(None)?))
    }

    fn place<'b>(&mut self, at: GuestOffset, stored: Stored<'b>, writes: &mut Writes<'b>) -> Result<()> {
        let Stored::Plain(bytes) = stored else {
            return Err(Error::new(ErrorKind::Usage, "this image holds no packed units"));
        };
        let range = at..at.plus(bytes.len() as u64)?;
        let mut rest = bytes;
        self.enter(&range, None, writes, &mut |file, at, len, writes| {
            let len = usize::try_from(len).unwrap_or(usize::MAX);
            let (now, later) = rest.split_at_checked(len).unwrap_or((rest, &[]));
            writes.push(file, at, now);
            rest = later;
        })
    }

    fn place_run<'b>(&mut self, range: Range<GuestOffset>, what: Run, writes: &mut Writes<'b>) -> Result<()> {
        let hides = what == Run::Zero && self.plan.parent.is_some();
        if !hides {
            return self.enter(&range, Some(0), writes, &mut |_, _, _, _| ());
        }
        if self.plan.zeroed {
            return self.enter(&range, Some(1), writes, &mut |_, _, _, _| ());
        }
        // Without a mark for them zeros need a place to hide what is below; in a new file that is a hole.
        let mut stale = Vec::new();
        self.enter(&range, None, writes, &mut |file, at, len, _| {
            stale.push((file, at, len))
        })?;
        for (file, at, len) in stale {
            if self.is_device(file) {
                writes.push_zero(file, at..at.plus(len)?, ZeroHow::KeepAllocated);
            }
        }
        Ok(())
    }

    fn reserve<'b>(
        &mut self,
        range: Range<GuestOffset>,
        writes: &mut Writes<'b>,
    ) -> Result<Option<HostSpan>> {
        let (start, end) = (range.start.get(), range.end.get());
        let inside = self
            .parts
            .iter()
            .any(|part| part.start <= start && end <= part.start.saturating_add(part.len));
        if !inside || start == end {
            return Ok(None);
        }
        let mut span: Option<HostSpan> = None;
        self.enter(&range, None, writes, &mut |file, at, len, _| match &mut span {
            // Grains of one file follow one another.
            Some(span) => span.len = span.len.saturating_add(len),
            None => span = Some(HostSpan { file, at, len }),
        })?;
        Ok(span)
    }

    fn finish(mut self: Box<Self>, end: Finish) -> Result<()> {
        let one = self.plan.subformat.is_one_file();
        let mut writes = Writes::new();
        for part in &mut self.parts {
            part.turn_to(u64::MAX, &mut writes);
            for directory in [part.front.rgd, part.front.gd] {
                writes.push(part.file, sector(directory), part.front.directory(directory));
            }
        }
        writes.perform(&self.files)?;
        for part in &self.parts {
            let Some(file) = self.files.get(usize::from(part.file.0)) else {
                continue;
            };
            let len = part.next.saturating_mul(SECTOR);
            if !file.hints().fixed_len && file.len()? != len {
                file.set_len(len)?;
            }
            let zeroed = if self.plan.zeroed { Flags::ZERO_GRAIN } else { 0 };
            let header = Header {
                version: if self.plan.zeroed { 2 } else { 1 },
                flags: Flags(Flags::CHECKED | Flags::REDUNDANT | zeroed),
                capacity: part.len / SECTOR,
                grain: Grain::USUAL,
                descriptor: one.then_some((1, TEXT_SECTORS)),
                gtes: GTES,
                rgd: Some(part.front.rgd),
                gd: Some(part.front.gd),
                overhead: part.front.overhead,
                unclean: false,
            };
            if one {
                let text = text::render(&self.plan);
                file.write_at(sector(1), text.as_bytes())?;
            }
            file.write_at(HostOffset::ZERO, &header.to_bytes())?;
        }
        if let (false, Some(main)) = (one, self.files.first()) {
            write_text(&self.plan, main)?;
        }
        sync_all(&self.files, end)
    }
}
