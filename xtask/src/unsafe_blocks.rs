//! The list of unsafe blocks in SECURITY.md, held against the code.

use std::collections::BTreeMap;
use std::path::Path;

use crate::command::Failed;

/// Fails unless SECURITY.md lists every file with unsafe code with the right count, and their sum.
pub fn check(root: &Path) -> Result<(), Failed> {
    let mut found = BTreeMap::new();
    for folder in ["crates", "xtask"] {
        visit(root, &root.join(folder), &mut found)?;
    }
    let text = std::fs::read_to_string(root.join("SECURITY.md"))?;
    let section = text.split("## Unsafe blocks").nth(1).unwrap_or_default();
    let section = section.split("\n## ").next().unwrap_or_default();
    compare(&found, section).map_err(Failed::new)?;
    eprintln!(
        "unsafe blocks: {}, as SECURITY.md lists them",
        found.values().sum::<usize>()
    );
    Ok(())
}

fn compare(found: &BTreeMap<String, usize>, section: &str) -> Result<(), String> {
    let listed: BTreeMap<String, usize> = section.lines().filter_map(row).collect();
    if &listed != found {
        return Err(format!(
            "SECURITY.md, \"Unsafe blocks\": lists {listed:?}, the code has {found:?}"
        ));
    }
    let sum: usize = found.values().sum();
    if section.contains(&format!("**{sum} blocks listed**")) {
        Ok(())
    } else {
        Err(format!(
            "SECURITY.md, \"Unsafe blocks\": does not say **{sum} blocks listed**"
        ))
    }
}

/// `` | `crates/x/src/y.rs` | 3 | what for | `` as path and count.
fn row(line: &str) -> Option<(String, usize)> {
    let mut cells = line.strip_prefix('|')?.split('|').map(str::trim);
    let path = cells.next()?.strip_prefix('`')?.strip_suffix('`')?;
    Some((path.to_owned(), cells.next()?.parse().ok()?))
}

fn visit(root: &Path, dir: &Path, found: &mut BTreeMap<String, usize>) -> Result<(), Failed> {
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            visit(root, &path, found)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let count = count(&std::fs::read_to_string(&path)?);
            if count > 0 {
                let name = path.strip_prefix(root).unwrap_or(&path);
                found.insert(name.to_string_lossy().into_owned(), count);
            }
        }
    }
    Ok(())
}

/// Counts the places where the compiler's checks are off; comments, strings and lint names are not such places.
fn count(source: &str) -> usize {
    let key = "unsafe";
    source
        .lines()
        .map(|line| line.split("//").next().unwrap_or_default())
        .filter(|line| {
            line.match_indices(key).any(|(at, _)| {
                let before = line[..at].chars().next_back();
                let after = line[at + key.len()..].trim_start();
                !before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == '"')
                    && ["{", "fn", "impl", "extern", "trait"]
                        .iter()
                        .any(|next| after.starts_with(next))
            })
        })
        .count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_code_only() {
        let key = "unsafe";
        let source = format!(
            "#![forbid({key}_code)]\n// {key} {{ }}\nlet a = {key} {{ f() }};\n{key} fn g() {{}}\n\"{key} {{\"\n{key}_block {{}}\n"
        );
        assert_eq!(count(&source), 2);
    }

    #[test]
    fn a_wrong_list_is_an_error() {
        let found = BTreeMap::from([("crates/a.rs".to_owned(), 2)]);
        let good = "**2 blocks listed**\n| file | blocks |\n|---|---|\n| `crates/a.rs` | 2 | ioctl |\n";
        assert!(compare(&found, good).is_ok());
        assert!(compare(&found, &good.replace("| 2 |", "| 1 |")).is_err());
        assert!(compare(&found, &good.replace("**2", "**3")).is_err());
        assert!(compare(&BTreeMap::new(), good).is_err());
        assert!(compare(&BTreeMap::new(), "**0 blocks listed**").is_ok());
    }
}
