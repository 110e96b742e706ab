//! What a model may take of a device's memory, and which of its matrices are kept decoded there: spare memory buys speed,
//! where reading plain weights is faster than decoding them.

use crate::error::{Error, Result};
use serde::Serialize;
use std::str::FromStr;

/// Which matrices may be kept decoded to BF16.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum CachePolicy {
    /// None.
    None,
    /// Those of format `bf16`, which are the same weights, bit for bit.
    #[default]
    Lossless,
    /// Any. A weight of `fp8`, `int8` and `rate` is a code times a scale, and is rounded to BF16: by up to 2^-9 of itself.
    /// Prompts of more than 16 tokens have such weights in any case.
    Any,
}

impl FromStr for CachePolicy {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        match s {
            "none" => Ok(Self::None),
            "lossless" => Ok(Self::Lossless),
            "any" => Ok(Self::Any),
            _ => Err(Error::Parameter(format!("unknown cache policy `{s}`; expected none, lossless or any"))),
        }
    }
}

/// The matrices that share a decision: those of a layer, or one alone.
#[derive(Debug, Default)]
pub(crate) struct Unit {
    pub matrices: Vec<Footprint>,
    /// Whether products of many tokens read it, for which what is encoded is decoded into memory that all share.
    pub is_shared: bool,
}

/// Bytes of a matrix.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Footprint {
    /// As it is.
    pub bytes: u64,
    /// Decoded to BF16; `None` where it is plain already or has no such form.
    pub decoded: Option<u64>,
    /// Whether it may be kept so.
    pub is_allowed: bool,
}

impl Footprint {
    fn is_decoded_at(&self, chosen: bool) -> Option<u64> {
        self.decoded.filter(|_| chosen && self.is_allowed)
    }
}

impl Unit {
    /// Bytes of the unit, and of the memory in which the largest of its matrices that stays encoded is decoded for a prompt.
    fn bytes(&self, chosen: bool) -> (u64, u64) {
        let (mut bytes, mut scratch) = (0, 0);
        for m in &self.matrices {
            match m.is_decoded_at(chosen) {
                Some(decoded) => bytes += decoded,
                None => {
                    bytes += m.bytes;
                    scratch = scratch.max(m.decoded.filter(|_| self.is_shared).unwrap_or(0));
                }
            }
        }
        (bytes, scratch)
    }
}

/// Bytes of all units and of the scratch that they share, where the first `n` are decoded.
pub(crate) fn unit_bytes(units: &[Unit], n: usize) -> (u64, u64) {
    units.iter().enumerate().fold((0, 0), |(bytes, scratch), (i, unit)| {
        let (b, s) = unit.bytes(i < n);
        (bytes + b, scratch.max(s))
    })
}

/// How many of the first units fit decoded into `budget` bytes, beside `others`; `None` where not even the encoded ones do.
/// Nor is the budget exceeded on the way, when a matrix is there in both forms, and `later` of the others not yet.
pub(crate) fn units_that_fit(units: &[Unit], others: u64, later: u64, budget: u64) -> Option<usize> {
    let total = |n| {
        let (bytes, scratch) = unit_bytes(units, n);
        bytes + scratch + others
    };
    let mut reached = 0;
    let mut now = unit_bytes(units, 0).0 + others - later;
    'units: for unit in units {
        for m in &unit.matrices {
            if let Some(decoded) = m.is_decoded_at(true) {
                if now + decoded > budget {
                    break 'units;
                }
                now = now + decoded - m.bytes;
            }
        }
        reached += 1;
    }
    // Not the first that does not fit: the shared scratch may be needed no more where one goes further.
    (0..=reached).rev().find(|&n| total(n) <= budget)
}

/// What a model takes of the device's memory, in bytes, but for the driver's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct MemoryUse {
    /// What may be kept decoded.
    pub policy: CachePolicy,
    /// The most that may be taken.
    pub budget_bytes: u64,
    /// Layers whose matrices were all decoded at load, of [`n_layers`](Self::n_layers).
    pub n_decoded_layers: usize,
    /// Layers of the model.
    pub n_layers: usize,
    /// The matrices that were decoded, those of embedding and head included.
    pub decoded_bytes: u64,
    /// All other weights.
    pub other_weight_bytes: u64,
    /// KV cache, activations and logits of a sequence of [`n_positions`](Self::n_positions).
    pub sequence_bytes: u64,
    /// What products work in.
    pub working_bytes: u64,
    /// Tokens of a sequence, prompt and generated ones together.
    pub n_positions: usize,
}

impl MemoryUse {
    /// All of it.
    pub fn total_bytes(&self) -> u64 {
        self.decoded_bytes + self.other_weight_bytes + self.sequence_bytes + self.working_bytes
    }

    /// The error of a model that does not fit.
    pub(crate) fn too_little(&self) -> Error {
        let gb = |n: u64| format!("{:.2} GB", n as f64 / 1e9);
        Error::device(format!(
            "the model needs {}: weights {}, cache and activations of {} tokens {}, working memory {}; it may take {}. Raise \
             --vram, use fewer tokens, or compress the model further",
            gb(self.total_bytes()),
            gb(self.decoded_bytes + self.other_weight_bytes),
            self.n_positions,
            gb(self.sequence_bytes),
            gb(self.working_bytes),
            gb(self.budget_bytes),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encoded(bytes: u64, decoded: u64) -> Footprint {
        Footprint { bytes, decoded: Some(decoded), is_allowed: true }
    }

    fn units() -> Vec<Unit> {
        let layer = || Unit { matrices: vec![encoded(40, 100), encoded(60, 150)], is_shared: true };
        vec![layer(), layer(), layer(), Unit { matrices: vec![encoded(70, 180)], is_shared: false }]
    }

    #[test]
    fn as_many_first_units_as_fit_are_decoded() {
        let units = units();
        // Encoded: 370, and 150 to decode the largest matrix in.
        assert_eq!(unit_bytes(&units, 0), (370, 150));
        assert_eq!(unit_bytes(&units, 2), (670, 150));
        assert_eq!(unit_bytes(&units, 3), (820, 0));
        assert_eq!(unit_bytes(&units, 4), (930, 0));
        let fit = |budget| units_that_fit(&units, 10, 10, budget);
        for (budget, expected) in [
            (0, None),
            (529, None),
            (530, Some(0)),
            (679, Some(0)),
            (680, Some(1)),
            (830, Some(2)),
            // A matrix of the third is there in both forms on the way: 730 and 150.
            (879, Some(2)),
            (880, Some(3)),
            (999, Some(3)),
            (1000, Some(4)),
        ] {
            assert_eq!(fit(budget), expected, "{budget}");
        }
        // Where three fit, two do not: with three, no prompt needs scratch.
        assert_eq!(units_that_fit(&units, 100, 100, 919), Some(1));
        assert_eq!(units_that_fit(&units, 100, 100, 920), Some(3));
    }

    #[test]
    fn both_forms_of_a_matrix_fit_at_any_time() {
        let units = [Unit { matrices: vec![encoded(70, 80)], is_shared: false }];
        assert_eq!(units_that_fit(&units, 0, 0, 149), Some(0));
        assert_eq!(units_that_fit(&units, 0, 0, 150), Some(1));
        // What comes later leaves its room.
        assert_eq!(units_that_fit(&units, 30, 30, 110), Some(0));
        assert_eq!(units_that_fit(&units, 30, 30, 150), Some(1));
    }

    #[test]
    fn what_is_plain_or_not_allowed_stays() {
        let fixed = Footprint { bytes: 50, decoded: None, is_allowed: true };
        let rounded = Footprint { is_allowed: false, ..encoded(40, 100) };
        let units = [Unit { matrices: vec![fixed, rounded, encoded(10, 20)], is_shared: true }];
        assert_eq!(unit_bytes(&units, 0), (100, 100));
        assert_eq!(unit_bytes(&units, 1), (110, 100));
        assert_eq!(units_that_fit(&units, 0, 0, 199), None);
        assert_eq!(units_that_fit(&units, 0, 0, 209), Some(0));
        assert_eq!(units_that_fit(&units, 0, 0, 210), Some(1));
    }

    #[test]
    fn policies_are_parsed_or_explained() {
        assert_eq!("any".parse::<CachePolicy>().unwrap(), CachePolicy::Any);
        let error = "all".parse::<CachePolicy>().unwrap_err().to_string();
        assert!(error.contains("none, lossless or any"), "{error}");
    }
}
