//! The key of an encrypted image: looked for when the image is opened if a secret is named, else once data is needed.

use std::sync::{Arc, OnceLock};

use diskmill_core::{
    Error, ErrorKind, Format, OpenSpec, OptionError, Options, Result, Secret, SecretError, Secrets,
};

use super::header::CryptMethod;
use super::options::CreateError;
use crate::crypt::{DataCipher, Numbering, legacy};
use crate::qcow2::EncryptionError;

/// Option: what an image is encrypted with.
pub(super) const FORMAT: &str = "encrypt.format";
/// Option: the id of the secret that is the password.
pub(super) const KEY_SECRET: &str = "encrypt.key-secret";

/// The key of one image.
#[derive(Debug)]
pub(super) struct Key {
    secrets: Secrets,
    cipher: OnceLock<Arc<DataCipher>>,
}

/// What cannot be done with the encryption of an image.
pub(super) fn refuse(error: EncryptionError) -> Error {
    let kind = match error {
        EncryptionError::Compressed => ErrorKind::Unsupported,
        _ => ErrorKind::Usage,
    };
    Error::new(kind, error).format(Format::Qcow)
}

fn cipher(secret: &Secret) -> Result<Arc<DataCipher>> {
    let sectors = legacy::qcow_aes(secret.as_bytes())?;
    Ok(Arc::new(DataCipher::new(Arc::new(sectors), Numbering::Guest)))
}

/// Fails on options that no image of this format knows.
pub(super) fn check_options(options: &Options) -> Result<(), OptionError> {
    match options
        .iter()
        .find(|(name, _)| ![FORMAT, KEY_SECRET].contains(name))
    {
        Some((name, _)) => Err(OptionError::Unknown(name.to_owned())),
        None => Ok(()),
    }
}

impl Key {
    /// The key of an image that is encrypted by `method`, if it is.
    pub(super) fn of(method: CryptMethod, how: &OpenSpec) -> Result<Option<Self>> {
        let said = how.options.text(FORMAT);
        match (method, said) {
            (CryptMethod::None, Some(said)) => {
                return Err(refuse(EncryptionError::NotEncrypted(said.to_owned())));
            }
            (CryptMethod::None, None) => return Ok(None),
            (CryptMethod::Aes, Some(said)) if said != "aes" => {
                let asked = said.to_owned();
                return Err(refuse(EncryptionError::OtherFormat { found: "aes", asked }));
            }
            (CryptMethod::Aes, _) => {}
        }
        let key = Self {
            secrets: how.secrets.clone(),
            cipher: OnceLock::new(),
        };
        if let Some(id) = how.options.text(KEY_SECRET) {
            let named = cipher(how.secrets.named(id)?)?;
            key.cipher.get_or_init(|| named);
        }
        Ok(Some(key))
    }

    /// What data is encrypted with. An error with [`SecretError::Missing`] if nobody says a password.
    pub(super) fn get(&self) -> Result<&Arc<DataCipher>> {
        if let Some(known) = self.cipher.get() {
            return Ok(known);
        }
        let secret = self.secrets.find(None)?.ok_or(SecretError::Missing(KEY_SECRET))?;
        let found = cipher(&secret)?;
        Ok(self.cipher.get_or_init(|| found))
    }
}

/// The cipher of a new image, if it is to have one.
pub(super) fn for_new(options: &Options, secrets: &Secrets) -> Result<Option<Arc<DataCipher>>> {
    let (format, id) = (options.text(FORMAT), options.text(KEY_SECRET));
    match (format, options.text("encryption"), options.bool("encryption")?) {
        (Some(_), Some(_), Some(true)) => return Err(CreateError::EncryptionTwice.into()),
        (Some("aes"), _, _) | (None, _, Some(true)) => {}
        (Some(other), _, _) => return Err(CreateError::EncryptionFormat(other.to_owned()).into()),
        (None, _, _) if id.is_some() => return Err(CreateError::EncryptionFormatMissing.into()),
        (None, _, _) => return Ok(None),
    }
    let secret = secrets.find(id)?.ok_or(SecretError::Missing(KEY_SECRET))?;
    cipher(&secret).map(Some)
}
