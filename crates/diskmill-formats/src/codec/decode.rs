//! Compressed unit to plain unit.
//!
//! The unit is decoded into a buffer of exactly its size, so a stream that expands without end costs no more than
//! one that does not.

use flate2::{Decompress, FlushDecompress, Status};
use zstd::zstd_safe::{self, DCtx};

/// Why a unit could not be decoded.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// The stream breaks the rules of its codec.
    #[error("the {codec} stream is damaged: {text}")]
    Damaged {
        /// The codec.
        codec: &'static str,
        /// What the codec says.
        text: String,
    },
    /// The stream holds less than a unit.
    #[error("the {codec} stream holds {have} bytes, must hold {needed}")]
    Short {
        /// The codec.
        codec: &'static str,
        /// Bytes it holds.
        have: u64,
        /// Bytes it must hold.
        needed: u64,
    },
    /// The stream is not in the file.
    #[error("compressed cluster at {at:#x} with {len} bytes runs past the end of the file at {file_len:#x}")]
    PastEnd {
        /// Where it starts.
        at: u64,
        /// Its length.
        len: u64,
        /// The length of the file.
        file_len: u64,
    },
    /// There is no memory for the codec's state.
    #[error("no memory for the {codec} decoder")]
    Memory {
        /// The codec.
        codec: &'static str,
    },
}

/// Decodes units, one after the other. It keeps the codec's state, so it is worth keeping.
pub enum Decoder {
    /// Raw deflate, without a zlib or gzip header.
    Deflate(Box<Decompress>),
    /// A zlib stream: deflate with a header and a checksum.
    Zlib(Box<Decompress>),
    /// Zstandard frames.
    Zstd(DCtx<'static>),
}

impl std::fmt::Debug for Decoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Deflate(_) => "Decoder::Deflate",
            Self::Zlib(_) => "Decoder::Zlib",
            Self::Zstd(_) => "Decoder::Zstd",
        })
    }
}

impl Decoder {
    /// A decoder of raw deflate, with the largest window there is: what is read may come from any writer.
    pub fn deflate() -> Self {
        Self::Deflate(Box::new(Decompress::new(false)))
    }

    /// A decoder of zlib streams.
    pub fn zlib() -> Self {
        Self::Zlib(Box::new(Decompress::new(true)))
    }

    /// A decoder of Zstandard frames.
    pub fn zstd() -> Result<Self, DecodeError> {
        DCtx::try_create()
            .map(Self::Zstd)
            .ok_or(DecodeError::Memory { codec: "zstd" })
    }

    /// Fills all of `output` from `input`. What `input` has behind the stream is ignored.
    ///
    /// A deflate stream may hold more than `output` does and is cut; zlib streams and Zstandard frames must fill it
    /// exactly.
    pub fn decode(&mut self, input: &[u8], output: &mut [u8]) -> Result<(), DecodeError> {
        match self {
            Self::Deflate(state) => inflate(state, input, output),
            Self::Zlib(state) => {
                let (have, needed) = (unzlib(state, input, output)?, output.len());
                if have == needed {
                    return Ok(());
                }
                Err(DecodeError::Short {
                    codec: "zlib",
                    have: have as u64,
                    needed: needed as u64,
                })
            }
            Self::Zstd(state) => unzstd(state, input, output),
        }
    }

    /// Puts all that the stream in `input` holds at the start of `output`, and says how much that is: it may be less
    /// than `output`, not more. For zlib streams; others must fill `output`.
    pub fn decode_some(&mut self, input: &[u8], output: &mut [u8]) -> Result<usize, DecodeError> {
        match self {
            Self::Zlib(state) => unzlib(state, input, output),
            other => other.decode(input, output).map(|()| output.len()),
        }
    }
}

fn unzlib(state: &mut Decompress, input: &[u8], output: &mut [u8]) -> Result<usize, DecodeError> {
    let damaged = |text: String| DecodeError::Damaged { codec: "zlib", text };
    state.reset(true);
    match state.decompress(input, output, FlushDecompress::Finish) {
        Ok(Status::StreamEnd) => Ok(usize::try_from(state.total_out()).unwrap_or(usize::MAX)),
        Ok(_) if state.total_out() == output.len() as u64 => Err(damaged(format!(
            "it holds more than {} bytes, or is cut short",
            output.len()
        ))),
        Ok(_) => Err(damaged("it is cut short".to_owned())),
        Err(error) => Err(damaged(error.to_string())),
    }
}

fn inflate(state: &mut Decompress, input: &[u8], output: &mut [u8]) -> Result<(), DecodeError> {
    state.reset(false);
    state
        .decompress(input, output, FlushDecompress::Finish)
        .map_err(|error| DecodeError::Damaged {
            codec: "deflate",
            text: error.to_string(),
        })?;
    let (have, needed) = (state.total_out(), output.len() as u64);
    if have == needed {
        Ok(())
    } else {
        Err(DecodeError::Short {
            codec: "deflate",
            have,
            needed,
        })
    }
}

fn unzstd(state: &mut DCtx<'_>, input: &[u8], output: &mut [u8]) -> Result<(), DecodeError> {
    let damaged = |code| DecodeError::Damaged {
        codec: "zstd",
        text: zstd_safe::get_error_name(code).to_owned(),
    };
    let needed = output.len() as u64;
    let mut input = input;
    let mut rest = output;
    // A frame takes at least a few bytes of input, so this ends.
    while !rest.is_empty() {
        let short = DecodeError::Short {
            codec: "zstd",
            have: needed.saturating_sub(rest.len() as u64),
            needed,
        };
        if input.is_empty() {
            return Err(short);
        }
        let frame_len = zstd_safe::find_frame_compressed_size(input).map_err(damaged)?;
        let (frame, after) = match input.split_at_checked(frame_len) {
            Some(split) if frame_len > 0 => split,
            _ => return Err(short),
        };
        let made = state.decompress(rest, frame).map_err(damaged)?;
        rest = rest.get_mut(made..).unwrap_or_default();
        input = after;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::Compression;
    use flate2::write::{DeflateEncoder, ZlibEncoder};

    use super::*;

    fn sample() -> Vec<u8> {
        (0..65_536_u32).map(|n| (n / 7 * n) as u8).collect()
    }

    fn deflated(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = DeflateEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn deflate_ignores_what_follows_and_can_be_used_again() {
        let plain = sample();
        let mut stream = deflated(&plain);
        stream.extend_from_slice(&[0xaa; 700]);
        let mut decoder = Decoder::deflate();
        for _ in 0..2 {
            let mut out = vec![0; plain.len()];
            decoder.decode(&stream, &mut out).unwrap();
            assert!(out == plain);
        }
    }

    #[test]
    fn a_longer_deflate_stream_is_cut_and_a_bomb_costs_one_unit() {
        let stream = deflated(&vec![7; 8 << 20]);
        let mut out = vec![0; 65_536];
        Decoder::deflate().decode(&stream, &mut out).unwrap();
        assert!(out.iter().all(|byte| *byte == 7));
    }

    #[test]
    fn a_shorter_deflate_stream_is_an_error() {
        let error = Decoder::deflate()
            .decode(&deflated(&[1; 100]), &mut [0; 512])
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            "the deflate stream holds 100 bytes, must hold 512"
        );
    }

    #[test]
    fn a_zlib_header_is_refused() {
        let mut encoder = ZlibEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(&sample()).unwrap();
        let stream = encoder.finish().unwrap();
        assert!(Decoder::deflate().decode(&stream, &mut vec![0; 65_536]).is_err());
    }

    #[test]
    fn zstd_takes_several_frames_and_ignores_what_follows() {
        let plain = sample();
        let (first, second) = plain.split_at(1000);
        let mut stream = zstd::bulk::compress(first, 3).unwrap();
        stream.extend(zstd::bulk::compress(second, 1).unwrap());
        stream.extend([0; 300]);
        let mut out = vec![0; plain.len()];
        Decoder::zstd().unwrap().decode(&stream, &mut out).unwrap();
        assert!(out == plain);
    }

    #[test]
    fn zstd_refuses_longer_shorter_and_cut_streams() {
        let plain = sample();
        let stream = zstd::bulk::compress(&plain, 3).unwrap();
        let mut decoder = Decoder::zstd().unwrap();
        assert!(decoder.decode(&stream, &mut vec![0; plain.len() - 1]).is_err());
        assert!(decoder.decode(&stream, &mut vec![0; plain.len() + 1]).is_err());
        assert!(
            decoder
                .decode(&stream[..stream.len() - 1], &mut vec![0; plain.len()])
                .is_err()
        );
        assert!(decoder.decode(&[], &mut [0]).is_err());
        decoder.decode(&stream, &mut vec![0; plain.len()]).unwrap();
    }
}
