//! Whole models on a GPU: tokens a second, the time of a prompt, and memory, in BF16 and in each format.

use crate::bench::Result;
use crate::bench::workload::{DrawnModel, Form, ModelShape};
use crate::model::{MemoryArgs, describe_memory};
use codecllm_codec::Prefer;
use codecllm_codec::encoded::Checks;
use codecllm_engine::cuda::{CudaBackend, Device};
use codecllm_engine::weights::Loader;
use codecllm_engine::{Logits, MemoryUse, Model, TensorSource};
use serde::Serialize;
use std::time::Instant;

/// Tokens of the prompt that is measured.
const PROMPT_TOKENS: usize = 2048;
/// Tokens that are generated in each round, from an empty cache.
const GENERATED_TOKENS: usize = 256;

#[derive(Serialize)]
pub struct Report {
    model_shape: &'static str,
    rounds: usize,
    results: Vec<Measurement>,
}

/// One form of the model. Times are medians over the rounds.
#[derive(Serialize)]
struct Measurement {
    name: String,
    /// Of the matrices.
    bits_per_weight: f64,
    weight_bytes: u64,
    /// Over the bytes of the same weights in an archive: more by the decoders' tables and by what is kept decoded.
    weight_ratio: f64,
    /// What is kept decoded, with --vram or --cache.
    memory: Option<MemoryUse>,
    /// What the GPU has given away, the cache and the workspace of the prompt included.
    used_bytes: u64,
    generate_tok_per_s: f64,
    /// Bytes of the weights that generation reads.
    generate_bytes_per_s: f64,
    prompt_s: f64,
    ratio_generate: f64,
    ratio_prompt: f64,
}

/// Runs the model of this shape in BF16 and in each format. With `shows`, prints each one's line once it is measured.
pub fn measure(
    index: usize,
    shape: ModelShape,
    forms: &[Form],
    seed: u64,
    rounds: usize,
    memory: &MemoryArgs,
    shows: bool,
) -> Result<Report> {
    let device = Device::open(index)?;
    eprintln!("{}: drawing the weights", shape.name());
    let drawn = DrawnModel::new(shape, seed)?;
    let mut results: Vec<Measurement> = Vec::new();
    if shows {
        print_head(shape.name(), rounds);
    }
    for form in std::iter::once(None).chain(forms.iter().copied().map(Some)) {
        let label = form.map_or("bf16 plain".to_string(), |f| format!("encoded {f}"));
        eprintln!("{}: measuring {label}", shape.name());
        let encoded = form.map(|form| drawn.encode(form, Prefer::Speed)).transpose()?;
        let source = encoded.as_ref().unwrap_or(&drawn);
        let free_before = device.memory()?.0;
        let own = Device::open(index)?;
        let (policy, budget) = memory.plan(&own, source.n_bytes())?;
        let backend = CudaBackend::new(own)?;
        let mut model = Model::on_backend(backend, drawn.config.clone(), &Loader::new(source, Checks::None))?;
        if memory.is_used() {
            model.keep_decoded(policy, budget, PROMPT_TOKENS, Logits::Last)?;
        }
        let mut result = Measurement {
            name: label,
            bits_per_weight: source.bits_per_weight(),
            weight_bytes: model.weight_bytes(),
            weight_ratio: model.weight_bytes() as f64 / model.source_bytes() as f64,
            memory: model.memory().copied(),
            ..run(&model, rounds)?
        };
        result.used_bytes = (free_before - device.memory()?.0) as u64;
        // The embedding is read a row at a time.
        let read_bytes = result.weight_bytes as f64 * drawn.share_read();
        result.generate_bytes_per_s = read_bytes * result.generate_tok_per_s;
        let peer = results
            .first()
            .map_or((result.generate_tok_per_s, result.prompt_s), |bf16| (bf16.generate_tok_per_s, bf16.prompt_s));
        result.ratio_generate = result.generate_tok_per_s / peer.0;
        result.ratio_prompt = result.prompt_s / peer.1;
        if shows {
            print_line(&result);
        }
        results.push(result);
    }
    Ok(Report { model_shape: shape.name(), rounds, results })
}

/// Times of prompts and of generation; the rest is for the caller to fill in.
fn run(model: &Model<CudaBackend>, rounds: usize) -> Result<Measurement> {
    let vocab_size = model.config().vocab_size as u32;
    let prompt: Vec<u32> = (0..PROMPT_TOKENS as u32).map(|i| i * 7919 % vocab_size).collect();
    let mut cache = model.new_cache(PROMPT_TOKENS)?;
    let mut prompt_s = Vec::new();
    // The first round warms up.
    for _ in 0..=rounds {
        cache.reset();
        let started = Instant::now();
        model.likeliest(&prompt, &mut cache)?;
        prompt_s.push(started.elapsed().as_secs_f64());
    }
    let mut generate_tok_per_s = Vec::new();
    for _ in 0..=rounds {
        cache.reset();
        let mut token = 1;
        let started = Instant::now();
        for _ in 0..GENERATED_TOKENS {
            token = model.likeliest(&[token], &mut cache)?;
        }
        generate_tok_per_s.push(GENERATED_TOKENS as f64 / started.elapsed().as_secs_f64());
    }
    Ok(Measurement {
        name: String::new(),
        bits_per_weight: 0.0,
        weight_bytes: 0,
        weight_ratio: 0.0,
        memory: None,
        used_bytes: 0,
        generate_tok_per_s: median(&mut generate_tok_per_s[1..]),
        generate_bytes_per_s: 0.0,
        prompt_s: median(&mut prompt_s[1..]),
        ratio_generate: 1.0,
        ratio_prompt: 1.0,
    })
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn print_head(shape: &str, rounds: usize) {
    println!("\n{shape}, {rounds} rounds");
    println!(
        "{:<20} {:>11} {:>10} {:>9} {:>9} {:>8} {:>7} {:>11} {:>7}",
        "", "bits/weight", "weights", "in use", "tokens/s", "GB/s", "ratio", "2048 prompt", "ratio"
    );
}

fn print_line(m: &Measurement) {
    println!(
        "{:<20} {:>11.3} {:>7.3} GB {:>6.2} GB {:>9.1} {:>8.0} {:>7.3} {:>8.2} ms {:>7.3}",
        m.name,
        m.bits_per_weight,
        m.weight_bytes as f64 / 1e9,
        m.used_bytes as f64 / 1e9,
        m.generate_tok_per_s,
        m.generate_bytes_per_s / 1e9,
        m.ratio_generate,
        1e3 * m.prompt_s,
        m.ratio_prompt
    );
    if let Some(memory) = &m.memory {
        println!("  {}", describe_memory(memory));
    }
}
