//! Writing guest data: in place where a cluster is ours alone, to a new place everywhere else.

use std::io::IoSlice;
use std::ops::Range;
use std::sync::atomic::Ordering;

use diskmill_core::{Chain, Error, ErrorKind, GuestOffset, HostOffset, Result, SECTOR};

use super::fence::Part;
use super::map::{CompressedSpan, Geometry};
use super::slot::{Place, Slot, all, mask};
use super::tables::{Reclaim, Tables, past_end};
use super::write::Image;

/// Guest bytes that go to the host in one piece.
///
/// ```text
/// host cluster     |- - - head ######### buf ######### | ############### tail - - -|
///                          copied                                         copied
/// ```
#[derive(Debug)]
struct Run {
    /// The first guest byte.
    at: GuestOffset,
    /// How many.
    len: usize,
    /// The host cluster that the first one goes to; the others follow.
    host: HostOffset,
    /// Clusters of the main file taken for it: the first, and how many.
    fresh: Option<(u64, u64)>,
    /// What its clusters were before.
    old: Vec<Slot>,
    /// Bytes of the first cluster before `at` that must be filled from its old view.
    head: Range<u64>,
    /// Bytes of the last cluster behind the end that must be filled from its old view.
    tail: Range<u64>,
}

/// Subclusters that a new place must get from the old one.
fn kept(old: Slot, geometry: Geometry) -> u32 {
    match old.place {
        Place::Nowhere => 0,
        Place::At { .. } => old.stored,
        Place::Packed(_) => all(geometry),
    }
}

/// What must be filled in front of byte `inside` of a cluster, which is written from there on.
fn head(old: Slot, fresh: bool, geometry: Geometry, inside: u64) -> Range<u64> {
    let bits = geometry.granule_bits();
    let sub = inside >> bits;
    if !fresh && old.stored >> sub & 1 != 0 {
        return inside..inside;
    }
    let mut start = sub << bits;
    if fresh {
        let before = kept(old, geometry) & !(u32::MAX << sub);
        if before != 0 {
            start = u64::from(before.trailing_zeros()) << bits;
        }
    }
    start..inside
}

/// What must be filled behind byte `inside` of a cluster, which is written up to there.
fn tail(old: Slot, fresh: bool, geometry: Geometry, inside: u64) -> Range<u64> {
    let bits = geometry.granule_bits();
    let sub = inside.saturating_sub(1) >> bits;
    if !fresh && old.stored >> sub & 1 != 0 {
        return inside..inside;
    }
    let mut end = (sub + 1) << bits;
    if fresh {
        // At most 31, so that nothing is shifted out that matters.
        let after = kept(old, geometry) & (u32::MAX << sub) & !(1 << sub);
        if after != 0 {
            end = u64::from(u32::BITS - after.leading_zeros()) << bits;
        }
    }
    inside..end
}

impl Run {
    /// Finds the place for up to `max` bytes at `at`, taking new clusters if that is what they need. `bare` says that
    /// there is no layer below, `sealed` that data is encrypted.
    fn plan(tables: &mut Tables, at: GuestOffset, max: usize, bare: bool, sealed: bool) -> Result<Self> {
        let geometry = tables.geometry;
        let cluster = geometry.cluster_size();
        let first_at = at.align_down(cluster);
        let covers = geometry.l1_entry_covers();
        let end = at
            .saturating_add(max as u64)
            .min(at.align_down(covers).saturating_add(covers))
            .get();
        let place = |slot: Slot, index: u64| {
            if geometry.data_file() {
                Some(HostOffset::new(first_at.get() + index * cluster))
            } else {
                slot.own()
            }
        };
        let mut old = vec![tables.slot(at)?];
        let own = old.first().and_then(|slot| place(*slot, 0));
        let mut next = first_at.plus(cluster)?;
        while next.get() < end {
            let slot = tables.slot(next)?;
            let index = old.len() as u64;
            if place(slot, index) != own.map(|own| own.saturating_add(index * cluster)) {
                break;
            }
            old.push(slot);
            next = next.plus(cluster)?;
        }
        let (host, fresh) = match own {
            Some(host) => {
                if !geometry.data_file() {
                    let last = host.plus((old.len() as u64 - 1) * cluster)?.get();
                    let len = tables.fence.file().len()?;
                    if last >= len {
                        return Err(past_end("a cluster", last, len).guest(at));
                    }
                    tables.fence.check(Part::Data, host.get()..last + cluster)?;
                }
                (host, None)
            }
            None => {
                let (first, count) = tables.allocate(1, old.len() as u64)?;
                old.truncate(usize::try_from(count).unwrap_or(usize::MAX));
                (
                    HostOffset::new(first << geometry.cluster_bits().get()),
                    Some((first, count)),
                )
            }
        };
        let end = end.min(first_at.get() + old.len() as u64 * cluster);
        let last_at = GuestOffset::new(end - 1).align_down(cluster);
        let first = old.first().copied().unwrap_or(Slot::ABSENT);
        let last = old.last().copied().unwrap_or(Slot::ABSENT);
        let (start_inside, end_inside) = (at.within(cluster), end - last_at.get());
        let zeros = |slot: Slot| slot.place == Place::Nowhere && (bare || slot.zero == all(geometry));
        let is_fresh = fresh.is_some();
        let (head, tail) = if is_fresh
            && !sealed
            && zeros(first)
            && zeros(last)
            && host.get() >= tables.fence.file().len()?
        {
            // Around the bytes belong zeros, and so there are behind the end of the file.
            (start_inside..start_inside, end_inside..end_inside)
        } else {
            (
                head(first, is_fresh, geometry, start_inside),
                tail(last, is_fresh, geometry, end_inside),
            )
        };
        Ok(Self {
            at,
            len: usize::try_from(end - at.get()).unwrap_or(max),
            host,
            fresh,
            old,
            head,
            tail,
        })
    }

    /// Enters the run into the tables. Returns how many of its clusters have been, with an error if not all.
    fn commit(&self, tables: &mut Tables) -> (u64, Result<()>) {
        let geometry = tables.geometry;
        let cluster = geometry.cluster_size();
        let end = self.at.get() + self.len as u64;
        let mut start = self.at.align_down(cluster);
        for (index, old) in (0..).zip(&self.old) {
            let first = geometry.subcluster(self.at.max(start));
            let last = geometry.subcluster(GuestOffset::new(end.min(start.get() + cluster) - 1));
            let written = mask(first, last);
            let stored = if self.fresh.is_some() {
                kept(*old, geometry)
            } else {
                old.stored
            };
            let new = Slot {
                place: Place::At {
                    host: self.host.saturating_add(index * cluster),
                    own: true,
                },
                stored: stored | written,
                zero: old.zero & !written,
            };
            if new != *old {
                // What was copied must be there before it shows, and in a place that was kept lies older data.
                tables.fence.note_copied();
                if let Err(error) = tables.set_slot(start, new) {
                    return (index, Err(error));
                }
                if self.fresh.is_some() {
                    tables.drop_slot(*old, Reclaim::Keep);
                }
            }
            start = start.saturating_add(cluster);
        }
        (self.old.len() as u64, tables.settle_if_many())
    }
}

impl Image {
    /// Writes `buf`, whose clusters are held.
    pub(super) fn write_held(&self, at: GuestOffset, buf: &[u8], below: &Chain) -> Result<()> {
        // Without a key nothing may be changed.
        let sealed = self.sealing.cipher()?.is_some();
        if sealed && !(at.is_aligned(SECTOR) && (buf.len() as u64).is_multiple_of(SECTOR)) {
            return self.write_sectors(at, buf, below);
        }
        let (mut at, mut rest) = (at, buf);
        while !rest.is_empty() {
            let run = self.change(|tables| Run::plan(tables, at, rest.len(), below.is_empty(), sealed))?;
            let (now, later) = rest.split_at(run.len.clamp(1, rest.len()));
            let mut entered = 0;
            let result = self.store(&run, now, below).and_then(|()| {
                self.change(|tables| {
                    let (count, result) = run.commit(tables);
                    entered = count;
                    result
                })
            });
            if let Err(error) = result {
                if let Some((first, count)) = run.fresh {
                    // Nothing refers to them; if they cannot be given back they leak.
                    let _ = self.change(|tables| tables.release(first + entered, count - entered));
                }
                return Err(error);
            }
            at = at.plus(now.len() as u64)?;
            rest = later;
        }
        Ok(())
    }

    /// Writes `buf` with what is around it in its sectors, since those are encrypted whole.
    fn write_sectors(&self, at: GuestOffset, buf: &[u8], below: &Chain) -> Result<()> {
        let start = at.align_down(SECTOR);
        let end = at.plus(buf.len() as u64)?.get().next_multiple_of(SECTOR);
        let len = usize::try_from(end - start.get()).map_err(|_| Error::bare(ErrorKind::Unsupported))?;
        let mut sectors = vec![0; len];
        let sector = usize::try_from(SECTOR).unwrap_or(512);
        let (first, rest) = sectors.split_at_mut(sector.min(len));
        self.read_held(start, first, below)?;
        if let Some(last) = rest
            .len()
            .checked_sub(sector)
            .and_then(|from| rest.get_mut(from..))
        {
            self.read_held(GuestOffset::new(end - SECTOR), last, below)?;
        }
        let inside = usize::try_from(at.within(SECTOR)).unwrap_or(usize::MAX);
        let part = sectors
            .get_mut(inside..)
            .and_then(|rest| rest.get_mut(..buf.len()));
        part.ok_or_else(|| Error::bare(ErrorKind::Usage))?
            .copy_from_slice(buf);
        self.write_held(start, &sectors, below)
    }

    /// Puts the bytes of a run in their place, and what its edges need from the old view around them.
    fn store(&self, run: &Run, buf: &[u8], below: &Chain) -> Result<()> {
        let cluster = self.geometry.cluster_size();
        let cipher = self.sealing.cipher()?;
        if run.head.is_empty() && run.tail.is_empty() {
            let host = run.host.plus(run.at.within(cluster))?;
            return match cipher {
                None => self.data.write_at(host, buf),
                Some(cipher) => {
                    let mut sealed = buf.to_vec();
                    cipher.encrypt(run.at, host, &mut sealed)?;
                    self.data.write_at(host, &sealed)
                }
            };
        }
        let head_start = run.host.plus(run.head.start)?;
        let first_at = run.at.align_down(cluster);
        let end = run.at.plus(buf.len() as u64)?;
        let last_at = GuestOffset::new(end.get() - 1).align_down(cluster);
        let bits = self.geometry.granule_bits();
        let mut before = buffer(&run.head);
        if let Some(old) = run.old.first() {
            let touched = run.at.within(cluster) >> bits;
            self.fill_old(*old, first_at, run.head.start, touched, &mut before, below)?;
        }
        let mut after = buffer(&run.tail);
        if let Some(old) = run.old.last() {
            let touched = (end.get() - 1 - last_at.get()) >> bits;
            self.fill_old(*old, last_at, run.tail.start, touched, &mut after, below)?;
        }
        match cipher {
            None => self.data.write_vectored_at(
                head_start,
                &[IoSlice::new(&before), IoSlice::new(buf), IoSlice::new(&after)],
            ),
            Some(cipher) => {
                let mut sealed = [before.as_slice(), buf, &after].concat();
                cipher.encrypt(first_at.plus(run.head.start)?, head_start, &mut sealed)?;
                self.data.write_at(head_start, &sealed)
            }
        }
    }

    /// Fills `buf` with the old view of bytes from `inside` on of the cluster at `start`, which was `old`. The layer
    /// below is asked for subcluster `touched` only: others that are left to it stay so.
    fn fill_old(
        &self,
        old: Slot,
        start: GuestOffset,
        inside: u64,
        touched: u64,
        buf: &mut [u8],
        below: &Chain,
    ) -> Result<()> {
        if buf.is_empty() {
            return Ok(());
        }
        if let Some(span) = old.packed(self.geometry) {
            let whole = self.unpack(span)?;
            let from = usize::try_from(inside).unwrap_or(usize::MAX);
            return match whole.get(from..).and_then(|part| part.get(..buf.len())) {
                Some(part) => {
                    buf.copy_from_slice(part);
                    Ok(())
                }
                None => Err(Error::bare(ErrorKind::Io)),
            };
        }
        let size = self.size.load(Ordering::Acquire);
        let granule = 1u64 << self.geometry.granule_bits();
        let (mut inside, mut rest) = (inside, buf);
        while !rest.is_empty() {
            let sub = inside >> self.geometry.granule_bits();
            let len = granule - inside % granule;
            let len = usize::try_from(len).unwrap_or(usize::MAX).min(rest.len());
            let (now, later) = rest.split_at_mut(len);
            let at = start.plus(inside)?;
            match old.place {
                Place::At { host, .. } if old.stored >> sub & 1 != 0 => {
                    self.read_host(at, host.plus(inside)?, now)?
                }
                _ if old.zero >> sub & 1 == 0 && sub == touched && at.get() < size => {
                    // Past the end of the disk there is nothing, even where a longer image below has something.
                    let len = usize::try_from(size - at.get())
                        .unwrap_or(usize::MAX)
                        .min(now.len());
                    let (inner, outer) = now.split_at_mut(len);
                    below.read_at(at, inner)?;
                    outer.fill(0);
                }
                _ => now.fill(0),
            }
            inside += len as u64;
            rest = later;
        }
        Ok(())
    }

    /// The guest bytes of a compressed cluster.
    pub(super) fn unpack(&self, span: CompressedSpan) -> Result<Vec<u8>> {
        let len = self.data.len()?;
        let mut whole = vec![0; self.geometry.cluster_bits().cluster_len()];
        self.decoders
            .read_unit(self.data.as_ref(), len, span, &mut whole)?;
        Ok(whole)
    }
}

fn buffer(range: &Range<u64>) -> Vec<u8> {
    // At most a cluster.
    vec![0; usize::try_from(range.end - range.start).unwrap_or(0)]
}
