//! Images of every kind, made by the real tools from a seed.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use diskmill::open::{self, Image, OpenRequest};
use diskmill::spec::ImageSpec;
use diskmill_testkit::{Scratch, oracle};

/// An image and its format.
#[derive(Clone, Debug)]
pub struct Picture {
    pub path: PathBuf,
    pub format: &'static str,
}

/// Numbers that look random and are the same every time.
pub struct Dice(u64);

impl Dice {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// A number below `end`.
    pub fn roll(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % end
    }
}

pub fn request(picture: &Picture) -> OpenRequest {
    let mut request = OpenRequest::new(ImageSpec::from_path(&picture.path));
    request.format = Some(picture.format.to_owned());
    request
}

pub fn opened(picture: &Picture) -> Image {
    open::image(&request(picture)).unwrap_or_else(|error| panic!("{picture:?}: {error:?}"))
}

/// Writes, zeroes and discards all over an image. With `compress` the image is new, and some of its clusters, which
/// have that size, are compressed.
pub fn scribble(path: &Path, format: &str, size: u64, dice: &mut Dice, compress: Option<u64>) {
    let mut commands = Vec::new();
    if let Some(unit) = compress.filter(|unit| *unit <= size) {
        // Only a cluster that is not allocated yet can be.
        let units: BTreeSet<u64> = (0..4).map(|_| dice.roll(size / unit)).collect();
        commands.extend(
            units
                .iter()
                .map(|index| format!("write -c -P {} {} {unit}", index % 250 + 1, index * unit)),
        );
    }
    for _ in 0..6 + dice.roll(8) {
        let at = dice.roll(size / 512) * 512;
        let len = ((dice.roll(256) + 1) * 512).min(size - at);
        commands.push(match dice.roll(6) {
            0 => format!("write -z {at} {len}"),
            1 => format!("write -z -u {at} {len}"),
            2 => format!("discard {at} {len}"),
            _ => format!("write -P {} {at} {len}", 1 + dice.roll(255)),
        });
    }
    oracle::io(path, format, commands);
}

/// Options of qcow2 that change what is where, with the cluster size that goes with them if it can compress.
const KINDS: [(&str, Option<u64>); 18] = [
    ("", Some(65536)),
    ("cluster_size=512", Some(512)),
    ("cluster_size=4k", Some(4096)),
    ("cluster_size=2M", Some(2 << 20)),
    ("compat=0.10", Some(65536)),
    ("compat=v3,lazy_refcounts=on", Some(65536)),
    ("compression_type=zstd", Some(65536)),
    ("refcount_bits=1", None),
    ("refcount_bits=64", Some(65536)),
    ("extended_l2=on", Some(65536)),
    ("extended_l2=on,cluster_size=16k", Some(16384)),
    ("extended_l2=on,preallocation=metadata", None),
    ("preallocation=metadata", None),
    ("preallocation=metadata,cluster_size=4k", None),
    ("preallocation=falloc", None),
    ("preallocation=full", None),
    ("data_file=DATA", None),
    ("data_file=DATA,data_file_raw=on", None),
];

/// Single images.
pub fn singles(scratch: &Scratch, seed: u64) -> Vec<Picture> {
    let mut dice = Dice::new(seed);
    let mut pictures = Vec::new();
    for (index, (options, compress)) in KINDS.into_iter().enumerate() {
        let size = [4 << 20, 6_291_968, 1 << 20, 9_437_184][index % 4];
        let path = scratch.join(format!("single-{seed}-{index}.qcow2"));
        let data = format!("data-{seed}-{index}.raw");
        let options = options.replace("DATA", scratch.join(data).to_str().unwrap());
        oracle::create(&path, "qcow2", &options, &size.to_string());
        scribble(&path, "qcow2", size, &mut dice, compress);
        pictures.push(Picture {
            path,
            format: "qcow2",
        });
    }
    for (index, len) in [0_u64, 1, 3, 511, 512, 513, 10_000, 1 << 20, (1 << 20) + 5]
        .into_iter()
        .enumerate()
    {
        let path = scratch.hole(&format!("single-{seed}-{index}.raw"), len);
        if len >= 512 {
            scribble(&path, "raw", len / 512 * 512, &mut dice, None);
        } else if len > 0 {
            std::fs::write(&path, &b"abc"[..3.min(usize::try_from(len).unwrap())]).unwrap();
        }
        pictures.push(Picture { path, format: "raw" });
    }
    pictures
}

/// Chains of two to four images of mixed formats, options and sizes.
pub fn chains(scratch: &Scratch, seed: u64, count: u64) -> Vec<Picture> {
    let mut dice = Dice::new(seed);
    let mut pictures = Vec::new();
    for chain in 0..count {
        let mut below: Option<(PathBuf, &'static str)> = None;
        for depth in 0..2 + dice.roll(3) {
            let size = (1 + dice.roll(6)) * (1 << 20) + dice.roll(3) * 512;
            let name = format!("chain-{seed}-{chain}-{depth}");
            let format = if below.is_none() && dice.roll(3) == 0 {
                "raw"
            } else {
                "qcow2"
            };
            let path = scratch.join(format!("{name}.{format}"));
            // With a backing image, preallocation and raw data files are refused.
            let kinds = if below.is_some() { 11 } else { KINDS.len() as u64 };
            let (options, compress) = KINDS[usize::try_from(dice.roll(kinds)).unwrap()];
            let options = options.replace("DATA", scratch.join(format!("{name}.data")).to_str().unwrap());
            match &below {
                None if format == "raw" => oracle::create(&path, "raw", "", &size.to_string()),
                None => oracle::create(&path, "qcow2", &options, &size.to_string()),
                Some((backing, backing_format)) => oracle::create_overlay(
                    &path,
                    &options,
                    backing.file_name().unwrap(),
                    backing_format,
                    Some(&size.to_string()),
                ),
            }
            let compress = compress.filter(|_| format == "qcow2");
            scribble(&path, format, size, &mut dice, compress);
            below = Some((path, format));
        }
        let (path, format) = below.unwrap();
        pictures.push(Picture { path, format });
    }
    pictures
}
