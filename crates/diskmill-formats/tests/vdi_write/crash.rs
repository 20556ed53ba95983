//! Power cuts: whatever of the writes that were not flushed is lost or torn, nothing is corrupt and no data that was
//! flushed is gone. And calls that fail.

use std::sync::Arc;

use diskmill_core::{CheckReport, CompactSpec, Driver, GuestOffset, Job, Repair, Result, Role, Storage};
use diskmill_formats::vdi;
use diskmill_testkit::crash::{Effect, Effort, Figures, Picture, Subject, Tale, Tolerance};
use diskmill_testkit::fault::{Change, Journal};
use diskmill_testkit::model::Op;
use diskmill_testkit::random::{seed, soak};

use super::images::{self, Image, M};
use super::model::ops;

impl Subject for Image {
    fn look(&self, files: &[Vec<u8>]) -> Result<Picture> {
        Ok(Picture::of(self.read(&files[0])?))
    }

    fn check(&self, files: &[Vec<u8>]) -> Result<CheckReport> {
        images::check(&files[0])
    }

    fn repair(&self, files: &[Vec<u8>]) -> Result<Vec<Vec<u8>>> {
        let disk = images::memory(&files[0]);
        images::repair(&disk, Repair::All)?;
        Ok(vec![images::bytes(&disk)])
    }

    fn overwrite(&self, files: &[Vec<u8>]) -> Result<Vec<Vec<u8>>> {
        Ok(vec![self.stage().overwrite(&files[0])?])
    }

    fn second_opinion(&self, files: &[Vec<u8>], _tolerance: Tolerance) -> Result<(), String> {
        match self.qemu_checks(&files[0]) {
            (_, 0) => Ok(()),
            (report, code) => Err(format!("code {code}: {report}")),
        }
    }
}

/// Plays a story.
fn play(name: String, image: &Image, ops: &[Op], journal: &Arc<Journal>) -> Tale {
    image.stage().play(name, ops, journal)
}

#[test]
fn a_power_cut_at_random_leaks_at_worst() {
    let mut figures = Figures::default();
    for kind in &images::KINDS {
        let image = kind.make();
        for story in 0..u64::from(soak()) {
            let ops = ops(kind, 100 + story, 12);
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

/// The map fills its sector with 128 entries; for one more the first block must give way.
const MOVES: Op = Op::Resize { size: 129 * M };

#[test]
fn a_power_cut_while_the_map_moves_leaks_at_worst() {
    let mut image = images::named("empty").make();
    let disk = images::memory(&image.file);
    let layer = images::open(&disk).expect("open");
    layer
        .write_at(GuestOffset::ZERO, &[5; 3 << 19], &image.below)
        .expect("write");
    layer.flush().expect("flush");
    drop(layer);
    image.file = images::bytes(&disk);
    image.start[..3 << 19].fill(5);
    let journal = Journal::new();
    let tale = play("a disk grows".to_owned(), &image, &[MOVES], &journal);
    let mut effort = Effort::usual(seed());
    effort.bounds.prefixes = 2 * soak() as usize;
    effort.bounds.singles = soak() as usize;
    effort.bounds.random = soak() as usize;
    effort.overwrite_every = u64::MAX;
    effort.repair_every = 5;
    effort.judge_every = u64::MAX;
    tale.survive(&image, effort);
}

/// All slots are taken, so that what gives way lies behind the last one there may be.
#[test]
fn a_power_cut_while_the_map_of_a_full_image_moves_leaks_at_worst() {
    let mut kind = images::named("fixed");
    kind.size = 128 * M;
    let image = kind.make();
    let journal = Journal::new();
    let disk = journal.record(images::memory(&image.file));
    let layer = images::open(&disk).expect("open");
    layer.resize(129 * M, &image.below).expect("resize");
    drop(layer);
    let changes = journal.changes();
    let flushes = (0..changes.len()).filter(|at| matches!(changes[*at], Change::Flush { .. }));
    let mut moved = false;
    for count in flushes {
        let file = journal.prefix(count).remove(0);
        let report = images::check(&file).expect("check");
        assert_eq!(report.corruptions, 0, "cut {count}: {:#?}", report.findings);
        moved |= images::entries(&file).contains(&128);
        let layer = images::read_only(&file).expect("open");
        let mut found = vec![0; 3 << 20];
        layer.read_at(GuestOffset::ZERO, &mut found).expect("read");
        assert!(found == image.start[..3 << 20], "cut {count}");
    }
    assert!(moved, "a block was out of the way");
}

#[test]
fn a_power_cut_while_compacting_leaks_at_worst() {
    for kind in &images::KINDS {
        let image = kind.make();
        let ops = [
            Op::Write {
                at: 0,
                len: kind.size,
                fill: 9,
            },
            Op::Zero {
                at: M,
                len: M,
                how: diskmill_core::ZeroHow::MayUnmap,
            },
            Op::Flush,
        ];
        let before = Journal::new();
        let start = play(String::new(), &image, &ops, &before).now().clone();
        let file = before.prefix(before.len()).remove(0);
        let journal = Journal::new();
        let disk = journal.record(images::memory(&file));
        let mut tale = Tale::new(format!("{} shrinks", kind.name), &journal, start.clone());
        let parsed = vdi::DRIVER
            .parse(Arc::clone(&disk) as Arc<dyn Storage>, &images::how())
            .expect("parse");
        let spec = CompactSpec::default();
        let files = vec![(Role::Main, Arc::clone(&disk))];
        let report = parsed
            .compact(files, &images::how(), &spec, Job::silent())
            .expect("compact");
        assert!(report.zeros + report.punched > 0, "{report:?}");
        tale.note(0, "compacting", Effect::Flows, start);
        tale.survive(&image, Effort::usual(seed()).times(2));
    }
}

#[test]
fn a_power_cut_while_repairing_can_be_repaired() {
    let image = images::named("dynamic").make();
    let mut file = image.file.clone();
    let entries = images::entries(&file);
    let slots: Vec<usize> = (0..5).filter(|block| entries[*block] < 5).collect();
    // Two blocks in one slot, one nowhere, and a number that is too low.
    let put = |file: &mut Vec<u8>, block: usize, slot: u32| {
        let at = images::entry_at(file, block);
        file[at..at + 4].copy_from_slice(&slot.to_le_bytes());
    };
    put(&mut file, slots[1], entries[slots[0]]);
    put(&mut file, 1, 77);
    file[388..392].fill(0);
    let expected = {
        let mut bytes = file.clone();
        put(&mut bytes, 1, u32::MAX);
        image.read(&bytes).expect("read")
    };
    let journal = Journal::new();
    let disk = journal.record(images::memory(&file));
    images::repair(&disk, Repair::All).expect("repair");
    for count in 0..=journal.len() {
        for seed in 0..4 {
            let left = images::memory(&journal.crash(count, seed)[0]);
            images::repair(&left, Repair::All).expect("repair again");
            let bytes = images::bytes(&left);
            assert!(
                image.read(&bytes).expect("read") == expected,
                "cut {count}, seed {seed}"
            );
            image.assert_good(&bytes, &expected);
        }
    }
}

#[test]
fn a_call_that_fails_corrupts_nothing() {
    for name in ["dynamic", "fixed", "over longer"] {
        let kind = images::named(name);
        let image = kind.make();
        let mut ops = ops(&kind, 7, 8);
        if name == "dynamic" {
            ops.push(MOVES);
        }
        ops.push(Op::Resize { size: M + 512 });
        ops.retain(|op| *op != Op::Reopen);
        image.stage().fail(name, &ops);
    }
}
