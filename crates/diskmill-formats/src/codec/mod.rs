//! Compressed units: deflate and Zstandard, as the formats use them.
