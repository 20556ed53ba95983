//! A valid qcow2 image in memory, to be patched by field.

use std::path::Path;

use diskmill_testkit::sparse_random::SparseRandom;
use diskmill_testkit::{Scratch, oracle};

use crate::tools::theirs;

/// Host offsets in table entries: bits 9 to 55.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// Which valid image a case starts from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Base {
    /// Version 3, 64 KiB clusters, a little over 1 MiB with data, zeros and holes.
    Plain,
    /// The same in version 2.
    Version2,
    /// Compressed with zlib.
    Zlib,
    /// Compressed with zstd.
    Zstd,
    /// Extended L2 entries, 32 KiB clusters.
    Extended,
    /// With a raw backing file `base.raw`.
    Backed,
    /// With an external data file `ext.data`.
    DataFile,
    /// With two internal snapshots.
    Snapshots,
    /// With two persistent bitmaps.
    Bitmaps,
}

/// All of them.
pub const BASES: [Base; 9] = [
    Base::Plain,
    Base::Version2,
    Base::Zlib,
    Base::Zstd,
    Base::Extended,
    Base::Backed,
    Base::DataFile,
    Base::Snapshots,
    Base::Bitmaps,
];

/// The bytes of a qcow2 file.
#[derive(Clone, Debug)]
pub struct Image {
    /// All of them.
    pub bytes: Vec<u8>,
}

impl Image {
    /// Makes `base`, and what it refers to, in `scratch`.
    pub fn make(scratch: &Scratch, base: Base) -> Self {
        let disk = SparseRandom::new(3, (1 << 20) + 512);
        disk.write_raw(scratch.join("other.raw"));
        let words = match base {
            Base::Plain | Base::Snapshots | Base::Bitmaps => "-O qcow2",
            Base::Version2 => "-O qcow2 -o compat=0.10",
            Base::Zlib => "-c -O qcow2",
            Base::Zstd => "-c -O qcow2 -o compression_type=zstd",
            Base::Extended => "-O qcow2 -o extended_l2=on,cluster_size=32k",
            Base::DataFile => "-O qcow2 -o data_file=ext.data",
            Base::Backed => "",
        };
        let path = scratch.join("good.qcow2");
        if base == Base::Backed {
            disk.write_raw(scratch.join("base.raw"));
            oracle::create_overlay(&path, "", "base.raw", "raw", None);
        } else {
            theirs(scratch)
                .words(&format!("convert -f raw {words} other.raw good.qcow2"))
                .ok();
        }
        if !matches!(base, Base::Zlib | Base::Zstd) {
            oracle::io(&path, "qcow2", ["write -P 7 100k 100k", "write -z 640k 64k"]);
        }
        let actions: &[&str] = match base {
            Base::Snapshots => &["snapshot -c one good.qcow2", "snapshot -c two good.qcow2"],
            Base::Bitmaps => &["bitmap --add good.qcow2 one", "bitmap --add good.qcow2 two"],
            _ => &[],
        };
        for action in actions {
            theirs(scratch).words(action).ok();
        }
        let bytes = std::fs::read(&path).expect("read the valid image");
        std::fs::remove_file(&path).expect("remove the valid image");
        Self { bytes }
    }

    /// Writes it as `name`.
    pub fn write(&self, path: impl AsRef<Path>) {
        std::fs::write(path, &self.bytes).expect("write the patched image");
    }

    /// A big-endian number of 4 bytes.
    pub fn get32(&self, at: u64) -> u32 {
        let at = at as usize;
        u32::from_be_bytes(self.bytes[at..at + 4].try_into().expect("4 bytes"))
    }

    /// A big-endian number of 8 bytes.
    pub fn get64(&self, at: u64) -> u64 {
        let at = at as usize;
        u64::from_be_bytes(self.bytes[at..at + 8].try_into().expect("8 bytes"))
    }

    /// Puts bytes in.
    pub fn put(&mut self, at: u64, bytes: &[u8]) {
        let at = at as usize;
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// Puts a big-endian number of 4 bytes in.
    pub fn put32(&mut self, at: u64, value: u32) {
        self.put(at, &value.to_be_bytes());
    }

    /// Puts a big-endian number of 8 bytes in.
    pub fn put64(&mut self, at: u64, value: u64) {
        self.put(at, &value.to_be_bytes());
    }

    /// Where the L1 table is.
    pub fn l1(&self) -> u64 {
        self.get64(40)
    }

    /// Where the first L2 table is.
    pub fn l2(&self) -> u64 {
        self.get64(self.l1()) & OFFSET
    }

    /// Where the first L2 entry that is not zero is.
    pub fn l2_entry(&self) -> u64 {
        let l2 = self.l2();
        (0..64)
            .map(|index| l2 + index * 8)
            .find(|at| self.get64(*at) != 0)
            .expect("an L2 entry")
    }

    /// Where the refcount table is.
    pub fn refcount_table(&self) -> u64 {
        self.get64(48)
    }

    /// Where the first refcount block is.
    pub fn refcount_block(&self) -> u64 {
        self.get64(self.refcount_table())
    }

    /// Where the header extension of `kind` starts.
    pub fn extension(&self, kind: u32) -> u64 {
        let mut at = u64::from(self.get32(100));
        loop {
            let found = self.get32(at);
            assert_ne!(found, 0, "no extension {kind:#x}");
            if found == kind {
                return at;
            }
            at += 8 + u64::from(self.get32(at + 4)).next_multiple_of(8);
        }
    }
}
