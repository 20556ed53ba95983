use proptest::prelude::*;

use super::*;

const FILE: u64 = 4 << 20;

fn sample() -> Header {
    let mut header = Header::new(ImageType::Dynamic, 10 << 20, 10);
    header.blocks_offset = 512;
    header.data_offset = 1024;
    header.uuid_create = Uuid([7; 16]);
    header.uuid_modify = Uuid([8; 16]);
    header
}

fn diff() -> Header {
    let mut header = sample();
    header.image_type = ImageType::Diff { undo: false };
    header.uuid_link = Uuid([9; 16]);
    header
}

/// The error of a good header with the bytes at `at` changed.
fn broken(header: &Header, at: usize, bytes: &[u8]) -> HeaderError {
    let mut sector = header.to_bytes();
    sector[at..at + bytes.len()].copy_from_slice(bytes);
    Header::parse(&sector, FILE).unwrap_err()
}

fn number(header: &Header, at: usize, value: u32) -> String {
    broken(header, at, &value.to_le_bytes()).to_string()
}

#[test]
fn parse_and_to_bytes_agree() {
    let mut wide = sample();
    wide.header_size = HEADER_SIZE_LCHS;
    wide.logical_geometry = Some([20, 16, 63]);
    wide.geometry = [1, 2, 3];
    let mut undo = diff();
    undo.image_type = ImageType::Diff { undo: true };
    for header in [sample(), diff(), wide, undo] {
        assert_eq!(Header::parse(&header.to_bytes(), FILE).unwrap(), header);
    }
}

#[test]
fn version_0_is_understood() {
    let mut bytes = [0; 512];
    let raw = RawHeader0 {
        text: [b'x'; 64],
        signature: U32::new(SIGNATURE),
        version: U32::new(VERSION_0),
        image_type: U32::new(DYNAMIC),
        flags: U32::new(0),
        comment: [0; 256],
        geometry: [U32::new(20), U32::new(16), U32::new(63), U32::new(512)],
        disk_size: (3 << 20).into(),
        block_size: U32::new(1 << 20),
        blocks: U32::new(3),
        blocks_allocated: U32::new(1),
        uuid_create: [1; 16],
        uuid_modify: [2; 16],
        uuid_link: [0; 16],
    };
    raw.write_to_prefix(&mut bytes).unwrap();
    let header = Header::parse(&bytes, FILE).unwrap();
    assert_eq!(
        (header.blocks_offset, header.data_offset, header.blocks),
        (420, 432, 3)
    );
    assert_eq!((header.virtual_size(), header.geometry), (3 << 20, [20, 16, 63]));
}

#[test]
fn what_is_wrong_is_named() {
    let base = sample();
    assert_eq!(broken(&base, 64, b"KDMV"), HeaderError::Signature(0x564d_444b));
    for (at, value, text) in [
        (
            68,
            0x0002_0000,
            "version is 131072, must be 0x00010001 (1.1) or 0x00000002",
        ),
        (68, 1, "version is 1, must be 0x00010001 (1.1) or 0x00000002"),
        (72, 100, "header_size is 100, must be at least 384"),
        (72, 0x1000, "blocks_offset is 0x200, must be at least 0x1048"),
        (76, 0, "image_type is 0, must be 1 to 4"),
        (76, 9, "image_type is 9, must be 1 to 4"),
        (
            76,
            4,
            "uuid_link is zero, must name the parent of an image of type 4",
        ),
        (80, 0xffff, "flags is 65535, must be 0, 1, 256 or 257"),
        (340, 0, "blocks_offset is 0x0, must be at least 0x1c8"),
        (340, 0x201, "blocks_offset is 513, must be a multiple of 512"),
        (344, 0, "data_offset is 0x0, must be at least 0x228"),
        (344, 512, "data_offset is 0x200, must be at least 0x228"),
        (344, 1023, "data_offset is 1023, must be a multiple of 512"),
        (360, 4096, "sector_size is 4096, must be 512"),
        (376, 0, "block_size is 0, must be 1048576"),
        (376, 2 << 20, "block_size is 2097152, must be 1048576"),
        (376, 3 << 19, "block_size is 1572864, must be 1048576"),
        (380, 512, "block_extra is 512, must be 0"),
        (
            384,
            9,
            "blocks is 9, must be at least 10 for a disk of 10485760 bytes",
        ),
    ] {
        assert_eq!(number(&base, at, value), text);
    }
    let size = broken(&base, 368, &(1_u64 << 62).to_le_bytes());
    assert!(matches!(size, HeaderError::Blocks { .. }), "{size}");
    let size = broken(&base, 368, &u64::MAX.to_le_bytes());
    assert!(matches!(size, HeaderError::Blocks { .. }), "{size}");
    let link = broken(&base, 424, &[1; 16]).to_string();
    assert_eq!(
        link,
        "uuid_link is 01010101-0101-0101-0101-010101010101, must be zero for an image of type 1"
    );
}

#[test]
fn a_map_must_be_in_the_file_before_it_is_read() {
    let mut header = sample();
    header.data_offset = 0xffff_fe00;
    header.blocks = 0x1fff_fff0;
    let many = Header::parse(&header.to_bytes(), FILE).unwrap_err();
    assert_eq!(many.to_string(), "blocks is 536870896, must be at most 536870784");
    header.blocks = 1 << 24;
    let cut = Header::parse(&header.to_bytes(), FILE).unwrap_err();
    assert!(matches!(cut, HeaderError::MapCut { .. }), "{cut}");
    let bytes = sample().to_bytes();
    let cut = Header::parse(&bytes, 512 + 39).unwrap_err();
    assert_eq!(
        cut.to_string(),
        "the block map of 10 entries at 0x200 runs past the end of the file at 0x227"
    );
    assert!(Header::parse(&bytes, 512 + 40).is_ok());
    for len in [0, 63, 68, 71, 100, 471] {
        assert!(
            matches!(
                Header::parse(&bytes[..len], len as u64),
                Err(HeaderError::TooShort(..))
            ),
            "{len}"
        );
    }
}

#[test]
fn odd_sizes_are_rounded_up() {
    let mut header = sample();
    header.disk_size = (9 << 20) + 1;
    assert_eq!(
        Header::parse(&header.to_bytes(), FILE).unwrap().virtual_size(),
        (9 << 20) + 512
    );
    header.disk_size = 0;
    header.blocks = 0;
    assert_eq!(Header::parse(&header.to_bytes(), FILE).unwrap().virtual_size(), 0);
}

proptest! {
    #![proptest_config(diskmill_testkit::random::config(256))]

    #[test]
    fn headers_changed_at_random_never_panic(
        changes in proptest::collection::vec((0..512_usize, any::<u8>()), 0..12),
        len in 0..8_u64 << 20,
        of_diff in any::<bool>(),
    ) {
        let mut bytes = if of_diff { diff() } else { sample() }.to_bytes();
        for (at, byte) in changes {
            bytes[at] = byte;
        }
        if let Ok(header) = Header::parse(&bytes, len) {
            prop_assert!(header.virtual_size().div_ceil(BLOCK) <= header.blocks.into());
            if header.version != VERSION_0 {
                prop_assert_eq!(Header::parse(&header.to_bytes(), len).unwrap(), header);
            }
        }
    }
}
