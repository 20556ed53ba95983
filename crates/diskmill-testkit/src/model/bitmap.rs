//! Dirty bitmaps of a model: what they must say, and what they may.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use diskmill_core::{Layer, LayerMut, NewBitmap, Result};

use super::BitmapAction;

const SECTOR: usize = 512;

/// A dirty bitmap. Of each sector it knows whether it was changed, and whether a change was so near that it may count
/// as changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Bitmap {
    granularity: u64,
    enabled: bool,
    must: Vec<bool>,
    may: Vec<bool>,
}

fn name(number: u8) -> String {
    format!("b{number}")
}

/// Sets the flags of the sectors that `bytes` touches.
fn set(flags: &mut [bool], bytes: Range<usize>) {
    let end = bytes.end.div_ceil(SECTOR).min(flags.len());
    if let Some(flags) = flags.get_mut(bytes.start / SECTOR..end) {
        flags.fill(true);
    }
}

impl Bitmap {
    fn new(granularity: u64, len: usize) -> Self {
        let none = vec![false; len.div_ceil(SECTOR)];
        Self {
            granularity,
            enabled: true,
            must: none.clone(),
            may: none,
        }
    }

    /// Notes that `span` was written to, in an image that allocates in steps of `unit`. Where it then reads as it did,
    /// or if it does not count, it may be recorded or not.
    pub(super) fn record(
        &mut self,
        before: &[u8],
        after: &[u8],
        span: Range<usize>,
        unit: u64,
        counts: bool,
    ) {
        let sectors = after.len().div_ceil(SECTOR);
        let old = self.may.len();
        self.must.resize(sectors, false);
        self.may.resize(sectors, false);
        // A granule that the disk ended in is dirty as a whole, also where it grows.
        let granule = self.granularity as usize / SECTOR;
        let first = old / granule * granule;
        if self.may[first.min(sectors)..old.min(sectors)].contains(&true) {
            let end = (first + granule).min(sectors);
            self.may[old.min(end)..end].fill(true);
        }
        if !self.enabled || span.is_empty() {
            return;
        }
        let step = self.granularity.max(unit) as usize;
        set(
            &mut self.may,
            span.start / step * step..span.end.div_ceil(step) * step,
        );
        if counts {
            for at in span.clone().step_by(SECTOR) {
                let part = at..(at + SECTOR).min(span.end);
                if before.get(part.clone()) != after.get(part.clone()) {
                    set(&mut self.must, part);
                }
            }
        }
    }

    #[track_caller]
    pub(super) fn assert_is(&self, number: u8, layer: &dyn Layer) {
        let mut runs = layer.dirty(&name(number)).expect("a bitmap");
        let mut found = vec![false; self.must.len()];
        while let Some(run) = runs.next_run().expect("a run") {
            set(&mut found, run.start.get() as usize..run.end.get() as usize);
        }
        for (sector, found) in found.into_iter().enumerate() {
            assert!(
                found || !self.must[sector],
                "bitmap {number} lacks the change of sector {sector}"
            );
            assert!(
                !found || self.may[sector],
                "bitmap {number} has sector {sector}, which was not changed"
            );
        }
    }
}

/// What there is after `action`.
pub(super) fn foresee(bitmaps: &mut BTreeMap<u8, Bitmap>, number: u8, action: BitmapAction, len: usize) {
    match action {
        BitmapAction::Add(bits) => {
            bitmaps
                .entry(number)
                .or_insert_with(|| Bitmap::new(1 << bits, len));
        }
        BitmapAction::Remove => {
            bitmaps.remove(&number);
        }
        BitmapAction::Merge(from) => {
            let Some(from) = bitmaps.get(&from).cloned() else {
                return;
            };
            if let Some(bitmap) = bitmaps.get_mut(&number) {
                let step = bitmap.granularity as usize;
                for sector in 0..from.may.len() {
                    bitmap.must[sector] |= from.must[sector];
                    if from.may[sector] {
                        let at = sector * SECTOR;
                        set(
                            &mut bitmap.may,
                            at / step * step..(at + SECTOR).div_ceil(step) * step,
                        );
                    }
                }
            }
        }
        BitmapAction::Clear | BitmapAction::Enable | BitmapAction::Disable => {
            if let Some(bitmap) = bitmaps.get_mut(&number) {
                match action {
                    BitmapAction::Clear => {
                        *bitmap = Bitmap {
                            enabled: bitmap.enabled,
                            ..Bitmap::new(bitmap.granularity, len)
                        }
                    }
                    other => bitmap.enabled = other == BitmapAction::Enable,
                }
            }
        }
    }
}

/// Does `action` to `layer`, unless `bitmaps`, which it has, make it impossible.
pub(super) fn carry_out(
    bitmaps: &BTreeMap<u8, Bitmap>,
    number: u8,
    action: BitmapAction,
    layer: &Arc<dyn LayerMut>,
) -> Result<()> {
    let inside = layer.bitmaps().expect("a format with bitmaps");
    let name_of = name;
    let name = name(number);
    let is_there = bitmaps.contains_key(&number);
    match action {
        BitmapAction::Add(bits) if !is_there => {
            let new = NewBitmap {
                name,
                granularity: Some(1 << bits),
                enabled: true,
            };
            inside.add(&new).map(drop)
        }
        BitmapAction::Merge(from) if is_there && bitmaps.contains_key(&from) => {
            inside.merge(&name, layer.dirty(&name_of(from))?.as_mut())
        }
        BitmapAction::Remove if is_there => inside.remove(&name),
        BitmapAction::Clear if is_there => inside.clear(&name),
        BitmapAction::Enable if is_there => inside.enable(&name),
        BitmapAction::Disable if is_there => inside.disable(&name),
        _ => Ok(()),
    }
}
