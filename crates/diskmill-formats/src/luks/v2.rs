//! LUKS version 2, which is only read.

use std::sync::Arc;

use diskmill_core::{
    CheckReport, Facts, Files, FilesMut, Format, Job, Layer, LayerMut, OpenSpec, Parsed, Reference, Repair,
    Result, Storage, Value,
};

use super::layer::LuksLayer;
use super::map::Payload;
use super::{KEY_SECRET, refuse_snapshot, take, unsupported};
use crate::crypt::luks::Place;
use crate::crypt::luks2::Volume2;
use crate::crypt::{DataCipher, Numbering};

/// An image whose header has been understood.
#[derive(Debug)]
pub(super) struct Luks2Image {
    volume: Volume2,
    facts: Facts,
}

impl Luks2Image {
    /// Understands the image in `main`, whose header is there too unless `how` says where.
    pub(super) fn parse(main: &dyn Storage, how: &OpenSpec) -> Result<Self> {
        let volume = match &how.header {
            Some(header) => Volume2::load(header.as_ref(), Place::Detached),
            None => Volume2::load(main, Place::Standalone),
        }
        .map_err(|error| error.op("read the header"))?;
        let mut facts = Facts::new(Format::Luks, volume.payload_len(main.len()?)?);
        facts.encrypted = true;
        facts.specific = Some(Value::Map(volume.describe()));
        Ok(Self { volume, facts })
    }
}

impl Parsed for Luks2Image {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn references(&self) -> &[Reference] {
        &[]
    }

    fn attach(self: Box<Self>, files: Files, how: &OpenSpec) -> Result<Arc<dyn Layer>> {
        refuse_snapshot(how)?;
        let (main, header) = take(files)?;
        let start = self.volume.payload_offset();
        let cipher = match how.secrets.find(how.options.text(KEY_SECRET))? {
            None => None,
            Some(passphrase) => {
                let header = header.as_ref().unwrap_or(&main);
                let cipher = self
                    .volume
                    .unlock(header.as_ref(), passphrase.as_bytes(), Job::silent())?;
                Some(DataCipher::new(Arc::new(cipher), Numbering::Host(start)))
            }
        };
        let payload = Payload::new(start, cipher);
        Ok(Arc::new(LuksLayer::new(self.facts, payload, main)))
    }

    fn attach_mut(self: Box<Self>, _files: FilesMut, _how: &OpenSpec) -> Result<Arc<dyn LayerMut>> {
        Err(unsupported("LUKS version 2 can be read, but not written"))
    }

    fn check(self: Box<Self>, _files: Files, _how: &OpenSpec, _job: Job<'_>) -> Result<CheckReport> {
        Err(unsupported("LUKS version 2 has nothing that could be checked"))
    }

    fn repair(
        self: Box<Self>,
        _files: FilesMut,
        _how: &OpenSpec,
        _what: Repair,
        _job: Job<'_>,
    ) -> Result<CheckReport> {
        Err(unsupported("a luks image has nothing that could be repaired"))
    }
}
