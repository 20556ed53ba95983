//! Base64, as QEMU reads it: the usual alphabet and line ends, and what is wrong with the end of a text is overlooked.

use crate::Secret;

/// What is wrong with a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Base64Error {
    /// A byte of zero, which no text has.
    #[error("Base64 data contains embedded NUL characters")]
    Nul,
    /// A sign that is none of Base64.
    #[error("Base64 data contains invalid characters")]
    Sign,
}

/// The bytes that `text` stands for.
///
/// Four signs make three bytes; `=` counts as zero bits, and takes away the bytes that only it has made. A rest of fewer
/// than four signs is left out.
pub fn decode_base64(text: &[u8]) -> Result<Secret, Base64Error> {
    if text.contains(&0) {
        return Err(Base64Error::Nul);
    }
    // Never grows, so that no copy stays behind.
    let mut out = Vec::with_capacity(text.len());
    let (mut bits, mut signs) = (0_u32, 0);
    let mut last = 0;
    for &sign in text.iter().filter(|sign| **sign != b'\n') {
        let value = value(sign).ok_or(Base64Error::Sign)?;
        bits = bits << 6 | u32::from(value);
        let before_last = std::mem::replace(&mut last, sign);
        signs += 1;
        if signs < 4 {
            continue;
        }
        let [_, high, middle, low] = bits.to_be_bytes();
        out.push(high);
        out.extend((before_last != b'=').then_some(middle));
        out.extend((last != b'=').then_some(low));
        (bits, signs) = (0, 0);
    }
    Ok(Secret::new(out))
}

fn value(sign: u8) -> Option<u8> {
    match sign {
        b'A'..=b'Z' => Some(sign - b'A'),
        b'a'..=b'z' => Some(sign - b'a' + 26),
        b'0'..=b'9' => Some(sign - b'0' + 52),
        b'+' => Some(62),
        b'/' => Some(63),
        b'=' => Some(0),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_becomes_bytes() {
        let bytes = |text: &str| decode_base64(text.as_bytes()).unwrap().as_bytes().to_vec();
        for (text, plain) in [
            ("", &b""[..]),
            ("cHcx", b"pw1"),
            ("cHc=", b"pw"),
            ("cA==", b"p"),
            ("cH\ncx\n", b"pw1"),
            ("+/+/", b"\xfb\xff\xbf"),
            // What glib makes of texts that are not in order, and with it every key that was ever given to qemu-img so.
            ("cHcx=", b"pw1"),
            ("cHcxA", b"pw1"),
            ("cHc", b""),
            ("cHcx====", b"pw1\0"),
        ] {
            assert_eq!(bytes(text), plain, "{text:?}");
        }
        for text in ["!!!!", "cH cx", "cHcx\r\n", "cH-_"] {
            assert!(decode_base64(text.as_bytes()).is_err(), "{text:?}");
        }
        assert!(decode_base64(b"cHcx\0").is_err());
    }
}
