use std::path::PathBuf;

use clap::Args;

use super::Run;
use crate::demo;
use crate::error::Failure;
use crate::exit::Exit;
use crate::ui::Ui;

/// Make a small disk with files on it, convert it through every format, and verify each step
#[derive(Args, Debug)]
pub struct DemoArgs {
    /// Work in this directory and keep what is made (default: a temporary one, removed afterwards)
    #[arg(long, value_name = "DIR", value_hint = clap::ValueHint::DirPath)]
    dir: Option<PathBuf>,
}

impl Run for DemoArgs {
    const NAME: &'static str = "demo";

    fn run(self, ui: &Ui) -> Result<Exit, Failure> {
        demo::run(ui, self.dir.as_deref())?;
        Ok(Exit::OK)
    }
}
