//! A real guest: Linux booted from images we made hashes its files and writes to its disk.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use diskmill_testkit::{Run, Scratch, ext4, hash, oracle, process};

use crate::tools::{native, ours};

/// What the guest runs instead of an init: hash all files, write some, hash those, stop.
const INIT: &str = "#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
cd /data
echo BEGIN-HASHES
/bin/busybox find . -type f -print0 | /bin/busybox xargs -0 /bin/busybox sha256sum
echo END-HASHES
/bin/busybox mkdir /written
n=0
while [ $n -lt 40 ]; do
  /bin/busybox head -c $((n * 7919 + 1)) /dev/urandom > /written/$n
  n=$((n + 1))
done
/bin/busybox rm /data/remove-me
/bin/busybox sync
cd /written
echo BEGIN-WRITTEN
/bin/busybox find . -type f -print0 | /bin/busybox xargs -0 /bin/busybox sha256sum
echo END-WRITTEN
cd /
/bin/busybox mount -o remount,ro / && echo DISK-IS-CLEAN
/bin/busybox sync
/bin/busybox poweroff -f
";

/// The kernel `cargo xtask test` unpacked.
fn kernel() -> PathBuf {
    if let Some(kernel) = std::env::var_os("DISKMILL_KERNEL") {
        return kernel.into();
    }
    let boot = Path::new(env!("CARGO_TARGET_TMPDIR"))
        .parent()
        .expect("the target folder")
        .join("peers/boot");
    std::fs::read_dir(&boot)
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| {
            path.file_name()
                .is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz"))
        })
        .unwrap_or_else(|| panic!("no kernel in {}: `cargo xtask test` fetches one", boot.display()))
}

fn make_disk(scratch: &Scratch) {
    let tree = scratch.join("tree");
    for dir in ["bin", "proc", "dev", "data"] {
        std::fs::create_dir_all(tree.join(dir)).unwrap();
    }
    std::fs::copy(process::find("busybox"), tree.join("bin/busybox")).unwrap();
    std::fs::write(tree.join("init"), INIT).unwrap();
    Run::new("chmod").arg("755").arg(tree.join("init")).ok();
    ext4::copy_tree(&["/usr/share".as_ref()], &tree.join("data"), 12 << 20);
    std::fs::write(tree.join("data/remove-me"), vec![7; 100_000]).unwrap();
    ext4::make(scratch.join("disk.raw"), &tree, 64 << 20);
    std::fs::remove_dir_all(&tree).unwrap();
}

/// Boots from `image` and returns what the guest said.
fn boot(scratch: &Scratch, image: &str, format: &str) -> String {
    let done = Run::new("qemu-system-x86_64")
        .dir(scratch.path())
        .words("-machine q35,accel=tcg -cpu max -m 512 -nographic -no-reboot -net none -kernel")
        .arg(kernel())
        .args([
            "-append",
            "root=/dev/nvme0n1 rw console=ttyS0 init=/init panic=-1 quiet",
        ])
        .args(["-drive", &format!("file={image},format={format},if=none,id=d")])
        .words("-device nvme,drive=d,serial=x")
        .patience(Duration::from_secs(300))
        .ok();
    let out = done.out();
    assert!(
        out.contains("DISK-IS-CLEAN"),
        "the guest did not come to its end\n{done}"
    );
    out
}

/// The digests the guest printed between two marks, by file name.
fn digests(serial: &str, what: &str) -> BTreeMap<String, String> {
    serial
        .lines()
        .skip_while(|line| !line.contains(&format!("BEGIN-{what}")))
        .take_while(|line| !line.contains(&format!("END-{what}")))
        .filter_map(|line| {
            let (digest, name) = line.trim().split_once("  ./")?;
            Some((name.to_owned(), digest.to_owned()))
        })
        .collect()
}

/// The files of the image below `dir`, by name.
fn below(files: &BTreeMap<String, String>, dir: &str) -> BTreeMap<String, String> {
    files
        .iter()
        .filter_map(|(name, digest)| Some((name.strip_prefix(dir)?.to_owned(), digest.clone())))
        .collect()
}

fn guest(convert: &[&str], image: &str) {
    let (_, format) = image.rsplit_once('.').expect("a format");
    let scratch = Scratch::new();
    make_disk(&scratch);
    let before = ext4::hashes(scratch.join("disk.raw"));
    for words in convert {
        match words.strip_prefix("diskmill ") {
            Some(words) => native(&scratch).words(words).ok(),
            None => ours(&scratch).words(words).ok(),
        };
    }
    let serial = boot(&scratch, image, format);
    assert_eq!(
        digests(&serial, "HASHES"),
        below(&before, "data/"),
        "the guest sees other files"
    );

    oracle::assert_clean(scratch.join(image), format);
    ours(&scratch).words(&format!("check -f {format} {image}")).ok();
    ours(&scratch)
        .words(&format!("convert -f {format} -O raw {image} after.raw"))
        .ok();
    assert_eq!(
        hash::sha256_file(scratch.join("after.raw")),
        oracle::guest_sha256(scratch.join(image), format)
    );
    ext4::assert_clean(scratch.join("after.raw"));

    let after = ext4::hashes(scratch.join("after.raw"));
    let written = digests(&serial, "WRITTEN");
    assert_eq!(written.len(), 40);
    assert_eq!(
        written,
        below(&after, "written/"),
        "what the guest wrote is not there"
    );
    let mut expected = before;
    expected.remove("data/remove-me");
    let others: BTreeMap<String, String> = after
        .into_iter()
        .filter(|(name, _)| !name.starts_with("written/"))
        .collect();
    assert_eq!(expected, others, "files the guest did not write have changed");
}

#[test]
fn guest__boots_from_qcow2() {
    guest(&["convert -f raw -O qcow2 disk.raw disk.qcow2"], "disk.qcow2");
}

#[test]
fn guest__boots_from_vmdk() {
    guest(&["convert -f raw -O vmdk disk.raw disk.vmdk"], "disk.vmdk");
}

#[test]
fn guest__boots_from_split_vmdk_that_was_a_stream() {
    guest(
        &[
            "convert -f raw -O vmdk -o subformat=streamOptimized disk.raw stream.vmdk",
            "convert -f vmdk -O vmdk -o subformat=twoGbMaxExtentSparse stream.vmdk disk.vmdk",
        ],
        "disk.vmdk",
    );
}

#[test]
fn guest__boots_from_vdi() {
    guest(&["convert -f raw -O vdi disk.raw disk.vdi"], "disk.vdi");
}

#[test]
fn guest__boots_from_fixed_vdi_that_was_compressed_qcow2() {
    guest(
        &[
            "convert -c -f raw -O qcow2 disk.raw disk.qcow2",
            "convert -f qcow2 -O vdi -o static=on disk.qcow2 disk.vdi",
        ],
        "disk.vdi",
    );
}

#[test]
fn guest__boots_from_compressed_qcow2() {
    guest(&["convert -c -f raw -O qcow2 disk.raw disk.qcow2"], "disk.qcow2");
}

#[test]
fn guest__boots_from_an_overlay() {
    guest(
        &[
            "convert -c -f raw -O qcow2 -o compression_type=zstd disk.raw base.qcow2",
            "create -q -f qcow2 -o extended_l2=on,cluster_size=128k -b base.qcow2 -F qcow2 disk.qcow2",
            "resize -q -f qcow2 disk.qcow2 +64M",
        ],
        "disk.qcow2",
    );
}

/// Boots the guest from a disk that went into an OVF package and out of it again.
pub fn through_package() {
    guest(
        &[
            "diskmill convert disk.raw -O ova box.ova",
            "diskmill convert box.ova -O qcow2 disk.qcow2",
        ],
        "disk.qcow2",
    );
}

/// A guest writes into an overlay, which is committed; another overlay is moved to the base as it was before. Both read
/// as the guest left its disk, and a guest boots from them.
#[test]
fn guest__writes_are_committed_and_rebased() {
    let scratch = Scratch::new();
    make_disk(&scratch);
    for words in [
        "convert -f raw -O qcow2 disk.raw base.qcow2",
        "convert -c -f raw -O qcow2 disk.raw old.qcow2",
        "create -q -f qcow2 -b base.qcow2 -F qcow2 overlay.qcow2",
    ] {
        ours(&scratch).words(words).ok();
    }
    let serial = boot(&scratch, "overlay.qcow2", "qcow2");
    let left = oracle::guest_sha256(scratch.join("overlay.qcow2"), "qcow2");
    for words in [
        "commit -q -f qcow2 overlay.qcow2",
        "create -q -f qcow2 -b base.qcow2 -F qcow2 moved.qcow2",
        "rebase -f qcow2 -b old.qcow2 -F qcow2 moved.qcow2",
        "check -q -f qcow2 moved.qcow2",
        "check -q -f qcow2 base.qcow2",
        "convert -f qcow2 -O raw moved.qcow2 after.raw",
    ] {
        ours(&scratch).words(words).ok();
    }
    for image in ["base.qcow2", "overlay.qcow2", "moved.qcow2"] {
        assert_eq!(
            left,
            oracle::guest_sha256(scratch.join(image), "qcow2"),
            "{image}"
        );
        oracle::assert_clean(scratch.join(image), "qcow2");
    }
    ext4::assert_clean(scratch.join("after.raw"));
    let files = ext4::hashes(scratch.join("after.raw"));
    assert_eq!(digests(&serial, "WRITTEN"), below(&files, "written/"));
    let again = boot(&scratch, "moved.qcow2", "qcow2");
    assert_eq!(
        digests(&again, "HASHES"),
        below(&files, "data/"),
        "the guest sees other files"
    );
}
