//! Images made to do harm: each is refused with a text that names the field, the value and the allowed range, or
//! read as what it says, without effort out of proportion.

mod support;

use diskmill_core::{ErrorKind, GuestOffset, OpenSpec};
use diskmill_testkit::scratch::{self, patch, peek};
use diskmill_testkit::{Scratch, oracle};
use support::victim::Victim;
use support::{check, layer, text};

#[test]
fn table_entries_off_a_cluster_or_past_the_end_are_refused() {
    for (damage, expected) in [
        (
            (|v| v.set(v.l1(), v.u64(v.l1()) | 0x200)) as fn(&Victim),
            "l2 table offset is 0x40200, must be a multiple of the cluster size 65536",
        ),
        (
            |v| v.set(v.l1(), 0x8000_0000_4000_0000),
            "l2 table at 0x40000000 with 65536 bytes runs past the end of the file at 0x150000",
        ),
        (
            |v| v.set(v.l2(), v.u64(v.l2()) | 0x200),
            "cluster offset is 0x50200, must be a multiple of the cluster size 65536",
        ),
        (
            |v| v.set(v.l2(), 0x8000_0000_4000_0000),
            "data cluster at 0x40000000 with 65536 bytes runs past the end of the file at 0x150000",
        ),
        (
            |v| v.set(v.l2(), 0x4000_0000_4000_0000),
            "compressed cluster at 0x40000000 with 512 bytes runs past the end of the file at 0x150000",
        ),
        (
            |v| v.set(40, 0x4000_0000),
            "active l1 table at 0x40000000 with 16 bytes runs past the end of the file at 0x150000",
        ),
        (
            |v| v.set(48, 0x4000_0000),
            "refcount table at 0x40000000 with 65536 bytes runs past the end of the file at 0x150000",
        ),
        (
            |v| patch(&v.path, 56, &[0; 4]),
            "refcount_table_clusters is 0, must be at least 1",
        ),
    ] {
        let victim = Victim::new("");
        damage(&victim);
        victim.assert_trouble(expected);
        // A check is not put off by any of them.
        assert!(check(&victim.path).unwrap().corruptions > 0);
    }
}

#[test]
fn an_l1_table_of_the_largest_size_must_be_in_the_file() {
    let victim = Victim::new("");
    patch(&victim.path, 36, &4_194_304_u32.to_be_bytes());
    victim.assert_trouble("active l1 table at 0x30000 with 33554432 bytes runs past the end of the file");
}

#[test]
fn the_zero_flag_is_refused_in_version_2() {
    let victim = Victim::new("compat=0.10");
    victim.set(victim.l2(), 1);
    victim.assert_trouble("l2 entry is 0x0000000000000001, bit 0 must be 0 in version 2");
}

#[test]
fn contradicting_subclusters_are_refused() {
    let victim = Victim::new("extended_l2=on");
    victim.set(victim.l2() + 8, 0x1_0000_0001);
    victim.assert_trouble("no subcluster may be allocated and zero at once");
    victim.set(victim.l2() + 8, 0x1);
    victim.set(victim.l2(), 0);
    victim.assert_trouble("the lower half must be 0 in a cluster without offset");
}

#[test]
fn data_files_that_do_not_map_one_to_one_are_refused() {
    let dir = Scratch::beneath("/dev/shm");
    let path = dir.join("victim.qcow2");
    let data = dir.join("victim.data");
    oracle::create(&path, "qcow2", &format!("data_file={}", data.display()), "1G");
    oracle::io(&path, "qcow2", ["write -P 1 0 1M"]);
    let victim = Victim { dir, path };
    victim.set(victim.l2(), 0x8000_0000_0001_0000);
    victim.assert_trouble("l2 entry points to 0x10000 of the external data file, must be 0x0");
    victim.set(victim.l2(), 0x4000_0000_0001_0000);
    victim.assert_trouble("bit 62 must be 0 with an external data file");
}

#[test]
fn an_l2_table_that_is_an_l1_table_ends_nothing() {
    let victim = Victim::new("");
    victim.set(victim.l1(), victim.l1() | 1 << 63);
    let layer = layer(&victim.path, "qcow2", &OpenSpec::default()).unwrap();
    let mut at = 0;
    while at < layer.virtual_size() {
        at += layer.map(GuestOffset::new(at), u64::MAX).unwrap().len;
    }
}

#[test]
fn compressed_garbage_is_an_error_in_both_codecs() {
    for (kind, expected) in [("zlib", "the deflate stream"), ("zstd", "the zstd stream")] {
        let victim = Victim::compressed(kind);
        let place = victim.u64(victim.l2()) & 0x00ff_ffff_ffff_ffff;
        patch(&victim.path, place, &[0xff; 64]);
        victim.assert_trouble(expected);
    }
}

#[test]
fn a_stream_with_a_zlib_header_is_refused() {
    let victim = Victim::compressed("zlib");
    let place = victim.u64(victim.l2()) & 0x00ff_ffff_ffff_ffff;
    patch(&victim.path, place, &[0x78, 0x9c]);
    victim.assert_trouble("the deflate stream");
}

#[test]
fn an_image_that_says_it_is_encrypted_is_not_read_without_a_key() {
    let victim = Victim::new("");
    patch(&victim.path, 32, &1_u32.to_be_bytes());
    victim.assert_trouble("the image is encrypted and nothing says what its key is");
}

#[test]
fn a_snapshot_opens_by_id_or_name_and_only_where_it_can_be() {
    let victim = Victim::new("");
    oracle::qemu_img()
        .args(["snapshot", "-c", "one"])
        .arg(&victim.path)
        .ok();
    let mut how = OpenSpec::default();
    for which in ["one", "1"] {
        how.snapshot = Some(which.into());
        layer(&victim.path, "qcow2", &how).unwrap();
    }
    how.snapshot = Some("two".into());
    let error = layer(&victim.path, "qcow2", &how).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(
        text(&error).contains("no snapshot with id or name 'two'"),
        "{error:?}"
    );

    // The first entry of the table says where its L1 table is, and how large.
    how.snapshot = Some("one".into());
    let bytes = std::fs::read(&victim.path).unwrap();
    let table = u64::from_be_bytes(*bytes[64..].first_chunk().unwrap());
    let size_at = table + 40 + 8;
    for (at, value, says) in [
        (table, 0x123_u64, "must start on a cluster"),
        (table, 0, "must start on a cluster"),
        (table, 1 << 40, "runs past the end of the file"),
        (size_at, 1 << 63, "must be below 2^63"),
        (size_at, 1 << 60, "entries"),
    ] {
        std::fs::write(&victim.path, &bytes).unwrap();
        patch(&victim.path, at, &value.to_be_bytes());
        let error = layer(&victim.path, "qcow2", &how).unwrap_err();
        assert!(text(&error).contains(says), "{value:#x} at {at:#x}: {error:?}");
    }
}

/// A LUKS header is looked for where the extension says, and nothing else is taken for one.
#[test]
fn an_encryption_header_that_is_none_is_refused() {
    let victim = Victim::new("");
    patch(&victim.path, 32, &2_u32.to_be_bytes());
    let mut extension = 0x0537_be77_u32.to_be_bytes().to_vec();
    extension.extend_from_slice(&16_u32.to_be_bytes());
    extension.extend_from_slice(&0x5_0000_u64.to_be_bytes());
    extension.extend_from_slice(&0x1_0000_u64.to_be_bytes());
    patch(&victim.path, 112, &extension);
    victim.assert_trouble("there is no LUKS header at 0x50000");
    patch(&victim.path, 0x5_0000, b"LUKS\xba\xbe\x00\x02");
    victim.assert_trouble("LUKS version 2 is not supported, must be 1");
    patch(&victim.path, 0x5_0000, b"LUKS\xba\xbe\x00\x01");
    victim.assert_trouble("the cipher name of the LUKS header is not NUL terminated");
}

#[test]
fn unknown_options_are_refused_by_name() {
    let victim = Victim::new("");
    let mut how = OpenSpec::default();
    how.options.set("l2-cache-size", "1M");
    layer(&victim.path, "qcow2", &how).unwrap();
    how.options.set("offset", "512");
    let error = layer(&victim.path, "qcow2", &how).unwrap_err();
    assert!(text(&error).contains("invalid parameter 'offset'"), "{error:?}");
}

#[test]
fn snapshot_tables_are_checked() {
    let snapped = || {
        let victim = Victim::new("");
        oracle::qemu_img()
            .args(["snapshot", "-c", "one"])
            .arg(&victim.path)
            .ok();
        victim
    };
    let victim = snapped();
    let table = victim.u64(64);
    patch(&victim.path, table + 36, &1025_u32.to_be_bytes());
    victim.assert_trouble("snapshot 0 has 1025 bytes of extra data, must be 16 to 1024");
    assert!(check(&victim.path).unwrap().corruptions > 0);
    patch(&victim.path, table + 36, &8_u32.to_be_bytes());
    victim.assert_trouble("snapshot 0 has 8 bytes of extra data, must be 16 to 1024");
    patch(&victim.path, table + 36, &24_u32.to_be_bytes());
    victim.set(64, 0x4000_0000);
    victim.assert_trouble("snapshot table entry 0 of 1 at 0x40000000 runs past the end of the file");
    assert!(check(&victim.path).unwrap().corruptions > 0);

    let victim = snapped();
    patch(&victim.path, 60, &65_536_u32.to_be_bytes());
    victim.assert_trouble("snapshot table entry");

    // A snapshot's own table is for those who use the snapshot; a check counts it.
    let victim = snapped();
    let table = victim.u64(64);
    victim.set(table, 0x4000_0000);
    layer(&victim.path, "qcow2", &OpenSpec::default()).unwrap();
    assert!(check(&victim.path).unwrap().corruptions > 0);
    victim.set(table, 0x1234);
    assert!(check(&victim.path).unwrap().corruptions > 0);
    victim.set(table, victim.l1());
    patch(&victim.path, table + 8, &u32::MAX.to_be_bytes());
    assert!(check(&victim.path).unwrap().corruptions > 0);
}

#[test]
fn callers_can_allow_less() {
    let victim = Victim::new("");
    oracle::qemu_img()
        .args(["snapshot", "-c", "one"])
        .arg(&victim.path)
        .ok();
    let mut how = OpenSpec::default();
    how.limits.snapshots = 0;
    let error = layer(&victim.path, "qcow2", &how).unwrap_err();
    assert!(
        text(&error).contains("nb_snapshots is 1, must be at most 0"),
        "{error:?}"
    );
    let mut how = OpenSpec::default();
    how.limits.snapshot_table_bytes = 32;
    let error = layer(&victim.path, "qcow2", &how).unwrap_err();
    assert!(
        text(&error).contains("snapshot table has more than 32 bytes"),
        "{error:?}"
    );
}

#[test]
fn more_snapshots_than_there_can_be_are_refused() {
    let victim = Victim::with_snapshot("");
    for count in [65_537, u32::MAX] {
        victim.set_u32(60, count);
        victim.assert_trouble(&format!("nb_snapshots is {count}, must be 0 to 65536"));
        assert!(check(&victim.path).unwrap().check_errors > 0);
    }
}

#[test]
fn bitmap_directories_are_checked() {
    for (at, change, expected) in [
        (
            0,
            &0x1_0200_u64.to_be_bytes()[..],
            "bitmap_table_offset is 66048, must be a multiple",
        ),
        (0, &[0; 8], "bitmap_table_offset is 0, must be a multiple"),
        (8, &[0; 4], "bitmap_table_size is 0, must be 1 to 134217728"),
        (
            8,
            &[0xff; 4],
            "bitmap_table_size is 4294967295, must be 1 to 134217728",
        ),
        (
            8,
            &0x10_0000_u32.to_be_bytes(),
            "bitmap_table_size is 1048576, must be at most 512 MiB",
        ),
        (8, &2_u32.to_be_bytes(), "table has 2 entries, must have 1"),
        (12, &4_u32.to_be_bytes(), "flags is 4, must be at most 3"),
        (12, &8_u32.to_be_bytes(), "flags is 8, must be at most 3"),
        (16, &[2], "type is 2, must be 1"),
        (17, &[8], "granularity_bits is 8, must be 9 to 31"),
        (17, &[32], "granularity_bits is 32, must be 9 to 31"),
        (17, &[63], "granularity_bits is 63, must be 9 to 31"),
        (18, &[0, 0], "name_size is 0, must be 1 to 1023"),
        (18, &[4, 0], "name_size is 1024, must be 1 to 1023"),
        (18, &[0, 200], "does not hold exactly 1 bitmaps"),
        (20, &1_u32.to_be_bytes(), "extra_data_size is 1, must be 0"),
    ] {
        let victim = with_bitmap();
        let directory = victim.u64(victim.bitmaps_extension() + 16);
        patch(&victim.path, directory + at, change);
        victim.assert_trouble(expected);
        assert!(check(&victim.path).unwrap().corruptions > 0, "{expected}");
    }
    let victim = with_bitmap();
    patch(&victim.path, victim.bitmaps_extension(), &2_u32.to_be_bytes());
    victim.assert_trouble("does not hold exactly 2 bitmaps");
    victim.set(victim.bitmaps_extension() + 16, 0x4000_0000);
    victim.assert_trouble("runs past the end of the file");
}

fn with_bitmap() -> Victim {
    let victim = Victim::new("");
    oracle::qemu_img()
        .args(["bitmap", "--add"])
        .arg(&victim.path)
        .arg("b0")
        .ok();
    victim
}

/// A few megabytes that claim to be 128 PiB of the same cluster: effort follows the file, not the claim.
#[test]
fn tables_that_are_used_many_times_are_read_once() {
    let victim = Victim::new("cluster_size=2M");
    // Every entry of a large L1 table refers to the one L2 table, and every entry of that to one cluster.
    let (l1, l2) = (victim.u64(40), victim.l2());
    let cluster = victim.u64(l2);
    let l1_at = scratch::len(&victim.path).next_multiple_of(2 << 20);
    let entry = victim.u64(l1).to_be_bytes();
    patch(&victim.path, l1_at, &entry.repeat(256 << 10));
    patch(&victim.path, l2, &cluster.to_be_bytes().repeat(256 << 10));
    victim.set(40, l1_at);
    patch(&victim.path, 36, &(256_u32 << 10).to_be_bytes());
    victim.set(24, 1 << 57);
    let report = check(&victim.path).unwrap();
    assert_eq!(report.allocated_units, (256 << 10) * (256 << 10));
    assert!(report.corruptions > 0);
}

#[test]
fn refcount_blocks_that_are_used_a_million_times_are_compared_once() {
    let victim = Victim::new("cluster_size=2M,refcount_bits=1");
    let (table, block) = (victim.u64(48), victim.u64(victim.u64(48)));
    let start = scratch::len(&victim.path).next_multiple_of(2 << 20);
    patch(&victim.path, start, &block.to_be_bytes().repeat(1 << 20));
    victim.set(48, start);
    patch(&victim.path, 56, &4_u32.to_be_bytes());
    assert_ne!(table, start);
    // A file of an exabyte that is one hole, so that all of the blocks count.
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(&victim.path)
        .unwrap();
    file.set_len(8 << 40).unwrap();
    let report = check(&victim.path).unwrap();
    assert!(report.corruptions >= 1 << 20, "{}", report.corruptions);
}

/// 65536 snapshots take QEMU ten seconds to list.
#[test]
fn many_snapshots_are_listed_at_once() {
    let victim = Victim::new("");
    oracle::qemu_img()
        .args(["snapshot", "-c", "one"])
        .arg(&victim.path)
        .ok();
    let table = victim.u64(64);
    let mut entry = peek(&victim.path, table, 40 + 24 + 1 + 3);
    entry.resize(72, 0);
    let start = scratch::len(&victim.path).next_multiple_of(65_536);
    patch(&victim.path, start, &entry.repeat(65_536));
    victim.set(64, start);
    patch(&victim.path, 60, &65_536_u32.to_be_bytes());
    let layer = layer(&victim.path, "qcow2", &OpenSpec::default()).unwrap();
    assert_eq!(layer.facts().snapshots.len(), 65_536);
    let report = check(&victim.path).unwrap();
    assert!(report.corruptions > 0);
}
