//! Block devices as sources and targets. Loop devices stand for logical volumes; making them needs to be root.

use diskmill_testkit::host::Loop;
use diskmill_testkit::sparse_random::SparseRandom;
use diskmill_testkit::{Scratch, hash, oracle};

use crate::tools::{ours, refused, same, same_json};

const MIB: u64 = 1 << 20;

/// A device of `len` bytes full of old data, with sectors of `sector` bytes.
fn device(scratch: &Scratch, name: &str, len: u64, sector: u32) -> (Loop, String) {
    let backing = scratch.file(name, &vec![0xaa; usize::try_from(len).unwrap()]);
    let device = Loop::attach(backing, sector);
    let name = device.path().to_str().unwrap().to_owned();
    (device, name)
}

fn with_disk(size: u64) -> Scratch {
    let scratch = Scratch::beneath("/dev/shm");
    SparseRandom::new(31, size).write_raw(scratch.join("disk.raw"));
    scratch
}

#[test]
fn device__raw__every_cache_mode() {
    let scratch = with_disk(5 * MIB + 512);
    for sector in [512, 4096] {
        // The image must end at a sector's end to fill the device exactly, so the device is larger.
        let (device, name) = device(&scratch, "device", 8 * MIB, sector);
        for mode in ["none", "writeback", "writethrough", "directsync", "unsafe"] {
            let words = format!("convert -t {mode} -T {mode} -f raw -O raw disk.raw {name}");
            ours(&scratch).words(&words).ok();
            // Old data must not shine through what the source has as holes.
            let seen = std::fs::read(device.path()).unwrap();
            let disk = std::fs::read(scratch.join("disk.raw")).unwrap();
            assert!(seen[..disk.len()] == disk, "{mode} on sectors of {sector}");
            ours(&scratch)
                .words(&format!("convert -T {mode} -f raw -O qcow2 {name} back.qcow2"))
                .ok();
            oracle::assert_clean(scratch.join("back.qcow2"), "qcow2");
            oracle::assert_identical(device.path(), "raw", scratch.join("back.qcow2"), "qcow2");
        }
    }
}

#[test]
fn device__qcow2__whole_life() {
    let scratch = with_disk(4 * MIB);
    let (device, name) = device(&scratch, "device", 8 * MIB, 512);
    for extra in ["", "-c", "-o preallocation=metadata", "-o cluster_size=4k"] {
        ours(&scratch)
            .words(&format!("convert {extra} -f raw -O qcow2 disk.raw {name}"))
            .ok();
        oracle::assert_clean(device.path(), "qcow2");
        oracle::assert_identical(scratch.join("disk.raw"), "raw", device.path(), "qcow2");
        same(&scratch, &format!("info -f qcow2 {name}"));
        same_json(&scratch, &format!("map -f qcow2 --output=json {name}"));
        same_json(&scratch, &format!("check -f qcow2 --output=json {name}"));
        same(&scratch, &format!("compare -f raw -F qcow2 disk.raw {name}"));
    }
    // It grows within the device; its clusters must not go past the device's end.
    ours(&scratch).words(&format!("resize -f qcow2 {name} 64M")).ok();
    oracle::assert_clean(device.path(), "qcow2");
    let before = hash::sha256_file(device.path());
    refused(&scratch, &format!("resize -f raw {name} 16M"));
    assert_eq!(hash::sha256_file(device.path()), before);
}

#[test]
fn device__raw__info_map_compare() {
    let scratch = with_disk(4 * MIB);
    let (_device, name) = device(&scratch, "device", 4 * MIB, 512);
    ours(&scratch)
        .words(&format!("convert -f raw -O raw disk.raw {name}"))
        .ok();
    same(&scratch, &format!("info -f raw {name}"));
    same_json(&scratch, &format!("info -f raw --output=json {name}"));
    same_json(&scratch, &format!("map -f raw --output=json {name}"));
    same_json(&scratch, &format!("measure -f raw -O qcow2 --output=json {name}"));
    same(&scratch, &format!("compare -f raw -F raw disk.raw {name}"));
}

#[test]
fn device__raw__keeps_its_size() {
    let scratch = with_disk(4 * MIB);
    let (device, name) = device(&scratch, "device", 2 * MIB, 512);
    let before = hash::sha256_file(device.path());
    same(&scratch, &format!("resize -f raw {name} 2M"));
    same(&scratch, &format!("resize -f raw {name} 3M"));
    same(&scratch, &format!("resize -f raw --shrink {name} 1M"));
    refused(&scratch, &format!("convert -f raw -O raw disk.raw {name}"));
    refused(&scratch, &format!("create -f raw {name} 4M"));
    assert_eq!(hash::sha256_file(device.path()), before);
}

#[test]
fn device__raw__existing_target() {
    let scratch = with_disk(4 * MIB);
    let (device, name) = device(&scratch, "device", 4 * MIB, 512);
    for extra in ["-n", "-n -W -m 4", "-n -t none"] {
        std::fs::write(device.path(), vec![0x55; 4 << 20]).unwrap();
        ours(&scratch)
            .words(&format!("convert {extra} -f raw -O raw disk.raw {name}"))
            .ok();
        oracle::assert_identical(scratch.join("disk.raw"), "raw", device.path(), "raw");
    }
    // Told that the target is zero, nothing is done for the zeros.
    std::fs::write(device.path(), vec![0; 4 << 20]).unwrap();
    ours(&scratch)
        .words(&format!(
            "convert -n --target-is-zero -f raw -O raw disk.raw {name}"
        ))
        .ok();
    oracle::assert_identical(scratch.join("disk.raw"), "raw", device.path(), "raw");
}

#[test]
fn device__in_use__refused() {
    let scratch = with_disk(4 * MIB);
    let (device, name) = device(&scratch, "device", 4 * MIB, 512);
    let before = hash::sha256_file(device.path());
    {
        let _holder = oracle::Holder::qemu_io(device.path(), "raw", &[]);
        let done = ours(&scratch)
            .words(&format!("convert -f raw -O raw disk.raw {name}"))
            .finish()
            .expect(1);
        assert!(done.err().contains("\"write\" lock"), "{done}");
        let done = ours(&scratch)
            .words(&format!("convert -f raw -O raw {name} out.raw"))
            .finish()
            .expect(1);
        assert!(
            done.err().contains("Failed to get shared \"write\" lock"),
            "{done}"
        );
    }
    assert_eq!(hash::sha256_file(device.path()), before);
    assert!(!scratch.join("out.raw").exists());
}

#[test]
fn limit__file_size__is_an_error_with_a_message() {
    let scratch = with_disk(4 * MIB);
    scratch.file("old.qcow2", b"precious");
    for target in ["new.qcow2", "old.qcow2"] {
        let done = diskmill_testkit::Run::new(crate::tools::binary())
            .words("qemu-img convert -f raw -O qcow2 disk.raw")
            .arg(target)
            .dir(scratch.path())
            .limit("--fsize=300000")
            .finish()
            .expect(1);
        assert!(done.err().contains("File too large"), "{done}");
    }
    assert_eq!(std::fs::read(scratch.join("old.qcow2")).unwrap(), b"precious");
    assert_eq!(scratch.names(), ["disk.raw", "old.qcow2"]);
}
