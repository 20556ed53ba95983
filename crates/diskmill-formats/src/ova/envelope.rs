//! The descriptor of a package: its files, disks, networks and machines (DSP0243, 7 to 9).
//!
//! Only what a disk tool needs is kept. Documents with a DOCTYPE, and so any entity, are refused.

use std::borrow::Cow;

use roxmltree::{Document, Node, ParsingOptions};

use super::name::{MemberName, NameError};
use super::units::{bytes_of, number};

/// Bytes of a descriptor that are read.
pub const MAX_LEN: u64 = 16 << 20;

/// Elements, texts and comments of a descriptor.
const NODES: u32 = 100_000;

/// Elements within elements.
const DEPTH: usize = 64;

/// Bytes of an attribute.
const ATTRIBUTE: usize = 64 << 10;

/// What is wrong with a descriptor.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EnvelopeError {
    /// Too long to be one.
    #[error("the descriptor has {0} bytes, must be at most {MAX_LEN}")]
    TooLong(u64),
    /// Not UTF-8.
    #[error("the descriptor is not UTF-8, nor UTF-16 or ISO-8859-1 that says so")]
    NotText,
    /// Not well-formed, or more of it than is allowed.
    #[error("the descriptor is no XML that is accepted: {0}")]
    Xml(String),
    /// Elements nested deeper than in any real descriptor.
    #[error("elements are nested deeper than {DEPTH}")]
    TooDeep,
    /// An attribute longer than in any real descriptor.
    #[error("attribute '{name}' has {len} bytes, must have at most {ATTRIBUTE}")]
    Attribute {
        /// Its name.
        name: String,
        /// Its length.
        len: usize,
    },
    /// Not an envelope of a version that is known.
    #[error(
        "the root element is '{name}' of namespace '{namespace}', must be an OVF envelope of version 0.9, 1 or 2"
    )]
    NotAnEnvelope {
        /// Its local name.
        name: String,
        /// Its namespace.
        namespace: String,
    },
    /// A part that must be there is not.
    #[error("{element} has no {what}")]
    Missing {
        /// Where it should be.
        element: &'static str,
        /// What is missing.
        what: &'static str,
    },
    /// A value that is not what it must be.
    #[error("{element} '{id}' has {attribute} '{value}', must be {expected}")]
    Value {
        /// The element.
        element: &'static str,
        /// Its identifier.
        id: String,
        /// The attribute.
        attribute: &'static str,
        /// What it is.
        value: String,
        /// What it must be.
        expected: &'static str,
    },
    /// A file that is not one of the package.
    #[error("file '{id}' is not in the package")]
    Href {
        /// Its identifier.
        id: String,
        /// Why.
        #[source]
        source: NameError,
    },
    /// The same identifier or file twice.
    #[error("{element} '{id}' is there twice")]
    Twice {
        /// What.
        element: &'static str,
        /// Its identifier.
        id: String,
    },
    /// A disk refers to a file that is not among the references.
    #[error("disk '{disk}' refers to file '{file}', which is not among the references")]
    NoFile {
        /// The disk.
        disk: String,
        /// The file.
        file: String,
    },
}

/// Which OVF it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Version {
    /// 0.9, before the standard.
    V0_9,
    /// 1.0 and 1.1.
    #[default]
    V1,
    /// 2.0 and 2.1.
    V2,
}

impl Version {
    const ALL: [(Self, &'static str, &'static str); 3] = [
        (Self::V0_9, "0.9", "http://www.vmware.com/schema/ovf/1/envelope"),
        (Self::V1, "1.x", "http://schemas.dmtf.org/ovf/envelope/1"),
        (Self::V2, "2.x", "http://schemas.dmtf.org/ovf/envelope/2"),
    ];

    /// What people call it.
    pub fn name(self) -> &'static str {
        Self::ALL
            .iter()
            .find(|known| known.0 == self)
            .map_or("", |known| known.1)
    }
}

/// How a file of a package is stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Compression {
    /// As it is.
    #[default]
    Identity,
    /// By gzip.
    Gzip,
}

/// A file of the package.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct FileEntry {
    /// What disks call it.
    pub id: String,
    /// Its name in the package.
    pub name: MemberName,
    /// Its bytes as they are stored, if it says.
    pub size: Option<u64>,
    /// How it is stored.
    pub compression: Compression,
    /// The bytes of each of its chunks, if it is stored in several.
    pub chunk: Option<u64>,
}

impl FileEntry {
    /// The name of a chunk: nine digits behind the file's (DSP0243, 7.1).
    pub fn chunk_name(&self, index: u64) -> String {
        format!("{}.{index:09}", self.name)
    }
}

/// A disk of the package.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DiskEntry {
    /// What machines call it.
    pub id: String,
    /// The file that holds it, by its place in [`Envelope::files`]; none for a disk that is to be made empty.
    pub file: Option<usize>,
    /// The size of the disk in bytes.
    pub capacity: u64,
    /// Bytes of it that hold data, if it says.
    pub populated: Option<u64>,
    /// The URI of its format, if it says.
    pub format: Option<String>,
    /// The disk it is a difference to.
    pub parent: Option<String>,
}

impl DiskEntry {
    /// Whether it is a CD or DVD and no hard disk.
    pub fn is_optical(&self) -> bool {
        is_optical(self.format.as_deref())
    }
}

/// Whether a format is that of CDs: the standard it names is ISO 9660's twin.
fn is_optical(format: Option<&str>) -> bool {
    format.is_some_and(|uri| uri.to_ascii_lowercase().contains("/ecma-119"))
}

/// A virtual device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Item {
    /// Its kind, as CIM numbers them: 3 CPU, 4 memory, 5 IDE, 6 SCSI, 10 network, 17 disk, 20 other storage.
    pub resource_type: u16,
    /// Which sort of that kind: `lsilogic`, `E1000`, `AHCI`.
    pub subtype: Option<String>,
    /// Its name for people.
    pub name: Option<String>,
    /// What others call it.
    pub instance: Option<String>,
    /// The device it hangs on.
    pub parent: Option<String>,
    /// Where on it.
    pub address: Option<String>,
    /// How many, in `units`.
    pub quantity: Option<u64>,
    /// What `quantity` counts.
    pub units: Option<String>,
    /// The networks it is connected to.
    pub connections: Vec<String>,
    /// The disks behind it, by identifier.
    pub disks: Vec<String>,
}

/// A machine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct System {
    /// Its identifier.
    pub id: String,
    /// Its name for people.
    pub name: Option<String>,
    /// The number CIM gives its operating system.
    pub os: Option<u16>,
    /// The operating system in words.
    pub os_name: Option<String>,
    /// The operating system as VMware calls it.
    pub os_vmware: Option<String>,
    /// The hardware it expects, `vmx-13` say; several are separated by blanks.
    pub hardware: Option<String>,
    /// Its devices.
    pub items: Vec<Item>,
}

impl System {
    fn quantity(&self, resource_type: u16) -> Option<&Item> {
        self.items.iter().find(|item| item.resource_type == resource_type)
    }

    /// Its processors.
    pub fn cpus(&self) -> Option<u64> {
        self.quantity(3)?.quantity
    }

    /// Its memory in bytes.
    pub fn memory(&self) -> Option<u64> {
        let item = self.quantity(4)?;
        let unit = item.units.as_deref().map_or(Some(1 << 20), bytes_of)?;
        item.quantity?.checked_mul(unit)
    }

    /// The disks that hang on it, by identifier, in the order of its devices.
    pub fn disks(&self) -> impl Iterator<Item = &str> {
        self.items
            .iter()
            .flat_map(|item| item.disks.iter().map(String::as_str))
    }
}

/// A descriptor, understood.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Envelope {
    /// Which OVF it is.
    pub version: Version,
    /// The files of the package beside the descriptor.
    pub files: Vec<FileEntry>,
    /// The disks.
    pub disks: Vec<DiskEntry>,
    /// The networks, by name.
    pub networks: Vec<String>,
    /// The machines, those of collections too.
    pub systems: Vec<System>,
}

impl Envelope {
    /// Reads the text of a descriptor.
    pub fn parse(bytes: &[u8]) -> Result<Self, EnvelopeError> {
        if bytes.len() as u64 > MAX_LEN {
            return Err(EnvelopeError::TooLong(bytes.len() as u64));
        }
        let text = text_of(bytes).ok_or(EnvelopeError::NotText)?;
        let text = text.as_ref();
        let options = ParsingOptions {
            allow_dtd: false,
            nodes_limit: NODES,
            ..ParsingOptions::default()
        };
        let document = Document::parse_with_options(text, options)
            .map_err(|error| EnvelopeError::Xml(error.to_string()))?;
        bounded(document.root_element())?;
        let root = document.root_element();
        let namespace = root.tag_name().namespace().unwrap_or_default();
        let version = Version::ALL
            .iter()
            .find(|known| known.2 == namespace && root.tag_name().name() == "Envelope")
            .map(|known| known.0)
            .ok_or_else(|| EnvelopeError::NotAnEnvelope {
                name: root.tag_name().name().to_owned(),
                namespace: namespace.to_owned(),
            })?;
        let ovf = Ovf(namespace);
        let mut envelope = Self {
            version,
            ..Self::default()
        };
        for references in ovf.children(root, "References") {
            for file in ovf.children(references, "File") {
                envelope.add_file(&ovf, file)?;
            }
        }
        for section in ovf.children(root, "DiskSection") {
            for disk in ovf.children(section, "Disk") {
                envelope.add_disk(&ovf, disk)?;
            }
        }
        for section in ovf.children(root, "NetworkSection") {
            let names = ovf
                .children(section, "Network")
                .filter_map(|network| ovf.attribute(network, "name"));
            envelope.networks.extend(names.map(str::to_owned));
        }
        let machines = root.descendants().filter(|node| ovf.is(*node, "VirtualSystem"));
        for machine in machines {
            let system = system(&ovf, machine);
            envelope.systems.push(system);
        }
        Ok(envelope)
    }

    fn add_file(&mut self, ovf: &Ovf<'_>, node: Node<'_, '_>) -> Result<(), EnvelopeError> {
        let missing = |what| EnvelopeError::Missing {
            element: "File",
            what,
        };
        let id = ovf.attribute(node, "id").ok_or_else(|| missing("id"))?.to_owned();
        let href = ovf.attribute(node, "href").ok_or_else(|| missing("href"))?;
        let name = MemberName::from_href(href).map_err(|source| EnvelopeError::Href {
            id: id.clone(),
            source,
        })?;
        if self.files.iter().any(|file| file.id == id) {
            return Err(EnvelopeError::Twice { element: "File", id });
        }
        if self.files.iter().any(|file| file.name == name) {
            let id = name.as_str().to_owned();
            return Err(EnvelopeError::Twice {
                element: "the reference to",
                id,
            });
        }
        let count = |attribute: &'static str, least: u64| match ovf.attribute(node, attribute) {
            None => Ok(None),
            Some(value) => match number(value.trim()).filter(|value| (least..1 << 63).contains(value)) {
                Some(value) => Ok(Some(value)),
                None => Err(EnvelopeError::Value {
                    element: "File",
                    id: id.clone(),
                    attribute,
                    value: value.to_owned(),
                    expected: "a number of bytes",
                }),
            },
        };
        let compression = match ovf.attribute(node, "compression") {
            None | Some("" | "identity") => Compression::Identity,
            Some("gzip") => Compression::Gzip,
            Some(value) => {
                return Err(EnvelopeError::Value {
                    element: "File",
                    id: id.clone(),
                    attribute: "compression",
                    value: value.to_owned(),
                    expected: "gzip or identity",
                });
            }
        };
        let size = count("size", 0)?;
        let chunk = count("chunkSize", 1)?;
        self.files.push(FileEntry {
            id,
            name,
            size,
            compression,
            chunk,
        });
        Ok(())
    }

    fn add_disk(&mut self, ovf: &Ovf<'_>, node: Node<'_, '_>) -> Result<(), EnvelopeError> {
        let missing = |what| EnvelopeError::Missing {
            element: "Disk",
            what,
        };
        let id = ovf
            .attribute(node, "diskId")
            .ok_or_else(|| missing("diskId"))?
            .to_owned();
        if self.disks.iter().any(|disk| disk.id == id) {
            return Err(EnvelopeError::Twice { element: "Disk", id });
        }
        let file = match ovf.attribute(node, "fileRef") {
            None => None,
            Some(file) => {
                let found = self.files.iter().position(|known| known.id == file);
                Some(found.ok_or_else(|| EnvelopeError::NoFile {
                    disk: id.clone(),
                    file: file.to_owned(),
                })?)
            }
        };
        let bad = |attribute, value: &str, expected| EnvelopeError::Value {
            element: "Disk",
            id: id.clone(),
            attribute,
            value: value.to_owned(),
            expected,
        };
        let capacity = ovf
            .attribute(node, "capacity")
            .ok_or_else(|| missing("capacity"))?;
        let units = ovf.attribute(node, "capacityAllocationUnits").unwrap_or_default();
        let unit = bytes_of(units)
            .ok_or_else(|| bad("capacityAllocationUnits", units, "byte, or byte * 2^N below 2^63"))?;
        let expected = match capacity.contains("${") {
            true => "a number: properties are not supported",
            false => "a number of units that make 1 to 2^63 bytes",
        };
        let format = ovf.attribute(node, "format").map(str::to_owned);
        // VirtualBox says nothing of how large a CD is.
        let bytes = match capacity.trim() {
            "" | "0" if is_optical(format.as_deref()) => 0,
            count => number(count)
                .and_then(|count| count.checked_mul(unit))
                .filter(|bytes| (1..1 << 63).contains(bytes))
                .ok_or_else(|| bad("capacity", capacity, expected))?,
        };
        self.disks.push(DiskEntry {
            file,
            capacity: bytes,
            // A hint, and often a wrong one: not worth an error.
            populated: ovf
                .attribute(node, "populatedSize")
                .and_then(|text| number(text.trim())),
            format,
            parent: ovf.attribute(node, "parentRef").map(str::to_owned),
            id,
        });
        Ok(())
    }

    /// The disk of that identifier.
    pub fn disk(&self, id: &str) -> Option<&DiskEntry> {
        self.disks.iter().find(|disk| disk.id == id)
    }
}

/// The text of a descriptor: UTF-8 unless it starts as UTF-16 does or says that it is ISO-8859-1, as old exporters do.
/// `None` if it is nothing of that.
pub fn text_of(bytes: &[u8]) -> Option<Cow<'_, str>> {
    let wide = |read: fn([u8; 2]) -> u16| {
        let (units, rest) = bytes.as_chunks::<2>();
        let units: Vec<u16> = units.iter().skip(1).map(|unit| read(*unit)).collect();
        let text = String::from_utf16(&units).ok()?;
        (rest.is_empty() && !text.is_empty()).then_some(Cow::Owned(text))
    };
    if bytes.starts_with(&[0xff, 0xfe]) {
        return wide(u16::from_le_bytes);
    }
    if bytes.starts_with(&[0xfe, 0xff]) {
        return wide(u16::from_be_bytes);
    }
    if let Ok(text) = std::str::from_utf8(bytes) {
        return Some(Cow::Borrowed(text));
    }
    let line = bytes.split(|byte| *byte == b'>').next().unwrap_or_default();
    let said = line.to_ascii_lowercase();
    let latin = line.starts_with(b"<?xml") && said.windows(10).any(|word| word == b"iso-8859-1");
    latin.then(|| bytes.iter().copied().map(char::from).collect::<String>().into())
}

/// Finds elements and attributes of the version at hand.
struct Ovf<'a>(&'a str);

impl Ovf<'_> {
    /// Whether `node` is the element `name`, or what 0.9 writes instead: `Section` and `Content` of that type.
    fn is(&self, node: Node<'_, '_>, name: &str) -> bool {
        if !node.is_element() || node.tag_name().namespace().unwrap_or_default() != self.0 {
            return false;
        }
        if node.tag_name().name() == name {
            return true;
        }
        const INSTANCE: &str = "http://www.w3.org/2001/XMLSchema-instance";
        let typed = matches!(node.tag_name().name(), "Section" | "Content");
        typed
            && node.attribute((INSTANCE, "type")).is_some_and(|text| {
                let local = text.rsplit(':').next().unwrap_or(text);
                local.strip_suffix("_Type") == Some(name)
            })
    }

    fn children<'a, 'input: 'a>(
        &self,
        node: Node<'a, 'input>,
        name: &'static str,
    ) -> impl Iterator<Item = Node<'a, 'input>> + use<'a, 'input, '_> {
        node.children().filter(move |child| self.is(*child, name))
    }

    fn child<'a, 'input: 'a>(&self, node: Node<'a, 'input>, name: &'static str) -> Option<Node<'a, 'input>> {
        self.children(node, name).next()
    }

    /// An attribute, with the prefix that the standard wants or bare.
    fn attribute<'a>(&self, node: Node<'a, '_>, name: &str) -> Option<&'a str> {
        node.attribute((self.0, name)).or_else(|| node.attribute(name))
    }
}

/// The text of an element, without blanks around it; none if there is none.
fn text(node: Node<'_, '_>) -> Option<String> {
    node.text()
        .map(str::trim)
        .filter(|text| !text.is_empty())
        .map(str::to_owned)
}

fn system(ovf: &Ovf<'_>, node: Node<'_, '_>) -> System {
    let mut system = System {
        id: ovf.attribute(node, "id").unwrap_or_default().to_owned(),
        name: ovf.child(node, "Name").and_then(text),
        ..System::default()
    };
    if let Some(os) = ovf.child(node, "OperatingSystemSection") {
        system.os = ovf.attribute(os, "id").and_then(|id| id.trim().parse().ok());
        system.os_name = ovf.child(os, "Description").and_then(text);
        system.os_vmware = os
            .attribute(("http://www.vmware.com/schema/ovf", "osType"))
            .map(str::to_owned);
    }
    for hardware in ovf.children(node, "VirtualHardwareSection") {
        if let Some(family) = ovf.child(hardware, "System") {
            let kind = local(family, "VirtualSystemType").or_else(|| local(family, "virtualSystemType"));
            system.hardware = kind;
        }
        let items = hardware.children().filter(|child| {
            ["Item", "StorageItem", "EthernetPortItem"]
                .into_iter()
                .any(|name| ovf.is(*child, name))
        });
        system.items.extend(items.map(item));
    }
    system
}

/// The text of the child of that local name: items mix the namespaces of their CIM classes.
fn local(node: Node<'_, '_>, name: &str) -> Option<String> {
    node.children()
        .find(|child| child.is_element() && child.tag_name().name() == name)
        .and_then(text)
}

fn item(node: Node<'_, '_>) -> Item {
    let all = |name: &'static str| {
        node.children()
            .filter(move |child| child.is_element() && child.tag_name().name() == name)
            .filter_map(text)
    };
    Item {
        resource_type: local(node, "ResourceType")
            .and_then(|text| text.parse().ok())
            .unwrap_or(0),
        subtype: local(node, "ResourceSubType"),
        name: local(node, "ElementName").or_else(|| local(node, "Caption")),
        instance: local(node, "InstanceID").or_else(|| local(node, "InstanceId")),
        parent: local(node, "Parent"),
        address: local(node, "AddressOnParent"),
        quantity: local(node, "VirtualQuantity").and_then(|text| number(&text)),
        units: local(node, "AllocationUnits"),
        connections: all("Connection").collect(),
        disks: all("HostResource").filter_map(|text| disk_id(&text)).collect(),
    }
}

/// The disk that a host resource names: `ovf:/disk/ID`, and the forms older exporters write.
fn disk_id(resource: &str) -> Option<String> {
    let path = resource.strip_prefix("ovf:").unwrap_or(resource);
    path.trim_start_matches('/')
        .strip_prefix("disk/")
        .map(str::to_owned)
}

/// Refuses what is deeper or longer than any real descriptor, before anything walks it.
fn bounded(root: Node<'_, '_>) -> Result<(), EnvelopeError> {
    let mut stack = vec![(root, 1usize)];
    while let Some((node, depth)) = stack.pop() {
        if depth > DEPTH {
            return Err(EnvelopeError::TooDeep);
        }
        if let Some(long) = node
            .attributes()
            .find(|attribute| attribute.value().len() > ATTRIBUTE)
        {
            return Err(EnvelopeError::Attribute {
                name: long.name().to_owned(),
                len: long.value().len(),
            });
        }
        stack.extend(node.children().map(|child| (child, depth.saturating_add(1))));
    }
    Ok(())
}
