//! Compressing units. Pure CPU: one encoder a worker.

use diskmill_core::{EncodedKind, Encoder, Error, ErrorKind, OptionError, Result};
use libdeflater::{CompressionLvl, Compressor};
use zstd::zstd_safe::CParameter;

use super::zeros::is_zero;

/// Level of deflate unless told otherwise: with libdeflate that is smaller than level 6 of zlib, which is what QEMU
/// uses, in less than a quarter of the time. Measured on a file system of programs and documents.
pub const DEFLATE_LEVEL: i32 = 3;

/// The same for units below [`SMALL_UNIT`], where level 3 finds less than zlib does.
pub const DEFLATE_LEVEL_SMALL: i32 = 6;

/// Bytes from which on a unit is not small.
pub const SMALL_UNIT: u64 = 32 << 10;

/// Level of Zstandard unless told otherwise, the same as QEMU's.
pub const ZSTD_LEVEL: i32 = 3;

/// Entries, as a power of two, of Zstandard's second table at [`ZSTD_LEVEL`]: one more than the level brings for units
/// of 64 KiB. It makes them a thousandth smaller than QEMU's, which is enough that images never come out larger, for
/// 3 % of time. Zstandard itself lowers it where units are smaller.
const ZSTD_CHAIN_LOG: u32 = 16;

/// How to compress, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Codec {
    /// Raw deflate at a level of 1 to 12.
    Deflate(i32),
    /// A zlib stream at a level of 1 to 12, for formats that store every unit so.
    Zlib(i32),
    /// A Zstandard frame at a level of 1 to 22.
    Zstd(i32),
}

impl Codec {
    /// Raw deflate, at the default level for units of `unit` bytes if `level` is `None`.
    pub fn deflate(level: Option<i32>, unit: u64) -> Result<Self, OptionError> {
        let default = if unit < SMALL_UNIT {
            DEFLATE_LEVEL_SMALL
        } else {
            DEFLATE_LEVEL
        };
        match level.unwrap_or(default) {
            level @ 1..=12 => Ok(Self::Deflate(level)),
            level => Err(out_of_range(level, "1 to 12 with zlib")),
        }
    }

    /// A zlib stream, at the default level for units of `unit` bytes if `level` is `None`.
    pub fn zlib(level: Option<i32>, unit: u64) -> Result<Self, OptionError> {
        match Self::deflate(level, unit)? {
            Self::Deflate(level) => Ok(Self::Zlib(level)),
            other => Ok(other),
        }
    }

    /// Zstandard, at the default level if `level` is `None`.
    pub fn zstd(level: Option<i32>) -> Result<Self, OptionError> {
        match level.unwrap_or(ZSTD_LEVEL) {
            level @ 1..=22 => Ok(Self::Zstd(level)),
            level => Err(out_of_range(level, "1 to 22 with zstd")),
        }
    }
}

fn out_of_range(level: i32, allowed: &'static str) -> OptionError {
    OptionError::Range {
        name: "compression level".to_owned(),
        value: level.to_string(),
        allowed,
    }
}

enum Packer {
    Deflate(Compressor),
    Zlib(Compressor),
    Zstd(zstd::bulk::Compressor<'static>),
}

/// An [`Encoder`] that finds zeros and, if it is to, compresses what is left.
pub struct UnitEncoder {
    packer: Option<Packer>,
}

impl UnitEncoder {
    /// An encoder for one worker; without a codec it only looks for zeros.
    pub fn new(codec: Option<Codec>) -> Result<Self> {
        let packer = match codec {
            None => None,
            Some(Codec::Deflate(level)) => Some(Packer::Deflate(compressor(level)?)),
            Some(Codec::Zlib(level)) => Some(Packer::Zlib(compressor(level)?)),
            Some(Codec::Zstd(level)) => {
                let mut compressor = zstd::bulk::Compressor::new(level)?;
                if level == ZSTD_LEVEL {
                    compressor.set_parameter(CParameter::ChainLog(ZSTD_CHAIN_LOG))?;
                }
                Some(Packer::Zstd(compressor))
            }
        };
        Ok(Self { packer })
    }
}

fn compressor(level: i32) -> Result<Compressor> {
    let level = CompressionLvl::new(level).map_err(|_| out_of_range(level, "1 to 12 with zlib"))?;
    Ok(Compressor::new(level))
}

impl Encoder for UnitEncoder {
    fn encode(&mut self, unit: &[u8], scratch: &mut Vec<u8>) -> Result<EncodedKind> {
        if is_zero(unit) {
            return Ok(EncodedKind::Zero);
        }
        self.pack(unit, scratch)
    }

    fn pack(&mut self, unit: &[u8], scratch: &mut Vec<u8>) -> Result<EncodedKind> {
        let packed = match &mut self.packer {
            None => return Ok(EncodedKind::Plain),
            Some(Packer::Deflate(compressor)) => {
                // With no room for more than is worth having, it gives up as soon as it cannot win.
                scratch.resize(unit.len().saturating_sub(1), 0);
                compressor.deflate_compress(unit, scratch).ok()
            }
            Some(Packer::Zlib(compressor)) => {
                let bound = compressor.zlib_compress_bound(unit.len());
                scratch.resize(bound, 0);
                let len = compressor
                    .zlib_compress(unit, scratch)
                    .map_err(|error| Error::new(ErrorKind::Io, error).op("compress"))?;
                Some(len)
            }
            Some(Packer::Zstd(compressor)) => {
                scratch.resize(zstd::zstd_safe::compress_bound(unit.len()), 0);
                let len = compressor
                    .compress_to_buffer(unit, scratch.as_mut_slice())
                    .map_err(|error| Error::new(ErrorKind::Io, error).op("compress"))?;
                (len < unit.len()).then_some(len)
            }
        };
        Ok(match packed {
            Some(len) => EncodedKind::Packed { len },
            None => EncodedKind::Plain,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    fn text(len: usize) -> Vec<u8> {
        (0..len)
            .map(|at| b"lorem ipsum dolor "[(at + at / 97) % 18])
            .collect()
    }

    fn noise(len: usize) -> Vec<u8> {
        let mut state = 1_u64;
        let step = |_| {
            state = state
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            (state >> 56) as u8
        };
        (0..len).map(step).collect()
    }

    fn unpack(codec: Codec, bytes: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        match codec {
            Codec::Deflate(_) => flate2::read::DeflateDecoder::new(bytes)
                .read_to_end(&mut out)
                .unwrap(),
            Codec::Zlib(_) => flate2::read::ZlibDecoder::new(bytes)
                .read_to_end(&mut out)
                .unwrap(),
            Codec::Zstd(_) => zstd::Decoder::new(bytes).unwrap().read_to_end(&mut out).unwrap(),
        };
        out
    }

    #[test]
    fn every_level_gives_back_what_went_in() {
        let deflate = (1..=12).map(|level| Codec::deflate(Some(level), 65_536).unwrap());
        let zstd = (1..=22).map(|level| Codec::zstd(Some(level)).unwrap());
        for codec in deflate.chain(zstd) {
            let mut encoder = UnitEncoder::new(Some(codec)).unwrap();
            let mut scratch = Vec::new();
            for len in [512, 65_536] {
                let unit = text(len);
                let EncodedKind::Packed { len } = encoder.encode(&unit, &mut scratch).unwrap() else {
                    panic!("{codec:?} does not compress {len} bytes of text");
                };
                assert!(len < unit.len());
                assert_eq!(unpack(codec, &scratch[..len]), unit, "{codec:?}");
            }
        }
    }

    #[test]
    fn zeros_and_noise_are_not_packed() {
        for codec in [None, Some(Codec::Deflate(3)), Some(Codec::Zstd(3))] {
            let mut encoder = UnitEncoder::new(codec).unwrap();
            let mut scratch = Vec::new();
            for len in [512, 4096, 65_536] {
                assert_eq!(
                    encoder.encode(&vec![0; len], &mut scratch).unwrap(),
                    EncodedKind::Zero
                );
                assert_eq!(
                    encoder.encode(&noise(len), &mut scratch).unwrap(),
                    EncodedKind::Plain
                );
                let packed = encoder.pack(&vec![0; len], &mut scratch).unwrap();
                assert_eq!(packed == EncodedKind::Plain, codec.is_none());
            }
        }
    }

    #[test]
    fn levels_out_of_range_are_named() {
        assert_eq!(
            Codec::deflate(Some(13), 65_536).unwrap_err().to_string(),
            "compression level is 13, must be 1 to 12 with zlib"
        );
        assert!(Codec::deflate(Some(0), 512).is_err());
        assert!(Codec::zstd(Some(0)).is_err());
        assert_eq!(
            Codec::zstd(Some(23)).unwrap_err().to_string(),
            "compression level is 23, must be 1 to 22 with zstd"
        );
        assert_eq!(
            Codec::deflate(None, 32_768).unwrap(),
            Codec::Deflate(DEFLATE_LEVEL)
        );
        assert_eq!(
            Codec::deflate(None, 16_384).unwrap(),
            Codec::Deflate(DEFLATE_LEVEL_SMALL)
        );
        assert_eq!(Codec::zstd(None).unwrap(), Codec::Zstd(ZSTD_LEVEL));
    }
}
