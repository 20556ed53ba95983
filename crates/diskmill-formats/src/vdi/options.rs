//! The options of a new image, checked.

use diskmill_core::{
    CreateSpec, Error, ErrorKind, Facts, Format, HostOffset, Identity, OptionError, OptionKind, OptionSpec,
    Result, SECTOR,
};

use super::header::{Header, ImageType};
use super::layout::{BLOCK, BLOCKS_MAX, HEADER_SIZE_LCHS};
use super::uuid::Uuid;
use crate::preallocation::Preallocation;

/// The options of a new image, in the order `create` prints them. QEMU has the first two.
pub(super) static OPTIONS: &[OptionSpec] = &[
    OptionSpec {
        name: "size",
        kind: OptionKind::Size,
        default: None,
        help: "Bytes of the virtual disk",
    },
    OptionSpec {
        name: "static",
        kind: OptionKind::Bool,
        default: Some("off"),
        help: "Fixed size: all blocks are in the file from the start",
    },
    OptionSpec {
        name: "preallocation",
        kind: OptionKind::Text,
        default: None,
        help: "Space taken at once, in a fixed image: off, metadata, falloc or full",
    },
    OptionSpec {
        name: "uuid",
        kind: OptionKind::Text,
        default: None,
        help: "UUID of the image; a random one otherwise",
    },
    OptionSpec {
        name: "align",
        kind: OptionKind::Size,
        default: None,
        help: "Where map and data start: 512 like QEMU's, 1M like VirtualBox's, or a power of two between",
    },
    OptionSpec {
        name: "backing_file",
        kind: OptionKind::Text,
        default: None,
        help: "The parent of a differencing image: a vdi image, kept in the same directory",
    },
    OptionSpec {
        name: "backing_fmt",
        kind: OptionKind::Text,
        default: None,
        help: "Format of the parent: vdi",
    },
];

/// A new image that can be made.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    /// The header it will have; `blocks_allocated` is filled in at the end.
    pub(super) header: Header,
    /// Space taken at once.
    pub(super) preallocation: Preallocation,
}

fn conflict(text: impl Into<String>) -> Error {
    Error::from(OptionError::Conflict(text.into())).format(Format::Vdi)
}

/// A disk that is too large.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("size is {0}, must be at most {most} for a vdi image", most = u64::from(BLOCKS_MAX) * BLOCK)]
pub(super) struct SizeError(pub(super) u64);

/// The blocks of a disk of `size` bytes.
pub(super) fn blocks(size: u64) -> Result<u32> {
    match u32::try_from(size.div_ceil(BLOCK)) {
        Ok(blocks) if blocks <= BLOCKS_MAX => Ok(blocks),
        _ => Err(Error::new(ErrorKind::Unsupported, SizeError(size)).format(Format::Vdi)),
    }
}

impl Plan {
    /// Checks all of `spec`.
    pub(super) fn new(spec: &CreateSpec) -> Result<Self> {
        let options = &spec.options;
        options.only(OPTIONS)?;
        if spec.compression.is_some() {
            return Err(
                Error::new(ErrorKind::Unsupported, "vdi images are not compressed").format(Format::Vdi),
            );
        }
        let size = spec
            .virtual_size
            .checked_next_multiple_of(SECTOR)
            .unwrap_or(u64::MAX);
        let preallocation = Preallocation::from_options(options, true)?;
        let fixed = options.bool("static")?;
        let takes_space = preallocation != Preallocation::Off;
        if fixed == Some(false) && takes_space {
            return Err(conflict(
                "static=off and preallocation exclude each other: all blocks of such an image are there",
            ));
        }
        let parent = parent(spec)?;
        let image_type = match (&parent, fixed == Some(true) || takes_space) {
            (Some(_), true) => {
                return Err(conflict(
                    "an image with a parent cannot be fixed: static must be off",
                ));
            }
            (Some(_), false) => ImageType::Diff { undo: false },
            (None, true) => ImageType::Fixed,
            (None, false) => ImageType::Dynamic,
        };
        let mut header = Header::new(image_type, size, blocks(size)?);
        let align = align(spec)?;
        let above = |at: u64| u32::try_from(at.next_multiple_of(align)).map_err(|_| SizeError(size));
        let placed =
            above(SECTOR).and_then(|map| Ok((map, above(u64::from(map).saturating_add(header.map_len()))?)));
        (header.blocks_offset, header.data_offset) =
            placed.map_err(|error| Error::new(ErrorKind::Unsupported, error).format(Format::Vdi))?;
        if align > SECTOR {
            header.header_size = HEADER_SIZE_LCHS;
            header.logical_geometry = Some([0; 3]);
        }
        if let Some(parent) = parent {
            (header.uuid_link, header.uuid_parent_modify) = (Uuid(parent.image), Uuid(parent.state));
        }
        (header.uuid_create, header.uuid_modify) = match options.text("uuid") {
            // Whoever names the one wants to get the same image again.
            Some(text) => {
                let uuid = Uuid::parse(text)?;
                (uuid, uuid)
            }
            None => (Uuid::random(), Uuid::random()),
        };
        Ok(Self {
            header,
            preallocation,
        })
    }

    /// Where the image ends with `slots` blocks in it.
    pub(super) fn end(&self, slots: u32) -> HostOffset {
        HostOffset::new(self.header.slot_at(slots))
    }
}

fn align(spec: &CreateSpec) -> Result<u64> {
    match spec.options.size("align")? {
        None => Ok(SECTOR),
        Some(align) if align.is_power_of_two() && (SECTOR..=BLOCK).contains(&align) => Ok(align),
        Some(align) => Err(OptionError::Range {
            name: "align".to_owned(),
            value: align.to_string(),
            allowed: "a power of two from 512 to 1M",
        }
        .into()),
    }
}

/// The parent, if there is to be one: only what another program can find by its UUID will do.
fn parent(spec: &CreateSpec) -> Result<Option<Identity>> {
    if spec.backing.is_none() {
        return Ok(None);
    }
    let Some(facts) = &spec.backing_facts else {
        return Err(conflict(
            "a vdi image names its parent by UUID, so the parent must be opened",
        ));
    };
    let Facts {
        format: Format::Vdi,
        identity: Some(identity),
        ..
    } = facts.as_ref()
    else {
        return Err(conflict(format!(
            "the parent of a vdi image must be a vdi image with a UUID, not {}",
            facts.format
        )));
    };
    Ok(Some(*identity))
}
