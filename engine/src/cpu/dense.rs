//! Products with plain matrices: BF16 (the baseline), F16 and F32 elements, widened to f32 as they are read.
//!
//! One token: bound by memory, so several rows are streamed at once, with prefetches ahead of the reads. Many tokens:
//! bound by arithmetic, so a tile of rows × tokens keeps its sums in registers, over runs of columns that keep its
//! activations in the L1 cache and the rows in L2.

use super::simd::{Kernel, Simd};
use half::{bf16, f16};
use std::ops::Range;

/// Columns that vectors take at a time; those after the last multiple go one by one.
const STEP: usize = 32;
/// Rows of a register tile.
const TILE_ROWS: usize = 4;
/// Columns of a run: the activations of a tile, 6 tokens × 1024 × 4 bytes, are half of an L1 cache.
const RUN_COLS: usize = 1024;
/// How far ahead of a read a product with one token prefetches, in bytes of each row.
const PREFETCH_BYTES: usize = 2048;

/// An element as it lies in a mapped file: little-endian, of any alignment.
pub trait Element: Copy + bytemuck::Pod + Send + Sync {
    /// Its value.
    fn to_f32(self) -> f32;

    /// Loads `S::LANES` of them.
    ///
    /// # Safety
    /// All of them are readable.
    unsafe fn load<S: Simd>(s: S, p: *const Self) -> S::V;
}

/// Defines an [`Element`].
macro_rules! element {
    ($(#[$doc:meta])* $name:ident($bytes:ty), $to_f32:expr, $load:expr) => {
        $(#[$doc])*
        #[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
        #[repr(transparent)]
        pub struct $name($bytes);

        impl Element for $name {
            #[inline(always)]
            fn to_f32(self) -> f32 {
                $to_f32(self.0)
            }

            #[inline(always)]
            unsafe fn load<S: Simd>(s: S, p: *const Self) -> S::V {
                // SAFETY: the caller's: all lanes are readable.
                unsafe { $load(s, p.cast()) }
            }
        }
    };
}

element!(
    /// bfloat16
    Bf16([u8; 2]), |b| bf16::from_le_bytes(b).to_f32(), S::load_bf16
);
element!(
    /// IEEE binary16
    F16([u8; 2]), |b| f16::from_le_bytes(b).to_f32(), S::load_f16
);
element!(
    /// IEEE binary32
    F32([u8; 4]), f32::from_le_bytes, S::load
);

/// `y = w · x`, overwriting y.
pub struct DenseProduct<'a, E> {
    /// `[n_rows, n_cols]`
    pub w: &'a [E],
    /// Inputs, at least 1.
    pub n_cols: usize,
    /// `[n_tokens, n_cols]`
    pub x: &'a [f32],
    /// `[n_rows, n_tokens]`
    pub y: &'a mut [f32],
}

impl<E: Element> Kernel for DenseProduct<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { w, n_cols, x, y } = self;
        let (n_rows, n_tokens) = (w.len() / n_cols, x.len() / n_cols);
        assert!(w.len() == n_rows * n_cols && x.len() == n_tokens * n_cols && y.len() == n_rows * n_tokens);
        let mut run = Run { w, x, n_cols, n_tokens, cols: 0..n_cols, token: 0 };
        y.fill(0.0);
        if n_tokens == 1 {
            return run.add_products::<S, 1, true>(s, y);
        }
        for first in (0..n_cols).step_by(RUN_COLS) {
            run.cols = first..n_cols.min(first + RUN_COLS);
            for token in (0..n_tokens).step_by(S::TILE_TOKENS) {
                run.token = token;
                match S::TILE_TOKENS.min(n_tokens - token) {
                    1 => run.add_products::<S, 1, false>(s, y),
                    2 => run.add_products::<S, 2, false>(s, y),
                    3 => run.add_products::<S, 3, false>(s, y),
                    4 => run.add_products::<S, 4, false>(s, y),
                    5 => run.add_products::<S, 5, false>(s, y),
                    _ => run.add_products::<S, 6, false>(s, y),
                }
            }
        }
    }
}

/// A run of columns, for the tokens from `token` on.
struct Run<'a, E> {
    w: &'a [E],
    x: &'a [f32],
    n_cols: usize,
    n_tokens: usize,
    cols: Range<usize>,
    token: usize,
}

impl<E: Element> Run<'_, E> {
    /// Adds the products of all rows with the next `T` tokens to y.
    #[inline(always)]
    fn add_products<S: Simd, const T: usize, const PREFETCH: bool>(&self, s: S, y: &mut [f32]) {
        let mut x: [&[f32]; T] = [&[]; T];
        for (t, x) in x.iter_mut().enumerate() {
            *x = &self.x[(self.token + t) * self.n_cols..][self.cols.clone()];
        }
        let n_rows = self.w.len() / self.n_cols;
        for first in (0..n_rows).step_by(TILE_ROWS) {
            let mut rows: [&[E]; TILE_ROWS] = [&[]; TILE_ROWS];
            for (r, row) in rows.iter_mut().enumerate() {
                // Past the last row, the last one again.
                *row = &self.w[(first + r).min(n_rows - 1) * self.n_cols..][self.cols.clone()];
            }
            let sums = dot_tile::<S, E, T, PREFETCH>(s, rows, x);
            for (t, sums) in sums.iter().enumerate() {
                let y = y[first * self.n_tokens + self.token + t..].iter_mut().step_by(self.n_tokens);
                for (y, sum) in y.zip(sums) {
                    *y += sum;
                }
            }
        }
    }
}

/// The dot products of `T` inputs with a tile of rows, all of the same length.
#[inline(always)]
fn dot_tile<S: Simd, E: Element, const T: usize, const PREFETCH: bool>(
    s: S,
    w: [&[E]; TILE_ROWS],
    x: [&[f32]; T],
) -> [[f32; TILE_ROWS]; T] {
    let n = w[0].len();
    assert!(w.iter().all(|w| w.len() == n) && x.iter().all(|x| x.len() == n));
    let ahead = PREFETCH_BYTES / size_of::<E>();
    let mut sums = [[s.zero(); TILE_ROWS]; T];
    let whole = n / STEP * STEP;
    for i in (0..whole).step_by(STEP) {
        if PREFETCH {
            for row in w {
                s.prefetch(row.as_ptr().wrapping_add(i + ahead));
            }
        }
        for j in (i..i + STEP).step_by(S::LANES) {
            let mut weights = [s.zero(); TILE_ROWS];
            for (weights, w) in weights.iter_mut().zip(w) {
                // SAFETY: j + LANES ≤ i + STEP ≤ n, the length of every slice.
                *weights = unsafe { E::load(s, w.as_ptr().add(j)) };
            }
            for (sums, x) in sums.iter_mut().zip(x) {
                // SAFETY: as above.
                let x = unsafe { s.load(x.as_ptr().add(j)) };
                for (sum, weights) in sums.iter_mut().zip(weights) {
                    *sum = s.mul_add(weights, x, *sum);
                }
            }
        }
    }
    let mut out = [[0.0; TILE_ROWS]; T];
    for (out, sums) in out.iter_mut().zip(sums) {
        *out = s.sum4(sums);
    }
    for (out, x) in out.iter_mut().zip(x) {
        for (out, w) in out.iter_mut().zip(w) {
            for (w, x) in w[whole..].iter().zip(&x[whole..]) {
                *out += w.to_f32() * x;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::simd::Level;
    use super::super::tests::{assert_close, random};
    use super::*;
    use codecllm_codec::Cpu;

    fn check<E: Element>(encode: impl Fn(f32) -> E) {
        for cpu in Cpu::available() {
            let level = Level::new(cpu).unwrap();
            for (n_rows, n_cols, n_tokens) in
                [(1, 1, 1), (5, 31, 1), (8, 96, 1), (7, 1100, 1), (3, 33, 2), (9, 64, 5), (6, 2100, 13), (4, 40, 9)]
            {
                let w: Vec<E> = random(n_rows * n_cols, 1).into_iter().map(&encode).collect();
                let x = random(n_tokens * n_cols, 2);
                let mut y = vec![f32::NAN; n_rows * n_tokens];
                level.run(DenseProduct { w: &w, n_cols, x: &x, y: &mut y });
                let dot = |w: &[E], x: &[f32]| -> f64 {
                    w.iter().zip(x).map(|(w, x)| f64::from(w.to_f32()) * f64::from(*x)).sum()
                };
                let expected: Vec<f64> =
                    w.chunks(n_cols).flat_map(|w| x.chunks(n_cols).map(move |x| dot(w, x))).collect();
                assert_close(&y, &expected, 2e-6);
            }
        }
    }

    #[test]
    fn products_agree_with_plain_sums_at_every_level() {
        check(|x| Bf16(bf16::from_f32(x).to_le_bytes()));
        check(|x| F16(f16::from_f32(x).to_le_bytes()));
        check(|x| F32(x.to_le_bytes()));
    }

    #[test]
    fn infinities_and_nans_pass_through() {
        for cpu in Cpu::available() {
            let mut w = [Bf16(bf16::ONE.to_le_bytes()); 64];
            w[3] = Bf16(bf16::INFINITY.to_le_bytes());
            w[40] = Bf16(bf16::NAN.to_le_bytes());
            let mut y = [0.0; 2];
            let (x, n_cols) = (&[1.0; 32], 32);
            Level::new(cpu).unwrap().run(DenseProduct { w: &w, n_cols, x, y: &mut y });
            assert!(y[0] == f32::INFINITY && y[1].is_nan(), "{y:?}");
        }
    }
}
