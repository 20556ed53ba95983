//! The command line of `qemu-img`: what is wrong with it is said in the same words, with the same exit code.

use diskmill_testkit::Scratch;

use crate::{Twins, ours, theirs};

#[test]
fn no_command_and_unknown_commands() {
    let twins = Twins::new();
    twins.same::<&str>(&[]);
    twins.same_lines("bogus\n--bogus\n-x\n-T\n--trace\n-- bogus\n--");
}

#[test]
fn the_version_is_what_scripts_read() {
    let scratch = Scratch::new();
    let our = ours(scratch.path()).arg("--version").ok().out();
    let their = theirs(scratch.path()).arg("--version").ok().out();
    let number = |text: &str| {
        let rest = text.strip_prefix("qemu-img version ").unwrap();
        rest.split(|c: char| !(c.is_ascii_digit() || c == '.'))
            .next()
            .unwrap()
            .to_owned()
    };
    assert_eq!(number(&our), number(&their));
    assert!(our.lines().nth(1).unwrap().contains("diskmill"));
    for other in ["-V", "--vers", "-Vx"] {
        assert_eq!(ours(scratch.path()).arg(other).ok().out(), our);
    }
}

#[test]
fn getopt_habits() {
    let twins = Twins::new();
    twins.same_lines(
        "
        info --bogus x
        info -Z x
        info -Zq a.raw
        info -f
        info --output
        info --help=x
        info --backing-chain=x a.raw
        info --f a.raw
        info --o=json a.raw
        info --ba a.raw
        info --force a.raw
        info a.raw --force-share --output=json
        info a.raw -fraw --output json
        info --output=human --output=json a.raw
        info -- a.raw
        info -- -f
        create -f
        create -o
        convert -a a.raw o
        convert -b zero.raw a.raw o
        resize -x a.raw 1
        resize -f a.raw
        check --repa x a.qcow2
        ",
    );
}

#[test]
fn info_refuses_in_the_same_words() {
    let twins = Twins::new();
    twins.same_lines(
        "
        info
        info a b
        info --output=foo a.raw
        info --output=foo
        info nonexistent
        info -f bogus a.raw
        info -f qcow2 a.raw
        info --image-opts a.raw
        info --image-opts -f raw a.raw
        info json:[]
        info proto:x
        info .
        info lost.qcow2
        info --backing-chain lost.qcow2
        info --object secret a.raw
        info --object bogus,id=x a.raw
        ",
    );
    twins.same(&["info", ""]);
}

#[test]
fn map_refuses_in_the_same_words() {
    Twins::new().same_lines(
        "
        map
        map a b
        map --start-offset=q a.raw
        map --start-offset=-1 a.raw
        map --max-length=q a.raw
        map --output=x a.raw
        map nonexistent
        map lost.qcow2
        map packed.qcow2
        ",
    );
}

#[test]
fn measure_refuses_in_the_same_words() {
    Twins::new().same_lines(
        "
        measure
        measure --size 1G a.raw
        measure a.raw a.qcow2
        measure --size bogus
        measure --size=-1
        measure --size 1G -f raw
        measure --size 1G -l x
        measure --size 1G --image-opts
        measure --size 1G -O bogus
        measure --size 1G -O qcow2 -o bogus
        measure --size 1G -O qcow2 -o help
        measure --size 1G -O qcow2 -o cluster_size=3k
        measure nonexistent
        ",
    );
}

#[test]
fn check_refuses_in_the_same_words() {
    let twins = Twins::new();
    twins.same_lines(
        "
        check
        check a b
        check -T bogus a.qcow2
        check -r bogus a.qcow2
        check --output=x a.qcow2
        check nonexistent
        check -f bogus a.raw
        check -f qcow2 a.raw
        ",
    );
    assert_eq!(twins.same_line("check a.raw").code, Some(63));
    assert_eq!(twins.same_line("check -q a.raw").code, Some(63));
    assert_eq!(twins.same_line("check --output=json a.raw").code, Some(63));
}

#[test]
fn compare_refuses_in_the_same_words() {
    let twins = Twins::new();
    twins.same_lines(
        "
        compare
        compare a
        compare a b c
        compare --bogus a b
        ",
    );
    for line in [
        "compare -T bogus a.raw a.raw",
        "compare nonexistent a.raw",
        "compare a.raw nonexistent",
        "compare -f bogus a.raw a.raw",
        "compare -F bogus a.raw a.raw",
        "compare --image-opts -f raw a b",
        "compare a.raw lost.qcow2",
    ] {
        assert_eq!(twins.same_line(line).code, Some(2), "{line}");
    }
}

#[test]
fn resize_refuses_in_the_same_words() {
    Twins::new().same_lines(
        "
        resize
        resize a.raw
        resize nonexistent 1G
        resize -f bogus a.raw 1M
        resize -f raw a.raw -- -512k
        resize -f raw a.raw -512k
        resize -f raw a.raw 0
        resize a.qcow2 512k
        resize -f raw a.raw 0x
        resize -f raw a.raw bogus
        resize -f raw a.raw +1e6
        resize -f raw a.raw -10G
        resize -f raw --shrink a.raw -10G
        resize -f raw a.raw 1M 2M
        resize --preallocation=bogus a.qcow2 4M
        resize --preallocation=metadata -f raw a.raw 7M
        resize --preallocation=falloc --shrink -f raw a.raw 512k
        ",
    );
}

#[test]
fn create_refuses_in_the_same_words() {
    let twins = Twins::new();
    twins.same_lines(
        "
        create
        create x
        create -f qcow2 x
        create x 10kb
        create x 1e6
        create x 1GiB
        create x -- -1
        create x 1 2
        create x 8E
        create x 99999999999999999999999
        create -f bogus x 1M
        create -f bogus -o help x
        create -f qcow2 -o bogus=1 c 1M
        create -f qcow2 -o cluster_size=3k c 1M
        create -f qcow2 -o cluster_size=abc c 1M
        create -f qcow2 -o lazy_refcounts=abc c 1M
        create -f qcow2 -o compat=5 c 1M
        create -f qcow2 -o preallocation=bogus c 1M
        create -f qcow2 -o refcount_bits=7 c 1M
        create -f qcow2 -o extended_l2=on,cluster_size=4k c 1M
        create -f raw -o preallocation=metadata c 1M
        create -f qcow2 -o size=3M c 4M
        create -f qcow2 -o =1 c 1M
        create -f qcow2 -o , c 1M
        create -f qcow2 c 7E
        create -f qcow2 c 4P
        create -f qcow2 -b a.raw c
        create -f qcow2 -b a.raw -F bogus c
        create -f qcow2 -b a.raw -F qcow2 c
        create -f qcow2 -b nonexistent -F raw c
        create -f qcow2 -o backing_file=a.raw c
        create -f qcow2 -u -b nonexistent -F raw c
        create -f raw -b a.raw -F raw c
        create -f qcow2 -F raw c 1M
        create -f qcow2 c -b c -F qcow2
        create -f qcow2 a.qcow2 -b a.qcow2 -F qcow2
        create nodir/x 1M
        create -f qcow2 nodir/x 1M
        ",
    );
    twins.same(&["create", "-f", "qcow2", "-o", "", "c", "1M"]);
}

#[test]
fn convert_refuses_in_the_same_words() {
    Twins::new().same_lines(
        "
        convert
        convert a
        convert a b
        convert -O bogus a.raw o
        convert -f bogus a.raw o
        convert -f qcow2 a.raw o
        convert -o bogus -O qcow2 a.raw o
        convert -o cluster_size=3k -O qcow2 a.raw o
        convert -t bogus a.raw o
        convert -T bogus a.raw o
        convert -m 0 a.raw o
        convert -m 17 a.raw o
        convert -m x a.raw o
        convert -S 100 a.raw o
        convert -S 17M a.raw o
        convert -S x a.raw o
        convert -r x a.raw o
        convert -c a.raw o
        convert -n a.raw nonexistent
        convert -n longer.raw zero.raw
        convert -n a.raw a.raw
        convert -n -o cluster_size=4k a.raw zero.raw
        convert --target-is-zero a.raw o
        convert --target-image-opts a.raw o
        convert -n --target-image-opts -O qcow2 a.raw driver=qcow2,file.filename=zero.qcow2
        convert -B zero.raw -O qcow2 a.raw o
        convert -B zero.raw -F raw a.raw o
        convert -F raw a.raw o
        convert -o backing_file=zero.raw -O qcow2 a.raw o
        convert -O qcow2 a.raw longer.raw -B zero.raw -F raw o
        convert -C -S 4k a.raw o
        convert -C -c -O qcow2 a.raw o
        convert --skip-broken-bitmaps a.raw o
        convert -l snapshot.bogus=x a.qcow2 o
        convert --image-opts a.raw o
        convert --source-image-opts -f raw a.raw o
        convert a.raw a.raw
        convert -O qcow2 a.raw a.raw
        convert nonexistent o
        convert lost.qcow2 o
        convert . o
        convert a.raw nodir/o
        convert -O qcow2 a.raw nodir/o
        convert -o preallocation=metadata -O raw a.qcow2 o
        ",
    );
}

#[test]
fn documented_long_names_that_the_real_tool_forgot_are_understood() {
    let twins = Twins::new();
    let long = "convert --quiet --compress --source-format raw --target-format qcow2 \
                --target-options cluster_size=4k --target-cache writeback --source-cache none \
                --sparse-size 4k --parallel 2 --oob-writes a.raw long.qcow2";
    let done = ours(twins.ours.path()).words(long).ok();
    assert_eq!((done.out(), done.err()), (String::new(), String::new()));
    ours(twins.ours.path()).words("compare a.raw long.qcow2").ok();
    ours(twins.ours.path())
        .words("convert --no-create --target-format qcow2 a.raw zero.qcow2")
        .ok();
    ours(twins.ours.path()).words("measure -s 1G -O qcow2").ok();
}

#[test]
fn it_is_qemu_img_as_a_subcommand_too() {
    let twins = Twins::new();
    let by_link = ours(twins.ours.path()).words("info a.qcow2").ok();
    let by_name = crate::diskmill(twins.ours.path())
        .words("qemu-img info a.qcow2")
        .ok();
    assert_eq!(by_link.out(), by_name.out());
    let failed = crate::diskmill(twins.ours.path())
        .words("qemu-img info")
        .finish()
        .expect(1);
    assert!(failed.err().starts_with("qemu-img: "), "{failed}");
}
