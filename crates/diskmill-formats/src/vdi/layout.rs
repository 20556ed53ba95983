//! On-disk structures and constants. Integers are little-endian; a UUID has its first three groups little-endian too.

use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The signature, behind 64 bytes of text.
pub const SIGNATURE: u32 = 0xbeda_107f;
/// Where the signature is.
pub const SIGNATURE_AT: usize = 64;
/// Version 1.1: what VirtualBox has written since 2007.
pub const VERSION_1_1: u32 = 0x0001_0001;
/// The version before: no header size, the block map right behind the header, data right behind the map.
pub const VERSION_0: u32 = 2;
/// Bytes of text and version in front of what `header_size` counts.
pub const PREAMBLE: u32 = 72;
/// `header_size` of version 1.1 without logical geometry; the least there is.
pub const HEADER_SIZE: u32 = 384;
/// `header_size` with logical geometry.
pub const HEADER_SIZE_LCHS: u32 = 400;
/// Bytes of a block: the one size every program reads.
pub const BLOCK: u64 = 1 << 20;
/// The same as a shift.
pub const BLOCK_BITS: u32 = 20;
/// Blocks of the largest disk: the map of more than that is more than programs take.
pub const BLOCKS_MAX: u32 = 0x1fff_ff80;
/// Map entry: never written; the parent's bytes show, or zeros.
pub const FREE: u32 = 0xffff_ffff;
/// Map entry: given up; reads as zeros whatever the parent has.
pub const ZERO: u32 = 0xffff_fffe;
/// Image type: blocks are added as they are needed.
pub const DYNAMIC: u32 = 1;
/// Image type: all blocks are there.
pub const FIXED: u32 = 2;
/// Image type: like [`DIFF`], from early versions of VirtualBox.
pub const UNDO: u32 = 3;
/// Image type: blocks that are not there are the parent's.
pub const DIFF: u32 = 4;
/// Flags VirtualBox knows: how an image was to be filled with zeros when it was made.
pub const FLAGS: u32 = 0x101;
/// Entries of the block map in a sector.
pub const ENTRIES_PER_SECTOR: u64 = 128;

/// The header of version 1.x from byte 0.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawHeader {
    /// Who made it, for people.
    pub text: [u8; 64],
    /// [`SIGNATURE`].
    pub signature: U32,
    /// Major version in the upper half, minor in the lower.
    pub version: U32,
    /// Bytes of the header from here on.
    pub header_size: U32,
    /// [`DYNAMIC`] to [`DIFF`].
    pub image_type: U32,
    /// [`FLAGS`].
    pub flags: U32,
    /// Anything, for people: UTF-8, ends with a NUL.
    pub comment: [u8; 256],
    /// Where the block map is, in bytes.
    pub blocks_offset: U32,
    /// Where slot 0 is, in bytes.
    pub data_offset: U32,
    /// Physical geometry.
    pub cylinders: U32,
    /// Physical geometry.
    pub heads: U32,
    /// Physical geometry.
    pub sectors: U32,
    /// Bytes of a sector.
    pub sector_size: U32,
    /// Once a way of translating geometry.
    pub unused: U32,
    /// Bytes of the disk.
    pub disk_size: U64,
    /// Bytes of a block.
    pub block_size: U32,
    /// Bytes in front of each block.
    pub block_extra: U32,
    /// Blocks of the disk.
    pub blocks: U32,
    /// Blocks that have a slot.
    pub blocks_allocated: U32,
    /// Of this image.
    pub uuid_create: [u8; 16],
    /// Of its present content.
    pub uuid_modify: [u8; 16],
    /// `uuid_create` of the parent; zero if there is none.
    pub uuid_link: [u8; 16],
    /// `uuid_modify` the parent had.
    pub uuid_parent_modify: [u8; 16],
    /// Logical geometry: cylinders, heads, sectors, bytes of a sector. Counts only if `header_size` is 400 or more.
    pub lchs: [U32; 4],
}

/// Bytes of [`RawHeader`]; they lie within the first sector.
pub const RAW_HEADER_LEN: usize = size_of::<RawHeader>();

/// The header of version 0 from byte 0. The block map follows.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawHeader0 {
    /// Who made it, for people.
    pub text: [u8; 64],
    /// [`SIGNATURE`].
    pub signature: U32,
    /// [`VERSION_0`].
    pub version: U32,
    /// [`DYNAMIC`] to [`DIFF`].
    pub image_type: U32,
    /// [`FLAGS`].
    pub flags: U32,
    /// Anything, for people.
    pub comment: [u8; 256],
    /// Geometry: cylinders, heads, sectors, bytes of a sector.
    pub geometry: [U32; 4],
    /// Bytes of the disk.
    pub disk_size: U64,
    /// Bytes of a block.
    pub block_size: U32,
    /// Blocks of the disk.
    pub blocks: U32,
    /// Blocks that have a slot.
    pub blocks_allocated: U32,
    /// Of this image.
    pub uuid_create: [u8; 16],
    /// Of its present content.
    pub uuid_modify: [u8; 16],
    /// `uuid_create` of the parent.
    pub uuid_link: [u8; 16],
}

/// Bytes of [`RawHeader0`].
pub const RAW_HEADER_0_LEN: usize = size_of::<RawHeader0>();

const _: () = assert!(RAW_HEADER_LEN == 472 && RAW_HEADER_0_LEN == 420);
