//! Where the host knows of zeros, without reading them.

use std::os::fd::AsFd;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use diskmill_core::{HostRun, Result};
use rustix::fs::fdatasync;
use rustix::io::{Errno, retry_on_intr};

use super::{Call, File, Kind};
use crate::os;

/// The last run that was found.
#[derive(Clone, Copy, Debug)]
pub(super) struct Holes {
    start: u64,
    end: u64,
    hole: bool,
    /// The count of changes it was found at.
    changes: u64,
}

impl Holes {
    fn run_from(self, at: u64) -> HostRun {
        if self.hole {
            HostRun::Hole(self.end - at)
        } else {
            HostRun::Data(self.end - at)
        }
    }
}

impl File {
    pub(super) fn find_run(&self, at: u64) -> Result<HostRun> {
        let len = self.current_len();
        if at >= len {
            return Ok(HostRun::Hole((u64::MAX - at).max(1)));
        }
        if matches!(self.kind, Kind::Device { .. }) || self.lacks(Call::Seek) {
            return Ok(HostRun::Data(len - at));
        }
        // Read before the host is asked: a change during the call then makes the answer too old to be kept.
        let changes = self.changes.load(Ordering::Acquire);
        {
            let known = self.holes.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(known) = *known
                && known.changes == changes
                && (known.start..known.end).contains(&at)
            {
                return Ok(known.run_from(at));
            }
        }
        let Some((end, hole)) = self.seek_run(at, len) else {
            return Ok(HostRun::Data(len - at));
        };
        let found = Holes {
            start: at,
            end,
            hole,
            changes,
        };
        *self.holes.lock().unwrap_or_else(PoisonError::into_inner) = Some(found);
        Ok(found.run_from(at))
    }

    /// The end of the run at `at`, which is below `len`, and whether it is a hole. `None` if the host does not know.
    fn seek_run(&self, at: u64, len: u64) -> Option<(u64, bool)> {
        let hides = *self
            .hides_new_data
            .get_or_init(|| os::hides_new_data(self.as_fd()));
        if hides && retry_on_intr(|| fdatasync(self)).is_err() {
            return None;
        }
        match os::seek_data(self.as_fd(), at) {
            // No data from here on.
            Err(Errno::NXIO) => return Some((len, true)),
            Ok(data) if data > at => return Some((data.min(len), true)),
            Ok(data) if data == at => {}
            // Before where it was asked for: not to be believed.
            Ok(_) => return None,
            Err(errno) => {
                if matches!(errno, Errno::INVAL | Errno::OPNOTSUPP | Errno::NOSYS) {
                    self.unsupported.fetch_or(Call::Seek as u8, Ordering::Relaxed);
                }
                return None;
            }
        }
        match os::seek_hole(self.as_fd(), at) {
            Ok(hole) if hole > at => Some((hole.min(len), false)),
            // A hole made since, or an error: not known, which is the same as data.
            _ => None,
        }
    }
}
