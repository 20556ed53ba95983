//! Power cuts: whatever of the writes that were not flushed is lost or torn, nothing is corrupt and no data that was
//! flushed is gone. And calls that fail.

use diskmill_core::{BackingName, CheckReport, Repair, Result};
use diskmill_formats::qcow;
use diskmill_testkit::crash::{Effect, Effort, Figures, Picture, Subject, Tale, Tolerance};
use diskmill_testkit::fault::Journal;
use diskmill_testkit::model::Op;
use diskmill_testkit::random::{seed, soak};

use super::images::{self, BASE, Image, K, KINDS};
use super::model::ops;
use super::support::disk;

impl Subject for Image {
    fn look(&self, files: &[Vec<u8>]) -> Result<Picture> {
        let mut picture = Picture::of(disk::read(&qcow::DRIVER, &files[0], &self.below)?);
        let layer = disk::read_only(&qcow::DRIVER, &files[0])?;
        if let Some(backing) = layer
            .facts()
            .backing
            .as_ref()
            .filter(|backing| backing.name != BASE)
        {
            picture.traits.insert("backing".to_owned(), backing.name.clone());
        }
        Ok(picture)
    }

    fn check(&self, files: &[Vec<u8>]) -> Result<CheckReport> {
        disk::check(&qcow::DRIVER, &files[0])
    }

    fn repair(&self, files: &[Vec<u8>]) -> Result<Vec<Vec<u8>>> {
        let disk = disk::memory(&files[0]);
        disk::repair(&qcow::DRIVER, &disk, Repair::All)?;
        Ok(vec![disk::bytes(&disk)])
    }

    fn overwrite(&self, files: &[Vec<u8>]) -> Result<Vec<Vec<u8>>> {
        Ok(vec![self.stage().overwrite(&files[0])?])
    }

    /// QEMU has no check of this format; it must read the same.
    fn second_opinion(&self, files: &[Vec<u8>], _tolerance: Tolerance) -> Result<(), String> {
        let ours = disk::read(&qcow::DRIVER, &files[0], &self.below).map_err(|error| format!("{error:?}"))?;
        match self.qemu_reads(&files[0])? == ours {
            true => Ok(()),
            false => Err("it reads something else".to_owned()),
        }
    }
}

fn effort() -> Effort {
    Effort {
        judge_every: 13,
        ..Effort::usual(seed())
    }
}

#[test]
fn a_power_cut_at_random_leaks_at_worst() {
    let mut figures = Figures::default();
    for kind in &KINDS {
        let image = kind.make();
        for story in 0..u64::from(soak()) {
            let ops = ops(kind, 100 + story, 14);
            let journal = Journal::new();
            let name = format!("{}, story {story}: {ops:?}", kind.name);
            let tale = image.stage().play(name, &ops, &journal);
            figures += tale.survive(&image, effort());
        }
    }
    assert!(
        figures.leaking > 0 && figures.repaired > 0 && figures.judged > 0,
        "{figures:?}"
    );
}

/// Grown beyond the room of its L1 table, written, shrunk and grown again over what was there before.
#[test]
fn a_power_cut_while_the_size_changes_leaks_at_worst() {
    for name in ["many tables", "over longer", "packed", "secret over longer"] {
        let image = images::named(name).make();
        let end = |size: u64| Op::Write {
            at: size - 40 * K,
            len: 40 * K,
            fill: 3,
        };
        let ops = [
            Op::Resize { size: 600 * K },
            end(600 * K),
            Op::Resize { size: 90 * K + 512 },
            Op::Resize { size: 400 * K },
            end(400 * K),
            Op::Flush,
        ];
        let journal = Journal::new();
        let tale = image.stage().play(format!("{name} grows"), &ops, &journal);
        tale.survive(&image, effort());
    }
}

#[test]
fn a_power_cut_while_the_backing_name_changes_leaves_one_of_both() {
    let image = images::named("overlay").make();
    let journal = Journal::new();
    let disk = journal.record(disk::memory(&image.file));
    let layer = disk::open(&qcow::DRIVER, &disk).expect("open");
    let start = image.look(std::slice::from_ref(&image.file)).expect("look");
    let mut tale = Tale::new("another name", &journal, start.clone());
    for name in ["a/longer/name.raw", "b"] {
        let mark = tale.mark();
        let backing = BackingName {
            name: name.to_owned(),
            format: None,
        };
        layer.set_backing(Some(&backing)).expect("a name");
        let mut after = start.clone();
        after.traits.insert("backing".to_owned(), name.to_owned());
        tale.note(mark, name, Effect::Switches, after);
    }
    let mut effort = effort();
    // The other names are those of nothing.
    effort.judge_every = u64::MAX;
    tale.survive(&image, effort);
}

#[test]
fn a_call_that_fails_corrupts_nothing() {
    for name in ["packed", "over longer", "many tables", "secret overlay"] {
        let kind = images::named(name);
        let image = kind.make();
        let mut ops = ops(&kind, 7, 9);
        ops.push(Op::Resize { size: 900 * K });
        ops.retain(|op| *op != Op::Reopen);
        image.stage().fail(name, &ops);
    }
}
