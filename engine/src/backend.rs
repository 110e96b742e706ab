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
    /// Key heads, and value heads.
    pub n_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
}

/// One matrix product of those that share an input.
pub struct Projection<'a, B: Backend> {
    /// `[n_rows, n_cols]`
    pub matrix: &'a B::Matrix,
    /// `[n_rows]`, added to every token's output.
    pub bias: Option<&'a B::Vector>,
    /// `[n_tokens, n_rows]`
    pub out: &'a mut B::Buffer,
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

    /// Runs `pass`, which issues the operations of a step.
    fn run<R: Send>(&self, pass: impl FnOnce() -> R + Send) -> R;

    /// `out[t] = table[token t]`; out `[n_tokens, n_cols]`.
    fn embed(&self, batch: &Self::Batch, table: &Self::Matrix, out: &mut Self::Buffer) -> Result<()>;

    /// `out[t] = x[t] / sqrt(mean(x[t]²) + eps) · weight`; x and out `[n_tokens, width]`, weight `[width]`.
    fn rms_norm(
        &self,
        batch: &Self::Batch,
        x: &Self::Buffer,
        weight: &Self::Vector,
        eps: f32,
        out: &mut Self::Buffer,
    ) -> Result<()>;

    /// The same norm for every head by itself, in place; x `[n_tokens, n_heads · head_dim]`, weight `[head_dim]`.
    fn head_norm(&self, batch: &Self::Batch, x: &mut Self::Buffer, weight: &Self::Vector, eps: f32) -> Result<()>;

    /// `out[t] = matrix · x[t] + bias` for each of the products; x `[n_tokens, n_cols]`.
    fn project(&self, batch: &Self::Batch, x: &Self::Buffer, products: &mut [Projection<'_, Self>]) -> Result<()>;

    /// Rotates every head by its token's position, in place; x `[n_tokens, n_heads · head_dim]`. Value `i` of a head's
    /// first half pairs with value `i` of its second.
    fn rotate(&self, batch: &Self::Batch, x: &mut Self::Buffer) -> Result<()>;

    /// Stores keys and values at the batch's positions; k and v `[n_tokens, n_kv_heads · head_dim]`.
    fn append(&self, batch: &Self::Batch, k: &Self::Buffer, v: &Self::Buffer, cache: &mut Self::Cache) -> Result<()>;

    /// Causal attention of every query head over the cache, the batch's own positions included, scaled by
    /// `1 / sqrt(head_dim)`; q and out `[n_tokens, n_heads · head_dim]`. With a window, a token sees itself and the
    /// `window - 1` positions before it. Consecutive query heads share a key head.
    fn attend(
        &self,
        batch: &Self::Batch,
        q: &Self::Buffer,
        cache: &Self::Cache,
        window: Option<usize>,
        out: &mut Self::Buffer,
    ) -> Result<()>;

    /// `gate = gate · sigmoid(gate) · up`; both `[n_tokens, width]`.
    fn silu_mul(&self, batch: &Self::Batch, gate: &mut Self::Buffer, up: &Self::Buffer) -> Result<()>;

    /// `x += y`; both `[n_tokens, width]`.
    fn add(&self, batch: &Self::Batch, x: &mut Self::Buffer, y: &Self::Buffer) -> Result<()>;

    /// `out = head · x`, for the batch's last token (out `[1, vocab]`) or for all of them (out `[n_tokens, vocab]`).
    fn logits(
        &self,
        batch: &Self::Batch,
        x: &Self::Buffer,
        head: &Self::Matrix,
        want: Logits,
        out: &mut Self::Buffer,
    ) -> Result<()>;

    /// Copies the first `out.len()` values of a buffer to the host, once the operations before it are done.
    fn read(&self, buffer: &Self::Buffer, out: &mut [f32]) -> Result<()>;
}
