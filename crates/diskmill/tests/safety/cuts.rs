//! Power cuts in the middle of operations.

use std::sync::Arc;

use diskmill_testkit::crash::{Effort, Figures, Tale};
use diskmill_testkit::figures::tell_cuts;
use diskmill_testkit::random::{seed, soak};

use super::operations::OPERATIONS;
use super::world::{Operation, Recorded, Recorder, World};

fn survive(operation: &Operation) -> Figures {
    let Some(effect) = operation.outcome.effect() else {
        return Figures::default();
    };
    let mut world = World::new(&operation.make);
    let first = world.files();
    let before = world.look().expect("look");
    let recorder = Arc::new(Recorder::default());
    world.around = Some(recorder.clone());
    let mut tale = Tale::new(operation.name, &recorder.journal, before);
    (operation.run)(&world).unwrap_or_else(|error| panic!("{}: {error:?}", operation.name));
    world.around = None;
    let after = world.look().expect("look");
    tale.note(0, operation.name, effect, after);
    tale.tolerate(operation.outcome.tolerance());
    let names = recorder.names();
    assert!(
        !recorder.journal.is_empty(),
        "{}: nothing was written",
        operation.name
    );
    let mut effort = Effort::usual(seed()).times(2 * soak());
    // Few states, so that more of them are looked at closely.
    (effort.overwrite_every, effort.repair_every, effort.judge_every) = (5, 5, 17);
    tale.survive(&Recorded { names, first }, effort)
}

#[test]
fn a_power_cut_at_random_in_an_operation_loses_nothing() {
    let mut all = Figures::default();
    for operation in OPERATIONS {
        all += survive(operation);
    }
    tell_cuts(&all);
}
