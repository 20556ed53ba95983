//! Running a program to its end, or to the end of our patience.

use std::ffi::{OsStr, OsString};
use std::fmt::Write as _;
use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

/// How long a program may take unless a test says otherwise.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// A program to run.
#[derive(Clone, Debug)]
pub struct Run {
    program: PathBuf,
    name: Option<OsString>,
    args: Vec<OsString>,
    envs: Vec<(OsString, OsString)>,
    dir: Option<PathBuf>,
    input: Vec<u8>,
    patience: Duration,
    limits: Vec<OsString>,
    watch_memory: bool,
}

impl Run {
    /// Runs `program`: a path, or a name to look up (see [`find`]).
    pub fn new(program: impl AsRef<Path>) -> Self {
        let program = program.as_ref();
        let program = if program.components().count() > 1 {
            program.to_owned()
        } else {
            find(&program.to_string_lossy())
        };
        Self {
            program,
            name: None,
            args: Vec::new(),
            envs: Vec::new(),
            dir: None,
            input: Vec::new(),
            patience: PATIENCE,
            limits: Vec::new(),
            watch_memory: false,
        }
    }

    /// Runs it under another name (`argv[0]`).
    #[must_use]
    pub fn named(mut self, name: impl AsRef<OsStr>) -> Self {
        self.name = Some(name.as_ref().to_owned());
        self
    }

    /// Adds an argument.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<S: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.args
            .extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    /// Adds the words of `line`, split at spaces: for command lines without odd names.
    #[must_use]
    pub fn words(self, line: &str) -> Self {
        self.args(line.split_whitespace())
    }

    /// Sets a variable of its environment.
    #[must_use]
    pub fn env(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.envs
            .push((name.as_ref().to_owned(), value.as_ref().to_owned()));
        self
    }

    /// Runs it in `dir`.
    #[must_use]
    pub fn dir(mut self, dir: impl AsRef<Path>) -> Self {
        self.dir = Some(dir.as_ref().to_owned());
        self
    }

    /// Gives it bytes to read from standard input.
    #[must_use]
    pub fn input(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.input = bytes.into();
        self
    }

    /// Kills it after `patience`.
    #[must_use]
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// Sets a resource limit as `prlimit` spells it: `--fsize=1048576`, `--as=1073741824`.
    #[must_use]
    pub fn limit(mut self, limit: &str) -> Self {
        self.limits.push(limit.into());
        self
    }

    /// Looks at its memory while it runs, see [`Finished::peak_memory`].
    #[must_use]
    pub fn watch_memory(mut self) -> Self {
        self.watch_memory = true;
        self
    }

    /// Starts it with pipes for all three streams.
    pub fn spawn(&self) -> Child {
        let mut command = self.command();
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("start {}: {error}", self.line()))
    }

    fn command(&self) -> Command {
        let mut command = if self.limits.is_empty() {
            Command::new(&self.program)
        } else {
            assert!(
                self.name.is_none(),
                "prlimit cannot run a program under another name"
            );
            let mut command = Command::new(find("prlimit"));
            command.args(&self.limits).arg("--").arg(&self.program);
            command
        };
        if let Some(name) = &self.name {
            use std::os::unix::process::CommandExt;
            command.arg0(name);
        }
        command.args(&self.args).envs(self.envs.iter().cloned());
        if let Some(dir) = &self.dir {
            command.current_dir(dir);
        }
        command
    }

    /// The command line, for messages.
    pub fn line(&self) -> String {
        let mut line = String::new();
        for limit in &self.limits {
            let _ = write!(line, "[{}] ", limit.to_string_lossy());
        }
        line.push_str(&self.program.to_string_lossy());
        for arg in &self.args {
            let _ = write!(line, " {}", arg.to_string_lossy());
        }
        line
    }

    /// Runs it to its end.
    pub fn finish(&self) -> Finished {
        let started = Instant::now();
        let mut child = self.spawn();
        let mut stdin = child.stdin.take().expect("a pipe");
        let mut stdout = child.stdout.take().expect("a pipe");
        let mut stderr = child.stderr.take().expect("a pipe");
        let (ended, ends) = mpsc::channel();
        let also_ended = ended.clone();
        thread::scope(|scope| {
            // A program that does not read its input breaks the pipe, which is its right.
            scope.spawn(move || stdin.write_all(&self.input).ok());
            let out = scope.spawn(move || drain(&mut stdout, &ended));
            let err = scope.spawn(move || drain(&mut stderr, &also_ended));
            let (status, timed_out, peak) = self.wait(&mut child, started, &ends);
            let took = started.elapsed();
            Finished {
                line: self.line(),
                code: status.code(),
                signal: status.signal(),
                stdout: out.join().expect("the reader of standard output"),
                stderr: err.join().expect("the reader of standard error"),
                timed_out,
                took,
                peak_memory: peak,
            }
        })
    }

    /// Waits for both streams to end, which takes no polling and so costs a measured program nothing, then for the
    /// program.
    fn wait(
        &self,
        child: &mut Child,
        started: Instant,
        ends: &Receiver<()>,
    ) -> (ExitStatus, bool, Option<u64>) {
        let mut peak = None;
        let mut open = 2;
        loop {
            if self.watch_memory {
                peak = peak.max(memory(child.id()));
            }
            if open == 0
                && let Some(status) = child.try_wait().expect("wait for a program")
            {
                return (status, false, peak);
            }
            let left = self.patience.saturating_sub(started.elapsed());
            if left.is_zero() {
                child.kill().expect("kill a program");
                return (child.wait().expect("wait for a program"), true, peak);
            }
            let step = match (open, self.watch_memory) {
                (0, _) => Duration::from_micros(50),
                (_, true) => Duration::from_millis(1),
                (_, false) => left,
            };
            match ends.recv_timeout(step.min(left)) {
                Ok(()) => open -= 1,
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => thread::sleep(step.min(left)),
            }
        }
    }

    /// Runs it and demands exit code 0.
    pub fn ok(&self) -> Finished {
        self.finish().expect(0)
    }
}

fn drain(pipe: &mut impl Read, ended: &Sender<()>) -> Vec<u8> {
    let mut bytes = Vec::new();
    // Killing the program ends the pipe early; what came until then is still worth showing.
    let _ = pipe.read_to_end(&mut bytes);
    // Nobody listens once the patience is over.
    let _ = ended.send(());
    bytes
}

/// The largest resident size of a process so far, in bytes, while it lives.
pub fn memory(pid: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib * 1024)
}

/// How a program ended.
#[derive(Clone, Debug)]
pub struct Finished {
    line: String,
    /// Its exit code, unless a signal ended it.
    pub code: Option<i32>,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// What it wrote to standard output.
    pub stdout: Vec<u8>,
    /// What it wrote to standard error.
    pub stderr: Vec<u8>,
    /// Whether it was killed because it took too long.
    pub timed_out: bool,
    /// How long it took.
    pub took: Duration,
    /// The largest resident size seen, in bytes, if it was watched and lived long enough to be seen.
    pub peak_memory: Option<u64>,
}

impl Finished {
    /// Demands an exit code. Panics with all there is to see otherwise.
    pub fn expect(self, code: i32) -> Self {
        assert!(
            self.code == Some(code) && !self.timed_out,
            "expected exit code {code}\n{self}"
        );
        self
    }

    /// Standard output as text.
    pub fn out(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Standard error as text.
    pub fn err(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    /// Standard output as JSON. Panics if it is none.
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.stdout).unwrap_or_else(|error| panic!("no JSON: {error}\n{self}"))
    }
}

impl std::fmt::Display for Finished {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "$ {}", self.line)?;
        match (self.timed_out, self.code, self.signal) {
            (true, ..) => writeln!(f, "killed after {:?}", self.took)?,
            (_, Some(code), _) => writeln!(f, "exit code {code}")?,
            (_, None, signal) => writeln!(f, "ended by signal {}", signal.unwrap_or_default())?,
        }
        for (name, text) in [("stdout", self.out()), ("stderr", self.err())] {
            if !text.is_empty() {
                let shown: String = text.chars().take(4000).collect();
                writeln!(f, "{name}:\n{shown}")?;
            }
        }
        Ok(())
    }
}

/// The path of a tool: on `PATH`, or where administrators' tools are. Panics if it is not installed.
pub fn find(name: &str) -> PathBuf {
    look(name)
        .unwrap_or_else(|| panic!("{name} is not installed: `cargo xtask test` installs or names every peer"))
}

/// The path of a tool, or `None` if it is not installed.
pub fn look(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let beside = ["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(&path)
        .chain(beside)
        .map(|dir| dir.join(name))
        .find(|file| file.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_codes_streams_and_signals_apart() {
        let done = Run::new("sh")
            .args(["-c", "cat; echo err >&2; exit 3"])
            .input("in")
            .finish()
            .expect(3);
        assert_eq!((done.out(), done.err()), ("in".to_owned(), "err\n".to_owned()));
        let killed = Run::new("sh").args(["-c", "kill -9 $$"]).finish();
        assert_eq!((killed.code, killed.signal), (None, Some(9)));
    }

    #[test]
    fn ends_what_takes_too_long() {
        let done = Run::new("sleep")
            .arg("60")
            .patience(Duration::from_millis(50))
            .finish();
        assert!(done.timed_out);
    }

    #[test]
    fn sets_limits_for_the_child_only() {
        let done = Run::new("sh")
            .args(["-c", "ulimit -f"])
            .limit("--fsize=1048576")
            .ok();
        assert!(["1024\n", "2048\n"].contains(&done.out().as_str()), "{done}");
    }

    #[test]
    #[should_panic(expected = "is not installed")]
    fn a_missing_peer_is_a_failure() {
        find("no-such-tool-anywhere");
    }
}
