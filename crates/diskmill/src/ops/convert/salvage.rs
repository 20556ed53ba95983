//! Reading what can be read of a source that fails.

use diskmill_core::{Error, Result, SECTOR};

use super::lane::Lane;
use super::source::{is_unreadable, to_usize};

/// Reads `buf` sector by sector after `error`, leaving zeros and a warning for each that fails.
pub(super) fn read(
    lane: &Lane<'_>,
    (part, depth): (usize, usize),
    at: u64,
    buf: &mut [u8],
    error: Error,
) -> Result<()> {
    if !is_unreadable(&error) {
        return Err(error);
    }
    let mut at = at;
    for sector in buf.chunks_mut(to_usize(SECTOR)) {
        lane.job.check()?;
        if let Err(error) = lane.source.read(part, depth, at, sector) {
            if !is_unreadable(&error) {
                return Err(error);
            }
            sector.fill(0);
            let reason = match error.io_error() {
                Some(io) => io.to_string(),
                None => error.to_string(),
            };
            lane.job
                .observer
                .warn(&format!("error while reading offset {at}: {reason}"));
        }
        at += sector.len() as u64;
    }
    Ok(())
}
