//! What is read: disks one behind the other, and the chunks they are cut into.

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use diskmill_core::{
    Chain, Error, ErrorKind, GuestOffset, HostRun, HostSpan, Layer, Resolved, Result, Run, SECTOR, State,
};

use super::CHUNK;
use super::leave::Leave;
use super::plan::Extract;

/// Disks one behind the other. Each is as long as its size rounded up to a sector.
#[derive(Debug)]
pub(crate) struct Source {
    parts: Vec<Part>,
    size: u64,
}

#[derive(Clone, Debug)]
struct Part {
    range: Range<u64>,
    /// The bytes of the chain that are there; what the range has beyond them is zeros.
    bytes: Range<u64>,
    chain: Chain,
    /// What the layers are called.
    names: Vec<Arc<str>>,
}

/// Where a run of the source comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    /// Bytes of a layer.
    Layer {
        /// The disk.
        part: usize,
        /// The layer of its chain.
        depth: usize,
        /// Where they lie as they are, if they do.
        span: Option<HostSpan>,
    },
    /// Zeros.
    Zero,
    /// Nothing: left to the target's backing image.
    Absent,
}

impl Source {
    /// These disks, in order, each with the names of its layers.
    pub(crate) fn new(disks: Vec<(Chain, Vec<Arc<str>>)>) -> Result<Self> {
        let mut parts = Vec::new();
        let mut end: u64 = 0;
        for (chain, names) in disks {
            let start = end;
            end = chain
                .virtual_size()
                .checked_next_multiple_of(SECTOR)
                .and_then(|len| start.checked_add(len))
                .ok_or_else(|| Error::new(ErrorKind::Usage, "the disks do not fit in 64 bits together"))?;
            parts.push(Part {
                range: start..end,
                bytes: 0..chain.virtual_size(),
                chain,
                names,
            });
        }
        Ok(Self { parts, size: end })
    }

    /// The same disks without what they are backed by.
    pub(crate) fn tops(&self) -> Self {
        let top = |part: &Part| Part {
            chain: Chain::new(part.chain.layers().iter().take(1).cloned().collect()),
            ..part.clone()
        };
        Self {
            parts: self.parts.iter().map(top).collect(),
            size: self.size,
        }
    }

    /// `extract` of the first disk, as a disk.
    pub(crate) fn extract(mut self, extract: Extract) -> Result<Self> {
        self.parts.truncate(1);
        if let Some(part) = self.parts.first_mut() {
            let start = extract.skip.min(part.bytes.end);
            let len = (part.bytes.end - start)
                .min(extract.len.unwrap_or(u64::MAX))
                .min(extract.size.unwrap_or(u64::MAX));
            part.bytes = start..start + len;
            self.size = extract
                .size
                .unwrap_or(len)
                .checked_next_multiple_of(SECTOR)
                .ok_or_else(|| Error::new(ErrorKind::Usage, "the size does not fit in 64 bits"))?;
            part.range = 0..self.size;
        }
        Ok(self)
    }

    /// Bytes of all disks.
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// Internal snapshots that the disks have beside the state that is read.
    pub(crate) fn snapshots(&self) -> usize {
        let tops = self.parts.iter().filter_map(|part| part.chain.layers().first());
        tops.map(|top| top.facts().snapshots.len()).sum()
    }

    /// The layer an [`Origin::Layer`] names.
    pub(crate) fn layer(&self, part: usize, depth: usize) -> Result<&Arc<dyn Layer>> {
        self.parts
            .get(part)
            .and_then(|part| part.chain.layers().get(depth))
            .ok_or_else(|| {
                Error::new(
                    ErrorKind::Usage,
                    format!("there is no layer {depth} in disk {part}"),
                )
            })
    }

    /// Fills `buf` from `at`, which lies in one run of `part` and `depth`.
    pub(crate) fn read(&self, part: usize, depth: usize, at: u64, buf: &mut [u8]) -> Result<()> {
        let own = self.parts.get(part).map_or(at, |part| part.own(at));
        self.layer(part, depth)?
            .read_at(GuestOffset::new(own), buf)
            .map_err(|error| self.unreadable(error, part, depth, own))
    }

    /// An error of reading a layer, which knows its format but not its name.
    fn unreadable(&self, error: Error, part: usize, depth: usize, at: u64) -> Error {
        let error = error.op("read").guest(GuestOffset::new(at));
        match self.parts.get(part).and_then(|part| part.names.get(depth)) {
            Some(name) => error.path(&**name),
            None => error,
        }
    }
}

impl Part {
    /// The byte of the chain that byte `at` of the source is.
    fn own(&self, at: u64) -> u64 {
        at.saturating_sub(self.range.start)
            .saturating_add(self.bytes.start)
    }
}

/// A run of the source with one origin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) range: Range<u64>,
    pub(crate) origin: Origin,
}

/// A part of a chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Segment {
    /// Whole steps without data.
    Run(Range<u64>, Run),
    /// Whole steps with data: these of the chunk's pieces, one behind the other, go to this place in the buffer.
    Units {
        /// The guest bytes.
        range: Range<u64>,
        /// Where the pieces are in [`Chunk::pieces`].
        pieces: Range<usize>,
        /// Where the bytes go in the buffer.
        offset: usize,
    },
    /// Whole steps of data that nobody needs to look at.
    Copy(Piece),
}

/// A work item: guest bytes that follow those of the chunk before.
#[derive(Debug, Default)]
pub(crate) struct Chunk {
    /// Its place in the order.
    pub(crate) turn: u64,
    /// The guest bytes.
    pub(crate) range: Range<u64>,
    /// What they are, in order, without gaps.
    pub(crate) segments: Vec<Segment>,
    /// What the [`Segment::Units`] among them are made of.
    pub(crate) pieces: Vec<Piece>,
    /// Bytes of buffer they need.
    pub(crate) bytes: usize,
}

/// How a source is cut into chunks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cut {
    /// Segments start at multiples of this and end at one or at the end of the disk, in bytes.
    pub(crate) step: u64,
    /// Data bytes of a chunk at most: a multiple of `step`.
    pub(crate) chunk: u64,
    /// Zeros among data that are fewer bytes than this are data like any other.
    pub(crate) shortest: u64,
    /// Runs of zeros are data like any other.
    pub(crate) keep_zeros: bool,
    /// Data that lies in plain files as it is becomes [`Segment::Copy`].
    pub(crate) offload: bool,
    /// What cannot be mapped is treated as data, so that reading it fails in detail.
    pub(crate) salvage: bool,
}

impl Cut {
    /// A source cut in steps of `step` bytes for an image that exists. Zeros among data that are fewer than `shortest`
    /// bytes are data like any other.
    pub(crate) fn plain(step: u64, shortest: u64) -> Self {
        Self {
            step,
            chunk: CHUNK.next_multiple_of(step),
            shortest,
            keep_zeros: false,
            offload: false,
            salvage: false,
        }
    }
}

/// Segments of a chunk at most: bounds the memory and the time of its turn in a disk of tiny runs.
const SEGMENTS: usize = 1024;

/// Bytes of a [`Segment::Copy`] at most, so that cancelling and progress are not held up.
const COPY: u64 = 16 << 20;

/// Cuts a source into chunks, in order.
#[derive(Debug)]
pub(crate) struct Scanner<'a> {
    source: &'a Source,
    cut: Cut,
    leave: Leave<'a>,
    at: u64,
    turn: u64,
    /// The run that was found last and is not used up.
    found: Option<Piece>,
    /// Of which layers the host is asked for holes.
    hollow: HashMap<(usize, usize), bool>,
}

impl<'a> Scanner<'a> {
    /// Cuts `source` as `cut` says. What `leave` says is [`Origin::Absent`].
    pub(crate) fn new(source: &'a Source, cut: Cut, leave: Leave<'a>) -> Self {
        Self {
            source,
            cut,
            leave,
            at: 0,
            turn: 0,
            found: None,
            hollow: HashMap::new(),
        }
    }

    /// Puts the next chunk in place of `chunk`'s contents; false at the end.
    pub(crate) fn next(&mut self, chunk: &mut Chunk) -> Result<bool> {
        let end = self.source.size();
        chunk.segments.clear();
        chunk.pieces.clear();
        chunk.bytes = 0;
        chunk.range = self.at..self.at;
        if self.at == end {
            return Ok(false);
        }
        let mut room = self.cut.chunk;
        let mut copied = 0;
        while self.at < end && room > 0 && copied < COPY && chunk.segments.len() < SEGMENTS {
            let run = self.find()?;
            if let Some((range, what)) = self.whole_run(&run) {
                self.at = range.end;
                match chunk.segments.last_mut() {
                    Some(Segment::Run(last, kind)) if *kind == what => last.end = range.end,
                    _ => chunk.segments.push(Segment::Run(range, what)),
                }
            } else if let Some(piece) = self.whole_copy(&run, COPY - copied) {
                self.at = piece.range.end;
                copied += piece.range.end - piece.range.start;
                chunk.segments.push(Segment::Copy(piece));
            } else {
                let taken = self.units(room, chunk)?;
                room = room.saturating_sub(taken);
            }
        }
        chunk.range.end = self.at;
        chunk.turn = self.turn;
        self.turn += 1;
        Ok(true)
    }

    /// The whole steps at the start of `run`, if it is one without data.
    fn whole_run(&self, run: &Piece) -> Option<(Range<u64>, Run)> {
        let what = match run.origin {
            Origin::Zero if !self.cut.keep_zeros => Run::Zero,
            Origin::Absent => Run::Absent,
            _ => return None,
        };
        self.whole_steps(run.range.end).map(|range| (range, what))
    }

    /// The whole steps at the start of `run`, up to about `max` bytes, if the kernel may copy it.
    fn whole_copy(&self, run: &Piece, max: u64) -> Option<Piece> {
        let Origin::Layer {
            part,
            depth,
            span: Some(span),
        } = run.origin
        else {
            return None;
        };
        if !self.cut.offload {
            return None;
        }
        let plain = self.source.layer(part, depth).ok()?;
        plain.file(span.file)?.raw_file()?;
        let range = self.whole_steps(run.range.end.min(self.at.saturating_add(max.max(self.cut.step))))?;
        let origin = run.origin;
        Some(Piece { range, origin })
    }

    fn whole_steps(&self, end: u64) -> Option<Range<u64>> {
        let whole = if end == self.source.size() {
            end
        } else {
            end - end % self.cut.step
        };
        (whole > self.at).then_some(self.at..whole)
    }

    /// Adds steps with data, `room` bytes at most, up to a run that makes up a whole step.
    fn units(&mut self, room: u64, chunk: &mut Chunk) -> Result<u64> {
        let start = self.at;
        let limit = start.saturating_add(room).min(self.source.size());
        let first = chunk.pieces.len();
        while self.at < limit {
            let mut piece = self.find()?;
            if self.at.is_multiple_of(self.cut.step)
                && self.at > start
                && (self.whole_run(&piece).is_some() || self.whole_copy(&piece, COPY).is_some())
            {
                break;
            }
            let mut end = piece.range.end.min(limit);
            let (here, next) = (self.at, self.at.next_multiple_of(self.cut.step));
            if here < next && next < end {
                // What ends this step may make up the next ones whole.
                self.at = next;
                let rest = Piece {
                    range: next..piece.range.end,
                    origin: piece.origin,
                };
                if self.whole_run(&rest).is_some() || self.whole_copy(&rest, COPY).is_some() {
                    end = next;
                }
            }
            piece.range.end = end;
            self.at = end;
            match chunk.pieces.get_mut(first..).and_then(<[Piece]>::last_mut) {
                Some(last) if joins(last, &piece) => last.range.end = piece.range.end,
                _ => chunk.pieces.push(piece),
            }
        }
        let taken = self.at - start;
        let pieces = first..chunk.pieces.len();
        chunk.segments.push(Segment::Units {
            range: start..self.at,
            pieces,
            offset: chunk.bytes,
        });
        // The last unit of the disk is encoded whole, so its buffer is.
        chunk.bytes += to_usize(taken.next_multiple_of(self.cut.step));
        Ok(taken)
    }

    /// The run at the current place.
    fn find(&mut self) -> Result<Piece> {
        match &self.found {
            Some(known) if known.range.contains(&self.at) => {}
            _ => {
                let found = self.look()?;
                self.found = Some(found);
            }
        }
        let known = self.found.as_ref().ok_or_else(|| Error::bare(ErrorKind::Usage))?;
        let moved = self.at - known.range.start;
        let origin = match known.origin {
            Origin::Layer { part, depth, span } => Origin::Layer {
                part,
                depth,
                span: match span {
                    Some(span) => Some(HostSpan {
                        at: span.at.plus(moved)?,
                        len: span.len.saturating_sub(moved),
                        ..span
                    }),
                    None => None,
                },
            },
            other => other,
        };
        Ok(Piece {
            range: self.at..known.range.end,
            origin,
        })
    }

    fn look(&mut self) -> Result<Piece> {
        let at = self.at;
        let index = self.source.parts.partition_point(|part| part.range.end <= at);
        let part = self
            .source
            .parts
            .get(index)
            .ok_or_else(|| Error::bare(ErrorKind::Usage))?;
        let local = GuestOffset::new(part.own(at));
        let rest = part.range.end - at;
        if local.get() >= part.bytes.end {
            return Ok(Piece {
                range: at..part.range.end,
                origin: Origin::Zero,
            });
        }
        let run = match part.chain.map(local, rest.min(part.bytes.end - local.get())) {
            Ok(run) => run,
            Err(_) if self.cut.salvage => {
                let origin = Origin::Layer {
                    part: index,
                    depth: 0,
                    span: None,
                };
                let range = at..at.saturating_add(SECTOR - at % SECTOR).min(part.range.end);
                return Ok(Piece { range, origin });
            }
            Err(error) => return Err(self.source.unreadable(error, index, 0, local.get())),
        };
        let Resolved { state, depth, .. } = run;
        let (len, left) = self.leave.is_left(local, run)?;
        let mut end = at + len;
        if left {
            return Ok(Piece {
                range: at..end,
                origin: Origin::Absent,
            });
        }
        let mut origin = match state {
            State::Absent | State::Zero { .. } => Origin::Zero,
            State::Data(span) => Origin::Layer {
                part: index,
                depth,
                span: Some(span),
            },
            _ => Origin::Layer {
                part: index,
                depth,
                span: None,
            },
        };
        if let State::Data(span) = state
            && let Some(layer) = part.chain.layers().get(depth)
            && let Some(file) = layer.file(span.file)
            && is_hollow(&mut self.hollow, (index, depth), layer)?
        {
            match file.run_at(span.at)? {
                HostRun::Hole(len) => {
                    end = end.min(at.saturating_add(len));
                    origin = Origin::Zero;
                }
                HostRun::Data(len) => end = end.min(at.saturating_add(len)),
                _ => {}
            }
        }
        let range = at..end;
        Ok(Piece { range, origin })
    }
}

/// What [`Layer::is_hollow`] says, asked once.
fn is_hollow(
    known: &mut HashMap<(usize, usize), bool>,
    place: (usize, usize),
    layer: &Arc<dyn Layer>,
) -> Result<bool> {
    if let Some(known) = known.get(&place) {
        return Ok(*known);
    }
    let hollow = layer.is_hollow()?;
    known.insert(place, hollow);
    Ok(hollow)
}

/// Whether two pieces are one. Extents of a layer are not: each must be read by itself.
fn joins(last: &Piece, next: &Piece) -> bool {
    last.range.end == next.range.start
        && last.origin == next.origin
        && matches!(next.origin, Origin::Zero | Origin::Absent)
}

/// A length that is known to be that of a buffer.
pub(crate) fn to_usize(len: u64) -> usize {
    usize::try_from(len).unwrap_or(usize::MAX)
}

/// Whether a read failed because of the host, as opposed to a request that made no sense.
pub(crate) fn is_unreadable(error: &Error) -> bool {
    !matches!(error.kind(), ErrorKind::Usage | ErrorKind::Cancelled)
        && error
            .io_error()
            .is_none_or(|error| error.kind() != io::ErrorKind::OutOfMemory)
}
