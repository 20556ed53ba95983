//! The tar archive that an OVA is: its members found without reading them.
//!
//! ```text
//!   0  name      100    124  size  12    257  magic  "ustar"
//! 100  mode        8    136  mtime 12    263  version  2
//! 108  uid         8    148  chksum 8    345  prefix 155
//! 116  gid         8    156  type   1    512  the data, padded to 512
//! ```
//!
//! Numbers are octal text or, with the first bit set, big-endian binary (GNU). Names and sizes that do not fit come in
//! records before their member: `x` and `g` (POSIX.1-2001 pax), `L` (GNU). Source: POSIX.1-2001 `pax`, GNU tar manual.
#![deny(clippy::arithmetic_side_effects)]

use diskmill_core::{Error, ErrorKind, HostOffset, Result, Storage};

use super::name::{MemberName, NameError};

/// Bytes of a header, and what data is padded to.
const BLOCK: u64 = 512;

type Block = [u8; 512];

/// Members an archive may have.
const MEMBERS: usize = 10_000;

/// Bytes of a record that gives a name or a size.
const RECORD: u64 = 64 << 10;

/// A file inside an archive.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Member {
    /// Its name.
    pub name: MemberName,
    /// Where its first byte is in the archive.
    pub start: HostOffset,
    /// How many bytes it has.
    pub len: u64,
    /// What about its header not all readers of packages know, if anything.
    pub unusual: Option<Unusual>,
}

/// What not all readers of packages know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Unusual {
    /// A header from before POSIX.
    Old,
    /// A name or size in a record before the header.
    Record,
    /// A name with a prefix.
    Prefix,
}

/// What is wrong with an archive.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ArchiveError {
    /// The sum of a header's bytes is not what it says.
    #[error("the tar header has checksum {found:o}, its bytes add up to {sum:o}")]
    Checksum {
        /// What it says.
        found: u64,
        /// The sum, taken with blanks for the field.
        sum: u64,
    },
    /// A number that is neither octal text nor binary that fits.
    #[error("the tar header's field {0} is no number below 2^63")]
    Number(&'static str),
    /// A name that does not stay inside of the package.
    #[error("the name of a member is not usable")]
    Name(#[source] NameError),
    /// A member that is not a plain file.
    #[error("member '{name}' is {what}, must be a plain file")]
    Type {
        /// Its name.
        name: String,
        /// What it is.
        what: &'static str,
    },
    /// A member ends behind the archive.
    #[error("member '{name}' has {len} bytes from offset {start}, but the archive ends at {end}")]
    Truncated {
        /// Its name.
        name: String,
        /// Where it starts.
        start: u64,
        /// How long it says it is.
        len: u64,
        /// The length of the archive.
        end: u64,
    },
    /// The same name twice: which one counts differs between programs.
    #[error("member '{0}' is there twice")]
    Twice(String),
    /// More members than anybody needs.
    #[error("the archive has more than {MEMBERS} members")]
    TooMany,
    /// A record before a member is longer than any that is needed.
    #[error("the tar record of type '{kind}' has {len} bytes, must be at most {RECORD}")]
    Record {
        /// Its type.
        kind: char,
        /// Its length.
        len: u64,
    },
    /// A pax record that does not read as "LENGTH KEY=VALUE".
    #[error("a pax record is malformed")]
    Pax,
}

impl ArchiveError {
    fn at(self, at: u64) -> Error {
        Error::new(ErrorKind::Malformed, self).host(HostOffset::new(at))
    }
}

/// The members of an archive, in its order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Archive {
    members: Vec<Member>,
}

impl Archive {
    /// Whether `head`, the start of a file, can be a tar archive: its first header's checksum is right.
    pub fn recognise(head: &[u8]) -> bool {
        head.first_chunk::<512>()
            .is_some_and(|block| *block != [0; 512] && checksum(block).is_ok())
    }

    /// Walks the headers of `storage`. Reads no data but that of records.
    pub fn read(storage: &dyn Storage) -> Result<Self> {
        let end = storage.len()?;
        let mut archive = Self::default();
        let mut pending = Pending::default();
        let mut at = 0u64;
        // A missing or cut end of the archive is common and does no harm: every member is whole.
        while at.checked_add(BLOCK).is_some_and(|next| next <= end) {
            let mut block: Block = [0; 512];
            storage.read_at(HostOffset::new(at), &mut block)?;
            if block == [0; 512] {
                break;
            }
            let header = Header::parse(&block, &pending).map_err(|error| error.at(at))?;
            let start = at.saturating_add(BLOCK);
            if start.checked_add(header.len).is_none_or(|last| last > end) {
                let error = ArchiveError::Truncated {
                    name: header.name,
                    start,
                    len: header.len,
                    end,
                };
                return Err(error.at(at));
            }
            match header.kind {
                Kind::Record(kind) => {
                    if header.len > RECORD {
                        let error = ArchiveError::Record {
                            kind,
                            len: header.len,
                        };
                        return Err(error.at(at));
                    }
                    let mut data = vec![0; usize::try_from(header.len).unwrap_or_default()];
                    storage.read_at(HostOffset::new(start), &mut data)?;
                    pending.take(kind, &data).map_err(|error| error.at(at))?;
                }
                Kind::Directory => pending.next_member(),
                Kind::File => {
                    let unusual = match header.unusual {
                        _ if pending.is_any() => Some(Unusual::Record),
                        unusual => unusual,
                    };
                    pending.next_member();
                    archive
                        .add(&header.name, start, header.len, unusual)
                        .map_err(|error| error.at(at))?;
                }
                Kind::Other(what) => {
                    let name = header.name;
                    return Err(ArchiveError::Type { name, what }.at(at));
                }
            }
            at = start
                .saturating_add(header.len)
                .checked_next_multiple_of(BLOCK)
                .unwrap_or(u64::MAX);
        }
        Ok(archive)
    }

    fn add(
        &mut self,
        name: &str,
        start: u64,
        len: u64,
        unusual: Option<Unusual>,
    ) -> Result<(), ArchiveError> {
        let name = MemberName::new(name).map_err(ArchiveError::Name)?;
        if self.find(name.as_str()).is_some() {
            return Err(ArchiveError::Twice(name.as_str().to_owned()));
        }
        if self.members.len() >= MEMBERS {
            return Err(ArchiveError::TooMany);
        }
        self.members.push(Member {
            name,
            start: HostOffset::new(start),
            len,
            unusual,
        });
        Ok(())
    }

    /// The members, in the order of the archive.
    pub fn members(&self) -> &[Member] {
        &self.members
    }

    /// The member of that name.
    pub fn find(&self, name: &str) -> Option<&Member> {
        self.members.iter().find(|member| member.name.as_str() == name)
    }
}

enum Kind {
    File,
    Directory,
    Record(char),
    Other(&'static str),
}

struct Header {
    name: String,
    len: u64,
    kind: Kind,
    unusual: Option<Unusual>,
}

impl Header {
    fn parse(block: &Block, pending: &Pending) -> Result<Self, ArchiveError> {
        checksum(block)?;
        let kind = match field(block, 156, 1).first().copied().unwrap_or(0) {
            0 | b'0' | b'7' => Kind::File,
            b'5' => Kind::Directory,
            kind @ (b'x' | b'g' | b'L' | b'K') => Kind::Record(char::from(kind)),
            b'1' => Kind::Other("a hard link"),
            b'2' => Kind::Other("a symbolic link"),
            b'3' | b'4' => Kind::Other("a device"),
            b'6' => Kind::Other("a named pipe"),
            b'S' => Kind::Other("a sparse file"),
            _ => Kind::Other("of an unknown type"),
        };
        let (name, len) = match kind {
            Kind::Record(_) => (None, None),
            _ => (pending.name.clone(), pending.size),
        };
        let name = match name {
            Some(name) => name,
            None => own_name(block)?,
        };
        let len = match len {
            Some(len) => len,
            None => number(field(block, 124, 12)).ok_or(ArchiveError::Number("size"))?,
        };
        // Version 7 knows no directories: it marks them by a slash.
        let kind = match kind {
            Kind::File if name.ends_with('/') => Kind::Directory,
            kind => kind,
        };
        let len = match kind {
            Kind::Directory => 0,
            _ => len,
        };
        let magic = field(block, 257, 5) == b"ustar";
        let unusual = match magic {
            false => Some(Unusual::Old),
            true if field(block, 345, 1) != b"\0" && is_posix(block) => Some(Unusual::Prefix),
            true => None,
        };
        Ok(Self {
            name,
            len,
            kind,
            unusual,
        })
    }
}

/// What records say of the member that follows them.
#[derive(Default)]
struct Pending {
    name: Option<String>,
    size: Option<u64>,
}

impl Pending {
    fn take(&mut self, kind: char, data: &[u8]) -> Result<(), ArchiveError> {
        match kind {
            'L' => self.name = Some(text(data)?),
            'x' => return self.pax(data),
            // A link's target, of which there are none; and settings for all members, of which none matters but these:
            // a size or name for all of them is nonsense.
            _ => {}
        }
        Ok(())
    }

    fn pax(&mut self, data: &[u8]) -> Result<(), ArchiveError> {
        let mut rest = data;
        while !rest.is_empty() && rest.first() != Some(&0) {
            let blank = rest
                .iter()
                .position(|byte| *byte == b' ')
                .ok_or(ArchiveError::Pax)?;
            let len = rest
                .get(..blank)
                .and_then(|digits| std::str::from_utf8(digits).ok())
                .and_then(|digits| digits.parse::<usize>().ok())
                .filter(|len| *len > blank)
                .ok_or(ArchiveError::Pax)?;
            let record = rest
                .get(blank.saturating_add(1)..len)
                .and_then(|record| record.strip_suffix(b"\n"))
                .ok_or(ArchiveError::Pax)?;
            let record = std::str::from_utf8(record).map_err(|_| ArchiveError::Pax)?;
            let (key, value) = record.split_once('=').ok_or(ArchiveError::Pax)?;
            match key {
                "path" => self.name = Some(value.to_owned()),
                "size" => {
                    let size = value.parse().ok().filter(|size| *size < 1 << 63);
                    self.size = Some(size.ok_or(ArchiveError::Number("size"))?);
                }
                key if key.starts_with("GNU.sparse.") => {
                    return Err(ArchiveError::Type {
                        name: self.name.clone().unwrap_or_default(),
                        what: "a sparse file",
                    });
                }
                _ => {}
            }
            rest = rest.get(len..).ok_or(ArchiveError::Pax)?;
        }
        Ok(())
    }

    fn is_any(&self) -> bool {
        self.name.is_some() || self.size.is_some()
    }

    fn next_member(&mut self) {
        *self = Self::default();
    }
}

fn is_posix(block: &Block) -> bool {
    field(block, 257, 6) == b"ustar\0"
}

fn own_name(block: &Block) -> Result<String, ArchiveError> {
    let name = text(field(block, 0, 100))?;
    // Only POSIX headers have a prefix; GNU's put times there.
    let prefix = if is_posix(block) {
        text(field(block, 345, 155))?
    } else {
        String::new()
    };
    Ok(match prefix.as_str() {
        "" => name,
        prefix => format!("{prefix}/{name}"),
    })
}

fn field(block: &Block, at: usize, len: usize) -> &[u8] {
    block.get(at..at.saturating_add(len)).unwrap_or_default()
}

/// Text up to its first NUL.
fn text(bytes: &[u8]) -> Result<String, ArchiveError> {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    let bytes = bytes.get(..end).unwrap_or_default();
    match std::str::from_utf8(bytes) {
        Ok(text) => Ok(text.to_owned()),
        Err(_) => Err(ArchiveError::Name(NameError::NotText)),
    }
}

/// A number below 2^63, in octal text or in binary.
fn number(field: &[u8]) -> Option<u64> {
    let (first, rest) = field.split_first()?;
    if first & 0x80 != 0 {
        // The rest of the first byte is the number's top; bit 6 is its sign.
        let top = u64::from(first & 0x7f);
        return rest
            .iter()
            .try_fold(top, |value, byte| {
                value.checked_mul(256)?.checked_add(u64::from(*byte))
            })
            .filter(|value| *value < 1 << 63);
    }
    let text = std::str::from_utf8(field).ok()?;
    let text = text.trim_matches(|char| char == ' ' || char == '\0');
    if text.is_empty() {
        return Some(0);
    }
    u64::from_str_radix(text, 8)
        .ok()
        .filter(|value| *value < 1 << 63 && !text.starts_with('+'))
}

/// Checks the sum over a header's bytes. Old programs summed them as signed ones.
fn checksum(block: &Block) -> Result<(), ArchiveError> {
    let found = number(field(block, 148, 8)).ok_or(ArchiveError::Number("chksum"))?;
    let bytes = || {
        let blank = |(at, byte): (usize, &u8)| if (148..156).contains(&at) { b' ' } else { *byte };
        block.iter().enumerate().map(blank)
    };
    let sum: u64 = bytes().map(u64::from).sum();
    let signed: i64 = bytes().map(|byte| i64::from(byte.cast_signed())).sum();
    if found == sum || i64::try_from(found) == Ok(signed) {
        Ok(())
    } else {
        Err(ArchiveError::Checksum { found, sum })
    }
}
