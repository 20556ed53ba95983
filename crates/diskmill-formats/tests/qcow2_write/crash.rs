//! Power cuts: whatever of the writes that were not flushed is lost or torn, nothing is corrupt and no data that was
//! flushed is gone.

use std::sync::Arc;

use diskmill_core::{ErrorKind, ZeroHow};
use diskmill_testkit::fault::{Change, Failure, Faults, Journal, Lasting};
use diskmill_testkit::model::{self, Model, Op};
use diskmill_testkit::oracle;
use diskmill_testkit::sparse_random::mix;
use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::TestRunner;

use super::images::{self, Disks, Image, Kind};
use super::model::{runner, soak};

/// The operations of a story: the same for the same kind.
fn story(kind: &Kind, image: &Image, runner: &mut TestRunner) -> Vec<Op> {
    let mut ops: Vec<Op> = super::model::ops(*kind, image.unit)
        .new_tree(runner)
        .expect("operations")
        .current();
    // After these the disk as a whole is another, which `explains` cannot follow.
    ops.retain(|op| {
        !matches!(
            op,
            Op::Resize { .. } | Op::Clear | Op::Reopen | Op::Discard { .. }
        )
    });
    for index in (3..ops.len()).step_by(4).rev() {
        ops.insert(index, Op::Flush);
    }
    ops.push(Op::Flush);
    ops
}

/// Operations that fill the disk: new tables of every sort, and old ones copied.
fn fill(kind: &Kind) -> Vec<Op> {
    let step = (kind.size / 6).next_multiple_of(512);
    (0..6)
        .flat_map(|part| {
            let at = part * step;
            let how = ZeroHow::KeepAllocated;
            let len = 3000;
            [
                Op::Write {
                    at,
                    len: step,
                    fill: 5,
                },
                Op::Zero { at, len: 9000, how },
                Op::Flush,
                Op::Write {
                    at: at + 700,
                    len,
                    fill: 6,
                },
                Op::Flush,
            ]
        })
        .collect()
}

/// What the disk may read as at a point of a story.
struct Epoch {
    /// Changes noted when it began.
    from: usize,
    /// What it read as at the last flush, and after each operation since.
    versions: Vec<Vec<u8>>,
}

/// Plays a story. Returns the moments at which the set of versions changed.
fn play(image: &Image, ops: &[Op], journal: &Arc<Journal>) -> Vec<Epoch> {
    let disks: Disks = images::memory(&image.files)
        .into_iter()
        .map(|disk| journal.record(disk))
        .collect();
    let layer = images::open(&disks).expect("open");
    let mut model = Model::new(image.start.clone());
    let mut versions = vec![image.start.clone()];
    let mut epochs = Vec::new();
    for op in ops {
        let from = journal.len();
        let mut next = model.clone();
        next.apply(op, &layer, &image.below, image.unit, &|unit| {
            image.pack(&layer, unit)
        })
        .unwrap_or_else(|error| panic!("{op:?}: {error:?}"));
        model = next;
        // While it is under way, a part of it may show.
        versions.push(model.bytes().to_vec());
        epochs.push(Epoch {
            from,
            versions: versions.clone(),
        });
        if *op == Op::Flush {
            versions = vec![model.bytes().to_vec()];
        }
    }
    epochs.push(Epoch {
        from: journal.len(),
        versions,
    });
    epochs
}

/// Whether each sector is as one of the versions has it. What was flushed is the first of them.
fn explains(versions: &[Vec<u8>], found: &[u8]) -> Option<usize> {
    found.chunks(512).enumerate().position(|(sector, bytes)| {
        let start = sector * 512;
        let range = start..start + bytes.len();
        let whole = versions.iter().any(|version| version[range.clone()] == *bytes);
        // A write of less than a sector to a place of its own may show byte by byte.
        !whole
            && bytes
                .iter()
                .zip(range)
                .any(|(byte, at)| versions.iter().all(|version| version[at] != *byte))
    })
}

/// Moments to cut the power at: where the most is not flushed, each with a seed that says what of it is lost.
fn cuts(journal: &Journal, seeds: u64) -> Vec<(usize, u64)> {
    let changes = journal.changes();
    let before_a_flush = (0..changes.len()).filter(|index| {
        let ends = changes
            .get(*index)
            .is_some_and(|change| matches!(change, Change::Flush { .. }));
        let is_first = index
            .checked_sub(1)
            .is_none_or(|last| !matches!(changes[last], Change::Flush { .. }));
        ends && is_first
    });
    let mut cuts: Vec<(usize, u64)> = before_a_flush
        .flat_map(|count| (0..seeds).map(move |seed| (count, seed)))
        .collect();
    cuts.extend((0..seeds * 4).map(|seed| ((mix(seed) % (journal.len() as u64 + 1)) as usize, seed)));
    cuts
}

/// Demands that `files`, left by a power cut behind `count` changes, are not corrupt and have what was flushed.
fn examine(image: &Image, epochs: &[Epoch], files: &[Vec<u8>], count: usize, context: &dyn Fn() -> String) {
    let report = images::check(files).unwrap_or_else(|error| panic!("{}: {error:?}", context()));
    assert_eq!(
        (report.check_errors, report.corruptions),
        (0, 0),
        "{}: {:#?}",
        context(),
        report.findings
    );
    let disks = images::memory(files);
    let layer = images::open(&disks).unwrap_or_else(|error| panic!("{}: {error:?}", context()));
    let found = model::read(&layer, &image.below).expect("read");
    let epoch = epochs
        .iter()
        .rfind(|epoch| epoch.from <= count)
        .expect("an epoch");
    if let Some(sector) = explains(&epoch.versions, &found) {
        panic!("{}: sector {sector} is lost", context());
    }
    if count % 16 == 1 {
        let (value, code) = oracle::check(image.dump(files), "qcow2");
        assert!(code == 0 || code == 3, "{}: {value}", context());
    }
}

fn survives(image: &Image, stories: u32, seeds: u64) {
    let kind = &image.kind;
    let mut runner = runner(1);
    for number in 0..=stories {
        let ops = match number {
            0 => fill(kind),
            _ => story(kind, image, &mut runner),
        };
        let journal = Journal::new();
        let epochs = play(image, &ops, &journal);
        for (count, seed) in cuts(&journal, seeds) {
            let files = match seed % 5 {
                4 => journal.prefix(count),
                _ => journal.crash(count, mix(seed ^ count as u64)),
            };
            let context = || format!("{}, story {number}, cut {count}, seed {seed}: {ops:?}", kind.name);
            examine(image, &epochs, &files, count, &context);
        }
    }
}

#[test]
fn a_power_cut_at_random_leaks_at_worst() {
    for name in [
        "cluster 512",
        "refcount 1",
        "refcount 4",
        "refcount 64",
        "version 2 snapshot",
        "compressed",
        "subclusters snapshot",
        "data file",
        "raw data file",
        "over longer",
        "subclusters over raw",
    ] {
        let kind = images::named(name);
        survives(&kind.make(), soak(), 3);
    }
}

#[test]
fn a_power_cut_while_the_refcount_table_moves_leaks_at_worst() {
    let mut image = images::named("refcount table").make();
    // Its refcount table of 64 entries counts 2 MiB.
    let disks = images::memory(&image.files);
    let layer = images::open(&disks).expect("open");
    let mut model = Model::new(image.start.clone());
    let filled = 1900 << 10;
    let op = Op::Write {
        at: 0,
        len: filled,
        fill: 1,
    };
    model
        .apply(&op, &layer, &image.below, image.unit, &|_| None)
        .expect("write");
    layer.flush().expect("flush");
    drop(layer);
    (image.files, image.start) = (images::bytes(&disks), model.bytes().to_vec());
    let table = |files: &[Vec<u8>]| files[0][48..60].to_vec();

    let ops: Vec<Op> = (0..3)
        .flat_map(|part| {
            let (at, len) = (filled + part * 40_000, 40_000);
            [Op::Write { at, len, fill: 2 }, Op::Flush]
        })
        .collect();
    let journal = Journal::new();
    let epochs = play(&image, &ops, &journal);
    assert_ne!(
        table(&journal.prefix(journal.len())),
        table(&image.files),
        "the table has moved"
    );
    for count in 0..=journal.len() {
        for seed in 0..2 {
            examine(&image, &epochs, &journal.crash(count, seed), count, &|| {
                format!("cut {count}, seed {seed}")
            });
        }
    }
    image.assert_good(
        &journal.prefix(journal.len()),
        &epochs.last().expect("an end").versions[0],
    );
}

#[test]
fn a_resize_or_a_clearing_that_is_cut_short_leaks_at_worst() {
    let changes = [
        Op::Resize { size: 100 << 10 },
        Op::Resize { size: 64 << 20 },
        Op::Clear,
    ];
    for name in [
        "cluster 512",
        "refcount 64",
        "over raw",
        "version 2",
        "subclusters snapshot",
    ] {
        let image = images::named(name).make();
        for op in &changes {
            let journal = Journal::new();
            let disks: Disks = images::memory(&image.files)
                .into_iter()
                .map(|disk| journal.record(disk))
                .collect();
            let layer = images::open(&disks).expect("open");
            Model::new(image.start.clone())
                .apply(op, &layer, &image.below, image.unit, &|_| None)
                .unwrap_or_else(|error| panic!("{name}, {op:?}: {error:?}"));
            drop(layer);
            let cuts: Vec<usize> = match journal.len() {
                few @ 0..=60 => (0..=few).collect(),
                many => (0..60).map(|cut| many * cut / 59).collect(),
            };
            for count in cuts {
                for seed in 0..3 {
                    let report = images::check(&journal.crash(count, seed)).expect("check");
                    assert_eq!(
                        (report.check_errors, report.corruptions),
                        (0, 0),
                        "{name}, {op:?}, cut {count}: {:#?}",
                        report.findings
                    );
                }
            }
        }
    }
}

#[test]
fn a_call_that_fails_corrupts_nothing() {
    for name in ["cluster 512", "refcount 8", "over longer", "subclusters over raw"] {
        let kind = images::named(name);
        let image = kind.make();
        let ops = story(&kind, &image, &mut runner(1));
        let attempt = |faults: &Arc<Faults>| {
            let inner = images::memory(&image.files);
            let disks: Disks = inner.iter().map(|disk| faults.wrap(Arc::clone(disk))).collect();
            let mut failed = None;
            match images::open(&disks) {
                Err(error) => failed = Some(error),
                Ok(layer) => {
                    let mut model = Model::new(image.start.clone());
                    for op in &ops {
                        let pack = |unit: &[u8]| image.pack(&layer, unit);
                        if let Err(error) = model.apply(op, &layer, &image.below, image.unit, &pack) {
                            failed = Some(error);
                        }
                    }
                }
            }
            (images::bytes(&inner), failed)
        };
        let calls = {
            let faults = Faults::new();
            assert!(attempt(&faults).1.is_none());
            faults.calls()
        };
        for number in (0..calls).step_by(calls.div_ceil(60).max(1) as usize) {
            for (failure, lasting) in [
                (Failure::Io, Lasting::Once),
                (Failure::ShortWrite, Lasting::ForGood),
            ] {
                let faults = Faults::new();
                faults.fail_at(number, failure, lasting);
                let (files, failed) = attempt(&faults);
                if faults.struck() > 0 && lasting == Lasting::ForGood {
                    let error = failed.unwrap_or_else(|| panic!("{name}, call {number}: nobody noticed"));
                    assert_ne!(
                        error.kind(),
                        ErrorKind::Corrupt,
                        "{name}, call {number}: {error:?}"
                    );
                }
                let report = images::check(&files).expect("check");
                assert_eq!(
                    (report.check_errors, report.corruptions),
                    (0, 0),
                    "{name}, call {number}, {failure:?} {lasting:?}: {:#?}",
                    report.findings
                );
            }
        }
    }
}

#[test]
fn plain_writes_wait_for_no_flush() {
    let image = images::named("default").make();
    let journal = Journal::new();
    let disks = vec![journal.record(images::memory(&image.files).remove(0))];
    let layer = images::open(&disks).expect("open");
    for cluster in 0..image.start.len() as u64 / image.unit {
        let at = diskmill_core::GuestOffset::new(cluster * image.unit);
        layer.write_at(at, &[7; 4096], &image.below).expect("write");
    }
    let flushes = |journal: &Journal| {
        let changes = journal.changes();
        changes
            .iter()
            .filter(|change| matches!(change, Change::Flush { .. }))
            .count()
    };
    assert_eq!(flushes(&journal), 0);
    layer.flush().expect("flush");
    assert!(
        flushes(&journal) <= 3,
        "refcounts, tables and the whole: {}",
        flushes(&journal)
    );
}
