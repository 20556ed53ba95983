use diskmill_core::{HostOffset, StorageMut};
use diskmill_storage::Memory;

use super::*;

fn member(name: &str) -> MemberName {
    MemberName::new(name).unwrap()
}

/// A header with a changed byte range and the checksum put right.
fn forged(name: &str, len: u64, at: usize, bytes: &[u8]) -> Vec<u8> {
    let mut block = pack::header(&member(name), len, 0).unwrap().to_vec();
    block[at..at + bytes.len()].copy_from_slice(bytes);
    block[148..156].copy_from_slice(b"        ");
    let sum: u64 = block.iter().map(|byte| u64::from(*byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    block
}

fn padded(bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

fn archive(parts: &[Vec<u8>]) -> diskmill_core::Result<Archive> {
    let memory = Memory::new();
    memory.write_at(HostOffset::ZERO, &parts.concat()).unwrap();
    Archive::read(&memory)
}

fn message(result: diskmill_core::Result<Archive>) -> String {
    let error = result.unwrap_err();
    error
        .find::<ArchiveError>()
        .expect("an archive's error")
        .to_string()
}

fn pax(key: &str, value: &str) -> Vec<u8> {
    let mut len = key.len() + value.len() + 3;
    while format!("{len} {key}={value}\n").len() != len {
        len += 1;
    }
    let record = format!("{len} {key}={value}\n");
    [
        forged("pax", record.len() as u64, 156, b"x"),
        padded(record.as_bytes()),
    ]
    .concat()
}

#[test]
fn members_are_found_where_they_are() {
    let parts = [
        pack::header(&member("a.ovf"), 3, 7).unwrap().to_vec(),
        padded(b"abc"),
        forged("dir", 0, 156, b"5"),
        forged("long", 14, 156, b"L"),
        padded(b"./long/b.vmdk\0"),
        pack::header(&member("short"), 600, 7).unwrap().to_vec(),
        vec![1; 1024],
        pax("path", "c.mf"),
        pack::header(&member("x"), 1, 7).unwrap().to_vec(),
        padded(b"c"),
    ];
    let found = archive(&parts).unwrap();
    let found: Vec<_> = found
        .members()
        .iter()
        .map(|member| (member.name.as_str(), member.start.get(), member.len))
        .collect();
    assert_eq!(
        found,
        [("a.ovf", 512, 3), ("long/b.vmdk", 3072, 600), ("c.mf", 5632, 1)]
    );
}

#[test]
fn sizes_beyond_octal_digits_are_binary() {
    let block = pack::header(&member("big"), 9 << 30, 0).unwrap();
    assert_eq!(block[124..136], [0x80, 0, 0, 0, 0, 0, 0, 2, 0x40, 0, 0, 0]);
    let error = message(archive(&[block.to_vec()]));
    assert_eq!(
        error,
        format!(
            "member 'big' has {} bytes from offset 512, but the archive ends at 512",
            9u64 << 30
        )
    );
}

#[test]
fn archives_that_lie_are_refused() {
    let plain = |name: &str| pack::header(&member(name), 0, 0).unwrap().to_vec();
    let mut broken = plain("a");
    broken[0] = b'b';
    for (parts, expected) in [
        (vec![broken], "the tar header has checksum"),
        (vec![plain("a"), plain("./a")], "member 'a' is there twice"),
        (
            vec![forged("a", 0, 0, b"../b\0")],
            "the name of a member is not usable",
        ),
        (
            vec![forged("a", 0, 0, b"/etc/b\0")],
            "the name of a member is not usable",
        ),
        (
            vec![forged("a", 0, 156, b"1")],
            "member 'a' is a hard link, must be a plain file",
        ),
        (
            vec![forged("a", 0, 156, b"2")],
            "member 'a' is a symbolic link, must be a plain file",
        ),
        (
            vec![forged("a", 0, 156, b"3")],
            "member 'a' is a device, must be a plain file",
        ),
        (
            vec![forged("a", 0, 156, b"S")],
            "member 'a' is a sparse file, must be a plain file",
        ),
        (
            vec![forged("a", 0, 124, &[0xff; 12])],
            "the tar header's field size is no number below 2^63",
        ),
        (
            vec![forged("a", 0, 124, b"99999999999\0")],
            "the tar header's field size is no number below 2^63",
        ),
        (
            vec![forged("a", 1 << 30, 156, b"L")],
            "member 'a' has 1073741824 bytes",
        ),
        (
            vec![pax("size", "9223372036854775808"), plain("a")],
            "the tar header's field size is no number below 2^63",
        ),
        (
            vec![pax("path", "a/../../b"), plain("a")],
            "the name of a member is not usable",
        ),
        (
            vec![pax("GNU.sparse.major", "1"), plain("a")],
            "member '' is a sparse file, must be a plain file",
        ),
        (
            vec![forged("a", 8, 156, b"x"), padded(b"99 a=b\n\n")],
            "a pax record is malformed",
        ),
        (
            vec![forged("a", 70_000, 156, b"x"), padded(&[0; 70_000])],
            "the tar record of type 'x' has 70000 bytes, must be at most 65536",
        ),
    ] {
        let found = message(archive(&parts));
        assert!(found.starts_with(expected), "{found}");
    }
}

#[test]
fn what_is_composed_is_understood() {
    let mut machine = Machine::new("a <machine> & \"more\"", Profile::Esxi);
    machine.cpus = 3;
    machine.memory_mib = 2048;
    machine.firmware = Firmware::Efi;
    machine.os = Os::by_name("debian64").unwrap();
    let disks: Vec<_> = (0..9)
        .map(|index| PackedDisk::new(member(&format!("a disk {index}.vmdk")), (index + 1) << 30))
        .collect();
    let text = descriptor(&machine, Profile::Esxi, &disks).unwrap();
    let envelope = Envelope::parse(text.as_bytes()).unwrap();
    assert_eq!(envelope.version, Version::V1);
    assert_eq!(envelope.files.len(), 9);
    assert_eq!(envelope.files[8].name.as_str(), "a disk 8.vmdk");
    assert_eq!(envelope.disks[8].capacity, 9 << 30);
    assert_eq!(envelope.disks[8].file, Some(8));
    assert_eq!(envelope.networks, ["VM Network"]);
    let system = &envelope.systems[0];
    assert_eq!(system.name.as_deref(), Some("a <machine> & \"more\""));
    assert_eq!((system.cpus(), system.memory()), (Some(3), Some(2 << 30)));
    assert_eq!(
        (system.os, system.os_vmware.as_deref()),
        (Some(96), Some("debian10_64Guest"))
    );
    assert_eq!(system.hardware.as_deref(), Some("vmx-13"));
    assert_eq!(system.disks().count(), 9);
    let units: Vec<_> = system
        .items
        .iter()
        .filter(|item| item.resource_type == 17)
        .map(|item| item.address.as_deref().unwrap())
        .collect();
    assert_eq!(
        units,
        ["0", "1", "2", "3", "4", "5", "6", "8", "9"],
        "unit 7 is the controller's own"
    );
}

const HEAD: &str = "<Envelope xmlns='http://schemas.dmtf.org/ovf/envelope/1' xmlns:ovf='http://schemas.dmtf.org/ovf/envelope/1'>";

fn refused(body: &str) -> String {
    let text = format!("{HEAD}{body}</Envelope>");
    Envelope::parse(text.as_bytes()).unwrap_err().to_string()
}

#[test]
fn descriptors_that_lie_are_refused() {
    let file = "<References><File ovf:id='f' ovf:href='f.vmdk'/></References>";
    let disk = |attributes: &str| {
        refused(&format!(
            "{file}<DiskSection><Disk ovf:diskId='d' {attributes}/></DiskSection>"
        ))
    };
    for (found, expected) in [
        (
            refused("<References><File ovf:id='f' ovf:href='../f'/></References>"),
            "file 'f' is not in the package",
        ),
        (
            refused("<References><File ovf:id='f' ovf:href='http://h/f'/></References>"),
            "file 'f' is not in the package",
        ),
        (
            refused("<References><File ovf:id='f'/></References>"),
            "File has no href",
        ),
        (
            refused(
                "<References><File ovf:id='f' ovf:href='a'/><File ovf:id='f' ovf:href='b'/></References>",
            ),
            "File 'f' is there twice",
        ),
        (
            refused(
                "<References><File ovf:id='f' ovf:href='a'/><File ovf:id='g' ovf:href='./a'/></References>",
            ),
            "the reference to 'a' is there twice",
        ),
        (
            refused("<References><File ovf:id='f' ovf:href='a' ovf:compression='lzma'/></References>"),
            "File 'f' has compression 'lzma', must be gzip or identity",
        ),
        (
            refused("<References><File ovf:id='f' ovf:href='a' ovf:chunkSize='0'/></References>"),
            "File 'f' has chunkSize '0', must be a number of bytes",
        ),
        (
            refused("<References><File ovf:id='f' ovf:href='a' ovf:size='-1'/></References>"),
            "File 'f' has size '-1', must be a number of bytes",
        ),
        (
            disk("ovf:capacity='1' ovf:fileRef='g'"),
            "disk 'd' refers to file 'g', which is not among the references",
        ),
        (disk(""), "Disk has no capacity"),
        (
            disk("ovf:capacity='0'"),
            "Disk 'd' has capacity '0', must be a number of units that make 1 to 2^63 bytes",
        ),
        (
            disk("ovf:capacity='${size}'"),
            "Disk 'd' has capacity '${size}', must be a number: properties are not supported",
        ),
        (
            disk("ovf:capacity='16' ovf:capacityAllocationUnits='byte * 2^60'"),
            "Disk 'd' has capacity '16', must be",
        ),
        (
            disk("ovf:capacity='1' ovf:capacityAllocationUnits='byte * 2^70'"),
            "Disk 'd' has capacityAllocationUnits 'byte * 2^70', must be",
        ),
        (refused(&"<a>".repeat(70)), "the descriptor is no XML"),
        (
            refused(&format!("{}{}", "<a>".repeat(70), "</a>".repeat(70))),
            "elements are nested deeper than 64",
        ),
        (
            refused(&"<a/>".repeat(100_001)),
            "the descriptor is no XML that is accepted: nodes limit",
        ),
        (
            refused(&format!("<a b='{}'/>", "x".repeat(70_000))),
            "attribute 'b' has 70000 bytes",
        ),
    ] {
        assert!(found.starts_with(expected), "{found}");
    }
}

#[test]
fn documents_with_entities_or_another_root_are_refused() {
    for (text, expected) in [
        (
            "<!DOCTYPE a [<!ENTITY b 'c'>]><Envelope/>",
            "the descriptor is no XML that is accepted",
        ),
        ("<Envelope/>", "the root element is 'Envelope' of namespace ''"),
        (
            "<Domain xmlns='http://schemas.dmtf.org/ovf/envelope/1'/>",
            "the root element is 'Domain'",
        ),
        ("\u{feff}", "the descriptor is no XML that is accepted"),
    ] {
        let found = Envelope::parse(text.as_bytes()).unwrap_err().to_string();
        assert!(found.starts_with(expected), "{found}");
    }
    assert_eq!(Envelope::parse(b"\xff\xfe<").unwrap_err(), EnvelopeError::NotText);
}

#[test]
fn the_old_dialect_is_understood() {
    let text = r#"<?xml version="1.0"?>
<ovf:Envelope xmlns:ovf="http://www.vmware.com/schema/ovf/1/envelope" xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance"
  xmlns:rasd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData">
 <ovf:References><ovf:File ovf:href="./d.vmdk" ovf:id="file1" ovf:size="10"/></ovf:References>
 <ovf:Section xsi:type="ovf:DiskSection_Type"><Info/>
  <ovf:Disk ovf:diskId="d1" ovf:fileRef="file1" ovf:capacity="2" ovf:capacityAllocationUnits="GB" ovf:format="x"/>
 </ovf:Section>
 <ovf:Section xsi:type="ovf:NetworkSection_Type"><ovf:Network ovf:name="bridged"/></ovf:Section>
 <ovf:Content ovf:id="old" xsi:type="ovf:VirtualSystem_Type">
  <ovf:Section xsi:type="ovf:OperatingSystemSection_Type" ovf:id="80"><ovf:Description>Old Linux</ovf:Description></ovf:Section>
  <ovf:Section xsi:type="ovf:VirtualHardwareSection_Type">
   <ovf:Item><rasd:Caption>1 CPU</rasd:Caption><rasd:InstanceId>1</rasd:InstanceId><rasd:ResourceType>3</rasd:ResourceType><rasd:VirtualQuantity>1</rasd:VirtualQuantity></ovf:Item>
   <ovf:Item><rasd:Caption>512 MB</rasd:Caption><rasd:AllocationUnits>MegaBytes</rasd:AllocationUnits><rasd:ResourceType>4</rasd:ResourceType><rasd:VirtualQuantity>512</rasd:VirtualQuantity></ovf:Item>
   <ovf:Item><rasd:HostResource>disk/d1</rasd:HostResource><rasd:ResourceType>17</rasd:ResourceType></ovf:Item>
  </ovf:Section>
 </ovf:Content>
</ovf:Envelope>"#;
    let envelope = Envelope::parse(text.as_bytes()).unwrap();
    assert_eq!(envelope.version, Version::V0_9);
    assert_eq!(envelope.disks[0].capacity, 2 << 30);
    assert_eq!(envelope.files[0].name.as_str(), "d.vmdk");
    assert_eq!(envelope.networks, ["bridged"]);
    let system = &envelope.systems[0];
    assert_eq!(
        (system.id.as_str(), system.os, system.os_name.as_deref()),
        ("old", Some(80), Some("Old Linux"))
    );
    assert_eq!((system.cpus(), system.memory()), (Some(1), Some(512 << 20)));
    assert_eq!(system.disks().collect::<Vec<_>>(), ["d1"]);
}
