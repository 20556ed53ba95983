//! A disk shaped like a virtual machine's, made from a seed.
//!
//! Every byte is a function of the seed and its position, so the disk costs nothing until it is read and any reader
//! can be checked at any place. Data is clustered as file systems cluster it: long stretches never touched, stretches
//! of zeros that were written, text that compresses well, structures that compress a little, and noise that does not.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// The step in which the kind of data changes, in bytes.
pub const GRAIN: u64 = 4096;

/// The step in which the character of the disk changes, in bytes.
const REGION: u64 = 128 << 10;

/// What a grain holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Never written: a hole in a raw file.
    Hole,
    /// Zeros that were written.
    Zeros,
    /// The same short text again and again, with small changes.
    Text,
    /// Numbers that resemble one another.
    Records,
    /// Does not compress.
    Noise,
}

/// A disk made from a seed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SparseRandom {
    seed: u64,
    size: u64,
}

/// Where a reader saw something else than the disk holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// The first guest byte that differs.
    pub at: u64,
    /// What the disk holds there.
    pub expected: u8,
    /// What the reader saw.
    pub found: u8,
    /// The kind of the grain it lies in.
    pub kind: Kind,
}

impl SparseRandom {
    /// The disk of `size` bytes that belongs to `seed`.
    pub fn new(seed: u64, size: u64) -> Self {
        Self { seed, size }
    }

    /// Its size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// What the grain around `at` holds.
    pub fn kind(&self, at: u64) -> Kind {
        if at < GRAIN {
            // A disk starts with something, however small it is.
            return Kind::Records;
        }
        let region = self.number(1, at / REGION);
        let grain = self.number(2, at / GRAIN);
        // Neighbouring grains go together in runs of 1 to 16.
        let run = self.number(3, (at / (GRAIN << ((region >> 8) & 3))) ^ region);
        match region % 8 {
            0..=2 => Kind::Hole,
            3 if grain.is_multiple_of(64) => Kind::Records,
            3 => Kind::Zeros,
            4 => Kind::Noise,
            _ => match run % 8 {
                0 | 1 => Kind::Hole,
                2 => Kind::Zeros,
                3 | 4 => Kind::Text,
                5 | 6 => Kind::Records,
                _ => Kind::Noise,
            },
        }
    }

    /// Fills `buf` with the bytes from `at`; past the end of the disk they are zero.
    pub fn read_at(&self, at: u64, buf: &mut [u8]) {
        let mut grain = vec![0; GRAIN as usize];
        let mut done = 0;
        while done < buf.len() {
            let here = at + done as u64;
            let start = here - here % GRAIN;
            let skip = (here - start) as usize;
            let len = (grain.len() - skip).min(buf.len() - done);
            self.fill(start, &mut grain);
            buf[done..done + len].copy_from_slice(&grain[skip..skip + len]);
            done += len;
        }
        let past = (at + buf.len() as u64).saturating_sub(self.size.max(at)) as usize;
        let inside = buf.len() - past;
        buf[inside..].fill(0);
    }

    fn fill(&self, start: u64, grain: &mut [u8]) {
        let mut state = self.number(4, start / GRAIN);
        match self.kind(start) {
            Kind::Hole | Kind::Zeros => grain.fill(0),
            Kind::Noise => {
                for word in grain.chunks_exact_mut(8) {
                    state = mix(state);
                    word.copy_from_slice(&state.to_le_bytes());
                }
            }
            Kind::Records => {
                for (index, record) in grain.chunks_exact_mut(16).enumerate() {
                    if index.is_multiple_of(4) {
                        state = mix(state);
                    }
                    let (a, b) = record.split_at_mut(8);
                    a.copy_from_slice(&(start + index as u64).to_be_bytes());
                    b.copy_from_slice(&(state & 0x00ff_00ff_0000_ffff).to_be_bytes());
                }
            }
            Kind::Text => {
                let mut text = String::new();
                while text.len() < grain.len() {
                    state = mix(state);
                    const WORDS: [&str; 8] = [
                        "disk ", "mill ", "grain ", "cluster ", "extent ", "layer ", "\n", "of ",
                    ];
                    text.push_str(WORDS[(state % 8) as usize]);
                    if state >> 8 & 31 == 0 {
                        text.push_str(&(state >> 40).to_string());
                    }
                }
                grain.copy_from_slice(&text.as_bytes()[..grain.len()]);
            }
        }
    }

    /// Compares what a reader saw from `at`.
    pub fn verify(&self, at: u64, found: &[u8]) -> Result<(), Mismatch> {
        let mut expected = vec![0; found.len()];
        self.read_at(at, &mut expected);
        if expected == found {
            return Ok(());
        }
        let index = expected
            .iter()
            .zip(found)
            .position(|(expected, found)| expected != found)
            .unwrap_or_default();
        Err(Mismatch {
            at: at + index as u64,
            expected: expected[index],
            found: found[index],
            kind: self.kind(at + index as u64),
        })
    }

    /// All bytes of the disk. For disks that fit in memory.
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(self.size).expect("a disk that fits in memory")];
        self.read_at(0, &mut bytes);
        bytes
    }

    /// Writes the disk as a raw file: holes as holes, zeros as written zeros.
    pub fn write_raw(&self, path: impl AsRef<Path>) {
        let path = path.as_ref();
        let file = File::create(path).unwrap_or_else(|error| panic!("create {}: {error}", path.display()));
        file.set_len(self.size).expect("set the length");
        let mut run: Vec<u8> = Vec::new();
        let mut at = 0;
        while at < self.size {
            let len = GRAIN.min(self.size - at);
            if self.kind(at) != Kind::Hole {
                let old = run.len();
                run.resize(old + len as usize, 0);
                self.read_at(at, &mut run[old..]);
            }
            let ends = at + len == self.size || self.kind(at + len) == Kind::Hole || run.len() >= 1 << 20;
            at += len;
            if ends && !run.is_empty() {
                file.write_all_at(&run, at - run.len() as u64)
                    .expect("write a run");
                run.clear();
            }
        }
    }

    /// Demands that a raw file holds this disk: its length rounded up to 512, the rest zero.
    pub fn assert_raw(&self, path: impl AsRef<Path>) {
        let path = path.as_ref();
        let file = File::open(path).unwrap_or_else(|error| panic!("open {}: {error}", path.display()));
        let len = file.metadata().expect("the length").len();
        assert!(
            len == self.size || len == self.size.next_multiple_of(512),
            "{} has {len} bytes, the disk {}",
            path.display(),
            self.size
        );
        let mut buf = vec![0; 1 << 20];
        let mut at = 0;
        while at < len {
            let step = (len - at).min(buf.len() as u64);
            let found = &mut buf[..step as usize];
            file.read_exact_at(found, at).expect("read the raw file");
            if let Err(mismatch) = self.verify(at, found) {
                panic!("{} (seed {}): {mismatch:?}", path.display(), self.seed);
            }
            at += step;
        }
    }

    fn number(&self, stream: u64, index: u64) -> u64 {
        mix(mix(self.seed ^ stream.rotate_left(56)).wrapping_add(index))
    }
}

/// A step of SplitMix64: every number leads to another that looks random.
pub fn mix(state: u64) -> u64 {
    let mut z = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Scratch;
    use crate::scratch::allocated;

    #[test]
    fn reads_the_same_at_any_place() {
        let disk = SparseRandom::new(1, 24 * REGION + 777);
        let whole = disk.bytes();
        for (at, len) in [(0, 1), (4095, 2), (REGION - 3, 9000), (24 * REGION, 777)] {
            let mut part = vec![1; len];
            disk.read_at(at, &mut part);
            assert_eq!(part, whole[at as usize..at as usize + len], "{at} {len}");
        }
        let mut past = [1; 32];
        disk.read_at(disk.size() - 16, &mut past);
        assert_eq!(past[16..], [0; 16]);
    }

    #[test]
    fn has_every_kind() {
        let disk = SparseRandom::new(7, 512 * REGION);
        let kinds: Vec<Kind> = (0..disk.size() / GRAIN)
            .map(|grain| disk.kind(grain * GRAIN))
            .collect();
        for kind in [Kind::Hole, Kind::Zeros, Kind::Text, Kind::Records, Kind::Noise] {
            let share = kinds.iter().filter(|found| **found == kind).count() as f64 / kinds.len() as f64;
            assert!(share > 0.02, "{kind:?} {share}");
        }
    }

    #[test]
    fn a_raw_file_holds_it_and_is_sparse() {
        let scratch = Scratch::new();
        let disk = SparseRandom::new(7, 128 * REGION + 512);
        let path = scratch.join("a.raw");
        disk.write_raw(&path);
        disk.assert_raw(&path);
        assert!(allocated(&path) < disk.size());
    }

    #[test]
    #[should_panic(expected = "Mismatch { at: 5000")]
    fn one_wrong_byte_is_found() {
        let scratch = Scratch::new();
        let disk = SparseRandom::new(7, 16 * REGION);
        let path = scratch.join("a.raw");
        disk.write_raw(&path);
        let mut byte = [0];
        disk.read_at(5000, &mut byte);
        crate::scratch::patch(&path, 5000, &[!byte[0]]);
        disk.assert_raw(&path);
    }
}
