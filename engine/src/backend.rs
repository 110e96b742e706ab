//! The boundary between the forward pass and the machine that runs it.
//!
//! A [`Backend`] holds weights, activations and caches in its own memory and offers the dozen operations that
//! [`crate::llama`] is written in. How a matrix is stored (plain or encoded) hides behind [`Backend::Matrix`], so the
//! forward pass is the same for both.
//!
//! Between [`Backend::begin`] and [`Backend::read`] nothing crosses to the host: what changes from step to step (tokens,
//! their number and positions) lives in [`Backend::Batch`], and buffers are allocated once, with the workspace. So a
//! device backend may record the operations of a pass and replay them.

use crate::error::Result;
use crate::sampler::Draw;
use crate::weights::Weight;

/// Which tokens of a batch logits are wanted for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Logits {
    /// The last token: what generation needs.
    Last,
    /// Every token: what an evaluation needs.
    All,
}

/// Sizes of one layer's part of the KV cache.
#[derive(Debug, Clone, Copy)]
pub struct CacheShape {
    /// Positions that it has room for.
    pub capacity: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Key heads, and value heads.
    pub n_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
}

/// What a product reads: activations, put through a norm first where there is one.
pub struct Input<'a, B: Backend> {
    /// `[n_tokens, n_cols]`
    pub x: &'a B::Buffer,
    /// `x[t]` becomes `x[t] / sqrt(mean(x[t]²) + eps) · weight`, weight `[n_cols]`.
    pub norm: Option<Norm<'a, B>>,
}

/// The weight of an RMS norm, and what keeps its root from zero.
pub struct Norm<'a, B: Backend> {
    /// `[width]`
    pub weight: &'a B::Vector,
    /// Added to the mean square.
    pub eps: f32,
}

// Derived, they would ask for `B: Copy`.
impl<B: Backend> Clone for Norm<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B: Backend> Copy for Norm<'_, B> {}

/// One matrix product of those that share an input.
pub struct Projection<'a, B: Backend> {
    /// `[n_rows, n_cols]`
    pub matrix: &'a B::Matrix,
    /// `[n_rows]`, added to every token's output.
    pub bias: Option<&'a B::Vector>,
    /// `[n_tokens, n_rows]`
    pub out: &'a mut B::Buffer,
    /// Whether the product is added to what `out` holds, rather than taking its place.
    pub adds: bool,
}

/// What one layer's attention reads.
pub struct Attention<'a, B: Backend> {
    /// `[n_tokens, n_heads · head_dim]`; scratch afterwards.
    pub q: &'a mut B::Buffer,
    /// `[n_tokens, n_kv_heads · head_dim]`; scratch afterwards.
    pub k: &'a mut B::Buffer,
    /// `[n_tokens, n_kv_heads · head_dim]`
    pub v: &'a B::Buffer,
    /// Norms of every query head and of every key head by itself, weights `[head_dim]`.
    pub head_norms: Option<(Norm<'a, B>, Norm<'a, B>)>,
    /// With a window, a token sees itself and the `window - 1` positions before it.
    pub window: Option<usize>,
}

/// A machine that holds a model and runs its operations.
///
/// Shapes are `[rows, columns]`, row-major; `n_tokens` is that of the batch. Buffers hold f32 and may have room for more
/// tokens than the batch has. Operations run in the order of the calls; results are f32, and so is the arithmetic.
/// The caller, [`crate::llama`], passes buffers whose widths fit.
pub trait Backend: Send + Sync + Sized {
    /// A weight matrix `[n_rows, n_cols]`, plain or encoded.
    type Matrix: Send + Sync;
    /// A norm's weight or a bias: f32 values.
    type Vector: Send + Sync;
    /// Activations `[capacity, width]`.
    type Buffer: Send + Sync;
    /// The tokens of one step, their positions, and what the backend derives from them.
    type Batch: Send + Sync;
    /// The keys and values of one layer.
    type Cache: Send + Sync;
    /// The operations of a step of one token, where the backend keeps them.
    type Recording: Default + Send + Sync;

    /// Tokens of a prompt that pass through the layers together: enough that a weight is read once for many products, few
    /// enough that the activations suit the machine.
    const CHUNK: usize;

    /// Takes in a weight matrix.
    fn matrix(&self, weight: Weight) -> Result<Self::Matrix>;

    /// Takes in a vector.
    fn vector(&self, values: Vec<f32>) -> Result<Self::Vector>;

    /// Allocates activations for up to `n_tokens` tokens of `width` values.
    fn buffer(&self, n_tokens: usize, width: usize) -> Result<Self::Buffer>;

    /// Allocates one layer's keys and values.
    fn cache(&self, shape: CacheShape) -> Result<Self::Cache>;

    /// Allocates a batch of up to `n_tokens` tokens; `inverse_frequencies` (`[head_dim / 2]`, radians per position)
    /// are the rotary embedding's.
    fn batch(&self, n_tokens: usize, inverse_frequencies: &[f32]) -> Result<Self::Batch>;

    /// The bytes that a matrix takes in the backend's memory.
    fn matrix_bytes(&self, matrix: &Self::Matrix) -> u64;

    /// Begins a step: `tokens` stand at `first_position` and after it.
    fn begin(&self, batch: &mut Self::Batch, tokens: &[u32], first_position: usize) -> Result<()>;

    /// Says which matrices the batch's next products are of, in this order, behind those of which that was said before; so they may be decoded ahead.
    fn prepare(&self, _: &Self::Batch, _: &[&Self::Matrix]) -> Result<()> {
        Ok(())
    }

    /// Runs `pass`, which issues the operations of a step; where it has to be recorded anew, more than once.
    ///
    /// With a recording, the step has one token, and `pass` issues the very operations, on the very buffers, that it did
    /// when the recording was made; so the backend may replay that instead of calling it.
    fn run(&self, recording: Option<&mut Self::Recording>, pass: impl FnMut() -> Result<()> + Send) -> Result<()>;

    /// `out[t] = table[token t]`; out `[n_tokens, n_cols]`.
    fn embed(&self, batch: &Self::Batch, table: &Self::Matrix, out: &mut Self::Buffer) -> Result<()>;

    /// `out[t] = matrix · x[t] + bias` for each of the products.
    fn project(&self, batch: &Self::Batch, x: Input<'_, Self>, products: &mut [Projection<'_, Self>]) -> Result<()>;

    /// `gate = g · sigmoid(g) · u`, where `g` and `u` are the products of `gate` and `up`; `up` is scratch afterwards.
    fn project_gated(
        &self,
        batch: &Self::Batch,
        x: Input<'_, Self>,
        gate: Projection<'_, Self>,
        up: Projection<'_, Self>,
    ) -> Result<()>;

    /// Normalizes the heads of queries and keys, where they are to be, and rotates them by their token's position (value
    /// `i` of a head's first half pairs with value `i` of its second). Stores keys and values at the batch's positions.
    /// Then `out` is the causal attention of every query head over the cache, the batch's own positions included, scaled
    /// by `1 / sqrt(head_dim)`; out `[n_tokens, n_heads · head_dim]`. Consecutive query heads share a key head.
    fn attend(
        &self,
        batch: &Self::Batch,
        heads: Attention<'_, Self>,
        cache: &mut Self::Cache,
        out: &mut Self::Buffer,
    ) -> Result<()>;

    /// `out = head · x`, for the batch's last token (out `[1, vocab]`) or for all of them (out `[n_tokens, vocab]`).
    fn logits(
        &self,
        batch: &Self::Batch,
        x: Input<'_, Self>,
        head: &Self::Matrix,
        want: Logits,
        out: &mut Self::Buffer,
    ) -> Result<()>;

    /// Finds the token of the largest logit `[1, vocab]`, the lowest of several; [`likeliest`](Self::likeliest) reads it.
    fn choose(&self, batch: &Self::Batch, logits: &Self::Buffer) -> Result<()>;

    /// The token that the last [`choose`](Self::choose) found, once the operations before it are done.
    ///
    /// # Errors
    /// A logit was not a number.
    fn likeliest(&self, batch: &Self::Batch, logits: &Self::Buffer) -> Result<u32>;

    /// Draws a token from the logits `[1, vocab]`, once the operations before it are done: the one that [`Draw::choose`] does.
    /// The logits are scratch afterwards.
    ///
    /// # Errors
    /// A logit was not a number.
    fn sample(&self, batch: &mut Self::Batch, logits: &mut Self::Buffer, draw: &Draw) -> Result<u32>;

    /// Copies `values` from the host to the start of a buffer, after the operations before it.
    fn write(&self, buffer: &mut Self::Buffer, values: &[f32]) -> Result<()>;

    /// Copies the first `out.len()` values of a buffer to the host, once the operations before it are done.
    fn read(&self, buffer: &Self::Buffer, out: &mut [f32]) -> Result<()>;
}

/// A backend with memory of its own, in which encoded matrices may be kept decoded, and which can say what all takes.
pub trait DeviceMemory: Backend {
    /// The form in which a matrix would be plain; `None` where it is so already, or cannot be.
    fn decoded_form(&self, matrix: &Self::Matrix) -> Option<DecodedForm>;

    /// Puts that form in the place of the encoded one.
    fn keep_decoded(&self, matrix: &mut Self::Matrix) -> Result<()>;

    /// Bytes that [`Backend::buffer`] allocates.
    fn buffer_bytes(&self, n_tokens: usize, width: usize) -> u64;

    /// Bytes that [`Backend::cache`] allocates.
    fn cache_bytes(&self, shape: CacheShape) -> u64;

    /// Bytes that products work in, of the matrices that were taken in so far; without the decoded matrix.
    fn working_bytes(&self) -> u64;
}

/// A matrix's values as BF16.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DecodedForm {
    /// Their bytes.
    pub bytes: u64,
    /// Whether they are its weights to the bit.
    pub is_lossless: bool,
    /// Products of more tokens read this form, in memory that the matrices of all layers share in turn.
    pub fused_tokens: usize,
}
