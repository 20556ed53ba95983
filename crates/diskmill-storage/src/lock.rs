//! QEMU's image locks: shared locks on single bytes that say who uses what and who shares what.
//!
//! Four permissions are numbered: 0 consistent read, 1 write, 2 write unchanged, 3 resize. A holder of byte `100 + i`
//! uses permission `i`; a holder of byte `200 + i` does not share it with others. All locks are shared and owned by the
//! open file description, so nobody is blocked by taking them: an opener takes its own bytes first and then asks, for
//! each byte on the other side, whether somebody else holds it. Two openers that race may both fail; trying again is
//! the caller's work. Byte 0 is libvirt's and never touched.

use std::fmt;
use std::os::fd::BorrowedFd;

use diskmill_core::{Error, ErrorKind, Result};
use rustix::io::Errno;

use crate::os;

/// A set of permissions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Permissions(u8);

impl Permissions {
    /// None of them.
    pub const NONE: Self = Self(0);
    /// To read and find nothing half changed.
    pub const CONSISTENT_READ: Self = Self(1);
    /// To write.
    pub const WRITE: Self = Self(2);
    /// To write what is there already.
    pub const WRITE_UNCHANGED: Self = Self(4);
    /// To change the length.
    pub const RESIZE: Self = Self(8);

    /// The permissions of either set.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether no permission is in the set.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    fn numbers(self) -> impl Iterator<Item = u8> {
        (0..COUNT as u8).filter(move |number| self.0 & (1 << number) != 0)
    }
}

/// What an opener uses and what it does not share.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LockPlan {
    used: Permissions,
    unshared: Permissions,
}

const CHANGE: Permissions = Permissions::WRITE.and(Permissions::RESIZE);

impl LockPlan {
    /// No locks at all: nothing is said and nothing is asked.
    pub const NONE: Self = Self::new(Permissions::NONE, Permissions::NONE);
    /// Reads, whoever writes: `-U`, or a raw file that is only looked at. Byte 100.
    pub const SHARE: Self = Self::new(Permissions::CONSISTENT_READ, Permissions::NONE);
    /// Reads and lets nobody write or resize: a format's file, a backing file, the source of a convert. Bytes 100,
    /// 201 and 203.
    pub const READ: Self = Self::new(Permissions::CONSISTENT_READ, CHANGE);
    /// Writes, and is the only one to. Bytes 100, 101, 103, 201 and 203. For raw files too, where QEMU lets several
    /// write at once.
    pub const WRITE: Self = Self::new(Permissions::CONSISTENT_READ.and(CHANGE), CHANGE);
    /// Writes as QEMU does while it opens an image for writing and does not know the format yet. Bytes 101 and 103.
    pub const OPENING: Self = Self::new(CHANGE, Permissions::NONE);

    /// A plan that uses and keeps to itself what is given.
    pub const fn new(used: Permissions, unshared: Permissions) -> Self {
        Self { used, unshared }
    }

    /// What the opener uses.
    pub const fn used(self) -> Permissions {
        self.used
    }

    /// What it does not share.
    pub const fn unshared(self) -> Permissions {
        self.unshared
    }
}

/// Somebody else holds the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct LockError {
    /// The permission in question: `consistent read`, `write`, `write unchanged` or `resize`.
    pub permission: &'static str,
    /// False: we use it and they do not share it. True: they use it and we do not share it.
    pub shared: bool,
}

impl LockError {
    fn new(number: u8, shared: bool) -> Self {
        let permission = match number {
            0 => "consistent read",
            1 => "write",
            2 => "write unchanged",
            _ => "resize",
        };
        Self { permission, shared }
    }
}

impl fmt::Display for LockError {
    /// QEMU's words, in lower case.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shared = if self.shared { "shared " } else { "" };
        write!(f, "failed to get {shared}\"{}\" lock", self.permission)
    }
}

impl std::error::Error for LockError {}

/// The file system cannot lock, or somebody locks bytes in a way QEMU does not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("failed to lock byte {byte}")]
#[non_exhaustive]
pub struct LockByteError {
    /// The byte that could not be locked.
    pub byte: u64,
    /// Why.
    #[source]
    pub source: Errno,
}

/// How many permissions there are.
const COUNT: u64 = 4;
const USED: u64 = 100;
const UNSHARED: u64 = 200;

/// Goes from the plan `held` to the plan `wanted`. On failure `held` is what is held.
///
/// An error of kind [`ErrorKind::Locked`] if somebody else is in the way, with a [`LockError`] or a [`LockByteError`];
/// of kind [`ErrorKind::Unsupported`] if the file system knows no locks.
pub(crate) fn change(fd: BorrowedFd<'_>, held: LockPlan, wanted: LockPlan) -> Result<()> {
    let added = LockPlan::new(
        wanted.used.without(held.used),
        wanted.unshared.without(held.unshared),
    );
    if let Err(error) = take(fd, added).and_then(|()| test(fd, wanted)) {
        release(fd, added);
        return Err(error);
    }
    release(
        fd,
        LockPlan::new(
            held.used.without(wanted.used),
            held.unshared.without(wanted.unshared),
        ),
    );
    Ok(())
}

/// Fails as [`change`] would if `plan` were to be taken, and takes nothing.
pub(crate) fn test(fd: BorrowedFd<'_>, plan: LockPlan) -> Result<()> {
    for (set, base, shared) in [(plan.used, UNSHARED, false), (plan.unshared, USED, true)] {
        for number in set.numbers() {
            let byte = base + u64::from(number);
            match os::is_locked_by_other(fd, byte) {
                Ok(false) => {}
                Ok(true) => return Err(Error::new(ErrorKind::Locked, LockError::new(number, shared))),
                Err(errno) => return Err(byte_error(byte, errno)),
            }
        }
    }
    Ok(())
}

fn take(fd: BorrowedFd<'_>, plan: LockPlan) -> Result<()> {
    for byte in bytes(plan) {
        os::lock_shared(fd, byte).map_err(|errno| byte_error(byte, errno))?;
    }
    Ok(())
}

/// Unlocking cannot fail in a way that matters: what stays locked goes with the file.
fn release(fd: BorrowedFd<'_>, plan: LockPlan) {
    for byte in bytes(plan) {
        let _ = os::unlock(fd, byte, 1);
    }
}

/// Releases all that any plan can hold.
///
/// Closing the file does so too, but only with the last descriptor: a child process that has not got to its `exec` yet
/// may still have one.
pub(crate) fn release_all(fd: BorrowedFd<'_>) {
    for base in [USED, UNSHARED] {
        let _ = os::unlock(fd, base, COUNT);
    }
}

fn bytes(plan: LockPlan) -> impl Iterator<Item = u64> {
    let used = plan.used.numbers().map(|number| USED + u64::from(number));
    let unshared = plan.unshared.numbers().map(|number| UNSHARED + u64::from(number));
    used.chain(unshared)
}

fn byte_error(byte: u64, errno: Errno) -> Error {
    let kind = match errno {
        Errno::AGAIN | Errno::ACCESS => ErrorKind::Locked,
        Errno::NOLCK | Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP => ErrorKind::Unsupported,
        _ => ErrorKind::Io,
    };
    Error::new(kind, LockByteError { byte, source: errno })
}
