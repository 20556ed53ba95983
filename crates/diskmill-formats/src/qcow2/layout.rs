//! Structures of a qcow2 file, byte for byte. All integers are big-endian.

#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

use zerocopy::byteorder::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// First four bytes of the file: `QFI` and 0xfb. The older qcow has the same.
pub const MAGIC: u32 = 0x5146_49fb;

/// Bytes of a version 2 header.
pub const V2_HEADER_LEN: u32 = 72;
/// Bytes of the shortest version 3 header.
pub const V3_HEADER_MIN: u32 = 104;
/// Bytes of the version 3 header written here: with compression type and padding.
pub const V3_HEADER_LEN: u32 = 112;
/// Where the compression type is, if the header is longer than this.
pub const COMPRESSION_TYPE_AT: usize = 104;

/// Extension type: the end of the list.
pub const EXT_END: u32 = 0;
/// Extension type: the format of the backing file.
pub const EXT_BACKING_FORMAT: u32 = 0xe279_2aca;
/// Extension type: names of feature bits.
pub const EXT_FEATURE_NAMES: u32 = 0x6803_f857;
/// Extension type: where the directory of dirty bitmaps is.
pub const EXT_BITMAPS: u32 = 0x2385_2875;
/// Extension type: where the LUKS header is ("full disk encryption").
pub const EXT_ENCRYPTION: u32 = 0x0537_be77;
/// Extension type: the name of the external data file ("DATA").
pub const EXT_DATA_FILE: u32 = 0x4441_5441;

/// Most bytes of a backing file's name.
pub const BACKING_NAME_MAX: u32 = 1023;
/// Most bytes of a backing format's name that QEMU reads.
pub const BACKING_FORMAT_MAX: u32 = 15;
/// Most bytes of the active L1 table, and of a snapshot's.
pub const L1_BYTES_MAX: u64 = 32 << 20;
/// Most bytes of the refcount table.
pub const REFCOUNT_TABLE_BYTES_MAX: u64 = 8 << 20;
/// Most snapshots.
pub const SNAPSHOTS_MAX: u32 = 65_536;
/// Most bytes of extra data of a snapshot that are understood.
pub const SNAPSHOT_EXTRA_MAX: u32 = 1024;
/// Most bytes of the snapshot table.
pub const SNAPSHOT_TABLE_BYTES_MAX: u64 = 64 << 20;
/// Most dirty bitmaps.
pub const BITMAPS_MAX: u32 = 65_535;
/// Most bytes of a bitmap's name.
pub const BITMAP_NAME_MAX: u16 = 1023;
/// Most bytes of a directory entry, on average: the directory holds at most [`BITMAPS_MAX`] times this.
pub const BITMAP_ENTRY_MAX: u64 = 1024;
/// Most entries of a bitmap's table.
pub const BITMAP_TABLE_ENTRIES_MAX: u32 = 0x800_0000;
/// Most bytes of a bitmap's data.
pub const BITMAP_BYTES_MAX: u64 = 512 << 20;

/// Bits of an L1, L2, refcount-table or bitmap-table entry that hold an offset in the file.
pub const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// L1 and L2 entries: the refcount of what is pointed to is exactly 1.
pub const COPIED: u64 = 1 << 63;
/// L2 entries: the cluster is compressed.
pub const COMPRESSED: u64 = 1 << 62;
/// L2 entries that are not extended: the cluster reads as zeros.
pub const ZERO_FLAG: u64 = 1;
/// L1 entries: bits that must be 0.
pub const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;
/// L2 entries that are not compressed: bits that must be 0.
pub const L2_RESERVED: u64 = 0x3f00_0000_0000_01fe;
/// Refcount-table entries: the offset of a refcount block.
pub const REFCOUNT_BLOCK_MASK: u64 = 0xffff_ffff_ffff_fe00;
/// Refcount-table entries: bits that must be 0.
pub const REFCOUNT_TABLE_RESERVED: u64 = 0x1ff;

/// Bitmap-table entries: bits that must be 0; of an entry without offset bit 0 is in use.
pub const BITMAP_TABLE_RESERVED: u64 = 0xff00_0000_0000_01ff;

/// The part of the header that both versions have (72 bytes).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawHeaderV2 {
    /// 0: [`MAGIC`].
    pub magic: U32,
    /// 4: 2 or 3.
    pub version: U32,
    /// 8: where the backing file's name is; 0 for none.
    pub backing_file_offset: U64,
    /// 16: bytes of that name.
    pub backing_file_size: U32,
    /// 20: base-2 logarithm of the cluster size.
    pub cluster_bits: U32,
    /// 24: bytes of the virtual disk.
    pub size: U64,
    /// 32: 0 none, 1 AES, 2 LUKS.
    pub crypt_method: U32,
    /// 36: entries of the active L1 table.
    pub l1_size: U32,
    /// 40: where the active L1 table is.
    pub l1_table_offset: U64,
    /// 48: where the refcount table is.
    pub refcount_table_offset: U64,
    /// 56: clusters of the refcount table.
    pub refcount_table_clusters: U32,
    /// 60: snapshots in the image.
    pub nb_snapshots: U32,
    /// 64: where the snapshot table is.
    pub snapshots_offset: U64,
}

/// What a version 3 header has from byte 72 on (32 bytes).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawHeaderV3 {
    /// 72: features a reader must know.
    pub incompatible_features: U64,
    /// 80: features a reader need not know.
    pub compatible_features: U64,
    /// 88: features a writer that does not know them must clear.
    pub autoclear_features: U64,
    /// 96: base-2 logarithm of a refcount's width in bits.
    pub refcount_order: U32,
    /// 100: bytes of the header.
    pub header_length: U32,
}

/// What each header extension starts with; its data follows, padded to 8 bytes.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawExtension {
    /// One of the `EXT_` numbers, or anything else.
    pub kind: U32,
    /// Bytes of its data, without padding.
    pub len: U32,
}

/// A record of the feature names extension (48 bytes).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawFeatureName {
    /// 0 incompatible, 1 compatible, 2 autoclear.
    pub kind: u8,
    /// Which bit.
    pub bit: u8,
    /// Its name, padded with NUL.
    pub name: [u8; 46],
}

/// The bitmaps extension (24 bytes).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawBitmapsExtension {
    /// Bitmaps in the directory.
    pub nb_bitmaps: U32,
    /// 0.
    pub reserved: U32,
    /// Bytes of the directory.
    pub directory_size: U64,
    /// Where the directory is.
    pub directory_offset: U64,
}

/// The encryption extension (16 bytes).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawEncryptionExtension {
    /// Where the LUKS header is.
    pub offset: U64,
    /// Bytes of it, key slots included.
    pub length: U64,
}

/// What an entry of the snapshot table starts with (40 bytes). Extra data, id and name follow, padded to 8 bytes.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawSnapshot {
    /// Where the snapshot's L1 table is.
    pub l1_table_offset: U64,
    /// Entries of it.
    pub l1_size: U32,
    /// Bytes of the id.
    pub id_len: U16,
    /// Bytes of the name.
    pub name_len: U16,
    /// Seconds since 1970 when it was made.
    pub date_sec: U32,
    /// And nanoseconds.
    pub date_nsec: U32,
    /// How long the machine had run, in nanoseconds.
    pub vm_clock_nsec: U64,
    /// Bytes of machine state, if they fit.
    pub vm_state_size: U32,
    /// Bytes of extra data.
    pub extra_len: U32,
}

/// The extra data of a snapshot that is understood (24 bytes). The last field came later.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawSnapshotExtra {
    /// Bytes of machine state.
    pub vm_state_size: U64,
    /// Bytes of the virtual disk.
    pub disk_size: U64,
    /// Instructions executed; all ones if not counted.
    pub icount: U64,
}

/// What an entry of the bitmap directory starts with (24 bytes). Extra data and name follow, padded to 8 bytes.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawBitmap {
    /// Where the bitmap's table is.
    pub table_offset: U64,
    /// Entries of it.
    pub table_size: U32,
    /// Bit 0 in use, 1 auto, 2 extra data may be ignored.
    pub flags: U32,
    /// 1: a dirty bitmap.
    pub kind: u8,
    /// Base-2 logarithm of the bytes a bit stands for.
    pub granularity_bits: u8,
    /// Bytes of the name.
    pub name_len: U16,
    /// Bytes of extra data.
    pub extra_len: U32,
}
