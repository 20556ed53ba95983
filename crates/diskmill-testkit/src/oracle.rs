//! The real tools: what they say is right.
//!
//! Texts and JSON differ between versions of QEMU; tests are written against the version [`QEMU_VERSION`] names.

use std::ffi::OsStr;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Child;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::process::{Run, memory};
use crate::{Scratch, hash};

/// The major version of QEMU whose behaviour the tests expect.
pub const QEMU_VERSION: &str = "10.";

/// `qemu-img`, ready for arguments.
pub fn qemu_img() -> Run {
    Run::new("qemu-img")
}

/// `qemu-io`, ready for arguments.
pub fn qemu_io() -> Run {
    Run::new("qemu-io")
}

/// A tool in the folder of an image, since a relative name of a data file is relative to where a tool runs.
fn beside(run: Run, path: &Path) -> Run {
    match path.parent() {
        Some(dir) if path.is_absolute() => run.dir(dir),
        _ => run,
    }
}

/// What the encrypted images of tests are encrypted with.
pub const PASSPHRASE: &str = "correct-horse";
/// Behind the name of a format: the image is encrypted with [`PASSPHRASE`].
pub const LOCKED: &str = "+key";
/// `--object` that holds [`PASSPHRASE`] under the name `key`.
pub const KEY: [&str; 2] = ["--object", "secret,id=key,data=correct-horse"];

/// The arguments that name an image of `format`.
fn named(run: Run, path: &Path, format: &str) -> Run {
    match format.strip_suffix(LOCKED) {
        None => run.args(["-f", format]).arg(path),
        Some(_) => run.args(KEY).arg("--image-opts").arg(image_opts(path, format)),
    }
}

/// An image of `format` as `--image-opts` takes it.
pub fn image_opts(path: &Path, format: &str) -> String {
    let file = path.display();
    match format.strip_suffix(LOCKED) {
        None => format!("driver={format},file.filename={file}"),
        Some("luks") => format!("driver=luks,file.filename={file},key-secret=key"),
        Some(format) => format!("driver={format},file.filename={file},encrypt.key-secret=key"),
    }
}

/// Panics unless `qemu-img` is of the version the tests expect.
pub fn demand_version() {
    let done = qemu_img().arg("--version").ok();
    let version = format!("qemu-img version {QEMU_VERSION}");
    assert!(
        done.out().starts_with(&version),
        "the tests expect {version}x\n{done}"
    );
}

/// `qemu-img create -f FORMAT -o OPTIONS PATH SIZE`.
pub fn create(path: impl AsRef<Path>, format: &str, options: &str, size: &str) {
    let mut run = beside(qemu_img(), path.as_ref()).args(["create", "-q", "-f", format]);
    if options.contains("key-secret=key") {
        run = run.args(KEY);
    }
    if !options.is_empty() {
        run = run.args(["-o", options]);
    }
    run.arg(path.as_ref()).arg(size).ok();
}

/// `qemu-img create` of an overlay over `backing`; the size is inherited unless `size` is given.
pub fn create_overlay(
    path: impl AsRef<Path>,
    options: &str,
    backing: impl AsRef<OsStr>,
    backing_format: &str,
    size: Option<&str>,
) {
    let mut run = beside(qemu_img(), path.as_ref())
        .args(["create", "-q", "-f", "qcow2"])
        .args([OsStr::new("-b"), backing.as_ref()])
        .args(["-F", backing_format]);
    if options.contains("key-secret=key") {
        run = run.args(KEY);
    }
    if !options.is_empty() {
        run = run.args(["-o", options]);
    }
    run.arg(path.as_ref()).args(size).ok();
}

/// `qemu-img convert`, `extra` before the names. If either image is locked, `extra` may name its key.
pub fn convert<S: AsRef<OsStr>>(
    extra: impl IntoIterator<Item = S>,
    source: impl AsRef<Path>,
    source_format: &str,
    target: impl AsRef<Path>,
    target_format: &str,
) {
    let mut run = beside(qemu_img(), source.as_ref()).arg("convert").args(extra);
    let (target_format, locked) = match target_format.strip_suffix(LOCKED) {
        Some(format) => (format, !source_format.ends_with(LOCKED)),
        None => (target_format, false),
    };
    if locked {
        run = run.args(KEY);
    }
    named(run.args(["-O", target_format]), source.as_ref(), source_format)
        .arg(target.as_ref())
        .ok();
}

/// `qemu-img snapshot`, `what` before the name.
pub fn snapshot<const N: usize>(path: impl AsRef<Path>, format: &str, what: [&str; N]) {
    let run = beside(qemu_img(), path.as_ref()).arg("snapshot").args(what);
    match format.strip_suffix(LOCKED) {
        None => run.arg(path.as_ref()).ok(),
        Some(_) => named(run, path.as_ref(), format).ok(),
    };
}

/// What `qemu-img check --output=json` reports, and its exit code.
pub fn check(path: impl AsRef<Path>, format: &str) -> (Value, i32) {
    let run = beside(qemu_img(), path.as_ref()).args(["check", "--output=json"]);
    let done = named(run, path.as_ref(), format).finish();
    let code = done.code.unwrap_or_else(|| panic!("qemu-img check died\n{done}"));
    (done.json(), code)
}

/// `qemu-img check -r all`, whatever comes of it.
pub fn repair(path: impl AsRef<Path>, format: &str) {
    let run = beside(qemu_img(), path.as_ref()).args(["check", "-q", "-r", "all"]);
    named(run, path.as_ref(), format).finish();
}

/// Demands that `qemu-img check` finds nothing at all.
pub fn assert_clean(path: impl AsRef<Path>, format: &str) {
    let run = beside(qemu_img(), path.as_ref()).arg("check");
    named(run, path.as_ref(), format).ok();
}

/// Whether `qemu-img compare` calls two images identical. Panics if it cannot tell.
pub fn identical(a: impl AsRef<Path>, a_format: &str, b: impl AsRef<Path>, b_format: &str) -> bool {
    let (a, b) = (a.as_ref(), b.as_ref());
    let run = beside(qemu_img(), a).arg("compare");
    let run = if a_format.ends_with(LOCKED) || b_format.ends_with(LOCKED) {
        let both = [image_opts(a, a_format), image_opts(b, b_format)];
        run.args(KEY).arg("--image-opts").args(both)
    } else {
        run.args(["-f", a_format, "-F", b_format]).arg(a).arg(b)
    };
    let done = run.finish();
    match done.code {
        Some(0) => true,
        Some(1) => false,
        _ => panic!("qemu-img compare cannot tell\n{done}"),
    }
}

/// Demands that `qemu-img compare` calls two images identical.
pub fn assert_identical(a: impl AsRef<Path>, a_format: &str, b: impl AsRef<Path>, b_format: &str) {
    let (a, b) = (a.as_ref(), b.as_ref());
    assert!(
        identical(a, a_format, b, b_format),
        "{} and {} differ",
        a.display(),
        b.display()
    );
}

/// `qemu-img info --output=json`, with the backing chain if asked.
pub fn info(path: impl AsRef<Path>, format: &str, chain: bool) -> Value {
    let mut run = beside(qemu_img(), path.as_ref()).args(["info", "--output=json", "-f", format]);
    if chain {
        run = run.arg("--backing-chain");
    }
    run.arg(path.as_ref()).ok().json()
}

/// `qemu-img map --output=json`.
pub fn map(path: impl AsRef<Path>, format: &str) -> Value {
    let run = beside(qemu_img(), path.as_ref()).args(["map", "--output=json"]);
    named(run, path.as_ref(), format).ok().json()
}

/// Runs `qemu-io` commands on an image, one after the other. Panics when one fails, also when a `read -P` differs.
pub fn io<S: AsRef<str>>(path: impl AsRef<Path>, format: &str, commands: impl IntoIterator<Item = S>) {
    let mut run = beside(qemu_io(), path.as_ref());
    for command in commands {
        run = run.args(["-c", command.as_ref()]);
    }
    let done = named(run, path.as_ref(), format).ok();
    for bad in ["Pattern verification failed", "failed:", "error"] {
        assert!(!done.out().contains(bad) && !done.err().contains(bad), "{done}");
    }
}

/// The digest of an image's guest bytes, as QEMU reads them.
pub fn guest_sha256(path: impl AsRef<Path>, format: &str) -> String {
    let scratch = Scratch::new();
    let raw = scratch.join("guest.raw");
    convert(["-S", "4k"], path, format, &raw, "raw");
    hash::sha256_file(raw)
}

/// A program that holds an image open until it is dropped.
#[derive(Debug)]
pub struct Holder {
    child: Child,
}

impl Holder {
    /// `qemu-io`, its commands read from a pipe that stays open: it holds the image as its flags say (`-r`, `-U`).
    pub fn qemu_io(path: impl AsRef<Path>, format: &str, flags: &[&str]) -> Self {
        let run = qemu_io().args(flags).args(["-f", format]).arg(path.as_ref());
        let mut child = run.spawn();
        use std::io::{BufRead, BufReader, Write};
        // The answer to a first command shows that the image is open and locked.
        let stdin = child.stdin.as_mut().expect("a pipe");
        stdin
            .write_all(b"length\n")
            .and_then(|()| stdin.flush())
            .expect("talk to qemu-io");
        let stdout = child.stdout.as_mut().expect("a pipe");
        let mut line = String::new();
        BufReader::new(stdout)
            .read_line(&mut line)
            .expect("hear from qemu-io");
        assert!(
            !line.is_empty(),
            "qemu-io could not open {}",
            path.as_ref().display()
        );
        Self { child }
    }

    /// `qemu-nbd` serving the image on a socket beside it: read-write, or read-only with `-r` among `flags`.
    pub fn qemu_nbd(path: impl AsRef<Path>, format: &str, flags: &[&str]) -> Self {
        let path = path.as_ref();
        let socket = path.with_extension("nbd-socket");
        // One that was killed leaves its socket, which must not be taken for the new one's.
        let _ = std::fs::remove_file(&socket);
        let child = Run::new("qemu-nbd")
            .args(flags)
            .args(["-f", format, "-t", "-k"])
            .arg(&socket)
            .arg(path)
            .spawn();
        let mut holder = Self { child };
        let started = Instant::now();
        let mut client = loop {
            // The socket is there before the image is open.
            if let Ok(client) = UnixStream::connect(&socket) {
                break client;
            }
            if let Some(status) = holder.child.try_wait().expect("wait for qemu-nbd") {
                panic!("qemu-nbd could not serve {}: {status}", path.display());
            }
            assert!(
                started.elapsed() < crate::process::PATIENCE,
                "qemu-nbd does not start"
            );
            std::thread::sleep(Duration::from_millis(2));
        };
        // Only a server that has opened and locked the image greets.
        let mut greeting = [0; 8];
        client.read_exact(&mut greeting).expect("hear from qemu-nbd");
        assert_eq!(&greeting, b"NBDMAGIC");
        holder
    }

    /// Its peak memory so far, in bytes.
    pub fn memory(&self) -> Option<u64> {
        memory(self.child.id())
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        // It may have ended by itself; the test has seen what it wanted to see.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_expected_version_is_installed() {
        demand_version();
    }

    #[test]
    fn the_tools_agree_with_themselves() {
        let scratch = Scratch::new();
        let image = scratch.join("a.qcow2");
        create(&image, "qcow2", "cluster_size=4k", "1M");
        io(&image, "qcow2", ["write -P 7 64k 8k"]);
        assert_clean(&image, "qcow2");
        let raw = scratch.join("a.raw");
        convert(["-S", "4k"], &image, "qcow2", &raw, "raw");
        assert_identical(&image, "qcow2", &raw, "raw");
        assert_eq!(guest_sha256(&image, "qcow2"), hash::sha256_file(&raw));
        io(&raw, "raw", ["write -P 8 0 512"]);
        assert!(!identical(&image, "qcow2", &raw, "raw"));
        assert_eq!(info(&image, "qcow2", false)["virtual-size"], 1 << 20);
        assert!(map(&image, "qcow2").as_array().is_some_and(|runs| runs.len() > 1));
    }

    #[test]
    #[should_panic(expected = "Pattern verification failed")]
    fn a_pattern_that_differs_is_a_failure() {
        let scratch = Scratch::new();
        let raw = scratch.file("a.raw", &[1; 512]);
        io(&raw, "raw", ["read -P 2 0 512"]);
    }

    #[test]
    fn a_holder_holds_until_it_is_dropped() {
        let scratch = Scratch::new();
        let image = scratch.join("a.qcow2");
        create(&image, "qcow2", "", "1M");
        for nbd in [false, true] {
            let holder = if nbd {
                Holder::qemu_nbd(&image, "qcow2", &[])
            } else {
                Holder::qemu_io(&image, "qcow2", &[])
            };
            let done = qemu_img()
                .args(["info", "-f", "qcow2"])
                .arg(&image)
                .finish()
                .expect(1);
            assert!(
                done.err().contains("Failed to get shared \"write\" lock"),
                "{done}"
            );
            drop(holder);
            qemu_img().args(["info", "-f", "qcow2"]).arg(&image).ok();
        }
    }
}
