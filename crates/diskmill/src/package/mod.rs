//! OVF packages: opened by name, their disks handed on as storage that is read in place.
//!
//! Nothing is extracted. What a descriptor or manifest names is looked for among the members of the archive, or in the
//! descriptor's own directory, and nowhere else.

mod member;
mod verify;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use diskmill_core::{Error, ErrorKind, HostOffset, Result, Sample, Storage};
use diskmill_formats::ova::{
    Archive, Compression, DiskEntry, Envelope, EnvelopeError, Manifest, ManifestError, MemberName, envelope,
    is_descriptor, manifest,
};
use diskmill_storage::{Concat, File, FileId};

pub(crate) use verify::digest;
pub use verify::{FileState, Verified, VerifiedFile};

/// What is wrong with a package. The source of an [`Error`] that names its file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PackageError {
    /// The descriptor does not say what one must.
    #[error("descriptor '{name}' is not usable")]
    Descriptor {
        /// Its name.
        name: String,
        /// Why.
        #[source]
        source: EnvelopeError,
    },
    /// The manifest is not one.
    #[error("manifest '{name}' is not usable")]
    Manifest {
        /// Its name.
        name: String,
        /// Why.
        #[source]
        source: ManifestError,
    },
    /// Programs would choose differently.
    #[error("the package has several descriptors: '{0}' and '{1}'")]
    Descriptors(String, String),
    /// A member is longer than anything of its kind.
    #[error("member '{name}' has {len} bytes, must be at most {most}")]
    TooLong {
        /// Its name.
        name: String,
        /// Its bytes.
        len: u64,
        /// How many it may have.
        most: u64,
    },
    /// A file the package needs is not there.
    #[error("file '{0}' is not in the package")]
    NoFile(String),
    /// A file has another size than the descriptor says.
    #[error("file '{name}' has {found} bytes, the descriptor says {said}")]
    Size {
        /// Its name.
        name: String,
        /// What it has.
        found: u64,
        /// What it should have.
        said: u64,
    },
    /// A chunk has another size than the descriptor says.
    #[error("chunk '{name}' has {found} bytes, must have {wanted}")]
    Chunk {
        /// Its name.
        name: String,
        /// What it has.
        found: u64,
        /// What it must have.
        wanted: u64,
    },
    /// More chunks than anybody needs.
    #[error("file '{0}' is in more chunks than {most}", most = member::CHUNKS)]
    Chunks(String),
    /// It has no disks.
    #[error("the package has no disk")]
    NoDisk,
    /// It has several disks, and none was chosen.
    #[error("the package has several disks: {0}; choose one with --disk")]
    Several(String),
    /// It has no such disk.
    #[error("the package has no disk '{wanted}', only {there}")]
    NoSuchDisk {
        /// What was asked for.
        wanted: String,
        /// What it has.
        there: String,
    },
    /// A disk without a file.
    #[error("disk '{0}' has no file: it is one that an importer makes, empty")]
    EmptyDisk(String),
    /// A disk that is a difference to another.
    #[error("disk '{disk}' is a difference to '{parent}', which is not supported")]
    Difference {
        /// The disk.
        disk: String,
        /// The other.
        parent: String,
    },
    /// A compressed file unpacks to more than its disk could need.
    #[error("file '{name}' unpacks to more than {most} bytes, all that its disk could need")]
    Bomb {
        /// Its name.
        name: String,
        /// What was allowed.
        most: u64,
    },
    /// A compressed file is damaged.
    #[error("file '{name}' does not unpack: {reason}")]
    Gzip {
        /// Its name.
        name: String,
        /// What the decoder said.
        reason: String,
    },
    /// The disk refers to files outside of the package.
    #[error("disk '{disk}' names the file '{name}': a disk in a package must need no other")]
    Refers {
        /// The disk.
        disk: String,
        /// What it names.
        name: String,
    },
    /// A package is never changed in place.
    #[error("it is an OVF package, whose disks can only be read")]
    ReadOnly,
    /// It was said to be a package, and is none.
    #[error("it is no OVF package")]
    NotOne,
    /// A disk was chosen of something that has none to choose from.
    #[error("it is no OVF package, so --disk '{0}' makes no sense")]
    NotAPackage(String),
}

/// Disks that were unpacked, so that opening one again finds it. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Unpacked(Arc<Mutex<Vec<UnpackedDisk>>>);

/// A disk of a package: the package's file and the disk's id.
type DiskKey = (FileId, String);
type UnpackedDisk = (DiskKey, Arc<dyn Storage>);

impl Unpacked {
    fn get(
        &self,
        key: DiskKey,
        unpack: impl FnOnce() -> Result<Arc<dyn Storage>>,
    ) -> Result<Arc<dyn Storage>> {
        // Held while it unpacks: whoever asks for the same waits for it.
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, storage)) = known.iter().find(|(other, _)| *other == key) {
            return Ok(Arc::clone(storage));
        }
        let storage = unpack()?;
        known.push((key, Arc::clone(&storage)));
        Ok(storage)
    }
}

/// Whether it is what macOS puts beside a file in an archive, under the same name but for its start.
fn is_resource_fork(name: &MemberName) -> bool {
    name.base().as_str().starts_with("._")
}

impl PackageError {
    fn malformed(self) -> Error {
        Error::new(ErrorKind::Malformed, self)
    }
}

/// What `-f` calls a package, in an archive or not.
pub const FORMAT: &str = "ova";

/// Where the files of a package are.
#[derive(Debug)]
enum Place {
    /// In one archive.
    Archive(Archive),
    /// In the descriptor's directory, which is free of symbolic links.
    Directory(PathBuf),
}

/// A package, open.
#[derive(Debug)]
pub struct Package {
    file: Arc<File>,
    place: Place,
    name: MemberName,
    envelope: Envelope,
    manifest: Option<Manifest>,
    certificate: Option<MemberName>,
}

impl Package {
    /// Opens the package that `file` is, or holds the descriptor of. `None` if it is none.
    pub fn open(file: Arc<File>) -> Result<Option<Self>> {
        let path = file.path().to_owned();
        Self::open_at(file).map_err(|error| error.op("open").path(path))
    }

    fn open_at(file: Arc<File>) -> Result<Option<Self>> {
        let len = file.len()?;
        let mut head = vec![0; usize::try_from(len).unwrap_or(usize::MAX).min(Sample::HEAD)];
        file.read_at(HostOffset::ZERO, &mut head)?;
        let (place, name) = if Archive::recognise(&head) {
            let archive = Archive::read(file.as_ref())?;
            let mut found = archive
                .members()
                .iter()
                .filter(|member| member.name.has_extension("ovf") && !is_resource_fork(&member.name));
            let Some(first) = found.next() else {
                return Ok(None);
            };
            if let Some(second) = found.next() {
                let (first, second) = (first.name.to_string(), second.name.to_string());
                return Err(PackageError::Descriptors(first, second).malformed());
            }
            let name = first.name.clone();
            (Place::Archive(archive), name)
        } else if is_descriptor(&head) {
            let real = file.path().canonicalize().map_err(Error::from)?;
            let name = real
                .file_name()
                .and_then(|name| name.to_str())
                .unwrap_or_default();
            let name = MemberName::new(name).map_err(|error| Error::new(ErrorKind::Unsupported, error))?;
            let dir = real.parent().map(Path::to_owned).unwrap_or_default();
            (Place::Directory(dir), name)
        } else {
            return Ok(None);
        };
        let mut package = Self {
            file,
            place,
            envelope: Envelope::default(),
            manifest: None,
            certificate: None,
            name,
        };
        let text = package.small(&package.name, envelope::MAX_LEN)?;
        let text = text.ok_or_else(|| PackageError::NoFile(package.name.to_string()).malformed())?;
        package.envelope = Envelope::parse(&text).map_err(|source| {
            let name = package.name.to_string();
            PackageError::Descriptor { name, source }.malformed()
        })?;
        if let Some(name) = package.sibling("mf")
            && let Some(text) = package.small(&name, manifest::MAX_LEN)?
        {
            let parsed = Manifest::parse(&text).map_err(|source| {
                let name = name.to_string();
                PackageError::Manifest { name, source }.malformed()
            })?;
            package.manifest = Some(parsed);
        }
        if let Some(name) = package.sibling("cert")
            && package.find(&name)?.is_some()
        {
            package.certificate = Some(name);
        }
        Ok(Some(package))
    }

    /// The directory of the archive that the descriptor is in, with a slash at its end. What it refers to is there.
    fn dir(&self) -> &str {
        let name = self.name.as_str();
        name.rfind('/')
            .and_then(|slash| name.get(..=slash))
            .unwrap_or_default()
    }

    /// What the descriptor and the manifest call the member `name`.
    fn local(&self, name: &MemberName) -> MemberName {
        let local = name.as_str().strip_prefix(self.dir());
        local
            .and_then(|local| MemberName::new(local).ok())
            .unwrap_or_else(|| name.clone())
    }

    /// The file of the package with the descriptor's name and another extension.
    fn sibling(&self, extension: &str) -> Option<MemberName> {
        MemberName::new(&format!("{}.{extension}", self.name.stem())).ok()
    }

    /// What the descriptor says.
    pub fn envelope(&self) -> &Envelope {
        &self.envelope
    }

    /// The name of the descriptor.
    pub fn name(&self) -> &MemberName {
        &self.name
    }

    /// Whether it is one archive.
    pub fn archive(&self) -> Option<&Archive> {
        match &self.place {
            Place::Archive(archive) => Some(archive),
            Place::Directory(_) => None,
        }
    }

    /// The manifest, if there is one.
    pub fn manifest(&self) -> Option<&Manifest> {
        self.manifest.as_ref()
    }

    /// The certificate, if there is one.
    pub fn certificate(&self) -> Option<&MemberName> {
        self.certificate.as_ref()
    }

    /// The disk called `wanted`: by identifier, by the name of its file, or by its number from 1. Without `wanted` the
    /// only one that has a file.
    pub fn choose(&self, wanted: Option<&str>) -> Result<&DiskEntry> {
        let disks = &self.envelope.disks;
        let usage = |error| Error::new(ErrorKind::Usage, error);
        match wanted {
            None => {
                let hard = disks.iter().any(|disk| disk.file.is_some() && !disk.is_optical());
                let mut stored = disks
                    .iter()
                    .filter(|disk| disk.file.is_some() && disk.is_optical() != hard);
                match (stored.next(), stored.next()) {
                    (Some(only), None) => Ok(only),
                    (Some(_), Some(_)) => Err(usage(PackageError::Several(self.names()))),
                    (None, _) => Err(usage(PackageError::NoDisk)),
                }
            }
            Some(wanted) => {
                let by_file = |disk: &&DiskEntry| {
                    let file = disk.file.and_then(|file| self.envelope.files.get(file));
                    file.is_some_and(|file| file.name.as_str() == wanted)
                };
                let by_number = || {
                    let index = wanted.parse::<usize>().ok()?.checked_sub(1)?;
                    disks.get(index)
                };
                self.envelope
                    .disk(wanted)
                    .or_else(|| disks.iter().find(by_file))
                    .or_else(by_number)
                    .ok_or_else(|| {
                        let wanted = wanted.to_owned();
                        let there = self.names();
                        usage(PackageError::NoSuchDisk { wanted, there })
                    })
            }
        }
    }

    fn names(&self) -> String {
        let names: Vec<_> = self.envelope.disks.iter().map(|disk| disk.id.as_str()).collect();
        names.join(", ")
    }

    /// The bytes of the file that holds `disk`, unpacked and put together, and its name.
    pub fn storage(&self, disk: &DiskEntry) -> Result<(Arc<dyn Storage>, MemberName)> {
        self.storage_once(disk, &Unpacked::default())
    }

    /// The same; what is unpacked for it is kept in `unpacked`, and taken from there if it is.
    pub(crate) fn storage_once(
        &self,
        disk: &DiskEntry,
        unpacked: &Unpacked,
    ) -> Result<(Arc<dyn Storage>, MemberName)> {
        let id = disk.id.clone();
        if let Some(parent) = disk.parent.clone() {
            let error = PackageError::Difference { disk: id, parent };
            return Err(Error::new(ErrorKind::Unsupported, error));
        }
        let file = disk.file.and_then(|file| self.envelope.files.get(file));
        let file = file.ok_or_else(|| Error::new(ErrorKind::Usage, PackageError::EmptyDisk(id)))?;
        let stored: Arc<dyn Storage> = match self.parts(file)?.as_slice() {
            [one] => Arc::clone(&one.storage),
            parts => Arc::new(Concat::new(parts.iter().map(|part| Arc::clone(&part.storage)))?),
        };
        let storage = match file.compression {
            Compression::Gzip => {
                let key = (self.file.identity(), disk.id.clone());
                unpacked.get(key, || self.unpacked(file, disk.capacity, stored.as_ref()))?
            }
            _ => stored,
        };
        Ok((storage, file.name.clone()))
    }
}
