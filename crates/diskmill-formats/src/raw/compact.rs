//! Making holes where a raw image holds zeros.

use diskmill_core::{CompactReport, CompactSpec, Error, ErrorKind, Format, Job, Result, StorageMut};

use super::View;
use crate::sparse;

/// Gives the host back what the disk in `file` holds of zeros; with `dry`, only looks. The file keeps its length.
pub(super) fn run(
    view: View,
    file: &dyn StorageMut,
    spec: &CompactSpec,
    job: Job<'_>,
    dry: bool,
) -> Result<CompactReport> {
    if spec.compress.is_some() {
        let text = "a raw image stores nothing compressed";
        return Err(Error::new(ErrorKind::Unsupported, text).format(Format::Raw));
    }
    let len = file.len()?;
    let end = view.offset().saturating_add(view.size()).min(len);
    job.observer.total(end.saturating_sub(view.offset()));
    let punched = sparse::punch_zeros(file, view.offset()..end, dry, job)?;
    if !dry {
        file.sync()?;
    }
    let mut report = CompactReport::default();
    report.len_before = len;
    report.len_after = len;
    report.fixed_len = file.hints().fixed_len;
    report.zeros = punched;
    report.punched = punched;
    Ok(report)
}
