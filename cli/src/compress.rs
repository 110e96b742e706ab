//! `codecllm compress`.

use crate::hub;
use crate::model::{Load, Machine, MachineArgs, TALE, read_text};
use crate::output::{self, Bar, CliResult, Unit};
use codecllm_codec::archive::{self, CompressOptions, Layers, Progress, RateTarget, Summary, partial_path};
use codecllm_codec::{Coder, EncodeOptions, Error, Format, Prefer, ScaleMode};
use codecllm_engine::calibrate::{DEFAULT_SAMPLES, WINDOW, sample_text};
use codecllm_engine::evaluate::{DEFAULT_WINDOW, text_tokens};
use codecllm_engine::{Tokenizer, calibrate, evaluate};
use serde::Serialize;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;
use tempfile::TempDir;

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
    /// rate: codes of a trellis: 15 to 19 % less squared error at the same size, or 4 % smaller
    ///
    /// Two grids take turns, and which of them a weight is on follows from the codes before it; a search finds the codes of a row together. Up
    /// to 6.3 bits. Compression takes about twice as long, decoding a little longer.
    #[arg(long)]
    trellis: bool,
    /// rate: encode the linear layers for the inputs that they have on a text [without FILE: text that the model writes]
    ///
    /// Runs the model layer by layer and rounds so that the error of its products is small, rather than that of its weights: at equal
    /// size this takes about a quarter off the KL divergence. The text is to resemble what the model was made for; one
    /// that does not can do harm. Without FILE the model writes one itself, at the speed at which it writes.
    #[arg(long, value_name = "FILE", num_args = 0..=1)]
    calibrate: Option<Option<PathBuf>>,
    /// Windows of 512 tokens that are taken of the calibration text, or written
    ///
    /// Time grows with them. A third of the default leaves about a fifth more KL divergence.
    #[arg(long, value_name = "N", default_value_t = DEFAULT_SAMPLES, requires = "calibrate")]
    samples: usize,
    /// What the text that the model writes is drawn with
    #[arg(long, value_name = "N", default_value_t = 0, requires = "calibrate")]
    seed: u64,
    /// The text that --kld measures on [default: a short tale that is part of this program]
    #[arg(long, value_name = "FILE", requires = "kld")]
    kld_text: Option<PathBuf>,
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
    #[command(flatten)]
    machine: MachineArgs,
    /// Print a JSON object
    #[arg(long)]
    json: bool,
}

/// What `--format rate` aims at.
#[derive(clap::Args)]
#[group(multiple = false)]
struct Target {
    /// rate: bits per weight, over the whole model with all metadata counted, as in 4.5
    ///
    /// Beyond about 7.3 bits, where 8-bit codes end, some matrices are kept exact, and the others have what is left.
    #[arg(long, value_name = "B")]
    bits: Option<f64>,
    /// rate: the size of the weight files, as in 4GB or 700MB
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    size: Option<u64>,
    /// rate: the mean KL divergence from the source in nats per token, on the text of --kld-text; found by search, whose
    /// archives are all calibrated with --calibrate
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

/// A model that is to be compressed, on the machine that runs it.
struct Work<'a, L: Load> {
    source: &'a Path,
    output: &'a Path,
    machine: &'a L,
    /// What the linear layers are calibrated on, where they are.
    calibration: Option<Vec<u32>>,
}

impl<L: Load> Work<'_, L> {
    /// A directory beside the target, where there must be room anyway.
    fn scratch(&self) -> Result<TempDir, output::Error> {
        let parent = self.output.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let scratch = tempfile::Builder::new().prefix(".codecllm-").tempdir_in(parent);
        Ok(scratch.map_err(|e| Error::io(parent, e))?)
    }

    /// The tokens of the calibration text, or of what the model writes.
    fn calibration_tokens(&self, text: Option<&Path>, samples: usize, seed: u64) -> Result<Vec<u32>, output::Error> {
        let tokenizer = Tokenizer::open(self.source)?;
        if let Some(path) = text {
            let tokens = text_tokens(&tokenizer, &read_text(path)?)?;
            let windows: Vec<&[u32]> = tokens.chunks(WINDOW).collect();
            let n = samples.min(windows.len());
            return Ok((0..n).flat_map(|i| windows[i * windows.len() / n]).copied().collect());
        }
        let bar = Bar::new("writing text", Unit::Tokens);
        bar.begin((samples * WINDOW) as u64);
        let mut before = 0;
        let go_on = |done: usize| {
            bar.advance((done - before) as u64);
            before = done;
            go_on(done)
        };
        Ok(sample_text(&self.machine.load(self.source)?, &tokenizer, samples, seed, go_on)?)
    }

    /// Makes the archive `output`, calibrated where it is to be.
    fn compress(
        &self,
        output: &Path,
        options: &CompressOptions,
        doing: &'static str,
    ) -> Result<Summary, output::Error> {
        let mut options = options.clone();
        // Holds the calibrated matrices until they are in the archive.
        let scratch;
        if let Some(tokens) = &self.calibration {
            scratch = self.scratch()?;
            let bar = Bar::new("calibrating", Unit::Bytes);
            let (original, mut model) = (self.machine.load(self.source)?, self.machine.load(self.source)?);
            options.calibrated =
                Some(calibrate(&original, &mut model, self.source, &options, tokens, scratch.path(), &bar)?);
        }
        let bar = Bar::new(doing, Unit::Bytes);
        Ok(archive::compress(self.source, output, &options, &bar)?)
    }

    /// The bits/weight at which the model's KL divergence from its source on `text` is `wanted` or just below.
    fn search_kld(&self, options: &CompressOptions, wanted: f64, text: &str) -> Result<f64, output::Error> {
        let baseline = self.machine.load(self.source)?;
        let mut tokens = text_tokens(&Tokenizer::open(self.source)?, text)?;
        tokens.truncate(KLD_TOKENS);
        let scratch = self.scratch()?;
        let archive = scratch.path().join("archive");

        let mut bits = KLD_START_BITS;
        // The finest that is too coarse, and the coarsest that is fine enough.
        let (mut too_few, mut enough) = (None::<f64>, None::<f64>);
        for _ in 0..KLD_ARCHIVES {
            let options = CompressOptions { rate: Some(RateTarget::Bits(bits)), force: true, ..options.clone() };
            self.compress(&archive, &options, "searching")?;
            let model = self.machine.load(&archive)?;
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
}

fn go_on(_: usize) -> ControlFlow<()> {
    if output::is_stopped() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
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
  codecllm compress ./TinyLlama-1.1B -o tiny.4 --format rate --bits 4 --calibrate
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
    calibration: Option<CalibrationCost>,
}

/// What calibration took.
#[derive(Serialize)]
struct CalibrationCost {
    n_tokens: usize,
    /// Whether the model wrote the text.
    is_own_text: bool,
    /// Seconds that reading or writing the text took.
    text_s: f64,
    /// Seconds that the rest took, the archive included.
    encode_s: f64,
}

/// Runs the command.
pub fn run(args: Args) -> CliResult {
    match args.machine.apply()? {
        Machine::Cpu(machine) => run_on(args, &machine),
        Machine::Cuda(machine) => run_on(args, &machine),
    }
}

fn run_on(args: Args, machine: &impl Load) -> CliResult {
    let source = hub::resolve(&args.source, &args.revision)?;
    output::catch_ctrl_c()?;
    let mut options = CompressOptions {
        encode: EncodeOptions {
            format: args.format,
            scale: args.scale,
            coder: args.coder,
            prefer: args.prefer,
            step: None,
            trellis: args.trellis,
            params: None,
        },
        rate: args.target.get(),
        calibrated: None,
        layers: args.layers,
        force: args.force,
        resume: args.resume,
    };
    if args.calibrate.is_some() && args.format != Format::Rate {
        return Err(Error::Parameter(format!(
            "--calibrate goes with --format rate; `{}` rounds each weight by itself",
            args.format
        ))
        .into());
    }
    if args.calibrate.is_some() && options.rate.is_none() {
        return Err(Error::Parameter("format `rate` needs a target: --bits, --size, --preset or --kld".into()).into());
    }
    if let Some(kld) = args.target.kld.filter(|kld| !(*kld > 0.0 && kld.is_finite())) {
        return Err(Error::Parameter(format!(
            "a KL divergence of {kld} is no target; give a small positive number, as 0.005"
        ))
        .into());
    }
    let start = Instant::now();
    if args.calibrate.is_some() {
        // What cannot be done is better known before minutes of calibration than after.
        archive::check(&source, &args.output, &options, &Bar::new("planning", Unit::Bytes))?;
    }
    let mut work = Work { source: &source, output: &args.output, machine, calibration: None };
    if let Some(text) = &args.calibrate {
        work.calibration = Some(work.calibration_tokens(text.as_deref(), args.samples, args.seed)?);
    }
    let text_s = start.elapsed().as_secs_f64();
    if let Some(kld) = args.target.kld {
        let text = args.kld_text.as_deref().map_or_else(|| Ok(TALE.into()), read_text)?;
        options.rate = Some(RateTarget::Bits(work.search_kld(&options, kld, &text)?));
    }
    let summary = work.compress(&args.output, &options, "compressing").inspect_err(|e| {
        let partial = partial_path(&args.output);
        let keeps = matches!(e.downcast_ref(), Some(Error::Io { .. } | Error::Interrupted));
        if keeps && partial.exists() {
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
        calibration: work.calibration.as_ref().map(|tokens| CalibrationCost {
            n_tokens: tokens.len(),
            is_own_text: matches!(args.calibrate, Some(None)),
            text_s,
            encode_s: elapsed_s - text_s,
        }),
        output: args.output.clone(),
        summary,
    };
    if args.json {
        output::print_json(&outcome)?;
    } else {
        let Outcome { output, summary, .. } = &outcome;
        if let Some(CalibrationCost { n_tokens, is_own_text, text_s, encode_s }) = &outcome.calibration {
            let text = if *is_own_text { "that the model wrote" } else { "of the text" };
            output::print(format_args!(
                "calibrated on {n_tokens} tokens {text}: {text_s:.1} s for the text, {encode_s:.1} s to calibrate and encode"
            ))?;
        }
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
