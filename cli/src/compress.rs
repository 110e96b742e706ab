//! `codecllm compress`.

use crate::hub;
use crate::output::{self, Bar, CliResult};
use codecllm_codec::archive::{self, CompressOptions, Layers, Summary, partial_path};
use codecllm_codec::{Coder, EncodeOptions, Error, Format, Prefer, ScaleMode};
use serde::Serialize;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

/// Compress a checkpoint into an archive
///
/// Reads a checkpoint in Hugging Face layout and writes a directory of the same layout, in which each matrix is
/// compressed: embeddings and output head included, norms and biases as they are. It holds one tensor in memory at a time.
/// The archive grows in DST.partial, and takes its name when it is complete.
///
/// Formats: bf16 keeps every bit of a BF16 checkpoint (about 10.6 bits a weight); fp8 and int8 round each weight to 8 bits
/// with a scale per output channel, and then compress those (about 6.5 to 7 bits a weight).
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Directory of a checkpoint, or a Hugging Face repository id (OWNER/NAME)
    #[arg(value_name = "SRC")]
    source: String,
    /// Directory to write the archive to
    #[arg(short, long, value_name = "DST")]
    output: PathBuf,
    /// Number format: bf16 (lossless), fp8 or int8
    #[arg(long, default_value = "int8")]
    format: Format,
    /// What shares a scale: channel (an output row) or tensor (for comparison)
    #[arg(long, default_value = "channel")]
    scale: ScaleMode,
    /// Entropy coder: rans, or zstd (for comparison and interoperation)
    #[arg(long, default_value = "rans")]
    coder: Coder,
    /// What to favour: size, speed (of decoding), or balanced
    #[arg(long, default_value = "balanced")]
    prefer: Prefer,
    /// Which matrices: all; N, the first N linear layers; A..B, linear layers A to B-1; or a regular expression on names
    ///
    /// Linear layers are all matrices but embeddings and output head, counted from 0 by layer, then along the forward
    /// pass (q, k, v, o, gate, up, down).
    #[arg(long, default_value = "all", value_name = "LAYERS")]
    layers: Layers,
    /// Continue an interrupted run: take over the shards that it finished from the same source with the same options
    #[arg(long)]
    resume: bool,
    /// Replace an archive that exists, once the new one is complete
    #[arg(long)]
    force: bool,
    /// Revision of a Hugging Face repository: a branch, tag or commit
    #[arg(long, default_value = hub::DEFAULT_REVISION)]
    revision: String,
    /// Threads [default: every core]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Print a JSON object
    #[arg(long)]
    json: bool,
}

const EXAMPLES: &str = "\
Examples:
  codecllm compress ./Llama-3.2-1B -o llama.bf16 --format bf16
  codecllm compress TinyLlama/TinyLlama-1.1B-Chat-v1.0 -o tiny.int8
  codecllm compress ./model -o first5 --layers 5     (an experiment: five linear layers)
  codecllm compress ./model -o mlp --layers '\\.mlp\\.'";

#[derive(Serialize)]
struct Outcome {
    output: PathBuf,
    #[serde(flatten)]
    summary: Summary,
    bits_per_weight: f64,
    ratio_bf16: f64,
    elapsed_s: f64,
    source_bytes_per_s: f64,
}

/// Runs the command.
pub fn run(args: Args) -> CliResult {
    output::set_threads(args.threads)?;
    let source = hub::resolve(&args.source, &args.revision)?;
    output::catch_ctrl_c()?;
    let options = CompressOptions {
        encode: EncodeOptions { format: args.format, scale: args.scale, coder: args.coder, prefer: args.prefer },
        layers: args.layers,
        force: args.force,
        resume: args.resume,
    };
    let start = Instant::now();
    let bar = Bar::new("compressing");
    let result = archive::compress(&source, &args.output, &options, &bar);
    drop(bar);
    let summary = result.inspect_err(|e| {
        let partial = partial_path(&args.output);
        if matches!(e, Error::Io { .. } | Error::Interrupted) && partial.exists() {
            eprintln!(
                "note: {} keeps the finished shards; the same command with --resume continues",
                partial.display()
            );
        }
    })?;

    let elapsed_s = start.elapsed().as_secs_f64();
    let bits_per_weight = 8.0 * summary.archive_bytes as f64 / summary.n_weights.max(1) as f64;
    let outcome = Outcome {
        bits_per_weight,
        ratio_bf16: 16.0 / bits_per_weight,
        elapsed_s,
        source_bytes_per_s: summary.source_bytes as f64 / elapsed_s,
        output: args.output,
        summary,
    };
    if args.json {
        output::print_json(&outcome)?;
    } else {
        let Outcome { output, summary, .. } = &outcome;
        output::print(format_args!(
            "{}: {} of {} tensors encoded as {}, {} -> {} in {elapsed_s:.1} s ({}/s)\n\
             {:.2} bits/weight over all {} weights, {:.3} times smaller than BF16\n\
             prove it with: codecllm verify {} --source {}",
            output.display(),
            summary.n_encoded,
            summary.n_tensors,
            args.format,
            output::bytes(summary.source_bytes),
            output::bytes(summary.archive_bytes),
            output::bytes(outcome.source_bytes_per_s as u64),
            outcome.bits_per_weight,
            summary.n_weights,
            outcome.ratio_bf16,
            output.display(),
            args.source
        ))?;
    }
    Ok(ExitCode::SUCCESS)
}
