//! Bytes to header and back.

use diskmill_core::{Error, ErrorKind, Format, SECTOR};
use zerocopy::byteorder::big_endian::U32;
use zerocopy::{FromBytes, IntoBytes};

use super::layout::{
    LEN_32, LEN_64, MAGIC, MAGIC_SWAPPED, NAME_LEN, RawEnd32, RawEnd64, RawStart, SECTOR_SIZE, SIZE_MAX,
    VERSION,
};
use super::map::Geometry;

/// Why a header cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HeaderError {
    /// Other bytes where the magic number should be.
    #[error("the magic number is {0:#010x}, must be 0x4f4f4f4d")]
    Magic(u32),
    /// The magic number of a little-endian machine: only User-Mode Linux wrote that.
    #[error(
        "the magic number is byte-swapped: this is version 1 of User-Mode Linux in little-endian order; only version 2, \
         which QEMU wrote, is supported"
    )]
    Swapped,
    /// The file ends within the header.
    #[error("truncated header: the file has {0} bytes, must have at least {LEN_64}")]
    TooShort(u64),
    /// Another version.
    #[error("version is {version}{note}, must be 2", note = note(*version))]
    Version {
        /// What it is.
        version: u32,
    },
    /// The name of the backing file has no end.
    #[error("backing_file has no NUL in its {NAME_LEN} bytes")]
    Name,
    /// A size that no disk can have.
    #[error("size is {0}, must be 512 to {SIZE_MAX}")]
    Size(u64),
    /// Sectors of another size, or a layout nobody knows.
    #[error("sectorsize is {0}, must be 512")]
    SectorSize(u32),
}

/// Who wrote a version.
fn note(version: u32) -> &'static str {
    match version {
        1 => " (User-Mode Linux, big-endian)",
        3 => " (User-Mode Linux)",
        _ => "",
    }
}

impl From<HeaderError> for Error {
    fn from(error: HeaderError) -> Self {
        let kind = match error {
            HeaderError::Magic(_) => ErrorKind::NotThisFormat,
            HeaderError::Swapped | HeaderError::Version { .. } | HeaderError::SectorSize(_) => {
                ErrorKind::Unsupported
            }
            _ => ErrorKind::Malformed,
        };
        Error::new(kind, error).format(Format::Cow)
    }
}

/// Where the compiler of the program that made the image put its fields.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// As on 64-bit machines: what new images get.
    Bits64,
    /// As on 32-bit machines.
    Bits32,
}

impl Layout {
    /// Bytes of the header; the bitmap follows.
    pub const fn header_len(self) -> u64 {
        match self {
            Self::Bits64 => LEN_64 as u64,
            Self::Bits32 => LEN_32 as u64,
        }
    }

    /// Where the size of the disk is.
    pub const fn size_at(self) -> u64 {
        match self {
            Self::Bits64 => 1040,
            Self::Bits32 => 1036,
        }
    }

    /// What to call it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Bits64 => "64-bit",
            Self::Bits32 => "32-bit",
        }
    }
}

/// A header that can be used.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Header {
    /// Where its fields are.
    pub layout: Layout,
    /// The name of the backing file, if there is one: 1 to 1023 bytes without a NUL.
    pub backing: Option<Vec<u8>>,
    /// When that had last been changed, as the header has it.
    pub mtime: u32,
    /// Bytes of the disk, as the header has them: 512 to [`SIZE_MAX`]. See [`virtual_size`](Self::virtual_size).
    pub size: u64,
}

impl Header {
    /// A header of a new image.
    pub fn new(size: u64, backing: Option<Vec<u8>>) -> Self {
        Self {
            layout: Layout::Bits64,
            backing,
            mtime: 0,
            size,
        }
    }

    /// Understands the header at the start of `head`, the first [`LEN_64`] bytes of a file of `file_len` bytes.
    ///
    /// The layout is told by where the sector size is. If it seems to be in both places, it is the 64-bit one, unless
    /// the padding of that one is not empty.
    pub fn parse(head: &[u8], file_len: u64) -> Result<Self, HeaderError> {
        let magic = head.get(..4).and_then(|bytes| <[u8; 4]>::try_from(bytes).ok());
        let Some(magic) = magic else {
            return Err(HeaderError::TooShort(file_len));
        };
        if magic == MAGIC_SWAPPED {
            return Err(HeaderError::Swapped);
        }
        if magic != MAGIC {
            return Err(HeaderError::Magic(u32::from_be_bytes(magic)));
        }
        if let Some((version, _)) = head.get(4..).and_then(|rest| U32::read_from_prefix(rest).ok())
            && version.get() != VERSION
        {
            let version = version.get();
            return Err(HeaderError::Version { version });
        }
        let Ok((start, rest)) = RawStart::ref_from_prefix(head) else {
            return Err(HeaderError::TooShort(file_len));
        };
        let (layout, size) = end(rest, file_len)?;
        let name = match start.backing_file.iter().position(|byte| *byte == 0) {
            Some(len) => start.backing_file.get(..len).unwrap_or_default(),
            None => return Err(HeaderError::Name),
        };
        Ok(Self {
            layout,
            backing: (!name.is_empty()).then(|| name.to_vec()),
            mtime: start.mtime.get(),
            size,
        })
    }

    /// The header, [`Layout::header_len`] bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        let start = RawStart {
            magic: MAGIC,
            version: U32::new(VERSION),
            backing_file: name_field(self.backing.as_deref()),
            mtime: U32::new(self.mtime),
        };
        let mut bytes = start.as_bytes().to_vec();
        let sectorsize = U32::new(SECTOR_SIZE);
        let size = self.size.into();
        match self.layout {
            Layout::Bits64 => bytes.extend_from_slice(
                RawEnd64 {
                    hole: U32::new(0),
                    size,
                    sectorsize,
                    tail: U32::new(0),
                }
                .as_bytes(),
            ),
            Layout::Bits32 => bytes.extend_from_slice(RawEnd32 { size, sectorsize }.as_bytes()),
        }
        bytes
    }

    /// Bytes of the disk: whole sectors. A part of one at the end does not count, as QEMU had it.
    pub fn virtual_size(&self) -> u64 {
        self.size - self.size % SECTOR
    }

    /// Where bitmap and data are.
    pub fn geometry(&self) -> Geometry {
        Geometry::new(self.layout, self.virtual_size())
    }
}

/// The field with the name of the backing file, which is cut at 1023 bytes.
pub(super) fn name_field(name: Option<&[u8]>) -> [u8; NAME_LEN] {
    let mut field = [0; NAME_LEN];
    let name = name.unwrap_or_default();
    for (byte, letter) in field.iter_mut().take(NAME_LEN - 1).zip(name) {
        *byte = *letter;
    }
    field
}

fn plausible(size: u64) -> bool {
    (SECTOR..=SIZE_MAX).contains(&size)
}

/// Layout and size.
fn end(rest: &[u8], file_len: u64) -> Result<(Layout, u64), HeaderError> {
    let long = RawEnd64::ref_from_prefix(rest).ok().map(|(end, _)| end);
    let Ok((short, _)) = RawEnd32::ref_from_prefix(rest) else {
        return Err(HeaderError::TooShort(file_len));
    };
    let is_512 = |sectorsize: U32| sectorsize.get() == SECTOR_SIZE;
    let as_64 = long.filter(|end| is_512(end.sectorsize));
    let as_32 = is_512(short.sectorsize).then_some(short);
    let fits_32 = as_32.filter(|end| plausible(end.size.get()));
    match (as_64, fits_32) {
        (Some(end), Some(short)) if end.hole.get() != 0 => Ok((Layout::Bits32, short.size.get())),
        (Some(end), _) if plausible(end.size.get()) => Ok((Layout::Bits64, end.size.get())),
        (_, Some(short)) => Ok((Layout::Bits32, short.size.get())),
        (Some(end), None) => Err(HeaderError::Size(end.size.get())),
        (None, None) => match (as_32, long) {
            (Some(short), _) => Err(HeaderError::Size(short.size.get())),
            (None, Some(end)) => Err(HeaderError::SectorSize(end.sectorsize.get())),
            (None, None) => Err(HeaderError::TooShort(file_len)),
        },
    }
}

#[cfg(test)]
mod tests;
