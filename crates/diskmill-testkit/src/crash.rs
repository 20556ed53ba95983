//! Power cuts: an operation is played once with its writes recorded, then every state a cut could have left of it is
//! opened, checked and compared with what may be seen at that moment.
//!
//! To put an operation under it: record the image's files with a [`Journal`], begin a [`Tale`] with what the image
//! shows, and for each step [`mark`](Tale::mark) the place, do it, and [`note`](Tale::note) what the image shows then
//! and how it gets there. [`Tale::survive`] does the rest. A format needs a [`Subject`]: how its files are opened,
//! checked and repaired.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Arc;

use diskmill_core::{Chain, CheckReport, FindingKind, GuestOffset, Result};

use crate::fault::{Bounds, Cut, Journal, Loss};
use crate::model::Op;

/// What a user sees of an image.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Picture {
    /// What the disk reads as.
    pub disk: Vec<u8>,
    /// What each snapshot reads as, by name.
    pub snapshots: BTreeMap<String, Vec<u8>>,
    /// What else must be as before or as after, by name: a bitmap's state, a backing image's name.
    pub traits: BTreeMap<String, String>,
}

impl Picture {
    /// A disk and nothing beside it.
    pub fn of(disk: Vec<u8>) -> Self {
        Self {
            disk,
            ..Self::default()
        }
    }

    /// What differs but the bytes of the disk.
    fn frame_differs(&self, other: &Self) -> Option<String> {
        if self.disk.len() != other.disk.len() {
            return Some(format!(
                "the disk has {} bytes, not {}",
                other.disk.len(),
                self.disk.len()
            ));
        }
        let names = |picture: &Self| picture.snapshots.keys().cloned().collect::<Vec<_>>();
        if names(self) != names(other) {
            return Some(format!("snapshots {:?}, not {:?}", names(other), names(self)));
        }
        if let Some((name, _)) = self
            .snapshots
            .iter()
            .find(|(name, bytes)| other.snapshots.get(*name) != Some(bytes))
        {
            return Some(format!("snapshot {name} reads as something else"));
        }
        (self.traits != other.traits).then(|| format!("{:?}, not {:?}", other.traits, self.traits))
    }
}

/// How an image gets from one picture to the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Sector by sector, and durable only with the next step that settles.
    Flows,
    /// Sector by sector, and durable when the step returns.
    Settles,
    /// At once, and durable when the step returns.
    Switches,
    /// As [`Settles`](Self::Settles), while every bitmap that is on is marked as one that may lack changes.
    Records,
}

/// What a bitmap that may lack changes says, in [`Picture::traits`]. What those that are on say begins with `on`.
pub const INCONSISTENT: &str = "inconsistent";

/// What may be seen from some point of a journal on.
#[derive(Clone, Debug)]
struct Moment {
    from: usize,
    what: String,
    /// One of these, each a set of pictures whose sectors may be mixed.
    mixes: Vec<Vec<Picture>>,
    tolerance: Tolerance,
}

/// What may be wrong with an image while a step is under way, and must be put right by a repair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tolerance {
    /// Nothing but leaks.
    Leaks,
    /// Flags that only say who shares what may lag behind.
    LaggingFlags,
    /// It was damaged to begin with.
    Damage,
}

/// How an image's files are opened, checked and repaired.
pub trait Subject {
    /// What a user sees of the files.
    fn look(&self, files: &[Vec<u8>]) -> Result<Picture>;

    /// What our check finds.
    fn check(&self, files: &[Vec<u8>]) -> Result<CheckReport>;

    /// The files after a repair of everything.
    fn repair(&self, files: &[Vec<u8>]) -> Result<Vec<Vec<u8>>>;

    /// The files after the whole active disk was overwritten and flushed, which snapshots must not notice.
    fn overwrite(&self, files: &[Vec<u8>]) -> Result<Vec<Vec<u8>>>;

    /// What another checker says: an error if it calls the files corrupt. What is tolerated is not.
    fn second_opinion(&self, files: &[Vec<u8>], tolerance: Tolerance) -> std::result::Result<(), String>;

    /// Whether a finding of ours is only about a flag that says who shares what.
    fn is_flag(&self, text: &str) -> bool {
        text.contains("copied flag")
    }
}

/// What was tried.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Figures {
    /// Steps of the operations.
    pub steps: u64,
    /// States that were opened, checked and compared.
    pub states: u64,
    /// Of these, states with leaks.
    pub leaking: u64,
    /// States that were written to afterwards, and checked and compared again.
    pub overwritten: u64,
    /// States that were repaired, and checked and compared again.
    pub repaired: u64,
    /// States that the other checker judged as well.
    pub judged: u64,
}

impl std::ops::AddAssign for Figures {
    fn add_assign(&mut self, more: Self) {
        self.steps += more.steps;
        self.states += more.states;
        self.leaking += more.leaking;
        self.overwritten += more.overwritten;
        self.repaired += more.repaired;
        self.judged += more.judged;
    }
}

/// How much is tried.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Cuts of each stretch between flushes.
    pub bounds: Bounds,
    /// Every so many-th state is written to afterwards.
    pub overwrite_every: u64,
    /// Every so many-th state is repaired, besides those with lagging flags.
    pub repair_every: u64,
    /// Every so many-th state is also judged by the other checker.
    pub judge_every: u64,
}

impl Effort {
    /// What a continuous integration run can afford.
    pub fn usual(seed: u64) -> Self {
        Self {
            bounds: Bounds {
                prefixes: 6,
                singles: 3,
                random: 4,
                seed,
            },
            overwrite_every: 9,
            repair_every: 11,
            judge_every: 41,
        }
    }

    /// `times` as many random cuts and as many more of the others.
    #[must_use]
    pub fn times(mut self, times: u32) -> Self {
        self.bounds.prefixes *= times as usize;
        self.bounds.singles *= times as usize;
        self.bounds.random *= times as usize;
        self
    }
}

/// What may show through while `op` is under way on a disk that reads as `disk`: of what is given up, zeros or what is
/// below.
pub fn given_up(op: &Op, disk: &[u8], below: &Chain) -> Vec<Picture> {
    let end = disk.len();
    let span = match *op {
        Op::Resize { size } => (size as usize).min(end)..end,
        Op::Discard { at, len } => (at as usize).min(end)..(at + len).min(end as u64) as usize,
        _ => return Vec::new(),
    };
    let (mut zeros, mut shown) = (disk.to_vec(), disk.to_vec());
    zeros[span.clone()].fill(0);
    let at = GuestOffset::new(span.start as u64);
    below.read_at(at, &mut shown[span]).expect("read");
    vec![Picture::of(zeros), Picture::of(shown)]
}

/// What was done to an image, and what it may look like at each moment.
#[derive(Debug)]
pub struct Tale {
    journal: Arc<Journal>,
    name: String,
    moments: Vec<Moment>,
    /// What the image may read as since the last step that settled.
    versions: Vec<Picture>,
}

impl Tale {
    /// The tale called `name` of an image that shows `start`, whose files `journal` records.
    pub fn new(name: impl Into<String>, journal: &Arc<Journal>, start: Picture) -> Self {
        let versions = vec![start];
        Self {
            moments: vec![Moment {
                from: 0,
                what: "opening".to_owned(),
                mixes: vec![versions.clone()],
                tolerance: Tolerance::Leaks,
            }],
            journal: Arc::clone(journal),
            name: name.into(),
            versions,
        }
    }

    /// The place a step begins at.
    pub fn mark(&self) -> usize {
        self.journal.len()
    }

    /// What the image shows now.
    pub fn now(&self) -> &Picture {
        self.versions.last().expect("a picture")
    }

    /// Notes a step that began at `mark` and has just returned: the image shows `after`.
    pub fn note(&mut self, mark: usize, what: impl Into<String>, effect: Effect, after: Picture) {
        self.note_through(mark, what, effect, Vec::new(), after);
    }

    /// As [`note`](Self::note), where bytes may read as in `through` while the step is under way.
    pub fn note_through(
        &mut self,
        mark: usize,
        what: impl Into<String>,
        effect: Effect,
        through: Vec<Picture>,
        after: Picture,
    ) {
        let what = what.into();
        let before = std::mem::take(&mut self.versions);
        let mixes = mixes(&before, effect, through, &after);
        self.moments.push(Moment {
            from: mark,
            what: what.clone(),
            mixes,
            tolerance: Tolerance::Leaks,
        });
        self.versions = match effect {
            Effect::Flows => {
                let mut versions = before;
                versions.push(after);
                versions.dedup();
                versions
            }
            Effect::Settles | Effect::Switches | Effect::Records => vec![after],
        };
        self.moments.push(Moment {
            from: self.journal.len(),
            what: format!("after {what}"),
            mixes: vec![self.versions.clone()],
            tolerance: Tolerance::Leaks,
        });
    }

    /// Demands that `files` are sound and show what they may when a step that has failed was to lead to `after`, through
    /// `through`. What is tolerated is repaired.
    pub fn failed(
        &self,
        subject: &dyn Subject,
        files: &[Vec<u8>],
        (effect, tolerance): (Effect, Tolerance),
        through: Vec<Picture>,
        after: &Picture,
    ) -> std::result::Result<(), String> {
        let moment = Moment {
            from: 0,
            what: String::new(),
            mixes: mixes(&self.versions, effect, through, after),
            tolerance,
        };
        if self.sound(subject, files, &moment, &mut Figures::default())? {
            repaired(subject, files, &moment)?;
        }
        Ok(())
    }

    /// Says what may be wrong while the step noted last is under way.
    pub fn tolerate(&mut self, tolerance: Tolerance) {
        if let Some(step) = self.moments.iter_mut().rev().nth(1) {
            step.tolerance = tolerance;
        }
        if tolerance == Tolerance::Damage {
            // What is damaged to begin with is so before the step, too.
            self.moments[0].tolerance = tolerance;
        }
    }

    /// Cuts the power at as many moments as `effort` says and demands that each state is sound and shows what it may.
    #[track_caller]
    pub fn survive(&self, subject: &dyn Subject, effort: Effort) -> Figures {
        let mut figures = Figures {
            steps: self.moments.len() as u64 / 2,
            ..Figures::default()
        };
        for cut in self.journal.cuts(effort.bounds) {
            if let Err(failed) = self.examine(subject, effort, cut, &mut figures) {
                panic!(
                    "{}: {failed}\n{} (DISKMILL_SEED={})",
                    self.name,
                    self.describe(cut),
                    effort.bounds.seed
                );
            }
        }
        figures
    }

    fn moment(&self, count: usize) -> &Moment {
        self.moments
            .iter()
            .rfind(|moment| moment.from <= count)
            .expect("a moment")
    }

    fn examine(
        &self,
        subject: &dyn Subject,
        effort: Effort,
        cut: Cut,
        figures: &mut Figures,
    ) -> std::result::Result<(), String> {
        let files = self.journal.state(&cut);
        let moment = self.moment(cut.count);
        figures.states += 1;
        let wrong = self.sound(subject, &files, moment, figures)?;
        if !wrong && figures.states.is_multiple_of(effort.overwrite_every) {
            figures.overwritten += 1;
            overwritten(subject, &files)?;
        }
        if wrong || figures.states.is_multiple_of(effort.repair_every) {
            figures.repaired += 1;
            let repaired = repaired(subject, &files, moment)?;
            if wrong && moment.tolerance == Tolerance::LaggingFlags {
                overwritten(subject, &files)?;
            }
            if figures.repaired.is_multiple_of(effort.judge_every) {
                figures.judged += 1;
                subject
                    .second_opinion(&repaired, Tolerance::Leaks)
                    .map_err(|text| format!("repaired, the other checker: {text}"))?;
            }
        }
        if figures.states.is_multiple_of(effort.judge_every) && moment.tolerance != Tolerance::Damage {
            figures.judged += 1;
            subject
                .second_opinion(&files, moment.tolerance)
                .map_err(|text| format!("the other checker: {text}"))?;
        }
        Ok(())
    }

    /// Demands that the files are not corrupt and show what they may. Returns whether anything tolerated is
    /// wrong with them.
    fn sound(
        &self,
        subject: &dyn Subject,
        files: &[Vec<u8>],
        moment: &Moment,
        figures: &mut Figures,
    ) -> std::result::Result<bool, String> {
        let report = subject
            .check(files)
            .map_err(|error| format!("checking fails: {error:?}"))?;
        figures.leaking += u64::from(report.leaks > 0);
        if worse(subject, &report, moment.tolerance) {
            return Err(format!("corrupt: {:#?}", report.findings));
        }
        let found = subject
            .look(files)
            .map_err(|error| format!("it does not open: {error:?}"))?;
        explain(&moment.mixes, &found)?;
        Ok(report.corruptions + report.check_errors > 0)
    }

    fn describe(&self, cut: Cut) -> String {
        let mut text = format!("cut {cut:?} during: {}\n", self.moment(cut.count).what);
        let changes = self.journal.changes();
        let lost = match cut.loss {
            Loss::One(change) | Loss::AllBut(change) | Loss::Part { change, .. } => Some(change),
            _ => None,
        };
        let from = cut.count.saturating_sub(24).min(lost.unwrap_or(cut.count));
        for (index, change) in changes.iter().enumerate().take(cut.count).skip(from) {
            let mark = if Some(index) == lost { '*' } else { ' ' };
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{mark}{index:5} {}", change.describe());
        }
        text
    }
}

/// Demands that `found` is what an operation that leads from `before` to `after` may leave when it is stopped.
pub fn explains(
    before: &Picture,
    effect: Effect,
    after: &Picture,
    found: &Picture,
) -> std::result::Result<(), String> {
    let mut through = Vec::new();
    if after.disk.len() < before.disk.len() {
        // What is given up may be gone before the disk is smaller.
        let mut shrinking = before.clone();
        shrinking.disk[after.disk.len()..].fill(0);
        through.push(shrinking);
    }
    let mixes = mixes(std::slice::from_ref(before), effect, through, after);
    explain(&mixes, found)
}

fn mixes(before: &[Picture], effect: Effect, through: Vec<Picture>, after: &Picture) -> Vec<Vec<Picture>> {
    let mut mix = before.to_vec();
    mix.extend(through);
    let after = after.clone();
    match effect {
        Effect::Switches => vec![mix, vec![after]],
        Effect::Flows | Effect::Settles => {
            mix.push(after);
            vec![mix]
        }
        Effect::Records => {
            let mut marked = mix.clone();
            marked.push(after.clone());
            let bitmaps = marked.iter_mut().flat_map(|picture| picture.traits.values_mut());
            for bitmap in bitmaps.filter(|text| text.starts_with("on")) {
                INCONSISTENT.clone_into(bitmap);
            }
            // Bitmaps may say more than has changed, never less.
            let mut recorded = mix.clone();
            for picture in &mut recorded {
                picture.traits.clone_from(&after.traits);
            }
            recorded.push(after);
            vec![mix, marked, recorded]
        }
    }
}

/// Demands that a repair leaves files clean, and shows what they may show. Returns the files.
fn repaired(
    subject: &dyn Subject,
    files: &[Vec<u8>],
    moment: &Moment,
) -> std::result::Result<Vec<Vec<u8>>, String> {
    let repaired = subject
        .repair(files)
        .map_err(|error| format!("repairing it fails: {error:?}"))?;
    let report = subject.check(&repaired).map_err(|error| format!("{error:?}"))?;
    if report.check_errors + report.corruptions + report.leaks > 0 {
        return Err(format!("repaired it is not clean: {:#?}", report.findings));
    }
    let then = subject.look(&repaired).map_err(|error| format!("{error:?}"))?;
    explain(&moment.mixes, &then).map_err(|text| format!("repaired: {text}"))?;
    Ok(repaired)
}

/// Demands that writing to all of the disk harms nothing beside it.
fn overwritten(subject: &dyn Subject, files: &[Vec<u8>]) -> std::result::Result<(), String> {
    let seen = subject.look(files).map_err(|error| format!("{error:?}"))?;
    let used = subject
        .overwrite(files)
        .map_err(|error| format!("writing to it fails: {error:?}"))?;
    let report = subject.check(&used).map_err(|error| format!("{error:?}"))?;
    // Flags that lagged may lag on.
    if worse(subject, &report, Tolerance::LaggingFlags) {
        return Err(format!("once written to it is corrupt: {:#?}", report.findings));
    }
    let mut then = subject.look(&used).map_err(|error| format!("{error:?}"))?;
    // Bitmaps note what was written.
    then.traits.clone_from(&seen.traits);
    match seen.frame_differs(&then) {
        Some(text) => Err(format!("once written to: {text}")),
        None => Ok(()),
    }
}

/// Whether a report has corruptions that are not to be had.
fn worse(subject: &dyn Subject, report: &CheckReport, tolerance: Tolerance) -> bool {
    let flags = report
        .findings
        .iter()
        .filter(|finding| finding.kind == FindingKind::Corruption && subject.is_flag(&finding.text))
        .count() as u64;
    match tolerance {
        Tolerance::Leaks => report.check_errors + report.corruptions > 0,
        Tolerance::LaggingFlags => report.check_errors > 0 || report.corruptions > flags,
        Tolerance::Damage => false,
    }
}

/// Demands that `found` is one of the mixes.
fn explain(mixes: &[Vec<Picture>], found: &Picture) -> std::result::Result<(), String> {
    let mut reasons = Vec::new();
    for mix in mixes {
        match explain_by(mix, found) {
            Ok(()) => return Ok(()),
            Err(reason) => reasons.push(reason),
        }
    }
    Err(reasons.join("; or "))
}

fn explain_by(mix: &[Picture], found: &Picture) -> std::result::Result<(), String> {
    let mut reason = String::new();
    if !mix.iter().any(|picture| {
        let differs = picture.frame_differs(found);
        reason = differs.clone().unwrap_or_default();
        differs.is_none()
    }) {
        return Err(reason);
    }
    match unexplained(mix, &found.disk) {
        None => Ok(()),
        Some(sector) => {
            let at = sector * 512;
            let head = |bytes: &[u8]| bytes.get(at..(at + 4).min(bytes.len())).map(<[u8]>::to_vec);
            let versions: Vec<_> = mix.iter().map(|picture| head(&picture.disk)).collect();
            Err(format!(
                "sector {sector} begins with {:?}, must with one of {versions:?}",
                head(&found.disk)
            ))
        }
    }
}

/// The first sector that is as none of the versions has it.
fn unexplained(mix: &[Picture], found: &[u8]) -> Option<usize> {
    // Most often all of it is as it was last, or as it was first.
    if mix.iter().any(|picture| picture.disk == found) {
        return None;
    }
    found.chunks(512).enumerate().position(|(sector, bytes)| {
        let start = sector * 512;
        let range = start..start + bytes.len();
        let whole = mix
            .iter()
            .any(|picture| picture.disk.get(range.clone()) == Some(bytes));
        // A write of less than a sector to a place of its own may show byte by byte.
        !whole
            && bytes
                .iter()
                .zip(range)
                .any(|(byte, at)| mix.iter().all(|picture| picture.disk.get(at) != Some(byte)))
    })
}

#[cfg(test)]
mod tests;
