//! Headers that lie.

use diskmill_core::Chain;
use diskmill_testkit::random::{Dice, soak};

use super::*;

/// What opening a changed image fails with; with a passphrase if that is what it takes.
fn trouble(change: impl Fn(&mut Vec<u8>)) -> String {
    let mut image = Keyed::quick().image(&disk(4096));
    change(&mut image);
    let main: Arc<dyn Storage> = memory(&image);
    let how = with("one", &[]);
    let opened = DRIVER
        .parse(Arc::clone(&main), &how)
        .and_then(|parsed| parsed.attach(vec![(Role::Main, main)], &how));
    match opened {
        Err(error) => text(&error),
        Ok(layer) => panic!("it opens: {layer:?}"),
    }
}

fn put(at: usize, value: u32) -> impl Fn(&mut Vec<u8>) {
    move |image| image[at..at + 4].copy_from_slice(&value.to_be_bytes())
}

#[test]
fn each_lie_is_named() {
    let start = Keyed::quick().volume.header().payload_offset();
    let cut = |len: u64| move |image: &mut Vec<u8>| image.truncate(usize::try_from(len).unwrap());
    let fill = |from: usize| move |image: &mut Vec<u8>| image[from..from + 32].fill(b'x');
    for (found, expected) in [
        (
            trouble(cut(300)),
            "the fixed part of the LUKS header ends at byte 592",
        ),
        (trouble(cut(20_000)), "ends at byte"),
        (trouble(cut(start - 1)), "there are only"),
        (
            trouble(fill(8)),
            "cipher name of the LUKS header is not NUL terminated",
        ),
        (
            trouble(fill(40)),
            "cipher mode of the LUKS header is not NUL terminated",
        ),
        (trouble(fill(72)), "hash of the LUKS header is not NUL terminated"),
        (trouble(|image| image[8..11].copy_from_slice(b"des")), "'des'"),
        (trouble(|image| image[43] = b'_'), "cipher mode string format"),
        (trouble(|image| image[72..76].copy_from_slice(b"sha9")), "sha9"),
        (trouble(put(104, 0)), "payload is overlapping with the header"),
        (trouble(put(104, 7)), "payload_offset is 7 sectors"),
        (trouble(put(104, 100)), "overlapping with the encrypted payload"),
        (trouble(put(104, u32::MAX)), "there are only"),
        (trouble(put(108, 0)), "key of 0 bytes"),
        (trouble(put(108, 63)), "key of 63 bytes"),
        (trouble(put(108, u32::MAX)), "key of 4294967295 bytes"),
        (trouble(put(164, 0)), "iterations of the volume key is 0"),
        (trouble(put(164, u32::MAX)), "iterations is 4294967295"),
        (trouble(put(208, 1)), "state of LUKS key slot 0"),
        (trouble(put(208, 0xdead)), "invalid password"),
        (trouble(put(212, 0)), "keyslot 0 is corrupted"),
        (trouble(put(212, u32::MAX)), "iterations is 4294967295"),
        (
            trouble(put(248, 7)),
            "keyslot 0 is overlapping with the LUKS header",
        ),
        (
            trouble(put(248, u32::MAX)),
            "keyslot 0 is overlapping with the encrypted payload",
        ),
        (trouble(put(248, 140)), "overlapping in the header"),
        (trouble(put(252, 1)), "stripes is 1, must be 4000"),
        (trouble(put(252, u32::MAX)), "stripes is 4294967295"),
        (trouble(put(4096, 0x55)), "invalid password"),
        (trouble(put(112, 0x55)), "invalid password"),
    ] {
        assert!(found.contains(expected), "{expected}: {found}");
    }
}

#[test]
fn headers_of_noise_neither_panic_nor_take_long() {
    let quick = Keyed::quick();
    let image = quick.image(&disk(4096));
    let below = Chain::default();
    let mut opened = 0;
    let mut dice = Dice::new(0x1075);
    for _ in 0..400 * soak() {
        let mut noisy = image.clone();
        for _ in 0..1 + dice.below(3) {
            let place = dice.below(589) as usize;
            let value = dice.next();
            match dice.below(3) {
                0 => noisy[place] ^= 1 << (value % 8),
                1 => noisy[place] = value as u8,
                _ => noisy[place..place + 4].copy_from_slice(&(value as u32).to_be_bytes()),
            }
        }
        if dice.below(5) == 0 {
            noisy.truncate(dice.below(noisy.len() as u64) as usize);
        }
        let file = memory(&noisy);
        if let Ok(layer) = quick.open(&file) {
            opened += 1;
            let end = layer.virtual_size();
            if end > 0 {
                layer.map(at(0), u64::MAX).expect("a run");
                let mut found = vec![0; end.min(8192) as usize];
                let _ = layer.read_at(at(0), &mut found);
                let _ = layer.write_at(at(end - 1), &[1], &below);
            }
            let _ = layer.resize(end / 2, &below);
        }
    }
    assert!(opened > 20, "{opened}");
}
