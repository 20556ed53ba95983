//! What a repair will write, and where.

use std::collections::{BTreeMap, HashMap};

use diskmill_core::{HostOffset, Result};

use super::super::super::header::{Autoclear, Header};
use super::super::super::layout::{L1_BYTES_MAX, REFCOUNT_TABLE_BYTES_MAX};
use super::super::super::snapshot::Snapshot;
use super::super::copied::WrongFlags;
use super::super::ground::Ground;
use super::super::refcounts::{Block, Disk, block_bits};
use super::super::refs::{Counts, PAGE};
use super::super::survey::{Found, L1Place, l1_trouble};
use super::RepairError;
use super::space::Space;
use super::view::View;

/// Where the header keeps the active L1 table's entries (4 bytes) and, behind that, its offset (8 bytes).
const HEADER_L1_AT: usize = 36;
/// Where the header keeps the number of snapshots (4 bytes) and, behind it, the offset of their table (8 bytes).
const HEADER_SNAPSHOTS_AT: usize = 60;
/// Where the header keeps its autoclear features.
const HEADER_AUTOCLEAR_AT: usize = 88;

/// What header and snapshot table should say.
pub(super) struct Wish {
    /// The header; without an active L1 table if that must be made anew.
    pub(super) header: Header,
    /// The snapshots, if their table must be written anew.
    pub(super) snapshots: Option<Vec<Snapshot>>,
    /// Whether anything is to change.
    pub(super) changes: bool,
    /// Entries of the L1 table to be made, if one must be.
    new_l1: Option<u64>,
    patches: Vec<(usize, Vec<u8>)>,
}

impl Wish {
    pub(super) fn new(ground: &Ground<'_>, found: &Found, counts: &Counts) -> Self {
        let mut wish = Self {
            header: ground.header.clone(),
            snapshots: None,
            changes: false,
            new_l1: None,
            patches: Vec::new(),
        };
        wish.active_l1(ground, found, counts);
        if found.bitmaps_faulty {
            // What they say is lost, and a backup that relied on it becomes a full one; nothing else is.
            wish.header.autoclear = wish.header.autoclear.with(Autoclear::BITMAPS, false);
            let bits = wish.header.autoclear.bits().to_be_bytes();
            wish.patches.push((HEADER_AUTOCLEAR_AT, bits.to_vec()));
        }
        wish.snapshots(ground, found, counts);
        wish.changes = !wish.patches.is_empty() || wish.new_l1.is_some() || wish.snapshots.is_some();
        wish
    }

    fn active_l1(&mut self, ground: &Ground<'_>, found: &Found, counts: &Counts) {
        let needed = ground.geometry.l1_entries(ground.header.virtual_size());
        let runs_on = |l1: &L1Place| {
            let [inside, all] = [needed, l1.entries.into()]
                .map(|entries| ground.clusters_of(l1.at, entries.saturating_mul(8)));
            (inside.end.max(all.start)..all.end).any(|cluster| counts.get(cluster) > l1.weight)
        };
        let wanted = match found.l1s.iter().find(|l1| l1.active) {
            None if ground.header.l1_size > 0 => {
                self.new_l1 = Some(needed);
                0
            }
            // Behind what the disk needs there is nothing but the machine state of a snapshot being made, or, where the
            // table runs on into other structures, what they say.
            Some(l1) if l1.first_fault.is_some_and(|first| first >= needed) || runs_on(l1) => needed,
            _ => return,
        };
        self.header.l1_size = u32::try_from(wanted).unwrap_or(0);
        if self.new_l1.is_none() {
            let entries = self.header.l1_size.to_be_bytes();
            self.patches.push((HEADER_L1_AT, entries.to_vec()));
        }
    }

    fn snapshots(&mut self, ground: &Ground<'_>, found: &Found, counts: &Counts) {
        let shared = |l1: &L1Place| {
            let bytes = u64::from(l1.entries).saturating_mul(8);
            ground
                .clusters_of(l1.at, bytes)
                .any(|cluster| counts.get(cluster) > l1.weight)
        };
        let places: HashMap<(HostOffset, u32), &L1Place> = found
            .l1s
            .iter()
            .filter(|l1| !l1.active)
            .map(|l1| ((l1.at, l1.entries), l1))
            .collect();
        let lost = |snapshot: &Snapshot| {
            match places.get(&(snapshot.l1_table_offset, snapshot.l1_size)) {
                // It is not in the file.
                None => snapshot.l1_size > 0,
                // What is wrong in it is somebody else's data.
                Some(l1) => l1.first_fault.is_some() && shared(l1),
            }
        };
        let listed = &found.snapshots.entries;
        if !found.snapshots.faulty && !listed.iter().any(lost) {
            return;
        }
        let mut kept = Vec::new();
        if !ground.header.has_data_file() {
            for snapshot in listed {
                let mended = if l1_trouble(ground, snapshot).is_some() {
                    relocated(ground, counts, snapshot)
                } else if lost(snapshot) {
                    None
                } else {
                    Some(snapshot.clone())
                };
                kept.extend(mended.map(|mut snapshot| {
                    snapshot.complete_extra();
                    snapshot
                }));
            }
        }
        if kept.is_empty() {
            self.patches.push((HEADER_SNAPSHOTS_AT, vec![0; 12]));
        }
        self.snapshots = Some(kept);
    }
}

/// A snapshot whose L1 table is elsewhere, or smaller, than its entry says, if it can be told where and how large.
fn relocated(ground: &Ground<'_>, counts: &Counts, snapshot: &Snapshot) -> Option<Snapshot> {
    let mut snapshot = snapshot.clone();
    let bytes = |snapshot: &Snapshot| u64::from(snapshot.l1_size).saturating_mul(8);
    if bytes(&snapshot) > L1_BYTES_MAX {
        let size = snapshot.checked_size().ok()?;
        snapshot.l1_size = u32::try_from(ground.geometry.l1_entries(size)).ok()?;
    }
    let at = snapshot.l1_table_offset.align_down(ground.cluster_size);
    snapshot.l1_table_offset = at;
    let free = |cluster| counts.get(cluster) == 0;
    let fits = at != HostOffset::ZERO
        && bytes(&snapshot) <= L1_BYTES_MAX
        && ground.holds(at, bytes(&snapshot))
        && ground.clusters_of(at, bytes(&snapshot)).all(free);
    fits.then_some(snapshot)
}

/// Clusters that hold the header or the active L1 table for certain: no L2 table can be there.
pub(super) fn fixed_structures(ground: &Ground<'_>) -> Counts {
    let mut fixed = Counts::default();
    fixed.add(0..1, 1);
    let entries = ground.geometry.l1_entries(ground.header.virtual_size());
    let bytes = entries.min(ground.header.l1_size.into()).saturating_mul(8);
    let at = ground.header.l1_table_offset;
    if ground.holds(at, bytes) {
        fixed.add(ground.clusters_of(at, bytes), 1);
    }
    fixed
}

/// New refcount structures.
#[derive(Debug, Default)]
pub(super) struct NewRefcounts {
    /// Where each block goes, by its index: cluster numbers.
    pub(super) blocks: BTreeMap<u64, u64>,
    /// Where the table goes, and its clusters.
    pub(super) table: (u64, u64),
}

/// What becomes of the refcounts.
pub(super) enum Refcounts {
    /// They stay where they are; some rise, some fall.
    Adjust {
        blocks: Vec<Block>,
        raise: bool,
        lower: bool,
    },
    /// They are built anew.
    Rebuild(NewRefcounts),
}

/// What a repair will write.
pub(super) struct Plan {
    pub(super) refcounts: Refcounts,
    /// What the counts are to be.
    pub(super) target: Counts,
    /// New structures, by cluster.
    pub(super) structures: Vec<(u64, Vec<u8>)>,
    /// Changes of the header that name them or drop others.
    pub(super) header: Vec<(usize, Vec<u8>)>,
    /// L1 tables with entries to change.
    pub(super) l1s: Vec<L1Place>,
    /// L2 tables with entries to change: place, and whether it is of the active state.
    pub(super) tables: Vec<(HostOffset, bool)>,
}

impl Plan {
    /// The plan that lowers counts and does nothing else.
    pub(super) fn of_leaks(blocks: Vec<Block>, target: Counts) -> Self {
        Self {
            refcounts: Refcounts::Adjust {
                blocks,
                raise: false,
                lower: true,
            },
            target,
            structures: Vec::new(),
            header: Vec::new(),
            l1s: Vec::new(),
            tables: Vec::new(),
        }
    }

    /// The plan for header, structures and refcounts of the image that `found` says it should be. `counts` are all
    /// references there are: of the image as it is, with the right header, and as it is to become.
    pub(super) fn new(
        ground: &Ground<'_>,
        wish: &Wish,
        found: &Found,
        disk: &Disk,
        counts: [&Counts; 3],
    ) -> Result<Self> {
        let [.., target] = counts;
        let fixed_len = ground.main.hints().fixed_len;
        let end = fixed_len.then(|| ground.file_len >> ground.bits());
        let mut plan = Self {
            refcounts: Refcounts::Adjust {
                blocks: disk.blocks.clone(),
                raise: disk.low,
                lower: disk.high,
            },
            target: target.clone(),
            structures: Vec::new(),
            header: wish.patches.clone(),
            l1s: Vec::new(),
            tables: Vec::new(),
        };
        let mut space = Space::new(counts.to_vec(), end);
        plan.place_structures(ground, wish, &mut space)?;
        let bits = block_bits(ground);
        let counted = |cluster: u64| {
            let index = cluster
                .checked_shr(bits)
                .and_then(|index| usize::try_from(index).ok());
            matches!(index.and_then(|index| disk.blocks.get(index)), Some(Block::At(_)))
        };
        let uncounted = plan.structures.iter().any(|(first, bytes)| {
            let len = (bytes.len() as u64).div_ceil(ground.cluster_size);
            (*first..first.saturating_add(len)).any(|cluster| !counted(cluster))
        });
        if disk.broken || uncounted || table_overlaps(ground, found) {
            plan.refcounts = Refcounts::Rebuild(plan.rebuild(ground, found, &mut space)?);
        } else if !plan.structures.is_empty() {
            plan.refcounts = Refcounts::Adjust {
                blocks: disk.blocks.clone(),
                raise: true,
                lower: true,
            };
        }
        Ok(plan)
    }

    /// Finds places for a new L1 table and a new snapshot table.
    fn place_structures(&mut self, ground: &Ground<'_>, wish: &Wish, space: &mut Space<'_>) -> Result<()> {
        let mut place = |plan: &mut Self, mut bytes: Vec<u8>| -> Result<HostOffset> {
            let clusters = (bytes.len() as u64).div_ceil(ground.cluster_size);
            let taken = space.take(&mut plan.target, clusters)?;
            let whole = clusters.saturating_mul(ground.cluster_size);
            bytes.resize(usize::try_from(whole).unwrap_or(0), 0);
            plan.structures.push((taken.start, bytes));
            Ok(HostOffset::new(taken.start << ground.bits()))
        };
        let pointer = |count: u64, at: HostOffset| {
            let count = u32::try_from(count).unwrap_or(u32::MAX).to_be_bytes();
            [count.as_slice(), &at.get().to_be_bytes()].concat()
        };
        if let Some(entries) = wish.new_l1 {
            let at = if entries == 0 {
                HostOffset::ZERO
            } else {
                // At most 32 MiB: the header has been checked.
                place(
                    self,
                    vec![0; usize::try_from(entries.saturating_mul(8)).unwrap_or(0)],
                )?
            };
            self.header.push((HEADER_L1_AT, pointer(entries, at)));
        }
        if let Some(snapshots) = wish.snapshots.as_ref().filter(|snapshots| !snapshots.is_empty()) {
            let bytes: Vec<u8> = snapshots.iter().flat_map(Snapshot::to_bytes).collect();
            let at = place(self, bytes)?;
            self.header
                .push((HEADER_SNAPSHOTS_AT, pointer(snapshots.len() as u64, at)));
        }
        Ok(())
    }

    /// Adds the tables that are written: those with entries that `view` changes, and those with `wrong` flags.
    pub(super) fn list_tables(&mut self, view: &View<'_>, found: &Found, wrong: WrongFlags) {
        let mends = view.mender.is_some();
        self.l1s = found
            .l1s
            .iter()
            .filter(|l1| mends || l1.active && wrong.l1)
            .copied()
            .collect();
        let mut tables: Vec<HostOffset> = wrong.l2;
        if let Some(mender) = &view.mender {
            tables.extend(mender.faulty().filter(|at| found.tables.contains_key(&at.get())));
        }
        tables.sort_unstable();
        tables.dedup();
        self.tables = tables
            .into_iter()
            .map(|at| {
                let active = found.tables.get(&at.get()).is_some_and(|user| user.active > 0);
                (at, active)
            })
            .collect();
    }

    /// Finds places for new refcount blocks and a new table: they count all that is referred to and themselves.
    fn rebuild(&mut self, ground: &Ground<'_>, found: &Found, space: &mut Space<'_>) -> Result<NewRefcounts> {
        let table_at = ground.header.refcount_table_offset;
        let table_len = u64::from(ground.header.refcount_table_clusters) << ground.bits();
        if found.blocks.held {
            for cluster in ground.clusters_of(table_at, table_len) {
                self.target.sub(cluster);
            }
        }
        for block in &found.blocks.list {
            if let Block::At(at) = block {
                self.target.sub(ground.cluster(*at));
            }
        }
        let mut new = NewRefcounts::default();
        self.place_blocks(ground, &mut new, space)?;
        loop {
            let entries = new
                .blocks
                .keys()
                .next_back()
                .map_or(1, |last| last.saturating_add(1));
            let bytes = entries.saturating_mul(8);
            if bytes > REFCOUNT_TABLE_BYTES_MAX {
                return Err(RepairError::TableTooLarge(bytes).into());
            }
            let clusters = bytes.div_ceil(ground.cluster_size);
            let taken = space.take(&mut self.target, clusters)?;
            self.place_blocks(ground, &mut new, space)?;
            let last = new.blocks.keys().next_back().copied().unwrap_or(0);
            if last.saturating_mul(8) < clusters.saturating_mul(ground.cluster_size) {
                new.table = (taken.start, clusters);
                return Ok(new);
            }
            for cluster in taken {
                self.target.sub(cluster);
            }
        }
    }

    /// Gives a place to every block that must count something and has none, until all are counted.
    fn place_blocks(
        &mut self,
        ground: &Ground<'_>,
        new: &mut NewRefcounts,
        space: &mut Space<'_>,
    ) -> Result<()> {
        let bits = block_bits(ground);
        loop {
            let missing = missing_blocks(&self.target, new, bits);
            if missing.is_empty() {
                return Ok(());
            }
            for index in missing {
                let taken = space.take(&mut self.target, 1)?;
                new.blocks.insert(index, taken.start);
            }
        }
    }
}

/// Indexes of blocks that must count something and have no place.
fn missing_blocks(target: &Counts, new: &NewRefcounts, bits: u32) -> Vec<u64> {
    let mut missing: Vec<u64> = Vec::new();
    let step = 1_u64 << bits;
    for page in target.pages(0..u64::MAX) {
        let start = page.saturating_mul(PAGE);
        let end = start.saturating_add(PAGE);
        let mut next = start;
        while next < end {
            let index = next >> bits;
            let stop = end.min(index.saturating_add(1).saturating_mul(step));
            let known = missing.last() == Some(&index) || new.blocks.contains_key(&index);
            if !known && target.used(next..stop).next().is_some() {
                missing.push(index);
            }
            next = stop;
        }
    }
    missing
}

/// Whether the refcount table is where another structure is that may be written.
fn table_overlaps(ground: &Ground<'_>, found: &Found) -> bool {
    let at = ground.header.refcount_table_offset;
    let len = u64::from(ground.header.refcount_table_clusters) << ground.bits();
    let table = ground.clusters_of(at, len);
    let touches = |at: HostOffset, len: u64| {
        let other = ground.clusters_of(at, len);
        other.start < table.end && table.start < other.end
    };
    touches(HostOffset::ZERO, 1)
        || found
            .l1s
            .iter()
            .any(|l1| touches(l1.at, u64::from(l1.entries).saturating_mul(8)))
        || table
            .clone()
            .any(|cluster| found.tables.contains_key(&(cluster << ground.bits())))
}
