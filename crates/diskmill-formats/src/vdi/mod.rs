//! vdi: VirtualBox's own format.
//!
//! ```text
//! 0             text | signature | version | header         one sector
//! blocks_offset block map: one entry for each MiB of the disk
//! data_offset   slot 0 | slot 1 | ...                       1 MiB each
//! ```
//!
//! A block of the disk is free (zeros, or the parent's bytes), zero, or in a slot. Slots are dense: a program that adds
//! a block puts it behind the last one, where `blocks_allocated` says that is. A differencing image names its parent by
//! UUID only. All integers are little-endian.

mod check;
mod compact;
mod create;
pub mod header;
mod layer;
pub mod layout;
pub mod map;
mod options;
mod resize;
mod tables;
pub mod uuid;
mod write;

pub use layer::VdiLayer;

use std::sync::Arc;

use diskmill_core::{
    Builder, CheckReport, CompactReport, CompactSpec, CreateSpec, DataRuns, Driver, Error, ErrorKind, Facts,
    Files, FilesMut, Format, HostOffset, Identity, Job, Layer, LayerMut, Match, Measure, OpenSpec,
    OptionError, OptionSpec, OutputSpec, Parsed, Reference, Repair, Result, Sample, Storage, Value,
};

use header::{HEAD_LEN, Header};
use layout::{BLOCK, SIGNATURE, SIGNATURE_AT};

/// The driver of vdi.
pub static DRIVER: Vdi = Vdi;

/// The driver of vdi.
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub struct Vdi;

fn unsupported(what: &'static str) -> Error {
    Error::new(ErrorKind::Unsupported, what).format(Format::Vdi)
}

impl Driver for Vdi {
    fn format(&self) -> Format {
        Format::Vdi
    }

    fn probe(&self, sample: &Sample<'_>) -> Match {
        match sample.head.get(SIGNATURE_AT..) {
            Some(rest) if rest.starts_with(&SIGNATURE.to_le_bytes()) => Match::ByMagic,
            _ => Match::No,
        }
    }

    fn parse(&self, main: Arc<dyn Storage>, how: &OpenSpec) -> Result<Box<dyn Parsed>> {
        if let Some((name, _)) = how.options.iter().next() {
            return Err(OptionError::Unknown(name.to_owned()).into());
        }
        Ok(Box::new(VdiImage::parse(main.as_ref())?))
    }

    fn options(&self) -> &'static [OptionSpec] {
        options::OPTIONS
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

/// An image whose header has been understood.
#[derive(Debug)]
pub struct VdiImage {
    header: Header,
    facts: Facts,
}

impl VdiImage {
    /// Understands the image in `main`.
    pub fn parse(main: &dyn Storage) -> Result<Self> {
        let header = read_header(main)?;
        let mut facts = Facts::new(Format::Vdi, header.virtual_size());
        facts.unit = Some(BLOCK);
        facts.details = Some(describe(&header));
        facts.identity = (!header.uuid_create.is_nil()).then_some(Identity {
            image: header.uuid_create.0,
            state: header.uuid_modify.0,
        });
        facts.parent = header.is_diff().then_some(Identity {
            image: header.uuid_link.0,
            state: header.uuid_parent_modify.0,
        });
        Ok(Self { header, facts })
    }

    /// The header.
    pub fn header(&self) -> &Header {
        &self.header
    }
}

/// Reads and understands the header.
pub fn read_header(main: &dyn Storage) -> Result<Header> {
    let len = main.len()?;
    let mut head = vec![0; usize::try_from(len).unwrap_or(usize::MAX).min(HEAD_LEN)];
    main.read_at(HostOffset::ZERO, &mut head)
        .map_err(|error| error.op("read the header"))?;
    Ok(Header::parse(&head, len)?)
}

/// The only file of an image.
fn only<T>(files: Vec<T>) -> Result<T> {
    match files.into_iter().next() {
        Some(file) => Ok(file),
        None => Err(Error::new(ErrorKind::Usage, "an image needs a file")),
    }
}

fn refuse_snapshot(how: &OpenSpec) -> Result<()> {
    match how.snapshot {
        Some(_) => Err(unsupported("a vdi image has no internal snapshots")),
        None => Ok(()),
    }
}

impl Parsed for VdiImage {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn references(&self) -> &[Reference] {
        &[]
    }

    fn attach(self: Box<Self>, files: Files, how: &OpenSpec) -> Result<Arc<dyn Layer>> {
        refuse_snapshot(how)?;
        let (_, main) = only(files)?;
        Ok(Arc::new(VdiLayer::open(
            self.header,
            self.facts,
            main,
            &how.limits,
        )?))
    }

    fn attach_mut(self: Box<Self>, files: FilesMut, how: &OpenSpec) -> Result<Arc<dyn LayerMut>> {
        refuse_snapshot(how)?;
        let (_, main) = only(files)?;
        Ok(Arc::new(write::Image::open(self.header, self.facts, main, how)?))
    }

    fn check(self: Box<Self>, files: Files, how: &OpenSpec, job: Job<'_>) -> Result<CheckReport> {
        let (_, main) = only(files)?;
        check::run(&self.header, main.as_ref(), how, job)
    }

    fn repair(
        self: Box<Self>,
        files: FilesMut,
        how: &OpenSpec,
        what: Repair,
        job: Job<'_>,
    ) -> Result<CheckReport> {
        let (_, main) = only(files)?;
        check::repair(&self.header, &main, how, what, job)
    }

    fn compact(
        self: Box<Self>,
        files: FilesMut,
        how: &OpenSpec,
        spec: &CompactSpec,
        job: Job<'_>,
    ) -> Result<CompactReport> {
        let (_, main) = only(files)?;
        compact::run(self.header, main, how, spec, job)
    }

    fn plan_compact(
        self: Box<Self>,
        files: Files,
        how: &OpenSpec,
        spec: &CompactSpec,
        job: Job<'_>,
    ) -> Result<CompactReport> {
        let (_, main) = only(files)?;
        compact::plan(&self.header, main.as_ref(), how, spec, job)
    }
}

/// What `info` shows of a vdi image alone.
fn describe(header: &Header) -> Value {
    let text = |text: String| Value::Text(text);
    let mut map = vec![
        ("image-type", text(header.image_type.name().to_owned())),
        (
            "version",
            text(format!("{}.{}", header.version >> 16, header.version & 0xffff)),
        ),
        ("block-size", Value::Int(BLOCK)),
        ("blocks", Value::Int(header.blocks.into())),
        ("blocks-allocated", Value::Int(header.blocks_allocated.into())),
        ("data-offset", Value::Int(header.data_offset.into())),
        ("uuid", text(header.uuid_create.to_string())),
        ("uuid-modification", text(header.uuid_modify.to_string())),
    ];
    if header.is_diff() {
        map.push(("uuid-parent", text(header.uuid_link.to_string())));
        map.push((
            "uuid-parent-modification",
            text(header.uuid_parent_modify.to_string()),
        ));
    }
    let geometries = [
        ("geometry", Some(header.geometry)),
        ("logical-geometry", header.logical_geometry),
    ];
    for (name, geometry) in geometries {
        if let Some([cylinders, heads, sectors]) = geometry.filter(|geometry| *geometry != [0; 3]) {
            map.push((name, text(format!("{cylinders}/{heads}/{sectors}"))));
        }
    }
    map.push(("creator", text(header.creator())));
    if !header.comment().is_empty() {
        map.push(("comment", text(header.comment())));
    }
    Value::Map(map)
}
