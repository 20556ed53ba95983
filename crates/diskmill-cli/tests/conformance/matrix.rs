//! Every way a qcow2 can be laid out, both ways.
//!
//! A cell makes the same disk with both commands. What we write `qemu-img check` must call clean and `qemu-img
//! compare` identical; what `qemu-img` writes and `qemu-io` changes afterwards we must read to the same bytes; and
//! of every image both must say the same.

use diskmill_testkit::sparse_random::SparseRandom;
use diskmill_testkit::{Scratch, hash, oracle};

use crate::agree::assert_agree;
use crate::tools::{ours, theirs};

/// A bit over 3 MiB, no multiple of any cluster size.
const SIZE: u64 = (3 << 20) + 4096 + 512;

/// What `qemu-io` does to an image of theirs before we read it: data over data, over zeros and over holes, across
/// clusters and within, zeros of both sorts, discards.
const CHANGES: [&str; 10] = [
    "write -P 1 0 512",
    "write -P 2 100k 70k",
    "write -P 3 1023k 2k",
    "write -z 200k 64k",
    "write -z -u 512k 256k",
    "write -P 4 210k 1k",
    "discard 1536k 128k",
    "write -P 5 1600k 4k",
    "write -P 6 2560k 256k",
    "write -z 3145728 512",
];

fn cell(options: &str, flags: &str) {
    let scratch = Scratch::new();
    let seed = options
        .bytes()
        .fold(7, |seed: u64, byte| seed.wrapping_mul(31) + u64::from(byte));
    let disk = SparseRandom::new(seed, SIZE);
    disk.write_raw(scratch.join("disk.raw"));

    let convert =
        |options: &str, target: &str| format!("convert {flags} -f raw -O qcow2 {options} disk.raw {target}");
    let with = |data: &str| match options {
        "" => String::new(),
        _ => format!("-o {}", options.replace("DATA", data)),
    };

    ours(&scratch)
        .words(&convert(&with("ours.data"), "ours.qcow2"))
        .ok();
    oracle::assert_clean(scratch.join("ours.qcow2"), "qcow2");
    oracle::assert_identical(
        scratch.join("disk.raw"),
        "raw",
        scratch.join("ours.qcow2"),
        "qcow2",
    );
    assert_agree(&scratch, "ours.qcow2", "qcow2");
    read_back(&scratch, "ours.qcow2", &disk);

    theirs(&scratch)
        .words(&convert(&with("theirs.data"), "theirs.qcow2"))
        .ok();
    assert_agree(&scratch, "theirs.qcow2", "qcow2");
    read_back(&scratch, "theirs.qcow2", &disk);
    ours(&scratch)
        .words("compare -f qcow2 -F qcow2 ours.qcow2 theirs.qcow2")
        .ok();

    oracle::io(scratch.join("theirs.qcow2"), "qcow2", CHANGES);
    assert_agree(&scratch, "theirs.qcow2", "qcow2");
    read_as_qemu(&scratch, "theirs.qcow2");
    oracle::io(scratch.join("ours.qcow2"), "qcow2", CHANGES);
    oracle::assert_clean(scratch.join("ours.qcow2"), "qcow2");
    oracle::assert_identical(
        scratch.join("theirs.qcow2"),
        "qcow2",
        scratch.join("ours.qcow2"),
        "qcow2",
    );
    read_as_qemu(&scratch, "ours.qcow2");

    made_empty(&scratch, &with("empty-ours.data"), &with("empty-theirs.data"));
}

/// Both create an empty image of the same layout; ours must then hold what `qemu-io` writes to it.
fn made_empty(scratch: &Scratch, ours_with: &str, theirs_with: &str) {
    let create = |with: &str, name: &str| format!("create -f qcow2 {with} {name} {SIZE}");
    let our = ours(scratch).words(&create(ours_with, "empty-ours.qcow2")).ok();
    let their = theirs(scratch)
        .words(&create(theirs_with, "empty-theirs.qcow2"))
        .ok();
    assert_eq!(
        our.out().replace("empty-ours", "X"),
        their.out().replace("empty-theirs", "X")
    );
    oracle::assert_clean(scratch.join("empty-ours.qcow2"), "qcow2");
    assert_agree(scratch, "empty-ours.qcow2", "qcow2");
    assert_agree(scratch, "empty-theirs.qcow2", "qcow2");
    oracle::assert_identical(
        scratch.join("empty-ours.qcow2"),
        "qcow2",
        scratch.join("empty-theirs.qcow2"),
        "qcow2",
    );
    oracle::io(scratch.join("empty-ours.qcow2"), "qcow2", CHANGES);
    oracle::io(scratch.join("empty-theirs.qcow2"), "qcow2", CHANGES);
    oracle::assert_clean(scratch.join("empty-ours.qcow2"), "qcow2");
    read_as_qemu(scratch, "empty-ours.qcow2");
    ours(scratch)
        .words("compare -f qcow2 -F qcow2 empty-ours.qcow2 empty-theirs.qcow2")
        .ok();
}

/// We convert `name` back to raw, and it must be `disk`.
fn read_back(scratch: &Scratch, name: &str, disk: &SparseRandom) {
    ours(scratch)
        .words(&format!("convert -f qcow2 -O raw {name} back.raw"))
        .ok();
    disk.assert_raw(scratch.join("back.raw"));
}

/// We convert `name` to raw, and it must be what `qemu-img` makes of it.
fn read_as_qemu(scratch: &Scratch, name: &str) {
    ours(scratch)
        .words(&format!("convert -f qcow2 -O raw {name} changed.raw"))
        .ok();
    assert_eq!(
        hash::sha256_file(scratch.join("changed.raw")),
        oracle::guest_sha256(scratch.join(name), "qcow2"),
        "{name} reads otherwise"
    );
}

macro_rules! cells {
    ($($name:ident: $options:expr, $flags:expr;)*) => {$(
        #[test]
        fn $name() {
            cell($options, $flags);
        }
    )*};
}

cells! {
    qcow2__v3__default: "", "";
    qcow2__v2__default: "compat=0.10", "";
    qcow2__v2__cluster_512: "compat=0.10,cluster_size=512", "";
    qcow2__v2__cluster_4k: "compat=0.10,cluster_size=4k", "";
    qcow2__v2__cluster_2m: "compat=0.10,cluster_size=2M", "";
    qcow2__v3__cluster_512: "cluster_size=512", "";
    qcow2__v3__cluster_1k: "cluster_size=1k", "";
    qcow2__v3__cluster_2k: "cluster_size=2k", "";
    qcow2__v3__cluster_4k: "cluster_size=4k", "";
    qcow2__v3__cluster_8k: "cluster_size=8k", "";
    qcow2__v3__cluster_16k: "cluster_size=16k", "";
    qcow2__v3__cluster_32k: "cluster_size=32k", "";
    qcow2__v3__cluster_128k: "cluster_size=128k", "";
    qcow2__v3__cluster_256k: "cluster_size=256k", "";
    qcow2__v3__cluster_512k: "cluster_size=512k", "";
    qcow2__v3__cluster_1m: "cluster_size=1M", "";
    qcow2__v3__cluster_2m: "cluster_size=2M", "";

    qcow2__refcount_1: "refcount_bits=1", "";
    qcow2__refcount_2: "refcount_bits=2", "";
    qcow2__refcount_4: "refcount_bits=4", "";
    qcow2__refcount_8: "refcount_bits=8", "";
    qcow2__refcount_32: "refcount_bits=32", "";
    qcow2__refcount_64: "refcount_bits=64", "";
    qcow2__refcount_1__cluster_512: "refcount_bits=1,cluster_size=512", "";
    qcow2__refcount_64__cluster_512: "refcount_bits=64,cluster_size=512", "";
    qcow2__refcount_2__cluster_4k: "refcount_bits=2,cluster_size=4k", "";

    qcow2__zlib__cluster_64k: "", "-c";
    qcow2__zlib__v2: "compat=0.10", "-c";
    qcow2__zlib__cluster_512: "cluster_size=512", "-c";
    qcow2__zlib__v2__cluster_512: "compat=0.10,cluster_size=512", "-c";
    qcow2__zlib__cluster_1k: "cluster_size=1k", "-c";
    qcow2__zlib__cluster_4k: "cluster_size=4k", "-c";
    qcow2__zlib__cluster_16k: "cluster_size=16k", "-c";
    qcow2__zlib__cluster_256k: "cluster_size=256k", "-c";
    qcow2__zlib__cluster_2m: "cluster_size=2M", "-c";
    qcow2__zlib__refcount_1: "refcount_bits=1", "-c";
    qcow2__zlib__refcount_2: "refcount_bits=2", "-c";
    qcow2__zlib__refcount_4__cluster_2m: "refcount_bits=4,cluster_size=2M", "-c";
    qcow2__zlib__refcount_64: "refcount_bits=64", "-c";
    qcow2__zlib__refcount_1__cluster_512: "refcount_bits=1,cluster_size=512", "-c";

    qcow2__zstd__cluster_64k: "compression_type=zstd", "-c";
    qcow2__zstd__uncompressed: "compression_type=zstd", "";
    qcow2__zstd__cluster_512: "compression_type=zstd,cluster_size=512", "-c";
    qcow2__zstd__cluster_4k: "compression_type=zstd,cluster_size=4k", "-c";
    qcow2__zstd__cluster_32k: "compression_type=zstd,cluster_size=32k", "-c";
    qcow2__zstd__cluster_1m: "compression_type=zstd,cluster_size=1M", "-c";
    qcow2__zstd__cluster_2m: "compression_type=zstd,cluster_size=2M", "-c";
    qcow2__zstd__refcount_1: "compression_type=zstd,refcount_bits=1", "-c";
    qcow2__zstd__refcount_8: "compression_type=zstd,refcount_bits=8", "-c";

    qcow2__extended_l2__cluster_16k: "extended_l2=on,cluster_size=16k", "";
    qcow2__extended_l2__cluster_64k: "extended_l2=on", "";
    qcow2__extended_l2__cluster_128k: "extended_l2=on,cluster_size=128k", "";
    qcow2__extended_l2__cluster_2m: "extended_l2=on,cluster_size=2M", "";
    qcow2__extended_l2__zlib: "extended_l2=on", "-c";
    qcow2__extended_l2__zstd: "extended_l2=on,compression_type=zstd,cluster_size=32k", "-c";
    qcow2__extended_l2__refcount_1: "extended_l2=on,refcount_bits=1", "";
    qcow2__extended_l2__preallocation_metadata: "extended_l2=on,preallocation=metadata", "";
    qcow2__extended_l2__preallocation_falloc: "extended_l2=on,preallocation=falloc", "";

    qcow2__lazy_refcounts: "lazy_refcounts=on", "";
    qcow2__lazy_refcounts__zlib: "lazy_refcounts=on", "-c";

    qcow2__preallocation_metadata: "preallocation=metadata", "";
    qcow2__preallocation_falloc: "preallocation=falloc", "";
    qcow2__preallocation_full: "preallocation=full", "";
    qcow2__preallocation_metadata__v2: "preallocation=metadata,compat=0.10", "";
    qcow2__preallocation_metadata__cluster_512: "preallocation=metadata,cluster_size=512", "";
    qcow2__preallocation_full__cluster_2m: "preallocation=full,cluster_size=2M", "";
    qcow2__preallocation_falloc__refcount_64: "preallocation=falloc,refcount_bits=64,cluster_size=4k", "";

    qcow2__data_file: "data_file=DATA", "";
    qcow2__data_file_raw: "data_file=DATA,data_file_raw=on", "";
    qcow2__data_file__cluster_4k: "data_file=DATA,cluster_size=4k", "";
    qcow2__data_file__extended_l2: "data_file=DATA,extended_l2=on", "";
    qcow2__data_file_raw__extended_l2: "data_file=DATA,data_file_raw=on,extended_l2=on", "";
    qcow2__data_file__preallocation_metadata: "data_file=DATA,preallocation=metadata", "";
    qcow2__data_file_raw__preallocation_full: "data_file=DATA,data_file_raw=on,preallocation=full", "";
}
