//! The options of a new image, checked.

use diskmill_core::{
    CreateSpec, Error, ErrorKind, Format, OptionError, OptionKind, OptionSpec, Result, SECTOR, Secret,
    SecretError,
};

use super::KEY_SECRET;
use crate::crypt::luks;
use crate::preallocation::{self, Preallocation};

/// The options of a new image, in the order `create` prints them.
pub(super) static OPTIONS: &[OptionSpec] = &[
    OptionSpec {
        name: "size",
        kind: OptionKind::Size,
        default: None,
        help: "Bytes of the virtual disk",
    },
    OptionSpec {
        name: KEY_SECRET,
        kind: OptionKind::Text,
        default: None,
        help: "The secret that holds the passphrase",
    },
    OptionSpec {
        name: "cipher-alg",
        kind: OptionKind::Text,
        default: None,
        help: "Cipher: aes-128, aes-192, aes-256 (the default), serpent-..., twofish-... or cast5-128",
    },
    OptionSpec {
        name: "cipher-mode",
        kind: OptionKind::Text,
        default: None,
        help: "Mode of the cipher: xts (the default), cbc, ctr or ecb",
    },
    OptionSpec {
        name: "ivgen-alg",
        kind: OptionKind::Text,
        default: None,
        help: "What sectors are told apart by: plain64 (the default), plain or essiv",
    },
    OptionSpec {
        name: "ivgen-hash-alg",
        kind: OptionKind::Text,
        default: None,
        help: "Hash for essiv: sha256 unless another is named",
    },
    OptionSpec {
        name: "hash-alg",
        kind: OptionKind::Text,
        default: None,
        help: "Hash that makes keys of passphrases: sha256 unless another is named",
    },
    OptionSpec {
        name: "iter-time",
        kind: OptionKind::Number,
        default: None,
        help: "Milliseconds that trying a passphrase is to take: 2000 unless another number is given",
    },
    OptionSpec {
        name: "nocow",
        kind: OptionKind::Bool,
        default: None,
        help: "Ask the file system not to copy on write (btrfs)",
    },
    OptionSpec {
        name: preallocation::OPTION,
        kind: OptionKind::Text,
        default: None,
        help: "Space taken at once: off, metadata (which is none), falloc or full",
    },
    OptionSpec {
        name: "extent_size_hint",
        kind: OptionKind::Size,
        default: None,
        help: "Step in which the file system allocates; 0 for its own",
    },
];

/// A new image that can be made.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    /// Its header.
    pub(super) header: luks::Plan,
    /// Bytes of the disk.
    pub(super) size: u64,
    /// Where the file ends.
    pub(super) end: u64,
    /// Space taken at once.
    pub(super) preallocation: Preallocation,
    pub(super) nocow: bool,
    pub(super) extent_size_hint: Option<u64>,
}

/// A disk that does not fit in a file behind the header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("size is {0}, must leave the file below 2^63 bytes")]
struct TooLarge(u64);

impl Plan {
    /// Checks all of `spec` but whether there is a passphrase.
    pub(super) fn new(spec: &CreateSpec) -> Result<Self> {
        let options = &spec.options;
        options.only(OPTIONS)?;
        if spec.backing.is_some() {
            let text = "luks images have no backing file".to_owned();
            return Err(Error::from(OptionError::Conflict(text)).format(Format::Luks));
        }
        if spec.compression.is_some() {
            let text = "luks images are not compressed";
            return Err(Error::new(ErrorKind::Unsupported, text).format(Format::Luks));
        }
        let header = luks::Plan::parse(options, "")?;
        let size = spec.virtual_size;
        let end = size
            .checked_next_multiple_of(SECTOR)
            .and_then(|size| size.checked_add(header.header_len()))
            .filter(|end| *end <= i64::MAX as u64)
            .ok_or_else(|| Error::new(ErrorKind::Unsupported, TooLarge(size)).format(Format::Luks))?;
        Ok(Self {
            size: size.next_multiple_of(SECTOR),
            end,
            // There are no tables, but QEMU takes that too.
            preallocation: Preallocation::from_options(options, true)?,
            nocow: options.bool("nocow")?.unwrap_or(false),
            extent_size_hint: options.size("extent_size_hint")?,
            header,
        })
    }

    /// The passphrase it is to have.
    pub(super) fn passphrase(&self, spec: &CreateSpec) -> Result<Secret> {
        match spec.secrets.find(self.header.key_secret())? {
            Some(passphrase) => Ok(passphrase),
            None => Err(Error::from(SecretError::Missing(KEY_SECRET)).format(Format::Luks)),
        }
    }
}
