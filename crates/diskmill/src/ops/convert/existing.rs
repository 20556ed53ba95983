//! Copying into an image that exists.

use std::num::{NonZeroU64, NonZeroUsize};
use std::sync::Mutex;

use diskmill_core::{Chain, Job, Result};
use diskmill_storage::RateLimit;

use super::lane::{Feed, Lane};
use super::leave::Leave;
use super::sink::{Existing, Sink};
use super::source::{Cut, Scanner, Source};
use super::{ConvertError, ExistingImage, PAGE, Plan, Summary, bitmaps, cut, summary, workers};
use crate::open;

/// Writes `source` over an image. What the image has behind the source's end stays.
pub(super) fn to_image(plan: &Plan, image: &ExistingImage, source: &Source, job: Job<'_>) -> Result<Summary> {
    let path = image.open.spec.path();
    let opened = open::image_mut(&image.open)?;
    let target = opened.top.virtual_size();
    if target < source.size() {
        let source_size = source.size();
        return Err(ConvertError::TargetTooSmall { target, source_size }
            .usage()
            .path(path));
    }
    if image.backing.is_some() && plan.inputs.len() > 1 {
        return Err(ConvertError::BackingWithSeveral.usage());
    }
    let tops = image.backing.is_some().then(|| source.tops());
    let end = opened.below.virtual_size();
    let is_zero = image.is_zero || image.open.spec.zeroinit;
    let mut cut = cut(plan, opened.top.facts().unit.unwrap_or(PAGE));
    cut.keep_zeros |= opened.top.stores_zeros() && !is_zero;
    let transfer = Transfer {
        source: tops.as_ref().unwrap_or(source),
        leave: match tops {
            Some(_) => Leave::Absent { end },
            None => Leave::Nothing,
        },
        target: Existing {
            image: &*opened.top,
            below: &opened.below,
            shown: &opened.below,
            is_zero,
        },
        fill: &opened.below,
        unless: None,
        cut,
        pack: plan.compress.is_some(),
        workers: workers(plan.workers),
        rate: plan.rate,
    };
    let summary = transfer.run(job)?;
    if plan.bitmaps {
        bitmaps::copy(plan, &**source.layer(0, 0)?, &*opened.top)?;
    }
    opened.top.flush()?;
    Ok(summary)
}

/// A copy into an image that exists.
pub(crate) struct Transfer<'a> {
    /// What is read.
    pub(crate) source: &'a Source,
    /// What of it is left alone.
    pub(crate) leave: Leave<'a>,
    /// What is written.
    pub(crate) target: Existing<'a>,
    /// What those parts of a step read as that are left alone.
    pub(crate) fill: &'a Chain,
    /// Steps that read the same here are left alone too.
    pub(crate) unless: Option<&'a Chain>,
    /// How the source is cut.
    pub(crate) cut: Cut,
    /// Compress.
    pub(crate) pack: bool,
    /// Threads at most.
    pub(crate) workers: NonZeroUsize,
    /// Bytes a second at most.
    pub(crate) rate: Option<NonZeroU64>,
}

impl Transfer<'_> {
    /// Copies. What was written is not durable yet when this returns.
    pub(crate) fn run(self, job: Job<'_>) -> Result<Summary> {
        job.observer.total(self.source.size());
        let feed = Mutex::new(Feed::Scan(Scanner::new(self.source, self.cut, self.leave)));
        let mut lane = Lane::new(feed, self.source, Sink::Existing(self.target), self.cut, job);
        lane.below = Some(self.fill);
        lane.unless = self.unless;
        lane.pack = self.pack;
        lane.pace = self.rate.map(RateLimit::new);
        let started = lane.run(self.workers)?;
        job.check()?;
        let mut summary = summary(&lane, started);
        summary.virtual_size = self.source.size();
        Ok(summary)
    }
}
