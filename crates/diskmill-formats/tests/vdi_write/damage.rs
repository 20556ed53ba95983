//! Damage: what the hostile-input table of docs/formats/vdi.md says, and what a check and a repair make of it.

use diskmill_core::{ErrorKind, GuestOffset, Repair};
use diskmill_testkit::random::{seed, soak};
use diskmill_testkit::sparse_random::mix;
use diskmill_testkit::{Scratch, oracle};

use super::images::{self, M};

/// The bytes of an image of 4 MiB with blocks 0, 2 and 3 in slots 0, 1 and 2.
fn image() -> (images::Image, Vec<u8>) {
    let mut kind = images::named("dynamic");
    kind.size = 4 * M;
    let image = kind.make();
    assert_eq!(images::entries(&image.file), [0, u32::MAX, 1, 2]);
    let file = image.file.clone();
    (image, file)
}

fn set(file: &mut [u8], at: usize, value: u32) {
    file[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

/// What our check counts, and QEMU's exit code.
fn checks(file: &[u8]) -> (u64, u64, i32) {
    let report = images::check(file).expect("check");
    let scratch = Scratch::new();
    let (_, code) = oracle::check(scratch.file("x.vdi", file), "vdi");
    (report.corruptions, report.leaks, code)
}

#[test]
fn headers_that_cannot_be_are_refused() {
    let (_, good) = image();
    // Where, what, and which word of the error names it.
    for (at, value, text) in [
        (64, 0, "signature"),
        (68, 0x0003_0001, "version"),
        (360, 4096, "sector_size"),
        (376, 0, "block_size"),
        (376, 2 << 20, "block_size"),
        (340, 513, "blocks_offset"),
        (344, 1025, "data_offset"),
        (344, 0, "data_offset"),
        (340, 0, "blocks_offset"),
        (384, u32::MAX, "data_offset"),
        (384, 0x1fff_fff0, "data_offset"),
        (384, 3, "blocks is 3"),
        (76, 0, "image_type"),
        (76, 9, "image_type"),
        (76, 4, "uuid_link"),
        (380, 512, "block_extra"),
        (80, 0xffff, "flags"),
        (424, 7, "uuid_link"),
    ] {
        let mut file = good.clone();
        set(&mut file, at, value);
        let error = format!("{:?}", images::read_only(&file).unwrap_err());
        assert!(error.contains(text), "{at}: {error}");
        assert!(images::open(&images::memory(&file)).is_err());
    }
    let mut file = good.clone();
    file[368..376].copy_from_slice(&(1_u64 << 62).to_le_bytes());
    assert!(images::read_only(&file).is_err());
    // QEMU takes what is missing of the map for slot 0.
    let cut = images::read_only(&good[..512 + 15]).unwrap_err();
    assert!(format!("{cut:?}").contains("past the end of the file"), "{cut:?}");
}

#[test]
fn a_slot_that_cannot_be_is_an_error_where_it_is_read() {
    for slot in [3, 4, 0x7fff_ffff, 0xffff_fffd] {
        let (image, mut file) = image();
        let at = images::entry_at(&file, 2);
        set(&mut file, at, slot);
        let layer = images::read_only(&file).expect("open");
        let extent = layer.map(GuestOffset::ZERO, 4 * M).expect("map");
        assert_eq!(extent.len, M);
        let mut buf = vec![0; 512];
        let error = layer.read_at(GuestOffset::new(2 * M), &mut buf).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert!(layer.read_at(GuestOffset::new(3 * M), &mut buf).is_ok());
        let refused = images::open(&images::memory(&file)).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Corrupt, "{refused:?}");
        let (corruptions, leaks, code) = checks(&file);
        // QEMU does not look whether a slot is in the file.
        assert_eq!((corruptions, leaks, code), (1, 1, if slot == 3 { 0 } else { 2 }));
        let disk = images::memory(&file);
        let report = images::repair(&disk, Repair::Leaks).expect("repair");
        assert_eq!((report.corruptions, report.leaks_fixed), (1, 0));
        assert!(images::bytes(&disk) == file, "nothing is touched");
        let report = images::repair(&disk, Repair::All).expect("repair");
        assert_eq!((report.corruptions_fixed, report.leaks_fixed), (1, 1));
        assert_eq!((report.corruptions, report.leaks), (0, 0));
        let mut expected = image.start.clone();
        expected[2 << 20..3 << 20].fill(0);
        image.assert_good(&images::bytes(&disk), &expected);
    }
}

#[test]
fn two_blocks_in_one_slot_get_a_copy_each() {
    let (image, mut file) = image();
    let at = images::entry_at(&file, 3);
    set(&mut file, at, 0);
    let error = images::open(&images::memory(&file)).unwrap_err();
    assert!(
        format!("{error:?}").contains("blocks 0 and 3 are both in slot 0"),
        "{error:?}"
    );
    let (corruptions, leaks, code) = checks(&file);
    assert_eq!((corruptions, leaks, code), (1, 1, 2));
    let disk = images::memory(&file);
    let report = images::repair(&disk, Repair::All).expect("repair");
    assert_eq!(
        (report.corruptions_fixed, report.corruptions, report.leaks),
        (1, 0, 0)
    );
    let mut expected = image.start.clone();
    expected.copy_within(0..1 << 20, 3 << 20);
    image.assert_good(&images::bytes(&disk), &expected);
}

#[test]
fn a_wrong_number_of_blocks_is_put_right() {
    for (number, corruptions, leaks) in [
        (0, 1, 0),
        (2, 1, 0),
        (3, 0, 0),
        (4, 0, 1),
        (u32::MAX, 0, u64::from(u32::MAX) - 3),
    ] {
        let (image, mut file) = image();
        set(&mut file, 388, number);
        let found = checks(&file);
        assert_eq!((found.0, found.1), (corruptions, leaks), "{number}");
        assert_eq!(found.2, if number == 3 { 0 } else { 2 }, "QEMU");
        let disk = images::memory(&file);
        let what = if corruptions > 0 {
            Repair::All
        } else {
            Repair::Leaks
        };
        images::repair(&disk, what).expect("repair");
        assert_eq!(images::word(&images::bytes(&disk), 388), 3);
        image.assert_good(&images::bytes(&disk), &image.start);
        // Without a repair, a write does not go where something is.
        let disk = images::memory(&file);
        let layer = images::open(&disk).expect("open");
        layer
            .write_at(GuestOffset::new(M), &[7; 512], &image.below)
            .expect("write");
        layer.flush().expect("flush");
        drop(layer);
        let mut expected = image.start.clone();
        expected[1 << 20..(1 << 20) + 512].fill(7);
        let bytes = images::bytes(&disk);
        assert!(image.read(&bytes).expect("read") == expected);
        assert_eq!(images::check(&bytes).expect("check").corruptions, 0);
    }
}

#[test]
fn blocks_behind_the_last_slot_leak() {
    let (image, mut file) = image();
    file.resize(file.len() + (2 << 20) + 5, 9);
    assert_eq!(checks(&file), (0, 2, 0));
    let disk = images::memory(&file);
    // What is left there must not show when the space is used.
    let layer = images::open(&disk).expect("open");
    layer
        .write_at(GuestOffset::new(M + 512), &[7; 512], &image.below)
        .expect("write");
    layer.flush().expect("flush");
    drop(layer);
    let mut expected = image.start.clone();
    expected[(1 << 20) + 512..(1 << 20) + 1024].fill(7);
    assert!(image.read(&images::bytes(&disk)).expect("read") == expected);
    let report = images::repair(&disk, Repair::Leaks).expect("repair");
    assert_eq!((report.leaks_fixed, report.leaks), (1, 0));
    image.assert_good(&images::bytes(&disk), &expected);
}

/// Entries, numbers and lengths at random: nothing panics, nothing is believed that cannot be, and what a repair leaves
/// is clean.
#[test]
fn random_damage_is_survived() {
    let (image, good) = image();
    for round in 0..300 * u64::from(soak()) {
        let random = |which: u64| mix(seed() << 40 ^ round << 8 ^ which);
        let mut file = good.clone();
        for change in 0..1 + random(0) % 4 {
            let value = match random(10 + change) % 4 {
                0 => random(20 + change) as u32 % 6,
                1 => 0xffff_fff8 + random(20 + change) as u32 % 8,
                2 => 1 << (random(20 + change) % 32),
                _ => random(20 + change) as u32,
            };
            let at = match random(30 + change) % 3 {
                0 => 512 + random(40 + change) as usize % 4 * 4,
                1 => 340 + random(40 + change) as usize % 32 * 4,
                _ => random(40 + change) as usize % 508,
            };
            set(&mut file, at, value);
        }
        if random(1) % 4 == 0 {
            file.truncate(random(2) as usize % file.len());
        }
        let Ok(layer) = images::read_only(&file) else {
            continue;
        };
        let mut at = 0;
        while at < layer.virtual_size() {
            match layer.map(GuestOffset::new(at), u64::MAX) {
                Ok(extent) => at += extent.len,
                Err(_) => at = (at / M + 1) * M,
            }
        }
        let report = images::check(&file).expect("check");
        let disk = images::memory(&file);
        match images::open(&disk) {
            Ok(layer) => {
                let start = GuestOffset::ZERO;
                if layer.virtual_size() >= 512 {
                    layer.write_at(start, &[1; 512], &image.below).expect("write");
                }
                layer.flush().expect("flush");
            }
            Err(error) => assert!(
                report.corruptions > 0 || error.kind() == ErrorKind::Unsupported,
                "round {round}: {error:?}"
            ),
        }
        let disk = images::memory(&file);
        if images::repair(&disk, Repair::All).is_ok() {
            let report = images::check(&images::bytes(&disk)).expect("check");
            assert_eq!(
                (report.corruptions, report.leaks),
                (0, 0),
                "round {round}: {:#?}",
                report.findings
            );
        }
    }
}
