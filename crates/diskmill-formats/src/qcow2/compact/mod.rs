//! Compacting: the file becomes as small as what the image holds, in place.
//!
//! 1. The image is checked. Leaks are given back, an image that was not closed is repaired; anything worse, and it is
//!    left alone.
//! 2. What reads as zeros gives up its space ([`reclaim`]).
//! 3. If asked, what is stored plain is compressed ([`pack`]).
//! 4. What lies behind the space all of it needs is moved to free places below ([`slide`]), and the file ends there.
//!
//! Only the refcounts and what refers to a cluster are looked at, a table at a time; nothing but clusters with several
//! references is kept in memory. The order of writes is in [`work`]. A dry run does the same to a [sketch](crate::sketch) of the file,
//! so that it comes to the same result.

mod bitmaps;
mod data;
mod pack;
mod reclaim;
mod room;
mod slide;
mod work;

use std::sync::Arc;

use diskmill_core::{
    CheckReport, CompactReport, CompactSpec, Error, ErrorKind, Files, FilesMut, Format, HostOffset, Job,
    OpenSpec, Parsed, Repair, Result, Silent, Storage, StorageMut,
};

use super::Qcow2Image;
use super::crypto::{EncryptionError, Sealing};
use super::header::{Header, Incompatible};
use super::layer::data_index;
use crate::sketch::Sketch;
use work::Work;

/// Where the header keeps its incompatible features.
const HEADER_INCOMPATIBLE_AT: u64 = 72;
/// Where the header keeps its autoclear features.
const HEADER_AUTOCLEAR_AT: u64 = 88;

/// Why an image is not compacted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum CompactError {
    #[error(
        "the image has {errors} errors and is not compacted before they are put right (check --repair all)"
    )]
    Corrupt { errors: u64 },
    #[error("the image cannot be checked in {errors} places and is not compacted (see check)")]
    Unchecked { errors: u64 },
    #[error("the image is marked corrupt and is not compacted before it is repaired (check --repair all)")]
    MarkedCorrupt,
    #[error("compressed clusters are not supported with an external data file")]
    PackedInDataFile,
}

fn refuse(kind: ErrorKind, error: CompactError) -> Error {
    Error::new(kind, error).format(Format::Qcow2)
}

/// Compacts the image in `files`.
pub(super) fn run(
    image: &Qcow2Image,
    files: FilesMut,
    how: &OpenSpec,
    spec: &CompactSpec,
    job: Job<'_>,
) -> Result<CompactReport> {
    compact(image, files, how, spec, job, false)
}

/// Says what [`run`] would come to.
pub(super) fn plan(
    image: &Qcow2Image,
    files: Files,
    how: &OpenSpec,
    spec: &CompactSpec,
    job: Job<'_>,
) -> Result<CompactReport> {
    let mut sketches: FilesMut = Vec::new();
    for (role, file) in files {
        sketches.push((role, Arc::new(Sketch::new(file)?)));
    }
    compact(image, sketches, how, spec, job, true)
}

fn compact(
    image: &Qcow2Image,
    files: FilesMut,
    how: &OpenSpec,
    spec: &CompactSpec,
    job: Job<'_>,
    dry: bool,
) -> Result<CompactReport> {
    let header = image.header();
    if header.incompatible.has(Incompatible::CORRUPT) {
        return Err(refuse(ErrorKind::Corrupt, CompactError::MarkedCorrupt));
    }
    if header.has_data_file() && spec.compress.is_some() {
        return Err(refuse(ErrorKind::Unsupported, CompactError::PackedInDataFile));
    }
    let (_, main) = files
        .first()
        .cloned()
        .ok_or_else(|| Error::new(ErrorKind::Usage, "an image needs a file"))?;
    let sealing = Sealing::of(header, main.as_ref(), how)?;
    // What moves is encrypted for its new place, and zeros are to be told.
    if sealing.cipher()?.is_some() && spec.compress.is_some() {
        return Err(EncryptionError::Compressed.refuse());
    }
    let len_before = main.len()?;
    let leaks = sound(header, &main, &files, how, job)?;
    let data_index = data_index(header, files.iter().map(|(role, _)| *role))?;
    let data = match header.has_data_file() {
        true => files
            .get(usize::from(data_index.0))
            .map(|(_, file)| Arc::clone(file)),
        false => None,
    };
    let header = super::read_header(main.as_ref())?;
    let mut work = Work::new(header, main, data, sealing, dry, job)?;
    work.report.len_before = len_before;
    work.report.leaked = leaks.saturating_mul(work.cluster());
    let done = work.all(spec, leaks > 0);
    if done.is_err() {
        work.abandon();
    }
    done?;
    Ok(work.report)
}

/// Fails unless the image is sound but for leaks, which are given back, and for what its last writer put off, which is
/// made up for as when it is opened for writing. Returns how many leaks there were.
fn sound(
    header: &Header,
    main: &Arc<dyn StorageMut>,
    files: &FilesMut,
    how: &OpenSpec,
    job: Job<'_>,
) -> Result<u64> {
    let quiet = Job {
        observer: &Silent,
        cancel: job.cancel,
    };
    let readable = || -> Files {
        files
            .iter()
            .map(|(role, file)| (*role, Arc::clone(file) as Arc<dyn Storage>))
            .collect()
    };
    let parse = || Qcow2Image::parse(main.as_ref(), how).map(Box::new);
    let refuse_errors = |report: &CheckReport| match (report.check_errors, report.corruptions) {
        (0, 0) => Ok(()),
        (0, errors) => Err(refuse(ErrorKind::Corrupt, CompactError::Corrupt { errors })),
        // What cannot be read may be all there is to it.
        (errors, _) => Err(refuse(ErrorKind::Io, CompactError::Unchecked { errors })),
    };
    let report = parse()?.check(readable(), how, quiet)?;
    if header.incompatible.has(Incompatible::DIRTY) {
        refuse_errors(&parse()?.repair(files.clone(), how, Repair::All, quiet)?)?;
        return Ok(report.leaks);
    }
    refuse_errors(&report)?;
    if report.leaks > 0 {
        parse()?.repair(files.clone(), how, Repair::Leaks, quiet)?;
    }
    Ok(report.leaks)
}

impl Work<'_> {
    fn all(&mut self, spec: &CompactSpec, leaked: bool) -> Result<()> {
        let held = self.refcounts.used(&mut self.fence)? << self.bits();
        // Looking for zeros, compressing, moving.
        let passes = if spec.compress.is_some() { 3 } else { 2 };
        self.job.observer.total(held.saturating_mul(passes));
        self.claim()?;
        let end = self.report.len_before.div_ceil(self.cluster());
        self.refcounts.clear_from(&mut self.fence, end)?;
        if leaked {
            self.commit()?;
            self.refresh_copied()?;
        }
        self.reclaim()?;
        if let Some(compression) = spec.compress {
            self.compress(compression.level)?;
        }
        let mut used = u64::MAX;
        loop {
            self.repack()?;
            self.slide()?;
            // Packing and moving may make room for one another.
            let left = self.refcounts.used(&mut self.fence)?;
            if left >= used {
                break;
            }
            used = left;
        }
        self.finish()?;
        self.sweep_data()?;
        Ok(())
    }

    /// Notes in the header that the image has been changed by a program that does not know all of it, as every writer
    /// does. The dirty bit goes: the refcounts have been found right.
    fn claim(&mut self) -> Result<()> {
        let header = &self.header;
        let autoclear = header.autoclear.bits();
        let known = autoclear & !header.autoclear.unknown().bits();
        let incompatible = header.incompatible.bits();
        let clean = header.incompatible.with(Incompatible::DIRTY, false).bits();
        if known != autoclear {
            self.switch(HEADER_AUTOCLEAR_AT, known);
        }
        if clean != incompatible {
            self.switch(HEADER_INCOMPATIBLE_AT, clean);
        }
        self.commit()?;
        self.reload()
    }

    /// Ends the file behind what is in use.
    fn finish(&mut self) -> Result<()> {
        self.tidy()?;
        let end = self.refcounts.used_end(&mut self.fence)? << self.bits();
        let len = self.main.len()?;
        self.report.len_after = end.min(len);
        if self.dry || end >= len {
            return Ok(());
        }
        if self.report.fixed_len {
            return self.main.discard(HostOffset::new(end)..HostOffset::new(len));
        }
        self.main.set_len(end)?;
        self.fence.sync()
    }
}
