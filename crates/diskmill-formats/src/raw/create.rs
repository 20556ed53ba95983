//! New raw images.

use std::ops::Range;
use std::sync::Arc;

use diskmill_core::{
    Builder, CreateSpec, DataRuns, Durability, Encoder, Error, ErrorKind, FileIndex, FilesMut, Finish,
    Format, GuestOffset, HostOffset, HostSpan, Measure, OptionError, OptionKind, OptionSpec, OutputSpec,
    Result, Run, SECTOR, StorageMut, Stored, Writes, ZeroHow,
};

use crate::codec::UnitEncoder;
use crate::preallocation::{Preallocation, write_zeros};

/// Bytes that are data or not as a whole: a page, below which no file system keeps holes.
const UNIT: u64 = 4096;

/// The options of a new image, in the order `create` prints them.
pub(super) static OPTIONS: &[OptionSpec] = &[
    OptionSpec {
        name: "size",
        kind: OptionKind::Size,
        default: None,
        help: "Bytes of the virtual disk",
    },
    OptionSpec {
        name: "nocow",
        kind: OptionKind::Bool,
        default: None,
        help: "Ask the file system not to copy on write (btrfs)",
    },
    OptionSpec {
        name: "preallocation",
        kind: OptionKind::Text,
        default: None,
        help: "Space taken at once: off, falloc or full",
    },
    OptionSpec {
        name: "extent_size_hint",
        kind: OptionKind::Size,
        default: None,
        help: "Step in which the file system allocates; 0 for its own",
    },
];

struct Plan {
    size: u64,
    preallocation: Preallocation,
    nocow: bool,
    extent_size_hint: Option<u64>,
}

impl Plan {
    fn new(spec: &CreateSpec) -> Result<Self> {
        let options = &spec.options;
        options.only(OPTIONS)?;
        if spec.backing.is_some() {
            return Err(conflict("raw images have no backing file"));
        }
        if spec.compression.is_some() {
            return Err(
                Error::new(ErrorKind::Unsupported, "raw images are not compressed").format(Format::Raw),
            );
        }
        Ok(Self {
            size: whole_sectors(spec.virtual_size)?,
            preallocation: Preallocation::from_options(options, false)?,
            nocow: options.bool("nocow")?.unwrap_or(false),
            extent_size_hint: options.size("extent_size_hint")?,
        })
    }
}

fn conflict(text: &str) -> Error {
    Error::from(OptionError::Conflict(text.to_owned())).format(Format::Raw)
}

/// `size` up to a whole sector. Files cannot be longer than 2^63 - 1 bytes.
fn whole_sectors(size: u64) -> Result<u64> {
    match size.checked_next_multiple_of(SECTOR) {
        Some(size) if size <= i64::MAX as u64 => Ok(size),
        _ => Err(conflict(&format!("size is {size}, must be below 2^63"))),
    }
}

/// See [`Driver::outputs`](diskmill_core::Driver::outputs).
pub(super) fn outputs(spec: &CreateSpec) -> Result<Vec<OutputSpec>> {
    let plan = Plan::new(spec)?;
    let mut main = OutputSpec::main();
    main.nocow = plan.nocow;
    main.extent_size_hint = plan.extent_size_hint;
    Ok(vec![main])
}

/// See [`Driver::measure`](diskmill_core::Driver::measure).
pub(super) fn measure(spec: &CreateSpec, _data: Option<&mut dyn DataRuns>) -> Result<Measure> {
    let size = Plan::new(spec)?.size;
    Ok(Measure {
        required: size,
        fully_allocated: size,
        bitmaps: None,
    })
}

/// See [`Driver::build`](diskmill_core::Driver::build).
pub(super) fn build(spec: &CreateSpec, files: FilesMut) -> Result<Box<dyn Builder>> {
    let plan = Plan::new(spec)?;
    let files: Vec<_> = files.into_iter().map(|(_, file)| file).collect();
    let [file] = files.as_slice() else {
        return Err(Error::new(
            ErrorKind::Usage,
            format!("a raw image has 1 file, got {}", files.len()),
        ));
    };
    let hints = file.hints();
    if hints.fixed_len && file.len()? < plan.size {
        return Err(Error::new(
            ErrorKind::NoSpace,
            format!(
                "the device has {} bytes, the image needs {}",
                file.len()?,
                plan.size
            ),
        )
        .format(Format::Raw));
    }
    if plan.preallocation == Preallocation::Falloc && !hints.fixed_len && !hints.append_only && plan.size > 0
    {
        file.allocate(HostOffset::ZERO..HostOffset::new(plan.size))?;
    }
    let zeros = match plan.preallocation {
        _ if hints.append_only => Zeros::Written,
        Preallocation::Full => Zeros::Written,
        _ if hints.fixed_len => Zeros::Made,
        _ => Zeros::There,
    };
    Ok(Box::new(RawBuilder {
        sized: !hints.fixed_len && !hints.append_only,
        seekable: !hints.append_only,
        size: plan.size,
        zeros,
        files,
    }))
}

/// What it takes for a run to read as zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Zeros {
    /// Nothing: the file is new.
    There,
    /// The host must be told; there may be old data.
    Made,
    /// They must be written like data.
    Written,
}

#[derive(Debug)]
struct RawBuilder {
    files: Vec<Arc<dyn StorageMut>>,
    size: u64,
    zeros: Zeros,
    /// Whether the file takes the length it is given.
    sized: bool,
    /// Whether bytes can be put anywhere at any time.
    seekable: bool,
}

impl Builder for RawBuilder {
    fn unit(&self) -> u64 {
        UNIT
    }

    fn files(&self) -> &[Arc<dyn StorageMut>] {
        &self.files
    }

    fn encoder(&self) -> Result<Box<dyn Encoder>> {
        Ok(Box::new(UnitEncoder::new(None)?))
    }

    fn place<'b>(&mut self, at: GuestOffset, stored: Stored<'b>, writes: &mut Writes<'b>) -> Result<()> {
        match stored {
            Stored::Plain(bytes) => {
                writes.push(FileIndex::MAIN, HostOffset::new(at.get()), bytes);
                Ok(())
            }
            Stored::Packed(_) => Err(Error::new(ErrorKind::Usage, "raw images hold no packed units")),
        }
    }

    fn place_run<'b>(
        &mut self,
        range: Range<GuestOffset>,
        _what: Run,
        writes: &mut Writes<'b>,
    ) -> Result<()> {
        let (start, end) = (
            HostOffset::new(range.start.get()),
            HostOffset::new(range.end.get()),
        );
        match self.zeros {
            Zeros::There => {}
            Zeros::Made if start < end => {
                writes.push_zero(FileIndex::MAIN, start..end, ZeroHow::MayUnmap);
            }
            Zeros::Made => {}
            Zeros::Written => write_zeros(FileIndex::MAIN, start..end, writes),
        }
        Ok(())
    }

    fn fill(&mut self, range: Range<GuestOffset>, what: Run) -> Result<()> {
        // There are no tables whose memory steps would bound.
        let mut writes = Writes::new();
        self.place_run(range, what, &mut writes)?;
        writes.perform(&self.files)
    }

    fn reserve<'b>(
        &mut self,
        range: Range<GuestOffset>,
        _writes: &mut Writes<'b>,
    ) -> Result<Option<HostSpan>> {
        if !self.seekable {
            return Ok(None);
        }
        Ok(Some(HostSpan {
            file: FileIndex::MAIN,
            at: HostOffset::new(range.start.get()),
            len: range.end.since(range.start),
        }))
    }

    fn finish(self: Box<Self>, end: Finish) -> Result<()> {
        let size = match end.final_size {
            Some(size) => whole_sectors(size)?,
            None => self.size,
        };
        for file in &self.files {
            if self.sized && file.len()? != size {
                file.set_len(size)?;
            }
            if end.durability == Durability::Synced {
                file.sync()?;
            }
        }
        Ok(())
    }
}
