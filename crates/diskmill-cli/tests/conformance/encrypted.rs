//! Encrypted images as callers meet them: with a key, with none and with another one, in every command, under the name
//! `qemu-img` and by passphrase under our own.

use diskmill_testkit::{Finished, Run, Scratch};

use crate::tools::{native, ours, theirs};

/// Two folders with the same files, one for each tool.
struct Pair {
    ours: Scratch,
    theirs: Scratch,
}

/// A way in which images are encrypted.
struct Kind {
    driver: &'static str,
    /// The option that names the key.
    key: &'static str,
    /// What else makes such an image.
    options: &'static str,
}

const LUKS: Kind = Kind {
    driver: "luks",
    key: "key-secret",
    options: "iter-time=10",
};
const QCOW2_LUKS: Kind = Kind {
    driver: "qcow2",
    key: "encrypt.key-secret",
    options: "encrypt.format=luks,encrypt.iter-time=10",
};
const QCOW2_AES: Kind = Kind {
    driver: "qcow2",
    key: "encrypt.key-secret",
    options: "encrypt.format=aes",
};
const QCOW_AES: Kind = Kind {
    driver: "qcow",
    key: "encrypt.key-secret",
    options: "encrypt.format=aes",
};

/// The key of every image, and one of none.
const SECRETS: &str = "--object secret,id=s,data=pw1 --object secret,id=w,data=wrong";

impl Pair {
    /// An encrypted `x`, an overlay `o` of it, and plain ones.
    fn new(kind: &Kind) -> Self {
        let pair = Self {
            ours: Scratch::new(),
            theirs: Scratch::new(),
        };
        let (driver, key, options) = (kind.driver, kind.key, kind.options);
        // Ours is quicker in making keys than qemu-img, which takes seconds to find out how fast the host is.
        let make = |words: &str| ours(&pair.ours).words(words).ok();
        make(&format!(
            "create -q -f {driver} {SECRETS} -o {options},{key}=s x 1M"
        ));
        let opts = kind.opts("x", "s");
        let io = Run::new("qemu-io").dir(pair.ours.path());
        io.words(SECRETS)
            .args(["-c", "write -P 5 64k 100k", "--image-opts", &opts])
            .ok();
        make(&format!("create -q -f qcow2 -b x -F {driver} o"));
        make("create -q -f qcow2 plain.qcow2 1M");
        make("create -q plain.raw 1M");
        let io = Run::new("qemu-io").dir(pair.ours.path());
        io.words("-f raw plain.raw -c").arg("write -P 7 0 64k").ok();
        pair.ours.file("pw", b"pw1");
        for entry in std::fs::read_dir(pair.ours.path()).unwrap() {
            let entry = entry.unwrap();
            let target = pair.theirs.join(entry.file_name());
            Run::new("cp")
                .arg("--sparse=always")
                .arg(entry.path())
                .arg(target)
                .ok();
        }
        pair
    }

    /// Runs both and demands the same messages, exit code and output, apart from the space that files take on the host.
    fn same(&self, words: &str) -> Finished {
        let our = ours(&self.ours).words(words).finish();
        let their = theirs(&self.theirs).words(words).finish();
        assert!(
            our.code == their.code
                && without_disk_sizes(&our.out()) == without_disk_sizes(&their.out())
                && our.err() == their.err(),
            "not the same\n--- ours\n{our}\n--- qemu-img's\n{their}"
        );
        our
    }

    /// The same for each line, in which `KEYED` is the encrypted image with its key, and `WRONG`, `GONE` and `BINARY` name
    /// other keys; all must end with the code that stands in front.
    fn all(&self, kind: &Kind, lines: &str) {
        for line in lines.lines().map(str::trim).filter(|line| !line.is_empty()) {
            let (code, words) = line.split_once(' ').unwrap();
            let mut words = words.replace("SECRETS", SECRETS);
            for (place, key) in [("KEYED", "s"), ("WRONG", "w"), ("GONE", "gone"), ("BINARY", "b")] {
                words = words.replace(place, &kind.opts("x", key));
            }
            let words = words.replace("DRIVER", kind.driver).replace("KEY", kind.key);
            let done = self.same(&words);
            assert_eq!(done.code, code.parse().ok(), "{done}");
        }
    }
}

impl Kind {
    fn opts(&self, name: &str, key: &str) -> String {
        format!("driver={},{}={key},file.filename={name}", self.driver, self.key)
    }
}

fn without_disk_sizes(text: &str) -> Vec<&str> {
    let tells = |line: &&str| !line.contains("disk size: ") && !line.contains("\"actual-size\": ");
    text.split_inclusive('\n').filter(tells).collect()
}

/// Both tools on the same disk, one image encrypted by each.
fn without_key(kind: &Kind) {
    let pair = Pair::new(kind);
    pair.all(
        kind,
        "
        0 info x
        0 info --output=json -f DRIVER x
        0 info --backing-chain o
        1 check x
        1 check -r all x
        1 map x
        1 map --output=json x
        1 measure -O raw x
        1 snapshot -l x
        1 convert x out.raw
        1 convert -O qcow2 o out.qcow2
        2 compare x plain.raw
        2 compare plain.raw x
        1 dd if=x of=out.raw
        1 bench -c 1 x
        1 resize x 2M
        1 map o
        1 commit o
        1 rebase -b plain.qcow2 -F qcow2 o
        1 rebase -b x -F DRIVER plain.qcow2
        1 convert -n -O DRIVER plain.raw x
        1 map --image-opts GONE
        1 map SECRETS --image-opts GONE
        0 info --image-opts GONE
        0 create -f qcow2 -b x -F DRIVER out.qcow2
        ",
    );
    assert!(!pair.ours.join("out.raw").exists());
}

fn with_key(kind: &Kind) {
    let pair = Pair::new(kind);
    pair.all(
        kind,
        r#"
        0 info SECRETS --image-opts KEYED
        0 info --output=json SECRETS --image-opts KEY=s,file.filename=x
        0 info --output=json SECRETS json:{"driver":"DRIVER","KEY":"s","file":{"driver":"file","filename":"x"}}
        0 map --output=json SECRETS --image-opts KEYED
        0 map --output=json SECRETS json:{'driver':'DRIVER','KEY':'s','file.filename':'x'}
        0 map --output=json SECRETS --image-opts KEY=s,file.filename=x
        1 map --object secret,id=b,data=//79,format=base64 --image-opts BINARY
        1 map SECRETS --image-opts KEYED,bogus=1
        1 map SECRETS --image-opts driver=raw,KEY=s,file.filename=plain.raw
        1 map SECRETS --image-opts KEY=s,file.filename=plain.raw
        0 map --output=json SECRETS --image-opts driver=qcow2,file.filename=o,backing.KEY=s
        0 map --output=json SECRETS --image-opts driver=qcow2,file.filename=o,backing.driver=DRIVER,backing.KEY=s
        0 map --output=json SECRETS json:{"driver":"qcow2","file.filename":"o","backing":{"KEY":"s"}}
        1 map --output=json SECRETS --image-opts driver=qcow2,file.filename=o,backing.KEY=gone
        1 map --output=json SECRETS --image-opts driver=qcow2,file.filename=plain.qcow2,backing.KEY=s
        0 convert SECRETS --image-opts KEYED out.raw
        0 convert --object secret,id=s,file=pw --image-opts driver=qcow2,file.filename=o,backing.KEY=s over.raw
        0 compare out.raw over.raw
        1 convert SECRETS --image-opts GONE no.raw
        0 compare SECRETS --image-opts KEYED driver=raw,file.filename=out.raw
        2 compare SECRETS --image-opts KEYED GONE
        0 dd SECRETS --image-opts if=KEYED of=dd.raw bs=64k
        0 compare dd.raw out.raw
        0 measure -O qcow2 SECRETS --image-opts KEYED
        0 commit SECRETS --image-opts driver=qcow2,file.filename=o,backing.KEY=s
        1 convert -n SECRETS --target-image-opts plain.raw GONE
        0 convert -n SECRETS --target-image-opts plain.raw KEYED
        0 compare SECRETS --image-opts KEYED driver=raw,file.filename=plain.raw
        "#,
    );
    let checked = pair.same(&format!("check {SECRETS} --image-opts {}", kind.opts("x", "s")));
    assert_eq!(checked.code, Some(if kind.driver == "qcow2" { 0 } else { 63 }));
    // What one has made the other reads.
    let make = format!(
        "convert {SECRETS} -O {} -o {},{}=s out.raw made",
        kind.driver, kind.options, kind.key
    );
    pair.same(&make);
    let read = format!(
        "compare {SECRETS} --image-opts {} driver=raw,file.filename=out.raw",
        kind.opts("made", "s")
    );
    ours(&pair.theirs).words(&read).ok();
    theirs(&pair.ours).words(&read).ok();
}

/// Of LUKS a wrong key is known, of the old AES not.
fn with_another_key(kind: &Kind) {
    let pair = Pair::new(kind);
    let code = if kind.options.contains("aes") { "0" } else { "1" };
    for words in [
        "map --output=json",
        "check",
        "snapshot -l",
        "convert -O raw",
        "resize",
    ] {
        let rest = match words {
            "convert -O raw" => " out.raw",
            "resize" if kind.driver == "qcow" => continue,
            "resize" => " 2M",
            "snapshot -l" if kind.driver != "qcow2" => continue,
            "check" if kind.driver == "qcow" => continue,
            _ => "",
        };
        pair.all(kind, &format!("{code} {words} SECRETS --image-opts WRONG{rest}"));
    }
    let differs = if code == "0" { 1 } else { 2 };
    pair.all(
        kind,
        &format!("{differs} compare SECRETS --image-opts WRONG driver=raw,file.filename=plain.raw"),
    );
}

macro_rules! kinds {
    ($($without:ident, $with:ident, $another:ident: $kind:expr;)*) => {$(
        #[test]
        fn $without() {
            without_key(&$kind);
        }

        #[test]
        fn $with() {
            with_key(&$kind);
        }

        #[test]
        fn $another() {
            with_another_key(&$kind);
        }
    )*};
}

kinds! {
    luks__without_key, luks__with_key, luks__with_another_key: LUKS;
    qcow2__luks__without_key, qcow2__luks__with_key, qcow2__luks__with_another_key: QCOW2_LUKS;
    qcow2__aes__without_key, qcow2__aes__with_key, qcow2__aes__with_another_key: QCOW2_AES;
    qcow__aes__without_key, qcow__aes__with_key, qcow__aes__with_another_key: QCOW_AES;
}

#[test]
fn qcow2__encryption_that_is_not_the_images_own() {
    let pair = Pair::new(&QCOW2_AES);
    pair.all(
        &QCOW2_AES,
        "
        0 map --output=json SECRETS --image-opts KEYED,encrypt.format=aes
        1 map --output=json SECRETS --image-opts KEYED,encrypt.format=luks
        1 map --output=json SECRETS --image-opts KEYED,encrypt.format=bogus
        1 map --output=json SECRETS --image-opts KEYED,encrypt.bogus=luks
        0 map --output=json SECRETS --image-opts driver=qcow2,encrypt.key-secret=s,file.filename=plain.qcow2
        0 map --output=json SECRETS --image-opts driver=qcow2,encrypt.key-secret=gone,file.filename=plain.qcow2
        1 map --output=json SECRETS --image-opts driver=qcow2,encrypt.format=luks,file.filename=plain.qcow2
        1 map --output=json SECRETS --image-opts KEYED,header.filename=plain.raw
        ",
    );
}

#[test]
fn encrypted_images_are_refused_for_want_of_a_key_before_they_are_made() {
    let pair = Pair::new(&QCOW_AES);
    pair.all(
        &QCOW_AES,
        "
        1 create -f luks new 1M
        1 create -f luks SECRETS new 1M
        1 create -f luks SECRETS -o key-secret=gone new 1M
        1 create -f luks --object secret,id=s,data=//79,format=base64 -o key-secret=s,iter-time=10 new 1M
        1 create -f qcow2 SECRETS -o encryption=on new 1M
        0 create -f qcow2 SECRETS -o encryption=on,encrypt.key-secret=s new 1M
        1 create -f qcow2 SECRETS -o encrypt.format=luks new 1M
        1 create -f qcow2 SECRETS -o encrypt.format=luks,encrypt.key-secret=gone new 1M
        1 create -f qcow2 SECRETS -o encrypt.format=bogus,encrypt.key-secret=s new 1M
        0 create -f qcow2 SECRETS -o encrypt.format=aes,encrypt.key-secret=s new 1M
        1 create -f qcow SECRETS -o encryption=on new 1M
        0 create -f qcow SECRETS -o encryption=on,encrypt.key-secret=s new 1M
        1 convert -O luks plain.raw no
        1 convert -O luks -o key-secret=s plain.raw no
        1 convert -O qcow2 -o encrypt.format=luks plain.raw no
        1 convert SECRETS -c -O qcow2 -o encrypt.format=luks,encrypt.key-secret=s plain.raw no
        1 convert SECRETS -c -O luks -o key-secret=s plain.raw no
        1 measure -O luks --size 4M
        1 measure -O luks -o key-secret=s --size 4M
        0 measure -O luks SECRETS -o key-secret=s,iter-time=10 --size 4M
        1 measure -O qcow2 -o encrypt.format=luks --size 4M
        1 measure -O qcow2 -o encrypt.format=luks,encrypt.key-secret=gone --size 4M
        0 measure -O qcow2 SECRETS -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10 --size 4M
        0 measure -O qcow2 -o encrypt.format=aes --size 4M
        ",
    );
}

/// A header in a file of its own, as `qemu-img` opens it.
#[test]
fn luks__header_apart() {
    let pair = Pair::new(&LUKS);
    let whole = std::fs::read(pair.ours.join("x")).unwrap();
    for scratch in [&pair.ours, &pair.theirs] {
        let (header, data) = whole.split_at(2_068_480);
        let mut header = header.to_vec();
        header[104..108].fill(0);
        scratch.file("h", &header);
        scratch.file("d", data);
    }
    pair.all(
        &LUKS,
        "
        0 map --output=json SECRETS --image-opts driver=luks,key-secret=s,file.filename=d,header.filename=h
        0 info --output=json SECRETS --image-opts driver=luks,key-secret=s,file.filename=d,header.filename=h
        0 info SECRETS --image-opts driver=luks,file.filename=d,header.driver=file,header.filename=h
        0 map --output=json SECRETS --image-opts driver=luks,key-secret=s,file.filename=d,header.driver=raw,header.file.filename=h
        1 map SECRETS --image-opts key-secret=s,file.filename=d,header.filename=h
        1 map SECRETS --image-opts driver=luks,key-secret=s,file.filename=d,header.filename=gone
        1 map SECRETS --image-opts driver=luks,key-secret=s,file.filename=d,header=h
        1 map SECRETS --image-opts driver=luks,key-secret=s,file.filename=d
        1 map SECRETS --image-opts driver=luks,key-secret=s,file.filename=h
        1 map --image-opts driver=luks,file.filename=d,header.filename=h
        0 convert SECRETS --image-opts driver=luks,key-secret=s,file.filename=d,header.filename=h out.raw
        0 compare SECRETS --image-opts KEYED driver=raw,file.filename=out.raw
        ",
    );
}

#[test]
fn passphrases_open_and_make_encrypted_images() {
    let pair = Pair::new(&QCOW2_LUKS);
    let scratch = &pair.ours;
    scratch.file("line", b"pw1\n");
    scratch.file("new", b"pw2\n");
    let run = |words: &str| native(scratch).words(words).finish();
    let done = |words: &str| {
        let done = run(words);
        assert!(done.code == Some(0) && done.err().is_empty(), "{done}");
        done
    };
    done("convert --passphrase-file line x -O raw out.raw");
    // The target is encrypted because it has a passphrase, which is another one.
    done(
        "convert --passphrase-file line --new-passphrase-file new -o encrypt.iter-time=10 -O qcow2 x new.qcow2",
    );
    let read = |words: &str| theirs(scratch).words(words).ok();
    read(
        "compare --object secret,id=n,data=pw2 --image-opts driver=qcow2,encrypt.key-secret=n,file.filename=new.qcow2 \
         driver=raw,file.filename=out.raw",
    );
    // One passphrase does for both, and for what is only made.
    done("convert --passphrase-file line -o iter-time=10 -O luks x same.luks");
    done("create --passphrase-file new -q -f luks -o iter-time=10 empty.luks 1M");
    read(
        "map --object secret,id=s,data=pw1 --image-opts driver=luks,key-secret=s,file.filename=same.luks --output=json",
    );
    read(
        "map --object secret,id=s,data=pw2 --image-opts driver=luks,key-secret=s,file.filename=empty.luks --output=json",
    );
    done("compare --passphrase-file line x same.luks");
    // A further passphrase for an image there is.
    done("amend --passphrase-file line --new-passphrase-file new -o iter-time=10 same.luks");
    done("compare --passphrase-file new same.luks new.qcow2");
    // What holds no data needs no key.
    for words in [
        "info x",
        "check x",
        "map x",
        "map o",
        "measure -O qcow2 x",
        "snapshot -l x",
    ] {
        done(words);
    }
    let wrong = run("convert --passphrase-file new x no.raw");
    assert!(
        wrong.code == Some(1) && wrong.err().contains("password"),
        "{wrong}"
    );
    let none = run("convert x no.raw");
    assert!(
        none.code == Some(1) && none.err().contains("--passphrase-file"),
        "{none}"
    );
    let unused = run("convert --passphrase-file line plain.raw plain2.raw");
    assert!(unused.err().contains("nothing is encrypted"), "{unused}");
    assert!(!scratch.join("no.raw").exists());
}
