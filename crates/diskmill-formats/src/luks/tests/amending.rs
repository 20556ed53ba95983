//! Key slots: what is asked for is done, what would lock everybody out is not, and no power cut does.

use diskmill_core::{Amendment, Chain};
use diskmill_testkit::fault::Journal;
use diskmill_testkit::random;

use super::*;

const ALL: [&str; 3] = ["one", "two", "three"];

fn amend(file: &Arc<dyn StorageMut>, passphrase: &str, options: &str, force: bool) -> Result<()> {
    let how = with(passphrase, &ALL);
    let parsed = DRIVER.parse(Arc::clone(file) as _, &how)?;
    let layer = parsed.attach_mut(vec![(Role::Main, Arc::clone(file))], &how)?;
    let mut wish = Amendment::new(Options::parse(options));
    wish.force = force;
    layer.amend(&wish, &Chain::default(), Job::silent())
}

/// Which passphrases open an image; of those that do the disk is read.
fn open_with(file: &[u8], passphrases: &[&'static str]) -> Vec<&'static str> {
    let main: Arc<dyn Storage> = memory(file);
    let opens = |text: &&&str| {
        let how = with(text, &[]);
        let parsed = DRIVER.parse(Arc::clone(&main), &how).expect("parse");
        let Ok(layer) = parsed.attach(vec![(Role::Main, Arc::clone(&main))], &how) else {
            return false;
        };
        let mut found = vec![0; 1024];
        layer.read_at(at(0), &mut found).expect("read");
        assert!(found == disk(1024), "{text} opens something else");
        true
    };
    passphrases.iter().filter(opens).copied().collect()
}

fn add(passphrase: &str, slot: u8) -> String {
    format!("state=active,new-secret={passphrase},iter-time=1,keyslot={slot}")
}

#[test]
fn passphrases_come_and_go() {
    let file = memory(&Keyed::quick().image(&disk(1024)));
    let done = |passphrase: &str, options: &str| {
        amend(&file, passphrase, options, false).unwrap_or_else(|error| panic!("{options}: {error:?}"));
        open_with(&bytes(&*file), &ALL)
    };
    let refused = |passphrase: &str, options: &str, expected: &str| {
        let before = bytes(&*file);
        let error = text(&amend(&file, passphrase, options, false).unwrap_err());
        assert!(error.contains(expected), "{options}: {error}");
        assert!(bytes(&*file) == before, "{options}: nothing is written");
    };
    assert_eq!(
        done("one", "state=active,new-secret=two,iter-time=1"),
        ["one", "two"]
    );
    assert_eq!(done("two", &add("three", 6)), ALL);
    refused("one", &add("three", 6), "refusing to overwrite active keyslot 6");
    refused("one", &add("three", 9), "must be between 0 and 7");
    refused("one", "state=inactive,keyslot=5", "already erased");
    refused(
        "one",
        "state=inactive,keyslot=0,old-secret=two",
        "doesn't contain the given old password",
    );
    refused("one", "new-secret=two", "state");
    refused(
        "one",
        "state=active,new-secret=nobody",
        "no secret with id 'nobody'",
    );
    refused(
        "one",
        "state=inactive,size=1M,keyslot=0",
        "invalid parameter 'size'",
    );
    refused("no", "state=inactive,keyslot=0", "invalid password");
    assert_eq!(done("two", "state=inactive,keyslot=0"), ["two", "three"]);
    assert_eq!(done("three", "state=inactive,old-secret=two"), ["three"]);
    refused("three", "state=inactive,keyslot=6", "the only active keyslot 6");
    refused(
        "three",
        "state=inactive,old-secret=three",
        "all the active keyslots match",
    );
    refused("three", "state=inactive,old-secret=one", "no keyslots match");
    amend(&file, "three", "state=inactive,keyslot=6", true).expect("forced");
    assert!(open_with(&bytes(&*file), &ALL).is_empty());
    let key = Keyed::quick().contents(&bytes(&*file)).expect("by its key");
    assert!(key == disk(1024));
}

#[test]
fn what_was_erased_is_gone_from_the_file() {
    let quick = Keyed::quick();
    let file = memory(&quick.image(&disk(1024)));
    amend(&file, "one", &add("two", 1), false).expect("add");
    let before = bytes(&*file);
    amend(&file, "one", "state=inactive,keyslot=1", false).expect("erase");
    let after = bytes(&*file);
    let slot = &quick.volume.header().slots()[1];
    let start = usize::try_from(slot.key_offset()).unwrap();
    let end = start + usize::try_from(quick.volume.header().material_len()).unwrap();
    let same = before[start..end]
        .iter()
        .zip(&after[start..end])
        .filter(|(a, b)| a == b);
    assert!(same.count() < (end - start) / 16, "the material is there still");
    let mut old = after;
    old[start..end].copy_from_slice(&before[start..end]);
    assert_eq!(
        open_with(&old, &ALL),
        ["one"],
        "neither salt nor iterations are known"
    );
}

/// At every moment one of the passphrases opens the image, and it is the same disk.
#[test]
fn a_power_cut_locks_nobody_out() {
    let quick = Keyed::quick();
    let mut states = 0;
    for (start, passphrase, options, force) in [
        (&[][..], "one", add("two", 1), false),
        (&["two"], "one", "state=inactive,keyslot=1".to_owned(), false),
        (&["two"], "two", "state=inactive,old-secret=one".to_owned(), false),
        (&[], "one", add("two", 0), true),
        (&["two"], "one", add("three", 1), true),
    ] {
        let image = memory(&quick.image(&disk(1024)));
        for (slot, passphrase) in (1..).zip(start) {
            amend(&image, "one", &add(passphrase, slot), false).expect("add");
        }
        let image = bytes(&*image);
        let journal = Journal::new();
        let file = journal.record(memory(&image));
        let before = open_with(&image, &ALL);
        amend(&file, passphrase, &options, force).expect("amend");
        let after = open_with(&bytes(&*file), &ALL);
        assert_ne!(before, after);
        let known: Vec<_> = ALL
            .into_iter()
            .filter(|text| before.contains(text) || after.contains(text))
            .collect();
        for count in 0..=journal.len() {
            for seed in random::rounds(count as u64, 1) {
                let left = &journal.crash(count, seed)[0];
                let found = open_with(left, &known);
                assert!(!found.is_empty(), "{options}: cut {count}, seed {seed}");
                let kept = before.iter().filter(|text| after.contains(text));
                for text in kept {
                    assert!(
                        found.contains(text),
                        "{options}: {text}: cut {count}, seed {seed}"
                    );
                }
                states += 1;
            }
        }
    }
    assert!(states > 25, "{states}");
}
