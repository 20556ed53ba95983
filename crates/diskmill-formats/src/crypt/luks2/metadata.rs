//! The JSON of LUKS2 (on-disk format 1.1.1, section 3), as far as reading a disk needs it. No I/O.
//!
//! Numbers of 64 bits are text in it, others are numbers.

use std::collections::BTreeMap;

use diskmill_core::decode_base64;
use serde_json::{Map, Value};

use super::{Luks2Error, MAX_LANES, MAX_MEMORY, MAX_WORK};
use crate::crypt::kdf::MAX_ITERATIONS;
use crate::crypt::{CipherSpec, HashAlg};

/// Stripes that every key is split into: nobody has ever written another number.
const STRIPES: u64 = 4000;
/// Slots and digests there may be, and names in a list of them.
const SLOTS_MAX: usize = 32;
/// Bytes of the longest salt or digest that is read.
const BLOB_MAX: usize = 1024;

/// What is read of the metadata.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Metadata {
    pub segment: Segment,
    /// By number. Those that keep no key of the segment are left out.
    pub slots: BTreeMap<u32, Keyslot>,
}

/// The encrypted disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    /// In bytes.
    pub offset: u64,
    /// In bytes; `None`: up to the end of the file.
    pub len: Option<u64>,
    pub spec: CipherSpec,
    pub sector_len: usize,
    /// The number of its first sector, counted by 512 bytes.
    pub first_sector: u64,
}

/// A slot that keeps the key of the segment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Keyslot {
    /// 0, 1 or 2: higher ones are tried first.
    pub priority: u64,
    pub kdf: Kdf,
    pub salt: Vec<u8>,
    /// Of the key material.
    pub spec: CipherSpec,
    /// Of the splitter.
    pub hash: HashAlg,
    /// Where the key material is, in bytes.
    pub offset: u64,
    pub digest: Digest,
}

impl Keyslot {
    /// Bytes of the key material.
    pub fn material_len(&self, key_len: usize) -> u64 {
        (key_len as u64).saturating_mul(STRIPES)
    }
}

/// How a passphrase becomes a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kdf {
    Pbkdf2 {
        hash: HashAlg,
        iterations: u64,
    },
    Argon2 {
        id: bool,
        time: u64,
        memory: u64,
        lanes: u64,
    },
}

/// What tells the right key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Digest {
    pub hash: HashAlg,
    pub iterations: u64,
    pub salt: Vec<u8>,
    pub digest: Vec<u8>,
}

impl Metadata {
    pub fn parse(json: &[u8]) -> Result<Self, Luks2Error> {
        let root: Value =
            serde_json::from_slice(json).map_err(|error| Luks2Error::Json(error.to_string()))?;
        let root = Node {
            value: &root,
            path: String::new(),
        };
        refuse_requirements(&root)?;
        let segments = root.get("segments")?;
        let (segment_name, node) = match segments.map()?.iter().next() {
            Some((name, value)) if segments.map()?.len() == 1 => (name.clone(), segments.child(name, value)),
            _ => {
                let what = format!("{} segments", segments.map()?.len());
                return Err(Luks2Error::Unsupported(what));
            }
        };
        let digests = root.get("digests")?;
        let slots = root.get("keyslots")?;
        for node in [&digests, &slots] {
            let count = node.map()?.len();
            if count > SLOTS_MAX {
                return Err(node.wrong(&format!("{count} objects"), "at most 32 objects"));
            }
        }
        let mut found = BTreeMap::new();
        let mut segment = None;
        for (name, value) in digests.map()? {
            let digest = digests.child(name, value);
            if !digest.get("segments")?.names()?.contains(&segment_name.as_str()) {
                continue;
            }
            let checked = parse_digest(&digest)?;
            for slot_name in digest.get("keyslots")?.names()? {
                let slot = slots.get(slot_name)?;
                if slot.text("type")? != "luks2" {
                    continue;
                }
                let number = slot_name
                    .parse()
                    .map_err(|_| slot.wrong(slot_name, "named by a number"))?;
                let key_len = slot.length("key_size")?;
                let parsed = parse_segment(&node, key_len)?;
                if *segment.get_or_insert(parsed) != parsed {
                    return Err(slot
                        .get("key_size")?
                        .wrong(&key_len.to_string(), "the same in all slots"));
                }
                found.insert(number, parse_slot(&slot, checked.clone())?);
            }
        }
        let segment = segment.ok_or_else(|| Luks2Error::Missing("a key slot for the segment".to_owned()))?;
        Ok(Self {
            segment,
            slots: found,
        })
    }
}

/// Fails if the volume needs a reader that knows more, such as one that is being reencrypted.
fn refuse_requirements(root: &Node<'_>) -> Result<(), Luks2Error> {
    let config = root.get("config")?;
    let Some(requirements) = config.find("requirements")? else {
        return Ok(());
    };
    match requirements.find("mandatory")? {
        Some(mandatory) => match mandatory.names()?.first() {
            Some(name) => Err(Luks2Error::Unsupported(format!(
                "the requirement '{}'",
                clip(name)
            ))),
            None => Ok(()),
        },
        None => Ok(()),
    }
}

fn parse_segment(node: &Node<'_>, key_len: usize) -> Result<Segment, Luks2Error> {
    match node.text("type")? {
        "crypt" => {}
        other => {
            return Err(Luks2Error::Unsupported(format!(
                "a segment of type '{}'",
                clip(other)
            )));
        }
    }
    if node.find("integrity")?.is_some() {
        return Err(Luks2Error::Unsupported("integrity protection".to_owned()));
    }
    let sector_len = node.number("sector_size")?;
    let len = match node.text("size")? {
        "dynamic" => None,
        _ => Some(node.big("size")?),
    };
    let offset = node.big("offset")?;
    let sector_len = match usize::try_from(sector_len) {
        Ok(sector_len @ (512 | 1024 | 2048 | 4096)) => sector_len,
        _ => {
            return Err(node
                .get("sector_size")?
                .wrong(&sector_len.to_string(), "512, 1024, 2048 or 4096"));
        }
    };
    let whole = |bytes: u64| bytes.is_multiple_of(512) && i64::try_from(bytes).is_ok();
    if !whole(offset) {
        return Err(node
            .get("offset")?
            .wrong(&offset.to_string(), "a multiple of 512 below 2^63"));
    }
    if let Some(len) = len
        && !(whole(len) && len.is_multiple_of(sector_len as u64))
    {
        return Err(node
            .get("size")?
            .wrong(&len.to_string(), "a whole number of sectors, below 2^63"));
    }
    Ok(Segment {
        offset,
        len,
        spec: cipher(node.text("encryption")?, key_len)?,
        sector_len,
        first_sector: node.big("iv_tweak")?,
    })
}

fn parse_digest(node: &Node<'_>) -> Result<Digest, Luks2Error> {
    match node.text("type")? {
        "pbkdf2" => {}
        other => {
            return Err(Luks2Error::Unsupported(format!(
                "a digest of type '{}'",
                clip(other)
            )));
        }
    }
    let hash = HashAlg::parse(node.text("hash")?)?;
    let digest = node.blob("digest")?;
    // Shorter ones would let wrong keys through.
    if !(20..=64).contains(&digest.len()) {
        return Err(node
            .get("digest")?
            .wrong(&format!("{} bytes", digest.len()), "20 to 64 bytes"));
    }
    Ok(Digest {
        hash,
        iterations: node.number("iterations")?,
        salt: node.blob("salt")?,
        digest,
    })
}

fn parse_slot(node: &Node<'_>, digest: Digest) -> Result<Keyslot, Luks2Error> {
    let af = node.get("af")?;
    if af.text("type")? != "luks1" || af.number("stripes")? != STRIPES {
        return Err(af.wrong("another splitter", "luks1 with 4000 stripes"));
    }
    let area = node.get("area")?;
    if area.text("type")? != "raw" {
        return Err(area.wrong("of another type", "raw"));
    }
    let (offset, size) = (area.big("offset")?, area.big("size")?);
    let needed = (node.length("key_size")? as u64).saturating_mul(STRIPES);
    if size < needed {
        return Err(area
            .get("size")?
            .wrong(&size.to_string(), &format!("at least {needed}")));
    }
    if i64::try_from(offset).is_err() {
        return Err(area.get("offset")?.wrong(&offset.to_string(), "below 2^63"));
    }
    let kdf = node.get("kdf")?;
    Ok(Keyslot {
        priority: match node.find("priority")? {
            Some(_) => node.number("priority")?,
            None => 1,
        },
        kdf: match kdf.text("type")? {
            "pbkdf2" => Kdf::Pbkdf2 {
                hash: HashAlg::parse(kdf.text("hash")?)?,
                iterations: kdf.number("iterations")?,
            },
            id @ ("argon2i" | "argon2id") => Kdf::Argon2 {
                id: id == "argon2id",
                time: kdf.number("time")?,
                memory: kdf.number("memory")?,
                lanes: kdf.number("cpus")?,
            },
            other => {
                return Err(Luks2Error::Unsupported(format!(
                    "the key derivation '{}'",
                    clip(other)
                )));
            }
        },
        salt: kdf.blob("salt")?,
        spec: cipher(area.text("encryption")?, area.length("key_size")?)?,
        hash: HashAlg::parse(af.text("hash")?)?,
        offset,
        digest,
    })
}

impl Kdf {
    /// Fails if it costs more than is allowed here.
    pub fn check_cost(self, slot: u32) -> Result<(), Luks2Error> {
        let demand = |what: &str, value: u64, min: u64, max: u64| {
            if (min..=max).contains(&value) {
                return Ok(());
            }
            Err(Luks2Error::Field {
                field: format!("{what} of key slot {slot}"),
                value: value.to_string(),
                allowed: format!("{min} to {max}"),
            })
        };
        match self {
            Self::Pbkdf2 { iterations, .. } => demand("iterations", iterations, 1, MAX_ITERATIONS.into()),
            Self::Argon2 {
                time, memory, lanes, ..
            } => {
                demand("cpus", lanes, 1, MAX_LANES)?;
                demand("memory", memory, lanes.saturating_mul(8), MAX_MEMORY)?;
                let max = MAX_WORK.checked_div(memory).unwrap_or(1);
                demand("time", time, 1, max)
            }
        }
    }
}

/// `aes-xts-plain64` for a key of `key_len` bytes.
fn cipher(text: &str, key_len: usize) -> Result<CipherSpec, Luks2Error> {
    let (name, mode) = text.split_once('-').unwrap_or((text, ""));
    Ok(CipherSpec::parse(clip(name), clip(mode), key_len)?)
}

/// The start of a text that may be megabytes long.
fn clip(text: &str) -> &str {
    let end = text.char_indices().nth(64).map_or(text.len(), |(at, _)| at);
    text.get(..end).unwrap_or_default()
}

/// A place in the metadata.
struct Node<'a> {
    value: &'a Value,
    path: String,
}

impl<'a> Node<'a> {
    fn child(&self, name: &str, value: &'a Value) -> Node<'a> {
        let path = match self.path.as_str() {
            "" => clip(name).to_owned(),
            path => format!("{path}.{}", clip(name)),
        };
        Node { value, path }
    }

    fn wrong(&self, value: &str, allowed: &str) -> Luks2Error {
        Luks2Error::Field {
            field: self.path.clone(),
            value: clip(value).to_owned(),
            allowed: allowed.to_owned(),
        }
    }

    fn map(&self) -> Result<&'a Map<String, Value>, Luks2Error> {
        self.value
            .as_object()
            .ok_or_else(|| self.wrong("something else", "an object"))
    }

    fn find(&self, name: &str) -> Result<Option<Node<'a>>, Luks2Error> {
        Ok(self.map()?.get(name).map(|value| self.child(name, value)))
    }

    fn get(&self, name: &str) -> Result<Node<'a>, Luks2Error> {
        let missing = || {
            Luks2Error::Missing(match self.path.as_str() {
                "" => clip(name).to_owned(),
                path => format!("{path}.{}", clip(name)),
            })
        };
        self.find(name)?.ok_or_else(missing)
    }

    fn text(&self, name: &str) -> Result<&'a str, Luks2Error> {
        let node = self.get(name)?;
        node.value
            .as_str()
            .ok_or_else(|| node.wrong("something else", "a text"))
    }

    fn number(&self, name: &str) -> Result<u64, Luks2Error> {
        let node = self.get(name)?;
        node.value
            .as_u64()
            .ok_or_else(|| node.wrong("something else", "a number of at least 0"))
    }

    /// A number of 64 bits.
    fn big(&self, name: &str) -> Result<u64, Luks2Error> {
        let text = self.text(name)?;
        let digits = text.bytes().all(|byte| byte.is_ascii_digit());
        match text.parse() {
            Ok(number) if digits => Ok(number),
            _ => Err(self.get(name)?.wrong(text, "a number below 2^64")),
        }
    }

    /// A length of a key, in bytes; whether it is a good one the cipher says.
    fn length(&self, name: &str) -> Result<usize, Luks2Error> {
        Ok(usize::try_from(self.number(name)?).unwrap_or(usize::MAX))
    }

    fn blob(&self, name: &str) -> Result<Vec<u8>, Luks2Error> {
        let text = self.text(name)?;
        let blob = match text.len() <= BLOB_MAX {
            true => decode_base64(text.as_bytes()).ok(),
            false => None,
        };
        match blob {
            Some(blob) if blob.as_bytes().len() >= 8 => Ok(blob.as_bytes().to_vec()),
            _ => Err(self
                .get(name)?
                .wrong(text, "base64 of 8 bytes or more, and 1024 signs at most")),
        }
    }

    /// A list of names.
    fn names(&self) -> Result<Vec<&'a str>, Luks2Error> {
        let wrong = || self.wrong("something else", "a list of names");
        let list = self.value.as_array().ok_or_else(wrong)?;
        if list.len() > SLOTS_MAX {
            return Err(self.wrong(&format!("{} names", list.len()), "at most 32 names"));
        }
        list.iter().map(|name| name.as_str().ok_or_else(wrong)).collect()
    }
}
