//! What the compressed products are measured against: reading memory, and a product from plain INT8 codes.
//!
//! The SIMD module of the bench; everything outside it is plain Rust.

use codecllm_codec::Cpu;
use std::ops::Range;

/// Reads all of `data` once, as `n_streams` streams side by side, and returns a value that depends on every word.
pub fn read_memory(data: &[u64], n_streams: usize, prefetch: bool) -> u64 {
    const LINE: usize = 8;
    /// Bytes by which the prefetch leads, in lines.
    const AHEAD: usize = 24;
    let lines = data.as_chunks::<LINE>().0;
    let per_stream = lines.len() / n_streams;
    let mut sum = [0u64; LINE];
    for i in 0..per_stream {
        for stream in 0..n_streams {
            let line = stream * per_stream + i;
            if prefetch {
                prefetch_line(lines, line + AHEAD);
            }
            for (s, word) in sum.iter_mut().zip(&lines[line]) {
                *s = s.wrapping_add(*word);
            }
        }
    }
    sum.iter().fold(0, |a, b| a ^ b)
}

#[inline]
fn prefetch_line(lines: &[[u64; 8]], index: usize) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch never faults; the address need not be valid.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(lines.as_ptr().wrapping_add(index).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (lines, index);
}

/// Plain INT8 codes with a scale per row, as a tuned INT8 engine would hold them.
#[derive(Clone)]
pub struct Int8Matrix {
    n_cols: usize,
    /// `[row][stride]`: code + 128, so that `vpdpbusd` takes it as its unsigned operand; padding is 128.
    codes: Vec<u8>,
    stride: usize,
    scales: Vec<f32>,
}

/// Activations in 16-bit fixed point, as integers and as two signed bytes each: value = scale · (256 · high + low).
pub struct Int8Operand {
    words: Vec<i16>,
    high: Vec<i8>,
    low: Vec<i8>,
    sum: i64,
    scale: f32,
}

/// Columns are padded to a multiple of this: one AVX-512 register of codes.
const PAD: usize = 64;
/// Rows that a kernel works on side by side: as many streams from memory, one load of the activations for all.
const ROWS: usize = 4;

impl Int8Operand {
    /// Rounds `x` to 16 bits.
    pub fn new(x: &[f32]) -> Self {
        // 127 · 256 + 127, so that both halves fit a signed byte.
        const MAX: f32 = 32639.0;
        let absmax = x.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        let scale = if absmax > 0.0 { absmax / MAX } else { 1.0 };
        let mut words: Vec<i16> = x.iter().map(|v| (v / scale).round() as i16).collect();
        words.resize(x.len().next_multiple_of(PAD), 0);
        let high: Vec<i8> = words.iter().map(|&w| ((i32::from(w) + 128) >> 8) as i8).collect();
        let low = words.iter().zip(&high).map(|(&w, &h)| (i32::from(w) - (i32::from(h) << 8)) as i8).collect();
        let sum = words.iter().map(|&w| i64::from(w)).sum();
        Self { words, high, low, sum, scale }
    }
}

impl Int8Matrix {
    /// `codes`: two's complement bytes, [row][column]; `scales`: one a row.
    pub fn new(codes: &[u8], n_cols: usize, scales: Vec<f32>) -> Self {
        let stride = n_cols.next_multiple_of(PAD);
        let mut padded = vec![128u8; stride * scales.len()];
        for (to, from) in padded.chunks_mut(stride).zip(codes.chunks(n_cols)) {
            to.iter_mut().zip(from).for_each(|(t, f)| *t = f ^ 0x80);
        }
        Self { n_cols, codes: padded, stride, scales }
    }

    /// Bytes that a product reads.
    pub fn bytes(&self) -> usize {
        self.codes.len() + 4 * self.scales.len()
    }

    /// The weights' values, row-major.
    pub fn values(&self) -> Vec<f32> {
        let rows = self.codes.chunks(self.stride).zip(&self.scales);
        rows.flat_map(|(row, scale)| row[..self.n_cols].iter().map(move |&c| (f32::from(c) - 128.0) * scale)).collect()
    }

    /// `y[i]` = row `rows.start + i` times `x`. Exact up to the rounding of `x` and of the result.
    pub fn product(&self, cpu: Cpu, x: &Int8Operand, rows: Range<usize>, y: &mut [f32]) {
        assert_eq!(x.words.len(), self.stride, "the operand has another width than the {} columns", self.n_cols);
        let finish = |row: usize, dot: i64| ((dot - 128 * x.sum) as f64 * f64::from(x.scale)) as f32 * self.scales[row];
        let mut row = rows.start;
        while row < rows.end {
            let n = ROWS.min(rows.end - row);
            // A short last group computes its last row several times.
            let codes: [&[u8]; ROWS] = std::array::from_fn(|i| {
                let r = row + i.min(n - 1);
                &self.codes[r * self.stride..(r + 1) * self.stride]
            });
            for (i, dot) in dots(cpu, codes, x).into_iter().take(n).enumerate() {
                y[row - rows.start + i] = finish(row + i, dot);
            }
            row += n;
        }
    }
}

/// Σ (code + 128) · x of each row.
fn dots(cpu: Cpu, rows: [&[u8]; ROWS], x: &Int8Operand) -> [i64; ROWS] {
    match cpu {
        // SAFETY: a `Cpu` other than `Scalar` is only made where the machine has its features; every slice has the
        // same length, a multiple of `PAD`.
        #[cfg(target_arch = "x86_64")]
        Cpu::Avx512 => unsafe { x86::dots_avx512(rows, x) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Cpu::Avx2 => unsafe { x86::dots_avx2(rows, x) },
        _ => rows.map(|row| row.iter().zip(&x.words).map(|(&c, &w)| i64::from(c) * i64::from(w)).sum()),
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Int8Operand, PAD, ROWS};
    use std::arch::x86_64::*;

    /// Bytes by which the software prefetch leads each row's stream.
    const AHEAD: usize = 1024;

    /// # Safety
    /// AVX-512 F, BW and VNNI; rows and operand of one length, a multiple of 64.
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    pub unsafe fn dots_avx512(rows: [&[u8]; ROWS], x: &Int8Operand) -> [i64; ROWS] {
        let len = rows[0].len();
        let mut high = [_mm512_setzero_si512(); ROWS];
        let mut low = high;
        // A step adds at most 4 · 255 · 128 to a sum of 32 bits, so 2^14 steps, 2^20 columns, cannot overflow it.
        assert!(len <= 1 << 20, "{len} columns could overflow the sums");
        for col in (0..len).step_by(PAD) {
            // SAFETY: `col + 64 <= len` in every slice; a prefetch never faults.
            unsafe {
                let x_high = _mm512_loadu_si512(x.high.as_ptr().add(col).cast());
                let x_low = _mm512_loadu_si512(x.low.as_ptr().add(col).cast());
                for i in 0..ROWS {
                    let at = rows[i].as_ptr().add(col);
                    _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(AHEAD).cast());
                    let codes = _mm512_loadu_si512(at.cast());
                    high[i] = _mm512_dpbusd_epi32(high[i], codes, x_high);
                    low[i] = _mm512_dpbusd_epi32(low[i], codes, x_low);
                }
            }
        }
        let mut dots = [0; ROWS];
        for i in 0..ROWS {
            dots[i] = 256 * sum_i32(high[i]) + sum_i32(low[i]);
        }
        dots
    }

    /// The sum of the lanes, in 64 bits.
    #[target_feature(enable = "avx512f")]
    fn sum_i32(v: __m512i) -> i64 {
        let low = _mm512_cvtepi32_epi64(_mm512_castsi512_si256(v));
        let high = _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64::<1>(v));
        _mm512_reduce_add_epi64(_mm512_add_epi64(low, high))
    }

    /// # Safety
    /// AVX2; rows and operand of one length, a multiple of 64.
    #[target_feature(enable = "avx2")]
    pub unsafe fn dots_avx2(rows: [&[u8]; ROWS], x: &Int8Operand) -> [i64; ROWS] {
        let len = rows[0].len();
        let mut sums = [_mm256_setzero_si256(); ROWS];
        // A step of 16 columns adds at most 2 · 255 · 32640 to a sum of 32 bits: 128 of them cannot overflow it.
        for start in (0..len).step_by(16 * 128) {
            let mut narrow = [_mm256_setzero_si256(); ROWS];
            for col in (start..len.min(start + 16 * 128)).step_by(16) {
                // SAFETY: `col + 16 <= len` in every slice; a prefetch never faults.
                unsafe {
                    let x_words = _mm256_loadu_si256(x.words.as_ptr().add(col).cast());
                    for i in 0..ROWS {
                        let at = rows[i].as_ptr().add(col);
                        _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(AHEAD).cast());
                        let codes = _mm256_cvtepu8_epi16(_mm_loadu_si128(at.cast()));
                        narrow[i] = _mm256_add_epi32(narrow[i], _mm256_madd_epi16(codes, x_words));
                    }
                }
            }
            for i in 0..ROWS {
                let (a, b) = (_mm256_castsi256_si128(narrow[i]), _mm256_extracti128_si256::<1>(narrow[i]));
                let wide = _mm256_add_epi64(_mm256_cvtepi32_epi64(a), _mm256_cvtepi32_epi64(b));
                sums[i] = _mm256_add_epi64(sums[i], wide);
            }
        }
        let mut dots = [0; ROWS];
        for i in 0..ROWS {
            let mut lanes = [0i64; 4];
            // SAFETY: `lanes` has 32 bytes.
            unsafe { _mm256_storeu_si256(lanes.as_mut_ptr().cast(), sums[i]) };
            dots[i] = lanes.iter().sum();
        }
        dots
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_level_computes_the_same_integers() {
        for n_cols in [1, 63, 64, 65, 5000] {
            // The extremes, so that an overflow or a wrong sign shows.
            let codes: Vec<u8> = (0..5 * n_cols).map(|i| [127, 129, 0, 1, 255, 127][i % 6]).collect();
            let x: Vec<f32> = (0..n_cols).map(|i| [1.0, -1.0, 0.5, 1.0, 1.0][i % 5]).collect();
            let operand = Int8Operand::new(&x);
            let matrix = Int8Matrix::new(&codes, n_cols, vec![2.0; 5]);
            let expected: Vec<f64> = codes
                .chunks(n_cols)
                .map(|row| row.iter().zip(&x).map(|(&c, &x)| 2.0 * f64::from(c as i8) * f64::from(x)).sum())
                .collect();
            for cpu in Cpu::available() {
                let mut y = [0.0; 4];
                matrix.product(cpu, &operand, 1..5, &mut y);
                for (found, expected) in y.iter().zip(&expected[1..]) {
                    assert!((f64::from(*found) - expected).abs() < 0.01 * (n_cols as f64), "{cpu}: {found} {expected}");
                }
            }
        }
    }

    #[test]
    fn every_stream_is_read() {
        let data: Vec<u64> = (0..1024).collect();
        let sums: Vec<u64> = [1, 2, 4, 8, 16].iter().map(|&n| read_memory(&data, n, n % 2 == 0)).collect();
        assert!(sums.iter().all(|s| s == &sums[0]), "{sums:?}");
    }
}
