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
pub(crate) type Unit = Vec<Footprint>;

/// Bytes of a matrix.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Footprint {
    /// As it is.
    pub bytes: u64,
    /// Decoded to BF16; `None` where it is plain already or has no such form.
    pub decoded: Option<u64>,
    /// Whether it may be kept so.
    pub is_allowed: bool,
    /// Whether products decode it, where it is not kept so, into memory that all units share.
    pub is_shared: bool,
}

impl Footprint {
    /// Bytes of the form in which it may be kept.
    pub fn kept(&self) -> Option<u64> {
        self.decoded.filter(|_| self.is_allowed)
    }
}

/// So many bytes of matrices may be decoded together into that memory, of which there are two such places; more if one alone takes more.
pub(crate) const TOGETHER_BYTES: u64 = 64 << 20;

/// Bytes of all units and of the scratch that they share, where the first `n` are decoded.
pub(crate) fn unit_bytes(units: &[Unit], n: usize) -> (u64, u64) {
    let (mut bytes, mut scratch) = (0, [0; 2]);
    for (i, unit) in units.iter().enumerate() {
        let (mut together, mut largest) = (0, 0);
        for m in unit {
            let kept = m.kept().filter(|_| i < n);
            bytes += kept.unwrap_or(m.bytes);
            let shared = m.decoded.filter(|_| m.is_shared && kept.is_none()).unwrap_or(0);
            together += shared;
            largest = shared.max(largest);
        }
        // With the beginning of the next one's. A matrix that is a unit by itself is not decoded beside others.
        let place = largest.max((2 * together).min(TOGETHER_BYTES));
        for place_of in scratch.iter_mut().take(unit.len().min(2)) {
            *place_of = place.max(*place_of);
        }
    }
    (bytes, scratch[0] + scratch[1])
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
        for m in unit {
            if let Some(decoded) = m.kept() {
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
        Footprint { bytes, decoded: Some(decoded), is_allowed: true, is_shared: true }
    }

    /// Twenty layers, and a matrix that no product decodes.
    fn units() -> Vec<Unit> {
        let layer = || vec![encoded(40, 100), encoded(60, 150)];
        let mut units: Vec<Unit> = std::iter::repeat_with(layer).take(20).collect();
        units.push(vec![Footprint { is_shared: false, ..encoded(70, 180) }]);
        units
    }

    #[test]
    fn as_many_first_units_as_fit_are_decoded() {
        let units = units();
        // Encoded: 2070, and twice 500 to decode a layer in, and one ahead.
        assert_eq!(unit_bytes(&units, 0), (2070, 1000));
        assert_eq!(unit_bytes(&units, 19), (4920, 1000));
        assert_eq!(unit_bytes(&units, 20), (5070, 0));
        assert_eq!(unit_bytes(&units, 21), (5180, 0));
        let fit = |budget| units_that_fit(&units, 10, 10, budget);
        for (budget, expected) in [
            (0, None),
            (3079, None),
            (3080, Some(0)),
            (3229, Some(0)),
            (3230, Some(1)),
            (5030, Some(13)),
            // All layers need 5080, less than fourteen: no prompt needs the memory to decode in. But a matrix of the last is there in both forms on the
            // way: 4980 and 150.
            (5129, Some(13)),
            (5130, Some(20)),
            (5249, Some(20)),
            (5250, Some(21)),
        ] {
            assert_eq!(fit(budget), expected, "{budget}");
        }
    }

    #[test]
    fn layers_too_large_to_be_decoded_together_share_room_for_their_largest_matrix() {
        const MIB: u64 = 1 << 20;
        let scratch = |head: u64, sizes: &[u64]| {
            let layer: Unit = sizes.iter().map(|&size| encoded(1, size * MIB)).collect();
            unit_bytes(&[layer, vec![encoded(1, head * MIB)]], 0).1 / MIB
        };
        assert_eq!(scratch(0, &[10, 12]), 88);
        assert_eq!(scratch(0, &[20, 30, 40]), 128);
        assert_eq!(scratch(0, &[20, 200, 40]), 400);
        assert_eq!(scratch(300, &[20, 30, 40]), 364);
    }

    #[test]
    fn both_forms_of_a_matrix_fit_at_any_time() {
        let units = [vec![Footprint { is_shared: false, ..encoded(70, 80) }]];
        assert_eq!(units_that_fit(&units, 0, 0, 149), Some(0));
        assert_eq!(units_that_fit(&units, 0, 0, 150), Some(1));
        // What comes later leaves its room.
        assert_eq!(units_that_fit(&units, 30, 30, 110), Some(0));
        assert_eq!(units_that_fit(&units, 30, 30, 150), Some(1));
    }

    #[test]
    fn what_is_plain_or_not_allowed_stays() {
        let fixed = Footprint { bytes: 50, decoded: None, is_allowed: true, is_shared: true };
        let rounded = Footprint { is_allowed: false, ..encoded(40, 100) };
        let units = [vec![fixed, rounded, encoded(10, 20)]];
        assert_eq!(unit_bytes(&units, 0), (100, 480));
        assert_eq!(unit_bytes(&units, 1), (110, 400));
        assert_eq!(units_that_fit(&units, 0, 0, 509), None);
        assert_eq!(units_that_fit(&units, 0, 0, 510), Some(1));
    }

    #[test]
    fn policies_are_parsed_or_explained() {
        assert_eq!("any".parse::<CachePolicy>().unwrap(), CachePolicy::Any);
        let error = "all".parse::<CachePolicy>().unwrap_err().to_string();
        assert!(error.contains("none, lossless or any"), "{error}");
    }
}
