//! Dirty bitmaps kept in an image: which bytes were changed since a moment somebody chose.

use std::ops::Range;

use crate::{BitmapFacts, GuestOffset, Result};

/// A dirty bitmap to make.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewBitmap {
    /// Its name.
    pub name: String,
    /// The guest bytes a bit stands for: a power of two, 512 to 2 GiB. `None` leaves it to the format.
    pub granularity: Option<u64>,
    /// Whether changes are recorded in it from now on.
    pub enabled: bool,
}

/// Why something cannot be done with a dirty bitmap. The source of an [`Error`](crate::Error).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BitmapError {
    /// The format keeps none.
    #[error("format '{0}' keeps no dirty bitmaps")]
    Unsupported(crate::Format),
    /// This version of the format keeps none.
    #[error("version 2 of the format keeps no dirty bitmaps")]
    OldVersion,
    /// There is one of that name already.
    #[error("there is a dirty bitmap '{0}' already")]
    Exists(String),
    /// There is none of that name.
    #[error("there is no dirty bitmap '{0}'")]
    NotFound(String),
    /// It was not closed properly, so that it may lack changes: all that can be done is to remove it.
    #[error("dirty bitmap '{0}' was not closed properly, so that it can only be removed")]
    Inconsistent(String),
    /// A name that cannot be stored.
    #[error("the name of the dirty bitmap has {0} bytes, must have 1 to 1023")]
    Name(usize),
    /// A step that cannot be stored.
    #[error("granularity is {0} bytes, must be a power of two from 512 to 2147483648")]
    Granularity(u64),
    /// The bits would take too much room.
    #[error(
        "dirty bitmap '{name}' would need {bytes} bytes, must need 1 to {max}: take a larger granularity"
    )]
    Size {
        /// The bitmap.
        name: String,
        /// Bytes its bits would take.
        bytes: u64,
        /// Bytes they may take.
        max: u64,
    },
    /// Too many of them.
    #[error(
        "there would be {count} dirty bitmaps with {bytes} bytes of descriptions, must be at most {max_count} with {max_bytes}"
    )]
    TooMany {
        /// How many there would be.
        count: u64,
        /// Bytes of their descriptions.
        bytes: u64,
        /// How many there may be.
        max_count: u64,
        /// Bytes of descriptions there may be.
        max_bytes: u64,
    },
    /// Bits of a disk of another size.
    #[error(
        "the dirty bitmap is of a disk of {to} bytes, what is to be merged into it of one of {from} bytes"
    )]
    Sizes {
        /// Bytes of the disk of the bitmap that would be changed.
        to: u64,
        /// Bytes of the disk of the other.
        from: u64,
    },
}

/// What a dirty bitmap says is dirty.
pub trait DirtyRuns: Send {
    /// The size of the disk that it is of, in bytes.
    fn disk_size(&self) -> u64;

    /// The next run of dirty bytes, in rising order; no two touch. It starts at a multiple of the granularity, and
    /// ends at one or at the end of the disk.
    fn next_run(&mut self) -> Result<Option<Range<GuestOffset>>>;
}

/// The dirty bitmaps of an image that is open for changing.
///
/// Names are looked up exactly. Each change is durable when its call returns; a power cut before that leaves the
/// bitmaps as they were or as they will be, and at worst space that nothing refers to. The source of an error is a
/// [`BitmapError`] where the request is at fault.
///
/// What [`LayerMut`](crate::LayerMut) changes of guest data is recorded in all enabled bitmaps. From the first change
/// to the next [`flush`](crate::LayerMut::flush) they are marked on disk as in use: after a power cut in between they
/// are found inconsistent, never clean where the disk was changed.
pub trait Bitmaps {
    /// What there are, in the order of the image.
    fn list(&self) -> Vec<BitmapFacts>;

    /// Makes one in which nothing is dirty.
    fn add(&self, new: &NewBitmap) -> Result<BitmapFacts>;

    /// Gives one up, even if it is inconsistent.
    fn remove(&self, name: &str) -> Result<()>;

    /// Makes nothing dirty in it.
    fn clear(&self, name: &str) -> Result<()>;

    /// Records changes in it from now on.
    fn enable(&self, name: &str) -> Result<()>;

    /// Records no changes in it from now on.
    fn disable(&self, name: &str) -> Result<()>;

    /// Makes dirty in it what is dirty in `from`, whatever the granularity of that.
    fn merge(&self, name: &str, from: &mut dyn DirtyRuns) -> Result<()>;
}
