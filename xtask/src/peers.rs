//! The programs the tests hold diskmill against: found, installed where that is possible, named where it is not.

use std::path::{Path, PathBuf};

use crate::command::{Failed, look, program};

/// The version of QEMU the tests are written against.
const QEMU: &str = "10.";

/// What the tests need beside programs on `PATH`.
#[derive(Debug)]
pub struct Peers {
    /// A Linux kernel with ext4 and NVMe built in, to boot a guest.
    pub kernel: PathBuf,
}

/// A program and the package it comes in.
struct Need {
    program: &'static str,
    package: &'static str,
}

const NEEDS: &[Need] = &[
    need("qemu-img", "qemu-utils"),
    need("qemu-io", "qemu-utils"),
    need("qemu-nbd", "qemu-utils"),
    need("qemu-system-x86_64", "qemu-system-x86"),
    need("busybox", "busybox-static"),
    need("e2fsck", "e2fsprogs"),
    need("mke2fs", "e2fsprogs"),
    need("debugfs", "e2fsprogs"),
    need("prlimit", "util-linux"),
    need("losetup", "mount"),
    need("sh", "dash"),
    need("7z", "7zip"),
    need("python3", "python3"),
    need("vmdkinfo", "libvmdk-utils"),
    need("tar", "tar"),
    need("gzip", "gzip"),
    need("xmllint", "libxml2-utils"),
    need("cryptsetup", "cryptsetup-bin"),
];

/// Independent readers of images, from the Python package index.
const PYTHON_READERS: [&str; 1] = ["dissect.hypervisor==3.21"];

const fn need(program: &'static str, package: &'static str) -> Need {
    Need { program, package }
}

/// Packages that must come from the suite that has the right QEMU.
const FROM_QEMU_SUITE: [&str; 2] = ["qemu-utils", "qemu-system-x86"];

/// Finds the peers; as root on a Debian-like system it installs what is missing. Fails naming what it cannot get.
pub fn install() -> Result<Peers, Failed> {
    let missing = missing();
    if !missing.is_empty() {
        eprintln!("peers to install: {}", missing.join(" "));
        Apt::new()?.install(&missing)?;
        let still = self::missing();
        if !still.is_empty() {
            return Err(Failed::new(format!("still missing: {}", still.join(" "))));
        }
    }
    install_python_readers()?;
    let kernel = match kernel() {
        Some(kernel) => kernel,
        None => Apt::new()?.fetch_kernel()?,
    };
    Ok(Peers { kernel })
}

/// Puts the readers of the Python package index into a folder of their own.
fn install_python_readers() -> Result<(), Failed> {
    let folder = folder().join("python");
    if folder.join("dissect/hypervisor").is_dir() {
        return Ok(());
    }
    let pip = |args: &[&str]| program("python3").args(["-m", "pip"]).args(args.iter().copied());
    if pip(&["--version"]).output().is_none() {
        Apt::new()?.install(&["python3-pip"])?;
    }
    let target = folder.to_string_lossy().into_owned();
    pip(&["install", "--quiet", "--target", &target])
        .args(PYTHON_READERS)
        .run()
}

/// The packages of programs that are absent or of the wrong version.
fn missing() -> Vec<&'static str> {
    let mut packages: Vec<&str> = NEEDS
        .iter()
        .filter(|need| look(need.program).is_none() || !right_version(need.program))
        .map(|need| need.package)
        .collect();
    packages.sort_unstable();
    packages.dedup();
    packages
}

fn right_version(name: &str) -> bool {
    if !["qemu-img", "qemu-system-x86_64"].contains(&name) {
        return true;
    }
    program(name).args(["--version"]).output().is_some_and(|text| {
        text.lines()
            .next()
            .is_some_and(|line| line.contains(&format!("version {QEMU}")))
    })
}

fn folder() -> PathBuf {
    crate::target().join("peers")
}

fn kernel() -> Option<PathBuf> {
    if let Some(kernel) = std::env::var_os("DISKMILL_KERNEL") {
        return Some(kernel.into());
    }
    let mut kernels: Vec<PathBuf> = std::fs::read_dir(folder().join("boot"))
        .ok()?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            path.file_name()
                .is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz"))
        })
        .collect();
    kernels.sort();
    kernels.pop()
}

/// `apt-get` with the machine's own sources and, where QEMU is older there, the same archive's backports suite.
///
/// The sources are a private copy: the machine's own stay as they are.
struct Apt {
    options: Vec<String>,
    suite: Option<String>,
}

impl Apt {
    fn new() -> Result<Self, Failed> {
        let names = || missing().join(" ");
        let apt = look("apt-get").ok_or_else(|| {
            Failed::new(format!(
                "install these packages, QEMU {QEMU}x among them (this system has no apt-get): {} linux-image-cloud-amd64 \
                 (or set DISKMILL_KERNEL to a kernel with ext4 and NVMe built in)",
                names()
            ))
        })?;
        let root = program("id")
            .args(["-u"])
            .output()
            .is_some_and(|id| id.trim() == "0");
        if !root {
            return Err(Failed::new(format!(
                "run `cargo xtask peers` as root once, or install QEMU {QEMU}x and: {} (kernel: fetched by {})",
                names(),
                apt.display()
            )));
        }
        let sources = folder().join("sources.list.d");
        let _ = std::fs::remove_dir_all(&sources);
        std::fs::create_dir_all(&sources)?;
        let codename = codename().unwrap_or_default();
        // Debian 12 is the one release whose own QEMU is too old and whose backports have the right one.
        let suite = (codename == "bookworm").then(|| format!("{codename}-backports"));
        copy_sources(&sources, &codename, suite.as_deref())?;
        let options = vec![
            "-o".to_owned(),
            "Dir::Etc::sourcelist=/dev/null".to_owned(),
            "-o".to_owned(),
            format!("Dir::Etc::sourceparts={}", sources.display()),
            "-o".to_owned(),
            "APT::Get::List-Cleanup=0".to_owned(),
        ];
        let apt = Self { options, suite };
        // A source of somebody else's that is down is no reason to stop: what is missing shows at the install.
        if let Err(failed) = apt.get(["update", "-qq"], Path::new("/")) {
            eprintln!("apt-get update: {failed}");
        }
        Ok(apt)
    }

    fn get<'a>(&self, args: impl IntoIterator<Item = &'a str>, dir: &Path) -> Result<(), Failed> {
        program("apt-get")
            .args(&self.options)
            .args(args)
            .env("DEBIAN_FRONTEND", "noninteractive")
            .dir(dir)
            .run()
    }

    fn install(&self, packages: &[&'static str]) -> Result<(), Failed> {
        // Suggested extras of an older QEMU would remove the newer one: nothing but what is named is installed.
        let common = ["install", "-y", "-qq", "--no-install-recommends"];
        let (qemu, other): (Vec<&str>, Vec<&str>) = packages
            .iter()
            .copied()
            .partition(|package| FROM_QEMU_SUITE.contains(package));
        if !other.is_empty() {
            self.get(common.into_iter().chain(other), Path::new("/"))?;
        }
        if !qemu.is_empty() {
            let suite = self.suite.iter().flat_map(|suite| ["-t", suite.as_str()]);
            self.get(common.into_iter().chain(suite).chain(qemu), Path::new("/"))?;
        }
        Ok(())
    }

    /// Unpacks a kernel; nothing is installed, so the machine's own boot is not touched.
    fn fetch_kernel(&self) -> Result<PathBuf, Failed> {
        let depends = program("apt-cache")
            .args(&self.options)
            .args(["depends", "linux-image-cloud-amd64"])
            .output()
            .unwrap_or_default();
        let package = depends
            .lines()
            .filter_map(|line| line.trim().strip_prefix("Depends: "))
            .find(|name| name.starts_with("linux-image-"))
            .ok_or_else(|| Failed::new("apt knows no linux-image-cloud-amd64: set DISKMILL_KERNEL"))?
            .to_owned();
        let dir = folder();
        std::fs::create_dir_all(&dir)?;
        self.get(["download", "-qq", package.as_str()], &dir)?;
        for entry in std::fs::read_dir(&dir)? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "deb") {
                program("dpkg")
                    .args(["-x".as_ref(), path.as_os_str(), dir.as_os_str()])
                    .run()?;
                std::fs::remove_file(&path)?;
            }
        }
        // The modules are not needed and are ten times the kernel.
        for unused in ["lib", "usr"] {
            let _ = std::fs::remove_dir_all(dir.join(unused));
        }
        kernel().ok_or_else(|| Failed::new(format!("{package} has no boot/vmlinuz")))
    }
}

fn codename() -> Option<String> {
    let text = std::fs::read_to_string("/etc/os-release").ok()?;
    let line = text.lines().find(|line| line.starts_with("VERSION_CODENAME="))?;
    Some(
        line.trim_start_matches("VERSION_CODENAME=")
            .trim_matches('"')
            .to_owned(),
    )
}

/// Copies the machine's apt sources, and for each entry of the release itself adds one for `suite`.
fn copy_sources(to: &Path, codename: &str, suite: Option<&str>) -> Result<(), Failed> {
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    if let Ok(parts) = std::fs::read_dir("/etc/apt/sources.list.d") {
        files.extend(parts.filter_map(|part| Some(part.ok()?.path())));
    }
    for file in files {
        let (Ok(text), Some(name)) = (std::fs::read_to_string(&file), file.file_name()) else {
            continue;
        };
        let text = match (file.extension().and_then(|extension| extension.to_str()), suite) {
            (Some("sources"), Some(suite)) => with_suite_deb822(&text, codename, suite),
            (Some("list"), Some(suite)) => with_suite_lines(&text, codename, suite),
            (Some("sources" | "list"), None) => text,
            _ => continue,
        };
        std::fs::write(to.join(name), text)?;
    }
    Ok(())
}

fn with_suite_deb822(text: &str, codename: &str, suite: &str) -> String {
    text.lines()
        .map(|line| {
            let suites = line
                .strip_prefix("Suites:")
                .map(|rest| rest.split_whitespace().collect::<Vec<_>>());
            match suites {
                Some(suites) if suites.contains(&codename) && !suites.contains(&suite) => {
                    format!("{line} {suite}\n")
                }
                _ => format!("{line}\n"),
            }
        })
        .collect()
}

fn with_suite_lines(text: &str, codename: &str, suite: &str) -> String {
    let mut all = String::new();
    for line in text.lines() {
        all.push_str(line);
        all.push('\n');
        let words: Vec<&str> = line.split_whitespace().collect();
        if words.first() == Some(&"deb") && words.contains(&codename) {
            let more: Vec<&str> = words
                .iter()
                .map(|word| if *word == codename { suite } else { word })
                .collect();
            all.push_str(&more.join(" "));
            all.push('\n');
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_suite_is_added_beside_the_release_only() {
        let text =
            "Types: deb\nURIs: mirror\nSuites: bookworm bookworm-updates\n\nSuites: bookworm-security\n";
        let with = with_suite_deb822(text, "bookworm", "bookworm-backports");
        assert!(with.contains("Suites: bookworm bookworm-updates bookworm-backports\n"));
        assert!(with.contains("Suites: bookworm-security\n"));
        assert_eq!(with, with_suite_deb822(&with, "bookworm", "bookworm-backports"));

        let text = "deb [signed-by=k] mirror bookworm main\ndeb mirror bookworm-security main\n# deb mirror bookworm main\n";
        assert_eq!(
            with_suite_lines(text, "bookworm", "bookworm-backports"),
            "deb [signed-by=k] mirror bookworm main\ndeb [signed-by=k] mirror bookworm-backports main\n\
             deb mirror bookworm-security main\n# deb mirror bookworm main\n"
        );
    }
}
