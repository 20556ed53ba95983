//! Finding a parent that an image knows by its identity only, as differencing images of VirtualBox do.
//!
//! Looked at are the files the user names as parents, whatever the policy, and then those of the image's own directory
//! whose names end like the image's, as far as the policy lets the image name them.

use std::fmt;
use std::path::{Path, PathBuf};

use diskmill_core::{Access, Error, ErrorKind, Identity, OpenSpec, Result};

use super::chain::Backing;
use super::understand::open_file;
use super::{Node, OpenError, Opener, Understood};
use crate::policy::References;
use crate::spec::ImageSpec;

/// Files of a directory that are looked at.
const CANDIDATES: usize = 4096;

/// An identity, as people write it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Uuid(pub [u8; 16]);

impl fmt::Display for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        diskmill_formats::vdi::uuid::Uuid(self.0).fmt(f)
    }
}

impl Opener<'_> {
    /// The image that `child` calls `wanted`.
    pub(super) fn parent(&self, child: &Understood, wanted: Identity) -> Result<Backing> {
        let from = child.file.path();
        let found = self.look_for(child, wanted);
        found.map_err(|error| {
            Error::new(error.kind(), OpenError::Backing(error))
                .op("open")
                .path(from)
        })
    }

    fn look_for(&self, child: &Understood, wanted: Identity) -> Result<Backing> {
        let backing = |spec| Backing {
            spec,
            format: Some(child.driver.format().name().to_owned()),
            historic: false,
        };
        let mut changed = None;
        for path in &self.request.parents {
            let spec = ImageSpec::from_path(path);
            // The user's own word: what is wrong with this file must be told.
            match self
                .identity(child, &spec)
                .map_err(|error| error.op("open").path(path))?
            {
                Some(found) if found == wanted => return Ok(backing(spec)),
                Some(found) if found.image == wanted.image => changed = Some(spec),
                _ => {}
            }
        }
        let dir = directory(child.file.path());
        let mut denied = false;
        for path in siblings(child.file.path(), &dir) {
            let name = path.display().to_string();
            let Ok(spec) = self.permitted_path(path, &name) else {
                denied = true;
                continue;
            };
            match self.identity(child, &spec) {
                Ok(Some(found)) if found == wanted => return Ok(backing(spec)),
                Ok(Some(found)) if found.image == wanted.image => changed = changed.or(Some(spec)),
                _ => {}
            }
        }
        match changed {
            // Opening it will tell how it differs.
            Some(spec) => Ok(backing(spec)),
            None if denied && self.request.policy != References::Any => {
                let name = format!("the image with UUID {}", Uuid(wanted.image));
                let allow = dir.display().to_string();
                Err(Error::new(ErrorKind::Denied, OpenError::Refused { name, allow }))
            }
            None => Err(Error::new(
                ErrorKind::NotFound,
                OpenError::ParentMissing {
                    uuid: Uuid(wanted.image),
                    dir: dir.display().to_string(),
                },
            )),
        }
    }

    /// Which image `spec` is, if it is one of the child's format.
    fn identity(&self, child: &Understood, spec: &ImageSpec) -> Result<Option<Identity>> {
        let file = open_file(&spec.file, Access::Read, spec, self.request)?;
        let mut how = OpenSpec::default();
        how.limits = self.request.limits;
        how.secrets = self.request.secrets.for_image(&*spec.shown);
        let parsed = child.driver.parse(std::sync::Arc::new(file), &how)?;
        Ok(parsed.facts().identity)
    }
}

/// Whether `below` is the parent that the image `above` was made for, in the state it was made for.
pub(super) fn check_identity(above: Option<&Node>, below: &Node) -> Result<()> {
    let Some(wanted) = above.and_then(|node| node.facts.parent) else {
        return Ok(());
    };
    let wrong = match below.facts.identity {
        None => OpenError::ParentWithoutIdentity(below.facts.format),
        Some(found) if found.image != wanted.image => OpenError::ParentOther {
            wanted: Uuid(wanted.image),
            found: Uuid(found.image),
        },
        // Some programs leave the state open.
        Some(found) if found.state != wanted.state && wanted.state != [0; 16] => OpenError::ParentChanged {
            wanted: Uuid(wanted.state),
            found: Uuid(found.state),
        },
        Some(_) => return Ok(()),
    };
    Err(Error::new(ErrorKind::Corrupt, wrong))
}

fn directory(path: &Path) -> PathBuf {
    match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir.to_owned(),
        _ => PathBuf::from("."),
    }
}

/// The other files in `dir` with the extension of `path`, in the order of their names.
fn siblings(path: &Path, dir: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(dir) else {
        return Vec::new();
    };
    let mut found: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|other| other.file_name() != path.file_name() && other.extension() == path.extension())
        .filter(|other| std::fs::metadata(other).is_ok_and(|data| data.is_file()))
        .take(CANDIDATES)
        .collect();
    found.sort();
    found
}
