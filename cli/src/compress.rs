//! `codecllm compress`.

use crate::hub;
use crate::output::{self, Bar, CliResult};
use codecllm_codec::archive::{self, CompressOptions, Layers, RateTarget, Summary, partial_path};
use codecllm_codec::{Coder, EncodeOptions, Error, Format, Prefer, ScaleMode};
use codecllm_engine::evaluate::{DEFAULT_WINDOW, text_tokens};
use codecllm_engine::{LoadOptions, Model, Tokenizer, evaluate};
use serde::Serialize;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

/// Compress a checkpoint into an archive
///
/// Reads a checkpoint in Hugging Face layout, or a GGUF file, and writes a directory of that layout, in which each matrix is
/// compressed: embeddings and output head included, norms and biases as they are. It holds one tensor in memory at a time.
/// The archive grows in DST.partial, and takes its name when it is complete.
///
/// Formats: bf16 keeps every bit of a BF16 checkpoint (about 10.6 bits a weight); fp8 and int8 round each weight to 8 bits
/// with a scale per output channel, and then compress those (about 6.5 to 7 bits a weight); rate chooses the grids that
/// weights are rounded to so that the archive gets the size you ask for.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Directory of a checkpoint, a GGUF file, or a Hugging Face repository id (OWNER/NAME)
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
    /// The text that --kld measures on [default: a short tale that is part of this program]
    #[arg(long, value_name = "FILE", requires = "kld")]
    calibrate: Option<PathBuf>,
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
    /// rate: the mean KL divergence from the source in nats per token, on the text of --calibrate; found by search
    #[arg(long, value_name = "NATS")]
    kld: Option<f64>,
    /// rate: one of four sizes
    #[arg(long)]
    preset: Option<Preset>,
    /// rate: the grids' steps in standard deviations of each matrix's weights, whatever size results
    #[arg(long, value_name = "X")]
    step: Option<f64>,
}

/// Sizes with the quality to expect of them. KL divergences are a 50-million-parameter Llama's on held-out text, in nats per
/// token; larger models lose less.
#[derive(Clone, Copy, clap::ValueEnum)]
enum Preset {
    /// 6.2 bits/weight; a KL divergence of about 0.001
    Best,
    /// 5.2 bits/weight; about 0.005
    High,
    /// 4.5 bits/weight; about 0.012
    Medium,
    /// 3.5 bits/weight; about 0.05
    Small,
}

impl Preset {
    fn bits(self) -> f64 {
        match self {
            Self::Best => 6.2,
            Self::High => 5.2,
            Self::Medium => 4.5,
            Self::Small => 3.5,
        }
    }
}

impl Target {
    /// What the steps are chosen for; for --kld, where its search begins.
    fn get(&self) -> Option<RateTarget> {
        let Self { bits, size, kld, preset, step } = self;
        let bits = bits.or(preset.map(Preset::bits)).or(kld.map(|_| KLD_START_BITS));
        bits.map(RateTarget::Bits).or(size.map(RateTarget::Bytes)).or(step.map(RateTarget::Step))
    }
}

/// Where the search for a KL divergence begins, and when it ends: within 3 % below the target, or after this many archives.
const KLD_START_BITS: f64 = 5.0;
const KLD_TOLERANCE: f64 = 0.03;
const KLD_ARCHIVES: usize = 8;
/// Tokens that a divergence is measured on.
const KLD_TOKENS: usize = 8192;
/// The text that it is measured on where the user gives none.
const CALIBRATION_TEXT: &str = include_str!("../../assets/tale.txt");

/// The bits/weight at which the model's KL divergence from its source is `wanted` or just below.
fn search_kld(
    source: &Path,
    output: &Path,
    options: &CompressOptions,
    wanted: f64,
    text: &str,
) -> Result<f64, output::Error> {
    if !(wanted > 0.0 && wanted.is_finite()) {
        return Err(format!("a KL divergence of {wanted} is no target; give a small positive number, as 0.005").into());
    }
    let load = LoadOptions::default();
    let baseline = Model::load(source, &load)?;
    let tokenizer = Tokenizer::open(source)?;
    let mut tokens = text_tokens(&tokenizer, text)?;
    tokens.truncate(KLD_TOKENS);
    let go_on = |_| if output::is_stopped() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) };
    // Beside the target, where there must be room anyway.
    let parent = output.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let scratch = tempfile::Builder::new().prefix(".codecllm-kld-").tempdir_in(parent)?;
    let archive = scratch.path().join("archive");

    let mut bits = KLD_START_BITS;
    // The finest that is too coarse, and the coarsest that is fine enough.
    let (mut too_few, mut enough) = (None::<f64>, None::<f64>);
    for _ in 0..KLD_ARCHIVES {
        let options = CompressOptions { rate: Some(RateTarget::Bits(bits)), force: true, ..options.clone() };
        let bar = Bar::new("searching");
        archive::compress(source, &archive, &options, &bar)?;
        drop(bar);
        let model = Model::load(&archive, &load)?;
        let evaluation = evaluate(&model, Some(&baseline), &tokens, DEFAULT_WINDOW, go_on)?;
        if output::is_stopped() {
            return Err(Error::Interrupted.into());
        }
        let kld = evaluation.comparison.ok_or("the evaluation has no comparison")?.kld_mean;
        eprintln!("{bits:.3} bits/weight: KL divergence {kld:.3e}");
        if kld <= wanted {
            enough = Some(bits);
            if kld >= wanted * (1.0 - KLD_TOLERANCE) {
                break;
            }
        } else {
            too_few = Some(bits);
        }
        // A bit a weight quarters the divergence; aim at the middle of the tolerance.
        let next = bits + 0.5 * (kld / (wanted * (1.0 - KLD_TOLERANCE / 2.0))).log2();
        bits = match (too_few, enough) {
            (Some(low), Some(high)) if !(low..high).contains(&next) || next == low => (low + high) / 2.0,
            _ => (next * 1e3).round() / 1e3,
        };
    }
    enough.ok_or_else(|| {
        format!("no archive of {KLD_ARCHIVES} came below a KL divergence of {wanted}; ask for less, or use --bits")
            .into()
    })
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
  codecllm compress ./tiny.Q8_0.gguf -o tiny.int8
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
    let mut options = CompressOptions {
        encode: EncodeOptions {
            format: args.format,
            scale: args.scale,
            coder: args.coder,
            prefer: args.prefer,
            step: None,
            params: None,
        },
        rate: args.target.get(),
        layers: args.layers,
        force: args.force,
        resume: args.resume,
    };
    let start = Instant::now();
    if let Some(kld) = args.target.kld {
        let text = match &args.calibrate {
            Some(path) => std::fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?,
            None => CALIBRATION_TEXT.into(),
        };
        options.rate = Some(RateTarget::Bits(search_kld(&source, &args.output, &options, kld, &text)?));
    }
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

#[cfg(test)]
mod tests {
    use super::parse_size;

    #[test]
    fn sizes_are_parsed_or_explained() {
        for (text, bytes) in [("700MB", 700_000_000), ("1.5 GiB", 1_610_612_736), ("4gb", 4_000_000_000), ("12", 12)] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for bad in ["", "GB", "-1GB", "4TB", "4 G B", "nan", "infGB"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }
}
