//! Linux.

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{self, AtFlags, FallocateFlags, IFlags, Mode, OFlags, RenameFlags, SeekFrom, StatxFlags};
use rustix::io::{Errno, Result};
use rustix::ioctl;

/// The first byte of data at or after `at`. Moves the file position, which nothing here uses.
pub(crate) fn seek_data(fd: BorrowedFd<'_>, at: u64) -> Result<u64> {
    fs::seek(fd, SeekFrom::Data(at))
}

/// The first byte of a hole at or after `at`; the end of the file counts as one.
pub(crate) fn seek_hole(fd: BorrowedFd<'_>, at: u64) -> Result<u64> {
    fs::seek(fd, SeekFrom::Hole(at))
}

/// Whether `path` is on the file system whose links lead to open files.
pub(crate) fn is_proc(path: &Path) -> bool {
    fs::statfs(path).is_ok_and(|found| found.f_type == fs::PROC_SUPER_MAGIC)
}

/// Whether bytes that were written but have no place on the disk yet are called a hole.
///
/// ext4 does so for files mapped by indirect blocks, as on a file system made for ext2 or ext3 (seen on Linux 6.18).
pub(crate) fn hides_new_data(fd: BorrowedFd<'_>) -> bool {
    /// `EXT4_SUPER_MAGIC`.
    const EXT: u64 = 0xef53;
    /// `EXT4_EXTENTS_FL`: the file is mapped by extents.
    const EXTENTS: u32 = 0x8_0000;
    let is_ext = fs::fstatfs(fd).is_ok_and(|found| u64::try_from(found.f_type) == Ok(EXT));
    is_ext && fs::ioctl_getflags(fd).is_ok_and(|flags| flags.bits() & EXTENTS == 0)
}

/// Gives the space of a range back; it reads as zeros. The length stays.
pub(crate) fn punch(fd: BorrowedFd<'_>, at: u64, len: u64) -> Result<()> {
    fs::fallocate(
        fd,
        FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
        at,
        len,
    )
}

/// Makes a range read as zeros, its space kept or newly reserved. A regular file grows if the range ends past its end.
pub(crate) fn zero_range(fd: BorrowedFd<'_>, at: u64, len: u64) -> Result<()> {
    fs::fallocate(fd, FallocateFlags::ZERO_RANGE, at, len)
}

/// Reserves space for a range without changing what it reads as, growing the file if it ends past the end.
pub(crate) fn reserve(fd: BorrowedFd<'_>, at: u64, len: u64) -> Result<()> {
    fs::fallocate(fd, FallocateFlags::empty(), at, len)
}

/// Alignment that direct I/O asks for in memory and in the file, in bytes, if the file system says (Linux 6.1).
pub(crate) fn direct_align(fd: BorrowedFd<'_>) -> Option<(u32, u32)> {
    let found = fs::statx(fd, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).ok()?;
    let known = found.stx_mask & StatxFlags::DIOALIGN.bits() != 0;
    let useful = found.stx_dio_mem_align != 0 && found.stx_dio_offset_align != 0;
    (known && useful).then_some((found.stx_dio_mem_align, found.stx_dio_offset_align))
}

/// The mount an open file or directory was reached through, to tell a bind-mounted file (Linux 5.8).
pub(crate) fn mount_id(fd: BorrowedFd<'_>) -> Option<u64> {
    let found = fs::statx(fd, c"", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID).ok()?;
    (found.stx_mask & StatxFlags::MNT_ID.bits() != 0).then_some(found.stx_mnt_id)
}

/// Bytes in a logical sector of a block device.
pub(crate) fn sector_size(fd: BorrowedFd<'_>) -> Result<u32> {
    fs::ioctl_blksszget(fd)
}

/// Tells a block device that a range is not needed. What it reads as afterwards is undefined.
pub(crate) fn device_discard(fd: BorrowedFd<'_>, at: u64, len: u64) -> Result<()> {
    /// `BLKDISCARD`, `_IO(0x12, 119)`.
    const DISCARD: ioctl::Opcode = ioctl::opcode::none(0x12, 119);
    // SAFETY: BLKDISCARD reads two u64 (start, length) through the pointer, which `Setter` points at this array.
    let call = unsafe { ioctl::Setter::<DISCARD, [u64; 2]>::new([at, len]) };
    // SAFETY: the opcode belongs to the argument above; on any file but a block device the kernel answers ENOTTY.
    unsafe { ioctl::ioctl(fd, call) }
}

/// Makes a range of a block device read as zeros, written out if the device knows no better way.
pub(crate) fn device_zero(fd: BorrowedFd<'_>, at: u64, len: u64) -> Result<()> {
    /// `BLKZEROOUT`, `_IO(0x12, 127)`.
    const ZEROOUT: ioctl::Opcode = ioctl::opcode::none(0x12, 127);
    // SAFETY: BLKZEROOUT reads two u64 (start, length) through the pointer, which `Setter` points at this array.
    let call = unsafe { ioctl::Setter::<ZEROOUT, [u64; 2]>::new([at, len]) };
    // SAFETY: the opcode belongs to the argument above; on any file but a block device the kernel answers ENOTTY.
    unsafe { ioctl::ioctl(fd, call) }
}

/// Asks the file system not to copy on write. Works on an empty file only.
pub(crate) fn set_nocow(fd: BorrowedFd<'_>) -> Result<()> {
    let flags = fs::ioctl_getflags(fd)?;
    if flags.contains(IFlags::NOCOW) {
        return Ok(());
    }
    fs::ioctl_setflags(fd, flags | IFlags::NOCOW)
}

/// Whether the file system is asked not to copy this file on write.
pub(crate) fn is_nocow(fd: BorrowedFd<'_>) -> bool {
    fs::ioctl_getflags(fd).is_ok_and(|flags| flags.contains(IFlags::NOCOW))
}

/// `struct fsxattr` of `linux/fs.h`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct FsXattr {
    xflags: u32,
    extent_size: u32,
    extent_count: u32,
    project: u32,
    cow_extent_size: u32,
    pad: [u8; 8],
}

/// `FS_XFLAG_EXTSIZE`: the extent size field is meant.
const XFLAG_EXTSIZE: u32 = 0x800;

/// Asks the file system to allocate in steps of `bytes`.
pub(crate) fn set_extent_size_hint(fd: BorrowedFd<'_>, bytes: u32) -> Result<()> {
    /// `FS_IOC_FSGETXATTR`, `_IOR('X', 31, struct fsxattr)`.
    const GET: ioctl::Opcode = ioctl::opcode::read::<FsXattr>(b'X', 31);
    /// `FS_IOC_FSSETXATTR`, `_IOW('X', 32, struct fsxattr)`.
    const SET: ioctl::Opcode = ioctl::opcode::write::<FsXattr>(b'X', 32);
    // SAFETY: the kernel fills exactly one `struct fsxattr`, which `FsXattr` mirrors and every bit pattern suits.
    let get = unsafe { ioctl::Getter::<GET, FsXattr>::new() };
    // SAFETY: the opcode belongs to the argument above.
    let mut attributes = unsafe { ioctl::ioctl(fd, get)? };
    attributes.xflags |= XFLAG_EXTSIZE;
    attributes.extent_size = bytes;
    // SAFETY: the kernel reads exactly one `struct fsxattr`.
    let set = unsafe { ioctl::Setter::<SET, FsXattr>::new(attributes) };
    // SAFETY: the opcode belongs to the argument above.
    unsafe { ioctl::ioctl(fd, set) }
}

/// A new file without a name in the directory `dir`.
pub(crate) fn open_unnamed(dir: BorrowedFd<'_>, mode: Mode, flags: OFlags) -> Result<OwnedFd> {
    fs::openat(
        dir,
        c".",
        OFlags::RDWR | OFlags::TMPFILE | OFlags::CLOEXEC | flags,
        mode,
    )
}

/// Gives an open file the name `name` in `dir`, which must be free. Through `/proc`, so that it needs no privilege.
pub(crate) fn link_open_file(file: BorrowedFd<'_>, dir: BorrowedFd<'_>, name: &Path) -> Result<()> {
    let from = format!("/proc/self/fd/{}", file.as_raw_fd());
    fs::linkat(fs::CWD, from, dir, name, AtFlags::SYMLINK_FOLLOW)
}

/// Opens the file behind `fd` once more, with other flags.
pub(crate) fn reopen(fd: BorrowedFd<'_>, flags: OFlags) -> Result<OwnedFd> {
    let from = format!("/proc/self/fd/{}", fd.as_raw_fd());
    fs::open(from, flags | OFlags::CLOEXEC, Mode::empty())
}

/// Exchanges two names of `dir`.
pub(crate) fn exchange(dir: BorrowedFd<'_>, one: &Path, other: &Path) -> Result<()> {
    fs::renameat_with(dir, one, dir, other, RenameFlags::EXCHANGE)
}

/// Copies within the kernel. Fewer bytes than asked for may be copied; 0 means it cannot go on.
pub(crate) fn copy_range(
    from: BorrowedFd<'_>,
    from_at: u64,
    to: BorrowedFd<'_>,
    to_at: u64,
    len: usize,
) -> Result<usize> {
    let (mut from_at, mut to_at) = (from_at, to_at);
    fs::copy_file_range(from, Some(&mut from_at), to, Some(&mut to_at), len)
}

/// Takes a shared lock on one byte, owned by the open file description.
pub(crate) fn lock_shared(fd: BorrowedFd<'_>, byte: u64) -> Result<()> {
    ofd_lock(fd, libc::F_OFD_SETLK, libc::F_RDLCK, byte, 1).map(drop)
}

/// Releases the locks on `count` bytes from `first`.
pub(crate) fn unlock(fd: BorrowedFd<'_>, first: u64, count: u64) -> Result<()> {
    ofd_lock(fd, libc::F_OFD_SETLK, libc::F_UNLCK, first, count).map(drop)
}

/// Whether another open file description holds any lock on `byte`. Takes nothing and works on read-only files.
pub(crate) fn is_locked_by_other(fd: BorrowedFd<'_>, byte: u64) -> Result<bool> {
    let answer = ofd_lock(fd, libc::F_OFD_GETLK, libc::F_WRLCK, byte, 1)?;
    Ok(answer != libc::F_UNLCK)
}

/// One `fcntl` on a lock of `count` bytes from `first`; answers the lock type the kernel leaves behind.
fn ofd_lock(
    fd: BorrowedFd<'_>,
    command: libc::c_int,
    kind: libc::c_int,
    first: u64,
    count: u64,
) -> Result<libc::c_int> {
    let start = libc::off_t::try_from(first).map_err(|_| Errno::INVAL)?;
    let len = libc::off_t::try_from(count).map_err(|_| Errno::INVAL)?;
    // SAFETY: `flock` is a plain C struct of integers, for which all zeros is a value. `l_pid` must be 0.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    lock.l_start = start;
    lock.l_len = len;
    loop {
        // SAFETY: `fd` is open for the call and the commands given here read and write one `flock` only.
        let result = unsafe { libc::fcntl(fd.as_raw_fd(), command, &raw mut lock) };
        if result != -1 {
            return Ok(libc::c_int::from(lock.l_type));
        }
        let error = Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO);
        if error != Errno::INTR {
            return Err(error);
        }
    }
}
