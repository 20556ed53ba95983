//! Secrets that are themselves encrypted, as programs hand them to QEMU so that no command line shows them: AES-256 in
//! CBC mode over the bytes and their padding, whose last byte tells how long it is.

use diskmill_core::Secret;
use zeroize::Zeroizing;

use super::block::keyed;
use super::cipher::CipherAlg;

/// Bytes of a key.
const KEY_LEN: usize = 32;
/// Bytes of a block and of the initialisation vector.
const BLOCK: usize = 16;

/// Why an encrypted secret cannot be decrypted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WrapError {
    /// The key is too short or too long.
    #[error("the key of the secret has {0} bytes, must be 32")]
    KeyLen(usize),
    /// The initialisation vector is too short or too long.
    #[error("the initialisation vector of the secret has {0} bytes, must be 16")]
    IvLen(usize),
    /// The secret is not made of whole blocks.
    #[error("the encrypted secret has {0} bytes, must be a multiple of 16")]
    Len(usize),
    /// No such padding: the key or the initialisation vector is another one's, most likely.
    #[error("the padding of the decrypted secret has {0} bytes, must be 0 to 16")]
    Padding(u8),
}

/// The secret that was encrypted as `wrapped`. Of the padding only the length is looked at, as in QEMU.
pub fn unwrap(key: &[u8], iv: &[u8], wrapped: Vec<u8>) -> Result<Secret, WrapError> {
    if iv.len() != BLOCK {
        return Err(WrapError::IvLen(iv.len()));
    }
    let cipher = keyed(CipherAlg::Aes256, key)
        .ok()
        .filter(|_| key.len() == KEY_LEN)
        .ok_or(WrapError::KeyLen(key.len()))?;
    if !wrapped.len().is_multiple_of(BLOCK) {
        return Err(WrapError::Len(wrapped.len()));
    }
    let mut plain = Zeroizing::new(wrapped.clone());
    cipher.decrypt(&mut plain);
    // Each block is mixed with the encrypted one before it.
    for (byte, before) in plain.iter_mut().zip(iv.iter().chain(&wrapped)) {
        *byte ^= before;
    }
    let padding = plain.last().copied().unwrap_or_default();
    match plain.len().checked_sub(padding.into()) {
        Some(len) if usize::from(padding) <= BLOCK => {
            Ok(Secret::new(plain.get(..len).unwrap_or_default().to_vec()))
        }
        _ => Err(WrapError::Padding(padding)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: [u8; 32] = [7; 32];
    const IV: [u8; 16] = [9; 16];

    /// Encrypts whole blocks.
    fn wrap(plain: &[u8]) -> Vec<u8> {
        let cipher = keyed(CipherAlg::Aes256, &KEY).unwrap();
        let mut wrapped = Vec::new();
        let mut before = IV.to_vec();
        for block in plain.chunks(BLOCK) {
            let mut mixed: Vec<u8> = block.iter().zip(&before).map(|(a, b)| a ^ b).collect();
            cipher.encrypt(&mut mixed);
            wrapped.extend_from_slice(&mixed);
            before = mixed;
        }
        wrapped
    }

    #[test]
    fn the_example_of_the_standard_is_decrypted() {
        // NIST SP 800-38A, F.2.6: the last byte of the plain text, 0x10, happens to be a padding.
        let hex = |text: &str| -> Vec<u8> {
            (0..text.len())
                .step_by(2)
                .map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap())
                .collect()
        };
        let key = hex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4");
        let iv = hex("000102030405060708090a0b0c0d0e0f");
        let wrapped = hex(concat!(
            "f58c4c04d6e5f1ba779eabfb5f7bfbd69cfc4e967edb808d679f777bc6702c7d",
            "39f23369a9d9bacfa530e26304231461b2eb05e2c39be9fcda6c19078c6a9d1b",
        ));
        let plain = unwrap(&key, &iv, wrapped).unwrap();
        assert_eq!(
            plain.as_bytes(),
            hex(concat!(
                "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51",
                "30c81c46a35ce411e5fbc1191a0a52ef",
            ))
        );
    }

    #[test]
    fn padding_goes_whatever_its_bytes_are() {
        let secret = unwrap(&KEY, &IV, wrap(b"pw1aaaaaaaaaaaa\x0d")).unwrap();
        assert_eq!(secret.as_bytes(), b"pw1");
        let whole = unwrap(&KEY, &IV, wrap(b"0123456789abcde\x00")).unwrap();
        assert_eq!(whole.as_bytes(), b"0123456789abcde\x00");
        assert_eq!(unwrap(&KEY, &IV, wrap(&[16; 16])).unwrap().as_bytes(), b"");
        assert_eq!(unwrap(&KEY, &IV, Vec::new()).unwrap().as_bytes(), b"");
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let wrong = |key: &[u8], iv: &[u8], bytes: &[u8]| unwrap(key, iv, bytes.to_vec()).unwrap_err();
        assert_eq!(wrong(&KEY[..16], &IV, &[]), WrapError::KeyLen(16));
        assert_eq!(wrong(&KEY, &IV[..3], &[]), WrapError::IvLen(3));
        assert_eq!(wrong(&KEY, &IV, &[0; 17]), WrapError::Len(17));
        assert_eq!(wrong(&KEY, &IV, &wrap(&[17; 32])), WrapError::Padding(17));
    }
}
