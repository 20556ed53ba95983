//! Running other programs.

use std::ffi::OsStr;
use std::fmt;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// Why a task failed.
#[derive(Debug)]
pub struct Failed(String);

impl Failed {
    /// A failure explained by `text`.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<std::io::Error> for Failed {
    fn from(error: std::io::Error) -> Self {
        Self(error.to_string())
    }
}

/// A program to run in the workspace's folder.
#[derive(Debug)]
pub struct Program(Command);

/// `cargo` with arguments: the one that runs us.
pub fn cargo<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Program {
    program(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into())).args(args)
}

/// Any program.
pub fn program(name: impl AsRef<OsStr>) -> Program {
    let mut command = Command::new(name);
    command.current_dir(crate::root());
    Program(command)
}

impl Program {
    /// Adds arguments.
    pub fn args<S: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.0.args(args);
        self
    }

    /// Sets a variable of its environment.
    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.0.env(name, value);
        self
    }

    /// Runs it in another folder.
    pub fn dir(mut self, dir: impl AsRef<std::path::Path>) -> Self {
        self.0.current_dir(dir);
        self
    }

    fn line(&self) -> String {
        let mut line = self.0.get_program().to_string_lossy().into_owned();
        for arg in self.0.get_args() {
            line.push(' ');
            line.push_str(&arg.to_string_lossy());
        }
        line
    }

    /// Runs it and demands success. What it prints is shown.
    pub fn run(mut self) -> Result<(), Failed> {
        eprintln!("+ {}", self.line());
        let line = self.line();
        let status = self
            .0
            .status()
            .map_err(|error| Failed::new(format!("cannot run {line}: {error}")))?;
        if status.success() {
            Ok(())
        } else {
            Err(Failed::new(format!("{line}: {status}")))
        }
    }

    /// Runs it, shows what it prints on both streams, and returns the lines. The flag says whether it succeeded.
    pub fn run_and_keep(mut self) -> Result<(bool, Vec<String>), Failed> {
        eprintln!("+ {}", self.line());
        let line = self.line();
        let mut child = self
            .0
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| Failed::new(format!("cannot run {line}: {error}")))?;
        let (Some(out), Some(err)) = (child.stdout.take(), child.stderr.take()) else {
            return Err(Failed::new("no pipes"));
        };
        let kept = std::thread::scope(|scope| {
            let err = scope.spawn(|| keep(err, |line| eprintln!("{line}")));
            let mut kept = keep(out, |line| println!("{line}"));
            kept.extend(err.join().unwrap_or_default());
            kept
        });
        Ok((child.wait()?.success(), kept))
    }

    /// What it prints on standard output, or `None` if it fails or does not exist.
    pub fn output(mut self) -> Option<String> {
        let output = self.0.stdin(Stdio::null()).output().ok()?;
        output
            .status
            .success()
            .then(|| String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

fn keep(stream: impl std::io::Read, show: impl Fn(&str)) -> Vec<String> {
    let mut lines = Vec::new();
    let mut reader = BufReader::new(stream);
    let mut bytes = Vec::new();
    while reader.read_until(b'\n', &mut bytes).unwrap_or(0) > 0 {
        let line = String::from_utf8_lossy(&bytes).trim_end().to_owned();
        show(&line);
        lines.push(line);
        bytes.clear();
    }
    lines
}

/// The path of a tool: on `PATH`, or where administrators' tools are.
pub fn look(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|dir| dir.join(name))
        .find(|file| file.is_file())
}
