use std::sync::Arc;

use diskmill_core::StorageMut;
use diskmill_storage::Memory;

use super::*;

const BITS: u32 = 9;
const CLUSTER: u64 = 1 << BITS;

/// A file of a header, a refcount table of one cluster and the block that counts them.
fn fresh(order: u32) -> (Arc<Memory>, Fence, Refcounts) {
    let mut bytes = vec![0; 3 * CLUSTER as usize];
    bytes[512..520].copy_from_slice(&(2 * CLUSTER).to_be_bytes());
    for cluster in 0..3 {
        set_count(&mut bytes[1024..], order, cluster, 1);
    }
    let file = Arc::new(Memory::from(bytes));
    let (fence, refcounts) = open(&file, order, CLUSTER, 1);
    (file, fence, refcounts)
}

fn open(file: &Arc<Memory>, order: u32, table_at: u64, table_clusters: u32) -> (Fence, Refcounts) {
    let mut fence = Fence::new(Arc::clone(file) as Arc<dyn StorageMut>, None, BITS);
    fence.protect(0..CLUSTER, Part::Header);
    let refcounts = Refcounts::load(&mut fence, order, table_at, table_clusters).unwrap();
    (fence, refcounts)
}

fn save(fence: &mut Fence, refcounts: &mut Refcounts) {
    refcounts.write_blocks(fence).unwrap();
    refcounts.write_table(fence).unwrap();
}

#[test]
fn counts_lie_as_the_format_says() {
    // Four clusters in use, in every width.
    for (order, expected) in [
        (0, vec![0x0f]),
        (1, vec![0x55]),
        (2, vec![0x11, 0x11]),
        (3, vec![1, 1, 1, 1]),
        (4, vec![0, 1, 0, 1, 0, 1, 0, 1]),
        (5, [0, 0, 0, 1].repeat(4)),
        (6, [0, 0, 0, 0, 0, 0, 0, 1].repeat(4)),
    ] {
        let mut block = vec![0; 64];
        for index in 0..4 {
            set_count(&mut block, order, index, 1);
        }
        assert_eq!(block[..expected.len()], expected, "order {order}");
        assert!(block[expected.len()..].iter().all(|byte| *byte == 0));
    }
}

#[test]
fn every_count_can_be_set_alone() {
    for order in 0..=6 {
        let max = u64::MAX >> (64 - (1u32 << order));
        let mut block = vec![0; 64];
        let entries = (64 * 8) >> order;
        for index in 0..entries {
            let touched = set_count(&mut block, order, index, max);
            assert!(touched.end <= block.len());
            assert_eq!(get_count(&block, order, index), max);
            set_count(&mut block, order, index, max / 2);
            assert_eq!(get_count(&block, order, index), max / 2);
            set_count(&mut block, order, index, 0);
            assert!(
                block.iter().all(|byte| *byte == 0),
                "order {order}, entry {index}"
            );
        }
        assert_eq!(
            get_count(&block, order, entries),
            0,
            "there is none behind the last"
        );
    }
}

#[test]
fn free_clusters_are_found_in_order_and_given_out_once() {
    for order in 0..=6 {
        let (_, mut fence, mut refcounts) = fresh(order);
        assert_eq!(refcounts.allocate(&mut fence, 1, 4).unwrap(), (3, 4));
        assert_eq!(refcounts.allocate(&mut fence, 2, 2).unwrap(), (7, 2));
        for cluster in [4, 5] {
            assert_eq!(refcounts.lower(&mut fence, cluster).unwrap(), 0);
        }
        // The gap takes what fits, and nothing that must be larger.
        assert_eq!(refcounts.allocate(&mut fence, 3, 3).unwrap(), (9, 3));
        assert_eq!(refcounts.allocate(&mut fence, 1, 9).unwrap(), (4, 2));
        assert_eq!(refcounts.allocate(&mut fence, 1, 1).unwrap(), (12, 1));
    }
}

#[test]
fn a_count_does_not_overflow() {
    for order in 0..4 {
        let (_, mut fence, mut refcounts) = fresh(order);
        let (cluster, _) = refcounts.allocate(&mut fence, 1, 1).unwrap();
        for count in 1..refcounts.max() {
            assert_eq!(refcounts.get(&mut fence, cluster).unwrap(), count);
            refcounts.raise(&mut fence, cluster).unwrap();
        }
        let error = refcounts.raise(&mut fence, cluster).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert_eq!(refcounts.get(&mut fence, cluster).unwrap(), refcounts.max());
    }
}

#[test]
fn blocks_and_tables_grow_and_count_themselves() {
    for order in [3, 4, 6] {
        let (file, mut fence, mut refcounts) = fresh(order);
        let per_block = (CLUSTER * 8) >> order;
        // More than the 64 blocks that the table of one cluster can name.
        let wanted = per_block * 70;
        let mut given = std::collections::BTreeSet::new();
        while (given.len() as u64) < wanted {
            let (first, count) = refcounts.allocate(&mut fence, 1, 1000).unwrap();
            for cluster in first..first + count {
                assert!(given.insert(cluster), "cluster {cluster} was given out twice");
            }
        }
        save(&mut fence, &mut refcounts);
        let mut header = [0; 12];
        diskmill_core::Storage::read_at(&*file, HostOffset::new(48), &mut header).unwrap();
        let table_at = u64::from_be_bytes(header[..8].try_into().unwrap());
        let clusters = u32::from_be_bytes(header[8..].try_into().unwrap());
        assert_ne!(table_at, 0, "the table has moved");

        // Read back by somebody else: each cluster has one owner.
        let (mut fence, mut again) = open(&file, order, table_at, clusters);
        let mut owned = given;
        owned.insert(0);
        let table = table_at / CLUSTER;
        let blocks: Vec<u64> = again
            .table
            .iter()
            .filter(|at| **at != 0)
            .map(|at| at / CLUSTER)
            .collect();
        for cluster in blocks.into_iter().chain(table..table + u64::from(clusters)) {
            assert!(owned.insert(cluster), "cluster {cluster} has two owners");
        }
        let end = owned.last().unwrap() + 2 * per_block;
        for cluster in 0..end {
            let count = u64::from(owned.contains(&cluster));
            assert_eq!(
                again.get(&mut fence, cluster).unwrap(),
                count,
                "cluster {cluster}"
            );
        }
    }
}

#[test]
fn a_table_that_names_one_full_block_again_and_again_ends_the_search() {
    let (file, _, _) = fresh(4);
    let mut table = Vec::new();
    for _ in 0..64 * 1000 {
        table.extend_from_slice(&(2 * CLUSTER).to_be_bytes());
    }
    file.write_at(HostOffset::new(2 * CLUSTER), &[1; CLUSTER as usize])
        .unwrap();
    file.write_at(HostOffset::new(3 * CLUSTER), &table).unwrap();
    let (mut fence, mut refcounts) = open(&file, 4, 3 * CLUSTER, 1000);
    let error = refcounts.allocate(&mut fence, 1, 1).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error:?}");
}

#[test]
fn the_first_cluster_is_never_given_out() {
    let (file, _, _) = fresh(4);
    file.write_at(HostOffset::new(2 * CLUSTER), &[0; CLUSTER as usize])
        .unwrap();
    let (mut fence, mut refcounts) = open(&file, 4, CLUSTER, 1);
    let error = refcounts.allocate(&mut fence, 1, 1).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
}

#[test]
fn a_table_of_the_largest_size_does_not_grow() {
    let bytes = MAX_TABLE_BYTES + 3 * CLUSTER;
    let file = Arc::new(Memory::zeroed(bytes));
    let full = vec![0xff; CLUSTER as usize];
    file.write_at(HostOffset::new(2 * CLUSTER), &full).unwrap();
    let (mut fence, mut refcounts) = open(&file, 6, 3 * CLUSTER, (MAX_TABLE_BYTES / CLUSTER) as u32);
    let behind = (MAX_TABLE_BYTES / 8) * (CLUSTER / 8);
    let error = refcounts
        .ensure_blocks(&mut fence, behind..behind + 1)
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace, "{error:?}");
}

#[test]
fn blocks_that_count_nothing_else_are_given_up() {
    for order in [0, 4, 6] {
        let (file, mut fence, mut refcounts) = fresh(order);
        let per_block = (CLUSTER * 8) >> order;
        let mut given = Vec::new();
        while (given.len() as u64) < per_block * 5 {
            let (first, count) = refcounts.allocate(&mut fence, 1, 1000).unwrap();
            given.extend(first..first + count);
        }
        let kept = given.remove(7);
        for cluster in given {
            refcounts.lower(&mut fence, cluster).unwrap();
        }
        save(&mut fence, &mut refcounts);
        refcounts.drop_empty_blocks(&mut fence).unwrap();
        assert!(!refcounts.is_dirty());
        let (mut fence, mut again) = open(&file, order, CLUSTER, 1);
        assert!(again.table[1..].iter().all(|at| *at == 0), "order {order}");
        let counts: Vec<u64> = (0..per_block)
            .filter(|cluster| again.get(&mut fence, *cluster).unwrap() != 0)
            .collect();
        assert_eq!(counts, [0, 1, 2, kept]);
    }
}
