//! Every shape, format and parameter: what is encoded decodes to the quantizer's codes, on every instruction set, and
//! products from the compressed blocks are those of the decoded weights.

mod common;

use bytes::Bytes;
use codecllm_codec::quantize::{quantize, quantize_to_step, quantize_to_trellis};
use codecllm_codec::{
    Checks, Coder, Cpu, Dtype, EncodeOptions, EncodedTensor, Format, Operand, Prefer, ScaleMode, Tensor, encode_tensor,
};
use common::{tensor, weights};
use proptest::prelude::*;

/// The grid of `rate`: rows with a weight above 127 steps occur.
const STEP: f32 = 0.003;

fn check(t: &Tensor, options: &EncodeOptions) -> EncodedTensor {
    let bytes = encode_tensor(t, options).unwrap();
    let encoded = EncodedTensor::parse(Bytes::from(bytes), Checks::Full).unwrap();
    let expected = match options.format {
        Format::Rate if options.trellis => {
            let params = encoded.params().unwrap();
            let block_cols = params.block_cols as usize;
            quantize_to_trellis(t, STEP, params.raw_bits, block_cols).unwrap().decoded(t.shape[1], block_cols)
        }
        Format::Rate => quantize_to_step(t, STEP, encoded.params().map(|p| p.raw_bits)).unwrap(),
        format => quantize(t, format, options.scale).unwrap(),
    };
    for cpu in Cpu::available() {
        let codes = encoded.decode_codes(cpu).unwrap();
        if codes != expected.codes {
            let at = (0..codes.len()).find(|&i| codes.get(i) != expected.codes.get(i)).unwrap();
            panic!(
                "{cpu} {options:?} {:?} {:?}: row {} col {}: {:#x}, expected {:#x}",
                t.shape,
                encoded.params(),
                at / t.shape[1],
                at % t.shape[1],
                codes.get(at),
                expected.codes.get(at)
            );
        }
    }
    assert_eq!(encoded.verify_source(t, Cpu::detect()).unwrap(), None);
    assert_eq!(encoded.sizes().total() as usize, encoded.bytes().len());
    encoded
}

/// Against a float64 product of the decoded values.
fn check_products(encoded: &EncodedTensor, n_tokens: usize) {
    let (n_rows, n_cols) = (encoded.n_rows(), encoded.n_cols());
    let mut w = vec![0f32; n_rows * n_cols];
    encoded.decode_rows(Cpu::Scalar, 0..n_rows, &mut w).unwrap();
    let x: Vec<f32> = weights(n_tokens, n_cols, 77).iter().map(|v| v * 50.0).collect();
    let operand = Operand::new(&x, n_cols);
    let mut exact: Option<Vec<f32>> = None;
    for cpu in Cpu::available() {
        let mut y = vec![f32::NAN; n_rows * n_tokens];
        encoded.product(cpu, &operand, 0..n_rows, &mut y).unwrap();
        for r in 0..n_rows {
            for t in 0..n_tokens {
                let products = || (0..n_cols).map(|c| f64::from(w[r * n_cols + c]) * f64::from(x[t * n_cols + c]));
                let (sum, scale): (f64, f64) = (products().sum(), products().map(f64::abs).sum());
                // Float32 sums, and a fixed-point activation's error of half a unit.
                let row_l1: f64 = w[r * n_cols..][..n_cols].iter().map(|v| f64::from(v.abs())).sum();
                let largest = x[t * n_cols..][..n_cols].iter().fold(0f32, |m, v| m.max(v.abs()));
                let bound = 1e-5 * scale + row_l1 * f64::from(largest) / 65_000.0 + 1e-30;
                let error = (f64::from(y[r * n_tokens + t]) - sum).abs();
                assert!(error <= bound, "{cpu} row {r} token {t}: off by {error}, {bound} allowed");
            }
        }
        if encoded.format().is_integer() && encoded.coder() == Coder::Rans {
            assert_eq!(&y, exact.get_or_insert_with(|| y.clone()), "{cpu}: integer products are exact");
        }
    }
}

fn all_options() -> Vec<EncodeOptions> {
    let mut all = Vec::new();
    for &format in Format::ALL {
        for &scale in ScaleMode::ALL {
            for &coder in Coder::ALL {
                for prefer in [Prefer::Size, Prefer::Balanced, Prefer::Speed] {
                    let trellises = if format == Format::Rate && coder == Coder::Rans { 2 } else { 1 };
                    for trellis in [false, true].into_iter().take(trellises) {
                        all.push(EncodeOptions {
                            format,
                            scale,
                            coder,
                            prefer,
                            step: Some(STEP),
                            trellis,
                            params: None,
                        });
                    }
                }
            }
        }
    }
    all
}

#[test]
fn odd_shapes() {
    for (n_rows, n_cols) in [(1, 1), (1, 33), (3, 5), (31, 32), (33, 31), (64, 100), (65, 1030), (40, 2050), (100, 257)]
    {
        for dtype in [Dtype::Bf16, Dtype::F16, Dtype::F32] {
            let t = tensor(dtype, n_rows, n_cols, &weights(n_rows, n_cols, 5));
            for options in all_options() {
                let encoded = check(&t, &options);
                if n_rows < 70 {
                    check_products(&encoded, 1);
                }
            }
        }
    }
}

#[test]
fn several_tokens() {
    for &format in Format::ALL {
        for coder in [Coder::Rans, Coder::Zstd] {
            let t = tensor(Dtype::Bf16, 70, 300, &weights(70, 300, 9));
            let encoded = check(&t, &EncodeOptions { format, coder, step: Some(STEP), ..Default::default() });
            for n_tokens in [1, 2, 3, 5, 8, 13] {
                check_products(&encoded, n_tokens);
            }
        }
    }
}

#[test]
fn every_bf16_bit_pattern_survives() {
    let patterns: Vec<u8> = (0..=u16::MAX).flat_map(|b| b.to_le_bytes()).collect();
    let t = Tensor { name: "w".into(), dtype: Dtype::Bf16, shape: vec![128, 512], data: Bytes::from(patterns) };
    for coder in [Coder::Rans, Coder::Zstd] {
        check(&t, &EncodeOptions { format: Format::Bf16, coder, ..Default::default() });
    }
}

#[test]
fn frames_hold_the_codes_in_order() {
    // Three chunks of 65,536 bytes, the last one short.
    let t = tensor(Dtype::Bf16, 70, 2000, &weights(70, 2000, 4));
    let options = EncodeOptions { format: Format::Int8, coder: Coder::Zstd, ..Default::default() };
    let encoded = check(&t, &options);
    let frames = encoded.frames();
    let sizes: Vec<usize> = frames
        .iter()
        .map(|frame| zstd::bulk::decompress(&encoded.bytes()[frame.clone()], 1 << 16).unwrap().len())
        .collect();
    assert_eq!(sizes, [65536, 65536, 70 * 2000 - 2 * 65536]);
    let chunk = zstd::bulk::decompress(&encoded.bytes()[frames[1].clone()], 1 << 16).unwrap();
    let codes = encoded.decode_codes(Cpu::Scalar).unwrap();
    assert!(chunk.iter().enumerate().all(|(i, &byte)| u16::from(byte) == codes.get(65536 + i)));
    assert!(check(&t, &EncodeOptions { coder: Coder::Rans, ..options }).frames().is_empty());
}

#[test]
fn rows_without_weight() {
    let mut values = weights(8, 64, 3);
    values[..64].fill(0.0);
    values[64..128].iter_mut().for_each(|v| *v *= 1e-38); // subnormal in BF16, and its scale would be, too
    values[128..192].iter_mut().for_each(|v| *v *= 1e-30);
    let t = tensor(Dtype::Bf16, 8, 64, &values);
    for format in [Format::Fp8, Format::Int8] {
        let encoded = check(&t, &EncodeOptions { format, ..Default::default() });
        assert_eq!((encoded.scale(0), encoded.scale(1)), (0.0, 0.0));
        assert!(encoded.scale(2) > 0.0);
        check_products(&encoded, 1);
    }
}

#[test]
fn non_finite_weights_are_refused_by_name_and_place() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut values = weights(4, 40, 3);
        values[2 * 40 + 7] = bad;
        let t = tensor(Dtype::F32, 4, 40, &values);
        for format in [Format::Fp8, Format::Int8] {
            let error = encode_tensor(&t, &EncodeOptions { format, ..Default::default() }).unwrap_err().to_string();
            assert!(error.contains("row 2, column 7"), "{error}");
        }
        check(&t, &EncodeOptions { format: Format::Bf16, ..Default::default() });
    }
}

#[test]
fn constant_and_sparse_matrices() {
    for format in [Format::Bf16, Format::Fp8, Format::Int8] {
        for fill in [0.0, 1.0, -0.5] {
            let t = tensor(Dtype::Bf16, 64, 256, &vec![fill; 64 * 256]);
            let encoded = check(&t, &EncodeOptions { format, ..Default::default() });
            assert!(encoded.bytes().len() < 64 * 256, "{} bytes", encoded.bytes().len());
            check_products(&encoded, 1);
        }
        let mut values = vec![0.0; 64 * 256];
        (0..64 * 256).step_by(97).for_each(|i| values[i] = (i as f32 * 0.37).sin() * 3.0);
        check_products(
            &check(&tensor(Dtype::Bf16, 64, 256, &values), &EncodeOptions { format, ..Default::default() }),
            2,
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn arbitrary_bits_survive(
        n_rows in 1usize..80, n_cols in 1usize..140, seed in any::<u64>(), kind in 0..3,
    ) {
        let values: Vec<f32> = weights(n_rows, n_cols, seed).iter().enumerate().map(|(i, v)| match kind {
            0 => f32::from_bits((v.to_bits().wrapping_mul(2_654_435_761)).rotate_left(i as u32)),
            1 => v * 2f32.powi((i % 60) as i32 - 30),
            _ => *v,
        }).collect();
        let t = tensor(Dtype::Bf16, n_rows, n_cols, &values);
        for prefer in [Prefer::Size, Prefer::Speed] {
            check(&t, &EncodeOptions { format: Format::Bf16, prefer, ..Default::default() });
            if values.iter().all(|v| half::bf16::from_f32(*v).is_finite()) {
                for format in [Format::Fp8, Format::Int8] {
                    check(&t, &EncodeOptions { format, prefer, ..Default::default() });
                }
            }
        }
    }
}
