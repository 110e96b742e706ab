//! `codecllm compress`.

use crate::hub;
use crate::output::{self, Bar, CliResult};
use codecllm_codec::archive::{self, CompressOptions, Layers, RateTarget, Summary, partial_path};
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
/// with a scale per output channel, and then compress those (about 6.5 to 7 bits a weight); rate chooses the grids that
/// weights are rounded to so that the archive gets the size you ask for.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Directory of a checkpoint, or a Hugging Face repository id (OWNER/NAME)
    #[arg(value_name = "SRC")]
    source: String,
    /// Directory to write the archive to
    #[arg(short, long, value_name = "DST")]
    output: PathBuf,
    /// Number format: bf16 (lossless), fp8, int8, or rate (to a size that you choose)
    #[arg(long, default_value = "int8")]
    format: Format,
    #[command(flatten)]
    target: Target,
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

/// What `--format rate` aims at.
#[derive(clap::Args)]
#[group(multiple = false)]
struct Target {
    /// rate: bits per weight, over the whole model with all metadata counted, as in 4.5
    #[arg(long, value_name = "B")]
    bits: Option<f64>,
    /// rate: the size of the weight files, as in 4GB or 700MB
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    size: Option<u64>,
    /// rate: the grids' steps in standard deviations of each matrix's weights, whatever size results
    #[arg(long, value_name = "X")]
    step: Option<f64>,
}

impl Target {
    fn get(&self) -> Option<RateTarget> {
        let Self { bits, size, step } = self;
        bits.map(RateTarget::Bits).or(size.map(RateTarget::Bytes)).or(step.map(RateTarget::Step))
    }
}

/// A number of bytes: `4GB`, `1.5 GiB`, `700MB`, or a plain number.
fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic()).trim_end();
    let unit = match text[digits.len()..].trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "kb" => 1e3,
        "mb" => 1e6,
        "gb" => 1e9,
        "kib" => 1024.0,
        "mib" => 1024.0 * 1024.0,
        "gib" => 1024.0 * 1024.0 * 1024.0,
        other => return Err(format!("unknown unit `{other}`; expected B, kB, MB, GB, KiB, MiB or GiB")),
    };
    match digits.parse::<f64>() {
        Ok(number) if number > 0.0 && number.is_finite() => Ok((number * unit) as u64),
        _ => Err(format!("`{digits}` is not a size; try 700MB or 4GB")),
    }
}

const EXAMPLES: &str = "\
Examples:
  codecllm compress ./Llama-3.2-1B -o llama.bf16 --format bf16
  codecllm compress TinyLlama/TinyLlama-1.1B-Chat-v1.0 -o tiny.int8
  codecllm compress ./TinyLlama-1.1B -o tiny.4.5 --format rate --bits 4.5
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
        encode: EncodeOptions {
            format: args.format,
            scale: args.scale,
            coder: args.coder,
            prefer: args.prefer,
            step: None,
        },
        rate: args.target.get(),
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
