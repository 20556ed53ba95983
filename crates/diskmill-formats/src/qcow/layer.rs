//! Reading an image.

use std::sync::Arc;

use diskmill_core::{
    Error, ErrorKind, Extent, Facts, FileIndex, Format, GuestOffset, HostOffset, HostSpan, Layer, OpenSpec,
    Result, SECTOR, State, Storage,
};

use super::header::Header;
use super::key::Key;
use super::layout::COMPRESSED;
use super::map::{Geometry, L2Entry, MapError};
use crate::bounds::within;
use crate::codec::{Decoders, PackedSpan, Packing, read_clipped};
use crate::crypt::DataCipher;
use crate::tree::{self, Kind, TableCache};

/// An image, open for reading.
#[derive(Debug)]
pub struct QcowLayer {
    facts: Facts,
    geometry: Geometry,
    tree: tree::Geometry,
    file: Arc<dyn Storage>,
    file_len: u64,
    l1: Vec<u64>,
    cache: TableCache,
    decoders: Decoders,
    key: Option<Key>,
}

/// Bytes of the L1 table that are read at once: it may have 2 GiB, which need not be held twice.
const L1_PIECE: u64 = 1 << 20;

/// Reads the L1 table, which the header has found to be in the file.
pub(super) fn read_l1(header: &Header, main: &dyn Storage, how: &OpenSpec) -> Result<Vec<u64>> {
    let (bytes, most) = (header.l1_len(), how.limits.metadata_bytes);
    if bytes > most {
        let text = format!("the L1 table has {bytes} bytes, must have at most {most}");
        return Err(Error::new(ErrorKind::Unsupported, text).format(Format::Qcow));
    }
    let mut l1 = Vec::with_capacity(usize::try_from(header.l1_entries()).unwrap_or(0));
    let mut piece = vec![0; usize::try_from(bytes.min(L1_PIECE)).unwrap_or(0)];
    let mut done = 0;
    while done < bytes {
        let len = usize::try_from(bytes.saturating_sub(done)).unwrap_or(usize::MAX);
        piece.truncate(len);
        main.read_at(header.l1_table_offset.plus(done)?, &mut piece)
            .map_err(|error| error.op("read the L1 table"))?;
        let entries = piece.as_chunks::<8>().0.iter();
        l1.extend(entries.map(|entry| u64::from_be_bytes(*entry)));
        done = done.saturating_add(piece.len() as u64);
    }
    Ok(l1)
}

/// The place of a table, if `entry` names one that lies in the file.
pub(super) fn table_place(
    entry: u64,
    geometry: Geometry,
    file_len: u64,
) -> Result<Option<HostOffset>, MapError> {
    if entry == 0 {
        return Ok(None);
    }
    if entry & COMPRESSED != 0 {
        return Err(MapError::Table(entry));
    }
    let len = geometry.l2_len();
    match entry.checked_add(len) {
        Some(end) if end <= file_len => Ok(Some(HostOffset::new(entry))),
        _ => Err(MapError::PastEnd {
            what: "an L2 table",
            at: entry,
            len,
            file_len,
        }),
    }
}

/// What the bytes of an entry say.
pub(super) fn entry_kind(entry: &[u8], geometry: Geometry) -> Result<Kind> {
    let entry = entry.first_chunk().copied().map(u64::from_be_bytes).unwrap_or(0);
    Ok(L2Entry(entry).kind(geometry)?)
}

/// Of a run of `len` bytes of data at `host` as much as clusters have that lie in the file at least in part.
pub(super) fn clip(host: HostOffset, into: u64, len: u64, geometry: Geometry, file_len: u64) -> Result<u64> {
    let start = host.get().saturating_sub(into);
    let cluster_size = geometry.cluster_size();
    if start >= file_len {
        return Err(MapError::PastEnd {
            what: "a data cluster",
            at: start,
            len: cluster_size,
            file_len,
        }
        .into());
    }
    let whole = file_len
        .saturating_sub(start)
        .checked_next_multiple_of(cluster_size)
        .unwrap_or(u64::MAX);
    Ok(len.min(whole.saturating_sub(into)))
}

/// Reads data of the disk from `guest` on that is stored at `host`, and decrypts it; what the file, which ends at
/// `file_len`, does not have is zeros.
pub(super) fn read_data(
    (file, file_len): (&dyn Storage, u64),
    cipher: Option<&DataCipher>,
    host: HostOffset,
    guest: GuestOffset,
    buf: &mut [u8],
) -> Result<()> {
    let Some(cipher) = cipher else {
        return read_clipped(file, file_len, host, buf);
    };
    let (front, len) = (guest.within(SECTOR), buf.len() as u64);
    if front == 0 && len.is_multiple_of(SECTOR) {
        read_clipped(file, file_len, host, buf)?;
        return cipher.decrypt(guest, host, buf);
    }
    // Whole sectors around what is wanted.
    let whole = front.saturating_add(len).next_multiple_of(SECTOR);
    let mut sectors = vec![0; usize::try_from(whole).unwrap_or(0)];
    let host = HostOffset::new(host.get().saturating_sub(front));
    read_clipped(file, file_len, host, &mut sectors)?;
    cipher.decrypt(guest.align_down(SECTOR), host, &mut sectors)?;
    let from = usize::try_from(front).unwrap_or(usize::MAX);
    if let Some(part) = sectors.get(from..).and_then(|rest| rest.get(..buf.len())) {
        buf.copy_from_slice(part);
    }
    Ok(())
}

/// Decoders of the compressed clusters of an image.
pub(super) fn decoders(geometry: Geometry) -> Decoders {
    Decoders::new(Packing::Deflate, geometry.cluster_size(), Format::Qcow)
}

impl QcowLayer {
    pub(super) fn open(
        header: &Header,
        facts: Facts,
        file: Arc<dyn Storage>,
        how: &OpenSpec,
    ) -> Result<Self> {
        let geometry = header.geometry;
        let l1 = read_l1(header, file.as_ref(), how)?;
        let len = usize::try_from(geometry.l2_len()).unwrap_or(usize::MAX);
        Ok(Self {
            tree: geometry.tree(header.virtual_size()),
            file_len: file.len()?,
            cache: TableCache::new(l1.len(), len),
            decoders: decoders(geometry),
            key: Key::of(header.crypt, how)?,
            facts,
            geometry,
            file,
            l1,
        })
    }

    fn table(&self, index: usize) -> Result<Option<Arc<[u8]>>> {
        let entry = self.l1.get(index).copied().unwrap_or(0);
        let Some(at) = table_place(entry, self.geometry, self.file_len)? else {
            return Ok(None);
        };
        let load = || {
            let mut bytes = vec![0; self.tree.table_len()];
            self.file.read_at(at, &mut bytes)?;
            Ok(bytes.into())
        };
        self.cache.get(index, load).map(Some)
    }

    fn run(&self, at: GuestOffset, max: u64) -> Result<(Kind, u64)> {
        let size = self.tree.disk;
        if at.get() >= size || max == 0 {
            return Err(Error::new(
                ErrorKind::Usage,
                format!("{max} bytes at {at} are not within the disk of {size} bytes"),
            ));
        }
        let max = max.min(size.saturating_sub(at.get()));
        let kind = |entry: &[u8]| entry_kind(entry, self.geometry);
        let found = tree::scan(&self.tree, at.get(), max, &mut |index| self.table(index), &kind);
        let (kind, len) = found.map_err(|error| error.guest(at))?;
        let len = match kind {
            Kind::Data(host) => {
                let into = at.within(self.geometry.cluster_size());
                clip(host, into, len, self.geometry, self.file_len).map_err(|error| error.guest(at))?
            }
            _ => len,
        };
        Ok((kind, len))
    }

    /// Where the compressed cluster of byte `at` is.
    fn span(&self, at: GuestOffset) -> Result<PackedSpan> {
        let (index, slot) = self.tree.locate(at.get());
        let table = self.table(index)?;
        let entries = table.as_deref().map_or(&[][..], |table| table.as_chunks::<8>().0);
        let entry = L2Entry(entries.get(slot).map_or(0, |entry| u64::from_be_bytes(*entry)));
        match entry.kind(self.geometry)? {
            Kind::Packed(_) => Ok(entry.span(self.geometry)),
            _ => Err(Error::bare(ErrorKind::Corrupt).guest(at)),
        }
    }

    /// Reads clusters that are all compressed.
    fn read_packed(&self, at: GuestOffset, buf: &mut [u8]) -> Result<()> {
        let end = at.plus(buf.len() as u64)?;
        let mut scratch = self.decoders.take()?;
        let mut spans = scratch.take_spans();
        let mut next = at.align_down(self.geometry.cluster_size());
        while next < end {
            spans.push(self.span(next)?);
            next = next.plus(self.geometry.cluster_size())?;
        }
        let file = (self.file.as_ref(), self.file_len);
        let read = self.decoders.read(&mut scratch, file, &spans, at, buf);
        scratch.keep_spans(spans);
        self.decoders.put(scratch);
        read
    }
}

impl Layer for QcowLayer {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn virtual_size(&self) -> u64 {
        self.tree.disk
    }

    fn map(&self, at: GuestOffset, max: u64) -> Result<Extent> {
        let (kind, len) = self.run(at, max)?;
        let file = FileIndex::MAIN;
        let state = match kind {
            Kind::Absent | Kind::Zero => State::Absent,
            Kind::Data(at) if self.key.is_some() => State::Encrypted(HostSpan { file, at, len }),
            Kind::Data(at) => State::Data(HostSpan { file, at, len }),
            Kind::Packed(host) => State::Compressed(HostSpan {
                file,
                at: host,
                len: self.span(at)?.len,
            }),
        };
        Ok(Extent { len, state })
    }

    fn read_at(&self, at: GuestOffset, buf: &mut [u8]) -> Result<()> {
        within(at, buf.len() as u64, self.tree.disk)?;
        let mut at = at;
        let mut rest = buf;
        while !rest.is_empty() {
            let (kind, len) = self.run(at, rest.len() as u64)?;
            let len = usize::try_from(len).unwrap_or(usize::MAX).min(rest.len());
            let (now, later) = rest.split_at_mut(len);
            match kind {
                Kind::Data(host) => {
                    let cipher = self.key.as_ref().map(Key::get).transpose()?;
                    let file = (self.file.as_ref(), self.file_len);
                    read_data(file, cipher.map(AsRef::as_ref), host, at, now)
                        .map_err(|error| error.guest(at))?;
                }
                Kind::Packed(_) => self.read_packed(at, now)?,
                Kind::Absent | Kind::Zero => {
                    return Err(
                        Error::new(ErrorKind::Usage, "these bytes are the backing image's").guest(at),
                    );
                }
            }
            at = at.plus(len as u64)?;
            rest = later;
        }
        Ok(())
    }

    fn file(&self, index: FileIndex) -> Option<&Arc<dyn Storage>> {
        (index == FileIndex::MAIN).then_some(&self.file)
    }
}
