//! AVX-512 as Ice Lake and Zen 4 have it: two registers of 16 lanes a block, one gather for 16 symbols.

use super::{Plan, Quads, consumed_all, prefetch};
use crate::block::{BLOCK_ROWS, Block};
use crate::format::Format;
use std::arch::x86_64::*;

macro_rules! features {
    ($($item:item)*) => { $(
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx512vnni,gfni,avx2,fma,f16c,bmi2,popcnt")]
        $item
    )* };
}

/// What takes a block's codes, a quad of columns of 16 rows at a time.
trait Sink {
    /// Whether bits 8–15 of the codes are wanted.
    const WIDE: bool;
    /// Codes of quad `quad` of rows 16·`half` and up, of block `n`: bits 0–7, and 8–15 if wanted.
    ///
    /// # Safety
    /// The features of this module are there, and `quad` lies within the block's units.
    unsafe fn quad(&mut self, n: usize, half: usize, quad: usize, low: __m512i, high: __m512i);
}

/// Constants of a tensor's decoder, in registers.
struct Constants {
    to_index: __m512i,
    state_mask: __m512i,
    word_shift: __m512i,
    /// Bit offsets of the parts of the entry that go to bits 0–7 of four codes, by step of the quad (G = 8: by half of the symbol).
    low_part: [__m512i; 2],
    high_part: [__m512i; 2],
    low_mask: [__m512i; 4],
    high_mask: [__m512i; 4],
}

impl Constants {
    #[inline(always)]
    unsafe fn new(plan: &Plan) -> Self {
        let p = &plan.params;
        let low_bits = p.raw_bits.saturating_sub(1) as i32;
        let (g, w) = (p.parts_per_symbol, p.part_bits as i32);
        let part_mask = ((1u32 << w) - 1) << low_bits;
        // Where the part of column `byte` of the quad begins in its entry; G = 8 has two quads an entry.
        let offsets = |quad: u32, to: i32| -> __m512i {
            let bytes: [u8; 64] = std::array::from_fn(|i| {
                let (byte, odd) = (i as u32 % 4, i as i32 / 4 % 2);
                let part = (quad * 4 + byte) % g;
                ((5 + w * part as i32 - low_bits + to + 32 * odd) & 63) as u8
            });
            // SAFETY: 64 bytes.
            unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
        };
        // With G < 4, step s of the quad gives the bytes that it owns.
        let masks = |mask: u8| -> [__m512i; 4] {
            std::array::from_fn(|step| {
                let bytes: [u8; 64] =
                    std::array::from_fn(|i| if g >= 4 || i % 4 / g as usize == step { mask } else { 0 });
                // SAFETY: 64 bytes.
                unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
            })
        };
        // SAFETY: the caller has the features.
        unsafe {
            Self {
                to_index: _mm512_set1_epi32(32 - p.table_bits as i32),
                state_mask: _mm512_set1_epi32(plan.state_mask as i32),
                word_shift: _mm512_set1_epi32(16 - p.table_bits as i32),
                low_part: [offsets(0, 0), offsets(1, 0)],
                high_part: [offsets(0, 8), offsets(1, 8)],
                low_mask: masks(part_mask as u8),
                high_mask: masks((part_mask >> 8) as u8),
            }
        }
    }
}

/// A block on its way: the lanes' states, and the next word.
struct Lanes {
    x: [__m512i; 2],
    position: [__m512i; 2],
    next: *const u8,
}

impl Lanes {
    /// # Safety
    /// At least 64 bytes at `block.stream`.
    #[inline(always)]
    unsafe fn new(block: &Block<'_>, table_bits: u32) -> Self {
        let next = block.stream.as_ptr();
        // SAFETY: the first words of 32 lanes are 64 bytes, which the caller vouches for.
        unsafe {
            let first = |half: usize| {
                _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(next.add(32 * half).cast())), 16)
            };
            let position = _mm512_set1_epi32(table_bits as i32);
            Self { x: [first(0), first(1)], position: [position; 2], next: next.add(2 * BLOCK_ROWS) }
        }
    }

    /// One symbol of 16 lanes: the entries of their slots.
    ///
    /// # Safety
    /// `entries` has 2^T entries, and 32 bytes at `self.next` are readable.
    #[inline(always)]
    unsafe fn step(&mut self, c: &Constants, entries: *const u32, half: usize) -> __m512i {
        // SAFETY: a state has T bits, so that the gather stays in the table.
        unsafe {
            let x = self.x[half];
            let entry = _mm512_i32gather_epi32::<4>(_mm512_srlv_epi32(x, c.to_index), entries.cast());
            // Bits 0–4 of an entry are the bits to read; both the shift and the sum below look at no more of it.
            let shifted = _mm512_shldv_epi32(x, _mm512_setzero_si512(), entry);
            let x = _mm512_ternarylogic_epi32::<0x78>(shifted, entry, c.state_mask); // shifted ^ (entry & mask)
            let before = self.position[half];
            let position = _mm512_add_epi32(before, entry);
            let refill = _mm512_test_epi32_mask(_mm512_xor_si512(before, position), _mm512_set1_epi32(16));
            let words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(self.next.cast()));
            let words = _mm512_maskz_expand_epi32(refill, words);
            let shift = _mm512_add_epi32(_mm512_and_si512(position, _mm512_set1_epi32(15)), c.word_shift);
            self.x[half] = _mm512_or_si512(x, _mm512_sllv_epi32(words, shift));
            self.position[half] = position;
            self.next = self.next.add(2 * (u32::from(refill)).count_ones() as usize);
            entry
        }
    }

    /// The entries of 16 lanes' slots: a lane's last symbol leads nowhere.
    ///
    /// # Safety
    /// `entries` has 2^T entries.
    #[inline(always)]
    unsafe fn last(&self, c: &Constants, entries: *const u32, half: usize) -> __m512i {
        // SAFETY: a state has T bits.
        unsafe { _mm512_i32gather_epi32::<4>(_mm512_srlv_epi32(self.x[half], c.to_index), entries.cast()) }
    }
}

/// Decodes `N` blocks with the same columns side by side, so that one's latency hides behind the other's work.
///
/// # Safety
/// The features of this module are there; the blocks are validated, with the same `n_cols`; `entries` is their table.
#[inline(always)]
unsafe fn run<const N: usize, const G: usize, const TRELLIS: bool, S: Sink>(
    plan: &Plan,
    entries: &[u32],
    blocks: [&Block<'_>; N],
    sink: &mut S,
) -> bool {
    let n_cols = blocks[0].n_cols;
    let raw_bits = plan.params.raw_bits as usize;
    debug_assert_eq!(entries.len(), 1 << plan.params.table_bits);
    if blocks.iter().any(|b| b.stream_bytes < 2 * BLOCK_ROWS) {
        return false;
    }
    // SAFETY: streams hold the first words; from any position up to a stream's end, 64 bytes (a step's loads) follow
    // within the tensor; raw words of whole units are there.
    unsafe {
        let c = Constants::new(plan);
        let mut lanes: [Lanes; N] = std::array::from_fn(|n| Lanes::new(blocks[n], plan.params.table_bits));
        let ends: [*const u8; N] = std::array::from_fn(|n| blocks[n].stream.as_ptr().add(blocks[n].stream_bytes));
        let mut steps_left = n_cols.div_ceil(G);
        let mut quad_index = 0;
        // With a trellis, the grids of the quad to come and of the one after it, as far as that is known.
        let mut grids = [[[_mm512_setzero_si512(); 2]; 2]; N];
        for unit in 0..n_cols.div_ceil(32) {
            let raw: [*const u8; N] = std::array::from_fn(|n| blocks[n].raw.as_ptr().add(unit * raw_bits * 128));
            for n in 0..N {
                prefetch(raw[n], raw_bits, lanes[n].next);
            }
            for pair in 0..4 {
                let mut entry = [[[_mm512_setzero_si512(); 2]; 4]; N];
                for quad in [2 * pair, 2 * pair + 1] {
                    // G = 8 decodes two quads with one symbol.
                    if G < 8 || quad % 2 == 0 {
                        #[expect(clippy::needless_range_loop, reason = "the entries of all blocks")]
                        for step in 0..(4 / G).max(1) {
                            if steps_left == 0 {
                                break;
                            }
                            steps_left -= 1;
                            for n in 0..N {
                                if lanes[n].next > ends[n] {
                                    return false;
                                }
                                if steps_left == 0 {
                                    entry[n][step][0] = lanes[n].last(&c, entries.as_ptr(), 0);
                                    entry[n][step][1] = lanes[n].last(&c, entries.as_ptr(), 1);
                                } else {
                                    entry[n][step][0] = lanes[n].step(&c, entries.as_ptr(), 0);
                                    entry[n][step][1] = lanes[n].step(&c, entries.as_ptr(), 1);
                                }
                            }
                        }
                    }
                    for n in 0..N {
                        for (half, grids) in grids[n].iter_mut().enumerate() {
                            let mut low = parts::<G>(&entry[n], half, c.low_part[quad % 2], &c.low_mask);
                            let mut high = _mm512_setzero_si512();
                            if S::WIDE {
                                high = parts::<G>(&entry[n], half, c.high_part[quad % 2], &c.high_mask);
                            }
                            for f in 0..plan.n_fields {
                                let at = 128 * plan.words[quad][f] + 64 * half;
                                let word = _mm512_loadu_si512(raw[n].add(at).cast());
                                low = _mm512_xor_si512(low, map_bits(word, plan.low[quad][f]));
                                if S::WIDE {
                                    high = _mm512_xor_si512(high, map_bits(word, plan.high[quad][f]));
                                }
                            }
                            if TRELLIS {
                                let [now, next] = *grids;
                                let ones = _mm512_set1_epi8(1);
                                *grids = [_mm512_ternarylogic_epi32::<0x78>(next, low, ones), now]; // next ^ (low & ones)
                                low = _mm512_or_si512(_mm512_add_epi8(low, low), now);
                            }
                            sink.quad(n, half, quad_index, low, high);
                        }
                    }
                    quad_index += 1;
                }
            }
        }
        (0..N).all(|n| {
            let consumed = lanes[n].next.offset_from(blocks[n].stream.as_ptr()) as usize;
            consumed_all(blocks[n], consumed)
        })
    }
}

/// A bit matrix times every byte.
#[inline(always)]
unsafe fn map_bits(bytes: __m512i, matrix: u64) -> __m512i {
    // SAFETY: the caller has the features.
    unsafe { _mm512_gf2p8affine_epi64_epi8::<0>(bytes, _mm512_set1_epi64(matrix as i64)) }
}

/// The part bits of a quad's codes.
// The hot path is free of closures: one that is not inlined would pass registers through memory.
#[inline(always)]
unsafe fn parts<const G: usize>(
    entry: &[[__m512i; 2]; 4],
    half: usize,
    offsets: __m512i,
    masks: &[__m512i; 4],
) -> __m512i {
    // SAFETY: the caller has the features.
    unsafe {
        let mut bits = _mm512_and_si512(_mm512_multishift_epi64_epi8(offsets, entry[0][half]), masks[0]);
        for step in 1..4 / G {
            let moved = _mm512_multishift_epi64_epi8(offsets, entry[step][half]);
            bits = _mm512_ternarylogic_epi32::<0xf8>(bits, moved, masks[step]); // bits | (moved & mask)
        }
        bits
    }
}

/// [`run`] with G and the kind of codes as the plan has them.
#[inline(always)]
unsafe fn run_any<const N: usize, S: Sink>(
    plan: &Plan,
    entries: &[u32],
    blocks: [&Block<'_>; N],
    sink: &mut S,
) -> bool {
    // SAFETY: the caller's promises are the same.
    unsafe {
        match (plan.params.parts_per_symbol, plan.params.trellis) {
            (1, false) => run::<N, 1, false, S>(plan, entries, blocks, sink),
            (2, false) => run::<N, 2, false, S>(plan, entries, blocks, sink),
            (4, false) => run::<N, 4, false, S>(plan, entries, blocks, sink),
            (_, false) => run::<N, 8, false, S>(plan, entries, blocks, sink),
            (1, true) => run::<N, 1, true, S>(plan, entries, blocks, sink),
            (2, true) => run::<N, 2, true, S>(plan, entries, blocks, sink),
            (4, true) => run::<N, 4, true, S>(plan, entries, blocks, sink),
            (_, true) => run::<N, 8, true, S>(plan, entries, blocks, sink),
        }
    }
}

/// Stores codes as [`Quads`].
struct Store<const N: usize, const WIDE: bool> {
    low: [*mut u8; N],
    high: [*mut u8; N],
}

impl<const N: usize, const WIDE: bool> Sink for Store<N, WIDE> {
    const WIDE: bool = WIDE;
    #[inline(always)]
    unsafe fn quad(&mut self, n: usize, half: usize, quad: usize, low: __m512i, high: __m512i) {
        // SAFETY: the buffers have 128 bytes for every quad of the block's units.
        unsafe {
            let at = 128 * quad + 64 * half;
            _mm512_storeu_si512(self.low[n].add(at).cast(), low);
            if WIDE {
                _mm512_storeu_si512(self.high[n].add(at).cast(), high);
            }
        }
    }
}

features! {
    /// Decodes blocks of the same width into `quads`; false if a stream is corrupt.
    ///
    /// # Safety
    /// The machine has the features, the blocks are validated, `entries` is their table.
    pub(crate) unsafe fn decode_quads<const N: usize>(
        plan: &Plan, entries: &[u32], blocks: [&Block<'_>; N], quads: &mut [Quads; N],
    ) -> bool {
        let (mut low, mut high) = ([std::ptr::null_mut(); N], [std::ptr::null_mut(); N]);
        for (n, quads) in quads.iter_mut().enumerate() {
            quads.resize(plan.format, blocks[n].n_cols);
            (low[n], high[n]) = (quads.low.as_mut_ptr().cast(), quads.high.as_mut_ptr().cast());
        }
        // SAFETY: the caller's promises; `resize` made room for whole units.
        unsafe {
            match plan.format {
                Format::Bf16 => run_any(plan, entries, blocks, &mut Store::<N, true> { low, high }),
                _ => run_any(plan, entries, blocks, &mut Store::<N, false> { low, high }),
            }
        }
    }
}

/// Four activations in every lane.
#[inline(always)]
unsafe fn four(bytes: &[i8], quad: usize) -> __m512i {
    // SAFETY: the caller's activations cover the quad.
    unsafe { _mm512_set1_epi32(bytes.as_ptr().add(4 * quad).cast::<i32>().read_unaligned()) }
}

/// Integer dot products with activations in two signed bytes.
struct DotInt8<'a, const N: usize> {
    bias: __m512i,
    high: &'a [i8],
    low: &'a [i8],
    /// [block][half]: sums over unsigned codes (code + 128) with the activations' high and low bytes.
    sums: [[[__m512i; 2]; 2]; N],
}

impl<const N: usize> Sink for DotInt8<'_, N> {
    const WIDE: bool = false;
    #[inline(always)]
    unsafe fn quad(&mut self, n: usize, half: usize, quad: usize, low: __m512i, _: __m512i) {
        // SAFETY: activations cover whole units.
        unsafe {
            let codes = _mm512_add_epi8(low, self.bias);
            let sums = &mut self.sums[n][half];
            sums[0] = _mm512_dpbusd_epi32(sums[0], codes, four(self.high, quad));
            sums[1] = _mm512_dpbusd_epi32(sums[1], codes, four(self.low, quad));
        }
    }
}

features! {
    /// For each of `N` blocks and 32 rows, Σ (code + 128) · high and Σ (code + 128) · low over the columns.
    /// `high` and `low` cover whole units, with zeros past the block's columns. None if a stream is corrupt.
    ///
    /// # Safety
    /// As [`decode_quads`].
    pub(crate) unsafe fn dot_int8<const N: usize>(
        plan: &Plan, entries: &[u32], blocks: [&Block<'_>; N], high: &[i8], low: &[i8],
    ) -> Option<[[[i32; BLOCK_ROWS]; 2]; N]> {
        let n_quads = blocks[0].n_cols.div_ceil(32) * 8;
        assert!(high.len() >= 4 * n_quads && low.len() >= 4 * n_quads);
        let zero = _mm512_setzero_si512();
        let bias = _mm512_set1_epi8((plan.params.bias + 128) as i8);
        let mut sink = DotInt8 { bias, high, low, sums: [[[zero; 2]; 2]; N] };
        // SAFETY: the caller's promises.
        unsafe {
            run_any(plan, entries, blocks, &mut sink).then(|| {
                std::array::from_fn(|n| std::array::from_fn(|part| {
                    let mut rows = [0i32; BLOCK_ROWS];
                    _mm512_storeu_si512(rows.as_mut_ptr().cast(), sink.sums[n][0][part]);
                    _mm512_storeu_si512(rows.as_mut_ptr().add(16).cast(), sink.sums[n][1][part]);
                    rows
                }))
            })
        }
    }

    /// The same sums for up to four tokens from decoded `codes` (bias not added): `out[token]` is [high, low] by row.
    ///
    /// # Safety
    /// The machine has the features. Every activation slice covers the quads.
    pub(crate) unsafe fn gemm_int8<const TOKENS: usize>(
        bias: i32, codes: &[[[u8; 4]; BLOCK_ROWS]], high: [&[i8]; TOKENS], low: [&[i8]; TOKENS],
    ) -> [[[i32; BLOCK_ROWS]; 2]; TOKENS] {
        assert!(high.iter().chain(&low).all(|a| a.len() >= 4 * codes.len()));
        let bias = _mm512_set1_epi8((bias + 128) as i8);
        let mut sums = [[[_mm512_setzero_si512(); 2]; 2]; TOKENS];
        for (quad, rows) in codes.iter().enumerate() {
            // SAFETY: 128 bytes a quad; four activations at 4·quad, as asserted.
            unsafe {
                let at = rows.as_ptr().cast::<u8>();
                let codes = [
                    _mm512_add_epi8(_mm512_loadu_si512(at.cast()), bias),
                    _mm512_add_epi8(_mm512_loadu_si512(at.add(64).cast()), bias),
                ];
                for t in 0..TOKENS {
                    let (high, low) = (four(high[t], quad), four(low[t], quad));
                    for half in 0..2 {
                        sums[t][half][0] = _mm512_dpbusd_epi32(sums[t][half][0], codes[half], high);
                        sums[t][half][1] = _mm512_dpbusd_epi32(sums[t][half][1], codes[half], low);
                    }
                }
            }
        }
        std::array::from_fn(|t| std::array::from_fn(|part| {
            let mut rows = [0i32; BLOCK_ROWS];
            // SAFETY: 32 rows.
            unsafe {
                _mm512_storeu_si512(rows.as_mut_ptr().cast(), sums[t][0][part]);
                _mm512_storeu_si512(rows.as_mut_ptr().add(16).cast(), sums[t][1][part]);
            }
            rows
        }))
    }
}

/// Turns codes into float32, column by column.
struct Floats {
    format: Format,
    bias: __m512i,
    /// By column of the quad: the shuffles that bring its low and high byte to bytes 2 and 3 of each lane.
    low: [__m512i; 4],
    high: [__m512i; 4],
    /// The BF16 bytes of the 128 magnitudes of E4M3.
    e4m3: [[__m512i; 2]; 2],
}

impl Floats {
    #[inline(always)]
    unsafe fn new(plan: &Plan) -> Self {
        // SAFETY: loads of 64-byte arrays.
        unsafe {
            let load = |bytes: [u8; 64]| _mm512_loadu_si512(bytes.as_ptr().cast());
            let shuffle = |to: usize| {
                std::array::from_fn(|c| {
                    load(std::array::from_fn(|i| if i % 4 == to { (i % 16 / 4 * 4 + c) as u8 } else { 0x80 }))
                })
            };
            let value = |code: usize| (crate::quantize::code_value(Format::Fp8, code as u16).to_bits() >> 16) as u16;
            let e4m3 =
                |shift: u32| [0, 64].map(|first| load(std::array::from_fn(|i| (value(first + i) >> shift) as u8)));
            let bias = if plan.format == Format::Bf16 { plan.params.bias << 16 } else { plan.params.bias };
            Self {
                format: plan.format,
                bias: if plan.format == Format::Bf16 { _mm512_set1_epi32(bias) } else { _mm512_set1_epi8(bias as i8) },
                low: shuffle(2),
                high: shuffle(3),
                e4m3: [e4m3(0), e4m3(8)],
            }
        }
    }

    /// The quad's bytes as those of BF16 numbers, but for the bias of `bf16`.
    #[inline(always)]
    unsafe fn bf16_bytes(&self, low: __m512i, high: __m512i) -> (__m512i, __m512i) {
        if self.format == Format::Bf16 {
            return (low, high);
        }
        // SAFETY: the caller has the features.
        unsafe {
            let code = _mm512_add_epi8(low, self.bias);
            // The look-ups take 7 bits of the code.
            let low = _mm512_permutex2var_epi8(self.e4m3[0][0], code, self.e4m3[0][1]);
            let high = _mm512_permutex2var_epi8(self.e4m3[1][0], code, self.e4m3[1][1]);
            (low, _mm512_or_si512(high, _mm512_and_si512(code, _mm512_set1_epi8(-128))))
        }
    }

    /// Column `c` of the quad.
    #[inline(always)]
    unsafe fn column(&self, bytes: (__m512i, __m512i), c: usize) -> __m512 {
        // SAFETY: the caller has the features.
        unsafe {
            let bits =
                _mm512_or_si512(_mm512_shuffle_epi8(bytes.0, self.low[c]), _mm512_shuffle_epi8(bytes.1, self.high[c]));
            let bits = if self.format == Format::Bf16 { _mm512_add_epi32(bits, self.bias) } else { bits };
            _mm512_castsi512_ps(bits)
        }
    }
}

/// Float dot products.
struct DotFloat<'a, const N: usize> {
    floats: Floats,
    /// Added to pairs of BF16 numbers.
    bias: __m512i,
    x: &'a [f32],
    /// [block][half][0]: sums of rows 0, 0, 1, 1 of every four (of columns 0 and 1 of a quad, then 2 and 3); [1]: of rows 2, 2, 3, 3.
    sums: [[[__m512; 2]; 2]; N],
}

impl<const N: usize> Sink for DotFloat<'_, N> {
    const WIDE: bool = true;
    #[inline(always)]
    unsafe fn quad(&mut self, n: usize, half: usize, quad: usize, low: __m512i, high: __m512i) {
        // SAFETY: activations cover whole units.
        unsafe {
            let (low, high) = self.floats.bf16_bytes(low, high);
            let x = _mm512_broadcast_f32x4(_mm_loadu_ps(self.x.as_ptr().add(4 * quad)));
            let (x_even, x_odd) = (_mm512_permute_ps::<0b10_00_10_00>(x), _mm512_permute_ps::<0b11_01_11_01>(x));
            // No iterator, which need not be inlined and then takes registers through memory.
            for i in 0..2 {
                let mut pairs = if i == 0 { _mm512_unpacklo_epi8(low, high) } else { _mm512_unpackhi_epi8(low, high) };
                if self.floats.format == Format::Bf16 {
                    pairs = _mm512_add_epi16(pairs, self.bias);
                }
                let even = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(pairs));
                let odd = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(0xffff_0000u32 as i32)));
                let sum = self.sums[n][half][i];
                self.sums[n][half][i] = _mm512_fmadd_ps(odd, x_odd, _mm512_fmadd_ps(even, x_even, sum));
            }
        }
    }
}

features! {
    /// For each of `N` blocks and 32 rows, Σ value · x over the columns, without scales. `x` covers whole units, with zeros
    /// past the block's columns. None if a stream is corrupt.
    ///
    /// # Safety
    /// As [`decode_quads`].
    pub(crate) unsafe fn dot_float<const N: usize>(
        plan: &Plan, entries: &[u32], blocks: [&Block<'_>; N], x: &[f32],
    ) -> Option<[[f32; BLOCK_ROWS]; N]> {
        assert!(x.len() >= blocks[0].n_cols.div_ceil(32) * 32);
        // SAFETY: the caller's promises.
        unsafe {
            let bias = _mm512_set1_epi16(plan.params.bias as i16);
            let mut sink = DotFloat { floats: Floats::new(plan), bias, x, sums: [[[_mm512_setzero_ps(); 2]; 2]; N] };
            run_any(plan, entries, blocks, &mut sink).then(|| {
                std::array::from_fn(|n| {
                    let mut rows = [0f32; BLOCK_ROWS];
                    for half in 0..2 {
                        let [a, b] = sink.sums[n][half];
                        let sum = _mm512_add_ps(
                            _mm512_shuffle_ps::<0b10_00_10_00>(a, b), _mm512_shuffle_ps::<0b11_01_11_01>(a, b),
                        );
                        _mm512_storeu_ps(rows.as_mut_ptr().add(16 * half), sum);
                    }
                    rows
                })
            })
        }
    }

    /// The values of decoded quads, without scales: `out[column][row]`.
    ///
    /// # Safety
    /// The machine has the features.
    pub(crate) unsafe fn quads_to_floats(plan: &Plan, quads: &Quads, out: &mut [[f32; BLOCK_ROWS]]) {
        assert!(out.len() >= 4 * quads.low.len());
        // SAFETY: 128 bytes a quad, four columns of 32 rows out.
        unsafe {
            let floats = Floats::new(plan);
            for (quad, columns) in out.chunks_exact_mut(4).enumerate().take(quads.low.len()) {
                for half in 0..2 {
                    let load = |plane: &[[[u8; 4]; BLOCK_ROWS]]| _mm512_loadu_si512(plane[quad].as_ptr().cast::<u8>().add(64 * half).cast());
                    let low = load(&quads.low);
                    let high = if plan.format == Format::Bf16 { load(&quads.high) } else { low };
                    let bytes = floats.bf16_bytes(low, high);
                    for (c, column) in columns.iter_mut().enumerate() {
                        _mm512_storeu_ps(column.as_mut_ptr().add(16 * half), floats.column(bytes, c));
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
            let mut acc = [[_mm512_setzero_ps(); 2]; TOKENS];
            for t in 0..TOKENS {
                acc[t] = [_mm512_loadu_ps(sums[t].as_ptr()), _mm512_loadu_ps(sums[t].as_ptr().add(16))];
            }
            for (c, column) in values.iter().enumerate() {
                let w = [_mm512_loadu_ps(column.as_ptr()), _mm512_loadu_ps(column.as_ptr().add(16))];
                for t in 0..TOKENS {
                    let x = _mm512_set1_ps(*x[t].as_ptr().add(c));
                    acc[t] = [_mm512_fmadd_ps(w[0], x, acc[t][0]), _mm512_fmadd_ps(w[1], x, acc[t][1])];
                }
            }
            for (sums, acc) in sums.into_iter().zip(acc) {
                _mm512_storeu_ps(sums.as_mut_ptr(), acc[0]);
                _mm512_storeu_ps(sums.as_mut_ptr().add(16), acc[1]);
            }
        }
    }
}
