use clap::Args;
use clap_mangen::Man;

use super::{Run, find, program};
use crate::error::Failure;
use crate::exit::Exit;
use crate::ui::Ui;

/// Print the manual page, of diskmill or of one command
#[derive(Args, Debug)]
#[command(after_help = "To read it at once: diskmill man convert | man -l -")]
pub struct ManArgs {
    /// The command; all of diskmill if left out
    command: Option<String>,
}

impl Run for ManArgs {
    const NAME: &'static str = "man";

    fn run(self, ui: &Ui) -> Result<Exit, Failure> {
        let page = match self.command.as_deref() {
            None => Man::new(program()),
            Some(name) => {
                let command = find(name)
                    .ok_or_else(|| Failure::usage(format!("there is no command '{name}'")))?
                    .definition()
                    .bin_name(format!("diskmill {name}"))
                    .version(env!("CARGO_PKG_VERSION"));
                Man::new(command).title(format!("diskmill-{name}"))
            }
        };
        let mut out = Vec::new();
        page.render(&mut out).map_err(diskmill_core::Error::from)?;
        ui.print(out)?;
        Ok(Exit::OK)
    }
}
