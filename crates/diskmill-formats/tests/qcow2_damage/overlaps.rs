//! Structures that lie upon one another: putting one right must not cost what the other says.

use diskmill_core::Repair;
use diskmill_testkit::oracle;

use super::numbers;
use super::support::repair;
use super::support::victim::Victim;

/// Repairs it: sound afterwards at once, with as many snapshots as `snapshots`.
fn assert_repaired(victim: &Victim, snapshots: u32) {
    let report = repair(&victim.path, Repair::All).unwrap();
    assert_eq!(numbers(&report), (0, 0, 0), "{report:#?}");
    assert!(report.findings.iter().all(|finding| finding.fixed), "{report:#?}");
    let (json, code) = oracle::check(&victim.path, "qcow2");
    assert_eq!(code, 0, "{json:#}");
    let again = repair(&victim.path, Repair::All).unwrap();
    assert_eq!(numbers(&again), (0, 0, 0), "{again:#?}");
    assert_eq!((again.corruptions_fixed, again.leaks_fixed), (0, 0), "{again:#?}");
    assert_eq!(victim.u32(60), snapshots);
}

/// What the disk and its snapshot show: the first MiB, and the pieces at 64 KiB and 40 MiB.
fn assert_shows(victim: &Victim) {
    victim.io("read -P 1 0 64k");
    victim.io("read -P 3 64k 64k");
    victim.io("read -P 2 40M 128k");
    let state = victim.dir.join("state.raw");
    oracle::convert(["-l", "one"], &victim.path, "qcow2", &state, "raw");
    oracle::io(&state, "raw", ["read -P 1 0 1M", "read -P 2 40M 128k"]);
}

/// Behind the active L1 table lies the L2 table of a snapshot, whose entries then pass for L1 entries of data clusters.
#[test]
fn an_l1_table_that_runs_on_into_an_l2_table_is_cut() {
    let victim = Victim::with_snapshot("cluster_size=4k");
    let needed = victim.u32(36);
    assert_eq!(needed * 8, 4096, "the table fills its cluster");
    victim.set_u32(36, needed + 5);
    assert_ne!(victim.u64(victim.l1() + 4096), 0, "there is a table behind it");
    assert_repaired(&victim, 1);
    assert_eq!(victim.u32(36), needed);
    assert_shows(&victim);
}

/// Most of what is in the cluster of the snapshot table could be L2 entries.
#[test]
fn a_snapshot_table_is_no_l2_table() {
    let victim = Victim::with_snapshot("");
    let table = victim.snapshot_table();
    for word in 32..64 {
        victim.set(table + 8 * word, 1);
    }
    victim.set(victim.l1() + 8, table | 1 << 63);
    assert_repaired(&victim, 1);
    assert_shows(&victim);
}

/// Dropping the entry for the L2 table that is not one changes the snapshot table, which is then put right in turn.
#[test]
fn a_snapshot_table_that_is_said_to_be_an_l1_table_is_repaired_to_the_end() {
    let victim = Victim::with_two_runs("");
    // A disk that one L1 entry is enough for.
    victim.set(24, 512 << 20);
    victim.set_u32(36, 1);
    victim.img(&["snapshot", "-c", "one"]);
    victim.io("write -P 3 64k 64k");
    victim.set(victim.snapshot_table(), victim.snapshot_table());
    assert_repaired(&victim, 0);
    victim.io("read -P 1 0 64k");
    victim.io("read -P 3 64k 64k");
    victim.io("read -P 2 40M 128k");
}
