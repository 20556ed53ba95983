//! The command as people and scripts meet it: its help, its words, its exit codes.

use std::path::Path;

use diskmill_testkit::{Finished, Run, Scratch, oracle};

mod bitmap;
mod commands;
mod drop_in;
mod help;
mod native;
mod objects;
mod terminal;

/// Our command under the name `qemu-img`.
fn ours(dir: impl AsRef<Path>) -> Run {
    Run::new(env!("CARGO_BIN_EXE_diskmill"))
        .named("qemu-img")
        .dir(dir)
}

/// Our command under its own name.
fn diskmill(dir: impl AsRef<Path>) -> Run {
    Run::new(env!("CARGO_BIN_EXE_diskmill"))
        .named("diskmill")
        .dir(dir)
        .env("COLUMNS", "100")
}

/// The real tool.
fn theirs(dir: impl AsRef<Path>) -> Run {
    oracle::qemu_img().named("qemu-img").dir(dir)
}

/// Two folders with the same images in them, for one tool each.
struct Twins {
    ours: Scratch,
    theirs: Scratch,
}

impl Twins {
    /// Folders with the images that [`images`] makes.
    fn new() -> Self {
        let twins = Self {
            ours: Scratch::new(),
            theirs: Scratch::new(),
        };
        images(&twins.ours);
        for entry in std::fs::read_dir(twins.ours.path()).unwrap() {
            let entry = entry.unwrap();
            let name = entry.file_name();
            Run::new("cp")
                .arg("--sparse=always")
                .arg(entry.path())
                .arg(twins.theirs.join(name))
                .ok();
        }
        twins
    }

    /// Runs both, each in its folder, and demands the same messages, exit code and output, apart from the space that
    /// files take on the host.
    fn same<S: AsRef<std::ffi::OsStr> + Copy>(&self, args: &[S]) -> Finished {
        let our = ours(self.ours.path()).args(args).finish();
        let their = theirs(self.theirs.path()).args(args).finish();
        assert!(
            our.code == their.code
                && without_disk_sizes(&our.out()) == without_disk_sizes(&their.out())
                && our.err() == their.err(),
            "not the same\n--- ours\n{our}\n--- qemu-img's\n{their}"
        );
        our
    }

    /// Runs both on the same files, which neither changes, and demands the same in all.
    fn same_sight<S: AsRef<std::ffi::OsStr> + Copy>(&self, args: &[S]) {
        let our = ours(self.ours.path()).args(args).finish();
        let their = theirs(self.ours.path()).args(args).finish();
        assert!(
            our.code == their.code && our.out() == their.out() && our.err() == their.err(),
            "not the same\n--- ours\n{our}\n--- qemu-img's\n{their}"
        );
    }

    /// The same for each line of `lines`.
    fn same_sights(&self, lines: &str) {
        for line in lines.lines().map(str::trim).filter(|line| !line.is_empty()) {
            let words: Vec<&str> = line.split_whitespace().collect();
            self.same_sight(&words);
        }
    }

    /// The same for a line without odd names.
    fn same_line(&self, line: &str) -> Finished {
        let words: Vec<&str> = line.split_whitespace().collect();
        self.same(&words)
    }

    /// The same for each line of `lines`.
    fn same_lines(&self, lines: &str) {
        for line in lines.lines().map(str::trim).filter(|line| !line.is_empty()) {
            self.same_line(line);
        }
    }
}

/// The text without the lines that tell how much of a disk is in use.
fn without_disk_sizes(text: &str) -> Vec<&str> {
    let tells = |line: &&str| !line.contains("disk size: ") && !line.contains("\"actual-size\": ");
    text.split_inclusive('\n').filter(tells).collect()
}

/// Small images of every sort, made by the real tools.
fn images(scratch: &Scratch) {
    let dir = scratch.path();
    let make = |line: &str| theirs(dir).words(line).ok();
    let io = |line: &str| Run::new("qemu-io").dir(dir).words(line);
    make("create -q a.raw 1M");
    io("-f raw a.raw -c").arg("write -P 1 0 100k").ok();
    make("create -q -f qcow2 a.qcow2 1M");
    io("-f qcow2 a.qcow2 -c").arg("write -P 1 0 200k").ok();
    make("create -q -f qcow2 -b a.qcow2 -F qcow2 overlay.qcow2");
    io("-f qcow2 overlay.qcow2 -c").arg("write -P 2 512k 100k").ok();
    make("snapshot -c one overlay.qcow2");
    make("convert -c -O qcow2 a.qcow2 packed.qcow2");
    make("create -q -f qcow2 -o data_file=data.raw data.qcow2 1M");
    make("create -q -f qcow2 -o compat=0.10 old.qcow2 3M");
    make(
        "create -q -f qcow2 -o \
         extended_l2=on,compression_type=zstd,lazy_refcounts=on,refcount_bits=8,cluster_size=16k rich.qcow2 5M",
    );
    make("bitmap --add rich.qcow2 b0");
    make("bitmap --add --disable -g 32k rich.qcow2 b1");
    make("create -q zero.raw 1M");
    make("create -q zero2.raw 2M");
    make("create -q -f qcow2 zero.qcow2 1M");
    make("create -q -f qcow2 -u -b missing -F raw lost.qcow2 1M");
    scratch.hole("odd.raw", 3000);
    scratch.file("empty.raw", b"");
    let mut longer = std::fs::read(dir.join("a.raw")).unwrap();
    longer.resize(2 << 20, 0);
    longer[1_500_000] = 1;
    scratch.file("longer.raw", &longer);
}
