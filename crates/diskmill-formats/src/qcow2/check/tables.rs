//! L1 and L2 tables: what they refer to, and what is wrong with their entries.

use diskmill_core::{FindingKind, GuestOffset, HostOffset, Result};

use super::super::header::Version;
use super::super::layout::ZERO_FLAG;
use super::super::map::{ClusterKind, L1Entry, L2Entry, Subclusters};
use super::super::run::split_entry;
use super::Check;
use super::refcounts::Disk;

/// Bytes of an L1 table read at once.
const L1_PIECE: u64 = 64 << 10;

/// How often an L2 table is referred to.
#[derive(Clone, Copy, Debug)]
pub(super) struct TableUse {
    /// The first L1 entry that refers to it; of the active table, if one does.
    l1_index: u64,
    /// By entries of the active L1 table.
    active: u64,
    /// By entries of any L1 table.
    total: u64,
}

/// Clusters that follow one another in the file, to be counted at once.
#[derive(Default)]
struct Neighbours {
    start: u64,
    end: u64,
}

impl Check<'_> {
    /// Counts the references of the active L1 table.
    pub(super) fn active_tables(&mut self) -> Result<()> {
        let at = self.header.l1_table_offset;
        self.l1_table("active l1 table", at, self.header.l1_size, 1, true)
    }

    /// Counts the references of an L1 table that `weight` things refer to.
    pub(super) fn l1_table(
        &mut self,
        what: &str,
        at: HostOffset,
        entries: u32,
        weight: u64,
        active: bool,
    ) -> Result<()> {
        let len = u64::from(entries).saturating_mul(8);
        if !self.refer(what, at, len, weight, None) {
            return Ok(());
        }
        if len > self.l1_budget {
            self.find(FindingKind::Error, 1, Some(at), None, || {
                "the l1 tables of all snapshots together are too large to be read".to_owned()
            });
            return Ok(());
        }
        self.l1_budget = self.l1_budget.saturating_sub(len);
        let mut piece = Vec::new();
        let mut done = 0;
        while done < len {
            let piece_at = at.saturating_add(done);
            let piece_len = len.saturating_sub(done).min(L1_PIECE);
            if !self.is_hole(piece_at, piece_len) {
                piece.resize(usize::try_from(piece_len).unwrap_or(0), 0);
                if !self.read(what, piece_at, &mut piece) {
                    return Ok(());
                }
                self.l1_entries(what, piece_at, &piece, done / 8, weight, active);
            }
            done = done.saturating_add(piece_len);
        }
        Ok(())
    }

    fn l1_entries(
        &mut self,
        what: &str,
        at: HostOffset,
        bytes: &[u8],
        first: u64,
        weight: u64,
        active: bool,
    ) {
        for (index, entry) in bytes.as_chunks::<8>().0.iter().enumerate() {
            let entry = L1Entry(u64::from_be_bytes(*entry));
            if entry.0 == 0 {
                continue;
            }
            let l1_index = first.saturating_add(index as u64);
            let entry_at = at.saturating_add((index as u64).saturating_mul(8));
            if entry.reserved() != 0 {
                self.corruption(weight, entry_at, None, || {
                    format!(
                        "{what}: entry {l1_index} is {:#018x}, reserved bits are set",
                        entry.0
                    )
                });
            }
            let table = entry.offset();
            if table == HostOffset::ZERO {
                continue;
            }
            if !self.refer("l2 table", table, self.cluster_size, weight, None) {
                continue;
            }
            if !table.is_aligned(self.cluster_size) {
                self.corruption(weight, entry_at, None, || {
                    format!("{what}: entry {l1_index} refers to an l2 table at {table:#x}, must start on a cluster")
                });
            }
            let user = self.tables.entry(table.get()).or_insert(TableUse {
                l1_index,
                active: 0,
                total: 0,
            });
            user.total = user.total.saturating_add(weight);
            if active {
                user.active = user.active.saturating_add(weight);
            }
        }
    }

    /// The tables found, in guest order.
    fn table_list(&self) -> Vec<(HostOffset, TableUse)> {
        let mut tables: Vec<_> = self
            .tables
            .iter()
            .map(|(at, user)| (HostOffset::new(*at), *user))
            .collect();
        tables.sort_unstable_by_key(|(at, user)| (user.l1_index, *at));
        tables
    }

    /// Reads an L2 table into `table`; `false` if there is nothing to see in it.
    fn read_table(&mut self, at: HostOffset, table: &mut [u8]) -> bool {
        !self.is_hole(at, table.len() as u64) && self.read("l2 table", at, table)
    }

    /// Counts the references of all L2 tables found.
    pub(super) fn walk_tables(&mut self) -> Result<()> {
        let mut table = vec![0; self.header.cluster_bits.cluster_len()];
        for (at, user) in self.table_list() {
            self.job.check()?;
            if self.read_table(at, &mut table) {
                self.l2_table(at, user, &table);
            }
            if user.active > 0 {
                self.job.observer.advance(self.geometry.l1_entry_covers());
            }
        }
        Ok(())
    }

    fn l2_table(&mut self, table: HostOffset, user: TableUse, bytes: &[u8]) {
        let mut guest = self.geometry.l1_start(user.l1_index);
        let mut expected = None;
        let mut neighbours = Neighbours::default();
        for (index, words) in bytes.chunks_exact(self.geometry.entry_len()).enumerate() {
            let (entry, subclusters) = split_words(words);
            if entry.0 != 0 || subclusters.0 != 0 {
                let place = Place { table, index, guest };
                self.l2_entry(place, user, entry, subclusters, &mut expected, &mut neighbours);
            }
            guest = guest.saturating_add(self.cluster_size);
        }
        self.flush(&mut neighbours, user.total);
    }

    fn l2_entry(
        &mut self,
        place: Place,
        user: TableUse,
        entry: L2Entry,
        subclusters: Subclusters,
        expected: &mut Option<HostOffset>,
        neighbours: &mut Neighbours,
    ) {
        let weight = user.total;
        if entry.reserved(self.geometry) != 0 {
            self.bad_entry(place, weight, entry, "reserved bits are set");
        }
        if entry.is_compressed() {
            self.compressed(place, user, entry, subclusters);
            return;
        }
        let zero = entry.0 & ZERO_FLAG != 0 && !self.geometry.extended_l2();
        if zero && self.header.version == Version::V2 {
            self.bad_entry(place, weight, entry, "the zero flag is not known in version 2");
        }
        let at = entry.offset();
        let allocated = at != HostOffset::ZERO || (self.geometry.data_file() && entry.copied());
        if self.geometry.extended_l2() {
            let kind = if allocated {
                ClusterKind::Normal(at)
            } else {
                ClusterKind::Unallocated
            };
            if let Err(error) = subclusters.check(kind) {
                self.corruption(
                    weight,
                    place.host(self.geometry.entry_len()),
                    Some(place.guest),
                    || format!("{}: {error}", place.name()),
                );
            }
        }
        if !allocated {
            return;
        }
        if !at.is_aligned(self.cluster_size) {
            self.bad_entry(place, weight, entry, "the offset does not fall on a cluster");
        }
        self.report.allocated_units = self.report.allocated_units.saturating_add(user.active);
        if expected.is_some_and(|expected| expected != at) {
            self.report.fragmented_units = self.report.fragmented_units.saturating_add(user.active);
        }
        *expected = Some(at.saturating_add(self.cluster_size));
        if self.geometry.data_file() {
            if at.get() != place.guest.get() && user.total == user.active && user.active == 1 {
                self.bad_entry(
                    place,
                    weight,
                    entry,
                    "the offset in the data file is not the guest's",
                );
            }
            return;
        }
        let bits = self.header.cluster_bits.get();
        let cluster = at.get() >> bits;
        if at.is_aligned(self.cluster_size) && cluster < self.clusters {
            if neighbours.end != cluster {
                self.flush(neighbours, weight);
                neighbours.start = cluster;
            }
            neighbours.end = cluster.saturating_add(1);
        } else {
            self.refer("data cluster", at, self.cluster_size, weight, Some(place.guest));
        }
    }

    fn flush(&mut self, neighbours: &mut Neighbours, weight: u64) {
        self.references.add(neighbours.start..neighbours.end, weight);
        *neighbours = Neighbours::default();
    }

    fn compressed(&mut self, place: Place, user: TableUse, entry: L2Entry, subclusters: Subclusters) {
        let weight = user.total;
        if entry.copied() {
            self.bad_entry(
                place,
                weight,
                entry,
                "a compressed cluster must not be flagged as copied",
            );
        }
        if self.geometry.data_file() {
            self.bad_entry(
                place,
                weight,
                entry,
                "no cluster can be compressed with an external data file",
            );
            return;
        }
        if subclusters.0 != 0 {
            self.bad_entry(
                place,
                weight,
                entry,
                "a compressed cluster must not have subclusters",
            );
            return;
        }
        let span = entry.span(self.geometry);
        self.refer("compressed cluster", span.at, span.len, weight, Some(place.guest));
        for counter in [
            &mut self.report.allocated_units,
            &mut self.report.compressed_units,
            &mut self.report.fragmented_units,
        ] {
            *counter = counter.saturating_add(user.active);
        }
    }

    fn bad_entry(&mut self, place: Place, weight: u64, entry: L2Entry, why: &str) {
        self.corruption(
            weight,
            place.host(self.geometry.entry_len()),
            Some(place.guest),
            || format!("{} is {:#018x}: {why}", place.name(), entry.0),
        );
    }

    /// Compares the COPIED flags of the active state with the refcounts on disk.
    pub(super) fn copied(&mut self, disk: &Disk) -> Result<()> {
        let mut table = vec![0; self.header.cluster_bits.cluster_len()];
        // The flags of L1 entries were dropped when the tables were gathered.
        let l1_entries: Vec<_> = self
            .table_list()
            .into_iter()
            .filter(|(_, user)| user.active > 0)
            .collect();
        self.copied_l1(disk)?;
        for (at, user) in l1_entries {
            self.job.check()?;
            if !self.read_table(at, &mut table) {
                continue;
            }
            let mut guest = self.geometry.l1_start(user.l1_index);
            for (index, words) in table.chunks_exact(self.geometry.entry_len()).enumerate() {
                let (entry, _) = split_words(words);
                let place = Place {
                    table: at,
                    index,
                    guest,
                };
                guest = guest.saturating_add(self.cluster_size);
                let cluster = entry.offset();
                if entry.is_compressed() || (cluster == HostOffset::ZERO && !entry.copied()) {
                    continue;
                }
                if self.geometry.data_file() {
                    if !entry.copied() {
                        self.bad_entry(
                            place,
                            user.active,
                            entry,
                            "the copied flag must be set with an external data file",
                        );
                    }
                    continue;
                }
                if cluster == HostOffset::ZERO {
                    continue;
                }
                let refcount = match self.refcount_on_disk(disk, cluster) {
                    Some(refcount) => refcount,
                    None => continue,
                };
                if (refcount == 1) != entry.copied() {
                    self.corruption(
                        user.active,
                        place.host(self.geometry.entry_len()),
                        Some(place.guest),
                        || {
                            format!(
                                "{} is {:#018x}: the copied flag must {}be set, the refcount is {refcount}",
                                place.name(),
                                entry.0,
                                if refcount == 1 { "" } else { "not " }
                            )
                        },
                    );
                }
            }
        }
        Ok(())
    }

    fn copied_l1(&mut self, disk: &Disk) -> Result<()> {
        let at = self.header.l1_table_offset;
        let len = u64::from(self.header.l1_size).saturating_mul(8);
        let mut piece = Vec::new();
        let mut done = 0;
        while done < len {
            self.job.check()?;
            let piece_at = at.saturating_add(done);
            let piece_len = len.saturating_sub(done).min(L1_PIECE);
            piece.resize(usize::try_from(piece_len).unwrap_or(0), 0);
            if self.is_hole(piece_at, piece_len) || !self.read("active l1 table", piece_at, &mut piece) {
                piece.fill(0);
            }
            for (index, entry) in piece.as_chunks::<8>().0.iter().enumerate() {
                let entry = L1Entry(u64::from_be_bytes(*entry));
                if entry.offset() == HostOffset::ZERO {
                    continue;
                }
                let Some(refcount) = self.refcount_on_disk(disk, entry.offset()) else {
                    continue;
                };
                if (refcount == 1) != entry.copied() {
                    let l1_index = (done / 8).saturating_add(index as u64);
                    let entry_at = piece_at.saturating_add((index as u64).saturating_mul(8));
                    self.corruption(1, entry_at, None, || {
                        format!(
                            "active l1 table: entry {l1_index} is {:#018x}: the copied flag must {}be set, \
                             the refcount is {refcount}",
                            entry.0,
                            if refcount == 1 { "" } else { "not " }
                        )
                    });
                }
            }
            done = done.saturating_add(piece_len);
        }
        Ok(())
    }
}

/// Where an L2 entry is.
#[derive(Clone, Copy)]
struct Place {
    table: HostOffset,
    index: usize,
    guest: GuestOffset,
}

impl Place {
    fn host(self, entry_len: usize) -> HostOffset {
        self.table
            .saturating_add((self.index as u64).saturating_mul(entry_len as u64))
    }

    fn name(self) -> String {
        format!("l2 table at {:#x}: entry {}", self.table, self.index)
    }
}

fn split_words(words: &[u8]) -> (L2Entry, Subclusters) {
    match (words.first_chunk::<16>(), words.first_chunk::<8>()) {
        (Some(words), _) => split_entry(words),
        (None, Some(word)) => (L2Entry(u64::from_be_bytes(*word)), Subclusters(0)),
        (None, None) => (L2Entry::UNALLOCATED, Subclusters(0)),
    }
}
