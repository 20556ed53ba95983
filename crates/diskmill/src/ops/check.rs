//! Whether an image is consistent.

use diskmill_core::{CheckReport, Error, ErrorKind, Format, Job, Result};

use crate::open::OpenRequest;

/// What a check says of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Checked {
    /// The name it is shown by.
    pub filename: String,
    /// Its format.
    pub format: Format,
    /// What was found.
    pub report: CheckReport,
}

/// Checks an image; nothing is changed. An error of kind [`ErrorKind::Unsupported`] whose source is
/// [`CheckUnsupported`] if the format has nothing to check.
pub fn run(request: &OpenRequest, job: Job<'_>) -> Result<Checked> {
    job.check()?;
    Err(Error::new(ErrorKind::Unsupported, CheckUnsupported(Format::Raw)).path(request.spec.path()))
}

/// The format has nothing that could be checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("images in {0} format have nothing to check")]
pub struct CheckUnsupported(pub Format);
