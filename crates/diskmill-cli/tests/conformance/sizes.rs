//! Disks of odd sizes.

use diskmill_testkit::sparse_random::SparseRandom;
use diskmill_testkit::{Scratch, oracle, scratch};

use crate::agree::assert_agree;
use crate::tools::{ours, refused, same, same_json};

/// A raw file of `size` bytes through qcow2 and back.
fn through_qcow2(size: u64, options: &str, flags: &str) {
    let scratch = Scratch::new();
    let disk = SparseRandom::new(size, size);
    disk.write_raw(scratch.join("disk.raw"));
    assert_agree(&scratch, "disk.raw", "raw");
    let with = if options.is_empty() {
        String::new()
    } else {
        format!("-o {options}")
    };
    ours(&scratch)
        .words(&format!(
            "convert {flags} -f raw -O qcow2 {with} disk.raw a.qcow2"
        ))
        .ok();
    oracle::assert_clean(scratch.join("a.qcow2"), "qcow2");
    oracle::assert_identical(scratch.join("disk.raw"), "raw", scratch.join("a.qcow2"), "qcow2");
    assert_agree(&scratch, "a.qcow2", "qcow2");
    ours(&scratch)
        .words("convert -f qcow2 -O raw a.qcow2 back.raw")
        .ok();
    disk.assert_raw(scratch.join("back.raw"));
    assert_eq!(scratch::len(scratch.join("back.raw")), size.next_multiple_of(512));
    ours(&scratch)
        .words("convert -f raw -O raw disk.raw copy.raw")
        .ok();
    disk.assert_raw(scratch.join("copy.raw"));
    same(&scratch, "compare -f raw -F qcow2 disk.raw a.qcow2");
}

macro_rules! sizes {
    ($($name:ident: $size:expr, $options:expr, $flags:expr;)*) => {$(
        #[test]
        fn $name() {
            through_qcow2($size, $options, $flags);
        }
    )*};
}

sizes! {
    size__1: 1, "", "";
    size__511: 511, "", "";
    size__512: 512, "", "";
    size__513: 513, "", "";
    size__1__zlib: 1, "", "-c";
    size__513__zlib: 513, "", "-c";
    size__513__zstd__cluster_512: 513, "compression_type=zstd,cluster_size=512", "-c";
    size__511__cluster_2m: 511, "cluster_size=2M", "";
    size__one_cluster_less_1: 65535, "", "";
    size__one_cluster: 65536, "", "";
    size__one_cluster_and_1: 65537, "", "";
    size__one_cluster_and_1__zlib: 65537, "", "-c";
    size__one_cluster_less_512: 65024, "", "";
    size__one_l2_table__cluster_512: 32768, "cluster_size=512", "";
    size__one_l2_table_and_1__cluster_512: 32769, "cluster_size=512", "";
    size__one_l2_table_less_1__cluster_512: 32767, "cluster_size=512", "-c";
    size__extended_l2__one_subcluster_and_1: 513, "extended_l2=on,cluster_size=16k", "";
}

#[test]
fn size__0() {
    let scratch = Scratch::new();
    scratch.file("disk.raw", b"");
    assert_agree(&scratch, "disk.raw", "raw");
    ours(&scratch)
        .words("convert -f raw -O qcow2 disk.raw a.qcow2")
        .ok();
    oracle::assert_clean(scratch.join("a.qcow2"), "qcow2");
    assert_agree(&scratch, "a.qcow2", "qcow2");
    ours(&scratch)
        .words("convert -f qcow2 -O raw a.qcow2 back.raw")
        .ok();
    assert_eq!(scratch::len(scratch.join("back.raw")), 0);
}

/// A raw file of over 2 TiB that is nearly all hole: a few bytes here and there, one at the very end.
fn huge(flags: &str, options: &str) {
    const SIZE: u64 = (2 << 40) + (5 << 30) + 512;
    let scratch = Scratch::new();
    let path = scratch.hole("disk.raw", SIZE);
    for (at, byte) in [
        (0, 1),
        (1 << 31, 2),
        ((1 << 40) + 4096, 3),
        (2 << 40, 4),
        (SIZE - 512, 5),
    ] {
        scratch::patch(&path, at, &[byte; 512]);
    }
    ours(&scratch)
        .words(&format!(
            "convert {flags} -f raw -O qcow2 {options} disk.raw a.qcow2"
        ))
        .ok();
    oracle::assert_clean(scratch.join("a.qcow2"), "qcow2");
    same_json(&scratch, "info --output=json -f qcow2 a.qcow2");
    same_json(&scratch, "map --output=json -f qcow2 a.qcow2");
    same_json(&scratch, "map --output=json -f raw disk.raw");
    same(&scratch, "check -f qcow2 a.qcow2");
    same(&scratch, "compare -f raw -F qcow2 disk.raw a.qcow2");
    ours(&scratch)
        .words("convert -f qcow2 -O raw a.qcow2 back.raw")
        .ok();
    assert_eq!(scratch::len(scratch.join("back.raw")), SIZE);
    assert!(scratch::allocated(scratch.join("back.raw")) < 16 << 20);
    oracle::assert_identical(&path, "raw", scratch.join("back.raw"), "raw");
}

#[test]
fn size__over_2_tib() {
    huge("", "");
}

#[test]
fn size__over_2_tib__zlib__cluster_2m() {
    huge("-c", "-o cluster_size=2M");
}

#[test]
fn size__over_2_tib__extended_l2() {
    huge("", "-o extended_l2=on");
}

#[test]
fn size__the_largest_disk_of_512_byte_clusters() {
    let scratch = Scratch::new();
    same(&scratch, "create -f qcow2 -o cluster_size=512 a.qcow2 128G");
    oracle::assert_clean(scratch.join("a.qcow2"), "qcow2");
    refused(&scratch, "create -f qcow2 -o cluster_size=512 b.qcow2 129G");
    same(&scratch, "create -f qcow2 c.qcow2 2P");
    refused(&scratch, "create -f qcow2 d.qcow2 3P");
}

#[test]
fn size__resized_both_ways() {
    let scratch = Scratch::new();
    let disk = SparseRandom::new(5, (1 << 20) + 512);
    disk.write_raw(scratch.join("disk.raw"));
    for options in [
        "",
        "-o cluster_size=512",
        "-o compat=0.10",
        "-o extended_l2=on",
        "-o refcount_bits=1,cluster_size=4k",
    ] {
        ours(&scratch)
            .words(&format!("convert -f raw -O qcow2 {options} disk.raw a.qcow2"))
            .ok();
        std::fs::copy(scratch.join("a.qcow2"), scratch.join("b.qcow2")).unwrap();
        for size in ["+1M", "+512", "100M", "+3G"] {
            let our = ours(&scratch)
                .words(&format!("resize -f qcow2 a.qcow2 {size}"))
                .ok();
            let their = oracle::qemu_img()
                .dir(scratch.path())
                .words(&format!("resize -f qcow2 b.qcow2 {size}"))
                .ok();
            assert_eq!((our.out(), our.err()), (their.out(), their.err()));
            oracle::assert_clean(scratch.join("a.qcow2"), "qcow2");
            assert_agree(&scratch, "a.qcow2", "qcow2");
            oracle::assert_identical(scratch.join("a.qcow2"), "qcow2", scratch.join("b.qcow2"), "qcow2");
        }
        oracle::io(
            scratch.join("a.qcow2"),
            "qcow2",
            ["write -P 9 50M 1M", "read -P 0 60M 1M"],
        );
        oracle::assert_clean(scratch.join("a.qcow2"), "qcow2");
    }
    for words in [
        "resize -f raw disk.raw 5000000",
        "resize -f raw disk.raw +1",
        "resize -f raw disk.raw 1M",
        "resize --shrink -f raw disk.raw 1M",
        "resize --shrink -f raw disk.raw -512",
        "resize -f raw --preallocation=metadata disk.raw +1M",
        "resize -f raw disk.raw x",
        "resize -f qcow2 a.qcow2 1M",
    ] {
        let copy = |to: &str| std::fs::copy(scratch.join("disk.raw"), scratch.join(to)).unwrap();
        copy("keep.raw");
        let our = ours(&scratch).words(words).finish();
        let len = scratch::len(scratch.join("disk.raw"));
        std::fs::copy(scratch.join("keep.raw"), scratch.join("disk.raw")).unwrap();
        let their = oracle::qemu_img().dir(scratch.path()).words(words).finish();
        assert_eq!(
            (our.code, our.out(), our.err(), len),
            (
                their.code,
                their.out(),
                their.err(),
                scratch::len(scratch.join("disk.raw"))
            ),
            "{words}"
        );
    }
}
