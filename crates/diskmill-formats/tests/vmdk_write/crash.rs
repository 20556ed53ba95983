//! Power cuts: whatever of the writes that were not flushed is lost or torn, nothing is corrupt and no data that was
//! flushed is gone. And calls that fail.

use std::sync::Arc;

use diskmill_core::{CheckReport, GuestOffset, Repair, Result};
use diskmill_testkit::crash::{self, Effect, Effort, Figures, Picture, Subject, Tale, Tolerance};
use diskmill_testkit::fault::{Failure, Faults, Journal, Lasting};
use diskmill_testkit::model::{self, Model, Op};
use diskmill_testkit::random::{seed, soak};

use super::images::{self, G, Image};
use super::model::ops;

impl Subject for Image {
    fn look(&self, files: &[Vec<u8>]) -> Result<Picture> {
        Ok(Picture::of(self.read(files)?))
    }

    fn check(&self, files: &[Vec<u8>]) -> Result<CheckReport> {
        images::check(files)
    }

    fn repair(&self, files: &[Vec<u8>]) -> Result<Vec<Vec<u8>>> {
        let disks = images::memory(files);
        images::repair(&disks, Repair::All)?;
        Ok(images::all_bytes(&disks))
    }

    fn overwrite(&self, files: &[Vec<u8>]) -> Result<Vec<Vec<u8>>> {
        let disks = images::memory(files);
        let layer = images::open(&disks)?;
        let bytes: Vec<u8> = (0..layer.virtual_size())
            .map(|at| model::pattern(0x5b, at))
            .collect();
        layer.write_at(GuestOffset::ZERO, &bytes, &self.below)?;
        layer.flush()?;
        drop(layer);
        Ok(images::all_bytes(&disks))
    }

    fn second_opinion(&self, files: &[Vec<u8>], _tolerance: Tolerance) -> Result<(), String> {
        self.qemu_checks(files)
    }
}

fn effect(op: &Op, same: bool) -> Effect {
    match op {
        Op::Flush | Op::Reopen | Op::Clear => Effect::Settles,
        Op::Resize { .. } if !same => Effect::Settles,
        _ => Effect::Flows,
    }
}

/// Plays a story.
pub fn play(name: String, image: &Image, ops: &[Op], journal: &Arc<Journal>) -> Tale {
    let disks: Vec<_> = images::memory(&image.files)
        .into_iter()
        .map(|disk| journal.record(disk))
        .collect();
    let mut layer = images::open(&disks).expect("open");
    let mut model = Model::new(image.start.clone());
    let mut tale = Tale::new(name, journal, Picture::of(image.start.clone()));
    for op in ops {
        let mark = tale.mark();
        let through = crash::given_up(op, model.bytes(), &image.below);
        if *op == Op::Reopen {
            layer.flush().expect("flush");
            drop(layer);
            layer = images::open(&disks).expect("open again");
        }
        model
            .apply(op, &layer, &image.below, G, &|_| None)
            .unwrap_or_else(|error| panic!("{op:?}: {error:?}"));
        let after = Picture::of(model.bytes().to_vec());
        let effect = match op {
            // An image that cannot be emptied is left as it is.
            Op::Clear if tale.mark() == mark => Effect::Flows,
            _ => effect(op, tale.now().disk.len() == after.disk.len()),
        };
        tale.note_through(mark, format!("{op:?}"), effect, through, after);
    }
    tale
}

#[test]
fn a_power_cut_at_random_leaks_at_worst() {
    let mut figures = Figures::default();
    for kind in &images::KINDS {
        let image = kind.make();
        for story in 0..u64::from(soak()) {
            let ops = ops(kind, 100 + story, 14);
            let journal = Journal::new();
            let name = format!("{}, story {story}: {ops:?}", kind.name);
            figures += play(name, &image, &ops, &journal).survive(&image, Effort::usual(seed()));
        }
    }
    assert!(
        figures.leaking > 0 && figures.repaired > 0 && figures.judged > 0,
        "{figures:?}"
    );
}

#[test]
fn a_power_cut_while_a_disk_grows_leaks_at_worst() {
    for name in ["sparse", "over longer", "split"] {
        let image = images::named(name).make();
        let journal = Journal::new();
        let ops = [Op::Resize { size: 33 << 20 }, Op::Resize { size: 3 * G + 512 }];
        let tale = play(format!("{name} grows"), &image, &ops, &journal);
        let mut effort = Effort::usual(seed());
        effort.overwrite_every = u64::MAX;
        effort.judge_every = 7;
        tale.survive(&image, effort);
    }
}

#[test]
fn a_call_that_fails_corrupts_nothing() {
    for name in ["sparse", "marked", "over longer", "mixed", "cowd"] {
        let kind = images::named(name);
        let image = kind.make();
        let mut ops = ops(&kind, 7, 10);
        ops.retain(|op| *op != Op::Reopen);
        let attempt = |faults: &Arc<Faults>| {
            let inner = images::memory(&image.files);
            let disks: Vec<_> = inner.iter().map(|disk| faults.wrap(Arc::clone(disk))).collect();
            let mut failed = None;
            match images::open(&disks) {
                Err(error) => failed = Some(error),
                Ok(layer) => {
                    let mut model = Model::new(image.start.clone());
                    for op in &ops {
                        if let Err(error) = model.apply(op, &layer, &image.below, G, &|_| None) {
                            failed = Some(error);
                            break;
                        }
                    }
                    let last = layer
                        .write_at(GuestOffset::ZERO, &[1; 512], &image.below)
                        .and_then(|()| layer.flush());
                    failed = failed.or(last.err());
                }
            }
            (images::all_bytes(&inner), failed)
        };
        let calls = {
            let faults = Faults::new();
            let failed = attempt(&faults).1;
            assert!(failed.is_none(), "{failed:?}");
            faults.calls()
        };
        for number in (0..calls).step_by(calls.div_ceil(20).max(1) as usize) {
            for (failure, lasting) in [
                (Failure::Io, Lasting::Once),
                (Failure::ShortWrite, Lasting::ForGood),
            ] {
                let faults = Faults::new();
                faults.fail_at(number, failure, lasting);
                let (files, failed) = attempt(&faults);
                if faults.struck() > 0 && lasting == Lasting::ForGood {
                    assert!(failed.is_some(), "{name}, call {number}: nobody noticed");
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
