//! The header: bytes to [`Header`] and back. No I/O.

#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

use diskmill_core::{BackingName, Error, ErrorKind, Format, HostOffset, SECTOR};
use zerocopy::byteorder::big_endian::{U32, U64};
use zerocopy::{FromBytes, IntoBytes};

use super::extension::{self, BitmapsExtension, EncryptionExtension, Extension, FeatureKind};
use super::layout::{
    BACKING_NAME_MAX, COMPRESSION_TYPE_AT, L1_BYTES_MAX, MAGIC, REFCOUNT_TABLE_BYTES_MAX, RawHeaderV2,
    RawHeaderV3, SNAPSHOTS_MAX, V2_HEADER_LEN, V3_HEADER_LEN, V3_HEADER_MIN,
};
use super::map::Geometry;

/// What is wrong with a header.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HeaderError {
    /// The magic number is another's.
    #[error("magic is {0:#010x}, must be 0x514649fb")]
    Magic(u32),
    /// A version this program does not know.
    #[error("version is {0}, must be 2 or 3")]
    Version(u32),
    /// The file ends before the header does.
    #[error("the header needs {needed} bytes, the file has {have}")]
    Short {
        /// Bytes there are.
        have: u64,
        /// Bytes there must be.
        needed: u64,
    },
    /// A number outside what is allowed.
    #[error("{field} is {value}, must be {allowed}")]
    Range {
        /// The field.
        field: &'static str,
        /// What it is.
        value: u64,
        /// What it may be.
        allowed: &'static str,
    },
    /// A number outside what the rest of the header allows.
    #[error("{field} is {value}, must be {low} to {high}")]
    Bounds {
        /// The field.
        field: &'static str,
        /// What it is.
        value: u64,
        /// The least it may be.
        low: u64,
        /// The most it may be.
        high: u64,
    },
    /// An offset that does not fall on a cluster.
    #[error("{field} is {value:#x}, must be a multiple of the cluster size {cluster_size} below 2^63")]
    Unaligned {
        /// The field.
        field: &'static str,
        /// What it is.
        value: u64,
        /// The cluster size.
        cluster_size: u64,
    },
    /// Feature bits a reader must know and this one does not.
    #[error("incompatible feature {0} is not supported")]
    Features(String),
    /// The compression type and the feature bit that announces it disagree.
    #[error(
        "compression_type is {compression_type} and the incompatible feature bit 'compression type' is {bit}, \
         must be 0 with 0 or 1 with 1"
    )]
    Compression {
        /// The compression type.
        compression_type: u8,
        /// The feature bit.
        bit: u8,
    },
    /// A feature that needs another.
    #[error("{feature} is set, must be unset without {needs}")]
    Needs {
        /// What is set.
        feature: &'static str,
        /// What is missing.
        needs: &'static str,
    },
    /// An extension that runs out of its area.
    #[error("length of header extension {kind:#010x} is {len}, must be at most {room}")]
    ExtensionTooLong {
        /// Its type.
        kind: u32,
        /// Its length.
        len: u32,
        /// Bytes up to the end of the area.
        room: u64,
    },
    /// An extension of a known type and a wrong length.
    #[error("length of the {name} extension is {len}, must be {allowed}")]
    ExtensionLen {
        /// Its name.
        name: &'static str,
        /// Its length.
        len: u64,
        /// What it must be.
        allowed: u64,
    },
}

impl HeaderError {
    const fn kind(&self) -> ErrorKind {
        match self {
            Self::Magic(_) => ErrorKind::NotThisFormat,
            Self::Version(_) | Self::Features(_) => ErrorKind::Unsupported,
            _ => ErrorKind::Malformed,
        }
    }
}

impl From<HeaderError> for Error {
    fn from(error: HeaderError) -> Self {
        let kind = error.kind();
        Error::new(kind, error).format(Format::Qcow2)
    }
}

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
    pub(super) fn aligned(self, field: &'static str, value: u64) -> Result<HostOffset, HeaderError> {
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

/// A header that has been understood: every field is in range on its own and with the others. What only the length
/// of the file can tell has not been looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Header {
    /// The version.
    pub version: Version,
    /// The cluster size.
    pub cluster_bits: ClusterBits,
    /// Bytes of the virtual disk as stored; [`virtual_size`](Self::virtual_size) is what counts.
    pub size: u64,
    /// How guest data is encrypted.
    pub crypt_method: CryptMethod,
    /// Entries of the active L1 table: enough for `size`, at most 32 MiB of them.
    pub l1_size: u32,
    /// Where the active L1 table is; cluster aligned.
    pub l1_table_offset: HostOffset,
    /// Where the refcount table is; cluster aligned.
    pub refcount_table_offset: HostOffset,
    /// Clusters of the refcount table: at most 8 MiB of them. 0 only in an image that needs repair.
    pub refcount_table_clusters: u32,
    /// Snapshots in the image: at most 65536.
    pub nb_snapshots: u32,
    /// Where the snapshot table is; cluster aligned. Means nothing without snapshots.
    pub snapshots_offset: HostOffset,
    /// Features a reader must know.
    pub incompatible: Incompatible,
    /// Features a reader need not know.
    pub compatible: Compatible,
    /// Features that a writer clears when it does not know them.
    pub autoclear: Autoclear,
    /// The width of refcounts.
    pub refcount_order: RefcountOrder,
    /// How compressed clusters are compressed.
    pub compression_type: CompressionType,
    /// What the header has beyond the fields above: padding and fields of the future, or `None` if it ends before
    /// the compression type.
    pub tail: Option<Vec<u8>>,
    /// The extensions in the order of the file.
    pub extensions: Vec<Extension>,
    /// The backing file's name in the bytes of the file, if there is one.
    pub backing_name: Option<Vec<u8>>,
}

impl Header {
    /// A header without features, tables or extensions.
    pub fn new(version: Version, cluster_bits: ClusterBits, size: u64) -> Self {
        Self {
            version,
            cluster_bits,
            size,
            crypt_method: CryptMethod::None,
            l1_size: 0,
            l1_table_offset: HostOffset::ZERO,
            refcount_table_offset: HostOffset::ZERO,
            refcount_table_clusters: 0,
            nb_snapshots: 0,
            snapshots_offset: HostOffset::ZERO,
            incompatible: Incompatible::default(),
            compatible: Compatible::default(),
            autoclear: Autoclear::default(),
            refcount_order: RefcountOrder::DEFAULT,
            compression_type: CompressionType::Zlib,
            tail: match version {
                Version::V2 => None,
                Version::V3 => Some(vec![0; 7]),
            },
            extensions: Vec::new(),
            backing_name: None,
        }
    }

    /// The extension that names all known feature bits, as QEMU writes it.
    pub fn feature_names() -> Extension {
        let incompatible = Incompatible::KNOWN
            .iter()
            .map(|(_, bit, name)| extension::FeatureName::new(FeatureKind::Incompatible, *bit, name));
        let compatible = Compatible::KNOWN
            .iter()
            .map(|(_, bit, name)| extension::FeatureName::new(FeatureKind::Compatible, *bit, name));
        let autoclear = Autoclear::KNOWN
            .iter()
            .map(|(_, bit, name)| extension::FeatureName::new(FeatureKind::Autoclear, *bit, name));
        Extension::FeatureNames(
            incompatible.chain(compatible).chain(autoclear).collect(),
            Vec::new(),
        )
    }

    /// How many bytes from the start of the file [`parse`](Self::parse) may look at: a cluster. `prefix` is the first
    /// 72 bytes or more.
    pub fn area_len(prefix: &[u8]) -> Result<usize, HeaderError> {
        let (raw, _) = read_v2(prefix)?;
        Ok(ClusterBits::new(raw.cluster_bits.get())?.cluster_len())
    }

    /// Understands the header in `bytes`: the first cluster of the file, or less if the file is shorter.
    pub fn parse(bytes: &[u8]) -> Result<Self, HeaderError> {
        let (raw, after) = read_v2(bytes)?;
        let version = match raw.version.get() {
            2 => Version::V2,
            3 => Version::V3,
            other => return Err(HeaderError::Version(other)),
        };
        let cluster_bits = ClusterBits::new(raw.cluster_bits.get())?;
        let mut header = Self::new(version, cluster_bits, raw.size.get());
        let header_length = match version {
            Version::V2 => V2_HEADER_LEN,
            Version::V3 => header.parse_v3(bytes, after)?,
        };
        let area = header.parse_backing_name(bytes, &raw, header_length)?;
        header.extensions = extension::parse_all(area, cluster_bits)?;
        header.check_features()?;
        header.crypt_method = match raw.crypt_method.get() {
            0 => CryptMethod::None,
            1 => CryptMethod::Aes,
            2 if header.encryption().is_some() => CryptMethod::Luks,
            2 => {
                return Err(HeaderError::Needs {
                    feature: "crypt_method LUKS",
                    needs: "the encryption extension",
                });
            }
            other => {
                return Err(HeaderError::Range {
                    field: "crypt_method",
                    value: other.into(),
                    allowed: "0, 1 or 2",
                });
            }
        };
        header.parse_tables(&raw)?;
        Ok(header)
    }

    /// Takes the fields only version 3 has and returns the header's length. `after` is what follows byte 72.
    fn parse_v3(&mut self, bytes: &[u8], after: &[u8]) -> Result<u32, HeaderError> {
        let (raw, _) = RawHeaderV3::read_from_prefix(after).map_err(|_| HeaderError::Short {
            have: bytes.len() as u64,
            needed: V3_HEADER_MIN.into(),
        })?;
        self.incompatible = Incompatible::new(raw.incompatible_features.get());
        self.compatible = Compatible::new(raw.compatible_features.get());
        self.autoclear = Autoclear::new(raw.autoclear_features.get());
        self.refcount_order = RefcountOrder::new(raw.refcount_order.get())?;
        let header_length = raw.header_length.get();
        let cluster_size = self.cluster_bits.cluster_size();
        if u64::from(header_length) > cluster_size || header_length < V3_HEADER_MIN {
            return Err(HeaderError::Bounds {
                field: "header_length",
                value: header_length.into(),
                low: V3_HEADER_MIN.into(),
                high: cluster_size,
            });
        }
        let end = usize::try_from(header_length).unwrap_or(usize::MAX);
        let tail = bytes
            .get(COMPRESSION_TYPE_AT..end)
            .ok_or_else(|| HeaderError::Short {
                have: bytes.len() as u64,
                needed: header_length.into(),
            })?;
        self.tail = match tail.split_first() {
            None => None,
            Some((compression_type, tail)) => {
                self.compression_type = match compression_type {
                    0 => CompressionType::Zlib,
                    1 => CompressionType::Zstd,
                    other => {
                        return Err(HeaderError::Range {
                            field: "compression_type",
                            value: (*other).into(),
                            allowed: "0 (zlib) or 1 (zstd)",
                        });
                    }
                };
                Some(tail.to_vec())
            }
        };
        Ok(header_length)
    }

    /// Takes the backing file's name and returns the area of the extensions.
    fn parse_backing_name<'a>(
        &mut self,
        bytes: &'a [u8],
        raw: &RawHeaderV2,
        header_length: u32,
    ) -> Result<&'a [u8], HeaderError> {
        let start = usize::try_from(header_length).unwrap_or(usize::MAX);
        let cluster_size = self.cluster_bits.cluster_size();
        let offset = raw.backing_file_offset.get();
        if offset == 0 {
            let end = bytes.len().min(self.cluster_bits.cluster_len());
            return Ok(bytes.get(start..end).unwrap_or_default());
        }
        if !(u64::from(header_length)..=cluster_size).contains(&offset) {
            return Err(HeaderError::Bounds {
                field: "backing_file_offset",
                value: offset,
                low: header_length.into(),
                high: cluster_size,
            });
        }
        let len = raw.backing_file_size.get();
        let room = cluster_size.saturating_sub(offset).min(BACKING_NAME_MAX.into());
        if u64::from(len) > room {
            return Err(HeaderError::Bounds {
                field: "backing_file_size",
                value: len.into(),
                low: 0,
                high: room,
            });
        }
        let short = || HeaderError::Short {
            have: bytes.len() as u64,
            needed: offset.saturating_add(len.into()),
        };
        let at = usize::try_from(offset).map_err(|_| short())?;
        let (before, behind) = bytes.split_at_checked(at).ok_or_else(short)?;
        let len = usize::try_from(len).map_err(|_| short())?;
        let name = behind.get(..len).ok_or_else(short)?;
        self.backing_name = Some(name.to_vec());
        Ok(before.get(start..).unwrap_or_default())
    }

    fn check_features(&self) -> Result<(), HeaderError> {
        let unknown = self.incompatible.unknown().bits();
        if unknown != 0 {
            return Err(HeaderError::Features(self.describe(unknown)));
        }
        let announced = self.incompatible.has(Incompatible::COMPRESSION);
        if announced != (self.compression_type != CompressionType::Zlib) {
            return Err(HeaderError::Compression {
                compression_type: (self.compression_type == CompressionType::Zstd).into(),
                bit: announced.into(),
            });
        }
        if self.autoclear.has(Autoclear::RAW_DATA_FILE) && !self.has_data_file() {
            return Err(HeaderError::Needs {
                feature: "autoclear feature 'raw external data'",
                needs: "incompatible feature 'external data file'",
            });
        }
        if self.extended_l2() && self.cluster_bits.get() < 14 {
            return Err(HeaderError::Range {
                field: "cluster_bits",
                value: self.cluster_bits.get().into(),
                allowed: "14 to 21 with extended L2 entries",
            });
        }
        Ok(())
    }

    /// Names for unknown incompatible bits: the image's own where it has some.
    fn describe(&self, bits: u64) -> String {
        let mut texts = Vec::new();
        for bit in 0..64_u8 {
            if bits.checked_shr(bit.into()).is_none_or(|rest| rest & 1 == 0) {
                continue;
            }
            let named = self.extensions.iter().find_map(|extension| match extension {
                Extension::FeatureNames(names, _) => names
                    .iter()
                    .find(|name| name.kind == FeatureKind::Incompatible && name.bit == bit),
                _ => None,
            });
            texts.push(match named {
                Some(name) => format!("bit {bit} '{}'", name.text()),
                None => format!("bit {bit}"),
            });
        }
        texts.join(", ")
    }

    fn parse_tables(&mut self, raw: &RawHeaderV2) -> Result<(), HeaderError> {
        let cluster_bits = self.cluster_bits;
        let size = raw.size.get();
        if size > i64::MAX as u64 {
            return Err(HeaderError::Range {
                field: "size",
                value: size,
                allowed: "below 2^63",
            });
        }
        let least = self.geometry().l1_entries(self.virtual_size());
        let most = L1_BYTES_MAX >> 3;
        if least > most {
            return Err(HeaderError::Bounds {
                field: "size",
                value: size,
                low: 0,
                high: self.geometry().l1_entry_covers().saturating_mul(most),
            });
        }
        self.l1_size = raw.l1_size.get();
        if !(least..=most).contains(&self.l1_size.into()) {
            return Err(HeaderError::Bounds {
                field: "l1_size",
                value: self.l1_size.into(),
                low: least,
                high: most,
            });
        }
        self.l1_table_offset = cluster_bits.aligned("l1_table_offset", raw.l1_table_offset.get())?;
        if self.l1_size != 0 && self.l1_table_offset == HostOffset::ZERO {
            return Err(HeaderError::Range {
                field: "l1_table_offset",
                value: 0,
                allowed: "behind the header",
            });
        }
        self.refcount_table_clusters = raw.refcount_table_clusters.get();
        let most = REFCOUNT_TABLE_BYTES_MAX >> cluster_bits.get();
        if u64::from(self.refcount_table_clusters) > most {
            return Err(HeaderError::Bounds {
                field: "refcount_table_clusters",
                value: self.refcount_table_clusters.into(),
                low: 1,
                high: most,
            });
        }
        self.refcount_table_offset =
            cluster_bits.aligned("refcount_table_offset", raw.refcount_table_offset.get())?;
        if self.refcount_table_clusters != 0 && self.refcount_table_offset == HostOffset::ZERO {
            return Err(HeaderError::Range {
                field: "refcount_table_offset",
                value: 0,
                allowed: "behind the header",
            });
        }
        self.nb_snapshots = raw.nb_snapshots.get();
        if self.nb_snapshots > SNAPSHOTS_MAX {
            return Err(HeaderError::Range {
                field: "nb_snapshots",
                value: self.nb_snapshots.into(),
                allowed: "0 to 65536",
            });
        }
        // Without snapshots the offset means nothing, but QEMU minds it all the same.
        self.snapshots_offset = cluster_bits.aligned("snapshots_offset", raw.snapshots_offset.get())?;
        if self.nb_snapshots != 0 && self.snapshots_offset == HostOffset::ZERO {
            return Err(HeaderError::Range {
                field: "snapshots_offset",
                value: 0,
                allowed: "behind the header",
            });
        }
        Ok(())
    }

    /// The bytes of the header, the extensions and the backing file's name, without padding. What is behind them in
    /// the first cluster should be zeros. An error if they do not fit into a cluster.
    pub fn to_bytes(&self) -> Result<Vec<u8>, HeaderError> {
        let header_length = self.header_length();
        let mut bytes = vec![0; size_of::<RawHeaderV2>()];
        if self.version == Version::V3 {
            let raw = RawHeaderV3 {
                incompatible_features: U64::new(self.incompatible.bits()),
                compatible_features: U64::new(self.compatible.bits()),
                autoclear_features: U64::new(self.autoclear.bits()),
                refcount_order: U32::new(self.refcount_order.get()),
                header_length: U32::new(header_length),
            };
            bytes.extend_from_slice(raw.as_bytes());
            if let Some(tail) = &self.tail {
                bytes.push((self.compression_type == CompressionType::Zstd).into());
                bytes.extend_from_slice(tail);
            }
        }
        extension::write_all(&self.extensions, &mut bytes)?;
        let name_at = bytes.len() as u64;
        let name_len = match &self.backing_name {
            None => 0,
            Some(name) => {
                bytes.extend_from_slice(name);
                u32::try_from(name.len()).unwrap_or(u32::MAX)
            }
        };
        if name_len > BACKING_NAME_MAX {
            return Err(HeaderError::Range {
                field: "backing_file_size",
                value: name_len.into(),
                allowed: "0 to 1023",
            });
        }
        if bytes.len() > self.cluster_bits.cluster_len() {
            return Err(HeaderError::Bounds {
                field: "length of the header with its extensions and the backing file's name",
                value: bytes.len() as u64,
                low: 0,
                high: self.cluster_bits.cluster_size(),
            });
        }
        let raw = RawHeaderV2 {
            magic: U32::new(MAGIC),
            version: U32::new(self.version.number()),
            backing_file_offset: U64::new(if self.backing_name.is_some() { name_at } else { 0 }),
            backing_file_size: U32::new(name_len),
            cluster_bits: U32::new(self.cluster_bits.get()),
            size: U64::new(self.size),
            crypt_method: U32::new(match self.crypt_method {
                CryptMethod::None => 0,
                CryptMethod::Aes => 1,
                CryptMethod::Luks => 2,
            }),
            l1_size: U32::new(self.l1_size),
            l1_table_offset: U64::new(self.l1_table_offset.get()),
            refcount_table_offset: U64::new(self.refcount_table_offset.get()),
            refcount_table_clusters: U32::new(self.refcount_table_clusters),
            nb_snapshots: U32::new(self.nb_snapshots),
            snapshots_offset: U64::new(self.snapshots_offset.get()),
        };
        if let Some(start) = bytes.get_mut(..size_of::<RawHeaderV2>()) {
            start.copy_from_slice(raw.as_bytes());
        }
        Ok(bytes)
    }

    /// Bytes of the header proper: 72 in version 2; at least 104, and normally 112, in version 3.
    pub fn header_length(&self) -> u32 {
        match (self.version, &self.tail) {
            (Version::V2, _) => V2_HEADER_LEN,
            (Version::V3, None) => V3_HEADER_MIN,
            (Version::V3, Some(tail)) => {
                let beyond = u32::try_from(tail.len()).unwrap_or(u32::MAX);
                V3_HEADER_MIN.saturating_add(1).saturating_add(beyond)
            }
        }
    }

    /// Bytes of the virtual disk: whole sectors, as QEMU has it.
    pub const fn virtual_size(&self) -> u64 {
        self.size & !(SECTOR.wrapping_sub(1))
    }

    /// How guest offsets fall on tables.
    pub fn geometry(&self) -> Geometry {
        Geometry::new(
            self.version,
            self.cluster_bits,
            self.extended_l2(),
            self.has_data_file(),
        )
    }

    /// Whether L2 entries have 16 bytes and describe 32 subclusters.
    pub const fn extended_l2(&self) -> bool {
        self.incompatible.has(Incompatible::EXTENDED_L2)
    }

    /// Whether data is in another file.
    pub const fn has_data_file(&self) -> bool {
        self.incompatible.has(Incompatible::DATA_FILE)
    }

    /// The name of the external data file, if the image has one and names it.
    pub fn data_file_name(&self) -> Option<String> {
        let named = self
            .extensions
            .iter()
            .rev()
            .find_map(|extension| match extension {
                Extension::DataFile(name) => Some(name),
                _ => None,
            })?;
        self.has_data_file()
            .then(|| String::from_utf8_lossy(named).into_owned())
    }

    /// The backing file's name and format. Of several formats the last counts, as it does in QEMU.
    pub fn backing(&self) -> Option<BackingName> {
        let name = self.backing_name.as_ref().filter(|name| !name.is_empty())?;
        let format = self
            .extensions
            .iter()
            .rev()
            .find_map(|extension| match extension {
                Extension::BackingFormat(format) => Some(String::from_utf8_lossy(format).into_owned()),
                _ => None,
            });
        Some(BackingName {
            name: String::from_utf8_lossy(name).into_owned(),
            format,
        })
    }

    /// Where the LUKS header is.
    pub fn encryption(&self) -> Option<EncryptionExtension> {
        self.extensions.iter().find_map(|extension| match extension {
            Extension::Encryption(at) => Some(*at),
            _ => None,
        })
    }

    /// Where the dirty bitmaps are, if there are some and they can be trusted.
    pub fn bitmaps(&self) -> Option<BitmapsExtension> {
        if !self.autoclear.has(Autoclear::BITMAPS) {
            return None;
        }
        self.extensions.iter().find_map(|extension| match extension {
            Extension::Bitmaps(at) => Some(*at),
            _ => None,
        })
    }
}

fn read_v2(bytes: &[u8]) -> Result<(RawHeaderV2, &[u8]), HeaderError> {
    let magic = U32::read_from_prefix(bytes).map_or(0, |(magic, _)| magic.get());
    if magic != MAGIC {
        return Err(HeaderError::Magic(magic));
    }
    RawHeaderV2::read_from_prefix(bytes).map_err(|_| HeaderError::Short {
        have: bytes.len() as u64,
        needed: V2_HEADER_LEN.into(),
    })
}

const _: () = assert!(size_of::<RawHeaderV2>() == V2_HEADER_LEN as usize);
const _: () = assert!(V3_HEADER_LEN == V3_HEADER_MIN + 8);

#[cfg(test)]
mod tests;
