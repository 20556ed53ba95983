use proptest::prelude::*;

use super::*;

const FILE: u64 = 1 << 20;

fn sample() -> Header {
    Header::new(10 << 20, Geometry::PLAIN)
}

fn overlay() -> Header {
    let mut header = Header::new(10 << 20, Geometry::OVERLAY);
    header.backing = Some((HostOffset::new(48), 8));
    header.l1_table_offset = HostOffset::new(56);
    header
}

/// The error of a good header with the bytes at `at` changed.
fn broken(header: &Header, at: usize, bytes: &[u8]) -> String {
    let mut head = header.to_bytes();
    head[at..at + bytes.len()].copy_from_slice(bytes);
    Header::parse(&head, FILE).unwrap_err().to_string()
}

fn long(at: usize, value: u64) -> String {
    broken(&sample(), at, &value.to_be_bytes())
}

#[test]
fn parse_and_to_bytes_agree() {
    let mut odd = overlay();
    odd.mtime = 7;
    odd.padding = 0x1234;
    odd.crypt = CryptMethod::Aes;
    odd.size = 1000;
    odd.geometry = Geometry::new(16, 13).unwrap();
    for header in [sample(), overlay(), odd] {
        assert_eq!(Header::parse(&header.to_bytes(), FILE).unwrap(), header);
    }
}

#[test]
fn what_does_not_fill_a_sector_does_not_count() {
    for (size, disk) in [(2, 0), (511, 0), (512, 512), (1000, 512), (1024, 1024)] {
        let mut header = sample();
        header.size = size;
        assert_eq!(header.virtual_size(), disk);
        assert_eq!(header.l1_entries(), 1);
    }
}

#[test]
fn sizes() {
    for size in [0, 1] {
        assert_eq!(long(24, size), format!("size is {size}, must be at least 2"));
    }
    for size in [1 << 50, 1 << 63, u64::MAX] {
        assert!(long(24, size).contains("must be at most"), "{}", long(24, size));
    }
    // An L1 table of 64 KiB more than the file has.
    assert!(long(24, 1 << 40).contains("runs past the end of the file"));
}

#[test]
fn geometries() {
    for (at, value, text) in [
        (32, 8, "cluster_bits is 8, must be 9 to 16"),
        (32, 17, "cluster_bits is 17, must be 9 to 16"),
        (33, 5, "l2_bits is 5, must be 6 to 13"),
        (33, 14, "l2_bits is 14, must be 6 to 13"),
    ] {
        assert_eq!(broken(&sample(), at, &[value]), text);
    }
    let text = broken(&sample(), 36, &2_u32.to_be_bytes());
    assert_eq!(text, "crypt_method is 2, must be 0 (none) or 1 (AES)");
}

#[test]
fn versions_and_magic() {
    let version = broken(&sample(), 4, &2_u32.to_be_bytes());
    assert_eq!(version, "qcow (v1) does not support qcow version 2");
    assert!(broken(&sample(), 0, b"QFI ").contains("must be 0x514649fb"));
    for len in 0..48 {
        let error = Header::parse(&sample().to_bytes()[..len], len as u64).unwrap_err();
        assert_eq!(error, HeaderError::TooShort(len as u64));
    }
}

#[test]
fn places() {
    let header = overlay();
    let name = |at: u64| broken(&header, 8, &at.to_be_bytes());
    assert!(name(FILE).contains("the name of the backing file at 0x100000 with 8 bytes runs past"));
    assert!(name(20).contains("overlaps the header"), "{}", name(20));
    assert!(name(60).contains("overlaps the name of the backing file"));
    assert!(name(1 << 63).contains("backing_file_offset is 9223372036854775808"));
    assert_eq!(
        broken(&header, 16, &1024_u32.to_be_bytes()),
        "backing_file_size is 1024, must be at most 1023"
    );
    assert!(long(40, FILE).contains("the L1 table at 0x100000 with 40 bytes runs past"));
    assert!(long(40, 1 << 63).contains("l1_table_offset is 9223372036854775808, must be below 2^63"));
    assert!(long(40, 8).contains("the L1 table at 0x8 with 40 bytes overlaps the header"));
    assert!(long(40, 0).contains("overlaps the header"));
}

proptest! {
    #[test]
    fn mutated_headers_are_refused_or_agree(
        changes in prop::collection::vec((0..48_usize, any::<u8>()), 0..6),
        file in prop_oneof![Just(FILE), any::<u64>(), 0..600_u64],
    ) {
        let mut bytes = overlay().to_bytes();
        for (at, value) in changes {
            bytes[at] = value;
        }
        if let Ok(header) = Header::parse(&bytes, file) {
            prop_assert!(header.l1_table_offset.get() + header.l1_len() <= file);
            let again = Header::parse(&header.to_bytes(), file);
            prop_assert_eq!(again.unwrap(), header);
        }
    }
}
