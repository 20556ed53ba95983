use super::*;

const TEXT: &str = "# Disk DescriptorFile\nversion=1\nCID=9cee52b0\nparentCID=ffffffff\ncreateType=\"twoGbMaxExtentFlat\"\n\n\
    # Extent description\nRW 4194304 FLAT \"a-f001.vmdk\" 0\nRDONLY 100 FLAT \"a-f002.vmdk\" 5\nRW 8 ZERO\n\n\
    # The Disk Data Base\n#DDB\n\nddb.adapterType = \"ide\"\nddb.geometry.heads = \"16\"\n";

fn parse(text: impl AsRef<[u8]>) -> Result<Descriptor, DescriptorError> {
    Descriptor::parse(text.as_ref(), false)
}

fn with(from: &str, to: &str) -> Result<Descriptor, DescriptorError> {
    assert!(TEXT.contains(from));
    parse(TEXT.replace(from, to))
}

#[test]
fn every_line_counts_once() {
    let found = parse(TEXT).unwrap();
    assert_eq!(
        (found.cid, found.parent_cid, found.version),
        (0x9cee_52b0, NO_PARENT, 1)
    );
    assert_eq!(found.kind, "twoGbMaxExtentFlat");
    assert_eq!(found.ddb("adaptertype"), Some("ide"));
    let parts: Vec<_> = found
        .extents
        .iter()
        .map(|part| {
            (
                part.access,
                part.sectors,
                part.kind,
                part.name.as_str(),
                part.offset,
            )
        })
        .collect();
    assert_eq!(
        parts,
        [
            (Access::ReadWrite, 4_194_304, ExtentKind::Flat, "a-f001.vmdk", 0),
            (Access::ReadOnly, 100, ExtentKind::Flat, "a-f002.vmdk", 5),
            (Access::ReadWrite, 8, ExtentKind::Zero, "", 0),
        ]
    );
    assert_eq!(found.disk_len(), (4_194_304 + 108) * 512);
}

#[test]
fn a_blank_line_a_comment_and_case_change_nothing() {
    let found = with("RW 4194304 FLAT", "\n\n# RW 7 FLAT \"x\" 0\n  rw 4194304 flat").unwrap();
    assert_eq!(found.extents, parse(TEXT).unwrap().extents);
    let found = with("CID=9cee52b0", "# CID=1\nCid = 9CEE52B0\r").unwrap();
    assert_eq!(found.cid, 0x9cee_52b0);
    assert_eq!(
        with("twoGbMaxExtentFlat", "2gbMaxExtentflat").unwrap().kind,
        "twoGbMaxExtentFlat"
    );
}

#[test]
fn keys_are_not_found_in_other_text() {
    let hint = "parentFileNameHint=\"CID=12345678 createType=\"\nCID=9cee52b0";
    let found = with("CID=9cee52b0", hint).unwrap();
    assert_eq!(found.cid, 0x9cee_52b0);
    assert_eq!(found.parent.as_deref(), Some("CID=12345678 createType="));
}

#[test]
fn what_is_wrong_is_named_with_its_line() {
    let text = |from, to| with(from, to).unwrap_err().to_string();
    assert_eq!(
        text("CID=9cee52b0", "CID=xyz"),
        "line 3: CID must be 1 to 8 hexadecimal digits"
    );
    assert_eq!(text("CID=9cee52b0\n", ""), "the descriptor has no CID");
    assert_eq!(
        text("version=1", "version=1\nversion=1"),
        "line 3: version is there for the second time"
    );
    assert_eq!(
        text("version=1", "version=4"),
        "the descriptor's version is 4, must be 1 to 3"
    );
    assert_eq!(
        text("\"twoGbMaxExtentFlat\"", "\"twoGbMaxExtentFlat"),
        "line 5: createType must be text in quotes"
    );
    assert_eq!(
        text("twoGbMaxExtentFlat", "fullDevice"),
        "unsupported image type 'fullDevice'"
    );
    for (from, to) in [
        ("RW 4194304", "RW -1"),
        ("RW 4194304", "RW 0"),
        ("RW 4194304", "RW 99999999999999999999"),
        ("RW 4194304", "RW 18014398509481984"),
        ("FLAT \"a-f001.vmdk\" 0", "FLAT a-f001.vmdk 0"),
        ("FLAT \"a-f001.vmdk\" 0", "FLAT \"\" 0"),
        ("FLAT \"a-f001.vmdk\" 0", "FLAT \"a-f001.vmdk 0"),
        ("FLAT \"a-f001.vmdk\" 0", "FLAT \"a\" x"),
        ("FLAT \"a-f001.vmdk\" 0", "SPARSE \"a\" 5"),
        ("FLAT \"a-f001.vmdk\" 0", "VMFSRDM \"a\""),
    ] {
        assert!(with(from, to).is_err(), "{to}");
    }
    assert_eq!(parse("version=1\0x").unwrap_err(), DescriptorError::Nul);
    assert!(parse(format!("{TEXT}\0\0\0")).is_ok());
    let many = "RW 1 ZERO\n".repeat(5000);
    assert_eq!(
        with("RW 8 ZERO\n", &many).unwrap_err(),
        DescriptorError::TooManyExtents
    );
}

#[test]
fn names_are_decoded_as_the_descriptor_says() {
    let with_bytes = |encoding: &str, name: &[u8]| {
        let text = TEXT.replace("version=1\n", &format!("version=1\n{encoding}"));
        let (head, tail) = text.split_once("a-f001").unwrap();
        parse([head.as_bytes(), name, tail.as_bytes()].concat()).map(|found| found.extents[0].name.clone())
    };
    assert_eq!(with_bytes("", "größe".as_bytes()).unwrap(), "größe.vmdk");
    assert_eq!(
        with_bytes("encoding=\"windows-1252\"\n", b"gr\xf6\xdfe\x80").unwrap(),
        "größe€.vmdk"
    );
    assert!(with_bytes("", b"gr\xf6").is_err());
    assert!(with_bytes("encoding=\"GBK\"\n", b"\xc4\xe3").is_err());
    assert_eq!(with_bytes("encoding=\"GBK\"\n", b"plain").unwrap(), "plain.vmdk");
    assert!(with_bytes("encoding=\"windows-1252\"\n", b"\x81").is_err());
}

#[test]
fn changes_touch_one_line() {
    let text = TEXT.replace('\n', "\r\n");
    let changed = with_key(text.as_bytes(), "CID", Some("00000001"), "version");
    assert_eq!(changed, text.replace("CID=9cee52b0", "CID=00000001").into_bytes());
    let added = with_key(TEXT.as_bytes(), "parentFileNameHint", Some("\"p\""), "createType");
    let wanted = TEXT.replace("Flat\"\n\n", "Flat\"\nparentFileNameHint=\"p\"\n\n");
    assert_eq!(String::from_utf8(added.clone()).unwrap(), wanted);
    assert_eq!(
        with_key(&added, "parentFileNameHint", None, "createType"),
        TEXT.as_bytes()
    );
    let longer = with_extent_len(text.as_bytes(), 1, 777);
    assert_eq!(longer, text.replace("RDONLY 100 ", "RDONLY 777 ").into_bytes());
    let zero = with_extent_len(TEXT.as_bytes(), 2, 9);
    assert_eq!(zero, TEXT.replace("RW 8 ZERO", "RW 9 ZERO").into_bytes());
}
