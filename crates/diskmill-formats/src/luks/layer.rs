//! Reading an image.

use std::sync::Arc;

use diskmill_core::{Extent, Facts, FileIndex, GuestOffset, Layer, Result, Storage};

use super::map::Payload;
use crate::bounds::within;

/// An image, open for reading.
#[derive(Debug)]
pub struct LuksLayer {
    facts: Facts,
    payload: Payload,
    file: Arc<dyn Storage>,
}

impl LuksLayer {
    pub(super) fn new(facts: Facts, payload: Payload, file: Arc<dyn Storage>) -> Self {
        Self { facts, payload, file }
    }
}

impl Layer for LuksLayer {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn virtual_size(&self) -> u64 {
        self.facts.virtual_size
    }

    fn map(&self, at: GuestOffset, max: u64) -> Result<Extent> {
        self.payload.extent(self.virtual_size(), at, max)
    }

    fn read_at(&self, at: GuestOffset, buf: &mut [u8]) -> Result<()> {
        within(at, buf.len() as u64, self.virtual_size())?;
        self.payload
            .read(self.file.as_ref(), at, buf)
            .map_err(|error| error.guest(at))
    }

    fn file(&self, index: FileIndex) -> Option<&Arc<dyn Storage>> {
        (index == FileIndex::MAIN).then_some(&self.file)
    }
}
