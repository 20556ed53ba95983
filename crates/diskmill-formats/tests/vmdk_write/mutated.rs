//! Images with a few bytes changed at random: whatever comes of it, nothing panics, hangs or grows without end, and
//! what a repair leaves a second one does not touch.

use diskmill_core::{Chain, GuestOffset, Layer, Repair, State};
use diskmill_testkit::random::{seed, soak};
use diskmill_testkit::sparse_random::mix;
use diskmill_testkit::vmware;

use super::images::{self, G, KINDS};

/// Runs a reader would ask for at most, whatever the size of the disk is said to be.
const RUNS: usize = 60;

fn read(layer: &dyn Layer) {
    let size = layer.virtual_size();
    let mut at = 0;
    for _ in 0..RUNS {
        if at >= size {
            break;
        }
        let Ok(extent) = layer.map(GuestOffset::new(at), size - at) else {
            at = at.saturating_add(G);
            continue;
        };
        assert!(extent.len > 0 && extent.len <= size - at);
        if extent.state != State::Absent {
            let mut buf = vec![0; extent.len.min(G) as usize];
            let _ = layer.read_at(GuestOffset::new(at), &mut buf);
        }
        at += extent.len;
    }
}

fn exercise(files: &[Vec<u8>]) {
    if let Ok(layer) = images::read_only(files) {
        read(&*layer);
    }
    if let Ok(report) = images::check(files) {
        assert!(report.findings.len() <= diskmill_core::CheckReport::KEPT);
    }
    let disks = images::memory(files);
    if let Ok(layer) = images::open(&disks) {
        let below = Chain::default();
        let size = layer.virtual_size();
        for at in [0, 3 * G + 100, size.saturating_sub(700)] {
            let _ = layer.write_at(GuestOffset::new(at), &[7; 600], &below);
        }
        // Not too large for memory, whatever the header says.
        if size < 64 << 20 {
            let _ = layer.resize(size + G, &below);
            let _ = layer.clear();
        }
        let _ = layer.flush();
    }
    let disks = images::memory(files);
    if images::repair(&disks, Repair::All).is_ok() {
        let once = images::all_bytes(&disks);
        images::repair(&disks, Repair::All).expect("repair again");
        let twice = images::repair(&disks, Repair::All).expect("and again");
        assert_eq!((twice.corruptions_fixed, twice.leaks_fixed), (0, 0), "{twice:#?}");
        assert!(once.len() == disks.len());
    }
}

/// A number at an edge of what a field may be, or any.
fn number(random: u64) -> u64 {
    let shift = random >> 8 & 63;
    match random % 6 {
        0 => random,
        1 => 1 << shift,
        2 => u64::MAX >> shift,
        3 => u64::MAX,
        4 => 0,
        _ => random >> 20 & 0xff,
    }
}

#[test]
fn changed_images_do_no_harm() {
    let mut all: Vec<Vec<Vec<u8>>> = KINDS.iter().map(|kind| kind.make().files).collect();
    let disk = images::Disk { size: 6 * G, salt: 9 };
    all.push(images::make(
        6 * G,
        "subformat=streamOptimized",
        "x.vmdk",
        None,
        &disk,
    ));
    let line = [format!("RW {} SESPARSE \"x.vmdk\"", 6 * G / 512)];
    all.push(vec![
        vmware::descriptor("seSparse", &line),
        vmware::se_sparse(&disk.bytes()),
    ]);
    for (which, files) in all.iter().enumerate() {
        exercise(files);
        for case in 0..60 * u64::from(soak()) {
            let mut files = files.clone();
            for change in 0..1 + case % 3 {
                let random = |n: u64| mix(mix(seed() ^ case << 24 ^ change << 16) ^ (which as u64) << 8 ^ n);
                let index = (random(0) % files.len() as u64) as usize;
                let file = &mut files[index];
                if file.is_empty() {
                    continue;
                }
                // Headers, descriptors and tables are where it hurts.
                let end = match random(1) % 4 {
                    0 => 100,
                    1 => 1024,
                    2 => 64 << 10,
                    _ => file.len(),
                };
                let at = (random(2) % end.min(file.len()) as u64) as usize;
                let len = [1, 4, 8][(random(3) % 3) as usize].min(file.len() - at);
                let bytes = number(random(4)).to_le_bytes();
                file[at..at + len].copy_from_slice(&bytes[..len]);
                if random(5) % 40 == 0 {
                    file.truncate(at);
                }
            }
            exercise(&files);
        }
    }
}
