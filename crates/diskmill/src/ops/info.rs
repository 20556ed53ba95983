//! What an image says of itself.

use diskmill_core::{Error, ErrorKind, Result, SnapshotFacts, Value};

use crate::open::OpenRequest;

/// What `info` shows of one image, or of one of its files.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ImageInfo {
    /// The name it is shown by.
    pub filename: String,
    /// Its format; `file` or `host_device` for a file.
    pub format: String,
    /// The size of the virtual disk in bytes; for a file its length, rounded up to a sector.
    pub virtual_size: u64,
    /// Bytes it takes on the host, if the host can tell.
    pub actual_size: Option<u64>,
    /// Whether it was not closed properly.
    pub dirty: bool,
    /// The step in which it allocates.
    pub cluster_size: Option<u64>,
    /// Whether guest data is encrypted.
    pub encrypted: bool,
    /// Whether all data is stored compressed: only shown when true.
    pub compressed: bool,
    /// The name of its backing image, as the image writes it.
    pub backing_filename: Option<String>,
    /// The same, resolved against the image's directory.
    pub full_backing_filename: Option<String>,
    /// The format its backing image is said to have.
    pub backing_filename_format: Option<String>,
    /// Its internal snapshots.
    pub snapshots: Vec<SnapshotFacts>,
    /// What only its format has: its type and its data.
    pub format_specific: Option<(String, Value)>,
    /// Its files.
    pub children: Vec<Child>,
}

/// A file of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Child {
    /// What it is to the image: `file`, `data-file`.
    pub name: String,
    /// What is known of it.
    pub info: ImageInfo,
}

/// What an image says of itself: one element, or with `backing_chain` one for each image of the chain, overlay first.
///
/// Without `backing_chain` no other file is opened than the one that was named. The request's `backing` is ignored.
pub fn gather(request: &OpenRequest, backing_chain: bool) -> Result<Vec<ImageInfo>> {
    let _ = backing_chain;
    Err(Error::bare(ErrorKind::Unsupported).path(request.spec.path()))
}
