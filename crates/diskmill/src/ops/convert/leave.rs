//! What a copy leaves where it is.

use diskmill_core::{Chain, GuestOffset, Resolved, Result, State};

use crate::open::Node;

/// What a scan of a source finds and leaves alone.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Leave<'a> {
    /// Nothing: what no layer has is zeros.
    Nothing,
    /// What no layer has: it is left to the image below the target, which ends at this byte. From there on zeros need
    /// not be said.
    Absent {
        /// Bytes of the image below.
        end: u64,
    },
    /// What the top layer has, and what another chain has too.
    Same(&'a Other),
}

/// A chain that takes the place of all that is below the top layer of a source.
#[derive(Debug)]
pub(crate) struct Other {
    /// What it will read as.
    pub(crate) chain: Chain,
    /// Its layers.
    pub(crate) nodes: Vec<Node>,
    /// The layers of the source.
    pub(crate) source: Vec<Node>,
}

impl Leave<'_> {
    /// Whether the run `found` at `at` is left alone, and for how many of its bytes that answer holds.
    pub(crate) fn is_left(&self, at: GuestOffset, found: Resolved) -> Result<(u64, bool)> {
        match self {
            Self::Nothing => Ok((found.len, false)),
            Self::Absent { .. } if found.state == State::Absent => Ok((found.len, true)),
            Self::Absent { end } if reads_zero(found) && at.get() >= *end => Ok((found.len, true)),
            Self::Absent { end } if reads_zero(found) => Ok((found.len.min(end - at.get()), false)),
            Self::Absent { .. } => Ok((found.len, false)),
            Self::Same(other) => other.has(at, found),
        }
    }
}

impl Other {
    fn has(&self, at: GuestOffset, found: Resolved) -> Result<(u64, bool)> {
        if found.depth == 0 && found.state != State::Absent {
            return Ok((found.len, true));
        }
        let size = self.chain.virtual_size();
        if at.get() >= size {
            return Ok((found.len, reads_zero(found)));
        }
        let there = self.chain.map(at, found.len)?;
        let len = found.len.min(there.len);
        let same = match (reads_zero(found), reads_zero(there)) {
            (true, true) => true,
            (false, false) => self.is_same_layer(found.depth, there.depth),
            _ => false,
        };
        Ok((len, same))
    }

    /// Whether layer `here` of the source is layer `there` of the other chain: then the same byte of the disk is the
    /// same byte of the same file.
    fn is_same_layer(&self, here: usize, there: usize) -> bool {
        match (self.source.get(here), self.nodes.get(there)) {
            (Some(here), Some(there)) => {
                let plain = |node: &Node| !node.filename.starts_with("json:");
                here.id == there.id && here.facts.format == there.facts.format && plain(here) && plain(there)
            }
            _ => false,
        }
    }
}

fn reads_zero(run: Resolved) -> bool {
    matches!(run.state, State::Zero { .. } | State::Absent)
}
