//! `codecllm`: compresses a language model, proves the result, runs it from the compressed weights.

mod bench;
mod compare;
mod compress;
mod demo;
mod eval;
mod experiment;
mod hub;
mod inspect;
mod model;
mod output;
mod report;
mod run;
mod sweep;
mod verify;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Compress a language model, prove it, run it from the compressed weights
///
/// A model is a directory in Hugging Face layout: config.json, a tokenizer and safetensors. An archive is one too, with
/// the matrices in compressed form.
#[derive(Parser)]
#[command(version, arg_required_else_help = true, after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Examples:
  codecllm demo                                       see it all on a small model that is part of this program
  codecllm compress ./TinyLlama-1.1B -o tiny.int8     compress a checkpoint to int8
  codecllm verify tiny.int8 --source ./TinyLlama-1.1B prove that it holds what it should
  codecllm inspect tiny.int8                          see where its bytes go
  codecllm run tiny.int8 -p 'Once upon a time'        run it from the compressed weights

Exit codes: 0 success, 1 failure, 2 usage error or could not check, 130 interrupted";

#[derive(Subcommand)]
enum Command {
    Compress(compress::Args),
    Verify(verify::Args),
    Inspect(inspect::Args),
    Run(run::Args),
    Eval(eval::Args),
    Compare(compare::Args),
    Sweep(sweep::Args),
    Bench(bench::Args),
    Demo(demo::Args),
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Compress(args) => compress::run(args),
        Command::Verify(args) => verify::run(args),
        Command::Inspect(args) => inspect::run(args),
        Command::Run(args) => run::run(args),
        Command::Eval(args) => eval::run(args),
        Command::Compare(args) => compare::run(args),
        Command::Sweep(args) => sweep::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Demo(args) => demo::run(args),
    };
    result.unwrap_or_else(|e| output::fail(e.as_ref()))
}
