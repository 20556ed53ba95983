//! Reading compressed units of a file, those that lie close together with one read.

use std::sync::{Mutex, PoisonError};

use diskmill_core::{Error, ErrorKind, Format, GuestOffset, HostOffset, Result, Storage};

use super::{Codec, DecodeError, Decoder, UnitEncoder};

/// Compressed bytes that are read at once.
const BATCH_BYTES: u64 = 1 << 20;
/// Bytes between two compressed units that are rather read than skipped.
const BATCH_GAP: u64 = 64 << 10;

/// Where a compressed unit is in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackedSpan {
    /// Its first byte, at any alignment.
    pub at: HostOffset,
    /// Bytes it may use at most; it may be shorter, and the file may end before.
    pub len: u64,
}

impl PackedSpan {
    /// The byte behind it.
    pub const fn end(self) -> HostOffset {
        self.at.saturating_add(self.len)
    }
}

/// How units are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packing {
    /// Raw deflate.
    Deflate,
    /// Zstandard frames.
    Zstd,
}

/// Decoders of the units of one image with their buffers, lent to one reader at a time.
#[derive(Debug)]
pub(crate) struct Decoders {
    packing: Packing,
    unit: u64,
    format: Format,
    idle: Mutex<Vec<Scratch>>,
}

/// A decoder and its buffers.
#[derive(Debug)]
pub(crate) struct Scratch {
    decoder: Decoder,
    input: Vec<u8>,
    whole: Vec<u8>,
    spans: Vec<PackedSpan>,
}

impl Scratch {
    /// A list to be filled with the places of units, and put back with [`keep_spans`](Self::keep_spans).
    pub(crate) fn take_spans(&mut self) -> Vec<PackedSpan> {
        let mut spans = std::mem::take(&mut self.spans);
        spans.clear();
        spans
    }

    /// Keeps the memory of a list for the next.
    pub(crate) fn keep_spans(&mut self, spans: Vec<PackedSpan>) {
        self.spans = spans;
    }

    /// Decodes a unit of `unit` bytes and puts what it has from byte `into` on into `piece`.
    fn decode(
        &mut self,
        unit: u64,
        stream: &[u8],
        into: u64,
        piece: &mut [u8],
        format: Format,
    ) -> Result<()> {
        let unit = index(unit);
        let decoded = if piece.len() == unit {
            self.decoder.decode(stream, piece)
        } else {
            self.whole.resize(unit, 0);
            let decoded = self.decoder.decode(stream, &mut self.whole);
            let part = self.whole.get(index(into)..).unwrap_or_default();
            for (to, from) in piece.iter_mut().zip(part) {
                *to = *from;
            }
            decoded
        };
        decoded.map_err(|error| Error::new(ErrorKind::Corrupt, error).format(format))
    }
}

fn index(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

impl Decoders {
    /// Decoders of units of `unit` bytes in an image of `format`.
    pub(crate) fn new(packing: Packing, unit: u64, format: Format) -> Self {
        Self {
            packing,
            unit,
            format,
            idle: Mutex::default(),
        }
    }

    /// An encoder of what the decoders decode, at its default level.
    pub(crate) fn encoder(&self) -> Result<UnitEncoder> {
        let codec = match self.packing {
            Packing::Deflate => Codec::deflate(None, self.unit)?,
            Packing::Zstd => Codec::zstd(None)?,
        };
        UnitEncoder::new(Some(codec))
    }

    /// A decoder for the caller alone, until it is [put](Self::put) back.
    pub(crate) fn take(&self) -> Result<Scratch> {
        if let Some(scratch) = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop() {
            return Ok(scratch);
        }
        let decoder = match self.packing {
            Packing::Deflate => Decoder::deflate(),
            Packing::Zstd => Decoder::zstd().map_err(|error| Error::new(ErrorKind::Io, error))?,
        };
        Ok(Scratch {
            decoder,
            input: Vec::new(),
            whole: Vec::new(),
            spans: Vec::new(),
        })
    }

    /// Takes a decoder back.
    pub(crate) fn put(&self, scratch: Scratch) {
        self.idle
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(scratch);
    }

    fn past_end(&self, span: PackedSpan, file_len: u64) -> Error {
        let error = DecodeError::PastEnd {
            at: span.at.get(),
            len: span.len,
            file_len,
        };
        Error::new(ErrorKind::Corrupt, error)
            .format(self.format)
            .host(span.at)
    }

    /// Fills `buf` from guest byte `at` on. `spans` are the units that has, one behind the other; the file ends at
    /// `file_len`.
    pub(crate) fn read(
        &self,
        scratch: &mut Scratch,
        (storage, file_len): (&dyn Storage, u64),
        spans: &[PackedSpan],
        at: GuestOffset,
        buf: &mut [u8],
    ) -> Result<()> {
        let mut at = at;
        let mut rest_buf = buf;
        let mut rest = spans;
        while let Some((range, count)) = batch(rest) {
            let (now, later) = rest.split_at_checked(count).unwrap_or((rest, &[]));
            if range.at.get() >= file_len {
                return Err(self.past_end(range, file_len).guest(at));
            }
            let mut input = std::mem::take(&mut scratch.input);
            let decoded = read_span(storage, file_len, range, &mut input).and_then(|()| {
                for span in now {
                    let stream = input.get(index(span.at.since(range.at))..).unwrap_or_default();
                    let stream = stream
                        .get(..index(span.len).min(stream.len()))
                        .unwrap_or_default();
                    let into = at.within(self.unit);
                    let take = index(self.unit.saturating_sub(into)).min(rest_buf.len());
                    let (piece, after) = std::mem::take(&mut rest_buf).split_at_mut(take);
                    scratch
                        .decode(self.unit, stream, into, piece, self.format)
                        .map_err(|error| error.guest(at).host(span.at))?;
                    rest_buf = after;
                    at = at.plus(take as u64)?;
                }
                Ok(())
            });
            scratch.input = input;
            decoded?;
            rest = later;
        }
        Ok(())
    }

    /// Reads one compressed unit whole into `unit`, which has its size. `file_len` is where the file ends.
    pub(crate) fn read_unit(
        &self,
        storage: &dyn Storage,
        file_len: u64,
        span: PackedSpan,
        unit: &mut [u8],
    ) -> Result<()> {
        if span.at.get() >= file_len {
            return Err(self.past_end(span, file_len));
        }
        let mut scratch = self.take()?;
        let mut input = std::mem::take(&mut scratch.input);
        let read = read_span(storage, file_len, span, &mut input)
            .and_then(|()| scratch.decode(self.unit, &input, 0, unit, self.format));
        scratch.input = input;
        self.put(scratch);
        read.map_err(|error| error.host(span.at))
    }
}

/// How many of `spans` to read at once, and the bytes they are in.
fn batch(spans: &[PackedSpan]) -> Option<(PackedSpan, usize)> {
    let first = spans.first()?;
    let (mut low, mut high) = (first.at, first.end());
    let mut count = 1_usize;
    for span in spans.iter().skip(1) {
        let near = span.at.get() <= high.get().saturating_add(BATCH_GAP)
            && low.get() <= span.end().get().saturating_add(BATCH_GAP);
        let (new_low, new_high) = (low.min(span.at), high.max(span.end()));
        if !near || new_high.since(new_low) > BATCH_BYTES {
            break;
        }
        (low, high) = (new_low, new_high);
        count = count.saturating_add(1);
    }
    let len = high.since(low);
    Some((PackedSpan { at: low, len }, count))
}

/// Fills `buf`; what lies past the end of the file, which is known to be at `len` or behind, is zeros.
pub(crate) fn read_clipped(storage: &dyn Storage, len: u64, at: HostOffset, buf: &mut [u8]) -> Result<()> {
    if at.saturating_add(buf.len() as u64).get() <= len {
        storage.read_at(at, buf)
    } else {
        storage.read_padded(at, buf)
    }
}

fn read_span(storage: &dyn Storage, file_len: u64, span: PackedSpan, input: &mut Vec<u8>) -> Result<()> {
    // At most BATCH_BYTES, or one span: twice a unit.
    let len = usize::try_from(span.len).map_err(|_| Error::bare(ErrorKind::Unsupported))?;
    input.resize(len, 0);
    read_clipped(storage, file_len, span.at, input).map_err(|error| error.host(span.at))
}
