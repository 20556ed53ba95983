//! Bytes to header and back.

use diskmill_core::{Error, ErrorKind, Format, SECTOR};
use zerocopy::byteorder::little_endian::U32;
use zerocopy::{FromBytes, IntoBytes};

use super::layout::{
    BLOCK, BLOCKS_MAX, DIFF, DYNAMIC, FIXED, FLAGS, HEADER_SIZE, HEADER_SIZE_LCHS, PREAMBLE,
    RAW_HEADER_0_LEN, RAW_HEADER_LEN, RawHeader, RawHeader0, SIGNATURE, SIGNATURE_AT, UNDO, VERSION_0,
    VERSION_1_1,
};
use super::uuid::Uuid;

/// Why a header cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HeaderError {
    /// Other bytes where the signature should be.
    #[error("the signature is {0:#010x}, must be 0xbeda107f")]
    Signature(u32),
    /// The file ends within the header.
    #[error("the file has {0} bytes, must have at least {1}")]
    TooShort(u64, u64),
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
    /// A place that would overlap what is in front of it.
    #[error("{field} is {value:#x}, must be at least {least:#x}")]
    TooLow {
        /// Which.
        field: &'static str,
        /// What it is.
        value: u64,
        /// Where what is in front of it ends.
        least: u64,
    },
    /// A map that does not describe all of the disk.
    #[error("blocks is {blocks}, must be at least {needed} for a disk of {size} bytes")]
    Blocks {
        /// Entries of the map.
        blocks: u64,
        /// Entries the disk needs.
        needed: u64,
        /// Bytes of the disk.
        size: u64,
    },
    /// The file ends within the block map.
    #[error("the block map of {blocks} entries at {at:#x} runs past the end of the file at {file_len:#x}")]
    MapCut {
        /// Entries of the map.
        blocks: u64,
        /// Where it starts.
        at: u64,
        /// Bytes of the file.
        file_len: u64,
    },
    /// A differencing image that does not say whose.
    #[error("uuid_link is zero, must name the parent of an image of type {0}")]
    NoParent(u32),
    /// An image of its own that names a parent.
    #[error("uuid_link is {uuid}, must be zero for an image of type {image_type}")]
    Parent {
        /// The parent.
        uuid: String,
        /// The image's type.
        image_type: u32,
    },
}

impl From<HeaderError> for Error {
    fn from(error: HeaderError) -> Self {
        let kind = match error {
            HeaderError::Signature(_) => ErrorKind::NotThisFormat,
            HeaderError::Range {
                field: "version" | "block_size" | "block_extra" | "sector_size" | "flags",
                ..
            } => ErrorKind::Unsupported,
            _ => ErrorKind::Malformed,
        };
        Error::new(kind, error).format(Format::Vdi)
    }
}

/// What the blocks of an image are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageType {
    /// Added as they are needed.
    Dynamic,
    /// All there from the start.
    Fixed,
    /// What differs from a parent; `undo` is an old way to say the same.
    Diff {
        /// Whether the header says 3 instead of 4.
        undo: bool,
    },
}

impl ImageType {
    fn parse(value: u32) -> Result<Self, HeaderError> {
        match value {
            DYNAMIC => Ok(Self::Dynamic),
            FIXED => Ok(Self::Fixed),
            UNDO => Ok(Self::Diff { undo: true }),
            DIFF => Ok(Self::Diff { undo: false }),
            value => Err(range("image_type", value, "1 to 4")),
        }
    }

    pub(super) const fn number(self) -> u32 {
        match self {
            Self::Dynamic => DYNAMIC,
            Self::Fixed => FIXED,
            Self::Diff { undo: true } => UNDO,
            Self::Diff { undo: false } => DIFF,
        }
    }

    /// What to call it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Dynamic => "dynamic",
            Self::Fixed => "fixed",
            Self::Diff { .. } => "differencing",
        }
    }
}

/// Cylinders, heads and sectors.
pub type Geometry = [u32; 3];

/// A header that can be used: sizes and places agree with one another.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Header {
    /// Major version in the upper half; [`VERSION_0`] is read only.
    pub version: u32,
    /// Who made it: 64 bytes of text.
    pub text: [u8; 64],
    /// `header_size`: at least 384. 0 with [`VERSION_0`].
    pub header_size: u32,
    /// What its blocks are.
    pub image_type: ImageType,
    /// As found.
    pub flags: u32,
    /// As found.
    pub comment: [u8; 256],
    /// Where the block map is, in bytes: a multiple of 512 but in [`VERSION_0`].
    pub blocks_offset: u32,
    /// Where slot 0 is, in bytes: behind the map, a multiple of 512 but in [`VERSION_0`].
    pub data_offset: u32,
    /// Physical geometry.
    pub geometry: Geometry,
    /// Logical geometry, if there is room for it.
    pub logical_geometry: Option<Geometry>,
    /// Bytes of the disk, as the header has them. See [`virtual_size`](Self::virtual_size).
    pub disk_size: u64,
    /// Blocks of the disk: entries of the map.
    pub blocks: u32,
    /// Blocks that have a slot, if the header is right.
    pub blocks_allocated: u32,
    /// Of this image.
    pub uuid_create: Uuid,
    /// Of its present content.
    pub uuid_modify: Uuid,
    /// `uuid_create` of the parent.
    pub uuid_link: Uuid,
    /// `uuid_modify` the parent had.
    pub uuid_parent_modify: Uuid,
}

fn range(field: &'static str, value: impl Into<u64>, allowed: &'static str) -> HeaderError {
    let value = value.into();
    HeaderError::Range {
        field,
        value,
        allowed,
    }
}

/// Bytes at the start of a file that [`Header::parse`] wants to see.
pub const HEAD_LEN: usize = 512;

impl Header {
    /// Understands the header at the start of `head`, the first bytes of a file of `file_len` bytes.
    pub fn parse(head: &[u8], file_len: u64) -> Result<Self, HeaderError> {
        let signature = head
            .get(SIGNATURE_AT..)
            .and_then(|rest| <[U32; 2]>::read_from_prefix(rest).ok());
        let Some(([signature, version], _)) = signature else {
            return Err(HeaderError::TooShort(file_len, RAW_HEADER_0_LEN as u64));
        };
        if signature.get() != SIGNATURE {
            return Err(HeaderError::Signature(signature.get()));
        }
        let header = match version.get() {
            VERSION_0 => Self::parse_0(head, file_len)?,
            1.. if version.get() >> 16 == 1 => Self::parse_1(head, file_len)?,
            version => return Err(range("version", version, "0x00010001 (1.1) or 0x00000002")),
        };
        header.check(file_len)?;
        Ok(header)
    }

    fn parse_1(head: &[u8], file_len: u64) -> Result<Self, HeaderError> {
        let Ok((raw, _)) = RawHeader::ref_from_prefix(head) else {
            return Err(HeaderError::TooShort(file_len, RAW_HEADER_LEN as u64));
        };
        let header_size = raw.header_size.get();
        if header_size < HEADER_SIZE {
            return Err(range("header_size", header_size, "at least 384"));
        }
        check_block(raw.block_size.get(), raw.block_extra.get(), raw.sector_size.get())?;
        let least = u64::from(header_size) + u64::from(PREAMBLE);
        let (blocks_offset, data_offset) = (raw.blocks_offset.get(), raw.data_offset.get());
        for (field, value) in [("blocks_offset", blocks_offset), ("data_offset", data_offset)] {
            if u64::from(value) % SECTOR != 0 {
                return Err(range(field, value, "a multiple of 512"));
            }
        }
        if u64::from(blocks_offset) < least {
            let value = blocks_offset.into();
            return Err(HeaderError::TooLow {
                field: "blocks_offset",
                value,
                least,
            });
        }
        let map_end = u64::from(blocks_offset) + u64::from(raw.blocks.get()) * 4;
        if u64::from(data_offset) < map_end {
            return Err(HeaderError::TooLow {
                field: "data_offset",
                value: data_offset.into(),
                least: map_end,
            });
        }
        let logical = raw.lchs.map(U32::get);
        let logical_geometry = match logical {
            [cylinders, heads, sectors, _] if header_size >= HEADER_SIZE_LCHS => {
                Some([cylinders, heads, sectors])
            }
            _ => None,
        };
        Ok(Self {
            version: raw.version.get(),
            text: raw.text,
            header_size,
            image_type: ImageType::parse(raw.image_type.get())?,
            flags: raw.flags.get(),
            comment: raw.comment,
            blocks_offset,
            data_offset,
            geometry: [raw.cylinders.get(), raw.heads.get(), raw.sectors.get()],
            logical_geometry,
            disk_size: raw.disk_size.get(),
            blocks: raw.blocks.get(),
            blocks_allocated: raw.blocks_allocated.get(),
            uuid_create: Uuid(raw.uuid_create),
            uuid_modify: Uuid(raw.uuid_modify),
            uuid_link: Uuid(raw.uuid_link),
            uuid_parent_modify: Uuid(raw.uuid_parent_modify),
        })
    }

    fn parse_0(head: &[u8], file_len: u64) -> Result<Self, HeaderError> {
        let Ok((raw, _)) = RawHeader0::ref_from_prefix(head) else {
            return Err(HeaderError::TooShort(file_len, RAW_HEADER_0_LEN as u64));
        };
        let [cylinders, heads, sectors, sector_size] = raw.geometry.map(U32::get);
        check_block(raw.block_size.get(), 0, sector_size)?;
        let blocks = raw.blocks.get();
        let blocks_offset = RAW_HEADER_0_LEN as u64;
        let data_offset = u32::try_from(blocks_offset + u64::from(blocks) * 4)
            .map_err(|_| range("blocks", blocks, "at most 536870784"))?;
        Ok(Self {
            version: VERSION_0,
            text: raw.text,
            header_size: 0,
            image_type: ImageType::parse(raw.image_type.get())?,
            flags: raw.flags.get(),
            comment: raw.comment,
            blocks_offset: u32::try_from(blocks_offset).unwrap_or(0),
            data_offset,
            geometry: [cylinders, heads, sectors],
            logical_geometry: None,
            disk_size: raw.disk_size.get(),
            blocks,
            blocks_allocated: raw.blocks_allocated.get(),
            uuid_create: Uuid(raw.uuid_create),
            uuid_modify: Uuid(raw.uuid_modify),
            uuid_link: Uuid(raw.uuid_link),
            uuid_parent_modify: Uuid::NIL,
        })
    }

    /// What holds for all versions.
    fn check(&self, file_len: u64) -> Result<(), HeaderError> {
        if self.flags & !FLAGS != 0 {
            return Err(range("flags", self.flags, "0, 1, 256 or 257"));
        }
        if self.blocks > BLOCKS_MAX {
            return Err(range("blocks", self.blocks, "at most 536870784"));
        }
        let needed = self.disk_size.div_ceil(BLOCK);
        if u64::from(self.blocks) < needed {
            return Err(HeaderError::Blocks {
                blocks: self.blocks.into(),
                needed,
                size: self.disk_size,
            });
        }
        let end = u64::from(self.blocks_offset) + self.map_len();
        if end > file_len {
            return Err(HeaderError::MapCut {
                blocks: self.blocks.into(),
                at: self.blocks_offset.into(),
                file_len,
            });
        }
        match (self.is_diff(), self.uuid_link.is_nil()) {
            (true, true) => Err(HeaderError::NoParent(self.image_type.number())),
            (false, false) => Err(HeaderError::Parent {
                uuid: self.uuid_link.to_string(),
                image_type: self.image_type.number(),
            }),
            _ => Ok(()),
        }
    }

    /// The first sector of the file. An image of [`VERSION_0`] cannot be written.
    pub fn to_bytes(&self) -> [u8; HEAD_LEN] {
        let lchs = self.logical_geometry;
        let [cylinders, heads, sectors] = self.geometry.map(U32::new);
        let raw = RawHeader {
            text: self.text,
            signature: U32::new(SIGNATURE),
            version: U32::new(self.version),
            header_size: U32::new(self.header_size),
            image_type: U32::new(self.image_type.number()),
            flags: U32::new(self.flags),
            comment: self.comment,
            blocks_offset: U32::new(self.blocks_offset),
            data_offset: U32::new(self.data_offset),
            cylinders,
            heads,
            sectors,
            sector_size: U32::new(512),
            unused: U32::new(0),
            disk_size: self.disk_size.into(),
            block_size: U32::new(1 << super::layout::BLOCK_BITS),
            block_extra: U32::new(0),
            blocks: U32::new(self.blocks),
            blocks_allocated: U32::new(self.blocks_allocated),
            uuid_create: self.uuid_create.0,
            uuid_modify: self.uuid_modify.0,
            uuid_link: self.uuid_link.0,
            uuid_parent_modify: self.uuid_parent_modify.0,
            lchs: match lchs {
                Some([cylinders, heads, sectors]) => [cylinders, heads, sectors, 512].map(U32::new),
                None => [U32::new(0); 4],
            },
        };
        let mut bytes = [0; HEAD_LEN];
        // The structure is shorter than the sector.
        let _ = raw.write_to_prefix(&mut bytes);
        bytes
    }

    /// A header of version 1.1 with nothing in it.
    pub fn new(image_type: ImageType, disk_size: u64, blocks: u32) -> Self {
        let mut text = [0; 64];
        for (byte, letter) in text.iter_mut().zip(b"<<< diskmill Virtual Disk Image >>>\n") {
            *byte = *letter;
        }
        Self {
            version: VERSION_1_1,
            text,
            header_size: HEADER_SIZE,
            image_type,
            flags: 0,
            comment: [0; 256],
            blocks_offset: 0,
            data_offset: 0,
            geometry: [0; 3],
            logical_geometry: None,
            disk_size,
            blocks,
            blocks_allocated: 0,
            uuid_create: Uuid::NIL,
            uuid_modify: Uuid::NIL,
            uuid_link: Uuid::NIL,
            uuid_parent_modify: Uuid::NIL,
        }
    }

    /// Bytes of the disk: whole sectors. What the header has is rounded up, as QEMU does.
    pub fn virtual_size(&self) -> u64 {
        // At most 2^49: see `check`.
        self.disk_size.next_multiple_of(SECTOR)
    }

    /// Bytes of the block map.
    pub fn map_len(&self) -> u64 {
        u64::from(self.blocks) * 4
    }

    /// Whether absent blocks are the parent's.
    pub fn is_diff(&self) -> bool {
        matches!(self.image_type, ImageType::Diff { .. })
    }

    /// Slots are below this. It is the number of blocks, but for a resize that was cut short: then the few blocks that
    /// were copied out of the way lie behind.
    pub fn slot_limit(&self) -> u32 {
        /// Blocks that hold the largest block map.
        const MOVED: u32 = 2048;
        self.blocks
            .max(self.blocks_allocated.min(self.blocks.saturating_add(MOVED)))
    }

    /// Where a slot is, in bytes.
    pub fn slot_at(&self, slot: u32) -> u64 {
        u64::from(self.data_offset) + u64::from(slot) * BLOCK
    }

    /// The comment, as far as it is text.
    pub fn comment(&self) -> String {
        let text = self.comment.split(|byte| *byte == 0).next().unwrap_or_default();
        String::from_utf8_lossy(text).into_owned()
    }

    /// Who made it, as far as it is text.
    pub fn creator(&self) -> String {
        let text = self.text.split(|byte| *byte == 0).next().unwrap_or_default();
        String::from_utf8_lossy(text).trim().to_owned()
    }
}

fn check_block(block_size: u32, block_extra: u32, sector_size: u32) -> Result<(), HeaderError> {
    if sector_size != 512 {
        return Err(range("sector_size", sector_size, "512"));
    }
    if u64::from(block_size) != BLOCK {
        return Err(range("block_size", block_size, "1048576"));
    }
    if block_extra != 0 {
        return Err(range("block_extra", block_extra, "0"));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
