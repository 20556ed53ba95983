//! What is measured.

use std::path::{Path, PathBuf};

use diskmill_testkit::scratch::{allocated, len};
use diskmill_testkit::{Scratch, oracle};

/// The files the cases work on.
#[derive(Debug)]
pub struct Files {
    /// The disk, raw.
    pub source: PathBuf,
    /// The disk as qcow2, and compressed, all by `qemu-img`.
    pub qcow2: PathBuf,
    /// Compressed with zlib.
    pub zlib: PathBuf,
    /// Compressed with zstd.
    pub zstd: PathBuf,
    /// The disk as vmdk, sparse.
    pub vmdk: PathBuf,
    /// The disk as a vmdk stream.
    pub stream: PathBuf,
    /// The disk encrypted.
    pub luks: PathBuf,
    /// A disk of 2 TiB with all of its tables and nothing else.
    pub tables: PathBuf,
    /// An overlay with all of the disk, over whatever the output is.
    pub overlay: PathBuf,
    /// A copy of it that is merged.
    pub top: PathBuf,
    /// Where outputs go.
    pub output: PathBuf,
}

impl Files {
    /// Makes the inputs from `source`.
    pub fn prepare(scratch: &Scratch, source: PathBuf) -> Self {
        let files = Self {
            source,
            qcow2: scratch.join("source.qcow2"),
            zlib: scratch.join("zlib.qcow2"),
            zstd: scratch.join("zstd.qcow2"),
            vmdk: scratch.join("source.vmdk"),
            stream: scratch.join("stream.vmdk"),
            luks: scratch.join("source.luks"),
            tables: scratch.join("tables.qcow2"),
            overlay: scratch.join("overlay.qcow2"),
            top: scratch.join("top.qcow2"),
            output: scratch.join("output"),
        };
        oracle::create(&files.tables, "qcow2", "preallocation=metadata", "2T");
        let best = ["-m", "16", "-W"];
        oracle::convert(best, &files.source, "raw", &files.qcow2, "qcow2");
        oracle::convert(
            best.into_iter().chain(["-c"]),
            &files.source,
            "raw",
            &files.zlib,
            "qcow2",
        );
        std::fs::copy(&files.qcow2, &files.overlay).expect("copy the disk");
        oracle::qemu_img()
            .words("rebase -u -f qcow2 -b output -F qcow2")
            .arg(&files.overlay)
            .ok();
        let zstd = ["-c", "-o", "compression_type=zstd"];
        oracle::convert(
            best.into_iter().chain(zstd),
            &files.source,
            "raw",
            &files.zstd,
            "qcow2",
        );
        oracle::convert(best, &files.source, "raw", &files.vmdk, "vmdk");
        let stream = ["-o", "subformat=streamOptimized"];
        oracle::convert(stream, &files.source, "raw", &files.stream, "vmdk");
        let luks = best.into_iter().chain(SECRET).chain(["-o", LUKS_OPTIONS]);
        oracle::convert(luks, &files.source, "raw", &files.luks, "luks");
        files
    }

    /// Makes the output an empty image, and an overlay over it that holds the disk.
    fn for_commit(&self) {
        let size = len(&self.source).to_string();
        oracle::create(&self.output, "qcow2", "", &size);
        std::fs::copy(&self.overlay, &self.top).expect("copy the overlay");
    }

    /// Makes the output an empty overlay over the disk.
    fn for_rebase(&self) {
        oracle::create_overlay(&self.output, "", &self.qcow2, "qcow2", None);
    }

    /// Demands that QEMU reads the disk from the output, which is in `format`.
    pub fn prove_output(&self, format: &str) {
        if format != "luks" {
            return oracle::assert_identical(&self.source, "raw", &self.output, format);
        }
        oracle::qemu_img()
            .arg("compare")
            .args(SECRET)
            .args([
                "--image-opts",
                &format!("driver=raw,file.filename={}", self.source.display()),
            ])
            .arg(luks_image(&self.output))
            .ok();
    }

    /// Removes the output.
    pub fn clear_output(&self) {
        if self.output.exists() {
            std::fs::remove_file(&self.output).expect("remove the output");
        }
    }

    /// What the output takes: its length, or for sparse files its blocks.
    pub fn output_bytes(&self) -> u64 {
        len(&self.output).min(allocated(&self.output))
    }
}

/// The passphrase of encrypted disks.
const SECRET: [&str; 2] = ["--object", "secret,id=key,data=bench"];
/// How they are made. To derive the key from the passphrase takes next to no time: it would be the same for both.
const LUKS_OPTIONS: &str = "key-secret=key,iter-time=10";

/// An encrypted disk, for `--image-opts`.
fn luks_image(path: &Path) -> String {
    format!("driver=luks,file.filename={},key-secret=key", path.display())
}

/// A command both tools run.
#[derive(Debug)]
pub struct Case {
    /// Its name.
    pub name: &'static str,
    /// The ratio to reach.
    pub goal: f64,
    /// Runs that make one sample: short commands need several.
    pub repeat: u32,
    /// Our arguments: what a user types, no more.
    pub ours: Vec<String>,
    /// `qemu-img`'s: its best flags.
    pub theirs: Vec<String>,
    /// The format of what is written, if something is.
    pub output_format: Option<&'static str>,
    /// What is made ready before each run.
    pub setup: fn(&Files),
}

/// All cases.
pub fn all(files: &Files) -> Vec<Case> {
    let output = &files.output;
    let zstd = ["-c", "-o", "compression_type=zstd"];
    vec![
        convert("raw -> qcow2", 0.7, &[], &files.source, "raw", output, "qcow2"),
        convert("qcow2 -> raw", 0.7, &[], &files.qcow2, "qcow2", output, "raw"),
        convert(
            "raw -> qcow2 -c zlib",
            0.3,
            &["-c"],
            &files.source,
            "raw",
            output,
            "qcow2",
        ),
        convert(
            "raw -> qcow2 -c zstd",
            0.7,
            &zstd,
            &files.source,
            "raw",
            output,
            "qcow2",
        ),
        convert("raw -> vmdk", 0.8, &[], &files.source, "raw", output, "vmdk"),
        convert(
            "raw -> vmdk stream",
            0.2,
            &["-o", "subformat=streamOptimized"],
            &files.source,
            "raw",
            output,
            "vmdk",
        ),
        convert("vmdk -> qcow2", 0.8, &[], &files.vmdk, "vmdk", output, "qcow2"),
        convert(
            "vmdk stream -> qcow2",
            0.4,
            &[],
            &files.stream,
            "vmdk",
            output,
            "qcow2",
        ),
        convert("raw -> vdi", 0.8, &[], &files.source, "raw", output, "vdi"),
        convert("zlib qcow2 -> raw", 0.6, &[], &files.zlib, "qcow2", output, "raw"),
        convert("zstd qcow2 -> raw", 0.6, &[], &files.zstd, "qcow2", output, "raw"),
        convert(
            "raw -> luks",
            0.25,
            &[SECRET[0], SECRET[1], "-o", LUKS_OPTIONS],
            &files.source,
            "raw",
            output,
            "luks",
        ),
        from_luks("luks -> raw", 0.25, &files.luks, output),
        Case {
            output_format: Some("qcow2"),
            setup: Files::for_commit,
            ..inspect("commit", 0.8, 1, "commit -q -d -f qcow2", &[&files.top])
        },
        Case {
            output_format: Some("qcow2"),
            setup: Files::for_rebase,
            ..inspect("rebase to none", 0.8, 1, "rebase -f qcow2 --backing=", &[output])
        },
        inspect(
            "compare raw qcow2",
            0.6,
            1,
            "compare -f raw -F qcow2",
            &[&files.source, &files.qcow2],
        ),
        inspect(
            "info qcow2",
            0.5,
            20,
            "info --output=json -f qcow2",
            &[&files.qcow2],
        ),
        inspect("map qcow2", 0.6, 5, "map --output=json -f qcow2", &[&files.qcow2]),
        inspect("check qcow2", 0.5, 5, "check -f qcow2", &[&files.qcow2]),
        inspect(
            "check 2 TiB of tables",
            0.5,
            1,
            "check -f qcow2",
            &[&files.tables],
        ),
    ]
}

fn convert(
    name: &'static str,
    goal: f64,
    extra: &[&str],
    source: &Path,
    source_format: &str,
    output: &Path,
    output_format: &'static str,
) -> Case {
    let command = |flags: &[&str]| {
        let mut args = vec!["convert".to_owned()];
        args.extend(flags.iter().chain(extra).map(|arg| (*arg).to_owned()));
        args.extend(["-f", source_format, "-O", output_format].map(str::to_owned));
        args.extend([source, output].map(|path| path.display().to_string()));
        args
    };
    Case {
        name,
        goal,
        repeat: 1,
        ours: command(&[]),
        theirs: command(&["-m", "16", "-W"]),
        output_format: Some(output_format),
        setup: |_| {},
    }
}

/// The encrypted disk `source` converted to raw.
fn from_luks(name: &'static str, goal: f64, source: &Path, output: &Path) -> Case {
    let command = |flags: &[&str]| {
        let mut args = vec!["convert".to_owned()];
        args.extend(flags.iter().chain(&SECRET).map(|arg| (*arg).to_owned()));
        args.extend(["--image-opts".to_owned(), luks_image(source)]);
        args.extend(["-O", "raw"].map(str::to_owned));
        args.push(output.display().to_string());
        args
    };
    Case {
        name,
        goal,
        repeat: 1,
        ours: command(&[]),
        theirs: command(&["-m", "16", "-W"]),
        output_format: Some("raw"),
        setup: |_| {},
    }
}

fn inspect(name: &'static str, goal: f64, repeat: u32, command: &str, files: &[&Path]) -> Case {
    let args: Vec<String> = command
        .split(' ')
        .map(str::to_owned)
        .chain(files.iter().map(|path| path.display().to_string()))
        .collect();
    Case {
        name,
        goal,
        repeat,
        ours: args.clone(),
        theirs: args,
        output_format: None,
        setup: |_| {},
    }
}
