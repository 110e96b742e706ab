//! Single operations on a GPU, for `codecllm bench`: each is compared with a plain computation on the host, and then timed.
//!
//! An operation runs over several copies of what it reads, and of a decoded matrix that it writes, in turn, so that the GPU's cache has
//! none of them when it comes up again. It is timed as the replay of a CUDA graph, in which launches overlap as they do in a model.
//! What is compared is what such a replay left behind.

use super::blas::{Blas, Element, Gemm};
use super::code;
use super::device::{Device, Grid, failed};
use super::encoded::{
    Activations, DeviceMatrix, EncodedKernels, OperandBuffer, PLAIN_ALIGN, PRODUCT_TOKENS, Product, plain_len,
};
use super::host::Upload;
use super::nvcomp::{CHUNK_BYTES, Chunks, ElementType, INSTALL, Method, Nvcomp, Room};
use crate::error::{Error, Result};
use codecllm_codec::block::BLOCK_ROWS;
use codecllm_codec::quantize::{Codes, code_value};
use codecllm_codec::{Coder, Cpu, Dtype, EncodedTensor, Format, Operand, Tensor};
use cudarc::driver::sys::{CUdevice_attribute, CUgraphInstantiate_flags, CUstreamCaptureMode};
use cudarc::driver::{CudaFunction, CudaGraph, CudaSlice, DevicePtr, DevicePtrMut, DeviceRepr};
use half::bf16;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use rayon::prelude::*;
use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::rc::Rc;
use std::time::Instant;

/// Copies of a matrix have at least so many bytes together, and four times the GPU's cache.
const ROTATED_BYTES: usize = 256 << 20;
/// Runs that a graph has at least.
const GRAPH_RUNS: usize = 32;
/// Bytes that the read of memory goes over.
const READ_BYTES: usize = 1 << 30;
/// Threads of a block of `read_memory` in bench.cu, and the bytes that it reads at once: eight loads of 16 a thread.
const READ_THREADS: u32 = 512;
const READ_TILE_BYTES: usize = 8 * 16 * READ_THREADS as usize;
/// What cuBLAS is given to work in: what NVIDIA advises for Hopper.
const BLAS_WORKSPACE_BYTES: usize = 32 << 20;
/// Row blocks whose products are compared.
const CHECKED_BLOCKS: usize = 16;

/// A GPU, with all that the operations share.
pub struct Bench {
    device: Device,
    encoded: EncodedKernels,
    read: CudaFunction,
    blas: Option<Blas>,
    nvcomp: Result<Option<Nvcomp>>,
    operand: RefCell<OperandBuffer>,
    uploads: RefCell<Upload>,
    max_cols: usize,
    /// `[PRODUCT_TOKENS, max_cols]`, rounded to BF16, so that all products have the same input.
    x: Vec<f32>,
    rotated_bytes: usize,
}

/// A BF16 matrix in the GPU's memory, several times.
pub struct Dense {
    tensor: Tensor,
    stride: usize,
    copies: Vec<CudaSlice<bf16>>,
}

/// An encoded matrix in the GPU's memory, several times, and its codes by the host's decoder.
pub struct Encoded {
    tensor: EncodedTensor,
    codes: Codes<'static>,
    copies: Vec<DeviceMatrix>,
}

/// Who multiplies a BF16 matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DenseProduct {
    /// cuBLAS, with f32 sums as what comes out.
    CublasF32,
    /// cuBLAS, which rounds its sums to BF16.
    CublasBf16,
    /// The engine's own kernel, from f32 activations; one token.
    Engine,
}

/// What a matrix is decoded to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decoded {
    /// Its codes, one or two bytes each.
    Codes,
    /// BF16 values.
    Values,
}

/// Who of nvCOMP decompresses codes, in chunks of 64 KiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NvcompCoder {
    /// The frames of a `zstd` tensor.
    Zstd,
    /// Compressed on the GPU by nvCOMP itself.
    Ans,
}

/// An operation that was compared with the host's, ready to be timed.
pub struct Operation<'b> {
    bench: &'b Bench,
    graph: Option<CudaGraph>,
    issue: Box<dyn FnMut(usize) -> Result<()> + 'b>,
    n_copies: usize,
    n_runs: usize,
    /// Replays that the last timing took.
    n_replays: Cell<usize>,
    /// What a run moves: bytes of the weights, in the form at hand, that it reads, and of a decoded matrix that it writes.
    pub bytes: u64,
}

impl Operation<'_> {
    /// Seconds of one run: the mean of runs that take about `seconds` together.
    pub fn time(&mut self, seconds: f64) -> Result<f64> {
        loop {
            let n = self.n_replays.get();
            self.bench.device.synchronize()?;
            let started = Instant::now();
            for _ in 0..n {
                self.replay()?;
            }
            self.bench.device.synchronize()?;
            let elapsed = started.elapsed().as_secs_f64();
            if elapsed >= seconds {
                // As many as that takes, the next time.
                self.n_replays.set(((n as f64 * seconds / elapsed).ceil() as usize).max(1));
                return Ok(elapsed / (n * self.n_runs) as f64);
            }
            self.n_replays.set(n * (1.2 * seconds / elapsed).clamp(2.0, 16.0) as usize);
        }
    }

    /// Whether it is the replay of a graph. nvCOMP may not let itself be recorded; its calls are then issued one after another.
    pub fn is_graph(&self) -> bool {
        self.graph.is_some()
    }

    fn replay(&mut self) -> Result<()> {
        match &self.graph {
            Some(graph) => graph.launch().map_err(failed("replaying a graph")),
            None => (0..self.n_runs).try_for_each(|i| (self.issue)(i % self.n_copies)),
        }
    }
}

impl Bench {
    /// Opens GPU `index` for matrices of up to `max_cols` columns. The activations are drawn from `seed`.
    ///
    /// # Errors
    /// As [`Device::open`]; too little memory.
    pub fn open(index: usize, max_cols: usize, seed: u64) -> Result<Self> {
        let device = Device::open(index)?;
        let encoded = EncodedKernels::new(&device)?;
        let module = device.load(&code::BENCH)?;
        let read = device.kernel(&module, "read_memory", 0)?;
        let blas = Blas::load(&device)?.map(|b| b.with_workspace(&device, BLAS_WORKSPACE_BYTES)).transpose()?;
        let operand = RefCell::new(encoded.operand(&device, max_cols)?);
        let cache = device.stream().context().attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE);
        let cache_bytes = cache.map_err(failed("asking for the cache"))? as usize;
        let mut rng = SmallRng::seed_from_u64(seed);
        let mut draw = || bf16::from_f32((0..4).map(|_| rng.random::<f32>() - 0.5).sum()).to_f32();
        Ok(Self {
            x: (0..PRODUCT_TOKENS * max_cols).map(|_| draw()).collect(),
            rotated_bytes: ROTATED_BYTES.max(4 * cache_bytes),
            nvcomp: Nvcomp::load(),
            encoded,
            read,
            blas,
            uploads: RefCell::new(Upload::new(&device)?),
            device,
            operand,
            max_cols,
        })
    }

    /// The GPU.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Whether cuBLAS was found.
    pub fn has_blas(&self) -> bool {
        self.blas.is_some()
    }

    /// The version of nvCOMP, or why there is none.
    pub fn nvcomp(&self) -> std::result::Result<String, String> {
        match &self.nvcomp {
            Ok(Some(nvcomp)) => Ok(nvcomp.version()),
            Ok(None) => Err(format!("not found: {INSTALL}")),
            Err(e) => Err(e.to_string()),
        }
    }

    /// How many copies of so many bytes no cache holds.
    fn n_copies(&self, bytes: usize) -> usize {
        self.rotated_bytes.div_ceil(bytes.max(1)).max(2)
    }

    /// The first `n_tokens` tokens of `n_cols` activations.
    fn x(&self, n_tokens: usize, n_cols: usize) -> Result<&[f32]> {
        if n_cols > self.max_cols || n_tokens == 0 || n_tokens > PRODUCT_TOKENS {
            return Err(Error::Parameter(format!(
                "{n_tokens} tokens of {n_cols} columns; this bench takes 1 to {PRODUCT_TOKENS} of up to {}",
                self.max_cols
            )));
        }
        Ok(&self.x[..n_tokens * n_cols])
    }

    /// Runs `issue` once, records it over all copies in a graph, and replays that once.
    fn record<'b>(
        &'b self,
        n_copies: usize,
        bytes: u64,
        records: Records,
        issue: impl FnMut(usize) -> Result<()> + 'b,
    ) -> Result<Operation<'b>> {
        let mut issue = Box::new(issue);
        // What is loaded or chosen at the first call is none of the graph's business.
        issue(0)?;
        self.device.synchronize()?;
        let n_runs = n_copies * GRAPH_RUNS.div_ceil(n_copies);
        let stream = self.device.stream();
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        stream.begin_capture(mode).map_err(failed("recording a graph"))?;
        let issued = (0..n_runs).try_for_each(|i| issue(i % n_copies));
        let graph = stream.end_capture(CUgraphInstantiate_flags(0)).map_err(failed("recording a graph"));
        let graph = match (issued, graph, records) {
            (Ok(()), Ok(Some(graph)), _) => Some(graph),
            (_, _, Records::Perhaps) => {
                // A library may report what it could not record once more.
                let _ = issue(0);
                None
            }
            (issued, graph, Records::Always) => {
                issued?;
                graph?;
                return Err(Error::device("a graph recorded nothing"));
            }
        };
        let mut operation = Operation { bench: self, graph, issue, n_copies, n_runs, n_replays: Cell::new(1), bytes };
        operation.replay()?;
        self.device.synchronize()?;
        Ok(operation)
    }

    /// Reading memory, whose rate bounds that of all others.
    ///
    /// # Errors
    /// Too little memory; a sum that is not the host's.
    pub fn read_memory(&self) -> Result<Operation<'_>> {
        let n_words = READ_BYTES / 4;
        let mut state = 1u64;
        let words: Vec<u32> = (0..n_words)
            .map(|_| {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                (state >> 32) as u32
            })
            .collect();
        let expected = words.iter().fold(0, |sum, word| sum ^ word);
        let data = self.upload(&words)?;
        drop(words);
        let mut sum = self.device.zeros::<u32>(1)?;
        let params = ReadMemory {
            data: data.device_ptr(self.device.stream()).0,
            sum: sum.device_ptr_mut(self.device.stream()).0,
            n_tiles: (READ_BYTES / READ_TILE_BYTES) as u64,
        };
        let read = move || {
            // The words that the kernel reads live as long as it.
            let _data = &data;
            let blocks = (4 * self.device.n_multiprocessors(), 1, 1);
            let grid = Grid { blocks, threads: READ_THREADS, shared_bytes: 0 };
            // SAFETY: the data have so many tiles, the sum is one word.
            unsafe { self.device.launch(&self.read, grid, &params) }
        };
        read()?;
        let found = self.download(&sum)?[0];
        if found != expected {
            return Err(wrong(
                "reading memory",
                format!("the sum of what was read is {found:#x}, expected {expected:#x}"),
            ));
        }
        self.record(1, READ_BYTES as u64, Records::Always, move |_| {
            let _sum = &sum;
            read()
        })
    }

    /// Takes a BF16 matrix to the GPU.
    ///
    /// # Errors
    /// A tensor that is none; too little memory.
    pub fn dense(&self, tensor: &Tensor) -> Result<Rc<Dense>> {
        let (&[n_rows, n_cols], Dtype::Bf16) = (&tensor.shape[..], tensor.dtype) else {
            return Err(Error::Parameter(format!("{:?} {:?}; a BF16 matrix is expected", tensor.dtype, tensor.shape)));
        };
        let stride = n_cols.next_multiple_of(PLAIN_ALIGN);
        let mut values = vec![bf16::ZERO; plain_len(n_rows, n_cols)];
        for (to, from) in values.chunks_mut(stride).zip(tensor.data.chunks(2 * n_cols)) {
            to.iter_mut().zip(from.as_chunks().0).for_each(|(to, from)| *to = bf16::from_le_bytes(*from));
        }
        let copies = (0..self.n_copies(2 * values.len())).map(|_| self.upload(&values)).collect::<Result<_>>()?;
        Ok(Rc::new(Dense { tensor: tensor.clone(), stride, copies }))
    }

    /// The product of a BF16 matrix. `None`: this machine cannot (no cuBLAS, too many columns for the engine's kernel).
    ///
    /// # Errors
    /// A product that is further from the exact one than f32 sums may be.
    pub fn multiply_dense(
        &self,
        dense: &Rc<Dense>,
        by: DenseProduct,
        n_tokens: usize,
    ) -> Result<Option<Operation<'_>>> {
        let (n_rows, n_cols, stride) = (dense.tensor.shape[0], dense.tensor.shape[1], dense.stride);
        let x = self.x(n_tokens, n_cols)?;
        let bytes = (2 * n_rows * n_cols) as u64;
        let n_copies = dense.copies.len();
        let matrices = dense.clone();
        let stream = self.device.stream();
        let matrix = move |copy: usize| matrices.copies[copy].device_ptr(stream).0;
        if by == DenseProduct::Engine {
            if n_tokens != 1 || n_cols > self.encoded.plain_cols() {
                return Ok(None);
            }
            let x_dev = self.upload(x)?;
            let out = Rc::new(RefCell::new(self.upload(&vec![f32::NAN; n_tokens * n_rows])?));
            let to = out.clone();
            let operation = self.record(n_copies, bytes, Records::Always, move |copy| {
                let matrix = DeviceMatrix::plain(&self.encoded, matrix(copy), n_rows, n_cols)?;
                let input = Activations { data: &x_dev, first: 0, n_tokens, norm: None };
                let out = &mut *to.borrow_mut();
                let products = &mut [Product { matrix: &matrix, bias: None, out, first: 0, adds: false }];
                self.encoded.product(&self.device, &mut self.operand.borrow_mut(), input, products)
            })?;
            let out = out.borrow();
            // Activations are the sum of two BF16 numbers.
            let rounding = 2f64.powi(-16);
            self.check_dense(dense, "the engine's BF16 product", x, n_tokens, &self.download(&out)?, rounding)?;
            return Ok(Some(operation));
        }
        let Some(blas) = &self.blas else { return Ok(None) };
        let mut padded = vec![bf16::ZERO; n_tokens * stride];
        for (to, from) in padded.chunks_mut(stride).zip(x.chunks(n_cols)) {
            to.iter_mut().zip(from).for_each(|(to, from)| *to = bf16::from_f32(*from));
        }
        let x_dev = self.upload(&padded)?;
        // Two bytes of each are the product where it is rounded.
        let out = Rc::new(self.upload(&vec![f32::NAN; n_tokens * n_rows])?);
        let to = out.clone();
        let element = if by == DenseProduct::CublasF32 { Element::F32 } else { Element::Bf16 };
        let operation = self.record(n_copies, bytes, Records::Always, move |copy| {
            let gemm = Gemm {
                matrix: matrix(copy),
                matrix_stride: stride,
                n_rows,
                n_cols,
                x: x_dev.device_ptr(stream).0,
                x_stride: stride,
                n_tokens,
                out: to.device_ptr(stream).0,
                adds: false,
            };
            // SAFETY: matrix, input and output have the sizes that are given.
            unsafe { blas.product_as(&gemm, element) }
        })?;
        let mut found = self.download(&out)?;
        let mut rounding = 0.0;
        if element == Element::Bf16 {
            let narrow: &[bf16] = bytemuck::cast_slice(&found);
            found = narrow[..n_tokens * n_rows].iter().map(|v| v.to_f32()).collect();
            rounding = bf16::EPSILON.to_f64();
        }
        self.check_dense(dense, "cuBLAS's BF16 product", x, n_tokens, &found, rounding)?;
        Ok(Some(operation))
    }

    /// Compares some rows of `found`, `[n_tokens, n_rows]`, with float64 sums. A sum of n terms in f32 is off by at most n · 2^-24 of the sum
    /// of their magnitudes, in any order; where it comes out as BF16, partial sums may have been rounded on the way: by `rounding`.
    fn check_dense(
        &self,
        dense: &Dense,
        what: &str,
        x: &[f32],
        n_tokens: usize,
        found: &[f32],
        rounding: f64,
    ) -> Result<()> {
        let (n_rows, n_cols) = (dense.tensor.shape[0], dense.tensor.shape[1]);
        let row_values = |row: usize| {
            let row = &dense.tensor.data[2 * row * n_cols..][..2 * n_cols];
            row.as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b).to_f64()).collect::<Vec<_>>()
        };
        let limit = |all: f64| (n_cols as f64 * 2f64.powi(-24) + rounding) * all;
        check_sums(what, n_rows, x, n_tokens, found, row_values, limit)
    }

    /// Takes an encoded tensor to the GPU, and decodes it on the host.
    ///
    /// # Errors
    /// A tensor that the kernels do not take, or that does not decode; too little memory.
    pub fn encoded(&self, tensor: EncodedTensor) -> Result<Rc<Encoded>> {
        let copies = (0..self.n_copies(tensor.bytes().len())).map(|_| self.upload_encoded(&tensor));
        let copies = copies.collect::<Result<_>>()?;
        let codes = tensor.decode_codes(Cpu::detect())?;
        Ok(Rc::new(Encoded { tensor, codes, copies }))
    }

    /// Decoding to a row-major matrix. Every code or value is compared with the host's.
    ///
    /// # Errors
    /// One that differs; too little memory.
    pub fn decode(&self, encoded: &Rc<Encoded>, to: Decoded) -> Result<Operation<'_>> {
        let tensor = &encoded.tensor;
        let n_weights = tensor.n_rows() * tensor.n_cols();
        let out_bytes = n_weights * if to == Decoded::Codes { tensor.format().code_bits() as usize / 8 } else { 2 };
        let (n_outs, n_copies) = (self.n_copies(out_bytes), encoded.copies.len());
        let bytes = encoded.copies[0].bytes() + out_bytes as u64;
        let matrices = encoded.clone();
        let what = format!("decoding {} x {} {}", tensor.n_rows(), tensor.n_cols(), tensor.format());
        // As many runs as make every copy meet every output, or nearly.
        let n_turns = n_copies.max(n_outs);
        match to {
            Decoded::Codes => {
                let outs = (0..n_outs).map(|_| self.device.zeros::<u8>(out_bytes)).collect::<Result<Vec<_>>>()?;
                let outs = Rc::new(RefCell::new(outs));
                let written = outs.clone();
                let operation = self.record(n_turns, bytes, Records::Always, move |turn| {
                    let out = &mut written.borrow_mut()[turn % n_outs];
                    self.encoded.decode_codes(&self.device, &mut [(&matrices.copies[turn % n_copies], out)])
                })?;
                let expected = code_bytes(&encoded.codes);
                for out in outs.borrow().iter() {
                    check_same(&what, tensor.n_cols(), &self.download(out)?, &expected)?;
                }
                Ok(operation)
            }
            Decoded::Values => {
                let outs = (0..n_outs).map(|_| self.device.zeros::<bf16>(n_weights)).collect::<Result<Vec<_>>>()?;
                let outs = Rc::new(RefCell::new(outs));
                let written = outs.clone();
                let operation = self.record(n_turns, bytes, Records::Always, move |turn| {
                    let out = &mut written.borrow_mut()[turn % n_outs];
                    self.encoded.decode(&self.device, &mut [(&matrices.copies[turn % n_copies], out)])
                })?;
                let expected = encoded.values();
                for out in outs.borrow().iter() {
                    check_same(&what, tensor.n_cols(), bits(&self.download(out)?), bits(&expected))?;
                }
                Ok(operation)
            }
        }
    }

    /// The product of `n_tokens` tokens straight from the compressed blocks. Integer formats are compared with the host's product,
    /// bit for bit, the others with float64 sums; sixteen row blocks of each.
    ///
    /// # Errors
    /// A product that is further off than is documented of it: see `docs/kernel-notes.md`.
    pub fn multiply(&self, encoded: &Rc<Encoded>, n_tokens: usize) -> Result<Operation<'_>> {
        let tensor = &encoded.tensor;
        let (n_rows, n_cols) = (tensor.n_rows(), tensor.n_cols());
        let x = self.x(n_tokens, n_cols)?;
        let x_dev = self.upload(x)?;
        let out = Rc::new(RefCell::new(self.upload(&vec![f32::NAN; n_tokens * n_rows])?));
        let (to, matrices) = (out.clone(), encoded.clone());
        let bytes = encoded.copies[0].bytes();
        let operation = self.record(encoded.copies.len(), bytes, Records::Always, move |copy| {
            let x = Activations { data: &x_dev, first: 0, n_tokens, norm: None };
            let out = &mut *to.borrow_mut();
            let product = Product { matrix: &matrices.copies[copy], bias: None, out, first: 0, adds: false };
            self.encoded.product(&self.device, &mut self.operand.borrow_mut(), x, &mut [product])
        })?;
        let found = self.download(&*out.borrow())?;
        let what = format!("the product of {n_tokens} tokens and {n_rows} x {n_cols} {}", tensor.format());
        if tensor.format().is_integer() {
            let operand = Operand::new(x, n_cols);
            for rows in checked_blocks(n_rows) {
                let mut expected = vec![0f32; rows.len() * n_tokens];
                tensor.product(Cpu::detect(), &operand, rows.clone(), &mut expected)?;
                for (i, expected) in expected.into_iter().enumerate() {
                    let (row, token) = (rows.start + i / n_tokens, i % n_tokens);
                    let found = found[token * n_rows + row];
                    if found.to_bits() != expected.to_bits() {
                        return Err(wrong(
                            &what,
                            format!("row {row} of token {token} is {found}, expected {expected}"),
                        ));
                    }
                }
            }
            return Ok(operation);
        }
        // Where a weight is patched, what stands in its place counts, too.
        let filler = tensor.params().map_or(0, |p| p.filler(tensor.format()));
        let filler = f64::from(code_value(tensor.format(), filler));
        let patched = !tensor.sections().patches.is_empty();
        let x_max = x.iter().fold(0f64, |m, v| m.max(f64::from(v.abs())));
        let scale_max = (0..n_rows).map(|row| tensor.scale(row)).fold(0f32, f32::max);
        let row_values = |row: usize| {
            let codes = (0..n_cols).map(|col| encoded.codes.get(row * n_cols + col));
            codes.map(|code| f64::from(code_value(tensor.format(), code) * tensor.scale(row))).collect::<Vec<_>>()
        };
        let fillers = if patched { filler.abs() * f64::from(scale_max) * x_max * n_cols as f64 } else { 0.0 };
        let limit = |all: f64| 2f64.powi(-16) * (all + fillers);
        check_sums(&what, n_rows, x, n_tokens, &found, row_values, limit)?;
        Ok(operation)
    }

    /// nvCOMP's decompression of a tensor's codes, row-major, in chunks of 64 KiB; and the bytes of the chunks, with eight for where
    /// each begins. `None` where there is no nvCOMP.
    ///
    /// # Errors
    /// What nvCOMP says; codes that differ.
    pub fn nvcomp_decode(&self, tensor: &EncodedTensor, coder: NvcompCoder) -> Result<Option<(Operation<'_>, u64)>> {
        let Ok(Some(nvcomp)) = &self.nvcomp else { return Ok(None) };
        let codes = code_bytes(&tensor.decode_codes(Cpu::detect())?);
        let (method, data, ranges);
        match coder {
            NvcompCoder::Zstd if tensor.coder() == Coder::Zstd => {
                method = Method::Zstd;
                (data, ranges) = (tensor.bytes().to_vec(), tensor.frames());
            }
            NvcompCoder::Zstd => return Err(Error::Parameter("the tensor's coder is not `zstd`".into())),
            NvcompCoder::Ans => {
                method = Method::Ans;
                let element = match tensor.format() {
                    Format::Bf16 => ElementType::Float16,
                    Format::Fp8 => ElementType::E4m3,
                    Format::Int8 | Format::Rate => ElementType::Byte,
                };
                (data, ranges) = nvcomp.compress_ans(&self.device, &codes, element)?;
            }
        }
        let compressed_bytes = ranges.iter().map(|r| r.len() as u64 + 8).sum::<u64>();
        let n_copies = self.n_copies(compressed_bytes as usize);
        let n_outs = self.n_copies(codes.len());
        let chunks = |_| Chunks::new(&self.device, &data, &ranges, method.align(), codes.len());
        let chunks: Vec<Chunks> = (0..n_copies).map(chunks).collect::<Result<_>>()?;
        let room = |_| Room::new(&self.device, nvcomp, method, codes.len());
        let rooms = Rc::new(RefCell::new((0..n_outs).map(room).collect::<Result<Vec<Room>>>()?));
        nvcomp.check_chunks(&self.device, &chunks[0], &mut rooms.borrow_mut()[0])?;
        let written = rooms.clone();
        let bytes = compressed_bytes + codes.len() as u64;
        let operation = self.record(n_copies.max(n_outs), bytes, Records::Perhaps, move |turn| {
            nvcomp.decompress(&self.device, &chunks[turn % n_copies], &mut written.borrow_mut()[turn % n_outs])
        })?;
        for room in rooms.borrow().iter() {
            let found = self.download(&room.out)?;
            check_same(&format!("nvCOMP's {coder:?}"), CHUNK_BYTES, &found[..codes.len()], &codes)?;
        }
        Ok(Some((operation, compressed_bytes)))
    }

    fn upload_encoded(&self, tensor: &EncodedTensor) -> Result<DeviceMatrix> {
        DeviceMatrix::upload(&self.device, &self.encoded, &mut self.uploads.borrow_mut(), tensor)
    }

    fn upload<T: DeviceRepr>(&self, data: &[T]) -> Result<CudaSlice<T>> {
        let bytes = size_of_val(data);
        self.device.stream().clone_htod(data).map_err(|e| self.device.out_of_memory(e, bytes))
    }

    fn download<T: DeviceRepr>(&self, data: &CudaSlice<T>) -> Result<Vec<T>> {
        self.device.stream().clone_dtoh(data).map_err(failed("reading results"))
    }
}

/// Whether what is issued has to be recorded.
#[derive(Clone, Copy)]
enum Records {
    Always,
    Perhaps,
}

/// `ReadMemory` in bench.cu.
#[repr(C)]
#[derive(Clone, Copy)]
struct ReadMemory {
    data: u64,
    sum: u64,
    n_tiles: u64,
}

impl Encoded {
    /// The tensor.
    pub fn tensor(&self) -> &EncodedTensor {
        &self.tensor
    }

    /// The values that a decode yields.
    fn values(&self) -> Vec<bf16> {
        let (n_cols, format) = (self.tensor.n_cols(), self.tensor.format());
        let row = |row: usize| {
            let scale = self.tensor.scale(row);
            let codes = (row * n_cols..(row + 1) * n_cols).map(|i| self.codes.get(i));
            codes.map(move |code| bf16::from_f32(code_value(format, code) * scale))
        };
        (0..self.tensor.n_rows()).into_par_iter().flat_map_iter(row).collect()
    }
}

fn bits(values: &[bf16]) -> &[u16] {
    bytemuck::cast_slice(values)
}

/// Codes as they lie in memory.
fn code_bytes(codes: &Codes<'_>) -> Vec<u8> {
    match codes {
        Codes::U8(codes) => codes.to_vec(),
        Codes::U16(codes) => codes.iter().flat_map(|code| code.to_le_bytes()).collect(),
    }
}

/// Row blocks that are compared: the first, the last, and some between.
fn checked_blocks(n_rows: usize) -> impl Iterator<Item = Range<usize>> {
    let n_blocks = n_rows.div_ceil(BLOCK_ROWS);
    let n = CHECKED_BLOCKS.min(n_blocks);
    (0..n).map(move |i| {
        let block = if n > 1 { i * (n_blocks - 1) / (n - 1) } else { 0 };
        block * BLOCK_ROWS..n_rows.min((block + 1) * BLOCK_ROWS)
    })
}

/// Compares sums with those of `row_values` and `x`, `[n_tokens, n_cols]`, in float64: the first and the last row of some blocks. `limit`
/// says how far they may be off, by the sum of the terms' magnitudes.
fn check_sums(
    what: &str,
    n_rows: usize,
    x: &[f32],
    n_tokens: usize,
    found: &[f32],
    row_values: impl Fn(usize) -> Vec<f64>,
    limit: impl Fn(f64) -> f64,
) -> Result<()> {
    for row in checked_blocks(n_rows).flat_map(|rows| [rows.start, rows.end - 1]) {
        let values = row_values(row);
        for (token, x) in x.chunks(x.len() / n_tokens).enumerate() {
            let terms = values.iter().zip(x).map(|(w, x)| w * f64::from(*x));
            let (sum, all) = terms.fold((0.0, 0.0), |(sum, all), term| (sum + term, all + term.abs()));
            let found = f64::from(found[token * n_rows + row]);
            let limit = limit(all);
            if found.is_nan() || (found - sum).abs() > limit {
                return Err(wrong(
                    what,
                    format!("row {row} of token {token} is {found}, expected {sum} within {limit:e}"),
                ));
            }
        }
    }
    Ok(())
}

fn check_same<T: PartialEq + std::fmt::Debug + Sync>(
    what: &str,
    n_cols: usize,
    found: &[T],
    expected: &[T],
) -> Result<()> {
    if found.len() != expected.len() {
        return Err(wrong(what, format!("{} elements, expected {}", found.len(), expected.len())));
    }
    match found.par_iter().zip(expected).position_first(|(found, expected)| found != expected) {
        None => Ok(()),
        Some(i) => Err(wrong(
            what,
            format!("row {}, column {} is {:?}, expected {:?}", i / n_cols, i % n_cols, found[i], expected[i]),
        )),
    }
}

fn wrong(what: &str, problem: String) -> Error {
    Error::device(format!("{what} is wrong: {problem}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use codecllm_codec::encode_tensor;
    use codecllm_codec::encoded::{Checks, EncodeOptions};

    fn matrix(n_rows: usize, n_cols: usize) -> Tensor {
        let mut rng = SmallRng::seed_from_u64(3);
        let mut value = || bf16::from_f32((0..4).map(|_| rng.random::<f32>() - 0.5).sum::<f32>() * 0.05);
        let data: Vec<u8> = (0..n_rows * n_cols).flat_map(|_| value().to_le_bytes()).collect();
        Tensor { name: "w".into(), dtype: Dtype::Bf16, shape: vec![n_rows, n_cols], data: data.into() }
    }

    fn encode(source: &Tensor, format: Format, coder: Coder) -> EncodedTensor {
        let options = EncodeOptions { format, coder, step: Some(0.01), ..Default::default() };
        EncodedTensor::parse(encode_tensor(source, &options).unwrap().into(), Checks::Full).unwrap()
    }

    #[test]
    fn wrong_results_are_found() {
        let (n_rows, n_cols, n_tokens) = (70, 48, 2);
        let x: Vec<f32> = (0..n_tokens * n_cols).map(|i| (i % 7) as f32 - 3.0).collect();
        let row = |row: usize| (0..n_cols).map(|c| ((row * 5 + c) % 11) as f64 - 5.0).collect::<Vec<_>>();
        let sum = |token: usize, r: usize| {
            let terms = row(r).into_iter().zip(&x[token * n_cols..]).map(|(w, &x)| w * f64::from(x));
            terms.sum::<f64>() as f32
        };
        let mut found: Vec<f32> = (0..n_tokens * n_rows).map(|i| sum(i / n_rows, i % n_rows)).collect();
        let check = |found: &[f32]| check_sums("a product", n_rows, &x, n_tokens, found, row, |all| 1e-6 * all);
        check(&found).unwrap();
        // The last row of the second token, and one that nothing was written to.
        for wrong in [found[n_tokens * n_rows - 1] + 0.01, f32::NAN] {
            let right = std::mem::replace(&mut found[n_tokens * n_rows - 1], wrong);
            let problem = check(&found).unwrap_err().to_string();
            assert!(problem.contains("row 69 of token 1"), "{problem}");
            found[n_tokens * n_rows - 1] = right;
        }
        let codes: Vec<u8> = (0..100).collect();
        check_same("a decode", 10, &codes, &codes).unwrap();
        let mut other = codes.clone();
        other[57] ^= 1;
        let problem = check_same("a decode", 10, &other, &codes).unwrap_err().to_string();
        assert!(problem.contains("row 5, column 7 is 56, expected 57"), "{problem}");
        assert!(check_same("a decode", 10, &codes[1..], &codes).is_err());
    }

    #[test]
    fn row_blocks_from_the_first_to_the_last_are_checked() {
        for (n_rows, n_blocks) in [(1, 1), (33, 2), (512, 16), (28672, 16)] {
            let blocks: Vec<_> = checked_blocks(n_rows).collect();
            assert_eq!(blocks.len(), n_blocks);
            assert_eq!((blocks[0].start, blocks[n_blocks - 1].end), (0, n_rows));
            assert!(blocks.windows(2).all(|b| b[0].end <= b[1].start), "{blocks:?}");
        }
    }

    #[test]
    fn every_operation_agrees_with_the_host_and_is_timed() {
        let mut bench = match Bench::open(0, 1000, 1) {
            Ok(bench) => bench,
            Err(e) if std::env::var_os("CODECLLM_REQUIRE_CUDA").is_none_or(|v| v != "1") => {
                return eprintln!("skipped, for want of a GPU: {e}");
            }
            Err(e) => panic!("{e}"),
        };
        // A few copies of each will do.
        bench.rotated_bytes = 200_000;
        let time = |mut operation: Operation<'_>| {
            let seconds = operation.time(1e-4).unwrap();
            assert!(seconds > 0.0 && seconds < 1.0, "{seconds}");
            operation.bytes as f64 / seconds
        };
        assert!(time(bench.read_memory().unwrap()) > 1e10);
        for (n_rows, n_cols) in [(64, 512), (75, 1000), (33, 31)] {
            let source = matrix(n_rows, n_cols);
            let dense = bench.dense(&source).unwrap();
            for n_tokens in [1, 4, 16] {
                for by in [DenseProduct::CublasF32, DenseProduct::CublasBf16, DenseProduct::Engine] {
                    let operation = bench.multiply_dense(&dense, by, n_tokens).unwrap();
                    assert_eq!(
                        operation.is_some(),
                        if by == DenseProduct::Engine { n_tokens == 1 } else { bench.has_blas() }
                    );
                    operation.map(time);
                }
            }
            for &format in Format::ALL {
                let encoded = bench.encoded(encode(&source, format, Coder::Rans)).unwrap();
                time(bench.decode(&encoded, Decoded::Codes).unwrap());
                time(bench.decode(&encoded, Decoded::Values).unwrap());
                for n_tokens in [1, 4, 16] {
                    time(bench.multiply(&encoded, n_tokens).unwrap());
                }
                let zstd = encode(&source, format, Coder::Zstd);
                for coder in [NvcompCoder::Zstd, NvcompCoder::Ans] {
                    let operation = bench.nvcomp_decode(&zstd, coder).unwrap();
                    assert_eq!(operation.is_some(), bench.nvcomp().is_ok());
                    operation.map(|(operation, _)| time(operation));
                }
            }
        }
        let wide = bench.dense(&matrix(32, 1008)).unwrap();
        assert!(bench.multiply_dense(&wide, DenseProduct::Engine, 1).is_err_and(|e| e.to_string().contains("1000")));
    }
}
