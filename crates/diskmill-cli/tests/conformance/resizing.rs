//! Changing the size of images that have more than a disk in them: snapshots, bitmaps, a backing image, a data file.

use crate::amend::{IMAGE, Pair, Setup};

/// Each change on an image of its own.
fn each(create: &str, setup: Setup, changes: &[&str]) {
    for change in changes {
        let (flags, size) = change.rsplit_once(' ').unwrap_or(("", change));
        Pair::new(create, setup).both(&format!("resize -f qcow2 {flags} {IMAGE} {size}"));
    }
}

const MODES: [&str; 4] = [
    "--preallocation=off +8M",
    "--preallocation=metadata +8M",
    "--preallocation=falloc +8M",
    "--preallocation=full +8M",
];

#[test]
fn resize__with_snapshots() {
    let setup: Setup = &[
        "write -P 1 0 1M",
        "write -z 2M 1M",
        "write -P 1 7M 1M",
        "img snapshot -c one image.qcow2",
        "write -P 4 6M 1M",
    ];
    each(
        "image.qcow2 8M",
        setup,
        &["+8M", "--shrink 4M", "--shrink -2M", "8M"],
    );
    each("image.qcow2 8M", setup, &MODES);
    each("-o extended_l2=on image.qcow2 8M", setup, &["--shrink 4M"]);
    each("-o extended_l2=on image.qcow2 8M", setup, &MODES);
    each(
        "-o cluster_size=512 image.qcow2 8M",
        setup,
        &["+20M", "--shrink 100k"],
    );
}

#[test]
fn resize__refused_alike() {
    let setup: Setup = &["write -P 1 0 1M", "img snapshot -c one image.qcow2"];
    each(
        "image.qcow2 8M",
        setup,
        &[
            "4M",
            "+1",
            "0",
            "--shrink -100G",
            "--shrink 7340033",
            "16777217",
            "8388608T",
            "--preallocation=bogus +1M",
            "--shrink --preallocation=full 4M",
            "--preallocation=metadata 16777217",
        ],
    );
    each(
        "-o compat=0.10 image.qcow2 8M",
        setup,
        &["+8M", "--shrink 4M", "8M"],
    );
}

#[test]
fn resize__with_bitmaps() {
    let setup: Setup = &[
        "img bitmap --add image.qcow2 on",
        "img bitmap --add -g 4k --disable image.qcow2 off",
        "write -P 1 0 1M",
        "write 7M 1M",
    ];
    each("image.qcow2 8M", setup, &["+8M", "--shrink 4M", "+300M"]);
    each("image.qcow2 8M", setup, &MODES);
}

#[test]
fn resize__over_a_backing_image() {
    let setup: Setup = &["write -P 1 0 300k"];
    for options in ["-o compat=1.1", "-o extended_l2=on"] {
        let create = format!("{options} -b base.raw -F raw image.qcow2 512k");
        each(&create, setup, &["+100k", "+40M", "--shrink 256k"]);
        each(&create, setup, &MODES);
    }
}

#[test]
fn resize__with_a_data_file() {
    let setup: Setup = &["write -P 1 0 1M"];
    for create in [
        "-o data_file=image.data image.qcow2 8M",
        "-o data_file=image.data,data_file_raw=on image.qcow2 8M",
        "-o compat=0.10 image.qcow2 8M",
    ] {
        each(create, setup, &["--shrink 4M"]);
        each(create, setup, &MODES);
    }
}
