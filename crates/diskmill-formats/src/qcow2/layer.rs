//! Reading an image.

use std::sync::{Arc, OnceLock};

use diskmill_core::{
    DirtyRuns, Error, ErrorKind, Extent, Facts, FileIndex, Files, Format, GuestOffset, HostOffset, HostSpan,
    Layer, Limits, OpenSpec, Result, Role, State, Storage,
};

use super::bitmap;
use super::cache::{SLICE_BYTES, SliceCache};
use super::crypto::Sealing;
use super::header::{CompressionType, Header};
use super::hollow::RefcountPlace;
use super::map::{ClusterKind, Geometry, L1Entry, L2Entry};
use super::run::{RunKind, Scan, split_entry};
use super::snapshot;
use crate::codec::{Decoders, Packing, Scratch, read_clipped};

/// Bytes of L2 tables that one call of [`Layer::map`] may look at.
const L2_BYTES_PER_MAP: usize = 512 << 10;
/// L1 entries without a table that one call of [`Layer::map`] may step over.
const L1_PER_MAP: u32 = 64 << 10;

/// What is wrong with a place an entry or a header points to.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PlaceError {
    /// A structure that does not lie in the file.
    #[error("{what} at {at:#x} with {len} bytes runs past the end of the file at {file_len:#x}")]
    PastEnd {
        /// What it is.
        what: &'static str,
        /// Where it starts.
        at: u64,
        /// Its length.
        len: u64,
        /// The length of the file.
        file_len: u64,
    },
}

/// An image, open for reading.
#[derive(Debug)]
pub struct Qcow2Layer {
    facts: Facts,
    geometry: Geometry,
    files: Vec<Arc<dyn Storage>>,
    /// The file that holds the clusters.
    data: FileIndex,
    main_len: u64,
    data_len: u64,
    l1: Box<[L1Entry]>,
    cache: SliceCache,
    decoders: Decoders,
    sealing: Sealing,
    /// Where byte 0 is, as the encryption counts.
    base: GuestOffset,
    refcounts: RefcountPlace,
    hollow: OnceLock<bool>,
    header: Header,
    limits: Limits,
}

/// Opens an image for reading.
pub(super) fn attach(header: &Header, mut facts: Facts, files: Files, how: &OpenSpec) -> Result<Qcow2Layer> {
    super::check_options(how)?;
    let data = data_index(header, files.iter().map(|(role, _)| *role))?;
    let files: Vec<_> = files.into_iter().map(|(_, file)| file).collect();
    let main = files
        .first()
        .ok_or_else(|| Error::new(ErrorKind::Usage, "an image needs a file"))?;
    let main_len = main.len()?;
    let data_len = match files.get(usize::from(data.0)) {
        Some(file) => file.len()?,
        None => main_len,
    };
    let geometry = header.geometry();
    check_tables(header, main_len)?;
    let sealing = Sealing::of(header, main.as_ref(), how)?;
    let mut base = GuestOffset::ZERO;
    let l1 = match &how.snapshot {
        None => read_l1(
            main.as_ref(),
            header.l1_table_offset,
            geometry.l1_entries(header.virtual_size()),
        )?,
        Some(which) => {
            let (snapshots, _) = snapshot::read_table(main.as_ref(), header, &how.limits)?;
            let (_, found) = snapshot::find(&snapshots, which)?;
            let disk = geometry.l1_entries(found.checked_size()?);
            // Machine state begins with the first L1 entry that the disk does not need.
            let (first, size) = match how.machine_state {
                true => {
                    base = geometry.l1_start(disk);
                    (disk, found.facts.vm_state_size)
                }
                false => (0, found.checked_size()?),
            };
            let needed = first.saturating_add(geometry.l1_entries(size));
            snapshot::check_l1(geometry, found.l1_table_offset, found.l1_size, needed)?;
            within(
                "l1 table of a snapshot",
                found.l1_table_offset,
                needed.saturating_mul(8),
                main_len,
            )?;
            let first_at = found.l1_table_offset.saturating_add(first.saturating_mul(8));
            // Entries that are missing at the size of now are absent: the snapshot's table may go on with machine state.
            if how.machine_state || !how.present_size {
                facts.virtual_size = size;
            }
            read_l1(main.as_ref(), first_at, needed.saturating_sub(first))?
        }
    };
    Ok(Qcow2Layer {
        facts,
        geometry,
        data,
        main_len,
        data_len,
        l1,
        cache: SliceCache::new(slice_len(geometry)),
        decoders: decoders(header.compression_type, geometry),
        refcounts: RefcountPlace::new(header),
        hollow: OnceLock::new(),
        sealing,
        base,
        files,
        header: header.clone(),
        limits: how.limits,
    })
}

/// Which of the files holds the clusters.
pub(super) fn data_index(header: &Header, roles: impl Iterator<Item = Role>) -> Result<FileIndex> {
    if !header.has_data_file() {
        return Ok(FileIndex::MAIN);
    }
    for (index, role) in roles.enumerate() {
        if role == Role::Data {
            return Ok(FileIndex(u16::try_from(index).unwrap_or(u16::MAX)));
        }
    }
    Err(Error::new(ErrorKind::Usage, "'data-file' is required for this image").format(Format::Qcow2))
}

/// Fails if a table the header names does not lie in the file, which ends at `file_len`.
pub(super) fn check_tables(header: &Header, file_len: u64) -> Result<()> {
    let l1_len = u64::from(header.l1_size).saturating_mul(8);
    within("active l1 table", header.l1_table_offset, l1_len, file_len)?;
    if header.refcount_table_clusters == 0 {
        return Err(Error::new(
            ErrorKind::Malformed,
            "refcount_table_clusters is 0, must be at least 1",
        )
        .format(Format::Qcow2));
    }
    let clusters = u64::from(header.refcount_table_clusters);
    let len = clusters.saturating_mul(header.cluster_bits.cluster_size());
    // A table at the very end may have been cut behind its last used entry.
    let at = header.refcount_table_offset;
    match within("refcount table", at, len, file_len) {
        Err(_)
            if at.saturating_add(len).get().saturating_sub(file_len) < header.cluster_bits.cluster_size() =>
        {
            Ok(())
        }
        checked => checked,
    }
}

pub(super) fn within(what: &'static str, at: HostOffset, len: u64, file_len: u64) -> Result<()> {
    match at.checked_add(len) {
        Some(end) if end.get() <= file_len => Ok(()),
        _ => Err(past_end(what, at, len, file_len)),
    }
}

fn past_end(what: &'static str, at: HostOffset, len: u64, file_len: u64) -> Error {
    let error = PlaceError::PastEnd {
        what,
        at: at.get(),
        len,
        file_len,
    };
    Error::new(ErrorKind::Corrupt, error)
        .format(Format::Qcow2)
        .host(at)
}

/// Reads the `needed` entries of an L1 table that the disk needs: at most 4 Mi, which has been checked.
fn read_l1(main: &dyn Storage, at: HostOffset, needed: u64) -> Result<Box<[L1Entry]>> {
    let needed = usize::try_from(needed).map_err(|_| Error::bare(ErrorKind::Unsupported))?;
    let mut bytes = vec![0; needed.saturating_mul(8)];
    main.read_at(at, &mut bytes)
        .map_err(|error| error.op("read the l1 table"))?;
    let entries = bytes.as_chunks::<8>().0;
    Ok(entries
        .iter()
        .map(|entry| L1Entry(u64::from_be_bytes(*entry)))
        .collect())
}

/// Bytes of the part of an L2 table that is read at once.
fn slice_len(geometry: Geometry) -> usize {
    geometry.cluster_bits().cluster_len().min(SLICE_BYTES)
}

/// What the L1 table says of a guest byte.
enum Table {
    /// There is no L2 table.
    None,
    /// The entries from the byte's on, as far as they were read: at least one.
    Entries(Arc<[u8]>, usize),
}

impl Qcow2Layer {
    fn main(&self) -> Result<&Arc<dyn Storage>> {
        self.files.first().ok_or_else(|| Error::bare(ErrorKind::Usage))
    }

    fn data(&self) -> Result<&Arc<dyn Storage>> {
        self.files
            .get(usize::from(self.data.0))
            .ok_or_else(|| Error::bare(ErrorKind::Usage))
    }

    fn table(&self, at: GuestOffset) -> Result<Table> {
        let index = usize::try_from(self.geometry.l1_index(at)).unwrap_or(usize::MAX);
        let entry = self.l1.get(index).copied().unwrap_or_default();
        let Some(table) = entry.table(self.geometry)? else {
            return Ok(Table::None);
        };
        let slice_len = slice_len(self.geometry);
        let into = self.geometry.l2_index(at) << self.geometry.entry_bits();
        let slice_at = table.plus(into)?.align_down(slice_len as u64);
        let slice = self.cache.get(slice_at, || {
            if slice_at.saturating_add(slice_len as u64).get() > self.main_len {
                return Err(past_end(
                    "l2 table",
                    table,
                    self.geometry.cluster_size(),
                    self.main_len,
                ));
            }
            let mut bytes = vec![0; slice_len];
            self.main()?.read_at(slice_at, &mut bytes)?;
            Ok(Arc::from(bytes))
        })?;
        let from = usize::try_from(into % slice_len as u64).unwrap_or(0);
        Ok(Table::Entries(slice, from))
    }

    /// The run of one kind that starts at `at`.
    fn run(&self, at: GuestOffset, max: u64) -> Result<(RunKind, u64)> {
        let size = self.facts.virtual_size;
        if at.get() >= size || max == 0 {
            return Err(Error::new(
                ErrorKind::Usage,
                format!("{max} bytes at {at} are not within the disk of {size} bytes"),
            ));
        }
        let mut scan = Scan::new(self.geometry, at, max.min(size.saturating_sub(at.get())));
        let (mut seen, mut skipped) = (0_usize, 0);
        while !scan.is_done() && seen < L2_BYTES_PER_MAP && skipped < L1_PER_MAP {
            let before = scan.cursor();
            match self.table(before) {
                Ok(Table::None) => {
                    skipped = skipped.saturating_add(1);
                    scan.feed_no_table();
                }
                Ok(Table::Entries(slice, from)) => {
                    seen = seen.saturating_add(slice.len());
                    scan.feed(slice.get(from..).unwrap_or_default())?;
                }
                // What comes before an unreadable table can be told all the same.
                Err(_) if before > at => break,
                Err(error) => return Err(error.guest(at)),
            }
            if scan.cursor() == before {
                break;
            }
        }
        scan.finish()
            .ok_or_else(|| Error::bare(ErrorKind::Corrupt).guest(at))
    }

    /// Cuts a run of data where the file ends. Where it starts past the end, the data is lost.
    fn clip(&self, host: HostOffset, len: u64) -> Result<u64> {
        // A cluster may be cut short by the end of the file; the rest of it reads as zeros.
        let have = self.data_len.saturating_sub(host.get());
        let cluster_size = self.geometry.cluster_size();
        let into = host.within(cluster_size);
        let whole = have
            .saturating_add(into)
            .next_multiple_of(cluster_size)
            .saturating_sub(into);
        if host.get().saturating_sub(into) >= self.data_len {
            return Err(past_end("data cluster", host, cluster_size, self.data_len));
        }
        Ok(len.min(whole))
    }

    /// Reads clusters that are all compressed.
    fn read_compressed(&self, at: GuestOffset, buf: &mut [u8]) -> Result<()> {
        let mut scratch = self.decoders.take()?;
        let read = self.read_compressed_with(&mut scratch, at, buf);
        self.decoders.put(scratch);
        read
    }

    fn read_compressed_with(&self, scratch: &mut Scratch, at: GuestOffset, buf: &mut [u8]) -> Result<()> {
        let cluster_size = self.geometry.cluster_size();
        let end = at.plus(buf.len() as u64)?;
        let mut next = at.align_down(cluster_size);
        let mut spans = scratch.take_spans();
        while next < end {
            let Table::Entries(slice, from) = self.table(next)? else {
                return Err(Error::bare(ErrorKind::Corrupt).guest(next));
            };
            let entries = slice.get(from..).unwrap_or_default();
            for entry in entries.chunks_exact(self.geometry.entry_len()) {
                if next >= end {
                    break;
                }
                let entry = first_word(entry);
                if !entry.is_compressed() {
                    return Err(Error::bare(ErrorKind::Corrupt).guest(next));
                }
                spans.push(entry.span(self.geometry));
                next = next.plus(cluster_size)?;
            }
        }
        let storage = self.main()?;
        let file = (storage.as_ref(), self.main_len);
        let done = self.decoders.read(scratch, file, &spans, at, buf);
        scratch.keep_spans(spans);
        done
    }
}

impl Layer for Qcow2Layer {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn virtual_size(&self) -> u64 {
        self.facts.virtual_size
    }

    fn map(&self, at: GuestOffset, max: u64) -> Result<Extent> {
        let (kind, len) = self.run(at, max)?;
        let state = match kind {
            RunKind::Absent => State::Absent,
            RunKind::Zero(None) => State::Zero { reserved: None },
            RunKind::Zero(Some(host)) => State::Zero {
                reserved: Some(HostSpan {
                    file: self.data,
                    at: host,
                    len,
                }),
            },
            RunKind::Data(host) => {
                let len = self.clip(host, len).map_err(|error| error.guest(at))?;
                let span = HostSpan {
                    file: self.data,
                    at: host,
                    len,
                };
                let state = match self.sealing.is_encrypted() {
                    true => State::Encrypted(span),
                    false => State::Data(span),
                };
                return Ok(Extent { len, state });
            }
            RunKind::Compressed { low, high } => State::Compressed(HostSpan {
                file: FileIndex::MAIN,
                at: low,
                len: high.since(low),
            }),
        };
        Ok(Extent { len, state })
    }

    fn read_at(&self, at: GuestOffset, buf: &mut [u8]) -> Result<()> {
        let mut at = at;
        let mut rest = buf;
        while !rest.is_empty() {
            let (kind, len) = self.run(at, rest.len() as u64)?;
            let len = match kind {
                RunKind::Data(host) => self.clip(host, len).map_err(|error| error.guest(at))?,
                _ => len,
            };
            let len = usize::try_from(len).unwrap_or(usize::MAX).min(rest.len());
            let (now, later) = rest.split_at_mut(len);
            match kind {
                RunKind::Zero(_) => now.fill(0),
                RunKind::Data(host) => {
                    let data = self.data()?;
                    let read = |host, buf: &mut [u8]| read_clipped(data.as_ref(), self.data_len, host, buf);
                    self.sealing
                        .read(self.base.plus(at.get())?, host, now, read)
                        .map_err(|error| error.guest(at))?;
                }
                RunKind::Compressed { .. } => self.read_compressed(at, now)?,
                RunKind::Absent => {
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
        self.files.get(usize::from(index.0))
    }

    fn dirty(&self, name: &str) -> Result<Box<dyn DirtyRuns>> {
        bitmap::dirty(self.main()?, &self.header, &self.limits, name)
    }

    fn is_hollow(&self) -> Result<bool> {
        if let Some(hollow) = self.hollow.get() {
            return Ok(*hollow);
        }
        let hollow = self.refcounts.is_hollow(self.main()?.as_ref())?;
        Ok(*self.hollow.get_or_init(|| hollow))
    }

    fn kept(&self, at: GuestOffset, max: u64) -> Result<(Option<HostSpan>, u64)> {
        if !self.geometry.extended_l2() {
            return Ok((None, max));
        }
        let cluster_size = self.geometry.cluster_size();
        let mut len = 0;
        while len < max {
            let next = at.plus(len)?;
            let Table::Entries(slice, from) = self.table(next)? else {
                let covers = self.geometry.l1_entry_covers();
                len = len.saturating_add(covers.saturating_sub(next.within(covers)));
                continue;
            };
            let entries = slice.get(from..).unwrap_or_default();
            for entry in entries.chunks_exact(self.geometry.entry_len()) {
                let into = at.saturating_add(len).within(cluster_size);
                let rest = cluster_size.saturating_sub(into);
                match first_word(entry).kind(self.geometry)? {
                    ClusterKind::Normal(_) if len > 0 => return Ok((None, len.min(max))),
                    ClusterKind::Normal(host) => {
                        let len = rest.min(max);
                        let (file, at) = (self.data, host.plus(into)?);
                        return Ok((Some(HostSpan { file, at, len }), len));
                    }
                    _ => len = len.saturating_add(rest),
                }
            }
        }
        Ok((None, max))
    }
}

fn first_word(entry: &[u8]) -> L2Entry {
    match (entry.first_chunk::<16>(), entry.first_chunk::<8>()) {
        (Some(entry), _) => split_entry(entry).0,
        (None, Some(entry)) => L2Entry(u64::from_be_bytes(*entry)),
        (None, None) => L2Entry::UNALLOCATED,
    }
}

/// Decoders of the compressed clusters of an image.
pub(super) fn decoders(compression: CompressionType, geometry: Geometry) -> Decoders {
    let packing = match compression {
        CompressionType::Zlib => Packing::Deflate,
        CompressionType::Zstd => Packing::Zstd,
    };
    Decoders::new(packing, geometry.cluster_size(), Format::Qcow2)
}
