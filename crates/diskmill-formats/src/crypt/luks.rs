//! The LUKS header, version 1: what it says of itself. Nothing is decrypted here.
//!
//! ```text
//! 0    magic, version, cipher name and mode, hash, payload offset, key length
//! 112  digest of the master key, its salt and iterations
//! 168  UUID
//! 208  eight key slots of 48 bytes: state, iterations, salt, offset of the key material, stripes
//! ```

#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

use diskmill_core::{Error, ErrorKind, Format, HostOffset, Result, SECTOR, Storage, Value};
use zerocopy::byteorder::big_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// First six bytes.
pub const MAGIC: [u8; 6] = *b"LUKS\xba\xbe";
/// Key slots.
const SLOTS: usize = 8;
/// State of a slot that holds a key.
const ACTIVE: u32 = 0x00ac_71f3;
/// State of a slot that holds none.
const INACTIVE: u32 = 0x0000_dead;

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawSlot {
    state: U32,
    iterations: U32,
    salt: [u8; 32],
    key_offset: U32,
    stripes: U32,
}

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 6],
    version: U16,
    cipher_name: [u8; 32],
    cipher_mode: [u8; 32],
    hash: [u8; 32],
    payload_offset: U32,
    key_bytes: U32,
    digest: [u8; 20],
    salt: [u8; 32],
    iterations: U32,
    uuid: [u8; 40],
    slots: [RawSlot; SLOTS],
}

const _: () = assert!(size_of::<RawHeader>() == 592);

/// What is wrong with a LUKS header.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LuksError {
    /// The magic number is another's.
    #[error("there is no LUKS header at {0:#x}")]
    Magic(u64),
    /// Another version.
    #[error("LUKS version is {0}, must be 1")]
    Version(u16),
    /// A length of the master key that no cipher has.
    #[error("key_bytes of the LUKS header is {0}, must be 1 to 64")]
    KeyBytes(u32),
    /// A slot in no known state.
    #[error("state of LUKS key slot {index} is {state:#010x}, must be 0x00ac71f3 or 0x0000dead")]
    SlotState {
        /// Which slot.
        index: usize,
        /// Its state.
        state: u32,
    },
}

impl From<LuksError> for Error {
    fn from(error: LuksError) -> Self {
        let kind = match error {
            LuksError::Version(_) => ErrorKind::Unsupported,
            _ => ErrorKind::Malformed,
        };
        Error::new(kind, error).format(Format::Luks)
    }
}

/// What the header at `at` says, as `info` shows it.
pub fn describe(file: &dyn Storage, at: HostOffset) -> Result<Vec<(&'static str, Value)>> {
    let mut bytes = [0; size_of::<RawHeader>()];
    file.read_padded(at, &mut bytes)?;
    let Ok(raw) = RawHeader::read_from_bytes(&bytes) else {
        return Err(LuksError::Magic(at.get()).into());
    };
    if raw.magic != MAGIC {
        return Err(LuksError::Magic(at.get()).into());
    }
    if raw.version.get() != 1 {
        return Err(LuksError::Version(raw.version.get()).into());
    }
    let key_bytes = raw.key_bytes.get();
    if !(1..=64).contains(&key_bytes) {
        return Err(LuksError::KeyBytes(key_bytes).into());
    }
    let mode_text = text(&raw.cipher_mode);
    let (mode, ivgen) = mode_text.split_once('-').unwrap_or((&mode_text, ""));
    let (ivgen, ivgen_hash) = match ivgen.split_once(':') {
        Some((ivgen, hash)) => (ivgen, Some(hash)),
        None => (ivgen, None),
    };
    // XTS takes two keys.
    let cipher_bits = if mode == "xts" {
        key_bytes.saturating_mul(4)
    } else {
        key_bytes.saturating_mul(8)
    };
    let cipher = format!("{}-{cipher_bits}", text(&raw.cipher_name));
    let mut map = vec![
        ("ivgen-alg", Value::Text(ivgen.to_owned())),
        ("detached-header", Value::Bool(false)),
        ("hash-alg", Value::Text(text(&raw.hash))),
        ("cipher-alg", Value::Text(cipher)),
        ("uuid", Value::Text(text(&raw.uuid))),
    ];
    if let Some(hash) = ivgen_hash {
        map.push(("ivgen-hash-alg", Value::Text(hash.to_owned())));
    }
    map.push(("format", Value::Text(Format::Luks.name().to_owned())));
    map.push(("cipher-mode", Value::Text(mode.to_owned())));
    let mut slots = Vec::new();
    for (index, slot) in raw.slots.iter().enumerate() {
        slots.push(describe_slot(index, slot)?);
    }
    map.push(("slots", Value::List(slots)));
    map.push(("payload-offset", Value::Int(sectors(raw.payload_offset))));
    map.push(("master-key-iters", Value::Int(raw.iterations.get().into())));
    Ok(map)
}

fn describe_slot(index: usize, slot: &RawSlot) -> Result<Value, LuksError> {
    let active = match slot.state.get() {
        ACTIVE => true,
        INACTIVE => false,
        state => return Err(LuksError::SlotState { index, state }),
    };
    let mut map = vec![("active", Value::Bool(active))];
    if active {
        map.push(("iters", Value::Int(slot.iterations.get().into())));
    }
    map.push(("key-offset", Value::Int(sectors(slot.key_offset))));
    if active {
        map.push(("stripes", Value::Int(slot.stripes.get().into())));
    }
    Ok(Value::Map(map))
}

fn sectors(count: U32) -> u64 {
    u64::from(count.get()).saturating_mul(SECTOR)
}

/// A field padded with NUL, as text.
fn text(field: &[u8]) -> String {
    let field = field.split(|byte| *byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(field).into_owned()
}
