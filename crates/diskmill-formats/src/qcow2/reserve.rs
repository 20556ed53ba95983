//! Taking clusters for guest bytes that have no data yet.

use std::ops::Range;

use diskmill_core::{Error, ErrorKind, GuestOffset, HostOffset, Reserve, Result, ZeroHow};

use super::header::Version;
use super::slot::{Place, Slot, all};
use super::write::Image;
use crate::preallocation::zeros;

impl Image {
    /// Gives every cluster of `range` that has no place one that reads as zeros. The clusters are held.
    pub(super) fn reserve_held(&self, range: Range<u64>, how: Reserve) -> Result<()> {
        let cluster = self.geometry.cluster_size();
        let mut at = range.start.next_multiple_of(cluster);
        while at < range.end {
            // One L2 table at most, so that what is taken is soon entered.
            let covers = self.geometry.l1_entry_covers();
            let end = (at - at % covers).saturating_add(covers).min(range.end);
            at = self.reserve_run(at, end, how)?;
        }
        Ok(())
    }

    /// Gives a run of clusters from `at` their place, up to `end`. Returns where it went to.
    fn reserve_run(&self, at: u64, end: u64, how: Reserve) -> Result<u64> {
        let geometry = self.geometry;
        let cluster = geometry.cluster_size();
        let first = self.look(|tables| tables.slot(GuestOffset::new(at)))?;
        if first.place != Place::Nowhere {
            return Ok(at.saturating_add(cluster));
        }
        let mut count = (end - at).div_ceil(cluster);
        let (host, fresh) = if geometry.data_file() {
            (HostOffset::new(at), None)
        } else {
            let (first, got) = self.change(|tables| tables.allocate(1, count))?;
            count = got;
            (
                HostOffset::new(first << geometry.cluster_bits().get()),
                Some((first, got)),
            )
        };
        let mut entered = 0;
        let done = self
            .prepare(GuestOffset::new(at), host, count.saturating_mul(cluster), how)
            .and_then(|()| {
                self.change(|tables| {
                    tables.fence.note_copied();
                    while entered < count {
                        let start = GuestOffset::new(at + entered * cluster);
                        let old = tables.slot(start)?;
                        if old.place != Place::Nowhere {
                            break;
                        }
                        let place = Place::At {
                            host: host.plus(entered * cluster)?,
                            own: true,
                        };
                        // With subclusters a place may be kept without a word on what is in it.
                        let (stored, zero) = match geometry.extended_l2() {
                            true => (0, old.zero),
                            false if self.says_zero() => (0, all(geometry)),
                            false => (all(geometry), 0),
                        };
                        tables.set_slot(start, Slot { place, stored, zero })?;
                        entered += 1;
                    }
                    tables.settle_if_many()
                })
            });
        if let Some((first, got)) = fresh
            && entered < got
        {
            // Nothing refers to them; if they cannot be given back they leak.
            let _ = self.change(|tables| tables.release(first + entered, got - entered));
        }
        done?;
        match entered {
            0 => Err(Error::bare(ErrorKind::Corrupt).guest(GuestOffset::new(at))),
            entered => Ok(at.saturating_add(entered * cluster)),
        }
    }

    /// Whether kept places must be said to read as zeros, since what is in them does not.
    fn says_zero(&self) -> bool {
        self.sealing.is_encrypted() && self.version() == Version::V3
    }

    /// Makes host bytes that nothing refers to, and that belong to guest bytes from `guest` on, read as zeros.
    fn prepare(&self, guest: GuestOffset, host: HostOffset, len: u64, how: Reserve) -> Result<()> {
        let end = host.plus(len)?;
        if self.sealing.is_encrypted() && self.version() == Version::V2 {
            return self.sealing.write_zeros(self.data.as_ref(), guest, host, len);
        }
        match how {
            Reserve::Place => self.data.zero(host..end, ZeroHow::MayUnmap),
            Reserve::Space => self.data.zero(host..end, ZeroHow::KeepAllocated),
            Reserve::Zeros => {
                let mut at = host;
                while at < end {
                    let piece = zeros(end.since(at));
                    self.data.write_at(at, piece)?;
                    at = at.plus(piece.len() as u64)?;
                }
                Ok(())
            }
        }
    }
}
