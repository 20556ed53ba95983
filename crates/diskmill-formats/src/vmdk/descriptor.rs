//! The text that says what a disk is made of: parsed line by line, changed without touching what is not changed.
//!
//! A line is empty, a comment (`#`), an extent or `key=value`. Keys are exact and case does not count, as VMware has it;
//! what is not known stays as it is. The text ends at the first NUL.

use diskmill_core::{Error, ErrorKind, Format, SECTOR};

use super::layout::MOST_EXTENTS;

/// Why a descriptor is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DescriptorError {
    /// It is larger than any descriptor.
    #[error("the descriptor has {0} bytes, must have at most 1048576")]
    TooLong(u64),
    /// Bytes behind the end of the text.
    #[error("the descriptor has a NUL in it")]
    Nul,
    /// A key that must be there is not.
    #[error("the descriptor has no {0}")]
    Missing(&'static str),
    /// A key that is there more than once.
    #[error("line {line}: {key} is there for the second time")]
    Twice {
        /// The line, from 1.
        line: usize,
        /// The key.
        key: &'static str,
    },
    /// A value of the wrong form.
    #[error("line {line}: {key} must be {expected}")]
    Value {
        /// The line, from 1.
        line: usize,
        /// The key.
        key: &'static str,
        /// What its value must be.
        expected: &'static str,
    },
    /// A type of disk that cannot be opened.
    #[error("unsupported image type '{0}'")]
    Kind(String),
    /// An extent line that does not say what it must.
    #[error("line {line}: {what}")]
    Extent {
        /// The line, from 1.
        line: usize,
        /// What is wrong.
        what: String,
    },
    /// Text in an encoding that is not known.
    #[error("a name in encoding '{0}' is not supported, must be UTF-8, windows-1252 or plain ASCII")]
    Encoding(String),
    /// No extent at all.
    #[error("the descriptor names no extents")]
    NoExtents,
    /// More extents than are supported.
    #[error("the descriptor names more than 4096 extents")]
    TooManyExtents,
    /// The extents together are larger than any disk.
    #[error("the extents have more than 2^54 sectors together")]
    TooLarge,
    /// A version that is not known.
    #[error("the descriptor's version is {0}, must be 1 to 3")]
    Version(u64),
}

impl From<DescriptorError> for Error {
    fn from(error: DescriptorError) -> Self {
        let kind = match error {
            DescriptorError::Kind(_) | DescriptorError::Encoding(_) | DescriptorError::Version(_) => {
                ErrorKind::Unsupported
            }
            _ => ErrorKind::Malformed,
        };
        Error::new(kind, error).format(Format::Vmdk)
    }
}

/// What may be done with an extent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read and written.
    ReadWrite,
    /// Only read.
    ReadOnly,
    /// Nothing.
    None,
}

/// How the bytes of an extent are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtentKind {
    /// As they are, in a file.
    Flat,
    /// The same, as ESX writes it.
    Vmfs,
    /// In a hosted sparse file.
    Sparse,
    /// In an ESX copy-on-write file.
    VmfsSparse,
    /// In a space-efficient sparse file.
    SeSparse,
    /// Nowhere: they are zeros.
    Zero,
}

impl ExtentKind {
    /// Its name in a descriptor.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Flat => "FLAT",
            Self::Vmfs => "VMFS",
            Self::Sparse => "SPARSE",
            Self::VmfsSparse => "VMFSSPARSE",
            Self::SeSparse => "SESPARSE",
            Self::Zero => "ZERO",
        }
    }
}

/// A part of the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExtentLine {
    /// What may be done with it.
    pub access: Access,
    /// Its size.
    pub sectors: u64,
    /// How it is kept.
    pub kind: ExtentKind,
    /// The file that has it; empty for [`ExtentKind::Zero`].
    pub name: String,
    /// The sector of the file where it starts.
    pub offset: u64,
}

/// The types of disk that can be opened, by the names they are shown with.
const KINDS: [&str; 13] = [
    "monolithicSparse",
    "monolithicFlat",
    "twoGbMaxExtentSparse",
    "twoGbMaxExtentFlat",
    "streamOptimized",
    "vmfs",
    "vmfsThin",
    "vmfsPreallocated",
    "vmfsEagerZeroedThick",
    "vmfsThick",
    "vmfsSparse",
    "seSparse",
    "custom",
];

/// Other spellings of some of them.
const ALIASES: [(&str, &str); 3] = [
    ("2GbMaxExtentSparse", "twoGbMaxExtentSparse"),
    ("2GbMaxExtentFlat", "twoGbMaxExtentFlat"),
    ("vmfsSeSparse", "seSparse"),
];

/// What a descriptor says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// The text, without what follows its end.
    pub text: Vec<u8>,
    /// 1, seldom more.
    pub version: u64,
    /// The encoding of names, if it is given.
    pub encoding: Option<String>,
    /// The number that tells the content.
    pub cid: u32,
    /// The number that told the backing image's content when this image was made; [`NO_PARENT`] without one.
    pub parent_cid: u32,
    /// The type of the disk.
    pub kind: &'static str,
    /// The parts of the disk, in order.
    pub extents: Vec<ExtentLine>,
    /// The path of the backing image.
    pub parent: Option<String>,
    /// Whether a further file keeps track of changes.
    pub tracked: bool,
    /// The entries of the disk data base, in order, without `ddb.`.
    pub ddb: Vec<(String, String)>,
}

/// What [`Descriptor::parent_cid`] is where there is no backing image.
pub const NO_PARENT: u32 = u32::MAX;

impl Descriptor {
    /// Reads a text. An embedded one is followed by anything, one in a file of its own by NULs only.
    pub fn parse(bytes: &[u8], embedded: bool) -> Result<Self, DescriptorError> {
        let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
        let (text, rest) = bytes.split_at_checked(end).unwrap_or((bytes, &[]));
        if !embedded && rest.iter().any(|byte| *byte != 0) {
            return Err(DescriptorError::Nul);
        }
        let mut parser = Parser::default();
        for (index, line) in text.split(|byte| *byte == b'\n').enumerate() {
            parser.line(index.saturating_add(1), line.trim_ascii())?;
        }
        parser.finish(text)
    }

    /// The value of an entry of the disk data base.
    pub fn ddb(&self, name: &str) -> Option<&str> {
        self.ddb
            .iter()
            .find(|(known, _)| known.eq_ignore_ascii_case(name))
            .map(|(_, value)| value.as_str())
    }

    /// The sizes of all extents together, in bytes.
    pub fn disk_len(&self) -> u64 {
        self.extents
            .iter()
            .fold(0_u64, |sum, extent| sum.saturating_add(extent.sectors))
            .saturating_mul(SECTOR)
    }
}

#[derive(Default)]
struct Parser {
    version: Option<u64>,
    encoding: Option<String>,
    cid: Option<u32>,
    parent_cid: Option<u32>,
    kind: Option<&'static str>,
    parent: Option<(usize, Vec<u8>)>,
    tracked: bool,
    /// With the bytes of their names, which are decoded when the encoding is known.
    extents: Vec<(ExtentLine, Vec<u8>)>,
    sectors: u64,
    ddb: Vec<(String, String)>,
}

impl Parser {
    fn line(&mut self, number: usize, line: &[u8]) -> Result<(), DescriptorError> {
        if line.is_empty() || line.starts_with(b"#") {
            return Ok(());
        }
        if let Some((access, rest)) = access(line) {
            return self.extent(number, access, rest);
        }
        let Some(split) = line.iter().position(|byte| *byte == b'=') else {
            return Ok(());
        };
        let (key, value) = line.split_at_checked(split).unwrap_or_default();
        let key = key.trim_ascii();
        let value = value.get(1..).unwrap_or_default().trim_ascii();
        let is = |name: &str| key.eq_ignore_ascii_case(name.as_bytes());
        if is("version") {
            let number_of = decimal(value);
            once(&mut self.version, number, "version", "a number", number_of)
        } else if is("CID") {
            once(&mut self.cid, number, "CID", HEX, hex(value))
        } else if is("parentCID") {
            once(&mut self.parent_cid, number, "parentCID", HEX, hex(value))
        } else if is("encoding") {
            let name = quoted(value).map(lossy);
            once(&mut self.encoding, number, "encoding", QUOTED, name)
        } else if is("createType") {
            let Some(name) = quoted(value) else {
                return once(&mut self.kind, number, "createType", QUOTED, None);
            };
            let known = known_kind(name).ok_or_else(|| DescriptorError::Kind(lossy(name)))?;
            once(&mut self.kind, number, "createType", QUOTED, Some(known))
        } else if is("parentFileNameHint") {
            let name = quoted(value).map(|name| (number, name.to_vec()));
            once(&mut self.parent, number, "parentFileNameHint", QUOTED, name)
        } else {
            self.tracked |= is("changeTrackPath");
            if let Some(prefix) = key.get(..4)
                && prefix.eq_ignore_ascii_case(b"ddb.")
                && let Some(name) = key.get(4..)
            {
                let value = quoted(value).unwrap_or(value);
                self.ddb.push((lossy(name), lossy(value)));
            }
            Ok(())
        }
    }

    fn extent(&mut self, number: usize, access: Access, rest: &[u8]) -> Result<(), DescriptorError> {
        let bad = |what: &str| DescriptorError::Extent {
            line: number,
            what: what.to_owned(),
        };
        let (sectors, rest) = word(rest);
        let sectors =
            decimal(sectors).ok_or_else(|| bad("the size of an extent must be a number of sectors"))?;
        let (kind, rest) = word(rest);
        let kind = extent_kind(kind)
            .ok_or_else(|| bad(&format!("extents of type '{}' are not supported", lossy(kind))))?;
        let (name, rest) = if kind == ExtentKind::Zero {
            (Vec::new(), rest)
        } else {
            let inner = rest
                .strip_prefix(b"\"")
                .and_then(|rest| {
                    let end = rest.iter().position(|byte| *byte == b'"')?;
                    rest.split_at_checked(end)
                })
                .filter(|(name, _)| !name.is_empty())
                .ok_or_else(|| bad("an extent must name its file in quotes"))?;
            (inner.0.to_vec(), inner.1.get(1..).unwrap_or_default())
        };
        let (offset, _) = word(rest.trim_ascii());
        let offset = match (kind, offset) {
            (ExtentKind::Zero, _) | (_, b"") => 0,
            (_, offset) => decimal(offset)
                .filter(|offset| *offset < 1 << 54)
                .ok_or_else(|| bad("the offset of an extent must be a number of sectors"))?,
        };
        if offset != 0 && !matches!(kind, ExtentKind::Flat | ExtentKind::Vmfs) {
            return Err(bad("a sparse extent cannot start within its file"));
        }
        if sectors == 0 && kind != ExtentKind::Zero {
            return Err(bad("an extent cannot be empty"));
        }
        self.sectors = self.sectors.saturating_add(sectors);
        if self.sectors >= 1 << 54 {
            return Err(DescriptorError::TooLarge);
        }
        if self.extents.len() >= MOST_EXTENTS {
            return Err(DescriptorError::TooManyExtents);
        }
        let line = ExtentLine {
            access,
            sectors,
            kind,
            name: String::new(),
            offset,
        };
        self.extents.push((line, name));
        Ok(())
    }

    fn finish(self, text: &[u8]) -> Result<Descriptor, DescriptorError> {
        let version = self.version.unwrap_or(1);
        if !(1..=3).contains(&version) {
            return Err(DescriptorError::Version(version));
        }
        let encoding = self.encoding;
        let decode = |bytes: &[u8]| decode(bytes, encoding.as_deref());
        let mut extents = Vec::with_capacity(self.extents.len());
        for (mut line, name) in self.extents {
            line.name = decode(&name)?;
            extents.push(line);
        }
        let parent = match self.parent {
            Some((_, name)) if !name.is_empty() => Some(decode(&name)?),
            _ => None,
        };
        Ok(Descriptor {
            text: text.to_vec(),
            version,
            cid: self.cid.ok_or(DescriptorError::Missing("CID"))?,
            parent_cid: self.parent_cid.unwrap_or(NO_PARENT),
            kind: self.kind.ok_or(DescriptorError::Missing("createType"))?,
            extents,
            parent,
            tracked: self.tracked,
            ddb: self.ddb,
            encoding,
        })
    }
}

const HEX: &str = "1 to 8 hexadecimal digits";
const QUOTED: &str = "text in quotes";

fn once<T>(
    field: &mut Option<T>,
    line: usize,
    key: &'static str,
    expected: &'static str,
    value: Option<T>,
) -> Result<(), DescriptorError> {
    let value = value.ok_or(DescriptorError::Value { line, key, expected })?;
    match field.replace(value) {
        None => Ok(()),
        Some(_) => Err(DescriptorError::Twice { line, key }),
    }
}

/// The access an extent line starts with, and what follows.
fn access(line: &[u8]) -> Option<(Access, &[u8])> {
    let (first, rest) = word(line);
    let access = [
        ("RW", Access::ReadWrite),
        ("RDONLY", Access::ReadOnly),
        ("NOACCESS", Access::None),
    ]
    .into_iter()
    .find(|(name, _)| first.eq_ignore_ascii_case(name.as_bytes()))?
    .1;
    // `RW = 1` is no extent.
    (!rest.starts_with(b"=")).then_some((access, rest))
}

/// The first word of a line and what follows it.
fn word(line: &[u8]) -> (&[u8], &[u8]) {
    let end = line
        .iter()
        .position(|byte| matches!(byte, b' ' | b'\t'))
        .unwrap_or(line.len());
    let (first, rest) = line.split_at_checked(end).unwrap_or_default();
    (first, rest.trim_ascii_start())
}

fn extent_kind(name: &[u8]) -> Option<ExtentKind> {
    let known = [
        ("FLAT", ExtentKind::Flat),
        ("SPARSE", ExtentKind::Sparse),
        ("ZERO", ExtentKind::Zero),
        ("VMFS", ExtentKind::Vmfs),
        ("VMFSTHIN", ExtentKind::Vmfs),
        ("VMFSSPARSE", ExtentKind::VmfsSparse),
        ("SESPARSE", ExtentKind::SeSparse),
    ];
    known
        .into_iter()
        .find(|(known, _)| name.eq_ignore_ascii_case(known.as_bytes()))
        .map(|(_, kind)| kind)
}

fn known_kind(name: &[u8]) -> Option<&'static str> {
    let is = |known: &&str| name.eq_ignore_ascii_case(known.as_bytes());
    let alias = ALIASES.iter().find(|(other, _)| is(other)).map(|(_, kind)| kind);
    KINDS.iter().find(|kind| is(kind)).or(alias).copied()
}

fn decimal(text: &[u8]) -> Option<u64> {
    let digits = !text.is_empty() && text.iter().all(u8::is_ascii_digit);
    std::str::from_utf8(text).ok().filter(|_| digits)?.parse().ok()
}

fn hex(text: &[u8]) -> Option<u32> {
    let digits = (1..=8).contains(&text.len()) && text.iter().all(u8::is_ascii_hexdigit);
    u32::from_str_radix(std::str::from_utf8(text).ok().filter(|_| digits)?, 16).ok()
}

/// What is between the quotes around all of `value`.
fn quoted(value: &[u8]) -> Option<&[u8]> {
    let inner = value.strip_prefix(b"\"")?.strip_suffix(b"\"")?;
    (!inner.contains(&b'"')).then_some(inner)
}

fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A name in `encoding`, which is UTF-8 unless it is said otherwise.
fn decode(bytes: &[u8], encoding: Option<&str>) -> Result<String, DescriptorError> {
    let unknown = || DescriptorError::Encoding(encoding.unwrap_or("UTF-8").to_owned());
    if bytes.is_ascii() {
        return Ok(lossy(bytes));
    }
    let is = |names: &[&str]| {
        encoding.is_some_and(|encoding| names.iter().any(|name| encoding.eq_ignore_ascii_case(name)))
    };
    if encoding.is_none() || is(&["UTF-8", "UTF8"]) {
        return String::from_utf8(bytes.to_vec()).map_err(|_| unknown());
    }
    let latin = is(&["ISO-8859-1", "ISO8859-1", "latin1"]);
    if !latin && !is(&["windows-1252", "cp1252"]) {
        return Err(unknown());
    }
    bytes
        .iter()
        .map(|byte| match byte {
            0x80..=0x9f if !latin => HIGH
                .get(usize::from(byte.wrapping_sub(0x80)))
                .copied()
                .filter(|c| *c != '\0'),
            byte => Some(char::from(*byte)),
        })
        .collect::<Option<String>>()
        .ok_or_else(unknown)
}

/// Characters 0x80 to 0x9f of windows-1252; NUL where there is none.
const HIGH: [char; 32] = [
    '€', '\0', '‚', 'ƒ', '„', '…', '†', '‡', 'ˆ', '‰', 'Š', '‹', 'Œ', '\0', 'Ž', '\0', '\0', '‘', '’', '“',
    '”', '•', '–', '—', '˜', '™', 'š', '›', 'œ', '\0', 'ž', 'Ÿ',
];

/// Whether a name can be written into a descriptor, which has no way to write quotes and line ends.
pub fn is_writable(name: &str) -> bool {
    !name.is_empty() && !name.contains(['"', '\n', '\r', '\0'])
}

/// `text` with the value of `key` replaced, or the line added behind the line of `after`, or removed.
pub fn with_key(text: &[u8], key: &str, value: Option<&str>, after: &str) -> Vec<u8> {
    let is = |line: &[u8], key: &str| {
        let line = line.trim_ascii();
        let name = line
            .iter()
            .position(|byte| *byte == b'=')
            .and_then(|at| line.get(..at));
        name.is_some_and(|name| name.trim_ascii().eq_ignore_ascii_case(key.as_bytes()))
    };
    let there = text.split(|byte| *byte == b'\n').any(|line| is(line, key));
    let equals = if key.starts_with("ddb.") { " = " } else { "=" };
    let written = value.map(|value| format!("{key}{equals}{value}").into_bytes());
    let mut lines: Vec<Vec<u8>> = Vec::new();
    for line in text.split(|byte| *byte == b'\n') {
        let end: &[u8] = if line.ends_with(b"\r") { b"\r" } else { b"" };
        let new = |written: &Vec<u8>| [written.as_slice(), end].concat();
        if is(line, key) {
            lines.extend(written.as_ref().map(new));
            continue;
        }
        lines.push(line.to_vec());
        if !there && is(line, after) {
            lines.extend(written.as_ref().map(new));
        }
    }
    lines.join(&b'\n')
}

/// `text` with `sectors` as the size of extent number `index`.
pub fn with_extent_len(text: &[u8], index: usize, sectors: u64) -> Vec<u8> {
    let mut seen = 0_usize;
    let mut lines: Vec<Vec<u8>> = Vec::new();
    for line in text.split(|byte| *byte == b'\n') {
        let trimmed = line.trim_ascii();
        let found = match access(trimmed) {
            Some((_, rest)) if !trimmed.starts_with(b"#") => {
                seen = seen.saturating_add(1);
                (seen == index.saturating_add(1)).then_some(rest)
            }
            _ => None,
        };
        match found {
            Some(rest) => {
                let (first, _) = word(trimmed);
                let (_, tail) = word(rest);
                let end: &[u8] = if line.ends_with(b"\r") { b"\r" } else { b"" };
                let number = format!(" {sectors} ");
                lines.push([first, number.as_bytes(), tail, end].concat());
            }
            None => lines.push(line.to_vec()),
        }
    }
    lines.join(&b'\n')
}

#[cfg(test)]
mod tests;
