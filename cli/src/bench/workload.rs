//! What a bench runs over: the matrices of a model (real or drawn from a seed), or of one shape.

use bytes::Bytes;
use codecllm_codec::checkpoint::{Checkpoint, Dtype, Tensor};
use codecllm_codec::encoded::{Checks, EncodeOptions, EncodedTensor, encode_tensor};
use codecllm_codec::quantize::rms;
use codecllm_codec::{Cpu, Format, Prefer};
use codecllm_engine::{Config, TensorSource};
use half::bf16;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use rayon::prelude::*;
use std::collections::HashMap;
use std::fmt::{Display, Formatter};
use std::ops::Range;
use std::path::Path;
use std::str::FromStr;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// At most this many weights are drawn for a model shape; a larger model is stood for by some of its layers.
const MAX_DRAWN_WEIGHTS: usize = 1_200_000_000;
/// Rows of a task: the smallest multiple of 32 with at least this many weights.
const TASK_WEIGHTS: usize = 1 << 18;

/// A model whose shape can be benched without its weights.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
pub enum ModelShape {
    /// TinyLlama 1.1B: 22 layers, 1.03 G weights in its linear layers
    #[value(name = "tinyllama-1.1b")]
    TinyLlama,
    /// Llama 3 8B: 32 layers, 7.5 G weights in its linear layers
    #[value(name = "llama-3-8b")]
    Llama3,
}

impl ModelShape {
    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::TinyLlama => "tinyllama-1.1b",
            Self::Llama3 => "llama-3-8b",
        }
    }

    fn config(self) -> Result<Config> {
        let json = match self {
            Self::TinyLlama => {
                r#"{"model_type": "llama", "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
                    "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 32000, "rms_norm_eps": 1e-5,
                    "max_position_embeddings": 2048, "rope_theta": 10000.0, "tie_word_embeddings": false}"#
            }
            Self::Llama3 => {
                r#"{"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "rms_norm_eps": 1e-5,
                    "max_position_embeddings": 8192, "rope_theta": 500000.0, "tie_word_embeddings": false}"#
            }
        };
        Ok(Config::from_json(json)?)
    }
}

/// One matrix in BF16, `[n_rows, n_cols]` row-major.
pub struct Matrix {
    pub name: String,
    pub n_rows: usize,
    pub n_cols: usize,
    pub data: Bytes,
}

impl Matrix {
    pub fn n_weights(&self) -> usize {
        self.n_rows * self.n_cols
    }

    pub fn tensor(&self) -> Tensor {
        tensor(&self.name, vec![self.n_rows, self.n_cols], self.data.clone())
    }
}

/// Rows of a matrix that one thread works on at a time.
pub struct Task {
    pub matrix: usize,
    pub rows: Range<usize>,
}

/// Matrices that are run together, as those of one layer, in tasks that the threads share.
pub struct Group {
    pub tasks: Vec<Task>,
}

/// Groups of the same shapes, and how many such groups the whole model has.
pub struct Kind {
    pub per_pass: usize,
    pub weights_per_group: usize,
    pub groups: Vec<Group>,
}

/// The matrices to run over, and how a pass over the whole model is made of them.
pub struct Workload {
    /// What stands here, in words.
    pub title: String,
    /// Every matrix exists `n_copies` times in memory, so that the caches hold none: copy `c` of matrix `m` has the
    /// index `c * matrices.len() + m`.
    pub matrices: Vec<Matrix>,
    pub n_copies: usize,
    pub kinds: Vec<Kind>,
    /// The whole model, where there is one to generate with.
    pub model: Option<WholeModel>,
}

/// What the engine loads: the configuration, and every tensor that is not among the workload's matrices.
pub struct WholeModel {
    pub config: Config,
    pub others: HashMap<String, Tensor>,
    /// Matrices that lie under a second name: (that name, index of the matrix).
    pub aliases: Vec<(String, usize)>,
}

impl Workload {
    /// Copies of one drawn matrix.
    pub fn of_shape(n_rows: usize, n_cols: usize, seed: u64, cache_bytes: usize) -> Self {
        let data = Weights::new(seed).draw(0, n_rows, n_cols);
        let matrix = Matrix { name: format!("{n_rows}x{n_cols}"), n_rows, n_cols, data };
        let title = format!("one matrix of {n_rows} x {n_cols}, drawn from seed {seed}");
        Self::new(title, vec![matrix], &[(1, vec![vec![0]])], None, cache_bytes)
    }

    /// A model's matrices, drawn from a seed: all layers, or as many as the memory and the time allow.
    pub fn of_model_shape(shape: ModelShape, seed: u64, bytes_per_weight: f64, cache_bytes: usize) -> Result<Self> {
        let config = shape.config()?;
        let layer = layer_matrices(&config, 0);
        let layer_weights: usize = layer.iter().map(|(_, rows, cols)| rows * cols).sum();
        let head_weights = config.vocab_size * config.hidden_size;
        let affordable = (0.6 * available_memory() as f64 / bytes_per_weight) as usize;
        let n_layers = affordable.min(MAX_DRAWN_WEIGHTS).saturating_sub(head_weights) / layer_weights;
        if n_layers == 0 {
            return Err(format!(
                "one layer and the head of this shape need {:.1} GB in all forms together, more than this machine has \
                 free; ask for fewer with --format, or for a single --shape",
                (layer_weights + head_weights) as f64 * bytes_per_weight / 0.6e9
            )
            .into());
        }
        let n_layers = n_layers.min(config.n_layers);

        let weights = Weights::new(seed);
        let mut matrices = Vec::new();
        for i in 0..n_layers {
            for (name, n_rows, n_cols) in layer_matrices(&config, i) {
                let data = weights.draw(matrices.len() as u64, n_rows, n_cols);
                matrices.push(Matrix { name, n_rows, n_cols, data });
            }
        }
        let head = matrices.len();
        let (n_rows, n_cols) = (config.vocab_size, config.hidden_size);
        matrices.push(Matrix {
            name: "lm_head.weight".into(),
            n_rows,
            n_cols,
            data: weights.draw(head as u64, n_rows, n_cols),
        });

        let mut title = format!(
            "{} layers of {:.1} M weights and the head, drawn from seed {seed}",
            config.n_layers,
            layer_weights as f64 / 1e6
        );
        if n_layers < config.n_layers {
            title += &format!("; {n_layers} layers are in memory and are run in turn for the others");
        }
        let layers = (0..n_layers).map(|i| (i * layer.len()..(i + 1) * layer.len()).collect()).collect();
        let kinds = [(config.n_layers, layers), (1, vec![vec![head]])];
        let model = (n_layers == config.n_layers).then(|| WholeModel {
            others: norms(&config),
            // The embedding is read a row at a time: no need for weights of its own.
            aliases: vec![("model.embed_tokens.weight".into(), head)],
            config,
        });
        Ok(Self::new(title, matrices, &kinds, model, cache_bytes))
    }

    /// The matrices of a checkpoint, or those of an archive, decoded.
    pub fn of_checkpoint(dir: &Path, cache_bytes: usize) -> Result<Self> {
        let config = Config::open(dir)?;
        let checkpoint = Checkpoint::open(dir)?;
        let mut matrices = Vec::new();
        let mut layers = Vec::new();
        for i in 0..config.n_layers {
            let first = matrices.len();
            for (name, n_rows, n_cols) in layer_matrices(&config, i) {
                let data = bf16_values(&checkpoint, &name, n_rows, n_cols)?;
                matrices.push(Matrix { name, n_rows, n_cols, data });
            }
            layers.push((first..matrices.len()).collect());
        }
        let embedding = "model.embed_tokens.weight".to_string();
        let name = if config.tied_embeddings { embedding.clone() } else { "lm_head.weight".into() };
        let (n_rows, n_cols) = (config.vocab_size, config.hidden_size);
        let head = matrices.len();
        matrices.push(Matrix { data: bf16_values(&checkpoint, &name, n_rows, n_cols)?, name, n_rows, n_cols });

        let mut others = HashMap::new();
        for name in checkpoint.names() {
            if matrices.iter().all(|m| m.name != *name) {
                others.insert(name.to_string(), checkpoint.tensor(name)?);
            }
        }
        let kinds = [(config.n_layers, layers), (1, vec![vec![head]])];
        let title = format!("{}: {} layers and the head", dir.display(), config.n_layers);
        let model = WholeModel { config, others, aliases: Vec::new() };
        Ok(Self::new(title, matrices, &kinds, Some(model), cache_bytes))
    }

    /// `kinds`: how often a pass has a group of the kind, and the matrices of each group.
    fn new(
        title: String,
        matrices: Vec<Matrix>,
        kinds: &[(usize, Vec<Vec<usize>>)],
        model: Option<WholeModel>,
        cache_bytes: usize,
    ) -> Self {
        let n_weights: usize = matrices.iter().map(Matrix::n_weights).sum();
        // The smallest form has somewhat less than a byte a weight. A tiny matrix is not copied forever.
        let n_copies = (cache_bytes as f64 / (0.8 * n_weights as f64)).ceil().clamp(1.0, 4096.0) as usize;
        let kinds = kinds
            .iter()
            .map(|(per_pass, groups)| Kind {
                per_pass: *per_pass,
                weights_per_group: groups[0].iter().map(|&m| matrices[m].n_weights()).sum(),
                groups: (0..n_copies)
                    .flat_map(|copy| groups.iter().map(move |g| (copy, g)))
                    .map(|(copy, group)| Group {
                        tasks: group.iter().flat_map(|&m| tasks(&matrices[m], copy * matrices.len() + m)).collect(),
                    })
                    .collect(),
            })
            .collect();
        Self { title, matrices, n_copies, kinds, model }
    }

    /// Weights that one pass over the whole model reads.
    pub fn weights_per_pass(&self) -> usize {
        self.kinds.iter().map(|k| k.per_pass * k.weights_per_group).sum()
    }

    /// The first matrix of every shape, by index.
    pub fn distinct_shapes(&self) -> Vec<usize> {
        let shape = |m: &Matrix| (m.n_rows, m.n_cols);
        let is_first = |&i: &usize| self.matrices[..i].iter().all(|m| shape(m) != shape(&self.matrices[i]));
        (0..self.matrices.len()).filter(is_first).collect()
    }
}

fn tasks(matrix: &Matrix, index: usize) -> impl Iterator<Item = Task> {
    let step = TASK_WEIGHTS.div_ceil(matrix.n_cols).next_multiple_of(32);
    let n_rows = matrix.n_rows;
    (0..n_rows).step_by(step).map(move |row| Task { matrix: index, rows: row..n_rows.min(row + step) })
}

/// The linear layers of layer `i`: name, rows, columns.
fn layer_matrices(config: &Config, i: usize) -> Vec<(String, usize, usize)> {
    let (hidden, ffn) = (config.hidden_size, config.intermediate_size);
    let (q, kv) = (config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim);
    [
        ("self_attn.q_proj", q, hidden),
        ("self_attn.k_proj", kv, hidden),
        ("self_attn.v_proj", kv, hidden),
        ("self_attn.o_proj", hidden, q),
        ("mlp.gate_proj", ffn, hidden),
        ("mlp.up_proj", ffn, hidden),
        ("mlp.down_proj", hidden, ffn),
    ]
    .map(|(name, rows, cols)| (format!("model.layers.{i}.{name}.weight"), rows, cols))
    .into()
}

/// A whole model, drawn from a seed, as the engine loads it. Of its layers so many are drawn as time allows; they stand for
/// the others in turn, which get memory of their own when they are loaded.
pub struct DrawnModel {
    pub config: Config,
    tensors: HashMap<String, Tensor>,
    n_drawn_layers: usize,
    n_drawn_weights: usize,
}

impl DrawnModel {
    /// Draws a model of this shape.
    pub fn new(shape: ModelShape, seed: u64) -> Result<Self> {
        let config = shape.config()?;
        let weights = Weights::new(seed);
        let layer_weights: usize = layer_matrices(&config, 0).iter().map(|(_, rows, cols)| rows * cols).sum();
        let n_drawn_layers = (MAX_DRAWN_WEIGHTS / layer_weights).clamp(1, config.n_layers);
        let mut tensors = norms(&config);
        let n_drawn_weights = n_drawn_layers * layer_weights + config.vocab_size * config.hidden_size;
        let head = ("lm_head.weight".to_string(), config.vocab_size, config.hidden_size);
        let layers = (0..n_drawn_layers).flat_map(|i| layer_matrices(&config, i));
        for (index, (name, n_rows, n_cols)) in (0..).zip(layers.chain([head])) {
            let data = weights.draw(index, n_rows, n_cols);
            tensors.insert(name.clone(), tensor(&name, vec![n_rows, n_cols], data));
        }
        Ok(Self { config, tensors, n_drawn_layers, n_drawn_weights })
    }

    /// The same with its matrices encoded.
    pub fn encode(&self, form: Form, prefer: Prefer) -> Result<Self> {
        let encode = |(name, tensor): (&String, &Tensor)| -> Result<(String, Tensor)> {
            if tensor.shape.len() != 2 {
                return Ok((name.clone(), tensor.clone()));
            }
            let options = encode_options(form, prefer, tensor)?;
            let data = Bytes::from(encode_tensor(tensor, &options).map_err(|e| e.in_tensor(name))?);
            Ok((name.clone(), Tensor { dtype: Dtype::U8, shape: vec![data.len()], data, ..tensor.clone() }))
        };
        let tensors = self.tensors.iter().map(encode).collect::<Result<_>>()?;
        Ok(Self { config: self.config.clone(), tensors, ..*self })
    }

    /// Bits of a matrix's weight, everything counted.
    pub fn bits_per_weight(&self) -> f64 {
        let matrices = self.tensors.values().filter(|t| !t.name.ends_with("norm.weight"));
        8.0 * matrices.map(|t| t.data.len()).sum::<usize>() as f64 / self.n_drawn_weights as f64
    }

    /// The share of the weights that a token's pass reads: all but the embedding.
    pub fn share_read(&self) -> f64 {
        let config = &self.config;
        let layer: usize = layer_matrices(config, 0).iter().map(|(_, rows, cols)| rows * cols).sum();
        let head = config.vocab_size * config.hidden_size;
        let read = (config.n_layers * layer + head) as f64;
        read / (read + head as f64)
    }
}

impl TensorSource for DrawnModel {
    fn tensor(&self, name: &str) -> codecllm_engine::Result<Option<Tensor>> {
        if name == "model.embed_tokens.weight" {
            return self.tensor("lm_head.weight");
        }
        let drawn = name.strip_prefix("model.layers.").and_then(|rest| {
            let (layer, rest) = rest.split_once('.')?;
            Some(format!("model.layers.{}.{rest}", layer.parse::<usize>().ok()? % self.n_drawn_layers))
        });
        Ok(self.tensors.get(drawn.as_deref().unwrap_or(name)).cloned())
    }
}

/// The norms of a drawn model: all ones.
fn norms(config: &Config) -> HashMap<String, Tensor> {
    let one: Bytes = std::iter::repeat_n(bf16::ONE.to_le_bytes(), config.hidden_size).flatten().collect();
    let layers = (0..config.n_layers).flat_map(|i| {
        ["input_layernorm", "post_attention_layernorm"].map(|norm| format!("model.layers.{i}.{norm}.weight"))
    });
    layers
        .chain(["model.norm.weight".to_string()])
        .map(|name| (name.clone(), tensor(&name, vec![config.hidden_size], one.clone())))
        .collect()
}

fn tensor(name: &str, shape: Vec<usize>, data: Bytes) -> Tensor {
    Tensor { name: name.into(), dtype: Dtype::Bf16, shape, data }
}

/// A matrix of a checkpoint as BF16, whatever it is stored as.
fn bf16_values(checkpoint: &Checkpoint, name: &str, n_rows: usize, n_cols: usize) -> Result<Bytes> {
    let tensor = checkpoint.tensor(name)?;
    let narrow = |values: &mut dyn Iterator<Item = f32>| values.flat_map(|v| bf16::from_f32(v).to_le_bytes()).collect();
    let data = match tensor.dtype {
        Dtype::Bf16 => tensor.data,
        Dtype::F16 => narrow(&mut tensor.data.as_chunks().0.iter().map(|b| half::f16::from_le_bytes(*b).to_f32())),
        Dtype::F32 => narrow(&mut tensor.data.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b))),
        Dtype::U8 if EncodedTensor::is_encoded(&tensor.data) => {
            let encoded = EncodedTensor::parse(tensor.data, Checks::Full).map_err(|e| e.in_tensor(name))?;
            let mut values = vec![0.0; encoded.n_rows() * encoded.n_cols()];
            encoded.decode_rows(Cpu::detect(), 0..encoded.n_rows(), &mut values)?;
            narrow(&mut values.into_iter())
        }
        other => return Err(format!("tensor `{name}` has dtype {other:?}; expected BF16, F16, F32 or encoded").into()),
    };
    if data.len() != 2 * n_rows * n_cols {
        return Err(format!(
            "tensor `{name}` has {} weights, but config.json calls for {n_rows} x {n_cols}",
            data.len() / 2
        )
        .into());
    }
    Ok(data)
}

/// Bytes that may be allocated: what Linux says is available, else a cautious guess.
fn available_memory() -> usize {
    let kib = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| {
        text.lines().find_map(|l| l.strip_prefix("MemAvailable:")?.split_whitespace().next()?.parse::<usize>().ok())
    });
    kib.map_or(8 << 30, |kib| kib << 10)
}

/// Draws matrices like those of trained models: a row's weights are Student-t with 40 degrees of freedom, and its
/// standard deviation is lognormal about 0.045.
///
/// Fitted to general-50m and the attention matrices of GPT-Neo 125M. Kurtosis within a row: 2.97 to 3.6 in the one (the
/// median of its matrices is 3.02), 3.0 to 3.3 in most of the other; here 3.17. Spread of a matrix's rows, as the standard
/// deviation of ln σ: 0.03 to 0.20 and 0.06 to 0.22; here 0.12. Median of absmax/σ: 3.3 to 4.0 over 768 to 2048 columns;
/// here 3.8 over 2048.
struct Weights {
    seed: u64,
    /// Draws of the t distribution, with variance 1; a row draws from these.
    pool: Vec<f32>,
}

impl Weights {
    const DEGREES: usize = 40;
    const LOG_SIGMA: (f32, f32) = (-3.1, 0.12);

    fn new(seed: u64) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        let pool = (0..1 << 16)
            .map(|_| {
                let chi2: f32 = (0..Self::DEGREES).map(|_| normal(&mut rng).powi(2)).sum();
                // The variance of the t distribution is n / (n − 2).
                normal(&mut rng) * ((Self::DEGREES - 2) as f32 / chi2).sqrt()
            })
            .collect();
        Self { seed, pool }
    }

    /// Matrix number `index` of the seed, BF16.
    fn draw(&self, index: u64, n_rows: usize, n_cols: usize) -> Bytes {
        let mut data = vec![0u8; 2 * n_rows * n_cols];
        data.par_chunks_mut(2 * n_cols).enumerate().for_each(|(row, data)| {
            let stream = (index << 32 | row as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let mut rng = SmallRng::seed_from_u64(self.seed ^ stream);
            let (mean, spread) = Self::LOG_SIGMA;
            let sigma = (mean + spread * normal(&mut rng)).exp();
            for four in data.chunks_mut(8) {
                let mut bits: u64 = rng.random();
                for weight in four.chunks_mut(2) {
                    weight.copy_from_slice(&bf16::from_f32(sigma * self.pool[bits as usize & 0xffff]).to_le_bytes());
                    bits >>= 16;
                }
            }
        });
        data.into()
    }
}

/// How matrices are encoded: in a format, or as `rate` with a trellis, which is `rate-trellis`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Form {
    pub format: Format,
    pub trellis: bool,
}

impl Form {
    const TRELLIS: &str = "rate-trellis";
}

impl From<Format> for Form {
    fn from(format: Format) -> Self {
        Self { format, trellis: false }
    }
}

impl FromStr for Form {
    type Err = codecllm_codec::Error;

    fn from_str(name: &str) -> std::result::Result<Self, Self::Err> {
        match name {
            Self::TRELLIS => Ok(Self { format: Format::Rate, trellis: true }),
            _ => name.parse::<Format>().map(Self::from),
        }
    }
}

impl Display for Form {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        if self.trellis { f.write_str(Self::TRELLIS) } else { self.format.fmt(f) }
    }
}

/// Options for a form; `rate` gets a step that makes about four bits a weight.
pub fn encode_options(form: Form, prefer: Prefer, tensor: &Tensor) -> Result<EncodeOptions> {
    let Form { format, trellis } = form;
    // Codes of a trellis are on grids of twice the step.
    let step_per_rms = if trellis { 0.125 } else { 0.25 };
    let step = (format == Format::Rate).then(|| rms(tensor).map(|rms| (step_per_rms * rms) as f32)).transpose()?;
    Ok(EncodeOptions { format, prefer, step, trellis, ..EncodeOptions::default() })
}

/// A draw from the normal distribution (Box and Muller).
pub fn normal(rng: &mut SmallRng) -> f32 {
    let (u, v): (f32, f32) = (1.0 - rng.random::<f32>(), rng.random());
    (-2.0 * u.ln()).sqrt() * (std::f32::consts::TAU * v).cos()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drawn_rows_have_the_stated_spread_and_tails() {
        let (n_rows, n_cols) = (1024, 2048);
        let data = Weights::new(1).draw(0, n_rows, n_cols);
        let values: Vec<f64> = data.as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b).to_f64()).collect();
        let rows = values.chunks(n_cols).map(|row| {
            let moment = |p| row.iter().map(|v| v.powi(p)).sum::<f64>() / n_cols as f64;
            let sigma = moment(2).sqrt();
            let absmax = row.iter().fold(0.0, |m: f64, v| m.max(v.abs()));
            (sigma.ln(), moment(4) / sigma.powi(4), absmax / sigma)
        });
        let rows: Vec<(f64, f64, f64)> = rows.collect();
        let mean = |f: &dyn Fn(&(f64, f64, f64)) -> f64| rows.iter().map(f).sum::<f64>() / n_rows as f64;
        let log_sigma = mean(&|r| r.0);
        let spread = mean(&|r| (r.0 - log_sigma).powi(2)).sqrt();
        assert!((0.11..0.13).contains(&spread), "{spread}");
        assert!((3.1..3.25).contains(&mean(&|r| r.1)), "{}", mean(&|r| r.1));
        assert!((3.7..4.0).contains(&mean(&|r| r.2)), "{}", mean(&|r| r.2));
    }

    #[test]
    fn a_form_is_a_format_or_one_with_a_trellis() {
        for name in ["bf16", "fp8", "int8", "rate", "rate-trellis"] {
            assert_eq!(name.parse::<Form>().unwrap().to_string(), name);
        }
        assert!("int8-trellis".parse::<Form>().is_err());
    }

    #[test]
    fn tasks_cover_every_row_once() {
        let workload = Workload::of_shape(100, 70_000, 1, 0);
        assert_eq!(workload.n_copies, 1);
        let rows: Vec<_> = workload.kinds[0].groups[0].tasks.iter().map(|t| t.rows.clone()).collect();
        assert_eq!(rows, [0..32, 32..64, 64..96, 96..100]);
    }
}
