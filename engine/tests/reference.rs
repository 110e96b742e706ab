//! The engine's logits against those of Transformers (float32 arithmetic on the same BF16 weights), as
//! `scripts/reference.py` wrote them: the small random models in `tests/data`, and the trained ones where
//! `$CODECLLM_SHARED` (default `../shared`) has them.
//!
//! Each model runs at every instruction-set level of this machine, and takes its prompt at once, in chunks and token
//! by token: a wrong mask, position or cache shows in one of them.

use codecllm_codec::checkpoint::{Checkpoint, Dtype, Tensor};
use codecllm_codec::encoded::{Checks, EncodeOptions, EncodedTensor, encode_tensor};
use codecllm_codec::{Coder, Cpu, Format};
use codecllm_engine::{Config, LoadOptions, Logits, Model, TensorSource};
use safetensors::SafeTensors;
use std::io::Write;
use std::path::{Path, PathBuf};

/// The largest difference of a logit, relative to the rms of the reference's logits, with plain weights. Leaving out any
/// feature of the small models makes a difference above 0.02 (`scripts/reference.py` asserts it).
const TOLERANCE: f32 = 1e-4;
/// The same with encoded weights, whose `int8` products round activations to 16 bits.
const TOLERANCE_ENCODED: f32 = 2e-3;

/// One prompt's reference. `n` tokens; the layout is described in `scripts/reference.py`.
struct Prompt {
    tokens: Vec<u32>,
    top_ids: Vec<u32>,
    top_logits: Vec<f32>,
    stride_logits: Vec<f32>,
    logsumexp: Vec<f32>,
    greedy: Vec<u32>,
    greedy_margin: Vec<f32>,
    stride: usize,
    /// Of the logits at `stride`.
    rms: f32,
}

fn data_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data")
}

fn read_prompts(name: &str) -> Vec<Prompt> {
    let path = data_dir().join(format!("{name}.reference.safetensors"));
    let bytes = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    let stride = header.metadata().as_ref().unwrap()["stride"].parse().unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let words = |i: usize, what: &str| -> Option<Vec<[u8; 4]>> {
        let data = file.tensor(&format!("{i}.{what}")).ok()?.data();
        Some(data.as_chunks::<4>().0.to_vec())
    };
    let ids = |i, what| words(i, what).unwrap().into_iter().map(u32::from_le_bytes).collect();
    let floats = |i, what| words(i, what).unwrap().into_iter().map(f32::from_le_bytes).collect::<Vec<_>>();
    (0..)
        .take_while(|&i| words(i, "tokens").is_some())
        .map(|i| {
            let stride_logits = floats(i, "stride_logits");
            Prompt {
                tokens: ids(i, "tokens"),
                top_ids: ids(i, "top_ids"),
                top_logits: floats(i, "top_logits"),
                logsumexp: floats(i, "logsumexp"),
                greedy: ids(i, "greedy"),
                greedy_margin: floats(i, "greedy_margin"),
                stride,
                rms: rms(&stride_logits),
                stride_logits,
            }
        })
        .collect()
}

fn rms(x: &[f32]) -> f32 {
    (x.iter().map(|v| v * v).sum::<f32>() / x.len() as f32).sqrt()
}

fn argmax(logits: &[f32]) -> u32 {
    (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap() as u32
}

impl Prompt {
    /// The largest difference from the reference, relative to its rms, of `logits` [vocabulary] at `position`.
    fn difference(&self, position: usize, logits: &[f32]) -> f32 {
        let row = |x: &[f32]| {
            let len = x.len() / self.tokens.len();
            position * len..(position + 1) * len
        };
        let top = self.top_ids[row(&self.top_logits)].iter().map(|&id| logits[id as usize]);
        let top = top.zip(&self.top_logits[row(&self.top_logits)]);
        let strided = logits.iter().copied().step_by(self.stride);
        let strided = strided.zip(&self.stride_logits[row(&self.stride_logits)]);
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let logsumexp = max + logits.iter().map(|v| (v - max).exp()).sum::<f32>().ln();
        let sum = std::iter::once((logsumexp, &self.logsumexp[position]));
        // A NaN anywhere has to fail, so no `f32::max`.
        top.chain(strided)
            .chain(sum)
            .map(|(found, expected)| (found - expected).abs() / self.rms)
            .fold(0.0, |worst, d| if d <= worst { worst } else { d })
    }
}

/// Feeds `tokens` to an empty cache in chunks of `chunk` and returns the logits of all of them, [token][vocabulary].
fn logits_of(model: &Model, tokens: &[u32], chunk: usize) -> Vec<f32> {
    let mut cache = model.new_cache(tokens.len()).unwrap();
    tokens.chunks(chunk).flat_map(|c| model.forward(c, &mut cache, Logits::All).unwrap()).collect()
}

fn options(cpu: Cpu) -> LoadOptions {
    LoadOptions { cpu, threads: 2, ..LoadOptions::default() }
}

/// Compares `model` with the reference `name`; `label` says which variant it is.
fn check(name: &str, label: &str, model: &Model, tolerance: f32) {
    let vocabulary = model.config().vocab_size;
    for (i, prompt) in read_prompts(name).iter().enumerate() {
        let n = prompt.tokens.len();
        let mut worst = 0.0f32;
        for chunk in [n, 7, 1] {
            let logits = logits_of(model, &prompt.tokens, chunk);
            assert_eq!(logits.len(), n * vocabulary);
            for (position, row) in logits.chunks(vocabulary).enumerate() {
                let difference = prompt.difference(position, row);
                assert!(
                    difference <= tolerance,
                    "{name}, {label}, prompt {i} in chunks of {chunk}: the logits of position {position} differ by \
                     {difference} of their rms"
                );
                worst = worst.max(difference);
            }
        }

        // Each step is fed the reference's token, so that a near tie does not end the comparison.
        let mut cache = model.new_cache(n + prompt.greedy.len()).unwrap();
        let mut logits = model.forward(&prompt.tokens, &mut cache, Logits::Last).unwrap();
        assert_eq!(logits.len(), vocabulary);
        assert!(prompt.difference(n - 1, &logits) <= tolerance);
        for (step, (&token, &margin)) in prompt.greedy.iter().zip(&prompt.greedy_margin).enumerate() {
            if margin > 2.0 * tolerance * prompt.rms {
                assert_eq!(argmax(&logits), token, "{name}, {label}, prompt {i}: greedy token {step}");
            }
            logits = model.forward(&[token], &mut cache, Logits::Last).unwrap();
        }
        println!("{name}, {label}, prompt {i}: largest difference {worst:.1e} of the logits' rms");
    }
}

/// A checkpoint whose matrices are encoded as they are asked for.
struct Encoded<'a> {
    source: &'a Checkpoint,
    options: EncodeOptions,
}

impl TensorSource for Encoded<'_> {
    fn tensor(&self, name: &str) -> codecllm_engine::Result<Option<Tensor>> {
        let Some(tensor) = TensorSource::tensor(self.source, name)? else { return Ok(None) };
        if tensor.shape.len() != 2 {
            return Ok(Some(tensor));
        }
        let data = encode_tensor(&tensor, &self.options)?;
        Ok(Some(Tensor { dtype: Dtype::U8, shape: vec![data.len()], data: data.into(), ..tensor }))
    }
}

/// The values of an [`Encoded`] source, decoded: what its products have to agree with.
struct Decoded<'a>(Encoded<'a>);

impl TensorSource for Decoded<'_> {
    fn tensor(&self, name: &str) -> codecllm_engine::Result<Option<Tensor>> {
        let Some(tensor) = self.0.tensor(name)? else { return Ok(None) };
        if !EncodedTensor::is_encoded(&tensor.data) {
            return Ok(Some(tensor));
        }
        let encoded = EncodedTensor::parse(tensor.data, Checks::Full)?;
        let mut values = vec![0.0f32; encoded.n_rows() * encoded.n_cols()];
        encoded.decode_rows(Cpu::Scalar, 0..encoded.n_rows(), &mut values)?;
        let data = values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>().into();
        Ok(Some(Tensor { dtype: Dtype::F32, shape: vec![encoded.n_rows(), encoded.n_cols()], data, ..tensor }))
    }
}

/// Checks the model in `dir` as it is, and with its matrices encoded without loss.
fn check_model(name: &str, dir: &Path) {
    let checkpoint = Checkpoint::open(dir).unwrap();
    for cpu in Cpu::available() {
        check(name, cpu.name(), &Model::load(dir, &options(cpu)).unwrap(), TOLERANCE);
        for coder in [Coder::Rans, Coder::Zstd] {
            let lossless = EncodeOptions { format: Format::Bf16, coder, ..EncodeOptions::default() };
            let source = Encoded { source: &checkpoint, options: lossless };
            let model = Model::from_source(Config::open(dir).unwrap(), &source, &options(cpu)).unwrap();
            check(name, &format!("{cpu}, encoded bf16 ({coder})"), &model, TOLERANCE);
        }
    }
}

macro_rules! tiny_models {
    ($($test:ident = $name:literal),+ $(,)?) => {
        $(#[test]
        fn $test() {
            check_model($name, &data_dir().join($name));
        })+

        const TINY: &[&str] = &[$($name),+];
    };
}

tiny_models! {
    llama_with_grouped_queries = "llama-gqa",
    llama_with_llama3_rope_scaling = "llama-rope-llama3",
    llama_tied_and_spelt_as_before_transformers_5 = "llama-old-spelling",
    llama_with_linear_rope_scaling = "llama-rope-linear",
    llama_with_biases = "llama-bias",
    mistral_with_a_sliding_window = "mistral-window",
    qwen2_with_biases_on_queries_keys_and_values = "qwen2",
    qwen3_with_normalized_queries_and_keys = "qwen3",
}

#[test]
fn products_from_codes_agree_with_the_decoded_weights() {
    for name in TINY {
        let dir = data_dir().join(name);
        let checkpoint = Checkpoint::open(&dir).unwrap();
        let tokens = &read_prompts(name)[0].tokens;
        for format in [Format::Int8, Format::Fp8] {
            let source =
                || Encoded { source: &checkpoint, options: EncodeOptions { format, ..EncodeOptions::default() } };
            let config = || Config::open(&dir).unwrap();
            let decoded = Model::from_source(config(), &Decoded(source()), &options(Cpu::Scalar)).unwrap();
            let expected = logits_of(&decoded, tokens, tokens.len());
            for cpu in Cpu::available() {
                let encoded = Model::from_source(config(), &source(), &options(cpu)).unwrap();
                let found = logits_of(&encoded, tokens, tokens.len());
                let worst =
                    found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) / rms(&expected);
                println!("{name}, {format}, {cpu}: largest difference {worst:.1e} of the logits' rms");
                assert!(worst <= TOLERANCE_ENCODED, "{name}, {format}, {cpu}: logits differ by {worst} of their rms");
            }
        }
    }
}

#[test]
fn the_number_of_threads_changes_no_logit() {
    let dir = data_dir().join("llama-gqa");
    let tokens = &read_prompts("llama-gqa")[0].tokens;
    let logits = [1, 2, 5].map(|threads| {
        let model = Model::load(&dir, &LoadOptions { threads, ..options(Cpu::detect()) }).unwrap();
        logits_of(&model, tokens, 13)
    });
    assert!(logits[0] == logits[1] && logits[0] == logits[2]);
}

/// Checks a trained model, where it is at hand; in CI (`$CI` set) it has to be.
fn check_trained(name: &str) {
    let shared = std::env::var_os("CODECLLM_SHARED")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared"), PathBuf::from);
    let dir = shared.join("models").join(name);
    if dir.is_dir() {
        return check_model(name, &dir);
    }
    let absent = format!("no {}; set CODECLLM_SHARED to the folder that holds models/{name}", dir.display());
    assert!(std::env::var_os("CI").is_none(), "{absent}");
    // Not `println!`, which the test harness would hide.
    let _ = writeln!(std::io::stderr(), "SKIPPED {name}: {absent}");
}

#[test]
fn tales_5m() {
    check_trained("tales-5m");
}

#[test]
fn general_50m() {
    check_trained("general-50m");
}
