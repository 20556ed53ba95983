//! A disk as a vector of bytes, and operations to hold a layer against it.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use diskmill_core::{
    Chain, ErrorKind, GuestOffset, Layer, LayerMut, NewSnapshot, Result, Snapshots, Stored, ZeroHow,
};

use crate::contract::layer::same;
use bitmap::Bitmap;

mod bitmap;
pub mod random;

/// Something done to a disk. Positions and lengths are in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Op {
    /// Write bytes made from `fill`.
    Write {
        /// Where.
        at: u64,
        /// How many.
        len: u64,
        /// What they are made from.
        fill: u8,
    },
    /// Store a unit compressed.
    Packed {
        /// Where it starts.
        at: u64,
        /// What its bytes are made from.
        fill: u8,
    },
    /// Make zeros.
    Zero {
        /// Where.
        at: u64,
        /// How many.
        len: u64,
        /// How.
        how: ZeroHow,
    },
    /// Give bytes up.
    Discard {
        /// Where.
        at: u64,
        /// How many.
        len: u64,
    },
    /// Make everything durable.
    Flush,
    /// Give the disk another size.
    Resize {
        /// Bytes.
        size: u64,
    },
    /// Empty the layer.
    Clear,
    /// Close the image and open it again. For the caller to carry out.
    Reopen,
    /// Keep the state as a snapshot of this number. If there is one already, nothing.
    Snapshot {
        /// Which.
        number: u8,
    },
    /// Go back to a snapshot. If there is none, an error that says so.
    Apply {
        /// Which.
        number: u8,
    },
    /// Give a snapshot up. If there is none, an error that says so.
    Delete {
        /// Which.
        number: u8,
    },
    /// Do something to a dirty bitmap of this number. If that is not possible, nothing.
    Bitmap {
        /// Which.
        number: u8,
        /// What.
        action: BitmapAction,
    },
}

/// Something done to a dirty bitmap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BitmapAction {
    /// Make it, with this base-2 logarithm of the granularity.
    Add(u8),
    /// Give it up.
    Remove,
    /// Make nothing dirty.
    Clear,
    /// Record changes.
    Enable,
    /// Record none.
    Disable,
    /// Make dirty what is dirty in the one of this number.
    Merge(u8),
}

/// Compresses a unit, or `None` if it does not get smaller.
pub type Pack<'a> = &'a dyn Fn(&[u8]) -> Option<Vec<u8>>;

/// What a disk must read as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Model {
    bytes: Vec<u8>,
    snapshots: BTreeMap<String, Vec<u8>>,
    bitmaps: BTreeMap<u8, Bitmap>,
}

/// The byte at `at` of what is made from `fill`: it tells where it belongs, compresses well and is never zero.
pub fn pattern(fill: u8, at: u64) -> u8 {
    let place = (at / 64) as u8 ^ (at / 16_384) as u8;
    (fill ^ place.rotate_left(3)) | 1
}

impl Model {
    /// A disk that reads as `bytes`.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self {
            bytes,
            snapshots: BTreeMap::new(),
            bitmaps: BTreeMap::new(),
        }
    }

    /// A disk that reads as `bytes`, with snapshots that read as `snapshots`, by name.
    pub fn with_snapshots(bytes: Vec<u8>, snapshots: BTreeMap<String, Vec<u8>>) -> Self {
        Self {
            bytes,
            snapshots,
            bitmaps: BTreeMap::new(),
        }
    }

    /// What the snapshots read as, by name.
    pub fn snapshots(&self) -> &BTreeMap<String, Vec<u8>> {
        &self.snapshots
    }

    /// What it reads as.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The part of the disk that `op` is about, on which what does not lie is cut off.
    fn span(&self, op: &Op, unit: u64) -> Range<usize> {
        let (at, len) = match *op {
            Op::Write { at, len, .. } | Op::Zero { at, len, .. } | Op::Discard { at, len } => (at, len),
            Op::Packed { at, .. } => (at - at % unit, unit),
            _ => (0, u64::MAX),
        };
        let end = self.bytes.len();
        let start = (at as usize).min(end);
        start..start.saturating_add(len as usize).min(end)
    }

    /// The disk as it is to be after `op`, which works on an overlay of `below` that allocates in steps of `unit`. A
    /// discard may leave what it likes: it is taken to do nothing.
    pub fn foresee(&self, op: &Op, below: &Chain, unit: u64) -> Result<Self> {
        let mut next = self.clone();
        let span = self.span(op, unit);
        match *op {
            Op::Write { fill, .. } | Op::Packed { fill, .. } => {
                for (at, byte) in (span.start as u64..).zip(&mut next.bytes[span]) {
                    *byte = pattern(fill, at);
                }
            }
            Op::Zero { .. } => next.bytes[span].fill(0),
            Op::Resize { size } => next.bytes.resize(size as usize, 0),
            Op::Clear => below.read_at(GuestOffset::ZERO, &mut next.bytes)?,
            Op::Snapshot { number } => {
                let bytes = || self.bytes.clone();
                next.snapshots.entry(name(number)).or_insert_with(bytes);
            }
            Op::Apply { number } => {
                if let Some(bytes) = self.snapshots.get(&name(number)) {
                    next.bytes.clone_from(bytes);
                }
            }
            Op::Delete { number } => {
                next.snapshots.remove(&name(number));
            }
            Op::Bitmap { number, action } => {
                bitmap::foresee(&mut next.bitmaps, number, action, self.bytes.len())
            }
            Op::Discard { .. } | Op::Flush | Op::Reopen => {}
        }
        next.record(self, op, unit);
        Ok(next)
    }

    /// Notes in bitmaps what `op` has changed since `before`.
    fn record(&mut self, before: &Self, op: &Op, unit: u64) {
        let span = match op {
            Op::Write { .. } | Op::Packed { .. } | Op::Zero { .. } | Op::Discard { .. } => {
                before.span(op, unit)
            }
            Op::Resize { .. } | Op::Apply { .. } | Op::Clear => 0..self.bytes.len(),
            _ => return,
        };
        // Going back to a snapshot, or to what is below, is for whoever does it to reckon with.
        let counts = !matches!(op, Op::Apply { .. } | Op::Clear | Op::Resize { .. });
        for bitmap in self.bitmaps.values_mut() {
            bitmap.record(&before.bytes, &self.bytes, span.clone(), unit, counts);
        }
    }

    /// Panics unless the bitmaps of `layer` have all that was changed since they were made or cleared, and nothing else.
    #[track_caller]
    pub fn assert_bitmaps(&self, layer: &dyn Layer) {
        for (number, bitmap) in &self.bitmaps {
            bitmap.assert_is(*number, layer);
        }
    }

    /// Does `op` to this disk and to `layer`, an overlay of `below` that allocates in steps of `unit`. What does not
    /// lie on the disk is cut off. If it fails this disk is as it was.
    pub fn apply(
        &mut self,
        op: &Op,
        layer: &Arc<dyn LayerMut>,
        below: &Chain,
        unit: u64,
        pack: Pack<'_>,
    ) -> Result<()> {
        let next = self.foresee(op, below, unit)?;
        let span = self.span(op, unit);
        let at = GuestOffset::new(span.start as u64);
        let range = at..GuestOffset::new(span.end as u64);
        let done = match *op {
            Op::Write { .. } => layer.write_at(at, &next.bytes[span], below),
            Op::Packed { .. } if span.is_empty() => Ok(()),
            Op::Packed { .. } => {
                let mut whole = next.bytes[span.clone()].to_vec();
                whole.resize(unit as usize, 0);
                match pack(&whole) {
                    Some(packed) => layer.write_encoded(at, Stored::Packed(&packed), below),
                    None => layer.write_encoded(at, Stored::Plain(&next.bytes[span]), below),
                }
            }
            Op::Zero { how, .. } => layer.zero(range, how, below),
            Op::Discard { .. } => {
                layer.discard(range)?;
                return self.adopt(span.start as u64, span.len() as u64, unit, layer, below);
            }
            Op::Flush => layer.flush(),
            Op::Resize { size } => layer.resize(size, below),
            Op::Clear => layer.clear(),
            Op::Reopen => Ok(()),
            Op::Snapshot { number } if self.snapshots.contains_key(&name(number)) => Ok(()),
            Op::Snapshot { number } => {
                let new = NewSnapshot::new(name(number), 1_700_000_000, 0);
                snapshots(layer).create(&new).map(drop)
            }
            Op::Bitmap { number, action } => bitmap::carry_out(&self.bitmaps, number, action, layer),
            Op::Apply { number } => self.demand(number, snapshots(layer).apply(&name(number))),
            Op::Delete { number } => self.demand(number, snapshots(layer).delete(&name(number))),
        };
        match done {
            Ok(()) => *self = next,
            // An image that cannot do such a thing says so, and nothing must have changed.
            Err(error) if error.kind() == ErrorKind::Unsupported => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Demands that working on a snapshot that is not there fails, and says that it is not there.
    fn demand(&self, number: u8, done: Result<()>) -> Result<()> {
        if self.snapshots.contains_key(&name(number)) {
            return done;
        }
        match done {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
            Ok(()) => panic!("snapshot {number} is not there and was found"),
        }
    }

    /// Takes over what a discard left: each unit reads as before or as zeros.
    fn adopt(
        &mut self,
        start: u64,
        len: u64,
        unit: u64,
        layer: &Arc<dyn LayerMut>,
        below: &Chain,
    ) -> Result<()> {
        let found = read(layer, below)?;
        let before = self.clone();
        let mut pos = start;
        while pos < start + len {
            let end = (pos - pos % unit + unit).min(start + len);
            let range = pos as usize..end as usize;
            if found[range.clone()].iter().all(|byte| *byte == 0) {
                self.bytes[range].fill(0);
            } else {
                same(pos, &self.bytes[range.clone()], &found[range]);
            }
            pos = end;
        }
        same(0, &self.bytes, &found);
        self.record(&before, &Op::Discard { at: start, len }, unit);
        Ok(())
    }

    /// Panics unless `layer` over `below` reads as this disk.
    #[track_caller]
    pub fn assert_reads(&self, layer: &Arc<dyn LayerMut>, below: &Chain) {
        assert_eq!(
            layer.virtual_size(),
            self.bytes.len() as u64,
            "the size of the disk"
        );
        same(0, &self.bytes, &read(layer, below).expect("read the disk"));
    }
}

fn name(number: u8) -> String {
    format!("s{number}")
}

fn snapshots(layer: &Arc<dyn LayerMut>) -> &dyn Snapshots {
    layer.snapshots().expect("a format with snapshots")
}

/// All that `layer` over `below` reads as.
pub fn read(layer: &Arc<dyn LayerMut>, below: &Chain) -> Result<Vec<u8>> {
    let mut layers = vec![Arc::clone(layer) as Arc<dyn Layer>];
    layers.extend(below.layers().iter().cloned());
    let mut bytes = vec![0xa5; usize::try_from(layer.virtual_size()).expect("a small disk")];
    Chain::new(layers).read_at(GuestOffset::ZERO, &mut bytes)?;
    Ok(bytes)
}
