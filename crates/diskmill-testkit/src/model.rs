//! A disk as a vector of bytes, and operations to hold a layer against it.

use std::sync::Arc;

use diskmill_core::{Chain, GuestOffset, Layer, LayerMut, Result, Stored, ZeroHow};

use crate::contract::layer::same;

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
}

/// Compresses a unit, or `None` if it does not get smaller.
pub type Pack<'a> = &'a dyn Fn(&[u8]) -> Option<Vec<u8>>;

/// What a disk must read as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Model {
    bytes: Vec<u8>,
}

/// The byte at `at` of what is made from `fill`: it tells where it belongs, compresses well and is never zero.
pub fn pattern(fill: u8, at: u64) -> u8 {
    let place = (at / 64) as u8 ^ (at / 16_384) as u8;
    (fill ^ place.rotate_left(3)) | 1
}

impl Model {
    /// A disk that reads as `bytes`.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self { bytes }
    }

    /// What it reads as.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    fn fill(&mut self, at: u64, len: u64, fill: u8) -> Vec<u8> {
        let bytes: Vec<u8> = (at..at + len).map(|at| pattern(fill, at)).collect();
        self.bytes[at as usize..(at + len) as usize].copy_from_slice(&bytes);
        bytes
    }

    /// Does `op` to this disk and to `layer`, an overlay of `below` that allocates in steps of `unit`. What does not
    /// lie on the disk is cut off.
    pub fn apply(
        &mut self,
        op: &Op,
        layer: &Arc<dyn LayerMut>,
        below: &Chain,
        unit: u64,
        pack: Pack<'_>,
    ) -> Result<()> {
        let size = self.bytes.len() as u64;
        let clip = |at: u64, len: u64| (at.min(size), len.min(size - at.min(size)));
        let at = GuestOffset::new;
        match *op {
            Op::Write { at: start, len, fill } => {
                let (start, len) = clip(start, len);
                let bytes = self.fill(start, len, fill);
                layer.write_at(at(start), &bytes, below)
            }
            Op::Packed { at: start, fill } => {
                let start = start - start % unit;
                let (start, len) = clip(start, unit);
                if len == 0 {
                    return Ok(());
                }
                let mut bytes = self.fill(start, len, fill);
                bytes.resize(unit as usize, 0);
                match pack(&bytes) {
                    Some(packed) => layer.write_encoded(at(start), Stored::Packed(&packed), below),
                    None => {
                        bytes.truncate(len as usize);
                        layer.write_encoded(at(start), Stored::Plain(&bytes), below)
                    }
                }
            }
            Op::Zero { at: start, len, how } => {
                let (start, len) = clip(start, len);
                self.bytes[start as usize..(start + len) as usize].fill(0);
                layer.zero(at(start)..at(start + len), how, below)
            }
            Op::Discard { at: start, len } => {
                let (start, len) = clip(start, len);
                layer.discard(at(start)..at(start + len))?;
                self.adopt(start, len, unit, layer, below)
            }
            Op::Flush => layer.flush(),
            Op::Resize { size } => {
                self.bytes.resize(size as usize, 0);
                layer.resize(size, below)
            }
            Op::Clear => {
                layer.clear()?;
                let size = usize::try_from(below.virtual_size())
                    .expect("a small disk")
                    .min(self.bytes.len());
                let (inner, outer) = self.bytes.split_at_mut(size);
                below.read_at(GuestOffset::ZERO, inner)?;
                outer.fill(0);
                Ok(())
            }
            Op::Reopen => Ok(()),
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

/// All that `layer` over `below` reads as.
pub fn read(layer: &Arc<dyn LayerMut>, below: &Chain) -> Result<Vec<u8>> {
    let mut layers = vec![Arc::clone(layer) as Arc<dyn Layer>];
    layers.extend(below.layers().iter().cloned());
    let mut bytes = vec![0xa5; usize::try_from(layer.virtual_size()).expect("a small disk")];
    Chain::new(layers).read_at(GuestOffset::ZERO, &mut bytes)?;
    Ok(bytes)
}
