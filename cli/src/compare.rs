//! `codecllm compare`: a model beside its compressed forms, partial and whole; or its quantizers beside each other.

mod quantizers;

use crate::experiment::{Baseline, Quality, TextArgs, Trial, Variant, align, check_stopped};
use crate::hub;
use crate::model::{Load, Machine, MachineArgs};
use crate::output::{self, Bar, CliResult, Error, Unit};
use crate::report::{Axis, Plot, Point, Report, Series, Style};
use codecllm_codec::archive::{self, Layers, Status};
use codecllm_codec::{Checkpoint, Cpu};
use codecllm_engine::backend::Backend;
use codecllm_engine::evaluate::GREEDY_PROMPTS;
use codecllm_engine::{GenerateOptions, Generation, Model, Tokenizer, generate};
use serde::Serialize;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

/// Formats and layers where the user names none.
const FORMATS: [&str; 4] = ["bf16", "int8", "fp8", "rate:4.5"];
const LAYERS: [&str; 5] = ["1", "5", "10", "20", "all"];
/// The verdict `near`: up to this divergence and this much more perplexity.
const NEAR_KLD: f64 = 0.1;
const NEAR_PERPLEXITY: f64 = 1.05;
const RULE: &str = "Verdicts. identical: every greedy text is the baseline's, token for token, and the form is near. near: a KL \
                    divergence of at most 0.1 nats per token and a perplexity at most 5 % above the baseline's. broken: \
                    anything else.";

/// Compare a model with its compressed forms: texts, quality, size, speed
///
/// Each format is applied to the first N linear layers and to all matrices; every form is compressed into a temporary
/// directory (TMPDIR says where), proven, loaded and run. Texts are greedy continuations of prompts, and are compared with
/// the model's own token for token.
///
/// With --quantizers, no model is run: the rounding errors of quantizers are compared, overall and by the magnitude of
/// channels.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Directory of a checkpoint, a GGUF file, or a Hugging Face repository id (OWNER/NAME)
    #[arg(value_name = "SRC")]
    source: String,
    /// Formats, with commas: bf16, int8, int8:tensor, fp8, fp8:tensor, rate:BITS, rate:BITS:trellis [default: bf16,int8,fp8,rate:4.5]
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    formats: Vec<Variant>,
    /// How much to compress, with commas: N (the first N linear layers), A..B or all [default: 1,5,10,20,all, as far as the
    /// model has them]
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    layers: Vec<Layers>,
    /// Compare quantizers instead, with commas: tensor and channel (int8 with such scales), fp8, rate (4.5 bits), or a format
    #[arg(long, value_name = "LIST", value_delimiter = ',', conflicts_with_all = ["formats", "text", "prompt"],
          value_parser = quantizers::parse)]
    quantizers: Vec<Variant>,
    /// A prompt; may be given several times [default: ten openings of prose]
    #[arg(short, long, value_name = "TEXT")]
    prompt: Vec<String>,
    /// Tokens of each text
    #[arg(long, value_name = "N", default_value_t = 32)]
    greedy_tokens: usize,
    #[command(flatten)]
    text: TextArgs,
    /// Write a report with plots and texts: one HTML file, readable without a network
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
  codecllm compare ./TinyLlama-1.1B -o report.html
  codecllm compare ./model --formats int8,rate:4.5,rate:3.5 --layers 1,10,all --text wiki.txt --json
  codecllm compare ./model --quantizers tensor,channel,fp8,rate -o quantizers.html";

#[derive(Serialize)]
struct Outcome {
    source: String,
    n_weights: u64,
    /// Predictions are made on so many tokens.
    n_tokens: usize,
    greedy_tokens: usize,
    rule: &'static str,
    baseline: Form,
    forms: Vec<Form>,
}

/// The model or a compressed form of it.
#[derive(Serialize)]
struct Form {
    format: String,
    layers: String,
    /// Matrices that are compressed.
    n_encoded: usize,
    /// The proof's outcome; the model itself needs none.
    proof: Option<Status>,
    /// Of the whole model, everything counted.
    bits_per_weight: f64,
    ratio_bf16: f64,
    /// Of the compressed matrices alone.
    encoded_bits_per_weight: Option<f64>,
    /// Bytes of the weights as they lie in memory.
    weight_bytes: u64,
    load_s: f64,
    generate_tok_per_s: Option<f64>,
    quality: Quality,
    /// Texts that are the baseline's.
    n_identical: usize,
    texts: Vec<Text>,
    verdict: Option<Verdict>,
}

#[derive(Serialize)]
struct Text {
    prompt: String,
    text: String,
    /// The first generated token that is not the baseline's, counted from 0.
    first_difference: Option<usize>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    Identical,
    Near,
    Broken,
}

impl Verdict {
    fn new(quality: &Quality, is_identical: bool) -> Self {
        let Quality { perplexity, baseline_perplexity, kld_mean, .. } = *quality;
        // A NaN is not near.
        match kld_mean <= NEAR_KLD && perplexity <= NEAR_PERPLEXITY * baseline_perplexity {
            true if is_identical => Self::Identical,
            true => Self::Near,
            false => Self::Broken,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Identical => "identical",
            Self::Near => "near",
            Self::Broken => "broken",
        }
    }
}

/// Runs the command.
pub fn run(args: Args) -> CliResult {
    if !args.quantizers.is_empty() {
        return quantizers::run(&args);
    }
    match args.machine.apply()? {
        Machine::Cpu(machine) => run_on(&args, &machine),
        Machine::Cuda(machine) => run_on(&args, &machine),
    }
}

fn run_on(args: &Args, machine: &impl Load) -> CliResult {
    let report = args.report("Compressed forms of")?;
    let source = hub::resolve(&args.source, &args.revision)?;
    let checkpoint = Checkpoint::open(&source)?;
    let layers = args.layers(&checkpoint)?;
    let formats = match args.formats.as_slice() {
        [] => FORMATS.iter().map(|f| f.parse()).collect::<Result<Vec<Variant>, _>>()?,
        formats => formats.to_vec(),
    };
    let tokenizer = Tokenizer::open(&source)?;
    let tokens = args.text.read(&tokenizer)?;
    let prompts: Vec<String> = match args.prompt.as_slice() {
        [] => GREEDY_PROMPTS.iter().map(|p| p.to_string()).collect(),
        prompts => prompts.to_vec(),
    };
    output::catch_ctrl_c()?;

    let n_forms = formats.len() * layers.len();
    eprintln!("[0/{n_forms}] {}", args.source);
    let started = Instant::now();
    let model = machine.load(&source)?;
    let load_s = started.elapsed().as_secs_f64();
    let baseline = Baseline { machine, model, tokens };
    let bench = Bench { args, baseline: &baseline, tokenizer: &tokenizer, prompts: &prompts };
    let own = bench.tell(&baseline.model, &[])?;
    let (stored, n_weights) =
        checkpoint.tensors().iter().fold((0, 0), |(bytes, n), t| (bytes + t.stored_bytes(), n + t.n_elements() as u64));
    let bits = 8.0 * stored as f64 / n_weights.max(1) as f64;
    let first = bench.form(&baseline.model, load_s, &own, Made::itself(bits))?;

    let mut forms = Vec::new();
    for layers in &layers {
        for format in &formats {
            eprintln!("[{}/{n_forms}] {format}, layers {layers}", forms.len() + 1);
            forms.push(bench.try_out(&source, *format, layers, &own)?);
        }
    }
    let outcome = Outcome {
        source: args.source.clone(),
        n_weights,
        n_tokens: baseline.tokens.len(),
        greedy_tokens: args.greedy_tokens,
        rule: RULE,
        baseline: first,
        forms,
    };
    if let Some(report) = report {
        outcome.write(report)?;
    }
    if args.json {
        output::print_json(&outcome)?;
    } else {
        let (headers, rows) = outcome.table();
        output::print(align(&headers, &rows))?;
        output::print(format_args!("\n{RULE}"))?;
    }
    let is_proven = outcome.forms.iter().all(|form| form.proof == Some(Status::Proven));
    Ok(if is_proven { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

impl Args {
    fn report(&self, title: &str) -> Result<Option<Report>, Error> {
        self.output.as_deref().map(|path| Report::new(path, format!("{title} {}", self.source))).transpose()
    }

    /// What to compress; those of the default that the model has.
    fn layers(&self, checkpoint: &Checkpoint) -> Result<Vec<Layers>, Error> {
        let layers = match self.layers.as_slice() {
            [] => {
                let all = LAYERS.iter().map(|l| l.parse::<Layers>()).collect::<Result<Vec<_>, _>>()?;
                all.into_iter().filter(|layers| layers.select(checkpoint).is_ok()).collect()
            }
            layers => layers.to_vec(),
        };
        for layers in &layers {
            layers.select(checkpoint)?;
        }
        Ok(layers)
    }
}

/// What all forms are measured with.
struct Bench<'a, L: Load> {
    args: &'a Args,
    baseline: &'a Baseline<'a, L>,
    tokenizer: &'a Tokenizer,
    prompts: &'a [String],
}

/// How a form came to be.
struct Made {
    format: String,
    layers: String,
    n_encoded: usize,
    proof: Option<Status>,
    model_bits: f64,
    bits: Option<f64>,
}

impl Made {
    fn itself(model_bits: f64) -> Self {
        Self { format: "baseline".into(), layers: "-".into(), n_encoded: 0, proof: None, model_bits, bits: None }
    }
}

/// A text and its tokens.
struct Told {
    text: String,
    tokens: Vec<u32>,
    first_difference: Option<usize>,
    tok_per_s: Option<f64>,
}

impl<L: Load> Bench<'_, L> {
    fn try_out(&self, source: &Path, format: Variant, layers: &Layers, own: &[Told]) -> Result<Form, Error> {
        let trial = Trial::new(source, &format.options(layers))?;
        let cpus: Vec<Cpu> = Cpu::available().collect();
        let proof = archive::verify(&trial.path(), Some(source), &cpus, &Bar::new("verifying", Unit::Bytes))?.status;
        let started = Instant::now();
        let model = self.baseline.machine.load(&trial.path())?;
        let load_s = started.elapsed().as_secs_f64();
        let told = self.tell(&model, own)?;
        let made = Made {
            format: format.to_string(),
            layers: layers.to_string(),
            n_encoded: trial.n_encoded,
            proof: Some(proof),
            model_bits: trial.model_bits,
            bits: Some(trial.bits),
        };
        self.form(&model, load_s, &told, made)
    }

    fn form(&self, model: &Model<L::Backend>, load_s: f64, told: &[Told], made: Made) -> Result<Form, Error> {
        let quality = self.baseline.quality(model)?;
        let n_identical = told.iter().filter(|t| t.first_difference.is_none()).count();
        let mut speeds: Vec<f64> = told.iter().filter_map(|t| t.tok_per_s).collect();
        speeds.sort_by(f64::total_cmp);
        let text = |(prompt, told): (&String, &Told)| Text {
            prompt: prompt.clone(),
            text: told.text.clone(),
            first_difference: told.first_difference,
        };
        Ok(Form {
            ratio_bf16: 16.0 / made.model_bits,
            bits_per_weight: made.model_bits,
            encoded_bits_per_weight: made.bits,
            weight_bytes: model.weight_bytes(),
            load_s,
            generate_tok_per_s: speeds.get(speeds.len() / 2).copied(),
            quality,
            n_identical,
            texts: self.prompts.iter().zip(told).map(text).collect(),
            verdict: made.proof.map(|_| Verdict::new(&quality, n_identical == told.len())),
            format: made.format,
            layers: made.layers,
            n_encoded: made.n_encoded,
            proof: made.proof,
        })
    }

    /// Continues every prompt, past stop tokens; `own` are the baseline's texts.
    fn tell<B: Backend>(&self, model: &Model<B>, own: &[Told]) -> Result<Vec<Told>, Error> {
        let options =
            GenerateOptions { max_tokens: self.args.greedy_tokens, ignore_eos: true, ..GenerateOptions::default() };
        let bar = output::steps_bar("continuing", "prompts", self.prompts.len());
        let mut all = Vec::new();
        for prompt in self.prompts {
            check_stopped()?;
            let tokens = self.tokenizer.encode_prompt(prompt)?;
            let generation: Generation =
                generate(model, self.tokenizer, &tokens, &options, |_| ControlFlow::Continue(()))?;
            let own = own.get(all.len());
            all.push(Told {
                first_difference: own
                    .and_then(|own| own.tokens.iter().zip(&generation.tokens).position(|(a, b)| a != b)),
                tok_per_s: generation.generate_tok_per_s(),
                text: generation.text,
                tokens: generation.tokens,
            });
            bar.inc(1);
        }
        bar.finish_and_clear();
        Ok(all)
    }
}

impl Form {
    /// Where the first of the texts that differ does so.
    fn first_difference(&self) -> String {
        let differs = self.texts.iter().enumerate().filter_map(|(i, t)| Some((t.first_difference?, i)));
        differs.min().map_or("-".into(), |(token, prompt)| format!("token {token} of prompt {}", prompt + 1))
    }

    fn name(&self) -> String {
        match self.proof {
            None => self.format.clone(),
            Some(_) => format!("{}, layers {}", self.format, self.layers),
        }
    }
}

impl Outcome {
    fn table(&self) -> (Vec<&'static str>, Vec<Vec<String>>) {
        let headers = vec![
            "form",
            "matrices",
            "bits/weight",
            "ratio",
            "memory",
            "load s",
            "tok/s",
            "perplexity",
            "KL (nats)",
            "same token",
            "same texts",
            "first difference",
            "proof",
            "verdict",
        ];
        let row = |form: &Form| {
            let Quality { perplexity, kld_mean, top1_equal, .. } = form.quality;
            vec![
                form.name(),
                form.n_encoded.to_string(),
                format!("{:.2}", form.bits_per_weight),
                format!("{:.2}x", form.ratio_bf16),
                output::bytes(form.weight_bytes),
                format!("{:.2}", form.load_s),
                form.generate_tok_per_s.map_or("-".into(), |speed| format!("{speed:.1}")),
                format!("{perplexity:.3}"),
                format!("{kld_mean:.2e}"),
                format!("{:.1} %", 100.0 * top1_equal),
                format!("{}/{}", form.n_identical, form.texts.len()),
                form.first_difference(),
                form.proof
                    .map_or("-", |status| match status {
                        Status::Proven => "proven",
                        Status::Unchecked => "unchecked",
                        Status::Wrong => "wrong",
                    })
                    .into(),
                form.verdict.map_or("-", Verdict::name).into(),
            ]
        };
        (headers, [&self.baseline].into_iter().chain(&self.forms).map(row).collect())
    }

    fn write(&self, mut report: Report) -> Result<(), Error> {
        report.paragraph(&format!(
            "{} weights. Quality on {} tokens; texts are greedy continuations of {} prompts by {} tokens. Bits are of the \
             whole model, all metadata counted; memory is that of the weights.",
            self.n_weights,
            self.n_tokens,
            self.baseline.texts.len(),
            self.greedy_tokens
        ));
        report.paragraph(RULE);
        let (headers, rows) = self.table();
        report.table("Every form beside the model itself", &headers, &rows);
        let formats = self.forms.iter().fold(Vec::new(), |mut all: Vec<&str>, form| {
            if !all.contains(&form.format.as_str()) {
                all.push(&form.format);
            }
            all
        });
        let series = |x: fn(&Form) -> f64, y: fn(&Form) -> f64| {
            let series = formats.iter().map(|format| {
                let mut forms: Vec<&Form> = self.forms.iter().filter(|form| form.format == *format).collect();
                forms.sort_by(|a, b| x(a).total_cmp(&x(b)));
                let points = forms.iter().map(|form| Point {
                    x: x(form),
                    y: y(form),
                    label: format!(
                        "{}: {} matrices, {:.2} bits/weight, KL {:.2e}",
                        form.name(),
                        form.n_encoded,
                        form.bits_per_weight,
                        form.quality.kld_mean
                    ),
                });
                Series { name: format.to_string(), points: points.collect(), style: Style::Line }
            });
            series.collect::<Vec<_>>()
        };
        let axis = |label, is_log| Axis { label, is_log };
        let n_encoded = |form: &Form| form.n_encoded as f64;
        for plot in [
            Plot {
                title: "Divergence as more of the model is compressed",
                x: axis("matrices compressed", false),
                y: axis("KL divergence, nats per token", true),
                series: series(n_encoded, |form| form.quality.kld_mean),
            },
            Plot {
                title: "Divergence against size",
                x: axis("bits per weight of the whole model", false),
                y: axis("KL divergence, nats per token", true),
                series: series(|form| form.bits_per_weight, |form| form.quality.kld_mean),
            },
            Plot {
                title: "Speed as more of the model is compressed",
                x: axis("matrices compressed", false),
                y: axis("tokens per second", false),
                series: series(n_encoded, |form| form.generate_tok_per_s.unwrap_or(f64::NAN)),
            },
        ] {
            report.plot(&plot);
        }
        report.heading("Texts");
        report.paragraph("What differs from the model's own text is marked from its first different character on.");
        for (i, own) in self.baseline.texts.iter().enumerate() {
            report.fold(&format!("{}. {}", i + 1, own.prompt));
            report.text("baseline", &own.text, usize::MAX);
            for form in &self.forms {
                let text = &form.texts[i];
                let n_same = text.text.chars().zip(own.text.chars()).take_while(|(a, b)| a == b).count();
                let name = match text.first_difference {
                    Some(at) => format!("{}: differs from token {at} on", form.name()),
                    None => format!("{}: the same", form.name()),
                };
                report.text(&name, &text.text, n_same);
            }
            report.end_fold();
        }
        report.finish(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verdicts_follow_the_stated_rule() {
        let verdict = |kld_mean: f64, perplexity: f64, is_identical| {
            let quality = Quality { perplexity, baseline_perplexity: 10.0, kld_mean, top1_equal: 1.0 };
            Verdict::new(&quality, is_identical)
        };
        assert_eq!(verdict(0.0, 10.0, true), Verdict::Identical);
        assert_eq!(verdict(0.1, 10.5, false), Verdict::Near);
        assert_eq!(verdict(0.11, 10.0, true), Verdict::Broken);
        assert_eq!(verdict(0.01, 10.6, false), Verdict::Broken);
        assert_eq!(verdict(f64::NAN, f64::NAN, true), Verdict::Broken);
        for number in [format!("{NEAR_KLD}"), format!("{:.0} %", 100.0 * (NEAR_PERPLEXITY - 1.0))] {
            assert!(RULE.contains(&number), "{number}");
        }
    }
}
