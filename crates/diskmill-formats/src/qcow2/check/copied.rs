//! The COPIED flags of the active state, against refcounts.

use diskmill_core::{HostOffset, Result};

use super::crew;
use super::ground::Ground;
use super::notes::Notes;
use super::refcounts::{Disk, Sectors};
use super::refs::Counts;
use super::repair::view::View;
use super::survey::{Found, each_l1_entry};
use super::tables::{entries, with_table};

/// The refcounts that flags are held against.
#[derive(Clone, Copy)]
pub(super) enum Truth<'a> {
    /// Those of clusters in the file are what was counted.
    Counted(&'a Counts, &'a Disk),
    /// They are what the refcount blocks say.
    Disk(&'a Disk),
    /// They will be what was counted, as far as they can hold it, once the repair is done.
    Wanted(&'a Counts, u64),
    /// They will be the lower one of what the blocks say and what was counted.
    Lowered(&'a Disk, &'a Counts),
}

impl Truth<'_> {
    /// The refcount of the cluster at `at`, or `None` if it cannot be told.
    pub(super) fn refcount(self, ground: &Ground<'_>, sectors: &mut Sectors, at: HostOffset) -> Option<u64> {
        let cluster = ground.cluster(at);
        match self {
            Self::Counted(counts, _) if cluster < ground.clusters => Some(counts.get(cluster)),
            Self::Counted(_, disk) | Self::Disk(disk) => disk.refcount(ground, sectors, cluster),
            Self::Wanted(counts, max) => Some(counts.get(cluster)).filter(|count| *count <= max),
            Self::Lowered(disk, counts) => disk
                .refcount(ground, sectors, cluster)
                .map(|count| count.min(counts.get(cluster))),
        }
    }
}

/// What one worker saw.
#[derive(Default)]
struct Compared {
    notes: Notes,
    sectors: Sectors,
    wrong: Vec<HostOffset>,
}

/// Tables of the active state with wrong flags.
#[derive(Debug, Default)]
pub(super) struct WrongFlags {
    pub(super) l1: bool,
    pub(super) l2: Vec<HostOffset>,
}

/// Compares all flags of the active state.
pub(super) fn compare(
    ground: &Ground<'_>,
    view: &View<'_>,
    found: &Found,
    truth: Truth<'_>,
    notes: &mut Notes,
) -> Result<WrongFlags> {
    // What is put right once is right for all that refer to it.
    let once = matches!(truth, Truth::Wanted(..));
    let mut wrong = WrongFlags::default();
    let mut sectors = Sectors::default();
    for l1 in found.l1s.iter().filter(|l1| l1.active) {
        each_l1_entry(ground, view, notes, l1.at, l1.entries, |notes, index, entry| {
            if entry.offset() == HostOffset::ZERO {
                return;
            }
            let Some(refcount) = truth.refcount(ground, &mut sectors, entry.offset()) else {
                return;
            };
            if (refcount == 1) != entry.copied() {
                wrong.l1 = true;
                let entry_at = l1.at.saturating_add(index.saturating_mul(8));
                notes.corruption(1, entry_at, None, || {
                    wrong_flag(&format!("active l1 table: entry {index}"), entry.0, refcount)
                });
            }
        });
    }
    let tables: Vec<_> = found
        .table_list()
        .into_iter()
        .filter(|(_, user)| user.active > 0)
        .collect();
    let workers = crew::each(
        &tables,
        ground.job,
        |index, (at, user), compared: &mut Compared| {
            compared.notes.item = index as u64;
            let before = compared.notes.counters.corruptions;
            let sectors = &mut compared.sectors;
            let weight = if once { 1 } else { user.active };
            with_table(ground, view, &mut compared.notes, *at, |notes, bytes| {
                for (place, entry, _) in entries(ground, *at, user.l1_index, bytes) {
                    let cluster = entry.offset();
                    if entry.is_compressed() || (cluster == HostOffset::ZERO && !entry.copied()) {
                        continue;
                    }
                    let host = place.host(ground.geometry.entry_len());
                    if ground.geometry.data_file() {
                        if !entry.copied() {
                            notes.corruption(weight, host, Some(place.guest), || {
                                format!(
                                    "{} is {:#018x}: the copied flag must be set with an external data file",
                                    place.name(),
                                    entry.0
                                )
                            });
                        }
                        continue;
                    }
                    if cluster == HostOffset::ZERO {
                        continue;
                    }
                    let Some(refcount) = truth.refcount(ground, sectors, cluster) else {
                        continue;
                    };
                    if (refcount == 1) != entry.copied() {
                        notes.corruption(weight, host, Some(place.guest), || {
                            wrong_flag(&place.name(), entry.0, refcount)
                        });
                    }
                }
            });
            if compared.notes.counters.corruptions > before {
                compared.wrong.push(*at);
            }
            Ok(())
        },
    )?;
    let mut all = Vec::new();
    for worker in workers {
        wrong.l2.extend(worker.wrong);
        all.push(worker.notes);
    }
    notes.absorb(all);
    Ok(wrong)
}

fn wrong_flag(name: &str, entry: u64, refcount: u64) -> String {
    let not = if refcount == 1 { "" } else { "not " };
    format!("{name} is {entry:#018x}: the copied flag must {not}be set, the refcount is {refcount}")
}
