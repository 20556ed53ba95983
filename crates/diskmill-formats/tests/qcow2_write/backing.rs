//! Changing the name of the backing image in place: whenever the power goes, the old name or the new one is there, and
//! everything else the header holds.

use diskmill_core::{BackingName, ErrorKind, GuestOffset, State};
use diskmill_formats::qcow2::extension::Extension;
use diskmill_formats::qcow2::header::Header;
use diskmill_formats::qcow2::read_header;
use diskmill_storage::Memory;
use diskmill_testkit::fault::{Change, Journal};
use diskmill_testkit::{Scratch, oracle};

use super::images::{self, Disks};

fn named(len: usize, format: &str) -> Option<BackingName> {
    Some(BackingName {
        name: "/".repeat(len.saturating_sub(4)) + &"base"[..len.min(4)],
        format: (!format.is_empty()).then(|| format.to_owned()),
    })
}

fn header_of(file: &[u8]) -> Header {
    read_header(&Memory::from(file)).unwrap_or_else(|error| panic!("no header: {error:?}"))
}

/// What must not change with the name.
fn rest(mut header: Header) -> Header {
    header.backing_name = None;
    header.tail = header.tail.map(|tail| tail[..7].to_vec());
    header
        .extensions
        .retain(|extension| !matches!(extension, Extension::BackingFormat(_)));
    header
}

fn make(options: &str) -> Vec<u8> {
    let scratch = Scratch::new();
    let path = scratch.join("image.qcow2");
    oracle::create(&path, "qcow2", options, "1M");
    if !options.contains("0.10") {
        // A further extension, of a sort nobody knows, must stay.
        let bytes = std::fs::read(&path).unwrap();
        let mut header = header_of(&bytes);
        header.extensions.push(Extension::Unknown {
            kind: 0x1234_5678,
            data: b"kept as it is".to_vec(),
        });
        diskmill_testkit::scratch::patch(&path, 0, &header.to_bytes().unwrap());
    }
    std::fs::read(path).unwrap()
}

/// Changes the name in these steps, and cuts the power in every place.
fn story(options: &str, steps: &[Option<BackingName>]) {
    let mut files = vec![make(options)];
    for step in steps {
        let old = header_of(&files[0]);
        let journal = Journal::new();
        let disks: Disks = images::memory(&files)
            .into_iter()
            .map(|disk| journal.record(disk))
            .collect();
        images::open(&disks).unwrap().set_backing(step.as_ref()).unwrap();
        let states = (0..=journal.len()).flat_map(|count| {
            let torn = (0..8).map(move |seed| (count, Some(seed)));
            torn.chain([(count, None)])
        });
        for (count, seed) in states {
            let state = match seed {
                Some(seed) => journal.crash(count, seed),
                None => journal.prefix(count),
            };
            let seen = header_of(&state[0]);
            assert!(
                seen.backing() == old.backing() || seen.backing() == *step,
                "{options}, {count}, {seed:?}: {:?} on the way from {:?} to {step:?}",
                seen.backing(),
                old.backing()
            );
            assert_eq!(rest(seen), rest(old.clone()), "{options}, {count}, {seed:?}");
        }
        assert!(
            matches!(
                journal.changes().last(),
                Some(Change::Flush { .. } | Change::Write { .. })
            ),
            "nothing was written"
        );
        files = images::bytes(&disks);
        let seen = header_of(&files[0]);
        assert_eq!(seen.backing(), *step, "{options}");
        assert_eq!(
            seen.to_bytes().unwrap(),
            files[0][..seen.total_len() as usize],
            "{options}: laid out otherwise"
        );
        assert!(
            files[0][seen.total_len() as usize..1 << seen.cluster_bits.get()]
                .iter()
                .all(|byte| *byte == 0),
            "{options}: something is left behind the header"
        );
        images::assert_clean(&files);
        let scratch = Scratch::new();
        let path = scratch.file("image.qcow2", &files[0]);
        let info = oracle::info(&path, "qcow2", false);
        let expected = step.as_ref();
        assert_eq!(
            info["backing-filename"].as_str(),
            expected.map(|backing| backing.name.as_str())
        );
        assert_eq!(
            info["backing-filename-format"].as_str(),
            expected.and_then(|backing| backing.format.as_deref())
        );
    }
}

#[test]
fn a_name_is_the_old_or_the_new_one_at_every_moment() {
    let steps = [
        named(4, "raw"),
        named(9, "qcow2"),
        named(900, "qcow2"),
        named(1023, "parallels12345"),
        None,
        named(500, ""),
        named(501, "raw"),
        named(3, "qcow2"),
        None,
    ];
    for options in [
        "compat=1.1",
        "compat=0.10",
        "cluster_size=16k",
        "cluster_size=8k,extended_l2=off,compression_type=zstd",
        "compat=0.10,cluster_size=4k",
    ] {
        story(options, &steps);
    }
    let short = [named(4, "raw"), named(100, "qcow2"), named(30, ""), None];
    for options in [
        "cluster_size=512",
        "compat=0.10,cluster_size=512",
        "cluster_size=1k",
    ] {
        story(options, &short);
    }
}

#[test]
fn what_does_not_fit_is_refused_and_changes_nothing() {
    for (options, step, kind) in [
        ("compat=1.1", named(1024, "raw"), ErrorKind::Usage),
        ("compat=1.1", named(4, "sixteen bytes ab"), ErrorKind::Usage),
        ("compat=1.1", named(0, "raw"), ErrorKind::Usage),
        ("cluster_size=512", named(600, "raw"), ErrorKind::NoSpace),
    ] {
        let files = vec![make(options)];
        let disks = images::memory(&files);
        let layer = images::open(&disks).unwrap();
        let error = layer.set_backing(step.as_ref()).unwrap_err();
        assert_eq!(error.kind(), kind, "{error:?}");
        drop(layer);
        assert!(images::bytes(&disks) == files, "{options}: the image has changed");
    }
    let image = images::named("raw data file").make();
    let disks = images::memory(&image.files);
    let error = images::open(&disks)
        .unwrap()
        .set_backing(named(4, "raw").as_ref())
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Usage);
}

/// A disk that has got a backing image keeps zeros apart from what shows through, from the next write on.
#[test]
fn zeros_hide_the_new_backing_image() {
    let disks = images::memory(&[make("cluster_size=4k")]);
    let layer = images::open(&disks).unwrap();
    layer.set_backing(named(4, "raw").as_ref()).unwrap();
    let start = GuestOffset::new(8192);
    layer.discard(start..GuestOffset::new(16384)).unwrap();
    layer.flush().unwrap();
    let extent = layer.map(start, 8192).unwrap();
    assert_eq!(extent.state, State::Zero { reserved: None });
}
