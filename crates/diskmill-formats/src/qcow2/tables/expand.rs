//! Zero clusters without the zero flag, which version 2 does not know.

use std::collections::BTreeMap;

use diskmill_core::{GuestOffset, HostOffset, Result, ZeroHow};

use super::super::crypto::Sealing;
use super::super::fence::Part;
use super::super::map::L1Entry;
use super::super::slot::{Place, Slot};
use super::{Reclaim, Tables};

/// Clusters taken at once.
const STEP: u64 = 256;

/// L2 tables by their place.
pub(crate) type L2Tables = BTreeMap<u64, Named>;

/// What names an L2 table.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Named {
    /// How many entries of L1 tables.
    times: u64,
    /// The number of the first of them.
    index: u64,
}

/// Told whenever a table has been looked at.
type Tick<'a> = &'a mut dyn FnMut() -> Result<()>;

impl Tables {
    /// The L2 tables that `l1s` name.
    pub(crate) fn l2_tables(&self, l1s: &[Vec<L1Entry>]) -> Result<L2Tables> {
        let mut tables = L2Tables::new();
        let numbered = |l1| (0_u64..).zip(l1);
        for (index, entry) in l1s.iter().flat_map(numbered) {
            if let Some(at) = entry.table(self.geometry)? {
                let named = tables.entry(at.get()).or_insert(Named { times: 0, index });
                named.times = named.times.saturating_add(1);
            }
        }
        Ok(tables)
    }

    /// Whether any of `tables` has a compressed cluster.
    pub(crate) fn has_packed(&mut self, tables: &L2Tables) -> Result<bool> {
        for at in tables.keys() {
            let slots = self.slots(HostOffset::new(*at))?;
            if slots.iter().any(|slot| matches!(slot.place, Place::Packed(_))) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Does away with zero flags in `tables`. Where a cluster has a place of its own, or there is a layer below, zeros
    /// are stored; elsewhere it is left out. A table goes on meaning the same, so that it can be changed where it is,
    /// whoever it belongs to; what it refers to counts as often as it is named.
    pub(crate) fn expand_zeros(
        &mut self,
        tables: &L2Tables,
        backed: bool,
        sealing: &Sealing,
        tick: Tick<'_>,
    ) -> Result<()> {
        for (at, named) in tables {
            let table_at = HostOffset::new(*at);
            let slots = self.slots(table_at)?;
            let mut number = 0;
            while let Some(slot) = slots.get(number) {
                number += match slot.zero {
                    0 => 1,
                    _ => self.expand_from(table_at, number, &slots, *named, backed, sealing)?,
                };
            }
            tick()?;
        }
        self.write_back(true)
    }

    /// Expands zero clusters from entry `number` on; returns how many.
    fn expand_from(
        &mut self,
        table_at: HostOffset,
        number: usize,
        slots: &[Slot],
        named: Named,
        backed: bool,
        sealing: &Sealing,
    ) -> Result<usize> {
        let bits = self.geometry.cluster_bits().get();
        let guest = self
            .geometry
            .l1_start(named.index)
            .saturating_add((number as u64) << bits);
        let named = named.times;
        let rest = slots.get(number..).unwrap_or_default();
        let Some(slot) = rest.first().copied() else {
            return Ok(1);
        };
        if let Place::At { host, .. } = slot.place
            && self.refcounts.get(&mut self.fence, host.get() >> bits)? == 1
        {
            // Nothing else looks at this place.
            self.write_zero_clusters(host.get() >> bits, 1, guest, sealing)?;
            self.rewrite(table_at, number, stored(host, true))?;
            self.settle_if_many()?;
            return Ok(1);
        }
        if !backed {
            self.replace(table_at, number, slot, Slot::ABSENT, named)?;
            return Ok(1);
        }
        let placeless = |slot: &&Slot| slot.zero != 0 && slot.place == Place::Nowhere;
        let wanted = rest.iter().take_while(placeless).count() as u64;
        let (first, count) = self.allocate(1, wanted.clamp(1, STEP))?;
        for cluster in first..first.saturating_add(count) {
            self.refcounts
                .raise_by(&mut self.fence, cluster, named.saturating_sub(1))?;
        }
        self.write_zero_clusters(first, count, guest, sealing)?;
        let mut done = 0;
        for (slot, cluster) in rest.iter().zip(first..first.saturating_add(count)) {
            let new = stored(HostOffset::new(cluster << bits), named == 1);
            self.replace(table_at, number.saturating_add(done), *slot, new, named)?;
            done += 1;
        }
        Ok(done)
    }

    fn write_zero_clusters(
        &mut self,
        first: u64,
        count: u64,
        guest: GuestOffset,
        sealing: &Sealing,
    ) -> Result<()> {
        let bits = self.geometry.cluster_bits().get();
        let range = first << bits..first.saturating_add(count) << bits;
        self.fence.check(Part::Data, range.clone())?;
        self.fence.note_copied();
        if sealing.is_encrypted() {
            let (host, len) = (HostOffset::new(range.start), range.end - range.start);
            return sealing.write_zeros(self.fence.file().as_ref(), guest, host, len);
        }
        let range = HostOffset::new(range.start)..HostOffset::new(range.end);
        self.fence.file().zero(range, ZeroHow::MayUnmap)
    }

    /// Puts `new` in the place of `old` and drops what `old` refers to as often as the table is `named`.
    fn replace(
        &mut self,
        table_at: HostOffset,
        number: usize,
        old: Slot,
        new: Slot,
        named: u64,
    ) -> Result<()> {
        self.rewrite(table_at, number, new)?;
        let (first, count) = self.host_clusters(old);
        if count > 0 {
            self.drop_clusters_of(first, count, named, Reclaim::Keep);
        }
        self.settle_if_many()
    }
}

fn stored(host: HostOffset, own: bool) -> Slot {
    Slot {
        place: Place::At { host, own },
        stored: 1,
        zero: 0,
    }
}
