//! On-disk structures and constants. Integers are big-endian.
//!
//! The header was an unpacked C structure, so compilers put padding into it: 64-bit ones in front of the size and at the
//! end, 32-bit ones nowhere. Nothing in the file says which it is; see [`Header::parse`](super::header::Header::parse).

use zerocopy::byteorder::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The magic number: `OOOM`.
pub const MAGIC: [u8; 4] = *b"OOOM";
/// The same as a little-endian machine wrote it for version 1 of User-Mode Linux.
pub const MAGIC_SWAPPED: [u8; 4] = *b"MOOO";
/// The version that QEMU wrote.
pub const VERSION: u32 = 2;
/// Bytes of the backing file's name with the NUL that ends it.
pub const NAME_LEN: usize = 1024;
/// Bytes of a sector: what a bit of the bitmap stands for.
pub const SECTOR_SIZE: u32 = 512;
/// Bytes of the largest disk: QEMU counted the bytes of the bitmap in 31 bits.
pub const SIZE_MAX: u64 = 8 << 40;
/// Where the backing file's name is.
pub const NAME_AT: u64 = 8;
/// Where `mtime` is, behind the name.
pub const MTIME_AT: u64 = 1032;

/// What both layouts begin with.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawStart {
    /// [`MAGIC`].
    pub magic: [u8; 4],
    /// [`VERSION`].
    pub version: U32,
    /// The backing file's name, ended by a NUL; empty if there is none.
    pub backing_file: [u8; NAME_LEN],
    /// When the backing file had last been changed, in seconds since 1970, or 0. Nobody looks.
    pub mtime: U32,
}

/// What follows in the layout of 64-bit machines.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawEnd64 {
    /// Padding: zero.
    pub hole: U32,
    /// Bytes of the disk.
    pub size: U64,
    /// [`SECTOR_SIZE`].
    pub sectorsize: U32,
    /// Padding: zero.
    pub tail: U32,
}

/// What follows in the layout of 32-bit machines.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawEnd32 {
    /// Bytes of the disk.
    pub size: U64,
    /// [`SECTOR_SIZE`].
    pub sectorsize: U32,
}

/// Bytes of [`RawStart`].
pub const START_LEN: usize = size_of::<RawStart>();
/// Bytes of a header in the layout of 64-bit machines.
pub const LEN_64: usize = START_LEN + size_of::<RawEnd64>();
/// Bytes of a header in the layout of 32-bit machines.
pub const LEN_32: usize = START_LEN + size_of::<RawEnd32>();

const _: () = assert!(START_LEN == 1036 && LEN_64 == 1056 && LEN_32 == 1048);
