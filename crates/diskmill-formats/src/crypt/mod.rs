//! Encryption shared by formats: sectors under a cipher, keys from passphrases, and the LUKS header that keeps keys.
//!
//! Keys are wiped from memory when they are dropped; nothing here prints one, nor puts one into an error.

pub mod af;
mod block;
pub mod cipher;
mod data;
pub mod hash;
pub mod kdf;
pub mod legacy;
pub mod luks;
pub mod luks2;
mod random;
mod sector;
mod twofish;
pub mod wrapped;

#[cfg(test)]
mod tests;

use diskmill_core::{Error, ErrorKind};

pub use cipher::{CipherAlg, CipherMode, CipherSpec, IvGen};
pub use data::{DataCipher, Numbering};
pub use hash::HashAlg;
pub use sector::SectorCipher;

/// What is wrong with a choice of ciphers, or with a key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CryptError {
    /// No cipher of this name.
    #[error("cipher '{0}' is not supported, must be aes, serpent, twofish or cast5")]
    Cipher(String),
    /// The cipher takes no key of this length.
    #[error("a key of {len} bytes does not suit the cipher {cipher} in its mode")]
    KeyLen {
        /// The cipher's family.
        cipher: String,
        /// The length of the key, in bytes.
        len: usize,
    },
    /// No mode of this name.
    #[error("cipher mode '{0}' is not supported, must be ecb, cbc, xts or ctr")]
    Mode(String),
    /// The mode is not two words.
    #[error("unexpected cipher mode string format '{0}', must be like xts-plain64")]
    ModeFormat(String),
    /// No generator of this name.
    #[error("initialisation vector generator '{0}' is not supported, must be plain, plain64 or essiv")]
    IvGen(String),
    /// No hash of this name.
    #[error(
        "hash '{0}' is not supported, must be md5, sha1, sha224, sha256, sha384, sha512, ripemd160 or sm3"
    )]
    Hash(String),
    /// ESSIV without a hash.
    #[error("the initialisation vector generator essiv needs a hash")]
    EssivHash,
    /// XTS with short blocks.
    #[error("cipher mode xts needs blocks of 16 bytes, which {0} has not")]
    XtsBlock(&'static str),
    /// Sectors of a length nobody uses.
    #[error("the length of encrypted sectors is {0}, must be 512, 1024, 2048 or 4096")]
    SectorLen(u64),
    /// Too few iterations, or so many that it would take forever.
    #[error("the number of PBKDF2 iterations is {0}, must be 1 to {max}", max = kdf::MAX_ITERATIONS)]
    Iterations(u64),
    /// Many slots that are each dear.
    #[error("all key slots together take too long to try")]
    Budget,
    /// A time that needs too many iterations.
    #[error("iter-time is {0}, which takes more PBKDF2 iterations than {max}", max = kdf::MAX_ITERATIONS)]
    IterTime(u64),
    /// A password that no key can be derived from.
    #[error("the password cannot be used")]
    Password,
}

impl CryptError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Cipher(_) | Self::Mode(_) | Self::IvGen(_) | Self::Hash(_) => ErrorKind::Unsupported,
            Self::IterTime(_) | Self::Password => ErrorKind::Usage,
            _ => ErrorKind::Malformed,
        }
    }
}

impl From<CryptError> for Error {
    fn from(error: CryptError) -> Self {
        Error::new(error.kind(), error)
    }
}
