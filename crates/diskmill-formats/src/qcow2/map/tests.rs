use proptest::prelude::*;

use super::*;

fn geometry(cluster_bits: u32, extended_l2: bool) -> Geometry {
    Geometry::new(
        Version::V3,
        ClusterBits::new(cluster_bits).unwrap(),
        extended_l2,
        false,
    )
}

#[test]
fn compressed_entries_are_those_of_qemu() {
    let span = L2Entry(0x4000_0000_0005_004f).span(geometry(16, false));
    assert_eq!((span.at.get(), span.len), (0x5_004f, 512 - 0x4f));
    let entry = L2Entry::compressed(HostOffset::new(0x5_0000), 0x4f, geometry(16, false)).unwrap();
    assert_eq!(entry.0, 0x4000_0000_0005_0000);
}

#[test]
fn field_widths_follow_the_cluster_size() {
    for (cluster_bits, shift) in [(9, 61), (12, 58), (16, 54), (21, 49)] {
        let entry = L2Entry::compressed(HostOffset::new(0), 513, geometry(cluster_bits, false)).unwrap();
        assert_eq!(entry.0, 1 << 62 | 1 << shift, "{cluster_bits}");
    }
}

#[test]
fn compressed_clusters_that_an_entry_cannot_hold_are_none() {
    let small = geometry(9, false);
    assert!(L2Entry::compressed(HostOffset::new(0), 1024, small).is_some());
    assert!(L2Entry::compressed(HostOffset::new(0), 1025, small).is_none());
    assert!(L2Entry::compressed(HostOffset::new(1 << 56), 1, small).is_none());
    assert!(L2Entry::compressed(HostOffset::new(1 << 49), 1, geometry(21, false)).is_none());
    assert!(L2Entry::compressed(HostOffset::new(0), 0, small).is_none());
}

#[test]
fn entries_say_what_a_cluster_is() {
    let plain = geometry(16, false);
    let at = HostOffset::new(0x5_0000);
    for (entry, kind) in [
        (0, ClusterKind::Unallocated),
        (1, ClusterKind::ZeroPlain),
        (0x5_0001, ClusterKind::ZeroAllocated(at)),
        (0x8000_0000_0005_0000, ClusterKind::Normal(at)),
        (0x0000_0000_0005_0000, ClusterKind::Normal(at)),
    ] {
        assert_eq!(L2Entry(entry).kind(plain).unwrap(), kind);
    }
    let data_file = Geometry::new(Version::V3, ClusterBits::DEFAULT, false, true);
    assert_eq!(
        L2Entry(COPIED).kind(data_file).unwrap(),
        ClusterKind::Normal(HostOffset::ZERO)
    );
}

#[test]
fn broken_entries_are_named() {
    let plain = geometry(16, false);
    assert_eq!(
        L2Entry(0x5_0200).kind(plain).unwrap_err().to_string(),
        "cluster offset is 0x50200, must be a multiple of the cluster size 65536"
    );
    assert_eq!(
        L1Entry(0x5_0200).table(plain).unwrap_err().to_string(),
        "l2 table offset is 0x50200, must be a multiple of the cluster size 65536"
    );
    let old = Geometry::new(Version::V2, ClusterBits::DEFAULT, false, false);
    assert_eq!(L2Entry(1).kind(old).unwrap_err(), MapError::ZeroInV2(1));
    let data_file = Geometry::new(Version::V3, ClusterBits::DEFAULT, false, true);
    assert!(L2Entry(COMPRESSED).kind(data_file).is_err());
}

#[test]
fn subclusters_are_read_as_qemu_writes_them() {
    // 4 KiB written at 4096 and 4 KiB zeroed at 64 KiB of a cluster of 128 KiB.
    let bitmap = Subclusters(0x0001_0000_0000_0002);
    assert_eq!(bitmap.run(0), (SubclusterKind::Unallocated, 1));
    assert_eq!(bitmap.run(1), (SubclusterKind::Allocated, 1));
    assert_eq!(bitmap.run(2), (SubclusterKind::Unallocated, 14));
    assert_eq!(bitmap.run(16), (SubclusterKind::Zero, 1));
    assert_eq!(bitmap.run(17), (SubclusterKind::Unallocated, 15));
    assert_eq!(Subclusters::ALL_ALLOCATED.run(3), (SubclusterKind::Allocated, 29));
    assert_eq!(Subclusters::ALL_ZERO.run(0), (SubclusterKind::Zero, 32));
}

#[test]
fn contradicting_subclusters_are_refused() {
    let normal = ClusterKind::Normal(HostOffset::new(0x5_0000));
    let span = CompressedSpan {
        at: HostOffset::ZERO,
        len: 512,
    };
    assert_eq!(
        Subclusters(1 << 32 | 1).check(normal),
        Err(MapError::Both(1 << 32 | 1))
    );
    assert_eq!(
        Subclusters(1).check(ClusterKind::Unallocated),
        Err(MapError::Nowhere(1))
    );
    assert_eq!(
        Subclusters(1).check(ClusterKind::Compressed(span)),
        Err(MapError::OfCompressed(1))
    );
    assert_eq!(Subclusters(1 << 32).check(ClusterKind::Unallocated), Ok(()));
}

#[test]
fn guest_offsets_fall_on_tables() {
    let plain = geometry(16, false);
    let at = GuestOffset::new((3 << 29) + (5 << 16) + 7);
    assert_eq!((plain.l1_index(at), plain.l2_index(at)), (3, 5));
    assert_eq!(plain.l1_entry_covers(), 512 << 20);
    assert_eq!(plain.l1_entries((512 << 20) + 1), 2);
    let extended = geometry(16, true);
    assert_eq!(extended.l1_entry_covers(), 256 << 20);
    assert_eq!(extended.subcluster(GuestOffset::new(0xffff)), 31);
    assert_eq!(extended.granule_bits(), 11);
}

proptest! {
    #![proptest_config(diskmill_testkit::random::config(256))]

    #[test]
    fn random_entries_are_understood_or_refused(entry: u64, bitmap: u64, cluster_bits in 14_u32..22, extended: bool, data_file: bool) {
        let geometry = Geometry::new(Version::V3, ClusterBits::new(cluster_bits).unwrap(), extended, data_file);
        let span = L2Entry(entry).span(geometry);
        prop_assert!(span.len >= 1 && span.len <= 2 * geometry.cluster_size());
        prop_assert!(span.at.get() < 1 << 56);
        if let Ok(kind) = L2Entry(entry).kind(geometry) {
            let _ = Subclusters(bitmap).check(kind);
        }
        let mut index = 0;
        while index < SUBCLUSTERS {
            let (kind, count) = Subclusters(bitmap).run(index);
            prop_assert!(count >= 1);
            prop_assert_eq!(kind, Subclusters(bitmap).get(index + count - 1));
            index += count;
        }
        prop_assert_eq!(index, SUBCLUSTERS);
    }

    #[test]
    fn compressed_entries_are_read_back(at in 0_u64..1 << 49, len in 1_u64..1 << 21, cluster_bits in 9_u32..22) {
        let geometry = geometry(cluster_bits, false);
        if let Some(entry) = L2Entry::compressed(HostOffset::new(at), len, geometry) {
            let span = entry.span(geometry);
            prop_assert_eq!(span.at.get(), at);
            prop_assert!(span.len >= len && span.len < len + 512);
        } else {
            prop_assert!(len > geometry.cluster_size());
        }
    }

    #[test]
    fn setting_subclusters_sets_those_alone(bitmap: u64, from in 0_u32..32, count in 1_u32..33, which in 0..3) {
        let count = count.min(32 - from);
        let kind = [SubclusterKind::Unallocated, SubclusterKind::Allocated, SubclusterKind::Zero][which as usize];
        let changed = Subclusters(bitmap).with(from, count, kind);
        for index in 0..32 {
            let expected = if (from..from + count).contains(&index) { kind } else { Subclusters(bitmap).get(index) };
            prop_assert_eq!(changed.get(index), expected);
        }
    }
}
