//! Opening images by policy: a name becomes storage, the storage an image, the image a chain.
//!
//! This is the only place where a name found inside an image is turned into an open file.

mod chain;
mod guard;
mod merge;
mod parent;
mod understand;

use std::ffi::{OsStr, OsString};
use std::fmt::Debug;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use diskmill_core::{
    Access, Chain, Error, Facts, Format, LayerMut, Limits, Result, Secrets, StorageMut, WhichSnapshot,
};
use diskmill_storage::{CacheMode, File, FileId};

pub use merge::{Base, ChainMut, base_from_here, chain_mut};

pub(crate) use chain::Opener;
pub use parent::Uuid;
pub(crate) use understand::{Place, Understood};

use crate::package::{Package, Unpacked};
use crate::policy::References;
use crate::spec::ImageSpec;

/// An image somebody wants opened, and how.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct OpenRequest {
    /// Which image.
    pub spec: ImageSpec,
    /// Its format by name, instead of a `driver` in `spec` or probing.
    pub format: Option<String>,
    /// How it goes through the host's page cache.
    pub cache: CacheMode,
    /// Read it even while another process writes it (`-U`): no lock but the weakest is taken.
    pub share: bool,
    /// Let nobody write it while it is open even if it is raw, as the source of a convert. Formats other than raw and
    /// backing images always hold writers off.
    pub hold: bool,
    /// Which files it may name.
    pub policy: References,
    /// Caps on what it may ask for.
    pub limits: Limits,
    /// Open this internal snapshot instead of the active state.
    pub snapshot: Option<WhichSnapshot>,
    /// Of that snapshot open the machine state, as a disk of its length, instead of the disk.
    pub machine_state: bool,
    /// Open the disk of that snapshot at the size the image has now, cut or filled up, instead of the size it had.
    pub present_size: bool,
    /// Where to look first for a parent that an image knows by its identity only.
    pub parents: Vec<PathBuf>,
    /// Open the images it is backed by. Without them, absent bytes read as zeros.
    pub backing: bool,
    /// Pass discards on to the host.
    pub unmap: bool,
    /// The file to look at, open already, in place of the one `spec` names: what came through a pipe.
    pub given: Option<Arc<File>>,
    /// Look into OVF packages for the disk, instead of taking their bytes for one.
    pub packages: bool,
    /// Which disk of a package: its identifier, its file, or its number from 1.
    pub disk: Option<String>,
    /// Disks of packages that were unpacked for this request or a clone of it.
    pub unpacked: Unpacked,
    /// Where the keys of encrypted images come from, of all that are in the chain.
    pub secrets: Secrets,
    /// Whether an encrypted image without a key does not even open, as is best where its data is to be read.
    pub needs_keys: bool,
    /// When the format is to be found out, find formats that `qemu-img` no longer has as well (cow). For what an image
    /// in such a format is backed by they always count, since it was made when they did.
    pub historic: bool,
    /// What is put around each file that is opened.
    pub around: Option<Arc<dyn Around>>,
}

/// Puts something around the files that a request opens: to watch what reaches the host, or to get in its way.
///
/// The files of images are handed over when they are attached; the headers are read before that, from the file itself.
pub trait Around: Send + Sync + Debug {
    /// What is to be used in the place of `file`, which was opened as `path`.
    fn around(&self, path: &Path, file: Arc<dyn StorageMut>) -> Arc<dyn StorageMut>;
}

impl OpenRequest {
    /// `spec`, probed, through the page cache, following whatever it names as `qemu-img` does.
    pub fn new(spec: ImageSpec) -> Self {
        Self {
            spec,
            format: None,
            cache: CacheMode::Writeback,
            share: false,
            hold: false,
            policy: References::Any,
            limits: Limits::default(),
            snapshot: None,
            machine_state: false,
            present_size: false,
            parents: Vec::new(),
            backing: true,
            unmap: false,
            given: None,
            packages: false,
            disk: None,
            unpacked: Unpacked::default(),
            historic: false,
            secrets: Secrets::new(),
            needs_keys: false,
            around: None,
        }
    }

    /// `file`, with what is to be put around it.
    pub(crate) fn host(&self, file: &Arc<File>) -> Arc<dyn StorageMut> {
        let plain: Arc<dyn StorageMut> = file.clone();
        match &self.around {
            Some(around) => around.around(file.path(), plain),
            None => plain,
        }
    }
}

/// A disk open for reading: an image and all it is backed by.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Image {
    /// The layers, overlay first.
    pub chain: Chain,
    /// What is known of each layer, in the order of the chain.
    pub nodes: Vec<Node>,
}

impl Image {
    /// No image at all: a disk without a byte.
    pub(crate) fn none() -> Self {
        Self {
            chain: Chain::default(),
            nodes: Vec::new(),
        }
    }
}

/// A disk open for changing in place.
#[derive(Debug)]
#[non_exhaustive]
pub struct ImageMut {
    /// The image that is written.
    pub top: Arc<dyn LayerMut>,
    /// What it is backed by.
    pub below: Chain,
    /// What is known of each layer: the top one, then those of `below`.
    pub nodes: Vec<Node>,
    /// What the user should be told.
    pub warnings: Vec<OpenWarning>,
}

/// What is known of an open image beside its facts.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Node {
    /// The name it is shown by: a path, or `json:{...}` where no path says it all.
    pub filename: Arc<str>,
    /// The names of its files, by [`FileIndex`](diskmill_core::FileIndex).
    pub files: Vec<Arc<str>>,
    /// Which file of the host holds it.
    pub id: FileId,
    /// What it says of itself.
    pub facts: Facts,
    /// Whether its format was guessed.
    pub probed: bool,
    /// What else it looks like: a container or format that is known by name only, taken for raw; or a second format.
    pub looks_like: Option<&'static str>,
}

/// Something a user should know about an image that opened.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum OpenWarning {
    /// Probing a file that is to be written found no format and took it for raw: its first sector is protected.
    GuessedRaw {
        /// The file.
        name: String,
    },
    /// No backing image was asked for by an empty name; `null` is the way to say it.
    EmptyBackingName,
}

/// Why an image, or one it needs, did not open. The source of an [`Error`] whose path is the image that was wanted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The image it is backed by did not open; the inner error names it.
    #[error("backing image not opened")]
    Backing(#[source] Error),
    /// Its data file did not open; the inner error names it.
    #[error("data file not opened")]
    DataFile(#[source] Error),
    /// A file with a part of its disk did not open; the inner error names it.
    #[error("extent file not opened")]
    ExtentFile(#[source] Error),
    /// Its backing image is another one than it was made for, or was written to since.
    #[error(
        "its content id is {found:08x} and its overlay was made for {wanted:08x}: it was changed since, and the \
         overlay's data fits no longer"
    )]
    BackingChanged {
        /// The content id the overlay names.
        wanted: u32,
        /// The one the backing image has.
        found: u32,
    },
    /// A differencing image without its parent.
    #[error(
        "a differencing image needs its parent: no image in '{dir}' has the UUID {uuid} (--parent FILE names another place)"
    )]
    ParentMissing {
        /// The parent.
        uuid: Uuid,
        /// Where it was looked for.
        dir: String,
    },
    /// The image that was said to be the parent is another one.
    #[error("its UUID is {found}, must be {wanted}: it is not the parent of the image above")]
    ParentOther {
        /// The parent.
        wanted: Uuid,
        /// The image.
        found: Uuid,
    },
    /// The parent was written to after the image above was made.
    #[error(
        "its UUID of modification is {found}, must be {wanted}: it was changed since, and the data of the image above \
         fits no longer"
    )]
    ParentChanged {
        /// What the image above names.
        wanted: Uuid,
        /// What the parent has.
        found: Uuid,
    },
    /// The image that was said to be the parent has no identity.
    #[error(
        "an image in {0} format has no UUID, so it cannot be told whether it is the parent of the image above"
    )]
    ParentWithoutIdentity(Format),
    /// The file is not of the format it was said to have.
    #[error("image is not in {0} format")]
    NotInFormat(Format),
    /// The image is, at some remove, backed by itself.
    #[error("the image '{0}' is among those it is backed by")]
    Loop(String),
    /// The data file is also the image, or one below it.
    #[error("the data file '{0}' is in use as an image")]
    DataFileIsImage(String),
    /// Too many images are backed by one another.
    #[error("the chain of backing files is deeper than {0} images")]
    TooDeep(usize),
    /// The policy does not let an image name this file.
    #[error(
        "the image names '{name}', which is outside of what it may name (--allow-ref '{allow}' would allow it)"
    )]
    Refused {
        /// The name, as the image writes it.
        name: String,
        /// The directory that would have to be allowed.
        allow: String,
    },
    /// The policy does not let an image name anything but plain paths.
    #[error("the image names '{0}', which is no plain path")]
    NotPlain(String),
    /// The policy demands that an image names the format of what it is backed by.
    #[error("the image does not name the format of its backing file '{0}'")]
    BackingFormatMissing(String),
    /// Writing these bytes to a disk whose format was guessed to be raw would make it look like another format.
    #[error("the format was guessed to be raw, and these bytes at its start would make it {0}")]
    WouldChangeFormat(Format),
    /// It is backed by nothing.
    #[error("the image has no backing file")]
    NoBacking,
    /// No image of this name is among those it is backed by.
    #[error("'{name}' is not among the images that '{image}' is backed by")]
    NotInChain {
        /// The name.
        name: String,
        /// The image.
        image: String,
    },
    /// The user said it is a block device.
    #[error("it is no block device")]
    NotADevice,
}

/// Opens an image, and what it is backed by, for reading.
pub fn image(request: &OpenRequest) -> Result<Image> {
    Opener::new(request).image()
}

/// Opens the OVF package that `request` names, whichever disk it speaks of. `None` if it is none, or if the request
/// does not look into packages or says a format.
pub fn package(request: &OpenRequest) -> Result<Option<Package>> {
    let spec = &request.spec;
    let named = request.format.as_deref().or(spec.driver.as_deref());
    if !request.packages || named.is_some_and(|name| name != crate::package::FORMAT) {
        return Ok(None);
    }
    let file = understand::open_file(&spec.file, Access::Read, spec, request)
        .map_err(|error| error.op("open").path(spec.path()))?;
    Package::open(Arc::new(file))
}

/// What an image says of itself in its header. Nothing it names is opened, and no key is needed.
pub fn facts(request: &OpenRequest) -> Result<Facts> {
    let mut request = request.clone();
    request.needs_keys = false;
    let image = Opener::new(&request).understand_top(Access::Read, false)?;
    Ok(image.parsed.facts().clone())
}

/// Opens an image for changing in place, and what it is backed by for reading.
pub fn image_mut(request: &OpenRequest) -> Result<ImageMut> {
    Opener::new(request).image_mut()
}

/// The name `reference` stands for when the image in the file `from` writes it: a relative path starts at the
/// directory of that image, anything else stays as it is.
pub fn resolve_name(from: &Path, reference: &OsStr) -> PathBuf {
    let name = reference.as_bytes();
    if name.is_empty() || name.starts_with(b"/") || ImageSpec::has_protocol(reference) {
        return reference.into();
    }
    let from = from.as_os_str().as_bytes();
    let dir = from
        .iter()
        .rposition(|&byte| byte == b'/')
        .and_then(|slash| from.get(..=slash))
        .unwrap_or_default();
    OsString::from_vec([dir, name].concat()).into()
}

#[cfg(test)]
mod tests;
