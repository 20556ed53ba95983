//! Where the bytes of a disk are.

use std::sync::Arc;

use diskmill_core::{Format, GuestOffset, HostRun, HostSpan, Result, State};

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
    let mut walker = Walker::new(image)?;
    let mut at = start;
    let mut last: Option<MapEntry> = None;
    while at < end {
        let next = walker.entry(GuestOffset::new(at), end - at)?;
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

/// Asks an image for one run after another.
struct Walker<'a> {
    image: &'a Image,
    /// For each layer, whether its stored bytes may be holes of the host; asked once.
    hollow: Vec<Option<bool>>,
}

impl<'a> Walker<'a> {
    fn new(image: &'a Image) -> Result<Self> {
        Ok(Self {
            image,
            hollow: vec![None; image.chain.layers().len()],
        })
    }

    /// The run that starts at `at`: as much of it as can be told at once.
    fn entry(&mut self, at: GuestOffset, max: u64) -> Result<MapEntry> {
        let found = self.image.chain.map(at, max)?;
        let mut entry = MapEntry {
            start: at,
            length: found.len,
            depth: found.depth,
            present: true,
            zero: false,
            data: false,
            compressed: false,
            offset: None,
            filename: None,
        };
        if found.past_end {
            // Nobody has them: the layer above the one that ends here is the last that was asked.
            entry.depth = found.depth.saturating_sub(1);
            entry.present = false;
            entry.zero = true;
            return Ok(entry);
        }
        match found.state {
            State::Data(span) => {
                entry.data = true;
                self.place(&mut entry, span);
                self.look_for_holes(&mut entry, span)?;
            }
            State::Zero { reserved } => {
                entry.zero = true;
                if let Some(span) = reserved {
                    self.place(&mut entry, span);
                }
            }
            State::Absent => {
                entry.present = false;
                entry.zero = true;
                if let Some(base) = self.image.chain.layers().get(found.depth) {
                    let (span, len) = base.kept(at, found.len)?;
                    entry.length = len.clamp(1, found.len);
                    if let Some(span) = span {
                        self.place(&mut entry, span);
                    }
                }
            }
            State::Compressed(_) => {
                entry.data = true;
                entry.compressed = true;
            }
            // Encrypted, and whatever else only its format can read.
            _ => entry.data = true,
        }
        Ok(entry)
    }

    fn place(&self, entry: &mut MapEntry, span: HostSpan) {
        let files = self.image.nodes.get(entry.depth).map(|node| &node.files);
        entry.filename = files
            .and_then(|files| files.get(usize::from(span.file.0)))
            .cloned();
        entry.offset = Some(span.at.get());
    }

    /// Stored bytes that are a hole of the host read as zeros.
    fn look_for_holes(&mut self, entry: &mut MapEntry, span: HostSpan) -> Result<()> {
        let Some(layer) = self.image.chain.layers().get(entry.depth) else {
            return Ok(());
        };
        let Some(hollow) = self.hollow.get_mut(entry.depth) else {
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
                entry.zero = true;
                // A raw disk has no other word for zeros than its holes.
                entry.data = layer.facts().format != Format::Raw;
                len
            }
            HostRun::Data(len) => len,
            _ => return Ok(()),
        };
        entry.length = entry.length.min(len.max(1));
        Ok(())
    }
}
