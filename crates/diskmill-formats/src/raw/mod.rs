//! raw: byte N of the disk is byte N of the file, or byte `offset` + N of it.

mod create;

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
        create::OPTIONS
    }

    fn outputs(&self, spec: &CreateSpec) -> Result<Vec<OutputSpec>> {
        create::outputs(spec)
    }

    fn build(&self, spec: &CreateSpec, files: FilesMut) -> Result<Box<dyn Builder>> {
        create::build(spec, files)
    }

    fn measure(&self, spec: &CreateSpec, data: Option<&mut dyn DataRuns>) -> Result<Measure> {
        create::measure(spec, data)
    }
}
