//! Converting into an image that exists.

use std::sync::Mutex;

use diskmill_core::{Job, Result};
use diskmill_storage::RateLimit;

use super::lane::{Feed, Lane};
use super::sink::{Existing, Sink};
use super::source::{Cut, Scanner, Source};
use super::{ConvertError, ExistingImage, PAGE, Plan, Summary, cut, summary, workers};
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
    let cut = Cut {
        top_only: image.backing.is_some(),
        below_end: opened.below.virtual_size(),
        ..cut(plan, opened.top.facts().unit.unwrap_or(PAGE))
    };
    let workers = workers(plan);
    job.observer.total(source.size());
    let sink = Sink::Existing(Existing {
        image: &*opened.top,
        below: &opened.below,
        is_zero: image.is_zero || image.open.spec.zeroinit,
    });
    let feed = Mutex::new(Feed::Scan(Scanner::new(source, cut)));
    let mut lane = Lane::new(feed, source, sink, cut, job);
    lane.below = Some(&opened.below);
    lane.pack = plan.compress.is_some();
    lane.pace = plan.rate.map(RateLimit::new);
    let started = lane.run(workers)?;
    job.check()?;
    opened.top.flush()?;
    let mut summary = summary(&lane, started);
    summary.virtual_size = source.size();
    Ok(summary)
}
