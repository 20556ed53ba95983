//! Encrypted images: what needs a key and what does not, and whose words a wrong one gets.

use std::sync::Arc;

use diskmill_core::{
    Chain, ErrorKind, GuestOffset, Job, LayerMut, NewSnapshot, OpenSpec, Parsed, Result, Role, Secret,
    SecretError, State, Storage, StorageMut, ZeroHow,
};
use diskmill_formats::crypt::luks::LuksError;
use diskmill_formats::qcow2::EncryptionError;
use diskmill_formats::registry;
use diskmill_storage::Memory;
use diskmill_testkit::oracle;

use super::images::{self, Disks};

fn parse(disks: &Disks, how: &OpenSpec) -> Result<Box<dyn Parsed>> {
    let driver = registry::by_name("qcow2").expect("a driver");
    driver.parse(Arc::clone(&disks[0]) as Arc<dyn Storage>, how)
}

fn open(disks: &Disks, how: &OpenSpec) -> Result<Arc<dyn LayerMut>> {
    let files = images::ROLES.into_iter().zip(disks.iter().cloned()).collect();
    parse(disks, how)?.attach_mut(files, how)
}

fn with(passphrase: &str) -> OpenSpec {
    let mut how = OpenSpec::default();
    how.secrets.set_passphrase(Secret::new(passphrase.into()));
    how
}

#[test]
fn without_a_key_tables_can_be_changed_and_data_cannot_be_touched() {
    for name in ["luks snapshot", "aes snapshot"] {
        let image = images::named(name).make();
        let disks = images::memory(&image.files);
        let layer = open(&disks, &OpenSpec::default()).expect(name);
        let at = GuestOffset::new;
        let missing = |error: diskmill_core::Error| {
            let found = error.find::<SecretError>();
            assert_eq!(found, Some(&SecretError::Missing("encrypt.key-secret")), "{name}");
        };
        let data = (0..image.kind.size / 512)
            .map(|sector| sector * 512)
            .find(|sector| matches!(layer.map(at(*sector), 512).unwrap().state, State::Encrypted(_)))
            .expect("data");
        let before = images::bytes(&disks);
        missing(layer.read_at(at(data), &mut [0; 512]).unwrap_err());
        missing(layer.write_at(at(0), &[1; 512], &Chain::default()).unwrap_err());
        missing(layer.write_at(at(data), &[1; 5], &Chain::default()).unwrap_err());
        layer.flush().unwrap();
        assert!(images::bytes(&disks) == before, "{name}: nothing was changed");

        layer
            .zero(at(0)..at(4096), ZeroHow::MayUnmap, &Chain::default())
            .unwrap();
        layer.discard(at(data / 512 * 512)..at(data + 512)).unwrap();
        let snapshots = layer.snapshots().expect("snapshots");
        snapshots.create(&NewSnapshot::new("two", 0, 0)).unwrap();
        snapshots.apply("one").unwrap();
        snapshots.delete("one").unwrap();
        layer.resize(image.kind.size * 2, &Chain::default()).unwrap();
        layer.flush().unwrap();
        drop(layer);
        images::assert_clean(&images::bytes(&disks));
    }
}

#[test]
fn a_wrong_passphrase_is_told_where_it_can_be() {
    let image = images::named("luks").make();
    let disks = images::memory(&image.files);
    let error = open(&disks, &with("wrong")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Denied, "{error:?}");
    assert_eq!(error.find(), Some(&LuksError::Password));
    assert!(images::bytes(&disks) == image.files);
    // The old AES has no way to tell.
    let image = images::named("aes").make();
    let layer = open(&images::memory(&image.files), &with("wrong")).unwrap();
    let mut bytes = vec![0; image.start.len()];
    layer.read_at(GuestOffset::ZERO, &mut bytes).unwrap();
    assert!(bytes != image.start);
}

#[test]
fn the_format_that_is_said_must_be_the_images() {
    for (name, wrong) in [("luks", "aes"), ("aes", "luks"), ("aes", "bogus")] {
        let image = images::named(name).make();
        let disks = images::memory(&image.files);
        let mut how = images::how();
        how.options.set("encrypt.format", name);
        open(&disks, &how).expect(name);
        how.options.set("encrypt.format", wrong);
        let error = open(&disks, &how).unwrap_err();
        let asked = wrong.to_owned();
        assert!(
            matches!(error.find(), Some(EncryptionError::OtherFormat { asked: said, .. }) if *said == asked),
            "{error:?}"
        );
    }
    let plain = images::named("cluster 4k").make();
    let mut how = images::how();
    how.options.set("encrypt.key-secret", "nobody");
    open(&images::memory(&plain.files), &how).expect("a plain image asks for no key");
    how.options.set("encrypt.format", "luks");
    let error = open(&images::memory(&plain.files), &how).unwrap_err();
    assert!(matches!(error.find(), Some(EncryptionError::NotEncrypted(said)) if said == "luks"));
}

#[test]
fn compressed_clusters_are_neither_made_nor_compacted_to() {
    let image = images::named("luks").make();
    let disks = images::memory(&image.files);
    let layer = images::open(&disks).unwrap();
    let error = layer
        .write_encoded(
            GuestOffset::ZERO,
            diskmill_core::Stored::Packed(&[0; 100]),
            &Chain::default(),
        )
        .unwrap_err();
    assert_eq!(error.find(), Some(&EncryptionError::Compressed));
    drop(layer);
    let mut spec = diskmill_core::CompactSpec::default();
    spec.compress = Some(Default::default());
    let files = vec![(Role::Main, Arc::clone(&disks[0]))];
    let how = images::how();
    let error = parse(&disks, &how)
        .unwrap()
        .compact(files, &how, &spec, Job::silent())
        .unwrap_err();
    assert_eq!(error.find(), Some(&EncryptionError::Compressed));
    // Without a key nothing can be moved.
    let how = OpenSpec::default();
    let files = vec![(Role::Main, Arc::clone(&disks[0]))];
    let spec = diskmill_core::CompactSpec::default();
    let error = parse(&disks, &how)
        .unwrap()
        .compact(files, &how, &spec, Job::silent())
        .unwrap_err();
    assert!(matches!(error.find(), Some(SecretError::Missing(_))), "{error:?}");
    assert!(images::bytes(&disks) == image.files);
}

/// Where the extension is that says where the LUKS header is: behind the fixed header.
const EXTENSION: usize = 112;

#[test]
fn encryption_headers_where_none_can_be_are_refused_or_reported() {
    let image = images::named("luks").make();
    let set = |at: usize, value: u64| {
        let mut files = image.files.clone();
        files[0][at..at + 8].copy_from_slice(&value.to_be_bytes());
        files
    };
    let place = u64::from_be_bytes(*image.files[0][EXTENSION + 8..].first_chunk().unwrap());
    let length = u64::from_be_bytes(*image.files[0][EXTENSION + 16..].first_chunk().unwrap());
    for (at, value, says) in [
        (8, place + 512, "must be a multiple of the cluster size"),
        (8, 1 << 40, "there is no LUKS header at 0x10000000000"),
        (16, 1 << 40, "runs past the end of the file"),
        (
            16,
            591,
            "LUKS header ends at byte 592, but there are only 591 bytes",
        ),
        (16, 4096, "the material of keyslot 0"),
        (8, 0, "there is no LUKS header at 0x0"),
    ] {
        let files = set(EXTENSION + at, value);
        let error = images::open(&images::memory(&files)).unwrap_err();
        assert!(format!("{error:?}").contains(says), "{at} {value:#x}: {error:?}");
    }
    // A table in its place is two uses of one cluster, which a check tells and no write makes worse.
    let l1 = u64::from_be_bytes(*image.files[0][40..].first_chunk().unwrap());
    let files = set(EXTENSION + 8, l1);
    assert!(images::check(&files).unwrap().corruptions > 0);
    let mut files = image.files.clone();
    let entry = place | 1 << 63;
    files[0][l1 as usize..l1 as usize + 8].copy_from_slice(&entry.to_be_bytes());
    assert!(images::check(&files).unwrap().corruptions > 0);
    let disks = images::memory(&files);
    if let Ok(layer) = images::open(&disks) {
        let _ = layer.write_at(GuestOffset::ZERO, &[7; 512], &Chain::default());
        let _ = layer.flush();
    }
    let now = images::bytes(&disks);
    let header = place as usize..(place + length) as usize;
    assert!(
        now[0][header.clone()] == files[0][header],
        "the keys are what they were"
    );
}

/// QEMU compresses into encrypted images that exist, in the clear: we read what it wrote.
#[test]
fn compressed_clusters_of_encrypted_images_are_plain() {
    let scratch = diskmill_testkit::Scratch::new();
    let (raw, path) = (
        scratch.file("a.raw", &vec![b'x'; 64 << 10]),
        scratch.join("a.qcow2"),
    );
    oracle::create(&path, "qcow2", images::named("aes").options, "64k");
    oracle::qemu_img()
        .args(["convert", "-n", "-c"])
        .args(oracle::KEY)
        .args(["--image-opts", "--target-image-opts"])
        .arg(oracle::image_opts(&raw, "raw"))
        .arg(oracle::image_opts(&path, "qcow2+key"))
        .ok();
    let file: Arc<dyn StorageMut> = Arc::new(Memory::from(std::fs::read(&path).unwrap()));
    let layer = images::open(&vec![file]).unwrap();
    let mut bytes = [0; 4096];
    layer.read_at(GuestOffset::ZERO, &mut bytes).unwrap();
    let state = layer.map(GuestOffset::ZERO, 4096).unwrap().state;
    assert!(matches!(state, State::Compressed(_)), "{state:?}");
    assert!(bytes.iter().all(|byte| *byte == b'x'));
}
