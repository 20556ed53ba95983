//! The command under its own name: what it adds to `qemu-img`, and what it does more carefully.

use diskmill_testkit::{Run, Scratch, hash};

use crate::{Twins, diskmill, theirs};

#[test]
fn errors_tell_the_whole_chain_and_a_hint() {
    let twins = Twins::new();
    let done = diskmill(twins.ours.path())
        .words("info nonexistent")
        .finish()
        .expect(1);
    assert_eq!(done.out(), "");
    assert!(
        done.err()
            .starts_with("diskmill: error: cannot open 'nonexistent'"),
        "{done}"
    );
    assert!(done.err().contains("No such file or directory"), "{done}");
    assert!(done.err().contains("\n  hint: "), "{done}");
    let done = diskmill(twins.ours.path())
        .words("convert lost.qcow2 o")
        .finish()
        .expect(1);
    assert!(done.err().contains("missing'"), "{done}");
}

#[test]
fn usage_errors_point_to_help() {
    let scratch = Scratch::new();
    let cases = [
        ("", 1, "Usage: diskmill"),
        ("bogus", 1, "bogus"),
        ("info", 1, "file name"),
        ("info --bogus x", 1, "--bogus"),
        ("info --o x", 1, "--o"),
        ("convert -m 999 a b", 1, "between 1 and 256"),
        ("compare a", 2, "two image file names"),
        ("compare --bogus a b", 2, "--bogus"),
        ("convert --progress=loud a b", 1, "loud"),
    ];
    for (line, code, word) in cases {
        let done = diskmill(scratch.path()).words(line).finish().expect(code);
        assert!(done.err().contains(word), "{done}");
        assert!(done.err().contains("help"), "{done}");
        assert_eq!(done.out(), "", "{done}");
    }
}

#[test]
fn getopt_habits_hold_here_too() {
    let twins = Twins::new();
    for line in [
        "info a.qcow2 -fqcow2",
        "info --form qcow2 a.qcow2",
        "info -f raw a.qcow2 -f qcow2",
        "info -U -U -- a.qcow2",
    ] {
        let done = diskmill(twins.ours.path()).words(line).ok();
        assert!(done.out().contains("file format: qcow2"), "{done}");
    }
    diskmill(twins.ours.path())
        .words("resize -f raw --shrink a.raw -512k")
        .ok();
    assert_eq!(
        std::fs::metadata(twins.ours.join("a.raw")).unwrap().len(),
        512 << 10
    );
}

#[test]
fn json_is_qemus_and_more_commands_have_it() {
    let twins = Twins::new();
    let our = diskmill(twins.ours.path()).words("info --json a.qcow2").ok();
    let their = theirs(twins.ours.path()).words("info --output=json a.qcow2").ok();
    assert_eq!(our.out(), their.out());
    let dir = twins.ours.path();
    let made = diskmill(dir)
        .words("create --json -f qcow2 new.qcow2 1M")
        .ok()
        .json();
    assert_eq!(made["options"]["cluster_size"], "65536");
    let done = diskmill(dir)
        .words("convert --json -O qcow2 a.raw out.qcow2")
        .ok();
    assert_eq!(done.json()["virtual-size"], 1 << 20);
    let events: Vec<serde_json::Value> = done
        .err()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(events.first().unwrap()["event"], "start", "{done}");
    assert_eq!(events.last().unwrap()["event"], "done", "{done}");
    assert_eq!(events.last().unwrap()["total"], 1 << 20, "{done}");
    let verdict = diskmill(dir)
        .words("compare --output=json a.raw out.qcow2")
        .ok()
        .json();
    assert_eq!(verdict["identical"], true);
    let verdict = diskmill(dir)
        .words("compare --output=json a.raw a.qcow2")
        .finish()
        .expect(1)
        .json();
    assert_eq!(verdict["difference"], "content");
    let resized = diskmill(dir).words("resize --json out.qcow2 2M").ok().json();
    assert_eq!(resized["new-size"], 2 << 20);
}

#[test]
fn success_is_silent_where_nobody_watches() {
    let twins = Twins::new();
    let done = diskmill(twins.ours.path())
        .words("convert -O qcow2 a.raw o.qcow2")
        .ok();
    assert_eq!((done.out(), done.err()), (String::new(), String::new()));
    let done = diskmill(twins.ours.path())
        .words("convert -p -O qcow2 a.raw o.qcow2")
        .ok();
    assert_eq!(done.out(), "", "progress does not mix with results");
    assert!(done.err().contains("(100.00/100%)"), "{done}");
}

#[test]
fn dash_is_a_stream_here_and_a_name_under_qemu_img() {
    let twins = Twins::new();
    let disk = std::fs::read(twins.ours.join("a.raw")).unwrap();
    diskmill(twins.ours.path())
        .words("convert -O qcow2 - in.qcow2")
        .input(disk.clone())
        .ok();
    theirs(twins.ours.path()).words("compare a.raw in.qcow2").ok();
    let done = diskmill(twins.ours.path()).words("convert in.qcow2 -").ok();
    assert!(done.stdout == disk, "what comes out is not what went in");
    diskmill(twins.ours.path())
        .words("convert -O qcow2 a.raw -")
        .finish()
        .expect(1);
    twins.same_line("convert - o.raw");
    twins.same_line("convert a.raw -");
    assert!(twins.ours.join("-").exists());
}

#[test]
fn containers_are_named_and_not_converted_by_mistake() {
    let scratch = Scratch::new();
    scratch.file("plain", b"hello");
    Run::new("gzip").dir(scratch.path()).args(["-k", "plain"]).ok();
    Run::new("tar")
        .dir(scratch.path())
        .args(["cf", "box.ova", "plain"])
        .ok();
    for (name, word) in [("plain.gz", "gzip"), ("box.ova", "tar")] {
        let done = diskmill(scratch.path()).args(["info", name]).ok();
        assert!(done.out().contains(word), "{done}");
        let json = diskmill(scratch.path())
            .args(["info", "--json", name])
            .ok()
            .json();
        assert!(json["looks-like"].as_str().unwrap().contains(word));
        let done = diskmill(scratch.path())
            .args(["convert", name, "out.raw"])
            .finish()
            .expect(1);
        assert!(done.err().contains(word), "{done}");
        assert!(!scratch.join("out.raw").exists());
        diskmill(scratch.path())
            .args(["convert", "-f", "raw", name, "out.raw"])
            .ok();
        std::fs::remove_file(scratch.join("out.raw")).unwrap();
    }
}

#[test]
fn names_inside_images_are_followed_only_where_trusted() {
    let scratch = Scratch::new();
    std::fs::create_dir(scratch.join("inner")).unwrap();
    scratch.file("secret.raw", &[7; 4096]);
    theirs(scratch.path())
        .args([
            "create",
            "-q",
            "-f",
            "qcow2",
            "-u",
            "-b",
            "../secret.raw",
            "-F",
            "raw",
        ])
        .args(["inner/evil.qcow2", "4096"])
        .ok();
    let convert = |extra: &[&str]| {
        diskmill(scratch.path())
            .arg("convert")
            .args(extra)
            .args(["inner/evil.qcow2", "out.raw"])
    };
    let refused = convert(&[]).finish().expect(1);
    assert!(refused.err().contains("--allow-ref"), "{refused}");
    assert!(!scratch.join("out.raw").exists());
    convert(&["--allow-ref", "."]).ok();
    assert_eq!(std::fs::read(scratch.join("out.raw")).unwrap(), [7; 4096]);
    theirs(scratch.path())
        .args([
            "create",
            "-q",
            "-f",
            "qcow2",
            "-b",
            "secret.raw",
            "-F",
            "raw",
            "near.qcow2",
        ])
        .ok();
    diskmill(scratch.path()).words("convert near.qcow2 near.raw").ok();
    diskmill(scratch.path())
        .words("convert --untrusted near.qcow2 near.raw")
        .finish()
        .expect(1);
    diskmill(scratch.path())
        .env("DISKMILL_UNTRUSTED", "1")
        .words("convert near.qcow2 near.raw")
        .finish()
        .expect(1);
}

#[test]
fn names_cannot_talk_to_the_terminal() {
    let scratch = Scratch::new();
    let name = "evil\u{1b}[2J.raw";
    scratch.hole(name, 4096);
    let done = diskmill(scratch.path()).args(["info", name]).ok();
    assert!(!done.out().contains('\u{1b}'), "{done}");
    let done = diskmill(scratch.path())
        .args(["info", "-f", "qcow2", name])
        .finish()
        .expect(1);
    assert!(!done.err().contains('\u{1b}'), "{done}");
}

#[test]
fn compression_can_be_made_to_try_harder() {
    let twins = Twins::new();
    let text: Vec<u8> = (0..200_000u32)
        .flat_map(|n| format!("{} ", n % 977).into_bytes())
        .collect();
    twins.ours.file("text.raw", &text);
    let size = |level: &str| {
        diskmill(twins.ours.path())
            .words("convert -O qcow2 -c --compress-level")
            .args([level, "text.raw", "out.qcow2"])
            .ok();
        std::fs::metadata(twins.ours.join("out.qcow2")).unwrap().len()
    };
    assert!(size("12") <= size("1"));
    diskmill(twins.ours.path())
        .words("convert -O qcow2 -c --compress-level 99 text.raw bad.qcow2")
        .finish()
        .expect(1);
}

#[test]
fn a_reader_that_leaves_is_not_an_error_message() {
    let twins = Twins::new();
    let diskmill = env!("CARGO_BIN_EXE_diskmill");
    let done = Run::new("sh")
        .arg("-c")
        .arg(format!(
            "'{diskmill}' info a.qcow2 | true; '{diskmill}' man | head -c 1 >/dev/null"
        ))
        .dir(twins.ours.path())
        .ok();
    assert_eq!(done.err(), "", "{done}");
}

#[test]
fn it_runs_within_the_limits_callers_set() {
    let twins = Twins::new();
    for line in [
        "info --output=json a.qcow2",
        "map overlay.qcow2",
        "check a.qcow2",
        "measure -O qcow2 a.raw",
    ] {
        let done = Run::new(env!("CARGO_BIN_EXE_diskmill"))
            .dir(twins.ours.path())
            .limit("--as=1073741824")
            .limit("--cpu=2")
            .words(line)
            .ok();
        assert_eq!(done.err(), "", "{done}");
    }
}

#[test]
fn the_demo_verifies_and_cleans_up() {
    let scratch = Scratch::new();
    let done = diskmill(scratch.path())
        .arg("demo")
        .env("TMPDIR", scratch.path())
        .ok();
    assert_eq!(done.out().matches("sha256 equal").count(), 8, "{done}");
    assert_eq!(done.err(), "", "{done}");
    assert_eq!(
        std::fs::read_dir(scratch.path()).unwrap().count(),
        0,
        "something is left behind"
    );
    diskmill(scratch.path()).args(["demo", "--dir", "kept"]).ok();
    let kept = scratch.join("kept");
    theirs(&kept).words("check compressed.qcow2").ok();
    theirs(&kept).words("compare disk.raw compressed.qcow2").ok();
    theirs(&kept).words("check disk.vdi").ok();
    theirs(&kept).words("compare -F qcow disk.raw disk.qcow").ok();
    assert_eq!(
        hash::sha256_file(kept.join("disk.raw")),
        hash::sha256_file(kept.join("back.raw"))
    );
}

/// A damaged image is named, with the place and the reason, by every command that reads it.
#[test]
fn damage_is_named_with_file_place_and_reason() {
    let twins = Twins::new();
    let path = twins.ours.join("packed.qcow2");
    let bytes = std::fs::read(&path).unwrap();
    let number = |at: u64| {
        let at = usize::try_from(at).unwrap();
        u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
    };
    let l2 = number(number(40)) & 0x00ff_ffff_ffff_fe00;
    let host = number(l2 + 8) & 0x003f_ffff_ffff_ffff;
    diskmill_testkit::scratch::patch(&path, host, &[0xff; 32]);
    for (line, code) in [("convert packed.qcow2 o", 1), ("compare packed.qcow2 a.qcow2", 4)] {
        let done = diskmill(twins.ours.path()).words(line).finish().expect(code);
        for word in ["cannot read 'packed.qcow2'", "guest offset 65536", "deflate"] {
            assert!(done.err().contains(word), "no {word}: {done}");
        }
        let done = crate::ours(twins.ours.path()).words(line).finish().expect(code);
        assert!(done.err().starts_with("qemu-img: "), "{done}");
        assert!(done.err().contains("65536"), "{done}");
        assert!(
            done.err().to_lowercase().contains("error while reading"),
            "{done}"
        );
    }
}
