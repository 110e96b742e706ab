//! Compression for the inputs that a model's matrices have: second moments layer by layer, error feedback through them.
//!
//! The text runs through the model in windows, one layer at a time, and through the original beside it. What the products of
//! a site read is summed up to second moments ([`Moments`]), and how far that has drifted from what the original reads
//! ([`Drift`]). The site's matrices are encoded with error feedback through these ([`codecllm_codec::feedback`]), and the model
//! goes on with what they were encoded to, so that all sites after it see what they will see. In memory are the residual streams of all
//! windows, the moments of one site, and both models' weights, mapped where the backend maps them.
//!
//! Where no text is given, the model writes it: samples at temperature 1 have the distribution that the model has learned,
//! so that no text needs to be found that resembles it. (Calibration with samples of the model: LLM-QAT, Liu et al. 2023.)

use crate::backend::Backend;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::llama::{KvCache, Model, Site};
use crate::sampler::{Sampler, SamplingOptions};
use crate::tokenizer::Tokenizer;
use crate::weights::{Loader, Weight};
use codecllm_codec::Format;
use codecllm_codec::archive::{self, Calibrated, Calibration, CompressOptions, PlannedTensor, Progress};
use codecllm_codec::checkpoint::Checkpoint;
use codecllm_codec::encoded::{Checks, EncodedTensor, encode_with_feedback};
use codecllm_codec::feedback::{Correction, Drift, InputFactor, Moments};
use std::collections::HashMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

/// Tokens of a window.
pub const WINDOW: usize = 512;
/// Windows, where nothing else is asked for. A third of them would leave a fifth to a quarter more divergence: second moments of so few
/// inputs are noisy.
pub const DEFAULT_SAMPLES: usize = 96;
/// Fewer tokens than this say too little of a model.
pub const MIN_TOKENS: usize = 512;

/// A matrix may miss its share of the size by this part, which the next ones then make up for, after so many trials.
const SIZE_TOLERANCE: f64 = 0.003;
const SIZE_TRIALS: usize = 4;

/// The matrices of a layer by what they read, in the order of the forward pass.
const SITES: [(Site, &[&str]); 4] = [
    (Site::Attention, &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
    (Site::AttentionOutput, &["self_attn.o_proj"]),
    (Site::Mlp, &["mlp.gate_proj", "mlp.up_proj"]),
    (Site::MlpOutput, &["mlp.down_proj"]),
];

/// Text of the model's own: `n_samples` windows, drawn at temperature 1 from the token that begins a text. The same model, seed
/// and instruction set give the same tokens. `on_progress` is told how many tokens are done, and may stop.
///
/// # Errors
/// A tokenizer without a token to begin with; logits that are not numbers.
pub fn sample_text<B: Backend>(
    model: &Model<B>,
    tokenizer: &Tokenizer,
    n_samples: usize,
    seed: u64,
    mut on_progress: impl FnMut(usize) -> ControlFlow<()>,
) -> Result<Vec<u32>> {
    let config = model.config();
    let is_eos = |id| config.eos_token_ids.contains(&id) || tokenizer.eos() == Some(id);
    let first = tokenizer.bos().or(tokenizer.eos()).or(config.eos_token_ids.first().copied()).ok_or_else(|| {
        Error::Parameter(
            "the tokenizer has no token that begins or ends a text, so the model cannot begin one of its own; give a text"
                .into(),
        )
    })?;
    let window = WINDOW.min(config.max_positions);
    let mut cache = model.new_cache(window)?;
    let mut sampler = Sampler::new(SamplingOptions { temperature: 1.0, seed, ..Default::default() })?;
    let mut tokens = Vec::with_capacity(n_samples * window);
    for _ in 0..n_samples {
        cache.reset();
        let start = tokens.len();
        tokens.push(first);
        while tokens.len() < start + window {
            if on_progress(tokens.len()).is_break() {
                return Err(codecllm_codec::Error::Interrupted.into());
            }
            let last = tokens[tokens.len() - 1];
            // After the end of a text comes another.
            let next = match last != first && is_eos(last) {
                true => first,
                false => {
                    let at = start + cache.len();
                    model.sample(&tokens[at..], &mut cache, &sampler.draw(&[]))?
                }
            };
            tokens.push(next);
        }
    }
    Ok(tokens)
}

/// Encodes the linear layers that `options` selects for the inputs that they have on `tokens`, in windows of [`WINDOW`] tokens,
/// into files in `scratch`, a directory of the caller's. [`archive::compress`] takes the result.
///
/// `original` and `model` are both loaded from the checkpoint `source`; `model` is as it was at the end. The result depends on source,
/// options and tokens, and on the instruction set; not on the number of threads.
///
/// # Errors
/// Fewer than [`MIN_TOKENS`] tokens; a format other than `rate`; a target that cannot be met;
/// [`Interrupted`](codecllm_codec::Error::Interrupted).
pub fn calibrate<B: Backend>(
    original: &Model<B>,
    model: &mut Model<B>,
    source: &Path,
    options: &CompressOptions,
    tokens: &[u32],
    scratch: &Path,
    progress: &dyn Progress,
) -> Result<Calibrated> {
    if tokens.len() < MIN_TOKENS {
        return Err(Error::Parameter(format!(
            "the calibration text has {} tokens; give one of {MIN_TOKENS} or more (some tens of thousands are good), or none: \
             the model then writes its own",
            tokens.len()
        )));
    }
    let plan = archive::plan(source, options, progress)?;
    // What is kept as it is has nothing to gain from its inputs.
    let is_other = |planned: &PlannedTensor| {
        planned.options.format != Format::Rate || place_of(&planned.name, model.config()).is_none()
    };
    let (others, linear): (Vec<_>, Vec<_>) = plan.into_iter().partition(is_other);
    let checkpoint = Checkpoint::open(source)?;
    let window = WINDOW.min(model.config().max_positions);
    let mut job = Job {
        checkpoint: &checkpoint,
        scratch,
        progress,
        trellis: options.encode.trellis,
        left: linear.iter().filter_map(|planned| planned.bits).sum(),
        planned: linear.into_iter().map(|planned| (planned.name.clone(), planned)).collect(),
        surplus: 0.0,
        files: HashMap::new(),
    };
    job.run(original, model, tokens, window)?;
    Ok(Calibrated {
        record: Calibration::new(tokens, window, job.files.len()),
        files: job.files,
        others: others.into_iter().map(|planned| (planned.name, planned.options)).collect(),
    })
}

/// The layer and the module of a linear layer's name; none where it is no matrix of the model's layers.
fn place_of<'a>(name: &'a str, config: &Config) -> Option<(usize, &'a str)> {
    let (layer, module) = name.strip_prefix("model.layers.")?.strip_suffix(".weight")?.split_once('.')?;
    let layer = layer.parse().ok().filter(|layer| *layer < config.n_layers)?;
    SITES.iter().any(|(_, modules)| modules.contains(&module)).then_some((layer, module))
}

fn name_of(layer: usize, module: &str) -> String {
    format!("model.layers.{layer}.{module}.weight")
}

/// The residual stream of a window, `[n_tokens, hidden_size]`.
struct Streams {
    /// In the original.
    original: Vec<f32>,
    /// In the model, the layers so far compressed.
    compressed: Vec<f32>,
}

/// `x / sqrt(mean(x²) + eps) · weight`, in place.
fn rms_norm(x: &mut [f32], weight: &[f32], eps: f32) {
    let mean = x.iter().map(|x| x * x).sum::<f32>() / x.len() as f32;
    let scale = 1.0 / (mean + eps).sqrt();
    x.iter_mut().zip(weight).for_each(|(x, w)| *x *= scale * w);
}

struct Job<'a> {
    checkpoint: &'a Checkpoint,
    scratch: &'a Path,
    progress: &'a dyn Progress,
    trellis: bool,
    /// Matrices that are still to be encoded.
    planned: HashMap<String, PlannedTensor>,
    /// Their planned bits together.
    left: f64,
    /// Bits that the matrices so far took less than planned.
    surplus: f64,
    files: HashMap<String, PathBuf>,
}

impl Job<'_> {
    fn run<B: Backend>(
        &mut self,
        original: &Model<B>,
        model: &mut Model<B>,
        tokens: &[u32],
        window: usize,
    ) -> Result<()> {
        let n_bytes = |name: &str| self.checkpoint.info(name).map_or(0, |info| info.n_bytes as u64);
        self.progress.begin(self.planned.keys().map(|name| n_bytes(name)).sum());
        let mut cache = model.new_cache(window)?;
        let windows = tokens.chunks(window);
        let mut streams: Vec<Streams> = windows
            .map(|tokens| {
                let original = model.embed(tokens, &mut cache)?;
                Ok(Streams { compressed: original.clone(), original })
            })
            .collect::<Result<_>>()?;
        for layer in 0..model.config().n_layers {
            if self.planned.is_empty() {
                break;
            }
            let mut replaced = Vec::new();
            for (site, modules) in SITES {
                let wanted: Vec<(&str, PlannedTensor)> = modules
                    .iter()
                    .filter_map(|module| Some((*module, self.planned.remove(&name_of(layer, module))?)))
                    .collect();
                if wanted.is_empty() {
                    continue;
                }
                let (moments, drift) = self.moments(original, model, layer, site, &streams, &mut cache)?;
                let factor = InputFactor::new(&moments, self.trellis)?;
                drop(moments);
                let correction = drift.map(|drift| factor.correction(&drift)).transpose()?;
                for (module, planned) in wanted {
                    let tensor = self.encode(&planned, &factor, correction.as_ref())?;
                    let (n_rows, n_cols) = (tensor.n_rows(), tensor.n_cols());
                    model.replace(layer, module, Weight::Encoded(tensor))?;
                    replaced.push((module, n_rows, n_cols));
                }
            }
            if !self.planned.is_empty() {
                let go_on = |_, _: &[f32]| Ok(ControlFlow::Continue(()));
                for streams in &mut streams {
                    self.check_stopped()?;
                    original.run_layer(layer, &mut streams.original, &mut cache, go_on)?;
                    model.run_layer(layer, &mut streams.compressed, &mut cache, go_on)?;
                }
            }
            // No more than one layer takes memory beside the checkpoint's mapped file.
            let loader = Loader::new(self.checkpoint, Checks::None);
            for (module, n_rows, n_cols) in replaced {
                model.replace(layer, module, loader.matrix(&name_of(layer, module), n_rows, n_cols)?)?;
            }
        }
        Ok(())
    }

    /// The second moments of what a site's products read, and how far that is from what they read in the original; no drift where
    /// the two are the same.
    fn moments<B: Backend>(
        &self,
        original: &Model<B>,
        model: &Model<B>,
        layer: usize,
        site: Site,
        streams: &[Streams],
        cache: &mut KvCache<B>,
    ) -> Result<(Moments, Option<Drift>)> {
        let (width, hidden_size) = (model.site_width(site), model.config().hidden_size);
        let norm = match site {
            Site::Attention => Some("input_layernorm"),
            Site::Mlp => Some("post_attention_layernorm"),
            Site::AttentionOutput | Site::MlpOutput => None,
        };
        let loader = Loader::new(self.checkpoint, Checks::None);
        let norm = norm.map(|module| loader.vector(&format!("model.layers.{layer}.{module}.weight"), hidden_size));
        let (norm, eps) = (norm.transpose()?.map(|(weight, _)| weight), model.config().rms_norm_eps);
        let mut moments = Moments::new(width);
        let mut drift = Drift::new(width);
        let mut has_drift = false;
        for streams in streams {
            self.check_stopped()?;
            let mut inputs = |model: &Model<B>, x: &[f32]| -> Result<Vec<f32>> {
                let mut inputs = Vec::with_capacity(x.len() / hidden_size * width);
                model.run_layer(layer, &mut x.to_vec(), cache, |at, values| {
                    if at != site {
                        return Ok(ControlFlow::Continue(()));
                    }
                    inputs.extend_from_slice(values);
                    Ok(ControlFlow::Break(()))
                })?;
                if let Some(weight) = &norm {
                    inputs.chunks_exact_mut(hidden_size).for_each(|x| rms_norm(x, weight, eps));
                }
                Ok(inputs)
            };
            let x = inputs(model, &streams.compressed)?;
            let mut differences = inputs(original, &streams.original)?;
            differences.iter_mut().zip(&x).for_each(|(d, x)| *d -= x);
            moments.add(&x);
            if has_drift || differences.iter().any(|d| *d != 0.0) {
                has_drift = true;
                drift.add(&differences, &x);
            }
        }
        Ok((moments, has_drift.then_some(drift)))
    }

    /// Encodes a matrix into its file, with the step at which it takes its share of the bits.
    fn encode(
        &mut self,
        planned: &PlannedTensor,
        factor: &InputFactor,
        correction: Option<&Correction>,
    ) -> Result<EncodedTensor> {
        let name = &planned.name;
        self.progress.tensor(name);
        let tensor = self.checkpoint.tensor(name)?;
        let targets = correction.map(|c| c.apply(&tensor)).transpose().map_err(|e| e.in_tensor(name))?;
        let n_weights: f64 = tensor.shape.iter().map(|n| *n as f64).product();
        // What the matrices before saved or took too much is shared out over those that follow.
        let wanted = planned.bits.map(|bits| bits + self.surplus * bits / self.left.max(bits));
        let mut options = planned.options;
        let mut trials: Vec<(f64, f64)> = Vec::new();
        let bytes = loop {
            self.check_stopped()?;
            let bytes =
                encode_with_feedback(&tensor, &options, factor, targets.as_deref()).map_err(|e| e.in_tensor(name))?;
            let bits = 8.0 * bytes.len() as f64;
            let (Some(wanted), Some(step)) = (wanted, options.step) else { break bytes };
            trials.push((f64::from(step).log2(), bits));
            if (bits / wanted - 1.0).abs() < SIZE_TOLERANCE || trials.len() == SIZE_TRIALS {
                break bytes;
            }
            // Doubling the step saves about a bit a weight; two trials tell better.
            let slope = match trials[..] {
                [.., (a, bits_a), (b, bits_b)] if (a - b).abs() > 1e-4 => (bits_a - bits_b) / (a - b),
                _ => -n_weights,
            };
            let change = (wanted - bits) / slope.clamp(-1.5 * n_weights, -0.3 * n_weights);
            options.step =
                Some(((f64::from(step).log2() + change.clamp(-1.0, 1.0)).exp2() as f32).max(f32::MIN_POSITIVE));
        };
        if let Some(bits) = planned.bits {
            self.surplus += bits - 8.0 * bytes.len() as f64;
            self.left -= bits;
        }
        let path = self.scratch.join(format!("{:05}", self.files.len()));
        std::fs::write(&path, &bytes).map_err(|e| Error::io(&path, e))?;
        self.files.insert(name.clone(), path);
        self.progress.advance(tensor.data.len() as u64);
        Ok(EncodedTensor::parse(bytes.into(), Checks::None)?)
    }

    fn check_stopped(&self) -> Result<()> {
        if self.progress.is_stopped() { Err(codecllm_codec::Error::Interrupted.into()) } else { Ok(()) }
    }
}
