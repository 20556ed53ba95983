//! Programs that read disk images and share no code with QEMU.

use std::path::Path;

use diskmill_testkit::{Run, Scratch, hash};

/// The digest of the disk in an image, as 7-Zip reads it. `kind` is its name of the format.
pub fn seven_zip(scratch: &Scratch, name: &str, kind: &str) -> String {
    Run::new("sh")
        .dir(scratch.path())
        .args(["-c", "7z x -so -t\"$1\" \"$2\" > 7z.raw", "sh", kind, name])
        .ok();
    hash::sha256_file(scratch.join("7z.raw"))
}

/// Reads a disk block by block: over several blocks at once its readers are wrong.
const DISSECT_VDI: &str = "
import hashlib, sys
from dissect.hypervisor.disk.vdi import VDI
stream = None
for name in sys.argv[1:]:
    stream = VDI(open(name, 'rb'), parent=stream).open()
digest = hashlib.sha256()
left = stream.size
while left:
    piece = stream.read(min(left, 1 << 20))
    assert piece
    digest.update(piece)
    left -= len(piece)
print(digest.hexdigest())
";

/// The digest of the disk in the last of the images, each the parent of the next, as dissect.hypervisor reads it.
pub fn dissect_vdi(scratch: &Scratch, names: &[&str]) -> String {
    dissect(scratch, DISSECT_VDI, names)
}

const DISSECT_VMDK: &str = "
import hashlib, sys
from pathlib import Path
from dissect.hypervisor.disk.vmdk import VMDK
disk = VMDK(Path(sys.argv[1]))
digest = hashlib.sha256()
left = disk.size
while left:
    piece = disk.read(min(left, 1 << 20))
    assert piece
    digest.update(piece)
    left -= len(piece)
print(digest.hexdigest())
";

/// The digest of the disk in an image without a parent, as dissect.hypervisor reads it.
pub fn dissect_vmdk(scratch: &Scratch, name: &str) -> String {
    dissect(scratch, DISSECT_VMDK, &[name])
}

fn dissect(scratch: &Scratch, script: &str, names: &[&str]) -> String {
    let packages = Path::new(env!("CARGO_TARGET_TMPDIR"))
        .parent()
        .expect("the target folder")
        .join("peers/python");
    assert!(
        packages.join("dissect/hypervisor").is_dir(),
        "no dissect.hypervisor in {}: `cargo xtask peers` fetches it",
        packages.display()
    );
    Run::new("python3")
        .dir(scratch.path())
        .env("PYTHONPATH", packages)
        .args(["-c", script])
        .args(names)
        .ok()
        .out()
        .trim()
        .to_owned()
}
