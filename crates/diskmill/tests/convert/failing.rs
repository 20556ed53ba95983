//! Conversions that fail.

use std::path::Path;

use diskmill::ops::convert::{self, ConvertError, Input};
use diskmill_core::{Compression, ErrorKind, Job};
use diskmill_testkit::scratch::patch;
use diskmill_testkit::sparse_random::SparseRandom;
use diskmill_testkit::{Scratch, oracle};

use super::{SIZE, Watcher, plan, run};

/// A compressed image of which one cluster cannot be read.
fn damaged(scratch: &Scratch) -> std::path::PathBuf {
    let raw = scratch.join("good");
    std::fs::write(&raw, lines(2 << 20)).unwrap();
    let image = scratch.join("damaged");
    let mut plan = plan(&raw, "raw", &image, "qcow2", "");
    plan.compress = Some(Compression::default());
    run(&plan);
    let map = oracle::map(&image, "qcow2");
    assert_eq!(map[0]["compressed"], true, "{map}");
    // The first compressed byte of an image is where the first table of data would be: behind header, refcounts, L1
    // and L2, five clusters. 0xff starts a block of a kind that does not exist.
    patch(&image, 5 << 16, &[0xff; 64]);
    image
}

fn lines(len: usize) -> Vec<u8> {
    let mut text = Vec::new();
    let mut number = 0_u64;
    while text.len() < len {
        text.extend_from_slice(format!("line {number}\n").as_bytes());
        number += 7;
    }
    text.truncate(len);
    text
}

fn assert_only(scratch: &Scratch, names: &[&str]) {
    assert_eq!(scratch.names(), names);
}

#[test]
fn a_source_that_cannot_be_read_leaves_the_target_as_it_was() {
    let scratch = Scratch::new();
    let source = damaged(&scratch);
    for workers in [1, 4] {
        let mut plan = plan(&source, "qcow2", &scratch.join("out"), "raw", "");
        plan.workers = std::num::NonZeroUsize::new(workers);
        let error = convert::run(&plan, Job::silent()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error:?}");
        assert_only(&scratch, &["damaged", "good"]);
    }
    let out = scratch.file("out", b"old");
    convert::run(&plan(&source, "qcow2", &out, "qcow2", ""), Job::silent()).unwrap_err();
    assert_eq!(std::fs::read(&out).unwrap(), b"old");
    assert_only(&scratch, &["damaged", "good", "out"]);
}

#[test]
fn salvage_leaves_zeros_and_says_where() {
    let scratch = Scratch::new();
    let source = damaged(&scratch);
    let out = scratch.join("out");
    let mut plan = plan(&source, "qcow2", &out, "raw", "");
    plan.salvage = true;
    let watcher = Watcher::default();
    convert::run(&plan, watcher.job()).unwrap();
    let warnings = watcher.warnings();
    assert_eq!(warnings.len(), 128, "{warnings:?}");
    assert!(
        warnings[0].starts_with("error while reading offset 0: "),
        "{warnings:?}"
    );
    let (good, saved) = (lines(2 << 20), std::fs::read(&out).unwrap());
    assert!(saved[..65_536].iter().all(|byte| *byte == 0));
    assert!(saved[65_536..] == good[65_536..]);
}

#[test]
fn cancelling_leaves_the_target_as_it_was() {
    let scratch = Scratch::new();
    let raw = scratch.join("raw");
    SparseRandom::new(5, SIZE).write_raw(&raw);
    let out = scratch.join("out");
    let cancelled = |out: &Path| {
        let watcher = Watcher::stopping();
        let error = convert::run(&plan(&raw, "raw", out, "qcow2", ""), watcher.job()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Cancelled);
        assert!(*watcher.done.lock().unwrap() < SIZE);
    };
    cancelled(&out);
    assert_only(&scratch, &["raw"]);
    std::fs::write(&out, b"old").unwrap();
    cancelled(&out);
    assert_eq!(std::fs::read(&out).unwrap(), b"old");
    assert_only(&scratch, &["out", "raw"]);
}

#[test]
fn a_disk_is_not_converted_onto_itself() {
    let scratch = Scratch::new();
    let raw = scratch.file("raw", &[1; 8192]);
    for format in ["raw", "qcow2"] {
        let error = convert::run(&plan(&raw, "raw", &raw, format, ""), Job::silent()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Locked, "{error:?}");
        assert_eq!(std::fs::read(&raw).unwrap(), [1; 8192]);
    }
}

#[test]
fn what_makes_no_sense_is_refused_before_the_target_is_touched() {
    let scratch = Scratch::new();
    let raw = scratch.file("raw", &[1; 8192]);
    let out = scratch.file("out", b"old");
    let fails = |change: &dyn Fn(&mut convert::Plan), format: &str, kind: ErrorKind| {
        let mut plan = plan(&raw, "raw", &out, format, "");
        change(&mut plan);
        let error = convert::run(&plan, Job::silent()).unwrap_err();
        assert_eq!(error.kind(), kind, "{error:?}");
        assert_eq!(std::fs::read(&out).unwrap(), b"old");
        error
    };
    let error = fails(
        &|plan| plan.compress = Some(Compression::default()),
        "raw",
        ErrorKind::Unsupported,
    );
    assert!(matches!(
        error.find::<ConvertError>(),
        Some(ConvertError::NoCompression(_))
    ));
    fails(&|plan| plan.bitmaps = true, "raw", ErrorKind::Unsupported);
    fails(&|plan| plan.inputs.push(Input::Stdin), "raw", ErrorKind::Usage);
    fails(&|plan| plan.inputs.clear(), "raw", ErrorKind::Usage);
    fails(&|_| {}, "foo", ErrorKind::Usage);
    let missing = plan(&scratch.join("none"), "raw", &out, "raw", "");
    let error = convert::run(&missing, Job::silent()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert_only(&scratch, &["out", "raw"]);
}
