//! A model's configuration: what `config.json` and `generation_config.json` say, checked and made uniform.
//!
//! Both spellings are read: that of Transformers 5 (`rope_parameters`, `dtype`) and the older one (`rope_theta` and
//! `rope_scaling` at the top level, `torch_dtype`). What is left out takes the value that Transformers gives it.

use crate::error::{Error, Result};
use codecllm_codec::checkpoint::read_file;
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

    fn from_config(fields: Fields) -> Result<Self> {
        let architectures: Vec<&str> = fields.get("architectures")?.unwrap_or_default();
        let architecture = architectures.first().copied();
        let model_type = fields.get("model_type")?;
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

/// A JSON object of one of the files; what is wrong with a field is told with its name.
#[derive(Clone, Copy)]
struct Fields<'a> {
    file: &'static str,
    map: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    /// A field's value; `None` where it is absent or `null`.
    fn get<T: Deserialize<'a>>(self, name: &str) -> Result<Option<T>> {
        match self.map.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => {
                T::deserialize(value).map(Some).map_err(|e| Error::format(self.file, format!("`{name}`: {e}")))
            }
        }
    }

    /// The object that a field holds.
    fn object(self, name: &str) -> Result<Option<Self>> {
        match self.map.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Self { map, ..self })),
            Some(other) => Err(Error::format(self.file, format!("`{name}` is {other}; expected an object"))),
        }
    }

    /// A size that must be there.
    fn size(self, name: &str) -> Result<usize> {
        let size = self.get(name)?.ok_or_else(|| Error::format(self.file, format!("`{name}` is missing")))?;
        check_size(name, size)
    }
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
        let map = serde_json::from_str(text).map_err(|e| Error::format(CONFIG_FILE, e.to_string()))?;
        let fields = Fields { file: CONFIG_FILE, map: &map };
        let family = Family::from_config(fields)?;
        check_quantization(fields)?;
        if let Some(act) = fields.get::<String>("hidden_act")?.filter(|act| act != "silu") {
            return Err(Error::unsupported(
                CONFIG_FILE,
                format!("hidden_act `{act}` is not supported; only `silu` is"),
            ));
        }
        let hidden_size = fields.size("hidden_size")?;
        let n_layers = fields.size("num_hidden_layers")?;
        let n_heads = fields.size("num_attention_heads")?;
        let n_kv_heads = fields.get("num_key_value_heads")?.unwrap_or(n_heads);
        if n_kv_heads == 0 || !n_heads.is_multiple_of(n_kv_heads) {
            return Err(Error::format(
                CONFIG_FILE,
                format!("num_attention_heads ({n_heads}) is not a multiple of num_key_value_heads ({n_kv_heads})"),
            ));
        }
        let head_dim = match (fields.get("head_dim")?, family) {
            (Some(head_dim), _) => head_dim,
            (None, Family::Qwen3) => 128,
            (None, _) if hidden_size.is_multiple_of(n_heads) => hidden_size / n_heads,
            (None, _) => {
                return Err(Error::format(
                    CONFIG_FILE,
                    format!(
                        "hidden_size ({hidden_size}) is not a multiple of num_attention_heads ({n_heads}), and there is \
                         no head_dim"
                    ),
                ));
            }
        };
        check_size("head_dim", head_dim)?;
        check_size("num_attention_heads * head_dim", n_heads.saturating_mul(head_dim))?;
        if !head_dim.is_multiple_of(2) {
            return Err(Error::format(CONFIG_FILE, format!("head_dim ({head_dim}) must be even")));
        }
        let rms_norm_eps: f32 = fields.get("rms_norm_eps")?.unwrap_or(1e-6);
        if !(rms_norm_eps >= 0.0 && rms_norm_eps.is_finite()) {
            return Err(Error::format(CONFIG_FILE, format!("rms_norm_eps ({rms_norm_eps}) must not be negative")));
        }
        let max_positions = fields.size("max_position_embeddings")?;
        let (rope_theta, rope_scaling) = rope(fields, max_positions)?;
        let attention_bias = fields.get("attention_bias")?.unwrap_or(false);
        let is_qwen = matches!(family, Family::Qwen2 | Family::Qwen3);
        Ok(Self {
            family,
            vocab_size: fields.size("vocab_size")?,
            hidden_size,
            intermediate_size: fields.size("intermediate_size")?,
            n_layers,
            n_heads,
            n_kv_heads,
            head_dim,
            max_positions,
            rms_norm_eps,
            rope_theta,
            rope_scaling,
            tied_embeddings: fields.get("tie_word_embeddings")?.unwrap_or(false),
            qkv_bias: match family {
                Family::Llama | Family::Qwen3 => attention_bias,
                Family::Qwen2 => true,
                Family::Mistral => false,
            },
            output_bias: matches!(family, Family::Llama | Family::Qwen3) && attention_bias,
            mlp_bias: family == Family::Llama && fields.get("mlp_bias")?.unwrap_or(false),
            qk_norm: family == Family::Qwen3,
            sliding_window: match family {
                Family::Llama => None,
                Family::Mistral => sliding_window(fields)?,
                Family::Qwen2 | Family::Qwen3 if fields.get("use_sliding_window")? == Some(true) => {
                    sliding_window(fields)?
                }
                Family::Qwen2 | Family::Qwen3 => None,
            },
            first_window_layer: if is_qwen { fields.get("max_window_layers")?.unwrap_or(28) } else { 0 },
            layer_windows: if is_qwen { layer_windows(fields, n_layers)? } else { None },
            bos_token_id: fields.get("bos_token_id")?,
            eos_token_ids: fields.get("eos_token_id")?.map(OneOrMany::into_vec).unwrap_or_default(),
        })
    }

    /// Reads `config.json` in `dir` (or makes it of a GGUF file's metadata), and adds the stop tokens of
    /// `generation_config.json` where there is one.
    pub fn open(dir: &Path) -> Result<Self> {
        let text = read_file(dir, CONFIG_FILE)?.ok_or_else(|| {
            let missing = std::io::Error::new(std::io::ErrorKind::NotFound, "there is no such file; is this a model?");
            Error::io(dir.join(CONFIG_FILE), missing)
        })?;
        let mut config = Self::from_json(&text)?;
        if let Some(text) = read_file(dir, GENERATION_FILE)? {
            config.add_generation_config(&text)?;
        }
        Ok(config)
    }

    /// Adds the stop tokens of a `generation_config.json`'s text.
    pub fn add_generation_config(&mut self, text: &str) -> Result<()> {
        let map = serde_json::from_str(text).map_err(|e| Error::format(GENERATION_FILE, e.to_string()))?;
        let fields = Fields { file: GENERATION_FILE, map: &map };
        for id in fields.get("eos_token_id")?.map(OneOrMany::into_vec).unwrap_or_default() {
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

fn check_size(field: &str, size: usize) -> Result<usize> {
    match size {
        1..SIZE_LIMIT => Ok(size),
        _ => Err(Error::format(CONFIG_FILE, format!("`{field}` is {size}; expected 1 to {}", SIZE_LIMIT - 1))),
    }
}

fn check_quantization(fields: Fields) -> Result<()> {
    let Some(quantization) = fields.object("quantization_config")? else { return Ok(()) };
    match quantization.get("quant_method")?.unwrap_or("unknown") {
        "codecllm" => Ok(()),
        method => Err(Error::unsupported(
            CONFIG_FILE,
            format!("the weights are quantized with `{method}`; take the model's BF16, F16 or F32 checkpoint"),
        )),
    }
}

/// The window of a family that has one: absent means 4096 there, and `null` none.
fn sliding_window(fields: Fields) -> Result<Option<usize>> {
    match fields.get("sliding_window")? {
        Some(0) => Err(Error::format(CONFIG_FILE, "`sliding_window` is 0; expected a positive number of tokens")),
        Some(window) => Ok(Some(window)),
        None if fields.map.contains_key("sliding_window") => Ok(None),
        None => Ok(Some(4096)),
    }
}

fn layer_windows(fields: Fields, n_layers: usize) -> Result<Option<Vec<bool>>> {
    let Some(types) = fields.get::<Vec<String>>("layer_types")? else { return Ok(None) };
    if types.len() != n_layers {
        return Err(Error::format(
            CONFIG_FILE,
            format!("`layer_types` lists {} layers, but `num_hidden_layers` is {n_layers}", types.len()),
        ));
    }
    let windows = types.iter().map(|layer_type| match layer_type.as_str() {
        "full_attention" => Ok(false),
        "sliding_attention" => Ok(true),
        other => Err(Error::unsupported(
            CONFIG_FILE,
            format!("layer type `{other}` is not supported; supported are full_attention, sliding_attention"),
        )),
    });
    windows.collect::<Result<_>>().map(Some)
}

fn rope(fields: Fields, max_positions: usize) -> Result<(f64, RopeScaling)> {
    let none = Map::new();
    let rope = match fields.object("rope_parameters")? {
        Some(rope) => rope,
        None => fields.object("rope_scaling")?.unwrap_or(Fields { map: &none, ..fields }),
    };
    // Older files say `type`; some carry both.
    let kind: &str = match rope.get("rope_type")? {
        Some(kind) => kind,
        None => rope.get("type")?.unwrap_or("default"),
    };
    let either = |name| -> Result<_> { Ok(rope.get::<f64>(name)?.or(fields.get(name)?)) };
    let positive = |name: &str, value: Option<f64>| match value {
        Some(value) if value > 0.0 && value.is_finite() => Ok(value),
        Some(value) => Err(Error::format(CONFIG_FILE, format!("`{name}` is {value}; it must be positive"))),
        None => Err(Error::format(CONFIG_FILE, format!("rope type `{kind}` needs `{name}`"))),
    };
    let setting = |name| positive(name, rope.get(name)?);
    let theta = positive("rope_theta", either("rope_theta")?.or(Some(10_000.0)))?;
    let rotated = either("partial_rotary_factor")?.unwrap_or(1.0);
    if rotated != 1.0 {
        return Err(Error::unsupported(
            CONFIG_FILE,
            format!("partial_rotary_factor {rotated} is not supported; whole heads are rotated"),
        ));
    }
    let scaling = match kind {
        "default" => RopeScaling::Default,
        "linear" => RopeScaling::Linear { factor: setting("factor")? },
        "llama3" => {
            let (low, high) = (setting("low_freq_factor")?, setting("high_freq_factor")?);
            if high <= low {
                return Err(Error::format(
                    CONFIG_FILE,
                    format!("`high_freq_factor` ({high}) must exceed `low_freq_factor` ({low})"),
                ));
            }
            let name = "original_max_position_embeddings";
            RopeScaling::Llama3 {
                factor: setting("factor")?,
                low_freq_factor: low,
                high_freq_factor: high,
                original_context: positive(name, rope.get(name)?.or(Some(max_positions as f64)))?,
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

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// A small Llama's configuration with some fields changed.
    fn config(changes: Value) -> Result<Config> {
        let mut config = json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 100, "hidden_size": 64,
            "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
        });
        for (field, value) in changes.as_object().unwrap() {
            config[field] = value.clone();
        }
        Config::from_json(&config.to_string())
    }

    #[track_caller]
    fn assert_refused(changes: Value, words: &[&str]) {
        let error = config(changes).unwrap_err().to_string();
        assert!(words.iter().all(|word| error.contains(word)), "{error}");
    }

    #[test]
    fn llama() {
        let c = config(json!({})).unwrap();
        assert_eq!((c.head_dim, c.q_width(), c.kv_width()), (16, 64, 32));
        assert_eq!((c.rope_theta, c.rope_scaling), (10_000.0, RopeScaling::Default));
        assert!(!c.tied_embeddings && !c.qkv_bias && !c.output_bias && !c.mlp_bias && !c.qk_norm);
        assert_eq!((c.window(0), c.eos_token_ids.len()), (None, 0));

        let c = config(json!({
            "head_dim": 24, "attention_bias": true, "mlp_bias": true, "tie_word_embeddings": true,
            "num_key_value_heads": null, "sliding_window": 8,
        }))
        .unwrap();
        assert_eq!((c.head_dim, c.kv_width(), c.window(0)), (24, 96, None));
        assert!(c.tied_embeddings && c.qkv_bias && c.output_bias && c.mlp_bias);
    }

    #[test]
    fn mistral_windows() {
        let mistral = |changes: Value| {
            let mut fields = json!({"architectures": ["MistralForCausalLM"], "model_type": "mistral"});
            fields.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
            config(fields).unwrap().window(2)
        };
        assert_eq!(mistral(json!({"sliding_window": 7})), Some(7));
        assert_eq!(mistral(json!({"sliding_window": null})), None);
        assert_eq!(mistral(json!({})), Some(4096));
        assert_refused(
            json!({"architectures": ["MistralForCausalLM"], "sliding_window": 0}),
            &["`sliding_window` is 0", "positive"],
        );
    }

    #[test]
    fn qwen2_biases_and_windows() {
        let fields = json!({"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "sliding_window": 9});
        let with = |changes: Value| {
            let mut fields = fields.clone();
            fields.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
            config(fields).unwrap()
        };
        let c = with(json!({}));
        assert!(c.qkv_bias && !c.output_bias && !c.mlp_bias && !c.qk_norm);
        assert_eq!(c.window(2), None);
        let c = with(json!({"use_sliding_window": true, "max_window_layers": 2}));
        assert_eq!((c.window(1), c.window(2)), (None, Some(9)));
        let types = ["sliding_attention", "full_attention", "full_attention"];
        let c = with(json!({"use_sliding_window": true, "layer_types": types}));
        assert_eq!((c.window(0), c.window(2)), (Some(9), None));
    }

    #[test]
    fn qwen3_norms_and_head_dim() {
        let c = config(json!({"architectures": null, "model_type": "qwen3"})).unwrap();
        assert!(c.qk_norm && !c.qkv_bias);
        assert_eq!((c.family, c.head_dim), (Family::Qwen3, 128));
    }

    #[test]
    fn both_spellings_of_rope_settings() {
        let llama3 =
            RopeScaling::Llama3 { factor: 32.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_context: 8192.0 };
        let settings = json!({
            "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3",
        });
        let c = config(json!({"rope_theta": 500000.0, "rope_scaling": settings, "torch_dtype": "bfloat16"})).unwrap();
        assert_eq!((c.rope_theta, c.rope_scaling), (500_000.0, llama3));
        let mut newer = settings.clone();
        newer["rope_theta"] = json!(500000);
        let c = config(json!({"rope_parameters": newer, "dtype": "bfloat16"})).unwrap();
        assert_eq!((c.rope_theta, c.rope_scaling), (500_000.0, llama3));

        for scaling in
            [json!({"type": "linear", "factor": 4.0}), json!({"type": "linear", "rope_type": "linear", "factor": 4.0})]
        {
            let c = config(json!({"rope_scaling": scaling})).unwrap();
            assert_eq!(c.rope_scaling, RopeScaling::Linear { factor: 4.0 });
            assert_eq!(c.inverse_frequencies()[0], 0.25);
        }
    }

    #[test]
    fn llama3_blends_frequencies() {
        let c = config(json!({
            "head_dim": 64, "rope_theta": 500000.0,
            "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                             "original_max_position_embeddings": 8192},
        }))
        .unwrap();
        let frequencies = c.inverse_frequencies();
        let plain = |i: i32| 500_000f64.powf(-f64::from(i) / 32.0);
        let turns = |i: i32| 8192.0 * plain(i) / std::f64::consts::TAU;
        let blend = |i: i32| (turns(i) - 1.0) / 3.0;
        assert!(turns(10) > 4.0 && turns(16) > 1.0 && turns(16) < 4.0 && turns(30) < 1.0);
        assert_eq!(frequencies[10], plain(10) as f32);
        assert_eq!(frequencies[16], (plain(16) * (blend(16) + (1.0 - blend(16)) / 8.0)) as f32);
        assert_eq!(frequencies[30], (plain(30) / 8.0) as f32);
    }

    #[test]
    fn stop_tokens_of_both_files() {
        let mut c = config(json!({"eos_token_id": 5, "bos_token_id": 1})).unwrap();
        c.add_generation_config(r#"{"eos_token_id": [7, 5]}"#).unwrap();
        assert_eq!((c.eos_token_ids, c.bos_token_id), (vec![5, 7], Some(1)));
    }

    #[test]
    fn what_is_not_supported_is_named() {
        assert_refused(json!({"architectures": ["GemmaForCausalLM"]}), &["GemmaForCausalLM", "Qwen3ForCausalLM"]);
        assert_refused(json!({"architectures": null, "model_type": "mixtral"}), &["mixtral", "LlamaForCausalLM"]);
        assert_refused(json!({"architectures": null, "model_type": null}), &["architectures", "model_type"]);
        assert_refused(json!({"hidden_act": "gelu"}), &["gelu", "silu"]);
        assert_refused(json!({"rope_scaling": {"type": "yarn", "factor": 2.0}}), &["yarn", "llama3"]);
        assert_refused(json!({"rope_scaling": {"type": "dynamic", "factor": 2.0}}), &["dynamic"]);
        assert_refused(json!({"partial_rotary_factor": 0.5}), &["partial_rotary_factor 0.5"]);
        assert_refused(json!({"quantization_config": {"quant_method": "gptq"}}), &["gptq", "BF16"]);
        config(json!({"quantization_config": {"quant_method": "codecllm"}})).unwrap();
    }

    #[test]
    fn what_is_wrong_is_named() {
        assert_refused(json!({"hidden_size": null}), &["hidden_size", "missing"]);
        assert_refused(json!({"hidden_size": "64"}), &["hidden_size", "string"]);
        assert_refused(json!({"rope_scaling": "linear"}), &["rope_scaling", "object"]);
        assert_refused(
            json!({"architectures": ["Qwen2ForCausalLM"], "layer_types": ["full_attention"]}),
            &["layer_types", "1 layers", "3"],
        );
        assert_refused(json!({"hidden_size": 66}), &["hidden_size (66)", "head_dim"]);
        assert_refused(json!({"head_dim": 15}), &["head_dim (15)", "even"]);
        assert_refused(json!({"num_key_value_heads": 3}), &["(4)", "(3)"]);
        assert_refused(json!({"num_key_value_heads": 0}), &["(0)"]);
        assert_refused(json!({"vocab_size": 0}), &["`vocab_size` is 0"]);
        assert_refused(json!({"num_hidden_layers": 1u64 << 40}), &["num_hidden_layers"]);
        assert_refused(json!({"rope_scaling": {"type": "linear"}}), &["linear", "factor"]);
        assert_refused(json!({"rope_theta": -1.0}), &["rope_theta"]);
        assert!(Config::from_json("[]").is_err() && Config::from_json("{").is_err());
    }
}
