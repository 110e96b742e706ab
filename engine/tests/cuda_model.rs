//! Models on a GPU against the same on the CPU. Without a GPU the tests say so and pass, unless `CODECLLM_REQUIRE_CUDA` is
//! set to 1.

use codecllm_codec::checkpoint::{Checkpoint, Dtype, Tensor};
use codecllm_codec::encoded::{Checks, EncodeOptions, EncodedTensor, encode_tensor};
use codecllm_codec::quantize::Codes;
use codecllm_codec::{Coder, Cpu, Format};
use codecllm_engine::cuda::{CudaBackend, Device};
use codecllm_engine::evaluate::GREEDY_PROMPTS;
use codecllm_engine::weights::Loader;
use codecllm_engine::{Config, GenerateOptions, LoadOptions, Logits, Model, TensorSource, Tokenizer, generate};
use std::io::Write;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

/// The rms of the logits' differences, over the rms of the logits, token by token: keys and values are kept in BF16.
const TOLERANCE: f32 = 1e-2;
/// The same where more than 16 tokens pass together: their activations are rounded to BF16 before each product.
const TOLERANCE_MANY: f32 = 2e-2;

const TINY: [&str; 8] = [
    "llama-gqa",
    "llama-rope-llama3",
    "llama-old-spelling",
    "llama-rope-linear",
    "llama-bias",
    "mistral-window",
    "qwen2",
    "qwen3",
];

/// A backend on the first GPU, or `None` where the machine has none.
fn cuda() -> Option<CudaBackend> {
    match Device::open(0).and_then(CudaBackend::new) {
        Ok(backend) => Some(backend),
        Err(e) => {
            assert!(std::env::var_os("CODECLLM_REQUIRE_CUDA").is_none_or(|v| v != "1"), "{e}");
            // Not `println!`, which the test harness would hide.
            let _ = writeln!(std::io::stderr(), "SKIPPED: {e}");
            None
        }
    }
}

fn on_cuda(config: &Config, source: &dyn TensorSource) -> Option<Model<CudaBackend>> {
    Some(Model::on_backend(cuda()?, config.clone(), &Loader::new(source, Checks::Full)).unwrap())
}

fn on_cpu(config: &Config, source: &dyn TensorSource) -> Model {
    Model::from_source(config.clone(), source, &LoadOptions::default()).unwrap()
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// A lossless archive, whose matrices are decoded as they are asked for.
struct Plain(Checkpoint);

impl TensorSource for Plain {
    fn tensor(&self, name: &str) -> codecllm_engine::Result<Option<Tensor>> {
        let Some(tensor) = TensorSource::tensor(&self.0, name)? else { return Ok(None) };
        if !EncodedTensor::is_encoded(&tensor.data) {
            return Ok(Some(tensor));
        }
        let encoded = EncodedTensor::parse(tensor.data, Checks::Full)?;
        let Codes::U16(codes) = encoded.decode_codes(Cpu::detect())? else { panic!("the archive is not lossless") };
        let data = codes.iter().flat_map(|code| code.to_le_bytes()).collect::<Vec<u8>>().into();
        let shape = vec![encoded.n_rows(), encoded.n_cols()];
        Ok(Some(Tensor { dtype: Dtype::Bf16, shape, data, ..tensor }))
    }
}

fn rms(x: &[f32]) -> f32 {
    (x.iter().map(|v| v * v).sum::<f32>() / x.len() as f32).sqrt()
}

/// Asserts that the logits of both models agree for `n_tokens` tokens, fed in chunks.
fn compare(name: &str, cpu: &Model, cuda: &Model<CudaBackend>, n_tokens: usize) {
    let vocab_size = cpu.config().vocab_size;
    let tokens: Vec<u32> = (0..n_tokens as u32).map(|i| (i * 7919 + 13) % vocab_size as u32).collect();
    let expected = cpu.forward(&tokens, &mut cpu.new_cache(n_tokens).unwrap(), Logits::All).unwrap();
    for (chunk, tolerance) in [(1, TOLERANCE), (7, TOLERANCE), (n_tokens, TOLERANCE_MANY)] {
        let mut cache = cuda.new_cache(n_tokens).unwrap();
        let found: Vec<f32> =
            tokens.chunks(chunk).flat_map(|c| cuda.forward(c, &mut cache, Logits::All).unwrap()).collect();
        let differences: Vec<f32> = found.iter().zip(&expected).map(|(a, b)| a - b).collect();
        let largest = differences.iter().fold(0.0f32, |m, d| m.max(d.abs())) / rms(&expected);
        let difference = rms(&differences) / rms(&expected);
        println!("{name}, chunks of {chunk}: difference {difference:.1e} (largest {largest:.1e}) of the logits' rms");
        assert!(difference <= tolerance, "{name}, chunks of {chunk}: logits differ by {difference} of their rms");

        cache.truncate(n_tokens - 1);
        let last = cuda.forward(&tokens[n_tokens - 1..], &mut cache, Logits::Last).unwrap();
        let best = (0..vocab_size).max_by(|&a, &b| last[a].total_cmp(&last[b])).unwrap();
        cache.truncate(n_tokens - 1);
        assert_eq!(cuda.likeliest(&tokens[n_tokens - 1..], &mut cache).unwrap(), best as u32, "{name}");
    }
}

#[test]
fn every_family_agrees_with_the_cpu() {
    for name in TINY {
        let dir = root().join("engine/tests/data").join(name);
        let (config, checkpoint) = (Config::open(&dir).unwrap(), Checkpoint::open(&dir).unwrap());
        let Some(cuda) = on_cuda(&config, &checkpoint) else { return };
        compare(name, &on_cpu(&config, &checkpoint), &cuda, 60.min(config.max_positions));
    }
}

/// A checkpoint whose matrices are encoded as they are asked for.
struct Encoded<'a>(&'a Checkpoint, Format, Coder);

impl TensorSource for Encoded<'_> {
    fn tensor(&self, name: &str) -> codecllm_engine::Result<Option<Tensor>> {
        let Some(tensor) = TensorSource::tensor(self.0, name)? else { return Ok(None) };
        if tensor.shape.len() != 2 {
            return Ok(Some(tensor));
        }
        let data = encode_tensor(&tensor, &EncodeOptions { format: self.1, coder: self.2, ..Default::default() })?;
        Ok(Some(Tensor { dtype: Dtype::U8, shape: vec![data.len()], data: data.into(), ..tensor }))
    }
}

#[test]
fn every_format_agrees_with_the_cpu() {
    for name in ["llama-bias", "qwen3"] {
        let dir = root().join("engine/tests/data").join(name);
        let (config, checkpoint) = (Config::open(&dir).unwrap(), Checkpoint::open(&dir).unwrap());
        for format in [Format::Bf16, Format::Fp8, Format::Int8] {
            let source = Encoded(&checkpoint, format, Coder::Rans);
            let Some(cuda) = on_cuda(&config, &source) else { return };
            compare(&format!("{name} {format}"), &on_cpu(&config, &source), &cuda, 60.min(config.max_positions));
        }
    }
}

#[test]
fn coder_zstd_agrees_with_the_cpu_where_nvcomp_is_installed() {
    for name in ["llama-bias", "qwen3"] {
        let dir = root().join("engine/tests/data").join(name);
        let (config, checkpoint) = (Config::open(&dir).unwrap(), Checkpoint::open(&dir).unwrap());
        for format in [Format::Bf16, Format::Fp8, Format::Int8] {
            let source = Encoded(&checkpoint, format, Coder::Zstd);
            let Some(backend) = cuda() else { return };
            let cuda = match Model::on_backend(backend, config.clone(), &Loader::new(&source, Checks::None)) {
                Ok(cuda) => cuda,
                Err(e) => {
                    assert!(e.to_string().contains("pip install 'nvidia-libnvcomp-cu13"), "{e}");
                    let _ = writeln!(std::io::stderr(), "SKIPPED: {e}");
                    return;
                }
            };
            compare(&format!("{name} {format} zstd"), &on_cpu(&config, &source), &cuda, 60.min(config.max_positions));
        }
    }
}

#[test]
fn a_trained_model_agrees_with_the_cpu_and_tells_the_same_tales_encoded_and_plain() {
    let dir = root().join("assets/tales-5m");
    let config = Config::open(&dir).unwrap();
    let source = Plain(Checkpoint::open(&dir).unwrap());
    let Some(plain) = on_cuda(&config, &source) else { return };
    let Some(encoded) = on_cuda(&config, &source.0) else { return };
    let cpu = on_cpu(&config, &source);
    compare("tales-5m", &cpu, &plain, 300.min(config.max_positions));
    compare("tales-5m, encoded", &cpu, &encoded, 300.min(config.max_positions));

    let tokenizer = Tokenizer::open(&dir).unwrap();
    let options = GenerateOptions { max_tokens: 256, ignore_eos: true, ..GenerateOptions::default() };
    let go_on = |_: &str| ControlFlow::Continue(());
    let (mut n_equal, mut n_as_cpu) = (0, 0);
    for prompt in GREEDY_PROMPTS {
        let tokens = tokenizer.encode_prompt(prompt).unwrap();
        let expected = generate(&plain, &tokenizer, &tokens, &options, go_on).unwrap();
        assert_eq!(expected.tokens.len(), 256);
        let found = generate(&encoded, &tokenizer, &tokens, &options, go_on).unwrap();
        n_equal += usize::from(found.tokens == expected.tokens);
        let on_cpu = generate(&cpu, &tokenizer, &tokens, &options, go_on).unwrap();
        n_as_cpu += usize::from(on_cpu.tokens == expected.tokens);
    }
    println!("tales-5m: {n_equal} of {} encoded and plain greedy texts are the same", GREEDY_PROMPTS.len());
    println!("tales-5m: {n_as_cpu} of {} greedy texts of 256 tokens are those of the CPU", GREEDY_PROMPTS.len());
    // Encoded and plain products add up in different orders, so that a near tie may fall the other way.
    assert!(n_equal + 2 >= GREEDY_PROMPTS.len(), "only {n_equal} texts of encoded weights are those of plain ones");
}
