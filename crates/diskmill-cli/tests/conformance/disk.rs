//! A real disk: ext4 with files of this machine, through every path and back.

use diskmill_testkit::random::soak;
use diskmill_testkit::{Run, Scratch, ext4, hash, oracle};

use crate::tools::{binary, native, ours, theirs};

/// Bytes of files on the disk: enough to have every sort, small enough for every run of the tests.
fn files_len() -> u64 {
    let len: u64 = 16 << 20;
    len.saturating_mul(soak().into()).min(80 << 20)
}

/// Bytes of the disk, which is sparse.
const DISK: u64 = 128 << 20;

struct Disk {
    scratch: Scratch,
    digest: String,
}

impl Disk {
    fn make() -> Self {
        let scratch = Scratch::new();
        let copied = ext4::copy_tree(
            &["/usr/share".as_ref(), "/usr/bin".as_ref()],
            &scratch.join("tree"),
            files_len(),
        );
        assert!(copied > files_len() / 4, "this machine has hardly any files");
        ext4::make(scratch.join("disk.raw"), scratch.join("tree"), DISK);
        std::fs::remove_dir_all(scratch.join("tree")).unwrap();
        ext4::assert_clean(scratch.join("disk.raw"));
        let digest = hash::sha256_file(scratch.join("disk.raw"));
        Self { scratch, digest }
    }

    /// Converts `from` to raw with our command; it must be the disk.
    fn assert_back(&self, from: &str, format: &str) {
        ours(&self.scratch)
            .words(&format!("convert -f {format} -O raw {from} back.raw"))
            .ok();
        assert_eq!(
            self.digest,
            hash::sha256_file(self.scratch.join("back.raw")),
            "{from}"
        );
    }

    fn assert_qcow2(&self, name: &str) {
        self.assert_good(name, "qcow2");
    }

    fn assert_good(&self, name: &str, format: &str) {
        oracle::assert_clean(self.scratch.join(name), format);
        oracle::assert_identical(
            self.scratch.join("disk.raw"),
            "raw",
            self.scratch.join(name),
            format,
        );
        ours(&self.scratch)
            .words(&format!("check -f {format} {name}"))
            .ok();
        ours(&self.scratch)
            .words(&format!("compare -f raw -F {format} disk.raw {name}"))
            .ok();
        self.assert_back(name, format);
    }
}

#[test]
fn disk__through_every_path_and_back() {
    let disk = Disk::make();
    let scratch = &disk.scratch;
    let files = ext4::hashes(scratch.join("disk.raw"));
    assert!(files.len() > 100, "{} files", files.len());

    let mut last = ("disk.raw".to_owned(), "raw");
    for (number, flags) in [
        "-O qcow2",
        "-O qcow2 -o compat=0.10",
        "-c -O qcow2",
        "-c -O qcow2 -o compression_type=zstd",
        "-O vdi",
        "-O vdi -o static=on",
        "-O vmdk",
        "-O vmdk -o subformat=streamOptimized",
        "-O vmdk -o subformat=twoGbMaxExtentSparse,zeroed_grain=on",
        "-O vmdk -o subformat=monolithicFlat",
        "-O qcow2 -o extended_l2=on,cluster_size=128k",
        "-O qcow2 -o cluster_size=4k,refcount_bits=1",
        "-O qcow2 -o data_file=disk.data,data_file_raw=on",
        "-O qcow2 -o preallocation=falloc",
        "-C -O raw",
        "-S 0 -O raw",
    ]
    .into_iter()
    .enumerate()
    {
        // Each step starts from what the last one made.
        let mut words = flags.split(' ').skip_while(|word| *word != "-O");
        let format = words.nth(1).expect("a format");
        let name = format!("{number}.{format}");
        ours(scratch)
            .words(&format!("convert -f {} {flags} {} {name}", last.1, last.0))
            .ok();
        if format != "raw" {
            disk.assert_good(&name, format);
        } else {
            assert_eq!(disk.digest, hash::sha256_file(scratch.join(&name)), "{flags}");
        }
        if last.0 != "disk.raw" {
            std::fs::remove_file(scratch.join(&last.0)).unwrap();
        }
        last = (name, format);
    }
    ext4::assert_clean(scratch.join(&last.0));
    assert_eq!(files, ext4::hashes(scratch.join(&last.0)));
}

#[test]
fn disk__overlays_and_pipes() {
    let disk = Disk::make();
    let scratch = &disk.scratch;
    // A base with an older state of the disk, and an overlay with what has changed since.
    std::fs::copy(scratch.join("disk.raw"), scratch.join("old.raw")).unwrap();
    oracle::io(
        scratch.join("old.raw"),
        "raw",
        ["write -P 1 0 1M", "write -P 2 50M 5M", "write -z 100M 3M"],
    );
    ours(scratch)
        .words("convert -c -f raw -O qcow2 old.raw old.qcow2")
        .ok();
    ours(scratch)
        .words("convert -f raw -O qcow2 -B old.qcow2 -F qcow2 disk.raw overlay.qcow2")
        .ok();
    disk.assert_qcow2("overlay.qcow2");

    // Through pipes: out of the overlay, into a compressed image.
    Run::new("sh")
        .dir(scratch.path())
        .args(["-c", "set -e; \"$1\" convert -f qcow2 -O raw overlay.qcow2 - > piped.raw; \"$1\" convert -c -f raw -O qcow2 - piped.qcow2 < piped.raw; cat piped.raw | \"$1\" convert -f raw -O qcow2 - again.qcow2", "sh"])
        .arg(binary())
        .ok();
    assert_eq!(disk.digest, hash::sha256_file(scratch.join("piped.raw")));
    disk.assert_qcow2("piped.qcow2");
    disk.assert_qcow2("again.qcow2");

    // Our own front end, and images theirs made.
    native(scratch)
        .words("convert -f raw -O qcow2 disk.raw native.qcow2")
        .ok();
    disk.assert_qcow2("native.qcow2");
    for flags in [
        "-m 16 -W",
        "-c -m 16 -W",
        "-c -o compression_type=zstd",
        "-o extended_l2=on,cluster_size=1M",
    ] {
        theirs(scratch)
            .words(&format!("convert {flags} -f raw -O qcow2 disk.raw theirs.qcow2"))
            .ok();
        disk.assert_back("theirs.qcow2", "qcow2");
    }
}

/// The disk in an overlay, merged down and moved to another base.
#[test]
fn disk__committed_and_rebased() {
    let disk = Disk::make();
    let scratch = &disk.scratch;
    let files = ext4::hashes(scratch.join("disk.raw"));
    std::fs::copy(scratch.join("disk.raw"), scratch.join("old.raw")).unwrap();
    oracle::io(
        scratch.join("old.raw"),
        "raw",
        ["write -P 1 0 1M", "write -P 2 50M 5M", "write -z 100M 3M"],
    );
    for (base, flags, overlay) in [
        ("base.qcow2", "-c -O qcow2", ""),
        ("base.raw", "-O raw", "-o extended_l2=on,cluster_size=128k"),
    ] {
        let format = if base.ends_with("raw") { "raw" } else { "qcow2" };
        ours(scratch)
            .words(&format!("convert {flags} -f raw old.raw {base}"))
            .ok();
        ours(scratch)
            .words(&format!(
                "convert -f raw -O qcow2 {overlay} -B {base} -F {format} disk.raw overlay.qcow2"
            ))
            .ok();
        // Away from the base and back: the overlay holds all that differs, and then only that.
        ours(scratch)
            .words("rebase -f qcow2 -b old.raw -F raw overlay.qcow2")
            .ok();
        disk.assert_qcow2("overlay.qcow2");
        ours(scratch)
            .words(&format!("rebase -f qcow2 -b {base} -F {format} overlay.qcow2"))
            .ok();
        disk.assert_qcow2("overlay.qcow2");
        ours(scratch).words("commit -q -f qcow2 overlay.qcow2").ok();
        disk.assert_qcow2("overlay.qcow2");
        oracle::assert_identical(scratch.join("disk.raw"), "raw", scratch.join(base), format);
        disk.assert_back(base, format);
        ext4::assert_clean(scratch.join("back.raw"));
        assert_eq!(files, ext4::hashes(scratch.join("back.raw")));
    }
}

/// A block device made of a loop device, in and out.
#[test]
fn disk__block_devices() {
    let scratch = Scratch::new();
    let disk = diskmill_testkit::sparse_random::SparseRandom::new(2, 24 << 20);
    disk.write_raw(scratch.join("disk.raw"));
    ours(&scratch)
        .words("convert -f raw -O qcow2 disk.raw disk.qcow2")
        .ok();
    for (format, target) in [("raw", ""), ("qcow2", "-o cluster_size=64k")] {
        scratch.file("device", &[0xee; 48 << 20]);
        let device = Loop::attach(&scratch.join("device"));
        let name = &device.0;
        ours(&scratch)
            .words(&format!(
                "convert -f qcow2 -O {format} {target} disk.qcow2 {name}"
            ))
            .ok();
        let read = |format: &str| {
            ours(&scratch)
                .words(&format!("convert -f {format} -O raw {name} back.raw"))
                .ok();
            let bytes = std::fs::read(scratch.join("back.raw")).unwrap();
            assert_eq!(disk.verify(0, &bytes[..24 << 20]), Ok(()));
        };
        read(format);
        if format == "qcow2" {
            oracle::assert_clean(name, "qcow2");
            oracle::assert_identical(scratch.join("disk.raw"), "raw", name, "qcow2");
        } else {
            // With -n a target that is not known to be zero has to be made so.
            ours(&scratch)
                .words(&format!("convert -n -f qcow2 -O raw disk.qcow2 {name}"))
                .ok();
            read(format);
        }
        crate::tools::same_json(&scratch, &format!("info --output=json -f {format} {name}"));
        crate::tools::same_json(&scratch, &format!("map --output=json -f {format} {name}"));
    }
}

/// A loop device that is let go when dropped.
pub struct Loop(pub String);

impl Loop {
    pub fn attach(file: &std::path::Path) -> Self {
        let done = Run::new("losetup").args(["--show", "-f"]).arg(file).ok();
        Self(done.out().trim().to_owned())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Run::new("losetup").args(["-d", &self.0]).finish();
    }
}
