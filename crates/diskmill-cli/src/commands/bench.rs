use std::ffi::OsString;
use std::num::{NonZeroU64, NonZeroUsize};

use clap::Args;
use diskmill::ops::bench::{Bench, BenchRequest};
use diskmill_core::{Error, ErrorKind};

use super::resize::tell;
use super::{DoArgs, Run, Source};
use crate::error::{Failure, Frame};
use crate::exit::Exit;
use crate::json::Json;
use crate::keyval;
use crate::progress::{Progress, Style};
use crate::ui::Ui;

/// Measure the speed of an image
#[derive(Args, Debug)]
#[command(override_usage = "diskmill bench [OPTIONS] FILENAME")]
pub struct BenchArgs {
    /// Print nothing but results and errors
    #[arg(short, long)]
    quiet: bool,
    /// Format of the image, instead of finding it out
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// FILENAME is a list of options (driver=...,file.filename=...), not a name
    #[arg(long)]
    image_opts: bool,
    /// Cache mode of the image (default: writeback)
    #[arg(short = 't', long, value_name = "CACHE")]
    cache: Option<String>,
    /// How many requests to make (default: 75000)
    #[arg(short, long, value_name = "COUNT")]
    count: Option<String>,
    /// Bytes of each request (default: 4096)
    #[arg(short = 's', long, value_name = "BUFFER_SIZE")]
    buffer_size: Option<String>,
    /// How many requests to make at a time (default: 64)
    #[arg(short, long, value_name = "DEPTH")]
    depth: Option<String>,
    /// Where the first request starts
    #[arg(short, long, value_name = "OFFSET")]
    offset: Option<String>,
    /// Bytes from one request to the next (default: the size of one)
    #[arg(short = 'S', long, value_name = "STEP_SIZE")]
    step_size: Option<String>,
    /// Taken for compatibility: threads, native or io_uring; requests are made by threads
    #[arg(short = 'i', long, value_name = "AIO")]
    aio: Option<String>,
    /// Taken for compatibility: the same as --aio native
    #[arg(short, long)]
    native: bool,
    /// Write instead of reading: what the image holds is lost
    #[arg(short, long)]
    write: bool,
    /// Write this byte instead of zero
    #[arg(long, value_name = "PATTERN")]
    pattern: Option<String>,
    /// Flush after this number of requests
    #[arg(long, value_name = "FLUSH_INTERVAL")]
    flush_interval: Option<String>,
    /// Do not wait for other requests before flushing
    #[arg(long)]
    no_drain: bool,
    /// Read the image even while another process writes it
    #[arg(short = 'U', long)]
    force_share: bool,
    #[command(flatten)]
    how: DoArgs,
    /// The image
    #[arg(value_name = "FILENAME", value_hint = clap::ValueHint::FilePath)]
    names: Vec<OsString>,
}

/// The largest number the real tool takes for most options.
const MOST: u64 = i32::MAX as u64;

fn count(name: &str, text: Option<&String>, min: u64, max: u64) -> Result<Option<u64>, Failure> {
    text.map(|text| keyval::plain_number(name, text, min, max))
        .transpose()
}

impl Run for BenchArgs {
    const NAME: &'static str = "bench";

    fn run(self, ui: &Ui) -> Result<Exit, Failure> {
        let json = self.how.wants_json(ui)?;
        let requests = count("request count", self.count.as_ref(), 1, MOST)?.unwrap_or(75_000);
        let depth = count("queue depth", self.depth.as_ref(), 1, MOST)?.unwrap_or(64);
        let flush = count("flush interval", self.flush_interval.as_ref(), 0, MOST)?.unwrap_or(0);
        let pattern = count("pattern byte", self.pattern.as_ref(), 0, 0xff)?.unwrap_or(0);
        let size = |name: &str, text: &Option<String>, min: u64, max: u64| match text {
            Some(text) => keyval::number(name, text, min, max).map(Some),
            None => Ok(None),
        };
        let len = size("buffer size", &self.buffer_size, 1, MOST)?.unwrap_or(4096);
        let step = match size("step size", &self.step_size, 0, MOST)? {
            None | Some(0) => len,
            Some(step) => step,
        };
        let offset = size("offset", &self.offset, 0, i64::MAX as u64)?.unwrap_or(0);
        if let Some(aio) = &self.aio
            && !matches!(aio.as_str(), "threads" | "native" | "io_uring")
        {
            return Err(Failure::usage(format!("Invalid aio option: {aio}")));
        }
        let cache = match &self.cache {
            None => None,
            Some(mode) => match keyval::cache_mode("cache", mode) {
                Ok(mode) => Some(mode),
                Err(_) => return Err(Failure::usage("Invalid cache mode")),
            },
        };
        let [name] = self.names.as_slice() else {
            return Err(Failure::usage_help("Expecting one image file name"));
        };
        if !self.write && flush > 0 {
            return Err(Failure::usage(
                "--flush-interval is only available in write tests",
            ));
        }
        if flush > 0 && flush < depth {
            return Err(Failure::usage("Flush interval can't be smaller than depth"));
        }
        let source = Source {
            format: self.format.as_deref(),
            image_opts: self.image_opts,
            share: self.force_share,
            ..Source::default()
        };
        let mut request = BenchRequest::new(source.request(name, &self.how.native, ui)?);
        if let Some(cache) = cache {
            request.open.cache = cache;
        }
        let native_aio = self.native || self.aio.as_deref() == Some("native");
        if native_aio && !request.open.cache.is_direct() && ui.drop_in() {
            return Err(Failure::usage(format!(
                "Could not open '{}': aio=native was specified, but it requires cache.direct=on, which was not specified.",
                name.to_string_lossy()
            )));
        }
        request.count = NonZeroU64::new(requests).unwrap_or(NonZeroU64::MIN);
        request.depth = words(depth);
        request.len = words(len);
        request.step = step;
        request.offset = offset;
        request.write = self.write.then(|| u8::try_from(pattern).unwrap_or(0));
        request.flush_interval = NonZeroU64::new(flush);
        request.no_drain = self.no_drain;
        let progress = Progress::begin(ui, Style::None)?;
        let bench = Bench::open(&request, &mut |warning| tell(ui, warning))
            .map_err(|error| Failure::open(name, error))?;
        if !json {
            let what = if self.write { "write" } else { "read" };
            ui.print(format!(
                "Sending {requests} {what} requests, {len} bytes each, {depth} in parallel (starting at offset {offset}, step size {step})\n"
            ))?;
            if flush > 0 {
                ui.print(format!("Sending flush every {flush} requests\n"))?;
            }
        }
        let done = bench.run(progress.job());
        progress.signals().die_if_cancelled(&done);
        let took = done.map_err(|error| failed(ui, error))?.as_secs_f64();
        if json {
            let bytes = requests as f64 * len as f64;
            let result = Json::ordered([
                ("filename", Json::text(name.to_string_lossy())),
                ("requests", Json::Int(requests)),
                ("bytes-each", Json::Int(len)),
                ("seconds", Json::Real((took * 1e6).round() / 1e6)),
                ("bytes-per-second", Json::Int((bytes / took.max(1e-9)) as u64)),
            ]);
            ui.print(result.pretty())?;
        } else {
            ui.print(format!("Run completed in {took:.3} seconds.\n"))?;
        }
        Ok(Exit::OK)
    }
}

fn words(number: u64) -> NonZeroUsize {
    let number = usize::try_from(number).unwrap_or(usize::MAX);
    NonZeroUsize::new(number).unwrap_or(NonZeroUsize::MIN)
}

fn failed(ui: &Ui, error: Error) -> Failure {
    if ui.drop_in() && error.kind() == ErrorKind::Usage {
        // Past the end of the disk: to the real tool an error of the device.
        return Failure::refused("Failed request: Input/output error");
    }
    Failure::library(error, Frame::Text("Failed request".to_owned()))
}
