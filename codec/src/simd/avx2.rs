//! AVX2: four registers of 8 lanes a block.

use super::{Plan, Quads, consumed_all, prefetch};
use crate::block::{BLOCK_ROWS, Block};
use crate::format::Format;
use std::arch::x86_64::*;

macro_rules! features {
    ($($item:item)*) => { $( #[target_feature(enable = "avx2,fma,bmi2,popcnt")] $item )* };
}

/// Registers of a block.
const GROUPS: usize = 4;

/// What takes a block's codes, a quad of columns of 8 rows at a time.
trait Sink {
    /// Whether bits 8–15 of the codes are wanted.
    const WIDE: bool;
    /// Codes of quad `quad` of rows 8·`group` and up: bits 0–7, and 8–15 if wanted.
    ///
    /// # Safety
    /// The features of this module are there, and `quad` lies within the block's units.
    unsafe fn quad(&mut self, group: usize, quad: usize, low: __m256i, high: __m256i);
}

/// By mask of the lanes that refill: where each lane's word lies among the next eight.
static EXPAND: [[u8; 8]; 256] = {
    let mut table = [[0u8; 8]; 256];
    let mut mask = 0;
    while mask < 256 {
        let (mut lane, mut rank) = (0, 0);
        while lane < 8 {
            table[mask][lane] = rank;
            rank += (mask >> lane & 1) as u8;
            lane += 1;
        }
        mask += 1;
    }
    table
};

/// `x` shifted left by `count`, or right by −`count`, in 32-bit lanes.
#[inline(always)]
unsafe fn shift(x: __m256i, count: i32) -> __m256i {
    // SAFETY: the caller has the features.
    unsafe {
        if count >= 0 {
            _mm256_sll_epi32(x, _mm_cvtsi32_si128(count))
        } else {
            _mm256_srl_epi32(x, _mm_cvtsi32_si128(-count))
        }
    }
}

/// The part bits that four codes take from the entries of one group: bits 0–7 of the codes with `to` 0, 8–15 with 8.
#[inline(always)]
unsafe fn parts(plan: &Plan, entry: &[[__m256i; GROUPS]; 4], group: usize, quad: usize, to: i32) -> __m256i {
    let p = &plan.params;
    let (g, w) = (p.parts_per_symbol as usize, p.part_bits as i32);
    let low_bits = p.raw_bits.saturating_sub(1) as i32;
    let mask = (((1u32 << w) - 1) << low_bits) >> to & 0xff;
    // SAFETY: the caller has the features.
    unsafe {
        let mut all = _mm256_setzero_si256();
        for byte in 0..4 {
            let part = (quad % 2 * 4 + byte) % g;
            let step = if g >= 4 { 0 } else { byte / g };
            let moved = shift(entry[step][group], 8 * byte as i32 + low_bits - to - 5 - w * part as i32);
            let mask = _mm256_set1_epi32((mask << (8 * byte)) as i32);
            all = _mm256_or_si256(all, _mm256_and_si256(moved, mask));
        }
        all
    }
}

/// The codes of a quad of one group: bits 0–7 and 8–15.
#[inline(always)]
unsafe fn codes<const WIDE: bool>(
    plan: &Plan,
    entry: &[[__m256i; GROUPS]; 4],
    raw: *const u8,
    group: usize,
    quad: usize,
) -> (__m256i, __m256i) {
    let raw_bits = plan.params.raw_bits;
    // SAFETY: `raw` is a unit's words, 128 bytes each.
    unsafe {
        let mut bytes = [_mm256_setzero_si256(); 2]; // of the raw number
        for f in 0..plan.n_fields {
            let field = plan.fields[f];
            let word = _mm256_loadu_si256(raw.add(128 * plan.words[quad][f] + 32 * group).cast());
            let to = (field.shift % 8) as i32;
            let mask = ((1u32 << field.width) - 1) << to;
            let moved = shift(word, to - (quad as u32 * field.width % 8) as i32);
            let part = &mut bytes[field.shift as usize / 8];
            *part = _mm256_or_si256(*part, _mm256_and_si256(moved, _mm256_set1_epi8(mask as i8)));
        }
        let mut low = parts(plan, entry, group, quad, 0);
        let mut high = if WIDE { parts(plan, entry, group, quad, 8) } else { _mm256_setzero_si256() };
        if raw_bits > 0 {
            let low_mask = (1u32 << (raw_bits - 1)) - 1;
            low = _mm256_or_si256(low, _mm256_and_si256(bytes[0], _mm256_set1_epi8(low_mask as i8)));
            // The sign, moved to the top of its byte.
            let sign = raw_bits as usize - 1;
            let top = _mm256_sll_epi16(bytes[sign / 8], _mm_cvtsi32_si128(7 - sign as i32 % 8));
            match plan.format {
                Format::Int8 | Format::Rate => {
                    low = _mm256_xor_si256(low, _mm256_cmpgt_epi8(_mm256_setzero_si256(), top))
                }
                Format::Fp8 => low = _mm256_or_si256(low, _mm256_and_si256(top, _mm256_set1_epi8(-128))),
                Format::Bf16 => {
                    high = _mm256_or_si256(high, _mm256_and_si256(bytes[1], _mm256_set1_epi8((low_mask >> 8) as i8)));
                    high = _mm256_or_si256(high, _mm256_and_si256(top, _mm256_set1_epi8(-128)));
                }
            }
        }
        (low, high)
    }
}

/// Decodes a block into `sink`; false if the stream is corrupt.
///
/// # Safety
/// The features of this module are there; the block is validated; `entries` is its table.
#[inline(always)]
unsafe fn run<S: Sink>(plan: &Plan, entries: &[u32], block: &Block<'_>, sink: &mut S) -> bool {
    let p = &plan.params;
    let (g, raw_bits) = (p.parts_per_symbol as usize, p.raw_bits as usize);
    debug_assert_eq!(entries.len(), 1 << p.table_bits);
    if block.stream_bytes < 2 * BLOCK_ROWS {
        return false;
    }
    // SAFETY: the stream holds the first words; from any position up to its end, 64 bytes (a step's loads) follow
    // within the tensor; a state has T bits, so that gathers stay in the table; raw words of whole units are there.
    unsafe {
        let start = block.stream.as_ptr();
        let end = start.add(block.stream_bytes);
        let mut next = start.add(2 * BLOCK_ROWS);
        let mut x: [__m256i; GROUPS] = std::array::from_fn(|i| {
            _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(start.add(16 * i).cast())), 16)
        });
        let mut position = [_mm256_set1_epi32(p.table_bits as i32); GROUPS];
        let to_index = _mm_cvtsi32_si128(32 - p.table_bits as i32);
        let state_mask = _mm256_set1_epi32(plan.state_mask as i32);
        let word_shift = _mm256_set1_epi32(16 - p.table_bits as i32);
        let mut steps_left = block.n_cols.div_ceil(g);
        let mut quad_index = 0;
        let mut entry = [[_mm256_setzero_si256(); GROUPS]; 4];
        // With a trellis, the grids of the quad to come and of the one after it, as far as that is known.
        let mut grids = [[_mm256_setzero_si256(); 2]; GROUPS];
        for unit in 0..block.n_cols.div_ceil(32) {
            let raw = block.raw.as_ptr().add(unit * raw_bits * 128);
            prefetch(raw, raw_bits, next);
            for quad in 0..8 {
                if g < 8 || quad % 2 == 0 {
                    for entry in entry.iter_mut().take((4 / g).max(1)) {
                        if steps_left == 0 {
                            break;
                        }
                        steps_left -= 1;
                        if next > end {
                            return false;
                        }
                        for i in 0..GROUPS {
                            let e =
                                _mm256_i32gather_epi32::<4>(entries.as_ptr().cast(), _mm256_srl_epi32(x[i], to_index));
                            entry[i] = e;
                            if steps_left == 0 {
                                continue; // a lane's last symbol leads nowhere
                            }
                            let shifted = _mm256_sllv_epi32(x[i], _mm256_and_si256(e, _mm256_set1_epi32(31)));
                            let moved = _mm256_xor_si256(shifted, _mm256_and_si256(e, state_mask));
                            let before = position[i];
                            position[i] = _mm256_add_epi32(before, e);
                            // Bit 4 of the position flips in the lanes that need a word: to bit 31, as a mask.
                            let flips = _mm256_slli_epi32(_mm256_xor_si256(before, position[i]), 27);
                            let mask = _mm256_movemask_ps(_mm256_castsi256_ps(flips)) as usize;
                            let words = _mm256_cvtepu16_epi32(_mm_loadu_si128(next.cast()));
                            let place = _mm256_cvtepu8_epi32(_mm_loadl_epi64(EXPAND[mask].as_ptr().cast()));
                            let words = _mm256_and_si256(
                                _mm256_permutevar8x32_epi32(words, place),
                                _mm256_srai_epi32(flips, 31),
                            );
                            let bits = _mm256_and_si256(position[i], _mm256_set1_epi32(15));
                            let words = _mm256_sllv_epi32(words, _mm256_add_epi32(bits, word_shift));
                            x[i] = _mm256_or_si256(moved, words);
                            next = next.add(2 * mask.count_ones() as usize);
                        }
                    }
                }
                for (group, grids) in grids.iter_mut().enumerate() {
                    let (mut low, high) = match S::WIDE && plan.format == Format::Bf16 {
                        true => codes::<true>(plan, &entry, raw, group, quad),
                        false => codes::<false>(plan, &entry, raw, group, quad),
                    };
                    if p.trellis {
                        let [now, next] = *grids;
                        let odd = _mm256_and_si256(low, _mm256_set1_epi8(1));
                        *grids = [_mm256_xor_si256(next, odd), now];
                        low = _mm256_or_si256(_mm256_add_epi8(low, low), now);
                    }
                    sink.quad(group, quad_index, low, high);
                }
                quad_index += 1;
            }
        }
        consumed_all(block, next.offset_from(start) as usize)
    }
}

/// Stores codes as [`Quads`].
struct Store<const WIDE: bool> {
    low: *mut u8,
    high: *mut u8,
}

impl<const WIDE: bool> Sink for Store<WIDE> {
    const WIDE: bool = WIDE;
    #[inline(always)]
    unsafe fn quad(&mut self, group: usize, quad: usize, low: __m256i, high: __m256i) {
        // SAFETY: the buffers have 128 bytes for every quad of the block's units.
        unsafe {
            let at = 128 * quad + 32 * group;
            _mm256_storeu_si256(self.low.add(at).cast(), low);
            if WIDE {
                _mm256_storeu_si256(self.high.add(at).cast(), high);
            }
        }
    }
}

/// Quads after which 32-bit sums of products of a byte and 16 bits could overflow, halved.
const QUADS_PER_SUM: usize = 64;

/// Integer dot products with 16-bit activations.
struct DotInt8<'a> {
    bias: __m256i,
    pairs: &'a [[i16; 4]],
    sums: [__m256i; GROUPS],
    total: [i64; BLOCK_ROWS],
}

impl DotInt8<'_> {
    #[inline(always)]
    unsafe fn flush(&mut self, group: usize) {
        let mut rows = [0i32; 8];
        // SAFETY: eight rows; the caller has the features.
        unsafe {
            _mm256_storeu_si256(rows.as_mut_ptr().cast(), self.sums[group]);
            self.sums[group] = _mm256_setzero_si256();
        }
        self.total[8 * group..].iter_mut().zip(rows).for_each(|(t, r)| *t += i64::from(r));
    }
}

impl Sink for DotInt8<'_> {
    const WIDE: bool = false;
    #[inline(always)]
    unsafe fn quad(&mut self, group: usize, quad: usize, low: __m256i, _: __m256i) {
        // SAFETY: the caller has the features; `pairs` covers whole units.
        unsafe {
            let codes = _mm256_add_epi8(low, self.bias);
            let [even, odd] = {
                let p = self.pairs.as_ptr().add(quad).cast::<i32>();
                [_mm256_set1_epi32(p.read_unaligned()), _mm256_set1_epi32(p.add(1).read_unaligned())]
            };
            let of_even = _mm256_madd_epi16(_mm256_srai_epi16(_mm256_slli_epi16(codes, 8), 8), even);
            let of_odd = _mm256_madd_epi16(_mm256_srai_epi16(codes, 8), odd);
            self.sums[group] = _mm256_add_epi32(self.sums[group], _mm256_add_epi32(of_even, of_odd));
            if quad % QUADS_PER_SUM == QUADS_PER_SUM - 1 {
                self.flush(group);
            }
        }
    }
}

features! {
    /// Decodes a block into `quads`; false if the stream is corrupt.
    ///
    /// # Safety
    /// The machine has the features, the block is validated, `entries` is its table.
    pub(crate) unsafe fn decode_quads(plan: &Plan, entries: &[u32], block: &Block<'_>, quads: &mut Quads) -> bool {
        quads.resize(plan.format, block.n_cols);
        let (low, high) = (quads.low.as_mut_ptr().cast(), quads.high.as_mut_ptr().cast());
        // SAFETY: the caller's promises; `resize` made room for whole units.
        unsafe {
            match plan.format {
                Format::Bf16 => run(plan, entries, block, &mut Store::<true> { low, high }),
                _ => run(plan, entries, block, &mut Store::<false> { low, high }),
            }
        }
    }

    /// For each row, Σ code · x over the columns; `pairs` has the activations of each quad in the order 0, 2, 1, 3, zeros
    /// past the block's columns. None if the stream is corrupt.
    ///
    /// # Safety
    /// As [`decode_quads`].
    pub(crate) unsafe fn dot_int8(plan: &Plan, entries: &[u32], block: &Block<'_>, pairs: &[[i16; 4]]) -> Option<[i64; BLOCK_ROWS]> {
        assert!(pairs.len() >= block.n_cols.div_ceil(32) * 8);
        let bias = _mm256_set1_epi8(plan.params.bias as i8);
        let mut sink = DotInt8 { bias, pairs, sums: [_mm256_setzero_si256(); GROUPS], total: [0; BLOCK_ROWS] };
        // SAFETY: the caller's promises.
        unsafe {
            run(plan, entries, block, &mut sink).then(|| {
                (0..GROUPS).for_each(|group| sink.flush(group));
                sink.total
            })
        }
    }

    /// The same sums from decoded `codes` (bias not added).
    ///
    /// # Safety
    /// The machine has the features.
    pub(crate) unsafe fn gemm_int8(bias: i32, codes: &[[[u8; 4]; BLOCK_ROWS]], pairs: &[[i16; 4]]) -> [i64; BLOCK_ROWS] {
        assert!(pairs.len() >= codes.len());
        let bias = _mm256_set1_epi8(bias as i8);
        let mut sink = DotInt8 { bias, pairs, sums: [_mm256_setzero_si256(); GROUPS], total: [0; BLOCK_ROWS] };
        for (quad, rows) in codes.iter().enumerate() {
            for group in 0..GROUPS {
                // SAFETY: 128 bytes a quad.
                unsafe {
                    let low = _mm256_loadu_si256(rows.as_ptr().cast::<u8>().add(32 * group).cast());
                    sink.quad(group, quad, low, low);
                }
            }
        }
        // SAFETY: the caller has the features.
        (0..GROUPS).for_each(|group| unsafe { sink.flush(group) });
        sink.total
    }

    /// The values of decoded quads, without scales: `out[column][row]`.
    ///
    /// # Safety
    /// The machine has the features.
    pub(crate) unsafe fn quads_to_floats(plan: &Plan, quads: &Quads, out: &mut [[f32; BLOCK_ROWS]]) {
        assert!(out.len() >= 4 * quads.low.len());
        for (quad, columns) in out.chunks_exact_mut(4).enumerate().take(quads.low.len()) {
            for group in 0..GROUPS {
                // SAFETY: 128 bytes a quad and plane, 32 rows a column.
                unsafe {
                    let load = |plane: &[[[u8; 4]; BLOCK_ROWS]]| _mm256_loadu_si256(plane[quad].as_ptr().cast::<u8>().add(32 * group).cast());
                    let low = load(&quads.low);
                    let high = if plan.format == Format::Bf16 { load(&quads.high) } else { low };
                    for (c, column) in columns.iter_mut().enumerate() {
                        let value = column_value(plan, low, high, c as i32);
                        _mm256_storeu_ps(column.as_mut_ptr().add(8 * group), value);
                    }
                }
            }
        }
    }

    /// Σ value · x over the columns for `TOKENS` tokens, added to `sums[token][row]`.
    ///
    /// # Safety
    /// The machine has the features.
    pub(crate) unsafe fn gemm_float<const TOKENS: usize>(
        values: &[[f32; BLOCK_ROWS]], x: [&[f32]; TOKENS], sums: [&mut [f32; BLOCK_ROWS]; TOKENS],
    ) {
        assert!(x.iter().all(|x| x.len() >= values.len()));
        // SAFETY: 32 rows a column, and an activation for every column, as asserted.
        unsafe {
            let mut acc: [[__m256; GROUPS]; TOKENS] =
                std::array::from_fn(|t| std::array::from_fn(|i| _mm256_loadu_ps(sums[t].as_ptr().add(8 * i))));
            for (c, column) in values.iter().enumerate() {
                let w: [__m256; GROUPS] = std::array::from_fn(|i| _mm256_loadu_ps(column.as_ptr().add(8 * i)));
                for t in 0..TOKENS {
                    let x = _mm256_set1_ps(*x[t].as_ptr().add(c));
                    for i in 0..GROUPS {
                        acc[t][i] = _mm256_fmadd_ps(w[i], x, acc[t][i]);
                    }
                }
            }
            for (sums, acc) in sums.into_iter().zip(acc) {
                for (i, acc) in acc.into_iter().enumerate() {
                    _mm256_storeu_ps(sums.as_mut_ptr().add(8 * i), acc);
                }
            }
        }
    }
}

/// A matrix of 8 × 8 numbers of 32 bits, transposed.
#[inline(always)]
unsafe fn transpose(q: [__m256i; 8]) -> [__m256i; 8] {
    // SAFETY: the caller has the features.
    unsafe {
        let mut of_four = [[_mm256_setzero_si256(); 4]; 2]; // [quads 0–3, 4–7][row, row + 4]
        for (half, rows) in of_four.iter_mut().enumerate() {
            let [a, b, c, d] = [q[4 * half], q[4 * half + 1], q[4 * half + 2], q[4 * half + 3]];
            let (ab, cd) = (_mm256_unpacklo_epi32(a, b), _mm256_unpacklo_epi32(c, d));
            (rows[0], rows[1]) = (_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd));
            let (ab, cd) = (_mm256_unpackhi_epi32(a, b), _mm256_unpackhi_epi32(c, d));
            (rows[2], rows[3]) = (_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd));
        }
        let mut out = [_mm256_setzero_si256(); 8];
        for i in 0..4 {
            out[i] = _mm256_permute2x128_si256::<0x20>(of_four[0][i], of_four[1][i]);
            out[i + 4] = _mm256_permute2x128_si256::<0x31>(of_four[0][i], of_four[1][i]);
        }
        out
    }
}

/// Writes the first `n` items of a register.
#[inline(always)]
unsafe fn store<T: Copy>(codes: __m256i, out: *mut T, n: usize) {
    // SAFETY: the caller vouches for `n` items at `out`, at most a register full.
    unsafe {
        if n * size_of::<T>() == 32 {
            return _mm256_storeu_si256(out.cast(), codes);
        }
        let mut bytes = [0u8; 32];
        _mm256_storeu_si256(bytes.as_mut_ptr().cast(), codes);
        std::ptr::copy_nonoverlapping(bytes.as_ptr().cast(), out, n);
    }
}

features! {
    /// Decoded quads as rows of 8-bit codes, with the bias added: row `r` at `out[r · stride..]`, `n_cols` codes each.
    ///
    /// # Safety
    /// The machine has the features.
    pub(crate) unsafe fn quads_to_u8(quads: &Quads, bias: i32, n_cols: usize, out: &mut [u8], stride: usize, n_rows: usize) {
        assert!(quads.low.len() >= n_cols.div_ceil(32) * 8 && out.len() >= (n_rows - 1) * stride + n_cols);
        let bias = _mm256_set1_epi8(bias as i8);
        // Eight rows at a time: all 32 at once would fall into few sets of the cache.
        for first in (0..n_rows).step_by(8) {
            for col in (0..n_cols).step_by(32) {
                // SAFETY: 128 bytes a quad; `out` has the rows, as asserted.
                unsafe {
                    let mut q = [bias; 8];
                    for (i, q) in q.iter_mut().enumerate() {
                        *q = _mm256_loadu_si256(quads.low[col / 4 + i].as_ptr().add(first).cast());
                    }
                    for (i, row) in transpose(q).into_iter().enumerate().take(n_rows - first) {
                        let out = out.as_mut_ptr().add((first + i) * stride + col);
                        store(_mm256_add_epi8(row, bias), out, 32.min(n_cols - col));
                    }
                }
            }
        }
    }

    /// The same with 16-bit codes.
    ///
    /// # Safety
    /// The machine has the features.
    pub(crate) unsafe fn quads_to_u16(quads: &Quads, bias: i32, n_cols: usize, out: &mut [u16], stride: usize, n_rows: usize) {
        assert!(quads.low.len() >= n_cols.div_ceil(16) * 4 && out.len() >= (n_rows - 1) * stride + n_cols);
        let bias = _mm256_set1_epi16(bias as i16);
        for first in (0..n_rows).step_by(8) {
            for col in (0..n_cols).step_by(16) {
                // SAFETY: 128 bytes a quad and plane; `out` has the rows, as asserted.
                unsafe {
                    // Codes of one quad: rows 0, 1, 4, 5, and rows 2, 3, 6, 7.
                    let mut q = [[bias; 2]; 4];
                    for (i, q) in q.iter_mut().enumerate() {
                        let low = _mm256_loadu_si256(quads.low[col / 4 + i].as_ptr().add(first).cast());
                        let high = _mm256_loadu_si256(quads.high[col / 4 + i].as_ptr().add(first).cast());
                        *q = [_mm256_unpacklo_epi8(low, high), _mm256_unpackhi_epi8(low, high)];
                    }
                    for (pair, place) in [(0, 0), (1, 2)] {
                        let even = [_mm256_unpacklo_epi64(q[0][pair], q[1][pair]), _mm256_unpacklo_epi64(q[2][pair], q[3][pair])];
                        let odd = [_mm256_unpackhi_epi64(q[0][pair], q[1][pair]), _mm256_unpackhi_epi64(q[2][pair], q[3][pair])];
                        for (row, codes) in [
                            (place, _mm256_permute2x128_si256::<0x20>(even[0], even[1])),
                            (place + 1, _mm256_permute2x128_si256::<0x20>(odd[0], odd[1])),
                            (place + 4, _mm256_permute2x128_si256::<0x31>(even[0], even[1])),
                            (place + 5, _mm256_permute2x128_si256::<0x31>(odd[0], odd[1])),
                        ] {
                            if first + row < n_rows {
                                let out = out.as_mut_ptr().add((first + row) * stride + col);
                                store(_mm256_add_epi16(codes, bias), out, 16.min(n_cols - col));
                            }
                        }
                    }
                }
            }
        }
    }
}

/// Column `c` of a quad of 8 rows, as float32.
#[inline(always)]
unsafe fn column_value(plan: &Plan, low: __m256i, high: __m256i, c: i32) -> __m256 {
    // SAFETY: the caller has the features.
    unsafe {
        if plan.format == Format::Bf16 {
            let low = _mm256_and_si256(shift(low, 16 - 8 * c), _mm256_set1_epi32(0xff_0000));
            let high = _mm256_and_si256(shift(high, 24 - 8 * c), _mm256_set1_epi32(0xff00_0000u32 as i32));
            let bias = _mm256_set1_epi32(plan.params.bias << 16);
            return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_or_si256(low, high), bias));
        }
        let code = _mm256_add_epi8(low, _mm256_set1_epi8(plan.params.bias as i8));
        let code = _mm256_srai_epi32(_mm256_sll_epi32(code, _mm_cvtsi32_si128(24 - 8 * c)), 24);
        if plan.format.is_integer() {
            return _mm256_cvtepi32_ps(code);
        }
        let magnitude = _mm256_and_si256(code, _mm256_set1_epi32(0x7f));
        let normal =
            _mm256_castsi256_ps(_mm256_add_epi32(_mm256_slli_epi32(magnitude, 20), _mm256_set1_epi32(120 << 23)));
        let subnormal = _mm256_mul_ps(_mm256_cvtepi32_ps(magnitude), _mm256_set1_ps(1.0 / 512.0));
        let is_normal = _mm256_cmpgt_epi32(magnitude, _mm256_set1_epi32(7));
        let value = _mm256_blendv_ps(subnormal, normal, _mm256_castsi256_ps(is_normal));
        _mm256_or_ps(value, _mm256_and_ps(_mm256_castsi256_ps(code), _mm256_set1_ps(-0.0)))
    }
}
