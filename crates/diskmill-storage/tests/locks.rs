//! The image locks, against QEMU's own tools: they honour ours and we honour theirs.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Child;

use diskmill_core::ErrorKind;
use diskmill_storage::{File, FileOptions, LockByteError, LockError, LockPlan, StageOptions, Staged};
use diskmill_testkit::host::Loop;
use diskmill_testkit::oracle::{self, Holder, qemu_img, qemu_io};
use diskmill_testkit::{Run, Scratch};

fn options(plan: LockPlan) -> FileOptions {
    if plan == LockPlan::WRITE || plan == LockPlan::OPENING {
        FileOptions::write(plan)
    } else {
        FileOptions::read(plan)
    }
}

/// The text a person would see if `plan` cannot be had, or nothing.
fn refusal(path: &Path, plan: LockPlan) -> String {
    match File::open(path, &options(plan)) {
        Ok(_) => String::new(),
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::Locked, "{error:?}");
            error.find::<LockError>().expect("why").to_string()
        }
    }
}

/// The bytes of `path` that are locked, by whomever.
fn locked_bytes(path: &Path) -> Vec<u64> {
    let inode = std::fs::metadata(path).unwrap().ino();
    let table = std::fs::read_to_string("/proc/locks").unwrap();
    let mut bytes: Vec<u64> = table
        .lines()
        .filter(|line| line.contains("OFDLCK") && line.contains("READ"))
        .flat_map(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let own = fields
                .iter()
                .position(|field| field.ends_with(&format!(":{inode}")));
            // The kernel joins the locks of neighbours.
            own.map_or(0..0, |own| {
                let [first, last] = [own + 1, own + 2].map(|index| fields[index].parse::<u64>().unwrap());
                first..last + 1
            })
        })
        .collect();
    bytes.sort_unstable();
    bytes.dedup();
    bytes
}

fn image(scratch: &Scratch, format: &str) -> PathBuf {
    let path = scratch.join(format!("disk.{format}"));
    oracle::create(&path, format, "", "1M");
    path
}

#[test]
fn holds_the_bytes_qemu_holds() {
    let scratch = Scratch::new();
    let path = image(&scratch, "qcow2");
    assert!(locked_bytes(&path).is_empty());
    for (plan, bytes) in [
        (LockPlan::NONE, &[][..]),
        (LockPlan::SHARE, &[100]),
        (LockPlan::READ, &[100, 201, 203]),
        (LockPlan::WRITE, &[100, 101, 103, 201, 203]),
        (LockPlan::OPENING, &[101, 103]),
    ] {
        let file = File::open(&path, &options(plan)).unwrap();
        assert_eq!(locked_bytes(&path), bytes);
        assert_eq!(file.locks(), plan);
        drop(file);
        assert!(locked_bytes(&path).is_empty());
    }
    for (flags, plan) in [
        (&[][..], LockPlan::WRITE),
        (&["-r"], LockPlan::READ),
        (&["-r", "-U"], LockPlan::SHARE),
    ] {
        let theirs = {
            let _holder = Holder::qemu_io(&path, "qcow2", flags);
            locked_bytes(&path)
        };
        let _ours = File::open(&path, &options(plan)).unwrap();
        assert_eq!(locked_bytes(&path), theirs, "{flags:?}");
    }
}

#[test]
fn honours_what_qemu_holds() {
    let scratch = Scratch::new();
    let qcow2 = image(&scratch, "qcow2");
    let raw = image(&scratch, "raw");
    let write = "failed to get \"write\" lock";
    let shared_write = "failed to get shared \"write\" lock";
    let cases: [(&Path, &str, &[&str], [&str; 4]); 5] = [
        (&qcow2, "qcow2", &[], ["", shared_write, write, write]),
        (&qcow2, "qcow2", &["-r"], ["", "", write, write]),
        (&qcow2, "qcow2", &["-r", "-U"], ["", "", "", ""]),
        (&raw, "raw", &[], ["", shared_write, shared_write, ""]),
        (&raw, "raw", &["-r"], ["", "", "", ""]),
    ];
    let plans = [
        LockPlan::SHARE,
        LockPlan::READ,
        LockPlan::WRITE,
        LockPlan::OPENING,
    ];
    for (path, format, flags, expected) in cases {
        let holder = Holder::qemu_io(path, format, flags);
        for (plan, expected) in plans.into_iter().zip(expected) {
            assert_eq!(refusal(path, plan), expected, "{format} {flags:?} {plan:?}");
        }
        drop(holder);
        assert_eq!(refusal(path, LockPlan::WRITE), "");
    }
    for (flags, expected) in [(&[][..], [shared_write, write]), (&["-r"], ["", write])] {
        let _holder = Holder::qemu_nbd(&qcow2, "qcow2", flags);
        assert_eq!(refusal(&qcow2, LockPlan::READ), expected[0], "qemu-nbd {flags:?}");
        assert_eq!(
            refusal(&qcow2, LockPlan::WRITE),
            expected[1],
            "qemu-nbd {flags:?}"
        );
    }
}

/// Runs a command and demands that it fails for a lock, or works if `text` is empty.
fn demand(run: Run, text: &str) {
    let done = run.finish();
    if text.is_empty() {
        assert_eq!(done.code, Some(0), "{done}");
    } else {
        assert_eq!(done.code, Some(1), "{done}");
        assert!(done.err().contains(text), "{done}");
    }
}

#[test]
fn qemu_honours_what_we_hold() {
    let write = "Failed to get \"write\" lock";
    let shared_write = "Failed to get shared \"write\" lock";
    for format in ["qcow2", "raw"] {
        let scratch = Scratch::new();
        let path = image(&scratch, format);
        let other = scratch.file("other.raw", &[7; 4096]);
        let info = |share: &[&str]| qemu_img().args(["info", "-f", format]).args(share).arg(&path);
        let convert_from = || {
            let run = qemu_img().args(["convert", "-f", format, "-O", "raw"]);
            run.arg(&path).arg(scratch.join("out.raw"))
        };
        let convert_to = || {
            let run = qemu_img().args(["convert", "-f", "raw", "-O", format]);
            run.arg(&other).arg(&path)
        };
        let resize = || qemu_img().args(["resize", "-f", format]).arg(&path).arg("2M");
        let create = || qemu_img().args(["create", "-f", format]).arg(&path).arg("1M");
        let change = || qemu_io().args(["-f", format, "-c", "write 0 512"]).arg(&path);
        {
            let _ours = File::open(&path, &options(LockPlan::WRITE)).unwrap();
            // A raw file is only looked at by info, and QEMU lets that be.
            demand(info(&[]), if format == "raw" { "" } else { shared_write });
            demand(info(&["-U"]), "");
            demand(convert_from(), shared_write);
            for run in [convert_to(), resize(), create(), change()] {
                demand(run, write);
            }
        }
        {
            let _ours = File::open(&path, &options(LockPlan::READ)).unwrap();
            demand(info(&[]), "");
            demand(convert_from(), "");
            for run in [convert_to(), resize(), create(), change()] {
                demand(run, write);
            }
        }
        {
            let _ours = File::open(&path, &options(LockPlan::SHARE)).unwrap();
            for run in [
                info(&[]),
                convert_from(),
                change(),
                resize(),
                convert_to(),
                create(),
            ] {
                demand(run, "");
            }
        }
    }
}

#[test]
fn a_change_of_plan_that_fails_changes_nothing() {
    let scratch = Scratch::new();
    let path = image(&scratch, "raw");
    let one = File::open(&path, &FileOptions::write(LockPlan::READ)).unwrap();
    let two = File::open(&path, &FileOptions::write(LockPlan::READ)).unwrap();
    let error = one.relock(LockPlan::WRITE).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Locked);
    let found = error.find::<LockError>().unwrap();
    assert_eq!((found.permission, found.shared), ("write", false));
    assert_eq!(one.locks(), LockPlan::READ);
    assert_eq!(locked_bytes(&path), [100, 201, 203]);
    drop(two);
    assert_eq!(locked_bytes(&path), [100, 201, 203]);
    one.relock(LockPlan::WRITE).unwrap();
    assert_eq!(locked_bytes(&path), [100, 101, 103, 201, 203]);
    one.relock(LockPlan::SHARE).unwrap();
    assert_eq!(locked_bytes(&path), [100]);
    one.relock(LockPlan::NONE).unwrap();
    assert!(locked_bytes(&path).is_empty());
}

/// Somebody who locks in another way than QEMU does.
struct Foreign(Child);

impl Foreign {
    fn exclusive(path: &Path, byte: u64) -> Self {
        let program = format!(
            "import fcntl, struct, sys\n\
             file = open(sys.argv[1], 'r+b')\n\
             fcntl.fcntl(file, 37, struct.pack('hhqqi4x', fcntl.F_WRLCK, 0, {byte}, 1, 0))\n\
             print('locked', flush=True)\n\
             sys.stdin.read()\n"
        );
        let mut child = Run::new("python3").args(["-c", &program]).arg(path).spawn();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap())
            .read_line(&mut line)
            .unwrap();
        assert_eq!(line, "locked\n");
        Self(child)
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn other_programs_count_too() {
    let scratch = Scratch::new();
    let path = image(&scratch, "raw");
    {
        let _holder = Foreign::exclusive(&path, 100);
        let error = File::open(&path, &FileOptions::read(LockPlan::READ)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Locked, "{error:?}");
        assert_eq!(error.find::<LockByteError>().unwrap().byte, 100);
        File::open(&path, &FileOptions::read(LockPlan::NONE)).unwrap();
    }
    {
        let _holder = Foreign::exclusive(&path, 201);
        assert_eq!(refusal(&path, LockPlan::OPENING), "failed to get \"write\" lock");
        assert_eq!(refusal(&path, LockPlan::SHARE), "");
    }
    assert_eq!(refusal(&path, LockPlan::WRITE), "");
}

#[test]
fn a_target_in_use_is_not_replaced() {
    for format in ["qcow2", "raw"] {
        for flags in [&[][..], &["-r"]] {
            if format == "raw" && flags == ["-r"] {
                // QEMU itself lets a raw file be written while somebody reads it.
                continue;
            }
            let scratch = Scratch::new();
            let path = image(&scratch, format);
            let before = std::fs::read(&path).unwrap();
            let holder = Holder::qemu_io(&path, format, flags);
            let error = Staged::create(&path, &StageOptions::new()).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Locked, "{format} {flags:?}: {error:?}");
            drop(holder);
            let staged = Staged::create(&path, &StageOptions::new()).unwrap();
            // And nobody takes it into use while the new one is being written.
            demand(
                qemu_io().args(["-f", format, "-c", "write 0 512"]).arg(&path),
                "Failed to get \"write\" lock",
            );
            drop(staged);
            assert_eq!(std::fs::read(&path).unwrap(), before);
            assert_eq!(scratch.names(), [format!("disk.{format}")]);
        }
    }
}

#[test]
fn a_target_that_comes_into_use_meanwhile_is_not_replaced() {
    let scratch = Scratch::new();
    let path = scratch.join("disk.qcow2");
    let staged = Staged::create(&path, &StageOptions::new()).unwrap();
    staged.storage().write_at(Default::default(), b"new").unwrap();
    oracle::create(&path, "qcow2", "", "1M");
    let before = std::fs::read(&path).unwrap();
    let mut holder = Holder::qemu_io(&path, "qcow2", &[]);
    std::io::stdout().flush().unwrap();
    let error = staged.commit(diskmill_storage::Durability::None).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Locked, "{error:?}");
    assert_eq!(std::fs::read(&path).unwrap(), before);
    holder = {
        drop(holder);
        Holder::qemu_io(&path, "qcow2", &["-r", "-U"])
    };
    let staged = Staged::create(&path, &StageOptions::new()).unwrap();
    staged.commit(diskmill_storage::Durability::None).unwrap();
    drop(holder);
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 0);
    assert_eq!(scratch.names(), ["disk.qcow2"]);
}

#[test]
fn devices_are_locked_as_files_are() {
    let scratch = Scratch::new();
    let device = Loop::attach(scratch.hole("device", 1 << 20), 512);
    {
        let _holder = Holder::qemu_io(device.path(), "raw", &[]);
        assert_eq!(
            refusal(device.path(), LockPlan::WRITE),
            "failed to get shared \"write\" lock"
        );
        let error = Staged::create(device.path(), &StageOptions::new()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Locked);
    }
    let _ours = File::open(device.path(), &options(LockPlan::WRITE)).unwrap();
    let change = qemu_io()
        .args(["-f", "raw", "-c", "write 0 512"])
        .arg(device.path());
    demand(change, "Failed to get \"write\" lock");
}

#[test]
fn a_closed_file_is_free_whoever_else_has_its_descriptor() {
    use std::os::fd::AsFd;
    let scratch = Scratch::new();
    let path = image(&scratch, "raw");
    let file = File::open(&path, &options(LockPlan::WRITE)).unwrap();
    // As a child process has it between its fork and its exec.
    let _copy = file.as_fd().try_clone_to_owned().unwrap();
    drop(file);
    assert!(locked_bytes(&path).is_empty());
    assert_eq!(refusal(&path, LockPlan::WRITE), "");
}
