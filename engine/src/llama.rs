//! The model: its weights on a backend, the cache of a sequence, and the forward pass, once for every backend and for
//! every way to store a matrix.

use crate::backend::{Attention, Backend, CacheShape, DeviceMemory, Input, Logits, Norm, Projection};
use crate::config::Config;
use crate::cpu::CpuBackend;
use crate::error::{Error, Result};
use crate::memory::{self, CachePolicy, Footprint, MemoryUse, Unit};
use crate::sampler::Draw;
use crate::weights::{Loader, TensorSource, Weight};
use codecllm_codec::Cpu;
use codecllm_codec::archive::Progress;
use codecllm_codec::checkpoint::Checkpoint;
use codecllm_codec::encoded::Checks;
use std::ops::ControlFlow;
use std::path::Path;

/// How a model is loaded and what it runs on.
#[derive(Debug, Clone)]
pub struct LoadOptions {
    /// Instruction set of the products and decoders.
    pub cpu: Cpu,
    /// Threads; 0 stands for as many as the machine has cores.
    pub threads: usize,
    /// Which checksums of encoded tensors are compared; their structure is validated in any case.
    pub check: Checks,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self { cpu: Cpu::detect(), threads: 0, check: Checks::Full }
    }
}

/// A model, ready to run.
pub struct Model<B: Backend = CpuBackend> {
    config: Config,
    backend: B,
    embedding: B::Matrix,
    layers: Vec<Layer<B>>,
    norm: B::Vector,
    /// `None` where the embedding is the head.
    head: Option<B::Matrix>,
    weight_bytes: u64,
    source_bytes: u64,
    memory: Option<MemoryUse>,
}

struct Layer<B: Backend> {
    attention_norm: B::Vector,
    query: Linear<B>,
    key: Linear<B>,
    value: Linear<B>,
    output: Linear<B>,
    /// Per head, of queries and of keys.
    head_norms: Option<(B::Vector, B::Vector)>,
    mlp_norm: B::Vector,
    gate: Linear<B>,
    up: Linear<B>,
    down: Linear<B>,
    window: Option<usize>,
}

impl<B: Backend> Layer<B> {
    /// In the order of the pass.
    fn linears(&self) -> [&Linear<B>; 7] {
        let Self { query, key, value, output, gate, up, down, .. } = self;
        [query, key, value, output, gate, up, down]
    }

    fn linears_mut(&mut self) -> [&mut Linear<B>; 7] {
        let Self { query, key, value, output, gate, up, down, .. } = self;
        [query, key, value, output, gate, up, down]
    }
}

struct Linear<B: Backend> {
    matrix: B::Matrix,
    bias: Option<B::Vector>,
}

impl<B: Backend> Linear<B> {
    fn onto<'a>(&'a self, out: &'a mut B::Buffer) -> Projection<'a, B> {
        Projection { matrix: &self.matrix, bias: self.bias.as_ref(), out, adds: false }
    }

    fn added_to<'a>(&'a self, out: &'a mut B::Buffer) -> Projection<'a, B> {
        Projection { adds: true, ..self.onto(out) }
    }
}

/// A place in a layer whose values one or several products read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Site {
    /// Queries, keys and values; before the norm.
    Attention,
    /// The attention's output projection.
    AttentionOutput,
    /// Gate and up; before the norm.
    Mlp,
    /// Down.
    MlpOutput,
}

/// The state of one sequence: its keys and values, and the workspace of its forward passes.
pub struct KvCache<B: Backend = CpuBackend> {
    layers: Vec<B::Cache>,
    workspace: Workspace<B>,
    /// The pass over one token that yields the logits, on this cache and workspace.
    recording: B::Recording,
    len: usize,
    capacity: usize,
}

/// The activations of one pass, allocated once. Widths are the configuration's.
struct Workspace<B: Backend> {
    batch: B::Batch,
    /// The residual stream, `hidden_size`.
    x: B::Buffer,
    q: B::Buffer,
    k: B::Buffer,
    v: B::Buffer,
    attended: B::Buffer,
    /// `intermediate_size`
    gate: B::Buffer,
    up: B::Buffer,
    /// `logits_rows` rows of `vocab_size`; grows when the logits of all tokens are first asked for.
    logits: B::Buffer,
    logits_rows: usize,
}

impl<B: Backend> KvCache<B> {
    /// Tokens in the cache: the position of the next one.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no token is in the cache.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Tokens that the cache has room for.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Forgets every token.
    pub fn reset(&mut self) {
        self.len = 0;
    }

    /// Forgets the tokens from position `len` on; nothing where there are none.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }
}

impl Model {
    /// Loads a checkpoint or an archive in Hugging Face layout onto the CPU. Matrices stay in the mapped file.
    pub fn load(dir: &Path, options: &LoadOptions) -> Result<Self> {
        let config = Config::open(dir)?;
        Self::from_source(config, &Checkpoint::open(dir)?, options)
    }

    /// Builds a model on the CPU from any source of tensors, named as in a checkpoint.
    pub fn from_source(config: Config, source: &dyn TensorSource, options: &LoadOptions) -> Result<Self> {
        Self::on_backend(CpuBackend::new(options.cpu, options.threads)?, config, &Loader::new(source, options.check))
    }
}

impl<B: Backend> Model<B> {
    /// Loads a checkpoint or an archive in Hugging Face layout onto a backend; `check` says which checksums of encoded
    /// tensors are compared, `progress` is told how far it is.
    ///
    /// # Errors
    /// As [`on_backend`](Self::on_backend).
    pub fn load_on(backend: B, dir: &Path, check: Checks, progress: &dyn Progress) -> Result<Self> {
        let config = Config::open(dir)?;
        Self::on_backend(backend, config, &Loader::new(&Checkpoint::open(dir)?, check).with_progress(progress))
    }

    /// Builds a model on a backend.
    ///
    /// # Errors
    /// A tensor that is missing or does not fit the configuration; a checksum that does not match; the backend's own;
    /// [`codecllm_codec::Error::Interrupted`] where the loader's progress asks for an end.
    pub fn on_backend(backend: B, config: Config, loader: &Loader) -> Result<Self> {
        loader.begin();
        let mut upload = Upload { backend: &backend, loader, bytes: 0, source_bytes: 0 };
        let Config { hidden_size, intermediate_size, head_dim, vocab_size, .. } = config;
        let (q_width, kv_width) = (config.q_width(), config.kv_width());
        let embedding = upload.matrix("model.embed_tokens.weight", vocab_size, hidden_size)?;
        let mut layers = Vec::new();
        for i in 0..config.n_layers {
            let layer = format!("model.layers.{i}");
            let attention = format!("{layer}.self_attn");
            let mlp = format!("{layer}.mlp");
            let (qkv_bias, mlp_bias) = (config.qkv_bias, config.mlp_bias);
            layers.push(Layer {
                attention_norm: upload.vector(&format!("{layer}.input_layernorm.weight"), hidden_size)?,
                query: upload.linear(&format!("{attention}.q_proj"), q_width, hidden_size, qkv_bias)?,
                key: upload.linear(&format!("{attention}.k_proj"), kv_width, hidden_size, qkv_bias)?,
                value: upload.linear(&format!("{attention}.v_proj"), kv_width, hidden_size, qkv_bias)?,
                output: upload.linear(&format!("{attention}.o_proj"), hidden_size, q_width, config.output_bias)?,
                head_norms: match config.qk_norm {
                    true => Some((
                        upload.vector(&format!("{attention}.q_norm.weight"), head_dim)?,
                        upload.vector(&format!("{attention}.k_norm.weight"), head_dim)?,
                    )),
                    false => None,
                },
                mlp_norm: upload.vector(&format!("{layer}.post_attention_layernorm.weight"), hidden_size)?,
                gate: upload.linear(&format!("{mlp}.gate_proj"), intermediate_size, hidden_size, mlp_bias)?,
                up: upload.linear(&format!("{mlp}.up_proj"), intermediate_size, hidden_size, mlp_bias)?,
                down: upload.linear(&format!("{mlp}.down_proj"), hidden_size, intermediate_size, mlp_bias)?,
                window: config.window(i),
            });
        }
        let norm = upload.vector("model.norm.weight", hidden_size)?;
        let head = match config.tied_embeddings {
            true => None,
            false => Some(upload.matrix("lm_head.weight", vocab_size, hidden_size)?),
        };
        let Upload { bytes: weight_bytes, source_bytes, .. } = upload;
        Ok(Self { config, backend, embedding, layers, norm, head, weight_bytes, source_bytes, memory: None })
    }

    /// The model's configuration.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The backend that the model runs on.
    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// Bytes of the weights as they lie in memory, norms and biases included.
    pub fn weight_bytes(&self) -> u64 {
        self.weight_bytes
    }

    /// Bytes of the same weights where they were loaded from: in an archive, encoded.
    pub fn source_bytes(&self) -> u64 {
        self.source_bytes
    }

    /// What the model takes of its device's memory, where [`keep_decoded`](Self::keep_decoded) was called.
    pub fn memory(&self) -> Option<&MemoryUse> {
        self.memory.as_ref()
    }

    /// An empty cache with room for `capacity` tokens, or for the model's context where that is less.
    pub fn new_cache(&self, capacity: usize) -> Result<KvCache<B>> {
        let config = &self.config;
        let capacity = capacity.clamp(1, config.max_positions);
        let shape = self.cache_shape(capacity);
        let n_tokens = capacity.min(B::CHUNK);
        let buffer = |width| self.backend.buffer(n_tokens, width);
        Ok(KvCache {
            layers: self.layers.iter().map(|_| self.backend.cache(shape)).collect::<Result<_>>()?,
            workspace: Workspace {
                batch: self.backend.batch(n_tokens, &config.inverse_frequencies())?,
                x: buffer(config.hidden_size)?,
                q: buffer(config.q_width())?,
                k: buffer(config.kv_width())?,
                v: buffer(config.kv_width())?,
                attended: buffer(config.q_width())?,
                gate: buffer(config.intermediate_size)?,
                up: buffer(config.intermediate_size)?,
                logits: self.backend.buffer(1, config.vocab_size)?,
                logits_rows: 1,
            },
            recording: B::Recording::default(),
            len: 0,
            capacity,
        })
    }

    fn cache_shape(&self, capacity: usize) -> CacheShape {
        let &Config { n_heads, n_kv_heads, head_dim, .. } = &self.config;
        CacheShape { capacity, n_heads, n_kv_heads, head_dim }
    }

    /// Runs `tokens`, which follow those in the cache, and appends them to it.
    ///
    /// Returns the logits of the last token (`vocab_size` values) or of all (`[tokens.len(), vocab_size]`). Prompts of any
    /// length are cut into chunks, so memory stays bounded. After an error the cache holds what it held before.
    ///
    /// The cache must come from this model's [`new_cache`](Self::new_cache).
    pub fn forward(&self, tokens: &[u32], cache: &mut KvCache<B>, want: Logits) -> Result<Vec<f32>> {
        self.check_tokens(tokens, cache)?;
        let vocab_size = self.config.vocab_size;
        let n_rows = match want {
            Logits::Last => 1,
            Logits::All => tokens.len(),
        };
        if want == Logits::All && cache.workspace.logits_rows < n_rows.min(B::CHUNK) {
            cache.workspace.logits_rows = n_rows.min(B::CHUNK);
            cache.workspace.logits = self.backend.buffer(cache.workspace.logits_rows, vocab_size)?;
            cache.recording = B::Recording::default();
        }
        let mut logits = vec![0.0; n_rows * vocab_size];
        let mut unread = logits.as_mut_slice();
        self.steps(tokens, cache, want, |workspace, n_rows| {
            let (now, rest) = std::mem::take(&mut unread).split_at_mut(n_rows * vocab_size);
            unread = rest;
            self.backend.read(&workspace.logits, now)
        })?;
        Ok(logits)
    }

    /// Runs `tokens` as [`forward`](Self::forward) does, and returns the likeliest token after them. The logits stay on the
    /// backend.
    pub fn likeliest(&self, tokens: &[u32], cache: &mut KvCache<B>) -> Result<u32> {
        self.check_tokens(tokens, cache)?;
        let mut token = 0;
        self.steps(tokens, cache, Logits::Last, |workspace, _| {
            token = self.backend.likeliest(&workspace.batch, &workspace.logits)?;
            Ok(())
        })?;
        Ok(token)
    }

    /// Runs `tokens` as [`forward`](Self::forward) does, and draws a token to follow them. The logits stay on the backend.
    pub fn sample(&self, tokens: &[u32], cache: &mut KvCache<B>, draw: &Draw) -> Result<u32> {
        self.check_tokens(tokens, cache)?;
        let mut token = 0;
        self.steps(tokens, cache, Logits::Last, |workspace, _| {
            token = self.backend.sample(&mut workspace.batch, &mut workspace.logits, draw)?;
            Ok(())
        })?;
        Ok(token)
    }

    /// Runs `tokens` in chunks. `on_logits` is called after each that yields logits, with their number of rows.
    fn steps(
        &self,
        tokens: &[u32],
        cache: &mut KvCache<B>,
        want: Logits,
        mut on_logits: impl FnMut(&mut Workspace<B>, usize) -> Result<()>,
    ) -> Result<()> {
        let mut position = cache.len;
        let end = position + tokens.len();
        let KvCache { layers, workspace, recording, .. } = &mut *cache;
        for chunk in tokens.chunks(B::CHUNK) {
            self.backend.begin(&mut workspace.batch, chunk, position)?;
            position += chunk.len();
            // A single token is also the last, so that every pass over one is the same.
            let want = if chunk.len() == 1 { Logits::Last } else { want };
            let wanted = (want == Logits::All || position == end).then_some(want);
            let recording = (chunk.len() == 1).then_some(&mut *recording);
            self.backend.run(recording, || self.pass(layers, workspace, wanted))?;
            if let Some(want) = wanted {
                on_logits(workspace, if want == Logits::All { chunk.len() } else { 1 })?;
            }
        }
        cache.len = position;
        Ok(())
    }

    fn check_tokens(&self, tokens: &[u32], cache: &KvCache<B>) -> Result<()> {
        if tokens.is_empty() {
            return Err(Error::Parameter("there is no token to run; give at least one".into()));
        }
        if let Some(id) = tokens.iter().find(|id| **id as usize >= self.config.vocab_size) {
            return Err(Error::Parameter(format!(
                "token {id} is not in the model's vocabulary of {}; does the tokenizer belong to this model?",
                self.config.vocab_size
            )));
        }
        let wanted = cache.len + tokens.len();
        if wanted > self.config.max_positions {
            return Err(Error::Context { what: "the model's context", limit: self.config.max_positions, wanted });
        }
        if wanted > cache.capacity {
            return Err(Error::Context { what: "the cache's capacity", limit: cache.capacity, wanted });
        }
        Ok(())
    }

    /// The forward pass over the batch that was begun.
    fn pass(&self, caches: &mut [B::Cache], workspace: &mut Workspace<B>, want: Option<Logits>) -> Result<()> {
        let b = &self.backend;
        let mut layers = self.layers.iter();
        // A layer ahead.
        let prepare = |layer: Option<&Layer<B>>, batch: &B::Batch| match layer {
            Some(layer) => b.prepare(batch, &layer.linears().map(|linear| &linear.matrix)),
            None => Ok(()),
        };
        prepare(layers.next(), &workspace.batch)?;
        b.embed(&workspace.batch, &self.embedding, &mut workspace.x)?;
        for (layer, cache) in self.layers.iter().zip(caches) {
            prepare(layers.next(), &workspace.batch)?;
            self.layer_pass(layer, cache, workspace, |_, _| Ok(ControlFlow::Continue(())))?;
        }
        let Workspace { batch, x, logits, .. } = workspace;
        if let Some(want) = want {
            let normed = Input { x, norm: Some(self.norm(&self.norm)) };
            b.logits(batch, normed, self.head.as_ref().unwrap_or(&self.embedding), want, logits)?;
            if want == Logits::Last {
                b.choose(batch, logits)?;
            }
        }
        Ok(())
    }
}

/// Memory of a device, given out.
impl<B: DeviceMemory> Model<B> {
    /// Keeps decoded what `policy` allows, of as many first layers as fit into `budget` bytes, then of the head, then of the
    /// embedding; beside all other weights, what products work in, and a sequence of up to `n_positions` tokens of which
    /// `logits` are asked for. Call it once, before [`new_cache`](Self::new_cache).
    ///
    /// # Errors
    /// Not even the encoded model fits: what it needs, and for what.
    pub fn keep_decoded(&mut self, policy: CachePolicy, budget: u64, n_positions: usize, logits: Logits) -> Result<()> {
        let n_positions = n_positions.clamp(1, self.config.max_positions);
        let n_tokens = n_positions.min(B::CHUNK);
        let footprint = |matrix: &B::Matrix, most_tokens: usize| {
            let form = self.backend.decoded_form(matrix);
            let is_allowed = match policy {
                CachePolicy::None => false,
                CachePolicy::Lossless => form.is_some_and(|form| form.is_lossless),
                CachePolicy::Any => true,
            };
            let is_shared = form.is_some_and(|form| most_tokens > form.fused_tokens);
            let bytes = self.backend.matrix_bytes(matrix);
            Footprint { bytes, decoded: form.map(|form| form.bytes), is_allowed, is_shared }
        };
        let head_tokens = if logits == Logits::All { n_tokens } else { 1 };
        let layers = self.layers.iter().map(|layer| {
            let linears = layer.linears().into_iter();
            linears.map(|linear| footprint(&linear.matrix, n_tokens)).collect::<Unit>()
        });
        let rest = self.head.iter().chain([&self.embedding]).map(|matrix| vec![footprint(matrix, head_tokens)]);
        let units: Vec<Unit> = layers.chain(rest).collect();

        let (encoded_bytes, _) = memory::unit_bytes(&units, 0);
        let vector_bytes = self.weight_bytes - encoded_bytes;
        let sequence_bytes = self.sequence_bytes(n_positions, logits);
        let working_bytes = self.backend.working_bytes();
        let others = vector_bytes + working_bytes + sequence_bytes;
        let fitting = memory::units_that_fit(&units, others, sequence_bytes, budget);
        let n_decoded = fitting.unwrap_or(0);
        let decoded_bytes = units[..n_decoded].iter().flatten().filter_map(Footprint::kept).sum();
        let (unit_bytes, scratch_bytes) = memory::unit_bytes(&units, n_decoded);
        let n_layers = self.layers.len();
        // All that can be, and something.
        let is_decoded = |unit: &&Unit| {
            unit.iter().any(|m| m.kept().is_some()) && unit.iter().all(|m| m.decoded.is_none() || m.is_allowed)
        };
        let found = MemoryUse {
            policy,
            budget_bytes: budget,
            n_decoded_layers: units[..n_decoded.min(n_layers)].iter().filter(is_decoded).count(),
            n_layers,
            decoded_bytes,
            other_weight_bytes: vector_bytes + unit_bytes - decoded_bytes,
            sequence_bytes,
            working_bytes: working_bytes + scratch_bytes,
            n_positions,
        };
        if fitting.is_none() {
            return Err(found.too_little());
        }
        let Self { backend, layers, head, embedding, .. } = self;
        let linears = layers.iter_mut().map(|layer| layer.linears_mut().map(|linear| &mut linear.matrix).into());
        let rest = head.iter_mut().chain([embedding]).map(|matrix| vec![matrix]);
        for (unit, matrices) in units.iter().zip(linears.chain(rest)).take(n_decoded) {
            for (m, matrix) in unit.iter().zip::<Vec<_>>(matrices) {
                if m.kept().is_some() {
                    backend.keep_decoded(matrix)?;
                }
            }
        }
        self.weight_bytes = vector_bytes + unit_bytes;
        self.memory = Some(found);
        Ok(())
    }

    /// Bytes of [`new_cache`](Self::new_cache) for so many tokens, once `logits` have been asked for.
    fn sequence_bytes(&self, capacity: usize, logits: Logits) -> u64 {
        let (b, config) = (&self.backend, &self.config);
        let n_tokens = capacity.min(B::CHUNK);
        let widths = [
            config.hidden_size,
            config.q_width(),
            config.kv_width(),
            config.kv_width(),
            config.q_width(),
            config.intermediate_size,
            config.intermediate_size,
        ];
        let activations: u64 = widths.iter().map(|&width| b.buffer_bytes(n_tokens, width)).sum();
        let logits_rows = if logits == Logits::All { n_tokens } else { 1 };
        let caches = self.layers.len() as u64 * b.cache_bytes(self.cache_shape(capacity));
        caches + activations + b.buffer_bytes(logits_rows, config.vocab_size)
    }
}

/// Layers one by one, for whoever wants to know what they compute.
impl<B: Backend> Model<B> {
    /// The embeddings of `tokens`, `[tokens.len(), hidden_size]`.
    ///
    /// # Errors
    /// A token that is not in the vocabulary.
    pub fn embed(&self, tokens: &[u32], cache: &mut KvCache<B>) -> Result<Vec<f32>> {
        cache.reset();
        self.check_tokens(tokens, cache)?;
        let width = self.config.hidden_size;
        let mut out = vec![0.0; tokens.len() * width];
        let Workspace { batch, x, .. } = &mut cache.workspace;
        for (tokens, out) in tokens.chunks(B::CHUNK).zip(out.chunks_mut(B::CHUNK * width)) {
            self.backend.begin(batch, tokens, 0)?;
            self.backend.run(None, || self.backend.embed(batch, &self.embedding, x))?;
            self.backend.read(x, out)?;
        }
        Ok(out)
    }

    /// Runs layer `layer` over the residual stream `x`, `[n_tokens, hidden_size]`, of a sequence's first tokens, in place.
    /// `observe` is given what each site's products read, `[n, width]`, some tokens at a time. Where it breaks, these tokens go no
    /// further, and their part of `x` is of no use.
    ///
    /// The cache must come from this model's [`new_cache`](Self::new_cache); what is in it is forgotten.
    ///
    /// # Errors
    /// More tokens than the cache has room for; an error of `observe`.
    pub fn run_layer(
        &self,
        layer: usize,
        x: &mut [f32],
        cache: &mut KvCache<B>,
        mut observe: impl FnMut(Site, &[f32]) -> Result<ControlFlow<()>> + Send,
    ) -> Result<()> {
        let (b, config) = (&self.backend, &self.config);
        cache.reset();
        let width = config.hidden_size;
        let n_tokens = x.len() / width;
        if n_tokens > cache.capacity {
            return Err(Error::Context { what: "the cache's capacity", limit: cache.capacity, wanted: n_tokens });
        }
        let KvCache { layers, workspace, .. } = cache;
        let mut values = Vec::new();
        for (i, x) in x.chunks_mut(B::CHUNK * width).enumerate() {
            let n = x.len() / width;
            b.begin(&mut workspace.batch, &vec![0; n], i * B::CHUNK)?;
            b.run(None, || {
                b.write(&mut workspace.x, x)?;
                self.layer_pass(&self.layers[layer], &mut layers[layer], workspace, |site, buffer| {
                    values.resize(n * self.site_width(site), 0.0);
                    b.read(buffer, &mut values)?;
                    observe(site, &values)
                })
            })?;
            b.read(&workspace.x, x)?;
        }
        Ok(())
    }

    /// Values of a token at a site.
    pub fn site_width(&self, site: Site) -> usize {
        match site {
            Site::Attention | Site::Mlp => self.config.hidden_size,
            Site::AttentionOutput => self.config.q_width(),
            Site::MlpOutput => self.config.intermediate_size,
        }
    }

    /// Puts another matrix in the place of a layer's, `module` being its name within the layer, as in `mlp.up_proj`.
    ///
    /// # Errors
    /// A layer has no such matrix; the backend's own.
    pub fn replace(&mut self, layer: usize, module: &str, weight: Weight) -> Result<()> {
        let matrix = self.backend.matrix(weight)?;
        let layer = &mut self.layers[layer];
        let linear = match module {
            "self_attn.q_proj" => &mut layer.query,
            "self_attn.k_proj" => &mut layer.key,
            "self_attn.v_proj" => &mut layer.value,
            "self_attn.o_proj" => &mut layer.output,
            "mlp.gate_proj" => &mut layer.gate,
            "mlp.up_proj" => &mut layer.up,
            "mlp.down_proj" => &mut layer.down,
            _ => return Err(Error::weights(module, "is no matrix of a layer")),
        };
        linear.matrix = matrix;
        Ok(())
    }

    fn norm<'a>(&self, weight: &'a B::Vector) -> Norm<'a, B> {
        Norm { weight, eps: self.config.rms_norm_eps }
    }

    /// One layer of the pass, over the batch that was begun. `observe` is called before the products of each site, and may end
    /// the pass there.
    fn layer_pass(
        &self,
        layer: &Layer<B>,
        cache: &mut B::Cache,
        workspace: &mut Workspace<B>,
        mut observe: impl FnMut(Site, &B::Buffer) -> Result<ControlFlow<()>>,
    ) -> Result<()> {
        let b = &self.backend;
        let Workspace { batch, x, q, k, v, attended, gate, up, .. } = workspace;
        if observe(Site::Attention, x)?.is_break() {
            return Ok(());
        }
        let normed = Input { x, norm: Some(self.norm(&layer.attention_norm)) };
        b.project(batch, normed, &mut [layer.query.onto(q), layer.key.onto(k), layer.value.onto(v)])?;
        let head_norms = layer.head_norms.as_ref().map(|(query, key)| (self.norm(query), self.norm(key)));
        b.attend(batch, Attention { q, k, v, head_norms, window: layer.window }, cache, attended)?;
        if observe(Site::AttentionOutput, attended)?.is_break() {
            return Ok(());
        }
        b.project(batch, Input { x: attended, norm: None }, &mut [layer.output.added_to(x)])?;

        if observe(Site::Mlp, x)?.is_break() {
            return Ok(());
        }
        let normed = Input { x, norm: Some(self.norm(&layer.mlp_norm)) };
        b.project_gated(batch, normed, layer.gate.onto(gate), layer.up.onto(up))?;
        if observe(Site::MlpOutput, gate)?.is_break() {
            return Ok(());
        }
        b.project(batch, Input { x: gate, norm: None }, &mut [layer.down.added_to(x)])
    }
}

/// Brings tensors onto a backend and counts their bytes.
struct Upload<'a, B: Backend> {
    backend: &'a B,
    loader: &'a Loader<'a>,
    bytes: u64,
    source_bytes: u64,
}

impl<B: Backend> Upload<'_, B> {
    /// The payload's checksum is compared while the backend takes the bytes in: both read the same pages.
    fn matrix(&mut self, name: &str, n_rows: usize, n_cols: usize) -> Result<B::Matrix> {
        let weight = self.loader.matrix(name, n_rows, n_cols)?;
        let (backend, checks) = (self.backend, self.loader.checks());
        let (matrix, checked) = rayon::join(|| backend.matrix(weight.clone()), || weight.check_payload(name, checks));
        checked?;
        let matrix = matrix?;
        self.bytes += self.backend.matrix_bytes(&matrix);
        self.source_bytes += weight.n_bytes();
        self.loader.done(weight.n_bytes());
        Ok(matrix)
    }

    fn vector(&mut self, name: &str, len: usize) -> Result<B::Vector> {
        self.bytes += 4 * len as u64;
        let (vector, n_bytes) = self.loader.vector(name, len)?;
        self.source_bytes += n_bytes;
        self.loader.done(n_bytes);
        self.backend.vector(vector)
    }

    /// `name.weight`, `[n_rows, n_cols]`, and `name.bias` where the model has biases there.
    fn linear(&mut self, name: &str, n_rows: usize, n_cols: usize, has_bias: bool) -> Result<Linear<B>> {
        Ok(Linear {
            matrix: self.matrix(&format!("{name}.weight"), n_rows, n_cols)?,
            bias: if has_bias { Some(self.vector(&format!("{name}.bias"), n_rows)?) } else { None },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use codecllm_codec::checkpoint::{Dtype, Tensor};
    use codecllm_codec::encoded::{EncodeOptions, EncodedTensor, encode_tensor};
    use half::bf16;
    use rand::rngs::SmallRng;
    use rand::{Rng, SeedableRng};
    use std::collections::HashMap;
    use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

    const CHUNK: usize = CpuBackend::CHUNK;
    const CONFIG: &str = r#"{
        "architectures": ["Qwen3ForCausalLM"], "vocab_size": 90, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 300,
        "attention_bias": true
    }"#;

    /// Random BF16 weights for `CONFIG`.
    fn weights() -> HashMap<String, Tensor> {
        let mut rng = SmallRng::seed_from_u64(1);
        let mut weights = HashMap::new();
        let mut add = |name: String, shape: &[usize]| {
            let values = (0..shape.iter().product()).map(|_| bf16::from_f32(rng.random_range(-0.5..0.5)));
            let data: Vec<u8> = values.flat_map(bf16::to_le_bytes).collect();
            let tensor = Tensor { name: name.clone(), dtype: Dtype::Bf16, shape: shape.to_vec(), data: data.into() };
            weights.insert(name, tensor);
        };
        for i in 0..2 {
            let mut add = |name: &str, shape: &[usize]| add(format!("model.layers.{i}.{name}"), shape);
            for (name, n_rows, n_cols) in [("q", 32, 32), ("k", 16, 32), ("v", 16, 32), ("o", 32, 32)] {
                add(&format!("self_attn.{name}_proj.weight"), &[n_rows, n_cols]);
                add(&format!("self_attn.{name}_proj.bias"), &[n_rows]);
            }
            for (name, n_rows, n_cols) in [("gate", 48, 32), ("up", 48, 32), ("down", 32, 48)] {
                add(&format!("mlp.{name}_proj.weight"), &[n_rows, n_cols]);
            }
            for (name, len) in [
                ("input_layernorm", 32),
                ("post_attention_layernorm", 32),
                ("self_attn.q_norm", 8),
                ("self_attn.k_norm", 8),
            ] {
                add(&format!("{name}.weight"), &[len]);
            }
        }
        add("model.embed_tokens.weight".into(), &[90, 32]);
        add("model.norm.weight".into(), &[32]);
        add("lm_head.weight".into(), &[90, 32]);
        weights
    }

    fn load(weights: &HashMap<String, Tensor>) -> Result<Model> {
        Model::from_source(Config::from_json(CONFIG)?, weights, &LoadOptions { threads: 2, ..Default::default() })
    }

    fn tokens(n: usize) -> Vec<u32> {
        (0..n as u32).map(|i| i * 37 % 90).collect()
    }

    #[track_caller]
    fn assert_close(a: &[f32], b: &[f32]) {
        assert_eq!(a.len(), b.len());
        assert!(a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-4), "largest of {:?}", a.len());
    }

    #[test]
    fn a_prompt_in_chunks_equals_its_tokens_one_by_one() {
        let model = load(&weights()).unwrap();
        let tokens = tokens(2 * CHUNK + 9);
        let mut cache = model.new_cache(tokens.len()).unwrap();
        let mut expected = Vec::new();
        for token in &tokens {
            expected.extend(model.forward(&[*token], &mut cache, Logits::Last).unwrap());
        }
        cache.reset();
        assert_close(&model.forward(&tokens, &mut cache, Logits::All).unwrap(), &expected);
        assert_eq!(cache.len(), tokens.len());

        cache.truncate(CHUNK + 3);
        let last = model.forward(&tokens[CHUNK + 3..], &mut cache, Logits::Last).unwrap();
        assert_close(&last, &expected[expected.len() - 90..]);
    }

    #[test]
    fn weight_bytes_count_every_tensor() {
        let weights = weights();
        let matrices = weights.values().filter(|t| t.shape.len() == 2).map(|t| t.data.len());
        // Vectors are widened to f32.
        let vectors = weights.values().filter(|t| t.shape.len() == 1).map(|t| 2 * t.data.len());
        let model = load(&weights).unwrap();
        assert_eq!(model.weight_bytes(), matrices.chain(vectors).sum::<usize>() as u64);
        assert_eq!(model.source_bytes(), weights.values().map(|t| t.data.len()).sum::<usize>() as u64);
    }

    #[derive(Default)]
    struct Counter {
        total: AtomicU64,
        done: AtomicU64,
        n_tensors: AtomicU64,
        /// Tensors after which it asks for an end.
        limit: Option<u64>,
    }

    impl Progress for Counter {
        fn begin(&self, total_bytes: u64) {
            self.total.store(total_bytes, Relaxed);
        }

        fn tensor(&self, _: &str) {
            self.n_tensors.fetch_add(1, Relaxed);
        }

        fn advance(&self, bytes: u64) {
            self.done.fetch_add(bytes, Relaxed);
        }

        fn is_stopped(&self) -> bool {
            self.limit.is_some_and(|limit| self.n_tensors.load(Relaxed) >= limit)
        }
    }

    #[test]
    fn loading_tells_of_every_tensor_and_ends_when_asked_to() {
        let weights = weights();
        let load = |counter: &Counter| {
            let backend = CpuBackend::new(Cpu::detect(), 1).unwrap();
            let loader = Loader::new(&weights, Checks::Full).with_progress(counter);
            Model::on_backend(backend, Config::from_json(CONFIG).unwrap(), &loader).map(|_| ())
        };
        let counter = Counter::default();
        load(&counter).unwrap();
        let n_bytes: usize = weights.values().map(|t| t.data.len()).sum();
        assert_eq!(counter.n_tensors.into_inner(), weights.len() as u64);
        assert_eq!([counter.total, counter.done].map(AtomicU64::into_inner), [n_bytes as u64; 2]);

        let counter = Counter { limit: Some(5), ..Counter::default() };
        let stopped = load(&counter).unwrap_err();
        assert!(matches!(stopped, Error::Codec(codecllm_codec::Error::Interrupted)), "{stopped}");
        assert_eq!(counter.n_tensors.into_inner(), 5);
    }

    #[test]
    fn a_damaged_payload_is_named_where_payloads_are_checked() {
        let name = "model.layers.1.mlp.up_proj.weight";
        let mut weights = weights();
        let tensor = weights.get_mut(name).unwrap();
        let mut data = encode_tensor(tensor, &EncodeOptions::default()).unwrap();
        let payload = EncodedTensor::parse(data.clone().into(), Checks::Full).unwrap().sections().raw.start;
        data[payload] ^= 1;
        *tensor = Tensor { dtype: Dtype::U8, shape: vec![data.len()], data: data.into(), ..tensor.clone() };
        let load = |check| {
            let options = LoadOptions { check, threads: 2, ..Default::default() };
            Model::from_source(Config::from_json(CONFIG).unwrap(), &weights, &options).map(|_| ())
        };
        let error = load(Checks::Full).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains("payload's checksum"), "{error}");
        load(Checks::Metadata).unwrap();
    }

    #[test]
    fn requests_that_cannot_be_run_are_refused() {
        let model = load(&weights()).unwrap();
        let mut cache = model.new_cache(10).unwrap();
        model.forward(&tokens(4), &mut cache, Logits::Last).unwrap();
        let error = |tokens: &[u32], cache: &mut KvCache| {
            let error = model.forward(tokens, cache, Logits::Last).unwrap_err().to_string();
            assert_eq!(cache.len(), 4);
            error
        };
        assert!(error(&[], &mut cache).contains("at least one"));
        assert!(error(&[3, 90], &mut cache).contains("token 90 is not in the model's vocabulary of 90"));
        assert!(error(&tokens(7), &mut cache).contains("11 tokens exceed the cache's capacity of 10"));
        assert!(error(&tokens(297), &mut cache).contains("301 tokens exceed the model's context of 300"));
        assert_eq!(model.new_cache(1000).unwrap().capacity(), 300);
    }

    #[test]
    fn tensors_that_do_not_fit_are_named() {
        let error = |name: &str, change: fn(&mut Tensor)| {
            let mut weights = weights();
            change(weights.get_mut(name).unwrap());
            load(&weights).err().unwrap().to_string()
        };
        let name = "model.layers.1.mlp.up_proj.weight";
        let found = error(name, |t| t.shape = vec![32, 48]);
        assert!(found.contains(name) && found.contains("[32, 48]") && found.contains("[48, 32]"), "{found}");
        assert!(error(name, |t| t.data.truncate(3000)).contains("3000 bytes"));
        assert!(error(name, |t| t.dtype = Dtype::U8).contains("U8"));
        let name = "model.layers.0.self_attn.q_norm.weight";
        assert!(error(name, |t| t.shape = vec![4, 2]).contains("[8]"));

        let mut weights = weights();
        weights.remove("lm_head.weight");
        let found = load(&weights).err().unwrap().to_string();
        assert!(found.contains("lm_head.weight") && found.contains("missing"), "{found}");
    }
}
