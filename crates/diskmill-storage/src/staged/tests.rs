use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::time::Duration;

use diskmill_core::{ErrorKind, HostOffset, Storage};
use diskmill_testkit::host::{Loop, Mount};
use diskmill_testkit::{Run, Scratch};
use rustix::fs::{Gid, Uid, XattrFlags};

use super::*;
use crate::NotADisk;

/// A folder on the disk's file system and one in memory.
fn folders() -> [Scratch; 2] {
    [Scratch::new(), Scratch::beneath("/dev/shm")]
}

fn stage(target: &Path) -> Staged {
    let staged = Staged::create(target, &StageOptions::new()).unwrap();
    staged.storage().write_at(HostOffset::ZERO, b"new").unwrap();
    staged
}

/// Runs `each` as a user without any privilege, in a folder of that user's.
fn as_nobody(each: impl FnOnce(&Scratch) + Send) {
    const NOBODY: u32 = 65_534;
    let scratch = Scratch::new();
    chown(scratch.path(), Some(NOBODY), Some(NOBODY)).unwrap();
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            // These calls change the thread that makes them, not the process.
            let (user, group) = (Uid::from_raw(NOBODY), Gid::from_raw(NOBODY));
            rustix::thread::set_thread_groups(&[]).unwrap();
            rustix::thread::set_thread_res_gid(group, group, group).unwrap();
            rustix::thread::set_thread_res_uid(user, user, user).unwrap();
            each(&scratch);
        });
        thread.join().unwrap();
    });
}

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

#[test]
fn a_new_file_appears_when_it_is_complete() {
    for scratch in folders() {
        for durability in [Durability::None, Durability::Synced] {
            let target = scratch.join("disk");
            let staged = stage(&target);
            assert_eq!(staged.in_place(), None);
            assert!(scratch.names().is_empty(), "nothing a kill could leave behind");
            staged.commit(durability).unwrap();
            assert_eq!(std::fs::read(&target).unwrap(), b"new");
            assert_eq!(scratch.names(), ["disk"]);
            let status = std::fs::read_to_string("/proc/self/status").unwrap();
            let mask = status
                .lines()
                .find_map(|line| line.strip_prefix("Umask:"))
                .unwrap();
            let mask = u32::from_str_radix(mask.trim(), 8).unwrap();
            assert_eq!(mode(&target), 0o644 & !mask);
            std::fs::remove_file(&target).unwrap();
        }
        drop(stage(&scratch.join("disk")));
        assert!(scratch.names().is_empty());
    }
}

#[test]
fn works_where_files_need_a_name() {
    let options = StageOptions {
        named: true,
        ..StageOptions::default()
    };
    for scratch in folders() {
        let target = scratch.join("disk");
        for old in [None, Some(b"old")] {
            if let Some(old) = old {
                std::fs::write(&target, old).unwrap();
            }
            let staged = Staged::create(&target, &options).unwrap();
            let names = scratch.names();
            let part = names.iter().find(|name| *name != "disk").unwrap();
            assert!(part.starts_with(".disk.") && part.ends_with(".part"), "{part}");
            drop(staged);
            assert_eq!(std::fs::read(&target).ok(), old.map(|old| old.to_vec()));
            let staged = Staged::create(&target, &options).unwrap();
            staged.storage().write_at(HostOffset::ZERO, b"new").unwrap();
            staged.commit(Durability::Synced).unwrap();
            assert_eq!(std::fs::read(&target).unwrap(), b"new");
            assert_eq!(scratch.names(), ["disk"]);
        }
        std::fs::remove_file(&target).unwrap();
    }
}

#[test]
fn works_past_the_page_cache() {
    let scratch = Scratch::new();
    let target = scratch.join("disk");
    for cache in [
        CacheMode::None,
        CacheMode::Directsync,
        CacheMode::Writethrough,
        CacheMode::Unsafe,
    ] {
        let staged = Staged::create(&target, &StageOptions::new().cache(cache)).unwrap();
        let direct = staged.storage().hints().align > 1;
        assert_eq!(direct, cache.is_direct());
        staged.storage().write_at(HostOffset::new(1), b"new").unwrap();
        staged.commit(Durability::Synced).unwrap();
        assert_eq!(std::fs::read(&target).unwrap(), b"\0new", "{cache:?}");
    }
}

#[test]
fn an_old_file_stays_until_then_and_its_attributes_after() {
    // Version 2; the owner may write, user 1234 and the group may read.
    let mut access = vec![2, 0, 0, 0];
    for (tag, permissions, id) in [
        (1_u16, 6_u16, u32::MAX),
        (2, 4, 1234),
        (4, 4, u32::MAX),
        (16, 4, u32::MAX),
        (32, 0, u32::MAX),
    ] {
        access.extend(tag.to_le_bytes());
        access.extend(permissions.to_le_bytes());
        access.extend(id.to_le_bytes());
    }
    for scratch in folders() {
        let target = scratch.file("disk", b"the old content");
        chown(&target, Some(1111), Some(2222)).unwrap();
        std::fs::set_permissions(&target, PermissionsExt::from_mode(0o640)).unwrap();
        let long = vec![b'x'; 1000];
        for (name, value) in [
            ("user.note", &b"keep me"[..]),
            ("user.long", &long),
            ("system.posix_acl_access", &access),
        ] {
            rustix::fs::setxattr(&target, name, value, XattrFlags::empty()).unwrap();
        }
        let before = std::fs::metadata(&target).unwrap();
        drop(stage(&target));
        let staged = stage(&target);
        assert_eq!(std::fs::read(&target).unwrap(), b"the old content");
        staged.commit(Durability::Synced).unwrap();
        assert_eq!(std::fs::read(&target).unwrap(), b"new");
        assert_eq!(scratch.names(), ["disk"]);
        let after = std::fs::metadata(&target).unwrap();
        assert_ne!(before.ino(), after.ino());
        assert_eq!((after.uid(), after.gid()), (1111, 2222));
        assert_eq!(before.mode(), after.mode());
        for (name, value) in [
            ("user.note", &b"keep me"[..]),
            ("user.long", &long),
            ("system.posix_acl_access", &access),
        ] {
            let mut found = vec![0; 2000];
            let len = rustix::fs::getxattr(&target, name, &mut found).unwrap();
            assert_eq!(&found[..len], value, "{name}");
        }
    }
}

#[test]
fn links_are_followed_and_stay() {
    for scratch in folders() {
        std::fs::create_dir(scratch.join("real")).unwrap();
        std::fs::create_dir(scratch.join("links")).unwrap();
        symlink("../real/two", scratch.join("links/one")).unwrap();
        symlink(scratch.join("real/disk"), scratch.join("real/two")).unwrap();
        for content in [None, Some(b"old")] {
            let link = scratch.join("links/one");
            assert_eq!(std::fs::read(&link).ok(), content.map(|old| old.to_vec()));
            drop(stage(&link));
            assert_eq!(std::fs::read(&link).ok(), content.map(|old| old.to_vec()));
            stage(&link).commit(Durability::None).unwrap();
            assert_eq!(std::fs::read(scratch.join("real/disk")).unwrap(), b"new");
            assert!(scratch.join("links/one").is_symlink() && scratch.join("real/two").is_symlink());
            std::fs::write(scratch.join("real/disk"), b"old").unwrap();
        }
        symlink("loop", scratch.join("loop")).unwrap();
        let error = Staged::create(scratch.join("loop"), &StageOptions::new()).unwrap_err();
        assert_eq!(error.io_error().unwrap().raw_os_error(), Some(40), "{error:?}");
        symlink("nowhere/disk", scratch.join("astray")).unwrap();
        let error = Staged::create(scratch.join("astray"), &StageOptions::new()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
    }
}

#[test]
fn what_a_rename_would_break_is_written_in_place() {
    let scratch = Scratch::new();
    let target = scratch.file("disk", b"old");
    std::fs::hard_link(&target, scratch.join("other")).unwrap();
    let staged = stage(&target);
    assert_eq!(staged.in_place(), Some(InPlace::HardLinks));
    staged.commit(Durability::Synced).unwrap();
    assert_eq!(std::fs::read(scratch.join("other")).unwrap(), b"new");

    let bound = scratch.file("bound", b"old");
    let point = scratch.file("point", b"");
    let _mount = Mount::new(&point, &["--bind", bound.to_str().unwrap()]);
    let staged = stage(&point);
    assert_eq!(staged.in_place(), Some(InPlace::MountPoint));
    staged.commit(Durability::Synced).unwrap();
    assert_eq!(std::fs::read(&bound).unwrap(), b"new");

    let device = Loop::attach(scratch.hole("device", 1 << 20), 512);
    let staged = Staged::create(device.path(), &StageOptions::new()).unwrap();
    assert_eq!(staged.in_place(), Some(InPlace::Device));
    assert_eq!(staged.storage().len().unwrap(), 1 << 20);
    staged.storage().write_at(HostOffset::ZERO, b"new").unwrap();
    staged.commit(Durability::Synced).unwrap();
    assert_eq!(&std::fs::read(scratch.join("device")).unwrap()[..4], b"new\0");
}

#[test]
fn needs_no_privilege() {
    as_nobody(|scratch| {
        let target = scratch.join("disk");
        for _ in 0..2 {
            stage(&target).commit(Durability::Synced).unwrap();
            assert_eq!(std::fs::read(&target).unwrap(), b"new");
        }
        // A directory that may be written and searched but not read.
        let dark = scratch.join("dark");
        std::fs::create_dir(&dark).unwrap();
        std::fs::set_permissions(&dark, PermissionsExt::from_mode(0o300)).unwrap();
        stage(&dark.join("disk")).commit(Durability::Synced).unwrap();
        assert_eq!(std::fs::read(dark.join("disk")).unwrap(), b"new");
    });
}

#[test]
fn a_file_that_may_not_be_written_is_not_replaced() {
    as_nobody(|scratch| {
        let target = scratch.file("disk", b"old");
        std::fs::set_permissions(&target, PermissionsExt::from_mode(0o444)).unwrap();
        let error = Staged::create(&target, &StageOptions::new()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Denied, "{error:?}");
        assert_eq!(std::fs::read(&target).unwrap(), b"old");
    });
}

#[test]
fn a_directory_that_may_not_be_written_means_in_place() {
    as_nobody(|scratch| {
        let shut = scratch.join("shut");
        std::fs::create_dir(&shut).unwrap();
        let target = shut.join("disk");
        std::fs::write(&target, b"the old content").unwrap();
        std::fs::set_permissions(&shut, PermissionsExt::from_mode(0o500)).unwrap();
        let error = Staged::create(shut.join("another"), &StageOptions::new()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Denied, "{error:?}");
        let staged = stage(&target);
        assert_eq!(staged.in_place(), Some(InPlace::Directory));
        staged.commit(Durability::Synced).unwrap();
        assert_eq!(std::fs::read(&target).unwrap(), b"new");
        std::fs::set_permissions(&shut, PermissionsExt::from_mode(0o700)).unwrap();
    });
}

#[test]
fn somebody_elses_file_is_written_in_place() {
    let outside = Scratch::new();
    let target = outside.file("disk", b"the old content");
    std::fs::set_permissions(&target, PermissionsExt::from_mode(0o666)).unwrap();
    std::fs::set_permissions(outside.path(), PermissionsExt::from_mode(0o777)).unwrap();
    as_nobody(|_| {
        let staged = stage(&target);
        assert_eq!(staged.in_place(), Some(InPlace::Owner));
        staged.commit(Durability::None).unwrap();
    });
    assert_eq!(std::fs::read(&target).unwrap(), b"new");
    assert_eq!(std::fs::metadata(&target).unwrap().uid(), 0);
    assert_eq!(outside.names(), ["disk"]);
}

#[test]
fn what_holds_no_disk_is_refused() {
    let scratch = Scratch::new();
    let fifo = scratch.join("fifo");
    Run::new("mkfifo")
        .arg(&fifo)
        .patience(Duration::from_secs(10))
        .ok();
    for (path, what) in [
        (scratch.path(), "directory"),
        (fifo.as_path(), "fifo"),
        (Path::new("/dev/zero"), "character device"),
    ] {
        let error = Staged::create(path, &StageOptions::new()).unwrap_err();
        assert_eq!(error.find::<NotADisk>().unwrap().what, what);
        for options in [
            FileOptions::read(LockPlan::READ),
            FileOptions::write(LockPlan::WRITE),
        ] {
            let error = File::open(path, &options).unwrap_err();
            assert_eq!(error.find::<NotADisk>().unwrap().what, what);
        }
    }
    for bad in ["missing/disk", "new/", "missing/.."] {
        Staged::create(scratch.join(bad), &StageOptions::new()).unwrap_err();
    }
    assert_eq!(scratch.names(), ["fifo"]);
}

#[test]
fn the_longest_name_works() {
    for scratch in folders() {
        let name = "n".repeat(255);
        let target = scratch.file(&name, b"old");
        stage(&target).commit(Durability::None).unwrap();
        assert_eq!(std::fs::read(&target).unwrap(), b"new");
        assert_eq!(scratch.names(), [name]);
    }
}

#[test]
fn a_full_file_system_leaves_the_old_file() {
    let scratch = Scratch::new();
    let point = scratch.join("small");
    std::fs::create_dir(&point).unwrap();
    let _mount = Mount::new(&point, &["-t", "tmpfs", "-o", "size=256k", "none"]);
    let target = point.join("disk");
    std::fs::write(&target, b"old").unwrap();
    let staged = stage(&target);
    let error = staged
        .storage()
        .write_at(HostOffset::ZERO, &vec![1; 1 << 20])
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace);
    assert_eq!(error.context().path.as_deref(), Some(target.as_path()));
    // What did get in counts.
    let len = staged.storage().len().unwrap();
    assert!(len > 3 && len < 1 << 20, "{len}");
    drop(staged);
    assert_eq!(std::fs::read(&target).unwrap(), b"old");
    std::fs::write(point.join("again"), vec![1; 128 << 10]).unwrap();
}

#[test]
fn a_set_takes_its_names_together() {
    for scratch in folders() {
        let names = ["disk-s001", "disk-s002", "disk"];
        std::fs::write(scratch.join("disk-s001"), b"old").unwrap();
        let set = |scratch: &Scratch| names.map(|name| stage(&scratch.join(name))).into();
        Staged::commit_all(set(&scratch), Durability::Synced).unwrap();
        for name in names {
            assert_eq!(std::fs::read(scratch.join(name)).unwrap(), b"new");
        }
        assert_eq!(scratch.names(), ["disk", "disk-s001", "disk-s002"]);

        // The last one's name is taken by something that cannot be replaced.
        for name in names {
            std::fs::write(scratch.join(name), name).unwrap();
        }
        std::fs::remove_file(scratch.join("disk-s002")).unwrap();
        let set = set(&scratch);
        std::fs::remove_file(scratch.join("disk")).unwrap();
        std::fs::create_dir(scratch.join("disk")).unwrap();
        let error = Staged::commit_all(set, Durability::None).unwrap_err();
        assert_eq!(error.context().path, Some(scratch.join("disk")));
        assert_eq!(std::fs::read(scratch.join("disk-s001")).unwrap(), b"disk-s001");
        assert_eq!(scratch.names(), ["disk", "disk-s001"]);
    }
}

#[test]
fn a_target_that_appears_meanwhile_is_replaced_if_nobody_uses_it() {
    for scratch in folders() {
        let target = scratch.join("disk");
        let staged = stage(&target);
        std::fs::write(&target, b"somebody else's").unwrap();
        staged.commit(Durability::None).unwrap();
        assert_eq!(std::fs::read(&target).unwrap(), b"new");
        assert_eq!(scratch.names(), ["disk"]);
        // And one that goes away is no trouble either.
        let staged = stage(&target);
        std::fs::remove_file(&target).unwrap();
        staged.commit(Durability::None).unwrap();
        assert_eq!(std::fs::read(&target).unwrap(), b"new");
    }
}

#[test]
fn two_at_once_do_not_meet() {
    let scratch = Scratch::new();
    let target = scratch.file("disk", b"old");
    let first = stage(&target);
    let error = Staged::create(&target, &StageOptions::new()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Locked);
    first.commit(Durability::None).unwrap();
    stage(&target).commit(Durability::None).unwrap();
    assert_eq!(scratch.names(), ["disk"]);
}

#[test]
fn a_file_named_by_its_descriptor_is_written_in_place() {
    use std::os::fd::AsRawFd;
    let scratch = Scratch::new();
    let target = scratch.file("disk", b"the old content");
    let open = std::fs::File::open(&target).unwrap();
    for folder in ["/dev/fd", "/proc/self/fd"] {
        let name = format!("{folder}/{}", open.as_raw_fd());
        let staged = stage(Path::new(&name));
        assert_eq!(staged.in_place(), Some(InPlace::OpenFile));
        staged.commit(Durability::None).unwrap();
        assert_eq!(open.metadata().unwrap().len(), 3, "whoever has it open sees it");
    }
    assert_eq!(std::fs::read(&target).unwrap(), b"new");
}

#[test]
fn a_flush_that_fails_leaves_the_old_file() {
    let scratch = Scratch::new();
    let target = scratch.file("disk", b"old");
    let staged = stage(&target);
    staged.file().pretend_sync_failed(Errno::IO);
    let error = staged.commit(Durability::Synced).unwrap_err();
    assert_eq!(error.context().op, Some("sync"));
    assert_eq!(std::fs::read(&target).unwrap(), b"old");
    assert_eq!(scratch.names(), ["disk"]);
}

#[test]
fn a_temporary_file_has_no_name() {
    for scratch in folders() {
        let file = File::temporary(scratch.path()).unwrap();
        file.write_at(HostOffset::new(5), b"x").unwrap();
        assert_eq!(file.len().unwrap(), 6);
        assert!(scratch.names().is_empty());
        let error = File::temporary(scratch.join("missing")).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
    }
}
