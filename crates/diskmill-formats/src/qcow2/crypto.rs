//! Encryption of guest data: which cipher an image has, and whether there is a key for it.
//!
//! Tables, bitmaps and compressed clusters are never encrypted. The old AES numbers sectors as the guest counts, LUKS by
//! their place in the file that holds them, so that what moves must be encrypted anew. Zeros that nobody wrote are no
//! zeros here: what has a place must be written whole, or be said to read as zeros.

use diskmill_core::{
    Error, ErrorKind, Format, GuestOffset, HostOffset, Job, OpenSpec, Result, SECTOR, Secret, SecretError,
    Storage, StorageMut,
};

use super::header::{CryptMethod, Header};
use super::layer::within;
use crate::crypt::luks::{Place, Volume, VolumeKey};
use crate::crypt::{DataCipher, Numbering, legacy};

/// The option that names the secret.
pub(crate) const KEY_SECRET: &str = "encrypt.key-secret";
/// The option that names the format.
pub(crate) const FORMAT: &str = "encrypt.format";

/// What is wrong with the encryption of an image. Reached by [`Error::find`](diskmill_core::Error::find).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EncryptionError {
    /// The image is encrypted in another way than was said.
    #[error("encrypt.format is '{asked}', the image is encrypted with '{found}'")]
    OtherFormat {
        /// What the header says.
        found: &'static str,
        /// What the option says.
        asked: String,
    },
    /// The image is not encrypted.
    #[error("encrypt.format is '{0}', the image is not encrypted")]
    NotEncrypted(String),
    /// Compressed clusters cannot be encrypted.
    #[error("compression and encryption are not supported at the same time")]
    Compressed,
}

impl EncryptionError {
    pub(crate) fn refuse(self) -> Error {
        let kind = match self {
            Self::Compressed => ErrorKind::Unsupported,
            _ => ErrorKind::Usage,
        };
        Error::new(kind, self).format(Format::Qcow2)
    }
}

/// How guest data is stored.
#[derive(Clone, Debug)]
pub(crate) enum Sealing {
    /// As it is.
    Plain,
    /// Encrypted, and there is no key.
    Locked,
    /// Encrypted, and there is a key.
    Keyed {
        /// For the data.
        cipher: DataCipher,
        /// The key that a LUKS header keeps.
        key: Option<VolumeKey>,
    },
}

impl Sealing {
    /// That of the image in `main`. Without a secret it is locked; with a wrong one that can be told this fails.
    pub(crate) fn of(header: &Header, main: &dyn Storage, how: &OpenSpec) -> Result<Self> {
        let asked = how.options.text(FORMAT);
        let found = match (header.crypt_method, asked) {
            (CryptMethod::None, None) => return Ok(Self::Plain),
            (CryptMethod::None, Some(asked)) => {
                return Err(EncryptionError::NotEncrypted(asked.to_owned()).refuse());
            }
            (method, _) => method.name(),
        };
        if let Some(asked) = asked.filter(|asked| *asked != found) {
            let asked = asked.to_owned();
            return Err(EncryptionError::OtherFormat { found, asked }.refuse());
        }
        if let Some(place) = header.encryption() {
            within("encryption header", place.offset, place.length, main.len()?)?;
        }
        match how.secrets.find(how.options.text(KEY_SECRET))? {
            None => Ok(Self::Locked),
            Some(secret) => Self::unlock(header, main, &secret),
        }
    }

    fn unlock(header: &Header, main: &dyn Storage, secret: &Secret) -> Result<Self> {
        match place_of(header) {
            Some(place) if header.crypt_method == CryptMethod::Luks => {
                let volume = Volume::load(main, place)?;
                let key = volume.unlock(main, secret.as_bytes(), Job::silent())?;
                Self::luks(key)
            }
            _ => Self::aes(secret),
        }
    }

    /// LUKS with this volume key.
    pub(crate) fn luks(key: VolumeKey) -> Result<Self> {
        let cipher = DataCipher::new(key.cipher()?.into(), Numbering::Host(HostOffset::ZERO));
        Ok(Self::Keyed {
            cipher,
            key: Some(key),
        })
    }

    /// The old AES encryption with `secret`.
    pub(crate) fn aes(secret: &Secret) -> Result<Self> {
        let cipher = legacy::qcow_aes(secret.as_bytes())?;
        Ok(Self::Keyed {
            cipher: DataCipher::new(cipher.into(), Numbering::Guest),
            key: None,
        })
    }

    /// Whether guest data is encrypted.
    pub(crate) fn is_encrypted(&self) -> bool {
        !matches!(self, Self::Plain)
    }

    /// The cipher, if data is encrypted. An error with [`SecretError::Missing`] if there is no key.
    pub(crate) fn cipher(&self) -> Result<Option<&DataCipher>> {
        match self {
            Self::Plain => Ok(None),
            Self::Locked => Err(missing()),
            Self::Keyed { cipher, .. } => Ok(Some(cipher)),
        }
    }

    /// The key that a LUKS header keeps. An error with [`SecretError::Missing`] if it is not known.
    pub(crate) fn volume_key(&self) -> Result<&VolumeKey> {
        match self {
            Self::Keyed { key: Some(key), .. } => Ok(key),
            _ => Err(missing()),
        }
    }

    /// Fills `buf` with guest bytes from `guest` on that are stored at `host`. `read` reads the file.
    pub(crate) fn read(
        &self,
        guest: GuestOffset,
        host: HostOffset,
        buf: &mut [u8],
        read: impl Fn(HostOffset, &mut [u8]) -> Result<()>,
    ) -> Result<()> {
        let Some(cipher) = self.cipher()? else {
            return read(host, buf);
        };
        let lead = host.within(SECTOR);
        let whole = lead.saturating_add(buf.len() as u64).next_multiple_of(SECTOR);
        if whole == buf.len() as u64 {
            read(host, buf)?;
            return cipher.decrypt(guest, host, buf);
        }
        let (guest, host) = (guest.align_down(SECTOR), host.align_down(SECTOR));
        let mut sectors = vec![0; usize::try_from(whole).map_err(|_| Error::bare(ErrorKind::Unsupported))?];
        read(host, &mut sectors)?;
        cipher.decrypt(guest, host, &mut sectors)?;
        let wanted = sectors.iter().skip(usize::try_from(lead).unwrap_or(usize::MAX));
        for (byte, value) in buf.iter_mut().zip(wanted) {
            *byte = *value;
        }
        Ok(())
    }

    /// Encrypts what was stored at `old` for the place `new`, whole sectors.
    pub(crate) fn renew(&self, old: HostOffset, new: HostOffset, bytes: &mut [u8]) -> Result<()> {
        match self {
            // The old AES numbers sectors as the guest counts: they are the same everywhere.
            Self::Plain | Self::Keyed { key: None, .. } => Ok(()),
            Self::Locked => Err(missing()),
            Self::Keyed { cipher, key: Some(_) } => {
                cipher.decrypt(GuestOffset::ZERO, old, bytes)?;
                cipher.encrypt(GuestOffset::ZERO, new, bytes)
            }
        }
    }

    /// Writes zeros, whole sectors, that read as such: encrypted if data is.
    pub(crate) fn write_zeros(
        &self,
        file: &dyn StorageMut,
        guest: GuestOffset,
        host: HostOffset,
        len: u64,
    ) -> Result<()> {
        const PIECE: u64 = 256 << 10;
        let mut done = 0;
        let mut piece = Vec::new();
        while done < len {
            piece.clear();
            piece.resize(
                usize::try_from(PIECE.min(len.saturating_sub(done))).unwrap_or(0),
                0,
            );
            let (guest, host) = (guest.plus(done)?, host.plus(done)?);
            if let Some(cipher) = self.cipher()? {
                cipher.encrypt(guest, host, &mut piece)?;
            }
            file.write_at(host, &piece)?;
            done = done.saturating_add(piece.len() as u64);
        }
        Ok(())
    }
}

/// There is no key.
pub(crate) fn missing() -> Error {
    Error::from(SecretError::Missing(KEY_SECRET)).format(Format::Qcow2)
}

/// Where the LUKS header is.
pub(crate) fn place_of(header: &Header) -> Option<Place> {
    header.encryption().map(|place| Place::Embedded {
        at: place.offset,
        len: place.length,
    })
}
