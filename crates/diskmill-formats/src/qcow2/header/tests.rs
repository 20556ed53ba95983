use diskmill_core::{Error, ErrorKind};
use proptest::prelude::*;

use super::super::layout::{EXT_BACKING_FORMAT, EXT_BITMAPS, EXT_DATA_FILE, EXT_ENCRYPTION};
use super::*;

/// A header of version 3 for 64 MiB, as a first cluster.
fn plain() -> Header {
    let mut header = Header::new(Version::V3, ClusterBits::DEFAULT, 64 << 20);
    header.l1_size = 1;
    header.l1_table_offset = HostOffset::new(0x3_0000);
    header.refcount_table_offset = HostOffset::new(0x1_0000);
    header.refcount_table_clusters = 1;
    header
}

fn bytes(header: &Header) -> Vec<u8> {
    let mut bytes = header.to_bytes().unwrap();
    bytes.resize(header.cluster_bits.cluster_len(), 0);
    bytes
}

fn patched(changes: &[(usize, &[u8])]) -> String {
    let mut bytes = bytes(&plain());
    for (at, change) in changes {
        bytes[*at..at + change.len()].copy_from_slice(change);
    }
    match Header::parse(&bytes) {
        Ok(header) => panic!("{header:?}"),
        Err(error) => error.to_string(),
    }
}

/// A row of the hostile inputs: one field changed, and what is said about it.
#[test]
fn every_field_out_of_range_is_named_with_its_value() {
    for (at, change, text) in [
        (4, 0_u32, "version is 0, must be 2 or 3"),
        (4, 1, "version is 1, must be 2 or 3"),
        (4, 4, "version is 4, must be 2 or 3"),
        (20, 8, "cluster_bits is 8, must be 9 to 21"),
        (20, 22, "cluster_bits is 22, must be 9 to 21"),
        (20, 0x8000_0010, "cluster_bits is 2147483664, must be 9 to 21"),
        (32, 3, "crypt_method is 3, must be 0, 1 or 2"),
        (
            32,
            2,
            "crypt_method LUKS is set, must be unset without the encryption extension",
        ),
        (36, 0, "l1_size is 0, must be 1 to 4194304"),
        (36, 4_194_305, "l1_size is 4194305, must be 1 to 4194304"),
        (36, u32::MAX, "l1_size is 4294967295, must be 1 to 4194304"),
        (56, 129, "refcount_table_clusters is 129, must be 1 to 128"),
        (
            56,
            0x2000_0001,
            "refcount_table_clusters is 536870913, must be 1 to 128",
        ),
        (
            56,
            u32::MAX,
            "refcount_table_clusters is 4294967295, must be 1 to 128",
        ),
        (60, 1, "snapshots_offset is 0, must be behind the header"),
        (96, 7, "refcount_order is 7, must be 0 to 6"),
        (96, u32::MAX, "refcount_order is 4294967295, must be 0 to 6"),
        (100, 103, "header_length is 103, must be 104 to 65536"),
        (100, 0, "header_length is 0, must be 104 to 65536"),
        (100, 65_537, "header_length is 65537, must be 104 to 65536"),
        (
            104,
            0x0200_0000,
            "compression_type is 2, must be 0 (zlib) or 1 (zstd)",
        ),
        (
            104,
            0x0100_0000,
            "compression_type is 1 and the incompatible feature bit 'compression type' is 0, must be 0 with 0 or 1 with 1",
        ),
        (
            76,
            8,
            "compression_type is 0 and the incompatible feature bit 'compression type' is 1, must be 0 with 0 or 1 with 1",
        ),
        (76, 32, "incompatible feature bit 5 is not supported"),
        (72, 0x8000_0000, "incompatible feature bit 63 is not supported"),
        (
            92,
            2,
            "autoclear feature 'raw external data' is set, must be unset without incompatible feature \
             'external data file'",
        ),
    ] {
        assert_eq!(patched(&[(at, &change.to_be_bytes())]), text);
    }
}

#[test]
fn every_offset_out_of_range_is_named_with_its_value() {
    for (at, change, text) in [
        (
            8,
            65_537_u64,
            "backing_file_offset is 65537, must be 112 to 65536",
        ),
        (8, 8, "backing_file_offset is 8, must be 112 to 65536"),
        (
            8,
            u64::MAX,
            "backing_file_offset is 18446744073709551615, must be 112 to 65536",
        ),
        (
            24,
            1 << 62,
            "size is 4611686018427387904, must be 0 to 2251799813685248",
        ),
        (24, 1 << 63, "size is 9223372036854775808, must be below 2^63"),
        (24, u64::MAX, "size is 18446744073709551615, must be below 2^63"),
        (24, 64 << 30, "l1_size is 1, must be 128 to 4194304"),
        (
            40,
            0x3_0200,
            "l1_table_offset is 0x30200, must be a multiple of the cluster size 65536 below 2^63",
        ),
        (
            40,
            1 << 63,
            "l1_table_offset is 0x8000000000000000, must be a multiple of the cluster size 65536 below 2^63",
        ),
        (40, 0, "l1_table_offset is 0, must be behind the header"),
        (
            48,
            0x1_0001,
            "refcount_table_offset is 0x10001, must be a multiple of the cluster size 65536 below 2^63",
        ),
        (48, 0, "refcount_table_offset is 0, must be behind the header"),
    ] {
        assert_eq!(patched(&[(at, &change.to_be_bytes())]), text);
    }
    assert_eq!(
        patched(&[(60, &1_u32.to_be_bytes()), (64, &0x1_0001_u64.to_be_bytes())]),
        "snapshots_offset is 0x10001, must be a multiple of the cluster size 65536 below 2^63"
    );
}

#[test]
fn backing_names_must_fit() {
    for (offset, len, text) in [
        (512_u64, 1024_u32, "backing_file_size is 1024, must be 0 to 1023"),
        (
            512,
            u32::MAX,
            "backing_file_size is 4294967295, must be 0 to 1023",
        ),
        (65_530, 7, "backing_file_size is 7, must be 0 to 6"),
    ] {
        assert_eq!(
            patched(&[(8, &offset.to_be_bytes()), (16, &len.to_be_bytes())]),
            text
        );
    }
}

#[test]
fn extended_l2_entries_need_large_clusters() {
    let mut header = Header::new(Version::V3, ClusterBits::new(13).unwrap(), 0);
    header.incompatible = Incompatible::EXTENDED_L2;
    assert_eq!(
        Header::parse(&bytes(&header)).unwrap_err().to_string(),
        "cluster_bits is 13, must be 14 to 21 with extended L2 entries"
    );
}

#[test]
fn unknown_features_are_called_by_the_name_the_image_gives() {
    let mut header = plain();
    header.incompatible = Incompatible::new(1 << 7 | 1 << 9);
    let name = extension::FeatureName::new(FeatureKind::Incompatible, 9, "time travel");
    header
        .extensions
        .push(Extension::FeatureNames(vec![name], Vec::new()));
    let error = Error::from(Header::parse(&bytes(&header)).unwrap_err());
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(
        format!("{error:?}").ends_with("incompatible feature bit 7, bit 9 'time travel' is not supported")
    );
}

#[test]
fn unknown_compatible_and_autoclear_features_are_kept() {
    let mut header = plain();
    header.compatible = Compatible::new(1 << 40);
    header.autoclear = Autoclear::new(1 << 41);
    let parsed = Header::parse(&bytes(&header)).unwrap();
    assert_eq!(parsed.compatible.unknown().bits(), 1 << 40);
    assert_eq!(parsed.autoclear.unknown().bits(), 1 << 41);
    assert_eq!(parsed, header);
}

/// Puts an extension at byte 112 of a plain header.
fn with_extension(kind: u32, len: u32, data: &[u8]) -> String {
    let mut extension = kind.to_be_bytes().to_vec();
    extension.extend_from_slice(&len.to_be_bytes());
    extension.extend_from_slice(data);
    patched(&[(112, &extension)])
}

#[test]
fn extensions_must_fit_their_area() {
    assert_eq!(
        with_extension(0x1234, u32::MAX, &[]),
        "length of header extension 0x00001234 is 4294967295, must be at most 65416"
    );
    assert_eq!(
        with_extension(EXT_BACKING_FORMAT, 16, b"a very long name"),
        "length of the backing format is 16, must be 0 to 15"
    );
    assert_eq!(
        with_extension(EXT_BACKING_FORMAT, 65_417, &[]),
        "length of header extension 0xe2792aca is 65417, must be at most 65416"
    );
}

#[test]
fn the_bitmaps_extension_is_checked() {
    let data = |count: u32, reserved: u32, size: u64, at: u64| {
        let mut data = count.to_be_bytes().to_vec();
        data.extend_from_slice(&reserved.to_be_bytes());
        data.extend_from_slice(&size.to_be_bytes());
        data.extend_from_slice(&at.to_be_bytes());
        data
    };
    for (data, text) in [
        (data(0, 0, 32, 0x5_0000), "nb_bitmaps is 0, must be 1 to 65535"),
        (
            data(65_536, 0, 32, 0x5_0000),
            "nb_bitmaps is 65536, must be 1 to 65535",
        ),
        (
            data(1, 7, 32, 0x5_0000),
            "reserved field of the bitmaps extension is 7, must be 0",
        ),
        (
            data(1, 0, 0, 0x5_0000),
            "bitmap_directory_size is 0, must be 1 to 67107840 bytes",
        ),
        (
            data(1, 0, 67_107_841, 0x5_0000),
            "bitmap_directory_size is 67107841, must be 1 to 67107840 bytes",
        ),
        (
            data(1, 0, 32, 0x5_0200),
            "bitmap_directory_offset is 0x50200, must be a multiple of the cluster size 65536 below 2^63",
        ),
    ] {
        assert_eq!(with_extension(EXT_BITMAPS, 24, &data), text);
    }
    assert_eq!(
        with_extension(EXT_BITMAPS, 23, &[0; 23]),
        "length of the bitmaps extension is 23, must be 24"
    );
}

#[test]
fn the_encryption_extension_is_checked() {
    assert_eq!(
        with_extension(EXT_ENCRYPTION, 8, &[0; 8]),
        "length of the encryption extension is 8, must be 16"
    );
    let mut data = 0x5_0001_u64.to_be_bytes().to_vec();
    data.extend_from_slice(&1_u64.to_be_bytes());
    assert_eq!(
        with_extension(EXT_ENCRYPTION, 16, &data),
        "offset of the encryption header is 0x50001, must be a multiple of the cluster size 65536 below 2^63"
    );
    let mut data = 0x5_0000_u64.to_be_bytes().to_vec();
    data.extend_from_slice(&u64::MAX.to_be_bytes());
    assert_eq!(
        with_extension(EXT_ENCRYPTION, 16, &data),
        "length of the encryption header is 18446744073709551615, must be at least 1, ending below 2^63"
    );
}

#[test]
fn foreign_and_short_files_are_told_apart() {
    let error = Error::from(Header::parse(b"KDMV").unwrap_err());
    assert_eq!(error.kind(), ErrorKind::NotThisFormat);
    assert_eq!(
        Error::from(Header::parse(&[]).unwrap_err()).kind(),
        ErrorKind::NotThisFormat
    );
    let whole = bytes(&plain());
    assert_eq!(
        Header::parse(&whole[..71]).unwrap_err().to_string(),
        "the header needs 72 bytes, the file has 71"
    );
    assert_eq!(
        Header::parse(&whole[..103]).unwrap_err().to_string(),
        "the header needs 104 bytes, the file has 103"
    );
    assert_eq!(
        Header::parse(&whole[..111]).unwrap_err().to_string(),
        "the header needs 112 bytes, the file has 111"
    );
}

#[test]
fn sizes_are_whole_sectors() {
    let mut header = plain();
    header.size = 1000;
    let parsed = Header::parse(&bytes(&header)).unwrap();
    assert_eq!((parsed.size, parsed.virtual_size()), (1000, 512));
}

#[test]
fn the_last_backing_format_counts() {
    let mut header = plain();
    header.backing_name = Some(b"base".to_vec());
    header.extensions = vec![
        Extension::BackingFormat(b"raw".to_vec()),
        Extension::BackingFormat(b"qcow2".to_vec()),
    ];
    let backing = Header::parse(&bytes(&header)).unwrap().backing().unwrap();
    assert_eq!(
        (backing.name.as_str(), backing.format.as_deref()),
        ("base", Some("qcow2"))
    );
}

#[test]
fn what_does_not_fit_into_a_cluster_is_not_written() {
    let mut header = Header::new(Version::V2, ClusterBits::new(9).unwrap(), 0);
    header.backing_name = Some(vec![b'x'; 500]);
    assert!(matches!(
        header.to_bytes(),
        Err(HeaderError::Bounds { value: 580, .. })
    ));
    let mut header = plain();
    header.backing_name = Some(vec![b'x'; 1024]);
    assert!(header.to_bytes().is_err());
}

#[test]
fn widths_follow_from_orders() {
    for (order, bits, max) in [(0, 1, 1), (1, 2, 3), (4, 16, 65_535), (6, 64, u64::MAX)] {
        let order = RefcountOrder::new(order).unwrap();
        assert_eq!((order.bits(), order.max()), (bits, max));
        assert_eq!(RefcountOrder::from_bits(bits.into()), Some(order));
    }
    assert_eq!(RefcountOrder::from_bits(0), None);
    assert_eq!(RefcountOrder::from_bits(128), None);
    assert_eq!(RefcountOrder::from_bits(24), None);
}

fn any_extension() -> impl Strategy<Value = Extension> {
    let data = || proptest::collection::vec(any::<u8>(), 0..40);
    prop_oneof![
        proptest::collection::vec(any::<u8>(), 0..16).prop_map(Extension::BackingFormat),
        data().prop_map(Extension::DataFile),
        Just(Header::feature_names()),
        data().prop_filter_map("not a whole record", |rest| (rest.len() < 48)
            .then_some(Extension::FeatureNames(Vec::new(), rest))),
        (1_u32..65_536, 1_u64..67_107_841, 0_u64..1000).prop_map(|(nb_bitmaps, directory_size, cluster)| {
            Extension::Bitmaps(BitmapsExtension {
                nb_bitmaps,
                directory_size,
                directory_offset: HostOffset::new(cluster << 21),
            })
        }),
        (1_u32.., data()).prop_filter_map("a known type", |(kind, data)| {
            let known = [
                EXT_BACKING_FORMAT,
                EXT_DATA_FILE,
                EXT_BITMAPS,
                EXT_ENCRYPTION,
                super::super::layout::EXT_FEATURE_NAMES,
            ];
            (!known.contains(&kind)).then_some(Extension::Unknown { kind, data })
        }),
    ]
}

prop_compose! {
    fn any_header()(
        is_v3: bool,
        cluster_bits in 12_u32..22,
        size in 0_u64..1 << 40,
        table in 1_u64..1 << 30,
        clusters in 0_u32..3,
        snapshots in 0_u32..65_537,
        flags: u64,
        order in 0_u32..7,
        tail in proptest::option::of(proptest::collection::vec(any::<u8>(), 0..64)),
        zstd: bool,
        extensions in proptest::collection::vec(any_extension(), 0..6),
        backing_name in proptest::option::of(proptest::collection::vec(any::<u8>(), 0..200)),
    ) -> Header {
        let version = if is_v3 { Version::V3 } else { Version::V2 };
        let mut header = Header::new(version, ClusterBits::new(cluster_bits).unwrap(), size);
        header.refcount_table_offset = HostOffset::new(table << 21);
        header.refcount_table_clusters = clusters;
        header.nb_snapshots = snapshots;
        header.snapshots_offset = HostOffset::new((table + 1) << 21);
        header.l1_table_offset = HostOffset::new((table + 2) << 21);
        header.extensions = extensions;
        header.backing_name = backing_name;
        if is_v3 {
            header.tail = tail;
            header.refcount_order = RefcountOrder::new(order).unwrap();
            header.compatible = Compatible::new(flags);
            header.autoclear = Autoclear::new(flags >> 3);
            let zstd = zstd && header.tail.is_some();
            header.compression_type = if zstd { CompressionType::Zstd } else { CompressionType::Zlib };
            header.incompatible = Incompatible::new(flags & 0b11)
                .with(Incompatible::COMPRESSION, zstd)
                .with(Incompatible::DATA_FILE, header.autoclear.has(Autoclear::RAW_DATA_FILE))
                .with(Incompatible::EXTENDED_L2, flags & 4 != 0 && cluster_bits >= 14);
        }
        header.l1_size = u32::try_from(header.geometry().l1_entries(size)).unwrap();
        header
    }
}

proptest! {
    #![proptest_config(diskmill_testkit::random::config(256))]

    #[test]
    fn random_headers_are_read_back(header in any_header()) {
        let bytes = header.to_bytes().unwrap();
        let again = Header::parse(&bytes).unwrap();
        prop_assert_eq!(&again, &header);
        prop_assert_eq!(again.to_bytes().unwrap(), bytes);
    }

    #[test]
    fn random_bytes_are_parsed_or_refused(mut bytes in proptest::collection::vec(any::<u8>(), 0..600), version in 1_u32..5) {
        let _ = Header::parse(&bytes);
        for (at, change) in [(0, MAGIC), (4, version), (20, 9)] {
            if let Some(field) = bytes.get_mut(at..at + 4) {
                field.copy_from_slice(&change.to_be_bytes());
            }
        }
        let _ = Header::parse(&bytes);
    }

    #[test]
    fn headers_changed_at_random_are_parsed_or_refused(
        header in any_header(),
        changes in proptest::collection::vec((0_usize..200, any::<u8>()), 1..8),
    ) {
        let mut bytes = header.to_bytes().unwrap();
        for (at, byte) in changes {
            let at = at % bytes.len();
            bytes[at] = byte;
        }
        if let Ok(header) = Header::parse(&bytes) {
            // What has been understood can be used.
            let again = Header::parse(&header.to_bytes().unwrap()).unwrap();
            prop_assert_eq!(again.virtual_size(), header.virtual_size());
            let _ = (header.backing(), header.data_file_name(), header.bitmaps(), header.geometry());
        }
    }
}
