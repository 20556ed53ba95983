//! Bytes to header and back. No I/O.

use diskmill_core::{HostOffset, SECTOR};
use zerocopy::{FromBytes, IntoBytes};

use super::layout::{
    ACTIVE, DIGEST_LEN, HEADER_LEN, HEADER_SECTORS, INACTIVE, MAGIC, RawHeader, RawSlot, SALT_LEN,
    SLOT_ALIGN, SLOT_LEN, SLOTS, STRIPES,
};
use super::{LuksError, Place};
use crate::crypt::{CipherSpec, HashAlg};

/// A key slot that keeps the rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    pub(super) active: bool,
    pub(super) iterations: u32,
    pub(super) salt: [u8; SALT_LEN],
    /// In sectors from the header.
    pub(super) key_sector: u32,
}

impl Slot {
    /// Whether it holds a key.
    pub fn is_active(&self) -> bool {
        self.active
    }

    /// PBKDF2 iterations from passphrase to key.
    pub fn iterations(&self) -> u32 {
        self.iterations
    }

    /// Where its material starts, in bytes from the header.
    pub fn key_offset(&self) -> u64 {
        u64::from(self.key_sector).saturating_mul(SECTOR)
    }

    pub(super) fn to_bytes(self) -> [u8; SLOT_LEN] {
        let raw = RawSlot {
            state: if self.active { ACTIVE } else { INACTIVE }.into(),
            iterations: self.iterations.into(),
            salt: self.salt,
            key_offset: self.key_sector.into(),
            stripes: STRIPES.into(),
        };
        let mut bytes = [0; SLOT_LEN];
        bytes.copy_from_slice(raw.as_bytes());
        bytes
    }
}

/// A LUKS1 header that keeps the rules.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    pub(super) cipher: CipherSpec,
    pub(super) hash: HashAlg,
    pub(super) payload_sector: u32,
    pub(super) digest: [u8; DIGEST_LEN],
    pub(super) salt: [u8; SALT_LEN],
    pub(super) iterations: u32,
    pub(super) uuid: [u8; 40],
    pub(super) slots: [Slot; SLOTS],
}

impl Header {
    /// The cipher of the payload and of the key material.
    pub fn cipher(&self) -> CipherSpec {
        self.cipher
    }

    /// The hash of PBKDF2 and of the splitter.
    pub fn hash(&self) -> HashAlg {
        self.hash
    }

    /// Where the payload starts, in bytes from the header; 0 only if the header is detached.
    pub fn payload_offset(&self) -> u64 {
        u64::from(self.payload_sector).saturating_mul(SECTOR)
    }

    /// The slots, all eight.
    pub fn slots(&self) -> &[Slot] {
        &self.slots
    }

    /// The UUID, as text.
    pub fn uuid(&self) -> String {
        text(&self.uuid)
    }

    /// Bytes of a slot's key material.
    pub fn material_len(&self) -> u64 {
        material_len(self.cipher)
    }

    /// Fails unless `bytes` start a LUKS1 header: first thing, so that other files are told apart from damaged ones.
    pub(super) fn check_magic(bytes: &[u8; HEADER_LEN], at: HostOffset) -> Result<(), LuksError> {
        match RawHeader::ref_from_bytes(bytes) {
            Ok(raw) if raw.magic == MAGIC && raw.version.get() == 1 => Ok(()),
            Ok(raw) if raw.magic == MAGIC => Err(LuksError::Version(raw.version.get())),
            _ => Err(LuksError::Magic(at.get())),
        }
    }

    /// Understands a header that is at `place`.
    pub fn parse(bytes: &[u8; HEADER_LEN], place: Place) -> Result<Self, LuksError> {
        Self::check_magic(bytes, place.start())?;
        let raw = RawHeader::ref_from_bytes(bytes).map_err(|_| LuksError::Magic(place.start().get()))?;
        let name = terminated(&raw.cipher_name, "the cipher name")?;
        let mode = terminated(&raw.cipher_mode, "the cipher mode")?;
        let hash = terminated(&raw.hash, "the hash")?;
        let payload_sector = raw.payload_offset.get();
        let detached = place == Place::Detached && payload_sector == 0;
        if payload_sector < HEADER_SECTORS && !detached {
            return Err(LuksError::PayloadInHeader(payload_sector));
        }
        let iterations = raw.iterations.get();
        if iterations == 0 {
            return Err(LuksError::NoIterations);
        }
        let key_bytes = usize::try_from(raw.key_bytes.get()).unwrap_or(usize::MAX);
        let cipher = CipherSpec::parse(&name, &mode, key_bytes)?;
        let hash = HashAlg::parse(&hash)?;
        let mut slots = [Slot {
            active: false,
            iterations: 0,
            salt: [0; SALT_LEN],
            key_sector: 0,
        }; SLOTS];
        for (index, (slot, raw)) in slots.iter_mut().zip(&raw.slots).enumerate() {
            *slot = parse_slot(index, raw)?;
        }
        check_overlaps(
            &slots,
            material_len(cipher),
            (!detached).then_some(payload_sector),
        )?;
        Ok(Self {
            cipher,
            hash,
            payload_sector,
            digest: raw.digest,
            salt: raw.salt,
            iterations,
            uuid: raw.uuid,
            slots,
        })
    }

    /// The header as it is stored.
    pub fn to_bytes(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        let Ok(raw) = RawHeader::mut_from_bytes(&mut bytes) else {
            return bytes;
        };
        raw.magic = MAGIC;
        raw.version = 1.into();
        put(&mut raw.cipher_name, self.cipher.alg().family());
        put(&mut raw.cipher_mode, &self.cipher.luks_mode());
        put(&mut raw.hash, self.hash.name());
        raw.payload_offset = self.payload_sector.into();
        raw.key_bytes = u32::try_from(self.cipher.key_len()).unwrap_or(0).into();
        raw.digest = self.digest;
        raw.salt = self.salt;
        raw.iterations = self.iterations.into();
        raw.uuid = self.uuid;
        for (raw, slot) in raw.slots.iter_mut().zip(self.slots) {
            raw.as_mut_bytes().copy_from_slice(&slot.to_bytes());
        }
        bytes
    }
}

/// Bytes of the key material of a slot: the volume key in all its stripes.
pub(super) fn material_len(cipher: CipherSpec) -> u64 {
    (cipher.key_len() as u64).saturating_mul(STRIPES.into())
}

/// Sectors from one slot's material to the next, in new headers.
pub(super) fn slot_sectors(cipher: CipherSpec) -> u32 {
    let sectors = material_len(cipher).div_ceil(SECTOR);
    u32::try_from(sectors)
        .unwrap_or(u32::MAX)
        .next_multiple_of(SLOT_ALIGN)
}

fn parse_slot(index: usize, raw: &RawSlot) -> Result<Slot, LuksError> {
    let active = match raw.state.get() {
        ACTIVE => true,
        INACTIVE => false,
        state => return Err(LuksError::SlotState { index, state }),
    };
    let stripes = raw.stripes.get();
    if stripes != STRIPES {
        return Err(LuksError::Stripes { index, stripes });
    }
    if active && raw.iterations.get() == 0 {
        return Err(LuksError::SlotIterations(index));
    }
    Ok(Slot {
        active,
        iterations: raw.iterations.get(),
        salt: raw.salt,
        key_sector: raw.key_offset.get(),
    })
}

/// Fails if slots lie in the header, in the payload, or in one another.
fn check_overlaps(slots: &[Slot], material_len: u64, payload_sector: Option<u32>) -> Result<(), LuksError> {
    let header_end = u64::from(HEADER_SECTORS).saturating_mul(SECTOR);
    let payload = payload_sector.map_or(u64::MAX, |sector| u64::from(sector).saturating_mul(SECTOR));
    let range = |slot: &Slot| (slot.key_offset(), slot.key_offset().saturating_add(material_len));
    for (index, slot) in slots.iter().enumerate() {
        let (start, end) = range(slot);
        if start < header_end {
            return Err(LuksError::SlotInHeader(index));
        }
        if end > payload {
            return Err(LuksError::SlotInPayload(index));
        }
    }
    for (index, slot) in slots.iter().enumerate() {
        let (start, end) = range(slot);
        for (other_index, other) in slots.iter().enumerate().skip(index.saturating_add(1)) {
            let (other_start, other_end) = range(other);
            if start < other_end && other_start < end {
                return Err(LuksError::SlotsOverlap(index, other_index));
            }
        }
    }
    Ok(())
}

/// A field that must hold a NUL, as text up to it.
fn terminated(field: &[u8], what: &'static str) -> Result<String, LuksError> {
    if field.contains(&0) {
        Ok(text(field))
    } else {
        Err(LuksError::Unterminated(what))
    }
}

/// A field padded with NUL, as text.
fn text(field: &[u8]) -> String {
    let field = field.split(|byte| *byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(field).into_owned()
}

fn put(field: &mut [u8], text: &str) {
    for (byte, value) in field.iter_mut().zip(text.bytes()) {
        *byte = value;
    }
}
