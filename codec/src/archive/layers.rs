//! Which tensors are encoded.

use crate::checkpoint::{Checkpoint, TensorInfo};
use crate::error::{Error, Result};
use regex::Regex;
use std::collections::HashSet;
use std::ops::Range;

/// Which matrices to encode. *Linear layers* are all matrices but embeddings and output heads; they are counted from 0
/// in the model's order: by layer number, then in the order in which a forward pass needs them.
#[derive(Debug, Clone, Default)]
pub enum Layers {
    /// Every matrix, embeddings and output head included.
    #[default]
    All,
    /// These linear layers.
    Linear(Range<usize>),
    /// Every matrix whose name matches, embeddings and output head included.
    Matching(Regex),
}

impl std::str::FromStr for Layers {
    type Err = Error;

    /// `all`; `5`, the first five linear layers; `3..8`, the linear layers 3 to 7; or a regular expression.
    fn from_str(text: &str) -> Result<Self> {
        let number = |s: &str| s.bytes().all(|b| b.is_ascii_digit()).then(|| s.parse::<usize>().ok()).flatten();
        let range = match text.split_once("..") {
            Some((start, end)) => number(start).zip(number(end)),
            None => number(text).map(|n| (0, n)),
        };
        match range {
            _ if text == "all" => Ok(Self::All),
            Some((start, end)) if start < end => Ok(Self::Linear(start..end)),
            Some(_) => Err(Error::Parameter(format!(
                "`{text}` selects no layer; a range A..B runs from A up to, but not including, B"
            ))),
            None => Regex::new(text).map(Self::Matching).map_err(|e| {
                Error::Parameter(format!(
                    "`{text}` is neither `all`, a number, a range like 3..8, nor a regular expression: {e}"
                ))
            }),
        }
    }
}

impl std::fmt::Display for Layers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::All => f.write_str("all"),
            Self::Linear(range) if range.start == 0 => write!(f, "{}", range.end),
            Self::Linear(range) => write!(f, "{}..{}", range.start, range.end),
            Self::Matching(regex) => f.write_str(regex.as_str()),
        }
    }
}

impl Layers {
    /// The names of the tensors of `checkpoint` that this selects.
    ///
    /// # Errors
    /// A selection that the checkpoint cannot fill.
    pub fn select<'a>(&self, checkpoint: &'a Checkpoint) -> Result<HashSet<&'a str>> {
        let matrices = || checkpoint.tensors().iter().filter(|t| t.is_matrix());
        let selected: HashSet<&str> = match self {
            Self::All => matrices().map(|t| t.name.as_str()).collect(),
            Self::Matching(regex) => matrices().map(|t| t.name.as_str()).filter(|name| regex.is_match(name)).collect(),
            Self::Linear(range) => {
                let mut linear: Vec<&TensorInfo> = matrices().filter(|t| !is_embedding_or_head(&t.name)).collect();
                linear.sort_by_cached_key(|t| model_order(&t.name));
                let layers = linear.get(range.clone()).ok_or_else(|| {
                    Error::Parameter(format!("`{self}` exceeds the {} linear layers of the model", linear.len()))
                })?;
                layers.iter().map(|t| t.name.as_str()).collect()
            }
        };
        if selected.is_empty() {
            return Err(Error::Parameter(format!(
                "`{self}` selects none of the {} matrices (BF16, F16 or F32) among the {} tensors of {}",
                matrices().count(),
                checkpoint.tensors().len(),
                checkpoint.path().display()
            )));
        }
        Ok(selected)
    }
}

/// The last part of a tensor's name before `.weight`.
pub(super) fn last_module(name: &str) -> &str {
    let module = name.strip_suffix(".weight").unwrap_or(name);
    module.rsplit('.').next().unwrap_or(module)
}

/// Whether a matrix is an embedding or an output head: no linear layer.
pub fn is_embedding_or_head(name: &str) -> bool {
    let module = name.strip_suffix(".weight").unwrap_or(name);
    let last = last_module(name);
    last.contains("embed") || matches!(last, "wte" | "wpe" | "lm_head") || module == "output"
}

/// Part of a dotted name; numbers compare as numbers.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum NamePart {
    Number(u64),
    Text(String),
}

/// A key that sorts names in the model's order: by layer (names outside the layers last), by the place in the forward
/// pass, by name.
pub(super) fn model_order(name: &str) -> (u64, usize, Vec<NamePart>) {
    const FORWARD: [&str; 11] = [
        "q_proj",
        "k_proj",
        "v_proj",
        "qkv_proj",
        "o_proj",
        "out_proj",
        "gate_proj",
        "up_proj",
        "gate_up_proj",
        "down_proj",
        "c_proj",
    ];
    let parts: Vec<NamePart> = name
        .split('.')
        .map(|part| part.parse().map_or_else(|_| NamePart::Text(part.into()), NamePart::Number))
        .collect();
    let layer = parts.iter().find_map(|p| if let NamePart::Number(n) = p { Some(*n) } else { None });
    let place = |part: &str| FORWARD.iter().position(|module| *module == part);
    (layer.unwrap_or(u64::MAX), name.split('.').find_map(place).unwrap_or(FORWARD.len()), parts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_come_back() {
        for text in ["all", "5", "3..8", r"layers\.\d+\.mlp"] {
            assert_eq!(text.parse::<Layers>().unwrap().to_string(), text);
        }
        assert!(matches!("0..5".parse(), Ok(Layers::Linear(r)) if r == (0..5)));
        for bad in ["0", "3..3", "8..3", "("] {
            assert!(bad.parse::<Layers>().is_err(), "{bad}");
        }
    }

    #[test]
    fn layers_count_numerically_and_along_the_forward_pass() {
        let ordered = [
            "model.layers.2.self_attn.q_proj.weight",
            "model.layers.2.self_attn.v_proj.weight",
            "model.layers.2.mlp.gate_proj.weight",
            "model.layers.2.mlp.down_proj.weight",
            "model.layers.10.self_attn.q_proj.weight",
            "score.weight",
        ];
        let mut names = ordered;
        names.sort();
        names.sort_by_cached_key(|n| model_order(n));
        assert_eq!(names, ordered);
    }

    #[test]
    fn embeddings_and_heads_are_not_linear_layers() {
        for name in ["model.embed_tokens.weight", "lm_head.weight", "transformer.wte.weight", "output.weight"] {
            assert!(is_embedding_or_head(name), "{name}");
        }
        for name in ["model.layers.0.self_attn.o_proj.weight", "encoder.layer.0.attention.output.dense.weight"] {
            assert!(!is_embedding_or_head(name), "{name}");
        }
    }
}
