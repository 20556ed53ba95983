//! `compact`, which qemu-img does not have, on images that QEMU's tools have made and used: QEMU must find them sound,
//! smaller, and reading as before.

use std::collections::BTreeMap;

use diskmill_testkit::oracle::Holder;
use diskmill_testkit::sparse_random::mix;
use diskmill_testkit::{Scratch, hash, host::Loop, oracle, scratch};
use serde_json::Value;

use crate::tools::{native, ours, theirs};

/// What QEMU reads: the disk, each snapshot, each bitmap.
fn contents(scratch: &Scratch, image: &str) -> BTreeMap<String, String> {
    let path = scratch.join(image);
    let mut all = BTreeMap::new();
    all.insert("disk".to_owned(), oracle::guest_sha256(&path, "qcow2"));
    let info = oracle::info(&path, "qcow2", false);
    for snapshot in info["snapshots"].as_array().into_iter().flatten() {
        let id = snapshot["id"].as_str().unwrap();
        let raw = scratch.join("snapshot.raw");
        oracle::convert(["-l", &format!("snapshot.id={id}")], &path, "qcow2", &raw, "raw");
        all.insert(format!("snapshot {id}"), hash::sha256_file(raw));
    }
    for bitmap in info["format-specific"]["data"]["bitmaps"]
        .as_array()
        .into_iter()
        .flatten()
    {
        let name = bitmap["name"].as_str().unwrap();
        let _server = Holder::qemu_nbd(&path, "qcow2", &["-r", "-B", name]);
        let socket = path.with_extension("nbd-socket");
        let map = theirs(scratch)
            .args(["map", "--output=json", "--image-opts"])
            .arg(format!(
                "driver=nbd,server.type=unix,server.path={},x-dirty-bitmap=qemu:dirty-bitmap:{name}",
                socket.display()
            ))
            .ok();
        all.insert(format!("bitmap {name}"), format!("{bitmap} {}", map.out()));
    }
    all
}

fn compact(scratch: &Scratch, words: &str) -> Value {
    native(scratch)
        .words(&format!("compact --output=json {words}"))
        .ok()
        .json()
}

/// Compacts `image.qcow2` and demands all that is promised. Returns what was said.
fn thorough(scratch: &Scratch, extra: &str) -> Value {
    let path = scratch.join("image.qcow2");
    let before = contents(scratch, "image.qcow2");
    let (len, used) = (scratch::len(&path), scratch::allocated(&path));
    let hash = hash::sha256_file(&path);
    let foretold = compact(scratch, &format!("--dry-run {extra} image.qcow2"));
    assert_eq!(hash, hash::sha256_file(&path), "a dry run changes nothing");
    let done = compact(scratch, &format!("{extra} image.qcow2"));
    for field in [
        "saved",
        "length-before",
        "length-after",
        "zeros",
        "moved",
        "punched",
    ] {
        assert_eq!(foretold[field], done[field], "{field}");
    }
    assert_eq!(done["length-before"], len);
    assert_eq!(done["length-after"], scratch::len(&path));
    assert!(scratch::allocated(&path) <= used, "{done}");
    oracle::assert_clean(&path, "qcow2");
    native(scratch).words("check -q image.qcow2").ok();
    assert_eq!(before, contents(scratch, "image.qcow2"));
    let again = compact(scratch, &format!("{extra} image.qcow2"));
    assert_eq!(
        (&again["saved"], &again["moved"]),
        (&0.into(), &0.into()),
        "{again}"
    );
    done
}

/// Commands of qemu-io that use a disk of `size` bytes in units of `unit`: data, zeros, discards.
fn wear(unit: u64, size: u64, seed: u64) -> Vec<String> {
    let place = |number: u64| mix(seed << 16 ^ number) % (size / unit - 8) * unit;
    (0..60)
        .map(|number| {
            let (at, len) = (place(number), unit * (mix(number) % 5 + 1));
            match number % 6 {
                0 => format!("discard {at} {len}"),
                1 => format!("write -P 0 {at} {len}"),
                2 if number > 30 => format!("write -z {at} {len}"),
                _ => format!("write -P {} {at} {len}", number + 1),
            }
        })
        .collect()
}

const SIZE: u64 = 24 << 20;

fn worn(options: &str, unit: u64) -> Scratch {
    let scratch = Scratch::new();
    let path = scratch.join("image.qcow2");
    oracle::create(&path, "qcow2", options, &SIZE.to_string());
    oracle::io(&path, "qcow2", wear(unit, SIZE, 1));
    scratch
}

/// Without snapshots, bitmaps and backing a copy by qemu-img is as small as can be.
#[test]
fn compact__as_small_as_a_copy() {
    for (options, unit) in [
        ("compat=1.1", 65_536),
        ("compat=0.10", 65_536),
        ("cluster_size=512", 512),
        ("cluster_size=4k,refcount_bits=1", 4096),
        ("cluster_size=4k,refcount_bits=64", 4096),
        ("cluster_size=2M", 2 << 20),
        ("extended_l2=on,cluster_size=128k", 4096),
        ("preallocation=metadata", 65_536),
    ] {
        let scratch = worn(options, unit);
        let done = thorough(&scratch, "");
        assert!(done["saved"].as_u64().unwrap() > 0, "{options}: {done}");
        let copy = scratch.join("copy.qcow2");
        let options = options
            .replace(",preallocation=metadata", "")
            .replace("preallocation=metadata", "compat=1.1");
        oracle::convert(
            ["-o", &options],
            scratch.join("image.qcow2"),
            "qcow2",
            &copy,
            "qcow2",
        );
        let cluster = oracle::info(&copy, "qcow2", false)["cluster-size"]
            .as_u64()
            .unwrap();
        let our = scratch::len(scratch.join("image.qcow2"));
        // The copy may end within its last cluster.
        let their = scratch::len(&copy).next_multiple_of(cluster);
        assert!(our <= their, "{options}: {our}, a copy {their}: {done}");
    }
}

#[test]
fn compact__compressing_is_as_small_as_a_compressed_copy() {
    for options in [
        "compression_type=zlib",
        "compression_type=zstd",
        "cluster_size=4k",
    ] {
        let scratch = worn(options, 4096);
        let done = thorough(&scratch, "-c");
        assert!(
            done["compressed-clusters"].as_u64().unwrap() > 0,
            "{options}: {done}"
        );
        let copy = scratch.join("copy.qcow2");
        oracle::convert(
            ["-c", "-o", options],
            scratch.join("image.qcow2"),
            "qcow2",
            &copy,
            "qcow2",
        );
        let cluster = oracle::info(&copy, "qcow2", false)["cluster-size"]
            .as_u64()
            .unwrap();
        assert!(
            scratch::len(scratch.join("image.qcow2")) <= scratch::len(&copy) + cluster,
            "{options}: {done}"
        );
    }
}

#[test]
fn compact__keeps_snapshots() {
    for (options, unit) in [
        ("compat=1.1", 65_536),
        ("cluster_size=512", 512),
        ("extended_l2=on,cluster_size=16k", 512),
        ("cluster_size=4k,refcount_bits=4", 4096),
    ] {
        for extra in ["", "-c"] {
            let scratch = worn(options, unit);
            let path = scratch.join("image.qcow2");
            for number in 0..3 {
                theirs(&scratch)
                    .words(&format!("snapshot -c s{number} image.qcow2"))
                    .ok();
                oracle::io(&path, "qcow2", wear(unit, SIZE, number + 2));
            }
            theirs(&scratch).words("snapshot -d s1 image.qcow2").ok();
            let done = thorough(&scratch, extra);
            assert!(done["saved"].as_u64().unwrap() > 0, "{options} {extra}: {done}");
            if options.contains("refcount_bits") && extra == "-c" {
                // As in QEMU's own compressed images, clusters hold as many streams as can be counted.
                continue;
            }
            // They can still be gone back to.
            theirs(&scratch).words("snapshot -a s0 image.qcow2").ok();
            oracle::assert_clean(&path, "qcow2");
        }
    }
}

#[test]
fn compact__keeps_bitmaps() {
    let scratch = worn("cluster_size=4k", 4096);
    let path = scratch.join("image.qcow2");
    for (name, flags) in [("fine", "-g 512"), ("coarse", "-g 64k"), ("off", "--disable")] {
        theirs(&scratch)
            .words(&format!("bitmap --add {flags} image.qcow2 {name}"))
            .ok();
        oracle::io(&path, "qcow2", wear(4096, SIZE, 9));
    }
    let done = thorough(&scratch, "");
    assert!(done["saved"].as_u64().unwrap() > 0, "{done}");
    // And they still follow what is written.
    oracle::io(&path, "qcow2", ["write -P 1 1M 64k"]);
    oracle::assert_clean(&path, "qcow2");
}

#[test]
fn compact__compressed_clusters() {
    for options in ["compression_type=zlib", "compression_type=zstd,cluster_size=4k"] {
        let scratch = worn("compat=1.1", 4096);
        let path = scratch.join("image.qcow2");
        std::fs::rename(&path, scratch.join("plain.qcow2")).unwrap();
        oracle::convert(
            ["-c", "-o", options],
            scratch.join("plain.qcow2"),
            "qcow2",
            &path,
            "qcow2",
        );
        // Most of what is packed together goes.
        oracle::io(
            &path,
            "qcow2",
            (0..300)
                .filter(|at| at % 4 != 0)
                .map(|at| format!("discard {}k 64k", at * 64)),
        );
        oracle::io(&path, "qcow2", wear(65_536, SIZE, 4));
        let done = thorough(&scratch, "");
        assert!(done["saved"].as_u64().unwrap() > 0, "{options}: {done}");
    }
}

#[test]
fn compact__over_a_backing_image() {
    for options in ["compat=1.1", "compat=0.10", "extended_l2=on"] {
        let scratch = worn("compat=1.1", 65_536);
        std::fs::rename(scratch.join("image.qcow2"), scratch.join("base.qcow2")).unwrap();
        let base = hash::sha256_file(scratch.join("base.qcow2"));
        let path = scratch.join("image.qcow2");
        oracle::create_overlay(&path, options, scratch.join("base.qcow2"), "qcow2", None);
        oracle::io(&path, "qcow2", wear(4096, SIZE, 5));
        for extra in ["", "-c"] {
            thorough(&scratch, extra);
        }
        assert_eq!(base, hash::sha256_file(scratch.join("base.qcow2")));
    }
}

#[test]
fn compact__holes_in_a_data_file() {
    for extra in ["", ",data_file_raw=on"] {
        let scratch = Scratch::new();
        let (path, data) = (scratch.join("image.qcow2"), scratch.join("data.raw"));
        let options = format!("data_file={}{extra}", data.display());
        oracle::create(&path, "qcow2", &options, &SIZE.to_string());
        oracle::io(&path, "qcow2", wear(65_536, SIZE, 1));
        let used = scratch::allocated(&data);
        let done = thorough(&scratch, "");
        assert!(done["punched"].as_u64().unwrap() > 0, "{done}");
        assert!(scratch::allocated(&data) < used, "{done}");
        let refused = native(&scratch)
            .words("compact -c image.qcow2")
            .finish()
            .expect(1);
        assert!(refused.err().contains("external data file"), "{refused}");
    }
}

#[test]
fn compact__raw() {
    let scratch = Scratch::new();
    let mut bytes = vec![0; 8 << 20];
    bytes[3 << 20..(3 << 20) + 5000].fill(1);
    let path = scratch.file("disk.raw", &bytes);
    let used = scratch::allocated(&path);
    let foretold = compact(&scratch, "-n -f raw disk.raw");
    assert_eq!(scratch::allocated(&path), used);
    let done = compact(&scratch, "-f raw disk.raw");
    assert_eq!(done["saved"], foretold["saved"]);
    assert_eq!(done["saved"], (8 << 20) - 8192);
    assert!(std::fs::read(&path).unwrap() == bytes);
    assert!(
        scratch::allocated(&path) <= 16_384,
        "{}",
        scratch::allocated(&path)
    );
    assert_eq!(compact(&scratch, "-f raw disk.raw")["saved"], 0);
}

#[test]
fn compact__on_a_device() {
    let scratch = worn("compat=1.1", 65_536);
    let mut bytes = std::fs::read(scratch.join("image.qcow2")).unwrap();
    bytes.resize(32 << 20, 0xaa);
    let device = Loop::attach(scratch.file("device", &bytes), 512);
    let before = oracle::guest_sha256(device.path(), "qcow2");
    let done = compact(&scratch, &format!("-f qcow2 {}", device.path().display()));
    assert_eq!(done["fixed-length"], true);
    assert!(done["length-after"].as_u64().unwrap() < scratch::len(scratch.join("image.qcow2")));
    oracle::assert_clean(device.path(), "qcow2");
    assert_eq!(before, oracle::guest_sha256(device.path(), "qcow2"));
}

#[test]
fn compact__refusals() {
    let scratch = worn("compat=1.1", 65_536);
    let hash = hash::sha256_file(scratch.join("image.qcow2"));
    // There is no such command under the other name.
    let known = ours(&scratch).words("compact image.qcow2").finish().expect(1);
    let unknown = theirs(&scratch).words("compact image.qcow2").finish().expect(1);
    assert_eq!(known.err(), unknown.err());
    {
        let _held = Holder::qemu_io(scratch.join("image.qcow2"), "qcow2", &[]);
        for words in ["compact image.qcow2", "compact --dry-run image.qcow2"] {
            let refused = native(&scratch).words(words).finish().expect(1);
            assert!(refused.err().contains("lock"), "{refused}");
        }
    }
    let broken = scratch.join("broken.qcow2");
    std::fs::copy(scratch.join("image.qcow2"), &broken).unwrap();
    // The refcount of the header, in the first refcount block.
    scratch::patch(&broken, 0x20000, &[0, 0]);
    let refused = native(&scratch).words("compact broken.qcow2").finish().expect(1);
    assert!(refused.err().contains("check --repair all"), "{refused}");
    let quiet = native(&scratch).words("compact -q image.qcow2").ok();
    assert_eq!((quiet.out(), quiet.err()), (String::new(), String::new()));
    assert_ne!(hash, hash::sha256_file(scratch.join("image.qcow2")));
}
