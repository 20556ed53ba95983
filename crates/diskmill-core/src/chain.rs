//! An overlay and everything it is backed by.

use std::sync::Arc;

use crate::{Error, ErrorKind, GuestOffset, Layer, Result, State};

/// The layers of a disk, resolved: index 0 is the overlay on top, the last is the base. An empty chain reads as
/// nothing at all: its size is 0.
///
/// The index is the `depth` of `qemu-img map`.
#[derive(Clone, Debug, Default)]
pub struct Chain {
    layers: Vec<Arc<dyn Layer>>,
}

/// What a run of guest bytes is, and whose word that is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resolved {
    /// Bytes in the run: at least 1.
    pub len: u64,
    /// What they are. [`State::Absent`] when no layer has them: they read as zeros.
    pub state: State,
    /// Index of the layer that has them; of the base if none has; of the layer that ends too soon if an upper one
    /// asks past a shorter one's end.
    pub depth: usize,
    /// Whether the run lies past the end of layer `depth`, which therefore reads as zeros there.
    pub past_end: bool,
}

impl Chain {
    /// The chain of `layers`, overlay first.
    pub fn new(layers: Vec<Arc<dyn Layer>>) -> Self {
        Self { layers }
    }

    /// The layers, overlay first.
    pub fn layers(&self) -> &[Arc<dyn Layer>] {
        &self.layers
    }

    /// The chain under the top layer.
    #[must_use]
    pub fn below(&self) -> Self {
        Self {
            layers: self.layers.iter().skip(1).cloned().collect(),
        }
    }

    /// Whether there is no layer.
    pub fn is_empty(&self) -> bool {
        self.layers.is_empty()
    }

    /// The size of the disk: the top layer's.
    pub fn virtual_size(&self) -> u64 {
        self.layers.first().map_or(0, |top| top.virtual_size())
    }

    /// What the bytes from `at` are. `at` must be below the virtual size; `max` bounds the run.
    pub fn map(&self, at: GuestOffset, max: u64) -> Result<Resolved> {
        let size = self.virtual_size();
        if at.get() >= size || max == 0 {
            return Err(Error::new(
                ErrorKind::Usage,
                format!("{max} bytes at {at} are not within the disk of {size} bytes"),
            ));
        }
        let mut len = max.min(size - at.get());
        let mut depth = 0;
        for (index, layer) in self.layers.iter().enumerate() {
            depth = index;
            let end = layer.virtual_size();
            if at.get() >= end {
                return Ok(Resolved {
                    len,
                    state: State::Zero { reserved: None },
                    depth,
                    past_end: true,
                });
            }
            len = len.min(end - at.get());
            let extent = layer.map(at, len)?;
            len = len.min(extent.len).max(1);
            if extent.state != State::Absent {
                return Ok(Resolved {
                    len,
                    state: extent.state,
                    depth,
                    past_end: false,
                });
            }
        }
        Ok(Resolved {
            len,
            state: State::Absent,
            depth,
            past_end: false,
        })
    }

    /// Fills `buf` from `at`. Bytes past the end of the disk read as zeros.
    pub fn read_at(&self, at: GuestOffset, buf: &mut [u8]) -> Result<()> {
        let mut at = at;
        let mut rest = buf;
        while !rest.is_empty() {
            if at.get() >= self.virtual_size() {
                rest.fill(0);
                return Ok(());
            }
            let run = self.map(at, rest.len() as u64)?;
            let len = usize::try_from(run.len).unwrap_or(usize::MAX).min(rest.len());
            let (now, later) = rest.split_at_mut(len);
            match run.state {
                State::Zero { .. } | State::Absent => now.fill(0),
                _ => match self.layers.get(run.depth) {
                    Some(layer) => layer.read_at(at, now)?,
                    None => now.fill(0),
                },
            }
            at = at.plus(len as u64)?;
            rest = later;
        }
        Ok(())
    }
}
