//! `codecllm run`.

use crate::hub;
use crate::model::{self, Load, Machine, MachineArgs, Purpose};
use crate::output::{self, CliResult, Error, INTERRUPTED};
use codecllm_engine::backend::Backend;
use codecllm_engine::{
    ChatTemplate, Finish, GenerateOptions, Generation, Logits, MemoryUse, Message, Model, SamplingOptions, Tokenizer,
    generate,
};
use serde::Serialize;
use std::io::{self, Read, Write};
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::process::ExitCode;

/// Continue a text, or answer in a chat, straight from the compressed weights
///
/// Runs an archive or a plain checkpoint. The text goes to standard output as it comes; speed and memory follow on
/// standard error. Without sampling flags the likeliest token is taken each time, so that the same prompt always gives
/// the same text: compare an archive with its source that way.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Directory of an archive or a checkpoint, a GGUF file, or a Hugging Face repository id (OWNER/NAME)
    #[arg(value_name = "MODEL")]
    model: String,
    /// The text to continue, or with --chat the message to answer
    #[arg(short, long, value_name = "TEXT", required_unless_present = "file")]
    prompt: Option<String>,
    /// Read the prompt from a file; `-` is standard input
    #[arg(long, value_name = "FILE", conflicts_with = "prompt")]
    file: Option<PathBuf>,
    /// The most tokens to generate
    #[arg(short = 'n', long, value_name = "N", default_value_t = 128)]
    max_tokens: usize,
    /// Put the prompt into the model's chat template
    #[arg(long)]
    chat: bool,
    /// What the model is told before the chat begins
    #[arg(long, value_name = "TEXT", requires = "chat")]
    system: Option<String>,
    /// Stop before the text contains this; may be given several times
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// Go on past the model's own stop tokens
    #[arg(long)]
    ignore_eos: bool,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    machine: MachineArgs,
    /// Print a JSON object, once the text is complete
    #[arg(long)]
    json: bool,
}

#[derive(clap::Args)]
#[command(next_help_heading = "Sampling")]
struct SamplingArgs {
    /// 0 takes the likeliest token; 1 draws by the model's probabilities, less sharpens them, more flattens them
    #[arg(long, value_name = "T", default_value_t = 0.0)]
    temperature: f32,
    /// Draw from the K likeliest tokens only; 0 is off
    #[arg(long, value_name = "K", default_value_t = 0)]
    top_k: usize,
    /// Draw from the likeliest tokens that together have this probability; 1 is off
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    top_p: f32,
    /// Draw from tokens at least this fraction as likely as the likeliest; 0 is off
    #[arg(long, value_name = "P", default_value_t = 0.0)]
    min_p: f32,
    /// Make tokens that have occurred less likely; 1 is off, 1.1 is usual
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    repetition_penalty: f32,
    /// Seed of the draws: the same seed gives the same text
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
}

const EXAMPLES: &str = "\
Examples:
  codecllm run tiny.int8 -p 'Once upon a time' -n 64
  codecllm run tiny.int8 --chat -p 'Why is the sky blue?' --temperature 0.7 --top-p 0.95
  codecllm run tiny.int8 --file letter.txt --stop 'Yours sincerely' --json
  codecllm run tiny.bf16 -p 'Once upon a time' --device cuda --vram 8";

#[derive(Serialize)]
struct Outcome {
    text: String,
    n_prompt_tokens: usize,
    n_generated: usize,
    finish: &'static str,
    prompt_tok_per_s: f64,
    /// `null` where the prompt's pass yielded all there is.
    generate_tok_per_s: Option<f64>,
    peak_memory_bytes: Option<u64>,
    weight_bytes: u64,
    /// The same weights in the archive or checkpoint.
    source_bytes: u64,
    /// What the model takes of the GPU's memory, with --vram or --cache.
    gpu_memory: Option<MemoryUse>,
}

/// Runs the command.
pub fn run(args: Args) -> CliResult {
    match args.machine.apply()? {
        Machine::Cpu(machine) => run_on(&args, &machine),
        Machine::Cuda(machine) => run_on(&args, &machine),
    }
}

fn run_on(args: &Args, machine: &impl Load) -> CliResult {
    let text = args.read_prompt()?;
    let dir = hub::resolve(&args.model, hub::DEFAULT_REVISION)?;
    let tokenizer = Tokenizer::open(&dir)?;
    let prompt = match args.chat {
        true => {
            let system = args.system.as_deref().map(|text| Message::new("system", text));
            let messages: Vec<_> = system.into_iter().chain([Message::new("user", text)]).collect();
            tokenizer.encode(&ChatTemplate::open(&dir)?.render(&messages)?, false)?
        }
        false => tokenizer.encode_prompt(&text)?,
    };
    let options = args.generate_options();

    output::catch_ctrl_c()?;
    let n_positions = prompt.len().saturating_add(options.max_tokens);
    let model = machine.load_for(&dir, Purpose { n_positions, logits: Logits::Last })?;
    let mut stdout = io::stdout().lock();
    let mut write_error = None;
    let generation = generate(&model, &tokenizer, &prompt, &options, |piece| {
        if !args.json
            && let Err(e) = stdout.write_all(piece.as_bytes()).and_then(|()| stdout.flush())
        {
            write_error = Some(e);
            return ControlFlow::Break(());
        }
        if output::is_stopped() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })?;
    drop(stdout);
    if let Some(e) = write_error.filter(|e| e.kind() != io::ErrorKind::BrokenPipe) {
        return Err(format!("standard output: {e}").into());
    }

    let is_interrupted = generation.finish == Finish::Interrupted && output::is_stopped();
    let outcome = Outcome::new(generation, &model);
    if args.json {
        output::print_json(&outcome)?;
    } else {
        output::print("")?;
        outcome.print_summary();
    }
    Ok(if is_interrupted { ExitCode::from(INTERRUPTED) } else { ExitCode::SUCCESS })
}

impl Args {
    fn read_prompt(&self) -> Result<String, Error> {
        let read = match &self.file {
            None => return Ok(self.prompt.clone().unwrap_or_default()),
            Some(path) if path.as_os_str() == "-" => {
                let mut text = String::new();
                io::stdin().read_to_string(&mut text).map(|_| text)
            }
            Some(path) => std::fs::read_to_string(path),
        };
        let name = self.file.as_deref().unwrap_or("-".as_ref()).display();
        read.map_err(|e| format!("prompt {name}: {e}").into())
    }

    fn generate_options(&self) -> GenerateOptions {
        let SamplingArgs { temperature, top_k, top_p, min_p, repetition_penalty, seed } = self.sampling;
        GenerateOptions {
            max_tokens: self.max_tokens,
            sampling: SamplingOptions { temperature, top_k, top_p, min_p, repetition_penalty, seed },
            stop: self.stop.clone(),
            ignore_eos: self.ignore_eos,
        }
    }
}

impl Outcome {
    fn new(generation: Generation, model: &Model<impl Backend>) -> Self {
        Self {
            n_prompt_tokens: generation.n_prompt_tokens,
            n_generated: generation.tokens.len(),
            finish: generation.finish.name(),
            prompt_tok_per_s: generation.prompt_tok_per_s(),
            generate_tok_per_s: generation.generate_tok_per_s(),
            peak_memory_bytes: model::peak_memory_bytes(),
            weight_bytes: model.weight_bytes(),
            source_bytes: model.source_bytes(),
            gpu_memory: model.memory().copied(),
            text: generation.text,
        }
    }

    fn print_summary(&self) {
        let speed = |rate: Option<f64>| rate.map_or(String::new(), |rate| format!(", {rate:.1} tok/s"));
        let memory = self.peak_memory_bytes.map_or(String::new(), |n| format!(", peak memory {}", output::bytes(n)));
        eprintln!(
            "prompt: {} tokens{}; generated: {} tokens{}; weights {}{memory}",
            self.n_prompt_tokens,
            speed(Some(self.prompt_tok_per_s)),
            self.n_generated,
            speed(self.generate_tok_per_s),
            output::bytes(self.weight_bytes),
        );
        if let Some(memory) = &self.gpu_memory {
            eprintln!("{}", model::describe_memory(memory));
        }
    }
}
