//! Power cuts: whatever of the writes that were not flushed is lost or torn, nothing is corrupt and no data that was
//! flushed is gone.

use std::sync::Arc;

use diskmill_core::{ErrorKind, GuestOffset, ZeroHow};
use diskmill_testkit::crash::{Effect, Effort, Figures, Picture, Tale, Tolerance};
use diskmill_testkit::fault::{Change, Failure, Faults, Journal, Lasting};
use diskmill_testkit::figures;
use diskmill_testkit::model::{Model, Op};
use diskmill_testkit::random::{runner, seed, soak};
use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::TestRunner;

use super::images::{self, Disks, Image, Kind};
use super::subject;

/// The operations of a story: the same for the same kind.
fn story(kind: &Kind, image: &Image, runner: &mut TestRunner) -> Vec<Op> {
    let mut ops: Vec<Op> = super::model::ops(*kind, image.unit)
        .new_tree(runner)
        .expect("operations")
        .current();
    // Bitmaps have power cuts of their own: what they say is a matter of all operations together.
    ops.retain(|op| !matches!(op, Op::Bitmap { .. }));
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

/// What the model shows.
fn shown(model: &Model) -> Picture {
    Picture {
        snapshots: model.snapshots().clone(),
        ..Picture::of(model.bytes().to_vec())
    }
}

/// How an operation gets from one picture to the next.
fn effect(op: &Op) -> Effect {
    match op {
        Op::Flush | Op::Resize { .. } => Effect::Settles,
        Op::Snapshot { .. } | Op::Apply { .. } | Op::Delete { .. } => Effect::Switches,
        _ => Effect::Flows,
    }
}

/// As [`effect`], of an operation that led from `before` to `after`.
fn effect_of(op: &Op, before: &Picture, after: &Picture) -> Effect {
    match op {
        Op::Flush => Effect::Settles,
        // There was no such snapshot, or nothing to do, or the image cannot.
        _ if before == after => Effect::Flows,
        _ => effect(op),
    }
}

/// What may show through while an operation is under way: of what is given up, zeros or what is below.
fn through(image: &Image, model: &Model, op: &Op) -> Vec<Picture> {
    let disk = shown(model);
    let end = disk.disk.len();
    let span = match *op {
        Op::Resize { size } => (size as usize).min(end)..end,
        Op::Discard { at, len } => (at as usize).min(end)..(at + len).min(end as u64) as usize,
        _ => return Vec::new(),
    };
    let (mut zeros, mut below) = (disk.clone(), disk);
    zeros.disk[span.clone()].fill(0);
    let at = GuestOffset::new(span.start as u64);
    image.below.read_at(at, &mut below.disk[span]).expect("read");
    vec![zeros, below]
}

/// Plays a story.
fn play(name: &str, image: &Image, ops: &[Op], journal: &Arc<Journal>) -> Tale {
    let disks: Disks = images::memory(&image.files)
        .into_iter()
        .map(|disk| journal.record(disk))
        .collect();
    let start = subject::picture(&image.files, &image.below).expect("look");
    let mut layer = images::open(&disks).expect("open");
    let mut model = Model::with_snapshots(start.disk.clone(), start.snapshots.clone());
    let mut tale = Tale::new(name, journal, start);
    for op in ops {
        if !image.can(op) {
            continue;
        }
        let mark = tale.mark();
        let through = through(image, &model, op);
        if *op == Op::Reopen {
            drop(layer);
            layer = images::open(&disks).expect("open again");
        }
        let pack = |unit: &[u8]| image.pack(&layer, unit);
        model
            .apply(op, &layer, &image.below, image.unit, &pack)
            .unwrap_or_else(|error| panic!("{name}, {op:?}: {error:?}"));
        let after = shown(&model);
        let effect = effect_of(op, tale.now(), &after);
        tale.note_through(mark, format!("{op:?}"), effect, through, after);
        if effect == Effect::Switches {
            tale.tolerate(Tolerance::LaggingFlags);
        }
    }
    tale
}

fn survives(image: &Image, stories: u32) -> Figures {
    let kind = &image.kind;
    let mut runner = runner(1, image.kind.size);
    let mut figures = Figures::default();
    for number in 0..=stories {
        let ops = match number {
            0 => fill(kind),
            _ => story(kind, image, &mut runner),
        };
        let journal = Journal::new();
        let name = format!("{}, story {number}: {ops:?}", kind.name);
        figures += play(&name, image, &ops, &journal).survive(image, Effort::usual(seed()));
    }
    figures
}

#[test]
fn a_power_cut_at_random_leaks_at_worst() {
    let mut figures = Figures::default();
    for name in [
        "cluster 512",
        "refcount 1",
        "refcount 4",
        "refcount 64",
        "version 2 snapshot",
        "compressed",
        "lazy",
        "subclusters snapshot",
        "data file",
        "raw data file",
        "over longer",
        "subclusters over raw",
        "aes snapshot",
        "aes over raw",
    ] {
        figures += survives(&images::named(name).make(), soak() + soak() / 2);
    }
    figures::tell_cuts(&figures);
}

/// Each look at it derives a key: one story is enough of what is numbered by the place in the file.
#[test]
fn a_power_cut_of_an_image_in_luks_leaks_at_worst() {
    let kind = images::named("luks snapshot");
    let image = kind.make();
    let mut ops = story(&kind, &image, &mut runner(1, kind.size));
    ops.truncate(12 * soak() as usize);
    ops.push(Op::Flush);
    let journal = Journal::new();
    let tale = play("luks", &image, &ops, &journal);
    figures::tell_cuts(&tale.survive(&image, Effort::usual(seed())));
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
    let tale = play("refcount table", &image, &ops, &journal);
    let end = journal.prefix(journal.len());
    assert_ne!(table(&end), table(&image.files), "the table has moved");
    figures::tell_cuts(&tale.survive(&image, Effort::usual(seed()).times(3)));
    image.assert_good(&end, &tale.now().disk);
}

#[test]
fn a_power_cut_at_random_during_one_operation_leaks_at_worst() {
    let one = |op: Op| vec![op];
    let tales = [
        one(Op::Resize { size: 100 << 10 }),
        one(Op::Resize { size: 64 << 10 }),
        one(Op::Resize { size: 4 << 20 }),
        one(Op::Clear),
        one(Op::Snapshot { number: 1 }),
        // Places that are kept: what is in them must not show before the data is there.
        vec![
            Op::Write {
                at: 0,
                len: 66_000,
                fill: 4,
            },
            Op::Zero {
                at: 0,
                len: 65_536,
                how: ZeroHow::KeepAllocated,
            },
            Op::Flush,
            Op::Write {
                at: 0,
                len: 65_536,
                fill: 7,
            },
            Op::Flush,
        ],
        vec![
            Op::Snapshot { number: 1 },
            Op::Write {
                at: 0,
                len: 30_000,
                fill: 9,
            },
            Op::Apply { number: 1 },
            Op::Write {
                at: 5000,
                len: 9000,
                fill: 3,
            },
            Op::Snapshot { number: 2 },
            Op::Delete { number: 1 },
            Op::Write {
                at: 700,
                len: 9000,
                fill: 3,
            },
            Op::Flush,
            Op::Delete { number: 2 },
        ],
    ];
    let mut figures = Figures::default();
    for name in [
        "cluster 512",
        "refcount 64",
        "over raw",
        "lazy",
        "version 2",
        "subclusters snapshot",
        "compressed",
    ] {
        let image = images::named(name).make();
        for ops in &tales {
            let journal = Journal::new();
            let tale = play(&format!("{name}: {ops:?}"), &image, ops, &journal);
            figures += tale.survive(&image, Effort::usual(seed()).times(soak()));
        }
    }
    figures::tell_cuts(&figures);
}

/// Plays a story on storages that fail until an operation does, then demands that what is left of the image is sound.
/// Returns whether an operation has failed.
fn fail(image: &Image, start: &Picture, ops: &[Op], faults: &Arc<Faults>) -> Result<bool, String> {
    let inner = images::memory(&image.files);
    let disks: Disks = inner.iter().map(|disk| faults.wrap(Arc::clone(disk))).collect();
    let mut layer = match images::open(&disks) {
        Ok(layer) => layer,
        Err(error) => {
            assert_ne!(error.kind(), ErrorKind::Corrupt, "{error:?}");
            return Ok(images::bytes(&inner) == image.files);
        }
    };
    let mut model = Model::with_snapshots(start.disk.clone(), start.snapshots.clone());
    let mut tale = Tale::new("failing", &Journal::new(), start.clone());
    for op in ops.iter().filter(|op| image.can(op)) {
        let through = through(image, &model, op);
        let next = model.foresee(op, &image.below, image.unit).expect("foresee");
        let done = match op {
            // Closing tells nobody what it could not write.
            Op::Reopen => layer.flush().and_then(|()| {
                layer = images::open(&disks)?;
                Ok(())
            }),
            _ => model.apply(op, &layer, &image.below, image.unit, &|unit| {
                image.pack(&layer, unit)
            }),
        };
        if let Err(error) = done {
            assert_ne!(error.kind(), ErrorKind::Corrupt, "{op:?}: {error:?}");
            // What a caller does who does not give up at once must do no harm either.
            let _ = layer.write_at(GuestOffset::ZERO, &start.disk[..512], &image.below);
            let _ = layer.flush();
            drop(layer);
            let mut last = through;
            let mut retried = shown(&next);
            retried.disk[..512].copy_from_slice(&start.disk[..512]);
            last.push(retried);
            let files = images::bytes(&inner);
            let tolerance = match effect(op) {
                Effect::Switches => Tolerance::LaggingFlags,
                _ => Tolerance::Leaks,
            };
            let how = (effect(op), tolerance);
            tale.failed(image, &files, how, last, &shown(&next))
                .map_err(|text| format!("{op:?} fails ({error:?}): {text}"))?;
            return Ok(true);
        }
        let after = shown(&model);
        tale.note_through(0, "", effect_of(op, tale.now(), &after), through, after);
    }
    drop(layer);
    let shown = shown(&model);
    tale.failed(
        image,
        &images::bytes(&inner),
        (Effect::Flows, Tolerance::Leaks),
        Vec::new(),
        &shown,
    )?;
    Ok(false)
}

#[test]
fn a_call_that_fails_at_random_corrupts_nothing() {
    for name in [
        "cluster 512",
        "refcount 8",
        "data file",
        "over longer",
        "subclusters over raw",
        "lazy",
        "aes over raw",
    ] {
        let kind = images::named(name);
        let image = kind.make();
        let start = subject::picture(&image.files, &image.below).expect("look");
        let mut runner = runner(1, kind.size);
        let mut runs = 0;
        for number in 0..soak().min(5) {
            let mut ops = story(&kind, &image, &mut runner);
            ops.splice(
                0..0,
                [
                    Op::Snapshot { number: 1 },
                    Op::Write {
                        at: 0,
                        len: 9000,
                        fill: 1,
                    },
                ],
            );
            ops.extend([Op::Apply { number: 1 }, Op::Delete { number: 1 }]);
            let calls = {
                let faults = Faults::new();
                assert_eq!(fail(&image, &start, &ops, &faults), Ok(false), "{name}");
                faults.calls()
            };
            let tries = 20 * u64::from(soak());
            for call in (0..calls).step_by(calls.div_ceil(tries).max(1) as usize) {
                for (failure, lasting) in [
                    (Failure::Io, Lasting::Once),
                    (Failure::NoSpace, Lasting::Once),
                    (Failure::Quota, Lasting::ForGood),
                    (Failure::ShortWrite, Lasting::ForGood),
                ] {
                    runs += 1;
                    let faults = Faults::new();
                    faults.fail_at(call, failure, lasting);
                    let failed = fail(&image, &start, &ops, &faults);
                    let what = || format!("{name}, story {number}, call {call}, {failure:?} {lasting:?}");
                    let failed = failed.unwrap_or_else(|text| panic!("{}: {text}\n{ops:?}", what()));
                    if faults.struck() > 0 && lasting == Lasting::ForGood {
                        assert!(failed, "{}: nobody noticed", what());
                    }
                }
            }
        }
        figures::tell("failing calls", runs);
    }
}

#[test]
fn plain_writes_wait_for_no_flush() {
    let image = images::named("default").make();
    let journal = Journal::new();
    let disks = vec![journal.record(images::memory(&image.files).remove(0))];
    let layer = images::open(&disks).expect("open");
    for cluster in 0..image.start.len() as u64 / image.unit {
        let at = GuestOffset::new(cluster * image.unit);
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
