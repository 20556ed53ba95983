//! Copying disks into an image of any format.
//!
//! Workers claim the next chunk of the source in order, and for it: read what holds data, encode it (zero test,
//! compression), wait for their turn, place it in the new image's tables, pass the turn on, and write. Only placing is
//! serial, so the bytes of the image do not depend on how many workers there are, and memory is what the workers hold.

mod plan;

use diskmill_core::{Error, ErrorKind, Job, Result};

pub use plan::{ExistingImage, Input, NewImage, Output, Plan};

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
    /// Why the target was written in place instead of being replaced when complete, if it was and need not have been
    /// by its nature.
    pub in_place: Option<String>,
}

/// Why a conversion was refused. The source of an [`Error`] from [`run`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConvertError {
    /// The format stores nothing compressed.
    #[error("compression is not supported by format '{0}'")]
    NoCompression(String),
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
    /// Dirty bitmaps cannot be copied yet.
    #[error("copying dirty bitmaps is not supported yet")]
    Bitmaps,
    /// Standard input is a stream: it can only be read once and alone.
    #[error("standard input must be the only source")]
    StdinNotAlone,
    /// The image is written over while it is read.
    #[error("source and target are the same file")]
    SameFile,
}

/// Converts. The target is absent, or as it was, if this fails, unless it had to be written in place.
pub fn run(plan: &Plan, job: Job<'_>) -> Result<Summary> {
    let _ = plan;
    job.check()?;
    Err(Error::bare(ErrorKind::Unsupported))
}
