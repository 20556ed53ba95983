//! Whether the files of a package are those its manifest was made for.

use diskmill_core::{HostOffset, Job, Result, Storage};
use diskmill_formats::ova::lint::{self, DiskBytes, Lint, Subject};
use diskmill_formats::ova::{Algorithm, Hasher, MemberName, envelope, manifest};

use super::member::Part;
use super::{Package, PackageError};

/// What is known of a file of a package.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FileState {
    /// Its digest is the manifest's.
    Good(Algorithm),
    /// Its digest is another one.
    Differs {
        /// How it was made.
        algorithm: Algorithm,
        /// What the manifest says.
        said: String,
        /// What it is.
        found: String,
    },
    /// The manifest does not list it: nothing vouches for it.
    NotListed,
    /// The descriptor or the manifest names it, and it is not there.
    Missing,
    /// It is in the archive, and the descriptor does not refer to it.
    NotReferred,
    /// It has not the size that the descriptor says, or cannot be read.
    Broken(String),
}

/// A file of a package, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VerifiedFile {
    /// Its name.
    pub name: MemberName,
    /// What is known of it.
    pub state: FileState,
}

/// What checking a package gave.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Verified {
    /// Whether there is a manifest at all.
    pub manifest: bool,
    /// The certificate, if there is one. It is not verified.
    pub certificate: Option<MemberName>,
    /// The files: the descriptor, those it refers to, and what else was found.
    pub files: Vec<VerifiedFile>,
}

impl Verified {
    /// Whether a file is not what it should be.
    pub fn is_bad(&self) -> bool {
        self.files.iter().any(|file| {
            matches!(
                file.state,
                FileState::Differs { .. } | FileState::Missing | FileState::Broken(_)
            )
        })
    }
}

/// Bytes that are hashed at once.
const STEP: usize = 1 << 20;

impl Package {
    /// Reads all files of the package and compares their digests with the manifest's.
    pub fn verify(&self, job: Job<'_>) -> Result<Verified> {
        let mut verified = Verified {
            manifest: self.manifest.is_some(),
            certificate: self.certificate.clone(),
            files: Vec::new(),
        };
        let mut parts: Vec<Part> = Vec::new();
        if let Some(storage) = self.find(&self.name)? {
            let name = self.local(&self.name);
            parts.push(Part { name, storage });
        }
        for file in &self.envelope.files {
            match self.parts(file) {
                Ok(found) => parts.extend(found),
                Err(error) => {
                    let state = match error.find::<PackageError>() {
                        Some(PackageError::NoFile(_)) => FileState::Missing,
                        Some(known) => FileState::Broken(known.to_string()),
                        None => return Err(error),
                    };
                    verified.files.push(VerifiedFile {
                        name: file.name.clone(),
                        state,
                    });
                }
            }
        }
        let mut total = 0u64;
        for part in &parts {
            total = total.saturating_add(part.storage.len()?);
        }
        job.observer.total(total);
        for part in &parts {
            let state = self.state_of(part, job)?;
            verified.files.push(VerifiedFile {
                name: part.name.clone(),
                state,
            });
        }
        let known =
            |verified: &Verified, name: &MemberName| verified.files.iter().any(|file| file.name == *name);
        for entry in self.manifest.iter().flat_map(|manifest| manifest.entries()) {
            if !known(&verified, &entry.name) && self.find(&entry.name)?.is_none() {
                verified.files.push(VerifiedFile {
                    name: entry.name.clone(),
                    state: FileState::Missing,
                });
            }
        }
        let members = self
            .archive()
            .map(|archive| archive.members())
            .unwrap_or_default();
        for member in members {
            let own = ["mf", "cert"]
                .iter()
                .any(|kind| self.sibling(kind).as_ref() == Some(&member.name));
            if !own && !known(&verified, &self.local(&member.name)) {
                verified.files.push(VerifiedFile {
                    name: member.name.clone(),
                    state: FileState::NotReferred,
                });
            }
        }
        Ok(verified)
    }

    fn state_of(&self, part: &Part, job: Job<'_>) -> Result<FileState> {
        let Some(entry) = self
            .manifest
            .as_ref()
            .and_then(|manifest| manifest.find(&part.name))
        else {
            job.observer.advance(part.storage.len()?);
            return Ok(FileState::NotListed);
        };
        let found = digest(part.storage.as_ref(), entry.algorithm, job)?;
        Ok(if found == entry.digest {
            FileState::Good(entry.algorithm)
        } else {
            FileState::Differs {
                algorithm: entry.algorithm,
                said: entry.digest.clone(),
                found,
            }
        })
    }
}

/// The digest of all bytes of `storage`.
pub(crate) fn digest(storage: &dyn Storage, algorithm: Algorithm, job: Job<'_>) -> Result<String> {
    let len = storage.len()?;
    let mut hasher = Hasher::new(algorithm);
    let mut buf = vec![0; STEP];
    let mut at = 0u64;
    while at < len {
        job.check()?;
        let have = usize::try_from(len - at).unwrap_or(usize::MAX).min(STEP);
        let now = buf.get_mut(..have).unwrap_or_default();
        storage.read_at(HostOffset::new(at), now)?;
        hasher.update(now);
        at += have as u64;
        job.observer.advance(have as u64);
    }
    Ok(hasher.finish())
}

impl Package {
    /// What importers are known not to like about the package.
    pub fn lint(&self) -> Result<Vec<Lint>> {
        let text = self.small(&self.name, envelope::MAX_LEN)?.unwrap_or_default();
        let manifest_text = match self.sibling("mf") {
            Some(name) => self.small(&name, manifest::MAX_LEN)?,
            None => None,
        };
        let manifest = self.manifest.as_ref().zip(manifest_text.as_deref());
        let mut lints = lint::package(&Subject {
            archive: self.archive(),
            name: &self.name,
            envelope: &self.envelope,
            text: &text,
            manifest,
        });
        let disks = self.envelope.disks.iter();
        for disk in disks.filter(|disk| disk.file.is_some() && !disk.is_optical()) {
            let (storage, _) = self.storage(disk)?;
            let (mut head, mut tail) = ([0; 512], [0; 1024]);
            storage.read_padded(HostOffset::ZERO, &mut head)?;
            let end = storage.len()?.saturating_sub(tail.len() as u64);
            storage.read_padded(HostOffset::new(end), &mut tail)?;
            let bytes = DiskBytes {
                head: &head,
                tail: &tail,
            };
            lints.extend(lint::disk(disk, bytes));
        }
        Ok(lints)
    }
}
