//! Compression for the inputs that a model's matrices have: second moments layer by layer, error feedback through them.
//!
//! The text runs through the model in windows, one layer at a time. What a layer's products read is summed up to second
//! moments ([`Moments`]); its matrices are encoded with error feedback through these ([`codecllm_codec::feedback`]); then
//! the layer runs again with what they were encoded to, so that the layers after it see what they will see. In memory
//! are the residual stream of all windows, the moments of one layer, and the model.
//!
//! Where no text is given, the model writes it: samples at temperature 1 have the distribution that the model has learned,
//! so that no text needs to be found that resembles it. (Calibration with samples of the model: LLM-QAT, Liu et al. 2023.)

use crate::backend::{Backend, Logits};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::llama::{KvCache, Model, Site};
use crate::sampler::{Sampler, SamplingOptions};
use crate::tokenizer::Tokenizer;
use crate::weights::Loader;
use codecllm_codec::archive::{self, Calibrated, Calibration, CompressOptions, PlannedTensor, Progress};
use codecllm_codec::checkpoint::Checkpoint;
use codecllm_codec::encoded::{Checks, EncodedTensor, encode_with_feedback};
use codecllm_codec::feedback::{InputFactor, Moments};
use std::collections::HashMap;
use std::ops::ControlFlow;
use std::path::Path;

/// Tokens of a window.
pub const WINDOW: usize = 512;
/// Windows, where nothing else is asked for.
pub const DEFAULT_SAMPLES: usize = 32;
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
                    let mut logits = model.forward(&tokens[at..], &mut cache, Logits::Last)?;
                    sampler.sample(&mut logits, &[])?
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
/// `model` is loaded from the checkpoint `source`, and as it was at the end. The result depends on source, options and tokens, and on
/// the instruction set; not on the number of threads.
///
/// # Errors
/// Fewer than [`MIN_TOKENS`] tokens; a format other than `rate`; a target that cannot be met;
/// [`Interrupted`](codecllm_codec::Error::Interrupted).
pub fn calibrate<B: Backend>(
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
    let (others, linear): (Vec<_>, Vec<_>) =
        plan.into_iter().partition(|planned| place_of(&planned.name, model.config()).is_none());
    let checkpoint = Checkpoint::open(source)?;
    let window = WINDOW.min(model.config().max_positions);
    let mut job = Job {
        checkpoint: &checkpoint,
        scratch,
        progress,
        left: linear.iter().filter_map(|planned| planned.bits).sum(),
        planned: linear.into_iter().map(|planned| (planned.name.clone(), planned)).collect(),
        surplus: 0.0,
        files: HashMap::new(),
    };
    job.run(model, tokens, window)?;
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

struct Job<'a> {
    checkpoint: &'a Checkpoint,
    scratch: &'a Path,
    progress: &'a dyn Progress,
    /// Matrices that are still to be encoded.
    planned: HashMap<String, PlannedTensor>,
    /// Their planned bits together.
    left: f64,
    /// Bits that the matrices so far took less than planned.
    surplus: f64,
    files: HashMap<String, std::path::PathBuf>,
}

impl Job<'_> {
    fn run<B: Backend>(&mut self, model: &mut Model<B>, tokens: &[u32], window: usize) -> Result<()> {
        let n_bytes = |name: &str| self.checkpoint.info(name).map_or(0, |info| info.n_bytes as u64);
        self.progress.begin(self.planned.keys().map(|name| n_bytes(name)).sum());
        let mut cache = model.new_cache(window)?;
        let windows = tokens.chunks(window);
        let mut streams: Vec<Vec<f32>> =
            windows.map(|tokens| model.embed(tokens, &mut cache)).collect::<Result<_>>()?;
        for layer in 0..model.config().n_layers {
            if self.planned.is_empty() {
                break;
            }
            self.check_stopped()?;
            let moments = self.moments(model, layer, &streams, &mut cache)?;
            let mut encoded = Vec::new();
            for (site, modules) in SITES {
                let Some(moments) = moments.get(&site) else { continue };
                let factor = InputFactor::new(moments)?;
                for module in modules {
                    if let Some(planned) = self.planned.remove(&name_of(layer, module)) {
                        encoded.push((*module, self.encode(&planned, &factor)?));
                    }
                }
            }
            for (module, tensor) in &encoded {
                model.replace(layer, module, crate::weights::Weight::Encoded(tensor.clone()))?;
            }
            if !self.planned.is_empty() {
                for x in &mut streams {
                    self.check_stopped()?;
                    model.run_layer(layer, x, &mut cache, |_, _| Ok(()))?;
                }
            }
            // The layer is as it was, so that no more than one takes memory beside the checkpoint's mapped file.
            let loader = Loader::new(self.checkpoint, Checks::None);
            for (module, tensor) in encoded {
                let name = name_of(layer, module);
                model.replace(layer, module, loader.matrix(&name, tensor.n_rows(), tensor.n_cols())?)?;
            }
        }
        Ok(())
    }

    /// The second moments of what the matrices of a layer read that are to be encoded.
    fn moments<B: Backend>(
        &self,
        model: &Model<B>,
        layer: usize,
        streams: &[Vec<f32>],
        cache: &mut KvCache<B>,
    ) -> Result<HashMap<Site, Moments>> {
        let is_wanted = |modules: &[&str]| modules.iter().any(|m| self.planned.contains_key(&name_of(layer, m)));
        let mut moments: HashMap<Site, Moments> = SITES
            .iter()
            .filter(|(_, modules)| is_wanted(modules))
            .map(|(site, _)| (*site, Moments::new(model.site_width(*site))))
            .collect();
        if moments.is_empty() {
            return Ok(moments);
        }
        let hidden_size = model.config().hidden_size;
        let loader = Loader::new(self.checkpoint, Checks::None);
        let norm = |module: &str| loader.vector(&format!("model.layers.{layer}.{module}.weight"), hidden_size);
        let norms = [norm("input_layernorm")?, norm("post_attention_layernorm")?];
        let eps = model.config().rms_norm_eps;
        let mut normed = Vec::new();
        for x in streams {
            self.check_stopped()?;
            // The residual stream after this pass is not the one that the next layers will see.
            let mut x = x.clone();
            model.run_layer(layer, &mut x, cache, |site, values| {
                let Some(moments) = moments.get_mut(&site) else { return Ok(()) };
                let weight = match site {
                    Site::Attention => &norms[0],
                    Site::Mlp => &norms[1],
                    Site::AttentionOutput | Site::MlpOutput => {
                        moments.add(values);
                        return Ok(());
                    }
                };
                normed.clear();
                for x in values.chunks_exact(hidden_size) {
                    let mean = x.iter().map(|x| x * x).sum::<f32>() / hidden_size as f32;
                    let scale = 1.0 / (mean + eps).sqrt();
                    normed.extend(x.iter().zip(weight).map(|(x, w)| x * scale * w));
                }
                moments.add(&normed);
                Ok(())
            })?;
        }
        Ok(moments)
    }

    /// Encodes a matrix into its file, with the step at which it takes its share of the bits.
    fn encode(&mut self, planned: &PlannedTensor, factor: &InputFactor) -> Result<EncodedTensor> {
        let name = &planned.name;
        self.progress.tensor(name);
        let tensor = self.checkpoint.tensor(name)?;
        let n_weights: f64 = tensor.shape.iter().map(|n| *n as f64).product();
        // What the matrices before saved or took too much is shared out over those that follow.
        let wanted = planned.bits.map(|bits| bits + self.surplus * bits / self.left.max(bits));
        let mut options = planned.options;
        let mut trials: Vec<(f64, f64)> = Vec::new();
        let bytes = loop {
            self.check_stopped()?;
            let bytes = encode_with_feedback(&tensor, &options, factor, None, None).map_err(|e| e.in_tensor(name))?;
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
