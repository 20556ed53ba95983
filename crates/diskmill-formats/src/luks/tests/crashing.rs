//! Power cuts and failing calls while data is written.

use diskmill_core::Chain;
use diskmill_testkit::crash::{Effect, Effort, Figures, Picture, Subject, Tale, Tolerance, given_up};
use diskmill_testkit::fault::{Failure, Faults, Journal, Lasting};
use diskmill_testkit::model::{Model, Op, pattern};
use diskmill_testkit::random::{seed, soak};

use super::writing::ops;
use super::*;

impl Subject for Keyed {
    fn look(&self, files: &[Vec<u8>]) -> Result<Picture> {
        self.contents(&files[0]).map(Picture::of)
    }

    fn check(&self, files: &[Vec<u8>]) -> Result<CheckReport> {
        let main: Arc<dyn Storage> = memory(&files[0]);
        let parsed = DRIVER.parse(Arc::clone(&main), &OpenSpec::default())?;
        parsed.check(vec![(Role::Main, main)], &OpenSpec::default(), Job::silent())
    }

    fn repair(&self, files: &[Vec<u8>]) -> Result<Vec<Vec<u8>>> {
        // There is nothing that could be: what is left must do.
        Ok(files.to_vec())
    }

    fn overwrite(&self, files: &[Vec<u8>]) -> Result<Vec<Vec<u8>>> {
        let file = memory(&files[0]);
        let layer = self.open(&file)?;
        let all: Vec<u8> = (0..layer.virtual_size()).map(|at| pattern(0x5b, at)).collect();
        layer.write_at(at(0), &all, &Chain::default())?;
        layer.flush()?;
        Ok(vec![bytes(&*file)])
    }

    fn second_opinion(&self, _files: &[Vec<u8>], _tolerance: Tolerance) -> Result<(), String> {
        Err("nobody else checks such images".to_owned())
    }
}

fn effort() -> Effort {
    let mut effort = Effort::usual(seed());
    effort.judge_every = u64::MAX;
    effort
}

#[test]
fn a_power_cut_loses_nothing_that_was_flushed() {
    let quick = Keyed::quick();
    let below = Chain::default();
    let mut figures = Figures::default();
    for story in 0..3 * u64::from(soak()) {
        let ops = ops(100 + story, 12);
        let journal = Journal::new();
        let file = journal.record(memory(&quick.image(&disk(SIZE))));
        let mut layer = quick.open(&file).expect("open");
        let mut model = Model::new(disk(SIZE));
        let start = Picture::of(disk(SIZE));
        let mut tale = Tale::new(format!("story {story}: {ops:?}"), &journal, start);
        for op in &ops {
            let mark = tale.mark();
            let through = given_up(op, model.bytes(), &below);
            if *op == Op::Reopen {
                drop(layer);
                layer = quick.open(&file).expect("open again");
            }
            model.apply(op, &layer, &below, 512, &|_| None).expect("done");
            let after = Picture::of(model.bytes().to_vec());
            let effect = match op {
                Op::Flush => Effect::Settles,
                Op::Resize { .. } => {
                    layer.flush().expect("flush");
                    Effect::Settles
                }
                _ => Effect::Flows,
            };
            tale.note_through(mark, format!("{op:?}"), effect, through, after);
        }
        figures += tale.survive(quick, effort());
    }
    assert!(figures.states > 80 && figures.overwritten > 0, "{figures:?}");
}

#[test]
fn a_call_that_fails_harms_nothing_beside_it() {
    let quick = Keyed::quick();
    let below = Chain::default();
    let image = quick.image(&disk(SIZE));
    let mut ops = ops(7, 10);
    ops.retain(|op| *op != Op::Reopen);
    let attempt = |faults: &Arc<Faults>| {
        let inner = memory(&image);
        let file = faults.wrap(Arc::clone(&inner));
        let mut failed = None;
        match quick.open(&file) {
            Err(error) => failed = Some(error),
            Ok(layer) => {
                let mut model = Model::new(disk(SIZE));
                for op in &ops {
                    if let Err(error) = model.apply(op, &layer, &below, 512, &|_| None) {
                        failed = Some(error);
                        break;
                    }
                }
                let more = layer.write_at(at(0), &[1; 512], &below);
                failed = failed.or(more.err());
                failed = failed.or(layer.flush().err());
            }
        }
        (bytes(&*inner), failed)
    };
    let calls = {
        let faults = Faults::new();
        let failed = attempt(&faults).1;
        assert!(failed.is_none(), "{failed:?}");
        faults.calls()
    };
    for number in (0..calls).step_by(calls.div_ceil(30).max(1) as usize) {
        for (failure, lasting) in [
            (Failure::Io, Lasting::Once),
            (Failure::ShortWrite, Lasting::ForGood),
        ] {
            let faults = Faults::new();
            faults.fail_at(number, failure, lasting);
            let (file, failed) = attempt(&faults);
            if faults.struck() > 0 && lasting == Lasting::ForGood {
                let error = failed.unwrap_or_else(|| panic!("call {number}: nobody noticed"));
                assert_ne!(error.kind(), ErrorKind::Corrupt, "call {number}: {error:?}");
            }
            quick.contents(&file).expect("it opens");
            let header = usize::try_from(quick.volume.header().payload_offset()).unwrap();
            assert!(file[..header] == image[..header], "call {number}");
        }
    }
}
