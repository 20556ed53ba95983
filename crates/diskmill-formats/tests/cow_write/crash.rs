//! Power cuts: whatever of the writes that were not flushed is lost or torn, nothing is corrupt and no data that was
//! flushed is gone. And calls that fail.

use diskmill_core::{BackingName, CheckReport, ErrorKind, Repair, Result};
use diskmill_formats::cow;
use diskmill_formats::cow::header::Header;
use diskmill_testkit::crash::{Effect, Effort, Figures, Picture, Subject, Tale, Tolerance};
use diskmill_testkit::fault::Journal;
use diskmill_testkit::model::{self, Op};
use diskmill_testkit::random::{seed, soak};

use super::images::{self, Image, K, KINDS, STEP};
use super::support::disk;

impl Subject for Image {
    fn look(&self, files: &[Vec<u8>]) -> Result<Picture> {
        Ok(Picture::of(disk::read(&cow::DRIVER, &files[0], &self.below)?))
    }

    fn check(&self, files: &[Vec<u8>]) -> Result<CheckReport> {
        disk::check(&cow::DRIVER, &files[0])
    }

    fn repair(&self, files: &[Vec<u8>]) -> Result<Vec<Vec<u8>>> {
        let disk = disk::memory(&files[0]);
        disk::repair(&cow::DRIVER, &disk, Repair::All)?;
        Ok(vec![disk::bytes(&disk)])
    }

    fn overwrite(&self, files: &[Vec<u8>]) -> Result<Vec<Vec<u8>>> {
        Ok(vec![self.stage().overwrite(&files[0])?])
    }

    /// No other program that reads these is left; a reader that was written for this test stands in for one.
    fn second_opinion(&self, files: &[Vec<u8>], _tolerance: Tolerance) -> Result<(), String> {
        let ours = disk::read(&cow::DRIVER, &files[0], &self.below).map_err(|error| format!("{error:?}"))?;
        match images::plain_read(&files[0], &self.below_bytes) == ours {
            true => Ok(()),
            false => Err("it reads something else".to_owned()),
        }
    }
}

#[test]
fn a_power_cut_at_random_leaks_at_worst() {
    let mut figures = Figures::default();
    for kind in &KINDS {
        let image = kind.make();
        for story in 0..2 * u64::from(soak()) {
            let ops = model::random::ops(kind.size, STEP, 100 + story, 16);
            let journal = Journal::new();
            let name = format!("{}, story {story}: {ops:?}", kind.name);
            let tale = image.stage().play(name, &ops, &journal);
            let mut effort = Effort::usual(seed());
            effort.judge_every = 5;
            figures += tale.survive(&image, effort);
        }
    }
    assert!(figures.repaired > 0 && figures.judged > 0, "{figures:?}");
}

/// Grown, written, shrunk and grown again over what was there before.
#[test]
fn a_power_cut_while_the_size_changes_leaks_at_worst() {
    let mut figures = Figures::default();
    for kind in &KINDS {
        let image = kind.make();
        let end = |size: u64| Op::Write {
            at: size - 40 * K,
            len: 40 * K,
            fill: 3,
        };
        let ops = [
            Op::Resize { size: 400 * K },
            end(400 * K),
            Op::Resize { size: 90 * K + 512 },
            end(90 * K),
            Op::Resize { size: 500 * K },
            Op::Flush,
        ];
        let journal = Journal::new();
        let tale = image.stage().play(kind.name.to_owned(), &ops, &journal);
        let mut effort = Effort::usual(seed());
        effort.repair_every = 3;
        figures += tale.survive(&image, effort);
    }
    assert!(figures.leaking > 0, "{figures:?}");
}

#[test]
fn a_call_that_fails_corrupts_nothing() {
    for name in ["alone", "small", "old over longer"] {
        let kind = images::named(name);
        let mut ops = model::random::ops(kind.size, STEP, 7, 10);
        ops.push(Op::Resize {
            size: kind.size / 4 * 3 / 512 * 512 + 512,
        });
        ops.push(Op::Resize { size: kind.size });
        ops.retain(|op| *op != Op::Reopen);
        kind.make().stage().fail(name, &ops);
    }
}

fn backing(len: usize, letter: char) -> Option<BackingName> {
    let name = letter.to_string().repeat(len);
    (len > 0).then_some(BackingName { name, format: None })
}

fn header(file: &[u8]) -> Header {
    Header::parse(&file[..1056], file.len() as u64).expect("a header")
}

/// Names that fit into the first sector of the file and names that do not.
#[test]
fn a_name_is_the_old_or_the_new_one_at_every_moment() {
    for kind in ["empty", "old"] {
        let image = images::named(kind).make();
        for (old, new) in [
            (0, 8),
            (8, 0),
            (8, 503),
            (503, 504),
            (9, 1023),
            (1023, 9),
            (1023, 0),
            (600, 503),
        ] {
            let disk = disk::memory(&image.file);
            let layer = disk::open(&cow::DRIVER, &disk).expect("open");
            layer
                .set_backing(backing(old, 'a').as_ref())
                .expect("the old name");
            drop(layer);
            let mut file = disk::bytes(&disk);
            file[1032..1036].fill(0x55);
            let names = [backing(old, 'a'), backing(new, 'b')]
                .map(|backing| backing.map(|backing| backing.name.into_bytes()));
            let journal = Journal::new();
            let disk = journal.record(disk::memory(&file));
            let layer = disk::open(&cow::DRIVER, &disk).expect("open");
            layer
                .set_backing(backing(new, 'b').as_ref())
                .expect("the new name");
            drop(layer);
            let mut seen = [0, 0];
            for count in 0..=journal.len() {
                for seed in 0..6 {
                    let found = header(&journal.crash(count, seed)[0]);
                    assert_eq!(found.size, image.kind.size);
                    let which = names.iter().position(|name| *name == found.backing);
                    seen[which.unwrap_or_else(|| panic!("{old} to {new}, cut {count}: {found:?}"))] += 1;
                }
            }
            assert!(seen[0] > 0 && seen[1] > 0, "{old} to {new}");
            let done = header(&journal.prefix(journal.len())[0]);
            assert_eq!((done.backing.as_ref(), done.mtime), (names[1].as_ref(), 0));
            assert!(
                journal.crash(journal.len(), 1)[0] == disk::bytes(&disk),
                "it is durable"
            );
        }
    }
}

#[test]
fn names_that_do_not_fit_are_refused_and_change_nothing() {
    let image = images::named("alone").make();
    let disk = disk::memory(&image.file);
    let layer = disk::open(&cow::DRIVER, &disk).expect("open");
    layer
        .set_backing(backing(700, 'a').as_ref())
        .expect("a long name");
    let before = disk::bytes(&disk);
    // The first sector and those behind it both differ.
    let error = layer.set_backing(backing(700, 'b').as_ref()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(format!("{error:?}").contains("more than 503 bytes"), "{error:?}");
    for name in [&"c".repeat(1024), "", "nbd:localhost:10809", "json:{}", "a\0b"] {
        let name = BackingName {
            name: name.to_owned(),
            format: None,
        };
        let error = layer.set_backing(Some(&name)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Usage, "{error:?}");
    }
    assert!(disk::bytes(&disk) == before);
    // It can go by way of a short one.
    layer.set_backing(backing(7, 'b').as_ref()).expect("a short name");
    layer
        .set_backing(backing(700, 'b').as_ref())
        .expect("a long name");
    drop(layer);
    let found = header(&disk::bytes(&disk)).backing;
    assert_eq!(found.map(|name| name.len()), Some(700));
}

#[test]
fn a_power_cut_while_repairing_can_be_repaired() {
    let image = images::named("small").make();
    let (file, expected) = super::damage::spoilt(&image);
    let journal = Journal::new();
    let disk = journal.record(disk::memory(&file));
    disk::repair(&cow::DRIVER, &disk, Repair::All).expect("repair");
    let mut tale = Tale::new("a repair", &journal, Picture::of(expected.clone()));
    tale.note(0, "repair", Effect::Switches, Picture::of(expected));
    tale.tolerate(Tolerance::Damage);
    tale.survive(&image, Effort::usual(seed()));
}
