//! LUKS1 both ways with qemu-img.

use diskmill_testkit::{Scratch, oracle};

use crate::{SIZE, contents, disk, load, volume};

/// What qemu-img can make and read: ciphers, modes, generators and hashes, each with each other kind at least once.
const CHOICES: [&str; 23] = [
    "cipher-alg=aes-256",
    "cipher-alg=aes-128",
    "cipher-alg=aes-192,hash-alg=sha1",
    "cipher-alg=serpent-128,hash-alg=sha224",
    "cipher-alg=serpent-192,hash-alg=sha384",
    "cipher-alg=serpent-256,hash-alg=sha512",
    "cipher-alg=twofish-128,ivgen-alg=plain",
    "cipher-alg=twofish-192,ivgen-alg=essiv,ivgen-hash-alg=sha256",
    "cipher-alg=twofish-256,hash-alg=ripemd160",
    "cipher-mode=cbc,hash-alg=md5",
    "cipher-mode=cbc,ivgen-alg=plain",
    "cipher-mode=cbc,ivgen-alg=essiv",
    "cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=md5",
    "cipher-alg=aes-128,cipher-mode=cbc,ivgen-alg=essiv",
    "cipher-alg=serpent-256,cipher-mode=cbc,ivgen-alg=essiv",
    "cipher-alg=twofish-128,cipher-mode=cbc,ivgen-hash-alg=sha512",
    "cipher-mode=ctr",
    "cipher-alg=serpent-128,cipher-mode=ctr,ivgen-alg=essiv",
    "cipher-alg=cast5-128,cipher-mode=cbc",
    "cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=sm3,hash-alg=sm3",
    "cipher-alg=cast5-128,cipher-mode=ctr,ivgen-alg=essiv,ivgen-hash-alg=md5",
    "cipher-alg=cast5-128,cipher-mode=ecb",
    "cipher-mode=ecb,ivgen-alg=plain",
];

/// One header only, since making one takes qemu-img many seconds.
#[test]
fn what_qemu_encrypts_is_read() {
    let dir = Scratch::beneath("/dev/shm");
    let raw = dir.file("disk.raw", &disk());
    let image = dir.join("theirs.luks");
    oracle::convert(
        [
            "--object",
            "secret,id=one,data=one",
            "-o",
            "key-secret=one,iter-time=1,cipher-alg=serpent-128,cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=md5,\
             hash-alg=ripemd160",
        ],
        &raw,
        "raw",
        &image,
        "luks",
    );
    assert!(contents(&load(&image), "one") == disk());
}

#[test]
fn qemu_reads_what_is_encrypted_here_and_writes_what_is_read() {
    let dir = Scratch::beneath("/dev/shm");
    let raw = dir.file("disk.raw", &disk());
    for options in CHOICES {
        let (_, file) = volume(options);
        let image = dir.file("ours.luks", &file.to_vec().unwrap());
        let theirs = format!("driver=luks,key-secret=one,file.filename={}", image.display());
        let plain = format!("driver=raw,file.filename={}", raw.display());
        oracle::qemu_img()
            .args(["compare", "--object", "secret,id=one,data=one", "--image-opts"])
            .args([&theirs, &plain])
            .ok();
        oracle::qemu_io()
            .args(["--object", "secret,id=one,data=one", "--image-opts", &theirs])
            .args(["-c", "write -P 0x5a 3k 9k"])
            .ok();
        let mut expected = disk();
        expected[3 << 10..12 << 10].fill(0x5a);
        assert!(contents(&load(&image), "one") == expected, "{options}");
    }
}

/// qemu-img 10 stops with a failed assertion over these.
#[test]
fn keys_of_24_bytes_have_material_that_is_no_whole_number_of_sectors() {
    for options in [
        "cipher-alg=aes-192,cipher-mode=cbc",
        "cipher-alg=serpent-192,cipher-mode=ctr,ivgen-hash-alg=sha1",
        "cipher-alg=twofish-192,cipher-mode=ecb",
    ] {
        let (_, file) = volume(options);
        assert!(contents(&file, "one") == disk(), "{options}");
        assert_eq!(file.to_vec().unwrap().len(), SIZE + (8 * 192 + 8) * 512);
    }
}
