//! Writes GGUF files: any, and those that llama.cpp's converter would make of a checkpoint.
#![allow(dead_code)] // each test binary uses its own part

use codecllm_codec::quantize::Codes;
use codecllm_codec::{Checkpoint, Checks, Cpu, Dtype, EncodedTensor, Tensor};
use half::{bf16, f16};
use serde_json::Value as Json;
use std::path::Path;

/// A metadata value.
#[derive(Clone)]
pub enum Value {
    U32(u32),
    F32(f32),
    Bool(bool),
    Text(String),
    Texts(Vec<String>),
    Floats(Vec<f32>),
    Integers(Vec<i32>),
}

/// A tensor: name, shape (outermost first), number of the element type, bytes.
#[derive(Clone)]
pub struct Entry {
    pub name: String,
    pub shape: Vec<u64>,
    pub kind: u32,
    pub data: Vec<u8>,
}

/// A file in the making.
#[derive(Clone)]
pub struct File {
    pub version: u32,
    pub alignment: usize,
    pub values: Vec<(String, Value)>,
    pub tensors: Vec<Entry>,
}

impl File {
    pub fn new(architecture: &str) -> Self {
        let values = vec![("general.architecture".into(), Value::Text(architecture.into()))];
        Self { version: 3, alignment: 32, values, tensors: Vec::new() }
    }

    pub fn value(&mut self, key: &str, value: Value) {
        self.values.push((key.into(), value));
    }

    pub fn replace(&mut self, key: &str, value: Value) {
        self.values.retain(|(k, _)| k != key);
        self.value(key, value);
    }

    pub fn tensor(&mut self, name: &str, shape: &[usize], kind: u32, data: Vec<u8>) {
        let shape = shape.iter().map(|&n| n as u64).collect();
        self.tensors.push(Entry { name: name.into(), shape, kind, data });
    }

    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.values.len() as u64).to_le_bytes());
        for (key, value) in &self.values {
            text(&mut out, key);
            value.write(&mut out);
        }
        let mut offset = 0usize;
        for tensor in &self.tensors {
            text(&mut out, &tensor.name);
            out.extend((tensor.shape.len() as u32).to_le_bytes());
            tensor.shape.iter().rev().for_each(|n| out.extend(n.to_le_bytes()));
            out.extend(tensor.kind.to_le_bytes());
            out.extend((offset as u64).to_le_bytes());
            offset += tensor.data.len().next_multiple_of(self.alignment);
        }
        for tensor in &self.tensors {
            out.resize(out.len().next_multiple_of(self.alignment), 0);
            out.extend(&tensor.data);
        }
        out
    }
}

impl Value {
    fn write(&self, out: &mut Vec<u8>) {
        let array = |out: &mut Vec<u8>, kind: u32, len: usize| {
            out.extend(9u32.to_le_bytes());
            out.extend(kind.to_le_bytes());
            out.extend((len as u64).to_le_bytes());
        };
        match self {
            Self::U32(n) => {
                out.extend(4u32.to_le_bytes());
                out.extend(n.to_le_bytes());
            }
            Self::F32(x) => {
                out.extend(6u32.to_le_bytes());
                out.extend(x.to_le_bytes());
            }
            Self::Bool(b) => {
                out.extend(7u32.to_le_bytes());
                out.push((*b).into());
            }
            Self::Text(t) => {
                out.extend(8u32.to_le_bytes());
                text(out, t);
            }
            Self::Texts(all) => {
                array(out, 8, all.len());
                all.iter().for_each(|t| text(out, t));
            }
            Self::Floats(all) => {
                array(out, 6, all.len());
                all.iter().for_each(|x| out.extend(x.to_le_bytes()));
            }
            Self::Integers(all) => {
                array(out, 5, all.len());
                all.iter().for_each(|x| out.extend(x.to_le_bytes()));
            }
        }
    }
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

/// The tensors of a checkpoint or a lossless archive, as BF16.
pub fn tensors(dir: &Path) -> Vec<Tensor> {
    let checkpoint = Checkpoint::open(dir).unwrap();
    let plain = |name: &str| {
        let tensor = checkpoint.tensor(name).unwrap();
        if !EncodedTensor::is_encoded(&tensor.data) {
            return tensor;
        }
        let encoded = EncodedTensor::parse(tensor.data, Checks::Full).unwrap();
        let Codes::U16(codes) = encoded.decode_codes(Cpu::detect()).unwrap() else { panic!("{name} is not lossless") };
        let data: Vec<u8> = codes.iter().flat_map(|code| code.to_le_bytes()).collect();
        Tensor {
            name: name.into(),
            dtype: Dtype::Bf16,
            shape: vec![encoded.n_rows(), encoded.n_cols()],
            data: data.into(),
        }
    };
    checkpoint.names().map(plain).collect()
}

/// What llama.cpp's `convert_hf_to_gguf.py` makes of a model of the Llama, Mistral, Qwen2 or Qwen3 family: vectors widened to
/// F32, query and key rows of the `llama` architecture in the order of its rotation, all else as it is.
pub fn from_model(config: &Json, tensors: &[Tensor]) -> File {
    let family = config["model_type"].as_str().unwrap();
    let architecture = if family == "mistral" { "llama" } else { family };
    let mut file = File::new(architecture);
    let size = |name: &str| config[name].as_u64().unwrap() as u32;
    let n_heads = size("num_attention_heads");
    let n_kv_heads = size("num_key_value_heads");
    let head_dim = config["head_dim"].as_u64().map_or(size("hidden_size") / n_heads, |n| n as u32);
    let mut value = |key: &str, value: Value| file.value(&format!("{architecture}.{key}"), value);
    value("block_count", Value::U32(size("num_hidden_layers")));
    value("context_length", Value::U32(size("max_position_embeddings")));
    value("embedding_length", Value::U32(size("hidden_size")));
    value("feed_forward_length", Value::U32(size("intermediate_size")));
    value("attention.head_count", Value::U32(n_heads));
    value("attention.head_count_kv", Value::U32(n_kv_heads));
    value("attention.key_length", Value::U32(head_dim));
    value("attention.value_length", Value::U32(head_dim));
    value("rope.dimension_count", Value::U32(head_dim));
    value("attention.layer_norm_rms_epsilon", Value::F32(config["rms_norm_eps"].as_f64().unwrap() as f32));
    if let Some(window) = config["sliding_window"].as_u64() {
        value("attention.sliding_window", Value::U32(window as u32));
    }
    let rope = [&config["rope_parameters"], &config["rope_scaling"], config];
    let of_rope = |name: &str| rope.iter().find_map(|r| r.get(name).filter(|v| !v.is_null()).cloned());
    let theta = of_rope("rope_theta").and_then(|v| v.as_f64()).unwrap_or(1e4);
    value("rope.freq_base", Value::F32(theta as f32));
    let number = |name: &str| of_rope(name).unwrap().as_f64().unwrap();
    match of_rope("rope_type").or(of_rope("type")).as_ref().and_then(|kind| kind.as_str()) {
        Some("linear") => {
            value("rope.scaling.type", Value::Text("linear".into()));
            value("rope.scaling.factor", Value::F32(number("factor") as f32));
        }
        Some("llama3") => {
            let (factor, context) = (number("factor"), number("original_max_position_embeddings"));
            let (low, high) = (number("low_freq_factor"), number("high_freq_factor"));
            let divisors = (0..head_dim / 2).map(|i| {
                let frequency = theta.powf(-f64::from(2 * i) / f64::from(head_dim));
                let wavelength = std::f64::consts::TAU / frequency;
                let smooth = (context / wavelength - low) / (high - low);
                let divisor = match wavelength {
                    w if w < context / high => 1.0,
                    w if w > context / low => factor,
                    _ => 1.0 / ((1.0 - smooth) / factor + smooth),
                };
                divisor as f32
            });
            let data = divisors.flat_map(f32::to_le_bytes).collect();
            file.tensor("rope_freqs.weight", &[head_dim as usize / 2], 0, data);
        }
        _ => {}
    }
    if let Some(bos) = config["bos_token_id"].as_u64() {
        file.value("tokenizer.ggml.bos_token_id", Value::U32(bos as u32));
    }
    if let Some(eos) = config["eos_token_id"].as_u64() {
        file.value("tokenizer.ggml.eos_token_id", Value::U32(eos as u32));
    }
    for tensor in tensors {
        let name = tensor.name.replace("model.layers.", "blk.");
        let name = [
            ("model.embed_tokens", "token_embd"),
            ("lm_head", "output"),
            ("model.norm", "output_norm"),
            ("input_layernorm", "attn_norm"),
            ("post_attention_layernorm", "ffn_norm"),
            ("self_attn.q_norm", "attn_q_norm"),
            ("self_attn.k_norm", "attn_k_norm"),
            ("self_attn.q_proj", "attn_q"),
            ("self_attn.k_proj", "attn_k"),
            ("self_attn.v_proj", "attn_v"),
            ("self_attn.o_proj", "attn_output"),
            ("mlp.gate_proj", "ffn_gate"),
            ("mlp.up_proj", "ffn_up"),
            ("mlp.down_proj", "ffn_down"),
        ]
        .into_iter()
        .fold(name, |name, (from, to)| name.replace(from, to));
        let heads = match (architecture, name.split('.').nth(2)) {
            ("llama", Some("attn_q")) => Some(n_heads as usize),
            ("llama", Some("attn_k")) => Some(n_kv_heads as usize),
            _ => None,
        };
        let data = heads.map_or(tensor.data.to_vec(), |heads| rotated(&tensor.data, tensor.shape[0], heads));
        match (tensor.shape.len(), tensor.dtype) {
            (1, dtype) => {
                let values = data.as_chunks::<2>().0.iter().map(|b| match dtype {
                    Dtype::F16 => f16::from_le_bytes(*b).to_f32(),
                    _ => bf16::from_le_bytes(*b).to_f32(),
                });
                file.tensor(&name, &tensor.shape, 0, values.flat_map(f32::to_le_bytes).collect());
            }
            (_, Dtype::F32) => file.tensor(&name, &tensor.shape, 0, data),
            (_, Dtype::F16) => file.tensor(&name, &tensor.shape, 1, data),
            (_, dtype) => {
                assert_eq!(dtype, Dtype::Bf16);
                file.tensor(&name, &tensor.shape, 30, data);
            }
        }
    }
    file
}

/// `reshape(heads, 2, head_dim / 2, columns).swapaxes(1, 2)`
fn rotated(data: &[u8], n_rows: usize, heads: usize) -> Vec<u8> {
    let (row_bytes, half) = (data.len() / n_rows, n_rows / heads / 2);
    let mut out = Vec::new();
    for head in 0..heads {
        for j in 0..half {
            for p in 0..2 {
                let row = (head * 2 + p) * half + j;
                out.extend(&data[row * row_bytes..][..row_bytes]);
            }
        }
    }
    out
}

/// Adds the vocabulary of a byte-level BPE `tokenizer.json`.
pub fn add_tokenizer(file: &mut File, tokenizer: &Json, pre: &str) {
    let vocab = tokenizer["model"]["vocab"].as_object().unwrap();
    let mut tokens = vec![String::new(); vocab.len()];
    vocab.iter().for_each(|(token, id)| tokens[id.as_u64().unwrap() as usize] = token.clone());
    let mut types = vec![1; tokens.len()];
    for added in tokenizer["added_tokens"].as_array().unwrap() {
        types[added["id"].as_u64().unwrap() as usize] = 3;
    }
    let merges = tokenizer["model"]["merges"].as_array().unwrap().iter();
    let merges = merges.map(|m| format!("{} {}", m[0].as_str().unwrap(), m[1].as_str().unwrap())).collect();
    file.value("tokenizer.ggml.model", Value::Text("gpt2".into()));
    file.value("tokenizer.ggml.pre", Value::Text(pre.into()));
    file.value("tokenizer.ggml.tokens", Value::Texts(tokens));
    file.value("tokenizer.ggml.token_type", Value::Integers(types));
    file.value("tokenizer.ggml.merges", Value::Texts(merges));
}
