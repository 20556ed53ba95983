//! Known answers. Where no standard gives one, Python's `cryptography` (OpenSSL) and `hashlib` have.

use std::sync::atomic::AtomicBool;

use diskmill_core::{ErrorKind, Job, Silent};
use proptest::prelude::*;

use super::cipher::{CipherAlg, CipherMode, CipherSpec, IvGen};
use super::kdf::{self, MAX_ITERATIONS, MIN_ITERATIONS, pbkdf2};
use super::{CryptError, HashAlg, SectorCipher, af, legacy};

fn bytes(hex: &str) -> Vec<u8> {
    assert!(hex.len().is_multiple_of(2));
    let pairs = (0..hex.len()).step_by(2);
    pairs
        .map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap())
        .collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn cipher(name: &str, mode: &str, key: &[u8], sector_len: usize) -> SectorCipher {
    let spec = CipherSpec::parse(name, mode, key.len()).unwrap();
    SectorCipher::with_sectors_of(spec, key, sector_len).unwrap()
}

/// The vectors of the ciphers' own specifications, a block each.
#[test]
fn blocks_are_encrypted_as_specified() {
    for (name, key, plain, sealed) in [
        (
            "aes",
            "000102030405060708090a0b0c0d0e0f",
            "00112233445566778899aabbccddeeff",
            "69c4e0d86a7b0430d8cdb78070b4c55a",
        ),
        (
            "aes",
            "000102030405060708090a0b0c0d0e0f1011121314151617",
            "00112233445566778899aabbccddeeff",
            "dda97ca4864cdfe06eaf70a0ec0d7191",
        ),
        (
            "aes",
            "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f",
            "00112233445566778899aabbccddeeff",
            "8ea2b7ca516745bfeafc49904b496089",
        ),
        (
            "serpent",
            "80000000000000000000000000000000",
            "00000000000000000000000000000000",
            "264e5481eff42a4606abda06c0bfda3d",
        ),
        (
            "twofish",
            "00000000000000000000000000000000",
            "00000000000000000000000000000000",
            "9f589f5cf6122c32b6bfec2f2ae8c35a",
        ),
        (
            "twofish",
            "0123456789abcdeffedcba98765432100011223344556677",
            "00000000000000000000000000000000",
            "cfd1d2e5a9be9cdf501f13b892bd2248",
        ),
        (
            "twofish",
            "0123456789abcdeffedcba987654321000112233445566778899aabbccddeeff",
            "00000000000000000000000000000000",
            "37527be0052334b89f0cfccae87cfa20",
        ),
        (
            "cast5",
            "0123456712345678234567893456789a",
            "0123456789abcdef",
            "238b4fe5847e44b2",
        ),
    ] {
        let ecb = cipher(name, "ecb-plain", &bytes(key), 512);
        let (plain, sealed) = (bytes(plain), bytes(sealed));
        let mut sector = plain.repeat(512 / plain.len());
        ecb.encrypt(0, &mut sector).unwrap();
        assert_eq!(
            hex(&sector),
            hex(&sealed.repeat(512 / plain.len())),
            "{name} {key}"
        );
        ecb.decrypt(0, &mut sector).unwrap();
        assert_eq!(sector, plain.repeat(512 / plain.len()), "{name} {key}");
    }
}

/// IEEE 1619-2007, annex B, vectors 4, 5 and 10 to 14: data units of 512 bytes.
#[test]
fn xts_is_that_of_the_standard() {
    let short = "27182818284590452353602874713526\
                 31415926535897932384626433832795";
    let long = "2718281828459045235360287471352662497757247093699959574966967627\
                3141592653589793238462643383279502884197169399375105820974944592";
    for (key, sector, twice, starts, ends) in [
        (
            short,
            0,
            false,
            "27a7479befa1d476489f308cd4cfa6e2a96e4bbe3208ff25287dd3819616e89c",
            "0a282df920147beabe421ee5319d0568",
        ),
        (
            short,
            1,
            true,
            "264d3ca8512194fec312c8c9891f279fefdd608d0c027b60483a3fa811d65ee5",
            "fd2a89ccb45e001a03a867b187f225dd",
        ),
        (
            long,
            0xff,
            false,
            "1c3b3a102f770386e4836c99e370cf9bea00803f5e482357a4ae12d414a3e63b",
            "c4f36ffda9fcea70b9c6e693e148c151",
        ),
        (
            long,
            0xffff,
            false,
            "77a31251618a15e6b92d1d66dffe7b50b50bad552305ba0217a610688eff7e11",
            "a4f9e27b42af8100cb9d59cef9645803",
        ),
        (
            long,
            0xff_ffff,
            false,
            "e387aaa58ba483afa7e8eb469778317ecf4cf573aa9d4eac23f2cdf914e4e200",
            "2263a1eef52dd6888c309f5a7d712826",
        ),
        (
            long,
            0xffff_ffff,
            false,
            "bf53d2dade78e822a4d949a9bc6766b01b06a8ef70d26748c6a7fc36d80ae4c5",
            "4c82f335abb152c4a93411373aaa8220",
        ),
        (
            long,
            0xff_ffff_ffff,
            false,
            "64497e5a831e4a932c09be3e5393376daa599548b816031d224bbf50a818ed23",
            "d609d273ad5b0d59631c531f6a0a57b9",
        ),
    ] {
        let xts = cipher("aes", "xts-plain64", &bytes(key), 512);
        let mut data: Vec<u8> = (0..512).map(|at| at as u8).collect();
        if twice {
            // The plain text of this vector is the cipher text of the one before.
            xts.encrypt(0, &mut data).unwrap();
        }
        xts.encrypt(sector, &mut data).unwrap();
        assert_eq!(hex(&data[..32]), starts, "{sector:#x}");
        assert_eq!(hex(&data[496..]), ends, "{sector:#x}");
    }
}

fn pattern_key(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at * 7 + 1) as u8).collect()
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at % 251) as u8).collect()
}

#[test]
fn modes_and_vectors_are_those_of_openssl() {
    for (mode, key_len, first, sector_len, len, sha256) in [
        (
            "xts-plain64",
            32,
            0x0,
            512,
            512,
            "a12c9c9d65ce65541dfc0ba0196d240f3efde73ca15d433b12dde61cab9fa844",
        ),
        (
            "xts-plain64",
            64,
            0x1_2345_6789,
            512,
            9216,
            "54af4ef5b8a51cdbc7203eecdafa9c82102bfbf1fae7061f599bd4ea43360d6a",
        ),
        (
            "xts-plain",
            64,
            0x1_2345_6789,
            512,
            9216,
            "fb4b0b94e6d5fdd308d3f34a3b5d9423ea0ce35b9c6d57eb7f50bd544748dd9a",
        ),
        (
            "xts-plain64",
            64,
            0x8,
            4096,
            20480,
            "de4439e8344cec7d41ddc56c5c25eb69da6c72da1ad4c523967c734e282293a9",
        ),
        (
            "xts-plain64",
            64,
            0x8,
            1024,
            20480,
            "2a6122d10fd0adc02849eda9fc47e650b4142a27a856623c7f60f34f99d6f36b",
        ),
        (
            "xts-essiv:sha256",
            32,
            0x4d,
            512,
            1536,
            "3794a535fba0ada13f0d2b8a613be97fcffccba78f7ec1eb7a3eaeb01a72122a",
        ),
        (
            "cbc-plain64",
            16,
            0x100_0000_0000,
            512,
            9216,
            "bf3928d3512a766cf442c9689235e6227190df9b8c4badcf720cc744b6870a72",
        ),
        (
            "cbc-plain",
            24,
            0x1_0000_0005,
            512,
            1536,
            "ec5b7f392f46de75c853f94ad5fd44a4ddf2e56d1a745f724905906fd555d443",
        ),
        (
            "cbc-essiv:sha256",
            32,
            0x3,
            512,
            9216,
            "7edce2ab4484f7a1c07676107ebf56c0b46fae2b9c8b8a28a54ae3f2ae3eecea",
        ),
        (
            "cbc-essiv:md5",
            16,
            0x3,
            512,
            1536,
            "22bc44d02b823727190d468956ccf1dd66eea7a9897cf0ea579a7196f44cf6ff",
        ),
        (
            "cbc-plain64",
            32,
            0x10,
            4096,
            20480,
            "e2b2d3e06baebb0c112311447fc0700afc38a502929e7f5174b12e2adedd621e",
        ),
        (
            "ctr-plain64",
            32,
            0xffff_ffff,
            512,
            9216,
            "a972583e47aa0bbde9fae8b113402c37532ec175f0dc96a2f3c7856947b8b335",
        ),
        (
            "ctr-essiv:sha256",
            16,
            0x1,
            512,
            1536,
            "afc57868971c1f4cfa2d95d80eaff3f97baaecaad2bba58003d7ed707ecde1f5",
        ),
    ] {
        let cipher = cipher("aes", mode, &pattern_key(key_len), sector_len);
        let mut data = pattern(len);
        cipher.encrypt(first, &mut data).unwrap();
        assert_eq!(
            hex(&HashAlg::Sha256.digest(&[&data])),
            sha256,
            "{mode} {key_len} {sector_len}"
        );
        cipher.decrypt(first, &mut data).unwrap();
        assert_eq!(data, pattern(len), "{mode} {key_len} {sector_len}");
    }
}

/// RFC 6070 has the first 20 bytes for SHA-1.
#[test]
fn pbkdf2_is_that_of_hashlib() {
    for (hash, key) in [
        (
            "md5",
            "15001f89b9c29ee6998c520d1a0629e893cc3f996a08d27060e4c33305bf0fb262e27c0c9745202f",
        ),
        (
            "sha1",
            "4b007901b765489abead49d926f721d065a429c12e463f6c4cd79401085b03dbc7e8b88f1447f8c3",
        ),
        (
            "sha224",
            "218c453bf90635bd0a21a75d172703ff6108ef603f65bb821aedade1d6961683ba8f67877d2a3f73",
        ),
        (
            "sha256",
            "c5e478d59288c841aa530db6845c4c8d962893a001ce4e11a4963873aa98134af7ad98c1b458ce3f",
        ),
        (
            "sha384",
            "559726be38db125bc85ed7895f6e3cf574c7a01c080c3447db1e8a76764deb3c307b94853fbe424f",
        ),
        (
            "sha512",
            "d197b1b33db0143e018b12f3d1d1479e6cdebdcc97c5c0f87f6902e072f457b5143f30602641b3d5",
        ),
        (
            "ripemd160",
            "99a40d3fe4ee95869791d9faa24864562782762171480b620ca8bed3dafbbcac85d6a7c5b52f2f99",
        ),
        (
            "sm3",
            "b6e8f2074c87432b78f62e5ced980fdff89e86af2f693dab1638e2b3683045dd844438500eead50c",
        ),
    ] {
        let mut out = [0; 40];
        let hash = HashAlg::parse(hash).unwrap();
        pbkdf2(hash, b"password", b"salt", 4096, &mut out, Job::silent()).unwrap();
        assert_eq!(hex(&out), key, "{hash:?}");
    }
}

#[test]
fn iterations_beyond_reason_are_refused_and_others_can_be_stopped() {
    let mut out = [0; 20];
    let mut run = |count, job| pbkdf2(HashAlg::Sha1, b"", b"", count, &mut out, job);
    for count in [0, MAX_ITERATIONS + 1, u32::MAX] {
        let error = run(count, Job::silent()).unwrap_err();
        assert_eq!(error.find(), Some(&CryptError::Iterations(count.into())));
    }
    let cancel = AtomicBool::new(true);
    let job = Job {
        observer: &Silent,
        cancel: &cancel,
    };
    assert_eq!(run(MAX_ITERATIONS, job).unwrap_err().kind(), ErrorKind::Cancelled);
}

/// Eight slots that are just about allowed would take minutes.
#[test]
fn slots_share_what_may_be_spent() {
    let mut budget = kdf::Budget::of_iterations();
    budget.spend(MAX_ITERATIONS.into()).unwrap();
    assert_eq!(
        budget.spend(u64::from(MAX_ITERATIONS) + 1),
        Err(CryptError::Budget)
    );
    budget.spend(MAX_ITERATIONS.into()).unwrap();
    assert_eq!(budget.spend(1), Err(CryptError::Budget));
    assert_eq!(kdf::Budget::of(5).spend(u64::MAX), Err(CryptError::Budget));
}

#[test]
fn iterations_follow_the_time_that_is_wanted() {
    assert_eq!(kdf::iterations(3_000_000, 2000), Ok(6_000_000));
    assert_eq!(kdf::iterations(3_000_000, 0), Ok(MIN_ITERATIONS));
    assert_eq!(kdf::iterations(1, u64::MAX), Err(CryptError::IterTime(u64::MAX)));
    assert_eq!(kdf::iterations(u64::MAX, 1000), Err(CryptError::IterTime(1000)));
    assert!(kdf::rate(HashAlg::Sha256, 64, Job::silent()).unwrap() > 0);
}

/// Against the definition, written in Python.
#[test]
fn stripes_merge_to_the_key() {
    for (hash, len, stripes, key) in [
        (
            "sha1",
            32,
            4000,
            "d8d695a470652a527931f20d9982af7a801578b5d4a40678e91da8f1ddb50985",
        ),
        (
            "sha256",
            64,
            4000,
            "a675e583fe6510afdbf92d87ff6c19fcd03f2df3189427249d886986cff0249e5820a503b3dc4ccfb1a9d0fa53f168253b9eb88059c4dce5c9bfaf4f2dd6e7fc",
        ),
        (
            "sha512",
            24,
            10,
            "f4aed459224cd8ddaaeaa5e7f221ded1e37625960cacfbaf",
        ),
        ("md5", 16, 3, "050152075b6ae1844af2cf25be5300c4"),
        (
            "sha256",
            48,
            1,
            "00010409101924324152657a91aac6e30223466b92bce7144374a7dc144d88c5044588ce155ea9f64596ea3f96ef4aa7",
        ),
    ] {
        let hash = HashAlg::parse(hash).unwrap();
        let material: Vec<u8> = (0..len * stripes).map(|at| (at * at + at / 7) as u8).collect();
        assert_eq!(hex(&af::merge(hash, &material, len)), key, "{hash:?}");
        let split = af::split(hash, &bytes(key), stripes).unwrap();
        assert_eq!(split.len(), len * stripes);
        assert_eq!(hex(&af::merge(hash, &split, len)), key, "{hash:?}");
    }
}

#[test]
fn the_old_encryption_takes_sixteen_bytes_of_the_password() {
    let seal = |password: &[u8]| {
        let mut data = pattern(1024);
        legacy::qcow_aes(password).unwrap().encrypt(5, &mut data).unwrap();
        data
    };
    assert_eq!(seal(b"0123456789abcdef"), seal(b"0123456789abcdefghi"));
    assert_eq!(seal(b"abc"), seal(b"abc\0\0"));
    assert_ne!(seal(b"abc"), seal(b"abd"));
    let key = *b"abc\0\0\0\0\0\0\0\0\0\0\0\0\0";
    let mut data = seal(b"abc");
    cipher("aes", "cbc-plain64", &key, 512)
        .decrypt(5, &mut data)
        .unwrap();
    assert_eq!(data, pattern(1024));
}

#[test]
fn what_does_not_go_together_is_refused() {
    for (name, mode, key_len, says) in [
        ("rot13", "xts-plain64", 64, "cipher 'rot13' is not supported"),
        ("aes", "xts", 64, "unexpected cipher mode string format 'xts'"),
        ("aes", "gcm-plain64", 32, "cipher mode 'gcm' is not supported"),
        ("aes", "xts-benbi", 64, "generator 'benbi' is not supported"),
        ("aes", "cbc-essiv:crc", 32, "hash 'crc' is not supported"),
        ("aes", "cbc-essiv", 32, "needs a hash"),
        (
            "aes",
            "cbc-essiv:sha1",
            32,
            "a key of 20 bytes does not suit the cipher aes",
        ),
        (
            "aes",
            "xts-plain64",
            63,
            "a key of 63 bytes does not suit the cipher aes",
        ),
        (
            "aes",
            "xts-plain64",
            16,
            "a key of 16 bytes does not suit the cipher aes",
        ),
        (
            "aes",
            "cbc-plain64",
            64,
            "a key of 64 bytes does not suit the cipher aes",
        ),
        (
            "aes",
            "cbc-plain64",
            0,
            "a key of 0 bytes does not suit the cipher aes",
        ),
        ("aes", "cbc-plain64", usize::MAX, "does not suit the cipher aes"),
        (
            "cast5",
            "cbc-plain64",
            32,
            "a key of 32 bytes does not suit the cipher cast5",
        ),
        (
            "cast5",
            "xts-plain64",
            32,
            "needs blocks of 16 bytes, which cast5-128 has not",
        ),
    ] {
        let error = CipherSpec::parse(name, mode, key_len).unwrap_err();
        assert!(
            error.to_string().contains(says),
            "{name} {mode} {key_len}: {error}"
        );
    }
    let spec = CipherSpec::parse("aes", "xts-plain64", 64).unwrap();
    assert!(SectorCipher::new(spec, &[0; 32]).is_err());
    assert!(SectorCipher::with_sectors_of(spec, &[0; 64], 513).is_err());
}

#[test]
fn parts_of_sectors_are_refused_and_left_alone() {
    let xts = cipher("aes", "xts-plain64", &pattern_key(64), 512);
    let mut data = pattern(513);
    assert_eq!(xts.encrypt(0, &mut data).unwrap_err().kind(), ErrorKind::Usage);
    assert_eq!(data, pattern(513));
    xts.encrypt(u64::MAX, &mut []).unwrap();
}

#[test]
fn keys_are_not_shown() {
    let xts = cipher("aes", "xts-plain64", &[0xab; 64], 512);
    let shown = format!("{xts:?}");
    assert!(!shown.contains("ab, ") && !shown.contains("171"), "{shown}");
}

fn any_cipher() -> impl Strategy<Value = CipherSpec> {
    (
        0..CipherAlg::ALL.len(),
        0..CipherMode::ALL.len(),
        0..IvGen::ALL.len(),
        0..=HashAlg::ALL.len(),
    )
        .prop_filter_map("goes together", |(alg, mode, ivgen, hash)| {
            let hash = HashAlg::ALL.get(hash).copied();
            CipherSpec::new(
                CipherAlg::ALL[alg],
                CipherMode::ALL[mode],
                IvGen::ALL[ivgen],
                hash,
            )
            .ok()
        })
}

proptest! {
    #![proptest_config(diskmill_testkit::random::config(24))]

    /// Sectors at once, or one by one: the same; and back again.
    #[test]
    fn batches_do_not_show(spec in any_cipher(), first in any::<u64>(), sectors in 1_usize..20, shift in 0_u32..4) {
        let sector_len = 512 << shift;
        let cipher = SectorCipher::with_sectors_of(spec, &pattern_key(spec.key_len()), sector_len).unwrap();
        let plain = pattern(sectors * sector_len);
        let mut whole = plain.clone();
        cipher.encrypt(first, &mut whole).unwrap();
        let mut single = plain.clone();
        for (sector, number) in single.chunks_mut(sector_len).zip(0..) {
            cipher.encrypt(first.wrapping_add(number << shift), sector).unwrap();
        }
        prop_assert!(whole == single);
        prop_assert!(whole != plain);
        cipher.decrypt(first, &mut whole).unwrap();
        prop_assert!(whole == plain);
    }

    /// Our tables against the crate that computes them anew each time.
    #[test]
    fn twofish_is_that_of_the_crate(key in any::<[u8; 32]>(), longer in 0_usize..3, plain in any::<[u8; 16]>()) {
        use ::twofish::cipher::{BlockCipherEncrypt, KeyInit};
        let key = &key[..16 + 8 * longer];
        let mut theirs = plain.into();
        ::twofish::Twofish::new_from_slice(key).unwrap().encrypt_block(&mut theirs);
        let mut sector = plain.repeat(32);
        let ours = cipher("twofish", "ecb-plain", key, 512);
        ours.encrypt(0, &mut sector).unwrap();
        prop_assert!(sector == theirs.repeat(32));
        ours.decrypt(0, &mut sector).unwrap();
        prop_assert!(sector == plain.repeat(32));
    }

    #[test]
    fn the_spelling_of_headers_says_it_all(spec in any_cipher()) {
        let parsed = CipherSpec::parse(spec.alg().family(), &spec.luks_mode(), spec.key_len());
        prop_assert_eq!(parsed, Ok(spec));
    }
}
