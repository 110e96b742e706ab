use super::*;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

/// A backend on the first GPU, or nothing where there is none and none is required.
fn gpu() -> Option<CudaBackend> {
    match Device::open(0).and_then(CudaBackend::new) {
        Ok(backend) => Some(backend),
        Err(e) if std::env::var_os("CODECLLM_REQUIRE_CUDA").is_none_or(|v| v != "1") => {
            eprintln!("skipped, for want of a GPU: {e}");
            None
        }
        Err(e) => panic!("{e}"),
    }
}

/// The attention of queries `[n_tokens, n_heads, head_dim]`, the first one at position `first`, over all keys and values `[position, n_kv_heads, head_dim]`;
/// with each element, what roundings of the weights by themselves are worth: the root of the squares of what is added.
fn reference(
    shape: &CacheShape,
    window: Option<usize>,
    first: usize,
    q: &[f32],
    keys: &[f32],
    values: &[f32],
) -> Vec<(f32, f32)> {
    let &CacheShape { n_heads, n_kv_heads, head_dim, .. } = shape;
    let mut out = Vec::new();
    for (t, q) in q.chunks_exact(n_heads * head_dim).enumerate() {
        let position = first + t;
        let seen = position.saturating_sub(window.map_or(position, |w| w - 1))..position + 1;
        for (head, q) in q.chunks_exact(head_dim).enumerate() {
            let at = |p: usize| (p * n_kv_heads + head / (n_heads / n_kv_heads)) * head_dim;
            let score = |p: usize| {
                let key = &keys[at(p)..][..head_dim];
                q.iter().zip(key).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum::<f64>() / (head_dim as f64).sqrt()
            };
            let scores: Vec<f64> = seen.clone().map(score).collect();
            let most = scores.iter().fold(f64::MIN, |m, &s| m.max(s));
            let weights: Vec<f64> = scores.iter().map(|s| (s - most).exp()).collect();
            let total: f64 = weights.iter().sum();
            out.extend((0..head_dim).map(|i| {
                let parts = || weights.iter().zip(seen.clone()).map(|(w, p)| w * f64::from(values[at(p) + i]) / total);
                (parts().sum::<f64>() as f32, parts().map(|part| part * part).sum::<f64>().sqrt() as f32)
            }));
        }
    }
    out
}

#[test]
fn attention_agrees_with_float64() {
    const CAPACITY: usize = 300;
    let Some(backend) = gpu() else { return };
    let mut rng = SmallRng::seed_from_u64(1);
    let mut numbers = |n: usize| (0..n).map(|_| rng.random_range(-2.0..2.0)).collect::<Vec<f32>>();
    // Angles of zero, so that what the cache rounds is known.
    let narrow = |x: &f32| bf16::from_f32(*x).to_f32();
    for (head_dim, n_heads, n_kv_heads) in
        [(12, 4, 2), (32, 3, 1), (64, 8, 2), (80, 2, 2), (128, 4, 1), (160, 2, 1), (256, 2, 2)]
    {
        let shape = CacheShape { capacity: CAPACITY, n_heads, n_kv_heads, head_dim };
        let (width, kv_width) = (n_heads * head_dim, n_kv_heads * head_dim);
        for window in [None, Some(1), Some(40), Some(100)] {
            let mut cache = backend.cache(shape).unwrap();
            let mut batch = backend.batch(CAPACITY, &vec![0.0; head_dim / 2]).unwrap();
            let (mut keys, mut values) = (Vec::new(), Vec::new());
            let mut first = 0;
            for n_tokens in [1, 2, 130, 1, 64, 65, 17, 1] {
                let (q, k, v) = (numbers(n_tokens * width), numbers(n_tokens * kv_width), numbers(n_tokens * kv_width));
                keys.extend(k.iter().map(narrow));
                values.extend(v.iter().map(narrow));
                let upload = |x: &[f32], width| {
                    let mut buffer = backend.buffer(n_tokens, width).unwrap();
                    backend.write(&mut buffer, x).unwrap();
                    buffer
                };
                let (mut queries, mut new_keys) = (upload(&q, width), upload(&k, kv_width));
                let heads =
                    Attention { q: &mut queries, k: &mut new_keys, v: &upload(&v, kv_width), head_norms: None, window };
                batch.n_tokens = n_tokens;
                backend.device.stream().memcpy_htod(&[first as u32], &mut batch.position).unwrap();
                let mut out = backend.buffer(n_tokens, width).unwrap();
                backend.attend(&batch, heads, &mut cache, &mut out).unwrap();
                let mut found = vec![0.0; n_tokens * width];
                backend.read(&out, &mut found).unwrap();

                // Narrow, queries are rounded once they are scaled.
                assert_eq!(out.is_narrow, backend.narrows(n_tokens));
                let scale = (head_dim as f32).sqrt().recip() * std::f32::consts::LOG2_E;
                let rounded = |x: &f32| if out.is_narrow { narrow(&(x * scale)) / scale } else { *x };
                let q: Vec<f32> = q.iter().map(rounded).collect();
                let expected = reference(&shape, window, first, &q, &keys, &values);
                for (i, (&found, (expected, parts))) in found.iter().zip(expected).enumerate() {
                    let tolerance = if out.is_narrow { (expected.abs() + parts) / 96.0 } else { 0.0 } + 1e-4;
                    assert!(
                        (found - expected).abs() < tolerance,
                        "{n_heads} heads of {head_dim}, window {window:?}, {n_tokens} tokens from {first}: {found} at {i}, expected {expected}"
                    );
                }
                first += n_tokens;
            }
        }
    }
}
