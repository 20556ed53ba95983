//! L2 tables: what they refer to, and what is wrong with their entries.

use diskmill_core::{GuestOffset, HostOffset, Result};

use super::super::header::Version;
use super::super::layout::{COPIED, OFFSET_MASK, ZERO_FLAG};
use super::super::map::{ClusterKind, L2Entry, Subclusters};
use super::super::run::split_entry;
use super::crew;
use super::ground::Ground;
use super::notes::Notes;
use super::refs::References;
use super::repair::view::View;
use super::survey::TableUse;

/// What one worker saw in L2 tables.
#[derive(Debug, Default)]
pub(super) struct Walked {
    pub(super) notes: Notes,
    /// Tables with entries that cannot be.
    pub(super) faulty: Vec<u64>,
    /// Whether an entry of the active state is not flagged as referred to once.
    pub(super) uncopied: bool,
}

/// Counts the references of L2 tables.
pub(super) fn walk(
    ground: &Ground<'_>,
    view: &View<'_>,
    references: &References,
    tables: &[(HostOffset, TableUse)],
) -> Result<Vec<Walked>> {
    crew::each(tables, ground.job, |index, (at, user), walked: &mut Walked| {
        walked.notes.item = index as u64;
        with_table(ground, view, &mut walked.notes, *at, |notes, bytes| {
            let mut walk = Walk {
                ground,
                references,
                notes,
                table: *at,
                user: *user,
                expected: None,
                run: Run::default(),
                uncopied: false,
            };
            let before = walk.notes.counters.corruptions;
            walk.table(bytes);
            walked.uncopied |= walk.uncopied && user.active > 0;
            if walk.notes.counters.corruptions > before {
                walked.faulty.push(at.get());
            }
        });
        if user.active > 0 {
            ground.job.observer.advance(ground.geometry.l1_entry_covers());
        }
        Ok(())
    })
}

/// Reads an L2 table and hands it over as `view` shows it, if there is anything to see in it.
pub(super) fn with_table(
    ground: &Ground<'_>,
    view: &View<'_>,
    notes: &mut Notes,
    at: HostOffset,
    then: impl FnOnce(&mut Notes, &[u8]),
) {
    thread_local! {
        /// A table is up to 2 MiB: too much to ask for each time.
        static TABLE: std::cell::Cell<Vec<u8>> = const { std::cell::Cell::new(Vec::new()) };
    }
    let mut table = TABLE.take();
    table.resize(ground.header.cluster_bits.cluster_len(), 0);
    if !ground.is_hole(at, table.len() as u64) && ground.read(notes, "l2 table", at, &mut table) {
        view.table(ground, at, &mut table);
        then(notes, &table);
    }
    TABLE.set(table);
}

/// The entries of an L2 table with the guest bytes they are for.
pub(super) fn entries<'a>(
    ground: &'a Ground<'_>,
    table: HostOffset,
    l1_index: u64,
    bytes: &'a [u8],
) -> impl Iterator<Item = (Place, L2Entry, Subclusters)> + 'a {
    let start = ground.geometry.l1_start(l1_index);
    let bits = ground.bits();
    bytes
        .chunks_exact(ground.geometry.entry_len())
        .enumerate()
        .map(move |(index, words)| {
            let (entry, subclusters) = split_words(words);
            let place = Place {
                table,
                index,
                guest: start.saturating_add((index as u64) << bits),
            };
            (place, entry, subclusters)
        })
}

/// Clusters that follow one another in the file, to be counted at once.
#[derive(Default)]
struct Run {
    start: u64,
    end: u64,
}

struct Walk<'a> {
    ground: &'a Ground<'a>,
    references: &'a References,
    notes: &'a mut Notes,
    table: HostOffset,
    user: TableUse,
    /// Where the next cluster is if it is not fragmented.
    expected: Option<HostOffset>,
    run: Run,
    uncopied: bool,
}

impl Walk<'_> {
    fn table(&mut self, bytes: &[u8]) {
        let plain = !self.ground.geometry.extended_l2() && !self.ground.geometry.data_file();
        let step = self.ground.geometry.entry_len();
        let start = self.ground.geometry.l1_start(self.user.l1_index);
        let mut rest = bytes;
        let mut index = 0_usize;
        while !rest.is_empty() {
            let taken = if plain { self.neighbours(rest) } else { 0 };
            if taken == 0 {
                let (entry, subclusters) = split_words(rest.get(..step).unwrap_or(rest));
                if entry.0 != 0 || subclusters.0 != 0 {
                    let place = Place {
                        table: self.table,
                        index,
                        guest: start.saturating_add((index as u64) << self.ground.bits()),
                    };
                    self.entry(place, entry, subclusters);
                }
            }
            let taken = taken.max(1);
            index = index.saturating_add(taken);
            rest = rest.get(taken.saturating_mul(step)..).unwrap_or_default();
        }
        self.flush();
    }

    /// Counts plain entries that follow one another in the file, and returns how many there are.
    fn neighbours(&mut self, bytes: &[u8]) -> usize {
        let words = bytes.as_chunks::<8>().0;
        let Some(first) = words.first().map(|word| u64::from_be_bytes(*word)) else {
            return 0;
        };
        let size = self.ground.cluster_size;
        let offset = first & OFFSET_MASK;
        if first & !OFFSET_MASK != COPIED || offset == 0 || !HostOffset::new(offset).is_aligned(size) {
            return 0;
        }
        let cluster = offset >> self.ground.bits();
        let most = usize::try_from(self.ground.clusters.saturating_sub(cluster)).unwrap_or(usize::MAX);
        let mut next = first;
        let count = words
            .iter()
            .take(most)
            .take_while(|word| {
                let same = u64::from_be_bytes(**word) == next;
                next = next.wrapping_add(size);
                same
            })
            .count();
        if count == 0 {
            return 0;
        }
        let end = cluster.saturating_add(count as u64);
        self.allocated(HostOffset::new(offset), count as u64);
        self.count(cluster..end);
        count
    }

    /// Notes `count` clusters from `at` on that are allocated.
    fn allocated(&mut self, at: HostOffset, count: u64) {
        let active = self.user.active;
        let counters = &mut self.notes.counters;
        counters.allocated_units = counters
            .allocated_units
            .saturating_add(active.saturating_mul(count));
        if self.expected.is_some_and(|expected| expected != at) {
            counters.fragmented_units = counters.fragmented_units.saturating_add(active);
        }
        self.expected = Some(at.saturating_add(self.ground.cluster_size.saturating_mul(count)));
    }

    fn count(&mut self, clusters: std::ops::Range<u64>) {
        if self.run.end != clusters.start {
            self.flush();
            self.run.start = clusters.start;
        }
        self.run.end = clusters.end;
    }

    fn flush(&mut self) {
        let run = std::mem::take(&mut self.run);
        self.references.add(run.start..run.end, self.user.total);
    }

    fn refer(&mut self, what: &str, at: HostOffset, len: u64, guest: GuestOffset) {
        let weight = self.user.total;
        self.ground
            .refer(self.references, self.notes, what, at, len, weight, Some(guest));
    }

    fn entry(&mut self, place: Place, entry: L2Entry, subclusters: Subclusters) {
        let geometry = self.ground.geometry;
        if entry.reserved(geometry) != 0 {
            self.bad(place, entry, "reserved bits are set");
        }
        if entry.is_compressed() {
            self.compressed(place, entry, subclusters);
            return;
        }
        let zero = entry.0 & ZERO_FLAG != 0 && !geometry.extended_l2();
        if zero && self.ground.header.version == Version::V2 {
            self.bad(place, entry, "the zero flag is not known in version 2");
        }
        let at = entry.offset();
        let allocated = at != HostOffset::ZERO || (geometry.data_file() && entry.copied());
        if geometry.extended_l2() {
            let kind = if allocated {
                ClusterKind::Normal(at)
            } else {
                ClusterKind::Unallocated
            };
            if let Err(error) = subclusters.check(kind) {
                let host = place.host(geometry.entry_len());
                self.notes
                    .corruption(self.user.total, host, Some(place.guest), || {
                        format!("{}: {error}", place.name())
                    });
            }
        }
        if !allocated {
            return;
        }
        self.uncopied |= !entry.copied();
        if !at.is_aligned(self.ground.cluster_size) {
            self.bad(place, entry, "the offset does not fall on a cluster");
        }
        self.allocated(at, 1);
        if geometry.data_file() {
            let misplaced = at.is_aligned(self.ground.cluster_size) && at.get() != place.guest.get();
            if misplaced && self.user.total == self.user.active && self.user.active == 1 {
                self.bad(place, entry, "the offset in the data file is not the guest's");
            }
            return;
        }
        let cluster = self.ground.cluster(at);
        if at.is_aligned(self.ground.cluster_size) && cluster < self.ground.clusters {
            self.count(cluster..cluster.saturating_add(1));
        } else {
            self.refer("data cluster", at, self.ground.cluster_size, place.guest);
        }
    }

    fn compressed(&mut self, place: Place, entry: L2Entry, subclusters: Subclusters) {
        if entry.copied() {
            self.bad(place, entry, "a compressed cluster must not be flagged as copied");
        }
        if self.ground.geometry.data_file() {
            self.bad(
                place,
                entry,
                "no cluster can be compressed with an external data file",
            );
            return;
        }
        if subclusters.0 != 0 {
            self.bad(place, entry, "a compressed cluster must not have subclusters");
            return;
        }
        let span = entry.span(self.ground.geometry);
        self.refer("compressed cluster", span.at, span.len, place.guest);
        let active = self.user.active;
        let counters = &mut self.notes.counters;
        for counter in [
            &mut counters.allocated_units,
            &mut counters.compressed_units,
            &mut counters.fragmented_units,
        ] {
            *counter = counter.saturating_add(active);
        }
    }

    fn bad(&mut self, place: Place, entry: L2Entry, why: &str) {
        let host = place.host(self.ground.geometry.entry_len());
        self.notes
            .corruption(self.user.total, host, Some(place.guest), || {
                format!("{} is {:#018x}: {why}", place.name(), entry.0)
            });
    }
}

/// Where an L2 entry is.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub(super) table: HostOffset,
    pub(super) index: usize,
    pub(super) guest: GuestOffset,
}

impl Place {
    pub(super) fn host(self, entry_len: usize) -> HostOffset {
        self.table
            .saturating_add((self.index as u64).saturating_mul(entry_len as u64))
    }

    pub(super) fn name(self) -> String {
        format!("l2 table at {:#x}: entry {}", self.table, self.index)
    }
}

/// The entry at the start of `words`, which are no longer than one where entries have 8 bytes.
pub(super) fn split_words(words: &[u8]) -> (L2Entry, Subclusters) {
    match (words.first_chunk::<16>(), words.first_chunk::<8>()) {
        (Some(words), _) => split_entry(words),
        (None, Some(word)) => (L2Entry(u64::from_be_bytes(*word)), Subclusters(0)),
        (None, None) => (L2Entry::UNALLOCATED, Subclusters(0)),
    }
}
