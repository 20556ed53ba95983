//! Where encoded data goes: a new image, in turn, or one that exists.

use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use diskmill_core::{
    Builder, Chain, Encoder, Error, ErrorKind, GuestOffset, HostSpan, LayerMut, Result, Run, StorageMut,
    Stored, Writes, ZeroHow,
};

use super::lane::{Lane, lock};
use super::work::{Placement, Ready};

/// What is written to.
pub(super) enum Sink<'a> {
    /// A new image: chunks are placed in order.
    New(Ordered),
    /// An image that exists: chunks are written as they come.
    Existing(Existing<'a>),
}

impl Sink<'_> {
    pub(super) fn encoder(&self) -> Result<Box<dyn Encoder>> {
        match self {
            Self::New(ordered) => lock(&ordered.state).builder.encoder(),
            Self::Existing(existing) => existing.image.encoder(),
        }
    }

    /// Stores a chunk.
    pub(super) fn store(&self, ready: &mut Ready<'_>, lane: &Lane<'_>) -> Result<()> {
        match self {
            Self::New(ordered) => ordered.store(ready, lane),
            Self::Existing(existing) => existing.store(ready, lane),
        }
    }

    /// Lets those who wait for their turn see that somebody has failed.
    pub(super) fn wake_all(&self) {
        if let Self::New(ordered) = self {
            // Whoever is about to wait holds the lock between looking and waiting.
            drop(lock(&ordered.state));
            ordered.wake.iter().for_each(Condvar::notify_all);
        }
    }
}

/// A new image and whose turn it is to place.
pub(super) struct Ordered {
    state: Mutex<Order>,
    /// One for each worker: of chunks that have been claimed and not placed no two share one.
    wake: Vec<Condvar>,
    files: Vec<Arc<dyn StorageMut>>,
    append_only: bool,
}

struct Order {
    next: u64,
    builder: Box<dyn Builder>,
}

/// Runs longer than this many units are filled in steps, inside the turn.
const LONG_RUN: u64 = 1 << 16;

impl Ordered {
    pub(super) fn new(builder: Box<dyn Builder>, workers: usize) -> Self {
        let files = builder.files().to_vec();
        let append_only = files.iter().any(|file| file.hints().append_only);
        Self {
            state: Mutex::new(Order { next: 0, builder }),
            wake: (0..workers.max(1)).map(|_| Condvar::new()).collect(),
            files,
            append_only,
        }
    }

    /// The builder, when all is placed.
    pub(super) fn into_builder(self) -> Box<dyn Builder> {
        self.state
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner)
            .builder
    }

    fn bell(&self, turn: u64) -> Option<&Condvar> {
        let index = turn.checked_rem(self.wake.len() as u64)?;
        self.wake.get(usize::try_from(index).ok()?)
    }

    fn store(&self, ready: &mut Ready<'_>, lane: &Lane<'_>) -> Result<()> {
        let mut writes = Writes::new();
        let mut copies = Vec::new();
        let mut order = lock(&self.state);
        while order.next != ready.turn {
            if lane.stopped() {
                return Ok(());
            }
            let bell = self
                .bell(ready.turn)
                .ok_or_else(|| Error::bare(ErrorKind::Usage))?;
            order = bell.wait(order).unwrap_or_else(PoisonError::into_inner);
        }
        if lane.stopped() {
            return Ok(());
        }
        let unit = order.builder.unit();
        for placement in ready.placements {
            match placement {
                Placement::Run(range, what) => {
                    if range.end - range.start > unit.saturating_mul(LONG_RUN) {
                        writes.perform(&self.files)?;
                        order.builder.fill(guest(range), *what)?;
                    } else {
                        order.builder.place_run(guest(range), *what, &mut writes)?;
                    }
                }
                Placement::Copy(piece) => match order.builder.reserve(guest(&piece.range), &mut writes)? {
                    Some(span) => copies.push((piece, span)),
                    None => {
                        // Only the builder knows that it must see the bytes, and only now.
                        let mut at = piece.range.start;
                        while at < piece.range.end {
                            let bytes = ready.late.read(lane, piece, at)?;
                            let mut now = Writes::new();
                            order
                                .builder
                                .place(GuestOffset::new(at), Stored::Plain(bytes), &mut now)?;
                            at += bytes.len() as u64;
                            now.perform(&self.files)?;
                        }
                    }
                },
                placement => {
                    let at = GuestOffset::new(placement.start());
                    order.builder.place(at, ready.stored(placement)?, &mut writes)?;
                }
            }
        }
        if self.append_only {
            // Order is all such a file has: it is written before the turn passes.
            writes.perform(&self.files)?;
        }
        order.next += 1;
        let next = order.next;
        drop(order);
        if let Some(bell) = self.bell(next) {
            bell.notify_all();
        }
        writes.perform(&self.files)?;
        for (piece, span) in copies {
            let file = self.file(span)?;
            ready.late.copy(lane, piece, span, &**file)?;
        }
        Ok(())
    }

    fn file(&self, span: HostSpan) -> Result<&Arc<dyn StorageMut>> {
        self.files.get(usize::from(span.file.0)).ok_or_else(|| {
            Error::new(
                ErrorKind::Usage,
                format!("there is no file number {}", span.file.0),
            )
        })
    }
}

/// An image that exists.
pub(crate) struct Existing<'a> {
    /// The image.
    pub(crate) image: &'a dyn LayerMut,
    /// What is below it.
    pub(crate) below: &'a Chain,
    /// What will be below it in the end: whole steps of zeros must hide this.
    pub(crate) shown: &'a Chain,
    /// It reads as zeros: they need not be written.
    pub(crate) is_zero: bool,
}

impl Existing<'_> {
    fn store(&self, ready: &mut Ready<'_>, lane: &Lane<'_>) -> Result<()> {
        for placement in ready.placements {
            if lane.stopped() {
                return Ok(());
            }
            let at = GuestOffset::new(placement.start());
            match placement {
                Placement::Run(_, Run::Absent) => {}
                Placement::Run(_, Run::Zero) if self.is_zero => {}
                Placement::Run(range, Run::Zero) => {
                    self.image.zero(guest(range), ZeroHow::MayUnmap, self.shown)?;
                }
                Placement::Copy(piece) => {
                    let mut at = piece.range.start;
                    while at < piece.range.end {
                        let bytes = ready.late.read(lane, piece, at)?;
                        self.image.write_at(GuestOffset::new(at), bytes, self.below)?;
                        at += bytes.len() as u64;
                    }
                }
                Placement::Packed { .. } => {
                    self.image
                        .write_encoded(at, ready.stored(placement)?, self.below)?;
                }
                Placement::Plain { range, offset } => {
                    let bytes = ready.plain(*offset, range.end - range.start)?;
                    self.image.write_at(at, bytes, self.below)?;
                }
            }
        }
        Ok(())
    }
}

fn guest(range: &Range<u64>) -> Range<GuestOffset> {
    GuestOffset::new(range.start)..GuestOffset::new(range.end)
}
