//! What text comes out as, and what is refused; compared with `qemu-img info` 10.0.2 by hand.

use super::*;

fn name(text: &str) -> ImageSpec {
    ImageSpec::from_name(text).unwrap()
}

fn wrong(result: Result<ImageSpec>) -> SpecError {
    result.unwrap_err().find::<SpecError>().unwrap().clone()
}

#[test]
fn a_name_is_a_path_unless_a_colon_comes_before_any_slash() {
    assert_eq!(name("x.img").path(), Path::new("x.img"));
    assert_eq!(name("./a:b").path(), Path::new("./a:b"));
    assert_eq!(name("/a:b").path(), Path::new("/a:b"));
    assert_eq!(name("file:a:b").path(), Path::new("a:b"));
    let device = name("host_device:/dev/x");
    assert!(device.file.device && device.path() == Path::new("/dev/x"));
    let zeroinit = name("zeroinit:file:x");
    assert!(zeroinit.zeroinit && zeroinit.path() == Path::new("x"));
    assert_eq!(zeroinit.text, "zeroinit:file:x");
    assert_eq!(
        wrong(ImageSpec::from_name("foo:bar")),
        SpecError::UnknownProtocol("foo".into())
    );
    let error = ImageSpec::from_name("nbd://localhost/x").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert_eq!(
        error.context().path.as_deref(),
        Some(Path::new("nbd://localhost/x"))
    );
    assert!(matches!(
        wrong(ImageSpec::from_name("")),
        SpecError::NoFileName { .. }
    ));
    assert!(ImageSpec::has_protocol("json:{}") && !ImageSpec::has_protocol("a/b:c"));
}

#[test]
fn names_that_are_not_utf8_stay_as_they_are() {
    let raw = OsStr::from_bytes(b"file:\xff\xfe");
    assert_eq!(
        ImageSpec::from_name(raw).unwrap().path().as_os_str().as_bytes(),
        b"\xff\xfe"
    );
}

#[test]
fn trees_nest_or_are_dotted() {
    let nested = name(r#"json:{"driver":"qcow2","backing":null,"file":{"driver":"file","filename":"b.q"}}"#);
    let dotted = name(r#"json:{"driver":"qcow2","backing":null,"file.driver":"file","file.filename":"b.q"}"#);
    let options = ImageSpec::from_options("driver=qcow2,file.driver=file,file.filename=b.q").unwrap();
    for spec in [&nested, &dotted, &options] {
        assert_eq!(spec.driver.as_deref(), Some("qcow2"));
        assert_eq!(spec.path(), Path::new("b.q"));
        assert_eq!(spec.shown, "b.q");
    }
    assert_eq!(nested.backing, BackingSpec::Without);
    assert_eq!(dotted.backing, BackingSpec::Without);
    assert_eq!(options.backing, BackingSpec::Own);
    let BackingSpec::Other(backing) = ImageSpec::from_options(
        "driver=qcow2,file.filename=o.q,backing.driver=raw,backing.file.filename=r.raw,backing.size=1M",
    )
    .unwrap()
    .backing
    else {
        panic!("no backing");
    };
    assert_eq!(backing.driver.as_deref(), Some("raw"));
    assert_eq!(backing.options.size("size").unwrap(), Some(1 << 20));
}

#[test]
fn a_part_of_a_file_shows_as_the_tree_it_was_given_as() {
    let spec =
        name(r#"json:{"driver":"raw","size":1024,"offset":512,"file":{"driver":"file","filename":"r.raw"}}"#);
    assert_eq!(
        spec.shown,
        r#"json:{"offset": 512, "driver": "raw", "size": 1024, "file": {"driver": "file", "filename": "r.raw"}}"#
    );
    let spec = ImageSpec::from_options("driver=raw,file.filename=r.raw,size=512k").unwrap();
    assert_eq!(
        spec.shown,
        r#"json:{"driver": "raw", "size": "512k", "file": {"driver": "file", "filename": "r.raw"}}"#
    );
}

#[test]
fn settings_are_kept_and_tuning_is_let_pass() {
    let spec = ImageSpec::from_options(
        "driver=qcow2,discard-no-unref=true,l2-cache-size=1M,cache.direct=on,discard=unmap,read-only=off,\
         file.driver=host_device,file.filename=/dev/x,file.locking=off,file.aio=threads",
    )
    .unwrap();
    assert_eq!(spec.settings.direct, Some(true));
    assert_eq!(spec.settings.unmap, Some(true));
    assert_eq!(spec.settings.read_only, Some(false));
    assert!(spec.file.device && !spec.file.lock);
    let spec = ImageSpec::from_options("driver=qcow2,file.filename=x,data-file.filename=d").unwrap();
    assert_eq!(spec.data_file, Some(FileSpec::new("d")));
}

#[test]
fn what_is_wrong_with_a_tree_is_named() {
    use SpecError as E;
    let owned = str::to_owned;
    for (text, error) in [
        ("json:[]", E::NotAnObject),
        ("json:{}", E::NeitherDriverNorFile),
        (r#"json:{"driver":5}"#, E::NeitherDriverNorFile),
        (r#"json:{"driver":"nope"}"#, E::UnknownDriver(owned("nope"))),
        (
            r#"json:{"driver":"raw","file":"r.raw"}"#,
            E::NoSuchNode(owned("r.raw")),
        ),
        (
            r#"json:{"driver":"qcow2","file":{"driver":"file"}}"#,
            E::NoFileName {
                driver: owned("file"),
            },
        ),
        (
            r#"json:{"driver":"raw","file":{"driver":"nbd","host":"x"}}"#,
            E::UnsupportedDriver(owned("nbd")),
        ),
    ] {
        assert_eq!(wrong(ImageSpec::from_name(text)), error, "{text}");
    }
    for (text, error) in [
        ("b.q", E::NoSuchNode(owned("b.q"))),
        ("driver=qcow2,filename=b.q", E::NoFile(owned("qcow2"))),
        ("driver=nope,file.filename=b.q", E::UnknownDriver(owned("nope"))),
        (
            "driver=qcow2,file.driver=nope,file.filename=b.q",
            E::UnknownDriver(owned("nope")),
        ),
        (
            "driver=qcow2,file.filename=b.q,nosuch=1",
            E::UnknownOption {
                driver: owned("qcow2"),
                option: owned("nosuch"),
            },
        ),
        (
            "driver=raw,file.filename=r,size=5x",
            E::Value {
                name: owned("size"),
                expected: "a non-negative number below 2^64",
            },
        ),
        (
            "driver=raw,file.filename=r,read-only=bla",
            E::Value {
                name: owned("read-only"),
                expected: "'on' or 'off'",
            },
        ),
    ] {
        assert_eq!(wrong(ImageSpec::from_options(text)), error, "{text}");
    }
    assert!(matches!(wrong(ImageSpec::from_name("json:{\"a\"")), E::Json(_)));
}

#[test]
fn nesting_has_an_end() {
    let mut text = String::from(r#"{"driver":"raw","file.filename":"r"}"#);
    for _ in 0..100 {
        text = format!(r#"{{"driver":"qcow2","file.filename":"o","backing":{text}}}"#);
    }
    assert!(ImageSpec::from_name(format!("json:{text}")).is_ok());
    let dotted = format!(
        "driver=qcow2,file.filename=a,{}driver=raw",
        "backing.".repeat(100_000)
    );
    assert!(ImageSpec::from_options(&dotted).is_err());
}

#[test]
fn keys_of_encrypted_images_are_options_and_show_in_the_name() {
    let tree = r#"json:{"driver":"qcow2","encrypt":{"format":"luks","key-secret":"s"},"file.filename":"q"}"#;
    let options =
        ImageSpec::from_options("driver=qcow2,encrypt.format=luks,encrypt.key-secret=s,file.filename=q")
            .unwrap();
    for spec in [name(tree), options] {
        assert_eq!(spec.options.text("encrypt.key-secret"), Some("s"));
        assert_eq!(spec.options.text("encrypt.format"), Some("luks"));
        assert_eq!(
            spec.shown,
            r#"json:{"encrypt.key-secret": "s", "driver": "qcow2", "file": {"driver": "file", "filename": "q"}}"#
        );
    }
    let number = name(r#"json:{"encrypt.key-secret":5,"file.filename":"q"}"#);
    assert_eq!(number.options.text("encrypt.key-secret"), Some("5"));
    let luks = ImageSpec::from_options("key-secret=s,file.filename=l").unwrap();
    assert_eq!(luks.options.text("key-secret"), Some("s"));
    assert_eq!(
        luks.shown,
        r#"json:{"driver": "luks", "file": {"driver": "file", "filename": "l"}, "key-secret": "s"}"#
    );
    for apart in [
        "key-secret=s,file.filename=d,header.filename=h",
        "key-secret=s,file.filename=d,header.driver=raw,header.file.filename=h",
    ] {
        let apart = ImageSpec::from_options(apart).unwrap();
        assert_eq!(apart.header, Some(FileSpec::new("h")));
        assert_eq!(
            apart.shown,
            r#"json:{"header": {"driver": "file", "filename": "h"}, "driver": "luks", "file": {"driver": "file", "filename": "d"}, "key-secret": "s"}"#
        );
    }
    let bare = ImageSpec::from_options("file.filename=d,header.filename=h").unwrap();
    assert_eq!(bare.shown, "d");
    assert_eq!(
        wrong(ImageSpec::from_options(
            "driver=qcow2,encrypt.foo=s,file.filename=q"
        )),
        SpecError::Unexpected("foo".into())
    );
    assert!(matches!(
        wrong(ImageSpec::from_options(
            "driver=raw,encrypt.key-secret=s,file.filename=q"
        )),
        SpecError::UnknownOption { .. }
    ));
    assert!(matches!(
        wrong(ImageSpec::from_options(
            "file.filename=d,header.driver=raw,header.offset=5,header.file.filename=h"
        )),
        SpecError::UnknownOption { .. }
    ));
}

#[test]
fn a_backing_image_can_be_left_to_the_image_and_opened_with_a_key() {
    let spec = ImageSpec::from_options(
        "driver=qcow2,file.filename=o,backing.driver=qcow2,backing.encrypt.key-secret=s,\
         backing.backing.encrypt.key-secret=t",
    )
    .unwrap();
    let BackingSpec::OwnWith(how) = spec.backing else {
        panic!("not its own");
    };
    assert_eq!(how.driver.as_deref(), Some("qcow2"));
    assert_eq!(how.options.text("encrypt.key-secret"), Some("s"));
    let BackingSpec::OwnWith(below) = how.backing else {
        panic!("not its own");
    };
    assert_eq!(below.options.text("encrypt.key-secret"), Some("t"));
    let mut own = name(r#"json:{"driver":"raw","file.filename":"b"}"#);
    own.open_as(*below);
    assert_eq!((own.driver.as_deref(), own.path()), (Some("raw"), Path::new("b")));
    assert_eq!(own.options.text("encrypt.key-secret"), Some("t"));
    assert!(matches!(
        ImageSpec::from_options("file.filename=o,backing.file.filename=b,backing.encrypt.key-secret=s"),
        Ok(ImageSpec {
            backing: BackingSpec::Other(_),
            ..
        })
    ));
}
