//! qcow2, versions 2 and 3: QEMU's own format.
//!
//! ```text
//! cluster 0   header | extensions, 8-byte aligned | backing file name
//! anywhere    refcount table -> refcount blocks      one count for each cluster of the file
//!             L1 table -> L2 tables -> data clusters  guest offset = l1 index . l2 index . byte in cluster
//!             snapshot table -> a further L1 table each
//!             bitmap directory -> bitmap tables -> bitmap data
//! ```
//!
//! All integers are big-endian, and all structures but compressed data start on a cluster.

pub mod extension;
pub mod header;
pub mod layout;
pub mod map;
mod measure;
pub mod options;

use std::sync::Arc;

use diskmill_core::{
    Builder, CreateSpec, DataRuns, Driver, Error, ErrorKind, FilesMut, Format, Match, Measure, OpenSpec,
    OptionSpec, OutputSpec, Parsed, Result, Sample, Storage,
};
use zerocopy::FromBytes;
use zerocopy::byteorder::big_endian::U32;

/// The driver of qcow2.
pub static DRIVER: Qcow2 = Qcow2;

/// The driver of qcow2.
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub struct Qcow2;

fn unsupported(what: &'static str) -> Error {
    Error::new(ErrorKind::Unsupported, what).format(Format::Qcow2)
}

impl Driver for Qcow2 {
    fn format(&self) -> Format {
        Format::Qcow2
    }

    fn probe(&self, sample: &Sample<'_>) -> Match {
        match <[U32; 2]>::read_from_prefix(sample.head) {
            Ok(([magic, version], _)) if magic.get() == layout::MAGIC && version.get() >= 2 => Match::ByMagic,
            _ => Match::No,
        }
    }

    fn parse(&self, _main: Arc<dyn Storage>, _how: &OpenSpec) -> Result<Box<dyn Parsed>> {
        Err(unsupported("opening"))
    }

    fn options(&self) -> &'static [OptionSpec] {
        options::OPTIONS
    }

    fn outputs(&self, _spec: &CreateSpec) -> Result<Vec<OutputSpec>> {
        Err(unsupported("creating"))
    }

    fn build(&self, _spec: &CreateSpec, _files: FilesMut) -> Result<Box<dyn Builder>> {
        Err(unsupported("creating"))
    }

    fn measure(&self, spec: &CreateSpec, data: Option<&mut dyn DataRuns>) -> Result<Measure> {
        measure::measure(spec, data)
    }
}
