//! Models from GGUF files run as the checkpoints that they were made of, and their tokenizers cut texts the same way.

#[path = "../../codec/tests/common/gguf.rs"]
mod gguf;

use codecllm_codec::checkpoint::{Dtype, Tensor};
use codecllm_engine::{
    ChatTemplate, Config, GenerateOptions, LoadOptions, Logits, Message, Model, Tokenizer, generate,
};
use gguf::{Value, tensors};
use half::{bf16, f16};
use serde_json::Value as Json;
use std::collections::HashMap;
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn json(path: &Path) -> Json {
    serde_json::from_str(&fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))).unwrap()
}

fn options() -> LoadOptions {
    LoadOptions { threads: 2, ..LoadOptions::default() }
}

fn as_f16(tensor: &Tensor) -> Tensor {
    let values = tensor.data.as_chunks::<2>().0.iter().map(|b| f16::from_f32(bf16::from_le_bytes(*b).to_f32()));
    let data: Vec<u8> = values.flat_map(f16::to_le_bytes).collect();
    Tensor { dtype: Dtype::F16, data: data.into(), ..tensor.clone() }
}

fn logits(model: &Model, tokens: &[u32]) -> Vec<f32> {
    let mut cache = model.new_cache(tokens.len()).unwrap();
    model.forward(tokens, &mut cache, Logits::All).unwrap()
}

#[test]
fn every_family_runs_as_its_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let tokens: Vec<u32> = (0..60).map(|i| i * 37 % 96).collect();
    for name in [
        "llama-gqa",
        "llama-bias",
        "llama-old-spelling",
        "llama-rope-linear",
        "llama-rope-llama3",
        "mistral-window",
        "qwen2",
        "qwen3",
    ] {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name);
        let config = json(&source.join("config.json"));
        for dtype in [Dtype::Bf16, Dtype::F16] {
            let tensors: Vec<Tensor> = match dtype {
                Dtype::F16 => tensors(&source).iter().map(as_f16).collect(),
                _ => tensors(&source),
            };
            let path = dir.path().join(format!("{name}.gguf"));
            fs::write(&path, gguf::from_model(&config, &tensors).to_bytes()).unwrap();
            let by_name: HashMap<String, Tensor> = tensors.iter().map(|t| (t.name.clone(), t.clone())).collect();
            let expected = Model::from_source(Config::open(&source).unwrap(), &by_name, &options()).unwrap();
            let found = Model::load(&path, &options()).unwrap();
            let expected = logits(&expected, &tokens);
            let found = logits(&found, &tokens);
            if name == "llama-rope-llama3" {
                // Its scaling is inferred from divisors in float32.
                let worst = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(worst < 1e-4, "{name}: {worst}");
            } else {
                assert!(found == expected, "{name}, {dtype}: the logits differ");
            }
        }
    }
}

#[test]
fn the_scaling_of_llama_3_1_comes_back_exactly() {
    let dir = tempfile::tempdir().unwrap();
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/llama-gqa");
    for (context, factor) in [(8192, 8.0), (8192, 32.0), (4096, 4.0)] {
        let mut config = json(&source.join("config.json"));
        for (key, value) in
            [("hidden_size", 256), ("head_dim", 128), ("num_attention_heads", 2), ("num_key_value_heads", 1)]
        {
            config[key] = value.into();
        }
        config["rope_parameters"] = serde_json::json!({
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": context,
        });
        let embedding = Tensor {
            name: "model.embed_tokens.weight".into(),
            dtype: Dtype::Bf16,
            shape: vec![96, 4],
            data: vec![0; 768].into(),
        };
        let path = dir.path().join("m.gguf");
        fs::write(&path, gguf::from_model(&config, &[embedding]).to_bytes()).unwrap();
        let (found, expected) = (Config::open(&path).unwrap(), Config::from_json(&config.to_string()).unwrap());
        assert_eq!((found.rope_scaling, found.rope_theta), (expected.rope_scaling, expected.rope_theta));
    }
}

#[test]
fn tales_5m_tells_the_same_tale() {
    let dir = tempfile::tempdir().unwrap();
    let source = root().join("assets/tales-5m");
    let tokenizer = json(&source.join("tokenizer.json"));
    let mut file = gguf::from_model(&json(&source.join("config.json")), &tensors(&source));
    gguf::add_tokenizer(&mut file, &tokenizer, "gpt-2");
    let path = dir.path().join("tales-5m.gguf");
    fs::write(&path, file.to_bytes()).unwrap();

    let (expected, found) = (Tokenizer::open(&source).unwrap(), Tokenizer::open(&path).unwrap());
    assert_eq!((found.bos(), found.eos()), (expected.bos(), expected.eos()));
    let tale = fs::read_to_string(root().join("assets/tale.txt")).unwrap();
    for text in [&tale, "<|endoftext|>Once upon", "  naïve 漢字 🦀 — “quoted”\n\n 3.14 don't", ""] {
        let tokens = expected.encode(text, true).unwrap();
        assert_eq!(found.encode(text, true).unwrap(), tokens, "{text:?}");
        assert_eq!(found.decode(&tokens).unwrap(), expected.decode(&tokens).unwrap());
    }

    // The archive is lossless, so it stands for the checkpoint; the products differ, and with them the last bits.
    let by_name: HashMap<String, Tensor> = tensors(&source).into_iter().map(|t| (t.name.clone(), t)).collect();
    let original = Model::from_source(Config::open(&source).unwrap(), &by_name, &options()).unwrap();
    let model = Model::load(&path, &options()).unwrap();
    let tokens = expected.encode(&tale, true).unwrap();
    assert!(logits(&model, &tokens[..200]) == logits(&original, &tokens[..200]), "the logits differ");
    let prompt = found.encode_prompt("Once upon a time").unwrap();
    let options = GenerateOptions { max_tokens: 40, ..Default::default() };
    let tell = |model| generate(model, &found, &prompt, &options, |_| ControlFlow::Continue(())).unwrap().text;
    assert_eq!(tell(&model), tell(&original));
}

/// `scripts/gguf_fixtures.py` wrote both files.
#[test]
fn a_sentence_piece_vocabulary_cuts_texts_as_sentence_piece_does() {
    let data = root().join("codec/tests/data");
    let tokenizer = Tokenizer::open(&data.join("gguf-spm.gguf")).unwrap();
    assert_eq!((tokenizer.bos(), tokenizer.eos()), (Some(1), Some(2)));
    for known in json(&data.join("gguf-spm.json")).as_array().unwrap() {
        let text = known["text"].as_str().unwrap();
        let tokens: Vec<u32> = known["tokens"].as_array().unwrap().iter().map(|t| t.as_u64().unwrap() as u32).collect();
        assert_eq!(tokenizer.encode(text, false).unwrap(), tokens, "{text:?}");
        assert_eq!(tokenizer.encode(text, true).unwrap(), [&[1], tokens.as_slice()].concat());
        assert_eq!(tokenizer.decode(&tokens).unwrap(), text);
    }
    let template = ChatTemplate::open(&data.join("gguf-spm.gguf")).unwrap();
    assert_eq!(template.render(&[Message::new("user", "hi")]).unwrap(), "<s>[user] hi");
}

/// A vocabulary of bytes and of two- and three-digit numbers: how digits and words are cut shows the pre-tokenizer.
#[test]
fn byte_level_vocabularies_are_cut_by_their_own_expressions() {
    let source = root().join("assets/tales-5m");
    let tokenizer = json(&source.join("tokenizer.json"));
    let mut alphabet: Vec<(String, u64)> = tokenizer["model"]["vocab"]
        .as_object()
        .unwrap()
        .iter()
        .filter(|(token, _)| token.chars().count() == 1)
        .map(|(token, id)| (token.clone(), id.as_u64().unwrap()))
        .collect();
    alphabet.sort_by_key(|(_, id)| *id);
    let mut tokens: Vec<String> = alphabet.into_iter().map(|(token, _)| token).collect();
    let mut merges = Vec::new();
    for (a, b) in [("1", "2"), ("12", "3"), ("123", "4"), (".", "."), ("a", "'"), ("Ġ", "a")] {
        tokens.push(format!("{a}{b}"));
        merges.push(format!("{a} {b}"));
    }
    tokens.push("<|end|>".into());
    let n = tokens.len();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    let open = |pre: &str| {
        let config = json(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/llama-gqa/config.json"));
        let embedding = Tensor {
            name: "model.embed_tokens.weight".into(),
            dtype: Dtype::Bf16,
            shape: vec![n, 4],
            data: vec![0; 8 * n].into(),
        };
        let mut file = gguf::from_model(&config, &[embedding]);
        file.values.retain(|(key, _)| !key.starts_with("tokenizer."));
        let mut types = vec![1; n];
        types[n - 1] = 3;
        file.value("tokenizer.ggml.model", Value::Text("gpt2".into()));
        file.value("tokenizer.ggml.pre", Value::Text(pre.into()));
        file.value("tokenizer.ggml.tokens", Value::Texts(tokens.clone()));
        file.value("tokenizer.ggml.token_type", Value::Integers(types));
        file.value("tokenizer.ggml.merges", Value::Texts(merges.clone()));
        file.value("tokenizer.ggml.eos_token_id", Value::U32(n as u32 - 1));
        fs::write(&path, file.to_bytes()).unwrap();
        Tokenizer::open(&path)
    };
    let cut = |pre: &str, text: &str| -> Vec<String> {
        let tokenizer = open(pre).unwrap();
        let ids = tokenizer.encode(text, false).unwrap();
        assert_eq!(tokenizer.decode(&ids).unwrap(), text.replace("<|end|>", ""), "{pre}");
        ids.iter().map(|id| tokens[*id as usize].clone()).collect()
    };
    assert_eq!(cut("gpt-2", "1234<|end|>1"), ["1234", "<|end|>", "1"]);
    assert_eq!(cut("llama-bpe", "1234"), ["123", "4"]);
    for pre in ["qwen2", "tekken", "smollm"] {
        assert_eq!(cut(pre, "1234"), ["1", "2", "3", "4"], "{pre}");
    }
    for pre in ["gpt-2", "llama-bpe", "qwen2", "tekken", "smollm"] {
        assert_eq!(cut(pre, " a.."), ["Ġa", ".."], "{pre}");
    }
    let error = open("klingon").err().unwrap().to_string();
    assert!(error.contains("`klingon`") && error.contains("llama-bpe"), "{error}");
}
