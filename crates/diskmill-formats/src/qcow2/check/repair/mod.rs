//! Putting right what a check finds.
//!
//! 1. The image is walked as it is, which says what is wrong, and once more as it is to become ([`view`]). If that
//!    still contradicts itself nobody has written a byte yet.
//! 2. A [`Plan`] is made of the difference: which tables are written, where new structures go, which counts change.
//! 3. The plan is carried out ([`Plan::apply`]) in an order that is safe at every point: structures at places that
//!    nothing uses, then the header that names them; counts that rise, then entries, then counts that fall. Each step
//!    is durable before the next. A repair that was stopped is simply repeated.
//! 4. The image is checked again, which is also what is reported. Where structures lay upon one another, putting one
//!    right has changed the other: what is found then is repaired in turn, a few times at most.
//! 5. Only if the image is sound the bits in the header that say dirty and corrupt are cleared.

mod apply;
mod plan;
mod space;
pub(in super::super) mod view;

use std::sync::Arc;

use diskmill_core::{
    CheckReport, Error, ErrorKind, FilesMut, Finding, FindingKind, Format, Job, OpenSpec, Repair, Result,
    Silent, Storage, StorageMut,
};

use super::super::header::{Header, Incompatible};
use super::super::read_header;
use super::copied::{self, Truth};
use super::ground::Ground;
use super::notes::Notes;
use super::refcounts;
use super::refs::Counts;
use super::survey::{Found, Survey};
use plan::{Plan, Wish};
use view::{Mender, View};

/// How often an image is repaired anew because structures that lay upon one another changed with what was repaired.
const ROUNDS: usize = 8;
/// Where the header keeps its incompatible features.
const HEADER_INCOMPATIBLE_AT: usize = 72;

/// Why an image is not repaired.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum RepairError {
    /// Only leaks were to be repaired, and where they are cannot be told.
    #[error("the refcount structures must be built anew, which repairing leaks alone does not do")]
    Rebuild,
    /// Nothing that could be written is free.
    #[error("there is no room for {0} clusters of new tables")]
    Full(u64),
    /// The file is too large for a refcount table.
    #[error("the refcount table would need {0:#x} bytes, must be at most 0x800000")]
    TableTooLarge(u64),
}

impl From<RepairError> for Error {
    fn from(error: RepairError) -> Self {
        let kind = match error {
            RepairError::Rebuild | RepairError::TableTooLarge(_) => ErrorKind::Unsupported,
            RepairError::Full(_) => ErrorKind::NoSpace,
        };
        Error::new(kind, error).format(Format::Qcow2)
    }
}

/// Repairs the image `files` starts with. What it says of leaks and contradictions is what is left.
pub(in super::super) fn run(
    header: &Header,
    files: &FilesMut,
    how: &OpenSpec,
    what: Repair,
    job: Job<'_>,
) -> Result<CheckReport> {
    let (_, main) = files
        .first()
        .ok_or_else(|| Error::new(ErrorKind::Usage, "an image needs a file"))?;
    job.observer.total(header.virtual_size());
    let first = mend(header, main, how, what, job)?;
    let main_read: &dyn Storage = main.as_ref();
    let mut report = first.report;
    if first.written || first.corruptions > 0 {
        let quiet = Job {
            observer: &Silent,
            cancel: job.cancel,
        };
        let mut written = first.written;
        let mut left = super::check(&read_header(main_read)?, main_read, how, quiet)?;
        for _ in 0..ROUNDS {
            if !written || what == Repair::Leaks || is_clean(&left) {
                break;
            }
            written = mend(&read_header(main_read)?, main, how, what, quiet)?.written;
            if written {
                left = super::check(&read_header(main_read)?, main_read, how, quiet)?;
            }
        }
        report = merge(report, left, first.corruptions, first.leaks);
    }
    if report.corruptions == 0 && report.check_errors == 0 {
        clear_bits(main)?;
    }
    Ok(report)
}

/// What a repair found and did.
struct Mended {
    /// What was found, as a check of the image as it was.
    report: CheckReport,
    /// Whether anything was written.
    written: bool,
    /// Contradictions and leaks that were put right, unless they are found again.
    corruptions: u64,
    leaks: u64,
}

fn mend(
    header: &Header,
    main: &Arc<dyn StorageMut>,
    how: &OpenSpec,
    what: Repair,
    job: Job<'_>,
) -> Result<Mended> {
    let storage: &dyn Storage = main.as_ref();
    let ground = Ground::new(header, storage, how, job)?;
    let mut notes = Notes::default();
    let survey = Survey::take(&ground, &View::default(), &mut notes)?;
    let (counts, found) = survey.finish();
    if what == Repair::Leaks || notes.counters.check_errors > found.snapshots.unreadable {
        return leaks(&ground, main, (counts, found), notes, what);
    }
    let unreadable = found.snapshots.unreadable;
    let wish = Wish::new(&ground, &found, &counts);
    let old_snapshots = found.snapshots.place.filter(|_| {
        let kept = wish.snapshots.as_ref();
        kept.is_some_and(|kept| !kept.is_empty())
    });
    let wanted = Ground::new(&wish.header, storage, how, job)?;
    let mut view = View {
        snapshots: wish.snapshots.clone(),
        mender: None,
    };
    // What is there, once the header and the snapshot table are right.
    let (was, was_found) = if wish.changes {
        Survey::take(&wanted, &view, &mut Notes::default())?.finish()
    } else {
        (counts.clone(), found)
    };
    let fixed = plan::fixed_structures(&wanted);
    view.mender = Mender::new(&wanted, &was_found, &was, &fixed);
    for at in view.mender.iter().flat_map(Mender::overlaps) {
        notes.corruption(1, *at, None, || {
            format!(
                "an l1 entry refers to an l2 table at {at:#x}, where the header or the active l1 table is"
            )
        });
    }
    let structures = notes.counters.corruptions.saturating_add(unreadable);
    let walked = match view.mender {
        Some(_) => Some(Survey::take(&wanted, &view, &mut Notes::default())?.finish()),
        None => None,
    };
    let (target, found) = match &walked {
        Some((target, found)) => (target, found),
        None => (&was, &was_found),
    };
    let mut compared = Notes::default();
    let disk = refcounts::compare(&wanted, target, found.blocks.clone(), &mut compared)?;
    let mut plan = Plan::new(&wanted, &wish, found, &disk, [&counts, &was, target])?;
    let truth = Truth::Wanted(&plan.target, wanted.header.refcount_order.max());
    let wrong = copied::compare(&wanted, &view, found, truth, &mut compared)?;
    plan.list_tables(&view, found, wrong);
    let corruptions = structures.saturating_add(compared.counters.corruptions);
    let moved = old_snapshots.map_or(0, |(at, len)| {
        let old = ground.clusters_of(at, len);
        old.filter(|cluster| target.get(*cluster) == 0).count() as u64
    });
    // The old snapshot table did not leak before there was a new one.
    let leaks = compared.counters.leaks.saturating_sub(moved);
    notes.absorb([compared]);
    let report = super::report(&ground, notes, &disk);
    Ok(Mended {
        report,
        written: plan.apply(&wanted, &view, main)?,
        corruptions,
        leaks,
    })
}

/// Lowers refcounts that are too high, puts flags right if nothing else is wrong, and reports the rest as a check
/// does.
fn leaks(
    ground: &Ground<'_>,
    main: &Arc<dyn StorageMut>,
    (counts, found): (Counts, Found),
    mut notes: Notes,
    what: Repair,
) -> Result<Mended> {
    let errors = notes.counters.check_errors;
    let disk = refcounts::compare(ground, &counts, found.blocks.clone(), &mut notes)?;
    // A part that was not seen may refer to what seems to leak.
    let lower = what == Repair::Leaks && errors == 0 && disk.high;
    if what == Repair::Leaks && disk.broken {
        return Err(RepairError::Rebuild.into());
    }
    let view = View::default();
    // Flags are right or wrong with the refcounts: once those are all right, the flags can be made so.
    let flags = what == Repair::Leaks && notes.counters.corruptions == 0 && notes.counters.check_errors == 0;
    let truth = match (flags, lower) {
        (true, _) => Truth::Wanted(&counts, ground.header.refcount_order.max()),
        (_, true) => Truth::Lowered(&disk, &counts),
        (_, false) => Truth::Disk(&disk),
    };
    let before = notes.counters.corruptions;
    let wrong = copied::compare(ground, &view, &found, truth, &mut notes)?;
    let corruptions = notes.counters.corruptions.saturating_sub(before);
    let leaks = notes.counters.leaks;
    let mut written = false;
    if lower || flags && corruptions > 0 {
        let mut plan = Plan::of_leaks(disk.blocks.clone(), counts);
        if flags {
            plan.list_tables(&view, &found, wrong);
        }
        written = plan.apply(ground, &view, main)?;
    }
    Ok(Mended {
        report: super::report(ground, notes, &disk),
        written,
        corruptions: if flags { corruptions } else { 0 },
        leaks,
    })
}

/// Whether a check found nothing.
fn is_clean(report: &CheckReport) -> bool {
    report.corruptions == 0 && report.leaks == 0 && report.check_errors == 0
}

/// The report of a repair: what is left, and what was put right.
fn merge(first: CheckReport, second: CheckReport, corruptions: u64, leaks: u64) -> CheckReport {
    let same = |one: &Finding, other: &Finding| one.kind == other.kind && one.text == other.text;
    let mut findings = Vec::new();
    for finding in first.findings {
        let kept = match finding.kind {
            // Only these can be put right.
            FindingKind::Corruption | FindingKind::Leak | FindingKind::Error => {
                !second.findings.iter().any(|left| same(left, &finding))
            }
            _ => true,
        };
        if kept {
            findings.push(Finding {
                fixed: true,
                ..finding
            });
        }
    }
    let mut report = second;
    report.corruptions_fixed = corruptions.saturating_sub(report.corruptions);
    report.leaks_fixed = leaks.saturating_sub(report.leaks);
    findings.append(&mut report.findings);
    findings.truncate(CheckReport::KEPT);
    report.findings = findings;
    report
}

/// Clears the bits that say that the image is dirty or corrupt.
fn clear_bits(main: &Arc<dyn StorageMut>) -> Result<()> {
    let header = read_header(main.as_ref())?;
    let sound = header
        .incompatible
        .with(Incompatible::DIRTY, false)
        .with(Incompatible::CORRUPT, false);
    if sound == header.incompatible {
        return Ok(());
    }
    apply::patch_header(
        main,
        &[(HEADER_INCOMPATIBLE_AT, sound.bits().to_be_bytes().to_vec())],
    )?;
    main.sync()
}
