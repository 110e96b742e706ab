//! The encoder: quantized codes, parameters that suit them, and the bytes of `docs/format.md`.

use super::decode::CodeType;
use super::header::{Header, ScaleKind, Sections, ZSTD_CHUNK_BYTES, metadata_checksum};
use crate::block::{BLOCK_ROWS, BlockEncoder, EncodedRowBlock, Params, Patch, STREAM_ALIGN, SplitTable, raw_fields};
use crate::checkpoint::Tensor;
use crate::entropy::choose_table;
use crate::error::{Error, Result};
use crate::feedback::{Grid, InputFactor, quantize_with_feedback};
use crate::format::{Coder, Format, ScaleMode};
use crate::quantize::{
    Codes, QuantizedTensor, Scales, matrix_shape, nearby_codes, quantize, quantize_to_step, quantize_to_trellis,
};
use rayon::prelude::*;
use std::borrow::Cow;
use xxhash_rust::xxh3::xxh3_64;

const ZSTD_LEVEL: i32 = 9;

/// What the encoder should favour among parameters that all decode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Prefer {
    /// The smallest archive.
    Size,
    /// Up to about 1 % larger, where that doubles the weights a table look-up yields.
    #[default]
    Balanced,
    /// Short blocks and many weights a look-up, for GPUs.
    Speed,
}

impl Prefer {
    /// What the work of decoding is charged, in bits a weight: look-ups, of which a symbol of more parts needs fewer, and
    /// the fields that raw bits are gathered from.
    fn work_cost(self, format: Format, params: &Params) -> f64 {
        let table = f64::from(params.table_bits.saturating_sub(10));
        let look_ups = match (self, params.parts_per_symbol) {
            (Self::Size, _) => return 0.0,
            (Self::Balanced, 1) => 0.30,
            (Self::Balanced, 2) => 0.08 + 0.002 * table,
            (Self::Balanced, _) => 0.002 * table,
            (Self::Speed, 1) => 1.0,
            // What GPU kernels are made for, where the codes are integers: eight parts of one bit, or four, or two without raw bits.
            (Self::Speed, 2) if !format.is_integer() || params.raw_bits == 0 => 0.45 + 0.01 * table,
            (Self::Speed, 8) if format.is_integer() && (3..=7).contains(&params.raw_bits) => 0.01 * table,
            (Self::Speed, 4) if format.is_integer() && params.raw_bits <= 6 => 0.30 + 0.01 * table,
            (Self::Speed, 4) if !format.is_integer() => 0.16 + 0.01 * table,
            (Self::Speed, _) => 1.0,
        };
        look_ups + 0.008 * raw_fields(params.raw_bits).count() as f64
    }

    /// Columns a block: as even as the limit allows.
    fn block_cols(self, n_cols: usize) -> u32 {
        let limit = match self {
            Self::Size => 2048,
            Self::Balanced => 1024,
            // Many blocks share a GPU's work evenly.
            Self::Speed => 256,
        };
        (n_cols.div_ceil(n_cols.div_ceil(limit)).next_multiple_of(32)) as u32
    }
}

impl std::str::FromStr for Prefer {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        match s {
            "size" => Ok(Self::Size),
            "balanced" => Ok(Self::Balanced),
            "speed" => Ok(Self::Speed),
            _ => Err(Error::Parameter(format!("unknown preference `{s}`; expected size, balanced or speed"))),
        }
    }
}

/// How to encode a tensor.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EncodeOptions {
    /// What a code means.
    pub format: Format,
    /// What shares a scale (ignored by `bf16`).
    pub scale: ScaleMode,
    /// How codes become bytes.
    pub coder: Coder,
    /// What to favour.
    pub prefer: Prefer,
    /// `rate`: the distance of neighbouring grid points, in units of the weights; the others have none.
    pub step: Option<f32>,
    /// `rate`: codes of a [trellis](crate::trellis), which have less error at the same bits. Coder `rans` alone has them.
    pub trellis: bool,
    /// The coder's parameters; `None` has the encoder choose them. `prefer` and `trellis` are then without effect, and `zstd` has none.
    pub params: Option<Params>,
}

impl Default for EncodeOptions {
    fn default() -> Self {
        Self {
            format: Format::Int8,
            scale: ScaleMode::Channel,
            coder: Coder::Rans,
            prefer: Prefer::Balanced,
            step: None,
            trellis: false,
            params: None,
        }
    }
}

impl EncodeOptions {
    /// Whether its parts go together.
    pub(crate) fn check(&self) -> Result<()> {
        if self.trellis && (self.format != Format::Rate || self.coder != Coder::Rans) {
            return Err(Error::Parameter(format!(
                "format `{}` with coder `{}` has no trellis; format `rate` with coder `rans` has",
                self.format, self.coder
            )));
        }
        self.params.map_or(Ok(()), |params| params.validate(self.format))
    }
}

/// Encodes a matrix: the bytes of `docs/format.md`. Works on all threads of the current rayon pool; the result does not
/// depend on their number.
///
/// # Errors
/// A tensor that is not a non-empty matrix of BF16, F16 or F32; a weight that the format cannot hold; parameters that break
/// the format's rules.
pub fn encode_tensor(t: &Tensor, options: &EncodeOptions) -> Result<Vec<u8>> {
    let mut params = options.params;
    options.check()?;
    matrix_shape(t)?;
    let q = match (options.format, options.step) {
        (Format::Rate, Some(step)) => {
            let (q, chosen) = quantize_for_coder(t, step, options)?;
            params = chosen;
            q
        }
        (Format::Rate, None) => return Err(Error::Parameter("`rate` needs the step of its grid".into())),
        (format, _) => quantize(t, format, options.scale)?,
    };
    encode_quantized(t, q, params, options)
}

/// Encodes a matrix for inputs whose second moments are known: `rate` with error feedback, which makes the products' error small
/// rather than the weights'. The codes follow from `factor` as well as from the matrix, so that `t` alone does not yield them again.
///
/// `targets`, where given, are the weights to come close to in place of the matrix's own: see [`Correction`](crate::feedback::Correction).
///
/// # Errors
/// As [`encode_tensor`]; a format other than `rate`; a factor or targets that do not fit the matrix.
pub fn encode_with_feedback(
    t: &Tensor,
    options: &EncodeOptions,
    factor: &InputFactor,
    targets: Option<&[f32]>,
) -> Result<Vec<u8>> {
    let (Format::Rate, Some(step)) = (options.format, options.step) else {
        return Err(Error::Parameter("only `rate`, whose grid has a step, is encoded with error feedback".into()));
    };
    options.check()?;
    let (n_rows, n_cols) = matrix_shape(t)?;
    let mut params = options.params;
    let mut grid = Grid { step, raw_bits: None, trellis: None, targets };
    if options.coder == Coder::Rans {
        if params.is_none() {
            let nearest = match options.trellis {
                true => nearby_codes(t, step)?,
                false => quantize_with_feedback(t, &grid, factor)?.codes,
            };
            params = Some(params_for(&nearest, n_rows, n_cols, options));
        }
        grid.raw_bits = params.map(|p| p.raw_bits);
        grid.trellis = params.filter(|p| p.trellis).map(|p| p.block_cols as usize);
    }
    let q = quantize_with_feedback(t, &grid, factor)?;
    encode_quantized(t, q, params, options)
}

/// The bytes of a quantized matrix; `t` says what it was.
fn encode_quantized(
    t: &Tensor,
    q: QuantizedTensor<'_>,
    params: Option<Params>,
    options: &EncodeOptions,
) -> Result<Vec<u8>> {
    let (n_rows, n_cols) = matrix_shape(t)?;
    let header = Header {
        format: options.format,
        coder: options.coder,
        scale_kind: match q.scales {
            Scales::None => ScaleKind::None,
            Scales::Tensor(_) => ScaleKind::Tensor,
            Scales::Channel(_) => ScaleKind::Channel,
            Scales::Absmax(_) => ScaleKind::Absmax,
        },
        source_dtype: t.dtype,
        n_rows,
        n_cols,
        params: Params {
            parts_per_symbol: 0,
            table_bits: 0,
            raw_bits: 0,
            part_bits: 0,
            block_cols: 0,
            bias: 0,
            trellis: false,
        },
        table_bytes: 0,
        n_patches: 0,
        stream_bytes: 0,
        relative_error: q.relative_error,
        step: options.step.filter(|_| options.format == Format::Rate).unwrap_or(0.0),
        total_bytes: 0,
    };
    let scales = scale_bytes(&q.scales);
    match (options.coder, q.codes) {
        (Coder::Zstd, Codes::U8(codes)) => encode_zstd(header, &scales, &codes),
        (Coder::Zstd, Codes::U16(codes)) => {
            let bytes: Vec<u8> = codes.iter().flat_map(|c| c.to_le_bytes()).collect();
            encode_zstd(header, &scales, &bytes)
        }
        (Coder::Rans, Codes::U8(codes)) => encode_rans(header, &scales, codes, options.prefer, params),
        (Coder::Rans, Codes::U16(codes)) => encode_rans(header, &scales, codes, options.prefer, params),
    }
}

/// `rate`: the coder's parameters for the nearest grid points, then the codes that cost least with these.
fn quantize_for_coder<'a>(
    t: &'a Tensor,
    step: f32,
    options: &EncodeOptions,
) -> Result<(QuantizedTensor<'a>, Option<Params>)> {
    if options.coder == Coder::Zstd {
        return Ok((quantize_to_step(t, step, None)?, None));
    }
    let params = match options.params {
        Some(params) => params,
        None => {
            let nearest = match options.trellis {
                true => nearby_codes(t, step)?,
                false => quantize_to_step(t, step, None)?.codes,
            };
            params_for(&nearest, t.shape[0], t.shape[1], options)
        }
    };
    let q = match params.trellis {
        true => quantize_to_trellis(t, step, params.raw_bits, params.block_cols as usize)?,
        false => quantize_to_step(t, step, Some(params.raw_bits))?,
    };
    Ok((q, Some(params)))
}

/// The parameters for codes of `rate`, with a trellis those of the stream.
fn params_for(codes: &Codes<'_>, n_rows: usize, n_cols: usize, options: &EncodeOptions) -> Params {
    let Codes::U8(codes) = codes else { unreachable!("codes of `rate` are bytes") };
    choose_params(Format::Rate, codes, n_rows, n_cols, options.prefer, options.trellis)
}

fn encode_zstd(mut header: Header, scales: &[u8], codes: &[u8]) -> Result<Vec<u8>> {
    let frames: Vec<Vec<u8>> = codes
        .par_chunks(ZSTD_CHUNK_BYTES)
        .map(|chunk| zstd::bulk::compress(chunk, ZSTD_LEVEL))
        .collect::<std::io::Result<_>>()
        .map_err(|e| Error::Parameter(format!("zstd could not compress the codes: {e}")))?;
    let ends = frames.iter().scan(0u64, |at, frame| {
        *at += frame.len() as u64;
        Some(*at)
    });
    let offsets: Vec<u8> = std::iter::once(0).chain(ends).flat_map(u64::to_le_bytes).collect();
    header.stream_bytes = frames.iter().map(Vec::len).sum();
    assemble(header, |s| vec![(s.scales.start, scales), (s.offsets.start, &offsets)], &[], frames.into_iter())
}

fn encode_rans<T: CodeType>(
    mut header: Header,
    scales: &[u8],
    codes: Cow<'_, [T]>,
    prefer: Prefer,
    params: Option<Params>,
) -> Result<Vec<u8>> {
    let (format, n_cols) = (header.format, header.n_cols);
    let params = params.unwrap_or_else(|| choose_params(format, &codes, header.n_rows, n_cols, prefer, false));
    let split = SplitTable::new(format, &params);
    let counts = count_symbols(&codes, n_cols, &params, &split, 1);
    let choice = choose_table(&counts, params.parts_per_symbol, params.part_bits, params.table_bits);
    header.params = params;
    let geometry = header.geometry();
    let encoder = BlockEncoder::new(geometry, &choice, &split);
    let mut raw = vec![0u8; geometry.unit_raw_bytes() * geometry.n_units() * geometry.n_row_blocks()];
    let row_block_raw = geometry.unit_raw_bytes() * geometry.n_units();
    let blocks: Vec<EncodedRowBlock> = if row_block_raw == 0 {
        (0..geometry.n_row_blocks())
            .into_par_iter()
            .map(|i| encoder.encode(i, |row, col| codes[row * n_cols + col].into(), &mut []))
            .collect()
    } else {
        raw.par_chunks_mut(row_block_raw)
            .enumerate()
            .map(|(i, raw)| encoder.encode(i, |row, col| codes[row * n_cols + col].into(), raw))
            .collect()
    };
    drop(codes);

    let table = choice.table.to_bytes();
    let mut offsets = vec![0u32];
    let mut patch_offsets = vec![0u32];
    let mut patches: Vec<u8> = Vec::new();
    for (stream, block_patches) in blocks.iter().flat_map(|b| b.streams.iter().zip(&b.patches)) {
        let end = u64::from(offsets[offsets.len() - 1]) + (stream.len() / STREAM_ALIGN) as u64;
        offsets
            .push(u32::try_from(end).map_err(|_| {
                Error::Parameter("its streams exceed 64 GiB, the format's limit for one tensor".into())
            })?);
        patches.extend(block_patches.iter().flat_map(|p: &Patch| p.0.to_le_bytes()));
        patch_offsets.push((patches.len() / 4) as u32);
    }
    header.table_bytes = table.len();
    header.n_patches = patches.len() / 4;
    header.stream_bytes = offsets[offsets.len() - 1] as usize * STREAM_ALIGN;
    let offsets: Vec<u8> = offsets.into_iter().flat_map(u32::to_le_bytes).collect();
    let patch_offsets: Vec<u8> =
        if patches.is_empty() { Vec::new() } else { patch_offsets.into_iter().flat_map(u32::to_le_bytes).collect() };
    assemble(
        header,
        |s| {
            vec![
                (s.table.start, &table),
                (s.scales.start, scales),
                (s.offsets.start, &offsets),
                (s.patch_offsets.start, &patch_offsets),
                (s.patches.start, &patches),
            ]
        },
        &raw,
        blocks.into_iter().flat_map(|b| b.streams),
    )
}

/// Lays the sections out and adds the checksums.
fn assemble<'a>(
    mut header: Header,
    metadata: impl FnOnce(&Sections) -> Vec<(usize, &'a [u8])>,
    raw: &[u8],
    streams: impl Iterator<Item = Vec<u8>>,
) -> Result<Vec<u8>> {
    let sections = header.sections().ok_or_else(|| Error::Parameter("the matrix is too large to encode".into()))?;
    header.total_bytes = sections.total;
    let mut out = Vec::with_capacity(sections.total);
    out.extend_from_slice(&header.to_bytes());
    out.resize(sections.raw.start, 0);
    for (start, bytes) in metadata(&sections) {
        out[start..start + bytes.len()].copy_from_slice(bytes);
    }
    out.extend_from_slice(raw);
    out.resize(sections.stream.start, 0);
    streams.for_each(|s| out.extend_from_slice(&s));
    debug_assert_eq!(out.len(), sections.stream.end);
    out.resize(sections.total, 0);
    let payload = xxh3_64(&out[sections.raw.start..]);
    out[88..96].copy_from_slice(&payload.to_le_bytes());
    let metadata = metadata_checksum(&out[..sections.raw.start]);
    out[80..88].copy_from_slice(&metadata.to_le_bytes());
    Ok(out)
}

/// How often each symbol occurs in every `stride`-th row block.
fn count_symbols<T: CodeType>(
    codes: &[T],
    n_cols: usize,
    params: &Params,
    split: &SplitTable,
    stride: usize,
) -> Vec<u32> {
    let (g, w) = (params.parts_per_symbol as usize, params.part_bits);
    let row_blocks: Vec<&[T]> = codes.chunks(BLOCK_ROWS * n_cols).step_by(stride).collect();
    let new_counts = || vec![0u32; 1 << params.symbol_bits()];
    row_blocks
        .par_iter()
        .with_min_len(8)
        .fold(new_counts, |mut counts, rows| {
            for row in rows.chunks_exact(n_cols) {
                for symbol in row.chunks_exact(g) {
                    let parts = symbol.iter().enumerate();
                    counts[parts.fold(0, |s, (k, &c)| s | usize::from(split.get(c.into()).part) << (k as u32 * w))] +=
                        1;
                }
            }
            counts
        })
        .reduce(new_counts, |mut a, b| {
            a.iter_mut().zip(b).for_each(|(a, b)| *a = a.saturating_add(b));
            a
        })
}

/// Chooses the parameters by the bytes that they cost, table, patches and raw bits counted, on a sample of the rows.
fn choose_params<T: CodeType>(
    format: Format,
    codes: &[T],
    n_rows: usize,
    n_cols: usize,
    prefer: Prefer,
    trellis: bool,
) -> Params {
    const SAMPLE_WEIGHTS: usize = 1 << 18;
    let stride = codes.len().div_ceil(SAMPLE_WEIGHTS).clamp(1, n_rows.div_ceil(BLOCK_ROWS));
    let code_bits = format.code_bits();
    let mut histogram = vec![0u64; 1 << code_bits];
    for rows in codes.chunks(BLOCK_ROWS * n_cols).step_by(stride) {
        rows.iter().for_each(|&c| histogram[usize::from(c.into())] += 1);
    }
    let block_cols = prefer.block_cols(n_cols);
    let n: u64 = histogram.iter().sum();

    // A candidate's floor: the entropy of single parts, raw bits, and patches of what no part reaches.
    let raw_range = match format {
        Format::Bf16 => 7..=10,
        _ if trellis => 1..=6,
        _ => 0..=7,
    };
    // Of a trellis, the stream's codes have a bit less.
    let all_bits = code_bits - u32::from(trellis);
    let mut candidates: Vec<(f64, Params)> = Vec::new();
    for raw_bits in raw_range {
        for parts_per_symbol in [1u32, 2, 4, 8] {
            let magnitude_bits = all_bits - raw_bits;
            let part_bits = (crate::entropy::SYMBOL_BITS_MAX / parts_per_symbol).min(magnitude_bits).min(8);
            let mut params =
                Params { parts_per_symbol, table_bits: 10, raw_bits, part_bits, block_cols, bias: 0, trellis };
            choose_window(format, &mut params, &histogram);
            let split = SplitTable::new(format, &params);
            let mut parts = vec![0u64; 1 << params.part_bits];
            let mut patched = 0;
            for (code, &count) in histogram.iter().enumerate().filter(|&(_, &c)| c > 0) {
                let s = split.get(code as u16);
                parts[usize::from(s.part)] += count;
                patched += if s.patched { count } else { 0 };
            }
            let entropy: f64 =
                parts.iter().filter(|&&c| c > 0).map(|&c| c as f64 / n as f64).map(|p| -p * p.log2()).sum();
            let floor = entropy + f64::from(raw_bits) + patched as f64 / n as f64 * crate::entropy::PATCH_BITS;
            candidates.push((floor + prefer.work_cost(format, &params), params));
        }
    }
    candidates.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut best: Option<(f64, Params)> = None;
    for (floor, params) in candidates {
        if best.is_some_and(|(cost, _)| floor >= cost) {
            break;
        }
        let split = SplitTable::new(format, &params);
        let counts = count_symbols(codes, n_cols, &params, &split, stride);
        let counted: u64 = codes.chunks(BLOCK_ROWS * n_cols).step_by(stride).map(|rows| rows.len() as u64).sum();
        for table_bits in [10, 11, 12, 13] {
            let params = Params { table_bits, ..params };
            if table_bits + params.symbol_bits() > crate::entropy::ENTRY_BITS {
                continue;
            }
            let choice = choose_table(&counts, params.parts_per_symbol, params.part_bits, table_bits);
            let bits = choice.cost_bits / counted as f64 + f64::from(params.raw_bits);
            let cost = bits + prefer.work_cost(format, &params);
            if best.is_none_or(|(least, _)| cost < least) {
                best = Some((cost, params));
            }
        }
    }
    best.expect("there are candidates, and the first has no cost to exceed").1
}

/// Sets the bias so that the parts reach as many of the codes as they can, and the part bits to no more than those need.
fn choose_window(format: Format, params: &mut Params, histogram: &[u64]) {
    let low_bits = params.raw_bits.saturating_sub(1);
    let signed = format.is_integer() && params.raw_bits == 0;
    // Codes counted by what stands above the low bits; `int8` without raw bits from −128 up.
    let mut parts = vec![0u64; histogram.len()];
    for (code, &count) in histogram.iter().enumerate() {
        let at = match (params.raw_bits, format) {
            (0, Format::Int8 | Format::Rate) => code ^ 0x80,
            (0, _) => code,
            (_, Format::Int8 | Format::Rate) => (if code >= 128 { !code & 0x7f } else { code }) >> low_bits,
            (_, Format::Fp8) => (code & 0x7f) >> low_bits,
            (_, Format::Bf16) => (code & 0x7fff) >> low_bits,
        };
        parts[at] += count;
    }
    let used = parts.iter().rposition(|&c| c > 0).unwrap_or(0) + 1;
    let movable = params.raw_bits == 0 || format == Format::Bf16;
    let first = if movable { parts.iter().position(|&c| c > 0).unwrap_or(0) } else { 0 };
    let needed = (used - first).next_power_of_two().trailing_zeros().max(1);
    params.part_bits = params.part_bits.min(needed);
    let width = 1usize << params.part_bits;
    // The last window that fits the code's range.
    let code_range = match params.raw_bits {
        0 => histogram.len(),
        _ => (histogram.len() / 2) >> low_bits,
    };
    let mut start = 0;
    if movable {
        let mut inside: u64 = parts[..width.min(parts.len())].iter().sum();
        let mut most = inside;
        for s in 1..=code_range.saturating_sub(width) {
            inside = inside - parts[s - 1] + parts[s + width - 1];
            if inside > most {
                (most, start) = (inside, s);
            }
        }
    }
    params.bias = (start as i32) << low_bits;
    if signed {
        params.bias -= 128;
    }
}

pub(super) fn scale_bytes(scales: &Scales) -> Vec<u8> {
    match scales {
        Scales::None => Vec::new(),
        Scales::Tensor(s) => s.to_le_bytes().to_vec(),
        Scales::Channel(s) => s.iter().flat_map(|s| s.to_le_bytes()).collect(),
        Scales::Absmax(a) => a.iter().flat_map(|a| a.to_le_bytes()).collect(),
    }
}
