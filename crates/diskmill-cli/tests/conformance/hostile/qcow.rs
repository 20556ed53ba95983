//! qcow images made to do harm: headers, and what tables point to.

use diskmill_testkit::{Scratch, oracle};

use super::{Fate, assert_fate};

/// An image of 64 MiB whose first MiB has data: an L1 table at 48, the first L2 table at 4096, clusters from 8192 on.
struct Image {
    scratch: Scratch,
}

impl Image {
    fn make() -> Self {
        let scratch = Scratch::new();
        scratch.file("other.raw", &[1; 4096]);
        oracle::create(scratch.join("bad.qcow"), "qcow", "", "64M");
        oracle::io(scratch.join("bad.qcow"), "qcow", ["write -P 1 0 1M"]);
        Self { scratch }
    }

    fn put(&self, at: u64, bytes: &[u8]) -> &Self {
        diskmill_testkit::scratch::patch(self.scratch.join("bad.qcow"), at, bytes);
        self
    }

    fn word(&self, at: u64, value: u64) -> &Self {
        self.put(at, &value.to_be_bytes())
    }

    fn fate(&self, fate: Fate) {
        assert_fate(&self.scratch, "bad.qcow", "qcow", fate);
    }
}

fn refused(says: &'static str) -> Fate {
    Fate::Refused(Box::leak(Box::new([says])))
}

#[test]
fn qcow_header__sizes() {
    for (size, says) in [
        (0, "size is 0, must be at least 2"),
        (1, "size is 1, must be at least 2"),
        (1 << 50, "size is 1125899906842624, must be at most"),
        (1 << 63, "must be at most"),
        (u64::MAX, "must be at most"),
        // An L1 table of GiBs, in a file of a MiB.
        (1 << 48, "the L1 table at 0x30 with 1073741824 bytes runs past"),
    ] {
        Image::make().word(24, size).fate(refused(says));
    }
}

#[test]
fn qcow_header__geometry_and_method() {
    for (at, value, says) in [
        (32, 8, "cluster_bits is 8, must be 9 to 16"),
        (32, 17, "cluster_bits is 17, must be 9 to 16"),
        (33, 5, "l2_bits is 5, must be 6 to 13"),
        (33, 14, "l2_bits is 14, must be 6 to 13"),
        (39, 2, "crypt_method is 2, must be 0 (none) or 1 (AES)"),
        (7, 2, "does not support qcow version 2"),
    ] {
        Image::make().put(at, &[value]).fate(refused(says));
    }
    Image::make().put(34, &[9, 9]).fate(Fate::Opens);
}

#[test]
fn qcow_header__places() {
    let name = |at: u64, len: u8| {
        let image = Image::make();
        image.word(8, at).put(19, &[len]);
        image
    };
    name(1 << 30, 8).fate(Fate::Refused(&[
        "the name of the backing file",
        "runs past the end",
    ]));
    name(20, 8).fate(Fate::Refused(&["overlaps the header"]));
    name(52, 8).fate(Fate::Refused(&["overlaps the name of the backing file"]));
    name(u64::MAX, 8).fate(Fate::Refused(&["backing_file_offset is"]));
    let long = Image::make();
    long.word(8, 8192).put(16, &1024_u32.to_be_bytes());
    long.fate(Fate::Refused(&[
        "backing_file_size is 1024, must be at most 1023",
    ]));
    let l1 = |at: u64, says: &'static str| {
        Image::make().word(40, at).fate(refused(says));
    };
    l1(1 << 40, "the L1 table at 0x10000000000 with 256 bytes runs past");
    l1(
        1 << 63,
        "l1_table_offset is 9223372036854775808, must be below 2^63",
    );
    l1(0, "overlaps the header");
}

#[test]
fn qcow_header__backed_by_itself() {
    let image = Image::make();
    // Where nothing is: behind the room of the L1 table.
    image.put(1000, b"bad.qcow").word(8, 1000).put(19, &[8]);
    image.fate(Fate::DataRefused(&[]));
}

#[test]
fn qcow_tables__entries_that_are_no_places() {
    for entry in [1 << 40, 1 << 63 | 4096, i64::MAX as u64] {
        Image::make().word(48, entry).fate(Fate::Damaged);
    }
    let packed = |len: u64, at: u64| 1 << 63 | len << 51 | at;
    for entry in [
        8193,
        1 << 40,
        i64::MAX as u64 & !511,
        // No bytes, bytes past the end, bytes that are no stream.
        packed(0, 8192),
        packed(100, 1 << 40),
        packed(100, 8192),
        // Header, L1 table, the table itself.
        512,
        4096,
    ] {
        Image::make().word(4096, entry).fate(Fate::Damaged);
    }
}

#[test]
fn qcow_tables__two_entries_with_one_cluster() {
    Image::make().word(4096, 8192 + 4096).fate(Fate::Damaged);
    Image::make().word(48 + 8, 4096).fate(Fate::Damaged);
}
