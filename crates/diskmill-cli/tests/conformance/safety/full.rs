//! Commands that run out of space, or whose writes fail.

use diskmill_testkit::host::{Loop, Mount};
use diskmill_testkit::sparse_random::SparseRandom;
use diskmill_testkit::{Finished, Run, Scratch};

use super::{Case, Leaves, VICTIMS, copy};
use crate::interrupt::binary_words;
use crate::tools::{binary, native, ours};

const MIB: u64 = 1 << 20;

fn bytes(folder: &Scratch) -> u64 {
    let len = |name: &String| folder.join(name).metadata().expect("metadata").len();
    folder.names().iter().map(len).sum()
}

/// Demands exit code 1 and one line that names the file and says what is wrong with it.
fn assert_told(done: &Finished, names: &[&str], reason: &str) {
    assert_eq!(done.code, Some(1), "{done}");
    let text = done.err();
    assert!(text.contains(reason), "{done}");
    assert!(
        names.iter().any(|name| text.contains(name)),
        "names no file: {done}"
    );
    assert_eq!(text.lines().count(), 1, "{done}");
}

#[test]
fn every_command__out_of_space() {
    let mut failed = 0;
    for victim in VICTIMS {
        let case = Case::new(victim);
        let (before, after) = (bytes(&case.before), bytes(&case.after));
        for part in 0..3 {
            let work = Scratch::beneath("/dev/shm");
            // Whole pages, each file its own, and folders.
            let room = (before + after.saturating_sub(before) * part / 3).next_multiple_of(4096) + 32768;
            let done = {
                let mount = Mount::new(
                    work.path(),
                    &["-t", "tmpfs", "-o", &format!("size={room}"), "tmpfs"],
                );
                for name in case.before.names() {
                    std::fs::copy(case.before.join(&name), work.join(&name)).expect("copy");
                }
                if part == 1 && matches!(victim.leaves, Leaves::New(_)) {
                    work.file("new", b"precious");
                }
                let done = victim.command(&work).finish();
                let left = copy(&work);
                drop(mount);
                case.judge(&left, &format!("{}, room for {room} bytes: {done}", victim.name));
                done
            };
            if done.code != Some(0) {
                failed += 1;
                assert_told(&done, &["image", "new", "base"], "No space left on device");
            }
        }
    }
    assert!(
        failed > VICTIMS.len() / 2,
        "only {failed} commands ran out of space"
    );
}

#[test]
fn every_command__past_the_limit_of_a_file() {
    let mut failed = 0;
    for victim in VICTIMS {
        let case = Case::new(victim);
        for part in 0..3 {
            let work = copy(&case.before);
            let (before, after) = (bytes(&case.before), bytes(&case.after));
            let limit = (before + after.saturating_sub(before) * part / 3) / 512;
            let done = Run::new("sh")
                .dir(work.path())
                .args([
                    "-c",
                    &format!("trap '' XFSZ; ulimit -f {limit}; exec \"$@\""),
                    "sh",
                ])
                .arg(binary())
                .args(if victim.is_native() { &[] } else { binary_words() })
                .words(victim.words)
                .finish();
            case.judge(
                &work,
                &format!("{}, limit of {limit} sectors: {done}", victim.name),
            );
            if done.code != Some(0) {
                failed += 1;
                assert_told(&done, &["image", "new", "base"], "File too large");
            }
        }
    }
    assert!(failed > 0, "no command has met the limit");
}

#[test]
fn a_device_that_fails_when_it_is_flushed() {
    let scratch = Scratch::beneath("/dev/shm");
    SparseRandom::new(8, 12 * MIB).write_raw(scratch.join("disk.raw"));
    std::fs::create_dir(scratch.join("small")).expect("make a folder");
    // The kernel takes the writes and finds out later that there is no room for them.
    let _mount = Mount::new(scratch.join("small"), &["-t", "tmpfs", "-o", "size=2m", "tmpfs"]);
    let backing = scratch.join("small/device");
    std::fs::File::create(&backing)
        .and_then(|file| file.set_len(16 * MIB))
        .expect("make a sparse file");
    let device = Loop::attach(&backing, 512);
    let name = device.path().to_str().expect("a plain name");
    // Under qemu-img's name nothing is flushed unless it is asked for, as there.
    for done in [
        ours(&scratch).words(&format!("convert -t writeback -f raw -O raw disk.raw {name}")),
        ours(&scratch).words(&format!("convert -t none -f raw -O raw disk.raw {name}")),
        ours(&scratch).words(&format!("convert -n -t writeback -f raw -O raw disk.raw {name}")),
        native(&scratch).words(&format!("convert -f raw -O raw disk.raw {name}")),
        native(&scratch).words(&format!("convert -f raw -O qcow2 disk.raw {name}")),
    ] {
        let done = done.finish();
        assert_eq!(done.code, Some(1), "{done}");
        assert!(done.err().contains(name), "names no file: {done}");
    }
}

#[test]
fn a_full_standard_output() {
    let scratch = Scratch::beneath("/dev/shm");
    SparseRandom::new(8, 2 * MIB).write_raw(scratch.join("disk.raw"));
    for words in [
        "convert -f raw -O raw disk.raw /dev/stdout",
        "info -f raw disk.raw",
        "map -f raw disk.raw",
    ] {
        let done = Run::new("sh")
            .dir(scratch.path())
            .args(["-c", "exec \"$@\" > /dev/full", "sh"])
            .arg(binary())
            .args(binary_words())
            .words(words)
            .finish();
        assert_eq!(done.code, Some(1), "{done}");
        assert!(done.err().contains("No space left on device"), "{done}");
    }
}
