//! GGUF files as a source: values bit for bit those of llama.cpp's own package, archives that are proven against the file, hostile
//! bytes.

#[path = "common/gguf.rs"]
mod gguf;

use codecllm_codec::archive::{CompressOptions, PROVENANCE_FILE, Provenance, Silent, Status, compress, verify};
use codecllm_codec::checkpoint::{SINGLE_FILE, read_file};
use codecllm_codec::gguf::Gguf;
use codecllm_codec::gguf::blocks::BlockType;
use codecllm_codec::{Checkpoint, Cpu, Dtype, EncodeOptions, Error, Format, Tensor};
use gguf::{File, Value};
use half::{bf16, f16};
use safetensors::SafeTensors;
use serde_json::{Value as Json, json};
use std::fs;
use std::path::Path;
use tempfile::TempDir;

fn data(name: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name);
    fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// `scripts/gguf_fixtures.py` wrote both files.
#[test]
fn every_type_agrees_bit_for_bit_with_the_package_of_llama_cpp() {
    let bytes = data("gguf-types.gguf");
    let expected = data("gguf-types.expected.safetensors");
    let expected = SafeTensors::deserialize(&expected).unwrap();
    let file = Gguf::parse("gguf-types.gguf", &bytes).unwrap();
    assert_eq!(file.tensors().len(), BlockType::ALL.len());
    for tensor in file.tensors() {
        assert_eq!(tensor.name, tensor.block_type.name());
        assert_eq!(tensor.shape, [2, 256]);
        let mut values = vec![0f32; 512];
        tensor.block_type.dequantize(&bytes[tensor.range.start as usize..tensor.range.end as usize], &mut values);
        let expected = expected.tensor(&tensor.name).unwrap();
        let expected = expected.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b));
        for (i, (found, expected)) in values.iter().zip(expected).enumerate() {
            // Zeros of either sign are the same weight.
            assert!(
                found.to_bits() == expected.to_bits() || (*found == 0.0 && expected == 0.0),
                "{} {i}: {found} {expected}",
                tensor.name
            );
        }
    }
}

fn config() -> Json {
    json!({
        "model_type": "llama", "vocab_size": 40, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
        "bos_token_id": 1, "eos_token_id": 2,
    })
}

fn tensor(name: &str, shape: &[usize], dtype: Dtype) -> Tensor {
    let mut state = name.bytes().fold(7u64, |s, b| s.wrapping_mul(31).wrapping_add(b.into()));
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    let values = (0..shape.iter().product::<usize>()).map(|_| next());
    let data: Vec<u8> = match dtype {
        Dtype::Bf16 => values.flat_map(|v| bf16::from_f32(v).to_le_bytes()).collect(),
        Dtype::F16 => values.flat_map(|v| f16::from_f32(v).to_le_bytes()).collect(),
        _ => values.flat_map(f32::to_le_bytes).collect(),
    };
    Tensor { name: name.into(), dtype, shape: shape.into(), data: data.into() }
}

fn tensors(dtype: Dtype) -> Vec<Tensor> {
    let layer = |name: &str, shape: &[usize]| tensor(&format!("model.layers.0.{name}.weight"), shape, dtype);
    vec![
        tensor("model.embed_tokens.weight", &[40, 32], dtype),
        layer("self_attn.q_proj", &[32, 32]),
        layer("self_attn.k_proj", &[16, 32]),
        layer("self_attn.v_proj", &[16, 32]),
        layer("self_attn.o_proj", &[32, 32]),
        layer("mlp.gate_proj", &[64, 32]),
        layer("mlp.up_proj", &[64, 32]),
        layer("mlp.down_proj", &[32, 64]),
    ]
}

fn write(dir: &TempDir, name: &str, file: &File) -> std::path::PathBuf {
    let path = dir.path().join(name);
    fs::write(&path, file.to_bytes()).unwrap();
    path
}

#[test]
fn tensors_come_under_their_names_in_their_order() {
    let dir = TempDir::new().unwrap();
    for (dtype, version, alignment) in [(Dtype::Bf16, 3, 32), (Dtype::F16, 2, 64), (Dtype::F32, 3, 32)] {
        let mut file = gguf::from_model(&config(), &tensors(dtype));
        (file.version, file.alignment) = (version, alignment);
        file.value("general.alignment", Value::U32(alignment as u32));
        let path = write(&dir, "model.gguf", &file);
        let checkpoint = Checkpoint::open(&path).unwrap();
        assert_eq!(checkpoint.tensors().len(), 8);
        for expected in tensors(dtype) {
            let found = checkpoint.tensor(&expected.name).unwrap();
            assert_eq!((found.dtype, &found.shape), (dtype, &expected.shape), "{}", expected.name);
            assert_eq!(found.data, expected.data, "{}", expected.name);
        }
        let config: Json = serde_json::from_str(&read_file(&path, "config.json").unwrap().unwrap()).unwrap();
        assert_eq!((&config["rms_norm_eps"], &config["rope_theta"]), (&json!(1e-5), &json!(10000.0)));
        assert_eq!((&config["tie_word_embeddings"], &config["bos_token_id"]), (&json!(true), &json!(1)));
    }
}

#[test]
fn quantized_rows_are_dequantized_and_brought_back_to_their_order() {
    // Q8_0 with the scale 1: a weight is its byte. Row r of the original holds r + column.
    let mut file = gguf::from_model(&config(), &tensors(Dtype::F32));
    let query = file.tensors.iter_mut().find(|t| t.name == "blk.0.attn_q.weight").unwrap();
    query.kind = 8;
    query.data.clear();
    for (head, j, p) in (0..2).flat_map(|h| (0..8).flat_map(move |j| (0..2).map(move |p| (h, j, p)))) {
        query.data.extend(f16::ONE.to_le_bytes());
        query.data.extend((0..32).map(|column| (head * 16 + p * 8 + j + column) as u8));
    }
    let dir = TempDir::new().unwrap();
    let checkpoint = Checkpoint::open(write(&dir, "m.gguf", &file)).unwrap();
    let name = "model.layers.0.self_attn.q_proj.weight";
    assert_eq!(checkpoint.info(name).unwrap().stored_bytes(), 32 * 34);
    let found = checkpoint.tensor(name).unwrap();
    let values: Vec<f32> = found.data.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    let expected: Vec<f32> = (0..32).flat_map(|row| (0..32).map(move |column| (row + column) as f32)).collect();
    assert_eq!((found.dtype, values), (Dtype::F32, expected));
}

#[test]
fn archives_are_proven_against_the_file() {
    let dir = TempDir::new().unwrap();
    let path = write(&dir, "model.gguf", &gguf::from_model(&config(), &tensors(Dtype::Bf16)));
    let cpus: Vec<Cpu> = Cpu::available().collect();
    for format in [Format::Bf16, Format::Int8] {
        let archive = dir.path().join(format.name());
        let options = CompressOptions { encode: EncodeOptions { format, ..Default::default() }, ..Default::default() };
        compress(&path, &archive, &options, &Silent).unwrap();
        let report = verify(&archive, Some(&path), &cpus, &Silent).unwrap();
        assert_eq!(report.status, Status::Proven, "{report:#?}");
        let provenance = Provenance::open(&archive).unwrap();
        assert_eq!(provenance.source.iter().map(|f| f.file.as_str()).collect::<Vec<_>>(), ["model.gguf"]);
        assert!(archive.join(SINGLE_FILE).exists() && archive.join(PROVENANCE_FILE).exists());
    }
    let mut other = gguf::from_model(&config(), &tensors(Dtype::Bf16));
    let down = other.tensors.iter_mut().find(|t| t.name == "blk.0.ffn_down.weight").unwrap();
    down.data[9] ^= 0x40;
    let other = write(&dir, "other.gguf", &other);
    let report = verify(&dir.path().join("bf16"), Some(&other), &cpus, &Silent).unwrap();
    assert_eq!(report.status, Status::Wrong);
    assert!(format!("{report:?}").contains("not the one that the archive was made from"), "{report:#?}");
}

/// The least of a file that parses.
fn small() -> File {
    let mut file = File::new("llama");
    file.value("a", Value::U32(7));
    file.value("texts", Value::Texts(vec!["one".into(), "two".into()]));
    file.tensor("t", &[2, 32], 8, vec![1; 68]);
    file
}

#[test]
fn hostile_files_are_refused_with_their_fault() {
    let parse = |bytes: &[u8]| Gguf::parse("x.gguf", bytes);
    let bytes = small().to_bytes();
    parse(&bytes).unwrap();
    for length in 0..bytes.len() {
        assert!(matches!(parse(&bytes[..length]), Err(Error::Format { .. })), "{length} bytes");
    }
    // Whatever byte is changed: an error, or a file whose tensors lie within it.
    for at in 0..bytes.len() {
        for bit in 0..8 {
            let mut changed = bytes.clone();
            changed[at] ^= 1 << bit;
            if let Ok(file) = parse(&changed) {
                assert!(
                    file.tensors().iter().all(|t| t.range.end <= changed.len() as u64 && t.range.start <= t.range.end)
                );
            }
        }
    }

    let refused = |change: &dyn Fn(&mut File), words: &[&str]| {
        let mut file = small();
        change(&mut file);
        let error = parse(&file.to_bytes()).unwrap_err().to_string();
        for word in words.iter().chain(&["x.gguf"]) {
            assert!(error.contains(word), "{error}");
        }
    };
    refused(&|f| f.version = 1, &["version 1", "2 and 3"]);
    refused(&|f| f.version = 3u32.swap_bytes(), &["big-endian"]);
    refused(&|f| f.value("a", Value::U32(8)), &["`a` occurs twice"]);
    refused(&|f| f.value("general.alignment", Value::U32(24)), &["general.alignment", "power of two"]);
    refused(&|f| f.tensors[0].kind = 16, &["`t`", "element type 16", "Q4_K"]);
    refused(&|f| f.tensors[0].shape = vec![3, 32], &["`t`", "truncated"]);
    refused(&|f| f.tensors[0].shape = vec![2, 33], &["`t`", "whole blocks of 32"]);
    refused(&|f| f.tensors[0].shape = vec![0, 32], &["`t`", "whole blocks"]);
    refused(&|f| f.tensors[0].shape = vec![1; 5], &["5 dimensions"]);
    refused(&|f| f.tensors[0].shape = vec![1 << 60, 32], &["more than a file can hold"]);
    refused(&|f| f.tensors[0].shape = vec![u64::MAX, u64::MAX, 32], &["more than a file can hold"]);
    refused(&|f| f.tensors.push(f.tensors[0].clone()), &["`t` occurs twice"]);
    refused(&|f| f.tensors[0].name = String::new(), &["name has 0 bytes"]);

    let changed = |at: usize, with: &[u8]| {
        let mut bytes = bytes.clone();
        bytes[at..at + with.len()].copy_from_slice(with);
        parse(&bytes).unwrap_err().to_string()
    };
    assert!(changed(0, b"GGML").contains("not `GGUF`"));
    assert!(changed(8, &u64::MAX.to_le_bytes()).contains("promises 18446744073709551615 tensors"));
    assert!(changed(16, &(1u64 << 40).to_le_bytes()).contains("promises 1099511627776 metadata values"));
    assert!(changed(24, &u64::MAX.to_le_bytes()).contains("bytes of text"));

    let mut two = small();
    two.tensor("u", &[1, 32], 8, vec![2; 34]);
    let mut bytes = two.to_bytes();
    let at = bytes.windows(8).rposition(|w| w == 96u64.to_le_bytes()).unwrap();
    bytes[at..at + 8].copy_from_slice(&32u64.to_le_bytes());
    assert!(parse(&bytes).unwrap_err().to_string().contains("overlap"));
    bytes[at..at + 8].copy_from_slice(&33u64.to_le_bytes());
    assert!(parse(&bytes).unwrap_err().to_string().contains("not a multiple of 32"));
    bytes[at..at + 8].copy_from_slice(&(u64::MAX - 31).to_le_bytes());
    assert!(parse(&bytes).unwrap_err().to_string().contains("more than a file can hold"));
}

#[test]
fn models_that_cannot_be_run_are_refused_with_the_reason() {
    let dir = TempDir::new().unwrap();
    let refused = |change: &dyn Fn(&mut File), words: &[&str]| {
        let mut file = gguf::from_model(&config(), &tensors(Dtype::Bf16));
        change(&mut file);
        let error = Checkpoint::open(write(&dir, "m.gguf", &file)).unwrap_err().to_string();
        for word in words.iter().chain(&["m.gguf"]) {
            assert!(error.contains(word), "{error}");
        }
    };
    refused(&|f| f.values[0].1 = Value::Text("gemma3".into()), &["`gemma3`", "llama, qwen2, qwen3"]);
    refused(&|f| f.values[0].1 = Value::U32(3), &["general.architecture", "text expected"]);
    refused(&|f| drop(f.values.remove(0)), &["general.architecture", "missing"]);
    refused(&|f| f.tensors[1].name = "blk.0.ffn_gate_exps.weight".into(), &["ffn_gate_exps"]);
    refused(&|f| f.tensors[1].name = "blk.x.ffn_up.weight".into(), &["blk.x"]);
    refused(&|f| drop(f.tensors.remove(0)), &["token_embd.weight"]);
    refused(&|f| f.replace("llama.attention.head_count", Value::U32(0)), &["heads"]);
    refused(&|f| f.replace("llama.attention.head_count", Value::Integers(vec![1, 2])), &["array of 2"]);
    refused(&|f| f.replace("llama.rope.dimension_count", Value::U32(8)), &["rope.dimension_count", "8"]);
    refused(&|f| f.value("llama.rope.scaling.type", Value::Text("yarn".into())), &["yarn"]);
    refused(&|f| f.value("llama.expert_count", Value::U32(8)), &["experts"]);
    refused(&|f| f.value("split.count", Value::U32(3)), &["3 parts", "--merge"]);
    refused(
        &|f| {
            f.tensor("rope_freqs.weight", &[8], 0, [3f32, 1.0].repeat(4).iter().flat_map(|x| x.to_le_bytes()).collect())
        },
        &["rope_freqs.weight"],
    );
    fs::write(dir.path().join("not.gguf"), "hello").unwrap();
    assert!(Checkpoint::open(dir.path().join("not.gguf")).unwrap_err().to_string().contains("not a GGUF file"));
    fs::write(dir.path().join("empty.gguf"), "").unwrap();
    assert!(Checkpoint::open(dir.path().join("empty.gguf")).unwrap_err().to_string().contains("empty"));
    let error = Checkpoint::open(dir.path()).unwrap_err().to_string();
    assert!(error.contains("give that file itself"), "{error}");
}

#[test]
fn a_tokenizer_that_is_not_known_leaves_the_weights_usable() {
    let dir = TempDir::new().unwrap();
    let mut file = gguf::from_model(&config(), &tensors(Dtype::Bf16));
    file.value("tokenizer.ggml.model", Value::Text("t5".into()));
    file.value("tokenizer.ggml.tokens", Value::Texts((0..40).map(|i| format!("t{i}")).collect()));
    let path = write(&dir, "m.gguf", &file);
    let error = read_file(&path, "tokenizer.json").unwrap_err().to_string();
    assert!(error.contains("`t5`") && error.contains("gpt2, llama"), "{error}");
    assert!(read_file(&path, "config.json").unwrap().is_some());
    // A token of a megabyte would make cutting it into merges take a day.
    file.replace("tokenizer.ggml.model", Value::Text("llama".into()));
    file.replace("tokenizer.ggml.tokens", Value::Texts(vec!["a".repeat(1 << 20); 3]));
    let long = write(&dir, "long.gguf", &file);
    assert!(read_file(&long, "tokenizer.json").unwrap_err().to_string().contains("1048576 bytes"));
    let archive = dir.path().join("a");
    compress(&path, &archive, &CompressOptions::default(), &Silent).unwrap();
    let cpus = [Cpu::Scalar];
    assert_eq!(verify(&archive, Some(&path), &cpus, &Silent).unwrap().status, Status::Proven);
}
