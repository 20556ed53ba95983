//! The LUKS1 header on disk (specification 1.2.3, sections 4.1 and 4.2): big-endian.

use zerocopy::byteorder::big_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// First six bytes.
pub const MAGIC: [u8; 6] = *b"LUKS\xba\xbe";
/// Key slots.
pub const SLOTS: usize = 8;
/// State of a slot that holds a key.
pub const ACTIVE: u32 = 0x00ac_71f3;
/// State of a slot that holds none.
pub const INACTIVE: u32 = 0x0000_dead;
/// Stripes that every key is split into.
pub const STRIPES: u32 = 4000;
/// Sectors from the start that no slot may lie in.
pub const HEADER_SECTORS: u32 = 8;
/// Sectors that key material is aligned to.
pub const SLOT_ALIGN: u32 = 8;
/// Bytes of the digest of the volume key.
pub const DIGEST_LEN: usize = 20;
/// Bytes of a salt.
pub const SALT_LEN: usize = 32;
/// Bytes of the header.
pub const HEADER_LEN: usize = size_of::<RawHeader>();
/// Bytes of a slot's entry.
pub const SLOT_LEN: usize = size_of::<RawSlot>();
/// Where the entries start.
pub const SLOTS_AT: usize = 208;

/// A key slot.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawSlot {
    /// 0: [`ACTIVE`] or [`INACTIVE`].
    pub state: U32,
    /// 4: PBKDF2 iterations.
    pub iterations: U32,
    /// 8: salt of the passphrase.
    pub salt: [u8; SALT_LEN],
    /// 40: where the key material starts, in sectors.
    pub key_offset: U32,
    /// 44: [`STRIPES`].
    pub stripes: U32,
}

/// The header.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawHeader {
    /// 0: [`MAGIC`].
    pub magic: [u8; 6],
    /// 6: 1.
    pub version: U16,
    /// 8: the cipher's family.
    pub cipher_name: [u8; 32],
    /// 40: mode and initialisation vectors.
    pub cipher_mode: [u8; 32],
    /// 72: the hash of PBKDF2 and of the anti-forensic splitter.
    pub hash: [u8; 32],
    /// 104: where the encrypted data starts, in sectors.
    pub payload_offset: U32,
    /// 108: bytes of the volume key.
    pub key_bytes: U32,
    /// 112: PBKDF2 of the volume key.
    pub digest: [u8; DIGEST_LEN],
    /// 132: its salt.
    pub salt: [u8; SALT_LEN],
    /// 164: its iterations.
    pub iterations: U32,
    /// 168: UUID, as text.
    pub uuid: [u8; 40],
    /// 208: the slots.
    pub slots: [RawSlot; SLOTS],
}

const _: () = assert!(HEADER_LEN == 592 && SLOT_LEN == 48);
const _: () = assert!(std::mem::offset_of!(RawHeader, slots) == SLOTS_AT);
