//! Reading an image.

use std::sync::Arc;

use diskmill_core::{Extent, Facts, FileIndex, GuestOffset, Layer, Limits, Result, Storage};

use super::header::{Header, ImageType};
use super::map::BlockMap;
use crate::bounds::within;

/// An image, open for reading.
#[derive(Debug)]
pub struct VdiLayer {
    facts: Facts,
    header: Header,
    map: BlockMap,
    file: Arc<dyn Storage>,
    file_len: u64,
}

impl VdiLayer {
    pub(super) fn open(
        header: Header,
        facts: Facts,
        file: Arc<dyn Storage>,
        limits: &Limits,
    ) -> Result<Self> {
        Ok(Self {
            map: BlockMap::load(file.as_ref(), &header, limits)?,
            file_len: file.len()?,
            facts,
            header,
            file,
        })
    }
}

impl Layer for VdiLayer {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn virtual_size(&self) -> u64 {
        self.header.virtual_size()
    }

    fn map(&self, at: GuestOffset, max: u64) -> Result<Extent> {
        self.map.extent(at, max, &self.header, self.file_len)
    }

    fn read_at(&self, at: GuestOffset, buf: &mut [u8]) -> Result<()> {
        within(at, buf.len() as u64, self.virtual_size())?;
        self.map
            .read(self.file.as_ref(), at, buf, &self.header, self.file_len)
    }

    fn file(&self, index: FileIndex) -> Option<&Arc<dyn Storage>> {
        (index == FileIndex::MAIN).then_some(&self.file)
    }

    fn is_hollow(&self) -> Result<bool> {
        Ok(self.header.image_type == ImageType::Fixed)
    }
}
