//! Which moments a power cut may come at, and what it takes with it.

use super::Change;
use crate::sparse_random::mix;

/// A power cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    /// Changes and flushes of the journal that came before it.
    pub count: usize,
    /// What it took of those that were not flushed.
    pub loss: Loss,
}

/// What of the changes that were not flushed is lost. That the others are there is the same as a host that wrote them
/// earlier than those that are not: the order between flushes is the host's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// Nothing.
    Nothing,
    /// Everything.
    All,
    /// This change only, by its number in the journal.
    One(usize),
    /// All but this change.
    AllBut(usize),
    /// Some sectors of this write.
    Part {
        /// Its number in the journal.
        change: usize,
        /// Which sectors.
        seed: u64,
    },
    /// Each change is there, is not, or is there in part, to the sector.
    Random {
        /// Says which.
        seed: u64,
    },
}

/// How many cuts are made in each stretch between two flushes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Moments at which everything had been written in order.
    pub prefixes: usize,
    /// Changes that are lost alone, kept alone and torn alone.
    pub singles: usize,
    /// Random losses.
    pub random: usize,
    /// Makes other choices.
    pub seed: u64,
}

/// What becomes of a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    Whole,
    Torn,
    Gone,
}

/// Choices that look random and are the same every time.
#[derive(Clone, Copy, Debug)]
pub(super) struct Chance(u64);

impl Chance {
    pub(super) fn one_in(&mut self, of: u64) -> bool {
        self.0 = mix(self.0);
        self.0.is_multiple_of(of)
    }
}

impl Cut {
    pub(super) fn chance(&self) -> Chance {
        Chance(match self.loss {
            Loss::Random { seed } | Loss::Part { seed, .. } => mix(seed ^ (self.count as u64) << 32),
            _ => 0,
        })
    }

    /// What becomes of change `index`, which is not flushed.
    pub(super) fn fate(&self, index: usize, chance: &mut Chance) -> Fate {
        let kept = |is: bool| if is { Fate::Whole } else { Fate::Gone };
        match self.loss {
            Loss::Nothing => Fate::Whole,
            Loss::All => Fate::Gone,
            Loss::One(lost) => kept(index != lost),
            Loss::AllBut(left) => kept(index == left),
            Loss::Part { change, .. } if change == index => Fate::Torn,
            Loss::Part { .. } => Fate::Whole,
            Loss::Random { .. } => match (chance.one_in(2), chance.one_in(2)) {
                (true, _) => Fate::Whole,
                (_, true) => Fate::Torn,
                _ => Fate::Gone,
            },
        }
    }
}

/// How many changes the last flush of each file covers.
pub(super) fn covered(changes: &[Change], files: usize) -> Vec<usize> {
    let mut covered = vec![0; files];
    for (index, change) in changes.iter().enumerate() {
        if let Change::Flush { file } = change {
            covered[*file] = index;
        }
    }
    covered
}

/// See [`Journal::cuts`](super::Journal::cuts).
pub(super) fn cuts(changes: &[Change], files: usize, bounds: Bounds) -> Vec<Cut> {
    let is_flush = |index: usize| matches!(changes.get(index), Some(Change::Flush { .. }));
    let mut cuts = Vec::new();
    let mut add = |count, loss| cuts.push(Cut { count, loss });
    let mut start = 0;
    for end in 1..=changes.len() {
        // A stretch ends before the first of the flushes behind it.
        if end < changes.len() && (is_flush(end - 1) || !is_flush(end)) {
            continue;
        }
        for count in spread(start..end + 1, bounds.prefixes, bounds.seed) {
            add(count, Loss::Nothing);
        }
        start = end + 1;
        let covered = covered(&changes[..end], files);
        let pending: Vec<usize> = (0..end)
            .filter(|index| !is_flush(*index) && *index >= covered[changes[*index].file()])
            .collect();
        if pending.is_empty() {
            continue;
        }
        add(end, Loss::All);
        let seed = mix(bounds.seed ^ end as u64);
        for choice in spread(0..pending.len(), bounds.singles, seed) {
            let change = pending[choice];
            if pending.len() > 1 {
                add(end, Loss::One(change));
                add(end, Loss::AllBut(change));
            }
            if matches!(&changes[change], Change::Write { bytes, .. } if bytes.len() > 512) {
                add(end, Loss::Part { change, seed });
            }
        }
        for number in 0..bounds.random as u64 {
            add(
                end,
                Loss::Random {
                    seed: mix(seed ^ number),
                },
            );
        }
    }
    cuts
}

/// All of `range` if that is at most `count` numbers, else `count` spread over it.
fn spread(range: std::ops::Range<usize>, count: usize, seed: u64) -> Vec<usize> {
    if range.len() <= count {
        return range.collect();
    }
    let step = range.len().div_ceil(count.max(1));
    let first = range.start + (mix(seed) % step as u64) as usize;
    (first..range.end).step_by(step).collect()
}
