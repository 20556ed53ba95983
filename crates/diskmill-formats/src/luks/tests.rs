//! Images of luks in memory: as layers, as builders, through power cuts and failing calls; key slots; hostile headers.

mod amending;
mod building;
mod crashing;
mod hostile;
mod writing;

use std::sync::{Arc, OnceLock};

use diskmill_core::{Durability, GuestOffset, Options, Secret, Secrets, StorageMut};
use diskmill_storage::Memory;
use diskmill_testkit::contract::builder::{Guest, bytes, fill};

use super::options::Plan;
use super::*;
use crate::crypt::luks::{NewVolume, VolumeKey};

/// Bytes of most disks: no multiple of a page.
const SIZE: u64 = (96 << 10) + 512;

/// Bytes of a disk that takes more than a step of writing.
const LONG: u64 = (600 << 10) + 512;

/// Quick to open: a short key is little material, and SHA-1 is fast.
const QUICK: &str = "cipher-alg=aes-128,cipher-mode=cbc,ivgen-alg=essiv,hash-alg=sha1";

/// The driver, with keys that are made once: another header each time, which takes time, would be another image.
#[derive(Debug)]
struct Keyed {
    volume: NewVolume,
}

impl Keyed {
    /// New keys behind the passphrase "one", as `options` say.
    fn new(options: &str) -> Self {
        let plan = Plan::new(&spec(SIZE, options)).expect("a plan");
        let volume = plan.header.make(b"one", Job::silent()).expect("keys");
        Self { volume }
    }

    /// The same keys in all tests.
    fn quick() -> &'static Self {
        static QUICKLY: OnceLock<Keyed> = OnceLock::new();
        QUICKLY.get_or_init(|| Self::new(QUICK))
    }

    /// The file of an image that reads as `disk`.
    fn image(&self, disk: &Vec<u8>) -> Vec<u8> {
        let spec = spec(disk.len() as u64, QUICK);
        bytes(&*fill(self, &spec, &file, disk as &dyn Guest, 1, 16)[0])
    }

    /// Opens `main` for reading, without asking anybody for the key.
    fn read_only(&self, main: Arc<dyn Storage>) -> Result<Arc<dyn Layer>> {
        let parsed = self.parse(Arc::clone(&main), &OpenSpec::default())?;
        parsed.attach(vec![(Role::Main, main)], &OpenSpec::default())
    }

    /// Opens `main` for writing, without asking anybody for the key.
    fn open(&self, main: &Arc<dyn StorageMut>) -> Result<Arc<dyn LayerMut>> {
        let parsed = self.parse(Arc::clone(main) as Arc<dyn Storage>, &OpenSpec::default())?;
        parsed.attach_mut(vec![(Role::Main, Arc::clone(main))], &OpenSpec::default())
    }

    /// What the image in `file` reads as.
    fn contents(&self, file: &[u8]) -> Result<Vec<u8>> {
        let layer = self.read_only(Arc::new(Memory::from(file)))?;
        let mut disk = vec![0xee; usize::try_from(layer.virtual_size()).expect("a small disk")];
        layer.read_at(GuestOffset::ZERO, &mut disk)?;
        Ok(disk)
    }
}

impl Driver for Keyed {
    fn format(&self) -> Format {
        Format::Luks
    }

    fn probe(&self, sample: &Sample<'_>) -> Match {
        DRIVER.probe(sample)
    }

    fn parse(&self, main: Arc<dyn Storage>, how: &OpenSpec) -> Result<Box<dyn Parsed>> {
        Ok(Box::new(KeyedImage {
            image: LuksImage::parse(main.as_ref(), how)?,
            key: self.volume.key().clone(),
        }))
    }

    fn options(&self) -> &'static [OptionSpec] {
        DRIVER.options()
    }

    fn outputs(&self, spec: &CreateSpec) -> Result<Vec<OutputSpec>> {
        DRIVER.outputs(spec)
    }

    fn build(&self, spec: &CreateSpec, files: FilesMut) -> Result<Box<dyn Builder>> {
        let plan = Plan::new(spec)?;
        let builder = create::LuksBuilder::start(&plan, self.volume.clone(), files)?;
        Ok(Box::new(builder))
    }

    fn measure(&self, spec: &CreateSpec, data: Option<&mut dyn DataRuns>) -> Result<Measure> {
        DRIVER.measure(spec, data)
    }
}

#[derive(Debug)]
struct KeyedImage {
    image: LuksImage,
    key: VolumeKey,
}

impl Parsed for KeyedImage {
    fn facts(&self) -> &Facts {
        self.image.facts()
    }

    fn references(&self) -> &[Reference] {
        &[]
    }

    fn attach(self: Box<Self>, files: Files, _how: &OpenSpec) -> Result<Arc<dyn Layer>> {
        let (main, _) = take(files)?;
        let payload = self.image.payload(Some(&self.key))?;
        Ok(Arc::new(LuksLayer::new(self.image.facts, payload, main)))
    }

    fn attach_mut(self: Box<Self>, files: FilesMut, how: &OpenSpec) -> Result<Arc<dyn LayerMut>> {
        let (main, header) = take(files)?;
        let payload = self.image.payload(Some(&self.key))?;
        let (facts, secrets) = (self.image.facts, how.secrets.clone());
        let image = write::Image::new(facts, payload, Some(self.key), main, header, secrets);
        Ok(Arc::new(image))
    }

    fn check(self: Box<Self>, files: Files, how: &OpenSpec, job: Job<'_>) -> Result<CheckReport> {
        Box::new(self.image).check(files, how, job)
    }

    fn repair(
        self: Box<Self>,
        files: FilesMut,
        how: &OpenSpec,
        what: Repair,
        job: Job<'_>,
    ) -> Result<CheckReport> {
        Box::new(self.image).repair(files, how, what, job)
    }
}

fn file() -> Arc<dyn StorageMut> {
    Arc::new(Memory::new())
}

fn memory(bytes: &[u8]) -> Arc<dyn StorageMut> {
    Arc::new(Memory::from(bytes))
}

fn spec(size: u64, options: &str) -> CreateSpec {
    let mut spec = CreateSpec::new(size);
    spec.options = Options::parse(&format!("iter-time=1,{options}"));
    spec.secrets = passphrases(&["one"]);
    spec.secrets.set_passphrase(Secret::new(b"one".to_vec()));
    spec
}

/// Secrets that are called what they are.
fn passphrases(all: &[&str]) -> Secrets {
    let mut secrets = Secrets::new();
    for text in all {
        secrets
            .add(*text, Secret::new(text.as_bytes().to_vec()))
            .expect("another name");
    }
    secrets
}

/// How to open an image with the passphrase `text`, knowing the others as well.
fn with(text: &str, others: &[&str]) -> OpenSpec {
    let mut how = OpenSpec::default();
    how.secrets = passphrases(others);
    how.secrets.set_passphrase(Secret::new(text.as_bytes().to_vec()));
    how
}

/// A disk that is another in every sector, and never zero.
fn disk(size: u64) -> Vec<u8> {
    (0..size).map(|at| (at / 512 * 31 + at % 251) as u8 | 1).collect()
}

fn at(byte: u64) -> GuestOffset {
    GuestOffset::new(byte)
}

/// The text of an error with all its sources.
fn text(error: &Error) -> String {
    format!("{error:?}")
}

#[test]
fn an_image_is_told_by_its_magic_and_version() {
    let image = Keyed::quick().image(&disk(512));
    let sample = |head| {
        DRIVER.probe(&Sample {
            head,
            tail: &[],
            len: head.len() as u64,
            name: None,
        })
    };
    assert_eq!(sample(&image), Match::ByMagic);
    let mut second = image[..4096].to_vec();
    second[7] = 2;
    assert_eq!(sample(&second), Match::No);
    assert_eq!(sample(&image[..6]), Match::No);
    let no = DRIVER
        .parse(memory(&[7; 4096]), &OpenSpec::default())
        .unwrap_err();
    assert_eq!(no.kind(), ErrorKind::NotThisFormat);
    // Whoever says that it is luks gets version 2 as well, but there is none here.
    let no = DRIVER.parse(memory(&second), &OpenSpec::default()).unwrap_err();
    assert_eq!(no.kind(), ErrorKind::Corrupt);
    second[7] = 3;
    let no = DRIVER.parse(memory(&second), &OpenSpec::default()).unwrap_err();
    assert_eq!(no.kind(), ErrorKind::Unsupported);
}

#[test]
fn without_a_passphrase_all_but_data_is_there() {
    let file = memory(&Keyed::quick().image(&disk(SIZE)));
    let how = OpenSpec::default();
    let open = || DRIVER.parse(Arc::clone(&file) as _, &how).expect("parse");
    assert!(open().facts().encrypted);
    let layer = open().attach(vec![(Role::Main, Arc::clone(&file) as _)], &how);
    let layer = layer.expect("attach");
    assert_eq!(layer.map(at(512), u64::MAX).expect("map").len, SIZE - 512);
    let refused = layer.read_at(at(0), &mut [0; 512]).unwrap_err();
    assert!(text(&refused).contains("key-secret"), "{refused:?}");
    let layer = open().attach_mut(vec![(Role::Main, Arc::clone(&file))], &how);
    let layer = layer.expect("attach");
    let below = diskmill_core::Chain::default();
    let before = bytes(&*file);
    assert!(layer.write_at(at(0), &[0; 512], &below).is_err());
    let wish = Options::parse("state=inactive,keyslot=0");
    let wish = diskmill_core::Amendment::new(wish);
    assert!(layer.amend(&wish, &below, Job::silent()).is_err());
    assert!(bytes(&*file) == before);
    let wrong = open().attach(vec![(Role::Main, Arc::clone(&file) as _)], &with("two", &[]));
    assert!(text(&wrong.unwrap_err()).contains("invalid password"));
    let right = open().attach(vec![(Role::Main, Arc::clone(&file) as _)], &with("one", &[]));
    let mut found = vec![0; 512];
    right.expect("attach").read_at(at(0), &mut found).expect("read");
    assert!(found == disk(512));
}

#[test]
fn a_header_may_be_in_a_file_of_its_own() {
    let quick = Keyed::quick();
    let image = quick.image(&disk(SIZE));
    let start = usize::try_from(quick.volume.header().payload_offset()).unwrap();
    for (payload_offset, data) in [
        ([0; 4], &image[start..]),
        (image[104..108].try_into().unwrap(), &image),
    ] {
        let mut header = image[..start].to_vec();
        header[104..108].copy_from_slice(&payload_offset);
        let (header, data) = (memory(&header), memory(data));
        let mut how = with("one", &["two"]);
        how.header = Some(Arc::clone(&header) as _);
        let files = || {
            vec![
                (Role::Main, Arc::clone(&data)),
                (Role::Header, Arc::clone(&header)),
            ]
        };
        let parsed = DRIVER.parse(Arc::clone(&data) as _, &how).expect("parse");
        assert_eq!(parsed.facts().virtual_size, SIZE);
        let layer = parsed.attach_mut(files(), &how).expect("attach");
        let below = diskmill_core::Chain::default();
        layer.write_at(at(700), &[9; 700], &below).expect("write");
        layer.resize(SIZE / 2 + 256, &below).expect("resize");
        let wish = Options::parse("state=active,new-secret=two,iter-time=1");
        let wish = diskmill_core::Amendment::new(wish);
        layer.amend(&wish, &below, Job::silent()).expect("amend");
        layer.flush().expect("flush");
        let mut how = with("two", &[]);
        how.header = Some(Arc::clone(&header) as _);
        let parsed = DRIVER.parse(Arc::clone(&data) as _, &how).expect("parse");
        let files = files()
            .into_iter()
            .map(|(role, file)| (role, file as _))
            .collect();
        let layer = parsed.attach(files, &how).expect("attach");
        let mut found = vec![0; usize::try_from(SIZE / 2 + 256).unwrap()];
        layer.read_at(at(0), &mut found).expect("read");
        let mut expected = disk(SIZE / 2 + 256);
        expected[700..1400].fill(9);
        assert!(found == expected);
    }
    let mut alone = image.clone();
    alone[104..108].fill(0);
    let refused = DRIVER.parse(memory(&alone), &OpenSpec::default()).unwrap_err();
    assert!(
        text(&refused).contains("overlapping with the header"),
        "{refused:?}"
    );
}

#[test]
fn a_check_says_what_a_header_shows() {
    let quick = Keyed::quick();
    let check = |file: &[u8]| {
        let main: Arc<dyn Storage> = memory(file);
        let parsed = DRIVER
            .parse(Arc::clone(&main), &OpenSpec::default())
            .expect("parse");
        let files = vec![(Role::Main, main)];
        parsed
            .check(files, &OpenSpec::default(), Job::silent())
            .expect("check")
    };
    let mut image = quick.image(&disk(SIZE));
    let report = check(&image);
    assert_eq!((report.corruptions, report.findings.len()), (0, 0));
    image.pop();
    assert_eq!(check(&image).findings.len(), 1);
    image[208..212].copy_from_slice(&0xdead_u32.to_be_bytes());
    assert_eq!(check(&image).corruptions, 1);
    let parsed = DRIVER.parse(memory(&image), &OpenSpec::default()).expect("parse");
    let files = vec![(Role::Main, memory(&image))];
    let refused = parsed.repair(files, &OpenSpec::default(), Repair::All, Job::silent());
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::Unsupported);
}
