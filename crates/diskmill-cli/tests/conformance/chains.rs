//! Backing chains: overlays over raw, qcow2 and compressed images, longer and shorter than what they are based on.

use diskmill_testkit::sparse_random::SparseRandom;
use diskmill_testkit::{Scratch, hash, oracle};

use crate::agree::assert_agree;
use crate::tools::{ours, refused, same, same_json, theirs};

const SIZE: u64 = (2 << 20) + 512;

/// Makes `base.FORMAT` from a seed, with `flags` of `convert`.
fn base(scratch: &Scratch, format: &str, flags: &str) {
    SparseRandom::new(11, SIZE).write_raw(scratch.join("disk.raw"));
    if format == "raw" {
        std::fs::copy(scratch.join("disk.raw"), scratch.join("base.raw")).unwrap();
    } else {
        theirs(scratch)
            .words(&format!(
                "convert {flags} -f raw -O {format} disk.raw base.{format}"
            ))
            .ok();
    }
}

/// Both read and describe the chain under `name` alike.
fn assert_chain_agrees(scratch: &Scratch, name: &str) {
    assert_agree(scratch, name, "qcow2");
    same_json(
        scratch,
        &format!("info --backing-chain --output=json -f qcow2 {name}"),
    );
    same(scratch, &format!("info --backing-chain -f qcow2 {name}"));
    ours(scratch)
        .words(&format!("convert -f qcow2 -O raw {name} flat.raw"))
        .ok();
    assert_eq!(
        hash::sha256_file(scratch.join("flat.raw")),
        oracle::guest_sha256(scratch.join(name), "qcow2"),
        "{name} reads otherwise"
    );
    ours(scratch)
        .words(&format!("compare -f qcow2 -F raw {name} flat.raw"))
        .ok();
}

fn chain(base_format: &str, base_flags: &str, overlay_options: &str, overlay_size: &str) {
    let scratch = Scratch::new();
    base(&scratch, base_format, base_flags);
    let with = if overlay_options.is_empty() {
        String::new()
    } else {
        format!("-o {overlay_options}")
    };
    let create = |backing: &str, format: &str, name: &str| {
        let with = with.replace("DATA", &format!("{name}.data"));
        format!("create -f qcow2 -b {backing} -F {format} {with} {name}.qcow2 {overlay_size}")
    };

    // Two overlays, one over the other, ours below theirs.
    let base_name = format!("base.{base_format}");
    let (our, their) = (
        create(&base_name, base_format, "lower"),
        create(&base_name, base_format, "other"),
    );
    let our = ours(&scratch).words(&our).ok();
    let their = theirs(&scratch).words(&their).ok();
    assert_eq!(our.out().replace("lower.", "other."), their.out());
    oracle::assert_clean(scratch.join("lower.qcow2"), "qcow2");
    assert_chain_agrees(&scratch, "lower.qcow2");
    let lower = [
        "write -P 1 300k 5k",
        "write -z 64k 64k",
        "write -z -u 400k 64k",
        "write -P 2 1M 128k",
        "discard 0 64k",
    ];
    oracle::io(scratch.join("lower.qcow2"), "qcow2", lower);
    oracle::assert_clean(scratch.join("lower.qcow2"), "qcow2");
    assert_chain_agrees(&scratch, "lower.qcow2");

    theirs(&scratch)
        .words(&create("lower.qcow2", "qcow2", "upper"))
        .ok();
    let upper = ["write -P 3 301k 1k", "write -P 4 70k 4k", "write -z 1100k 4k"];
    oracle::io(scratch.join("upper.qcow2"), "qcow2", upper);
    assert_chain_agrees(&scratch, "upper.qcow2");

    // Over what the source is based on, only what the source itself has is copied.
    for (who, name) in [
        (ours(&scratch), "cow.qcow2"),
        (theirs(&scratch), "their-cow.qcow2"),
    ] {
        who.words(&format!(
            "convert -f qcow2 -O qcow2 -B lower.qcow2 -F qcow2 upper.qcow2 {name}"
        ))
        .ok();
    }
    oracle::assert_clean(scratch.join("cow.qcow2"), "qcow2");
    oracle::assert_identical(
        scratch.join("upper.qcow2"),
        "qcow2",
        scratch.join("cow.qcow2"),
        "qcow2",
    );
    assert_chain_agrees(&scratch, "cow.qcow2");
    let allocated = |name: &str| {
        let (report, _) = oracle::check(scratch.join(name), "qcow2");
        report["allocated-clusters"].as_u64().unwrap_or(0)
    };
    assert!(
        allocated("cow.qcow2") <= allocated("their-cow.qcow2"),
        "-B copies what the base has"
    );

    // Over another base, a source without one is copied whole.
    ours(&scratch)
        .words("convert -f raw -O qcow2 -B lower.qcow2 -F qcow2 disk.raw whole.qcow2")
        .ok();
    oracle::assert_clean(scratch.join("whole.qcow2"), "qcow2");
    oracle::assert_identical(
        scratch.join("disk.raw"),
        "raw",
        scratch.join("whole.qcow2"),
        "qcow2",
    );
}

macro_rules! chains {
    ($($name:ident: $base:expr, $flags:expr, $options:expr, $size:expr;)*) => {$(
        #[test]
        fn $name() {
            chain($base, $flags, $options, $size);
        }
    )*};
}

chains! {
    chain__raw: "raw", "", "", "";
    chain__qcow2: "qcow2", "", "", "";
    chain__qcow2_v2: "qcow2", "-o compat=0.10", "compat=0.10", "";
    chain__compressed_zlib: "qcow2", "-c", "", "";
    chain__compressed_zstd: "qcow2", "-c -o compression_type=zstd", "", "";
    chain__raw__longer_overlay: "raw", "", "", "5M";
    chain__qcow2__longer_overlay: "qcow2", "", "", "5M";
    chain__raw__shorter_overlay: "raw", "", "", "1536k";
    chain__qcow2__shorter_overlay: "qcow2", "-c", "", "1536k";
    chain__qcow2__longer_overlay_v2: "qcow2", "", "compat=0.10", "5M";
    chain__small_clusters_over_large: "qcow2", "-o cluster_size=2M", "cluster_size=512", "";
    chain__large_clusters_over_small: "qcow2", "-o cluster_size=512", "cluster_size=2M", "";
    chain__extended_l2: "qcow2", "", "extended_l2=on,cluster_size=128k", "";
    chain__extended_l2__longer_overlay: "raw", "", "extended_l2=on", "5M";
    chain__extended_l2__preallocated: "raw", "", "extended_l2=on,preallocation=metadata", "";
    chain__data_file: "raw", "", "data_file=DATA", "";
}

#[test]
fn chain__deep() {
    let scratch = Scratch::new();
    base(&scratch, "raw", "");
    let mut below = ("base.raw".to_owned(), "raw");
    for depth in 0..40 {
        let name = format!("{depth}.qcow2");
        theirs(&scratch)
            .words(&format!(
                "create -q -f qcow2 -b {} -F {} {name}",
                below.0, below.1
            ))
            .ok();
        oracle::io(
            scratch.join(&name),
            "qcow2",
            [format!("write -P {} {}k 1k", depth + 1, depth * 40)],
        );
        below = (name, "qcow2");
    }
    assert_chain_agrees(&scratch, &below.0);
}

#[test]
fn chain__relative_names_are_relative_to_the_overlay() {
    let scratch = Scratch::new();
    base(&scratch, "raw", "");
    std::fs::create_dir(scratch.join("sub")).unwrap();
    ours(&scratch)
        .words("create -f qcow2 -b ../base.raw -F raw sub/o.qcow2")
        .ok();
    assert_chain_agrees(&scratch, "sub/o.qcow2");
    oracle::assert_identical(
        scratch.join("base.raw"),
        "raw",
        scratch.join("sub/o.qcow2"),
        "qcow2",
    );
}

#[test]
fn chain__create_refuses_what_qemu_refuses() {
    let scratch = Scratch::new();
    base(&scratch, "qcow2", "");
    for words in [
        "create -f qcow2 -b base.qcow2 o.qcow2",
        "create -f qcow2 -b missing.qcow2 -F qcow2 o.qcow2",
        "create -f qcow2 -b base.qcow2 -F nonesuch o.qcow2",
        "create -f raw -b base.qcow2 -F qcow2 o.raw",
        "create -f qcow2 o.qcow2",
        "create -f qcow2 -o nonesuch=1 o.qcow2 1M",
    ] {
        same(&scratch, words);
    }
    for words in [
        "create -f qcow2 -o cluster_size=3k o.qcow2 1M",
        "create -f qcow2 o.qcow2 1e6",
    ] {
        refused(&scratch, words);
    }
    // Without opening the backing file nothing of it is needed but the size.
    same(
        &scratch,
        "create -f qcow2 -u -b missing.qcow2 -F qcow2 o.qcow2 1M",
    );
    same(&scratch, "create -f qcow2 -u -b missing.qcow2 -F qcow2 o.qcow2");
}

#[test]
fn chain__missing_backing_file_is_named() {
    let scratch = Scratch::new();
    theirs(&scratch)
        .words("create -q -f qcow2 -u -b missing.qcow2 -F qcow2 o.qcow2 1M")
        .ok();
    same_json(&scratch, "info --output=json -f qcow2 o.qcow2");
    for words in [
        "info --backing-chain -f qcow2 o.qcow2",
        "map -f qcow2 o.qcow2",
        "convert -f qcow2 -O raw o.qcow2 x.raw",
    ] {
        same(&scratch, words);
    }
}
