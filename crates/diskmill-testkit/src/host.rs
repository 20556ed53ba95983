//! Block devices and file systems of the host's, as tests need them. All of it needs to be root.

use std::path::{Path, PathBuf};

use crate::Run;

/// A loop device over a file, detached when dropped.
#[derive(Debug)]
pub struct Loop(PathBuf);

impl Loop {
    /// The file `path` as a block device with logical sectors of `sector` bytes.
    pub fn attach(path: impl AsRef<Path>, sector: u32) -> Self {
        let run = Run::new("losetup").args(["--show", "-f", "-b", &sector.to_string()]);
        let name = run.arg(path.as_ref()).ok().out();
        Self(PathBuf::from(name.trim()))
    }

    /// The device.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        // The kernel detaches it once the last user is gone.
        let _ = Run::new("losetup").arg("-d").arg(&self.0).finish();
    }
}

/// A mounted file system, unmounted when dropped.
#[derive(Debug)]
pub struct Mount(PathBuf);

impl Mount {
    /// Mounts on `point`, a directory or file that exists, with `mount`'s own arguments before it.
    pub fn new(point: impl AsRef<Path>, args: &[&str]) -> Self {
        let point = point.as_ref().to_owned();
        Run::new("mount").args(args).arg(&point).ok();
        Self(point)
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Run::new("umount").arg("-l").arg(&self.0).finish();
    }
}
