//! Host clusters of a new image, given out in rising order, and how often each is used.
//!
//! Counts are kept only where they may still change: block 0, which counts the tables at the front, to the end; of the
//! others those that are not full yet. A full block is handed out to be written and forgotten.

use std::collections::VecDeque;

use diskmill_core::{Error, ErrorKind, Format, HostOffset, Result};

use crate::qcow2::header::{ClusterBits, RefcountOrder};
use crate::qcow2::layout::{OFFSET_MASK, REFCOUNT_TABLE_BYTES_MAX};

/// Bytes of blocks that partly filled clusters may hold back.
const HELD_BYTES: u64 = 4 << 20;

/// Partly filled clusters that wait for a stream that fits.
const GAPS: usize = 32;

/// Why there is no further cluster.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FullError {
    /// The device ends.
    #[error("the image needs {needed} bytes, the device has {have}")]
    Device {
        /// Bytes up to the cluster that does not fit.
        needed: u64,
        /// Bytes there are.
        have: u64,
    },
    /// The refcount table may not be longer.
    #[error("the file needs {needed} refcount blocks, must be at most {most} (larger clusters need fewer)")]
    RefcountTable {
        /// Blocks for the cluster that does not fit.
        needed: u64,
        /// Blocks a table can list.
        most: u64,
    },
    /// Table entries have no more bits.
    #[error("the file grows to {0} bytes, must be below 2^56")]
    Offset(u64),
}

impl From<FullError> for Error {
    fn from(error: FullError) -> Self {
        Error::new(ErrorKind::NoSpace, error).format(Format::Qcow2)
    }
}

/// A cluster that compressed data fills only in part.
#[derive(Clone, Copy, Debug)]
struct Open {
    /// The next free byte, which is not the first of its cluster.
    at: HostOffset,
    /// Streams in the cluster.
    streams: u64,
}

/// See the [module](self).
#[derive(Debug)]
pub(super) struct Clusters {
    cluster_bits: ClusterBits,
    order: RefcountOrder,
    /// The cluster given out next.
    next: u64,
    /// Bytes of the storage, if it cannot grow.
    have: Option<u64>,
    /// The cluster filled last.
    open: Option<Open>,
    /// Others that a cluster stored plain cut off before they were full.
    gaps: Vec<Open>,
    /// Block 0.
    first: Vec<u8>,
    /// Blocks `front`, `front + 1`, ...
    blocks: VecDeque<Vec<u8>>,
    front: u64,
}

impl Clusters {
    /// No cluster given out. `have` is the length of the storage if it cannot grow.
    pub fn new(cluster_bits: ClusterBits, order: RefcountOrder, have: Option<u64>) -> Self {
        Self {
            cluster_bits,
            order,
            next: 0,
            have,
            open: None,
            gaps: Vec::new(),
            first: vec![0; cluster_bits.cluster_len()],
            blocks: VecDeque::new(),
            front: 1,
        }
    }

    /// Clusters given out so far.
    pub fn given(&self) -> u64 {
        self.next
    }

    /// Gives out `count` clusters in a row, each used once.
    pub fn take(&mut self, count: u64) -> Result<HostOffset> {
        let start = self.next;
        let end = start.saturating_add(count);
        let end_byte = end.saturating_mul(self.cluster_bits.cluster_size());
        if end_byte > OFFSET_MASK {
            return Err(FullError::Offset(end_byte).into());
        }
        if let Some(have) = self.have
            && end_byte > have
        {
            return Err(FullError::Device {
                needed: end_byte,
                have,
            }
            .into());
        }
        let needed = end.div_ceil(1 << self.block_bits());
        let most = REFCOUNT_TABLE_BYTES_MAX >> 3;
        if needed > most {
            return Err(FullError::RefcountTable { needed, most }.into());
        }
        for cluster in start..end {
            self.set(cluster, 1);
        }
        self.next = end;
        Ok(HostOffset::new(start << self.cluster_bits.get()))
    }

    /// Gives out `len` bytes, less than a cluster, for a compressed stream: in the tightest gap it fits into, else
    /// right behind the stream before where that is possible.
    pub fn pack(&mut self, len: u64) -> Result<HostOffset> {
        if let Some(at) = self.pack_into_gap(len) {
            return Ok(at);
        }
        let bits = self.cluster_bits.get();
        if let Some(open) = self.open.take() {
            let adjoins = open.at.get() >> bits == self.next.saturating_sub(1);
            let streams = open.streams.saturating_add(1);
            let room = self.room(open);
            if streams <= self.order.max() && (len <= room || adjoins) {
                let spills = len > room;
                if spills {
                    self.take(1)?;
                }
                self.set(open.at.get() >> bits, streams);
                let at = open.at.saturating_add(len);
                self.reopen(at, if spills { 1 } else { streams });
                return Ok(open.at);
            }
            self.keep_gap(open);
        }
        let at = self.take(1)?;
        self.reopen(at.saturating_add(len), 1);
        Ok(at)
    }

    fn pack_into_gap(&mut self, len: u64) -> Option<HostOffset> {
        let fitting = self
            .gaps
            .iter()
            .enumerate()
            .filter(|(_, gap)| len <= self.room(**gap));
        let (index, gap) = fitting.min_by_key(|(_, gap)| self.room(**gap))?;
        let gap = *gap;
        self.gaps.swap_remove(index);
        let streams = gap.streams.saturating_add(1);
        self.set(gap.at.get() >> self.cluster_bits.get(), streams);
        let at = gap.at.saturating_add(len);
        if !at.is_aligned(self.cluster_bits.cluster_size()) {
            self.keep_gap(Open { at, streams });
        }
        Some(gap.at)
    }

    /// Keeps a gap, and of too many the largest.
    fn keep_gap(&mut self, gap: Open) {
        if gap.streams < self.order.max() {
            self.gaps.push(gap);
        }
        if self.gaps.len() > GAPS {
            let smallest = self
                .gaps
                .iter()
                .enumerate()
                .min_by_key(|(_, gap)| self.room(**gap));
            if let Some((index, _)) = smallest {
                self.gaps.swap_remove(index);
            }
        }
    }

    /// Bytes that are left of a cluster.
    fn room(&self, open: Open) -> u64 {
        let cluster_size = self.cluster_bits.cluster_size();
        cluster_size.saturating_sub(open.at.within(cluster_size))
    }

    /// Takes back the use of a cluster at the front.
    pub fn release(&mut self, cluster: u64) {
        self.set(cluster, 0);
    }

    /// Blocks that cannot change any more, with their index.
    pub fn take_full(&mut self) -> Vec<(u64, Vec<u8>)> {
        if self.blocks.len() as u64 > HELD_BYTES >> self.cluster_bits.get() {
            self.open = None;
            self.gaps.clear();
        }
        let growing = self.next >> self.block_bits();
        let unfilled = self.gaps.iter().chain(&self.open);
        let held = unfilled.map(|open| open.at.get() >> self.cluster_bits.get() >> self.block_bits());
        let held = held.min().unwrap_or(growing);
        let mut full = Vec::new();
        while self.front < held.min(growing) {
            let Some(block) = self.blocks.pop_front() else {
                break;
            };
            full.push((self.front, block));
            self.front = self.front.saturating_add(1);
        }
        full
    }

    /// Blocks that remain no more, and the first.
    pub fn handed_out(&self) -> u64 {
        self.front
    }

    /// How many blocks but the first remain, were `count` more clusters given out.
    pub fn remaining_with(&self, count: u64) -> u64 {
        let all = self.next.saturating_add(count).div_ceil(1 << self.block_bits());
        all.saturating_sub(self.front)
    }

    /// Block 0, and all others that remain, in order.
    pub fn into_blocks(self) -> (Vec<u8>, VecDeque<Vec<u8>>) {
        (self.first, self.blocks)
    }

    fn block_bits(&self) -> u32 {
        self.order.block_bits(self.cluster_bits)
    }

    fn reopen(&mut self, at: HostOffset, streams: u64) {
        let filled = at.is_aligned(self.cluster_bits.cluster_size());
        self.open = (!filled).then_some(Open { at, streams });
    }

    fn set(&mut self, cluster: u64, count: u64) {
        let bits = self.block_bits();
        let index = cluster & ((1 << bits) - 1);
        let block = match (cluster >> bits).checked_sub(self.front) {
            None => &mut self.first,
            Some(behind) => {
                let behind = usize::try_from(behind).unwrap_or(usize::MAX);
                while self.blocks.len() <= behind {
                    self.blocks.push_back(vec![0; self.cluster_bits.cluster_len()]);
                }
                let Some(block) = self.blocks.get_mut(behind) else {
                    return;
                };
                block
            }
        };
        set_count(block, self.order, index, count);
    }
}

/// Stores a refcount. Widths below a byte start at its least significant bit.
fn set_count(block: &mut [u8], order: RefcountOrder, index: u64, count: u64) {
    let width = order.bits();
    let bit = index.saturating_mul(width.into());
    let at = usize::try_from(bit >> 3).unwrap_or(usize::MAX);
    if width < 8 {
        let Some(byte) = block.get_mut(at) else { return };
        let shift = bit & 7;
        let mask = order.max() << shift;
        // Both fit into the byte: the width divides 8.
        *byte = (u64::from(*byte) & !mask | (count << shift) & mask).to_le_bytes()[0];
        return;
    }
    let bytes = count.to_be_bytes();
    let len = usize::try_from(width >> 3).unwrap_or(bytes.len());
    let low = bytes.get(bytes.len().saturating_sub(len)..).unwrap_or_default();
    if let Some(place) = block.get_mut(at..).and_then(|rest| rest.get_mut(..len)) {
        place.copy_from_slice(low);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clusters(cluster_bits: u32, order: u32) -> Clusters {
        Clusters::new(
            ClusterBits::new(cluster_bits).unwrap(),
            RefcountOrder::new(order).unwrap(),
            None,
        )
    }

    #[test]
    fn counts_are_stored_at_every_width() {
        for (order, first) in [
            (0, vec![0x0f]),
            (1, vec![0x55]),
            (2, vec![0x11, 0x11]),
            (3, vec![1, 1, 1, 1]),
            (4, vec![0, 1, 0, 1, 0, 1, 0, 1]),
            (5, [0, 0, 0, 1].repeat(4)),
            (6, [0, 0, 0, 0, 0, 0, 0, 1].repeat(4)),
        ] {
            let mut clusters = clusters(16, order);
            clusters.take(4).unwrap();
            let (block, rest) = clusters.into_blocks();
            assert_eq!(block[..first.len()], first);
            assert!(block[first.len()..].iter().all(|byte| *byte == 0));
            assert!(rest.is_empty());
        }
    }

    #[test]
    fn streams_lie_back_to_back_and_count_in_each_cluster_they_touch() {
        let mut clusters = clusters(9, 3);
        assert_eq!(clusters.pack(300).unwrap().get(), 0);
        assert_eq!(clusters.pack(300).unwrap().get(), 300);
        assert_eq!(clusters.pack(424).unwrap().get(), 600);
        assert_eq!(clusters.pack(10).unwrap().get(), 1024);
        assert_eq!(clusters.into_blocks().0[..4], [2, 2, 1, 0]);
    }

    #[test]
    fn no_cluster_holds_more_streams_than_can_be_counted() {
        let mut one_bit = clusters(9, 0);
        assert_eq!(one_bit.pack(10).unwrap().get(), 0);
        assert_eq!(one_bit.pack(10).unwrap().get(), 512);
        let mut two_bits = clusters(9, 1);
        let places: Vec<_> = (0..5).map(|_| two_bits.pack(100).unwrap().get()).collect();
        assert_eq!(places, [0, 100, 200, 512, 612]);
        assert_eq!(two_bits.into_blocks().0[0], 0b1011);
    }

    #[test]
    fn what_is_left_of_a_cluster_serves_streams_that_fit() {
        let mut clusters = clusters(9, 4);
        clusters.pack(300).unwrap();
        clusters.take(1).unwrap();
        assert_eq!(clusters.pack(250).unwrap().get(), 1024);
        assert_eq!(clusters.pack(200).unwrap().get(), 300);
        assert_eq!(clusters.pack(200).unwrap().get(), 1274);
        assert_eq!(clusters.pack(12).unwrap().get(), 500);
        assert_eq!(clusters.into_blocks().0[..8], [0, 3, 0, 1, 0, 2, 0, 0]);
    }

    #[test]
    fn gaps_are_few_and_never_overfull() {
        let mut clusters = clusters(9, 1);
        for len in (1..=100).map(|index| 300 + index) {
            clusters.pack(len).unwrap();
            clusters.take(1).unwrap();
        }
        assert_eq!(clusters.gaps.len(), GAPS);
        let mut filled = std::collections::BTreeMap::<u64, u64>::new();
        for _ in 0..200 {
            let at = clusters.pack(40).unwrap().get();
            *filled.entry(at >> 9).or_default() += 1;
        }
        assert!(filled.values().all(|streams| *streams <= 3), "{filled:?}");
    }

    #[test]
    fn full_blocks_are_handed_out_once_nothing_can_change_them() {
        // 64 counts a block.
        let mut clusters = clusters(9, 6);
        clusters.take(64 + 63).unwrap();
        assert!(clusters.take_full().is_empty());
        clusters.pack(100).unwrap();
        clusters.take(10).unwrap();
        assert!(clusters.take_full().is_empty());
        clusters.pack(412).unwrap();
        let full = clusters.take_full();
        assert_eq!(full.len(), 1);
        assert_eq!(full[0].0, 1);
        assert_eq!(full[0].1[511], 2);
        assert_eq!(clusters.remaining_with(0), 1);
        assert_eq!(clusters.remaining_with(54), 1);
        assert_eq!(clusters.remaining_with(55), 2);
    }

    #[test]
    fn devices_and_the_refcount_table_end() {
        let mut device = Clusters::new(ClusterBits::DEFAULT, RefcountOrder::DEFAULT, Some(3 << 16));
        device.take(3).unwrap();
        assert_eq!(device.take(1).unwrap_err().kind(), ErrorKind::NoSpace);
        let mut small = clusters(9, 6);
        // As if a million blocks were full.
        small.next = (64 << 20) - 1;
        small.front = (1 << 20) - 1;
        small.take(1).unwrap();
        let error = small.take(1).unwrap_err();
        assert!(
            matches!(error.find(), Some(FullError::RefcountTable { .. })),
            "{error:?}"
        );
    }
}
