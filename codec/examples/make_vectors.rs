//! Writes `vectors/`: golden tensors that every decoder must decode to the listed codes, tensors that every reader must
//! refuse, and the manifest. Run from the repository's root; the files change only when the format does.

use bytes::Bytes;
use codecllm_codec::block::Params;
use codecllm_codec::{
    Checks, Coder, Cpu, Dtype, EncodeOptions, EncodedTensor, Format, Prefer, ScaleMode, Tensor, encode_tensor,
};
use serde_json::{Value, json};
use std::path::Path;
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

/// Rows of different spread, a zero row, and outliers; the same on every machine.
fn matrix(n_rows: usize, n_cols: usize) -> Tensor {
    let mut state = 0x2545_f491_4f6c_dd1du64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 24) as f32
    };
    let mut data = Vec::new();
    for row in 0..n_rows {
        let spread = if row == 3 { 0.0 } else { 0.02 * (1.0 + next()) };
        for _ in 0..n_cols {
            let bell = next() + next() + next() + next() - 2.0;
            let outlier = if next() < 0.004 { 9.0 } else { 1.0 };
            data.extend(half::bf16::from_f32(bell * spread * outlier).to_le_bytes());
        }
    }
    Tensor { name: "w".into(), dtype: Dtype::Bf16, shape: vec![n_rows, n_cols], data: data.into() }
}

fn write(dir: &Path, name: &str, bytes: &[u8]) {
    std::fs::write(dir.join(name), bytes).unwrap_or_else(|e| panic!("{name}: {e}"));
}

fn golden(dir: &Path, name: &str, bytes: Vec<u8>) -> Value {
    write(dir, name, &bytes);
    let sum = format!("{:016x}", xxh3_64(&bytes));
    let encoded = EncodedTensor::parse(Bytes::from(bytes), Checks::Full).expect("a golden tensor parses");
    let codes = encoded.decode_codes(Cpu::Scalar).expect("a golden tensor decodes");
    let code_bytes: Vec<u8> = (0..codes.len()).flat_map(|i| codes.get(i).to_le_bytes()).collect();
    let scales: Vec<u8> = (0..encoded.n_rows()).flat_map(|r| encoded.scale(r).to_le_bytes()).collect();
    json!({
        "file": name, "xxh3": sum, "format": encoded.format(), "coder": encoded.coder(), "params": encoded.params(),
        "shape": [encoded.n_rows(), encoded.n_cols()],
        "codes_u16_xxh3": format!("{:016x}", xxh3_64(&code_bytes)),
        "scales_f32_xxh3": format!("{:016x}", xxh3_64(&scales)),
    })
}

/// Puts right checksums into a damaged tensor, so that only the damage is left to find.
fn seal(data: &mut [u8], payload: usize) {
    let sum = xxh3_64(&data[payload..]);
    data[88..96].copy_from_slice(&sum.to_le_bytes());
    let mut hasher = Xxh3::new();
    hasher.update(&data[..80]);
    hasher.update(&[0; 8]);
    hasher.update(&data[88..payload]);
    data[80..88].copy_from_slice(&hasher.digest().to_le_bytes());
}

fn main() {
    let dir = Path::new("vectors");
    std::fs::create_dir_all(dir).expect("vectors/ can be made");
    let mut good = Vec::new();
    let odd = matrix(45, 171);
    for &format in Format::ALL {
        for &coder in Coder::ALL {
            let options = EncodeOptions { format, coder, step: Some(0.01), ..Default::default() };
            good.push(golden(dir, &format!("{format}-{coder}.bin"), encode_tensor(&odd, &options).expect("encodes")));
        }
        for prefer in [Prefer::Size, Prefer::Speed] {
            let options = EncodeOptions { format, prefer, step: Some(0.01), ..Default::default() };
            let name = format!("{format}-{}.bin", if prefer == Prefer::Size { "size" } else { "speed" });
            good.push(golden(dir, &name, encode_tensor(&odd, &options).expect("encodes")));
        }
    }
    let options = EncodeOptions { scale: ScaleMode::Tensor, ..Default::default() };
    good.push(golden(dir, "int8-per-tensor.bin", encode_tensor(&odd, &options).expect("encodes")));
    for (format, parts_per_symbol, table_bits, raw_bits, part_bits, bias) in [
        (Format::Int8, 1, 5, 0, 8, -128),
        (Format::Int8, 8, 10, 6, 1, 0),
        (Format::Int8, 2, 14, 4, 4, 0),
        (Format::Int8, 4, 9, 3, 3, 0),
        (Format::Fp8, 4, 11, 4, 3, 0),
        (Format::Fp8, 1, 12, 0, 8, 0),
        (Format::Bf16, 2, 11, 8, 7, 40 << 7),
        (Format::Bf16, 4, 12, 9, 3, 108 << 7),
        (Format::Bf16, 1, 13, 15, 1, 0),
    ] {
        let params = Params { parts_per_symbol, table_bits, raw_bits, part_bits, block_cols: 64, bias, trellis: false };
        let name = format!("{format}-g{parts_per_symbol}-t{table_bits}-k{raw_bits}.bin");
        let bytes = encode_tensor(&odd, &EncodeOptions { format, params: Some(params), ..Default::default() })
            .expect("encodes");
        good.push(golden(dir, &name, bytes));
    }

    for prefer in [Prefer::Balanced, Prefer::Speed] {
        let name = if prefer == Prefer::Speed { "rate-trellis-speed.bin" } else { "rate-trellis.bin" };
        let options =
            EncodeOptions { format: Format::Rate, prefer, step: Some(0.005), trellis: true, ..Default::default() };
        good.push(golden(dir, name, encode_tensor(&odd, &options).expect("encodes")));
    }
    for (parts_per_symbol, table_bits, raw_bits, part_bits) in
        [(1, 8, 1, 6), (2, 9, 2, 4), (4, 9, 3, 2), (4, 10, 1, 3), (8, 9, 4, 1)]
    {
        // Narrow: so that many weights are patched.
        let params =
            Params { parts_per_symbol, table_bits, raw_bits, part_bits, block_cols: 64, bias: 0, trellis: true };
        let options =
            EncodeOptions { format: Format::Rate, step: Some(0.003), params: Some(params), ..Default::default() };
        let name = format!("rate-trellis-g{parts_per_symbol}-t{table_bits}-k{raw_bits}.bin");
        good.push(golden(dir, &name, encode_tensor(&odd, &options).expect("encodes")));
    }

    // Damage to one small tensor with several blocks and patches, its checksums put right unless they are the point.
    let params = Params {
        parts_per_symbol: 4,
        table_bits: 8,
        raw_bits: 4,
        part_bits: 2,
        block_cols: 32,
        bias: 0,
        trellis: false,
    };
    let base = encode_tensor(
        &matrix(40, 70),
        &EncodeOptions { format: Format::Int8, params: Some(params), ..Default::default() },
    )
    .expect("encodes");
    let u64_at = |i: usize| u64::from_le_bytes(base[i..i + 8].try_into().expect("8 bytes")) as usize;
    let align = |n: usize| n.next_multiple_of(64);
    let table = 128;
    let scales = align(table + u32::from_le_bytes(base[44..48].try_into().expect("4 bytes")) as usize);
    let offsets = align(scales + 2 * 40);
    let patch_offsets = align(offsets + 4 * 7);
    let patches = align(patch_offsets + 4 * 7);
    let raw = align(patches + 4 * u64_at(48));
    let mut bad = Vec::new();
    let mut must_fail = |name: &str, error: &str, sealed: bool, damage: &dyn Fn(&mut Vec<u8>)| {
        let mut data = base.clone();
        damage(&mut data);
        if sealed {
            seal(&mut data, raw);
        }
        let name = format!("bad-{name}.bin");
        write(dir, &name, &data);
        let found = EncodedTensor::parse(Bytes::from(data), Checks::Full).expect_err(&name).to_string();
        assert!(found.contains(error), "{name}: {found}");
        bad.push(json!({ "file": name, "error": error }));
    };
    must_fail("empty", "does not begin with", false, &|d| d.clear());
    must_fail("magic", "does not begin with", false, &|d| d[0] = b'X');
    must_fail("short-header", "too few", false, &|d| d.truncate(100));
    must_fail("truncated", "truncated", false, &|d| d.truncate(d.len() - 64));
    must_fail("extra", "truncated or corrupt", false, &|d| d.extend([0; 64]));
    must_fail("major-version", "format version 2.0", true, &|d| d[8] = 2);
    must_fail("minor-version", "format version 1.2", true, &|d| d[10] = 2);
    must_fail("minor-for-nothing", "has nothing that 1.0 lacks", true, &|d| d[10] = 1);
    must_fail("trellis-before", "trellis 1 in version 1.0", true, &|d| d[96] = 1);
    must_fail("trellis-format", "a trellis with `int8`", true, &|d| (d[10], d[96]) = (1, 1));
    must_fail("format", "format 9 is unknown", true, &|d| d[12] = 9);
    must_fail("coder", "coder 7 is unknown", true, &|d| d[13] = 7);
    must_fail("scale-kind", "scale kind 4", true, &|d| d[14] = 4);
    must_fail("no-scales", "does not go with scale kind", true, &|d| d[14] = 0);
    must_fail("source-dtype", "source dtype 3", true, &|d| d[15] = 3);
    must_fail("no-rows", "the shape is 0", true, &|d| d[16..24].fill(0));
    must_fail("huge-rows", "more bytes than a machine addresses", true, &|d| d[16..24].fill(0xff));
    must_fail("more-rows", "its header describes", true, &|d| d[16] += 100);
    must_fail("parts", "3 parts a symbol", true, &|d| d[32] = 3);
    must_fail("table-bits", "4 table bits", true, &|d| d[33] = 4);
    must_fail("raw-bits", "9 raw bits", true, &|d| d[34] = 9);
    must_fail("part-bits", "does not hold them", true, &|d| d[35] = 4);
    must_fail("block-columns", "48 columns a block", true, &|d| d[36] = 48);
    must_fail("bias", "leaves the codes", true, &|d| d[40] = 1);
    must_fail("reserved", "reserved bytes", true, &|d| d[100] = 1);
    must_fail("padding", "padding", true, &|d| d[raw - 1] = 1);
    must_fail("metadata-checksum", "metadata's checksum", false, &|d| d[64] ^= 1);
    must_fail("payload-checksum", "payload's checksum", false, &|d| d[raw] ^= 1);
    must_fail("table-sum", "add up to", true, &|d| d[table + 3] ^= 1);
    must_fail("table-order", "not above the one before", true, &|d| d[table + 4] = 0);
    must_fail("scale", "negative, infinite or not a number", true, &|d| d[scales + 1] = 0xff);
    must_fail("offset-order", "offsets", true, &|d| d[offsets + 4..offsets + 8].fill(0xff));
    must_fail("offset-end", "offsets", true, &|d| d[offsets + 24] ^= 1);
    must_fail("patch-offset", "patches", true, &|d| d[patch_offsets + 4..patch_offsets + 8].fill(0xff));
    must_fail("patch-row", "patches", true, &|d| {
        // The last patch stands in the second block row, which has 8 rows.
        let at = patches + 4 * (u64_at(48) - 1);
        d[at + 2] |= 0x1f;
    });
    must_fail("patch-code", "patches", true, &|d| d[patches + 1] = 1);

    let manifest = json!({ "golden": good, "must_fail": bad });
    write(dir, "manifest.json", format!("{manifest:#}\n").as_bytes());
    println!("{} golden tensors, {} that must fail", good.len(), bad.len());
}
