//! On-disk structures and constants. Integers are big-endian.

use zerocopy::byteorder::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// First four bytes, the same as qcow2's.
pub const MAGIC: u32 = 0x5146_49fb;
/// The version.
pub const VERSION: u32 = 1;
/// Bytes of the header.
pub const HEADER_LEN: u64 = 48;
/// Bytes of the longest name of a backing file.
pub const BACKING_NAME_MAX: u32 = 1023;
/// Bytes of the longest L1 table that programs take.
pub const L1_BYTES_MAX: u64 = (1 << 31) - 1;
/// Least and most of `cluster_bits`.
pub const CLUSTER_BITS: std::ops::RangeInclusive<u8> = 9..=16;
/// Least and most of `l2_bits`.
pub const L2_BITS: std::ops::RangeInclusive<u8> = 6..=13;
/// L2 entry: the cluster is compressed.
pub const COMPRESSED: u64 = 1 << 63;
/// `crypt_method`: data is as it is.
pub const CRYPT_NONE: u32 = 0;
/// `crypt_method`: AES-128 in CBC mode.
pub const CRYPT_AES: u32 = 1;

/// The header, from byte 0.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawHeader {
    /// [`MAGIC`].
    pub magic: U32,
    /// [`VERSION`].
    pub version: U32,
    /// Where the name of the backing file is, in bytes; 0 if there is none.
    pub backing_file_offset: U64,
    /// Its bytes; it does not end with a NUL.
    pub backing_file_size: U32,
    /// Once the time at which the backing file was changed last.
    pub mtime: U32,
    /// Bytes of the disk; what does not fill a sector does not count.
    pub size: U64,
    /// A cluster has 2 to the power of this bytes.
    pub cluster_bits: u8,
    /// An L2 table has 2 to the power of this entries.
    pub l2_bits: u8,
    /// Anything.
    pub padding: U16,
    /// [`CRYPT_NONE`] or [`CRYPT_AES`].
    pub crypt_method: U32,
    /// Where the L1 table is, in bytes.
    pub l1_table_offset: U64,
}

const _: () = assert!(size_of::<RawHeader>() as u64 == HEADER_LEN);
