//! The KV cache and attention over it.
//!
//! Keys and values are kept in f32. Keys lie transposed in blocks of 32 positions, values row by row; so scores and
//! outputs are both sums of vectors weighted by single numbers, and one routine, [`accumulate`], makes them. The softmax
//! is computed online, a block of keys at a time (Milakov and Gimelshein, "Online normalizer calculation for softmax").

use super::simd::{Kernel, Simd};
use crate::backend::CacheShape;

/// Positions of a block of keys.
const BLOCK: usize = 32;
/// Queries that [`accumulate`] takes together.
const TILE: usize = 4;

/// One layer's keys and values.
pub struct Cache {
    shape: CacheShape,
    n_blocks: usize,
    /// Width of a head's values, padded for vectors.
    stride: usize,
    /// `[n_kv_heads, n_blocks, head_dim, BLOCK]`
    keys: Vec<f32>,
    /// `[n_kv_heads, n_blocks · BLOCK, stride]`
    values: Vec<f32>,
}

impl Cache {
    /// Allocates a cache; the system hands out its pages as they are written.
    pub fn new(shape: CacheShape) -> Self {
        let n_blocks = shape.capacity.div_ceil(BLOCK);
        let stride = shape.head_dim.next_multiple_of(BLOCK);
        let n_positions = shape.n_kv_heads * n_blocks * BLOCK;
        Self {
            shape,
            n_blocks,
            stride,
            keys: vec![0.0; n_positions * shape.head_dim],
            values: vec![0.0; n_positions * stride],
        }
    }

    /// The sizes that it was made for.
    pub fn shape(&self) -> CacheShape {
        self.shape
    }

    /// Stores one token's keys and values, `[n_kv_heads, head_dim]` each.
    pub fn store(&mut self, position: usize, k: &[f32], v: &[f32]) {
        let head_dim = self.shape.head_dim;
        let (block, within) = (position / BLOCK, position % BLOCK);
        for (h, (k, v)) in k.chunks_exact(head_dim).zip(v.chunks_exact(head_dim)).enumerate() {
            let keys = &mut self.keys[(h * self.n_blocks + block) * head_dim * BLOCK..][..head_dim * BLOCK];
            for (key, k) in keys.iter_mut().skip(within).step_by(BLOCK).zip(k) {
                *key = *k;
            }
            self.values[(h * self.n_blocks * BLOCK + position) * self.stride..][..head_dim].copy_from_slice(v);
        }
    }

    /// Makes ready the attention of `group` query heads, which share key head `head`, for consecutive tokens, the first
    /// of which stands at `position`. `queries` gives each token's `[group, head_dim]`.
    pub fn attention<'a>(
        &'a self,
        head: usize,
        queries: impl ExactSizeIterator<Item = &'a [f32]>,
        position: usize,
        window: Option<usize>,
    ) -> Attention<'a> {
        let head_dim = self.shape.head_dim;
        let end = position + queries.len();
        let scale = 1.0 / (head_dim as f32).sqrt();
        let mut scaled = Vec::new();
        let mut visible = Vec::new();
        for (t, heads) in queries.enumerate() {
            scaled.extend(heads.iter().map(|q| q * scale));
            let seen = position + t + 1;
            visible.resize(scaled.len() / head_dim, seen.saturating_sub(window.unwrap_or(seen))..seen);
        }
        let n_queries = visible.len();
        visible.resize(n_queries.next_multiple_of(TILE), 0..0);
        scaled.resize(visible.len() * head_dim, 0.0);
        let values_len = self.n_blocks * BLOCK * self.stride;
        let keys_len = self.n_blocks * BLOCK * head_dim;
        Attention {
            head_dim,
            stride: self.stride,
            keys: &self.keys[head * keys_len..][..keys_len],
            values: &self.values[head * values_len..][..values_len],
            queries: scaled,
            visible,
            n_queries,
            end,
        }
    }
}

/// The attention of some queries over one key head. Its output is `[n_queries, head_dim]`, padded as `stride` says.
pub struct Attention<'a> {
    head_dim: usize,
    stride: usize,
    keys: &'a [f32],
    values: &'a [f32],
    /// Scaled, `[n_queries, head_dim]`, padded with zeros to a multiple of `TILE` queries.
    queries: Vec<f32>,
    /// The positions that each query sees; none for the padding.
    visible: Vec<std::ops::Range<usize>>,
    n_queries: usize,
    /// One past the last position that any query sees.
    end: usize,
}

impl Kernel for Attention<'_> {
    /// The outputs, each padded to a multiple of 32.
    type Output = Vec<f32>;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Vec<f32> {
        let Self { head_dim, stride, keys, values, queries, visible, .. } = &self;
        let (head_dim, stride) = (*head_dim, *stride);
        let mut out = vec![0.0; visible.len() * stride];
        let mut largest = vec![f32::NEG_INFINITY; visible.len()];
        let mut total = vec![0.0; visible.len()];
        let first = visible[0].start / BLOCK;
        for block in first..self.end.div_ceil(BLOCK) {
            let base = block * BLOCK;
            let n_keys = BLOCK.min(self.end - base);
            let keys = &keys[base * head_dim..][..BLOCK * head_dim];
            let values = &values[base * stride..][..n_keys * stride];
            for first in (0..visible.len()).step_by(TILE) {
                let mut weights = [0.0; TILE * BLOCK];
                let mut keep = [1.0; TILE];
                for c in (0..BLOCK).step_by(2 * S::LANES) {
                    let queries = &queries[first * head_dim..][..TILE * head_dim];
                    accumulate(s, queries, head_dim, head_dim, &keys[c..], BLOCK, &mut weights[c..], BLOCK, keep);
                }
                for i in 0..TILE {
                    let weights = &mut weights[i * BLOCK..][..BLOCK];
                    let seen = &visible[first + i];
                    let (from, to) = (seen.start.max(base) - base, seen.end.clamp(base, base + BLOCK) - base);
                    if from >= to {
                        weights.fill(0.0);
                        continue;
                    }
                    weights[..from].fill(f32::NEG_INFINITY);
                    weights[to..].fill(f32::NEG_INFINITY);
                    let before = largest[first + i];
                    let now = before.max(max(s, weights));
                    keep[i] = (before - now).exp();
                    exp(s, weights, now);
                    weights[..from].fill(0.0);
                    weights[to..].fill(0.0);
                    largest[first + i] = now;
                    total[first + i] = total[first + i] * keep[i] + sum(s, weights);
                }
                for d in (0..stride).step_by(2 * S::LANES) {
                    let out = &mut out[first * stride + d..];
                    accumulate(s, &weights, BLOCK, n_keys, &values[d..], stride, out, stride, keep);
                }
            }
        }
        out.truncate(self.n_queries * stride);
        for (out, total) in out.chunks_exact_mut(stride).zip(total) {
            for x in out {
                *x /= total;
            }
        }
        out
    }
}

/// `out[i] = keep[i] · out[i] + Σ_j weights[i][j] · rows[j]` for the next `2 · S::LANES` elements of `TILE` outputs.
///
/// Outputs, weights and rows lie `out_stride`, `weights_stride` and `rows_stride` apart.
#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "three strided matrices")]
fn accumulate<S: Simd>(
    s: S,
    weights: &[f32],
    weights_stride: usize,
    n_rows: usize,
    rows: &[f32],
    rows_stride: usize,
    out: &mut [f32],
    out_stride: usize,
    keep: [f32; TILE],
) {
    let width = 2 * S::LANES;
    assert!(n_rows >= 1 && weights.len() >= (TILE - 1) * weights_stride + n_rows);
    assert!(rows.len() >= (n_rows - 1) * rows_stride + width && out.len() >= (TILE - 1) * out_stride + width);
    let mut sums = [[s.zero(); 2]; TILE];
    for j in 0..n_rows {
        let row = rows[j * rows_stride..].as_ptr();
        // SAFETY: `width` elements from j · rows_stride on lie within `rows`, as was asserted.
        let row = unsafe { [s.load(row), s.load(row.add(S::LANES))] };
        for (i, sums) in sums.iter_mut().enumerate() {
            // SAFETY: i · weights_stride + j ≤ (TILE − 1) · weights_stride + n_rows − 1 lies within `weights`.
            let weight = s.splat(unsafe { *weights.get_unchecked(i * weights_stride + j) });
            *sums = [s.mul_add(weight, row[0], sums[0]), s.mul_add(weight, row[1], sums[1])];
        }
    }
    for i in 0..TILE {
        let keep = s.splat(keep[i]);
        for (half, sum) in sums[i].into_iter().enumerate() {
            let p = out[i * out_stride + half * S::LANES..][..S::LANES].as_mut_ptr();
            // SAFETY: `p` has `LANES` elements.
            unsafe { s.store(p, s.mul_add(keep, s.load(p), sum)) };
        }
    }
}

/// The largest of the elements.
#[inline(always)]
fn max<S: Simd>(s: S, x: &[f32]) -> f32 {
    let mut all = s.splat(f32::NEG_INFINITY);
    for x in x.chunks_exact(S::LANES) {
        // SAFETY: `x` has `LANES` elements.
        all = s.max(all, unsafe { s.load(x.as_ptr()) });
    }
    s.max_element(all)
}

/// The sum of the elements.
#[inline(always)]
fn sum<S: Simd>(s: S, x: &[f32]) -> f32 {
    let mut all = s.zero();
    for x in x.chunks_exact(S::LANES) {
        // SAFETY: `x` has `LANES` elements.
        all = s.add(all, unsafe { s.load(x.as_ptr()) });
    }
    s.sum(all)
}

/// `x = e^(x − shift)`
#[inline(always)]
fn exp<S: Simd>(s: S, x: &mut [f32], shift: f32) {
    let shift = s.splat(-shift);
    for x in x.chunks_exact_mut(S::LANES) {
        let p = x.as_mut_ptr();
        // SAFETY: `p` has `LANES` elements.
        unsafe { s.store(p, s.exp(s.add(s.load(p), shift))) };
    }
}
