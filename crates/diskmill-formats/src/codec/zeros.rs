//! Looking for zeros.

/// Bytes looked at between two decisions: enough for the compiler to use whole vectors, few enough to stop early.
const STEP: usize = 1024;

/// Whether all of `bytes` are zero. Stops within a KiB of the first that is not.
pub fn is_zero(bytes: &[u8]) -> bool {
    bytes
        .chunks(STEP)
        .all(|chunk| chunk.iter().fold(0, |seen, byte| seen | byte) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_a_single_bit_anywhere() {
        assert!(is_zero(&[]));
        for len in [1, 7, 1023, 1024, 1025, 4096] {
            let mut bytes = vec![0; len];
            assert!(is_zero(&bytes), "{len}");
            for at in [0, len / 2, len - 1] {
                bytes[at] = 1;
                assert!(!is_zero(&bytes), "{len} {at}");
                bytes[at] = 0;
            }
        }
    }
}
