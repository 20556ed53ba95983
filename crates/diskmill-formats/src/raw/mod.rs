//! raw: byte N of the disk is byte N of the file, or byte `offset` + N of it.

use std::sync::Arc;

use diskmill_core::{
    Builder, CreateSpec, DataRuns, Driver, Error, ErrorKind, FilesMut, Format, Match, Measure, OpenSpec,
    OptionSpec, OutputSpec, Parsed, Result, Sample, Storage,
};

/// The driver of raw.
pub static DRIVER: Raw = Raw;

/// The driver of raw.
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub struct Raw;

fn unsupported(what: &'static str) -> Error {
    Error::new(ErrorKind::Unsupported, what).format(Format::Raw)
}

impl Driver for Raw {
    fn format(&self) -> Format {
        Format::Raw
    }

    fn probe(&self, _sample: &Sample<'_>) -> Match {
        Match::Possible
    }

    fn parse(&self, _main: Arc<dyn Storage>, _how: &OpenSpec) -> Result<Box<dyn Parsed>> {
        Err(unsupported("opening"))
    }

    fn options(&self) -> &'static [OptionSpec] {
        &[]
    }

    fn outputs(&self, _spec: &CreateSpec) -> Result<Vec<OutputSpec>> {
        Err(unsupported("creating"))
    }

    fn build(&self, _spec: &CreateSpec, _files: FilesMut) -> Result<Box<dyn Builder>> {
        Err(unsupported("creating"))
    }

    fn measure(&self, _spec: &CreateSpec, _data: Option<&mut dyn DataRuns>) -> Result<Measure> {
        Err(unsupported("measuring"))
    }
}
