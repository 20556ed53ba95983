//! Images of every kind a writer must cope with.

use std::sync::Arc;

use diskmill_core::{
    BackingName, Chain, CreateSpec, Driver, GuestOffset, Layer, OpenSpec, Role, Storage, StorageMut,
};
use diskmill_formats::{cow, raw};
use diskmill_storage::Memory;
use diskmill_testkit::contract::builder::{Guest, fill};
use diskmill_testkit::sparse_random::mix;

use super::support::disk::{self, Stage};

/// How an image is made.
#[derive(Clone, Copy, Debug)]
pub struct Kind {
    /// What it shows.
    pub name: &'static str,
    /// Bytes of the disk.
    pub size: u64,
    /// Bytes of the raw image below.
    pub below: Option<u64>,
    /// Whether its header is laid out as on 32-bit machines.
    pub old: bool,
}

pub const K: u64 = 1 << 10;
pub const M: u64 = 1 << 20;
/// Writes are about as large as this.
pub const STEP: u64 = 16 * K;

const fn kind(name: &'static str, size: u64, below: Option<u64>, old: bool) -> Kind {
    Kind {
        name,
        size,
        below,
        old,
    }
}

/// Every kind. The data of all of them begins at sector 3 of the file, and does so up to [`FIRST`] bytes.
pub const KINDS: [Kind; 7] = [
    kind("alone", 300 * K + 512, None, false),
    kind("empty", 256 * K, None, false),
    kind("small", 40 * K + 1536, None, false),
    kind("old", 300 * K, None, true),
    kind("over same", 300 * K + 3072, Some(300 * K + 3072), false),
    kind("over shorter", 300 * K, Some(100 * K + 1536), false),
    kind("old over longer", 200 * K + 512, Some(500 * K), true),
];

/// The largest disk whose bitmap ends within the sector that the header ends in.
pub const FIRST: u64 = 480 * 8 * 512;

/// A disk whose bitmap has one sector more, up to [`FIRST`] and 2 MiB.
pub const LARGE: Kind = kind("large", FIRST + 512, Some(FIRST + M), false);

/// The kind called `name`.
pub fn named(name: &str) -> Kind {
    *KINDS.iter().find(|kind| kind.name == name).expect("a kind")
}

/// An image as bytes, with all that belongs to it.
#[derive(Debug)]
pub struct Image {
    pub kind: Kind,
    /// The bytes of its file.
    pub file: Vec<u8>,
    /// What is below it.
    pub below: Chain,
    /// What that reads as.
    pub below_bytes: Vec<u8>,
    /// What the disk reads as.
    pub start: Vec<u8>,
}

/// A disk with data, zeros and stretches nobody wrote to, all of a few KiB.
struct Disk {
    size: u64,
    empty: bool,
}

impl Guest for Disk {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, at: u64, buf: &mut [u8]) {
        for (byte, at) in buf.iter_mut().zip(at..) {
            let stretch = at / (24 * K);
            let is_data = !self.empty && (stretch == 0 || mix(stretch).is_multiple_of(2));
            let data = is_data && at % (24 * K) < 17 * K;
            *byte = if data { (at / 512 % 250) as u8 | 1 } else { 0 };
        }
    }

    fn is_hole(&self, at: u64, len: u64) -> bool {
        self.empty
            || (at..at + len)
                .step_by(512)
                .all(|at| !mix(at / (24 * K)).is_multiple_of(3))
    }
}

/// The raw disk in `bytes`.
pub fn raw_layer(bytes: &[u8]) -> Arc<dyn Layer> {
    let disk: Arc<dyn Storage> = Arc::new(Memory::from(bytes));
    let how = OpenSpec::default();
    let parsed = raw::DRIVER.parse(Arc::clone(&disk), &how).expect("a raw disk");
    parsed.attach(vec![(Role::Main, disk)], &how).expect("open it")
}

/// The same image as a 32-bit program would have written it.
pub fn as_32_bit(file: &[u8]) -> Vec<u8> {
    let size = u64::from_be_bytes(file[1040..1048].try_into().expect("8 bytes"));
    let bitmap = (size / 512).div_ceil(8) as usize;
    let (data, old_data) = (
        (1056 + bitmap).next_multiple_of(512),
        (1048 + bitmap).next_multiple_of(512),
    );
    let mut old = [&file[..1036], &file[1040..1052], &file[1056..1056 + bitmap]].concat();
    if file.len() > data {
        old.resize(old_data, 0);
        old.extend_from_slice(&file[data..]);
    }
    old
}

impl Kind {
    /// Makes the image.
    pub fn make(&self) -> Image {
        let mut spec = CreateSpec::new(self.size);
        let mut below = Chain::default();
        let mut below_bytes = Vec::new();
        if let Some(size) = self.below {
            below_bytes = (0..size).map(|at| (at / 700 % 250) as u8 + 1).collect();
            spec.backing = Some(BackingName {
                name: "base.raw".to_owned(),
                format: Some("raw".to_owned()),
            });
            below = Chain::new(vec![raw_layer(&below_bytes)]);
        }
        let guest = Disk {
            size: self.size,
            empty: self.name == "empty",
        };
        let new = || -> Arc<dyn StorageMut> { Arc::new(Memory::new()) };
        let image = fill(&cow::DRIVER, &spec, &new, &guest, 1, 3);
        let mut file = disk::bytes(&image[0]);
        if self.old {
            file = as_32_bit(&file);
        }
        let start = disk::read(&cow::DRIVER, &file, &below).expect("read");
        assert!(start == plain_read(&file, &below_bytes), "{}", self.name);
        Image {
            kind: *self,
            file,
            below,
            below_bytes,
            start,
        }
    }
}

/// What a file shows over `below`, by another reader that knows nothing of ours: a dozen lines, all in memory.
pub fn plain_read(file: &[u8], below: &[u8]) -> Vec<u8> {
    let long = file[1048..].len() >= 4 && file[1048..1052] == [0, 0, 2, 0];
    let (size_at, header) = if long { (1040, 1056) } else { (1036, 1048) };
    let size = u64::from_be_bytes(file[size_at..size_at + 8].try_into().expect("8 bytes")) as usize;
    let bitmap = (size / 512).div_ceil(8);
    let data = (header + bitmap).div_ceil(512) * 512;
    let mut disk = vec![0; size / 512 * 512];
    for (sector, bytes) in disk.chunks_mut(512).enumerate() {
        let bits = file.get(header + sector / 8).copied().unwrap_or(0);
        let (from, at) = match bits >> (sector % 8) & 1 {
            1 => (file, data + sector * 512),
            _ => (below, sector * 512),
        };
        let have = from
            .get(at.min(from.len())..(at + 512).min(from.len()))
            .unwrap_or_default();
        bytes[..have.len()].copy_from_slice(have);
    }
    disk
}

impl Image {
    /// The image, to play with.
    pub fn stage(&self) -> Stage<'_> {
        Stage {
            driver: &cow::DRIVER,
            file: &self.file,
            start: &self.start,
            below: &self.below,
            unit: 512,
        }
    }

    /// Demands that a check finds nothing wrong with `bytes`, and that both readers see `expected`.
    #[track_caller]
    pub fn assert_good(&self, bytes: &[u8], expected: &[u8]) {
        let report = disk::check(&cow::DRIVER, bytes).expect("check");
        let wrong = (report.check_errors, report.corruptions, report.leaks);
        assert_eq!(wrong, (0, 0, 0), "{:#?}", report.findings);
        assert!(disk::read(&cow::DRIVER, bytes, &self.below).expect("read") == expected);
        assert!(plain_read(bytes, &self.below_bytes) == expected);
    }
}

/// The bitmap.
pub fn bits(file: &[u8]) -> &[u8] {
    let header =
        cow::header::Header::parse(&file[..file.len().min(1056)], file.len() as u64).expect("a header");
    let geometry = header.geometry();
    &file[geometry.bitmap_at() as usize..geometry.bitmap_end() as usize]
}

/// The first byte of the disk.
pub const START: GuestOffset = GuestOffset::ZERO;
