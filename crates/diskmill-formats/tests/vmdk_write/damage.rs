//! What a check finds, what a repair puts right, and what a writer refuses.

use diskmill_core::{Chain, CheckReport, ErrorKind, GuestOffset, Repair};

use super::images::{self, Image};

pub fn word(file: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(file[at..at + 4].try_into().unwrap())
}

pub fn put(file: &mut [u8], at: usize, value: u32) {
    file[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

/// Where the directory at byte `field` of the header has its first table, in bytes.
pub fn table(file: &[u8], field: usize) -> usize {
    word(file, word(file, field) as usize * 512) as usize * 512
}

pub const RGD: usize = 48;
pub const GD: usize = 56;

fn damaged(change: impl Fn(&mut Vec<u8>)) -> (Image, CheckReport) {
    let mut image = images::named("sparse").make();
    change(&mut image.files[0]);
    let report = images::check(&image.files).unwrap();
    (image, report)
}

fn repaired(image: &Image, what: Repair) -> (Vec<Vec<u8>>, CheckReport) {
    let disks = images::memory(&image.files);
    images::repair(&disks, what).unwrap();
    let files = images::all_bytes(&disks);
    let report = images::check(&files).unwrap();
    (files, report)
}

fn refuses_to_write(image: &Image) {
    let disks = images::memory(&image.files);
    let layer = images::open(&disks).unwrap();
    let error = layer
        .write_at(GuestOffset::ZERO, &[1; 512], &Chain::default())
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(images::all_bytes(&disks) == image.files, "nothing was written");
}

#[test]
fn a_stale_copy_is_found_and_made_the_same() {
    let (image, report) = damaged(|file| {
        let at = table(file, RGD);
        put(file, at, 0);
    });
    assert_eq!(
        (report.leaks, report.corruptions),
        (1, 0),
        "{:?}",
        report.findings
    );
    for what in [Repair::Leaks, Repair::All] {
        let (files, report) = repaired(&image, what);
        assert_eq!((report.leaks, report.corruptions), (0, 0));
        image.assert_good(&files, &image.start);
    }
}

#[test]
fn a_lost_table_comes_back_from_its_copy() {
    let (image, report) = damaged(|file| {
        let gd = word(file, GD) as usize * 512;
        put(file, gd, 0x00ff_ffff);
    });
    assert_eq!(report.corruptions, 1, "{:?}", report.findings);
    let (files, report) = repaired(&image, Repair::All);
    assert_eq!(report.corruptions, 0, "{:?}", report.findings);
    assert!(image.read(&files).unwrap() == image.start);
}

#[test]
fn grains_that_cannot_be_are_reported_and_not_written_to() {
    for (value, text) in [
        (0x00ff_ff00, "a grain runs past the end of the file"),
        (30, "a grain lies in the tables"),
    ] {
        let (image, report) = damaged(|file| {
            for field in [RGD, GD] {
                let at = table(file, field);
                put(file, at, value);
            }
        });
        assert_eq!(report.corruptions, 1, "{:?}", report.findings);
        assert_eq!(report.findings[0].text, text);
        if value == 30 {
            refuses_to_write(&image);
        } else {
            let mut byte = [0; 512];
            let layer = images::read_only(&image.files).unwrap();
            assert!(layer.read_at(GuestOffset::ZERO, &mut byte).is_err());
            let (files, report) = repaired(&image, Repair::All);
            assert_eq!(report.corruptions, 0, "{:?}", report.findings);
            let mut expected = image.files.clone();
            for field in [RGD, GD] {
                let at = table(&expected[0], field);
                put(&mut expected[0], at, 0);
            }
            assert!(files == expected);
        }
    }
}

#[test]
fn a_grain_used_twice_is_reported_and_not_written_to() {
    let (image, report) = damaged(|file| {
        for field in [RGD, GD] {
            let at = table(file, field);
            let first = word(file, at);
            put(file, at + 4, first);
        }
    });
    assert_eq!(report.corruptions, 1);
    assert_eq!(report.findings[0].text, "a grain is used twice");
    refuses_to_write(&image);
}

#[test]
fn grains_at_the_end_that_nothing_names_are_cut_off() {
    let (image, report) = damaged(|file| file.resize(file.len() + (3 << 16), 0xee));
    assert_eq!(
        (report.leaks, report.corruptions),
        (3, 0),
        "{:?}",
        report.findings
    );
    let (files, report) = repaired(&image, Repair::Leaks);
    assert_eq!(report.leaks, 0);
    image.assert_good(&files, &image.start);
}
