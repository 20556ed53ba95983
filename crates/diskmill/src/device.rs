//! A disk that several threads read and write at the same time.
//!
//! Requests that overlap wait for one another as sectors of a real disk would have them: readers share a range, a
//! writer has it alone. A disk that is only read never waits.

use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use diskmill_core::{Chain, Error, ErrorKind, GuestOffset, Layer, LayerMut, Resolved, Result, ZeroHow};

use crate::open::{Image, ImageMut};

/// A chain of images, of which the top one may be writable.
#[derive(Debug)]
pub struct Device {
    /// All layers, for reading.
    chain: Chain,
    writer: Option<Writer>,
}

#[derive(Debug)]
struct Writer {
    top: Arc<dyn LayerMut>,
    below: Chain,
    locks: RangeLocks,
}

impl From<Image> for Device {
    fn from(image: Image) -> Self {
        Self {
            chain: image.chain,
            writer: None,
        }
    }
}

impl From<ImageMut> for Device {
    fn from(image: ImageMut) -> Self {
        let mut layers: Vec<Arc<dyn Layer>> = vec![image.top.clone()];
        layers.extend(image.below.layers().iter().cloned());
        Self {
            chain: Chain::new(layers),
            writer: Some(Writer {
                top: image.top,
                below: image.below,
                locks: RangeLocks::default(),
            }),
        }
    }
}

impl Device {
    /// The size of the disk in bytes, as it is now.
    pub fn size(&self) -> u64 {
        self.chain.virtual_size()
    }

    /// Whether it may be written.
    pub fn is_writable(&self) -> bool {
        self.writer.is_some()
    }

    /// What the bytes from `at` are; see [`Chain::map`].
    pub fn map(&self, at: GuestOffset, max: u64) -> Result<Resolved> {
        let end = at.saturating_add(max);
        let _held = self.hold(at..end, Hold::Shared);
        self.chain.map(at, max)
    }

    /// Fills `buf` from `at`. An error of kind [`ErrorKind::Usage`] if that is past the end.
    pub fn read_at(&self, at: GuestOffset, buf: &mut [u8]) -> Result<()> {
        let range = self.range(at, buf.len() as u64)?;
        let _held = self.hold(range, Hold::Shared);
        self.chain.read_at(at, buf)
    }

    /// Writes `buf` at `at`. An error of kind [`ErrorKind::Denied`] if the disk is only read.
    pub fn write_at(&self, at: GuestOffset, buf: &[u8]) -> Result<()> {
        let range = self.range(at, buf.len() as u64)?;
        let writer = self.writer()?;
        let _held = self.hold(range, Hold::Alone);
        writer.top.write_at(at, buf, &writer.below)
    }

    /// Makes `range` read as zeros. An error of kind [`ErrorKind::Denied`] if the disk is only read.
    pub fn zero(&self, range: Range<GuestOffset>, how: ZeroHow) -> Result<()> {
        let range = self.range(range.start, range.end.since(range.start))?;
        let writer = self.writer()?;
        let _held = self.hold(range.clone(), Hold::Alone);
        writer.top.zero(range, how, &writer.below)
    }

    /// Tells the image that the bytes of `range` are not needed. An error of kind [`ErrorKind::Denied`] if the disk is
    /// only read.
    pub fn discard(&self, range: Range<GuestOffset>) -> Result<()> {
        let range = self.range(range.start, range.end.since(range.start))?;
        let writer = self.writer()?;
        let _held = self.hold(range.clone(), Hold::Alone);
        writer.top.discard(range)
    }

    /// Returns when all that was written is durable.
    pub fn flush(&self) -> Result<()> {
        match &self.writer {
            Some(writer) => writer.top.flush(),
            None => Ok(()),
        }
    }

    fn writer(&self) -> Result<&Writer> {
        self.writer
            .as_ref()
            .ok_or_else(|| Error::new(ErrorKind::Denied, "the disk was opened for reading only"))
    }

    fn range(&self, at: GuestOffset, len: u64) -> Result<Range<GuestOffset>> {
        match at.checked_add(len) {
            Some(end) if end.get() <= self.size() => Ok(at..end),
            _ => Err(Error::new(
                ErrorKind::Usage,
                format!(
                    "{len} bytes at {at} are not within the disk of {} bytes",
                    self.size()
                ),
            )),
        }
    }

    fn hold(&self, range: Range<GuestOffset>, how: Hold) -> Option<Held<'_>> {
        self.writer.as_ref().map(|writer| writer.locks.hold(range, how))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hold {
    Shared,
    Alone,
}

/// Ranges that are being read or written.
#[derive(Debug, Default)]
struct RangeLocks {
    held: Mutex<Vec<(Range<GuestOffset>, Hold)>>,
    freed: Condvar,
}

/// A range until it is dropped.
#[derive(Debug)]
struct Held<'a> {
    locks: &'a RangeLocks,
    range: Range<GuestOffset>,
    how: Hold,
}

impl RangeLocks {
    fn hold(&self, range: Range<GuestOffset>, how: Hold) -> Held<'_> {
        let conflicts = |(other, held): &(Range<GuestOffset>, Hold)| {
            let overlap = other.start < range.end && range.start < other.end;
            overlap && (how == Hold::Alone || *held == Hold::Alone)
        };
        let held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let mut held = self
            .freed
            .wait_while(held, |held| held.iter().any(conflicts))
            .unwrap_or_else(PoisonError::into_inner);
        held.push((range.clone(), how));
        Held {
            locks: self,
            range,
            how,
        }
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let mut held = self.locks.held.lock().unwrap_or_else(PoisonError::into_inner);
        let mine = |(range, how): &(Range<GuestOffset>, Hold)| *range == self.range && *how == self.how;
        if let Some(index) = held.iter().position(mine) {
            held.swap_remove(index);
        }
        drop(held);
        self.locks.freed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread;

    use super::*;
    use crate::open::{self, OpenRequest};
    use crate::spec::ImageSpec;

    fn offset(at: u64) -> GuestOffset {
        GuestOffset::new(at)
    }

    fn request(len: u64) -> (tempfile::NamedTempFile, OpenRequest) {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(len).unwrap();
        let mut request = OpenRequest::new(ImageSpec::from_path(file.path()));
        request.format = Some("raw".to_owned());
        (file, request)
    }

    #[test]
    fn what_is_written_is_read_and_the_end_is_the_end() {
        let (_file, request) = request(1 << 20);
        let device = Device::from(open::image_mut(&request).unwrap());
        assert!(device.is_writable());
        device.write_at(offset(1000), &[7; 3000]).unwrap();
        device
            .zero(offset(2000)..offset(2100), ZeroHow::MayUnmap)
            .unwrap();
        device.flush().unwrap();
        let mut buf = [1; 3000];
        device.read_at(offset(1000), &mut buf).unwrap();
        assert!(buf[..1000].iter().all(|byte| *byte == 7));
        assert_eq!(buf[1000..1100], [0; 100]);
        for (at, len) in [(1 << 20, 1), ((1 << 20) - 1, 2), (u64::MAX, 1)] {
            let error = device.write_at(offset(at), &vec![0; len]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Usage, "{at} {len}");
        }
    }

    #[test]
    fn a_disk_that_is_read_is_not_written() {
        let (_file, request) = request(4096);
        let device = Device::from(open::image(&request).unwrap());
        assert!(!device.is_writable());
        assert_eq!(
            device.write_at(offset(0), &[1]).unwrap_err().kind(),
            ErrorKind::Denied
        );
        let range = offset(0)..offset(512);
        assert_eq!(device.discard(range).unwrap_err().kind(), ErrorKind::Denied);
    }

    #[test]
    fn a_writer_waits_for_readers_of_its_range_only() {
        let locks = RangeLocks::default();
        let reader = locks.hold(offset(0)..offset(10), Hold::Shared);
        let _other_reader = locks.hold(offset(5)..offset(10), Hold::Shared);
        drop(locks.hold(offset(10)..offset(20), Hold::Alone));
        let written = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                let _writer = locks.hold(offset(0)..offset(5), Hold::Alone);
                written.store(true, Ordering::SeqCst);
            });
            assert!(!written.load(Ordering::SeqCst));
            drop(reader);
        });
        assert!(written.load(Ordering::SeqCst));
        assert_eq!(locks.held.lock().unwrap().len(), 1);
    }

    #[test]
    fn overlapping_writes_are_whole() {
        let (_file, request) = request(8192);
        let device = Device::from(open::image_mut(&request).unwrap());
        thread::scope(|scope| {
            for byte in 1..=4 {
                let device = &device;
                scope.spawn(move || {
                    for _ in 0..200 {
                        device.write_at(offset(512), &[byte; 6000]).unwrap();
                        let mut buf = [0; 6000];
                        device.read_at(offset(512), &mut buf).unwrap();
                        assert!(buf.iter().all(|other| *other == buf[0]));
                    }
                });
            }
        });
    }
}
