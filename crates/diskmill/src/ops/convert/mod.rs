//! Copying disks into an image of any format.
//!
//! Workers claim the next chunk of the source in order, and for it: read what holds data, encode it (zero test,
//! compression), wait for their turn, place it in the new image's tables, pass the turn on, and write. Only placing is
//! serial, so the bytes of the image do not depend on how many workers there are, and memory is what the workers hold.

mod bitmaps;
mod existing;
mod input;
mod kept;
mod lane;
mod leave;
mod new;
mod package;
mod plan;
mod salvage;
mod sink;
mod source;
#[cfg(test)]
mod tests;
mod work;

use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::thread;

use diskmill_core::{Error, ErrorKind, Job, Result};
pub use diskmill_storage::InPlace;

pub use bitmaps::BitmapNotCopied;
pub use package::{PackagePlan, Packed, run_package};
pub use plan::{ExistingImage, Extract, Input, NewImage, Output, Plan};

pub(crate) use existing::Transfer;
pub(crate) use leave::{Leave, Other};
pub(crate) use sink::Existing;
pub(crate) use source::{Cut, Source};

use input::Opened;
use lane::Lane;

/// What a conversion did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Summary {
    /// The size of the disk in bytes.
    pub virtual_size: u64,
    /// Bytes read from the source.
    pub read: u64,
    /// Bytes of guest data that were stored, before compression.
    pub stored: u64,
    /// Workers that ran.
    pub workers: usize,
    /// Internal snapshots of the sources that the target does not have.
    pub snapshots_dropped: usize,
    /// Why the target was written in place instead of being replaced when complete, if that is not what it is for.
    pub in_place: Option<InPlace>,
}

/// Why a conversion was refused. The source of an [`Error`] from [`run`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConvertError {
    /// The format stores nothing compressed.
    #[error("compression is not supported by format '{0}'")]
    NoCompression(String),
    /// No format stores data that is both.
    #[error("compression and encryption are not supported at the same time")]
    CompressionAndEncryption,
    /// The image to overwrite is too small.
    #[error("the target of {target} bytes is smaller than the source of {source_size} bytes")]
    TargetTooSmall {
        /// The target's size in bytes.
        target: u64,
        /// What it would have to hold, in bytes.
        source_size: u64,
    },
    /// Several disks cannot be differences to one backing image.
    #[error("a backing image makes no sense with several sources")]
    BackingWithSeveral,
    /// Snapshots can be carried from one image alone, not from one of its snapshots.
    #[error("keeping snapshots needs one image as the source, and its active state")]
    KeepOneImage,
    /// The states are made of one another in a new image.
    #[error("keeping snapshots needs a new image without a backing image as the target")]
    KeepInNewImage,
    /// The target cannot have any.
    #[error("snapshots can only be kept in a qcow2 image without a data file")]
    KeepsNone,
    /// Dirty bitmaps are of one disk.
    #[error("dirty bitmaps can only be copied from a single source")]
    BitmapsOfSeveral,
    /// There are no dirty bitmaps to copy, and there cannot be any.
    #[error("the source is of a format that keeps no dirty bitmaps")]
    NoBitmaps,
    /// The target cannot keep them.
    #[error("the target of format '{0}' keeps no dirty bitmaps")]
    TargetKeepsNoBitmaps(String),
    /// One of them cannot be trusted.
    #[error("dirty bitmap '{0}' is inconsistent: skip those that are, or remove it")]
    BrokenBitmap(String),
    /// There is nothing to read.
    #[error("there is no source")]
    NoSource,
    /// Standard input is a stream: it can only be read once and alone.
    #[error("standard input must be the only source")]
    StdinNotAlone,
    /// What is copied without being looked at cannot be compressed.
    #[error("copy offloading and compression exclude each other")]
    OffloadAndCompression,
}

impl ConvertError {
    fn usage(self) -> Error {
        Error::new(ErrorKind::Usage, self)
    }

    fn unsupported(self) -> Error {
        Error::new(ErrorKind::Unsupported, self)
    }
}

/// Converts. The target is absent, or as it was, if this fails, unless it had to be written in place.
pub fn run(plan: &Plan, job: Job<'_>) -> Result<Summary> {
    if plan.offload && plan.compress.is_some() {
        return Err(ConvertError::OffloadAndCompression.usage());
    }
    job.check()?;
    if let (Some(kept), Output::New(image)) = (kept::Kept::open(plan)?, &plan.output) {
        return new::with_snapshots(plan, image, &kept, job);
    }
    let extract = plan.extract.unwrap_or_default();
    let source = match input::open(&plan.inputs, job)? {
        Opened::Disks(source) if plan.extract.is_some() => source.extract(extract)?,
        Opened::Disks(source) => source,
        Opened::Stream(_) if plan.bitmaps => return Err(ConvertError::NoBitmaps.unsupported()),
        Opened::Stream(mut stream) => {
            let mut stream = input::Part::new(&mut stream, extract);
            let near = match &plan.output {
                Output::Stdout if extract.size.is_none() => {
                    return new::stream_to_stdout(plan, &mut stream, job);
                }
                Output::New(image) if extract.size.is_none() && new::takes_streams(image) => {
                    return new::stream_to_image(plan, image, &mut stream, job);
                }
                Output::New(image) => image.target.path(),
                Output::Existing(image) => image.open.spec.path(),
                Output::Stdout => Path::new("."),
            };
            let whole = input::spool(&mut stream, near, job)?;
            match extract.size {
                None => whole,
                size => whole.extract(Extract {
                    size,
                    ..Extract::default()
                })?,
            }
        }
    };
    if plan.bitmaps {
        bitmaps::check(plan, &**source.layer(0, 0)?, job)?;
    }
    let mut summary = match &plan.output {
        Output::Stdout => new::to_stdout(plan, &source, job),
        Output::New(image) => new::to_image(plan, image, &source, job),
        Output::Existing(image) => existing::to_image(plan, image, &source, job),
    }?;
    summary.snapshots_dropped = source.snapshots();
    Ok(summary)
}

/// Data bytes of a chunk: few enough to stay in a core's cache between reading and writing, enough for a request.
const CHUNK: u64 = 512 << 10;

/// The step in which formats without one of their own are written, in bytes.
const PAGE: u64 = 4096;

/// How a source is cut for a target that takes data in steps of `unit` bytes.
fn cut(plan: &Plan, unit: u64) -> Cut {
    if plan.compress.is_some() {
        return cut_whole(plan, unit);
    }
    let step = plan.sparse.clamp(1, PAGE).next_multiple_of(unit.max(1));
    Cut {
        step,
        chunk: CHUNK.next_multiple_of(step),
        shortest: plan.sparse,
        offload: plan.offload,
        ..cut_whole(plan, unit)
    }
}

/// How a source is cut for a target that takes whole units of `unit` bytes, each by itself.
fn cut_whole(plan: &Plan, unit: u64) -> Cut {
    Cut {
        step: unit,
        chunk: CHUNK.next_multiple_of(unit),
        shortest: 0,
        keep_zeros: plan.sparse == 0,
        offload: false,
        salvage: plan.salvage,
    }
}

/// Workers to start: as many as were asked for, or one for each core.
pub(crate) fn workers(wanted: Option<NonZeroUsize>) -> NonZeroUsize {
    let cores = thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
    wanted.unwrap_or(cores)
}

fn summary(lane: &Lane<'_>, workers: usize) -> Summary {
    Summary {
        virtual_size: lane.counters.end.load(Ordering::Relaxed),
        read: lane.counters.read.load(Ordering::Relaxed),
        stored: lane.counters.stored.load(Ordering::Relaxed),
        workers,
        snapshots_dropped: 0,
        in_place: None,
    }
}
