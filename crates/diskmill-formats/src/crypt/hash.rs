//! Hash functions, by the names that options and headers have for them.

use digest::Digest;
use hmac::digest;
use zeroize::Zeroizing;

use super::CryptError;

/// A hash function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum HashAlg {
    /// MD5.
    Md5,
    /// SHA-1.
    Sha1,
    /// SHA-224.
    Sha224,
    /// SHA-256.
    Sha256,
    /// SHA-384.
    Sha384,
    /// SHA-512.
    Sha512,
    /// RIPEMD-160.
    Ripemd160,
    /// SM3.
    Sm3,
}

/// Runs `$body` with `$hash` standing for the type of the function.
macro_rules! with_hash {
    ($alg:expr, $hash:ident => $body:expr) => {
        match $alg {
            $crate::crypt::hash::HashAlg::Md5 => {
                type $hash = md5::Md5;
                $body
            }
            $crate::crypt::hash::HashAlg::Sha1 => {
                type $hash = sha1::Sha1;
                $body
            }
            $crate::crypt::hash::HashAlg::Sha224 => {
                type $hash = sha2::Sha224;
                $body
            }
            $crate::crypt::hash::HashAlg::Sha256 => {
                type $hash = sha2::Sha256;
                $body
            }
            $crate::crypt::hash::HashAlg::Sha384 => {
                type $hash = sha2::Sha384;
                $body
            }
            $crate::crypt::hash::HashAlg::Sha512 => {
                type $hash = sha2::Sha512;
                $body
            }
            $crate::crypt::hash::HashAlg::Ripemd160 => {
                type $hash = ripemd::Ripemd160;
                $body
            }
            $crate::crypt::hash::HashAlg::Sm3 => {
                type $hash = sm3::Sm3;
                $body
            }
        }
    };
}
pub(super) use with_hash;

impl HashAlg {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Md5,
        Self::Sha1,
        Self::Sha224,
        Self::Sha256,
        Self::Sha384,
        Self::Sha512,
        Self::Ripemd160,
        Self::Sm3,
    ];

    /// Its name, in options as in LUKS headers.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Md5 => "md5",
            Self::Sha1 => "sha1",
            Self::Sha224 => "sha224",
            Self::Sha256 => "sha256",
            Self::Sha384 => "sha384",
            Self::Sha512 => "sha512",
            Self::Ripemd160 => "ripemd160",
            Self::Sm3 => "sm3",
        }
    }

    /// The function called `name`.
    pub fn parse(name: &str) -> Result<Self, CryptError> {
        Self::ALL
            .into_iter()
            .find(|hash| hash.name() == name)
            .ok_or_else(|| CryptError::Hash(name.to_owned()))
    }

    /// Bytes of a digest.
    pub const fn digest_len(self) -> usize {
        match self {
            Self::Md5 => 16,
            Self::Sha1 | Self::Ripemd160 => 20,
            Self::Sha224 => 28,
            Self::Sha256 | Self::Sm3 => 32,
            Self::Sha384 => 48,
            Self::Sha512 => 64,
        }
    }

    /// The digest of `parts`, one behind the other.
    pub fn digest(self, parts: &[&[u8]]) -> Zeroizing<Vec<u8>> {
        with_hash!(self, H => {
            let mut state = H::new();
            for part in parts {
                state.update(part);
            }
            Zeroizing::new(state.finalize().to_vec())
        })
    }
}
