//! Vectors of f32 in the width of an instruction-set level, so that each kernel is written once.
//!
//! A [`Kernel`] is generic over [`Simd`]; [`Level::run`] compiles it for every level and picks one at run time. Values
//! of the types that implement [`Simd`] prove that the machine has their instructions: only [`Level::run`] makes them.

use crate::error::Result;
use codecllm_codec::Cpu;

/// A computation that can be compiled for every level.
pub trait Kernel {
    /// What it returns.
    type Output;

    /// Computes. Implementations are `#[inline(always)]`, and so is what they call, so that all of it is compiled with
    /// the level's instructions.
    fn run<S: Simd>(self, s: S) -> Self::Output;
}

/// The vector operations of one level.
pub trait Simd: Copy {
    /// A vector of f32.
    type V: Copy;
    /// Its elements; divides 32.
    const LANES: usize;
    /// Tokens of a register-blocked tile with four rows, so that its sums stay in registers; at most 6.
    const TILE_TOKENS: usize;

    /// All zeros.
    fn zero(self) -> Self::V;
    /// All `x`.
    fn splat(self, x: f32) -> Self::V;
    /// `a + b`
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a · b`
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a / b`
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a · b + c`; fused where the level has it.
    fn mul_add(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The larger of each pair of elements; of b where one is NaN.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// The sum of the elements.
    fn sum(self, a: Self::V) -> f32;
    /// The sums of the elements of four vectors.
    fn sum4(self, a: [Self::V; 4]) -> [f32; 4];
    /// The largest element; NaN elements may be passed over.
    fn max_element(self, a: Self::V) -> f32;
    /// e^a, with a relative error below 3e-7 where the result is a normal number. NaN stays NaN.
    fn exp(self, a: Self::V) -> Self::V;

    /// Loads `LANES` values.
    ///
    /// # Safety
    /// All of them are readable.
    unsafe fn load(self, p: *const f32) -> Self::V;
    /// Stores `LANES` values.
    ///
    /// # Safety
    /// All of them are writable.
    unsafe fn store(self, p: *mut f32, a: Self::V);
    /// Loads `LANES` little-endian BF16 values.
    ///
    /// # Safety
    /// All of them are readable.
    unsafe fn load_bf16(self, p: *const [u8; 2]) -> Self::V;
    /// Loads `LANES` little-endian F16 values.
    ///
    /// # Safety
    /// All of them are readable.
    unsafe fn load_f16(self, p: *const [u8; 2]) -> Self::V;
    /// Asks for the cache line at `p`, which need not be readable.
    fn prefetch<T>(self, p: *const T);
}

/// An instruction-set level that this machine has.
#[derive(Debug, Clone, Copy)]
pub struct Level(Cpu);

impl Level {
    /// The level `cpu`; an error names what the machine lacks for it.
    pub fn new(cpu: Cpu) -> Result<Self> {
        // Its spelling is parsed by the codec, which refuses what the machine lacks.
        Ok(Self(cpu.name().parse()?))
    }

    /// The codec's name of the level.
    pub fn cpu(self) -> Cpu {
        self.0
    }

    /// Runs a kernel.
    pub fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self.0 {
            // SAFETY: `new` saw that the machine has this level's features.
            #[cfg(target_arch = "x86_64")]
            Cpu::Avx512 => unsafe { x86::run_avx512(kernel) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Cpu::Avx2 => unsafe { x86::run_avx2(kernel) },
            _ => kernel.run(Scalar),
        }
    }
}

/// Plain Rust, eight values at a time, which compilers turn into what vectors the target has.
#[derive(Clone, Copy)]
struct Scalar;

impl Scalar {
    #[inline(always)]
    fn zip(a: [f32; 8], b: [f32; 8], f: impl Fn(f32, f32) -> f32) -> [f32; 8] {
        let mut out = a;
        for (a, b) in out.iter_mut().zip(b) {
            *a = f(*a, b);
        }
        out
    }
}

impl Simd for Scalar {
    type V = [f32; 8];
    const LANES: usize = 8;
    const TILE_TOKENS: usize = 1;

    #[inline(always)]
    fn zero(self) -> Self::V {
        [0.0; 8]
    }
    #[inline(always)]
    fn splat(self, x: f32) -> Self::V {
        [x; 8]
    }
    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        Self::zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        Self::zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        Self::zip(a, b, |a, b| a / b)
    }
    #[inline(always)]
    fn mul_add(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        self.add(self.mul(a, b), c)
    }
    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        Self::zip(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn sum(self, a: Self::V) -> f32 {
        a.iter().sum()
    }
    #[inline(always)]
    fn sum4(self, a: [Self::V; 4]) -> [f32; 4] {
        a.map(|a| a.iter().sum())
    }
    #[inline(always)]
    fn max_element(self, a: Self::V) -> f32 {
        a.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
    #[inline(always)]
    fn exp(self, a: Self::V) -> Self::V {
        a.map(f32::exp)
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> Self::V {
        // SAFETY: the caller's: eight values are readable. Vectors may be loaded from any alignment.
        unsafe { p.cast::<Self::V>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, a: Self::V) {
        // SAFETY: the caller's: eight values are writable.
        unsafe { p.cast::<Self::V>().write_unaligned(a) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const [u8; 2]) -> Self::V {
        // SAFETY: the caller's: eight values are readable; byte arrays have no alignment.
        unsafe { p.cast::<[[u8; 2]; 8]>().read() }.map(|b| half::bf16::from_le_bytes(b).to_f32())
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const [u8; 2]) -> Self::V {
        // SAFETY: the caller's: eight values are readable; byte arrays have no alignment.
        unsafe { p.cast::<[[u8; 2]; 8]>().read() }.map(|b| half::f16::from_le_bytes(b).to_f32_const())
    }
    #[inline(always)]
    fn prefetch<T>(self, _: *const T) {}
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Kernel, Simd};
    use std::arch::x86_64::*;

    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
    pub(super) fn run_avx512<K: Kernel>(kernel: K) -> K::Output {
        kernel.run(Avx512(()))
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn run_avx2<K: Kernel>(kernel: K) -> K::Output {
        kernel.run(Avx2(()))
    }

    #[derive(Clone, Copy)]
    struct Avx512(());

    #[derive(Clone, Copy)]
    struct Avx2(());

    /// Methods whose bodies are intrinsics of the level.
    macro_rules! intrinsics {
        ($(fn $name:ident($self:ident $(, $arg:ident: $t:ty)*) -> $out:ty $body:block)*) => {$(
            #[inline(always)]
            fn $name($self $(, $arg: $t)*) -> $out {
                // SAFETY: values of this type are made only where the level's features are enabled.
                unsafe { $body }
            }
        )*};
    }

    /// Methods that access memory with intrinsics of the level.
    macro_rules! accesses {
        ($(fn $name:ident($self:ident $(, $arg:ident: $t:ty)*) $(-> $out:ty)? $body:block)*) => {$(
            #[inline(always)]
            unsafe fn $name($self $(, $arg: $t)*) $(-> $out)? {
                // SAFETY: as for the other methods; that the memory may be accessed is the caller's promise, and the
                // instructions take any alignment.
                unsafe { $body }
            }
        )*};
    }

    /// Coefficients of e^r for |r| ≤ ln 2 / 2, highest power first: the Taylor series, whose next term is below 6e-9.
    const EXP: [f32; 8] = [1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0];
    /// ln 2 as a sum whose first part times a small integer is exact.
    const LN_2: (f32, f32) = (355.0 / 512.0, -2.121_944_4e-4);
    /// Where e^a is a normal number.
    const EXP_RANGE: (f32, f32) = (-87.33, 88.37);

    /// The sum of the two halves.
    #[target_feature(enable = "avx512f,avx512dq")]
    #[inline]
    fn halve(a: __m512) -> __m256 {
        _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps::<1>(a))
    }

    /// The sums of the elements of four vectors.
    #[target_feature(enable = "avx2")]
    #[inline]
    fn sum4(a: [__m256; 4]) -> [f32; 4] {
        let [a, b, c, d] = a;
        let quads = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
        let sums = _mm_add_ps(_mm256_castps256_ps128(quads), _mm256_extractf128_ps::<1>(quads));
        let mut out = [0.0; 4];
        // SAFETY: `out` has the four values' room.
        unsafe { _mm_storeu_ps(out.as_mut_ptr(), sums) };
        out
    }

    impl Simd for Avx512 {
        type V = __m512;
        const LANES: usize = 16;
        const TILE_TOKENS: usize = 6;

        intrinsics! {
            fn zero(self) -> __m512 { _mm512_setzero_ps() }
            fn splat(self, x: f32) -> __m512 { _mm512_set1_ps(x) }
            fn add(self, a: __m512, b: __m512) -> __m512 { _mm512_add_ps(a, b) }
            fn mul(self, a: __m512, b: __m512) -> __m512 { _mm512_mul_ps(a, b) }
            fn div(self, a: __m512, b: __m512) -> __m512 { _mm512_div_ps(a, b) }
            fn mul_add(self, a: __m512, b: __m512, c: __m512) -> __m512 { _mm512_fmadd_ps(a, b, c) }
            fn max(self, a: __m512, b: __m512) -> __m512 { _mm512_max_ps(a, b) }
            fn sum(self, a: __m512) -> f32 { _mm512_reduce_add_ps(a) }
            fn sum4(self, a: [__m512; 4]) -> [f32; 4] {
                let [a, b, c, d] = a;
                sum4([halve(a), halve(b), halve(c), halve(d)])
            }
            fn max_element(self, a: __m512) -> f32 { _mm512_reduce_max_ps(a) }
            fn exp(self, a: __m512) -> __m512 {
                // Of the two operands, min and max return the second where one is NaN.
                let a = self.max(self.splat(EXP_RANGE.0), a);
                let a = _mm512_min_ps(self.splat(EXP_RANGE.1), a);
                let n = _mm512_roundscale_ps::<0>(self.mul(a, self.splat(std::f32::consts::LOG2_E)));
                let r = _mm512_fnmadd_ps(n, self.splat(LN_2.0), a);
                let r = _mm512_fnmadd_ps(n, self.splat(LN_2.1), r);
                let mut p = self.splat(EXP[0]);
                for c in &EXP[1..] {
                    p = self.mul_add(p, r, self.splat(*c));
                }
                _mm512_scalef_ps(p, n)
            }
        }

        accesses! {
            fn load(self, p: *const f32) -> __m512 { _mm512_loadu_ps(p) }
            fn store(self, p: *mut f32, a: __m512) { _mm512_storeu_ps(p, a) }
            fn load_bf16(self, p: *const [u8; 2]) -> __m512 {
                let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
            }
            fn load_f16(self, p: *const [u8; 2]) -> __m512 { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
        }

        #[inline(always)]
        fn prefetch<T>(self, p: *const T) {
            // SAFETY: a prefetch of any address is harmless.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
        }
    }

    impl Simd for Avx2 {
        type V = __m256;
        const LANES: usize = 8;
        const TILE_TOKENS: usize = 3;

        intrinsics! {
            fn zero(self) -> __m256 { _mm256_setzero_ps() }
            fn splat(self, x: f32) -> __m256 { _mm256_set1_ps(x) }
            fn add(self, a: __m256, b: __m256) -> __m256 { _mm256_add_ps(a, b) }
            fn mul(self, a: __m256, b: __m256) -> __m256 { _mm256_mul_ps(a, b) }
            fn div(self, a: __m256, b: __m256) -> __m256 { _mm256_div_ps(a, b) }
            fn mul_add(self, a: __m256, b: __m256, c: __m256) -> __m256 { _mm256_fmadd_ps(a, b, c) }
            fn max(self, a: __m256, b: __m256) -> __m256 { _mm256_max_ps(a, b) }
            fn max_element(self, a: __m256) -> f32 {
                let quads = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
                let pairs = _mm_max_ps(quads, _mm_movehl_ps(quads, quads));
                _mm_cvtss_f32(_mm_max_ss(pairs, _mm_movehdup_ps(pairs)))
            }
            fn sum4(self, a: [__m256; 4]) -> [f32; 4] { sum4(a) }
            fn sum(self, a: __m256) -> f32 {
                let quads = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
                let pairs = _mm_add_ps(quads, _mm_movehl_ps(quads, quads));
                _mm_cvtss_f32(_mm_add_ss(pairs, _mm_movehdup_ps(pairs)))
            }
            fn exp(self, a: __m256) -> __m256 {
                let a = self.max(self.splat(EXP_RANGE.0), a);
                let a = _mm256_min_ps(self.splat(EXP_RANGE.1), a);
                let n = _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(
                    self.mul(a, self.splat(std::f32::consts::LOG2_E)),
                );
                let r = _mm256_fnmadd_ps(n, self.splat(LN_2.0), a);
                let r = _mm256_fnmadd_ps(n, self.splat(LN_2.1), r);
                let mut p = self.splat(EXP[0]);
                for c in &EXP[1..] {
                    p = self.mul_add(p, r, self.splat(*c));
                }
                let exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
                self.mul(p, _mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent)))
            }
        }

        accesses! {
            fn load(self, p: *const f32) -> __m256 { _mm256_loadu_ps(p) }
            fn store(self, p: *mut f32, a: __m256) { _mm256_storeu_ps(p, a) }
            fn load_bf16(self, p: *const [u8; 2]) -> __m256 {
                let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
            }
            fn load_f16(self, p: *const [u8; 2]) -> __m256 { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) }
        }

        #[inline(always)]
        fn prefetch<T>(self, p: *const T) {
            // SAFETY: a prefetch of any address is harmless.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// e^x of every element; a multiple of 32 of them.
    struct Exp<'a>(&'a mut [f32]);

    impl Kernel for Exp<'_> {
        type Output = ();

        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            for x in self.0.chunks_exact_mut(S::LANES) {
                // SAFETY: `x` has `LANES` elements.
                unsafe { s.store(x.as_mut_ptr(), s.exp(s.load(x.as_ptr()))) };
            }
        }
    }

    #[test]
    fn exp_is_accurate_where_results_are_normal() {
        for cpu in Cpu::available() {
            let x: Vec<f32> = (0..32 * 500).map(|i| -87.3 + i as f32 * (175.6 / 16_000.0)).collect();
            let mut y = x.clone();
            Level::new(cpu).unwrap().run(Exp(&mut y));
            for (x, y) in x.iter().zip(y) {
                let expected = f64::from(*x).exp();
                assert!((f64::from(y) - expected).abs() < 3e-7 * expected, "{cpu}: e^{x} = {expected}, found {y}");
            }
        }
    }

    #[test]
    fn exp_of_extremes() {
        for cpu in Cpu::available() {
            let mut x = [0.0; 32];
            x[..5].copy_from_slice(&[f32::NAN, f32::NEG_INFINITY, f32::INFINITY, -1e4, 0.0]);
            Level::new(cpu).unwrap().run(Exp(&mut x));
            assert!(x[0].is_nan() && x[1] < 1.2e-38 && x[2] > 2e38 && x[3] < 1.2e-38 && x[4] == 1.0, "{cpu}: {x:?}");
        }
    }

    /// The sum and the largest of 32 elements, and four sums.
    struct Reduce<'a>(&'a [f32; 32]);

    impl Kernel for Reduce<'_> {
        type Output = (f32, f32, [f32; 4]);

        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> Self::Output {
            // SAFETY: `LANES` divides 32.
            let v = unsafe { s.load(self.0.as_ptr()) };
            (s.sum(v), s.max_element(v), s.sum4([v, s.zero(), s.splat(1.0), s.add(v, v)]))
        }
    }

    #[test]
    fn reductions_take_every_lane() {
        for cpu in Cpu::available() {
            let lanes = if cpu == Cpu::Avx512 { 16 } else { 8 };
            for lane in 0..lanes {
                let mut x = [0.0; 32];
                x[lane] = 3.0;
                let found = Level::new(cpu).unwrap().run(Reduce(&x));
                assert_eq!(found, (3.0, 3.0, [3.0, 0.0, lanes as f32, 6.0]), "{cpu}, lane {lane}");
            }
        }
    }
}
