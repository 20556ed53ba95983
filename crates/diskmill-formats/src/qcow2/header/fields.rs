//! Fields of the header that are in range: sizes, widths, features.

#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

use diskmill_core::HostOffset;

use super::HeaderError;

/// Base-2 logarithm of the cluster size: 9 to 21.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClusterBits(u8);

impl ClusterBits {
    /// 64 KiB, what a new image has unless told otherwise.
    pub const DEFAULT: Self = Self(16);

    /// The newtype, if `bits` is 9 to 21.
    pub fn new(bits: u32) -> Result<Self, HeaderError> {
        match u8::try_from(bits) {
            Ok(small @ 9..=21) => Ok(Self(small)),
            _ => Err(HeaderError::Range {
                field: "cluster_bits",
                value: bits.into(),
                allowed: "9 to 21",
            }),
        }
    }

    /// The number itself.
    pub const fn get(self) -> u32 {
        self.0 as u32
    }

    /// Bytes of a cluster: 512 to 2097152.
    pub const fn cluster_size(self) -> u64 {
        1 << self.0
    }

    /// Bytes of a cluster, to size a buffer with.
    pub const fn cluster_len(self) -> usize {
        1 << self.0
    }

    /// Clusters that `bytes` take, the last one perhaps not full.
    pub const fn clusters(self, bytes: u64) -> u64 {
        bytes.div_ceil(self.cluster_size())
    }

    /// `value` as an offset in the file, if it is a multiple of the cluster size below 2^63.
    pub(in super::super) fn aligned(
        self,
        field: &'static str,
        value: u64,
    ) -> Result<HostOffset, HeaderError> {
        let offset = HostOffset::new(value);
        if offset.is_aligned(self.cluster_size()) && value <= i64::MAX as u64 {
            Ok(offset)
        } else {
            Err(HeaderError::Unaligned {
                field,
                value,
                cluster_size: self.cluster_size(),
            })
        }
    }
}

/// Base-2 logarithm of the width of a refcount in bits: 0 to 6.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RefcountOrder(u8);

impl RefcountOrder {
    /// 16 bits: what version 2 always has, and a new image unless told otherwise.
    pub const DEFAULT: Self = Self(4);

    /// The newtype, if `order` is 0 to 6.
    pub fn new(order: u32) -> Result<Self, HeaderError> {
        match u8::try_from(order) {
            Ok(small @ 0..=6) => Ok(Self(small)),
            _ => Err(HeaderError::Range {
                field: "refcount_order",
                value: order.into(),
                allowed: "0 to 6",
            }),
        }
    }

    /// The order for a width, if `bits` is a power of two from 1 to 64.
    pub fn from_bits(bits: u64) -> Option<Self> {
        let order = u8::try_from(bits.trailing_zeros()).ok()?;
        (bits.is_power_of_two() && order <= 6).then_some(Self(order))
    }

    /// The number itself.
    pub const fn get(self) -> u32 {
        self.0 as u32
    }

    /// Bits of a refcount: 1 to 64.
    pub const fn bits(self) -> u32 {
        1 << self.0
    }

    /// The largest refcount that can be stored.
    pub const fn max(self) -> u64 {
        u64::MAX >> (64_u32.saturating_sub(self.bits()))
    }

    /// Base-2 logarithm of the refcounts in a block of one cluster.
    pub const fn block_bits(self, cluster_bits: ClusterBits) -> u32 {
        cluster_bits.get().saturating_add(3).saturating_sub(self.get())
    }
}

/// The version of the format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Version {
    /// Version 2, which QEMU calls `compat=0.10`.
    V2,
    /// Version 3, which QEMU calls `compat=1.1`.
    V3,
}

impl Version {
    /// The number in the header.
    pub const fn number(self) -> u32 {
        match self {
            Self::V2 => 2,
            Self::V3 => 3,
        }
    }

    /// QEMU's name for it: the release that introduced it.
    pub const fn compat(self) -> &'static str {
        match self {
            Self::V2 => "0.10",
            Self::V3 => "1.1",
        }
    }
}

/// How guest data is encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CryptMethod {
    /// Not at all.
    None,
    /// AES-128-CBC, the old way.
    Aes,
    /// LUKS.
    Luks,
}

impl CryptMethod {
    /// What `info` and options call it; "none" if data is not encrypted.
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Aes => "aes",
            Self::Luks => "luks",
        }
    }
}

/// How compressed clusters are compressed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum CompressionType {
    /// Raw deflate.
    #[default]
    Zlib,
    /// Zstandard frames.
    Zstd,
}

impl CompressionType {
    /// Its name in options and JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Zlib => "zlib",
            Self::Zstd => "zstd",
        }
    }
}

macro_rules! features {
    ($(#[$doc:meta])* $name:ident { $($(#[$bit_doc:meta])* $bit:ident = $shift:literal, $text:literal;)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
        pub struct $name(u64);

        impl $name {
            $($(#[$bit_doc])* pub const $bit: Self = Self(1 << $shift);)*
            /// Every bit this program knows, with its number and the name QEMU gives it.
            pub const KNOWN: &'static [(Self, u8, &'static str)] = &[$((Self::$bit, $shift, $text)),*];

            /// The set of these bits, known or not.
            pub const fn new(bits: u64) -> Self {
                Self(bits)
            }

            /// The bits.
            pub const fn bits(self) -> u64 {
                self.0
            }

            /// Whether all bits of `other` are set.
            pub const fn has(self, other: Self) -> bool {
                self.0 & other.0 == other.0
            }

            /// This set with `other`'s bits set, or cleared.
            #[must_use]
            pub const fn with(self, other: Self, set: bool) -> Self {
                if set { Self(self.0 | other.0) } else { Self(self.0 & !other.0) }
            }

            /// The bits this program does not know.
            #[must_use]
            pub const fn unknown(self) -> Self {
                Self(self.0 & !(0 $(| Self::$bit.0)*))
            }
        }
    };
}

features! {
    /// Features a reader must know.
    Incompatible {
        /// Refcounts may be wrong: not closed properly.
        DIRTY = 0, "dirty bit";
        /// Something is broken; must not be written to.
        CORRUPT = 1, "corrupt bit";
        /// Data is in another file.
        DATA_FILE = 2, "external data file";
        /// Clusters are compressed otherwise than by deflate.
        COMPRESSION = 3, "compression type";
        /// L2 entries have 16 bytes and describe 32 subclusters.
        EXTENDED_L2 = 4, "extended L2 entries";
    }
}

features! {
    /// Features a reader need not know.
    Compatible {
        /// Refcounts may be written late while the dirty bit is set.
        LAZY_REFCOUNTS = 0, "lazy refcounts";
    }
}

features! {
    /// Features that a writer clears when it does not know them.
    Autoclear {
        /// The bitmaps are up to date.
        BITMAPS = 0, "bitmaps";
        /// The external data file is a valid raw image on its own.
        RAW_DATA_FILE = 1, "raw external data";
    }
}
