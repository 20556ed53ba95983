//! Temporary folders that are gone when a test is.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use tempfile::TempDir;

/// A folder of its own for one test, removed when dropped.
///
/// It lies where `TMPDIR` says. Nothing in it is kept after a failure: tests print what is needed to see it again.
#[derive(Debug)]
pub struct Scratch(TempDir);

impl Default for Scratch {
    fn default() -> Self {
        Self::new()
    }
}

impl Scratch {
    /// A new, empty folder.
    pub fn new() -> Self {
        Self(
            tempfile::Builder::new()
                .prefix("diskmill-")
                .tempdir()
                .expect("a temporary folder"),
        )
    }

    /// A new, empty folder below `parent`: `/dev/shm` where speed counts.
    pub fn beneath(parent: impl AsRef<Path>) -> Self {
        Self(
            tempfile::Builder::new()
                .prefix("diskmill-")
                .tempdir_in(parent)
                .expect("a temporary folder"),
        )
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// The path of `name` in the folder.
    pub fn join(&self, name: impl AsRef<Path>) -> PathBuf {
        self.0.path().join(name)
    }

    /// Writes a file and returns its path.
    pub fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.join(name);
        std::fs::write(&path, bytes).expect("write a test file");
        path
    }

    /// Makes a file of `len` bytes that is one hole.
    pub fn hole(&self, name: &str, len: u64) -> PathBuf {
        let path = self.join(name);
        File::create(&path)
            .and_then(|file| file.set_len(len))
            .expect("make a sparse test file");
        path
    }

    /// The names in the folder, hidden ones too, sorted.
    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = std::fs::read_dir(self.path())
            .expect("list the temporary folder")
            .map(|entry| {
                entry
                    .expect("an entry")
                    .file_name()
                    .to_string_lossy()
                    .into_owned()
            })
            .collect();
        names.sort();
        names
    }
}

/// Overwrites bytes of an existing file, growing it if need be.
pub fn patch(path: impl AsRef<Path>, at: u64, bytes: &[u8]) {
    let file = OpenOptions::new()
        .write(true)
        .open(path)
        .expect("open the file to patch");
    file.write_all_at(bytes, at).expect("patch the file");
}

/// Reads bytes of a file.
pub fn peek(path: impl AsRef<Path>, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    File::open(path)
        .and_then(|file| file.read_exact_at(&mut bytes, at))
        .expect("read bytes of a file");
    bytes
}

/// The length of a file in bytes.
pub fn len(path: impl AsRef<Path>) -> u64 {
    std::fs::metadata(path).expect("the file's length").len()
}

/// The bytes a file occupies on the host.
pub fn allocated(path: impl AsRef<Path>) -> u64 {
    std::fs::metadata(path).expect("the file's blocks").blocks() * 512
}
