//! Damaged images: a check counts what `qemu-img check` counts, wherever that makes sense, and a repair leaves an
//! image that both call sound and of which no byte is lost that qemu-img's repair keeps.

mod support;

#[path = "qcow2_damage/cases.rs"]
mod cases;
#[path = "qcow2_damage/overlaps.rs"]
mod overlaps;
#[path = "qcow2_damage/repair.rs"]
mod repair;

use std::path::Path;

use diskmill_core::CheckReport;
use diskmill_testkit::oracle;
use support::check;
use support::victim::Victim;

use cases::{CASES, Case, Rival};

/// Corruptions, leaks and errors.
fn numbers(report: &CheckReport) -> (u64, u64, u64) {
    (report.corruptions, report.leaks, report.check_errors)
}

fn theirs(path: &Path) -> (u64, u64, u64) {
    let (json, _) = oracle::check(path, "qcow2");
    let number = |name: &str| json.get(name).and_then(serde_json::Value::as_u64).unwrap_or(0);
    (number("corruptions"), number("leaks"), number("check-errors"))
}

#[test]
fn what_is_counted_is_what_qemu_img_counts() {
    for case in CASES.iter().filter(|case| case.rival != Rival::Blind) {
        let victim = case.victim();
        let report = check(&victim.path).unwrap();
        let theirs = theirs(&victim.path);
        assert_eq!(numbers(&report), theirs, "{}: {report:#?}", case.name);
        assert_ne!(theirs, (0, 0, 0), "{} is no damage", case.name);
        assert!(!report.findings.is_empty(), "{}", case.name);
    }
}

/// QEMU does not open these even to be checked, or passes over what is wrong; some of it fails it on the first read.
#[test]
fn what_qemu_img_does_not_look_at_is_found_too() {
    for case in CASES.iter().filter(|case| case.rival == Rival::Blind) {
        let report = check(&case.victim().path).unwrap();
        assert!(
            report.corruptions + report.check_errors > 0,
            "{}: {report:#?}",
            case.name
        );
    }
}

#[test]
fn damage_is_damage() {
    let names: std::collections::HashSet<_> = CASES.iter().map(|case| case.name).collect();
    assert_eq!(names.len(), CASES.len());
    let sound: Case = Case {
        name: "nothing",
        image: (Victim::with_snapshot, "with_snapshot"),
        options: "",
        damage: |_| {},
        rival: Rival::Ends,
    };
    assert_eq!(numbers(&check(&sound.victim().path).unwrap()), (0, 0, 0));
}
