//! Where the bytes of the disk are, and what they are under.

use diskmill_core::{
    Error, ErrorKind, Extent, FileIndex, Format, GuestOffset, HostOffset, HostSpan, Result, SecretError,
    State, Storage,
};

use super::KEY_SECRET;
use crate::crypt::DataCipher;

/// Bytes of the largest sector that is encrypted as a whole.
const SECTOR_MAX: usize = 4096;

/// The part of the file that is the disk, and the cipher it is under, if the key is known.
#[derive(Clone, Debug)]
pub(super) struct Payload {
    start: HostOffset,
    cipher: Option<DataCipher>,
}

impl Payload {
    /// The disk that begins at `start`.
    pub(super) fn new(start: HostOffset, cipher: Option<DataCipher>) -> Self {
        Self { start, cipher }
    }

    /// Where it begins in the file.
    pub(super) fn start(&self) -> HostOffset {
        self.start
    }

    /// The byte of the file that holds a byte of the disk.
    pub(super) fn host(&self, at: GuestOffset) -> Result<HostOffset> {
        self.start.plus(at.get())
    }

    /// The cipher. An error with [`SecretError::Missing`] if the key is not known.
    pub(super) fn cipher(&self) -> Result<&DataCipher> {
        self.cipher
            .as_ref()
            .ok_or_else(|| Error::from(SecretError::Missing(KEY_SECRET)).format(Format::Luks))
    }

    /// All of a disk of `size` bytes is stored, one run. What the host keeps as holes is no zeros: it reads as what the
    /// cipher makes of zeros.
    pub(super) fn extent(&self, size: u64, at: GuestOffset, max: u64) -> Result<Extent> {
        let left = size.saturating_sub(at.get());
        if left == 0 || max == 0 {
            return Err(Error::new(
                ErrorKind::Usage,
                format!("{max} bytes at {at} are not within the disk of {size} bytes"),
            ));
        }
        let len = max.min(left);
        Ok(Extent {
            len,
            state: State::Encrypted(HostSpan {
                file: FileIndex::MAIN,
                at: self.host(at)?,
                len,
            }),
        })
    }

    /// Fills `buf` from `at`. What a last sector lacks in the file is taken for zeros before it is decrypted.
    pub(super) fn read(&self, file: &dyn Storage, at: GuestOffset, buf: &mut [u8]) -> Result<()> {
        let sector = self.cipher()?.cipher().sector_len().clamp(1, SECTOR_MAX);
        let mut at = at;
        let mut rest = buf;
        while !rest.is_empty() {
            let within = usize::try_from(at.within(sector as u64)).unwrap_or(0);
            let whole = rest.len() - rest.len() % sector;
            let take = if within == 0 && whole > 0 {
                let (now, _) = rest.split_at_mut(whole);
                self.read_whole(file, at, now)?;
                whole
            } else {
                let mut one = [0; SECTOR_MAX];
                let (one, _) = one.split_at_mut(sector);
                self.read_whole(file, at.align_down(sector as u64), one)?;
                let (_, part) = one.split_at(within);
                let take = part.len().min(rest.len());
                let (now, _) = rest.split_at_mut(take);
                now.copy_from_slice(part.split_at(take).0);
                take
            };
            at = at.plus(take as u64)?;
            (_, rest) = rest.split_at_mut(take);
        }
        Ok(())
    }

    /// Fills `buf`, whole sectors, from `at`, where one begins.
    fn read_whole(&self, file: &dyn Storage, at: GuestOffset, buf: &mut [u8]) -> Result<()> {
        let host = self.host(at)?;
        file.read_padded(host, buf)?;
        self.cipher()?.decrypt(at, host, buf)
    }
}
