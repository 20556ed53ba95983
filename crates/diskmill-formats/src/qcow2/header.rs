//! The header: bytes to [`Header`] and back. No I/O.

#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

mod error;
mod fields;

pub use error::HeaderError;
pub use fields::{
    Autoclear, ClusterBits, Compatible, CompressionType, CryptMethod, Incompatible, RefcountOrder, Version,
};

use diskmill_core::{BackingName, HostOffset, SECTOR};
use zerocopy::byteorder::big_endian::{U32, U64};
use zerocopy::{FromBytes, IntoBytes};

use super::extension::{self, BitmapsExtension, EncryptionExtension, Extension, FeatureKind};
use super::layout::{
    BACKING_NAME_MAX, COMPRESSION_TYPE_AT, L1_BYTES_MAX, MAGIC, REFCOUNT_TABLE_BYTES_MAX, RawHeaderV2,
    RawHeaderV3, V2_HEADER_LEN, V3_HEADER_LEN, V3_HEADER_MIN,
};
use super::map::Geometry;

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
    /// Snapshots in the image: at most 65536. More only in an image that needs repair.
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

    /// Where the backing file's name is, if there is one: behind the extensions.
    pub fn name_at(&self) -> u64 {
        let extensions = extension::len_of_all(&self.extensions);
        u64::from(self.header_length()).saturating_add(extensions)
    }

    /// Bytes of the header, the extensions and the backing file's name.
    pub fn total_len(&self) -> u64 {
        let name = self.backing_name.as_ref().map_or(0, Vec::len);
        self.name_at().saturating_add(name as u64)
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

    /// Says where the LUKS header is, which there is one.
    pub fn set_encryption_offset(&mut self, at: HostOffset) {
        for extension in &mut self.extensions {
            if let Extension::Encryption(place) = extension {
                place.offset = at;
            }
        }
    }

    /// Says where the dirty bitmaps are, or that there are none.
    pub fn set_bitmaps(&mut self, place: Option<BitmapsExtension>) {
        self.autoclear = self.autoclear.with(Autoclear::BITMAPS, place.is_some());
        let is_bitmaps = |extension: &Extension| matches!(extension, Extension::Bitmaps(_));
        let known = self.extensions.iter().position(is_bitmaps);
        self.extensions.retain(|extension| !is_bitmaps(extension));
        if let Some(place) = place {
            // In front of what this program does not know, as QEMU has it.
            let unknown = self
                .extensions
                .iter()
                .position(|extension| matches!(extension, Extension::Unknown { .. }));
            let at = known.or(unknown).unwrap_or(self.extensions.len());
            self.extensions
                .insert(at.min(self.extensions.len()), Extension::Bitmaps(place));
        }
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
