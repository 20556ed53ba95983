//! Chains as sources, and targets that are backed by an image.

use std::path::Path;

use diskmill::ops::convert::{self, ConvertError, Output};
use diskmill::ops::create::CreateError;
use diskmill_core::{Compression, ErrorKind, Job};
use diskmill_testkit::{Scratch, oracle};

use super::{input, new, plan, run};

/// A base of 4 MiB with data in its first half, and an overlay with data, zeros and a cluster written as zeros.
fn chain(scratch: &Scratch) -> (std::path::PathBuf, std::path::PathBuf) {
    let (base, top) = (scratch.join("base"), scratch.join("top"));
    oracle::create(&base, "qcow2", "", "4M");
    oracle::io(&base, "qcow2", ["write -P 1 0 2M"]);
    oracle::create_overlay(&top, "", &base, "qcow2", None);
    oracle::io(
        &top,
        "qcow2",
        [
            "write -P 2 512k 1k",
            "write -z 1M 128k",
            "write -P 0 128k 64k",
            "write -P 3 3M 5k",
        ],
    );
    (base, top)
}

fn backed(out: &Path, base: &Path, options: &str) -> Output {
    let mut image = new(out, "qcow2", options);
    image.backing = Some(base.to_str().unwrap().to_owned());
    image.backing_format = Some("qcow2".to_owned());
    Output::New(image)
}

#[test]
fn a_chain_becomes_one_image() {
    let scratch = Scratch::new();
    let (_, top) = chain(&scratch);
    for format in ["raw", "qcow2"] {
        let out = scratch.join("out");
        run(&plan(&top, "qcow2", &out, format, ""));
        oracle::assert_identical(&top, "qcow2", &out, format);
    }
}

#[test]
fn a_backed_target_holds_the_differences_only_and_the_same_as_qemu() {
    let scratch = Scratch::new();
    let (base, top) = chain(&scratch);
    for (options, compress) in [
        ("cluster_size=64k", false),
        ("cluster_size=64k", true),
        ("cluster_size=4k", false),
        ("cluster_size=256k", false),
        ("compat=0.10", false),
        ("extended_l2=on", false),
    ] {
        let (ours, theirs) = (scratch.join("ours"), scratch.join("theirs"));
        let mut plan = plan(&top, "qcow2", &ours, "qcow2", "");
        plan.output = backed(&ours, &base, options);
        plan.compress = compress.then(Compression::default);
        run(&plan);
        oracle::assert_clean(&ours, "qcow2");
        oracle::assert_identical(&top, "qcow2", &ours, "qcow2");
        let mut real =
            oracle::qemu_img().args(["convert", "-O", "qcow2", "-F", "qcow2", "-o", options, "-B"]);
        real = real.arg(&base);
        if compress {
            real = real.arg("-c");
        }
        let _ = real.arg(&top).arg(&theirs).ok();
        let depths = |path: &Path| -> Vec<(u64, u64, u64)> {
            let field = |run: &serde_json::Value, name: &str| run[name].as_u64().unwrap();
            let runs = oracle::map(path, "qcow2");
            let mut joined: Vec<(u64, u64, u64)> = Vec::new();
            for run in runs.as_array().unwrap() {
                let (start, length, depth) = (field(run, "start"), field(run, "length"), field(run, "depth"));
                match joined.last_mut() {
                    Some(last) if last.2 == depth => last.1 += length,
                    _ => joined.push((start, length, depth)),
                }
            }
            joined
        };
        assert_eq!(depths(&ours), depths(&theirs), "{options}");
    }
}

#[test]
fn what_the_source_lacks_comes_from_the_targets_backing_image() {
    let scratch = Scratch::new();
    let (_, top) = chain(&scratch);
    let other = scratch.join("other");
    oracle::create(&other, "qcow2", "", "1M");
    oracle::io(&other, "qcow2", ["write -P 8 0 1M"]);
    let (ours, theirs) = (scratch.join("ours"), scratch.join("theirs"));
    let mut plan = plan(&top, "qcow2", &ours, "qcow2", "");
    plan.output = backed(&ours, &other, "");
    run(&plan);
    oracle::assert_clean(&ours, "qcow2");
    let real = oracle::qemu_img().args(["convert", "-O", "qcow2", "-F", "qcow2", "-B"]);
    let _ = real.arg(&other).arg(&top).arg(&theirs).ok();
    oracle::assert_identical(&ours, "qcow2", &theirs, "qcow2");
}

#[test]
fn a_backing_image_needs_a_format_and_one_source() {
    let scratch = Scratch::new();
    let (base, top) = chain(&scratch);
    let out = scratch.join("out");
    let mut image = new(&out, "qcow2", "");
    image.backing = Some(base.to_str().unwrap().to_owned());
    let mut plan = plan(&top, "qcow2", &out, "qcow2", "");
    plan.output = Output::New(image);
    let error = convert::run(&plan, Job::silent()).unwrap_err();
    assert!(matches!(
        error.find::<CreateError>(),
        Some(CreateError::BackingFormatMissing { .. })
    ));
    plan.output = backed(&out, &base, "");
    plan.inputs.push(input(&base, "qcow2"));
    let error = convert::run(&plan, Job::silent()).unwrap_err();
    assert_eq!(
        error.find::<ConvertError>(),
        Some(&ConvertError::BackingWithSeveral)
    );
    plan.inputs.pop();
    plan.output = backed(&out, &scratch.join("none"), "");
    let error = convert::run(&plan, Job::silent()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(!out.exists());
}
