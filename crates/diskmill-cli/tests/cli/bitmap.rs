//! Dirty bitmaps from the command line: as `qemu-img` has them, and the export that it has not.

use diskmill_testkit::{Run, Scratch, oracle};
use serde_json::{Value, json};

use crate::{Twins, diskmill, ours, theirs};

fn io(dir: impl AsRef<std::path::Path>, command: &str, image: &str) {
    Run::new("qemu-io")
        .dir(dir)
        .args(["-f", "qcow2", "-c", command, image])
        .ok();
}

/// The bitmaps of an image as the real tool lists them.
fn listed(dir: &Scratch, image: &str) -> Value {
    oracle::info(dir.join(image), "qcow2", false)["format-specific"]["data"]["bitmaps"].clone()
}

fn ranges(dir: &Scratch, image: &str, bitmap: &str) -> Value {
    let export = diskmill(dir.path())
        .args(["bitmap", "export", "--json", image, bitmap])
        .ok();
    export.json()["ranges"].clone()
}

#[test]
fn the_command_does_what_the_real_one_does_and_says_so() {
    let twins = Twins::new();
    let long = "x".repeat(1023);
    twins.same_lines(
        "
        bitmap
        bitmap a.qcow2
        bitmap -g 4k a.qcow2 b
        bitmap --add a.qcow2
        bitmap --add a.qcow2 b c
        bitmap --remove -g 4k x
        bitmap --clear -F raw x y
        bitmap --clear -b x -F raw x y
        bitmap --clear -g bad x y
        bitmap --add -g -1 x y
        bitmap -g 99999999999999999999 --add a.qcow2 y
        bitmap --add -f raw --image-opts x y
        bitmap --merge
        bitmap --foo a b
        bitmap -q --add a.qcow2 b
        bitmap export a.qcow2 b
        bitmap --add nonexistent b
        bitmap --add -f foo a.qcow2 b
        bitmap --add a.qcow2 b
        bitmap --add a.qcow2 b
        bitmap --add --add a.qcow2 twice
        bitmap --add --disable a.qcow2 off
        bitmap --enable --disable --clear a.qcow2 off
        bitmap --disable --enable a.qcow2 b
        bitmap --clear --add a.qcow2 none
        bitmap --remove a.qcow2 none
        bitmap --clear a.qcow2 none
        bitmap --enable a.qcow2 none
        bitmap --disable a.qcow2 none
        bitmap --merge none a.qcow2 b
        bitmap --merge b a.qcow2 none
        bitmap --merge b a.qcow2 b
        bitmap --add -g 100 a.qcow2 c
        bitmap --add -g 4G a.qcow2 c
        bitmap --add -g 512 a.qcow2 fine
        bitmap --add --granularity 2G a.qcow2 coarse
        bitmap --add -g 0 a.qcow2 usual
        bitmap --image-opts --add driver=qcow2,file.filename=a.qcow2 opts
        bitmap --remove -f raw a.raw b
        bitmap --merge x -f raw a.raw b
        bitmap --remove old.qcow2 b
        bitmap --merge b1 -b rich.qcow2 -F qcow2 a.qcow2 b
        bitmap --merge b -b a.qcow2 a.qcow2 fine
        bitmap --merge b -b nonexistent a.qcow2 fine
        bitmap --merge b -b a.raw -F raw a.qcow2 fine
        bitmap --add --merge b --source-file a.qcow2 --source-format qcow2 zero.qcow2 copy
        ",
    );
    twins.same(&["bitmap", "--add", "a.qcow2", ""]);
    twins.same(&["bitmap", "--add", "a.qcow2", &long]);
    for (args, text) in [
        (
            vec!["--add", "a.qcow2", &("x".to_owned() + &long)],
            "Name length exceeds maximum",
        ),
        (vec!["--add", "old.qcow2", "b"], "v2"),
        (
            vec!["--add", "-f", "raw", "a.raw", "b"],
            "Operation not supported",
        ),
    ] {
        for run in [ours(twins.ours.path()), theirs(twins.theirs.path())] {
            let done = run.arg("bitmap").args(&args).finish().expect(1);
            assert!(
                done.err().contains("Operation add on bitmap") && done.err().contains(text),
                "{done}"
            );
        }
    }
    for image in ["a.qcow2", "zero.qcow2"] {
        assert_eq!(
            listed(&twins.ours, image),
            listed(&twins.theirs, image),
            "{image}"
        );
        oracle::assert_clean(twins.ours.join(image), "qcow2");
    }
}

#[test]
fn inconsistent_bitmaps_are_shown_refused_and_removed() {
    let twins = Twins::new();
    for dir in [&twins.ours, &twins.theirs] {
        theirs(dir.path()).words("bitmap --add a.qcow2 b").ok();
        theirs(dir.path()).words("bitmap --add --disable a.qcow2 c").ok();
        // It ends as a crash would.
        let crash =
            Run::new("qemu-io")
                .dir(dir.path())
                .args(["-c", "write 64k 64k", "-c", "abort", "a.qcow2"]);
        assert_ne!(crash.finish().code, Some(0));
    }
    twins.same_lines(
        "
        info --output=json a.qcow2
        info a.qcow2
        bitmap --add a.qcow2 b
        bitmap --clear a.qcow2 b
        bitmap --enable a.qcow2 b
        bitmap --disable a.qcow2 b
        bitmap --merge c a.qcow2 b
        bitmap --merge b a.qcow2 b
        resize a.qcow2 2M
        measure -O qcow2 a.qcow2
        convert --bitmaps -O qcow2 a.qcow2 copy.qcow2
        bitmap --add a.qcow2 d
        bitmap --merge c a.qcow2 d
        convert --bitmaps --skip-broken-bitmaps -O qcow2 a.qcow2 copy.qcow2
        bitmap --remove a.qcow2 b
        bitmap --remove a.qcow2 c
        ",
    );
    for image in ["a.qcow2", "copy.qcow2"] {
        assert_eq!(
            listed(&twins.ours, image),
            listed(&twins.theirs, image),
            "{image}"
        );
        oracle::assert_clean(twins.ours.join(image), "qcow2");
    }
    let done = diskmill(twins.theirs.path())
        .words("bitmap export rich.qcow2 none")
        .finish()
        .expect(1);
    assert!(done.err().contains("no dirty bitmap 'none'"), "{done}");
}

#[test]
fn bitmaps_go_along_with_a_conversion() {
    let twins = Twins::new();
    for dir in [&twins.ours, &twins.theirs] {
        theirs(dir.path()).words("bitmap --add -g 4k a.qcow2 fine").ok();
        theirs(dir.path())
            .words("bitmap --add --disable a.qcow2 off")
            .ok();
        io(dir.path(), "write 300k 100k", "a.qcow2");
    }
    twins.same_lines(
        "
        convert --bitmaps -O qcow2 a.qcow2 one.qcow2
        convert --bitmaps -c -O qcow2 a.qcow2 two.qcow2
        convert --bitmaps -O qcow2 -o cluster_size=512,refcount_bits=1 a.qcow2 three.qcow2
        convert --bitmaps -O qcow2 -o extended_l2=on a.qcow2 four.qcow2
        convert --bitmaps -O qcow2 -o data_file=five.raw a.qcow2 five.qcow2
        convert --bitmaps -O qcow2 -B zero.qcow2 -F qcow2 a.qcow2 six.qcow2
        convert --bitmaps -n -O qcow2 a.qcow2 zero.qcow2
        convert --bitmaps -n -O qcow2 a.qcow2 zero.qcow2
        convert --bitmaps -n -O qcow2 a.qcow2 old.qcow2
        convert --bitmaps -n -f qcow2 -O raw a.qcow2 zero.raw
        convert --bitmaps -O qcow2 a.qcow2 a.qcow2 no.qcow2
        convert --bitmaps -f raw -O qcow2 a.raw no.qcow2
        convert --bitmaps -O qcow2 old.qcow2 no.qcow2
        convert --bitmaps -O qcow2 overlay.qcow2 none.qcow2
        ",
    );
    for image in ["one", "two", "three", "four", "five", "six", "zero", "none"] {
        let name = format!("{image}.qcow2");
        assert_eq!(listed(&twins.ours, &name), listed(&twins.theirs, &name), "{name}");
        oracle::assert_clean(twins.ours.join(&name), "qcow2");
        if image != "none" {
            for bitmap in ["fine", "off"] {
                let expected = ranges(&twins.theirs, &name, bitmap);
                assert_eq!(ranges(&twins.ours, &name, bitmap), expected, "{name} {bitmap}");
            }
        }
    }
    assert_eq!(
        ranges(&twins.ours, "one.qcow2", "fine"),
        json!([{"offset": 307_200, "length": 102_400}])
    );
    // Where the real tool leaves an image without bitmaps behind, there is none.
    for line in [
        "convert --bitmaps -O raw a.qcow2 x",
        "convert --bitmaps -O qcow2 -o compat=0.10 a.qcow2 x",
    ] {
        let our = ours(twins.ours.path()).words(line).finish().expect(1);
        let their = theirs(twins.theirs.path()).words(line).finish().expect(1);
        assert_eq!(our.err(), their.err());
        assert!(!twins.ours.join("x").exists());
    }
}

#[test]
fn snapshots_are_not_applied_over_bitmaps_under_the_name_qemu_img() {
    let twins = Twins::new();
    for dir in [&twins.ours, &twins.theirs] {
        theirs(dir.path()).words("bitmap --add overlay.qcow2 b").ok();
    }
    twins.same_line("snapshot -a one overlay.qcow2");
    assert_eq!(ranges(&twins.ours, "overlay.qcow2", "b"), json!([]));
    diskmill(twins.ours.path())
        .words("snapshot -a one overlay.qcow2")
        .ok();
    assert_eq!(
        ranges(&twins.ours, "overlay.qcow2", "b"),
        json!([{"offset": 0, "length": 1 << 20}])
    );
}

#[test]
fn bitmaps_of_an_overlay_need_no_backing_image() {
    let twins = Twins::new();
    for dir in [&twins.ours, &twins.theirs] {
        for image in ["lost.qcow2", "other.qcow2"] {
            theirs(dir.path())
                .words(&format!("create -q -f qcow2 -u -b gone -F raw {image} 1M"))
                .ok();
        }
    }
    twins.same_lines(
        "
        bitmap --add lost.qcow2 b
        bitmap --add other.qcow2 b
        bitmap --merge b -b other.qcow2 -F qcow2 lost.qcow2 b
        bitmap --disable --add lost.qcow2 b
        bitmap --clear --disable lost.qcow2 b
        ",
    );
    assert_eq!(
        listed(&twins.ours, "lost.qcow2"),
        listed(&twins.theirs, "lost.qcow2")
    );
    twins.same_line("bitmap --remove lost.qcow2 b");
}

#[test]
fn what_is_dirty_is_listed() {
    let twins = Twins::new();
    let dir = &twins.ours;
    theirs(dir.path()).words("bitmap --add -g 32k rich.qcow2 b2").ok();
    io(dir.path(), "write 1M 1k", "rich.qcow2");
    io(dir.path(), "discard 5242368 512", "rich.qcow2");
    let human = diskmill(dir.path()).words("bitmap export rich.qcow2 b2").ok();
    assert_eq!(
        human.out(),
        "Offset              Length\n\
         0x100000            0x8000\n\
         0x4f8000            0x8000\n\
         2 dirty ranges, 64 KiB (65536 bytes) of 5 MiB\n"
    );
    let all = diskmill(dir.path())
        .words("bitmap export --json rich.qcow2 b2")
        .ok()
        .json();
    assert_eq!(
        all,
        json!({
            "filename": "rich.qcow2", "bitmap": "b2", "granularity": 32768, "virtual-size": 5 << 20,
            "ranges": [{"offset": 1 << 20, "length": 32768}, {"offset": 0x4f_8000, "length": 32768}],
            "dirty": 65536
        })
    );
    let none = diskmill(dir.path())
        .words("bitmap export --json rich.qcow2 b1")
        .ok()
        .json();
    assert_eq!((&none["ranges"], &none["dirty"]), (&json!([]), &json!(0)));
    let list = diskmill(dir.path())
        .words("bitmap --disable --json rich.qcow2 b0")
        .ok()
        .json();
    assert_eq!(
        list["bitmaps"][0],
        json!({"name": "b0", "granularity": 16384, "enabled": false, "inconsistent": false})
    );
}

#[test]
fn a_copy_of_what_is_dirty_makes_a_backup_whole_again() {
    let twins = Twins::new();
    let dir = &twins.ours;
    for (image, granularity) in [("a.qcow2", "512"), ("rich.qcow2", "64k"), ("overlay.qcow2", "4k")] {
        // A backup, and from then on a record of changes.
        theirs(dir.path())
            .args(["convert", "-O", "raw", image, "full.raw"])
            .ok();
        theirs(dir.path())
            .args(["bitmap", "--add", "-g", granularity, image, "since"])
            .ok();
        for command in [
            "write -P 9 70000 3000",
            "discard 0 64k",
            "write -z 600k 100k",
            "write -P 8 1023k 1k",
        ] {
            io(dir.path(), command, image);
        }
        let copy = |out: &str, more: &[&str]| {
            diskmill(dir.path())
                .args(["bitmap", "export", "--quiet", "--copy", out])
                .args(more)
                .args([image, "since"])
                .ok()
        };
        assert_eq!(copy("part.raw", &[]).out(), "");
        // Laid over the backup, range by range.
        let mut full = std::fs::read(dir.join("full.raw")).unwrap();
        let part = std::fs::read(dir.join("part.raw")).unwrap();
        assert_eq!(part.len(), full.len(), "{image}");
        let mut clean = vec![true; full.len()];
        for range in ranges(dir, image, "since").as_array().unwrap() {
            let start = range["offset"].as_u64().unwrap() as usize;
            let end = start + range["length"].as_u64().unwrap() as usize;
            full[start..end].copy_from_slice(&part[start..end]);
            clean[start..end].fill(false);
        }
        let stray = part
            .iter()
            .zip(&clean)
            .position(|(byte, clean)| *clean && *byte != 0);
        assert_eq!(stray, None, "{image}: something that is not dirty was copied");
        let merged = dir.file("merged.raw", &full);
        oracle::assert_identical(&merged, "raw", dir.join(image), "qcow2");
        // As an overlay of the backup.
        copy("part.qcow2", &["-O", "qcow2"]);
        let info = oracle::info(dir.join("part.qcow2"), "qcow2", false);
        assert!(info.get("backing-filename").is_none(), "{info}");
        oracle::assert_clean(dir.join("part.qcow2"), "qcow2");
        theirs(dir.path())
            .words("rebase -u -b full.raw -F raw part.qcow2")
            .ok();
        oracle::assert_identical(dir.join("part.qcow2"), "qcow2", dir.join(image), "qcow2");
    }
}

#[test]
fn an_export_that_makes_no_sense_is_refused() {
    let twins = Twins::new();
    let dir = &twins.ours;
    let before = std::fs::read(dir.join("rich.qcow2")).unwrap();
    for (line, text) in [
        ("bitmap export rich.qcow2", "a file name and the name of a bitmap"),
        ("bitmap export --add rich.qcow2 b0", "changes nothing"),
        ("bitmap export -g 4k rich.qcow2 b0", "changes nothing"),
        ("bitmap export -b a.qcow2 rich.qcow2 b0", "--source-file"),
        ("bitmap export -O qcow2 rich.qcow2 b0", "--copy"),
        ("bitmap export --copy - rich.qcow2 b0", "standard output"),
        ("bitmap export --copy o -O vmdk rich.qcow2 b0", "raw or qcow2"),
        (
            "bitmap export --copy rich.qcow2 rich.qcow2 b0",
            "would replace the image",
        ),
        ("bitmap export --copy nodir/o rich.qcow2 b0", "nodir"),
        ("bitmap export a.raw b0", "keeps no dirty bitmaps"),
        ("bitmap export nonexistent b0", "nonexistent"),
        ("bitmap --add --copy o rich.qcow2 new", "bitmap export"),
    ] {
        let done = diskmill(dir.path()).words(line).finish().expect(1);
        assert!(done.err().contains(text), "{line}: {done}");
        assert_eq!(done.out(), "", "{line}");
    }
    assert!(!dir.join("o").exists());
    assert!(std::fs::read(dir.join("rich.qcow2")).unwrap() == before);
}
