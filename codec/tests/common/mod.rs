//! What the codec's tests share.
#![allow(dead_code)] // each test binary uses its own part

use bytes::Bytes;
use codecllm_codec::{Dtype, Tensor};

/// Numbers that look like a model's weights: rows of different spread, and tails.
pub fn weights(n_rows: usize, n_cols: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 24) as f32
    };
    let mut out = Vec::with_capacity(n_rows * n_cols);
    for _ in 0..n_rows {
        let spread = 0.02 * (1.0 + next());
        for _ in 0..n_cols {
            let gaussian: f32 = (0..6).map(|_| next() - 0.5).sum();
            let tail = if next() < 0.002 { 8.0 } else { 1.0 };
            out.push(gaussian * spread * tail);
        }
    }
    out
}

/// A source tensor of `dtype` with `values`.
pub fn tensor(dtype: Dtype, n_rows: usize, n_cols: usize, values: &[f32]) -> Tensor {
    let data: Vec<u8> = match dtype {
        Dtype::Bf16 => values.iter().flat_map(|&v| half::bf16::from_f32(v).to_le_bytes()).collect(),
        Dtype::F16 => values.iter().flat_map(|&v| half::f16::from_f32(v).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
    };
    Tensor { name: "w".into(), dtype, shape: vec![n_rows, n_cols], data: Bytes::from(data) }
}
