//! Making a new, empty image.

use diskmill_core::{Durability, Error, ErrorKind, Job, Limits, Options, Result};

use crate::policy::References;
use crate::spec::ImageSpec;

/// A new, empty image that is wanted.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct CreateRequest {
    /// Where to put it.
    pub target: ImageSpec,
    /// Its format by name.
    pub format: String,
    /// The options of the format (`-o`), in the order given. `size`, `backing_file` and `backing_fmt` may be among
    /// them; the fields below come first.
    pub options: Options,
    /// The size of the disk in bytes, or that of the backing image.
    pub size: Option<u64>,
    /// The name of its backing image, as it is to be written into the image.
    pub backing: Option<String>,
    /// The format of its backing image.
    pub backing_format: Option<String>,
    /// Do not open the backing image (`-u`).
    pub unchecked: bool,
    /// Which files the backing image may name.
    pub policy: References,
    /// Caps on what the backing image may ask for.
    pub limits: Limits,
    /// What must hold when it is done.
    pub durability: Durability,
}

impl CreateRequest {
    /// An image of `format` at `target`, with nothing said about it.
    pub fn new(target: ImageSpec, format: impl Into<String>) -> Self {
        Self {
            target,
            format: format.into(),
            options: Options::new(),
            size: None,
            backing: None,
            backing_format: None,
            unchecked: false,
            policy: References::Any,
            limits: Limits::default(),
            durability: Durability::Synced,
        }
    }
}

/// Why an image cannot be made. The source of an [`Error`] from [`plan`] and from `convert`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CreateError {
    /// No format has this name.
    #[error("unknown file format '{0}'")]
    UnknownFormat(String),
    /// The format can be read, not made.
    #[error("format '{0}' cannot be created")]
    NotCreatable(String),
    /// The format has no backing images.
    #[error("format '{0}' has no backing images")]
    NoBacking(String),
    /// A backing image without its format: guessing it would let a guest choose.
    #[error("backing file given without its format")]
    BackingFormatMissing,
    /// The format of the backing image has no such name.
    #[error("unknown format '{0}' of the backing file")]
    UnknownBackingFormat(String),
    /// An image cannot be its own backing image.
    #[error("the backing file is the image itself")]
    BackedByItself,
    /// Neither a size nor a backing image that has one.
    #[error("a size is needed")]
    SizeMissing,
    /// The file system or device has no room for this size.
    #[error("the image size of {0} bytes is too large")]
    SizeTooLarge(u64),
}

/// An image that can be made: everything has been checked that can be without touching the target.
#[derive(Debug)]
#[non_exhaustive]
pub struct Creation {
    /// The format's name.
    pub format: String,
    /// The size of the disk in bytes.
    pub virtual_size: u64,
    /// What it will be: option names and values in the order of `qemu-img create`'s `Formatting` line, without the
    /// format.
    pub shown: Vec<(String, String)>,
    /// What the user should know.
    pub warnings: Vec<String>,
}

/// Checks a request and opens the backing image. Touches nothing.
pub fn plan(request: &CreateRequest) -> Result<Creation> {
    Err(Error::bare(ErrorKind::Unsupported).path(request.target.path()))
}

impl Creation {
    /// Makes the image. An old file at the target stays as it was if this fails.
    pub fn run(self, job: Job<'_>) -> Result<()> {
        job.check()?;
        Err(Error::bare(ErrorKind::Unsupported))
    }
}

/// Plans and makes an image.
pub fn run(request: &CreateRequest, job: Job<'_>) -> Result<()> {
    plan(request)?.run(job)
}
