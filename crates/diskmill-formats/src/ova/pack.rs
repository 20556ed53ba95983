//! Headers of a tar archive to be written, as the strictest readers of packages want them: ustar, plain files, binary
//! sizes only where octal digits do not reach.

use diskmill_core::{Error, ErrorKind, Result};

use super::name::MemberName;

/// What members are padded to, and the length of a header.
pub const BLOCK: u64 = 512;

/// Bytes of a name: what VirtualBox reads, and what fits without a prefix.
const NAME: usize = 100;

/// The largest size in eleven octal digits.
const OCTAL: u64 = (1 << 33) - 1;

/// The bytes behind the last member: two empty blocks, and as many as fill a record of 20.
pub fn end(len: u64) -> u64 {
    len.saturating_add(2 * BLOCK)
        .next_multiple_of(20 * BLOCK)
        .saturating_sub(len)
}

/// The header of a plain file of `len` bytes, changed last at `time`, in seconds since 1970.
pub fn header(name: &MemberName, len: u64, time: u64) -> Result<[u8; 512]> {
    let text = name.as_str().as_bytes();
    if text.len() > NAME {
        let text = format!(
            "the name '{name}' has {} bytes, must be at most {NAME} in an archive",
            text.len()
        );
        return Err(Error::new(ErrorKind::Usage, text));
    }
    let mut block = [0; 512];
    let mut put = |at: usize, bytes: &[u8]| {
        if let Some(place) = block.get_mut(at..at.saturating_add(bytes.len())) {
            place.copy_from_slice(bytes);
        }
    };
    put(0, text);
    put(100, b"0000644\0");
    put(108, b"0000000\0");
    put(116, b"0000000\0");
    match len {
        ..=OCTAL => put(124, format!("{len:011o}\0").as_bytes()),
        _ => {
            put(124, &[0x80]);
            put(128, &len.to_be_bytes());
        }
    }
    put(136, format!("{:011o}\0", time.min(OCTAL)).as_bytes());
    put(148, b"        ");
    put(156, b"0");
    put(257, b"ustar\x0000");
    let sum: u64 = block.iter().map(|byte| u64::from(*byte)).sum();
    if let Some(place) = block.get_mut(148..156) {
        place.copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    }
    Ok(block)
}
