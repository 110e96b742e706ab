//! Single operations on a GPU, at the shapes of models' matrices.

use crate::bench::workload::{Form, Workload, encode_options};
use crate::bench::{GpuArgs, Result};
use codecllm_codec::block::{BLOCK_ROWS, Params};
use codecllm_codec::encoded::{Checks, EncodeOptions};
use codecllm_codec::quantize::rms;
use codecllm_codec::{Coder, EncodedTensor, Format, Prefer, Tensor, encode_tensor};
use codecllm_engine::cuda::bench::{Bench, Decoded, DenseProduct, NvcompCoder, Operation};
use serde::Serialize;

/// Rows and columns of matrices in Llama 3 70B and 8B, and TinyLlama.
const SHAPES: [(usize, usize); 7] =
    [(28672, 8192), (14336, 4096), (4096, 14336), (4096, 4096), (5632, 2048), (2048, 5632), (2048, 2048)];
const BATCHES: [u8; 3] = [1, 4, 16];
const RATE_BITS: f64 = 4.5;
/// Weights on which the step for a rate is searched.
const SEARCH_WEIGHTS: usize = 1 << 21;

/// What is measured, and how.
pub struct Options<'a> {
    /// None: [`SHAPES`].
    pub shapes: &'a [(usize, usize)],
    pub forms: &'a [Form],
    pub gpu: &'a GpuArgs,
    pub seconds: f64,
    pub rounds: usize,
    pub seed: u64,
}

#[derive(Serialize)]
pub struct Report {
    seed: u64,
    rounds: usize,
    seconds: f64,
    /// What reading memory reaches.
    read_bytes_per_s: f64,
    results: Vec<Measurement>,
    /// What nvCOMP could not do.
    problems: Vec<String>,
}

/// One operation. Times are medians over the rounds.
#[derive(Serialize)]
struct Measurement {
    n_rows: usize,
    n_cols: usize,
    operation: &'static str,
    /// Whose operation it is.
    name: String,
    /// What the weights are.
    format: String,
    /// Of a product.
    #[serde(skip_serializing_if = "Option::is_none")]
    tokens: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    params: Option<Params>,
    /// Everything counted.
    bits_per_weight: f64,
    elapsed_s: f64,
    /// Largest less smallest round, over the median.
    spread: f64,
    weights_per_s: f64,
    /// Of weights that are read, in the form at hand, and of a decoded matrix that is written.
    bytes_per_s: f64,
    /// `bytes_per_s` over what reading memory reaches.
    ratio_read: f64,
    /// cuBLAS's time for as many tokens over this one's.
    #[serde(skip_serializing_if = "Option::is_none")]
    ratio_cublas: Option<f64>,
    /// False: calls one after another, as the library cannot be recorded.
    is_graph: bool,
}

/// An operation on its way to be measured.
struct Contender<'b> {
    operation: Operation<'b>,
    what: &'static str,
    name: &'static str,
    format: String,
    tokens: Option<usize>,
    params: Option<Params>,
    bits_per_weight: f64,
    rounds: Vec<f64>,
}

const PRODUCT: &str = "product";
const CUBLAS: &str = "cublas";

/// Opens the GPU for matrices of these shapes.
pub fn open(index: usize, options: &Options<'_>) -> Result<Bench> {
    let max_cols = shapes(options).iter().map(|shape| shape.1).max().unwrap_or(1);
    Ok(Bench::open(index, max_cols, options.seed)?)
}

fn shapes<'a>(options: &Options<'a>) -> &'a [(usize, usize)] {
    if options.shapes.is_empty() { &SHAPES } else { options.shapes }
}

/// Compares every operation with the host's, and measures it. With `shows`, prints each shape's table once it is complete.
pub fn measure(bench: &Bench, options: &Options<'_>, shows: bool) -> Result<Report> {
    let mut read = vec![Contender::new(bench.read_memory()?, "read", "", String::new(), 0.0)];
    time(&mut read, options)?;
    let mut report = Report {
        seed: options.seed,
        rounds: options.rounds,
        seconds: options.seconds,
        read_bytes_per_s: read[0].operation.bytes as f64 / median(&read[0].rounds),
        results: Vec::new(),
        problems: Vec::new(),
    };
    drop(read);
    if shows {
        println!("memory read: {:.0} GB/s; {} rounds", report.read_bytes_per_s / 1e9, report.rounds);
    }
    for &(n_rows, n_cols) in shapes(options) {
        let (n_results, n_problems) = (report.results.len(), report.problems.len());
        // All contenders of a shape take turns.
        let mut contenders = contenders(bench, options, n_rows, n_cols, &mut report.problems)?;
        eprintln!("{n_rows}x{n_cols}: measuring {} operations", contenders.len());
        time(&mut contenders, options)?;
        let cublas = |tokens: Option<usize>| {
            let peers = contenders.iter().filter(|c| c.name == CUBLAS && c.tokens == tokens);
            peers.map(|c| median(&c.rounds)).min_by(f64::total_cmp).filter(|_| tokens.is_some())
        };
        for c in &contenders {
            let elapsed_s = median(&c.rounds);
            let (least, most) = (c.rounds[0], c.rounds[c.rounds.len() - 1]);
            let bytes_per_s = c.operation.bytes as f64 / elapsed_s;
            report.results.push(Measurement {
                n_rows,
                n_cols,
                operation: c.what,
                name: c.name.into(),
                format: c.format.clone(),
                tokens: c.tokens,
                params: c.params,
                bits_per_weight: c.bits_per_weight,
                elapsed_s,
                spread: (most - least) / elapsed_s,
                weights_per_s: (n_rows * n_cols) as f64 / elapsed_s,
                bytes_per_s,
                ratio_read: bytes_per_s / report.read_bytes_per_s,
                ratio_cublas: cublas(c.tokens).map(|cublas| cublas / elapsed_s),
                is_graph: c.operation.is_graph(),
            });
        }
        if shows {
            print_table(&report.results[n_results..]);
            for problem in &report.problems[n_problems..] {
                println!("not measured: {problem}");
            }
        }
    }
    Ok(report)
}

fn contenders<'b>(
    bench: &'b Bench,
    options: &Options<'_>,
    n_rows: usize,
    n_cols: usize,
    problems: &mut Vec<String>,
) -> Result<Vec<Contender<'b>>> {
    let batches = if options.gpu.batch.is_empty() { &BATCHES } else { &options.gpu.batch[..] };
    let batches = || batches.iter().map(|&n| usize::from(n));
    eprintln!("{n_rows}x{n_cols}: drawing, encoding and checking");
    let workload = Workload::of_shape(n_rows, n_cols, options.seed, 0);
    let source = workload.matrices[0].tensor();
    let mut contenders = Vec::new();
    let dense = bench.dense(&source)?;
    for n_tokens in batches() {
        for (by, name, format) in [
            (DenseProduct::CublasF32, CUBLAS, "bf16 to f32"),
            (DenseProduct::CublasBf16, CUBLAS, "bf16 to bf16"),
            (DenseProduct::Engine, "plain", "bf16"),
        ] {
            if let Some(operation) = bench.multiply_dense(&dense, by, n_tokens)? {
                let contender = Contender::new(operation, PRODUCT, name, format.into(), 16.0);
                contenders.push(Contender { tokens: Some(n_tokens), ..contender });
            }
        }
    }
    for &form in options.forms {
        let encode = encode_options_of(&source, form, options)?;
        let tensor = encode_parsed(&source, &encode)?;
        let bits = 8.0 * tensor.bytes().len() as f64 / (n_rows * n_cols) as f64;
        let params = tensor.params().copied();
        let encoded = bench.encoded(tensor)?;
        let ours = |operation, what| Contender {
            params,
            ..Contender::new(operation, what, "encoded", form.to_string(), bits)
        };
        contenders.push(ours(bench.decode(&encoded, Decoded::Codes)?, "decode to codes"));
        contenders.push(ours(bench.decode(&encoded, Decoded::Values)?, "decode to bf16"));
        for n_tokens in batches() {
            let contender = ours(bench.multiply(&encoded, n_tokens)?, PRODUCT);
            contenders.push(Contender { tokens: Some(n_tokens), ..contender });
        }
        // Coder `zstd` has no trellis.
        if bench.nvcomp().is_ok() && !form.trellis {
            let zstd = EncodeOptions { coder: Coder::Zstd, params: None, ..encode };
            let zstd = encode_parsed(&source, &zstd)?;
            for (coder, name) in [(NvcompCoder::Zstd, "nvcomp zstd"), (NvcompCoder::Ans, "nvcomp ans")] {
                match bench.nvcomp_decode(&zstd, coder) {
                    Ok(None) => {}
                    Ok(Some((operation, bytes))) => {
                        // With the scales, as ours.
                        let bytes = bytes + zstd.sizes().scales;
                        let bits = 8.0 * bytes as f64 / (n_rows * n_cols) as f64;
                        contenders.push(Contender::new(operation, "decode to codes", name, form.to_string(), bits));
                    }
                    // The others are measured without it.
                    Err(e) => {
                        let problem = format!("{n_rows}x{n_cols} {form}, {name}: {e}");
                        eprintln!("{problem}");
                        problems.push(problem);
                    }
                }
            }
        }
    }
    Ok(contenders)
}

impl<'b> Contender<'b> {
    fn new(
        operation: Operation<'b>,
        what: &'static str,
        name: &'static str,
        format: String,
        bits_per_weight: f64,
    ) -> Self {
        Self { operation, what, name, format, tokens: None, params: None, bits_per_weight, rounds: Vec::new() }
    }
}

/// Measures all, in turns, and sorts each one's rounds. The first round, in which the GPU raises its clocks, does not count.
fn time(contenders: &mut [Contender<'_>], options: &Options<'_>) -> Result<()> {
    for round in 0..=options.rounds {
        for c in &mut *contenders {
            let elapsed_s = c.operation.time(options.seconds)?;
            if round > 0 {
                c.rounds.push(elapsed_s);
            }
        }
    }
    contenders.iter_mut().for_each(|c| c.rounds.sort_by(f64::total_cmp));
    Ok(())
}

/// Of values in order.
fn median(values: &[f64]) -> f64 {
    values[values.len() / 2]
}

fn encode_parsed(source: &Tensor, options: &EncodeOptions) -> Result<EncodedTensor> {
    Ok(EncodedTensor::parse(encode_tensor(source, options)?.into(), Checks::Full)?)
}

fn encode_options_of(source: &Tensor, form: Form, options: &Options<'_>) -> Result<EncodeOptions> {
    let prefer = options.gpu.prefer.unwrap_or(Prefer::Speed);
    let params = options.gpu.params.map(|params| Params { trellis: form.trellis, ..params });
    let mut encode = EncodeOptions { params, ..encode_options(form, prefer, source)? };
    if form.format == Format::Rate {
        encode = at_bits(source, options.gpu.bits.unwrap_or(RATE_BITS), encode)?;
    }
    Ok(encode)
}

/// The options with the step, and the parameters, at which the first rows of a matrix take so many bits a weight.
fn at_bits(source: &Tensor, bits: f64, encode: EncodeOptions) -> Result<EncodeOptions> {
    let (n_rows, n_cols) = (source.shape[0], source.shape[1]);
    // Whole row blocks: a part of one takes as many raw bits.
    let n_rows = n_rows.min(SEARCH_WEIGHTS.div_ceil(n_cols).next_multiple_of(BLOCK_ROWS));
    let data = source.data.slice(..2 * n_rows * n_cols);
    let sample = Tensor { shape: vec![n_rows, n_cols], data, ..source.clone() };
    let rms = rms(&sample)?;
    let sized = |encode: &EncodeOptions| -> Result<f64> {
        Ok(8.0 * encode_tensor(&sample, encode)?.len() as f64 / (n_rows * n_cols) as f64)
    };
    // Logarithms of the step over the root mean square: bits fall as they rise. From above the bits and from below.
    let search = |encode: &EncodeOptions| -> Result<[EncodeOptions; 2]> {
        let at = |log: f64| EncodeOptions { step: Some((rms * log.exp2()) as f32), ..*encode };
        let (mut fine, mut coarse) = (-6.0, 3.0);
        for _ in 0..10 {
            let middle = (fine + coarse) / 2.0;
            if sized(&at(middle))? > bits { fine = middle } else { coarse = middle }
        }
        Ok([at(fine), at(coarse)])
    };
    let around = search(&encode)?;
    if encode.params.is_some() {
        return Ok(around[1]);
    }
    // The encoder's choice changes at some steps, and the bits with it by more than a little. So it is made once, on either side.
    let chosen = |side: &EncodeOptions| Ok(encode_parsed(&sample, side)?.params().copied());
    let mut choices = around.iter().map(chosen).collect::<Result<Vec<_>>>()?;
    choices.dedup();
    let mut best = (f64::INFINITY, encode);
    for params in choices {
        let [_, found] = search(&EncodeOptions { params, ..encode })?;
        let off = (sized(&found)? - bits).abs();
        if off < best.0 {
            best = (off, found);
        }
    }
    Ok(best.1)
}

/// Prints what was measured at one shape.
fn print_table(results: &[Measurement]) {
    for (i, m) in results.iter().enumerate() {
        if i == 0 {
            println!(
                "\n{:<24} {:<13} {:<16} {:>6} {:>11} {:>9} {:>7} {:>11} {:>8} {:>9}",
                format!("{} x {}", m.n_rows, m.n_cols),
                "",
                "",
                "tokens",
                "bits/weight",
                "us",
                "spread",
                "T weights/s",
                "of read",
                "of cuBLAS"
            );
        }
        println!(
            "{:<24} {:<13} {:<16} {:>6} {:>11.3} {:>9.2} {:>5.0} % {:>11.3} {:>8.3} {:>9}",
            if m.is_graph { m.name.clone() } else { format!("{} (no graph)", m.name) },
            m.format,
            m.operation,
            m.tokens.map_or(String::new(), |n| n.to_string()),
            m.bits_per_weight,
            1e6 * m.elapsed_s,
            100.0 * m.spread,
            m.weights_per_s / 1e12,
            m.ratio_read,
            m.ratio_cublas.map_or(String::new(), |r| format!("{r:.3}"))
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_step_makes_the_bits_that_are_asked_for() {
        let source = Workload::of_shape(512, 2048, 1, 0).matrices[0].tensor();
        let forms = ["rate", "rate-trellis"].map(|name| name.parse::<Form>().unwrap());
        for (form, bits) in forms.into_iter().flat_map(|form| [3.0, 4.5, 6.0].map(|bits| (form, bits))) {
            let encode = encode_options(form, Prefer::Speed, &source).unwrap();
            let bytes = encode_tensor(&source, &at_bits(&source, bits, encode).unwrap()).unwrap();
            let found = 8.0 * bytes.len() as f64 / (512.0 * 2048.0);
            assert!((found - bits).abs() < 0.05, "{form}: {found} for {bits}");
        }
    }

    #[test]
    fn a_sample_of_long_rows_tells_the_bits_of_all() {
        let source = Workload::of_shape(512, 14336, 1, 0).matrices[0].tensor();
        let encode = encode_options(Format::Rate.into(), Prefer::Speed, &source).unwrap();
        let bytes = encode_tensor(&source, &at_bits(&source, 4.5, encode).unwrap()).unwrap();
        let found = 8.0 * bytes.len() as f64 / (512.0 * 14336.0);
        assert!((found - 4.5).abs() < 0.05, "{found}");
    }
}
