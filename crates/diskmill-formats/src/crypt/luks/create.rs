//! New headers: what options ask for, and the bytes.

use diskmill_core::{HostOffset, Job, OptionError, Options, Result, SECTOR, StorageMut};
use zeroize::Zeroizing;

use super::header::{Header, Slot, slot_sectors};
use super::layout::{DIGEST_LEN, HEADER_SECTORS, SALT_LEN, SLOTS, STRIPES};
use super::unlock::VolumeKey;
use crate::crypt::kdf::{self, iterations, pbkdf2};
use crate::crypt::{CipherAlg, CipherMode, CipherSpec, HashAlg, IvGen, SectorCipher, af, random};

/// Milliseconds that opening a slot shall take, if nobody says otherwise.
pub(super) const ITER_TIME: u64 = 2000;
/// The digest of the volume key may cost this part of what a slot does.
const DIGEST_SHARE: u64 = 8;

/// What is wanted of a new header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    cipher: CipherSpec,
    hash: HashAlg,
    iter_time: u64,
    key_secret: Option<String>,
}

impl Plan {
    /// Reads `cipher-alg`, `cipher-mode`, `ivgen-alg`, `ivgen-hash-alg`, `hash-alg`, `iter-time` and `key-secret`, each
    /// behind `prefix`. What is not given is AES-256 in XTS mode, with plain64 and SHA-256, for two seconds.
    ///
    /// An error with an [`OptionError`] for values that are none, or with a [`CryptError`](super::CryptError) for values
    /// that do not go together.
    pub fn parse(options: &Options, prefix: &str) -> Result<Self> {
        let given = Given { options, prefix };
        let alg = given.choice("cipher-alg", "a cipher like aes-256", CipherAlg::from_name)?;
        let mode = given.choice(
            "cipher-mode",
            "'ecb', 'cbc', 'xts' or 'ctr'",
            CipherMode::from_name,
        )?;
        let ivgen = given.choice("ivgen-alg", "'plain', 'plain64' or 'essiv'", IvGen::from_name)?;
        let a_hash = |name: &str| HashAlg::parse(name).ok();
        let ivgen_hash = given.choice("ivgen-hash-alg", "a hash like sha256", a_hash)?;
        let hash = given.choice("hash-alg", "a hash like sha256", a_hash)?;
        let ivgen = ivgen.unwrap_or(IvGen::Plain64);
        let ivgen_hash = ivgen_hash.or((ivgen == IvGen::Essiv).then_some(HashAlg::Sha256));
        let alg = alg.unwrap_or(CipherAlg::Aes256);
        let mode = mode.unwrap_or(CipherMode::Xts);
        Ok(Self {
            cipher: CipherSpec::new(alg, mode, ivgen, ivgen_hash)?,
            hash: hash.unwrap_or(HashAlg::Sha256),
            iter_time: options.number(&given.name("iter-time"))?.unwrap_or(ITER_TIME),
            key_secret: options.text(&given.name("key-secret")).map(str::to_owned),
        })
    }

    /// The name of the secret that holds the passphrase, if one was given.
    pub fn key_secret(&self) -> Option<&str> {
        self.key_secret.as_deref()
    }

    /// The cipher of the payload.
    pub fn cipher(&self) -> CipherSpec {
        self.cipher
    }

    /// Bytes of header and key material together: where the payload starts in a file of its own.
    pub fn header_len(&self) -> u64 {
        u64::from(self.payload_sector()).saturating_mul(SECTOR)
    }

    fn payload_sector(&self) -> u32 {
        self.slot_sector(SLOTS)
    }

    fn slot_sector(&self, index: usize) -> u32 {
        let index = u32::try_from(index).unwrap_or(u32::MAX);
        slot_sectors(self.cipher)
            .saturating_mul(index)
            .saturating_add(HEADER_SECTORS)
    }

    /// A new volume key behind `passphrase`, in slot 0. No I/O; takes about as long as PBKDF2 is measured, and as one
    /// slot takes to open.
    pub fn make(&self, passphrase: &[u8], job: Job<'_>) -> Result<NewVolume> {
        let mut key = Zeroizing::new(vec![0; self.cipher.key_len()]);
        random::fill(&mut key)?;
        let mut salt = [0; SALT_LEN];
        random::fill(&mut salt)?;
        let digest_rate = kdf::rate(self.hash, DIGEST_LEN, job)? / DIGEST_SHARE;
        let mut header = Header {
            cipher: self.cipher,
            hash: self.hash,
            payload_sector: self.payload_sector(),
            digest: [0; DIGEST_LEN],
            salt,
            iterations: iterations(digest_rate, self.iter_time)?,
            uuid: random_uuid()?,
            slots: std::array::from_fn(|index| Slot {
                active: false,
                iterations: 0,
                salt: [0; SALT_LEN],
                key_sector: self.slot_sector(index),
            }),
        };
        header.digest = header.digest_of(&key, job)?;
        let key = VolumeKey::new(self.cipher, key);
        let slot_iterations = slot_iterations(&header, self.iter_time, job)?;
        let [first, ..] = header.slots;
        let (slot, material) = wrap(&header, first, &key, passphrase, slot_iterations, job)?;
        let [first, ..] = &mut header.slots;
        *first = slot;
        Ok(NewVolume {
            header,
            material,
            key,
        })
    }
}

/// Options behind a prefix.
struct Given<'a> {
    options: &'a Options,
    prefix: &'a str,
}

impl Given<'_> {
    fn name(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    fn choice<T>(
        &self,
        name: &str,
        expected: &'static str,
        find: impl Fn(&str) -> Option<T>,
    ) -> Result<Option<T>, OptionError> {
        let Some(value) = self.options.text(&self.name(name)) else {
            return Ok(None);
        };
        find(value).map(Some).ok_or_else(|| OptionError::Value {
            // Without the prefix, as qemu-img has it: the parameter is the header's, wherever that is.
            name: name.to_owned(),
            value: value.to_owned(),
            expected,
        })
    }
}

/// A new header and the key it keeps, not written yet.
#[derive(Clone, Debug)]
pub struct NewVolume {
    header: Header,
    material: Vec<u8>,
    key: VolumeKey,
}

impl NewVolume {
    /// The header.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The volume key.
    pub fn key(&self) -> &VolumeKey {
        &self.key
    }

    /// Writes the key material for a header at `at`. All that is around it up to the payload must read as zeros.
    pub fn write_material(&self, file: &dyn StorageMut, at: HostOffset) -> Result<()> {
        let [first, ..] = &self.header.slots;
        file.write_at(at.plus(first.key_offset())?, &self.material)
    }

    /// Writes the header itself, which makes the volume one that opens.
    pub fn write_header(&self, file: &dyn StorageMut, at: HostOffset) -> Result<()> {
        file.write_at(at, &self.header.to_bytes())
    }
}

/// PBKDF2 iterations for a slot that shall take `millis` milliseconds to open.
pub(super) fn slot_iterations(header: &Header, millis: u64, job: Job<'_>) -> Result<u32> {
    let rate = kdf::rate(header.hash, header.cipher.key_len(), job)?;
    Ok(iterations(rate, millis)?)
}

/// `slot` as it is when it keeps `key` behind `passphrase`, and its material, in whole sectors.
pub(super) fn wrap(
    header: &Header,
    slot: Slot,
    key: &VolumeKey,
    passphrase: &[u8],
    iterations: u32,
    job: Job<'_>,
) -> Result<(Slot, Vec<u8>)> {
    let mut salt = [0; SALT_LEN];
    random::fill(&mut salt)?;
    let mut derived = Zeroizing::new(vec![0; header.cipher.key_len()]);
    pbkdf2(header.hash, passphrase, &salt, iterations, &mut derived, job)?;
    let stripes = usize::try_from(STRIPES).unwrap_or(0);
    // Encrypted in place: the buffer is the split key until then, so it is wiped whatever happens.
    let mut material = af::split(header.hash, key.as_bytes(), stripes)?;
    let sectors = material.len().next_multiple_of(512);
    if material.capacity() < sectors {
        let mut longer = Zeroizing::new(Vec::with_capacity(sectors));
        longer.extend_from_slice(&material);
        material = longer;
    }
    material.resize(sectors, 0);
    SectorCipher::new(header.cipher, &derived)?.encrypt(0, &mut material)?;
    let slot = Slot {
        active: true,
        iterations,
        salt,
        ..slot
    };
    Ok((slot, std::mem::take(&mut material)))
}

/// A UUID of version 4, as text padded with NUL.
fn random_uuid() -> Result<[u8; 40]> {
    let mut bytes = [0; 16];
    random::fill(&mut bytes)?;
    let number = u128::from_be_bytes(bytes) & !(0xf << 76) & !(0x3 << 62) | 0x4 << 76 | 0x2 << 62;
    let hex = format!("{number:032x}");
    let mut uuid = [0; 40];
    let dashes = [8, 12, 16, 20];
    let text = hex
        .bytes()
        .enumerate()
        .flat_map(|(at, digit)| [dashes.contains(&at).then_some(b'-'), Some(digit)])
        .flatten();
    for (byte, digit) in uuid.iter_mut().zip(text) {
        *byte = digit;
    }
    Ok(uuid)
}
