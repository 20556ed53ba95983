//! Several storages, one behind the other.
#![deny(clippy::missing_trait_methods)]

use std::io::ErrorKind as IoErrorKind;
use std::sync::Arc;

use diskmill_core::{Error, ErrorKind, Hints, HostOffset, HostRun, RawFile, Result, Storage};

/// The bytes of several storages, read as one. Their lengths must not change.
#[derive(Debug)]
pub struct Concat {
    /// Each with the offset of its end; none is empty.
    parts: Vec<(u64, Arc<dyn Storage>)>,
    len: u64,
}

impl Concat {
    /// `parts` in their order.
    pub fn new(parts: impl IntoIterator<Item = Arc<dyn Storage>>) -> Result<Self> {
        let mut len = 0u64;
        let mut known = Vec::new();
        for part in parts {
            let more = part.len()?;
            if more > 0 {
                len = len.checked_add(more).ok_or_else(|| {
                    Error::new(ErrorKind::Unsupported, "the parts are longer than 2^64 bytes")
                })?;
                known.push((len, part));
            }
        }
        Ok(Self { parts: known, len })
    }

    /// The part that has the byte at `at`, where that is in it, and the part's bytes from there on.
    fn part(&self, at: u64) -> Option<(&Arc<dyn Storage>, HostOffset, u64)> {
        let index = self.parts.partition_point(|(end, _)| *end <= at);
        let start = match index.checked_sub(1) {
            Some(before) => self.parts.get(before)?.0,
            None => 0,
        };
        let (end, part) = self.parts.get(index)?;
        Some((part, HostOffset::new(at - start), end - at))
    }
}

impl Storage for Concat {
    fn len(&self) -> Result<u64> {
        Ok(self.len)
    }

    fn is_empty(&self) -> Result<bool> {
        Ok(self.len == 0)
    }

    fn hints(&self) -> Hints {
        let mut hints = Hints::default();
        hints.fixed_len = true;
        for (_, part) in &self.parts {
            hints.request = hints.request.max(part.hints().request);
            hints.parallel = hints.parallel.max(part.hints().parallel);
        }
        hints
    }

    fn read_at(&self, at: HostOffset, buf: &mut [u8]) -> Result<()> {
        let mut at = at.get();
        let mut rest = buf;
        while !rest.is_empty() {
            let Some((part, from, room)) = self.part(at) else {
                let error = std::io::Error::from(IoErrorKind::UnexpectedEof);
                return Err(Error::from(error).host(HostOffset::new(at)));
            };
            let now = usize::try_from(room).unwrap_or(usize::MAX).min(rest.len());
            let (own, later) = rest.split_at_mut(now);
            part.read_at(from, own)?;
            at += now as u64;
            rest = later;
        }
        Ok(())
    }

    fn run_at(&self, at: HostOffset) -> Result<HostRun> {
        let Some((part, from, room)) = self.part(at.get()) else {
            return Ok(HostRun::Hole((u64::MAX - at.get()).max(1)));
        };
        Ok(match part.run_at(from)? {
            HostRun::Data(len) => HostRun::Data(len.min(room)),
            HostRun::Hole(len) => HostRun::Hole(len.min(room)),
            other => other,
        })
    }

    fn allocated(&self) -> Result<Option<u64>> {
        Ok(None)
    }

    fn raw_file(&self) -> Option<RawFile<'_>> {
        None
    }

    fn read_padded(&self, at: HostOffset, buf: &mut [u8]) -> Result<()> {
        let have = self.len.saturating_sub(at.get());
        let have = usize::try_from(have).unwrap_or(usize::MAX).min(buf.len());
        let (stored, rest) = buf.split_at_mut(have);
        rest.fill(0);
        if stored.is_empty() {
            return Ok(());
        }
        self.read_at(at, stored)
    }
}

#[cfg(test)]
mod tests {
    use diskmill_core::StorageMut;

    use super::*;
    use crate::Memory;

    fn memory(bytes: &[u8]) -> Arc<dyn Storage> {
        let memory = Memory::new();
        memory.write_at(HostOffset::ZERO, bytes).unwrap();
        Arc::new(memory)
    }

    #[test]
    fn reads_go_across_parts_and_not_past_the_end() {
        let all = Concat::new([memory(b"abc"), memory(b""), memory(b"d"), memory(b"efgh")]).unwrap();
        assert_eq!(all.len().unwrap(), 8);
        for start in 0..8usize {
            for end in start..=8 {
                let mut buf = vec![0; end - start];
                all.read_at(HostOffset::new(start as u64), &mut buf).unwrap();
                assert_eq!(buf, b"abcdefgh"[start..end]);
            }
        }
        let error = all.read_at(HostOffset::new(7), &mut [0; 2]).unwrap_err();
        assert_eq!(error.io_error().unwrap().kind(), IoErrorKind::UnexpectedEof);
        let mut buf = [1; 4];
        all.read_padded(HostOffset::new(6), &mut buf).unwrap();
        assert_eq!(buf, *b"gh\0\0");
        assert!(matches!(
            all.run_at(HostOffset::new(3)).unwrap(),
            HostRun::Data(1)
        ));
        assert!(matches!(
            all.run_at(HostOffset::new(8)).unwrap(),
            HostRun::Hole(_)
        ));
    }
}
