//! Whole disks, in every shape.

use std::num::{NonZeroU64, NonZeroUsize};

use diskmill::ops::convert::{self, Output};
use diskmill_core::{Compression, ErrorKind};
use diskmill_testkit::hash::sha256_file;
use diskmill_testkit::scratch::{allocated, len, patch, peek};
use diskmill_testkit::sparse_random::SparseRandom;
use diskmill_testkit::{Scratch, oracle};

use super::{SIZE, Watcher, input, new, plan, run};

#[test]
fn every_way_there_and_back_gives_the_same_bytes() {
    let scratch = Scratch::new();
    let raw = scratch.join("raw");
    let disk = SparseRandom::new(1, SIZE);
    disk.write_raw(&raw);
    for (options, compress) in [
        ("", false),
        ("cluster_size=512", false),
        ("cluster_size=2M", false),
        ("compat=0.10", false),
        ("extended_l2=on,cluster_size=16k", false),
        ("preallocation=metadata", false),
        ("", true),
        ("cluster_size=4k", true),
        ("compression_type=zstd", true),
        ("extended_l2=on,compression_type=zstd", true),
    ] {
        let (there, back) = (scratch.join("there"), scratch.join("back"));
        let mut plan_there = plan(&raw, "raw", &there, "qcow2", options);
        plan_there.compress = compress.then(Compression::default);
        run(&plan_there);
        oracle::assert_clean(&there, "qcow2");
        oracle::assert_identical(&raw, "raw", &there, "qcow2");
        run(&plan(&there, "qcow2", &back, "raw", ""));
        disk.assert_raw(&back);
    }
    assert_eq!(scratch.names(), ["back", "raw", "there"]);
}

#[test]
fn the_bytes_of_the_image_do_not_depend_on_the_number_of_workers() {
    let scratch = Scratch::new();
    let raw = scratch.join("raw");
    SparseRandom::new(2, SIZE).write_raw(&raw);
    for (format, options, compress) in [
        ("qcow2", "", false),
        ("qcow2", "cluster_size=4k", true),
        ("qcow2", "compression_type=zstd", true),
        ("raw", "", false),
    ] {
        let mut seen = Vec::new();
        for workers in [1, 2, 16] {
            let out = scratch.join(format!("{workers}"));
            let mut plan = plan(&raw, "raw", &out, format, options);
            plan.compress = compress.then(Compression::default);
            plan.workers = NonZeroUsize::new(workers);
            assert_eq!(run(&plan).workers, workers);
            seen.push(sha256_file(&out));
        }
        assert!(
            seen.iter().all(|hash| *hash == seen[0]),
            "{format} {options} {seen:?}"
        );
    }
}

#[test]
fn progress_adds_up() {
    let scratch = Scratch::new();
    let raw = scratch.join("raw");
    SparseRandom::new(3, SIZE).write_raw(&raw);
    let watcher = Watcher::default();
    let summary = convert::run(
        &plan(&raw, "raw", &scratch.join("out"), "qcow2", ""),
        watcher.job(),
    )
    .unwrap();
    assert_eq!(summary.virtual_size, SIZE);
    assert_eq!(*watcher.total.lock().unwrap(), [SIZE]);
    assert_eq!(*watcher.done.lock().unwrap(), SIZE);
    assert!(
        summary.stored <= summary.read && summary.read < SIZE,
        "{summary:?}"
    );
}

#[test]
fn holes_of_terabytes_are_not_walked_through() {
    let scratch = Scratch::new();
    let raw = scratch.hole("raw", 8 << 40);
    patch(&raw, (5 << 40) + 4096, b"here");
    let (there, back) = (scratch.join("there"), scratch.join("back"));
    let summary = run(&plan(&raw, "raw", &there, "qcow2", "cluster_size=64k"));
    assert_eq!(summary.virtual_size, 8 << 40);
    assert!(summary.read <= 1 << 20, "{summary:?}");
    oracle::assert_clean(&there, "qcow2");
    run(&plan(&there, "qcow2", &back, "raw", ""));
    assert_eq!(len(&back), 8 << 40);
    assert_eq!(peek(&back, (5 << 40) + 4096, 4), b"here");
    assert!(allocated(&back) <= 1 << 20);
}

#[test]
fn several_disks_lie_one_behind_the_other_in_whole_sectors() {
    let scratch = Scratch::new();
    let first = scratch.file("first", &[1; 100_000]);
    let second = scratch.join("second");
    oracle::create(&second, "qcow2", "cluster_size=4k", "70000");
    oracle::io(&second, "qcow2", ["write -P 2 3000 50000"]);
    let third = scratch.file("third", &[3; 513]);
    for format in ["raw", "qcow2"] {
        let (ours, theirs) = (scratch.join("ours"), scratch.join("theirs"));
        let mut plan = plan(&first, "raw", &ours, format, "");
        plan.inputs.push(input(&second, "qcow2"));
        plan.inputs.push(input(&third, "raw"));
        run(&plan);
        let names = [&first, &second, &third, &theirs];
        let mut real = oracle::qemu_img().args(["convert", "-O", format]);
        for name in names {
            real = real.arg(name);
        }
        let _ = real.ok();
        oracle::assert_identical(&ours, format, &theirs, format);
    }
}

#[test]
fn one_byte_and_no_byte_are_disks_too() {
    let scratch = Scratch::new();
    for bytes in [0, 1, 511, 512, 513, 65_535, 65_536, 65_537, 524_287, 524_289] {
        let raw = scratch.file("raw", &vec![7; bytes]);
        let (there, back) = (scratch.join("there"), scratch.join("back"));
        run(&plan(&raw, "raw", &there, "qcow2", ""));
        oracle::assert_clean(&there, "qcow2");
        run(&plan(&there, "qcow2", &back, "raw", ""));
        let mut expected = vec![7; bytes];
        expected.resize(bytes.next_multiple_of(512), 0);
        assert!(std::fs::read(&back).unwrap() == expected, "{bytes}");
    }
}

#[test]
fn all_of_a_disk_is_stored_if_asked() {
    let scratch = Scratch::new();
    let raw = scratch.hole("raw", 4 << 20);
    patch(&raw, 1 << 20, &[9; 100]);
    let out = scratch.join("out");
    for (format, compress) in [("raw", false), ("qcow2", false), ("qcow2", true)] {
        let mut plan = plan(&raw, "raw", &out, format, "");
        plan.sparse = 0;
        plan.compress = compress.then(Compression::default);
        run(&plan);
        oracle::assert_identical(&raw, "raw", &out, format);
        if format == "raw" {
            assert!(allocated(&out) >= 4 << 20);
        } else {
            let map = oracle::map(&out, "qcow2");
            let all = map.as_array().unwrap();
            assert!(
                all.iter().all(|run| run["data"] == true && run["zero"] == false),
                "{map}"
            );
            assert_eq!(compress, len(&out) < 1 << 20);
        }
    }
}

#[test]
fn only_zeros_that_are_long_enough_are_left_out() {
    let scratch = Scratch::new();
    let mut bytes = vec![5; 1 << 20];
    bytes[64 << 10..][..32 << 10].fill(0);
    bytes[256 << 10..][..128 << 10].fill(0);
    let raw = scratch.file("raw", &bytes);
    let out = scratch.join("out");
    for (sparse, holes) in [(4096, 160 << 10), (64 << 10, 128 << 10), (256 << 10, 0)] {
        let mut plan = plan(&raw, "raw", &out, "raw", "");
        plan.sparse = sparse;
        run(&plan);
        assert!(std::fs::read(&out).unwrap() == bytes);
        assert_eq!(allocated(&out), (1 << 20) - holes, "{sparse}");
    }
}

#[test]
fn the_kernel_may_copy() {
    let scratch = Scratch::new();
    let raw = scratch.join("raw");
    let disk = SparseRandom::new(4, SIZE);
    disk.write_raw(&raw);
    let (there, back) = (scratch.join("there"), scratch.join("back"));
    let mut plan_there = plan(&raw, "raw", &there, "qcow2", "");
    plan_there.offload = true;
    run(&plan_there);
    oracle::assert_clean(&there, "qcow2");
    let mut plan_back = plan(&there, "qcow2", &back, "raw", "");
    plan_back.offload = true;
    run(&plan_back);
    disk.assert_raw(&back);
    plan_there.compress = Some(Compression::default());
    let error = convert::run(&plan_there, Watcher::default().job()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Usage);
}

#[test]
fn a_rate_changes_nothing_but_the_time() {
    let scratch = Scratch::new();
    let raw = scratch.file("raw", &[1; 2 << 20]);
    let out = scratch.join("out");
    let mut plan = plan(&raw, "raw", &out, "raw", "");
    plan.rate = NonZeroU64::new(20 << 20);
    run(&plan);
    assert!(std::fs::read(&out).unwrap() == std::fs::read(&raw).unwrap());
}

#[test]
fn an_old_target_is_replaced_with_its_mode() {
    use std::os::unix::fs::PermissionsExt;
    let scratch = Scratch::new();
    let raw = scratch.file("raw", &[1; 4096]);
    let out = scratch.file("out", b"old");
    std::fs::set_permissions(&out, PermissionsExt::from_mode(0o640)).unwrap();
    let mut plan = plan(&raw, "raw", &out, "raw", "");
    run(&plan);
    assert_eq!(
        std::fs::metadata(&out).unwrap().permissions().mode() & 0o777,
        0o640
    );
    assert_eq!(len(&out), 4096);
    std::fs::hard_link(&out, scratch.join("link")).unwrap();
    plan.output = Output::New(new(&out, "qcow2", ""));
    let summary = run(&plan);
    assert_eq!(summary.in_place, Some(convert::InPlace::HardLinks));
    oracle::assert_identical(&raw, "raw", scratch.join("link"), "qcow2");
}
