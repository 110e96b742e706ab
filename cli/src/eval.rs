//! `codecllm eval`.

use crate::hub;
use crate::model::{Load, Machine, MachineArgs, Purpose, describe_memory, read_text};
use crate::output::{self, CliResult};
use codecllm_engine::evaluate::{
    DEFAULT_GREEDY_TOKENS, DEFAULT_WINDOW, Evaluation, GreedyComparison, compare_greedy, text_tokens,
};
use codecllm_engine::{MemoryUse, Tokenizer, evaluate};
use serde::Serialize;
use std::path::PathBuf;
use std::process::ExitCode;

/// Measure a model on a text, and how far it is from a baseline
///
/// Perplexity: the text becomes one sequence of tokens (the token that begins a text, where the tokenizer has one, then
/// the file), cut into windows that run alone; every token of a window but its first is predicted.
///
/// With --baseline, both models run side by side: mean KL divergence KL(baseline || model) in nats per token, share of
/// tokens for which both find the same one the likeliest, and whether greedy continuations of ten fixed prompts are
/// identical.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Directory of an archive or a checkpoint, a GGUF file, or a Hugging Face repository id (OWNER/NAME)
    #[arg(value_name = "MODEL")]
    model: String,
    /// UTF-8 text; documents may be separated by the tokenizer's special token, spelled out
    #[arg(long, value_name = "FILE")]
    text: PathBuf,
    /// The model to compare with, most often the checkpoint that the archive was made from
    #[arg(long, value_name = "SRC")]
    baseline: Option<String>,
    /// Only the first N tokens of the text [default: all]
    #[arg(long, value_name = "N")]
    tokens: Option<usize>,
    /// Tokens of a window
    #[arg(long, value_name = "N", default_value_t = DEFAULT_WINDOW)]
    window: usize,
    /// Tokens of each greedy continuation; 0 leaves the continuations out
    #[arg(long, value_name = "N", default_value_t = DEFAULT_GREEDY_TOKENS)]
    greedy_tokens: usize,
    #[command(flatten)]
    machine: MachineArgs,
    /// Print a JSON object
    #[arg(long)]
    json: bool,
}

const EXAMPLES: &str = "\
Examples:
  codecllm eval tiny.int8 --text wiki.txt --tokens 50000
  codecllm eval tiny.int8 --text wiki.txt --baseline ./TinyLlama-1.1B --json";

#[derive(Serialize)]
struct Outcome {
    /// Predictions: tokens less one a window.
    n_tokens: usize,
    window: usize,
    perplexity: f64,
    baseline_perplexity: Option<f64>,
    /// Nats per token.
    kld_mean: Option<f64>,
    top1_equal: Option<f64>,
    /// How many of the continuations are identical, and of how many.
    greedy_identical: Option<usize>,
    greedy_prompts: Option<usize>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    greedy: Vec<Greedy>,
    /// What the model takes of the GPU's memory, with --vram or --cache.
    gpu_memory: Option<MemoryUse>,
}

#[derive(Serialize)]
struct Greedy {
    prompt: &'static str,
    /// Counted from 0 in the generated tokens; `null` where all are equal.
    first_difference: Option<usize>,
    text: String,
    baseline_text: String,
}

/// Runs the command.
pub fn run(args: Args) -> CliResult {
    match args.machine.apply()? {
        Machine::Cpu(machine) => run_on(&args, &machine),
        Machine::Cuda(machine) => run_on(&args, &machine),
    }
}

fn run_on(args: &Args, machine: &impl Load) -> CliResult {
    let text = read_text(&args.text)?;
    output::catch_ctrl_c()?;
    let load = |name: &str| {
        let dir = hub::resolve(name, hub::DEFAULT_REVISION)?;
        Ok::<_, output::Error>((machine.load_for(&dir, Purpose::evaluation(args.window))?, dir))
    };
    let (model, dir) = load(&args.model)?;
    let tokenizer = Tokenizer::open(&dir)?;
    let baseline = args.baseline.as_ref().map(|name| load(name)).transpose()?.map(|(model, _)| model);
    let mut tokens = text_tokens(&tokenizer, &text)?;
    tokens.truncate(args.tokens.unwrap_or(usize::MAX));

    let bar = output::steps_bar("evaluating", "tokens", tokens.len());
    let evaluation = evaluate(&model, baseline.as_ref(), &tokens, args.window, output::advance(&bar))?;
    bar.finish_and_clear();
    let mut greedy = Vec::new();
    if let Some(baseline) = baseline.as_ref().filter(|_| args.greedy_tokens > 0) {
        let bar = output::steps_bar("continuing", "prompts", codecllm_engine::evaluate::GREEDY_PROMPTS.len());
        greedy = compare_greedy(&model, baseline, &tokenizer, args.greedy_tokens, output::advance(&bar))?;
        bar.finish_and_clear();
    }
    if output::is_stopped() {
        return Err(codecllm_codec::Error::Interrupted.into());
    }

    let outcome = Outcome::new(evaluation, greedy, args.window, model.memory().copied());
    if args.json {
        output::print_json(&outcome)?;
    } else {
        outcome.print()?;
    }
    Ok(ExitCode::SUCCESS)
}

impl Outcome {
    fn new(
        evaluation: Evaluation,
        greedy: Vec<GreedyComparison>,
        window: usize,
        gpu_memory: Option<MemoryUse>,
    ) -> Self {
        let is_identical = |g: &&GreedyComparison| g.first_difference.is_none();
        let comparison = evaluation.comparison;
        Self {
            n_tokens: evaluation.n_tokens,
            window,
            perplexity: evaluation.perplexity,
            baseline_perplexity: comparison.map(|c| c.baseline_perplexity),
            kld_mean: comparison.map(|c| c.kld_mean),
            top1_equal: comparison.map(|c| c.top1_equal),
            greedy_identical: (!greedy.is_empty()).then(|| greedy.iter().filter(is_identical).count()),
            greedy_prompts: (!greedy.is_empty()).then_some(greedy.len()),
            greedy: greedy.into_iter().map(Greedy::from).collect(),
            gpu_memory,
        }
    }

    fn print(&self) -> Result<(), output::Error> {
        output::print(format_args!("perplexity           {:.4}  ({} predictions)", self.perplexity, self.n_tokens))?;
        if let Some(memory) = &self.gpu_memory {
            output::print(format_args!("GPU memory           {}", describe_memory(memory)))?;
        }
        if let (Some(baseline), Some(kld), Some(top1)) = (self.baseline_perplexity, self.kld_mean, self.top1_equal) {
            output::print(format_args!("baseline perplexity  {baseline:.4}"))?;
            output::print(format_args!("mean KL divergence   {kld:.3e} nats per token"))?;
            output::print(format_args!("same likeliest token {:.2} %", 100.0 * top1))?;
        }
        if let (Some(identical), Some(prompts)) = (self.greedy_identical, self.greedy_prompts) {
            output::print(format_args!("identical greedy continuations: {identical} of {prompts}"))?;
        }
        for Greedy { prompt, first_difference, text, baseline_text } in &self.greedy {
            if let Some(at) = first_difference {
                output::print(format_args!("  `{prompt}` first differs at token {at}"))?;
                output::print(format_args!("    model:    {text:?}\n    baseline: {baseline_text:?}"))?;
            }
        }
        Ok(())
    }
}

impl From<GreedyComparison> for Greedy {
    fn from(greedy: GreedyComparison) -> Self {
        let GreedyComparison { prompt, text, baseline_text, first_difference } = greedy;
        Self { prompt, first_difference, text, baseline_text }
    }
}
