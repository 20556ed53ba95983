//! Everything that refers to clusters of the file.

use std::collections::HashMap;

use diskmill_core::{FindingKind, HostOffset, Result};

use super::super::bitmap;
use super::super::layout::{BITMAP_TABLE_RESERVED, L1_BYTES_MAX, OFFSET_MASK, SNAPSHOT_EXTRA_MAX};
use super::super::map::L1Entry;
use super::super::snapshot::{self, Snapshot, SnapshotError};
use super::ground::{Ground, reason};
use super::notes::Notes;
use super::refcounts::{self, Blocks};
use super::refs::{Counts, References};
use super::repair::view::View;
use super::tables::{self, Walked};

/// Bytes of an L1 table read at once.
pub(super) const L1_PIECE: u64 = 64 << 10;

/// How often an L2 table is referred to.
#[derive(Clone, Copy, Debug)]
pub(super) struct TableUse {
    /// The first L1 entry that refers to it; of the active table, if one does.
    pub(super) l1_index: u64,
    /// By entries of the active L1 table.
    pub(super) active: u64,
    /// By entries of any L1 table.
    pub(super) total: u64,
}

/// An L1 table that lies in the file.
#[derive(Clone, Copy, Debug)]
pub(super) struct L1Place {
    pub(super) at: HostOffset,
    pub(super) entries: u32,
    /// How many things refer to it.
    pub(super) weight: u64,
    pub(super) active: bool,
    /// Entries that cannot be, if there are some: the first of them.
    pub(super) first_fault: Option<u64>,
}

/// The snapshot table, as far as it could be understood.
#[derive(Debug, Default)]
pub(super) struct SnapshotsFound {
    pub(super) entries: Vec<Snapshot>,
    /// Whether the table must be written anew.
    pub(super) faulty: bool,
    /// Problems that keep QEMU from reading it at all.
    pub(super) unreadable: u64,
    /// Where it is, and how many bytes, if it lies in the file.
    pub(super) place: Option<(HostOffset, u64)>,
}

/// What was found beside the references.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// L2 tables by their place, as L1 entries have it: perhaps not on a cluster.
    pub(super) tables: HashMap<u64, TableUse>,
    /// L1 tables; the active one first, if it lies in the file.
    pub(super) l1s: Vec<L1Place>,
    /// L2 tables with entries that cannot be, sorted.
    pub(super) faulty: Vec<u64>,
    pub(super) snapshots: SnapshotsFound,
    /// Whether the dirty bitmaps cannot be used.
    pub(super) bitmaps_faulty: bool,
    /// Parts that bitmaps refer to.
    pub(super) bitmap_parts: Vec<(HostOffset, u64)>,
    pub(super) blocks: Blocks,
    /// Whether all entries of the active state are flagged as referred to once.
    pub(super) all_copied: bool,
}

/// A walk through everything that refers to clusters.
pub(super) struct Survey {
    references: References,
    found: Found,
    /// Bytes of L1 tables that may still be read.
    l1_budget: u64,
}

impl Survey {
    /// Walks through all of it.
    pub(super) fn take(ground: &Ground<'_>, view: &View<'_>, notes: &mut Notes) -> Result<Self> {
        let mut survey = Self {
            references: References::default(),
            found: Found {
                all_copied: true,
                ..Found::default()
            },
            l1_budget: ground.limits.metadata_bytes,
        };
        let header = ground.header;
        survey.refer(ground, notes, "the header", HostOffset::ZERO, ground.cluster_size);
        survey.l1_table(
            ground,
            view,
            notes,
            header.l1_table_offset,
            header.l1_size,
            1,
            true,
        );
        survey.snapshots(ground, view, notes)?;
        let tables = survey.found.table_list();
        let walked = tables::walk(ground, view, &survey.references, &tables)?;
        let mut workers = Vec::new();
        for Walked {
            notes,
            faulty,
            uncopied,
        } in walked
        {
            workers.push(notes);
            survey.found.faulty.extend(faulty);
            survey.found.all_copied &= !uncopied;
        }
        survey.found.faulty.sort_unstable();
        notes.absorb(workers);
        if let Some(place) = header.encryption() {
            survey.refer(ground, notes, "the encryption header", place.offset, place.length);
        }
        survey.bitmaps(ground, notes)?;
        survey.found.blocks = refcounts::refer(ground, &survey.references, notes);
        Ok(survey)
    }

    /// The references, and what else was found.
    pub(super) fn finish(self) -> (Counts, Found) {
        (self.references.finish(), self.found)
    }

    fn refer(&self, ground: &Ground<'_>, notes: &mut Notes, what: &str, at: HostOffset, len: u64) -> bool {
        ground.refer(&self.references, notes, what, at, len, 1, None)
    }

    /// Counts the references of an L1 table that `weight` things refer to.
    #[expect(
        clippy::too_many_arguments,
        reason = "a table, where it is, and who refers to it"
    )]
    fn l1_table(
        &mut self,
        ground: &Ground<'_>,
        view: &View<'_>,
        notes: &mut Notes,
        at: HostOffset,
        entries: u32,
        weight: u64,
        active: bool,
    ) {
        let what = if active {
            "active l1 table"
        } else {
            "l1 table of a snapshot"
        };
        let len = u64::from(entries).saturating_mul(8);
        if !ground.refer(&self.references, notes, what, at, len, weight, None) {
            return;
        }
        if len > self.l1_budget {
            notes.find(FindingKind::Error, 1, Some(at), None, || {
                "the l1 tables of all snapshots together are too large to be read".to_owned()
            });
            return;
        }
        self.l1_budget = self.l1_budget.saturating_sub(len);
        let mut first_fault = None;
        let whole = each_l1_entry(ground, view, notes, at, entries, |notes, index, entry| {
            let before = notes.counters.corruptions;
            self.l1_entry(ground, notes, what, (at, index), entry, weight, active);
            if notes.counters.corruptions > before {
                first_fault = first_fault.or(Some(index));
            }
        });
        if whole {
            self.found.l1s.push(L1Place {
                at,
                entries,
                weight,
                active,
                first_fault,
            });
        }
    }

    #[expect(
        clippy::too_many_arguments,
        reason = "an entry, where it is, and who refers to its table"
    )]
    fn l1_entry(
        &mut self,
        ground: &Ground<'_>,
        notes: &mut Notes,
        what: &str,
        (l1, index): (HostOffset, u64),
        entry: L1Entry,
        weight: u64,
        active: bool,
    ) {
        let entry_at = l1.saturating_add(index.saturating_mul(8));
        if entry.reserved() != 0 {
            notes.corruption(weight, entry_at, None, || {
                format!(
                    "{what}: entry {index} is {:#018x}, reserved bits are set",
                    entry.0
                )
            });
        }
        let table = entry.offset();
        if table == HostOffset::ZERO && entry.copied() {
            // Nothing reads it, but QEMU's check takes the header for the table.
            notes.corruption(weight, entry_at, None, || {
                format!(
                    "{what}: entry {index} is {:#018x}, the copied flag is set and there is no l2 table",
                    entry.0
                )
            });
        }
        if table == HostOffset::ZERO
            || !ground.refer(
                &self.references,
                notes,
                "l2 table",
                table,
                ground.cluster_size,
                weight,
                None,
            )
        {
            return;
        }
        if !table.is_aligned(ground.cluster_size) {
            notes.corruption(weight, entry_at, None, || {
                format!("{what}: entry {index} refers to an l2 table at {table:#x}, must start on a cluster")
            });
        }
        if active && !entry.copied() {
            self.found.all_copied = false;
        }
        self.found.note_table(table, index, weight, active);
    }

    fn snapshots(&mut self, ground: &Ground<'_>, view: &View<'_>, notes: &mut Notes) -> Result<()> {
        if let Some(snapshots) = &view.snapshots {
            self.found.snapshots.entries.clone_from(snapshots);
        } else {
            self.snapshot_table(ground, notes);
        }
        // Snapshots that share one L1 table count it several times and read it once.
        let mut places: HashMap<(HostOffset, u32), u64> = HashMap::new();
        for snapshot in &self.found.snapshots.entries {
            let at = snapshot.l1_table_offset;
            match l1_trouble(ground, snapshot) {
                Some(trouble) => {
                    self.found.snapshots.faulty = true;
                    notes.corruption(1, at, None, || trouble);
                }
                None => {
                    let weight = places.entry((at, snapshot.l1_size)).or_default();
                    *weight = weight.saturating_add(1);
                }
            }
        }
        let mut places: Vec<_> = places.into_iter().collect();
        places.sort_unstable();
        for ((at, entries), weight) in places {
            ground.job.check()?;
            let before = self.found.l1s.len();
            self.l1_table(ground, view, notes, at, entries, weight, false);
            self.found.snapshots.faulty |= self.found.l1s.len() == before && entries > 0;
        }
        Ok(())
    }

    /// Reads the snapshot table.
    fn snapshot_table(&mut self, ground: &Ground<'_>, notes: &mut Notes) {
        let header = ground.header;
        if header.nb_snapshots == 0 {
            return;
        }
        let table_at = header.snapshots_offset;
        if header.has_data_file() {
            let count = header.nb_snapshots;
            self.found.snapshots.faulty = true;
            notes.corruption(1, table_at, None, || {
                format!("there are {count} snapshots, must be none with an external data file")
            });
        }
        let mut problems = Vec::new();
        let read = snapshot::read_table_with(ground.main, header, &ground.limits, &mut |problem| {
            problems.push(problem);
            Ok(())
        });
        self.found.snapshots.faulty |= !problems.is_empty();
        for problem in problems {
            let kind = match problem {
                SnapshotError::Extra { len, .. } if len <= SNAPSHOT_EXTRA_MAX => FindingKind::Corruption,
                SnapshotError::Extra { .. } | SnapshotError::TooMany { .. } | SnapshotError::TooLong(_) => {
                    self.found.snapshots.unreadable = self.found.snapshots.unreadable.saturating_add(1);
                    FindingKind::Error
                }
                _ => FindingKind::Corruption,
            };
            notes.find(kind, 1, Some(table_at), None, || problem.to_string());
        }
        let (snapshots, end) = match read {
            Ok(read) => read,
            Err(error) => {
                self.found.snapshots.faulty = true;
                notes.corruption(1, table_at, None, || {
                    format!("the snapshot table cannot be read: {}", reason(&error))
                });
                return;
            }
        };
        let len = end.since(table_at);
        if self.refer(ground, notes, "the snapshot table", table_at, len) {
            self.found.snapshots.place = Some((table_at, len));
        } else {
            self.found.snapshots.faulty = true;
        }
        self.found.snapshots.entries = snapshots;
    }

    fn bitmaps(&mut self, ground: &Ground<'_>, notes: &mut Notes) -> Result<()> {
        let Some(place) = ground.header.bitmaps() else {
            return Ok(());
        };
        let before = notes.counters.corruptions;
        let at = place.directory_offset;
        if self.refer(ground, notes, "the bitmap directory", at, place.directory_size) {
            self.found.bitmap_parts.push((at, place.directory_size));
        }
        match bitmap::read_directory(ground.main, ground.header, &ground.limits) {
            Ok(bitmaps) => {
                for bitmap in bitmaps {
                    ground.job.check()?;
                    self.bitmap(ground, notes, &bitmap);
                }
            }
            Err(error) => notes.corruption(1, at, None, || {
                format!("the bitmap directory cannot be read: {}", reason(&error))
            }),
        }
        self.found.bitmaps_faulty = notes.counters.corruptions > before;
        Ok(())
    }

    fn bitmap(&mut self, ground: &Ground<'_>, notes: &mut Notes, bitmap: &bitmap::Bitmap) {
        let at = bitmap.table_offset;
        let len = u64::from(bitmap.table_entries).saturating_mul(8);
        if !self.refer(ground, notes, "a bitmap table", at, len) {
            return;
        }
        self.found.bitmap_parts.push((at, len));
        // At most 8 MiB: the directory has been checked.
        let mut table = vec![0; usize::try_from(len).unwrap_or(0)];
        if !ground.read(notes, "a bitmap table", at, &mut table) {
            return;
        }
        for entry in table.as_chunks::<8>().0 {
            let entry = u64::from_be_bytes(*entry);
            let offset = HostOffset::new(entry & OFFSET_MASK);
            let reserved = match offset {
                // Without a cluster the lowest bit says whether all bits are set.
                HostOffset::ZERO => entry & BITMAP_TABLE_RESERVED & !1,
                _ => entry & BITMAP_TABLE_RESERVED,
            };
            if reserved != 0 || !offset.is_aligned(ground.cluster_size) {
                notes.corruption(1, at, None, || {
                    format!("bitmap {:?} has the table entry {entry:#018x}", bitmap.name)
                });
            } else if offset != HostOffset::ZERO {
                self.refer(ground, notes, "bitmap data", offset, ground.cluster_size);
            }
        }
    }
}

impl Found {
    /// Notes that an L1 entry refers to the L2 table at `table`.
    pub(super) fn note_table(&mut self, table: HostOffset, l1_index: u64, weight: u64, active: bool) {
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

    /// The L2 tables, in guest order.
    pub(super) fn table_list(&self) -> Vec<(HostOffset, TableUse)> {
        let mut tables: Vec<_> = self
            .tables
            .iter()
            .map(|(at, user)| (HostOffset::new(*at), *user))
            .collect();
        tables.sort_unstable_by_key(|(at, user)| (user.l1_index, *at));
        tables
    }
}

/// Why the L1 table of a snapshot cannot be where its entry says, if it cannot.
pub(super) fn l1_trouble(ground: &Ground<'_>, snapshot: &Snapshot) -> Option<String> {
    let at = snapshot.l1_table_offset;
    let id = &snapshot.facts.id;
    if !at.is_aligned(ground.cluster_size) {
        return Some(format!(
            "l1 table of snapshot {id:?} is at {at:#x}, must start on a cluster"
        ));
    }
    (u64::from(snapshot.l1_size).saturating_mul(8) > L1_BYTES_MAX).then(|| {
        format!(
            "l1 table of snapshot {id:?} has {} entries, must have at most {}",
            snapshot.l1_size,
            L1_BYTES_MAX / 8
        )
    })
}

/// Calls `each` for every entry of an L1 table that is not 0, with its index. `false` if the table cannot be read.
pub(super) fn each_l1_entry(
    ground: &Ground<'_>,
    view: &View<'_>,
    notes: &mut Notes,
    at: HostOffset,
    entries: u32,
    mut each: impl FnMut(&mut Notes, u64, L1Entry),
) -> bool {
    let len = u64::from(entries).saturating_mul(8);
    let mut piece = Vec::new();
    let mut done = 0;
    while done < len {
        let piece_at = at.saturating_add(done);
        let piece_len = len.saturating_sub(done).min(L1_PIECE);
        if !ground.is_hole(piece_at, piece_len) {
            piece.resize(usize::try_from(piece_len).unwrap_or(0), 0);
            if !ground.read(notes, "an l1 table", piece_at, &mut piece) {
                return false;
            }
            for (index, entry) in piece.as_chunks::<8>().0.iter().enumerate() {
                let entry = view.l1(L1Entry(u64::from_be_bytes(*entry)));
                if entry.0 != 0 {
                    each(notes, (done / 8).saturating_add(index as u64), entry);
                }
            }
        }
        done = done.saturating_add(piece_len);
    }
    true
}
