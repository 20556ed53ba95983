//! Telling formats apart by their first and last bytes.

use diskmill_core::{Driver, Match, Sample};

use crate::{raw, registry};

/// What a file most likely is.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Probed {
    /// The driver of that format; raw's if nothing says otherwise.
    pub driver: &'static dyn Driver,
    /// How sure it is.
    pub confidence: Match,
    /// A second format the bytes would match as well: somebody may be tricking one program or another.
    pub also: Option<&'static dyn Driver>,
    /// A format or container that is known but cannot be opened, if the bytes are one's.
    pub foreign: Option<&'static str>,
}

/// Finds the driver for a file. Raw matches everything, and everything else better.
pub fn probe(sample: &Sample<'_>) -> Probed {
    let mut best: &'static dyn Driver = &raw::DRIVER;
    let mut confidence = Match::Possible;
    let mut also = None;
    for driver in registry::drivers() {
        let matched = driver.probe(sample);
        if matched > confidence {
            (best, confidence, also) = (*driver, matched, None);
        } else if matched == confidence && matched >= Match::ByName && driver.format() != best.format() {
            also = Some(*driver);
        }
    }
    Probed {
        driver: best,
        confidence,
        also,
        foreign: recognise(sample),
    }
}

/// The name of a format or container that no driver here opens: so that it can be named instead of called raw.
pub fn recognise(sample: &Sample<'_>) -> Option<&'static str> {
    SIGNATURES
        .iter()
        .find(|signature| {
            signature.matches(sample.head) || (signature.in_tail && signature.matches(sample.tail))
        })
        .map(|signature| signature.name)
}

struct Signature {
    name: &'static str,
    at: usize,
    bytes: &'static [u8],
    /// Also look in the last 512 bytes.
    in_tail: bool,
}

impl Signature {
    const fn head(name: &'static str, at: usize, bytes: &'static [u8]) -> Self {
        Self {
            name,
            at,
            bytes,
            in_tail: false,
        }
    }

    fn matches(&self, bytes: &[u8]) -> bool {
        bytes
            .get(self.at..)
            .is_some_and(|rest| rest.starts_with(self.bytes))
    }
}

static SIGNATURES: [Signature; 3] = [
    Signature::head("vdi image", 0x40, &[0x7f, 0x10, 0xda, 0xbe]),
    Signature::head("vhdx image", 0, b"vhdxfile"),
    Signature {
        name: "vhd image",
        at: 0,
        bytes: b"conectix",
        in_tail: true,
    },
];
