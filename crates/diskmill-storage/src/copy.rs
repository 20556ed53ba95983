//! Copying within the kernel.

use diskmill_core::{HostOffset, Result, Storage, StorageMut};
use rustix::io::Errno;

use crate::os;

/// Copies up to `len` bytes without bringing them to this process; extents may end up shared where the file system
/// can. Answers how many bytes were copied, from the front: fewer than asked for, or 0, if the host cannot go on, and
/// the rest is for the caller to read and write. Fails only where reading and writing would fail too.
///
/// The source's length bounds the copy. The target grows as it does by writing.
pub fn copy_range(
    from: &dyn Storage,
    from_at: HostOffset,
    to: &dyn StorageMut,
    to_at: HostOffset,
    len: u64,
) -> Result<u64> {
    let (Some(source), Some(target)) = (from.raw_file(), to.raw_file()) else {
        return Ok(0);
    };
    let room = |file_len: u64, at: HostOffset| file_len.saturating_sub(at.get());
    let len = len.min(room(source.len, from_at)).min(room(target.len, to_at));
    let (Some(source_at), Some(target_at)) = (
        source.base.checked_add(from_at.get()),
        target.base.checked_add(to_at.get()),
    ) else {
        return Ok(0);
    };
    let mut done = 0;
    while done < len {
        // The kernel stops at 2 GiB by itself; smaller steps keep a cancelled job's answer quick.
        let step = usize::try_from((len - done).min(64 << 20)).unwrap_or(64 << 20);
        match os::copy_range(source.fd, source_at + done, target.fd, target_at + done, step) {
            Ok(0) => break,
            Ok(copied) => done += copied as u64,
            Err(Errno::INTR) => {}
            Err(Errno::NOSPC | Errno::DQUOT | Errno::IO | Errno::FBIG) if done > 0 => break,
            Err(errno @ (Errno::NOSPC | Errno::DQUOT | Errno::IO | Errno::FBIG)) => {
                return Err(diskmill_core::Error::from(std::io::Error::from(errno))
                    .op("copy")
                    .host(to_at));
            }
            Err(_) => break,
        }
    }
    if done > 0 {
        // An empty write tells the target that its bytes have changed, and its length with them.
        to.write_at(to_at.plus(done)?, &[])?;
    }
    Ok(done)
}
