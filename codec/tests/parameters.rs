//! Every decoder decodes every valid set of parameters, whether or not our encoder would choose it.

mod common;

use bytes::Bytes;
use codecllm_codec::block::Params;
use codecllm_codec::quantize::{quantize, quantize_to_trellis};
use codecllm_codec::{Checks, Cpu, Dtype, EncodeOptions, EncodedTensor, Format, Operand, ScaleMode, encode_tensor};
use common::{tensor, weights};

/// Weights of up to a hundred steps, so that narrow parts leave many to be patched.
const STEP: f32 = 0.002;

#[test]
fn every_decoder_decodes_every_set() {
    let (n_rows, n_cols) = (37, 203);
    let t = tensor(Dtype::Bf16, n_rows, n_cols, &weights(n_rows, n_cols, 21));
    let x = Operand::new(&weights(1, n_cols, 4), n_cols);
    let mut n_sets = 0;
    // `rate` decodes as `int8` does, but for the trellis.
    for format in [Format::Bf16, Format::Fp8, Format::Int8, Format::Rate] {
        let trellis = format == Format::Rate;
        let quantized = (!trellis).then(|| quantize(&t, format, ScaleMode::Channel).unwrap().codes);
        for parts_per_symbol in [1, 2, 4, 8] {
            for raw_bits in 0..=15 {
                for part_bits in 1..=15 / parts_per_symbol {
                    for (table_bits, block_cols) in [(5, 32), (9, 64), (12, 96), (14, 256)] {
                        let bias = if format == Format::Bf16 && raw_bits > 0 { 110 << 7 } else { 0 };
                        let params =
                            Params { parts_per_symbol, table_bits, raw_bits, part_bits, block_cols, bias, trellis };
                        // Wide parts only with wide tables, to keep the sweep short.
                        if params.validate(format).is_err() || (part_bits > 8 && table_bits < 12) {
                            continue;
                        }
                        n_sets += 1;
                        let step = trellis.then_some(STEP);
                        let options = EncodeOptions { format, step, params: Some(params), ..Default::default() };
                        let bytes = encode_tensor(&t, &options).unwrap();
                        let of_trellis;
                        let expected = match &quantized {
                            Some(codes) => codes,
                            None => {
                                let block_cols = block_cols as usize;
                                let q = quantize_to_trellis(&t, STEP, raw_bits, block_cols).unwrap();
                                of_trellis = q.decoded(n_cols, block_cols).codes;
                                &of_trellis
                            }
                        };
                        let encoded = EncodedTensor::parse(Bytes::from(bytes), Checks::Full).unwrap();
                        let mut products: Vec<Vec<f32>> = Vec::new();
                        for cpu in Cpu::available() {
                            assert!(encoded.decode_codes(cpu).unwrap() == *expected, "{cpu} {format} {params:?}");
                            let mut y = vec![0.0; n_rows];
                            encoded.product(cpu, &x, 0..n_rows, &mut y).unwrap();
                            products.push(y);
                        }
                        for y in &products[1..] {
                            for (a, b) in y.iter().zip(&products[0]) {
                                assert!((a - b).abs() <= 1e-5 * (1.0 + b.abs()), "{format} {params:?}: {a} and {b}");
                            }
                        }
                    }
                }
            }
        }
    }
    assert!(n_sets > 400, "only {n_sets} sets were valid");
}
