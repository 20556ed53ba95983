//! Putting what an overlay holds into an image it is backed by.
//!
//! All that the overlay, and the images between, say of the disk goes to the base: data, and zeros where they hide what
//! the base has. Only when that is durable is the overlay emptied. Killed at any moment, the same command does the rest:
//! what has been copied reads the same through the overlay as it did before.

use std::num::{NonZeroU64, NonZeroUsize};
use std::sync::Arc;

use diskmill_core::{Chain, Error, ErrorKind, GuestOffset, Job, Layer, Result, ZeroHow};

use super::convert::{Cut, Existing, Leave, Source, Transfer, workers};
use crate::open::{self, Base, ChainMut, OpenRequest, OpenWarning};

/// A commit that is wanted.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct CommitRequest {
    /// The overlay.
    pub open: OpenRequest,
    /// Where its data goes.
    pub base: Base,
    /// Leave the overlay as it is instead of emptying it. An overlay whose data went further down than to the image it
    /// names always stays.
    pub keep: bool,
    /// Bytes to write a second at most.
    pub rate: Option<NonZeroU64>,
    /// Threads to use at most; `None` means one for each core.
    pub workers: Option<NonZeroUsize>,
}

impl CommitRequest {
    /// A commit of `open` to the image it is backed by.
    pub fn new(open: OpenRequest) -> Self {
        Self {
            open,
            base: Base::Next,
            keep: false,
            rate: None,
            workers: None,
        }
    }
}

/// What a commit did.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Committed {
    /// The base, by the name it is shown by.
    pub base: Arc<str>,
    /// Its size before, in bytes.
    pub from: u64,
    /// Its size after, in bytes.
    pub to: u64,
    /// Bytes read from the overlay and the images between.
    pub read: u64,
    /// Bytes of data written to the base.
    pub stored: u64,
    /// Whether the overlay was emptied.
    pub emptied: bool,
}

/// The finest step in which data is told from zeros, in bytes.
const STEP: u64 = 4096;

/// Bytes by which a base grows at once whose new bytes read as anything.
const GROWTH: u64 = 1 << 20;

/// Commits. Warnings of opening the images go to `warn` before anything is changed.
///
/// An error of kind [`Usage`](diskmill_core::ErrorKind::Usage) with an [`OpenError`](crate::open::OpenError) if the
/// overlay has no such base.
pub fn run(request: &CommitRequest, warn: &mut dyn FnMut(&OpenWarning), job: Job<'_>) -> Result<Committed> {
    job.check()?;
    let mut wanted = request.open.clone();
    wanted.unmap = true;
    let chain = open::chain_mut(&wanted, &request.base)?;
    for warning in &chain.warnings {
        warn(warning);
    }
    let depth = chain.upper.layers().len();
    let name = chain.nodes.get(depth).map(|node| Arc::clone(&node.filename));
    let name = name.unwrap_or_default();
    let from = chain.base.virtual_size();
    // Where an overlay tells the state of what it is backed by, it must open however far this gets.
    let adopt = |state| match depth {
        1 => chain
            .top
            .set_parent_state(state)
            .map_err(|error| error.op("write").path(request.open.spec.path())),
        _ => Ok(()),
    };
    adopt([0; 16])?;
    renew(&chain, depth).map_err(|error| error.op("commit to").path(&*name))?;
    let summary = merge(request, &chain, from, job).map_err(|error| error.op("commit to").path(&*name))?;
    if let Some(identity) = chain.base.identity() {
        adopt(identity.state)?;
    }
    let emptied = !request.keep && depth == 1;
    if emptied {
        chain
            .top
            .clear()
            .and_then(|()| chain.top.flush())
            .map_err(|error| error.op("empty").path(request.open.spec.path()))?;
    }
    Ok(Committed {
        base: name,
        from,
        to: chain.base.virtual_size(),
        read: summary.read,
        stored: summary.stored,
        emptied,
    })
}

/// Where the base keeps count of its content, overlays are to notice that it changes; this one goes along with it.
///
/// Killed between the two, the overlay opens again once it is told by a rebase without copying that it is the one.
fn renew(chain: &ChainMut, depth: usize) -> Result<()> {
    let overlay = chain.upper.layers().last();
    if overlay.is_none_or(|overlay| overlay.facts().backing_content_id.is_none()) {
        return Ok(());
    }
    if depth > 1 {
        let text =
            "the image above the base knows what is in it and is only read: commit to the next image first";
        return Err(Error::new(ErrorKind::Unsupported, text));
    }
    chain.base.renew_content_id()?;
    chain.top.expect_backing(chain.base.content_id());
    chain.top.set_backing(chain.top.facts().backing.as_ref())
}

/// Makes the base, which has `end` bytes, read as the overlay does. When this returns that is durable.
fn merge(
    request: &CommitRequest,
    chain: &ChainMut,
    end: u64,
    job: Job<'_>,
) -> Result<super::convert::Summary> {
    let names = chain.nodes.iter().map(|node| Arc::clone(&node.filename));
    let source = Source::new(vec![(chain.upper.clone(), names.collect())])?;
    grow(chain, end, source.size(), job)?;
    let mut layers: Vec<Arc<dyn Layer>> = vec![chain.base.clone()];
    layers.extend(chain.below.layers().iter().cloned());
    let unit = chain.base.facts().unit.unwrap_or(STEP);
    let step = unit.min(STEP);
    let transfer = Transfer {
        source: &source,
        leave: Leave::Absent { end },
        target: Existing {
            image: &*chain.base,
            below: &chain.below,
            shown: &chain.below,
            is_zero: false,
        },
        fill: &Chain::new(layers),
        unless: None,
        // Zeros among data that are less than a unit of the base would only be written one by one.
        cut: Cut::plain(step, unit.max(STEP)),
        pack: false,
        workers: workers(request.workers),
        rate: request.rate,
    };
    let summary = transfer.run(job)?;
    chain.base.flush()?;
    Ok(summary)
}

/// Makes the base, which has `end` bytes, as long as `size` if it is shorter. What it grows by reads as zeros.
fn grow(chain: &ChainMut, end: u64, size: u64, job: Job<'_>) -> Result<()> {
    let stores_zeros = chain.base.stores_zeros();
    let mut end = end;
    while end < size {
        job.check()?;
        // Step by step: killed in between, the overlay shows little that nobody has written.
        let next = if stores_zeros {
            size.min(end.saturating_add(GROWTH))
        } else {
            size
        };
        chain.base.resize(next, &chain.below)?;
        if stores_zeros {
            let grown = GuestOffset::new(end)..GuestOffset::new(next);
            chain.base.zero(grown, ZeroHow::MayUnmap, &chain.below)?;
        }
        end = next;
    }
    Ok(())
}
