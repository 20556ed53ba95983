//! What block devices have that files have not.

use std::ops::Range;
use std::os::fd::BorrowedFd;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use crate::os;

/// Bytes in a logical sector; 512 where the device does not say or says nonsense.
pub(crate) fn sector_size(fd: BorrowedFd<'_>) -> u32 {
    os::sector_size(fd)
        .ok()
        .filter(|size| size.is_power_of_two() && (512..=1 << 20).contains(size))
        .unwrap_or(512)
}

/// Bytes up to the end, as seeking finds it: a device's own length is 0 to `fstat`.
pub(crate) fn len(fd: BorrowedFd<'_>) -> Result<u64, Errno> {
    seek(fd, SeekFrom::End(0))
}

/// The whole sectors in `range`; empty if there is none.
pub(crate) fn whole_sectors(range: &Range<u64>, sector: u32) -> Range<u64> {
    let sector = u64::from(sector);
    let start = range.start.checked_next_multiple_of(sector).unwrap_or(range.end);
    let end = range.end - range.end % sector;
    if start < end {
        start..end
    } else {
        range.start..range.start
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_sectors_count() {
        assert_eq!(whole_sectors(&(0..4096), 512), 0..4096);
        assert_eq!(whole_sectors(&(1..4095), 512), 512..3584);
        assert!(whole_sectors(&(1..1023), 512).is_empty());
        assert!(whole_sectors(&(u64::MAX - 1..u64::MAX), 512).is_empty());
    }
}
