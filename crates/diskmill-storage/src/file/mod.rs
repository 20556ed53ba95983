//! Regular files and block devices.
//!
//! | part | what |
//! |---|---|
//! | `mod` | opening, identity, length, locks |
//! | `io` | reading and writing through the page cache |
//! | `direct` | and past it |
//! | `holes` | where the host knows of zeros |
//! | `space` | zeroing, discarding, reserving, resizing |
//!
//! The length and the last hole found are remembered, so neither costs a system call each time. Both stay true because
//! whoever writes holds QEMU's locks; [`File::refresh`] forgets them where somebody else may have been at work.

mod direct;
mod holes;
mod io;
mod space;
#[cfg(test)]
mod tests;

use std::io::{Error as IoError, IoSlice};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use diskmill_core::{
    Error, ErrorKind, Hints, HostOffset, HostRun, RawFile, Result, Storage, StorageMut, ZeroHow,
};
#[cfg(target_os = "linux")]
use rustix::fs::ResolveFlags;
use rustix::fs::{self, FileType, Mode, OFlags};
use rustix::io::{Errno, retry_on_intr};

use crate::lock::{self, LockPlan};
use crate::{CacheMode, NoDirect, NotADisk, device};
use direct::Direct;
use holes::Holes;

/// How to open a [`File`].
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub struct FileOptions {
    /// Open for writing too.
    pub write: bool,
    /// How writes pass the host's cache.
    pub cache: CacheMode,
    /// The locks to take.
    pub lock: LockPlan,
    /// Refuse a block device that is mounted or otherwise in use by the kernel.
    pub exclusive: bool,
    /// Refuse a path with a symbolic link anywhere in it, as far as the host can (Linux 5.6 and later).
    pub no_links: bool,
}

impl FileOptions {
    /// Reading, with the locks of `lock`.
    pub fn read(lock: LockPlan) -> Self {
        Self {
            lock,
            ..Self::default()
        }
    }

    /// Reading and writing, with the locks of `lock`.
    pub fn write(lock: LockPlan) -> Self {
        Self {
            write: true,
            lock,
            ..Self::default()
        }
    }

    /// With this cache mode.
    #[must_use]
    pub fn cache(mut self, cache: CacheMode) -> Self {
        self.cache = cache;
        self
    }

    /// Refusing a block device that is in use by the kernel.
    #[must_use]
    pub fn exclusive(mut self) -> Self {
        self.exclusive = true;
        self
    }

    /// Refusing a path with a symbolic link anywhere in it: what was judged by its path is what is opened.
    #[must_use]
    pub fn no_links(mut self) -> Self {
        self.no_links = true;
        self
    }

    /// The flags of `open` for these options.
    pub(crate) fn flags(&self) -> OFlags {
        let mut flags = OFlags::CLOEXEC;
        flags |= if self.write { OFlags::RDWR } else { OFlags::RDONLY };
        if self.cache.is_direct() {
            flags |= OFlags::DIRECT;
        }
        if self.cache.is_through() && self.write {
            flags |= OFlags::DSYNC;
        }
        flags
    }
}

/// What tells one file of a host from another, whatever it is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FileId {
    /// The device the file is on; for a block device node, the device it stands for.
    pub dev: u64,
    /// The inode on it; 0 for a block device node.
    pub ino: u64,
}

/// What a host file is to us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Regular,
    /// A block device with logical sectors of this many bytes.
    Device {
        sector: u32,
    },
}

impl Kind {
    fn of(stat: &fs::Stat) -> Result<FileType> {
        let what = match FileType::from_raw_mode(stat.st_mode) {
            kind @ (FileType::RegularFile | FileType::BlockDevice) => return Ok(kind),
            FileType::Directory => "directory",
            FileType::CharacterDevice => "character device",
            FileType::Fifo => "fifo",
            FileType::Socket => "socket",
            _ => "file of unknown type",
        };
        Err(NotADisk::error(what))
    }
}

/// A regular file or block device.
#[derive(Debug)]
pub struct File {
    fd: OwnedFd,
    path: PathBuf,
    kind: Kind,
    id: FileId,
    writable: bool,
    cache: CacheMode,
    direct: Option<Direct>,
    len: AtomicU64,
    /// Counts changes, so that what was learnt about holes before one is not believed after it.
    changes: AtomicU64,
    holes: Mutex<Option<Holes>>,
    /// Whether the host calls new data a hole until it is flushed.
    hides_new_data: OnceLock<bool>,
    /// Calls the host has said it does not support: bits of [`Call`].
    unsupported: AtomicU8,
    failed_sync: OnceLock<Errno>,
    locks: Mutex<LockPlan>,
    unlockable: AtomicBool,
}

/// A call that a host may lack.
#[derive(Clone, Copy, Debug)]
#[repr(u8)]
enum Call {
    Seek = 1,
    Punch = 2,
    ZeroRange = 4,
    Reserve = 8,
    Discard = 16,
    DeviceZero = 32,
}

impl File {
    /// Opens the regular file or block device `path`. Anything else is refused, without waiting for a writer at the
    /// other end of a pipe and, as far as a name can be trusted, without touching a device that minds.
    pub fn open(path: impl AsRef<Path>, options: &FileOptions) -> Result<Self> {
        let path = path.as_ref();
        Self::open_at(path, options).map_err(|error| error.op("open").path(path))
    }

    fn open_at(path: &Path, options: &FileOptions) -> Result<Self> {
        Kind::of(&fs::stat(path).map_err(IoError::from)?)?;
        let flags = options.flags() | OFlags::NONBLOCK | OFlags::NOCTTY;
        let fd = open_fd(path, flags, options.no_links).map_err(|errno| match errno {
            Errno::INVAL if options.cache.is_direct() => NoDirect::error(),
            _ => IoError::from(errno).into(),
        })?;
        Self::from_fd(fd, path, options)
    }

    /// Takes over an open file, whose flags must be those of `options`.
    pub(crate) fn from_fd(fd: OwnedFd, path: &Path, options: &FileOptions) -> Result<Self> {
        let stat = fs::fstat(&fd).map_err(IoError::from)?;
        let kind = match Kind::of(&stat)? {
            FileType::BlockDevice => Kind::Device {
                sector: device::sector_size(fd.as_fd()),
            },
            _ => Kind::Regular,
        };
        let fd = match kind {
            Kind::Device { .. } if options.exclusive => {
                let again = options.flags() | OFlags::EXCL;
                open_fd(path, again, options.no_links).map_err(IoError::from)?
            }
            _ => fd,
        };
        // Only the opening must not wait; reading and writing may, and with a regular file they always do.
        if kind != Kind::Regular {
            let flags = fs::fcntl_getfl(&fd).map_err(IoError::from)?;
            fs::fcntl_setfl(&fd, flags - OFlags::NONBLOCK).map_err(IoError::from)?;
        }
        let id = match kind {
            Kind::Device { .. } => FileId {
                dev: stat.st_rdev,
                ino: 0,
            },
            Kind::Regular => FileId {
                dev: stat.st_dev,
                ino: stat.st_ino,
            },
        };
        let file = Self {
            path: path.to_owned(),
            kind,
            id,
            writable: options.write,
            cache: options.cache,
            direct: options.cache.is_direct().then(|| Direct::new(fd.as_fd(), kind)),
            len: AtomicU64::new(0),
            changes: AtomicU64::new(0),
            holes: Mutex::new(None),
            hides_new_data: OnceLock::new(),
            unsupported: AtomicU8::new(0),
            failed_sync: OnceLock::new(),
            locks: Mutex::new(LockPlan::NONE),
            unlockable: AtomicBool::new(false),
            fd,
        };
        file.relock(options.lock)?;
        file.refresh()?;
        Ok(file)
    }

    /// Which file of the host this is.
    pub fn identity(&self) -> FileId {
        self.id
    }

    /// The name it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it is a block device.
    pub fn is_block_device(&self) -> bool {
        matches!(self.kind, Kind::Device { .. })
    }

    /// Bytes in a logical sector of a block device; 512 for a regular file.
    pub fn logical_block_size(&self) -> u32 {
        match self.kind {
            Kind::Device { sector } => sector,
            Kind::Regular => 512,
        }
    }

    /// Whether it was opened for writing.
    pub fn is_writable(&self) -> bool {
        self.writable
    }

    /// Looks at the length again and forgets what is known of holes: somebody else may have changed the file.
    pub fn refresh(&self) -> Result<()> {
        let len = match self.kind {
            Kind::Regular => {
                let stat = fs::fstat(&self.fd).map_err(|errno| self.fail("stat", None, errno))?;
                match u64::try_from(stat.st_size) {
                    Ok(len @ 1..) => len,
                    // What the kernel makes up as it is read has no end to seek to and is no disk, empty or not.
                    _ => device::len(self.as_fd()).map_err(|errno| self.fail("seek", None, errno))?,
                }
            }
            Kind::Device { .. } => {
                device::len(self.as_fd()).map_err(|errno| self.fail("seek", None, errno))?
            }
        };
        self.len.store(len, Ordering::Release);
        self.changed();
        Ok(())
    }

    /// The locks held.
    pub fn locks(&self) -> LockPlan {
        *self.locks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the locks held to those of `plan`. If somebody else is in the way the old ones stay, and the error is
    /// of kind [`ErrorKind::Locked`] with a [`LockError`](crate::LockError).
    ///
    /// Where the file system knows no locks, a plan that only reads is let pass and [`is_unlocked`](Self::is_unlocked)
    /// says so; one that writes is refused.
    pub fn relock(&self, plan: LockPlan) -> Result<()> {
        let mut held = self.locks.lock().unwrap_or_else(PoisonError::into_inner);
        match lock::change(self.as_fd(), *held, plan) {
            Ok(()) => *held = plan,
            Err(error) if error.kind() == ErrorKind::Unsupported && !self.writable => {
                self.unlockable.store(true, Ordering::Relaxed);
            }
            Err(error) => return Err(error.op("lock").path(&self.path)),
        }
        Ok(())
    }

    /// Whether locks were asked for and the file system has none.
    pub fn is_unlocked(&self) -> bool {
        self.unlockable.load(Ordering::Relaxed)
    }

    /// Makes everything durable even where the cache mode leaves that out. Sticky as [`StorageMut::sync`].
    pub fn sync_always(&self) -> Result<()> {
        self.sync_by(|fd| fs::fdatasync(fd))
    }

    /// Makes everything durable, attributes of the file included. Sticky as [`StorageMut::sync`].
    pub(crate) fn sync_all(&self) -> Result<()> {
        self.sync_by(|fd| fs::fsync(fd))
    }

    /// Behaves from here on as after a flush that failed.
    #[cfg(test)]
    pub(crate) fn pretend_sync_failed(&self, errno: Errno) {
        self.failed_sync.get_or_init(|| errno);
    }

    fn sync_by(&self, call: impl Fn(&OwnedFd) -> Result<(), Errno>) -> Result<()> {
        if let Some(errno) = self.failed_sync.get() {
            return Err(self.fail("sync", None, *errno));
        }
        retry_on_intr(|| call(&self.fd))
            .map_err(|errno| self.fail("sync", None, *self.failed_sync.get_or_init(|| errno)))
    }

    /// Makes everything on the file's file system durable.
    pub(crate) fn sync_file_system(&self) -> Result<()> {
        self.sync_all()?;
        #[cfg(target_os = "linux")]
        fs::syncfs(&self.fd).map_err(|errno| self.fail("sync", None, errno))?;
        Ok(())
    }

    fn lacks(&self, call: Call) -> bool {
        self.unsupported.load(Ordering::Relaxed) & call as u8 != 0
    }

    /// Notes the answer of a call that a host may lack: `Ok(true)` if it worked, `Ok(false)` if another way must be
    /// taken.
    fn supported(&self, call: Call, answer: Result<(), Errno>) -> Result<bool, Errno> {
        match answer {
            Ok(()) => Ok(true),
            Err(Errno::NODEV | Errno::NOSYS | Errno::OPNOTSUPP | Errno::NOTTY) => {
                self.unsupported.fetch_or(call as u8, Ordering::Relaxed);
                Ok(false)
            }
            // This range, or now.
            Err(Errno::INVAL | Errno::BUSY) => Ok(false),
            Err(errno) => Err(errno),
        }
    }

    /// Bytes may have changed: what is known of holes no longer holds.
    fn changed(&self) {
        self.changes.fetch_add(1, Ordering::Release);
    }

    fn grown(&self, end: u64) {
        if matches!(self.kind, Kind::Regular) && end > self.len.load(Ordering::Relaxed) {
            self.len.fetch_max(end, Ordering::AcqRel);
        }
    }

    fn current_len(&self) -> u64 {
        self.len.load(Ordering::Acquire)
    }

    #[cold]
    fn fail(&self, op: &'static str, at: Option<u64>, errno: Errno) -> Error {
        self.fail_io(op, at, errno.into())
    }

    #[cold]
    fn fail_io(&self, op: &'static str, at: Option<u64>, source: IoError) -> Error {
        let error = Error::from(source).op(op).path(&self.path);
        match at {
            Some(at) => error.host(HostOffset::new(at)),
            None => error,
        }
    }
}

impl Drop for File {
    fn drop(&mut self) {
        if self.locks() != LockPlan::NONE {
            lock::release_all(self.as_fd());
        }
    }
}

/// Opens `path`; with `no_links` only if no part of it is a symbolic link.
fn open_fd(path: &Path, flags: OFlags, no_links: bool) -> Result<OwnedFd, Errno> {
    #[cfg(target_os = "linux")]
    if no_links {
        let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        match retry_on_intr(|| fs::openat2(fs::CWD, path, flags, Mode::empty(), resolve)) {
            // An old kernel, or a sandbox that does not know the call.
            Err(Errno::NOSYS | Errno::PERM) => {}
            done => return done,
        }
    }
    let last = if no_links {
        OFlags::NOFOLLOW
    } else {
        OFlags::empty()
    };
    retry_on_intr(|| fs::open(path, flags | last, Mode::empty()))
}

impl AsFd for File {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// The end of a request, if it is within what a host file can have.
fn end_of(at: u64, len: u64) -> Result<u64, Errno> {
    at.checked_add(len)
        .filter(|end| i64::try_from(*end).is_ok())
        .ok_or(Errno::FBIG)
}

impl Storage for File {
    fn len(&self) -> Result<u64> {
        Ok(self.current_len())
    }

    fn hints(&self) -> Hints {
        let mut hints = Hints::default();
        hints.fixed_len = self.is_block_device();
        if let Some(direct) = &self.direct {
            hints.align = direct.align();
            hints.parallel = 4;
        }
        hints
    }

    fn read_at(&self, at: HostOffset, buf: &mut [u8]) -> Result<()> {
        let at = at.get();
        let wanted = buf.len();
        match self.read_some(at, buf) {
            Ok(found) if found == wanted => Ok(()),
            Ok(found) => Err(self.fail_io(
                "read",
                Some(at.saturating_add(found as u64)),
                std::io::ErrorKind::UnexpectedEof.into(),
            )),
            Err(errno) => Err(self.fail("read", Some(at), errno)),
        }
    }

    fn run_at(&self, at: HostOffset) -> Result<HostRun> {
        self.find_run(at.get())
    }

    fn allocated(&self) -> Result<Option<u64>> {
        match self.kind {
            Kind::Device { .. } => Ok(None),
            Kind::Regular => {
                let stat = fs::fstat(&self.fd).map_err(|errno| self.fail("stat", None, errno))?;
                Ok(u64::try_from(stat.st_blocks)
                    .ok()
                    .and_then(|blocks| blocks.checked_mul(512)))
            }
        }
    }

    fn raw_file(&self) -> Option<RawFile<'_>> {
        if self.direct.is_some() {
            return None;
        }
        let len = match self.kind {
            Kind::Regular => i64::MAX.unsigned_abs(),
            Kind::Device { .. } => return None,
        };
        Some(RawFile {
            fd: self.as_fd(),
            base: 0,
            len,
        })
    }

    fn read_padded(&self, at: HostOffset, buf: &mut [u8]) -> Result<()> {
        let found = self
            .read_some(at.get(), buf)
            .map_err(|errno| self.fail("read", Some(at.get()), errno))?;
        buf[found..].fill(0);
        Ok(())
    }
}

impl StorageMut for File {
    fn write_at(&self, at: HostOffset, buf: &[u8]) -> Result<()> {
        if buf.is_empty() {
            return self.refresh();
        }
        self.write_all(at.get(), buf)
    }

    fn write_vectored_at(&self, at: HostOffset, bufs: &[IoSlice<'_>]) -> Result<()> {
        self.write_all_vectored(at.get(), bufs)
    }

    fn zero(&self, range: Range<HostOffset>, how: ZeroHow) -> Result<()> {
        self.make_zero(range.start.get()..range.end.get(), how)
    }

    fn discard(&self, range: Range<HostOffset>) -> Result<()> {
        self.give_back(range.start.get()..range.end.get())
    }

    fn allocate(&self, range: Range<HostOffset>) -> Result<()> {
        self.reserve(range.start.get()..range.end.get())
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.resize(len)
    }

    fn sync(&self) -> Result<()> {
        match self.cache {
            CacheMode::Unsafe => Ok(()),
            _ => self.sync_always(),
        }
    }
}
