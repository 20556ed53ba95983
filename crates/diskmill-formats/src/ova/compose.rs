//! The descriptor of a package to be written.
//!
//! It says no more than importers need. The children of an `Item` are in alphabetical order and capacities are in
//! bytes: importers insist on the one, and VirtualBox takes the other for granted.

use std::fmt::Write as _;

use diskmill_core::{Error, ErrorKind, Result};

use super::machine::{Firmware, Machine, Profile};
use super::name::MemberName;

/// A disk of the package.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PackedDisk {
    /// The file that holds it.
    pub file: MemberName,
    /// That file's bytes.
    pub len: u64,
    /// The size of the disk in bytes.
    pub capacity: u64,
    /// Bytes of it that hold data.
    pub populated: u64,
}

impl PackedDisk {
    /// A disk of `capacity` bytes in `file`, nothing of which is written yet.
    pub fn new(file: MemberName, capacity: u64) -> Self {
        Self {
            file,
            len: 0,
            capacity,
            populated: 0,
        }
    }
}

const ENVELOPE: &str = "http://schemas.dmtf.org/ovf/envelope/1";
const CIM: &str = "http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2";
/// What ESXi compares with, to the letter.
pub(super) const STREAM_OPTIMIZED: &str =
    "http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized";

/// The text of the descriptor.
pub fn descriptor(machine: &Machine, profile: Profile, disks: &[PackedDisk]) -> Result<String> {
    if disks.len() > machine.controller.most() {
        let text = format!(
            "{} disks on one controller, which takes {} at most",
            disks.len(),
            machine.controller.most()
        );
        return Err(Error::new(ErrorKind::Usage, text));
    }
    let mut xml = Xml::default();
    xml.open(
        "Envelope",
        &[
            ("xmlns", ENVELOPE),
            ("xmlns:ovf", ENVELOPE),
            ("xmlns:rasd", &format!("{CIM}/CIM_ResourceAllocationSettingData")),
            ("xmlns:vmw", "http://www.vmware.com/schema/ovf"),
            ("xmlns:vssd", &format!("{CIM}/CIM_VirtualSystemSettingData")),
        ],
    );
    references(&mut xml, disks);
    disk_section(&mut xml, disks);
    if !machine.networks.is_empty() {
        xml.open("NetworkSection", &[]);
        xml.text("Info", "The networks");
        let mut named: Vec<&String> = Vec::new();
        for network in &machine.networks {
            if !named.contains(&network) {
                named.push(network);
                xml.open("Network", &[("ovf:name", network)]);
                xml.text("Description", &format!("The network {network}"));
                xml.close("Network");
            }
        }
        xml.close("NetworkSection");
    }
    xml.open("VirtualSystem", &[("ovf:id", &machine.name)]);
    xml.text("Info", "A virtual machine");
    xml.text("Name", &machine.name);
    let os = machine.os;
    xml.open(
        "OperatingSystemSection",
        &[("ovf:id", &os.cim.to_string()), ("vmw:osType", os.vmware)],
    );
    xml.text("Info", "The guest operating system");
    xml.text("Description", os.description);
    xml.close("OperatingSystemSection");
    hardware(&mut xml, machine, profile, disks);
    xml.close("VirtualSystem");
    xml.close("Envelope");
    Ok(xml.0)
}

fn references(xml: &mut Xml, disks: &[PackedDisk]) {
    xml.open("References", &[]);
    for (number, disk) in (1..).zip(disks) {
        xml.empty(
            "File",
            &[
                ("ovf:href", &href(&disk.file)),
                ("ovf:id", &format!("file{number}")),
                ("ovf:size", &disk.len.to_string()),
            ],
        );
    }
    xml.close("References");
}

fn disk_section(xml: &mut Xml, disks: &[PackedDisk]) {
    xml.open("DiskSection", &[]);
    xml.text("Info", "The virtual disks");
    for (number, disk) in (1..).zip(disks) {
        xml.empty(
            "Disk",
            &[
                ("ovf:capacity", &disk.capacity.to_string()),
                ("ovf:capacityAllocationUnits", "byte"),
                ("ovf:diskId", &format!("vmdisk{number}")),
                ("ovf:fileRef", &format!("file{number}")),
                ("ovf:format", STREAM_OPTIMIZED),
                ("ovf:populatedSize", &disk.populated.to_string()),
            ],
        );
    }
    xml.close("DiskSection");
}

fn hardware(xml: &mut Xml, machine: &Machine, profile: Profile, disks: &[PackedDisk]) {
    /// Identifiers: 1 and 2 are processors and memory.
    const CONTROLLER: usize = 3;
    xml.open("VirtualHardwareSection", &[]);
    xml.text("Info", "The virtual hardware");
    xml.open("System", &[]);
    xml.text("vssd:ElementName", "Virtual Hardware Family");
    xml.text("vssd:InstanceID", "0");
    xml.text("vssd:VirtualSystemIdentifier", &machine.name);
    xml.text("vssd:VirtualSystemType", profile.hardware());
    xml.close("System");
    xml.item(&[
        ("AllocationUnits", "hertz * 10^6"),
        ("Description", "Number of virtual CPUs"),
        ("ElementName", &format!("{} virtual CPU(s)", machine.cpus)),
        ("InstanceID", "1"),
        ("ResourceType", "3"),
        ("VirtualQuantity", &machine.cpus.to_string()),
    ]);
    xml.item(&[
        ("AllocationUnits", "byte * 2^20"),
        ("Description", "Memory size"),
        ("ElementName", &format!("{} MB of memory", machine.memory_mib)),
        ("InstanceID", "2"),
        ("ResourceType", "4"),
        ("VirtualQuantity", &machine.memory_mib.to_string()),
    ]);
    let controller = machine.controller;
    xml.item(&[
        ("Address", "0"),
        ("Description", controller.title()),
        ("ElementName", &format!("{} 0", controller.title())),
        ("InstanceID", &CONTROLLER.to_string()),
        ("ResourceSubType", controller.subtype()),
        ("ResourceType", &controller.resource_type().to_string()),
    ]);
    let mut instance = CONTROLLER;
    let mut next = || {
        instance = instance.saturating_add(1);
        instance.to_string()
    };
    for index in 0..disks.len() {
        let number = index.saturating_add(1);
        xml.item(&[
            (
                "AddressOnParent",
                &controller.unit(index).unwrap_or(index).to_string(),
            ),
            ("ElementName", &format!("Hard Disk {number}")),
            ("HostResource", &format!("ovf:/disk/vmdisk{number}")),
            ("InstanceID", &next()),
            ("Parent", &CONTROLLER.to_string()),
            ("ResourceType", "17"),
        ]);
    }
    for (index, network) in machine.networks.iter().enumerate() {
        let card = profile.network_card();
        xml.item(&[
            ("AddressOnParent", &index.saturating_add(7).to_string()),
            ("AutomaticAllocation", "true"),
            ("Connection", network),
            (
                "Description",
                &format!("{card} ethernet adapter on \"{network}\""),
            ),
            (
                "ElementName",
                &format!("Network adapter {}", index.saturating_add(1)),
            ),
            ("InstanceID", &next()),
            ("ResourceSubType", card),
            ("ResourceType", "10"),
        ]);
    }
    if machine.firmware == Firmware::Efi {
        let config = [
            ("ovf:required", "false"),
            ("vmw:key", "firmware"),
            ("vmw:value", "efi"),
        ];
        xml.empty("vmw:Config", &config);
    }
    xml.close("VirtualHardwareSection");
}

/// A name as a relative reference (RFC 3986, 3.3).
fn href(name: &MemberName) -> String {
    let mut text = String::new();
    for byte in name.as_str().bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~/+,=@()".contains(&byte) {
            text.push(char::from(byte));
        } else {
            let _ = write!(text, "%{byte:02X}");
        }
    }
    text
}

/// XML being written, two blanks a level.
struct Xml(String, usize);

impl Default for Xml {
    fn default() -> Self {
        Self("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n".to_owned(), 0)
    }
}

impl Xml {
    fn tag(&mut self, name: &str, attributes: &[(&str, &str)]) {
        self.0.extend(std::iter::repeat_n("  ", self.1));
        self.0.push('<');
        self.0.push_str(name);
        for (name, value) in attributes {
            let _ = write!(self.0, " {name}=\"{}\"", escaped(value));
        }
    }

    fn open(&mut self, name: &str, attributes: &[(&str, &str)]) {
        self.tag(name, attributes);
        self.0.push_str(">\n");
        self.1 = self.1.saturating_add(1);
    }

    fn empty(&mut self, name: &str, attributes: &[(&str, &str)]) {
        self.tag(name, attributes);
        self.0.push_str("/>\n");
    }

    fn close(&mut self, name: &str) {
        self.1 = self.1.saturating_sub(1);
        self.0.extend(std::iter::repeat_n("  ", self.1));
        let _ = writeln!(self.0, "</{name}>");
    }

    fn text(&mut self, name: &str, text: &str) {
        self.tag(name, &[]);
        let _ = writeln!(self.0, ">{}</{name}>", escaped(text));
    }

    fn item(&mut self, children: &[(&str, &str)]) {
        self.open("Item", &[]);
        for (name, text) in children {
            self.text(&format!("rasd:{name}"), text);
        }
        self.close("Item");
    }
}

/// Text as it may stand between tags and in attributes. Characters that XML cannot have at all are left out.
fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for char in text.chars() {
        match char {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\t' | '\n' | '\r' => escaped.push(' '),
            '\u{fffe}' | '\u{ffff}' => {}
            char if char.is_control() => {}
            char => escaped.push(char),
        }
    }
    escaped
}
