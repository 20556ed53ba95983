//! What a check found.

use crate::{GuestOffset, HostOffset};

/// What to put right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repair {
    /// Only space that nothing refers to.
    Leaks,
    /// Everything.
    All,
}

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FindingKind {
    /// Space that nothing refers to: wasteful, harmless.
    Leak,
    /// The image contradicts itself: data is or will be lost.
    Corruption,
    /// A part that could not be read or understood.
    Error,
    /// Worth knowing, not wrong.
    Note,
}

/// One thing a check found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// How bad it is.
    pub kind: FindingKind,
    /// What it is: lower case, without a full stop.
    pub text: String,
    /// Where in the file.
    pub host: Option<HostOffset>,
    /// Where in the virtual disk.
    pub guest: Option<GuestOffset>,
    /// Whether it was put right.
    pub fixed: bool,
}

/// What a check found. Counters are exact; `findings` keeps the first [`CheckReport::KEPT`] of each kind.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct CheckReport {
    /// Errors that kept the check from looking at something.
    pub check_errors: u64,
    /// Contradictions that are still there.
    pub corruptions: u64,
    /// Units that leak and still do.
    pub leaks: u64,
    /// Contradictions put right.
    pub corruptions_fixed: u64,
    /// Leaks put right.
    pub leaks_fixed: u64,
    /// Where the last unit in use ends, if the format can tell.
    pub image_end_offset: Option<HostOffset>,
    /// Units the virtual disk has.
    pub total_units: u64,
    /// Units that are allocated.
    pub allocated_units: u64,
    /// Allocated units that do not follow their neighbour on the host.
    pub fragmented_units: u64,
    /// Units that are stored compressed.
    pub compressed_units: u64,
    /// What was found, in the order it was.
    pub findings: Vec<Finding>,
}

impl CheckReport {
    /// Findings that are kept in memory, whatever an image holds.
    pub const KEPT: usize = 10_000;

    /// Adds a finding and counts it. Of [`FindingKind::Leak`] and [`FindingKind::Corruption`] `count` units.
    pub fn add(&mut self, finding: Finding, count: u64) {
        let counter = match (finding.kind, finding.fixed) {
            (FindingKind::Leak, false) => &mut self.leaks,
            (FindingKind::Leak, true) => &mut self.leaks_fixed,
            (FindingKind::Corruption, false) => &mut self.corruptions,
            (FindingKind::Corruption, true) => &mut self.corruptions_fixed,
            (FindingKind::Error, _) => &mut self.check_errors,
            (FindingKind::Note, _) => &mut 0,
        };
        *counter = counter.saturating_add(count);
        if self.findings.len() < Self::KEPT {
            self.findings.push(finding);
        }
    }
}
