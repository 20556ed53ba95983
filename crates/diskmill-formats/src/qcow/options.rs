//! The options of a new image, checked.

use std::sync::Arc;

use diskmill_core::{
    CreateSpec, Error, ErrorKind, Format, HostOffset, OptionKind, OptionSpec, Result, SECTOR,
};

use super::header::{CryptMethod, Header, check_size};
use super::key;
use super::layout::{BACKING_NAME_MAX, HEADER_LEN};
use super::map::Geometry;
use crate::codec::Codec;
use crate::crypt::DataCipher;
use crate::qcow2::EncryptionError;

const fn option(name: &'static str, kind: OptionKind, help: &'static str) -> OptionSpec {
    OptionSpec {
        name,
        kind,
        default: None,
        help,
    }
}

/// The options of a new image, in the order `create` prints them; `help` lists them by name.
pub(super) static OPTIONS: &[OptionSpec] = &[
    option("size", OptionKind::Size, "Bytes of the virtual disk"),
    option("backing_file", OptionKind::Text, "Image this one is backed by"),
    option("backing_fmt", OptionKind::Text, "Format of the backing image"),
    option(
        "encryption",
        OptionKind::Bool,
        "Encrypt with AES; the old spelling of encrypt.format=aes",
    ),
    option(key::FORMAT, OptionKind::Text, "Encrypt the data: aes"),
    option(
        key::KEY_SECRET,
        OptionKind::Text,
        "Secret object that holds the password",
    ),
];

/// Why there can be no such image.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CreateError {
    /// A disk without a byte: the format cannot say that.
    #[error("size is 0, must be at least 1")]
    Empty,
    /// A name the header has no room for.
    #[error("the name of the backing file has {0} bytes, must have 1 to 1023")]
    BackingName(usize),
    /// An encryption that the format has not.
    #[error("encrypt.format is '{0}', must be aes")]
    EncryptionFormat(String),
    /// A password without saying what for.
    #[error("encrypt.key-secret needs encrypt.format")]
    EncryptionFormatMissing,
    /// The encryption in both spellings.
    #[error("encryption is the old spelling of encrypt.format, and cannot be given with it")]
    EncryptionTwice,
}

impl From<CreateError> for Error {
    fn from(error: CreateError) -> Self {
        Error::new(ErrorKind::Usage, error).format(Format::Qcow)
    }
}

/// A new image that can be made.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    /// The header it will have.
    pub(super) header: Header,
    /// The name of its backing file.
    pub(super) name: Vec<u8>,
    /// How its clusters are compressed, if they are.
    pub(super) codec: Option<Codec>,
    /// What its data is encrypted with.
    pub(super) cipher: Option<Arc<DataCipher>>,
}

/// Fails unless `name` can be the name of a backing file.
pub(super) fn check_name(name: &str) -> Result<(), CreateError> {
    let most = usize::try_from(BACKING_NAME_MAX).unwrap_or(usize::MAX);
    match name.len() {
        len if len == 0 || len > most => Err(CreateError::BackingName(len)),
        _ => Ok(()),
    }
}

impl Plan {
    /// Checks all of `spec`.
    pub(super) fn new(spec: &CreateSpec) -> Result<Self> {
        let options = &spec.options;
        options.only(OPTIONS)?;
        if spec.virtual_size == 0 {
            return Err(CreateError::Empty.into());
        }
        let size = spec
            .virtual_size
            .checked_next_multiple_of(SECTOR)
            .unwrap_or(u64::MAX);
        let geometry = match spec.backing {
            Some(_) => Geometry::OVERLAY,
            None => Geometry::PLAIN,
        };
        check_size(size, geometry)?;
        let mut header = Header::new(size, geometry);
        let name = spec.backing.as_ref().map_or("", |backing| &backing.name);
        if spec.backing.is_some() {
            check_name(name)?;
            let len = u32::try_from(name.len()).unwrap_or(u32::MAX);
            header.backing = Some((HostOffset::new(HEADER_LEN), len));
            let end = HEADER_LEN.saturating_add(len.into());
            header.l1_table_offset = HostOffset::new(end.next_multiple_of(8));
        }
        let cipher = key::for_new(options, &spec.secrets)?;
        if cipher.is_some() {
            header.crypt = CryptMethod::Aes;
        }
        let codec = match spec.compression {
            Some(_) if cipher.is_some() => return Err(key::refuse(EncryptionError::Compressed)),
            Some(how) => Some(Codec::deflate(how.level, geometry.cluster_size())?),
            None => None,
        };
        Ok(Self {
            header,
            name: name.as_bytes().to_vec(),
            codec,
            cipher,
        })
    }

    /// Where the L1 table ends: sectors of it are written whole.
    pub(super) fn front_end(&self) -> u64 {
        let len = self.header.l1_len().next_multiple_of(SECTOR);
        self.header.l1_table_offset.get().saturating_add(len)
    }
}
