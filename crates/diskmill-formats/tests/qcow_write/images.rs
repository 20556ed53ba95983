//! Images of every kind a writer must cope with.

use std::path::Path;

use diskmill_core::{Chain, Driver, GuestOffset, OpenSpec, Role};
use diskmill_formats::qcow::layout::HEADER_LEN;
use diskmill_formats::{qcow, raw};
use diskmill_testkit::process::Run;
use diskmill_testkit::{Scratch, oracle};

use super::support::disk::{self, PASSPHRASE, Stage};

/// How an image is made.
#[derive(Clone, Copy, Debug)]
pub struct Kind {
    /// What it shows.
    pub name: &'static str,
    pub cluster_bits: u8,
    pub l2_bits: u8,
    /// Bytes of the disk.
    pub size: u64,
    /// Bytes of the raw image below.
    pub below: Option<u64>,
    /// Whether every other cluster is compressed.
    pub packed: bool,
    /// Whether data is encrypted.
    pub aes: bool,
}

pub const K: u64 = 1 << 10;

const fn kind(name: &'static str, bits: (u8, u8), size: u64, below: Option<u64>) -> Kind {
    Kind {
        name,
        cluster_bits: bits.0,
        l2_bits: bits.1,
        size,
        below,
        packed: false,
        aes: false,
    }
}

const fn packed(mut kind: Kind) -> Kind {
    kind.packed = true;
    kind
}

const fn aes(mut kind: Kind) -> Kind {
    kind.aes = true;
    kind
}

/// Every kind: both geometries that are made, the edges of what there can be, and what QEMU itself gets wrong.
pub const KINDS: [Kind; 10] = [
    kind("plain", (12, 9), 300 * K + 512, None),
    packed(kind("packed", (12, 9), 300 * K, None)),
    kind("overlay", (9, 12), 200 * K + 512, Some(200 * K + 512)),
    packed(kind("over longer", (12, 6), 300 * K + 1536, Some(700 * K))),
    kind("over shorter", (13, 9), 300 * K + 512, Some(100 * K + 1536)),
    packed(kind("largest", (16, 13), 500 * K, Some(400 * K))),
    kind("many tables", (9, 6), 200 * K, None),
    aes(kind("secret", (12, 9), 300 * K + 512, None)),
    aes(kind("secret overlay", (9, 12), 150 * K, Some(200 * K))),
    aes(kind("secret over longer", (14, 6), 300 * K + 512, Some(500 * K))),
];

/// The kind called `name`.
pub fn named(name: &str) -> Kind {
    *KINDS.iter().find(|kind| kind.name == name).expect("a kind")
}

/// An image as bytes, with all that belongs to it.
#[derive(Debug)]
pub struct Image {
    pub kind: Kind,
    scratch: Scratch,
    /// The bytes of its file.
    pub file: Vec<u8>,
    /// What is below it.
    pub below: Chain,
    /// What the disk reads as.
    pub start: Vec<u8>,
}

/// The name of what is below.
pub const BASE: &str = "base.raw";

fn raw_layer(bytes: &[u8]) -> Chain {
    let file = disk::memory(bytes);
    let parsed = raw::DRIVER
        .parse(file.clone(), &OpenSpec::default())
        .expect("parse");
    let layer = parsed
        .attach(vec![(Role::Main, file)], &OpenSpec::default())
        .expect("the base");
    Chain::new(vec![layer])
}

/// An empty image: header, name, table.
fn empty(kind: &Kind) -> Vec<u8> {
    let mut bytes = vec![0; HEADER_LEN as usize];
    bytes[..8].copy_from_slice(b"QFI\xfb\0\0\0\x01");
    bytes[24..32].copy_from_slice(&kind.size.to_be_bytes());
    (bytes[32], bytes[33]) = (kind.cluster_bits, kind.l2_bits);
    bytes[39] = kind.aes.into();
    if kind.below.is_some() {
        bytes[15] = HEADER_LEN as u8;
        bytes[19] = BASE.len() as u8;
        bytes.extend(BASE.bytes());
    }
    let l1_at = bytes.len().next_multiple_of(8);
    bytes[47] = l1_at as u8;
    let entries = kind.size.div_ceil(1 << (kind.cluster_bits + kind.l2_bits)) as usize;
    bytes.resize(l1_at + (entries * 8).next_multiple_of(512), 0);
    bytes
}

impl Kind {
    pub const fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Makes the image.
    pub fn make(&self) -> Image {
        let scratch = Scratch::new();
        let mut below = Chain::default();
        if let Some(size) = self.below {
            let bytes: Vec<u8> = (0..size).map(|at| (at / 700 % 250) as u8 + 1).collect();
            scratch.file(BASE, &bytes);
            below = raw_layer(&bytes);
        }
        let file = disk::memory(&empty(self));
        let layer = disk::open(&qcow::DRIVER, &file).expect("open");
        let pack = disk::pack(&layer);
        for index in 0..self.size.div_ceil(self.cluster()) {
            let at = index * self.cluster();
            let len = self.cluster().min(self.size - at);
            // Runs of clusters that are there and of clusters that are not.
            if index / 3 % 2 == 1 {
                continue;
            }
            let bytes: Vec<u8> = (at..at + self.cluster())
                .map(|at| {
                    if at / 512 % 7 == 3 {
                        0
                    } else {
                        (at / 512) as u8 | 1
                    }
                })
                .collect();
            let start = GuestOffset::new(at);
            match pack(&bytes).filter(|_| self.packed && index % 2 == 0) {
                Some(stream) => layer.write_encoded(start, diskmill_core::Stored::Packed(&stream), &below),
                None => layer.write_at(start, &bytes[..len as usize], &below),
            }
            .expect("write");
        }
        layer.flush().expect("flush");
        drop(layer);
        let file = disk::bytes(&file);
        Image {
            kind: *self,
            scratch,
            start: disk::read(&qcow::DRIVER, &file, &below).expect("read"),
            file,
            below,
        }
    }
}

impl Image {
    /// The image, to play with.
    pub fn stage(&self) -> Stage<'_> {
        Stage {
            driver: &qcow::DRIVER,
            file: &self.file,
            start: &self.start,
            below: &self.below,
            unit: self.kind.cluster(),
        }
    }

    /// Says which image `run` is to work on.
    fn point(&self, run: Run, path: &Path) -> Run {
        let secret = String::from_utf8(PASSPHRASE.to_vec()).expect("text");
        let key = if self.kind.aes {
            ",encrypt.key-secret=s"
        } else {
            ""
        };
        run.args(["--object", &format!("secret,id=s,data={secret}")])
            .arg("--image-opts")
            .arg(format!("driver=qcow,file.filename={}{key}", path.display()))
    }

    /// What QEMU reads of `bytes`, or what it says.
    pub fn qemu_reads(&self, bytes: &[u8]) -> Result<Vec<u8>, String> {
        let path = self.scratch.file("image.qcow", bytes);
        let out = self.scratch.join("read.raw");
        let run = self.point(oracle::qemu_img().args(["convert", "-O", "raw"]), &path);
        let done = run.arg(&out).finish();
        match done.code {
            Some(0) => Ok(std::fs::read(out).expect("what it has read")),
            _ => Err(done.to_string()),
        }
    }

    /// What our reader finds in `bytes` after QEMU has done `commands` to them.
    pub fn after_qemu(&self, bytes: &[u8], commands: &[String]) -> Vec<u8> {
        let path = self.scratch.file("written.qcow", bytes);
        let mut run = oracle::qemu_io();
        for command in commands {
            run = run.args(["-c", command]);
        }
        let done = self.point(run, &path).ok();
        assert!(!done.out().contains("failed"), "{done}");
        let bytes = std::fs::read(path).expect("the image");
        disk::read(&qcow::DRIVER, &bytes, &self.below).expect("read")
    }

    /// Demands that our check finds nothing wrong with `bytes`, and that QEMU reads `expected` from them.
    #[track_caller]
    pub fn assert_good(&self, bytes: &[u8], expected: &[u8]) {
        let report = disk::check(&qcow::DRIVER, bytes).expect("check");
        let wrong = (report.check_errors, report.corruptions);
        assert_eq!(wrong, (0, 0), "{:#?}", report.findings);
        assert!(disk::read(&qcow::DRIVER, bytes, &self.below).expect("read") == expected);
        assert!(self.qemu_reads(bytes).expect("QEMU reads it") == expected);
    }
}
