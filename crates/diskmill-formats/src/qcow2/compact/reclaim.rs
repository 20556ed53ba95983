//! Giving back what reads as zeros: data, subclusters, tables that say nothing, bits of bitmaps.

use std::collections::HashMap;

use diskmill_core::{GuestOffset, HostOffset, HostRun, Result, Storage, ZeroHow};

use super::super::header::{Autoclear, Version};
use super::super::layout::ZERO_FLAG;
use super::super::map::{ClusterKind, L2Entry, Subclusters};
use super::super::slot::all;
use super::bitmaps::BitmapTable;
use super::work::{Entry, Work};
use crate::codec::is_zero;

/// Clusters that several tables refer to and that are remembered; others are looked at again.
const SHARED_MAX: usize = 1 << 20;

/// Holes shorter than this are none to the host.
const HOST_BLOCK: u64 = 4096;

/// What is known of which parts of a file are holes: the last answer.
#[derive(Debug, Default)]
struct Holes {
    start: u64,
    end: u64,
    hole: bool,
}

impl Holes {
    /// Whether the host knows that `len` bytes at `at` are zeros.
    fn covers(&mut self, file: &dyn Storage, at: u64, len: u64) -> Result<bool> {
        if !(self.start..self.end).contains(&at) {
            let (hole, run) = match file.run_at(HostOffset::new(at))? {
                HostRun::Hole(run) => (true, run),
                HostRun::Data(run) => (false, run),
                _ => (false, 1),
            };
            *self = Self {
                start: at,
                end: at.saturating_add(run),
                hole,
            };
        }
        Ok(self.hole && at.saturating_add(len) <= self.end)
    }
}

/// What an entry of an L2 table is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Verdict {
    word: u64,
    subclusters: u64,
    /// The host cluster it refers to is given back.
    freed: bool,
}

/// Looks for zeros.
struct Search {
    holes: Holes,
    buffer: Vec<u8>,
    /// Of clusters that several tables refer to: which parts are not zero.
    shared: HashMap<u64, u32>,
    /// Of clusters that several tables refer to: the subclusters that were made holes.
    punched: HashMap<u64, u32>,
}

impl Work<'_> {
    /// Gives back all that reads as zeros.
    pub(super) fn reclaim(&mut self) -> Result<()> {
        let mut search = Search {
            holes: Holes::default(),
            buffer: Vec::new(),
            shared: HashMap::new(),
            punched: HashMap::new(),
        };
        let raw_data = self.data.is_some() && self.header.autoclear.has(Autoclear::RAW_DATA_FILE);
        let mut empty = Vec::new();
        let mut entries = Vec::new();
        for (number, table) in self.l2_tables()? {
            self.job.check()?;
            let weight = self.count(table >> self.bits())?;
            self.read_l2(table, &mut entries)?;
            let mut occupied = false;
            let guest = self.geometry.l1_start(number).get();
            for (index, entry) in entries.drain(..) {
                if raw_data {
                    occupied = true;
                    break;
                }
                let guest = guest.saturating_add(index << self.bits());
                let verdict = self.judge(entry, guest, weight, &mut search)?;
                occupied |= !self.says_nothing(verdict);
                self.carry_out(entry, verdict, weight, &mut search)?;
            }
            if !occupied {
                empty.push(table);
            }
            self.commit_if_many()?;
        }
        self.settle()?;
        self.drop_tables(empty)?;
        self.reclaim_bitmaps(&mut search)?;
        if std::mem::take(&mut self.uneven) {
            self.refresh_copied()?;
        }
        Ok(())
    }

    /// Whether an entry may as well not be there.
    fn says_nothing(&self, verdict: Verdict) -> bool {
        let zero_plain = !self.geometry.extended_l2() && verdict.word == ZERO_FLAG;
        let is_zero = (verdict.word == 0 && verdict.subclusters & 0xffff_ffff == 0) || zero_plain;
        let is_empty = verdict.word == 0 && verdict.subclusters == 0;
        is_empty || (is_zero && !self.backed())
    }

    pub(super) fn backed(&self) -> bool {
        self.header.backing_name.is_some()
    }

    /// The word of an entry that reads as zeros and takes no space, if it can be said.
    fn zero_word(&self) -> Option<u64> {
        match (self.backed(), self.geometry.version()) {
            (false, _) => Some(0),
            (true, Version::V3) => Some(ZERO_FLAG),
            (true, Version::V2) => None,
        }
    }

    fn judge(&mut self, entry: Entry, guest: u64, weight: u64, search: &mut Search) -> Result<Verdict> {
        let keep = Verdict {
            word: entry.word.0,
            subclusters: entry.subclusters.0,
            freed: false,
        };
        let (host, zero_flag) = match entry.word.kind(self.geometry)? {
            ClusterKind::Normal(host) => (host, false),
            ClusterKind::ZeroAllocated(host) => (host, true),
            _ => return Ok(keep),
        };
        self.job.observer.advance(self.cluster());
        if self.geometry.extended_l2() {
            let stored = lower(entry.subclusters);
            let zeros = entry.subclusters.0 >> 32;
            let left = match stored {
                0 => 0,
                _ => stored & self.nonzero(host.get(), guest, weight, search)?,
            };
            if left == stored && stored != 0 {
                return Ok(keep);
            }
            if left != 0 && (self.cluster() / 32 < HOST_BLOCK || self.sealing.is_encrypted()) {
                // The host could do nothing with it, or a hole would not read as zeros if the power failed too early.
                return Ok(keep);
            }
            let zeros = zeros | u64::from(stored & !left);
            return Ok(match left {
                0 => Verdict {
                    word: 0,
                    subclusters: if self.backed() { zeros << 32 } else { 0 },
                    freed: true,
                },
                _ => Verdict {
                    subclusters: zeros << 32 | u64::from(left),
                    ..keep
                },
            });
        }
        let Some(word) = self.zero_word() else {
            return Ok(keep);
        };
        if !zero_flag && self.nonzero(host.get(), guest, weight, search)? != 0 {
            return Ok(keep);
        }
        Ok(Verdict {
            word,
            subclusters: 0,
            freed: true,
        })
    }

    /// Which subclusters of a cluster are not all zeros.
    fn nonzero(&mut self, host: u64, guest: u64, weight: u64, search: &mut Search) -> Result<u32> {
        let (file, at): (&dyn Storage, u64) = match &self.data {
            Some(data) => (data.as_ref(), guest),
            None => (self.main.as_ref(), host),
        };
        let cluster = self.geometry.cluster_size();
        let known = search.shared.get(&at).copied();
        if let Some(known) = known {
            return Ok(known);
        }
        let mask = if !self.sealing.is_encrypted() && search.holes.covers(file, at, cluster)? {
            0
        } else {
            search
                .buffer
                .resize(self.geometry.cluster_bits().cluster_len(), 0);
            let read = |at, buf: &mut [u8]| file.read_padded(at, buf);
            let (guest, at) = (GuestOffset::new(guest), HostOffset::new(at));
            self.sealing.read(guest, at, &mut search.buffer, read)?;
            let parts = all(self.geometry).count_ones();
            let part_len = search.buffer.len() / usize::try_from(parts).unwrap_or(1);
            let masks = search.buffer.chunks(part_len).zip(0_u32..);
            masks.fold(0, |mask, (part, index)| {
                mask | if is_zero(part) { 0 } else { 1 << index }
            })
        };
        let cluster = host >> self.bits();
        let shared = self.data.is_none() && self.count(cluster)? > weight;
        if shared && search.shared.len() < SHARED_MAX {
            search.shared.insert(at, mask);
        }
        Ok(mask)
    }

    fn carry_out(&mut self, entry: Entry, verdict: Verdict, weight: u64, search: &mut Search) -> Result<()> {
        if (verdict.word, verdict.subclusters) == (entry.word.0, entry.subclusters.0) {
            return Ok(());
        }
        self.switch(entry.at, verdict.word);
        if self.geometry.extended_l2() {
            self.switch(entry.at.saturating_add(8), verdict.subclusters);
        }
        let host = entry.word.offset();
        if self.data.is_some() {
            return Ok(());
        }
        let cluster = host.get() >> self.bits();
        if !verdict.freed {
            let mut which = lower(entry.subclusters) & !lower(Subclusters(verdict.subclusters));
            if self.count(cluster)? > weight && search.punched.len() < SHARED_MAX {
                // A dry run cannot tell by the holes which of them another table has had made.
                let punched = search.punched.entry(cluster).or_default();
                let done = std::mem::replace(punched, *punched | which);
                which &= !done;
            }
            return self.punch_subclusters(host, which);
        }
        if self.count(cluster)? == weight {
            self.report.zeros = self.report.zeros.saturating_add(self.cluster());
            self.drop_with_batch(cluster, weight);
        } else {
            self.drop_late(cluster, weight);
        }
        Ok(())
    }

    /// Makes holes of subclusters that hold zeros.
    fn punch_subclusters(&mut self, host: HostOffset, which: u32) -> Result<()> {
        let len = self.cluster() / 32;
        for index in (0..32_u32).filter(|index| which >> index & 1 != 0) {
            let at = host.plus(u64::from(index) * len)?;
            if matches!(self.main.run_at(at)?, HostRun::Hole(hole) if hole >= len) {
                continue;
            }
            self.report.punched = self.report.punched.saturating_add(len);
            if !self.dry {
                self.main.zero(at..at.plus(len)?, ZeroHow::MayUnmap)?;
            }
        }
        Ok(())
    }

    /// Takes L2 tables that say nothing out of all L1 tables. `tables` are where they are.
    fn drop_tables(&mut self, mut tables: Vec<u64>) -> Result<()> {
        if tables.is_empty() {
            return Ok(());
        }
        tables.sort_unstable();
        let bits = self.bits();
        for l1 in self.l1_tables()? {
            self.each_l1_entry(&l1, |work, at, _, entry| {
                let table = entry.offset().get();
                if tables.binary_search(&table).is_ok() {
                    work.switch(at, 0);
                    work.drop_late(table >> bits, l1.weight());
                }
                Ok(())
            })?;
            self.commit_if_many()?;
        }
        let freed = (tables.len() as u64) << bits;
        self.report.zeros = self.report.zeros.saturating_add(freed);
        self.settle()
    }

    fn reclaim_bitmaps(&mut self, search: &mut Search) -> Result<()> {
        for bitmap in self.bitmap_tables()? {
            if !bitmap.in_use {
                self.reclaim_bitmap(&bitmap, search)?;
            }
        }
        self.settle()
    }

    fn reclaim_bitmap(&mut self, bitmap: &BitmapTable, search: &mut Search) -> Result<()> {
        let bits = self.bits();
        self.each_bitmap_entry(bitmap, |work, at, host| {
            if work.count(host >> bits)? != 1 {
                return Ok(());
            }
            search
                .buffer
                .resize(work.geometry.cluster_bits().cluster_len(), 0);
            work.main.read_padded(HostOffset::new(host), &mut search.buffer)?;
            // Without a cluster the lowest bit says whether all bits are set.
            let word = match search.buffer.first() {
                Some(0) if is_zero(&search.buffer) => 0,
                Some(0xff) if search.buffer.iter().all(|byte| *byte == 0xff) => 1,
                _ => return Ok(()),
            };
            work.switch(at, word);
            work.drop_with_batch(host >> bits, 1);
            work.report.zeros = work.report.zeros.saturating_add(work.cluster());
            Ok(())
        })?;
        self.commit_if_many()
    }

    /// Sets the COPIED flags of the active state to what refcounts say.
    pub(super) fn refresh_copied(&mut self) -> Result<()> {
        use super::super::layout::COPIED;
        let bits = self.bits();
        let flagged = |word: u64, copied: bool| if copied { word | COPIED } else { word & !COPIED };
        let Some(active) = self.l1_tables()?.into_iter().next() else {
            return Ok(());
        };
        let mut tables = Vec::new();
        self.each_l1_entry(&active, |work, at, _, entry| {
            let table = entry.offset().get();
            let copied = work.count(table >> bits)? == 1;
            if entry.copied() != copied {
                work.switch(at, flagged(entry.0, copied));
            }
            tables.push(table);
            Ok(())
        })?;
        let mut entries = Vec::new();
        for table in tables {
            self.read_l2(table, &mut entries)?;
            for (_, entry) in entries.drain(..) {
                let (ClusterKind::Normal(host) | ClusterKind::ZeroAllocated(host)) =
                    entry.word.kind(self.geometry)?
                else {
                    continue;
                };
                let copied = self.data.is_some() || self.count(host.get() >> bits)? == 1;
                if entry.word.copied() != copied {
                    self.switch(entry.at, flagged(entry.word.0, copied));
                }
            }
            self.commit_if_many()?;
        }
        self.commit()
    }
}

/// The subclusters that are stored.
fn lower(subclusters: Subclusters) -> u32 {
    // The lower half of 64 bits.
    u32::try_from(subclusters.0 & 0xffff_ffff).unwrap_or(u32::MAX)
}

/// The word of an entry that refers to `host` and says otherwise what `word` does.
pub(super) fn moved(word: L2Entry, host: u64) -> u64 {
    word.0 & !super::super::layout::OFFSET_MASK | host
}
