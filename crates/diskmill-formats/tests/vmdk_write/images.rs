//! Images of every kind a writer must cope with.

use std::sync::Arc;

use diskmill_core::{
    BackingName, Chain, CheckReport, CompactReport, CompactSpec, CreateSpec, Driver, Facts, Files, FilesMut,
    Format, GuestOffset, Job, Layer, LayerMut, OpenSpec, Options, Repair, Result, Role, Storage, StorageMut,
};
use diskmill_formats::vmdk;
use diskmill_storage::Memory;
use diskmill_testkit::contract::builder::{Guest, fill};
use diskmill_testkit::sparse_random::mix;
use diskmill_testkit::{Scratch, oracle, vmware};

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

/// Bytes of a grain.
pub const G: u64 = 64 << 10;

const fn kind(name: &'static str, options: &'static str, size: u64, parent: Option<u64>) -> Kind {
    Kind {
        name,
        options,
        size,
        parent,
    }
}

/// Every kind. The last two are put together by hand.
pub const KINDS: [Kind; 9] = [
    kind("sparse", "", 13 * G + 512, None),
    kind("marked", "zeroed_grain=on", 12 * G, None),
    kind("split", "subformat=twoGbMaxExtentSparse", 9 * G + 1024, None),
    kind("flat", "subformat=monolithicFlat", 9 * G + 512, None),
    kind("over same", "", 12 * G, Some(12 * G)),
    kind(
        "over shorter",
        "zeroed_grain=on",
        12 * G + 512,
        Some(5 * G + 1024),
    ),
    kind("over longer", "", 7 * G + 512, Some(14 * G)),
    kind("mixed", "", 12 * G + 512, None),
    kind("cowd", "", 9 * G, None),
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
    /// The names and bytes of its files, the main one first.
    pub names: Vec<String>,
    pub files: Vec<Vec<u8>>,
    /// What is below it.
    pub below: Chain,
    /// What the disk reads as.
    pub start: Vec<u8>,
}

/// A disk in which two grains of three have something, and some nothing but at an edge.
pub struct Disk {
    pub size: u64,
    pub salt: u64,
}

impl Guest for Disk {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, at: u64, buf: &mut [u8]) {
        for (byte, at) in buf.iter_mut().zip(at..) {
            let grain = at / G;
            let edge = mix(grain ^ self.salt).is_multiple_of(2) && !(7000..30_000).contains(&(at % G));
            *byte = if grain % 3 == 1 || edge {
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

impl Disk {
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.size as usize];
        self.read_at(0, &mut bytes);
        bytes
    }
}

fn file() -> Arc<dyn StorageMut> {
    Arc::new(Memory::new())
}

fn spec(size: u64, options: &str, name: &str) -> CreateSpec {
    let mut spec = CreateSpec::new(size);
    spec.options = Options::parse(options);
    spec.name = Some(name.to_owned());
    spec
}

/// The files of an image with `disk` in it.
pub fn make(size: u64, options: &str, name: &str, backing: Option<Facts>, disk: &Disk) -> Vec<Vec<u8>> {
    let mut spec = spec(size, options, name);
    if let Some(facts) = backing {
        spec.backing = Some(BackingName {
            name: "parent.vmdk".to_owned(),
            format: Some("vmdk".to_owned()),
        });
        spec.backing_facts = Some(Box::new(facts));
    }
    let image = fill(&vmdk::DRIVER, &spec, &file, disk, 1, 4);
    image.iter().map(bytes).collect()
}

impl Kind {
    /// An image of this kind.
    pub fn make(self) -> Image {
        let disk = Disk {
            size: self.size,
            salt: 0x51,
        };
        let scratch = Scratch::new();
        let mut below = Chain::default();
        let mut start = disk.bytes();
        let mut names = vec!["x.vmdk".to_owned()];
        let files = match self.name {
            "mixed" => {
                let (a, b, c) = (5 * G, 3 * G + 512, 4 * G);
                let part = |at: u64, len: u64| start[at as usize..(at + len) as usize].to_vec();
                let sparse = |bytes: Vec<u8>, name: &str| {
                    let spec = spec(bytes.len() as u64, "subformat=twoGbMaxExtentSparse", name);
                    let image = fill(&vmdk::DRIVER, &spec, &file, &bytes, 1, 4);
                    self::bytes(&image[1])
                };
                // The flat one lies within its file.
                let flat = [vec![0xee; 1024], part(a, b), vec![0xee; 512]].concat();
                let lines = [
                    format!("RW {} SPARSE \"a.vmdk\"", a / 512),
                    format!("RW {} FLAT \"b.raw\" 2", b / 512),
                    "RW 0 ZERO".to_owned(),
                    format!("RW {} SPARSE \"c.vmdk\"", c / 512),
                ];
                names.extend(["a.vmdk", "b.raw", "c.vmdk"].map(str::to_owned));
                vec![
                    vmware::descriptor("custom", &lines),
                    sparse(part(0, a), "a.vmdk"),
                    flat,
                    sparse(part(a + b, c), "c.vmdk"),
                ]
            }
            "cowd" => {
                names.push("x-delta.vmdk".to_owned());
                let lines = [format!("RW {} VMFSSPARSE \"x-delta.vmdk\"", self.size / 512)];
                vec![vmware::descriptor("vmfsSparse", &lines), vmware::cowd(&start, 16)]
            }
            _ => {
                let backing = self.parent.map(|size| {
                    let disk = Disk { size, salt: 0x73 };
                    let parent = make(size, "", "parent.vmdk", None, &disk);
                    std::fs::write(scratch.join("parent.vmdk"), &parent[0]).expect("write");
                    let layer = read_only(&parent).expect("open");
                    below = Chain::new(vec![Arc::clone(&layer)]);
                    layer.facts().clone()
                });
                let files = make(self.size, self.options, "x.vmdk", backing, &disk);
                match self.options {
                    "subformat=twoGbMaxExtentSparse" => names.push("x-s001.vmdk".to_owned()),
                    "subformat=monolithicFlat" => names.push("x-flat.vmdk".to_owned()),
                    _ => {}
                }
                files
            }
        };
        assert_eq!(files.len(), names.len());
        let image = Image {
            kind: self,
            scratch,
            names,
            files,
            below,
            start: Vec::new(),
        };
        start = image.read(&image.files).expect("read");
        Image { start, ..image }
    }
}

/// Storages in memory that hold `files`.
pub fn memory(files: &[Vec<u8>]) -> Vec<Arc<dyn StorageMut>> {
    files
        .iter()
        .map(|bytes| {
            let file = Memory::new();
            file.write_at(Default::default(), bytes).expect("write");
            Arc::new(file) as Arc<dyn StorageMut>
        })
        .collect()
}

/// All of a storage.
pub fn bytes(file: &Arc<dyn StorageMut>) -> Vec<u8> {
    let mut bytes = vec![0; file.len().expect("length") as usize];
    file.read_at(Default::default(), &mut bytes).expect("read");
    bytes
}

pub fn all_bytes(disks: &[Arc<dyn StorageMut>]) -> Vec<Vec<u8>> {
    disks.iter().map(bytes).collect()
}

fn how() -> OpenSpec {
    let mut how = OpenSpec::default();
    how.unmap = true;
    how
}

fn roles(count: usize) -> impl Iterator<Item = Role> {
    std::iter::once(Role::Main)
        .chain((0..).map(Role::Extent))
        .take(count)
}

/// The image in `disks`, for changing.
pub fn open(disks: &[Arc<dyn StorageMut>]) -> Result<Arc<dyn LayerMut>> {
    let parsed = vmdk::DRIVER.parse(disks[0].clone(), &how())?;
    let files: FilesMut = roles(disks.len()).zip(disks.iter().cloned()).collect();
    parsed.attach_mut(files, &how())
}

fn files(disks: &[Arc<dyn StorageMut>]) -> Files {
    roles(disks.len())
        .zip(disks.iter().map(|file| file.clone() as Arc<dyn Storage>))
        .collect()
}

/// The image in `bytes`, for reading.
pub fn read_only(bytes: &[Vec<u8>]) -> Result<Arc<dyn Layer>> {
    let disks = memory(bytes);
    vmdk::DRIVER
        .parse(disks[0].clone(), &how())?
        .attach(files(&disks), &how())
}

/// What our check finds.
pub fn check(bytes: &[Vec<u8>]) -> Result<CheckReport> {
    let disks = memory(bytes);
    vmdk::DRIVER
        .parse(disks[0].clone(), &how())?
        .check(files(&disks), &how(), Job::silent())
}

/// Repairs the image in `disks`.
pub fn repair(disks: &[Arc<dyn StorageMut>], what: Repair) -> Result<CheckReport> {
    let files: FilesMut = roles(disks.len()).zip(disks.iter().cloned()).collect();
    vmdk::DRIVER
        .parse(disks[0].clone(), &how())?
        .repair(files, &how(), what, Job::silent())
}

/// Compacts the image in `disks`: what a dry run says first, and what was done.
pub fn compact(disks: &[Arc<dyn StorageMut>]) -> Result<(CompactReport, CompactReport)> {
    Ok((plan_compact(disks)?, only_compact(disks, Job::silent())?))
}

/// What compacting the image in `disks` would come to.
pub fn plan_compact(disks: &[Arc<dyn StorageMut>]) -> Result<CompactReport> {
    let parsed = vmdk::DRIVER.parse(disks[0].clone(), &how())?;
    parsed.plan_compact(files(disks), &how(), &CompactSpec::default(), Job::silent())
}

/// Compacts the image in `disks`.
pub fn only_compact(disks: &[Arc<dyn StorageMut>], job: Job<'_>) -> Result<CompactReport> {
    let parsed = vmdk::DRIVER.parse(disks[0].clone(), &how())?;
    let files: FilesMut = roles(disks.len()).zip(disks.iter().cloned()).collect();
    parsed.compact(files, &how(), &CompactSpec::default(), job)
}

impl Image {
    /// What the disk in `bytes` reads as, over what is below.
    pub fn read(&self, bytes: &[Vec<u8>]) -> Result<Vec<u8>> {
        let mut layers = vec![read_only(bytes)?];
        layers.extend(self.below.layers().iter().cloned());
        let chain = Chain::new(layers);
        let mut disk = vec![0; chain.virtual_size() as usize];
        chain.read_at(GuestOffset::ZERO, &mut disk)?;
        Ok(disk)
    }

    /// Writes the files where QEMU finds them: the main one.
    pub fn on_disk(&self, bytes: &[Vec<u8>]) -> std::path::PathBuf {
        for (name, bytes) in self.names.iter().zip(bytes) {
            std::fs::write(self.scratch.join(name), bytes).expect("write");
        }
        self.scratch.join(&self.names[0])
    }

    /// Whether QEMU opens disks of this kind.
    pub fn is_qemus(&self) -> bool {
        self.kind.name != "mixed"
    }

    /// What QEMU's check says.
    pub fn qemu_checks(&self, bytes: &[Vec<u8>]) -> std::result::Result<(), String> {
        if !self.is_qemus() {
            return Ok(());
        }
        match oracle::check(self.on_disk(bytes), Format::Vmdk.name()) {
            (_, 0) => Ok(()),
            (report, code) => Err(format!("code {code}: {report}")),
        }
    }

    /// Demands that nothing is wrong with the image in `bytes`, and that QEMU reads it as `expected`.
    pub fn assert_good(&self, bytes: &[Vec<u8>], expected: &[u8]) {
        let report = check(bytes).expect("check");
        assert_eq!(
            (report.check_errors, report.corruptions, report.leaks),
            (0, 0, 0),
            "{}: {:#?}",
            self.kind.name,
            report.findings
        );
        self.qemu_checks(bytes).expect("a clean image");
        if self.is_qemus() {
            let raw = self.scratch.join("expected.raw");
            std::fs::write(&raw, expected).expect("write");
            oracle::assert_identical(self.on_disk(bytes), "vmdk", raw, "raw");
        }
    }
}
