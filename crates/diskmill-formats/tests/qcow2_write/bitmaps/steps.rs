//! The same steps by QEMU's tools on one copy and by us on another.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use diskmill_core::{GuestOffset, LayerMut, NewBitmap, ZeroHow};
use diskmill_testkit::random::{seed, soak};
use diskmill_testkit::sparse_random::mix;
use diskmill_testkit::{Scratch, oracle};

use super::super::images::{self, Disks};
use super::stored;

/// Something that is done to an image.
#[derive(Clone, Debug)]
pub enum Step {
    Write(u64, u64),
    Zero(u64, u64),
    Discard(u64, u64),
    Add(String, Option<u64>, bool),
    Remove(String),
    Clear(String),
    Enable(String),
    Disable(String),
    Merge(String, String),
    Resize(u64),
}

/// Steps that a seed stands for, on a disk of `size` bytes at first.
pub fn random(seed: u64, count: usize, size: u64, granularities: &[u64]) -> Vec<Step> {
    let mut state = mix(seed);
    let mut next = |below: u64| {
        state = mix(state);
        state % below
    };
    let mut size = size;
    let mut steps = Vec::new();
    for number in 0..3 {
        let granularity = granularities[next(granularities.len() as u64) as usize];
        steps.push(Step::Add(format!("b{number}"), Some(granularity), number < 2));
    }
    let mut names = 3;
    while steps.len() < count {
        let name = format!("b{}", next(names));
        let at = next(size);
        let len = (1 + next(size / 5)).min(size - at);
        steps.push(match next(16) {
            0..=3 => Step::Write(at, len),
            4 | 5 => Step::Zero(at, len),
            6 | 7 => Step::Discard(at, len),
            8 => Step::Clear(name),
            9 => Step::Enable(name),
            10 => Step::Disable(name),
            11 | 12 => Step::Merge(name, format!("b{}", next(names))),
            13 => Step::Remove(name),
            14 => {
                names += 1;
                let granularity = granularities[next(granularities.len() as u64) as usize];
                Step::Add(format!("b{}", names - 1), Some(granularity), next(3) > 0)
            }
            _ => {
                size = (size / 2 + next(size)).next_multiple_of(512).max(8192);
                Step::Resize(size)
            }
        });
    }
    steps
}

/// Does a step with QEMU's tools. Whether it was done.
fn theirs(path: &Path, step: &Step) -> bool {
    let bitmap = |action: &[&str], name: &str| {
        let dir = path.parent().unwrap();
        let done = oracle::qemu_img()
            .dir(dir)
            .arg("bitmap")
            .args(action)
            .arg(path)
            .arg(name)
            .finish();
        done.code == Some(0)
    };
    let io = |command: String| {
        oracle::io(path, "qcow2", [command]);
        true
    };
    match step {
        Step::Write(at, len) => io(format!("write -P 3 {at} {len}")),
        Step::Zero(at, len) => io(format!("write -z {at} {len}")),
        Step::Discard(at, len) => io(format!("discard {at} {len}")),
        Step::Add(name, granularity, enabled) => {
            let mut action = vec!["--add".to_owned()];
            if let Some(granularity) = granularity {
                action.extend(["-g".to_owned(), granularity.to_string()]);
            }
            if !enabled {
                action.push("--disable".to_owned());
            }
            let action: Vec<&str> = action.iter().map(String::as_str).collect();
            bitmap(&action, name)
        }
        Step::Remove(name) => bitmap(&["--remove"], name),
        Step::Clear(name) => bitmap(&["--clear"], name),
        Step::Enable(name) => bitmap(&["--enable"], name),
        Step::Disable(name) => bitmap(&["--disable"], name),
        Step::Merge(name, from) => bitmap(&["--merge", from], name),
        Step::Resize(size) => {
            let size = size.to_string();
            let run = oracle::qemu_img().dir(path.parent().unwrap());
            run.args(["resize", "-q", "--shrink", "-f", "qcow2"])
                .arg(path)
                .arg(size)
                .ok();
            true
        }
    }
}

/// Does a step with the library. Whether it was done.
pub fn ours(layer: &Arc<dyn LayerMut>, step: &Step) -> bool {
    let below = Default::default();
    let bitmaps = layer.bitmaps().expect("bitmaps");
    let range = |at: u64, len: u64| GuestOffset::new(at)..GuestOffset::new(at + len);
    match step {
        Step::Write(at, len) => {
            let bytes = vec![3; *len as usize];
            layer.write_at(GuestOffset::new(*at), &bytes, &below).unwrap();
            true
        }
        Step::Zero(at, len) => {
            layer
                .zero(range(*at, *len), ZeroHow::KeepAllocated, &below)
                .unwrap();
            true
        }
        Step::Discard(at, len) => {
            layer.discard(range(*at, *len)).unwrap();
            true
        }
        Step::Add(name, granularity, enabled) => {
            let new = NewBitmap {
                name: name.clone(),
                granularity: *granularity,
                enabled: *enabled,
            };
            bitmaps.add(&new).is_ok()
        }
        Step::Remove(name) => bitmaps.remove(name).is_ok(),
        Step::Clear(name) => bitmaps.clear(name).is_ok(),
        Step::Enable(name) => bitmaps.enable(name).is_ok(),
        Step::Disable(name) => bitmaps.disable(name).is_ok(),
        Step::Merge(name, from) => match layer.dirty(from) {
            Ok(mut runs) => bitmaps.merge(name, &mut *runs).is_ok(),
            Err(_) => false,
        },
        Step::Resize(size) => {
            layer.resize(*size, &below).unwrap();
            true
        }
    }
}

/// Two copies of an image, each on disk with its data file.
struct Pair {
    scratches: [Scratch; 2],
    data: bool,
}

impl Pair {
    fn new(options: &str, size: u64) -> Self {
        let scratches = [Scratch::new(), Scratch::new()];
        let data = options.contains("DATA");
        for scratch in &scratches {
            let options = options.replace("DATA", "image.data");
            let path = scratch.join("image.qcow2");
            oracle::create(&path, "qcow2", &options, &size.to_string());
        }
        Self { scratches, data }
    }

    fn path(&self, which: usize) -> PathBuf {
        self.scratches[which].join("image.qcow2")
    }

    fn names(&self) -> &'static [&'static str] {
        if self.data {
            &["image.qcow2", "image.data"]
        } else {
            &["image.qcow2"]
        }
    }

    fn read(&self, which: usize) -> Vec<Vec<u8>> {
        let read = |name: &&str| std::fs::read(self.scratches[which].join(name)).expect("read");
        self.names().iter().map(read).collect()
    }

    fn write(&self, which: usize, files: &[Vec<u8>]) {
        for (name, bytes) in self.names().iter().zip(files) {
            self.scratches[which].file(name, bytes);
        }
    }

    /// Exchanges the copies.
    fn swap(&self) {
        let (first, second) = (self.read(0), self.read(1));
        self.write(0, &second);
        self.write(1, &first);
    }

    /// Copy 0 by QEMU, copy 1 by us.
    fn play(&self, steps: &[Step], context: &str) {
        let disks: Disks = images::memory(&self.read(1));
        let layer = images::open(&disks).expect("open");
        for (number, step) in steps.iter().enumerate() {
            let context = format!("{context}, step {number} {step:?}");
            assert_eq!(ours(&layer, step), theirs(&self.path(0), step), "{context}");
            if number % 4 == 3 || number + 1 == steps.len() {
                layer.flush().expect("flush");
                let expected = stored(&self.read(0)[0]);
                assert_eq!(stored(&images::bytes(&disks)[0]), expected, "{context}");
            }
        }
        drop(layer);
        let files = images::bytes(&disks);
        self.write(1, &files);
        images::assert_clean(&files);
        for which in 0..2 {
            oracle::assert_clean(self.path(which), "qcow2");
        }
        oracle::assert_identical(self.path(0), "qcow2", self.path(1), "qcow2");
        // QEMU reads all of our bits and writes them back.
        let expected = stored(&files[0]);
        oracle::io(self.path(1), "qcow2", ["flush"]);
        assert_eq!(stored(&self.read(1)[0]), expected, "{context}");
    }
}

#[test]
fn the_same_steps_leave_the_same_bits_as_qemu() {
    const FINE: &[u64] = &[512, 1024, 4096, 65536];
    const COARSE: &[u64] = &[4096, 65536, 1 << 20, 1 << 31];
    let kinds = [
        ("cluster_size=512", 300 << 10, FINE),
        ("cluster_size=512,refcount_bits=1", 5 << 20, FINE),
        ("cluster_size=4k,refcount_bits=64", (1 << 20) + 512, FINE),
        ("", 3 << 20, COARSE),
        ("cluster_size=2M", 9 << 20, COARSE),
        ("extended_l2=on,cluster_size=16k,refcount_bits=2", 700 << 10, FINE),
        ("data_file=DATA,cluster_size=4k", 600 << 10, FINE),
        ("data_file=DATA,data_file_raw=on", 600 << 10, COARSE),
    ];
    let seed = seed();
    let count = soak() as usize;
    for (index, (options, size, granularities)) in kinds.into_iter().enumerate() {
        let pair = Pair::new(options, size);
        let steps = random(seed + index as u64, 14 * count, size, granularities);
        let (first, second) = steps.split_at(7 * count);
        let context = format!("{options}, DISKMILL_SEED={seed}");
        pair.play(first, &context);
        pair.swap();
        pair.play(second, &format!("{context}, on the other's result"));
    }
}
