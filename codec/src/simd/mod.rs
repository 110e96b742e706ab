//! SIMD decoders of blocks, with several sinks: codes in quads, integer dot products, float dot products.
//!
//! This is the only place in the codec with `unsafe` code and with anything that depends on x86. Every function here takes
//! a block that `EncodedTensor` has validated; the payload may still be anything, and every load stays within the tensor.

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;

use crate::block::{BLOCK_ROWS, Block, Params, RawField, STREAM_ALIGN, raw_fields};
use crate::format::Format;

/// Codes of a block by quads of columns: `[quad][row]` holds the four columns' bytes. `low` has bits 0–7 of the
/// codes, `high` bits 8–15 (empty for 8-bit formats). The bias is not added yet.
#[derive(Default)]
pub(crate) struct Quads {
    pub low: Vec<[[u8; 4]; BLOCK_ROWS]>,
    pub high: Vec<[[u8; 4]; BLOCK_ROWS]>,
}

impl Quads {
    /// Makes room for `n_cols` columns; whole units are decoded.
    pub fn resize(&mut self, format: Format, n_cols: usize) {
        let n = n_cols.div_ceil(32) * 8;
        self.low.resize(n, Default::default());
        self.high.resize(if format == Format::Bf16 { n } else { 0 }, Default::default());
    }
}

/// What the decoders of one tensor share: how a quad's codes come from the raw words and the entries.
///
/// Codes are linear in the raw bits and the part bits over GF(2) (until the bias is added), so that each raw field contributes one 8 × 8 bit
/// matrix product per byte of the codes.
#[derive(Debug)]
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
pub(crate) struct Plan {
    pub format: Format,
    pub params: Params,
    pub state_mask: u32,
    /// Fields of the raw bits: the first `n_fields` of these.
    pub fields: [RawField; 4],
    pub n_fields: usize,
    /// `[quad][field]`: the word of the unit that holds the field.
    pub words: [[usize; 4]; 8],
    /// `[quad][field]`: bit matrices from the word's bytes to bits 0–7 of the codes, as `vgf2p8affineqb` takes them.
    pub low: [[u64; 4]; 8],
    /// The same to bits 8–15.
    pub high: [[u64; 4]; 8],
}

impl Plan {
    pub fn new(format: Format, params: Params) -> Self {
        let mut plan = Self {
            format,
            params,
            state_mask: u32::MAX << (32 - params.table_bits.clamp(1, 31)),
            fields: Default::default(),
            n_fields: 0,
            words: Default::default(),
            low: Default::default(),
            high: Default::default(),
        };
        for (f, field) in raw_fields(params.raw_bits).enumerate() {
            (plan.fields[f], plan.n_fields) = (field, f + 1);
            for quad in 0..8u32 {
                plan.words[quad as usize][f] = (field.first_word + quad * field.width / 8) as usize;
                for bit in 0..field.width {
                    let source = 1u64 << (quad * field.width % 8 + bit);
                    let code_bits = code_bits_of(format, params.raw_bits, field.shift + bit);
                    for i in 0..8 {
                        let row = source << (8 * (7 - i));
                        if code_bits >> i & 1 != 0 {
                            plan.low[quad as usize][f] |= row;
                        }
                        if code_bits >> (8 + i) & 1 != 0 {
                            plan.high[quad as usize][f] |= row;
                        }
                    }
                }
            }
        }
        plan
    }
}

/// The bits of the code that raw bit `bit` flips.
fn code_bits_of(format: Format, raw_bits: u32, bit: u32) -> u32 {
    match format {
        _ if bit + 1 < raw_bits => 1 << bit,
        Format::Int8 | Format::Rate => 0xff,
        Format::Fp8 => 0x80,
        Format::Bf16 => 0x8000,
    }
}

/// Asks for what a block's decoder will read soon: two units of raw bits on, and some way down the stream. A block has too
/// many runs of reads, each too short, for the hardware to foresee; this is worth half of the speed from memory.
///
/// `raw` is the unit's words, `next` the stream's next word.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn prefetch(raw: *const u8, raw_bits: usize, next: *const u8) {
    use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
    const LINE: usize = 64;
    let unit = raw_bits * 128;
    // SAFETY: a prefetch reads nothing that the program sees, and may be of any address.
    unsafe {
        for at in (0..unit).step_by(LINE) {
            _mm_prefetch::<_MM_HINT_T0>(raw.wrapping_add(2 * unit + at).cast());
        }
        for line in 0..3 {
            _mm_prefetch::<_MM_HINT_T0>(next.wrapping_add(1024 + LINE * line).cast());
        }
    }
}

/// Whether the words that a decoder took are the stream's.
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
fn consumed_all(block: &Block<'_>, consumed_bytes: usize) -> bool {
    consumed_bytes.next_multiple_of(STREAM_ALIGN) == block.stream_bytes
}
