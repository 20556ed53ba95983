//! UUIDs as VirtualBox writes them.

use std::fmt;
use std::hash::{BuildHasher, RandomState};

use diskmill_core::OptionError;

/// A UUID in the byte order of the file: the first three groups of its text are little-endian.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Uuid(pub [u8; 16]);

/// Where the bytes of the text are in the file.
const ORDER: [usize; 16] = [3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15];

impl Uuid {
    /// No UUID at all.
    pub const NIL: Self = Self([0; 16]);

    /// A new one, version 4.
    pub fn random() -> Self {
        // The standard library seeds these from the system, each differently.
        let halves = [0_u8, 1].map(|half| RandomState::new().hash_one(half).to_le_bytes());
        let mut bytes = [0; 16];
        for (byte, random) in bytes.iter_mut().zip(halves.as_flattened()) {
            *byte = *random;
        }
        let [.., version, variant, _, _, _, _, _, _, _] = &mut bytes;
        *version = *version & 0x0f | 0x40;
        *variant = *variant & 0x3f | 0x80;
        Self(bytes)
    }

    /// Reads the text form, with or without braces.
    pub fn parse(text: &str) -> Result<Self, OptionError> {
        let wrong = || OptionError::Value {
            name: "uuid".to_owned(),
            value: text.to_owned(),
            expected: "a UUID like 01234567-89ab-cdef-0123-456789abcdef that is not all zeros",
        };
        let inner = text
            .strip_prefix('{')
            .and_then(|rest| rest.strip_suffix('}'))
            .unwrap_or(text);
        let groups: Vec<&str> = inner.split('-').collect();
        if !groups.iter().map(|group| group.len()).eq([8, 4, 4, 4, 12]) {
            return Err(wrong());
        }
        let digits = groups.concat();
        let mut bytes = [0; 16];
        for (pair, at) in digits.as_bytes().chunks(2).zip(ORDER) {
            let pair = std::str::from_utf8(pair).map_err(|_| wrong())?;
            if !pair.bytes().all(|digit| digit.is_ascii_hexdigit()) {
                return Err(wrong());
            }
            if let Some(byte) = bytes.get_mut(at) {
                *byte = u8::from_str_radix(pair, 16).map_err(|_| wrong())?;
            }
        }
        match Self(bytes) {
            Self::NIL => Err(wrong()),
            uuid => Ok(uuid),
        }
    }

    /// Whether it says that there is none.
    pub fn is_nil(self) -> bool {
        self == Self::NIL
    }
}

impl fmt::Display for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, at) in ORDER.into_iter().enumerate() {
            if [4, 6, 8, 10].contains(&number) {
                f.write_str("-")?;
            }
            write!(f, "{:02x}", self.0.get(at).copied().unwrap_or_default())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_bytes_agree() {
        let text = "01234567-89ab-cdef-1032-547698badcfe";
        let uuid = Uuid::parse(text).unwrap();
        let bytes = [
            0x67, 0x45, 0x23, 0x01, 0xab, 0x89, 0xef, 0xcd, 0x10, 0x32, 0x54, 0x76, 0x98, 0xba, 0xdc, 0xfe,
        ];
        assert_eq!(uuid.0, bytes);
        assert_eq!(uuid.to_string(), text);
        assert_eq!(
            Uuid::parse(&format!("{{{}}}", text.to_uppercase())).unwrap(),
            uuid
        );
    }

    #[test]
    fn what_is_no_uuid_is_refused() {
        for text in [
            "",
            "00000000-0000-0000-0000-000000000000",
            "0123456789abcdef1032547698badcfe",
            "01234567-89ab-cdef-1032-547698badcf",
            "01234567-89ab-cdef-1032-547698badcfg",
            "+1234567-89ab-cdef-1032-547698badcfe",
            "0123456\u{e9}-89ab-cdef-1032-547698badcfe",
            "{01234567-89ab-cdef-1032-547698badcfe",
        ] {
            assert!(Uuid::parse(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn new_ones_differ_and_say_that_they_are_random() {
        let uuids: Vec<Uuid> = (0..100).map(|_| Uuid::random()).collect();
        for (number, uuid) in uuids.iter().enumerate() {
            assert!(!uuids[..number].contains(uuid));
            let text = uuid.to_string();
            assert_eq!(&text[14..15], "4");
            assert!("89ab".contains(&text[19..20]), "{text}");
        }
    }
}
