//! Block formats as references: what a weight becomes when it is quantized and dequantized. They make no files.
//!
//! A row is cut into blocks. `q8_0` has 32 weights and an F16 scale. The K-quants have super-blocks of 256 weights: `q6_k` has
//! sub-blocks of 16 with signed 8-bit scales, multiples of an F16 number; `q5_k` and `q4_k` have sub-blocks of 32 with 6-bit scales and 6-bit
//! minima, multiples of one F16 number each. Layouts and objectives are those of llama.cpp without an importance matrix
//! (`ggml-quants.c`): squared errors weighted by x² for `q6_k`, by |x| + rms for the others, the best of a search over scales.
//! `int4` has groups with an F16 scale and an F16 minimum, from the group's least and largest weight.
//!
//! The last block of a row may be shorter; llama.cpp would take another type for such a matrix.

use codecllm_codec::checkpoint::{Checkpoint, Dtype, Tensor};
use codecllm_codec::quantize::read_row;
use codecllm_engine::TensorSource;
use half::f16;
use rayon::prelude::*;
use std::collections::HashSet;

/// A block format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Reference {
    /// 8 bits in blocks of 32
    #[value(name = "q8_0")]
    Q8,
    /// 6 bits in super-blocks of 256
    #[value(name = "q6_k")]
    Q6K,
    /// 5 bits in super-blocks of 256
    #[value(name = "q5_k")]
    Q5K,
    /// 4 bits in super-blocks of 256
    #[value(name = "q4_k")]
    Q4K,
    /// 4 bits in groups of 32
    #[value(name = "int4-32")]
    Int4Groups32,
    /// 4 bits in groups of 128
    #[value(name = "int4-128")]
    Int4Groups128,
}

const SUPER_BLOCK: usize = 256;

impl Reference {
    /// The name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Q8 => "Q8_0",
            Self::Q6K => "Q6_K",
            Self::Q5K => "Q5_K",
            Self::Q4K => "Q4_K",
            Self::Int4Groups32 => "INT4, groups of 32",
            Self::Int4Groups128 => "INT4, groups of 128",
        }
    }

    /// Weights of a block, and the bits that it takes.
    fn block(self) -> (usize, usize) {
        match self {
            Self::Q8 => (32, 8 * 32 + 16),
            Self::Q6K => (SUPER_BLOCK, 6 * 256 + 16 * 8 + 16),
            Self::Q5K => (SUPER_BLOCK, 5 * 256 + 8 * 12 + 32),
            Self::Q4K => (SUPER_BLOCK, 4 * 256 + 8 * 12 + 32),
            Self::Int4Groups32 => (32, 4 * 32 + 32),
            Self::Int4Groups128 => (128, 4 * 128 + 32),
        }
    }

    /// Bits of a row of `n_cols` weights, the last block counted as a whole.
    pub fn row_bits(self, n_cols: usize) -> usize {
        let (weights, bits) = self.block();
        n_cols.div_ceil(weights) * bits
    }

    /// Rounds a row's weights to what the format can hold.
    pub fn round_row(self, row: &mut [f32]) {
        for block in row.chunks_mut(self.block().0) {
            match self {
                Self::Q8 => q8_0(block),
                Self::Q6K => q6_k(block),
                Self::Q5K => affine_k(block, 31.0, Search { first: -0.5, step: 0.1, n: 15 }),
                Self::Q4K => affine_k(block, 15.0, Search { first: -1.0, step: 0.1, n: 20 }),
                Self::Int4Groups32 | Self::Int4Groups128 => int4(block),
            }
        }
    }
}

fn to_f16(x: f32) -> f32 {
    f16::from_f32(x).to_f32()
}

fn inverse(x: f32) -> f32 {
    if x == 0.0 { 0.0 } else { 1.0 / x }
}

fn q8_0(block: &mut [f32]) {
    let step = block.iter().fold(0.0f32, |m, v| m.max(v.abs())) / 127.0;
    let (inverse, stored) = (inverse(step), to_f16(step));
    block.iter_mut().for_each(|v| *v = (*v * inverse).round() * stored);
}

fn int4(group: &mut [f32]) {
    let (min, max) = group.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(a, b), v| (a.min(*v), b.max(*v)));
    let (step, min) = (to_f16((max - min) / 15.0), to_f16(min));
    let inverse = inverse(step);
    group.iter_mut().for_each(|v| *v = ((*v - min) * inverse).round().clamp(0.0, 15.0) * step + min);
}

fn q6_k(block: &mut [f32]) {
    let scales: Vec<f32> = block.chunks(16).map(symmetric_scale).collect();
    let largest = scales.iter().copied().fold(0.0, |m: f32, s| if s.abs() > m.abs() { s } else { m });
    let unit = to_f16(largest / -128.0);
    let inverse_unit = inverse(unit);
    for (sub, scale) in block.chunks_mut(16).zip(scales) {
        let scale = unit * (scale * inverse_unit).round().clamp(-128.0, 127.0);
        let inverse = inverse(scale);
        sub.iter_mut().for_each(|v| *v = (*v * inverse).round().clamp(-32.0, 31.0) * scale);
    }
}

/// The scale s, of a search, with the least Σ x²·(x − s·q)² for levels q from −32 to 31. For given levels the best s is
/// Σ x³q / Σ x²q², and takes (Σ x³q)² / Σ x²q² off the error.
fn symmetric_scale(x: &[f32]) -> f32 {
    let extreme = x.iter().copied().fold(0.0, |m: f32, v| if v.abs() > m.abs() { v } else { m });
    if extreme == 0.0 {
        return 0.0;
    }
    let mut best = (f32::NEG_INFINITY, 0.0);
    for i in -9..=9 {
        let inverse = -(32.0 + 0.1 * i as f32) / extreme;
        let (mut cross, mut square) = (0.0, 0.0);
        for v in x {
            let q = (v * inverse).round().clamp(-32.0, 31.0);
            cross += v * v * v * q;
            square += v * v * q * q;
        }
        if square > 0.0 && cross * cross / square > best.0 {
            best = (cross * cross / square, cross / square);
        }
    }
    best.1
}

/// Candidates for the inverse of a sub-block's scale: (levels + first + step·i) / (max − min), for i from 0 to n.
#[derive(Clone, Copy)]
struct Search {
    first: f32,
    step: f32,
    n: usize,
}

fn affine_k(block: &mut [f32], levels: f32, search: Search) {
    let fits: Vec<(f32, f32)> = block.chunks(32).map(|sub| affine_fit(sub, levels, search)).collect();
    let unit = |values: &mut dyn Iterator<Item = f32>| values.fold(0.0, f32::max) / 63.0;
    let (scale_unit, min_unit) = (unit(&mut fits.iter().map(|f| f.0)), unit(&mut fits.iter().map(|f| f.1)));
    let (inverse_scale, inverse_min) = (inverse(scale_unit), inverse(min_unit));
    for (sub, (scale, min)) in block.chunks_mut(32).zip(fits) {
        let scale = to_f16(scale_unit) * (scale * inverse_scale).round().min(63.0);
        let min = to_f16(min_unit) * (min * inverse_min).round().min(63.0);
        let inverse = inverse(scale);
        sub.iter_mut().for_each(|v| *v = ((*v + min) * inverse).round().clamp(0.0, levels) * scale - min);
    }
}

/// Scale s and m ≥ 0 with the least Σ w·(s·q − m − x)², w = |x| + rms, for levels q from 0 up; for each candidate's levels by
/// weighted least squares.
fn affine_fit(x: &[f32], levels: f32, search: Search) -> (f32, f32) {
    let (min, max) = x.iter().fold((0.0f32, f32::NEG_INFINITY), |(a, b), v| (a.min(*v), b.max(*v)));
    if max <= min {
        return (0.0, -min);
    }
    let rms = (x.iter().map(|v| v * v).sum::<f32>() / x.len() as f32).sqrt();
    let weights: Vec<f32> = x.iter().map(|v| rms + v.abs()).collect();
    let error = |q: &[f32], scale: f32, low: f32| -> f32 {
        x.iter().zip(q).zip(&weights).map(|((x, q), w)| w * (scale * q + low - x) * (scale * q + low - x)).sum()
    };
    let round =
        |inverse: f32| -> Vec<f32> { x.iter().map(|v| (inverse * (v - min)).round().clamp(0.0, levels)).collect() };
    let plain = (max - min) / levels;
    let mut best = (error(&round(1.0 / plain), plain, min), plain, min);
    for i in 0..=search.n {
        let q = round((levels + search.first + search.step * i as f32) / (max - min));
        let (mut w0, mut wq, mut wqq, mut wx, mut wqx) = (0.0f32, 0.0f32, 0.0f32, 0.0f32, 0.0f32);
        for ((x, q), w) in x.iter().zip(&q).zip(&weights) {
            w0 += w;
            wq += w * q;
            wqq += w * q * q;
            wx += w * x;
            wqx += w * q * x;
        }
        let determinant = w0 * wqq - wq * wq;
        if determinant <= 0.0 {
            continue;
        }
        let (mut scale, mut low) = ((w0 * wqx - wq * wx) / determinant, (wqq * wx - wq * wqx) / determinant);
        if low > 0.0 {
            (scale, low) = (wqx / wqq, 0.0);
        }
        let error = error(&q, scale, low);
        if error < best.0 {
            best = (error, scale, low);
        }
    }
    (best.1, -best.2)
}

/// A checkpoint whose selected matrices are rounded as they are read, as F32.
pub struct Rounded<'a> {
    pub source: &'a Checkpoint,
    pub selected: &'a HashSet<&'a str>,
    pub reference: Reference,
}

impl TensorSource for Rounded<'_> {
    fn tensor(&self, name: &str) -> codecllm_engine::Result<Option<Tensor>> {
        let Some(tensor) = TensorSource::tensor(self.source, name)? else { return Ok(None) };
        if !self.selected.contains(name) {
            return Ok(Some(tensor));
        }
        let (n_rows, n_cols) = (tensor.shape[0], tensor.shape[1]);
        let mut data = vec![0u8; 4 * n_rows * n_cols];
        let rows = tensor.data.par_chunks(tensor.data.len() / n_rows);
        data.par_chunks_mut(4 * n_cols).zip(rows).for_each(|(out, bytes)| {
            let mut row = vec![0f32; n_cols];
            read_row(tensor.dtype, bytes, &mut row);
            self.reference.round_row(&mut row);
            out.as_chunks_mut::<4>().0.iter_mut().zip(row).for_each(|(out, v)| *out = v.to_le_bytes());
        });
        Ok(Some(Tensor { dtype: Dtype::F32, data: data.into(), ..tensor }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::ValueEnum;

    /// Bell-shaped weights.
    fn row(n: usize) -> Vec<f32> {
        let mut state = 3u64;
        let mut next = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 40) as f32 / (1 << 24) as f32 - 0.5
        };
        (0..n).map(|_| (0..6).map(|_| next()).sum::<f32>() * 0.05).collect()
    }

    fn relative_error(reference: Reference, row: &[f32]) -> f32 {
        let mut rounded = row.to_vec();
        reference.round_row(&mut rounded);
        let error: f32 = row.iter().zip(&rounded).map(|(a, b)| (a - b) * (a - b)).sum();
        (error / row.iter().map(|v| v * v).sum::<f32>()).sqrt()
    }

    #[test]
    fn bits_are_those_of_the_published_layouts() {
        for (reference, bits) in Reference::value_variants().iter().zip([8.5, 6.5625, 5.5, 4.5, 5.0, 4.25]) {
            assert_eq!(reference.row_bits(2048) as f64 / 2048.0, bits, "{reference:?}");
        }
    }

    /// Errors on Gaussian weights known of llama.cpp's types: Q8_0 0.6 %, Q6_K 1.9 %.
    #[test]
    fn errors_are_those_to_expect_of_the_bits() {
        let row = row(256 * 64);
        let expected = [(0.005, 0.007), (0.016, 0.020), (0.032, 0.040), (0.065, 0.080), (0.07, 0.09), (0.09, 0.12)];
        for (reference, (low, high)) in Reference::value_variants().iter().zip(expected) {
            let error = relative_error(*reference, &row);
            assert!((low..high).contains(&error), "{reference:?}: {error}");
        }
    }

    #[test]
    fn degenerate_rows_stay_finite_and_close() {
        for reference in Reference::value_variants() {
            for row in
                [vec![0.0; 300], vec![0.5; 300], vec![-0.25; 40], [vec![1000.0], row(299)].concat(), vec![1e-30; 7]]
            {
                let mut rounded = row.clone();
                reference.round_row(&mut rounded);
                let largest = row.iter().fold(0.0f32, |m, v| m.max(v.abs()));
                let close = row.iter().zip(&rounded).all(|(a, b)| (a - b).abs() <= 0.04 * largest + 1e-6);
                assert!(close, "{reference:?} {:?} {:?}", &row[..4], &rounded[..4]);
            }
        }
    }
}
