use std::error::Error as _;

use super::*;

fn view(len: u64, options: &[(&str, &str)]) -> Result<View, String> {
    let mut how = OpenSpec::default();
    for (name, value) in options {
        how.options.set(name, *value);
    }
    View::new(len, &how).map_err(|error| match error.source() {
        Some(source) => source.to_string(),
        None => error.to_string(),
    })
}

#[test]
fn the_disk_is_whole_sectors() {
    for (len, size) in [
        (0, 0),
        (1, 512),
        (511, 512),
        (512, 512),
        (513, 1024),
        (1000, 1024),
    ] {
        assert_eq!(view(len, &[]).unwrap().size(), size, "{len}");
    }
}

#[test]
fn a_window_is_taken() {
    let taken = view(4096, &[("offset", "512"), ("size", "1k")]).unwrap();
    assert_eq!(
        (taken.offset(), taken.size(), taken.is_fixed()),
        (512, 1024, true)
    );
    assert_eq!(taken.host(GuestOffset::new(5)).unwrap(), HostOffset::new(517));
    let open = view(100_000, &[("offset", "100")]).unwrap();
    assert_eq!((open.size(), open.is_fixed()), (100_352, false));
    assert_eq!(view(512, &[("offset", "512")]).unwrap().size(), 0);
}

#[test]
fn windows_outside_the_file_are_refused() {
    for (options, text) in [
        (
            &[("offset", "4097")][..],
            "offset is 4097, must be at most 4096, the length of the file",
        ),
        (
            &[("offset", "512"), ("size", "4096")],
            "size is 4096, must be at most 3584: the file of 4096 bytes ends there after offset 512",
        ),
        (&[("size", "1000")], "size is 1000, must be a multiple of 512"),
        (
            &[("offset", "0xffffffffffffffff")],
            "offset is 18446744073709551615, must be at most 4096, the length of the file",
        ),
        (
            &[("offset", "512"), ("size", "0xfffffffffffffe00")],
            "size is 18446744073709551104, must be at most 3584: the file of 4096 bytes ends there after offset 512",
        ),
        (&[("sise", "512")], "invalid parameter 'sise'"),
    ] {
        assert_eq!(view(4096, options).unwrap_err(), text);
    }
    assert_eq!(
        view(u64::MAX, &[]).unwrap_err(),
        "the file has 18446744073709551615 bytes, must have fewer than 2^63"
    );
}
