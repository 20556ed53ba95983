//! What succeeds under the name `qemu-img` prints what the real tool prints.

use std::io::Read;

use diskmill_testkit::{Run, oracle};

use crate::{Twins, ours, theirs};

const IMAGES: [&str; 11] = [
    "a.raw",
    "a.qcow2",
    "overlay.qcow2",
    "packed.qcow2",
    "data.qcow2",
    "old.qcow2",
    "rich.qcow2",
    "odd.raw",
    "empty.raw",
    "lost.qcow2",
    "longer.raw",
];

#[test]
fn info_prints_the_same() {
    let twins = Twins::new();
    for name in IMAGES {
        for options in [
            "",
            "--output=json",
            "--backing-chain",
            "-b --output json",
            "-f raw",
        ] {
            twins.same_sights(&format!("info {options} {name}"));
        }
    }
    twins.same_sights(
        "
        info --image-opts driver=qcow2,file.filename=a.qcow2
        info --image-opts --output=json driver=qcow2,file.driver=file,file.filename=a.qcow2
        info --object secret,id=s,data=abc a.raw
        info file:a.raw
        info --output=json file:a.raw
        ",
    );
    let tree =
        r#"json:{"driver":"qcow2","backing":null,"file":{"driver":"file","filename":"overlay.qcow2"}}"#;
    twins.same_sight(&["info", tree]);
    twins.same_sight(&["info", "--output=json", tree]);
}

#[test]
fn info_prints_odd_names_as_they_are() {
    let twins = Twins::new();
    for name in ["sp ace", "a,b", "é\u{1}😀", "quote\"back\\slash"] {
        twins.ours.hole(name, 4096);
        twins.same_sight(&["info", name]);
        twins.same_sight(&["info", "--output=json", name]);
        twins.same_sight(&["map", name]);
    }
}

/// The dates of snapshots are in the user's time zone, by name and by rule.
#[test]
fn dates_follow_the_time_zone() {
    let twins = Twins::new();
    for zone in [
        "",
        "UTC",
        "Europe/Berlin",
        "America/St_Johns",
        "XYZ-03:30",
        "nonsense/zone",
    ] {
        let run = |run: Run| run.env("TZ", zone).words("info overlay.qcow2").ok().out();
        assert_eq!(
            run(ours(twins.ours.path())),
            run(theirs(twins.ours.path())),
            "TZ={zone}"
        );
    }
}

#[test]
fn map_prints_the_same() {
    let twins = Twins::new();
    for name in IMAGES.iter().filter(|name| **name != "lost.qcow2") {
        twins.same_sights(&format!("map --output=json {name}"));
        twins.same_sights(&format!("map {name}"));
    }
    twins.same_sights(
        "
        map -s 64k -l 100k a.qcow2
        map --start-offset=64k --output=json a.qcow2
        map --start-offset=1M --output=json a.qcow2
        map --start-offset=2M --output=json a.qcow2
        map --start-offset=2M a.qcow2
        map --max-length=0 --output=json a.qcow2
        map --start-offset=100 --max-length=1000 --output=json a.qcow2
        ",
    );
}

#[test]
fn check_prints_the_same() {
    let twins = Twins::new();
    for name in IMAGES.iter().filter(|name| name.ends_with("qcow2")) {
        twins.same_sights(&format!("check {name}"));
        twins.same_sights(&format!("check --output=json {name}"));
        twins.same_sights(&format!("check -q {name}"));
    }
}

#[test]
fn measure_prints_the_same() {
    let twins = Twins::new();
    twins.same_sights(
        "
        measure a.raw
        measure -O qcow2 a.raw
        measure --output=json -O qcow2 a.raw
        measure -O raw a.qcow2
        measure -O qcow2 old.qcow2
        measure --size 1G
        measure --size 1G -O qcow2
        measure --size=0
        measure --output json --size 10G -O qcow2 -o cluster_size=2M,preallocation=full
        ",
    );
}

#[test]
fn compare_prints_the_same() {
    let twins = Twins::new();
    twins.same_lines(
        "
        compare a.raw a.raw
        compare a.raw a.qcow2
        compare -q a.raw a.qcow2
        compare a.qcow2 packed.qcow2
        compare -s a.raw a.qcow2
        compare -s zero.raw zero.qcow2
        compare zero.raw zero.qcow2
        compare zero.raw zero2.raw
        compare zero2.raw zero.raw
        compare -s zero.raw zero2.raw
        compare a.raw longer.raw
        compare longer.raw a.raw
        compare empty.raw empty.raw
        compare odd.raw a.raw
        compare odd.raw zero.raw
        compare -U a.raw a.raw
        compare --image-opts driver=raw,file.filename=a.raw driver=raw,file.filename=a.raw
        ",
    );
}

#[test]
fn create_and_resize_print_and_make_the_same() {
    let twins = Twins::new();
    twins.same_lines(
        "
        create new.raw 1M
        create new.raw 513
        create new.raw 1.5k
        create new.raw 0x100000
        create new.raw 0
        create -q new.raw 1M
        create -f raw -o preallocation=falloc falloc.raw 1M
        create -f raw -o preallocation=full full.raw 1M
        create -f qcow2 new.qcow2 1M
        create -f qcow2 -o lazy_refcounts new.qcow2 1M
        create -f qcow2 new.qcow2 1M -o preallocation=metadata
        create -f qcow2 -o cluster_size=4k -o compat=1.1,nocow=on new.qcow2 1M
        create -f qcow2 -o compression_type=zstd,extended_l2=on,cluster_size=128k new.qcow2 1M
        create -f qcow2 -o compat=0.10 new.qcow2 1M
        create -f qcow2 -o data_file=new.data,data_file_raw=on split.qcow2 1M
        create -f qcow2 -b a.raw -F raw over.qcow2
        create -f qcow2 -b a.raw -F raw over.qcow2 3M
        create -f qcow2 -o backing_file=a.raw,backing_fmt=raw over.qcow2
        create -f qcow2 -u -b nonexistent -F raw over.qcow2 4M
        create -f qcow2 -o size=3M new.qcow2
        create --format=qcow2 --backing=a.raw --backing-f raw over.qcow2
        create file:prefixed.raw 1M
        info --output=json new.qcow2
        info --output=json split.qcow2
        info --backing-chain --output=json over.qcow2
        map --output=json over.qcow2
        check --output=json new.qcow2
        resize -f raw a.raw +1M
        resize a.raw 3M -f raw
        resize --shrink -f raw a.raw -1M
        resize -f raw a.raw 512k --shrink
        resize --preallocation=falloc -f raw a.raw 8M
        resize zero.raw 5M
        resize a.qcow2 2M
        resize -q a.qcow2 +1G
        resize --image-opts driver=raw,file.filename=zero2.raw 3M
        info a.raw
        ",
    );
    twins.same(&["create", "-f", "qcow2", "we ird'x", "1M"]);
    twins.same(&["create", "-f", "qcow2", "-b", "we ird'x", "-F", "qcow2", "c,d"]);
}

#[test]
fn convert_prints_nothing_and_makes_equal_disks() {
    let twins = Twins::new();
    for (line, target, format) in [
        ("convert a.raw o.raw", "o.raw", "raw"),
        ("convert -O qcow2 a.raw o1.qcow2", "o1.qcow2", "qcow2"),
        ("convert -c -O qcow2 overlay.qcow2 o2.qcow2", "o2.qcow2", "qcow2"),
        (
            "convert -c -O qcow2 -o compression_type=zstd a.qcow2 o3.qcow2",
            "o3.qcow2",
            "qcow2",
        ),
        ("convert a.raw longer.raw odd.raw o4.raw", "o4.raw", "raw"),
        ("convert -n -O qcow2 a.raw zero.qcow2", "zero.qcow2", "qcow2"),
        ("convert -n a.raw zero2.raw", "zero2.raw", "raw"),
        (
            "convert -B zero.raw -F raw -O qcow2 a.raw o5.qcow2",
            "o5.qcow2",
            "qcow2",
        ),
        ("convert -S 0 a.qcow2 o6.raw", "o6.raw", "raw"),
        (
            "convert -t none -T none -m 16 -W -O qcow2 a.raw o7.qcow2",
            "o7.qcow2",
            "qcow2",
        ),
        ("convert -p -q -O qcow2 a.raw o8.qcow2", "o8.qcow2", "qcow2"),
        ("convert -U --salvage -r 0 a.qcow2 o9.raw", "o9.raw", "raw"),
    ] {
        let done = twins.same_line(line);
        assert_eq!(
            (done.code, done.out(), done.err()),
            (Some(0), String::new(), String::new()),
            "{line}"
        );
        oracle::assert_identical(twins.ours.join(target), format, twins.theirs.join(target), format);
        if format == "qcow2" {
            oracle::assert_clean(twins.ours.join(target), format);
        }
    }
}

/// Progress is parsed by KubeVirt's importer with `\((\d?\d\.\d\d)\/100%\)`, split at carriage returns.
#[test]
fn progress_is_what_callers_parse() {
    let twins = Twins::new();
    for line in ["convert -p -O qcow2 a.raw o.qcow2", "compare -p a.raw a.raw"] {
        let words: Vec<&str> = line.split_whitespace().collect();
        let our = ours(twins.ours.path()).args(&words).ok();
        let their = theirs(twins.theirs.path()).args(&words).ok();
        for done in [&our, &their] {
            let out = done.out();
            assert!(out.starts_with("    (0.00/100%)\r"), "{done}");
            assert!(out.contains("    (100.00/100%)\r"), "{done}");
            assert!(out.ends_with('\n'), "{done}");
        }
        let tail = |text: String| text.rsplit('\r').next().unwrap().to_owned();
        assert_eq!(tail(our.out()), tail(their.out()));
        let mut last = 0.0;
        for part in our.out().split('\r').filter(|part| part.starts_with("    (")) {
            let number: f64 = part["    (".len()..]
                .split('/')
                .next()
                .unwrap()
                .parse()
                .unwrap_or_else(|_| panic!("{part}"));
            assert!(number >= last, "progress goes back: {our}");
            last = number;
        }
    }
}

#[test]
fn a_signal_asks_for_a_line_of_progress() {
    let twins = Twins::new();
    let mut child = ours(twins.ours.path())
        .words("convert -r 300k -S 0 longer.raw o.raw")
        .spawn();
    let mut err = child.stderr.take().unwrap();
    // The handler is there once the target's staging file, or any other sign of work, is: ask until answered.
    let id = child.id().to_string();
    let mut text = String::new();
    let asker = std::thread::spawn(move || {
        for _ in 0..100 {
            std::thread::sleep(std::time::Duration::from_millis(100));
            if !Run::new("kill").args(["-USR1", &id]).finish().err().is_empty() {
                break;
            }
        }
    });
    err.read_to_string(&mut text).unwrap();
    let status = child.wait().unwrap();
    asker.join().unwrap();
    assert!(status.success(), "{status} {text}");
    let line = text.lines().next().expect("a line of progress");
    assert!(line.starts_with("    (") && line.ends_with("/100%)"), "{text}");
}

#[test]
fn options_are_listed_by_name() {
    let twins = Twins::new();
    for line in [
        "create -f qcow2 -o ?",
        "create -f qcow2 -o help x",
        "create -o ? -f qcow2 /dev/null",
        "create -f raw -o help",
        "convert -O qcow2 -o help a.raw o",
        "convert -O qcow2 -o help",
        "convert -o help",
    ] {
        let words: Vec<&str> = line.split_whitespace().collect();
        // The sort is what counts; the descriptions are each one's own.
        let names = |text: String| -> Vec<String> {
            text.lines()
                .map(|line| line.split(" - ").next().unwrap().trim_end().to_owned())
                .filter(|line| line.starts_with("  ") || line.starts_with("Supported"))
                .collect()
        };
        let our = names(ours(twins.ours.path()).args(&words).ok().out());
        let their = names(theirs(twins.theirs.path()).args(&words).ok().out());
        assert_eq!(our, their, "{line}");
    }
}
