//! From a passphrase to the volume key (LUKS1 specification, section 4.3).

use std::fmt;

use diskmill_core::{Job, Result, Secret, Storage};
use zeroize::Zeroizing;

use super::layout::DIGEST_LEN;
use super::{Header, LuksError, Slot, Volume};
use crate::crypt::af;
use crate::crypt::kdf::{Budget, MAX_ITERATIONS, pbkdf2};
use crate::crypt::{CipherSpec, CryptError, SectorCipher};

/// The key of an encrypted disk and the cipher it is for. Wiped from memory when dropped, and shown by nothing.
#[derive(Clone)]
pub struct VolumeKey {
    spec: CipherSpec,
    key: Secret,
}

impl VolumeKey {
    pub(in crate::crypt) fn new(spec: CipherSpec, mut key: Zeroizing<Vec<u8>>) -> Self {
        Self {
            spec,
            key: Secret::new(std::mem::take(&mut key)),
        }
    }

    /// The cipher of the disk, in sectors of 512 bytes.
    pub fn cipher(&self) -> Result<SectorCipher> {
        Ok(SectorCipher::new(self.spec, self.key.as_bytes())?)
    }

    pub(in crate::crypt) fn as_bytes(&self) -> &[u8] {
        self.key.as_bytes()
    }
}

impl fmt::Debug for VolumeKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VolumeKey({}, ..)", self.spec)
    }
}

impl Volume {
    /// The volume key, if `passphrase` opens a slot of the header in `file`.
    ///
    /// An error with [`LuksError::Password`] if it opens none; that costs all the active slots' iterations. With
    /// [`CryptError::Iterations`] if no slot opens and one was not tried since it wants too many.
    pub fn unlock(&self, file: &dyn Storage, passphrase: &[u8], job: Job<'_>) -> Result<VolumeKey> {
        if self.header.iterations > MAX_ITERATIONS {
            // No key could be told from another, whatever the slots cost.
            return Err(CryptError::Iterations(self.header.iterations.into()).into());
        }
        let mut refused = None;
        let mut budget = Budget::of_iterations();
        for slot in self.header.slots().iter().filter(|slot| slot.active) {
            let cost = u64::from(slot.iterations).saturating_add(self.header.iterations.into());
            let affordable = match slot.iterations {
                // Too dear by itself, which trying says better.
                worst if worst > MAX_ITERATIONS => Ok(()),
                _ => budget.spend(cost).map_err(Into::into),
            };
            match affordable.and_then(|()| self.try_slot(file, slot, passphrase, job)) {
                Ok(Some(key)) => return Ok(key),
                Ok(None) => {}
                // A slot that cannot be tried must not lock out those who have another one.
                Err(error) if error.find::<CryptError>().is_some() => refused = Some(error),
                Err(error) => return Err(error),
            }
        }
        Err(refused.unwrap_or_else(|| LuksError::Password.into()))
    }

    /// The volume key, if `passphrase` opens `slot`.
    pub(super) fn try_slot(
        &self,
        file: &dyn Storage,
        slot: &Slot,
        passphrase: &[u8],
        job: Job<'_>,
    ) -> Result<Option<VolumeKey>> {
        let Header { cipher, hash, .. } = self.header;
        let mut derived = Zeroizing::new(vec![0; cipher.key_len()]);
        pbkdf2(hash, passphrase, &slot.salt, slot.iterations, &mut derived, job)?;
        // The length depends on the cipher only: 256 KiB at most.
        let len = usize::try_from(self.header.material_len()).unwrap_or(0);
        let mut material = Zeroizing::new(vec![0; len.next_multiple_of(512)]);
        let stored = material.get_mut(..len).unwrap_or_default();
        file.read_at(self.place.start().plus(slot.key_offset())?, stored)?;
        SectorCipher::new(cipher, &derived)?.decrypt(0, &mut material)?;
        let stripes = material.get(..len).unwrap_or_default();
        let key = af::merge(hash, stripes, cipher.key_len());
        let digest = self.header.digest_of(&key, job)?;
        Ok(same(&digest, &self.header.digest).then(|| VolumeKey::new(cipher, key)))
    }
}

impl Header {
    /// The digest that tells the right volume key.
    pub(super) fn digest_of(&self, key: &[u8], job: Job<'_>) -> Result<[u8; DIGEST_LEN]> {
        let mut digest = [0; DIGEST_LEN];
        pbkdf2(self.hash, key, &self.salt, self.iterations, &mut digest, job)?;
        Ok(digest)
    }
}

/// Whether they are equal, in a time that does not tell how far they are.
pub(in crate::crypt) fn same(a: &[u8], b: &[u8]) -> bool {
    let differences = a.iter().zip(b).fold(0, |seen, (a, b)| seen | (a ^ b));
    a.len() == b.len() && std::hint::black_box(differences) == 0
}
