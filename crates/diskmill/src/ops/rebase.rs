//! Giving an image another one to be backed by.
//!
//! What the image does not hold itself, and what reads otherwise in the new backing image than in the old, is written
//! into it; when that is durable the name is changed. Until then the image reads as before whatever it has got, so that
//! the same command can simply be run again after it was killed.

use std::num::NonZeroUsize;
use std::sync::Arc;

use diskmill_core::{BackingName, Chain, Error, ErrorKind, Facts, Identity, Job, Layer, Result};
use diskmill_formats::registry;
use diskmill_storage::CacheMode;

use super::convert::{Cut, Existing, Leave, Other, Source, Summary, Transfer, workers};
use crate::open::{self, Image, ImageMut, OpenRequest, OpenWarning};
use crate::spec::{ImageSpec, SpecError, driver_error};

/// A change of the backing image that is wanted.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct RebaseRequest {
    /// The image.
    pub open: OpenRequest,
    /// The name of the new backing image, as it is to be written into the image; `None` or an empty one for nothing.
    pub backing: Option<String>,
    /// The format of the new backing image.
    pub format: Option<String>,
    /// How the new backing image goes through the host's page cache.
    pub cache: CacheMode,
    /// Read the new backing image even while another process writes it.
    pub share: bool,
    /// Only change the name (`-u`): what the image reads as afterwards is the caller's business.
    pub unchecked: bool,
    /// Compress what is written into the image.
    pub compress: bool,
    /// Threads to use at most; `None` means one for each core.
    pub workers: Option<NonZeroUsize>,
}

impl RebaseRequest {
    /// A change of what `open` is backed by to nothing.
    pub fn new(open: OpenRequest) -> Self {
        Self {
            open,
            backing: None,
            format: None,
            cache: CacheMode::Writeback,
            share: false,
            unchecked: false,
            compress: false,
            workers: None,
        }
    }
}

/// What a change of the backing image did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Rebased {
    /// Bytes read from the old backing images.
    pub read: u64,
    /// Bytes of data written into the image.
    pub stored: u64,
}

/// Why the backing image was not changed. The source of an [`Error`] from [`run`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RebaseError {
    /// A format that nobody knows.
    #[error("unknown backing format '{0}'")]
    UnknownFormat(String),
    /// A backing image without its format: guessing it at every opening would let a guest choose.
    #[error("the format of the new backing image '{0}' is not given")]
    FormatMissing(String),
    /// The new backing image did not open.
    #[error("new backing image '{name}' not opened")]
    NewBacking {
        /// Its name.
        name: String,
        /// Why.
        #[source]
        source: Error,
    },
    /// All is ready, and the image did not take the name.
    #[error("backing image not changed to '{name}'")]
    Change {
        /// The name.
        name: String,
        /// Why.
        #[source]
        source: Error,
    },
}

/// The finest step in which contents are compared, in bytes.
const STEP: u64 = 4096;

/// Changes what an image is backed by. Warnings of opening it go to `warn` before anything is changed.
pub fn run(request: &RebaseRequest, warn: &mut dyn FnMut(&OpenWarning), job: Job<'_>) -> Result<Rebased> {
    job.check()?;
    let path = request.open.spec.path();
    let name = request.backing.clone().filter(|name| !name.is_empty());
    if let Some(format) = &request.format
        && registry::by_name(format).is_none()
        && !matches!(driver_error(format), SpecError::UnsupportedDriver(_))
    {
        let error = RebaseError::UnknownFormat(format.clone());
        return Err(Error::new(ErrorKind::Usage, error).op("rebase").path(path));
    }
    let mut wanted = request.open.clone();
    wanted.backing = !request.unchecked;
    let image = open::image_mut(&wanted)?;
    for warning in &image.warnings {
        warn(warning);
    }
    let mut rebased = Rebased::default();
    if let (Some(name), None) = (&name, &request.format) {
        let error = RebaseError::FormatMissing(name.clone());
        return Err(Error::new(ErrorKind::Usage, error).op("rebase").path(path));
    }
    if !request.unchecked {
        let new = match &name {
            Some(name) => open_new(request, name)?,
            None => Image::none(),
        };
        image.top.expect_backing(content_id(&new));
        image.top.expect_parent(identity(&new));
        let summary = copy(request, &image, new, job).map_err(|error| error.op("rebase").path(path))?;
        rebased.read = summary.read;
        rebased.stored = summary.stored;
    } else if let (Some(name), true) = (&name, knows_more(image.top.facts())) {
        // It names what is in the new backing image beside its name, or which one it is.
        let new = open_new(request, name)?;
        image.top.expect_backing(content_id(&new));
        image.top.expect_parent(identity(&new));
    }
    job.check()?;
    let backing = name.clone().map(|name| BackingName {
        name,
        format: request.format.clone(),
    });
    image.top.set_backing(backing.as_ref()).map_err(|source| {
        let name = name.unwrap_or_default();
        Error::new(source.kind(), RebaseError::Change { name, source })
            .op("rebase")
            .path(path)
    })?;
    Ok(rebased)
}

fn content_id(image: &Image) -> Option<u32> {
    image.chain.layers().first().and_then(|layer| layer.content_id())
}

fn identity(image: &Image) -> Option<Identity> {
    image.chain.layers().first().and_then(|layer| layer.identity())
}

/// Whether an image names its backing image by more than a name.
fn knows_more(facts: &Facts) -> bool {
    facts.content_id.is_some() || facts.parent.is_some()
}

/// Opens the new backing image, whose name starts at the directory of the image.
fn open_new(request: &RebaseRequest, name: &str) -> Result<Image> {
    let opened = ImageSpec::from_name(name).and_then(|mut spec| {
        spec.file.path = open::resolve_name(request.open.spec.path(), spec.file.path.as_os_str());
        let mut wanted = OpenRequest::new(spec);
        wanted.format.clone_from(&request.format);
        wanted.cache = request.cache;
        wanted.share = request.share;
        wanted.hold = true;
        wanted.policy = request.open.policy.clone();
        wanted.limits = request.open.limits;
        wanted.secrets = request.open.secrets.clone();
        wanted.needs_keys = request.open.needs_keys;
        wanted.historic = request.open.historic;
        wanted.around.clone_from(&request.open.around);
        open::image(&wanted)
    });
    opened.map_err(|source| {
        let name = name.to_owned();
        Error::new(source.kind(), RebaseError::NewBacking { name, source })
            .op("rebase")
            .path(request.open.spec.path())
    })
}

/// Writes into `image` what would read otherwise over `new`. When this returns that is durable.
fn copy(request: &RebaseRequest, image: &ImageMut, new: Image, job: Job<'_>) -> Result<Summary> {
    let facts = image.top.facts();
    let unit = facts.unit.unwrap_or(STEP);
    let step = match (request.compress, facts.granule) {
        (false, Some(granule)) => granule,
        _ => unit,
    };
    let mut layers: Vec<Arc<dyn Layer>> = vec![image.top.clone()];
    layers.extend(image.below.layers().iter().cloned());
    let now = Chain::new(layers);
    let names = image.nodes.iter().map(|node| Arc::clone(&node.filename));
    let source = Source::new(vec![(now.clone(), names.collect())])?;
    let other = Other {
        chain: new.chain,
        nodes: new.nodes,
        source: image.nodes.clone(),
    };
    let transfer = Transfer {
        source: &source,
        leave: Leave::Same(&other),
        target: Existing {
            image: &*image.top,
            below: &image.below,
            shown: &other.chain,
            is_zero: false,
        },
        fill: &now,
        unless: Some(&other.chain),
        cut: Cut::plain(step, 0),
        pack: request.compress,
        workers: workers(request.workers),
        rate: None,
    };
    let summary = transfer.run(job)?;
    image.top.flush()?;
    Ok(summary)
}
