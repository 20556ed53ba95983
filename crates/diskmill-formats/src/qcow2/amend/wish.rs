//! What is asked for, checked against what there is.

use diskmill_core::{Error, ErrorKind, Format, OptionError, OptionKind, OptionSpec, Options, Result, SECTOR};

use crate::crypt::luks::SlotChange;
use crate::qcow2::extension::Extension;
use crate::qcow2::header::{Autoclear, Compatible, CryptMethod, Header, RefcountOrder, Version};
use crate::qcow2::layout::BACKING_NAME_MAX;
use crate::qcow2::options;

const fn option(name: &'static str, kind: OptionKind, help: &'static str) -> OptionSpec {
    OptionSpec {
        name,
        kind,
        default: None,
        help,
    }
}

/// The options that can be changed, by name.
pub static OPTIONS: &[OptionSpec] = &[
    option(
        "backing_file",
        OptionKind::Text,
        "Image this one is backed by: as it is",
    ),
    option(
        "backing_fmt",
        OptionKind::Text,
        "Format of the backing image: as it is",
    ),
    option("compat", OptionKind::Text, "Version: 0.10 (v2) or 1.1 (v3)"),
    option(
        "data_file",
        OptionKind::Text,
        "Name of the file that holds the data",
    ),
    option(
        "data_file_raw",
        OptionKind::Bool,
        "Keep the data file a valid raw image",
    ),
    option(
        "encrypt.iter-time",
        OptionKind::Number,
        "Milliseconds that deriving the key shall take",
    ),
    option("encrypt.keyslot", OptionKind::Number, "Key slot to change"),
    option(
        "encrypt.new-secret",
        OptionKind::Text,
        "Secret object with the new password",
    ),
    option(
        "encrypt.old-secret",
        OptionKind::Text,
        "Secret object with the password of the key slots to change",
    ),
    option(
        "encrypt.state",
        OptionKind::Text,
        "What key slots become: active or inactive",
    ),
    option(
        "lazy_refcounts",
        OptionKind::Bool,
        "Put off updates of reference counts",
    ),
    option(
        "refcount_bits",
        OptionKind::Number,
        "Bits of a reference count: 1, 2, 4 to 64",
    ),
    option("size", OptionKind::Size, "Bytes of the virtual disk"),
];

/// Why an option is not changed. Reached by [`Error::find`](diskmill_core::Error::find).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AmendError {
    /// It is fixed once the image is made.
    #[error("{0} can be chosen when an image is made, and not be changed")]
    CreationOnly(String),
    /// No version.
    #[error("compat is '{0}', must be 0.10, 1.1, v2 or v3")]
    Compat(String),
    /// No width.
    #[error("refcount_bits is {0}, must be 1, 2, 4, 8, 16, 32 or 64")]
    RefcountBits(u64),
    /// Version 2 has one width.
    #[error("refcount_bits other than 16 needs version 3 (compat=1.1)")]
    RefcountBitsNeedVersion3,
    /// Version 2 has no such feature.
    #[error("lazy_refcounts needs version 3 (compat=1.1)")]
    LazyNeedsVersion3,
    /// A size that is no multiple of a sector.
    #[error("size is {0}, must be a multiple of 512")]
    Size(u64),
    /// There is no data file to name.
    #[error("data_file can only be changed in an image that has one")]
    NoDataFile,
    /// A name that does not fit.
    #[error("data_file has {0} bytes, must have at most 1023")]
    DataFileName(usize),
    /// The data file is no raw image, and nobody makes it one.
    #[error("data_file_raw can be turned off, not on")]
    DataFileRaw,
    /// There is a command of its own for that.
    #[error("the backing image is changed by 'rebase'")]
    Backing,
    /// There are no key slots.
    #[error("the image is not encrypted")]
    NotEncrypted,
    /// There are no key slots either.
    #[error("the image is encrypted with the old AES, which has nothing to change")]
    OldEncryption,
    /// Version 2 has no data files.
    #[error("compat=0.10 is not possible with a data file")]
    OldDataFile,
    /// Version 2 has one width.
    #[error("compat=0.10 needs refcount_bits=16")]
    OldRefcountBits,
    /// Version 2 cannot say these things of snapshots.
    #[error("compat=0.10 needs snapshots of the disk's own size with less than 4 GiB of machine state")]
    OldSnapshots,
    /// Version 2 has no such features.
    #[error("compat=0.10 is not possible with incompatible features {0:#x}")]
    OldFeatures(u64),
    /// Version 2 knows deflate only.
    #[error("compat=0.10 is not possible with clusters compressed by zstd")]
    OldZstd,
}

impl From<AmendError> for Error {
    fn from(error: AmendError) -> Self {
        Error::new(ErrorKind::Usage, error).format(Format::Qcow2)
    }
}

/// What is asked for, where it differs from what there is.
#[derive(Debug)]
pub(super) struct Wish {
    /// The version in the end.
    pub(super) version: Version,
    pub(super) refcount_order: Option<RefcountOrder>,
    pub(super) size: Option<u64>,
    pub(super) slots: Option<SlotChange>,
    lazy: Option<bool>,
    data_file: Option<String>,
    raw_off: bool,
}

impl Wish {
    /// Checks `options` against the image with header `header`.
    pub(super) fn new(options: &Options, header: &Header) -> Result<Self> {
        check(options)?;
        let version = match options.text("compat") {
            None => header.version,
            Some("1.1" | "v3") => Version::V3,
            Some("0.10" | "v2") => Version::V2,
            Some(other) => return Err(AmendError::Compat(other.to_owned()).into()),
        };
        let lazy = options.bool("lazy_refcounts")?;
        let wish = Self {
            version,
            refcount_order: refcount_order(options)?.filter(|order| *order != header.refcount_order),
            size: options.size("size")?.filter(|size| *size != 0),
            slots: slots(options, header)?,
            lazy,
            data_file: options.text("data_file").map(str::to_owned),
            raw_off: options.bool("data_file_raw")? == Some(false),
        };
        wish.agree(options, header)?;
        Ok(wish)
    }

    fn agree(&self, options: &Options, header: &Header) -> Result<(), AmendError> {
        if let Some(name) = &self.data_file {
            if !header.has_data_file() {
                return Err(AmendError::NoDataFile);
            }
            if name.len() as u64 > BACKING_NAME_MAX.into() {
                return Err(AmendError::DataFileName(name.len()));
            }
        }
        let raw = header.autoclear.has(Autoclear::RAW_DATA_FILE);
        if options.bool("data_file_raw") == Ok(Some(true)) && !raw {
            return Err(AmendError::DataFileRaw);
        }
        // Version 2 is reached last: until then the image is what it was, or what it became.
        let is_v3 = self.version == Version::V3 || header.version == Version::V3;
        let downgrade = header.version == Version::V3 && self.version == Version::V2;
        match self.refcount_order {
            Some(order) if !is_v3 || downgrade && order != RefcountOrder::DEFAULT => {
                return Err(AmendError::RefcountBitsNeedVersion3);
            }
            _ => {}
        }
        let backing = header.backing();
        let said = (options.text("backing_file"), options.text("backing_fmt"));
        let known = backing.as_ref().map_or((None, None), |backing| {
            (Some(backing.name.as_str()), backing.format.as_deref())
        });
        if said != (None, None) && said != known {
            return Err(AmendError::Backing);
        }
        let is_lazy = header.compatible.has(Compatible::LAZY_REFCOUNTS);
        if self.lazy == Some(true) && !is_lazy && self.version == Version::V2 {
            return Err(AmendError::LazyNeedsVersion3);
        }
        match self.size {
            Some(size) if !size.is_multiple_of(SECTOR) => Err(AmendError::Size(size)),
            _ => Ok(()),
        }
    }

    /// Enters what only the header holds.
    pub(super) fn enter(&self, header: &mut Header) -> Result<()> {
        if let Some(lazy) = self.lazy {
            header.compatible = header.compatible.with(Compatible::LAZY_REFCOUNTS, lazy);
        }
        if self.raw_off {
            header.autoclear = header.autoclear.with(Autoclear::RAW_DATA_FILE, false);
        }
        if let Some(name) = &self.data_file {
            let is_name = |extension: &Extension| matches!(extension, Extension::DataFile(_));
            let at = header.extensions.iter().position(is_name);
            header.extensions.retain(|extension| !is_name(extension));
            if !name.is_empty() {
                let named = Extension::DataFile(name.as_bytes().to_vec());
                header.extensions.insert(at.unwrap_or(0), named);
            }
        }
        Ok(())
    }
}

/// Fails on the first option that cannot be changed or has a value of the wrong sort.
fn check(options: &Options) -> Result<()> {
    for (name, _) in options.iter() {
        let Some(spec) = OPTIONS.iter().find(|spec| spec.name == name) else {
            // These are the file's, and its driver changes nothing.
            let of_file = matches!(name, "nocow" | "extent_size_hint");
            return match options::OPTIONS.iter().any(|spec| spec.name == name) && !of_file {
                true => Err(AmendError::CreationOnly(name.to_owned()).into()),
                false => Err(OptionError::Unknown(name.to_owned()).into()),
            };
        };
        match spec.kind {
            OptionKind::Bool => drop(options.bool(name)?),
            OptionKind::Size => drop(options.size(name)?),
            OptionKind::Number => drop(options.number(name)?),
            _ => {}
        }
    }
    Ok(())
}

fn slots(options: &Options, header: &Header) -> Result<Option<SlotChange>> {
    const PREFIX: &str = "encrypt.";
    if !options.iter().any(|(name, _)| name.starts_with(PREFIX)) {
        return Ok(None);
    }
    match header.crypt_method {
        CryptMethod::None => Err(AmendError::NotEncrypted.into()),
        CryptMethod::Aes => Err(AmendError::OldEncryption.into()),
        CryptMethod::Luks => Ok(Some(SlotChange::parse(options, PREFIX)?)),
    }
}

fn refcount_order(options: &Options) -> Result<Option<RefcountOrder>> {
    match options.number("refcount_bits")? {
        None => Ok(None),
        Some(bits) => match RefcountOrder::from_bits(bits) {
            Some(order) => Ok(Some(order)),
            None => Err(AmendError::RefcountBits(bits).into()),
        },
    }
}
