//! `--object`: what defines a secret, and what is wrong with one that does not, in the words of `qemu-img`.

use diskmill_testkit::Scratch;

use crate::{Twins, diskmill as native, ours};

/// Two folders with a few files that hold secrets.
fn twins() -> Twins {
    let twins = Twins::new();
    for scratch in [&twins.ours, &twins.theirs] {
        scratch.file("pw", b"pw1");
        scratch.file("pw64", b"cHcx\n");
        scratch.file("nul64", b"cHcx\0");
        scratch.file("crlf64", b"cHcx\r\n");
        scratch.file("binary", b"\xff\xfe");
        scratch.file("none", b"");
    }
    twins
}

#[test]
fn secrets_are_taken_in_every_spelling() {
    twins().same_lines(
        r#"
        info --object secret,id=s,data=pw1 a.raw
        info --objec secret,id=s,data=pw1, a.raw
        info --object=secret,id=s,data=p,,w a.raw
        info --object qom-type=secret,id=s,data=pw1 a.raw
        info --object secret,id=s,data= a.raw
        info --object secret,id=s,data=a,data=b a.raw
        info --object secret,id=a.b-c_D9,data=pw1 a.raw
        info --object secret,id=s,data=cHcx,format=base64 a.raw
        info --object secret,id=s,data=cHcx=,format=base64 a.raw
        info --object secret,id=s,data=pw1,format=raw a.raw
        info --object secret,id=s,file=pw a.raw
        info --object secret,id=s,file=none a.raw
        info --object secret,id=s,file=binary a.raw
        info --object secret,id=s,file=pw64,format=base64 a.raw
        info --object secret,id=s,data=pw1,iv=AAAA a.raw
        info --object secret,id=s,data=a --object secret,id=t,data=b a.raw
        info --object throttle-group,id=t a.raw
        info --object {"qom-type":"secret","id":"s","data":"pw1"} a.raw
        info --object {'qom-type':'secret','id':'s','data':'pw1'} a.raw
        info --object {"qom-type":"secret","id":"s","data":"cHcx","format":"base64"} a.raw
        info --object secret,help a.raw
        info --object help a.raw
        "#,
    );
}

#[test]
fn what_is_wrong_with_a_secret_is_said_in_the_same_words() {
    let twins = twins();
    twins.same_lines(
        r#"
        info --object secret,id=s a.raw
        info --object secret,id=s,data=pw1,file=pw a.raw
        info --object secret,data=pw1 a.raw
        info --object secret,id=,data=pw1 a.raw
        info --object secret,id=1s,data=pw1 a.raw
        info --object secret,id=-s,data=pw1 a.raw
        info --object secret,id=s/t,data=pw1 a.raw
        info --object secret,id=s,,data=pw1 a.raw
        info --object secret,,id=s,data=pw1 a.raw
        info --object secret,id=s,file=gone a.raw
        info --object secret,id=s,file=. a.raw
        info --object secret,id=s,data=!!!!,format=base64 a.raw
        info --object secret,id=s,file=nul64,format=base64 a.raw
        info --object secret,id=s,file=crlf64,format=base64 a.raw
        info --object secret,id=s,file=pw,format=hex a.raw
        info --object secret,id=s,format= a.raw
        info --object secret,id=s,foo=bar,file=pw a.raw
        info --object secret,id=s,file a.raw
        info --object secret,id=s,=pw a.raw
        info --object secret,id=s,data=pw1,keyid=k a.raw
        info --object secret,id=k,data=a --object secret,id=s,keyid=k a.raw
        info --object secret,id=s,data=a --object secret,id=s,data=b a.raw
        info --object secret,id=s,data=a --object throttle-group,id=s a.raw
        info --object secret a.raw
        info --object bogus,id=s a.raw
        info --object qom-type=bogus,id=s a.raw
        info --object id=s,data=pw1 a.raw
        info --object {"qom-type":"secret","id":"s","data":1} a.raw
        info --object {"qom-type":"secret","id":"s","file":null} a.raw
        info --object {"qom-type":"secret","id":5} a.raw
        info --object {"qom-type":7} a.raw
        info --object {"id":"s","data":"pw1"} a.raw
        info --object {"qom-type":"bogus"} a.raw
        info --object {} a.raw
        info --object [] a.raw
        info --object {"qom-type":"secret","id":"s","file":"pw","x":"1"} a.raw
        compare --object secret,id=s a.raw a.raw
        check --object secret,id=s a.qcow2
        convert --object secret,id=s a.raw b.raw
        create --object secret,id=s b.raw 1M
        "#,
    );
    twins.same(&["info", "--object", "", "a.raw"]);
    twins.same(&["info", "--object", "secret,id=s t,data=pw1", "a.raw"]);
}

/// AES-256 in CBC mode of `pw1` and the padding, made with `openssl enc`.
#[test]
fn encrypted_secrets_need_their_key_and_vector() {
    let key = "secret,id=k,data=MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=,format=base64";
    let raw_key = "secret,id=k,data=0123456789abcdef0123456789abcdef";
    let sealed = "YaQxZ1GE7eJJo0dgw45s6A==";
    let iv = "AAECAwQFBgcICQoLDA0ODw==";
    let twins = twins();
    let both = |key: &str, rest: &str| {
        let secret = format!("secret,id=s,data={sealed},{rest}");
        twins
            .same(&["info", "--object", key, "--object", &secret, "a.raw"])
            .code
    };
    assert_eq!(both(key, &format!("format=base64,keyid=k,iv={iv}")), Some(0));
    assert_eq!(both(raw_key, &format!("format=base64,keyid=k,iv={iv}")), Some(0));
    for (key, rest) in [
        (key, format!("keyid=k,iv={iv}")),
        (key, "format=base64,keyid=k".to_owned()),
        (key, "format=base64,keyid=k,iv=AAAA".to_owned()),
        (key, "format=base64,keyid=k,iv=!!".to_owned()),
        (key, format!("format=base64,keyid=l,iv={iv}")),
        ("secret,id=k,data=short", format!("format=base64,keyid=k,iv={iv}")),
        // Another key, of which the padding tells.
        (
            "secret,id=k,data=0123456789abcdef0123456789abcdeX",
            format!("format=base64,keyid=k,iv={iv}"),
        ),
    ] {
        assert_eq!(both(key, &rest), Some(1), "{key} {rest}");
    }
    // The key must come first.
    let secret = format!("secret,id=s,data={sealed},format=base64,keyid=k,iv={iv}");
    twins.same(&["info", "--object", &secret, "--object", key, "a.raw"]);
}

/// A comma in a passphrase that was not doubled makes a parameter of the rest of it, which qemu-img then shows.
#[test]
fn no_message_shows_a_part_of_a_secret() {
    let twins = twins();
    let dir = twins.ours.path();
    for run in [ours, native] {
        for text in [
            "secret,id=s,data=my,hunter2",
            "secret,id=s,data=my,hunter2=x",
            "secret,id=s,data=my,hun/ter2=x",
            "secret,id=s,data=!hunter2,format=base64",
            "secret,id=s,data=hunter2,file=pw",
            "secret,id=s,data=x,format=hunter2",
        ] {
            let done = run(dir).args(["info", "--object", text, "a.raw"]).finish();
            assert_eq!(done.code, Some(1), "{text}: {done}");
            assert!(
                !format!("{}{}", done.out(), done.err()).contains("ter2"),
                "{text}: {done}"
            );
        }
    }
}

#[test]
fn passphrases_come_from_files_and_standard_input() {
    let scratch = Scratch::new();
    scratch.file("none", b"\n");
    scratch.file("a.raw", &[1; 4096]);
    let run = |words: &str| native(scratch.path()).words(words).finish();
    let missing = run("convert a.raw b.raw --passphrase-file gone");
    assert!(
        missing.code == Some(1) && missing.err().contains("gone"),
        "{missing}"
    );
    let empty = run("convert a.raw b.raw --passphrase-file none");
    assert!(
        empty.code == Some(1) && empty.err().contains("no passphrase in 'none'"),
        "{empty}"
    );
    let twice = run("convert -f raw --passphrase-file - - b.raw");
    assert!(
        twice.code == Some(1) && twice.err().contains("standard input"),
        "{twice}"
    );
    let new = run("convert -O luks --new-passphrase-file - - b.luks");
    assert!(
        new.code == Some(1) && new.err().contains("standard input"),
        "{new}"
    );
    // Standard output is another thing.
    let both = native(scratch.path())
        .words("convert --passphrase-file - a.raw -")
        .input("hunter2\n")
        .finish();
    assert!(both.code == Some(0) && both.stdout == [1; 4096], "{both}");
    let plain = run("create -f vmdk b.vmdk 1M --new-passphrase-file a.raw");
    assert!(plain.code == Some(1) && plain.err().contains("vmdk"), "{plain}");
    scratch.file("pw", b"hunter2\n");
    let unused = run("convert a.raw b.raw --passphrase-file pw");
    assert!(
        unused.code == Some(0) && unused.err().contains("nothing is encrypted"),
        "{unused}"
    );
    // They are ours alone.
    let refused = ours(scratch.path())
        .words("convert --passphrase-file pw a.raw c.raw")
        .finish();
    assert!(
        refused.code == Some(1) && refused.err().contains("unrecognized option"),
        "{refused}"
    );
}
