//! `check -r`: the same damage repaired by both tools, with the same words, numbers and exit codes.

use diskmill_testkit::scratch::{patch, peek};
use diskmill_testkit::{Scratch, oracle};

use crate::tools::{native, ours, theirs};

/// Bytes of a file, by offset.
type Patches = Vec<(u64, Vec<u8>)>;

fn word(scratch: &Scratch, at: u64) -> u64 {
    u64::from_be_bytes(peek(scratch.join("a.qcow2"), at, 8).try_into().unwrap())
}

fn place(scratch: &Scratch, at: u64) -> u64 {
    word(scratch, at) & 0x00ff_ffff_ffff_fe00
}

/// Makes `a.qcow2`, with data and a snapshot, and says what damages it so that both tools can make it sound.
fn damaged(scratch: &Scratch, options: &str, damage: fn(&Scratch) -> Patches) {
    let path = scratch.join("a.qcow2");
    oracle::create(&path, "qcow2", options, "64M");
    oracle::io(&path, "qcow2", ["write -P 1 0 1M", "write -P 2 40M 128k"]);
    theirs(scratch).words("snapshot -c one a.qcow2").ok();
    oracle::io(&path, "qcow2", ["write -P 3 64k 64k"]);
    for (at, bytes) in damage(scratch) {
        patch(&path, at, &bytes);
    }
}

/// Two clusters that nothing refers to.
fn leak(scratch: &Scratch) -> Patches {
    let block = place(scratch, place(scratch, 48));
    vec![(block + 100, vec![0, 1, 0, 1]), (0x50_0000, vec![0])]
}

/// A count that is too low, and one that is too high.
fn counts(scratch: &Scratch) -> Patches {
    let block = place(scratch, place(scratch, 48));
    vec![(block + 14, vec![0, 1, 0, 9])]
}

/// A flag that is not set.
fn flag(scratch: &Scratch) -> Patches {
    let l1 = place(scratch, 40);
    vec![(l1, (word(scratch, l1) & !(1 << 63)).to_be_bytes().to_vec())]
}

/// An entry that refers to the cluster of another.
fn shared(scratch: &Scratch) -> Patches {
    let l2 = place(scratch, place(scratch, 40));
    vec![(l2, word(scratch, l2 + 16).to_be_bytes().to_vec())]
}

/// Refcounts that are gone.
fn rebuild(scratch: &Scratch) -> Patches {
    let block = place(scratch, place(scratch, 48));
    vec![(block, vec![0; 64])]
}

fn nothing(_: &Scratch) -> Patches {
    Vec::new()
}

/// Demands that both tools do and say the same, and leave the same disk.
fn both(options: &str, damage: fn(&Scratch) -> Patches, flags: &str) {
    let scratch = Scratch::new();
    damaged(&scratch, options, damage);
    for name in ["ours", "theirs"] {
        std::fs::create_dir(scratch.join(name)).unwrap();
        std::fs::copy(scratch.join("a.qcow2"), scratch.join(name).join("a.qcow2")).unwrap();
    }
    let words = format!("check {flags} a.qcow2");
    let our = ours(&scratch).dir(scratch.join("ours")).words(&words).finish();
    let their = theirs(&scratch)
        .dir(scratch.join("theirs"))
        .words(&words)
        .finish();
    let context = format!("{words}\n--- ours\n{our}\n--- qemu-img's\n{their}");
    assert_eq!(our.code, their.code, "{context}");
    if flags.contains("json") && !their.out().is_empty() {
        let (mut our, mut their) = (our.json(), their.json());
        for json in [&mut our, &mut their] {
            // A rebuild puts its tables elsewhere.
            json.as_object_mut().unwrap().remove("image-end-offset");
        }
        assert_eq!(our, their, "{context}");
    } else {
        let text = |out: String| {
            let lines = out.lines().filter(|line| !line.starts_with("Image end offset"));
            lines.map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(text(our.out()), text(their.out()), "{context}");
    }
    assert_eq!(our.err().is_empty(), their.err().is_empty(), "{context}");
    if our.code == Some(0) {
        let path = scratch.join("ours").join("a.qcow2");
        oracle::assert_clean(&path, "qcow2");
        oracle::assert_identical(&path, "qcow2", scratch.join("theirs").join("a.qcow2"), "qcow2");
    }
}

macro_rules! cells {
    ($($name:ident: $damage:ident;)*) => {$(
        #[test]
        fn $name() {
            for options in ["compat=1.1", "extended_l2=on,cluster_size=64k", "compat=0.10"] {
                for flags in ["-r all", "-r leaks", "-r all --output=json", "-r leaks --output=json", "-q -r all"] {
                    both(options, $damage, flags);
                }
            }
        }
    )*};
}

cells! {
    qcow2__nothing_to_repair: nothing;
    qcow2__leak__repair: leak;
    qcow2__counts__repair: counts;
    qcow2__copied_flag__repair: flag;
    qcow2__shared_cluster__repair: shared;
    qcow2__lost_refcounts__repair: rebuild;
}

/// An image whose writer died before it wrote the refcounts it had put off.
#[test]
fn qcow2__dirty__opened_for_writing() {
    let scratch = Scratch::new();
    damaged(&scratch, "lazy_refcounts=on", rebuild);
    let path = scratch.join("a.qcow2");
    patch(&path, 72, &1_u64.to_be_bytes());
    std::fs::copy(&path, scratch.join("b.qcow2")).unwrap();
    ours(&scratch).words("snapshot -d one a.qcow2").ok();
    theirs(&scratch).words("snapshot -d one b.qcow2").ok();
    for name in ["a.qcow2", "b.qcow2"] {
        assert_eq!(peek(scratch.join(name), 72, 8), [0; 8], "{name}");
        oracle::assert_clean(scratch.join(name), "qcow2");
    }
    oracle::assert_identical(&path, "qcow2", scratch.join("b.qcow2"), "qcow2");
}

/// Without a key neither tool looks at an encrypted image under the name `qemu-img`. The tables need none.
#[test]
fn qcow2__encrypted__check() {
    for how in ["encrypt.format=aes", "encrypt.format=luks,encrypt.iter-time=10"] {
        let scratch = Scratch::new();
        let made = format!(
            "create -q -f qcow2 --object secret,id=s,data=x -o {how},encrypt.key-secret=s a.qcow2 8M"
        );
        theirs(&scratch).words(&made).ok();
        for flags in ["", "-r all", "--output=json"] {
            let words = format!("check {flags} a.qcow2");
            let our = ours(&scratch).words(&words).finish();
            let their = theirs(&scratch).words(&words).finish();
            assert_eq!((our.code, our.out()), (their.code, their.out()), "{our}\n{their}");
            assert_eq!(our.err(), their.err());
        }
        native(&scratch).words("check a.qcow2").ok();
    }
}

#[test]
fn qcow2__repair__says_what_it_did() {
    let scratch = Scratch::new();
    damaged(&scratch, "compat=1.1", counts);
    let done = native(&scratch).words("check -r all a.qcow2").ok();
    assert!(
        done.out().starts_with(
            "Repaired: 1 errors, 1 leaked clusters. Checked again after that:\nNo errors were found"
        ),
        "{done}"
    );
    assert!(
        done.err().lines().all(|line| line.starts_with("Repairing ")),
        "{done}"
    );
    let refused = native(&scratch).words("check -r some a.qcow2").finish();
    assert_eq!(refused.code, Some(1));
}
