//! Carrying out a plan.

use std::sync::Arc;

use diskmill_core::{HostOffset, Result, SECTOR, StorageMut};

use super::super::super::layout::COPIED;
use super::super::super::map::L1Entry;
use super::super::super::refcount::{get_count, set_count};
use super::super::ground::Ground;
use super::super::refcounts::{Block, block_bits};
use super::super::survey::{L1_PIECE, L1Place};
use super::super::tables::split_words;
use super::plan::{NewRefcounts, Plan, Refcounts};
use super::view::View;

/// Where the header keeps the refcount table's offset (8 bytes) and, behind it, its clusters (4 bytes).
const HEADER_REFCOUNTS_AT: usize = 48;

/// Counts that are looked at together: whole bytes, whatever their width.
const GROUP: u64 = 64;

/// Which way counts may go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Up,
    Down,
}

impl Plan {
    /// Writes all of it, and returns whether there was anything to write.
    ///
    /// Counts rise before anything is written that relies on them, and fall after what they were for is durably gone.
    pub(super) fn apply(
        &self,
        ground: &Ground<'_>,
        view: &View<'_>,
        main: &Arc<dyn StorageMut>,
    ) -> Result<bool> {
        let mut steps = Steps {
            plan: self,
            ground,
            view,
            main,
            written: false,
            changed: false,
        };
        steps.run()?;
        Ok(steps.changed)
    }
}

/// A plan being carried out.
struct Steps<'a> {
    plan: &'a Plan,
    ground: &'a Ground<'a>,
    view: &'a View<'a>,
    main: &'a Arc<dyn StorageMut>,
    /// Whether something was written since the last sync.
    written: bool,
    changed: bool,
}

impl Steps<'_> {
    fn run(&mut self) -> Result<()> {
        match &self.plan.refcounts {
            Refcounts::Rebuild(new) => self.rebuild(new)?,
            Refcounts::Adjust {
                blocks, raise: true, ..
            } => self.adjust(blocks, Way::Up)?,
            Refcounts::Adjust { .. } => {}
        }
        self.sync()?;
        for (first, bytes) in &self.plan.structures {
            self.write(HostOffset::new(first << self.ground.bits()), bytes)?;
        }
        self.sync()?;
        if !self.plan.header.is_empty() {
            self.header(&self.plan.header)?;
            self.sync()?;
        }
        for l1 in &self.plan.l1s {
            self.l1(l1)?;
        }
        for (at, active) in &self.plan.tables {
            self.l2(*at, *active)?;
        }
        self.sync()?;
        if let Refcounts::Adjust {
            blocks, lower: true, ..
        } = &self.plan.refcounts
        {
            self.adjust(blocks, Way::Down)?;
            self.sync()?;
        }
        Ok(())
    }

    fn write(&mut self, at: HostOffset, bytes: &[u8]) -> Result<()> {
        self.ground.job.check()?;
        (self.written, self.changed) = (true, true);
        self.main.write_at(at, bytes)
    }

    fn sync(&mut self) -> Result<()> {
        if self.written {
            self.main.sync()?;
            self.written = false;
        }
        Ok(())
    }

    fn header(&mut self, patches: &[(usize, Vec<u8>)]) -> Result<()> {
        (self.written, self.changed) = (true, true);
        patch_header(self.main, patches)
    }

    /// The count a cluster is to have, as far as it can be stored.
    fn target(&self, cluster: u64) -> u64 {
        self.plan
            .target
            .get(cluster)
            .min(self.ground.header.refcount_order.max())
    }

    /// Writes new blocks, then the new table, then the header. Nothing of the old ones is touched.
    fn rebuild(&mut self, new: &NewRefcounts) -> Result<()> {
        let order = self.ground.header.refcount_order.get();
        let bits = block_bits(self.ground);
        let cluster_len = self.ground.header.cluster_bits.cluster_len();
        let (table_at, table_clusters) = new.table;
        let mut block = vec![0; cluster_len];
        let mut table = vec![0; cluster_len.saturating_mul(usize::try_from(table_clusters).unwrap_or(0))];
        for (index, place) in &new.blocks {
            block.fill(0);
            let first = index << bits;
            for cluster in self.plan.target.used(first..first.saturating_add(1 << bits)) {
                let count = self.target(cluster);
                set_count(&mut block, order, cluster.saturating_sub(first), count);
            }
            let at = HostOffset::new(place << self.ground.bits());
            self.write(at, &block)?;
            let entry = usize::try_from(*index).ok().and_then(|index| {
                let start = index.checked_mul(8)?;
                table.get_mut(start..start.checked_add(8)?)
            });
            if let Some(entry) = entry {
                entry.copy_from_slice(&at.get().to_be_bytes());
            }
        }
        self.sync()?;
        let table_at = HostOffset::new(table_at << self.ground.bits());
        self.write(table_at, &table)?;
        self.sync()?;
        let clusters = u32::try_from(table_clusters).unwrap_or(u32::MAX).to_be_bytes();
        let pointer = [table_at.get().to_be_bytes().as_slice(), &clusters].concat();
        self.header(&[(HEADER_REFCOUNTS_AT, pointer)])
    }

    /// Changes counts where they are, one way only.
    fn adjust(&mut self, blocks: &[Block], way: Way) -> Result<()> {
        let order = self.ground.header.refcount_order.get();
        let bits = block_bits(self.ground);
        let mut bytes = vec![0; self.ground.header.cluster_bits.cluster_len()];
        for (index, block) in blocks.iter().enumerate() {
            let Block::At(at) = block else {
                continue;
            };
            let first = (index as u64) << bits;
            if first >= self.end() {
                break;
            }
            let end = self.end().min(first.saturating_add(1 << bits));
            let len = bytes.len() as u64;
            let idle = match way {
                Way::Up => self.plan.target.used(first..end).next().is_none(),
                Way::Down => self.ground.is_hole(*at, len),
            };
            if idle {
                continue;
            }
            self.main.read_padded(*at, &mut bytes)?;
            let mut touched: Option<std::ops::Range<usize>> = None;
            let mut group = first;
            while group < end {
                let stop = end.min(group.saturating_add(GROUP));
                if !self.is_settled(&bytes, group.saturating_sub(first), group, way) {
                    for cluster in group..stop {
                        let within = cluster.saturating_sub(first);
                        let (now, wanted) = (get_count(&bytes, order, within), self.target(cluster));
                        let moves = match way {
                            Way::Up => now < wanted,
                            Way::Down => now > wanted,
                        };
                        if moves {
                            let range = set_count(&mut bytes, order, within, wanted);
                            touched = Some(match touched {
                                None => range,
                                Some(known) => known.start..range.end,
                            });
                        }
                    }
                }
                group = stop;
            }
            if let Some(range) = touched {
                // Whole sectors, which the host does not tear.
                let start = range.start & !511;
                let part = bytes
                    .get(start..range.end.next_multiple_of(512))
                    .unwrap_or_default();
                let part = part.to_vec();
                self.write(at.saturating_add(start as u64), &part)?;
            }
        }
        Ok(())
    }

    /// Whether none of the counts of the group of clusters from `cluster` on, which is count `within` of its block, has
    /// to go that way: seen at a glance.
    fn is_settled(&self, block: &[u8], within: u64, cluster: u64, way: Way) -> bool {
        let order = self.ground.header.refcount_order.get();
        let from = usize::try_from((within << order) / 8).unwrap_or(usize::MAX);
        let len = usize::try_from((GROUP << order) / 8).unwrap_or(usize::MAX);
        let group = block.get(from..).map(|rest| rest.get(..len).unwrap_or(rest));
        match way {
            Way::Up => self.plan.target.bits(cluster) == Some(0),
            Way::Down => group.is_some_and(|group| group.iter().fold(0, |all, byte| all | byte) == 0),
        }
    }

    /// Behind the last cluster there is, or will be.
    fn end(&self) -> u64 {
        let planned = self.plan.target.last().map_or(0, |last| last.saturating_add(1));
        self.ground.clusters.max(planned)
    }

    fn l1(&mut self, l1: &L1Place) -> Result<()> {
        let len = u64::from(l1.entries).saturating_mul(8);
        let mut done = 0;
        while done < len {
            let at = l1.at.saturating_add(done);
            let piece_len = len.saturating_sub(done).min(L1_PIECE);
            done = done.saturating_add(piece_len);
            let mut piece = vec![0; usize::try_from(piece_len).unwrap_or(0)];
            self.main.read_padded(at, &mut piece)?;
            let before = piece.clone();
            for word in piece.as_chunks_mut::<8>().0 {
                let entry = self.view.l1(L1Entry(u64::from_be_bytes(*word)));
                let entry = match entry.offset() {
                    HostOffset::ZERO => entry,
                    table if l1.active => match self.refcount(table) {
                        Some(count) => L1Entry::new(table, count == 1),
                        None => entry,
                    },
                    _ => entry,
                };
                *word = entry.0.to_be_bytes();
            }
            self.write_changed(at, &before, &piece)?;
        }
        Ok(())
    }

    fn l2(&mut self, at: HostOffset, active: bool) -> Result<()> {
        let mut table = vec![0; self.ground.header.cluster_bits.cluster_len()];
        self.main.read_padded(at, &mut table)?;
        let before = table.clone();
        self.view.table(self.ground, at, &mut table);
        if active {
            for words in table.chunks_exact_mut(self.ground.geometry.entry_len()) {
                let (entry, _) = split_words(words);
                let place = entry.offset();
                if entry.is_compressed() || (place == HostOffset::ZERO && !entry.copied()) {
                    continue;
                }
                let copied = if self.ground.geometry.data_file() {
                    Some(true)
                } else if place == HostOffset::ZERO {
                    None
                } else {
                    self.refcount(place).map(|count| count == 1)
                };
                let word = match copied {
                    Some(true) => entry.0 | COPIED,
                    Some(false) => entry.0 & !COPIED,
                    None => continue,
                };
                if let Some(first) = words.first_chunk_mut::<8>() {
                    *first = word.to_be_bytes();
                }
            }
        }
        self.write_changed(at, &before, &table)
    }

    /// The count the cluster at `at` will have, unless there are more references than a count can hold.
    fn refcount(&self, at: HostOffset) -> Option<u64> {
        let count = self.plan.target.get(self.ground.cluster(at));
        (count <= self.ground.header.refcount_order.max()).then_some(count)
    }

    /// Writes the sectors that changed.
    fn write_changed(&mut self, at: HostOffset, before: &[u8], after: &[u8]) -> Result<()> {
        let step = usize::try_from(SECTOR).unwrap_or(512);
        let sectors = before.chunks(step).zip(after.chunks(step)).enumerate();
        for (index, (_, sector)) in sectors.filter(|(_, (before, after))| before != after) {
            self.write(at.saturating_add((index as u64).saturating_mul(SECTOR)), sector)?;
        }
        Ok(())
    }
}

/// Changes header fields: one write of the first sector, which the host does not tear.
pub(super) fn patch_header(main: &Arc<dyn StorageMut>, patches: &[(usize, Vec<u8>)]) -> Result<()> {
    let mut sector = [0; 512];
    main.read_padded(HostOffset::ZERO, &mut sector)?;
    for (at, bytes) in patches {
        if let Some(field) = sector.get_mut(*at..at.saturating_add(bytes.len())) {
            field.copy_from_slice(bytes);
        }
    }
    main.write_at(HostOffset::ZERO, &sector)
}
