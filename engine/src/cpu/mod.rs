//! The CPU backend.
//!
//! Plain matrices are read where they lie, in the mapped file, whatever their type; encoded ones are multiplied straight
//! from their blocks. No converted or decoded copy of a matrix is made. Work is split over a thread pool of its own.

mod attention;
mod dense;
mod elementwise;
mod simd;

use crate::backend::{Attention, Backend, CacheShape, Input, Logits, Norm, Projection};
use crate::error::{Error, Result};
use crate::sampler::{self, Draw};
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
use std::borrow::Cow;
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

    /// `out[t] = matrix · x[t] + bias` on all threads; x `[n_tokens, n_cols]`, bias `[n_rows]`, out `[n_tokens, n_rows]`.
    ///
    /// # Errors
    /// Sizes that do not fit each other, a payload that does not decode.
    pub fn linear(&self, matrix: &Matrix, x: &[f32], bias: Option<&[f32]>, out: &mut [f32]) -> Result<()> {
        let (n_rows, n_cols) = (matrix.n_rows(), matrix.n_cols());
        let n_tokens = x.len() / n_cols;
        if x.len() != n_tokens * n_cols || out.len() != n_tokens * n_rows || bias.is_some_and(|b| b.len() != n_rows) {
            return Err(Error::Parameter(format!(
                "{} values times a matrix of {n_rows} × {n_cols} plus {} into {}: the sizes do not fit",
                x.len(),
                bias.map_or(0, <[f32]>::len),
                out.len()
            )));
        }
        match n_tokens {
            0 => Ok(()),
            _ => self
                .pool
                .install(|| self.products(x, n_cols, std::iter::once(Product { matrix, bias, out, adds: false }))),
        }
    }

    /// Writes rows of a matrix: `out[i] = matrix[rows[i]]`, out `[rows.len(), n_cols]`.
    ///
    /// # Errors
    /// A row that the matrix does not have, a buffer of another size, a payload that does not decode.
    pub fn gather(&self, matrix: &Matrix, rows: &[usize], out: &mut [f32]) -> Result<()> {
        let (n_rows, n_cols) = (matrix.n_rows(), matrix.n_cols());
        if let Some(row) = rows.iter().find(|&&row| row >= n_rows) {
            return Err(Error::Parameter(format!("there is no row {row} in a matrix of {n_rows} rows")));
        }
        if out.len() != rows.len() * n_cols {
            return Err(Error::Parameter(format!("{} rows of {n_cols} into {} values", rows.len(), out.len())));
        }
        self.pool.install(|| {
            let jobs = out.par_chunks_mut(n_cols).zip(rows);
            jobs.try_for_each(|(out, &row)| matrix.row(self.level.cpu(), row, out))
        })
    }

    /// Runs the products of one input, `[n_tokens, n_cols]`, as one parallel region.
    fn products<'a>(&self, x: &[f32], n_cols: usize, products: impl Iterator<Item = Product<'a>>) -> Result<()> {
        let n_tokens = x.len() / n_cols;
        let products: Vec<_> = products.collect();
        let has_encoded = products.iter().any(|p| matches!(p.matrix, Matrix::Encoded(_)));
        let operand = has_encoded.then(|| Operand::new(x, n_cols));
        let rows_per_task = match n_tokens {
            1 => {
                let n_rows: usize = products.iter().map(|p| p.matrix.n_rows()).sum();
                n_rows.div_ceil(self.threads() * TASKS_PER_THREAD).next_multiple_of(ROW_GROUP)
            }
            _ => ROWS_PER_TASK,
        };
        let mut tasks = Vec::new();
        for Product { matrix, bias, out, adds } in products {
            assert!(matrix.n_cols() == n_cols, "a product's input has the matrix's width");
            for (first, out) in (0..).step_by(rows_per_task).zip(split_columns(out, matrix.n_rows(), rows_per_task)) {
                tasks.push((matrix, bias, adds, first, out));
            }
        }
        tasks.into_par_iter().with_max_len(1).try_for_each(|(matrix, bias, adds, first, mut out)| {
            let rows = first..first + out[0].len();
            if let ([y], false) = (out.as_mut_slice(), adds) {
                matrix.product(self.level, x, operand.as_ref(), rows.clone(), y)?;
            } else {
                let mut y = vec![0.0; rows.len() * n_tokens];
                matrix.product(self.level, x, operand.as_ref(), rows.clone(), &mut y)?;
                for (t, out) in out.iter_mut().enumerate() {
                    for (out, y) in out.iter_mut().zip(y[t..].iter().step_by(n_tokens)) {
                        *out = if adds { *out + y } else { *y };
                    }
                }
            }
            for out in out.iter_mut() {
                for (y, bias) in out.iter_mut().zip(bias.map_or(&[][..], |bias| &bias[rows.clone()])) {
                    *y += bias;
                }
            }
            Ok(())
        })
    }
}

/// One of the products of an input: its rows of `out` are those of the tokens.
struct Product<'a> {
    matrix: &'a Matrix,
    bias: Option<&'a [f32]>,
    out: &'a mut [f32],
    adds: bool,
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

/// The parts of the operations.
impl CpuBackend {
    fn head_norm(&self, batch: &Batch, x: &mut Buffer, norm: Norm<'_, Self>) {
        let Norm { weight, eps } = norm;
        for_each_row(x, batch.len(), |_, x| self.level.run(RmsNorm { x, weight, eps }));
    }

    /// The first `n_tokens` rows of an input from row `first` on, normalized where they are to be.
    fn normalized<'a>(&self, x: &Input<'a, Self>, rows: Range<usize>) -> Cow<'a, [f32]> {
        let width = x.x.width;
        let data = &x.x.data[rows.start * width..rows.end * width];
        let Some(Norm { weight, eps }) = x.norm else { return data.into() };
        let mut data = data.to_vec();
        data.par_chunks_exact_mut(width).for_each(|x| self.level.run(RmsNorm { x, weight, eps }));
        data.into()
    }

    fn rotate(&self, batch: &Batch, x: &mut Buffer) {
        let pairs = batch.inverse_frequencies.len();
        for_each_row(x, batch.len(), |t, x| {
            rotate(x, &batch.cos[t * pairs..][..pairs], &batch.sin[t * pairs..][..pairs]);
        });
    }

    fn append(&self, batch: &Batch, k: &Buffer, v: &Buffer, cache: &mut Cache) {
        let rows = k.rows(batch.len()).chunks_exact(k.width).zip(v.rows(batch.len()).chunks_exact(v.width));
        for (t, (k, v)) in rows.enumerate() {
            cache.store(batch.position + t, k, v);
        }
    }

    fn attention(&self, batch: &Batch, q: &Buffer, cache: &Cache, window: Option<usize>, out: &mut Buffer) {
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
    }

    fn silu_mul(&self, batch: &Batch, gate: &mut Buffer, up: &Buffer) {
        for_each_row(gate, batch.len(), |t, gate| {
            self.level.run(SiluMul { gate, up: &up.data[t * up.width..][..up.width] });
        });
    }
}

impl Backend for CpuBackend {
    type Matrix = Matrix;
    type Vector = Vec<f32>;
    type Buffer = Buffer;
    type Batch = Batch;
    type Cache = Cache;
    type Recording = ();

    const CHUNK: usize = 128;

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
            Matrix::Encoded(tensor) => tensor.bytes().len() as u64,
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
    fn run(&self, _: Option<&mut ()>, pass: impl FnMut() -> Result<()> + Send) -> Result<()> {
        self.pool.install(pass)
    }

    fn embed(&self, batch: &Batch, table: &Matrix, out: &mut Buffer) -> Result<()> {
        let width = out.width;
        let rows = out.rows_mut(batch.len()).par_chunks_exact_mut(width);
        rows.zip(&batch.tokens).try_for_each(|(out, token)| table.row(self.cpu(), *token as usize, out))
    }

    fn project(&self, batch: &Batch, x: Input<'_, Self>, products: &mut [Projection<'_, Self>]) -> Result<()> {
        let n_tokens = batch.len();
        let products = products.iter_mut().map(|p| Product {
            matrix: p.matrix,
            bias: p.bias.map(Vec::as_slice),
            out: p.out.rows_mut(n_tokens),
            adds: p.adds,
        });
        self.products(&self.normalized(&x, 0..n_tokens), x.x.width, products)
    }

    fn project_gated(
        &self,
        batch: &Batch,
        x: Input<'_, Self>,
        gate: Projection<'_, Self>,
        up: Projection<'_, Self>,
    ) -> Result<()> {
        let mut products = [gate, up];
        self.project(batch, x, &mut products)?;
        let [gate, up] = products;
        self.silu_mul(batch, gate.out, up.out);
        Ok(())
    }

    fn attend(&self, batch: &Batch, heads: Attention<'_, Self>, cache: &mut Cache, out: &mut Buffer) -> Result<()> {
        let Attention { q, k, v, head_norms, window } = heads;
        if let Some((query_norm, key_norm)) = head_norms {
            self.head_norm(batch, q, query_norm);
            self.head_norm(batch, k, key_norm);
        }
        self.rotate(batch, q);
        self.rotate(batch, k);
        self.append(batch, k, v, cache);
        self.attention(batch, q, cache, window, out);
        Ok(())
    }

    fn logits(&self, batch: &Batch, x: Input<'_, Self>, head: &Matrix, want: Logits, out: &mut Buffer) -> Result<()> {
        let first = match want {
            Logits::Last => batch.len() - 1,
            Logits::All => 0,
        };
        let out = out.rows_mut(batch.len() - first);
        let product = Product { matrix: head, bias: None, out, adds: false };
        self.products(&self.normalized(&x, first..batch.len()), x.x.width, std::iter::once(product))
    }

    /// The choice is made when it is asked for.
    fn choose(&self, _: &Batch, _: &Buffer) -> Result<()> {
        Ok(())
    }

    fn likeliest(&self, _: &Batch, logits: &Buffer) -> Result<u32> {
        sampler::likeliest(logits.rows(1))
    }

    fn sample(&self, _: &mut Batch, logits: &mut Buffer, draw: &Draw) -> Result<u32> {
        draw.choose(logits.rows_mut(1))
    }

    fn write(&self, buffer: &mut Buffer, values: &[f32]) -> Result<()> {
        buffer.data[..values.len()].copy_from_slice(values);
        Ok(())
    }

    fn read(&self, buffer: &Buffer, out: &mut [f32]) -> Result<()> {
        out.copy_from_slice(&buffer.data[..out.len()]);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use codecllm_codec::checkpoint::{Dtype, Tensor};
    use codecllm_codec::encoded::{Checks, EncodeOptions, encode_tensor};
    use codecllm_codec::{Coder, Format};
    use rand::rngs::SmallRng;
    use rand::{Rng, SeedableRng};

    /// `n` values between −1 and 1.
    pub(super) fn random(n: usize, seed: u64) -> Vec<f32> {
        let mut rng = SmallRng::seed_from_u64(seed);
        (0..n).map(|_| rng.random_range(-1.0..1.0)).collect()
    }

    /// Asserts that values agree to `tolerance`, as a share of the largest expected one.
    #[track_caller]
    pub(super) fn assert_close(found: &[f32], expected: &[f64], tolerance: f64) {
        assert_eq!(found.len(), expected.len());
        let largest = expected.iter().fold(0f64, |m, x| m.max(x.abs()));
        for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
            let error = (f64::from(*found) - expected).abs();
            assert!(error <= tolerance * largest, "value {i}: {found}, expected {expected}");
        }
    }

    fn buffer(width: usize, data: Vec<f32>) -> Buffer {
        Buffer { width, data }
    }

    fn input(x: &Buffer) -> Input<'_, CpuBackend> {
        Input { x, norm: None }
    }

    fn batch(backend: &CpuBackend, n_tokens: usize, position: usize) -> Batch {
        let mut batch = backend.batch(n_tokens, &[1.0, 0.25]).unwrap();
        backend.begin(&mut batch, &vec![0; n_tokens], position).unwrap();
        batch
    }

    fn bf16_matrix(n_rows: usize, n_cols: usize, seed: u64) -> (Bytes, Vec<f32>) {
        let values: Vec<_> = random(n_rows * n_cols, seed).into_iter().map(half::bf16::from_f32).collect();
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        (bytes.into(), values.into_iter().map(half::bf16::to_f32).collect())
    }

    /// `x · wᵀ + bias` in f64; `[n_tokens, n_rows]`.
    fn naive_product(w: &[f32], n_cols: usize, x: &[f32], bias: &[f32]) -> Vec<f64> {
        let dot =
            |row: &[f32], x: &[f32]| -> f64 { row.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum() };
        x.chunks(n_cols)
            .flat_map(|x| w.chunks(n_cols).zip(bias).map(move |(row, bias)| dot(row, x) + f64::from(*bias)))
            .collect()
    }

    #[test]
    fn products_of_plain_and_encoded_matrices_share_a_region() {
        let (n_rows, n_cols) = (75, 96);
        let (plain, values) = bf16_matrix(n_rows, n_cols, 1);
        let tensor = Tensor { name: "w".into(), dtype: Dtype::Bf16, shape: vec![n_rows, n_cols], data: plain.clone() };
        let bias = random(n_rows, 2);
        for cpu in Cpu::available() {
            let backend = CpuBackend::new(cpu, 2).unwrap();
            for coder in [Coder::Rans, Coder::Zstd] {
                let options = EncodeOptions { format: Format::Bf16, coder, ..Default::default() };
                let encoded = encode_tensor(&tensor, &options).unwrap();
                let encoded = Matrix::Encoded(EncodedTensor::parse(encoded.into(), Checks::Full).unwrap());
                let dense = Matrix::Dense { element: DenseType::Bf16, n_rows, n_cols, data: plain.clone() };
                for n_tokens in [1, 2, 7] {
                    let x = buffer(n_cols, random(n_tokens * n_cols, 3));
                    let mut outs = [f32::NAN, 0.0].map(|before| buffer(n_rows, vec![before; n_tokens * n_rows]));
                    let [out_dense, out_encoded] = &mut outs;
                    let mut products = [
                        Projection { matrix: &dense, bias: Some(&bias), out: out_dense, adds: false },
                        Projection { matrix: &encoded, bias: Some(&bias), out: out_encoded, adds: true },
                    ];
                    let batch = batch(&backend, n_tokens, 0);
                    backend.run(None, || backend.project(&batch, input(&x), &mut products)).unwrap();
                    let expected = naive_product(&values, n_cols, &x.data, &bias);
                    for out in outs {
                        assert_close(&out.data, &expected, 1e-6);
                    }
                }
            }
        }
    }

    #[test]
    fn embedding_copies_rows() {
        let (data, values) = bf16_matrix(50, 40, 4);
        let tensor = Tensor { name: "w".into(), dtype: Dtype::Bf16, shape: vec![50, 40], data: data.clone() };
        let encoded = encode_tensor(&tensor, &EncodeOptions { format: Format::Bf16, ..Default::default() }).unwrap();
        for cpu in Cpu::available() {
            let backend = CpuBackend::new(cpu, 2).unwrap();
            let mut batch = backend.batch(3, &[1.0]).unwrap();
            backend.begin(&mut batch, &[49, 0, 33], 0).unwrap();
            let encoded = EncodedTensor::parse(encoded.clone().into(), Checks::Full).unwrap();
            let dense = Matrix::Dense { element: DenseType::Bf16, n_rows: 50, n_cols: 40, data: data.clone() };
            for table in [dense, Matrix::Encoded(encoded)] {
                let mut out = buffer(40, vec![f32::NAN; 120]);
                backend.run(None, || backend.embed(&batch, &table, &mut out)).unwrap();
                let expected = [&values[49 * 40..], &values[..40], &values[33 * 40..34 * 40]].concat();
                assert_eq!(out.data, expected);
            }
        }
    }

    #[test]
    fn logits_of_the_last_token_or_of_all() {
        let backend = CpuBackend::new(Cpu::detect(), 2).unwrap();
        let (data, values) = bf16_matrix(37, 16, 5);
        let head = Matrix::Dense { element: DenseType::Bf16, n_rows: 37, n_cols: 16, data };
        let x = buffer(16, random(5 * 16, 6));
        let batch = batch(&backend, 5, 0);
        let expected = naive_product(&values, 16, &x.data, &[0.0; 37]);
        for (want, expected) in [(Logits::All, &expected[..]), (Logits::Last, &expected[4 * 37..])] {
            let mut out = buffer(37, vec![f32::NAN; expected.len()]);
            backend.run(None, || backend.logits(&batch, input(&x), &head, want, &mut out)).unwrap();
            assert_close(&out.data, expected, 1e-6);
        }
    }

    #[test]
    fn norms_rotation_and_gating() {
        for cpu in Cpu::available() {
            let backend = CpuBackend::new(cpu, 2).unwrap();
            // Two heads of four; widths that are no multiple of a vector.
            let (n_tokens, width, eps) = (3, 8, 1e-3);
            let batch = batch(&backend, n_tokens, 7);
            let x = buffer(width, random(n_tokens * width, 7));
            let norm = |x: &[f32], weight: &[f32]| -> Vec<f64> {
                let mean = x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / x.len() as f64;
                x.iter()
                    .zip(weight)
                    .map(|(x, w)| f64::from(*x) * f64::from(*w) / (mean + f64::from(eps)).sqrt())
                    .collect()
            };

            let weight = &random(width, 9);
            let out = backend.normalized(&Input { x: &x, norm: Some(Norm { weight, eps }) }, 0..n_tokens);
            let expected: Vec<f64> = x.data.chunks(width).flat_map(|x| norm(x, weight)).collect();
            assert_close(&out, &expected, 1e-6);

            let weight = &random(4, 10);
            let mut out = buffer(width, x.data.clone());
            backend.head_norm(&batch, &mut out, Norm { weight, eps });
            let expected: Vec<f64> = x.data.chunks(4).flat_map(|x| norm(x, weight)).collect();
            assert_close(&out.data, &expected, 1e-6);

            let mut out = buffer(width, x.data.clone());
            backend.rotate(&batch, &mut out);
            let expected: Vec<f64> = (0..n_tokens * width)
                .map(|i| {
                    let (head, pair) = (i / 4 * 4, i % 2);
                    let angle = (7 + i / width) as f64 * [1.0, 0.25][pair];
                    let (a, b) = (f64::from(x.data[head + pair]), f64::from(x.data[head + pair + 2]));
                    if i % 4 < 2 { a * angle.cos() - b * angle.sin() } else { b * angle.cos() + a * angle.sin() }
                })
                .collect();
            assert_close(&out.data, &expected, 1e-6);

            for width in [1, 8, 37] {
                let wide = |seed| random(n_tokens * width, seed).iter().map(|x| x * 20.0).collect::<Vec<f32>>();
                let (mut gate, up) = (buffer(width, wide(11)), buffer(width, wide(12)));
                let silu = |x: f64| x / (1.0 + (-x).exp());
                let pairs = gate.data.iter().zip(&up.data);
                let expected: Vec<f64> = pairs.map(|(g, u)| silu(f64::from(*g)) * f64::from(*u)).collect();
                backend.silu_mul(&batch, &mut gate, &up);
                assert_close(&gate.data, &expected, 1e-6);
            }
        }
    }

    /// The attention of one query head over the keys and values that it sees, each `[n_positions, head_dim]`.
    fn naive_attention(q: &[f32], keys: &[&[f32]], values: &[&[f32]]) -> Vec<f64> {
        let dot = |k: &[f32]| q.iter().zip(k).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum::<f64>();
        let weights: Vec<f64> = keys.iter().map(|k| (dot(k) / (q.len() as f64).sqrt()).exp()).collect();
        let total: f64 = weights.iter().sum();
        let value = |i: usize| values.iter().zip(&weights).map(|(v, w)| f64::from(v[i]) * w / total).sum();
        (0..q.len()).map(value).collect()
    }

    #[test]
    fn attention_sees_what_it_should() {
        let (n_heads, n_kv_heads, n_positions) = (6, 2, 150);
        for cpu in Cpu::available() {
            let backend = CpuBackend::new(cpu, 2).unwrap();
            for (head_dim, window, chunk) in [(8, None, 150), (64, None, 1), (40, Some(1), 70), (64, Some(45), 33)] {
                let (kv_width, q_width) = (n_kv_heads * head_dim, n_heads * head_dim);
                let (k, v) = (random(n_positions * kv_width, 13), random(n_positions * kv_width, 14));
                let q: Vec<f32> = random(n_positions * q_width, 15).iter().map(|q| q * 5.0).collect();
                let mut cache =
                    backend.cache(CacheShape { capacity: n_positions, n_heads, n_kv_heads, head_dim }).unwrap();
                let mut found = Vec::new();
                for first in (0..n_positions).step_by(chunk) {
                    let tokens = first..n_positions.min(first + chunk);
                    let part =
                        |x: &[f32], width: usize| buffer(width, x[tokens.start * width..tokens.end * width].to_vec());
                    let batch = batch(&backend, tokens.len(), first);
                    let mut out = buffer(q_width, vec![f32::NAN; tokens.len() * q_width]);
                    backend.append(&batch, &part(&k, kv_width), &part(&v, kv_width), &mut cache);
                    backend.attention(&batch, &part(&q, q_width), &cache, window, &mut out);
                    found.extend(out.data);
                }
                let mut expected = Vec::new();
                for (i, q) in q.chunks(head_dim).enumerate() {
                    let (position, kv_head) = (i / n_heads, i % n_heads / (n_heads / n_kv_heads));
                    let first = (position + 1).saturating_sub(window.unwrap_or(usize::MAX));
                    let at = |p: usize| p * kv_width + kv_head * head_dim;
                    let keys: Vec<&[f32]> = (first..=position).map(|p| &k[at(p)..][..head_dim]).collect();
                    let values: Vec<&[f32]> = (first..=position).map(|p| &v[at(p)..][..head_dim]).collect();
                    expected.extend(naive_attention(q, &keys, &values));
                }
                assert_close(&found, &expected, 2e-6);
            }
        }
    }
}
