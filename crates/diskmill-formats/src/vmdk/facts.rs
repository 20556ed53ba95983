//! What a disk says of itself.

use diskmill_core::{BackingName, Facts, FileIndex, Format, SECTOR, Value};

use super::VmdkImage;
use super::descriptor::{Access, Descriptor};
use super::header::{Flags, Header};
use super::layer::{Body, Part};

/// What is known before further files are opened.
pub(super) fn of_descriptor(descriptor: &Descriptor, virtual_size: u64) -> Facts {
    let mut facts = Facts::new(Format::Vmdk, virtual_size);
    facts.content_id = Some(descriptor.cid);
    if let Some(name) = &descriptor.parent {
        facts.backing_content_id = Some(descriptor.parent_cid);
        facts.backing = Some(BackingName {
            name: name.clone(),
            format: Some(Format::Vmdk.name().to_owned()),
        });
    }
    facts
}

/// An extent as `info` lists it.
#[derive(Debug)]
pub(super) struct Listed<'a> {
    pub(super) file: FileIndex,
    pub(super) kind: &'static str,
    pub(super) len: u64,
    pub(super) grain: Option<u64>,
    pub(super) packed: bool,
    pub(super) access: Access,
    pub(super) header: Option<&'a Header>,
}

impl Listed<'_> {
    /// The one extent of an image that is in one file with its descriptor.
    pub(super) fn embedded(header: &Header) -> Listed<'_> {
        Listed {
            file: FileIndex::MAIN,
            kind: "",
            len: header.capacity.saturating_mul(SECTOR),
            grain: Some(header.grain.bytes()),
            packed: header.is_packed(),
            access: Access::ReadWrite,
            header: Some(header),
        }
    }
}

/// What is known when all files are open.
pub(super) fn of_parts(image: &VmdkImage, parts: &[Part]) -> Facts {
    let mut facts = image.facts.clone();
    facts.virtual_size = parts.iter().fold(0, |sum, part| sum.saturating_add(part.len));
    let listed: Vec<_> = parts
        .iter()
        .map(|part| {
            let (file, grain, packed) = match &part.body {
                Body::Flat { file, .. } => (*file, None, false),
                Body::Sparse(sparse) => (sparse.file, Some(sparse.geometry.grain), sparse.is_packed()),
                Body::Zero => (FileIndex::MAIN, None, false),
            };
            Listed {
                file,
                kind: part.kind,
                len: part.len,
                grain,
                packed,
                access: part.access,
                header: part.header.as_ref(),
            }
        })
        .collect();
    fill(&mut facts, &image.descriptor, &listed);
    facts
}

/// Fills in what depends on the extents.
pub(super) fn fill(facts: &mut Facts, descriptor: &Descriptor, extents: &[Listed<'_>]) {
    let mut grains = extents.iter().map(|extent| extent.grain);
    facts.unit = match grains.next() {
        Some(first) if grains.all(|other| other == first) => first,
        _ => None,
    };
    facts.specific = Some(Value::Map(vec![
        ("cid", Value::Int(descriptor.cid.into())),
        ("parent-cid", Value::Int(descriptor.parent_cid.into())),
        ("create-type", Value::Text(kind(descriptor, extents).to_owned())),
        ("extents", Value::List(extents.iter().map(specific).collect())),
    ]));
    facts.details = Some(details(descriptor, extents));
}

/// The type of the disk. Of an image in one file its header tells more than the text in it.
fn kind(descriptor: &Descriptor, extents: &[Listed<'_>]) -> &'static str {
    match extents {
        [only] if only.kind.is_empty() && only.packed => "streamOptimized",
        [only] if only.kind.is_empty() => "monolithicSparse",
        _ => descriptor.kind,
    }
}

fn specific(extent: &Listed<'_>) -> Value {
    let name = match extent.kind {
        "ZERO" => Value::Text(String::new()),
        _ => Value::File(extent.file),
    };
    let mut pairs = vec![
        ("virtual-size", Value::Int(extent.len)),
        ("filename", name),
        ("format", Value::Text(extent.kind.to_owned())),
    ];
    if let Some(grain) = extent.grain {
        pairs.push(("cluster-size", Value::Int(grain)));
    }
    if extent.packed {
        pairs.push(("compressed", Value::Bool(true)));
    }
    Value::Map(pairs)
}

/// Entries of the disk data base that people look for, and what they are called here.
const ENTRIES: [(&str, &str); 10] = [
    ("adapterType", "adapter-type"),
    ("virtualHWVersion", "hardware-version"),
    ("toolsVersion", "tools-version"),
    ("geometry.cylinders", "cylinders"),
    ("geometry.heads", "heads"),
    ("geometry.sectors", "sectors"),
    ("uuid", "uuid"),
    ("uuid.image", "image-uuid"),
    ("uuid.parent", "parent-uuid"),
    ("thinProvisioned", "thin-provisioned"),
];

fn details(descriptor: &Descriptor, extents: &[Listed<'_>]) -> Value {
    let mut pairs = vec![("descriptor-version", Value::Int(descriptor.version))];
    if let Some(encoding) = &descriptor.encoding {
        pairs.push(("encoding", Value::Text(encoding.clone())));
    }
    for (entry, name) in ENTRIES {
        if let Some(value) = descriptor.ddb(entry) {
            pairs.push((name, Value::Text(value.to_owned())));
        }
    }
    if descriptor.tracked {
        pairs.push(("change-tracking", Value::Bool(true)));
    }
    let parts = extents.iter().map(|extent| {
        let access = match extent.access {
            Access::ReadWrite => "read and write",
            Access::ReadOnly => "read only",
            Access::None => "none",
        };
        let mut pairs = vec![("access", Value::Text(access.to_owned()))];
        if let Some(header) = extent.header {
            pairs.push(("version", Value::Int(header.version.into())));
            pairs.push(("redundant-tables", Value::Bool(header.rgd.is_some())));
            pairs.push(("zeroed-grains", Value::Bool(header.flags.has(Flags::ZERO_GRAIN))));
            pairs.push(("unclean-shutdown", Value::Bool(header.unclean)));
        }
        Value::Map(pairs)
    });
    pairs.push(("extents", Value::List(parts.collect())));
    Value::Map(pairs)
}
