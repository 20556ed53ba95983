//! Converting and creating, held against the real tools, and what is left behind when it fails.

mod create;
mod existing;
mod failing;
mod overlays;
mod whole;

use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use diskmill::open::OpenRequest;
use diskmill::ops::convert::{self, Input, NewImage, Output, Plan, Summary};
use diskmill::spec::ImageSpec;
use diskmill_core::{Job, Observer, Options};

/// A disk of many chunks whose end is in the middle of a cluster.
const SIZE: u64 = (24 << 20) + 512 * 3;

fn request(path: &Path, format: &str) -> OpenRequest {
    let mut request = OpenRequest::new(ImageSpec::from_path(path));
    request.format = Some(format.to_owned());
    request
}

fn input(path: &Path, format: &str) -> Input {
    Input::Image(Box::new(request(path, format)))
}

fn new(path: &Path, format: &str, options: &str) -> NewImage {
    let mut image = NewImage::new(ImageSpec::from_path(path), format);
    image.options = Options::parse(options);
    image
}

fn plan(from: &Path, from_format: &str, to: &Path, to_format: &str, options: &str) -> Plan {
    Plan::new(input(from, from_format), Output::New(new(to, to_format, options)))
}

fn run(plan: &Plan) -> Summary {
    convert::run(plan, Job::silent()).unwrap_or_else(|error| panic!("{error:?}"))
}

/// Keeps what it is told, and asks for a stop after some progress.
#[derive(Default)]
struct Watcher {
    stop: AtomicBool,
    stop_at_once: bool,
    total: Mutex<Vec<u64>>,
    done: Mutex<u64>,
    warnings: Mutex<Vec<String>>,
}

impl Watcher {
    fn stopping() -> Self {
        Self {
            stop_at_once: true,
            ..Self::default()
        }
    }

    fn job(&self) -> Job<'_> {
        Job {
            observer: self,
            cancel: &self.stop,
        }
    }

    fn warnings(&self) -> Vec<String> {
        let mut warnings = self.warnings.lock().unwrap().clone();
        warnings.sort();
        warnings
    }
}

impl Observer for Watcher {
    fn total(&self, bytes: u64) {
        self.total.lock().unwrap().push(bytes);
    }

    fn advance(&self, bytes: u64) {
        *self.done.lock().unwrap() += bytes;
        if self.stop_at_once {
            self.stop.store(true, Ordering::Relaxed);
        }
    }

    fn warn(&self, text: &str) {
        self.warnings.lock().unwrap().push(text.to_owned());
    }
}
