//! From a source tensor to integer codes and scales; each format's quantizer, and its inverse.
//!
//! Every quantizer is deterministic arithmetic in float32 with one rounding rule (to nearest, ties to even), so that
//! `verify` can repeat it and compare every code.

use crate::checkpoint::{Dtype, Tensor};
use crate::error::{Error, Result};
use crate::format::{Format, ScaleMode};
use crate::trellis::{self, Costs, N_CODES, PHASES, Search};
use half::{bf16, f16};
use rayon::prelude::*;
use std::borrow::Cow;

/// Largest magnitude of an `int8` code.
pub const INT8_MAX: f32 = 127.0;
/// Largest magnitude of an E4M3 number.
pub const E4M3_MAX: f32 = 448.0;

/// The codes of a matrix, row-major.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Codes<'a> {
    /// `fp8` and `int8`.
    U8(Cow<'a, [u8]>),
    /// `bf16`.
    U16(Cow<'a, [u16]>),
}

impl Codes<'_> {
    /// Number of codes.
    pub fn len(&self) -> usize {
        match self {
            Self::U8(codes) => codes.len(),
            Self::U16(codes) => codes.len(),
        }
    }

    /// Whether there is no code.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The code at `index`, zero-extended.
    pub fn get(&self, index: usize) -> u16 {
        match self {
            Self::U8(codes) => codes[index].into(),
            Self::U16(codes) => codes[index],
        }
    }

    /// How often each code occurs: 256 or 65,536 counts.
    pub fn histogram(&self) -> Vec<u64> {
        fn count<T: Copy + Into<u16> + Sync>(codes: &[T], n: usize) -> Vec<u64> {
            codes
                .par_chunks(1 << 20)
                .map(|chunk| {
                    let mut counts = vec![0u64; n];
                    chunk.iter().for_each(|&c| counts[usize::from(c.into())] += 1);
                    counts
                })
                .reduce(
                    || vec![0u64; n],
                    |mut a, b| {
                        a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
                        a
                    },
                )
        }
        match self {
            Self::U8(codes) => count(codes, 1 << 8),
            Self::U16(codes) => count(codes, 1 << 16),
        }
    }

    /// Order-0 entropy in bits per code.
    pub fn entropy_bits(&self) -> f64 {
        let n = self.len() as f64;
        self.histogram().iter().filter(|&&c| c > 0).map(|&c| c as f64 / n).map(|p| -p * p.log2()).sum()
    }
}

/// The scales of a quantized matrix, as the archive stores them.
#[derive(Debug, Clone, PartialEq)]
pub enum Scales {
    /// Codes are values (`bf16`).
    None,
    /// One scale for the matrix.
    Tensor(f32),
    /// One scale a row.
    Channel(Vec<f32>),
    /// The largest magnitude of each row, as BF16 bits: the scale is that over the format's largest code.
    Absmax(Vec<u16>),
}

/// A matrix as codes and scales.
#[derive(Debug, Clone)]
pub struct QuantizedTensor<'a> {
    /// Row-major codes.
    pub codes: Codes<'a>,
    /// Their scales.
    pub scales: Scales,
    /// ‖W − Ŵ‖ / ‖W‖ over the finite weights; 0 for a zero matrix.
    pub relative_error: f32,
}

impl QuantizedTensor<'static> {
    /// With what codes of a [trellis] stand for, in rows of `n_cols` and blocks of `block_cols` columns, in their place: the codes that a
    /// decoder yields.
    ///
    /// # Panics
    /// The codes have 16 bits.
    pub fn decoded(mut self, n_cols: usize, block_cols: usize) -> Self {
        let Codes::U8(codes) = &mut self.codes else { panic!("codes of a trellis are bytes") };
        codes.to_mut().chunks_exact_mut(n_cols).for_each(|row| trellis::values(row, block_cols));
        self
    }
}

/// The scale of a row whose largest magnitude is `absmax`: zero where the quotient would be subnormal, so that a row below
/// about 1.5e-36 becomes exactly zero on every machine, flush-to-zero or not.
pub fn scale_of(format: Format, absmax: f32) -> f32 {
    let scale = absmax / if format == Format::Fp8 { E4M3_MAX } else { INT8_MAX };
    if scale < f32::MIN_POSITIVE { 0.0 } else { scale }
}

/// Rounds to the nearest integer, ties to even, for |x| ≤ 2^22; unlike `round_ties_even` it vectorizes on any target.
#[inline(always)]
pub(crate) fn round_even(x: f32) -> f32 {
    const MAGIC: f32 = 12_582_912.0; // 1.5·2^23: the sum's unit in the last place is 1
    (x + MAGIC) - MAGIC
}

/// The `int8` code of `x` = weight / scale.
#[inline(always)]
fn int8_code(x: f32) -> u8 {
    round_even(x.clamp(-INT8_MAX, INT8_MAX)) as i8 as u8
}

/// The E4M3 code of `x`, rounded to nearest even and saturated at ±448.
#[inline(always)]
fn e4m3_code(x: f32) -> u8 {
    let bits = x.abs().min(E4M3_MAX).to_bits();
    // Normal numbers round their mantissa to 3 bits; a carry runs into the exponent as it should.
    let normal = ((bits + 0x7_ffff + (bits >> 20 & 1)) >> 20).wrapping_sub((127 - 7) << 3);
    // Below 2^-6 the codes are the multiples of 2^-9, and code 8 is the first normal number.
    let subnormal = round_even(f32::from_bits(bits) * 512.0) as u32;
    let magnitude = if bits < (127 - 6) << 23 { subnormal } else { normal };
    magnitude as u8 | if x.is_sign_negative() { 0x80 } else { 0 }
}

/// The value of a code, before the scale.
#[inline]
pub fn code_value(format: Format, code: u16) -> f32 {
    match format {
        Format::Bf16 => bf16::from_bits(code).to_f32(),
        Format::Int8 | Format::Rate => f32::from(code as u8 as i8),
        Format::Fp8 => {
            let (exponent, mantissa) = (u32::from(code) >> 3 & 15, u32::from(code) & 7);
            let magnitude = match exponent {
                0 => mantissa as f32 / 512.0,
                e => f32::from_bits((e + 120) << 23 | mantissa << 20),
            };
            if code & 0x80 != 0 { -magnitude } else { magnitude }
        }
    }
}

/// Widens elements of a source tensor (BF16, F16 or F32) to float32, `row.len()` of them.
pub fn read_row(dtype: Dtype, bytes: &[u8], row: &mut [f32]) {
    match dtype {
        Dtype::Bf16 => {
            bytes.as_chunks::<2>().0.iter().zip(row).for_each(|(b, v)| *v = bf16::from_le_bytes(*b).to_f32())
        }
        Dtype::F16 => bytes.as_chunks::<2>().0.iter().zip(row).for_each(|(b, v)| *v = f16::from_le_bytes(*b).to_f32()),
        _ => bytes.as_chunks::<4>().0.iter().zip(row).for_each(|(b, v)| *v = f32::from_le_bytes(*b)),
    }
}

/// Bytes of one element, for the dtypes that can be encoded.
pub(crate) fn source_width(t: &Tensor) -> Result<usize> {
    match t.dtype {
        Dtype::Bf16 | Dtype::F16 => Ok(2),
        Dtype::F32 => Ok(4),
        other => Err(Error::Parameter(format!("cannot encode elements of type {other:?}; BF16, F16 and F32 can be"))),
    }
}

/// Rows and columns of `t`, having checked that it is a matrix whose bytes are all there.
pub(crate) fn matrix_shape(t: &Tensor) -> Result<(usize, usize)> {
    let &[n_rows, n_cols] = t.shape.as_slice() else {
        return Err(Error::Parameter(format!("only matrices can be encoded; the shape is {:?}", t.shape)));
    };
    if n_rows == 0 || n_cols == 0 {
        return Err(Error::Parameter(format!("cannot encode an empty matrix of shape {:?}", t.shape)));
    }
    let expected = n_rows.checked_mul(n_cols).and_then(|n| n.checked_mul(source_width(t).ok()?));
    match expected {
        Some(n) if n == t.data.len() => Ok((n_rows, n_cols)),
        _ => Err(Error::format(
            "source",
            format!("shape {:?} does not fit its {} bytes of {:?}", t.shape, t.data.len(), t.dtype),
        )),
    }
}

/// Quantizes a matrix.
///
/// # Errors
/// A tensor that is not a non-empty matrix of BF16, F16 or F32; for `fp8` and `int8`, a weight that is not finite.
pub fn quantize(t: &Tensor, format: Format, mode: ScaleMode) -> Result<QuantizedTensor<'_>> {
    let (n_rows, n_cols) = matrix_shape(t)?;
    match format {
        Format::Bf16 => Ok(to_bf16(t, n_cols)),
        Format::Fp8 | Format::Int8 => quantize_scaled(t, n_rows, n_cols, format, mode),
        Format::Rate => Err(Error::Parameter("`rate` takes the step of its grid, not an absmax scale".into())),
    }
}

/// A BF16 source is its own codes; another dtype is rounded to BF16, and the error says how much that lost.
fn to_bf16(t: &Tensor, n_cols: usize) -> QuantizedTensor<'_> {
    if t.dtype == Dtype::Bf16 {
        let codes = match bytemuck::try_cast_slice::<u8, u16>(&t.data) {
            Ok(codes) if cfg!(target_endian = "little") => Cow::Borrowed(codes),
            _ => Cow::Owned(t.data.as_chunks::<2>().0.iter().map(|b| u16::from_le_bytes(*b)).collect()),
        };
        return QuantizedTensor { codes: Codes::U16(codes), scales: Scales::None, relative_error: 0.0 };
    }
    let row_bytes = t.data.len() / t.shape[0];
    let mut codes = vec![0u16; t.data.len() / row_bytes * n_cols];
    let errors: Vec<Error2> = codes
        .par_chunks_mut(n_cols)
        .zip(t.data.par_chunks(row_bytes))
        .map_init(
            || vec![0f32; n_cols],
            |row, (codes, bytes)| {
                read_row(t.dtype, bytes, row);
                let mut error = Error2::default();
                for (code, &v) in codes.iter_mut().zip(&*row) {
                    let rounded = bf16::from_f32(v);
                    *code = rounded.to_bits();
                    if v.is_finite() && rounded.is_finite() {
                        error.add(v, rounded.to_f32());
                    }
                }
                error
            },
        )
        .collect();
    QuantizedTensor { codes: Codes::U16(codes.into()), scales: Scales::None, relative_error: Error2::relative(&errors) }
}

/// Sums of squares of a row: the errors, and the weights.
#[derive(Default, Clone, Copy)]
struct Error2 {
    error: f64,
    weight: f64,
}

impl Error2 {
    #[inline(always)]
    fn add(&mut self, value: f32, quantized: f32) {
        let d = f64::from(value) - f64::from(quantized);
        self.error += d * d;
        self.weight += f64::from(value) * f64::from(value);
    }

    /// Summed in row order, so that the figure does not depend on the number of threads.
    fn relative(rows: &[Self]) -> f32 {
        let (error, weight) = rows.iter().fold((0.0, 0.0), |(e, w), r| (e + r.error, w + r.weight));
        if weight == 0.0 { 0.0 } else { (error / weight).sqrt() as f32 }
    }
}

/// The largest magnitude of each row.
///
/// # Errors
/// A weight that is not finite.
pub(crate) fn row_magnitudes(t: &Tensor, n_cols: usize, format: Format) -> Result<Vec<f32>> {
    let row_bytes = t.data.len() / t.shape[0];
    t.data
        .par_chunks(row_bytes)
        .enumerate()
        .map_init(
            || vec![0f32; n_cols],
            |row, (r, bytes)| {
                read_row(t.dtype, bytes, row);
                // As integers, magnitudes order as the numbers do, with infinities and NaNs on top.
                let max = row.iter().map(|v| v.to_bits() & 0x7fff_ffff).max().unwrap_or(0);
                if max >= 0x7f80_0000 {
                    let c = row.iter().position(|v| !v.is_finite()).unwrap_or(0);
                    return Err(Error::Parameter(format!(
                        "the weight at row {r}, column {c} is {}; `{format}` holds finite weights only: repair the \
                         checkpoint, or use `--format bf16`, which keeps every bit pattern",
                        row[c]
                    )));
                }
                Ok(f32::from_bits(max))
            },
        )
        .collect()
}

fn quantize_scaled(
    t: &Tensor,
    n_rows: usize,
    n_cols: usize,
    format: Format,
    mode: ScaleMode,
) -> Result<QuantizedTensor<'_>> {
    let row_bytes = t.data.len() / n_rows;
    let absmax = row_magnitudes(t, n_cols, format)?;
    let (scales, stored) = match mode {
        ScaleMode::Tensor => {
            let scale = scale_of(format, absmax.iter().copied().fold(0.0, f32::max));
            (vec![scale; n_rows], Scales::Tensor(scale))
        }
        ScaleMode::Channel => {
            let scales: Vec<f32> = absmax.iter().map(|&a| scale_of(format, a)).collect();
            let stored = if absmax.iter().all(|a| a.to_bits() & 0xffff == 0) {
                Scales::Absmax(absmax.iter().map(|a| (a.to_bits() >> 16) as u16).collect())
            } else {
                Scales::Channel(scales.clone())
            };
            (scales, stored)
        }
    };

    let mut codes = vec![0u8; n_rows * n_cols];
    let errors: Vec<Error2> = codes
        .par_chunks_mut(n_cols)
        .zip(t.data.par_chunks(row_bytes))
        .zip(&scales)
        .map_init(
            || vec![0f32; n_cols],
            |row, ((codes, bytes), &scale)| {
                read_row(t.dtype, bytes, row);
                if scale != 0.0 {
                    match format {
                        Format::Fp8 => codes.iter_mut().zip(&*row).for_each(|(c, &v)| *c = e4m3_code(v / scale)),
                        _ => codes.iter_mut().zip(&*row).for_each(|(c, &v)| *c = int8_code(v / scale)),
                    }
                }
                let mut error = Error2::default();
                let values = codes.iter().map(|&c| code_value(format, c.into()) * scale);
                row.iter().zip(values).for_each(|(&v, q)| error.add(v, q));
                error
            },
        )
        .collect();
    Ok(QuantizedTensor { codes: Codes::U8(codes.into()), scales: stored, relative_error: Error2::relative(&errors) })
}

/// The root mean square of a matrix's weights.
///
/// # Errors
/// As [`quantize_to_step`].
pub fn rms(t: &Tensor) -> Result<f64> {
    let (n_rows, n_cols) = matrix_shape(t)?;
    row_magnitudes(t, n_cols, Format::Rate)?;
    let mut row = vec![0f32; n_cols];
    let mut sum = 0f64;
    for bytes in t.data.chunks(t.data.len() / n_rows) {
        read_row(t.dtype, bytes, &mut row);
        sum += row.iter().map(|&v| f64::from(v) * f64::from(v)).sum::<f64>();
    }
    Ok((sum / (n_rows * n_cols) as f64).sqrt())
}

/// What a bit is worth in units of the squared step, where `rate` weighs a code's error against its bits. At high rate
/// uniform quantization has the error Δ²/12 and loses 2·ln 2 of it a bit; most of that slope is taken.
const SQUARES_PER_BIT: f32 = 0.1;

/// Quantizes a matrix to a grid of `step`: `rate`'s quantizer.
///
/// A row whose largest magnitude is more than 127 steps gets a coarser one. With `raw_bits`, a weight between two grid points goes
/// to the one with the lesser cost of error and bits (rate-distortion-optimized quantization, Sullivan 1996), where bits are
/// those of the coder: a code's low bits lie flat and cost the same for all, its part costs −log2 of how often it occurs. Without,
/// it goes to the nearest. The scale is then the one with the least squared error, which puts reconstruction
/// points where the weights of their intervals lie on average.
///
/// # Errors
/// A tensor that is not a non-empty matrix of BF16, F16 or F32; a weight that is not finite; a step that is not a positive normal
/// number.
pub fn quantize_to_step(t: &Tensor, step: f32, raw_bits: Option<u32>) -> Result<QuantizedTensor<'_>> {
    let (n_rows, n_cols) = matrix_shape(t)?;
    let row_bytes = t.data.len() / n_rows;
    let steps = row_steps(t, n_cols, step, INT8_MAX)?;
    let rows = || t.data.par_chunks(row_bytes).zip(&steps);

    let mut thresholds = [0.5f32; 128];
    // The bits depend on how often parts occur, and that on the thresholds: a second look is enough.
    for _ in 0..if raw_bits.is_some() { 2 } else { 0 } {
        let counts = rows()
            .map_init(
                || vec![0f32; n_cols],
                |row, (bytes, step)| {
                    read_row(t.dtype, bytes, row);
                    let mut counts = [0u64; 128];
                    row.iter().for_each(|v| counts[usize::from(grid_magnitude(v.abs() / step, &thresholds))] += 1);
                    counts
                },
            )
            .reduce(|| [0; 128], add_counts);
        thresholds = cheapest_thresholds(&counts, raw_bits.unwrap_or(0));
    }

    let mut codes = vec![0u8; n_rows * n_cols];
    // Σ weight², Σ weight · point, Σ point² of each row, where a point is code · step.
    let sums: Vec<[f64; 3]> = codes
        .par_chunks_mut(n_cols)
        .zip(rows())
        .map_init(
            || vec![0f32; n_cols],
            |row, (codes, (bytes, step))| {
                read_row(t.dtype, bytes, row);
                let mut sums = [0f64; 3];
                for (code, &v) in codes.iter_mut().zip(&*row) {
                    let magnitude = grid_magnitude(v.abs() / step, &thresholds);
                    *code = if v < 0.0 { magnitude.wrapping_neg() } else { magnitude };
                    let (w, point) = (f64::from(v.abs()), f64::from(magnitude) * f64::from(*step));
                    sums[0] += w * w;
                    sums[1] += w * point;
                    sums[2] += point * point;
                }
                sums
            },
        )
        .collect();
    Ok(fitted(codes, step, steps, &sums))
}

/// The codes with the scale that has the least squared error, given Σ weight², Σ weight · point and Σ point² of each row, where a point is
/// code · step.
fn fitted(codes: Vec<u8>, step: f32, steps: Vec<f32>, sums: &[[f64; 3]]) -> QuantizedTensor<'static> {
    // Summed in row order, so that the scale does not depend on the number of threads.
    let [weight, cross, point] = sums.iter().fold([0.0; 3], |a, b| [a[0] + b[0], a[1] + b[1], a[2] + b[2]]);
    let fit = if point > 0.0 { cross / point } else { 1.0 };
    let error = weight - 2.0 * fit * cross + fit * fit * point;
    let relative_error = if weight > 0.0 { (error.max(0.0) / weight).sqrt() as f32 } else { 0.0 };
    QuantizedTensor { codes: Codes::U8(codes.into()), scales: scales_of(step, steps, fit), relative_error }
}

/// The scales of rows with these steps, of which most are `step`.
pub(crate) fn scales_of(step: f32, steps: Vec<f32>, fit: f64) -> Scales {
    let scale = |step: f32| (fit * f64::from(step)) as f32;
    match steps.iter().all(|&s| s == step) {
        true => Scales::Tensor(scale(step)),
        false => Scales::Channel(steps.into_iter().map(scale).collect()),
    }
}

/// The step of each row: `step`, or a coarser one where its largest magnitude is more than `most` of those.
///
/// # Errors
/// A step that is not a positive normal number; a weight that is not finite.
pub(crate) fn row_steps(t: &Tensor, n_cols: usize, step: f32, most: f32) -> Result<Vec<f32>> {
    if !(step.is_normal() && step > 0.0) {
        return Err(Error::Parameter(format!("{step} is no step of a grid; it is a positive number")));
    }
    Ok(row_magnitudes(t, n_cols, Format::Rate)?.iter().map(|a| step.max(a / most)).collect())
}

/// Rows that a search takes together.
const SEARCH_ROWS: usize = 4;
/// One of so many fours of rows tells how often codes occur.
const COUNT_STRIDE: usize = 16;

/// A matrix for which codes of a [trellis] are looked for.
pub(crate) struct TrellisRows<'a> {
    pub tensor: &'a Tensor,
    pub n_cols: usize,
    /// Of each row.
    pub steps: &'a [f32],
    pub block_cols: usize,
}

impl TrellisRows<'_> {
    /// The weights in steps of some rows, `[row][column]`.
    fn read(&self, rows: std::ops::Range<usize>, out: &mut Vec<f32>) {
        let row_bytes = self.tensor.data.len() / self.tensor.shape[0];
        out.resize(rows.len() * self.n_cols, 0.0);
        read_row(self.tensor.dtype, &self.tensor.data[rows.start * row_bytes..rows.end * row_bytes], out);
        for (row, step) in out.chunks_exact_mut(self.n_cols).zip(&self.steps[rows]) {
            row.iter_mut().for_each(|v| *v /= step);
        }
    }

    /// The codes of some rows, up to [`SEARCH_ROWS`], which are at `x` in steps.
    fn search(&self, search: &mut Search, costs: &Costs, x: &[f32], codes: &mut [u8]) {
        let n = self.n_cols;
        for start in (0..n).step_by(self.block_cols) {
            let cols = start..n.min(start + self.block_cols);
            let x: Vec<&[f32]> = x.chunks_exact(n).map(|x| &x[cols.clone()]).collect();
            let mut codes: Vec<&mut [u8]> = codes.chunks_exact_mut(n).map(|c| &mut c[cols.clone()]).collect();
            search.rows(&x, costs, &mut codes);
        }
    }

    /// What codes cost, from what occurs in some of the rows.
    pub fn costs(&self, raw_bits: u32) -> Costs {
        let n_rows = self.steps.len();
        let all: Vec<usize> =
            (0..n_rows).step_by(SEARCH_ROWS * COUNT_STRIDE.min(n_rows.div_ceil(SEARCH_ROWS * 4))).collect();
        let rows_from = |first: usize| first..n_rows.min(first + SEARCH_ROWS);
        let count = |codes: &mut dyn Iterator<Item = i8>| {
            let mut counts = [0u64; N_CODES];
            codes.for_each(|c| counts[(i32::from(c) + 64) as usize] += 1);
            counts
        };
        let counts = all.par_iter().map_init(Vec::new, |x, &first| {
            self.read(rows_from(first), x);
            count(&mut x.iter().enumerate().map(|(i, x)| trellis::nearby_code(*x, i % self.n_cols)))
        });
        let costs = trellis::costs(&counts.reduce(|| [0; N_CODES], add_counts), raw_bits);
        // The bits depend on how often codes occur, and that on the bits: a second look is enough.
        let counts = all.par_iter().map_init(
            || (Vec::new(), Vec::new(), Search::default()),
            |(x, codes, search), &first| {
                self.read(rows_from(first), x);
                codes.resize(x.len(), 0u8);
                self.search(search, &costs, x, codes);
                count(&mut codes.iter().map(|c| *c as i8))
            },
        );
        trellis::costs(&counts.reduce(|| [0; N_CODES], add_counts), raw_bits)
    }
}

/// Quantizes a matrix to the codes of a [trellis] that cost least in error and bits, those of a coder with `raw_bits`: `rate`'s other
/// quantizer. The codes are those of the stream, in blocks of `block_cols` columns; [`trellis::values`] has what they stand for.
///
/// A row whose largest magnitude is more than 122 steps gets a coarser step. The scale is the one with the least squared error.
///
/// # Errors
/// As [`quantize_to_step`].
pub fn quantize_to_trellis(
    t: &Tensor,
    step: f32,
    raw_bits: u32,
    block_cols: usize,
) -> Result<QuantizedTensor<'static>> {
    let (n_rows, n_cols) = matrix_shape(t)?;
    let steps = row_steps(t, n_cols, step, trellis::MAX_STEPS)?;
    let rows = TrellisRows { tensor: t, n_cols, steps: &steps, block_cols };
    let costs = rows.costs(raw_bits);
    let mut codes = vec![0u8; n_rows * n_cols];
    let sums: Vec<[f64; 3]> = codes
        .par_chunks_mut(SEARCH_ROWS * n_cols)
        .enumerate()
        .map_init(
            || (Vec::new(), Vec::new(), Search::default()),
            |(x, values, search), (i, codes)| {
                let first = i * SEARCH_ROWS;
                rows.read(first..n_rows.min(first + SEARCH_ROWS), x);
                rows.search(search, &costs, x, codes);
                values.clear();
                values.extend_from_slice(codes);
                values.chunks_exact_mut(n_cols).for_each(|row| trellis::values(row, block_cols));
                let mut sums = [0f64; 3];
                for ((x, values), step) in x.chunks_exact(n_cols).zip(values.chunks_exact(n_cols)).zip(&steps[first..])
                {
                    let step = f64::from(*step) * f64::from(*step);
                    for (x, value) in x.iter().zip(values) {
                        let (x, value) = (f64::from(*x), f64::from(*value as i8));
                        sums[0] += x * x * step;
                        sums[1] += x * value * step;
                        sums[2] += value * value * step;
                    }
                }
                sums
            },
        )
        .collect();
    Ok(fitted(codes, step, steps, &sums))
}

/// About the codes that [`quantize_to_trellis`] would find, without a search: for estimates of bits.
pub(crate) fn nearby_codes(t: &Tensor, step: f32) -> Result<Codes<'static>> {
    let (n_rows, n_cols) = matrix_shape(t)?;
    let steps = row_steps(t, n_cols, step, trellis::MAX_STEPS)?;
    let rows = TrellisRows { tensor: t, n_cols, steps: &steps, block_cols: PHASES };
    let mut codes = vec![0u8; n_rows * n_cols];
    codes.par_chunks_mut(n_cols).enumerate().for_each_init(Vec::new, |x, (r, codes)| {
        rows.read(r..r + 1, x);
        codes.iter_mut().zip(x).enumerate().for_each(|(c, (code, x))| *code = trellis::nearby_code(*x, c) as u8);
    });
    Ok(Codes::U8(codes.into()))
}

/// The sums of two histograms' counts.
pub(crate) fn add_counts(mut a: [u64; 128], b: [u64; 128]) -> [u64; 128] {
    a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
    a
}

/// The magnitude of the code of `x` ≥ 0 steps: the grid point below, or the one above from the threshold on.
#[inline(always)]
pub(crate) fn grid_magnitude(x: f32, thresholds: &[f32; 128]) -> u8 {
    let below = x.min(INT8_MAX) as u8;
    below + u8::from(below < 127 && x - f32::from(below) >= thresholds[usize::from(below)])
}

/// From which fraction of a step on the upper point costs less, by the lower point's magnitude, given how often magnitudes occur.
pub(crate) fn cheapest_thresholds(counts: &[u64; 128], raw_bits: u32) -> [f32; 128] {
    // Without raw bits the sign is coded too: each sign has half of a magnitude's weights.
    let part = |magnitude: usize| magnitude >> raw_bits.saturating_sub(1);
    let mut parts = [0u64; 128];
    counts.iter().enumerate().for_each(|(magnitude, count)| parts[part(magnitude)] += count);
    let total = counts.iter().sum::<u64>() as f64;
    let bits = |magnitude: usize| {
        let sign = f64::from(u8::from(raw_bits == 0 && magnitude > 0));
        sign - ((parts[part(magnitude)] as f64 + 0.5) / (total + 64.0)).log2()
    };
    std::array::from_fn(|below| {
        let more = if below < 127 { bits(below + 1) - bits(below) } else { 0.0 };
        // On a coarse grid, so that the last bit of a logarithm does not show.
        let threshold = (0.5 + more * f64::from(SQUARES_PER_BIT) / 2.0).clamp(0.25, 0.95);
        ((threshold * 4096.0).round() / 4096.0) as f32
    })
}
