//! The element types of GGUF files: how many weights a block has, its bytes, and their values.
//!
//! A block is a run of weights of one row with scales of its own. *Legacy* types have 32 weights and one or two F16
//! numbers; *K-quants* have 256 weights in sub-blocks whose scales (and minima) are small integers, multiples of one or two F16
//! numbers. The layouts are those of llama.cpp (`ggml-common.h`); values are computed in float32 in the order of its
//! reference dequantizer, so that they agree bit for bit.

use half::{bf16, f16};

/// An element type that can be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(non_camel_case_types)] // the names that everybody uses
pub enum BlockType {
    /// IEEE binary32
    F32,
    /// IEEE binary16
    F16,
    /// bfloat16
    BF16,
    /// 4 bits, one scale a 32 weights
    Q4_0,
    /// 4 bits, scale and minimum
    Q4_1,
    /// 5 bits, one scale
    Q5_0,
    /// 5 bits, scale and minimum
    Q5_1,
    /// 8 bits, one scale
    Q8_0,
    /// 2 bits, 4-bit scales and minima of 16 weights
    Q2_K,
    /// 3 bits, 6-bit scales of 16 weights
    Q3_K,
    /// 4 bits, 6-bit scales and minima of 32 weights
    Q4_K,
    /// 5 bits, 6-bit scales and minima of 32 weights
    Q5_K,
    /// 6 bits, 8-bit scales of 16 weights
    Q6_K,
}

/// Weights of a K-quant's block.
pub const SUPER_BLOCK: usize = 256;

impl BlockType {
    /// Every type that can be read, with its number in the file.
    pub const ALL: [(u32, Self); 13] = [
        (0, Self::F32),
        (1, Self::F16),
        (30, Self::BF16),
        (2, Self::Q4_0),
        (3, Self::Q4_1),
        (6, Self::Q5_0),
        (7, Self::Q5_1),
        (8, Self::Q8_0),
        (10, Self::Q2_K),
        (11, Self::Q3_K),
        (12, Self::Q4_K),
        (13, Self::Q5_K),
        (14, Self::Q6_K),
    ];

    /// The type of that number; `None` where it is none of [`Self::ALL`].
    pub fn from_number(number: u32) -> Option<Self> {
        Self::ALL.iter().find(|(n, _)| *n == number).map(|(_, t)| *t)
    }

    /// The name, as in `Q4_K`.
    pub fn name(self) -> String {
        format!("{self:?}")
    }

    /// Weights of a block.
    pub const fn block_weights(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => 1,
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 => 32,
            Self::Q2_K | Self::Q3_K | Self::Q4_K | Self::Q5_K | Self::Q6_K => SUPER_BLOCK,
        }
    }

    /// Bytes of a block.
    pub const fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::Q4_0 => 2 + 16,
            Self::Q4_1 => 4 + 16,
            Self::Q5_0 => 2 + 4 + 16,
            Self::Q5_1 => 4 + 4 + 16,
            Self::Q8_0 => 2 + 32,
            Self::Q2_K => 16 + 64 + 4,
            Self::Q3_K => 32 + 64 + 12 + 2,
            Self::Q4_K => 4 + 12 + 128,
            Self::Q5_K => 4 + 12 + 32 + 128,
            Self::Q6_K => 128 + 64 + 16 + 2,
        }
    }

    /// Whether blocks have scales, so that a reader must compute values.
    pub const fn is_quantized(self) -> bool {
        self.block_weights() > 1
    }

    /// The values of whole blocks. `bytes` is a multiple of [`block_bytes`](Self::block_bytes), and `out` has
    /// [`block_weights`](Self::block_weights) for each.
    pub fn dequantize(self, bytes: &[u8], out: &mut [f32]) {
        let n = bytes.len() / self.block_bytes();
        assert!(
            bytes.len() == n * self.block_bytes() && out.len() == n * self.block_weights(),
            "{} bytes of {self:?} are not {} weights",
            bytes.len(),
            out.len()
        );
        let blocks = bytes.chunks_exact(self.block_bytes()).zip(out.chunks_exact_mut(self.block_weights()));
        match self {
            Self::F32 => blocks.for_each(|(b, out)| out[0] = f32::from_le_bytes([b[0], b[1], b[2], b[3]])),
            Self::F16 => blocks.for_each(|(b, out)| out[0] = f16_at(b, 0)),
            Self::BF16 => blocks.for_each(|(b, out)| out[0] = bf16::from_le_bytes([b[0], b[1]]).to_f32()),
            Self::Q4_0 => blocks.for_each(|(b, out)| {
                let d = f16_at(b, 0);
                nibbles(&b[2..], |i, q| out[i] = d * (f32::from(q) - 8.0));
            }),
            Self::Q4_1 => blocks.for_each(|(b, out)| {
                let (d, m) = (f16_at(b, 0), f16_at(b, 2));
                nibbles(&b[4..], |i, q| out[i] = d * f32::from(q) + m);
            }),
            Self::Q5_0 => blocks.for_each(|(b, out)| {
                let (d, high) = (f16_at(b, 0), u32_at(b, 2));
                nibbles(&b[6..], |i, q| out[i] = d * (f32::from(fifth_bit(high, i, q)) - 16.0));
            }),
            Self::Q5_1 => blocks.for_each(|(b, out)| {
                let (d, m, high) = (f16_at(b, 0), f16_at(b, 2), u32_at(b, 4));
                nibbles(&b[8..], |i, q| out[i] = d * f32::from(fifth_bit(high, i, q)) + m);
            }),
            Self::Q8_0 => blocks.for_each(|(b, out)| {
                let d = f16_at(b, 0);
                out.iter_mut().zip(&b[2..]).for_each(|(v, &q)| *v = f32::from(q as i8) * d);
            }),
            Self::Q2_K => blocks.for_each(|(b, out)| q2_k(b, out)),
            Self::Q3_K => blocks.for_each(|(b, out)| q3_k(b, out)),
            Self::Q4_K => blocks.for_each(|(b, out)| q45_k(b, None, &b[16..], out)),
            Self::Q5_K => blocks.for_each(|(b, out)| q45_k(b, Some(&b[16..48]), &b[48..], out)),
            Self::Q6_K => blocks.for_each(|(b, out)| q6_k(b, out)),
        }
    }
}

fn f16_at(b: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([b[at], b[at + 1]]).to_f32()
}

fn u32_at(b: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]])
}

/// The 32 nibbles of a legacy block: first all low ones, then all high ones.
fn nibbles(b: &[u8], mut put: impl FnMut(usize, u8)) {
    for (i, byte) in b[..16].iter().enumerate() {
        put(i, byte & 15);
        put(i + 16, byte >> 4);
    }
}

fn fifth_bit(high: u32, i: usize, nibble: u8) -> u8 {
    nibble | ((high >> i & 1) as u8) << 4
}

/// 16 bytes of scale (low nibble) and minimum (high) of 16 weights; 64 bytes of 2-bit numbers; d, dmin.
fn q2_k(b: &[u8], out: &mut [f32]) {
    let (d, dmin) = (f16_at(b, 80), f16_at(b, 82));
    for (sub, out) in out.chunks_exact_mut(16).enumerate() {
        let (scale, min) = (d * f32::from(b[sub] & 15), dmin * f32::from(b[sub] >> 4));
        for (l, v) in out.iter_mut().enumerate() {
            let q = two_bits(&b[16..80], sub, l);
            *v = scale * f32::from(q) - min;
        }
    }
}

/// 2-bit numbers of K-quants: each half of the block has 32 bytes; the first 32 weights are the lowest two bits of each.
fn two_bits(quarters: &[u8], sub: usize, l: usize) -> u8 {
    let (half, turn, at) = (sub / 8, sub / 2 % 4, sub % 2 * 16 + l);
    quarters[half * 32 + at] >> (2 * turn) & 3
}

/// 32 bytes of third bits; 64 bytes of the lower two; 12 bytes of 6-bit scales; d.
fn q3_k(b: &[u8], out: &mut [f32]) {
    let (scales, d) = (&b[96..108], f16_at(b, 108));
    for (sub, out) in out.chunks_exact_mut(16).enumerate() {
        let low = scales[sub % 8] >> (4 * (sub / 8)) & 15;
        let high = scales[8 + sub % 4] >> (2 * (sub / 4)) & 3;
        let scale = d * (f32::from(low | high << 4) - 32.0);
        for (l, v) in out.iter_mut().enumerate() {
            // A set bit adds 4, and numbers are offset by 4.
            let third = b[sub % 2 * 16 + l] >> (sub / 2) & 1;
            let q = two_bits(&b[32..96], sub, l) as i8 - if third == 1 { 0 } else { 4 };
            *v = scale * f32::from(q);
        }
    }
}

/// d, dmin; 12 bytes of 6-bit scales and minima of 32 weights; the fifth bits (`Q5_K`); 128 bytes of nibbles.
fn q45_k(b: &[u8], fifth: Option<&[u8]>, low: &[u8], out: &mut [f32]) {
    let (d, dmin) = (f16_at(b, 0), f16_at(b, 2));
    for (sub, out) in out.chunks_exact_mut(32).enumerate() {
        let (scale, min) = scale_and_min(&b[4..16], sub);
        let (scale, min) = (d * f32::from(scale), dmin * f32::from(min));
        for (l, v) in out.iter_mut().enumerate() {
            let nibble = low[sub / 2 * 32 + l] >> (4 * (sub % 2)) & 15;
            let q = nibble | fifth.map_or(0, |bits| (bits[l] >> sub & 1) << 4);
            *v = scale * f32::from(q) - min;
        }
    }
}

/// The first four sub-blocks have six bits in bytes 0 to 3 (scale) and 4 to 7 (minimum); the others have their low four in
/// bytes 8 to 11 and their high two above the first four's.
fn scale_and_min(packed: &[u8], sub: usize) -> (u8, u8) {
    match sub {
        0..4 => (packed[sub] & 63, packed[sub + 4] & 63),
        _ => {
            let low = packed[sub + 4];
            (low & 15 | packed[sub - 4] >> 6 << 4, low >> 4 | packed[sub] >> 6 << 4)
        }
    }
}

/// 128 bytes of low nibbles; 64 bytes of the upper two bits; 16 signed scales of 16 weights; d.
fn q6_k(b: &[u8], out: &mut [f32]) {
    let d = f16_at(b, 208);
    for (sub, out) in out.chunks_exact_mut(16).enumerate() {
        let scale = d * f32::from(b[192 + sub] as i8);
        let (half, quarter) = (sub / 8, sub / 2 % 4);
        for (l, v) in out.iter_mut().enumerate() {
            let at = sub % 2 * 16 + l;
            let low = b[half * 64 + quarter % 2 * 32 + at] >> (4 * (quarter / 2)) & 15;
            let high = b[128 + half * 32 + at] >> (2 * quarter) & 3;
            *v = scale * f32::from((low | high << 4) as i8 - 32);
        }
    }
}
