//! Guest data of an encrypted image: which number a sector has, for reading and writing alike.

use std::sync::Arc;

use diskmill_core::{GuestOffset, HostOffset, Result, SECTOR, Sealer};

use super::sector::SectorCipher;

/// What sectors are numbered by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Numbering {
    /// Their place in the virtual disk: the old AES encryption.
    Guest,
    /// Their place in the file, counted from here: LUKS. Standalone that is the start of the payload, inside qcow2 the
    /// start of the file.
    Host(HostOffset),
}

/// Encrypts and decrypts guest data where it is stored.
#[derive(Clone, Debug)]
pub struct DataCipher {
    cipher: Arc<SectorCipher>,
    numbering: Numbering,
}

impl DataCipher {
    /// Data under `cipher`, with sectors numbered by `numbering`.
    pub fn new(cipher: Arc<SectorCipher>, numbering: Numbering) -> Self {
        Self { cipher, numbering }
    }

    /// The cipher.
    pub fn cipher(&self) -> &SectorCipher {
        &self.cipher
    }

    /// Encrypts `bytes`, whole sectors of the disk from `guest` on, stored at `host`.
    pub fn encrypt(&self, guest: GuestOffset, host: HostOffset, bytes: &mut [u8]) -> Result<()> {
        self.cipher.encrypt(self.first_sector(guest, host), bytes)
    }

    /// Decrypts what was read at `host`, whole sectors of the disk from `guest` on.
    pub fn decrypt(&self, guest: GuestOffset, host: HostOffset, bytes: &mut [u8]) -> Result<()> {
        self.cipher.decrypt(self.first_sector(guest, host), bytes)
    }

    fn first_sector(&self, guest: GuestOffset, host: HostOffset) -> u64 {
        match self.numbering {
            Numbering::Guest => guest.get() / SECTOR,
            Numbering::Host(start) => host.since(start) / SECTOR,
        }
    }
}

impl Sealer for DataCipher {
    fn seal(&self, guest: GuestOffset, host: HostOffset, bytes: &mut [u8]) -> Result<()> {
        self.encrypt(guest, host, bytes)
    }
}
