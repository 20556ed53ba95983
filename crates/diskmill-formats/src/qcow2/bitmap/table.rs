//! The table of a bitmap: where its bits are.

#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

use diskmill_core::{Error, ErrorKind, Format, HostOffset, Result, Storage};

use super::Bitmap;
use crate::qcow2::layout::{BITMAP_TABLE_RESERVED, OFFSET_MASK};

/// Bytes of an entry.
pub(super) const ENTRY_LEN: u64 = 8;

/// What is wrong with the table of a bitmap.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum TableError {
    /// An entry that means nothing.
    #[error(
        "bitmap '{name}': table entry {index} is {entry:#018x}, must be 0, 1 or a multiple of the cluster size below 2^56"
    )]
    Entry { name: String, index: u64, entry: u64 },
    /// A table, or bits, that do not lie in the file.
    #[error("bitmap '{name}': {what} at {at:#x} runs past the end of the file at {len:#x}")]
    PastEnd {
        name: String,
        what: &'static str,
        at: u64,
        len: u64,
    },
    /// Bits in a cluster that counts as free.
    #[error("bitmap '{name}': the refcount of its bits at {at:#x} is 0")]
    Uncounted { name: String, at: u64 },
}

impl From<TableError> for Error {
    fn from(error: TableError) -> Self {
        let kind = match error {
            TableError::Uncounted { .. } => ErrorKind::Corrupt,
            _ => ErrorKind::Malformed,
        };
        Error::new(kind, error).format(Format::Qcow2)
    }
}

/// The bits of one cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bits {
    /// All are clear.
    Clear,
    /// All are set.
    Set,
    /// They are in this cluster.
    At(HostOffset),
}

impl Bits {
    /// What `entry` says, or `None` if it breaks a rule.
    pub(crate) fn decode(entry: u64, cluster_size: u64) -> Option<Self> {
        let offset = HostOffset::new(entry & OFFSET_MASK);
        match entry {
            0 => Some(Self::Clear),
            1 => Some(Self::Set),
            _ if entry & BITMAP_TABLE_RESERVED != 0 || !offset.is_aligned(cluster_size) => None,
            _ => Some(Self::At(offset)),
        }
    }

    /// The entry that says so.
    pub(crate) fn encode(self) -> u64 {
        match self {
            Self::Clear => 0,
            Self::Set => 1,
            Self::At(offset) => offset.get(),
        }
    }
}

/// Reads `count` entries of the table of `bitmap` from entry `first` on. Whoever asks bounds `count`.
pub(super) fn read(
    file: &dyn Storage,
    bitmap: &Bitmap,
    cluster_size: u64,
    first: u64,
    count: u64,
) -> Result<Vec<Bits>> {
    let file_len = file.len()?;
    let past_end = |what, at| {
        Error::from(TableError::PastEnd {
            name: bitmap.name.clone(),
            what,
            at,
            len: file_len,
        })
    };
    let at = bitmap
        .table_offset
        .saturating_add(first.saturating_mul(ENTRY_LEN));
    let len = count.saturating_mul(ENTRY_LEN);
    if at.saturating_add(len).get() > file_len {
        return Err(past_end("its table", bitmap.table_offset.get()));
    }
    let mut raw = vec![0; usize::try_from(len).map_err(|_| past_end("its table", at.get()))?];
    file.read_at(at, &mut raw)?;
    let mut entries = Vec::with_capacity(raw.len() >> 3);
    for (index, entry) in (first..).zip(raw.as_chunks::<8>().0) {
        let entry = u64::from_be_bytes(*entry);
        let bits = Bits::decode(entry, cluster_size).ok_or_else(|| TableError::Entry {
            name: bitmap.name.clone(),
            index,
            entry,
        })?;
        match bits {
            // The last cluster may not have been written to its end.
            Bits::At(offset) if offset.get() >= file_len => {
                return Err(past_end("a cluster of bits", offset.get()));
            }
            bits => entries.push(bits),
        }
    }
    Ok(entries)
}

/// All entries of the table of `bitmap`: at most a million, which the directory has been checked for.
pub(super) fn read_all(file: &dyn Storage, bitmap: &Bitmap, cluster_size: u64) -> Result<Vec<Bits>> {
    read(file, bitmap, cluster_size, 0, bitmap.table_entries.into())
}

/// Fails if the table of `bitmap` breaks a rule. Reads it in pieces.
pub(super) fn check(file: &dyn Storage, bitmap: &Bitmap, cluster_size: u64) -> Result<()> {
    const STEP: u64 = 1 << 13;
    let entries = u64::from(bitmap.table_entries);
    let mut first = 0;
    while first < entries {
        let count = entries.saturating_sub(first).min(STEP);
        read(file, bitmap, cluster_size, first, count)?;
        first = first.saturating_add(count);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_read_strictly_and_written_back_alike() {
        for entry in [0, 1, 0x1_0000, 0x00ff_ffff_ffff_0000] {
            assert_eq!(Bits::decode(entry, 1 << 16).map(Bits::encode), Some(entry));
        }
        for entry in [
            2,
            3,
            0x1_0001,
            0x1_0002,
            0x8000,
            1 << 56,
            1 << 63 | 0x1_0000,
            1 << 63,
        ] {
            assert_eq!(Bits::decode(entry, 1 << 16), None, "{entry:#x}");
        }
    }
}
