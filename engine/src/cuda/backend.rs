//! The operations of the forward pass on a GPU.
//!
//! A step of one token is recorded as a CUDA graph and replayed: what changes from token to token (the token and its
//! position) is read from memory that [`Backend::begin`] writes. Its products read the weights once, with the norm before
//! them and the sum after them in the same kernel. Those of more tokens are cuBLAS's, where it is installed: up to 16
//! tokens, of activations as the sum of two BF16 numbers, and for more, rounded to one. Encoded matrices are multiplied as they are up to 16
//! tokens, and for more decoded into a buffer first that all of them share.

use super::blas::{Blas, Gemm};
use super::device::{Device, Grid, failed};
use super::encoded::{self, EncodedKernels, EncodedMatrix, OperandBuffer, PRODUCT_TOKENS};
use super::host::{Pinned, Upload};
use super::ops::{self, Kernels, NONE, Rows};
use super::sample::{DrawState, SampleKernels};
use super::zstd::{Zstd, ZstdMatrix};
use crate::backend::{Attention, Backend, CacheShape, DecodedForm, DeviceMemory, Input, Logits, Norm, Projection};
use crate::error::{Error, Result};
use crate::sampler::{self, Draw};
use crate::weights::{DenseType, Weight};
use codecllm_codec::Coder;
use cudarc::driver::sys::{CUdeviceptr, CUgraphInstantiate_flags, CUresult, CUstreamCaptureMode};
use cudarc::driver::{CudaFunction, CudaGraph, CudaSlice, DevicePtr, DevicePtrMut, DriverError};
use half::bf16;
use std::sync::{Mutex, MutexGuard};

/// Weights of a row are padded to a multiple of this, so that rows begin at 16 bytes.
const ROW_ALIGN: usize = 8;
/// Threads of kernels that go over a token's activations.
const ROW_THREADS: u32 = 256;
/// What cuBLAS takes for itself on the largest GPUs, in bytes.
const BLAS_BYTES: u64 = 32 << 20;
/// Blocks that choose a token.
const CHOOSE_BLOCKS: u32 = 32;

/// Runs models on a GPU.
pub struct CudaBackend {
    device: Device,
    kernels: Kernels,
    sample: SampleKernels,
    blas: Option<Blas>,
    upload: Mutex<Upload>,
    encoded: EncodedKernels,
    scratch: Mutex<Scratch>,
    /// Opened for the first tensor of that coder.
    zstd: Mutex<Option<Zstd>>,
}

/// What products of encoded matrices need, one after another. It grows while a model is loaded, and for a first prompt.
struct Scratch {
    /// The activations as those products take them, of up to `max_cols` columns.
    operand: OperandBuffer,
    max_cols: usize,
    /// Normalized activations, `[PRODUCT_TOKENS, max_cols]`.
    normed: CudaSlice<f32>,
    /// A decoded matrix.
    decoded: CudaSlice<bf16>,
}

impl CudaBackend {
    /// A backend on a GPU.
    pub fn new(device: Device) -> Result<Self> {
        let kernels = Kernels::load(&device)?;
        let sample = SampleKernels::load(&device)?;
        let blas = Blas::load(&device)?;
        let upload = Mutex::new(Upload::new(&device)?);
        let encoded = EncodedKernels::new(&device)?;
        let scratch = Mutex::new(Scratch {
            operand: encoded.operand(&device, 0)?,
            max_cols: 0,
            normed: device.zeros(0)?,
            // SAFETY: it is empty.
            decoded: unsafe { device.stream().alloc(0) }.map_err(failed("allocating memory"))?,
        });
        Ok(Self { device, kernels, sample, blas, upload, encoded, scratch, zstd: Mutex::new(None) })
    }

    /// The GPU.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Whether cuBLAS was found. Without it, prompts take as long as the same tokens one by one.
    pub fn has_blas(&self) -> bool {
        self.blas.is_some()
    }
}

impl Scratch {
    /// Makes room for the products of a matrix.
    fn grow(&mut self, backend: &CudaBackend, n_cols: usize) -> Result<()> {
        let device = &backend.device;
        if n_cols > self.max_cols {
            self.operand = backend.encoded.operand(device, n_cols)?;
            self.normed = device.zeros(PRODUCT_TOKENS * n_cols)?;
            self.max_cols = n_cols;
        }
        Ok(())
    }
}

/// A weight matrix in the GPU's memory.
pub struct Matrix(Storage);

enum Storage {
    Dense(Dense),
    Encoded(Box<EncodedMatrix>),
    Zstd(Box<ZstdMatrix>),
}

/// BF16, `[n_rows, stride]`
struct Dense {
    data: CudaSlice<bf16>,
    n_rows: usize,
    n_cols: usize,
    stride: usize,
}

impl Matrix {
    fn n_rows(&self) -> usize {
        match &self.0 {
            Storage::Dense(dense) => dense.n_rows,
            Storage::Encoded(encoded) => encoded.n_rows(),
            Storage::Zstd(zstd) => zstd.n_rows(),
        }
    }

    fn n_cols(&self) -> usize {
        match &self.0 {
            Storage::Dense(dense) => dense.n_cols,
            Storage::Encoded(encoded) => encoded.n_cols(),
            Storage::Zstd(zstd) => zstd.n_cols(),
        }
    }
}

/// f32 values in the GPU's memory.
pub struct Vector(CudaSlice<f32>);

/// Activations: `[capacity, width]`.
pub struct Buffer {
    data: CudaSlice<f32>,
    /// The same rounded to BF16, `[capacity, width padded]`, while it is the input of a product of many tokens. Empty where
    /// there is one token at most.
    narrow: CudaSlice<u16>,
    /// What that rounding lost, for up to `PRODUCT_TOKENS` tokens.
    rest: CudaSlice<u16>,
    width: usize,
}

/// The tokens of a step.
pub struct Batch {
    /// The first position, then the tokens: as the host writes them, and where the kernels read them.
    step_host: Pinned,
    position: CudaSlice<u32>,
    tokens: CudaSlice<u32>,
    n_tokens: usize,
    /// `[head_dim / 2]`
    inverse_frequencies: CudaSlice<f32>,
    /// The token that was chosen, and the bits of its logit.
    choice_host: Pinned,
    /// What the blocks that choose share: the best so far, and how many are done.
    best: CudaSlice<u64>,
    done: CudaSlice<u32>,
    draw: DrawState,
}

/// Keys and values of one layer, BF16, each `[n_kv_heads, capacity, head_dim padded]`.
pub struct Cache {
    shape: CacheShape,
    keys: CudaSlice<u16>,
    values: CudaSlice<u16>,
    /// Blocks that share the positions of a token where it is alone.
    n_shares: u32,
    /// What they hand to the last of them, and how many are done.
    partial: CudaSlice<f32>,
    done: CudaSlice<u32>,
}

/// A step of one token.
#[derive(Default)]
pub struct Recording(Option<Graph>);

struct Graph(CudaGraph);

// SAFETY: a graph is launched through `&mut Recording` alone, so by one thread at a time.
unsafe impl Send for Graph {}
// SAFETY: as above; a shared reference can do nothing.
unsafe impl Sync for Graph {}

/// Activations that products read, and their norm.
#[derive(Clone, Copy)]
struct Activations<'a> {
    buffer: &'a Buffer,
    /// The first of `n_tokens` tokens.
    first: usize,
    n_tokens: usize,
    norm: Option<Norm<'a, CudaBackend>>,
}

impl<'a> Activations<'a> {
    fn new(x: Input<'a, CudaBackend>, first: usize, n_tokens: usize) -> Self {
        Self { buffer: x.x, first, n_tokens, norm: x.norm }
    }

    fn n_cols(&self) -> usize {
        self.buffer.width
    }

    fn stride(&self) -> usize {
        self.buffer.width.next_multiple_of(ROW_ALIGN)
    }

    /// Whether products keep what rounding to BF16 loses: for so few tokens the weights' way from memory is the longer one.
    fn is_exact(&self) -> bool {
        self.n_tokens <= PRODUCT_TOKENS
    }

    fn address(&self) -> CUdeviceptr {
        address(&self.buffer.data) + (4 * self.first * self.buffer.width) as CUdeviceptr
    }

    /// Where the norm's weight is and what keeps its root from zero.
    fn norm(&self) -> (CUdeviceptr, f32) {
        self.norm.map_or((NONE, 0.0), |norm| (address(&norm.weight.0), norm.eps))
    }
}

/// The rows of a dense matrix, or of one that was decoded, and what becomes of their product.
fn rows(weights: CUdeviceptr, product: &mut Projection<'_, CudaBackend>) -> Rows {
    Rows {
        weights,
        bias: product.bias.map_or(NONE, |bias| address(&bias.0)),
        out: address_mut(&mut product.out.data),
        n_rows: product.matrix.n_rows() as u32,
        adds: product.adds.into(),
    }
}

/// Where a slice lies. All work goes through one stream, so that no event guards it.
fn address<T>(slice: &CudaSlice<T>) -> CUdeviceptr {
    slice.device_ptr(slice.stream()).0
}

fn address_mut<T>(slice: &mut CudaSlice<T>) -> CUdeviceptr {
    let stream = slice.stream().clone();
    slice.device_ptr_mut(&stream).0
}

impl CudaBackend {
    fn scratch(&self) -> MutexGuard<'_, Scratch> {
        self.scratch.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn upload(&self) -> MutexGuard<'_, Upload> {
        self.upload.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Columns that plain matrices may have: a token's activations lie in shared memory.
    fn dense_cols(&self) -> usize {
        (self.device.shared_bytes() - self.ring_bytes()) as usize / 4
    }

    fn ring_bytes(&self) -> u32 {
        ops::ring_bytes(self.device.shared_bytes())
    }

    /// A grid over `n` values, each thread taking several.
    fn elementwise(&self, n: usize) -> Grid {
        let blocks = n.div_ceil(ROW_THREADS as usize).min(8 * self.device.n_multiprocessors() as usize);
        Grid { blocks: (blocks as u32, 1, 1), threads: ROW_THREADS, shared_bytes: 0 }
    }

    /// Normalizes activations, where they are to be: into `out` as f32, or rounded into their buffer's BF16 form.
    fn normalize(&self, x: &Activations<'_>, out: Option<&mut CudaSlice<f32>>) -> Result<()> {
        let (weight, eps) = x.norm();
        let (out, narrow, rest) = match out {
            Some(out) => (address_mut(out), NONE, NONE),
            None if x.is_exact() => (NONE, address(&x.buffer.narrow), address(&x.buffer.rest)),
            None => (NONE, address(&x.buffer.narrow), NONE),
        };
        let (n_cols, stride) = (x.n_cols() as u32, x.stride() as u32);
        let params = ops::Normalize { x: x.address(), weight, out, narrow, rest, eps, n_cols, stride };
        let grid = Grid { blocks: (x.n_tokens as u32, 1, 1), threads: 4 * ROW_THREADS, shared_bytes: 0 };
        // SAFETY: the buffer has a row of either form for each token, and so has `out`.
        unsafe { self.device.launch(&self.kernels.normalize, grid, &params) }
    }

    /// Any number of products of one input.
    fn products(&self, x: Activations<'_>, products: &mut [Projection<'_, Self>]) -> Result<()> {
        assert!(products.iter().all(|p| p.matrix.n_cols() == x.n_cols()), "a product's input has the matrix's width");
        let mut dense = Vec::new();
        let mut encoded = Vec::new();
        let mut zstd = Vec::new();
        for product in products {
            match &product.matrix.0 {
                Storage::Dense(matrix) => dense.push((matrix, product)),
                Storage::Encoded(matrix) => encoded.push((&**matrix, product)),
                Storage::Zstd(matrix) => zstd.push((&**matrix, product)),
            }
        }
        let blas = self.blas.as_ref().filter(|_| x.n_tokens > 1);
        if blas.is_some() && (!dense.is_empty() || !zstd.is_empty() || x.n_tokens > PRODUCT_TOKENS) {
            self.normalize(&x, None)?;
        }
        match blas {
            Some(blas) => {
                for (matrix, product) in dense {
                    self.many(blas, &x, address(&matrix.data), matrix.stride, product)?;
                }
            }
            None => {
                let rows: Vec<_> = dense.into_iter().map(|(matrix, p)| rows(address(&matrix.data), p)).collect();
                for rows in rows.chunks(ops::MAX_PRODUCTS) {
                    self.matvec(&self.kernels.matvec_dense, &x, rows)?;
                }
            }
        }
        for (matrix, product) in zstd {
            let decoded = &mut self.scratch().decoded;
            let stride = self.decode_zstd(matrix, decoded)?;
            match blas {
                Some(blas) => self.many(blas, &x, address(decoded), stride, product)?,
                None => self.matvec(&self.kernels.matvec_dense, &x, &[rows(address(decoded), product)])?,
            }
        }
        if encoded.is_empty() {
            return Ok(());
        }
        if x.n_tokens <= PRODUCT_TOKENS {
            return self.encoded_products(&x, encoded);
        }
        let Some(blas) = blas else {
            return Err(Error::device(format!(
                "prompts of more than {PRODUCT_TOKENS} tokens need cuBLAS where weights are encoded; install the CUDA \
                 toolkit's libcublas.so, or use --device cpu"
            )));
        };
        for (matrix, product) in encoded {
            let decoded = &mut self.scratch().decoded;
            self.decode(matrix, decoded)?;
            self.many(blas, &x, address(decoded), matrix.n_cols(), product)?;
        }
        Ok(())
    }

    /// The product of many tokens, whose BF16 form is at hand, by `weights`, `[n_rows, stride]`.
    fn many(
        &self,
        blas: &Blas,
        x: &Activations<'_>,
        weights: CUdeviceptr,
        stride: usize,
        product: &mut Projection<'_, Self>,
    ) -> Result<()> {
        let rows = rows(weights, product);
        let mut gemm = Gemm {
            matrix: weights,
            matrix_stride: stride,
            n_rows: product.matrix.n_rows(),
            n_cols: product.matrix.n_cols(),
            x: address(&x.buffer.narrow),
            x_stride: x.stride(),
            n_tokens: x.n_tokens,
            out: rows.out,
            adds: product.adds,
        };
        // SAFETY: matrix, input and output have the sizes that are given; all lie on the device's stream.
        unsafe { blas.product(&gemm)? };
        if x.is_exact() {
            (gemm.x, gemm.adds) = (address(&x.buffer.rest), true);
            // SAFETY: as above.
            unsafe { blas.product(&gemm)? };
        }
        if rows.bias != NONE {
            let params = ops::AddBias { out: rows.out, bias: rows.bias, n_rows: rows.n_rows };
            let grid = Grid { blocks: (x.n_tokens as u32, 1, 1), threads: ROW_THREADS, shared_bytes: 0 };
            // SAFETY: the output has a row for each token; the bias has a value for each of its columns.
            unsafe { self.device.launch(&self.kernels.add_bias, grid, &params)? };
        }
        Ok(())
    }

    /// Up to [`ops::MAX_PRODUCTS`] products in one launch, token by token.
    fn matvec(&self, kernel: &CudaFunction, x: &Activations<'_>, rows: &[Rows]) -> Result<()> {
        let (norm, eps) = x.norm();
        let (n_cols, stride) = (x.n_cols() as u32, x.stride() as u32);
        let mut params = ops::Matvec { x: x.address(), norm, products: Default::default(), eps, n_cols, stride };
        params.products[..rows.len()].copy_from_slice(rows);
        let blocks = (self.device.n_multiprocessors(), x.n_tokens as u32, 1);
        let grid = Grid { blocks, threads: ops::MATVEC_THREADS, shared_bytes: self.ring_bytes() + 4 * stride };
        // SAFETY: matrices and vectors have the rows and columns that are given (checked by the callers), and the shared
        // memory, which `matrix` bounded, holds the activations of a token.
        unsafe { self.device.launch(kernel, grid, &params) }
    }

    /// Decodes a matrix into `decoded`, which grows where it has to.
    fn decode(&self, matrix: &EncodedMatrix, decoded: &mut CudaSlice<bf16>) -> Result<()> {
        self.grow_decoded(matrix.n_rows() * matrix.n_cols(), decoded)?;
        self.encoded.decode(&self.device, &mut [(matrix, decoded)])
    }

    fn grow_decoded(&self, len: usize, decoded: &mut CudaSlice<bf16>) -> Result<()> {
        if decoded.len() < len {
            // SAFETY: every element is written before it is read.
            *decoded = unsafe { self.device.stream().alloc(len) }.map_err(|e| self.device.out_of_memory(e, 2 * len))?;
        }
        Ok(())
    }

    /// The same for a matrix of coder `zstd`, in rows of as many elements as are returned.
    fn decode_zstd(&self, matrix: &ZstdMatrix, decoded: &mut CudaSlice<bf16>) -> Result<usize> {
        let stride = matrix.n_cols().next_multiple_of(ROW_ALIGN);
        self.grow_decoded(matrix.n_rows() * stride, decoded)?;
        match &mut *self.zstd() {
            Some(zstd) => zstd.decode(&self.device, matrix, decoded, stride)?,
            None => return Err(Error::device("a matrix of coder `zstd` is another backend's")),
        }
        Ok(stride)
    }

    fn zstd(&self) -> MutexGuard<'_, Option<Zstd>> {
        self.zstd.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Checks that the product of one token has room for the activations of a matrix's columns.
    fn check_cols(&self, n_cols: usize) -> Result<()> {
        let room = self.dense_cols();
        if n_cols.next_multiple_of(ROW_ALIGN) > room {
            return Err(Error::unsupported(
                "--device cuda",
                format!("a matrix has {n_cols} columns; this GPU's shared memory has room for {room}"),
            ));
        }
        Ok(())
    }

    /// What products straight from the compressed blocks read, up to sixteen tokens. One token's norm is part of them.
    fn encoded_input<'a>(
        &self,
        x: &Activations<'a>,
        normed: &'a mut CudaSlice<f32>,
    ) -> Result<encoded::Activations<'a>> {
        let n_tokens = x.n_tokens;
        if x.norm.is_some() && n_tokens > 1 {
            self.normalize(x, Some(normed))?;
            return Ok(encoded::Activations { data: normed, first: 0, n_tokens, norm: None });
        }
        let norm = x.norm.map(|norm| (&norm.weight.0, norm.eps));
        Ok(encoded::Activations { data: &x.buffer.data, first: x.first, n_tokens, norm })
    }

    /// Products of up to sixteen tokens, straight from the compressed blocks.
    fn encoded_products(
        &self,
        x: &Activations<'_>,
        products: Vec<(&EncodedMatrix, &mut Projection<'_, Self>)>,
    ) -> Result<()> {
        let Scratch { operand, normed, .. } = &mut *self.scratch();
        let x = self.encoded_input(x, normed)?;
        let mut products: Vec<_> = products.into_iter().map(|(matrix, p)| encoded_product(matrix, p)).collect();
        self.encoded.product(&self.device, operand, x, &mut products)
    }
}

fn encoded_product<'a>(
    matrix: &'a EncodedMatrix,
    product: &'a mut Projection<'_, CudaBackend>,
) -> encoded::Product<'a> {
    let bias = product.bias.map(|bias| &bias.0);
    encoded::Product { matrix, bias, out: &mut product.out.data, adds: product.adds }
}

impl Backend for CudaBackend {
    type Matrix = Matrix;
    type Vector = Vector;
    type Buffer = Buffer;
    type Batch = Batch;
    type Cache = Cache;
    type Recording = Recording;

    const CHUNK: usize = 2048;

    fn matrix(&self, weight: Weight) -> Result<Matrix> {
        let (n_rows, n_cols, data) = match weight {
            Weight::Dense { element: DenseType::Bf16, n_rows, n_cols, data } => (n_rows, n_cols, data),
            Weight::Dense { element, .. } => {
                return Err(Error::unsupported(
                    "--device cuda",
                    format!(
                        "the weights are {element:?}; plain ones have to be BF16 on a GPU. Compress the model first"
                    ),
                ));
            }
            Weight::Encoded(tensor) if tensor.coder() == Coder::Zstd => {
                self.check_cols(tensor.n_cols())?;
                let zstd = &mut *self.zstd();
                let zstd = match zstd {
                    Some(zstd) => zstd,
                    none => none.insert(Zstd::new(&self.device)?),
                };
                let matrix = zstd.matrix(&self.device, &tensor)?;
                let len = matrix.n_rows() * matrix.n_cols().next_multiple_of(ROW_ALIGN);
                self.grow_decoded(len, &mut self.scratch().decoded)?;
                return Ok(Matrix(Storage::Zstd(Box::new(matrix))));
            }
            Weight::Encoded(tensor) => {
                let matrix = EncodedMatrix::upload(&self.device, &self.encoded, &mut self.upload(), &tensor)?;
                self.scratch().grow(self, matrix.n_cols())?;
                return Ok(Matrix(Storage::Encoded(Box::new(matrix))));
            }
        };
        let stride = n_cols.next_multiple_of(ROW_ALIGN);
        self.check_cols(n_cols)?;
        let mut to = self.device.zeros::<bf16>(n_rows * stride)?;
        // SAFETY: the allocation has n_rows rows of `stride` weights.
        unsafe { self.upload().copy(&self.device, &data, address_mut(&mut to), 2 * n_cols, 2 * stride)? };
        Ok(Matrix(Storage::Dense(Dense { data: to, n_rows, n_cols, stride })))
    }

    fn vector(&self, values: Vec<f32>) -> Result<Vector> {
        let bytes = 4 * values.len();
        Ok(Vector(self.device.stream().clone_htod(&values).map_err(|e| self.device.out_of_memory(e, bytes))?))
    }

    fn buffer(&self, n_tokens: usize, width: usize) -> Result<Buffer> {
        let BufferSizes { data, narrow, rest } = BufferSizes::new(n_tokens, width);
        Ok(Buffer {
            data: self.device.zeros(data)?,
            narrow: self.device.zeros(narrow)?,
            rest: self.device.zeros(rest)?,
            width,
        })
    }

    fn cache(&self, shape: CacheShape) -> Result<Cache> {
        let head_dim = shape.head_dim;
        if !ops::CACHED_DIMS.contains(&cached_dim(&shape)) {
            let most = ops::CACHED_DIMS[3];
            return Err(Error::unsupported(
                "--device cuda",
                format!("attention heads have {head_dim} elements; the GPU's kernels take up to {most}"),
            ));
        }
        let CacheSizes { values, n_shares, partial, done } = CacheSizes::new(&self.device, &shape);
        Ok(Cache {
            shape,
            keys: self.device.zeros(values)?,
            values: self.device.zeros(values)?,
            n_shares: n_shares as u32,
            partial: self.device.zeros(partial)?,
            done: self.device.zeros(done)?,
        })
    }

    fn batch(&self, n_tokens: usize, inverse_frequencies: &[f32]) -> Result<Batch> {
        Ok(Batch {
            step_host: Pinned::new(&self.device, 4 * (1 + n_tokens))?,
            position: self.device.zeros(1)?,
            tokens: self.device.zeros(n_tokens)?,
            n_tokens: 0,
            inverse_frequencies: self.vector(inverse_frequencies.to_vec())?.0,
            choice_host: Pinned::new(&self.device, 8)?,
            best: self.device.zeros(1)?,
            done: self.device.zeros(1)?,
            draw: DrawState::new(&self.device)?,
        })
    }

    fn matrix_bytes(&self, matrix: &Matrix) -> u64 {
        match &matrix.0 {
            Storage::Dense(dense) => dense.data.num_bytes() as u64,
            Storage::Encoded(encoded) => encoded.bytes(),
            Storage::Zstd(zstd) => zstd.bytes(),
        }
    }

    fn begin(&self, batch: &mut Batch, tokens: &[u32], first_position: usize) -> Result<()> {
        // The step before may not have read its tokens yet.
        self.device.synchronize()?;
        let words = std::iter::once(first_position as u32).chain(tokens.iter().copied());
        for (to, word) in batch.step_host.bytes_mut().as_chunks_mut::<4>().0.iter_mut().zip(words) {
            *to = word.to_ne_bytes();
        }
        batch.n_tokens = tokens.len();
        Ok(())
    }

    fn run(&self, recording: Option<&mut Recording>, mut pass: impl FnMut() -> Result<()> + Send) -> Result<()> {
        // nvCOMP does not promise that its calls can be recorded.
        let recording = recording.filter(|_| self.zstd().is_none());
        let Some(recording) = recording else { return pass() };
        // Another thread of the process can invalidate a recording that it has nothing to do with, by loading code, say. Then it is made anew.
        let mut retries = 3;
        if recording.0.is_none() {
            let graph = loop {
                let stream = self.device.stream();
                let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
                stream.begin_capture(mode).map_err(failed("recording a step"))?;
                let issued = pass();
                let graph = stream.end_capture(CUgraphInstantiate_flags(0));
                let invalidated = |e: &DriverError| e.0 == CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
                if retries == 0 || !graph.as_ref().is_err_and(invalidated) {
                    issued?;
                    break graph.map_err(failed("recording a step"))?;
                }
                retries -= 1;
            };
            recording.0 = graph.map(Graph);
        }
        let Some(graph) = &recording.0 else { return Err(Error::device("a step recorded nothing")) };
        graph.0.launch().map_err(failed("running a step"))
    }

    fn embed(&self, batch: &Batch, table: &Matrix, out: &mut Buffer) -> Result<()> {
        let n_tokens = batch.n_tokens as u32;
        let (position, tokens) = (address(&batch.position), address(&batch.tokens));
        let params = ops::BeginStep { step_host: batch.step_host.address(), position, tokens, n_tokens };
        let grid = Grid { blocks: (1, 1, 1), threads: ROW_THREADS, shared_bytes: 0 };
        // SAFETY: both sides have room for the position and the batch's tokens.
        unsafe { self.device.launch(&self.kernels.begin_step, grid, &params)? };

        let mut scratch;
        let (table, stride) = match &table.0 {
            Storage::Dense(table) => (address(&table.data), table.stride),
            Storage::Zstd(table) => {
                scratch = self.scratch();
                let stride = self.decode_zstd(table, &mut scratch.decoded)?;
                (address(&scratch.decoded), stride)
            }
            Storage::Encoded(table) => {
                let n_tokens = batch.n_tokens;
                return self.encoded.gather_rows(&self.device, table, &batch.tokens, n_tokens, &mut out.data);
            }
        };
        let params = ops::EmbedDense {
            tokens,
            table,
            out: address_mut(&mut out.data),
            n_cols: out.width as u32,
            stride: stride as u32,
        };
        let grid = Grid { blocks: (n_tokens, 1, 1), threads: ROW_THREADS, shared_bytes: 0 };
        // SAFETY: the model checked that the table has a row for each token; the output has one for each, too.
        unsafe { self.device.launch(&self.kernels.embed_dense, grid, &params) }
    }

    fn project(&self, batch: &Batch, x: Input<'_, Self>, products: &mut [Projection<'_, Self>]) -> Result<()> {
        self.products(Activations::new(x, 0, batch.n_tokens), products)
    }

    fn project_gated(
        &self,
        batch: &Batch,
        x: Input<'_, Self>,
        gate: Projection<'_, Self>,
        up: Projection<'_, Self>,
    ) -> Result<()> {
        let x = Activations::new(x, 0, batch.n_tokens);
        let mut products = [gate, up];
        if let ([Storage::Dense(gate), Storage::Dense(up)], 1) = (products.each_ref().map(|p| &p.matrix.0), x.n_tokens)
        {
            let weights = [address(&gate.data), address(&up.data)];
            let [gate, up] = &mut products;
            return self.matvec(&self.kernels.matvec_gated, &x, &[rows(weights[0], gate), rows(weights[1], up)]);
        }
        if let ([Storage::Encoded(gate_matrix), Storage::Encoded(up_matrix)], 1..=PRODUCT_TOKENS) =
            (products.each_ref().map(|p| &p.matrix.0), x.n_tokens)
        {
            let [gate, up] = &mut products;
            let Scratch { operand, normed, .. } = &mut *self.scratch();
            let input = self.encoded_input(&x, normed)?;
            let pair = &mut [encoded_product(gate_matrix, gate), encoded_product(up_matrix, up)];
            if self.encoded.gated_product(&self.device, operand, input, pair)? {
                return Ok(());
            }
        }
        self.products(x, &mut products)?;
        let [gate, up] = products;
        let n = batch.n_tokens * gate.matrix.n_rows();
        let params = ops::SiluMul { gate: address_mut(&mut gate.out.data), up: address(&up.out.data), n: n as u64 };
        // SAFETY: both buffers have n values.
        unsafe { self.device.launch(&self.kernels.silu_mul, self.elementwise(n), &params) }
    }

    fn attend(&self, batch: &Batch, heads: Attention<'_, Self>, cache: &mut Cache, out: &mut Buffer) -> Result<()> {
        let CacheShape { capacity, n_heads, n_kv_heads, head_dim } = cache.shape;
        let cached_dim = cached_dim(&cache.shape);
        let n_tokens = batch.n_tokens as u32;
        let norm = |norm: Option<Norm<'_, Self>>| norm.map_or((NONE, 0.0), |n| (address(&n.weight.0), n.eps));
        let (query_norm, query_eps) = norm(heads.head_norms.map(|norms| norms.0));
        let (key_norm, key_eps) = norm(heads.head_norms.map(|norms| norms.1));
        let first_position = address(&batch.position);
        let q = address_mut(&mut heads.q.data);
        let (keys, values) = (address_mut(&mut cache.keys), address_mut(&mut cache.values));
        let params = ops::Heads {
            first_position,
            q,
            k: address(&heads.k.data),
            v: address(&heads.v.data),
            keys,
            values,
            inverse_frequencies: address(&batch.inverse_frequencies),
            query_norm,
            key_norm,
            query_eps,
            key_eps,
            n_heads: n_heads as u32,
            n_kv_heads: n_kv_heads as u32,
            head_dim: head_dim as u32,
            cached_dim: cached_dim as u32,
            capacity: capacity as u32,
        };
        let window = heads.window.map_or(0, |window| window.min(capacity) as u32);
        let n_blocks = head_blocks(&cache.shape) as u32;
        let out = address_mut(&mut out.data);
        if n_tokens == 1 {
            let (partial, done) = (address_mut(&mut cache.partial), address_mut(&mut cache.done));
            let params = ops::AttendOne { heads: params, out, partial, done, window };
            let shared_bytes = ops::one_bytes(cached_dim);
            let grid = Grid { blocks: (n_blocks, cache.n_shares, 1), threads: ops::ONE_THREADS, shared_bytes };
            let which = ops::CACHED_DIMS.iter().position(|&dim| dim == cached_dim).unwrap_or(0);
            // SAFETY: the buffers have a row of heads; the model checked that the cache has its position; what the
            // blocks share was made for so many of them.
            return unsafe { self.device.launch(&self.kernels.attend_one[which], grid, &params) };
        }
        let warps = (n_heads + 2 * n_kv_heads) as u32;
        let grid =
            Grid { blocks: (warps.div_ceil(ROW_THREADS / 32), n_tokens, 1), threads: ROW_THREADS, shared_bytes: 0 };
        // SAFETY: the buffers have a row of heads for each token; the model checked that the cache has its position.
        unsafe { self.device.launch(&self.kernels.place_heads, grid, &params)? };

        let params = ops::Attend {
            first_position,
            q,
            keys,
            values,
            out,
            n_heads: n_heads as u32,
            n_kv_heads: n_kv_heads as u32,
            head_dim: head_dim as u32,
            cached_dim: cached_dim as u32,
            capacity: capacity as u32,
            window,
        };
        let kernel = match head_dim {
            64 => &self.kernels.attend_64,
            128 => &self.kernels.attend_128,
            _ => &self.kernels.attend_any,
        };
        let grid = Grid {
            blocks: (n_blocks, 1, n_tokens),
            threads: ops::ATTEND_THREADS,
            shared_bytes: (4 * ops::TILE_HEADS * cached_dim) as u32,
        };
        // SAFETY: as above.
        unsafe { self.device.launch(kernel, grid, &params) }
    }

    fn logits(&self, batch: &Batch, x: Input<'_, Self>, head: &Matrix, want: Logits, out: &mut Buffer) -> Result<()> {
        let first = match want {
            Logits::Last => batch.n_tokens - 1,
            Logits::All => 0,
        };
        let product = Projection { matrix: head, bias: None, out, adds: false };
        self.products(Activations::new(x, first, batch.n_tokens - first), &mut [product])
    }

    fn choose(&self, batch: &Batch, logits: &Buffer) -> Result<()> {
        let params = ops::Choose {
            logits: address(&logits.data),
            best: address(&batch.best),
            done: address(&batch.done),
            choice_host: batch.choice_host.address(),
            vocab: logits.width as u32,
        };
        let grid = Grid { blocks: (CHOOSE_BLOCKS, 1, 1), threads: ROW_THREADS, shared_bytes: 0 };
        // SAFETY: the buffer has a row of logits; best and done are the batch's own.
        unsafe { self.device.launch(&self.kernels.choose, grid, &params) }
    }

    fn likeliest(&self, batch: &Batch, _: &Buffer) -> Result<u32> {
        self.device.synchronize()?;
        let (token, logit) = (batch.choice_host.word(0), f32::from_bits(batch.choice_host.word(1)));
        if logit.is_nan() { Err(sampler::not_a_number(token)) } else { Ok(token) }
    }

    /// The host waits for the token alone. It waited for the one before, too, so that no launch reads what this one's are given.
    fn sample(&self, batch: &mut Batch, logits: &mut Buffer, draw: &Draw) -> Result<u32> {
        let Batch { draw: state, choice_host, .. } = &mut *batch;
        self.sample.issue(&self.device, state, &logits.data, logits.width, choice_host, draw)?;
        self.likeliest(batch, logits)
    }

    fn write(&self, buffer: &mut Buffer, values: &[f32]) -> Result<()> {
        let stream = self.device.stream();
        stream
            .memcpy_htod(values, &mut buffer.data.slice_mut(..values.len()))
            .map_err(failed("copying activations"))?;
        self.device.synchronize()
    }

    fn read(&self, buffer: &Buffer, out: &mut [f32]) -> Result<()> {
        let stream = self.device.stream();
        stream.memcpy_dtoh(&buffer.data.slice(..out.len()), out).map_err(failed("copying logits"))?;
        self.device.synchronize()
    }
}

impl DeviceMemory for CudaBackend {
    /// None where a row would not begin at a multiple of 16 bytes, or has more columns than plain matrices may have.
    fn decoded_form(&self, matrix: &Matrix) -> Option<DecodedForm> {
        let n_cols = matrix.n_cols();
        let bytes = 2 * (matrix.n_rows() * n_cols.next_multiple_of(ROW_ALIGN)) as u64;
        match &matrix.0 {
            Storage::Dense(_) => None,
            Storage::Encoded(encoded) => (n_cols.is_multiple_of(ROW_ALIGN) && n_cols <= self.dense_cols())
                .then(|| DecodedForm { bytes, is_lossless: encoded.is_lossless(), fused_tokens: PRODUCT_TOKENS }),
            Storage::Zstd(zstd) => Some(DecodedForm { bytes, is_lossless: zstd.is_lossless(), fused_tokens: 0 }),
        }
    }

    fn keep_decoded(&self, matrix: &mut Matrix) -> Result<()> {
        assert!(self.decoded_form(matrix).is_some(), "a matrix without a decoded form is not decoded");
        let (n_rows, n_cols) = (matrix.n_rows(), matrix.n_cols());
        let mut data = self.device.zeros::<bf16>(0)?;
        let stride = match &matrix.0 {
            Storage::Dense(_) => return Ok(()),
            Storage::Encoded(encoded) => self.decode(encoded, &mut data).map(|()| n_cols)?,
            Storage::Zstd(zstd) => self.decode_zstd(zstd, &mut data)?,
        };
        // The encoded form's memory is given back in the stream's order, so after the decoder.
        matrix.0 = Storage::Dense(Dense { data, n_rows, n_cols, stride });
        Ok(())
    }

    fn buffer_bytes(&self, n_tokens: usize, width: usize) -> u64 {
        let BufferSizes { data, narrow, rest } = BufferSizes::new(n_tokens, width);
        (4 * data + 2 * (narrow + rest)) as u64
    }

    fn cache_bytes(&self, shape: CacheShape) -> u64 {
        let CacheSizes { values, partial, done, .. } = CacheSizes::new(&self.device, &shape);
        (2 * 2 * values + 4 * (partial + done)) as u64
    }

    fn working_bytes(&self) -> u64 {
        let Scratch { operand, normed, decoded, .. } = &*self.scratch();
        let scratch = (operand.n_bytes() + normed.num_bytes() + decoded.num_bytes()) as u64;
        let zstd = self.zstd().as_ref().map_or(0, Zstd::bytes);
        self.encoded.n_bytes() + scratch + zstd + if self.has_blas() { BLAS_BYTES } else { 0 }
    }
}

/// Elements of what a [`Buffer`] holds.
struct BufferSizes {
    data: usize,
    narrow: usize,
    rest: usize,
}

impl BufferSizes {
    fn new(n_tokens: usize, width: usize) -> Self {
        let stride = width.next_multiple_of(ROW_ALIGN);
        let n_narrow = if n_tokens > 1 { n_tokens } else { 0 };
        Self { data: n_tokens * width, narrow: n_narrow * stride, rest: n_narrow.min(PRODUCT_TOKENS) * stride }
    }
}

/// Elements of what a [`Cache`] holds.
struct CacheSizes {
    /// Of the keys, and of the values.
    values: usize,
    n_shares: usize,
    partial: usize,
    done: usize,
}

impl CacheSizes {
    fn new(device: &Device, shape: &CacheShape) -> Self {
        let &CacheShape { capacity, n_heads, n_kv_heads, .. } = shape;
        let (cached_dim, n_blocks) = (cached_dim(shape), head_blocks(shape));
        let n_shares = capacity.div_ceil(ops::ONE_TILE);
        let n_shares = n_shares.min(2 * device.n_multiprocessors() as usize / n_blocks).max(1);
        let partial = n_heads * n_shares * (cached_dim + 2);
        Self { values: n_kv_heads * capacity * cached_dim, n_shares, partial, done: n_blocks }
    }
}

/// Elements of a head in the cache.
fn cached_dim(shape: &CacheShape) -> usize {
    shape.head_dim.next_power_of_two().max(ops::CACHED_DIMS[0])
}

/// Blocks of attention for each token: each takes up to `TILE_HEADS` query heads of one key head.
fn head_blocks(shape: &CacheShape) -> usize {
    shape.n_kv_heads * (shape.n_heads / shape.n_kv_heads).div_ceil(ops::TILE_HEADS)
}
