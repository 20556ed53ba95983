//! Making the golden images anew.

use diskmill_testkit::golden::{self, Golden};
use diskmill_testkit::scratch::{patch, peek};
use diskmill_testkit::sparse_random::SparseRandom;
use diskmill_testkit::{Scratch, oracle};

use crate::command::Failed;

/// Bytes of the disk in every image.
const SIZE: u64 = 300 * 1024 + 512;

/// Name, what it needs, and how to make it: words of `qemu-img`, `io` with commands of `qemu-io` parted by semicolons,
/// or `patch` with a name of [`change`].
const RECIPES: [(&str, &str, &[&str]); 14] = [
    (
        "v2.qcow2",
        "",
        &["convert -f raw -O qcow2 -o compat=0.10 disk.raw v2.qcow2"],
    ),
    (
        "v3.qcow2",
        "",
        &[
            "convert -f raw -O qcow2 disk.raw v3.qcow2",
            "io v3.qcow2 write -z 0 64k;discard 128k 64k",
        ],
    ),
    (
        "cluster512.qcow2",
        "",
        &["convert -f raw -O qcow2 -o cluster_size=512 disk.raw cluster512.qcow2"],
    ),
    (
        "zlib.qcow2",
        "",
        &["convert -c -f raw -O qcow2 disk.raw zlib.qcow2"],
    ),
    (
        "zstd.qcow2",
        "",
        &["convert -c -f raw -O qcow2 -o compression_type=zstd disk.raw zstd.qcow2"],
    ),
    (
        "extended.qcow2",
        "",
        &[
            "convert -f raw -O qcow2 -o extended_l2=on,cluster_size=16k disk.raw extended.qcow2",
            "io extended.qcow2 write -P 5 4096 512;write -z 20480 512",
        ],
    ),
    (
        "refcount1.qcow2",
        "",
        &["convert -c -f raw -O qcow2 -o refcount_bits=1,cluster_size=4k disk.raw refcount1.qcow2"],
    ),
    (
        "refcount64.qcow2",
        "",
        &["convert -f raw -O qcow2 -o refcount_bits=64 disk.raw refcount64.qcow2"],
    ),
    (
        "preallocated.qcow2",
        "",
        &["create -q -f qcow2 -o preallocation=metadata preallocated.qcow2 308224"],
    ),
    (
        "overlay.qcow2",
        "v2.qcow2",
        &[
            "create -q -f qcow2 -b v2.qcow2 -F qcow2 overlay.qcow2 400k",
            "io overlay.qcow2 write -P 9 100k 10k;write -z 200k 4k",
        ],
    ),
    (
        "datafile.qcow2",
        "datafile.raw",
        &["convert -f raw -O qcow2 -o data_file=datafile.raw,data_file_raw=on disk.raw datafile.qcow2"],
    ),
    (
        "dirty.qcow2",
        "",
        &[
            "create -q -f qcow2 -o lazy_refcounts=on dirty.qcow2 300k",
            "crash dirty.qcow2 write -P 7 0 200k",
        ],
    ),
    (
        "snapshots.qcow2",
        "",
        &[
            "convert -f raw -O qcow2 disk.raw snapshots.qcow2",
            "snapshot -c one snapshots.qcow2",
            "io snapshots.qcow2 write -P 3 0 100k",
        ],
    ),
    (
        "unknown.qcow2",
        "",
        &[
            "convert -f raw -O qcow2 disk.raw unknown.qcow2",
            "patch unknown.qcow2",
        ],
    ),
];

/// Makes all of them with the installed tools and writes the table.
pub fn make() -> Result<(), Failed> {
    oracle::demand_version();
    let version = oracle::qemu_img().arg("--version").ok().out();
    let version = version.split_whitespace().nth(2).unwrap_or_default().to_owned();
    std::fs::create_dir_all(golden::folder())?;
    let scratch = Scratch::new();
    SparseRandom::new(20, SIZE).write_raw(scratch.join("disk.raw"));
    let mut table = "# name, needs, exit code of check, sha256 of the guest's bytes, made by\n".to_owned();
    for (name, needs, steps) in RECIPES {
        for step in steps {
            perform(&scratch, step);
        }
        let (_, check) = oracle::check(scratch.join(name), "qcow2");
        let golden = Golden {
            name: name.to_owned(),
            needs: needs.split_whitespace().map(str::to_owned).collect(),
            check,
            sha256: oracle::guest_sha256(scratch.join(name), "qcow2"),
            made_by: format!("QEMU {version}: {}", steps.join(" && ")),
        };
        for file in golden.needs.iter().chain([&golden.name]) {
            golden::pack(&scratch.join(file));
        }
        table.push_str(&golden.row());
        table.push('\n');
    }
    std::fs::write(golden::folder().join("golden.tsv"), table)?;
    Ok(())
}

fn perform(scratch: &Scratch, step: &str) {
    let (kind, rest) = step.split_once(' ').unwrap_or((step, ""));
    let (name, commands) = rest.split_once(' ').unwrap_or((rest, ""));
    match kind {
        "io" => oracle::io(scratch.join(name), "qcow2", commands.split(';')),
        "crash" => {
            let run = oracle::qemu_io().args(["-f", "qcow2", "-c", commands, "-c", "abort"]);
            let done = run.arg(scratch.join(name)).finish();
            assert_eq!(done.signal, Some(6), "{done}");
        }
        "patch" => change(scratch, name),
        _ => {
            oracle::qemu_img().dir(scratch.path()).words(step).ok();
        }
    }
}

/// Gives the image a longer header, unknown compatible and autoclear bits, and an unknown extension before the end.
fn change(scratch: &Scratch, name: &str) {
    let path = scratch.join(name);
    let extensions = peek(&path, 112, 1024);
    patch(&path, 80, &(1u64 << 40).to_be_bytes());
    patch(&path, 88, &(1u64 << 41).to_be_bytes());
    patch(&path, 100, &136u32.to_be_bytes());
    patch(&path, 112, b"a tail of 24 bytes here.");
    let mut area = vec![0x12, 0x34, 0x56, 0x78, 0, 0, 0, 5];
    area.extend(b"what?\0\0\0");
    area.extend(extensions);
    patch(&path, 136, &area);
}
