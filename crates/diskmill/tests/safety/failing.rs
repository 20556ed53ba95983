//! Calls that fail in the middle of operations.

use std::collections::BTreeMap;
use std::sync::Arc;

use diskmill_core::ErrorKind;
use diskmill_testkit::crash::Tale;
use diskmill_testkit::fault::{Failure, Faults, Journal, Lasting};
use diskmill_testkit::figures::tell;
use diskmill_testkit::random::soak;

use super::operations::OPERATIONS;
use super::world::{Disturber, Operation, Outcome, Recorded, World};

/// Calls of each operation that are made to fail.
const CALLS: u64 = 10;

fn attempt(
    operation: &Operation,
    first: &BTreeMap<String, Vec<u8>>,
    faults: &Arc<Faults>,
) -> (World, diskmill_core::Result<()>) {
    let mut world = World::of(first);
    world.around = Some(Arc::new(Disturber(Arc::clone(faults))));
    let done = (operation.run)(&world);
    world.around = None;
    (world, done)
}

/// Runs `operation` with some of its calls failing. Returns how many runs there were.
fn fail(operation: &Operation) -> u64 {
    let mut first = World::new(&operation.make).files();
    let faults = Faults::new();
    let (whole, done) = attempt(operation, &first, &faults);
    done.unwrap_or_else(|error| panic!("{}: {error:?}", operation.name));
    let mut runs = 0;
    let calls = faults.calls();
    let step = calls.div_ceil(CALLS * u64::from(soak())).max(1);
    for call in (0..calls).step_by(usize::try_from(step).expect("few")) {
        for failure in Failure::ALL {
            for lasting in [Lasting::Once, Lasting::ForGood] {
                if operation.outcome == Outcome::New {
                    // Every other time there is something to lose.
                    if runs % 2 == 0 {
                        first.insert("new".to_owned(), b"old".to_vec());
                    } else {
                        first.remove("new");
                    }
                }
                runs += 1;
                let faults = Faults::new();
                faults.fail_at(call, failure, lasting);
                let (world, done) = attempt(operation, &first, &faults);
                let what = format!("{}, call {call}, {failure:?} {lasting:?}", operation.name);
                if faults.struck() == 0 {
                    continue;
                }
                if let Err(error) = &done {
                    assert_ne!(error.kind(), ErrorKind::Corrupt, "{what}: {error:?}");
                    let folder = world.scratch.path().to_str().expect("a plain path");
                    assert!(
                        format!("{error:?}").contains(folder),
                        "{what}: names no file: {error:?}"
                    );
                } else {
                    assert!(lasting == Lasting::Once, "{what}: nobody noticed");
                }
                match operation.outcome.effect() {
                    None if done.is_err() => {
                        assert!(world.files() == first, "{what}: {:?}", world.scratch.names());
                    }
                    None => {}
                    Some(effect) => {
                        let subject = Recorded {
                            names: first.keys().cloned().collect(),
                            first: first.clone(),
                        };
                        let start = World::of(&first).look().expect("look");
                        let tale = Tale::new(operation.name, &Journal::new(), start);
                        let files: Vec<Vec<u8>> = world.files().into_values().collect();
                        tale.failed(
                            &subject,
                            &files,
                            (effect, operation.outcome.tolerance()),
                            Vec::new(),
                            &whole.look().expect("look"),
                        )
                        .unwrap_or_else(|text| panic!("{what} ({done:?}): {text}"));
                    }
                }
            }
        }
    }
    runs
}

#[test]
fn a_call_that_fails_at_random_loses_nothing() {
    for operation in OPERATIONS {
        tell("failing calls", fail(operation));
    }
}
