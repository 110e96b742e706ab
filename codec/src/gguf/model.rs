//! A GGUF file as a model in Hugging Face layout: names and order of the tensors, and `config.json`.

use super::{Gguf, GgufTensor};
use crate::archive::to_pretty_json;
use crate::checkpoint::CONFIG_FILE;
use crate::error::{Error, Result};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

/// The architectures that the engine runs, by the name in GGUF, with their names in `config.json`. Mistral's models are
/// `llama` there.
const ARCHITECTURES: [(&str, &str, &str); 3] = [
    ("llama", "LlamaForCausalLM", "llama"),
    ("qwen2", "Qwen2ForCausalLM", "qwen2"),
    ("qwen3", "Qwen3ForCausalLM", "qwen3"),
];
/// Factors of the rotary frequencies, in Llama 3.1 and later; they become `rope_scaling`.
const ROPE_FACTORS: &str = "rope_freqs.weight";
const EMBEDDING: &str = "token_embd.weight";
const HEAD: &str = "output.weight";

/// A tensor of the model: what it is called there, and how its rows lie in the file.
#[derive(Debug, Clone)]
pub(crate) struct Renamed {
    /// The Hugging Face name.
    pub(crate) name: String,
    /// Heads whose rows lie in the order of llama.cpp's rotation, and must be brought back.
    pub(crate) rotated_heads: Option<usize>,
}

impl Gguf {
    fn unsupported(&self, problem: String) -> Error {
        Error::unsupported(&self.what, problem)
    }

    /// The architecture's entry.
    fn architecture(&self) -> Result<(&'static str, &'static str, &'static str)> {
        const KEY: &str = "general.architecture";
        let name = self.text(KEY)?.ok_or_else(|| self.bad(KEY, "a text"))?;
        ARCHITECTURES.into_iter().find(|(known, ..)| *known == name).ok_or_else(|| {
            let known = ARCHITECTURES.map(|(known, ..)| known).join(", ");
            self.unsupported(format!("its architecture is `{name}`; supported are {known}"))
        })
    }

    fn key(&self, name: &str) -> Result<String> {
        Ok(format!("{}.{name}", self.architecture()?.0))
    }

    fn required_size(&self, name: &str) -> Result<usize> {
        let key = self.key(name)?;
        self.size(&key)?.ok_or_else(|| self.bad(&key, "a number"))
    }

    fn n_heads(&self) -> Result<usize> {
        self.required_size("attention.head_count")
    }

    fn n_kv_heads(&self) -> Result<usize> {
        Ok(match self.size(&self.key("attention.head_count_kv")?)? {
            Some(n) => n,
            None => self.n_heads()?,
        })
    }

    /// What a tensor of the file is in the model; `None` for one that the configuration absorbs.
    ///
    /// # Errors
    /// An architecture or a tensor that is not known.
    pub(crate) fn renamed(&self, tensor: &GgufTensor) -> Result<Option<Renamed>> {
        let (architecture, ..) = self.architecture()?;
        let plain = |name: &str| Ok(Some(Renamed { name: name.into(), rotated_heads: None }));
        match tensor.name.as_str() {
            ROPE_FACTORS => return Ok(None),
            EMBEDDING => return plain("model.embed_tokens.weight"),
            HEAD => return plain("lm_head.weight"),
            "output_norm.weight" => return plain("model.norm.weight"),
            _ => {}
        }
        let unknown = || {
            self.unsupported(format!(
                "tensor `{}` is not one of a `{architecture}` model that this version runs (mixtures of experts and the \
                 like are not)",
                tensor.name
            ))
        };
        let (layer, rest) = tensor.name.strip_prefix("blk.").and_then(|n| n.split_once('.')).ok_or_else(unknown)?;
        let layer: u32 = layer.parse().map_err(|_| unknown())?;
        let (module, kind) = rest.rsplit_once('.').ok_or_else(unknown)?;
        let module = match (module, kind) {
            ("attn_norm", "weight") => "input_layernorm",
            ("ffn_norm", "weight") => "post_attention_layernorm",
            ("attn_q_norm", "weight") => "self_attn.q_norm",
            ("attn_k_norm", "weight") => "self_attn.k_norm",
            ("attn_q", "weight" | "bias") => "self_attn.q_proj",
            ("attn_k", "weight" | "bias") => "self_attn.k_proj",
            ("attn_v", "weight" | "bias") => "self_attn.v_proj",
            ("attn_output", "weight" | "bias") => "self_attn.o_proj",
            ("ffn_gate", "weight" | "bias") => "mlp.gate_proj",
            ("ffn_up", "weight" | "bias") => "mlp.up_proj",
            ("ffn_down", "weight" | "bias") => "mlp.down_proj",
            _ => return Err(unknown()),
        };
        let rotated_heads = match (architecture, module) {
            ("llama", "self_attn.q_proj") => Some(self.n_heads()?),
            ("llama", "self_attn.k_proj") => Some(self.n_kv_heads()?),
            _ => None,
        };
        if let Some(heads) = rotated_heads {
            let n_rows = tensor.shape[0];
            if heads == 0 || heads > n_rows || !n_rows.is_multiple_of(2 * heads) {
                return Err(Error::format(
                    &self.what,
                    format!("tensor `{}` has {n_rows} rows, which {heads} heads do not share evenly", tensor.name),
                ));
            }
        }
        Ok(Some(Renamed { name: format!("model.layers.{layer}.{module}.{kind}"), rotated_heads }))
    }

    /// `config.json` as Transformers would write it. `factors` are the values of `rope_freqs.weight`, where there is one.
    pub(crate) fn config(&self, factors: Option<&[f32]>) -> Result<Map<String, Value>> {
        let (name, class, model_type) = self.architecture()?;
        if let Some(n) = self.size("split.count")?.filter(|n| *n > 1) {
            return Err(self.unsupported(format!(
                "it is one of {n} parts of a model; join them first (`llama-gguf-split --merge` of llama.cpp does)"
            )));
        }
        for key in ["expert_count", "attention.head_count_v"] {
            if self.size(&self.key(key)?)?.is_some_and(|n| n > 0) {
                return Err(self.unsupported(format!("`{name}.{key}` is set: mixtures of experts are not supported")));
            }
        }
        let Some(embedding) = self.tensor(EMBEDDING) else {
            return Err(Error::format(
                &self.what,
                format!("tensor `{EMBEDDING}` is missing: the file is not a whole model"),
            ));
        };
        let hidden_size = self.required_size("embedding_length")?;
        let n_heads = self.n_heads()?;
        if n_heads == 0 {
            return Err(self.bad(&self.key("attention.head_count")?, "a positive number"));
        }
        let head_dim = self.size(&self.key("attention.key_length")?)?.unwrap_or(hidden_size / n_heads);
        for (key, value) in [("attention.value_length", "values"), ("rope.dimension_count", "rotations")] {
            if let Some(found) = self.size(&self.key(key)?)?.filter(|n| *n != head_dim) {
                return Err(self.unsupported(format!(
                    "`{name}.{key}` is {found}, but heads are {head_dim} wide: {value} of another width are not supported"
                )));
            }
        }
        let eps_key = self.key("attention.layer_norm_rms_epsilon")?;
        let eps = self.float(&eps_key)?.ok_or_else(|| self.bad(&eps_key, "a number"))?;
        let window = self.size(&self.key("attention.sliding_window")?)?.filter(|n| *n > 0);
        let (class, model_type) = match window {
            Some(_) if name == "llama" => ("MistralForCausalLM", "mistral"),
            _ => (class, model_type),
        };
        let theta = self.float(&self.key("rope.freq_base")?)?.unwrap_or(10_000.0);

        let mut config = Map::new();
        config.insert("architectures".into(), json!([class]));
        config.insert("model_type".into(), json!(model_type));
        config.insert("vocab_size".into(), json!(embedding.shape[0]));
        config.insert("hidden_size".into(), json!(hidden_size));
        config.insert("intermediate_size".into(), json!(self.required_size("feed_forward_length")?));
        config.insert("num_hidden_layers".into(), json!(self.required_size("block_count")?));
        config.insert("num_attention_heads".into(), json!(n_heads));
        config.insert("num_key_value_heads".into(), json!(self.n_kv_heads()?));
        config.insert("head_dim".into(), json!(head_dim));
        config.insert("max_position_embeddings".into(), json!(self.required_size("context_length")?));
        config.insert("hidden_act".into(), json!("silu"));
        config.insert("rms_norm_eps".into(), shortest(eps));
        config.insert("rope_theta".into(), shortest(theta));
        if let Some(scaling) = self.rope_scaling(theta, head_dim, factors)? {
            config.insert("rope_scaling".into(), scaling);
        }
        if let Some(window) = window {
            config.insert("sliding_window".into(), json!(window));
            if name != "llama" {
                config.insert("use_sliding_window".into(), json!(true));
            }
        }
        config.insert("tie_word_embeddings".into(), json!(self.tensor(HEAD).is_none()));
        config.insert("attention_bias".into(), json!(name != "qwen2" && self.tensor("blk.0.attn_q.bias").is_some()));
        config.insert("mlp_bias".into(), json!(self.tensor("blk.0.ffn_up.bias").is_some()));
        let special = self.special_tokens()?;
        if let Some(bos) = special.bos {
            config.insert("bos_token_id".into(), json!(bos));
        }
        match special.ends.as_slice() {
            [] => {}
            [eos] => drop(config.insert("eos_token_id".into(), json!(eos))),
            ends => drop(config.insert("eos_token_id".into(), json!(ends))),
        }
        Ok(config)
    }

    fn rope_scaling(&self, theta: f64, head_dim: usize, factors: Option<&[f32]>) -> Result<Option<Value>> {
        if let Some(factors) = factors {
            return match llama3_scaling(theta, head_dim, factors) {
                Some(scaling) => Ok(scaling),
                None => Err(self.unsupported(format!(
                    "the rotary frequencies' factors in `{ROPE_FACTORS}` are not those of Llama 3.1's scaling"
                ))),
            };
        }
        match self.text(&self.key("rope.scaling.type")?)? {
            None | Some("none") => Ok(None),
            Some("linear") => {
                let key = self.key("rope.scaling.factor")?;
                let factor = self.float(&key)?.ok_or_else(|| self.bad(&key, "a number"))?;
                Ok(Some(json!({"rope_type": "linear", "factor": shortest(factor)})))
            }
            Some(other) => Err(self.unsupported(format!(
                "rope scaling `{other}` is not supported; supported are none, linear, Llama 3.1's"
            ))),
        }
    }

    /// The files beside the weights, by name: `config.json`, and those of the tokenizer. What the tokenizer's lack is an
    /// error of its own, because weights can do without.
    pub(crate) fn files(&self, factors: Option<&[f32]>) -> Result<(BTreeMap<String, String>, Option<Error>)> {
        let mut files = BTreeMap::from([(CONFIG_FILE.to_string(), to_pretty_json(&self.config(factors)?))]);
        let lacking = match self.tokenizer_files() {
            Ok(tokenizer) => {
                files.extend(tokenizer);
                None
            }
            Err(e) => Some(e),
        };
        Ok((files, lacking))
    }
}

/// The factors of the rotary frequencies that a file has, read from it.
pub(crate) fn rope_factors(gguf: &Gguf, read: impl Fn(&GgufTensor) -> Result<Vec<f32>>) -> Result<Option<Vec<f32>>> {
    gguf.tensor(ROPE_FACTORS).map(read).transpose()
}

/// A float32 in as few digits as tell it from others.
fn shortest(x: f64) -> Value {
    let narrow = x as f32;
    match narrow.to_string().parse::<f64>() {
        Ok(short) if f64::from(narrow) == x => json!(short),
        _ => json!(x),
    }
}

/// `rope_scaling` of Llama 3.1 (Transformers' `_compute_llama3_parameters`) that yields these divisors of the frequencies; the
/// inner `None` where all are 1, the outer where there is no such scaling.
///
/// Where a pair's wavelength fits the original context t times, its divisor is `factor` for t ≤ low, 1 for t ≥ high,
/// and between them 1 / divisor is linear in t. Only the products of context and 1/low, 1/high show, so low is 1.
fn llama3_scaling(theta: f64, head_dim: usize, divisors: &[f32]) -> Option<Option<Value>> {
    if divisors.len() != head_dim / 2 || divisors.iter().any(|d| !(d.is_finite() && *d >= 1.0)) {
        return None;
    }
    let factor = f64::from(divisors.iter().copied().fold(1.0, f32::max));
    if factor == 1.0 {
        return Some(None);
    }
    let frequency = |i: usize| theta.powf(-((2 * i) as f64) / head_dim as f64);
    let fits = |context: f64, high: f64| {
        divisors.iter().enumerate().all(|(i, divisor)| {
            let turns = context * frequency(i) / std::f64::consts::TAU;
            let share = ((turns - 1.0) / (high - 1.0)).clamp(0.0, 1.0);
            let expected = 1.0 / (share + (1.0 - share) / factor);
            (f64::from(*divisor) - expected).abs() <= 1e-4 * expected
        })
    };
    // Llama 3.1's own; else the line through the blended pairs, or through one with Llama 3.1's `high`.
    let mut candidates = vec![(8192.0, 4.0)];
    let blended: Vec<(f64, f64)> = divisors
        .iter()
        .enumerate()
        .filter(|(_, d)| **d > 1.0 && f64::from(**d) < factor)
        .map(|(i, d)| {
            (frequency(i) / std::f64::consts::TAU, (1.0 / f64::from(*d) - 1.0 / factor) / (1.0 - 1.0 / factor))
        })
        .collect();
    if let (Some(first), Some(last)) = (blended.first(), blended.last())
        && blended.len() > 1
    {
        // share = (context · x − 1) / (high − 1)
        let slope = (first.1 - last.1) / (first.0 - last.0);
        let at_zero = first.1 - slope * first.0;
        let high = 1.0 - 1.0 / at_zero;
        let context = slope * (high - 1.0);
        candidates.push((context.round(), (high * 1e4).round() / 1e4));
        candidates.push((context, high));
    }
    if let Some((x, share)) = blended.first() {
        let context = (3.0 * share + 1.0) / x;
        candidates.extend([(context.round(), 4.0), (context, 4.0)]);
    }
    let (context, high) = candidates.into_iter().find(|&(context, high)| high > 1.0 && fits(context, high))?;
    Some(Some(json!({
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": high,
        "original_max_position_embeddings": if context.fract() == 0.0 { json!(context as u64) } else { json!(context) },
    })))
}

/// Brings the rows of a matrix (or the elements of a bias) whose heads llama.cpp rotates in neighbouring pairs back to halves: row
/// `2j + p` of a head becomes row `p · head_dim / 2 + j`.
pub(crate) fn unrotate(data: &[u8], n_rows: usize, heads: usize) -> Vec<u8> {
    let row_bytes = data.len() / n_rows;
    let half = n_rows / heads / 2;
    let mut out = Vec::with_capacity(data.len());
    for head in 0..heads {
        for p in 0..2 {
            for j in 0..half {
                let row = head * 2 * half + 2 * j + p;
                out.extend_from_slice(&data[row * row_bytes..(row + 1) * row_bytes]);
            }
        }
    }
    out
}
