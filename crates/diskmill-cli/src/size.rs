//! Sizes as people read them.

/// `bytes` in the unit that keeps the number below 1000, with three significant digits: `196 KiB`, `1.5 GiB`, `0 B`.
///
/// As `qemu-img` prints it: the switch to the next unit is at 1000 of the smaller one, and what rounds up to 1000
/// there becomes `1e+03`.
pub fn human(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
    let mut unit = 0;
    // 1000/1024 of the next unit, compared without rounding.
    while unit + 1 < UNITS.len() && u128::from(bytes) * 1024 >= 1000u128 << (10 * (unit + 1)) {
        unit += 1;
    }
    let value = bytes as f64 / (1u64 << (10 * unit)) as f64;
    format!("{} {}B", significant(value), UNITS[unit])
}

/// Three significant digits without trailing zeros, as C's `%.3g` writes a number from 0 up to 1000.
fn significant(value: f64) -> String {
    if value == 0.0 {
        return "0".to_owned();
    }
    let decimals = match value {
        v if v >= 99.95 => 0,
        v if v >= 9.995 => 1,
        v if v >= 0.9995 => 2,
        _ => 3,
    };
    let text = format!("{value:.decimals$}");
    if text == "1000" {
        return "1e+03".to_owned();
    }
    if decimals == 0 {
        return text;
    }
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_written_as_qemu_img_writes_them() {
        for (bytes, text) in [
            (0, "0 B"),
            (1, "1 B"),
            (512, "512 B"),
            (999, "999 B"),
            (1000, "0.977 KiB"),
            (1023, "0.999 KiB"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (200_704, "196 KiB"),
            (1_023_590, "1e+03 KiB"),
            (1_023_999, "1e+03 KiB"),
            (1_024_000, "0.977 MiB"),
            (67_108_864, "64 MiB"),
            (10 << 30, "10 GiB"),
            (1_234_567_890, "1.15 GiB"),
            ((1 << 63) - 1, "8 EiB"),
            (u64::MAX, "16 EiB"),
        ] {
            assert_eq!(human(bytes), text, "{bytes}");
        }
    }
}
