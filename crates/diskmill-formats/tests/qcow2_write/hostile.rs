//! Images whose metadata lies: whatever is done to them, it ends, with an error or without.

use diskmill_core::{GuestOffset, Stored, ZeroHow};
use diskmill_testkit::random::rounds;
use diskmill_testkit::sparse_random::mix;

use super::images::{self, Image};

/// Overwrites some words of the image with what an attacker might put there.
fn damage(bytes: &mut [u8], seed: u64) {
    let mut state = seed;
    let mut random = move || {
        state = mix(state);
        state
    };
    let word =
        |bytes: &[u8], at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
    let l1 = word(bytes, 40) as usize;
    let table = word(bytes, 48) as usize;
    let last = bytes.len() / 8 - 1;
    for _ in 0..1 + random() % 5 {
        // Most of the time something that is looked at first.
        let index = match random() % 6 {
            0 => 2 + (random() % 12) as usize,
            1 => l1 / 8 + (random() % 4) as usize,
            2 => table / 8 + (random() % 4) as usize,
            3 => (word(bytes, l1) & 0x00ff_ffff_ffff_fe00) as usize / 8 + (random() % 64) as usize,
            4 => word(bytes, table) as usize / 8 + (random() % 64) as usize,
            _ => random() as usize,
        };
        let at = index.min(last) * 8;
        let old = word(bytes, at);
        let offset = random() % (bytes.len() as u64 * 2);
        let new = match random() % 8 {
            0 => random(),
            1 => 0,
            2 => old ^ 1 << (random() % 64),
            3 => 1 << 63 | offset & !0x1ff,
            4 => 1 << 62 | random() >> (random() % 60),
            5 => offset & !0xfff,
            6 => u64::MAX >> (random() % 64),
            _ => old.wrapping_add(random() % 5).wrapping_sub(2),
        };
        bytes[at..at + 8].copy_from_slice(&new.to_be_bytes());
    }
}

/// Opens a damaged image and does a bit of everything. Returns whether it could be opened at all.
fn abuse(image: &Image, seed: u64) -> bool {
    let mut files = image.files.clone();
    damage(&mut files[0], seed);
    let disks = images::memory(&files);
    let Ok(layer) = images::open(&disks) else {
        return false;
    };
    let mut state = seed ^ 0x1234;
    for _ in 0..30 {
        state = mix(state);
        let size = layer.virtual_size();
        let within = size.clamp(1, 1 << 20);
        let (start, len) = (mix(state ^ 1) % within, mix(state ^ 2) % 20_000);
        let start = if state.is_multiple_of(11) {
            size.saturating_sub(start)
        } else {
            start
        };
        let len = len.min(size.saturating_sub(start));
        let at = GuestOffset::new(start);
        let range = at..GuestOffset::new(start + len);
        let below = &image.below;
        // Any of it may fail.
        let _ = match state % 9 {
            0 | 1 => layer.write_at(at, &vec![1; len as usize], below),
            2 => layer.zero(range, ZeroHow::MayUnmap, below),
            3 => layer.zero(range, ZeroHow::KeepAllocated, below),
            4 => layer.discard(range),
            5 => layer.write_encoded(at.align_down(image.unit), Stored::Packed(&[3, 0]), below),
            6 => layer.flush(),
            7 if state.is_multiple_of(5) => layer.clear(),
            7 => layer.resize(mix(state ^ 3) % (within * 2), below),
            _ => {
                let mut bytes = vec![0; len as usize];
                layer.map(at, len).map(|_| ()).and(layer.read_at(at, &mut bytes))
            }
        };
    }
    drop(layer);
    true
}

#[test]
fn random_damage_ends_in_errors_at_worst() {
    for name in [
        "cluster 512",
        "refcount 1",
        "refcount 64",
        "compressed",
        "version 2 snapshot",
        "subclusters over raw",
        "data file",
    ] {
        let image = images::named(name).make();
        let opened = rounds(1, 60).filter(|seed| abuse(&image, *seed)).count();
        assert!(opened > 5, "{name}: nearly nothing could be opened: {opened}");
    }
}

/// A snapshot whose table lies is neither applied nor deleted, and nothing of the image changes but the mark it may get.
#[test]
fn snapshots_that_lie_are_refused() {
    let image = images::named("version 2 snapshot").make();
    let table = u64::from_be_bytes(image.files[0][64..72].try_into().expect("eight bytes")) as usize;
    let past = (image.files[0].len() as u64).next_multiple_of(512) + 512;
    let damages: [(&str, usize, Vec<u8>); 5] = [
        ("an l1 table past the end", 0, past.to_be_bytes().to_vec()),
        ("an l1 table within a cluster", 0, 700_u64.to_be_bytes().to_vec()),
        ("no l1 table", 0, vec![0; 8]),
        ("too few l1 entries", 8, vec![0; 4]),
        ("a size no disk has", 48, (1_u64 << 63).to_be_bytes().to_vec()),
    ];
    for (what, at, bytes) in damages {
        let mut files = image.files.clone();
        files[0][table + at..table + at + bytes.len()].copy_from_slice(&bytes);
        let disks = images::memory(&files);
        // To open it may be refused as well.
        let Ok(layer) = images::open(&disks) else { continue };
        let snapshots = layer.snapshots().expect("snapshots");
        snapshots.apply("one").expect_err(what);
        if at == 0 {
            snapshots.delete("1").expect_err(what);
        }
        drop(layer);
        let picture = |files: &[Vec<u8>]| {
            let driver = diskmill_formats::registry::by_name("qcow2").expect("a driver");
            let main = images::memory(files).remove(0) as std::sync::Arc<dyn diskmill_core::Storage>;
            let parsed = driver.parse(main.clone(), &images::how()).expect("parse");
            let layer = parsed
                .attach(vec![(diskmill_core::Role::Main, main)], &images::how())
                .expect("attach");
            let mut disk = vec![0; layer.virtual_size() as usize];
            diskmill_core::Chain::new(vec![layer])
                .read_at(GuestOffset::ZERO, &mut disk)
                .expect("read");
            disk
        };
        assert!(
            picture(&images::bytes(&disks)) == image.start,
            "{what}: the disk has changed"
        );
    }
}

#[test]
fn options_of_images_damaged_at_random_change_or_do_not_but_it_ends() {
    for name in ["cluster 512", "version 2 snapshot", "compressed", "refcount 64"] {
        let image = images::named(name).make();
        for seed in rounds(2, 40) {
            let mut files = image.files.clone();
            damage(&mut files[0], seed);
            for wish in [
                "refcount_bits=1",
                "refcount_bits=64",
                "compat=0.10,refcount_bits=16",
                "compat=1.1",
            ] {
                let disks = images::memory(&files);
                if let Ok(layer) = images::open(&disks) {
                    let wish = diskmill_core::Amendment::new(diskmill_core::Options::parse(wish));
                    let _ = layer.amend(&wish, &image.below, diskmill_core::Job::silent());
                }
            }
        }
    }
}
