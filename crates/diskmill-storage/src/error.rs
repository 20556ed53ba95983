//! What storages complain of beyond what the operating system says: sources of a core [`Error`].

use diskmill_core::{Error, ErrorKind};

/// The name stands for something that holds no disk. Of kind [`ErrorKind::Usage`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("it is a {what}, not a regular file or block device")]
#[non_exhaustive]
pub struct NotADisk {
    /// What it is instead: `directory`, `character device`, `fifo`, `socket` or `file of unknown type`.
    pub what: &'static str,
}

impl NotADisk {
    pub(crate) fn error(what: &'static str) -> Error {
        Error::new(ErrorKind::Usage, Self { what })
    }
}

/// A cache mode was asked for that passes the page cache by, where that cannot be done. Of kind
/// [`ErrorKind::Unsupported`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the file system does not support O_DIRECT")]
#[non_exhaustive]
pub struct NoDirect;

impl NoDirect {
    #[cold]
    pub(crate) fn error() -> Error {
        Error::new(ErrorKind::Unsupported, Self)
    }
}

/// A length was asked of a device or window that it does not have. Of kind [`ErrorKind::Usage`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("its length is fixed at {len} bytes, so it cannot grow to {wanted}")]
#[non_exhaustive]
pub struct CannotGrow {
    /// The length it has, in bytes.
    pub len: u64,
    /// The length that was asked for, in bytes.
    pub wanted: u64,
}

impl CannotGrow {
    #[cold]
    pub(crate) fn error(len: u64, wanted: u64) -> Error {
        Error::new(ErrorKind::Usage, Self { len, wanted }).op("resize")
    }
}
