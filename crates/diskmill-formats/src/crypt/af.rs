//! The anti-forensic splitter of LUKS: a key blown up to many stripes, all of which are needed to get it back, so that
//! destroying any part of them destroys the key.

use diskmill_core::Result;
use zeroize::Zeroizing;

use super::hash::HashAlg;
use super::random;

/// Blows `key` up to `stripes` times its length.
pub fn split(hash: HashAlg, key: &[u8], stripes: usize) -> Result<Zeroizing<Vec<u8>>> {
    let mut material = Zeroizing::new(vec![0; key.len().saturating_mul(stripes)]);
    let (chance, last) = material.split_at_mut(key.len().saturating_mul(stripes.saturating_sub(1)));
    random::fill(chance)?;
    let mixed = mix(hash, chance, key.len());
    for ((byte, mixed), key) in last.iter_mut().zip(mixed.iter()).zip(key) {
        *byte = mixed ^ key;
    }
    Ok(material)
}

/// The key of `key_len` bytes whose stripes are `material`.
pub fn merge(hash: HashAlg, material: &[u8], key_len: usize) -> Zeroizing<Vec<u8>> {
    let (stripes, last) = material.split_at(material.len().saturating_sub(key_len));
    let mut key = mix(hash, stripes, key_len);
    for (byte, last) in key.iter_mut().zip(last) {
        *byte ^= last;
    }
    key
}

/// What all stripes but the last amount to.
fn mix(hash: HashAlg, stripes: &[u8], key_len: usize) -> Zeroizing<Vec<u8>> {
    let mut block = Zeroizing::new(vec![0; key_len]);
    for stripe in stripes.chunks_exact(key_len.max(1)) {
        for (byte, other) in block.iter_mut().zip(stripe) {
            *byte ^= other;
        }
        diffuse(hash, &mut block);
    }
    block
}

/// Replaces each piece as long as a digest by the digest of its number and itself.
fn diffuse(hash: HashAlg, block: &mut [u8]) {
    for (piece, number) in block.chunks_mut(hash.digest_len()).zip(0_u32..) {
        let digest = hash.digest(&[&number.to_be_bytes(), piece]);
        for (byte, value) in piece.iter_mut().zip(digest.iter()) {
            *byte = *value;
        }
    }
}
