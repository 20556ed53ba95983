//! An image to be tampered with.

use std::path::{Path, PathBuf};

use diskmill_core::{GuestOffset, OpenSpec};
use diskmill_testkit::scratch::{patch, peek};
use diskmill_testkit::{Scratch, oracle};

use super::{layer, text};

/// An image of 1 GiB in clusters of 64 KiB, with data in its first MiB.
#[derive(Debug)]
pub struct Victim {
    /// Where it is, and what else belongs to it.
    pub dir: Scratch,
    /// The image.
    pub path: PathBuf,
}

impl Victim {
    /// Made by qemu-img with `options`, in memory.
    pub fn new(options: &str) -> Self {
        let dir = Scratch::beneath("/dev/shm");
        let path = dir.join("victim.qcow2");
        oracle::create(&path, "qcow2", options, "1G");
        oracle::io(&path, "qcow2", ["write -P 1 0 1M"]);
        Self { dir, path }
    }

    /// With more data at 40 MiB, in the same L2 table.
    pub fn with_two_runs(options: &str) -> Self {
        let victim = Self::new(options);
        victim.io("write -P 2 40M 128k");
        victim
    }

    /// With a snapshot as well, and data written after it.
    pub fn with_snapshot(options: &str) -> Self {
        let victim = Self::with_two_runs(options);
        victim.img(&["snapshot", "-c", "one"]);
        victim.io("write -P 3 64k 64k");
        victim
    }

    /// With a dirty bitmap that says something.
    pub fn with_bitmap(options: &str) -> Self {
        let victim = Self::with_two_runs(options);
        oracle::qemu_img()
            .args(["bitmap", "--add", "-g", "64k"])
            .arg(&victim.path)
            .arg("b0")
            .ok();
        victim.io("write -P 4 128k 64k");
        victim
    }

    /// A MiB of compressed text.
    pub fn compressed(kind: &str) -> Self {
        let victim = Self::new("");
        let source = victim.path.with_extension("raw");
        std::fs::write(&source, vec![b'a'; 1 << 20]).unwrap();
        let option = format!("compression_type={kind}");
        oracle::convert(["-c", "-o", &option], &source, "raw", &victim.path, "qcow2");
        victim
    }

    /// Has qemu-io do something to it.
    pub fn io(&self, command: &str) {
        oracle::io(&self.path, "qcow2", [command]);
    }

    /// Has qemu-img do something to it.
    pub fn img(&self, args: &[&str]) {
        oracle::qemu_img().args(args).arg(&self.path).ok();
    }

    /// A copy of its file beside it.
    pub fn copy(&self, name: &str) -> PathBuf {
        let copy = self.dir.join(name);
        std::fs::copy(&self.path, &copy).unwrap();
        copy
    }

    pub fn u64(&self, at: u64) -> u64 {
        u64::from_be_bytes(peek(&self.path, at, 8).try_into().unwrap())
    }

    pub fn u32(&self, at: u64) -> u32 {
        u32::from_be_bytes(peek(&self.path, at, 4).try_into().unwrap())
    }

    pub fn set(&self, at: u64, value: u64) {
        patch(&self.path, at, &value.to_be_bytes());
    }

    pub fn set_u32(&self, at: u64, value: u32) {
        patch(&self.path, at, &value.to_be_bytes());
    }

    /// Sets bits of a word.
    pub fn or(&self, at: u64, bits: u64) {
        self.set(at, self.u64(at) | bits);
    }

    /// Clears the highest bit of a word: the COPIED flag of a table entry.
    pub fn uncopy(&self, at: u64) {
        self.set(at, self.u64(at) & !(1 << 63));
    }

    /// Where the active L1 table is.
    pub fn l1(&self) -> u64 {
        self.u64(40)
    }

    /// Where the first L2 table is.
    pub fn l2(&self) -> u64 {
        self.u64(self.l1()) & 0x00ff_ffff_ffff_fe00
    }

    pub fn refcount_table(&self) -> u64 {
        self.u64(48)
    }

    pub fn refcount_block(&self) -> u64 {
        self.u64(self.refcount_table())
    }

    pub fn snapshot_table(&self) -> u64 {
        self.u64(64)
    }

    /// Where the data of the bitmaps extension is.
    pub fn bitmaps_extension(&self) -> u64 {
        let header = peek(&self.path, 0, 4096);
        let place = header
            .windows(4)
            .position(|word| word == 0x2385_2875_u32.to_be_bytes());
        place.expect("a bitmaps extension") as u64 + 8
    }

    pub fn bitmap_directory(&self) -> u64 {
        self.u64(self.bitmaps_extension() + 16)
    }

    /// Where the table of the first bitmap is.
    pub fn bitmap_table(&self) -> u64 {
        self.u64(self.bitmap_directory())
    }

    /// What opening and reading the first cluster fails with.
    pub fn trouble(&self) -> String {
        trouble_of(&self.path)
    }

    pub fn assert_trouble(&self, expected: &str) {
        let found = self.trouble();
        assert!(found.contains(expected), "{found}\n{expected}");
    }
}

fn trouble_of(path: &Path) -> String {
    let layer = match layer(path, "qcow2", &OpenSpec::default()) {
        Ok(layer) => layer,
        Err(error) => return text(&error),
    };
    let read = layer
        .map(GuestOffset::ZERO, 512)
        .and_then(|_| layer.read_at(GuestOffset::ZERO, &mut [0; 512]));
    match read {
        Ok(()) => panic!("it reads"),
        Err(error) => text(&error),
    }
}
