//! Names inside images, and things that are no images.

use std::os::unix::fs::symlink;

use diskmill_testkit::{Run, Scratch, hash};

use super::image::{Base, Image};
use super::{Fate, assert_fate, run, run_all};

/// An overlay that names `name` as its backing file, of `format`.
fn backed_by(scratch: &Scratch, name: &str, format: &str) {
    let mut image = Image::make(scratch, Base::Plain);
    image.bytes[112..4096].fill(0);
    // Backing format, the end, the name.
    image.put32(112, 0xe279_2aca);
    image.put32(116, format.len() as u32);
    image.put(120, format.as_bytes());
    image.put64(8, 512);
    image.put32(16, name.len() as u32);
    image.put(512, name.as_bytes());
    // Nothing is allocated, so all is read from below.
    let l1 = image.l1();
    image.put64(l1, 0);
    image.write(scratch.join("bad.qcow2"));
}

fn opens_nothing_of(name: &str, format: &str) {
    let scratch = Scratch::new();
    backed_by(&scratch, name, format);
    for (words, done) in run_all(&scratch, "bad.qcow2", "qcow2") {
        if words.starts_with("convert") {
            assert_eq!(done.code, Some(1), "{done}");
        }
    }
}

#[test]
fn backing__is_itself() {
    opens_nothing_of("bad.qcow2", "qcow2");
}

#[test]
fn backing__cycle_of_two() {
    let scratch = Scratch::new();
    backed_by(&scratch, "bad.qcow2", "qcow2");
    std::fs::rename(scratch.join("bad.qcow2"), scratch.join("two.qcow2")).unwrap();
    backed_by(&scratch, "two.qcow2", "qcow2");
    for (words, done) in run_all(&scratch, "bad.qcow2", "qcow2") {
        if words.starts_with("convert") {
            assert_eq!(done.code, Some(1), "{done}");
        }
    }
}

#[test]
fn backing__cycle_through_a_link() {
    let scratch = Scratch::new();
    backed_by(&scratch, "link.qcow2", "qcow2");
    symlink("bad.qcow2", scratch.join("link.qcow2")).unwrap();
    let done = run(&scratch, &["qemu-img"], "convert -f qcow2 -O raw bad.qcow2 out");
    assert_eq!(done.code, Some(1), "{done}");
    let done = run(&scratch, &[], "convert -f qcow2 -O raw bad.qcow2 out");
    assert_eq!(done.code, Some(1), "{done}");
}

#[test]
fn backing__chain_of_a_thousand() {
    let scratch = Scratch::new();
    let image = {
        backed_by(&scratch, "0000.qcow2", "qcow2");
        std::fs::read(scratch.join("bad.qcow2")).unwrap()
    };
    for index in 0..1000 {
        let mut one = Image { bytes: image.clone() };
        one.put(512, format!("{:04}.qcow2", index + 1).as_bytes());
        one.write(scratch.join(format!("{index:04}.qcow2")));
    }
    for front in [&["qemu-img"][..], &[][..]] {
        let done = run(&scratch, front, "convert -f qcow2 -O raw bad.qcow2 out");
        assert_eq!(done.code, Some(1), "{done}");
        let done = run(&scratch, front, "info --backing-chain -f qcow2 bad.qcow2");
        assert_eq!(done.code, Some(1), "{done}");
    }
}

#[test]
fn backing__is_a_fifo() {
    let scratch = Scratch::new();
    Run::new("mkfifo").arg(scratch.join("fifo")).ok();
    backed_by(&scratch, "fifo", "raw");
    for (words, done) in run_all(&scratch, "bad.qcow2", "qcow2") {
        if words.starts_with("convert") {
            assert_eq!(done.code, Some(1), "{done}");
        }
    }
}

#[test]
fn backing__is_a_device_or_a_folder() {
    for name in ["/dev/zero", "/dev/tty", "/dev/null", "/", "/proc/self/mem"] {
        opens_nothing_of(name, "raw");
    }
}

#[test]
fn backing__names_a_protocol() {
    for name in [
        "nbd://127.0.0.1:1/x",
        "nbd:unix:/nonexistent:exportname=x",
        "http://127.0.0.1:1/x",
        "ssh://127.0.0.1/x",
        "fat:/etc",
        "null-co://",
        "blkdebug::/etc/passwd",
        "json:{\"driver\":\"nbd\",\"host\":\"127.0.0.1\"}",
        "json:{\"driver\":\"vvfat\",\"dir\":\"/etc\"}",
        "json:{\"driver\":\"null-co\",\"size\":1048576}",
        "json:{",
        "json:[]",
        "json:{\"driver\":\"raw\",\"file\":{\"driver\":\"raw\",\"file\":{}}}",
    ] {
        opens_nothing_of(name, "raw");
    }
}

#[test]
fn backing__json_nested_deeply() {
    // Backing names have at most 1,023 bytes; the command line has no such limit.
    let deep = format!("json:{}1{}", "{\"file\":".repeat(110), "}".repeat(110));
    opens_nothing_of(&deep, "raw");
    let scratch = Scratch::new();
    let deep = format!("json:{}1{}", "{\"file\":".repeat(10_000), "}".repeat(10_000));
    for front in [&["qemu-img"][..], &[][..]] {
        let done = run(&scratch, front, &format!("info {deep}"));
        assert_eq!(done.code, Some(1), "{done}");
    }
}

/// The trust policy of the native front end: nothing outside the image's folder is opened because an image says so.
#[test]
fn backing__outside_the_folder_is_refused_natively() {
    let outside = Scratch::new();
    outside.file("secret.raw", &[0x53; 65536]);
    let scratch = Scratch::new();
    symlink(outside.join("secret.raw"), scratch.join("link.raw")).unwrap();
    let name = outside.join("secret.raw").display().to_string();
    for name in [
        name.as_str(),
        "link.raw",
        "/proc/self/root/etc/passwd",
        "../../../../../../../etc/passwd",
        "/etc/passwd",
    ] {
        backed_by(&scratch, name, "raw");
        let done = run(&scratch, &[], "convert -f qcow2 -O raw bad.qcow2 out");
        assert_eq!(done.code, Some(1), "{name} was read\n{done}");
        assert!(!scratch.join("out").exists());
        for words in ["info -f qcow2 bad.qcow2", "check -f qcow2 bad.qcow2"] {
            run(&scratch, &[], words);
        }
    }
    let done = run(&scratch, &[], "convert --untrusted -f qcow2 -O raw bad.qcow2 out");
    assert_eq!(done.code, Some(1), "{done}");
}

#[test]
fn data_file__names_another_file() {
    for name in [
        "/etc/passwd",
        "other.raw",
        "nbd://127.0.0.1:1/x",
        "json:{}",
        "/dev/zero",
        "bad.qcow2",
        "fifo",
    ] {
        let scratch = Scratch::new();
        Run::new("mkfifo").arg(scratch.join("fifo")).ok();
        let mut image = Image::make(&scratch, Base::DataFile);
        image.bytes[112..4096].fill(0);
        image.put32(112, 0x4441_5441);
        image.put32(116, name.len() as u32);
        image.put(120, name.as_bytes());
        image.write(scratch.join("bad.qcow2"));
        let before = hash::sha256_file("/etc/passwd");
        run_all(&scratch, "bad.qcow2", "qcow2");
        assert_eq!(before, hash::sha256_file("/etc/passwd"));
        let done = run(&scratch, &[], "convert --untrusted -f qcow2 -O raw bad.qcow2 out");
        assert_eq!(done.code, Some(1), "{done}");
    }
}

#[test]
fn names__with_escapes_do_not_reach_the_terminal() {
    let scratch = Scratch::new();
    backed_by(&scratch, "\x1b[31mred\x07\n.raw", "raw");
    for words in [
        "info -f qcow2 bad.qcow2",
        "info --backing-chain -f qcow2 bad.qcow2",
        "map -f qcow2 bad.qcow2",
    ] {
        let done = run(&scratch, &[], words);
        assert!(
            !done.out().contains('\x1b') && !done.out().contains('\x07'),
            "{done}"
        );
    }
    for front in [&["qemu-img"][..], &[][..]] {
        let done = run(&scratch, front, "info --output=json -f qcow2 bad.qcow2");
        if done.code == Some(0) {
            assert_eq!(done.json()["backing-filename"], "\x1b[31mred\x07\n.raw");
        }
    }
}

#[test]
fn raw__is_no_regular_file() {
    let scratch = Scratch::new();
    scratch.file("other.raw", &[0; 512]);
    Run::new("mkfifo").arg(scratch.join("fifo")).ok();
    std::fs::create_dir(scratch.join("folder")).unwrap();
    for name in ["fifo", "folder", "/dev/zero", "/dev/tty"] {
        for (_, done) in run_all(&scratch, name, "raw") {
            assert!(matches!(done.code, Some(1 | 2 | 63)), "{done}");
        }
    }
}

#[test]
fn raw__as_long_as_a_file_can_be() {
    let scratch = Scratch::beneath("/dev/shm");
    scratch.file("other.raw", &[0; 512]);
    scratch.hole("bad.raw", (1 << 63) - 4096);
    for front in [&["qemu-img"][..], &[][..]] {
        for words in [
            "info -f raw bad.raw",
            "map -f raw --output=json bad.raw",
            "convert -f raw -O qcow2 bad.raw out",
            "compare -f raw -F raw bad.raw other.raw",
            "measure -f raw -O qcow2 bad.raw",
        ] {
            run(&scratch, front, words);
            let _ = std::fs::remove_file(scratch.join("out"));
        }
    }
}

/// A guest that writes a qcow2 header into its raw disk must not get files read, or written, by whoever grows it.
#[test]
fn raw__with_a_planted_header() {
    let scratch = Scratch::new();
    let secret = scratch.file("secret.raw", &[0x53; 65536]);
    backed_by(&scratch, "secret.raw", "raw");
    std::fs::rename(scratch.join("bad.qcow2"), scratch.join("disk.raw")).unwrap();
    for front in [&["qemu-img"][..], &[][..]] {
        let done = run(&scratch, front, "convert -f raw -O raw disk.raw out");
        assert_eq!(done.code, Some(0), "{done}");
        assert_eq!(
            hash::sha256_file(scratch.join("out")),
            hash::sha256_file(scratch.join("disk.raw"))
        );
        std::fs::remove_file(scratch.join("out")).unwrap();
        run(&scratch, front, "resize -f raw disk.raw +1M");
        assert_eq!(std::fs::read(&secret).unwrap(), [0x53; 65536]);
    }
}

#[test]
fn empty_and_short_files() {
    for len in [0, 1, 3, 4, 7, 8, 71, 511] {
        let scratch = Scratch::new();
        scratch.file("other.raw", &[0; 512]);
        let mut bytes = b"QFI\xfb\0\0\0\x03".to_vec();
        bytes.resize(len.max(8), 0);
        bytes.truncate(len);
        scratch.file("bad.qcow2", &bytes);
        assert_fate(&scratch, "bad.qcow2", "qcow2", Fate::Refused(&[]));
    }
}
