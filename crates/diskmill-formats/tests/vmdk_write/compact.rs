//! Making the files smaller.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use diskmill_core::{ErrorKind, GuestOffset, Job, Silent, ZeroHow};
use diskmill_testkit::crash::{Effect, Effort, Picture, Tale};
use diskmill_testkit::fault::{Change, Failure, Faults, Journal, Lasting};
use diskmill_testkit::model::Op;
use diskmill_testkit::random::seed;
use diskmill_testkit::vmware;

use super::crash::play;
use super::damage::{GD, RGD, put, table, word};
use super::images::{self, Disk, G, Image, KINDS, Kind};

/// An image of `kind` in which every grain is stored, some of them zeros.
fn full(kind: &Kind) -> Image {
    let mut image = kind.make();
    let zero = |grain: u64, count: u64| Op::Zero {
        at: grain * G,
        len: count * G,
        how: ZeroHow::KeepAllocated,
    };
    let write = Op::Write {
        at: 0,
        len: kind.size,
        fill: 9,
    };
    let ops = [write, zero(1, 2), zero(4, 1), zero(6, 1), Op::Flush];
    let journal = Journal::new();
    let tale = play(String::new(), &image, &ops, &journal);
    image.start = tale.now().disk.clone();
    image.files = journal.prefix(journal.len());
    image
}

#[test]
fn compacting_keeps_what_the_disk_reads_as() {
    for kind in &KINDS {
        let image = full(kind);
        let disks = images::memory(&image.files);
        let (plan, done) = images::compact(&disks).expect("compact");
        assert_eq!(plan, done, "{}", kind.name);
        let files = images::all_bytes(&disks);
        image.assert_good(&files, &image.start);
        assert!(image.read(&files).expect("read") == image.start, "{}", kind.name);
        let covered = kind.parent.is_some() && !kind.options.contains("zeroed_grain=on");
        assert_eq!(done.saved() > 0, !covered, "{}: {done:?}", kind.name);
        let flat = ["flat", "mixed"].contains(&kind.name);
        assert_eq!(done.punched > 0, flat, "{}: {done:?}", kind.name);
        let len = |files: &[Vec<u8>]| files.iter().map(|file| file.len() as u64).sum::<u64>();
        assert_eq!(
            (done.len_before, done.len_after),
            (len(&image.files), len(&files)),
            "{}",
            kind.name
        );
        let id = images::read_only(&image.files).expect("open").content_id();
        assert_eq!(images::read_only(&files).expect("open").content_id(), id);
        let (plan, again) = images::compact(&disks).expect("compact again");
        assert_eq!(plan, again);
        assert_eq!((again.saved(), again.moved, again.leaked), (0, 0, 0), "{again:?}");
        assert!(images::all_bytes(&disks) == files, "{}", kind.name);
    }
}

#[test]
fn compacting_a_sparse_image_leaves_nothing_between_its_grains() {
    for name in ["sparse", "marked", "over shorter"] {
        let image = full(&images::named(name));
        let disks = images::memory(&image.files);
        let (_, done) = images::compact(&disks).expect("compact");
        assert_eq!(done.zeros, 4 * G, "{name}");
        assert_eq!(done.len_before - done.len_after, 4 * G, "{name}");
        assert!(
            (1..=4 * G).contains(&done.moved),
            "{name}: the last ones fill the gaps"
        );
        let files = images::all_bytes(&disks);
        let stored = images::check(&files).expect("check").allocated_units;
        let first = u64::from(word(&files[0], 64)) * 512;
        assert_eq!(files[0].len() as u64, first + stored * G, "{name}");
    }
}

#[test]
fn compacting_gives_back_what_nothing_names_and_renews_copies() {
    let mut image = full(&images::named("sparse"));
    let file = &mut image.files[0];
    for field in [RGD, GD] {
        let at = table(file, field);
        put(file, at + 5 * 4, 0);
    }
    let copy = table(file, RGD);
    put(file, copy + 4 * 4, 0);
    file.resize(file.len() + 2 * G as usize, 0xee);
    image.start[5 * G as usize..6 * G as usize].fill(0);
    let disks = images::memory(&image.files);
    let (plan, done) = images::compact(&disks).expect("compact");
    assert_eq!(plan, done);
    assert_eq!((done.leaked, done.zeros), (3 * G, 4 * G));
    assert_eq!(done.saved(), 7 * G);
    image.assert_good(&images::all_bytes(&disks), &image.start);
}

/// Nothing says that a descriptor must be in front of the grains.
#[test]
fn compacting_spares_a_descriptor_among_the_grains() {
    let mut image = full(&images::named("sparse"));
    let file = &mut image.files[0];
    let (from, len) = (word(file, 28) as usize * 512, word(file, 36) as usize * 512);
    let at = table(file, GD);
    let freed = word(file, at + 5 * 4);
    for field in [RGD, GD] {
        let at = table(file, field);
        put(file, at + 5 * 4, 0);
    }
    file.copy_within(from..from + len, freed as usize * 512);
    put(file, 28, freed);
    image.start[5 * G as usize..6 * G as usize].fill(0);
    let disks = images::memory(&image.files);
    let (plan, done) = images::compact(&disks).expect("compact");
    assert_eq!(plan, done);
    assert_eq!((done.leaked, done.zeros), (0, 4 * G));
    image.assert_good(&images::all_bytes(&disks), &image.start);
}

#[test]
fn compacting_leaves_extents_alone_that_may_only_be_read() {
    let mut image = full(&images::named("mixed"));
    let text = String::from_utf8(image.files[0].clone()).unwrap();
    assert!(text.contains("RW 640 SPARSE"), "{text}");
    image.files[0] = text.replace("RW 640 SPARSE", "RDONLY 640 SPARSE").into_bytes();
    let disks = images::memory(&image.files);
    images::compact(&disks).expect("compact");
    let files = images::all_bytes(&disks);
    assert!(files[1] == image.files[1]);
    assert!(image.read(&files).expect("read") == image.start);
}

#[test]
fn compacting_refuses_by_name_and_changes_nothing() {
    let disk = Disk { size: 3 * G, salt: 1 };
    let stream = images::make(3 * G, "subformat=streamOptimized", "x.vmdk", None, &disk);
    let lines = ["RW 384 SESPARSE \"x-sesparse.vmdk\"".to_owned()];
    let se = vec![
        vmware::descriptor("seSparse", &lines),
        vmware::se_sparse(&disk.bytes()),
    ];
    let mut broken = full(&images::named("sparse")).files;
    for field in [RGD, GD] {
        let at = table(&broken[0], field);
        put(&mut broken[0], at, 0x00ff_ff00);
    }
    for (files, kind, word) in [
        (stream, ErrorKind::Unsupported, "streamOptimized"),
        (se, ErrorKind::Unsupported, "seSparse"),
        (broken, ErrorKind::Corrupt, "check --repair all"),
    ] {
        let disks = images::memory(&files);
        for error in [
            images::plan_compact(&disks).expect_err(word),
            images::only_compact(&disks, Job::silent()).expect_err(word),
        ] {
            assert_eq!(error.kind(), kind, "{error:?}");
            assert!(
                format!("{error:?}").contains(word) || error.to_string().contains(word),
                "{error:?}"
            );
        }
        assert!(images::all_bytes(&disks) == files, "{word}");
    }
}

#[test]
fn compacting_stops_when_it_is_told_to() {
    let image = full(&images::named("sparse"));
    let disks = images::memory(&image.files);
    let cancel = AtomicBool::new(true);
    let job = Job {
        observer: &Silent,
        cancel: &cancel,
    };
    let error = images::only_compact(&disks, job).expect_err("cancelled");
    assert_eq!(error.kind(), ErrorKind::Cancelled);
    assert!(images::all_bytes(&disks) == image.files);
}

#[test]
fn a_power_cut_while_compacting_leaks_at_worst() {
    for kind in &KINDS {
        let image = full(kind);
        let journal = Journal::new();
        let disks: Vec<_> = images::memory(&image.files)
            .into_iter()
            .map(|disk| journal.record(disk))
            .collect();
        let start = Picture::of(image.start.clone());
        let mut tale = Tale::new(format!("{} shrinks", kind.name), &journal, start.clone());
        images::only_compact(&disks, Job::silent()).expect("compact");
        tale.note(0, "compacting", Effect::Flows, start);
        tale.survive(&image, Effort::usual(seed()).times(2));
    }
}

/// More than is moved between two flushes.
#[test]
fn a_power_cut_between_batches_of_compacting_leaks_at_worst() {
    let size = 40 << 20;
    let mut image = images::named("sparse").make();
    let disk = Disk { size: G, salt: 3 };
    image.files = images::make(size, "", "x.vmdk", None, &disk);
    let disks = images::memory(&image.files);
    let layer = images::open(&disks).expect("open");
    let half = size as usize / 2;
    for (at, byte) in [(0, 0), (half, 7)] {
        layer
            .write_at(GuestOffset::new(at as u64), &vec![byte; half], &image.below)
            .expect("write");
    }
    layer.flush().expect("flush");
    drop(layer);
    image.files = images::all_bytes(&disks);
    image.start = image.read(&image.files).expect("read");
    let journal = Journal::new();
    let disks = vec![journal.record(Arc::clone(&images::memory(&image.files)[0]))];
    let done = images::only_compact(&disks, Job::silent()).expect("compact");
    assert!(done.moved > 16 << 20, "{done:?}");
    let changes = journal.changes();
    let flushes: Vec<_> = (0..changes.len())
        .filter(|at| matches!(changes[*at], Change::Flush { .. }))
        .collect();
    assert!(flushes.len() > 6, "{}", flushes.len());
    for count in flushes {
        let files = journal.prefix(count);
        let report = images::check(&files).expect("check");
        assert_eq!(report.corruptions, 0, "cut {count}: {:#?}", report.findings);
        assert!(image.read(&files).expect("read") == image.start, "cut {count}");
    }
}

#[test]
fn a_call_that_fails_while_compacting_corrupts_nothing() {
    for name in ["sparse", "marked", "split", "mixed", "cowd"] {
        let image = full(&images::named(name));
        let attempt = |faults: &Arc<Faults>| {
            let inner = images::memory(&image.files);
            let disks: Vec<_> = inner.iter().map(|disk| faults.wrap(Arc::clone(disk))).collect();
            let failed = images::only_compact(&disks, Job::silent()).err();
            (inner, failed)
        };
        let faults = Faults::new();
        assert!(attempt(&faults).1.is_none());
        let calls = faults.calls();
        for number in (0..calls).step_by(calls.div_ceil(40).max(1) as usize) {
            for (failure, lasting) in [
                (Failure::Io, Lasting::Once),
                (Failure::ShortWrite, Lasting::ForGood),
            ] {
                let faults = Faults::new();
                faults.fail_at(number, failure, lasting);
                let (inner, failed) = attempt(&faults);
                let which = format!("{name}, call {number}, {failure:?} {lasting:?}");
                assert_eq!(failed.is_some(), faults.struck() > 0, "{which}: {failed:?}");
                let files = images::all_bytes(&inner);
                let report = images::check(&files).expect("check");
                assert_eq!(
                    (report.check_errors, report.corruptions),
                    (0, 0),
                    "{which}: {:#?}",
                    report.findings
                );
                assert!(image.read(&files).expect("read") == image.start, "{which}");
                images::only_compact(&inner, Job::silent()).expect("compact again");
                image_is_whole(&image, &images::all_bytes(&inner), &which);
            }
        }
    }
}

fn image_is_whole(image: &Image, files: &[Vec<u8>], which: &str) {
    let report = images::check(files).expect("check");
    assert_eq!((report.corruptions, report.leaks), (0, 0), "{which}: {report:?}");
    assert!(image.read(files).expect("read") == image.start, "{which}");
}
