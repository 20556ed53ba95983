//! Compacting: what is read stays the same, nothing is left to save, a dry run foretells it, and it can be cut short at
//! any moment.

use std::sync::Arc;

use diskmill_core::{
    CompactReport, CompactSpec, Compression, ErrorKind, GuestOffset, HostOffset, Job, Result, Storage,
    ZeroHow,
};
use diskmill_formats::registry;
use diskmill_testkit::crash::{Effect, Effort, Picture, Tale, Tolerance};
use diskmill_testkit::fault::{Failure, Faults, Journal, Lasting};
use diskmill_testkit::model::pattern;
use diskmill_testkit::oracle;
use diskmill_testkit::random::{seed, soak};
use diskmill_testkit::sparse_random::mix;

use super::images::{self, Disks, Image, KINDS, Kind, ROLES, Setup, how};
use super::subject;

fn spec(compress: bool) -> CompactSpec {
    let mut spec = CompactSpec::default();
    spec.compress = compress.then(Compression::default);
    spec
}

fn compact(disks: &Disks, compress: bool) -> Result<CompactReport> {
    let driver = registry::by_name("qcow2").expect("a driver");
    let parsed = driver.parse(Arc::clone(&disks[0]) as Arc<dyn Storage>, &how())?;
    let files = ROLES.into_iter().zip(disks.iter().cloned()).collect();
    parsed.compact(files, &how(), &spec(compress), Job::silent())
}

fn plan(disks: &Disks, compress: bool) -> Result<CompactReport> {
    let driver = registry::by_name("qcow2").expect("a driver");
    let parsed = driver.parse(Arc::clone(&disks[0]) as Arc<dyn Storage>, &how())?;
    let files = ROLES
        .into_iter()
        .zip(disks.iter().map(|disk| Arc::clone(disk) as Arc<dyn Storage>))
        .collect();
    parsed.plan_compact(files, &how(), &spec(compress), Job::silent())
}

/// An image of a kind with something to save: data of zeros, holes in the file, and data behind them.
fn worn(kind: &Kind) -> Image {
    let mut image = kind.make();
    let disks = images::memory(&image.files);
    let layer = images::open(&disks).expect("open");
    let at = |part: u64| GuestOffset::new(kind.size / 20 * part / 512 * 512);
    let fill = |from: u64, to: u64, fill: u8| {
        let bytes: Vec<u8> = (at(from).get()..at(to).get())
            .map(|at| pattern(fill, at))
            .collect();
        layer.write_at(at(from), &bytes, &image.below).expect("write");
    };
    fill(1, 17, 7);
    layer.flush().expect("flush");
    layer
        .zero(at(2)..at(5), ZeroHow::MayUnmap, &image.below)
        .expect("zero");
    layer
        .zero(at(6)..at(7), ZeroHow::KeepAllocated, &image.below)
        .expect("zero");
    let zeros = vec![0; at(10).since(at(8)) as usize];
    layer.write_at(at(8), &zeros, &image.below).expect("write zeros");
    layer.discard(at(11)..at(13)).expect("discard");
    layer.flush().expect("flush");
    fill(17, 19, 9);
    layer.flush().expect("flush");
    drop(layer);
    image.files = images::bytes(&disks);
    image.start = look(&image, &image.files).disk;
    image
}

fn look(image: &Image, files: &[Vec<u8>]) -> Picture {
    subject::picture(files, &image.below).expect("look")
}

/// Compacts an image and demands all that is promised of it.
fn thorough(image: &Image, compress: bool) {
    let name = format!("{:?}, compress {compress}", image.kind);
    let disks = images::memory(&image.files);
    let foretold = plan(&disks, compress).unwrap_or_else(|error| panic!("{name}: {error:?}"));
    assert!(
        images::bytes(&disks) == image.files,
        "{name}: a dry run changes nothing"
    );
    let report = compact(&disks, compress).unwrap_or_else(|error| panic!("{name}: {error:?}"));
    assert_eq!(foretold, report, "{name}: dry run and run");
    let files = images::bytes(&disks);
    assert_eq!(report.len_before, image.files[0].len() as u64, "{name}");
    assert_eq!(report.len_after, files[0].len() as u64, "{name}");
    image.assert_good(&files, &image.start);
    assert_eq!(look(image, &image.files), look(image, &files), "{name}");
    let again = compact(&disks, compress).unwrap_or_else(|error| panic!("{name}: {error:?}"));
    assert_eq!((again.saved(), again.moved), (0, 0), "{name}: {again:?}");
    // No cluster below the end is free, unless a table of several clusters did not fit.
    let used = images::check(&files)
        .expect("check")
        .image_end_offset
        .map_or(0, HostOffset::get);
    assert!(used <= files[0].len() as u64 + image.unit, "{name}");
}

#[test]
fn every_kind_of_image_becomes_small_and_stays_what_it_is() {
    for kind in KINDS {
        let image = worn(kind);
        thorough(&image, false);
        if !kind.options.contains("DATA") && !kind.options.contains("encrypt") {
            thorough(&image, true);
        }
    }
}

#[test]
fn images_of_random_kinds_become_small_and_stay_what_they_are() {
    for number in 0..u64::from(8 * soak()) {
        let kind = Kind::random(mix(seed() ^ number << 8));
        let image = worn(&kind);
        thorough(&image, number % 2 == 0 && !kind.options.contains("DATA"));
    }
}

#[test]
fn a_power_cut_at_any_moment_leaks_at_worst() {
    for (name, compress, prefixes) in [
        ("cluster 512", false, 1000),
        ("cluster 512", true, 12),
        ("refcount 1", false, 12),
        ("refcount 64", false, 1000),
        ("refcount table", false, 12),
        ("version 2 snapshot", true, 12),
        ("compressed", false, 1000),
        ("zstd", false, 12),
        ("subclusters", false, 12),
        ("subclusters snapshot", true, 1000),
        ("over longer", false, 1000),
        ("subclusters over raw", false, 1000),
        ("data file", false, 1000),
        ("raw data file", false, 12),
        ("preallocated", false, 100),
        ("lazy", true, 12),
        ("luks snapshot", false, 12),
        ("aes snapshot", false, 12),
    ] {
        let image = worn(&images::named(name));
        let journal = Journal::new();
        let disks: Disks = images::memory(&image.files)
            .into_iter()
            .map(|disk| journal.record(disk))
            .collect();
        let start = look(&image, &image.files);
        let mut tale = Tale::new(format!("{name}, compress {compress}"), &journal, start.clone());
        let report = compact(&disks, compress).expect("compact");
        assert!(report.saved() > 0, "{name}: {report:?}");
        tale.note(0, "compact", Effect::Settles, start.clone());
        if !start.snapshots.is_empty() {
            tale.tolerate(Tolerance::LaggingFlags);
        }
        let mut effort = Effort::usual(seed()).times(soak());
        effort.bounds.prefixes = effort.bounds.prefixes.max(prefixes);
        tale.survive(&image, effort);
    }
}

/// An image with tables of several clusters between small holes, snapshots, bitmaps, and little that fits anywhere.
fn crowded() -> Image {
    let mut image = images::named("refcount table").make();
    let path = image.dump(&image.files);
    let snapshot = |what: &str, name: &str| {
        oracle::qemu_img().args(["snapshot", what, name]).arg(&path).ok();
    };
    let io = |commands: Vec<String>| oracle::io(&path, "qcow2", commands);
    io((0..60)
        .map(|part| format!("write -P {} {} 512", part + 1, part * 4096))
        .collect());
    for (round, name) in (1_u64..).zip(["a", "b", "c"]) {
        snapshot("-c", name);
        let at = |part: u64| part * 4096 + round * 512;
        io((0..60)
            .map(|part| format!("write -P {} {} 512", round + part, at(part)))
            .collect());
    }
    for name in ["x", "y"] {
        oracle::qemu_img()
            .args(["bitmap", "--add", "-g", "512"])
            .arg(&path)
            .arg(name)
            .ok();
        io(vec![
            "write -P 7 1M 3k".to_owned(),
            "write -P 8 100k 1k".to_owned(),
        ]);
    }
    snapshot("-d", "a");
    io((0..60)
        .step_by(2)
        .map(|part| format!("discard {} 512", part * 4096 + 1024))
        .collect());
    snapshot("-c", "d");
    io((0..60)
        .step_by(2)
        .map(|part| format!("discard {} 512", part * 4096 + 512))
        .collect());
    image.files = vec![std::fs::read(&path).expect("read")];
    image.start = look(&image, &image.files).disk;
    image
}

/// An image whose snapshot has an L1 table of two clusters at the end, and no two free clusters in a row before it.
fn gapped() -> Image {
    let mut image = images::named("refcount table").make();
    let path = image.dump(&image.files);
    let io = |commands: Vec<String>| oracle::io(&path, "qcow2", commands);
    // A table for each 32 KiB first, so that data follows data.
    io((0..66)
        .map(|part| format!("write -P 1 {} 512", part * 32768))
        .collect());
    io((0..200)
        .map(|part| format!("write -P {} {} 512", part % 250 + 1, part * 8192 + 1024))
        .collect());
    io((0..200)
        .step_by(2)
        .map(|part| format!("discard {} 512", part * 8192 + 1024))
        .collect());
    oracle::qemu_img().args(["snapshot", "-c", "one"]).arg(&path).ok();
    image.files = vec![std::fs::read(&path).expect("read")];
    image.start = look(&image, &image.files).disk;
    image
}

#[test]
fn tables_of_several_clusters_find_room() {
    for (image, compress) in [(crowded(), false), (crowded(), true), (gapped(), false)] {
        thorough(&image, compress);
        let disks = images::memory(&image.files);
        compact(&disks, compress).expect("compact");
        let files = images::bytes(&disks);
        assert_eq!(free_clusters(&files[0]), 0, "compress {compress}");
    }
}

/// Clusters of a file with 64-bit refcounts that have the count 0.
fn free_clusters(file: &[u8]) -> usize {
    let number = |at: usize| u64::from_be_bytes(file[at..at + 8].try_into().expect("8 bytes")) as usize;
    let table = number(48);
    let clusters = file.len().div_ceil(512);
    (0..clusters)
        .filter(|cluster| match number(table + cluster / 64 * 8) {
            0 => true,
            block => number(block + cluster % 64 * 8) == 0,
        })
        .count()
}

#[test]
fn a_power_cut_while_room_is_made_leaks_at_worst() {
    for image in [crowded(), gapped()] {
        cut(&image);
    }
}

fn cut(image: &Image) {
    let journal = Journal::new();
    let disks: Disks = images::memory(&image.files)
        .into_iter()
        .map(|disk| journal.record(disk))
        .collect();
    let start = look(image, &image.files);
    let mut tale = Tale::new("crowded", &journal, start.clone());
    compact(&disks, false).expect("compact");
    tale.note(0, "compact", Effect::Settles, start);
    tale.tolerate(Tolerance::LaggingFlags);
    tale.survive(image, Effort::usual(seed()).times(soak()));
}

#[test]
fn a_call_that_fails_loses_nothing_and_a_second_run_finishes() {
    for (name, compress) in [
        ("cluster 512", false),
        ("version 2 snapshot", true),
        ("compressed", false),
        ("subclusters over raw", false),
        ("data file", false),
    ] {
        let image = worn(&images::named(name));
        let start = look(&image, &image.files);
        let attempt = |faults: &Arc<Faults>| {
            let inner = images::memory(&image.files);
            let disks: Disks = inner.iter().map(|disk| faults.wrap(Arc::clone(disk))).collect();
            let done = compact(&disks, compress);
            (images::bytes(&inner), done)
        };
        let calls = {
            let faults = Faults::new();
            attempt(&faults).1.expect("compact");
            faults.calls()
        };
        let step = (calls / (24 * u64::from(soak()))).max(1) as usize;
        for number in (0..calls).step_by(step) {
            for (failure, lasting) in [
                (Failure::Io, Lasting::ForGood),
                (Failure::NoSpace, Lasting::Once),
                (Failure::ShortWrite, Lasting::Once),
            ] {
                let faults = Faults::new();
                faults.fail_at(number, failure, lasting);
                let (files, done) = attempt(&faults);
                let context = format!("{name}, call {number}, {failure:?} {lasting:?}: {done:?}");
                if let Err(error) = &done {
                    assert_ne!(error.kind(), ErrorKind::Corrupt, "{context}");
                }
                let report = images::check(&files).expect("check");
                assert_eq!(
                    (report.check_errors, report.corruptions),
                    (0, 0),
                    "{context}: {:#?}",
                    report.findings
                );
                assert_eq!(look(&image, &files), start, "{context}");
                let disks = images::memory(&files);
                compact(&disks, compress).unwrap_or_else(|error| panic!("{context}: again: {error:?}"));
                let files = images::bytes(&disks);
                images::assert_clean(&files);
                assert_eq!(look(&image, &files), start, "{context}: again");
            }
        }
    }
}

#[test]
fn cancelling_leaves_the_image_sound() {
    let image = worn(&images::named("cluster 512"));
    let disks = images::memory(&image.files);
    let cancel = std::sync::atomic::AtomicBool::new(true);
    let job = Job {
        observer: &diskmill_core::Silent,
        cancel: &cancel,
    };
    let driver = registry::by_name("qcow2").expect("a driver");
    let parsed = driver
        .parse(Arc::clone(&disks[0]) as Arc<dyn Storage>, &how())
        .expect("parse");
    let files = ROLES.into_iter().zip(disks.iter().cloned()).collect();
    let error = parsed
        .compact(files, &how(), &spec(false), job)
        .expect_err("cancelled");
    assert_eq!(error.kind(), ErrorKind::Cancelled);
    image.assert_good(&images::bytes(&disks), &image.start);
}

#[test]
fn holes_in_a_cluster_that_a_snapshot_shares_are_made_once() {
    let kind = Kind {
        options: "extended_l2=on,cluster_size=128k",
        size: 1 << 20,
        setup: Setup::Empty,
        ..images::named("subclusters")
    };
    let mut image = kind.make();
    let path = image.dump(&image.files);
    oracle::io(&path, "qcow2", ["write -P 3 0 128k", "write -P 0 32k 32k"]);
    oracle::qemu_img().args(["snapshot", "-c", "one"]).arg(&path).ok();
    // Another table for the active state, which refers to the same cluster.
    oracle::io(&path, "qcow2", ["write -P 4 512k 4k"]);
    image.files = vec![std::fs::read(&path).expect("read")];
    image.start = look(&image, &image.files).disk;
    thorough(&image, false);
    let report = compact(&images::memory(&image.files), false).expect("compact");
    assert_eq!(report.punched, 32 << 10, "{report:?}");
}

/// Where the first refcount block is.
fn first_block(disks: &Disks) -> HostOffset {
    let mut place = [0; 8];
    disks[0].read_at(HostOffset::new(48), &mut place).expect("read");
    let table = HostOffset::new(u64::from_be_bytes(place));
    disks[0].read_at(table, &mut place).expect("read");
    HostOffset::new(u64::from_be_bytes(place))
}

#[test]
fn refcounts_that_the_last_writer_put_off_are_made_good_first() {
    let mut image = worn(&images::named("cluster 4k"));
    let disks = images::memory(&image.files);
    // As after a crash with lazy refcounts: the dirty bit, and clusters in use that nobody has counted.
    disks[0]
        .write_at(HostOffset::new(72), &1_u64.to_be_bytes())
        .expect("write");
    let counts = first_block(&disks).plus(2 * 12).expect("a place");
    disks[0].write_at(counts, &[0; 16]).expect("write");
    image.files = images::bytes(&disks);
    assert!(images::check(&image.files).expect("check").corruptions > 0);
    thorough(&image, false);
}

#[test]
fn an_image_that_contradicts_itself_is_left_alone() {
    let image = worn(&images::named("cluster 4k"));
    let disks = images::memory(&image.files);
    // The refcount of the header.
    disks[0].write_at(first_block(&disks), &[0, 0]).expect("write");
    let broken = images::bytes(&disks);
    for error in [
        plan(&disks, false).expect_err("a broken image"),
        compact(&disks, false).expect_err("a broken image"),
    ] {
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error:?}");
        assert!(format!("{error:?}").contains("check --repair all"), "{error:?}");
    }
    assert!(images::bytes(&disks) == broken, "nothing was changed");
}

#[test]
fn what_leaks_is_given_back() {
    for name in ["cluster 512", "refcount 64", "compressed", "subclusters snapshot"] {
        let image = worn(&images::named(name));
        let journal = Journal::new();
        let disks: Disks = images::memory(&image.files)
            .into_iter()
            .map(|disk| journal.record(disk))
            .collect();
        // Cut short, it leaks what it had taken, or what it was about to give up.
        compact(&disks, true).expect("compact");
        let mut leaking = 0;
        for count in 0..journal.len() {
            let files = journal.prefix(count);
            let report = images::check(&files).expect("check");
            // A flag may lag with snapshots; that is for a repair.
            if report.leaks == 0 || report.corruptions > 0 || leaking == 20 {
                continue;
            }
            leaking += 1;
            let disks = images::memory(&files);
            let foretold = plan(&disks, false).expect("plan");
            let report = compact(&disks, false).expect("compact");
            assert_eq!(foretold, report, "{name}, cut {count}");
            assert!(report.leaked > 0, "{name}, cut {count}: {report:?}");
            let files = images::bytes(&disks);
            images::assert_clean(&files);
            assert_eq!(
                look(&image, &files),
                look(&image, &image.files),
                "{name}, cut {count}"
            );
        }
        assert!(leaking > 0, "{name}");
    }
}

#[test]
fn a_data_file_takes_nothing_compressed() {
    let image = images::named("data file").make();
    let error = compact(&images::memory(&image.files), true).expect_err("no compression");
    assert_eq!(error.kind(), ErrorKind::Unsupported);
}
