//! Compressed clusters: compressing what is stored plain, and packing streams back to back.

use std::collections::HashMap;
use std::thread;

use diskmill_core::{EncodedKind, Encoder, Error, ErrorKind, Format, HostOffset, Result};

use super::super::header::CompressionType;
use super::super::layer::decoders;
use super::super::map::{ClusterKind, CompressedSpan, L2Entry};
use super::super::slot::all;
use super::work::{Entry, Work};
use crate::codec::{Codec, Decoders, UnitEncoder};

/// Plain bytes that are compressed together.
const BATCH_BYTES: u64 = 8 << 20;
/// Threads that compress.
const THREADS: usize = 8;

/// Where the next stream goes: behind the last one, if that leaves room in its cluster.
#[derive(Debug, Default)]
pub(super) struct Packer {
    at: Option<u64>,
}

impl Packer {
    /// Takes a place for `len` bytes, at most a cluster, that `weight` things refer to; below cluster `limit`.
    fn place(&mut self, work: &mut Work<'_>, len: u64, weight: u64, limit: u64) -> Result<Option<u64>> {
        let bits = work.bits();
        if let Some(at) = self.at.take()
            && self.goes_on(work, at, len, weight, limit)?
        {
            self.end_at(at.saturating_add(len), bits);
            return Ok(Some(at));
        }
        let Some(first) = work.take_run(1, weight, limit)? else {
            return Ok(None);
        };
        let at = first << bits;
        self.end_at(at.saturating_add(len), bits);
        Ok(Some(at))
    }

    fn end_at(&mut self, end: u64, bits: u32) {
        self.at = (!end.is_multiple_of(1 << bits)).then_some(end);
    }

    /// Whether `len` bytes can go to `at`, in a cluster that holds others. If so, all they touch is counted.
    fn goes_on(&self, work: &mut Work<'_>, at: u64, len: u64, weight: u64, limit: u64) -> Result<bool> {
        let bits = work.bits();
        let (first, last) = (at >> bits, at.saturating_add(len).saturating_sub(1) >> bits);
        if !work.refcounts.add(&mut work.fence, first, weight)? {
            return Ok(false);
        }
        if last == first {
            work.note_fresh(first, weight);
            return Ok(true);
        }
        if last < limit && work.refcounts.take_one(&mut work.fence, last, weight)? {
            work.note_fresh(first, weight);
            work.note_fresh(last, weight);
            return Ok(true);
        }
        work.refcounts.sub(&mut work.fence, first, weight)?;
        Ok(false)
    }
}

/// A compressed cluster in the file. There may be many: 16 bytes.
#[derive(Clone, Copy, Debug)]
struct Stream {
    start: u64,
    /// Bytes it has at the most: fewer than two clusters.
    len: u32,
    /// How many references there are to it, or the largest number if that says too little.
    weight: u32,
}

impl Stream {
    fn new(span: CompressedSpan, weight: u64) -> Self {
        Self {
            start: span.at.get(),
            len: u32::try_from(span.len).unwrap_or(u32::MAX),
            weight: u32::try_from(weight).unwrap_or(u32::MAX),
        }
    }

    /// Where it ends at the latest.
    fn end(self) -> u64 {
        self.start.saturating_add(self.len.into())
    }
}

/// A cluster that is stored plain and might be compressed.
struct Plain {
    entry: Entry,
    host: HostOffset,
    weight: u64,
    shared: bool,
}

/// By host offset and subclusters: the entry that clusters which several tables refer to have become, if any.
type Shared = HashMap<(u64, u64), Option<L2Entry>>;

impl Work<'_> {
    /// Compresses what is stored plain.
    pub(super) fn compress(&mut self, level: Option<i32>) -> Result<()> {
        let codec = match self.header.compression_type {
            CompressionType::Zlib => Codec::deflate(level, self.cluster())?,
            CompressionType::Zstd => Codec::zstd(level)?,
        };
        if self.refcounts.max() < 2 {
            // Each stream would take a cluster of its own.
            return Ok(());
        }
        let mut packer = Packer::default();
        let mut shared = Shared::new();
        let mut entries = Vec::new();
        let mut batch = Vec::new();
        for (_, table) in self.l2_tables()? {
            let weight = self.count(table >> self.bits())?;
            self.read_l2(table, &mut entries)?;
            for (_, entry) in entries.drain(..) {
                let Some(plain) = self.candidate(entry, weight)? else {
                    continue;
                };
                batch.push(plain);
                if batch.len() as u64 >= BATCH_BYTES >> self.bits() {
                    self.compress_batch(&mut batch, codec, &mut packer, &mut shared)?;
                }
            }
        }
        self.compress_batch(&mut batch, codec, &mut packer, &mut shared)?;
        self.settle()?;
        if std::mem::take(&mut self.uneven) {
            self.refresh_copied()?;
        }
        Ok(())
    }

    fn candidate(&mut self, entry: Entry, weight: u64) -> Result<Option<Plain>> {
        let ClusterKind::Normal(host) = entry.word.kind(self.geometry)? else {
            return Ok(None);
        };
        let known = entry.subclusters.0 | entry.subclusters.0 >> 32;
        let whole = !self.geometry.extended_l2() || !self.backed() || known & 0xffff_ffff == 0xffff_ffff;
        if !whole {
            // What is below could no longer show through.
            return Ok(None);
        }
        let shared = self.count(host.get() >> self.bits())? != weight;
        Ok(Some(Plain {
            entry,
            host,
            weight,
            shared,
        }))
    }

    fn compress_batch(
        &mut self,
        batch: &mut Vec<Plain>,
        codec: Codec,
        packer: &mut Packer,
        shared: &mut Shared,
    ) -> Result<()> {
        self.job.check()?;
        let mut units = Vec::with_capacity(batch.len());
        for plain in batch.iter() {
            let key = (plain.host.get(), plain.entry.subclusters.0);
            units.push(match shared.contains_key(&key) {
                true => Vec::new(),
                false => self.read_plain(plain)?,
            });
        }
        let packed = encode_all(codec, units)?;
        for (plain, packed) in batch.drain(..).zip(packed) {
            let key = (plain.host.get(), plain.entry.subclusters.0);
            let entry = match shared.get(&key).copied() {
                Some(None) => None,
                // All references were counted when the first was met.
                Some(Some(entry)) if !self.geometry.extended_l2() => Some(entry),
                Some(Some(entry)) => self.refer_again(entry, plain.weight)?.then_some(entry),
                None => {
                    let count = match self.geometry.extended_l2() {
                        // Others may see other subclusters of it.
                        true => plain.weight,
                        false => self.count(plain.host.get() >> self.bits())?,
                    };
                    let entry = match packed {
                        None => None,
                        Some(bytes) => self.store(packer, &bytes, count, u64::MAX)?,
                    };
                    if plain.shared {
                        shared.insert(key, entry);
                    }
                    if entry.is_some() {
                        self.report.compressed_units = self.report.compressed_units.saturating_add(1);
                    }
                    entry
                }
            };
            self.job.observer.advance(self.cluster());
            let Some(entry) = entry else {
                continue;
            };
            self.switch(plain.entry.at, entry.0);
            if self.geometry.extended_l2() {
                self.switch(plain.entry.at.saturating_add(8), 0);
            }
            let cluster = plain.host.get() >> self.bits();
            if plain.shared {
                self.drop_late(cluster, plain.weight);
            } else {
                self.drop_with_batch(cluster, plain.weight);
            }
        }
        // What has been compressed makes room for what will be.
        self.commit()
    }

    /// A cluster as it reads.
    fn read_plain(&self, plain: &Plain) -> Result<Vec<u8>> {
        let mut unit = vec![0; self.geometry.cluster_bits().cluster_len()];
        self.main.read_padded(plain.host, &mut unit)?;
        if self.geometry.extended_l2() {
            let part_len = unit.len() / usize::try_from(all(self.geometry).count_ones()).unwrap_or(1);
            for (part, index) in unit.chunks_mut(part_len).zip(0_u32..) {
                if plain.entry.subclusters.0 >> index & 1 == 0 {
                    part.fill(0);
                }
            }
        }
        Ok(unit)
    }

    /// Writes a stream to a place below cluster `limit`, if there is one.
    fn store(
        &mut self,
        packer: &mut Packer,
        bytes: &[u8],
        weight: u64,
        limit: u64,
    ) -> Result<Option<L2Entry>> {
        let len = bytes.len() as u64;
        let Some((at, entry)) = self.place_stream(packer, len, weight, limit)? else {
            return Ok(None);
        };
        if !self.dry {
            self.main.write_at(HostOffset::new(at), bytes)?;
        }
        Ok(Some(entry))
    }

    fn place_stream(
        &mut self,
        packer: &mut Packer,
        len: u64,
        weight: u64,
        limit: u64,
    ) -> Result<Option<(u64, L2Entry)>> {
        let Some(at) = packer.place(self, len, weight, limit)? else {
            return Ok(None);
        };
        self.note_copied(len);
        if self.dry {
            self.reach(at.saturating_add(len))?;
        }
        let entry = L2Entry::compressed(HostOffset::new(at), len, self.geometry).ok_or_else(|| {
            let text = format!("a compressed cluster of {len} bytes at {at:#x} is too far into the file");
            Error::new(ErrorKind::NoSpace, text).format(Format::Qcow2)
        })?;
        Ok(Some((at, entry)))
    }

    /// The host clusters a stream touches: the first and the last.
    fn touched(&self, entry: L2Entry) -> (u64, u64) {
        let span = entry.span(self.geometry);
        let last = span.end().get().saturating_sub(1) >> self.bits();
        (span.at.get() >> self.bits(), last)
    }

    /// Counts `weight` more references to a stream. `false` if that cannot be counted.
    fn refer_again(&mut self, entry: L2Entry, weight: u64) -> Result<bool> {
        let (first, last) = self.touched(entry);
        for cluster in first..=last {
            if !self.refcounts.add(&mut self.fence, cluster, weight)? {
                for raised in first..cluster {
                    self.refcounts.sub(&mut self.fence, raised, weight)?;
                }
                return Ok(false);
            }
        }
        for cluster in first..=last {
            self.note_fresh(cluster, weight);
        }
        Ok(true)
    }

    /// All streams whose first and last cluster are `wanted`, in order.
    fn streams(&mut self, wanted: impl Fn(u64, u64) -> bool) -> Result<Vec<Stream>> {
        let mut entries = Vec::new();
        let mut streams = Vec::new();
        for (_, table) in self.l2_tables()? {
            let weight = self.count(table >> self.bits())?;
            self.read_l2(table, &mut entries)?;
            for (_, entry) in entries.drain(..).filter(|(_, entry)| entry.word.is_compressed()) {
                let (first, last) = self.touched(entry.word);
                if wanted(first, last) {
                    streams.push(Stream::new(entry.word.span(self.geometry), weight));
                }
            }
        }
        streams.sort_unstable_by_key(|stream| (stream.start, stream.len));
        streams.dedup_by(|next, stream| {
            let same = (next.start, next.len) == (stream.start, stream.len);
            if same {
                stream.weight = stream.weight.saturating_add(next.weight);
            }
            same
        });
        Ok(streams)
    }

    /// The clusters below `limit` that hold streams.
    pub(super) fn packed_clusters(&mut self, limit: u64) -> Result<Vec<u64>> {
        let bits = self.bits();
        let mut clusters = Vec::new();
        for stream in self.streams(|first, _| first < limit)? {
            clusters.extend(stream.start >> bits..=stream.end().saturating_sub(1) >> bits);
        }
        clusters.sort_unstable();
        clusters.dedup();
        Ok(clusters)
    }

    /// Packs streams anew that have few others beside them in their clusters.
    pub(super) fn repack(&mut self) -> Result<()> {
        let bits = self.bits();
        let max = self.refcounts.max();
        let streams = self.streams(|_, _| true)?;
        // Clusters, and the bytes of streams in each.
        let mut fills: Vec<(u64, u64)> = Vec::new();
        for (index, stream) in streams.iter().enumerate() {
            let start = stream.start;
            let next = streams.get(index.saturating_add(1));
            let next = next.map_or(u64::MAX, |next| next.start);
            let end = stream.end().min(next.max(start.saturating_add(1)));
            for cluster in start >> bits..=end.saturating_sub(1) >> bits {
                let from = start.max(cluster << bits);
                let to = end.min(cluster.saturating_add(1) << bits);
                match fills.last_mut() {
                    Some((last, bytes)) if *last == cluster => {
                        *bytes = bytes.saturating_add(to.saturating_sub(from));
                    }
                    _ => fills.push((cluster, to.saturating_sub(from))),
                }
            }
        }
        let cluster = self.cluster();
        fills.retain(|(_, bytes)| *bytes < cluster / 2);
        let bytes = fills
            .iter()
            .fold(0_u64, |sum, (_, bytes)| sum.saturating_add(*bytes));
        let mut counted = 0_u64;
        for (cluster, _) in &fills {
            counted = counted.saturating_add(self.count(*cluster)?);
        }
        // Streams that run over count twice, and the last cluster is not full.
        let needed = bytes
            .div_ceil(cluster)
            .max(counted.saturating_mul(2).div_ceil(max))
            .saturating_add(2);
        let sparse: Vec<u64> = fills.into_iter().map(|(cluster, _)| cluster).collect();
        let held = sparse.len() as u64;
        if needed.saturating_add(held / 8) >= held {
            return Ok(());
        }
        let is_sparse = |cluster: u64| sparse.binary_search(&cluster).is_ok();
        self.move_streams(u64::MAX, |first, last| is_sparse(first) || is_sparse(last))
    }

    /// Moves the streams whose first and last cluster are `wanted` to places below cluster `limit`.
    pub(super) fn move_streams(&mut self, limit: u64, wanted: impl Fn(u64, u64) -> bool) -> Result<()> {
        let tables = self.l2_tables()?;
        let mut entries = Vec::new();
        let streams = self.streams(&wanted)?;
        if streams.is_empty() {
            return Ok(());
        }
        let decoders = decoders(self.header.compression_type, self.geometry);
        let mut packer = Packer::default();
        let mut moved: HashMap<u64, Option<L2Entry>> = HashMap::new();
        for (_, table) in tables {
            let weight = self.count(table >> self.bits())?;
            self.read_l2(table, &mut entries)?;
            for (_, entry) in entries.drain(..) {
                let (first, last) = self.touched(entry.word);
                if !entry.word.is_compressed() || !wanted(first, last) {
                    continue;
                }
                let new = match moved.get(&entry.word.0).copied() {
                    Some(known) => known,
                    None => {
                        let (new, count) =
                            self.move_stream(entry.word, &streams, &decoders, &mut packer, limit)?;
                        if count != weight {
                            moved.insert(entry.word.0, new);
                        }
                        new
                    }
                };
                if let Some(new) = new {
                    self.switch(entry.at, new.0);
                    for cluster in first..=last {
                        self.drop_with_batch(cluster, weight);
                    }
                }
            }
            self.commit_if_many()?;
        }
        self.settle()
    }

    /// Moves a stream, with all the references there are to it: what it has become, if there was room, and how many
    /// references that is.
    fn move_stream(
        &mut self,
        word: L2Entry,
        streams: &[Stream],
        decoders: &Decoders,
        packer: &mut Packer,
        limit: u64,
    ) -> Result<(Option<L2Entry>, u64)> {
        let span = word.span(self.geometry);
        // An entry only says in which sector a stream ends; where the next one begins it is over.
        let next = streams.partition_point(|stream| stream.start <= span.at.get());
        let weight = streams
            .get(next.saturating_sub(1))
            .filter(|stream| (stream.start, stream.end()) == (span.at.get(), span.end().get()))
            .filter(|stream| stream.weight < u32::MAX)
            .map(|stream| u64::from(stream.weight));
        let Some(weight) = weight else {
            // Two streams begin in one place, or it has more references than any image: no writer does that.
            return Ok((None, 0));
        };
        let next = streams.get(next).map_or(u64::MAX, |stream| stream.start);
        let end = span
            .end()
            .get()
            .min(next)
            .min(span.at.get().saturating_add(self.cluster()));
        let len = end.saturating_sub(span.at.get());
        let mut bytes = Vec::new();
        if !self.dry {
            bytes.resize(usize::try_from(len).unwrap_or(0), 0);
            self.main.read_padded(span.at, &mut bytes)?;
            let tight = CompressedSpan { at: span.at, len };
            let mut cluster = vec![0; self.geometry.cluster_bits().cluster_len()];
            let file_len = self.main.len()?;
            if decoders
                .read_unit(self.main.as_ref(), file_len, tight, &mut cluster)
                .is_err()
            {
                // It is damaged, or ends where none should. It stays.
                return Ok((None, 0));
            }
        }
        let Some((at, entry)) = self.place_stream(packer, len, weight, limit)? else {
            return Ok((None, 0));
        };
        if !self.dry {
            self.main.write_at(HostOffset::new(at), &bytes)?;
        }
        self.job.observer.advance(len);
        self.report.moved = self.report.moved.saturating_add(len);
        Ok((Some(entry), weight))
    }
}

/// Compresses units, several at once. `None` for one that does not get smaller, and for empty ones.
fn encode_all(codec: Codec, mut units: Vec<Vec<u8>>) -> Result<Vec<Option<Vec<u8>>>> {
    let threads = thread::available_parallelism()
        .map_or(1, usize::from)
        .min(THREADS);
    let share = units.len().div_ceil(threads).max(1);
    let mut packed: Vec<Option<Vec<u8>>> = Vec::new();
    packed.resize_with(units.len(), || None);
    thread::scope(|scope| {
        let mut running = Vec::new();
        let mut result = Ok(());
        for (units, packed) in units.chunks_mut(share).zip(packed.chunks_mut(share)) {
            running.push(scope.spawn(move || encode_share(codec, units, packed)));
        }
        for thread in running {
            let done = thread
                .join()
                .unwrap_or_else(|_| Err(Error::new(ErrorKind::Io, "a thread that compressed has panicked")));
            result = result.and(done);
        }
        result
    })?;
    Ok(packed)
}

fn encode_share(codec: Codec, units: &mut [Vec<u8>], packed: &mut [Option<Vec<u8>>]) -> Result<()> {
    let mut encoder = UnitEncoder::new(Some(codec))?;
    let mut scratch = Vec::new();
    for (unit, packed) in units.iter_mut().zip(packed) {
        let unit = std::mem::take(unit);
        if unit.is_empty() {
            continue;
        }
        if let EncodedKind::Packed { len } = encoder.pack(&unit, &mut scratch)? {
            *packed = scratch.get(..len).map(<[u8]>::to_vec);
        }
    }
    Ok(())
}
