//! The binary header of LUKS2 (on-disk format 1.1.1, section 2.1): big-endian, 4096 bytes, JSON behind it.

use zerocopy::byteorder::big_endian::{U16, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// First six bytes of the first copy: those of LUKS1.
pub const MAGIC: [u8; 6] = crate::crypt::luks::MAGIC;
/// First six bytes of the second copy.
pub const SECOND_MAGIC: [u8; 6] = *b"SKUL\xba\xbe";
/// Bytes of the binary header.
pub const BINARY_LEN: usize = size_of::<RawHeader>();
/// Bytes that a copy, binary header and JSON, may have; the second copy starts behind the first.
pub const COPY_LENS: [u64; 9] = [
    16 << 10,
    32 << 10,
    64 << 10,
    128 << 10,
    256 << 10,
    512 << 10,
    1 << 20,
    2 << 20,
    4 << 20,
];

/// The binary header.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawHeader {
    /// 0: [`MAGIC`] or [`SECOND_MAGIC`].
    pub magic: [u8; 6],
    /// 6: 2.
    pub version: U16,
    /// 8: bytes of this copy.
    pub copy_len: U64,
    /// 16: rises with each change.
    pub sequence: U64,
    /// 24: a name for people.
    pub label: [u8; 48],
    /// 72: the hash of the checksum.
    pub checksum_alg: [u8; 32],
    /// 104: another in each copy and change.
    pub salt: [u8; 64],
    /// 168: UUID, as text.
    pub uuid: [u8; 40],
    /// 208: a second name.
    pub subsystem: [u8; 48],
    /// 256: where this copy is.
    pub at: U64,
    /// 264: zeros.
    pub padding: [u8; 184],
    /// 448: checksum of the copy, itself taken for zeros.
    pub checksum: [u8; 64],
    /// 512: zeros.
    pub rest: [u8; 3584],
}

const _: () = assert!(BINARY_LEN == 4096);
