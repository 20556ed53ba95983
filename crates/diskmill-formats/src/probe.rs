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
    /// A format or container that is known and cannot be opened, if the bytes are one's.
    pub foreign: Option<Foreign>,
}

/// A format or container that is known and cannot be opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Foreign {
    /// What to call it: "a VMDK disk image", "an ISO 9660 image".
    pub name: &'static str,
    /// What sort of thing it is.
    pub kind: ForeignKind,
}

/// What sort of thing a [`Foreign`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ForeignKind {
    /// A disk image in a format without a driver.
    Disk,
    /// Holds files, a disk image perhaps among them.
    Archive,
    /// A compressed file: it has to be unpacked first.
    Compressed,
    /// As good as raw: the bytes of a disc, or a raw disk with something behind it.
    AlsoRaw,
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

/// The format or container that no driver here opens, if the bytes are one's: so that it can be named instead of
/// called raw.
pub fn recognise(sample: &Sample<'_>) -> Option<Foreign> {
    SIGNATURES
        .iter()
        .filter(|signature| !signature.has_driver())
        .find(|signature| signature.test.matches(sample))
        .map(|signature| Foreign {
            name: signature.name,
            kind: signature.kind,
        })
}

/// What tells a format.
struct Signature {
    name: &'static str,
    kind: ForeignKind,
    /// What `qemu-img` calls the format, if it has a name for it: a driver of that name takes over.
    format: Option<&'static str>,
    test: Test,
}

enum Test {
    /// Bytes at a place from the start.
    Head(usize, &'static [u8]),
    /// Bytes at the start of the last 512.
    Tail(&'static [u8]),
    /// A text file whose first line that is neither empty nor a comment starts so.
    Line(&'static [u8]),
    /// An XML file whose root element is called so, whatever its namespace is.
    Root(&'static [u8]),
}

impl Signature {
    const fn disk(name: &'static str, format: &'static str, test: Test) -> Self {
        Self {
            name,
            kind: ForeignKind::Disk,
            format: Some(format),
            test,
        }
    }

    const fn other(name: &'static str, kind: ForeignKind, test: Test) -> Self {
        Self {
            name,
            kind,
            format: None,
            test,
        }
    }

    fn has_driver(&self) -> bool {
        self.format
            .is_some_and(|format| registry::by_name(format).is_some())
    }
}

impl Test {
    fn matches(&self, sample: &Sample<'_>) -> bool {
        match *self {
            Self::Head(at, bytes) => sample.head.get(at..).is_some_and(|rest| rest.starts_with(bytes)),
            Self::Tail(bytes) => sample.tail.len() == Sample::TAIL && sample.tail.starts_with(bytes),
            Self::Line(bytes) => first_line(sample.head).starts_with(bytes),
            Self::Root(name) => root_element(sample.head).is_some_and(|found| found == name),
        }
    }
}

/// Bytes of a text file that are looked at.
const TEXT: usize = 4096;

/// The first line of a text that is neither empty nor a comment.
fn first_line(head: &[u8]) -> &[u8] {
    let text = head.get(..head.len().min(TEXT)).unwrap_or_default();
    text.split(|byte| *byte == b'\n')
        .map(<[u8]>::trim_ascii)
        .find(|line| !line.is_empty() && !line.starts_with(b"#"))
        .unwrap_or_default()
}

/// The name of the root element, without its namespace.
pub(crate) fn root_element(head: &[u8]) -> Option<&[u8]> {
    let text = head.get(..head.len().min(TEXT))?;
    let text = text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(text);
    if !text.trim_ascii_start().starts_with(b"<") {
        return None;
    }
    let element = text
        .split(|byte| *byte == b'<')
        .skip(1)
        .find(|tag| !tag.starts_with(b"?") && !tag.starts_with(b"!"))?;
    let name = element
        .split(|byte| byte.is_ascii_whitespace() || matches!(byte, b'>' | b'/'))
        .next()?;
    name.rsplit(|byte| *byte == b':').next()
}

static SIGNATURES: [Signature; 27] = [
    Signature::disk(
        "a qcow (version 1) disk image",
        "qcow",
        Test::Head(0, b"QFI\xfb\0\0\0\x01"),
    ),
    Signature::disk("a QED disk image", "qed", Test::Head(0, b"QED\0")),
    Signature::disk("a VMDK disk image", "vmdk", Test::Head(0, b"KDMV")),
    Signature::disk("a VMDK disk image", "vmdk", Test::Head(0, b"COWD")),
    Signature::disk(
        "a VMDK disk image",
        "vmdk",
        Test::Head(0, b"\xbe\xba\xfe\xca\0\0\0\0"),
    ),
    Signature::disk("a VMDK descriptor file", "vmdk", Test::Line(b"version=")),
    Signature::disk("a VDI disk image", "vdi", Test::Head(0x40, b"\x7f\x10\xda\xbe")),
    Signature::disk("a VHDX disk image", "vhdx", Test::Head(0, b"vhdxfile")),
    Signature::disk("a VHD disk image", "vpc", Test::Head(0, b"conectix")),
    Signature::disk(
        "a Parallels disk image",
        "parallels",
        Test::Head(0, b"WithoutFreeSpace"),
    ),
    Signature::disk(
        "a Parallels disk image",
        "parallels",
        Test::Head(0, b"WithouFreSpacExt"),
    ),
    Signature::disk("a LUKS-encrypted disk", "luks", Test::Head(0, b"LUKS\xba\xbe")),
    Signature::disk("a UML COW disk image", "cow", Test::Head(0, b"OOOM")),
    Signature::disk(
        "a Bochs disk image",
        "bochs",
        Test::Head(0, b"Bochs Virtual HD Image"),
    ),
    Signature::disk(
        "a cloop disk image",
        "cloop",
        Test::Head(0, b"#!/bin/sh\n#V2.0 Format\n"),
    ),
    Signature::disk("a DMG disk image", "dmg", Test::Tail(b"koly")),
    Signature::other("an OVF descriptor", ForeignKind::Archive, Test::Root(b"Envelope")),
    Signature::other(
        "a tar archive (perhaps an OVA)",
        ForeignKind::Archive,
        Test::Head(257, b"ustar"),
    ),
    Signature::other(
        "a zip archive",
        ForeignKind::Archive,
        Test::Head(0, b"PK\x03\x04"),
    ),
    Signature::other(
        "a 7z archive",
        ForeignKind::Archive,
        Test::Head(0, b"7z\xbc\xaf\x27\x1c"),
    ),
    Signature::other(
        "a gzip file",
        ForeignKind::Compressed,
        Test::Head(0, b"\x1f\x8b\x08"),
    ),
    Signature::other(
        "an xz file",
        ForeignKind::Compressed,
        Test::Head(0, b"\xfd7zXZ\0"),
    ),
    Signature::other(
        "a zstd file",
        ForeignKind::Compressed,
        Test::Head(0, b"\x28\xb5\x2f\xfd"),
    ),
    Signature::other("a bzip2 file", ForeignKind::Compressed, Test::Head(0, b"BZh")),
    Signature::other(
        "an ISO 9660 image",
        ForeignKind::AlsoRaw,
        Test::Head(0x8001, b"CD001"),
    ),
    Signature::other("a UDF image", ForeignKind::AlsoRaw, Test::Head(0x8001, b"BEA01")),
    Signature::other(
        "a VHD disk image of fixed size",
        ForeignKind::AlsoRaw,
        Test::Tail(b"conectix"),
    ),
];

#[cfg(test)]
mod tests {
    use diskmill_core::Format;

    use super::*;

    fn sample(head: &[u8]) -> Sample<'_> {
        Sample {
            head,
            tail: &head[head.len().saturating_sub(Sample::TAIL)..],
            len: head.len() as u64,
            name: None,
        }
    }

    #[test]
    fn nothing_special_is_raw() {
        for head in [&[][..], &[0; 512], b"QFI", b"QFI\xfb"] {
            let probed = probe(&sample(head));
            assert_eq!(probed.driver.format(), Format::Raw);
            assert_eq!((probed.confidence, probed.foreign), (Match::Possible, None));
        }
    }

    #[test]
    fn qcow2_is_told_from_qcow_by_its_version() {
        for version in [2, 3, 4] {
            let probed = probe(&sample(&[b'Q', b'F', b'I', 0xfb, 0, 0, 0, version]));
            assert_eq!(
                (probed.driver.format(), probed.confidence),
                (Format::Qcow2, Match::ByMagic)
            );
            assert!(probed.foreign.is_none());
        }
        let old = probe(&sample(b"QFI\xfb\0\0\0\x01"));
        assert_eq!(
            (old.driver.format(), old.confidence),
            (Format::Qcow, Match::ByMagic)
        );
        assert!(old.foreign.is_none());
    }

    #[test]
    fn known_formats_without_a_driver_are_named() {
        let mut iso = vec![0; 40_000];
        iso[0x8001..0x8006].copy_from_slice(b"CD001");
        let mut vhd = vec![0; 2048];
        vhd[1536..1544].copy_from_slice(b"conectix");
        let ovf = b"<?xml version=\"1.0\"?>\n<!-- x -->\n<ovf:Envelope xmlns:ovf=\"x\">";
        for (head, name, kind) in [
            (
                &b"conectix\0\0\0\0\0\0\0\0"[..],
                "a VHD disk image",
                ForeignKind::Disk,
            ),
            (b"vhdxfile", "a VHDX disk image", ForeignKind::Disk),
            (&vhd, "a VHD disk image of fixed size", ForeignKind::AlsoRaw),
            (ovf, "an OVF descriptor", ForeignKind::Archive),
            (&iso, "an ISO 9660 image", ForeignKind::AlsoRaw),
            (b"\xfd7zXZ\0\0", "an xz file", ForeignKind::Compressed),
            (b"PK\x03\x04", "a zip archive", ForeignKind::Archive),
        ] {
            let foreign = recognise(&sample(head)).unwrap();
            assert_eq!((foreign.name, foreign.kind), (name, kind));
        }
    }
}
