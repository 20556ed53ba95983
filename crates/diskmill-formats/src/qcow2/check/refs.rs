//! How often each cluster of the file is referred to.
//!
//! Nothing is sized by the length of the file: clusters are counted in pages of [`PAGE`], which exist where something
//! refers to and start out with a bit for each cluster.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// Clusters in a page.
pub(super) const PAGE: u64 = 4096;
const COUNTS: usize = 4096;
const WORDS: usize = 64;
/// Parts that are locked on their own while counting.
const SHARDS: u64 = 32;

/// The counts of a page, as wide as they need be.
#[derive(Clone, Debug)]
enum Page {
    /// Every count is 0 or 1.
    Bits(Box<[u64; WORDS]>),
    Bytes(Box<[u8]>),
    Halves(Box<[u16]>),
    Wide(Box<[u64]>),
}

/// Reference counts by cluster of the file, while they are gathered by many threads.
#[derive(Debug)]
pub(super) struct References {
    shards: Vec<Mutex<HashMap<u64, Page>>>,
}

impl Default for References {
    fn default() -> Self {
        Self {
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
        }
    }
}

impl References {
    fn with<T>(&self, index: u64, then: impl FnOnce(&mut HashMap<u64, Page>) -> T) -> Option<T> {
        let shard = self.shards.get(usize::try_from(index % SHARDS).ok()?)?;
        // Counts are whole after every statement.
        Some(then(&mut shard.lock().unwrap_or_else(PoisonError::into_inner)))
    }

    /// Adds `weight` references to each of `clusters`.
    pub(super) fn add(&self, clusters: Range<u64>, weight: u64) {
        for (index, within) in pieces(clusters) {
            self.with(index, |pages| {
                pages.entry(index).or_insert_with(Page::empty).add(within, weight);
            });
        }
    }

    /// The references to a cluster so far.
    pub(super) fn get(&self, cluster: u64) -> u64 {
        self.with(cluster / PAGE, |pages| {
            pages
                .get(&(cluster / PAGE))
                .map_or(0, |page| page.get(within(cluster)))
        })
        .unwrap_or(0)
    }

    /// All that was counted.
    pub(super) fn finish(self) -> Counts {
        let mut pages = BTreeMap::new();
        for shard in self.shards {
            pages.extend(shard.into_inner().unwrap_or_else(PoisonError::into_inner));
        }
        Counts { pages }
    }
}

/// Reference counts by cluster of the file, all gathered.
#[derive(Clone, Debug, Default)]
pub(super) struct Counts {
    pages: BTreeMap<u64, Page>,
}

impl Counts {
    /// The references to a cluster.
    pub(super) fn get(&self, cluster: u64) -> u64 {
        self.pages
            .get(&(cluster / PAGE))
            .map_or(0, |page| page.get(within(cluster)))
    }

    /// Adds `weight` references to each of `clusters`.
    pub(super) fn add(&mut self, clusters: Range<u64>, weight: u64) {
        for (index, within) in pieces(clusters) {
            self.pages
                .entry(index)
                .or_insert_with(Page::empty)
                .add(within, weight);
        }
    }

    /// Takes a reference from a cluster.
    pub(super) fn sub(&mut self, cluster: u64) {
        if let Some(page) = self.pages.get_mut(&(cluster / PAGE)) {
            page.sub(within(cluster));
        }
    }

    /// The pages that hold something in a range of page numbers, in rising order.
    pub(super) fn pages(&self, range: Range<u64>) -> impl Iterator<Item = u64> {
        self.pages.range(range).map(|(index, _)| *index)
    }

    /// Whether no cluster is referred to twice.
    pub(super) fn all_single(&self) -> bool {
        self.pages.values().all(|page| matches!(page, Page::Bits(_)))
    }

    /// The counts of the 64 clusters from `cluster`, a multiple of 64, on as bits; `None` if one of them is above 1, or
    /// may be.
    pub(super) fn bits(&self, cluster: u64) -> Option<u64> {
        match self.pages.get(&(cluster / PAGE)) {
            None => Some(0),
            Some(Page::Bits(words)) => words.get(within(cluster) / 64).copied(),
            Some(_) => None,
        }
    }

    /// The clusters of `range` that are referred to, in rising order.
    pub(super) fn used(&self, range: Range<u64>) -> impl Iterator<Item = u64> {
        let pages = range.start / PAGE..range.end.div_ceil(PAGE);
        self.pages.range(pages).flat_map(move |(index, page)| {
            let start = index.saturating_mul(PAGE);
            let range = start.max(range.start)..start.saturating_add(PAGE).min(range.end);
            range.filter(|cluster| page.get(within(*cluster)) > 0)
        })
    }

    /// The last cluster that is referred to.
    pub(super) fn last(&self) -> Option<u64> {
        self.pages.iter().rev().find_map(|(index, page)| {
            let start = index.saturating_mul(PAGE);
            (start..start.saturating_add(PAGE)).rfind(|cluster| page.get(within(*cluster)) > 0)
        })
    }
}

fn within(cluster: u64) -> usize {
    // Below 4096 after the remainder.
    usize::try_from(cluster % PAGE).unwrap_or(0)
}

/// The pages a run of clusters touches, with the part of each.
fn pieces(clusters: Range<u64>) -> impl Iterator<Item = (u64, Range<usize>)> {
    let mut next = clusters.start;
    std::iter::from_fn(move || {
        if next >= clusters.end {
            return None;
        }
        let index = next / PAGE;
        let end = clusters.end.min(index.saturating_add(1).saturating_mul(PAGE));
        let from = within(next);
        let to = from.saturating_add(usize::try_from(end.saturating_sub(next)).unwrap_or(0));
        next = end;
        Some((index, from..to))
    })
}

impl Page {
    fn empty() -> Self {
        Self::Bits(Box::new([0; WORDS]))
    }

    fn get(&self, within: usize) -> u64 {
        match self {
            Self::Bits(words) => words.get(within / 64).map_or(0, |word| word >> (within % 64) & 1),
            Self::Bytes(counts) => counts.get(within).map_or(0, |count| u64::from(*count)),
            Self::Halves(counts) => counts.get(within).map_or(0, |count| u64::from(*count)),
            Self::Wide(counts) => counts.get(within).copied().unwrap_or(0),
        }
    }

    fn add(&mut self, range: Range<usize>, weight: u64) {
        let mut next = range.start;
        while next < range.end {
            next = match self {
                Self::Bits(words) if weight == 1 => set_bits(words, next..range.end),
                Self::Bits(_) => next,
                Self::Bytes(counts) => raise(counts, next..range.end, weight),
                Self::Halves(counts) => raise(counts, next..range.end, weight),
                Self::Wide(counts) => {
                    for count in counts.get_mut(next..range.end).unwrap_or_default() {
                        *count = count.saturating_add(weight);
                    }
                    range.end
                }
            };
            if next < range.end {
                self.widen();
            }
        }
    }

    fn sub(&mut self, within: usize) {
        match self {
            Self::Bits(words) => {
                if let Some(word) = words.get_mut(within / 64) {
                    *word &= !(1 << (within % 64));
                }
            }
            Self::Bytes(counts) => lower(counts.get_mut(within)),
            Self::Halves(counts) => lower(counts.get_mut(within)),
            Self::Wide(counts) => lower(counts.get_mut(within)),
        }
    }

    fn widen(&mut self) {
        let counts = 0..COUNTS;
        *self = match self {
            Self::Bits(_) => Self::Bytes(counts.map(|at| u8::try_from(self.get(at)).unwrap_or(0)).collect()),
            Self::Bytes(_) => Self::Halves(
                counts
                    .map(|at| u16::try_from(self.get(at)).unwrap_or(0))
                    .collect(),
            ),
            Self::Halves(_) | Self::Wide(_) => Self::Wide(counts.map(|at| self.get(at)).collect()),
        };
    }
}

/// Sets bits as long as they are unset; returns how far it came.
fn set_bits(words: &mut [u64; WORDS], range: Range<usize>) -> usize {
    let mut next = range.start;
    while next < range.end {
        let end = range.end.min((next / 64).saturating_add(1).saturating_mul(64));
        let (low, count) = (next % 64, end.saturating_sub(next));
        let mask = (u64::MAX >> (64_usize.saturating_sub(count) % 64)) << low;
        match words.get_mut(next / 64) {
            Some(word) if *word & mask == 0 => *word |= mask,
            _ => return next,
        }
        next = end;
    }
    range.end
}

/// Raises counts as long as they can hold it; returns how far it came.
fn raise<T: Copy + Into<u64> + TryFrom<u64>>(counts: &mut [T], range: Range<usize>, weight: u64) -> usize {
    let start = range.start;
    for (step, count) in counts
        .get_mut(range.clone())
        .unwrap_or_default()
        .iter_mut()
        .enumerate()
    {
        match T::try_from((*count).into().saturating_add(weight)) {
            Ok(sum) => *count = sum,
            Err(_) => return start.saturating_add(step),
        }
    }
    range.end
}

fn lower<T: Copy + Into<u64> + TryFrom<u64>>(count: Option<&mut T>) {
    if let Some(count) = count
        && let Ok(less) = T::try_from((*count).into().saturating_sub(1))
    {
        *count = less;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn counts_grow_from_bits_to_more() {
        let references = References::default();
        references.add(10..12, 1);
        assert_eq!(
            (references.get(9), references.get(10), references.get(12)),
            (0, 1, 0)
        );
        for (more, sum) in [
            (254, 255),
            (1, 256),
            (65_279, 65_535),
            (1, 65_536),
            (u64::MAX, u64::MAX),
        ] {
            references.add(10..11, more);
            assert_eq!((references.get(10), references.get(11)), (sum, 1));
        }
    }

    #[test]
    fn far_clusters_cost_a_page_each() {
        let references = References::default();
        references.add(u64::MAX - 2..u64::MAX, 1);
        references.add(0..1, 1);
        let counts = references.finish();
        assert_eq!(counts.pages(0..u64::MAX).count(), 2);
        assert_eq!(counts.get(u64::MAX - 1), 1);
        assert_eq!(counts.last(), Some(u64::MAX - 1));
        assert!(counts.all_single());
    }

    proptest! {
        #![proptest_config(diskmill_testkit::random::config(256))]

        #[test]
        fn random_counts_are_those_of_a_plain_array(adds in proptest::collection::vec((0_u64..9000, 1_u64..300, 1_u64..200), 0..40)) {
            let references = References::default();
            let mut model = vec![0_u64; 9300];
            for (start, len, weight) in adds {
                references.add(start..start + len, weight);
                for count in &mut model[start as usize..(start + len) as usize] {
                    *count += weight;
                }
            }
            let mut counts = references.finish();
            for (cluster, count) in model.iter().enumerate() {
                prop_assert_eq!(counts.get(cluster as u64), *count);
            }
            let used: Vec<u64> = counts.used(100..9001).collect();
            prop_assert_eq!(used, (100..9001).filter(|at| model[*at as usize] > 0).collect::<Vec<_>>());
            prop_assert_eq!(counts.last(), model.iter().rposition(|count| *count > 0).map(|at| at as u64));
            for cluster in 0..9300 {
                counts.sub(cluster);
                prop_assert_eq!(counts.get(cluster), model[cluster as usize].saturating_sub(1));
            }
        }

        #[test]
        fn random_runs_of_single_references_stay_bits(runs in proptest::collection::vec(1_u64..300, 1..60)) {
            let references = References::default();
            let mut next = 0;
            for run in &runs {
                references.add(next..next + run, 1);
                next += run + 1;
            }
            let counts = references.finish();
            prop_assert!(counts.all_single());
            prop_assert_eq!(counts.used(0..u64::MAX).count() as u64, runs.iter().sum::<u64>());
            prop_assert_eq!(counts.bits(0).map(|bits| bits & 1), Some(1));
        }
    }
}
