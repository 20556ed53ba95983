//! VMware's format: every subformat and option both ways with QEMU's tools, and read by programs that are neither.

use diskmill_testkit::sparse_random::SparseRandom;
use diskmill_testkit::{Run, Scratch, hash, oracle, scratch, vmware};

use crate::agree::assert_agree;
use crate::readers::{dissect_vmdk, seven_zip};
use crate::tools::{binary, native, ours, refused, theirs};

/// dissect reads in steps of 1 MiB and fails on sizes that are no multiple.
const SIZE: u64 = 5 << 20;

/// What `qemu-io` does to an image: new grains, grains in part, zeros.
const CHANGES: [&str; 6] = [
    "write -P 1 0 512",
    "write -P 2 100k 70k",
    "write -P 3 1023k 2k",
    "write -z 200k 64k",
    "write -z 2M 1M",
    "write -P 6 4M 4k",
];

fn make(seed: u64) -> (Scratch, String) {
    let scratch = Scratch::new();
    SparseRandom::new(seed, SIZE).write_raw(scratch.join("disk.raw"));
    let digest = hash::sha256_file(scratch.join("disk.raw"));
    (scratch, digest)
}

/// The disk in `name`, as we read it.
fn ours_reads(scratch: &Scratch, name: &str) -> String {
    native(scratch)
        .words(&format!("convert -f vmdk -O raw {name} read.raw"))
        .ok();
    hash::sha256_file(scratch.join("read.raw"))
}

fn vmdkinfo(scratch: &Scratch, name: &str) -> String {
    Run::new("vmdkinfo")
        .dir(scratch.path())
        .arg(name)
        .ok()
        .out()
        .to_owned()
}

fn cell(subformat: &str, more: &str) {
    let (scratch, digest) = make((subformat.len() + more.len()) as u64);
    let with = format!("-o subformat={subformat}{more}");
    let convert = |target: &str| format!("convert -f raw -O vmdk {with} disk.raw {target}");
    let stream = subformat == "streamOptimized";

    ours(&scratch).words(&convert("ours.vmdk")).ok();
    oracle::assert_clean(scratch.join("ours.vmdk"), "vmdk");
    assert_eq!(ours_reads(&scratch, "ours.vmdk"), digest, "we");
    assert_eq!(
        oracle::guest_sha256(scratch.join("ours.vmdk"), "vmdk"),
        digest,
        "QEMU"
    );
    assert_eq!(seven_zip(&scratch, "ours.vmdk", "VMDK"), digest, "7-Zip");
    assert_eq!(dissect_vmdk(&scratch, "ours.vmdk"), digest, "dissect");
    assert!(vmdkinfo(&scratch, "ours.vmdk").contains("5.0 MiB (5242880 bytes)"));
    assert_agree(&scratch, "ours.vmdk", "vmdk");

    theirs(&scratch).words(&convert("theirs.vmdk")).ok();
    assert_eq!(ours_reads(&scratch, "theirs.vmdk"), digest, "theirs");
    assert_agree(&scratch, "theirs.vmdk", "vmdk");
    ours(&scratch)
        .words("compare -f vmdk -F vmdk ours.vmdk theirs.vmdk")
        .ok();
    let create = |name: &str| format!("create -f vmdk {with} {name} {SIZE}");
    let our = ours(&scratch).words(&create("empty-ours.vmdk")).ok();
    let their = theirs(&scratch).words(&create("empty-theirs.vmdk")).ok();
    assert_eq!(our.out().replace("-ours", ""), their.out().replace("-theirs", ""));
    if stream {
        return;
    }

    // In place: by QEMU, then all of it over what was there, then grown and shrunk by us.
    for name in ["ours.vmdk", "theirs.vmdk", "empty-ours.vmdk"] {
        oracle::io(scratch.join(name), "vmdk", CHANGES);
        oracle::assert_clean(scratch.join(name), "vmdk");
        assert_agree(&scratch, name, "vmdk");
        let changed = oracle::guest_sha256(scratch.join(name), "vmdk");
        assert_eq!(ours_reads(&scratch, name), changed);
        ours(&scratch)
            .words(&format!("convert -n -f raw -O vmdk disk.raw {name}"))
            .ok();
        oracle::assert_clean(scratch.join(name), "vmdk");
        assert_eq!(oracle::guest_sha256(scratch.join(name), "vmdk"), digest);
    }
    ours(&scratch).words("resize -q -f vmdk ours.vmdk +200M").ok();
    oracle::assert_clean(scratch.join("ours.vmdk"), "vmdk");
    oracle::io(scratch.join("ours.vmdk"), "vmdk", ["write -P 9 150M 64k"]);
    ours(&scratch)
        .words(&format!("resize -q --shrink -f vmdk ours.vmdk {SIZE}"))
        .ok();
    assert_agree(&scratch, "ours.vmdk", "vmdk");
    assert_eq!(oracle::guest_sha256(scratch.join("ours.vmdk"), "vmdk"), digest);
    assert_eq!(dissect_vmdk(&scratch, "ours.vmdk"), digest, "dissect, resized");
}

macro_rules! cells {
    ($($name:ident: $subformat:expr, $more:expr;)*) => {$(
        #[test]
        fn $name() {
            cell($subformat, $more);
        }
    )*};
}

cells! {
    vmdk__sparse: "monolithicSparse", "";
    vmdk__sparse__zeroed_grain: "monolithicSparse", ",zeroed_grain=on";
    vmdk__sparse__lsilogic: "monolithicSparse", ",adapter_type=lsilogic,hwversion=13,toolsversion=10338";
    vmdk__flat: "monolithicFlat", "";
    vmdk__flat__compat6: "monolithicFlat", ",compat6=on,adapter_type=buslogic";
    vmdk__split: "twoGbMaxExtentSparse", "";
    vmdk__split__zeroed_grain: "twoGbMaxExtentSparse", ",zeroed_grain=on,adapter_type=legacyESX";
    vmdk__split_flat: "twoGbMaxExtentFlat", "";
    vmdk__stream: "streamOptimized", "";
}

/// The descriptor says the same as QEMU's, but for the content id.
#[test]
fn vmdk__descriptors_are_theirs() {
    let (scratch, _) = make(1);
    for (subformat, size) in [
        ("monolithicFlat", "40M"),
        ("twoGbMaxExtentFlat", "5G"),
        ("twoGbMaxExtentSparse", "4G"),
    ] {
        for more in ["", ",adapter_type=lsilogic", ",hwversion=9,toolsversion=7"] {
            let read = || {
                let text = std::fs::read_to_string(scratch.join("x.vmdk")).unwrap();
                let lines: Vec<_> = text
                    .lines()
                    .filter(|line| !line.starts_with("CID="))
                    .map(str::to_owned)
                    .collect();
                lines
            };
            let words = format!("create -q -f vmdk -o subformat={subformat}{more} x.vmdk {size}");
            ours(&scratch).words(&words).ok();
            let our = read();
            theirs(&scratch).words(&words).ok();
            assert_eq!(our, read(), "{words}");
        }
    }
}

/// Nothing but the content id, which is chance, tells how many there were.
#[test]
fn vmdk__workers_change_no_byte() {
    let (scratch, _) = make(3);
    let mut all = Vec::new();
    for workers in [1, 4, 16] {
        ours(&scratch)
            .words(&format!(
                "convert -m {workers} -f raw -O vmdk -o subformat=streamOptimized disk.raw disk.vmdk"
            ))
            .ok();
        let mut bytes = std::fs::read(scratch.join("disk.vmdk")).unwrap();
        let at = bytes.windows(5).position(|text| text == b"\nCID=").unwrap();
        bytes[at + 5..at + 13].fill(b'0');
        all.push(bytes);
    }
    assert!(all[0] == all[1] && all[0] == all[2]);
}

/// What the strictest readers of streams ask for.
#[test]
fn vmdk__stream_has_the_layout_of_vmware() {
    let (scratch, digest) = make(5);
    let sh = format!(
        "{} convert -f raw -O vmdk -o subformat=streamOptimized disk.raw - | cat > pipe.vmdk",
        crate::tools::binary().display()
    );
    Run::new("sh").dir(scratch.path()).args(["-c", &sh]).ok();
    assert_eq!(seven_zip(&scratch, "pipe.vmdk", "VMDK"), digest, "7-Zip");
    assert_eq!(ours_reads(&scratch, "pipe.vmdk"), digest);
    let file = std::fs::read(scratch.join("pipe.vmdk")).unwrap();
    let word = |at: usize| u32::from_le_bytes(file[at..at + 4].try_into().unwrap());
    let long = |at: usize| u64::from_le_bytes(file[at..at + 8].try_into().unwrap());
    assert_eq!((word(4), word(8)), (3, 0x30001), "version and flags");
    assert_eq!((long(20), word(44), long(56)), (128, 512, u64::MAX));
    assert_eq!(file.len() % 512, 0);
    assert!(
        file[file.len() - 512..].iter().all(|byte| *byte == 0),
        "the end of the stream"
    );
    let footer = file.len() - 1024;
    assert_eq!(&file[footer..footer + 4], b"KDMV");
    assert_eq!(
        (long(footer - 512), word(footer - 504), word(footer - 500)),
        (1, 0, 3)
    );
    // From front to back: grains in rising order, each table behind its grains, nothing between.
    let (mut at, mut last, mut tables) = (long(64) as usize * 512, None, 0);
    loop {
        let (val, size, kind) = (long(at), word(at + 8) as usize, word(at + 12));
        if size > 0 {
            assert!(last.is_none_or(|last| val > last), "rising");
            last = Some(val);
            at += (12 + size).next_multiple_of(512);
            continue;
        }
        at += 512;
        match kind {
            0 => break,
            1 => tables += 1,
            2 => assert_eq!(long(footer + 56), at as u64 / 512, "the directory"),
            3 => assert_eq!(at, footer),
            other => panic!("a marker of type {other}"),
        }
        at += val as usize * 512;
    }
    assert_eq!((at, tables), (file.len(), 1));
}

#[test]
fn vmdk__chains() {
    let (scratch, digest) = make(11);
    let run = |words: &str| ours(&scratch).words(words);
    run("convert -f raw -O vmdk disk.raw base.vmdk").ok();
    run("create -q -f vmdk -b base.vmdk -F vmdk kid.vmdk").ok();
    assert_eq!(ours_reads(&scratch, "kid.vmdk"), digest);
    assert_eq!(oracle::guest_sha256(scratch.join("kid.vmdk"), "vmdk"), digest);
    oracle::io(scratch.join("kid.vmdk"), "vmdk", CHANGES);
    let changed = oracle::guest_sha256(scratch.join("kid.vmdk"), "vmdk");
    assert_eq!(ours_reads(&scratch, "kid.vmdk"), changed);
    assert_agree(&scratch, "kid.vmdk", "vmdk");
    run("convert -O vmdk -B base.vmdk -F vmdk kid.vmdk twin.vmdk").ok();
    assert_eq!(oracle::guest_sha256(scratch.join("twin.vmdk"), "vmdk"), changed);
    std::fs::copy(scratch.join("base.vmdk"), scratch.join("old.vmdk")).unwrap();

    // The overlay that is committed goes along with its base; others notice that theirs has changed.
    run("commit -q -f vmdk kid.vmdk").ok();
    for name in ["base.vmdk", "kid.vmdk"] {
        oracle::assert_clean(scratch.join(name), "vmdk");
        assert_eq!(
            oracle::guest_sha256(scratch.join(name), "vmdk"),
            changed,
            "{name}"
        );
        assert_eq!(ours_reads(&scratch, name), changed);
    }
    refused(&scratch, "convert -f vmdk -O raw twin.vmdk out.raw");
    run("rebase -u -b old.vmdk -F vmdk -f vmdk twin.vmdk").ok();
    assert_eq!(oracle::guest_sha256(scratch.join("twin.vmdk"), "vmdk"), changed);
    run("rebase -b base.vmdk -F vmdk -f vmdk twin.vmdk").ok();
    assert_eq!(oracle::guest_sha256(scratch.join("twin.vmdk"), "vmdk"), changed);
    run("rebase -b  -f vmdk twin.vmdk").finish();
    native(&scratch)
        .args(["rebase", "-b", "", "-f", "vmdk", "twin.vmdk"])
        .ok();
    std::fs::remove_file(scratch.join("base.vmdk")).unwrap();
    assert_eq!(oracle::guest_sha256(scratch.join("twin.vmdk"), "vmdk"), changed);
}

/// What only VMware writes, from generators, read by us and by an independent reader.
#[test]
fn vmdk__esx_extents() {
    let (scratch, digest) = make(13);
    let disk = std::fs::read(scratch.join("disk.raw")).unwrap();
    let write = |name: &str, bytes: &[u8]| std::fs::write(scratch.join(name), bytes).unwrap();
    let sectors = SIZE / 512;
    write("x-delta.vmdk", &vmware::cowd(&disk, 1));
    write("y-delta.vmdk", &vmware::cowd(&disk, 128));
    write("x-sesparse.vmdk", &vmware::se_sparse(&disk));
    for (name, kind, line) in [
        ("cowd.vmdk", "vmfsSparse", "VMFSSPARSE \"x-delta.vmdk\""),
        ("cowd2.vmdk", "vmfsSparse", "VMFSSPARSE \"y-delta.vmdk\""),
        ("se.vmdk", "seSparse", "SESPARSE \"x-sesparse.vmdk\""),
        ("vmfs.vmdk", "vmfs", "VMFS \"disk.raw\""),
    ] {
        write(name, &vmware::descriptor(kind, &[format!("RW {sectors} {line}")]));
        assert_eq!(ours_reads(&scratch, name), digest, "{name}");
        assert_eq!(
            oracle::guest_sha256(scratch.join(name), "vmdk"),
            digest,
            "QEMU, {name}"
        );
        assert_eq!(dissect_vmdk(&scratch, name), digest, "dissect, {name}");
        assert_agree(&scratch, name, "vmdk");
    }
    // Kinds that QEMU does not open.
    for kind in ["vmfsThin", "vmfsPreallocated", "vmfsEagerZeroedThick", "custom"] {
        write(
            "more.vmdk",
            &vmware::descriptor(kind, &[format!("RW {sectors} VMFS \"disk.raw\"")]),
        );
        assert_eq!(ours_reads(&scratch, "more.vmdk"), digest, "{kind}");
    }
    // The parts of QEMU's that it leaves out: the disk stays as it is.
    let lines = [
        "RDONLY 2048 FLAT \"disk.raw\" 0".to_owned(),
        "RW 2048 ZERO".to_owned(),
        format!("RW {} FLAT \"disk.raw\" 4096", sectors - 4096),
    ];
    write("mixed.vmdk", &vmware::descriptor("custom", &lines));
    let mut expected = disk.clone();
    expected[1 << 20..2 << 20].fill(0);
    write("expected.raw", &expected);
    assert_eq!(
        ours_reads(&scratch, "mixed.vmdk"),
        hash::sha256_file(scratch.join("expected.raw"))
    );
    ours(&scratch)
        .words("convert -n -f raw -O vmdk disk.raw cowd.vmdk")
        .ok();
    assert_eq!(oracle::guest_sha256(scratch.join("cowd.vmdk"), "vmdk"), digest);
}

#[test]
fn vmdk__a_disk_of_hundreds_of_extents() {
    let (scratch, digest) = make(17);
    let disk = std::fs::read(scratch.join("disk.raw")).unwrap();
    let lines: Vec<_> = disk
        .chunks(8192)
        .enumerate()
        .map(|(index, part)| {
            let name = format!("p{index:04}.raw");
            std::fs::write(scratch.join(&name), part).unwrap();
            format!("RW {} FLAT \"{name}\" 0", part.len() / 512)
        })
        .collect();
    assert_eq!(lines.len(), 640);
    let text = vmware::descriptor("twoGbMaxExtentFlat", &lines);
    std::fs::write(scratch.join("many.vmdk"), text).unwrap();
    // Fewer files than that may be open unless the command asks for more.
    Run::new(binary())
        .dir(scratch.path())
        .limit("--nofile=100:4096")
        .words("convert -f vmdk -O raw many.vmdk read.raw")
        .ok();
    assert_eq!(hash::sha256_file(scratch.join("read.raw")), digest);
}

#[test]
fn vmdk__what_both_refuse() {
    let (scratch, _) = make(3);
    ours(&scratch)
        .words("convert -f raw -O vmdk disk.raw disk.vmdk")
        .ok();
    for words in [
        "create -f vmdk -o subformat=nonesuch x.vmdk 1M",
        "create -f vmdk -o adapter_type=nonesuch x.vmdk 1M",
        "create -f vmdk -o compat6=on,hwversion=5 x.vmdk 1M",
        "create -f vmdk -o subformat=monolithicFlat,zeroed_grain=on x.vmdk 1M",
        "create -f vmdk -o subformat=monolithicFlat -b disk.vmdk -F vmdk x.vmdk",
        "create -f vmdk -b disk.raw -F raw x.vmdk",
        "snapshot -c one disk.vmdk",
        "info -f vmdk disk.raw",
    ] {
        refused(&scratch, words);
    }
    // A name that QEMU writes, and that no descriptor can hold.
    let quoted = ours(&scratch)
        .args(["create", "-f", "vmdk", "a\"b.vmdk", "1M"])
        .finish();
    assert_eq!(quoted.code, Some(1), "{quoted}");
}

#[test]
fn vmdk__compact() {
    for (options, extent) in [
        ("subformat=monolithicSparse", None),
        ("subformat=monolithicSparse,zeroed_grain=on", None),
        ("subformat=twoGbMaxExtentSparse", Some("-s001")),
        ("subformat=monolithicFlat", Some("-flat")),
    ] {
        let (scratch, _) = make(options.len() as u64);
        let run = |words: &str| native(&scratch).words(words);
        let file = |name: &str| scratch.join(format!("{name}{}.vmdk", extent.unwrap_or_default()));
        theirs(&scratch)
            .words(&format!(
                "convert -f raw -O vmdk -S 0 -o {options} disk.raw disk.vmdk"
            ))
            .ok();
        oracle::io(
            scratch.join("disk.vmdk"),
            "vmdk",
            ["write -P 1 0 5M", "write -P 0 1M 2M", "write -P 0 4600k 70k"],
        );
        let before = scratch::len(file("disk"));
        let digest = oracle::guest_sha256(scratch.join("disk.vmdk"), "vmdk");
        let dry = run("compact --dry-run disk.vmdk").ok().out().to_owned();
        assert_eq!(scratch::len(file("disk")), before);
        let done = run("compact disk.vmdk").ok().out().to_owned();
        let first = |text: &str| text.lines().next().map(|line| line.replace(" would be", ""));
        assert_eq!(first(&dry), first(&done));
        oracle::assert_clean(scratch.join("disk.vmdk"), "vmdk");
        assert_eq!(ours_reads(&scratch, "disk.vmdk"), digest, "we, {options}");
        assert_eq!(
            oracle::guest_sha256(scratch.join("disk.vmdk"), "vmdk"),
            digest,
            "QEMU, {options}"
        );
        assert_eq!(
            seven_zip(&scratch, "disk.vmdk", "VMDK"),
            digest,
            "7-Zip, {options}"
        );
        assert_eq!(dissect_vmdk(&scratch, "disk.vmdk"), digest, "dissect, {options}");
        assert_agree(&scratch, "disk.vmdk", "vmdk");
        theirs(&scratch)
            .words(&format!(
                "convert -f vmdk -O vmdk -o {options} disk.vmdk fresh.vmdk"
            ))
            .ok();
        let (packed, fresh) = (scratch::len(file("disk")), scratch::len(file("fresh")));
        assert!(packed <= fresh, "{options}: {packed} and {fresh} bytes");
        assert_eq!(packed < before, extent != Some("-flat"), "{options}");
        assert!(
            run("compact disk.vmdk").ok().out().contains("Nothing to save"),
            "{options}"
        );
    }
    let (scratch, _) = make(29);
    ours(&scratch)
        .words("convert -f raw -O vmdk -o subformat=streamOptimized disk.raw disk.vmdk")
        .ok();
    let failed = native(&scratch).words("compact disk.vmdk").finish().expect(1);
    assert!(failed.err().contains("streamOptimized"), "{}", failed.err());
}

#[test]
fn vmdk__a_disk_grows_a_thousandfold_and_shrinks_again() {
    use std::os::unix::fs::MetadataExt;
    let scratch = Scratch::new();
    let path = scratch.join("disk.vmdk");
    let run = |words: &str| native(&scratch).words(words).ok();
    let on_host = || std::fs::metadata(&path).unwrap().blocks() * 512;
    run("create -f vmdk disk.vmdk 1G");
    oracle::io(&path, "vmdk", ["write -P 7 1000M 64k"]);
    run("resize disk.vmdk 512G");
    // 16352 new tables, twice: nobody writes those, they are read as zeros all the same.
    assert!(on_host() < 2 << 20, "{} bytes", on_host());
    oracle::assert_clean(&path, "vmdk");
    oracle::io(
        &path,
        "vmdk",
        [
            "read -P 7 1000M 64k",
            "read -P 0 1025M 64M",
            "write -P 8 300G 64k",
        ],
    );
    run("check disk.vmdk");
    run("resize --shrink disk.vmdk 2G");
    oracle::io(&path, "vmdk", ["read -P 7 1000M 64k", "read -P 0 1984M 64M"]);
    oracle::assert_clean(&path, "vmdk");
    run("compact disk.vmdk");
    assert!(scratch::len(&path) < 2 << 20, "{} bytes", scratch::len(&path));
}
