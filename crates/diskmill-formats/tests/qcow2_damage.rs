//! Damaged images: a check counts what `qemu-img check` counts, wherever that makes sense.

mod support;

use std::path::{Path, PathBuf};

use diskmill_core::CheckReport;
use diskmill_testkit::scratch::{patch, peek};
use diskmill_testkit::{Scratch, oracle};
use support::check;

/// An image to be damaged: 64 KiB clusters, data in the first MiB, a snapshot.
struct Patient {
    _dir: Scratch,
    path: PathBuf,
}

impl Patient {
    fn new(options: &str) -> Self {
        let dir = Scratch::beneath("/dev/shm");
        let path = dir.join("patient.qcow2");
        oracle::create(&path, "qcow2", options, "1G");
        oracle::io(&path, "qcow2", ["write -P 1 0 1M", "write -P 2 40M 128k"]);
        Self { _dir: dir, path }
    }

    fn u64(&self, at: u64) -> u64 {
        u64::from_be_bytes(peek(&self.path, at, 8).try_into().unwrap())
    }

    fn set(&self, at: u64, value: u64) {
        patch(&self.path, at, &value.to_be_bytes());
    }

    fn l1(&self) -> u64 {
        self.u64(40)
    }

    fn l2(&self) -> u64 {
        self.u64(self.l1()) & 0x00ff_ffff_ffff_fe00
    }

    fn refcount_table(&self) -> u64 {
        self.u64(48)
    }

    fn refcount_block(&self) -> u64 {
        self.u64(self.refcount_table())
    }
}

fn numbers(report: &CheckReport) -> (u64, u64, u64) {
    (report.corruptions, report.leaks, report.check_errors)
}

fn theirs(path: &Path) -> (u64, u64, u64) {
    let (json, _) = oracle::check(path, "qcow2");
    let number = |name: &str| json.get(name).and_then(serde_json::Value::as_u64).unwrap_or(0);
    (number("corruptions"), number("leaks"), number("check-errors"))
}

type Damage = fn(&Patient);

/// Demands that we count what `qemu-img check` counts, and that it is not nothing.
fn assert_same(cases: &[(&str, &str, Damage)]) {
    for (name, options, damage) in cases {
        let patient = Patient::new(options);
        damage(&patient);
        let report = check(&patient.path).unwrap();
        let theirs = theirs(&patient.path);
        assert_eq!(numbers(&report), theirs, "{name}: {report:#?}");
        assert_ne!(theirs, (0, 0, 0), "{name} is no damage");
        assert!(!report.findings.is_empty(), "{name}");
    }
}

#[test]
fn bad_l1_entries() {
    assert_same(&[
        ("l1 reserved", "", |p| p.set(p.l1(), p.u64(p.l1()) | 1)),
        ("l1 unaligned", "", |p| p.set(p.l1(), p.u64(p.l1()) | 0x200)),
        ("l1 past eof", "", |p| p.set(p.l1(), 0x8000_0000_4000_0000)),
        ("l1 no copied", "", |p| p.set(p.l1(), p.u64(p.l1()) & !(1 << 63))),
        ("l1 to itself", "", |p| p.set(p.l1(), p.l1() | 1 << 63)),
        ("l1 gone", "", |p| p.set(p.l1(), 0)),
        ("l1 twice", "", |p| p.set(p.l1() + 8, p.u64(p.l1()))),
    ]);
}

#[test]
fn bad_l2_entries() {
    assert_same(&[
        ("l2 reserved", "", |p| p.set(p.l2(), p.u64(p.l2()) | 2)),
        ("l2 unaligned", "", |p| p.set(p.l2(), p.u64(p.l2()) | 0x200)),
        ("l2 unaligned zero", "", |p| p.set(p.l2(), p.u64(p.l2()) | 0x201)),
        ("l2 past eof", "", |p| p.set(p.l2(), 0x8000_0000_4000_0000)),
        ("l2 just past eof", "", |p| {
            let len = diskmill_testkit::scratch::len(&p.path);
            p.set(p.l2(), 1 << 63 | len);
        }),
        ("l2 no copied", "", |p| p.set(p.l2(), p.u64(p.l2()) & !(1 << 63))),
        ("l2 same", "", |p| p.set(p.l2(), p.u64(p.l2() + 8))),
        ("l2 gone", "", |p| p.set(p.l2(), 0)),
        ("compressed copied", "", |p| p.set(p.l2(), 3 << 62 | 0x5_0000)),
        ("compressed past eof", "", |p| {
            p.set(p.l2(), 1 << 62 | 0x5000_0000)
        }),
        ("compressed into meta", "", |p| p.set(p.l2(), 1 << 62 | 0x1_0000)),
    ]);
}

#[test]
fn bad_extended_l2_entries() {
    assert_same(&[
        ("ext both", "extended_l2=on", |p| p.set(p.l2() + 8, 0x1_0000_0001)),
        ("ext nowhere", "extended_l2=on", |p| p.set(p.l2(), 0)),
        ("ext compressed", "extended_l2=on", |p| {
            p.set(p.l2(), 1 << 62 | 0x5_0000)
        }),
        ("ext unaligned no data", "extended_l2=on", |p| {
            p.set(p.l2(), p.u64(p.l2()) | 0x200);
            p.set(p.l2() + 8, 0)
        }),
    ]);
}

#[test]
fn bad_refcounts() {
    assert_same(&[
        ("refblock zeros", "", |p| {
            patch(&p.path, p.refcount_block(), &[0; 64])
        }),
        ("refblock higher", "", |p| {
            patch(&p.path, p.refcount_block() + 12, &[0, 9])
        }),
        ("refblock leak", "", |p| {
            patch(&p.path, p.refcount_block() + 80, &[0, 1, 0, 1]);
            patch(&p.path, 0x50_0000, &[0]);
        }),
        ("reftable zero", "", |p| p.set(p.refcount_table(), 0)),
        ("reftable reserved", "", |p| {
            p.set(p.refcount_table(), p.refcount_block() | 1)
        }),
        ("reftable unaligned", "", |p| {
            p.set(p.refcount_table(), p.refcount_block() | 0x200)
        }),
        ("reftable past eof", "", |p| {
            p.set(p.refcount_table(), 0x4000_0000)
        }),
        ("reftable alias", "", |p| {
            p.set(p.refcount_table() + 8, p.refcount_block())
        }),
        ("reftable to header", "", |p| {
            p.set(p.refcount_table(), p.refcount_table())
        }),
    ]);
}

#[test]
fn bad_places_in_the_header() {
    assert_same(&[
        ("header l1 past eof", "", |p| p.set(40, 0x4000_0000)),
        ("header reftable past eof", "", |p| p.set(48, 0x4000_0000)),
        ("header reftable clusters 0", "", |p| patch(&p.path, 56, &[0; 4])),
        ("header reftable clusters 3", "", |p| {
            patch(&p.path, 56, &[0, 0, 0, 3])
        }),
        ("header l1 in data", "", |p| p.set(40, 0x5_0000)),
    ]);
}

/// QEMU passes over these when it checks, though it fails on the first when it reads.
#[test]
fn what_the_specification_forbids_is_found_too() {
    for (options, bits) in [("compat=0.10", 1), ("extended_l2=on", 1)] {
        let patient = Patient::new(options);
        patient.set(patient.l2(), patient.u64(patient.l2()) | bits);
        assert_eq!(theirs(&patient.path), (0, 0, 0));
        assert_eq!(numbers(&check(&patient.path).unwrap()), (1, 0, 0));
    }
}
