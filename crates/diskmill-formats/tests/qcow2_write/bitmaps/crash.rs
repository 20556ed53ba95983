//! Power cuts: a bitmap is as it was, as it will be, or says that it is not to be trusted. It never lacks a change of
//! the disk that is there.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use diskmill_core::{BitmapError, Chain, GuestOffset, LayerMut, NewBitmap, NewSnapshot, ZeroHow};
use diskmill_testkit::fault::Journal;
use diskmill_testkit::random::{seed, soak};
use diskmill_testkit::{Scratch, model, oracle};

use super::super::images::{self, Disks};
use super::{Stored, new, stored};

type Change<'a> = &'a dyn Fn(&Arc<dyn LayerMut>);

/// What an image was before a change that was cut short, and after.
struct Before {
    name: String,
    files: Vec<Vec<u8>>,
}

fn prepared(options: &str) -> Before {
    let scratch = Scratch::new();
    let path = scratch.join("image.qcow2");
    oracle::create(&path, "qcow2", options, "300k");
    oracle::io(&path, "qcow2", ["write -P 1 0 200k"]);
    let disks = images::memory(&[std::fs::read(&path).unwrap()]);
    let layer = images::open(&disks).unwrap();
    let bitmaps = layer.bitmaps().unwrap();
    bitmaps.add(&new("first", 512)).unwrap();
    bitmaps.add(&new("second", 4096)).unwrap();
    bitmaps
        .add(&NewBitmap {
            enabled: false,
            ..new("off", 2048)
        })
        .unwrap();
    let snapshot = NewSnapshot::new("s", 0, 0);
    layer.snapshots().unwrap().create(&snapshot).unwrap();
    layer
        .write_at(GuestOffset::new(9000), &[2; 3000], &Chain::default())
        .unwrap();
    layer.flush().unwrap();
    drop(layer);
    Before {
        name: options.to_owned(),
        files: images::bytes(&disks),
    }
}

/// The bytes that differ, in runs, as far as both disks have them.
fn differences(a: &[u8], b: &[u8]) -> Vec<Range<u64>> {
    let mut runs: Vec<Range<u64>> = Vec::new();
    for (at, (a, b)) in (0..).zip(a.iter().zip(b)) {
        if a != b {
            match runs.last_mut() {
                Some(run) if run.end == at => run.end += 1,
                _ => runs.push(at..at + 1),
            }
        }
    }
    runs
}

fn disk(files: &[Vec<u8>]) -> Vec<u8> {
    let disks = images::memory(files);
    let layer = images::open(&disks).expect("open");
    model::read(&layer, &Chain::default()).expect("read")
}

fn covers(bitmap: &Stored, change: &Range<u64>) -> bool {
    let (first, last) = (
        change.start / bitmap.granularity,
        (change.end - 1) / bitmap.granularity,
    );
    bitmap.runs.iter().any(|run| run.start <= first && last < run.end)
}

/// Cuts the power in every place of a change, and demands that no bitmap is wrong. With `whole`, bitmaps must be as
/// they were or as they are to be; else they may be in use.
fn cut(before: &Before, what: &str, whole: bool, change: Change<'_>) {
    let journal = Journal::new();
    let disks: Disks = images::memory(&before.files)
        .into_iter()
        .map(|disk| journal.record(disk))
        .collect();
    let layer = images::open(&disks).expect("open");
    change(&layer);
    drop(layer);
    let after = images::bytes(&disks);
    images::assert_clean(&after);
    let (old, new) = (stored(&before.files[0]), stored(&after[0]));
    let start = disk(&before.files);
    for count in 0..=journal.len() {
        for number in 0..=2 * u64::from(soak()) {
            let seed = seed() ^ number << 8;
            let files = match number {
                0 => journal.prefix(count),
                _ => journal.crash(count, seed),
            };
            let context = format!("{}: {what}, cut {count}, seed {seed}", before.name);
            let report = images::check(&files).unwrap_or_else(|error| panic!("{context}: {error:?}"));
            assert_eq!(
                (report.check_errors, report.corruptions),
                (0, 0),
                "{context}: {:#?}",
                report.findings
            );
            let found = stored(&files[0]);
            let named = |map: &BTreeMap<String, Stored>| map.keys().cloned().collect::<Vec<_>>();
            assert!(
                named(&found) == named(&old) || named(&found) == named(&new),
                "{context}: {found:#?}"
            );
            let changes = differences(&start, &disk(&files));
            for (name, bitmap) in &found {
                let in_use = bitmap.flags & 1 != 0;
                assert!(!in_use || !whole, "{context}: '{name}' is in use");
                if in_use {
                    continue;
                }
                if whole {
                    let is = |map: &BTreeMap<String, Stored>| map.get(name) == Some(bitmap);
                    assert!(is(&old) || is(&new), "{context}: '{name}' is {bitmap:?}");
                } else if bitmap.flags & 2 != 0 {
                    for change in &changes {
                        assert!(covers(bitmap, change), "{context}: '{name}' lacks {change:?}");
                    }
                }
            }
            if count % 8 == 1 && seed == 1 {
                let scratch = Scratch::new();
                let (value, code) = oracle::check(scratch.file("image.qcow2", &files[0]), "qcow2");
                assert!(code == 0 || code == 3, "{context}: {value}");
            }
        }
    }
}

/// The header with its extensions has one sector in the first, several in the others.
const OPTIONS: [&str; 3] = [
    "cluster_size=512,refcount_bits=64",
    "cluster_size=8k",
    "extended_l2=on,cluster_size=16k",
];

#[test]
fn changes_of_bitmaps_are_made_whole_or_not_at_all() {
    for options in OPTIONS {
        let before = prepared(options);
        fn bitmaps(layer: &Arc<dyn LayerMut>) -> &dyn diskmill_core::Bitmaps {
            layer.bitmaps().unwrap()
        }
        let merge = |layer: &Arc<dyn LayerMut>, name: &str, from: &str| {
            let mut runs = layer.dirty(from).unwrap();
            bitmaps(layer).merge(name, &mut *runs).unwrap();
        };
        let changes: [(&str, Change<'_>); 8] = [
            ("add", &|layer| {
                drop(bitmaps(layer).add(&new("new", 1024)).unwrap())
            }),
            ("remove", &|layer| bitmaps(layer).remove("first").unwrap()),
            ("clear", &|layer| bitmaps(layer).clear("second").unwrap()),
            ("enable", &|layer| bitmaps(layer).enable("off").unwrap()),
            ("disable", &|layer| bitmaps(layer).disable("first").unwrap()),
            ("merge", &|layer| merge(layer, "off", "first")),
            ("merge into itself", &|layer| merge(layer, "first", "first")),
            ("grow", &|layer| {
                layer.resize(40 << 20, &Chain::default()).unwrap()
            }),
        ];
        for (what, change) in changes {
            cut(&before, what, true, change);
        }
        // The first of all, and the last.
        let bare = {
            let disks = images::memory(&before.files);
            let layer = images::open(&disks).unwrap();
            for name in ["first", "second", "off"] {
                bitmaps(&layer).remove(name).unwrap();
            }
            drop(layer);
            Before {
                name: format!("{options}, without bitmaps"),
                files: images::bytes(&disks),
            }
        };
        cut(&bare, "add", true, &|layer| {
            drop(bitmaps(layer).add(&new("new", 1024)).unwrap())
        });
        let one = {
            let disks = images::memory(&bare.files);
            let layer = images::open(&disks).unwrap();
            bitmaps(&layer).add(&new("only", 4096)).unwrap();
            drop(layer);
            Before {
                name: format!("{options}, one bitmap"),
                files: images::bytes(&disks),
            }
        };
        cut(&one, "remove", true, &|layer| {
            bitmaps(layer).remove("only").unwrap()
        });
    }
}

#[test]
fn no_change_of_the_disk_is_ever_missing() {
    let below = Chain::default();
    for options in OPTIONS.into_iter().take(2) {
        let before = prepared(options);
        let changes: [(&str, Change<'_>); 6] = [
            ("write", &|layer| {
                layer
                    .write_at(GuestOffset::new(70_000), &[5; 9000], &below)
                    .unwrap();
                layer
                    .write_at(GuestOffset::new(250_000), &[5; 100], &below)
                    .unwrap();
            }),
            ("write, flush, write", &|layer| {
                layer.write_at(GuestOffset::new(1000), &[5; 100], &below).unwrap();
                layer.flush().unwrap();
                layer
                    .write_at(GuestOffset::new(100_000), &[6; 100], &below)
                    .unwrap();
                layer.flush().unwrap();
                layer.flush().unwrap();
                layer
                    .write_at(GuestOffset::new(299_000), &[7; 100], &below)
                    .unwrap();
            }),
            ("zero", &|layer| {
                let range = GuestOffset::new(5000)..GuestOffset::new(100_000);
                layer.zero(range, ZeroHow::MayUnmap, &below).unwrap();
            }),
            ("discard", &|layer| {
                layer
                    .discard(GuestOffset::ZERO..GuestOffset::new(150_000))
                    .unwrap();
            }),
            ("apply", &|layer| layer.snapshots().unwrap().apply("s").unwrap()),
            ("shrink", &|layer| layer.resize(100 << 10, &below).unwrap()),
        ];
        for (what, change) in changes {
            cut(&before, what, false, change);
        }
    }
}

#[test]
fn a_flush_leaves_bitmaps_that_are_trusted() {
    let before = prepared("cluster_size=4k");
    let disks = images::memory(&before.files);
    let layer = images::open(&disks).unwrap();
    let flags = || {
        stored(&images::bytes(&disks)[0])
            .values()
            .map(|bitmap| bitmap.flags)
            .collect::<Vec<_>>()
    };
    assert_eq!(flags(), [2, 0, 2]);
    layer
        .write_at(GuestOffset::new(1000), &[5; 100], &Chain::default())
        .unwrap();
    assert_eq!(flags(), [3, 0, 3], "only those that record changes are in doubt");
    layer.flush().unwrap();
    assert_eq!(flags(), [2, 0, 2]);
    // What reads bitmaps beside us sees the same.
    let runs = super::runs(&*layer, "first");
    assert_eq!(runs, [512..1536, 8704..12288]);
    let error = layer.dirty("none").map(|_| ()).unwrap_err();
    assert!(matches!(error.find(), Some(BitmapError::NotFound(_))));
}
