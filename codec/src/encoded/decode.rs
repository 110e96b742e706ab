//! Decoding: to codes, and to the values of rows.

use super::EncodedTensor;
use super::header::ZSTD_CHUNK_BYTES;
use crate::block::{BLOCK_ROWS, Params, decode_block};
use crate::cpu::Cpu;
use crate::entropy::{FrequencyTable, Transition};
use crate::error::{Error, Result};
use crate::format::{Coder, Format};
#[cfg(target_arch = "x86_64")]
use crate::product::decode_dense;
use crate::quantize::{Codes, code_value};
use crate::simd::{Plan, Quads};
use rayon::prelude::*;
use std::borrow::Cow;
use std::ops::Range;

/// What decoders look up, built once from the header and the table.
#[derive(Debug)]
pub(crate) struct DecodeTables {
    /// By slot, for the plain decoder.
    pub transitions: Vec<Transition>,
    /// By slot, for the others: bits 0–4 the bits to read, 5–19 the symbol, 20–31 what to XOR into the shifted state, aligned to the top
    /// of the T-bit state (bit 31 is the state's highest).
    pub entries: Vec<u32>,
    /// How codes come from raw words and entries.
    pub plan: Plan,
}

impl DecodeTables {
    pub(super) fn new(format: Format, params: Params, table: &FrequencyTable) -> Self {
        let transitions = table.transitions();
        let table_bits = table.table_bits();
        let entries = transitions
            .iter()
            .enumerate()
            .map(|(slot, t)| {
                let shifted = (slot as u32) << t.n_bits;
                let delta = (shifted ^ u32::from(t.base)) << (32 - table_bits);
                delta | u32::from(t.symbol) << 5 | u32::from(t.n_bits)
            })
            .collect();
        Self { transitions, entries, plan: Plan::new(format, params) }
    }
}

impl EncodedTensor {
    /// The codes of the rows of block row `i`.
    pub(crate) fn row_block_codes(&self, i: usize) -> Result<Codes<'static>> {
        self.codes(Cpu::Scalar, self.geometry().rows(i))
    }

    /// The codes of block row `i` (`rows × n_cols`, row-major), through the decoder for `cpu`.
    fn decode_row_block<T: CodeType>(&self, cpu: Cpu, i: usize, scratch: &mut Scratch, out: &mut [T]) -> Result<()> {
        #[cfg(target_arch = "x86_64")]
        if cpu != Cpu::Scalar {
            return decode_dense(self, cpu, i, &mut scratch.quads, out);
        }
        let _ = cpu;
        let geometry = self.geometry();
        let n_rows = geometry.rows(i).len();
        let codes = &mut scratch.codes;
        for j in 0..geometry.n_col_blocks() {
            let cols = geometry.cols(j);
            codes.resize(BLOCK_ROWS * cols.len(), 0u16);
            decode_block(
                self.header.format,
                &self.header.params,
                &self.tables().transitions,
                &self.block(i, j),
                codes,
            )?;
            for (row, codes) in codes.chunks_exact(cols.len()).take(n_rows).enumerate() {
                let out = &mut out[row * geometry.n_cols..][cols.clone()];
                out.iter_mut().zip(codes).for_each(|(o, &c)| *o = T::from_code(c));
            }
        }
        Ok(())
    }

    /// All codes, through the decoder for `cpu`, on all threads of the current pool.
    ///
    /// # Errors
    /// A payload that does not decode.
    pub fn decode_codes(&self, cpu: Cpu) -> Result<Codes<'static>> {
        self.codes(cpu, 0..self.n_rows())
    }

    /// What the entropy coder was given: all codes, with a trellis the numbers that they follow from.
    ///
    /// # Errors
    /// A payload that does not decode.
    pub fn coded_numbers(&self, cpu: Cpu) -> Result<Codes<'static>> {
        let mut codes = self.decode_codes(cpu)?;
        if let (true, Codes::U8(codes)) = (self.header.params.trellis, &mut codes) {
            codes.to_mut().iter_mut().for_each(|code| *code = (*code as i8 >> 1) as u8);
        }
        Ok(codes)
    }

    fn codes(&self, cpu: Cpu, rows: Range<usize>) -> Result<Codes<'static>> {
        Ok(match self.header.format {
            Format::Bf16 => Codes::U16(Cow::Owned(self.codes_of_rows::<u16>(cpu, rows)?)),
            _ => Codes::U8(Cow::Owned(self.codes_of_rows::<u8>(cpu, rows)?)),
        })
    }

    /// The codes of a run of row blocks into the caller's buffer, on this thread alone.
    ///
    /// # Errors
    /// Rows that do not begin at a multiple of 32 or leave the matrix, a buffer of another size or width, a payload that
    /// does not decode.
    pub fn decode_codes_into(&self, cpu: Cpu, rows: Range<usize>, out: CodesMut<'_>) -> Result<()> {
        match (self.header.format, out) {
            (Format::Bf16, CodesMut::U16(out)) => self.codes_into(cpu, rows, out),
            (Format::Fp8 | Format::Int8 | Format::Rate, CodesMut::U8(out)) => self.codes_into(cpu, rows, out),
            (format, _) => Err(Error::Parameter(format!(
                "codes of `{format}` have {} bits; the buffer's differ",
                format.code_bits()
            ))),
        }
    }

    fn codes_into<T: CodeType>(&self, cpu: Cpu, rows: Range<usize>, out: &mut [T]) -> Result<()> {
        let n_cols = self.n_cols();
        let ends_well = rows.end == self.n_rows() || rows.end.is_multiple_of(BLOCK_ROWS);
        if !rows.start.is_multiple_of(BLOCK_ROWS) || !ends_well || rows.end > self.n_rows() || rows.start > rows.end {
            return Err(Error::Parameter(format!(
                "rows {rows:?} are no row blocks of a matrix of {} rows",
                self.n_rows()
            )));
        }
        if out.len() != rows.len() * n_cols {
            return Err(Error::Parameter(format!("rows {rows:?} of {n_cols} codes do not fit {} codes", out.len())));
        }
        if self.header.coder == Coder::Zstd {
            out.copy_from_slice(&self.zstd_codes(rows)?);
            return Ok(());
        }
        let first_block = rows.start / BLOCK_ROWS;
        let mut scratch = Scratch::default();
        let mut blocks = out.chunks_mut(BLOCK_ROWS * n_cols).enumerate();
        blocks.try_for_each(|(i, out)| self.decode_row_block(cpu, first_block + i, &mut scratch, out))
    }

    /// The codes of a run of rows.
    fn codes_of_rows<T: CodeType>(&self, cpu: Cpu, rows: Range<usize>) -> Result<Vec<T>> {
        let n_cols = self.n_cols();
        if self.header.coder == Coder::Zstd {
            return self.zstd_codes(rows);
        }
        let first_block = rows.start / BLOCK_ROWS;
        let first_row = first_block * BLOCK_ROWS;
        let end = rows.end.next_multiple_of(BLOCK_ROWS).min(self.n_rows());
        let mut codes = vec![T::default(); (end - first_row) * n_cols];
        codes
            .par_chunks_mut(BLOCK_ROWS * n_cols)
            .enumerate()
            .try_for_each_init(Scratch::default, |scratch, (i, out)| {
                self.decode_row_block(cpu, first_block + i, scratch, out)
            })?;
        codes.truncate((rows.end - first_row) * n_cols);
        codes.drain(..(rows.start - first_row) * n_cols);
        Ok(codes)
    }

    fn zstd_codes<T: CodeType>(&self, rows: Range<usize>) -> Result<Vec<T>> {
        let width = size_of::<T>();
        let (first, end) = (rows.start * self.n_cols() * width, rows.end * self.n_cols() * width);
        let total = self.n_rows() * self.n_cols() * width;
        let frames = first / ZSTD_CHUNK_BYTES..end.div_ceil(ZSTD_CHUNK_BYTES);
        let skipped = frames.start * ZSTD_CHUNK_BYTES;
        let mut bytes = vec![0u8; (frames.end * ZSTD_CHUNK_BYTES).min(total) - skipped];
        bytes.par_chunks_mut(ZSTD_CHUNK_BYTES).zip(frames).try_for_each(|(chunk, frame)| {
            let expected = chunk.len();
            match zstd::bulk::decompress_to_buffer(self.zstd_frame(frame), chunk) {
                Ok(n) if n == expected => Ok(()),
                Ok(n) => {
                    Err(Error::format("zstd frame", format!("frame {frame} holds {n} bytes, expected {expected}")))
                }
                Err(e) => Err(Error::format("zstd frame", format!("frame {frame} does not decode: {e}"))),
            }
        })?;
        Ok(bytes[first - skipped..end - skipped].chunks_exact(width).map(T::from_bytes).collect())
    }

    fn zstd_frame(&self, index: usize) -> &[u8] {
        &self.data[self.zstd_frame_range(index)]
    }

    fn zstd_frame_range(&self, index: usize) -> Range<usize> {
        let offsets = self.section(&self.sections.offsets).as_chunks::<8>().0;
        let at = |i: usize| self.sections.stream.start + u64::from_le_bytes(offsets[i]) as usize;
        at(index)..at(index + 1)
    }

    /// Where the frames of a `zstd` tensor lie in [`Self::bytes`]. Each holds 65,536 bytes of the codes, the last one the rest.
    /// None with `rans`.
    pub fn frames(&self) -> Vec<Range<usize>> {
        match self.header.coder {
            Coder::Rans => Vec::new(),
            Coder::Zstd => (0..self.header.zstd_chunks()).map(|i| self.zstd_frame_range(i)).collect(),
        }
    }

    /// The values of a run of rows, row-major; only the blocks that hold them are decoded.
    ///
    /// # Errors
    /// Rows that the matrix does not have, a buffer of another size, a payload that does not decode.
    pub fn decode_rows(&self, cpu: Cpu, rows: Range<usize>, out: &mut [f32]) -> Result<()> {
        let n_cols = self.n_cols();
        if rows.end > self.n_rows() || rows.start > rows.end || out.len() != rows.len() * n_cols {
            return Err(Error::Parameter(format!(
                "rows {rows:?} into {} values: the matrix is {} × {n_cols}",
                out.len(),
                self.n_rows()
            )));
        }
        let codes = self.codes(cpu, rows.clone())?;
        for (r, out) in out.chunks_exact_mut(n_cols).enumerate() {
            let scale = self.scale(rows.start + r);
            let value = |c: usize| code_value(self.header.format, codes.get(r * n_cols + c)) * scale;
            out.iter_mut().enumerate().for_each(|(c, v)| *v = value(c));
        }
        Ok(())
    }
}

/// A caller's buffer for codes, row-major.
#[derive(Debug)]
pub enum CodesMut<'a> {
    /// `fp8` and `int8`.
    U8(&'a mut [u8]),
    /// `bf16`.
    U16(&'a mut [u16]),
}

/// What a thread reuses from block to block of a dense decode.
#[derive(Default)]
struct Scratch {
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    quads: [Quads; 2],
    codes: Vec<u16>,
}

/// The two integers that codes are kept in.
pub(crate) trait CodeType: Copy + Default + Send + Sync + Into<u16> {
    fn from_code(code: u16) -> Self;
    fn from_bytes(bytes: &[u8]) -> Self;
    /// Decoded quads as rows of codes, with the bias added: row `r` at `out[r · stride..]`, `n_cols` codes each.
    ///
    /// # Safety
    /// The machine has AVX2.
    #[cfg(target_arch = "x86_64")]
    unsafe fn from_quads(quads: &Quads, bias: i32, n_cols: usize, out: &mut [Self], stride: usize, n_rows: usize);
}

impl CodeType for u8 {
    fn from_code(code: u16) -> Self {
        code as u8
    }

    fn from_bytes(bytes: &[u8]) -> Self {
        bytes[0]
    }

    #[cfg(target_arch = "x86_64")]
    unsafe fn from_quads(quads: &Quads, bias: i32, n_cols: usize, out: &mut [Self], stride: usize, n_rows: usize) {
        // SAFETY: the caller's promise is the same.
        unsafe { crate::simd::avx2::quads_to_u8(quads, bias, n_cols, out, stride, n_rows) }
    }
}

impl CodeType for u16 {
    fn from_code(code: u16) -> Self {
        code
    }

    fn from_bytes(bytes: &[u8]) -> Self {
        u16::from_le_bytes([bytes[0], bytes[1]])
    }

    #[cfg(target_arch = "x86_64")]
    unsafe fn from_quads(quads: &Quads, bias: i32, n_cols: usize, out: &mut [Self], stride: usize, n_rows: usize) {
        // SAFETY: the caller's promise is the same.
        unsafe { crate::simd::avx2::quads_to_u16(quads, bias, n_cols, out, stride, n_rows) }
    }
}
