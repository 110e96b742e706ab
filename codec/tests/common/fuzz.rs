//! What the fuzz targets do with their input; `tests/fuzz_corpus.rs` replays the corpus through the same functions.
#![allow(dead_code)] // each binary uses its own part

use bytes::Bytes;
use codecllm_codec::archive::{self, PROVENANCE_FILE, Silent};
use codecllm_codec::block::Params;
use codecllm_codec::quantize::{quantize, quantize_to_trellis};
use codecllm_codec::{
    Checkpoint, Checks, Cpu, Dtype, EncodeOptions, EncodedTensor, Format, Operand, ScaleMode, Tensor, encode_tensor,
};

/// Any bytes: every decoder must do as the plain one does, be it codes or an error, and stay in bounds.
pub fn encoded_tensor(data: &[u8]) {
    let Ok(encoded) = EncodedTensor::parse(Bytes::copy_from_slice(data), Checks::None) else { return };
    let (n_rows, n_cols) = (encoded.n_rows(), encoded.n_cols());
    if n_rows.saturating_mul(n_cols) > 1 << 18 {
        return;
    }
    let expected = encoded.decode_codes(Cpu::Scalar).ok();
    let x = Operand::new(&vec![0.25; 2 * n_cols], n_cols);
    for cpu in Cpu::available() {
        assert_eq!(encoded.decode_codes(cpu).ok(), expected, "{cpu}");
        let product = encoded.product(cpu, &x, 0..n_rows, &mut vec![0.0; 2 * n_rows]);
        assert_eq!(product.is_ok(), expected.is_some(), "{cpu}");
    }
}

/// Parameters and weights from the bytes: what is encoded decodes.
pub fn round_trip(data: &[u8]) {
    let Some((&[a, b, c, d, e, f, g, h], rest)) = data.split_first_chunk::<8>() else { return };
    // `rate` with a trellis, for without one it decodes as `int8` does.
    let format = Format::ALL[usize::from(a) % 4];
    let trellis = format == Format::Rate;
    let params = Params {
        parts_per_symbol: 1 << (b % 4),
        table_bits: 5 + u32::from(c) % 10,
        raw_bits: u32::from(d) % 16,
        part_bits: 1 + u32::from(e) % 15,
        block_cols: 32 * (1 + u32::from(f) % 4),
        bias: if format == Format::Bf16 { i32::from(g) << 7 } else { 0 },
        trellis,
    };
    let n_cols = 1 + usize::from(h) % 100;
    let n_rows = rest.len() / 2 / n_cols;
    if params.validate(format).is_err() || n_rows == 0 || n_rows > 100 {
        return;
    }
    let data = Bytes::copy_from_slice(&rest[..2 * n_rows * n_cols]);
    let t = Tensor { name: "w".into(), dtype: Dtype::Bf16, shape: vec![n_rows, n_cols], data };
    let step = trellis.then_some(0.01);
    let block_cols = params.block_cols as usize;
    let quantized = match step {
        Some(step) => quantize_to_trellis(&t, step, params.raw_bits, block_cols).map(|q| q.decoded(n_cols, block_cols)),
        None => quantize(&t, format, ScaleMode::Channel),
    };
    let Ok(expected) = quantized else { return };
    let bytes = encode_tensor(&t, &EncodeOptions { format, step, params: Some(params), ..Default::default() })
        .expect("a quantizable tensor encodes");
    let encoded = EncodedTensor::parse(bytes.into(), Checks::Full).expect("what was encoded parses");
    for cpu in Cpu::available() {
        assert!(encoded.decode_codes(cpu).expect("what was encoded decodes") == expected.codes, "{cpu} {params:?}");
    }
}

/// An archive of one shard, from the bytes (the length of its provenance in two, the provenance, the shard): whatever it
/// is, opening, inspecting and verifying it end, and every tensor that the header lists can be mapped.
pub fn archive(data: &[u8]) {
    let Some((&length, rest)) = data.split_first_chunk::<2>() else { return };
    let (provenance, shard) = rest.split_at(rest.len().min(u16::from_le_bytes(length).into()));
    let dir = tempfile::tempdir().expect("a temporary directory");
    let write =
        |name: &str, bytes: &[u8]| std::fs::write(dir.path().join(name), bytes).expect("space for a small file");
    write("config.json", b"{}");
    write(PROVENANCE_FILE, provenance);
    write("model.safetensors", shard);
    if let Ok(checkpoint) = Checkpoint::open(dir.path()) {
        for info in checkpoint.tensors() {
            let tensor = checkpoint.tensor(&info.name).expect("what the header lists is there");
            assert_eq!(tensor.data.len(), info.n_bytes);
        }
    }
    let _ = archive::inspect(dir.path(), &Silent);
    let cpus: Vec<Cpu> = Cpu::available().collect();
    let _ = archive::verify(dir.path(), None, &cpus, &Silent);
}

/// A GGUF file, from the bytes: whatever it is, reading it ends, and every tensor that it lists can be read.
pub fn gguf(data: &[u8]) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("x.gguf");
    std::fs::write(&path, data).expect("space for a small file");
    let _ = codecllm_codec::checkpoint::gguf_files(&path);
    if let Ok(checkpoint) = Checkpoint::open(&path) {
        for info in checkpoint.tensors() {
            let tensor = checkpoint.tensor(&info.name).expect("what the header lists is there");
            assert_eq!(tensor.data.len(), info.n_bytes);
        }
    }
}
