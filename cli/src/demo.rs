//! `codecllm demo`: the whole story, on a model that the program carries with it.

use crate::model::{Load, Machine, MachineArgs, TALE};
use crate::output::{self, CliResult, Error};
use codecllm_codec::archive::{self, CompressOptions, FileRecord, Layers, PROVENANCE_FILE, Provenance, Silent, Status};
use codecllm_codec::checkpoint::{CONFIG_FILE, Checkpoint, SINGLE_FILE};
use codecllm_codec::quantize::Codes;
use codecllm_codec::{Checks, Cpu, EncodeOptions, EncodedTensor, Format};
use codecllm_engine::backend::Backend;
use codecllm_engine::evaluate::{DEFAULT_WINDOW, GREEDY_PROMPTS, compare_greedy, text_tokens};
use codecllm_engine::{GenerateOptions, Generation, Model, Tokenizer, evaluate, generate};
use safetensors::tensor::TensorView;
use serde::Serialize;
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

/// The archive of tales-5m; `assets/README.md` says where it comes from.
const ARCHIVE: [(&str, &[u8]); 5] = [
    (PROVENANCE_FILE, include_bytes!("../../assets/tales-5m/codecllm.json")),
    (CONFIG_FILE, include_bytes!("../../assets/tales-5m/config.json")),
    (SINGLE_FILE, include_bytes!("../../assets/tales-5m/model.safetensors")),
    ("tokenizer.json", include_bytes!("../../assets/tales-5m/tokenizer.json")),
    ("tokenizer_config.json", include_bytes!("../../assets/tales-5m/tokenizer_config.json")),
];
const PROMPT: &str = GREEDY_PROMPTS[0];
const FORMATS: [Format; 3] = [Format::Bf16, Format::Fp8, Format::Int8];
/// Generated tokens: of the text that is shown and timed, and of each continuation that is compared.
const TEXT_TOKENS: usize = 96;
const GREEDY_TOKENS: usize = 32;

/// See the whole story in under a minute, on a small model that the program carries with it
///
/// Restores a BF16 checkpoint from the lossless archive inside the program, lets it tell a tale, compresses it in every
/// format, proves each archive, and runs the model from the compressed weights: does it tell the same tale?
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Keep the checkpoint and the archives in this directory, to try the other commands on
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,
    #[command(flatten)]
    machine: MachineArgs,
    /// Print a JSON object
    #[arg(long)]
    json: bool,
}

const EXAMPLES: &str = "\
Examples:
  codecllm demo
  codecllm demo --keep demo && codecllm run demo/tales-5m.int8 -p 'The fox said'";

#[derive(Serialize)]
struct Outcome {
    model: &'static str,
    n_weights: u64,
    /// Whether the restored weight file has the hash of the one that the embedded archive was made from.
    is_restored: bool,
    prompt: &'static str,
    /// The checkpoint first, then each format.
    results: Vec<Row>,
    elapsed_s: f64,
}

/// One form of the model.
#[derive(Serialize)]
struct Row {
    name: String,
    /// Of the whole model, everything counted.
    bits_per_weight: f64,
    ratio_bf16: f64,
    /// The proof's outcome; the checkpoint needs none.
    status: Option<Status>,
    text: String,
    perplexity: f64,
    kld_mean: f64,
    top1_equal: f64,
    greedy_identical: usize,
    greedy_prompts: usize,
    generate_tok_per_s: f64,
}

/// Runs the command.
pub fn run(args: Args) -> CliResult {
    match args.machine.apply()? {
        Machine::Cpu(machine) => run_on(&args, &machine),
        Machine::Cuda(machine) => run_on(&args, &machine),
    }
}

fn run_on(args: &Args, machine: &impl Load) -> CliResult {
    output::catch_ctrl_c()?;
    let started = Instant::now();
    let temporary = tempfile::tempdir()?;
    let dir = args.keep.as_deref().unwrap_or(temporary.path());
    let say = |text: &str| if args.json { Ok(()) } else { output::print(text) };

    let embedded = dir.join("tales-5m.embedded");
    let checkpoint = dir.join("tales-5m");
    unpack(&embedded)?;
    restore(&embedded, &checkpoint)?;
    let is_restored = is_original(&embedded, &checkpoint)?;
    let n_weights = Checkpoint::open(&checkpoint)?.tensors().iter().map(|t| t.n_elements() as u64).sum();
    say(&format!(
        "tales-5m, a Llama of {:.1} million weights, is part of this program: {} as a lossless archive.\n\
         Restored to a BF16 checkpoint of {}; its SHA-256 is {}.\n",
        n_weights as f64 / 1e6,
        output::bytes(ARCHIVE.iter().find(|(name, _)| *name == SINGLE_FILE).map_or(0, |(_, data)| data.len() as u64)),
        output::bytes(fs::metadata(checkpoint.join(SINGLE_FILE))?.len()),
        if is_restored { "that of the original" } else { "NOT that of the original" },
    ))?;

    let tokenizer = Tokenizer::open(&checkpoint)?;
    let baseline = Contender { name: "checkpoint", model: machine.load(&checkpoint)? };
    let mut results = vec![baseline.measure(&baseline, &tokenizer, 16.0, None)?];
    say(&format!("From the BF16 weights:\n  {}\n", quote(&results[0].text)))?;
    for format in FORMATS {
        let archive = dir.join(format!("tales-5m.{format}"));
        let encode = EncodeOptions { format, ..EncodeOptions::default() };
        let options = CompressOptions { encode, layers: Layers::All, force: true, ..CompressOptions::default() };
        let summary = archive::compress(&checkpoint, &archive, &options, &Silent)?;
        let cpus: Vec<Cpu> = Cpu::available().collect();
        let proof = archive::verify(&archive, Some(&checkpoint), &cpus, &Silent)?;
        let bits_per_weight = 8.0 * summary.archive_bytes as f64 / summary.n_weights as f64;
        let contender = Contender { name: format.name(), model: machine.load(&archive)? };
        let row = contender.measure(&baseline, &tokenizer, bits_per_weight, Some(proof.status))?;
        let told = match row.text == results[0].text {
            true => "the same text".into(),
            false => format!("\n  {}", quote(&row.text)),
        };
        say(&format!(
            "Compressed to {format}: {}. {}. From the compressed weights: {told}",
            output::bytes(summary.archive_bytes),
            describe(proof.status),
        ))?;
        results.push(row);
        if output::is_stopped() {
            return Err(codecllm_codec::Error::Interrupted.into());
        }
    }

    let is_good = is_restored && results.iter().all(|row| row.status.is_none_or(|status| status == Status::Proven));
    let elapsed_s = started.elapsed().as_secs_f64();
    let outcome = Outcome { model: "tales-5m", n_weights, is_restored, prompt: PROMPT, results, elapsed_s };
    if args.json {
        output::print_json(&outcome)?;
    } else {
        outcome.print_table()?;
        if let Some(dir) = &args.keep {
            output::print(format_args!("\nCheckpoint and archives are in {}.", dir.display()))?;
        }
    }
    Ok(if is_good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn unpack(dir: &Path) -> Result<(), Error> {
    fs::create_dir_all(dir)?;
    for (name, data) in ARCHIVE {
        fs::write(dir.join(name), data)?;
    }
    Ok(())
}

/// Writes the BF16 checkpoint that a lossless archive of one file was made from.
fn restore(archive: &Path, checkpoint: &Path) -> Result<(), Error> {
    let source = Checkpoint::open(archive)?;
    let mut tensors = Vec::new();
    for info in source.tensors() {
        let tensor = source.tensor(&info.name)?;
        if !EncodedTensor::is_encoded(&tensor.data) {
            tensors.push((tensor.name, (tensor.dtype.into(), tensor.shape, tensor.data.to_vec())));
            continue;
        }
        let encoded = EncodedTensor::parse(tensor.data, Checks::Full)?;
        let Codes::U16(codes) = encoded.decode_codes(Cpu::detect())? else {
            return Err(format!("tensor `{}` of the embedded archive is not lossless", tensor.name).into());
        };
        let data = codes.iter().flat_map(|code| code.to_le_bytes()).collect();
        let shape = vec![encoded.n_rows(), encoded.n_cols()];
        tensors.push((tensor.name, (encoded.source_dtype().into(), shape, data)));
    }
    fs::create_dir_all(checkpoint)?;
    let views = tensors
        .iter()
        .map(|(name, (dtype, shape, data))| Ok((name, TensorView::new(*dtype, shape.clone(), data)?)))
        .collect::<Result<Vec<_>, safetensors::SafeTensorError>>()?;
    let metadata = source.shards()[0].metadata.clone().into_iter().collect();
    safetensors::serialize_to_file(views, Some(metadata), &checkpoint.join(SINGLE_FILE))?;

    let mut config: serde_json::Map<_, _> = serde_json::from_slice(&fs::read(archive.join(CONFIG_FILE))?)?;
    config.shift_remove("quantization_config");
    fs::write(checkpoint.join(CONFIG_FILE), serde_json::to_vec_pretty(&config)?)?;
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        fs::copy(archive.join(name), checkpoint.join(name))?;
    }
    Ok(())
}

/// Whether the weights have the hash that the archive noted of its source.
fn is_original(archive: &Path, checkpoint: &Path) -> Result<bool, Error> {
    let noted = Provenance::open(archive)?.source;
    Ok(noted.contains(&FileRecord::of(checkpoint, SINGLE_FILE)?))
}

/// A form of the model, loaded.
struct Contender<'a, B: Backend> {
    name: &'a str,
    model: Model<B>,
}

impl<B: Backend> Contender<'_, B> {
    fn measure(
        &self,
        baseline: &Self,
        tokenizer: &Tokenizer,
        bits_per_weight: f64,
        status: Option<Status>,
    ) -> Result<Row, Error> {
        let go_on = |_| ControlFlow::Continue(());
        let tokens = text_tokens(tokenizer, TALE)?;
        let evaluation = evaluate(&self.model, Some(&baseline.model), &tokens, DEFAULT_WINDOW, go_on)?;
        let comparison = evaluation.comparison.ok_or("the evaluation has no comparison")?;
        let greedy = compare_greedy(&self.model, &baseline.model, tokenizer, GREEDY_TOKENS, go_on)?;
        let generation = self.tell(tokenizer)?;
        Ok(Row {
            name: self.name.into(),
            bits_per_weight,
            ratio_bf16: 16.0 / bits_per_weight,
            status,
            perplexity: evaluation.perplexity,
            kld_mean: comparison.kld_mean,
            top1_equal: comparison.top1_equal,
            greedy_identical: greedy.iter().filter(|g| g.first_difference.is_none()).count(),
            greedy_prompts: greedy.len(),
            generate_tok_per_s: generation.generate_tok_per_s().unwrap_or(0.0),
            text: generation.text,
        })
    }

    fn tell(&self, tokenizer: &Tokenizer) -> Result<Generation, Error> {
        let options = GenerateOptions { max_tokens: TEXT_TOKENS, ..GenerateOptions::default() };
        let prompt = tokenizer.encode_prompt(PROMPT)?;
        Ok(generate(&self.model, tokenizer, &prompt, &options, |_| ControlFlow::Continue(()))?)
    }
}

fn describe(status: Status) -> &'static str {
    match status {
        Status::Proven => "Proven",
        Status::Unchecked => "NOT CHECKED",
        Status::Wrong => "WRONG",
    }
}

/// The prompt and the text after it, as an indented paragraph.
fn quote(text: &str) -> String {
    format!("{PROMPT}{}", text.trim_end()).replace('\n', "\n  ")
}

impl Outcome {
    fn print_table(&self) -> Result<(), Error> {
        output::print(
            "\n            bits/weight   ratio  perplexity  KL (nats)  same token  same texts  tokens/s\n\
             ------------------------------------------------------------------------------------",
        )?;
        for row in &self.results {
            output::print(format_args!(
                "{:<10}  {:>11.2}  {:>5.2}x  {:>10.3}  {:>9.2e}  {:>8.1} %  {:>7} /{:>2}  {:>8.0}",
                row.name,
                row.bits_per_weight,
                row.ratio_bf16,
                row.perplexity,
                row.kld_mean,
                100.0 * row.top1_equal,
                row.greedy_identical,
                row.greedy_prompts,
                row.generate_tok_per_s,
            ))?;
        }
        output::print(format_args!(
            "\nBits are of the whole model, all metadata counted. Perplexity and KL divergence are over a tale of 500 words\n\
             that the model has not seen; same texts: of ten prompts, continued by {GREEDY_TOKENS} tokens. {:.1} s in all.",
            self.elapsed_s
        ))
    }
}
