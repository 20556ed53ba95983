//! Compressed units: deflate and Zstandard, as the formats use them.

mod decode;
mod encode;
mod lend;
mod zeros;

pub use decode::{DecodeError, Decoder};
pub use encode::{Codec, DEFLATE_LEVEL, DEFLATE_LEVEL_SMALL, SMALL_UNIT, UnitEncoder, ZSTD_LEVEL};
pub(crate) use lend::{Decoders, Scratch, read_clipped};
pub use lend::{PackedSpan, Packing};
pub use zeros::is_zero;
