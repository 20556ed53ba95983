//! Operations at random, for formats that are held against a [`Model`](super::Model) with [`Dice`].

use diskmill_core::ZeroHow;

use super::Op;
use crate::random::Dice;

/// `count` operations on a disk of `size` bytes that is stored in units of `unit` bytes. `salt` keeps tests from making
/// the same choices.
///
/// Writes, zeros, discards, flushes, and now and then another size, a new start or an empty layer; places are on units,
/// on sectors or anywhere, lengths up to three units. Nothing is packed, nothing concerns snapshots or bitmaps.
pub fn ops(size: u64, unit: u64, salt: u64, count: u64) -> Vec<Op> {
    let mut dice = Dice::new(salt);
    (0..count).map(|_| op(&mut dice, size, unit)).collect()
}

fn op(dice: &mut Dice, size: u64, unit: u64) -> Op {
    let at = match dice.below(3) {
        0 => dice.below(size / unit + 1) * unit,
        1 => dice.below(size / 512) * 512,
        _ => dice.below(size),
    };
    let len = match dice.below(4) {
        0 => 1 + dice.below(5000),
        1 => 512 * (1 + dice.below(8)),
        2 => unit * (1 + dice.below(3)),
        _ => 1 + dice.below(3 * unit),
    };
    let how = *dice.one_of(&[ZeroHow::KeepAllocated, ZeroHow::MayUnmap]);
    let fill = dice.next() as u8;
    match dice.below(48) {
        0..=20 => Op::Write { at, len, fill },
        21..=29 => Op::Zero { at, len, how },
        30..=35 => Op::Discard { at, len },
        36..=40 => Op::Flush,
        41..=43 => Op::Resize {
            size: (1 + dice.below(size * 5 / 4 / 512)) * 512,
        },
        44..=46 => Op::Reopen,
        _ => Op::Clear,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_sorts_of_operations_come_up() {
        let ops = ops(1 << 20, 4096, 1, 2000);
        let has = |wanted: fn(&Op) -> bool| ops.iter().any(wanted);
        assert!(has(|op| matches!(op, Op::Write { at, .. } if at % 512 != 0)));
        assert!(has(
            |op| matches!(op, Op::Zero { at, len, .. } if (at | len) % 4096 == 0)
        ));
        assert!(has(|op| matches!(op, Op::Discard { .. })));
        assert!(has(|op| matches!(op, Op::Resize { size } if *size > 1 << 20)));
        assert!(has(|op| *op == Op::Reopen) && has(|op| *op == Op::Clear) && has(|op| *op == Op::Flush));
    }
}
