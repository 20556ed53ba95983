//! Passwords: whoever has none learns it when data is wanted, and not before.

use diskmill_core::{
    Chain, CreateSpec, Driver, GuestOffset, OpenSpec, Options, Result, Role, Secret, SecretError, State,
};
use diskmill_formats::{qcow, qcow2};
use qcow::CreateError;
use qcow2::EncryptionError;

use super::images;
use super::support::disk;

fn open(file: &[u8], how: &OpenSpec) -> Result<std::sync::Arc<dyn diskmill_core::LayerMut>> {
    let file = disk::memory(file);
    let parsed = qcow::DRIVER.parse(file.clone(), how)?;
    parsed.attach_mut(vec![(Role::Main, file)], how)
}

fn why<T: std::error::Error + Clone + 'static>(found: diskmill_core::Error) -> T {
    found.find::<T>().unwrap_or_else(|| panic!("{found:?}")).clone()
}

const MISSING: SecretError = SecretError::Missing("encrypt.key-secret");

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
    let read = layer.read_at(at, &mut [0; 512]).unwrap_err();
    let written = layer.write_at(at, &[0; 512], &Chain::default()).unwrap_err();
    assert_eq!((why(read), why(written)), (MISSING, MISSING));
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
        why::<EncryptionError>(open(&secret.file, "encrypt.format=luks").unwrap_err()),
        EncryptionError::OtherFormat { .. }
    ));
    assert!(matches!(
        why::<EncryptionError>(open(&plain.file, "encrypt.format=aes").unwrap_err()),
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
    for bad in ["encryption=on", "encrypt.format=aes"] {
        assert_eq!(why::<SecretError>(ask(bad, false).unwrap_err()), MISSING, "{bad}");
    }
    for (bad, reason) in [
        (
            "encrypt.format=luks,encrypt.key-secret=s",
            CreateError::EncryptionFormat("luks".to_owned()),
        ),
        ("encrypt.key-secret=s", CreateError::EncryptionFormatMissing),
        (
            "encryption=on,encrypt.format=aes,encrypt.key-secret=s",
            CreateError::EncryptionTwice,
        ),
    ] {
        assert_eq!(why::<CreateError>(ask(bad, false).unwrap_err()), reason, "{bad}");
    }
    let both = ask("encrypt.format=aes,encrypt.key-secret=s", true).unwrap_err();
    assert_eq!(why::<EncryptionError>(both), EncryptionError::Compressed);
}
