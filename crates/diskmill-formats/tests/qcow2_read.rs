//! What QEMU writes, we read to the same bytes and check to the same counts.

mod support;

use std::path::Path;

use diskmill_core::{GuestOffset, State, Value};
use diskmill_formats::registry;
use diskmill_testkit::sparse_random::SparseRandom;
use diskmill_testkit::{Scratch, contract, oracle};
use support::{assert_same_check, chain, file, layer, read_all};

/// Demands that we read `image` to the bytes of the raw file `expected`, and that its layer keeps the contract.
fn assert_reads(image: &Path, expected: &Path) {
    let expected = std::fs::read(expected).unwrap();
    let chain = chain(image, "qcow2").unwrap();
    assert_eq!(chain.virtual_size(), expected.len() as u64, "{}", image.display());
    assert!(read_all(&chain) == expected, "{}", image.display());
    contract::layer::all(&chain.layers()[0], &chain.below(), &expected);
}

/// Converts a disk with `qemu-img` under each of `options` and reads it back.
fn assert_converted(seed: u64, size: u64, flags: &[&str], options: &[&str]) {
    let dir = Scratch::beneath("/dev/shm");
    let raw = dir.join("disk.raw");
    SparseRandom::new(seed, size).write_raw(&raw);
    for options in options {
        let image = dir.join("disk.qcow2");
        let flags: Vec<&str> = flags.iter().copied().chain(["-o", *options]).collect();
        oracle::convert(flags, &raw, "raw", &image, "qcow2");
        assert_reads(&image, &raw);
        assert_same_check(&image);
        std::fs::remove_file(&image).unwrap();
    }
}

#[test]
fn every_cluster_size_and_version() {
    assert_converted(
        1,
        (3 << 20) + 512,
        &[],
        &[
            "compat=0.10",
            "compat=0.10,cluster_size=512",
            "compat=0.10,cluster_size=2M",
            "cluster_size=512",
            "cluster_size=1k",
            "cluster_size=2k",
            "cluster_size=4k",
            "cluster_size=8k",
            "cluster_size=16k",
            "cluster_size=32k",
            "cluster_size=64k",
            "cluster_size=128k",
            "cluster_size=256k",
            "cluster_size=512k",
            "cluster_size=1M",
            "cluster_size=2M",
        ],
    );
}

#[test]
fn every_refcount_width() {
    assert_converted(
        2,
        1 << 20,
        &[],
        &[
            "refcount_bits=1",
            "refcount_bits=2",
            "refcount_bits=4,cluster_size=512",
            "refcount_bits=8",
            "refcount_bits=16,cluster_size=512",
            "refcount_bits=32",
            "refcount_bits=64,cluster_size=512",
        ],
    );
}

#[test]
fn compressed_clusters() {
    assert_converted(
        3,
        (3 << 20) + 1536,
        &["-c"],
        &[
            "compat=0.10",
            "cluster_size=512",
            "cluster_size=4k",
            "cluster_size=64k",
            "cluster_size=2M",
            "extended_l2=on,cluster_size=64k",
            "compression_type=zstd,cluster_size=512",
            "compression_type=zstd,cluster_size=64k",
            "compression_type=zstd,cluster_size=2M",
        ],
    );
}

#[test]
fn compressed_out_of_order() {
    assert_converted(
        4,
        8 << 20,
        &["-c", "-W", "-m", "8"],
        &["cluster_size=4k", "cluster_size=64k"],
    );
}

#[test]
fn extended_l2_entries() {
    assert_converted(
        5,
        3 << 20,
        &[],
        &[
            "extended_l2=on,cluster_size=16k",
            "extended_l2=on,cluster_size=64k",
            "extended_l2=on,cluster_size=128k",
            "extended_l2=on,cluster_size=2M",
        ],
    );
}

#[test]
fn preallocated() {
    assert_converted(
        6,
        3 << 20,
        &[],
        &[
            "preallocation=off",
            "preallocation=metadata",
            "preallocation=falloc",
            "preallocation=full",
            "preallocation=metadata,extended_l2=on",
            "lazy_refcounts=on",
        ],
    );
}

#[test]
fn odd_sizes() {
    let dir = Scratch::beneath("/dev/shm");
    for (index, size) in [1, 511, 512, 513, 65_535, 65_536, 65_537, 1 << 20]
        .into_iter()
        .enumerate()
    {
        let plain = dir.join("odd.raw");
        SparseRandom::new(index as u64, size).write_raw(&plain);
        let image = dir.join("odd.qcow2");
        oracle::convert(["-c"], &plain, "raw", &image, "qcow2");
        // QEMU rounds up to sectors.
        let padded = std::fs::read(&plain).unwrap();
        let mut padded = padded;
        padded.resize(padded.len().next_multiple_of(512), 0);
        let expected = dir.file("expected.raw", &padded);
        assert_reads(&image, &expected);
        assert_same_check(&image);
        assert!(read_all(&chain(&plain, "raw").unwrap()) == padded);
    }
}

#[test]
fn external_data_files() {
    let dir = Scratch::beneath("/dev/shm");
    let raw = dir.join("disk.raw");
    SparseRandom::new(7, 5 << 20).write_raw(&raw);
    for (index, options) in [
        "",
        ",data_file_raw=on",
        ",extended_l2=on",
        ",data_file_raw=on,cluster_size=4k",
    ]
    .iter()
    .enumerate()
    {
        let image = dir.join(format!("disk{index}.qcow2"));
        let data = dir.join(format!("disk{index}.data"));
        let options = format!("data_file={}{options}", data.display());
        oracle::create(&image, "qcow2", &options, "5M");
        oracle::convert(["-n"], &raw, "raw", &image, "qcow2");
        oracle::io(
            &image,
            "qcow2",
            ["write -z 1M 128k", "discard 2M 128k", "write -P 5 3M 4k"],
        );
        let expected = dir.join("expected.raw");
        oracle::convert([] as [&str; 0], &image, "qcow2", &expected, "raw");
        assert_reads(&image, &expected);
        assert_same_check(&image);
    }
}

/// Writes, zeroes and discards all over a disk, then does it again in an overlay.
#[test]
fn used_images_and_their_overlays() {
    for (index, options) in [
        "compat=0.10",
        "cluster_size=512",
        "cluster_size=64k",
        "cluster_size=2M",
        "extended_l2=on,cluster_size=64k",
        "extended_l2=on,cluster_size=16k",
        "refcount_bits=64,cluster_size=4k",
    ]
    .iter()
    .enumerate()
    {
        let dir = Scratch::beneath("/dev/shm");
        let (base, top) = (dir.join("base.qcow2"), dir.join("top.qcow2"));
        oracle::create(&base, "qcow2", options, "7M");
        oracle::io(&base, "qcow2", commands(index as u64, 60, 7 << 20));
        oracle::create_overlay(&top, options, &base, "qcow2", Some("9M"));
        oracle::io(&top, "qcow2", commands(index as u64 + 100, 60, 9 << 20));
        for image in [&base, &top] {
            let expected = dir.join("expected.raw");
            oracle::convert([] as [&str; 0], image, "qcow2", &expected, "raw");
            assert_reads(image, &expected);
            assert_same_check(image);
        }
    }
}

/// Pseudo-random `qemu-io` commands.
fn commands(seed: u64, count: u64, size: u64) -> Vec<String> {
    let mut state = seed;
    let mut next = move |below: u64| {
        state = diskmill_testkit::sparse_random::mix(state);
        state % below
    };
    (0..count)
        .map(|_| {
            let at = next(size / 512 - 1) * 512;
            let len = ((next(400) + 1) * 512).min(size - at);
            match next(8) {
                0 => format!("write -z {at} {len}"),
                1 => format!("write -z -u {at} {len}"),
                2 => format!("discard {at} {len}"),
                kind => format!("write -P {} {at} {len}", kind + next(200)),
            }
        })
        .collect()
}

#[test]
fn snapshots_and_bitmaps_are_counted_and_shown() {
    let dir = Scratch::beneath("/dev/shm");
    for options in [
        "cluster_size=512",
        "compat=1.1",
        "extended_l2=on",
        "refcount_bits=8",
    ] {
        let image = dir.join("snapped.qcow2");
        oracle::create(&image, "qcow2", options, "4M");
        oracle::io(&image, "qcow2", commands(9, 20, 4 << 20));
        for (name, seed) in [("one", 1), ("two", 2), ("three", 3)] {
            oracle::qemu_img().args(["snapshot", "-c", name]).arg(&image).ok();
            oracle::io(&image, "qcow2", commands(seed, 20, 4 << 20));
        }
        oracle::qemu_img()
            .args(["snapshot", "-d", "two"])
            .arg(&image)
            .ok();
        oracle::qemu_img()
            .args(["bitmap", "--add", "-g", "64k"])
            .arg(&image)
            .arg("b0")
            .ok();
        oracle::qemu_img()
            .args(["bitmap", "--add", "--disable"])
            .arg(&image)
            .arg("b1")
            .ok();
        oracle::io(&image, "qcow2", commands(4, 10, 4 << 20));
        let expected = dir.join("expected.raw");
        oracle::convert([] as [&str; 0], &image, "qcow2", &expected, "raw");
        assert_reads(&image, &expected);
        assert_same_check(&image);
        let facts = layer(&image, "qcow2", &Default::default())
            .unwrap()
            .facts()
            .clone();
        let theirs = oracle::info(&image, "qcow2", false);
        let names: Vec<_> = facts
            .snapshots
            .iter()
            .map(|snapshot| snapshot.name.as_str())
            .collect();
        assert_eq!(names, ["one", "three"]);
        for (ours, theirs) in facts
            .snapshots
            .iter()
            .zip(theirs["snapshots"].as_array().unwrap())
        {
            assert_eq!(ours.id, theirs["id"].as_str().unwrap());
            assert_eq!(ours.date_sec, theirs["date-sec"].as_u64().unwrap());
            assert_eq!(u64::from(ours.date_nsec), theirs["date-nsec"].as_u64().unwrap());
            assert_eq!(ours.icount, theirs["icount"].as_u64());
            assert_eq!(ours.disk_size, 4 << 20);
        }
        std::fs::remove_file(&image).unwrap();
    }
}

#[test]
fn compressed_clusters_are_joined_into_long_runs() {
    let dir = Scratch::beneath("/dev/shm");
    let raw = dir.join("disk.raw");
    std::fs::write(&raw, vec![b'x'; 4 << 20]).unwrap();
    let image = dir.join("disk.qcow2");
    oracle::convert(["-c"], &raw, "raw", &image, "qcow2");
    let layer = layer(&image, "qcow2", &Default::default()).unwrap();
    let extent = layer.map(GuestOffset::ZERO, u64::MAX).unwrap();
    assert_eq!(extent.len, 4 << 20);
    assert!(matches!(extent.state, State::Compressed(_)), "{extent:?}");
}

#[test]
fn runs_cross_l2_tables() {
    let dir = Scratch::beneath("/dev/shm");
    let image = dir.join("disk.qcow2");
    oracle::create(&image, "qcow2", "preallocation=metadata,cluster_size=4k", "16M");
    let layer = layer(&image, "qcow2", &Default::default()).unwrap();
    let mut at = 0;
    let mut runs = 0;
    while at < 16 << 20 {
        at += layer.map(GuestOffset::new(at), u64::MAX).unwrap().len;
        runs += 1;
    }
    // An L2 table covers 2 MiB, and the clusters of several follow one another.
    assert!(runs <= 10, "{runs} runs");
}

/// The keys and values of `format-specific`.
fn tree(value: &Value) -> serde_json::Value {
    match value {
        Value::Bool(flag) => (*flag).into(),
        Value::Int(number) => (*number).into(),
        Value::Text(text) => text.as_str().into(),
        Value::List(values) => values.iter().map(tree).collect(),
        Value::Map(pairs) => pairs
            .iter()
            .map(|(name, value)| ((*name).to_owned(), tree(value)))
            .collect::<serde_json::Map<_, _>>()
            .into(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_info_shows_is_what_qemu_shows() {
    let dir = Scratch::beneath("/dev/shm");
    let image = dir.join("shown.qcow2");
    let data = dir.join("shown.data");
    let with_data = format!("data_file={}", data.display());
    let with_raw_data = format!("{with_data},data_file_raw=on");
    for options in [
        "compat=0.10",
        "lazy_refcounts=on,refcount_bits=1",
        "compression_type=zstd,extended_l2=on",
        &with_data,
        &with_raw_data,
        "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10,encrypt.cipher-mode=xts,\
         encrypt.ivgen-alg=essiv,encrypt.ivgen-hash-alg=sha256,encrypt.cipher-alg=aes-128,encrypt.hash-alg=sha1",
        "encrypt.format=aes,encrypt.key-secret=s",
    ] {
        oracle::qemu_img()
            .args([
                "create",
                "-q",
                "-f",
                "qcow2",
                "--object",
                "secret,id=s,data=abc",
                "-o",
                options,
            ])
            .arg(&image)
            .arg("1M")
            .ok();
        if !options.contains("compat=0.10") {
            oracle::qemu_img()
                .args(["bitmap", "--add", "-g", "4k"])
                .arg(&image)
                .arg("b0")
                .finish();
        }
        let theirs = oracle::info(&image, "qcow2", false);
        let driver = registry::by_name("qcow2").unwrap();
        let parsed = driver.parse(file(&image), &Default::default()).unwrap();
        let facts = parsed.facts();
        let ours = tree(facts.specific.as_ref().unwrap());
        assert_eq!(ours, theirs["format-specific"]["data"], "{options}");
        assert_eq!(facts.encrypted, theirs.get("encrypted").is_some(), "{options}");
        std::fs::remove_file(&image).unwrap();
    }
}
