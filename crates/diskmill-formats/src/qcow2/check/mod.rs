//! Checking: are all references counted, and is everything that is counted referred to? And repair.
//!
//! 1. [`survey`]: everything that refers to clusters of the file is walked: header, L1 and L2 tables of the active
//!    state and of snapshots, snapshot table, bitmaps, refcount table and blocks. A table that is referred to several
//!    times is read once and counts several times, so tables that share their parts cost no more than others.
//! 2. [`refcounts`]: the counts are compared with the refcount blocks.
//! 3. [`copied`]: the COPIED flags of the active state are compared with the refcounts.
//!
//! Memory is bounded by what is referred to, never by the length of the file. L2 tables and refcount blocks are read
//! by as many threads as there are processors; what is found does not depend on how many. [`repair`] puts right what
//! a check finds.

mod copied;
mod crew;
mod ground;
mod notes;
mod refcounts;
mod refs;
pub(super) mod repair;
mod survey;
mod tables;

use diskmill_core::{CheckReport, Error, ErrorKind, Files, Job, OpenSpec, Result, Storage};

use super::header::Header;
use copied::Truth;
use ground::Ground;
use notes::Notes;
use repair::view::View;
use survey::Survey;

/// Looks for contradictions and leaks in the image `files` starts with.
pub(super) fn run(header: &Header, files: &Files, how: &OpenSpec, job: Job<'_>) -> Result<CheckReport> {
    let (_, main) = files
        .first()
        .ok_or_else(|| Error::new(ErrorKind::Usage, "an image needs a file"))?;
    job.observer.total(header.virtual_size());
    check(header, main.as_ref(), how, job)
}

fn check(header: &Header, main: &dyn Storage, how: &OpenSpec, job: Job<'_>) -> Result<CheckReport> {
    let ground = Ground::new(header, main, how, job)?;
    let mut notes = Notes::default();
    let view = View::default();
    let survey = Survey::take(&ground, &view, &mut notes)?;
    let (counts, found) = survey.finish();
    let disk = refcounts::compare(&ground, &counts, found.blocks.clone(), &mut notes)?;
    // What is all right so far, referred to once and flagged so need not be read again.
    if !(found.all_copied && counts.all_single() && notes.is_clean()) {
        let truth = if disk.matches {
            Truth::Counted(&counts, &disk)
        } else {
            Truth::Disk(&disk)
        };
        copied::compare(&ground, &view, &found, truth, &mut notes)?;
    }
    Ok(report(&ground, notes, &disk))
}

/// What a check says.
fn report(ground: &Ground<'_>, notes: Notes, disk: &refcounts::Disk) -> CheckReport {
    let mut report = notes.into_report();
    report.total_units = ground.header.cluster_bits.clusters(ground.header.virtual_size());
    report.image_end_offset = disk.end;
    report
}
