//! Systems without the calls this crate likes best: every answer is "not supported", and the portable ways are taken.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::io::{Errno, Result};

macro_rules! unsupported {
    ($($name:ident($($argument:ty),*) -> $answer:ty;)*) => {
        $(pub(crate) fn $name($(_: $argument),*) -> Result<$answer> { Err(Errno::NOSYS) })*
    };
}

unsupported! {
    seek_data(BorrowedFd<'_>, u64) -> u64;
    seek_hole(BorrowedFd<'_>, u64) -> u64;
    punch(BorrowedFd<'_>, u64, u64) -> ();
    zero_range(BorrowedFd<'_>, u64, u64) -> ();
    reserve(BorrowedFd<'_>, u64, u64) -> ();
    sector_size(BorrowedFd<'_>) -> u32;
    device_discard(BorrowedFd<'_>, u64, u64) -> ();
    device_zero(BorrowedFd<'_>, u64, u64) -> ();
    set_nocow(BorrowedFd<'_>) -> ();
    set_extent_size_hint(BorrowedFd<'_>, u32) -> ();
    open_unnamed(BorrowedFd<'_>, Mode, OFlags) -> OwnedFd;
    link_open_file(BorrowedFd<'_>, BorrowedFd<'_>, &Path) -> ();
    reopen(BorrowedFd<'_>, OFlags) -> OwnedFd;
    exchange(BorrowedFd<'_>, &Path, &Path) -> ();
    copy_range(BorrowedFd<'_>, u64, BorrowedFd<'_>, u64, usize) -> usize;
    lock_shared(BorrowedFd<'_>, u64) -> ();
    unlock(BorrowedFd<'_>, u64, u64) -> ();
    is_locked_by_other(BorrowedFd<'_>, u64) -> bool;
}

pub(crate) fn direct_align(_: BorrowedFd<'_>) -> Option<(u32, u32)> {
    None
}

pub(crate) fn mount_id(_: BorrowedFd<'_>) -> Option<u64> {
    None
}

pub(crate) fn is_nocow(_: BorrowedFd<'_>) -> bool {
    false
}

pub(crate) fn hides_new_data(_: BorrowedFd<'_>) -> bool {
    false
}

pub(crate) fn is_proc(_: &Path) -> bool {
    false
}
