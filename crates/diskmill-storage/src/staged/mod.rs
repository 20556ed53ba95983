//! A new file that takes its name only when it is complete.
//!
//! The bytes go to a file beside the target: one without a name where the file system has those, so that not even a
//! kill leaves anything behind, else a hidden `.name.random.part`. [`Staged::commit`] renames it over the target.
//! Until then the target is absent or as it was; dropping a [`Staged`] leaves it so.
//!
//! An old target keeps owner, mode and extended attributes, and is held with QEMU's locks all the while: a disk that a
//! virtual machine has open is never replaced. Where a rename would not be the same as writing to the old file, the
//! old file is written instead, as QEMU does, and [`Staged::in_place`] says why.

mod attributes;
mod beside;
#[cfg(test)]
mod tests;

use std::fmt;
use std::io::Error as IoError;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use diskmill_core::{Durability, Error, ErrorKind, Result, StorageMut};
use rustix::io::Errno;

use crate::lock::LockPlan;
use crate::{CacheMode, File, FileOptions};
use beside::Beside;

/// How to make a [`Staged`] file.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct StageOptions {
    /// How writes pass the host's cache.
    pub cache: CacheMode,
    /// The locks to take on the new file, and on an old target as long as it stands.
    pub lock: LockPlan,
    /// Ask the file system not to copy on write. Where it cannot, nothing happens.
    pub nocow: bool,
    /// Ask the file system to allocate in steps of so many bytes. Where it cannot, nothing happens.
    pub extent_size_hint: Option<u64>,
    /// Refuse a block device that is mounted or otherwise in use by the kernel.
    pub exclusive: bool,
    /// Fail where an old target would have to be written in place, and leave it as it is.
    pub beside: bool,
    /// Do without files that have no name, as where the file system does not know them.
    named: bool,
}

impl Default for StageOptions {
    fn default() -> Self {
        Self {
            cache: CacheMode::Writeback,
            lock: LockPlan::WRITE,
            nocow: false,
            extent_size_hint: None,
            exclusive: false,
            beside: false,
            named: false,
        }
    }
}

impl StageOptions {
    /// The usual options: through the page cache, nobody else may write.
    pub fn new() -> Self {
        Self::default()
    }

    /// With this cache mode.
    #[must_use]
    pub fn cache(mut self, cache: CacheMode) -> Self {
        self.cache = cache;
        self
    }

    /// Only beside an old target, never in its place: what it holds is still needed.
    #[must_use]
    pub fn beside(mut self) -> Self {
        self.beside = true;
        self
    }

    /// With these locks.
    #[must_use]
    pub fn lock(mut self, lock: LockPlan) -> Self {
        self.lock = lock;
        self
    }

    /// With what a driver asks for in an [`OutputSpec`](diskmill_core::OutputSpec).
    #[must_use]
    pub fn for_output(mut self, output: &diskmill_core::OutputSpec) -> Self {
        self.nocow = output.nocow;
        self.extent_size_hint = output.extent_size_hint;
        self
    }

    fn file_options(&self) -> FileOptions {
        let mut options = FileOptions::write(self.lock).cache(self.cache);
        options.exclusive = self.exclusive;
        options
    }
}

/// Why a target is written in place: a failure half way then leaves it half written, as with QEMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum InPlace {
    /// It is a block device.
    Device,
    /// It has several names, which are to stay one file.
    HardLinks,
    /// It is a mount point of its own.
    MountPoint,
    /// Its owner could not be given to a new file.
    Owner,
    /// Its mode, access list or other attributes could not be given to a new file.
    Attributes,
    /// Nothing can be created in its directory.
    Directory,
    /// It was named as a file that a process has open, and whoever has it open is to see the new bytes.
    OpenFile,
}

impl fmt::Display for InPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Device => "it is a block device",
            Self::HardLinks => "it has several hard links",
            Self::MountPoint => "it is a mount point",
            Self::Owner => "it belongs to somebody else",
            Self::Attributes => "its attributes cannot be given to a new file",
            Self::Directory => "nothing can be created in its directory",
            Self::OpenFile => "it is named as an open file",
        })
    }
}

/// A new file, being written under another name or none.
#[derive(Debug)]
pub struct Staged {
    file: Arc<File>,
    target: PathBuf,
    way: Way,
}

#[derive(Debug)]
enum Way {
    InPlace(InPlace),
    Beside(Box<Beside>),
}

impl Staged {
    /// Starts a new file that is to be called `target`. Symbolic links are followed.
    ///
    /// An error of kind [`Locked`](diskmill_core::ErrorKind::Locked) if somebody uses an old file of that name.
    pub fn create(target: impl AsRef<Path>, options: &StageOptions) -> Result<Self> {
        let target = target.as_ref();
        Self::create_at(target, options).map_err(|error| error.op("create").path(target))
    }

    fn create_at(target: &Path, options: &StageOptions) -> Result<Self> {
        let (file, way) = match Beside::create(target, options)? {
            Ok((file, beside)) => (file, Way::Beside(Box::new(beside))),
            Err(reason) if options.beside => {
                let text = format!("no new file can take its place: {reason}");
                return Err(Error::new(ErrorKind::Unsupported, text));
            }
            Err(reason) => {
                let file = File::open(target, &options.file_options())?;
                if !file.is_block_device() {
                    file.set_len(0)?;
                }
                (file, Way::InPlace(reason))
            }
        };
        Ok(Self {
            file: Arc::new(file),
            target: target.to_owned(),
            way,
        })
    }

    /// Where to write.
    pub fn storage(&self) -> Arc<dyn StorageMut> {
        Arc::clone(&self.file) as Arc<dyn StorageMut>
    }

    /// The open file.
    pub fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// The name it is to have, as given.
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// Why the target is written in place, if it is.
    pub fn in_place(&self) -> Option<InPlace> {
        match &self.way {
            Way::InPlace(reason) => Some(*reason),
            Way::Beside(_) => None,
        }
    }

    /// Gives the file its name. With [`Durability::Synced`] it and its name are on stable storage afterwards, whatever
    /// the cache mode.
    pub fn commit(self, durability: Durability) -> Result<()> {
        Self::commit_all(vec![self], durability)
    }

    /// Gives the files of one image their names: in the order of `set`, in which the file that names the others must
    /// be last. If one cannot have its name, those before it give theirs back.
    pub fn commit_all(mut set: Vec<Self>, durability: Durability) -> Result<()> {
        let several = set.len() > 1;
        for staged in &mut set {
            staged.prepare(durability, several)?;
        }
        for index in 0..set.len() {
            if let Err(error) = set[index].give_name(several) {
                for earlier in set[..index].iter_mut().rev() {
                    earlier.take_name_back();
                }
                return Err(error);
            }
        }
        for staged in &mut set {
            staged.settle(durability)?;
        }
        Ok(())
    }

    fn prepare(&mut self, durability: Durability, several: bool) -> Result<()> {
        if durability == Durability::Synced {
            self.file.sync_all()?;
        }
        if let Way::Beside(beside) = &mut self.way {
            beside.prepare(&self.file, several).map_err(at(&self.target))?;
        }
        Ok(())
    }

    fn give_name(&mut self, several: bool) -> Result<()> {
        match &mut self.way {
            Way::InPlace(_) => Ok(()),
            Way::Beside(beside) => beside.give_name(&self.file, several).map_err(at(&self.target)),
        }
    }

    fn take_name_back(&mut self) {
        if let Way::Beside(beside) = &mut self.way {
            beside.take_name_back();
        }
    }

    fn settle(&mut self, durability: Durability) -> Result<()> {
        match &mut self.way {
            Way::InPlace(_) => Ok(()),
            Way::Beside(beside) => beside.settle(&self.file, durability).map_err(at(&self.target)),
        }
    }
}

impl File {
    /// A new file without a name in the directory `dir`: it is gone when it is closed, or the process is killed.
    pub fn temporary(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        beside::open_nameless(dir)
            .and_then(|fd| Self::from_fd(fd, dir, &FileOptions::write(LockPlan::NONE)))
            .map_err(|error| error.op("create a temporary file in").path(dir))
    }
}

/// Names the target in an error.
fn at(target: &Path) -> impl FnOnce(Error) -> Error + '_ {
    move |error| error.op("rename to").path(target)
}

fn host(errno: Errno) -> Error {
    IoError::from(errno).into()
}
