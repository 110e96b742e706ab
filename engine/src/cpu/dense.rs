//! Products with plain matrices: BF16 (the baseline), F16 and F32 elements, widened to f32 as they are read.
//!
//! One token: bound by memory, so several rows are streamed at once, with prefetches ahead of the reads. Many tokens:
//! bound by arithmetic, so a tile of rows × tokens keeps its sums in registers, over runs of columns that keep its
//! activations in the L1 cache and the rows in L2.

use super::simd::{Kernel, Simd};
use half::{bf16, f16};

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
        if n_tokens == 1 {
            let (tiles, rest) = y.as_chunks_mut::<TILE_ROWS>();
            let mut rows = w.chunks_exact(n_cols);
            for tile in tiles {
                let rows = std::array::from_fn(|_| rows.next().unwrap_or_default());
                *tile = dot_tile::<S, E, TILE_ROWS, 1, true>(s, rows, [x]).map(|[sum]| sum);
            }
            for (y, row) in rest.iter_mut().zip(rows) {
                [[*y]] = dot_tile::<S, E, 1, 1, true>(s, [row], [x]);
            }
            return;
        }
        y.fill(0.0);
        for first in (0..n_cols).step_by(RUN_COLS) {
            let cols = first..n_cols.min(first + RUN_COLS);
            let mut token = 0;
            while token < n_tokens {
                let n = S::TILE_TOKENS.min(n_tokens - token);
                let run = Run { w, x, n_cols, n_tokens, cols: cols.clone(), token };
                match n {
                    1 => run.tokens::<S, 1>(s, y),
                    2 => run.tokens::<S, 2>(s, y),
                    3 => run.tokens::<S, 3>(s, y),
                    4 => run.tokens::<S, 4>(s, y),
                    5 => run.tokens::<S, 5>(s, y),
                    _ => run.tokens::<S, 6>(s, y),
                }
                token += n.min(6);
            }
        }
    }
}

/// A run of columns for the tokens from `token` on.
struct Run<'a, E> {
    w: &'a [E],
    x: &'a [f32],
    n_cols: usize,
    n_tokens: usize,
    cols: std::ops::Range<usize>,
    token: usize,
}

impl<E: Element> Run<'_, E> {
    /// Adds the products of all rows with `T` tokens to y.
    #[inline(always)]
    fn tokens<S: Simd, const T: usize>(&self, s: S, y: &mut [f32]) {
        let x = std::array::from_fn(|t| &self.x[(self.token + t) * self.n_cols..][self.cols.clone()]);
        let row = |r: usize| &self.w[r * self.n_cols..][self.cols.clone()];
        let n_rows = self.w.len() / self.n_cols;
        let mut r = 0;
        while r + TILE_ROWS <= n_rows {
            let sums = dot_tile::<S, E, TILE_ROWS, T, false>(s, std::array::from_fn(|i| row(r + i)), x);
            for (i, sums) in sums.iter().enumerate() {
                self.add::<T>(y, r + i, sums);
            }
            r += TILE_ROWS;
        }
        for r in r..n_rows {
            let [sums] = dot_tile::<S, E, 1, T, false>(s, [row(r)], x);
            self.add::<T>(y, r, &sums);
        }
    }

    #[inline(always)]
    fn add<const T: usize>(&self, y: &mut [f32], row: usize, sums: &[f32; T]) {
        for (y, sum) in y[row * self.n_tokens + self.token..][..T].iter_mut().zip(sums) {
            *y += sum;
        }
    }
}

/// The dot products of `R` rows with `T` inputs of the same length.
#[inline(always)]
pub fn dot_tile<S: Simd, E: Element, const R: usize, const T: usize, const PREFETCH: bool>(
    s: S,
    w: [&[E]; R],
    x: [&[f32]; T],
) -> [[f32; T]; R] {
    let n = w[0].len();
    assert!(w.iter().all(|w| w.len() == n) && x.iter().all(|x| x.len() == n));
    let ahead = PREFETCH_BYTES / size_of::<E>();
    let mut sums = [[s.zero(); T]; R];
    let whole = n / STEP * STEP;
    for i in (0..whole).step_by(STEP) {
        if PREFETCH {
            for row in w {
                s.prefetch(row.as_ptr().wrapping_add(i + ahead));
            }
        }
        for j in (i..i + STEP).step_by(S::LANES) {
            let mut xs = [s.zero(); T];
            for t in 0..T {
                // SAFETY: j + LANES ≤ i + STEP ≤ n, the length of every slice.
                xs[t] = unsafe { s.load(x[t].as_ptr().add(j)) };
            }
            for r in 0..R {
                // SAFETY: as above.
                let weights = unsafe { E::load(s, w[r].as_ptr().add(j)) };
                for t in 0..T {
                    sums[r][t] = s.mul_add(weights, xs[t], sums[r][t]);
                }
            }
        }
    }
    let mut out = [[0.0; T]; R];
    for r in 0..R {
        for t in 0..T {
            out[r][t] = s.sum(sums[r][t]);
            for i in whole..n {
                out[r][t] += w[r][i].to_f32() * x[t][i];
            }
        }
    }
    out
}
