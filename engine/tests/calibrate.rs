//! Calibration end to end, on a random model whose embeddings share a few directions, so that its inputs are correlated as
//! those of a trained one are.

use codecllm_codec::archive::{
    Calibration, CompressOptions, Layers, Provenance, RateTarget, Silent, Status, Summary, compress, verify,
};
use codecllm_codec::{Cpu, EncodeOptions, Format};
use codecllm_engine::calibrate::{MIN_TOKENS, WINDOW, sample_text};
use codecllm_engine::{LoadOptions, Model, Tokenizer, calibrate, evaluate};
use half::bf16;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

const VOCAB: usize = 384;
const CONFIG: &str = r#"{
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 384, "hidden_size": 128,
    "intermediate_size": 320, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 600, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": false
}"#;

/// Writes the model; `change` may spoil a tensor's values.
fn model(change: impl Fn(&str, &mut [f32])) -> TempDir {
    let mut rng = SmallRng::seed_from_u64(1);
    let mut tensors = BTreeMap::new();
    let mut add = |name: String, shape: Vec<usize>, mut values: Vec<f32>| {
        change(&name, &mut values);
        let data: Vec<u8> = values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect();
        tensors.insert(name, (shape, data));
    };
    let mut random = |n: usize, size: f32| -> Vec<f32> {
        (0..n).map(|_| size * (rng.random_range(-1.0..1f32) + rng.random_range(-1.0..1f32))).collect()
    };
    let (directions, strengths) = (random(8 * 128, 1.0), random(VOCAB * 8, 1.0));
    let mut embedding = random(VOCAB * 128, 0.2);
    for (row, strengths) in embedding.chunks_mut(128).zip(strengths.chunks(8)) {
        for (strength, direction) in strengths.iter().zip(directions.chunks(128)) {
            row.iter_mut().zip(direction).for_each(|(e, d)| *e += strength * d);
        }
    }
    add("model.embed_tokens.weight".into(), vec![VOCAB, 128], embedding);
    add("lm_head.weight".into(), vec![VOCAB, 128], random(VOCAB * 128, 0.1));
    add("model.norm.weight".into(), vec![128], vec![1.0; 128]);
    for i in 0..3 {
        let mut add = |name: &str, shape: Vec<usize>, values| add(format!("model.layers.{i}.{name}"), shape, values);
        for (name, rows, cols) in [
            ("self_attn.q_proj", 128, 128),
            ("self_attn.k_proj", 64, 128),
            ("self_attn.v_proj", 64, 128),
            ("self_attn.o_proj", 128, 128),
            ("mlp.gate_proj", 320, 128),
            ("mlp.up_proj", 320, 128),
            ("mlp.down_proj", 128, 320),
        ] {
            add(&format!("{name}.weight"), vec![rows, cols], random(rows * cols, 0.15));
            if ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"].contains(&name) {
                add(&format!("{name}.bias"), vec![rows], random(rows, 0.1));
            }
        }
        add("input_layernorm.weight", vec![128], vec![1.0; 128]);
        add("post_attention_layernorm.weight", vec![128], vec![1.0; 128]);
    }
    let dir = TempDir::new().unwrap();
    let views = tensors.iter().map(|(name, (shape, data))| {
        (name, safetensors::tensor::TensorView::new(safetensors::Dtype::BF16, shape.clone(), data).unwrap())
    });
    safetensors::serialize_to_file(views, None, &dir.path().join("model.safetensors")).unwrap();
    std::fs::write(dir.path().join("config.json"), CONFIG).unwrap();
    dir
}

fn tokens(n: usize, seed: u64) -> Vec<u32> {
    let mut rng = SmallRng::seed_from_u64(seed);
    (0..n).map(|_| rng.random_range(0..VOCAB as u32)).collect()
}

fn load(dir: &Path, threads: usize) -> Model {
    Model::load(dir, &LoadOptions { threads, ..Default::default() }).unwrap()
}

fn options(bits: f64) -> CompressOptions {
    let encode = EncodeOptions { format: Format::Rate, ..Default::default() };
    CompressOptions { encode, rate: Some(RateTarget::Bits(bits)), ..Default::default() }
}

/// Compresses `source`, calibrated on `text` where there is one, with this many threads.
fn archive(
    source: &Path,
    dir: &Path,
    options: &CompressOptions,
    text: Option<&[u32]>,
    threads: usize,
) -> (PathBuf, Summary) {
    let mut options = options.clone();
    let scratch = TempDir::new().unwrap();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    let archive = dir.join(format!("{}-{threads}-{}", text.map_or(0, <[u32]>::len), options.rate.unwrap()));
    let summary = pool.install(|| {
        if let Some(text) = text {
            let (original, mut model) = (load(source, threads), load(source, threads));
            options.calibrated =
                Some(calibrate(&original, &mut model, source, &options, text, scratch.path(), &Silent).unwrap());
        }
        compress(source, &archive, &options, &Silent).unwrap()
    });
    (archive, summary)
}

fn kld(archive: &Path, source: &Path, text: &[u32]) -> f64 {
    let go_on = |_| ControlFlow::Continue(());
    let (model, baseline) = (load(archive, 2), load(source, 2));
    evaluate(&model, Some(&baseline), text, WINDOW, go_on).unwrap().comparison.unwrap().kld_mean
}

#[test]
fn calibration_hits_the_size_and_lowers_the_divergence_at_every_rate() {
    let (source, dir) = (model(|_, _| {}), TempDir::new().unwrap());
    let (text, other) = (tokens(8 * WINDOW + 100, 2), tokens(2 * WINDOW, 3));
    let mut before = f64::INFINITY;
    for bits in [3.0, 4.0, 5.5] {
        let options = options(bits);
        let (calibrated, summary) = archive(source.path(), dir.path(), &options, Some(&text), 2);
        let found = 8.0 * summary.archive_bytes as f64 / summary.n_weights as f64;
        assert!((found / bits - 1.0).abs() < 0.01, "{bits}: {found}");
        let (plain, _) = archive(source.path(), dir.path(), &options, None, 2);
        let (with, without) = (kld(&calibrated, source.path(), &other), kld(&plain, source.path(), &other));
        let mut of_trellis = options.clone();
        of_trellis.encode.trellis = true;
        let trellis_dir = TempDir::new().unwrap();
        let (trellis, summary) = archive(source.path(), trellis_dir.path(), &of_trellis, Some(&text), 2);
        let found = 8.0 * summary.archive_bytes as f64 / summary.n_weights as f64;
        assert!((found / bits - 1.0).abs() < 0.01, "{bits}, trellis: {found}");
        let with_trellis = kld(&trellis, source.path(), &other);
        println!("{bits} bits/weight: {with:.5} calibrated, {with_trellis:.5} with a trellis, {without:.5} not");
        assert!(with_trellis < 0.92 * with, "{bits}: {with_trellis} with a trellis, {with} without");
        let report = verify(&trellis, Some(source.path()), &[Cpu::Scalar, Cpu::detect()], &Silent).unwrap();
        assert_eq!(report.status, Status::Proven, "{:#?}", report.checks);
        assert!(with < 0.85 * without, "{bits}: {with}, {without}");
        assert!(with < before, "{bits}: {with}, {before} with fewer bits");
        before = with;

        let report = verify(&calibrated, Some(source.path()), &[Cpu::Scalar, Cpu::detect()], &Silent).unwrap();
        assert_eq!(report.status, Status::Proven, "{:#?}", report.checks);
        assert!(report.not_checked.iter().any(|item| item.contains("calibration")));
        let provenance = Provenance::open(&calibrated).unwrap();
        assert_eq!(provenance.options.calibration, Some(Calibration::new(&text, WINDOW, 21)));
    }
    // What calibration can prove is that an archive is near its source: another's is not.
    let other = model(|name, values| {
        if name.contains("layers.1.mlp.up_proj") {
            values[77] += 0.5;
        }
    });
    let (calibrated, _) = archive(source.path(), dir.path(), &options(4.5), Some(&text), 2);
    let report = verify(&calibrated, Some(other.path()), &[Cpu::Scalar], &Silent).unwrap();
    let weights = report.checks.iter().find(|c| c.name == "source.weights").unwrap();
    assert_eq!(weights.status, Status::Wrong);
    assert!(weights.detail.contains("layers.1.mlp.up_proj"), "{}", weights.detail);
}

#[test]
fn the_archive_does_not_depend_on_the_number_of_threads() {
    let (source, dir) = (model(|_, _| {}), TempDir::new().unwrap());
    let text = tokens(3 * WINDOW, 2);
    let files = |threads| {
        let (archive, _) = archive(source.path(), dir.path(), &options(4.0), Some(&text), threads);
        Provenance::open(&archive).unwrap().files
    };
    assert_eq!(files(1), files(3));
}

#[test]
fn a_selection_and_a_step_are_kept_to() {
    let (source, dir) = (model(|_, _| {}), TempDir::new().unwrap());
    let text = tokens(MIN_TOKENS, 2);
    let mut options = options(4.0);
    options.layers = r"layers\.1\.(mlp|self_attn\.o)|lm_head".parse::<Layers>().unwrap();
    options.rate = Some(RateTarget::Step(0.2));
    let (archive, summary) = archive(source.path(), dir.path(), &options, Some(&text), 2);
    assert_eq!(summary.n_encoded, 5);
    let provenance = Provenance::open(&archive).unwrap();
    assert_eq!(provenance.options.calibration.unwrap().n_tensors, 4);
    let report = verify(&archive, Some(source.path()), &[Cpu::Scalar], &Silent).unwrap();
    assert_eq!(report.status, Status::Proven, "{:#?}", report.checks);
}

#[test]
fn degenerate_layers_are_calibrated_too() {
    let source = model(|name, values| match name {
        // No signal at all reaches what follows a zero matrix; a constant one, and one of a single huge weight.
        "model.layers.0.self_attn.v_proj.weight" | "model.layers.0.self_attn.v_proj.bias" => values.fill(0.0),
        "model.layers.1.mlp.up_proj.weight" => values.fill(0.01),
        "model.layers.1.self_attn.q_proj.weight" => values[300] = 1e4,
        // A matrix of rank one, and products that only ever read zeros.
        "model.layers.1.mlp.down_proj.weight" => {
            let (row, n) = (values[..320].to_vec(), values.len() / 320);
            values.chunks_mut(320).enumerate().for_each(|(i, out)| {
                let factor = i as f32 / n as f32 - 0.4;
                out.iter_mut().zip(&row).for_each(|(o, v)| *o = factor * v);
            });
        }
        "model.layers.2.post_attention_layernorm.weight" => values.fill(0.0),
        _ => {}
    });
    let dir = TempDir::new().unwrap();
    // As few tokens as there may be, and all the same: the moments have rank one.
    let text = vec![7; MIN_TOKENS];
    let (archive, summary) = archive(source.path(), dir.path(), &options(5.0), Some(&text), 2);
    let bits = 8.0 * summary.archive_bytes as f64 / summary.n_weights as f64;
    assert!((bits / 5.0 - 1.0).abs() < 0.03, "{bits}");
    let report = verify(&archive, Some(source.path()), &[Cpu::Scalar], &Silent).unwrap();
    assert_eq!(report.status, Status::Proven, "{:#?}", report.checks);
    assert!(kld(&archive, source.path(), &text).is_finite());
}

#[test]
fn beyond_8_bit_codes_matrices_stay_exact() {
    let (source, dir) = (model(|_, _| {}), TempDir::new().unwrap());
    let (text, other) = (tokens(2 * WINDOW, 2), tokens(WINDOW, 3));
    let at = |bits: f64| {
        let (archive, summary) = archive(source.path(), dir.path(), &options(bits), Some(&text), 2);
        let found = 8.0 * summary.archive_bytes as f64 / summary.n_weights as f64;
        assert!((found / bits - 1.0).abs() < 0.01, "{bits}: {found}");
        let report = verify(&archive, Some(source.path()), &[Cpu::Scalar], &Silent).unwrap();
        assert_eq!(report.status, Status::Proven, "{:#?}", report.checks);
        let n_calibrated = Provenance::open(&archive).unwrap().options.calibration.unwrap().n_tensors;
        (kld(&archive, source.path(), &other), n_calibrated)
    };
    let ((grids, all), (mixed, some)) = (at(7.0), at(9.5));
    assert!(mixed < grids, "{mixed} with matrices kept exact, {grids} without");
    assert!(all == 21 && some < 21, "{all}, {some}");
}

const TOKENIZER: &str = r#"{"version": "1.0", "added_tokens": [], "normalizer": null, "pre_tokenizer": null, "post_processor": null,
    "decoder": null, "model": {"type": "WordLevel", "vocab": {"<s>": 0, "</s>": 1, "a": 2}, "unk_token": "a"}}"#;

#[test]
fn the_models_own_text_follows_from_its_seed() {
    let source = model(|_, _| {});
    let tokenizer = Tokenizer::from_json(TOKENIZER, Some(r#"{"bos_token": "<s>", "eos_token": "</s>"}"#)).unwrap();
    let go_on = |_| ControlFlow::Continue(());
    let text = |n, seed, threads| sample_text(&load(source.path(), threads), &tokenizer, n, seed, go_on).unwrap();
    let two = text(2, 5, 1);
    assert_eq!(two.len(), 2 * WINDOW);
    assert!(two.chunks(WINDOW).all(|window| window[0] == 0));
    assert_ne!(two[..WINDOW], two[WINDOW..]);
    assert_eq!(two, text(2, 5, 3));
    assert_eq!(two[..WINDOW], text(1, 5, 2));
    assert_ne!(two[..WINDOW], text(1, 6, 1));

    let stop = |done| if done > 20 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) };
    let error = |tokenizer, go_on: &dyn Fn(usize) -> ControlFlow<()>| {
        sample_text(&load(source.path(), 1), tokenizer, 1, 5, go_on).unwrap_err().to_string()
    };
    assert!(error(&tokenizer, &stop).contains("interrupted"));
    let bare = Tokenizer::from_json(TOKENIZER, None).unwrap();
    assert!(error(&bare, &go_on).contains("give a text"));
}

#[test]
fn what_cannot_be_calibrated_is_explained() {
    let (source, scratch) = (model(|_, _| {}), TempDir::new().unwrap());
    let error = |options: &CompressOptions, text: &[u32]| {
        let (original, mut model) = (load(source.path(), 1), load(source.path(), 1));
        calibrate(&original, &mut model, source.path(), options, text, scratch.path(), &Silent).unwrap_err().to_string()
    };
    let found = error(&options(4.0), &tokens(MIN_TOKENS - 1, 2));
    assert!(found.contains("511 tokens") && found.contains("512 or more"), "{found}");
    assert!(error(&options(40.0), &tokens(MIN_TOKENS, 2)).contains("bits/weight"));
    let mut int8 = options(4.0);
    int8.encode.format = Format::Int8;
    assert!(error(&int8, &tokens(MIN_TOKENS, 2)).contains("int8"));
}
