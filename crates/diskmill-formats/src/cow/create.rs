//! New images, filled in guest order.
//!
//! Every sector has its place from the start, so data may come from anywhere at any time. Of the bitmap only the page that
//! is being filled is held: those before it are written, since guest bytes come in rising order.

use std::ops::Range;
use std::sync::Arc;

use diskmill_core::{
    BackingName, Builder, CreateSpec, DataRuns, Durability, Encoder, Error, ErrorKind, FileIndex, FilesMut,
    Finish, Format, GuestOffset, HostOffset, HostSpan, Measure, OptionError, OptionKind, OptionSpec,
    OutputSpec, Result, Run, SECTOR, StorageMut, Stored, Writes, ZeroHow,
};

use super::has_protocol;
use super::header::{Header, HeaderError};
use super::layout::{NAME_LEN, SIZE_MAX};
use super::map::{Geometry, PAGE, fill, sectors};
use crate::codec::UnitEncoder;

/// The step in which data is taken: a page, below which no file system keeps holes.
const UNIT: u64 = 4096;

/// The options of a new image, in the order `create` prints them.
pub(super) static OPTIONS: &[OptionSpec] = &[
    OptionSpec {
        name: "size",
        kind: OptionKind::Size,
        default: None,
        help: "Bytes of the virtual disk",
    },
    OptionSpec {
        name: "backing_file",
        kind: OptionKind::Text,
        default: None,
        help: "The image that shows where nothing was written: a path",
    },
    OptionSpec {
        name: "backing_fmt",
        kind: OptionKind::Text,
        default: None,
        help: "Format of that image; it is not kept in this one, and guessed whenever it is opened",
    },
];

/// The bytes of a name that an image can have for what it is backed by.
pub(super) fn backing(backing: Option<&BackingName>) -> Result<Option<Vec<u8>>> {
    let Some(backing) = backing else {
        return Ok(None);
    };
    let refuse = |text: String| Err(Error::from(OptionError::Conflict(text)).format(Format::Cow));
    let name = backing.name.as_bytes();
    if name.is_empty() || name.len() >= NAME_LEN || name.contains(&0) {
        return refuse(format!(
            "the name of the backing file has {} bytes, must have 1 to {} and no NUL among them",
            name.len(),
            NAME_LEN - 1
        ));
    }
    if has_protocol(&backing.name) {
        return refuse(format!(
            "the backing file is '{}', must be a plain path (./ in front of it makes one)",
            backing.name
        ));
    }
    Ok(Some(name.to_vec()))
}

/// `size` up to a whole sector, if a disk can have it.
pub(super) fn whole_sectors(size: u64) -> Result<u64> {
    match size.checked_next_multiple_of(SECTOR) {
        Some(whole) if (SECTOR..=SIZE_MAX).contains(&whole) => Ok(whole),
        _ => Err(Error::new(ErrorKind::Unsupported, HeaderError::Size(size)).format(Format::Cow)),
    }
}

/// The header of a new image, if it can be made.
fn plan(spec: &CreateSpec) -> Result<Header> {
    spec.options.only(OPTIONS)?;
    if spec.compression.is_some() {
        return Err(Error::new(ErrorKind::Unsupported, "cow images are not compressed").format(Format::Cow));
    }
    let size = whole_sectors(spec.virtual_size)?;
    Ok(Header::new(size, backing(spec.backing.as_ref())?))
}

/// See [`Driver::outputs`](diskmill_core::Driver::outputs).
pub(super) fn outputs(spec: &CreateSpec) -> Result<Vec<OutputSpec>> {
    plan(spec)?;
    Ok(vec![OutputSpec::main()])
}

/// See [`Driver::measure`](diskmill_core::Driver::measure). An image ends behind the last sector that is in it.
pub(super) fn measure(spec: &CreateSpec, data: Option<&mut dyn DataRuns>) -> Result<Measure> {
    let geometry = plan(spec)?.geometry();
    let mut required = geometry.bitmap_end();
    if let Some(runs) = data {
        while let Some(run) = runs.next_run()? {
            if run.start < run.end {
                let end = geometry.host(run.end).get().next_multiple_of(SECTOR);
                required = required.max(end.min(geometry.end()));
            }
        }
    }
    Ok(Measure {
        required,
        fully_allocated: geometry.end(),
        bitmaps: None,
    })
}

/// See [`Driver::build`](diskmill_core::Driver::build).
pub(super) fn build(spec: &CreateSpec, files: FilesMut) -> Result<Box<dyn Builder>> {
    let header = plan(spec)?;
    let geometry = header.geometry();
    let files: Vec<_> = files.into_iter().map(|(_, file)| file).collect();
    let [file] = files.as_slice() else {
        let text = format!("a cow image has 1 file, got {}", files.len());
        return Err(Error::new(ErrorKind::Usage, text).format(Format::Cow));
    };
    let hints = file.hints();
    if hints.append_only {
        let text = "cow cannot be written to a pipe: its bitmap comes before the data it tells of";
        return Err(Error::new(ErrorKind::Unsupported, text).format(Format::Cow));
    }
    let room = match hints.fixed_len {
        true => file.len()?,
        false => u64::MAX,
    };
    check_room(room, geometry.bitmap_end())?;
    if hints.fixed_len {
        // An old header must not make an image of a half-written bitmap.
        file.zero(HostOffset::ZERO..HostOffset::new(SECTOR), ZeroHow::KeepAllocated)?;
    }
    Ok(Box::new(CowBuilder {
        stale: hints.fixed_len,
        room,
        placed: GuestOffset::ZERO,
        end: 0,
        page: 0,
        bits: Vec::new(),
        header,
        geometry,
        files,
    }))
}

fn check_room(have: u64, need: u64) -> Result<()> {
    if need <= have {
        return Ok(());
    }
    let text = format!("the device has {have} bytes, the image needs {need}");
    Err(Error::new(ErrorKind::NoSpace, text).format(Format::Cow))
}

#[derive(Debug)]
struct CowBuilder {
    header: Header,
    geometry: Geometry,
    files: Vec<Arc<dyn StorageMut>>,
    /// Whether the storage may hold old bytes where nothing is written.
    stale: bool,
    /// Bytes the file can have.
    room: u64,
    /// All guest bytes below are placed.
    placed: GuestOffset,
    /// Where the last sector that is in the file ends.
    end: u64,
    /// The page of the bitmap that is being filled: pages before it have been written.
    page: u64,
    /// Its bytes; empty as long as none is set.
    bits: Vec<u8>,
}

impl CowBuilder {
    /// Moves on over `range`, if it is the next. Sectors will do.
    fn advance(&mut self, range: &Range<GuestOffset>) -> Result<()> {
        let start = range.start;
        if start != self.placed || range.end < start || !start.is_aligned(SECTOR) {
            let text = format!(
                "bytes {start} to {} are placed, must start at {} and at a multiple of {SECTOR}",
                range.end, self.placed
            );
            return Err(Error::new(ErrorKind::Usage, text).format(Format::Cow));
        }
        if range.end.get() > self.geometry.size().next_multiple_of(UNIT) {
            let text = format!(
                "bytes up to {} are placed, the disk has {}",
                range.end,
                self.geometry.size()
            );
            return Err(Error::new(ErrorKind::Usage, text).format(Format::Cow));
        }
        self.placed = range.end;
        Ok(())
    }

    /// Where page `page` of the bitmap is in the file.
    fn page_range(&self, page: u64) -> Range<HostOffset> {
        let at = |page: u64| {
            let within = page.saturating_mul(PAGE).min(self.geometry.bitmap_len());
            HostOffset::new(self.geometry.bitmap_at()).saturating_add(within)
        };
        at(page)..at(page.saturating_add(1))
    }

    /// Writes the page that was being filled and goes on with `page`.
    fn turn_to(&mut self, page: u64, writes: &mut Writes<'_>) {
        if page <= self.page {
            return;
        }
        let done = self.page_range(self.page);
        match std::mem::take(&mut self.bits) {
            bits if bits.is_empty() && self.stale => {
                writes.push_zero(FileIndex::MAIN, done.clone(), ZeroHow::KeepAllocated);
            }
            bits if bits.is_empty() => {}
            bits => writes.push(FileIndex::MAIN, done.start, bits),
        }
        let next = self.page_range(page).start;
        if self.stale && done.end < next {
            writes.push_zero(FileIndex::MAIN, done.end..next, ZeroHow::KeepAllocated);
        }
        self.page = page;
    }

    /// Says that the bytes of `range` are in the file. Returns where the first is.
    fn mark(&mut self, range: &Range<GuestOffset>, writes: &mut Writes<'_>) -> Result<HostOffset> {
        let host = self.geometry.host(range.start);
        let end = self.geometry.host(range.end).get().next_multiple_of(SECTOR);
        check_room(self.room, end)?;
        let sectors = sectors(range.start, range.end.since(range.start));
        let mut at = sectors.start;
        while at < sectors.end {
            let page = at / (PAGE * 8);
            self.turn_to(page, writes);
            if self.bits.is_empty() {
                let place = self.page_range(page);
                self.bits
                    .resize(usize::try_from(place.end.since(place.start)).unwrap_or(0), 0);
            }
            let first = page.saturating_mul(PAGE * 8);
            let page_end = first.saturating_add(PAGE * 8).min(sectors.end);
            fill(
                &mut self.bits,
                at.saturating_sub(first)..page_end.saturating_sub(first),
            );
            at = page_end;
        }
        self.end = self.end.max(end);
        Ok(host)
    }
}

impl Builder for CowBuilder {
    fn unit(&self) -> u64 {
        UNIT
    }

    fn files(&self) -> &[Arc<dyn StorageMut>] {
        &self.files
    }

    fn encoder(&self) -> Result<Box<dyn Encoder>> {
        Ok(Box::new(UnitEncoder::new(None)?))
    }

    fn place<'b>(&mut self, at: GuestOffset, stored: Stored<'b>, writes: &mut Writes<'b>) -> Result<()> {
        let Stored::Plain(bytes) = stored else {
            return Err(Error::new(ErrorKind::Usage, "cow images hold no packed units").format(Format::Cow));
        };
        let range = at..at.plus(bytes.len() as u64)?;
        self.advance(&range)?;
        if !bytes.is_empty() {
            let host = self.mark(&range, writes)?;
            writes.push(FileIndex::MAIN, host, bytes);
        }
        Ok(())
    }

    fn place_run<'b>(&mut self, range: Range<GuestOffset>, what: Run, writes: &mut Writes<'b>) -> Result<()> {
        self.advance(&range)?;
        // Without anything below, what is not there is zeros.
        if what == Run::Zero && self.header.backing.is_some() && range.start < range.end {
            let host = self.mark(&range, writes)?;
            if self.stale {
                let end = host.plus(range.end.since(range.start))?;
                writes.push_zero(FileIndex::MAIN, host..end, ZeroHow::MayUnmap);
            }
        }
        Ok(())
    }

    fn reserve<'b>(
        &mut self,
        range: Range<GuestOffset>,
        writes: &mut Writes<'b>,
    ) -> Result<Option<HostSpan>> {
        if range.is_empty() {
            return Ok(None);
        }
        self.advance(&range)?;
        Ok(Some(HostSpan {
            file: FileIndex::MAIN,
            at: self.mark(&range, writes)?,
            len: range.end.since(range.start),
        }))
    }

    fn finish(mut self: Box<Self>, end: Finish) -> Result<()> {
        let size = match end.final_size {
            Some(size) => whole_sectors(size)?,
            None => self.header.size,
        };
        if size != self.header.size {
            let text = format!(
                "a disk of {size} bytes was announced as one of {}",
                self.header.size
            );
            return Err(Error::new(ErrorKind::Usage, text).format(Format::Cow));
        }
        if self.placed.get() < size {
            let text = format!("the image ends at {}, must be filled up to {size}", self.placed);
            return Err(Error::new(ErrorKind::Usage, text).format(Format::Cow));
        }
        let mut writes = Writes::new();
        let pages = self.geometry.bitmap_len().div_ceil(PAGE);
        self.turn_to(pages, &mut writes);
        let gap = HostOffset::new(self.geometry.bitmap_end())
            ..HostOffset::new(self.geometry.data_at().min(self.room));
        if self.stale && gap.start < gap.end {
            // Old bytes there would look like bits of sectors that do not exist.
            writes.push_zero(FileIndex::MAIN, gap, ZeroHow::KeepAllocated);
        }
        writes.perform(&self.files)?;
        let head = self.header.to_bytes();
        let (first, rest) = head.split_at_checked(512).unwrap_or((&head, &[]));
        for file in &self.files {
            let len = self.end.max(self.geometry.bitmap_end());
            if !self.stale && file.len()? < len {
                file.set_len(len)?;
            }
            file.write_at(HostOffset::new(SECTOR), rest)?;
            if end.durability == Durability::Synced {
                file.sync()?;
            }
            // The magic number comes last.
            file.write_at(HostOffset::ZERO, first)?;
            if end.durability == Durability::Synced {
                file.sync()?;
            }
        }
        Ok(())
    }
}
