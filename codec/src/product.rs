//! Products straight from the compressed blocks.
//!
//! `int8`: activations become 16-bit fixed point, once per product, and the sums are exact integers, the same on every
//! instruction set (and on a GPU); one multiplication by the scales ends a row. An activation's error is at most 1/65,024 of the
//! vector's largest magnitude, which is less than BF16 activations would have on that largest one.
//! `bf16`, `fp8`: float32 arithmetic on the decoded values, a block's columns in order.

use crate::block::{BLOCK_COLS_MAX, BLOCK_ROWS, Block, decode_block};
use crate::cpu::Cpu;
use crate::encoded::{CodeType, EncodedTensor};
use crate::error::{Error, Result};
use crate::format::{Coder, Format};
use crate::quantize::{Codes, code_value};
use crate::simd::Quads;
use std::ops::Range;

/// Largest magnitude of a fixed-point activation: 255·127 + 127, so that it is two signed bytes in base 255, and neither is
/// −128.
const FIXED_MAX: f32 = 32_512.0;

/// Activations of some tokens, prepared once for any number of products.
#[derive(Debug, Clone)]
pub struct Operand {
    n_tokens: usize,
    n_cols: usize,
    /// Columns of a token in the buffers below: `n_cols` up to a multiple of 32, zeros behind.
    stride: usize,
    values: Vec<f32>,
    /// [token]: a fixed-point activation's unit.
    units: Vec<f64>,
    /// [token][quad], the columns of a quad in the order 0, 2, 1, 3.
    pairs: Vec<[i16; 4]>,
    /// [token][column]: fixed = 255·high + low.
    high: Vec<i8>,
    low: Vec<i8>,
}

impl Operand {
    /// Prepares `x`, laid out [token][column].
    ///
    /// # Panics
    /// When `x.len()` is not a multiple of `n_cols`, or is zero.
    pub fn new(x: &[f32], n_cols: usize) -> Self {
        assert!(
            n_cols > 0 && !x.is_empty() && x.len().is_multiple_of(n_cols),
            "{} values in rows of {n_cols}",
            x.len()
        );
        let (n_tokens, stride) = (x.len() / n_cols, n_cols.next_multiple_of(32));
        let mut o = Self {
            n_tokens,
            n_cols,
            stride,
            values: vec![0.0; n_tokens * stride],
            units: Vec::with_capacity(n_tokens),
            pairs: vec![[0; 4]; n_tokens * stride / 4],
            high: vec![0; n_tokens * stride],
            low: vec![0; n_tokens * stride],
        };
        for (t, x) in x.chunks_exact(n_cols).enumerate() {
            let at = t * stride..t * stride + n_cols;
            o.values[at.clone()].copy_from_slice(x);
            let absmax = x.iter().fold(0f32, |m, v| m.max(v.abs()));
            let to_fixed = if absmax > 0.0 && absmax.is_finite() { FIXED_MAX / absmax } else { 0.0 };
            // A vector with an infinity or a NaN has no fixed-point form; its products are NaN, as they would be in floats.
            let finite = x.iter().all(|v| v.is_finite());
            o.units.push(match (finite, to_fixed.is_finite() && to_fixed > 0.0) {
                (false, _) => f64::NAN,
                (true, true) => 1.0 / f64::from(to_fixed),
                (true, false) => 0.0,
            });
            let to_fixed = if finite && to_fixed.is_finite() { to_fixed } else { 0.0 };
            for (c, &v) in x.iter().enumerate() {
                let fixed = (v * to_fixed).round_ties_even() as i32;
                let high = (fixed as f32 * (1.0 / 255.0)).round_ties_even() as i32;
                o.high[t * stride + c] = high as i8;
                o.low[t * stride + c] = (fixed - 255 * high) as i8;
                o.pairs[(t * stride + c) / 4][[0, 2, 1, 3][c % 4]] = fixed as i16;
            }
        }
        o
    }

    /// Number of tokens.
    pub fn n_tokens(&self) -> usize {
        self.n_tokens
    }

    /// Columns of a token.
    pub fn n_cols(&self) -> usize {
        self.n_cols
    }

    /// A token's activations.
    pub fn token(&self, t: usize) -> &[f32] {
        &self.values[t * self.stride..][..self.n_cols]
    }

    /// A token's fixed-point activation at `c`.
    fn fixed(&self, t: usize, c: usize) -> i64 {
        i64::from(self.pairs[(t * self.stride + c) / 4][[0, 2, 1, 3][c % 4]])
    }

    /// From column `start` on, in whole units: (values, high, low, pairs).
    fn from(&self, t: usize, start: usize) -> Activations<'_> {
        let (at, end) = (t * self.stride + start, (t + 1) * self.stride);
        Activations {
            values: &self.values[at..end],
            high: &self.high[at..end],
            low: &self.low[at..end],
            pairs: &self.pairs[at / 4..end / 4],
        }
    }

    /// Σ fixed over a run of columns.
    fn fixed_sum(&self, t: usize, cols: Range<usize>) -> i64 {
        let at = t * self.stride + cols.start..t * self.stride + cols.end;
        let sum = |bytes: &[i8]| bytes.iter().map(|&b| i64::from(b)).sum::<i64>();
        255 * sum(&self.high[at.clone()]) + sum(&self.low[at])
    }
}

#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
struct Activations<'a> {
    values: &'a [f32],
    high: &'a [i8],
    low: &'a [i8],
    pairs: &'a [[i16; 4]],
}

/// A row block's sums on their way: [token][row].
enum Sums {
    Fixed(Vec<[i64; BLOCK_ROWS]>),
    Float(Vec<[f32; BLOCK_ROWS]>),
}

/// What a thread reuses from block to block.
#[derive(Default)]
struct Scratch {
    quads: Quads,
    codes: Vec<u16>,
    values: Vec<[f32; BLOCK_ROWS]>,
}

/// Row blocks that a product of one token takes through AVX-512 at once.
#[cfg(target_arch = "x86_64")]
const SIDE_BY_SIDE: usize = 2;

/// Columns of decoded values that a product of several tokens keeps at once: 32 KiB, so that they stay in the first cache.
const VALUE_COLS: usize = 256;

impl EncodedTensor {
    /// `y[row][token]` = Σ over columns of W[row][column] · x[token][column], for a run of rows, on this thread alone.
    /// Blocks are decoded on the way; nothing decoded outlives a block.
    ///
    /// # Errors
    /// Rows that do not begin at a multiple of 32 or leave the matrix, an operand or a buffer of another size, a payload that does not
    /// decode.
    pub fn product(&self, cpu: Cpu, x: &Operand, rows: Range<usize>, y: &mut [f32]) -> Result<()> {
        let ends_well = rows.end == self.n_rows() || rows.end.is_multiple_of(BLOCK_ROWS);
        if !rows.start.is_multiple_of(BLOCK_ROWS) || !ends_well || rows.end > self.n_rows() || rows.start > rows.end {
            return Err(Error::Parameter(format!(
                "rows {rows:?} are no row blocks of a matrix of {} rows",
                self.n_rows()
            )));
        }
        if x.n_cols != self.n_cols() || y.len() != rows.len() * x.n_tokens {
            return Err(Error::Parameter(format!(
                "{} tokens of {} columns into {} sums: the matrix has {} columns, and {} rows are asked for",
                x.n_tokens,
                x.n_cols,
                y.len(),
                self.n_cols(),
                rows.len()
            )));
        }
        let mut scratch = Scratch::default();
        let mut write = |i: usize, sums: &Sums| {
            for row in i * BLOCK_ROWS..rows.end.min((i + 1) * BLOCK_ROWS) {
                let scale = self.scale(row);
                for t in 0..x.n_tokens {
                    y[(row - rows.start) * x.n_tokens + t] = match sums {
                        Sums::Fixed(s) => (s[t][row % BLOCK_ROWS] as f64 * (f64::from(scale) * x.units[t])) as f32,
                        Sums::Float(s) => s[t][row % BLOCK_ROWS] * scale,
                    };
                }
            }
        };
        let blocks = rows.start / BLOCK_ROWS..rows.end.div_ceil(BLOCK_ROWS);
        if self.coder() == Coder::Zstd {
            for i in blocks {
                write(i, &self.product_zstd(x, i)?);
            }
            return Ok(());
        }
        let mut i = blocks.start;
        while i < blocks.end {
            #[cfg(target_arch = "x86_64")]
            if cpu == Cpu::Avx512 && x.n_tokens == 1 && i + SIDE_BY_SIDE <= blocks.end {
                for (n, sums) in self.product_blocks_avx512::<SIDE_BY_SIDE>(x, i)?.iter().enumerate() {
                    write(i + n, sums);
                }
                i += SIDE_BY_SIDE;
                continue;
            }
            write(i, &self.product_block(cpu, x, i, &mut scratch)?);
            i += 1;
        }
        Ok(())
    }

    fn new_sums(&self, n_tokens: usize) -> Sums {
        match self.format() {
            Format::Int8 | Format::Rate => Sums::Fixed(vec![[0; BLOCK_ROWS]; n_tokens]),
            Format::Bf16 | Format::Fp8 => Sums::Float(vec![[0.0; BLOCK_ROWS]; n_tokens]),
        }
    }

    fn corrupt(&self) -> Error {
        crate::block::corrupt_stream()
    }

    /// The sums of one row block.
    fn product_block(&self, cpu: Cpu, x: &Operand, i: usize, scratch: &mut Scratch) -> Result<Sums> {
        #[cfg(target_arch = "x86_64")]
        if x.n_tokens == 1 && cpu == Cpu::Avx512 {
            let [sums] = self.product_blocks_avx512::<1>(x, i)?;
            return Ok(sums);
        }
        let geometry = self.geometry();
        let mut sums = self.new_sums(x.n_tokens);
        for j in 0..geometry.n_col_blocks() {
            let (block, start) = (self.block(i, j), geometry.cols(j).start);
            match cpu {
                #[cfg(target_arch = "x86_64")]
                Cpu::Avx2 if x.n_tokens == 1 && self.format().is_integer() => {
                    // SAFETY: `Cpu` values are made for what the machine has; `block` comes from a validated tensor.
                    let dot = unsafe {
                        crate::simd::avx2::dot_int8(self.plan(), &self.tables().entries, &block, x.from(0, start).pairs)
                    };
                    let (Some(dot), Sums::Fixed(sums)) = (dot, &mut sums) else { return Err(self.corrupt()) };
                    sums[0].iter_mut().zip(dot).for_each(|(s, d)| *s += d);
                }
                #[cfg(target_arch = "x86_64")]
                Cpu::Avx2 | Cpu::Avx512 => {
                    self.decode_quads(cpu, &block, &mut scratch.quads)?;
                    self.gemm_quads(cpu, x, start, block.n_cols, scratch, &mut sums);
                }
                _ => {
                    scratch.codes.resize(BLOCK_ROWS * block.n_cols, 0);
                    let params = &geometry.params;
                    // Patches are added below, as everywhere.
                    let unpatched = Block { patches: &[], ..block };
                    decode_block(self.format(), params, &self.tables().transitions, &unpatched, &mut scratch.codes)?;
                    self.product_codes(x, start, block.n_cols, &scratch.codes, &mut sums);
                }
            }
            self.add_patches(x, start, &block, &mut sums);
        }
        Ok(sums)
    }

    /// The sums of plain codes (row-major, up to 32 rows), added.
    fn product_codes(&self, x: &Operand, start: usize, n_cols: usize, codes: &[u16], sums: &mut Sums) {
        let format = self.format();
        for t in 0..x.n_tokens {
            for (row, codes) in codes.chunks_exact(n_cols).enumerate() {
                match sums {
                    Sums::Fixed(s) => {
                        let products = codes
                            .iter()
                            .enumerate()
                            .map(|(c, &code)| i64::from(code as u8 as i8) * x.fixed(t, start + c));
                        s[t][row] += products.sum::<i64>();
                    }
                    Sums::Float(s) => {
                        let x = &x.token(t)[start..start + n_cols];
                        s[t][row] += codes.iter().zip(x).map(|(&code, x)| code_value(format, code) * x).sum::<f32>();
                    }
                }
            }
        }
    }

    /// (value − filler) · x for every patch.
    fn add_patches(&self, x: &Operand, start: usize, block: &Block<'_>, sums: &mut Sums) {
        if block.patches.is_empty() {
            return;
        }
        let format = self.format();
        let filler = self.geometry().params.filler(format);
        for patch in block.patches() {
            let (row, col) = (patch.row(), start + patch.col());
            for t in 0..x.n_tokens {
                match sums {
                    Sums::Fixed(s) => {
                        // Without a trellis what stands in is the filler alone.
                        let stand_in = i64::from(filler as u8 as i8) + i64::from(patch.stand_in());
                        let difference = i64::from(patch.code() as u8 as i8) - stand_in;
                        s[t][row] += difference * x.fixed(t, col);
                    }
                    Sums::Float(s) => {
                        let x = x.token(t)[col];
                        s[t][row] += code_value(format, patch.code()) * x;
                        s[t][row] -= code_value(format, filler) * x;
                    }
                }
            }
        }
    }

    /// The sums of one row block of a zstd tensor; its codes are decoded for the block alone.
    fn product_zstd(&self, x: &Operand, i: usize) -> Result<Sums> {
        let mut sums = self.new_sums(x.n_tokens);
        let codes: Vec<u16> = match self.row_block_codes(i)? {
            Codes::U8(codes) => codes.iter().map(|&c| c.into()).collect(),
            Codes::U16(codes) => codes.into_owned(),
        };
        self.product_codes(x, 0, self.n_cols(), &codes, &mut sums);
        Ok(sums)
    }

    /// A block's codes by quads, bias and patches left out.
    fn decode_quads(&self, cpu: Cpu, block: &Block<'_>, quads: &mut Quads) -> Result<()> {
        let (plan, entries) = (self.plan(), &self.tables().entries);
        let _ = (plan, entries, &quads, block);
        let ok = match cpu {
            // SAFETY: `Cpu` values are made for what the machine has; `block` comes from a validated tensor.
            #[cfg(target_arch = "x86_64")]
            Cpu::Avx512 => unsafe {
                crate::simd::avx512::decode_quads(plan, entries, [block], std::array::from_mut(quads))
            },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Cpu::Avx2 => unsafe { crate::simd::avx2::decode_quads(plan, entries, block, quads) },
            _ => unreachable!("the plain decoder does not go by quads"),
        };
        if ok { Ok(()) } else { Err(self.corrupt()) }
    }
}

#[cfg(target_arch = "x86_64")]
impl EncodedTensor {
    /// One token through `N` row blocks from `i` on, side by side.
    fn product_blocks_avx512<const N: usize>(&self, x: &Operand, i: usize) -> Result<[Sums; N]> {
        use crate::simd::avx512;
        let (geometry, plan, entries) = (self.geometry(), self.plan(), &self.tables().entries);
        let mut sums: [Sums; N] = std::array::from_fn(|_| self.new_sums(1));
        for j in 0..geometry.n_col_blocks() {
            let blocks: [Block<'_>; N] = std::array::from_fn(|n| self.block(i + n, j));
            let refs: [&Block<'_>; N] = std::array::from_fn(|n| &blocks[n]);
            let cols = geometry.cols(j);
            let a = x.from(0, cols.start);
            if self.format().is_integer() {
                // SAFETY: `Cpu` values are made for what the machine has; the blocks come from a validated tensor.
                let dots = unsafe { avx512::dot_int8(plan, entries, refs, a.high, a.low) };
                let offset = 128 * x.fixed_sum(0, cols.clone());
                for (sums, [high, low]) in sums.iter_mut().zip(dots.ok_or_else(|| self.corrupt())?) {
                    let Sums::Fixed(s) = sums else { continue };
                    for (row, s) in s[0].iter_mut().enumerate() {
                        *s += 255 * i64::from(high[row]) + i64::from(low[row]) - offset;
                    }
                }
            } else {
                // SAFETY: as above.
                let dots = unsafe { avx512::dot_float(plan, entries, refs, a.values) };
                for (sums, dot) in sums.iter_mut().zip(dots.ok_or_else(|| self.corrupt())?) {
                    let Sums::Float(s) = sums else { continue };
                    s[0].iter_mut().zip(dot).for_each(|(s, d)| *s += d);
                }
            }
            for (n, block) in blocks.iter().enumerate() {
                self.add_patches(x, cols.start, block, &mut sums[n]);
            }
        }
        Ok(sums)
    }

    /// The products of decoded quads with all tokens, added to `sums`.
    fn gemm_quads(&self, cpu: Cpu, x: &Operand, start: usize, n_cols: usize, scratch: &mut Scratch, sums: &mut Sums) {
        use crate::simd::{avx2, avx512};
        let plan = self.plan();
        match sums {
            Sums::Fixed(sums) if cpu == Cpu::Avx512 => {
                const TOKENS: usize = 4;
                for (first, sums) in (0..x.n_tokens).step_by(TOKENS).zip(sums.chunks_mut(TOKENS)) {
                    // A short last group repeats a token, and drops the copy's sums.
                    let tokens: [Activations<'_>; TOKENS] =
                        std::array::from_fn(|k| x.from(first + k.min(sums.len() - 1), start));
                    let (high, low) = (std::array::from_fn(|k| tokens[k].high), std::array::from_fn(|k| tokens[k].low));
                    // SAFETY: `Cpu` values are made for what the machine has.
                    let dots: [_; TOKENS] =
                        unsafe { avx512::gemm_int8(plan.params.bias, &scratch.quads.low, high, low) };
                    for (k, (sums, [high, low])) in sums.iter_mut().zip(dots).enumerate() {
                        let offset = 128 * x.fixed_sum(first + k, start..start + n_cols);
                        for (row, s) in sums.iter_mut().enumerate() {
                            *s += 255 * i64::from(high[row]) + i64::from(low[row]) - offset;
                        }
                    }
                }
            }
            Sums::Fixed(sums) => {
                for (t, sums) in sums.iter_mut().enumerate() {
                    // SAFETY: `Cpu` values are made for what the machine has.
                    let dot = unsafe { avx2::gemm_int8(plan.params.bias, &scratch.quads.low, x.from(t, start).pairs) };
                    sums.iter_mut().zip(dot).for_each(|(s, d)| *s += d);
                }
            }
            Sums::Float(sums) => {
                scratch.values.resize(BLOCK_COLS_MAX, [0.0; BLOCK_ROWS]);
                let values = &mut scratch.values[..4 * scratch.quads.low.len()];
                if cpu == Cpu::Avx512 {
                    // SAFETY: `Cpu` values are made for what the machine has.
                    unsafe { avx512::quads_to_floats(plan, &scratch.quads, values) };
                } else {
                    // SAFETY: as above.
                    unsafe { avx2::quads_to_floats(plan, &scratch.quads, values) };
                }
                for (k, values) in values.chunks(VALUE_COLS).enumerate() {
                    let x = |t| x.from(t, start + k * VALUE_COLS).values;
                    if cpu == Cpu::Avx512 {
                        let done = gemm_groups(avx512::gemm_float::<8>, values, x, sums, 0);
                        gemm_groups(avx512::gemm_float::<1>, values, x, sums, done);
                    } else {
                        let done = gemm_groups(avx2::gemm_float::<2>, values, x, sums, 0);
                        gemm_groups(avx2::gemm_float::<1>, values, x, sums, done);
                    }
                }
            }
        }
    }
}

/// A product of decoded values with the activations of `N` tokens, added to their sums.
#[cfg(target_arch = "x86_64")]
type GemmFloat<const N: usize> = unsafe fn(&[[f32; BLOCK_ROWS]], [&[f32]; N], [&mut [f32; BLOCK_ROWS]; N]);

/// Takes tokens from `first` on through `gemm`, `N` at a time; returns how many are done. `x(t)` are token t's activations.
#[cfg(target_arch = "x86_64")]
fn gemm_groups<'a, const N: usize>(
    gemm: GemmFloat<N>,
    values: &[[f32; BLOCK_ROWS]],
    x: impl Fn(usize) -> &'a [f32],
    sums: &mut [[f32; BLOCK_ROWS]],
    first: usize,
) -> usize {
    let mut t = first;
    while let Some(sums) = sums[t..].first_chunk_mut::<N>() {
        // SAFETY: callers take a level that `Cpu` has found on the machine.
        unsafe { gemm(values, std::array::from_fn(|k| x(t + k)), sums.each_mut()) };
        t += N;
    }
    t
}

/// Row block `i` of `t` into `out` (rows × n_cols), by a SIMD decoder.
#[cfg(target_arch = "x86_64")]
pub(crate) fn decode_dense<T: CodeType>(
    t: &EncodedTensor,
    cpu: Cpu,
    i: usize,
    quads: &mut [Quads; 2],
    out: &mut [T],
) -> Result<()> {
    let geometry = t.geometry();
    let n_rows = geometry.rows(i).len();
    let mut j = 0;
    while j < geometry.n_col_blocks() {
        let block = t.block(i, j);
        // Two blocks side by side, where the next is as wide.
        let next = (cpu == Cpu::Avx512 && j + 1 < geometry.n_col_blocks()).then(|| t.block(i, j + 1));
        let next = next.filter(|next| next.n_cols == block.n_cols);
        let blocks = [Some(block), next];
        match &blocks {
            [Some(a), Some(b)] => {
                // SAFETY: `Cpu` values are made for what the machine has; the blocks come from a validated tensor.
                let ok = unsafe { crate::simd::avx512::decode_quads(t.plan(), &t.tables().entries, [a, b], quads) };
                ok.then_some(()).ok_or_else(|| t.corrupt())?;
            }
            _ => t.decode_quads(cpu, blocks[0].as_ref().expect("the first is there"), &mut quads[0])?,
        }
        for (block, quads) in blocks.iter().flatten().zip(&*quads) {
            let out = &mut out[geometry.cols(j).start..];
            // SAFETY: as above; every level with SIMD has AVX2.
            unsafe { T::from_quads(quads, geometry.params.bias, block.n_cols, out, geometry.n_cols, n_rows) };
            for patch in block.patches() {
                out[patch.row() * geometry.n_cols + patch.col()] = T::from_code(patch.code());
            }
            j += 1;
        }
    }
    Ok(())
}
