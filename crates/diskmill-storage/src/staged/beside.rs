//! A file beside its target.

use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use diskmill_core::{Durability, Error, ErrorKind, Result};
use rustix::fs::{self, AtFlags, FileType, Mode, OFlags};
use rustix::io::{Errno, retry_on_intr};
use rustix::rand::{GetRandomFlags, getrandom};

use super::{InPlace, StageOptions, attributes, host};
use crate::lock::{self, LockPlan};
use crate::{CacheMode, File, FileOptions, NoDirect, os};

/// The mode of a new file, which the process's mask then lessens.
const MODE: Mode = Mode::from_raw_mode(0o644);

/// Where a staged file is and what it is to be called.
#[derive(Debug)]
pub(super) struct Beside {
    dir: OwnedFd,
    /// The target's name in `dir`.
    name: PathBuf,
    /// The name in `dir` that is to be removed in the end, if any: the new file's own until it has taken the target's,
    /// the old file's after the two were exchanged.
    part: Option<PathBuf>,
    /// The old target, open and locked.
    old: Option<File>,
    given: Given,
}

/// How the new file came by the target's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Given {
    NotYet,
    /// Nobody had it, or whoever had it is gone.
    Taken,
    /// The old file has the other name now.
    Exchanged,
}

impl Beside {
    /// A new file beside `target`, or why there can be none.
    pub(super) fn create(
        target: &Path,
        options: &StageOptions,
    ) -> Result<std::result::Result<(File, Self), InPlace>> {
        let old = match open_old(target, options)? {
            Some(old) if old.is_block_device() => return Ok(Err(InPlace::Device)),
            old => old,
        };
        let (parent, name) = match follow(target)? {
            Stands::ByName(parent, name) => (parent, name),
            Stands::ForOpenFile if old.is_some() => return Ok(Err(InPlace::OpenFile)),
            Stands::ForOpenFile => return Err(host(Errno::NOENT)),
        };
        let dir = open_dir(&parent)?;
        let old_stat = match &old {
            Some(old) => {
                let stat = fs::fstat(old).map_err(host)?;
                if stat.st_nlink > 1 {
                    return Ok(Err(InPlace::HardLinks));
                }
                if os::mount_id(old.as_fd()) != os::mount_id(dir.as_fd()) {
                    return Ok(Err(InPlace::MountPoint));
                }
                Some(stat)
            }
            None => None,
        };
        let (fd, part) = match open_new(dir.as_fd(), &name, options) {
            Ok(new) => new,
            Err(Errno::ACCESS | Errno::PERM | Errno::ROFS) if old.is_some() => {
                return Ok(Err(InPlace::Directory));
            }
            Err(Errno::INVAL) if options.cache.is_direct() => return Err(NoDirect::error()),
            Err(errno) => return Err(host(errno)),
        };
        // From here on dropping it removes the name.
        let mut beside = Self {
            dir,
            name,
            part,
            old,
            given: Given::NotYet,
        };
        if options.nocow {
            let _ = os::set_nocow(fd.as_fd());
        }
        if let Some(bytes) = options.extent_size_hint {
            let _ = os::set_extent_size_hint(fd.as_fd(), u32::try_from(bytes).unwrap_or(0));
        }
        if let (Some(old), Some(stat)) = (&beside.old, old_stat)
            && let Err(reason) = attributes::copy(old.as_fd(), &stat, fd.as_fd())
        {
            // The old file's locks go first: they would be in the way of ours.
            beside.old = None;
            return Ok(Err(reason));
        }
        let file = File::from_fd(fd, target, &options.file_options())?;
        Ok(Ok((file, beside)))
    }

    /// Does what may fail for want of space or permission before any file of a set takes its name.
    pub(super) fn prepare(&mut self, file: &File, several: bool) -> Result<()> {
        if self.part.is_some() || (self.old.is_none() && !several) {
            return Ok(());
        }
        self.link_part(file)
    }

    pub(super) fn give_name(&mut self, file: &File, several: bool) -> Result<()> {
        if self.part.is_none() {
            match os::link_open_file(file.as_fd(), self.dir.as_fd(), &self.name) {
                Ok(()) => {
                    self.given = Given::Taken;
                    return Ok(());
                }
                // Somebody has made the target meanwhile.
                Err(Errno::EXIST) => self.link_part(file)?,
                Err(errno) => return Err(host(errno)),
            }
        }
        self.check_target()?;
        let Some(part) = &self.part else {
            return Err(Error::new(ErrorKind::Io, "the new file has lost its name"));
        };
        if several && os::exchange(self.dir.as_fd(), part, &self.name).is_ok() {
            self.given = Given::Exchanged;
            return Ok(());
        }
        fs::renameat(&self.dir, part, &self.dir, &self.name).map_err(host)?;
        self.part = None;
        self.given = Given::Taken;
        Ok(())
    }

    /// Makes the target what it was, as far as that can be done.
    pub(super) fn take_name_back(&mut self) {
        match (self.given, &self.part) {
            (Given::Exchanged, Some(part)) => {
                let _ = os::exchange(self.dir.as_fd(), part, &self.name);
            }
            // There was nothing to keep; where there was, the file system could not exchange.
            (Given::Taken, _) if self.old.is_none() => {
                let _ = fs::unlinkat(&self.dir, &self.name, AtFlags::empty());
            }
            _ => {}
        }
        self.given = Given::NotYet;
    }

    /// Removes what is left over and makes the name durable if asked.
    pub(super) fn settle(&mut self, file: &File, durability: Durability) -> Result<()> {
        self.remove_part();
        if durability == Durability::None {
            return Ok(());
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let synced = match fs::openat(&self.dir, c".", flags, Mode::empty()) {
            Ok(dir) => retry_on_intr(|| fs::fsync(&dir)),
            Err(errno) => Err(errno),
        };
        match synced {
            // A directory that may not be read, or whose file system has nothing to sync there: sync all of it.
            Err(Errno::ACCESS | Errno::INVAL) => file.sync_file_system(),
            answer => answer.map_err(host),
        }
    }

    /// Gives an unnamed file a name of its own beside the target.
    fn link_part(&mut self, file: &File) -> Result<()> {
        loop {
            let part = part_name(&self.name).map_err(host)?;
            match os::link_open_file(file.as_fd(), self.dir.as_fd(), &part) {
                Ok(()) => {
                    self.part = Some(part);
                    return Ok(());
                }
                Err(Errno::EXIST) => {}
                Err(errno) => return Err(host(errno)),
            }
        }
    }

    /// Whether what has the target's name now may be replaced. The old target may: we hold its locks. Another file
    /// that has come meanwhile may if nobody uses it.
    fn check_target(&self) -> Result<()> {
        let now = match fs::statat(&self.dir, &self.name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            Err(Errno::NOENT) => return Ok(()),
            Err(errno) => return Err(host(errno)),
        };
        if let Some(old) = &self.old {
            let known = old.identity();
            if known.dev == now.st_dev && known.ino == now.st_ino {
                return Ok(());
            }
        }
        if FileType::from_raw_mode(now.st_mode) != FileType::RegularFile {
            let text = "something that is not a regular file has taken its name meanwhile";
            return Err(Error::new(ErrorKind::Denied, text));
        }
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let other = fs::openat(&self.dir, &self.name, flags, Mode::empty()).map_err(host)?;
        match lock::test(other.as_fd(), LockPlan::WRITE) {
            Err(error) if error.kind() == ErrorKind::Unsupported => Ok(()),
            answer => answer,
        }
    }

    fn remove_part(&mut self) {
        if let Some(part) = self.part.take() {
            let _ = fs::unlinkat(&self.dir, &part, AtFlags::empty());
        }
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        self.remove_part();
    }
}

/// A file in `dir` that has no name, or loses it before anybody can know it.
pub(super) fn open_nameless(dir: &Path) -> Result<OwnedFd> {
    let dir = open_dir(dir)?;
    let (fd, part) = open_new(dir.as_fd(), Path::new("diskmill"), &StageOptions::new()).map_err(host)?;
    if let Some(part) = part {
        fs::unlinkat(&dir, part, AtFlags::empty()).map_err(host)?;
    }
    Ok(fd)
}

/// Opens an old target as QEMU would, for writing, and takes its locks. `None` if there is none.
///
/// By its full name, so that the kernel's rules for links in directories that all may write to apply.
fn open_old(target: &Path, options: &StageOptions) -> Result<Option<File>> {
    let mut how = FileOptions::write(options.lock).cache(CacheMode::Writeback);
    how.exclusive = options.exclusive;
    match File::open(target, &how) {
        Ok(old) => Ok(Some(old)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Symbolic links that are followed before there must be a loop.
const MOST_LINKS: usize = 40;

/// What a name is once all symbolic links are followed.
enum Stands {
    /// A directory and a name in it, which need not exist.
    ByName(PathBuf, PathBuf),
    /// A file that a process has open, which may have any name or none: `/dev/fd/3`, `/dev/stdout`.
    ForOpenFile,
}

fn follow(target: &Path) -> Result<Stands> {
    let mut path = target.to_owned();
    for _ in 0..MOST_LINKS {
        let parent = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
            _ => PathBuf::from("."),
        };
        match fs::readlink(&path, Vec::new()) {
            Ok(_) if os::is_proc(&parent) => return Ok(Stands::ForOpenFile),
            Ok(link) => path = parent.join(OsStr::from_bytes(link.to_bytes())),
            Err(Errno::INVAL | Errno::NOENT) => {
                if path.as_os_str().is_empty() {
                    return Err(host(Errno::NOENT));
                }
                let ends_in_name = !path.as_os_str().as_bytes().ends_with(b"/");
                return match path.file_name() {
                    Some(name) if ends_in_name => Ok(Stands::ByName(parent, PathBuf::from(name))),
                    _ => Err(host(Errno::ISDIR)),
                };
            }
            Err(errno) => return Err(host(errno)),
        }
    }
    Err(host(Errno::LOOP))
}

/// Opens a directory for what is done by name in it; that it can be read is not needed.
fn open_dir(path: &Path) -> Result<OwnedFd> {
    #[cfg(target_os = "linux")]
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    #[cfg(not(target_os = "linux"))]
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    fs::open(path, flags, Mode::empty()).map_err(host)
}

/// A new, empty file in `dir`, and its name if it has one.
fn open_new(
    dir: BorrowedFd<'_>,
    name: &Path,
    options: &StageOptions,
) -> std::result::Result<(OwnedFd, Option<PathBuf>), Errno> {
    let flags = options.file_options().flags();
    let unnamed = match options.named {
        false => retry_on_intr(|| os::open_unnamed(dir, MODE, flags)),
        true => Err(Errno::OPNOTSUPP),
    };
    match unnamed {
        // Without /proc the file could not be named later.
        Ok(fd) if fs::stat(format!("/proc/self/fd/{}", fd.as_raw_fd())).is_ok() => return Ok((fd, None)),
        Err(errno @ (Errno::ACCESS | Errno::PERM | Errno::ROFS | Errno::NOSPC | Errno::DQUOT)) => {
            return Err(errno);
        }
        _ => {}
    }
    loop {
        let part = part_name(name)?;
        match retry_on_intr(|| fs::openat(dir, &part, flags | OFlags::CREATE | OFlags::EXCL, MODE)) {
            Ok(fd) => return Ok((fd, Some(part))),
            Err(Errno::EXIST) => {}
            Err(errno) => return Err(errno),
        }
    }
}

/// Bytes that a name may have.
const MOST_NAME: usize = 255;

/// A hidden name beside `name` that nobody else is likely to have: `.name.random.part`.
fn part_name(name: &Path) -> std::result::Result<PathBuf, Errno> {
    let mut seed = [0; 8];
    retry_on_intr(|| getrandom(&mut seed[..], GetRandomFlags::empty()))?;
    let tail = format!(".{:016x}.part", u64::from_ne_bytes(seed));
    let name = name.as_os_str().as_bytes();
    let keep = name.len().min(MOST_NAME - 1 - tail.len());
    let part = [b".", &name[..keep], tail.as_bytes()].concat();
    Ok(PathBuf::from(OsString::from_vec(part)))
}
