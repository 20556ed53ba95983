//! Making the files smaller: grains of zeros give up their places, the last grains move down into free ones, and each
//! file ends behind the last. Flat extents keep their length; their zeros become holes of the host.
//!
//! 1. The disk is checked; anything worse than a leak, and it is left alone. Copies of tables that are out of date are
//!    made the same.
//! 2. Entries of grains that hold zeros say so; durable. From here on their places are free.
//! 3. Grains behind the space that all of them need are copied to free places below; flush; their entries name these;
//!    flush. That goes on in batches. The old places are not used again, so either copy of a table is right meanwhile.
//! 4. The file is cut.
//!
//! Places are as large as a grain and at multiples of that, as writers put them; a grain at an odd place takes two. A
//! bit for each is kept in memory, beside the tables. A dry run does all this to a [sketch](crate::sketch), but copies
//! nothing.

use std::sync::Arc;

use diskmill_core::{
    CompactReport, CompactSpec, Error, ErrorKind, Files, FilesMut, Format, HostOffset, HostRun, Job, Result,
    SECTOR, Storage, StorageMut, ZeroHow,
};

use super::VmdkImage;
use super::check;
use super::create::full;
use super::descriptor::{Access, NO_PARENT};
use super::layer::{Body, Part, open_parts};
use super::layout::COWD_NEXT_FREE;
use super::map::{Kind, sector, up};
use super::parts::{BodyMut, PartMut, tables_of, to_mut, to_usize};
use super::sparse::Dialect;
use super::tables::Tables;
use crate::codec::is_zero;
use crate::sketch::Sketch;
use crate::slots::Slots;
use crate::sparse::punch_zeros;

/// Bytes that are moved between two flushes, at least.
const BATCH: u64 = 16 << 20;

/// Why a disk is not compacted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum CompactError {
    #[error("the image has {0} errors and is not compacted before they are put right (check --repair all)")]
    Corrupt(u64),
    #[error("an image that is written in place stores nothing compressed: convert it to streamOptimized")]
    Compress,
    #[error("streamOptimized images cannot be compacted: they are written once, convert them anew")]
    Stream,
    #[error("seSparse extents cannot be compacted: they are only read")]
    SeSparse,
    #[error("a disk whose changes VMware tracks in a further file cannot be compacted")]
    Tracked,
    #[error("extent {0} is in the same file as another, so that neither can be moved")]
    OneFile(usize),
}

impl From<CompactError> for Error {
    fn from(error: CompactError) -> Self {
        let kind = match error {
            CompactError::Corrupt(_) => ErrorKind::Corrupt,
            _ => ErrorKind::Unsupported,
        };
        Error::new(kind, error).format(Format::Vmdk)
    }
}

/// Compacts the disk in `files`. What it reads as stays the same, and so does its content id.
pub(super) fn run(
    image: &VmdkImage,
    files: FilesMut,
    spec: &CompactSpec,
    job: Job<'_>,
) -> Result<CompactReport> {
    let files: Vec<_> = files.into_iter().map(|(_, file)| file).collect();
    compact(image, &files, spec, job, false)
}

/// Says what [`run`] would come to.
pub(super) fn plan(
    image: &VmdkImage,
    files: Files,
    spec: &CompactSpec,
    job: Job<'_>,
) -> Result<CompactReport> {
    let mut sketches: Vec<Arc<dyn StorageMut>> = Vec::new();
    for (_, file) in files {
        sketches.push(Arc::new(Sketch::new(file)?));
    }
    compact(image, &sketches, spec, job, true)
}

fn compact(
    image: &VmdkImage,
    files: &[Arc<dyn StorageMut>],
    spec: &CompactSpec,
    job: Job<'_>,
    dry: bool,
) -> Result<CompactReport> {
    if spec.compress.is_some() {
        return Err(CompactError::Compress.into());
    }
    if image.descriptor.tracked {
        return Err(CompactError::Tracked.into());
    }
    let readable: Vec<Arc<dyn Storage>> = files
        .iter()
        .map(|file| Arc::clone(file) as Arc<dyn Storage>)
        .collect();
    let parts = open_parts(image, &readable)?;
    refuse(&parts)?;
    let found = check::look(image, &readable, job)?;
    let errors = found.corruptions.saturating_add(found.check_errors);
    if errors > 0 {
        return Err(CompactError::Corrupt(errors).into());
    }
    let mut report = CompactReport::default();
    for file in files {
        report.len_before = report.len_before.saturating_add(file.len()?);
        report.fixed_len |= file.hints().fixed_len;
    }
    report.len_after = report.len_before;
    let mut own = Vec::new();
    for part in parts.into_iter().filter(|part| part.access == Access::ReadWrite) {
        let part = to_mut(part, files)?;
        if let Some(mut tables) = tables_of(&part) {
            tables.demand_sound()?;
        }
        own.push(part);
    }
    let total = own.iter().fold(0_u64, |sum, part| sum.saturating_add(part.len));
    job.observer.total(total);
    // A parent may be found by its content id alone.
    let alone = image.descriptor.parent.is_none() && image.descriptor.parent_cid == NO_PARENT;
    for part in own {
        match &part.body {
            BodyMut::Zero => {}
            BodyMut::Flat { storage, at, .. } => {
                let end = at.plus(part.len)?.get();
                let punched = punch_zeros(&**storage, at.get()..end, dry, job)?;
                storage.sync()?;
                report.zeros = report.zeros.saturating_add(punched);
                report.punched = report.punched.saturating_add(punched);
            }
            BodyMut::Sparse { .. } => sparse(&part, alone, job, dry, &mut report)?,
        }
    }
    Ok(report)
}

/// Fails if there is an extent that cannot be compacted.
fn refuse(parts: &[Part]) -> Result<()> {
    let file = |part: &Part| match &part.body {
        Body::Flat { file, .. } => Some((*file, false)),
        Body::Sparse(sparse) => Some((sparse.file, true)),
        Body::Zero => None,
    };
    let mut seen: Vec<_> = parts
        .iter()
        .enumerate()
        .filter_map(|(index, part)| file(part).map(|(file, sparse)| (file.0, sparse, index)))
        .collect();
    seen.sort_unstable();
    for pair in seen.windows(2) {
        if let [(first, _, _), (next, true, index)] = pair
            && first == next
        {
            return Err(CompactError::OneFile(*index).into());
        }
    }
    for part in parts {
        if let Body::Sparse(sparse) = &part.body {
            match sparse.dialect {
                Dialect::Hosted { packed: true, .. } => return Err(CompactError::Stream.into()),
                Dialect::Se { .. } => return Err(CompactError::SeSparse.into()),
                Dialect::Hosted { .. } | Dialect::Cowd => {}
            }
        }
    }
    Ok(())
}

fn sparse(part: &PartMut, alone: bool, job: Job<'_>, dry: bool, report: &mut CompactReport) -> Result<()> {
    let Some(mut tables) = tables_of(part) else {
        return Ok(());
    };
    let file_len = tables.storage.len()?;
    let header = part.header.as_ref();
    let mut work = Work {
        empty: match tables.marks_zeros() {
            true => Some(1),
            false => alone.then_some(0),
        },
        limit: header.map_or(u64::MAX, |header| header.capacity.saturating_mul(SECTOR)),
        sectors: (tables.geometry.grain / SECTOR).max(1),
        tables: &mut tables,
        file_len,
        buf: Vec::new(),
        job,
        dry,
    };
    work.release(report)?;
    let end = work.slide(report)?;
    let after = work.cut(end)?;
    report.len_after = report.len_after.saturating_sub(file_len.saturating_sub(after));
    Ok(())
}

/// One extent.
struct Work<'a> {
    tables: &'a mut Tables,
    file_len: u64,
    /// What the entry of a grain of zeros becomes; `None` where its place is all that hides the parent.
    empty: Option<u32>,
    /// No entry counts from this byte of the extent on.
    limit: u64,
    /// Sectors of a grain.
    sectors: u64,
    buf: Vec<u8>,
    job: Job<'a>,
    dry: bool,
}

impl Work<'_> {
    /// Calls `each` with the byte and the place of each grain that has one.
    fn each(&mut self, mut each: impl FnMut(&mut Self, u64, HostOffset) -> Result<()>) -> Result<()> {
        let geometry = self.tables.geometry;
        for index in 0..self.tables.directory.len() {
            self.job.check()?;
            let Some(bytes) = self.tables.bytes(index)? else {
                continue;
            };
            let mut at = (index as u64).saturating_mul(geometry.table_covers());
            for entry in bytes.chunks_exact(geometry.entry_len) {
                if let Kind::Data(host) = self.tables.dialect.kind(entry)? {
                    each(self, at, host)?;
                }
                at = at.saturating_add(geometry.grain);
            }
        }
        Ok(())
    }

    /// The place that `host` is in.
    fn slot(&self, host: HostOffset) -> u32 {
        let slot = (host.get() / SECTOR).checked_div(self.sectors).unwrap_or(0);
        u32::try_from(slot).unwrap_or(u32::MAX)
    }

    /// The first sector of a place.
    fn slot_at(&self, slot: u32) -> u64 {
        u64::from(slot).saturating_mul(self.sectors)
    }

    fn is_odd(&self, host: HostOffset) -> bool {
        !(host.get() / SECTOR).is_multiple_of(self.sectors)
    }

    /// Adds all places that the grain at `host` has a part of.
    fn occupy(&self, slots: &mut Slots, host: HostOffset) {
        let slot = self.slot(host);
        slots.add(slot);
        if self.is_odd(host) {
            slots.add(slot.saturating_add(1));
        }
    }

    /// Whether tables leave a place to grains.
    fn is_room(&self, slot: u32) -> bool {
        !self.tables.hits_tables(self.slot_at(slot))
    }

    /// Gives up the places of grains that hold zeros, and of entries behind the end of the disk.
    fn release(&mut self, report: &mut CompactReport) -> Result<()> {
        let geometry = self.tables.geometry;
        for index in 0..self.tables.directory.len() {
            self.tables.renew_copy(index)?;
            self.relieve()?;
        }
        self.tables.write_back()?;
        let mut taken = Slots::default();
        let (mut done, mut zeros) = (0, 0_u64);
        self.each(|work, at, host| {
            work.job.check()?;
            let shown = geometry.disk.saturating_sub(at).min(geometry.grain);
            let now = at.saturating_add(shown).max(done);
            work.job.observer.advance(now.saturating_sub(done));
            done = now;
            if shown == 0 && (at >= work.limit || host.get() >= work.file_len) {
                work.tables.set(at, 0)?;
                return work.relieve();
            }
            work.occupy(&mut taken, host);
            if let Some(empty) = work.empty
                && shown > 0
                && work.is_zero(host, shown)?
            {
                zeros = zeros.saturating_add(geometry.grain);
                work.tables.set(at, empty)?;
                work.relieve()?;
            }
            Ok(())
        })?;
        self.job.observer.advance(geometry.disk.saturating_sub(done));
        self.tables.write_back()?;
        let places = match self.tables.storage.hints().fixed_len {
            true => taken.end(),
            false => self.slot(HostOffset::new(self.file_len)),
        };
        let leaked = (0..places).filter(|slot| !taken.has(*slot) && self.is_room(*slot));
        report.leaked = report
            .leaked
            .saturating_add((leaked.count() as u64).saturating_mul(geometry.grain));
        report.zeros = report.zeros.saturating_add(zeros);
        Ok(())
    }

    /// Writes tables back if many have changed.
    fn relieve(&mut self) -> Result<()> {
        match self.tables.is_full() {
            true => self.tables.write_back(),
            false => Ok(()),
        }
    }

    /// Whether the first `len` bytes of the grain at `host` are zeros.
    fn is_zero(&mut self, host: HostOffset, len: u64) -> Result<bool> {
        let storage = &self.tables.storage;
        if matches!(storage.run_at(host)?, HostRun::Hole(hole) if hole >= len) {
            return Ok(true);
        }
        self.buf.resize(to_usize(len), 0);
        storage.read_padded(host, &mut self.buf)?;
        Ok(is_zero(&self.buf))
    }

    /// Moves the last grains into free places until that gains nothing. Returns the sector behind all that is left.
    fn slide(&mut self, report: &mut CompactReport) -> Result<u64> {
        loop {
            let mut kept = Slots::default();
            let mut end = self.tables.tables_end();
            self.each(|work, _, host| {
                work.occupy(&mut kept, host);
                end = end.max((host.get() / SECTOR).saturating_add(work.sectors));
                Ok(())
            })?;
            let moved = self.fill(&kept)?;
            report.moved = report
                .moved
                .saturating_add(moved.saturating_mul(self.tables.geometry.grain));
            // Grains at odd places need fewer than they had, so that there may be room again.
            if moved == 0 {
                return Ok(end);
            }
        }
    }

    /// The place from which on all grains find room below.
    fn bound(&self, kept: &Slots) -> u32 {
        let (mut above, mut free) = (kept.count(), 0_u32);
        for slot in 0..kept.end() {
            if free >= above {
                return slot;
            }
            if kept.has(slot) {
                above = above.saturating_sub(1);
            } else if self.is_room(slot) {
                free = free.saturating_add(1);
            }
        }
        kept.end()
    }

    /// Moves grains into places that are not in `kept`. Returns how many.
    fn fill(&mut self, kept: &Slots) -> Result<u64> {
        let bound = self.bound(kept);
        let (mut next, mut moved, mut waiting) = (0, 0_u64, 0_u64);
        self.each(|work, at, host| {
            if work.slot(host) < bound {
                return Ok(());
            }
            work.job.check()?;
            let mut to = kept.free_from(next);
            while to < bound && !work.is_room(to) {
                to = kept.free_from(to.saturating_add(1));
            }
            next = to;
            if to >= bound {
                return Ok(());
            }
            let number = u32::try_from(work.slot_at(to)).map_err(|_| full())?;
            work.copy(host, sector(number.into()))?;
            work.tables.set(at, number)?;
            next = to.saturating_add(1);
            moved = moved.saturating_add(1);
            waiting = waiting.saturating_add(work.tables.geometry.grain);
            if waiting >= BATCH || work.tables.is_full() {
                work.tables.write_back()?;
                waiting = 0;
            }
            Ok(())
        })?;
        self.tables.write_back()?;
        Ok(moved)
    }

    fn copy(&mut self, from: HostOffset, to: HostOffset) -> Result<()> {
        if self.dry {
            return Ok(());
        }
        let grain = self.tables.geometry.grain;
        let storage = &self.tables.storage;
        self.buf.resize(to_usize(grain), 0);
        storage.read_padded(from, &mut self.buf)?;
        match is_zero(&self.buf) {
            true => storage.zero(to..to.plus(grain)?, ZeroHow::MayUnmap),
            false => storage.write_at(to, &self.buf),
        }
    }

    /// Ends the file at sector `end`. Returns how long it is then, or how much of it is in use.
    fn cut(&mut self, end: u64) -> Result<u64> {
        self.tables.next = up(end, self.sectors);
        let storage = &self.tables.storage;
        if self.tables.dialect == Dialect::Cowd {
            let next = u32::try_from(self.tables.next).map_err(|_| full())?;
            storage.write_at(HostOffset::new(COWD_NEXT_FREE), &next.to_le_bytes())?;
            storage.sync()?;
        }
        let end = self.tables.next.saturating_mul(SECTOR);
        if !storage.hints().fixed_len && self.file_len > end {
            storage.set_len(end)?;
            storage.sync()?;
        }
        Ok(self.file_len.min(end))
    }
}
