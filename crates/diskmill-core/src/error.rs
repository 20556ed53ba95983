//! The one error type of the libraries.
//!
//! An [`Error`] is a small stable [`ErrorKind`] to branch on, a [`Context`] that says where, and a source that says
//! what: usually a format's own `thiserror` enum with the value found and the values allowed. Text is lower case,
//! without a full stop, and never repeats the source's: a front end prints the chain.

use std::error::Error as StdError;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use crate::{Format, GuestOffset, HostOffset};

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What sort of failure it is: the only part of an error that code should branch on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The host failed to read or write.
    Io,
    /// A file that should be there is not.
    NotFound,
    /// The host or the trust policy forbids it.
    Denied,
    /// Another process holds the image.
    Locked,
    /// The caller asked for something that makes no sense.
    Usage,
    /// The file is not of this format. Only `probe` and `parse` say so.
    NotThisFormat,
    /// The file breaks the rules of its format.
    Malformed,
    /// The format says so itself, or its cross-checks disagree.
    Corrupt,
    /// Valid, but not supported here.
    Unsupported,
    /// The host, or the image, is out of space.
    NoSpace,
    /// Somebody asked for the operation to stop.
    Cancelled,
}

impl ErrorKind {
    const fn text(self) -> &'static str {
        match self {
            Self::Io => "input/output error",
            Self::NotFound => "not found",
            Self::Denied => "not allowed",
            Self::Locked => "in use by another process",
            Self::Usage => "invalid request",
            Self::NotThisFormat => "not an image of this format",
            Self::Malformed => "malformed image",
            Self::Corrupt => "corrupt image",
            Self::Unsupported => "not supported",
            Self::NoSpace => "no space left",
            Self::Cancelled => "cancelled",
        }
    }
}

impl fmt::Display for ErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.text())
    }
}

/// Where an error happened. Each field is filled once, by the code that knows it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Context {
    /// What was being done, as a verb: "open", "read", "write", "sync".
    pub op: Option<&'static str>,
    /// The file it was done to.
    pub path: Option<PathBuf>,
    /// The format whose driver noticed.
    pub format: Option<Format>,
    /// Where in the virtual disk.
    pub guest: Option<GuestOffset>,
    /// Where in the file.
    pub host: Option<HostOffset>,
}

/// A failure of a library call.
pub struct Error(Box<Inner>);

struct Inner {
    kind: ErrorKind,
    context: Context,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

impl Error {
    /// An error of `kind`, explained by `source`: a typed error, or plain text.
    pub fn new(kind: ErrorKind, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        Self(Box::new(Inner {
            kind,
            context: Context::default(),
            source: Some(source.into()),
        }))
    }

    /// An error that its kind explains fully.
    pub fn bare(kind: ErrorKind) -> Self {
        Self(Box::new(Inner {
            kind,
            context: Context::default(),
            source: None,
        }))
    }

    /// What sort of failure it is.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// Where it happened, as far as is known.
    pub fn context(&self) -> &Context {
        &self.0.context
    }

    /// Names the operation, unless an inner call has done so.
    #[must_use]
    pub fn op(mut self, op: &'static str) -> Self {
        self.0.context.op.get_or_insert(op);
        self
    }

    /// Names the file, unless an inner call has done so.
    #[must_use]
    pub fn path(mut self, path: impl AsRef<Path>) -> Self {
        self.0
            .context
            .path
            .get_or_insert_with(|| path.as_ref().to_owned());
        self
    }

    /// Names the format, unless an inner call has done so.
    #[must_use]
    pub fn format(mut self, format: Format) -> Self {
        self.0.context.format.get_or_insert(format);
        self
    }

    /// Says where in the virtual disk, unless an inner call has done so.
    #[must_use]
    pub fn guest(mut self, at: GuestOffset) -> Self {
        self.0.context.guest.get_or_insert(at);
        self
    }

    /// Says where in the file, unless an inner call has done so.
    #[must_use]
    pub fn host(mut self, at: HostOffset) -> Self {
        self.0.context.host.get_or_insert(at);
        self
    }

    /// What explains it, taken out.
    pub fn into_source(self) -> Option<Box<dyn StdError + Send + Sync>> {
        self.0.source
    }

    /// The operating system's error behind this one, if there is one.
    pub fn io_error(&self) -> Option<&io::Error> {
        self.find::<io::Error>()
    }

    /// The first error of type `T` among the sources.
    pub fn find<T: StdError + 'static>(&self) -> Option<&T> {
        let mut next = self.source();
        while let Some(error) = next {
            if let Some(found) = error.downcast_ref::<T>() {
                return Some(found);
            }
            next = error.source();
        }
        None
    }
}

impl From<io::Error> for Error {
    fn from(error: io::Error) -> Self {
        let kind = match error.kind() {
            io::ErrorKind::NotFound => ErrorKind::NotFound,
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => ErrorKind::Denied,
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
                ErrorKind::NoSpace
            }
            io::ErrorKind::Unsupported => ErrorKind::Unsupported,
            _ => ErrorKind::Io,
        };
        Self::new(kind, error)
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0
            .source
            .as_deref()
            .map(|source| source as &(dyn StdError + 'static))
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Context {
            op,
            path,
            format,
            guest,
            host,
        } = &self.0.context;
        match (op, path) {
            (Some(op), Some(path)) => write!(f, "cannot {op} '{}'", path.display())?,
            (Some(op), None) => write!(f, "cannot {op}")?,
            (None, Some(path)) => write!(f, "'{}': {}", path.display(), self.0.kind)?,
            (None, None) => write!(f, "{}", self.0.kind)?,
        }
        let mut separator = " (";
        if let Some(format) = format {
            write!(f, "{separator}{format}")?;
            separator = ", ";
        }
        if let Some(at) = guest {
            write!(f, "{separator}guest offset {at}")?;
            separator = ", ";
        }
        if let Some(at) = host {
            write!(f, "{separator}host offset {at}")?;
            separator = ", ";
        }
        if separator == ", " {
            f.write_str(")")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {self}", self.0.kind)?;
        let mut next = self.source();
        while let Some(error) = next {
            write!(f, ": {error}")?;
            next = error.source();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_one_pointer_wide() {
        assert_eq!(size_of::<Error>(), size_of::<usize>());
    }

    #[test]
    fn display_tells_where_and_the_chain_tells_what() {
        let error = Error::new(ErrorKind::Malformed, "refcount_order is 7, must be 0 to 6")
            .op("open")
            .path("x.qcow2")
            .format(Format::Qcow2)
            .op("never used");
        assert_eq!(error.to_string(), "cannot open 'x.qcow2' (qcow2)");
        assert_eq!(
            error.source().unwrap().to_string(),
            "refcount_order is 7, must be 0 to 6"
        );
        assert!(error.io_error().is_none());
    }

    #[test]
    fn io_errors_keep_their_kind() {
        let error = Error::from(io::Error::from(io::ErrorKind::NotFound));
        assert_eq!(error.kind(), ErrorKind::NotFound);
        assert!(error.io_error().is_some());
    }
}
