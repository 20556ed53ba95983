//! Damage: what the hostile-input table of docs/formats/cow.md says, and what a check and a repair make of it.

use diskmill_core::{Chain, CheckReport, Driver, ErrorKind, GuestOffset, Match, Repair, State};
use diskmill_formats::cow;
use diskmill_formats::cow::layout::SIZE_MAX;
use diskmill_storage::{File, FileOptions, LockPlan};
use diskmill_testkit::Scratch;
use diskmill_testkit::random::{seed, soak};
use diskmill_testkit::sparse_random::mix;

use super::images::{self, Image};
use super::support::disk;
use super::support::sample;

fn counts(report: &CheckReport) -> (u64, u64) {
    (report.corruptions, report.leaks)
}

fn check(file: &[u8]) -> CheckReport {
    disk::check(&cow::DRIVER, file).expect("check")
}

/// An image with everything wrong that a check knows, and what it reads as: the kind `small`, of 83 sectors in 11 bytes
/// of bitmap, cut short.
pub fn spoilt(image: &Image) -> (Vec<u8>, Vec<u8>) {
    let mut file = image.file.clone();
    // The last three sectors, and five that are not there.
    file[1056 + 10] = 0xff;
    file[1056 + 11] = 0x81;
    file.resize(1536 + 81 * 512 - 100, 3);
    let expected = images::plain_read(&file, &[]);
    (file, expected)
}

#[test]
fn what_is_wrong_is_found_and_put_right() {
    let image = images::named("small").make();
    assert_eq!(counts(&check(&image.file)), (0, 0));
    let (file, expected) = spoilt(&image);
    let report = check(&file);
    // Two sectors are behind the end; five bits and two more are of no sector.
    assert_eq!(counts(&report), (2, 7), "{:#?}", report.findings);
    assert_eq!(report.total_units, 83);
    let stray = |file: &[u8]| (file[1056 + 10], file[1056 + 11]);
    // It opens and reads all the same, and writing leaves what is wrong as it is.
    let opened = disk::memory(&file);
    let layer = disk::open(&cow::DRIVER, &opened).expect("open");
    layer
        .write_at(images::START, &[1; 700], &Chain::default())
        .expect("write");
    layer.flush().expect("flush");
    drop(layer);
    assert_eq!(stray(&disk::bytes(&opened)), (0xff, 0x81));

    let leaks = disk::memory(&file);
    let report = disk::repair(&cow::DRIVER, &leaks, Repair::Leaks).expect("repair");
    assert_eq!((counts(&report), report.leaks_fixed), ((2, 0), 7));
    assert_eq!(stray(&disk::bytes(&leaks)), (7, 0));
    assert_eq!(counts(&check(&disk::bytes(&leaks))), (2, 0));
    let all = disk::memory(&file);
    let report = disk::repair(&cow::DRIVER, &all, Repair::All).expect("repair");
    assert_eq!((counts(&report), report.corruptions_fixed), ((0, 0), 2));
    image.assert_good(&disk::bytes(&all), &expected);

    // A file that goes on behind the disk.
    let mut long = image.file.clone();
    long.resize(1536 + 83 * 512 + 513, 7);
    assert_eq!(counts(&check(&long)), (0, 2));
    let disk = disk::memory(&long);
    disk::repair(&cow::DRIVER, &disk, Repair::Leaks).expect("repair");
    let bytes = disk::bytes(&disk);
    assert_eq!(bytes.len(), 1536 + 83 * 512);
    image.assert_good(&bytes, &image.start);
}

/// The bytes that get a meaning when a disk grows may hold anything.
#[test]
fn a_disk_grows_over_stray_bits_and_bytes() {
    for name in ["small", "over shorter", "old over longer"] {
        let image = images::named(name).make();
        let old = image.kind.size / 512;
        let mut file = image.file.clone();
        let (bitmap, data) = (if image.kind.old { 1048 } else { 1056 }, |file: &[u8]| {
            (file.len() as u64 - 1) / 512
        });
        assert!(data(&file) > 0);
        let end = ((bitmap as u64 + old.div_ceil(8)).div_ceil(512) * 512) as usize;
        file[bitmap + (old / 8) as usize..end].fill(0xff);
        if !old.is_multiple_of(8) {
            let live = image.file[bitmap + (old / 8) as usize] & !(0xff << (old % 8));
            file[bitmap + (old / 8) as usize] = live | 0xff << (old % 8);
        }
        file.resize(end + (old as usize + 70) * 512, 0xee);
        let disk = disk::memory(&file);
        let layer = disk::open(&cow::DRIVER, &disk).expect("open");
        let size = image.kind.size + 50 * 512;
        layer.resize(size, &image.below).expect("grow");
        layer.flush().expect("flush");
        drop(layer);
        let mut expected = image.start.clone();
        expected.resize(size as usize, 0);
        image.assert_good(&disk::bytes(&disk), &expected);
    }
}

/// Files of every length open or are refused; what is cut off reads as zeros.
#[test]
fn files_cut_short_are_refused_or_read_as_zeros() {
    for name in ["small", "old", "over same"] {
        let image = images::named(name).make();
        let header = if image.kind.old { 1048 } else { 1056 };
        for len in (0..1100).chain((1100..image.file.len()).step_by(4999)) {
            let file = &image.file[..len];
            match disk::read_only(&cow::DRIVER, file) {
                Ok(_) => assert!(len >= header),
                Err(error) => {
                    let text = format!("{error:?}");
                    assert!(len < 1056, "{text}");
                    let named = text.contains("truncated header") || text.contains("must be 0x4f4f4f4d");
                    assert!(named || len < 1056 && image.kind.old, "{len}: {text}");
                    continue;
                }
            }
            if len < 1056 {
                // Of a bitmap that is cut, what is left may look like the other layout's header.
                continue;
            }
            let shown = disk::read(&cow::DRIVER, file, &image.below).expect("read");
            assert!(shown == images::plain_read(file, &image.below_bytes), "{len}");
            let report = check(file);
            let whole = image.kind.below.is_none() && shown == image.start;
            assert!(
                report.corruptions > 0 || whole || len >= image.file.len() - 4999,
                "{len}"
            );
            let disk = disk::memory(file);
            disk::repair(&cow::DRIVER, &disk, Repair::All).expect("repair");
            image.assert_good(&disk::bytes(&disk), &shown);
        }
    }
}

/// 8 TiB in a file of 1056 bytes: nothing is read, allocated or walked that is not there.
#[test]
fn a_huge_disk_in_a_tiny_file_costs_nothing() {
    let mut header = cow::header::Header::new(SIZE_MAX, None);
    let layer = disk::read_only(&cow::DRIVER, &header.to_bytes()).expect("open");
    let extent = layer.map(GuestOffset::ZERO, u64::MAX).expect("map");
    assert_eq!((extent.len, extent.state), (SIZE_MAX, State::Absent));
    let report = check(&header.to_bytes());
    assert_eq!((report.corruptions, report.total_units), (1, SIZE_MAX / 512));

    // The same with a bitmap of 2 GiB that is one hole, and written to at both ends.
    let scratch = Scratch::new();
    header.backing = Some(b"base".to_vec());
    let path = scratch.file("huge.cow", &header.to_bytes());
    let host = || File::open(&path, &FileOptions::write(LockPlan::default())).expect("open the file");
    let file: std::sync::Arc<dyn diskmill_core::StorageMut> = std::sync::Arc::new(host());
    file.set_len(header.geometry().bitmap_end()).expect("a hole");
    let layer = disk::open(&cow::DRIVER, &file).expect("open");
    let below = Chain::new(vec![images::raw_layer(&[5; 1024])]);
    let at = GuestOffset::new;
    for place in [100, SIZE_MAX / 2 - 3, SIZE_MAX - 200] {
        layer.write_at(at(place), &[9; 200], &below).expect("write");
    }
    layer.flush().expect("flush");
    let mut found = Vec::new();
    let mut place = 0;
    while place < SIZE_MAX {
        let extent = layer.map(at(place), u64::MAX).expect("map");
        found.push((place, extent.len, extent.state != State::Absent));
        place += extent.len;
    }
    found.dedup_by(|next, last| {
        let joins = last.2 == next.2;
        last.1 += if joins { next.1 } else { 0 };
        joins
    });
    let half = SIZE_MAX / 2 - 512;
    let expected = [
        (0, 512, true),
        (512, half - 512, false),
        (half, 1024, true),
        (half + 1024, SIZE_MAX - 512 - half - 1024, false),
        (SIZE_MAX - 512, 512, true),
    ];
    assert_eq!(found, expected);
    drop(layer);
    let parsed = cow::DRIVER
        .parse(std::sync::Arc::new(host()), &disk::how())
        .expect("parse");
    let files: diskmill_core::Files = vec![(diskmill_core::Role::Main, std::sync::Arc::new(host()))];
    let report = parsed
        .check(files, &disk::how(), diskmill_core::Job::silent())
        .expect("check");
    assert_eq!((counts(&report), report.allocated_units), ((0, 0), 4));
}

#[test]
fn other_versions_are_found_and_refused_by_name() {
    let good = images::named("small").make().file;
    let probe = |file: &[u8]| cow::DRIVER.probe(&sample(file));
    let refused = |file: &[u8]| {
        assert_eq!(probe(file), Match::ByMagic);
        let error = disk::read_only(&cow::DRIVER, file).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        format!("{error:?}")
    };
    assert_eq!(probe(&good), Match::ByMagic);
    for (version, text) in [
        (1, "version is 1 (User-Mode Linux, big-endian)"),
        (3, "version is 3 (User-Mode Linux)"),
    ] {
        let mut file = good.clone();
        file[7] = version;
        let error = refused(&file);
        assert!(error.contains(text), "{error}");
    }
    let mut file = good.clone();
    file[..8].copy_from_slice(b"MOOO\x01\0\0\0");
    assert!(refused(&file).contains("byte-swapped"));
    file[4] = 2;
    assert_eq!(probe(&file), Match::No, "nobody ever wrote that");
    file[..4].copy_from_slice(b"OOON");
    assert_eq!(probe(&file), Match::No);
}

/// A name is a path, whatever it looks like.
#[test]
fn a_name_that_looks_like_a_protocol_is_a_path() {
    for (name, shown) in [
        ("base.raw", "base.raw"),
        ("/a:b/c", "/a:b/c"),
        ("dir/a:b", "dir/a:b"),
        ("nbd:localhost:10809", "./nbd:localhost:10809"),
        ("json:{\"driver\":\"nbd\"}", "./json:{\"driver\":\"nbd\"}"),
        ("http://host/x", "./http://host/x"),
    ] {
        let mut file = images::named("small").make().file;
        file[8..8 + name.len()].copy_from_slice(name.as_bytes());
        let layer = disk::read_only(&cow::DRIVER, &file).expect("open");
        let backing = layer.facts().backing.clone().expect("a backing file");
        assert_eq!((backing.name.as_str(), backing.format), (shown, None));
    }
}

/// Headers, bits and lengths at random: nothing panics, what opens reads as another reader has it, and what a repair
/// leaves is clean.
#[test]
fn random_damage_is_survived() {
    let images = [
        images::named("small").make(),
        images::named("old over longer").make(),
    ];
    let mut opened = 0;
    for round in 0..400 * u64::from(soak()) {
        let random = |which: u64| mix(seed().wrapping_shl(40) ^ round << 8 ^ which);
        let image = &images[(round % 2) as usize];
        let mut file = image.file.clone();
        for change in 0..1 + random(0) % 4 {
            let at = match random(10 + change) % 4 {
                0 => 1032 + random(20 + change) as usize % 24,
                1 => random(20 + change) as usize % 8,
                _ => 1048 + random(20 + change) as usize % 200,
            };
            file[at] = match random(30 + change) % 3 {
                0 => random(40 + change) as u8,
                1 => file[at] ^ (1 << (random(40 + change) % 8)),
                _ => 0xff,
            };
        }
        if random(1) % 3 == 0 {
            file.truncate(random(2) as usize % file.len());
        }
        let Ok(layer) = disk::read_only(&cow::DRIVER, &file) else {
            continue;
        };
        opened += 1;
        let size = layer.virtual_size();
        let mut at = 0;
        for _ in 0..10_000 {
            if at >= size {
                break;
            }
            at += layer.map(GuestOffset::new(at), u64::MAX).expect("map").len;
        }
        if size < 64 << 20 {
            let shown = disk::read(&cow::DRIVER, &file, &image.below).expect("read");
            let disk = disk::memory(&file);
            disk::repair(&cow::DRIVER, &disk, Repair::All).expect("repair");
            let report = check(&disk::bytes(&disk));
            assert_eq!(counts(&report), (0, 0), "round {round}: {:#?}", report.findings);
            let bytes = disk::bytes(&disk);
            assert!(
                disk::read(&cow::DRIVER, &bytes, &image.below).expect("read") == shown,
                "round {round}"
            );
        }
    }
    assert!(opened > 100, "{opened}");
}
