//! Which cipher, in which mode, with which initialisation vectors: names on the way in, checked values on the way out.

use std::fmt;

use super::CryptError;
use super::hash::HashAlg;

/// A block cipher with the length of its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum CipherAlg {
    /// AES, 128 bits.
    Aes128,
    /// AES, 192 bits.
    Aes192,
    /// AES, 256 bits.
    Aes256,
    /// Serpent, 128 bits.
    Serpent128,
    /// Serpent, 192 bits.
    Serpent192,
    /// Serpent, 256 bits.
    Serpent256,
    /// Twofish, 128 bits.
    Twofish128,
    /// Twofish, 192 bits.
    Twofish192,
    /// Twofish, 256 bits.
    Twofish256,
    /// CAST5 (CAST-128), 128 bits; its blocks have 8 bytes.
    Cast5,
}

impl CipherAlg {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::Aes128,
        Self::Aes192,
        Self::Aes256,
        Self::Serpent128,
        Self::Serpent192,
        Self::Serpent256,
        Self::Twofish128,
        Self::Twofish192,
        Self::Twofish256,
        Self::Cast5,
    ];

    /// The name options have for it: `aes-256`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Aes128 => "aes-128",
            Self::Aes192 => "aes-192",
            Self::Aes256 => "aes-256",
            Self::Serpent128 => "serpent-128",
            Self::Serpent192 => "serpent-192",
            Self::Serpent256 => "serpent-256",
            Self::Twofish128 => "twofish-128",
            Self::Twofish192 => "twofish-192",
            Self::Twofish256 => "twofish-256",
            Self::Cast5 => "cast5-128",
        }
    }

    /// The name a LUKS header has for its family: `aes`.
    pub const fn family(self) -> &'static str {
        match self {
            Self::Aes128 | Self::Aes192 | Self::Aes256 => "aes",
            Self::Serpent128 | Self::Serpent192 | Self::Serpent256 => "serpent",
            Self::Twofish128 | Self::Twofish192 | Self::Twofish256 => "twofish",
            Self::Cast5 => "cast5",
        }
    }

    /// Bytes of a key.
    pub const fn key_len(self) -> usize {
        match self {
            Self::Aes128 | Self::Serpent128 | Self::Twofish128 | Self::Cast5 => 16,
            Self::Aes192 | Self::Serpent192 | Self::Twofish192 => 24,
            Self::Aes256 | Self::Serpent256 | Self::Twofish256 => 32,
        }
    }

    /// Bytes of a block.
    pub const fn block_len(self) -> usize {
        match self {
            Self::Cast5 => 8,
            _ => 16,
        }
    }

    /// The cipher that options call `name`.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|alg| alg.name() == name)
    }

    /// The one of `family` with keys of `key_len` bytes.
    pub fn of_family(family: &str, key_len: usize) -> Result<Self, CryptError> {
        let mut known = Self::ALL
            .into_iter()
            .filter(|alg| alg.family() == family)
            .peekable();
        if known.peek().is_none() {
            return Err(CryptError::Cipher(family.to_owned()));
        }
        known
            .find(|alg| alg.key_len() == key_len)
            .ok_or_else(|| CryptError::KeyLen {
                cipher: family.to_owned(),
                len: key_len,
            })
    }
}

/// How the blocks of a sector hang together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum CipherMode {
    /// They do not: each is encrypted alone, which shows equal blocks.
    Ecb,
    /// Each is mixed with the one before.
    Cbc,
    /// Each is mixed with a number made of the sector and its place (IEEE 1619). Takes two keys.
    Xts,
    /// The cipher makes a key stream from a counter.
    Ctr,
}

impl CipherMode {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Ecb, Self::Cbc, Self::Xts, Self::Ctr];

    /// Its name, in options as in LUKS headers.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ecb => "ecb",
            Self::Cbc => "cbc",
            Self::Xts => "xts",
            Self::Ctr => "ctr",
        }
    }

    /// The mode called `name`.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|mode| mode.name() == name)
    }
}

/// How a sector's initialisation vector is made of its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum IvGen {
    /// The number's low 32 bits.
    Plain,
    /// The number.
    Plain64,
    /// The number, encrypted with a hash of the key.
    Essiv,
}

impl IvGen {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Plain, Self::Plain64, Self::Essiv];

    /// Its name, in options as in LUKS headers.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Plain64 => "plain64",
            Self::Essiv => "essiv",
        }
    }

    /// The generator called `name`.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|ivgen| ivgen.name() == name)
    }
}

/// A cipher, its mode and its initialisation vectors: a combination that works.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CipherSpec {
    alg: CipherAlg,
    mode: CipherMode,
    ivgen: IvGen,
    ivgen_hash: Option<HashAlg>,
    /// Encrypts the numbers for ESSIV: the variant of the cipher whose key is as long as the hash.
    essiv: Option<CipherAlg>,
}

impl CipherSpec {
    /// The combination, or what is wrong with it. A hash without use is kept, as headers keep it.
    pub fn new(
        alg: CipherAlg,
        mode: CipherMode,
        ivgen: IvGen,
        ivgen_hash: Option<HashAlg>,
    ) -> Result<Self, CryptError> {
        if mode == CipherMode::Xts && alg.block_len() != 16 {
            return Err(CryptError::XtsBlock(alg.name()));
        }
        let essiv = match (mode, ivgen, ivgen_hash) {
            (_, IvGen::Essiv, None) => return Err(CryptError::EssivHash),
            (CipherMode::Ecb, _, _) | (_, IvGen::Plain | IvGen::Plain64, _) => None,
            (_, IvGen::Essiv, Some(hash)) => Some(CipherAlg::of_family(alg.family(), hash.digest_len())?),
        };
        Ok(Self {
            alg,
            mode,
            ivgen,
            ivgen_hash,
            essiv,
        })
    }

    /// Reads the spelling of LUKS headers, cipher name and mode apart, for a key of `key_len` bytes:
    /// `aes` and `xts-plain64`, `cbc-essiv:sha256`.
    pub fn parse(name: &str, mode: &str, key_len: usize) -> Result<Self, CryptError> {
        let (mode_name, ivgen) = mode
            .split_once('-')
            .ok_or_else(|| CryptError::ModeFormat(mode.to_owned()))?;
        let (ivgen, hash) = match ivgen.split_once(':') {
            Some((ivgen, hash)) => (ivgen, Some(HashAlg::parse(hash)?)),
            None => (ivgen, None),
        };
        let mode = CipherMode::from_name(mode_name).ok_or_else(|| CryptError::Mode(mode_name.to_owned()))?;
        let ivgen = IvGen::from_name(ivgen).ok_or_else(|| CryptError::IvGen(ivgen.to_owned()))?;
        let alg_len = if mode == CipherMode::Xts && key_len.is_multiple_of(2) {
            key_len / 2
        } else {
            key_len
        };
        let alg = CipherAlg::of_family(name, alg_len).map_err(|error| match error {
            CryptError::KeyLen { cipher, .. } => CryptError::KeyLen { cipher, len: key_len },
            other => other,
        })?;
        Self::new(alg, mode, ivgen, hash)
    }

    /// The cipher.
    pub const fn alg(&self) -> CipherAlg {
        self.alg
    }

    /// Its mode.
    pub const fn mode(&self) -> CipherMode {
        self.mode
    }

    /// How initialisation vectors are made.
    pub const fn ivgen(&self) -> IvGen {
        self.ivgen
    }

    /// The hash named beside the generator; only ESSIV uses it.
    pub const fn ivgen_hash(&self) -> Option<HashAlg> {
        self.ivgen_hash
    }

    /// The cipher that encrypts sector numbers and the hash that makes its key, where ESSIV is in use.
    pub(super) fn essiv(&self) -> Option<(CipherAlg, HashAlg)> {
        self.essiv.zip(self.ivgen_hash)
    }

    /// Bytes of the volume key: two cipher keys for XTS.
    pub const fn key_len(&self) -> usize {
        match self.mode {
            CipherMode::Xts => self.alg.key_len().saturating_mul(2),
            _ => self.alg.key_len(),
        }
    }

    /// The mode as LUKS headers spell it: `cbc-essiv:sha256`.
    pub fn luks_mode(&self) -> String {
        let (mode, ivgen) = (self.mode.name(), self.ivgen.name());
        match self.ivgen_hash {
            Some(hash) => format!("{mode}-{ivgen}:{}", hash.name()),
            None => format!("{mode}-{ivgen}"),
        }
    }
}

impl fmt::Display for CipherSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.alg.name(), self.luks_mode())
    }
}
