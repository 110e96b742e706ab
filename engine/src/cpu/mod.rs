//! The CPU backend.
//!
//! Plain matrices are read where they lie, in the mapped file, whatever their type; encoded ones are multiplied straight
//! from their blocks. No converted or decoded copy of a matrix is made. Work is split over a thread pool of its own.

mod attention;
mod dense;
mod elementwise;
mod simd;

use crate::backend::{Backend, CacheShape, Logits, Projection};
use crate::error::{Error, Result};
use crate::weights::{DenseType, Weight};
use attention::Cache;
use bytes::Bytes;
use codecllm_codec::Cpu;
use codecllm_codec::encoded::EncodedTensor;
use codecllm_codec::product::Operand;
use dense::{Bf16, DenseProduct, Element, F16, F32};
use elementwise::{RmsNorm, SiluMul, rotate};
use rayon::prelude::*;
use simd::Level;
use std::ops::Range;

#[cfg(target_endian = "big")]
compile_error!("the CPU backend reads little-endian weights where they are mapped");

/// Rows of an encoded matrix decode in groups of this many; every task's range begins at a multiple.
const ROW_GROUP: usize = 32;
/// Tasks of a one-token product for each thread: enough to even out threads that run unevenly.
const TASKS_PER_THREAD: usize = 4;
/// Rows of a task with many tokens: few enough to stay in an L2 cache while they meet every token.
const ROWS_PER_TASK: usize = 64;
/// Queries that attention takes together, so that a key is read once for many.
const QUERIES_PER_TASK: usize = 32;

/// Runs models on the processor's cores.
pub struct CpuBackend {
    level: Level,
    pool: rayon::ThreadPool,
}

impl CpuBackend {
    /// A backend with the instruction set `cpu` and `threads` threads; 0 stands for as many as the machine has cores.
    pub fn new(cpu: Cpu, threads: usize) -> Result<Self> {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|i| format!("codecllm-{i}"))
            .build()
            .map_err(|e| Error::Parameter(format!("cannot start {threads} threads: {e}")))?;
        Ok(Self { level: Level::new(cpu)?, pool })
    }

    /// The instruction set in use.
    pub fn cpu(&self) -> Cpu {
        self.level.cpu()
    }

    /// Threads in use.
    pub fn threads(&self) -> usize {
        self.pool.current_num_threads()
    }

    /// Runs the products of one input, `[n_tokens, n_cols]`, as one parallel region.
    fn products<'a>(
        &self,
        x: &[f32],
        n_cols: usize,
        products: impl Iterator<Item = (&'a Matrix, Option<&'a [f32]>, &'a mut [f32])>,
    ) -> Result<()> {
        let n_tokens = x.len() / n_cols;
        let products: Vec<_> = products.collect();
        let has_encoded = products.iter().any(|(matrix, ..)| matches!(matrix, Matrix::Encoded(_)));
        let operand = has_encoded.then(|| Operand::new(x, n_cols));
        let rows_per_task = match n_tokens {
            1 => {
                let n_rows: usize = products.iter().map(|(matrix, ..)| matrix.n_rows()).sum();
                n_rows.div_ceil(self.threads() * TASKS_PER_THREAD).next_multiple_of(ROW_GROUP)
            }
            _ => ROWS_PER_TASK,
        };
        let mut tasks = Vec::new();
        for (matrix, bias, out) in products {
            assert!(matrix.n_cols() == n_cols, "a product's input has the matrix's width");
            for (first, out) in (0..).step_by(rows_per_task).zip(split_columns(out, matrix.n_rows(), rows_per_task)) {
                tasks.push((matrix, bias, first, out));
            }
        }
        tasks.into_par_iter().with_max_len(1).try_for_each(|(matrix, bias, first, mut out)| {
            let rows = first..first + out[0].len();
            if let [y] = out.as_mut_slice() {
                matrix.product(self.level, x, operand.as_ref(), rows.clone(), y)?;
            } else {
                let mut y = vec![0.0; rows.len() * n_tokens];
                matrix.product(self.level, x, operand.as_ref(), rows.clone(), &mut y)?;
                for (row, y) in y.chunks_exact(n_tokens).enumerate() {
                    for (out, y) in out.iter_mut().zip(y) {
                        out[row] = *y;
                    }
                }
            }
            for out in out.iter_mut() {
                for (y, bias) in out.iter_mut().zip(bias.iter().flat_map(|bias| &bias[rows.clone()])) {
                    *y += bias;
                }
            }
            Ok(())
        })
    }
}

/// A weight matrix, plain or encoded.
pub enum Matrix {
    /// Elements as the checkpoint has them.
    Dense {
        /// Their type.
        element: DenseType,
        /// Outputs.
        n_rows: usize,
        /// Inputs.
        n_cols: usize,
        /// Row-major, little-endian, of any alignment.
        data: Bytes,
    },
    /// Compressed blocks.
    Encoded(EncodedTensor),
}

impl Matrix {
    fn n_rows(&self) -> usize {
        match self {
            Self::Dense { n_rows, .. } => *n_rows,
            Self::Encoded(tensor) => tensor.n_rows(),
        }
    }

    fn n_cols(&self) -> usize {
        match self {
            Self::Dense { n_cols, .. } => *n_cols,
            Self::Encoded(tensor) => tensor.n_cols(),
        }
    }

    /// `y[row] = matrix[row] · x` for some rows and the first token of `x`, on the calling thread: what a product of one
    /// token does in each of its tasks. The rows of an encoded matrix begin at a multiple of 32.
    pub fn matvec(&self, cpu: Cpu, x: &Operand, rows: Range<usize>, y: &mut [f32]) -> Result<()> {
        self.product(Level::new(cpu)?, x.token(0), Some(x), rows, y)
    }

    /// `y[row][token] = matrix[row] · x[token]` for some rows, on the calling thread. An encoded matrix takes its
    /// input as `operand`.
    fn product(
        &self,
        level: Level,
        x: &[f32],
        operand: Option<&Operand>,
        rows: Range<usize>,
        y: &mut [f32],
    ) -> Result<()> {
        match (self, operand) {
            (Self::Encoded(tensor), Some(operand)) => tensor.product(level.cpu(), operand, rows, y)?,
            (Self::Encoded(tensor), None) => {
                tensor.product(level.cpu(), &Operand::new(x, tensor.n_cols()), rows, y)?;
            }
            (Self::Dense { element, n_cols, data, .. }, _) => {
                let data = &data[rows.start * n_cols * element.bytes()..rows.end * n_cols * element.bytes()];
                match element {
                    DenseType::Bf16 => dense_product::<Bf16>(level, data, *n_cols, x, y),
                    DenseType::F16 => dense_product::<F16>(level, data, *n_cols, x, y),
                    DenseType::F32 => dense_product::<F32>(level, data, *n_cols, x, y),
                }
            }
        }
        Ok(())
    }

    /// Writes one row's values.
    fn row(&self, cpu: Cpu, row: usize, out: &mut [f32]) -> Result<()> {
        match self {
            Self::Encoded(tensor) => tensor.decode_rows(cpu, row..row + 1, out)?,
            Self::Dense { element, n_cols, data, .. } => {
                let data = &data[row * n_cols * element.bytes()..][..n_cols * element.bytes()];
                match element {
                    DenseType::Bf16 => widen::<Bf16>(data, out),
                    DenseType::F16 => widen::<F16>(data, out),
                    DenseType::F32 => widen::<F32>(data, out),
                }
            }
        }
        Ok(())
    }
}

fn dense_product<E: Element>(level: Level, data: &[u8], n_cols: usize, x: &[f32], y: &mut [f32]) {
    level.run(DenseProduct::<E> { w: bytemuck::cast_slice(data), n_cols, x, y });
}

fn widen<E: Element>(data: &[u8], out: &mut [f32]) {
    for (out, x) in out.iter_mut().zip(bytemuck::cast_slice::<u8, E>(data)) {
        *out = x.to_f32();
    }
}

/// Splits the rows of `data`, each `width` long, into runs of `run` columns: for each run, its slice of every row.
fn split_columns(data: &mut [f32], width: usize, run: usize) -> Vec<Vec<&mut [f32]>> {
    let mut runs: Vec<Vec<&mut [f32]>> = (0..width.div_ceil(run)).map(|_| Vec::new()).collect();
    for row in data.chunks_exact_mut(width) {
        for (run, slice) in runs.iter_mut().zip(row.chunks_mut(run)) {
            run.push(slice);
        }
    }
    runs
}

/// Activations: `[capacity, width]`.
pub struct Buffer {
    width: usize,
    data: Vec<f32>,
}

impl Buffer {
    /// The first `n_tokens` rows.
    fn rows(&self, n_tokens: usize) -> &[f32] {
        &self.data[..n_tokens * self.width]
    }

    fn rows_mut(&mut self, n_tokens: usize) -> &mut [f32] {
        &mut self.data[..n_tokens * self.width]
    }
}

/// The tokens of a step and their rotary angles.
pub struct Batch {
    tokens: Vec<u32>,
    position: usize,
    inverse_frequencies: Vec<f32>,
    /// `[n_tokens, head_dim / 2]`
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Batch {
    fn len(&self) -> usize {
        self.tokens.len()
    }
}

/// Calls `f` with each token's index and row, on all threads where there are many.
fn for_each_row<F: Fn(usize, &mut [f32]) + Sync>(buffer: &mut Buffer, n_tokens: usize, f: F) {
    let width = buffer.width;
    match n_tokens {
        1 => f(0, buffer.rows_mut(1)),
        _ => buffer.rows_mut(n_tokens).par_chunks_exact_mut(width).enumerate().for_each(|(t, row)| f(t, row)),
    }
}

impl Backend for CpuBackend {
    type Matrix = Matrix;
    type Vector = Vec<f32>;
    type Buffer = Buffer;
    type Batch = Batch;
    type Cache = Cache;

    fn matrix(&self, weight: Weight) -> Result<Matrix> {
        Ok(match weight {
            Weight::Dense { element, n_rows, n_cols, data } => Matrix::Dense { element, n_rows, n_cols, data },
            Weight::Encoded(tensor) => Matrix::Encoded(tensor),
        })
    }

    fn vector(&self, values: Vec<f32>) -> Result<Vec<f32>> {
        Ok(values)
    }

    fn buffer(&self, n_tokens: usize, width: usize) -> Result<Buffer> {
        Ok(Buffer { width, data: vec![0.0; n_tokens * width] })
    }

    fn cache(&self, shape: CacheShape) -> Result<Cache> {
        Ok(Cache::new(shape))
    }

    fn batch(&self, n_tokens: usize, inverse_frequencies: &[f32]) -> Result<Batch> {
        let n_angles = n_tokens * inverse_frequencies.len();
        Ok(Batch {
            tokens: Vec::with_capacity(n_tokens),
            position: 0,
            inverse_frequencies: inverse_frequencies.to_vec(),
            cos: Vec::with_capacity(n_angles),
            sin: Vec::with_capacity(n_angles),
        })
    }

    fn matrix_bytes(&self, matrix: &Matrix) -> u64 {
        match matrix {
            Matrix::Dense { data, .. } => data.len() as u64,
            Matrix::Encoded(tensor) => tensor.sizes().total(),
        }
    }

    fn begin(&self, batch: &mut Batch, tokens: &[u32], first_position: usize) -> Result<()> {
        let Batch { tokens: ids, position, inverse_frequencies, cos, sin } = batch;
        ids.clear();
        ids.extend_from_slice(tokens);
        *position = first_position;
        cos.clear();
        sin.clear();
        for position in first_position..first_position + tokens.len() {
            for frequency in &*inverse_frequencies {
                let (s, c) = (position as f32 * frequency).sin_cos();
                cos.push(c);
                sin.push(s);
            }
        }
        Ok(())
    }

    /// Enters the thread pool.
    fn run<R: Send>(&self, pass: impl FnOnce() -> R + Send) -> R {
        self.pool.install(pass)
    }

    fn embed(&self, batch: &Batch, table: &Matrix, out: &mut Buffer) -> Result<()> {
        let width = out.width;
        let rows = out.rows_mut(batch.len()).par_chunks_exact_mut(width);
        rows.zip(&batch.tokens).try_for_each(|(out, token)| table.row(self.cpu(), *token as usize, out))
    }

    fn rms_norm(&self, batch: &Batch, x: &Buffer, weight: &Vec<f32>, eps: f32, out: &mut Buffer) -> Result<()> {
        for_each_row(out, batch.len(), |t, out| {
            out.copy_from_slice(&x.data[t * x.width..][..x.width]);
            self.level.run(RmsNorm { x: out, weight, eps });
        });
        Ok(())
    }

    fn head_norm(&self, batch: &Batch, x: &mut Buffer, weight: &Vec<f32>, eps: f32) -> Result<()> {
        for_each_row(x, batch.len(), |_, x| self.level.run(RmsNorm { x, weight, eps }));
        Ok(())
    }

    fn project(&self, batch: &Batch, x: &Buffer, products: &mut [Projection<'_, Self>]) -> Result<()> {
        let n_tokens = batch.len();
        let products = products.iter_mut().map(|p| (p.matrix, p.bias.map(Vec::as_slice), p.out.rows_mut(n_tokens)));
        self.products(x.rows(n_tokens), x.width, products)
    }

    fn rotate(&self, batch: &Batch, x: &mut Buffer) -> Result<()> {
        let pairs = batch.inverse_frequencies.len();
        for_each_row(x, batch.len(), |t, x| {
            rotate(x, &batch.cos[t * pairs..][..pairs], &batch.sin[t * pairs..][..pairs]);
        });
        Ok(())
    }

    fn append(&self, batch: &Batch, k: &Buffer, v: &Buffer, cache: &mut Cache) -> Result<()> {
        let rows = k.rows(batch.len()).chunks_exact(k.width).zip(v.rows(batch.len()).chunks_exact(v.width));
        for (t, (k, v)) in rows.enumerate() {
            cache.store(batch.position + t, k, v);
        }
        Ok(())
    }

    fn attend(&self, batch: &Batch, q: &Buffer, cache: &Cache, window: Option<usize>, out: &mut Buffer) -> Result<()> {
        let CacheShape { n_kv_heads, head_dim, .. } = cache.shape();
        let width = q.width;
        let group_width = width / n_kv_heads;
        let tokens_per_task = QUERIES_PER_TASK.div_ceil(group_width / head_dim);
        let mut tasks = Vec::new();
        let tiles = out.rows_mut(batch.len()).chunks_mut(tokens_per_task * width);
        for (first, tile) in (0..).step_by(tokens_per_task).zip(tiles) {
            tasks.extend(
                split_columns(tile, width, group_width).into_iter().enumerate().map(|(h, out)| (first, h, out)),
            );
        }
        tasks.into_par_iter().with_max_len(1).for_each(|(first, head, out)| {
            let queries = q.data[first * width..].chunks_exact(width).take(out.len());
            let queries = queries.map(|row| &row[head * group_width..][..group_width]);
            let attended = self.level.run(cache.attention(head, queries, batch.position + first, window));
            let stride = head_dim.next_multiple_of(32);
            let heads = out.into_iter().flat_map(|row| row.chunks_exact_mut(head_dim));
            for (out, attended) in heads.zip(attended.chunks_exact(stride)) {
                out.copy_from_slice(&attended[..head_dim]);
            }
        });
        Ok(())
    }

    fn silu_mul(&self, batch: &Batch, gate: &mut Buffer, up: &Buffer) -> Result<()> {
        for_each_row(gate, batch.len(), |t, gate| {
            self.level.run(SiluMul { gate, up: &up.data[t * up.width..][..up.width] });
        });
        Ok(())
    }

    fn add(&self, batch: &Batch, x: &mut Buffer, y: &Buffer) -> Result<()> {
        for (x, y) in x.rows_mut(batch.len()).iter_mut().zip(y.rows(batch.len())) {
            *x += y;
        }
        Ok(())
    }

    fn logits(&self, batch: &Batch, x: &Buffer, head: &Matrix, want: Logits, out: &mut Buffer) -> Result<()> {
        let first = match want {
            Logits::Last => batch.len() - 1,
            Logits::All => 0,
        };
        let x_rows = &x.rows(batch.len())[first * x.width..];
        self.products(x_rows, x.width, std::iter::once((head, None, out.rows_mut(batch.len() - first))))
    }

    fn read(&self, buffer: &Buffer, out: &mut [f32]) -> Result<()> {
        out.copy_from_slice(&buffer.data[..out.len()]);
        Ok(())
    }
}
