use super::*;
use crate::vmdk::layout::SparseHeader;

fn sample() -> Header {
    Header {
        version: 1,
        flags: Flags(Flags::CHECKED | Flags::REDUNDANT),
        capacity: 81_920,
        grain: Grain::USUAL,
        descriptor: Some((1, 20)),
        gtes: 512,
        rgd: Some(21),
        gd: Some(30),
        overhead: 128,
        unclean: false,
    }
}

fn changed(change: impl FnOnce(&mut SparseHeader)) -> Result<Header, HeaderError> {
    let mut bytes = sample().to_bytes();
    change(SparseHeader::mut_from_bytes(&mut bytes).unwrap());
    Header::parse(&bytes)
}

#[test]
fn what_is_written_is_read() {
    let header = sample();
    assert_eq!(Header::parse(&header.to_bytes()).unwrap(), header);
    let stream = Header {
        version: 3,
        flags: Flags(Flags::CHECKED | Flags::COMPRESSED | Flags::MARKERS),
        rgd: None,
        gd: None,
        unclean: true,
        ..header
    };
    assert_eq!(Header::parse(&stream.to_bytes()).unwrap(), stream);
}

#[test]
fn fields_are_where_the_format_has_them() {
    let bytes = sample().to_bytes();
    assert_eq!(&bytes[..4], b"KDMV");
    assert_eq!(bytes[12..20], 81_920_u64.to_le_bytes());
    assert_eq!(bytes[56..64], 30_u64.to_le_bytes());
    assert_eq!(&bytes[73..77], b"\n \r\n");
    assert!(bytes[77..].iter().all(|byte| *byte == 0));
}

#[test]
fn hostile_headers_are_refused_by_name() {
    let text = |change: fn(&mut SparseHeader)| changed(change).unwrap_err().to_string();
    assert_eq!(text(|h| h.version = 4.into()), "version is 4, must be 1 to 3");
    assert_eq!(
        text(|h| h.flags = (3 | 1 << 18).into()),
        "flags are 0x40003, of which bits 0x40000 are not known"
    );
    for flags in [3 | 1 << 16, 3 | 1 << 17, 3 | 3 << 16] {
        assert!(matches!(
            changed(|h| h.flags = flags.into()).unwrap_err(),
            HeaderError::Compression { .. }
        ));
    }
    assert!(text(|h| h.compress_algorithm = 9.into()).contains("compressAlgorithm 9"));
    assert!(text(|h| h.check = *b"\n \n\n").contains("transferred as text"));
    for grain in [0, 3, 4, 1 << 18, u64::MAX] {
        assert!(
            changed(|h| h.grain_size = grain.into())
                .unwrap_err()
                .to_string()
                .starts_with("grainSize is ")
        );
    }
    for entries in [0, 3, 513, 1024] {
        assert!(
            changed(|h| h.gtes_per_gt = entries.into())
                .unwrap_err()
                .to_string()
                .starts_with("numGTEsPerGT is ")
        );
    }
    for capacity in [1 << 63, 1 << 54, 1 << 53] {
        assert!(
            changed(|h| h.capacity = capacity.into()).is_err(),
            "{capacity:#x}"
        );
    }
    assert!(text(|h| h.descriptor_size = 0.into()).contains("descriptorSize"));
    assert_eq!(Header::parse(b"KDMV"), Err(HeaderError::Short(4)));
    assert_eq!(Header::parse(b"COWD"), Err(HeaderError::Magic));
}

#[test]
fn bytes_that_are_changed_at_random_never_panic_and_what_parses_is_whole() {
    let mut state = 0x1234_5678_u64;
    for _ in 0..20_000 {
        let mut bytes = sample().to_bytes();
        for _ in 0..3 {
            state = state
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            let at = (state >> 33) as usize % 80;
            bytes[at] = (state >> 56) as u8;
        }
        if let Ok(header) = Header::parse(&bytes) {
            assert_eq!(Header::parse(&header.to_bytes()).unwrap(), header);
        }
        let _ = Cowd::parse(&bytes);
        let _ = SeSparse::parse(&bytes);
    }
}

#[test]
fn extents_share_the_room_for_tables() {
    let mut room = super::super::layout::MOST_TABLES;
    take_tables(&mut room, 30_000_000).unwrap();
    let error = take_tables(&mut room, 4_000_000).unwrap_err();
    let text = "the number of grain tables of all extents is 34000000, must be at most 33554432";
    assert_eq!(error.to_string(), text);
    take_tables(&mut room, 3_554_432).unwrap();
    assert_eq!(room, 0);
}
