//! The image as it will be once it is repaired: a check walks it before anything is written.
//!
//! What cannot be is replaced by what loses least. Bits that say nothing are cleared. A place that does not fall on a
//! cluster is moved to the cluster it is in, if nothing else refers to that one. What lies past the end of the file,
//! and what nobody can read, becomes zeros. A table of which more than half cannot be is none: the entry that refers
//! to it is dropped and the cluster left as it is.

use std::collections::{HashMap, HashSet};

use diskmill_core::{GuestOffset, HostOffset};

use super::super::super::header::Version;
use super::super::super::layout::{COPIED, L2_RESERVED, ZERO_FLAG};
use super::super::super::map::{L1Entry, L2Entry, Subclusters};
use super::super::super::snapshot::Snapshot;
use super::super::ground::Ground;
use super::super::notes::Notes;
use super::super::refs::Counts;
use super::super::survey::{Found, TableUse};
use super::super::tables::{split_words, with_table};

/// How a check sees an image. The default is: as it is.
#[derive(Default)]
pub(in super::super) struct View<'a> {
    /// The snapshots, in place of what their table says.
    pub(in super::super) snapshots: Option<Vec<Snapshot>>,
    /// What to put in the place of entries that cannot be.
    pub(in super::super) mender: Option<Mender<'a>>,
}

impl View<'_> {
    /// An L1 entry.
    pub(in super::super) fn l1(&self, entry: L1Entry) -> L1Entry {
        self.mender.as_ref().map_or(entry, |mender| mender.l1(entry))
    }

    /// Mends the L2 table at `at`, which `bytes` are.
    pub(in super::super) fn table(&self, ground: &Ground<'_>, at: HostOffset, bytes: &mut [u8]) {
        if let Some(mender) = &self.mender {
            mender.table(ground, at, bytes);
        }
    }
}

/// Replaces entries that cannot be.
pub(in super::super) struct Mender<'a> {
    /// What refers to what before anything is mended.
    counts: &'a Counts,
    tables: &'a HashMap<u64, TableUse>,
    faulty: &'a [u64],
    cluster_size: u64,
    file_len: u64,
    cluster_bits: u32,
    /// Places that L1 entries refer to and that hold no L2 table.
    doomed: HashSet<u64>,
    /// Those of them that are other structures for certain.
    overlaps: Vec<HostOffset>,
    version: Version,
    extended: bool,
    data_file: bool,
    /// Whether an unallocated cluster may show something else than zeros.
    backed: bool,
}

impl<'a> Mender<'a> {
    /// What mends the image that `found` and `counts` describe, if there is anything to mend. `fixed` counts clusters of
    /// structures that are no L2 tables for certain.
    pub(super) fn new(
        ground: &Ground<'_>,
        found: &'a Found,
        counts: &'a Counts,
        fixed: &Counts,
    ) -> Option<Self> {
        let mut mender = Self {
            counts,
            tables: &found.tables,
            faulty: &found.faulty,
            cluster_size: ground.cluster_size,
            file_len: ground.file_len,
            cluster_bits: ground.bits(),
            doomed: HashSet::new(),
            overlaps: Vec::new(),
            version: ground.header.version,
            extended: ground.geometry.extended_l2(),
            data_file: ground.geometry.data_file(),
            backed: ground.header.backing_name.is_some(),
        };
        // A snapshot table without a fault is one.
        let snapshots = &found.snapshots;
        let listed = match snapshots.place {
            Some((at, len)) if !snapshots.faulty => ground.clusters_of(at, len),
            _ => 0..0,
        };
        let mut doomed = HashSet::new();
        for (at, user) in &found.tables {
            let at = HostOffset::new(*at);
            let place = at.align_down(mender.cluster_size);
            let moved = place != at;
            let suspect = moved || found.faulty.binary_search(&at.get()).is_ok();
            if fixed.get(ground.cluster(place)) > 0 {
                mender.overlaps.push(at);
                doomed.insert(at.get());
            } else if moved && !mender.sole(place, user.total)
                || suspect && listed.contains(&ground.cluster(place))
                || suspect && !mender.is_table(ground, at, place)
            {
                doomed.insert(at.get());
            }
        }
        mender.doomed = doomed;
        let l1s = found.l1s.iter().any(|l1| l1.first_fault.is_some());
        (l1s || !mender.doomed.is_empty() || !found.faulty.is_empty()).then_some(mender)
    }

    /// Where L1 entries refer to that are other structures.
    pub(super) fn overlaps(&self) -> &[HostOffset] {
        &self.overlaps
    }

    /// The L2 tables with entries that are mended.
    pub(super) fn faulty(&self) -> impl Iterator<Item = HostOffset> {
        self.faulty.iter().map(|at| HostOffset::new(*at))
    }

    /// Whether nothing but the `weight` references of who asks refer to the cluster at `at`.
    fn sole(&self, at: HostOffset, weight: u64) -> bool {
        at != HostOffset::ZERO
            && at.get() < self.file_len
            && self.counts.get(at.get() >> self.cluster_bits) == weight
    }

    /// Whether most of what is at `place`, which an entry calls `named`, can be an L2 table's.
    fn is_table(&self, ground: &Ground<'_>, named: HostOffset, place: HostOffset) -> bool {
        let mut notes = Notes::default();
        let (mut used, mut wrong) = (0_u64, 0_u64);
        with_table(ground, &View::default(), &mut notes, place, |_, bytes| {
            self.each(ground, place, bytes, |_, before, after| {
                let is_used = before.0.0 != 0 || before.1.0 != 0;
                used = used.saturating_add(u64::from(is_used));
                wrong = wrong.saturating_add(u64::from(is_used && after != Some(before)));
            });
        });
        let allowed = if named == place { used / 2 } else { 0 };
        notes.is_clean() && wrong <= allowed
    }

    /// Calls `each` for every entry of the table at `at` with its index, what it is and what it should be.
    fn each(
        &self,
        ground: &Ground<'_>,
        at: HostOffset,
        bytes: &[u8],
        mut each: impl FnMut(usize, (L2Entry, Subclusters), Option<(L2Entry, Subclusters)>),
    ) {
        let user = self.tables.get(&at.get()).copied();
        let start = user.map_or(GuestOffset::ZERO, |user| ground.geometry.l1_start(user.l1_index));
        let step = ground.geometry.entry_len();
        for (index, words) in bytes.chunks_exact(step).enumerate() {
            let guest = start.saturating_add((index as u64) << self.cluster_bits);
            let (entry, subclusters) = split_words(words);
            let mended = self.l2(ground, entry, subclusters, guest, user);
            each(index, (entry, subclusters), mended);
        }
    }

    /// An L1 entry: dropped, moved to the cluster it points into, or with cleared bits.
    fn l1(&self, entry: L1Entry) -> L1Entry {
        let at = entry.offset();
        if at == HostOffset::ZERO || self.doomed.contains(&at.get()) || at.get() >= self.file_len {
            return L1Entry(0);
        }
        L1Entry::new(at.align_down(self.cluster_size), entry.copied())
    }

    /// Mends a table that is known to be faulty.
    fn table(&self, ground: &Ground<'_>, at: HostOffset, bytes: &mut [u8]) {
        if self.faulty.binary_search(&at.get()).is_err() {
            return;
        }
        let before = bytes.to_vec();
        let step = ground.geometry.entry_len();
        self.each(ground, at, &before, |index, before, after| {
            if let Some((entry, subclusters)) = after.filter(|after| *after != before) {
                let from = index.saturating_mul(step);
                let words = [entry.0.to_be_bytes(), subclusters.0.to_be_bytes()].concat();
                for (to, byte) in bytes.iter_mut().skip(from).take(step).zip(words) {
                    *to = byte;
                }
            }
        });
    }

    /// What an L2 entry should be, or `None` if there is no way to write it.
    fn l2(
        &self,
        ground: &Ground<'_>,
        entry: L2Entry,
        subclusters: Subclusters,
        guest: GuestOffset,
        user: Option<TableUse>,
    ) -> Option<(L2Entry, Subclusters)> {
        if entry.is_compressed() {
            if self.data_file {
                let all = if self.extended {
                    Subclusters::ALL_ALLOCATED
                } else {
                    Subclusters(0)
                };
                return Some((L2Entry::normal(HostOffset::new(guest.get()), true), all));
            }
            let span = entry.span(ground.geometry);
            return if ground.holds(span.at, span.len) {
                Some((L2Entry(entry.0 & !COPIED), Subclusters(0)))
            } else {
                self.zeros(Subclusters::ALL_ZERO)
            };
        }
        let no_flag = self.extended || self.version == Version::V2;
        let reserved = if no_flag {
            L2_RESERVED | ZERO_FLAG
        } else {
            L2_RESERVED
        };
        let plain = L2Entry(entry.0 & !reserved);
        let at = plain.offset();
        let allocated = at != HostOffset::ZERO || (self.data_file && plain.copied());
        let stored = subclusters.0 & 0xffff_ffff;
        let zero = (subclusters.0 >> 32) & !stored;
        if !allocated {
            // Parts that are said to be stored nowhere are lost.
            return Some((plain, Subclusters((zero | stored) << 32)));
        }
        let kept = Subclusters(zero << 32 | stored);
        let lost = Subclusters((zero | stored) << 32);
        let moved = |at: u64| {
            let low = at | plain.0 & (COPIED | ZERO_FLAG);
            Some((L2Entry(low), kept))
        };
        if self.data_file {
            let alone = user.is_none_or(|user| user.total == user.active && user.active == 1);
            let right = at.is_aligned(self.cluster_size) && (at.get() == guest.get() || !alone);
            return if right {
                Some((plain, kept))
            } else {
                Some((L2Entry(guest.get() | COPIED | plain.0 & ZERO_FLAG), kept))
            };
        }
        if at.is_aligned(self.cluster_size) {
            return if at.get() < self.file_len {
                Some((plain, kept))
            } else {
                self.zeros(lost)
            };
        }
        let has_data = if self.extended {
            stored != 0
        } else {
            plain.0 & ZERO_FLAG == 0
        };
        let place = at.align_down(self.cluster_size);
        let weight = user.map_or(0, |user| user.total);
        if has_data && self.sole(place, weight) {
            moved(place.get())
        } else {
            self.zeros(lost)
        }
    }

    /// An entry of zeros that takes no place, if there is one that says so.
    fn zeros(&self, subclusters: Subclusters) -> Option<(L2Entry, Subclusters)> {
        match self.version {
            _ if self.extended => Some((L2Entry::UNALLOCATED, subclusters)),
            Version::V3 => Some((L2Entry::ZERO_PLAIN, Subclusters(0))),
            Version::V2 if !self.backed => Some((L2Entry::UNALLOCATED, Subclusters(0))),
            Version::V2 => None,
        }
    }
}
