//! Extents that only VMware's own products write, made from what is known of their layout.

/// Bytes of a sector.
const SECTOR: usize = 512;

fn put(file: &mut Vec<u8>, at: usize, bytes: &[u8]) {
    if file.len() < at + bytes.len() {
        file.resize(at + bytes.len(), 0);
    }
    file[at..at + bytes.len()].copy_from_slice(bytes);
}

fn sectors(bytes: usize) -> u64 {
    bytes.div_ceil(SECTOR) as u64
}

/// A descriptor of `kind` with these extent lines, backed by nothing.
pub fn descriptor(kind: &str, extents: &[String]) -> Vec<u8> {
    format!(
        "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\ncreateType=\"{kind}\"\n\n\
         # Extent description\n{}\n\n# The Disk Data Base\n#DDB\n\nddb.adapterType = \"lsilogic\"\n",
        extents.join("\n")
    )
    .into_bytes()
}

/// An ESX copy-on-write extent ("vmfsSparse") of `disk`, in grains of `grain` sectors; grains of zeros are not stored.
pub fn cowd(disk: &[u8], grain: u32) -> Vec<u8> {
    const ENTRIES: usize = 4096;
    let grain_len = grain as usize * SECTOR;
    let covers = grain_len * ENTRIES;
    let tables = disk.len().div_ceil(covers);
    let mut file = vec![0; 2048];
    put(&mut file, 0, b"COWD");
    let gd = 4_u32;
    let mut next = gd as usize + (tables * 4).div_ceil(SECTOR);
    let words = [1, 3, sectors(disk.len()) as u32, grain, gd, tables as u32];
    for (index, word) in words.into_iter().enumerate() {
        put(&mut file, 4 + index * 4, &word.to_le_bytes());
    }
    for (index, part) in disk.chunks(covers).enumerate() {
        if part.iter().all(|byte| *byte == 0) {
            continue;
        }
        let table = next;
        put(
            &mut file,
            gd as usize * SECTOR + index * 4,
            &(table as u32).to_le_bytes(),
        );
        next += ENTRIES * 4 / SECTOR;
        for (slot, bytes) in part.chunks(grain_len).enumerate() {
            if bytes.iter().any(|byte| *byte != 0) {
                put(&mut file, table * SECTOR + slot * 4, &(next as u32).to_le_bytes());
                put(&mut file, next * SECTOR, bytes);
                next += grain as usize;
            }
        }
        file.resize(next * SECTOR, 0);
    }
    file.resize(next * SECTOR, 0);
    put(&mut file, 28, &(next as u32).to_le_bytes());
    file
}

/// A space-efficient sparse extent ("seSparse") of `disk`; grains of zeros are not stored, every other one is marked.
pub fn se_sparse(disk: &[u8]) -> Vec<u8> {
    const GRAIN: usize = 8 * SECTOR;
    const ENTRIES: usize = 4096;
    const TABLE: usize = 64 * SECTOR;
    let tables = disk.len().div_ceil(GRAIN * ENTRIES);
    let gd = 8_u64;
    let gd_sectors = sectors(tables * 8);
    let tables_at = gd + gd_sectors;
    let grains_at = (tables_at + (tables * TABLE / SECTOR) as u64).next_multiple_of(8);
    let mut file = Vec::new();
    let mut word = |at: usize, value: u64| put(&mut file, at, &value.to_le_bytes());
    word(0, 0xcafe_babe);
    word(8, 0x2_0000_0001);
    word(16, sectors(disk.len()));
    word(24, 8);
    word(32, 64);
    for (at, offset, size) in [
        (80, 1, 1),
        (96, 2, 2),
        (112, 4, 4),
        (128, gd, gd_sectors),
        (144, tables_at, (tables * 64) as u64),
        (160, grains_at, 0),
        (176, grains_at, 0),
        (192, grains_at, sectors(disk.len())),
    ] {
        word(at, offset);
        word(at + 8, size);
    }
    word(SECTOR, 0xcafe_cafe);
    let mut used = 0_u64;
    for (index, part) in disk.chunks(GRAIN * ENTRIES).enumerate() {
        // Tables in another order than the disk's.
        let table = (tables - 1 - index) as u64;
        let entry = 0x1000_0000_0000_0000 | table;
        put(&mut file, gd as usize * SECTOR + index * 8, &entry.to_le_bytes());
        let table_at = tables_at as usize * SECTOR + table as usize * TABLE;
        for (slot, bytes) in part.chunks(GRAIN).enumerate() {
            let zero = bytes.iter().all(|byte| *byte == 0);
            let entry = match (zero, slot % 4) {
                (true, 0) => 0,
                (true, 1) => 1 << 60,
                (true, _) => 2 << 60,
                (false, _) => {
                    put(
                        &mut file,
                        grains_at as usize * SECTOR + used as usize * GRAIN,
                        bytes,
                    );
                    let place = used;
                    used += 1;
                    3 << 60 | (place & 0xfff) << 48 | place >> 12
                }
            };
            put(&mut file, table_at + slot * 8, &entry.to_le_bytes());
        }
    }
    file.resize(grains_at as usize * SECTOR + used as usize * GRAIN, 0);
    file
}
