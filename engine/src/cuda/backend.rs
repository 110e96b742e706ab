//! The operations of the forward pass on a GPU.
//!
//! A step of one token is recorded as a CUDA graph and replayed: what changes from token to token (the token and its
//! position) is read from memory that [`Backend::begin`] writes. Its products read the weights once, encoded or not, with the norm before
//! them and the sum after them in the same kernel. Those of more tokens are cuBLAS's where weights are plain or lossless, of activations
//! rounded to BF16: so a lossless archive yields what its source does. Other encoded matrices are multiplied as they are up to 16 tokens. For cuBLAS
//! encoded matrices are decoded, ahead of the products, into memory that all of them share; without cuBLAS tokens go one by one, or 16 by 16.

use super::ahead::Ahead;
use super::blas::{Blas, Gemm};
use super::device::{Device, Grid, failed};
use super::encoded::{self, DeviceMatrix, EncodedKernels, OperandBuffer, PLAIN_ALIGN, PRODUCT_TOKENS, plain_len};
use super::host::{Pinned, Upload};
use super::ops::{self, Kernels, NONE};
use super::sample::{DrawState, SampleKernels};
use super::zstd::{Zstd, ZstdMatrix};
use crate::backend::{Attention, Backend, CacheShape, DecodedForm, DeviceMemory, Input, Logits, Norm, Projection};
use crate::error::{Error, Result};
use crate::sampler::{self, Draw};
use crate::weights::{DenseType, Weight};
use codecllm_codec::Coder;
use cudarc::driver::sys::{CUdeviceptr, CUgraphInstantiate_flags, CUresult, CUstreamCaptureMode};
use cudarc::driver::{CudaGraph, CudaSlice, DevicePtr, DevicePtrMut, DriverError};
use half::bf16;
use std::sync::{Arc, Mutex, MutexGuard};

#[cfg(test)]
mod tests;

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
    /// Decoded matrices.
    ahead: Ahead,
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
            ahead: Ahead::new(&device)?,
        });
        Ok(Self { device, kernels, sample, blas, upload, encoded, scratch, zstd: Mutex::new(None) })
    }

    /// The GPU.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Whether cuBLAS was found. Without it, prompts take several times as long.
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
    Dense(Box<Dense>),
    Encoded(Arc<DeviceMatrix>),
    Zstd(Box<ZstdMatrix>),
}

/// A plain matrix with its memory.
struct Dense {
    matrix: DeviceMatrix,
    data: CudaSlice<bf16>,
}

impl Dense {
    /// Where it lies, and elements between its rows.
    fn place(&self) -> (CUdeviceptr, usize) {
        (address(&self.data), self.matrix.n_cols().next_multiple_of(PLAIN_ALIGN))
    }
}

impl Matrix {
    /// What is multiplied as it is.
    fn fused(&self) -> Option<&DeviceMatrix> {
        match &self.0 {
            Storage::Dense(dense) => Some(&dense.matrix),
            Storage::Encoded(encoded) => Some(encoded),
            Storage::Zstd(_) => None,
        }
    }

    /// What is decoded for cuBLAS.
    fn encoded(&self) -> Option<&Arc<DeviceMatrix>> {
        match &self.0 {
            Storage::Encoded(encoded) => Some(encoded),
            Storage::Dense(_) | Storage::Zstd(_) => None,
        }
    }

    fn n_rows(&self) -> usize {
        match &self.0 {
            Storage::Zstd(zstd) => zstd.n_rows(),
            Storage::Dense(dense) => dense.matrix.n_rows(),
            Storage::Encoded(matrix) => matrix.n_rows(),
        }
    }

    fn n_cols(&self) -> usize {
        match &self.0 {
            Storage::Zstd(zstd) => zstd.n_cols(),
            Storage::Dense(dense) => dense.matrix.n_cols(),
            Storage::Encoded(matrix) => matrix.n_cols(),
        }
    }
}

/// f32 values in the GPU's memory.
pub struct Vector(CudaSlice<f32>);

/// Activations: `[capacity, width]`.
pub struct Buffer {
    data: CudaSlice<f32>,
    /// The same rounded to BF16, `[capacity, width padded]`, while it is the input of a product by cuBLAS. Empty where there is
    /// one token at most.
    narrow: CudaSlice<u16>,
    /// Whether that is all there is: see [`CudaBackend::narrows`].
    is_narrow: bool,
    width: usize,
}

impl Buffer {
    /// Elements of a row of the BF16 form.
    fn stride(&self) -> usize {
        self.width.next_multiple_of(PLAIN_ALIGN)
    }
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
    /// So many of them are a cluster.
    cluster: u32,
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
        self.buffer.stride()
    }

    fn address(&self) -> CUdeviceptr {
        address(&self.buffer.data) + (4 * self.first * self.buffer.width) as CUdeviceptr
    }

    /// Where the norm's weight is and what keeps its root from zero.
    fn norm(&self) -> (CUdeviceptr, f32) {
        self.norm.map_or((NONE, 0.0), |norm| (address(&norm.weight.0), norm.eps))
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

    /// Whether all products of so many tokens are cuBLAS's. Then activations that nothing but products read need not be written but as BF16.
    fn narrows(&self, n_tokens: usize) -> bool {
        self.has_blas() && n_tokens > PRODUCT_TOKENS
    }

    /// Normalizes activations, where they are to be: into `out` as f32, or rounded into their buffer's BF16 form.
    fn normalize(&self, x: &Activations<'_>, out: Option<&mut CudaSlice<f32>>) -> Result<()> {
        let (weight, eps) = x.norm();
        let (out, narrow) = match out {
            Some(out) => (address_mut(out), NONE),
            None => (NONE, address(&x.buffer.narrow)),
        };
        let (n_cols, stride) = (x.n_cols() as u32, x.stride() as u32);
        let params = ops::Normalize { x: x.address(), weight, out, narrow, eps, n_cols, stride };
        let threads = n_cols.div_ceil(4).next_multiple_of(32).min(4 * ROW_THREADS);
        let grid = Grid { blocks: (x.n_tokens as u32, 1, 1), threads, shared_bytes: 0 };
        // SAFETY: the buffer has a row of either form for each token, and so has `out`.
        unsafe { self.device.launch(&self.kernels.normalize, grid, &params) }
    }

    /// Any number of products of one input.
    fn products(&self, x: Activations<'_>, products: &mut [Projection<'_, Self>]) -> Result<()> {
        assert!(products.iter().all(|p| p.matrix.n_cols() == x.n_cols()), "a product's input has the matrix's width");
        let blas = self.blas.as_ref().filter(|_| x.n_tokens > 1);
        let (mut plain, mut encoded, mut by_blas) = (Vec::new(), Vec::new(), Vec::new());
        for product in products {
            product.out.is_narrow = false;
            match (blas, &product.matrix.0) {
                (_, Storage::Encoded(matrix)) if blas.is_none() || x.n_tokens <= fused_tokens(matrix) => {
                    encoded.push((&**matrix, product));
                }
                (None, Storage::Dense(dense)) => plain.push((&dense.matrix, product)),
                (None, storage) => {
                    let mut scratch = self.scratch();
                    let (data, _) = self.dense(storage, scratch.ahead.clear()?)?;
                    let n_rows = product.matrix.n_rows();
                    let decoded = DeviceMatrix::plain(&self.encoded, data, n_rows, x.n_cols())?;
                    self.fused(&x, &mut scratch, &mut [(&decoded, product)], 1)?;
                }
                (Some(_), _) => by_blas.push(product),
            }
        }
        if let Some(blas) = blas.filter(|_| !by_blas.is_empty()) {
            self.by_blas(blas, &x, &mut by_blas)?;
        }
        for (mut fused, most) in [(plain, 1), (encoded, PRODUCT_TOKENS)] {
            if !fused.is_empty() {
                self.fused(&x, &mut self.scratch(), &mut fused, most)?;
            }
        }
        Ok(())
    }

    /// Products of many tokens.
    fn by_blas(&self, blas: &Blas, x: &Activations<'_>, products: &mut [&mut Projection<'_, Self>]) -> Result<()> {
        assert!(x.norm.is_none() || !x.buffer.is_narrow, "what is to be normalized is there as f32");
        if !x.buffer.is_narrow {
            self.normalize(x, None)?;
        }
        // Held until the products are issued: they read what is decoded here.
        let mut scratch = self.scratch();
        let ahead = &mut scratch.ahead;
        for product in products {
            let storage = &product.matrix.0;
            if let Storage::Encoded(matrix) = storage {
                let weights = ahead.place(&self.device, &self.encoded, matrix)?;
                self.many(blas, x, weights, matrix.n_cols(), product)?;
                ahead.done(&self.device, &self.encoded, matrix)?;
            } else {
                let (weights, stride) = match storage {
                    Storage::Dense(dense) => dense.place(),
                    _ => self.dense(storage, ahead.clear()?)?,
                };
                self.many(blas, x, weights, stride, product)?;
            }
        }
        Ok(())
    }

    /// Where a matrix lies as BF16, in `decoded` unless it is plain, and elements between its rows.
    fn dense(&self, storage: &Storage, decoded: &mut CudaSlice<bf16>) -> Result<(CUdeviceptr, usize)> {
        match storage {
            Storage::Dense(dense) => Ok(dense.place()),
            Storage::Encoded(matrix) => {
                self.decode(matrix, decoded)?;
                Ok((address(decoded), matrix.n_cols()))
            }
            Storage::Zstd(matrix) => {
                let stride = self.decode_zstd(matrix, decoded)?;
                Ok((address(decoded), stride))
            }
        }
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
        let (out, n_rows) = (address_mut(&mut product.out.data), product.matrix.n_rows());
        let gemm = Gemm {
            matrix: weights,
            matrix_stride: stride,
            n_rows,
            n_cols: product.matrix.n_cols(),
            x: address(&x.buffer.narrow),
            x_stride: x.stride(),
            n_tokens: x.n_tokens,
            out,
            adds: product.adds,
        };
        // SAFETY: matrix, input and output have the sizes that are given; all lie on the device's stream.
        unsafe { blas.product(&gemm)? };
        if let Some(bias) = product.bias {
            let params = ops::AddBias { out, bias: address(&bias.0), n_rows: n_rows as u32 };
            let grid = Grid { blocks: (x.n_tokens as u32, 1, 1), threads: ROW_THREADS, shared_bytes: 0 };
            // SAFETY: the output has a row for each token; the bias has a value for each of its columns.
            unsafe { self.device.launch(&self.kernels.add_bias, grid, &params)? };
        }
        Ok(())
    }

    /// Decodes a matrix into `decoded`, which grows where it has to.
    fn decode(&self, matrix: &DeviceMatrix, decoded: &mut CudaSlice<bf16>) -> Result<()> {
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
        let stride = matrix.n_cols().next_multiple_of(PLAIN_ALIGN);
        self.grow_decoded(plain_len(matrix.n_rows(), matrix.n_cols()), decoded)?;
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
        let room = self.encoded.plain_cols();
        if n_cols > room {
            return Err(Error::unsupported(
                "--device cuda",
                format!("a matrix has {n_cols} columns; this GPU's shared memory has room for {room}"),
            ));
        }
        Ok(())
    }

    /// What fused products read, up to sixteen tokens. One token's norm is part of them.
    fn fused_input<'a>(&self, x: &Activations<'a>, normed: &'a mut CudaSlice<f32>) -> Result<encoded::Activations<'a>> {
        let n_tokens = x.n_tokens;
        assert!(!x.buffer.is_narrow, "what is not cuBLAS's to multiply is there as f32");
        if x.norm.is_some() && n_tokens > 1 {
            self.normalize(x, Some(normed))?;
            return Ok(encoded::Activations { data: normed, first: 0, n_tokens, norm: None });
        }
        let norm = x.norm.map(|norm| (&norm.weight.0, norm.eps));
        Ok(encoded::Activations { data: &x.buffer.data, first: x.first, n_tokens, norm })
    }

    /// Products of the matrices as they are, so many tokens at a time.
    fn fused(
        &self,
        x: &Activations<'_>,
        scratch: &mut Scratch,
        products: &mut [(&DeviceMatrix, &mut Projection<'_, Self>)],
        most: usize,
    ) -> Result<()> {
        let Scratch { operand, normed, .. } = scratch;
        for first in (0..x.n_tokens).step_by(most) {
            let n_tokens = most.min(x.n_tokens - first);
            let input = self.fused_input(&Activations { first: x.first + first, n_tokens, ..*x }, normed)?;
            let mut products: Vec<_> = products.iter_mut().map(|(m, p)| fused_product(m, p, first)).collect();
            self.encoded.product(&self.device, operand, input, &mut products)?;
        }
        Ok(())
    }
}

/// Tokens up to which products go straight from the matrix, where there is cuBLAS for more.
fn fused_tokens(matrix: &DeviceMatrix) -> usize {
    if matrix.is_lossless() { 1 } else { PRODUCT_TOKENS }
}

/// A product whose tokens from `first` on come next.
fn fused_product<'a>(
    matrix: &'a DeviceMatrix,
    product: &'a mut Projection<'_, CudaBackend>,
    first: usize,
) -> encoded::Product<'a> {
    let bias = product.bias.map(|bias| &bias.0);
    encoded::Product { matrix, bias, out: &mut product.out.data, first, adds: product.adds }
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
                let len = plain_len(matrix.n_rows(), matrix.n_cols());
                self.grow_decoded(len, self.scratch().ahead.clear()?)?;
                return Ok(Matrix(Storage::Zstd(Box::new(matrix))));
            }
            Weight::Encoded(tensor) => {
                let matrix = DeviceMatrix::upload(&self.device, &self.encoded, &mut self.upload(), &tensor)?;
                self.scratch().grow(self, matrix.n_cols())?;
                return Ok(Matrix(Storage::Encoded(Arc::new(matrix))));
            }
        };
        let stride = n_cols.next_multiple_of(PLAIN_ALIGN);
        self.check_cols(n_cols)?;
        let mut to = self.device.zeros::<bf16>(plain_len(n_rows, n_cols))?;
        // SAFETY: the allocation has n_rows rows of `stride` weights.
        unsafe { self.upload().copy(&self.device, &data, address_mut(&mut to), 2 * n_cols, 2 * stride)? };
        let matrix = DeviceMatrix::plain(&self.encoded, address(&to), n_rows, n_cols)?;
        Ok(Matrix(Storage::Dense(Box::new(Dense { matrix, data: to }))))
    }

    fn vector(&self, values: Vec<f32>) -> Result<Vector> {
        let bytes = 4 * values.len();
        Ok(Vector(self.device.stream().clone_htod(&values).map_err(|e| self.device.out_of_memory(e, bytes))?))
    }

    fn buffer(&self, n_tokens: usize, width: usize) -> Result<Buffer> {
        let BufferSizes { data, narrow } = BufferSizes::new(n_tokens, width);
        Ok(Buffer { data: self.device.zeros(data)?, narrow: self.device.zeros(narrow)?, is_narrow: false, width })
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
        let CacheSizes { values, n_shares, cluster, partial, done } = CacheSizes::new(&self.device, &shape);
        Ok(Cache {
            shape,
            keys: self.device.zeros(values)?,
            values: self.device.zeros(values)?,
            n_shares: n_shares as u32,
            cluster: cluster as u32,
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
            Storage::Dense(dense) => dense.matrix.bytes(),
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
        self.scratch().ahead.clear()?;
        Ok(())
    }

    fn prepare(&self, batch: &Batch, matrices: &[&Matrix]) -> Result<()> {
        if !self.has_blas() {
            return Ok(());
        }
        let wanted = matrices.iter().filter_map(|matrix| matrix.encoded()).filter(|m| batch.n_tokens > fused_tokens(m));
        self.scratch().ahead.expect(&self.device, &self.encoded, wanted.cloned())
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

        out.is_narrow = false;
        if let Storage::Encoded(table) = &table.0 {
            return self.encoded.gather_rows(&self.device, table, &batch.tokens, batch.n_tokens, &mut out.data);
        }
        let mut scratch = self.scratch();
        let (table, stride) = match &table.0 {
            Storage::Dense(dense) => dense.place(),
            storage => self.dense(storage, scratch.ahead.clear()?)?,
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
        if let [Some(gate_matrix), Some(up_matrix)] = products.each_ref().map(|p| p.matrix.fused())
            && x.n_tokens <= fused_tokens(gate_matrix).min(fused_tokens(up_matrix))
        {
            let [gate, up] = &mut products;
            let Scratch { operand, normed, .. } = &mut *self.scratch();
            let input = self.fused_input(&x, normed)?;
            gate.out.is_narrow = false;
            let pair = &mut [fused_product(gate_matrix, gate, 0), fused_product(up_matrix, up, 0)];
            if self.encoded.gated_product(&self.device, operand, input, pair)? {
                return Ok(());
            }
        }
        self.products(x, &mut products)?;
        let [gate, up] = products;
        let (out, n_tokens) = (gate.out, batch.n_tokens);
        out.is_narrow = self.narrows(n_tokens);
        let narrow = if out.is_narrow { address_mut(&mut out.narrow) } else { NONE };
        let (n_cols, stride) = (out.width as u32, out.stride() as u32);
        let params =
            ops::SiluMul { gate: address_mut(&mut out.data), up: address(&up.out.data), narrow, n_cols, stride };
        let n_blocks = out.width.div_ceil(4 * ops::SILU_QUADS * ROW_THREADS as usize) as u32;
        let grid = Grid { blocks: (n_blocks, n_tokens as u32, 1), threads: ROW_THREADS, shared_bytes: 0 };
        // SAFETY: both buffers have a row for each token, and the first one has its BF16 form.
        unsafe { self.device.launch(&self.kernels.silu_mul, grid, &params) }
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
            capacity: capacity as u32,
        };
        let window = heads.window.map_or(0, |window| window.min(capacity) as u32);
        let stride = out.stride() as u32;
        out.is_narrow = self.narrows(batch.n_tokens);
        let (narrow, out) = (out.is_narrow.then(|| address_mut(&mut out.narrow)), address_mut(&mut out.data));
        let which = ops::CACHED_DIMS.iter().position(|&dim| dim == cached_dim).unwrap_or(0);
        if n_tokens == 1 {
            let (partial, done) = (address_mut(&mut cache.partial), address_mut(&mut cache.done));
            let params = ops::AttendOne { heads: params, out, partial, done, window };
            let shared_bytes = ops::one_bytes(cached_dim);
            let n_blocks = head_blocks(&cache.shape) as u32;
            let grid = Grid { blocks: (n_blocks, cache.n_shares, 1), threads: ops::ONE_THREADS, shared_bytes };
            let (kernel, cluster) = (&self.kernels.attend_one[which], (1, cache.cluster));
            // SAFETY: the buffers have a row of heads; the model checked that the cache has its position; what the
            // blocks share was made for so many of them.
            return unsafe { self.device.launch_clusters(kernel, grid, cluster, &params) };
        }
        // A warp for each head, or fewer where all multiprocessors have enough to do.
        let most = ((n_heads + 2 * n_kv_heads) as u32).div_ceil(ROW_THREADS / 32);
        let n_blocks = (8 * self.device.n_multiprocessors()).div_ceil(n_tokens).min(most);
        let grid = Grid { blocks: (n_blocks, n_tokens, 1), threads: ROW_THREADS, shared_bytes: 0 };
        // SAFETY: the buffers have a row of heads for each token; the model checked that the cache has its position.
        unsafe { self.device.launch(&self.kernels.place_heads[which], grid, &params)? };

        let params = ops::Attend {
            first_position,
            q,
            keys,
            values,
            out: narrow.unwrap_or(out),
            n_tokens,
            n_heads: n_heads as u32,
            n_kv_heads: n_kv_heads as u32,
            head_dim: head_dim as u32,
            capacity: capacity as u32,
            window,
            stride: if narrow.is_some() { stride } else { (n_heads * head_dim) as u32 },
        };
        let grid = Grid {
            blocks: (n_heads as u32, n_tokens.div_ceil(ops::attend_tokens(cached_dim, narrow.is_some())), 1),
            threads: ops::ATTEND_THREADS,
            shared_bytes: ops::attend_bytes(cached_dim, narrow.is_some()),
        };
        let kernels = if narrow.is_some() { &self.kernels.attend_narrow } else { &self.kernels.attend };
        // SAFETY: as above.
        unsafe { self.device.launch(&kernels[which], grid, &params) }
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
        buffer.is_narrow = false;
        self.device.synchronize()
    }

    fn read(&self, buffer: &Buffer, out: &mut [f32]) -> Result<()> {
        let stream = self.device.stream();
        if !buffer.is_narrow {
            stream.memcpy_dtoh(&buffer.data.slice(..out.len()), out).map_err(failed("copying logits"))?;
            return self.device.synchronize();
        }
        let n_rows = out.len().div_ceil(buffer.width);
        let mut narrow = vec![0; n_rows * buffer.stride()];
        stream.memcpy_dtoh(&buffer.narrow.slice(..narrow.len()), &mut narrow).map_err(failed("copying activations"))?;
        self.device.synchronize()?;
        for (out, narrow) in out.chunks_mut(buffer.width).zip(narrow.chunks_exact(buffer.stride())) {
            out.iter_mut().zip(narrow).for_each(|(out, narrow)| *out = bf16::from_bits(*narrow).to_f32());
        }
        Ok(())
    }
}

impl DeviceMemory for CudaBackend {
    /// None where a row would not begin at a multiple of 16 bytes, or has more columns than plain matrices may have.
    fn decoded_form(&self, matrix: &Matrix) -> Option<DecodedForm> {
        let n_cols = matrix.n_cols();
        let bytes = 2 * plain_len(matrix.n_rows(), n_cols) as u64;
        match &matrix.0 {
            Storage::Dense(_) => None,
            Storage::Encoded(encoded) => (n_cols.is_multiple_of(PLAIN_ALIGN) && n_cols <= self.encoded.plain_cols())
                .then(|| DecodedForm {
                    bytes,
                    is_lossless: encoded.is_lossless(),
                    fused_tokens: if self.has_blas() { fused_tokens(encoded) } else { usize::MAX },
                }),
            Storage::Zstd(zstd) => Some(DecodedForm { bytes, is_lossless: zstd.is_lossless(), fused_tokens: 0 }),
        }
    }

    fn keep_decoded(&self, matrix: &mut Matrix) -> Result<()> {
        assert!(self.decoded_form(matrix).is_some(), "a matrix without a decoded form is not decoded");
        let (n_rows, n_cols) = (matrix.n_rows(), matrix.n_cols());
        let mut data = self.device.zeros::<bf16>(plain_len(n_rows, n_cols))?;
        self.dense(&matrix.0, &mut data)?;
        // The encoded form's memory is given back in the stream's order, so after the decoder.
        let plain = DeviceMatrix::plain(&self.encoded, address(&data), n_rows, n_cols)?;
        matrix.0 = Storage::Dense(Box::new(Dense { matrix: plain, data }));
        Ok(())
    }

    fn buffer_bytes(&self, n_tokens: usize, width: usize) -> u64 {
        let BufferSizes { data, narrow } = BufferSizes::new(n_tokens, width);
        (4 * data + 2 * narrow) as u64
    }

    fn cache_bytes(&self, shape: CacheShape) -> u64 {
        let CacheSizes { values, partial, done, .. } = CacheSizes::new(&self.device, &shape);
        (2 * 2 * values + 4 * (partial + done)) as u64
    }

    fn working_bytes(&self) -> u64 {
        let Scratch { operand, normed, ahead, .. } = &*self.scratch();
        let scratch = (operand.n_bytes() + normed.num_bytes() + ahead.n_bytes()) as u64;
        let zstd = self.zstd().as_ref().map_or(0, Zstd::bytes);
        self.encoded.n_bytes() + scratch + zstd + if self.has_blas() { BLAS_BYTES } else { 0 }
    }
}

/// Elements of what a [`Buffer`] holds.
struct BufferSizes {
    data: usize,
    narrow: usize,
}

impl BufferSizes {
    fn new(n_tokens: usize, width: usize) -> Self {
        let stride = width.next_multiple_of(PLAIN_ALIGN);
        let n_narrow = if n_tokens > 1 { n_tokens } else { 0 };
        Self { data: n_tokens * width, narrow: n_narrow * stride }
    }
}

/// Elements of what a [`Cache`] holds.
struct CacheSizes {
    /// Of the keys, and of the values.
    values: usize,
    n_shares: usize,
    cluster: usize,
    partial: usize,
    done: usize,
}

impl CacheSizes {
    fn new(device: &Device, shape: &CacheShape) -> Self {
        let &CacheShape { capacity, n_heads, n_kv_heads, .. } = shape;
        let (cached_dim, n_blocks) = (cached_dim(shape), head_blocks(shape));
        let n_shares = capacity.div_ceil(ops::ONE_TILE);
        let n_shares = n_shares.min(2 * device.n_multiprocessors() as usize / n_blocks).max(1);
        let cluster = if device.has_clusters() { n_shares.min(ops::ONE_CLUSTER) } else { 1 };
        let n_shares = n_shares / cluster * cluster;
        let partial = n_heads * n_shares * (cached_dim + 2);
        Self { values: n_kv_heads * capacity * cached_dim, n_shares, cluster, partial, done: n_blocks }
    }
}

/// Elements of a head in the cache.
fn cached_dim(shape: &CacheShape) -> usize {
    shape.head_dim.next_power_of_two().max(ops::CACHED_DIMS[0])
}

/// Blocks of one token's attention for each share of the positions: each takes some query heads of one key head.
fn head_blocks(shape: &CacheShape) -> usize {
    shape.n_kv_heads * (shape.n_heads / shape.n_kv_heads).div_ceil(ops::ONE_HEADS)
}
