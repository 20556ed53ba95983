//! Headers made to do harm, and damaged ones: refused at once, with a text that names what is wrong.

use std::sync::atomic::AtomicBool;

use diskmill_core::{ErrorKind, HostOffset, Job, Storage, StorageMut};
use diskmill_formats::crypt::CryptError;
use diskmill_formats::crypt::kdf::MAX_ITERATIONS;
use diskmill_formats::crypt::luks::{Header, LuksError, Place, Volume};
use diskmill_storage::Memory;
use proptest::prelude::*;

use crate::{QUICK, contents, disk, text, volume};

fn load(bytes: &[u8], place: Place) -> Result<Volume, String> {
    Volume::load(&Memory::from(bytes), place).map_err(|error| text(&error))
}

/// Where a field of slot `index` is.
fn slot(index: usize, field: usize) -> usize {
    208 + 48 * index + field
}

#[test]
fn headers_that_break_a_rule_are_refused() {
    let (_, file) = volume(QUICK);
    let good = file.to_vec().unwrap();
    load(&good, Place::Standalone).unwrap();
    let word = |number: u32| number.to_be_bytes().to_vec();
    let cases: Vec<(usize, Vec<u8>, &str)> = vec![
        (0, b"LUXS".to_vec(), "there is no LUKS header at 0x0"),
        (6, vec![0, 2], "LUKS version 2 is not supported"),
        (6, vec![1, 0], "LUKS version 256 is not supported"),
        (
            8,
            vec![b'a'; 32],
            "the cipher name of the LUKS header is not NUL terminated",
        ),
        (
            40,
            vec![b'a'; 32],
            "the cipher mode of the LUKS header is not NUL terminated",
        ),
        (
            72,
            vec![b'a'; 32],
            "the hash of the LUKS header is not NUL terminated",
        ),
        (8, b"rot13\0".to_vec(), "cipher 'rot13' is not supported"),
        (8, vec![0xff; 31], "is not supported"),
        (
            40,
            b"cbc\0".to_vec(),
            "unexpected cipher mode string format 'cbc'",
        ),
        (40, b"gcm-plain\0".to_vec(), "cipher mode 'gcm' is not supported"),
        (40, b"cbc-lmk\0".to_vec(), "generator 'lmk' is not supported"),
        (40, b"cbc-essiv\0".to_vec(), "needs a hash"),
        (
            40,
            b"cbc-essiv:sha1\0".to_vec(),
            "a key of 20 bytes does not suit",
        ),
        (40, b"xts-plain64\0".to_vec(), "a key of 16 bytes does not suit"),
        (72, b"whirlpool\0".to_vec(), "hash 'whirlpool' is not supported"),
        (104, word(0), "payload_offset is 0 sectors, must be at least 8"),
        (104, word(7), "payload_offset is 7 sectors, must be at least 8"),
        (
            104,
            word(1000),
            "keyslot 7 is overlapping with the encrypted payload",
        ),
        (
            104,
            word(u32::MAX),
            "the area in front of the payload of the LUKS header ends at byte 2199023255040",
        ),
        (108, word(0), "a key of 0 bytes does not suit"),
        (108, word(63), "a key of 63 bytes does not suit"),
        (108, word(u32::MAX), "a key of 4294967295 bytes does not suit"),
        (164, word(0), "the number of iterations of the volume key is 0"),
        (
            slot(0, 0),
            word(1),
            "state of LUKS key slot 0 is 0x00000001, must be 0x00ac71f3 or 0x0000dead",
        ),
        (slot(7, 0), word(0), "state of LUKS key slot 7"),
        (slot(0, 4), word(0), "keyslot 0 is corrupted: iterations is 0"),
        (
            slot(0, 40),
            word(7),
            "keyslot 0 is overlapping with the LUKS header",
        ),
        (
            slot(3, 40),
            word(0),
            "keyslot 3 is overlapping with the LUKS header",
        ),
        (
            slot(1, 40),
            word(9),
            "keyslots 0 and 1 are overlapping in the header",
        ),
        (
            slot(7, 40),
            word(1001),
            "keyslot 7 is overlapping with the encrypted payload",
        ),
        (
            slot(0, 40),
            word(u32::MAX),
            "keyslot 0 is overlapping with the encrypted payload",
        ),
        (
            slot(7, 40),
            word(u32::MAX - 124),
            "keyslot 7 is overlapping with the encrypted payload",
        ),
        (
            slot(0, 44),
            word(4001),
            "keyslot 0 is corrupted: stripes is 4001, must be 4000",
        ),
        (
            slot(5, 44),
            word(u32::MAX),
            "keyslot 5 is corrupted: stripes is 4294967295, must be 4000",
        ),
    ];
    for (at, value, says) in cases {
        let mut bytes = good.clone();
        bytes[at..at + value.len()].copy_from_slice(&value);
        let error = load(&bytes, Place::Standalone).unwrap_err();
        assert!(error.contains(says), "{says:?} at {at}: {error}");
    }
}

#[test]
fn what_is_cut_short_is_refused() {
    let (new, file) = volume(QUICK);
    let good = file.to_vec().unwrap();
    let payload = new.header().payload_offset();
    let embedded = |len| Place::Embedded {
        at: HostOffset::ZERO,
        len,
    };
    let material = 4096 + new.header().material_len();
    for (len, place, says) in [
        (0, Place::Standalone, "there is no LUKS header at 0x0"),
        (
            591,
            Place::Standalone,
            "the fixed part of the LUKS header ends at byte 592, but there are only 591",
        ),
        (payload - 1, Place::Standalone, "the area in front of the payload"),
        (
            material - 1,
            Place::Standalone,
            "the material of keyslot 0 of the LUKS header ends at byte 68096",
        ),
        (material - 1, Place::Detached, "the material of keyslot 0"),
        (material - 1, embedded(payload), "the material of keyslot 0"),
        (payload, embedded(material - 1), "the material of keyslot 0"),
        (
            payload,
            embedded(500),
            "the fixed part of the LUKS header ends at byte 592, but there are only 500",
        ),
    ] {
        let error = load(&good[..len as usize], place).unwrap_err();
        assert!(error.contains(says), "{len} {place:?}: {error}");
    }
    load(&good[..payload as usize], Place::Standalone).unwrap();
    load(&good[..material as usize], Place::Detached).unwrap();
    load(&good[..material as usize], embedded(material)).unwrap();
    let past = Place::Embedded {
        at: HostOffset::new(u64::MAX),
        len: u64::MAX,
    };
    load(&good, past).unwrap_err();
}

#[test]
fn a_detached_header_needs_no_payload() {
    let (new, file) = volume(QUICK);
    let mut bytes = file.to_vec().unwrap();
    bytes.truncate(new.header().payload_offset() as usize);
    bytes[104..108].fill(0);
    let volume = Volume::load(&Memory::from(bytes.clone()), Place::Detached).unwrap();
    assert_eq!(volume.header().payload_offset(), 0);
    volume
        .unlock(&Memory::from(bytes.clone()), b"one", Job::silent())
        .unwrap();
    bytes[slot(7, 40)..slot(7, 44)].copy_from_slice(&u32::MAX.to_be_bytes());
    // Nobody uses that slot yet, and nothing is where it would be.
    load(&bytes, Place::Detached).unwrap();
    bytes[slot(7, 0)..slot(7, 8)].copy_from_slice(&[0x00, 0xac, 0x71, 0xf3, 0, 0, 0, 1]);
    let error = load(&bytes, Place::Detached).unwrap_err();
    assert!(
        error.contains("the material of keyslot 7 of the LUKS header ends at byte 2199023"),
        "{error}"
    );
}

#[test]
fn a_payload_need_not_be_aligned() {
    let (new, file) = volume(QUICK);
    let mut bytes = file.to_vec().unwrap();
    let payload = new.header().payload_offset() as usize;
    bytes.splice(payload..payload, [0; 512]);
    bytes[104..108].copy_from_slice(&(payload as u32 / 512 + 1).to_be_bytes());
    assert!(contents(&Memory::from(bytes), "one") == disk());
}

#[test]
fn giant_iteration_counts_are_refused_at_once() {
    let (_, file) = volume(QUICK);
    for at in [slot(0, 4), 164] {
        let mut bytes = file.to_vec().unwrap();
        bytes[at..at + 4].copy_from_slice(&u32::MAX.to_be_bytes());
        let file = Memory::from(bytes);
        let volume = Volume::load(&file, Place::Standalone).unwrap();
        let error = volume.unlock(&file, b"one", Job::silent()).unwrap_err();
        let says = format!("iterations is 4294967295, must be 1 to {MAX_ITERATIONS}");
        assert!(text(&error).contains(&says), "{}", text(&error));
    }
}

#[test]
fn a_digest_that_is_too_dear_is_refused_before_any_slot_is_tried() {
    let (_, file) = volume(QUICK);
    file.write_at(HostOffset::new(164), &u32::MAX.to_be_bytes())
        .unwrap();
    // Whatever takes iterations notices that nobody waits for them.
    let stopped = Job {
        cancel: &AtomicBool::new(true),
        ..Job::silent()
    };
    let volume = Volume::load(&file, Place::Standalone).unwrap();
    let error = volume.unlock(&file, b"one", stopped).unwrap_err();
    assert!(
        matches!(error.find(), Some(CryptError::Iterations(_))),
        "{error:?}"
    );
}

#[test]
fn a_wrong_passphrase_and_damaged_material_open_nothing() {
    let (_, file) = volume(QUICK);
    let mut bytes = file.to_vec().unwrap();
    let refuse = |file: &dyn Storage, passphrase: &[u8]| {
        let volume = Volume::load(file, Place::Standalone).unwrap();
        let error = volume.unlock(file, passphrase, Job::silent()).unwrap_err();
        assert_eq!(error.find(), Some(&LuksError::Password));
        assert_eq!(error.kind(), ErrorKind::Denied);
    };
    for passphrase in [b"".as_slice(), b"One", b"one ", b"one\n", &[0xff; 4096]] {
        refuse(&file, passphrase);
    }
    bytes[4096 + 63_999] ^= 1;
    refuse(&Memory::from(bytes), b"one");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Whatever is changed: an answer, and one that says what the bytes say.
    #[test]
    fn mutated_headers_are_parsed_or_refused(
        changes in proptest::collection::vec((0_usize..592, any::<u8>()), 0..6),
        words in proptest::collection::vec((0_usize..148, any::<u32>()), 0..2),
        detached in any::<bool>(),
    ) {
        let mut bytes = GOOD.with(<[u8; 592]>::clone);
        for (at, value) in changes {
            bytes[at] = value;
        }
        for (at, value) in words {
            bytes[4 * at..4 * at + 4].copy_from_slice(&value.to_be_bytes());
        }
        let place = if detached { Place::Detached } else { Place::Standalone };
        if let Ok(header) = Header::parse(&bytes, place) {
            prop_assert_eq!(Header::parse(&header.to_bytes(), place).unwrap(), header);
        }
    }
}

thread_local! {
    static GOOD: [u8; 592] = volume(QUICK).0.header().to_bytes();
}
