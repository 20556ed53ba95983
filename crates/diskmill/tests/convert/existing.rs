//! Converting into images that exist.

use diskmill::ops::convert::{self, ConvertError, ExistingImage, Output, Plan};
use diskmill_core::{Compression, ErrorKind, Job};
use diskmill_testkit::scratch::{len, patch, peek};
use diskmill_testkit::sparse_random::SparseRandom;
use diskmill_testkit::{Scratch, oracle};

use super::{SIZE, input, request, run};

#[test]
fn whatever_the_target_held_it_holds_the_source_afterwards() {
    let scratch = Scratch::new();
    let raw = scratch.join("raw");
    SparseRandom::new(6, SIZE).write_raw(&raw);
    for (format, options, compress) in [
        ("raw", "", false),
        ("qcow2", "", false),
        ("qcow2", "cluster_size=4k", false),
        ("qcow2", "extended_l2=on", false),
        ("qcow2", "compat=0.10", false),
        ("qcow2", "", true),
    ] {
        let target = scratch.join("target");
        oracle::create(&target, format, options, "26M");
        oracle::io(&target, format, ["write -P 9 0 26M"]);
        let existing = ExistingImage::new(request(&target, format));
        let mut plan = Plan::new(input(&raw, "raw"), Output::Existing(existing));
        plan.compress = compress.then(Compression::default);
        run(&plan);
        if format == "qcow2" {
            oracle::assert_clean(&target, format);
        }
        let read = scratch.join("read");
        oracle::convert([""; 0], &target, format, &read, "raw");
        let (found, expected) = (std::fs::read(&read).unwrap(), std::fs::read(&raw).unwrap());
        assert!(found[..expected.len()] == expected[..], "{format} {options}");
        assert!(
            found[expected.len()..].iter().all(|byte| *byte == 9),
            "{format} {options}"
        );
    }
}

#[test]
fn a_target_that_is_zero_gets_data_only() {
    let scratch = Scratch::new();
    let raw = scratch.hole("raw", 1 << 20);
    patch(&raw, 512 << 10, &[7; 4096]);
    let target = scratch.file("target", &[9; 2 << 20]);
    let mut existing = ExistingImage::new(request(&target, "raw"));
    existing.is_zero = true;
    run(&Plan::new(input(&raw, "raw"), Output::Existing(existing)));
    let mut expected = vec![9; 2 << 20];
    expected[512 << 10..][..4096].fill(7);
    assert!(std::fs::read(&target).unwrap() == expected);
}

#[test]
fn a_target_that_is_too_small_is_left_alone() {
    let scratch = Scratch::new();
    let raw = scratch.file("raw", &[1; 8192]);
    let target = scratch.file("target", &[9; 4096]);
    let existing = ExistingImage::new(request(&target, "raw"));
    let plan = Plan::new(input(&raw, "raw"), Output::Existing(existing));
    let error = convert::run(&plan, Job::silent()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Usage);
    assert_eq!(
        error.find::<ConvertError>(),
        Some(&ConvertError::TargetTooSmall {
            target: 4096,
            source_size: 8192
        })
    );
    assert_eq!(len(&target), 4096);
    assert_eq!(peek(&target, 0, 4), [9; 4]);
}
