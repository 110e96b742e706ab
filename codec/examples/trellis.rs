//! What trellis-coded ("dependent") quantization gains over the grids of `rate`, at equal entropy: why the trellis of format 1.1 has four states and one
//! table.
//!
//!     cargo run --release -p codecllm-codec --example trellis -- [CHECKPOINT [REGEX]]
//!
//! Two grids of twice the step, one of even and one of odd multiples, and a state machine on the parities of the codes before that says
//! which of them a weight is on (Marcellin & Fischer 1990; JPEG 2000 part 2; "dependent quantization" of VVC). Codes are found by
//! Viterbi's algorithm with the bits in the cost. `rate`'s own quantizer is what they are compared with.
//!
//! Prints, for normal and Laplacian samples and for the matrices of a checkpoint, the decibels of squared error and the bits that a
//! trellis of 4 and of 8 states saves: with a frequency table for each of the two grids, and with one for both.

use codecllm_codec::archive::Layers;
use codecllm_codec::checkpoint::{Checkpoint, Dtype, Tensor};
use codecllm_codec::quantize::{quantize_to_step, read_row, rms};
use rayon::prelude::*;
use std::path::Path;

/// A phase of a block of 256 columns.
const ROW: usize = 64;
const N: usize = 1024 * ROW;
/// Codes from -LIMIT to LIMIT.
const LIMIT: i32 = 127;
/// Of the squared step, for a bit: as `rate` has it, whose step is that of both grids together.
const SQUARES_PER_BIT: f64 = 0.1;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// A state machine whose state's lowest bit is the grid. The next is that of `q[t] = Σ a[i]·q[t-i] + b[i]·parity[t-i]` modulo 2:
/// Ungerboeck's codes for two grids of two subsets each.
#[derive(Clone, Copy)]
struct Trellis {
    n_states: usize,
    a: usize,
    b: usize,
}

const TRELLISES: [Trellis; 2] =
    [Trellis { n_states: 4, a: 0b10, b: 0b01 }, Trellis { n_states: 8, a: 0b110, b: 0b001 }];

impl Trellis {
    fn next(&self, state: usize, parity: usize) -> usize {
        (state >> 1) ^ (self.a * (state & 1)) ^ (self.b * parity)
    }
}

/// The place of a code on grid `q`, in steps: even multiples, or odd ones.
fn point(q: usize, code: i32) -> f64 {
    f64::from(2 * code + q as i32)
}

/// Bits of each code on each grid.
type Bits = [Vec<f64>; 2];

/// Bits a code costs by how often it occurs, from one table or two; the mean over all codes.
fn bits_of(counts: &[Vec<f64>; 2], shared: bool) -> (Bits, f64) {
    let total = |counts: &[f64]| counts.iter().sum::<f64>();
    let both: Vec<f64> = counts[0].iter().zip(&counts[1]).map(|(a, b)| a + b).collect();
    let tables = if shared { [&both, &both] } else { [&counts[0], &counts[1]] };
    let bits = tables.map(|table| {
        let all = total(table) + 0.5 * table.len() as f64;
        table.iter().map(|c| -((c + 0.5) / all).log2()).collect::<Vec<_>>()
    });
    let entropy =
        |table: &[f64], all: f64| -> f64 { table.iter().filter(|c| **c > 0.0).map(|c| -c * (c / all).log2()).sum() };
    let sum: f64 = (0..2).map(|q| if shared { 0.0 } else { entropy(&counts[q], total(&counts[q])) }).sum();
    let sum = if shared { entropy(&both, total(&both)) } else { sum };
    (bits, sum / total(&both))
}

/// The codes of a row that cost least, by Viterbi's algorithm: counted, with Σ weight · point and Σ point².
fn walk(row: &[f32], step: f64, price: f64, trellis: &Trellis, bits: &Bits, counts: &mut [Vec<f64>; 2]) -> [f64; 2] {
    let n = trellis.n_states;
    let mut costs = vec![f64::INFINITY; n];
    costs[0] = 0.0;
    let mut from = vec![(0u8, 0i16); row.len() * n];
    for (from, w) in from.chunks_exact_mut(n).zip(row) {
        let x = f64::from(*w) / step;
        // The best code of each parity on each grid.
        let mut best = [[(f64::INFINITY, 0i32); 2]; 2];
        for (q, best) in best.iter_mut().enumerate() {
            let below = ((x - q as f64) / 2.0).floor() as i32;
            for code in [below, below + 1] {
                let code = code.clamp(-LIMIT, LIMIT);
                let error = x - point(q, code);
                let cost = error * error + price * bits[q][(code + LIMIT) as usize];
                let best = &mut best[(code & 1) as usize];
                if cost < best.0 {
                    *best = (cost, code);
                }
            }
        }
        let mut next = vec![f64::INFINITY; n];
        for (state, cost) in costs.iter().enumerate() {
            for (parity, (more, code)) in best[state & 1].iter().enumerate() {
                let to = trellis.next(state, parity);
                if cost + more < next[to] {
                    next[to] = cost + more;
                    from[to] = (state as u8, *code as i16);
                }
            }
        }
        costs = next;
    }
    let mut state = (0..n).min_by(|a, b| costs[*a].total_cmp(&costs[*b])).unwrap_or(0);
    let mut sums = [0.0; 2];
    for (from, w) in from.chunks_exact(n).zip(row).rev() {
        let (before, code) = from[state];
        state = before.into();
        let q = state & 1;
        counts[q][(i32::from(code) + LIMIT) as usize] += 1.0;
        let p = point(q, code.into()) * step;
        sums[0] += f64::from(*w) * p;
        sums[1] += p * p;
    }
    sums
}

/// Bits a weight and squared error over squared weights, of weights on a trellis of this step.
fn dependent(weights: &[f32], step: f64, trellis: &Trellis, shared: bool) -> (f64, f64) {
    let none = || [vec![0.0; 2 * LIMIT as usize + 1], vec![0.0; 2 * LIMIT as usize + 1]];
    let mut bits: Bits = none();
    let mut result = (0.0, 0.0);
    // A step of one grid has twice the size of the step of both; in units of the latter, whose square is the price's.
    let price = 4.0 * SQUARES_PER_BIT;
    for _ in 0..5 {
        let (counts, [cross, square]) = weights
            .par_chunks(ROW)
            .map(|row| {
                let mut counts = none();
                let sums = walk(row, step, price, trellis, &bits, &mut counts);
                (counts, sums)
            })
            .reduce(
                || (none(), [0.0; 2]),
                |mut a, b| {
                    a.0.iter_mut().flatten().zip(b.0.iter().flatten()).for_each(|(a, b)| *a += b);
                    (a.0, [a.1[0] + b.1[0], a.1[1] + b.1[1]])
                },
            );
        let found = bits_of(&counts, shared);
        bits = found.0;
        let power: f64 = weights.iter().map(|w| f64::from(*w).powi(2)).sum();
        result = (found.1, 1.0 - cross * cross / (square * power));
    }
    result
}

/// The same with `rate`'s own quantizer.
fn scalar(tensor: &Tensor, step: f64) -> Result<(f64, f64)> {
    let q = quantize_to_step(tensor, step as f32, Some(0))?;
    Ok((q.codes.entropy_bits(), f64::from(q.relative_error).powi(2)))
}

/// The error at `bits`, with the step found by bisection.
fn error_at(bits: f64, rms: f64, mut measure: impl FnMut(f64) -> Result<(f64, f64)>) -> Result<f64> {
    let (mut low, mut high) = (rms * 1e-3, rms * 10.0);
    for _ in 0..18 {
        let middle = (low * high).sqrt();
        if measure(middle)?.0 > bits { low = middle } else { high = middle }
    }
    Ok(measure((low * high).sqrt())?.1)
}

fn report(name: &str, weights: &[f32]) -> Result<()> {
    let shape = vec![weights.len() / ROW, ROW];
    let data: Vec<u8> = weights.iter().flat_map(|w| w.to_le_bytes()).collect();
    let tensor = Tensor { name: name.into(), dtype: Dtype::F32, shape, data: data.into() };
    let rms = rms(&tensor)?;
    for bits in [1.6, 2.0, 3.0, 4.0] {
        let plain = error_at(bits, rms, |step| scalar(&tensor, step))?;
        print!("{name:<40} {bits:>4} {plain:>9.6}");
        for trellis in TRELLISES {
            for shared in [false, true] {
                let found = error_at(bits, rms, |step| Ok(dependent(weights, step, &trellis, shared)))?;
                let decibels = 10.0 * (plain / found).log10();
                print!("  {decibels:>5.2} {:>6.3}", decibels / 6.02);
            }
        }
        println!();
    }
    Ok(())
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    println!("relative squared error of `rate`'s quantizer at equal entropy; dB and bits that a trellis saves");
    println!(
        "{:<40} {:>4} {:>9}  {:<12}  {:<12}  {:<12}  {:<12}",
        "", "bits", "error", "4, 2 tables", "4, 1 table", "8, 2 tables", "8, 1 table"
    );
    let mut state = 1u64;
    let mut uniform = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((state >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    };
    let normal: Vec<f32> =
        (0..N).map(|_| ((-2.0 * uniform().ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos()) as f32).collect();
    report("normal", &normal)?;
    let laplacian: Vec<f32> = (0..N).map(|_| (uniform() / uniform()).ln() as f32).collect();
    report("Laplacian", &laplacian)?;
    let Some(path) = args.first() else { return Ok(()) };
    let checkpoint = Checkpoint::open(Path::new(path))?;
    let layers: Layers = args.get(1).map_or("all", String::as_str).parse()?;
    let selected = layers.select(&checkpoint)?;
    for info in checkpoint.tensors().iter().filter(|t| selected.contains(t.name.as_str())) {
        let tensor = checkpoint.tensor(&info.name)?;
        let mut weights = vec![0f32; info.n_elements()];
        read_row(tensor.dtype, &tensor.data, &mut weights);
        weights.truncate((weights.len() / ROW * ROW).min(N));
        report(&info.name, &weights)?;
    }
    Ok(())
}
