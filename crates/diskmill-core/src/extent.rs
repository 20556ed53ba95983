//! Runs of guest bytes with one state.

use crate::HostOffset;

/// Which of an image's own files: 0 is the file that was opened, others are data and extent files.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileIndex(pub u16);

impl FileIndex {
    /// The file that was opened.
    pub const MAIN: Self = Self(0);
}

/// Where bytes are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostSpan {
    /// In which of the layer's files.
    pub file: FileIndex,
    /// The first byte.
    pub at: HostOffset,
    /// How many bytes; for [`State::Data`] the same as the extent's.
    pub len: u64,
}

/// What a layer says of a run of guest bytes. It speaks of itself only, never of what is below.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum State {
    /// Stored as they are: guest byte `at + n` is host byte `span.at + n`.
    Data(HostSpan),
    /// Stored compressed; only the layer can read them.
    Compressed(HostSpan),
    /// Stored encrypted; only the layer can read them.
    Encrypted(HostSpan),
    /// Read as zeros by this layer's word.
    Zero {
        /// Space that is kept for them nevertheless.
        reserved: Option<HostSpan>,
    },
    /// Ask the layer below; zeros if there is none.
    Absent,
}

/// A run of guest bytes with one state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Bytes in the run: at least 1, at most what was asked for.
    pub len: u64,
    /// What they are.
    pub state: State,
}
