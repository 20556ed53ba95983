//! OVF packages: those of other exporters read, ours read by other programs, and packages made to do harm.

mod hostile;
mod layouts;

use std::path::Path;

use diskmill_testkit::{Run, Scratch, hash, oracle};

use crate::tools::{binary, native};

/// A disk with data here and there, its end included.
fn make_disk(scratch: &Scratch, name: &str) -> String {
    scratch.hole(name, 48 << 20);
    let writes = [
        "write -P 3 1M 3M",
        "write -P 4 20M 64k",
        "write -z 30M 1M",
        "write -P 5 50331136 512",
    ];
    oracle::io(scratch.join(name), "raw", writes);
    hash::sha256_file(scratch.join(name))
}

fn tar(scratch: &Scratch, archive: &str, members: &[&str]) {
    Run::new("tar")
        .dir(scratch.path())
        .args(["--format=ustar", "-cf", archive])
        .args(members)
        .ok();
}

/// The lines of a manifest over `files`.
fn manifest(scratch: &Scratch, algorithm: &str, files: &[&str]) -> String {
    let line = |file: &&str| {
        let done = Run::new(format!("{}sum", algorithm.to_lowercase()))
            .dir(scratch.path())
            .arg(file)
            .ok();
        let digest = done.out().split_whitespace().next().unwrap().to_owned();
        format!("{algorithm}({file})= {digest}\n")
    };
    files.iter().map(line).collect()
}

/// What a disk of a package reads as.
fn guest(scratch: &Scratch, package: &str, disk: Option<&str>) -> String {
    let mut run = native(scratch).words("convert -O raw");
    if let Some(disk) = disk {
        run = run.args(["--disk", disk]);
    }
    run.args([package, "read.raw"]).ok();
    hash::sha256_file(scratch.join("read.raw"))
}

#[test]
fn ova__round_trip__read_by_tar_sha256sum_7zip_and_qemu() {
    let scratch = Scratch::new();
    let digest = make_disk(&scratch, "disk.raw");
    native(&scratch).words("convert disk.raw -O ova box.ova").ok();
    let list = Run::new("tar").dir(scratch.path()).words("tf box.ova").ok();
    assert_eq!(list.out(), "box.ovf\nbox.mf\nbox-disk1.vmdk\n");
    Run::new("tar").dir(scratch.path()).words("xf box.ova").ok();
    let theirs = manifest(&scratch, "SHA256", &["box.ovf", "box-disk1.vmdk"]);
    assert_eq!(std::fs::read_to_string(scratch.join("box.mf")).unwrap(), theirs);
    Run::new("xmllint")
        .dir(scratch.path())
        .words("--noout --nonet box.ovf")
        .ok();
    assert_eq!(
        oracle::guest_sha256(scratch.join("box-disk1.vmdk"), "vmdk"),
        digest
    );
    let unpacked = Run::new("7z")
        .dir(scratch.path())
        .words("e -so box.ova box-disk1.vmdk")
        .ok();
    assert_eq!(
        hash::sha256(&unpacked.stdout),
        hash::sha256_file(scratch.join("box-disk1.vmdk"))
    );
    assert_eq!(guest(&scratch, "box.ova", None), digest);
    native(&scratch).words("convert box.ova -O qcow2 back.qcow2").ok();
    assert_eq!(oracle::guest_sha256(scratch.join("back.qcow2"), "qcow2"), digest);
    oracle::assert_clean(scratch.join("back.qcow2"), "qcow2");
}

#[test]
fn ova__in_place__qemu_reads_the_disk_where_it_lies() {
    let scratch = Scratch::new();
    let digest = make_disk(&scratch, "disk.raw");
    native(&scratch).words("convert disk.raw -O ova box.ova").ok();
    let listing = Run::new("tar")
        .dir(scratch.path())
        .words("--block-number -tvf box.ova")
        .ok();
    let line = listing
        .out()
        .lines()
        .find(|line| line.contains("-disk1.vmdk"))
        .unwrap()
        .to_owned();
    let block: u64 = line
        .split(['k', ':', ' '])
        .find_map(|word| word.parse().ok())
        .unwrap();
    Run::new("tar").dir(scratch.path()).words("xf box.ova").ok();
    let len = std::fs::metadata(scratch.join("box-disk1.vmdk")).unwrap().len();
    let offset = (block + 1) * 512;
    let json = format!(
        "json:{{\"driver\":\"vmdk\",\"file\":{{\"driver\":\"raw\",\"offset\":{offset},\"size\":{len},\"file\":\
         {{\"driver\":\"file\",\"filename\":\"box.ova\"}}}}}}"
    );
    oracle::qemu_img()
        .dir(scratch.path())
        .args(["convert", "-O", "raw", &json, "theirs.raw"])
        .ok();
    assert_eq!(hash::sha256_file(scratch.join("theirs.raw")), digest);
}

#[test]
fn ova__bytes__do_not_depend_on_threads_or_time() {
    let scratch = Scratch::new();
    make_disk(&scratch, "disk.raw");
    let mut digests = Vec::new();
    for threads in ["1", "3", "8"] {
        native(&scratch)
            .words("ova create --name box disk.raw box.ova -m")
            .arg(threads)
            .env("SOURCE_DATE_EPOCH", "1700000000")
            .ok();
        digests.push(hash::sha256_file(scratch.join("box.ova")));
    }
    digests.dedup();
    assert_eq!(digests.len(), 1, "the bytes differ");
    let list = Run::new("tar")
        .dir(scratch.path())
        .words("--utc --full-time -tvf box.ova")
        .ok();
    assert!(
        list.out()
            .lines()
            .all(|line| line.contains("2023-11-14 22:13:20")),
        "{list}"
    );
}

#[test]
fn ova__stdout__is_the_same_package() {
    let scratch = Scratch::new();
    make_disk(&scratch, "disk.raw");
    let made = native(&scratch)
        .words("ova create --name disk disk.raw -")
        .env("SOURCE_DATE_EPOCH", "1700000000")
        .ok();
    native(&scratch)
        .words("ova create disk.raw disk.ova")
        .env("SOURCE_DATE_EPOCH", "1700000000")
        .ok();
    assert_eq!(
        hash::sha256(&made.stdout),
        hash::sha256_file(scratch.join("disk.ova"))
    );
}

#[test]
fn ova__stdin__packages_and_images_come_through_a_pipe() {
    let scratch = Scratch::new();
    let digest = make_disk(&scratch, "disk.raw");
    native(&scratch).words("convert disk.raw -O ova box.ova").ok();
    oracle::convert(
        ["-c"],
        scratch.join("disk.raw"),
        "raw",
        scratch.join("disk.qcow2"),
        "qcow2",
    );
    for (file, format) in [("box.ova", "ova"), ("disk.qcow2", "qcow2")] {
        let bytes = std::fs::read(scratch.join(file)).unwrap();
        native(&scratch)
            .args(["convert", "-f", format, "-", "-O", "raw", "read.raw"])
            .input(bytes)
            .ok();
        assert_eq!(hash::sha256_file(scratch.join("read.raw")), digest, "{format}");
    }
    let done = native(&scratch)
        .words("convert -f ova - -O raw x.raw")
        .input(vec![7; 70_000])
        .finish()
        .expect(1);
    assert!(done.err().contains("it is no OVF package"), "{done}");
    let done = native(&scratch)
        .words("convert -f ova disk.raw -O raw x.raw")
        .finish()
        .expect(1);
    assert!(done.err().contains("it is no OVF package"), "{done}");
}

#[test]
fn ova__several_disks__come_out_as_they_went_in() {
    let scratch = Scratch::new();
    let first = make_disk(&scratch, "one.raw");
    scratch.hole("two.raw", 3 << 20);
    oracle::io(scratch.join("two.raw"), "raw", ["write -P 9 1M 1M"]);
    let second = hash::sha256_file(scratch.join("two.raw"));
    oracle::convert(
        [""; 0],
        scratch.join("two.raw"),
        "raw",
        scratch.join("two.qcow2"),
        "qcow2",
    );
    native(&scratch)
        .words("ova create --for esxi --cpus 4 --memory 2G --os debian64 --firmware efi --network LAN --network WAN")
        .words("--controller pvscsi --name machine one.raw two.qcow2 box.ova")
        .ok();
    let lint = native(&scratch).words("ova lint box.ova").ok();
    assert_eq!(lint.out(), "Nothing was found.\n");
    let info = native(&scratch).words("info --output=json box.ova").ok().json();
    assert_eq!(info["machines"][0]["cpus"], 4);
    assert_eq!(info["machines"][0]["memory"], 2_u64 << 30);
    assert_eq!(info["machines"][0]["networks"], serde_json::json!(["LAN", "WAN"]));
    assert_eq!(info["machines"][0]["hardware"], "vmx-13");
    assert_eq!(info["disks"][1]["virtual-size"], 3 << 20);
    assert_eq!(info["disks"][1]["populated-size"], 1 << 20);
    for (disk, digest) in [("1", &first), ("vmdisk2", &second), ("box-disk2.vmdk", &second)] {
        assert_eq!(&guest(&scratch, "box.ova", Some(disk)), digest, "{disk}");
    }
    let vague = native(&scratch)
        .words("convert box.ova out.raw")
        .finish()
        .expect(1);
    assert!(
        vague
            .err()
            .contains("several disks: vmdisk1, vmdisk2; choose one with --disk"),
        "{vague}"
    );
    std::fs::create_dir(scratch.join("out")).unwrap();
    native(&scratch).words("convert box.ova -O qcow2 out").ok();
    for (file, digest) in [("box-disk1.qcow2", &first), ("box-disk2.qcow2", &second)] {
        assert_eq!(
            &oracle::guest_sha256(scratch.join("out").join(file), "qcow2"),
            digest
        );
    }
}

#[test]
fn ova__profiles__each_gives_a_package_that_its_importer_takes() {
    let scratch = Scratch::new();
    make_disk(&scratch, "disk.raw");
    for (profile, hardware, algorithm) in [
        ("generic", "vmx-10", "SHA256"),
        ("esxi", "vmx-13", "SHA256"),
        ("workstation", "vmx-12", "SHA1"),
        ("virtualbox", "virtualbox-2.2", "SHA256"),
    ] {
        native(&scratch)
            .args(["ova", "create", "--for", profile, "disk.raw", "box.ova"])
            .ok();
        let info = native(&scratch).words("info --json box.ova").ok().json();
        assert_eq!(info["machines"][0]["hardware"], hardware);
        Run::new("tar").dir(scratch.path()).words("xf box.ova").ok();
        assert_eq!(
            std::fs::read_to_string(scratch.join("box.mf")).unwrap(),
            manifest(&scratch, algorithm, &["box.ovf", "box-disk1.vmdk"])
        );
        native(&scratch).words("check box.ova").ok();
    }
}

#[test]
fn ova__other_commands__take_a_disk_of_a_package_for_an_image() {
    let scratch = Scratch::new();
    make_disk(&scratch, "disk.raw");
    native(&scratch).words("convert disk.raw -O ova box.ova").ok();
    native(&scratch).words("compare box.ova disk.raw").ok();
    let info = native(&scratch).words("info --json --disk 1 box.ova").ok().json();
    assert_eq!(info["format"], "vmdk");
    assert_eq!(info["virtual-size"], 48 << 20);
    let map = native(&scratch).words("map --output=json box.ova").ok().json();
    let data: u64 = map
        .as_array()
        .unwrap()
        .iter()
        .filter(|run| run["data"] == true)
        .map(|run| run["length"].as_u64().unwrap())
        .sum();
    assert!((3 << 20..4 << 20).contains(&data), "{map}");
    native(&scratch).words("measure -O qcow2 box.ova").ok();
    for command in ["resize box.ova +1M", "snapshot -c x box.ova"] {
        let done = native(&scratch).words(command).finish().expect(1);
        assert!(done.err().contains("can only be read"), "{done}");
    }
    // Under its name everything is as with qemu-img, which knows no packages.
    crate::tools::same_json(&scratch, "info --output=json box.ova");
}

#[test]
fn ova__guest__boots_from_a_disk_that_went_through_a_package() {
    crate::guest::through_package();
}

#[test]
fn ova__target__is_as_it_was_when_making_it_fails() {
    let scratch = Scratch::new();
    make_disk(&scratch, "disk.raw");
    scratch.file("box.ova", b"precious");
    for words in [
        "ova create disk.raw missing.raw box.ova",
        "ova create --controller ide disk.raw disk.raw disk.raw box.ova",
        "convert -o x=y disk.raw -O ova box.ova",
    ] {
        native(&scratch).words(words).finish().expect(1);
        assert_eq!(
            std::fs::read(scratch.join("box.ova")).unwrap(),
            b"precious",
            "{words}"
        );
    }
    Run::new(binary())
        .dir(scratch.path())
        .limit("--fsize=10000")
        .words("ova create disk.raw box.ova")
        .finish()
        .expect(1);
    assert_eq!(std::fs::read(scratch.join("box.ova")).unwrap(), b"precious");
    let mut names = scratch.names();
    names.sort();
    assert_eq!(names, ["box.ova", "disk.raw"]);
}

#[test]
fn ova__wrong_arguments__are_refused_by_name() {
    let scratch = Scratch::new();
    make_disk(&scratch, "disk.raw");
    for (words, expected) in [
        ("ova", "Expecting 'create' or 'lint'"),
        (
            "ova pack disk.raw box.ova",
            "Expecting 'create' or 'lint', not 'pack'",
        ),
        ("ova create box.ova", "Expecting at least one disk"),
        (
            "ova create --for vmware disk.raw box.ova",
            "--for expects generic, esxi, workstation, virtualbox, not 'vmware'",
        ),
        (
            "ova create --firmware uefi disk.raw box.ova",
            "--firmware expects bios, efi, not 'uefi'",
        ),
        (
            "ova create --controller scsi disk.raw box.ova",
            "--controller expects lsilogic",
        ),
        (
            "ova create --os amiga disk.raw box.ova",
            "--os does not know 'amiga'",
        ),
        ("ova create --memory 1G1 disk.raw box.ova", "memory"),
        (
            "ova create --memory 1000 disk.raw box.ova",
            "--memory expects whole MiB",
        ),
        ("ova create --cpus 0 disk.raw box.ova", "number of processors"),
        ("ova lint disk.raw", "'disk.raw' is no OVF package"),
        ("ova lint", "Expecting one OVF package"),
        (
            "info --disk 1 disk.raw",
            "it is no OVF package, so --disk '1' makes no sense",
        ),
        (
            "compare --disk 1 disk.raw disk.raw",
            "neither image is an OVF package",
        ),
    ] {
        let done = native(&scratch).words(words).finish();
        assert_ne!(done.code, Some(0), "{words}");
        assert!(done.err().contains(expected), "{words}\n{done}");
        assert!(!Path::new(&scratch.join("box.ova")).exists(), "{words}");
    }
}
