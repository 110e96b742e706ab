//! From logits to the next token.

use crate::error::{Error, Result};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::cmp::Ordering;

/// How the next token is chosen. The default is greedy: always the likeliest.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SamplingOptions {
    /// Logits are divided by it; 0 is greedy, 1 the model's own distribution.
    pub temperature: f32,
    /// Only this many of the likeliest tokens are drawn from; 0 turns the limit off.
    pub top_k: usize,
    /// Only the likeliest tokens are drawn from, as many as it takes for their probabilities to add up to this; 1 turns
    /// the limit off.
    pub top_p: f32,
    /// Only tokens at least this fraction as likely as the likeliest are drawn from; 0 turns the limit off.
    pub min_p: f32,
    /// Logits of tokens in the history are divided by it (multiplied, where negative); 1 turns the penalty off.
    pub repetition_penalty: f32,
    /// The same seed draws the same tokens from the same logits.
    pub seed: u64,
}

impl Default for SamplingOptions {
    fn default() -> Self {
        Self { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, repetition_penalty: 1.0, seed: 0 }
    }
}

impl SamplingOptions {
    fn validate(&self) -> Result<()> {
        let check = |name: &str, value: f32, is_valid: bool, range: &str| {
            let problem = || Error::Parameter(format!("{name} is {value}; it must be {range}"));
            is_valid.then_some(()).ok_or_else(problem)
        };
        let Self { temperature, top_p, min_p, repetition_penalty, .. } = *self;
        check("temperature", temperature, temperature >= 0.0 && temperature.is_finite(), "0 (greedy) or more")?;
        check("top-p", top_p, top_p > 0.0 && top_p <= 1.0, "above 0 and at most 1 (off)")?;
        check("min-p", min_p, (0.0..=1.0).contains(&min_p), "from 0 (off) to 1")?;
        let is_valid = repetition_penalty > 0.0 && repetition_penalty.is_finite();
        check("repetition penalty", repetition_penalty, is_valid, "above 0; 1 is off, 1.1 is usual")
    }
}

/// Chooses tokens, one after another.
pub struct Sampler {
    options: SamplingOptions,
    rng: SmallRng,
    /// The candidates of the draw at hand: token and logit. Kept for its allocation.
    candidates: Vec<(u32, f32)>,
}

impl Sampler {
    /// A sampler with these options, or the error of one that is out of range.
    pub fn new(options: SamplingOptions) -> Result<Self> {
        options.validate()?;
        Ok(Self { options, rng: SmallRng::seed_from_u64(options.seed), candidates: Vec::new() })
    }

    /// The next token, given the logits `[vocab_size]` of all and the tokens so far. Of equal logits, the lower token
    /// wins. The logits are scratch afterwards.
    ///
    /// The steps, in this order: repetition penalty, temperature, top-k, top-p, min-p, draw.
    pub fn sample(&mut self, logits: &mut [f32], history: &[u32]) -> Result<u32> {
        check_numbers(logits)?;
        self.penalize(logits, history);
        let best = argmax(logits)?;
        let SamplingOptions { temperature, top_k, top_p, min_p, .. } = self.options;
        let max = logits[best as usize];
        if temperature == 0.0 || max.is_infinite() {
            return Ok(best);
        }

        let candidates = &mut self.candidates;
        candidates.clear();
        candidates.extend((0..).zip(logits.iter().copied()));
        if top_k > 0 && top_k < candidates.len() {
            candidates.select_nth_unstable_by(top_k - 1, likelier);
            candidates.truncate(top_k);
        }
        // From here on a candidate's number is its weight: its probability over the likeliest's.
        for (_, value) in candidates.iter_mut() {
            *value = ((*value - max) / temperature).exp();
        }
        if top_p < 1.0 {
            candidates.sort_unstable_by(likelier);
            let mut left = top_p * candidates.iter().map(|c| c.1).sum::<f32>();
            let is_short = |c: &&(u32, f32)| {
                let is_short = left > 0.0;
                left -= c.1;
                is_short
            };
            let n_kept = candidates.iter().take_while(is_short).count();
            candidates.truncate(n_kept.max(1));
        }
        if min_p > 0.0 {
            candidates.retain(|c| c.1 >= min_p);
        }
        let total: f64 = candidates.iter().map(|c| f64::from(c.1)).sum();
        let mut left = self.rng.random::<f64>() * total;
        let drawn = candidates.iter().find(|c| {
            left -= f64::from(c.1);
            left < 0.0
        });
        Ok(drawn.map_or(best, |c| c.0))
    }

    /// Whether the likeliest token is taken each time, whatever the history.
    pub fn is_greedy(&self) -> bool {
        self.options.temperature == 0.0 && self.options.repetition_penalty == 1.0
    }

    fn penalize(&mut self, logits: &mut [f32], history: &[u32]) {
        let penalty = self.options.repetition_penalty;
        if penalty == 1.0 {
            return;
        }
        let mut seen = history.to_vec();
        seen.sort_unstable();
        seen.dedup();
        for id in seen {
            if let Some(logit) = logits.get_mut(id as usize) {
                *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
            }
        }
    }
}

/// The token of the largest logit, the lowest of several; all have to be numbers.
pub(crate) fn likeliest(logits: &[f32]) -> Result<u32> {
    check_numbers(logits)?;
    argmax(logits)
}

fn check_numbers(logits: &[f32]) -> Result<()> {
    match logits.iter().position(|logit| logit.is_nan()) {
        Some(id) => Err(not_a_number(id as u32)),
        None => Ok(()),
    }
}

/// The error of a NaN among the logits.
pub(crate) fn not_a_number(id: u32) -> Error {
    Error::weights(
        "logits",
        format!("the logit of token {id} is not a number; the weights or the arithmetic are broken"),
    )
}

/// The token of the largest logit, the lowest of several.
pub(crate) fn argmax(logits: &[f32]) -> Result<u32> {
    let best = (0u32..).zip(logits).min_by(|a, b| likelier(&(a.0, *a.1), &(b.0, *b.1)));
    best.map(|(id, _)| id).ok_or_else(|| Error::Parameter("there are no logits to choose a token from".into()))
}

/// Likelier first; of equals, the lower token.
fn likelier(a: &(u32, f32), b: &(u32, f32)) -> Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draw(options: SamplingOptions, logits: &[f32], n: usize) -> Vec<u32> {
        let mut sampler = Sampler::new(options).unwrap();
        (0..n).map(|_| sampler.sample(&mut logits.to_vec(), &[]).unwrap()).collect()
    }

    /// Logits without structure, with ties.
    fn logits(seed: u64) -> Vec<f32> {
        let mut rng = SmallRng::seed_from_u64(seed);
        (0..300).map(|_| (rng.random::<f32>() * 40.0).round() / 4.0 - 5.0).collect()
    }

    const SAMPLED: SamplingOptions =
        SamplingOptions { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, repetition_penalty: 1.0, seed: 7 };

    #[test]
    fn every_limit_at_its_tightest_is_greedy() {
        for seed in 0..50 {
            let logits = logits(seed);
            let greedy = draw(SamplingOptions::default(), &logits, 1);
            let first = logits.iter().position(|l| *l == logits.iter().copied().fold(f32::MIN, f32::max)).unwrap();
            assert_eq!(greedy, [first as u32]);
            assert_eq!(draw(SamplingOptions { top_k: 1, seed, ..SAMPLED }, &logits, 1), greedy);
            assert_eq!(draw(SamplingOptions { top_p: 1e-6, seed, ..SAMPLED }, &logits, 1), greedy);
            assert_eq!(draw(SamplingOptions { temperature: 1e-30, top_k: 1, ..SAMPLED }, &logits, 1), greedy);
        }
    }

    #[test]
    fn a_seed_repeats_and_another_differs() {
        let logits = logits(3);
        let one = draw(SAMPLED, &logits, 100);
        assert_eq!(one, draw(SAMPLED, &logits, 100));
        assert_ne!(one, draw(SamplingOptions { seed: 8, ..SAMPLED }, &logits, 100));
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let probabilities = [0.5f32, 0.3, 0.15, 0.05];
        let logits = probabilities.map(f32::ln);
        let share = |options, id| {
            let draws = draw(options, &logits, 20_000);
            draws.iter().filter(|d| **d == id).count() as f32 / draws.len() as f32
        };
        for (id, p) in (0..).zip(probabilities) {
            assert!((share(SAMPLED, id) - p).abs() < 0.015);
        }
        // Temperature 2: the square roots, normalized.
        let total: f32 = probabilities.iter().map(|p| p.sqrt()).sum();
        assert!((share(SamplingOptions { temperature: 2.0, ..SAMPLED }, 3) - 0.05f32.sqrt() / total).abs() < 0.015);
        // The limits cut the tail and keep the ratios of the rest.
        for options in [
            SamplingOptions { top_k: 2, ..SAMPLED },
            SamplingOptions { top_p: 0.7, ..SAMPLED },
            SamplingOptions { min_p: 0.4, ..SAMPLED },
        ] {
            assert!((share(options, 0) - 0.625).abs() < 0.015, "{options:?}");
            assert_eq!(share(options, 2) + share(options, 3), 0.0, "{options:?}");
        }
    }

    #[test]
    fn the_penalty_moves_both_signs_down() {
        let options = SamplingOptions { repetition_penalty: 2.0, ..SamplingOptions::default() };
        let mut sampler = Sampler::new(options).unwrap();
        assert_eq!(sampler.sample(&mut [1.0, 1.5], &[1, 1]).unwrap(), 0);
        assert_eq!(sampler.sample(&mut [-1.5, -1.0], &[1, 9]).unwrap(), 0);
    }

    #[test]
    fn options_out_of_range_are_named() {
        let d = SamplingOptions::default();
        for (options, name) in [
            (SamplingOptions { temperature: -1.0, ..d }, "temperature"),
            (SamplingOptions { temperature: f32::NAN, ..d }, "temperature"),
            (SamplingOptions { top_p: 0.0, ..d }, "top-p"),
            (SamplingOptions { min_p: 1.5, ..d }, "min-p"),
            (SamplingOptions { repetition_penalty: 0.0, ..d }, "repetition penalty"),
        ] {
            let error = Sampler::new(options).err().unwrap().to_string();
            assert!(error.contains(name), "{error}");
        }
    }

    #[test]
    fn broken_logits_are_an_error() {
        let mut sampler = Sampler::new(SamplingOptions::default()).unwrap();
        assert!(sampler.sample(&mut [0.0, f32::NAN], &[]).unwrap_err().to_string().contains("token 1"));
        assert!(sampler.sample(&mut [], &[]).is_err());
    }
}
