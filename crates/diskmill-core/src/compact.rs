//! Making the file of an image as small as what it holds.

use crate::Compression;

/// How an image is to be made smaller.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct CompactSpec {
    /// Compress data that is stored plain, in the image's own way, where that saves space.
    pub compress: Option<Compression>,
}

/// What making an image smaller saved, or would save.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct CompactReport {
    /// Bytes of the main file before; of all files, if the image has its data in several.
    pub len_before: u64,
    /// The same after; on a device, which keeps its length, where the last byte in use ends.
    pub len_after: u64,
    /// Whether the file keeps its length (a block device).
    pub fixed_len: bool,
    /// Bytes of leaked space that are no longer taken.
    pub leaked: u64,
    /// Bytes of stored data and tables that held only zeros, or nothing, and are no longer taken. In formats that map
    /// nothing, the bytes given back to the host.
    pub zeros: u64,
    /// Bytes moved towards the start.
    pub moved: u64,
    /// Units that are compressed now and were not.
    pub compressed_units: u64,
    /// Bytes given back to the host by making holes in a file that keeps its length: a raw image, or a data file.
    pub punched: u64,
}

impl CompactReport {
    /// Bytes the image takes less: of its file's length, and of holes in files that keep theirs.
    pub fn saved(&self) -> u64 {
        self.len_before
            .saturating_sub(self.len_after)
            .saturating_add(self.punched)
    }
}
