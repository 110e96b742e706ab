use super::super::host::Upload;
use super::matrix::{is_fast, kernel_format};
use super::*;
use codecllm_codec::block::Params;
use codecllm_codec::encoded::{Checks, EncodeOptions};
use codecllm_codec::quantize::{Codes, code_value};
use codecllm_codec::{Cpu, Dtype, EncodedTensor, Operand, Prefer, Tensor, encode_tensor};
use half::bf16;
use std::path::PathBuf;

/// A GPU, its kernels and the way to its memory, or nothing where there is none and none is required.
fn gpu() -> Option<(Device, EncodedKernels, Upload)> {
    match Device::open(0) {
        Ok(device) => {
            let (kernels, upload) = (EncodedKernels::new(&device).unwrap(), Upload::new(&device).unwrap());
            Some((device, kernels, upload))
        }
        Err(e) if std::env::var_os("CODECLLM_REQUIRE_CUDA").is_none_or(|v| v != "1") => {
            eprintln!("skipped, for want of a GPU: {e}");
            None
        }
        Err(e) => panic!("{e}"),
    }
}

fn random(n: usize, mut seed: u64) -> Vec<f32> {
    let mut next = move || {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (seed >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    (0..n).map(|_| (0..6).map(|_| next()).sum::<f32>()).collect()
}

fn tensor(n_rows: usize, n_cols: usize, seed: u64) -> Tensor {
    let data: Vec<u8> =
        random(n_rows * n_cols, seed).iter().flat_map(|v| bf16::from_f32(v * 0.1).to_le_bytes()).collect();
    Tensor { name: "w".into(), dtype: Dtype::Bf16, shape: vec![n_rows, n_cols], data: data.into() }
}

/// Tensors of odd shapes and all families of parameters, with what they are.
fn tensors() -> Vec<(String, EncodedTensor)> {
    let mut all = Vec::new();
    let shapes = [(1, 1), (33, 31), (64, 512), (75, 1000), (100, 2080), (32, 4096)];
    for (i, (n_rows, n_cols)) in shapes.into_iter().enumerate() {
        let source = tensor(n_rows, n_cols, i as u64 + 1);
        for &format in Format::ALL {
            for prefer in [Prefer::Size, Prefer::Balanced, Prefer::Speed] {
                let options = EncodeOptions { format, prefer, step: Some(0.01), ..Default::default() };
                let bytes = encode_tensor(&source, &options).unwrap();
                all.push((format!("{n_rows} × {n_cols} {format} {prefer:?}"), parse(bytes)));
            }
            for (g, t, k, w, c) in FAMILIES {
                let block_cols = *c;
                let mut params = Params {
                    parts_per_symbol: *g,
                    table_bits: *t,
                    raw_bits: *k,
                    part_bits: *w,
                    block_cols,
                    bias: 0,
                    trellis: false,
                };
                if format == Format::Bf16 {
                    // The magnitudes below about 0.25.
                    params.bias = (125 << 7) - (1 << (w + k.saturating_sub(1))).min(125 << 7);
                }
                if let Ok(bytes) =
                    encode_tensor(&source, &EncodeOptions { format, params: Some(params), ..Default::default() })
                {
                    all.push((format!("{n_rows} × {n_cols} {format} {params:?}"), parse(bytes)));
                }
            }
        }
    }
    assert!(all.len() > 200);
    all.extend(trellis_tensors());
    all
}

/// Codes of a trellis, of odd shapes and with all parts and raw bits that there are.
fn trellis_tensors() -> Vec<(String, EncodedTensor)> {
    let sources = [(33, 31), (75, 1000)].map(|(n_rows, n_cols)| tensor(n_rows, n_cols, 3));
    let mut all = Vec::new();
    for (i, source) in sources.iter().enumerate() {
        for (parts_per_symbol, raw_bits, part_bits) in
            [1, 2, 4, 8].into_iter().flat_map(|g| (1..7).flat_map(move |k| (1..8 - k).map(move |w| (g, k, w))))
        {
            if parts_per_symbol * part_bits > 15 {
                continue; // more than a symbol has
            }
            // Blocks of an odd number of units; few patches and many.
            let (block_cols, table_bits) = ([32, 96, 224, 512][(i + part_bits as usize) % 4], 8 + raw_bits % 3);
            let params =
                Params { parts_per_symbol, table_bits, raw_bits, part_bits, block_cols, bias: 0, trellis: true };
            let step = Some([0.003, 0.02][(i + raw_bits as usize) % 2]);
            let options = EncodeOptions { format: Format::Rate, step, params: Some(params), ..Default::default() };
            all.push((format!("{:?} {params:?}", source.shape), parse(encode_tensor(source, &options).unwrap())));
        }
        for prefer in [Prefer::Size, Prefer::Balanced, Prefer::Speed] {
            let options =
                EncodeOptions { format: Format::Rate, prefer, step: Some(0.01), trellis: true, ..Default::default() };
            all.push((
                format!("{:?} trellis {prefer:?}", source.shape),
                parse(encode_tensor(source, &options).unwrap()),
            ));
        }
    }
    all
}

/// G, T, k, w, C.
const FAMILIES: &[(u32, u32, u32, u32, u32)] = &[
    (1, 5, 0, 7, 32),
    (1, 12, 1, 7, 96),
    (1, 13, 7, 6, 256),
    (1, 14, 8, 7, 2048),
    (1, 11, 15, 1, 64),
    (2, 14, 4, 4, 128),
    (2, 9, 3, 5, 224),
    (2, 12, 7, 1, 64),
    (2, 13, 7, 6, 512),
    (2, 10, 12, 3, 32),
    (4, 10, 2, 3, 128),
    (4, 12, 3, 3, 256),
    (4, 10, 4, 2, 512),
    (4, 10, 5, 2, 128),
    (4, 10, 6, 2, 512),
    (4, 13, 9, 3, 512),
    (4, 8, 9, 2, 64),
    (4, 8, 0, 3, 64),
    (4, 11, 0, 2, 256),
    (2, 9, 0, 4, 96),
    (4, 11, 11, 3, 1024),
    (8, 10, 3, 1, 64),
    (8, 10, 4, 1, 256),
    (8, 10, 7, 1, 256),
    (8, 14, 7, 1, 2048),
    (8, 10, 0, 1, 256),
    (8, 10, 10, 1, 96),
    (8, 10, 5, 1, 256),
    (8, 10, 6, 1, 512),
    (4, 11, 1, 3, 64),
    (4, 12, 10, 3, 512),
    (2, 13, 8, 5, 512),
];

/// Tensors of so many blocks that each warp takes several, one behind the other.
fn many_blocks() -> Vec<(String, EncodedTensor)> {
    // Some thread blocks have more row blocks of the second than others; of the third they have several, and warps' shares end within them; of the fourth
    // they have some together.
    let sources = [tensor(2080, 4096, 21), tensor(5760, 1024, 22), tensor(14336, 224, 23), tensor(14336, 256, 24)];
    let codecs = [
        (Format::Int8, 8, 10, 4, 1, 0),
        (Format::Int8, 4, 10, 6, 2, 0),
        (Format::Rate, 8, 10, 4, 1, 0),
        (Format::Rate, 4, 10, 2, 3, 0),
        (Format::Fp8, 2, 13, 3, 4, 0),
        (Format::Bf16, 4, 12, 9, 3, 116 << 7),
    ];
    let encode = |source: &Tensor, (format, parts_per_symbol, table_bits, raw_bits, part_bits, bias)| {
        let trellis = format == Format::Rate;
        let params = Params { parts_per_symbol, table_bits, raw_bits, part_bits, block_cols: 32, bias, trellis };
        let options = EncodeOptions { format, step: Some(0.01), params: Some(params), ..Default::default() };
        (format!("{:?} {format} {params:?}", source.shape), parse(encode_tensor(source, &options).unwrap()))
    };
    sources.iter().flat_map(|source| codecs.map(|codec| encode(source, codec))).collect()
}

/// Tensors of more columns than the threads that prepare activations hold, and than they keep in shared memory.
fn many_columns() -> Vec<(String, EncodedTensor)> {
    let encode = |((n_rows, n_cols), format)| {
        let options = EncodeOptions { format, ..Default::default() };
        let what = format!("{n_rows} × {n_cols} {format}");
        (what, parse(encode_tensor(&tensor(n_rows, n_cols, 25), &options).unwrap()))
    };
    let shapes = [(40, 12_304), (33, 20_004)];
    shapes.into_iter().flat_map(|shape| [Format::Int8, Format::Bf16].map(|f| encode((shape, f)))).collect()
}

fn parse(bytes: Vec<u8>) -> EncodedTensor {
    EncodedTensor::parse(bytes.into(), Checks::Full).unwrap()
}

#[test]
fn many_blocks_have_kernels_of_their_own() {
    for (what, t) in many_blocks() {
        assert!(is_fast(kernel_format(&t.layout()), t.params().unwrap()), "{what}");
    }
}

#[test]
fn what_is_encoded_for_speed_has_kernels() {
    let source = tensor(256, 512, 7);
    // From 7 bits to 0.6.
    let steps = (0..16).map(|i| (Format::Rate, Some(0.002 * 2f32.powi(i / 2)), i % 2 == 1));
    for (format, step, trellis) in
        [Format::Int8, Format::Fp8, Format::Bf16].map(|f| (f, None, false)).into_iter().chain(steps)
    {
        let options = EncodeOptions { format, prefer: Prefer::Speed, step, trellis, ..Default::default() };
        let t = parse(encode_tensor(&source, &options).unwrap());
        let params = t.params().unwrap();
        assert!(is_fast(kernel_format(&t.layout()), params), "{format}, step {step:?}: {params:?}");
    }
}

fn code_bytes(tensor: &EncodedTensor) -> Vec<u8> {
    match tensor.decode_codes(Cpu::Scalar).unwrap() {
        Codes::U8(codes) => codes.into_owned(),
        Codes::U16(codes) => codes.iter().flat_map(|c| c.to_le_bytes()).collect(),
    }
}

#[track_caller]
fn assert_same<T: PartialEq + std::fmt::Debug>(what: &str, n_cols: usize, found: &[T], expected: &[T]) {
    assert_eq!(found.len(), expected.len(), "{what}");
    if let Some(i) = (0..found.len()).find(|&i| found[i] != expected[i]) {
        let different = (0..found.len()).filter(|&i| found[i] != expected[i]).count();
        panic!(
            "{what}: element {i} (row {}, column {}) is {:?}, expected {:?}; {different} of {} differ",
            i / n_cols,
            i % n_cols,
            found[i],
            expected[i],
            found.len()
        );
    }
}

/// Golden files that decode.
fn vectors() -> Vec<(String, EncodedTensor)> {
    let root = std::env::var_os("CARGO_MANIFEST_DIR").map_or(PathBuf::from("."), |d| PathBuf::from(d).join(".."));
    let files = std::fs::read_dir(root.join("vectors")).unwrap().map(|f| f.unwrap().path());
    let bins: Vec<PathBuf> = files.filter(|f| f.extension().is_some_and(|e| e == "bin")).collect();
    assert!(bins.len() > 30);
    let name = |f: &PathBuf| f.file_name().unwrap().to_string_lossy().into_owned();
    let good = bins.iter().filter(|f| !name(f).starts_with("bad-") && !name(f).contains("zstd"));
    good.map(|f| (name(f), parse(std::fs::read(f).unwrap()))).collect()
}

#[test]
fn decodes_to_the_codes_of_the_plain_decoder() {
    let Some((device, kernels, mut upload)) = gpu() else { return };
    let stream = device.stream();
    let all: Vec<_> = vectors().into_iter().chain(tensors()).chain(many_blocks()).collect();
    // Twelve at once, of any kind.
    for tensors in all.chunks(12) {
        let made = tensors.iter().map(|(_, t)| DeviceMatrix::upload(&device, &kernels, &mut upload, t).unwrap());
        let matrices: Vec<DeviceMatrix> = made.collect();
        let mut codes: Vec<CudaSlice<u8>> =
            tensors.iter().map(|(_, t)| stream.clone_htod(&vec![0xa5; t.n_rows() * t.n_cols() * 2]).unwrap()).collect();
        let mut jobs: Vec<_> = matrices.iter().zip(&mut codes).collect();
        kernels.decode_codes(&device, &mut jobs).unwrap();
        let mut values: Vec<CudaSlice<bf16>> =
            tensors.iter().map(|(_, t)| stream.alloc_zeros(t.n_rows() * t.n_cols()).unwrap()).collect();
        let mut jobs: Vec<_> = matrices.iter().zip(&mut values).collect();
        kernels.decode(&device, &mut jobs).unwrap();
        for ((what, t), (codes, values)) in tensors.iter().zip(codes.iter().zip(&values)) {
            let expected = code_bytes(t);
            let found = stream.clone_dtoh(codes).unwrap();
            assert_same(what, t.n_cols(), &found[..expected.len()], &expected);
            assert!(found[expected.len()..].iter().all(|&b| b == 0xa5), "{what}: bytes behind the matrix changed");
            let decoded = t.decode_codes(Cpu::Scalar).unwrap();
            let expected: Vec<u16> = (0..decoded.len())
                .map(|i| bf16::from_f32(code_value(t.format(), decoded.get(i)) * t.scale(i / t.n_cols())).to_bits())
                .collect();
            let found: Vec<u16> = stream.clone_dtoh(values).unwrap().iter().map(|v| v.to_bits()).collect();
            assert_same(what, t.n_cols(), &found, &expected);
        }
    }
}

#[test]
fn gathers_rows() {
    let Some((device, kernels, mut upload)) = gpu() else { return };
    let stream = device.stream();
    for (what, t) in vectors().into_iter().chain(tensors()) {
        let matrix = DeviceMatrix::upload(&device, &kernels, &mut upload, &t).unwrap();
        let (last, n_cols) = (t.n_rows() - 1, t.n_cols());
        let rows = [last as u32, 0, last as u32 / 2, u32::MAX];
        let mut out = stream.clone_htod(&vec![7f32; 4 * n_cols]).unwrap();
        let tokens = stream.clone_htod(&rows).unwrap();
        kernels.gather_rows(&device, &matrix, &tokens, 4, &mut out).unwrap();
        let mut expected = vec![7f32; 4 * n_cols];
        for (row, out) in rows[..3].iter().map(|&r| r as usize).zip(expected.chunks_mut(n_cols)) {
            t.decode_rows(Cpu::Scalar, row..row + 1, out).unwrap();
        }
        assert_same(&what, n_cols, &stream.clone_dtoh(&out).unwrap(), &expected);
    }
}

#[test]
fn products_agree_with_the_decoded_weights() {
    let Some((device, kernels, mut upload)) = gpu() else { return };
    let mut operand = kernels.operand(&device, 20_004).unwrap();
    let stream = device.stream();
    for (what, t) in vectors().into_iter().chain(tensors()).chain(many_blocks()).chain(many_columns()) {
        let matrix = DeviceMatrix::upload(&device, &kernels, &mut upload, &t).unwrap();
        let (n_rows, n_cols) = (t.n_rows(), t.n_cols());
        let bias = random(n_rows, 5);
        let bias_dev = stream.clone_htod(&bias).unwrap();
        let codes = t.decode_codes(Cpu::Scalar).unwrap();
        let value = |i: usize| f64::from(code_value(t.format(), codes.get(i)) * t.scale(i / n_cols));
        let values: Vec<f64> = (0..n_rows * n_cols).map(value).collect();
        for n_tokens in [1, 2, 8, 9, 16] {
            let x = random(n_tokens * n_cols, n_tokens as u64);
            let x_dev = stream.clone_htod(&x).unwrap();
            let mut outs: Vec<CudaSlice<f32>> =
                (0..2).map(|_| stream.clone_htod(&vec![f32::NAN; n_tokens * n_rows]).unwrap()).collect();
            let [plain, biased] = &mut outs[..] else { unreachable!() };
            let mut products = [
                Product { matrix: &matrix, bias: None, out: plain, adds: false, first: 0 },
                Product { matrix: &matrix, bias: Some(&bias_dev), out: biased, adds: false, first: 0 },
            ];
            kernels.product(&device, &mut operand, plain_input(&x_dev, n_tokens), &mut products).unwrap();
            let found: Vec<Vec<f32>> = outs.iter().map(|o| stream.clone_dtoh(o).unwrap()).collect();
            if t.format().is_integer() {
                let mut y = vec![0f32; n_rows * n_tokens];
                t.product(Cpu::Scalar, &Operand::new(&x, n_cols), 0..n_rows, &mut y).unwrap();
                let expected: Vec<f32> =
                    (0..n_tokens * n_rows).map(|i| y[i % n_rows * n_tokens + i / n_rows]).collect();
                assert_same(&format!("{what}, {n_tokens} tokens"), n_rows, &found[0], &expected);
            }
            // Of many rows some: there are as many in every row block.
            let all = found[0].iter().zip(&found[1]).enumerate();
            for (i, (&y, &with_bias)) in all.step_by(if n_rows > 1000 { 37 } else { 1 }) {
                let (token, row) = (i / n_rows, i % n_rows);
                let x = &x[token * n_cols..][..n_cols];
                let terms = values[row * n_cols..].iter().zip(x).map(|(w, &x)| w * f64::from(x));
                let (sum, all) = terms.fold((0.0, 0.0), |(s, a), v| (s + v, a + v.abs()));
                // Patched weights count as what stands in their place, too.
                let filler = f64::from(code_value(t.format(), t.params().unwrap().filler(t.format())) * t.scale(row));
                let patched = if t.sections().patches.is_empty() { 0.0 } else { filler.abs() * n_cols as f64 * 3.0 };
                let limit = match t.format() {
                    Format::Int8 | Format::Rate => 1e-3 * all,
                    _ => 2f64.powi(-16) * (all + patched),
                };
                assert!(
                    (f64::from(y) - sum).abs() <= limit,
                    "{what}, {n_tokens} tokens: row {row} of token {token} is {y}, expected {sum} within {limit:e}"
                );
                assert_eq!(with_bias, y + bias[row]);
            }
        }
    }
}

#[test]
fn a_token_with_an_element_that_is_no_number_has_no_products() {
    let Some((device, kernels, mut upload)) = gpu() else { return };
    let mut operand = kernels.operand(&device, 20_004).unwrap();
    let stream = device.stream();
    let integers = tensors().into_iter().chain(many_columns()).filter(|(_, t)| t.format().is_integer());
    for (what, t) in integers {
        let matrix = DeviceMatrix::upload(&device, &kernels, &mut upload, &t).unwrap();
        let (n_rows, n_cols) = (t.n_rows(), t.n_cols());
        let elements = [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY].into_iter().zip([0, 1, 2, 3]);
        for ((element, quarter), n_tokens) in elements.flat_map(|e| [1, 5, 16].map(|n| (e, n))) {
            let mut x = random(n_tokens * n_cols, 6);
            x[(n_tokens - 1) * n_cols + (n_cols - 1) * quarter / 3] = element;
            let x_dev = stream.clone_htod(&x).unwrap();
            let mut out = stream.clone_htod(&vec![0f32; n_tokens * n_rows]).unwrap();
            let products = &mut [Product { matrix: &matrix, bias: None, out: &mut out, adds: false, first: 0 }];
            kernels.product(&device, &mut operand, plain_input(&x_dev, n_tokens), products).unwrap();
            let mut y = vec![0f32; n_rows * n_tokens];
            t.product(Cpu::Scalar, &Operand::new(&x, n_cols), 0..n_rows, &mut y).unwrap();
            let numbers = |y: &f32| (!y.is_nan()).then_some(*y);
            let expected: Vec<_> =
                (0..n_tokens * n_rows).map(|i| numbers(&y[i % n_rows * n_tokens + i / n_rows])).collect();
            assert!(expected[(n_tokens - 1) * n_rows..].iter().all(Option::is_none));
            let found: Vec<_> = stream.clone_dtoh(&out).unwrap().iter().map(numbers).collect();
            assert_same(&format!("{what}, {n_tokens} tokens, {element}"), n_rows, &found, &expected);
        }
    }
}

#[test]
fn plain_and_encoded_bf16_make_the_same_products() {
    let Some((device, kernels, mut upload)) = gpu() else { return };
    let mut operand = kernels.operand(&device, 4096).unwrap();
    let stream = device.stream();
    // With few parts and many, so with patches everywhere and without.
    let params = |parts_per_symbol, table_bits, raw_bits, part_bits, bias| {
        Some(Params { parts_per_symbol, table_bits, raw_bits, part_bits, block_cols: 256, bias, trellis: false })
    };
    let all_params =
        [params(4, 12, 9, 3, 116 << 7), params(4, 10, 10, 2, 0x7a << 7), params(2, 13, 7, 5, 116 << 7), None];
    let (mut n_same, mut n_close) = (0, 0);
    for (n_rows, n_cols) in [(1, 1), (33, 31), (75, 1000), (2080, 4096), (5760, 1024), (4256, 2048)] {
        for params in all_params {
            let source = tensor(n_rows, n_cols, n_rows as u64);
            let options = EncodeOptions { format: Format::Bf16, params, ..Default::default() };
            let t = parse(encode_tensor(&source, &options).unwrap());
            let encoded = DeviceMatrix::upload(&device, &kernels, &mut upload, &t).unwrap();
            let stride = n_cols.next_multiple_of(PLAIN_ALIGN);
            let mut padded = vec![0; plain_len(n_rows, n_cols)];
            for (to, from) in padded.chunks_mut(stride).zip(source.data.chunks(2 * n_cols)) {
                to.iter_mut().zip(from.as_chunks().0).for_each(|(to, from)| *to = u16::from_le_bytes(*from));
            }
            let data = stream.clone_htod(&padded).unwrap();
            let plain = DeviceMatrix::plain(&kernels, data.device_ptr(stream).0, n_rows, n_cols).unwrap();
            let norm = stream.clone_htod(&random(n_cols, 8)).unwrap();
            let bias = stream.clone_htod(&random(n_rows, 5)).unwrap();
            for norm in [None, Some((&norm, 1e-5))] {
                let x = stream.clone_htod(&random(2 * n_cols, 7)).unwrap();
                let input = Activations { data: &x, first: 1, n_tokens: 1, norm };
                let found = [&plain, &encoded].map(|matrix| {
                    let new = || stream.clone_htod(&vec![f32::NAN; n_rows]).unwrap();
                    let (mut sums, mut gated, mut unused) = (new(), new(), new());
                    let product = |out, bias| Product { matrix, bias, out, first: 0, adds: false };
                    kernels.product(&device, &mut operand, input, &mut [product(&mut sums, Some(&bias))]).unwrap();
                    let pair = &mut [product(&mut gated, Some(&bias)), product(&mut unused, None)];
                    assert!(kernels.gated_product(&device, &mut operand, input, pair).unwrap());
                    [sums, gated].map(|out| stream.clone_dtoh(&out).unwrap())
                });
                let what = format!("{n_rows} × {n_cols}, norm {}, {params:?}", norm.is_some());
                let [[plain_sums, plain_gated], [sums, gated]] = found;
                // To the bit, but for the rows with patches: those are added after the sums of their groups.
                let n_patches = t.sections().patches.len() / 4;
                for (found, expected) in [(&sums, &plain_sums), (&gated, &plain_gated)] {
                    if n_patches == 0 {
                        assert_same(&what, n_rows, found, expected);
                    }
                    let pairs = || found.iter().zip(expected);
                    let n_different = pairs().filter(|(a, b)| a != b).count();
                    assert!(n_different <= n_patches, "{what}: {n_different} rows differ; {n_patches} patches");
                    let most = pairs().map(|(a, b)| (a - b).abs() / (1.0 + b.abs())).fold(0.0, f32::max);
                    assert!(most < 1e-5, "{what}: a row differs by {most}");
                }
                n_same += usize::from(n_patches == 0);
                n_close += usize::from(n_patches > 0);
            }
        }
    }
    assert!(n_same > 3 && n_close > 3, "{n_same} without patches, {n_close} with");
}

#[test]
fn matrices_of_different_heights_share_a_launch() {
    let Some((device, kernels, mut upload)) = gpu() else { return };
    let stream = device.stream();
    let mut operand = kernels.operand(&device, 1024).unwrap();
    let encode = |n_rows: usize, block_cols| {
        let params = Params {
            parts_per_symbol: 8,
            table_bits: 10,
            raw_bits: 7,
            part_bits: 1,
            block_cols,
            bias: 0,
            trellis: false,
        };
        let options = EncodeOptions { format: Format::Int8, params: Some(params), ..Default::default() };
        parse(encode_tensor(&tensor(n_rows, 1024, n_rows as u64), &options).unwrap())
    };
    // The second three are decoded to tiles before the activations are known.
    let sets = [([5760, 96, 33], 32), ([160, 96, 33], 64)];
    let sets = sets.map(|(heights, block_cols)| {
        let upload = |n| DeviceMatrix::upload(&device, &kernels, &mut upload, &encode(n, block_cols)).unwrap();
        (heights, heights.map(upload))
    });
    for ((heights, matrices), n_tokens) in sets.iter().flat_map(|set| [1, 5, 16].map(|n| (set, n))) {
        let x = stream.clone_htod(&random(n_tokens * 1024, 3)).unwrap();
        let mut outs = heights.map(|n| stream.alloc_zeros::<f32>(n_tokens * n).unwrap());
        let mut alone = heights.map(|n| stream.alloc_zeros::<f32>(n_tokens * n).unwrap());
        let product = |(matrix, out)| Product { matrix, bias: None, out, adds: false, first: 0 };
        let mut together: Vec<_> = matrices.iter().zip(&mut outs).map(product).collect();
        kernels.product(&device, &mut operand, plain_input(&x, n_tokens), &mut together).unwrap();
        for pair in matrices.iter().zip(&mut alone) {
            kernels.product(&device, &mut operand, plain_input(&x, n_tokens), &mut [product(pair)]).unwrap();
        }
        for (&n_rows, (together, alone)) in heights.iter().zip(outs.iter().zip(&alone)) {
            let [together, alone] = [together, alone].map(|out| stream.clone_dtoh(out).unwrap());
            assert_same(&format!("{n_rows} rows, {n_tokens} tokens"), n_rows, &together, &alone);
        }
    }
}

fn plain_input(data: &CudaSlice<f32>, n_tokens: usize) -> Activations<'_> {
    Activations { data, first: 0, n_tokens, norm: None }
}

#[test]
fn norms_gates_and_sums_are_part_of_products() {
    const EPS: f32 = 1e-5;
    let Some((device, kernels, mut upload)) = gpu() else { return };
    let mut operand = kernels.operand(&device, 4096).unwrap();
    let stream = device.stream();
    for (what, t) in tensors().into_iter().chain(many_blocks()) {
        // Its partner has the same shape and kernels, and other parameters where the encoder chooses them.
        let partner = tensor_like(&t);
        let matrices = [&t, &partner].map(|t| DeviceMatrix::upload(&device, &kernels, &mut upload, t).unwrap());
        let (n_rows, n_cols) = (t.n_rows(), t.n_cols());
        let values = [&t, &partner].map(|t| {
            let codes = t.decode_codes(Cpu::Scalar).unwrap();
            let value = |i| f64::from(code_value(t.format(), codes.get(i)) * t.scale(i / n_cols));
            (0..n_rows * n_cols).map(value).collect::<Vec<f64>>()
        });
        for n_tokens in [1, 3] {
            // The tokens before the last are not asked for.
            let x = random((n_tokens + 1) * n_cols, 11);
            let weight = random(n_cols, 12);
            let (x_dev, weight_dev) = (stream.clone_htod(&x).unwrap(), stream.clone_htod(&weight).unwrap());
            let norm = (n_tokens == 1).then_some((&weight_dev, EPS));
            let input = Activations { data: &x_dev, first: 1, n_tokens, norm };
            let row = |token: usize| {
                let x = x[(token + 1) * n_cols..][..n_cols].iter().map(|&v| f64::from(v));
                let mean = x.clone().map(|v| v * v).sum::<f64>() / n_cols as f64;
                let root = (mean + f64::from(EPS)).sqrt();
                let normed = x.clone().zip(&weight).map(|(v, &w)| v / root * f64::from(w));
                if norm.is_some() { normed.collect::<Vec<_>>() } else { x.collect() }
            };
            // The product, and what it may be off by.
            let expected = |which: usize, i: usize| {
                let weights = &values[which][i % n_rows * n_cols..][..n_cols];
                let terms = weights.iter().zip(row(i / n_rows)).map(|(w, x)| w * x);
                terms.fold((0.0, 0.0), |(sum, all), v| (sum + v, all + 1e-3 * v.abs()))
            };
            let before = random(n_tokens * n_rows, 13);
            let mut sums = stream.clone_htod(&before).unwrap();
            let products = &mut [Product { matrix: &matrices[0], bias: None, out: &mut sums, adds: true, first: 0 }];
            kernels.product(&device, &mut operand, input, products).unwrap();
            let sums = stream.clone_dtoh(&sums).unwrap();
            let biases = [14, 15].map(|seed| random(n_rows, seed));
            let biases_dev = [0, 1].map(|i| stream.clone_htod(&biases[i]).unwrap());
            let [mut gated, mut unused] =
                [(); 2].map(|()| stream.clone_htod(&vec![f32::NAN; n_tokens * n_rows]).unwrap());
            let product = |i: usize, out| Product {
                matrix: &matrices[i],
                bias: Some(&biases_dev[i]),
                out,
                adds: false,
                first: 0,
            };
            let pair = &mut [product(0, &mut gated), product(1, &mut unused)];
            let together = kernels.gated_product(&device, &mut operand, input, pair).unwrap();
            let fit = matrices.iter().all(|m| m.table_bytes() <= 8 << 13);
            assert_eq!(together, fit && Arc::ptr_eq(&matrices[0].kernels, &matrices[1].kernels), "{what}");
            let gated = stream.clone_dtoh(&gated).unwrap();
            for i in (0..n_tokens * n_rows).step_by(7) {
                let ((a, a_off), (b, b_off)) = (expected(0, i), expected(1, i));
                let (found, wanted) = (f64::from(sums[i]), f64::from(before[i]) + a);
                assert!((found - wanted).abs() <= a_off + 1e-6, "{what}: sum {i} is {found}, expected {wanted}");
                if !together {
                    continue;
                }
                let [a, b] = [a + f64::from(biases[0][i % n_rows]), b + f64::from(biases[1][i % n_rows])];
                let silu = |v: f64| v / (1.0 + (-v).exp());
                let (found, wanted) = (f64::from(gated[i]), silu(a) * b);
                let off = 1.2 * a_off * b.abs() + silu(a).abs() * b_off + a_off * b_off + 1e-6;
                assert!((found - wanted).abs() <= off, "{what}: gated {i} is {found}, expected {wanted} ± {off}");
            }
        }
    }
}

/// Another tensor of the same format and shape.
fn tensor_like(t: &EncodedTensor) -> EncodedTensor {
    let source = tensor(t.n_rows(), t.n_cols(), 99);
    let options = EncodeOptions { format: t.format(), prefer: Prefer::Speed, step: Some(0.02), ..Default::default() };
    parse(encode_tensor(&source, &options).unwrap())
}

/// Apart from the next, for the sanitizer takes its time.
#[test]
fn a_corrupt_vector_stays_in_bounds() {
    corrupt(vectors());
    // The same for what no vector has.
    let Some((device, kernels, _)) = gpu() else { return };
    let (n_rows, n_cols) = (75, 1000);
    let stream = device.stream();
    let data = stream.alloc_zeros::<bf16>(plain_len(n_rows, n_cols)).unwrap();
    let matrix = DeviceMatrix::plain(&kernels, data.device_ptr(stream).0, n_rows, n_cols).unwrap();
    let x = stream.clone_htod(&random(n_cols, 1)).unwrap();
    let mut out = stream.clone_htod(&vec![f32::NAN; n_rows]).unwrap();
    let mut products = [Product { matrix: &matrix, bias: None, out: &mut out, first: 0, adds: false }];
    let operand = &mut kernels.operand(&device, 0).unwrap();
    kernels.product(&device, operand, plain_input(&x, 1), &mut products).unwrap();
    assert_eq!(stream.clone_dtoh(&out).unwrap(), [0.0; 75]);
}

#[test]
fn a_corrupt_tensor_stays_in_bounds() {
    corrupt(tensors());
}

/// Decodes and multiplies tensors whose payload is noise.
fn corrupt(tensors: Vec<(String, EncodedTensor)>) {
    let Some((device, kernels, mut upload)) = gpu() else { return };
    let stream = device.stream();
    let mut operand = kernels.operand(&device, 4096).unwrap();
    for (what, t) in tensors {
        let mut bytes = t.bytes().to_vec();
        let noise = random(bytes.len(), 9);
        for at in t.sections().raw.start..t.sections().stream.end {
            bytes[at] = noise[at].to_bits() as u8;
        }
        // Between sections there are zeros.
        bytes[t.sections().raw.end..t.sections().stream.start].fill(0);
        let t = EncodedTensor::parse(bytes.into(), Checks::None).unwrap_or_else(|e| panic!("{what}: {e}"));
        let matrix = DeviceMatrix::upload(&device, &kernels, &mut upload, &t).unwrap();
        let mut values = stream.alloc_zeros(t.n_rows() * t.n_cols()).unwrap();
        kernels.decode(&device, &mut [(&matrix, &mut values)]).unwrap();
        for n_tokens in [1, 3, 16] {
            let x = stream.clone_htod(&random(n_tokens * t.n_cols(), 1)).unwrap();
            let mut out = stream.alloc_zeros(n_tokens * t.n_rows()).unwrap();
            let mut products = [Product { matrix: &matrix, bias: None, out: &mut out, adds: false, first: 0 }];
            kernels.product(&device, &mut operand, plain_input(&x, n_tokens), &mut products).unwrap();
        }
        device.synchronize().unwrap();
    }
}
