//! Matrices on a GPU, encoded (their bytes as they lie in the archive) or plain BF16, and what runs on them (`engine/cuda/encoded.cu`).
//!
//! Nothing here allocates or waits once a matrix is made, so that every launch may be part of a graph.

mod external;

pub use external::{External, ExternalInput, ExternalMatrix};

use super::code;
use super::device::{Device, Grid};
use super::host::Upload;
use crate::error::{Error, Result};
use codecllm_codec::block::{BLOCK_ROWS, Params};
use codecllm_codec::{EncodedTensor, Format, Layout};
use cudarc::driver::{CudaFunction, CudaSlice, DevicePtr, DevicePtrMut};
use std::sync::Arc;

/// Most tokens of a product straight from the compressed blocks.
pub(super) const PRODUCT_TOKENS: usize = 16;
/// Tensors in a launch, as the kernels declare it.
const MAX_TASKS: usize = 8;
/// Warps of a thread block that multiplies, at least: they bring in the activations.
const PRODUCT_WARPS: u32 = 8;
/// Columns of a block whose parts may wait for the activations, at most.
const EARLY_COLS: u32 = 512;
/// The same of a block whose codes may (`BLOCK_UNITS` in tiles.cuh).
const TILES_COLS: u32 = 256;
/// Bytes of a warp that keeps codes: tiles, which are made from the front and so may come to lie on all but what is yet to be read, parts and raw bits at the
/// end (`BlockSink` in tiles.cuh). Always those of the largest block, for all are read, and those that the block does not have count nothing.
const BLOCK_BYTES: u32 = TILES_COLS * BLOCK_ROWS as u32;
/// A unit's tile is longer than its raw bits by 128 bytes for each bit fewer than eight: 3 bits, of which the window has those of six units, are overtaken first.
const _: () = assert!(BLOCK_BYTES >= 5 * (8 - 3) * 128 + RING_BYTES + BLOCK_BYTES / 8);
/// What else their thread blocks need (`End` in encoded.cu).
const END_BYTES: u32 = 16 * 8 + 4 * 32 * 4 + 16 * 32 * 4;
/// How many of their warps a multiprocessor has registers for.
const TILES_WARPS: u32 = 32;
/// How much of what a multiprocessor takes at once a product has at most that counts as small: a thread block for every row block then, so that several
/// fit on a multiprocessor, those of the next kernel beside the last of this one. They decode early, which takes half as many instructions more, and
/// costs nothing while other kernels leave the multiprocessor idle.
const SMALL: f64 = 0.7;
/// Bytes of a warp's window on its stream, and of what else products of one token need.
const RING_BYTES: u32 = 2560;
const SCRATCH_BYTES: u32 = 256;
/// What a decode to rows needs: a smaller window, and tiles where warps collect 256 bytes of 32 rows.
const DENSE_NEEDS: Needs = Needs { warp_bytes: 2048 + 32 * 256, block_bytes: 0, warps: 20 };
/// Rows and columns of a plain matrix's blocks: four groups of columns whose sums are float32 (`GROUP` in one_token.cuh).
const PLAIN_BLOCK: (u32, u32) = (8, 512);
/// Bytes of a warp's window on a plain matrix (`PlainReader` in one_token.cuh).
const PLAIN_BYTES: u32 = 4 * 2048;
/// Rows and columns of plain matrices are padded to a multiple of this.
pub(super) const PLAIN_ALIGN: usize = 8;
/// What the kernels declare of shared memory themselves.
const DECLARED_BYTES: u32 = 2048;
/// What CUDA keeps of a thread block's shared memory for itself.
const RESERVED_BYTES: u32 = 1024;
/// Row blocks of a thread block that multiplies by one token, at most (`MAX_ROWS` in encoded.cu).
const THREAD_BLOCK_ROWS: u32 = 128;
/// Warps of a thread block that multiplies by several tokens: those that decode, or at most, where that saves a round of blocks; and those that multiply, each
/// of which has one row block.
const DECODERS: u32 = 24;
const MOST_DECODERS: u32 = 28;
const MULTIPLIERS: u32 = 8;
const MANY_WARPS: u32 = DECODERS + MULTIPLIERS;
/// Warps of the kernels for one token that have fewer than 32, with more registers each (`product_1_bf16_few` in encoded.cu).
const FEW_WARPS: u32 = 28;
/// Bytes of a decoder's tiles and of their barriers (`Tiles` in tiles.cuh), of the row blocks' barriers, and, for eight tokens, of a multiplier's activations.
const TILES_BYTES: u32 = 4096;
const BARRIER_BYTES: u32 = 64;
const ROWS_BYTES: u32 = 8 * MULTIPLIERS;
const X_BYTES: u32 = 3 * 1024;
/// Of a token's activations, in f32: what each thread that prepares them holds (`Input::held` in activations.cuh), and what its thread block keeps in shared memory
/// at most. So four thread blocks fit on a multiprocessor.
const HELD_BYTES: u32 = 2 * 16;
const KEPT_BYTES: u32 = 40 << 10;
/// Row blocks that the kernels count.
const MAX_ROW_BLOCKS: usize = 1 << 16;

/// The formats that have kernels.
const FORMATS: [Format; 3] = [Format::Int8, Format::Fp8, Format::Bf16];
/// Parts a symbol and raw bits that kernels are made for, by format as in `FORMATS`: what the encoder chooses. The others
/// share kernels that are several times slower.
const CODECS: [&[(u32, u32)]; 3] = [
    &[(2, 0), (4, 0), (4, 1), (4, 2), (4, 3), (4, 4), (4, 5), (4, 6), (8, 3), (8, 4), (8, 5), (8, 6), (8, 7)],
    &[(4, 5), (4, 6), (2, 3), (2, 4)],
    &[(4, 9), (4, 10), (2, 7), (2, 8)],
];
/// The same for codes of a trellis, which have 2 to 7 bits.
const TRELLIS_CODECS: &[(u32, u32)] = &[(4, 1), (4, 2), (4, 3), (4, 4), (4, 5), (8, 3), (8, 4), (8, 5), (8, 6)];

/// `Matrix` in decode.cuh; pointers are device addresses.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct Description {
    table: u64,
    stream: u64,
    offsets: u64,
    raw: u64,
    patch_offsets: u64,
    patches: u64,
    scales: u64,
    n_rows: u32,
    n_cols: u32,
    block_cols: u32,
    n_col_blocks: u32,
    n_units: u32,
    per_row: u32,
    table_bits: u32,
    scale_kind: u32,
    bias: i32,
    filler: u32,
    parts_per_symbol: u8,
    raw_bits: u8,
    part_bits: u8,
    trellis: u8,
}

impl Description {
    /// Blocks of so many rows.
    fn n_blocks(&self, block_rows: u32) -> u64 {
        u64::from(self.n_rows.div_ceil(block_rows)) * u64::from(self.n_col_blocks)
    }
}

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

/// What a kernel needs beside its tables: shared memory of each warp, shared memory of a block, and the warps that its
/// registers allow.
#[derive(Clone, Copy)]
struct Needs {
    warp_bytes: u32,
    block_bytes: u32,
    warps: u32,
}

/// How a launch of products is cut.
#[derive(Default)]
struct Cut {
    n_warps: u32,
    /// Those of which decode, for they have blocks.
    n_decoders: u32,
    /// By task.
    n_ctas: [u32; MAX_TASKS],
    /// One token: slots of sums.
    n_slots: u32,
    /// One token: whether no warp has more than one block, whose parts are decoded before the activations are known.
    early: bool,
    /// Whether no warp has more than one block, all of which is decoded before the activations are known.
    tiles: bool,
    /// One token: whether thread blocks two by two have row blocks together.
    paired: bool,
    /// One token: whether at most [`FEW_WARPS`] share the blocks, by the kernel for so many.
    few: bool,
    /// One token, or `tiles`: `Launch::window`.
    warp_bytes: u32,
    table_bytes: u32,
    shared_bytes: u32,
}

impl Cut {
    /// Thread blocks that have row blocks together.
    fn together(&self) -> u32 {
        1 + u32::from(self.paired)
    }

    /// The most blocks that one of so many warps of a team has, one after the other.
    fn turns(&self, jobs: &[Job<'_>], team_warps: u32) -> u32 {
        let together = self.together();
        let of = |(job, n): (&Job<'_>, u32)| {
            let n_blocks = job.0.n_row_blocks().div_ceil(n / together) * job.0.description.n_col_blocks;
            n_blocks.div_ceil(together * team_warps)
        };
        jobs.iter().zip(self.n_ctas).map(of).max().unwrap_or(0)
    }

    /// Thread blocks of the launch: those of a gated product have both matrices.
    fn all_ctas(&self, gated: bool) -> u32 {
        if gated { self.n_ctas[0] } else { self.n_ctas.iter().sum() }
    }
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

/// A matrix in a GPU's memory.
pub(super) struct DeviceMatrix {
    format: Format,
    description: Description,
    bytes: u64,
    kernels: Arc<Instance>,
    /// What the kernels know its codec by, or 0.
    codec: u16,
    /// What the description points to; none where that is another's.
    _storage: Option<(CudaSlice<u8>, CudaSlice<u8>)>,
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

/// The format whose kernels read a tensor: codes of `rate` are those of `int8`.
fn kernel_format(tensor: &Layout) -> Format {
    if tensor.format().is_integer() { Format::Int8 } else { tensor.format() }
}

/// A format's place in `FORMATS`.
fn format_index(format: Format) -> usize {
    FORMATS.iter().position(|&f| f == format).unwrap_or(0)
}

/// Whether there are kernels for these parameters.
fn is_fast(format: Format, params: &Params) -> bool {
    let (g, k) = (params.parts_per_symbol, params.raw_bits);
    // bf16: the bias has no bit below the parts, nor, where an entry holds only high bytes, below those.
    let clear_bits = match (format, g) {
        (Format::Bf16, 4) => k.saturating_sub(1).max(8),
        (Format::Bf16, _) => k.saturating_sub(1),
        _ => 0,
    };
    let codecs = if params.trellis { TRELLIS_CODECS } else { CODECS[format_index(format)] };
    codecs.contains(&(g, k)) && params.bias & ((1 << clear_bits) - 1) == 0
}

/// The table as the kernels look it up, by slot. Low half: what the shifted state changes by, from the top bit down, and
/// the bits to read in bits 0 to 4. High half: the parts where the codes have them (`Codec::assemble` in decode.cuh),
/// or the symbol.
fn table_entries(tensor: &Layout, params: &Params) -> Vec<u64> {
    let &Params { parts_per_symbol: g, table_bits, raw_bits: k, part_bits: w, bias, .. } = params;
    let format = kernel_format(tensor);
    let fixed = is_fast(format, params);
    let place = |symbol: u32| -> u32 {
        let part = |i: u32| symbol >> (w * i) & ((1 << w) - 1);
        let low_bits = k.saturating_sub(1);
        match (format, g) {
            _ if !fixed => symbol,
            // Without raw bits the parts are the codes, but for the bias.
            _ if k == 0 => (0..g).fold(0, |y, i| y | ((bias as u32).wrapping_add(part(i)) & 0xff) << (8 * i)),
            (Format::Bf16, 4) => (0..4).fold(0, |y, i| y | ((bias as u32 + (part(i) << low_bits)) >> 8) << (8 * i)),
            (Format::Bf16, _) => (0..g).fold(0, |y, i| y | (bias as u32 + (part(i) << low_bits)) << (16 * i)),
            // A part of eight is one bit; the second quad's lie one lower, or where its raw bits leave them room.
            (_, 8) => {
                let second = if k == 4 { 7 } else { low_bits - 1 };
                (0..4).fold(0, |y, i| y | (part(i) << low_bits | part(i + 4) << second) << (8 * i))
            }
            _ => (0..g).fold(0, |y, i| y | part(i) << (low_bits + 8 * i)),
        }
    };
    let transitions = tensor.transitions().unwrap_or_default().iter().enumerate();
    transitions
        .map(|(slot, t)| {
            let change = u32::from(t.base).wrapping_sub((slot as u32) << t.n_bits) << (32 - table_bits);
            u64::from(place(t.symbol.into())) << 32 | u64::from(change | u32::from(t.n_bits))
        })
        .collect()
}

/// Checks that the kernels take a tensor.
fn check_layout(tensor: &Layout) -> Result<&Params> {
    let Some(params) = tensor.params() else {
        return Err(Error::unsupported(
            "encoded tensor",
            "its coder is `zstd`, which these kernels do not decode; compress the model with coder `rans`",
        ));
    };
    let geometry = tensor.geometry();
    check_shape("encoded tensor", geometry.n_rows, geometry.n_cols)?;
    Ok(params)
}

/// Checks that the kernels count so many rows and columns. Sums are exact up to 2^31 / 2^14 columns.
fn check_shape(what: &'static str, n_rows: usize, n_cols: usize) -> Result<()> {
    const MAX_ROWS: usize = MAX_ROW_BLOCKS * BLOCK_ROWS;
    const MAX_COLS: usize = 1 << 17;
    if n_rows <= MAX_ROWS && n_cols <= MAX_COLS {
        return Ok(());
    }
    let takes =
        format!("it has {n_rows} rows and {n_cols} columns; the GPU's kernels take up to {MAX_ROWS} and {MAX_COLS}");
    Err(Error::unsupported(what, takes))
}

impl DeviceMatrix {
    /// Takes an encoded tensor to the GPU, its bytes as they lie in the archive.
    ///
    /// # Errors
    /// A tensor of coder `zstd`, more rows or columns than the kernels count, too little memory.
    pub fn upload(
        device: &Device,
        kernels: &EncodedKernels,
        upload: &mut Upload,
        tensor: &EncodedTensor,
    ) -> Result<Self> {
        let layout = tensor.layout();
        let entries = table_entries(&layout, check_layout(&layout)?);
        let data = upload.take(device, tensor.bytes())?;
        let table = upload.take(device, bytemuck::cast_slice(&entries))?;
        let stream = device.stream();
        let mut matrix = Self::describe(kernels, &layout, data.device_ptr(stream).0, table.device_ptr(stream).0)?;
        matrix._storage = Some((data, table));
        Ok(matrix)
    }

    /// A matrix whose bytes lie at `base` and its table at `table`.
    fn describe(kernels: &EncodedKernels, tensor: &Layout, base: u64, table: u64) -> Result<Self> {
        let params = check_layout(tensor)?;
        let geometry = tensor.geometry();
        let sections = tensor.sections();
        let at = |range: &std::ops::Range<usize>| base + range.start as u64;
        let patched = !sections.patches.is_empty();
        let description = Description {
            table,
            stream: at(&sections.stream),
            offsets: at(&sections.offsets),
            raw: at(&sections.raw),
            patch_offsets: if patched { at(&sections.patch_offsets) } else { 0 },
            patches: at(&sections.patches),
            scales: at(&sections.scales),
            n_rows: geometry.n_rows as u32,
            n_cols: geometry.n_cols as u32,
            block_cols: params.block_cols,
            n_col_blocks: geometry.n_col_blocks() as u32,
            n_units: geometry.n_units() as u32,
            per_row: per_row(geometry.n_col_blocks()),
            table_bits: params.table_bits,
            scale_kind: tensor.scale_kind() as u32,
            bias: params.bias,
            filler: params.filler(tensor.format()).into(),
            parts_per_symbol: params.parts_per_symbol as u8,
            raw_bits: params.raw_bits as u8,
            part_bits: params.part_bits as u8,
            trellis: params.trellis.into(),
        };
        let (g, k) = (params.parts_per_symbol, params.raw_bits);
        let format = kernel_format(tensor);
        let fast = is_fast(format, params);
        let kernels = match fast && params.trellis {
            true => kernels.trellis.clone(),
            false => kernels.instances[2 * format_index(format) + usize::from(!fast)].clone(),
        };
        let codec = if fast { (g << 4 | k) as u16 } else { 0 };
        let bytes = (tensor.n_bytes() + (8 << params.table_bits)) as u64;
        Ok(Self { format, description, bytes, kernels, codec, _storage: None })
    }

    /// A plain matrix: BF16, rows and columns padded to multiples of [`PLAIN_ALIGN`] (the columns with zeros), at the address `data`. The memory is the
    /// caller's.
    ///
    /// # Errors
    /// More rows or columns than the kernels count.
    pub fn plain(kernels: &EncodedKernels, data: u64, n_rows: usize, n_cols: usize) -> Result<Self> {
        check_shape("matrix", n_rows, n_cols)?;
        let n_col_blocks = n_cols.div_ceil(PLAIN_BLOCK.1 as usize);
        let description = Description {
            stream: data,
            n_rows: n_rows as u32,
            n_cols: n_cols as u32,
            block_cols: PLAIN_BLOCK.1,
            n_col_blocks: n_col_blocks as u32,
            per_row: per_row(n_col_blocks),
            n_units: n_cols.div_ceil(32) as u32,
            ..Default::default()
        };
        let bytes = 2 * plain_len(n_rows, n_cols) as u64;
        Ok(Self { format: Format::Bf16, description, bytes, kernels: kernels.plain.clone(), codec: 0, _storage: None })
    }

    fn is_plain(&self) -> bool {
        self.kernels.encoded.is_none()
    }

    fn encoded_kernels(&self) -> Result<&EncodedInstance> {
        let what = "plain matrices are multiplied with one token alone, and not decoded";
        self.kernels.encoded.as_ref().ok_or_else(|| Error::Parameter(what.into()))
    }

    /// Rows.
    pub fn n_rows(&self) -> usize {
        self.description.n_rows as usize
    }

    /// Columns.
    pub fn n_cols(&self) -> usize {
        self.description.n_cols as usize
    }

    /// Bytes in the GPU's memory.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether its values are BF16 to the bit.
    pub fn is_lossless(&self) -> bool {
        self.format.is_lossless()
    }

    fn block_rows(&self) -> u32 {
        if self.is_plain() { PLAIN_BLOCK.0 } else { BLOCK_ROWS as u32 }
    }

    fn n_row_blocks(&self) -> u32 {
        self.description.n_rows.div_ceil(self.block_rows())
    }

    fn n_blocks(&self) -> u64 {
        self.description.n_blocks(self.block_rows())
    }

    fn table_bytes(&self) -> u32 {
        if self.is_plain() { 0 } else { 8 << self.description.table_bits }
    }

    /// Whether the kernels can decode a block's parts and keep them: those of one bit, eight a symbol.
    fn decodes_early(&self) -> bool {
        self.kernels.product_early.is_some() && self.codec >> 4 == 8 && self.description.block_cols <= EARLY_COLS
    }

    /// Bytes of a warp that does: its window, and a bit of parts for each weight.
    fn early_bytes(&self) -> u32 {
        RING_BYTES + SCRATCH_BYTES.max(self.description.block_cols * BLOCK_ROWS as u32 / 8)
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
        let mut first_cta = 0;
        for task in tasks.iter_mut() {
            let share = self.share(n_blocks(task), total).max(1);
            (task.first_cta, task.n_ctas) = (first_cta, u64::from(share).min(n_blocks(task)) as u32);
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

    /// The warps of a block, up to `warps`, that the shared memory allows, and how much of that they take: with so many bytes of tables, and so many more
    /// for each warp.
    fn fit(&self, table_bytes: u32, needs: Needs, warps: u32, slots_bytes: u32) -> Result<(u32, u32)> {
        let (fixed, each) = (table_bytes + needs.block_bytes, needs.warp_bytes + slots_bytes);
        let n_warps = (self.shared_limit.saturating_sub(fixed) / each).min(warps);
        match n_warps {
            0 => Err(Error::unsupported(
                "matrix",
                format!(
                    "its table and input take {fixed} bytes of shared memory and a warp {each}, the GPU has {} a block; \
                     where the table is large, compress the model with --prefer speed",
                    self.shared_limit
                ),
            )),
            _ => Ok((n_warps, fixed + n_warps * each)),
        }
    }

    /// Decodes matrices to BF16 values, row-major, each into its buffer of at least `n_rows · n_cols`: a launch for every
    /// eight that share kernels.
    pub fn decode(&self, device: &Device, jobs: &mut [(&DeviceMatrix, &mut CudaSlice<half::bf16>)]) -> Result<()> {
        let stream = device.stream();
        let jobs: Vec<_> = jobs.iter_mut().map(|(m, out)| (*m, out.len(), out.device_ptr_mut(stream).0)).collect();
        self.decode_to(device, &jobs, |kernels| &kernels.decode_values)
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

    /// How a launch of products is cut: which thread blocks, with whole row blocks each, of how many warps.
    fn cut(&self, jobs: &[Job<'_>], n_tokens: u32, gated: bool) -> Result<Cut> {
        let cut = match (self.cut_tiles(jobs, n_tokens, gated), n_tokens) {
            (Some(cut), _) => cut,
            (None, 1) => self.cut_one(jobs, gated)?,
            _ => self.cut_many(jobs, n_tokens, gated)?,
        };
        match cut.n_warps {
            0 => Err(Error::Parameter("two matrices of a gated product have no room beside each other".into())),
            _ => Ok(cut),
        }
    }

    /// For one token.
    fn cut_one(&self, jobs: &[Job<'_>], gated: bool) -> Result<Cut> {
        let matrices = || jobs.iter().map(|job| job.0);
        let needs = product_needs(jobs[0].0);
        let (n_teams, n) = (if gated { 2 } else { 1 }, self.n_multiprocessors);
        let total: u64 = matrices().map(DeviceMatrix::n_blocks).sum();
        // Plain matrices have blocks of so few rows that all multiprocessors get as much. No more warps than take as many turns leave room for the next kernel's.
        let plain = jobs[0].0.is_plain();
        let small = total as f64 <= SMALL * f64::from(needs.warps * n) && !plain;
        let widest = matrices().map(|m| m.description.n_col_blocks).max().unwrap_or(1);
        let wanted = match (small, plain) {
            (true, _) => (n_teams * widest).clamp(PRODUCT_WARPS, needs.warps),
            (_, true) => {
                let each = total.div_ceil(n.into());
                let turns = each.div_ceil(needs.warps.into()).max(1);
                each.div_ceil(turns).next_multiple_of(4).clamp(PRODUCT_WARPS.into(), needs.warps.into()) as u32
            }
            _ => needs.warps,
        };
        let mut cut = Cut::default();
        for (n_ctas, m) in cut.n_ctas.iter_mut().zip(matrices()) {
            let n_rows = m.n_row_blocks();
            let share = if gated { n } else { self.share(m.n_blocks(), total) };
            *n_ctas = if small { n_rows } else { share.clamp(n_rows.div_ceil(THREAD_BLOCK_ROWS), n_rows) };
        }
        // For integers, half a row block less is worth no more than waiting for each other; of two matrices it is twice that.
        let pays = gated || jobs.len() == 1 && jobs[0].0.format != Format::Int8;
        cut.paired = !small && !plain && pays && self.pairs(jobs, cut.n_ctas[0]);
        let together = cut.together();
        // Where those take no more turns; and of a small matrix where no multiprocessor has to take two of its thread blocks.
        let few = wanted.min(FEW_WARPS);
        cut.few = jobs[0].0.kernels.product_few.is_some()
            && cut.turns(jobs, few / n_teams) <= cut.turns(jobs, wanted / n_teams)
            && (!small || PRODUCT_WARPS < wanted && cut.all_ctas(gated) <= n);
        let wanted = if cut.few { few } else { wanted };
        let deepest = cut.n_ctas.iter().zip(matrices()).map(|(&n, m)| m.n_row_blocks().div_ceil(n / together));
        let deepest = deepest.max().unwrap_or(1);
        cut.table_bytes = matrices().map(DeviceMatrix::table_bytes).max().unwrap_or(0);
        // A team of warps, of paired thread blocks both's, has a slot for each of them and each row block: the sums of its rows, of 64 bits.
        let slot_bytes = 8 * jobs[0].0.block_rows();
        let fixed = n_teams * (cut.table_bytes + deepest * slot_bytes);
        let fit = |needs| self.fit(fixed, needs, wanted, together * slot_bytes);
        let early = Needs { warp_bytes: matrices().map(DeviceMatrix::early_bytes).max().unwrap_or(0), ..needs };
        cut.early = small
            && matrices().all(DeviceMatrix::decodes_early)
            && fit(early).is_ok_and(|(n_warps, _)| widest * n_teams <= n_warps / n_teams * n_teams);
        let needs = if cut.early { early } else { needs };
        cut.warp_bytes = needs.warp_bytes;
        let (n_warps, shared_bytes) = fit(needs)?;
        cut.n_warps = n_warps / n_teams * n_teams;
        cut.n_decoders = cut.n_warps;
        cut.n_slots = together * cut.n_warps / n_teams + deepest;
        cut.shared_bytes = shared_bytes;
        Ok(cut)
    }

    /// Where a thread block for each row block has a warp for each of its blocks, which keeps its codes, and all of them are on the multiprocessors at once. For
    /// one token each multiprocessor has one of them, beside another kernel's: else those of more kernels lie beside each other where only parts are kept.
    fn cut_tiles(&self, jobs: &[Job<'_>], n_tokens: u32, gated: bool) -> Option<Cut> {
        let matrices = || jobs.iter().map(|job| job.0);
        if !matrices().all(|m| m.decodes_early() && m.description.block_cols <= TILES_COLS) {
            return None;
        }
        let n_teams = if gated { 2 } else { 1 };
        let widest = matrices().map(|m| m.description.n_col_blocks).max()?;
        let table_bytes = matrices().map(DeviceMatrix::table_bytes).max()?;
        let n_warps = (n_teams * widest).max(PRODUCT_WARPS);
        let shared_bytes = n_teams * table_bytes + n_warps * BLOCK_BYTES + END_BYTES;
        let mut cut = Cut { n_warps, n_decoders: n_warps, table_bytes, shared_bytes, ..Default::default() };
        (cut.tiles, cut.warp_bytes) = (true, BLOCK_BYTES);
        cut.n_ctas.iter_mut().zip(matrices()).for_each(|(n, m)| *n = m.n_row_blocks());
        let own = DECLARED_BYTES + RESERVED_BYTES;
        let fit = ((self.shared_limit + own) / (shared_bytes + own)).min(TILES_WARPS / n_warps);
        let each = match n_tokens {
            // The activations come to lie in the tables' place.
            1 => u32::from(fit > 1 && product_needs(jobs[0].0).block_bytes <= n_teams * table_bytes),
            _ => fit,
        };
        (cut.all_ctas(gated) <= each * self.n_multiprocessors).then_some(cut)
    }

    /// For several tokens otherwise.
    fn cut_many(&self, jobs: &[Job<'_>], n_tokens: u32, gated: bool) -> Result<Cut> {
        let matrices = || jobs.iter().map(|job| job.0);
        let n_teams = if gated { 2 } else { 1 };
        let total: u64 = matrices().map(DeviceMatrix::n_blocks).sum();
        let mut small = total as f64 <= SMALL * f64::from(DECODERS * self.n_multiprocessors);
        let widest = matrices().map(|m| m.description.n_col_blocks).max().unwrap_or(1);
        let table_bytes = matrices().map(DeviceMatrix::table_bytes).max().unwrap_or(0);
        let each = RING_BYTES + TILES_BYTES + BARRIER_BYTES;
        let x_bytes = X_BYTES * n_tokens.div_ceil(8);
        let multipliers = |decoders: u32| decoders.min(MULTIPLIERS).min(MANY_WARPS - decoders);
        let fixed = n_teams * table_bytes + ROWS_BYTES;
        let bytes = |decoders: u32| fixed + decoders * each + multipliers(decoders) * x_bytes;
        let fits = |decoders: &u32| bytes(*decoders) <= self.shared_limit;
        // Up to so many decoders, as many of each team.
        let fitting =
            |wanted: u32| (1..=wanted.min(DECODERS) / n_teams).rev().map(|n| n * n_teams).find(fits).unwrap_or(0);
        let mut n_decoders = fitting(if small { n_teams * widest } else { DECODERS });
        // More row blocks than multiprocessors, of which none has room for two thread blocks: all at once all the same.
        let n_rows = matrices().map(DeviceMatrix::n_row_blocks).sum::<u32>() / n_teams;
        let own = DECLARED_BYTES + RESERVED_BYTES;
        let two_fit = 2 * (bytes(n_decoders) + own) <= self.shared_limit + own
            && 2 * (n_decoders + multipliers(n_decoders)) <= MANY_WARPS;
        if small && n_rows > self.n_multiprocessors && !two_fit {
            small = false;
            n_decoders = fitting(n_teams * widest * n_rows.div_ceil(self.n_multiprocessors));
        }
        if n_decoders == 0 {
            if !gated {
                let needs = Needs { warp_bytes: each, block_bytes: x_bytes, warps: 1 };
                self.fit(fixed, needs, 1, 0)?;
            }
            return Ok(Cut::default());
        }
        let cut_for = |n_decoders: u32| {
            let n_multipliers = multipliers(n_decoders);
            let mut cut = Cut { table_bytes, n_decoders, shared_bytes: bytes(n_decoders), ..Default::default() };
            cut.n_warps = n_decoders + n_multipliers;
            for (n_ctas, m) in cut.n_ctas.iter_mut().zip(matrices()) {
                // A multiplier for each row block, in as many rounds as that takes.
                let share = if gated { self.n_multiprocessors } else { self.share(m.n_blocks(), total).max(1) };
                let n_rows = m.n_row_blocks();
                let n_rounds = n_rows.div_ceil(n_multipliers / n_teams).div_ceil(share);
                *n_ctas = if small { n_rows } else { (share * n_rounds).min(n_rows) };
            }
            cut
        };
        let usual = cut_for(n_decoders);
        if small || n_decoders < DECODERS {
            return Ok(usual);
        }
        let wanted = (DECODERS..=MOST_DECODERS).step_by(n_teams as usize).filter(fits).map(cut_for);
        Ok(wanted
            .filter(|cut| cut.n_ctas == usual.n_ctas)
            .min_by_key(|cut| cut.turns(jobs, cut.n_decoders / n_teams))
            .unwrap_or(usual))
    }

    /// The launch that prepares the activations, a thread block a token. Those should fit on the multiprocessors that the product leaves idle, two on each: else
    /// some of its own wait for them. Where those have little to do, that counts most, and half as many threads take half of a multiprocessor. Where they have
    /// more, or wait anyway, the sooner it is over the better, so that each token has a multiprocessor for itself. Beside those of a product that keeps its
    /// codes they come to lie anywhere, and should fit beside 22 warps.
    fn prepare_grid(&self, n_tokens: u32, n_cols: u32, jobs: &[Job<'_>], cut: &Cut, all_ctas: u32) -> Grid {
        const MOST: u32 = 1024;
        const BESIDE_TILES: u32 = 576;
        const FEW_ROWS: u32 = 2;
        let fit = 2 * self.n_multiprocessors.saturating_sub(all_ctas) >= n_tokens;
        let few_rows = jobs.iter().zip(cut.n_ctas).all(|(job, n)| job.0.n_row_blocks().div_ceil(n) <= FEW_ROWS);
        let threads = match (cut.tiles, few_rows && !fit) {
            (true, _) => BESIDE_TILES,
            (_, true) => MOST / 2,
            _ => MOST,
        };
        // What the threads do not hold in registers; or more than half of a multiprocessor's.
        let kept_bytes = (4 * n_cols).saturating_sub(HELD_BYTES * threads).min(KEPT_BYTES);
        let shared_bytes =
            if few_rows || fit { kept_bytes } else { kept_bytes.max(self.shared_limit / 2 + RESERVED_BYTES) };
        Grid { blocks: (n_tokens, 1, 1), threads, shared_bytes }
    }

    /// Whether thread blocks, so many of each job, have less to do two by two than each by itself: seven row blocks for two, where that would be four for some.
    fn pairs(&self, jobs: &[Job<'_>], n_ctas: u32) -> bool {
        // Of more row blocks, half a one is too little to save.
        const MAX_ROWS: u32 = 16;
        let most = jobs[0].0.n_row_blocks().div_ceil(n_ctas);
        self.has_clusters
            && n_ctas.is_multiple_of(2)
            && most <= MAX_ROWS
            && jobs[0].0.n_row_blocks().div_ceil(n_ctas / 2) < 2 * most
            // Each gets half of the blocks, of whatever row blocks.
            && jobs.iter().all(|job| job.0.description.n_col_blocks.is_multiple_of(2))
    }

    /// How many of the multiprocessors a matrix has with so many of a launch's blocks.
    fn share(&self, n_blocks: u64, total: u64) -> u32 {
        (n_blocks * u64::from(self.n_multiprocessors) / total) as u32
    }
}

/// Raw bits that each of so many warps asks for at its start, in words a lane (`prefetch_raw` in decode.cuh): what the memory delivers while they start.
fn raw_words(n_warps: u64) -> u8 {
    const START_BYTES: u64 = 3 << 20;
    (START_BYTES / 128 / n_warps.max(1)).min(u8::MAX.into()) as u8
}

/// `Matrix::per_row` in decode.cuh: with one block a row block 2^32, which has no room, stands as 0.
fn per_row(n_col_blocks: usize) -> u32 {
    (1u64 << 32).div_ceil(n_col_blocks.max(1) as u64) as u32
}

/// Elements of a plain matrix.
pub(super) fn plain_len(n_rows: usize, n_cols: usize) -> usize {
    n_rows.next_multiple_of(PLAIN_ALIGN) * n_cols.next_multiple_of(PLAIN_ALIGN)
}

/// Bytes of the operand of up to 16 tokens of `n_cols` columns, of which those for integers take half; tiles of two units may make the kernels read one
/// behind the last.
fn operand_bytes(n_cols: usize) -> usize {
    n_cols.next_multiple_of(32) * 4 * PRODUCT_TOKENS
}

/// What a product of one token with such a matrix needs.
fn product_needs(matrix: &DeviceMatrix) -> Needs {
    let is_int8 = matrix.format == Format::Int8;
    let (warp_bytes, warps, cols) = match matrix.is_plain() {
        true => (PLAIN_BYTES, 16, PLAIN_BLOCK.1),
        false => (RING_BYTES + SCRATCH_BYTES, 32, 32),
    };
    // The activations are brought into shared memory, those for integers as two bytes; with what a sum is worth, and zeros.
    let n_cols = matrix.description.n_cols.next_multiple_of(cols);
    let block_bytes = n_cols * if is_int8 { 2 } else { 4 } + if matrix.is_plain() { n_cols / 8 } else { 0 } + 192;
    Needs { warp_bytes, block_bytes, warps }
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

#[cfg(test)]
mod tests {
    use super::*;
    use codecllm_codec::encoded::{Checks, EncodeOptions};
    use codecllm_codec::quantize::{Codes, code_value};
    use codecllm_codec::{Cpu, Dtype, Operand, Prefer, Tensor, encode_tensor};
    use half::bf16;
    use std::path::PathBuf;

    /// A GPU, its kernels and the way to its memory, or nothing where there is none and none is required.
    fn gpu() -> Option<(Device, EncodedKernels, Upload)> {
        match Device::open(0) {
            Ok(device) => {
                let (kernels, upload) = (EncodedKernels::new(&device).unwrap(), Upload::new(&device).unwrap());
                Some((device, kernels, upload))
            }
            Err(e) if std::env::var_os("CODECLLM_REQUIRE_CUDA").is_none_or(|v| v != "1") => {
                eprintln!("skipped, for want of a GPU: {e}");
                None
            }
            Err(e) => panic!("{e}"),
        }
    }

    fn random(n: usize, mut seed: u64) -> Vec<f32> {
        let mut next = move || {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (seed >> 40) as f32 / (1 << 24) as f32 - 0.5
        };
        (0..n).map(|_| (0..6).map(|_| next()).sum::<f32>()).collect()
    }

    fn tensor(n_rows: usize, n_cols: usize, seed: u64) -> Tensor {
        let data: Vec<u8> =
            random(n_rows * n_cols, seed).iter().flat_map(|v| bf16::from_f32(v * 0.1).to_le_bytes()).collect();
        Tensor { name: "w".into(), dtype: Dtype::Bf16, shape: vec![n_rows, n_cols], data: data.into() }
    }

    /// Tensors of odd shapes and all families of parameters, with what they are.
    fn tensors() -> Vec<(String, EncodedTensor)> {
        let mut all = Vec::new();
        let shapes = [(1, 1), (33, 31), (64, 512), (75, 1000), (100, 2080), (32, 4096)];
        for (i, (n_rows, n_cols)) in shapes.into_iter().enumerate() {
            let source = tensor(n_rows, n_cols, i as u64 + 1);
            for &format in Format::ALL {
                for prefer in [Prefer::Size, Prefer::Balanced, Prefer::Speed] {
                    let options = EncodeOptions { format, prefer, step: Some(0.01), ..Default::default() };
                    let bytes = encode_tensor(&source, &options).unwrap();
                    all.push((format!("{n_rows} × {n_cols} {format} {prefer:?}"), parse(bytes)));
                }
                for (g, t, k, w, c) in FAMILIES {
                    let block_cols = *c;
                    let mut params = Params {
                        parts_per_symbol: *g,
                        table_bits: *t,
                        raw_bits: *k,
                        part_bits: *w,
                        block_cols,
                        bias: 0,
                        trellis: false,
                    };
                    if format == Format::Bf16 {
                        // The magnitudes below about 0.25.
                        params.bias = (125 << 7) - (1 << (w + k.saturating_sub(1))).min(125 << 7);
                    }
                    if let Ok(bytes) =
                        encode_tensor(&source, &EncodeOptions { format, params: Some(params), ..Default::default() })
                    {
                        all.push((format!("{n_rows} × {n_cols} {format} {params:?}"), parse(bytes)));
                    }
                }
            }
        }
        assert!(all.len() > 200);
        all.extend(trellis_tensors());
        all
    }

    /// Codes of a trellis, of odd shapes and with all parts and raw bits that there are.
    fn trellis_tensors() -> Vec<(String, EncodedTensor)> {
        let sources = [(33, 31), (75, 1000)].map(|(n_rows, n_cols)| tensor(n_rows, n_cols, 3));
        let mut all = Vec::new();
        for (i, source) in sources.iter().enumerate() {
            for (parts_per_symbol, raw_bits, part_bits) in
                [1, 2, 4, 8].into_iter().flat_map(|g| (1..7).flat_map(move |k| (1..8 - k).map(move |w| (g, k, w))))
            {
                if parts_per_symbol * part_bits > 15 {
                    continue; // more than a symbol has
                }
                // Blocks of an odd number of units; few patches and many.
                let (block_cols, table_bits) = ([32, 96, 224, 512][(i + part_bits as usize) % 4], 8 + raw_bits % 3);
                let params =
                    Params { parts_per_symbol, table_bits, raw_bits, part_bits, block_cols, bias: 0, trellis: true };
                let step = Some([0.003, 0.02][(i + raw_bits as usize) % 2]);
                let options = EncodeOptions { format: Format::Rate, step, params: Some(params), ..Default::default() };
                all.push((format!("{:?} {params:?}", source.shape), parse(encode_tensor(source, &options).unwrap())));
            }
            for prefer in [Prefer::Size, Prefer::Balanced, Prefer::Speed] {
                let options = EncodeOptions {
                    format: Format::Rate,
                    prefer,
                    step: Some(0.01),
                    trellis: true,
                    ..Default::default()
                };
                all.push((
                    format!("{:?} trellis {prefer:?}", source.shape),
                    parse(encode_tensor(source, &options).unwrap()),
                ));
            }
        }
        all
    }

    /// G, T, k, w, C.
    const FAMILIES: &[(u32, u32, u32, u32, u32)] = &[
        (1, 5, 0, 7, 32),
        (1, 12, 1, 7, 96),
        (1, 13, 7, 6, 256),
        (1, 14, 8, 7, 2048),
        (1, 11, 15, 1, 64),
        (2, 14, 4, 4, 128),
        (2, 9, 3, 5, 224),
        (2, 12, 7, 1, 64),
        (2, 13, 7, 6, 512),
        (2, 10, 12, 3, 32),
        (4, 10, 2, 3, 128),
        (4, 12, 3, 3, 256),
        (4, 10, 4, 2, 512),
        (4, 10, 5, 2, 128),
        (4, 10, 6, 2, 512),
        (4, 13, 9, 3, 512),
        (4, 8, 9, 2, 64),
        (4, 8, 0, 3, 64),
        (4, 11, 0, 2, 256),
        (2, 9, 0, 4, 96),
        (4, 11, 11, 3, 1024),
        (8, 10, 3, 1, 64),
        (8, 10, 4, 1, 256),
        (8, 10, 7, 1, 256),
        (8, 14, 7, 1, 2048),
        (8, 10, 0, 1, 256),
        (8, 10, 10, 1, 96),
        (8, 10, 5, 1, 256),
        (8, 10, 6, 1, 512),
        (4, 11, 1, 3, 64),
        (4, 12, 10, 3, 512),
        (2, 13, 8, 5, 512),
    ];

    /// Tensors of so many blocks that each warp takes several, one behind the other.
    fn many_blocks() -> Vec<(String, EncodedTensor)> {
        // Some thread blocks have more row blocks of the second than others; of the third they have several, and warps' shares end within them; of the fourth
        // they have some together.
        let sources = [tensor(2080, 4096, 21), tensor(5760, 1024, 22), tensor(14336, 224, 23), tensor(14336, 256, 24)];
        let codecs = [
            (Format::Int8, 8, 10, 4, 1, 0),
            (Format::Int8, 4, 10, 6, 2, 0),
            (Format::Rate, 8, 10, 4, 1, 0),
            (Format::Rate, 4, 10, 2, 3, 0),
            (Format::Fp8, 2, 13, 3, 4, 0),
            (Format::Bf16, 4, 12, 9, 3, 116 << 7),
        ];
        let encode = |source: &Tensor, (format, parts_per_symbol, table_bits, raw_bits, part_bits, bias)| {
            let trellis = format == Format::Rate;
            let params = Params { parts_per_symbol, table_bits, raw_bits, part_bits, block_cols: 32, bias, trellis };
            let options = EncodeOptions { format, step: Some(0.01), params: Some(params), ..Default::default() };
            (format!("{:?} {format} {params:?}", source.shape), parse(encode_tensor(source, &options).unwrap()))
        };
        sources.iter().flat_map(|source| codecs.map(|codec| encode(source, codec))).collect()
    }

    /// Tensors of more columns than the threads that prepare activations hold, and than they keep in shared memory.
    fn many_columns() -> Vec<(String, EncodedTensor)> {
        let encode = |((n_rows, n_cols), format)| {
            let options = EncodeOptions { format, ..Default::default() };
            let what = format!("{n_rows} × {n_cols} {format}");
            (what, parse(encode_tensor(&tensor(n_rows, n_cols, 25), &options).unwrap()))
        };
        let shapes = [(40, 12_304), (33, 20_004)];
        shapes.into_iter().flat_map(|shape| [Format::Int8, Format::Bf16].map(|f| encode((shape, f)))).collect()
    }

    fn parse(bytes: Vec<u8>) -> EncodedTensor {
        EncodedTensor::parse(bytes.into(), Checks::Full).unwrap()
    }

    #[test]
    fn many_blocks_have_kernels_of_their_own() {
        for (what, t) in many_blocks() {
            assert!(is_fast(kernel_format(&t.layout()), t.params().unwrap()), "{what}");
        }
    }

    #[test]
    fn what_is_encoded_for_speed_has_kernels() {
        let source = tensor(256, 512, 7);
        // From 7 bits to 0.6.
        let steps = (0..16).map(|i| (Format::Rate, Some(0.002 * 2f32.powi(i / 2)), i % 2 == 1));
        for (format, step, trellis) in
            [Format::Int8, Format::Fp8, Format::Bf16].map(|f| (f, None, false)).into_iter().chain(steps)
        {
            let options = EncodeOptions { format, prefer: Prefer::Speed, step, trellis, ..Default::default() };
            let t = parse(encode_tensor(&source, &options).unwrap());
            let params = t.params().unwrap();
            assert!(is_fast(kernel_format(&t.layout()), params), "{format}, step {step:?}: {params:?}");
        }
    }

    fn code_bytes(tensor: &EncodedTensor) -> Vec<u8> {
        match tensor.decode_codes(Cpu::Scalar).unwrap() {
            Codes::U8(codes) => codes.into_owned(),
            Codes::U16(codes) => codes.iter().flat_map(|c| c.to_le_bytes()).collect(),
        }
    }

    #[track_caller]
    fn assert_same<T: PartialEq + std::fmt::Debug>(what: &str, n_cols: usize, found: &[T], expected: &[T]) {
        assert_eq!(found.len(), expected.len(), "{what}");
        if let Some(i) = (0..found.len()).find(|&i| found[i] != expected[i]) {
            let different = (0..found.len()).filter(|&i| found[i] != expected[i]).count();
            panic!(
                "{what}: element {i} (row {}, column {}) is {:?}, expected {:?}; {different} of {} differ",
                i / n_cols,
                i % n_cols,
                found[i],
                expected[i],
                found.len()
            );
        }
    }

    /// Golden files that decode.
    fn vectors() -> Vec<(String, EncodedTensor)> {
        let root = std::env::var_os("CARGO_MANIFEST_DIR").map_or(PathBuf::from("."), |d| PathBuf::from(d).join(".."));
        let files = std::fs::read_dir(root.join("vectors")).unwrap().map(|f| f.unwrap().path());
        let bins: Vec<PathBuf> = files.filter(|f| f.extension().is_some_and(|e| e == "bin")).collect();
        assert!(bins.len() > 30);
        let name = |f: &PathBuf| f.file_name().unwrap().to_string_lossy().into_owned();
        let good = bins.iter().filter(|f| !name(f).starts_with("bad-") && !name(f).contains("zstd"));
        good.map(|f| (name(f), parse(std::fs::read(f).unwrap()))).collect()
    }

    #[test]
    fn decodes_to_the_codes_of_the_plain_decoder() {
        let Some((device, kernels, mut upload)) = gpu() else { return };
        let stream = device.stream();
        let all: Vec<_> = vectors().into_iter().chain(tensors()).chain(many_blocks()).collect();
        // Twelve at once, of any kind.
        for tensors in all.chunks(12) {
            let made = tensors.iter().map(|(_, t)| DeviceMatrix::upload(&device, &kernels, &mut upload, t).unwrap());
            let matrices: Vec<DeviceMatrix> = made.collect();
            let mut codes: Vec<CudaSlice<u8>> = tensors
                .iter()
                .map(|(_, t)| stream.clone_htod(&vec![0xa5; t.n_rows() * t.n_cols() * 2]).unwrap())
                .collect();
            let mut jobs: Vec<_> = matrices.iter().zip(&mut codes).collect();
            kernels.decode_codes(&device, &mut jobs).unwrap();
            let mut values: Vec<CudaSlice<bf16>> =
                tensors.iter().map(|(_, t)| stream.alloc_zeros(t.n_rows() * t.n_cols()).unwrap()).collect();
            let mut jobs: Vec<_> = matrices.iter().zip(&mut values).collect();
            kernels.decode(&device, &mut jobs).unwrap();
            for ((what, t), (codes, values)) in tensors.iter().zip(codes.iter().zip(&values)) {
                let expected = code_bytes(t);
                let found = stream.clone_dtoh(codes).unwrap();
                assert_same(what, t.n_cols(), &found[..expected.len()], &expected);
                assert!(found[expected.len()..].iter().all(|&b| b == 0xa5), "{what}: bytes behind the matrix changed");
                let decoded = t.decode_codes(Cpu::Scalar).unwrap();
                let expected: Vec<u16> = (0..decoded.len())
                    .map(|i| bf16::from_f32(code_value(t.format(), decoded.get(i)) * t.scale(i / t.n_cols())).to_bits())
                    .collect();
                let found: Vec<u16> = stream.clone_dtoh(values).unwrap().iter().map(|v| v.to_bits()).collect();
                assert_same(what, t.n_cols(), &found, &expected);
            }
        }
    }

    #[test]
    fn gathers_rows() {
        let Some((device, kernels, mut upload)) = gpu() else { return };
        let stream = device.stream();
        for (what, t) in vectors().into_iter().chain(tensors()) {
            let matrix = DeviceMatrix::upload(&device, &kernels, &mut upload, &t).unwrap();
            let (last, n_cols) = (t.n_rows() - 1, t.n_cols());
            let rows = [last as u32, 0, last as u32 / 2, u32::MAX];
            let mut out = stream.clone_htod(&vec![7f32; 4 * n_cols]).unwrap();
            let tokens = stream.clone_htod(&rows).unwrap();
            kernels.gather_rows(&device, &matrix, &tokens, 4, &mut out).unwrap();
            let mut expected = vec![7f32; 4 * n_cols];
            for (row, out) in rows[..3].iter().map(|&r| r as usize).zip(expected.chunks_mut(n_cols)) {
                t.decode_rows(Cpu::Scalar, row..row + 1, out).unwrap();
            }
            assert_same(&what, n_cols, &stream.clone_dtoh(&out).unwrap(), &expected);
        }
    }

    #[test]
    fn products_agree_with_the_decoded_weights() {
        let Some((device, kernels, mut upload)) = gpu() else { return };
        let mut operand = kernels.operand(&device, 20_004).unwrap();
        let stream = device.stream();
        for (what, t) in vectors().into_iter().chain(tensors()).chain(many_blocks()).chain(many_columns()) {
            let matrix = DeviceMatrix::upload(&device, &kernels, &mut upload, &t).unwrap();
            let (n_rows, n_cols) = (t.n_rows(), t.n_cols());
            let bias = random(n_rows, 5);
            let bias_dev = stream.clone_htod(&bias).unwrap();
            let codes = t.decode_codes(Cpu::Scalar).unwrap();
            let value = |i: usize| f64::from(code_value(t.format(), codes.get(i)) * t.scale(i / n_cols));
            let values: Vec<f64> = (0..n_rows * n_cols).map(value).collect();
            for n_tokens in [1, 2, 8, 9, 16] {
                let x = random(n_tokens * n_cols, n_tokens as u64);
                let x_dev = stream.clone_htod(&x).unwrap();
                let mut outs: Vec<CudaSlice<f32>> =
                    (0..2).map(|_| stream.clone_htod(&vec![f32::NAN; n_tokens * n_rows]).unwrap()).collect();
                let [plain, biased] = &mut outs[..] else { unreachable!() };
                let mut products = [
                    Product { matrix: &matrix, bias: None, out: plain, adds: false, first: 0 },
                    Product { matrix: &matrix, bias: Some(&bias_dev), out: biased, adds: false, first: 0 },
                ];
                kernels.product(&device, &mut operand, plain_input(&x_dev, n_tokens), &mut products).unwrap();
                let found: Vec<Vec<f32>> = outs.iter().map(|o| stream.clone_dtoh(o).unwrap()).collect();
                if t.format().is_integer() {
                    let mut y = vec![0f32; n_rows * n_tokens];
                    t.product(Cpu::Scalar, &Operand::new(&x, n_cols), 0..n_rows, &mut y).unwrap();
                    let expected: Vec<f32> =
                        (0..n_tokens * n_rows).map(|i| y[i % n_rows * n_tokens + i / n_rows]).collect();
                    assert_same(&format!("{what}, {n_tokens} tokens"), n_rows, &found[0], &expected);
                }
                // Of many rows some: there are as many in every row block.
                let all = found[0].iter().zip(&found[1]).enumerate();
                for (i, (&y, &with_bias)) in all.step_by(if n_rows > 1000 { 37 } else { 1 }) {
                    let (token, row) = (i / n_rows, i % n_rows);
                    let x = &x[token * n_cols..][..n_cols];
                    let terms = values[row * n_cols..].iter().zip(x).map(|(w, &x)| w * f64::from(x));
                    let (sum, all) = terms.fold((0.0, 0.0), |(s, a), v| (s + v, a + v.abs()));
                    // Patched weights count as what stands in their place, too.
                    let filler =
                        f64::from(code_value(t.format(), t.params().unwrap().filler(t.format())) * t.scale(row));
                    let patched =
                        if t.sections().patches.is_empty() { 0.0 } else { filler.abs() * n_cols as f64 * 3.0 };
                    let limit = match t.format() {
                        Format::Int8 | Format::Rate => 1e-3 * all,
                        _ => 2f64.powi(-16) * (all + patched),
                    };
                    assert!(
                        (f64::from(y) - sum).abs() <= limit,
                        "{what}, {n_tokens} tokens: row {row} of token {token} is {y}, expected {sum} within {limit:e}"
                    );
                    assert_eq!(with_bias, y + bias[row]);
                }
            }
        }
    }

    #[test]
    fn plain_and_encoded_bf16_make_the_same_products() {
        let Some((device, kernels, mut upload)) = gpu() else { return };
        let mut operand = kernels.operand(&device, 4096).unwrap();
        let stream = device.stream();
        // With few parts and many, so with patches everywhere and without.
        let params = |parts_per_symbol, table_bits, raw_bits, part_bits, bias| {
            Some(Params { parts_per_symbol, table_bits, raw_bits, part_bits, block_cols: 256, bias, trellis: false })
        };
        let all_params =
            [params(4, 12, 9, 3, 116 << 7), params(4, 10, 10, 2, 0x7a << 7), params(2, 13, 7, 5, 116 << 7), None];
        let (mut n_same, mut n_close) = (0, 0);
        for (n_rows, n_cols) in [(1, 1), (33, 31), (75, 1000), (2080, 4096), (5760, 1024), (4256, 2048)] {
            for params in all_params {
                let source = tensor(n_rows, n_cols, n_rows as u64);
                let options = EncodeOptions { format: Format::Bf16, params, ..Default::default() };
                let t = parse(encode_tensor(&source, &options).unwrap());
                let encoded = DeviceMatrix::upload(&device, &kernels, &mut upload, &t).unwrap();
                let stride = n_cols.next_multiple_of(PLAIN_ALIGN);
                let mut padded = vec![0; plain_len(n_rows, n_cols)];
                for (to, from) in padded.chunks_mut(stride).zip(source.data.chunks(2 * n_cols)) {
                    to.iter_mut().zip(from.as_chunks().0).for_each(|(to, from)| *to = u16::from_le_bytes(*from));
                }
                let data = stream.clone_htod(&padded).unwrap();
                let plain = DeviceMatrix::plain(&kernels, data.device_ptr(stream).0, n_rows, n_cols).unwrap();
                let norm = stream.clone_htod(&random(n_cols, 8)).unwrap();
                let bias = stream.clone_htod(&random(n_rows, 5)).unwrap();
                for norm in [None, Some((&norm, 1e-5))] {
                    let x = stream.clone_htod(&random(2 * n_cols, 7)).unwrap();
                    let input = Activations { data: &x, first: 1, n_tokens: 1, norm };
                    let found = [&plain, &encoded].map(|matrix| {
                        let new = || stream.clone_htod(&vec![f32::NAN; n_rows]).unwrap();
                        let (mut sums, mut gated, mut unused) = (new(), new(), new());
                        let product = |out, bias| Product { matrix, bias, out, first: 0, adds: false };
                        kernels.product(&device, &mut operand, input, &mut [product(&mut sums, Some(&bias))]).unwrap();
                        let pair = &mut [product(&mut gated, Some(&bias)), product(&mut unused, None)];
                        assert!(kernels.gated_product(&device, &mut operand, input, pair).unwrap());
                        [sums, gated].map(|out| stream.clone_dtoh(&out).unwrap())
                    });
                    let what = format!("{n_rows} × {n_cols}, norm {}, {params:?}", norm.is_some());
                    let [[plain_sums, plain_gated], [sums, gated]] = found;
                    // To the bit, but for the rows with patches: those are added after the sums of their groups.
                    let n_patches = t.sections().patches.len() / 4;
                    for (found, expected) in [(&sums, &plain_sums), (&gated, &plain_gated)] {
                        if n_patches == 0 {
                            assert_same(&what, n_rows, found, expected);
                        }
                        let pairs = || found.iter().zip(expected);
                        let n_different = pairs().filter(|(a, b)| a != b).count();
                        assert!(n_different <= n_patches, "{what}: {n_different} rows differ; {n_patches} patches");
                        let most = pairs().map(|(a, b)| (a - b).abs() / (1.0 + b.abs())).fold(0.0, f32::max);
                        assert!(most < 1e-5, "{what}: a row differs by {most}");
                    }
                    n_same += usize::from(n_patches == 0);
                    n_close += usize::from(n_patches > 0);
                }
            }
        }
        assert!(n_same > 3 && n_close > 3, "{n_same} without patches, {n_close} with");
    }

    #[test]
    fn matrices_of_different_heights_share_a_launch() {
        let Some((device, kernels, mut upload)) = gpu() else { return };
        let stream = device.stream();
        let mut operand = kernels.operand(&device, 1024).unwrap();
        let encode = |n_rows: usize, block_cols| {
            let params = Params {
                parts_per_symbol: 8,
                table_bits: 10,
                raw_bits: 7,
                part_bits: 1,
                block_cols,
                bias: 0,
                trellis: false,
            };
            let options = EncodeOptions { format: Format::Int8, params: Some(params), ..Default::default() };
            parse(encode_tensor(&tensor(n_rows, 1024, n_rows as u64), &options).unwrap())
        };
        // The second three are decoded to tiles before the activations are known.
        let sets = [([5760, 96, 33], 32), ([160, 96, 33], 64)];
        let sets = sets.map(|(heights, block_cols)| {
            let upload = |n| DeviceMatrix::upload(&device, &kernels, &mut upload, &encode(n, block_cols)).unwrap();
            (heights, heights.map(upload))
        });
        for ((heights, matrices), n_tokens) in sets.iter().flat_map(|set| [1, 5, 16].map(|n| (set, n))) {
            let x = stream.clone_htod(&random(n_tokens * 1024, 3)).unwrap();
            let mut outs = heights.map(|n| stream.alloc_zeros::<f32>(n_tokens * n).unwrap());
            let mut alone = heights.map(|n| stream.alloc_zeros::<f32>(n_tokens * n).unwrap());
            let product = |(matrix, out)| Product { matrix, bias: None, out, adds: false, first: 0 };
            let mut together: Vec<_> = matrices.iter().zip(&mut outs).map(product).collect();
            kernels.product(&device, &mut operand, plain_input(&x, n_tokens), &mut together).unwrap();
            for pair in matrices.iter().zip(&mut alone) {
                kernels.product(&device, &mut operand, plain_input(&x, n_tokens), &mut [product(pair)]).unwrap();
            }
            for (&n_rows, (together, alone)) in heights.iter().zip(outs.iter().zip(&alone)) {
                let [together, alone] = [together, alone].map(|out| stream.clone_dtoh(out).unwrap());
                assert_same(&format!("{n_rows} rows, {n_tokens} tokens"), n_rows, &together, &alone);
            }
        }
    }

    fn plain_input(data: &CudaSlice<f32>, n_tokens: usize) -> Activations<'_> {
        Activations { data, first: 0, n_tokens, norm: None }
    }

    #[test]
    fn norms_gates_and_sums_are_part_of_products() {
        const EPS: f32 = 1e-5;
        let Some((device, kernels, mut upload)) = gpu() else { return };
        let mut operand = kernels.operand(&device, 4096).unwrap();
        let stream = device.stream();
        for (what, t) in tensors().into_iter().chain(many_blocks()) {
            // Its partner has the same shape and kernels, and other parameters where the encoder chooses them.
            let partner = tensor_like(&t);
            let matrices = [&t, &partner].map(|t| DeviceMatrix::upload(&device, &kernels, &mut upload, t).unwrap());
            let (n_rows, n_cols) = (t.n_rows(), t.n_cols());
            let values = [&t, &partner].map(|t| {
                let codes = t.decode_codes(Cpu::Scalar).unwrap();
                let value = |i| f64::from(code_value(t.format(), codes.get(i)) * t.scale(i / n_cols));
                (0..n_rows * n_cols).map(value).collect::<Vec<f64>>()
            });
            for n_tokens in [1, 3] {
                // The tokens before the last are not asked for.
                let x = random((n_tokens + 1) * n_cols, 11);
                let weight = random(n_cols, 12);
                let (x_dev, weight_dev) = (stream.clone_htod(&x).unwrap(), stream.clone_htod(&weight).unwrap());
                let norm = (n_tokens == 1).then_some((&weight_dev, EPS));
                let input = Activations { data: &x_dev, first: 1, n_tokens, norm };
                let row = |token: usize| {
                    let x = x[(token + 1) * n_cols..][..n_cols].iter().map(|&v| f64::from(v));
                    let mean = x.clone().map(|v| v * v).sum::<f64>() / n_cols as f64;
                    let root = (mean + f64::from(EPS)).sqrt();
                    let normed = x.clone().zip(&weight).map(|(v, &w)| v / root * f64::from(w));
                    if norm.is_some() { normed.collect::<Vec<_>>() } else { x.collect() }
                };
                // The product, and what it may be off by.
                let expected = |which: usize, i: usize| {
                    let weights = &values[which][i % n_rows * n_cols..][..n_cols];
                    let terms = weights.iter().zip(row(i / n_rows)).map(|(w, x)| w * x);
                    terms.fold((0.0, 0.0), |(sum, all), v| (sum + v, all + 1e-3 * v.abs()))
                };
                let before = random(n_tokens * n_rows, 13);
                let mut sums = stream.clone_htod(&before).unwrap();
                let products =
                    &mut [Product { matrix: &matrices[0], bias: None, out: &mut sums, adds: true, first: 0 }];
                kernels.product(&device, &mut operand, input, products).unwrap();
                let sums = stream.clone_dtoh(&sums).unwrap();
                let biases = [14, 15].map(|seed| random(n_rows, seed));
                let biases_dev = [0, 1].map(|i| stream.clone_htod(&biases[i]).unwrap());
                let [mut gated, mut unused] =
                    [(); 2].map(|()| stream.clone_htod(&vec![f32::NAN; n_tokens * n_rows]).unwrap());
                let product = |i: usize, out| Product {
                    matrix: &matrices[i],
                    bias: Some(&biases_dev[i]),
                    out,
                    adds: false,
                    first: 0,
                };
                let pair = &mut [product(0, &mut gated), product(1, &mut unused)];
                let together = kernels.gated_product(&device, &mut operand, input, pair).unwrap();
                let fit = matrices.iter().all(|m| m.table_bytes() <= 8 << 13);
                assert_eq!(together, fit && Arc::ptr_eq(&matrices[0].kernels, &matrices[1].kernels), "{what}");
                let gated = stream.clone_dtoh(&gated).unwrap();
                for i in (0..n_tokens * n_rows).step_by(7) {
                    let ((a, a_off), (b, b_off)) = (expected(0, i), expected(1, i));
                    let (found, wanted) = (f64::from(sums[i]), f64::from(before[i]) + a);
                    assert!((found - wanted).abs() <= a_off + 1e-6, "{what}: sum {i} is {found}, expected {wanted}");
                    if !together {
                        continue;
                    }
                    let [a, b] = [a + f64::from(biases[0][i % n_rows]), b + f64::from(biases[1][i % n_rows])];
                    let silu = |v: f64| v / (1.0 + (-v).exp());
                    let (found, wanted) = (f64::from(gated[i]), silu(a) * b);
                    let off = 1.2 * a_off * b.abs() + silu(a).abs() * b_off + a_off * b_off + 1e-6;
                    assert!((found - wanted).abs() <= off, "{what}: gated {i} is {found}, expected {wanted} ± {off}");
                }
            }
        }
    }

    /// Another tensor of the same format and shape.
    fn tensor_like(t: &EncodedTensor) -> EncodedTensor {
        let source = tensor(t.n_rows(), t.n_cols(), 99);
        let options =
            EncodeOptions { format: t.format(), prefer: Prefer::Speed, step: Some(0.02), ..Default::default() };
        parse(encode_tensor(&source, &options).unwrap())
    }

    /// Apart from the next, for the sanitizer takes its time.
    #[test]
    fn a_corrupt_vector_stays_in_bounds() {
        corrupt(vectors());
        // The same for what no vector has.
        let Some((device, kernels, _)) = gpu() else { return };
        let (n_rows, n_cols) = (75, 1000);
        let stream = device.stream();
        let data = stream.alloc_zeros::<bf16>(plain_len(n_rows, n_cols)).unwrap();
        let matrix = DeviceMatrix::plain(&kernels, data.device_ptr(stream).0, n_rows, n_cols).unwrap();
        let x = stream.clone_htod(&random(n_cols, 1)).unwrap();
        let mut out = stream.clone_htod(&vec![f32::NAN; n_rows]).unwrap();
        let mut products = [Product { matrix: &matrix, bias: None, out: &mut out, first: 0, adds: false }];
        let operand = &mut kernels.operand(&device, 0).unwrap();
        kernels.product(&device, operand, plain_input(&x, 1), &mut products).unwrap();
        assert_eq!(stream.clone_dtoh(&out).unwrap(), [0.0; 75]);
    }

    #[test]
    fn a_corrupt_tensor_stays_in_bounds() {
        corrupt(tensors());
    }

    /// Decodes and multiplies tensors whose payload is noise.
    fn corrupt(tensors: Vec<(String, EncodedTensor)>) {
        let Some((device, kernels, mut upload)) = gpu() else { return };
        let stream = device.stream();
        let mut operand = kernels.operand(&device, 4096).unwrap();
        for (what, t) in tensors {
            let mut bytes = t.bytes().to_vec();
            let noise = random(bytes.len(), 9);
            for at in t.sections().raw.start..t.sections().stream.end {
                bytes[at] = noise[at].to_bits() as u8;
            }
            // Between sections there are zeros.
            bytes[t.sections().raw.end..t.sections().stream.start].fill(0);
            let t = EncodedTensor::parse(bytes.into(), Checks::None).unwrap_or_else(|e| panic!("{what}: {e}"));
            let matrix = DeviceMatrix::upload(&device, &kernels, &mut upload, &t).unwrap();
            let mut values = stream.alloc_zeros(t.n_rows() * t.n_cols()).unwrap();
            kernels.decode(&device, &mut [(&matrix, &mut values)]).unwrap();
            for n_tokens in [1, 3, 16] {
                let x = stream.clone_htod(&random(n_tokens * t.n_cols(), 1)).unwrap();
                let mut out = stream.alloc_zeros(n_tokens * t.n_rows()).unwrap();
                let mut products = [Product { matrix: &matrix, bias: None, out: &mut out, adds: false, first: 0 }];
                kernels.product(&device, &mut operand, plain_input(&x, n_tokens), &mut products).unwrap();
            }
            device.synchronize().unwrap();
        }
    }
}
