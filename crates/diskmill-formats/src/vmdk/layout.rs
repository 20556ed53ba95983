//! On-disk structures and constants of VMDK. All integers are little-endian, all structures packed.

use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// First bytes of a hosted sparse extent.
pub const SPARSE_MAGIC: [u8; 4] = *b"KDMV";
/// First bytes of an ESX copy-on-write extent.
pub const COWD_MAGIC: [u8; 4] = *b"COWD";
/// First integer of a space-efficient sparse extent.
pub const SESPARSE_MAGIC: u64 = 0xcafe_babe;
/// First integer of its second header.
pub const SESPARSE_VOLATILE_MAGIC: u64 = 0xcafe_cafe;
/// The version of it that is known.
pub const SESPARSE_VERSION: u64 = 0x2_0000_0001;

/// The header of a hosted sparse extent: sector 0, and a copy of it as footer. Offsets and sizes are in sectors.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct SparseHeader {
    /// [`SPARSE_MAGIC`].
    pub magic: [u8; 4],
    /// 1; 2 where zeroed grains may occur; 3 for streams.
    pub version: U32,
    /// See [`super::header::Flags`].
    pub flags: U32,
    /// The size of the disk.
    pub capacity: U64,
    /// The size of a grain.
    pub grain_size: U64,
    /// Where the embedded descriptor is; 0 if there is none.
    pub descriptor_offset: U64,
    /// Room for the embedded descriptor.
    pub descriptor_size: U64,
    /// Entries of a grain table.
    pub gtes_per_gt: U32,
    /// Where the redundant grain directory is.
    pub rgd_offset: U64,
    /// Where the grain directory is, or [`GD_AT_END`].
    pub gd_offset: U64,
    /// Where the first grain may be.
    pub overhead: U64,
    /// 1 while a writer has it open.
    pub unclean_shutdown: u8,
    /// [`CHECK_BYTES`].
    pub check: [u8; 4],
    /// 0 or [`DEFLATE`].
    pub compress_algorithm: U16,
    /// Zeros.
    pub pad: [u8; 433],
}

/// Line ends that a transfer as text would have changed.
pub const CHECK_BYTES: [u8; 4] = *b"\n \r\n";
/// Says that the grain directory's place is in the footer.
pub const GD_AT_END: u64 = u64::MAX;
/// Grains are zlib streams.
pub const DEFLATE: u16 = 1;

/// The start of a grain of a stream, or of a sector that tells what follows.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Marker {
    /// The sector of the disk, or the number of sectors that follow.
    pub val: U64,
    /// Bytes of the compressed grain; 0 if this is no grain.
    pub size: U32,
    /// What it is, if it is no grain; else the first bytes of the stream.
    pub kind: U32,
}

/// Bytes of a [`Marker`] in front of the data of a grain.
pub const GRAIN_MARKER_LEN: u64 = 12;
/// [`Marker::kind`] of the end of the stream.
pub const MARKER_EOS: u32 = 0;
/// [`Marker::kind`] of a grain table.
pub const MARKER_GT: u32 = 1;
/// [`Marker::kind`] of the grain directory.
pub const MARKER_GD: u32 = 2;
/// [`Marker::kind`] of the footer.
pub const MARKER_FOOTER: u32 = 3;

/// The start of the header of an ESX copy-on-write extent, which takes [`COWD_HEADER_LEN`] bytes. Offsets and sizes are
/// in sectors.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct CowdHeader {
    /// [`COWD_MAGIC`].
    pub magic: [u8; 4],
    /// 1.
    pub version: U32,
    /// 3.
    pub flags: U32,
    /// The size of the disk.
    pub capacity: U32,
    /// The size of a grain.
    pub grain_size: U32,
    /// Where the grain directory is.
    pub gd_offset: U32,
    /// Entries of the grain directory.
    pub gd_entries: U32,
    /// The sector behind the last that is in use.
    pub next_free: U32,
}

/// Bytes of the header of an ESX copy-on-write extent.
pub const COWD_HEADER_LEN: u64 = 2048;
/// Where [`CowdHeader::next_free`] is, in bytes.
pub const COWD_NEXT_FREE: u64 = 28;
/// Entries of a grain table of an ESX copy-on-write extent.
pub const COWD_GTES: u32 = 4096;

/// The constant header of a space-efficient sparse extent. Offsets and sizes are in sectors.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct SeSparseHeader {
    /// [`SESPARSE_MAGIC`].
    pub magic: U64,
    /// [`SESPARSE_VERSION`].
    pub version: U64,
    /// The size of the disk.
    pub capacity: U64,
    /// The size of a grain: [`SESPARSE_GRAIN`].
    pub grain_size: U64,
    /// The size of a grain table: [`SESPARSE_TABLE`].
    pub grain_table_size: U64,
    /// 0.
    pub flags: U64,
    /// 0.
    pub reserved: [U64; 4],
    /// Where the volatile header is.
    pub volatile_offset: U64,
    /// Its size.
    pub volatile_size: U64,
    /// Where the header of the journal is.
    pub journal_header_offset: U64,
    /// Its size.
    pub journal_header_size: U64,
    /// Where the journal is.
    pub journal_offset: U64,
    /// Its size.
    pub journal_size: U64,
    /// Where the grain directory is.
    pub gd_offset: U64,
    /// Its size.
    pub gd_size: U64,
    /// Where the grain tables are.
    pub tables_offset: U64,
    /// Their size.
    pub tables_size: U64,
    /// Where the bitmap of free grains is.
    pub free_offset: U64,
    /// Its size.
    pub free_size: U64,
    /// Where the map from grains to the disk is.
    pub backmap_offset: U64,
    /// Its size.
    pub backmap_size: U64,
    /// Where the grains are.
    pub grains_offset: U64,
    /// Their size.
    pub grains_size: U64,
    /// Zeros.
    pub pad: [u8; 304],
}

/// Sectors of a grain of a space-efficient sparse extent.
pub const SESPARSE_GRAIN: u64 = 8;
/// Sectors of a grain table of a space-efficient sparse extent.
pub const SESPARSE_TABLE: u64 = 64;
/// Entries of such a table.
pub const SESPARSE_GTES: u32 = 4096;

/// The second header of a space-efficient sparse extent.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct SeSparseVolatile {
    /// [`SESPARSE_VOLATILE_MAGIC`].
    pub magic: U64,
    /// The next table that is free.
    pub free_table: U64,
    /// The next number in the journal.
    pub next_sequence: U64,
    /// Not 0 if the journal must be replayed.
    pub replay_journal: U64,
}

/// Entries of a grain directory that are read at most: 128 MiB of them.
pub const MOST_TABLES: u64 = 32 << 20;
/// Bytes of a descriptor that are read at most.
pub const MOST_TEXT: u64 = 1 << 20;
/// Extents of a disk at most.
pub const MOST_EXTENTS: usize = 4096;

const _: () = {
    assert!(size_of::<SparseHeader>() == 512);
    assert!(size_of::<Marker>() == 16);
    assert!(size_of::<CowdHeader>() == 32);
    assert!(size_of::<SeSparseHeader>() == 512);
};
