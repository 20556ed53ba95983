//! How much space an image would take.

use std::ops::Range;

use diskmill_core::{BitmapFacts, Chain, CreateSpec, DataRuns, Driver, GuestOffset, Measure, Result};

use super::map::Walker;
use crate::open::Image;

/// What is to be measured.
#[derive(Clone, Copy, Debug)]
pub enum Source<'a> {
    /// An empty disk of this many bytes.
    Size(u64),
    /// A disk with data.
    Image(&'a Image),
}

/// The space a new image in the format of `driver` would take for `source`. `spec` carries the format's options; its
/// virtual size is set from the source. The bytes of a source are not read, only its map.
pub fn run(driver: &dyn Driver, spec: &CreateSpec, source: Source<'_>) -> Result<Measure> {
    let mut spec = spec.clone();
    match source {
        Source::Size(bytes) => {
            spec.virtual_size = bytes;
            driver.measure(&spec, None)
        }
        Source::Image(image) => {
            spec.virtual_size = image.chain.virtual_size();
            driver.measure(&spec, Some(&mut Stored::new(&image.chain)))
        }
    }
}

/// The runs of a disk that hold data.
#[derive(Debug)]
struct Stored<'a> {
    walker: Walker<'a>,
    at: u64,
    end: u64,
    bitmaps: Option<Vec<BitmapFacts>>,
}

impl<'a> Stored<'a> {
    fn new(chain: &'a Chain) -> Self {
        Self {
            walker: Walker::new(chain),
            at: 0,
            end: chain.virtual_size(),
            bitmaps: chain.layers().first().and_then(|top| top.facts().bitmaps.clone()),
        }
    }
}

impl DataRuns for Stored<'_> {
    fn next_run(&mut self) -> Result<Option<Range<GuestOffset>>> {
        while self.at < self.end {
            let start = GuestOffset::new(self.at);
            let status = self.walker.status(start, self.end - self.at)?;
            self.at += status.len;
            if status.data && !status.zero {
                return Ok(Some(start..GuestOffset::new(self.at)));
            }
        }
        Ok(None)
    }

    fn bitmaps(&self) -> Option<&[BitmapFacts]> {
        self.bitmaps.as_deref()
    }
}
