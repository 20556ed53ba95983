//! Key slots changed in place: as qemu-img allows it, and through power cuts and failures.

use std::sync::Arc;

use diskmill_core::{HostOffset, Job, Options, Result, Secret, Secrets, Storage, StorageMut};
use diskmill_formats::crypt::luks::{Place, SlotChange, Volume, VolumeKey, change_slots};
use diskmill_storage::Memory;
use diskmill_testkit::fault::{Bounds, Failure, Faults, Journal, Lasting};
use diskmill_testkit::{Scratch, oracle};

use crate::{QUICK, contents, disk, text, volume};

/// Secrets that are their own names.
fn secrets() -> Secrets {
    let mut secrets = Secrets::new();
    for name in ["one", "two", "six", "wrong"] {
        secrets.add(name, Secret::new(name.as_bytes().to_vec())).unwrap();
    }
    secrets
}

fn unlock(file: &dyn Storage, passphrase: &str) -> Result<VolumeKey> {
    let volume = Volume::load(file, Place::Standalone)?;
    volume.unlock(file, passphrase.as_bytes(), Job::silent())
}

fn change(file: &dyn StorageMut, key: &VolumeKey, options: &str, force: bool) -> Result<()> {
    let change = SlotChange::parse(&Options::parse(options), "")?;
    change_slots(
        file,
        Place::Standalone,
        &change,
        key,
        &secrets(),
        force,
        Job::silent(),
    )
}

fn active(file: &dyn Storage) -> Vec<usize> {
    let volume = Volume::load(file, Place::Standalone).unwrap();
    let slots = volume.header().slots().iter().enumerate();
    slots
        .filter(|(_, slot)| slot.is_active())
        .map(|(index, _)| index)
        .collect()
}

#[test]
fn slots_are_added_and_erased_as_qemu_does() {
    let (new, file) = volume(QUICK);
    let key = new.key();
    let ok = |options: &str, force| change(&file, key, options, force).unwrap();
    let no = |options: &str, says: &str| {
        let before = file.to_vec().unwrap();
        let error = change(&file, key, options, false).unwrap_err();
        assert!(text(&error).contains(says), "{options}: {}", text(&error));
        assert!(file.to_vec().unwrap() == before, "{options}");
    };
    no("", "parameter 'state' is missing");
    no(
        "state=foo",
        "parameter 'state' expects 'active' or 'inactive', not 'foo'",
    );
    no("state=active", "'new-secret' is required to activate a keyslot");
    no(
        "state=active,new-secret=two,old-secret=one",
        "'old-secret' must not be given when activating keyslots",
    );
    no(
        "state=active,new-secret=two,keyslot=8",
        "invalid keyslot 8 specified, must be between 0 and 7",
    );
    no(
        "state=active,new-secret=two,keyslot=0",
        "refusing to overwrite active keyslot 0 - please erase it first",
    );
    no("state=active,new-secret=none", "no secret with id 'none'");
    no(
        "state=inactive",
        "either explicit keyslot index or the password currently contained in them must be given",
    );
    no(
        "state=inactive,keyslot=0,new-secret=two",
        "'new-secret' must not be given when erasing keyslots",
    );
    no(
        "state=inactive,keyslot=0,iter-time=10",
        "'iter-time' must not be given when erasing keyslots",
    );
    no(
        "state=inactive,keyslot=0",
        "attempt to erase the only active keyslot 0",
    );
    no(
        "state=inactive,keyslot=0,old-secret=one",
        "attempt to erase the only active keyslot 0",
    );
    no(
        "state=inactive,old-secret=one",
        "all the active keyslots match the (old) password",
    );

    ok("state=active,new-secret=two,iter-time=1", false);
    ok("state=active,new-secret=six,iter-time=1,keyslot=6", false);
    assert_eq!(active(&file), [0, 1, 6]);
    for passphrase in ["one", "two", "six"] {
        assert!(contents(&file, passphrase) == disk(), "{passphrase}");
    }
    no(
        "state=inactive,old-secret=wrong",
        "no keyslots match given (old) password for erase operation",
    );
    no(
        "state=inactive,keyslot=6,old-secret=two",
        "given keyslot 6 doesn't contain the given old password",
    );
    no(
        "state=inactive,keyslot=5",
        "given keyslot 5 is already erased (inactive)",
    );
    no(
        "state=inactive,keyslot=5,old-secret=two",
        "given keyslot 5 is already erased (inactive)",
    );
    ok("state=inactive,keyslot=5", true);

    let material = |slot: u64| {
        let mut bytes = vec![0; 64_000];
        file.read_at(HostOffset::new(4096 + slot * 0x10000), &mut bytes)
            .unwrap();
        bytes
    };
    let before = material(0);
    ok("state=inactive,old-secret=one", false);
    let differing = before
        .iter()
        .zip(material(0))
        .filter(|(old, new)| **old != *new)
        .count();
    assert!(differing > 60_000, "{differing} of 64000 bytes were wiped");
    unlock(&file, "one").unwrap_err();
    ok("state=inactive,keyslot=6", false);
    assert_eq!(active(&file), [1]);

    for _ in 0..7 {
        ok("state=active,new-secret=two,iter-time=1", false);
    }
    no(
        "state=active,new-secret=two,iter-time=1",
        "can't add a keyslot - all keyslots are in use",
    );
    ok("state=active,new-secret=six,iter-time=1,keyslot=3", true);
    ok("state=inactive,old-secret=two", false);
    assert_eq!(active(&file), [3]);
    assert!(contents(&file, "six") == disk());
    // The only slot, overwritten.
    ok("state=active,new-secret=one,iter-time=1,keyslot=3", true);
    assert_eq!(active(&file), [3]);
    assert!(contents(&file, "one") == disk());
    ok("state=inactive,old-secret=one", true);
    assert!(active(&file).is_empty());
}

#[test]
fn nothing_is_written_behind_the_room_for_the_header() {
    let (new, file) = volume(QUICK);
    // Room for slot 0 alone.
    let place = Place::Embedded {
        at: HostOffset::ZERO,
        len: 4096 + 0x10000,
    };
    let before = file.to_vec().unwrap();
    for options in [
        "state=active,new-secret=two,iter-time=1",
        "state=active,new-secret=two,iter-time=1,keyslot=0",
    ] {
        let change = SlotChange::parse(&Options::parse(options), "").unwrap();
        let error =
            change_slots(&file, place, &change, new.key(), &secrets(), true, Job::silent()).unwrap_err();
        assert!(
            text(&error).contains("the material of keyslot 1"),
            "{}",
            text(&error)
        );
        assert!(file.to_vec().unwrap() == before, "{options}");
    }
}

#[test]
fn qemu_opens_the_slots_made_here() {
    let dir = Scratch::beneath("/dev/shm");
    let (new, file) = volume("");
    change(
        &file,
        new.key(),
        "state=active,new-secret=six,iter-time=1,keyslot=6",
        false,
    )
    .unwrap();
    change(&file, new.key(), "state=inactive,old-secret=one", false).unwrap();
    let image = dir.file("slots.luks", &file.to_vec().unwrap());
    let raw = dir.file("disk.raw", &disk());
    oracle::qemu_img()
        .args(["compare", "--object", "secret,id=s,data=six", "--image-opts"])
        .arg(format!(
            "driver=luks,key-secret=s,file.filename={}",
            image.display()
        ))
        .arg(format!("driver=raw,file.filename={}", raw.display()))
        .ok();
}

/// Passphrases.
type Names = &'static [&'static str];

/// Each change, what opens the disk all the while, what does only afterwards, and what no more.
const CHANGES: [(&str, Names, Names, Names); 5] = [
    (
        "state=active,new-secret=two,iter-time=1,keyslot=1",
        &["one", "six"],
        &["two"],
        &[],
    ),
    (
        "state=active,new-secret=two,iter-time=1,keyslot=6",
        &["one"],
        &["two"],
        &["six"],
    ),
    ("state=inactive,keyslot=6", &["one"], &[], &["six"]),
    ("state=inactive,old-secret=one", &["six"], &[], &["one"]),
    (
        "state=active,new-secret=two,iter-time=1,keyslot=0",
        &["six"],
        &["two"],
        &["one"],
    ),
];

/// A change has few writes between flushes.
const BOUNDS: Bounds = Bounds {
    prefixes: 2,
    singles: 1,
    random: 2,
    seed: 7,
};

/// A volume with "one" in slot 0 and "six" in slot 6, whose entry lies in two sectors.
fn two_slots() -> (VolumeKey, Vec<u8>) {
    let (new, file) = volume(QUICK);
    change(
        &file,
        new.key(),
        "state=active,new-secret=six,iter-time=1,keyslot=6",
        false,
    )
    .unwrap();
    let mut bytes = file.to_vec().unwrap();
    bytes.truncate(new.header().payload_offset() as usize);
    (new.key().clone(), bytes)
}

#[test]
fn a_power_cut_leaves_every_other_passphrase() {
    let (key, start) = two_slots();
    for (options, kept, new, gone) in CHANGES {
        let journal = Journal::new();
        let file = journal.record(Arc::new(Memory::from(start.clone())));
        change(&*file, &key, options, true).unwrap();
        let opens = |bytes: &[u8], name: &str| unlock(&Memory::from(bytes), name).is_ok();
        for cut in journal.cuts(BOUNDS) {
            let files = journal.state(&cut);
            for name in kept {
                assert!(opens(&files[0], name), "{options}: {name} after {cut:?}");
            }
        }
        let end = &journal.prefix(journal.len())[0];
        assert!(new.iter().chain(kept).all(|name| opens(end, name)), "{options}");
        assert!(!gone.iter().any(|name| opens(end, name)), "{options}");
    }
}

#[test]
fn the_only_slot_is_overwritten_without_a_moment_that_has_none() {
    let (new, file) = volume(QUICK);
    let mut start = file.to_vec().unwrap();
    start.truncate(new.header().payload_offset() as usize);
    let journal = Journal::new();
    let file = journal.record(Arc::new(Memory::from(start)));
    change(
        &*file,
        new.key(),
        "state=active,new-secret=two,iter-time=1,keyslot=0",
        true,
    )
    .unwrap();
    for cut in journal.cuts(BOUNDS) {
        let file = Memory::from(journal.state(&cut).remove(0));
        assert!(
            unlock(&file, "one").is_ok() || unlock(&file, "two").is_ok(),
            "{cut:?}"
        );
    }
}

#[test]
fn a_failing_call_leaves_every_other_passphrase() {
    let (key, start) = two_slots();
    for (options, kept, ..) in CHANGES {
        let count = |faults: &Arc<Faults>| {
            let inner = Arc::new(Memory::from(start.clone()));
            let done = change(&*faults.wrap(inner.clone()), &key, options, true);
            (inner, done)
        };
        let calls = {
            let faults = Faults::new();
            count(&faults).1.unwrap();
            faults.calls()
        };
        for number in 0..calls {
            let faults = Faults::new();
            faults.fail_at(number, Failure::ShortWrite, Lasting::ForGood);
            let (file, done) = count(&faults);
            assert!(done.is_err(), "{options} with call {number} failing");
            for name in kept {
                assert!(
                    unlock(&*file, name).is_ok(),
                    "{options}: {name} with call {number} failing"
                );
            }
        }
    }
}
