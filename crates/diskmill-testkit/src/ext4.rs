//! ext4 disks of real files: made, checked and read back without root or mounting.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use crate::process::Run;
use crate::{Scratch, hash};

/// Copies regular files and links below the folders `from` into `to`, in the order of their names, until `limit`
/// bytes are reached. Returns the bytes copied. Files that cannot be read are left out.
pub fn copy_tree(from: &[&Path], to: &Path, limit: u64) -> u64 {
    let mut copied = 0;
    for root in from {
        let mut waiting = vec![root.to_path_buf()];
        while let Some(path) = waiting.pop() {
            if copied >= limit {
                return copied;
            }
            let target = to.join(path.strip_prefix("/").unwrap_or(&path));
            copied += copy_one(&path, &target, &mut waiting).unwrap_or(0);
        }
    }
    copied
}

fn copy_one(path: &Path, target: &Path, waiting: &mut Vec<PathBuf>) -> io::Result<u64> {
    let kind = fs::symlink_metadata(path)?.file_type();
    if kind.is_dir() {
        fs::create_dir_all(target)?;
        let mut entries: Vec<PathBuf> = fs::read_dir(path)?
            .map(|entry| Ok(entry?.path()))
            .collect::<io::Result<_>>()?;
        entries.sort();
        waiting.extend(entries.into_iter().rev());
        Ok(0)
    } else if kind.is_symlink() {
        symlink(fs::read_link(path)?, target)?;
        Ok(0)
    } else if kind.is_file() {
        if let Some(parent) = target.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::copy(path, target)
    } else {
        Ok(0)
    }
}

/// Makes a raw ext4 image of `size` bytes that holds the tree below `tree`.
pub fn make(image: impl AsRef<Path>, tree: impl AsRef<Path>, size: u64) {
    Run::new("mke2fs")
        .args(["-q", "-t", "ext4", "-E", "root_owner=0:0", "-d"])
        .arg(tree.as_ref())
        .arg(image.as_ref())
        .arg(format!("{}k", size / 1024))
        .ok();
}

/// Demands that `e2fsck -fn` finds nothing in a raw ext4 image.
pub fn assert_clean(image: impl AsRef<Path>) {
    Run::new("e2fsck").arg("-fn").arg(image.as_ref()).ok();
}

/// The digest of every regular file in a raw ext4 image, by its path.
pub fn hashes(image: impl AsRef<Path>) -> BTreeMap<String, String> {
    let scratch = Scratch::new();
    let out = scratch.join("out");
    fs::create_dir(&out).expect("a folder for the files");
    Run::new("debugfs")
        .args(["-R", &format!("rdump / {}", out.display())])
        .arg(image.as_ref())
        .ok();
    let mut hashes = BTreeMap::new();
    let mut waiting = vec![out.clone()];
    while let Some(path) = waiting.pop() {
        let kind = fs::symlink_metadata(&path).expect("a dumped file").file_type();
        if kind.is_dir() {
            let entries = fs::read_dir(&path).expect("a dumped folder");
            waiting.extend(entries.map(|entry| entry.expect("an entry").path()));
        } else if kind.is_file() {
            let name = path.strip_prefix(&out).unwrap_or(&path);
            hashes.insert(name.to_string_lossy().into_owned(), hash::sha256_file(&path));
        }
    }
    hashes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_come_back_as_they_went_in() {
        let scratch = Scratch::new();
        let tree = scratch.join("tree");
        fs::create_dir_all(tree.join("a/b")).unwrap();
        fs::write(tree.join("a/b/c"), b"abc").unwrap();
        fs::write(tree.join("big"), vec![7; 300_000]).unwrap();
        symlink("big", tree.join("link")).unwrap();
        let copy = scratch.join("copy");
        assert_eq!(copy_tree(&[&tree], &copy, u64::MAX), 300_003);
        let image = scratch.join("a.ext4");
        make(&image, copy.join(tree.strip_prefix("/").unwrap()), 8 << 20);
        assert_clean(&image);
        let hashes = hashes(&image);
        assert_eq!(hashes.get("a/b/c"), Some(&hash::sha256(b"abc")));
        assert_eq!(hashes.len(), 2, "{hashes:?}");
    }
}
