//! Passwords: whoever has none learns it when data is wanted, and not before.

use diskmill_core::{Chain, CreateSpec, Driver, GuestOffset, OpenSpec, Options, Result, Role, Secret, State};
use diskmill_formats::qcow::{self, EncryptionError};

use super::images;
use super::support::disk;

fn open(file: &[u8], how: &OpenSpec) -> Result<std::sync::Arc<dyn diskmill_core::LayerMut>> {
    let file = disk::memory(file);
    let parsed = qcow::DRIVER.parse(file.clone(), how)?;
    parsed.attach_mut(vec![(Role::Main, file)], how)
}

fn why(found: diskmill_core::Error) -> EncryptionError {
    found
        .find::<EncryptionError>()
        .unwrap_or_else(|| panic!("{found:?}"))
        .clone()
}

#[test]
fn without_a_password_only_tables_are_looked_at() {
    let image = images::named("secret").make();
    let how = OpenSpec::default();
    let layer = open(&image.file, &how).expect("open");
    let at = GuestOffset::ZERO;
    assert!(layer.facts().encrypted);
    assert!(matches!(
        layer.map(at, 512).expect("map").state,
        State::Encrypted(_)
    ));
    let missing = EncryptionError::KeyMissing;
    assert_eq!(why(layer.read_at(at, &mut [0; 512]).unwrap_err()), missing);
    assert_eq!(
        why(layer.write_at(at, &[0; 512], &Chain::default()).unwrap_err()),
        missing
    );
    assert!(disk::check(&qcow::DRIVER, &image.file).is_ok());
}

#[test]
fn what_options_say_must_fit_the_image() {
    let secret = images::named("secret").make();
    let plain = images::named("plain").make();
    let open = |file: &[u8], options: &str| {
        let mut how = OpenSpec::default();
        how.secrets
            .add("s", Secret::new(b"x".to_vec()))
            .expect("a secret");
        how.options = Options::parse(options);
        open(file, &how).map(drop)
    };
    assert!(open(&secret.file, "encrypt.format=aes,encrypt.key-secret=s").is_ok());
    assert!(open(&plain.file, "encrypt.key-secret=s").is_ok());
    assert!(matches!(
        why(open(&secret.file, "encrypt.format=luks").unwrap_err()),
        EncryptionError::OtherFormat(_)
    ));
    assert!(matches!(
        why(open(&plain.file, "encrypt.format=aes").unwrap_err()),
        EncryptionError::NotEncrypted(_)
    ));
    assert!(open(&secret.file, "encrypt.key-secret=t").is_err());
    assert!(open(&secret.file, "other=1").is_err());
}

#[test]
fn a_wrong_password_reads_as_garbage() {
    let image = images::named("secret").make();
    let mut how = OpenSpec::default();
    how.secrets.set_passphrase(Secret::new(b"wrong".to_vec()));
    let layer = open(&image.file, &how).expect("open");
    let mut found = vec![0; 512];
    layer.read_at(GuestOffset::ZERO, &mut found).expect("read");
    assert!(found != image.start[..512]);
}

#[test]
fn new_images_are_encrypted_as_they_are_asked_to_be() {
    let ask = |options: &str, compress: bool| {
        let mut spec = CreateSpec::new(1 << 20);
        spec.options = Options::parse(options);
        spec.secrets
            .add("s", Secret::new(b"x".to_vec()))
            .expect("a secret");
        spec.compression = compress.then(Default::default);
        qcow::DRIVER.outputs(&spec).map(drop)
    };
    for good in [
        "",
        "encryption=off",
        "encryption=on,encrypt.key-secret=s",
        "encrypt.format=aes,encrypt.key-secret=s",
        "encryption=off,encrypt.format=aes,encrypt.key-secret=s",
    ] {
        assert!(ask(good, false).is_ok(), "{good}");
    }
    for (bad, compress, reason) in [
        ("encryption=on", false, EncryptionError::KeyMissing),
        ("encrypt.format=aes", false, EncryptionError::KeyMissing),
        (
            "encrypt.format=luks,encrypt.key-secret=s",
            false,
            EncryptionError::Unsupported,
        ),
        ("encrypt.key-secret=s", false, EncryptionError::FormatMissing),
        (
            "encryption=on,encrypt.format=aes,encrypt.key-secret=s",
            false,
            EncryptionError::Twice,
        ),
        (
            "encrypt.format=aes,encrypt.key-secret=s",
            true,
            EncryptionError::Compressed,
        ),
    ] {
        assert_eq!(why(ask(bad, compress).unwrap_err()), reason, "{bad}");
    }
}
