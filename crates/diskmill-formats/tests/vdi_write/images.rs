//! Images of every kind a writer must cope with.

use std::sync::Arc;

use diskmill_core::{
    BackingName, Chain, CheckReport, CompactReport, CompactSpec, CreateSpec, Driver, Facts, Format,
    GuestOffset, Job, Layer, LayerMut, Options, Repair, Result, Role, Storage, StorageMut,
};
use diskmill_formats::vdi;
use diskmill_storage::Memory;
use diskmill_testkit::contract::builder::{Guest, fill};
use diskmill_testkit::sparse_random::mix;
use diskmill_testkit::{Scratch, oracle};

use super::support::disk::{self, Stage};
pub use super::support::disk::{bytes, how, memory};

/// How an image is made.
#[derive(Clone, Copy, Debug)]
pub struct Kind {
    /// What it shows.
    pub name: &'static str,
    /// Options of its creation.
    pub options: &'static str,
    /// Bytes of the disk.
    pub size: u64,
    /// Bytes of the parent.
    pub parent: Option<u64>,
}

pub const M: u64 = 1 << 20;

/// Every kind. Some fill the map of 128 entries that fits into a sector, so that a larger one must move.
pub const KINDS: [Kind; 7] = [
    Kind {
        name: "dynamic",
        options: "",
        size: 4 * M + 512,
        parent: None,
    },
    Kind {
        name: "empty",
        options: "",
        size: 3 * M,
        parent: None,
    },
    Kind {
        name: "fixed",
        options: "static=on",
        size: 3 * M + 1024,
        parent: None,
    },
    Kind {
        name: "aligned",
        options: "align=64k",
        size: 3 * M,
        parent: None,
    },
    Kind {
        name: "over same",
        options: "",
        size: 4 * M,
        parent: Some(4 * M),
    },
    Kind {
        name: "over shorter",
        options: "",
        size: 4 * M + 512,
        parent: Some(2 * M + 1024),
    },
    Kind {
        name: "over longer",
        options: "",
        size: 2 * M + 512,
        parent: Some(5 * M),
    },
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

/// A disk in which two blocks of three have something, and one in four nothing but in its middle.
struct Disk {
    size: u64,
    salt: u64,
    holes: bool,
}

impl Guest for Disk {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, at: u64, buf: &mut [u8]) {
        for (byte, at) in buf.iter_mut().zip(at..) {
            let block = at / M;
            let empty = block % 3 == 1 || self.holes;
            let edge = mix(block ^ self.salt).is_multiple_of(2) && !(70_000..300_000).contains(&(at % M));
            *byte = if empty || edge {
                0
            } else {
                (at / 512 % 250) as u8 ^ self.salt as u8 | 1
            };
        }
    }

    fn is_hole(&self, at: u64, len: u64) -> bool {
        let mut bytes = vec![0; len.min(self.size - at) as usize];
        self.read_at(at, &mut bytes);
        bytes.iter().all(|byte| *byte == 0)
    }
}

fn file() -> Arc<dyn StorageMut> {
    Arc::new(Memory::new())
}

impl Kind {
    /// Makes the image.
    pub fn make(&self) -> Image {
        let mut spec = CreateSpec::new(self.size);
        spec.options = Options::parse(self.options);
        let mut below = Chain::default();
        let mut start = vec![0; self.size as usize];
        if let Some(size) = self.parent {
            let disk = Disk {
                size,
                salt: 0x77,
                holes: false,
            };
            let parent = fill(&vdi::DRIVER, &CreateSpec::new(size), &file, &disk, 1, 16);
            let layer = read_only(&bytes(&parent[0])).expect("the parent");
            let facts: &Facts = layer.facts();
            assert_eq!(facts.format, Format::Vdi);
            spec.backing = Some(BackingName {
                name: "parent.vdi".to_owned(),
                format: Some("vdi".to_owned()),
            });
            spec.backing_facts = Some(Box::new(facts.clone()));
            below = Chain::new(vec![layer]);
        }
        let disk = Disk {
            size: self.size,
            salt: 0,
            holes: self.name == "empty",
        };
        let image = fill(&vdi::DRIVER, &spec, &file, &disk, 1, 16);
        let file = bytes(&image[0]);
        let mut layers = vec![read_only(&file).expect("the image")];
        layers.extend(below.layers().iter().cloned());
        Chain::new(layers)
            .read_at(GuestOffset::ZERO, &mut start)
            .expect("read");
        Image {
            kind: *self,
            scratch: Scratch::new(),
            file,
            below,
            start,
        }
    }
}

/// Opens an image for writing.
pub fn open(disk: &Arc<dyn StorageMut>) -> Result<Arc<dyn LayerMut>> {
    disk::open(&vdi::DRIVER, disk)
}

/// Opens an image for reading.
pub fn read_only(bytes: &[u8]) -> Result<Arc<dyn Layer>> {
    disk::read_only(&vdi::DRIVER, bytes)
}

/// What our own check finds.
pub fn check(bytes: &[u8]) -> Result<CheckReport> {
    disk::check(&vdi::DRIVER, bytes)
}

/// Repairs an image.
pub fn repair(disk: &Arc<dyn StorageMut>, what: Repair) -> Result<CheckReport> {
    disk::repair(&vdi::DRIVER, disk, what)
}

/// Compacts an image, after asking what that would save.
pub fn compact(disk: &Arc<dyn StorageMut>) -> Result<(CompactReport, CompactReport)> {
    let spec = CompactSpec::default();
    let parsed = vdi::DRIVER.parse(Arc::clone(disk) as Arc<dyn Storage>, &how())?;
    let readable = Arc::clone(disk) as Arc<dyn Storage>;
    let plan = parsed.plan_compact(vec![(Role::Main, readable)], &how(), &spec, Job::silent())?;
    let parsed = vdi::DRIVER.parse(Arc::clone(disk) as Arc<dyn Storage>, &how())?;
    let done = parsed.compact(vec![(Role::Main, Arc::clone(disk))], &how(), &spec, Job::silent())?;
    Ok((plan, done))
}

/// A number of the header or the map.
pub fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

/// Where the entry of a block is.
pub fn entry_at(bytes: &[u8], block: usize) -> usize {
    word(bytes, 340) as usize + block * 4
}

/// The entries of the map.
pub fn entries(bytes: &[u8]) -> Vec<u32> {
    (0..word(bytes, 384) as usize)
        .map(|block| word(bytes, entry_at(bytes, block)))
        .collect()
}

/// `bytes`, but without a word of a parent: QEMU's tools know none.
pub fn orphaned(bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    if word(&bytes, 76) == 4 {
        bytes[76] = 1;
        bytes[424..456].fill(0);
    }
    bytes
}

impl Image {
    /// The image, to play with.
    pub fn stage(&self) -> Stage<'_> {
        Stage {
            driver: &vdi::DRIVER,
            file: &self.file,
            start: &self.start,
            below: &self.below,
            unit: M,
        }
    }

    /// What the files show.
    pub fn read(&self, bytes: &[u8]) -> Result<Vec<u8>> {
        disk::read(&vdi::DRIVER, bytes, &self.below)
    }

    /// What `qemu-img check` says. A number of blocks that is higher than need be is no corruption here: it is set
    /// right first.
    pub fn qemu_checks(&self, bytes: &[u8]) -> (String, i32) {
        let mut bytes = orphaned(bytes);
        let used = entries(&bytes)
            .iter()
            .filter(|entry| **entry < 0xffff_fffe)
            .count() as u32;
        if word(&bytes, 388) > used {
            bytes[388..392].copy_from_slice(&used.to_le_bytes());
        }
        let path = self.scratch.file("check.vdi", &bytes);
        let (value, code) = oracle::check(path, "vdi");
        (value.to_string(), code)
    }

    /// Demands that our check and QEMU's find nothing wrong with `bytes`, and that QEMU reads `expected` from them.
    #[track_caller]
    pub fn assert_good(&self, bytes: &[u8], expected: &[u8]) {
        let report = check(bytes).expect("check");
        assert_eq!(
            (report.check_errors, report.corruptions, report.leaks),
            (0, 0, 0),
            "{:#?}",
            report.findings
        );
        let path = self.scratch.file("image.vdi", &orphaned(bytes));
        let (value, code) = oracle::check(&path, "vdi");
        assert_eq!(code, 0, "{value}");
        if self.kind.parent.is_none() && !expected.is_empty() {
            let raw = self.scratch.file("expected.raw", expected);
            oracle::assert_identical(&path, "vdi", raw, "raw");
        }
    }
}
