//! The calls that other programs make, each run with the real `qemu-img` and with ours under that name.
//!
//! For each: the same exit code, the same standard error, the same standard output (as JSON, less what the host
//! decides, where it is JSON), and an equal image. The programs, by the release that was read: OpenStack Nova 2026-08,
//! Glance 2026-07, Cinder 2026-08, KubeVirt CDI 2026-08, Proxmox VE 2026-08, oVirt vdsm 2026-06, Packer 2026-06, Lima
//! 2026-06, libvirt.

use std::os::unix::fs::symlink;
use std::path::PathBuf;

use diskmill_testkit::sparse_random::SparseRandom;
use diskmill_testkit::{Finished, Run, Scratch, oracle};
use serde_json::Value;

/// The size of the disks in bytes.
const SIZE: u64 = 4 << 20;

/// Two folders with equal contents, one for each tool, and a link called `qemu-img` to ours.
struct Callers {
    ours: Scratch,
    theirs: Scratch,
    links: Scratch,
}

impl Callers {
    fn new() -> Self {
        let callers = Self {
            ours: Scratch::new(),
            theirs: Scratch::new(),
            links: Scratch::new(),
        };
        symlink(env!("CARGO_BIN_EXE_diskmill"), callers.link()).unwrap();
        for scratch in [&callers.ours, &callers.theirs] {
            let make = |line: &str| oracle::qemu_img().dir(scratch.path()).words(line).ok();
            SparseRandom::new(7, SIZE).write_raw(scratch.join("disk.raw"));
            make("convert -f raw -O qcow2 disk.raw disk.qcow2");
            make("create -q -f qcow2 -b disk.qcow2 -F qcow2 top.qcow2");
            oracle::io(scratch.join("top.qcow2"), "qcow2", ["write -P 9 64k 200k"]);
        }
        callers
    }

    fn link(&self) -> PathBuf {
        self.links.join("qemu-img")
    }

    fn run(&self, words: &[&str]) -> (Finished, Finished) {
        let finish = |run: Run, scratch: &Scratch| {
            run.env("LC_ALL", "C")
                .env("LANG", "C")
                .dir(scratch.path())
                .args(words)
                .finish()
        };
        let our = finish(Run::new(self.link()), &self.ours);
        let their = finish(oracle::qemu_img(), &self.theirs);
        assert!(
            our.code == their.code && our.err() == their.err(),
            "not the same\n--- ours\n{our}\n--- qemu-img's\n{their}"
        );
        (our, their)
    }

    /// Equal exit code, standard error and standard output.
    fn same(&self, words: &[&str]) -> Finished {
        let (our, their) = self.run(words);
        assert_eq!(our.out(), their.out(), "{our}");
        our
    }

    /// Equal exit code, standard error, and JSON less what the host decides.
    fn same_json(&self, words: &[&str]) -> Value {
        let (our, their) = self.run(words);
        let (mut left, mut right) = (our.json(), their.json());
        forget(&mut left);
        forget(&mut right);
        assert!(
            left == right,
            "not the same\n--- ours\n{our}\n--- qemu-img's\n{their}"
        );
        left
    }

    /// The same for a call that succeeds without a word and leaves an image.
    fn same_image(&self, words: &[&str], target: &str, format: &str) {
        let done = self.same(words);
        assert_eq!(done.code, Some(0), "{done}");
        self.equal(target, format);
    }

    /// The same for a call that succeeds.
    fn quiet(&self, line: &str) {
        let done = self.same(&words(line));
        assert_eq!(done.code, Some(0), "{done}");
    }

    /// Both have made the same disk, and ours is sound.
    fn equal(&self, target: &str, format: &str) {
        let (left, right) = (self.ours.join(target), self.theirs.join(target));
        oracle::assert_identical(&left, format, &right, format);
        if format == "qcow2" {
            oracle::assert_clean(&left, format);
        }
    }
}

/// Removes what depends on the host: the space files take and the length of an image file.
fn forget(value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.remove("actual-size");
            map.remove("children");
            map.values_mut().for_each(forget);
        }
        Value::Array(list) => list.iter_mut().for_each(forget),
        _ => {}
    }
}

fn words(line: &str) -> Vec<&str> {
    line.split_whitespace().collect()
}

#[test]
fn nova() {
    let callers = Callers::new();
    for name in ["disk.raw", "disk.qcow2", "top.qcow2"] {
        callers.same_json(&["info", name, "--force-share", "--output=json"]);
    }
    callers.same_json(&words("info disk.qcow2 --force-share --output=json -f qcow2"));
    let gone = callers.same(&words("info gone --force-share --output=json"));
    assert_eq!(gone.code, Some(1));
    assert!(gone.err().contains("No such file or directory"));
    for (cache, format) in [("none", "raw"), ("writeback", "qcow2")] {
        let line = format!("convert -t {cache} -O {format} -f qcow2 top.qcow2 out.{format}");
        callers.same_image(&words(&line), &format!("out.{format}"), format);
    }
    callers.same_image(
        &words("convert -t writeback -O qcow2 -f raw -c disk.raw c.qcow2"),
        "c.qcow2",
        "qcow2",
    );
    let overlay =
        "create -f qcow2 -o backing_file=disk.qcow2,backing_fmt=qcow2,cluster_size=65536 inst.qcow2 8M";
    callers.same_image(&words(overlay), "inst.qcow2", "qcow2");
    callers.same_image(&words("create -f raw inst.raw 1M"), "inst.raw", "raw");
    callers.same_image(
        &words("resize -f qcow2 inst.qcow2 16777216"),
        "inst.qcow2",
        "qcow2",
    );
    callers.same_image(&words("resize -f raw disk.raw 8388608"), "disk.raw", "raw");
}

/// Nova keeps ephemeral disks encrypted: qcow2 with LUKS, its keys in files.
#[test]
fn nova_encrypted() {
    let callers = Callers::new();
    for scratch in [&callers.ours, &callers.theirs] {
        scratch.file("key0", b"first passphrase");
        scratch.file("key1", b"second passphrase");
    }
    let luks = "-o encrypt.format=luks -o encrypt.cipher-alg=aes-256 -o encrypt.cipher-mode=xts \
                -o encrypt.hash-alg=sha256 -o encrypt.iter-time=10 -o encrypt.ivgen-alg=plain64 \
                -o encrypt.ivgen-hash-alg=sha256";
    callers.quiet(&format!(
        "convert -t none -O qcow2 -f raw --object secret,id=sec1,file=key1 -o encrypt.key-secret=sec1 {luks} disk.raw \
         in.qcow2"
    ));
    callers.quiet(
        "convert -t none -O raw --object secret,id=sec0,file=key1 --image-opts \
         driver=qcow2,file.driver=file,file.filename=in.qcow2,encrypt.key-secret=sec0 out.raw",
    );
    callers.equal("out.raw", "raw");
    callers.quiet(&format!(
        "convert -t writeback -O qcow2 --object secret,id=sec0,file=key1 --image-opts --object secret,id=sec1,file=key0 \
         -o encrypt.key-secret=sec1 {luks} \
         driver=qcow2,file.driver=file,file.filename=in.qcow2,encrypt.key-secret=sec0 again.qcow2"
    ));
    callers.quiet(
        "compare --object secret,id=sec0,file=key1 --object secret,id=sec1,file=key0 --image-opts \
         driver=qcow2,file.filename=in.qcow2,encrypt.key-secret=sec0 \
         driver=qcow2,file.filename=again.qcow2,encrypt.key-secret=sec1",
    );
    let create = "create -f qcow2 -o backing_file=disk.qcow2,backing_fmt=qcow2,cluster_size=65536";
    callers.quiet(&format!(
        "{create} --object secret,id=sec0,file=key0 -o encrypt.key-secret=sec0 {luks} over.qcow2 8M"
    ));
    let wrong = callers.same(&words(
        "convert -O raw --object secret,id=sec0,file=key0 --image-opts \
         driver=qcow2,file.driver=file,file.filename=in.qcow2,encrypt.key-secret=sec0 no.raw",
    ));
    assert_eq!(wrong.code, Some(1), "{wrong}");
}

#[test]
fn glance() {
    let callers = Callers::new();
    for (name, format) in [
        ("disk.raw", "raw"),
        ("disk.qcow2", "qcow2"),
        ("top.qcow2", "qcow2"),
    ] {
        let info = callers.same_json(&["info", "-f", format, "--output=json", name]);
        assert_eq!(info["format"], format);
        assert_eq!(info["virtual-size"], SIZE);
    }
    callers.same(&words("info -f qcow2 --output=json disk.raw"));
    callers.same_image(
        &words("convert -f qcow2 -O raw disk.qcow2 out.raw"),
        "out.raw",
        "raw",
    );
    callers.same_image(
        &words("convert -f raw -O qcow2 disk.raw out.qcow2"),
        "out.qcow2",
        "qcow2",
    );
}

/// Glance, Cinder and vdsm run it with 2 s of processor time and 1 GiB of address space, and take any word on standard
/// error for a failure.
#[test]
fn glance_cinder_vdsm_limits() {
    let callers = Callers::new();
    for line in [
        "info --output=json disk.qcow2",
        "info --output=json --backing-chain top.qcow2",
        "check --output=json disk.qcow2",
        "map --output=json top.qcow2",
        "measure --output=json -O qcow2 disk.raw",
    ] {
        let done = Run::new(callers.link())
            .dir(callers.ours.path())
            .limit("--as=1073741824")
            .limit("--cpu=2")
            .words(line)
            .ok();
        assert_eq!(done.err(), "", "{done}");
        let their = oracle::qemu_img().dir(callers.ours.path()).words(line).ok();
        assert_eq!(done.out(), their.out(), "{line}");
    }
}

#[test]
fn cinder() {
    let callers = Callers::new();
    let (our, their) = (
        Run::new(callers.link()).arg("--version").ok().out(),
        oracle::qemu_img().arg("--version").ok().out(),
    );
    let version = |text: &str| {
        let number = text.split("qemu-img version ").nth(1).unwrap();
        let end = number.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap();
        number[..end].to_owned()
    };
    assert_eq!(version(&our), version(&their));
    callers.same_json(&words("info -f qcow2 --output=json --force-share disk.qcow2"));
    callers.same_image(
        &words("convert -O raw -t none -f qcow2 disk.qcow2 out.raw"),
        "out.raw",
        "raw",
    );
    callers.same_image(
        &words("convert -O raw -S 0 -f qcow2 disk.qcow2 full.raw"),
        "full.raw",
        "raw",
    );
    callers.same_image(&words("convert -O qcow2 -c disk.raw c.qcow2"), "c.qcow2", "qcow2");
    callers.same_image(
        &words("create -f qcow2 -o backing_file=disk.qcow2,backing_fmt=qcow2 s.qcow2"),
        "s.qcow2",
        "qcow2",
    );
    callers.same_image(&words("resize s.qcow2 1G"), "s.qcow2", "qcow2");
    callers.same_image(&words("resize -f raw disk.raw 1G"), "disk.raw", "raw");
}

/// Volumes that Cinder encrypts itself are luks, the passphrase in a file.
#[test]
fn cinder_encrypted() {
    let callers = Callers::new();
    for scratch in [&callers.ours, &callers.theirs] {
        scratch.file("key", b"a passphrase");
    }
    callers.quiet(
        "convert -O luks -t none -f raw -o cipher-alg=aes-256,cipher-mode=xts,ivgen-alg=plain64,iter-time=10 --object \
         secret,id=luks_sec,format=raw,file=key -o key-secret=luks_sec disk.raw vol.luks",
    );
    callers.quiet(
        "create -f luks -o cipher-alg=aes-256,iter-time=10,key-secret=luks_sec --object \
         secret,id=luks_sec,format=raw,file=key empty.luks 4M",
    );
    // An error tells that an image is not encrypted.
    for (name, code) in [("vol.luks", 0), ("disk.raw", 1)] {
        let info = ["info", "-f", "luks", "--output=json", "--force-share", name];
        let (our, their) = callers.run(&info);
        assert_eq!((our.code, their.code), (Some(code), Some(code)), "{our}");
    }
    callers.quiet(
        "convert --object secret,id=s,file=key --image-opts driver=luks,file.filename=vol.luks,key-secret=s -O raw \
         out.raw",
    );
    callers.equal("out.raw", "raw");
}

#[test]
fn kubevirt_cdi() {
    let callers = Callers::new();
    for key in ["format", "virtual-size"] {
        let info = callers.same_json(&words("info --output=json disk.qcow2"));
        assert!(info.get(key).is_some());
    }
    callers.same_json(&words("info --output=json file:disk.qcow2"));
    for line in [
        "convert -o preallocation=falloc -t writeback -p -O raw disk.qcow2 out.raw",
        "convert -o preallocation=full -t none -p -O raw disk.qcow2 out.raw",
        "convert -S 0 -t none -p -O raw disk.qcow2 out.raw",
        "convert -t writeback -p -O raw disk.qcow2 out.raw",
    ] {
        let (our, their) = callers.run(&words(line));
        for done in [&our, &their] {
            let numbers = progress(&done.out());
            assert_eq!(numbers.first(), Some(&0.0), "{done}");
            assert_eq!(numbers.last(), Some(&100.0), "{done}");
            assert!(numbers.is_sorted(), "{done}");
        }
        callers.equal("out.raw", "raw");
    }
    callers.same_image(
        &words("resize --preallocation=falloc -f raw out.raw 8388608"),
        "out.raw",
        "raw",
    );
    callers.same_image(&words("resize -f raw out.raw 16777216"), "out.raw", "raw");
    callers.same_image(
        &words("create -f raw blank.raw 1048576 -o preallocation=falloc"),
        "blank.raw",
        "raw",
    );
    let refused = callers.same(&words(
        "create -f raw blank.raw 1048576 -o preallocation=metadata",
    ));
    assert!(
        refused.err().contains("Unsupported preallocation mode"),
        "{refused}"
    );
}

/// What the importer's `\((\d?\d\.\d\d)\/100%\)` finds, line by line as split at carriage returns; 100.00 has a digit
/// too many for its first group and is found as the end.
fn progress(out: &str) -> Vec<f64> {
    out.split('\r')
        .filter_map(|part| {
            part.trim()
                .strip_prefix('(')?
                .strip_suffix("/100%)")?
                .parse()
                .ok()
        })
        .collect()
}

#[test]
fn proxmox() {
    let callers = Callers::new();
    callers.same_image(
        &words("create -o preallocation=off -f raw vm.raw 4096K"),
        "vm.raw",
        "raw",
    );
    callers.same_image(
        &words("create -o preallocation=metadata -f qcow2 vm.qcow2 4096K"),
        "vm.qcow2",
        "qcow2",
    );
    let linked = "create -F qcow2 -b disk.qcow2 -f qcow2 link.qcow2 -o extended_l2=on,cluster_size=128k";
    callers.same_image(&words(linked), "link.qcow2", "qcow2");
    callers.same_json(&words("info --output=json link.qcow2 -f qcow2 --backing-chain"));
    callers.same_json(&words("info --output=json disk.raw -f raw"));
    for size in ["4096K", "33554432K"] {
        let measure = callers.same_json(&["measure", "--output=json", "--size", size, "-O", "qcow2"]);
        assert!(measure["fully-allocated"].as_u64().unwrap() >= 4 << 20);
    }
    callers.same_json(&words(
        "measure --output=json --size 4096K -O qcow2 -o cluster_size=128k,extended_l2=on",
    ));
    callers.same_image(&words("resize -f qcow2 vm.qcow2 8388608"), "vm.qcow2", "qcow2");
    callers.same_image(
        &words("resize --preallocation=off -f raw vm.raw 8388608"),
        "vm.raw",
        "raw",
    );
    for line in [
        "convert -p -n -t none -T none -f raw -O qcow2 disk.raw vm.qcow2",
        "convert -p -n -f qcow2 -O raw top.qcow2 vm.raw",
        "convert -p -n -r 65536K -f raw -O raw disk.raw vm.raw",
    ] {
        let (our, _) = callers.run(&words(line));
        assert_eq!(progress(&our.out()).last(), Some(&100.0), "{our}");
    }
    callers.equal("vm.qcow2", "qcow2");
    callers.equal("vm.raw", "raw");
    let options = "convert -n --target-image-opts -f raw disk.raw \
                   driver=qcow2,discard-no-unref=true,file.driver=file,file.filename=vm.qcow2";
    callers.same_image(&words(options), "vm.qcow2", "qcow2");
}

/// Proxmox's own build knows `zeroinit:`; the real tool here does not.
#[test]
fn proxmox_zeroinit() {
    let callers = Callers::new();
    for line in [
        "create -q new.raw 4M",
        "convert -p -n -f raw -O raw disk.raw zeroinit:new.raw",
    ] {
        Run::new(callers.link()).dir(callers.ours.path()).words(line).ok();
    }
    oracle::assert_identical(
        callers.ours.join("new.raw"),
        "raw",
        callers.ours.join("disk.raw"),
        "raw",
    );
}

/// The real tool fails here ("Could not resize file"), which is why Proxmox patches it.
#[test]
fn proxmox_standard_output() {
    let callers = Callers::new();
    let done = Run::new(callers.link())
        .dir(callers.ours.path())
        .words("convert -f qcow2 -O raw disk.qcow2 /dev/stdout")
        .ok();
    assert!(
        done.stdout == std::fs::read(callers.ours.join("disk.raw")).unwrap(),
        "other bytes"
    );
    assert_eq!(done.err(), "");
}

#[test]
fn ovirt_vdsm() {
    let callers = Callers::new();
    callers.same_json(&words("info --output json -f qcow2 -U top.qcow2"));
    callers.same_json(&words("info --output json -f qcow2 -U --backing-chain top.qcow2"));
    let name = r#"json:{"driver":"qcow2","backing":null,"file":{"driver":"file","filename":"top.qcow2"}}"#;
    for name in [name, "disk.raw"] {
        callers.same_json(&["measure", "--output", "json", "--force-share", "-O", "raw", name]);
    }
    let check = callers.same_json(&words("check --output json -f qcow2 top.qcow2"));
    assert!(check.get("image-end-offset").is_some());
    callers.same_json(&words("map --output json -f qcow2 top.qcow2"));
    for line in [
        "convert -p -t none -T none -f qcow2 -O qcow2 -o compat=1.1 top.qcow2 out.qcow2",
        "convert -p -t none -T none -f qcow2 -O qcow2 -o compat=0.10 top.qcow2 out.qcow2",
        "convert -p -t none -T none -f raw -O qcow2 -o compat=1.1,preallocation=metadata disk.raw out.qcow2",
        "convert -p -t none -T none -f qcow2 -O qcow2 -o compat=1.1,backing_file=disk.qcow2,backing_fmt=qcow2 \
         -B disk.qcow2 -F qcow2 top.qcow2 out.qcow2",
        "convert -p -t none -T none -f qcow2 -O qcow2 -c -W top.qcow2 out.qcow2",
    ] {
        let (our, _) = callers.run(&words(line));
        assert_eq!(our.code, Some(0), "{our}");
        callers.equal("out.qcow2", "qcow2");
    }
    for line in [
        "create -q -f qcow2 target.qcow2 4M",
        "convert -p -n --target-is-zero -f raw -O qcow2 disk.raw target.qcow2",
    ] {
        let (our, _) = callers.run(&words(line));
        assert_eq!(our.code, Some(0), "{our}");
    }
    callers.equal("target.qcow2", "qcow2");
    let (our, _) = callers.run(&words("compare -p disk.raw disk.qcow2"));
    assert!(our.out().ends_with("Images are identical.\n\n"), "{our}");
}

/// vdsm still parses the result of a check that finds leaks (exit code 3).
#[test]
fn ovirt_vdsm_leaks() {
    let callers = Callers::new();
    for scratch in [&callers.ours, &callers.theirs] {
        let path = scratch.join("disk.qcow2");
        let bytes = std::fs::read(&path).unwrap();
        let number = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
        // The refcount table's first entry leads to a block; one more cluster is counted there than is used.
        let table = usize::try_from(number(48)).unwrap();
        let block = usize::try_from(number(table)).unwrap();
        let mut leaky = bytes.clone();
        let free = (bytes.len() >> 16) + 1;
        leaky[block + 2 * free + 1] = 1;
        leaky.resize((free + 1) << 16, 0);
        std::fs::write(&path, leaky).unwrap();
    }
    let (our, their) = callers.run(&words("check --output json -f qcow2 disk.qcow2"));
    assert_eq!(our.code, Some(3), "{our}");
    assert_eq!(our.json(), their.json());
}

#[test]
fn packer() {
    let callers = Callers::new();
    callers.same_image(
        &words("convert -c -O qcow2 disk.raw out.qcow2"),
        "out.qcow2",
        "qcow2",
    );
    callers.same_image(&words("convert -O raw disk.qcow2 out.raw"), "out.raw", "raw");
    callers.same_image(&words("create -f qcow2 vm.qcow2 40960M"), "vm.qcow2", "qcow2");
    callers.same_image(
        &words("create -f qcow2 -b disk.qcow2 -F qcow2 vm.qcow2 40960M"),
        "vm.qcow2",
        "qcow2",
    );
    callers.same_image(&words("resize -f qcow2 vm.qcow2 81920M"), "vm.qcow2", "qcow2");
}

/// Packer tries again while this text comes.
#[test]
fn packer_retries_on_a_lock() {
    let callers = Callers::new();
    let holders = [&callers.ours, &callers.theirs]
        .map(|scratch| oracle::Holder::qemu_io(scratch.join("disk.qcow2"), "qcow2", &[]));
    for line in [
        "convert -O qcow2 disk.qcow2 out.qcow2",
        "info disk.qcow2",
        "resize -f qcow2 disk.qcow2 8M",
        "create -f qcow2 disk.qcow2 8M",
        "convert -O qcow2 disk.raw disk.qcow2",
    ] {
        let done = callers.same(&words(line));
        assert_eq!(done.code, Some(1), "{done}");
        assert!(done.err().contains("\"write\" lock"), "{done}");
        assert!(
            done.err()
                .contains("Is another process using the image [disk.qcow2]?"),
            "{done}"
        );
    }
    callers.same_json(&words("info -U --output=json disk.qcow2"));
    drop(holders);
}

#[test]
fn lima() {
    let callers = Callers::new();
    let info = callers.same_json(&words("info --output=json --force-share disk.qcow2"));
    assert_eq!(info["format-specific"]["data"]["compat"], "1.1");
    callers.same_image(&words("convert -O raw disk.qcow2 out.raw"), "out.raw", "raw");
    callers.same_image(
        &words("create -f qcow2 diffdisk 107374182400"),
        "diffdisk",
        "qcow2",
    );
    callers.same_image(
        &words("resize -f qcow2 diffdisk 214748364800"),
        "diffdisk",
        "qcow2",
    );
}

#[test]
fn libvirt() {
    let callers = Callers::new();
    for line in [
        "create -f qcow2 -o preallocation=metadata,compat=1.1,lazy_refcounts vol.qcow2 4096K",
        "create -f qcow2 -o compat=0.10 vol.qcow2 4096K",
        "create -f qcow2 -b disk.qcow2 -o backing_fmt=qcow2,compat=1.1 vol.qcow2 4096K",
        "create -f qcow2 -o compat=1.1,nocow=on vol.qcow2 4096K",
    ] {
        callers.same_image(&words(line), "vol.qcow2", "qcow2");
    }
    callers.same_image(
        &words("convert -f raw -O qcow2 -o compat=1.1,lazy_refcounts disk.raw vol.qcow2"),
        "vol.qcow2",
        "qcow2",
    );
    callers.same_image(
        &words("convert -f qcow2 -O raw vol.qcow2 vol.raw"),
        "vol.raw",
        "raw",
    );
}

/// libvirt gives the passphrase of a volume in a file, as base64.
#[test]
fn libvirt_encrypted() {
    let callers = Callers::new();
    for scratch in [&callers.ours, &callers.theirs] {
        scratch.file("key", b"cGFzc3BocmFzZQ==\n");
    }
    let object = "--object secret,id=vol_encrypt0,file=key,format=base64";
    callers.quiet(&format!(
        "create -f qcow2 {object} -o encrypt.format=luks,encrypt.iter-time=10,encrypt.key-secret=vol_encrypt0,compat=1.1 \
         vol.qcow2 4096K"
    ));
    callers.quiet(&format!(
        "convert --image-opts -n --target-image-opts {object} driver=raw,file.filename=disk.raw \
         driver=qcow2,file.driver=file,file.filename=vol.qcow2,encrypt.key-secret=vol_encrypt0"
    ));
    callers.quiet(&format!(
        "convert --image-opts -O raw {object} \
         driver=qcow2,file.driver=file,file.filename=vol.qcow2,encrypt.key-secret=vol_encrypt0 vol.raw"
    ));
    callers.equal("vol.raw", "raw");
}

/// libvirt sets a umask and expects the image to have what it leaves.
#[test]
fn libvirt_umask() {
    use std::os::unix::fs::PermissionsExt;
    let callers = Callers::new();
    for line in [
        "create -q -f qcow2 vol.qcow2 4M",
        "convert -O qcow2 disk.raw conv.qcow2",
    ] {
        let name = line
            .split_whitespace()
            .find(|word| word.starts_with("vol") || word.starts_with("conv."));
        let modes: Vec<u32> = [
            (callers.link(), &callers.ours),
            ("qemu-img".into(), &callers.theirs),
        ]
        .into_iter()
        .map(|(tool, scratch)| {
            Run::new("sh")
                .dir(scratch.path())
                .arg("-c")
                .arg(format!("umask 027; '{}' {line}", tool.display()))
                .ok();
            let data = std::fs::metadata(scratch.join(name.unwrap())).unwrap();
            data.permissions().mode() & 0o777
        })
        .collect();
        assert_eq!(modes[0], modes[1], "{line}");
    }
}

/// virt-v2v asks so whether the `offset` and `size` of raw images are understood.
#[test]
fn virt_v2v() {
    let callers = Callers::new();
    let spec =
        r#"json:{"driver":"raw","offset":512,"size":1048576,"file":{"driver":"file","filename":"disk.raw"}}"#;
    callers.same_json(&["info", "--output=json", spec]);
}
