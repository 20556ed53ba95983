use diskmill_testkit::sparse_random::mix;

use super::*;

fn good() -> Vec<u8> {
    let mut header = Header::new(10 << 20, Some(b"base.raw".to_vec()));
    header.mtime = 0x5566_7788;
    header.to_bytes()
}

fn parse(bytes: &[u8]) -> Result<Header, HeaderError> {
    Header::parse(&bytes[..bytes.len().min(LEN_64)], bytes.len() as u64)
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

#[test]
fn fields_are_where_both_kinds_of_compilers_put_them() {
    let bytes = good();
    assert_eq!(bytes.len(), 1056);
    assert_eq!(bytes[..8], *b"OOOM\0\0\0\x02");
    assert_eq!(bytes[8..17], *b"base.raw\0");
    assert_eq!(bytes[1032..1036], [0x55, 0x66, 0x77, 0x88]);
    assert_eq!(bytes[1036..1040], [0; 4]);
    assert_eq!(bytes[1040..1048], (10_u64 << 20).to_be_bytes());
    assert_eq!(bytes[1048..1056], [0, 0, 2, 0, 0, 0, 0, 0]);
    let mut header = parse(&bytes).unwrap();
    assert_eq!(header.layout, Layout::Bits64);
    header.layout = Layout::Bits32;
    let mut bytes = header.to_bytes();
    assert_eq!(bytes.len(), 1048);
    assert_eq!(bytes[1036..1044], (10_u64 << 20).to_be_bytes());
    assert_eq!(bytes[1044..1048], [0, 0, 2, 0]);
    // The bitmap of a disk of 64 sectors or less does not reach to where the other layout ends.
    for len in [1048, 1049, 1056] {
        bytes.resize(len, 0xff);
        assert_eq!(parse(&bytes).unwrap(), header);
    }
}

/// The rule for files in which the sector size seems to be in both places.
#[test]
fn the_padding_decides_between_the_layouts() {
    let mut header = Header::new(5 << 32, None);
    header.layout = Layout::Bits32;
    let mut bytes = header.to_bytes();
    // The first bits of this bitmap look like the sector size, and the lower half of the size like a part of one.
    bytes.extend_from_slice(&[0, 0, 2, 0, 0, 0, 0, 0]);
    assert_eq!(parse(&bytes).unwrap(), header);
    // A size below 4 GiB leaves what is padding in the other layout empty, but is too large for that one.
    put(&mut bytes, 1036, &(1_u64 << 30).to_be_bytes());
    assert_eq!(parse(&bytes).unwrap().layout, Layout::Bits32);
    // Nothing decides: 64-bit.
    put(&mut bytes, 1036, &512_u64.to_be_bytes());
    let found = parse(&bytes).unwrap();
    assert_eq!((found.layout, found.size), (Layout::Bits64, (512 << 32) | 512));
}

#[test]
fn headers_that_cannot_be_are_refused() {
    let size = |size: u64| (1040, size.to_be_bytes().to_vec());
    for ((at, value), text) in [
        ((0, b"OOON".to_vec()), "the magic number is 0x4f4f4f4e"),
        (
            (0, b"MOOO".to_vec()),
            "byte-swapped: this is version 1 of User-Mode Linux",
        ),
        (
            (4, vec![0, 0, 0, 1]),
            "version is 1 (User-Mode Linux, big-endian), must be 2",
        ),
        ((4, vec![0, 0, 0, 3]), "version is 3 (User-Mode Linux), must be 2"),
        ((4, vec![0x7f, 0, 0, 2]), "version is 2130706434, must be 2"),
        ((8, vec![b'a'; 1024]), "backing_file has no NUL"),
        (size(0), "size is 0, must be 512 to"),
        (size(511), "size is 511"),
        (size(SIZE_MAX + 1), "size is 8796093022209"),
        (size(1 << 63), "size is 9223372036854775808"),
        (size(u64::MAX), "size is 18446744073709551615"),
        ((1048, vec![0, 0, 4, 0]), "sectorsize is 1024, must be 512"),
        ((1048, vec![0; 4]), "sectorsize is 0"),
    ] {
        let mut bytes = good();
        put(&mut bytes, at, &value);
        let error = parse(&bytes).unwrap_err().to_string();
        assert!(error.contains(text), "{error}");
    }
    let bytes = good();
    for len in [0, 3, 7, 1035, 1047, 1055] {
        let error = parse(&bytes[..len]).unwrap_err();
        assert_eq!(error, HeaderError::TooShort(len as u64));
    }
    let last = |bytes: &[u8]| Header::parse(bytes, 9).map(|header| header.virtual_size());
    let mut bytes = good();
    put(&mut bytes, 1040, &1535_u64.to_be_bytes());
    assert_eq!(last(&bytes), Ok(1024), "a part of a sector does not count");
    put(&mut bytes, 1040, &SIZE_MAX.to_be_bytes());
    assert_eq!(last(&bytes), Ok(SIZE_MAX));
}

#[test]
fn what_parses_is_written_as_it_was() {
    let mut parsed = 0;
    for round in 0..4000 {
        let mut bytes = good();
        if round % 2 == 0 {
            let mut header = parse(&bytes).unwrap();
            header.layout = Layout::Bits32;
            bytes = header.to_bytes();
            bytes.extend_from_slice(&mix(round).to_be_bytes());
        }
        for change in 0..mix(round) % 4 {
            let random = mix(round << 8 | change);
            let at = match random % 3 {
                0 => 1032 + mix(random) as usize % 24,
                1 => mix(random) as usize % 40,
                _ => mix(random) as usize % bytes.len(),
            };
            bytes[at] = (random >> 32) as u8;
        }
        let Ok(header) = parse(&bytes) else { continue };
        parsed += 1;
        let again = header.to_bytes();
        let mut whole = again.clone();
        whole.resize(LEN_64, 0xee);
        assert_eq!(Header::parse(&whole, 2000).as_ref(), Ok(&header));
        assert_eq!(again.len() as u64, header.layout.header_len());
    }
    assert!(parsed > 1000, "{parsed}");
}
