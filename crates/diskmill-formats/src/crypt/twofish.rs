//! Twofish (Schneier and others, "Twofish: A 128-Bit Block Cipher", 1998).
//!
//! The `twofish` crate computes the S-boxes of the key anew for every byte of every round, which is 1 MiB/s. Here they
//! are tables made once for a key ("full keying", section 5.1), more than a hundred times as fast.

use zeroize::Zeroize;

use super::block::BlockCipher;

/// A key's tables. Wiped when they are dropped.
pub(super) struct Twofish {
    /// The S-boxes, each with its column of the MDS matrix.
    boxes: Box<[[u32; 256]; 4]>,
    /// Words for whitening (eight) and rounds (two each).
    keys: [u32; 40],
}

impl Drop for Twofish {
    fn drop(&mut self) {
        self.boxes.zeroize();
        self.keys.zeroize();
    }
}

/// The fixed permutations q0 and q1, made of four tables of four bits each (section 4.3.5).
const Q: [[u8; 256]; 2] = [
    permutation([
        [8, 1, 7, 13, 6, 15, 3, 2, 0, 11, 5, 9, 14, 12, 10, 4],
        [14, 12, 11, 8, 1, 2, 3, 5, 15, 4, 10, 6, 7, 0, 9, 13],
        [11, 10, 5, 14, 6, 13, 9, 0, 12, 8, 15, 3, 2, 4, 7, 1],
        [13, 7, 15, 4, 1, 2, 6, 14, 9, 11, 3, 0, 8, 5, 12, 10],
    ]),
    permutation([
        [2, 8, 11, 13, 15, 7, 6, 14, 3, 1, 9, 4, 0, 10, 12, 5],
        [1, 14, 2, 11, 4, 12, 3, 7, 6, 13, 10, 5, 15, 9, 0, 8],
        [4, 12, 7, 5, 1, 6, 9, 10, 0, 14, 13, 8, 2, 11, 3, 15],
        [11, 9, 5, 1, 12, 3, 13, 14, 6, 4, 7, 15, 2, 0, 8, 10],
    ]),
];

/// Which permutation each byte of a word meets: before the key's fourth word, third, second, first, and at the end
/// (figure 2).
const ORDER: [[usize; 4]; 5] = [
    [1, 0, 0, 1],
    [1, 1, 0, 0],
    [0, 1, 0, 1],
    [0, 0, 1, 1],
    [1, 0, 1, 0],
];
/// The MDS matrix, by columns.
const MDS: [[u8; 4]; 4] = [
    [0x01, 0x5b, 0xef, 0xef],
    [0xef, 0xef, 0x5b, 0x01],
    [0x5b, 0xef, 0x01, 0xef],
    [0x5b, 0x01, 0xef, 0x5b],
];
/// The Reed-Solomon matrix, by columns.
const RS: [[u8; 4]; 8] = [
    [0x01, 0xa4, 0x02, 0xa4],
    [0xa4, 0x56, 0xa1, 0x55],
    [0x55, 0x82, 0xfc, 0x87],
    [0x87, 0xf3, 0xc1, 0x5a],
    [0x5a, 0x1e, 0x47, 0x58],
    [0x58, 0xc6, 0xae, 0xdb],
    [0xdb, 0x68, 0x3d, 0x9e],
    [0x9e, 0xe5, 0x19, 0x03],
];
/// The polynomials of the two fields, without their highest bit.
const MDS_FIELD: u8 = 0x69;
const RS_FIELD: u8 = 0x4d;

#[allow(clippy::indexing_slicing, reason = "evaluated by the compiler")]
const fn permutation(tables: [[u8; 16]; 4]) -> [u8; 256] {
    let mut out = [0; 256];
    let mut x: u8 = 0;
    loop {
        let (mut a, mut b) = (x >> 4, x & 15);
        let mut pass = 0;
        while pass < 4 {
            let ror = (b >> 1) | ((b & 1) << 3);
            let mixed = (a ^ ror ^ ((a & 1) << 3)) & 15;
            a = tables[pass][(a ^ b) as usize];
            b = tables[pass + 1][mixed as usize];
            pass += 2;
        }
        out[x as usize] = b << 4 | a;
        if x == u8::MAX {
            return out;
        }
        x += 1;
    }
}

/// Looks a byte up: the compiler knows that there are 256.
fn at<T: Copy + Default>(table: &[T; 256], index: u8) -> T {
    table.get(usize::from(index)).copied().unwrap_or_default()
}

/// The product in GF(2^8).
fn multiply(mut a: u8, mut b: u8, field: u8) -> u8 {
    let mut product = 0;
    while b != 0 {
        if b & 1 != 0 {
            product ^= a;
        }
        a = (a << 1) ^ if a & 0x80 != 0 { field } else { 0 };
        b >>= 1;
    }
    product
}

/// A column times a byte, as a word.
fn column(column: [u8; 4], byte: u8, field: u8) -> u32 {
    u32::from_le_bytes(column.map(|factor| multiply(byte, factor, field)))
}

/// What byte number `place` of a word becomes on its way through the permutations and the bytes of the words
/// `list`, which the last meets first.
fn substitute(place: usize, byte: u8, list: &[u32]) -> u8 {
    let skip = ORDER.len().saturating_sub(list.len()).saturating_sub(1);
    let mut stages = ORDER.iter().skip(skip);
    let through = |stage: Option<&[usize; 4]>, byte: u8| {
        let which = stage.and_then(|stage| stage.get(place)).copied().unwrap_or(0);
        Q.get(which).map_or(0, |table| at(table, byte))
    };
    let mut byte = byte;
    for word in list.iter().rev() {
        let key = word.to_le_bytes().get(place).copied().unwrap_or(0);
        byte = through(stages.next(), byte) ^ key;
    }
    through(stages.next(), byte)
}

/// The function h of a word whose bytes are all `byte` (section 4.3.2).
fn h(byte: u8, list: &[u32]) -> u32 {
    let columns = MDS.into_iter().enumerate();
    columns.fold(0, |sum, (place, factors)| {
        sum ^ column(factors, substitute(place, byte, list), MDS_FIELD)
    })
}

impl Twofish {
    /// The tables of `key`, which has 16, 24 or 32 bytes.
    pub(super) fn new(key: &[u8]) -> Self {
        let (pairs, _) = key.as_chunks::<8>();
        let half = |bytes: &[u8]| bytes.first_chunk().copied().map_or(0, u32::from_le_bytes);
        let mut even: Vec<u32> = pairs.iter().map(|pair| half(pair)).collect();
        let mut odd: Vec<u32> = pairs.iter().map(|[_, _, _, _, rest @ ..]| half(rest)).collect();
        let word_of = |pair: &[u8; 8]| {
            let terms = RS.into_iter().zip(pair);
            terms.fold(0, |sum, (factors, byte)| sum ^ column(factors, *byte, RS_FIELD))
        };
        let mut list: Vec<u32> = pairs.iter().rev().map(word_of).collect();
        let mut made = Self {
            boxes: Box::new([[0; 256]; 4]),
            keys: [0; 40],
        };
        for ((place, table), factors) in made.boxes.iter_mut().enumerate().zip(MDS) {
            for (entry, byte) in table.iter_mut().zip(0_u8..=255) {
                *entry = column(factors, substitute(place, byte, &list), MDS_FIELD);
            }
        }
        for (pair, number) in made
            .keys
            .as_chunks_mut::<2>()
            .0
            .iter_mut()
            .zip((0_u8..).step_by(2))
        {
            let a = h(number, &even);
            let b = h(number.wrapping_add(1), &odd).rotate_left(8);
            let sum = a.wrapping_add(b);
            *pair = [sum, sum.wrapping_add(b).rotate_left(9)];
        }
        even.zeroize();
        odd.zeroize();
        list.zeroize();
        made
    }

    fn g(&self, [a, b, c, d]: [u8; 4]) -> u32 {
        let [one, two, three, four] = self.boxes.as_ref();
        at(one, a) ^ at(two, b) ^ at(three, c) ^ at(four, d)
    }

    /// The function F without its round keys.
    fn f(&self, left: u32, right: u32) -> (u32, u32) {
        let one = self.g(left.to_le_bytes());
        let two = self.g(right.rotate_left(8).to_le_bytes());
        let sum = one.wrapping_add(two);
        (sum, sum.wrapping_add(two))
    }

    fn encrypt_block(&self, block: &mut [u8; 16]) {
        let ([before, after, rounds @ ..], _) = self.keys.as_chunks::<4>() else {
            return;
        };
        let [mut a, mut b, mut c, mut d] = whiten(words(block), before);
        for [first, second, third, fourth] in rounds {
            let (f, g) = self.f(a, b);
            c = (c ^ f.wrapping_add(*first)).rotate_right(1);
            d = d.rotate_left(1) ^ g.wrapping_add(*second);
            let (f, g) = self.f(c, d);
            a = (a ^ f.wrapping_add(*third)).rotate_right(1);
            b = b.rotate_left(1) ^ g.wrapping_add(*fourth);
        }
        store(block, whiten([c, d, a, b], after));
    }

    fn decrypt_block(&self, block: &mut [u8; 16]) {
        let ([before, after, rounds @ ..], _) = self.keys.as_chunks::<4>() else {
            return;
        };
        let [mut c, mut d, mut a, mut b] = whiten(words(block), after);
        for [first, second, third, fourth] in rounds.iter().rev() {
            let (f, g) = self.f(c, d);
            a = a.rotate_left(1) ^ f.wrapping_add(*third);
            b = (b ^ g.wrapping_add(*fourth)).rotate_right(1);
            let (f, g) = self.f(a, b);
            c = c.rotate_left(1) ^ f.wrapping_add(*first);
            d = (d ^ g.wrapping_add(*second)).rotate_right(1);
        }
        store(block, whiten([a, b, c, d], before));
    }
}

impl BlockCipher for Twofish {
    fn encrypt(&self, blocks: &mut [u8]) {
        for block in blocks.as_chunks_mut::<16>().0 {
            self.encrypt_block(block);
        }
    }

    fn decrypt(&self, blocks: &mut [u8]) {
        for block in blocks.as_chunks_mut::<16>().0 {
            self.decrypt_block(block);
        }
    }
}

fn words(block: &[u8; 16]) -> [u32; 4] {
    let mut words = [0; 4];
    for (word, bytes) in words.iter_mut().zip(block.as_chunks::<4>().0) {
        *word = u32::from_le_bytes(*bytes);
    }
    words
}

fn whiten([a, b, c, d]: [u32; 4], keys: &[u32; 4]) -> [u32; 4] {
    let [one, two, three, four] = keys;
    [a ^ one, b ^ two, c ^ three, d ^ four]
}

fn store(block: &mut [u8; 16], words: [u32; 4]) {
    for (bytes, word) in block.as_chunks_mut::<4>().0.iter_mut().zip(words) {
        *bytes = word.to_le_bytes();
    }
}
