//! Counts in the bytes of a refcount block.

use std::ops::Range;

/// Count `index` of a block whose counts have `1 << order` bits.
pub(crate) fn get_count(block: &[u8], order: u32, index: u64) -> u64 {
    let Ok(index) = usize::try_from(index) else {
        return 0;
    };
    match order {
        0..=2 => {
            let bits = 1u32 << order;
            let per_byte = 8 >> order;
            let byte = block.get(index / per_byte).copied().unwrap_or(0);
            let shift = (index % per_byte) << order;
            u64::from(byte >> shift) & ((1 << bits) - 1)
        }
        _ => {
            let width = 1usize << (order - 3).min(3);
            let bytes = block.get(index * width..(index + 1) * width).unwrap_or(&[]);
            bytes.iter().fold(0, |count, byte| count << 8 | u64::from(*byte))
        }
    }
}

/// Sets count `index` of a block and returns the bytes that changed. `count` must fit in its bits.
pub(crate) fn set_count(block: &mut [u8], order: u32, index: u64, count: u64) -> Range<usize> {
    let Ok(index) = usize::try_from(index) else {
        return 0..0;
    };
    match order {
        0..=2 => {
            let per_byte = 8 >> order;
            let at = index / per_byte;
            let shift = (index % per_byte) << order;
            let mask = ((1u8 << (1u32 << order)) - 1) << shift;
            if let Some(byte) = block.get_mut(at) {
                let [.., low] = count.to_be_bytes();
                *byte = *byte & !mask | low << shift & mask;
            }
            at..at + 1
        }
        _ => {
            let width = 1usize << (order - 3).min(3);
            let range = index * width..(index + 1) * width;
            let source = count.to_be_bytes();
            if let (Some(to), Some(from)) = (block.get_mut(range.clone()), source.get(8 - width..)) {
                to.copy_from_slice(from);
            }
            range
        }
    }
}
