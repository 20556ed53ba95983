use std::sync::Arc;

use diskmill_core::StorageMut;
use diskmill_testkit::{Scratch, contract};

use super::*;

fn fresh(scratch: &Scratch, cache: CacheMode) -> Arc<dyn StorageMut> {
    let path = scratch.file("disk", b"");
    Arc::new(File::open(path, &FileOptions::write(LockPlan::WRITE).cache(cache)).unwrap())
}

#[test]
fn keeps_the_contract_in_every_mode() {
    for dir in [std::env::temp_dir(), "/dev/shm".into()] {
        let scratch = Scratch::beneath(dir);
        for cache in [CacheMode::Writeback, CacheMode::None, CacheMode::Unsafe] {
            contract::storage::all(&|| fresh(&scratch, cache));
        }
    }
}
