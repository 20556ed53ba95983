//! Where the bytes of a disk are.

use std::sync::Arc;

use diskmill_core::{Chain, Format, GuestOffset, HostRun, HostSpan, Result, State};

use crate::open::Image;

/// A run of a disk with one state, as `qemu-img map` shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct MapEntry {
    /// Its first byte.
    pub start: GuestOffset,
    /// Bytes in it.
    pub length: u64,
    /// Index of the layer that has it: 0 is the overlay.
    pub depth: usize,
    /// Whether some layer has it.
    pub present: bool,
    /// Whether it reads as zeros.
    pub zero: bool,
    /// Whether bytes are stored for it.
    pub data: bool,
    /// Whether it is stored compressed.
    pub compressed: bool,
    /// Where it is in `filename`, if it is stored as it is.
    pub offset: Option<u64>,
    /// The file it is in, if it is stored as it is.
    pub filename: Option<Arc<str>>,
}

/// Calls `each` with the runs of `image` from `start` to `start + max` (or the end), in order; they tile that range.
/// Runs that continue one another are joined.
pub fn walk(
    image: &Image,
    start: u64,
    max: Option<u64>,
    each: &mut dyn FnMut(MapEntry) -> Result<()>,
) -> Result<()> {
    let size = image.chain.virtual_size();
    let end = max.map_or(size, |max| start.saturating_add(max)).min(size);
    let mut walker = Walker::new(&image.chain);
    let mut at = start;
    let mut last: Option<MapEntry> = None;
    while at < end {
        let next = entry(image, at, walker.status(GuestOffset::new(at), end - at)?);
        at += next.length;
        match &mut last {
            Some(last) if continues(last, &next) => last.length += next.length,
            last => {
                if let Some(done) = last.replace(next) {
                    each(done)?;
                }
            }
        }
    }
    last.map_or(Ok(()), each)
}

fn continues(last: &MapEntry, next: &MapEntry) -> bool {
    (last.data, last.zero, last.compressed, last.present, last.depth)
        == (next.data, next.zero, next.compressed, next.present, next.depth)
        && last.filename == next.filename
        && last.offset.map(|offset| offset + last.length) == next.offset
}

/// What a run of a disk is, by the word of the layers and, where they leave it open, of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Status {
    /// Bytes in the run: at least 1.
    pub(crate) len: u64,
    /// Index of the layer that has it.
    pub(crate) depth: usize,
    /// Whether some layer has it.
    pub(crate) present: bool,
    /// Whether a layer has been asked past its end.
    pub(crate) past_end: bool,
    /// Whether it reads as zeros.
    pub(crate) zero: bool,
    /// Whether bytes are stored for it.
    pub(crate) data: bool,
    /// Whether it is stored compressed.
    pub(crate) compressed: bool,
    /// Where it is, if it is stored as it is or has a place kept.
    pub(crate) span: Option<HostSpan>,
}

/// Asks a chain for one run after another.
#[derive(Debug)]
pub(crate) struct Walker<'a> {
    chain: &'a Chain,
    /// For each layer, whether its stored bytes may be holes of the host; asked once.
    hollow: Vec<Option<bool>>,
}

impl<'a> Walker<'a> {
    pub(crate) fn new(chain: &'a Chain) -> Self {
        Self {
            chain,
            hollow: vec![None; chain.layers().len()],
        }
    }

    /// The run that starts at `at`: as much of it as can be told at once, at most `max` bytes.
    pub(crate) fn status(&mut self, at: GuestOffset, max: u64) -> Result<Status> {
        let found = self.chain.map(at, max)?;
        let mut status = Status {
            len: found.len,
            depth: found.depth,
            present: !found.past_end,
            past_end: found.past_end,
            zero: found.past_end,
            data: false,
            compressed: false,
            span: None,
        };
        match found.state {
            _ if found.past_end => self.look_for_kept(&mut status, at)?,
            State::Data(span) => {
                status.data = true;
                status.span = Some(span);
                self.look_for_holes(&mut status, span)?;
            }
            State::Zero { reserved } => {
                status.zero = true;
                status.span = reserved;
            }
            State::Absent => {
                status.present = false;
                status.zero = true;
                self.look_for_kept(&mut status, at)?;
            }
            State::Compressed(_) => {
                status.data = true;
                status.compressed = true;
            }
            // Encrypted, and whatever else only its format can read.
            _ => status.data = true,
        }
        Ok(status)
    }

    /// Bytes that nobody has may have a place in the last layer that was asked.
    fn look_for_kept(&self, status: &mut Status, at: GuestOffset) -> Result<()> {
        if let Some(layer) = self.chain.layers().get(status.asked()) {
            let (span, len) = layer.kept(at, status.len)?;
            status.len = len.clamp(1, status.len);
            status.span = span;
        }
        Ok(())
    }

    /// Stored bytes that are a hole of the host read as zeros.
    fn look_for_holes(&mut self, status: &mut Status, span: HostSpan) -> Result<()> {
        let (Some(layer), Some(hollow)) = (
            self.chain.layers().get(status.depth),
            self.hollow.get_mut(status.depth),
        ) else {
            return Ok(());
        };
        let is_hollow = match hollow {
            Some(known) => *known,
            None => *hollow.insert(layer.is_hollow()?),
        };
        let Some(file) = layer.file(span.file).filter(|_| is_hollow) else {
            return Ok(());
        };
        let len = match file.run_at(span.at)? {
            HostRun::Hole(len) => {
                status.zero = true;
                // A raw disk has no other word for zeros than its holes.
                status.data = layer.facts().format != Format::Raw;
                len
            }
            HostRun::Data(len) => len,
            _ => return Ok(()),
        };
        status.len = status.len.min(len.max(1));
        Ok(())
    }
}

impl Status {
    /// Index of the last layer that was asked. Nobody asks a layer for what is past its end.
    fn asked(&self) -> usize {
        self.depth.saturating_sub(usize::from(self.past_end))
    }
}

fn entry(image: &Image, at: u64, status: Status) -> MapEntry {
    let depth = status.asked();
    let files = image.nodes.get(depth).map(|node| &node.files);
    let filename = status
        .span
        .and_then(|span| files?.get(usize::from(span.file.0)).cloned());
    MapEntry {
        start: GuestOffset::new(at),
        length: status.len,
        depth,
        present: status.present,
        zero: status.zero,
        data: status.data,
        compressed: status.compressed,
        offset: status.span.map(|span| span.at.get()),
        filename,
    }
}
