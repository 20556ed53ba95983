//! The engine on a format that is as simple as can be: a byte that says which of two halves is the disk.

use diskmill_core::HostOffset;
use diskmill_storage::Memory;

use super::*;

const HALF: usize = 1024;
const FIRST: u64 = 512;

struct Halves;

impl Subject for Halves {
    fn look(&self, files: &[Vec<u8>]) -> Result<Picture> {
        let start = FIRST as usize + usize::from(files[0][0]) * HALF;
        Ok(Picture::of(files[0][start..start + HALF].to_vec()))
    }

    fn check(&self, _: &[Vec<u8>]) -> Result<CheckReport> {
        Ok(CheckReport::default())
    }

    fn repair(&self, files: &[Vec<u8>]) -> Result<Vec<Vec<u8>>> {
        Ok(files.to_vec())
    }

    fn overwrite(&self, files: &[Vec<u8>]) -> Result<Vec<Vec<u8>>> {
        Ok(files.to_vec())
    }

    fn second_opinion(&self, _: &[Vec<u8>], _: Tolerance) -> std::result::Result<(), String> {
        Ok(())
    }
}

/// Switches from a half full of 1 to one full of 2, flushing behind the data, behind the switch, or not.
fn switch(data: bool, end: bool, effect: Effect) -> Figures {
    let mut bytes = vec![0; FIRST as usize + 2 * HALF];
    bytes[FIRST as usize..FIRST as usize + HALF].fill(1);
    let journal = Journal::new();
    let disk = journal.record(std::sync::Arc::new(Memory::from(bytes)));
    let mut tale = Tale::new("switch", &journal, Picture::of(vec![1; HALF]));
    let mark = tale.mark();
    let write = |at, bytes: &[u8]| disk.write_at(HostOffset::new(at), bytes).expect("write");
    write(FIRST + HALF as u64, &[2; HALF]);
    if data {
        disk.sync().expect("flush");
    }
    write(0, &[1]);
    if end {
        disk.sync().expect("flush");
    }
    tale.note(mark, "switch", effect, Picture::of(vec![2; HALF]));
    let mark = tale.mark();
    write(511, &[7]);
    tale.note(mark, "something else", Effect::Flows, Picture::of(vec![2; HALF]));
    tale.survive(&Halves, Effort::usual(1))
}

#[test]
fn the_right_order_survives() {
    let figures = switch(true, true, Effect::Switches);
    assert!(figures.states > 10, "{figures:?}");
    switch(true, false, Effect::Flows);
}

#[test]
#[should_panic(expected = "sector 0 begins with")]
fn a_switch_before_its_data_is_found() {
    switch(false, true, Effect::Switches);
}

#[test]
#[should_panic(expected = "sector 0 begins with")]
fn a_return_before_the_flush_is_found() {
    switch(true, false, Effect::Switches);
}
