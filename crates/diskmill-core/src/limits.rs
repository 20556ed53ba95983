//! How much an image may ask for.

/// Caps on what an image can make us allocate or follow. Every number from a file meets one of them, or a tighter
/// rule of its format, before it is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Limits {
    /// Images in a backing chain.
    pub chain_depth: usize,
    /// Bytes of one image's metadata held in memory.
    pub metadata_bytes: u64,
    /// Internal snapshots of an image.
    pub snapshots: u32,
    /// Bytes of its snapshot table.
    pub snapshot_table_bytes: u64,
    /// Dirty bitmaps of an image.
    pub bitmaps: u32,
}

impl Default for Limits {
    /// What QEMU itself allows.
    fn default() -> Self {
        Self {
            chain_depth: 200,
            metadata_bytes: 2 << 30,
            snapshots: 65_536,
            snapshot_table_bytes: 64 << 20,
            bitmaps: 65_535,
        }
    }
}
