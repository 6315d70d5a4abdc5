//! The volfs program: parse, pick, exit code.

use std::process::ExitCode;

use volfs::config::{Cli, Subcommand};
use volfs::{check, demo, start, upgrade};

fn main() -> ExitCode {
    let (cli, config) = Cli::from_process();
    let outcome = match cli.command {
        Subcommand::Mount { background: true, background_child: false, .. } => start::background(&config),
        Subcommand::Mount { kept: true, .. } => start::kept(&config),
        Subcommand::Mount { no_keeper: true, background_child, .. } => start::mount(&config, background_child),
        Subcommand::Mount { background_child, .. } => start::keep(&config, background_child),
        Subcommand::Upgrade { .. } => upgrade::run(&config),
        Subcommand::Unmount { .. } => start::unmount(&config),
        Subcommand::Demo => demo::run(),
        Subcommand::Check { .. } => check::run(&config),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => {
            eprintln!("volfs: {problem}");
            ExitCode::FAILURE
        }
    }
}
