//! Bytes to header and back.

#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

use diskmill_core::{Error, ErrorKind, Format, HostOffset, SECTOR};
use zerocopy::byteorder::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, IntoBytes};

use super::layout::{
    BACKING_NAME_MAX, CRYPT_AES, CRYPT_NONE, HEADER_LEN, L1_BYTES_MAX, MAGIC, RawHeader, VERSION,
};
use super::map::Geometry;

/// Why a header cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HeaderError {
    /// Other bytes where the magic number should be.
    #[error("the magic number is {0:#010x}, must be 0x514649fb")]
    Magic(u32),
    /// Another version: that of another format.
    #[error("qcow (v1) does not support qcow version {0}")]
    Version(u32),
    /// The file ends within the header.
    #[error("the file has {0} bytes, must have at least 48")]
    TooShort(u64),
    /// A field that is out of its range.
    #[error("{field} is {value}, must be {allowed}")]
    Range {
        /// Which.
        field: &'static str,
        /// What it is.
        value: u64,
        /// What it may be.
        allowed: &'static str,
    },
    /// A disk that needs more tables than there can be.
    #[error("size is {size}, must be at most {most} with cluster_bits {cluster_bits} and l2_bits {l2_bits}")]
    TooLarge {
        /// Bytes of the disk.
        size: u64,
        /// Bytes it may have.
        most: u64,
        /// The header's field.
        cluster_bits: u8,
        /// The header's field.
        l2_bits: u8,
    },
    /// A structure that is not in the file.
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
    /// Two structures in one place.
    #[error("{what} at {at:#x} with {len} bytes overlaps {other}")]
    Overlap {
        /// What it is.
        what: &'static str,
        /// Where it starts.
        at: u64,
        /// Its length.
        len: u64,
        /// What it overlaps.
        other: &'static str,
    },
}

impl From<HeaderError> for Error {
    fn from(error: HeaderError) -> Self {
        let kind = match error {
            HeaderError::Magic(_) => ErrorKind::NotThisFormat,
            HeaderError::Version(_) | HeaderError::TooLarge { .. } => ErrorKind::Unsupported,
            HeaderError::Range {
                field: "crypt_method",
                ..
            } => ErrorKind::Unsupported,
            _ => ErrorKind::Malformed,
        };
        Error::new(kind, error).format(Format::Qcow)
    }
}

/// How guest data is encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CryptMethod {
    /// Not at all.
    None,
    /// AES-128 in CBC mode, by sectors; the password is the key.
    Aes,
}

/// A header that can be used: sizes and places agree with one another and with the length of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Header {
    /// Where the name of the backing file is, and its bytes: 1 to 1023.
    pub backing: Option<(HostOffset, u32)>,
    /// As found.
    pub mtime: u32,
    /// Bytes of the disk, as the header has them: at least 2. See [`virtual_size`](Self::virtual_size).
    pub size: u64,
    /// How many bytes clusters have, and how many entries tables.
    pub geometry: Geometry,
    /// As found.
    pub padding: u16,
    /// How guest data is encrypted.
    pub crypt: CryptMethod,
    /// Where the L1 table is, at any alignment.
    pub l1_table_offset: HostOffset,
}

fn overlaps(a: (u64, u64), b: (u64, u64)) -> bool {
    a.0 < b.0.saturating_add(b.1) && b.0 < a.0.saturating_add(a.1)
}

impl Header {
    /// A header of a disk of `size` bytes without tables.
    pub fn new(size: u64, geometry: Geometry) -> Self {
        Self {
            backing: None,
            mtime: 0,
            size,
            geometry,
            padding: 0,
            crypt: CryptMethod::None,
            l1_table_offset: HostOffset::new(HEADER_LEN),
        }
    }

    /// Understands the header at the start of `head`, the first bytes of a file of `file_len` bytes.
    pub fn parse(head: &[u8], file_len: u64) -> Result<Self, HeaderError> {
        let Ok((words, _)) = <[U32; 2]>::ref_from_prefix(head) else {
            return Err(HeaderError::TooShort(file_len));
        };
        match words.map(U32::get) {
            [MAGIC, VERSION] => {}
            [MAGIC, version] => return Err(HeaderError::Version(version)),
            [magic, _] => return Err(HeaderError::Magic(magic)),
        }
        let Ok((raw, _)) = RawHeader::ref_from_prefix(head) else {
            return Err(HeaderError::TooShort(file_len));
        };
        let size = raw.size.get();
        if size < 2 {
            return Err(range("size", size, "at least 2"));
        }
        let geometry = Geometry::new(raw.cluster_bits, raw.l2_bits)?;
        let crypt = match raw.crypt_method.get() {
            CRYPT_NONE => CryptMethod::None,
            CRYPT_AES => CryptMethod::Aes,
            value => return Err(range("crypt_method", value.into(), "0 (none) or 1 (AES)")),
        };
        check_size(size, geometry)?;
        let backing = match (raw.backing_file_offset.get(), raw.backing_file_size.get()) {
            (0, _) | (_, 0) => None,
            (_, len) if len > BACKING_NAME_MAX => {
                return Err(range("backing_file_size", len.into(), "at most 1023"));
            }
            (at, len) => Some((HostOffset::new(at), len)),
        };
        let header = Self {
            backing,
            mtime: raw.mtime.get(),
            size,
            geometry,
            padding: raw.padding.get(),
            crypt,
            l1_table_offset: HostOffset::new(raw.l1_table_offset.get()),
        };
        header.check_places(file_len)?;
        Ok(header)
    }

    /// Fails unless tables and name are in the file, each in a place of its own.
    fn check_places(&self, file_len: u64) -> Result<(), HeaderError> {
        let l1 = (self.l1_table_offset.get(), self.l1_len());
        let name = self.backing.map(|(at, len)| (at.get(), u64::from(len)));
        let named = name.map(|name| ("the name of the backing file", name));
        for (what, (at, len)) in [Some(("the L1 table", l1)), named].into_iter().flatten() {
            if at > i64::MAX.unsigned_abs() {
                let field = if what == "the L1 table" {
                    "l1_table_offset"
                } else {
                    "backing_file_offset"
                };
                return Err(range(field, at, "below 2^63"));
            }
            if at.checked_add(len).is_none_or(|end| end > file_len) {
                return Err(HeaderError::PastEnd {
                    what,
                    at,
                    len,
                    file_len,
                });
            }
            let other = match name {
                _ if overlaps((0, HEADER_LEN), (at, len)) => "the header",
                Some(name) if what == "the L1 table" && overlaps(name, (at, len)) => {
                    "the name of the backing file"
                }
                _ => continue,
            };
            return Err(HeaderError::Overlap { what, at, len, other });
        }
        Ok(())
    }

    /// The header as it is in the file.
    pub fn to_bytes(&self) -> [u8; 48] {
        let (name_at, name_len) = self.backing.unwrap_or((HostOffset::ZERO, 0));
        let raw = RawHeader {
            magic: U32::new(MAGIC),
            version: U32::new(VERSION),
            backing_file_offset: U64::new(name_at.get()),
            backing_file_size: U32::new(name_len),
            mtime: U32::new(self.mtime),
            size: U64::new(self.size),
            cluster_bits: self.geometry.cluster_bits(),
            l2_bits: self.geometry.l2_bits(),
            padding: U16::new(self.padding),
            crypt_method: U32::new(match self.crypt {
                CryptMethod::None => CRYPT_NONE,
                CryptMethod::Aes => CRYPT_AES,
            }),
            l1_table_offset: U64::new(self.l1_table_offset.get()),
        };
        let mut bytes = [0; 48];
        // They have the same length.
        let _ = raw.write_to(&mut bytes);
        bytes
    }

    /// Bytes of the disk: whole sectors.
    pub const fn virtual_size(&self) -> u64 {
        self.size & !(SECTOR.saturating_sub(1))
    }

    /// Entries of the L1 table.
    pub fn l1_entries(&self) -> u64 {
        self.geometry.l1_entries(self.size)
    }

    /// Bytes of the L1 table.
    pub fn l1_len(&self) -> u64 {
        // Checked: at most `L1_BYTES_MAX`.
        self.l1_entries().saturating_mul(8)
    }
}

fn range(field: &'static str, value: u64, allowed: &'static str) -> HeaderError {
    HeaderError::Range {
        field,
        value,
        allowed,
    }
}

/// Fails if a disk of `size` bytes needs a longer L1 table than there can be.
pub fn check_size(size: u64, geometry: Geometry) -> Result<(), HeaderError> {
    let most = geometry.largest_disk();
    if size > most {
        return Err(HeaderError::TooLarge {
            size,
            most,
            cluster_bits: geometry.cluster_bits(),
            l2_bits: geometry.l2_bits(),
        });
    }
    Ok(())
}

/// Entries of the longest L1 table.
pub const L1_ENTRIES_MAX: u64 = L1_BYTES_MAX / 8;

#[cfg(test)]
mod tests;
