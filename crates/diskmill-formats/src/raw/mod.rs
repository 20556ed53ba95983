//! raw: byte N of the disk is byte N of the file, or byte `offset` + N of it.

mod compact;
mod create;
mod layer;
mod write;

pub use layer::{RawError, RawLayer, View};

use std::sync::Arc;

use diskmill_core::{
    Builder, CheckReport, CompactReport, CompactSpec, CreateSpec, DataRuns, Driver, Error, ErrorKind, Facts,
    Files, FilesMut, Format, Job, Layer, LayerMut, Match, Measure, OpenSpec, OptionSpec, OutputSpec, Parsed,
    Reference, Repair, Result, Sample, Storage,
};

use crate::sketch::Sketch;

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

    fn parse(&self, main: Arc<dyn Storage>, how: &OpenSpec) -> Result<Box<dyn Parsed>> {
        let view = View::new(main.len()?, how)?;
        Ok(Box::new(RawImage {
            view,
            facts: Facts::new(Format::Raw, view.size()),
        }))
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

/// A raw image: nothing to understand but the options.
#[derive(Debug)]
pub struct RawImage {
    view: View,
    facts: Facts,
}

impl Parsed for RawImage {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn references(&self) -> &[Reference] {
        &[]
    }

    fn attach(self: Box<Self>, files: Files, how: &OpenSpec) -> Result<Arc<dyn Layer>> {
        if how.snapshot.is_some() {
            return Err(unsupported("a raw image has no internal snapshots"));
        }
        let mut files = files.into_iter();
        match files.next() {
            Some((_, main)) => Ok(Arc::new(RawLayer::new(self.view, self.facts, main))),
            None => Err(no_file()),
        }
    }

    fn attach_mut(self: Box<Self>, files: FilesMut, how: &OpenSpec) -> Result<Arc<dyn LayerMut>> {
        if how.snapshot.is_some() {
            return Err(unsupported("a raw image has no internal snapshots"));
        }
        match files.into_iter().next() {
            Some((_, main)) => Ok(Arc::new(write::RawLayerMut::new(
                self.view, self.facts, main, how.unmap,
            ))),
            None => Err(no_file()),
        }
    }

    fn check(self: Box<Self>, _files: Files, _how: &OpenSpec, _job: Job<'_>) -> Result<CheckReport> {
        Err(unsupported("a raw image has nothing to check"))
    }

    fn repair(
        self: Box<Self>,
        _files: FilesMut,
        _how: &OpenSpec,
        _what: Repair,
        _job: Job<'_>,
    ) -> Result<CheckReport> {
        Err(unsupported("a raw image has nothing to repair"))
    }

    fn compact(
        self: Box<Self>,
        files: FilesMut,
        _how: &OpenSpec,
        spec: &CompactSpec,
        job: Job<'_>,
    ) -> Result<CompactReport> {
        let (_, main) = files.into_iter().next().ok_or_else(no_file)?;
        compact::run(self.view, main.as_ref(), spec, job, false)
    }

    fn plan_compact(
        self: Box<Self>,
        files: Files,
        _how: &OpenSpec,
        spec: &CompactSpec,
        job: Job<'_>,
    ) -> Result<CompactReport> {
        let (_, main) = files.into_iter().next().ok_or_else(no_file)?;
        let sketch = Sketch::new(main)?;
        compact::run(self.view, &sketch, spec, job, true)
    }
}

fn no_file() -> Error {
    Error::new(ErrorKind::Usage, "an image needs a file")
}
