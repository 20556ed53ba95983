//! Making a disk larger or smaller.

use std::ops::Range;
use std::sync::Arc;

use diskmill_core::{Error, ErrorKind, FileIndex, Format, GuestOffset, Reserve, Result, SECTOR, Storage};
pub use diskmill_formats::preallocation::Preallocation;

use super::rewrite;
use crate::open::{self, ImageMut, OpenRequest, OpenWarning};

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
    /// The size would be zero or less, or 2^63 or more.
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
    /// Only a raw disk can end within a sector.
    #[error("the new size is {0} bytes, must be a multiple of 512")]
    Unaligned(u64),
    /// A raw disk on a device is as large as the device.
    #[error("a device keeps its size")]
    Device,
    /// The format cannot do this.
    #[error("preallocation mode {0} is not supported")]
    Preallocation(&'static str),
}

/// Changes the size of a disk. Warnings of opening it go to `warn` before anything is changed.
///
/// If the new space cannot be preallocated the old size comes back.
pub fn run(request: &ResizeRequest, warn: &mut dyn FnMut(&OpenWarning)) -> Result<Resized> {
    let path = request.open.spec.path();
    let image = open::image_mut(&request.open)?;
    for warning in &image.warnings {
        warn(warning);
    }
    let from = image.top.virtual_size();
    let to = match request.size {
        NewSize::To(bytes) => Some(bytes),
        NewSize::Grow(bytes) => from.checked_add(bytes),
        NewSize::Shrink(bytes) => from.checked_sub(bytes),
    };
    let refuse = |error: ResizeError| Err(Error::new(ErrorKind::Usage, error).op("resize").path(path));
    let to = match (to, request.size) {
        (Some(to), _) if to > 0 && i64::try_from(to).is_ok() => to,
        _ => return refuse(ResizeError::NotPositive),
    };
    if to <= from && request.preallocation != Preallocation::Off {
        return refuse(ResizeError::PreallocationOnShrink);
    }
    if to < from && !request.shrink {
        return refuse(ResizeError::WouldShrink { from, to });
    }
    let on_device = |file: &Arc<dyn Storage>| file.hints().fixed_len;
    let format = image.top.facts().format;
    // An encrypted disk is raw behind its header.
    let raw = matches!(format, Format::Raw | Format::Luks);
    if format == Format::Qcow2 && !to.is_multiple_of(SECTOR) {
        return refuse(ResizeError::Unaligned(to));
    }
    if raw && request.preallocation == Preallocation::Metadata {
        return refuse(ResizeError::Preallocation(request.preallocation.name()));
    }
    if raw && to != from && image.top.file(FileIndex::MAIN).is_some_and(on_device) {
        return refuse(ResizeError::Device);
    }
    if format == Format::Cow && request.preallocation != Preallocation::Off {
        return refuse(ResizeError::Preallocation(request.preallocation.name()));
    }
    if !image.top.resizes_in_place(to) {
        // Its locks are taken anew; whatever has come in between is what gets the new size.
        drop(image);
        return match rewrite::resize(&request.open, to) {
            Ok(to) => Ok(Resized { from, to }),
            Err(error) => Err(error.op("resize").path(path)),
        };
    }
    let done = grow_or_shrink(&image, from, to, request.preallocation);
    done.map_err(|error| error.op("resize").path(path))?;
    Ok(Resized {
        from,
        to: image.top.virtual_size(),
    })
}

fn grow_or_shrink(image: &ImageMut, from: u64, to: u64, preallocation: Preallocation) -> Result<()> {
    image.top.resize(to, &image.below)?;
    // The file of a raw disk ends where it was told to, not with the sector.
    let new = GuestOffset::new(from)..GuestOffset::new(image.top.virtual_size().min(to));
    if let Err(error) = preallocate(image, new, preallocation) {
        // The first error is the one to tell.
        let _ = image.top.resize(from, &image.below);
        return Err(error);
    }
    image.top.flush()
}

fn preallocate(image: &ImageMut, new: Range<GuestOffset>, how: Preallocation) -> Result<()> {
    let how = match how {
        Preallocation::Off => return Ok(()),
        Preallocation::Metadata => Reserve::Place,
        Preallocation::Falloc => Reserve::Space,
        Preallocation::Full => Reserve::Zeros,
    };
    image.top.reserve(new, how)
}
