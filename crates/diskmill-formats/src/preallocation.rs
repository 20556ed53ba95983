//! Space taken when an image is made, before there is data for it.

use std::ops::Range;

use diskmill_core::{FileIndex, HostOffset, OptionError, Options, Writes};

/// The option of that name.
pub const OPTION: &str = "preallocation";

/// How much of a new image, or of what a disk grows by, is allocated at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preallocation {
    /// Nothing.
    #[default]
    Off,
    /// The tables; data has its place but takes no space yet.
    Metadata,
    /// Tables, and space that the host reserves for data.
    Falloc,
    /// Tables, and zeros written in place of data.
    Full,
}

impl Preallocation {
    /// The mode called `name`: `off`, `metadata`, `falloc` or `full`.
    pub fn parse(name: &str) -> Option<Self> {
        Some(match name {
            "off" => Self::Off,
            "metadata" => Self::Metadata,
            "falloc" => Self::Falloc,
            "full" => Self::Full,
            _ => return None,
        })
    }

    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Metadata => "metadata",
            Self::Falloc => "falloc",
            Self::Full => "full",
        }
    }

    /// The `preallocation` option; off if it is not given. `metadata` says whether the format has such a mode.
    pub fn from_options(options: &Options, metadata: bool) -> Result<Self, OptionError> {
        let Some(value) = options.text(OPTION) else {
            return Ok(Self::Off);
        };
        match Self::parse(value) {
            Some(Self::Metadata) if !metadata => {}
            Some(mode) => return Ok(mode),
            None => {}
        }
        Err(OptionError::Value {
            name: OPTION.to_owned(),
            value: value.to_owned(),
            expected: if metadata {
                "off, metadata, falloc or full"
            } else {
                "off, falloc or full"
            },
        })
    }
}

/// Zeros to write where a hole will not do.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// Zeros to write, up to `len` of them: at least 1 unless `len` is 0.
pub(crate) fn zeros(len: u64) -> &'static [u8] {
    let len = usize::try_from(len).unwrap_or(usize::MAX);
    ZEROS.get(..len).unwrap_or(&ZEROS)
}

/// Queues zeros that are written like data.
pub(crate) fn write_zeros(file: FileIndex, range: Range<HostOffset>, writes: &mut Writes<'_>) {
    let mut at = range.start;
    while at < range.end {
        let zeros = zeros(range.end.since(at));
        writes.push(file, at, zeros);
        at = at.saturating_add(zeros.len() as u64);
    }
}
