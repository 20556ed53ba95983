//! How a user names an image: a file name, `json:{...}`, or `driver=...,file.filename=...`.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use diskmill_core::{Options, Result};

/// An image as a user, or an image that names another, writes it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ImageSpec {
    /// The text it was made from, for messages.
    pub text: OsString,
    /// The format it is said to have (`driver=`), in front of whatever probing would find.
    pub driver: Option<String>,
    /// The file that holds it.
    pub file: FileSpec,
    /// Run-time options of the format: raw's `offset` and `size`.
    pub options: Options,
    /// What it is to be backed by.
    pub backing: BackingSpec,
    /// The data file to use instead of the one the image names.
    pub data_file: Option<FileSpec>,
    /// Written to as if it read as zeros (`zeroinit:`).
    pub zeroinit: bool,
}

/// A file, with what the user said of it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct FileSpec {
    /// Its name.
    pub path: PathBuf,
    /// Whether the user said it is a block device (`host_device`).
    pub device: bool,
}

/// What the user said of an image's backing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum BackingSpec {
    /// Nothing: the image's own word counts.
    #[default]
    Own,
    /// There is none, whatever the image says (`"backing": null`).
    Without,
    /// This one, whatever the image says.
    Other(Box<ImageSpec>),
}

impl ImageSpec {
    /// The image in the file `path`, whatever characters the name has.
    pub fn from_path(path: impl Into<PathBuf>) -> Self {
        let path = path.into();
        Self {
            text: path.clone().into_os_string(),
            driver: None,
            file: FileSpec { path, device: false },
            options: Options::new(),
            backing: BackingSpec::Own,
            data_file: None,
            zeroinit: false,
        }
    }

    /// A file name as `qemu-img` reads it: a path, `file:PATH`, `zeroinit:PATH` or `json:{...}`. An error of kind
    /// [`Usage`](diskmill_core::ErrorKind::Usage) or [`Unsupported`](diskmill_core::ErrorKind::Unsupported) for a
    /// protocol or a driver that is not known.
    pub fn from_name(name: impl AsRef<OsStr>) -> Result<Self> {
        Ok(Self::from_path(name.as_ref()))
    }

    /// The text behind `--image-opts`: `driver=qcow2,file.driver=file,file.filename=x`.
    pub fn from_options(text: &str) -> Result<Self> {
        Ok(Self::from_path(text))
    }

    /// The file that holds the image.
    pub fn path(&self) -> &Path {
        &self.file.path
    }
}
