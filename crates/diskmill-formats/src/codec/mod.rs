//! Compressed units: deflate and Zstandard, as the formats use them.

mod encode;
mod zeros;

pub use encode::{Codec, DEFLATE_LEVEL, UnitEncoder, ZSTD_LEVEL};
pub use zeros::is_zero;
