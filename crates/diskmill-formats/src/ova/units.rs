//! Programmatic units: what `capacity` and `VirtualQuantity` count (DSP0243, 9.1 and annex; DSP0004, annex C).

/// The bytes that `text` stands for: `byte * 2^30`, `byte * 10^6`, `byte * 1024`, or a word that older exporters use.
/// `None` if it is none of these, or no number of bytes below 2^63.
pub fn bytes_of(text: &str) -> Option<u64> {
    let text = text.trim();
    let word = match text.to_ascii_lowercase().as_str() {
        "" | "byte" | "bytes" => Some(1),
        "kb" | "kilobyte" | "kilobytes" => Some(1 << 10),
        "mb" | "megabyte" | "megabytes" => Some(1 << 20),
        "gb" | "gigabyte" | "gigabytes" => Some(1 << 30),
        "tb" | "terabyte" | "terabytes" => Some(1 << 40),
        _ => None,
    };
    if word.is_some() {
        return word;
    }
    let (unit, factor) = text.split_once('*')?;
    if !unit.trim().eq_ignore_ascii_case("byte") {
        return None;
    }
    let factor = factor.trim();
    let value = match factor.split_once('^') {
        None => number(factor)?,
        Some((base, power)) => {
            number(base.trim())?.checked_pow(u32::try_from(number(power.trim())?).ok()?)?
        }
    };
    Some(value).filter(|value| (1..1 << 63).contains(value))
}

/// A number in plain digits.
pub fn number(text: &str) -> Option<u64> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    digits.then(|| text.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_that_exporters_write() {
        for (text, bytes) in [
            ("byte", 1),
            ("byte * 2^30", 1 << 30),
            ("byte*2^20", 1 << 20),
            ("byte * 10^9", 1_000_000_000),
            ("byte * 1024", 1024),
            ("MegaBytes", 1 << 20),
            ("GB", 1 << 30),
        ] {
            assert_eq!(bytes_of(text), Some(bytes), "{text}");
        }
    }

    #[test]
    fn units_that_make_no_sense() {
        for text in [
            "byte * 2^70",
            "byte * 2^-1",
            "byte * 0",
            "bit",
            "byte * ",
            "byte * 2^",
            "2^20",
            "byte * +1",
            "byte / 2",
        ] {
            assert_eq!(bytes_of(text), None, "{text}");
        }
    }
}
