//! Data in encrypted qcow2 images: what one tool writes the other reads, whatever is done to it in between.

use std::path::Path;

use diskmill_testkit::{Run, Scratch, oracle};

use crate::tools::{native, ours, theirs};

const SECRETS: &str = "--object secret,id=key,data=correct-horse --object secret,id=two,data=another";
const LUKS: &str = "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=1";
const AES: &str = "encrypt.format=aes,encrypt.key-secret=key";
const LOCKED: &str = "qcow2+key";

fn pattern(len: usize) -> Vec<u8> {
    (0..len)
        .map(|at| {
            if at / 40_000 % 3 == 1 {
                0
            } else {
                (at / 700 % 250) as u8 + 1
            }
        })
        .collect()
}

fn opts(dir: &Scratch, name: &str) -> String {
    oracle::image_opts(&dir.join(name), LOCKED)
}

/// A command on an encrypted image, named last.
fn on(run: Run, words: &str, opts: &str) -> Run {
    run.words(words).words(SECRETS).args(["--image-opts", opts])
}

/// Demands that both tools find the image sound and read `expected` from it.
#[track_caller]
fn reads(dir: &Scratch, opts: &str, expected: &[u8]) {
    for (name, run) in [("ours", ours(dir)), ("theirs", theirs(dir))] {
        on(run, "convert -O raw", opts).arg("out.raw").ok();
        assert!(std::fs::read(dir.join("out.raw")).unwrap() == expected, "{name}");
    }
    on(theirs(dir), "check", opts).ok();
    on(ours(dir), "check", opts).ok();
}

fn write(dir: &Scratch, opts: &str, disk: &mut [u8], at: usize, len: usize, fill: u8) {
    let io = Run::new("qemu-io").dir(dir.path());
    let command = format!("write -P {fill} {at} {len}");
    io.words(SECRETS)
        .args(["-c", &command, "--image-opts", opts])
        .ok();
    disk[at..at + len].fill(fill);
}

#[test]
fn qcow2__luks__every_cipher_is_read_and_written_by_both() {
    let dir = Scratch::new();
    let mut disk = pattern((1 << 20) + 512);
    dir.file("disk.raw", &disk);
    for (options, extra) in [
        ("encrypt.cipher-alg=aes-256", ""),
        (
            "encrypt.cipher-alg=aes-128,encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv",
            ",extended_l2=on",
        ),
        (
            "encrypt.cipher-alg=aes-192,encrypt.ivgen-alg=plain,encrypt.hash-alg=sha1",
            ",cluster_size=512",
        ),
        (
            "encrypt.cipher-alg=serpent-256,encrypt.cipher-mode=ctr,encrypt.hash-alg=sha512",
            ",compat=0.10",
        ),
        (
            "encrypt.cipher-alg=twofish-128,encrypt.cipher-mode=ecb,encrypt.hash-alg=ripemd160",
            ",preallocation=metadata",
        ),
        (
            "encrypt.cipher-alg=cast5-128,encrypt.cipher-mode=cbc,encrypt.ivgen-alg=plain64",
            ",cluster_size=4k",
        ),
    ] {
        let opts = opts(&dir, "i.qcow2");
        ours(&dir)
            .words("convert -O qcow2")
            .words(SECRETS)
            .args(["-o", &format!("{LUKS},{options}{extra}"), "disk.raw", "i.qcow2"])
            .ok();
        reads(&dir, &opts, &disk);
        let now = &mut disk.clone();
        write(&dir, &opts, now, 70_000, 3000, 7);
        write(&dir, &opts, now, 1 << 20, 512, 9);
        dir.file("now.raw", now);
        reads(&dir, &opts, now);
    }
    // The other way round, once: qemu-img takes seconds to make a key.
    theirs(&dir)
        .words("convert -O qcow2")
        .words(SECRETS)
        .args(["-o", LUKS, "disk.raw", "i.qcow2"])
        .ok();
    let opts = opts(&dir, "i.qcow2");
    reads(&dir, &opts, &disk);
    disk[300_000..300_700].fill(3);
    dir.file("now.raw", &disk);
    ours(&dir)
        .words("convert -n --target-image-opts --image-opts")
        .words(SECRETS)
        .args([&oracle::image_opts(&dir.join("now.raw"), "raw"), &opts])
        .ok();
    reads(&dir, &opts, &disk);
}

#[test]
fn qcow2__encrypted__snapshots_sizes_versions_and_compacting() {
    for options in [LUKS, AES] {
        let dir = Scratch::new();
        let opts = opts(&dir, "i.qcow2");
        let mut disk = pattern(700 << 10);
        dir.file("disk.raw", &disk);
        dir.file("pass", b"correct-horse");
        ours(&dir)
            .words("convert -O qcow2")
            .words(SECRETS)
            .args(["-o", &format!("{options},cluster_size=4k"), "disk.raw", "i.qcow2"])
            .ok();
        on(ours(&dir), "snapshot -c one", &opts).ok();
        let first = disk.clone();
        write(&dir, &opts, &mut disk, 5000, 9000, 1);
        on(theirs(&dir), "snapshot -c two", &opts).ok();
        write(&dir, &opts, &mut disk, 200_000, 100, 2);
        reads(&dir, &opts, &disk);
        for (name, run) in [("ours", ours(&dir)), ("theirs", theirs(&dir))] {
            on(run, "convert -O raw -l one", &opts).arg("one.raw").ok();
            assert!(std::fs::read(dir.join("one.raw")).unwrap() == first, "{name}");
        }
        // All of it again, with its snapshots, under another passphrase.
        native(&dir)
            .words("convert --keep-snapshots --passphrase-file pass -O qcow2")
            .words(SECRETS)
            .args([
                "-o",
                &options.replace("secret=key", "secret=two"),
                "i.qcow2",
                "kept.qcow2",
            ])
            .ok();
        let kept = opts
            .replace("i.qcow2", "kept.qcow2")
            .replace("secret=key", "secret=two");
        reads(&dir, &kept, &disk);
        on(theirs(&dir), "convert -O raw -l one", &kept)
            .arg("one.raw")
            .ok();
        assert!(std::fs::read(dir.join("one.raw")).unwrap() == first);

        on(ours(&dir), "snapshot -d two", &opts).ok();
        native(&dir).words("compact --passphrase-file pass i.qcow2").ok();
        reads(&dir, &opts, &disk);
        on(ours(&dir), "snapshot -a one", &opts).ok();
        disk = first;
        on(ours(&dir), "snapshot -d one", &opts).ok();
        native(&dir).words("compact --passphrase-file pass i.qcow2").ok();
        reads(&dir, &opts, &disk);
        on(ours(&dir), "resize -q --shrink", &opts).arg("500.5k").ok();
        disk.truncate(500 * 1024 + 512);
        on(ours(&dir), "resize -q --preallocation=metadata", &opts)
            .arg("900k")
            .ok();
        disk.resize(900 << 10, 0);
        reads(&dir, &opts, &disk);
        // Zeros that version 2 cannot say are encrypted.
        on(ours(&dir), "amend -o compat=0.10", &opts).ok();
        reads(&dir, &opts, &disk);
        on(ours(&dir), "amend -o compat=1.1,lazy_refcounts=on", &opts).ok();
        reads(&dir, &opts, &disk);
    }
}

#[test]
fn qcow2__encrypted__chains_of_plain_and_encrypted_images() {
    let dir = Scratch::new();
    let base = pattern(600 << 10);
    dir.file("base.raw", &base);
    let make = |command: &str, words: &str| ours(&dir).words(command).words(SECRETS).words(words);
    make("convert", "-O qcow2 base.raw plain.qcow2").ok();
    make("convert", "-O qcow2 -o")
        .args([AES, "base.raw", "locked.qcow2"])
        .ok();
    let over = format!("{LUKS},encrypt.cipher-alg=aes-128,cluster_size=16k");
    for below in ["plain", "locked"] {
        make("create", "-q -f qcow2 -F qcow2 -u -b")
            .args([&format!("{below}.qcow2"), "-o", &over, "top.qcow2", "700k"])
            .ok();
        let mut top = opts(&dir, "top.qcow2");
        if below == "locked" {
            let name = dir.join("locked.qcow2");
            top += &format!(
                ",backing.driver=qcow2,backing.file.filename={},backing.encrypt.key-secret=key",
                name.display()
            );
        }
        let mut disk = base.clone();
        disk.resize(700 << 10, 0);
        reads(&dir, &top, &disk);
        write(&dir, &top, &mut disk, 100_000, 700, 5);
        write(&dir, &top, &mut disk, 599 << 10, 2048, 6);
        reads(&dir, &top, &disk);
        if below == "plain" {
            std::fs::copy(dir.join("top.qcow2"), dir.join("merged.qcow2")).unwrap();
            let merged = opts(&dir, "merged.qcow2");
            on(ours(&dir), "rebase", &merged).args(["-b", ""]).ok();
            reads(&dir, &merged, &disk);
            on(ours(&dir), "commit", &top).ok();
            assert_same(&dir.join("plain.qcow2"), &dir, &disk);
        }
    }
    // A plain image over an encrypted one, whose key is named for it.
    make(
        "create",
        "-q -f qcow2 -F qcow2 -u -b locked.qcow2 open.qcow2 600k",
    )
    .ok();
    let open = format!(
        "driver=qcow2,file.filename={},backing.driver=qcow2,backing.file.filename={},backing.encrypt.key-secret=key",
        dir.join("open.qcow2").display(),
        dir.join("locked.qcow2").display()
    );
    let mut disk = base;
    write(&dir, &open, &mut disk, 300, 5000, 8);
    reads(&dir, &open, &disk);
    on(ours(&dir), "commit", &open).ok();
    reads(&dir, &opts(&dir, "locked.qcow2"), &disk);
}

/// Demands that a plain qcow2 image reads as `disk`.
#[track_caller]
fn assert_same(image: &Path, dir: &Scratch, disk: &[u8]) {
    let raw = dir.file("expected.raw", disk);
    oracle::assert_clean(image, "qcow2");
    oracle::assert_identical(image, "qcow2", raw, "raw");
}

#[test]
fn qcow2__luks__keys_are_added_and_erased_by_either() {
    let dir = Scratch::new();
    let opts = opts(&dir, "i.qcow2");
    let disk = pattern(200 << 10);
    dir.file("disk.raw", &disk);
    ours(&dir)
        .words("convert -O qcow2")
        .words(SECRETS)
        .args(["-o", LUKS, "disk.raw", "i.qcow2"])
        .ok();
    let second = opts.replace("secret=key", "secret=two");
    let add = "encrypt.state=active,encrypt.new-secret=two,encrypt.iter-time=1";
    let erase = "encrypt.state=inactive,encrypt.old-secret=two";
    on(ours(&dir), "amend", &opts).args(["-o", add]).ok();
    reads(&dir, &second, &disk);
    on(theirs(&dir), "amend", &opts).args(["-o", erase]).ok();
    assert_eq!(on(ours(&dir), "check", &second).finish().code, Some(1));
    on(theirs(&dir), "amend", &opts).args(["-o", add]).ok();
    reads(&dir, &second, &disk);
    on(ours(&dir), "amend", &second)
        .args(["-o", "encrypt.state=inactive,encrypt.keyslot=0"])
        .ok();
    assert_eq!(on(theirs(&dir), "check", &opts).finish().code, Some(1));
    reads(&dir, &second, &disk);
    let last = on(ours(&dir), "amend", &second)
        .args(["-o", "encrypt.state=inactive,encrypt.keyslot=1"])
        .finish();
    assert_eq!(last.code, Some(1), "the last key is not given up\n{last}");
}
