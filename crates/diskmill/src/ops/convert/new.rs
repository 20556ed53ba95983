//! Converting into a new image.

use std::sync::Mutex;

use diskmill_core::{
    BackingName, Builder, Chain, CreateSpec, Driver, Finish, Format, ForwardSource, Job, OutputSpec, Result,
};
use diskmill_storage::RateLimit;

use super::kept::Kept;
use super::lane::{Feed, Lane, Stream};
use super::leave::Leave;
use super::sink::{Ordered, Sink};
use super::source::{Cut, Scanner, Source};
use super::{
    ConvertError, Input, NewImage, Output, Plan, Summary, bitmaps, cut, cut_whole, summary, workers,
};
use crate::open::OpenRequest;
use crate::ops::create::{self, CreateError};
use crate::target::Target;

/// Whether an image of this kind can be made of a stream whose length shows only at its end.
pub(super) fn takes_streams(image: &NewImage) -> bool {
    image.format == Format::Raw.name()
}

/// Fills a new image from `source`.
pub(super) fn to_image(plan: &Plan, image: &NewImage, source: &Source, job: Job<'_>) -> Result<Summary> {
    let (start, below) = Start::image(plan, image, source.size())?;
    let cut = cut_for(plan, &*start.builder);
    let tops = below.as_ref().map(|below| (source.tops(), below.virtual_size()));
    let (source, leave) = match &tops {
        Some((tops, end)) => (tops, Leave::Absent { end: *end }),
        None => (source, Leave::Nothing),
    };
    let feed = Feed::Scan(Scanner::new(source, cut, leave));
    start.run(
        plan,
        Reading {
            source,
            below: below.as_ref(),
            feed,
            cut,
        },
        job,
    )
}

/// Fills a new image from all states of one.
pub(super) fn with_snapshots(plan: &Plan, image: &NewImage, kept: &Kept, job: Job<'_>) -> Result<Summary> {
    let source = kept.first()?;
    bitmaps::check(plan, kept.top()?, job)?;
    let (start, _) = Start::image(plan, image, source.size())?;
    job.observer.total(source.size().saturating_add(kept.rest()));
    let mut summary = fill_from(plan, start.builder, &source, job)?;
    kept.carry(plan, image, &start.target, job)?;
    if plan.bitmaps {
        let layer = start.target.reopen(&image.format, &image.reopening())?;
        bitmaps::copy(plan, kept.top()?, &*layer)?;
        layer.flush()?;
    }
    summary.virtual_size = kept.virtual_size();
    summary.in_place = start.target.in_place();
    start.target.commit(plan.durability)?;
    Ok(summary)
}

/// Fills a new image from a stream.
pub(super) fn stream_to_image(
    plan: &Plan,
    image: &NewImage,
    stream: &mut dyn ForwardSource,
    job: Job<'_>,
) -> Result<Summary> {
    let (start, _) = Start::image(plan, image, 0)?;
    start.run_stream(plan, stream, job)
}

/// Sends `source` to standard output, raw.
pub(super) fn to_stdout(plan: &Plan, source: &Source, job: Job<'_>) -> Result<Summary> {
    let start = Start::stdout(plan, source.size())?;
    let cut = cut_for(plan, &*start.builder);
    let feed = Feed::Scan(Scanner::new(source, cut, Leave::Nothing));
    start.run(
        plan,
        Reading {
            source,
            below: None,
            feed,
            cut,
        },
        job,
    )
}

/// Sends a stream to standard output, raw.
pub(super) fn stream_to_stdout(plan: &Plan, stream: &mut dyn ForwardSource, job: Job<'_>) -> Result<Summary> {
    Start::stdout(plan, 0)?.run_stream(plan, stream, job)
}

/// How a source is cut for `builder`.
fn cut_for(plan: &Plan, builder: &dyn Builder) -> Cut {
    let mut fitting = if builder.packs() {
        cut_whole(plan, builder.unit())
    } else {
        cut(plan, builder.unit())
    };
    fitting.keep_zeros |= builder.stores_zeros();
    fitting
}

/// A new image that has been started.
pub(super) struct Start {
    pub(super) target: Target,
    pub(super) builder: Box<dyn Builder>,
}

/// What it is filled with.
pub(super) struct Reading<'a> {
    pub(super) source: &'a Source,
    pub(super) below: Option<&'a Chain>,
    pub(super) feed: Feed<'a>,
    pub(super) cut: Cut,
}

impl Start {
    /// Starts `image`, and opens what it is backed by.
    fn image(plan: &Plan, image: &NewImage, size: u64) -> Result<(Self, Option<Chain>)> {
        let path = image.target.path();
        Self::image_at(plan, image, size).map_err(|error| error.op("create").path(path))
    }

    fn image_at(plan: &Plan, image: &NewImage, size: u64) -> Result<(Self, Option<Chain>)> {
        let driver = create::creatable(&image.format)?;
        let mut options = image.options.clone();
        create::check_options(driver, &options)?;
        // The sources say how large it is.
        options.take("size");
        let (backing, format) = create::take_backing(
            &mut options,
            image.backing.as_deref(),
            image.backing_format.as_deref(),
        );
        let mut spec = CreateSpec::new(create::whole_sectors(size)?);
        spec.options = options;
        spec.secrets = image.secrets.for_image(&*image.target.shown);
        create::name_it(&mut spec, path(image));
        let mut below = None;
        if let Some(name) = backing {
            if plan.inputs.len() > 1 {
                return Err(ConvertError::BackingWithSeveral.usage());
            }
            create::check_backing(driver, &image.target, &name)?;
            if format.is_none() {
                return Err(CreateError::BackingFormatMissing { detected: None }.usage());
            }
            let like = backing_like(plan, image);
            let opened = create::open_backing(&image.target, &name, format.as_deref(), &like)?;
            spec.backing_facts = opened.nodes.first().map(|node| Box::new(node.facts.clone()));
            below = Some(opened.chain);
            spec.backing = Some(BackingName { name, format });
        }
        let outputs = outputs(plan, driver, &mut spec)?;
        let mut target = Target::create(
            path(image),
            &outputs,
            image.cache,
            &backing_like(plan, image).policy,
        )?;
        target.surround(path(image), image.around.as_ref());
        let builder = driver.build(&spec, target.files())?;
        Ok((Self { target, builder }, below))
    }

    fn stdout(plan: &Plan, size: u64) -> Result<Self> {
        let driver = create::creatable(Format::Raw.name())?;
        let mut spec = CreateSpec::new(create::whole_sectors(size)?);
        outputs(plan, driver, &mut spec)?;
        let target = Target::stdout()?;
        let builder = driver.build(&spec, target.files())?;
        Ok(Self { target, builder })
    }

    pub(super) fn run_stream(
        self,
        plan: &Plan,
        stream: &mut dyn ForwardSource,
        job: Job<'_>,
    ) -> Result<Summary> {
        let source = Source::new(Vec::new())?;
        let cut = cut_for(plan, &*self.builder);
        let reading = Reading {
            source: &source,
            below: None,
            feed: Feed::Stream(Stream::new(stream, cut)),
            cut,
        };
        self.run(plan, reading, job)
    }

    pub(super) fn run<'a>(self, plan: &Plan, reading: Reading<'a>, job: Job<'a>) -> Result<Summary> {
        if !matches!(reading.feed, Feed::Stream(_)) {
            job.observer.total(reading.source.size());
        }
        let source = reading.source;
        let mut summary = fill(plan, self.builder, reading, job)?;
        if let (true, Output::New(image)) = (plan.bitmaps, &plan.output) {
            let layer = self.target.reopen(&image.format, &image.reopening())?;
            bitmaps::copy(plan, &**source.layer(0, 0)?, &*layer)?;
            layer.flush()?;
        }
        summary.in_place = self.target.in_place();
        self.target.commit(plan.durability)?;
        Ok(summary)
    }
}

/// Fills `builder` with all of `source`; the files it writes to stay the caller's to name.
pub(crate) fn fill_from(
    plan: &Plan,
    builder: Box<dyn Builder>,
    source: &Source,
    job: Job<'_>,
) -> Result<Summary> {
    let cut = cut_for(plan, &*builder);
    let reading = Reading {
        source,
        below: None,
        feed: Feed::Scan(Scanner::new(source, cut, Leave::Nothing)),
        cut,
    };
    fill(plan, builder, reading, job)
}

fn fill<'a>(plan: &Plan, builder: Box<dyn Builder>, reading: Reading<'a>, job: Job<'a>) -> Result<Summary> {
    let Reading {
        source,
        below,
        feed,
        cut,
    } = reading;
    let workers = workers(plan.workers);
    let streamed = matches!(feed, Feed::Stream(_));
    let packs = builder.packs();
    let sink = Sink::New(Ordered::new(builder, workers.get()));
    let mut lane = Lane::new(Mutex::new(feed), source, sink, cut, job);
    lane.below = below;
    lane.pack = plan.compress.is_some() || packs;
    lane.pace = plan.rate.map(RateLimit::new);
    let started = lane.run(workers)?;
    job.check()?;
    let mut summary = summary(&lane, started);
    let mut end = Finish::new(plan.durability);
    if streamed {
        end.final_size = Some(summary.virtual_size);
    } else {
        summary.virtual_size = source.size();
    }
    if let Some(builder) = lane.into_builder() {
        builder.finish(end)?;
    }
    Ok(summary)
}

/// The files of the new image, whose `spec` gets what the plan says of compression.
fn outputs(plan: &Plan, driver: &dyn Driver, spec: &mut CreateSpec) -> Result<Vec<OutputSpec>> {
    let packs = matches!(driver.format(), Format::Qcow | Format::Qcow2 | Format::Vmdk);
    if plan.compress.is_some() && !packs {
        return Err(ConvertError::NoCompression(driver.format().name().to_owned()).unsupported());
    }
    let encrypted =
        spec.options.text("encrypt.format").is_some() || spec.options.bool("encryption")? == Some(true);
    if plan.compress.is_some() && encrypted {
        return Err(ConvertError::CompressionAndEncryption.usage());
    }
    spec.compression = plan.compress;
    driver.outputs(spec)
}

/// The target's backing image is opened under the rules of the source.
fn backing_like(plan: &Plan, image: &NewImage) -> OpenRequest {
    match plan.inputs.first() {
        Some(Input::Image(request)) => (**request).clone(),
        _ => OpenRequest::new(image.target.clone()),
    }
}

fn path(image: &NewImage) -> &std::path::Path {
    image.target.path()
}
