//! Carrying the internal snapshots of an image into a new one.
//!
//! The state of the oldest snapshot fills the new image, as any disk does. From there each state is made of the one
//! before: what differs is written, then a snapshot is made, and the active state comes last. Clusters that two states
//! have in common are stored once. All of it happens in files that nobody sees before they are complete.

use std::ops::Range;

use diskmill_core::{
    Chain, EncodedKind, Encoder, Format, GuestOffset, Job, Layer, LayerMut, NewSnapshot, Resolved, Result,
    SnapshotFacts, State, Stored, ZeroHow,
};

use super::source::Source;
use super::work::is_zero;
use super::{ConvertError, Input, NewImage, Output, Plan};
use crate::open::{self, Image, OpenRequest};
use crate::target::Target;

/// Bytes that are compared and written at once, unless a cluster is larger.
const PIECE: u64 = 1 << 20;

/// An image with snapshots that are to be carried.
#[derive(Debug)]
pub(super) struct Kept {
    request: OpenRequest,
    /// Held open, so that nobody changes the image meanwhile.
    active: Image,
    snapshots: Vec<SnapshotFacts>,
}

impl Kept {
    /// What `plan` wants carried: `None` if it does not, or if there is nothing.
    pub(super) fn open(plan: &Plan) -> Result<Option<Self>> {
        if !plan.keep_snapshots {
            return Ok(None);
        }
        let request = match plan.inputs.as_slice() {
            [Input::Image(request)] if request.snapshot.is_none() => request,
            _ => return Err(ConvertError::KeepOneImage.usage()),
        };
        match &plan.output {
            Output::New(image) if image.backing.is_none() && image.options.text("backing_file").is_none() => {
                let qcow2 = image.format == Format::Qcow2.name();
                if !qcow2 || image.options.text("data_file").is_some() {
                    return Err(ConvertError::KeepsNone.unsupported().path(image.target.path()));
                }
            }
            _ => return Err(ConvertError::KeepInNewImage.usage()),
        }
        let mut request = (**request).clone();
        request.hold = true;
        let active = open::image(&request)?;
        let top = active.chain.layers().first();
        let snapshots = top.map(|top| top.facts().snapshots.clone()).unwrap_or_default();
        Ok((!snapshots.is_empty()).then_some(Self {
            request,
            active,
            snapshots,
        }))
    }

    /// The state that comes first.
    pub(super) fn first(&self) -> Result<Source> {
        match self.snapshots.first() {
            Some(oldest) => Source::new(vec![super::input::named(self.state(oldest)?)]),
            None => Err(ConvertError::NoSource.usage()),
        }
    }

    /// Bytes of the states that follow the first, and of all machine state.
    pub(super) fn rest(&self) -> u64 {
        let disks = self.snapshots.iter().skip(1).map(|snapshot| snapshot.disk_size);
        let machines = self.snapshots.iter().map(|snapshot| snapshot.vm_state_size);
        let active = self.active.chain.virtual_size();
        disks.chain(machines).fold(active, u64::saturating_add)
    }

    /// Bytes of the disk in the end.
    pub(super) fn virtual_size(&self) -> u64 {
        self.active.chain.virtual_size()
    }

    /// The image itself.
    pub(super) fn top(&self) -> Result<&dyn Layer> {
        let top = self.active.chain.layers().first();
        top.map(|top| &**top)
            .ok_or_else(|| ConvertError::NoSource.usage())
    }

    fn state(&self, of: &SnapshotFacts) -> Result<Image> {
        let mut request = self.request.clone();
        request.snapshot = Some(of.id.clone().into());
        request.present_size = false;
        open::image(&request)
    }

    /// Goes on where the builder has stopped: `target` holds the first state.
    pub(super) fn carry(&self, plan: &Plan, image: &NewImage, target: &Target, job: Job<'_>) -> Result<()> {
        let path = image.target.path();
        let layer = target
            .reopen(&image.format, &image.reopening())
            .map_err(|error| error.op("create").path(path))?;
        let mut writer = Writer::new(plan, &*layer, job)?;
        let mut now = match self.snapshots.first() {
            Some(oldest) => self.state(oldest)?,
            None => return Ok(()),
        };
        for (number, snapshot) in self.snapshots.iter().enumerate() {
            self.carry_machine(snapshot, &*layer, job)?;
            let keeper = layer
                .snapshots()
                .ok_or_else(|| ConvertError::KeepsNone.unsupported())?;
            let mut new = NewSnapshot::new(&snapshot.name, snapshot.date_sec, snapshot.date_nsec);
            new.id = Some(snapshot.id.clone());
            new.vm_state_size = snapshot.vm_state_size;
            new.vm_clock_nsec = snapshot.vm_clock_nsec;
            new.icount = snapshot.icount;
            keeper
                .create(&new)
                .map_err(|error| error.op("create").path(path))?;
            let next = match self.snapshots.get(number + 1) {
                Some(next) => self.state(next)?,
                None => self.active.clone(),
            };
            let size = next.chain.virtual_size();
            if size != layer.virtual_size() {
                layer.resize(size, &Chain::default())?;
            }
            writer.follow(&now.chain, &next.chain)?;
            now = next;
        }
        layer.flush()
    }

    /// Copies the machine state of `snapshot`, for the next one that is made.
    fn carry_machine(&self, snapshot: &SnapshotFacts, layer: &dyn LayerMut, job: Job<'_>) -> Result<()> {
        let len = snapshot.vm_state_size;
        if len == 0 {
            return Ok(());
        }
        let keeper = layer
            .snapshots()
            .ok_or_else(|| ConvertError::KeepsNone.unsupported())?;
        let mut request = self.request.clone();
        request.snapshot = Some(snapshot.id.clone().into());
        request.machine_state = true;
        // It lies behind the disk, where nothing shows through.
        request.backing = false;
        let machine = open::image(&request)?;
        let mut buf = Vec::new();
        let mut at = 0;
        while at < len {
            job.check()?;
            let piece = PIECE.min(len - at);
            buf.resize(usize::try_from(piece).unwrap_or(0), 0);
            machine.chain.read_at(GuestOffset::new(at), &mut buf)?;
            // The last piece is written in any case: tables must reach as far as the state does.
            if !is_zero(&buf) || at + piece == len {
                keeper.write_machine_state(at, &buf)?;
            }
            at += piece;
            job.observer.advance(piece);
        }
        Ok(())
    }
}

/// Makes one state of another.
struct Writer<'a> {
    layer: &'a dyn LayerMut,
    encoder: Option<Box<dyn Encoder>>,
    job: Job<'a>,
    /// Bytes of the target's clusters.
    unit: u64,
    /// Whether zeros are stored like data.
    keep_zeros: bool,
    before: Vec<u8>,
    after: Vec<u8>,
    packed: Vec<u8>,
}

/// What a cluster becomes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Change {
    None,
    Zero,
    Data,
}

impl<'a> Writer<'a> {
    fn new(plan: &Plan, layer: &'a dyn LayerMut, job: Job<'a>) -> Result<Self> {
        let encoder = match plan.compress {
            Some(_) => Some(layer.encoder()?),
            None => None,
        };
        Ok(Self {
            encoder,
            job,
            unit: layer.facts().unit.unwrap_or(PIECE),
            keep_zeros: plan.sparse == 0,
            before: Vec::new(),
            after: Vec::new(),
            packed: Vec::new(),
            layer,
        })
    }

    /// Makes the state `next` of the state `now`; the disk has the size of `next` already.
    fn follow(&mut self, now: &Chain, next: &Chain) -> Result<()> {
        let size = next.virtual_size();
        let mut at = 0;
        // All before is done.
        let mut done = 0;
        while at < size {
            self.job.check()?;
            let (change, len) = compare(now, next, at)?;
            let range = at..at + len;
            match change {
                Change::None => {}
                Change::Zero if !self.keep_zeros => {
                    let zeros = range.start.max(done)..range.end;
                    if !zeros.is_empty() {
                        self.zero(zeros)?;
                    }
                }
                _ => {
                    let start = (range.start - range.start % self.unit).max(done);
                    done = range.end.next_multiple_of(self.unit).min(size);
                    self.copy(now, next, start..done)?;
                }
            }
            self.job.observer.advance(len);
            at = range.end;
        }
        Ok(())
    }

    fn zero(&self, range: Range<u64>) -> Result<()> {
        let range = GuestOffset::new(range.start)..GuestOffset::new(range.end);
        self.layer.zero(range, ZeroHow::MayUnmap, &Chain::default())
    }

    /// Writes what of `range`, which is whole clusters, differs between the states.
    fn copy(&mut self, now: &Chain, next: &Chain, range: Range<u64>) -> Result<()> {
        let step = PIECE.next_multiple_of(self.unit);
        let mut at = range.start;
        while at < range.end {
            self.job.check()?;
            let len = step.min(range.end - at);
            let buf_len = usize::try_from(len).unwrap_or(0);
            self.before.resize(buf_len, 0);
            self.after.resize(buf_len, 0);
            now.read_at(GuestOffset::new(at), &mut self.before)?;
            next.read_at(GuestOffset::new(at), &mut self.after)?;
            self.write_piece(at)?;
            at += len;
        }
        Ok(())
    }

    /// Writes what differs between the two buffers, which are of `at`.
    fn write_piece(&mut self, at: u64) -> Result<()> {
        let unit = usize::try_from(self.unit).unwrap_or(usize::MAX);
        let clusters = self.before.chunks(unit).zip(self.after.chunks(unit));
        let changes: Vec<Change> = clusters
            .map(|(before, after)| match before == after {
                true => Change::None,
                false if !self.keep_zeros && is_zero(after) => Change::Zero,
                false => Change::Data,
            })
            .collect();
        let mut index = 0;
        while let Some(change) = changes.get(index).copied() {
            let alike = changes
                .iter()
                .skip(index)
                .take_while(|next| **next == change)
                .count();
            let from = index * unit;
            let to = ((index + alike) * unit).min(self.after.len());
            let start = at + from as u64;
            match change {
                Change::None => {}
                Change::Zero => self.zero(start..at + to as u64)?,
                Change::Data => self.write(start, from..to)?,
            }
            index += alike;
        }
        Ok(())
    }

    /// Writes a part of the buffer at `at`.
    fn write(&mut self, at: u64, part: Range<usize>) -> Result<()> {
        let below = Chain::default();
        let bytes = self.after.get(part).unwrap_or_default();
        let Some(encoder) = &mut self.encoder else {
            return self.layer.write_at(GuestOffset::new(at), bytes, &below);
        };
        let unit = usize::try_from(self.unit).unwrap_or(usize::MAX);
        let mut at = GuestOffset::new(at);
        for cluster in bytes.chunks(unit) {
            let mut whole = cluster.to_vec();
            whole.resize(unit, 0);
            match encoder.pack(&whole, &mut self.packed)? {
                EncodedKind::Packed { len } => {
                    let packed = self.packed.get(..len).unwrap_or_default();
                    self.layer.write_encoded(at, Stored::Packed(packed), &below)?;
                }
                _ => self.layer.write_at(at, cluster, &below)?,
            }
            at = at.plus(cluster.len() as u64)?;
        }
        Ok(())
    }
}

/// What becomes of the bytes at `at` from the state `now` to the state `next` of one image, and of how many.
fn compare(now: &Chain, next: &Chain, at: u64) -> Result<(Change, u64)> {
    let start = GuestOffset::new(at);
    let rest = next.virtual_size() - at;
    let after = next.map(start, rest)?;
    if at >= now.virtual_size() {
        let change = if is_nothing(after) {
            Change::None
        } else {
            Change::Data
        };
        return Ok((change, after.len));
    }
    let before = now.map(start, after.len)?;
    let len = before.len.min(after.len);
    if let (State::Compressed(_), State::Compressed(_)) = (before.state, after.state) {
        // A run of several says where the first and the last of them are, no more.
        let unit = next
            .layers()
            .first()
            .and_then(|top| top.facts().unit)
            .unwrap_or(1);
        let len = len.min(unit - at % unit);
        let same = same(now.map(start, len)?, next.map(start, len)?);
        return Ok((if same { Change::None } else { Change::Data }, len));
    }
    let change = match (is_nothing(before), is_nothing(after)) {
        (true, true) => Change::None,
        (false, true) => Change::Zero,
        _ if same(before, after) => Change::None,
        _ => Change::Data,
    };
    Ok((change, len))
}

/// Whether a run reads as zeros by word of a table.
fn is_nothing(run: Resolved) -> bool {
    matches!(run.state, State::Zero { .. } | State::Absent)
}

/// Whether two runs at the same guest byte are the same bytes of the same file.
fn same(a: Resolved, b: Resolved) -> bool {
    match (a.state, b.state) {
        // What is below is the same for both states.
        _ if a.depth != b.depth => false,
        (
            State::Data(_) | State::Compressed(_) | State::Encrypted(_),
            State::Data(_) | State::Compressed(_) | State::Encrypted(_),
        ) if a.depth > 0 => true,
        (State::Data(a), State::Data(b)) | (State::Encrypted(a), State::Encrypted(b)) => {
            (a.file, a.at) == (b.file, b.at)
        }
        (State::Compressed(a), State::Compressed(b)) => (a.file, a.at, a.len) == (b.file, b.at, b.len),
        _ => false,
    }
}
