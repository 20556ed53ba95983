//! What `-o encrypt.*` says of a new image.

use diskmill_core::{OptionError, Options, Result, Secret, Secrets};

use super::CreateError;
use crate::crypt::luks;
use crate::qcow2::crypto::{FORMAT, KEY_SECRET, missing};
use crate::qcow2::header::CryptMethod;

/// What all options of the encryption begin with.
const PREFIX: &str = "encrypt.";
/// The old spelling of `encrypt.format=aes`.
const OLD: &str = "encryption";

/// The encryption of a new image.
#[derive(Clone, Debug)]
pub(crate) enum Encryption {
    /// None.
    None,
    /// The old AES, with the secret of this name.
    Aes(Option<String>),
    /// LUKS.
    Luks(luks::Plan),
}

impl Encryption {
    /// What `options` ask for.
    pub(super) fn from_options(options: &Options) -> Result<Self> {
        let old = options.bool(OLD)? == Some(true);
        let secret = options.text(KEY_SECRET).map(str::to_owned);
        let mut details = options.iter().map(|(name, _)| name);
        match options.text(FORMAT) {
            Some(_) if old => Err(CreateError::EncryptionTwice.into()),
            None if !old => match details.find(|name| name.starts_with(PREFIX)) {
                Some(name) => Err(CreateError::NoEncryptFormat(name.to_owned()).into()),
                None => Ok(Self::None),
            },
            None | Some("aes") => {
                let known = |name: &&str| [FORMAT, KEY_SECRET].contains(name) || !name.starts_with(PREFIX);
                match details.find(|name| !known(name)) {
                    Some(name) => Err(CreateError::NotOfAes(name.to_owned()).into()),
                    None => Ok(Self::Aes(secret)),
                }
            }
            Some("luks") => Ok(Self::Luks(luks::Plan::parse(options, PREFIX)?)),
            Some(other) => Err(OptionError::Value {
                name: "format".to_owned(),
                value: other.to_owned(),
                expected: "aes or luks",
            }
            .into()),
        }
    }

    /// What the header says of it.
    pub(crate) fn method(&self) -> CryptMethod {
        match self {
            Self::None => CryptMethod::None,
            Self::Aes(_) => CryptMethod::Aes,
            Self::Luks(_) => CryptMethod::Luks,
        }
    }

    /// Bytes of a header of its own, before they are rounded to clusters.
    pub(crate) fn header_len(&self) -> u64 {
        match self {
            Self::Luks(plan) => plan.header_len(),
            Self::None | Self::Aes(_) => 0,
        }
    }

    fn key_secret(&self) -> Option<&str> {
        match self {
            Self::None => None,
            Self::Aes(secret) => secret.as_deref(),
            Self::Luks(plan) => plan.key_secret(),
        }
    }

    /// Fails if there will be no passphrase. Nobody is asked.
    pub(crate) fn check(&self, secrets: &Secrets) -> Result<()> {
        match (self, self.key_secret()) {
            (Self::None, _) => Ok(()),
            (_, Some(id)) => secrets.named(id).map(drop),
            (_, None) if secrets.offer(None) => Ok(()),
            (_, None) => Err(missing()),
        }
    }

    /// The passphrase.
    pub(crate) fn passphrase(&self, secrets: &Secrets) -> Result<Secret> {
        secrets.find(self.key_secret())?.ok_or_else(missing)
    }
}
