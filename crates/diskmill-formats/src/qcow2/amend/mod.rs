//! Changing the options an image was made with.
//!
//! All of a wish is looked at before anything is changed. Then each option is changed on its own, in the order in which
//! they depend on one another, and each is durable before the next; a power cut leaves some of them done.

mod wish;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use diskmill_core::{Amendment, Chain, Job, Result};

pub use super::refcount::TooNarrow;
pub use wish::{AmendError, OPTIONS};

use super::crypto::place_of;
use super::extension::Extension;
use super::flight::Hold;
use super::header::{Autoclear, Compatible, CompressionType, Header, Incompatible, RefcountOrder, Version};
use super::map::L1Entry;
use super::read_header;
use super::snapshot::write::SnapshotTable;
use super::tables::{L2Tables, Tables};
use super::write::Image;
use crate::crypt::luks::change_slots;
use wish::Wish;

/// Header clusters up to this size have no room for the names of features.
const NAMELESS_CLUSTER: u64 = 4096;

/// Tells how far the work is: each table or block looked at is a cluster of it.
struct Work<'a> {
    job: Job<'a>,
    cluster: u64,
}

impl Work<'_> {
    fn tick(&self) -> Result<()> {
        self.job.check()?;
        self.job.observer.advance(self.cluster);
        Ok(())
    }
}

impl Image {
    /// See [`LayerMut::amend`](diskmill_core::LayerMut::amend).
    pub(super) fn amend_all(&self, asked: &Amendment, below: &Chain, job: Job<'_>) -> Result<()> {
        let _flight = self.flights.hold(0..u64::MAX, Hold::Alone);
        let header = self.look(|tables| read_header(tables.fence.file().as_ref()))?;
        let wish = Wish::new(&asked.options, &header)?;
        self.change_all(|tables, snapshots, _| self.may_downgrade(tables, snapshots, &header, &wish))?;
        let work = Work {
            job,
            cluster: self.geometry.cluster_size(),
        };
        self.announce(&header, &wish, &work)?;
        if let (Some(slots), Some(place)) = (&wish.slots, place_of(&header)) {
            let file = self.look(|tables| Ok(Arc::clone(tables.fence.file())))?;
            let key = self.sealing.volume_key()?;
            change_slots(file.as_ref(), place, slots, key, &self.secrets, asked.force, job)?;
        }
        if wish.version == Version::V3 && header.version == Version::V2 {
            self.upgrade()?;
        }
        if let Some(order) = wish.refcount_order {
            self.change_refcounts(order, &work)?;
        }
        self.change_all(|tables, _, _| tables.rewrite_header(|header| wish.enter(header)))?;
        if let Some(size) = wish.size {
            self.resize_held(size, below)?;
        }
        if wish.version == Version::V2 && header.version == Version::V3 {
            self.downgrade(&work)?;
        }
        self.change(Tables::flush)
    }

    /// Announces how much work there is, if it is any that takes time.
    fn announce(&self, header: &Header, wish: &Wish, work: &Work<'_>) -> Result<()> {
        let blocks = match wish.refcount_order {
            // Looking at the old ones and writing the new ones.
            Some(order) => {
                let old = self.look(|tables| Ok(tables.refcounts.block_count()))?;
                let wider = order.get().saturating_sub(header.refcount_order.get());
                old.saturating_add(old << wider)
            }
            None => 0,
        };
        let tables = match (header.version, wish.version) {
            (Version::V3, Version::V2) => {
                self.change_all(|tables, snapshots, _| Ok(all_l2(tables, snapshots)?.len() as u64))?
            }
            _ => 0,
        };
        let total = blocks.saturating_add(tables);
        if total > 0 {
            work.job.observer.total(total.saturating_mul(work.cluster));
        }
        Ok(())
    }

    /// Makes a version 3 image of a version 2 one.
    fn upgrade(&self) -> Result<()> {
        self.change_all(|tables, snapshots, _| {
            tables.flush()?;
            // Version 3 insists on fields of snapshots that older programs left out.
            snapshots.complete(tables)?;
            tables.rewrite_header(|header| {
                header.version = Version::V3;
                header.tail = Some(vec![0; 7]);
                if header.cluster_bits.cluster_size() > NAMELESS_CLUSTER {
                    let behind = |extension: &Extension| {
                        use Extension::{BackingFormat, DataFile, Encryption};
                        matches!(extension, BackingFormat(_) | DataFile(_) | Encryption(_))
                    };
                    let at = header.extensions.iter().rposition(behind).map_or(0, |at| at + 1);
                    header.extensions.insert(at, Header::feature_names());
                }
                Ok(())
            })?;
            tables.set_version(Version::V3);
            self.is_v3.store(true, Ordering::Release);
            Ok(())
        })
    }

    /// Gives refcounts another width.
    fn change_refcounts(&self, order: RefcountOrder, work: &Work<'_>) -> Result<()> {
        self.change_all(|tables, _, _| {
            tables.flush()?;
            let Tables { refcounts, fence, .. } = tables;
            refcounts.change_width(fence, order.get(), &mut || work.tick())?;
            tables.write_back(true)
        })
    }

    /// Fails if `wish` is for version 2 and the image has what version 2 has not.
    fn may_downgrade(
        &self,
        tables: &mut Tables,
        snapshots: &SnapshotTable,
        header: &Header,
        wish: &Wish,
    ) -> Result<()> {
        if wish.version == Version::V3 || header.version == Version::V2 {
            return Ok(());
        }
        // Zeros that version 2 cannot say must be encrypted.
        self.sealing.cipher()?;
        if header.has_data_file() {
            return Err(AmendError::OldDataFile.into());
        }
        if wish.refcount_order.unwrap_or(header.refcount_order) != RefcountOrder::DEFAULT {
            return Err(AmendError::OldRefcountBits.into());
        }
        let size = wish.size.unwrap_or(header.virtual_size());
        let other = snapshots.entries.iter().any(|snapshot| {
            snapshot.facts.vm_state_size > u32::MAX.into() || snapshot.facts.disk_size != size
        });
        if other {
            return Err(AmendError::OldSnapshots.into());
        }
        let kept = Incompatible::COMPRESSION.bits() | Incompatible::DIRTY.bits();
        let features = header.incompatible.bits() & !kept;
        if features != 0 {
            return Err(AmendError::OldFeatures(features).into());
        }
        if header.compression_type != CompressionType::Zlib {
            let all = all_l2(tables, snapshots)?;
            if tables.has_packed(&all)? {
                return Err(AmendError::OldZstd.into());
            }
        }
        Ok(())
    }

    /// Makes a version 2 image of a version 3 one.
    fn downgrade(&self, work: &Work<'_>) -> Result<()> {
        let backed = self.is_backed();
        self.with_bitmaps(|tables, bitmaps| bitmaps.remove_all(tables))?;
        self.change_all(|tables, snapshots, _| {
            tables.flush()?;
            let all = all_l2(tables, snapshots)?;
            tables.expand_zeros(&all, backed, &self.sealing, &mut || work.tick())?;
            tables.rewrite_header(|header| {
                header.version = Version::V2;
                header.tail = None;
                header.incompatible = Incompatible::default();
                header.compatible = Compatible::default();
                header.autoclear = Autoclear::default();
                header.compression_type = CompressionType::Zlib;
                header.extensions.retain(|extension| {
                    !matches!(extension, Extension::FeatureNames(..) | Extension::Bitmaps(_))
                });
                Ok(())
            })?;
            tables.set_version(Version::V2);
            self.is_v3.store(false, Ordering::Release);
            Ok(())
        })
    }
}

/// The L2 tables of the active state and of all snapshots.
fn all_l2(tables: &mut Tables, snapshots: &SnapshotTable) -> Result<L2Tables> {
    let mut l1s: Vec<Vec<L1Entry>> = vec![tables.l1().to_vec()];
    for snapshot in &snapshots.entries {
        l1s.push(tables.read_l1(snapshot.l1_table_offset, snapshot.l1_size, 0)?);
    }
    tables.l2_tables(&l1s)
}
