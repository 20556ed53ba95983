//! Changing key slots in place.
//!
//! A passphrase that works is never at risk: material goes into a slot that nobody uses, reaches the disk, and only
//! then its entry makes it one. An entry is erased, and that reaches the disk, before its material is wiped. Where a
//! slot in use is to be overwritten and is the only one, the key is kept in another meanwhile.

use diskmill_core::{Job, OptionError, Options, Result, SECTOR, Secrets, StorageMut};

use super::create::{ITER_TIME, slot_iterations, wrap};
use super::layout::{SALT_LEN, SLOT_LEN, SLOTS, SLOTS_AT};
use super::{LuksError, Place, Slot, Volume, VolumeKey};
use crate::crypt::random;

/// What is to become of key slots.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SlotChange {
    /// A new passphrase.
    Add {
        /// In this slot, else the first that is free.
        slot: Option<usize>,
        /// The name of the secret that holds it.
        new_secret: String,
        /// Milliseconds that opening the slot shall take.
        iter_time: u64,
    },
    /// A passphrase less.
    Erase {
        /// The one in this slot.
        slot: Option<usize>,
        /// The one in the secret of this name: all slots it opens, unless one is named.
        old_secret: Option<String>,
    },
}

impl SlotChange {
    /// The options it is made of, without a prefix.
    pub const OPTIONS: [&'static str; 5] = ["iter-time", "keyslot", "new-secret", "old-secret", "state"];

    /// Reads [`OPTIONS`](Self::OPTIONS), each behind `prefix`, and leaves others alone.
    pub fn parse(options: &Options, prefix: &str) -> Result<Self> {
        let name = |name: &str| format!("{prefix}{name}");
        let text = |option: &str| options.text(&name(option)).map(str::to_owned);
        let conflict = |text: &str| OptionError::Conflict(text.to_owned());
        let slot = match options.number(&name("keyslot"))? {
            None => None,
            Some(number) => match usize::try_from(number) {
                Ok(index) if index < SLOTS => Some(index),
                _ => return Err(LuksError::SlotNumber(number).into()),
            },
        };
        let iter_time = options.number(&name("iter-time"))?;
        let (new_secret, old_secret) = (text("new-secret"), text("old-secret"));
        match options.text(&name("state")) {
            Some("active") => match (new_secret, old_secret) {
                (_, Some(_)) => {
                    Err(conflict("'old-secret' must not be given when activating keyslots").into())
                }
                (None, None) => Err(conflict("'new-secret' is required to activate a keyslot").into()),
                (Some(new_secret), None) => Ok(Self::Add {
                    slot,
                    new_secret,
                    iter_time: iter_time.unwrap_or(ITER_TIME),
                }),
            },
            Some("inactive") => {
                if new_secret.is_some() {
                    return Err(conflict("'new-secret' must not be given when erasing keyslots").into());
                }
                if iter_time.is_some() {
                    return Err(conflict("'iter-time' must not be given when erasing keyslots").into());
                }
                if slot.is_none() && old_secret.is_none() {
                    return Err(conflict(
                        "to erase keyslot(s), either explicit keyslot index or the password currently contained in \
                         them must be given",
                    )
                    .into());
                }
                Ok(Self::Erase { slot, old_secret })
            }
            Some(value) => Err(OptionError::Value {
                name: "state".to_owned(),
                value: value.to_owned(),
                expected: "'active' or 'inactive'",
            }
            .into()),
            None => Err(conflict("parameter 'state' is missing").into()),
        }
    }
}

/// Makes `change` to the header at `place` in `file`. A new slot keeps `key`, which must be the header's.
///
/// `force` allows to overwrite an active slot and to erase the last. Everything is refused before anything is written,
/// with a [`LuksError`], and is durable afterwards.
pub fn change_slots(
    file: &dyn StorageMut,
    place: Place,
    change: &SlotChange,
    key: &VolumeKey,
    secrets: &Secrets,
    force: bool,
    job: Job<'_>,
) -> Result<()> {
    // Read again: what was opened may be older than the last change.
    let mut volume = Volume::load(file, place)?;
    match change {
        SlotChange::Add {
            slot,
            new_secret,
            iter_time,
        } => {
            let passphrase = secrets.named(new_secret)?;
            let index = volume.slot_to_fill(*slot, force)?;
            let iterations = slot_iterations(&volume.header, *iter_time, job)?;
            volume.replace(file, index, key, passphrase.as_bytes(), iterations, job)
        }
        SlotChange::Erase { slot, old_secret } => {
            let old = match old_secret {
                Some(id) => Some(secrets.named(id)?.as_bytes()),
                None => None,
            };
            for index in volume.slots_to_erase(file, *slot, old, force, job)? {
                volume.erase(file, index)?;
            }
            Ok(())
        }
    }
}

impl Volume {
    fn slot(&self, index: usize) -> Result<Slot, LuksError> {
        let slot = self.header.slots.get(index).copied();
        slot.ok_or(LuksError::SlotNumber(index as u64))
    }

    fn active(&self) -> impl Iterator<Item = usize> + '_ {
        let slots = self.header.slots.iter().enumerate();
        slots.filter(|(_, slot)| slot.active).map(|(index, _)| index)
    }

    fn free_slot(&self) -> Option<usize> {
        self.header.slots.iter().position(|slot| !slot.active)
    }

    fn slot_to_fill(&self, wanted: Option<usize>, force: bool) -> Result<usize, LuksError> {
        match wanted {
            None => self.free_slot().ok_or(LuksError::NoFreeSlot),
            Some(index) if self.slot(index)?.active && !force => Err(LuksError::SlotInUse(index)),
            Some(index) => Ok(index),
        }
    }

    fn slots_to_erase(
        &self,
        file: &dyn StorageMut,
        wanted: Option<usize>,
        old: Option<&[u8]>,
        force: bool,
        job: Job<'_>,
    ) -> Result<Vec<usize>> {
        let last = self.active().count() <= 1;
        let Some(old) = old else {
            let index = wanted.unwrap_or(SLOTS);
            return match self.slot(index)?.active {
                false if force => Ok(Vec::new()),
                false => Err(LuksError::SlotErased(index).into()),
                true if last && !force => Err(LuksError::LastSlot(index).into()),
                true => Ok(vec![index]),
            };
        };
        if let Some(index) = wanted {
            let slot = self.slot(index)?;
            if !slot.active {
                return match force {
                    true => Ok(Vec::new()),
                    false => Err(LuksError::SlotErased(index).into()),
                };
            }
            if self.try_slot(file, &slot, old, job)?.is_none() {
                return Err(LuksError::SlotOfAnother(index).into());
            }
            return match last && !force {
                true => Err(LuksError::LastSlot(index).into()),
                false => Ok(vec![index]),
            };
        }
        let mut matching = Vec::new();
        for index in self.active() {
            if self.try_slot(file, &self.slot(index)?, old, job)?.is_some() {
                matching.push(index);
            }
        }
        match matching.len() {
            0 => Err(LuksError::NoMatch.into()),
            all if all == self.active().count() && !force => Err(LuksError::LastSlots.into()),
            _ => Ok(matching),
        }
    }

    /// Puts a passphrase into a slot, whatever it holds.
    fn replace(
        &mut self,
        file: &dyn StorageMut,
        index: usize,
        key: &VolumeKey,
        passphrase: &[u8],
        iterations: u32,
        job: Job<'_>,
    ) -> Result<()> {
        let in_use = self.slot(index)?.active;
        let only = in_use && self.active().count() == 1;
        let refuge = if only { self.free_slot() } else { None };
        if let Some(refuge) = refuge {
            self.fill(file, refuge, key, passphrase, iterations, job)?;
        }
        if in_use {
            self.write_slot(file, index, erased(self.slot(index)?))?;
        }
        self.fill(file, index, key, passphrase, iterations, job)?;
        match refuge {
            Some(refuge) => self.erase(file, refuge),
            None => Ok(()),
        }
    }

    /// Puts a passphrase into a slot that is not active.
    fn fill(
        &mut self,
        file: &dyn StorageMut,
        index: usize,
        key: &VolumeKey,
        passphrase: &[u8],
        iterations: u32,
        job: Job<'_>,
    ) -> Result<()> {
        let slot = self.slot(index)?;
        if let Place::Embedded { len: have, .. } = self.place {
            // What lies behind the room for the header is another's.
            let end = slot
                .key_offset()
                .saturating_add(self.header.material_len().next_multiple_of(SECTOR));
            if end > have {
                let what = format!("the material of keyslot {index}");
                return Err(LuksError::Truncated { what, end, have }.into());
            }
        }
        let (slot, material) = wrap(&self.header, slot, key, passphrase, iterations, job)?;
        file.write_at(self.place.start().plus(slot.key_offset())?, &material)?;
        file.sync()?;
        self.write_slot(file, index, slot)
    }

    /// Makes a slot inactive, then destroys its material.
    ///
    /// Once: what is behind a file overwrites the same place only if it is a plain disk, for which once is enough, and
    /// else no number of times would help.
    fn erase(&mut self, file: &dyn StorageMut, index: usize) -> Result<()> {
        let slot = self.slot(index)?;
        self.write_slot(file, index, erased(slot))?;
        let mut chance = vec![0; usize::try_from(self.header.material_len()).unwrap_or(0)];
        random::fill(&mut chance)?;
        file.write_at(self.place.start().plus(slot.key_offset())?, &chance)?;
        file.sync()
    }

    /// Writes one entry, which no sector write tears in a way that touches another, and makes it durable.
    fn write_slot(&mut self, file: &dyn StorageMut, index: usize, slot: Slot) -> Result<()> {
        let at = SLOTS_AT.saturating_add(SLOT_LEN.saturating_mul(index)) as u64;
        file.write_at(self.place.start().plus(at)?, &slot.to_bytes())?;
        file.sync()?;
        if let Some(known) = self.header.slots.get_mut(index) {
            *known = slot;
        }
        Ok(())
    }
}

fn erased(slot: Slot) -> Slot {
    Slot {
        active: false,
        iterations: 0,
        salt: [0; SALT_LEN],
        ..slot
    }
}
