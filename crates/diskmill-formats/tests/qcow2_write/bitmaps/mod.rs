//! Dirty bitmaps, changed by QEMU's tools and by us: the same steps must give the same bits.
#![allow(clippy::single_range_in_vec_init, reason = "one run is a list of one range")]

mod crash;
mod hostile;
mod steps;

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use diskmill_core::{BitmapError, ErrorKind, GuestOffset, NewBitmap};
use diskmill_formats::qcow2::extension::Extension;
use diskmill_formats::qcow2::read_header;
use diskmill_storage::Memory;
use diskmill_testkit::{Scratch, oracle};

use super::images::{self, Disks};

/// What a file says of a bitmap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    pub flags: u32,
    pub granularity: u64,
    /// Runs of set bits.
    pub runs: Vec<Range<u64>>,
}

fn u64_at(bytes: &[u8], at: u64) -> u64 {
    u64::from_be_bytes(bytes[at as usize..at as usize + 8].try_into().unwrap())
}

/// The bitmaps of an image, read in the plainest way.
pub fn stored(file: &[u8]) -> BTreeMap<String, Stored> {
    let header = read_header(&Memory::from(file)).expect("a header");
    let mut found = BTreeMap::new();
    let Some(place) = header.bitmaps() else {
        return found;
    };
    let cluster = header.cluster_bits.cluster_size();
    let mut at = place.directory_offset.get();
    for _ in 0..place.nb_bitmaps {
        let word = u64_at(file, at + 8);
        let (entries, flags) = (word >> 32, word as u32);
        let word = u64_at(file, at + 16);
        let granularity = 1_u64 << (word >> 48 & 0xff);
        let name_len = word >> 32 & 0xffff;
        let name = String::from_utf8(file[at as usize + 24..(at + 24 + name_len) as usize].to_vec()).unwrap();
        let table = u64_at(file, at);
        let mut runs: Vec<Range<u64>> = Vec::new();
        for index in 0..entries {
            let entry = u64_at(file, table + index * 8);
            for bit in 0..cluster * 8 {
                let is_set = match entry {
                    0 => break,
                    1 => true,
                    entry => {
                        let byte = file.get((entry + bit / 8) as usize).copied().unwrap_or(0);
                        byte >> (bit % 8) & 1 == 1
                    }
                };
                let bit = index * cluster * 8 + bit;
                // All set means all there are.
                if !is_set || entry == 1 && bit * granularity >= header.virtual_size() {
                    continue;
                }
                match runs.last_mut() {
                    Some(run) if run.end == bit => run.end += 1,
                    _ => runs.push(bit..bit + 1),
                }
            }
        }
        let last = runs.last().map_or(0, |run| run.end);
        assert!(
            last <= header.virtual_size().div_ceil(granularity),
            "'{name}' has bits behind its end: {runs:?}"
        );
        found.insert(
            name,
            Stored {
                flags,
                granularity,
                runs,
            },
        );
        at += (24 + name_len).next_multiple_of(8);
    }
    assert_eq!(at, place.directory_offset.get() + place.directory_size);
    found
}

/// What a file on disk says of its bitmaps.
pub fn stored_at(path: &Path) -> BTreeMap<String, Stored> {
    stored(&std::fs::read(path).expect("read the image"))
}

/// A bitmap to make.
pub fn new(name: &str, granularity: u64) -> NewBitmap {
    NewBitmap {
        name: name.to_owned(),
        granularity: Some(granularity),
        enabled: true,
    }
}

fn make(options: &str, size: &str) -> (Scratch, Disks) {
    let scratch = Scratch::new();
    let path = scratch.join("image.qcow2");
    oracle::create(&path, "qcow2", options, size);
    let disks = images::memory(&[std::fs::read(path).unwrap()]);
    (scratch, disks)
}

/// The dirty runs that the library reads.
fn runs(layer: &dyn diskmill_core::Layer, name: &str) -> Vec<Range<u64>> {
    let mut runs = layer.dirty(name).expect("the bitmap");
    let mut found = Vec::new();
    while let Some(run) = runs.next_run().expect("a run") {
        found.push(run.start.get()..run.end.get());
    }
    found
}

#[test]
fn every_granularity_is_kept_and_understood_by_qemu() {
    for (options, size) in [
        ("cluster_size=64k", 5 << 30),
        ("cluster_size=512,refcount_bits=1", 3 << 20),
    ] {
        let (scratch, disks) = make(options, &format!("{size}"));
        let layer = images::open(&disks).unwrap();
        let bitmaps = layer.bitmaps().expect("bitmaps");
        for bits in 9..=31 {
            bitmaps.add(&new(&format!("b{bits}"), 1 << bits)).unwrap();
        }
        let changes: [Range<u64>; 3] = [1000..5000, size / 2..size / 2 + 1, size - 700..size];
        let below = Default::default();
        for change in &changes {
            let bytes = vec![7; (change.end - change.start) as usize];
            layer
                .write_at(GuestOffset::new(change.start), &bytes, &below)
                .unwrap();
        }
        layer.flush().unwrap();
        for bits in 9..=31 {
            let g = 1_u64 << bits;
            let mut expected: Vec<Range<u64>> = Vec::new();
            for change in &changes {
                let run = change.start / g * g..change.end.next_multiple_of(g).min(size);
                match expected.last_mut() {
                    Some(last) if last.end >= run.start => last.end = run.end,
                    _ => expected.push(run),
                }
            }
            assert_eq!(runs(&*layer, &format!("b{bits}")), expected, "{options}, {g}");
        }
        drop(layer);
        let files = images::bytes(&disks);
        images::assert_clean(&files);
        let ours = stored(&files[0]);
        let path = scratch.file("image.qcow2", &files[0]);
        oracle::assert_clean(&path, "qcow2");
        // QEMU reads all bits, and writes them back.
        oracle::io(&path, "qcow2", ["flush"]);
        assert_eq!(stored_at(&path), ours, "{options}");
        oracle::assert_clean(&path, "qcow2");
    }
}

#[test]
fn what_cannot_be_is_refused_and_changes_nothing() {
    let (_scratch, disks) = make("", "1M");
    let layer = images::open(&disks).unwrap();
    let bitmaps = layer.bitmaps().expect("bitmaps");
    bitmaps.add(&new("b", 65536)).unwrap();
    let before = images::bytes(&disks);
    let long = "x".repeat(1024);
    let add = |name: &str, granularity| bitmaps.add(&new(name, granularity)).map(|_| ());
    let mut other = layer.dirty("b").unwrap();
    let cases = [
        (add("b", 65536), BitmapError::Exists("b".into())),
        (add("", 65536), BitmapError::Name(0)),
        (add(&long, 65536), BitmapError::Name(1024)),
        (add("c", 256), BitmapError::Granularity(256)),
        (add("c", 768), BitmapError::Granularity(768)),
        (add("c", 4 << 30), BitmapError::Granularity(4 << 30)),
        (bitmaps.remove("c"), BitmapError::NotFound("c".into())),
        (bitmaps.clear("c"), BitmapError::NotFound("c".into())),
        (bitmaps.enable("c"), BitmapError::NotFound("c".into())),
        (bitmaps.disable("c"), BitmapError::NotFound("c".into())),
        (bitmaps.merge("c", &mut *other), BitmapError::NotFound("c".into())),
    ];
    for (result, expected) in cases {
        let error = result.unwrap_err();
        assert_eq!(error.find::<BitmapError>(), Some(&expected), "{error:?}");
    }
    assert_eq!(images::bytes(&disks), before);

    let (_scratch, disks) = make("compat=0.10", "1M");
    let layer = images::open(&disks).unwrap();
    let error = layer.bitmaps().unwrap().add(&new("b", 65536)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error:?}");

    let (_scratch, disks) = make("", "2T");
    let layer = images::open(&disks).unwrap();
    let bitmaps = layer.bitmaps().unwrap();
    bitmaps.add(&new("largest", 512)).unwrap();
    layer.resize((2 << 40) + 512, &Default::default()).unwrap_err();
    bitmaps.remove("largest").unwrap();
    layer.resize((2 << 40) + 512, &Default::default()).unwrap();
    let error = bitmaps.add(&new("too large", 512)).unwrap_err();
    assert!(
        matches!(error.find(), Some(BitmapError::Size { .. })),
        "{error:?}"
    );
}

#[test]
fn a_bitmap_that_was_not_closed_can_only_be_removed() {
    let (scratch, disks) = make("", "1M");
    let path = scratch.file("image.qcow2", &images::bytes(&disks)[0]);
    for (name, off) in [("b", None), ("c", Some("--disable"))] {
        oracle::qemu_img()
            .arg("bitmap")
            .arg("--add")
            .args(off)
            .arg(&path)
            .arg(name)
            .ok();
    }
    // It ends as a crash would.
    let crashed = oracle::qemu_io()
        .args(["-c", "write 64k 64k", "-c", "abort"])
        .arg(&path)
        .finish();
    assert_ne!(crashed.code, Some(0));
    let disks = images::memory(&[std::fs::read(&path).unwrap()]);
    let layer = images::open(&disks).unwrap();
    let bitmaps = layer.bitmaps().unwrap();
    assert!(bitmaps.list().iter().all(|facts| facts.inconsistent));
    let bad = |result: diskmill_core::Result<()>| {
        let error = result.unwrap_err();
        assert_eq!(
            error.find(),
            Some(&BitmapError::Inconsistent("b".into())),
            "{error:?}"
        );
    };
    bad(bitmaps.clear("b"));
    bad(bitmaps.enable("b"));
    bad(bitmaps.disable("b"));
    bad(layer.dirty("b").map(|_| ()));
    bad(layer.resize(2 << 20, &Default::default()));
    bitmaps.add(&new("d", 4096)).unwrap();
    let mut from = layer.dirty("d").unwrap();
    bad(bitmaps.merge("b", &mut *from));
    // Guest data can be changed: only what is sound follows.
    layer
        .write_at(GuestOffset::ZERO, &[1; 512], &Default::default())
        .unwrap();
    bitmaps.remove("b").unwrap();
    layer.flush().unwrap();
    let found = stored(&images::bytes(&disks)[0]);
    assert_eq!(found["c"].flags, 1);
    assert_eq!(
        (found["d"].flags, found["d"].runs.as_slice()),
        (2, [0..1].as_slice())
    );
    bitmaps.remove("c").unwrap();
    bitmaps.remove("d").unwrap();
    drop(layer);
    let files = images::bytes(&disks);
    images::assert_clean(&files);
    let header = read_header(&Memory::from(files[0].as_slice())).unwrap();
    assert!(
        !header
            .extensions
            .iter()
            .any(|extension| matches!(extension, Extension::Bitmaps(_)))
    );
    oracle::assert_clean(scratch.file("image.qcow2", &files[0]), "qcow2");
}

#[test]
fn what_is_done_to_the_disk_as_a_whole_is_recorded_too() {
    let (scratch, disks) = make("cluster_size=4k", "1M");
    let layer = images::open(&disks).unwrap();
    let below = Default::default();
    let bitmaps = layer.bitmaps().unwrap();
    let snapshots = layer.snapshots().unwrap();
    let snapshot = diskmill_core::NewSnapshot::new("s", 0, 0);
    layer.write_at(GuestOffset::ZERO, &[1; 4096], &below).unwrap();
    snapshots.create(&snapshot).unwrap();
    bitmaps.add(&new("on", 8192)).unwrap();
    bitmaps
        .add(&NewBitmap {
            enabled: false,
            ..new("off", 4096)
        })
        .unwrap();
    layer.resize(3 << 20, &below).unwrap();
    assert_eq!(runs(&*layer, "on"), []);
    layer
        .write_at(GuestOffset::new(2 << 20), &[1; 4096], &below)
        .unwrap();
    assert_eq!(runs(&*layer, "on"), [2 << 20..(2 << 20) + 8192]);
    // Another state, and another size.
    snapshots.apply("s").unwrap();
    assert_eq!(runs(&*layer, "on"), [0..1 << 20]);
    assert_eq!(runs(&*layer, "off"), []);
    snapshots.delete("s").unwrap();
    bitmaps.clear("on").unwrap();
    // What shows through is what was there.
    layer.clear().unwrap();
    layer.discard(GuestOffset::new(0)..GuestOffset::new(100)).unwrap();
    drop(layer);
    let files = images::bytes(&disks);
    images::assert_clean(&files);
    let path = scratch.file("image.qcow2", &files[0]);
    oracle::assert_clean(&path, "qcow2");
    oracle::io(&path, "qcow2", ["flush"]);
    let found = stored_at(&path);
    assert_eq!(found["on"].runs, [0..1]);
    assert_eq!(found["off"].runs, []);
}

#[test]
fn many_changes_in_small_pieces_are_all_recorded() {
    // More runs than are kept in memory.
    let (scratch, disks) = make("cluster_size=64k", "513M");
    let layer = images::open(&disks).unwrap();
    layer.bitmaps().unwrap().add(&new("fine", 512)).unwrap();
    layer.bitmaps().unwrap().add(&new("coarse", 1 << 20)).unwrap();
    for index in 0..70_000_u64 {
        let at = GuestOffset::new(index * 7680 + 100);
        layer.discard(at..at.saturating_add(1)).unwrap();
    }
    drop(layer);
    let files = images::bytes(&disks);
    let found = stored(&files[0]);
    assert_eq!(found["fine"].runs.len(), 70_000);
    assert!(
        found["fine"]
            .runs
            .iter()
            .zip(0..)
            .all(|(run, index)| *run == (index * 15..index * 15 + 1))
    );
    assert_eq!(found["coarse"].runs, [0..513]);
    images::assert_clean(&files);
    oracle::assert_clean(scratch.file("image.qcow2", &files[0]), "qcow2");
}
