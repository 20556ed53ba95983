//! Passphrases typed on a terminal: asked for when they are needed, and never shown.

use std::fs::File;
use std::io::{Read, Write};
use std::process::{Command, Stdio};
use std::time::Duration;

use diskmill_testkit::Scratch;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, tcgetattr};

use crate::diskmill;

/// What came of a command on a terminal.
struct Talk {
    shown: String,
    code: Option<i32>,
}

/// Runs `words` on a terminal of its own, and types an answer after each question.
fn talk(scratch: &Scratch, words: &str, answers: &[&str]) -> Talk {
    let terminal = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&terminal).unwrap();
    unlockpt(&terminal).unwrap();
    let name = ptsname(&terminal, Vec::new()).unwrap().into_string().unwrap();
    let other = File::options().read(true).write(true).open(name).unwrap();
    let end = || Stdio::from(other.try_clone().unwrap());
    let mut child = Command::new("setsid")
        .args(["--ctty", "--wait", env!("CARGO_BIN_EXE_diskmill")])
        .args(words.split_whitespace())
        .current_dir(scratch.path())
        .stdin(end())
        .stdout(end())
        .stderr(end())
        .spawn()
        .unwrap();
    let mut terminal = File::from(terminal);
    let mut shown = Vec::new();
    let mut answers = answers.iter();
    let mut asked = 0;
    let step = Timespec::try_from(Duration::from_millis(50)).unwrap();
    // Only a hang takes this many steps.
    for _ in 0..2400 {
        let ended = child.try_wait().unwrap();
        let mut fds = [PollFd::new(&terminal, PollFlags::IN)];
        if poll(&mut fds, Some(&step)).unwrap() > 0 {
            let mut piece = [0; 4096];
            let len = terminal.read(&mut piece).unwrap();
            shown.extend_from_slice(&piece[..len]);
            let text = String::from_utf8_lossy(&shown);
            let questions = text.matches("Passphrase for '").count()
                + text.matches("New passphrase for '").count()
                + text.matches("The same again").count();
            if text.ends_with(": ") && questions > asked {
                asked = questions;
                terminal.write_all(answers.next().unwrap().as_bytes()).unwrap();
            }
        } else if let Some(status) = ended {
            assert!(answers.next().is_none(), "{}", String::from_utf8_lossy(&shown));
            let modes = tcgetattr(&other).unwrap().local_modes;
            assert!(modes.contains(LocalModes::ECHO | LocalModes::ICANON | LocalModes::ISIG));
            let shown = String::from_utf8(shown).unwrap();
            assert!(!shown.contains("pw"), "{shown}");
            return Talk {
                shown,
                code: status.code(),
            };
        }
    }
    let _ = child.kill();
    panic!("it hangs: {}", String::from_utf8_lossy(&shown));
}

#[test]
fn passphrases_are_asked_for_where_data_is_read() {
    let scratch = Scratch::new();
    scratch.file("key", b"pw1\n");
    let run = |words: &str| diskmill(scratch.path()).words(words).ok();
    run("create -q -f luks -o iter-time=10 --passphrase-file key a.luks 1M");
    let done = talk(&scratch, "convert -q a.luks out.raw", &["px\u{7f}w1\n"]);
    assert_eq!(done.code, Some(0), "{}", done.shown);
    assert!(done.shown.contains("Passphrase for 'a.luks': "), "{}", done.shown);
    run("compare --passphrase-file key a.luks out.raw");
    let wrong = talk(&scratch, "convert -q a.luks no.raw", &["pw2\n"]);
    assert!(
        wrong.code == Some(1) && wrong.shown.contains("password"),
        "{}",
        wrong.shown
    );
    let broken = talk(&scratch, "convert -q a.luks no.raw", &["pw\u{3}"]);
    assert!(!broken.shown.contains("error"), "{}", broken.shown);
    let ended = talk(&scratch, "convert -q a.luks no.raw", &["\u{4}"]);
    assert!(
        ended.code == Some(1) && ended.shown.contains("no passphrase"),
        "{}",
        ended.shown
    );
    assert!(!scratch.join("no.raw").exists());
    // Nothing that needs no data asks, and nothing asks under the other name.
    for words in ["info a.luks", "map a.luks", "check a.luks"] {
        assert_eq!(talk(&scratch, words, &[]).code, Some(0), "{words}");
    }
    assert_eq!(talk(&scratch, "qemu-img map a.luks", &[]).code, Some(1));
}

#[test]
fn passphrases_of_new_images_are_asked_for_twice() {
    let scratch = Scratch::new();
    scratch.file("key", b"pw1\n");
    let make = "create -q -f qcow2 -o encrypt.format=luks,encrypt.iter-time=10 a.qcow2 1M";
    let differ = talk(&scratch, make, &["pw1\n", "pw2\n"]);
    assert!(
        differ.code == Some(1) && differ.shown.contains("differ"),
        "{}",
        differ.shown
    );
    let none = talk(&scratch, make, &["\n"]);
    assert!(
        none.code == Some(1) && none.shown.contains("empty"),
        "{}",
        none.shown
    );
    assert!(!scratch.join("a.qcow2").exists());
    let done = talk(&scratch, make, &["pw1\n", "pw1\n"]);
    assert_eq!(done.code, Some(0), "{}", done.shown);
    diskmill(scratch.path())
        .words("convert --passphrase-file key a.qcow2 out.raw")
        .ok();
    // Each image has its own.
    let both = talk(
        &scratch,
        "convert -q -O luks -o iter-time=10 a.qcow2 b.luks",
        &["pw1\n", "pw3\n", "pw3\n"],
    );
    assert_eq!(both.code, Some(0), "{}", both.shown);
}
