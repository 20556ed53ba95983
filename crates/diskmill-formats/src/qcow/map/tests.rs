use super::*;

#[test]
fn entries_of_compressed_clusters_are_those_of_qemu() {
    let plain = Geometry::PLAIN;
    let entry = L2Entry(0x80b0_0000_0000_2000);
    let span = PackedSpan {
        at: HostOffset::new(8192),
        len: 22,
    };
    assert_eq!(entry.span(plain), span);
    assert_eq!(entry.kind(plain).unwrap(), Kind::Packed(HostOffset::new(8192)));
    assert_eq!(L2Entry::packed(span, plain).unwrap(), entry);
}

#[test]
fn every_cluster_size_says_lengths_and_places_up_to_its_limits() {
    for bits in CLUSTER_BITS {
        let geometry = Geometry::new(bits, 9).unwrap();
        let most = (1 << (63 - u32::from(bits))) - 1;
        for len in [1, geometry.cluster_size() - 1] {
            for at in [0, 77, most] {
                let at = HostOffset::new(at);
                let span = PackedSpan { at, len };
                assert_eq!(L2Entry::packed(span, geometry).unwrap().span(geometry), span);
            }
        }
        for (at, len) in [(most + 1, 1), (0, 0), (0, geometry.cluster_size())] {
            let at = HostOffset::new(at);
            assert!(L2Entry::packed(PackedSpan { at, len }, geometry).is_err());
        }
    }
}

#[test]
fn entries_that_cannot_be() {
    let geometry = Geometry::PLAIN;
    assert_eq!(L2Entry(0).kind(geometry).unwrap(), Kind::Absent);
    assert_eq!(
        L2Entry(512).kind(geometry).unwrap(),
        Kind::Data(HostOffset::new(512))
    );
    assert_eq!(L2Entry(513).kind(geometry), Err(MapError::Unaligned(513)));
    let empty = L2Entry(COMPRESSED | 4096);
    assert_eq!(empty.kind(geometry), Err(MapError::Empty(COMPRESSED | 4096)));
}
