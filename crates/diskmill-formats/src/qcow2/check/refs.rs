//! How often each cluster of the file is referred to.
//!
//! Nothing is sized by the length of the file: clusters are counted in pages of [`PAGE`], which exist where something
//! refers to and start out with a bit for each cluster.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

/// Clusters in a page.
pub(super) const PAGE: u64 = 4096;
const WORDS: usize = 64;
/// The count of a byte that means: look among the large counts.
const LARGE: u8 = u8::MAX;

/// Reference counts by cluster of the file.
#[derive(Debug, Default)]
pub(super) struct References {
    pages: BTreeMap<u64, Page>,
    large: HashMap<u64, u64>,
}

#[derive(Debug)]
enum Page {
    /// Every count is 0 or 1.
    Bits(Box<[u64; WORDS]>),
    /// Counts up to 254.
    Bytes(Box<[u8]>),
}

impl References {
    /// Adds `weight` references to each of `clusters`.
    pub(super) fn add(&mut self, clusters: Range<u64>, weight: u64) {
        let mut next = clusters.start;
        while next < clusters.end {
            let index = next / PAGE;
            let end = clusters.end.min(index.saturating_add(1).saturating_mul(PAGE));
            let page = self
                .pages
                .entry(index)
                .or_insert_with(|| Page::Bits(Box::new([0; WORDS])));
            for cluster in next..end {
                let within = usize::try_from(cluster % PAGE).unwrap_or(0);
                if !page.add(within, weight) {
                    let count = self.large.entry(cluster).or_insert_with(|| page.small(within));
                    *count = count.saturating_add(weight);
                    page.mark_large(within);
                }
            }
            next = end;
        }
    }

    /// The references to a cluster.
    pub(super) fn get(&self, cluster: u64) -> u64 {
        let Some(page) = self.pages.get(&(cluster / PAGE)) else {
            return 0;
        };
        match page.small(usize::try_from(cluster % PAGE).unwrap_or(0)) {
            count if count == u64::from(LARGE) => self.large.get(&cluster).copied().unwrap_or(count),
            count => count,
        }
    }

    /// The pages that hold something in a range of page numbers, in rising order.
    pub(super) fn pages(&self, range: Range<u64>) -> impl Iterator<Item = u64> {
        self.pages.range(range).map(|(index, _)| *index)
    }

    /// Whether anything in a page is referred to.
    pub(super) fn has_page(&self, index: u64) -> bool {
        self.pages.contains_key(&index)
    }
}

impl Page {
    /// Adds to a count, or says that it grows too large.
    fn add(&mut self, within: usize, weight: u64) -> bool {
        if let Self::Bits(words) = self {
            let (word, bit) = (within / 64, 1_u64 << (within % 64));
            match words.get_mut(word) {
                Some(word) if weight == 1 && *word & bit == 0 => {
                    *word |= bit;
                    return true;
                }
                _ => self.widen(),
            }
        }
        let Self::Bytes(counts) = self else {
            return false;
        };
        let Some(count) = counts.get_mut(within) else {
            return false;
        };
        match u8::try_from(u64::from(*count).saturating_add(weight)) {
            Ok(sum) if *count != LARGE && sum != LARGE => {
                *count = sum;
                true
            }
            _ => false,
        }
    }

    fn widen(&mut self) {
        if let Self::Bits(words) = self {
            let bits = words
                .iter()
                .flat_map(|word| (0..64).map(move |bit| word >> bit & 1 != 0));
            *self = Self::Bytes(bits.map(u8::from).collect());
        }
    }

    fn small(&self, within: usize) -> u64 {
        match self {
            Self::Bits(words) => words.get(within / 64).map_or(0, |word| word >> (within % 64) & 1),
            Self::Bytes(counts) => counts.get(within).map_or(0, |count| u64::from(*count)),
        }
    }

    fn mark_large(&mut self, within: usize) {
        self.widen();
        if let Self::Bytes(counts) = self
            && let Some(count) = counts.get_mut(within)
        {
            *count = LARGE;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn counts_grow_from_bits_to_bytes_to_more() {
        let mut references = References::default();
        references.add(10..12, 1);
        assert_eq!(
            (references.get(9), references.get(10), references.get(12)),
            (0, 1, 0)
        );
        references.add(10..11, 252);
        assert_eq!(references.get(10), 253);
        references.add(10..11, 1);
        references.add(10..11, 1);
        assert_eq!(references.get(10), 255);
        references.add(10..11, u64::MAX);
        assert_eq!((references.get(10), references.get(11)), (u64::MAX, 1));
    }

    #[test]
    fn far_clusters_cost_a_page_each() {
        let mut references = References::default();
        references.add(u64::MAX - 2..u64::MAX, 1);
        references.add(0..1, 1);
        assert_eq!(references.pages(0..u64::MAX).count(), 2);
        assert_eq!(references.get(u64::MAX - 1), 1);
    }

    proptest! {
        #[test]
        fn counts_are_those_of_a_plain_array(adds in proptest::collection::vec((0_u64..9000, 1_u64..300, 1_u64..200), 0..40)) {
            let mut references = References::default();
            let mut model = vec![0_u64; 9300];
            for (start, len, weight) in adds {
                references.add(start..start + len, weight);
                for count in &mut model[start as usize..(start + len) as usize] {
                    *count += weight;
                }
            }
            for (cluster, count) in model.iter().enumerate() {
                prop_assert_eq!(references.get(cluster as u64), *count);
            }
        }
    }
}
