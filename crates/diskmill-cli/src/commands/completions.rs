use clap::Args;
use clap_complete::Shell;

use super::{Run, program};
use crate::error::Failure;
use crate::exit::Exit;
use crate::ui::Ui;

/// Print completions for a shell
#[derive(Args, Debug)]
#[command(
    after_help = "For bash: diskmill completions bash > ~/.local/share/bash-completion/completions/diskmill"
)]
pub struct CompletionsArgs {
    /// The shell
    #[arg(value_enum)]
    shell: Shell,
}

impl Run for CompletionsArgs {
    const NAME: &'static str = "completions";

    fn run(self, ui: &Ui) -> Result<Exit, Failure> {
        let mut out = Vec::new();
        clap_complete::generate(self.shell, &mut program(), "diskmill", &mut out);
        ui.print(out)?;
        Ok(Exit::OK)
    }
}
