//! Changing options that an image was made with.

use diskmill_core::{Amendment, Error, ErrorKind, Format, Job, Options, Result};

use crate::open::{self, OpenRequest, OpenWarning};

/// A change of options.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct AmendRequest {
    /// Which image.
    pub open: OpenRequest,
    /// What is to be changed, of the format's [`Driver::amend_options`](diskmill_core::Driver::amend_options).
    pub options: Options,
    /// Do also what could make an encrypted image unreadable for good (`--force`).
    pub force: bool,
}

impl AmendRequest {
    /// A change of `options`.
    pub fn new(open: OpenRequest, options: Options) -> Self {
        Self {
            open,
            options,
            force: false,
        }
    }
}

/// The format has no options that could be changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("images in {0} format have no options that could be changed")]
pub struct AmendUnsupported(pub Format);

/// Changes options of an image. Warnings of opening it go to `warn` before anything is changed. Errors of the change
/// itself have the operation "amend".
///
/// An error of kind [`ErrorKind::Unsupported`] whose source is [`AmendUnsupported`] if the format has nothing to change.
pub fn run(request: &AmendRequest, warn: &mut dyn FnMut(&OpenWarning), job: Job<'_>) -> Result<()> {
    let path = request.open.spec.path();
    let image = open::image_mut(&request.open)?;
    for warning in &image.warnings {
        warn(warning);
    }
    let format = image.top.facts().format;
    let driver = diskmill_formats::registry::by_name(format.name());
    if driver.is_none_or(|driver| driver.amend_options().is_empty()) {
        return Err(Error::new(ErrorKind::Unsupported, AmendUnsupported(format))
            .op("amend")
            .path(path));
    }
    let mut wish = Amendment::new(request.options.clone());
    wish.force = request.force;
    image
        .top
        .amend(&wish, &image.below, job)
        .map_err(|error| error.op("amend").path(path))
}
