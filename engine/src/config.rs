//! A model's configuration: what `config.json` and `generation_config.json` say, checked and made uniform.
//!
//! Both spellings are read: that of Transformers 5 (`rope_parameters`, `dtype`) and the older one (`rope_theta` and
//! `rope_scaling` at the top level, `torch_dtype`). What is left out takes the value that Transformers gives it.

use crate::error::{Error, Result};
use serde::Deserialize;
use serde_json::{Map, Value};
use std::path::Path;

const CONFIG_FILE: &str = "config.json";
const GENERATION_FILE: &str = "generation_config.json";

/// The model families that the forward pass knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// Llama 1 to 3.2, TinyLlama and what shares their architecture.
    Llama,
    /// Mistral: Llama with a sliding window.
    Mistral,
    /// Qwen2 and Qwen2.5: biases on query, key and value.
    Qwen2,
    /// Qwen3: queries and keys are normalized per head.
    Qwen3,
}

impl Family {
    const ALL: [(Self, &str, &str); 4] = [
        (Self::Llama, "LlamaForCausalLM", "llama"),
        (Self::Mistral, "MistralForCausalLM", "mistral"),
        (Self::Qwen2, "Qwen2ForCausalLM", "qwen2"),
        (Self::Qwen3, "Qwen3ForCausalLM", "qwen3"),
    ];

    fn from_config(config: &Map<String, Value>) -> Result<Self> {
        let architecture = config.get("architectures").and_then(|a| a.get(0)).and_then(Value::as_str);
        let model_type = config.get("model_type").and_then(Value::as_str);
        let found = match (architecture, model_type) {
            (Some(name), _) => Self::ALL.iter().find(|(_, architecture, _)| *architecture == name),
            (None, Some(name)) => Self::ALL.iter().find(|(_, _, model_type)| *model_type == name),
            (None, None) => {
                return Err(Error::format(
                    CONFIG_FILE,
                    "neither `architectures` nor `model_type` says what the model is",
                ));
            }
        };
        found.map(|(family, _, _)| *family).ok_or_else(|| {
            let supported = Self::ALL.map(|(_, architecture, _)| architecture).join(", ");
            Error::unsupported(
                CONFIG_FILE,
                format!(
                    "architecture `{}` is not supported; supported are {supported}",
                    architecture.or(model_type).unwrap_or_default()
                ),
            )
        })
    }
}

/// How the rotary embedding's frequencies are scaled for long contexts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    Default,
    /// Every frequency is divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3.1's: long wavelengths are divided by `factor`, short ones stay, those between are blended.
    Llama3 {
        /// The divisor of the long wavelengths.
        factor: f64,
        /// Wavelengths above `original_context / low_freq_factor` are long.
        low_freq_factor: f64,
        /// Wavelengths below `original_context / high_freq_factor` are short.
        high_freq_factor: f64,
        /// The context, in tokens, that the model was first trained with.
        original_context: f64,
    },
}

/// A model's configuration. All sizes are counts of elements.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// The model's family.
    pub family: Family,
    /// Tokens in the vocabulary: rows of the embedding and of the output head.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the feed-forward part.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub n_layers: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Key and value heads; each serves `n_heads / n_kv_heads` query heads.
    pub n_kv_heads: usize,
    /// Width of a head; even.
    pub head_dim: usize,
    /// The model's context: the most tokens it can look back on, the current one included.
    pub max_positions: usize,
    /// Added to the mean square before its root.
    pub rms_norm_eps: f32,
    /// Base of the rotary embedding's frequencies.
    pub rope_theta: f64,
    /// Scaling of those frequencies.
    pub rope_scaling: RopeScaling,
    /// The output head is the embedding.
    pub tied_embeddings: bool,
    /// Query, key and value projections have biases.
    pub qkv_bias: bool,
    /// The attention's output projection has a bias.
    pub output_bias: bool,
    /// The feed-forward projections have biases.
    pub mlp_bias: bool,
    /// Queries and keys are normalized per head.
    pub qk_norm: bool,
    /// The window of the layers that have one, in tokens: a query sees itself and the `window - 1` keys before it.
    pub sliding_window: Option<usize>,
    /// The first layer of those that have the window, where the layers are not listed one by one.
    first_window_layer: usize,
    /// For each layer, whether it has the window, where `layer_types` lists them.
    layer_windows: Option<Vec<bool>>,
    /// The token that begins a text, if the model has one.
    pub bos_token_id: Option<u32>,
    /// Tokens that end a generation; empty when the model names none.
    pub eos_token_ids: Vec<u32>,
}

/// The fields of `config.json` that the families share, as they stand there.
#[derive(Deserialize)]
struct RawConfig {
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    max_position_embeddings: usize,
    rms_norm_eps: Option<f32>,
    hidden_act: Option<String>,
    tie_word_embeddings: Option<bool>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    use_sliding_window: Option<bool>,
    max_window_layers: Option<usize>,
    layer_types: Option<Vec<String>>,
    rope_parameters: Option<RawRope>,
    rope_scaling: Option<RawRope>,
    rope_theta: Option<f64>,
    partial_rotary_factor: Option<f64>,
    quantization_config: Option<RawQuantization>,
    bos_token_id: Option<u32>,
    eos_token_id: Option<OneOrMany>,
}

#[derive(Deserialize, Default)]
struct RawRope {
    rope_type: Option<String>,
    /// The older name of `rope_type`; some files carry both.
    r#type: Option<String>,
    rope_theta: Option<f64>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<f64>,
    partial_rotary_factor: Option<f64>,
}

#[derive(Deserialize)]
struct RawQuantization {
    quant_method: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(u32),
    Many(Vec<u32>),
}

impl OneOrMany {
    fn into_vec(self) -> Vec<u32> {
        match self {
            Self::One(id) => vec![id],
            Self::Many(ids) => ids,
        }
    }
}

/// A size that no model reaches, far below where products of two sizes overflow.
const SIZE_LIMIT: usize = 1 << 31;

impl Config {
    /// Reads the text of a `config.json`.
    pub fn from_json(text: &str) -> Result<Self> {
        let bad = |e: serde_json::Error| Error::format(CONFIG_FILE, e.to_string());
        let json: Map<String, Value> = serde_json::from_str(text).map_err(bad)?;
        let family = Family::from_config(&json)?;
        let sliding_window = sliding_window(family, &json)?;
        let raw: RawConfig = serde_json::from_value(Value::Object(json)).map_err(bad)?;

        if let Some(method) = raw.quantization_config.as_ref().and_then(|q| q.quant_method.as_deref())
            && method != "codecllm"
        {
            return Err(Error::unsupported(
                CONFIG_FILE,
                format!("the weights are quantized with `{method}`; take the model's BF16, F16 or F32 checkpoint"),
            ));
        }
        if let Some(act) = raw.hidden_act.as_deref().filter(|act| *act != "silu") {
            return Err(Error::unsupported(
                CONFIG_FILE,
                format!("hidden_act `{act}` is not supported; only `silu` is"),
            ));
        }
        check_size("vocab_size", raw.vocab_size)?;
        check_size("hidden_size", raw.hidden_size)?;
        check_size("intermediate_size", raw.intermediate_size)?;
        check_size("num_hidden_layers", raw.num_hidden_layers)?;
        check_size("num_attention_heads", raw.num_attention_heads)?;
        check_size("max_position_embeddings", raw.max_position_embeddings)?;

        let n_heads = raw.num_attention_heads;
        let n_kv_heads = raw.num_key_value_heads.unwrap_or(n_heads);
        if n_kv_heads == 0 || !n_heads.is_multiple_of(n_kv_heads) {
            return Err(Error::format(
                CONFIG_FILE,
                format!("num_attention_heads ({n_heads}) is not a multiple of num_key_value_heads ({n_kv_heads})"),
            ));
        }
        let head_dim = match (raw.head_dim, family) {
            (Some(head_dim), _) => head_dim,
            (None, Family::Qwen3) => 128,
            (None, _) if raw.hidden_size.is_multiple_of(n_heads) => raw.hidden_size / n_heads,
            (None, _) => {
                return Err(Error::format(
                    CONFIG_FILE,
                    format!(
                        "hidden_size ({}) is not a multiple of num_attention_heads ({n_heads}), and there is no head_dim",
                        raw.hidden_size
                    ),
                ));
            }
        };
        check_size("head_dim", head_dim)?;
        if !head_dim.is_multiple_of(2) {
            return Err(Error::format(CONFIG_FILE, format!("head_dim ({head_dim}) must be even")));
        }
        check_size("num_attention_heads * head_dim", n_heads.saturating_mul(head_dim))?;
        let rms_norm_eps = raw.rms_norm_eps.unwrap_or(1e-6);
        if !(rms_norm_eps >= 0.0 && rms_norm_eps.is_finite()) {
            return Err(Error::format(CONFIG_FILE, format!("rms_norm_eps ({rms_norm_eps}) must not be negative")));
        }
        let (rope_theta, rope_scaling) = rope(&raw)?;
        let layer_windows = match (&raw.layer_types, family) {
            (Some(types), Family::Qwen2 | Family::Qwen3) => Some(layer_windows(types, raw.num_hidden_layers)?),
            _ => None,
        };
        let attention_bias = raw.attention_bias.unwrap_or(false);
        Ok(Self {
            family,
            vocab_size: raw.vocab_size,
            hidden_size: raw.hidden_size,
            intermediate_size: raw.intermediate_size,
            n_layers: raw.num_hidden_layers,
            n_heads,
            n_kv_heads,
            head_dim,
            max_positions: raw.max_position_embeddings,
            rms_norm_eps,
            rope_theta,
            rope_scaling,
            tied_embeddings: raw.tie_word_embeddings.unwrap_or(false),
            qkv_bias: match family {
                Family::Llama | Family::Qwen3 => attention_bias,
                Family::Qwen2 => true,
                Family::Mistral => false,
            },
            output_bias: matches!(family, Family::Llama | Family::Qwen3) && attention_bias,
            mlp_bias: family == Family::Llama && raw.mlp_bias.unwrap_or(false),
            qk_norm: family == Family::Qwen3,
            sliding_window: match family {
                Family::Llama => None,
                Family::Mistral => sliding_window,
                Family::Qwen2 | Family::Qwen3 => sliding_window.filter(|_| raw.use_sliding_window == Some(true)),
            },
            first_window_layer: match family {
                Family::Llama | Family::Mistral => 0,
                Family::Qwen2 | Family::Qwen3 => raw.max_window_layers.unwrap_or(28),
            },
            layer_windows,
            bos_token_id: raw.bos_token_id,
            eos_token_ids: raw.eos_token_id.map(OneOrMany::into_vec).unwrap_or_default(),
        })
    }

    /// Reads `config.json` in `dir`, and adds the stop tokens of `generation_config.json` where there is one.
    pub fn open(dir: &Path) -> Result<Self> {
        let path = dir.join(CONFIG_FILE);
        let mut config = Self::from_json(&std::fs::read_to_string(&path).map_err(|e| Error::io(path, e))?)?;
        let path = dir.join(GENERATION_FILE);
        match std::fs::read_to_string(&path) {
            Ok(text) => config.add_generation_config(&text)?,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(Error::io(path, e)),
        }
        Ok(config)
    }

    /// Adds the stop tokens of a `generation_config.json`'s text.
    pub fn add_generation_config(&mut self, text: &str) -> Result<()> {
        #[derive(Deserialize)]
        struct Generation {
            eos_token_id: Option<OneOrMany>,
        }
        let generation: Generation =
            serde_json::from_str(text).map_err(|e| Error::format(GENERATION_FILE, e.to_string()))?;
        for id in generation.eos_token_id.map(OneOrMany::into_vec).unwrap_or_default() {
            if !self.eos_token_ids.contains(&id) {
                self.eos_token_ids.push(id);
            }
        }
        Ok(())
    }

    /// The sliding window of a layer, in tokens; `None` where it sees the whole context.
    pub fn window(&self, layer: usize) -> Option<usize> {
        let has_window = match &self.layer_windows {
            Some(windows) => windows[layer],
            None => layer >= self.first_window_layer,
        };
        self.sliding_window.filter(|_| has_window)
    }

    /// Width of the queries: all heads side by side.
    pub fn q_width(&self) -> usize {
        self.n_heads * self.head_dim
    }

    /// Width of the keys, and of the values.
    pub fn kv_width(&self) -> usize {
        self.n_kv_heads * self.head_dim
    }

    /// The rotary embedding's angle per position, in radians, for each of the `head_dim / 2` pairs of a head.
    pub fn inverse_frequencies(&self) -> Vec<f32> {
        (0..self.head_dim / 2)
            .map(|i| {
                let plain = self.rope_theta.powf(-((2 * i) as f64) / self.head_dim as f64);
                let scaled = match self.rope_scaling {
                    RopeScaling::Default => plain,
                    RopeScaling::Linear { factor } => plain / factor,
                    RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                        let turns = original_context * plain / std::f64::consts::TAU;
                        // The share of the unscaled frequency: 0 at `low_freq_factor` turns in the original context
                        // and below, 1 at `high_freq_factor` and above.
                        let share = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
                        plain * (share + (1.0 - share) / factor)
                    }
                };
                scaled as f32
            })
            .collect()
    }
}

fn check_size(field: &str, size: usize) -> Result<()> {
    if size == 0 || size >= SIZE_LIMIT {
        return Err(Error::format(CONFIG_FILE, format!("{field} is {size}; expected 1 to {}", SIZE_LIMIT - 1)));
    }
    Ok(())
}

/// `sliding_window` as it stands in the file. To the families that have one, absent means 4096 and `null` none, a
/// difference that a deserialized `Option` does not tell.
fn sliding_window(family: Family, config: &Map<String, Value>) -> Result<Option<usize>> {
    match config.get("sliding_window") {
        None if family == Family::Llama => Ok(None),
        None => Ok(Some(4096)),
        Some(Value::Null) => Ok(None),
        Some(window) => match window.as_u64() {
            Some(tokens @ 1..) => Ok(Some(usize::try_from(tokens).unwrap_or(usize::MAX))),
            _ => Err(Error::format(CONFIG_FILE, format!("sliding_window is {window}; expected a positive integer"))),
        },
    }
}

fn layer_windows(types: &[String], n_layers: usize) -> Result<Vec<bool>> {
    if types.len() != n_layers {
        return Err(Error::format(
            CONFIG_FILE,
            format!("layer_types lists {} layers, but num_hidden_layers is {n_layers}", types.len()),
        ));
    }
    types
        .iter()
        .map(|layer_type| match layer_type.as_str() {
            "full_attention" => Ok(false),
            "sliding_attention" => Ok(true),
            other => Err(Error::unsupported(
                CONFIG_FILE,
                format!("layer type `{other}` is not supported; supported are full_attention, sliding_attention"),
            )),
        })
        .collect()
}

fn rope(raw: &RawConfig) -> Result<(f64, RopeScaling)> {
    let plain = RawRope::default();
    let rope = raw.rope_parameters.as_ref().or(raw.rope_scaling.as_ref()).unwrap_or(&plain);
    let kind = rope.rope_type.as_deref().or(rope.r#type.as_deref()).unwrap_or("default");
    let positive = |name: &str, value: Option<f64>| match value {
        Some(value) if value > 0.0 && value.is_finite() => Ok(value),
        Some(value) => Err(Error::format(CONFIG_FILE, format!("rope setting {name} is {value}; it must be positive"))),
        None => Err(Error::format(CONFIG_FILE, format!("rope type `{kind}` needs `{name}`"))),
    };
    let theta = positive("rope_theta", rope.rope_theta.or(raw.rope_theta).or(Some(10_000.0)))?;
    let rotated = rope.partial_rotary_factor.or(raw.partial_rotary_factor).unwrap_or(1.0);
    if rotated != 1.0 {
        return Err(Error::unsupported(
            CONFIG_FILE,
            format!("partial_rotary_factor {rotated} is not supported; whole heads are rotated"),
        ));
    }
    let scaling = match kind {
        "default" => RopeScaling::Default,
        "linear" => RopeScaling::Linear { factor: positive("factor", rope.factor)? },
        "llama3" => {
            let low = positive("low_freq_factor", rope.low_freq_factor)?;
            let high = positive("high_freq_factor", rope.high_freq_factor)?;
            if high <= low {
                return Err(Error::format(
                    CONFIG_FILE,
                    format!("rope setting high_freq_factor ({high}) must exceed low_freq_factor ({low})"),
                ));
            }
            let context = rope.original_max_position_embeddings.unwrap_or(raw.max_position_embeddings as f64);
            RopeScaling::Llama3 {
                factor: positive("factor", rope.factor)?,
                low_freq_factor: low,
                high_freq_factor: high,
                original_context: positive("original_max_position_embeddings", Some(context))?,
            }
        }
        other => {
            return Err(Error::unsupported(
                CONFIG_FILE,
                format!("rope type `{other}` is not supported; supported are default, linear, llama3"),
            ));
        }
    };
    Ok((theta, scaling))
}
