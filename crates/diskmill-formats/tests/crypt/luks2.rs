//! LUKS2, made by cryptsetup: it encrypts a file in place, without a device, so that what is in it is known.

use std::sync::Arc;

use diskmill_core::{Error, ErrorKind, GuestOffset, HostOffset, Job, OpenSpec, Secret, Storage};
use diskmill_formats::crypt::HashAlg;
use diskmill_formats::crypt::luks::{LuksError, Place};
use diskmill_formats::crypt::luks2::{Luks2Error, Volume2};
use diskmill_formats::registry;
use diskmill_storage::Memory;
use diskmill_testkit::{Run, Scratch};
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::{SIZE, disk, text};

/// A volume with a [`disk`] in it, behind "one", made by cryptsetup.
fn theirs(options: &str) -> Vec<u8> {
    let dir = Scratch::beneath("/dev/shm");
    let key = dir.file("key", b"one");
    let mut bytes = disk();
    // What cryptsetup takes for its header, twice.
    bytes.resize(SIZE + (2 << 20), 0);
    let image = dir.file("theirs.luks", &bytes);
    Run::new("cryptsetup")
        .args([
            "reencrypt",
            "--encrypt",
            "--type",
            "luks2",
            "-q",
            "--disable-locks",
        ])
        .args([
            "--reduce-device-size",
            "2M",
            "--luks2-metadata-size",
            "16k",
            "--luks2-keyslots-size",
            "512k",
        ])
        .words(options)
        .arg("--key-file")
        .arg(key)
        .arg(&image)
        .ok();
    std::fs::read(image).unwrap()
}

const PBKDF2: &str = "--pbkdf pbkdf2 --pbkdf-force-iterations 1000";

fn load(bytes: &[u8]) -> Result<Volume2, Error> {
    Volume2::load(&Memory::from(bytes), Place::Standalone)
}

/// What is in a volume.
fn contents(bytes: &[u8], passphrase: &str) -> Result<Vec<u8>, Error> {
    let file = Memory::from(bytes);
    let volume = Volume2::load(&file, Place::Standalone)?;
    let cipher = volume.unlock(&file, passphrase.as_bytes(), Job::silent())?;
    let mut data = vec![0; volume.payload_len(file.len()?)? as usize];
    file.read_at(volume.payload_offset(), &mut data)?;
    cipher.decrypt(0, &mut data)?;
    Ok(data)
}

#[test]
fn what_cryptsetup_encrypts_is_read() {
    for options in [
        PBKDF2,
        "--pbkdf argon2id --pbkdf-force-iterations 4 --pbkdf-memory 256 --pbkdf-parallel 2 --sector-size 4096",
        "--pbkdf argon2i --pbkdf-force-iterations 5 --pbkdf-memory 128 --pbkdf-parallel 1 --sector-size 1024 \
         --cipher aes-cbc-essiv:sha256 --key-size 256 --hash sha512",
        "--pbkdf pbkdf2 --pbkdf-force-iterations 1000 --hash sha1 --cipher aes-cbc-plain64 --key-size 192 \
         --sector-size 2048",
    ] {
        let bytes = theirs(options);
        let found = contents(&bytes, "one").unwrap();
        assert!(found[..SIZE] == disk(), "{options}");
        let wrong = contents(&bytes, "two").unwrap_err();
        assert_eq!(wrong.find(), Some(&LuksError::Password), "{options}");
    }
}

/// Through the driver, in pieces that end in the middle of its sectors.
#[test]
fn the_luks_driver_reads_it_and_writes_nothing() {
    let bytes = theirs("--pbkdf pbkdf2 --pbkdf-force-iterations 1000 --sector-size 4096");
    let file: Arc<Memory> = Arc::new(Memory::from(bytes));
    let driver = registry::by_name("luks").unwrap();
    let mut how = OpenSpec::default();
    how.secrets.set_passphrase(Secret::new(b"one".to_vec()));
    let parsed = driver.parse(file.clone(), &how).unwrap();
    assert!(parsed.facts().encrypted);
    let layer = parsed
        .attach(vec![(diskmill_core::Role::Main, file.clone())], &how)
        .unwrap();
    let disk = disk();
    for (at, len) in [(0, SIZE), (512, 512), (4095, 2), (3000, 9000), (SIZE - 1, 1)] {
        let mut found = vec![0; len];
        layer.read_at(GuestOffset::new(at as u64), &mut found).unwrap();
        assert!(found == disk[at..at + len], "{at} {len}");
    }
    let parsed = driver.parse(file.clone(), &how).unwrap();
    let error = parsed
        .attach_mut(vec![(diskmill_core::Role::Main, file)], &how)
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
}

/// The JSON of the first copy.
fn json_of(bytes: &[u8]) -> Value {
    let area = &bytes[4096..16384];
    let end = area.iter().position(|byte| *byte == 0).unwrap();
    serde_json::from_slice(&area[..end]).unwrap()
}

/// The same volume with other JSON in both copies, which have the right checksums.
fn with_json(bytes: &[u8], json: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for at in [0, 16384] {
        let copy = &mut bytes[at..at + 16384];
        copy[4096..].fill(0);
        copy[4096..4096 + json.len()].copy_from_slice(json);
        seal(copy);
    }
    bytes
}

/// Gives a copy the right checksum.
fn seal(copy: &mut [u8]) {
    copy[448..512].fill(0);
    let checksum = HashAlg::Sha256.digest(&[copy]);
    copy[448..480].copy_from_slice(&checksum);
}

#[test]
fn either_copy_is_enough_and_the_newer_counts() {
    let good = theirs(PBKDF2);
    for at in [100, 5000, 16384 + 100, 16384 + 5000] {
        let mut bytes = good.clone();
        bytes[at] ^= 1;
        assert!(contents(&bytes, "one").unwrap()[..SIZE] == disk(), "{at}");
        bytes[(at + 16384) % 32768] ^= 1;
        let error = load(&bytes).unwrap_err();
        assert_eq!(error.find(), Some(&Luks2Error::NoCopy), "{at}");
    }
    let mut bytes = good;
    bytes[16384 + 16] = 1;
    bytes[16384 + 4096..16384 + 4106].copy_from_slice(b"{\"new\":1}\0");
    seal(&mut bytes[16384..32768]);
    assert!(text(&load(&bytes).unwrap_err()).contains("config is missing"));
}

#[test]
fn metadata_that_breaks_a_rule_is_refused() {
    let good = theirs(PBKDF2);
    let json = json_of(&good);
    let many: serde_json::Map<String, Value> = (0..33).map(|slot| (slot.to_string(), json!({}))).collect();
    let cases: Vec<(&str, Value, &str)> = vec![
        ("/config", json!({}), ""),
        (
            "/config",
            json!([]),
            "config of the LUKS2 header is something else, must be an object",
        ),
        (
            "/config/requirements",
            json!({"mandatory": ["online-reencrypt-v2"]}),
            "the requirement 'online-reencrypt-v2'",
        ),
        ("/segments", json!({}), "0 segments is not supported"),
        ("/segments/1", json!({}), "2 segments is not supported"),
        ("/segments/0/type", json!("linear"), "a segment of type 'linear'"),
        (
            "/segments/0/integrity",
            json!({"type": "hmac(sha256)"}),
            "integrity protection",
        ),
        (
            "/segments/0/sector_size",
            json!(513),
            "segments.0.sector_size of the LUKS2 header is 513, must be 512,",
        ),
        (
            "/segments/0/sector_size",
            json!(-512),
            "must be a number of at least 0",
        ),
        (
            "/segments/0/sector_size",
            json!("512"),
            "must be a number of at least 0",
        ),
        (
            "/segments/0/offset",
            json!("0"),
            "the offset of the segment of the LUKS2 header is 0, must be at least 32768",
        ),
        (
            "/segments/0/offset",
            json!("1000"),
            "segments.0.offset of the LUKS2 header is 1000, must be a multiple of 512",
        ),
        (
            "/segments/0/offset",
            json!("1099511627776"),
            "the segment of the LUKS2 volume ends at byte 1099511627776",
        ),
        (
            "/segments/0/offset",
            json!("18446744073709551104"),
            "must be a multiple of 512 below 2^63",
        ),
        (
            "/segments/0/offset",
            json!("18446744073709551616"),
            "must be a number below 2^64",
        ),
        ("/segments/0/offset", json!("+512"), "must be a number below 2^64"),
        ("/segments/0/size", json!("1024"), ""),
        (
            "/segments/0/size",
            json!("1025"),
            "must be a whole number of sectors",
        ),
        (
            "/segments/0/size",
            json!("4294967296"),
            "the segment of the LUKS2 volume ends at byte 4296015872",
        ),
        (
            "/segments/0/iv_tweak",
            json!(0),
            "segments.0.iv_tweak of the LUKS2 header is something else",
        ),
        (
            "/segments/0/encryption",
            json!("aes"),
            "unexpected cipher mode string format ''",
        ),
        (
            "/segments/0/encryption",
            json!("capi:adiantum(xchacha12,aes)-plain64"),
            "unexpected cipher mode string format 'plain64'",
        ),
        (
            "/segments/0/encryption",
            json!("aes-cbc-plain64"),
            "a key of 64 bytes does not suit",
        ),
        (
            "/digests/0/segments",
            json!([]),
            "a key slot for the segment is missing",
        ),
        ("/digests/0/keyslots", json!(["7"]), "keyslots.7 is missing"),
        (
            "/digests/0/keyslots",
            json!(vec!["0"; 33]),
            "33 names, must be at most 32 names",
        ),
        ("/digests/0/type", json!("crc"), "a digest of type 'crc'"),
        ("/digests/0/hash", json!("crc"), "hash 'crc' is not supported"),
        (
            "/digests/0/digest",
            json!("AAAAAAAAAAAAAAAA"),
            "12 bytes, must be 20 to 64 bytes",
        ),
        ("/digests/0/digest", json!("!"), "must be base64"),
        (
            "/digests/0/salt",
            json!("A".repeat(1028)),
            "must be base64 of 8 bytes or more, and 1024 signs at most",
        ),
        (
            "/digests",
            Value::Object(many.clone()),
            "digests of the LUKS2 header is 33 objects, must be at most 32",
        ),
        (
            "/keyslots",
            Value::Object(many),
            "keyslots of the LUKS2 header is 33 objects, must be at most 32",
        ),
        ("/keyslots/0/key_size", json!(0), "a key of 0 bytes does not suit"),
        ("/keyslots/0/key_size", json!(u64::MAX), "does not suit"),
        (
            "/keyslots/0/af/stripes",
            json!(1),
            "must be luks1 with 4000 stripes",
        ),
        ("/keyslots/0/af/hash", json!("crc"), "hash 'crc' is not supported"),
        (
            "/keyslots/0/area/size",
            json!("255999"),
            "keyslots.0.area.size of the LUKS2 header is 255999, must be at least 256000",
        ),
        (
            "/keyslots/0/area/offset",
            json!("9223372036854775808"),
            "must be below 2^63",
        ),
        (
            "/keyslots/0/area/key_size",
            json!(65),
            "a key of 65 bytes does not suit",
        ),
        ("/keyslots/0/area/type", json!("journal"), "must be raw"),
        (
            "/keyslots/0/kdf/type",
            json!("scrypt"),
            "the key derivation 'scrypt'",
        ),
    ];
    for (path, value, says) in cases {
        let mut json = json.clone();
        let (parent, name) = path.rsplit_once('/').unwrap();
        json.pointer_mut(parent)
            .unwrap()
            .as_object_mut()
            .unwrap()
            .insert(name.to_owned(), value);
        let bytes = with_json(&good, &serde_json::to_vec(&json).unwrap());
        match load(&bytes) {
            Ok(_) => assert!(says.is_empty(), "{path} was taken, not refused with {says:?}"),
            Err(error) => {
                assert!(
                    !says.is_empty() && text(&error).contains(says),
                    "{path}: {}",
                    text(&error)
                );
            }
        }
    }
    for (bad, says) in [
        (b"".to_vec(), "malformed"),
        (b"{".to_vec(), "malformed"),
        (b"{}{}".to_vec(), "malformed"),
        (b"[]".to_vec(), "must be an object"),
        (b"\xff\xfe".to_vec(), "malformed"),
        (vec![b'['; 12288], "recursion limit"),
    ] {
        let error = load(&with_json(&good, &bad)).unwrap_err();
        assert!(text(&error).contains(says), "{}", text(&error));
    }
}

#[test]
fn what_costs_too_much_is_refused_at_once() {
    let good = theirs(PBKDF2);
    let json = json_of(&good);
    let argon = |time: u64, memory: u64, cpus: u64| json!({"type": "argon2id", "time": time, "memory": memory, "cpus": cpus, "salt": "AAAAAAAAAAAAAAAAAAAAAA=="});
    let salt = "AAAAAAAAAAAAAAAAAAAAAA==";
    for (kdf, says) in [
        (
            argon(4, (1 << 20) + 1, 4),
            "memory of key slot 0 of the LUKS2 header is 1048577, must be 32 to 1048576",
        ),
        (argon(4, u64::MAX, 4), "memory of key slot 0"),
        (
            argon(4, 0, 1),
            "memory of key slot 0 of the LUKS2 header is 0, must be 8 to 1048576",
        ),
        (
            argon(4, 31, 4),
            "memory of key slot 0 of the LUKS2 header is 31, must be 32",
        ),
        (
            argon(65, 1 << 20, 4),
            "time of key slot 0 of the LUKS2 header is 65, must be 1 to 64",
        ),
        (
            argon(0, 1 << 10, 4),
            "time of key slot 0 of the LUKS2 header is 0",
        ),
        (argon(u64::MAX, 32, 4), "time of key slot 0"),
        (
            argon(4, 1 << 20, 65),
            "cpus of key slot 0 of the LUKS2 header is 65, must be 1 to 64",
        ),
        (argon(4, 1 << 20, u64::MAX), "cpus of key slot 0"),
        (argon(4, 1 << 20, 0), "cpus of key slot 0"),
        (
            json!({"type": "pbkdf2", "hash": "sha256", "iterations": 0, "salt": salt}),
            "iterations of key slot 0",
        ),
        (
            json!({"type": "pbkdf2", "hash": "sha256", "iterations": 100_000_001, "salt": salt}),
            "iterations of key slot 0 of the LUKS2 header is 100000001, must be 1 to 100000000",
        ),
    ] {
        let mut json = json.clone();
        json["keyslots"]["0"]["kdf"] = kdf;
        let bytes = with_json(&good, &serde_json::to_vec(&json).unwrap());
        let error = contents(&bytes, "one").unwrap_err();
        assert!(text(&error).contains(says), "{says}: {}", text(&error));
    }
    // A digest as dear as that is noticed when the first slot is tried.
    let mut json = json;
    json["digests"]["0"]["iterations"] = json!(u64::MAX);
    let bytes = with_json(&good, &serde_json::to_vec(&json).unwrap());
    assert!(text(&contents(&bytes, "one").unwrap_err()).contains("iterations"));
}

#[test]
fn a_file_that_is_cut_short_is_refused() {
    let good = theirs(PBKDF2);
    for (len, says) in [
        (0, "checksums do not match"),
        (16383, "checksums do not match"),
        (
            100_000,
            "the segment of the LUKS2 volume ends at byte 1048576, but the file has only 100000",
        ),
    ] {
        let error = load(&good[..len]).unwrap_err();
        assert!(text(&error).contains(says), "{len}: {}", text(&error));
    }
    // One copy only, and no payload: enough for a header of its own, but for its key material.
    let header = Memory::from(&good[..100_000]);
    let volume = Volume2::load(&header, Place::Detached).unwrap();
    let error = volume.unlock(&header, b"one", Job::silent()).unwrap_err();
    assert!(
        text(&error).contains("the material of key slot 0 of the LUKS2 volume ends at byte 288768"),
        "{error:?}"
    );
    let header = Memory::from(&good[..1 << 20]);
    Volume2::load(&header, Place::Detached)
        .unwrap()
        .unlock(&header, b"one", Job::silent())
        .unwrap();
    assert_eq!(volume.payload_offset(), HostOffset::new(1 << 20));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// Whatever is changed in the metadata: an answer.
    #[test]
    fn mutated_metadata_is_parsed_or_refused(
        changes in proptest::collection::vec((0_usize..900, any::<u8>()), 1..4),
        digits in any::<bool>(),
    ) {
        let good = GOOD.with(Vec::clone);
        let mut json = serde_json::to_vec(&json_of(&good)).unwrap();
        for (at, value) in changes {
            let at = at % json.len();
            // Often still JSON.
            json[at] = if digits && json[at].is_ascii_digit() { b'0' + value % 10 } else { value };
        }
        if let Ok(volume) = load(&with_json(&good, &json)) {
            volume.describe();
        }
    }
}

thread_local! {
    static GOOD: Vec<u8> = theirs(PBKDF2)[..(1 << 20) + SIZE].to_vec();
}
