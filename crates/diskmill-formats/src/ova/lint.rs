//! What importers are known to insist on, beyond the standard.

use std::collections::HashSet;
use std::fmt;

use roxmltree::{Document, ParsingOptions};

use super::archive::{Archive, Unusual};
use super::compose::STREAM_OPTIMIZED;
use super::envelope::{Compression, DiskEntry, Envelope, System, text_of};
use super::manifest::{Algorithm, Manifest};
use super::name::MemberName;

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Severity {
    /// Some importers do not like it.
    Warning,
    /// Some importers refuse the package, or lose something.
    Error,
}

impl Severity {
    /// The word for it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Warning => "warning",
            Self::Error => "error",
        }
    }
}

/// What is asked of a package.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Its name, which stays the same.
    pub name: &'static str,
    /// How bad it is to break it.
    pub severity: Severity,
    /// Who asks for it.
    pub who: &'static str,
}

macro_rules! rules {
    ($($id:ident = $name:literal $severity:ident $who:literal;)*) => {
        $(const $id: Rule = Rule { name: $name, severity: Severity::$severity, who: $who };)*
        /// All rules.
        pub const RULES: &[Rule] = &[$($id),*];
    };
}

rules! {
    DESCRIPTOR_FIRST = "descriptor-first" Error "VMware";
    MANIFEST_PLACE = "manifest-place" Error "VMware";
    PLAIN_NAMES = "plain-names" Error "VirtualBox";
    TAR_HEADER = "tar-header" Warning "VMware, VirtualBox";
    EXTRA_FILE = "extra-file" Warning "VMware";
    MANIFEST_BLANK = "manifest-blank" Error "VMware";
    MANIFEST_LISTS_ALL = "manifest-lists-all" Error "VMware";
    MANIFEST_DIGEST = "manifest-digest" Warning "VMware before 2017";
    FILE_SIZE = "file-size" Error "vSphere";
    DISK_FORMAT = "disk-format" Error "ESXi";
    DISK_UNITS = "disk-units" Error "VirtualBox";
    DISK_COMPRESSION = "disk-compression" Warning "VirtualBox, oVirt";
    DISK_CHUNKS = "disk-chunks" Error "VirtualBox, AWS";
    DISK_ATTACHED = "disk-attached" Warning "all";
    DISK_CONTROLLER = "disk-controller" Error "VMware, VirtualBox";
    DISK_UNIT = "disk-unit" Error "VMware";
    ONE_MACHINE = "one-machine" Error "VirtualBox before 5, oVirt";
    HARDWARE = "hardware" Error "ESXi";
    ITEM_ORDER = "item-order" Error "VMware";
    DISK_HEADER = "disk-header" Error "ESXi";
    DISK_END = "disk-end" Error "VMware";
    DISK_CAPACITY = "disk-capacity" Error "VirtualBox, ESXi";
}

/// A rule that a package breaks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lint {
    /// Which.
    pub rule: Rule,
    /// How.
    pub text: String,
}

impl Lint {
    fn new(rule: Rule, text: impl fmt::Display) -> Self {
        Self {
            rule,
            text: text.to_string(),
        }
    }
}

/// What a disk's file is, as far as importers look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskBytes<'a> {
    /// Its first 512 bytes.
    pub head: &'a [u8; 512],
    /// Its last 1024 bytes.
    pub tail: &'a [u8; 1024],
}

/// What is looked at.
#[derive(Clone, Copy, Debug)]
pub struct Subject<'a> {
    /// The members, of a package that is one archive.
    pub archive: Option<&'a Archive>,
    /// The descriptor's name.
    pub name: &'a MemberName,
    /// The descriptor.
    pub envelope: &'a Envelope,
    /// Its text.
    pub text: &'a [u8],
    /// The manifest, and its text.
    pub manifest: Option<(&'a Manifest, &'a [u8])>,
}

/// Applies the rules that need no disk.
pub fn package(subject: &Subject<'_>) -> Vec<Lint> {
    let mut lints = Vec::new();
    if let Some(archive) = subject.archive {
        members(subject, archive, &mut lints);
    }
    if let Some((manifest, text)) = subject.manifest {
        digests(subject, manifest, text, &mut lints);
    }
    files(subject.envelope, &mut lints);
    let text = text_of(subject.text).unwrap_or_default();
    let document = document(&text);
    let units = document.as_ref().map_or_else(Vec::new, |document| {
        disk_attributes(document, "capacityAllocationUnits")
    });
    if units.iter().any(|unit| !unit.trim().eq_ignore_ascii_case("byte")) {
        lints.push(Lint::new(
            DISK_UNITS,
            "a capacity is not in bytes: VirtualBox takes any number for bytes",
        ));
    }
    for disk in &subject.envelope.disks {
        let attached = subject
            .envelope
            .systems
            .iter()
            .any(|system| system.disks().any(|id| id == disk.id));
        if !attached {
            lints.push(Lint::new(
                DISK_ATTACHED,
                format_args!("no machine has disk '{}'", disk.id),
            ));
        }
    }
    match subject.envelope.systems.len() {
        1 => {}
        count => lints.push(Lint::new(
            ONE_MACHINE,
            format_args!("there are {count} machines, must be 1"),
        )),
    }
    for system in &subject.envelope.systems {
        machine(system, &mut lints);
    }
    if let Some(document) = &document {
        item_order(document, &mut lints);
    }
    lints
}

fn members(subject: &Subject<'_>, archive: &Archive, lints: &mut Vec<Lint>) {
    let names: Vec<_> = archive.members().iter().map(|member| &member.name).collect();
    if names.first() != Some(&subject.name) {
        let first = names.first().map_or("nothing", |name| name.as_str());
        lints.push(Lint::new(
            DESCRIPTOR_FIRST,
            format_args!(
                "the archive starts with '{first}', must start with '{}'",
                subject.name
            ),
        ));
    }
    if let Some(at) = names.iter().position(|name| name.has_extension("mf")) {
        let behind = names.get(at.saturating_add(1)..).unwrap_or_default();
        if at != 1 && !behind.iter().all(|name| name.has_extension("cert")) {
            lints.push(Lint::new(
                MANIFEST_PLACE,
                "the manifest is neither right behind the descriptor nor at the end",
            ));
        }
    }
    let own = |name: &MemberName| {
        name == subject.name
            || (name.stem() == subject.name.stem()
                && ["mf", "cert"].iter().any(|kind| name.has_extension(kind)))
    };
    let referred = |name: &MemberName| {
        subject.envelope.files.iter().any(|file| {
            let chunk = name
                .as_str()
                .strip_prefix(file.name.as_str())
                .and_then(|rest| rest.strip_prefix('.'));
            file.name == *name || (file.chunk.is_some() && chunk.is_some_and(|digits| digits.len() == 9))
        })
    };
    for member in archive.members() {
        let name = &member.name;
        if name.as_str().len() > 100 || name.as_str().contains('/') {
            lints.push(Lint::new(
                PLAIN_NAMES,
                format_args!("member '{name}' must have a name of at most 100 bytes without directories"),
            ));
        }
        if let Some(unusual) = member.unusual {
            let what = match unusual {
                Unusual::Old => "an old header, must be ustar",
                Unusual::Record => "its name or size in a record before its header",
                Unusual::Prefix => "a name with a prefix",
            };
            lints.push(Lint::new(TAR_HEADER, format_args!("member '{name}' has {what}")));
        }
        if !own(name) && !referred(name) {
            lints.push(Lint::new(
                EXTRA_FILE,
                format_args!("nothing refers to member '{name}'"),
            ));
        }
    }
}

fn digests(subject: &Subject<'_>, manifest: &Manifest, text: &[u8], lints: &mut Vec<Lint>) {
    let text = String::from_utf8_lossy(text);
    if text
        .lines()
        .any(|line| line.split('(').next().is_some_and(|word| word.ends_with(' ')))
    {
        lints.push(Lint::new(
            MANIFEST_BLANK,
            "the manifest has a blank between an algorithm and its parenthesis",
        ));
    }
    let listed: HashSet<_> = manifest.entries().iter().map(|entry| &entry.name).collect();
    let plain = subject
        .envelope
        .files
        .iter()
        .filter(|file| file.chunk.is_none())
        .map(|file| &file.name);
    for name in std::iter::once(subject.name).chain(plain) {
        if !listed.contains(name) {
            lints.push(Lint::new(
                MANIFEST_LISTS_ALL,
                format_args!("the manifest does not list '{name}'"),
            ));
        }
    }
    if manifest
        .entries()
        .iter()
        .any(|entry| entry.algorithm == Algorithm::Sha512)
    {
        lints.push(Lint::new(
            MANIFEST_DIGEST,
            "the manifest uses SHA512, which few importers know",
        ));
    }
}

fn files(envelope: &Envelope, lints: &mut Vec<Lint>) {
    for disk in envelope.disks.iter().filter(|disk| !disk.is_optical()) {
        let Some(file) = disk.file.and_then(|file| envelope.files.get(file)) else {
            continue;
        };
        let name = &file.name;
        if disk.format.as_deref() != Some(STREAM_OPTIMIZED) {
            let found = disk.format.as_deref().unwrap_or("none");
            lints.push(Lint::new(
                DISK_FORMAT,
                format_args!(
                    "disk '{}' has the format '{found}', must be '{STREAM_OPTIMIZED}'",
                    disk.id
                ),
            ));
        }
        if file.size.is_none() {
            lints.push(Lint::new(
                FILE_SIZE,
                format_args!("the size of '{name}' is not given"),
            ));
        }
        if file.compression != Compression::Identity {
            lints.push(Lint::new(
                DISK_COMPRESSION,
                format_args!("'{name}' is compressed as a whole"),
            ));
        }
        if file.chunk.is_some() {
            lints.push(Lint::new(DISK_CHUNKS, format_args!("'{name}' is in chunks")));
        }
    }
}

/// Kinds of devices that disks hang on.
const CONTROLLERS: [u16; 3] = [5, 6, 20];

fn machine(system: &System, lints: &mut Vec<Lint>) {
    let name = system.name.as_deref().unwrap_or(&system.id);
    let hardware = system.hardware.as_deref().unwrap_or("none");
    if !hardware
        .split_whitespace()
        .any(|family| family.starts_with("vmx-"))
    {
        lints.push(Lint::new(
            HARDWARE,
            format_args!("machine '{name}' has the hardware '{hardware}', must be vmx-N"),
        ));
    }
    let controller = |id: &str| {
        system
            .items
            .iter()
            .find(|item| item.instance.as_deref() == Some(id) && CONTROLLERS.contains(&item.resource_type))
    };
    let mut taken = HashSet::new();
    for item in system.items.iter().filter(|item| item.resource_type == 17) {
        let disk = item.disks.first().map_or("without a resource", String::as_str);
        let Some(parent) = item.parent.as_deref().and_then(controller) else {
            lints.push(Lint::new(
                DISK_CONTROLLER,
                format_args!("disk '{disk}' hangs on no controller"),
            ));
            continue;
        };
        let address = item.address.as_deref().unwrap_or_default();
        if parent.resource_type == 6 && address == "7" {
            lints.push(Lint::new(
                DISK_UNIT,
                format_args!("disk '{disk}' is unit 7, which is the SCSI controller's own"),
            ));
        }
        if !address.is_empty() && !taken.insert((parent.instance.clone(), address.to_owned())) {
            lints.push(Lint::new(
                DISK_UNIT,
                format_args!("disk '{disk}' is unit {address}, and so is another"),
            ));
        }
    }
}

fn document(text: &str) -> Option<Document<'_>> {
    let options = ParsingOptions {
        allow_dtd: false,
        ..ParsingOptions::default()
    };
    Document::parse_with_options(text, options).ok()
}

/// The values of an attribute of disks.
fn disk_attributes<'a>(document: &'a Document<'_>, attribute: &str) -> Vec<&'a str> {
    let disks = document
        .descendants()
        .filter(|node| node.tag_name().name() == "Disk");
    disks
        .flat_map(|disk| disk.attributes())
        .filter(|known| known.name() == attribute)
        .map(|known| known.value())
        .collect()
}

/// The schema has the children of an item as a sequence.
fn item_order(document: &Document<'_>, lints: &mut Vec<Lint>) {
    let items = document
        .descendants()
        .filter(|node| node.tag_name().name() == "Item");
    for (number, item) in (1..).zip(items) {
        let names = item.children().filter(|child| {
            child.is_element()
                && child
                    .tag_name()
                    .namespace()
                    .is_some_and(|space| space.contains("CIM_"))
        });
        let names: Vec<_> = names.map(|child| child.tag_name().name()).collect();
        if !names.is_sorted() {
            lints.push(Lint::new(
                ITEM_ORDER,
                format_args!("the children of item {number} are not in alphabetical order"),
            ));
        }
    }
}

/// Applies the rules about a disk that its descriptor says is a VMDK.
pub fn disk(disk: &DiskEntry, bytes: DiskBytes<'_>) -> Vec<Lint> {
    let mut lints = Vec::new();
    let head = |at: usize, len: usize| bytes.head.get(at..at.saturating_add(len)).unwrap_or_default();
    let number = |at, len| {
        head(at, len)
            .iter()
            .rev()
            .fold(0u64, |value, byte| value << 8 | u64::from(*byte))
    };
    let id = &disk.id;
    if head(0, 4) != b"KDMV" {
        lints.push(Lint::new(
            DISK_HEADER,
            format_args!("disk '{id}' is no sparse VMDK"),
        ));
        return lints;
    }
    /// Compressed grains, and markers before them.
    const STREAM: u64 = 0x3 << 16;
    if number(4, 4) != 3 || number(8, 4) & STREAM != STREAM {
        let text = format_args!(
            "disk '{id}' has VMDK version {} and flags {:#x}, must be 3 with {STREAM:#x}",
            number(4, 4),
            number(8, 4)
        );
        lints.push(Lint::new(DISK_HEADER, text));
    }
    if number(12, 8).checked_mul(512) != Some(disk.capacity) {
        let text = format_args!(
            "disk '{id}' has {} sectors, the descriptor says {} bytes",
            number(12, 8),
            disk.capacity
        );
        lints.push(Lint::new(DISK_CAPACITY, text));
    }
    let (footer, end) = bytes.tail.split_at(512);
    if !footer.starts_with(b"KDMV") || end.iter().any(|byte| *byte != 0) {
        let text = format_args!("disk '{id}' does not end in a footer and an end-of-stream marker");
        lints.push(Lint::new(DISK_END, text));
    }
    lints
}
