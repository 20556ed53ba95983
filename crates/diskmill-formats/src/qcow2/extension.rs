//! Header extensions: the list between the header and the backing file's name.

#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

use diskmill_core::HostOffset;
use zerocopy::byteorder::big_endian::{U32, U64};
use zerocopy::{FromBytes, IntoBytes};

use super::header::{ClusterBits, HeaderError};
use super::layout::{
    BACKING_FORMAT_MAX, BITMAP_ENTRY_MAX, BITMAPS_MAX, EXT_BACKING_FORMAT, EXT_BITMAPS, EXT_DATA_FILE,
    EXT_ENCRYPTION, EXT_END, EXT_FEATURE_NAMES, RawBitmapsExtension, RawEncryptionExtension, RawExtension,
    RawFeatureName,
};

/// Where the directory of dirty bitmaps is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BitmapsExtension {
    /// Bitmaps in it: 1 to 65535.
    pub nb_bitmaps: u32,
    /// Bytes of it: at least 1, at most 65535 * 1024.
    pub directory_size: u64,
    /// Where it is: a multiple of the cluster size.
    pub directory_offset: HostOffset,
}

/// Where the LUKS header is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EncryptionExtension {
    /// Its first byte: a multiple of the cluster size.
    pub offset: HostOffset,
    /// Bytes of it.
    pub length: u64,
}

/// Which set of feature bits a name is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FeatureKind {
    /// A reader must know it.
    Incompatible,
    /// A reader need not know it.
    Compatible,
    /// A writer that does not know it must clear it.
    Autoclear,
    /// Something this program has not heard of.
    Other(u8),
}

impl FeatureKind {
    const fn from_byte(byte: u8) -> Self {
        match byte {
            0 => Self::Incompatible,
            1 => Self::Compatible,
            2 => Self::Autoclear,
            other => Self::Other(other),
        }
    }

    const fn to_byte(self) -> u8 {
        match self {
            Self::Incompatible => 0,
            Self::Compatible => 1,
            Self::Autoclear => 2,
            Self::Other(other) => other,
        }
    }
}

/// The name of a feature bit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FeatureName {
    /// Which set it is in.
    pub kind: FeatureKind,
    /// Which bit of the set.
    pub bit: u8,
    /// The name, in the 46 bytes of the record, NUL padding included.
    pub name: [u8; 46],
}

impl FeatureName {
    /// A record for `name`, which is cut after 46 bytes.
    pub fn new(kind: FeatureKind, bit: u8, name: &str) -> Self {
        let mut bytes = [0; 46];
        for (to, from) in bytes.iter_mut().zip(name.bytes()) {
            *to = from;
        }
        Self {
            kind,
            bit,
            name: bytes,
        }
    }

    /// The name as text, without padding; what is no UTF-8 is replaced.
    pub fn text(&self) -> String {
        let name = self.name.split(|byte| *byte == 0).next().unwrap_or_default();
        String::from_utf8_lossy(name).into_owned()
    }
}

/// One header extension.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Extension {
    /// The format of the backing file.
    BackingFormat(Vec<u8>),
    /// The name of the external data file.
    DataFile(Vec<u8>),
    /// Where the LUKS header is.
    Encryption(EncryptionExtension),
    /// Names of feature bits, and bytes behind the last whole record.
    FeatureNames(Vec<FeatureName>, Vec<u8>),
    /// Where the dirty bitmaps are.
    Bitmaps(BitmapsExtension),
    /// One this program does not know; kept as it is.
    Unknown {
        /// Its type.
        kind: u32,
        /// Its data.
        data: Vec<u8>,
    },
}

impl Extension {
    /// Its type number.
    pub const fn kind(&self) -> u32 {
        match self {
            Self::BackingFormat(_) => EXT_BACKING_FORMAT,
            Self::DataFile(_) => EXT_DATA_FILE,
            Self::Encryption(_) => EXT_ENCRYPTION,
            Self::FeatureNames(..) => EXT_FEATURE_NAMES,
            Self::Bitmaps(_) => EXT_BITMAPS,
            Self::Unknown { kind, .. } => *kind,
        }
    }

    fn data(&self) -> Vec<u8> {
        match self {
            Self::BackingFormat(name) | Self::DataFile(name) => name.clone(),
            Self::Encryption(at) => RawEncryptionExtension {
                offset: U64::new(at.offset.get()),
                length: U64::new(at.length),
            }
            .as_bytes()
            .to_vec(),
            Self::FeatureNames(names, rest) => {
                let mut data = Vec::new();
                for name in names {
                    let record = RawFeatureName {
                        kind: name.kind.to_byte(),
                        bit: name.bit,
                        name: name.name,
                    };
                    data.extend_from_slice(record.as_bytes());
                }
                data.extend_from_slice(rest);
                data
            }
            Self::Bitmaps(at) => RawBitmapsExtension {
                nb_bitmaps: U32::new(at.nb_bitmaps),
                reserved: U32::new(0),
                directory_size: U64::new(at.directory_size),
                directory_offset: U64::new(at.directory_offset.get()),
            }
            .as_bytes()
            .to_vec(),
            Self::Unknown { data, .. } => data.clone(),
        }
    }

    fn parse(kind: u32, data: &[u8], cluster_bits: ClusterBits) -> Result<Self, HeaderError> {
        Ok(match kind {
            EXT_BACKING_FORMAT if data.len() as u64 > BACKING_FORMAT_MAX.into() => {
                return Err(HeaderError::Bounds {
                    field: "length of the backing format",
                    value: data.len() as u64,
                    low: 0,
                    high: BACKING_FORMAT_MAX.into(),
                });
            }
            EXT_BACKING_FORMAT => Self::BackingFormat(data.to_vec()),
            EXT_DATA_FILE => Self::DataFile(data.to_vec()),
            EXT_ENCRYPTION => Self::Encryption(parse_encryption(data, cluster_bits)?),
            EXT_FEATURE_NAMES => {
                let (records, rest) = data.as_chunks::<{ size_of::<RawFeatureName>() }>();
                let names = records
                    .iter()
                    .filter_map(|record| RawFeatureName::read_from_bytes(record).ok())
                    .map(|record| FeatureName {
                        kind: FeatureKind::from_byte(record.kind),
                        bit: record.bit,
                        name: record.name,
                    })
                    .collect();
                Self::FeatureNames(names, rest.to_vec())
            }
            EXT_BITMAPS => Self::Bitmaps(parse_bitmaps(data, cluster_bits)?),
            kind => Self::Unknown {
                kind,
                data: data.to_vec(),
            },
        })
    }
}

fn parse_encryption(data: &[u8], cluster_bits: ClusterBits) -> Result<EncryptionExtension, HeaderError> {
    let raw = RawEncryptionExtension::read_from_bytes(data).map_err(|_| HeaderError::ExtensionLen {
        name: "encryption",
        len: data.len() as u64,
        allowed: 16,
    })?;
    let offset = cluster_bits.aligned("offset of the encryption header", raw.offset.get())?;
    let length = raw.length.get();
    if length == 0
        || offset
            .checked_add(length)
            .is_none_or(|end| end.get() > i64::MAX as u64)
    {
        return Err(HeaderError::Range {
            field: "length of the encryption header",
            value: length,
            allowed: "at least 1, ending below 2^63",
        });
    }
    Ok(EncryptionExtension { offset, length })
}

fn parse_bitmaps(data: &[u8], cluster_bits: ClusterBits) -> Result<BitmapsExtension, HeaderError> {
    let raw = RawBitmapsExtension::read_from_bytes(data).map_err(|_| HeaderError::ExtensionLen {
        name: "bitmaps",
        len: data.len() as u64,
        allowed: 24,
    })?;
    let nb_bitmaps = raw.nb_bitmaps.get();
    if !(1..=BITMAPS_MAX).contains(&nb_bitmaps) {
        return Err(HeaderError::Range {
            field: "nb_bitmaps",
            value: nb_bitmaps.into(),
            allowed: "1 to 65535",
        });
    }
    if raw.reserved.get() != 0 {
        return Err(HeaderError::Range {
            field: "reserved field of the bitmaps extension",
            value: raw.reserved.get().into(),
            allowed: "0",
        });
    }
    let directory_size = raw.directory_size.get();
    let most = u64::from(BITMAPS_MAX).saturating_mul(BITMAP_ENTRY_MAX);
    if !(1..=most).contains(&directory_size) {
        return Err(HeaderError::Range {
            field: "bitmap_directory_size",
            value: directory_size,
            allowed: "1 to 67107840 bytes",
        });
    }
    let directory_offset = cluster_bits.aligned("bitmap_directory_offset", raw.directory_offset.get())?;
    Ok(BitmapsExtension {
        nb_bitmaps,
        directory_size,
        directory_offset,
    })
}

/// Reads the list in `area`, which ends where the backing file's name or the header cluster does.
pub(super) fn parse_all(area: &[u8], cluster_bits: ClusterBits) -> Result<Vec<Extension>, HeaderError> {
    let mut extensions = Vec::new();
    let mut rest = area;
    while let Ok((head, after)) = RawExtension::read_from_prefix(rest) {
        let kind = head.kind.get();
        if kind == EXT_END {
            break;
        }
        let len = head.len.get();
        let taken = usize::try_from(len)
            .ok()
            .and_then(|len| after.split_at_checked(len));
        let Some((data, after)) = taken else {
            return Err(HeaderError::ExtensionTooLong {
                kind,
                len,
                room: after.len() as u64,
            });
        };
        extensions.push(Extension::parse(kind, data, cluster_bits)?);
        // The padding of the last one may be cut off by the end of the area.
        let padding = data.len().wrapping_neg() & 7;
        rest = after.get(padding..).unwrap_or_default();
    }
    Ok(extensions)
}

/// Appends the list and its end mark to `bytes`.
pub(super) fn write_all(extensions: &[Extension], bytes: &mut Vec<u8>) -> Result<(), HeaderError> {
    for extension in extensions {
        let data = extension.data();
        let len = u32::try_from(data.len()).map_err(|_| HeaderError::Range {
            field: "length of a header extension",
            value: data.len() as u64,
            allowed: "below 2^32 bytes",
        })?;
        append(extension.kind(), len, &data, bytes);
    }
    append(EXT_END, 0, &[], bytes);
    Ok(())
}

/// Bytes of the list with its end mark.
pub(super) fn len_of_all(extensions: &[Extension]) -> u64 {
    let head = size_of::<RawExtension>() as u64;
    extensions
        .iter()
        .map(|extension| head.saturating_add((extension.data().len() as u64).next_multiple_of(8)))
        .fold(head, u64::saturating_add)
}

fn append(kind: u32, len: u32, data: &[u8], bytes: &mut Vec<u8>) {
    let head = RawExtension {
        kind: U32::new(kind),
        len: U32::new(len),
    };
    bytes.extend_from_slice(head.as_bytes());
    bytes.extend_from_slice(data);
    let padding = data.len().wrapping_neg() & 7;
    bytes.resize(bytes.len().saturating_add(padding), 0);
}
