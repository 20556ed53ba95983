//! Packages made to do harm: refused by name, and nothing outside of them is read or written.

use std::time::Duration;

use diskmill_testkit::{Run, Scratch, hash, oracle};

use super::{make_disk, tar};
use crate::tools::native;

const OVF: &str =
    r#"xmlns="http://schemas.dmtf.org/ovf/envelope/1" xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1""#;

fn descriptor(file: &str, disk: &str) -> String {
    format!(
        "<Envelope {OVF}><References><File ovf:id='f' {file}/></References><DiskSection><Disk ovf:diskId='d' \
         ovf:fileRef='f' {disk}/></DiskSection></Envelope>"
    )
}

/// Gives the package to every command that opens images; each must refuse it with `words`, fast, touching nothing.
fn refused(scratch: &Scratch, package: &str, words: &str) {
    let before = scratch.names();
    for command in [
        "convert -O raw NAME out.raw",
        "map NAME",
        "measure -O qcow2 NAME",
        "compare NAME NAME",
        "info --disk 1 NAME",
    ] {
        let done = native(scratch)
            .patience(Duration::from_secs(60))
            .words(&command.replace("NAME", package))
            .finish();
        assert!(matches!(done.code, Some(1 | 2)), "{command}\n{done}");
        assert!(done.err().contains(words), "no '{words}' in\n{done}");
        assert_eq!(scratch.names(), before, "{command}");
    }
}

#[test]
fn ova__hostile__references() {
    let scratch = Scratch::new();
    make_disk(&scratch, "disk.raw");
    let outside = Scratch::new();
    outside.file("secret", b"secret");
    let secret = outside.join("secret").display().to_string();
    let file = |href: &str| format!("ovf:href='{href}'");
    for (attributes, disk, words) in [
        (
            file("../disk.raw"),
            "ovf:capacity='1'",
            "leads out of the package",
        ),
        (
            file("a/../../disk.raw"),
            "ovf:capacity='1'",
            "leads out of the package",
        ),
        (
            file("%2e%2e/disk.raw"),
            "ovf:capacity='1'",
            "leads out of the package",
        ),
        (file(&secret), "ovf:capacity='1'", "is an absolute path"),
        (file("C:\\x"), "ovf:capacity='1'", "backslash"),
        (file("\\\\srv\\x"), "ovf:capacity='1'", "backslash"),
        (file(&format!("file://{secret}")), "ovf:capacity='1'", "is a URL"),
        (file("http://localhost/x"), "ovf:capacity='1'", "is a URL"),
        (file("%zz"), "ovf:capacity='1'", "percent-encoded"),
        (
            file("absent.vmdk"),
            "ovf:capacity='1'",
            "file 'absent.vmdk' is not in the package",
        ),
        (
            file("disk.raw") + " ovf:size='1'",
            "ovf:capacity='1'",
            "the descriptor says 1",
        ),
        (
            file("disk.raw") + " ovf:compression='gzip'",
            "ovf:capacity='1'",
            "does not unpack",
        ),
        (
            file("disk.raw") + " ovf:chunkSize='100'",
            "ovf:capacity='1'",
            "file 'disk.raw.000000000' is not in the package",
        ),
        (file("disk.raw"), "ovf:capacity='0'", "capacity '0'"),
        (file("disk.raw"), "ovf:capacity='-1'", "capacity '-1'"),
        (
            file("disk.raw"),
            "ovf:capacity='18446744073709551616'",
            "capacity '18446744073709551616'",
        ),
        (
            file("disk.raw"),
            "ovf:capacity='${x}'",
            "properties are not supported",
        ),
        (
            file("disk.raw"),
            "ovf:capacity='1' ovf:capacityAllocationUnits='byte * 2^70'",
            "capacityAllocationUnits",
        ),
        (
            file("disk.raw"),
            "ovf:capacity='1' ovf:parentRef='e'",
            "is a difference to 'e'",
        ),
    ] {
        scratch.file("p.ovf", descriptor(&attributes, disk).as_bytes());
        tar(&scratch, "p.ova", &["p.ovf", "disk.raw"]);
        refused(&scratch, "p.ovf", words);
        refused(&scratch, "p.ova", words);
    }
}

#[test]
fn ova__hostile__links_in_a_directory_are_not_followed() {
    let scratch = Scratch::new();
    let outside = Scratch::new();
    outside.file("secret", &[7; 4096]);
    std::os::unix::fs::symlink(outside.join("secret"), scratch.join("link.raw")).unwrap();
    Run::new("mkfifo").arg(scratch.join("pipe.raw")).ok();
    for name in ["link.raw", "pipe.raw"] {
        let text = descriptor(&format!("ovf:href='{name}'"), "ovf:capacity='4096'");
        scratch.file("p.ovf", text.as_bytes());
        refused(&scratch, "p.ovf", name);
    }
}

#[test]
fn ova__hostile__archives() {
    let scratch = Scratch::new();
    make_disk(&scratch, "disk.raw");
    scratch.file(
        "p.ovf",
        descriptor("ovf:href='disk.raw'", "ovf:capacity='50331648'").as_bytes(),
    );
    scratch.file("q.ovf", b"<Envelope/>");
    std::os::unix::fs::symlink("/etc/passwd", scratch.join("link")).unwrap();
    std::fs::hard_link(scratch.join("disk.raw"), scratch.join("hard")).unwrap();
    tar(&scratch, "p.ova", &["p.ovf", "q.ovf", "disk.raw"]);
    refused(&scratch, "p.ova", "several descriptors: 'p.ovf' and 'q.ovf'");
    tar(&scratch, "p.ova", &["p.ovf", "disk.raw", "link"]);
    refused(&scratch, "p.ova", "member 'link' is a symbolic link");
    tar(&scratch, "p.ova", &["p.ovf", "disk.raw", "hard"]);
    refused(&scratch, "p.ova", "member 'hard' is a hard link");
    tar(&scratch, "p.ova", &["p.ovf", "disk.raw"]);
    Run::new("tar")
        .dir(scratch.path())
        .words("--format=ustar -rf p.ova p.ovf")
        .ok();
    refused(&scratch, "p.ova", "member 'p.ovf' is there twice");
    for escape in ["../disk.raw", "/disk.raw"] {
        Run::new("tar")
            .dir(scratch.path())
            .args([
                "--format=ustar",
                "-P",
                "--transform",
                &format!("s,disk.raw,{escape},"),
            ])
            .words("-cf p.ova p.ovf disk.raw")
            .ok();
        refused(&scratch, "p.ova", escape);
    }
    tar(&scratch, "p.ova", &["p.ovf", "disk.raw"]);
    let whole = std::fs::read(scratch.join("p.ova")).unwrap();
    scratch.file("p.ova", &whole[..40 << 20]);
    refused(&scratch, "p.ova", "member 'disk.raw' has 50331648 bytes");
    let mut bent = whole.clone();
    bent[0] = b'x';
    scratch.file("p.ova", &bent);
    // Not even a tar archive any more, and no disk image either.
    let done = native(&scratch).words("convert p.ova out.raw").finish().expect(1);
    assert!(done.err().contains("looks like a tar archive"), "{done}");
}

#[test]
fn ova__hostile__descriptors() {
    let scratch = Scratch::new();
    make_disk(&scratch, "disk.raw");
    let bomb: String = std::iter::once("<!DOCTYPE Envelope [<!ENTITY a \"aaaaaaaaaa\">".to_owned())
        .chain((b'b'..=b'z').map(|letter| {
            let before = format!("&{};", char::from(letter - 1)).repeat(10);
            format!("<!ENTITY {} \"{before}\">", char::from(letter))
        }))
        .chain(std::iter::once(format!("]><Envelope {OVF}>&z;</Envelope>")))
        .collect();
    let deep = format!(
        "<Envelope {OVF}>{}{}</Envelope>",
        "<a>".repeat(1000),
        "</a>".repeat(1000)
    );
    let wide = format!("<Envelope {OVF}>{}</Envelope>", "<a/>".repeat(200_000));
    let long = format!("<Envelope {OVF}>{}</Envelope>", "x".repeat(17 << 20));
    let twice = format!(
        "<Envelope {OVF}><References><File ovf:id='f' ovf:href='a'/><File ovf:id='f' ovf:href='b'/></References></Envelope>"
    );
    let external = format!("<!DOCTYPE a SYSTEM \"file:///etc/passwd\"><Envelope {OVF}/>");
    let utf16: Vec<u8> = "<Envelope/>".encode_utf16().flat_map(u16::to_le_bytes).collect();
    for (text, words) in [
        (bomb.as_bytes(), "no XML that is accepted"),
        (external.as_bytes(), "no XML that is accepted"),
        (deep.as_bytes(), "nested deeper than 64"),
        (wide.as_bytes(), "no XML that is accepted"),
        (long.as_bytes(), "must be at most 16777216"),
        (twice.as_bytes(), "File 'f' is there twice"),
        (b"<Envelope/>", "must be an OVF envelope"),
        (b"<Envelope", "no XML that is accepted"),
        (&utf16, "no XML that is accepted"),
        (b"\xff\xfe", "is not UTF-8"),
    ] {
        scratch.file("p.ovf", text);
        tar(&scratch, "p.ova", &["p.ovf", "disk.raw"]);
        refused(&scratch, "p.ova", words);
    }
}

#[test]
fn ova__hostile__a_gzip_bomb_stops_at_what_its_disk_could_need() {
    let scratch = Scratch::new();
    Run::new("sh")
        .dir(scratch.path())
        .args(["-c", "head -c 400M /dev/zero | gzip -c > bomb.gz"])
        .ok();
    let text = descriptor(
        "ovf:href='bomb.gz' ovf:compression='gzip'",
        "ovf:capacity='1048576'",
    );
    scratch.file("p.ovf", text.as_bytes());
    let done = native(&scratch).words("convert p.ovf out.raw").finish().expect(1);
    assert!(done.err().contains("unpacks to more than"), "{done}");
}

#[test]
fn ova__hostile__manifests() {
    let scratch = Scratch::new();
    make_disk(&scratch, "disk.raw");
    scratch.file(
        "p.ovf",
        descriptor("ovf:href='disk.raw'", "ovf:capacity='50331648'").as_bytes(),
    );
    let digest = hash::sha256_file(scratch.join("disk.raw"));
    let good = format!("SHA256(disk.raw)= {digest}\n");
    for (text, words) in [
        (
            format!("MD5(disk.raw)= {}\n", &digest[..32]),
            "names the algorithm 'MD5'",
        ),
        (
            format!("SHA256(disk.raw)= {}\n", &digest[..40]),
            "has a digest of 40 characters",
        ),
        (format!("{good}{good}"), "two lines for 'disk.raw'"),
        (
            format!("SHA256(../disk.raw)= {digest}\n"),
            "names a file that cannot be in the package",
        ),
        ("nonsense\n".to_owned(), "line 1 is not ALGORITHM(FILE)= DIGEST"),
    ] {
        scratch.file("p.mf", text.as_bytes());
        tar(&scratch, "p.ova", &["p.ovf", "p.mf", "disk.raw"]);
        let done = native(&scratch).words("check p.ova").finish().expect(1);
        assert!(done.err().contains(words), "{done}");
    }
    let other = format!(
        "SHA256(disk.raw)= {}\nSHA256(gone)= {digest}\n",
        digest.chars().rev().collect::<String>()
    );
    for (text, code, words) in [
        (
            good,
            0,
            &[
                "disk.raw: OK (SHA256)",
                "p.ovf: not verified: the manifest does not list it",
                "extra: not part of the package",
            ][..],
        ),
        (
            other,
            2,
            &["disk.raw: DIFFERS", "gone: MISSING", "The package is damaged."][..],
        ),
    ] {
        scratch.file("p.mf", text.as_bytes());
        scratch.file("p.cert", b"SHA256(p.mf)= 00\n");
        scratch.file("extra", b"x");
        tar(
            &scratch,
            "p.ova",
            &["p.ovf", "p.mf", "p.cert", "disk.raw", "extra"],
        );
        let done = native(&scratch).words("check p.ova").finish().expect(code);
        for word in words
            .iter()
            .chain(&["is signed ('p.cert'). The signature was not verified."])
        {
            assert!(done.out().contains(word), "no '{word}' in\n{done}");
        }
    }
}

#[test]
fn ova__hostile__a_disk_that_names_other_files() {
    let scratch = Scratch::new();
    make_disk(&scratch, "base.raw");
    oracle::create_overlay(scratch.join("over.qcow2"), "", "base.raw", "raw", None);
    scratch.file("flat.vmdk", b"# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\ncreateType=\"monolithicFlat\"\nRW 98304 FLAT \"base.raw\" 0\n");
    for (name, named) in [("over.qcow2", "base.raw"), ("flat.vmdk", "base.raw")] {
        let text = descriptor(&format!("ovf:href='{name}'"), "ovf:capacity='50331648'");
        scratch.file("p.ovf", text.as_bytes());
        tar(&scratch, "p.ova", &["p.ovf", name]);
        let words = format!("names the file '{named}': a disk in a package must need no other");
        refused(&scratch, "p.ova", &words);
        refused(&scratch, "p.ovf", &words);
    }
}
