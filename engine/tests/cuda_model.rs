//! Models on a GPU against the same on the CPU. Without a GPU the tests say so and pass, unless `CODECLLM_REQUIRE_CUDA` is
//! set to 1.

use codecllm_codec::archive::{self, Decoders, Silent, Status};
use codecllm_codec::checkpoint::{Checkpoint, Dtype, Tensor};
use codecllm_codec::encoded::{Checks, EncodeOptions, EncodedTensor, encode_tensor};
use codecllm_codec::quantize::Codes;
use codecllm_codec::{Coder, Cpu, Format};
use codecllm_engine::cuda::{CudaBackend, CudaDecoder, Device};
use codecllm_engine::evaluate::GREEDY_PROMPTS;
use codecllm_engine::weights::Loader;
use codecllm_engine::{
    CachePolicy, Config, GenerateOptions, LoadOptions, Logits, Model, Sampler, SamplingOptions, TensorSource,
    Tokenizer, generate,
};
use std::io::Write;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

/// The rms of the logits' differences, over the rms of the logits, token by token: keys and values are kept in BF16.
const TOLERANCE: f32 = 1e-2;
/// The same where activations are rounded to BF16 before each product, or weights of formats that are not `bf16` are.
const TOLERANCE_ROUNDED: f32 = 2e-2;
/// For tokens one by one, for a few together, and for more than 16. A few are rounded where weights are plain or lossless.
const FUSED: [f32; 3] = [TOLERANCE, TOLERANCE, TOLERANCE_ROUNDED];
const LOSSLESS: [f32; 3] = [TOLERANCE, TOLERANCE_ROUNDED, TOLERANCE_ROUNDED];
const ROUNDED: [f32; 3] = [TOLERANCE_ROUNDED; 3];

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
fn compare(within: [f32; 3], name: &str, cpu: &Model, cuda: &Model<CudaBackend>, n_tokens: usize) {
    let vocab_size = cpu.config().vocab_size;
    let tokens: Vec<u32> = (0..n_tokens as u32).map(|i| (i * 7919 + 13) % vocab_size as u32).collect();
    let expected = cpu.forward(&tokens, &mut cpu.new_cache(n_tokens).unwrap(), Logits::All).unwrap();
    for (chunk, tolerance) in [1, 7, n_tokens].into_iter().zip(within) {
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
        compare(LOSSLESS, name, &on_cpu(&config, &checkpoint), &cuda, 60.min(config.max_positions));
    }
}

#[test]
fn spare_memory_keeps_the_first_layers_decoded() {
    // Up to 16 tokens need no room for a decoded matrix, but where weights are lossless.
    const N_POSITIONS: usize = 16;
    let dir = root().join("assets/tales-5m");
    let config = Config::open(&dir).unwrap();
    let source = Plain(Checkpoint::open(&dir).unwrap());
    let Some(plain) = on_cuda(&config, &source) else { return };
    let tokens: Vec<u32> = (0..N_POSITIONS as u32).map(|i| (i * 7919 + 13) % config.vocab_size as u32).collect();
    let logits = |model: &Model<CudaBackend>| {
        let mut cache = model.new_cache(N_POSITIONS).unwrap();
        let mut logits = model.forward(&tokens[..8], &mut cache, Logits::All).unwrap();
        tokens[8..].iter().for_each(|&t| logits.extend(model.forward(&[t], &mut cache, Logits::Last).unwrap()));
        logits
    };
    let expected = logits(&plain);
    let keep = |source: &dyn TensorSource, policy, budget| {
        let mut model = on_cuda(&config, source).unwrap();
        model.keep_decoded(policy, budget, N_POSITIONS, Logits::All).map(|()| model)
    };
    let n_layers = config.n_layers;
    let used = |model: &Model<CudaBackend>| *model.memory().unwrap();

    let encoded = keep(&source.0, CachePolicy::None, u64::MAX >> 1).unwrap();
    let least = used(&encoded);
    assert_eq!((least.n_decoded_layers, least.decoded_bytes), (0, 0));
    assert_eq!(least.other_weight_bytes, encoded.weight_bytes());

    // All of it: the very model that was never encoded.
    let all = keep(&source.0, CachePolicy::Lossless, u64::MAX >> 1).unwrap();
    assert_eq!((used(&all).n_decoded_layers, all.weight_bytes()), (n_layers, plain.weight_bytes()));
    assert!(logits(&all) == expected, "the decoded weights are not those of the checkpoint");

    // Some of it. (In a model as small as this one, room for one lossless matrix is as much as keeping all of them decoded takes.)
    let int8 = Encoded(&source, Format::Int8, Coder::Rans);
    let keep = |policy, budget| keep(&int8, policy, budget);
    let encoded = keep(CachePolicy::None, u64::MAX >> 1).unwrap();
    let least = used(&encoded);
    let expected = logits(&encoded);
    let all = keep(CachePolicy::Any, u64::MAX >> 1).unwrap();
    let budget = least.total_bytes() + (used(&all).total_bytes() - least.total_bytes()) / 3;
    let some = keep(CachePolicy::Any, budget).unwrap();
    let memory = used(&some);
    assert!((1..n_layers).contains(&memory.n_decoded_layers), "{memory:?}");
    assert!(memory.total_bytes() <= budget, "{memory:?}");
    assert_eq!(memory.decoded_bytes + memory.other_weight_bytes, some.weight_bytes());
    let differences: Vec<f32> = logits(&some).iter().zip(&expected).map(|(a, b)| a - b).collect();
    assert!(rms(&differences) <= TOLERANCE_ROUNDED * rms(&expected));

    let error = keep(CachePolicy::Any, least.total_bytes() - 1).err().unwrap().to_string();
    assert!(error.contains("--vram") && error.contains("16 tokens"), "{error}");

    // Weights that would be rounded are kept only where that is allowed.
    let dir = root().join("engine/tests/data/qwen3");
    let (config, checkpoint) = (Config::open(&dir).unwrap(), Checkpoint::open(&dir).unwrap());
    let int8 = Encoded(&checkpoint, Format::Int8, Coder::Rans);
    for (policy, n) in [(CachePolicy::Lossless, 0), (CachePolicy::Any, config.n_layers)] {
        let mut model = on_cuda(&config, &int8).unwrap();
        model.keep_decoded(policy, u64::MAX >> 1, 50, Logits::Last).unwrap();
        assert_eq!(used(&model).n_decoded_layers, n, "{policy:?}");
        let within = if n == 0 { FUSED } else { ROUNDED };
        compare(within, "qwen3 int8, kept", &on_cpu(&config, &int8), &model, 50);
    }
}

#[test]
fn tokens_are_drawn_from_the_logits_as_the_reference_draws_them() {
    let dir = root().join("assets/tales-5m");
    let config = Config::open(&dir).unwrap();
    let Some(model) = on_cuda(&config, &Checkpoint::open(&dir).unwrap()) else { return };
    let base = SamplingOptions { temperature: 0.9, ..SamplingOptions::default() };
    for options in [
        base,
        SamplingOptions { top_k: 20, top_p: 0.9, repetition_penalty: 1.1, ..base },
        SamplingOptions { temperature: 0.0, repetition_penalty: 1.2, ..base },
    ] {
        let mut sampler = Sampler::new(options).unwrap();
        let mut history = vec![1u32, 2, 3];
        // The prompt in one pass, then token by token.
        let (mut drawn, mut expected) = (model.new_cache(60).unwrap(), model.new_cache(60).unwrap());
        while history.len() < 60 {
            let draw = sampler.draw(&history);
            let new = &history[drawn.len()..];
            let token = model.sample(new, &mut drawn, &draw).unwrap();
            let mut logits = model.forward(new, &mut expected, Logits::Last).unwrap();
            assert_eq!(token, draw.choose(&mut logits).unwrap(), "token {} of {options:?}", history.len());
            history.push(token);
        }
    }
}

#[test]
fn the_gpus_decoder_is_proven_and_damage_is_reported() {
    if cuda().is_none() {
        return;
    }
    let decoder = CudaDecoder::new(Device::open(0).unwrap()).unwrap();
    let decoders = Decoders { cpus: &[Cpu::detect()], other: Some(&decoder) };
    let dir = root().join("assets/tales-5m");
    let report = archive::verify_with(&dir, None, &decoders, &Silent).unwrap();
    assert_eq!(report.status, Status::Proven, "{report:?}");
    assert!(report.checks.iter().any(|c| c.name == "decoders" && c.detail.contains("cuda:0")), "{report:?}");

    let damaged = tempfile::tempdir().unwrap();
    for file in std::fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap()) {
        std::fs::copy(file.path(), damaged.path().join(file.file_name())).unwrap();
    }
    let shard = damaged.path().join("model.safetensors");
    let mut bytes = std::fs::read(&shard).unwrap();
    let at = bytes.len() / 2;
    bytes[at..at + 64].fill(0x5a);
    std::fs::write(&shard, bytes).unwrap();
    let report = archive::verify_with(damaged.path(), None, &decoders, &Silent).unwrap();
    let wrong: Vec<_> = report.checks.iter().filter(|c| c.status == Status::Wrong).map(|c| c.name).collect();
    assert_eq!(wrong, ["files", "structure"], "{report:?}");
}

/// A checkpoint whose matrices are encoded as they are asked for.
struct Encoded<'a>(&'a dyn TensorSource, Format, Coder);

impl TensorSource for Encoded<'_> {
    fn tensor(&self, name: &str) -> codecllm_engine::Result<Option<Tensor>> {
        let Some(tensor) = self.0.tensor(name)? else { return Ok(None) };
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
            let within = if format.is_lossless() { LOSSLESS } else { FUSED };
            compare(
                within,
                &format!("{name} {format}"),
                &on_cpu(&config, &source),
                &cuda,
                60.min(config.max_positions),
            );
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
            let mut cuda = match Model::on_backend(backend, config.clone(), &Loader::new(&source, Checks::None)) {
                Ok(cuda) => cuda,
                Err(e) => {
                    assert!(e.to_string().contains("pip install 'nvidia-libnvcomp-cu13"), "{e}");
                    let _ = writeln!(std::io::stderr(), "SKIPPED: {e}");
                    return;
                }
            };
            let (cpu, n_tokens) = (on_cpu(&config, &source), 60.min(config.max_positions));
            let within = if format.is_lossless() { LOSSLESS } else { ROUNDED };
            compare(within, &format!("{name} {format} zstd"), &cpu, &cuda, n_tokens);
            cuda.keep_decoded(CachePolicy::Any, u64::MAX >> 1, n_tokens, Logits::All).unwrap();
            assert_eq!(cuda.memory().unwrap().n_decoded_layers, config.n_layers);
            compare(within, &format!("{name} {format} zstd, kept decoded"), &cpu, &cuda, n_tokens);
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
    // As many positions as several clusters of thread blocks share.
    compare(LOSSLESS, "tales-5m", &cpu, &plain, 600.min(config.max_positions));
    compare(LOSSLESS, "tales-5m, encoded", &cpu, &encoded, 600.min(config.max_positions));

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
    assert_eq!(n_equal, GREEDY_PROMPTS.len(), "texts of encoded weights are those of plain ones");
}
