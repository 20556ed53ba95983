//! LUKS: what we encrypt read by QEMU and cryptsetup, what they encrypt read by us, and key slots changed by all three.

use diskmill_testkit::scratch::{self, patch};
use diskmill_testkit::sparse_random::SparseRandom;
use diskmill_testkit::{Finished, Run, Scratch, hash, oracle};

use crate::disk::Loop;
use crate::tools::{native, ours, refused, same, same_json, theirs};

/// A bit over 1 MiB.
const SIZE: u64 = (1 << 20) + 4096 + 512;

/// The secrets that commands may name: each is what it is called.
const SECRETS: &str =
    "--object secret,id=one,data=one --object secret,id=two,data=two --object secret,id=bad,data=bad";

/// Opening takes hardly any time.
const QUICK: &str = "key-secret=one,iter-time=1";

/// A folder with a raw disk in it and files with passphrases.
fn folder() -> (Scratch, String) {
    let scratch = Scratch::new();
    SparseRandom::new(7, SIZE).write_raw(scratch.join("disk.raw"));
    for passphrase in ["one", "two"] {
        scratch.file(passphrase, passphrase.as_bytes());
    }
    let digest = hash::sha256_file(scratch.join("disk.raw"));
    (scratch, digest)
}

/// `name` opened with the secret `id`.
fn image(name: &str, id: &str) -> String {
    format!("driver=luks,file.filename={name},key-secret={id}")
}

/// Demands that an image opened with the secret `id` reads as something of this digest, to us and to QEMU.
fn assert_reads(scratch: &Scratch, name: &str, id: &str, digest: &str) {
    let image = image(name, id);
    let line = format!("convert {SECRETS} --image-opts -O raw {image} back.raw");
    for run in [ours(scratch), theirs(scratch)] {
        run.words(&line).ok();
        assert_eq!(hash::sha256_file(scratch.join("back.raw")), digest, "{name}");
    }
}

/// `cryptsetup`, with the passphrase in the file `key`.
fn cryptsetup(scratch: &Scratch, words: &str, key: &str) -> Finished {
    Run::new("cryptsetup")
        .dir(scratch.path())
        .args(["-q", "--key-file", key])
        .words(words)
        .finish()
}

/// Which of the passphrases "one" and "two" open an image, says cryptsetup.
fn open_with(scratch: &Scratch, name: &str) -> Vec<&'static str> {
    let opens = |key: &&str| {
        let done = cryptsetup(
            scratch,
            &format!("open --test-passphrase --type luks1 {name}"),
            key,
        );
        match done.code {
            Some(0) => true,
            // No key available with this passphrase.
            Some(2) => false,
            _ => panic!("{done}"),
        }
    };
    ["one", "two"].into_iter().filter(opens).collect()
}

fn qemu_io(scratch: &Scratch, name: &str, commands: &[&str]) {
    let mut run = oracle::qemu_io().dir(scratch.path()).words(SECRETS);
    for command in commands {
        run = run.args(["-c", command]);
    }
    run.args(["--image-opts", &image(name, "one")]).ok();
}

/// `judged` says whether cryptsetup can open it everywhere: it leaves rarer ciphers to the kernel, which may not have
/// them.
fn cell(options: &str, judged: bool) {
    let (scratch, digest) = folder();
    let convert =
        |target: &str| format!("convert {SECRETS} -f raw -O luks -o {QUICK},{options} disk.raw {target}");
    ours(&scratch).words(&convert("ours.luks")).ok();
    theirs(&scratch).words(&convert("theirs.luks")).ok();
    let place = |name: &str| scratch.join(name);
    assert_eq!(
        scratch::len(place("ours.luks")),
        scratch::len(place("theirs.luks"))
    );
    for name in ["ours.luks", "theirs.luks"] {
        assert_reads(&scratch, name, "one", &digest);
        if judged {
            assert_eq!(open_with(&scratch, name), ["one"]);
        }
        same(&scratch, &format!("info {name}"));
        same_json(&scratch, &format!("info --output=json {name}"));
    }
    qemu_io(
        &scratch,
        "ours.luks",
        &["write -P 9 3k 70k", "write -z 200k 64k", "write -P 5 511k 1"],
    );
    let line = format!(
        "convert {SECRETS} --image-opts -O raw {} changed.raw",
        image("ours.luks", "one")
    );
    theirs(&scratch).words(&line).ok();
    let changed = hash::sha256_file(scratch.join("changed.raw"));
    assert_reads(&scratch, "ours.luks", "one", &changed);
    // Over what they made, all of it, zeros too.
    let line = format!(
        "convert {SECRETS} -n -f raw --target-image-opts changed.raw {}",
        image("theirs.luks", "one")
    );
    ours(&scratch).words(&line).ok();
    assert_reads(&scratch, "theirs.luks", "one", &changed);
}

#[test]
fn luks__defaults__both_ways() {
    cell("preallocation=full", true);
}

#[test]
fn luks__aes_cbc_essiv_sha1__both_ways() {
    cell(
        "cipher-alg=aes-128,cipher-mode=cbc,ivgen-alg=essiv,hash-alg=sha1",
        true,
    );
}

#[test]
fn luks__serpent_ctr_plain_sha512__both_ways() {
    cell(
        "cipher-alg=serpent-256,cipher-mode=ctr,ivgen-alg=plain,hash-alg=sha512,preallocation=falloc",
        false,
    );
}

#[test]
fn luks__cryptsetup__format_and_keys() {
    let (scratch, digest) = folder();
    scratch.file("cs.luks", &[]);
    let file = std::fs::File::options()
        .write(true)
        .open(scratch.join("cs.luks"))
        .unwrap();
    file.set_len((2 << 20) + SIZE).unwrap();
    let format = "luksFormat --type luks1 --pbkdf-force-iterations 1000 cs.luks";
    assert_eq!(cryptsetup(&scratch, format, "one").code, Some(0));
    // Its payload begins at a whole MiB, behind more room than the slots need.
    let info = same_json(&scratch, "info --output=json cs.luks");
    assert_eq!(info["format-specific"]["data"]["payload-offset"], 2 << 20);
    let line = format!(
        "convert {SECRETS} -n -f raw --target-image-opts disk.raw {}",
        image("cs.luks", "one")
    );
    ours(&scratch).words(&line).ok();
    assert_reads(&scratch, "cs.luks", "one", &digest);

    let line = format!("convert {SECRETS} -f raw -O luks -o {QUICK} disk.raw ours.luks");
    ours(&scratch).words(&line).ok();
    let add = "luksAddKey --pbkdf-force-iterations 1000 --key-slot 5 ours.luks two";
    assert_eq!(cryptsetup(&scratch, add, "one").code, Some(0));
    assert_reads(&scratch, "ours.luks", "two", &digest);
    let dump = cryptsetup(&scratch, "luksDump ours.luks", "one");
    assert!(dump.out().contains("Payload offset:\t4040"), "{dump}");
    assert!(dump.out().contains("Key Slot 5: ENABLED"), "{dump}");
    let kill = "luksKillSlot ours.luks 0";
    assert_eq!(cryptsetup(&scratch, kill, "two").code, Some(0));
    assert_reads(&scratch, "ours.luks", "two", &digest);
    let wrong = format!("map {SECRETS} --image-opts {}", image("ours.luks", "one"));
    same(&scratch, &wrong);
}

#[test]
fn luks__key_slots__as_theirs() {
    let (scratch, _) = folder();
    let line = format!("convert {SECRETS} -f raw -O luks -o {QUICK} disk.raw image");
    ours(&scratch).words(&line).ok();
    let slots = |info: &serde_json::Value| -> Vec<bool> {
        let slots = info["format-specific"]["data"]["slots"]
            .as_array()
            .expect("slots");
        slots
            .iter()
            .map(|slot| slot["active"].as_bool().expect("a state"))
            .collect()
    };
    for (id, wish, opened) in [
        (
            "one",
            "state=active,new-secret=two,iter-time=1,keyslot=3",
            Some(&["one", "two"][..]),
        ),
        ("one", "state=active,new-secret=two,iter-time=1,keyslot=3", None),
        ("one", "state=active,new-secret=two,iter-time=1,keyslot=8", None),
        ("one", "state=active", None),
        ("one", "state=inactive", None),
        ("one", "state=inactive,old-secret=bad", None),
        ("one", "state=inactive,keyslot=5", None),
        ("one", "state=inactive,keyslot=3,old-secret=one", None),
        ("one", "state=inactive,keyslot=0,iter-time=10", None),
        ("one", "new-secret=two", None),
        ("one", "state=gone", None),
        ("one", "cipher-alg=aes-128", None),
        ("bad", "state=inactive,keyslot=0", None),
        ("two", "state=inactive,old-secret=one", Some(&["two"])),
        ("two", "state=inactive,old-secret=two", None),
        ("two", "state=inactive,keyslot=3", None),
        (
            "two",
            "state=active,new-secret=one,iter-time=1",
            Some(&["one", "two"]),
        ),
        ("one", "state=inactive,keyslot=0", Some(&["two"])),
        ("two", "state=inactive,keyslot=3", None),
    ] {
        std::fs::copy(scratch.join("image"), scratch.join("image.theirs")).unwrap();
        let line = |name: &str| format!("amend {SECRETS} -q -o {wish} --image-opts {}", image(name, id));
        let our = ours(&scratch).words(&line("image")).finish();
        let their = theirs(&scratch).words(&line("image.theirs")).finish();
        assert_eq!(
            our.code, their.code,
            "{wish}\n--- ours\n{our}\n--- qemu-img's\n{their}"
        );
        assert_eq!(our.code == Some(0), opened.is_some(), "{wish}\n{our}");
        let [our, their] =
            ["image", "image.theirs"].map(|name| oracle::info(scratch.join(name), "luks", false));
        assert_eq!(slots(&our), slots(&their), "{wish}");
        if let Some(opened) = opened {
            assert_eq!(open_with(&scratch, "image"), opened, "{wish}");
        }
    }
    let line = format!(
        "amend {SECRETS} --force -o state=inactive,keyslot=3 --image-opts {}",
        image("image", "two")
    );
    let before = scratch::peek(scratch.join("image"), 2_068_480, 4096);
    ours(&scratch).words(&line).ok();
    let info = oracle::info(scratch.join("image"), "luks", false);
    assert_eq!(slots(&info), [false; 8]);
    assert_eq!(
        scratch::peek(scratch.join("image"), 2_068_480, 4096),
        before,
        "data stays"
    );
    assert_eq!(native(&scratch).words("check image").finish().code, Some(2));
}

#[test]
fn luks__commands__as_theirs() {
    let (scratch, _) = folder();
    let line = format!("create {SECRETS} -f luks -o {QUICK} image {SIZE}");
    let our = ours(&scratch).words(&line).ok();
    assert_eq!(our.out(), theirs(&scratch).words(&line).ok().out());
    let opts = format!("{SECRETS} --image-opts {}", image("image", "one"));
    for words in [
        format!("map {opts}"),
        format!("map --output=json {opts}"),
        "map image".to_owned(),
        format!("check {opts}"),
        format!("check -r all {opts}"),
        "check image".to_owned(),
        format!("measure {SECRETS} -O luks -o key-secret=one --size 4000000"),
        format!("measure {SECRETS} -O luks -o key-secret=one,cipher-mode=cbc disk.raw"),
        format!("measure -O raw {opts}"),
        format!("measure -O qcow2 --output=json {opts}"),
        format!("resize {opts} 1000000"),
        format!("resize --preallocation=metadata {opts} 4M"),
        format!("commit {opts}"),
        "convert -f luks -O raw image back.raw".to_owned(),
        "create -f luks new.luks 1M".to_owned(),
        "create -f luks -o key-secret=none new.luks 1M".to_owned(),
        format!("create {SECRETS} -f luks -o key-secret=one,cipher-alg=foo new.luks 1M"),
        format!("create {SECRETS} -f luks -o key-secret=one -b image -F luks new.luks"),
        format!("convert {SECRETS} -c -f raw -O luks -o {QUICK} disk.raw new.luks"),
        format!("map {SECRETS} --image-opts {}", image("image", "bad")),
    ] {
        same(&scratch, &words);
    }
    for words in [
        format!("rebase -b '' {opts}"),
        format!("snapshot -c one {opts}"),
        format!(
            "create {SECRETS} -f luks -o key-secret=one,cipher-mode=xts,cipher-alg=cast5-128 new.luks 1M"
        ),
        format!(
            "convert {SECRETS} --image-opts -O raw {} back.raw",
            image("image", "bad")
        ),
        format!("convert {SECRETS} -n -f raw -O luks disk.raw image"),
    ] {
        refused(&scratch, &words);
    }
    for (words, len) in [
        ("resize OPTS 4M", 4 << 20),
        ("resize --shrink OPTS 1M", 1 << 20),
        ("resize --preallocation=falloc OPTS 2M", 2 << 20),
        ("resize OPTS 2100001", 2_100_001),
    ] {
        ours(&scratch).words(&words.replace("OPTS", &opts)).ok();
        assert_eq!(scratch::len(scratch.join("image")), 2_068_480 + len, "{words}");
        same(&scratch, "info image");
    }
}

/// QEMU leaves what the base grows by as the cipher makes it of zeros.
#[test]
fn luks__commit_of_a_larger_overlay__the_base_reads_the_same() {
    let (scratch, _) = folder();
    let over = "driver=qcow2,file.filename=over,backing.key-secret=one";
    for words in [
        format!("convert {SECRETS} -f raw -O luks -o {QUICK} disk.raw base"),
        "create -q -f qcow2 -u -b base -F luks over 3M".to_owned(),
    ] {
        ours(&scratch).words(&words).ok();
    }
    oracle::qemu_io()
        .dir(scratch.path())
        .words(SECRETS)
        .args(["-c", "write -P 5 2M 64k", "--image-opts", over])
        .ok();
    let convert = format!("convert {SECRETS} --image-opts -O raw {over} before.raw");
    theirs(&scratch).words(&convert).ok();
    let commit = format!("commit -q {SECRETS} --image-opts {over}");
    ours(&scratch).words(&commit).ok();
    let digest = hash::sha256_file(scratch.join("before.raw"));
    assert_reads(&scratch, "base", "one", &digest);
}

#[test]
fn luks__header_of_its_own__both_ways() {
    let (scratch, digest) = folder();
    let line = format!("convert {SECRETS} -f raw -O luks -o {QUICK} disk.raw whole");
    ours(&scratch).words(&line).ok();
    let whole = std::fs::read(scratch.join("whole")).unwrap();
    let (header, data) = whole.split_at(2_068_480);
    patch(scratch.file("header", header), 104, &[0; 4]);
    scratch.file("data", data);
    let parts = "driver=luks,file.filename=data,header.driver=file,header.filename=header";
    same_json(&scratch, &format!("info --output=json --image-opts {parts}"));
    same(&scratch, "info header");
    let opts = format!("--image-opts {parts},key-secret=one");
    let read = |run: Run| {
        run.words(&format!("convert {SECRETS} {opts} -O raw back.raw"))
            .ok();
        hash::sha256_file(scratch.join("back.raw"))
    };
    assert_eq!(read(ours(&scratch)), digest);
    let add = format!("amend {SECRETS} -o state=active,new-secret=two,iter-time=1 {opts}");
    ours(&scratch).words(&add).ok();
    ours(&scratch).words(&format!("resize {SECRETS} {opts} 2M")).ok();
    ours(&scratch)
        .words(&format!("resize {SECRETS} --shrink {opts} {SIZE}"))
        .ok();
    assert_eq!(scratch::len(scratch.join("data")), SIZE);
    assert_eq!(scratch::len(scratch.join("header")), 2_068_480);
    assert_eq!(read(theirs(&scratch)), digest);
    let opens = "open --test-passphrase --type luks1 --header header data";
    assert_eq!(cryptsetup(&scratch, opens, "two").code, Some(0));
}

#[test]
fn luks__damaged_headers__refused_alike() {
    let (scratch, _) = folder();
    let line = format!("convert {SECRETS} -f raw -O luks -o {QUICK} disk.raw good");
    ours(&scratch).words(&line).ok();
    let good = std::fs::read(scratch.join("good")).unwrap();
    let open = format!("map {SECRETS} --image-opts {}", image("bad", "one"));
    for (at, bytes) in [
        (7, &[2][..]),
        (8, b"rot13\0"),
        (40, b"xts_plain64\0"),
        (40, b"xts-random\0"),
        (40, b"cbc-essiv\0"),
        (72, b"sha3\0"),
        (104, &[0; 4]),
        (104, &[0, 0, 0, 100]),
        (104, &[0xff; 4]),
        (108, &[0; 4]),
        (108, &[0, 0, 0, 63]),
        (112, &[0x55; 20]),
        (164, &[0; 4]),
        (208, &[1; 4]),
        (208, &[0, 0, 0xde, 0xad]),
        (212, &[0; 4]),
        (216, &[0x55; 32]),
        (248, &[0, 0, 0, 7]),
        (252, &[0, 0, 0, 1]),
        (4096, &[0x55; 64]),
    ] {
        scratch.file("bad", &good);
        patch(scratch.join("bad"), at, bytes);
        refused(&scratch, &open);
    }
    // What takes QEMU hours, or a wrapped sum lets pass.
    for at in [164, 212, 248] {
        scratch.file("bad", &good);
        patch(scratch.join("bad"), at, &[0xff; 4]);
        ours(&scratch).words(&open).finish().expect(1);
    }
    for len in [0, 300, 100_000, 2_067_000] {
        scratch.file("bad", &good[..len]);
        refused(&scratch, &open);
    }
}

#[test]
fn luks__block_devices__in_and_out() {
    let (scratch, digest) = folder();
    // As long as header and disk are together: nothing in it says how long the disk is.
    scratch.file("device", &vec![0xee; 2_068_480 + SIZE as usize]);
    let device = Loop::attach(&scratch.join("device"));
    let name = &device.0;
    let line = format!("convert {SECRETS} -f raw -O luks -o {QUICK} disk.raw {name}");
    ours(&scratch).words(&line).ok();
    let opts =
        format!("--image-opts driver=luks,file.driver=host_device,file.filename={name},key-secret=one");
    for run in [ours(&scratch), theirs(&scratch)] {
        run.words(&format!("convert {SECRETS} {opts} -O raw back.raw"))
            .ok();
        assert_eq!(hash::sha256_file(scratch.join("back.raw")), digest);
    }
    same_json(&scratch, &format!("info --output=json -f luks {name}"));
    refused(&scratch, &format!("resize {SECRETS} {opts} 4M"));
    let line = format!("create {SECRETS} -f luks -o {QUICK} {name} 4M");
    let small = ours(&scratch).words(&line).finish();
    assert_eq!(small.code, Some(1), "{small}");
}
