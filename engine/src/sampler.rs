//! From logits to the next token.
//!
//! A [`Sampler`] has the options and the randomness; each of its [`Draw`]s says all that choosing one token takes. What a draw
//! chooses is exact: probabilities are whole numbers, computed by a fixed sequence of IEEE operations, and so are their sums, in
//! any order. So every machine that has the same logits chooses the same token (`engine/cuda/sample.cu` is [`Draw::choose`]).

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
}

impl Sampler {
    /// A sampler with these options, or the error of one that is out of range.
    pub fn new(options: SamplingOptions) -> Result<Self> {
        options.validate()?;
        Ok(Self { options, rng: SmallRng::seed_from_u64(options.seed) })
    }

    /// How the next token is to be chosen, given the tokens so far.
    pub fn draw(&mut self, history: &[u32]) -> Draw {
        let SamplingOptions { temperature, top_k, top_p, min_p, repetition_penalty, .. } = self.options;
        let mut seen = Vec::new();
        if repetition_penalty != 1.0 {
            seen = history.to_vec();
            seen.sort_unstable();
            seen.dedup();
        }
        let is_greedy = temperature == 0.0;
        Draw {
            scale: (!is_greedy).then(|| std::f64::consts::LOG2_E / f64::from(temperature)),
            top_k: u32::try_from(top_k).unwrap_or(0),
            top_p: f64::from(top_p),
            min_weight: (f64::from(min_p) * WEIGHT_ONE).ceil() as u64,
            random: if is_greedy { 0 } else { self.rng.random() },
            penalty: repetition_penalty,
            seen,
        }
    }

    /// The next token, given the logits `[vocab_size]` of all and the tokens so far. The logits are scratch afterwards.
    pub fn sample(&mut self, logits: &mut [f32], history: &[u32]) -> Result<u32> {
        self.draw(history).choose(logits)
    }

    /// Whether the likeliest token is taken each time, whatever the history.
    pub fn is_greedy(&self) -> bool {
        self.options.temperature == 0.0 && self.options.repetition_penalty == 1.0
    }
}

/// The weight of the likeliest token; the others have less, in proportion to their probabilities.
const WEIGHT_ONE: f64 = (1u64 << 40) as f64;

/// ln(2)^k / k!, the series of 2^x: within 3e-13 for |x| <= 1/2.
const EXP2: [f64; 11] = [
    1.0,
    std::f64::consts::LN_2,
    0.24022650695910072,
    0.05550410866482158,
    0.009618129107628477,
    0.0013333558146428443,
    0.0001540353039338161,
    1.5252733804059841e-05,
    1.321548679014431e-06,
    1.01780860092397e-07,
    7.054911620801123e-09,
];

/// How one token is chosen, its randomness included.
#[derive(Debug, Clone, PartialEq)]
pub struct Draw {
    /// What logits are multiplied by, to be powers of two; `None` takes the likeliest token.
    pub(crate) scale: Option<f64>,
    /// 0 is off.
    pub(crate) top_k: u32,
    /// 1 is off.
    pub(crate) top_p: f64,
    /// Tokens of less weight are left out.
    pub(crate) min_weight: u64,
    /// 64 random bits.
    pub(crate) random: u64,
    /// What logits of tokens seen are divided by.
    pub(crate) penalty: f32,
    /// Each once.
    pub(crate) seen: Vec<u32>,
}

impl Draw {
    /// The token that is drawn, given the logits `[vocab_size]` of all. The logits are scratch afterwards.
    ///
    /// 1. The repetition penalty divides the logits of tokens seen, or multiplies them where they are negative.
    /// 2. Tokens are in the order of their logits; of equal ones, the lower token is likelier. Top-k keeps the first k.
    /// 3. A token's weight is floor(2^40 · 2^((logit − largest logit) · log2(e) / temperature)), in double precision: less than
    ///    10^-12 of the likeliest's is nothing.
    /// 4. Top-p keeps the first tokens, up to that with which their weights reach p of the sum; min-p those of enough weight.
    /// 5. What is kept is laid out in the order of tokens, each as long as its weight. The token that lies at the random
    ///    number's share of the length is drawn.
    ///
    /// # Errors
    /// A logit is not a number; there is none.
    pub fn choose(&self, logits: &mut [f32]) -> Result<u32> {
        check_numbers(logits)?;
        for &id in &self.seen {
            if let Some(logit) = logits.get_mut(id as usize) {
                *logit = if *logit > 0.0 { *logit / self.penalty } else { *logit * self.penalty };
            }
        }
        let best = argmax(logits)?;
        let max = logits[best as usize];
        let Some(scale) = self.scale.filter(|_| max.is_finite()) else { return Ok(best) };

        let mut kept: Vec<(u32, f32)> = (0..).zip(logits.iter().copied()).collect();
        let top_k = self.top_k as usize;
        if top_k > 0 && top_k < kept.len() {
            kept.select_nth_unstable_by(top_k - 1, likelier);
            kept.truncate(top_k);
        }
        let weight = |token: &(u32, f32)| weight(token.1, max, scale);
        if self.top_p < 1.0 {
            kept.retain(|token| weight(token) > 0);
            kept.sort_unstable_by(likelier);
            let enough = self.enough(kept.iter().map(weight).sum());
            let mut before = 0;
            let n_kept = kept.iter().take_while(|token| {
                let is_short = before < enough;
                before += weight(token);
                is_short
            });
            kept.truncate(n_kept.count());
        }
        let mut kept: Vec<(u32, u64)> = kept.iter().map(|token| (token.0, weight(token))).collect();
        kept.retain(|token| token.1 >= self.min_weight);
        kept.sort_unstable_by_key(|token| token.0);
        let total: u64 = kept.iter().map(|token| token.1).sum();
        let mut left = ((u128::from(self.random) * u128::from(total)) >> 64) as u64;
        let drawn = kept.iter().find(|token| {
            let is_here = left < token.1;
            left = left.wrapping_sub(token.1);
            is_here
        });
        // The likeliest token has weight, so that there is one.
        Ok(drawn.map_or(best, |token| token.0))
    }

    /// The weight that top-p keeps, of `total`; the likeliest token at least.
    fn enough(&self, total: u64) -> u64 {
        ((self.top_p * total as f64) as u64).max(1)
    }
}

/// See [`Draw::choose`]. Every operation is rounded by itself: on any machine the result is the same.
fn weight(logit: f32, max: f32, scale: f64) -> u64 {
    let power = (f64::from(logit) - f64::from(max)) * scale;
    if power < -41.0 {
        return 0;
    }
    let whole = power.round_ties_even();
    let rest = power - whole;
    let fraction = EXP2.iter().rev().fold(0.0, |sum, c| sum * rest + c);
    // 2^(40 + whole)
    let exponent = f64::from_bits(((1023 + 40 + whole as i64) as u64) << 52);
    (fraction * exponent) as u64
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
    fn weights_are_the_exponentials() {
        for temperature in [0.1f32, 0.7, 1.0, 3.0] {
            let scale = std::f64::consts::LOG2_E / f64::from(temperature);
            assert_eq!(weight(7.25, 7.25, scale), 1 << 40);
            for i in 0..4000 {
                let logit = 7.25 - i as f32 * 0.01;
                let exact = WEIGHT_ONE * ((f64::from(logit) - 7.25) / f64::from(temperature)).exp();
                let found = weight(logit, 7.25, scale) as f64;
                assert!((found - exact).abs() <= 1.0 + 1e-12 * exact, "{logit} at {temperature}: {found}, not {exact}");
            }
        }
        assert_eq!(weight(f32::NEG_INFINITY, 0.0, 1.0), 0);
        assert_eq!(weight(f32::MIN, f32::MAX, 1e30), 0);
    }

    #[test]
    fn what_is_kept_is_what_the_steps_say() {
        // Four tokens of weights 8, 4, 4, 2 (of 18), out of order.
        let logits = [1.0f32, 2.0, 3.0, 2.0].map(|power| power * std::f32::consts::LN_2);
        let base = Sampler::new(SAMPLED).unwrap().draw(&[]);
        let drawn = |draw: &Draw| {
            let mut found = [0; 4];
            for i in 0..1 << 12 {
                let draw = Draw { random: i << 52, ..draw.clone() };
                found[draw.choose(&mut logits.clone()).unwrap() as usize] += 1;
            }
            found
        };
        let close = |found: [i32; 4], weights: [i32; 4]| {
            let total: i32 = weights.iter().sum();
            let fits = found.iter().zip(weights).all(|(n, weight)| (n - 4096 * weight / total).abs() <= 2);
            assert!(fits, "{found:?} are not as {weights:?}");
        };
        close(drawn(&base), [2, 4, 8, 4]);
        close(drawn(&Draw { top_k: 3, ..base.clone() }), [0, 4, 8, 4]);
        // Of equal ones the lower.
        close(drawn(&Draw { top_k: 2, ..base.clone() }), [0, 4, 8, 0]);
        close(drawn(&Draw { top_k: 9, ..base.clone() }), [2, 4, 8, 4]);
        close(drawn(&Draw { top_p: 0.5, ..base.clone() }), [0, 4, 8, 0]);
        close(drawn(&Draw { top_p: 0.7, ..base.clone() }), [0, 4, 8, 4]);
        // 0.9 of what top-k leaves.
        close(drawn(&Draw { top_p: 0.9, top_k: 3, ..base.clone() }), [0, 4, 8, 4]);
        close(drawn(&Draw { top_p: 0.6, top_k: 3, ..base.clone() }), [0, 4, 8, 0]);
        close(drawn(&Draw { min_weight: (1 << 38) - (1 << 20), ..base.clone() }), [2, 4, 8, 4]);
        close(drawn(&Draw { min_weight: 3 << 37, ..base.clone() }), [0, 4, 8, 4]);
        // In the order of tokens.
        assert_eq!(Draw { random: 0, ..base.clone() }.choose(&mut logits.clone()).unwrap(), 0);
        assert_eq!(Draw { random: u64::MAX, ..base }.choose(&mut logits.clone()).unwrap(), 3);
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
