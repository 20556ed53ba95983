//! Making a disk larger or smaller.

use diskmill_core::{Error, ErrorKind, Result};

use crate::open::{OpenRequest, OpenWarning};

/// The size that is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NewSize {
    /// This many bytes.
    To(u64),
    /// This many bytes more.
    Grow(u64),
    /// This many bytes fewer.
    Shrink(u64),
}

/// What is done for the space that is new.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preallocation {
    /// Nothing.
    #[default]
    Off,
    /// The tables are filled in.
    Metadata,
    /// Host space is reserved.
    Falloc,
    /// Zeros are written.
    Full,
}

impl Preallocation {
    /// The mode called `name`: `off`, `metadata`, `falloc` or `full`.
    pub fn parse(name: &str) -> Option<Self> {
        Some(match name {
            "off" => Self::Off,
            "metadata" => Self::Metadata,
            "falloc" => Self::Falloc,
            "full" => Self::Full,
            _ => return None,
        })
    }

    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Metadata => "metadata",
            Self::Falloc => "falloc",
            Self::Full => "full",
        }
    }
}

/// A change of size.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ResizeRequest {
    /// Which image.
    pub open: OpenRequest,
    /// The size that is wanted.
    pub size: NewSize,
    /// What is done for the space that is new.
    pub preallocation: Preallocation,
    /// Whether a smaller size, which loses data, is meant.
    pub shrink: bool,
}

impl ResizeRequest {
    /// A change to `size` that preallocates nothing and loses nothing.
    pub fn new(open: OpenRequest, size: NewSize) -> Self {
        Self {
            open,
            size,
            preallocation: Preallocation::Off,
            shrink: false,
        }
    }
}

/// What a change of size did.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Resized {
    /// The size before, in bytes.
    pub from: u64,
    /// The size after, in bytes.
    pub to: u64,
}

/// Why a size was not changed. The source of an [`Error`] from [`run`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ResizeError {
    /// The size would be zero or less.
    #[error("the new size must be positive")]
    NotPositive,
    /// The size would be less than it is, and that was not said to be meant.
    #[error(
        "the new size of {to} bytes is less than the {from} bytes there are, and shrinking loses what is behind"
    )]
    WouldShrink {
        /// The size now.
        from: u64,
        /// The size that was asked for.
        to: u64,
    },
    /// Space that goes away cannot be preallocated.
    #[error("preallocation is for growing images only")]
    PreallocationOnShrink,
    /// The format cannot do this.
    #[error("preallocation mode {0} is not supported")]
    Preallocation(&'static str),
}

/// Changes the size of a disk. Warnings of opening it go to `warn` before anything is changed.
pub fn run(request: &ResizeRequest, warn: &mut dyn FnMut(&OpenWarning)) -> Result<Resized> {
    let _ = warn;
    Err(Error::bare(ErrorKind::Unsupported).path(request.open.spec.path()))
}
