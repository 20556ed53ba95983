//! How large a new image would be, by the same reckoning as QEMU's.

use diskmill_core::{BitmapFacts, CreateSpec, DataRuns, Measure, Result};

use super::header::{ClusterBits, RefcountOrder, Version};
use super::options::Plan;
use crate::preallocation::Preallocation;

/// See [`Driver::measure`](diskmill_core::Driver::measure).
pub(super) fn measure(spec: &CreateSpec, data: Option<&mut dyn DataRuns>) -> Result<Measure> {
    let plan = Plan::new(spec)?;
    let tables = table_bytes(&plan);
    let disk = whole_clusters(plan.cluster_bits, plan.virtual_size);
    let tables = tables.saturating_add(encryption_bytes(&plan));
    let everything = tables.saturating_add(disk);
    let reserves = matches!(plan.preallocation, Preallocation::Falloc | Preallocation::Full);
    let bitmaps = match &data {
        Some(source) if plan.version == Version::V3 => source
            .bitmaps()
            .map(|bitmaps| bitmap_bytes(plan.cluster_bits, plan.virtual_size, bitmaps)),
        _ => None,
    };
    let required = match data {
        _ if reserves => everything,
        None => tables,
        // What is absent above the backing image may still have to be stored.
        Some(_) if plan.backing.is_some() => everything,
        Some(runs) => tables.saturating_add(data_bytes(plan.cluster_bits, runs)?.min(disk)),
    };
    Ok(Measure {
        required,
        fully_allocated: everything,
        bitmaps,
    })
}

/// Bytes of bitmaps like these: their bits, their tables and their directory, each in whole clusters.
fn bitmap_bytes(cluster_bits: ClusterBits, virtual_size: u64, bitmaps: &[BitmapFacts]) -> u64 {
    let mut directory = 0_u64;
    let mut sum = 0_u64;
    for bitmap in bitmaps {
        let bits = virtual_size.div_ceil(bitmap.granularity.max(1));
        let clusters = cluster_bits.clusters(bits.div_ceil(8));
        let table = whole_clusters(cluster_bits, clusters.saturating_mul(8));
        let data = clusters.saturating_mul(cluster_bits.cluster_size());
        sum = sum.saturating_add(data).saturating_add(table);
        // An entry is 24 bytes and the name, padded to 8.
        let name = u64::try_from(bitmap.name.len()).unwrap_or(u64::MAX);
        directory = directory.saturating_add(name.saturating_add(24 + 7) & !7);
    }
    sum.saturating_add(whole_clusters(cluster_bits, directory))
}

/// Bytes of the clusters of an encryption header.
///
/// QEMU does not count the refcounts of them, which changes nothing unless they need a further block.
pub(super) fn encryption_bytes(plan: &Plan) -> u64 {
    whole_clusters(plan.cluster_bits, plan.encryption.header_len())
}

/// Bytes of all tables and the header, once all of the disk is allocated.
pub(super) fn table_bytes(plan: &Plan) -> u64 {
    let geometry = plan.geometry();
    let cluster_size = plan.cluster_bits.cluster_size();
    let disk = whole_clusters(plan.cluster_bits, plan.virtual_size);
    let l1_entries = geometry.l1_entries(disk);
    let l2_bytes = l1_entries.saturating_mul(cluster_size);
    let l1_bytes = whole_clusters(plan.cluster_bits, l1_entries.saturating_mul(8));
    let fixed = cluster_size.saturating_add(l2_bytes).saturating_add(l1_bytes);
    let clusters = plan.cluster_bits.clusters(fixed.saturating_add(disk));
    let (table, blocks) = refcount_clusters(plan.cluster_bits, plan.refcount_order, clusters);
    fixed.saturating_add(table.saturating_add(blocks).saturating_mul(cluster_size))
}

/// Clusters of a refcount table, and refcount blocks, that count `clusters` others and themselves.
pub(super) fn refcount_clusters(
    cluster_bits: ClusterBits,
    order: RefcountOrder,
    clusters: u64,
) -> (u64, u64) {
    let block_bits = order.block_bits(cluster_bits);
    let (mut table, mut blocks) = (0_u64, 0_u64);
    // Both only grow, and by less each time, since a block counts many clusters.
    loop {
        let all = clusters.saturating_add(table).saturating_add(blocks);
        let needed_blocks = all.div_ceil(1 << block_bits);
        let needed_table = cluster_bits.clusters(needed_blocks.saturating_mul(8));
        if (needed_table, needed_blocks) == (table, blocks) {
            return (table, blocks);
        }
        (table, blocks) = (needed_table, needed_blocks);
    }
}

fn whole_clusters(cluster_bits: ClusterBits, bytes: u64) -> u64 {
    cluster_bits
        .clusters(bytes)
        .saturating_mul(cluster_bits.cluster_size())
}

/// Bytes of the clusters that `runs` touch.
fn data_bytes(cluster_bits: ClusterBits, runs: &mut dyn DataRuns) -> Result<u64> {
    let cluster_size = cluster_bits.cluster_size();
    let mut counted = 0_u64;
    let mut end = 0;
    while let Some(run) = runs.next_run()? {
        let start = run.start.align_down(cluster_size).get().max(end);
        let stop = whole_clusters(cluster_bits, run.end.get());
        counted = counted.saturating_add(stop.saturating_sub(start));
        end = end.max(stop);
    }
    Ok(counted)
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use diskmill_core::{BackingName, GuestOffset, Options};

    use super::*;

    struct Runs(Vec<(u64, u64)>);

    impl DataRuns for Runs {
        fn next_run(&mut self) -> Result<Option<Range<GuestOffset>>> {
            if self.0.is_empty() {
                return Ok(None);
            }
            let run = self.0.remove(0);
            Ok(Some(GuestOffset::new(run.0)..GuestOffset::new(run.1)))
        }

        fn bitmaps(&self) -> Option<&[BitmapFacts]> {
            None
        }
    }

    fn spec(size: u64, options: &str) -> CreateSpec {
        let mut spec = CreateSpec::new(size);
        spec.options = Options::parse(options);
        spec
    }

    fn of_size(size: u64, options: &str) -> (u64, u64) {
        let measured = measure(&spec(size, options), None).unwrap();
        (measured.required, measured.fully_allocated)
    }

    #[test]
    fn numbers_are_those_of_qemu_img() {
        for (size, options, expected) in [
            (64 << 20, "", (327_680, 67_436_544)),
            (0, "", (196_608, 196_608)),
            (512, "", (327_680, 393_216)),
            (1 << 40, "", (168_034_304, 1_099_679_662_080)),
            (1 << 40, "extended_l2=on", (302_252_032, 1_099_813_879_808)),
            (1 << 40, "refcount_bits=64", (268_697_600, 1_099_780_325_376)),
            (100 << 30, "cluster_size=512", (2_138_404_352, 109_512_586_752)),
            (64 << 20, "preallocation=falloc", (67_436_544, 67_436_544)),
            (64 << 20, "preallocation=full", (67_436_544, 67_436_544)),
            (64 << 20, "preallocation=metadata", (327_680, 67_436_544)),
            (64 << 20, "data_file=d", (327_680, 67_436_544)),
            (64 << 20, "data_file=d,data_file_raw=on", (327_680, 67_436_544)),
            (
                2 << 60,
                "cluster_size=2M",
                (10_995_174_998_016, 2_305_854_004_388_691_968),
            ),
        ] {
            assert_eq!(of_size(size, options), expected, "{size} {options}");
        }
    }

    #[test]
    fn data_counts_by_the_clusters_it_touches() {
        let mut runs = Runs(vec![(0, 1), (100, 200), (65_535, 65_537), (200_000, 200_001)]);
        let measured = measure(&spec(64 << 20, ""), Some(&mut runs)).unwrap();
        assert_eq!(measured.required, 327_680 + 3 * 65_536);
        let mut runs = Runs(vec![(2_101_248, 2_105_344)]);
        let measured = measure(&spec(8 << 20, "cluster_size=4k"), Some(&mut runs)).unwrap();
        assert_eq!((measured.required, measured.fully_allocated), (40_960, 8_425_472));
    }

    #[test]
    fn a_backing_image_asks_for_everything() {
        let mut spec = spec(8 << 20, "");
        spec.backing = Some(BackingName {
            name: "b".to_owned(),
            format: None,
        });
        let measured = measure(&spec, Some(&mut Runs(Vec::new()))).unwrap();
        assert_eq!(measured.required, measured.fully_allocated);
        let measured = measure(&spec, None).unwrap();
        assert_eq!(measured.required, 327_680);
    }
}
