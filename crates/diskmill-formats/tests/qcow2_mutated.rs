//! Real images with a few fields changed at random: whatever comes of it, nothing panics, hangs or grows without end.

mod support;

use std::sync::{Arc, LazyLock};

use diskmill_core::{
    CheckReport, Driver, Files, GuestOffset, HostOffset, Job, OpenSpec, Repair, Role, State, Storage,
    StorageMut,
};
use diskmill_formats::qcow2;
use diskmill_storage::Memory;
use diskmill_testkit::{Scratch, oracle, random};
use proptest::prelude::*;

/// Small images with everything in them that is parsed.
static IMAGES: LazyLock<Vec<Vec<u8>>> = LazyLock::new(|| {
    let dir = Scratch::beneath("/dev/shm");
    let raw = dir.join("source.raw");
    std::fs::write(&raw, b"some text, again and again. ".repeat(2000)).unwrap();
    let mut images = Vec::new();
    for (flags, options) in [
        (&[][..], "cluster_size=512"),
        (&["-c"][..], "cluster_size=4k"),
        (&["-c"][..], "cluster_size=4k,compression_type=zstd"),
        (&[][..], "cluster_size=16k,extended_l2=on"),
        (&[][..], "cluster_size=4k,refcount_bits=1"),
        (&[][..], "compat=0.10,cluster_size=1k"),
    ] {
        let image = dir.join("image.qcow2");
        let flags: Vec<&str> = flags.iter().copied().chain(["-o", options]).collect();
        oracle::convert(flags, &raw, "raw", &image, "qcow2");
        oracle::io(&image, "qcow2", ["write -z 0 4k", "write -P 1 8k 512"]);
        if !options.contains("refcount_bits=1") {
            oracle::qemu_img()
                .args(["snapshot", "-c", "one"])
                .arg(&image)
                .ok();
            oracle::io(&image, "qcow2", ["write -P 2 16k 512"]);
        }
        if !options.contains("compat") {
            oracle::qemu_img()
                .args(["bitmap", "--add"])
                .arg(&image)
                .arg("b0")
                .ok();
        }
        let mut bytes = std::fs::read(&image).unwrap();
        let snapshots = u64::from_be_bytes(bytes[64..72].try_into().unwrap()) as usize;
        if snapshots > 0 {
            // When the snapshot was made: the same bytes every time.
            bytes[snapshots + 16..snapshots + 24]
                .copy_from_slice(&[0x69, 0x22, 0x33, 0x44, 0, 0x55, 0x66, 0x77]);
        }
        images.push(bytes);
    }
    images
});

/// Runs a reader would ask for at most, whatever the size of the disk is said to be.
const RUNS: usize = 200;

fn exercise(bytes: Vec<u8>) {
    let main: Arc<dyn Storage> = Arc::new(Memory::from(bytes));
    let files = || -> Files { vec![(Role::Main, Arc::clone(&main)), (Role::Data, Arc::clone(&main))] };
    let mut how = OpenSpec::default();
    if let Ok(parsed) = qcow2::DRIVER.parse(Arc::clone(&main), &how) {
        let _ = (parsed.facts(), parsed.references());
        if let Ok(layer) = parsed.attach(files(), &how) {
            let size = layer.virtual_size();
            let mut at = 0;
            for _ in 0..RUNS {
                if at >= size {
                    break;
                }
                let Ok(extent) = layer.map(GuestOffset::new(at), size - at) else {
                    at = at.saturating_add(4096);
                    continue;
                };
                assert!(extent.len > 0 && extent.len <= size - at);
                if extent.state != State::Absent {
                    let mut buf = vec![0; extent.len.min(64 << 10) as usize];
                    let _ = layer.read_at(GuestOffset::new(at), &mut buf);
                }
                at += extent.len;
            }
        }
    }
    how.for_check = true;
    if let Ok(parsed) = qcow2::DRIVER.parse(Arc::clone(&main), &how) {
        let report = parsed.check(files(), &how, Job::silent()).unwrap();
        assert!(report.findings.len() <= diskmill_core::CheckReport::KEPT);
    }
    for what in [Repair::Leaks, Repair::All] {
        repair(&main, &how, what);
    }
}

/// Repairs a copy: what is wrong goes or is told, and a second repair has nothing to do.
fn repair(main: &Arc<dyn Storage>, how: &OpenSpec, what: Repair) {
    let mut bytes = vec![0; main.len().unwrap() as usize];
    main.read_at(HostOffset::ZERO, &mut bytes).unwrap();
    let copy = Arc::new(Memory::from(bytes));
    let again = || {
        let read: Arc<dyn Storage> = copy.clone();
        let write: Arc<dyn StorageMut> = copy.clone();
        let files = vec![(Role::Main, Arc::clone(&write)), (Role::Data, write)];
        let parsed = qcow2::DRIVER.parse(read, how)?;
        parsed.repair(files, how, what, Job::silent())
    };
    let Ok(first) = again() else {
        return;
    };
    let second = again().unwrap();
    let left = |report: &CheckReport| (report.corruptions, report.leaks, report.check_errors);
    assert_eq!(left(&first), left(&second), "{first:#?}\n{second:#?}");
    assert_eq!(
        (second.corruptions_fixed, second.leaks_fixed),
        (0, 0),
        "{second:#?}"
    );
}

/// Numbers that sit at the edges of what fields may be.
fn edge() -> impl Strategy<Value = u64> {
    prop_oneof![
        any::<u64>(),
        (0_u32..64).prop_map(|shift| 1 << shift),
        (0_u32..64).prop_map(|shift| u64::MAX >> shift),
        (0_u64..64, 0_u64..4).prop_map(|(cluster, top)| (cluster * 512) | (top << 62)),
        0_u64..256,
    ]
}

proptest! {
    #![proptest_config(random::config(400))]

    #[test]
    fn headers_changed_at_random(which in 0_usize..6, changes in proptest::collection::vec((0_usize..160, edge(), 0_usize..4), 1..4)) {
        let mut bytes = IMAGES[which].clone();
        for (at, value, width) in changes {
            let field = &value.to_be_bytes()[8 - (1 << width)..];
            bytes[at..at + field.len()].copy_from_slice(field);
        }
        exercise(bytes);
    }

    #[test]
    fn tables_changed_at_random(which in 0_usize..6, changes in proptest::collection::vec((any::<prop::sample::Index>(), edge()), 1..8)) {
        let mut bytes = IMAGES[which].clone();
        for (index, value) in changes {
            let at = index.index(bytes.len() / 8 - 1) * 8;
            // Only what is not zero is likely to be looked at.
            let at = (at..bytes.len() - 8).step_by(8).find(|at| bytes[*at..at + 8] != [0; 8]).unwrap_or(at);
            bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
        }
        exercise(bytes);
    }

    #[test]
    fn images_cut_at_random(which in 0_usize..6, len in any::<prop::sample::Index>()) {
        let mut bytes = IMAGES[which].clone();
        bytes.truncate(len.index(bytes.len()));
        exercise(bytes);
    }
}
