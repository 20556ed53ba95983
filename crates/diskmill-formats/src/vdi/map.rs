//! The block map: which slot of the file each block of the disk is in.

use diskmill_core::{
    Error, ErrorKind, Extent, FileIndex, Format, GuestOffset, HostOffset, HostSpan, Limits, Result, State,
    Storage,
};

use super::header::Header;
use super::layout::{BLOCK, BLOCK_BITS, FREE, ZERO};

/// Entries that one look at the map steps over.
const ENTRIES_PER_MAP: u64 = 64 << 10;

/// Why a block cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MapError {
    /// Its slot is one there cannot be.
    #[error("block {block} is in slot {slot}, must be below {limit}")]
    Slot {
        /// The block of the disk.
        block: u32,
        /// Its slot.
        slot: u32,
        /// Slots there can be.
        limit: u32,
    },
    /// Its slot is not in the file.
    #[error("block {block} is in slot {slot}, which runs past the end of the file at {file_len:#x}")]
    PastEnd {
        /// The block of the disk.
        block: u32,
        /// Its slot.
        slot: u32,
        /// Bytes of the file.
        file_len: u64,
    },
    /// The map takes more memory than allowed.
    #[error("the block map has {bytes} bytes, must have at most {most}")]
    TooLarge {
        /// Bytes of it.
        bytes: u64,
        /// Bytes that are allowed.
        most: u64,
    },
}

impl From<MapError> for Error {
    fn from(error: MapError) -> Self {
        let kind = match error {
            MapError::TooLarge { .. } => ErrorKind::Unsupported,
            _ => ErrorKind::Corrupt,
        };
        Error::new(kind, error).format(Format::Vdi)
    }
}

/// Where a block is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Never written.
    Free,
    /// Zeros by this image's word.
    Zero,
    /// In a slot.
    Slot(u32),
}

impl Entry {
    /// The entry as it is in the file.
    pub const fn from_raw(raw: u32) -> Self {
        match raw {
            FREE => Self::Free,
            ZERO => Self::Zero,
            slot => Self::Slot(slot),
        }
    }

    /// The entry as it is in the file.
    pub const fn to_raw(self) -> u32 {
        match self {
            Self::Free => FREE,
            Self::Zero => ZERO,
            Self::Slot(slot) => slot,
        }
    }
}

/// The entries of a map, by block.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BlockMap {
    entries: Vec<u32>,
}

impl BlockMap {
    /// Reads the map. The header has seen to it that it lies in the file.
    pub fn load(main: &dyn Storage, header: &Header, limits: &Limits) -> Result<Self> {
        let bytes = header.map_len();
        if bytes > limits.metadata_bytes {
            let most = limits.metadata_bytes;
            return Err(MapError::TooLarge { bytes, most }.into());
        }
        let mut entries = Vec::with_capacity(usize::try_from(header.blocks).unwrap_or(0));
        let mut at = HostOffset::new(header.blocks_offset.into());
        let mut left = bytes;
        let mut piece = vec![0; usize::try_from(bytes.min(BLOCK)).unwrap_or(0)];
        while left > 0 {
            let len = usize::try_from(left).unwrap_or(usize::MAX).min(piece.len());
            let part = piece.get_mut(..len).unwrap_or_default();
            main.read_at(at, part)
                .map_err(|error| error.op("read the block map"))?;
            entries.extend(
                part.as_chunks::<4>()
                    .0
                    .iter()
                    .map(|entry| u32::from_le_bytes(*entry)),
            );
            at = at.plus(len as u64)?;
            left -= len as u64;
        }
        Ok(Self { entries })
    }

    /// A map of `entries`.
    pub fn new(entries: Vec<u32>) -> Self {
        Self { entries }
    }

    /// How many blocks it has.
    pub fn len(&self) -> u32 {
        u32::try_from(self.entries.len()).unwrap_or(u32::MAX)
    }

    /// Whether it has no blocks at all.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Where a block is.
    pub fn get(&self, block: u32) -> Entry {
        let raw = usize::try_from(block)
            .ok()
            .and_then(|index| self.entries.get(index));
        Entry::from_raw(raw.copied().unwrap_or(FREE))
    }

    /// Says where a block is.
    pub fn set(&mut self, block: u32, entry: Entry) {
        if let Some(raw) = usize::try_from(block)
            .ok()
            .and_then(|index| self.entries.get_mut(index))
        {
            *raw = entry.to_raw();
        }
    }

    /// Gives it another length; new blocks are free.
    pub fn resize(&mut self, blocks: u32) {
        self.entries
            .resize(usize::try_from(blocks).unwrap_or(usize::MAX), FREE);
    }

    /// All blocks that have a slot.
    pub fn slots(&self) -> impl Iterator<Item = (u32, u32)> {
        let all = (0..).zip(self.entries.iter());
        all.filter_map(|(block, raw)| match Entry::from_raw(*raw) {
            Entry::Slot(slot) => Some((block, slot)),
            _ => None,
        })
    }

    /// The entries from block `first` on, at most `count`, as they are in the file; free ones behind the end.
    pub fn bytes(&self, first: u32, count: usize) -> Vec<u8> {
        let from = usize::try_from(first).unwrap_or(usize::MAX);
        let known = self.entries.get(from..).unwrap_or_default();
        let known = known.get(..count).unwrap_or(known);
        let mut bytes: Vec<u8> = known.iter().flat_map(|raw| raw.to_le_bytes()).collect();
        bytes.resize(count.saturating_mul(4), 0xff);
        bytes
    }

    /// Where block `block` is in a file of `file_len` bytes, or why it cannot be read.
    pub fn place(&self, block: u32, header: &Header, file_len: u64) -> Result<Place, MapError> {
        match self.get(block) {
            Entry::Free if header.is_diff() => Ok(Place::Absent),
            Entry::Free | Entry::Zero => Ok(Place::Zero),
            Entry::Slot(slot) => {
                let limit = header.slot_limit();
                if slot >= limit {
                    return Err(MapError::Slot { block, slot, limit });
                }
                let at = header.slot_at(slot);
                // Of the last block only what the disk has need be there.
                let rest = header.virtual_size().saturating_sub(u64::from(block) * BLOCK);
                match at.checked_add(rest.min(BLOCK)) {
                    Some(end) if end <= file_len => Ok(Place::At(HostOffset::new(at))),
                    _ => Err(MapError::PastEnd {
                        block,
                        slot,
                        file_len,
                    }),
                }
            }
        }
    }

    /// The run of one state from `at` on, at most `max` bytes.
    pub fn extent(&self, at: GuestOffset, max: u64, header: &Header, file_len: u64) -> Result<Extent> {
        let size = header.virtual_size();
        if at.get() >= size || max == 0 {
            return Err(Error::new(
                ErrorKind::Usage,
                format!("{max} bytes at {at} are not within the disk of {size} bytes"),
            ));
        }
        let max = max.min(size.saturating_sub(at.get()));
        let first = block_of(at);
        let found = self
            .place(first, header, file_len)
            .map_err(|error| Error::from(error).guest(at))?;
        let mut len = BLOCK.saturating_sub(at.within(BLOCK));
        let mut block = first;
        for step in 1..ENTRIES_PER_MAP {
            if len >= max {
                break;
            }
            block = block.saturating_add(1);
            // What comes before a block that cannot be read can be told all the same.
            let joins = match (self.place(block, header, file_len), found) {
                (Ok(Place::At(next)), Place::At(start)) => next.since(start) == step * BLOCK,
                (Ok(next), found) => next == found,
                (Err(_), _) => false,
            };
            if !joins {
                break;
            }
            len = len.saturating_add(BLOCK);
        }
        let len = len.min(max);
        let state = match found {
            Place::Absent => State::Absent,
            Place::Zero => State::Zero { reserved: None },
            Place::At(host) => State::Data(HostSpan {
                file: FileIndex::MAIN,
                at: host.plus(at.within(BLOCK))?,
                len,
            }),
        };
        Ok(Extent { len, state })
    }

    /// Fills `buf` from `at` with what is stored; what is absent becomes zeros.
    pub fn read(
        &self,
        main: &dyn Storage,
        at: GuestOffset,
        buf: &mut [u8],
        header: &Header,
        file_len: u64,
    ) -> Result<()> {
        let mut at = at;
        let mut rest = buf;
        while !rest.is_empty() {
            let extent = self.extent(at, rest.len() as u64, header, file_len)?;
            let len = usize::try_from(extent.len).unwrap_or(usize::MAX).min(rest.len());
            let (now, later) = rest.split_at_mut(len);
            match extent.state {
                State::Data(span) => main.read_at(span.at, now).map_err(|error| error.guest(at))?,
                _ => now.fill(0),
            }
            at = at.plus(len as u64)?;
            rest = later;
        }
        Ok(())
    }
}

/// Where a block is, by a map that can be believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In the parent.
    Absent,
    /// Nowhere: zeros.
    Zero,
    /// In the file.
    At(HostOffset),
}

/// The block a byte is in.
pub fn block_of(at: GuestOffset) -> u32 {
    u32::try_from(at.get() >> BLOCK_BITS).unwrap_or(u32::MAX)
}
