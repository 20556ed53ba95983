//! What can be wrong with a header.

use diskmill_core::{Error, ErrorKind, Format};

/// What is wrong with a header.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HeaderError {
    /// The magic number is another's.
    #[error("magic is {0:#010x}, must be 0x514649fb")]
    Magic(u32),
    /// A version this program does not know.
    #[error("version is {0}, must be 2 or 3")]
    Version(u32),
    /// The file ends before the header does.
    #[error("the header needs {needed} bytes, the file has {have}")]
    Short {
        /// Bytes there are.
        have: u64,
        /// Bytes there must be.
        needed: u64,
    },
    /// A number outside what is allowed.
    #[error("{field} is {value}, must be {allowed}")]
    Range {
        /// The field.
        field: &'static str,
        /// What it is.
        value: u64,
        /// What it may be.
        allowed: &'static str,
    },
    /// A number outside what the rest of the header allows.
    #[error("{field} is {value}, must be {low} to {high}")]
    Bounds {
        /// The field.
        field: &'static str,
        /// What it is.
        value: u64,
        /// The least it may be.
        low: u64,
        /// The most it may be.
        high: u64,
    },
    /// An offset that does not fall on a cluster.
    #[error("{field} is {value:#x}, must be a multiple of the cluster size {cluster_size} below 2^63")]
    Unaligned {
        /// The field.
        field: &'static str,
        /// What it is.
        value: u64,
        /// The cluster size.
        cluster_size: u64,
    },
    /// Feature bits a reader must know and this one does not.
    #[error("incompatible feature {0} is not supported")]
    Features(String),
    /// The compression type and the feature bit that announces it disagree.
    #[error(
        "compression_type is {compression_type} and the incompatible feature bit 'compression type' is {bit}, \
         must be 0 with 0 or 1 with 1"
    )]
    Compression {
        /// The compression type.
        compression_type: u8,
        /// The feature bit.
        bit: u8,
    },
    /// A feature that needs another.
    #[error("{feature} is set, must be unset without {needs}")]
    Needs {
        /// What is set.
        feature: &'static str,
        /// What is missing.
        needs: &'static str,
    },
    /// An extension that runs out of its area.
    #[error("length of header extension {kind:#010x} is {len}, must be at most {room}")]
    ExtensionTooLong {
        /// Its type.
        kind: u32,
        /// Its length.
        len: u32,
        /// Bytes up to the end of the area.
        room: u64,
    },
    /// An extension of a known type and a wrong length.
    #[error("length of the {name} extension is {len}, must be {allowed}")]
    ExtensionLen {
        /// Its name.
        name: &'static str,
        /// Its length.
        len: u64,
        /// What it must be.
        allowed: u64,
    },
}

impl HeaderError {
    const fn kind(&self) -> ErrorKind {
        match self {
            Self::Magic(_) => ErrorKind::NotThisFormat,
            Self::Version(_) | Self::Features(_) => ErrorKind::Unsupported,
            _ => ErrorKind::Malformed,
        }
    }
}

impl From<HeaderError> for Error {
    fn from(error: HeaderError) -> Self {
        let kind = error.kind();
        Error::new(kind, error).format(Format::Qcow2)
    }
}
