//! Matrices on a GPU, encoded (their bytes as they lie in the archive) or plain BF16, and what runs on them (`engine/cuda/encoded.cu`).
//!
//! Nothing here allocates or waits once a matrix is made, so that every launch may be part of a graph.

mod cut;
mod external;
mod matrix;
#[cfg(test)]
mod tests;

pub use external::{External, ExternalInput, ExternalMatrix};
pub(super) use matrix::{DeviceMatrix, PLAIN_ALIGN, plain_len};

use super::code;
use super::device::{Device, Grid};
use crate::error::{Error, Result};
use codecllm_codec::Format;
use codecllm_codec::block::BLOCK_ROWS;
use cudarc::driver::{CudaFunction, CudaSlice, DevicePtr, DevicePtrMut};
use cut::{DECLARED_BYTES, DENSE_NEEDS, PLAIN_BYTES, RING_BYTES, THREAD_BLOCK_ROWS, raw_words};
use matrix::{Description, FORMATS, PLAIN_BLOCK};
use std::sync::Arc;

/// Most tokens of a product straight from the compressed blocks.
pub(super) const PRODUCT_TOKENS: usize = 16;
/// Tensors in a launch, as the kernels declare it.
const MAX_TASKS: usize = 8;

/// `Task` in launch.cuh.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct Task {
    matrix: Description,
    out: u64,
    bias: u64,
    first_cta: u32,
    n_ctas: u32,
    rows: u32,
    more_rows: u32,
    blocks: [u32; 2],
    more_blocks: [u32; 2],
    codec: u16,
    adds: u16,
}

/// `Launch` in launch.cuh.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct Launch {
    x: u64,
    units: u64,
    norm_or_tokens: u64,
    eps: f32,
    table_bytes: u32,
    n_slots: u32,
    n_tasks: u8,
    n_tokens: u8,
    gated: u8,
    bf16: u8,
    n_decoders: u8,
    raw_words: u8,
    paired: u8,
    eager: u8,
    window: u16,
    tasks: [Task; MAX_TASKS],
}

/// `Prepare` in encoded.cu.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Prepare {
    x: u64,
    out: u64,
    units: u64,
    n_tokens: u32,
    n_cols: u32,
    bf16: u32,
}

/// The kernels, loaded, and the memory that products share.
pub(super) struct EncodedKernels {
    /// By format: the encoder's codecs, then any.
    instances: Vec<Arc<Instance>>,
    /// The encoder's codecs for codes of a trellis.
    trellis: Arc<Instance>,
    plain: Arc<Instance>,
    /// Operands of several tokens, for `int8` and for floats.
    prepare_int8: CudaFunction,
    prepare_float: CudaFunction,
    shared_limit: u32,
    n_multiprocessors: u32,
    has_clusters: bool,
    units: CudaSlice<f64>,
}

/// Activations, prepared for products: what [`EncodedKernels::operand`] allocates.
pub(super) struct OperandBuffer {
    data: CudaSlice<u8>,
    max_cols: usize,
}

impl OperandBuffer {
    /// Its bytes in the GPU's memory.
    pub fn n_bytes(&self) -> usize {
        self.data.num_bytes()
    }
}

/// The kernels for plain matrices, or for one format, and for the encoder's codecs (with a trellis or without) or for any.
struct Instance {
    /// For one token.
    product: CudaFunction,
    /// The same for at most [`FEW_WARPS`], where there is one.
    product_few: Option<CudaFunction>,
    /// The same for one block a warp, whose parts are decoded before the activations are known, where there is one.
    product_early: Option<CudaFunction>,
    /// For 1, 8 and 16 tokens: for one block a warp, all of which is decoded before the activations are known, where there are such.
    products_tiles: Option<[CudaFunction; 3]>,
    encoded: Option<EncodedInstance>,
}

/// What plain matrices do not have.
struct EncodedInstance {
    decode_codes: CudaFunction,
    decode_values: CudaFunction,
    gather_rows: CudaFunction,
    /// For 8 and 16 tokens.
    products: [CudaFunction; 2],
}

/// What products read.
#[derive(Clone, Copy)]
pub(super) struct Activations<'a> {
    /// `[first + n_tokens, n_cols]`
    pub data: &'a CudaSlice<f32>,
    /// Tokens before the first that counts.
    pub first: usize,
    /// 1 to 16.
    pub n_tokens: usize,
    /// One token: the weight, `[n_cols]`, and the epsilon of an RMS norm before the products.
    pub norm: Option<(&'a CudaSlice<f32>, f32)>,
}

/// One of the products that share an input.
pub(super) struct Product<'a> {
    pub matrix: &'a DeviceMatrix,
    /// `[n_rows]`
    pub bias: Option<&'a CudaSlice<f32>>,
    /// `[first + n_tokens, n_rows]`
    pub out: &'a mut CudaSlice<f32>,
    /// Tokens before the first that counts.
    pub first: usize,
    /// Whether the product is added to what `out` holds.
    pub adds: bool,
}

/// Where a launch of products keeps the activations of several tokens; device addresses.
struct Scratch {
    /// One f64 a token.
    units: u64,
    /// As [`EncodedKernels::operand`] sizes it.
    operand: u64,
}

/// What a launch of products reads, as [`Activations`] describes it; device addresses.
struct Input {
    data: u64,
    n_tokens: usize,
    norm: u64,
    eps: f32,
    /// Whether activations, biases and products are BF16, not f32.
    bf16: bool,
}

/// A product as its launch sees it: where bias and output lie, and whether it is added.
type Job<'a> = (&'a DeviceMatrix, u64, u64, bool);

impl EncodedKernels {
    /// Loads the kernels.
    pub fn new(device: &Device) -> Result<Self> {
        let module = device.load(&code::ENCODED)?;
        let shared_limit = device.shared_bytes() - DECLARED_BYTES;
        let prepare = |name| device.kernel(&module, name, shared_limit);
        let kernel = |verb: &str, what: &str| device.kernel(&module, &format!("{verb}_{what}"), shared_limit);
        let instance = |what: &str| -> Result<Arc<Instance>> {
            let encoded = EncodedInstance {
                decode_codes: kernel("decode_codes", what)?,
                decode_values: kernel("decode_values", what)?,
                gather_rows: kernel("gather_rows", what)?,
                products: [kernel("product_8", what)?, kernel("product_16", what)?],
            };
            let few = (what == Format::Bf16.name()).then(|| kernel("product_1", "bf16_few")).transpose()?;
            let is_early = ["int8", "int8_trellis"].contains(&what);
            let tiles = |n: u32| kernel(&format!("product_{n}"), &format!("{what}_tiles"));
            Ok(Arc::new(Instance {
                product: kernel("product_1", what)?,
                product_few: few,
                product_early: is_early.then(|| kernel("product_1", &format!("{what}_early"))).transpose()?,
                products_tiles: is_early.then(|| Ok::<_, Error>([tiles(1)?, tiles(8)?, tiles(16)?])).transpose()?,
                encoded: Some(encoded),
            }))
        };
        let names = FORMATS.iter().flat_map(|format| [format.to_string(), format!("{format}_any")]);
        Ok(Self {
            instances: names.map(|what| instance(&what)).collect::<Result<_>>()?,
            trellis: instance("int8_trellis")?,
            plain: Arc::new(Instance {
                product: kernel("product", "plain")?,
                product_few: None,
                product_early: None,
                products_tiles: None,
                encoded: None,
            }),
            prepare_int8: prepare("prepare_int8_mma")?,
            prepare_float: prepare("prepare_float_mma")?,
            shared_limit,
            n_multiprocessors: device.n_multiprocessors(),
            has_clusters: device.has_clusters(),
            units: device.zeros(PRODUCT_TOKENS)?,
        })
    }

    /// Columns that the kernels take of a plain matrix: one token's activations lie in shared memory.
    pub fn plain_cols(&self) -> usize {
        let (rows, block_cols) = PLAIN_BLOCK;
        let others = PLAIN_BYTES + 192 + 8 * rows * (THREAD_BLOCK_ROWS + 1);
        ((self.shared_limit - others) * 8 / 33 / block_cols * block_cols) as usize
    }

    /// Bytes of the memory that products share.
    pub fn n_bytes(&self) -> u64 {
        self.units.num_bytes() as u64
    }

    /// Room for the activations of up to 16 tokens of up to `max_cols` columns.
    pub fn operand(&self, device: &Device, max_cols: usize) -> Result<OperandBuffer> {
        let data = device.zeros(operand_bytes(max_cols))?;
        Ok(OperandBuffer { data, max_cols })
    }
}

impl EncodedKernels {
    /// One launch that decodes to rows; the matrices and outputs of its tasks are set. Gives each a share of the multiprocessors by its number of
    /// blocks.
    ///
    /// # Safety
    /// The outputs have the room that the kernel takes.
    unsafe fn launch_decode(&self, device: &Device, kernel: &CudaFunction, mut launch: Launch) -> Result<()> {
        let tasks = &mut launch.tasks[..launch.n_tasks.into()];
        let n_blocks = |t: &Task| t.matrix.n_blocks(BLOCK_ROWS as u32);
        let total: u64 = tasks.iter().map(n_blocks).sum();
        // Thread blocks one by one for that tensor whose thread blocks have most to do: all wait for the last one.
        tasks.iter_mut().for_each(|task| task.n_ctas = 1);
        for _ in tasks.len()..self.n_multiprocessors as usize {
            let divisible = tasks.iter_mut().filter(|task| u64::from(task.n_ctas) < n_blocks(task));
            let Some(task) = divisible.max_by_key(|task| n_blocks(task).div_ceil(task.n_ctas.into())) else { break };
            task.n_ctas += 1;
        }
        let mut first_cta = 0;
        for task in tasks.iter_mut() {
            task.first_cta = first_cta;
            first_cta += task.n_ctas;
        }
        launch.table_bytes = tasks.iter().map(|t| 8 << t.matrix.table_bits).max().unwrap_or(0);
        let (n_warps, shared_bytes) = self.fit(launch.table_bytes, DENSE_NEEDS, DENSE_NEEDS.warps, 0)?;
        launch.raw_words = raw_words(u64::from(first_cta * n_warps).min(total));
        let grid = Grid { blocks: (first_cta, 1, 1), threads: 32 * n_warps, shared_bytes };
        // SAFETY: the structures are the kernels', the pointers those of validated tensors, the outputs the caller's
        // promise.
        unsafe { device.launch(kernel, grid, &launch) }
    }

    /// Decodes matrices to BF16 values, row-major, each into its buffer of at least `n_rows · n_cols`: a launch for every
    /// eight that share kernels.
    pub fn decode(&self, device: &Device, jobs: &mut [(&DeviceMatrix, &mut CudaSlice<half::bf16>)]) -> Result<()> {
        let stream = device.stream();
        let jobs: Vec<_> = jobs.iter_mut().map(|(m, out)| (*m, out.len(), out.device_ptr_mut(stream).0)).collect();
        self.decode_to(device, &jobs, |kernels| &kernels.decode_values)
    }

    /// The same into one buffer of at least [`decoded_len`] values for each. Returns where each begins.
    pub fn decode_together(
        &self,
        device: &Device,
        matrices: &[&DeviceMatrix],
        out: &mut CudaSlice<half::bf16>,
    ) -> Result<Vec<u64>> {
        check_len("decoded values", out.len(), matrices.iter().map(|m| decoded_len(m)).sum())?;
        let mut at = out.device_ptr_mut(device.stream()).0;
        let mut jobs = Vec::new();
        for m in matrices {
            jobs.push((*m, decoded_len(m), at));
            at += 2 * decoded_len(m) as u64;
        }
        self.decode_to(device, &jobs, |kernels| &kernels.decode_values)?;
        Ok(jobs.iter().map(|job| job.2).collect())
    }

    /// Decodes matrices to their codes, row-major, into buffers of at least as many bytes as those have.
    pub fn decode_codes(&self, device: &Device, jobs: &mut [(&DeviceMatrix, &mut CudaSlice<u8>)]) -> Result<()> {
        let stream = device.stream();
        let jobs: Vec<_> = jobs
            .iter_mut()
            .map(|(m, out)| (*m, out.len() * 8 / m.format.code_bits() as usize, out.device_ptr_mut(stream).0))
            .collect();
        self.decode_to(device, &jobs, |kernels| &kernels.decode_codes)
    }

    /// `jobs`: matrices, with the elements that their outputs have room for, and where those lie.
    fn decode_to(
        &self,
        device: &Device,
        jobs: &[(&DeviceMatrix, usize, u64)],
        kernel: impl Fn(&EncodedInstance) -> &CudaFunction,
    ) -> Result<()> {
        for (m, len, _) in jobs {
            check_len("decoded values", *len, m.n_rows() * m.n_cols())?;
        }
        for jobs in groups(jobs, |job| job.0) {
            let mut launch = Launch { n_tasks: jobs.len() as u8, ..Default::default() };
            for (task, (m, _, out)) in launch.tasks.iter_mut().zip(&jobs) {
                *task = Task { matrix: m.description, out: *out, codec: m.codec, ..Default::default() };
            }
            // SAFETY: the buffers were checked.
            unsafe { self.launch_decode(device, kernel(jobs[0].0.encoded_kernels()?), launch)? };
        }
        Ok(())
    }

    /// `out[t] = matrix[tokens[t]]` for the first `n_tokens` tokens; out `[n_tokens, n_cols]`. Rows that the matrix does
    /// not have are left as they are.
    pub fn gather_rows(
        &self,
        device: &Device,
        matrix: &DeviceMatrix,
        tokens: &CudaSlice<u32>,
        n_tokens: usize,
        out: &mut CudaSlice<f32>,
    ) -> Result<()> {
        check_len("tokens", tokens.len(), n_tokens)?;
        check_len("gathered rows", out.len(), n_tokens * matrix.n_cols())?;
        let (tokens, out) = (tokens.device_ptr(device.stream()).0, out.device_ptr_mut(device.stream()).0);
        // SAFETY: the buffers were checked.
        unsafe { self.gather_at(device, matrix, tokens, n_tokens, out) }
    }

    /// # Safety
    /// As many tokens and rows have room at the addresses.
    unsafe fn gather_at(
        &self,
        device: &Device,
        matrix: &DeviceMatrix,
        tokens: u64,
        n_tokens: usize,
        out: u64,
    ) -> Result<()> {
        let (n_tokens, table_bytes) = (n_tokens as u32, matrix.table_bytes());
        let mut launch = Launch { n_tasks: 1, norm_or_tokens: tokens, table_bytes, ..Default::default() };
        launch.tasks[0] = Task { matrix: matrix.description, out, codec: matrix.codec, ..Default::default() };
        let blocks = (matrix.description.n_col_blocks, n_tokens, 1);
        let grid = Grid { blocks, threads: 32, shared_bytes: table_bytes + RING_BYTES };
        // SAFETY: as in `launch`; the buffers are the caller's promise.
        unsafe { device.launch(&matrix.encoded_kernels()?.gather_rows, grid, &launch) }
    }

    /// `out[t] = matrix · x[t] + bias` for each of the products, or that added to `out`.
    ///
    /// `int8`: exactly the sums of [`codecllm_codec::EncodedTensor::product`], where there is no norm. `bf16` and `fp8`:
    /// within 2^-16 · Σ |w · x| of the exact sum, where a patched weight counts as its filler, too; and always the same. For one token a plain matrix and
    /// its `bf16` encoding make the same product to the bit, but in rows with patches, whose float32 sums differ in their rounding.
    pub fn product(
        &self,
        device: &Device,
        operand: &mut OperandBuffer,
        x: Activations<'_>,
        products: &mut [Product<'_>],
    ) -> Result<()> {
        self.check_products(operand, &x, products)?;
        let jobs = jobs(device, products);
        for jobs in groups(&jobs, |job| job.0) {
            self.launch_products(device, operand, &x, &jobs, false)?;
        }
        Ok(())
    }

    /// `silu(a) · b`, element by element, where `a` and `b` are the two products, into the first one's output. False, with
    /// nothing done: these two do not share kernels, or their tables have no room beside each other.
    pub fn gated_product(
        &self,
        device: &Device,
        operand: &mut OperandBuffer,
        x: Activations<'_>,
        products: &mut [Product<'_>; 2],
    ) -> Result<bool> {
        self.check_products(operand, &x, products)?;
        check_len("rows", products[0].matrix.n_rows(), products[1].matrix.n_rows())?;
        if !Arc::ptr_eq(&products[0].matrix.kernels, &products[1].matrix.kernels) {
            return Ok(false);
        }
        let jobs = jobs(device, products);
        let fits = self.cut(&jobs, x.n_tokens as u32, true).is_ok();
        if fits {
            self.launch_products(device, operand, &x, &jobs, true)?;
        }
        Ok(fits)
    }

    fn check_products(&self, operand: &OperandBuffer, x: &Activations<'_>, products: &[Product<'_>]) -> Result<()> {
        let n_cols = products.first().map_or(0, |p| p.matrix.n_cols());
        if x.n_tokens == 0 || x.n_tokens > PRODUCT_TOKENS || x.n_tokens > 1 && n_cols > operand.max_cols {
            return Err(Error::Parameter(format!(
                "{} tokens of {n_cols} columns: a product takes 1 to {PRODUCT_TOKENS} of up to {}",
                x.n_tokens, operand.max_cols
            )));
        }
        check_len("activations", x.data.len(), (x.first + x.n_tokens) * n_cols)?;
        check_len("columns of a norm", x.norm.map_or(usize::MAX, |(weight, _)| weight.len()), n_cols)?;
        assert!(x.norm.is_none() || x.n_tokens == 1, "norms are part of one token's products alone");
        for p in products {
            check_len("columns", p.matrix.n_cols(), n_cols)?;
            check_len("products", p.out.len(), (p.first + x.n_tokens) * p.matrix.n_rows())?;
            check_len("biases", p.bias.map_or(usize::MAX, CudaSlice::len), p.matrix.n_rows())?;
        }
        Ok(())
    }

    /// One launch; the jobs share kernels and were checked.
    fn launch_products(
        &self,
        device: &Device,
        operand: &mut OperandBuffer,
        x: &Activations<'_>,
        jobs: &[Job<'_>],
        gated: bool,
    ) -> Result<()> {
        let stream = device.stream();
        let scratch =
            Scratch { units: self.units.device_ptr(stream).0, operand: operand.data.device_ptr_mut(stream).0 };
        let data = x.data.device_ptr(stream).0 + (4 * x.first * jobs[0].0.n_cols()) as u64;
        let (norm, eps) = x.norm.map_or((0, 0.0), |(weight, eps)| (weight.device_ptr(stream).0, eps));
        let input = Input { data, n_tokens: x.n_tokens, norm, eps, bf16: false };
        // SAFETY: the buffers were checked; what is shared has room for the largest launch.
        unsafe { self.launch_products_at(device, &scratch, &input, jobs, gated) }
    }

    /// One launch; the jobs share kernels.
    ///
    /// # Safety
    /// Activations, biases, outputs and scratch have the room that [`Self::product`] describes.
    unsafe fn launch_products_at(
        &self,
        device: &Device,
        scratch: &Scratch,
        input: &Input,
        jobs: &[Job<'_>],
        gated: bool,
    ) -> Result<()> {
        let &Input { mut data, n_tokens, norm, eps, bf16 } = input;
        let n_cols = jobs[0].0.n_cols();
        let is_int8 = jobs[0].0.format == Format::Int8;
        let (units, n_tokens, bf16) = (scratch.units, n_tokens as u32, bf16.into());
        let cut = self.cut(jobs, n_tokens, gated)?;
        let one = &jobs[0].0.kernels;
        // The kernel for one token, eight or sixteen.
        let which = match n_tokens {
            1 => 0,
            2..=8 => 1,
            _ => 2,
        };
        let tiles = one.products_tiles.as_ref().filter(|_| cut.tiles).map(|kernels| &kernels[which]);
        let kernel = match (tiles, which) {
            (Some(kernel), _) => kernel,
            (_, 0) => {
                let early = one.product_early.as_ref().filter(|_| cut.early);
                early.or(one.product_few.as_ref().filter(|_| cut.few)).unwrap_or(&one.product)
            }
            _ => &jobs[0].0.encoded_kernels()?.products[which - 1],
        };
        let all_ctas = cut.all_ctas(gated);
        if n_tokens > 1 {
            let prepare = if is_int8 { &self.prepare_int8 } else { &self.prepare_float };
            let grid = self.prepare_grid(8 * which as u32, n_cols as u32, jobs, &cut, all_ctas);
            let out = scratch.operand;
            let params = Prepare { x: data, out, units, n_tokens, n_cols: n_cols as u32, bf16 };
            // SAFETY: an operand has room for sixteen tokens of `n_cols` columns.
            unsafe { device.launch(prepare, grid, &params)? };
            data = out;
        }
        let n_tasks = jobs.len() as u8;
        let mut launch =
            Launch { n_tasks, x: data, units, norm_or_tokens: norm, eps, gated: gated.into(), ..Default::default() };
        (launch.n_tokens, launch.bf16) = (n_tokens as u8, input.bf16.into());
        (launch.n_slots, launch.table_bytes) = (cut.n_slots, cut.table_bytes);
        (launch.n_decoders, launch.window) = (cut.n_decoders as u8, cut.warp_bytes as u16);
        (launch.paired, launch.eager) = (cut.paired.into(), (all_ctas <= self.n_multiprocessors).into());
        let team_warps = if gated { cut.n_decoders / 2 } else { cut.n_decoders };
        let mut first_cta = 0;
        for (i, (task, &(m, bias, out, adds))) in launch.tasks.iter_mut().zip(jobs).enumerate() {
            let (n_ctas, matrix, codec) = (cut.n_ctas[i], m.description, m.codec);
            let parts = n_ctas / cut.together();
            let (rows, more_rows) = (m.n_row_blocks() / parts, m.n_row_blocks() % parts);
            let all = [rows, rows + 1].map(|rows| rows * m.description.n_col_blocks / cut.together());
            let (blocks, more_blocks) = (all.map(|n| n / team_warps), all.map(|n| n % team_warps));
            let adds = adds.into();
            *task = Task { matrix, out, bias, first_cta, n_ctas, rows, more_rows, blocks, more_blocks, codec, adds };
            first_cta += if gated { 0 } else { n_ctas };
        }
        let n_blocks: u64 = jobs.iter().map(|job| job.0.n_blocks()).sum();
        launch.raw_words = raw_words(u64::from(all_ctas * cut.n_decoders).min(n_blocks));
        let grid = Grid { blocks: (all_ctas, 1, 1), threads: 32 * cut.n_warps, shared_bytes: cut.shared_bytes };
        // SAFETY: the structures are the kernels', the pointers those of validated tensors, the buffers the caller's promise.
        unsafe { device.launch_clusters(kernel, grid, (cut.together(), 1), &launch) }
    }
}

/// Values that a matrix takes where several are decoded together: each begins at a multiple of 16 bytes.
pub fn decoded_len(matrix: &DeviceMatrix) -> usize {
    (matrix.n_rows() * matrix.n_cols()).next_multiple_of(8)
}

/// Bytes of the operand of up to 16 tokens of `n_cols` columns, of which those for integers take half; tiles of two units may make the kernels read one
/// behind the last.
fn operand_bytes(n_cols: usize) -> usize {
    n_cols.next_multiple_of(32) * 4 * PRODUCT_TOKENS
}

fn jobs<'a>(device: &Device, products: &mut [Product<'a>]) -> Vec<Job<'a>> {
    let stream = device.stream();
    let places = |p: &mut Product<'a>| {
        let first = (4 * p.first * p.matrix.n_rows()) as u64;
        (p.matrix, p.bias.map_or(0, |b| b.device_ptr(stream).0), p.out.device_ptr_mut(stream).0 + first, p.adds)
    };
    products.iter_mut().map(places).collect()
}

/// `jobs` in groups for one launch each: up to eight matrices that share kernels.
fn groups<'a, T: Copy>(jobs: &[T], matrix: impl Fn(&T) -> &'a DeviceMatrix) -> Vec<Vec<T>> {
    let mut groups: Vec<Vec<T>> = Vec::new();
    for job in jobs {
        let fits = |g: &&mut Vec<T>| g.len() < MAX_TASKS && Arc::ptr_eq(&matrix(&g[0]).kernels, &matrix(job).kernels);
        match groups.iter_mut().find(fits) {
            Some(group) => group.push(*job),
            None => groups.push(vec![*job]),
        }
    }
    groups
}

fn check_len(what: &str, found: usize, needed: usize) -> Result<()> {
    match found < needed {
        true => Err(Error::Parameter(format!("room for {found} {what} on the GPU; {needed} are needed"))),
        false => Ok(()),
    }
}
