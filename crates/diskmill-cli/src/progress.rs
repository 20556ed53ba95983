//! How far a long command is.

use std::fmt::Write as _;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use diskmill_core::{Job, Observer};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::error::Failure;
use crate::json::Json;
use crate::signals::Signals;
use crate::ui::Ui;

/// Progress is told again once this much more is done, in percent.
const STEP: f32 = 2.0;

/// JSON events are at least this far apart.
const PAUSE: Duration = Duration::from_millis(100);

/// How progress is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// Not at all.
    None,
    /// `    (12.34/100%)` and a carriage return on standard output, as `qemu-img -p` prints it.
    QemuImg,
    /// The same numbers on standard error, a line each.
    Plain,
    /// A bar with rate and time left on standard error.
    Bar,
    /// One JSON object a line on standard error.
    Json,
}

impl Style {
    /// What the options come to: `-q`, `-p` or `--progress=HOW`, `--json`.
    pub fn choose(ui: &Ui, quiet: bool, progress: Option<&str>, json: bool) -> Result<Self, Failure> {
        if ui.drop_in() {
            return Ok(match progress {
                Some(_) if !quiet => Self::QemuImg,
                _ => Self::None,
            });
        }
        let how = match progress {
            None if quiet => "none",
            None | Some("auto") if json => "json",
            None => "unasked",
            Some(how) => how,
        };
        Ok(match how {
            "none" => Self::None,
            "json" => Self::Json,
            "plain" => Self::Plain,
            "bar" => Self::Bar,
            "auto" if ui.watched() => Self::Bar,
            "auto" => Self::Plain,
            "unasked" if ui.watched() => Self::Bar,
            "unasked" => Self::None,
            other => {
                return Err(Failure::usage_help(format!(
                    "--progress expects auto, bar, plain, json or none, not '{other}'"
                )));
            }
        })
    }
}

/// Watches one operation and shows how far it is.
#[derive(Debug)]
pub struct Progress {
    ui: Ui,
    style: Style,
    signals: Signals,
    total: AtomicU64,
    done: AtomicU64,
    shown: Mutex<Shown>,
}

#[derive(Debug)]
struct Shown {
    percent: f32,
    bar: Option<ProgressBar>,
    at: Instant,
    began: Instant,
}

impl Progress {
    /// Shows the start.
    pub fn begin(ui: &Ui, style: Style) -> Result<Self, Failure> {
        let signals = Signals::watch().map_err(diskmill_core::Error::from)?;
        if style == Style::QemuImg {
            ui.print_quietly(&percent_text(0.0, '\r'));
        }
        let now = Instant::now();
        Ok(Self {
            ui: *ui,
            style,
            signals,
            total: AtomicU64::new(0),
            done: AtomicU64::new(0),
            shown: Mutex::new(Shown {
                percent: 0.0,
                bar: (style == Style::Bar).then(bar),
                at: now,
                began: now,
            }),
        })
    }

    /// What operations are given.
    pub fn job(&self) -> Job<'_> {
        Job {
            observer: self,
            cancel: self.signals.cancel(),
        }
    }

    /// The signals that arrived meanwhile.
    pub fn signals(&self) -> &Signals {
        &self.signals
    }

    /// Shows that all is done, unless that has been shown.
    pub fn complete_once(&self) {
        if self.shown().percent < 100.0 {
            self.complete();
        }
    }

    /// Shows that all is done.
    pub fn complete(&self) {
        let mut shown = self.shown();
        match self.style {
            Style::QemuImg => self.ui.print_quietly(&percent_text(100.0, '\r')),
            Style::Json => self.event(&mut shown, "done"),
            _ => {}
        }
    }

    /// Leaves the line on which progress was shown.
    pub fn end(&self) {
        if let Some(bar) = self.shown().bar.take() {
            bar.finish_and_clear();
        }
        if self.style == Style::QemuImg {
            self.ui.print_quietly("\n");
        }
    }

    fn shown(&self) -> std::sync::MutexGuard<'_, Shown> {
        // What is shown is only numbers: a thread that panicked left them usable.
        self.shown.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn percent(&self) -> f32 {
        let total = self.total.load(Ordering::Relaxed);
        let done = self.done.load(Ordering::Relaxed).min(total);
        match total {
            0 => 0.0,
            total => (done as f64 * 100.0 / total as f64) as f32,
        }
    }

    fn event(&self, shown: &mut Shown, name: &str) {
        let done = self.done.load(Ordering::Relaxed);
        let total = self.total.load(Ordering::Relaxed);
        let elapsed = shown.began.elapsed().as_secs_f64();
        let mut pairs = vec![
            ("event", Json::text(name)),
            ("done", Json::Int(done.min(total))),
            ("total", Json::Int(total)),
            ("seconds", Json::Real((elapsed * 1000.0).round() / 1000.0)),
        ];
        if elapsed > 0.0 {
            pairs.push(("bytes-per-second", Json::Int((done as f64 / elapsed) as u64)));
        }
        self.ui.note(&format!("{}\n", Json::ordered(pairs).line()));
        shown.at = Instant::now();
    }
}

impl Observer for Progress {
    fn total(&self, bytes: u64) {
        self.total.store(bytes, Ordering::Relaxed);
        let mut shown = self.shown();
        if let Some(bar) = &shown.bar {
            bar.set_length(bytes);
        }
        if self.style == Style::Json {
            self.event(&mut shown, "start");
        }
    }

    fn advance(&self, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
        if self.signals.take_report() {
            self.ui.note(&percent_text(self.percent(), '\n'));
        }
        if self.style == Style::None {
            return;
        }
        let mut shown = self.shown();
        // Read under the lock, so that what is shown never goes back.
        let percent = self.percent();
        match self.style {
            Style::Bar => {
                if let Some(bar) = &shown.bar {
                    bar.set_position(self.done.load(Ordering::Relaxed));
                }
            }
            Style::Json if shown.at.elapsed() >= PAUSE => self.event(&mut shown, "progress"),
            Style::QemuImg | Style::Plain if is_worth_telling(shown.percent, percent) => {
                shown.percent = percent;
                match self.style {
                    Style::QemuImg => self.ui.print_quietly(&percent_text(percent, '\r')),
                    _ => self.ui.note(&percent_text(percent, '\n')),
                }
            }
            _ => {}
        }
    }

    fn warn(&self, text: &str) {
        let shown = self.shown();
        match (self.style, &shown.bar) {
            (Style::Json, _) => {
                let event = Json::ordered([("event", Json::text("warning")), ("text", Json::text(text))]);
                self.ui.note(&format!("{}\n", event.line()));
            }
            (_, Some(bar)) => bar.suspend(|| self.ui.warn(text)),
            _ => self.ui.warn(text),
        }
    }
}

fn is_worth_telling(before: f32, now: f32) -> bool {
    now > before + STEP || (now >= 100.0 && before < 100.0)
}

fn percent_text(percent: f32, end: char) -> String {
    format!("    ({percent:.2}/100%){end}")
}

fn bar() -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr_with_hz(10));
    let template =
        "{percent:>3}% [{bar:30}] {binary_bytes} of {binary_total_bytes}  {binary_bytes_per_sec}  {eta} left";
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.progress_chars("=> "));
    }
    bar
}

/// A duration as people read it: `12 ms`, `3.4 s`, `2 min 5 s`.
pub fn duration(time: Duration) -> String {
    let mut out = String::new();
    // A String takes whatever is written to it.
    let _ = match time.as_secs_f64() {
        seconds if seconds < 1.0 => write!(out, "{:.0} ms", seconds * 1000.0),
        seconds if seconds < 60.0 => write!(out, "{seconds:.1} s"),
        seconds => write!(out, "{} min {} s", (seconds / 60.0) as u64, seconds as u64 % 60),
    };
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ui::Mode;

    #[test]
    fn percentages_are_written_as_qemu_img_writes_them() {
        assert_eq!(percent_text(0.0, '\r'), "    (0.00/100%)\r");
        assert_eq!(percent_text(3.125, '\r'), "    (3.12/100%)\r");
        assert_eq!(percent_text(9.765_625, '\n'), "    (9.77/100%)\n");
        assert_eq!(percent_text(100.0, '\r'), "    (100.00/100%)\r");
    }

    #[test]
    fn steps_below_the_threshold_are_not_told() {
        assert!(!is_worth_telling(0.0, 2.0));
        assert!(is_worth_telling(0.0, 2.1));
        assert!(is_worth_telling(99.5, 100.0));
        assert!(!is_worth_telling(100.0, 100.0));
    }

    #[test]
    fn quiet_beats_progress_under_the_name_qemu_img() {
        let ui = Ui {
            mode: Mode::DropIn,
            command: "convert",
        };
        assert_eq!(
            Style::choose(&ui, true, Some("auto"), false).unwrap(),
            Style::None
        );
        assert_eq!(
            Style::choose(&ui, false, Some("auto"), false).unwrap(),
            Style::QemuImg
        );
        let ui = Ui {
            mode: Mode::Native,
            command: "convert",
        };
        assert_eq!(
            Style::choose(&ui, false, Some("json"), false).unwrap(),
            Style::Json
        );
        assert_eq!(Style::choose(&ui, false, None, true).unwrap(), Style::Json);
        assert!(Style::choose(&ui, false, Some("loud"), false).is_err());
    }

    #[test]
    fn durations_are_short() {
        assert_eq!(duration(Duration::from_millis(12)), "12 ms");
        assert_eq!(duration(Duration::from_millis(3400)), "3.4 s");
        assert_eq!(duration(Duration::from_secs(125)), "2 min 5 s");
    }
}
