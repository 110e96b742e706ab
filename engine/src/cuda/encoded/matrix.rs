//! Matrices in a GPU's memory, and which kernels take them.

use super::super::device::Device;
use super::super::host::Upload;
use super::{EncodedInstance, EncodedKernels, Instance};
use crate::error::{Error, Result};
use codecllm_codec::block::{BLOCK_ROWS, Params};
use codecllm_codec::{EncodedTensor, Format, Layout};
use cudarc::driver::{CudaSlice, DevicePtr};
use std::sync::Arc;

/// Rows and columns of a plain matrix's blocks: four groups of columns whose sums are float32 (`GROUP` in one_token.cuh).
pub(super) const PLAIN_BLOCK: (u32, u32) = (8, 512);
/// Rows and columns of plain matrices are padded to a multiple of this.
pub(in crate::cuda) const PLAIN_ALIGN: usize = 8;
/// Row blocks that the kernels count.
const MAX_ROW_BLOCKS: usize = 1 << 16;
/// The formats that have kernels.
pub(super) const FORMATS: [Format; 3] = [Format::Int8, Format::Fp8, Format::Bf16];
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
pub(super) struct Description {
    pub table: u64,
    pub stream: u64,
    pub offsets: u64,
    pub raw: u64,
    pub patch_offsets: u64,
    pub patches: u64,
    pub scales: u64,
    pub n_rows: u32,
    pub n_cols: u32,
    pub block_cols: u32,
    pub n_col_blocks: u32,
    pub n_units: u32,
    pub per_row: u32,
    pub table_bits: u32,
    pub scale_kind: u32,
    pub bias: i32,
    pub filler: u32,
    pub parts_per_symbol: u8,
    pub raw_bits: u8,
    pub part_bits: u8,
    pub trellis: u8,
}

impl Description {
    /// Blocks of so many rows.
    pub fn n_blocks(&self, block_rows: u32) -> u64 {
        u64::from(self.n_rows.div_ceil(block_rows)) * u64::from(self.n_col_blocks)
    }
}

/// A matrix in a GPU's memory.
pub(in crate::cuda) struct DeviceMatrix {
    pub(super) format: Format,
    pub(super) description: Description,
    bytes: u64,
    pub(super) kernels: Arc<Instance>,
    /// What the kernels know its codec by, or 0.
    pub(super) codec: u16,
    /// What the description points to; none where that is another's.
    _storage: Option<(CudaSlice<u8>, CudaSlice<u8>)>,
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
    pub(super) fn describe(kernels: &EncodedKernels, tensor: &Layout, base: u64, table: u64) -> Result<Self> {
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

    pub(super) fn is_plain(&self) -> bool {
        self.kernels.encoded.is_none()
    }

    pub(super) fn encoded_kernels(&self) -> Result<&EncodedInstance> {
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

    pub(super) fn block_rows(&self) -> u32 {
        if self.is_plain() { PLAIN_BLOCK.0 } else { BLOCK_ROWS as u32 }
    }

    pub(super) fn n_row_blocks(&self) -> u32 {
        self.description.n_rows.div_ceil(self.block_rows())
    }

    pub(super) fn n_blocks(&self) -> u64 {
        self.description.n_blocks(self.block_rows())
    }

    pub(super) fn table_bytes(&self) -> u32 {
        if self.is_plain() { 0 } else { 8 << self.description.table_bits }
    }
}

/// The format whose kernels read a tensor: codes of `rate` are those of `int8`.
pub(super) fn kernel_format(tensor: &Layout) -> Format {
    if tensor.format().is_integer() { Format::Int8 } else { tensor.format() }
}

/// A format's place in `FORMATS`.
fn format_index(format: Format) -> usize {
    FORMATS.iter().position(|&f| f == format).unwrap_or(0)
}

/// Whether there are kernels for these parameters.
pub(super) fn is_fast(format: Format, params: &Params) -> bool {
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
pub(super) fn table_entries(tensor: &Layout, params: &Params) -> Vec<u64> {
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
pub(super) fn check_layout(tensor: &Layout) -> Result<&Params> {
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

/// `Matrix::per_row` in decode.cuh: with one block a row block 2^32, which has no room, stands as 0.
fn per_row(n_col_blocks: usize) -> u32 {
    (1u64 << 32).div_ceil(n_col_blocks.max(1) as u64) as u32
}

/// Elements of a plain matrix.
pub(in crate::cuda) fn plain_len(n_rows: usize, n_cols: usize) -> usize {
    n_rows.next_multiple_of(PLAIN_ALIGN) * n_cols.next_multiple_of(PLAIN_ALIGN)
}
