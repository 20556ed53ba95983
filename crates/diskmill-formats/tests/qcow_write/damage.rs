//! Images that contradict themselves: what reading, writing, checking and repairing make of each.

use std::sync::Arc;

use diskmill_core::{Chain, Driver, ErrorKind, GuestOffset, Job, Repair, Role, Storage, StorageMut};
use diskmill_formats::qcow;
use diskmill_formats::qcow::header::Header;
use diskmill_storage::{File, FileOptions, LockPlan};
use diskmill_testkit::Scratch;
use diskmill_testkit::random::{Dice, soak};

use super::images::{self, Image, K};
use super::support::{self, disk};

const PACKED: u64 = 1 << 63;

fn word(file: &[u8], at: u64) -> u64 {
    let at = at as usize;
    u64::from_be_bytes(file[at..at + 8].try_into().expect("8 bytes"))
}

fn set(file: &mut [u8], at: u64, value: u64) {
    let at = at as usize;
    file[at..at + 8].copy_from_slice(&value.to_be_bytes());
}

/// An image of 75 clusters of 4 KiB in one table.
struct Victim {
    image: Image,
    file: Vec<u8>,
    l1: u64,
    l2: u64,
}

impl Victim {
    fn new(name: &str) -> Self {
        let image = images::named(name).make();
        let file = image.file.clone();
        let l1 = word(&file, 40);
        let l2 = word(&file, l1);
        Self { image, file, l1, l2 }
    }

    fn set(&mut self, at: u64, value: u64) {
        set(&mut self.file, at, value);
    }

    /// The entry of a cluster.
    fn entry(&self, cluster: u64) -> u64 {
        self.l2 + cluster * 8
    }

    fn read(&self, cluster: u64) -> Result<Vec<u8>, String> {
        let layer = disk::read_only(&qcow::DRIVER, &self.file).expect("open");
        let mut buf = vec![0; 4096];
        match layer.read_at(GuestOffset::new(cluster * 4096), &mut buf) {
            Ok(()) => Ok(buf),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Corrupt, "{error:?}");
                Err(support::text(&error))
            }
        }
    }

    /// Why it cannot be opened, or a cluster not be written; the file is as before.
    fn write(&self, cluster: u64) -> Result<Vec<u8>, String> {
        let disk = disk::memory(&self.file);
        let wrote = disk::open(&qcow::DRIVER, &disk).and_then(|layer| {
            layer.write_at(
                GuestOffset::new(cluster * 4096 + 512),
                &[5; 512],
                &Chain::default(),
            )?;
            layer.flush()
        });
        let bytes = disk::bytes(&disk);
        match wrote {
            Ok(()) => Ok(bytes),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Corrupt, "{error:?}");
                assert!(bytes == self.file, "nothing has been changed");
                Err(support::text(&error))
            }
        }
    }

    /// Corruptions that a check finds, whose texts have `text` in them.
    fn check(&self, text: &str) -> u64 {
        let report = disk::check(&qcow::DRIVER, &self.file).expect("check");
        assert!(
            report.findings.iter().any(|finding| finding.text.contains(text)),
            "{text}: {:#?}",
            report.findings
        );
        report.corruptions
    }

    /// What the disk shows once all is put right.
    fn repaired(&self) -> Vec<u8> {
        let disk = disk::memory(&self.file);
        let report = disk::repair(&qcow::DRIVER, &disk, Repair::All).expect("repair");
        assert_eq!((report.corruptions, report.check_errors), (0, 0), "{report:#?}");
        assert!(report.corruptions_fixed > 0);
        let bytes = disk::bytes(&disk);
        let found = disk::read(&qcow::DRIVER, &bytes, &Chain::default()).expect("read");
        self.image.assert_good(&bytes, &found);
        found
    }
}

fn refuses(found: Result<Vec<u8>, String>, text: &str) {
    let error = found.expect_err(text);
    assert!(error.contains(text), "{error}");
}

#[test]
fn an_l1_entry_past_the_end_or_above_2_to_63() {
    for (entry, text) in [
        (
            0x10_0000,
            "an L2 table at 0x100000 with 4096 bytes runs past the end of the file",
        ),
        (
            PACKED | 4096,
            "an L1 entry is 0x8000000000001000, must be below 2^63",
        ),
        (i64::MAX as u64 & !7, "runs past the end of the file"),
    ] {
        let mut victim = Victim::new("plain");
        victim.set(victim.l1, entry);
        refuses(victim.read(0), text);
        refuses(victim.write(0), text);
        assert_eq!(victim.check(text), 1);
        assert!(victim.repaired() == vec![0; victim.image.start.len()]);
    }
}

#[test]
fn an_l2_entry_that_is_no_place() {
    for (entry, text) in [
        (0x2001, "an L2 entry is 0x2001, must be a multiple of 512"),
        (
            0x100_0000,
            "a data cluster at 0x1000000 with 4096 bytes runs past the end of the file",
        ),
        (0x7fff_ffff_ffff_fe00, "runs past the end of the file"),
        (PACKED | 0x2000, "a compressed cluster of no bytes"),
    ] {
        let mut victim = Victim::new("plain");
        victim.set(victim.entry(0), entry);
        refuses(victim.read(0), text);
        refuses(victim.write(0), text);
        assert!(victim.read(1).is_ok(), "others can be read");
        assert_eq!(victim.check(text), 1);
        let mut expected = victim.image.start.clone();
        expected[..4096].fill(0);
        assert!(victim.repaired() == expected);
    }
}

#[test]
fn compressed_clusters_that_are_none() {
    // Past the end, garbage, and a stream of fewer bytes than a cluster.
    let mut victim = Victim::new("packed");
    victim.set(victim.entry(0), PACKED | 100 << 51 | 0x100_0000);
    refuses(victim.read(0), "runs past the end of the file");
    assert_eq!(
        victim.check("a compressed cluster at 0x1000000 with 100 bytes"),
        1
    );

    let entry = word(&victim.image.file, victim.entry(0));
    let at = (entry & ((1 << 51) - 1)) as usize;
    for (bytes, text) in [
        (&[0xff_u8; 8][..], "the deflate stream"),
        // A stored block of 4 bytes, the last.
        (
            &[1, 4, 0, 0xfb, 0xff, 1, 2, 3, 4],
            "the deflate stream holds 4 bytes, must hold 4096",
        ),
    ] {
        let mut victim = Victim::new("packed");
        victim.file[at..at + bytes.len()].copy_from_slice(bytes);
        refuses(victim.read(0), text);
        refuses(victim.write(0), text);
    }
}

#[test]
fn a_stream_that_expands_without_end_costs_one_cluster() {
    use std::io::Write;
    let mut encoder = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::best());
    encoder.write_all(&vec![7; 1 << 20]).expect("compress");
    let bomb = encoder.finish().expect("compress");
    let mut victim = Victim::new("packed");
    let at = victim.file.len() as u64;
    victim.file.extend(&bomb);
    victim.set(victim.entry(0), PACKED | (bomb.len() as u64) << 51 | at);
    assert!(victim.read(0).expect("cut") == [7; 4096]);
}

#[test]
fn data_in_the_tables_is_never_written() {
    let mut victim = Victim::new("plain");
    for at in [0, victim.l2, victim.l2 - 512, victim.l2 + 512] {
        let entry = victim.entry(0);
        if at == 0 {
            // The header's own place is what "absent" is called; the next sector begins within the L1 table.
            victim.set(entry, 512);
        } else {
            victim.set(entry, at);
        }
        refuses(victim.write(0), "lies in the tables");
        assert_eq!(victim.check("lies in the tables"), 1);
        let mut expected = victim.image.start.clone();
        expected[..4096].fill(0);
        assert!(victim.repaired() == expected);
    }
}

#[test]
fn tables_in_one_place_are_only_read() {
    let mut victim = Victim::new("many tables");
    let second = word(&victim.file, victim.l1 + 8);
    victim.set(victim.l1, second);
    refuses(victim.write(0), "an L2 table at");
    assert_eq!(victim.check("overlaps another table"), 1);
    // Nobody knows whose the table is.
    let disk = disk::memory(&victim.file);
    let report = disk::repair(&qcow::DRIVER, &disk, Repair::All).expect("repair");
    assert_eq!((report.corruptions, report.corruptions_fixed), (1, 0));
    assert!(disk::bytes(&disk) == victim.file);
}

#[test]
fn two_entries_with_one_cluster() {
    let mut victim = Victim::new("plain");
    victim.set(victim.entry(1), word(&victim.file, victim.entry(0)));
    let first = victim.read(0).expect("read");
    assert!(victim.read(1).expect("read") == first);
    assert_eq!(victim.check("is in the place of another one"), 1);
    let disk = disk::memory(&victim.file);
    let leaks = disk::repair(&qcow::DRIVER, &disk, Repair::Leaks).expect("repair");
    assert_eq!((leaks.corruptions, leaks.corruptions_fixed), (1, 0));
    assert!(disk::bytes(&disk) == victim.file);
    let mut expected = victim.image.start.clone();
    expected[4096..8192].copy_from_slice(&first);
    assert!(victim.repaired() == expected);
    // A stream in which data is written.
    let mut victim = Victim::new("packed");
    let stream = word(&victim.file, victim.entry(0)) & ((1 << 51) - 1);
    victim.set(victim.entry(4), stream & !511);
    assert!(victim.check("is in the place of another one") >= 1);
    victim.repaired();
}

#[test]
fn what_leaks_at_the_end_is_cut_off() {
    let image = images::named("plain").make();
    let mut file = image.file.clone();
    let len = file.len();
    file.resize(len + 5 * 4096, 0xee);
    assert_eq!(disk::check(&qcow::DRIVER, &file).expect("check").leaks, 5);
    let disk = disk::memory(&file);
    let report = disk::repair(&qcow::DRIVER, &disk, Repair::Leaks).expect("repair");
    assert_eq!((report.leaks, report.leaks_fixed), (0, 5), "{report:#?}");
    assert!(disk::bytes(&disk) == image.file);
}

#[test]
fn an_image_cut_short_within_a_cluster_is_written_behind_it() {
    let victim = Victim::new("plain");
    let mut file = victim.file.clone();
    file.truncate(file.len() - 1000);
    let disk = disk::memory(&file);
    let layer = disk::open(&qcow::DRIVER, &disk).expect("open");
    layer
        .write_at(GuestOffset::new(3 * 4096), &[5; 4096], &Chain::default())
        .expect("write");
    layer.flush().expect("flush");
    drop(layer);
    let bytes = disk::bytes(&disk);
    assert_eq!(disk::check(&qcow::DRIVER, &bytes).expect("check").corruptions, 0);
    let found = disk::read(&qcow::DRIVER, &bytes, &Chain::default()).expect("read");
    let mut expected = disk::read(&qcow::DRIVER, &file, &Chain::default()).expect("read");
    expected[3 * 4096..4 * 4096].fill(5);
    assert!(found == expected);
}

/// Whatever comes of it, nothing panics, hangs or grows without end, and what a repair leaves a second one does not touch.
/// Where the lost cluster was said to be, nothing else is put: it would be shown in both places, for good.
#[test]
fn nothing_new_is_put_in_the_place_of_a_cluster_that_was_cut_off() {
    for name in ["plain", "packed"] {
        let victim = Victim::new(name);
        let mut file = victim.file.clone();
        let free = (0..75).find(|cluster| word(&file, victim.entry(*cluster)) == 0);
        let free = free.expect("a cluster without a place") * 4096;
        file.truncate(file.len() - 3 * 4096);
        let before = disk::memory(&file);
        let layer = disk::open(&qcow::DRIVER, &before).expect("open");
        let wrote = layer.write_at(GuestOffset::new(free), &[5; 4096], &Chain::default());
        let error = wrote.expect_err("the place is another's");
        assert!(
            support::text(&error).contains("before that is repaired"),
            "{error:?}"
        );
        drop(layer);
        assert!(disk::bytes(&before) == file, "{name}");
        disk::repair(&qcow::DRIVER, &before, Repair::All).expect("repair");
        let layer = disk::open(&qcow::DRIVER, &before).expect("open");
        layer
            .write_at(GuestOffset::new(free), &[5; 4096], &Chain::default())
            .expect("write");
        layer.flush().expect("flush");
        drop(layer);
        let bytes = disk::bytes(&before);
        assert_eq!(disk::check(&qcow::DRIVER, &bytes).expect("check").corruptions, 0);
    }
}

#[test]
fn a_long_hole_in_the_file_is_counted_without_walking_it() {
    let scratch = Scratch::new();
    let victim = Victim::new("plain");
    let mut file = victim.file.clone();
    // 8 TiB on: at one look a cluster that took hours.
    let far = 8_u64 << 40;
    set(&mut file, victim.entry(0), far);
    let path = scratch.file("far.qcow", &file);
    let options = FileOptions::write(LockPlan::NONE);
    let stored = File::open(&path, &options).expect("open");
    stored.set_len(far + 4096).expect("set the length");
    let stored: Arc<dyn Storage> = Arc::new(stored);
    let parsed = qcow::DRIVER
        .parse(Arc::clone(&stored), &disk::how())
        .expect("parse");
    let files = vec![(Role::Main, stored)];
    let report = parsed.check(files, &disk::how(), Job::silent()).expect("check");
    assert_eq!((report.corruptions, report.leaks), (0, 0), "{report:#?}");
    let end = file.len() as u64 / 4096;
    let unused = (far / 4096 - end) + u64::from(word(&victim.file, victim.entry(0)) != 0);
    let notes: Vec<_> = report.findings.iter().map(|finding| &finding.text).collect();
    assert!(
        notes
            .iter()
            .any(|note| note.starts_with(&format!("{unused} clusters"))),
        "{unused} {notes:?}"
    );
}

#[test]
fn changed_images_do_no_harm() {
    let mut dice = Dice::new(77);
    for name in ["plain", "packed", "largest", "many tables", "secret overlay"] {
        let image = images::named(name).make();
        let header = Header::parse(&image.file[..48], image.file.len() as u64).expect("a header");
        let places = [
            0,
            header.l1_table_offset.get(),
            word(&image.file, header.l1_table_offset.get()),
        ];
        for _ in 0..60 * soak() {
            let mut file = image.file.clone();
            for _ in 0..1 + dice.below(4) {
                let at = dice.one_of(&places) + dice.below(80);
                let value = match dice.below(5) {
                    0 => dice.next(),
                    1 => 1 << dice.below(64),
                    2 => u64::MAX >> dice.below(64),
                    3 => dice.below(file.len() as u64) & !511,
                    _ => 0,
                };
                match dice.below(2) {
                    0 => file[at as usize] = value as u8,
                    _ => set(&mut file, at & !7, value),
                }
            }
            exercise(&file);
        }
    }
}

fn exercise(file: &[u8]) {
    let most = 64 << 20;
    if let Ok(layer) = disk::read_only(&qcow::DRIVER, file) {
        let size = layer.virtual_size();
        let mut at = 0;
        for _ in 0..60 {
            if at >= size {
                break;
            }
            let Ok(extent) = layer.map(GuestOffset::new(at), size - at) else {
                at += 512;
                continue;
            };
            assert!(extent.len > 0 && extent.len <= size - at);
            let mut buf = vec![0; extent.len.min(64 * K) as usize];
            let _ = layer.read_at(GuestOffset::new(at), &mut buf);
            at += extent.len;
        }
    }
    if let Ok(report) = disk::check(&qcow::DRIVER, file) {
        assert!(report.findings.len() <= diskmill_core::CheckReport::KEPT);
    }
    let disk = disk::memory(file);
    if let Ok(layer) = disk::open(&qcow::DRIVER, &disk) {
        let below = Chain::default();
        let size = layer.virtual_size();
        for at in [0, 20_000, size.saturating_sub(700)] {
            let _ = layer.write_at(GuestOffset::new(at), &[7; 600], &below);
        }
        if size < most {
            let _ = layer.resize(size + 64 * K, &below);
            let _ = layer.clear();
        }
        let _ = layer.flush();
    }
    let disk = disk::memory(file);
    if disk::repair(&qcow::DRIVER, &disk, Repair::All).is_ok() {
        let once = disk::bytes(&disk);
        let again = disk::repair(&qcow::DRIVER, &disk, Repair::All).expect("repair again");
        assert_eq!((again.corruptions_fixed, again.leaks_fixed), (0, 0), "{again:#?}");
        assert!(disk::bytes(&disk) == once);
    }
}
