//! Whether two disks hold the same.

use diskmill_core::{Error, ErrorKind, Job, Result};

use crate::open::Image;

/// Which of the two disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The first.
    First,
    /// The second.
    Second,
}

/// What a comparison found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Verdict {
    /// Whether the disks differ in size. Not a difference by itself unless in strict mode: the longer one may end in
    /// zeros.
    pub sizes_differ: bool,
    /// The first difference, if there is one.
    pub difference: Option<Difference>,
}

/// The first difference of two disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Difference {
    /// Bytes differ.
    Content {
        /// Where, as exactly as `qemu-img` says it.
        offset: u64,
    },
    /// The sizes differ (strict mode).
    Size,
    /// One has data stored where the other has none (strict mode).
    Allocation {
        /// Where.
        offset: u64,
    },
}

/// What kept a comparison from being finished. The source of an [`Error`] from [`run`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CompareError {
    /// The map of a disk could not be read (exit code 3 of `qemu-img`).
    #[error("cannot tell what is allocated at offset {offset} of the {side:?} image")]
    Map {
        /// Of which disk.
        side: Side,
        /// Where.
        offset: u64,
        /// Why.
        #[source]
        source: Error,
    },
    /// Bytes of a disk could not be read (exit code 4 of `qemu-img`).
    #[error("cannot read offset {offset} of the {side:?} image")]
    Read {
        /// Of which disk.
        side: Side,
        /// Where.
        offset: u64,
        /// Why.
        #[source]
        source: Error,
    },
}

/// How two disks are compared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CompareOptions {
    /// Also compare sizes and what is allocated.
    pub strict: bool,
    /// Threads to use at most; 0 means one for each core.
    pub threads: usize,
}

/// Compares two disks. The difference reported is the first one, whatever the number of threads.
///
/// Errors carry a [`CompareError`] as their source.
pub fn run(first: &Image, second: &Image, options: CompareOptions, job: Job<'_>) -> Result<Verdict> {
    let _ = (first, second, options);
    job.check()?;
    Err(Error::bare(ErrorKind::Unsupported))
}
