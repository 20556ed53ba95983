//! Tables: from a byte of the disk to what its L2 entry says. No I/O.

#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

use diskmill_core::{Error, ErrorKind, Format, HostOffset, SECTOR};

use super::header::{HeaderError, L1_ENTRIES_MAX};
use super::layout::{CLUSTER_BITS, COMPRESSED, L2_BITS};
use crate::codec::PackedSpan;
use crate::tree::{self, Kind};

/// How many bytes a cluster has, and how many entries an L2 table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    cluster_bits: u8,
    l2_bits: u8,
}

impl Geometry {
    /// What an image has unless told otherwise.
    pub const PLAIN: Self = Self {
        cluster_bits: 12,
        l2_bits: 9,
    };

    /// What an image with a backing image has: a cluster is a sector, so that none is written in part.
    pub const OVERLAY: Self = Self {
        cluster_bits: 9,
        l2_bits: 12,
    };

    /// Clusters of 2^`cluster_bits` bytes and tables of 2^`l2_bits` entries.
    pub fn new(cluster_bits: u8, l2_bits: u8) -> Result<Self, HeaderError> {
        let bad = |field, value: u8, allowed| HeaderError::Range {
            field,
            value: value.into(),
            allowed,
        };
        if !CLUSTER_BITS.contains(&cluster_bits) {
            return Err(bad("cluster_bits", cluster_bits, "9 to 16"));
        }
        if !L2_BITS.contains(&l2_bits) {
            return Err(bad("l2_bits", l2_bits, "6 to 13"));
        }
        Ok(Self {
            cluster_bits,
            l2_bits,
        })
    }

    /// 9 to 16.
    pub const fn cluster_bits(self) -> u8 {
        self.cluster_bits
    }

    /// 6 to 13.
    pub const fn l2_bits(self) -> u8 {
        self.l2_bits
    }

    /// Bytes of a cluster.
    pub const fn cluster_size(self) -> u64 {
        1 << self.cluster_bits
    }

    /// Entries of an L2 table.
    pub const fn l2_entries(self) -> u32 {
        1 << self.l2_bits
    }

    /// Bytes of an L2 table.
    pub const fn l2_len(self) -> u64 {
        8 << self.l2_bits
    }

    /// Bytes of the disk that an L1 entry is about.
    pub const fn covers(self) -> u64 {
        self.cluster_size() << self.l2_bits
    }

    /// Entries of the L1 table of a disk of `size` bytes.
    pub const fn l1_entries(self, size: u64) -> u64 {
        size.div_ceil(self.covers())
    }

    /// Bytes of the largest disk.
    pub const fn largest_disk(self) -> u64 {
        L1_ENTRIES_MAX.saturating_mul(self.covers())
    }

    /// The same in the words of all tables of two levels.
    pub(super) const fn tree(self, disk: u64) -> tree::Geometry {
        tree::Geometry {
            grain: self.cluster_size(),
            entries: self.l2_entries(),
            entry_len: 8,
            disk,
        }
    }
}

/// What is wrong with an entry.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MapError {
    /// An L1 entry that is no place in a file.
    #[error("an L1 entry is {0:#x}, must be below 2^63")]
    Table(u64),
    /// A cluster that does not start on a sector.
    #[error("an L2 entry is {0:#x}, must be a multiple of 512")]
    Unaligned(u64),
    /// A compressed cluster without bytes.
    #[error("an L2 entry is {0:#x}: a compressed cluster of no bytes")]
    Empty(u64),
    /// What an entry names is not in the file.
    #[error("{what} at {at:#x} with {len} bytes runs past the end of the file at {file_len:#x}")]
    PastEnd {
        /// What it is.
        what: &'static str,
        /// Where it starts.
        at: u64,
        /// Its length.
        len: u64,
        /// The length of the file.
        file_len: u64,
    },
    /// A cluster that is not in the file, where others would be put.
    #[error(
        "the cluster of byte {guest} is at {at:#x}, behind the end of the file at {file_len:#x}: nothing new can be stored \
         before that is repaired"
    )]
    Dangling {
        /// The byte of the disk.
        guest: u64,
        /// Where it would be.
        at: u64,
        /// The length of the file, up to a whole cluster.
        file_len: u64,
    },
    /// A cluster where tables are.
    #[error("the data cluster at {0:#x} lies in the tables")]
    InTables(u64),
    /// A cluster that is written in place, and another in its place.
    #[error("the cluster at {0:#x} is in the place of another one")]
    Shared(u64),
    /// Tables, header and name are not all in places of their own.
    #[error("{what} at {at:#x} overlaps {other}")]
    Overlap {
        /// What it is.
        what: &'static str,
        /// Where it starts.
        at: u64,
        /// What it overlaps.
        other: &'static str,
    },
    /// A stream so far into the file that no entry can say so.
    #[error("a compressed cluster of {len} bytes at {at:#x} is too far into the file")]
    TooFar {
        /// Where it would be.
        at: u64,
        /// Its length.
        len: u64,
    },
}

impl From<MapError> for Error {
    fn from(error: MapError) -> Self {
        let kind = match error {
            MapError::TooFar { .. } => ErrorKind::NoSpace,
            _ => ErrorKind::Corrupt,
        };
        Error::new(kind, error).format(Format::Qcow)
    }
}

/// An entry of an L2 table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct L2Entry(pub u64);

impl L2Entry {
    /// A cluster that is left to the layer below.
    pub const ABSENT: Self = Self(0);

    /// A cluster stored at `at`.
    pub const fn data(at: HostOffset) -> Self {
        Self(at.get())
    }

    /// A cluster compressed to `span`, or an error if the entry cannot say that.
    pub fn packed(span: PackedSpan, geometry: Geometry) -> Result<Self, MapError> {
        let too_far = || MapError::TooFar {
            at: span.at.get(),
            len: span.len,
        };
        let bits = offset_bits(geometry);
        let fits =
            span.at.get().checked_shr(bits) == Some(0) && (1..geometry.cluster_size()).contains(&span.len);
        let len = span.len.checked_shl(bits).filter(|_| fits).ok_or_else(too_far)?;
        Ok(Self(COMPRESSED | len | span.at.get()))
    }

    /// What it says.
    pub fn kind(self, geometry: Geometry) -> Result<Kind, MapError> {
        match self.0 {
            0 => Ok(Kind::Absent),
            entry if entry & COMPRESSED != 0 => {
                let span = self.span(geometry);
                if span.len == 0 {
                    return Err(MapError::Empty(entry));
                }
                Ok(Kind::Packed(span.at))
            }
            entry if entry.is_multiple_of(SECTOR) => Ok(Kind::Data(HostOffset::new(entry))),
            entry => Err(MapError::Unaligned(entry)),
        }
    }

    /// Where a compressed cluster is.
    pub const fn span(self, geometry: Geometry) -> PackedSpan {
        let bits = offset_bits(geometry);
        let value = self.0 & !COMPRESSED;
        PackedSpan {
            at: HostOffset::new(value & ((1_u64 << bits).saturating_sub(1))),
            len: value >> bits,
        }
    }
}

/// Bits of the offset in the entry of a compressed cluster: 47 to 54.
const fn offset_bits(geometry: Geometry) -> u32 {
    63_u32.saturating_sub(geometry.cluster_bits as u32)
}

#[cfg(test)]
mod tests;
