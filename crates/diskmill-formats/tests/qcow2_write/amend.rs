//! Changing the options of an image: the disk and the snapshots stay what they are, whenever the power goes.

use std::sync::atomic::AtomicBool;

use diskmill_core::{Amendment, ErrorKind, Job, Options, Silent};
use diskmill_formats::qcow2::read_header;
use diskmill_storage::Memory;
use diskmill_testkit::crash::{Effect, Effort, Figures, Tale};
use diskmill_testkit::fault::Journal;
use diskmill_testkit::oracle;
use diskmill_testkit::random::seed;

use super::images::{self, Disks, Image};
use super::subject;

fn amend(disks: &Disks, image: &Image, wish: &str) -> diskmill_core::Result<()> {
    images::open(disks)?.amend(&Amendment::new(Options::parse(wish)), &image.below, Job::silent())
}

/// Changes options in these steps, and cuts the power in every place. Whatever had been written before each step is
/// there after it.
fn story(name: &str, wishes: &[&str]) -> Figures {
    let image = images::named(name).make();
    let journal = Journal::new();
    let disks: Disks = images::memory(&image.files)
        .into_iter()
        .map(|disk| journal.record(disk))
        .collect();
    let start = subject::picture(&image.files, &image.below).expect("look");
    let mut tale = Tale::new(format!("{name}, {wishes:?}"), &journal, start);
    for wish in wishes {
        // The data file's name made longer, without meaning another file.
        let wish = match wish.split_once('^') {
            None => (*wish).to_owned(),
            Some((option, rest)) => {
                let (longer, rest) = rest.split_once(',').unwrap_or((rest, "lazy_refcounts=off"));
                let dots = "./".repeat(longer.parse().expect("a number"));
                let dir = image.dump(&[]).with_file_name(dots);
                format!("{option}{}image.data,{rest}", dir.display())
            }
        };
        let wish = wish.as_str();
        let mark = tale.mark();
        amend(&disks, &image, wish).unwrap_or_else(|error| panic!("{name}, {wish}: {error:?}"));
        let files = images::bytes(&disks);
        let mut after = tale.now().clone();
        if let Some(size) = Options::parse(wish).size("size").expect("a size") {
            after.disk.resize(size as usize, 0);
        }
        image.assert_good(&files, &after.disk);
        tale.note(mark, wish, Effect::Switches, after);
    }
    tale.survive(&image, Effort::usual(seed()))
}

#[test]
fn a_power_cut_while_options_change_leaks_at_worst() {
    let widths = [
        "refcount_bits=64",
        "refcount_bits=8",
        "refcount_bits=32",
        "refcount_bits=16",
    ];
    let versions = [
        "compat=0.10",
        "compat=1.1",
        "compat=0.10",
        "compat=1.1,lazy_refcounts=on",
    ];
    for (name, wishes) in [
        ("cluster 512", &widths[..]),
        ("cluster 512", &versions),
        (
            "refcount 1",
            &[
                "refcount_bits=64",
                "refcount_bits=1",
                "refcount_bits=16,compat=0.10",
            ],
        ),
        (
            "refcount 4",
            &["refcount_bits=2", "refcount_bits=16", "compat=0.10"],
        ),
        (
            "refcount 64",
            &[
                "refcount_bits=16",
                "compat=0.10",
                "compat=1.1",
                "refcount_bits=64",
            ],
        ),
        (
            "version 2 snapshot",
            &["compat=1.1", "refcount_bits=4", "refcount_bits=16", "compat=v2"],
        ),
        ("subclusters snapshot", &widths),
        (
            "compressed",
            &[
                "refcount_bits=32",
                "lazy_refcounts=on",
                "refcount_bits=16,compat=0.10",
            ],
        ),
        ("over raw", &versions),
        ("over longer", &versions),
        ("aes over raw", &["compat=0.10", "compat=1.1"]),
        (
            "luks",
            &[
                "encrypt.state=active,encrypt.new-secret=second,encrypt.iter-time=0",
                "compat=0.10",
                "compat=1.1,encrypt.state=inactive,encrypt.old-secret=second",
            ],
        ),
        (
            "version 2 over raw",
            &["compat=1.1,refcount_bits=64,lazy_refcounts=on"],
        ),
        ("lazy", &["lazy_refcounts=off", "size=400k", "compat=v2"]),
        ("preallocated", &versions),
        (
            "data file",
            &[
                "refcount_bits=64",
                "data_file=^1",
                "data_file=^40",
                "data_file=^90",
                "data_file=^91",
                "data_file=^3,refcount_bits=1",
            ],
        ),
        ("raw data file", &["data_file_raw=off", "refcount_bits=2"]),
    ] {
        story(name, wishes);
    }
}

/// The counts of a full table, of which each block has to become many, or many become one.
#[test]
fn all_widths_lead_to_all_others() {
    let mut image = images::named("refcount table").make();
    let path = image.dump(&image.files);
    oracle::io(
        &path,
        "qcow2",
        ["write -P 1 0 1900k", "write -z 100k 300k", "discard 900k 200k"],
    );
    image.files = vec![std::fs::read(&path).expect("read")];
    image.start = subject::picture(&image.files, &image.below).expect("look").disk;
    let disks = images::memory(&image.files);
    for bits in [1, 64, 2, 32, 4, 16, 8, 64, 16, 1, 8, 2, 4, 1] {
        amend(&disks, &image, &format!("refcount_bits={bits}")).expect("amend");
        let files = images::bytes(&disks);
        let header = read_header(&Memory::from(files[0].as_slice())).expect("a header");
        assert_eq!(header.refcount_order.bits(), bits);
        image.assert_good(&files, &image.start);
    }
}

#[test]
fn what_is_refused_or_stopped_changes_nothing() {
    let stopped = AtomicBool::new(true);
    let cancelled = Job {
        observer: &Silent,
        cancel: &stopped,
    };
    for (name, wish, job, kind) in [
        ("refcount 4", "refcount_bits=1", Job::silent(), ErrorKind::Usage),
        ("cluster 512", "refcount_bits=64", cancelled, ErrorKind::Cancelled),
        (
            "cluster 512",
            "size=1M,compat=0.10,lazy_refcounts=on",
            Job::silent(),
            ErrorKind::Usage,
        ),
        ("subclusters", "compat=0.10", Job::silent(), ErrorKind::Usage),
        ("zstd", "compat=0.10", Job::silent(), ErrorKind::Usage),
        (
            "data file",
            "data_file_raw=on,refcount_bits=1",
            Job::silent(),
            ErrorKind::Usage,
        ),
    ] {
        let image = images::named(name).make();
        let disks = images::memory(&image.files);
        let layer = images::open(&disks).expect("open");
        let error = layer
            .amend(&Amendment::new(Options::parse(wish)), &image.below, job)
            .unwrap_err();
        assert_eq!(error.kind(), kind, "{name}, {wish}: {error:?}");
        layer.flush().expect("flush");
        drop(layer);
        let files = images::bytes(&disks);
        let header = |files: &[Vec<u8>]| read_header(&Memory::from(files[0].as_slice())).expect("a header");
        assert_eq!(header(&files), header(&image.files), "{name}, {wish}");
        image.assert_good(&files, &image.start);
    }
}
