//! Workers that share a list: scoped threads, each with an outcome of its own.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use diskmill_core::{Job, Result};

/// Items a worker must have to be worth a thread.
const FEWEST: usize = 4;

/// Does `work` on every item and returns what each worker made of those it came by, which are in rising order. A thread
/// that cannot be had means one worker fewer.
pub(super) fn each<T: Sync, O: Default + Send>(
    items: &[T],
    job: Job<'_>,
    work: impl Fn(usize, &T, &mut O) -> Result<()> + Sync,
) -> Result<Vec<O>> {
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let helpers = cores.min(items.len().div_ceil(FEWEST)).saturating_sub(1);
    let next = AtomicUsize::new(0);
    let outcomes = Mutex::new(Vec::new());
    let labour = || {
        let mut outcome = O::default();
        let mut done = Ok(());
        while done.is_ok() {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(item) = items.get(index) else {
                break;
            };
            done = job.check().and_then(|()| work(index, item, &mut outcome));
        }
        if done.is_err() {
            // The others need not go on.
            next.store(items.len(), Ordering::Relaxed);
        }
        // A list is whole after every statement.
        let mut outcomes = outcomes.lock().unwrap_or_else(PoisonError::into_inner);
        outcomes.push(done.map(|()| outcome));
    };
    thread::scope(|scope| {
        for _ in 0..helpers {
            if thread::Builder::new().spawn_scoped(scope, labour).is_err() {
                break;
            }
        }
        labour();
    });
    let outcomes = outcomes.into_inner().unwrap_or_else(PoisonError::into_inner);
    outcomes.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use diskmill_core::{Error, ErrorKind};

    use super::*;

    #[test]
    fn every_item_is_done_once() {
        let items: Vec<u64> = (0..1000).collect();
        let outcomes = each(&items, Job::silent(), |index, item, sum: &mut Vec<u64>| {
            assert_eq!(index as u64, *item);
            sum.push(*item);
            Ok(())
        })
        .unwrap();
        assert!(outcomes.iter().all(|done| done.is_sorted()));
        let mut all: Vec<u64> = outcomes.into_iter().flatten().collect();
        all.sort_unstable();
        assert_eq!(all, items);
    }

    #[test]
    fn an_error_ends_it() {
        let items = [0; 100];
        let failed = each(&items, Job::silent(), |index, _, (): &mut ()| match index {
            50 => Err(Error::bare(ErrorKind::Io)),
            _ => Ok(()),
        });
        assert_eq!(failed.unwrap_err().kind(), ErrorKind::Io);
        assert!(each(&[], Job::silent(), |_, (): &(), (): &mut ()| Ok(())).is_ok());
    }
}
