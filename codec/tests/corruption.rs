//! What is not an encoded tensor is refused, and what only looks like one stays in bounds.

mod common;

use bytes::Bytes;
use codecllm_codec::{
    Checks, Coder, Cpu, Dtype, EncodeOptions, EncodedTensor, Error, Format, Operand, Prefer, encode_tensor,
};
use common::{tensor, weights};
use proptest::prelude::*;

fn samples() -> Vec<Vec<u8>> {
    let t = tensor(Dtype::Bf16, 33, 70, &weights(33, 70, 2));
    let mut all = Vec::new();
    for &format in Format::ALL {
        for &coder in Coder::ALL {
            let options =
                EncodeOptions { format, coder, prefer: Prefer::Speed, step: Some(0.01), ..Default::default() };
            all.push(encode_tensor(&t, &options).unwrap());
        }
    }
    let options = EncodeOptions { format: Format::Rate, step: Some(0.004), trellis: true, ..Default::default() };
    all.push(encode_tensor(&t, &options).unwrap());
    all
}

/// Decodes and multiplies by every decoder; the results do not matter.
fn use_everything(data: &[u8]) {
    let Ok(encoded) = EncodedTensor::parse(Bytes::copy_from_slice(data), Checks::None) else { return };
    if encoded.n_rows().saturating_mul(encoded.n_cols()) > 1 << 20 {
        return; // a shape that the bytes allow (a zstd frame of zeros), but not worth the test's time
    }
    let x = Operand::new(&vec![0.5; encoded.n_cols()], encoded.n_cols());
    for cpu in Cpu::available() {
        let _ = encoded.decode_codes(cpu);
        let mut y = vec![0.0; encoded.n_rows()];
        let _ = encoded.product(cpu, &x, 0..encoded.n_rows(), &mut y);
    }
}

#[test]
fn every_truncation_is_refused() {
    for data in samples() {
        let data = Bytes::from(data);
        for n in 0..data.len() {
            let error =
                EncodedTensor::parse(data.slice(..n), Checks::None).expect_err("a truncated tensor was accepted");
            assert!(matches!(error, Error::Format { .. }), "{error}");
        }
    }
}

#[test]
fn extra_bytes_are_refused() {
    for mut data in samples() {
        for extra in [1, 64] {
            data.resize(data.len() + extra, 0);
            assert!(EncodedTensor::parse(Bytes::copy_from_slice(&data), Checks::None).is_err());
        }
    }
}

#[test]
fn every_changed_byte_is_refused() {
    for data in samples() {
        let mut changed = data.clone();
        for i in 0..data.len() {
            changed[i] ^= 1 << (i % 8);
            assert!(EncodedTensor::parse(Bytes::copy_from_slice(&changed), Checks::Full).is_err(), "byte {i}");
            if i % 7 == 0 {
                use_everything(&changed);
            }
            changed[i] = data[i];
        }
    }
}

#[test]
fn other_versions_are_refused_as_such() {
    for mut data in samples() {
        for (at, value) in [(8, 2), (10, 2)] {
            let was = std::mem::replace(&mut data[at], value);
            let error = EncodedTensor::parse(Bytes::copy_from_slice(&data), Checks::None).unwrap_err();
            assert!(matches!(error, Error::Unsupported { .. }) && error.to_string().contains("version"), "{error}");
            data[at] = was;
        }
    }
}

#[test]
fn wrong_arguments_are_errors() {
    let encoded = EncodedTensor::parse(samples().swap_remove(4).into(), Checks::Full).unwrap();
    let x = Operand::new(&[0.5; 70], 70);
    let mut y = vec![0.0; 33];
    assert!(encoded.product(Cpu::Scalar, &x, 0..33, &mut y[..32]).is_err());
    assert!(encoded.product(Cpu::Scalar, &x, 1..33, &mut y[..32]).is_err());
    assert!(encoded.product(Cpu::Scalar, &x, 0..16, &mut y[..16]).is_err());
    assert!(encoded.product(Cpu::Scalar, &x, 0..64, &mut y).is_err());
    assert!(encoded.product(Cpu::Scalar, &Operand::new(&[0.5; 69], 69), 0..33, &mut y).is_err());
    assert!(encoded.decode_rows(Cpu::Scalar, 30..34, &mut [0.0; 280]).is_err());
    assert!(encoded.decode_rows(Cpu::Scalar, 0..1, &mut [0.0; 69]).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    /// Several bytes changed, in the header or anywhere, checksums off: nothing panics, nothing leaves its buffers.
    #[test]
    fn hostile_bytes_stay_in_bounds(which in 0usize..6, changes in prop::collection::vec((any::<u16>(), any::<u8>(), any::<bool>()), 1..12)) {
        let mut data = samples().swap_remove(which);
        for (at, value, in_header) in changes {
            let n = if in_header { 128 } else { data.len() };
            data[usize::from(at) % n] = value;
        }
        use_everything(&data);
    }
}
