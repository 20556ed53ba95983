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

pub mod amend;
mod backing;
pub mod bitmap;
mod cache;
mod check;
mod compact;
mod cow;
pub mod create;
mod crypto;
pub mod extension;
mod fence;
pub mod header;
mod hollow;
mod layer;
pub mod layout;
pub mod map;
mod measure;
pub mod options;
mod refcount;
mod reserve;
mod resize;
pub mod run;
mod slot;
pub mod snapshot;
mod tables;
mod write;
mod zero;

pub use crypto::EncryptionError;
pub use layer::{PlaceError, Qcow2Layer};
pub use resize::ResizeError;

use std::sync::Arc;

use diskmill_core::{
    BackingName, Builder, CheckReport, CompactReport, CompactSpec, CreateSpec, DataRuns, Driver, Error,
    ErrorKind, Facts, Files, FilesMut, Format, HostOffset, Job, Layer, LayerMut, Match, Measure, OpenSpec,
    OptionError, OptionSpec, OutputSpec, Parsed, Reference, Repair, Result, Role, Sample, Storage, Value,
};
use zerocopy::FromBytes;
use zerocopy::byteorder::big_endian::U32;

use crate::crypt::luks;
use crate::flight;
use header::{Autoclear, Compatible, CryptMethod, Header, HeaderError, Incompatible, Version};
use layout::V2_HEADER_LEN;

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

    fn parse(&self, main: Arc<dyn Storage>, how: &OpenSpec) -> Result<Box<dyn Parsed>> {
        Ok(Box::new(Qcow2Image::parse(main.as_ref(), how)?))
    }

    fn options(&self) -> &'static [OptionSpec] {
        options::OPTIONS
    }

    fn amend_options(&self) -> &'static [OptionSpec] {
        amend::OPTIONS
    }

    fn outputs(&self, spec: &CreateSpec) -> Result<Vec<OutputSpec>> {
        create::outputs(spec)
    }

    fn build(&self, spec: &CreateSpec, files: FilesMut) -> Result<Box<dyn Builder>> {
        create::build(spec, files)
    }

    fn measure(&self, spec: &CreateSpec, data: Option<&mut dyn DataRuns>) -> Result<Measure> {
        measure::measure(spec, data)
    }
}

/// An image whose header, snapshot table and bitmap directory have been understood.
#[derive(Debug)]
pub struct Qcow2Image {
    header: Header,
    facts: Facts,
    references: Vec<Reference>,
}

impl Qcow2Image {
    /// Understands the image in `main`.
    pub fn parse(main: &dyn Storage, how: &OpenSpec) -> Result<Self> {
        let header = read_header(main)?;
        if header.refcount_table_clusters == 0 && !how.for_check {
            return Err(HeaderError::Range {
                field: "refcount_table_clusters",
                value: 0,
                allowed: "at least 1",
            }
            .into());
        }
        if header.nb_snapshots > layout::SNAPSHOTS_MAX && !how.for_check {
            return Err(HeaderError::Range {
                field: "nb_snapshots",
                value: header.nb_snapshots.into(),
                allowed: "0 to 65536",
            }
            .into());
        }
        let mut on_problem = |problem: snapshot::SnapshotError| match how.for_check {
            true => Ok(()),
            false => Err(problem.into()),
        };
        let snapshots = match snapshot::read_table_with(main, &header, &how.limits, &mut on_problem) {
            Ok((snapshots, _)) => snapshots,
            Err(_) if how.for_check => Vec::new(),
            Err(error) => return Err(error.op("read the snapshot table")),
        };
        let bitmaps = match bitmap::read_directory(main, &header, &how.limits) {
            Ok(bitmaps) => bitmaps,
            Err(_) if how.for_check => Vec::new(),
            Err(error) => return Err(error.op("read the bitmap directory")),
        };
        let mut facts = Facts::new(Format::Qcow2, header.virtual_size());
        facts.unit = Some(header.cluster_bits.cluster_size());
        facts.granule = header
            .extended_l2()
            .then(|| 1 << header.geometry().granule_bits());
        facts.encrypted = header.crypt_method != CryptMethod::None;
        facts.dirty = header.incompatible.has(Incompatible::DIRTY);
        facts.corrupt = header.incompatible.has(Incompatible::CORRUPT);
        facts.backing = header.backing();
        facts.snapshots = snapshots.into_iter().map(|snapshot| snapshot.facts).collect();
        facts.bitmaps =
            (header.version == Version::V3).then(|| bitmaps.iter().map(bitmap::Bitmap::facts).collect());
        let encrypt = describe_encryption(main, &header, how)?;
        facts.specific = Some(describe(&header, &bitmaps, encrypt));
        let mut references = Vec::new();
        if header.has_data_file() {
            let name = header.data_file_name().ok_or_else(|| {
                Error::new(ErrorKind::Malformed, "'data-file' is required for this image")
                    .format(Format::Qcow2)
            })?;
            references.push(Reference {
                role: Role::Data,
                name: BackingName {
                    name,
                    format: Some(Format::Raw.name().to_owned()),
                },
            });
        }
        if let Some(name) = facts.backing.clone() {
            references.push(Reference {
                role: Role::Backing,
                name,
            });
        }
        Ok(Self {
            header,
            facts,
            references,
        })
    }

    /// The header.
    pub fn header(&self) -> &Header {
        &self.header
    }
}

impl Parsed for Qcow2Image {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn references(&self) -> &[Reference] {
        &self.references
    }

    fn attach(self: Box<Self>, files: Files, how: &OpenSpec) -> Result<Arc<dyn Layer>> {
        Ok(Arc::new(layer::attach(&self.header, self.facts, files, how)?))
    }

    fn attach_mut(self: Box<Self>, files: FilesMut, how: &OpenSpec) -> Result<Arc<dyn LayerMut>> {
        check_options(how)?;
        if how.snapshot.is_some() {
            return Err(unsupported("writing to an internal snapshot"));
        }
        Ok(Arc::new(write::Image::open(
            &self.header,
            self.facts,
            files,
            how,
        )?))
    }

    fn check(self: Box<Self>, files: Files, how: &OpenSpec, job: Job<'_>) -> Result<CheckReport> {
        check::run(&self.header, &files, how, job)
    }

    fn repair(
        self: Box<Self>,
        files: FilesMut,
        how: &OpenSpec,
        what: Repair,
        job: Job<'_>,
    ) -> Result<CheckReport> {
        check::repair::run(&self.header, &files, how, what, job)
    }

    fn compact(
        self: Box<Self>,
        files: FilesMut,
        how: &OpenSpec,
        spec: &CompactSpec,
        job: Job<'_>,
    ) -> Result<CompactReport> {
        compact::run(&self, files, how, spec, job)
    }

    fn plan_compact(
        self: Box<Self>,
        files: Files,
        how: &OpenSpec,
        spec: &CompactSpec,
        job: Job<'_>,
    ) -> Result<CompactReport> {
        compact::plan(&self, files, how, spec, job)
    }
}

/// Reads and understands the header.
pub fn read_header(main: &dyn Storage) -> Result<Header> {
    let len = main.len()?;
    let mut bytes = Vec::new();
    read_start(main, len, V2_HEADER_LEN as usize, &mut bytes)?;
    let area = Header::area_len(&bytes)?;
    read_start(main, len, area, &mut bytes)?;
    Ok(Header::parse(&bytes)?)
}

/// Reads `wanted` bytes, fewer if the file is shorter.
fn read_start(main: &dyn Storage, file_len: u64, wanted: usize, bytes: &mut Vec<u8>) -> Result<()> {
    let have = usize::try_from(file_len).unwrap_or(usize::MAX).min(wanted);
    bytes.resize(have, 0);
    main.read_at(HostOffset::ZERO, bytes)
}

/// Fails on an option that no image of this format has.
fn check_options(how: &OpenSpec) -> Result<()> {
    let known = |name| TUNING.contains(&name) || [crypto::FORMAT, crypto::KEY_SECRET].contains(&name);
    match how.options.iter().find(|(name, _)| !known(name)) {
        Some((name, _)) => Err(OptionError::Unknown(name.to_owned()).into()),
        None => Ok(()),
    }
}

/// Run-time options that tune QEMU's driver and change no byte of what is read: taken, without effect.
static TUNING: [&str; 13] = [
    "cache-clean-interval",
    "cache-size",
    "discard-no-unref",
    "l2-cache-entry-size",
    "l2-cache-size",
    "lazy-refcounts",
    "overlap-check",
    "overlap-check.template",
    "pass-discard-other",
    "pass-discard-request",
    "pass-discard-snapshot",
    "refcount-cache-size",
    "detect-zeroes",
];

/// What `info` shows of the encryption.
fn describe_encryption(
    main: &dyn Storage,
    header: &Header,
    how: &OpenSpec,
) -> Result<Option<Vec<(&'static str, Value)>>> {
    match (header.crypt_method, crypto::place_of(header)) {
        (CryptMethod::None, _) => Ok(None),
        (CryptMethod::Luks, Some(place)) => match luks::describe(main, place) {
            Ok(facts) => Ok(Some(facts)),
            Err(_) if how.for_check => Ok(None),
            Err(error) => Err(error.op("read the LUKS header")),
        },
        (CryptMethod::Aes | CryptMethod::Luks, _) => {
            Ok(Some(vec![("format", Value::Text("aes".to_owned()))]))
        }
    }
}

/// What `info` shows of a qcow2 image alone.
fn describe(
    header: &Header,
    bitmaps: &[bitmap::Bitmap],
    encrypt: Option<Vec<(&'static str, Value)>>,
) -> Value {
    let mut map = vec![
        ("compat", Value::Text(header.version.compat().to_owned())),
        (
            "compression-type",
            Value::Text(header.compression_type.name().to_owned()),
        ),
    ];
    let is_v3 = header.version == Version::V3;
    if is_v3 {
        let lazy = header.compatible.has(Compatible::LAZY_REFCOUNTS);
        map.push(("lazy-refcounts", Value::Bool(lazy)));
    }
    if !bitmaps.is_empty() {
        let bitmaps = bitmaps.iter().map(bitmap::Bitmap::describe).collect();
        map.push(("bitmaps", Value::List(bitmaps)));
    }
    map.push(("refcount-bits", Value::Int(header.refcount_order.bits().into())));
    if let Some(name) = header.data_file_name() {
        let raw = header.autoclear.has(Autoclear::RAW_DATA_FILE);
        map.push(("data-file", Value::Text(name)));
        map.push(("data-file-raw", Value::Bool(raw)));
    }
    if let Some(encrypt) = encrypt {
        map.push(("encrypt", Value::Map(encrypt)));
    }
    if is_v3 {
        map.push((
            "corrupt",
            Value::Bool(header.incompatible.has(Incompatible::CORRUPT)),
        ));
        map.push(("extended-l2", Value::Bool(header.extended_l2())));
    }
    Value::Map(map)
}
