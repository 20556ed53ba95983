//! Encrypted disks, ours and others': headers, keys and contents, with qemu and cryptsetup as judges.

mod hostile;
mod luks2;
mod qemu;
mod slots;

use std::error::Error as _;
use std::path::Path;

use diskmill_core::{Error, HostOffset, Job, Options, Storage, StorageMut};
use diskmill_formats::crypt::luks::{NewVolume, Place, Plan, Volume};
use diskmill_storage::Memory;

/// Bytes of the disks.
const SIZE: usize = 64 << 10;

/// The file at `path`, in memory.
fn load(path: impl AsRef<Path>) -> Memory {
    Memory::from(std::fs::read(path).unwrap())
}

/// A choice that opens quickly, also unoptimised.
const QUICK: &str = "cipher-alg=aes-128,cipher-mode=cbc,hash-alg=sha1";

/// An error and all that is behind it.
fn text(error: &Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(error) = next {
        text = format!("{text}: {error}");
        next = error.source();
    }
    text
}

/// A disk that is another in every sector.
fn disk() -> Vec<u8> {
    (0..SIZE).map(|at| (at / 512 * 31 + at % 251) as u8).collect()
}

/// A new standalone volume with a [`disk`] in it, behind "one".
fn volume(options: &str) -> (NewVolume, Memory) {
    let plan = Plan::parse(&Options::parse(&format!("iter-time=1,{options}")), "").unwrap();
    let new = plan.make(b"one", Job::silent()).unwrap();
    let file = Memory::new();
    let mut data = disk();
    new.key().cipher().unwrap().encrypt(0, &mut data).unwrap();
    file.write_at(HostOffset::new(plan.header_len()), &data).unwrap();
    new.write_material(&file, HostOffset::ZERO).unwrap();
    new.write_header(&file, HostOffset::ZERO).unwrap();
    (new, file)
}

/// What is in a standalone volume, behind `passphrase`.
fn contents(file: &dyn Storage, passphrase: &str) -> Vec<u8> {
    let volume = Volume::load(file, Place::Standalone).unwrap();
    let key = volume
        .unlock(file, passphrase.as_bytes(), Job::silent())
        .unwrap_or_else(|error| panic!("{:?} {error:?}", volume.header()));
    let start = volume.header().payload_offset();
    let mut data = vec![0; (file.len().unwrap() - start) as usize];
    file.read_at(HostOffset::new(start), &mut data).unwrap();
    key.cipher().unwrap().decrypt(0, &mut data).unwrap();
    data
}
