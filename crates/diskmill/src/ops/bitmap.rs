//! Dirty bitmaps: changing them, reading what is dirty, and copying just that.

use std::io;
use std::ops::Range;
use std::path::Path;

use diskmill_core::{
    BackingName, BitmapError, BitmapFacts, Bitmaps, Builder, Chain, CreateSpec, DirtyRuns, Durability, Error,
    ErrorKind, Finish, Format, GuestOffset, Job, Layer, NewBitmap, OpenSpec, Options, Result, Run, State,
    Stored, Writes,
};
use diskmill_storage::CacheMode;

use super::create;
use crate::open::{self, Image, ImageMut, OpenRequest, OpenWarning};
use crate::target::Target;

/// Something to do with a dirty bitmap.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Action {
    /// Make it.
    Add,
    /// Give it up.
    Remove,
    /// Make nothing dirty in it.
    Clear,
    /// Record changes in it from now on.
    Enable,
    /// Record no changes in it from now on.
    Disable,
    /// Make dirty in it what is dirty in the bitmap of this name.
    Merge(String),
}

impl Action {
    /// What it is called.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Add => "add",
            Self::Remove => "remove",
            Self::Clear => "clear",
            Self::Enable => "enable",
            Self::Disable => "disable",
            Self::Merge(_) => "merge",
        }
    }
}

/// Changes of a dirty bitmap.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct BitmapRequest {
    /// Which image.
    pub open: OpenRequest,
    /// Which bitmap.
    pub name: String,
    /// What to do with it, in this order.
    pub actions: Vec<Action>,
    /// The granularity of what is added, in bytes; `None` leaves it to the format.
    pub granularity: Option<u64>,
    /// The image that the bitmaps to merge are in, if that is another one.
    pub source: Option<OpenRequest>,
}

impl BitmapRequest {
    /// These actions on the bitmap `name`.
    pub fn new(open: OpenRequest, name: impl Into<String>, actions: Vec<Action>) -> Self {
        Self {
            open,
            name: name.into(),
            actions,
            granularity: None,
            source: None,
        }
    }
}

/// What failed while bitmaps were changed or exported. The source of an [`Error`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BitmapFailure {
    /// The image that bitmaps are merged from did not open.
    #[error("source of the merge not opened")]
    Source(#[source] Error),
    /// An action failed. Those before it are done.
    #[error("{action} on dirty bitmap '{name}'")]
    Action {
        /// What it is called.
        action: &'static str,
        /// The bitmap.
        name: String,
        /// Why.
        #[source]
        source: Error,
    },
    /// Only these formats hold a part of a disk.
    #[error("a copy of dirty ranges is raw or qcow2, not '{0}'")]
    Format(String),
    /// The copy would take the place of what it is made of.
    #[error("the copy would replace the image, or one that it is backed by")]
    OverItself,
}

/// Changes a dirty bitmap. Warnings of opening the image go to `warn` before anything is changed. Each action is durable
/// before the next; what fails is a [`BitmapFailure`].
pub fn change(request: &BitmapRequest, warn: &mut dyn FnMut(&OpenWarning)) -> Result<Vec<BitmapFacts>> {
    let image = open::image_mut(&alone(&request.open))?;
    for warning in &image.warnings {
        warn(warning);
    }
    let source = match &request.source {
        Some(source) => Some(open::image(&alone(source)).map_err(|error| {
            let kind = error.kind();
            Error::new(kind, BitmapFailure::Source(error))
        })?),
        None => None,
    };
    for action in &request.actions {
        act(&image, source.as_ref(), request, action).map_err(|source| {
            let kind = source.kind();
            let failure = BitmapFailure::Action {
                action: action.name(),
                name: request.name.clone(),
                source,
            };
            Error::new(kind, failure).path(request.open.spec.path())
        })?;
    }
    image.top.flush()?;
    Ok(image.top.bitmaps().map(Bitmaps::list).unwrap_or_default())
}

/// Bitmaps are in the image itself: whether what it is backed by can be had is nothing to them.
fn alone(request: &OpenRequest) -> OpenRequest {
    let mut request = request.clone();
    request.backing = false;
    request
}

fn act(image: &ImageMut, source: Option<&Image>, request: &BitmapRequest, action: &Action) -> Result<()> {
    let name = &request.name;
    let Some(bitmaps) = image.top.bitmaps() else {
        return Err(match action {
            Action::Add => unsupported(image.top.facts().format),
            _ => not_found(name),
        });
    };
    match action {
        Action::Add => {
            let new = NewBitmap {
                name: name.clone(),
                granularity: request.granularity,
                enabled: true,
            };
            bitmaps.add(&new).map(|_| ())
        }
        Action::Remove => bitmaps.remove(name),
        Action::Clear => bitmaps.clear(name),
        Action::Enable => bitmaps.enable(name),
        Action::Disable => bitmaps.disable(name),
        Action::Merge(from) => {
            // What is wrong with the one to change is told first.
            match bitmaps.list().iter().find(|facts| facts.name == *name) {
                None => return Err(not_found(name)),
                Some(facts) if facts.inconsistent => {
                    let error = BitmapError::Inconsistent(name.clone());
                    return Err(Error::new(ErrorKind::Unsupported, error));
                }
                Some(_) => {}
            }
            let runs = match source.map(top) {
                Some(layer) => layer?.dirty(from),
                None => image.top.dirty(from),
            };
            let mut runs = runs.map_err(|error| match error.find() {
                Some(BitmapError::Unsupported(_)) => not_found(from),
                _ => error,
            })?;
            bitmaps.merge(name, &mut *runs)
        }
    }
}

fn not_found(name: &str) -> Error {
    Error::new(ErrorKind::NotFound, BitmapError::NotFound(name.to_owned()))
}

fn unsupported(format: Format) -> Error {
    Error::new(ErrorKind::Unsupported, BitmapError::Unsupported(format))
}

fn top(image: &Image) -> Result<&dyn Layer> {
    let layer = image.chain.layers().first();
    layer
        .map(|layer| &**layer)
        .ok_or_else(|| Error::bare(ErrorKind::Usage))
}

/// A dirty bitmap that was opened for reading.
#[derive(Debug)]
pub struct Export {
    image: Image,
    facts: BitmapFacts,
}

impl Export {
    /// Opens an image and finds the bitmap `name` in it. An error with a [`BitmapError`] if there is none, or if it is
    /// inconsistent.
    pub fn open(request: &OpenRequest, name: &str) -> Result<Self> {
        let path = request.spec.path();
        let mut request = request.clone();
        request.hold = true;
        let image = open::image(&request)?;
        let layer = top(&image)?;
        // It knows whether there is such a bitmap, and whether it can be read.
        layer.dirty(name).map_err(|error| error.op("export").path(path))?;
        let listed = layer.facts().bitmaps.iter().flatten();
        let facts = listed.into_iter().find(|facts| facts.name == name).cloned();
        let facts =
            facts.ok_or_else(|| Error::new(ErrorKind::NotFound, BitmapError::NotFound(name.to_owned())))?;
        Ok(Self { image, facts })
    }

    /// The bitmap.
    pub fn facts(&self) -> &BitmapFacts {
        &self.facts
    }

    /// The size of the disk, in bytes.
    pub fn disk_size(&self) -> u64 {
        self.image.chain.virtual_size()
    }

    /// What is dirty, in order.
    pub fn runs(&self) -> Result<Box<dyn DirtyRuns>> {
        top(&self.image)?.dirty(&self.facts.name)
    }

    /// Copies what is dirty, and nothing else, into a new image at `path`: `raw`, of the disk's size and sparse, or
    /// `qcow2`, an overlay that names no backing image yet and shows through where nothing is dirty. Returns how many
    /// bytes were dirty.
    ///
    /// In an overlay, all of a cluster is stored in which something is dirty. The file is absent, or as it was, if this
    /// fails.
    pub fn copy(&self, path: &Path, format: &str, job: Job<'_>) -> Result<u64> {
        let refuse = |failure| Err(Error::new(ErrorKind::Usage, failure).op("export").path(path));
        if ![Format::Raw.name(), Format::Qcow2.name()].contains(&format) {
            return refuse(BitmapFailure::Format(format.to_owned()));
        }
        if self.is_part(path)? {
            return refuse(BitmapFailure::OverItself);
        }
        self.copy_to(path, format, job)
            .map_err(|error| error.op("export").path(path))
    }

    /// Whether `path` is a file that the image is made of.
    fn is_part(&self, path: &Path) -> Result<bool> {
        let found = match std::fs::canonicalize(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            found => found.map_err(Error::from)?,
        };
        let files = self.image.nodes.iter().flat_map(|node| &node.files);
        Ok(files
            .filter_map(|file| std::fs::canonicalize(&**file).ok())
            .any(|file| file == found))
    }

    fn copy_to(&self, path: &Path, format: &str, job: Job<'_>) -> Result<u64> {
        let overlay = format == Format::Qcow2.name();
        let driver = create::creatable(format)?;
        let mut spec = CreateSpec::new(create::whole_sectors(self.disk_size())?);
        if overlay {
            // Fine enough to store little that is not dirty; coarse enough for a table of bearable size.
            let cluster = self.facts.granularity.clamp(4 << 10, 64 << 10);
            spec.options = Options::parse(&format!("cluster_size={cluster}"));
            // Zeros are only kept apart from what shows through if there is something to show.
            spec.backing = Some(BackingName {
                name: "-".to_owned(),
                format: Some(Format::Raw.name().to_owned()),
            });
        }
        let outputs = driver.outputs(&spec)?;
        let policy = crate::policy::References::Any;
        let target = Target::create(path, &outputs, CacheMode::Writeback, &policy)?;
        let mut builder = driver.build(&spec, target.files())?;
        job.observer.total(self.disk_size());
        let dirty = self.fill(&mut *builder, overlay, job)?;
        builder.finish(Finish::new(Durability::None))?;
        if overlay {
            let layer = target.reopen(format, &OpenSpec::default())?;
            layer.set_backing(None)?;
            layer.flush()?;
        }
        target.commit(Durability::Synced)?;
        Ok(dirty)
    }

    /// Places the whole disk: what is dirty as it reads, the rest as absent. With `whole`, all of a unit is stored in
    /// which something is dirty.
    fn fill(&self, builder: &mut dyn Builder, whole: bool, job: Job<'_>) -> Result<u64> {
        let unit = builder.unit();
        let end = create::whole_sectors(self.disk_size())?;
        let mut runs = self.runs()?;
        let mut current = bytes(runs.next_run()?);
        let (mut placed, mut dirty) = (0, 0);
        while let Some(run) = current.clone() {
            job.check()?;
            let start = run.start - run.start % unit;
            absent(builder, placed..start)?;
            // As many runs as touch a piece that fits in memory.
            let limit = start.saturating_add(PIECE.max(unit)).min(end);
            let mut parts = Vec::new();
            let mut last = start;
            while let Some(run) = current.clone().filter(|run| run.start < limit) {
                last = run.end.min(limit);
                parts.push(run.start..last);
                dirty += last - run.start;
                current = match run.end > limit {
                    true => Some(limit..run.end),
                    false => bytes(runs.next_run()?),
                };
            }
            let stop = last.next_multiple_of(unit).min(end);
            if whole {
                parts = std::iter::once(start..stop).collect();
            }
            self.place(builder, start..stop, &parts)?;
            job.observer.advance(stop - placed);
            placed = stop;
        }
        absent(builder, placed..end)?;
        job.observer.advance(self.disk_size().saturating_sub(placed));
        Ok(dirty)
    }

    /// Places `range`, whole units: `parts` of it as they read, and zeros around them.
    fn place(&self, builder: &mut dyn Builder, range: Range<u64>, parts: &[Range<u64>]) -> Result<()> {
        let (unit, chain) = (builder.unit(), &self.image.chain);
        let mut at = range.start;
        while at < range.end {
            let start = GuestOffset::new(at);
            let len = zeros(chain, at, range.end, unit)?;
            if len > 0 {
                builder.fill(start..start.plus(len)?, Run::Zero)?;
                at += len;
                continue;
            }
            // Up to where units of zeros begin again.
            let mut stop = at;
            while stop < range.end && zeros(chain, stop, range.end, unit)? == 0 {
                stop = stop.saturating_add(unit).min(range.end);
            }
            let mut buf = vec![0; usize::try_from(stop - at).unwrap_or(0)];
            for part in parts {
                let (first, last) = (part.start.max(at), part.end.min(stop).min(chain.virtual_size()));
                if first < last {
                    let within = |place: u64| usize::try_from(place - at).unwrap_or(usize::MAX);
                    if let Some(piece) = buf.get_mut(within(first)..within(last)) {
                        chain.read_at(GuestOffset::new(first), piece)?;
                    }
                }
            }
            let mut writes = Writes::new();
            builder.place(start, Stored::Plain(&buf), &mut writes)?;
            writes.perform(builder.files())?;
            at = stop;
        }
        Ok(())
    }
}

/// Bytes that are copied at once: a multiple of every unit.
const PIECE: u64 = 2 << 20;

fn bytes(run: Option<Range<GuestOffset>>) -> Option<Range<u64>> {
    run.map(|run| run.start.get()..run.end.get())
}

/// How many bytes from `at` to `end` are zeros by word of the image: whole units, or all there are.
fn zeros(chain: &Chain, at: u64, end: u64, unit: u64) -> Result<u64> {
    let mut next = at;
    while next < end.min(chain.virtual_size()) {
        let found = chain.map(GuestOffset::new(next), end - next)?;
        if !matches!(found.state, State::Zero { .. } | State::Absent) {
            let len = next - at;
            return Ok(len - len % unit);
        }
        next += found.len;
    }
    Ok(end - at)
}

fn absent(builder: &mut dyn Builder, range: Range<u64>) -> Result<()> {
    if range.is_empty() {
        return Ok(());
    }
    builder.fill(
        GuestOffset::new(range.start)..GuestOffset::new(range.end),
        Run::Absent,
    )
}
