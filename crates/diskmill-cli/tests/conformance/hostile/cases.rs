//! The cases of the format's table of hostile inputs, and more of the kind.

use diskmill_testkit::Scratch;

use super::image::{Base, Image};
use super::{Fate, assert_fate};

fn case(base: Base, fate: Fate, patch: impl FnOnce(&mut Image)) {
    let scratch = Scratch::new();
    let mut image = Image::make(&scratch, base);
    patch(&mut image);
    image.write(scratch.join("bad.qcow2"));
    assert_fate(&scratch, "bad.qcow2", "qcow2", fate);
}

macro_rules! cases {
    ($($name:ident: $base:ident, $fate:expr, $patch:expr;)*) => {$(
        #[test]
        fn $name() {
            use Fate::{Damaged, DataRefused, Locked, Opens, Refused, RefusedButChecked};
            let _ = (Damaged, Opens, Locked(&[]), Refused(&[]), DataRefused(&[]), RefusedButChecked(&[]));
            case(Base::$base, $fate, $patch);
        }
    )*};
}

cases! {
    header__version_0: Plain, Refused(&["version", "2 or 3"]), |i| i.put32(4, 0);
    header__version_1: Plain, Refused(&["version", "2 or 3"]), |i| i.put32(4, 1);
    header__version_4: Plain, Refused(&["version is 4", "2 or 3"]), |i| i.put32(4, 4);
    header__cluster_bits_8: Plain, Refused(&["cluster_bits is 8", "9 to 21"]), |i| i.put32(20, 8);
    header__cluster_bits_22: Plain, Refused(&["cluster_bits is 22", "9 to 21"]), |i| i.put32(20, 22);
    header__cluster_bits_huge: Plain, Refused(&["cluster_bits", "9 to 21"]), |i| i.put32(20, 0x8000_0010);
    header__backing_offset_past_cluster: Plain, Refused(&["backing_file_offset"]), |i| { i.put64(8, 65537); i.put32(16, 4); };
    header__backing_offset_in_header: Plain, Refused(&["backing_file_offset"]), |i| { i.put64(8, 8); i.put32(16, 4); };
    header__backing_offset_huge: Plain, Refused(&["backing_file_offset"]), |i| { i.put64(8, u64::MAX - 7); i.put32(16, 64); };
    header__backing_len_1024: Backed, Refused(&["backing_file_size"]), |i| i.put32(16, 1024);
    header__backing_len_huge: Backed, Refused(&["backing_file_size"]), |i| i.put32(16, u32::MAX);
    header__backing_name_crosses_the_cluster: Backed, Refused(&["backing_file_size"]), |i| { i.put64(8, 65530); i.put32(16, 100); };
    header__size_2_to_62: Plain, Refused(&["size"]), |i| i.put64(24, 1 << 62);
    header__size_2_to_63: Plain, Refused(&["size"]), |i| i.put64(24, 1 << 63);
    header__size_largest: Plain, Refused(&["size"]), |i| i.put64(24, u64::MAX);
    header__l1_too_small_for_size: Plain, Refused(&["l1_size"]), |i| i.put64(24, 64 << 30);
    header__l1_size_0: Plain, Refused(&["l1_size"]), |i| i.put32(36, 0);
    header__l1_size_over_4_mi: Plain, Refused(&["l1_size"]), |i| i.put32(36, (4 << 20) + 1);
    header__l1_size_largest: Plain, Refused(&["l1_size"]), |i| i.put32(36, u32::MAX);
    header__l1_offset_unaligned: Plain, Refused(&["l1_table_offset"]), |i| i.put64(40, 0x30001);
    header__l1_offset_negative: Plain, Refused(&["l1_table_offset"]), |i| i.put64(40, 1 << 63);
    header__l1_offset_0: Plain, Refused(&["l1_table_offset"]), |i| i.put64(40, 0);
    header__l1_past_the_end: Plain, DataRefused(&["end of the file"]), |i| i.put64(40, 1 << 40);
    header__l1_of_4_mi_in_a_tiny_file: Plain, DataRefused(&["end of the file"]), |i| i.put32(36, 4 << 20);
    header__refcount_table_offset_unaligned: Plain, Refused(&["refcount_table_offset"]), |i| i.put64(48, 0x10200);
    header__refcount_table_offset_negative: Plain, Refused(&["refcount_table_offset"]), |i| i.put64(48, 1 << 63);
    header__refcount_table_offset_0: Plain, Refused(&["refcount_table_offset"]), |i| i.put64(48, 0);
    header__refcount_table_129_clusters: Plain, Refused(&["refcount_table_clusters"]), |i| i.put32(56, 129);
    header__refcount_table_wraps: Plain, Refused(&["refcount_table_clusters"]), |i| i.put32(56, 0x2000_0001);
    header__refcount_table_largest: Plain, Refused(&["refcount_table_clusters"]), |i| i.put32(56, u32::MAX);
    header__snapshots_65537: Snapshots, RefusedButChecked(&["nb_snapshots"]), |i| i.put32(60, 65537);
    header__snapshots_offset_unaligned: Snapshots, Refused(&["snapshots_offset"]), |i| { let at = i.get64(64); i.put64(64, at + 1); };
    header__refcount_order_7: Plain, Refused(&["refcount_order is 7", "0 to 6"]), |i| i.put32(96, 7);
    header__refcount_order_largest: Plain, Refused(&["refcount_order", "0 to 6"]), |i| i.put32(96, u32::MAX);
    header__length_103: Plain, Refused(&["header_length"]), |i| i.put32(100, 103);
    header__length_past_cluster: Plain, Refused(&["header_length"]), |i| i.put32(100, 65537);
    header__length_largest: Plain, Refused(&["header_length"]), |i| i.put32(100, u32::MAX);
    header__unknown_incompatible_feature: Plain, Refused(&["incompatible feature"]), |i| i.put64(72, 1 << 17);
    header__unknown_compatible_feature: Plain, Opens, |i| i.put64(80, 1 << 17);
    header__unknown_autoclear_feature: Plain, Opens, |i| i.put64(88, 1 << 17);
    header__extended_l2_with_small_clusters: Plain, Refused(&["extended"]), |i| { i.put64(72, 16); i.put32(20, 13); };
    header__compression_bit_without_type: Plain, Refused(&["compression"]), |i| i.put64(72, 8);
    header__compression_type_without_bit: Plain, Refused(&["compression"]), |i| i.put(104, &[1]);
    header__compression_type_2: Zstd, Refused(&["compression_type"]), |i| i.put(104, &[2]);
    header__crypt_method_3: Plain, Refused(&["crypt_method"]), |i| i.put32(32, 3);
    header__crypt_method_1: Plain, Locked(&["encrypt"]), |i| i.put32(32, 1);
    header__crypt_method_2_without_header: Plain, Refused(&["encrypt"]), |i| i.put32(32, 2);
    header__data_file_bit_without_name: Plain, Damaged, |i| i.put64(72, 4);
    header__truncated_to_70_bytes: Plain, Refused(&["header"]), |i| i.bytes.truncate(70);
    header__truncated_to_103_bytes: Plain, Refused(&["header"]), |i| i.bytes.truncate(103);

    extension__length_largest: Plain, Refused(&["extension"]), |i| i.put32(116, u32::MAX);
    extension__length_past_the_area: Plain, Refused(&["extension"]), |i| i.put32(116, 65536 - 112 - 7);
    extension__bitmaps_of_other_length: Bitmaps, Refused(&["bitmaps"]), |i| { let at = i.extension(0x2385_2875); i.put32(at + 4, 16); };
    extension__bitmaps_none: Bitmaps, Refused(&["nb_bitmaps"]), |i| { let at = i.extension(0x2385_2875); i.put32(at + 8, 0); };
    extension__bitmaps_65536: Bitmaps, Refused(&["nb_bitmaps"]), |i| { let at = i.extension(0x2385_2875); i.put32(at + 8, 65536); };
    extension__bitmaps_reserved: Bitmaps, Refused(&["bitmaps"]), |i| { let at = i.extension(0x2385_2875); i.put32(at + 12, 1); };
    extension__bitmap_directory_unaligned: Bitmaps, Refused(&["bitmap_directory"]), |i| { let at = i.extension(0x2385_2875); let old = i.get64(at + 24); i.put64(at + 24, old + 8); };
    extension__bitmap_directory_size_0: Bitmaps, Refused(&["bitmap_directory"]), |i| { let at = i.extension(0x2385_2875); i.put64(at + 16, 0); };
    extension__bitmap_directory_size_huge: Bitmaps, Refused(&["bitmap"]), |i| { let at = i.extension(0x2385_2875); i.put64(at + 16, 1 << 40); };

    snapshot__extra_too_long: Snapshots, RefusedButChecked(&["snapshot"]), |i| { let at = i.get64(64); i.put32(at + 36, 1025); };
    snapshot__table_past_the_end: Snapshots, RefusedButChecked(&["snapshot"]), |i| i.put64(64, 1 << 40);
    snapshot__l1_past_the_end: Snapshots, Damaged, |i| { let at = i.get64(64); i.put64(at, 1 << 40); };
    snapshot__l1_size_largest: Snapshots, Damaged, |i| { let at = i.get64(64); i.put32(at + 8, u32::MAX); };

    l1__entry_unaligned: Plain, Damaged, |i| { let at = i.l1(); i.put64(at, (1 << 63) | 0x40200); };
    l1__entry_past_the_end: Plain, Damaged, |i| { let at = i.l1(); i.put64(at, (1 << 63) | (1 << 40)); };
    l1__entry_reserved_bits: Plain, Damaged, |i| { let at = i.l1(); let old = i.get64(at); i.put64(at, old | 2); };
    l1__entry_is_the_l1_table: Plain, Damaged, |i| { let at = i.l1(); i.put64(at, (1 << 63) | at); };
    l1__entry_is_the_header: Plain, Damaged, |i| { let at = i.l1(); i.put64(at, 1 << 63); };
    l2__entry_unaligned: Plain, Damaged, |i| { let at = i.l2_entry(); i.put64(at, (1 << 63) | 0x50200); };
    l2__entry_past_the_end: Plain, Damaged, |i| { let at = i.l2_entry(); i.put64(at, (1 << 63) | (1 << 41)); };
    l2__entry_is_the_l2_table: Plain, Damaged, |i| { let (at, l2) = (i.l2_entry(), i.l2()); i.put64(at, (1 << 63) | l2); };
    l2__entry_reserved_bits: Plain, Damaged, |i| { let at = i.l2_entry(); let old = i.get64(at); i.put64(at, old | 4); };
    l2__two_entries_share_a_cluster: Plain, Damaged, |i| { let at = i.l2_entry(); let old = i.get64(at); let l2 = i.l2(); i.put64(l2 + 8 * 16, old); };
    l2__zero_flag_in_version_2: Version2, Damaged, |i| { let at = i.l2_entry(); let old = i.get64(at); i.put64(at, old | 1); };
    l2__compressed_past_the_end: Zlib, Damaged, |i| { let at = i.l2_entry(); i.put64(at, (1 << 62) | (1 << 41)); };
    l2__compressed_garbage: Zlib, Damaged, |i| { let at = i.get64(i.l2_entry()) & 0x003f_ffff_ffff_ffff; i.put(at, &[0xff; 32]); };
    l2__compressed_is_the_header: Zlib, Damaged, |i| { let at = i.l2_entry(); i.put64(at, 1 << 62); };
    l2__compressed_with_copied: Zlib, Damaged, |i| { let at = i.l2_entry(); let old = i.get64(at); i.put64(at, old | (1 << 63)); };
    l2__compressed_short_stream: Zlib, Damaged, |i| {
        // A final stored block of one byte: a whole stream, but not a whole cluster.
        let at = i.get64(i.l2_entry()) & 0x003f_ffff_ffff_ffff;
        i.put(at, &[1, 1, 0, 0xfe, 0xff, 0]);
    };
    l2__zstd_garbage: Zstd, Damaged, |i| { let at = i.get64(i.l2_entry()) & 0x003f_ffff_ffff_ffff; i.put(at, &[0xff; 32]); };
    l2__zstd_empty_frames: Zstd, Damaged, |i| {
        let at = i.get64(i.l2_entry()) & 0x003f_ffff_ffff_ffff;
        i.put(at, &[0x28, 0xb5, 0x2f, 0xfd, 0x20, 0, 1, 0, 0].repeat(20));
    };
    l2__compressed_bomb: Zlib, Damaged, |i| {
        // Every entry is the same stream, which the refcounts do not know.
        let first = i.get64(i.l2_entry());
        let l2 = i.l2();
        for index in 0..8192 {
            i.put64(l2 + index * 8, first);
        }
    };
    l2__subcluster_allocated_and_zero: Extended, Damaged, |i| { let at = i.l2(); i.put64(at + 8, u64::MAX); };
    l2__subclusters_without_a_cluster: Extended, Damaged, |i| { let at = i.l2(); i.put64(at, 0); i.put64(at + 8, 0xffff_ffff); };
    l2__data_file_offset_differs: DataFile, Damaged, |i| { let at = i.l2_entry(); let old = i.get64(at); i.put64(at, old + 0x10000); };

    refcount__all_zero: Plain, Damaged, |i| { let at = i.refcount_block(); i.put(at, &[0; 65536]); };
    refcount__all_ones: Plain, Damaged, |i| { let at = i.refcount_block(); i.put(at, &[0xff; 65536]); };
    refcount__table_entry_0: Plain, Damaged, |i| { let at = i.refcount_table(); i.put64(at, 0); };
    refcount__table_entry_unaligned: Plain, Damaged, |i| { let at = i.refcount_table(); i.put64(at, 0x20200); };
    refcount__table_entry_past_the_end: Plain, Damaged, |i| { let at = i.refcount_table(); i.put64(at, 1 << 41); };
    refcount__table_entry_is_the_table: Plain, Damaged, |i| { let at = i.refcount_table(); i.put64(at, at); };
    refcount__table_past_the_end: Plain, Damaged, |i| i.put64(48, 1 << 40);
    refcount__table_0_clusters: Plain, Damaged, |i| i.put32(56, 0);
    refcount__table_all_the_same_block: Plain, Damaged, |i| {
        let (at, block) = (i.refcount_table(), i.refcount_block());
        for index in 0..8192 {
            i.put64(at + index * 8, block);
        }
    };
}

/// 64 GiB of guest data whose tables all point to the same few clusters of a small file: work must be bounded by what
/// is asked for, and here `convert` may be slow, but `check` and `map` may not.
#[test]
fn l1__all_entries_are_the_same_table() {
    let scratch = Scratch::new();
    let mut image = Image::make(&scratch, Base::Plain);
    let (l1, entry) = (image.l1(), image.get64(image.l1()));
    for index in 0..128 {
        image.put64(l1 + index * 8, entry);
    }
    image.put32(36, 128);
    image.put64(24, 64 << 30);
    image.write(scratch.join("bad.qcow2"));
    for front in [&["qemu-img"][..], &[][..]] {
        super::run(&scratch, front, "info -f qcow2 bad.qcow2");
        let done = super::run(&scratch, front, "check -f qcow2 bad.qcow2");
        assert_eq!(done.code, Some(2), "{done}");
        super::run(&scratch, front, "map -f qcow2 --output=json bad.qcow2");
    }
}
