//! The files of a package as storage: a part of the archive, a file of the directory, chunks, what gzip unpacks to.

use std::io::{self, Read};
use std::sync::Arc;

use diskmill_core::{Error, ErrorKind, HostOffset, Result, Storage, StorageMut};
use diskmill_formats::ova::{FileEntry, MemberName};
use diskmill_storage::{File, FileOptions, LockPlan, Window};
use flate2::read::MultiGzDecoder;

use super::{Package, PackageError, Place};

/// Chunks a file may be stored in.
pub(super) const CHUNKS: u64 = 100_000;

/// A file of the package, as it is stored.
#[derive(Clone, Debug)]
pub(super) struct Part {
    pub(super) name: MemberName,
    pub(super) storage: Arc<dyn Storage>,
}

impl Package {
    /// The file called `name`, or `None` if there is none.
    pub(super) fn find(&self, name: &MemberName) -> Result<Option<Arc<dyn Storage>>> {
        match &self.place {
            Place::Archive(archive) => match archive
                .find(&format!("{}{name}", self.dir()))
                .or_else(|| archive.find(name.as_str()))
            {
                None => Ok(None),
                Some(member) => {
                    let window = Window::new(Arc::clone(&self.file), member.start, Some(member.len))?;
                    Ok(Some(Arc::new(window)))
                }
            },
            Place::Directory(dir) => {
                let options = FileOptions::read(LockPlan::SHARE).no_links();
                match File::open(dir.join(name.as_str()), &options) {
                    Ok(file) => Ok(Some(Arc::new(file))),
                    Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
                    Err(error) => Err(error),
                }
            }
        }
    }

    /// All bytes of a small file, or `None` if there is none of that name.
    pub(super) fn small(&self, name: &MemberName, most: u64) -> Result<Option<Vec<u8>>> {
        let Some(storage) = self.find(name)? else {
            return Ok(None);
        };
        let len = storage.len()?;
        if len > most {
            let name = name.to_string();
            return Err(PackageError::TooLong { name, len, most }.malformed());
        }
        let mut bytes = vec![0; usize::try_from(len).unwrap_or_default()];
        storage.read_at(HostOffset::ZERO, &mut bytes)?;
        Ok(Some(bytes))
    }

    /// The files that `file` is stored in: itself, or its chunks. Their sizes are as the descriptor says.
    pub(super) fn parts(&self, file: &FileEntry) -> Result<Vec<Part>> {
        let parts = match file.chunk {
            None => vec![self.part(file.name.clone())?],
            Some(size) => self.chunks(file, size)?,
        };
        let mut found = 0u64;
        for part in &parts {
            found = found.saturating_add(part.storage.len()?);
        }
        match file.size {
            Some(said) if said != found => {
                let name = file.name.to_string();
                Err(PackageError::Size { name, found, said }.malformed())
            }
            _ => Ok(parts),
        }
    }

    fn part(&self, name: MemberName) -> Result<Part> {
        let storage = self.find(&name)?;
        let storage = storage.ok_or_else(|| PackageError::NoFile(name.to_string()).malformed())?;
        Ok(Part { name, storage })
    }

    /// All chunks have `size` bytes but the last, which has no more (DSP0243, 7.1).
    fn chunks(&self, file: &FileEntry, size: u64) -> Result<Vec<Part>> {
        let mut parts: Vec<Part> = Vec::new();
        for index in 0.. {
            let name = MemberName::new(&file.chunk_name(index))
                .map_err(|error| Error::new(ErrorKind::Malformed, error))?;
            let part = match self.find(&name)? {
                Some(storage) => Part { name, storage },
                None if index == 0 => return self.part(name).map(|part| vec![part]),
                None => break,
            };
            if let Some(before) = parts.last() {
                check_chunk(before, size)?;
            }
            parts.push(part);
            if index >= CHUNKS {
                return Err(PackageError::Chunks(file.name.to_string()).malformed());
            }
        }
        match parts.last() {
            Some(last) if last.storage.len()? > size => check_chunk(last, size)?,
            _ => {}
        }
        Ok(parts)
    }

    /// What `stored` unpacks to, in an unnamed file that goes when it is closed.
    pub(super) fn unpacked(
        &self,
        file: &FileEntry,
        capacity: u64,
        stored: &dyn Storage,
    ) -> Result<Arc<dyn Storage>> {
        /// Tables of any format, and then some, for a disk without data.
        const SLACK: u64 = 64 << 20;
        let name = || file.name.to_string();
        let most = capacity.saturating_add(capacity / 16).saturating_add(SLACK);
        let beside = self
            .file
            .path()
            .parent()
            .filter(|dir| !dir.as_os_str().is_empty());
        let spool =
            File::temporary("/var/tmp").or_else(|_| File::temporary(beside.unwrap_or(".".as_ref())))?;
        let mut decoder = MultiGzDecoder::new(Reader {
            storage: stored,
            at: 0,
            len: stored.len()?,
        });
        let mut buf = vec![0; 1 << 20];
        let mut end = 0u64;
        loop {
            let have = match decoder.read(&mut buf) {
                Ok(0) => break,
                Ok(have) => have,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    let reason = error.to_string();
                    return Err(PackageError::Gzip { name: name(), reason }.malformed());
                }
            };
            if end.saturating_add(have as u64) > most {
                return Err(PackageError::Bomb { name: name(), most }.malformed());
            }
            spool.write_at(HostOffset::new(end), buf.get(..have).unwrap_or_default())?;
            end += have as u64;
        }
        Ok(Arc::new(spool))
    }
}

fn check_chunk(part: &Part, wanted: u64) -> Result<()> {
    let found = part.storage.len()?;
    if found == wanted {
        return Ok(());
    }
    let name = part.name.to_string();
    Err(PackageError::Chunk { name, found, wanted }.malformed())
}

/// A storage as the decoder wants it.
struct Reader<'a> {
    storage: &'a dyn Storage,
    at: u64,
    len: u64,
}

impl Read for Reader<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let have = usize::try_from(self.len - self.at)
            .unwrap_or(usize::MAX)
            .min(buf.len());
        let buf = buf.get_mut(..have).unwrap_or_default();
        self.storage
            .read_at(HostOffset::new(self.at), buf)
            .map_err(io::Error::other)?;
        self.at += have as u64;
        Ok(have)
    }
}
