//! Ways to damage an image.

use diskmill_testkit::scratch::{self, patch};

use super::support::victim::Victim;

/// What `qemu-img check` makes of a damage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rival {
    /// Its repair ends with a sound image, after as many fixes as ours.
    Ends,
    /// Its repair ends with a sound image. What it counts on the way depends on the order it works in.
    EndsOtherwise,
    /// Its repair leaves some of it, or fails.
    Leaves,
    /// It does not open the image, or sees nothing wrong.
    Blind,
}

/// A way to damage an image.
pub struct Case {
    pub name: &'static str,
    /// How the image is made, and what that is called.
    pub image: (fn(&str) -> Victim, &'static str),
    pub options: &'static str,
    pub damage: fn(&Victim),
    pub rival: Rival,
}

impl Case {
    /// The damaged image.
    pub fn victim(&self) -> Victim {
        let victim = self.image.0(self.options);
        (self.damage)(&victim);
        victim
    }
}

macro_rules! cases {
    ($($rival:ident $image:ident $options:literal { $($name:literal => $damage:expr;)* })*) => {
        pub const CASES: &[Case] = &[$($(Case {
            name: $name,
            image: (Victim::$image, stringify!($image)),
            options: $options,
            damage: $damage,
            rival: Rival::$rival,
        },)*)*];
    };
}

const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;

cases! {
    Ends with_two_runs "" {
        "l1 not copied" => |v| v.uncopy(v.l1());
        "l1 gone" => |v| v.set(v.l1(), 0);
        "l1 twice" => |v| v.set(v.l1() + 8, v.u64(v.l1()));
        "l2 unaligned zero" => |v| v.or(v.l2(), 0x201);
        "l2 not copied" => |v| v.uncopy(v.l2());
        "l2 same" => |v| v.set(v.l2(), v.u64(v.l2() + 8));
        "l2 gone" => |v| v.set(v.l2(), 0);
        "l2 nowhere" => |v| v.set(v.l2(), COPIED);
        "l2 to the refcount table" => |v| v.set(v.l2(), COPIED | 0x1_0000);
        "compressed into metadata" => |v| v.set(v.l2(), COMPRESSED | 0x1_0000);
        "compressed across clusters" => |v| v.set(v.l2(), COMPRESSED | 1 << 54 | 0x5_fff0);
        "refblock zeros" => |v| patch(&v.path, v.refcount_block(), &[0; 64]);
        "refblock higher" => |v| patch(&v.path, v.refcount_block() + 12, &[0, 9]);
        "refblock lower" => |v| patch(&v.path, v.refcount_block() + 8, &[0, 0]);
        "refblock leak" => |v| {
            patch(&v.path, v.refcount_block() + 80, &[0, 1, 0, 1]);
            patch(&v.path, 0x50_0000, &[0]);
        };
        "reftable zero" => |v| v.set(v.refcount_table(), 0);
        "reftable alias" => |v| v.set(v.refcount_table() + 8, v.refcount_block());
        "reftable to itself" => |v| v.set(v.refcount_table(), v.refcount_table());
        "header reftable past eof" => |v| v.set(48, 0x4000_0000);
        "header reftable clusters 0" => |v| v.set_u32(56, 0);
        "l1 to the refcount table" => |v| v.set(v.l1() + 8, v.refcount_table() | COPIED);
    }
    EndsOtherwise with_two_runs "" {
        "reftable past eof" => |v| v.set(v.refcount_table(), 0x4000_0000);
    }
    Leaves with_two_runs "" {
        "l1 reserved" => |v| v.or(v.l1(), 1);
        "l1 unaligned" => |v| v.or(v.l1(), 0x200);
        "l1 past eof" => |v| v.set(v.l1(), COPIED | 0x4000_0000);
        "l1 to itself" => |v| v.set(v.l1(), v.l1() | COPIED);
        "l1 to a refblock" => |v| v.set(v.l1() + 8, v.refcount_block() | COPIED);
        "l1 to data" => |v| v.set(v.l1() + 8, 0x5_0000);
        "l2 reserved" => |v| v.or(v.l2(), 2);
        "l2 unaligned" => |v| v.or(v.l2(), 0x200);
        "l2 past eof" => |v| v.set(v.l2(), COPIED | 0x4000_0000);
        "l2 just past eof" => |v| v.set(v.l2(), COPIED | scratch::len(&v.path));
        "l2 zero past eof" => |v| v.set(v.l2(), 0x4000_0001);
        "compressed copied" => |v| v.set(v.l2(), COPIED | COMPRESSED | 0x5_0000);
        "compressed past eof" => |v| v.set(v.l2(), COMPRESSED | 0x5000_0000);
        "reftable reserved" => |v| v.or(v.refcount_table(), 1);
        "reftable unaligned" => |v| v.or(v.refcount_table(), 0x200);
        "header l1 past eof" => |v| v.set(40, 0x4000_0000);
        "header l1 in data" => |v| v.set(40, 0x5_0000);
        "header l1 too long" => |v| v.set_u32(36, 32_768);
        "header reftable clusters 3" => |v| v.set_u32(56, 3);
        "file cut short" => |v| {
            let file = std::fs::OpenOptions::new().write(true).open(&v.path).unwrap();
            file.set_len(0x10_0000).unwrap();
        };
    }
    Leaves with_two_runs "compat=0.10" {
        "v2 l2 past eof" => |v| v.set(v.l2(), 0x4000_0000);
    }
    Blind with_two_runs "compat=0.10" {
        "v2 zero" => |v| v.or(v.l2(), 1);
    }
    Ends with_two_runs "extended_l2=on" {
        "ext unaligned no data" => |v| { v.or(v.l2(), 0x200); v.set(v.l2() + 8, 0); };
        "ext unaligned zeros" => |v| { v.or(v.l2(), 0x200); v.set(v.l2() + 8, 0xffff_ffff << 32); };
        "ext refblock lower" => |v| patch(&v.path, v.refcount_block() + 10, &[0, 0, 0, 0]);
    }
    Leaves with_two_runs "extended_l2=on" {
        "ext both" => |v| v.set(v.l2() + 8, 0x1_0000_0001);
        "ext nowhere" => |v| v.set(v.l2(), 0);
        "ext compressed" => |v| v.set(v.l2(), COMPRESSED | 0x5_0000);
        "ext unaligned" => |v| v.or(v.l2(), 0x200);
    }
    Blind with_two_runs "extended_l2=on" {
        "ext zero flag" => |v| v.or(v.l2(), 1);
    }
    Ends with_two_runs "data_file=victim.data" {
        "data not copied" => |v| v.uncopy(v.l2() + 8);
        "data unaligned zero" => |v| v.set(v.l2(), COPIED | 0x201);
    }
    Leaves with_two_runs "data_file=victim.data" {
        "data unaligned" => |v| v.set(v.l2(), COPIED | 0x200);
        "data compressed" => |v| v.set(v.l2() + 8, COMPRESSED | 0x1_0000);
        "data snapshots" => |v| { v.set_u32(60, 1); v.set(64, 0x3_0000); };
    }
    Blind with_two_runs "data_file=victim.data" {
        "data elsewhere" => |v| v.set(v.l2(), COPIED | 0x1_0000);
    }
    Ends with_snapshot "" {
        "snapshot extra data missing" => |v| v.set_u32(v.snapshot_table() + 36, 0);
        "snapshot extra data short" => |v| v.set_u32(v.snapshot_table() + 36, 8);
        "snapshot entry too many" => |v| v.set_u32(60, 2);
        "snapshot id too long" => |v| patch(&v.path, v.snapshot_table() + 12, &[0xff; 2]);
        "snapshot name too long" => |v| patch(&v.path, v.snapshot_table() + 14, &[0xff; 2]);
        "snapshot active l1 not copied" => |v| v.uncopy(v.l1());
        "snapshot data refcounts low" => |v| patch(&v.path, v.refcount_block() + 14, &[0, 1, 0, 1]);
        "snapshot data refcounts high" => |v| patch(&v.path, v.refcount_block() + 14, &[0, 3, 0, 7]);
    }
    Ends with_snapshot "refcount_bits=2" {
        "snapshot l1 twice in 2 bits" => |v| v.set(v.l1() + 8, v.u64(v.l1()));
    }
    Ends with_snapshot "refcount_bits=4" {
        "snapshot refblock lost of 4 bits" => |v| patch(&v.path, v.refcount_block(), &[0; 64]);
    }
    Ends with_snapshot "refcount_bits=8" {
        "snapshot refblock lost of 8 bits" => |v| patch(&v.path, v.refcount_block(), &[0; 64]);
    }
    Ends with_snapshot "refcount_bits=32" {
        "snapshot refblock lost of 32 bits" => |v| patch(&v.path, v.refcount_block(), &[0; 256]);
    }
    Ends with_snapshot "refcount_bits=64" {
        "snapshot refblock lost of 64 bits" => |v| patch(&v.path, v.refcount_block(), &[0; 256]);
    }
    Ends with_two_runs "refcount_bits=1" {
        "refblock lost of 1 bit" => |v| patch(&v.path, v.refcount_block(), &[0; 64]);
    }
    Ends with_two_runs "cluster_size=512" {
        "small clusters reftable zero" => |v| v.set(v.refcount_table(), 0);
        "small clusters l2 same" => |v| v.set(v.l2(), v.u64(v.l2() + 8));
    }
    Ends with_two_runs "cluster_size=2M" {
        "large clusters reftable zero" => |v| v.set(v.refcount_table(), 0);
    }
    Leaves with_snapshot "" {
        "snapshot l1 unaligned" => |v| v.or(v.snapshot_table(), 0x200);
        "snapshot l1 past eof" => |v| v.set(v.snapshot_table(), 0x4000_0000);
        "snapshot l1 too large" => |v| v.set_u32(v.snapshot_table() + 8, 0x50_0000);
        "snapshot l1 entry unaligned" => |v| v.or(v.u64(v.snapshot_table()), 0x200);
    }
    Blind with_snapshot "" {
        "snapshot extra data too long" => |v| v.set_u32(v.snapshot_table() + 36, 1025);
        "snapshot extra data endless" => |v| v.set_u32(v.snapshot_table() + 36, u32::MAX);
        "snapshots too many" => |v| v.set_u32(60, 65_537);
        "snapshot table past eof" => |v| v.set(64, 0x4000_0000);
    }
    Ends with_bitmap "" {
        "bitmap refcounts" => |v| {
            let cluster = v.u64(v.bitmap_table()) >> 16;
            patch(&v.path, v.refcount_block() + cluster * 2, &[0, 0]);
        };
        "bitmap not to be trusted" => |v| v.set(88, 0);
    }
    Leaves with_bitmap "" {
        "bitmap table past eof" => |v| v.set(v.bitmap_directory(), 0x4000_0000);
        "bitmap entry past eof" => |v| v.set(v.bitmap_table(), 0x4000_0000);
    }
    Blind with_bitmap "" {
        "bitmap entry reserved" => |v| v.or(v.bitmap_table(), 2);
        "bitmap entry unaligned" => |v| v.or(v.bitmap_table(), 0x200);
        "bitmap table unaligned" => |v| v.or(v.bitmap_directory(), 0x200);
        "bitmap directory past eof" => |v| v.set(v.bitmaps_extension() + 16, 0x4000_0000);
        "bitmap directory short" => |v| v.set(v.bitmaps_extension() + 8, 16);
        "bitmap flags" => |v| v.set_u32(v.bitmap_directory() + 12, 4);
    }
}
