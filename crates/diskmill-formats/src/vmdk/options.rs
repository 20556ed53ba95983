//! Options of new disks.

use diskmill_core::{
    CreateSpec, Error, ErrorKind, Format, OptionError, OptionKind, OptionSpec, Options, Result, SECTOR,
};

use super::descriptor::{NO_PARENT, is_writable};
use super::layout::MOST_EXTENTS;
use crate::codec::Codec;
use crate::preallocation::Preallocation;

const fn option(
    name: &'static str,
    kind: OptionKind,
    default: Option<&'static str>,
    help: &'static str,
) -> OptionSpec {
    OptionSpec {
        name,
        kind,
        default,
        help,
    }
}

/// The options of a new disk, in the order `create` prints them.
pub static OPTIONS: &[OptionSpec] = &[
    option("size", OptionKind::Size, None, "Bytes of the virtual disk"),
    option(
        "adapter_type",
        OptionKind::Text,
        None,
        "Controller the disk is for: ide (default), lsilogic, buslogic or legacyESX",
    ),
    option(
        "backing_file",
        OptionKind::Text,
        None,
        "The image it is backed by",
    ),
    option("backing_fmt", OptionKind::Text, None, "The format of that: vmdk"),
    option(
        "compat6",
        OptionKind::Bool,
        Some("off"),
        "Virtual hardware of version 6",
    ),
    option(
        "hwversion",
        OptionKind::Text,
        Some("undefined"),
        "Version of the virtual hardware",
    ),
    option(
        "toolsversion",
        OptionKind::Text,
        None,
        "Version of the guest tools",
    ),
    option(
        "subformat",
        OptionKind::Text,
        None,
        "monolithicSparse (default), monolithicFlat, twoGbMaxExtentSparse, twoGbMaxExtentFlat or streamOptimized",
    ),
    option(
        "zeroed_grain",
        OptionKind::Bool,
        None,
        "Mark zeros in the tables; not with flat extents",
    ),
    option(
        "nocow",
        OptionKind::Bool,
        None,
        "Ask the file system not to copy on write (btrfs)",
    ),
    option(
        "preallocation",
        OptionKind::Text,
        None,
        "Space taken at once for flat extents: off, falloc or full",
    ),
    option(
        "extent_size_hint",
        OptionKind::Size,
        None,
        "Step in which the file system allocates; 0 for its own",
    ),
];

/// How a new disk is kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Subformat {
    /// One sparse file with its descriptor in it.
    #[default]
    MonolithicSparse,
    /// A descriptor and one file with the bytes as they are.
    MonolithicFlat,
    /// A descriptor and sparse files for 2 GiB each.
    TwoGbSparse,
    /// A descriptor and files of 2 GiB with the bytes as they are.
    TwoGbFlat,
    /// One file of compressed grains, written from front to back.
    StreamOptimized,
}

impl Subformat {
    const ALL: [Self; 5] = [
        Self::MonolithicSparse,
        Self::MonolithicFlat,
        Self::TwoGbSparse,
        Self::TwoGbFlat,
        Self::StreamOptimized,
    ];

    /// Its name in options and descriptors.
    pub const fn name(self) -> &'static str {
        match self {
            Self::MonolithicSparse => "monolithicSparse",
            Self::MonolithicFlat => "monolithicFlat",
            Self::TwoGbSparse => "twoGbMaxExtentSparse",
            Self::TwoGbFlat => "twoGbMaxExtentFlat",
            Self::StreamOptimized => "streamOptimized",
        }
    }

    /// Whether bytes are kept as they are.
    pub const fn is_flat(self) -> bool {
        matches!(self, Self::MonolithicFlat | Self::TwoGbFlat)
    }

    /// Whether the descriptor is in the same file.
    pub const fn is_one_file(self) -> bool {
        matches!(self, Self::MonolithicSparse | Self::StreamOptimized)
    }
}

/// Bytes of a part of a split disk.
pub const SPLIT: u64 = 2 << 30;

/// What a disk is backed by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parent {
    /// Its name.
    pub name: String,
    /// The number that tells its content.
    pub cid: u32,
}

/// A file with a part of a new disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Its name, without a directory.
    pub name: String,
    /// The first byte of its part.
    pub start: u64,
    /// Bytes of its part.
    pub len: u64,
}

/// A new disk, all options checked.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Bytes of the disk: whole sectors, at least one.
    pub size: u64,
    /// How it is kept.
    pub subformat: Subformat,
    /// The controller it is for.
    pub adapter: &'static str,
    /// The version of the virtual hardware.
    pub hardware: String,
    /// The version of the guest tools.
    pub tools: String,
    /// Whether zeros are marked in the tables.
    pub zeroed: bool,
    /// What it is backed by.
    pub parent: Option<Parent>,
    /// The number that tells its content.
    pub cid: u32,
    /// The files with its parts, in order.
    pub extents: Vec<Extent>,
    /// How grains of a stream are compressed.
    pub codec: Codec,
    /// Space taken at once.
    pub preallocation: Preallocation,
    /// See [`diskmill_core::OutputSpec::nocow`].
    pub nocow: bool,
    /// See [`diskmill_core::OutputSpec::extent_size_hint`].
    pub extent_size_hint: Option<u64>,
}

fn conflict(text: impl Into<String>) -> Error {
    Error::from(OptionError::Conflict(text.into())).format(Format::Vmdk)
}

/// One of `allowed`, or the first of them.
fn choice(
    options: &Options,
    name: &'static str,
    allowed: &[&'static str],
    expected: &'static str,
) -> Result<&'static str, OptionError> {
    let Some(value) = options.text(name) else {
        return Ok(allowed.first().copied().unwrap_or_default());
    };
    allowed
        .iter()
        .find(|known| value.eq_ignore_ascii_case(known))
        .copied()
        .ok_or_else(|| OptionError::Value {
            name: name.to_owned(),
            value: value.to_owned(),
            expected,
        })
}

/// The text of an option that goes into the descriptor.
fn written(options: &Options, name: &'static str) -> Result<Option<String>> {
    match options.text(name) {
        Some(text) if !is_writable(text) => Err(conflict(format!(
            "{name} is '{}', which cannot be written into a descriptor",
            text.escape_debug()
        ))),
        text => Ok(text.map(str::to_owned)),
    }
}

impl Plan {
    /// Checks all of `spec`.
    pub fn new(spec: &CreateSpec) -> Result<Self> {
        let options = &spec.options;
        options.only(OPTIONS)?;
        let names = Subformat::ALL.map(Subformat::name);
        let expected =
            "monolithicSparse, monolithicFlat, twoGbMaxExtentSparse, twoGbMaxExtentFlat or streamOptimized";
        let name = choice(options, "subformat", &names, expected)?;
        let subformat = Subformat::ALL
            .into_iter()
            .find(|known| known.name() == name)
            .unwrap_or_default();
        let adapter = choice(
            options,
            "adapter_type",
            &["ide", "lsilogic", "buslogic", "legacyESX"],
            "ide, lsilogic, buslogic or legacyESX",
        )?;
        let compat6 = options.bool("compat6")?.unwrap_or(false);
        let hardware = written(options, "hwversion")?.filter(|version| version != "undefined");
        if compat6 && hardware.is_some() {
            return Err(conflict("compat6 cannot be enabled with hwversion set"));
        }
        let hardware = hardware.unwrap_or_else(|| if compat6 { "6" } else { "4" }.to_owned());
        let tools = written(options, "toolsversion")?.unwrap_or_else(|| "2147483647".to_owned());
        let zeroed = options.bool("zeroed_grain")?.unwrap_or(false);
        if subformat.is_flat() && zeroed {
            return Err(conflict("Flat image can't enable zeroed grain"));
        }
        let size = match spec.virtual_size.checked_next_multiple_of(SECTOR) {
            Some(size) if (1..=i64::MAX as u64).contains(&size) => size,
            _ => {
                let size = spec.virtual_size;
                return Err(conflict(format!(
                    "size is {size}, must be above 0 and below 2^63"
                )));
            }
        };
        let extents = extents(subformat, size, spec.name.as_deref())?;
        Ok(Self {
            parent: parent(spec, subformat)?,
            cid: content_id(spec.content_id.unwrap_or_else(|| derived(spec))),
            codec: Codec::zlib(
                spec.compression.and_then(|how| how.level).or(Some(STREAM_LEVEL)),
                GRAIN,
            )?,
            preallocation: Preallocation::from_options(options, false)?,
            nocow: options.bool("nocow")?.unwrap_or(false),
            extent_size_hint: options.size("extent_size_hint")?,
            size,
            subformat,
            adapter,
            hardware,
            tools,
            zeroed,
            extents,
        })
    }
}

/// Level of deflate for streams unless told otherwise: the lowest that is smaller than what QEMU makes, which has the
/// whole window of 32 KiB here. A quarter of its processor time.
const STREAM_LEVEL: i32 = 5;

/// Bytes of a grain of new disks.
pub const GRAIN: u64 = 64 << 10;

/// `wanted`, or a number near it, if it stands for something else.
pub(super) const fn content_id(wanted: u32) -> u32 {
    // The last two mean "none" and "see elsewhere".
    match wanted {
        0xffff_fffe | 0xffff_ffff | 0 => 0x5eed_0001,
        other => other,
    }
}

/// A content id where chance has none to give.
fn derived(spec: &CreateSpec) -> u32 {
    let name = spec.name.as_deref().unwrap_or_default();
    let mixed = name
        .bytes()
        .fold(spec.virtual_size, |sum, byte| mix(sum ^ u64::from(byte)));
    u32::try_from(mix(mixed) >> 32).unwrap_or(1)
}

/// Spreads the bits of a number.
pub(super) const fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 32)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    value ^ (value >> 29)
}

fn parent(spec: &CreateSpec, subformat: Subformat) -> Result<Option<Parent>> {
    let Some(backing) = &spec.backing else {
        return Ok(None);
    };
    if subformat.is_flat() {
        return Err(conflict("Flat image can't have backing file"));
    }
    if !is_writable(&backing.name) {
        return Err(conflict(
            "the name of the backing file cannot be written into a descriptor",
        ));
    }
    let cid = match &spec.backing_facts {
        Some(facts) if facts.format == Format::Vmdk => facts.content_id,
        Some(_) => return Err(conflict("backing_file must be a vmdk image")),
        None => None,
    };
    Ok(Some(Parent {
        name: backing.name.clone(),
        cid: cid.unwrap_or(NO_PARENT),
    }))
}

/// What is taken for the name of a disk that has none.
const UNNAMED: &str = "disk.vmdk";

fn extents(subformat: Subformat, size: u64, name: Option<&str>) -> Result<Vec<Extent>> {
    let name = name.unwrap_or(UNNAMED);
    if !is_writable(name) {
        return Err(conflict(format!(
            "the name '{}' cannot be written into a descriptor",
            name.escape_debug()
        )));
    }
    let (stem, suffix) = match name.rfind('.') {
        Some(dot) => name.split_at(dot),
        None => (name, ""),
    };
    let whole = |name: String| {
        vec![Extent {
            name,
            start: 0,
            len: size,
        }]
    };
    let letter = match subformat {
        Subformat::MonolithicSparse | Subformat::StreamOptimized => return Ok(whole(name.to_owned())),
        Subformat::MonolithicFlat => return Ok(whole(format!("{stem}-flat{suffix}"))),
        Subformat::TwoGbSparse => 's',
        Subformat::TwoGbFlat => 'f',
    };
    let count = size.div_ceil(SPLIT);
    if count > MOST_EXTENTS as u64 {
        let text = format!("the disk would have {count} extents of 2 GiB, must have at most {MOST_EXTENTS}");
        return Err(Error::new(ErrorKind::Unsupported, text).format(Format::Vmdk));
    }
    Ok((0..count)
        .map(|index| {
            let start = index.saturating_mul(SPLIT);
            Extent {
                name: format!("{stem}-{letter}{:03}{suffix}", index.saturating_add(1)),
                start,
                len: SPLIT.min(size.saturating_sub(start)),
            }
        })
        .collect())
}
