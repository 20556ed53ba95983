//! Whether an image is consistent.

use diskmill_core::{Access, CheckReport, Error, ErrorKind, Format, Job, Repair, Result};

use crate::open::{OpenRequest, Opener};

/// What a check says of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Checked {
    /// The name the user gave.
    pub filename: String,
    /// Its format.
    pub format: Format,
    /// What was found.
    pub report: CheckReport,
}

/// Which formats can be checked at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// All that have anything to check.
    Ours,
    /// Not those that `qemu-img` knows and has no check for: a program that calls it may count on being told so.
    QemuImg,
}

impl Reach {
    /// Fails with [`CheckUnsupported`] if there is no check of `format`.
    fn demand(self, format: Format) -> Result<()> {
        match (self, format) {
            (_, Format::Raw) | (Self::QemuImg, Format::Qcow | Format::Luks) => {
                Err(Error::new(ErrorKind::Unsupported, CheckUnsupported(format)))
            }
            _ => Ok(()),
        }
    }
}

/// Puts right what a check finds: space that leaks, or everything. The report says what was done and what is left.
///
/// Fails as [`run`] does, and if the image cannot be repaired that way, of which nothing comes to harm: a repair that is
/// stopped at any point can be repeated.
pub fn repair(request: &OpenRequest, what: Repair, reach: Reach, job: Job<'_>) -> Result<Checked> {
    job.check()?;
    let mut opener = Opener::new(request);
    let image = opener.understand_top(Access::Write, true)?;
    let format = image.driver.format();
    let path = image.file.path().to_owned();
    let data = opener.data_files(&image, Access::Write)?;
    let files = opener.hosts(&image, &data);
    opener
        .try_key(&image, &data)
        .map_err(|error| error.op("open").path(&path))?;
    opener.demand_backing(&image)?;
    reach.demand(format).map_err(|error| error.path(&path))?;
    let report = image
        .parsed
        .repair(files, &image.how, what, job)
        .map_err(|error| error.op("repair").path(path))?;
    Ok(Checked {
        filename: request.spec.text.to_string_lossy().into_owned(),
        format,
        report,
    })
}

/// Checks an image; nothing is changed. What it is backed by must open, as in `qemu-img`, and is not checked.
///
/// An error of kind [`ErrorKind::Unsupported`] whose source is [`CheckUnsupported`] if the format has nothing to
/// check.
pub fn run(request: &OpenRequest, reach: Reach, job: Job<'_>) -> Result<Checked> {
    job.check()?;
    let mut opener = Opener::new(request);
    let image = opener.understand_top(Access::Read, true)?;
    let format = image.driver.format();
    let path = image.file.path().to_owned();
    let data = opener.data_files(&image, Access::Read)?;
    let files = opener.readable(&image, &data);
    opener
        .try_key(&image, &data)
        .map_err(|error| error.op("open").path(&path))?;
    opener.demand_backing(&image)?;
    reach.demand(format).map_err(|error| error.path(&path))?;
    let report = image
        .parsed
        .check(files, &image.how, job)
        .map_err(|error| error.op("check").path(path))?;
    Ok(Checked {
        filename: request.spec.text.to_string_lossy().into_owned(),
        format,
        report,
    })
}

/// The format has nothing that could be checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("images in {0} format have nothing to check")]
pub struct CheckUnsupported(pub Format);
