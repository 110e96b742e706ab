//! The operations on rows of activations.

use super::simd::{Kernel, Simd};

/// `row = row / sqrt(mean(row²) + eps) · weight` for every row of x.
pub struct RmsNorm<'a> {
    /// `[n_rows, weight.len()]`
    pub x: &'a mut [f32],
    /// One row.
    pub weight: &'a [f32],
    /// Added to the mean square.
    pub eps: f32,
}

impl Kernel for RmsNorm<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for row in self.x.chunks_exact_mut(self.weight.len()) {
            let mut squares = s.zero();
            let vectors = row.chunks_exact(S::LANES);
            let mut rest = 0.0;
            for x in vectors.remainder() {
                rest += x * x;
            }
            for x in vectors {
                // SAFETY: `x` has `LANES` elements.
                let x = unsafe { s.load(x.as_ptr()) };
                squares = s.mul_add(x, x, squares);
            }
            let scale = 1.0 / ((s.sum(squares) + rest) / row.len() as f32 + self.eps).sqrt();
            for (x, weight) in row.iter_mut().zip(self.weight) {
                *x *= scale * weight;
            }
        }
    }
}

/// `gate = gate · sigmoid(gate) · up`
pub struct SiluMul<'a> {
    /// Any number of values.
    pub gate: &'a mut [f32],
    /// As many.
    pub up: &'a [f32],
}

impl Kernel for SiluMul<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let mut gates = self.gate.chunks_exact_mut(S::LANES);
        let ups = self.up.chunks_exact(S::LANES);
        let up_rest = ups.remainder();
        for (gate, up) in (&mut gates).zip(ups) {
            // SAFETY: both have `LANES` elements.
            unsafe {
                let x = s.load(gate.as_ptr());
                let divisor = s.add(s.splat(1.0), s.exp(s.mul(x, s.splat(-1.0))));
                s.store(gate.as_mut_ptr(), s.mul(s.div(x, divisor), s.load(up.as_ptr())));
            }
        }
        for (gate, up) in gates.into_remainder().iter_mut().zip(up_rest) {
            *gate = *gate / (1.0 + (-*gate).exp()) * up;
        }
    }
}

/// The rotary embedding of one row of heads: value `i` of a head's first half pairs with value `i` of its second, and
/// the pair turns by the angle whose cosine and sine are `cos[i]` and `sin[i]`.
pub fn rotate(row: &mut [f32], cos: &[f32], sin: &[f32]) {
    for head in row.chunks_exact_mut(2 * cos.len()) {
        let (a, b) = head.split_at_mut(cos.len());
        for (((a, b), cos), sin) in a.iter_mut().zip(b).zip(cos).zip(sin) {
            (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
        }
    }
}
