//! What lies on a disk.

use diskmill_core::{Error, ErrorKind, GuestOffset, Result};

/// Fails if `len` bytes at `at` are not on a disk of `size` bytes.
pub(crate) fn within(at: GuestOffset, len: u64, size: u64) -> Result<()> {
    match at.get().checked_add(len) {
        Some(end) if end <= size => Ok(()),
        _ => Err(Error::new(
            ErrorKind::Usage,
            format!("{len} bytes at {at} are not within the disk of {size} bytes"),
        )),
    }
}
