//! Moving the tail of the file into what is free before it.

use std::collections::HashMap;
use std::ops::Range;

use diskmill_core::Result;

use super::super::map::ClusterKind;
use super::reclaim::moved;
use super::work::{Copied, Work};

/// Rounds after which it is good enough. Each moves something closer to the start, and few are ever needed.
const ROUNDS: u32 = 256;

/// Where the header keeps the offset of the snapshot table.
const HEADER_SNAPSHOTS_OFFSET_AT: u64 = 64;

/// What clusters that are referred to several times have become, if there was room for them.
type Shared = HashMap<u64, Option<u64>>;

/// What is moved, and where to.
#[derive(Clone, Debug)]
pub(super) struct Push {
    /// Clusters that are emptied.
    pub(super) from: Range<u64>,
    /// The cluster behind the last that things may be moved to.
    pub(super) below: u64,
}

impl Work<'_> {
    /// Moves what lies behind the space that all of it needs, until nothing can be moved.
    pub(super) fn slide(&mut self) -> Result<()> {
        for _ in 0..ROUNDS {
            self.tidy()?;
            let limit = self.refcounts.used(&mut self.fence)?;
            if self.refcounts.used_end(&mut self.fence)? <= limit {
                break;
            }
            let before = self.report.moved;
            self.round(limit)?;
            if self.report.moved == before && !self.make_room(limit)? {
                break;
            }
        }
        Ok(())
    }

    /// Writes everything back and takes refcount blocks and parts of their table away that count nothing.
    pub(super) fn tidy(&mut self) -> Result<()> {
        self.settle()?;
        self.refcounts.write_blocks(&mut self.fence)?;
        self.fence.barrier()?;
        self.refcounts.drop_empty_blocks(&mut self.fence)?;
        for cluster in self.refcounts.shorten_table(&mut self.fence)? {
            self.refcounts.sub(&mut self.fence, cluster, 1)?;
        }
        self.refcounts.write_blocks(&mut self.fence)?;
        self.fence.barrier()
    }

    /// Moves what lies at cluster `limit` or beyond to free places below: first what needs several clusters in a row,
    /// last what fits anywhere.
    fn round(&mut self, limit: u64) -> Result<()> {
        self.move_snapshot_table(limit)?;
        self.move_l1_tables(limit)?;
        self.move_bitmap_tables(limit)?;
        self.move_refcount_table(limit)?;
        self.move_streams(limit, |_, last| last >= limit)?;
        self.move_singles(&Push {
            from: limit..u64::MAX,
            below: limit,
        })
    }

    /// Moves what takes one cluster each.
    pub(super) fn move_singles(&mut self, push: &Push) -> Result<()> {
        self.move_data(push)?;
        self.move_bitmap_data(push)?;
        self.move_l2_tables(push)?;
        self.tidy()?;
        self.move_refcount_blocks(push)
    }

    /// Moves `len` bytes from cluster on at `at`, which exactly the fields `named_at` name.
    fn move_structure(&mut self, at: u64, len: u64, named_at: &[u64], limit: u64) -> Result<()> {
        let bits = self.bits();
        let (first, clusters) = (at >> bits, len.div_ceil(self.cluster()));
        let weight = named_at.len() as u64;
        if clusters == 0 || first.saturating_add(clusters) <= limit {
            return Ok(());
        }
        for cluster in first..first.saturating_add(clusters) {
            if self.count(cluster)? != weight {
                return Ok(());
            }
        }
        let Some(new) = self.take_run(clusters, weight, limit)? else {
            return Ok(());
        };
        self.copy(Copied::Tables, first, new, clusters)?;
        for field in named_at {
            self.switch(*field, new << bits);
        }
        for cluster in first..first.saturating_add(clusters) {
            self.drop_with_batch(cluster, weight);
        }
        self.commit_if_many()
    }

    fn move_snapshot_table(&mut self, limit: u64) -> Result<()> {
        let len = self.snapshot_table_len()?;
        let at = self.header.snapshots_offset.get();
        self.move_structure(at, len, &[HEADER_SNAPSHOTS_OFFSET_AT], limit)?;
        self.commit()?;
        self.reload()
    }

    fn move_l1_tables(&mut self, limit: u64) -> Result<()> {
        let mut tables = self.l1_tables()?;
        tables.sort_by_key(|table| std::cmp::Reverse(table.entries));
        for table in tables {
            self.move_structure(table.at, u64::from(table.entries) * 8, &table.named_at, limit)?;
        }
        self.commit()?;
        self.reload()
    }

    fn move_bitmap_tables(&mut self, limit: u64) -> Result<()> {
        if let Some((named_at, at, len)) = self.bitmap_directory()? {
            self.move_structure(at, len, &[named_at], limit)?;
            self.commit()?;
            self.reload()?;
        }
        for table in self.bitmap_tables()? {
            self.move_structure(table.at, u64::from(table.entries) * 8, &[table.named_at], limit)?;
        }
        self.commit()
    }

    fn move_refcount_table(&mut self, limit: u64) -> Result<()> {
        let (first, clusters) = self.refcounts.table_place();
        if first.saturating_add(clusters) <= limit {
            return Ok(());
        }
        self.commit()?;
        let Some(new) = self.take_run(clusters, 1, limit)? else {
            return Ok(());
        };
        self.report.moved = self.report.moved.saturating_add(clusters << self.bits());
        self.keep_fresh();
        self.refcounts.move_table(&mut self.fence, new)?;
        for cluster in first..first.saturating_add(clusters) {
            self.drop_with_batch(cluster, 1);
        }
        self.commit()
    }

    /// Moves one cluster with `weight` references where it is found. `None` if it stays.
    fn move_single(
        &mut self,
        what: Copied,
        cluster: u64,
        weight: u64,
        shared: &mut Shared,
        push: &Push,
    ) -> Result<Option<u64>> {
        if !push.from.contains(&cluster) {
            return Ok(None);
        }
        let count = self.count(cluster)?;
        if count == weight {
            let Some(new) = self.take_run(1, count, push.below)? else {
                return Ok(None);
            };
            self.copy(what, cluster, new, 1)?;
            self.drop_with_batch(cluster, count);
            return Ok(Some(new));
        }
        if let Some(known) = shared.get(&cluster) {
            return Ok(*known);
        }
        let new = self.take_run(1, count, push.below)?;
        shared.insert(cluster, new);
        if let Some(new) = new {
            self.copy(what, cluster, new, 1)?;
            self.drop_late(cluster, count);
        }
        Ok(new)
    }

    fn move_data(&mut self, push: &Push) -> Result<()> {
        if self.data.is_some() {
            return Ok(());
        }
        let bits = self.bits();
        let mut shared = Shared::new();
        let mut entries = Vec::new();
        for (_, table) in self.l2_tables()? {
            let weight = self.count(table >> bits)?;
            self.read_l2(table, &mut entries)?;
            for (_, entry) in entries.drain(..) {
                let (ClusterKind::Normal(host) | ClusterKind::ZeroAllocated(host)) =
                    entry.word.kind(self.geometry)?
                else {
                    continue;
                };
                if let Some(new) =
                    self.move_single(Copied::Data, host.get() >> bits, weight, &mut shared, push)?
                {
                    self.switch(entry.at, moved(entry.word, new << bits));
                    self.commit_if_many()?;
                }
            }
        }
        self.settle()
    }

    fn move_bitmap_data(&mut self, push: &Push) -> Result<()> {
        let bits = self.bits();
        let mut shared = Shared::new();
        for table in self.bitmap_tables()? {
            self.each_bitmap_entry(&table, |work, at, host| {
                if let Some(new) = work.move_single(Copied::Bits, host >> bits, 1, &mut shared, push)? {
                    work.switch(at, new << bits);
                    work.commit_if_many()?;
                }
                Ok(())
            })?;
        }
        self.settle()
    }

    fn move_l2_tables(&mut self, push: &Push) -> Result<()> {
        let bits = self.bits();
        let mut shared = Shared::new();
        for l1 in self.l1_tables()? {
            self.each_l1_entry(&l1, |work, at, _, entry| {
                let table = entry.offset().get() >> bits;
                if let Some(new) = work.move_single(Copied::Tables, table, l1.weight(), &mut shared, push)? {
                    let word = super::super::map::L2Entry(entry.0);
                    work.switch(at, moved(word, new << bits));
                    work.commit_if_many()?;
                }
                Ok(())
            })?;
        }
        self.settle()
    }

    fn move_refcount_blocks(&mut self, push: &Push) -> Result<()> {
        for (index, cluster) in self.refcounts.block_places() {
            if !push.from.contains(&cluster) {
                continue;
            }
            let Some(new) = self.take_run(1, 1, push.below)? else {
                break;
            };
            self.refcounts.move_block(&mut self.fence, index, new)?;
            self.note_copied(self.cluster());
            self.report.moved = self.report.moved.saturating_add(self.cluster());
            self.drop_with_batch(cluster, 1);
        }
        self.commit()
    }
}
