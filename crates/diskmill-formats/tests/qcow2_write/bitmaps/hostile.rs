//! Bitmaps that lie: nothing else is harmed by them, and nothing takes for ever.

use diskmill_core::{Chain, ErrorKind, GuestOffset, Result};
use diskmill_testkit::random::rounds;
use diskmill_testkit::sparse_random::mix;
use diskmill_testkit::{Scratch, oracle};

use super::super::images;
use super::{stored, u64_at};

const IN_USE: u64 = 1;
const AUTO: u64 = 2;

/// An image with an enabled bitmap `b` in which something is dirty: its bytes, and where directory and table are.
fn victim() -> (Vec<u8>, u64, u64) {
    let scratch = Scratch::new();
    let path = scratch.join("image.qcow2");
    oracle::create(&path, "qcow2", "", "64M");
    oracle::qemu_img()
        .args(["bitmap", "--add"])
        .arg(&path)
        .arg("b")
        .ok();
    oracle::io(&path, "qcow2", ["write 1M 64k"]);
    let bytes = std::fs::read(path).unwrap();
    let header =
        diskmill_formats::qcow2::read_header(&diskmill_storage::Memory::from(bytes.as_slice())).unwrap();
    let directory = header.bitmaps().expect("a directory").directory_offset.get();
    let table = u64_at(&bytes, directory);
    (bytes, directory, table)
}

fn set(bytes: &mut [u8], at: u64, value: u64) {
    bytes[at as usize..at as usize + 8].copy_from_slice(&value.to_be_bytes());
}

fn set_flags(bytes: &mut [u8], directory: u64, flags: u64) {
    let word = u64_at(bytes, directory + 8);
    set(bytes, directory + 8, word >> 32 << 32 | flags);
}

/// Reads all of bitmap `b` in an image that is open for reading only.
fn read(bytes: &[u8]) -> Result<Vec<std::ops::Range<u64>>> {
    let driver = diskmill_formats::registry::by_name("qcow2").unwrap();
    let file: std::sync::Arc<dyn diskmill_core::Storage> =
        std::sync::Arc::new(diskmill_storage::Memory::from(bytes));
    let how = Default::default();
    let layer = driver
        .parse(file.clone(), &how)?
        .attach(vec![(diskmill_core::Role::Main, file)], &how)?;
    let mut runs = layer.dirty("b")?;
    let mut found = Vec::new();
    while let Some(run) = runs.next_run()? {
        found.push(run.start.get()..run.end.get());
    }
    Ok(found)
}

#[test]
fn table_entries_that_mean_nothing_are_refused_before_a_change() {
    let (good, directory, table) = victim();
    assert_eq!(read(&good).unwrap(), [1 << 20..(1 << 20) + 65536]);
    for entry in [
        2,
        3,
        0x1_0001,
        0x5_0200,
        1 << 56 | 0x5_0000,
        1 << 63 | 0x5_0000,
        0x4000_0000,
    ] {
        let mut bytes = good.clone();
        set(&mut bytes, table, entry);
        let error = read(&bytes).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Malformed, "{entry:#x}: {error:?}");
        assert!(format!("{error:?}").contains("'b'"), "{error:?}");
        let disks = images::memory(&[bytes.clone()]);
        let error = images::open(&disks).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Malformed, "{entry:#x}: {error:?}");
        assert_eq!(images::bytes(&disks)[0], bytes);

        // Where nothing is recorded in it the image can be changed, and the bitmap removed.
        set_flags(&mut bytes, directory, 0);
        let disks = images::memory(&[bytes.clone()]);
        let layer = images::open(&disks).unwrap();
        let bitmaps = layer.bitmaps().unwrap();
        for result in [
            bitmaps.clear("b"),
            bitmaps.enable("b"),
            layer.dirty("b").and_then(|mut runs| runs.next_run().map(|_| ())),
        ] {
            assert_eq!(result.unwrap_err().kind(), ErrorKind::Malformed, "{entry:#x}");
        }
        layer
            .write_at(GuestOffset::ZERO, &[1; 512], &Chain::default())
            .unwrap();
        bitmaps.remove("b").unwrap();
        drop(layer);
        let report = images::check(&images::bytes(&disks)).unwrap();
        assert_eq!(
            (report.corruptions, report.check_errors),
            (0, 0),
            "{entry:#x}: {:?}",
            report.findings
        );
    }
    // All set, and behind the end of the disk too.
    let mut bytes = good.clone();
    set(&mut bytes, table, 1);
    assert_eq!(read(&bytes).unwrap(), [0..64 << 20]);
}

#[test]
fn bits_in_the_wrong_place_harm_nothing_else() {
    let (good, directory, table) = victim();
    let (l1, refcounts) = (u64_at(&good, 40), u64_at(&good, 48));
    let block = u64_at(&good, refcounts);
    let l2 = u64_at(&good, l1) & 0x00ff_ffff_ffff_fe00;
    let free = good.len() as u64;
    for entry in [l1, refcounts, block, l2, directory, table, free] {
        let mut bytes = good.clone();
        // The file has one more cluster, which counts as free.
        bytes.resize(bytes.len().next_multiple_of(65536) + 65536, 0);
        let entry = if entry == free {
            bytes.len() as u64 - 65536
        } else {
            entry
        };
        set(&mut bytes, table, entry);
        let disks = images::memory(&[bytes.clone()]);
        let layer = images::open(&disks).unwrap();
        layer
            .write_at(GuestOffset::new(1 << 20), &[9; 512], &Chain::default())
            .unwrap();
        layer
            .write_at(GuestOffset::new(40 << 20), &[9; 65536], &Chain::default())
            .unwrap();
        let error = layer.flush().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{entry:#x}: {error:?}");
        drop(layer);
        let after = images::bytes(&disks).remove(0);
        assert_eq!(u64_at(&after, 72) & 2, 2, "{entry:#x}: marked corrupt");
        let flags = u64_at(&after, directory + 8) & 0xffff_ffff;
        assert_eq!(flags, IN_USE | AUTO, "{entry:#x}: the bitmap is not trusted");
        assert_eq!(u64_at(&after, l1), u64_at(&good, l1), "{entry:#x}");
        assert_eq!(u64_at(&after, refcounts), u64_at(&good, refcounts), "{entry:#x}");
    }
    // A table that is another structure: in use, so that nobody looks at it before it is removed.
    for place in [l1, refcounts, block, 0x4000_0000] {
        let mut bytes = good.clone();
        set(&mut bytes, directory, place);
        set_flags(&mut bytes, directory, IN_USE | AUTO);
        let disks = images::memory(&[bytes]);
        let layer = images::open(&disks).unwrap();
        layer
            .write_at(GuestOffset::ZERO, &[9; 512], &Chain::default())
            .unwrap();
        layer.bitmaps().unwrap().remove("b").unwrap();
        layer
            .write_at(GuestOffset::new(5 << 20), &[9; 70000], &Chain::default())
            .unwrap();
        layer.flush().unwrap();
        drop(layer);
        let files = images::bytes(&disks);
        assert!(stored(&files[0]).is_empty());
        let report = images::check(&files).unwrap();
        assert_eq!(
            (report.corruptions, report.check_errors),
            (0, 0),
            "{place:#x}: {:?}",
            report.findings
        );
    }
}

#[test]
fn random_damage_to_bitmaps_ends_without_panic() {
    let (good, directory, table) = victim();
    let mut opened = 0;
    for seed in rounds(3, 150) {
        let mut bytes = good.clone();
        let mut state = mix(seed);
        let mut next = |below: u64| {
            state = mix(state);
            state % below
        };
        for _ in 0..1 + next(3) {
            let at = match next(4) {
                0 => directory + next(4) * 8,
                1 => table + next(3) * 8,
                2 => 504 + next(4) * 8,
                _ => 24 + next(10) * 8,
            };
            let value = match next(5) {
                0 => u64_at(&bytes, at) ^ 1 << next(64),
                1 => next(40) << 16,
                2 => mix(next(u64::MAX)),
                3 => u64_at(&bytes, at).wrapping_add(next(3)).wrapping_sub(1),
                _ => u64_at(&bytes, at) ^ next(4),
            };
            set(&mut bytes, at, value);
        }
        let _ = read(&bytes);
        let disks = images::memory(&[bytes]);
        let Ok(layer) = images::open(&disks) else {
            continue;
        };
        opened += 1;
        let below = Chain::default();
        let Some(bitmaps) = layer.bitmaps() else { continue };
        for step in 0..6 {
            let size = layer.virtual_size();
            let _ = match next(9) {
                0 => bitmaps.clear("b"),
                1 => bitmaps.add(&super::new("c", 4096 << next(4))).map(|_| ()),
                2 => bitmaps.remove("b"),
                3 => layer
                    .dirty("b")
                    .and_then(|mut runs| bitmaps.merge("c", &mut *runs)),
                4 => layer.resize((size / 2 + next(1 << 20)).min(1 << 30), &below),
                5 => layer.flush(),
                _ if size > 70_000 => layer.write_at(GuestOffset::new(step * 7000), &[5; 7000], &below),
                _ => layer.flush(),
            };
        }
    }
    assert!(opened > 20, "{opened} images opened");
}
