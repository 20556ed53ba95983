//! Images kept in the repository: what a certain version of a tool made, with the digest of what a guest reads.
//!
//! They guard against the oracle changing its mind, and hold states no command makes at will: a dirty bit, unknown
//! extensions, another program's layout. `cargo xtask golden` makes them anew; the table beside them says how each
//! was made and by which version.

use std::path::{Path, PathBuf};

use crate::Scratch;

/// The folder of the images.
pub fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden")
}

/// One image of the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Golden {
    /// Its name, which is its file's without `.zst`.
    pub name: String,
    /// Other files it needs, by name.
    pub needs: Vec<String>,
    /// The exit code of `check`.
    pub check: i32,
    /// The digest of the guest bytes, in hexadecimal.
    pub sha256: String,
    /// How it was made.
    pub made_by: String,
}

impl Golden {
    /// The row of the table: fields parted by tabs.
    pub fn row(&self) -> String {
        let needs = self.needs.join(" ");
        format!(
            "{}\t{needs}\t{}\t{}\t{}",
            self.name, self.check, self.sha256, self.made_by
        )
    }

    fn parse(row: &str) -> Option<Self> {
        let mut fields = row.split('\t');
        Some(Self {
            name: fields.next()?.to_owned(),
            needs: fields.next()?.split_whitespace().map(str::to_owned).collect(),
            check: fields.next()?.parse().ok()?,
            sha256: fields.next()?.to_owned(),
            made_by: fields.next()?.to_owned(),
        })
    }

    /// Unpacks the image and what it needs into `scratch`; returns the image's path.
    pub fn unpack(&self, scratch: &Scratch) -> PathBuf {
        for name in self.needs.iter().chain([&self.name]) {
            unpack(&folder(), name, scratch);
        }
        scratch.join(&self.name)
    }
}

fn unpack(folder: &Path, name: &str, scratch: &Scratch) {
    let packed = folder.join(format!("{name}.zst"));
    let bytes = std::fs::read(&packed)
        .and_then(|bytes| zstd::decode_all(bytes.as_slice()))
        .unwrap_or_else(|error| panic!("unpack {}: {error}", packed.display()));
    scratch.file(name, &bytes);
}

/// A file that a program of another time made, which nobody can make anew.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Relic {
    /// Its name.
    pub name: String,
    /// The digest of its bytes, in hexadecimal.
    pub sha256: String,
    /// Bytes of the disk.
    pub virtual_size: u64,
    /// The file it is backed by.
    pub backing: Option<String>,
    /// The digest of the guest bytes as that program read them, if it could.
    pub guest_sha256: Option<String>,
}

/// The files kept in the folder `format`, unpacked into `scratch`.
pub fn relics(format: &str, scratch: &Scratch) -> Vec<Relic> {
    let folder = folder().join(format);
    let table = std::fs::read_to_string(folder.join("samples.tsv")).expect("the table of relics");
    let some = |field: &str| (field != "-").then(|| field.to_owned());
    let relic = |row: &str| -> Option<Relic> {
        let mut fields = row.split('\t');
        let name = fields.next()?.to_owned();
        let sha256 = fields.nth(1)?.to_owned();
        let virtual_size = fields.nth(1)?.parse().ok()?;
        let backing = some(fields.next()?);
        let guest_sha256 = some(fields.nth(2)?);
        Some(Relic {
            name,
            sha256,
            virtual_size,
            backing,
            guest_sha256,
        })
    };
    let rows = table.lines().skip(1);
    let relics: Vec<Relic> = rows
        .map(|row| relic(row).unwrap_or_else(|| panic!("a bad row: {row}")))
        .collect();
    for relic in &relics {
        unpack(&folder, &relic.name, scratch);
    }
    relics
}

/// Packs the file at `path` into the folder.
pub fn pack(path: &Path) {
    let name = path.file_name().expect("a file name").to_string_lossy();
    let bytes = std::fs::read(path).expect("read the image");
    let packed = zstd::encode_all(bytes.as_slice(), 19).expect("pack the image");
    std::fs::write(folder().join(format!("{name}.zst")), packed).expect("write the packed image");
}

/// The images of the table.
pub fn all() -> Vec<Golden> {
    let table = std::fs::read_to_string(folder().join("golden.tsv")).expect("the table of golden images");
    let rows = table.lines().filter(|row| !row.starts_with('#'));
    rows.map(|row| Golden::parse(row).unwrap_or_else(|| panic!("a bad row: {row}")))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_and_the_folder_agree() {
        let all = all();
        assert!(all.len() > 10);
        for golden in &all {
            golden.unpack(&Scratch::new());
            assert_eq!(Golden::parse(&golden.row()).as_ref(), Some(golden));
        }
    }
}
