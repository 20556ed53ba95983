//! The builder of vdi keeps the contract, and QEMU reads what it makes.

use std::sync::Arc;

use diskmill_core::{
    BackingName, Compression, CreateSpec, Driver, ErrorKind, Facts, Format, GuestOffset, Hints, HostOffset,
    HostRun, Identity, Measure, Options, RawFile, Result, Role, Storage, StorageMut, ZeroHow,
};
use diskmill_formats::vdi;
use diskmill_storage::Memory;
use diskmill_testkit::contract::builder::{builder, bytes, fill, open};
use diskmill_testkit::sparse_random::SparseRandom;
use diskmill_testkit::{Scratch, contract, oracle};

const SIZE: u64 = (5 << 20) + 3 * 512;
const UUID: &str = "uuid=01234567-89ab-cdef-0123-456789abcdef";

fn file() -> Arc<dyn StorageMut> {
    Arc::new(Memory::new())
}

fn spec(size: u64, options: &str) -> CreateSpec {
    let mut spec = CreateSpec::new(size);
    spec.options = Options::parse(&format!("{UUID},{options}"));
    spec
}

fn over(mut spec: CreateSpec, format: Format) -> CreateSpec {
    spec.backing = Some(BackingName {
        name: "base.vdi".to_owned(),
        format: Some(format.name().to_owned()),
    });
    let mut facts = Facts::new(format, SIZE);
    facts.identity = (format == Format::Vdi).then_some(Identity {
        image: [3; 16],
        state: [4; 16],
    });
    spec.backing_facts = Some(Box::new(facts));
    spec
}

const OPTIONS: [&str; 8] = [
    "",
    "static=on",
    "align=1M",
    "align=4k",
    "static=on,align=64k",
    "preallocation=metadata",
    "preallocation=falloc",
    "preallocation=full",
];

#[test]
fn every_option_and_size() {
    for options in OPTIONS {
        for size in [0, 512, 4096, 1 << 20, (1 << 20) + 512, SIZE] {
            builder(&vdi::DRIVER, &spec(size, options), &file);
        }
    }
}

/// Old bytes all over, and a length that stays.
#[derive(Debug)]
struct Device(Memory);

impl Storage for Device {
    fn len(&self) -> Result<u64> {
        self.0.len()
    }

    fn hints(&self) -> Hints {
        let mut hints = self.0.hints();
        hints.fixed_len = true;
        hints
    }

    fn read_at(&self, at: HostOffset, buf: &mut [u8]) -> Result<()> {
        self.0.read_at(at, buf)
    }

    fn run_at(&self, at: HostOffset) -> Result<HostRun> {
        self.0.run_at(at)
    }

    fn allocated(&self) -> Result<Option<u64>> {
        self.0.allocated()
    }

    fn raw_file(&self) -> Option<RawFile<'_>> {
        None
    }
}

impl StorageMut for Device {
    fn write_at(&self, at: HostOffset, buf: &[u8]) -> Result<()> {
        assert!(
            at.get() + buf.len() as u64 <= self.0.len()?,
            "past the end of the device"
        );
        self.0.write_at(at, buf)
    }

    fn zero(&self, range: std::ops::Range<HostOffset>, how: ZeroHow) -> Result<()> {
        assert!(range.end.get() <= self.0.len()?, "past the end of the device");
        self.0.zero(range, how)
    }

    fn discard(&self, _range: std::ops::Range<HostOffset>) -> Result<()> {
        Ok(())
    }

    fn allocate(&self, _range: std::ops::Range<HostOffset>) -> Result<()> {
        panic!("a device cannot allocate")
    }

    fn set_len(&self, _len: u64) -> Result<()> {
        panic!("a device keeps its length")
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }
}

fn device() -> Arc<dyn StorageMut> {
    Arc::new(Device(Memory::from(vec![0xaa; 9 << 20])))
}

#[test]
fn on_a_device_with_old_bytes() {
    for options in OPTIONS {
        builder(&vdi::DRIVER, &spec(SIZE, options), &device);
    }
    builder(&vdi::DRIVER, &over(spec(SIZE, ""), Format::Vdi), &device);
    let small: Arc<dyn StorageMut> = Arc::new(Device(Memory::zeroed(2 << 20)));
    let fixed = vdi::DRIVER.build(&spec(SIZE, "static=on"), vec![(Role::Main, small)]);
    assert_eq!(fixed.err().unwrap().kind(), ErrorKind::NoSpace);
}

#[test]
fn over_a_parent() {
    for options in ["", "align=1M"] {
        for size in [512, 1 << 20, SIZE] {
            builder(&vdi::DRIVER, &over(spec(size, options), Format::Vdi), &file);
        }
    }
    let image = fill(
        &vdi::DRIVER,
        &over(spec(SIZE, ""), Format::Vdi),
        &file,
        &SparseRandom::new(1, SIZE),
        1,
        1,
    );
    let layer = open(&vdi::DRIVER, &image);
    let parent = layer.facts().parent.expect("a parent");
    assert_eq!((parent.image, parent.state), ([3; 16], [4; 16]));
}

#[test]
fn what_makes_no_sense_is_refused() {
    let refused = |spec: &CreateSpec| {
        let error = vdi::DRIVER.outputs(spec).unwrap_err();
        format!("{:?} {error:?}", error.kind())
    };
    for (options, text) in [
        ("cluster_size=1M", "invalid parameter 'cluster_size'"),
        ("align=3k", "align is 3072, must be a power of two from 512 to 1M"),
        ("align=2M", "align is 2097152"),
        ("uuid=1", "expects a UUID"),
        ("static=off,preallocation=full", "exclude each other"),
        ("preallocation=some", "off, metadata, falloc or full"),
    ] {
        let found = refused(&spec(SIZE, options));
        assert!(found.contains(text), "{options}: {found}");
    }
    let fixed = refused(&over(spec(SIZE, "static=on"), Format::Vdi));
    assert!(fixed.contains("static must be off"), "{fixed}");
    let raw = refused(&over(spec(SIZE, ""), Format::Raw));
    assert!(raw.contains("must be a vdi image"), "{raw}");
    let mut unopened = over(spec(SIZE, ""), Format::Vdi);
    unopened.backing_facts = None;
    assert!(refused(&unopened).contains("must be opened"));
    let mut packed = spec(SIZE, "");
    packed.compression = Some(Compression::default());
    assert!(refused(&packed).starts_with("Unsupported"));
    let largest = 0x1fff_ff80_u64 << 20;
    assert!(vdi::DRIVER.outputs(&spec(largest, "")).is_ok());
    let most = refused(&spec(largest + 512, ""));
    assert!(most.contains("must be at most 562949819203584"), "{most}");
}

/// Places and lengths are those of QEMU's own images, field by field.
#[test]
fn headers_are_as_qemu_makes_them() {
    let scratch = Scratch::new();
    for (size, options) in [
        (0, ""),
        (SIZE, ""),
        (SIZE, "static=on"),
        (200 << 20, ""),
        (128 << 20, "static=on"),
    ] {
        let theirs = scratch.join("theirs.vdi");
        oracle::create(&theirs, "vdi", options, &size.to_string());
        let mut theirs = std::fs::read(&theirs).unwrap();
        let image = fill(&vdi::DRIVER, &spec(size, options), &file, &Zeros(size), 1, 1);
        let mut ours = bytes(&*image[0]);
        for bytes in [&mut theirs, &mut ours] {
            assert_ne!(bytes[392..424], [0; 32], "UUIDs are set");
            bytes[..64].fill(0);
            bytes[392..424].fill(0);
        }
        contract::layer::same(0, &theirs, &ours);
    }
}

/// A disk without data.
struct Zeros(u64);

impl contract::builder::Guest for Zeros {
    fn size(&self) -> u64 {
        self.0
    }

    fn read_at(&self, _at: u64, buf: &mut [u8]) {
        buf.fill(0);
    }

    fn is_hole(&self, _at: u64, _len: u64) -> bool {
        true
    }
}

/// What VirtualBox demands of an image before it opens it, as far as is known.
fn virtualbox_takes(bytes: &[u8]) {
    let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    assert_eq!((word(64), word(68)), (0xbeda_107f, 0x0001_0001));
    assert!(word(72) >= 384 && (1..=4).contains(&word(76)));
    let (map, data, blocks) = (word(340), word(344), word(384));
    assert!(map >= 72 + 384 && data >= map + 4 * blocks);
    assert_eq!((word(360), word(376), word(380)), (512, 1 << 20, 0));
    assert!(blocks > 0 && word(388) <= blocks);
    assert!(u64::from_le_bytes(bytes[368..376].try_into().unwrap()) <= u64::from(blocks) << 20);
    assert!(bytes[392..408] != [0; 16] && bytes[408..424] != [0; 16]);
    assert_eq!(word(76) == 4, bytes[424..440] != [0; 16]);
    if word(72) >= 400 {
        assert_eq!(word(468), 512, "bytes of a sector in the logical geometry");
    }
}

#[test]
fn qemu_reads_every_option() {
    let scratch = Scratch::new();
    let disk = SparseRandom::new(5, SIZE);
    let mut raw = vec![0; SIZE as usize];
    disk.read_at(0, &mut raw);
    let raw = scratch.file("disk.raw", &raw);
    for options in OPTIONS {
        let image = fill(&vdi::DRIVER, &spec(SIZE, options), &file, &disk, 2, 3);
        let bytes = bytes(&*image[0]);
        virtualbox_takes(&bytes);
        let path = scratch.file("image.vdi", &bytes);
        oracle::assert_identical(&path, "vdi", &raw, "raw");
        let (value, code) = oracle::check(&path, "vdi");
        assert_eq!(code, 0, "{options}: {value}");
    }
    let diff = fill(
        &vdi::DRIVER,
        &over(spec(SIZE, ""), Format::Vdi),
        &file,
        &disk,
        2,
        3,
    );
    virtualbox_takes(&bytes(&*diff[0]));
}

#[test]
fn a_measure_is_what_an_image_takes() {
    for options in ["", "static=on", "align=1M"] {
        let disk = SparseRandom::new(9, SIZE);
        let image = fill(&vdi::DRIVER, &spec(SIZE, options), &file, &disk, 1, 1);
        let empty = fill(&vdi::DRIVER, &spec(SIZE, options), &file, &Zeros(SIZE), 1, 1);
        let Measure {
            required,
            fully_allocated,
            ..
        } = vdi::DRIVER.measure(&spec(SIZE, options), None).unwrap();
        assert_eq!(required, empty[0].len().unwrap(), "{options}");
        assert!(fully_allocated >= image[0].len().unwrap());
        assert_eq!((fully_allocated - required) % (1 << 20), 0);
    }
}

#[test]
fn the_map_shows_what_was_placed() {
    let mut disk = vec![0; SIZE as usize];
    disk[(2 << 20) + 5000] = 1;
    let image = fill(&vdi::DRIVER, &spec(SIZE, ""), &file, &disk, 1, 64);
    assert_eq!(image[0].len().unwrap(), 1024 + (1 << 20));
    let layer = open(&vdi::DRIVER, &image);
    let extent = layer.map(GuestOffset::ZERO, SIZE).unwrap();
    assert_eq!(extent.len, 2 << 20);
    contract::layer::all(&layer, &diskmill_core::Chain::default(), &disk);
}
