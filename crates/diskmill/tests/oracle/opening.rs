//! What opens, what does not, and why; compared with `qemu-img` where it is of the same mind.

use std::error::Error as _;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use diskmill::open::{self, OpenError, OpenRequest};
use diskmill::policy::References;
use diskmill::spec::{ImageSpec, SpecError};
use diskmill_core::{Error, ErrorKind, GuestOffset};
use diskmill_storage::LockError;
use diskmill_testkit::process::Run;
use diskmill_testkit::{Scratch, oracle};

fn overlay(path: &Path, backing: &str, format: &str) {
    oracle::qemu_img()
        .args(["create", "-q", "-u", "-f", "qcow2", "-b", backing, "-F", format])
        .arg(path)
        .arg("1M")
        .ok();
}

fn request(path: &Path) -> OpenRequest {
    OpenRequest::new(ImageSpec::from_name(path).unwrap())
}

fn refused(request: &OpenRequest) -> Error {
    open::image(request).expect_err("it opens")
}

fn open_error(error: &Error) -> &OpenError {
    error
        .source()
        .unwrap()
        .downcast_ref()
        .unwrap_or_else(|| panic!("{error:?}"))
}

/// The errors behind one another: each is why the image above it did not open.
fn backing(error: &Error) -> &Error {
    match open_error(error) {
        OpenError::Backing(inner) => inner,
        other => panic!("{other:?}"),
    }
}

fn path_of(error: &Error) -> &Path {
    error.context().path.as_deref().unwrap()
}

#[test]
fn what_is_missing_is_named_with_the_way_to_it() {
    let scratch = Scratch::new();
    let missing = scratch.join("missing");
    let error = refused(&request(&missing));
    assert_eq!(
        (error.kind(), path_of(&error)),
        (ErrorKind::NotFound, missing.as_path())
    );

    let (top, mid) = (scratch.join("top.qcow2"), scratch.join("mid.qcow2"));
    overlay(&mid, "missing", "raw");
    overlay(&top, "mid.qcow2", "qcow2");
    let error = refused(&request(&top));
    assert_eq!(path_of(&error), top);
    assert_eq!(path_of(backing(&error)), mid);
    let last = backing(backing(&error));
    assert_eq!(
        (last.kind(), path_of(last)),
        (ErrorKind::NotFound, missing.as_path())
    );
}

#[test]
fn a_format_that_is_not_there_or_not_known_is_named() {
    let scratch = Scratch::new();
    let raw = scratch.hole("x.raw", 4096);
    let mut asked = request(&raw);
    asked.format = Some("qcow2".to_owned());
    let error = refused(&asked);
    assert_eq!(error.kind(), ErrorKind::NotThisFormat);
    assert!(matches!(open_error(&error), OpenError::NotInFormat(format) if format.name() == "qcow2"));
    asked.format = Some("foo".to_owned());
    assert_eq!(
        refused(&asked).find::<SpecError>(),
        Some(&SpecError::UnknownDriver("foo".to_owned()))
    );
    asked.format = Some("vvfat".to_owned());
    assert_eq!(refused(&asked).kind(), ErrorKind::Unsupported);

    let top = scratch.join("top.qcow2");
    overlay(&top, "x.raw", "qcow2");
    let error = refused(&request(&top));
    assert!(matches!(open_error(backing(&error)), OpenError::NotInFormat(_)));
}

#[test]
fn only_files_and_devices_are_opened_and_nothing_hangs() {
    let scratch = Scratch::new();
    let fifo = scratch.join("fifo");
    Run::new("mkfifo").arg(&fifo).ok();
    let top = scratch.join("top.qcow2");
    overlay(&top, "fifo", "raw");
    for path in [fifo.as_path(), Path::new("/dev/zero"), scratch.path()] {
        assert_eq!(refused(&request(path)).kind(), ErrorKind::Usage, "{path:?}");
    }
    assert_eq!(backing(&refused(&request(&top))).kind(), ErrorKind::Usage);
}

#[test]
fn circles_and_towers_end() {
    let scratch = Scratch::new();
    let (a, b) = (scratch.join("a.qcow2"), scratch.join("b.qcow2"));
    overlay(&a, "b.qcow2", "qcow2");
    overlay(&b, "link", "qcow2");
    symlink("a.qcow2", scratch.join("link")).unwrap();
    let error = refused(&request(&a));
    assert!(
        matches!(open_error(backing(backing(&error))), OpenError::Loop(_)),
        "{error:?}"
    );
    for index in 0..40 {
        overlay(
            &scratch.join(format!("{index}")),
            &format!("{}", index + 1),
            "qcow2",
        );
    }
    oracle::create(scratch.join("40"), "qcow2", "", "1M");
    let mut tower = request(&scratch.join("0"));
    assert_eq!(open::image(&tower).unwrap().nodes.len(), 41);
    tower.limits.chain_depth = 41;
    assert!(open::image(&tower).is_ok());
    tower.limits.chain_depth = 40;
    let mut error = &refused(&tower);
    while let OpenError::Backing(inner) = open_error(error) {
        error = inner;
    }
    assert!(matches!(open_error(error), OpenError::TooDeep(40)), "{error:?}");
}

#[test]
fn an_image_is_never_its_own_data_file() {
    let scratch = Scratch::new();
    let path = scratch.join("x.qcow2");
    let data = scratch.join("d");
    oracle::create(&path, "qcow2", &format!("data_file={}", data.display()), "1M");
    std::fs::remove_file(&data).unwrap();
    std::fs::hard_link(&path, &data).unwrap();
    let error = refused(&request(&path));
    match open_error(&error) {
        OpenError::DataFile(inner) => assert!(matches!(open_error(inner), OpenError::DataFileIsImage(_))),
        other => panic!("{other:?}"),
    }
}

/// A tree with an image in `images`, and a secret beside it that it names in many ways.
fn secret(scratch: &Scratch) -> Vec<PathBuf> {
    std::fs::create_dir(scratch.join("images")).unwrap();
    let secret = scratch.file("secret", &[7; 4096]);
    symlink(&secret, scratch.join("images/link")).unwrap();
    let absolute = secret.to_str().unwrap();
    let json = format!(r#"json:{{"driver":"raw","file":{{"driver":"file","filename":"{absolute}"}}}}"#);
    let mut paths = Vec::new();
    for (index, name) in [
        absolute,
        "../secret",
        "link",
        "/proc/self/root/../etc/passwd",
        &json,
    ]
    .into_iter()
    .chain([format!("file:{absolute}").as_str()])
    .enumerate()
    {
        let path = scratch.join(format!("images/{index}.qcow2"));
        overlay(&path, name, "raw");
        paths.push(path);
    }
    let path = scratch.join("images/data.qcow2");
    let data = scratch.join("secret-data");
    oracle::create(&path, "qcow2", &format!("data_file={}", data.display()), "1M");
    paths.push(path);
    paths
}

#[test]
fn a_policy_keeps_an_image_from_naming_what_it_likes() {
    let scratch = Scratch::new();
    for path in secret(&scratch) {
        let mut asked = request(&path);
        assert!(open::image(&asked).is_ok(), "{path:?}");
        let allow = vec![scratch.path().to_owned()];
        for policy in [
            References::Beneath { allow: Vec::new() },
            References::None { allow: Vec::new() },
        ] {
            asked.policy = policy;
            let error = refused(&asked);
            assert_eq!(error.kind(), ErrorKind::Denied, "{path:?} {error:?}");
        }
        let plain = ["0", "1", "data"].contains(&path.file_stem().unwrap().to_str().unwrap());
        let link = path.ends_with("2.qcow2");
        asked.policy = References::Beneath { allow: allow.clone() };
        assert_eq!(open::image(&asked).is_ok(), plain || link, "{path:?}");
        asked.policy = References::None { allow };
        assert_eq!(open::image(&asked).is_ok(), plain, "{path:?}");
    }
}

#[test]
fn the_tree_of_the_image_may_be_named() {
    let scratch = Scratch::new();
    std::fs::create_dir(scratch.join("sub")).unwrap();
    scratch.hole("sub/base.raw", 1 << 20);
    let top = scratch.join("top.qcow2");
    overlay(&top, "sub/base.raw", "raw");
    let mut asked = request(&top);
    asked.policy = References::Beneath { allow: Vec::new() };
    assert!(open::image(&asked).is_ok());
    asked.policy = References::None { allow: Vec::new() };
    assert_eq!(refused(&asked).kind(), ErrorKind::Denied);
}

#[test]
fn protocols_inside_images_are_refused_by_name() {
    let scratch = Scratch::new();
    let top = scratch.join("top.qcow2");
    for name in [
        "nbd://localhost/x",
        "fat:/etc",
        r#"json:{"driver":"nbd","host":"localhost"}"#,
        "http://x/y",
    ] {
        overlay(&top, name, "raw");
        let error = refused(&request(&top));
        assert_eq!(backing(&error).kind(), ErrorKind::Unsupported, "{name} {error:?}");
    }
}

#[test]
fn the_user_may_say_what_an_image_is_backed_by() {
    let scratch = Scratch::new();
    let base = scratch.file("base.raw", &[5; 4096]);
    let top = scratch.join("top.qcow2");
    overlay(&top, "gone", "raw");
    let text = format!(
        "driver=qcow2,file.filename={},backing.driver=raw,backing.file.filename={}",
        top.display(),
        base.display()
    );
    let mut asked = OpenRequest::new(ImageSpec::from_options(&text).unwrap());
    asked.policy = References::None { allow: Vec::new() };
    let image = open::image(&asked).unwrap();
    let mut buf = [0; 512];
    image.chain.read_at(GuestOffset::ZERO, &mut buf).unwrap();
    assert_eq!(buf, [5; 512]);
    let json = format!(
        r#"json:{{"driver":"qcow2","backing":null,"file":{{"driver":"file","filename":"{}"}}}}"#,
        top.display()
    );
    let alone = OpenRequest::new(ImageSpec::from_name(json).unwrap());
    assert_eq!(open::image(&alone).unwrap().nodes.len(), 1);
}

#[test]
fn an_image_that_qemu_writes_is_left_alone() {
    let scratch = Scratch::new();
    let path = scratch.join("x.qcow2");
    oracle::create(&path, "qcow2", "", "1M");
    let holder = oracle::Holder::qemu_io(&path, "qcow2", &[]);
    let error = refused(&request(&path));
    assert_eq!(error.kind(), ErrorKind::Locked);
    let lock = error.find::<LockError>().unwrap();
    assert_eq!((lock.permission, lock.shared), ("write", true));
    let error = open::image_mut(&request(&path)).unwrap_err();
    let lock = error.find::<LockError>().unwrap();
    assert_eq!((lock.permission, lock.shared), ("write", false));
    let mut shared = request(&path);
    shared.share = true;
    assert!(open::image(&shared).is_ok());
    drop(holder);
    assert!(open::image_mut(&request(&path)).is_ok());
}

#[test]
fn a_guessed_raw_disk_cannot_become_another_format() {
    let scratch = Scratch::new();
    let path = scratch.hole("x.raw", 1 << 20);
    let image = open::image_mut(&request(&path)).unwrap();
    let header = b"QFI\xfb\0\0\0\x03";
    let error = image
        .top
        .write_at(GuestOffset::ZERO, header, &image.below)
        .unwrap_err();
    assert!(matches!(open_error(&error), OpenError::WouldChangeFormat(_)));
    image
        .top
        .write_at(GuestOffset::ZERO, b"harmless", &image.below)
        .unwrap();
    // Not in two steps either.
    image
        .top
        .write_at(GuestOffset::new(4), &header[4..], &image.below)
        .unwrap();
    assert!(
        image
            .top
            .write_at(GuestOffset::ZERO, &header[..4], &image.below)
            .is_err()
    );
    image
        .top
        .write_at(GuestOffset::new(512), header, &image.below)
        .unwrap();
    drop(image);
    let mut said = request(&path);
    said.format = Some("raw".to_owned());
    let image = open::image_mut(&said).unwrap();
    image
        .top
        .write_at(GuestOffset::ZERO, header, &image.below)
        .unwrap();
}

#[test]
fn a_disk_of_a_package_is_unpacked_once_for_all_clones_of_a_request() {
    let scratch = Scratch::new();
    scratch.file("d.raw", &[7; 4096]);
    Run::new("gzip").dir(scratch.path()).arg("d.raw").ok();
    let ovf = "http://schemas.dmtf.org/ovf/envelope/1";
    let text = format!(
        r#"<Envelope xmlns="{ovf}"><References><File id="f" href="d.raw.gz" compression="gzip"/></References><DiskSection><Disk diskId="d" fileRef="f" capacity="4096"/></DiskSection></Envelope>"#
    );
    let mut request = request(&scratch.file("p.ovf", text.as_bytes()));
    request.packages = true;
    assert_eq!(open::image(&request.clone()).unwrap().chain.virtual_size(), 4096);
    scratch.file("d.raw.gz", b"no gzip any more");
    let image = open::image(&request).unwrap();
    let mut bytes = [0; 4096];
    image.chain.read_at(GuestOffset::ZERO, &mut bytes).unwrap();
    assert_eq!(bytes, [7; 4096]);
    let mut other = OpenRequest::new(request.spec.clone());
    other.packages = true;
    assert!(refused(&other).to_string().contains("p.ovf"));
}
