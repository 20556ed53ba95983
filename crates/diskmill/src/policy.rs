//! Which files an image may name.
//!
//! An image is hostile text that names other files: a backing image, a data file. Whether such a name is followed is
//! one value, made by the front end and asked only by [`open`](crate::open).

use std::io;
use std::path::{Component, Path, PathBuf};

use diskmill_core::{Error, ErrorKind, Result};

use crate::open::OpenError;

/// What is done with a file name found inside an image.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum References {
    /// Followed wherever it leads: plain paths, `file:` names and `json:` trees of file and format drivers. Regular
    /// files and block devices only, as everywhere. What `qemu-img` does, less the protocols.
    #[default]
    Any,
    /// Plain paths are followed inside the directory tree of the image the user named and inside `allow`.
    Beneath {
        /// More directories whose trees may be used.
        allow: Vec<PathBuf>,
    },
    /// Nothing is followed but plain paths inside `allow`, without symbolic links; what has no backing format is
    /// never probed.
    None {
        /// Directories whose trees may be used.
        allow: Vec<PathBuf>,
    },
}

impl References {
    /// Whether the format of a backing image may be guessed.
    pub fn may_probe(&self) -> bool {
        !matches!(self, Self::None { .. })
    }

    /// The path to open for `wanted`, which an image calls `name`; `top` is the image the user named. Where the policy
    /// restricts paths it is free of symbolic links, so that what was judged is what is opened.
    pub fn permit(&self, top: &Path, wanted: PathBuf, name: &str) -> Result<PathBuf> {
        let (allow, own) = match self {
            Self::Any => return Ok(wanted),
            Self::Beneath { allow } => (allow, Some(directory(top))),
            Self::None { allow } => (allow, None),
        };
        let dirs = allow.iter().map(PathBuf::as_path).chain(own);
        let real = match real_path(&wanted) {
            Ok(real) => real,
            Err(error) => return Err(Error::from(error).op("open").path(wanted)),
        };
        let within = dirs
            .filter_map(|dir| dir.canonicalize().ok())
            .any(|dir| real.starts_with(dir));
        let plain = self.may_probe() || is_plain(&wanted, &real);
        if within && plain {
            return Ok(real);
        }
        let allow = directory(&real).display().to_string();
        let name = name.to_owned();
        Err(Error::new(ErrorKind::Denied, OpenError::Refused { name, allow })
            .op("open")
            .path(wanted))
    }
}

/// The directory a file is in; `.` if its name says nothing.
fn directory(path: &Path) -> &Path {
    match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    }
}

/// The path without symbolic links. The last part may be missing: then opening says so, not the policy.
fn real_path(path: &Path) -> io::Result<PathBuf> {
    match path.canonicalize() {
        Err(error) if error.kind() == io::ErrorKind::NotFound && !path.is_symlink() => match path.file_name()
        {
            Some(name) => Ok(directory(path).canonicalize()?.join(name)),
            None => Err(error),
        },
        other => other,
    }
}

/// Whether `real` is `wanted` without any symbolic link having been followed.
fn is_plain(wanted: &Path, real: &Path) -> bool {
    let Ok(absolute) = std::path::absolute(wanted) else {
        return false;
    };
    let mut plain = PathBuf::new();
    for part in absolute.components() {
        match part {
            Component::ParentDir => {
                plain.pop();
            }
            part => plain.push(part),
        }
    }
    plain == real
}
