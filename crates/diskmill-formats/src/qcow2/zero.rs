//! Zeroing, discarding and emptying.

use std::ops::Range;
use std::sync::atomic::Ordering;

use diskmill_core::{Chain, GuestOffset, HostOffset, Result, State, ZeroHow};

use super::header::Version;
use super::slot::{Place, Slot, all, mask};
use super::tables::{Reclaim, Tables};
use super::write::Image;

/// What the tables could do for a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Done {
    /// All of it.
    Yes,
    /// Nothing: data must be written.
    NeedsData,
}

impl Image {
    /// Whether the bytes of `range` are known to read as zeros without reading data.
    fn reads_zero(&self, range: Range<u64>, below: &Chain) -> Result<bool> {
        let mut at = range.start;
        while at < range.end {
            let start = GuestOffset::new(at);
            let run = self.look(|tables| self.run(tables, start, range.end))?;
            match run.state {
                State::Zero { .. } => {}
                State::Absent => {
                    let mut asked = at;
                    let end = (at + run.len).min(below.virtual_size());
                    while asked < end {
                        let under = below.map(GuestOffset::new(asked), end - asked)?;
                        if !matches!(under.state, State::Zero { .. } | State::Absent) {
                            return Ok(false);
                        }
                        asked += under.len;
                    }
                }
                _ => return Ok(false),
            }
            at += run.len;
        }
        Ok(true)
    }

    /// Writes zeros as data to a part of one cluster: in one piece, so that nothing of the layer below is copied around
    /// them if they are the whole of it.
    fn write_zeros(&self, range: Range<u64>, below: &Chain) -> Result<()> {
        let len = usize::try_from(range.end.saturating_sub(range.start)).unwrap_or(0);
        self.write_held(GuestOffset::new(range.start), &vec![0; len], below)
    }

    /// Zeros `range`, whose clusters are held. It may end past the end of the disk, in its last cluster.
    pub(super) fn zero_held(&self, range: Range<u64>, how: ZeroHow, below: &Chain) -> Result<()> {
        if self.raw_data_file {
            // It must read the same on its own.
            self.data
                .zero(HostOffset::new(range.start)..HostOffset::new(range.end), how)?;
        }
        let granule = 1u64 << self.geometry.granule_bits();
        let size = self.size.load(Ordering::Acquire);
        let limit = range.end;
        // Behind the end of the disk nothing has to be kept.
        let end = if range.end >= size {
            range.end.next_multiple_of(granule)
        } else {
            range.end
        };
        let first = range.start.next_multiple_of(granule);
        let last = end - end % granule;
        if first > last {
            return self.zero_part(range.start..end, how, below);
        }
        self.zero_part(range.start..first, how, below)?;
        self.zero_whole(first..last, limit, how, below)?;
        self.zero_part(last..end, how, below)
    }

    /// Zeros a part of one granule: all of it if the rest reads as zeros anyway.
    fn zero_part(&self, part: Range<u64>, how: ZeroHow, below: &Chain) -> Result<()> {
        if part.is_empty() || self.reads_zero(part.clone(), below)? {
            return Ok(());
        }
        let granule = 1u64 << self.geometry.granule_bits();
        let start = part.start - part.start % granule;
        let size = self.size.load(Ordering::Acquire);
        let end = (start + granule).min(size.max(part.end));
        if self.reads_zero(start..part.start, below)? && self.reads_zero(part.end..end, below)? {
            self.zero_whole(start..start + granule, end, how, below)
        } else {
            self.write_zeros(part, below)
        }
    }

    /// Zeros whole granules. Where that takes data, none is written from `limit` on.
    fn zero_whole(&self, range: Range<u64>, limit: u64, how: ZeroHow, below: &Chain) -> Result<()> {
        let cluster = self.geometry.cluster_size();
        let bare = below.is_empty() && !self.is_backed();
        let mut at = range.start;
        while at < range.end {
            let start = GuestOffset::new(at);
            if bare && !self.look(|tables| tables.has_l2(start))? {
                let covers = self.geometry.l1_entry_covers();
                at = (at - at % covers).saturating_add(covers);
                continue;
            }
            let end = (at - at % cluster + cluster).min(range.end);
            let done = self.change(|tables| {
                let done = self.zero_cluster(tables, at..end, how, bare)?;
                tables.settle_if_many()?;
                Ok(done)
            })?;
            if done == Done::NeedsData && !self.reads_zero(at..end, below)? {
                self.write_zeros(at..end.min(limit), below)?;
            }
            at = end;
        }
        Ok(())
    }

    /// Zeros granules of one cluster in the tables.
    fn zero_cluster(&self, tables: &mut Tables, range: Range<u64>, how: ZeroHow, bare: bool) -> Result<Done> {
        let geometry = self.geometry;
        let at = GuestOffset::new(range.start);
        let part = mask(
            geometry.subcluster(at),
            geometry.subcluster(GuestOffset::new(range.end - 1)),
        );
        let whole = part == all(geometry);
        let old = tables.slot(at)?;
        if old.place == Place::Nowhere && (bare || old.zero & part == part) {
            return Ok(Done::Yes);
        }
        if self.version() == Version::V2 {
            if !bare {
                return Ok(Done::NeedsData);
            }
            tables.set_slot(at, Slot::ABSENT)?;
            tables.drop_slot(old, Reclaim::IfAsked);
            return Ok(Done::Yes);
        }
        let place = match old.place {
            Place::Packed(_) if !whole => return Ok(Done::NeedsData),
            Place::At { .. } if !whole || how == ZeroHow::KeepAllocated => old.place,
            _ => Place::Nowhere,
        };
        let new = Slot {
            place,
            stored: old.stored & !part,
            zero: old.zero | part,
        };
        if new != old {
            tables.set_slot(at, new)?;
            if place != old.place {
                tables.drop_slot(old, Reclaim::IfAsked);
            }
        }
        Ok(Done::Yes)
    }

    /// Gives back the whole clusters of `range`, which are held. They read as zeros afterwards.
    pub(super) fn discard_held(&self, range: Range<u64>) -> Result<()> {
        if self.version() == Version::V2 && self.is_backed() {
            // There is no way to say zero: the layer below would show through.
            return Ok(());
        }
        let cluster = self.geometry.cluster_size();
        let size = self.size.load(Ordering::Acquire);
        let first = range.start.next_multiple_of(cluster);
        let last = if range.end >= size {
            range.end.next_multiple_of(cluster)
        } else {
            range.end - range.end % cluster
        };
        if first >= last {
            return Ok(());
        }
        if self.geometry.data_file() {
            let host = HostOffset::new(first)..HostOffset::new(last.min(size));
            if self.raw_data_file {
                self.data.zero(host, ZeroHow::MayUnmap)?;
            } else if self.unmap {
                self.data.discard(host)?;
            }
        }
        let mut at = first;
        while at < last {
            let start = GuestOffset::new(at);
            if !self.is_backed() && !self.look(|tables| tables.has_l2(start))? {
                let covers = self.geometry.l1_entry_covers();
                at = (at - at % covers).saturating_add(covers);
                continue;
            }
            self.change(|tables| {
                let old = tables.slot(start)?;
                let zero = Slot {
                    zero: all(self.geometry),
                    ..Slot::ABSENT
                };
                let new = match old.place {
                    Place::Nowhere if !self.is_backed() => old,
                    _ if self.version() == Version::V2 => Slot::ABSENT,
                    _ => zero,
                };
                if new != old {
                    tables.set_slot(start, new)?;
                    tables.drop_slot(old, Reclaim::IfAsked);
                }
                tables.settle_if_many()
            })?;
            at += cluster;
        }
        Ok(())
    }

    /// Empties the image, whose clusters are all held.
    pub(super) fn clear_held(&self) -> Result<()> {
        let size = self.size.load(Ordering::Acquire);
        if self.raw_data_file {
            self.data
                .zero(HostOffset::ZERO..HostOffset::new(size), ZeroHow::MayUnmap)?;
            return self.change(Tables::flush);
        }
        self.drop_from(GuestOffset::ZERO)?;
        self.change(|tables| {
            tables.write_back(true)?;
            tables.truncate()
        })
    }

    /// Empties everything from `at` on, which must be where an L1 entry begins.
    pub(super) fn drop_from(&self, at: GuestOffset) -> Result<()> {
        let entries = self.look(|tables| Ok(tables.l1_len()))?;
        for index in self.geometry.l1_index(at)..entries {
            self.change(|tables| {
                tables.drop_table(self.geometry.l1_start(index), Reclaim::Always)?;
                tables.settle_if_many()
            })?;
        }
        Ok(())
    }
}
