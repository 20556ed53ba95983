//! Images whose metadata lies: whatever is done to them, it ends, with an error or without.

use diskmill_core::{GuestOffset, Stored, ZeroHow};
use diskmill_testkit::sparse_random::mix;

use super::images::{self, Image};
use super::model::soak;

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
        let opened = (0..60 * u64::from(soak()))
            .filter(|seed| abuse(&image, mix(*seed)))
            .count();
        assert!(opened > 5, "{name}: nearly nothing could be opened: {opened}");
    }
}
