//! The encryption of qcow and of old qcow2 images: AES with a password for a key.
//!
//! It protects little. The key is the password's first 16 bytes, without salt or cost, and a wrong one is not noticed.

use zeroize::Zeroizing;

use super::CryptError;
use super::cipher::{CipherAlg, CipherMode, CipherSpec, IvGen};
use super::sector::SectorCipher;

/// The cipher for `password`, AES-128 in CBC mode; sectors are numbered as the guest counts.
pub fn qcow_aes(password: &[u8]) -> Result<SectorCipher, CryptError> {
    let mut key = Zeroizing::new([0; 16]);
    for (byte, value) in key.iter_mut().zip(password) {
        *byte = *value;
    }
    let spec = CipherSpec::new(CipherAlg::Aes128, CipherMode::Cbc, IvGen::Plain64, None)?;
    SectorCipher::new(spec, key.as_slice())
}
