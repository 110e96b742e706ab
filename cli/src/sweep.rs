//! `codecllm sweep`: the rate-distortion curve of `rate` on a model, among other formats.

mod references;

use crate::experiment::{Baseline, Quality, TextArgs, Trial, Variant, align, check_stopped};
use crate::hub;
use crate::model::{Load, Machine, MachineArgs};
use crate::output::{self, CliResult, Error};
use crate::report::{Axis, Plot, Point, Report, Series, Style};
use codecllm_codec::Checkpoint;
use codecllm_codec::archive::Layers;
use codecllm_engine::{Config, Tokenizer};
use references::{Reference, Rounded};
use serde::Serialize;
use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Draw the rate-distortion curve of a model: quality at each size, against INT8, FP8 and block formats
///
/// Compresses the model as `rate` at each number of bits, and as int8 and fp8, and measures each beside the model itself. The
/// block formats (Q8_0, Q6_K, Q5_K, Q4_K as in GGUF, and INT4 groups) are rounded to and back in memory for comparison, every
/// matrix alike; --gguf measures files that other programs made.
///
/// Bits are those of the compressed matrices, all of their metadata counted: for archives as they lie on the disk, for block formats
/// by their layout.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Directory of a checkpoint, a GGUF file, or a Hugging Face repository id (OWNER/NAME)
    #[arg(value_name = "SRC")]
    source: String,
    /// Bits per weight, from A to B
    #[arg(long, value_name = "A..B", default_value = "2..8", value_parser = parse_range)]
    bits: (f64, f64),
    /// Distance of two points
    #[arg(long, value_name = "BITS", default_value_t = 0.5)]
    step: f64,
    /// The curve is of codes of a trellis, as `compress --trellis` makes them
    #[arg(long)]
    trellis: bool,
    /// Formats of this program to compare with, with commas; `none` for none
    #[arg(long, value_name = "LIST", default_value = "int8,fp8", value_delimiter = ',')]
    formats: Vec<String>,
    /// Block formats to compare with, with commas: q8_0, q6_k, q5_k, q4_k, int4-32, int4-128; `none` for none
    #[arg(long, value_name = "LIST", default_value = "q8_0,q6_k,q5_k,q4_k,int4-32,int4-128", value_delimiter = ',')]
    references: Vec<String>,
    /// A GGUF file of the same model, measured as it is; may be given several times
    #[arg(long, value_name = "FILE")]
    gguf: Vec<PathBuf>,
    /// Which matrices: all, N, A..B, or a regular expression on names (`_proj` for all linear layers of a Llama)
    #[arg(long, default_value = "all", value_name = "LAYERS")]
    layers: Layers,
    #[command(flatten)]
    text: TextArgs,
    /// Write a report with plots: one HTML file, readable without a network
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Revision of a Hugging Face repository
    #[arg(long, default_value = hub::DEFAULT_REVISION)]
    revision: String,
    #[command(flatten)]
    machine: MachineArgs,
    /// Print a JSON object
    #[arg(long)]
    json: bool,
}

const EXAMPLES: &str = "\
Examples:
  codecllm sweep ./model --bits 2..8 -o sweep.html
  codecllm sweep ./model --bits 3..5 --step 0.25 --layers _proj --text wiki.txt --json
  codecllm sweep ./model --bits 2..6 --trellis --formats rate:3,rate:4
  codecllm sweep ./model --references none --gguf model.Q4_K_M.gguf --gguf model.Q6_K.gguf";

/// The points of a sweep are kept to what somebody may wait for.
const MAX_POINTS: f64 = 200.0;

fn parse_range(text: &str) -> Result<(f64, f64), String> {
    let number = |s: &str| s.parse::<f64>().ok().filter(|x| x.is_finite() && *x > 0.0);
    let range = match text.split_once("..") {
        Some((low, high)) => number(low).zip(number(high)),
        None => number(text).map(|x| (x, x)),
    };
    range
        .filter(|(low, high)| low <= high)
        .ok_or_else(|| format!("`{text}`: expected bits per weight, as in 2..8 or 4.5"))
}

#[derive(Serialize)]
struct Outcome {
    source: String,
    layers: String,
    n_weights: u64,
    n_matrices: usize,
    n_tokens: usize,
    baseline_perplexity: f64,
    /// `rate`, by bits.
    curve: Vec<Measured>,
    others: Vec<Other>,
}

/// A form of the model and its quality.
#[derive(Serialize)]
struct Measured {
    name: String,
    /// What it is: `archive`, `reference` or `gguf`.
    kind: &'static str,
    /// Of the compressed matrices.
    bits_per_weight: f64,
    /// Of the whole model.
    model_bits_per_weight: f64,
    #[serde(flatten)]
    quality: Quality,
}

/// A form beside the curve.
#[derive(Serialize)]
struct Other {
    #[serde(flatten)]
    measured: Measured,
    /// Bits at which the curve has the same divergence; none where it lies beyond the curve's ends.
    rate_bits_at_equal_kld: Option<f64>,
    /// The curve's divergence at the same bits, over this one's.
    rate_kld_ratio_at_equal_bits: Option<f64>,
}

/// Runs the command.
pub fn run(args: Args) -> CliResult {
    match args.machine.apply()? {
        Machine::Cpu(machine) => run_on(&args, &machine),
        Machine::Cuda(machine) => run_on(&args, &machine),
    }
}

fn run_on(args: &Args, machine: &impl Load) -> CliResult {
    let (rates, formats, references) = (args.rates()?, args.formats()?, args.references()?);
    let report =
        args.output.as_deref().map(|path| Report::new(path, format!("Rate and distortion of {}", args.source)));
    let report = report.transpose()?;
    let source = hub::resolve(&args.source, &args.revision)?;
    let checkpoint = Checkpoint::open(&source)?;
    let selected = args.layers.select(&checkpoint)?;
    let tokenizer = Tokenizer::open(&source)?;
    let tokens = args.text.read(&tokenizer)?;
    output::catch_ctrl_c()?;
    let sweep = Sweep {
        source: &source,
        checkpoint: &checkpoint,
        selected: &selected,
        layers: &args.layers,
        baseline: Baseline { machine, model: machine.load(&source)?, tokens },
    };
    let n_all = rates.len() + formats.len() + references.len() + args.gguf.len();
    let mut n_done = 0;
    let mut begin = |name: &dyn std::fmt::Display| {
        n_done += 1;
        eprintln!("[{n_done}/{n_all}] {name}");
    };

    let mut curve = Vec::new();
    for variant in &rates {
        begin(variant);
        match sweep.archive(variant) {
            Ok(measured) => curve.push(measured),
            // The range may go beyond what the format can do on this model.
            Err(e) if matches!(e.downcast_ref(), Some(codecllm_codec::Error::Parameter(_))) => {
                eprintln!("note: {variant} is left out: {e}");
            }
            Err(e) => return Err(e),
        }
    }
    curve.sort_by(|a, b| a.bits_per_weight.total_cmp(&b.bits_per_weight));
    let mut others = Vec::new();
    for variant in &formats {
        begin(variant);
        others.push(sweep.archive(variant)?);
    }
    for reference in references {
        begin(&reference.name());
        others.push(sweep.reference(reference)?);
    }
    for path in &args.gguf {
        begin(&path.display());
        others.push(sweep.gguf(path)?);
    }
    let baseline_perplexity = curve.iter().chain(&others).map(|m| m.quality.baseline_perplexity).next();
    let others = others.into_iter().map(|measured| {
        let at = |x: fn(&Measured) -> f64, y: fn(&Measured) -> f64, value: f64| interpolate(&curve, x, y, value);
        let log_kld = |m: &Measured| m.quality.kld_mean.ln();
        let bits = |m: &Measured| m.bits_per_weight;
        let kld = at(bits, log_kld, measured.bits_per_weight).map(f64::exp);
        Other {
            rate_bits_at_equal_kld: at(log_kld, bits, measured.quality.kld_mean.ln()),
            rate_kld_ratio_at_equal_bits: kld.map(|kld| kld / measured.quality.kld_mean),
            measured,
        }
    });
    let outcome = Outcome {
        source: args.source.clone(),
        layers: args.layers.to_string(),
        n_weights: checkpoint.tensors().iter().map(|t| t.n_elements() as u64).sum(),
        n_matrices: selected.len(),
        n_tokens: sweep.baseline.tokens.len(),
        baseline_perplexity: baseline_perplexity.ok_or("there is nothing to measure; widen --bits")?,
        others: others.collect(),
        curve,
    };
    if let Some(report) = report {
        outcome.write(report)?;
    }
    if args.json {
        output::print_json(&outcome)?;
    } else {
        let (headers, rows) = outcome.table();
        output::print(align(&headers, &rows))?;
        output::print(format_args!("\nperplexity of the model itself: {:.4}", outcome.baseline_perplexity))?;
    }
    Ok(ExitCode::SUCCESS)
}

impl Args {
    fn rates(&self) -> Result<Vec<Variant>, Error> {
        let (low, high) = self.bits;
        let n = (high - low) / self.step;
        if !(self.step > 0.0 && n < MAX_POINTS) {
            let problem = format!("--step {} makes {n:.0} points from {low} to {high}; take a larger one", self.step);
            return Err(codecllm_codec::Error::Parameter(problem).into());
        }
        // So that 2..8 by 0.1 ends at 8, whatever the rounding.
        let points = (0..=(n + 1e-9) as usize).map(|i| ((low + self.step * i as f64) * 1e6).round() / 1e6);
        points.map(|bits| Ok(Variant { trellis: self.trellis, ..format!("rate:{bits}").parse()? })).collect()
    }

    fn formats(&self) -> Result<Vec<Variant>, Error> {
        let named = self.formats.iter().filter(|name| *name != "none");
        named.map(|name| name.parse().map_err(|e: String| codecllm_codec::Error::Parameter(e).into())).collect()
    }

    fn references(&self) -> Result<Vec<Reference>, Error> {
        let named = self.references.iter().filter(|name| *name != "none");
        named
            .map(|name| {
                clap::ValueEnum::from_str(name, true).map_err(|_| {
                    let problem =
                        format!("unknown block format `{name}`; expected q8_0, q6_k, q5_k, q4_k, int4-32 or int4-128");
                    codecllm_codec::Error::Parameter(problem).into()
                })
            })
            .collect()
    }
}

struct Sweep<'a, L: Load> {
    source: &'a Path,
    checkpoint: &'a Checkpoint,
    selected: &'a HashSet<&'a str>,
    layers: &'a Layers,
    baseline: Baseline<'a, L>,
}

impl<L: Load> Sweep<'_, L> {
    fn archive(&self, variant: &Variant) -> Result<Measured, Error> {
        check_stopped()?;
        let trial = Trial::new(self.source, &variant.options(self.layers))?;
        let model = self.baseline.machine.load(&trial.path())?;
        Ok(Measured {
            name: variant.to_string(),
            kind: "archive",
            bits_per_weight: trial.bits,
            model_bits_per_weight: trial.model_bits,
            quality: self.baseline.quality(&model)?,
        })
    }

    fn reference(&self, reference: Reference) -> Result<Measured, Error> {
        check_stopped()?;
        let rounded = Rounded { source: self.checkpoint, selected: self.selected, reference };
        let model = self.baseline.machine.load_source(Config::open(self.source)?, &rounded)?;
        let (mut bits, mut kept, mut n, mut n_all) = (0, 0, 0, 0);
        for tensor in self.checkpoint.tensors() {
            n_all += tensor.n_elements();
            if self.selected.contains(tensor.name.as_str()) {
                bits += tensor.shape[0] * reference.row_bits(tensor.shape[1]);
                n += tensor.n_elements();
            } else {
                kept += 8 * tensor.n_bytes;
            }
        }
        Ok(Measured {
            name: reference.name().into(),
            kind: "reference",
            bits_per_weight: bits as f64 / n as f64,
            model_bits_per_weight: (bits + kept) as f64 / n_all as f64,
            quality: self.baseline.quality(&model)?,
        })
    }

    fn gguf(&self, path: &Path) -> Result<Measured, Error> {
        check_stopped()?;
        let checkpoint = Checkpoint::open(path)?;
        let model = self.baseline.machine.load(path)?;
        let bits = |is_counted: &dyn Fn(&str) -> bool| {
            let tensors = checkpoint.tensors().iter().filter(|t| is_counted(&t.name));
            let (bytes, n) = tensors.fold((0, 0), |(bytes, n), t| (bytes + t.stored_bytes(), n + t.n_elements()));
            8.0 * bytes as f64 / n.max(1) as f64
        };
        Ok(Measured {
            name: path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            kind: "gguf",
            bits_per_weight: bits(&|name| self.selected.contains(name)),
            model_bits_per_weight: bits(&|_| true),
            quality: self.baseline.quality(&model)?,
        })
    }
}

/// The curve's y where its x is `value`: linear between the two points beside it.
fn interpolate(
    curve: &[Measured],
    x: impl Fn(&Measured) -> f64,
    y: impl Fn(&Measured) -> f64,
    value: f64,
) -> Option<f64> {
    curve.windows(2).find_map(|pair| {
        let ((x0, y0), (x1, y1)) = ((x(&pair[0]), y(&pair[0])), (x(&pair[1]), y(&pair[1])));
        let is_between = (x0.min(x1)..=x0.max(x1)).contains(&value) && x0 != x1;
        is_between.then(|| y0 + (y1 - y0) * (value - x0) / (x1 - x0))
    })
}

impl Outcome {
    fn table(&self) -> (Vec<&'static str>, Vec<Vec<String>>) {
        let headers = vec![
            "form",
            "bits/weight",
            "whole model",
            "perplexity",
            "KL (nats)",
            "same token",
            "rate at equal KL",
            "KL of rate at equal bits",
        ];
        let row = |m: &Measured, other: Option<&Other>| {
            let equal = other.and_then(|o| o.rate_bits_at_equal_kld);
            let ratio = other.and_then(|o| o.rate_kld_ratio_at_equal_bits);
            vec![
                m.name.clone(),
                format!("{:.3}", m.bits_per_weight),
                format!("{:.3}", m.model_bits_per_weight),
                format!("{:.3}", m.quality.perplexity),
                format!("{:.2e}", m.quality.kld_mean),
                format!("{:.1} %", 100.0 * m.quality.top1_equal),
                equal.map_or(String::new(), |bits| format!("{bits:.2} ({:+.2})", bits - m.bits_per_weight)),
                ratio.map_or(String::new(), |ratio| format!("{ratio:.2}x")),
            ]
        };
        let curve = self.curve.iter().map(|m| row(m, None));
        (headers, curve.chain(self.others.iter().map(|o| row(&o.measured, Some(o)))).collect())
    }

    fn write(&self, mut report: Report) -> Result<(), Error> {
        report.paragraph(&format!(
            "{} weights; {} matrices are compressed (layers: {}), all else stays as it is. Quality on {} tokens, beside the model itself \
             (perplexity {:.4}).",
            self.n_weights, self.n_matrices, self.layers, self.n_tokens, self.baseline_perplexity
        ));
        report.paragraph(
            "Bits are those of the compressed matrices, all of their metadata counted: for archives as they lie on the disk, for \
             block formats by their layout. Block formats are rounded to and back in memory, every matrix alike, without an \
             importance matrix; GGUF files are measured as they are. \u{201c}Rate at equal KL\u{201d} is where the curve of `rate` has the same \
             divergence, and how many bits lie between.",
        );
        let (headers, rows) = self.table();
        report.table("The curve of rate, and other formats", &headers, &rows);
        type Value = fn(&Measured) -> f64;
        let plots: [(&str, &str, bool, Value); 3] = [
            ("Divergence against size", "KL divergence, nats per token", true, |m| m.quality.kld_mean),
            ("Other likeliest token against size", "predictions with another likeliest token, %", true, |m| {
                100.0 * (1.0 - m.quality.top1_equal)
            }),
            ("Perplexity against size", "perplexity", true, |m| m.quality.perplexity),
        ];
        for (title, label, is_log, value) in plots {
            let point = |m: &Measured| Point { x: m.bits_per_weight, y: value(m), label: m.name.clone() };
            let mut series = vec![Series {
                name: "rate".into(),
                points: self.curve.iter().map(point).collect(),
                style: Style::Line,
            }];
            for (kind, name) in
                [("archive", "int8 and fp8, entropy-coded"), ("reference", "block formats"), ("gguf", "GGUF files")]
            {
                let of_kind = self.others.iter().map(|o| &o.measured).filter(|m| m.kind == kind);
                let points: Vec<Point> = of_kind.map(point).collect();
                if !points.is_empty() {
                    series.push(Series { name: name.into(), points, style: Style::Labelled });
                }
            }
            report.plot(&Plot {
                title,
                x: Axis { label: "bits per weight", is_log: false },
                y: Axis { label, is_log },
                series,
            });
        }
        report.finish(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_parsed_or_explained() {
        assert_eq!(parse_range("2..8"), Ok((2.0, 8.0)));
        assert_eq!(parse_range("4.5"), Ok((4.5, 4.5)));
        for bad in ["8..2", "a..b", "0..4", "", "2..inf"] {
            assert!(parse_range(bad).unwrap_err().contains("2..8"), "{bad}");
        }
    }

    #[test]
    fn the_curve_is_read_between_its_points_only() {
        let at = |bits: f64, kld_mean: f64| {
            let quality = Quality { perplexity: 1.0, baseline_perplexity: 1.0, kld_mean, top1_equal: 1.0 };
            Measured {
                name: String::new(),
                kind: "archive",
                bits_per_weight: bits,
                model_bits_per_weight: bits,
                quality,
            }
        };
        let curve = [at(2.0, 0.16), at(3.0, 0.04), at(4.0, 0.01)];
        let bits = |kld: f64| interpolate(&curve, |m| m.quality.kld_mean.ln(), |m| m.bits_per_weight, kld.ln());
        assert!((bits(0.02).unwrap() - 3.5).abs() < 1e-9);
        assert_eq!(bits(0.001), None);
        assert_eq!(bits(0.2), None);
    }
}
