//! Encrypting sectors, many at once.
//!
//! A cipher runs at full speed only when it is given many blocks at a time, so sectors are taken in batches that stay
//! in the processor's first cache: their tweaks are encrypted together, and where a mode chains the blocks of a sector
//! (CBC encryption) the batch goes forward block by block in all sectors at once.

use std::fmt;

use diskmill_core::{Error, ErrorKind, Result};
use zeroize::Zeroizing;

use super::CryptError;
use super::block::{BlockCipher, keyed};
use super::cipher::{CipherMode, CipherSpec, IvGen};

/// Bytes of a batch.
const BATCH: usize = 8 << 10;
/// Bytes of the smallest sector.
const SMALLEST: usize = 512;
/// Sectors of a batch, at most.
const LANES: usize = BATCH / SMALLEST;
/// Bytes of the longest block.
const BLOCK: usize = 16;

/// A cipher with its key, for sectors by number. Keys are wiped when it is dropped.
pub struct SectorCipher {
    spec: CipherSpec,
    data: Box<dyn BlockCipher>,
    /// Encrypts tweaks (XTS).
    tweak: Option<Box<dyn BlockCipher>>,
    /// Encrypts sector numbers (ESSIV).
    essiv: Option<Box<dyn BlockCipher>>,
    /// Bytes of a sector.
    sector_len: usize,
    /// The number of the sector that callers call 0.
    base: u64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Encrypt,
    Decrypt,
}

impl SectorCipher {
    /// The cipher `spec` with `key`, for sectors of 512 bytes. An error if the key's length does not suit.
    pub fn new(spec: CipherSpec, key: &[u8]) -> Result<Self, CryptError> {
        Self::with_sectors_of(spec, key, SMALLEST)
    }

    /// The same for sectors of `sector_len` bytes: 512, 1024, 2048 or 4096. They are still numbered by 512 bytes.
    pub fn with_sectors_of(spec: CipherSpec, key: &[u8], sector_len: usize) -> Result<Self, CryptError> {
        if ![512, 1024, 2048, 4096].contains(&sector_len) {
            return Err(CryptError::SectorLen(sector_len as u64));
        }
        if key.len() != spec.key_len() {
            return Err(CryptError::KeyLen {
                cipher: spec.alg().family().to_owned(),
                len: key.len(),
            });
        }
        let (data, tweak) = match spec.mode() {
            CipherMode::Xts => {
                let (data, tweak) = key.split_at(spec.alg().key_len());
                (data, Some(keyed(spec.alg(), tweak)?))
            }
            _ => (key, None),
        };
        let essiv = match spec.essiv() {
            Some((alg, hash)) => Some(keyed(alg, &hash.digest(&[key]))?),
            None => None,
        };
        Ok(Self {
            spec,
            data: keyed(spec.alg(), data)?,
            tweak,
            essiv,
            sector_len,
            base: 0,
        })
    }

    /// The same cipher where the sector that callers call 0 has the number `base`.
    #[must_use]
    pub(super) fn counting_from(self, base: u64) -> Self {
        Self { base, ..self }
    }

    /// Which cipher it is.
    pub fn spec(&self) -> CipherSpec {
        self.spec
    }

    /// Bytes of a sector: the step in which buffers must be whole.
    pub fn sector_len(&self) -> usize {
        self.sector_len
    }

    /// Encrypts `buf`, whole sectors of which the first has the number `first_sector`, counted by 512 bytes.
    ///
    /// An error of kind [`Usage`](ErrorKind::Usage) if they are not whole: nothing is changed then.
    pub fn encrypt(&self, first_sector: u64, buf: &mut [u8]) -> Result<()> {
        self.run(Way::Encrypt, first_sector, buf)
    }

    /// Decrypts `buf`, see [`encrypt`](Self::encrypt).
    pub fn decrypt(&self, first_sector: u64, buf: &mut [u8]) -> Result<()> {
        self.run(Way::Decrypt, first_sector, buf)
    }

    fn run(&self, way: Way, first_sector: u64, buf: &mut [u8]) -> Result<()> {
        if !buf.len().is_multiple_of(self.sector_len) {
            let len = self.sector_len;
            return Err(Error::new(
                ErrorKind::Usage,
                format!(
                    "{} bytes are no whole number of sectors of {len} bytes",
                    buf.len()
                ),
            ));
        }
        match self.spec.mode() {
            CipherMode::Ecb => self.blocks(way, buf),
            CipherMode::Xts => self.xts(way, first_sector, buf),
            CipherMode::Cbc if way == Way::Decrypt => self.cbc_decrypt(first_sector, buf),
            CipherMode::Cbc if self.block_len() == 8 => self.cbc_encrypt::<8>(first_sector, buf),
            CipherMode::Cbc => self.cbc_encrypt::<BLOCK>(first_sector, buf),
            CipherMode::Ctr => self.ctr(first_sector, buf),
        }
        Ok(())
    }

    fn blocks(&self, way: Way, blocks: &mut [u8]) {
        match way {
            Way::Encrypt => self.data.encrypt(blocks),
            Way::Decrypt => self.data.decrypt(blocks),
        }
    }

    fn block_len(&self) -> usize {
        self.spec.alg().block_len()
    }

    /// The batches of `buf`, each with the initialisation vectors of its sectors, one block long, one behind the other.
    fn batches<'a>(
        &self,
        first_sector: u64,
        buf: &'a mut [u8],
    ) -> impl Iterator<Item = (Vectors, &'a mut [u8])> {
        let step = (self.sector_len / SMALLEST) as u64;
        let mut number = first_sector.wrapping_add(self.base);
        buf.chunks_mut(BATCH).map(move |batch| {
            let count = batch.len() / self.sector_len;
            let mut vectors = Vectors {
                bytes: [0; LANES * BLOCK],
                len: count.saturating_mul(self.block_len()),
            };
            for vector in vectors.get_mut().chunks_exact_mut(self.block_len()) {
                let bytes = match self.spec.ivgen() {
                    IvGen::Plain => number & u64::from(u32::MAX),
                    IvGen::Plain64 | IvGen::Essiv => number,
                }
                .to_le_bytes();
                for (byte, value) in vector.iter_mut().zip(bytes) {
                    *byte = value;
                }
                number = number.wrapping_add(step);
            }
            if let Some(essiv) = &self.essiv {
                essiv.encrypt(vectors.get_mut());
            }
            (vectors, batch)
        })
    }

    fn xts(&self, way: Way, first_sector: u64, buf: &mut [u8]) {
        let Some(tweak_cipher) = &self.tweak else {
            return;
        };
        let mut tweaks = [0_u128; BATCH / BLOCK];
        for (mut vectors, batch) in self.batches(first_sector, buf) {
            tweak_cipher.encrypt(vectors.get_mut());
            let per_sector = self.sector_len / BLOCK;
            let (blocks, _) = batch.as_chunks_mut::<BLOCK>();
            let (vectors, _) = vectors.get_mut().as_chunks::<BLOCK>();
            for ((vector, sector), tweaks) in vectors
                .iter()
                .zip(blocks.chunks_exact_mut(per_sector))
                .zip(tweaks.chunks_exact_mut(per_sector))
            {
                let mut tweak = u128::from_le_bytes(*vector);
                for (block, kept) in sector.iter_mut().zip(tweaks) {
                    *kept = tweak;
                    *block = (u128::from_le_bytes(*block) ^ tweak).to_le_bytes();
                    tweak = double(tweak);
                }
            }
            self.blocks(way, batch);
            for (block, tweak) in batch.as_chunks_mut::<BLOCK>().0.iter_mut().zip(&tweaks) {
                *block = (u128::from_le_bytes(*block) ^ tweak).to_le_bytes();
            }
        }
    }

    fn cbc_encrypt<const LEN: usize>(&self, first_sector: u64, buf: &mut [u8]) {
        let per_sector = self.sector_len / LEN;
        for (mut vectors, batch) in self.batches(first_sector, buf) {
            let (blocks, _) = batch.as_chunks_mut::<LEN>();
            // What the next block of each sector is mixed with.
            let chain = vectors.get_mut();
            for row in 0..per_sector {
                let (links, _) = chain.as_chunks_mut::<LEN>();
                for (link, block) in links.iter_mut().zip(blocks.iter().skip(row).step_by(per_sector)) {
                    mix(link, block);
                }
                self.data.encrypt(chain);
                let (links, _) = chain.as_chunks::<LEN>();
                for (link, block) in links.iter().zip(blocks.iter_mut().skip(row).step_by(per_sector)) {
                    *block = *link;
                }
            }
        }
    }

    fn cbc_decrypt(&self, first_sector: u64, buf: &mut [u8]) {
        let block_len = self.block_len();
        let mut sealed = [0; BATCH];
        for (vectors, batch) in self.batches(first_sector, buf) {
            for (kept, byte) in sealed.iter_mut().zip(batch.iter()) {
                *kept = *byte;
            }
            self.data.decrypt(batch);
            for ((vector, sector), sealed) in vectors
                .get()
                .chunks_exact(block_len)
                .zip(batch.chunks_exact_mut(self.sector_len))
                .zip(sealed.chunks_exact(self.sector_len))
            {
                let (first, rest) = sector.split_at_mut(block_len);
                mix(first, vector);
                mix(rest, sealed);
            }
        }
    }

    /// Both ways alike: the key stream is mixed in.
    fn ctr(&self, first_sector: u64, buf: &mut [u8]) {
        let block_len = self.block_len();
        let mut stream = Zeroizing::new([0; BATCH]);
        for (vectors, batch) in self.batches(first_sector, buf) {
            for (vector, sector) in vectors
                .get()
                .chunks_exact(block_len)
                .zip(stream.chunks_exact_mut(self.sector_len))
            {
                // The vector is a number, most significant byte first, of the width of a block.
                let shift = u32::try_from(BLOCK.saturating_sub(block_len)).unwrap_or(0) * 8;
                let mut wide = [0; BLOCK];
                mix(&mut wide, vector);
                let mut counter = u128::from_be_bytes(wide);
                for block in sector.chunks_exact_mut(block_len) {
                    for (byte, value) in block.iter_mut().zip(counter.to_be_bytes()) {
                        *byte = value;
                    }
                    counter = counter.wrapping_add(1 << shift);
                }
            }
            let used = stream.get_mut(..batch.len()).unwrap_or_default();
            self.data.encrypt(used);
            mix(batch, used);
        }
    }
}

impl fmt::Debug for SectorCipher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SectorCipher")
            .field("spec", &self.spec)
            .field("sector_len", &self.sector_len)
            .finish_non_exhaustive()
    }
}

/// Initialisation vectors of a batch.
struct Vectors {
    bytes: [u8; LANES * BLOCK],
    len: usize,
}

impl Vectors {
    fn get(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }

    fn get_mut(&mut self) -> &mut [u8] {
        self.bytes.get_mut(..self.len).unwrap_or_default()
    }
}

/// Mixes `other` into `bytes`, as far as both reach.
fn mix(bytes: &mut [u8], other: &[u8]) {
    for (byte, other) in bytes.iter_mut().zip(other) {
        *byte ^= other;
    }
}

/// Multiplies by x in GF(2^128), as IEEE 1619 counts the bits.
fn double(tweak: u128) -> u128 {
    let carry = (tweak.cast_signed() >> 127).cast_unsigned() & 0x87;
    (tweak << 1) ^ carry
}
