//! Where the bytes of a disk are.

use std::sync::Arc;

use diskmill_core::{Error, ErrorKind, GuestOffset, Result};

use crate::open::Image;

/// A run of a disk with one state, as `qemu-img map` shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct MapEntry {
    /// Its first byte.
    pub start: GuestOffset,
    /// Bytes in it.
    pub length: u64,
    /// Index of the layer that has it: 0 is the overlay.
    pub depth: usize,
    /// Whether some layer has it.
    pub present: bool,
    /// Whether it reads as zeros.
    pub zero: bool,
    /// Whether bytes are stored for it.
    pub data: bool,
    /// Whether it is stored compressed.
    pub compressed: bool,
    /// Where it is in `filename`, if it is stored as it is.
    pub offset: Option<u64>,
    /// The file it is in, if it is stored as it is.
    pub filename: Option<Arc<str>>,
}

/// Calls `each` with the runs of `image` from `start` to `start + max` (or the end), in order; they tile that range.
/// Runs that continue one another are joined.
pub fn walk(
    image: &Image,
    start: u64,
    max: Option<u64>,
    each: &mut dyn FnMut(MapEntry) -> Result<()>,
) -> Result<()> {
    let _ = (image, start, max, each);
    Err(Error::bare(ErrorKind::Unsupported))
}
