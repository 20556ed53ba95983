//! What both say of the same image must be the same: `info`, `map`, `check`, `measure`, text and JSON.

use diskmill_testkit::Scratch;

use crate::tools::{ours, same, same_json, theirs};

/// Demands that both say the same of an image in every command that inspects.
pub fn assert_agree(scratch: &Scratch, name: &str, format: &str) {
    same_json(scratch, &format!("info --output=json -f {format} {name}"));
    same(scratch, &format!("info -f {format} {name}"));
    same_json(scratch, &format!("map --output=json -f {format} {name}"));
    same(scratch, &format!("map -f {format} {name}"));
    if format == "raw" {
        same(scratch, &format!("check -f {format} {name}"));
    } else {
        same_json(scratch, &format!("check --output=json -f {format} {name}"));
        // What is wrong each says in its own words, on standard error.
        let our = ours(scratch).words(&format!("check -f {format} {name}")).finish();
        let their = theirs(scratch)
            .words(&format!("check -f {format} {name}"))
            .finish();
        assert!(
            our.code == their.code
                && our.out() == their.out()
                && our.err().lines().count() == their.err().lines().count(),
            "not the same\n--- ours\n{our}\n--- qemu-img's\n{their}"
        );
    }
    for target in ["raw", "qcow2"] {
        same_json(
            scratch,
            &format!("measure --output=json -f {format} -O {target} {name}"),
        );
    }
}

mod measure {
    use diskmill_testkit::Scratch;

    use crate::tools::{refused, same, same_json};

    macro_rules! sizes {
        ($($name:ident: $words:expr;)*) => {$(
            #[test]
            fn $name() {
                let scratch = Scratch::new();
                for size in ["0", "1", "512", "1000", "64k", "64M", "1G", "1T", "3000000000000"] {
                    same_json(&scratch, &format!("measure --output=json {} --size {size}", $words));
                    same(&scratch, &format!("measure {} --size {size}", $words));
                }
            }
        )*};
    }

    sizes! {
        raw__measure_size: "-O raw";
        qcow2__measure_size: "-O qcow2";
        qcow2__v2__measure_size: "-O qcow2 -o compat=0.10";
        qcow2__cluster_4k__measure_size: "-O qcow2 -o cluster_size=4k,refcount_bits=1";
        qcow2__cluster_2m__measure_size: "-O qcow2 -o cluster_size=2M";
        qcow2__refcount_64__measure_size: "-O qcow2 -o refcount_bits=64";
        qcow2__extended_l2__measure_size: "-O qcow2 -o extended_l2=on,cluster_size=128k";
        qcow2__preallocation_full__measure_size: "-O qcow2 -o preallocation=full";
        qcow2__preallocation_metadata__measure_size: "-O qcow2 -o preallocation=metadata";
    }

    #[test]
    fn qcow2__measure_refuses_what_qemu_refuses() {
        let scratch = Scratch::new();
        for words in [
            "measure -O qcow2 -o cluster_size=3k --size 1M",
            "measure -O qcow2 -o refcount_bits=3 --size 1M",
            "measure -O qcow2 -o cluster_size=512 --size 1P",
            "measure -O nonesuch --size 1M",
            "measure -O qcow2",
            "measure -O qcow2 --size 1e6",
        ] {
            refused(&scratch, words);
        }
    }
}

mod check {
    use diskmill_testkit::Scratch;

    use crate::tools::{native, same, theirs};

    #[test]
    fn formats_that_qemu_img_cannot_check_are_checked_by_our_own_name_alone() {
        let scratch = Scratch::new();
        let secret = "--object secret,id=s,data=pw";
        theirs(&scratch).words("create -q -f qcow old 1M").ok();
        theirs(&scratch)
            .words(&format!(
                "create -q -f luks {secret} -o key-secret=s,iter-time=10 sealed 1M"
            ))
            .ok();
        let sealed = format!("{secret} --image-opts driver=luks,key-secret=s,file.filename=sealed");
        for image in ["old", "-r all old", &sealed] {
            same(&scratch, &format!("check {image}"));
            same(&scratch, &format!("check --output=json {image}"));
        }
        for image in ["old", &sealed] {
            native(&scratch).words(&format!("check {image}")).ok();
        }
    }
}
