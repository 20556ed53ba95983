//! What one worker does with a chunk: read, encode, hand over.

use std::ops::Range;
use std::sync::atomic::Ordering;

use diskmill_core::{
    Chain, EncodedKind, Encoder, Error, ErrorKind, GuestOffset, HostSpan, Result, Run, StorageMut, Stored,
};

use diskmill_storage::{AlignedBuf, copy_range};

use super::lane::{Lane, keep_pace};
use super::salvage;
use super::source::{Chunk, Origin, Piece, Segment, to_usize};

/// How a part of a chunk is to be stored.
#[derive(Clone, Debug)]
pub(super) enum Placement {
    /// Without data.
    Run(Range<u64>, Run),
    /// As it is: bytes of the buffer.
    Plain {
        /// The guest bytes.
        range: Range<u64>,
        /// Where they are in the buffer.
        offset: usize,
    },
    /// One unit, packed.
    Packed {
        /// Where it belongs.
        at: u64,
        /// Which of the scratch buffers has it.
        scratch: usize,
        /// How many bytes of that.
        len: usize,
    },
    /// By the kernel.
    Copy(Piece),
}

impl Placement {
    pub(super) fn start(&self) -> u64 {
        match self {
            Self::Run(range, _) | Self::Plain { range, .. } => range.start,
            Self::Packed { at, .. } => *at,
            Self::Copy(piece) => piece.range.start,
        }
    }
}

/// A chunk that is encoded.
pub(super) struct Ready<'w> {
    pub(super) turn: u64,
    pub(super) placements: &'w [Placement],
    buffer: &'w [u8],
    scratch: &'w [Vec<u8>],
    /// For data that nobody has read yet.
    pub(super) late: &'w mut Late,
}

impl<'w> Ready<'w> {
    /// The bytes of a placement that has some.
    pub(super) fn stored(&self, placement: &Placement) -> Result<Stored<'w>> {
        let found = match placement {
            Placement::Plain { range, offset } => {
                let len = to_usize(range.end - range.start);
                self.buffer
                    .get(*offset..offset.saturating_add(len))
                    .map(Stored::Plain)
            }
            Placement::Packed { scratch, len, .. } => self
                .scratch
                .get(*scratch)
                .and_then(|bytes| bytes.get(..*len))
                .map(Stored::Packed),
            _ => None,
        };
        found.ok_or_else(|| Error::new(ErrorKind::Usage, "an encoder returned more bytes than it made"))
    }
}

impl Ready<'_> {
    /// The `len` bytes from `offset` of what was read.
    pub(super) fn plain(&self, offset: usize, len: u64) -> Result<&[u8]> {
        self.buffer
            .get(offset..offset.saturating_add(to_usize(len)))
            .ok_or_else(out_of_buffer)
    }
}

/// One worker and the buffers it reuses.
pub(super) struct Worker<'l, 'a> {
    lane: &'l Lane<'a>,
    encoder: Option<Box<dyn Encoder>>,
    chunk: Chunk,
    buffer: Buffer,
    scratch: Vec<Vec<u8>>,
    placements: Vec<Placement>,
    late: Late,
    other: Other,
}

impl<'l, 'a> Worker<'l, 'a> {
    pub(super) fn new(lane: &'l Lane<'a>) -> Result<Self> {
        Ok(Self {
            lane,
            encoder: if lane.pack {
                Some(lane.sink.encoder()?)
            } else {
                None
            },
            chunk: Chunk::default(),
            buffer: Buffer::default(),
            scratch: Vec::new(),
            placements: Vec::new(),
            late: Late::default(),
            other: Other::default(),
        })
    }

    pub(super) fn run(mut self) -> Result<()> {
        while self.lane.claim(&mut self.chunk, &mut self.buffer)? {
            self.read()?;
            self.encode()?;
            let written = self.len_of(|packed| packed as u64);
            if let (Some(pace), true) = (&self.lane.pace, written > 0) {
                keep_pace(pace, written, self.lane)?;
            }
            let stored = self.len_of(|_| self.lane.cut.step);
            let mut ready = Ready {
                turn: self.chunk.turn,
                placements: &self.placements,
                buffer: self.buffer.bytes(),
                scratch: &self.scratch,
                late: &mut self.late,
            };
            self.lane.sink.store(&mut ready, self.lane)?;
            let counters = &self.lane.counters;
            counters.stored.fetch_add(stored, Ordering::Relaxed);
            counters.end.fetch_max(self.chunk.range.end, Ordering::Relaxed);
            self.lane
                .job
                .observer
                .advance(self.chunk.range.end - self.chunk.range.start);
        }
        Ok(())
    }

    fn read(&mut self) -> Result<()> {
        let buf = self.buffer.sized(self.chunk.bytes);
        for segment in &self.chunk.segments {
            let Segment::Units {
                range,
                pieces,
                offset,
            } = segment
            else {
                continue;
            };
            for piece in self.chunk.pieces.get(pieces.clone()).unwrap_or_default() {
                let from = offset + to_usize(piece.range.start - range.start);
                let len = to_usize(piece.range.end - piece.range.start);
                let part = slice(buf, from, len)?;
                read_piece(self.lane, piece, piece.range.start, part)?;
            }
            // The last unit of a disk is encoded whole.
            let len = to_usize(range.end - range.start);
            let whole = to_usize((range.end - range.start).next_multiple_of(self.lane.cut.step));
            if whole > len && !pieces.is_empty() {
                slice(buf, offset + len, whole - len)?.fill(0);
            }
        }
        Ok(())
    }

    fn encode(&mut self) -> Result<()> {
        self.placements.clear();
        let mut packed = 0;
        let step = self.lane.cut.step;
        for segment in &self.chunk.segments {
            let (range, offset) = match segment {
                Segment::Units { range, offset, .. } => (range, *offset),
                Segment::Run(range, what) => {
                    push_run(&mut self.placements, range.clone(), *what);
                    continue;
                }
                Segment::Copy(piece) => {
                    self.placements.push(Placement::Copy(piece.clone()));
                    continue;
                }
            };
            let place = |at: u64| offset + to_usize(at - range.start);
            if let Some(chain) = self.lane.unless {
                self.other.read(chain, range)?;
            }
            let mut at = range.start;
            let mut zeros_from = None;
            while at < range.end {
                let end = (at + step).min(range.end);
                let from = place(at);
                let bytes = self
                    .buffer
                    .bytes()
                    .get(from..from.saturating_add(to_usize(step)))
                    .ok_or_else(out_of_buffer)?;
                let same = self.lane.unless.is_some()
                    && self
                        .other
                        .has(to_usize(at - range.start), bytes, to_usize(end - at));
                if !same && !self.lane.cut.keep_zeros && is_zero(bytes) {
                    zeros_from.get_or_insert(at);
                    at = end;
                    continue;
                }
                match zeros_from.take() {
                    Some(start) if start > range.start && at - start < self.lane.cut.shortest => {
                        push_plain(&mut self.placements, start..at, place(start));
                    }
                    Some(start) => push_run(&mut self.placements, start..at, Run::Zero),
                    None => {}
                }
                if same {
                    push_run(&mut self.placements, at..end, Run::Absent);
                } else if let Some(encoder) = &mut self.encoder {
                    if self.scratch.len() == packed {
                        self.scratch.push(Vec::new());
                    }
                    let scratch = self.scratch.get_mut(packed).ok_or_else(out_of_buffer)?;
                    match encoder.pack(bytes, scratch)? {
                        EncodedKind::Packed { len } => {
                            let scratch = packed;
                            packed += 1;
                            self.placements.push(Placement::Packed { at, scratch, len });
                        }
                        EncodedKind::Plain | EncodedKind::Zero => {
                            push_plain(&mut self.placements, at..end, from);
                        }
                    }
                } else {
                    push_plain(&mut self.placements, at..end, from);
                }
                at = end;
            }
            if let Some(start) = zeros_from {
                push_run(&mut self.placements, start..at, Run::Zero);
            }
        }
        Ok(())
    }

    /// Bytes of the placements that are stored; those of a packed unit are what `packed` makes of its packed length.
    fn len_of(&self, packed: impl Fn(usize) -> u64) -> u64 {
        let len = |placement: &Placement| match placement {
            Placement::Run(..) => 0,
            Placement::Plain { range, .. } => range.end - range.start,
            Placement::Packed { len, .. } => packed(*len),
            Placement::Copy(piece) => piece.range.end - piece.range.start,
        };
        self.placements.iter().map(len).sum()
    }
}

fn read_piece(lane: &Lane<'_>, piece: &Piece, at: u64, buf: &mut [u8]) -> Result<()> {
    match piece.origin {
        Origin::Layer { part, depth, .. } => {
            lane.counters.read.fetch_add(buf.len() as u64, Ordering::Relaxed);
            match lane.source.read(part, depth, at, buf) {
                Err(error) if lane.cut.salvage => salvage::read(lane, (part, depth), at, buf, error),
                result => result,
            }
        }
        Origin::Zero => {
            buf.fill(0);
            Ok(())
        }
        Origin::Absent => match lane.below {
            Some(below) => below.read_at(GuestOffset::new(at), buf),
            None => {
                buf.fill(0);
                Ok(())
            }
        },
    }
}

fn push_run(placements: &mut Vec<Placement>, range: Range<u64>, what: Run) {
    match placements.last_mut() {
        Some(Placement::Run(last, kind)) if *kind == what && last.end == range.start => last.end = range.end,
        _ => placements.push(Placement::Run(range, what)),
    }
}

fn push_plain(placements: &mut Vec<Placement>, range: Range<u64>, offset: usize) {
    match placements.last_mut() {
        Some(Placement::Plain {
            range: last,
            offset: first,
        }) if last.end == range.start && *first + to_usize(last.end - last.start) == offset => {
            last.end = range.end;
        }
        _ => placements.push(Placement::Plain { range, offset }),
    }
}

fn slice(buf: &mut [u8], from: usize, len: usize) -> Result<&mut [u8]> {
    buf.get_mut(from..from.saturating_add(len))
        .ok_or_else(out_of_buffer)
}

fn out_of_buffer() -> Error {
    Error::new(ErrorKind::Usage, "a chunk does not fit its buffer")
}

/// Whether all of `bytes` is zero. The inner fold has no early exit, so that it becomes vector code.
pub(super) fn is_zero(bytes: &[u8]) -> bool {
    bytes
        .chunks(1024)
        .all(|part| part.iter().fold(0, |sum, byte| sum | byte) == 0)
}

/// A buffer that grows as needed and is reused.
#[derive(Debug, Default)]
pub(super) struct Buffer {
    memory: Option<AlignedBuf>,
    len: usize,
}

impl Buffer {
    /// The first `len` bytes, whatever they hold.
    pub(super) fn sized(&mut self, len: usize) -> &mut [u8] {
        if self.memory.as_ref().is_none_or(|memory| memory.len() < len) {
            self.memory = Some(AlignedBuf::new(len));
        }
        self.len = len;
        match &mut self.memory {
            Some(memory) => memory.get_mut(..len).unwrap_or_default(),
            None => &mut [],
        }
    }

    fn bytes(&self) -> &[u8] {
        self.memory
            .as_ref()
            .and_then(|memory| memory.get(..self.len))
            .unwrap_or_default()
    }
}

/// Reads what other bytes are compared with.
#[derive(Debug, Default)]
struct Other {
    buffer: Buffer,
}

impl Other {
    /// Reads `range` of `chain`.
    fn read(&mut self, chain: &Chain, range: &Range<u64>) -> Result<()> {
        let buf = self.buffer.sized(to_usize(range.end - range.start));
        chain.read_at(GuestOffset::new(range.start), buf)
    }

    /// Whether the `len` bytes at `at` of what was read are those that `bytes` starts with.
    fn has(&self, at: usize, bytes: &[u8], len: usize) -> bool {
        let mine = self.buffer.bytes().get(at..at.saturating_add(len));
        mine.is_some() && mine == bytes.get(..len)
    }
}

/// Moves data that was not read with its chunk, since the kernel was to copy it.
#[derive(Debug, Default)]
pub(super) struct Late {
    buffer: Buffer,
}

impl Late {
    /// Some bytes of `piece` from `at`: whole steps, or up to its end.
    pub(super) fn read(&mut self, lane: &Lane<'_>, piece: &Piece, at: u64) -> Result<&[u8]> {
        let len = (piece.range.end - at).min(lane.cut.chunk);
        let buf = self.buffer.sized(to_usize(len));
        read_piece(lane, piece, at, buf)?;
        Ok(buf)
    }

    /// Copies `piece` to where `span` says in `to`.
    pub(super) fn copy(
        &mut self,
        lane: &Lane<'_>,
        piece: &Piece,
        span: HostSpan,
        to: &dyn StorageMut,
    ) -> Result<()> {
        let len = piece.range.end - piece.range.start;
        let mut done = 0;
        if let Origin::Layer {
            part,
            depth,
            span: Some(from),
        } = piece.origin
            && let Some(file) = lane.source.layer(part, depth)?.file(from.file)
        {
            done = copy_range(&**file, from.at, to, span.at, len)?;
            lane.counters.read.fetch_add(done, Ordering::Relaxed);
        }
        while done < len {
            let bytes = self.read(lane, piece, piece.range.start + done)?;
            to.write_at(span.at.plus(done)?, bytes)?;
            done += bytes.len() as u64;
        }
        Ok(())
    }
}
