//! Opening images by policy: a name becomes storage, the storage an image, the image a chain.
//!
//! This is the only place where a name found inside an image is turned into an open file.

use std::ffi::OsStr;
use std::path::Path;
use std::sync::Arc;

use diskmill_core::{Chain, Error, ErrorKind, Facts, Format, LayerMut, Limits, Result};

use crate::policy::References;
use crate::spec::ImageSpec;

/// An image somebody wants opened, and how.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct OpenRequest {
    /// Which image.
    pub spec: ImageSpec,
    /// Its format by name, instead of probing. A `driver` in `spec` comes first.
    pub format: Option<String>,
    /// Read it even while another process writes it (`-U`): no lock but the weakest is taken.
    pub share: bool,
    /// Which files it may name.
    pub policy: References,
    /// Caps on what it may ask for.
    pub limits: Limits,
    /// Open this internal snapshot instead of the active state, by id or name.
    pub snapshot: Option<String>,
    /// Open the images it is backed by. Without them, absent bytes read as zeros.
    pub backing: bool,
    /// Pass discards on to the host.
    pub unmap: bool,
}

impl OpenRequest {
    /// `spec`, probed, through the page cache, following whatever it names as `qemu-img` does.
    pub fn new(spec: ImageSpec) -> Self {
        Self {
            spec,
            format: None,
            share: false,
            policy: References::Any,
            limits: Limits::default(),
            snapshot: None,
            backing: true,
            unmap: false,
        }
    }
}

/// A disk open for reading: an image and all it is backed by.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Image {
    /// The layers, overlay first.
    pub chain: Chain,
    /// What is known of each layer, in the order of the chain.
    pub nodes: Vec<Node>,
}

/// A disk open for changing in place.
#[derive(Debug)]
#[non_exhaustive]
pub struct ImageMut {
    /// The image that is written.
    pub top: Arc<dyn LayerMut>,
    /// What it is backed by.
    pub below: Chain,
    /// What is known of each layer: the top one, then those of `below`.
    pub nodes: Vec<Node>,
    /// What the user should be told.
    pub warnings: Vec<OpenWarning>,
}

/// What is known of an open image beside its facts.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Node {
    /// The name it is shown by: a path, or `json:{...}` where no path says it all.
    pub filename: Arc<str>,
    /// The names of its files, by [`FileIndex`](diskmill_core::FileIndex).
    pub files: Vec<Arc<str>>,
    /// What it says of itself.
    pub facts: Facts,
    /// Whether its format was guessed.
    pub probed: bool,
}

/// Something a user should know about an image that opened.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum OpenWarning {
    /// Probing a file that is to be written found no format and took it for raw: its first sector is protected.
    GuessedRaw {
        /// The file, as the user named it.
        name: String,
    },
}

/// Why an image, or one it needs, did not open. The source of an [`Error`] whose path is the image that was wanted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The image it is backed by did not open; the inner error names it.
    #[error("backing image not opened")]
    Backing(#[source] Error),
    /// Its data file did not open; the inner error names it.
    #[error("data file not opened")]
    DataFile(#[source] Error),
    /// The file is not of the format it was said to have.
    #[error("image is not in {0} format")]
    NotInFormat(Format),
    /// The image is, at some remove, backed by itself.
    #[error("backing file '{0}' creates an infinite loop")]
    Loop(String),
    /// Too many images are backed by one another.
    #[error("the chain of backing files is deeper than {0} images")]
    TooDeep(usize),
    /// The policy does not let an image name this file.
    #[error(
        "the image names '{name}', which is outside of what it may name (allow it with --allow-ref '{allow}')"
    )]
    Refused {
        /// The name, as the image writes it.
        name: String,
        /// The directory that would have to be allowed.
        allow: String,
    },
}

/// Opens an image, and what it is backed by, for reading.
pub fn image(request: &OpenRequest) -> Result<Image> {
    Err(Error::bare(ErrorKind::Unsupported).path(request.spec.path()))
}

/// Opens an image for changing in place, and what it is backed by for reading.
pub fn image_mut(request: &OpenRequest) -> Result<ImageMut> {
    Err(Error::bare(ErrorKind::Unsupported).path(request.spec.path()))
}

/// The name `reference` stands for when the image in the file `from` writes it: relative names start at the directory
/// of that image.
pub fn resolve_name(from: &Path, reference: &OsStr) -> std::path::PathBuf {
    match from.parent() {
        Some(dir) => dir.join(reference),
        None => reference.into(),
    }
}
