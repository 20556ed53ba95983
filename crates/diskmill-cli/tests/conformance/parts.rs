//! `dd` and `bench`, side by side with the real ones.

use diskmill_testkit::sparse_random::SparseRandom;
use diskmill_testkit::{Run, Scratch, oracle};

use crate::tools::{binary, native, ours, theirs};

const SIZE: u64 = 300 << 10;

fn with_disk() -> Scratch {
    let scratch = Scratch::new();
    SparseRandom::new(5, SIZE + 10_000).write_raw(scratch.join("disk.raw"));
    oracle::convert(
        ["-c"],
        scratch.join("disk.raw"),
        "raw",
        scratch.join("disk.qcow2"),
        "qcow2",
    );
    scratch
}

/// Both run the words; what they say and the file they make must be the same.
fn both(scratch: &Scratch, words: &str) {
    let mut made = Vec::new();
    let mut said = Vec::new();
    let format = if words.contains("-O qcow2") {
        "qcow2"
    } else {
        "raw"
    };
    for run in [ours(scratch), theirs(scratch)] {
        let _ = std::fs::remove_file(scratch.join("out"));
        let done = run.words(words).finish();
        said.push((done.code, without_time(&done.out()), done.err()));
        let out = scratch.join("out");
        made.push(match (out.exists(), format) {
            (false, _) => None,
            (true, "raw") => Some(std::fs::read(out).unwrap()),
            (true, format) => {
                oracle::assert_clean(&out, format);
                oracle::convert(["-S", "4k"], &out, format, scratch.join("out.raw"), "raw");
                Some(std::fs::read(scratch.join("out.raw")).unwrap())
            }
        });
    }
    assert_eq!(said[0], said[1], "{words}");
    assert!(made[0] == made[1], "{words}: not the same file");
}

/// The text of a run of `bench` without the seconds it took.
fn without_time(text: &str) -> String {
    let untimed = |line: &str| match line.strip_prefix("Run completed in ") {
        Some(time) => {
            let number = time.strip_suffix(" seconds.").expect("seconds");
            assert!(
                number.parse::<f64>().is_ok() && number.split('.').nth(1).is_some_and(|part| part.len() == 3)
            );
            "Run completed\n".to_owned()
        }
        None => format!("{line}\n"),
    };
    text.lines().map(untimed).collect()
}

#[test]
fn dd__copies_what_the_real_one_copies() {
    let scratch = with_disk();
    for words in [
        "dd if=disk.raw of=out",
        "dd -f raw -O qcow2 if=disk.raw of=out",
        "dd if=disk.qcow2 of=out",
        "dd -f qcow2 -O qcow2 bs=3k skip=7 if=disk.qcow2 of=out",
        "dd if=disk.raw of=out bs=1k count=3",
        "dd if=disk.raw of=out bs=1k count=30 skip=20",
        "dd if=disk.raw of=out bs=1k count=3 skip=5",
        "dd if=disk.raw of=out bs=1k skip=2",
        "dd if=disk.raw of=out bs=1k skip=2000",
        "dd -O qcow2 if=disk.raw of=out bs=1k skip=2000",
        "dd if=disk.raw of=out count=0",
        "dd if=disk.raw of=out bs=1 count=5",
        "dd if=disk.raw of=out bs=513 count=5",
        "dd if=disk.raw of=out bs=1b count=600",
        "dd if=disk.raw of=out bs=0x400 skip=0x10",
        "dd if=disk.raw of=out bs=2147483647",
        "dd if=disk.raw of=out bs=4k count=9223372036854775807",
        "dd if=disk.raw of=out skip=9223372036854775807",
        "dd if=nothing of=nowhere if=disk.qcow2 of=out bs=64k skip=1",
        "dd -f raw if=disk.qcow2 of=out bs=64k count=1",
        "dd -U if=disk.raw of=out",
        "dd --image-opts if=driver=raw,file.filename=disk.raw of=out",
    ] {
        both(&scratch, words);
    }
}

#[test]
fn dd__refuses_what_the_real_one_refuses() {
    let scratch = with_disk();
    for words in [
        "dd",
        "dd if=disk.raw",
        "dd of=out",
        "dd disk.raw out",
        "dd if=disk.raw of=out bogus",
        "dd if=disk.raw of=out seek=1",
        "dd if=disk.raw of=out bs=0",
        "dd if=disk.raw of=out bs=-1",
        "dd if=disk.raw of=out bs=x",
        "dd if=disk.raw of=out bs=1kB",
        "dd if=disk.raw of=out bs=3G",
        "dd if=disk.raw of=out count=1k",
        "dd if=disk.raw of=out count=-5",
        "dd if=disk.raw of=out count=9223372036854775808",
        "dd if=disk.raw of=out skip=1k",
        "dd if=missing of=out",
        "dd if= of=out",
        "dd -f qcow2 if=disk.raw of=out",
        "dd -O nofmt if=disk.raw of=out",
        "dd -q if=disk.raw of=out",
        "dd if=disk.raw of=nodir/out",
    ] {
        both(&scratch, words);
    }
}

/// What the real tool does not have: sizes, streams, snapshots, and outputs that exist.
#[test]
fn dd__goes_further() {
    let scratch = with_disk();
    let mut disk = std::fs::read(scratch.join("disk.raw")).unwrap();
    disk.resize(disk.len().next_multiple_of(512), 0);
    let piped = |line: &str| {
        Run::new("sh")
            .dir(scratch.path())
            .args(["-c", line, "sh"])
            .arg(binary())
            .ok();
        std::fs::read(scratch.join("piped")).unwrap()
    };
    let len = disk.len();
    assert!(piped("cat disk.raw | \"$1\" qemu-img dd isize=9999999 of=piped") == disk);
    assert!(piped("cat disk.raw | \"$1\" dd bs=1k skip=3 count=5 > piped") == disk[3072..8192]);
    assert!(piped("\"$1\" dd bs=1k skip=3 count=5 < disk.raw if=- of=- > piped") == disk[3072..8192]);
    assert!(piped("\"$1\" dd if=disk.qcow2 > piped")[..len] == disk);
    let padded = piped("cat disk.raw | \"$1\" qemu-img dd osize=1M of=piped");
    assert!(padded[..len] == disk && padded.len() == 1 << 20 && padded[len..].iter().all(|byte| *byte == 0));
    let cut = piped("\"$1\" qemu-img dd osize=64k if=disk.raw of=piped");
    assert!(cut == disk[..64 << 10]);

    // An output that exists keeps what is behind the end of what is copied.
    theirs(&scratch).words("create -q -f qcow2 there.qcow2 1M").ok();
    oracle::io(scratch.join("there.qcow2"), "qcow2", ["write -P 9 0 1M"]);
    ours(&scratch)
        .words("dd -n -O qcow2 bs=64k count=1 if=disk.raw of=there.qcow2")
        .ok();
    ours(&scratch).words("convert -O raw there.qcow2 there.raw").ok();
    let there = std::fs::read(scratch.join("there.raw")).unwrap();
    assert!(there[..64 << 10] == disk[..64 << 10] && there[64 << 10..].iter().all(|byte| *byte == 9));

    theirs(&scratch).words("snapshot -c one there.qcow2").ok();
    oracle::io(scratch.join("there.qcow2"), "qcow2", ["write -P 8 0 1M"]);
    ours(&scratch).words("dd -l one if=there.qcow2 of=one.raw").ok();
    assert!(std::fs::read(scratch.join("one.raw")).unwrap() == there);
    // A copy that fails leaves the old output.
    scratch.file("old", b"precious");
    native(&scratch)
        .words("dd --format qcow2 if=disk.raw of=old")
        .finish()
        .expect(1);
    assert_eq!(std::fs::read(scratch.join("old")).unwrap(), b"precious");
}

#[test]
fn bench__says_what_the_real_one_says() {
    let scratch = with_disk();
    theirs(&scratch).words("create -q -f raw b.raw 4M").ok();
    for words in [
        "bench -c 10 b.raw",
        "bench -f raw -c 10 -d 1 -s 512 b.raw",
        "bench -f raw -c 100 -w --pattern 7 b.raw",
        "bench -f raw -c 10 --pattern 7 b.raw",
        "bench -f raw -c 200 -w --flush-interval 64 b.raw",
        "bench -f raw -c 200 -w --flush-interval 65 -d 64 --no-drain b.raw",
        "bench -f raw -c 10 -o 1M -S 8k -s 4k b.raw",
        "bench -f raw -c 3000 -s 8k b.raw",
        "bench -f raw -c 4 -i threads -t none b.raw",
        "bench -f raw -c 4 -n -t none b.raw",
        "bench -f raw -c 4 -q b.raw",
        "bench -f raw -c 4 -U b.raw",
        "bench -f qcow2 -c 40 -s 1k disk.qcow2",
        "bench -c 0x4 -f raw b.raw",
        "bench",
        "bench missing",
        "bench -f raw b.raw extra",
        "bench -f qcow2 b.raw",
        "bench -f raw -c 10 -w --flush-interval 2 b.raw",
        "bench -f raw -c 10 --flush-interval 64 b.raw",
        "bench -f raw -c 10 --pattern 300 -w b.raw",
        "bench -f raw -c 0 b.raw",
        "bench -f raw -c 1k b.raw",
        "bench -f raw -d 0 b.raw",
        "bench -f raw -s 0 b.raw",
        "bench -f raw -s 3G b.raw",
        "bench -f raw -S x b.raw",
        "bench -f raw -o -1 b.raw",
        "bench -f raw -i bogus b.raw",
        "bench -f raw -n b.raw",
        "bench -f raw -t bogus b.raw",
        "bench -f raw -U -w b.raw",
        "bench -f raw -c 10 -o 5M b.raw",
        "bench -f raw -c 2 -s 5M b.raw",
    ] {
        both(&scratch, words);
    }
    // What it writes is there.
    ours(&scratch)
        .words("bench -f raw -c 16 -s 4k -o 64k -w --pattern 0x5a b.raw")
        .ok();
    oracle::io(
        scratch.join("b.raw"),
        "raw",
        ["read -P 0x5a 64k 64k", "read -P 0 128k 64k"],
    );
    let done = native(&scratch)
        .words("bench --output=json --format raw --count 8 b.raw")
        .ok();
    assert_eq!(done.json()["requests"], 8, "{done}");
}
