//! Compressed units: deflate and Zstandard, as the formats use them.

mod decode;
mod encode;
mod zeros;

pub use decode::{DecodeError, Decoder};
pub use encode::{Codec, DEFLATE_LEVEL, DEFLATE_LEVEL_SMALL, SMALL_UNIT, UnitEncoder, ZSTD_LEVEL};
pub use zeros::is_zero;
