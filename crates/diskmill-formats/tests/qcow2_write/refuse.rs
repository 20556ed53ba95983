//! What must not be written is refused by name, and nothing is lost.

use std::sync::Arc;

use diskmill_core::{ErrorKind, GuestOffset, HostOffset, StorageMut, Stored, ZeroHow};
use diskmill_storage::{Memory, Window};
use diskmill_testkit::model::{Model, Op};

use super::images::{self, Disks, Image};

const CORRUPT: u64 = 2;

/// What a test breaks.
type Damage = fn(&Used, &mut [u8]);

fn at(byte: u64) -> GuestOffset {
    GuestOffset::new(byte)
}

fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

fn set_word(bytes: &mut [u8], at: usize, word: u64) {
    bytes[at..at + 8].copy_from_slice(&word.to_be_bytes());
}

/// The bytes of an image of 4 KiB clusters that QEMU has written to, and where its tables are.
struct Used {
    image: Image,
    bytes: Vec<u8>,
    l1: usize,
    l2: usize,
    table: usize,
    block: usize,
}

fn used() -> Used {
    let image = images::named("cluster 4k").make();
    let bytes = image.files[0].clone();
    let l1 = word(&bytes, 40) as usize;
    let l2 = (word(&bytes, l1) & 0x00ff_ffff_ffff_fe00) as usize;
    let table = word(&bytes, 48) as usize;
    let block = word(&bytes, table) as usize;
    Used {
        image,
        bytes,
        l1,
        l2,
        table,
        block,
    }
}

fn features(disks: &Disks) -> u64 {
    let mut bytes = [0; 8];
    disks[0].read_at(HostOffset::new(72), &mut bytes).expect("read");
    u64::from_be_bytes(bytes)
}

#[test]
fn a_write_that_would_hit_metadata_marks_the_image_corrupt() {
    let cases: &[(&str, &str, Damage)] = &[
        (
            "data in the refcount table",
            "the refcount table",
            |used, bytes| {
                set_word(bytes, used.l2, 1 << 63 | used.table as u64);
            },
        ),
        ("data in the l1 table", "the active L1 table", |used, bytes| {
            set_word(bytes, used.l2, 1 << 63 | used.l1 as u64);
        }),
        ("data in its own l2 table", "an active L2 table", |used, bytes| {
            set_word(bytes, used.l2, 1 << 63 | used.l2 as u64);
        }),
        ("data in a refcount block", "a refcount block", |used, bytes| {
            set_word(bytes, used.l2, 1 << 63 | used.block as u64);
        }),
        ("all refcounts zero", "the header", |used, bytes| {
            bytes[used.block..used.block + 4096].fill(0);
        }),
        ("no refcount block", "the header", |used, bytes| {
            set_word(bytes, used.table, 0);
        }),
    ];
    for (name, over, change) in cases {
        let used = used();
        let mut bytes = used.bytes.clone();
        change(&used, &mut bytes);
        let disks = images::memory(&[bytes.clone()]);
        let layer = images::open(&disks).expect(name);
        // The first cluster is not stored before, the last one of the disk is not either.
        let below = &used.image.below;
        let error = [0, used.image.start.len() as u64 - 512]
            .into_iter()
            .find_map(|byte| layer.write_at(at(byte), &[9; 512], below).err())
            .expect(name);
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{name}: {error:?}");
        assert!(format!("{error:?}").contains(over), "{name}: {error:?}");
        let again = layer.write_at(at(8192), &[9; 512], below).expect_err(name);
        assert_eq!(again.kind(), ErrorKind::Corrupt, "{name}: {again:?}");
        drop(layer);
        assert_eq!(features(&disks), CORRUPT, "{name}");
        let mut after = images::bytes(&disks).remove(0);
        set_word(&mut after, 72, 0);
        assert!(after == bytes, "{name}: something else was written");
        let error = images::open(&disks).expect_err(name);
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{name}: {error:?}");
    }
}

#[test]
fn entries_that_cannot_be_are_found_before_anything_is_written() {
    let cases: &[(&str, Damage)] = &[
        ("unaligned cluster", |used, bytes| {
            let entry = word(bytes, used.l2 + 9 * 8) | 0x200;
            set_word(bytes, used.l2 + 9 * 8, entry);
        }),
        ("cluster past the end", |used, bytes| {
            set_word(bytes, used.l2 + 9 * 8, 1 << 63 | 1 << 40);
        }),
        ("unaligned l2 table", |used, bytes| {
            let entry = word(bytes, used.l1) | 0x200;
            set_word(bytes, used.l1, entry);
        }),
        ("l2 table past the end", |used, bytes| {
            set_word(bytes, used.l1, 1 << 63 | 1 << 40);
        }),
        ("unaligned refcount block", |used, bytes| {
            let entry = word(bytes, used.table) | 0x200;
            set_word(bytes, used.table, entry);
            set_word(bytes, used.l2 + 9 * 8, 0);
        }),
        ("refcount block past the end", |used, bytes| {
            set_word(bytes, used.table, 1 << 40);
            set_word(bytes, used.l2 + 9 * 8, 0);
        }),
    ];
    for (name, change) in cases {
        let used = used();
        let mut bytes = used.bytes.clone();
        change(&used, &mut bytes);
        let disks = images::memory(&[bytes.clone()]);
        let layer = images::open(&disks).expect(name);
        let error = layer
            .write_at(at(9 * 4096), &[9; 512], &used.image.below)
            .expect_err(name);
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{name}: {error:?}");
        drop(layer);
        let mut after = images::bytes(&disks).remove(0);
        assert_eq!(word(&after, 72), CORRUPT, "{name}");
        set_word(&mut after, 72, 0);
        assert!(after == bytes, "{name}: something else was written");
    }
}

/// Opens an image that a test made by QEMU's tools.
#[test]
fn feature_bits_are_put_right_when_an_image_is_opened_for_writing() {
    let Used {
        image,
        mut bytes,
        block,
        ..
    } = used();
    // Two autoclear bits nobody knows, and the dirty bit of a writer that did no harm.
    set_word(&mut bytes, 88, 0x8000_0000_0000_0040);
    set_word(&mut bytes, 72, 1);
    let disks = images::memory(&[bytes.clone()]);
    drop(images::open(&disks).expect("open"));
    assert_eq!(images::bytes(&disks), image.files);
    // Had it put refcounts off, they are made good first.
    bytes[block + 2 * 12..block + 2 * 20].fill(0);
    let disks = images::memory(&[bytes]);
    drop(images::open(&disks).expect("open"));
    let repaired = images::bytes(&disks);
    assert_eq!(repaired[0][72..80], [0; 8]);
    images::assert_clean(&repaired);
}

#[test]
fn what_is_outside_the_disk_is_refused() {
    let image = images::named("cluster 512").make();
    let disks = images::memory(&image.files);
    let layer = images::open(&disks).expect("open");
    let (size, below) = (image.start.len() as u64, &image.below);
    for (start, len) in [(size, 1), (size - 1, 2), (u64::MAX, 1), (u64::MAX - 1, u64::MAX)] {
        let range = at(start)..at(start.saturating_add(len));
        let some = vec![0; len.min(10) as usize];
        let errors = [
            layer.write_at(at(start), &some, below).err(),
            (range.end.since(range.start) > 0)
                .then(|| layer.zero(range.clone(), ZeroHow::MayUnmap, below).err())
                .flatten(),
            layer.write_encoded(at(start), Stored::Plain(&some), below).err(),
            layer.read_at(at(start), &mut some.clone()).err(),
        ];
        for error in errors.into_iter().flatten() {
            assert!(
                matches!(error.kind(), ErrorKind::Usage | ErrorKind::Corrupt),
                "{start:#x}+{len:#x}: {error:?}"
            );
        }
        layer.write_at(at(start), &some, below).expect_err("outside");
    }
    for (start, packed) in [
        (1, vec![0; 9]),
        (0, vec![]),
        (0, vec![0; 512]),
        (size, vec![0; 9]),
    ] {
        let error = layer
            .write_encoded(at(start), Stored::Packed(&packed), below)
            .expect_err("not a unit");
        assert_eq!(error.kind(), ErrorKind::Usage, "{error:?}");
    }
    for size in [1 << 62, u64::MAX] {
        let error = layer.resize(size, below).expect_err("too large");
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error:?}");
    }
    drop(layer);
    assert_eq!(images::bytes(&disks), image.files);
}

#[test]
fn a_device_that_is_full_says_so_and_stays_clean() {
    let image = images::named("cluster 4k").make();
    let mut bytes = image.files[0].clone();
    // Room for 20 clusters more.
    bytes.resize(bytes.len().next_multiple_of(4096) + 20 * 4096, 0);
    let len = bytes.len() as u64;
    let window = Window::new(Arc::new(Memory::from(bytes)), HostOffset::ZERO, Some(len)).expect("a window");
    let disks: Disks = vec![Arc::new(window) as Arc<dyn StorageMut>];
    let layer = images::open(&disks).expect("open");
    let mut model = Model::new(image.start.clone());
    let mut full = false;
    for cluster in 0..image.start.len() as u64 / 4096 {
        let op = Op::Write {
            at: cluster * 4096,
            len: 4096,
            fill: 3,
        };
        let before = model.clone();
        if let Err(error) = model.apply(&op, &layer, &image.below, 4096, &|_| None) {
            assert_eq!(error.kind(), ErrorKind::NoSpace, "{error:?}");
            (model, full) = (before, true);
        }
    }
    assert!(full, "there was room for everything");
    // What is given back can be used again.
    let discard = Op::Zero {
        at: 0,
        len: 40 * 4096,
        how: ZeroHow::MayUnmap,
    };
    let write = Op::Write {
        at: 100 * 4096,
        len: 8 * 4096,
        fill: 4,
    };
    for op in [discard, write] {
        model
            .apply(&op, &layer, &image.below, 4096, &|_| None)
            .unwrap_or_else(|error| panic!("{op:?}: {error:?}"));
    }
    layer.flush().expect("flush");
    model.assert_reads(&layer, &image.below);
    drop(layer);
    assert_eq!(disks[0].len().expect("length"), len);
    image.assert_good(&images::bytes(&disks), model.bytes());
}
