//! Images made by QEMU's tools, of every kind a writer must cope with.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use diskmill_core::{
    BackingName, Chain, CheckReport, CreateSpec, Durability, EncodedKind, ErrorKind, Finish, GuestOffset,
    Job, LayerMut, OpenSpec, Options, OutputName, Result, Role, Secret, Storage, StorageMut,
};
use diskmill_formats::registry;
use diskmill_storage::Memory;
use diskmill_testkit::model::Op;
use diskmill_testkit::sparse_random::mix;
use diskmill_testkit::{Scratch, contract, oracle};

use super::subject;

/// How an image is made.
#[derive(Clone, Copy, Debug)]
pub struct Kind {
    /// What it shows.
    pub name: &'static str,
    /// `-o` of `qemu-img create`.
    pub options: &'static str,
    /// Bytes of the disk.
    pub size: u64,
    /// Bytes and format of the image below.
    pub backing: Option<(u64, &'static str)>,
    /// What happens to it before it is handed over.
    pub setup: Setup,
}

/// What happens to an image before a test gets it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Setup {
    /// Nothing.
    Empty,
    /// Some data, zeros and discards.
    Used,
    /// As used, then a snapshot, then some more.
    Snapshot,
    /// All compressed.
    Compressed,
}

const fn kind(name: &'static str, options: &'static str, size: u64, setup: Setup) -> Kind {
    Kind {
        name,
        options,
        size,
        backing: None,
        setup,
    }
}

const fn over(
    name: &'static str,
    options: &'static str,
    size: u64,
    backing: (u64, &'static str),
    setup: Setup,
) -> Kind {
    Kind {
        name,
        options,
        size,
        backing: Some(backing),
        setup,
    }
}

/// Options of an image in LUKS with a small header, and others.
macro_rules! luks {
    ($others:literal) => {
        concat!(
            "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=0,encrypt.cipher-alg=aes-128,",
            "encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv,",
            $others
        )
    };
}

const AES_4K: &str = "encrypt.format=aes,encrypt.key-secret=key,cluster_size=4k";
const K: u64 = 1024;
const M: u64 = 1 << 20;

/// Every kind.
pub const KINDS: &[Kind] = &[
    kind("cluster 512", "cluster_size=512", 200 * K + 512, Setup::Used),
    kind("cluster 4k", "cluster_size=4k", 600 * K, Setup::Used),
    kind("default", "", 1500 * K, Setup::Empty),
    kind("cluster 2M", "cluster_size=2M", 7 * M, Setup::Used),
    kind(
        "refcount 1",
        "cluster_size=512,refcount_bits=1",
        200 * K,
        Setup::Used,
    ),
    kind(
        "refcount 2",
        "cluster_size=512,refcount_bits=2",
        100 * K,
        Setup::Snapshot,
    ),
    kind(
        "refcount 4",
        "cluster_size=1k,refcount_bits=4",
        100 * K,
        Setup::Snapshot,
    ),
    kind(
        "refcount 8",
        "cluster_size=512,refcount_bits=8",
        100 * K,
        Setup::Compressed,
    ),
    kind(
        "refcount 32",
        "cluster_size=4k,refcount_bits=32",
        300 * K,
        Setup::Snapshot,
    ),
    kind(
        "refcount 64",
        "cluster_size=512,refcount_bits=64",
        100 * K,
        Setup::Snapshot,
    ),
    kind(
        "refcount table",
        "cluster_size=512,refcount_bits=64",
        2100 * K,
        Setup::Empty,
    ),
    kind("version 2", "compat=0.10,cluster_size=4k", 300 * K, Setup::Used),
    kind(
        "version 2 snapshot",
        "compat=0.10,cluster_size=512",
        100 * K,
        Setup::Snapshot,
    ),
    kind("compressed", "cluster_size=4k", 300 * K, Setup::Compressed),
    kind("zstd", "compression_type=zstd", 700 * K, Setup::Compressed),
    kind(
        "subclusters",
        "extended_l2=on,cluster_size=16k",
        500 * K,
        Setup::Used,
    ),
    kind(
        "subclusters snapshot",
        "extended_l2=on,cluster_size=16k",
        500 * K,
        Setup::Snapshot,
    ),
    kind(
        "subclusters compressed",
        "extended_l2=on,cluster_size=64k",
        500 * K,
        Setup::Compressed,
    ),
    kind("lazy", "lazy_refcounts=on,cluster_size=4k", 300 * K, Setup::Used),
    kind(
        "preallocated",
        "preallocation=metadata,cluster_size=4k",
        300 * K,
        Setup::Empty,
    ),
    kind(
        "data file",
        "data_file=DATA,cluster_size=4k",
        300 * K,
        Setup::Used,
    ),
    kind(
        "raw data file",
        "data_file=DATA,data_file_raw=on,cluster_size=4k",
        300 * K,
        Setup::Used,
    ),
    kind(
        "aes snapshot",
        "encrypt.format=aes,encrypt.key-secret=key,cluster_size=512",
        100 * K,
        Setup::Snapshot,
    ),
    kind(
        "luks snapshot",
        luks!("cluster_size=512"),
        100 * K,
        Setup::Snapshot,
    ),
    kind(
        "luks subclusters",
        luks!("extended_l2=on,cluster_size=16k"),
        500 * K,
        Setup::Snapshot,
    ),
    kind(
        "luks data file",
        luks!("data_file=DATA,cluster_size=4k"),
        300 * K,
        Setup::Used,
    ),
    kind(
        "luks 256",
        "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=0",
        1500 * K,
        Setup::Used,
    ),
    over(
        "luks over raw",
        luks!("cluster_size=4k"),
        300 * K + 512,
        (250 * K, "raw"),
        Setup::Snapshot,
    ),
    over(
        "aes over raw",
        AES_4K,
        300 * K + 512,
        (250 * K, "raw"),
        Setup::Used,
    ),
    over(
        "over raw",
        "cluster_size=4k",
        300 * K + 512,
        (250 * K, "raw"),
        Setup::Used,
    ),
    over(
        "over longer",
        "cluster_size=4k",
        150 * K + 512,
        (300 * K, "qcow2"),
        Setup::Snapshot,
    ),
    over(
        "version 2 over raw",
        "compat=0.10,cluster_size=4k",
        300 * K,
        (250 * K, "raw"),
        Setup::Used,
    ),
    over(
        "subclusters over raw",
        "extended_l2=on,cluster_size=16k",
        500 * K + 512,
        (410 * K, "raw"),
        Setup::Used,
    ),
];

/// More kinds, that not every test needs.
const OTHERS: &[Kind] = &[
    kind("aes", AES_4K, 300 * K + 512, Setup::Used),
    kind(
        "aes version 2",
        "compat=0.10,encrypt.format=aes,encrypt.key-secret=key,cluster_size=4k",
        300 * K,
        Setup::Used,
    ),
    kind("luks", luks!("cluster_size=4k"), 300 * K + 512, Setup::Used),
    kind(
        "luks version 2",
        luks!("compat=0.10,cluster_size=4k"),
        300 * K,
        Setup::Used,
    ),
];

/// The kind called `name`.
pub fn named(name: &str) -> Kind {
    *KINDS
        .iter()
        .chain(OTHERS)
        .find(|kind| kind.name == name)
        .expect("a kind")
}

/// An image as bytes, with all that belongs to it.
#[derive(Debug)]
pub struct Image {
    pub kind: Kind,
    scratch: Scratch,
    /// The bytes of its file, and of its data file.
    pub files: Vec<Vec<u8>>,
    /// What is below it.
    pub below: Chain,
    /// What the disk reads as.
    pub start: Vec<u8>,
    /// Bytes of a cluster.
    pub unit: u64,
}

fn pattern(len: u64) -> Vec<u8> {
    (0..len).map(|at| (at / 700 % 250) as u8 + 1).collect()
}

/// Makes an empty image, as we do: qemu-img measures how fast it derives keys for seconds, whatever is asked for.
fn create(path: &Path, options: &str, size: u64, backing: Option<BackingName>) {
    let mut spec = CreateSpec::new(size);
    spec.options = Options::parse(options);
    spec.secrets
        .add("key", Secret::new(oracle::PASSPHRASE.into()))
        .expect("one key");
    spec.backing = backing;
    let driver = registry::by_name("qcow2").expect("a driver");
    let outputs = driver.outputs(&spec).expect("outputs");
    let disks = memory(&vec![Vec::new(); outputs.len()]);
    let files = ROLES.into_iter().zip(disks.iter().cloned()).collect();
    let mut builder = driver.build(&spec, files).expect("a builder");
    let all = GuestOffset::ZERO..GuestOffset::new(size);
    builder.fill(all, diskmill_core::Run::Absent).expect("fill");
    builder.finish(Finish::new(Durability::None)).expect("finish");
    for (bytes, output) in bytes(&disks).into_iter().zip(outputs) {
        match output.name {
            OutputName::Named(name) => std::fs::write(name, bytes),
            _ => std::fs::write(path, bytes),
        }
        .expect("write");
    }
}

impl Kind {
    /// A kind that `seed` chooses.
    pub fn random(seed: u64) -> Self {
        let mut state = seed;
        let mut roll = |end: u64| {
            state = mix(state);
            state % end
        };
        let cluster = [512, 1024, 4096, 16384, 65536][roll(5) as usize];
        let mut options = format!("cluster_size={cluster}");
        let mut setups = vec![Setup::Empty, Setup::Used];
        let mut alone = false;
        if roll(5) == 0 {
            options += ",compat=0.10";
            setups.extend([Setup::Snapshot, Setup::Compressed]);
        } else {
            let bits = 1 << roll(7);
            options += &format!(",refcount_bits={bits}");
            if roll(3) == 0 {
                options += ",lazy_refcounts=on";
            }
            if cluster >= 16384 && roll(2) == 0 {
                options += ",extended_l2=on";
            }
            if roll(4) == 0 {
                options += ",data_file=DATA";
                alone = roll(2) == 0;
                options += if alone { ",data_file_raw=on" } else { "" };
            } else {
                options += ["", ",compression_type=zstd"][roll(2) as usize];
                setups.push(Setup::Compressed);
                // One bit cannot count what two refer to.
                setups.extend((bits > 1).then_some(Setup::Snapshot));
            }
        }
        let size = (cluster * (8 + roll(24)) + roll(2) * 512).max(60_000) / 512 * 512;
        let backing = (!alone && roll(3) == 0).then(|| {
            (
                size / 512 * (256 + roll(512)) / 512 * 512,
                ["raw", "qcow2"][roll(2) as usize],
            )
        });
        if backing.is_some() {
            setups.retain(|setup| *setup != Setup::Compressed);
        }
        Self {
            name: if alone { "raw data file" } else { "random" },
            // Made a few hundred times at most in the life of a test.
            options: options.leak(),
            size,
            backing,
            setup: setups[roll(setups.len() as u64) as usize],
        }
    }

    /// The format, as QEMU's tools are told.
    pub fn format(&self) -> &'static str {
        match self.options.contains("encrypt.format") {
            true => "qcow2+key",
            false => "qcow2",
        }
    }

    /// Makes the image.
    pub fn make(&self) -> Image {
        let scratch = Scratch::new();
        let (main, data) = (scratch.join("image.qcow2"), scratch.join("image.data"));
        let options = self.options.replace("DATA", data.to_str().expect("a plain path"));
        let size = self.size.to_string();
        let mut below = Chain::default();
        if let Some((len, format)) = self.backing {
            let raw = scratch.file("base.raw", &pattern(len));
            let path = if format == "raw" {
                raw
            } else {
                let path = scratch.join("base.qcow2");
                oracle::convert(["-c"], &raw, "raw", &path, format);
                path
            };
            if options.contains("luks") {
                let below = BackingName {
                    name: path.to_str().expect("a plain path").to_owned(),
                    format: Some(format.to_owned()),
                };
                create(&main, &options, self.size, Some(below));
            } else {
                oracle::create_overlay(&main, &options, &path, format, Some(&size));
            }
            let file: Arc<dyn Storage> = Arc::new(Memory::from(std::fs::read(&path).expect("read")));
            let how = OpenSpec::default();
            let driver = registry::by_name(format).expect("a driver");
            let parsed = driver.parse(Arc::clone(&file), &how).expect("parse");
            below = Chain::new(vec![
                parsed.attach(vec![(Role::Main, file)], &how).expect("attach"),
            ]);
        } else if self.setup == Setup::Compressed {
            let raw = scratch.file("start.raw", &pattern(self.size));
            oracle::convert(["-c", "-o", &options], &raw, "raw", &main, "qcow2");
        } else if options.contains("luks") {
            create(&main, &options, self.size, None);
        } else {
            oracle::create(&main, "qcow2", &options, &size);
        }
        let at = |part: u64| self.size / 16 * part / 512 * 512;
        if self.setup == Setup::Used || self.setup == Setup::Snapshot {
            let first = [
                format!("write -P 1 {} {}", at(1), at(3)),
                format!("write -P 2 {} 512", at(6)),
                format!("write -z {} {}", at(7), at(2)),
                format!("discard {} {}", at(2), at(1)),
            ];
            oracle::io(&main, self.format(), first);
        }
        if self.setup == Setup::Snapshot {
            oracle::snapshot(&main, self.format(), ["-c", "one"]);
            let then = [
                format!("write -P 3 {} {}", at(3), at(1)),
                format!("write -P 4 {} {}", at(10), at(2)),
            ];
            if self.options.contains("cluster_size=512") {
                // Elsewhere all tables stay shared with the snapshot.
                oracle::io(&main, self.format(), then);
            }
        }
        let flat = scratch.join("flat.raw");
        oracle::convert([""; 0], &main, self.format(), &flat, "raw");
        let mut files = vec![std::fs::read(&main).expect("read the image")];
        if self.options.contains("DATA") {
            files.push(std::fs::read(&data).expect("read the data file"));
        }
        let unit = oracle::info(&main, "qcow2", false)["cluster-size"]
            .as_u64()
            .expect("a cluster size");
        Image {
            kind: *self,
            start: std::fs::read(flat).expect("read the disk"),
            scratch,
            files,
            below,
            unit,
        }
    }
}

/// Storages of an image.
pub type Disks = Vec<Arc<dyn StorageMut>>;

/// Fresh storages that hold `files`.
pub fn memory(files: &[Vec<u8>]) -> Disks {
    files
        .iter()
        .map(|bytes| Arc::new(Memory::from(bytes.as_slice())) as Arc<dyn StorageMut>)
        .collect()
}

/// The bytes of storages.
pub fn bytes(disks: &Disks) -> Vec<Vec<u8>> {
    disks
        .iter()
        .map(|disk| {
            let mut bytes = vec![0; disk.len().expect("length") as usize];
            disk.read_at(Default::default(), &mut bytes).expect("read");
            bytes
        })
        .collect()
}

/// What the files of an image are to it.
pub const ROLES: [Role; 2] = [Role::Main, Role::Data];

/// How the tests open images.
pub fn how() -> OpenSpec {
    let mut how = OpenSpec::default();
    how.unmap = true;
    // For images that are encrypted.
    how.secrets.set_passphrase(Secret::new(oracle::PASSPHRASE.into()));
    how.secrets
        .add("second", Secret::new(b"another".to_vec()))
        .expect("a second key");
    how
}

/// Opens an image for writing.
pub fn open(disks: &Disks) -> Result<Arc<dyn LayerMut>> {
    let driver = registry::by_name("qcow2").expect("a driver");
    let parsed = driver.parse(Arc::clone(&disks[0]) as Arc<dyn Storage>, &how())?;
    let files = ROLES.into_iter().zip(disks.iter().cloned()).collect();
    parsed.attach_mut(files, &how())
}

/// What our own check finds.
pub fn check(files: &[Vec<u8>]) -> Result<CheckReport> {
    let driver = registry::by_name("qcow2").expect("a driver");
    let disks: Vec<Arc<dyn Storage>> = files
        .iter()
        .map(|bytes| Arc::new(Memory::from(bytes.as_slice())) as Arc<dyn Storage>)
        .collect();
    let mut how = how();
    how.for_check = true;
    let parsed = driver.parse(Arc::clone(&disks[0]), &how)?;
    let files = ROLES.into_iter().zip(disks).collect();
    parsed.check(files, &how, Job::silent())
}

/// Demands that our check finds nothing.
#[track_caller]
pub fn assert_clean(files: &[Vec<u8>]) {
    let report = check(files).expect("check");
    assert_eq!(
        (report.check_errors, report.corruptions, report.leaks),
        (0, 0, 0),
        "{:#?}",
        report.findings
    );
}

impl Image {
    /// Puts `files` where QEMU's tools can look at them, in the place of the image they were made of.
    pub fn dump(&self, files: &[Vec<u8>]) -> PathBuf {
        for (name, bytes) in ["image.qcow2", "image.data"].iter().zip(files) {
            self.scratch.file(name, bytes);
        }
        self.scratch.join("image.qcow2")
    }

    /// Demands that QEMU finds nothing wrong with `files`, and that it reads `expected` from them.
    #[track_caller]
    pub fn assert_good(&self, files: &[Vec<u8>], expected: &[u8]) {
        assert_clean(files);
        let path = self.dump(files);
        let format = self.kind.format();
        oracle::assert_clean(&path, format);
        let raw = self.scratch.file("expected.raw", expected);
        oracle::assert_identical(&path, format, raw, "raw");
        if self.kind.name == "raw data file" {
            // QEMU makes it up to a whole cluster.
            let (disk, rest) = files[1].split_at(expected.len());
            assert!(disk == expected, "the data file is a raw image of the disk");
            assert!(rest.iter().all(|byte| *byte == 0) && (rest.len() as u64) < self.unit);
        }
        // What snapshots hold must not have changed, and QEMU must read of them what we do.
        let show = |files| subject::picture(files, &self.below).expect("look").snapshots;
        let (first, now) = (show(&self.files), show(files));
        for (name, bytes) in &first {
            assert!(now.get(name) == Some(bytes), "snapshot {name}");
        }
        for (name, bytes) in &now {
            let raw = self.scratch.join("snapshot.raw");
            oracle::convert(["-l", name], &path, format, &raw, "raw");
            // QEMU reads it at the size the disk has now.
            let theirs = std::fs::read(raw).expect("read");
            let len = bytes.len().min(theirs.len());
            contract::layer::same(0, &bytes[..len], &theirs[..len]);
        }
    }

    /// Whether the operation is one that this kind of image knows.
    pub fn can(&self, op: &Op) -> bool {
        match op {
            Op::Clear => self.kind.name != "raw data file",
            Op::Snapshot { .. } => !self.kind.options.contains("DATA"),
            _ => true,
        }
    }

    /// Compresses a cluster as the image wants it.
    pub fn pack(&self, layer: &Arc<dyn LayerMut>, unit: &[u8]) -> Option<Vec<u8>> {
        if self.kind.options.contains("DATA") || self.kind.options.contains("encrypt") {
            let error = layer.encoder().err().expect("no compression");
            assert_eq!(error.kind(), ErrorKind::Unsupported);
            return None;
        }
        let mut packed = Vec::new();
        let kind = layer
            .encoder()
            .expect("an encoder")
            .encode(unit, &mut packed)
            .expect("encode");
        match kind {
            EncodedKind::Packed { len } => {
                packed.truncate(len);
                Some(packed)
            }
            _ => None,
        }
    }
}
