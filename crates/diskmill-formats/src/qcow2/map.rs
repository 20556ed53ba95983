//! L1 and L2 entries: what a guest cluster is, and where. No I/O.

#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

use diskmill_core::{Error, ErrorKind, Format, GuestOffset, HostOffset};

use super::header::{ClusterBits, Version};
use super::layout::{COMPRESSED, COPIED, L1_RESERVED, L2_RESERVED, OFFSET_MASK, ZERO_FLAG};

/// Subclusters of a cluster, where there are some.
pub const SUBCLUSTERS: u32 = 32;

/// What is wrong with a table entry.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MapError {
    /// An offset that does not fall on a cluster.
    #[error("{what} is {value:#x}, must be a multiple of the cluster size {cluster_size}")]
    Unaligned {
        /// What is there.
        what: &'static str,
        /// The offset.
        value: u64,
        /// The cluster size.
        cluster_size: u64,
    },
    /// The zero flag in a version 2 image.
    #[error("l2 entry is {0:#018x}, bit 0 must be 0 in version 2")]
    ZeroInV2(u64),
    /// The zero flag in an image with extended L2 entries.
    #[error("l2 entry is {0:#018x}, bit 0 must be 0 with extended l2 entries")]
    ZeroInExtended(u64),
    /// A subcluster that is both data and zeros.
    #[error("subcluster bitmap is {0:#018x}, no subcluster may be allocated and zero at once")]
    Both(u64),
    /// Subclusters allocated in a cluster that is not.
    #[error("subcluster bitmap is {0:#018x}, the lower half must be 0 in a cluster without offset")]
    Nowhere(u64),
    /// Subclusters of a compressed cluster.
    #[error("subcluster bitmap is {0:#018x}, must be 0 in a compressed cluster")]
    OfCompressed(u64),
    /// A compressed cluster where there can be none.
    #[error("l2 entry is {0:#018x}, bit 62 must be 0 with an external data file")]
    CompressedInDataFile(u64),
    /// An entry with an external data file that does not map one to one.
    #[error("l2 entry points to {host:#x} of the external data file, must be {guest:#x}")]
    DataFileOffset {
        /// Where it points.
        host: u64,
        /// Where it must.
        guest: u64,
    },
}

impl From<MapError> for Error {
    fn from(error: MapError) -> Self {
        Error::new(ErrorKind::Corrupt, error).format(Format::Qcow2)
    }
}

/// How guest offsets fall on tables and clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    version: Version,
    cluster_bits: ClusterBits,
    extended_l2: bool,
    data_file: bool,
}

impl Geometry {
    /// The geometry of an image.
    pub const fn new(
        version: Version,
        cluster_bits: ClusterBits,
        extended_l2: bool,
        data_file: bool,
    ) -> Self {
        Self {
            version,
            cluster_bits,
            extended_l2,
            data_file,
        }
    }

    /// The version.
    pub const fn version(self) -> Version {
        self.version
    }

    /// The cluster size.
    pub const fn cluster_bits(self) -> ClusterBits {
        self.cluster_bits
    }

    /// Bytes of a cluster.
    pub const fn cluster_size(self) -> u64 {
        self.cluster_bits.cluster_size()
    }

    /// Whether clusters have subclusters.
    pub const fn extended_l2(self) -> bool {
        self.extended_l2
    }

    /// Whether data is in another file.
    pub const fn data_file(self) -> bool {
        self.data_file
    }

    /// Base-2 logarithm of the bytes that are mapped on their own: a subcluster, or a cluster.
    pub const fn granule_bits(self) -> u32 {
        let bits = self.cluster_bits.get();
        if self.extended_l2 {
            bits.saturating_sub(5)
        } else {
            bits
        }
    }

    /// Base-2 logarithm of an L2 entry's bytes: 3 or 4.
    pub const fn entry_bits(self) -> u32 {
        if self.extended_l2 { 4 } else { 3 }
    }

    /// Bytes of an L2 entry: 8 or 16.
    pub const fn entry_len(self) -> usize {
        1 << self.entry_bits()
    }

    /// Base-2 logarithm of the entries of an L2 table.
    pub const fn l2_bits(self) -> u32 {
        self.cluster_bits.get().saturating_sub(self.entry_bits())
    }

    /// Entries of an L2 table.
    pub const fn l2_entries(self) -> u64 {
        1 << self.l2_bits()
    }

    /// Base-2 logarithm of the guest bytes an L1 entry covers: at most 39.
    const fn l1_shift(self) -> u32 {
        self.cluster_bits.get().saturating_add(self.l2_bits())
    }

    /// Guest bytes an L1 entry covers.
    pub const fn l1_entry_covers(self) -> u64 {
        1 << self.l1_shift()
    }

    /// L1 entries a disk of `size` bytes needs.
    pub const fn l1_entries(self, size: u64) -> u64 {
        size.div_ceil(self.l1_entry_covers())
    }

    /// The L1 entry for a guest byte.
    pub const fn l1_index(self, at: GuestOffset) -> u64 {
        at.get() >> self.l1_shift()
    }

    /// The entry of its L2 table for a guest byte.
    pub const fn l2_index(self, at: GuestOffset) -> u64 {
        (at.get() >> self.cluster_bits.get()) & self.l2_entries().wrapping_sub(1)
    }

    /// The first guest byte of an L1 entry. Meaningful for indexes that [`l1_index`](Self::l1_index) can give.
    pub const fn l1_start(self, l1_index: u64) -> GuestOffset {
        GuestOffset::new(l1_index << self.l1_shift())
    }

    /// The subcluster of its cluster a guest byte is in; 0 where there are none.
    pub const fn subcluster(self, at: GuestOffset) -> u32 {
        if self.extended_l2 {
            // At most 31 after the mask.
            ((at.get() >> self.granule_bits()) & 31) as u32
        } else {
            0
        }
    }

    /// Low bits of a compressed entry that hold the offset.
    const fn compressed_offset_bits(self) -> u32 {
        70_u32.saturating_sub(self.cluster_bits.get())
    }
}

/// An entry of an L1 table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct L1Entry(pub u64);

impl L1Entry {
    /// The entry for the table at `offset`, which is a multiple of 512.
    pub const fn new(offset: HostOffset, copied: bool) -> Self {
        Self((offset.get() & OFFSET_MASK) | if copied { COPIED } else { 0 })
    }

    /// Where the L2 table is, if there is one. Errors if that is not a multiple of the cluster size.
    pub fn table(self, geometry: Geometry) -> Result<Option<HostOffset>, MapError> {
        match self.offset() {
            HostOffset::ZERO => Ok(None),
            at if at.is_aligned(geometry.cluster_size()) => Ok(Some(at)),
            at => Err(MapError::Unaligned {
                what: "l2 table offset",
                value: at.get(),
                cluster_size: geometry.cluster_size(),
            }),
        }
    }

    /// The offset bits; 0 if there is no table.
    pub const fn offset(self) -> HostOffset {
        HostOffset::new(self.0 & OFFSET_MASK)
    }

    /// Whether the table's refcount is said to be exactly 1.
    pub const fn copied(self) -> bool {
        self.0 & COPIED != 0
    }

    /// Bits that are set and must not be.
    pub const fn reserved(self) -> u64 {
        self.0 & L1_RESERVED
    }
}

/// Where a compressed cluster is: up to the end of the last sector it may use.
pub use crate::codec::PackedSpan as CompressedSpan;

/// An entry of an L2 table, without the subcluster bitmap.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct L2Entry(pub u64);

/// What an L2 entry says of its cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClusterKind {
    /// Nothing: ask below.
    Unallocated,
    /// Stored here. With extended L2 entries the subclusters say which parts are.
    Normal(HostOffset),
    /// Zeros that take no space.
    ZeroPlain,
    /// Zeros for which space is kept.
    ZeroAllocated(HostOffset),
    /// Stored compressed.
    Compressed(CompressedSpan),
}

impl L2Entry {
    /// An unallocated cluster.
    pub const UNALLOCATED: Self = Self(0);
    /// Zeros that take no space.
    pub const ZERO_PLAIN: Self = Self(ZERO_FLAG);

    /// A cluster stored at `at`.
    pub const fn normal(at: HostOffset, copied: bool) -> Self {
        Self((at.get() & OFFSET_MASK) | if copied { COPIED } else { 0 })
    }

    /// A cluster that reads as zeros and keeps its space at `at`.
    pub const fn zero_allocated(at: HostOffset, copied: bool) -> Self {
        Self(Self::normal(at, copied).0 | ZERO_FLAG)
    }

    /// A cluster compressed to `len` bytes at `at`, or `None` if the entry cannot say that.
    pub fn compressed(at: HostOffset, len: u64, geometry: Geometry) -> Option<Self> {
        let bits = geometry.compressed_offset_bits();
        let last = at.checked_add(len.checked_sub(1)?)?;
        let sectors = (last.get() >> 9).checked_sub(at.get() >> 9)?;
        let offset_fits = at.get().checked_shr(bits.min(56)) == Some(0);
        let sectors_fit = sectors.checked_shr(62_u32.checked_sub(bits)?) == Some(0);
        (offset_fits && sectors_fit).then(|| Self(COMPRESSED | (sectors << bits) | at.get()))
    }

    /// What the entry says. Reserved bits are ignored, as QEMU does; a check reports them.
    pub fn kind(self, geometry: Geometry) -> Result<ClusterKind, MapError> {
        if self.0 & COMPRESSED != 0 {
            if geometry.data_file() {
                return Err(MapError::CompressedInDataFile(self.0));
            }
            return Ok(ClusterKind::Compressed(self.span(geometry)));
        }
        let at = self.offset();
        let zero = self.0 & ZERO_FLAG != 0 && !geometry.extended_l2();
        if zero && geometry.version() == Version::V2 {
            return Err(MapError::ZeroInV2(self.0));
        }
        // In a data file offset 0 is a place like any other: the flag tells.
        let allocated = at != HostOffset::ZERO || (geometry.data_file() && self.copied());
        if !at.is_aligned(geometry.cluster_size()) {
            return Err(MapError::Unaligned {
                what: "cluster offset",
                value: at.get(),
                cluster_size: geometry.cluster_size(),
            });
        }
        Ok(match (allocated, zero) {
            (false, false) => ClusterKind::Unallocated,
            (false, true) => ClusterKind::ZeroPlain,
            (true, false) => ClusterKind::Normal(at),
            (true, true) => ClusterKind::ZeroAllocated(at),
        })
    }

    /// The place of a compressed cluster. Means nothing for other entries.
    pub fn span(self, geometry: Geometry) -> CompressedSpan {
        let bits = geometry.compressed_offset_bits();
        // Of the offset field only 56 bits can be an offset in a file.
        let at = self.0 & low_bits(bits.min(56));
        let sectors = (self.0 & low_bits(62)).checked_shr(bits).unwrap_or(0);
        let len = sectors
            .saturating_add(1)
            .saturating_mul(512)
            .saturating_sub(at & 511);
        CompressedSpan {
            at: HostOffset::new(at),
            len,
        }
    }

    /// Whether the cluster is compressed.
    pub const fn is_compressed(self) -> bool {
        self.0 & COMPRESSED != 0
    }

    /// The offset bits of an entry that is not compressed; 0 if there is no offset.
    pub const fn offset(self) -> HostOffset {
        HostOffset::new(self.0 & OFFSET_MASK)
    }

    /// Whether the cluster's refcount is said to be exactly 1.
    pub const fn copied(self) -> bool {
        self.0 & COPIED != 0
    }

    /// Bits of an entry that is not compressed that are set and must not be.
    pub const fn reserved(self, geometry: Geometry) -> u64 {
        let reserved = if geometry.extended_l2() {
            L2_RESERVED | ZERO_FLAG
        } else {
            L2_RESERVED
        };
        if self.is_compressed() {
            0
        } else {
            self.0 & reserved
        }
    }
}

const fn low_bits(count: u32) -> u64 {
    match 1_u64.checked_shl(count) {
        Some(bit) => bit.wrapping_sub(1),
        None => u64::MAX,
    }
}

/// The second word of an extended L2 entry: bit i says that subcluster i is allocated, bit 32 + i that it reads as
/// zeros.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Subclusters(pub u64);

/// What a subcluster is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SubclusterKind {
    /// Nothing: ask below.
    Unallocated,
    /// Stored in the cluster's place.
    Allocated,
    /// Zeros.
    Zero,
}

impl Subclusters {
    /// All subclusters are stored.
    pub const ALL_ALLOCATED: Self = Self(0xffff_ffff);
    /// All subclusters read as zeros.
    pub const ALL_ZERO: Self = Self(0xffff_ffff << 32);

    /// Fails if the bitmap contradicts itself or the entry before it.
    pub fn check(self, kind: ClusterKind) -> Result<(), MapError> {
        let allocated = self.0 & 0xffff_ffff;
        match kind {
            ClusterKind::Compressed(_) if self.0 != 0 => Err(MapError::OfCompressed(self.0)),
            _ if allocated & (self.0 >> 32) != 0 => Err(MapError::Both(self.0)),
            ClusterKind::Unallocated if allocated != 0 => Err(MapError::Nowhere(self.0)),
            _ => Ok(()),
        }
    }

    /// What subcluster `index` is, which is below 32.
    pub const fn get(self, index: u32) -> SubclusterKind {
        let index = index & 31;
        if (self.0 >> index) & 1 != 0 {
            SubclusterKind::Allocated
        } else if (self.0 >> index) & (1 << 32) != 0 {
            SubclusterKind::Zero
        } else {
            SubclusterKind::Unallocated
        }
    }

    /// What subcluster `from` is, and how many from there on are the same: at least 1.
    pub const fn run(self, from: u32) -> (SubclusterKind, u32) {
        let from = from & 31;
        let allocated = ((self.0 & 0xffff_ffff) as u32) >> from;
        let zero = (((self.0 >> 32) as u32) >> from) & !allocated;
        let same = if allocated & 1 != 0 {
            allocated
        } else if zero & 1 != 0 {
            zero
        } else {
            !(allocated | zero)
        };
        let room = SUBCLUSTERS.saturating_sub(from);
        let len = same.trailing_ones();
        (self.get(from), if len < room { len } else { room })
    }

    /// This bitmap with `count` subclusters from `from` on set to `kind`.
    #[must_use]
    pub const fn with(self, from: u32, count: u32, kind: SubclusterKind) -> Self {
        let some = low_bits(if count < SUBCLUSTERS { count } else { SUBCLUSTERS }) << (from & 31);
        let mask = some & 0xffff_ffff;
        let cleared = self.0 & !(mask | (mask << 32));
        Self(match kind {
            SubclusterKind::Unallocated => cleared,
            SubclusterKind::Allocated => cleared | mask,
            SubclusterKind::Zero => cleared | (mask << 32),
        })
    }
}

#[cfg(test)]
mod tests;
