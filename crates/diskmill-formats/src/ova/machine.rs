//! A machine that a package describes, and what each importer wants of it.

use super::manifest::Algorithm;

/// The program a package is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Profile {
    /// Anything that reads OVF.
    #[default]
    Generic,
    /// VMware ESXi and vCenter.
    Esxi,
    /// VMware Workstation and Fusion.
    Workstation,
    /// VirtualBox.
    VirtualBox,
}

impl Profile {
    /// All of them, by name.
    pub const ALL: [(&'static str, Self); 4] = [
        ("generic", Self::Generic),
        ("esxi", Self::Esxi),
        ("workstation", Self::Workstation),
        ("virtualbox", Self::VirtualBox),
    ];

    /// The profile of that name.
    pub fn by_name(name: &str) -> Option<Self> {
        Self::ALL
            .iter()
            .find(|known| known.0 == name)
            .map(|known| known.1)
    }

    /// The hardware to ask for: the oldest that has all that is needed.
    pub(super) const fn hardware(self) -> &'static str {
        match self {
            Self::Generic => "vmx-10",
            Self::Esxi => "vmx-13",
            Self::Workstation => "vmx-12",
            Self::VirtualBox => "virtualbox-2.2",
        }
    }

    /// The digest of the manifest. Workstation of that hardware's time knows SHA-1 only.
    pub const fn digest(self) -> Algorithm {
        match self {
            Self::Workstation => Algorithm::Sha1,
            _ => Algorithm::Sha256,
        }
    }

    /// The controller disks hang on.
    pub const fn controller(self) -> Controller {
        match self {
            Self::VirtualBox => Controller::Ahci,
            _ => Controller::LsiLogic,
        }
    }

    pub(super) const fn network_card(self) -> &'static str {
        match self {
            Self::Esxi => "VmxNet3",
            _ => "E1000",
        }
    }
}

/// What disks hang on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Controller {
    /// SCSI, LSI Logic parallel.
    LsiLogic,
    /// SCSI, LSI Logic SAS.
    LsiLogicSas,
    /// SCSI, BusLogic.
    BusLogic,
    /// SCSI, VMware paravirtual.
    Paravirtual,
    /// SATA.
    Ahci,
    /// IDE.
    Ide,
}

impl Controller {
    /// All of them, by name.
    pub const ALL: [(&'static str, Self); 6] = [
        ("lsilogic", Self::LsiLogic),
        ("lsilogicsas", Self::LsiLogicSas),
        ("buslogic", Self::BusLogic),
        ("pvscsi", Self::Paravirtual),
        ("sata", Self::Ahci),
        ("ide", Self::Ide),
    ];

    /// The controller of that name.
    pub fn by_name(name: &str) -> Option<Self> {
        Self::ALL
            .iter()
            .find(|known| known.0 == name)
            .map(|known| known.1)
    }

    /// The number CIM gives its kind.
    pub(super) const fn resource_type(self) -> u16 {
        match self {
            Self::Ide => 5,
            Self::Ahci => 20,
            _ => 6,
        }
    }

    /// Which sort of that kind.
    pub(super) const fn subtype(self) -> &'static str {
        match self {
            Self::LsiLogic => "lsilogic",
            Self::LsiLogicSas => "lsilogicsas",
            Self::BusLogic => "buslogic",
            Self::Paravirtual => "VirtualSCSI",
            Self::Ahci => "AHCI",
            Self::Ide => "PIIX4",
        }
    }

    pub(super) const fn title(self) -> &'static str {
        match self {
            Self::Ahci => "SATA Controller",
            Self::Ide => "IDE Controller",
            _ => "SCSI Controller",
        }
    }

    /// Where on it the disk number `index` hangs, or `None` if there are more than it takes.
    pub(super) const fn unit(self, index: usize) -> Option<usize> {
        match self {
            Self::Ide if index < 2 => Some(index),
            Self::Ahci if index < 30 => Some(index),
            Self::Ide | Self::Ahci => None,
            // Unit 7 is the controller itself.
            _ if index < 7 => Some(index),
            _ if index < 15 => Some(index.saturating_add(1)),
            _ => None,
        }
    }

    /// Disks it takes.
    pub const fn most(self) -> usize {
        match self {
            Self::Ide => 2,
            Self::Ahci => 30,
            _ => 15,
        }
    }
}

/// How a machine starts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Firmware {
    /// BIOS.
    #[default]
    Bios,
    /// UEFI.
    Efi,
}

impl Firmware {
    /// All of them, by name.
    pub const ALL: [(&'static str, Self); 2] = [("bios", Self::Bios), ("efi", Self::Efi)];

    /// The firmware of that name.
    pub fn by_name(name: &str) -> Option<Self> {
        Self::ALL
            .iter()
            .find(|known| known.0 == name)
            .map(|known| known.1)
    }
}

/// An operating system, as CIM numbers it and as VMware names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Os {
    /// What users call it here.
    pub name: &'static str,
    /// What CIM numbers it (CIM_OperatingSystem.OSType).
    pub cim: u16,
    /// What vSphere calls it (VirtualMachineGuestOsIdentifier).
    pub vmware: &'static str,
    /// In words.
    pub description: &'static str,
}

impl Os {
    /// All that have a name here. The first is what is said if nothing is known.
    pub const ALL: [Self; 14] = [
        Self::new("other", 1, "otherGuest", "Other"),
        Self::new("other64", 102, "otherGuest64", "Other (64-bit)"),
        Self::new("linux", 36, "otherLinuxGuest", "Linux"),
        Self::new("linux64", 101, "other3xLinux64Guest", "Linux (64-bit)"),
        Self::new("debian64", 96, "debian10_64Guest", "Debian (64-bit)"),
        Self::new("ubuntu64", 94, "ubuntu64Guest", "Ubuntu (64-bit)"),
        Self::new("rhel64", 80, "rhel8_64Guest", "Red Hat Enterprise Linux (64-bit)"),
        Self::new("centos64", 107, "centos8_64Guest", "CentOS (64-bit)"),
        Self::new("oracle64", 109, "oracleLinux8_64Guest", "Oracle Linux (64-bit)"),
        Self::new(
            "sles64",
            85,
            "sles15_64Guest",
            "SUSE Linux Enterprise Server (64-bit)",
        ),
        Self::new("freebsd64", 78, "freebsd12_64Guest", "FreeBSD (64-bit)"),
        Self::new("windows10-64", 121, "windows9_64Guest", "Windows 10 (64-bit)"),
        Self::new("windows2016", 117, "windows9Server64Guest", "Windows Server 2016"),
        Self::new(
            "windows2019",
            117,
            "windows2019srv_64Guest",
            "Windows Server 2019",
        ),
    ];

    const fn new(name: &'static str, cim: u16, vmware: &'static str, description: &'static str) -> Self {
        Self {
            name,
            cim,
            vmware,
            description,
        }
    }

    /// The system of that name.
    pub fn by_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|known| known.name == name)
    }
}

/// A machine to be described.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Machine {
    /// Its name.
    pub name: String,
    /// What runs in it.
    pub os: Os,
    /// Its processors.
    pub cpus: u32,
    /// Its memory in MiB.
    pub memory_mib: u64,
    /// The networks it is on, one card each.
    pub networks: Vec<String>,
    /// How it starts.
    pub firmware: Firmware,
    /// What its disks hang on.
    pub controller: Controller,
}

impl Machine {
    /// A small machine on one network, as `profile` wants it.
    pub fn new(name: impl Into<String>, profile: Profile) -> Self {
        Self {
            name: name.into(),
            os: Os::ALL[1],
            cpus: 1,
            memory_mib: 1024,
            networks: vec!["VM Network".to_owned()],
            firmware: Firmware::Bios,
            controller: profile.controller(),
        }
    }
}
