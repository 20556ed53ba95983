//! vmdk images made to do harm: headers, tables, streams, descriptors, and the files they name.

use std::os::unix::fs::symlink;

use diskmill_testkit::{Run, Scratch, vmware};

use super::{Fate, assert_fate, run, run_all};
use crate::tools::native;

/// Bytes of the disk.
const SIZE: usize = (1 << 20) + 512;

struct Image {
    scratch: Scratch,
    bytes: Vec<u8>,
}

impl Image {
    /// An image with data in its first grains.
    fn make(subformat: &str) -> Self {
        let scratch = Scratch::new();
        let mut disk = vec![0; SIZE];
        for (at, byte) in disk[..300_000].iter_mut().enumerate() {
            *byte = (at / 100 % 251) as u8 | 1;
        }
        scratch.file("other.raw", &disk);
        native(&scratch)
            .words(&format!(
                "convert -f raw -O vmdk -o subformat={subformat} other.raw good.vmdk"
            ))
            .ok();
        let bytes = std::fs::read(scratch.join("good.vmdk")).unwrap();
        std::fs::remove_file(scratch.join("good.vmdk")).unwrap();
        Self { scratch, bytes }
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn word(&self, at: usize) -> usize {
        u32::from_le_bytes(self.bytes[at..at + 4].try_into().unwrap()) as usize
    }

    /// Where the first grain table of the directory that byte `field` of the header names is.
    fn table(&self, field: usize) -> usize {
        self.word(self.word(field) * 512) * 512
    }

    fn fate(&self, fate: Fate) {
        std::fs::write(self.scratch.join("bad.vmdk"), &self.bytes).unwrap();
        assert_fate(&self.scratch, "bad.vmdk", "vmdk", fate);
    }
}

fn patched(at: usize, bytes: &[u8], fate: Fate) {
    let mut image = Image::make("monolithicSparse");
    image.put(at, bytes);
    image.fate(fate);
}

#[test]
fn vmdk_header__version_4() {
    patched(4, &[4], Fate::Refused(&["version is 4, must be 1 to 3"]));
}

#[test]
fn vmdk_header__flag_18() {
    patched(10, &[4], Fate::Refused(&["flags", "not known"]));
}

#[test]
fn vmdk_header__compress_9() {
    patched(77, &[9], Fate::Refused(&["compressAlgorithm 9"]));
}

#[test]
fn vmdk_header__sent_as_text() {
    patched(73, b"\n \n\n", Fate::Refused(&["transferred as text"]));
}

#[test]
fn vmdk_header__grains() {
    for grain in [0_u64, 3, 1 << 40] {
        patched(20, &grain.to_le_bytes(), Fate::Refused(&["grainSize is"]));
    }
}

#[test]
fn vmdk_header__entries_of_a_table() {
    for entries in [0_u32, 513] {
        patched(44, &entries.to_le_bytes(), Fate::Refused(&["numGTEsPerGT is"]));
    }
}

#[test]
fn vmdk_header__capacity() {
    for capacity in [1_u64 << 63, 1 << 54, 1 << 50] {
        patched(12, &capacity.to_le_bytes(), Fate::Refused(&[]));
    }
    // As many tables as there may be, which the file cannot hold.
    patched(
        12,
        &(1_u64 << 41).to_le_bytes(),
        Fate::DataRefused(&["the grain directory"]),
    );
}

#[test]
fn vmdk_header__overhead_past_the_end() {
    patched(
        64,
        &(1_u64 << 30).to_le_bytes(),
        Fate::DataRefused(&["truncated"]),
    );
}

#[test]
fn vmdk_header__directory_past_the_end() {
    for at in [1_u64 << 30, u64::MAX - 1] {
        patched(56, &at.to_le_bytes(), Fate::DataRefused(&["the grain directory"]));
    }
}

#[test]
fn vmdk_header__no_footer() {
    patched(56, &u64::MAX.to_le_bytes(), Fate::Refused(&["invalid footer"]));
}

#[test]
fn vmdk_header__descriptor() {
    patched(36, &[0; 8], Fate::Refused(&["descriptorSize is 0"]));
    patched(28, &(1_u64 << 40).to_le_bytes(), Fate::Refused(&["descriptor"]));
    patched(28, &[0; 8], Fate::Refused(&["open the descriptor file"]));
    // More than the file has is what the file has: it is read, but the tables are in there.
    patched(36, &(1_u64 << 40).to_le_bytes(), Fate::Damaged);
}

#[test]
fn vmdk_header__cut_short() {
    for len in [4, 79, 511, 700] {
        let mut image = Image::make("monolithicSparse");
        image.bytes.truncate(len);
        std::fs::write(image.scratch.join("bad.vmdk"), &image.bytes).unwrap();
        for (words, done) in run_all(&image.scratch, "bad.vmdk", "vmdk") {
            assert!(done.code != Some(0) || words.starts_with("info"), "{done}");
        }
    }
}

#[test]
fn vmdk_tables__past_the_end() {
    let mut image = Image::make("monolithicSparse");
    let gd = image.word(56) * 512;
    image.put(gd, &0x00ff_ffff_u32.to_le_bytes());
    image.fate(Fate::Damaged);
    let mut image = Image::make("monolithicSparse");
    let at = image.table(56);
    image.put(at, &0x00ff_ffff_u32.to_le_bytes());
    image.fate(Fate::Damaged);
}

#[test]
fn vmdk_tables__grains_twice_or_in_the_tables() {
    for (slot, value) in [(4, None), (0, Some(1_u32)), (0, Some(25))] {
        let mut image = Image::make("monolithicSparse");
        let first = image.word(image.table(56)) as u32;
        for field in [48, 56] {
            let at = image.table(field) + slot;
            image.put(at, &value.unwrap_or(first).to_le_bytes());
        }
        image.fate(Fate::Damaged);
    }
}

/// A stream with `change` made to its first grain: its marker is at byte 65536.
fn stream(change: impl FnOnce(&mut Image), fate: Fate) {
    let mut image = Image::make("streamOptimized");
    change(&mut image);
    image.fate(fate);
}

#[test]
fn vmdk_stream__markers() {
    let grain = 65_536;
    stream(|image| image.put(grain, &[128]), Fate::Damaged);
    for size in [0_u32, 0x7fff_ffff, 200_000] {
        stream(|image| image.put(grain + 8, &size.to_le_bytes()), Fate::Damaged);
    }
}

#[test]
fn vmdk_stream__data() {
    let grain = 65_536;
    let zlib = |bytes: &[u8]| {
        let sh = "import sys, zlib; sys.stdout.buffer.write(zlib.compress(sys.stdin.buffer.read()))";
        let scratch = Scratch::new();
        scratch.file("in", bytes);
        let line = format!("python3 -c '{sh}' < in > out");
        Run::new("sh").dir(scratch.path()).args(["-c", &line]).ok();
        std::fs::read(scratch.join("out")).unwrap()
    };
    // Damaged, a bomb, too short.
    stream(|image| image.put(grain + 20, &[0xff; 40]), Fate::Damaged);
    for len in [64 << 20, 65_537, 65_535, 0] {
        let packed = zlib(&vec![0; len]);
        stream(
            |image| {
                let packed = &packed[..packed.len().min(image.word(grain + 8))];
                image.put(grain + 8, &(packed.len() as u32).to_le_bytes());
                image.put(grain + 12, packed);
            },
            Fate::Damaged,
        );
    }
}

#[test]
fn vmdk_stream__footer() {
    let invalid = Fate::Refused(&["invalid footer"]);
    let end = |image: &Image| image.bytes.len();
    stream(|image| image.bytes.truncate(end(image) - 512), invalid);
    stream(|image| image.bytes.truncate(66_048), invalid);
    stream(|image| image.bytes.extend_from_slice(&[7; 512]), invalid);
    stream(|image| image.put(end(image) - 1524, &[1]), invalid);
    stream(
        |image| image.put(end(image) - 1024 + 56, &u64::MAX.to_le_bytes()),
        invalid,
    );
    stream(|image| image.put(end(image) - 1024 + 12, &[2]), invalid);
    // A block that was filled with zeros on its way is no damage.
    let image = Image::make("streamOptimized");
    let padded = [image.bytes.clone(), vec![0; 70_000]].concat();
    image.scratch.file("padded.vmdk", &padded);
    for words in ["check padded.vmdk", "compare padded.vmdk other.raw"] {
        native(&image.scratch).words(words).ok();
    }
    stream(|image| image.bytes.resize(end(image) + (2 << 20), 0), invalid);
}

/// A descriptor by itself, `ext.data` beside it with 4 MiB.
fn described(kind: &str, lines: &[&str]) -> Scratch {
    let scratch = Scratch::new();
    scratch.file("ext.data", &vec![3; 4 << 20]);
    scratch.file("other.raw", &vec![3; 4 << 20]);
    let lines: Vec<String> = lines.iter().map(|line| (*line).to_owned()).collect();
    scratch.file("bad.vmdk", &vmware::descriptor(kind, &lines));
    scratch
}

#[test]
fn vmdk_text__extents() {
    let fate = |lines: &[&str], fate| {
        let scratch = described("custom", lines);
        assert_fate(&scratch, "bad.vmdk", "vmdk", fate);
    };
    let good = "RW 8192 FLAT \"ext.data\" 0";
    fate(&[good], Fate::Opens);
    fate(&["", "", good, ""], Fate::Opens);
    fate(
        &["RW 8193 FLAT \"ext.data\" 0"],
        Fate::Refused(&["runs past the end"]),
    );
    fate(
        &["RW 8192 FLAT \"ext.data\" 1"],
        Fate::Refused(&["runs past the end"]),
    );
    fate(
        &["RW -1 FLAT \"ext.data\" 0"],
        Fate::Refused(&["number of sectors"]),
    );
    fate(&["RW 0 FLAT \"ext.data\" 0"], Fate::Refused(&["empty"]));
    fate(&["RW 8192 FLAT \"ext.data"], Fate::Refused(&["in quotes"]));
    fate(&["RW 8192 VMFSRDM \"ext.data\""], Fate::Refused(&["VMFSRDM"]));
    fate(&["RW 8192 SPARSE \"ext.data\""], Fate::Refused(&["magic"]));
    fate(&["RW 8192 VMFSSPARSE \"ext.data\""], Fate::Refused(&["magic"]));
    fate(&["RW 8192 SESPARSE \"ext.data\""], Fate::Refused(&["magic"]));
    fate(
        &["RW 8192 FLAT \"bad.vmdk\" 0"],
        Fate::Refused(&["extent file not opened"]),
    );
    fate(&[], Fate::Refused(&["no extents"]));
    fate(
        &["RW 18014398509481983 ZERO", "RW 2 ZERO"],
        Fate::Refused(&["2^54"]),
    );
    let many = vec!["RW 1 ZERO"; 100_000];
    fate(&many, Fate::Refused(&[]));
    let many = vec!["RW 1 ZERO"; 5000];
    fate(&many, Fate::Refused(&["more than 4096"]));
}

#[test]
fn vmdk_text__extents_in_the_same_bytes() {
    for lines in [
        ["RW 4096 FLAT \"ext.data\" 0", "RW 4096 FLAT \"ext.data\" 4095"],
        ["RW 2048 SPARSE \"part.vmdk\"", "RW 2048 SPARSE \"part.vmdk\""],
    ] {
        let scratch = described("custom", &lines);
        let part = Image::make("monolithicSparse");
        std::fs::write(scratch.join("part.vmdk"), &part.bytes).unwrap();
        assert_fate(&scratch, "bad.vmdk", "vmdk", Fate::Damaged);
        let before = std::fs::read(scratch.join("part.vmdk")).unwrap();
        for words in [
            "convert -n -f raw -O vmdk other.raw bad.vmdk",
            "compact bad.vmdk",
            "check --repair all bad.vmdk",
        ] {
            let done = run(&scratch, &[], words);
            assert_ne!(done.code, Some(0), "{done}");
            let text = format!("{}{}", done.out(), done.err());
            assert!(
                text.contains("same bytes of one file") || words.starts_with("compact"),
                "{done}"
            );
        }
        assert!(std::fs::read(scratch.join("part.vmdk")).unwrap() == before);
        assert!(std::fs::read(scratch.join("ext.data")).unwrap() == vec![3; 4 << 20]);
    }
    let apart = ["RW 4096 FLAT \"ext.data\" 4096", "RW 4096 FLAT \"ext.data\" 0"];
    let scratch = described("custom", &apart);
    assert_fate(&scratch, "bad.vmdk", "vmdk", Fate::Opens);
}

#[test]
fn vmdk_text__only_zeros_is_a_disk() {
    let scratch = described("custom", &["RW 8192 ZERO"]);
    for front in [&["qemu-img"][..], &[]] {
        let done = run(&scratch, front, "convert -f vmdk -O raw bad.vmdk out");
        assert_eq!(done.code, Some(0), "{done}");
        assert!(std::fs::read(scratch.join("out")).unwrap() == vec![0; 4 << 20]);
    }
    let scratch = described("custom", &["NOACCESS 8192 FLAT \"ext.data\" 0"]);
    let done = run(&scratch, &[], "convert -f vmdk -O raw bad.vmdk out");
    assert_eq!(done.code, Some(1), "{done}");
    assert!(done.err().contains("NOACCESS"), "{done}");
}

#[test]
fn vmdk_text__form() {
    for (from, to) in [
        ("createType=\"custom\"", "createType=\"custom"),
        ("createType=\"custom\"", "createType=\"fullDevice\""),
        ("createType=\"custom\"", ""),
        ("version=1", "version=1\0"),
        ("version=1", "version=4"),
        ("CID=12345678", "CID=x"),
        ("CID=12345678", "CID=12345678\nCID=12345678"),
    ] {
        let scratch = described("custom", &["RW 8192 FLAT \"ext.data\" 0"]);
        let text = std::fs::read_to_string(scratch.join("bad.vmdk")).unwrap();
        assert!(text.contains(from));
        scratch.file("bad.vmdk", text.replacen(from, to, 1).as_bytes());
        assert_fate(&scratch, "bad.vmdk", "vmdk", Fate::Refused(&[]));
    }
    let scratch = described("custom", &["RW 8192 FLAT \"ext.data\" 0"]);
    scratch.file("bad.vmdk", &vec![b'x'; 2 << 20]);
    assert_fate(&scratch, "bad.vmdk", "vmdk", Fate::Refused(&[]));
}

/// A sparse file that only holds a descriptor.
fn container(text: &[u8]) -> Vec<u8> {
    let mut image = Image::make("monolithicSparse");
    image.put(12, &[0; 8]);
    image.put(512, &[0; 20 * 512]);
    image.put(512, text);
    image.bytes
}

#[test]
fn vmdk_text__in_a_file_that_names_itself() {
    let line = |name: &str| vec![format!("RW 8192 SPARSE \"{name}\"")];
    let scratch = described("custom", &[]);
    scratch.file(
        "bad.vmdk",
        &container(&vmware::descriptor("monolithicSparse", &line("bad.vmdk"))),
    );
    assert_fate(
        &scratch,
        "bad.vmdk",
        "vmdk",
        Fate::Refused(&["extent file not opened"]),
    );
    // And one that names another such file.
    scratch.file(
        "bad.vmdk",
        &container(&vmware::descriptor("monolithicSparse", &line("ext.data"))),
    );
    scratch.file(
        "ext.data",
        &container(&vmware::descriptor("monolithicSparse", &line("bad.vmdk"))),
    );
    assert_fate(&scratch, "bad.vmdk", "vmdk", Fate::Refused(&["0 sectors"]));
}

/// Natively nothing outside the folder is opened because a descriptor says so, and no name is a protocol.
#[test]
fn vmdk_names__extents() {
    let outside = Scratch::new();
    outside.file("secret.raw", &vec![0x53; 4 << 20]);
    let secret = outside.join("secret.raw").display().to_string();
    for name in [
        secret.as_str(),
        "link.raw",
        "/etc/passwd",
        "../../../../../../../etc/passwd",
        "/dev/zero",
        "fifo",
        ".",
        "nbd:unix:/nonexistent:exportname=x",
        "json:{\\file\\}",
        "file:ext.data",
        "http://127.0.0.1:1/x",
    ] {
        let line = format!("RW 1 FLAT \"{name}\" 0");
        let scratch = described("custom", &[&line]);
        symlink(outside.join("secret.raw"), scratch.join("link.raw")).unwrap();
        Run::new("mkfifo").arg(scratch.join("fifo")).ok();
        for words in ["info -f vmdk bad.vmdk", "convert -f vmdk -O raw bad.vmdk out"] {
            let done = run(&scratch, &[], words);
            assert_eq!(done.code, Some(1), "{name} was opened\n{done}");
        }
        let done = run(&scratch, &["qemu-img"], "convert -f vmdk -O raw bad.vmdk out");
        let plain = name.contains("secret") || name.contains("link") || name.contains("passwd");
        assert_eq!(done.code == Some(0), plain, "{name}\n{done}");
        let done = run(&scratch, &[], "convert --untrusted -f vmdk -O raw bad.vmdk out2");
        assert_eq!(done.code, Some(1), "{done}");
    }
}

#[test]
fn vmdk_names__parents() {
    let scratch = described("custom", &[]);
    native(&scratch).words("create -f vmdk base.vmdk 4M").ok();
    native(&scratch)
        .words("create -f vmdk -b base.vmdk -F vmdk kid.vmdk")
        .ok();
    let bytes = std::fs::read(scratch.join("kid.vmdk")).unwrap();
    let hint = b"parentFileNameHint=\"base.vmdk\"";
    let at = bytes.windows(hint.len()).position(|text| text == hint).unwrap();
    for name in [
        "bad.vmdk",
        "nbd://127.0.0.1:1/x",
        "http://127.0.0.1:1/x",
        "/dev/zero",
        "json:{",
        "missing",
    ] {
        let new = format!("parentFileNameHint=\"{name}\"");
        let mut image = bytes.clone();
        let rest = image.split_off(at);
        image.extend_from_slice(new.as_bytes());
        image.extend_from_slice(&rest[hint.len()..]);
        // The descriptor has room to spare, of which this takes or leaves some.
        let shift = new.len() as i64 - hint.len() as i64;
        let end = 21 * 512;
        if shift > 0 {
            image.drain(end..end + shift as usize);
        } else {
            for _ in shift..0 {
                image.insert(end - (-shift) as usize, 0);
            }
        }
        scratch.file("bad.vmdk", &image);
        for (words, done) in run_all(&scratch, "bad.vmdk", "vmdk") {
            if words.starts_with("convert") {
                assert_eq!(done.code, Some(1), "{name}\n{done}");
            }
        }
    }
}
