//! Repairs, beside qemu-img's of the same damage.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use diskmill_core::{CheckReport, GuestOffset, Layer, OpenSpec, Repair, State};
use diskmill_testkit::fault::Journal;
use diskmill_testkit::oracle;
use diskmill_testkit::random::{Dice, seed, soak};
use diskmill_testkit::scratch::{self, patch};

use super::cases::{CASES, Case, Rival};
use super::numbers;
use super::support::victim::Victim;
use super::support::{check, layer, repair, repair_with};

/// Repairs a copy by qemu-img: its exit code and what it says to have put right, as corruptions and leaks.
fn by_qemu(path: &Path, what: &str) -> (Option<i32>, Option<(u64, u64)>) {
    // It counts clusters by the length of the file it is led to believe in: gigabytes, for some damage.
    let done = oracle::qemu_img()
        .limit("--as=2147483648")
        .dir(path.parent().unwrap())
        .args(["check", "--output=json", "-f", "qcow2", "-r", what])
        .arg(path)
        .finish();
    let json: Option<serde_json::Value> = serde_json::from_str(&done.out()).ok();
    let fixed = json.map(|json| {
        let number = |name: &str| json.get(name).and_then(serde_json::Value::as_u64).unwrap_or(0);
        (number("corruptions-fixed"), number("leaks-fixed"))
    });
    (done.code, fixed)
}

fn assert_sound(path: &Path, context: &str) {
    let report = check(path).unwrap();
    assert_eq!(numbers(&report), (0, 0, 0), "{context}: {report:#?}");
    let (json, code) = oracle::check(path, "qcow2");
    assert_eq!(code, 0, "{context}: {json:#}");
}

fn open(path: &Path) -> Arc<dyn Layer> {
    layer(path, "qcow2", &OpenSpec::default()).unwrap_or_else(|error| panic!("{}: {error:?}", path.display()))
}

/// The bytes of a run, `None` for zeros; an error where they cannot be read.
fn bytes(layer: &dyn Layer, at: u64, len: u64) -> diskmill_core::Result<(Option<Vec<u8>>, u64)> {
    let run = layer.map(GuestOffset::new(at), len)?;
    Ok(match run.state {
        State::Absent | State::Zero { .. } => (None, run.len),
        _ => {
            let mut buf = vec![0; run.len.min(64 << 10) as usize];
            layer.read_at(GuestOffset::new(at), &mut buf)?;
            let len = buf.len() as u64;
            (Some(buf).filter(|buf| buf.iter().any(|byte| *byte != 0)), len)
        }
    })
}

/// Demands that all that can be read of `theirs` can be read of `ours`, and is the same.
fn assert_nothing_lost(ours: &Path, theirs: &Path, context: &str) {
    let Ok(theirs) = layer(theirs, "qcow2", &OpenSpec::default()) else {
        return;
    };
    let ours = open(ours);
    let mut at = 0;
    while at < ours.virtual_size() {
        let (kept, len) = match bytes(theirs.as_ref(), at, u64::MAX) {
            Ok(run) => run,
            Err(_) => {
                at = (at + 1).next_multiple_of(64 << 10);
                continue;
            }
        };
        let end = (at + len).min(ours.virtual_size());
        while at < end {
            let (here, len) = bytes(ours.as_ref(), at, end - at).unwrap();
            if let (Some(here), Some(kept)) = (&here, &kept) {
                let from = (kept.len() as u64 - (end - at)) as usize;
                assert_eq!(&kept[from..from + here.len()], &here[..], "{context}: at {at:#x}");
            } else if kept.is_some() {
                panic!("{context}: data is lost at {at:#x}");
            } else {
                assert!(here.is_none(), "{context}: there is data at {at:#x}");
            }
            at += len;
        }
    }
}

/// Every fourth case, so that they can run side by side.
fn repair_like_qemu_img(part: usize) {
    for case in CASES.iter().skip(part).step_by(4) {
        let name = case.name;
        let victim = case.victim();
        let theirs = victim.copy("theirs.qcow2");
        // QEMU gives up on that one, after ten seconds.
        let (code, fixed) = match name {
            "snapshots too many" => (None, None),
            _ => by_qemu(&theirs, "all"),
        };
        let report = repair(&victim.path, Repair::All).unwrap();
        assert_eq!(numbers(&report), (0, 0, 0), "{name}: {report:#?}");
        assert!(report.corruptions_fixed + report.leaks_fixed > 0, "{name}");
        assert!(
            report.findings.iter().all(|finding| finding.fixed),
            "{name}: {report:#?}"
        );
        match case.rival {
            Rival::Ends => {
                let ours = (report.corruptions_fixed, report.leaks_fixed);
                assert_eq!((code, fixed), (Some(0), Some(ours)), "{name}");
            }
            Rival::EndsOtherwise => assert_eq!(code, Some(0), "{name}"),
            Rival::Leaves => assert_ne!(code, Some(0), "{name}"),
            Rival::Blind => {}
        }
        assert_sound(&victim.path, name);
        // QEMU reads its table of tables, or the like, as if it were data.
        let senseless = ["l1 to itself", "header l1 in data", "snapshot table past eof"];
        if !senseless.contains(&name) {
            assert_nothing_lost(&victim.path, &theirs, name);
        }
    }
}

#[test]
fn a_repair_ends_sound_and_keeps_what_qemu_img_keeps() {
    repair_like_qemu_img(0);
}

#[test]
fn a_repair_ends_sound_and_keeps_what_qemu_img_keeps_2() {
    repair_like_qemu_img(1);
}

#[test]
fn a_repair_ends_sound_and_keeps_what_qemu_img_keeps_3() {
    repair_like_qemu_img(2);
}

#[test]
fn a_repair_ends_sound_and_keeps_what_qemu_img_keeps_4() {
    repair_like_qemu_img(3);
}

#[test]
fn a_repair_of_leaks_leaves_the_rest() {
    for case in CASES.iter().filter(|case| case.rival != Rival::Blind) {
        let victim = case.victim();
        let theirs = victim.copy("theirs.qcow2");
        let before = numbers(&check(&victim.path).unwrap());
        let (code, fixed) = by_qemu(&theirs, "leaks");
        match repair(&victim.path, Repair::Leaks) {
            Err(error) => {
                assert_eq!(code, Some(1), "{}: {error:?}", case.name);
                assert_eq!(numbers(&check(&victim.path).unwrap()), before, "{}", case.name);
            }
            Ok(report) => {
                let (corruptions, leaks) = (report.corruptions_fixed, report.leaks_fixed);
                if code != Some(1) {
                    assert_eq!(fixed, Some((corruptions, leaks)), "{}", case.name);
                    // QEMU writes bitmaps anew when it closes an image, broken or not.
                    if case.image.1 == "with_bitmap" {
                        continue;
                    }
                    let left = super::theirs(&theirs);
                    assert_eq!(numbers(&report), left, "{}: {report:#?}", case.name);
                }
            }
        }
    }
}

#[test]
fn random_pairs_of_damages_end_sound() {
    let mut dice = Dice::new(1);
    for (image, name, options) in [
        (Victim::with_two_runs as fn(&str) -> Victim, "with_two_runs", ""),
        (Victim::with_snapshot, "with_snapshot", ""),
        (Victim::with_two_runs, "with_two_runs", "extended_l2=on"),
        (Victim::with_two_runs, "with_two_runs", "data_file=victim.data"),
        (Victim::with_bitmap, "with_bitmap", ""),
    ] {
        let sound = image(options);
        let bytes = std::fs::read(&sound.path).unwrap();
        // Some need what an image of another kind has.
        let fits = |case: &&Case| case.options == options && [name, "with_two_runs"].contains(&case.image.1);
        let cases: Vec<&Case> = CASES.iter().filter(fits).collect();
        for _ in 0..12 * soak() {
            let pair = [0, 1].map(|_| *dice.one_of(&cases));
            let context = format!("{} + {} (DISKMILL_SEED={})", pair[0].name, pair[1].name, seed());
            std::fs::write(&sound.path, &bytes).unwrap();
            for case in pair {
                // The second may look for what the first has put out of reach, which ends it.
                let _ = catch_unwind(AssertUnwindSafe(|| (case.damage)(&sound)));
            }
            let far = scratch::len(&sound.path) > 2 * bytes.len() as u64;
            if far || scratch::peek(&sound.path, 0, 32) != bytes[..32] {
                // It has landed where the first said: far past the end, or where the header says what this is.
                continue;
            }
            let report = repair(&sound.path, Repair::All).unwrap();
            assert_eq!(numbers(&report), (0, 0, 0), "{context}: {report:#?}");
            assert_sound(&sound.path, &context);
        }
    }
}

/// Overwrites words of the image at random, most of them in its tables.
fn scramble(victim: &Victim, dice: &mut Dice) {
    let places = [
        victim.l1(),
        victim.l2(),
        victim.refcount_table(),
        victim.refcount_block(),
    ];
    let len = scratch::len(&victim.path);
    for _ in 0..1 + dice.below(5) {
        let place = *dice.one_of(&places);
        let at = place + 8 * dice.below(20);
        let value = match dice.below(6) {
            0 => dice.next(),
            1 => dice.below(len),
            2 => dice.below(len) & !0xffff,
            3 => 1 << 63 | dice.below(len) & !0xffff,
            4 => 1 << 62 | dice.below(len),
            _ => victim.u64(at) ^ 1 << dice.below(64),
        };
        victim.set(at, value);
    }
}

#[test]
fn random_damage_ends_sound() {
    let mut dice = Dice::new(2);
    for (image, options) in [
        (Victim::with_two_runs as fn(&str) -> Victim, ""),
        (Victim::with_snapshot, ""),
        (Victim::with_two_runs, "extended_l2=on"),
        (Victim::with_snapshot, "refcount_bits=64,cluster_size=4k"),
        (Victim::with_two_runs, "compat=0.10"),
    ] {
        let victim = image(options);
        let bytes = std::fs::read(&victim.path).unwrap();
        for round in 0..20 * soak() {
            std::fs::write(&victim.path, &bytes).unwrap();
            scramble(&victim, &mut dice);
            let report = repair(&victim.path, Repair::All).unwrap();
            let context = format!("round {round} of {options:?} (DISKMILL_SEED={})", seed());
            assert_eq!(numbers(&report), (0, 0, 0), "{context}: {report:#?}");
            assert_sound(&victim.path, &context);
        }
    }
}

#[test]
fn the_flag_of_a_table_that_is_not_there_is_cleared() {
    let victim = Victim::with_snapshot("");
    for table in [victim.l1(), victim.u64(victim.snapshot_table())] {
        victim.set(table + 8, 1 << 63);
        assert_eq!(numbers(&check(&victim.path).unwrap()), (1, 0, 0));
        assert_ne!(super::theirs(&victim.path), (0, 0, 0));
        let report = repair(&victim.path, Repair::All).unwrap();
        assert_eq!(numbers(&report), (0, 0, 0), "{report:#?}");
        assert_sound(&victim.path, "a flag alone");
        assert_eq!(victim.u64(table + 8), 0);
    }
}

/// A cut in the middle of a repair: what is left is repaired to the same.
#[test]
fn a_repair_that_was_stopped_is_repeated() {
    for name in [
        "refblock zeros",
        "l2 same",
        "l2 past eof",
        "snapshot extra data short",
        "l1 to data",
    ] {
        let case = CASES.iter().find(|case| case.name == name).unwrap();
        let victim = case.victim();
        let journal = Journal::new();
        repair_with(&victim.path, Repair::All, |file| journal.record(file)).unwrap();
        let stopped = victim.dir.join("stopped.qcow2");
        for count in 0..journal.len() {
            for bytes in [journal.prefix(count), journal.crash(count, count as u64)] {
                std::fs::write(&stopped, &bytes[0]).unwrap();
                let context = format!("{name}, cut after {count} changes");
                let report = repair(&stopped, Repair::All).unwrap();
                assert_eq!(numbers(&report), (0, 0, 0), "{context}: {report:#?}");
                assert_sound(&stopped, &context);
                assert_nothing_lost(&stopped, &victim.path, &context);
            }
        }
    }
}

#[test]
fn the_dirty_and_the_corrupt_bit_are_cleared_once_all_is_sound() {
    for what in [Repair::Leaks, Repair::All] {
        let victim = Victim::with_two_runs("lazy_refcounts=on");
        victim.set(72, 3);
        patch(&victim.path, victim.refcount_block() + 12, &[0, 9]);
        let theirs = victim.copy("theirs.qcow2");
        let report = repair(&victim.path, what).unwrap();
        assert_eq!((report.leaks_fixed, numbers(&report)), (1, (0, 0, 0)));
        by_qemu(&theirs, if what == Repair::All { "all" } else { "leaks" });
        let bits = |path: &PathBuf| scratch::peek(path, 72, 8);
        assert_eq!(bits(&victim.path), bits(&theirs), "{what:?}");
    }
    // Too many references for one bit: nothing can be done, and the bits stay.
    let victim = Victim::with_two_runs("refcount_bits=1");
    victim.set(victim.l1() + 8, victim.u64(victim.l1()));
    victim.set(72, 3);
    let report: CheckReport = repair(&victim.path, Repair::All).unwrap();
    assert_eq!(numbers(&report), super::theirs(&victim.path), "{report:#?}");
    assert!(report.corruptions > 0);
    assert_eq!(victim.u64(72), 3);
}
