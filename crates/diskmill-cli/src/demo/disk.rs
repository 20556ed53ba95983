//! A small disk with an MBR, one FAT16 partition, and files in it.
//!
//! ```text
//! sector 0      master boot record: one partition, type 0x0e
//! sector 2048   boot sector of the partition
//!        2049   two allocation tables
//!               root directory, 512 entries
//!               clusters of 2 KiB, numbered from 2
//! ```
//! The layout is that of Microsoft's "FAT: General Overview of On-Disk Format", version 1.03. Files lie in one piece
//! each, one behind the other.

use std::io;
use std::ops::Range;

const SECTOR: usize = 512;
const PARTITION: usize = 2048;
const CLUSTER_SECTORS: usize = 4;
const CLUSTER: usize = CLUSTER_SECTORS * SECTOR;
const FATS: usize = 2;
const ROOT_ENTRIES: usize = 512;
const ENTRY: usize = 32;
const LAST_IN_CHAIN: u16 = 0xffff;

/// The size of the disk in bytes.
pub const SIZE: usize = 64 << 20;

/// A file on the disk.
#[derive(Clone, Debug)]
pub struct DemoFile {
    /// Its name, as `DIR/NAME.EXT`.
    pub name: &'static str,
    /// Where its bytes are on the disk.
    pub place: Range<usize>,
}

/// A disk in memory.
pub struct DemoDisk {
    /// All of its bytes.
    pub bytes: Vec<u8>,
    /// The files on it.
    pub files: Vec<DemoFile>,
}

/// Makes the disk: always the same bytes.
pub fn make() -> io::Result<DemoDisk> {
    let mut writer = Writer::format()?;
    let mut root = Directory::new();
    root.volume(b"DISKMILL   ");
    for (name, bytes) in [
        ("README.TXT", readme()),
        ("LOG.TXT", log()),
        ("NOISE.BIN", noise(3 << 20)),
        ("ZEROS.BIN", vec![0; 4 << 20]),
    ] {
        writer.file(&mut root, name, name, &bytes)?;
    }
    let docs = writer.take(1)?;
    let mut directory = Directory::new();
    directory.link(b".          ", docs, 0x10);
    directory.link(b"..         ", 0, 0x10);
    for (path, name, text) in [
        (
            "DOCS/RAW.TXT",
            "RAW.TXT",
            "Byte N of the disk is byte N of the file.\n",
        ),
        (
            "DOCS/QCOW2.TXT",
            "QCOW2.TXT",
            "Clusters, found through two levels of tables.\n",
        ),
    ] {
        writer.file(&mut directory, path, name, text.as_bytes())?;
    }
    writer.place_directory(docs, &directory)?;
    root.link(b"DOCS       ", docs, 0x10);
    writer.finish(&root)
}

struct Writer {
    bytes: Vec<u8>,
    fat: Vec<u16>,
    files: Vec<DemoFile>,
    fat_sectors: usize,
    clusters: usize,
}

impl Writer {
    /// An empty file system in a partition that fills the disk.
    fn format() -> io::Result<Self> {
        let sectors = SIZE / SECTOR - PARTITION;
        let (fat_sectors, clusters) = geometry(sectors);
        let mut writer = Self {
            bytes: vec![0; SIZE],
            fat: vec![0; clusters + 2],
            files: Vec::new(),
            fat_sectors,
            clusters,
        };
        // The first two entries stand for the medium (a fixed disk) and a clean state.
        for (entry, value) in writer.fat.iter_mut().zip([0xfff8, LAST_IN_CHAIN]) {
            *entry = value;
        }
        writer.master_boot_record(sectors)?;
        writer.boot_sector(sectors)?;
        Ok(writer)
    }

    fn master_boot_record(&mut self, sectors: usize) -> io::Result<()> {
        let mut entry = Vec::with_capacity(16);
        // Not bootable; cylinders, heads and sectors are past what they can say; FAT16 by sector number.
        entry.extend_from_slice(&[0x00, 0xfe, 0xff, 0xff, 0x0e, 0xfe, 0xff, 0xff]);
        entry.extend_from_slice(&number32(PARTITION)?);
        entry.extend_from_slice(&number32(sectors)?);
        self.put(440, b"DMil")?;
        self.put(446, &entry)?;
        self.put(510, &[0x55, 0xaa])
    }

    fn boot_sector(&mut self, sectors: usize) -> io::Result<()> {
        let mut boot = Vec::with_capacity(SECTOR);
        boot.extend_from_slice(&[0xeb, 0x3c, 0x90]);
        boot.extend_from_slice(b"DISKMILL");
        boot.extend_from_slice(&number16(SECTOR)?);
        boot.push(CLUSTER_SECTORS as u8);
        boot.extend_from_slice(&number16(1)?);
        boot.push(FATS as u8);
        boot.extend_from_slice(&number16(ROOT_ENTRIES)?);
        boot.extend_from_slice(&number16(0)?);
        boot.push(0xf8);
        boot.extend_from_slice(&number16(self.fat_sectors)?);
        boot.extend_from_slice(&number16(63)?);
        boot.extend_from_slice(&number16(255)?);
        boot.extend_from_slice(&number32(PARTITION)?);
        boot.extend_from_slice(&number32(sectors)?);
        boot.extend_from_slice(&[0x80, 0x00, 0x29]);
        boot.extend_from_slice(&number32(0x2026_1122)?);
        boot.extend_from_slice(b"DISKMILL   FAT16   ");
        let at = PARTITION * SECTOR;
        self.put(at, &boot)?;
        self.put(at + 510, &[0x55, 0xaa])
    }

    fn put(&mut self, at: usize, bytes: &[u8]) -> io::Result<()> {
        let place = self
            .bytes
            .get_mut(at..at.saturating_add(bytes.len()))
            .ok_or_else(full)?;
        place.copy_from_slice(bytes);
        Ok(())
    }

    /// Takes `count` clusters in a row and chains them; the first one's number.
    fn take(&mut self, count: usize) -> io::Result<usize> {
        let first = self.fat.iter().position(|entry| *entry == 0).ok_or_else(full)?;
        for index in first..first + count {
            let next = if index + 1 == first + count {
                LAST_IN_CHAIN
            } else {
                u16::try_from(index + 1).map_err(|_| full())?
            };
            *self.fat.get_mut(index).ok_or_else(full)? = next;
        }
        Ok(first)
    }

    fn file(
        &mut self,
        directory: &mut Directory,
        path: &'static str,
        name: &str,
        bytes: &[u8],
    ) -> io::Result<()> {
        let first = self.take(bytes.len().div_ceil(CLUSTER).max(1))?;
        let at = self.cluster(first);
        self.put(at, bytes)?;
        directory.entry(&short_name(name), first, 0x20, bytes.len())?;
        self.files.push(DemoFile {
            name: path,
            place: at..at + bytes.len(),
        });
        Ok(())
    }

    fn place_directory(&mut self, cluster: usize, directory: &Directory) -> io::Result<()> {
        self.put(self.cluster(cluster), &directory.bytes)
    }

    /// Where a cluster is on the disk.
    fn cluster(&self, number: usize) -> usize {
        let data = PARTITION * SECTOR + self.root_at() + ROOT_ENTRIES * ENTRY;
        data + (number - 2) * CLUSTER
    }

    /// Where the root directory is in the partition.
    fn root_at(&self) -> usize {
        (1 + FATS * self.fat_sectors) * SECTOR
    }

    fn finish(mut self, root: &Directory) -> io::Result<DemoDisk> {
        debug_assert!(self.clusters < 65_525, "too many clusters for FAT16");
        let fat: Vec<u8> = self.fat.iter().flat_map(|entry| entry.to_le_bytes()).collect();
        for copy in 0..FATS {
            self.put((PARTITION + 1 + copy * self.fat_sectors) * SECTOR, &fat)?;
        }
        self.put(PARTITION * SECTOR + self.root_at(), &root.bytes)?;
        Ok(DemoDisk {
            bytes: self.bytes,
            files: self.files,
        })
    }
}

/// Sectors of one allocation table, and clusters, of a partition of `sectors`.
fn geometry(sectors: usize) -> (usize, usize) {
    let root = ROOT_ENTRIES * ENTRY / SECTOR;
    let mut fat = 1;
    loop {
        let clusters = (sectors - 1 - root - FATS * fat) / CLUSTER_SECTORS;
        let needed = ((clusters + 2) * 2).div_ceil(SECTOR);
        if needed <= fat {
            return (fat, clusters);
        }
        fat = needed;
    }
}

struct Directory {
    bytes: Vec<u8>,
}

impl Directory {
    fn new() -> Self {
        Self { bytes: Vec::new() }
    }

    fn volume(&mut self, label: &[u8; 11]) {
        self.link(label, 0, 0x08);
    }

    /// An entry without a size.
    fn link(&mut self, name: &[u8; 11], cluster: usize, attributes: u8) {
        // Cluster numbers come from `take`, which fits them into 16 bits.
        let _ = self.entry(name, cluster, attributes, 0);
    }

    fn entry(&mut self, name: &[u8; 11], cluster: usize, attributes: u8, len: usize) -> io::Result<()> {
        // 2026-11-22 12:00:00
        let date: u16 = (2026 - 1980) << 9 | 11 << 5 | 22;
        let time: u16 = 12 << 11;
        let mut entry = Vec::with_capacity(ENTRY);
        entry.extend_from_slice(name);
        entry.extend_from_slice(&[attributes, 0, 0]);
        for stamp in [time, date, date, 0, time, date] {
            entry.extend_from_slice(&stamp.to_le_bytes());
        }
        entry.extend_from_slice(&number16(cluster)?);
        entry.extend_from_slice(&number32(len)?);
        self.bytes.extend_from_slice(&entry);
        Ok(())
    }
}

fn short_name(name: &str) -> [u8; 11] {
    let (stem, extension) = name.split_once('.').unwrap_or((name, ""));
    let mut out = [b' '; 11];
    for (place, byte) in out.iter_mut().zip(stem.bytes().take(8)) {
        *place = byte;
    }
    for (place, byte) in out.iter_mut().skip(8).zip(extension.bytes()) {
        *place = byte;
    }
    out
}

fn number16(number: usize) -> io::Result<[u8; 2]> {
    Ok(u16::try_from(number).map_err(|_| full())?.to_le_bytes())
}

fn number32(number: usize) -> io::Result<[u8; 4]> {
    Ok(u32::try_from(number).map_err(|_| full())?.to_le_bytes())
}

fn full() -> io::Error {
    io::Error::from(io::ErrorKind::StorageFull)
}

fn readme() -> Vec<u8> {
    b"This disk was made by 'diskmill demo': an MBR, one FAT16 partition, and these files.\n\
      LOG.TXT compresses well, NOISE.BIN not at all, and ZEROS.BIN is all zeros.\n"
        .to_vec()
}

/// Text of the sort that fills real disks.
fn log() -> Vec<u8> {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut out = Vec::with_capacity(6 << 20);
    let mut second = 0;
    while out.len() < 6 << 20 {
        let number = random.next();
        second += number % 3;
        let verb = ["opened", "closed", "read", "wrote"][(number >> 8) as usize % 4];
        let line = format!(
            "{:02}:{:02}:{:02} worker-{} {verb} block {} in {} us\n",
            second / 3600 % 24,
            second / 60 % 60,
            second % 60,
            number >> 16 & 7,
            number >> 24 & 0xffff,
            number >> 48 & 0xfff
        );
        out.extend_from_slice(line.as_bytes());
    }
    out
}

fn noise(len: usize) -> Vec<u8> {
    let mut random = Random(0x2545_f491_4f6c_dd1d);
    let words = std::iter::repeat_with(|| random.next().to_le_bytes());
    words.flatten().take(len).collect()
}

/// Marsaglia's xorshift: enough for bytes that do not compress.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Cursor, Read};

    use super::*;

    #[test]
    fn another_implementation_reads_the_same_files() {
        let disk = make().unwrap();
        let partition = disk.bytes[PARTITION * SECTOR..].to_vec();
        let fat = fatfs::FileSystem::new(Cursor::new(partition), fatfs::FsOptions::new()).unwrap();
        assert_eq!(fat.fat_type(), fatfs::FatType::Fat16);
        assert_eq!(fat.volume_label_as_bytes(), b"DISKMILL");
        for file in &disk.files {
            let mut read = Vec::new();
            fat.root_dir()
                .open_file(file.name)
                .unwrap()
                .read_to_end(&mut read)
                .unwrap();
            assert!(read == disk.bytes[file.place.clone()], "{}", file.name);
        }
        let names = fat.root_dir().iter().count();
        assert_eq!(names, 5, "four files and a directory");
        let free = fat.stats().unwrap().free_clusters();
        assert!(free > 20_000, "{free}");
    }

    #[test]
    fn the_partition_table_names_one_fat_partition() {
        let disk = make().unwrap();
        assert_eq!(disk.bytes[450], 0x0e);
        assert_eq!(disk.bytes[454..458], 2048u32.to_le_bytes());
        assert_eq!(disk.bytes[458..462], 129_024u32.to_le_bytes());
        assert_eq!(disk.bytes[510..512], [0x55, 0xaa]);
        assert_eq!(disk.bytes.len(), SIZE);
    }
}
