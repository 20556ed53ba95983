use diskmill_core::{Compression, OptionError, Options, Secret, SecretError, Secrets};

use super::*;

fn plan(options: &str) -> Result<Plan> {
    plan_sized(options, 1 << 20)
}

fn plan_sized(options: &str, size: u64) -> Result<Plan> {
    let mut spec = CreateSpec::new(size);
    spec.options = Options::parse(options);
    Plan::new(&spec)
}

fn refused(options: &str) -> CreateError {
    match plan(options) {
        Ok(_) => panic!("{options} is accepted"),
        Err(error) => error.find::<CreateError>().expect("a typed reason").clone(),
    }
}

#[test]
fn defaults_are_those_of_qemu() {
    let plan = plan("").unwrap();
    assert_eq!(plan.version, Version::V3);
    assert_eq!(plan.cluster_bits, ClusterBits::DEFAULT);
    assert_eq!(plan.refcount_order, RefcountOrder::DEFAULT);
    assert_eq!(plan.compression_type, CompressionType::Zlib);
    assert_eq!(plan.preallocation, Preallocation::Off);
    assert!(!plan.extended_l2 && !plan.lazy_refcounts && !plan.preallocates());
    assert_eq!(plan.codec, None);
}

#[test]
fn versions_have_two_spellings() {
    for (text, version) in [
        ("compat=0.10", Version::V2),
        ("compat=v2", Version::V2),
        ("compat=1.1", Version::V3),
        ("compat=v3", Version::V3),
    ] {
        assert_eq!(plan(text).unwrap().version, version, "{text}");
    }
    assert_eq!(refused("compat=2"), CreateError::Compat("2".to_owned()));
}

#[test]
fn values_out_of_range_are_refused_by_name() {
    for size in [0, 256, 1000, 4 << 20, 1 << 32] {
        assert_eq!(
            refused(&format!("cluster_size={size}")),
            CreateError::ClusterSize(size)
        );
    }
    for bits in [0, 3, 128, 1 << 40] {
        assert_eq!(
            refused(&format!("refcount_bits={bits}")),
            CreateError::RefcountBits(bits)
        );
    }
    assert_eq!(
        refused("compression_type=lz4"),
        CreateError::CompressionType("lz4".to_owned())
    );
    assert_eq!(
        refused("extended_l2,cluster_size=8k"),
        CreateError::SubclusterSize(8192)
    );
    assert_eq!(refused("data_file="), CreateError::EmptyName("data_file"));
    let error = plan("preallocation=some").unwrap_err();
    assert!(error.find::<OptionError>().is_some(), "{error:?}");
    let error = plan("cluster_sise=4k").unwrap_err();
    assert_eq!(
        error.find(),
        Some(&OptionError::Unknown("cluster_sise".to_owned()))
    );
}

#[test]
fn version_2_has_nothing_of_version_3() {
    for (option, name) in [
        ("refcount_bits=8", "refcount_bits"),
        ("lazy_refcounts=on", "lazy_refcounts"),
        ("extended_l2=on", "extended_l2"),
        ("compression_type=zstd", "compression_type"),
        ("data_file=d", "data_file"),
    ] {
        assert_eq!(
            refused(&format!("compat=v2,{option}")),
            CreateError::NeedsVersion3(name)
        );
    }
}

#[test]
fn options_that_exclude_each_other_are_refused() {
    assert_eq!(refused("data_file_raw=on"), CreateError::RawWithoutDataFile);
    assert_eq!(
        refused("data_file=d,data_file_raw=on,backing_file=b"),
        CreateError::Exclude("backing_file", "data_file_raw")
    );
    assert_eq!(
        refused("preallocation=metadata,backing_file=b"),
        CreateError::PreallocationWithBacking
    );
    assert!(plan("preallocation=metadata,backing_file=b,extended_l2=on").is_ok());
    for option in ["preallocation=full", "data_file=d"] {
        let mut spec = CreateSpec::new(512);
        spec.options = Options::parse(option);
        spec.compression = Some(Compression::default());
        let error = Plan::new(&spec).unwrap_err();
        assert!(
            matches!(error.find(), Some(CreateError::Exclude("compression", _))),
            "{option}: {error:?}"
        );
    }
}

#[test]
fn options_of_the_encryption_go_together_or_not() {
    for (option, expected) in [
        (
            "encrypt.iter-time=5",
            CreateError::NoEncryptFormat("encrypt.iter-time".into()),
        ),
        (
            "encrypt.format=aes,encrypt.cipher-alg=aes-256",
            CreateError::NotOfAes("encrypt.cipher-alg".into()),
        ),
        (
            "encryption=on,encrypt.hash-alg=sha1",
            CreateError::NotOfAes("encrypt.hash-alg".into()),
        ),
        ("encryption=on,encrypt.format=luks", CreateError::EncryptionTwice),
    ] {
        assert_eq!(refused(option), expected, "{option}");
    }
    for option in [
        "encryption=off",
        "encryption=on",
        "encryption=off,encrypt.format=luks",
        "encrypt.format=aes,encrypt.key-secret=s",
        "encrypt.format=luks,encrypt.key-secret=s,encrypt.cipher-alg=serpent-192,encrypt.cipher-mode=ctr",
    ] {
        assert!(plan(option).is_ok(), "{option}");
    }
    let error = plan("encrypt.format=luks2").unwrap_err();
    assert!(matches!(error.find(), Some(OptionError::Value { name, .. }) if name == "format"));
}

#[test]
fn a_new_image_needs_the_passphrase_it_names() {
    let with = |options: &str| plan(options).unwrap().encryption;
    let mut secrets = Secrets::new();
    let luks = with("encrypt.format=luks,encrypt.key-secret=s");
    let unknown = luks.check(&secrets).unwrap_err();
    assert!(matches!(unknown.find(), Some(SecretError::Unknown(id)) if id == "s"));
    let aes = with("encryption=on");
    let missing = aes.check(&secrets).unwrap_err();
    assert_eq!(missing.find(), Some(&SecretError::Missing("encrypt.key-secret")));
    secrets.add("s", Secret::new(b"one".to_vec())).unwrap();
    assert_eq!(luks.passphrase(&secrets).unwrap().as_bytes(), b"one");
    secrets.set_passphrase(Secret::new(b"all".to_vec()));
    aes.check(&secrets).unwrap();
    assert_eq!(aes.passphrase(&secrets).unwrap().as_bytes(), b"all");
}

#[test]
fn the_level_is_checked_for_the_type_at_hand() {
    let with = |options: &str, level: i32| {
        let mut spec = CreateSpec::new(512);
        spec.options = Options::parse(options);
        spec.compression = Some(Compression { level: Some(level) });
        Plan::new(&spec)
    };
    assert_eq!(with("", 12).unwrap().codec, Some(Codec::Deflate(12)));
    assert!(with("", 13).is_err());
    assert_eq!(
        with("compression_type=zstd", 22).unwrap().codec,
        Some(Codec::Zstd(22))
    );
    assert!(with("compression_type=zstd", 23).is_err());
    assert!(with("", 0).is_err());
}

#[test]
fn the_l1_table_has_a_limit() {
    assert!(plan_sized("cluster_size=512", 128 << 30).is_ok());
    let error = plan_sized("cluster_size=512", 129 << 30).unwrap_err();
    assert_eq!(
        error.find(),
        Some(&CreateError::TooLarge {
            size: 129 << 30,
            most: 128 << 30
        })
    );
    assert!(plan_sized("cluster_size=2M", 1 << 61).is_ok());
    assert!(plan_sized("cluster_size=2M", (1 << 61) + 512).is_err());
    assert!(plan_sized("", u64::MAX).is_err());
}

#[test]
fn names_must_fit_into_the_header_cluster() {
    let long = "b".repeat(600);
    assert!(plan(&format!("backing_file={long}")).is_ok());
    assert!(plan(&format!("cluster_size=512,backing_file={long}")).is_err());
    let longer = "b".repeat(1024);
    assert!(matches!(
        refused(&format!("backing_file={longer}")),
        CreateError::NameLen { len: 1024, .. }
    ));
}
