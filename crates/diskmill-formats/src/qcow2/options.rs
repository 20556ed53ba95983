//! What `-o` may say of a new image, and the checked form of it.

mod encryption;

pub(super) use encryption::Encryption;

use diskmill_core::{
    BackingName, CreateSpec, Error, ErrorKind, Format, HostOffset, OptionKind, OptionSpec, Options, Result,
};

use super::extension::{EncryptionExtension, Extension};
use super::header::{
    Autoclear, ClusterBits, Compatible, CompressionType, CryptMethod, Header, Incompatible, RefcountOrder,
    Version,
};
use super::layout::{BACKING_FORMAT_MAX, BACKING_NAME_MAX, L1_BYTES_MAX};
use super::map::Geometry;
use crate::codec::Codec;
use crate::preallocation::Preallocation;

const fn option(
    name: &'static str,
    kind: OptionKind,
    default: Option<&'static str>,
    help: &'static str,
) -> OptionSpec {
    OptionSpec {
        name,
        kind,
        default,
        help,
    }
}

/// The options of a new image, in the order `create` prints them; `help` lists them by name.
pub static OPTIONS: &[OptionSpec] = &[
    option(
        "encryption",
        OptionKind::Bool,
        None,
        "Encrypt with AES; the old spelling of encrypt.format=aes",
    ),
    option(
        "encrypt.format",
        OptionKind::Text,
        None,
        "Encrypt the data: aes or luks",
    ),
    option(
        "encrypt.key-secret",
        OptionKind::Text,
        None,
        "Secret object that holds the password",
    ),
    option("encrypt.cipher-alg", OptionKind::Text, None, "Cipher of LUKS"),
    option(
        "encrypt.cipher-mode",
        OptionKind::Text,
        None,
        "Cipher mode of LUKS",
    ),
    option(
        "encrypt.ivgen-alg",
        OptionKind::Text,
        None,
        "How LUKS makes initialisation vectors",
    ),
    option(
        "encrypt.ivgen-hash-alg",
        OptionKind::Text,
        None,
        "Hash used for initialisation vectors",
    ),
    option(
        "encrypt.hash-alg",
        OptionKind::Text,
        None,
        "Hash that derives the key",
    ),
    option(
        "encrypt.iter-time",
        OptionKind::Number,
        None,
        "Milliseconds that deriving the key shall take",
    ),
    option(
        "cluster_size",
        OptionKind::Size,
        Some("65536"),
        "Bytes of a cluster: a power of two, 512 to 2M",
    ),
    option(
        "extended_l2",
        OptionKind::Bool,
        Some("off"),
        "Divide clusters into 32 subclusters",
    ),
    option(
        "preallocation",
        OptionKind::Text,
        None,
        "Space taken at once: off, metadata, falloc or full",
    ),
    option(
        "compression_type",
        OptionKind::Text,
        Some("zlib"),
        "How clusters are compressed: zlib or zstd",
    ),
    option("size", OptionKind::Size, None, "Bytes of the virtual disk"),
    option("compat", OptionKind::Text, None, "Version: 0.10 (v2) or 1.1 (v3)"),
    option(
        "backing_file",
        OptionKind::Text,
        None,
        "Image this one is backed by",
    ),
    option(
        "backing_fmt",
        OptionKind::Text,
        None,
        "Format of the backing image",
    ),
    option(
        "data_file",
        OptionKind::Text,
        None,
        "File that holds the data apart from the tables",
    ),
    option(
        "data_file_raw",
        OptionKind::Bool,
        None,
        "Keep the data file a valid raw image",
    ),
    option(
        "lazy_refcounts",
        OptionKind::Bool,
        Some("off"),
        "Put off updates of reference counts",
    ),
    option(
        "refcount_bits",
        OptionKind::Number,
        Some("16"),
        "Bits of a reference count: 1, 2, 4 to 64",
    ),
    option(
        "nocow",
        OptionKind::Bool,
        None,
        "Ask the file system not to copy on write (btrfs)",
    ),
    option(
        "extent_size_hint",
        OptionKind::Size,
        None,
        "Step in which the file system allocates; 0 for its own",
    ),
];

/// What is wrong with the wish for a new image. Reached by [`Error::find`](diskmill_core::Error::find).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CreateError {
    /// No cluster size.
    #[error("cluster_size is {0}, must be a power of two from 512 to 2097152")]
    ClusterSize(u64),
    /// Too small for subclusters.
    #[error("cluster_size is {0}, must be at least 16384 with extended_l2")]
    SubclusterSize(u64),
    /// No version.
    #[error("compat is '{0}', must be 0.10, 1.1, v2 or v3")]
    Compat(String),
    /// No compression type.
    #[error("compression_type is '{0}', must be zlib or zstd")]
    CompressionType(String),
    /// No width.
    #[error("refcount_bits is {0}, must be 1, 2, 4, 8, 16, 32 or 64")]
    RefcountBits(u64),
    /// Version 2 does not have it.
    #[error("{0} needs version 3 (compat=1.1)")]
    NeedsVersion3(&'static str),
    /// It is about a data file that is not there.
    #[error("data_file_raw needs data_file")]
    RawWithoutDataFile,
    /// Two options exclude each other.
    #[error("{0} and {1} exclude each other")]
    Exclude(&'static str, &'static str),
    /// Preallocated clusters would hide the backing image.
    #[error("preallocation with a backing file needs extended_l2")]
    PreallocationWithBacking,
    /// An empty name.
    #[error("{0} must not be empty")]
    EmptyName(&'static str),
    /// Too long for the header.
    #[error("{name} has {len} bytes, must be at most {most}")]
    NameLen {
        /// Which name.
        name: &'static str,
        /// Bytes of it.
        len: u64,
        /// Bytes it may have.
        most: u64,
    },
    /// The tables could not describe it.
    #[error("the size of {size} bytes is too large for this cluster size, must be at most {most}")]
    TooLarge {
        /// Bytes of the disk.
        size: u64,
        /// Bytes it may have.
        most: u64,
    },
    /// It says more of the encryption, and not which.
    #[error("{0} needs encrypt.format")]
    NoEncryptFormat(String),
    /// The old AES has no such choice.
    #[error("{0} means nothing with encrypt.format=aes")]
    NotOfAes(String),
    /// The encryption in both spellings.
    #[error("encryption is the old spelling of encrypt.format, and cannot be given with it")]
    EncryptionTwice,
}

impl From<CreateError> for Error {
    fn from(error: CreateError) -> Self {
        Error::new(ErrorKind::Usage, error).format(Format::Qcow2)
    }
}

/// A new image, checked: every value is allowed on its own and with the others.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    /// Bytes of the disk, 0 if they are not known yet.
    pub virtual_size: u64,
    pub version: Version,
    pub cluster_bits: ClusterBits,
    pub refcount_order: RefcountOrder,
    pub lazy_refcounts: bool,
    pub compression_type: CompressionType,
    pub extended_l2: bool,
    pub data_file: Option<String>,
    pub data_file_raw: bool,
    pub preallocation: Preallocation,
    pub backing: Option<BackingName>,
    /// How data is encrypted.
    pub encryption: Encryption,
    /// How data is compressed, if it is.
    pub codec: Option<Codec>,
    pub nocow: bool,
    pub extent_size_hint: Option<u64>,
}

impl Plan {
    /// The plan for what `spec` asks.
    pub fn new(spec: &CreateSpec) -> Result<Self> {
        let options = &spec.options;
        options.only(OPTIONS)?;
        let plan = Self {
            virtual_size: spec.virtual_size,
            version: version(options)?,
            cluster_bits: cluster_bits(options)?,
            refcount_order: refcount_order(options)?,
            lazy_refcounts: options.bool("lazy_refcounts")?.unwrap_or(false),
            compression_type: compression_type(options)?,
            extended_l2: options.bool("extended_l2")?.unwrap_or(false),
            data_file: options.text("data_file").map(str::to_owned),
            data_file_raw: options.bool("data_file_raw")?.unwrap_or(false),
            preallocation: Preallocation::from_options(options, true)?,
            backing: backing(spec),
            encryption: Encryption::from_options(options)?,
            codec: None,
            nocow: options.bool("nocow")?.unwrap_or(false),
            extent_size_hint: options.size("extent_size_hint")?,
        };
        let codec = match (spec.compression, plan.compression_type) {
            (None, _) => None,
            (Some(how), CompressionType::Zlib) => {
                Some(Codec::deflate(how.level, plan.cluster_bits.cluster_size())?)
            }
            (Some(how), CompressionType::Zstd) => Some(Codec::zstd(how.level)?),
        };
        let plan = Self { codec, ..plan };
        plan.agree()?;
        plan.names()?;
        plan.fits()?;
        Ok(plan)
    }

    /// The geometry of the image.
    pub fn geometry(&self) -> Geometry {
        Geometry::new(
            self.version,
            self.cluster_bits,
            self.extended_l2,
            self.data_file.is_some(),
        )
    }

    /// Whether each cluster has its place from the start.
    pub fn preallocates(&self) -> bool {
        self.preallocation != Preallocation::Off || self.data_file_raw
    }

    /// The header, its tables' places missing.
    pub fn header(&self) -> Header {
        let mut header = Header::new(self.version, self.cluster_bits, self.virtual_size);
        header.refcount_order = self.refcount_order;
        header.compression_type = self.compression_type;
        header.incompatible = Incompatible::default()
            .with(Incompatible::DATA_FILE, self.data_file.is_some())
            .with(
                Incompatible::COMPRESSION,
                self.compression_type != CompressionType::Zlib,
            )
            .with(Incompatible::EXTENDED_L2, self.extended_l2);
        header.compatible = Compatible::default().with(Compatible::LAZY_REFCOUNTS, self.lazy_refcounts);
        header.autoclear = Autoclear::default().with(Autoclear::RAW_DATA_FILE, self.data_file_raw);
        if let Some(format) = self.backing.as_ref().and_then(|backing| backing.format.as_ref()) {
            header
                .extensions
                .push(Extension::BackingFormat(format.as_bytes().to_vec()));
        }
        if let Some(name) = &self.data_file {
            header
                .extensions
                .push(Extension::DataFile(name.as_bytes().to_vec()));
        }
        header.crypt_method = self.encryption.method();
        if header.crypt_method == CryptMethod::Luks {
            header.extensions.push(Extension::Encryption(EncryptionExtension {
                offset: HostOffset::ZERO,
                length: self.encryption.header_len(),
            }));
        }
        // Small clusters have better uses for the room, and QEMU leaves the names out as well.
        if self.version == Version::V3 && self.cluster_bits.cluster_size() > 4096 {
            header.extensions.push(Header::feature_names());
        }
        header.backing_name = self
            .backing
            .as_ref()
            .map(|backing| backing.name.as_bytes().to_vec());
        header
    }

    fn agree(&self) -> Result<(), CreateError> {
        if self.extended_l2 && self.cluster_bits.get() < 14 {
            return Err(CreateError::SubclusterSize(self.cluster_bits.cluster_size()));
        }
        if self.version == Version::V2 {
            let newer = [
                (self.extended_l2, "extended_l2"),
                (self.lazy_refcounts, "lazy_refcounts"),
                (self.refcount_order != RefcountOrder::DEFAULT, "refcount_bits"),
                (self.data_file.is_some(), "data_file"),
                (self.compression_type != CompressionType::Zlib, "compression_type"),
            ];
            if let Some((_, name)) = newer.iter().find(|(wanted, _)| *wanted) {
                return Err(CreateError::NeedsVersion3(name));
            }
        }
        if self.data_file_raw && self.data_file.is_none() {
            return Err(CreateError::RawWithoutDataFile);
        }
        if self.data_file_raw && self.backing.is_some() {
            return Err(CreateError::Exclude("backing_file", "data_file_raw"));
        }
        if self.preallocation != Preallocation::Off && self.backing.is_some() && !self.extended_l2 {
            return Err(CreateError::PreallocationWithBacking);
        }
        if self.codec.is_some() {
            if self.encryption.method() != CryptMethod::None {
                return Err(CreateError::Exclude("compression", "encryption"));
            }
            if self.preallocation != Preallocation::Off {
                return Err(CreateError::Exclude("compression", "preallocation"));
            }
            if self.data_file.is_some() {
                return Err(CreateError::Exclude("compression", "data_file"));
            }
        }
        Ok(())
    }

    fn names(&self) -> Result<(), CreateError> {
        if let Some(backing) = &self.backing {
            name_len("backing_file", &backing.name, BACKING_NAME_MAX)?;
            if let Some(format) = &backing.format {
                name_len("backing_fmt", format, BACKING_FORMAT_MAX)?;
            }
        }
        match &self.data_file {
            Some(name) => name_len("data_file", name, BACKING_NAME_MAX),
            None => Ok(()),
        }
    }

    fn fits(&self) -> Result<()> {
        let geometry = self.geometry();
        let entries = L1_BYTES_MAX >> 3;
        if geometry.l1_entries(self.virtual_size) > entries {
            return Err(CreateError::TooLarge {
                size: self.virtual_size,
                most: geometry.l1_entry_covers().saturating_mul(entries),
            }
            .into());
        }
        // Names that do not fit beside the header are found before anything is written.
        self.header().to_bytes()?;
        Ok(())
    }
}

fn version(options: &Options) -> Result<Version, CreateError> {
    match options.text("compat") {
        None | Some("1.1" | "v3") => Ok(Version::V3),
        Some("0.10" | "v2") => Ok(Version::V2),
        Some(other) => Err(CreateError::Compat(other.to_owned())),
    }
}

fn cluster_bits(options: &Options) -> Result<ClusterBits> {
    let Some(size) = options.size("cluster_size")? else {
        return Ok(ClusterBits::DEFAULT);
    };
    match ClusterBits::new(size.trailing_zeros()) {
        Ok(bits) if size.is_power_of_two() => Ok(bits),
        _ => Err(CreateError::ClusterSize(size).into()),
    }
}

fn refcount_order(options: &Options) -> Result<RefcountOrder> {
    match options.number("refcount_bits")? {
        None => Ok(RefcountOrder::DEFAULT),
        Some(bits) => RefcountOrder::from_bits(bits).ok_or_else(|| CreateError::RefcountBits(bits).into()),
    }
}

fn compression_type(options: &Options) -> Result<CompressionType, CreateError> {
    match options.text("compression_type") {
        None | Some("zlib") => Ok(CompressionType::Zlib),
        Some("zstd") => Ok(CompressionType::Zstd),
        Some(other) => Err(CreateError::CompressionType(other.to_owned())),
    }
}

fn backing(spec: &CreateSpec) -> Option<BackingName> {
    spec.backing.clone().or_else(|| {
        spec.options.text("backing_file").map(|name| BackingName {
            name: name.to_owned(),
            format: spec.options.text("backing_fmt").map(str::to_owned),
        })
    })
}

fn name_len(name: &'static str, value: &str, most: u32) -> Result<(), CreateError> {
    let len = value.len() as u64;
    if value.is_empty() {
        Err(CreateError::EmptyName(name))
    } else if len > most.into() {
        Err(CreateError::NameLen {
            name,
            len,
            most: most.into(),
        })
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests;
