//! Space that an image has and does not use: what `map` shows of it.

use diskmill_core::{HostOffset, HostRun, Result, Storage};

use super::header::Header;

/// The refcount table and the sizes that go with it.
#[derive(Clone, Copy, Debug)]
pub(super) struct RefcountPlace {
    table_at: HostOffset,
    table_bytes: u64,
    cluster_size: u64,
    order: u32,
}

impl RefcountPlace {
    pub(super) fn new(header: &Header) -> Self {
        let cluster_size = header.cluster_bits.cluster_size();
        Self {
            table_at: header.refcount_table_offset,
            table_bytes: u64::from(header.refcount_table_clusters).saturating_mul(cluster_size),
            cluster_size,
            order: header.refcount_order.get(),
        }
    }

    /// Whether clearly more clusters are in use than the host has space for: the image was made with
    /// `preallocation=metadata`, or copied by a program that makes holes, and stored clusters may be holes.
    ///
    /// QEMU draws the line at a ninth more and at least two clusters.
    pub(super) fn is_hollow(&self, main: &dyn Storage) -> Result<bool> {
        let Some(allocated) = main.allocated()? else {
            return Ok(false);
        };
        let stored = allocated / self.cluster_size;
        let limit = (stored.saturating_mul(10) / 9).max(stored.saturating_add(2));
        let file_len = main.len()?;
        if file_len.div_ceil(self.cluster_size) < limit {
            return Ok(false);
        }
        let table_len = self.table_bytes.min(file_len.saturating_sub(self.table_at.get()));
        // At most 8 MiB: the header has been checked.
        let mut table = vec![0; usize::try_from(table_len).unwrap_or(0)];
        main.read_at(self.table_at, &mut table)?;
        let mut block = vec![0; usize::try_from(self.cluster_size).unwrap_or(0)];
        let mut in_use: u64 = 0;
        // A block that is no hole takes space itself, so there cannot be more of them than clusters stored.
        let mut left = stored.saturating_add(1);
        for entry in table.as_chunks::<8>().0 {
            let at = HostOffset::new(u64::from_be_bytes(*entry));
            if at == HostOffset::ZERO || at.get() >= file_len || left == 0 {
                continue;
            }
            if matches!(main.run_at(at)?, HostRun::Hole(len) if len >= self.cluster_size) {
                continue;
            }
            left = left.saturating_sub(1);
            main.read_padded(at, &mut block)?;
            in_use = in_use.saturating_add(self.counts_above_zero(&block));
            if in_use >= limit {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn counts_above_zero(&self, block: &[u8]) -> u64 {
        if let Some(bytes) = self.order.checked_sub(3) {
            let width = 1_usize << bytes.min(3);
            let used = block
                .chunks(width)
                .filter(|count| count.iter().any(|byte| *byte != 0));
            return used.count() as u64;
        }
        let bits = 1_u32 << self.order;
        let mask = u8::MAX >> 8_u32.saturating_sub(bits).min(7);
        let per_byte = 8 / bits;
        let used = |byte: &u8| {
            (0..per_byte)
                .filter(|index| (byte >> index.saturating_mul(bits).min(7)) & mask != 0)
                .count()
        };
        block.iter().map(|byte| used(byte) as u64).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_every_width_are_told_from_zero() {
        for order in 0..=6 {
            let place = RefcountPlace {
                table_at: HostOffset::ZERO,
                table_bytes: 0,
                cluster_size: 512,
                order,
            };
            let mut block = [0_u8; 512];
            assert_eq!(place.counts_above_zero(&block), 0);
            block[0] = 1;
            block[511] = 0x80;
            assert_eq!(place.counts_above_zero(&block), 2, "order {order}");
            assert_eq!(place.counts_above_zero(&[u8::MAX; 512]), 4096 >> order);
        }
    }
}
