//! Memory aligned for direct I/O.

use std::fmt;
use std::ops::{Deref, DerefMut};

/// Bytes that start at a multiple of [`AlignedBuf::ALIGN`] in memory.
///
/// A [`File`](crate::File) opened past the page cache serves requests from such a buffer without copying, if offset and
/// length suit its [`Hints::align`](diskmill_core::Hints) too.
pub struct AlignedBuf {
    store: Vec<u8>,
    start: usize,
    len: usize,
}

impl AlignedBuf {
    /// Where buffers start: at multiples of this, in bytes. Enough for any device.
    pub const ALIGN: usize = 4096;

    /// A buffer of `len` zeros.
    pub fn new(len: usize) -> Self {
        let store = vec![0; len.saturating_add(Self::ALIGN)];
        let start = store.as_ptr().align_offset(Self::ALIGN).min(Self::ALIGN);
        Self { store, start, len }
    }
}

impl Deref for AlignedBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.store[self.start..self.start + self.len]
    }
}

impl DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.store[self.start..self.start + self.len]
    }
}

impl fmt::Debug for AlignedBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AlignedBuf").field("len", &self.len).finish()
    }
}

/// Whether `bytes` start at a multiple of `align` in memory.
pub(crate) fn is_aligned(bytes: &[u8], align: u32) -> bool {
    bytes.as_ptr().addr().is_multiple_of(align as usize)
}

/// Whether there is a multiple of `align` of `bytes`.
pub(crate) fn is_aligned_len(bytes: &[u8], align: u32) -> bool {
    bytes.len().is_multiple_of(align as usize)
}

const ZEROS_LEN: usize = 64 << 10;

#[repr(align(4096))]
struct Zeros([u8; ZEROS_LEN]);

/// Zeros to write where the host knows no better way, aligned for direct I/O.
pub(crate) fn zeros() -> &'static [u8] {
    static ZEROS: Zeros = Zeros([0; ZEROS_LEN]);
    &ZEROS.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn starts_at_a_page() {
        for len in [0, 1, 511, 4096, 100_000] {
            let buffer = AlignedBuf::new(len);
            assert_eq!(buffer.len(), len);
            assert!(buffer.as_ptr().addr().is_multiple_of(AlignedBuf::ALIGN));
        }
        assert!(is_aligned(zeros(), 4096));
    }
}
