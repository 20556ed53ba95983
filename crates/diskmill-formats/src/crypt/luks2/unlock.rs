//! From a passphrase to the cipher of the disk.

use argon2::{Algorithm, Argon2, Params, Version};
use diskmill_core::{HostOffset, Job, Result, Storage};
use zeroize::Zeroizing;

use super::metadata::{Digest, Kdf, Keyslot};
use super::{Luks2Error, MAX_WORK, Volume2};
use crate::crypt::kdf::{Budget, MAX_ITERATIONS, pbkdf2};
use crate::crypt::luks::{LuksError, same};
use crate::crypt::{CryptError, SectorCipher, af};

impl Volume2 {
    /// The cipher of the disk, if `passphrase` opens a slot of the header in `file`. Sectors are numbered from the start
    /// of the disk, by 512 bytes, whatever they are in length.
    ///
    /// An error with [`LuksError::Password`] if it opens none. A slot that costs more than is allowed is passed over, and
    /// the reason is the error if no other opens.
    pub fn unlock(&self, file: &dyn Storage, passphrase: &[u8], job: Job<'_>) -> Result<SectorCipher> {
        let mut slots: Vec<(&u32, &Keyslot)> = self.metadata.slots.iter().collect();
        slots.sort_by_key(|(_, slot)| std::cmp::Reverse(slot.priority));
        let mut refused = None;
        let mut iterations = Budget::of_iterations();
        let mut work = Budget::of(MAX_WORK.saturating_mul(2));
        for (number, slot) in slots {
            job.check()?;
            let affordable = slot.kdf.check_cost(*number).and_then(|()| {
                match slot.kdf {
                    Kdf::Pbkdf2 { iterations: cost, .. } => iterations.spend(cost)?,
                    Kdf::Argon2 { time, memory, .. } => work.spend(time.saturating_mul(memory))?,
                }
                Ok(iterations.spend(slot.digest.iterations.min(MAX_ITERATIONS.into()))?)
            });
            if let Err(error) = affordable {
                refused = Some(error);
                continue;
            }
            if let Some(key) = self.try_slot(file, *number, slot, passphrase, job)? {
                let segment = &self.metadata.segment;
                let cipher = SectorCipher::with_sectors_of(segment.spec, &key, segment.sector_len)?;
                return Ok(cipher.counting_from(segment.first_sector));
            }
        }
        Err(refused.map_or_else(|| LuksError::Password.into(), Into::into))
    }

    fn try_slot(
        &self,
        file: &dyn Storage,
        number: u32,
        slot: &Keyslot,
        passphrase: &[u8],
        job: Job<'_>,
    ) -> Result<Option<Zeroizing<Vec<u8>>>> {
        let key_len = self.metadata.segment.spec.key_len();
        // The length depends on the cipher only: 256 KiB at most.
        let len = slot.material_len(key_len);
        let (end, have) = (slot.offset.saturating_add(len), file.len()?);
        if end > have {
            let what = format!("the material of key slot {number}");
            return Err(Luks2Error::Truncated { what, end, have }.into());
        }
        let mut derived = Zeroizing::new(vec![0; slot.spec.key_len()]);
        derive(slot, passphrase, &mut derived, job)?;
        let len = usize::try_from(len).unwrap_or(0);
        let mut material = Zeroizing::new(vec![0; len.next_multiple_of(512)]);
        file.read_at(
            HostOffset::new(slot.offset),
            material.get_mut(..len).unwrap_or_default(),
        )?;
        SectorCipher::new(slot.spec, &derived)?.decrypt(0, &mut material)?;
        let key = af::merge(slot.hash, material.get(..len).unwrap_or_default(), key_len);
        Ok(is_right(&slot.digest, &key, job)?.then_some(key))
    }
}

fn derive(slot: &Keyslot, passphrase: &[u8], out: &mut [u8], job: Job<'_>) -> Result<()> {
    match slot.kdf {
        Kdf::Pbkdf2 { hash, iterations } => {
            let iterations = u32::try_from(iterations).unwrap_or(u32::MAX);
            pbkdf2(hash, passphrase, &slot.salt, iterations, out, job)
        }
        Kdf::Argon2 {
            id,
            time,
            memory,
            lanes,
        } => {
            let algorithm = if id {
                Algorithm::Argon2id
            } else {
                Algorithm::Argon2i
            };
            let word = |number: u64| u32::try_from(number).unwrap_or(u32::MAX);
            let params = Params::new(word(memory), word(time), word(lanes), Some(out.len()));
            // All that it refuses was checked, but for memory that is not there.
            params
                .and_then(|params| {
                    Argon2::new(algorithm, Version::V0x13, params)
                        .hash_password_into(passphrase, &slot.salt, out)
                })
                .map_err(|error| match error {
                    argon2::Error::OutOfMemory => Luks2Error::Memory(memory),
                    _ => CryptError::Password.into(),
                })?;
            Ok(())
        }
    }
}

fn is_right(digest: &Digest, key: &[u8], job: Job<'_>) -> Result<bool> {
    let iterations = u32::try_from(digest.iterations).unwrap_or(u32::MAX);
    let mut found = vec![0; digest.digest.len()];
    pbkdf2(digest.hash, key, &digest.salt, iterations, &mut found, job)?;
    Ok(same(&found, &digest.digest))
}
