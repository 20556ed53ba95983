//! Every help text is a snapshot: a change of the command line is seen in review.

use diskmill_testkit::Scratch;

use crate::{diskmill, ours};

/// Those the real tool has too come first.
const COMMANDS: &[&str] = &[
    "create",
    "info",
    "convert",
    "check",
    "map",
    "measure",
    "compare",
    "resize",
    "commit",
    "rebase",
    "dd",
    "bench",
    "amend",
    "snapshot",
    "bitmap",
    "compact",
    "ova",
    "demo",
    "completions",
    "man",
];

fn shared() -> impl Iterator<Item = &'static str> {
    COMMANDS
        .iter()
        .copied()
        .take_while(|command| *command != "compact")
}

#[test]
fn help_of_diskmill() {
    let scratch = Scratch::new();
    let overview = diskmill(scratch.path()).arg("--help").ok();
    assert_eq!(overview.err(), "");
    insta::assert_snapshot!("diskmill", overview.out());
    for command in COMMANDS.iter().copied() {
        let help = diskmill(scratch.path()).args([command, "--help"]).ok();
        assert_eq!(help.err(), "");
        insta::assert_snapshot!(format!("diskmill-{command}"), help.out());
    }
}

#[test]
fn help_under_the_name_qemu_img() {
    let scratch = Scratch::new();
    insta::assert_snapshot!("qemu-img", ours(scratch.path()).arg("--help").ok().out());
    for command in shared() {
        let help = ours(scratch.path()).args([command, "--help"]).ok();
        insta::assert_snapshot!(format!("qemu-img-{command}"), help.out());
    }
}

/// Scripts find options by their long names in `qemu-img COMMAND --help`: each that the real help names is in ours.
#[test]
fn qemu_img_help_names_all_options_of_the_real_one() {
    let scratch = Scratch::new();
    for command in shared() {
        let names = |text: String| -> Vec<String> {
            text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '-'))
                .filter(|word| word.starts_with("--") && word.len() > 2)
                .map(str::to_owned)
                .collect()
        };
        let our = names(ours(scratch.path()).args([command, "--help"]).ok().out());
        let their = names(crate::theirs(scratch.path()).args([command, "--help"]).ok().out());
        // Its description of --target-image-opts calls --target-format by a name it does not have, and one of --progress
        // lacks a letter.
        let slips = ["--output-format", "--progres"];
        for name in their.iter().filter(|name| !slips.contains(&name.as_str())) {
            assert!(our.contains(name), "{command} --help does not name {name}");
        }
    }
}

#[test]
fn the_overview_lists_the_same_commands_and_our_formats() {
    let scratch = Scratch::new();
    let commands = |text: &str| -> Vec<String> {
        text.lines()
            .filter_map(|line| line.strip_prefix("  ")?.split_once(" - "))
            .map(|(name, _)| name.to_owned())
            .collect()
    };
    let our = ours(scratch.path()).arg("--help").ok().out();
    let their = crate::theirs(scratch.path()).arg("--help").ok().out();
    assert_eq!(commands(&our), commands(&their));
    let formats = our.split("Supported image formats:").nth(1).unwrap();
    for format in ["raw", "qcow2"] {
        assert!(formats.split_whitespace().any(|word| word == format), "{format}");
    }
}

#[test]
fn completions_and_manual_pages_come_from_the_same_definitions() {
    let scratch = Scratch::new();
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let text = diskmill(scratch.path()).args(["completions", shell]).ok().out();
        assert!(text.contains("target-format"), "{shell}");
        assert!(text.contains("compress-level"), "{shell}");
    }
    let page = diskmill(scratch.path()).args(["man", "convert"]).ok().out();
    assert!(page.starts_with(".ie"), "{page}");
    assert!(page.contains("compress\\-level"), "{page}");
    let page = diskmill(scratch.path()).arg("man").ok().out();
    assert!(page.contains("convert"), "{page}");
}
