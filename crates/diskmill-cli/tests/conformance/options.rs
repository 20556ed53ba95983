//! The options of `convert` and its neighbours, each against what `qemu-img` makes of the same words.

use diskmill_testkit::scratch::{allocated, len, peek};
use diskmill_testkit::sparse_random::SparseRandom;
use diskmill_testkit::{Scratch, hash, oracle};

use crate::tools::{native, ours, refused, same, same_json, theirs};

const SIZE: u64 = (2 << 20) + 512;

fn with_disk() -> (Scratch, SparseRandom) {
    let scratch = Scratch::new();
    let disk = SparseRandom::new(3, SIZE);
    disk.write_raw(scratch.join("disk.raw"));
    theirs(&scratch)
        .words("convert -f raw -O qcow2 disk.raw disk.qcow2")
        .ok();
    (scratch, disk)
}

#[test]
fn convert__sparse_size() {
    let (scratch, disk) = with_disk();
    for sparse in ["0", "512", "4k", "64k", "1M", "16M"] {
        for format in ["raw", "qcow2"] {
            let words = |to: &str| format!("convert -S {sparse} -f raw -O {format} disk.raw {to}");
            ours(&scratch).words(&words("ours")).ok();
            theirs(&scratch).words(&words("theirs")).ok();
            oracle::assert_identical(scratch.join("disk.raw"), "raw", scratch.join("ours"), format);
            if format == "raw" {
                disk.assert_raw(scratch.join("ours"));
                let (our, their) = (allocated(scratch.join("ours")), allocated(scratch.join("theirs")));
                assert!(
                    our <= their || sparse == "0",
                    "-S {sparse}: {our} bytes allocated, qemu-img {their}"
                );
                assert!(sparse != "0" || our >= SIZE, "-S 0 allocates all: {our}");
            } else {
                oracle::assert_clean(scratch.join("ours"), format);
            }
            std::fs::remove_file(scratch.join("ours")).unwrap();
            std::fs::remove_file(scratch.join("theirs")).unwrap();
        }
    }
    for sparse in ["1", "513", "17M", "x", "-1"] {
        same(
            &scratch,
            &format!("convert -S {sparse} -f raw -O raw disk.raw out"),
        );
        assert!(!scratch.join("out").exists());
    }
}

#[test]
fn convert__into_an_existing_target() {
    for (format, options) in [
        ("raw", ""),
        ("qcow2", ""),
        ("qcow2", "cluster_size=512"),
        ("qcow2", "compat=0.10"),
        ("qcow2", "extended_l2=on"),
        ("qcow2", "refcount_bits=1"),
        ("qcow2", "lazy_refcounts=on"),
        ("qcow2", "preallocation=full"),
        ("qcow2", "data_file=ext.data"),
    ] {
        let (scratch, _) = with_disk();
        for old in ["", "write -P 9 0 2M", "write -P 9 1M 64k"] {
            let mut create = theirs(&scratch).words(&format!("create -q -f {format}"));
            if !options.is_empty() {
                create = create.args(["-o", options]);
            }
            create.arg("target").arg(SIZE.to_string()).ok();
            if !old.is_empty() {
                oracle::io(scratch.join("target"), format, [old]);
            }
            ours(&scratch)
                .words(&format!("convert -n -f raw -O {format} disk.raw target"))
                .ok();
            oracle::assert_identical(scratch.join("disk.raw"), "raw", scratch.join("target"), format);
            if format == "qcow2" {
                oracle::assert_clean(scratch.join("target"), format);
            }
        }
    }
}

#[test]
fn convert__into_an_existing_target__compressed() {
    let (scratch, _) = with_disk();
    for options in ["", "compression_type=zstd", "cluster_size=4k", "extended_l2=on"] {
        let with = if options.is_empty() {
            String::new()
        } else {
            format!("-o {options}")
        };
        theirs(&scratch)
            .words(&format!("create -q -f qcow2 {with} target {SIZE}"))
            .ok();
        ours(&scratch)
            .words("convert -n -c -f raw -O qcow2 disk.raw target")
            .ok();
        oracle::assert_clean(scratch.join("target"), "qcow2");
        oracle::assert_identical(scratch.join("disk.raw"), "raw", scratch.join("target"), "qcow2");
    }
}

#[test]
fn convert__target_is_zero() {
    let (scratch, _) = with_disk();
    for format in ["raw", "qcow2"] {
        theirs(&scratch)
            .words(&format!("create -q -f {format} target {SIZE}"))
            .ok();
        ours(&scratch)
            .words(&format!(
                "convert -n --target-is-zero -f raw -O {format} disk.raw target"
            ))
            .ok();
        oracle::assert_identical(scratch.join("disk.raw"), "raw", scratch.join("target"), format);
        std::fs::remove_file(scratch.join("target")).unwrap();
    }
    same(&scratch, "convert --target-is-zero -f raw -O raw disk.raw out");
}

#[test]
fn convert__existing_target_too_small_or_too_large() {
    let (scratch, _) = with_disk();
    theirs(&scratch).words("create -q -f qcow2 small 1M").ok();
    refused(&scratch, "convert -n -f raw -O qcow2 disk.raw small");
    theirs(&scratch).words("create -q -f qcow2 large 4M").ok();
    oracle::io(scratch.join("large"), "qcow2", ["write -P 7 0 4M"]);
    std::fs::copy(scratch.join("large"), scratch.join("large-theirs")).unwrap();
    ours(&scratch)
        .words("convert -n -f raw -O qcow2 disk.raw large")
        .ok();
    theirs(&scratch)
        .words("convert -n -f raw -O qcow2 disk.raw large-theirs")
        .ok();
    oracle::assert_clean(scratch.join("large"), "qcow2");
    oracle::assert_identical(
        scratch.join("large"),
        "qcow2",
        scratch.join("large-theirs"),
        "qcow2",
    );
    refused(&scratch, "convert -n -f raw -O raw disk.raw missing");
    assert!(!scratch.join("missing").exists());
}

#[test]
fn convert__several_inputs_are_joined() {
    let (scratch, _) = with_disk();
    SparseRandom::new(4, 70_000).write_raw(scratch.join("odd.raw"));
    for (flags, format) in [
        ("", "raw"),
        ("", "qcow2"),
        ("-c", "qcow2"),
        ("-o cluster_size=2M", "qcow2"),
    ] {
        let words = |to: &str| format!("convert {flags} -O {format} disk.qcow2 odd.raw disk.raw {to}");
        ours(&scratch).words(&words("ours")).ok();
        theirs(&scratch).words(&words("theirs")).ok();
        oracle::assert_identical(scratch.join("theirs"), format, scratch.join("ours"), format);
    }
}

#[test]
fn convert__threads_do_not_change_a_byte() {
    let (scratch, _) = with_disk();
    for flags in [
        "-O qcow2",
        "-c -O qcow2",
        "-c -O qcow2 -o compression_type=zstd,refcount_bits=2",
        "-O raw",
        "-O qcow2 -o extended_l2=on",
    ] {
        let mut digests: Vec<String> = ["-m 1", "-m 2", "-m 16", "-m 16 -W", ""]
            .iter()
            .map(|threads| {
                ours(&scratch)
                    .words(&format!("convert {threads} -f raw {flags} disk.raw out"))
                    .ok();
                let digest = hash::sha256_file(scratch.join("out"));
                std::fs::remove_file(scratch.join("out")).unwrap();
                digest
            })
            .collect();
        digests.dedup();
        assert_eq!(digests.len(), 1, "{flags}");
    }
    for threads in ["0", "17", "x"] {
        same(
            &scratch,
            &format!("convert -m {threads} -f raw -O raw disk.raw out"),
        );
    }
}

#[test]
fn convert__copy_range() {
    let (scratch, disk) = with_disk();
    ours(&scratch).words("convert -C -f raw -O raw disk.raw out").ok();
    disk.assert_raw(scratch.join("out"));
    ours(&scratch)
        .words("convert -C -f qcow2 -O raw disk.qcow2 out")
        .ok();
    disk.assert_raw(scratch.join("out"));
    ours(&scratch)
        .words("convert -C -f raw -O qcow2 disk.raw out")
        .ok();
    oracle::assert_clean(scratch.join("out"), "qcow2");
    oracle::assert_identical(scratch.join("disk.raw"), "raw", scratch.join("out"), "qcow2");
    same(&scratch, "convert -C -S 4k -f raw -O raw disk.raw out2");
    same(&scratch, "convert -C -c -f raw -O qcow2 disk.raw out2");
}

#[test]
fn convert__cache_modes() {
    let (scratch, disk) = with_disk();
    for mode in ["none", "writeback", "writethrough", "directsync", "unsafe"] {
        ours(&scratch)
            .words(&format!(
                "convert -t {mode} -T {mode} -f raw -O qcow2 disk.raw a.qcow2"
            ))
            .ok();
        oracle::assert_clean(scratch.join("a.qcow2"), "qcow2");
        ours(&scratch)
            .words(&format!(
                "convert -t {mode} -T {mode} -f qcow2 -O raw a.qcow2 a.raw"
            ))
            .ok();
        disk.assert_raw(scratch.join("a.raw"));
    }
    same(&scratch, "convert -t bogus -f raw -O raw disk.raw out");
    same(&scratch, "convert -T bogus -f raw -O raw disk.raw out");
}

#[test]
fn convert__image_opts() {
    let (scratch, disk) = with_disk();
    for words in [
        "convert --image-opts -O raw driver=qcow2,file.driver=file,file.filename=disk.qcow2 out",
        "convert --image-opts -O raw driver=qcow2,file.filename=disk.qcow2 out",
        "convert --source-image-opts -O raw driver=raw,file.filename=disk.raw out",
        "convert -O raw json:{\"driver\":\"qcow2\",\"file\":{\"driver\":\"file\",\"filename\":\"disk.qcow2\"}} out",
        "convert -O raw json:{\"driver\":\"qcow2\",\"file.filename\":\"disk.qcow2\"} out",
        "convert -f qcow2 -O raw file:disk.qcow2 out",
    ] {
        ours(&scratch).words(words).ok();
        disk.assert_raw(scratch.join("out"));
        std::fs::remove_file(scratch.join("out")).unwrap();
    }
    theirs(&scratch)
        .words(&format!("create -q -f qcow2 target {SIZE}"))
        .ok();
    ours(&scratch)
        .words("convert -n --target-image-opts -f raw disk.raw driver=qcow2,file.filename=target")
        .ok();
    oracle::assert_identical(scratch.join("disk.raw"), "raw", scratch.join("target"), "qcow2");

    // A window of a raw file.
    let window = "driver=raw,offset=65536,size=131072,file.filename=disk.raw";
    for words in [
        format!("info --output=json --image-opts {window}"),
        format!("map --output=json --image-opts {window}"),
        "info --output=json json:{\"driver\":\"qcow2\",\"file\":{\"driver\":\"file\",\"filename\":\"disk.qcow2\"}}".to_owned(),
    ] {
        same_json(&scratch, &words);
    }
    ours(&scratch)
        .words(&format!("convert --image-opts -O raw {window} window.raw"))
        .ok();
    assert_eq!(
        std::fs::read(scratch.join("window.raw")).unwrap(),
        peek(scratch.join("disk.raw"), 65536, 131_072)
    );
    for window in [
        "offset=99999999",
        "offset=1024,size=99999999",
        "size=1000",
        "offset=x",
    ] {
        refused(
            &scratch,
            &format!("info --image-opts driver=raw,{window},file.filename=disk.raw"),
        );
    }
}

#[test]
fn convert__refuses_what_qemu_refuses() {
    let (scratch, _) = with_disk();
    for words in [
        "convert",
        "convert disk.raw",
        "convert -O nonesuch disk.raw out",
        "convert -f nonesuch disk.raw out",
        "convert -f qcow2 -O raw disk.raw out",
        "convert -f raw -O raw missing.raw out",
        "convert -f raw -O raw -c disk.raw out",
        "convert -f raw -O qcow2 -o cluster_size=100 disk.raw out",
        "convert -f raw -O qcow2 -o compat=0.10,refcount_bits=1 disk.raw out",
        "convert -f raw -O qcow2 -o compat=0.10,compression_type=zstd disk.raw out",
        "convert -f raw -O qcow2 -o compat=0.10,lazy_refcounts=on disk.raw out",
        "convert -f raw -O qcow2 -o compat=0.10,extended_l2=on disk.raw out",
        "convert -f raw -O qcow2 -o extended_l2=on,cluster_size=8k disk.raw out",
        "convert -f raw -O qcow2 -o preallocation=bogus disk.raw out",
        "convert -f raw -O qcow2 -o compression_type=lzma disk.raw out",
        "convert -f raw -O raw -o cluster_size=4k disk.raw out",
        "convert -f raw -O qcow2 -b disk.raw disk.raw out",
        "convert -f raw -O qcow2 -B disk.raw disk.raw out",
        "convert -r x -f raw -O raw disk.raw out",
        "convert -f raw -O qcow2 -c -o data_file=d disk.raw out",
    ] {
        refused(&scratch, words);
        let _ = std::fs::remove_file(scratch.join("out"));
        let _ = std::fs::remove_file(scratch.join("d"));
    }
}

#[test]
fn convert__rate_limit_and_progress() {
    let (scratch, disk) = with_disk();
    ours(&scratch)
        .words("convert -r 1G -f raw -O raw disk.raw out")
        .ok();
    disk.assert_raw(scratch.join("out"));
    let done = ours(&scratch)
        .words("convert -p -f raw -O qcow2 disk.raw out")
        .ok();
    let text = done.out();
    assert!(text.starts_with("    (0.00/100%)\r"), "{done}");
    assert!(text.ends_with("    (100.00/100%)\r\n"), "{done}");
    let done = ours(&scratch)
        .words("convert -q -p -f raw -O qcow2 disk.raw out")
        .ok();
    assert_eq!(done.out(), "");
}

#[test]
fn convert__salvage_of_a_damaged_image() {
    let scratch = Scratch::new();
    SparseRandom::new(3, SIZE).write_raw(scratch.join("disk.raw"));
    theirs(&scratch)
        .words("convert -c -f raw -O qcow2 disk.raw bad.qcow2")
        .ok();
    // The stream of one compressed cluster becomes garbage.
    let map = oracle::qemu_img()
        .dir(scratch.path())
        .words("map --output=json -f qcow2 bad.qcow2")
        .ok()
        .json();
    let at = map
        .as_array()
        .and_then(|runs| runs.iter().find(|run| run["compressed"] == true))
        .and_then(|run| run["start"].as_u64())
        .expect("a compressed cluster");
    let l1 = u64::from_be_bytes(peek(scratch.join("bad.qcow2"), 40, 8).try_into().unwrap());
    let l2 = u64::from_be_bytes(peek(scratch.join("bad.qcow2"), l1, 8).try_into().unwrap())
        & 0x00ff_ffff_ffff_fe00;
    let entry = u64::from_be_bytes(
        peek(scratch.join("bad.qcow2"), l2 + at / 65536 * 8, 8)
            .try_into()
            .unwrap(),
    );
    diskmill_testkit::scratch::patch(
        scratch.join("bad.qcow2"),
        entry & 0x003f_ffff_ffff_ffff,
        &[0xff; 64],
    );

    let done = ours(&scratch)
        .words("convert -f qcow2 -O raw bad.qcow2 out")
        .finish()
        .expect(1);
    assert!(done.err().contains("error while reading"), "{done}");
    assert!(!scratch.join("out").exists(), "a failed convert leaves nothing");

    ours(&scratch)
        .words("convert --salvage -f qcow2 -O raw bad.qcow2 ours.raw")
        .ok();
    theirs(&scratch)
        .words("convert --salvage -f qcow2 -O raw bad.qcow2 theirs.raw")
        .ok();
    assert_eq!(len(scratch.join("ours.raw")), len(scratch.join("theirs.raw")));
    assert_eq!(
        hash::sha256_file(scratch.join("ours.raw")),
        hash::sha256_file(scratch.join("theirs.raw"))
    );
}

#[test]
fn convert__stdin_and_stdout() {
    let (scratch, disk) = with_disk();
    let done = native(&scratch)
        .words("convert -f qcow2 -O raw disk.qcow2 -")
        .ok();
    assert_eq!(done.stdout, disk.bytes());
    for options in ["", "-c", "-o cluster_size=512", "-o extended_l2=on"] {
        native(&scratch)
            .words(&format!("convert {options} -f raw -O qcow2 - in.qcow2"))
            .input(disk.bytes())
            .ok();
        oracle::assert_clean(scratch.join("in.qcow2"), "qcow2");
        oracle::assert_identical(scratch.join("disk.raw"), "raw", scratch.join("in.qcow2"), "qcow2");
    }
    native(&scratch)
        .words("convert -f raw -O raw - in.raw")
        .input(disk.bytes())
        .ok();
    disk.assert_raw(scratch.join("in.raw"));
}

#[test]
fn compare__verdicts() {
    let (scratch, _) = with_disk();
    theirs(&scratch)
        .words("convert -f raw -O raw -S 0 disk.raw full.raw")
        .ok();
    std::fs::copy(scratch.join("disk.raw"), scratch.join("other.raw")).unwrap();
    diskmill_testkit::scratch::patch(scratch.join("other.raw"), 1_234_567, b"!");
    theirs(&scratch)
        .words("convert -f raw -O raw disk.raw longer.raw")
        .ok();
    theirs(&scratch).words("resize -q -f raw longer.raw +1M").ok();
    std::fs::copy(scratch.join("longer.raw"), scratch.join("tail.raw")).unwrap();
    diskmill_testkit::scratch::patch(scratch.join("tail.raw"), SIZE + 70_000, b"!");
    for flags in ["", "-s", "-q", "-p"] {
        for pair in [
            "-f raw -F qcow2 disk.raw disk.qcow2",
            "-f raw -F raw disk.raw full.raw",
            "-f raw -F raw disk.raw other.raw",
            "-f qcow2 -F raw disk.qcow2 other.raw",
            "-f raw -F raw disk.raw longer.raw",
            "-f raw -F raw longer.raw disk.raw",
            "-f raw -F raw disk.raw tail.raw",
            "-f raw -F raw tail.raw disk.raw",
            "-f raw -F raw disk.raw missing.raw",
            "-f qcow2 -F raw disk.raw other.raw",
        ] {
            if flags == "-p" {
                // How often progress is printed is each one's own; the verdict is not.
                let our = ours(&scratch).words(&format!("compare -p {pair}")).finish();
                let their = theirs(&scratch).words(&format!("compare -p {pair}")).finish();
                assert_eq!((our.code, our.err()), (their.code, their.err()), "{our}\n{their}");
            } else {
                same(&scratch, &format!("compare {flags} {pair}"));
            }
        }
    }
}

#[test]
fn map__of_a_part() {
    let (scratch, _) = with_disk();
    for part in [
        "--start-offset=64k",
        "--start-offset 1M --max-length 64k",
        "--max-length=100000",
        "--start-offset=2M",
        "-s 512 -l 1024",
    ] {
        for image in ["-f raw disk.raw", "-f qcow2 disk.qcow2"] {
            same(&scratch, &format!("map --output=json {part} {image}"));
            same(&scratch, &format!("map {part} {image}"));
        }
    }
}

#[test]
fn info__of_what_is_no_image() {
    let scratch = Scratch::new();
    scratch.file("text", b"hello\n");
    std::fs::create_dir(scratch.join("folder")).unwrap();
    for words in [
        "info text",
        "info --output=json text",
        "info -f qcow2 text",
        "info missing",
        "info -f raw missing",
        "info folder",
        "check text",
        "check -f qcow2 text",
        "map -f qcow2 text",
        "info",
        "check",
        "map",
        "resize",
        "compare",
        "nonesuch",
    ] {
        same(&scratch, words);
    }
}
