//! How a user names an image: a file name, `json:{...}`, or `driver=...,file.filename=...`.
//!
//! Parsing opens nothing. What comes out is an [`ImageSpec`]: the file, the format if it was said, and what differs
//! from the image's own word.

mod json;
mod tree;

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use diskmill_core::{Error, ErrorKind, Options, Result};

pub use json::parse_json;

/// An image as a user, or an image that names another, writes it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ImageSpec {
    /// The text it was made from, for messages.
    pub text: OsString,
    /// The name it is shown by: the path, or a `json:{...}` of what a path cannot say.
    pub shown: String,
    /// The format it is said to have (`driver=`), or `file` or `host_device` for a file without any.
    pub driver: Option<String>,
    /// The file that holds it.
    pub file: FileSpec,
    /// Run-time options of the format: raw's `offset` and `size`, the secret that is the key of an encrypted image.
    pub options: Options,
    /// What it is to be backed by.
    pub backing: BackingSpec,
    /// The data file to use instead of the one the image names.
    pub data_file: Option<FileSpec>,
    /// The file with its header, if that is apart from the data (luks).
    pub header: Option<FileSpec>,
    /// Written to as if it read as zeros (`zeroinit:`).
    pub zeroinit: bool,
    /// What else was asked for.
    pub settings: Settings,
}

/// A file, with what the user said of it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct FileSpec {
    /// Its name.
    pub path: PathBuf,
    /// Whether the user said it is a block device (`host_device`).
    pub device: bool,
    /// Whether it takes part in locking (`locking=off` says no).
    pub lock: bool,
    /// Whether its path was judged as it is, so that no part of it may be a symbolic link.
    pub judged: bool,
}

/// Options of any image that change how it is opened. `None`: not said.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Settings {
    /// Bypass the host's page cache (`cache.direct`).
    pub direct: Option<bool>,
    /// Ignore flushes (`cache.no-flush`).
    pub no_flush: Option<bool>,
    /// Never write (`read-only`).
    pub read_only: Option<bool>,
    /// Read even while another process writes (`force-share`).
    pub share: Option<bool>,
    /// Pass discards on (`discard`).
    pub unmap: Option<bool>,
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
    /// There is none, said in a way `qemu-img` warns of (`"backing": ""`).
    WithoutByEmptyName,
    /// This one, whatever the image says.
    Other(Box<ImageSpec>),
    /// The one the image says, opened in this way.
    OwnWith(Box<Opening>),
}

/// What can be said of how an image is opened without saying which one it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Opening {
    /// The format it is said to have.
    pub driver: Option<String>,
    /// Run-time options of the format.
    pub options: Options,
    /// What it is to be backed by.
    pub backing: BackingSpec,
    /// The data file to use instead of the one the image names.
    pub data_file: Option<FileSpec>,
    /// The file with its header, if that is apart from the data.
    pub header: Option<FileSpec>,
    /// What else was asked for.
    pub settings: Settings,
}

/// What is wrong with the text that names an image. The source of an [`Error`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SpecError {
    /// No name at all.
    #[error("a file name is required")]
    NoFileName {
        /// The driver that wants one: `file` or `host_device`.
        driver: String,
    },
    /// A protocol nobody knows.
    #[error("unknown protocol '{0}'")]
    UnknownProtocol(String),
    /// A protocol that is known by name.
    #[error("protocol '{0}' is not supported yet")]
    UnsupportedProtocol(String),
    /// A driver nobody knows.
    #[error("unknown driver '{0}'")]
    UnknownDriver(String),
    /// A driver that is known by name.
    #[error("driver '{0}' is not supported yet")]
    UnsupportedDriver(String),
    /// Neither `driver` nor `file`.
    #[error("neither driver nor file is specified")]
    NeitherDriverNorFile,
    /// A format without the file it needs.
    #[error("driver '{0}' needs a file")]
    NoFile(String),
    /// The name of another node, of which there are none.
    #[error("there is no node or device '{0}'")]
    NoSuchNode(String),
    /// An option the driver does not have.
    #[error("format '{driver}' does not support the option '{option}'")]
    UnknownOption {
        /// The format.
        driver: String,
        /// The option.
        option: String,
    },
    /// An option within a group of options that has none of that name.
    #[error("parameter '{0}' is unexpected")]
    Unexpected(String),
    /// A value of the wrong sort.
    #[error("parameter '{name}' expects {expected}")]
    Value {
        /// The option.
        name: String,
        /// What it should be.
        expected: &'static str,
    },
    /// The text behind `json:` is no JSON.
    #[error("invalid JSON: {0}")]
    Json(String),
    /// The text behind `json:` is JSON, but no object.
    #[error("the JSON is no object")]
    NotAnObject,
    /// Trees within trees, deeper than anybody needs.
    #[error("images nested deeper than {0}")]
    TooDeep(usize),
}

impl From<SpecError> for Error {
    fn from(error: SpecError) -> Self {
        let kind = match error {
            SpecError::UnsupportedProtocol(_) | SpecError::UnsupportedDriver(_) => ErrorKind::Unsupported,
            _ => ErrorKind::Usage,
        };
        Error::new(kind, error)
    }
}

impl FileSpec {
    /// The file `path`.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            device: false,
            lock: true,
            judged: false,
        }
    }
}

impl ImageSpec {
    /// The image in the file `path`, whatever characters the name has.
    pub fn from_path(path: impl Into<PathBuf>) -> Self {
        let path = path.into();
        Self {
            text: path.clone().into_os_string(),
            shown: path.to_string_lossy().into_owned(),
            driver: None,
            file: FileSpec::new(path),
            options: Options::new(),
            backing: BackingSpec::Own,
            data_file: None,
            header: None,
            zeroinit: false,
            settings: Settings::default(),
        }
    }

    /// A file name as `qemu-img` reads it: a path, `file:PATH`, `host_device:PATH`, `zeroinit:NAME` or `json:{...}`.
    /// The errors have a [`SpecError`] as their source and the name as their path.
    pub fn from_name(name: impl AsRef<OsStr>) -> Result<Self> {
        let name = name.as_ref();
        let parsed = match split_protocol(name) {
            Some(("zeroinit", rest)) => Self::from_plain(rest).map(|mut spec| {
                spec.zeroinit = true;
                spec
            }),
            _ => Self::from_plain(name),
        };
        match parsed {
            Ok(mut spec) => {
                spec.text = name.to_owned();
                Ok(spec)
            }
            Err(error) => Err(Error::from(error).op("open").path(name)),
        }
    }

    /// The text behind `--image-opts`: `driver=qcow2,file.driver=file,file.filename=x`.
    pub fn from_options(text: &str) -> Result<Self> {
        match tree::Tree::from_key_values(text).and_then(|tree| tree.into_spec(0)) {
            Ok(mut spec) => {
                spec.text = text.into();
                Ok(spec)
            }
            Err(error) => Err(Error::from(error).op("open").path(text)),
        }
    }

    /// Whichever image this is, it is to be opened as `how` says.
    pub(crate) fn open_as(&mut self, how: Opening) {
        self.driver = how.driver.or(self.driver.take());
        for (name, value) in how.options.iter() {
            self.options.set(name, value);
        }
        if how.backing != BackingSpec::Own {
            self.backing = how.backing;
        }
        self.data_file = how.data_file.or(self.data_file.take());
        self.header = how.header.or(self.header.take());
        let (old, new) = (&self.settings, how.settings);
        self.settings = Settings {
            direct: new.direct.or(old.direct),
            no_flush: new.no_flush.or(old.no_flush),
            read_only: new.read_only.or(old.read_only),
            share: new.share.or(old.share),
            unmap: new.unmap.or(old.unmap),
        };
    }

    /// The file that holds the image.
    pub fn path(&self) -> &Path {
        &self.file.path
    }

    /// Whether `name` is more than a plain path: has a protocol in front, or is a tree.
    pub fn has_protocol(name: impl AsRef<OsStr>) -> bool {
        split_protocol(name.as_ref()).is_some()
    }

    fn from_plain(name: &OsStr) -> Result<Self, SpecError> {
        let no_name = |driver: &str| SpecError::NoFileName {
            driver: driver.to_owned(),
        };
        match split_protocol(name) {
            None if name.is_empty() => Err(no_name("file")),
            None => Ok(Self::from_path(name)),
            Some(("json", rest)) => match rest.to_str() {
                Some(json) => tree::Tree::from_json(json)?.into_spec(0),
                None => Err(SpecError::Json("it is not UTF-8".to_owned())),
            },
            Some((driver @ ("file" | "host_device"), rest)) => {
                if rest.is_empty() {
                    return Err(no_name(driver));
                }
                let mut spec = Self::from_path(rest);
                spec.file.device = driver == "host_device";
                Ok(spec)
            }
            Some((protocol, _)) => Err(match PROTOCOLS.contains(&protocol) {
                true => SpecError::UnsupportedProtocol(protocol.to_owned()),
                false => SpecError::UnknownProtocol(protocol.to_owned()),
            }),
        }
    }
}

/// What is in front of a colon, and behind it, if the colon comes before any slash.
fn split_protocol(name: &OsStr) -> Option<(&str, &OsStr)> {
    let bytes = name.as_bytes();
    let end = bytes.iter().position(|&byte| byte == b':' || byte == b'/')?;
    let (protocol, rest) = bytes.split_at_checked(end)?;
    let rest = rest.strip_prefix(b":")?;
    Some((
        std::str::from_utf8(protocol).unwrap_or("?"),
        OsStr::from_bytes(rest),
    ))
}

/// What is wrong with a driver that the registry does not have.
pub(crate) fn driver_error(name: &str) -> SpecError {
    if PROTOCOLS.contains(&name) || FORMATS.contains(&name) {
        SpecError::UnsupportedDriver(name.to_owned())
    } else {
        SpecError::UnknownDriver(name.to_owned())
    }
}

/// Protocols of `qemu-img` that are not plain files.
const PROTOCOLS: [&str; 26] = [
    "blkdebug",
    "blklogwrites",
    "blkreplay",
    "blkverify",
    "fat",
    "ftp",
    "ftps",
    "gluster",
    "gluster+rdma",
    "gluster+tcp",
    "gluster+unix",
    "host_cdrom",
    "http",
    "https",
    "iscsi",
    "iser",
    "nbd",
    "nbd+tcp",
    "nbd+unix",
    "nfs",
    "null-aio",
    "null-co",
    "nvme",
    "rbd",
    "sftp",
    "ssh",
];

/// Formats and filters of `qemu-img` that the registry may not have.
const FORMATS: [&str; 18] = [
    "bochs",
    "cloop",
    "compress",
    "copy-on-read",
    "dmg",
    "luks",
    "parallels",
    "preallocate",
    "qcow",
    "qcow2",
    "qed",
    "quorum",
    "throttle",
    "vdi",
    "vhdx",
    "vmdk",
    "vpc",
    "vvfat",
];

#[cfg(test)]
mod tests;
