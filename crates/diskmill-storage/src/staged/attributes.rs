//! What a new file takes over from the one it replaces.

use std::os::fd::BorrowedFd;

use rustix::fs::{self, Gid, Mode, Stat, Uid, XattrFlags};
use rustix::io::Errno;

use super::InPlace;
use crate::os;

/// Gives `new` owner, mode and extended attributes of `old`, or says what it cannot have.
pub(super) fn copy(old: BorrowedFd<'_>, old_stat: &Stat, new: BorrowedFd<'_>) -> Result<(), InPlace> {
    if os::is_nocow(old) {
        // Without the attribute the bytes are the same; only the file system's bookkeeping differs.
        let _ = os::set_nocow(new);
    }
    let new_stat = fs::fstat(new).map_err(|_| InPlace::Attributes)?;
    let owner = (old_stat.st_uid != new_stat.st_uid).then(|| Uid::from_raw(old_stat.st_uid));
    let group = (old_stat.st_gid != new_stat.st_gid).then(|| Gid::from_raw(old_stat.st_gid));
    if owner.is_some() || group.is_some() {
        fs::fchown(new, owner, group).map_err(|_| InPlace::Owner)?;
    }
    copy_extended(old, new).map_err(|_| InPlace::Attributes)?;
    // Last: a change of owner takes set-id bits away, an access list changes the bits of the group.
    let mode = |raw| Mode::from_raw_mode(raw & 0o7777);
    let new_stat = fs::fstat(new).map_err(|_| InPlace::Attributes)?;
    if mode(new_stat.st_mode) == mode(old_stat.st_mode) {
        return Ok(());
    }
    fs::fchmod(new, mode(old_stat.st_mode)).map_err(|_| InPlace::Attributes)
}

/// Attributes that speak of the content, which is another one now; the kernel drops or renews them on a write too.
const OF_CONTENT: [&[u8]; 3] = [b"security.capability", b"security.ima", b"security.evm"];

fn copy_extended(old: BorrowedFd<'_>, new: BorrowedFd<'_>) -> Result<(), Errno> {
    let names = match read_all(|buf| fs::flistxattr(old, buf)) {
        Ok(names) => names,
        Err(Errno::OPNOTSUPP) => return Ok(()),
        Err(errno) => return Err(errno),
    };
    for name in names.split(|byte| *byte == 0) {
        if name.is_empty() || OF_CONTENT.contains(&name) {
            continue;
        }
        let value = read_all(|buf| fs::fgetxattr(old, name, buf))?;
        let has = read_all(|buf| fs::fgetxattr(new, name, buf));
        if has.as_ref() != Ok(&value) {
            fs::fsetxattr(new, name, &value, XattrFlags::empty())?;
        }
    }
    Ok(())
}

/// The kernel's own limit for a list of names and for a value, in bytes.
const MOST: usize = 64 << 10;

fn read_all(mut read: impl FnMut(&mut [u8]) -> Result<usize, Errno>) -> Result<Vec<u8>, Errno> {
    let mut bytes = vec![0; 256];
    loop {
        match read(&mut bytes) {
            Ok(len) => {
                bytes.truncate(len);
                return Ok(bytes);
            }
            Err(Errno::RANGE) if bytes.len() < MOST => bytes.resize(MOST, 0),
            Err(errno) => return Err(errno),
        }
    }
}
