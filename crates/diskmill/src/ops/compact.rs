//! Making the file of an image as small as what it holds.

use std::sync::Arc;

use diskmill_core::{
    Access, CompactReport, CompactSpec, Error, ErrorKind, Files, Format, Job, Result, Role, Storage,
};

use crate::open::{OpenRequest, Opener};

/// What compacting an image came to, or would come to.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Compacted {
    /// The name the user gave.
    pub filename: String,
    /// Its format.
    pub format: Format,
    /// What was saved.
    pub report: CompactReport,
    /// Bytes that the main file occupied on the host before and after, where the host can tell.
    pub allocated: Option<(u64, u64)>,
}

/// Compacts an image in place; with `dry_run`, says what that would save and changes nothing.
///
/// What it is backed by is not opened. Errors are those of [`Parsed::compact`](diskmill_core::Parsed::compact), and of
/// opening the image for writing.
pub fn run(request: &OpenRequest, spec: &CompactSpec, dry_run: bool, job: Job<'_>) -> Result<Compacted> {
    job.check()?;
    let access = if dry_run { Access::Read } else { Access::Write };
    if !dry_run && request.spec.settings.read_only == Some(true) {
        let text = "read-only=on, and it is to be written";
        return Err(Error::new(ErrorKind::Usage, text)
            .op("open")
            .path(request.spec.path()));
    }
    let mut opener = Opener::new(request);
    let image = opener.understand_top(access, false)?;
    let data = opener.data_files(&image, access)?;
    let files = opener.hosts(&image, &data);
    let format = image.driver.format();
    let path = image.file.path().to_owned();
    let before = image.file.allocated()?;
    let file = Arc::clone(&image.file);
    let done = if dry_run {
        let files: Files = files
            .into_iter()
            .map(|(role, file): (Role, _)| (role, file as Arc<dyn Storage>))
            .collect();
        image.parsed.plan_compact(files, &image.how, spec, job)
    } else {
        image.parsed.compact(files, &image.how, spec, job)
    };
    let report = done.map_err(|error| error.op("compact").path(path))?;
    Ok(Compacted {
        filename: request.spec.text.to_string_lossy().into_owned(),
        format,
        report,
        allocated: before.zip(file.allocated()?),
    })
}
