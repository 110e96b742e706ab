//! How good a model is on a text, and how far it is from a baseline.
//!
//! # The protocol
//! The text becomes one sequence of tokens: the token that begins a text, where the tokenizer has one, and then the whole
//! file as the tokenizer reads it, special tokens that are spelled out in it (`<|endoftext|>` between documents, say)
//! included. The sequence is cut into windows of 512 tokens that do not overlap; a last, shorter window counts too. Each
//! window runs alone, from an empty cache, and every token but its first is predicted from those before it in the window.
//! Perplexity is exp of the mean negative log-likelihood over all predictions.
//!
//! At each prediction the two models' distributions over the whole vocabulary are compared: KL(baseline ‖ model) in nats,
//! and whether the same token is the likeliest. All of this is computed in float64 from the float32 logits.

use crate::backend::{Backend, Logits};
use crate::error::{Error, Result};
use crate::generate::{GenerateOptions, generate};
use crate::llama::{KvCache, Model};
use crate::sampler::argmax;
use crate::tokenizer::Tokenizer;
use rayon::prelude::*;
use std::ops::ControlFlow;

/// Tokens of a window, where nothing else is asked for.
pub const DEFAULT_WINDOW: usize = 512;
/// Tokens of a greedy continuation, where nothing else is asked for.
pub const DEFAULT_GREEDY_TOKENS: usize = 64;

/// What the greedy continuations start from: plain openings of prose, so that every model has something to say.
pub const GREEDY_PROMPTS: [&str; 10] = [
    "Once upon a time",
    "In the middle of the night",
    "The old man looked at the sea and",
    "There are three reasons why",
    "The first thing to know about water is",
    "When the king heard this, he",
    "My dear friend, I am writing to you because",
    "The history of the city begins",
    "She opened the door and saw",
    "To build a small house, you need",
];

/// Logits of this many tokens are held at a time, for each model.
const PIECE: usize = 128;

/// What a model makes of a text.
#[derive(Debug, Clone, PartialEq)]
pub struct Evaluation {
    /// Predictions that were made.
    pub n_tokens: usize,
    /// exp of the model's mean negative log-likelihood.
    pub perplexity: f64,
    /// How it compares to the baseline, where there is one.
    pub comparison: Option<Comparison>,
}

/// How a model's predictions differ from a baseline's.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Comparison {
    /// The baseline's perplexity on the same predictions.
    pub baseline_perplexity: f64,
    /// Mean KL(baseline ‖ model), nats per token.
    pub kld_mean: f64,
    /// Share of predictions, 0 to 1, for which both find the same token the likeliest.
    pub top1_equal: f64,
}

/// Two greedy continuations of one prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GreedyComparison {
    /// The prompt.
    pub prompt: &'static str,
    /// The model's text.
    pub text: String,
    /// The baseline's text.
    pub baseline_text: String,
    /// The first generated token that differs, counted from 0; `None` where all are equal.
    pub first_difference: Option<usize>,
}

/// The tokens of a text, as the protocol of this module has it.
pub fn text_tokens(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>> {
    let mut tokens: Vec<u32> = tokenizer.bos().into_iter().collect();
    tokens.extend(tokenizer.encode(text, false)?);
    Ok(tokens)
}

/// Runs `model`, and `baseline` beside it, over `tokens` in windows of `window` tokens.
///
/// `on_progress` is told how many tokens are done, now and then, and may stop the evaluation: the result is then that of
/// the windows before. Memory is bounded: the logits of 128 tokens and the cache of one window, for each model.
///
/// # Errors
/// A window below 2 or beyond a model's context; fewer than two tokens; models whose vocabularies differ.
pub fn evaluate<B: Backend, C: Backend>(
    model: &Model<B>,
    baseline: Option<&Model<C>>,
    tokens: &[u32],
    window: usize,
    mut on_progress: impl FnMut(usize) -> ControlFlow<()>,
) -> Result<Evaluation> {
    if window < 2 {
        return Err(Error::Parameter(format!("a window of {window} tokens predicts nothing; take 2 or more")));
    }
    if tokens.len() < 2 {
        return Err(Error::Parameter(format!("{} tokens are too few to predict one from another", tokens.len())));
    }
    let longest = window.min(tokens.len());
    let mut model = Run::new(model, longest)?;
    let mut baseline = baseline.map(|baseline| Run::new(baseline, longest)).transpose()?;
    if let Some(baseline) = &baseline
        && baseline.vocab_size != model.vocab_size
    {
        return Err(Error::Parameter(format!(
            "the model has a vocabulary of {} tokens and the baseline one of {}; compare models of one tokenizer",
            model.vocab_size, baseline.vocab_size
        )));
    }
    let mut sum = Sum::default();
    for (i, window_tokens) in tokens.chunks(window).enumerate() {
        if window_tokens.len() < 2 || on_progress(i * window).is_break() {
            break;
        }
        model.cache.reset();
        if let Some(baseline) = &mut baseline {
            baseline.cache.reset();
        }
        let (inputs, targets) = (&window_tokens[..window_tokens.len() - 1], &window_tokens[1..]);
        for (inputs, targets) in inputs.chunks(PIECE).zip(targets.chunks(PIECE)) {
            let logits = model.logits(inputs)?;
            let baseline_logits = baseline.as_mut().map(|baseline| baseline.logits(inputs)).transpose()?;
            sum.add(&logits, baseline_logits.as_deref(), targets)?;
        }
    }
    Ok(sum.into_evaluation(baseline.is_some()))
}

/// A model and the cache of its window.
struct Run<'a, B: Backend> {
    model: &'a Model<B>,
    cache: KvCache<B>,
    vocab_size: usize,
}

impl<'a, B: Backend> Run<'a, B> {
    fn new(model: &'a Model<B>, window: usize) -> Result<Self> {
        let limit = model.config().max_positions;
        if window > limit {
            return Err(Error::Parameter(format!(
                "a window of {window} tokens exceeds the model's context of {limit}; take a shorter one"
            )));
        }
        Ok(Self { model, cache: model.new_cache(window)?, vocab_size: model.config().vocab_size })
    }

    /// `[tokens.len(), vocab_size]`
    fn logits(&mut self, tokens: &[u32]) -> Result<Vec<f32>> {
        self.model.forward(tokens, &mut self.cache, Logits::All)
    }
}

/// One prediction's share of the result.
#[derive(Default, Clone, Copy)]
struct Prediction {
    log_likelihood: f64,
    baseline_log_likelihood: f64,
    kld: f64,
    is_top1_equal: bool,
}

/// Sums over predictions, in their order, so that the result does not depend on the threads.
#[derive(Default)]
struct Sum {
    n: usize,
    log_likelihood: f64,
    baseline_log_likelihood: f64,
    kld: f64,
    n_top1_equal: usize,
}

impl Sum {
    /// Adds predictions: logits `[targets.len(), vocab_size]`, and the baseline's likewise.
    fn add(&mut self, logits: &[f32], baseline: Option<&[f32]>, targets: &[u32]) -> Result<()> {
        let vocab_size = logits.len() / targets.len();
        let row = |i: usize| i * vocab_size..(i + 1) * vocab_size;
        let predictions: Vec<_> = targets
            .par_iter()
            .enumerate()
            .map(|(i, target)| Prediction::new(&logits[row(i)], baseline.map(|b| &b[row(i)]), *target))
            .collect::<Result<_>>()?;
        for prediction in predictions {
            self.n += 1;
            self.log_likelihood += prediction.log_likelihood;
            self.baseline_log_likelihood += prediction.baseline_log_likelihood;
            self.kld += prediction.kld;
            self.n_top1_equal += usize::from(prediction.is_top1_equal);
        }
        Ok(())
    }

    fn into_evaluation(self, is_compared: bool) -> Evaluation {
        let n = self.n as f64;
        let perplexity = |log_likelihood: f64| (-log_likelihood / n).exp();
        Evaluation {
            n_tokens: self.n,
            perplexity: perplexity(self.log_likelihood),
            comparison: is_compared.then(|| Comparison {
                baseline_perplexity: perplexity(self.baseline_log_likelihood),
                kld_mean: self.kld / n,
                top1_equal: self.n_top1_equal as f64 / n,
            }),
        }
    }
}

impl Prediction {
    /// Logits `[vocab_size]` of the model and of the baseline; `target` is the token that did follow.
    fn new(logits: &[f32], baseline: Option<&[f32]>, target: u32) -> Result<Self> {
        let log_total = log_sum_exp(logits);
        let log_likelihood = f64::from(logits[target as usize]) - log_total;
        let Some(baseline) = baseline else { return Ok(Self { log_likelihood, ..Self::default() }) };
        let baseline_log_total = log_sum_exp(baseline);
        // Σ p·(log p − log q), where log p = b − log_total(b).
        let offset = log_total - baseline_log_total;
        let kld: f64 = baseline
            .iter()
            .zip(logits)
            .map(|(b, l)| {
                let (b, l) = (f64::from(*b), f64::from(*l));
                let p = (b - baseline_log_total).exp();
                if p > 0.0 { p * (b - l + offset) } else { 0.0 }
            })
            .sum();
        Ok(Self {
            log_likelihood,
            baseline_log_likelihood: f64::from(baseline[target as usize]) - baseline_log_total,
            kld,
            is_top1_equal: argmax(logits)? == argmax(baseline)?,
        })
    }
}

/// log Σ exp(logit)
fn log_sum_exp(logits: &[f32]) -> f64 {
    let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    max + logits.iter().map(|l| (f64::from(*l) - max).exp()).sum::<f64>().ln()
}

/// Continues each of [`GREEDY_PROMPTS`] greedily by `n_tokens` tokens (past stop tokens, so that all are compared) with
/// both models. `on_progress` is told how many prompts are done, and may stop the comparison there.
pub fn compare_greedy<B: Backend, C: Backend>(
    model: &Model<B>,
    baseline: &Model<C>,
    tokenizer: &Tokenizer,
    n_tokens: usize,
    mut on_progress: impl FnMut(usize) -> ControlFlow<()>,
) -> Result<Vec<GreedyComparison>> {
    let options = GenerateOptions { max_tokens: n_tokens, ignore_eos: true, ..GenerateOptions::default() };
    let mut results = Vec::new();
    for prompt in GREEDY_PROMPTS {
        if on_progress(results.len()).is_break() {
            break;
        }
        let tokens = tokenizer.encode_prompt(prompt)?;
        let ours = generate(model, tokenizer, &tokens, &options, |_| ControlFlow::Continue(()))?;
        let theirs = generate(baseline, tokenizer, &tokens, &options, |_| ControlFlow::Continue(()))?;
        results.push(GreedyComparison {
            prompt,
            first_difference: ours.tokens.iter().zip(&theirs.tokens).position(|(a, b)| a != b),
            text: ours.text,
            baseline_text: theirs.text,
        });
    }
    Ok(results)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn predictions_by_hand() {
        // p = (1/2, 1/4, 1/4), q = (1/4, 1/2, 1/4), both with an arbitrary constant added to the logits.
        let ln = f32::ln;
        let baseline = [ln(0.5) + 3.0, ln(0.25) + 3.0, ln(0.25) + 3.0];
        let logits = [ln(0.25) - 2.0, ln(0.5) - 2.0, ln(0.25) - 2.0];
        let p = Prediction::new(&logits, Some(&baseline), 1).unwrap();
        assert!((p.log_likelihood - 0.5f64.ln()).abs() < 1e-6);
        assert!((p.baseline_log_likelihood - 0.25f64.ln()).abs() < 1e-6);
        assert!((p.kld - 0.25 * 2f64.ln()).abs() < 1e-6, "{}", p.kld);
        assert!(!p.is_top1_equal);

        let mut sum = Sum::default();
        sum.add(&[logits, logits].concat(), Some(&[baseline, logits].concat()), &[1, 1]).unwrap();
        let evaluation = sum.into_evaluation(true);
        let comparison = evaluation.comparison.unwrap();
        assert_eq!(evaluation.n_tokens, 2);
        assert!((evaluation.perplexity - 2.0).abs() < 1e-6);
        assert!((comparison.baseline_perplexity - 8f64.sqrt()).abs() < 1e-6);
        assert!((comparison.kld_mean - 0.125 * 2f64.ln()).abs() < 1e-6);
        assert_eq!(comparison.top1_equal, 0.5);
    }

    #[test]
    fn equal_and_impossible_tokens_add_no_divergence() {
        let logits = [1.5, -3.25, f32::NEG_INFINITY, 80.0];
        let p = Prediction::new(&logits, Some(&logits), 0).unwrap();
        assert_eq!((p.kld, p.is_top1_equal), (0.0, true));
    }
}
