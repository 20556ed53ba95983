//! Block ciphers behind one face: whole blocks in place, many at once.

use cipher::array::Array;
use cipher::{BlockCipherDecrypt, BlockCipherEncrypt, KeyInit};

use super::CryptError;
use super::cipher::CipherAlg;
use super::twofish::Twofish;

/// A cipher with a key. Buffers are whole blocks; a rest is left as it is.
pub(super) trait BlockCipher: Send + Sync {
    /// Encrypts every block by itself.
    fn encrypt(&self, blocks: &mut [u8]);

    /// Decrypts every block by itself.
    fn decrypt(&self, blocks: &mut [u8]);
}

struct Keyed<C>(C);

impl<C: BlockCipherEncrypt + BlockCipherDecrypt + Send + Sync> BlockCipher for Keyed<C> {
    fn encrypt(&self, blocks: &mut [u8]) {
        let (blocks, _) = Array::<u8, C::BlockSize>::slice_as_chunks_mut(blocks);
        self.0.encrypt_blocks(blocks);
    }

    fn decrypt(&self, blocks: &mut [u8]) {
        let (blocks, _) = Array::<u8, C::BlockSize>::slice_as_chunks_mut(blocks);
        self.0.decrypt_blocks(blocks);
    }
}

/// `alg` with `key`. The key schedule is wiped when it is dropped.
pub(super) fn keyed(alg: CipherAlg, key: &[u8]) -> Result<Box<dyn BlockCipher>, CryptError> {
    fn make<C>(key: &[u8]) -> Option<Box<dyn BlockCipher>>
    where
        C: KeyInit + BlockCipherEncrypt + BlockCipherDecrypt + Send + Sync + 'static,
    {
        Some(Box::new(Keyed(C::new_from_slice(key).ok()?)))
    }
    // Some of these ciphers take further lengths, which no name here stands for.
    let right = key.len() == alg.key_len();
    let made = match alg {
        _ if !right => None,
        CipherAlg::Aes128 => make::<aes::Aes128>(key),
        CipherAlg::Aes192 => make::<aes::Aes192>(key),
        CipherAlg::Aes256 => make::<aes::Aes256>(key),
        CipherAlg::Serpent128 | CipherAlg::Serpent192 | CipherAlg::Serpent256 => {
            make::<serpent::Serpent>(key)
        }
        CipherAlg::Twofish128 | CipherAlg::Twofish192 | CipherAlg::Twofish256 => {
            Some(Box::new(Twofish::new(key)) as Box<dyn BlockCipher>)
        }
        CipherAlg::Cast5 => make::<cast5::Cast5>(key),
    };
    made.ok_or_else(|| CryptError::KeyLen {
        cipher: alg.name().to_owned(),
        len: key.len(),
    })
}
