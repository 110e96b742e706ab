//! The CPU's bench: the contenders' data, and their proof.

mod measure;

use super::peers::{Int8Matrix, Int8Operand};
use super::workload::{Form, Matrix, Task, Workload, encode_options, normal};
use super::{Args, Error, Result};
use crate::output::CliResult;
use bytes::Bytes;
use codecllm_codec::block::BLOCK_ROWS;
use codecllm_codec::encoded::{Checks, CodesMut, EncodedTensor, encode_tensor};
use codecllm_codec::product::Operand;
use codecllm_codec::quantize::{Codes, Scales, quantize, scale_of};
use codecllm_codec::{Cpu, Format, Prefer, ScaleMode};
use codecllm_engine::cpu;
use codecllm_engine::weights::DenseType;
use half::bf16;
use measure::Measurement;
use rand::SeedableRng;
use rand::rngs::SmallRng;
use rayon::prelude::*;
use serde::Serialize;
use std::collections::{BTreeSet, HashMap};
use std::fmt::Display;
use std::ops::Range;
use std::process::ExitCode;

/// Bytes of a Zstandard chunk and the level, as the codec's coder `zstd` has them.
const ZSTD_CHUNK_BYTES: usize = 1 << 16;
const ZSTD_LEVEL: i32 = 9;
/// Codes that zstd is measured on: enough to leave the caches, few enough to compress quickly.
const ZSTD_MAX_CODES: usize = 48 << 20;
/// The largest error of a product that passes, relative to a row's norm times the activations' rms. Activations of 16
/// bits make errors of about 3e-5, and of 2e-4 in the worst of many rows.
const PRODUCT_TOLERANCE: f64 = 5e-4;
/// Rows of a call to a decoder: their codes stay in the caches, and a decoder may work on two row blocks at once.
const DECODE_ROWS: usize = 2 * BLOCK_ROWS;
/// Weights of a matrix that are verified.
const VERIFY_MAX_WEIGHTS: usize = 1 << 24;
/// Seconds of a measurement, in each round, where nothing is said.
const SECONDS: f64 = 0.3;

#[derive(Serialize)]
struct Report {
    workload: String,
    weights_per_pass: usize,
    copies: usize,
    cpu: &'static str,
    threads: usize,
    checks: Vec<String>,
    results: Vec<Measurement>,
}

/// Runs the command on the CPU.
pub fn run(args: &Args, mut forms: Vec<Form>, cpu: Cpu) -> CliResult {
    let n_cores = std::thread::available_parallelism().map_or(1, usize::from);
    let n_threads = args.threads.unwrap_or(n_cores).max(1);
    if forms.is_empty() {
        forms = [Format::Bf16, Format::Fp8, Format::Int8].map(Form::from).into();
    }
    let (shape, model_shape) = match (&args.shape[..], &args.model_shape[..]) {
        ([], []) => (None, None),
        (&[shape], []) => (Some(shape), None),
        ([], &[model_shape]) => (None, Some(model_shape)),
        _ => return Err("the CPU measures one thing at a time: one --shape or one --model-shape".into()),
    };

    let cache_bytes = (4 * last_level_cache_bytes()).max(256 << 20);
    // BF16 and plain INT8 always, and what each format takes at most.
    let encoded: f64 = forms.iter().map(|f| if f.format.is_lossless() { 1.5 } else { 1.0 }).sum();
    eprintln!("drawing or reading the weights");
    let workload = match (&args.model, model_shape, shape) {
        (Some(dir), ..) => Workload::of_checkpoint(dir, cache_bytes)?,
        (_, Some(shape), _) => Workload::of_model_shape(shape, args.seed, 3.0 + encoded, cache_bytes)?,
        (.., shape) => {
            let (n_rows, n_cols) = shape.unwrap_or((4096, 4096));
            Workload::of_shape(n_rows, n_cols, args.seed, cache_bytes)
        }
    };
    eprintln!("{}", workload.title);
    let bench = Bench::new(workload, &forms, cpu, n_threads, args.seed)?;
    let checks = bench.verify()?;
    let results = bench.measure(args.seconds.unwrap_or(SECONDS), args.rounds, 4 * cache_bytes)?;
    let report = Report {
        workload: bench.workload.title.clone(),
        weights_per_pass: bench.workload.weights_per_pass(),
        copies: bench.workload.n_copies,
        cpu: cpu.name(),
        threads: n_threads,
        checks,
        results,
    };
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print_table(&report);
    }
    Ok(ExitCode::SUCCESS)
}

/// The largest cache of the first core, as Linux names it; 32 MiB where it does not.
fn last_level_cache_bytes() -> usize {
    let size = |i: usize| {
        let text = std::fs::read_to_string(format!("/sys/devices/system/cpu/cpu0/cache/index{i}/size")).ok()?;
        text.trim().strip_suffix('K')?.parse::<usize>().ok().map(|kib| kib << 10)
    };
    (0..8).filter_map(size).max().unwrap_or(32 << 20)
}

/// All matrices in one format, in every copy: indexed as in [`Task::matrix`].
struct Encoded {
    form: Form,
    matrices: Vec<EncodedTensor>,
    bits_per_weight: f64,
}

/// The contenders' data.
struct Bench {
    workload: Workload,
    /// Of the products.
    level: Cpu,
    n_threads: usize,
    /// BF16, plain INT8 and the encoded formats: indexed as in [`Task::matrix`].
    bf16: Vec<cpu::Matrix>,
    int8: Vec<Int8Matrix>,
    encoded: Vec<Encoded>,
    /// Zstandard frames of INT8 codes of the first matrices, and how many codes each holds.
    zstd: Vec<(Vec<u8>, usize)>,
    /// Activations by width: as they are, and as each product takes them.
    operands: HashMap<usize, Activations>,
}

struct Activations {
    operand: Operand,
    int8: Int8Operand,
}

/// A thread's own room, kept from task to task, so that nothing is allocated while the clock runs.
#[derive(Default)]
struct Scratch {
    y: Vec<f32>,
    codes: Vec<u8>,
    wide_codes: Vec<u16>,
}

/// What one thread does with some rows of a matrix.
type Work<'a> = Box<dyn Fn(&Task, &mut Scratch) -> Result<()> + Sync + 'a>;

impl Bench {
    /// Encodes the matrices in every format and copies each form as often as the workload says.
    fn new(workload: Workload, forms: &[Form], level: Cpu, n_threads: usize, seed: u64) -> Result<Self> {
        let n_copies = workload.n_copies;
        let mut int8 = Vec::new();
        let mut zstd = Vec::new();
        let mut zstd_codes = 0;
        eprintln!("quantizing to plain INT8");
        for matrix in &workload.matrices {
            let tensor = matrix.tensor();
            let quantized =
                quantize(&tensor, Format::Int8, ScaleMode::Channel).map_err(|e| e.in_tensor(&matrix.name))?;
            let Codes::U8(codes) = &quantized.codes else { unreachable!("INT8 codes are bytes") };
            let scales = (0..matrix.n_rows).map(|row| match &quantized.scales {
                Scales::Absmax(absmax) => scale_of(Format::Int8, bf16::from_bits(absmax[row]).to_f32()),
                Scales::Channel(scales) => scales[row],
                Scales::Tensor(scale) => *scale,
                Scales::None => 1.0,
            });
            int8.push(Int8Matrix::new(codes, matrix.n_cols, scales.collect()));
            if zstd_codes < ZSTD_MAX_CODES {
                let codes = &codes[..codes.len().min(ZSTD_MAX_CODES - zstd_codes)];
                zstd_codes += codes.len();
                zstd.extend(zstd_frames(codes)?);
            }
        }
        let mut encoded = Vec::new();
        for &form in forms {
            eprintln!("encoding {form}");
            let encode = |m: &Matrix| -> Result<EncodedTensor> {
                let tensor = m.tensor();
                let options = encode_options(form, Prefer::Balanced, &tensor)?;
                let data = encode_tensor(&tensor, &options).map_err(|e| e.in_tensor(&m.name))?;
                Ok(EncodedTensor::parse(data.into(), Checks::Full).map_err(|e| e.in_tensor(&m.name))?)
            };
            let first = workload.matrices.iter().map(encode).collect::<Result<Vec<_>>>()?;
            let bytes: usize = first.iter().map(|e| e.bytes().len()).sum();
            let n_weights: usize = workload.matrices.iter().map(Matrix::n_weights).sum();
            let matrices = copies(first, n_copies, |_, e| {
                let data = Bytes::copy_from_slice(e.bytes());
                EncodedTensor::parse(data, Checks::None).expect("a copy of a valid tensor")
            });
            encoded.push(Encoded { form, matrices, bits_per_weight: 8.0 * bytes as f64 / n_weights as f64 });
        }

        let mut rng = SmallRng::seed_from_u64(seed);
        let operands = workload.matrices.iter().map(|m| m.n_cols).collect::<BTreeSet<_>>().into_iter().map(|n_cols| {
            let x: Vec<f32> = (0..n_cols).map(|_| normal(&mut rng)).collect();
            (n_cols, Activations { int8: Int8Operand::new(&x), operand: Operand::new(&x, n_cols) })
        });
        Ok(Self {
            operands: operands.collect(),
            bf16: copies(
                workload.matrices.iter().map(|m| plain_bf16(m, m.data.clone())).collect(),
                n_copies,
                |i, _| {
                    let matrix = &workload.matrices[i];
                    plain_bf16(matrix, Bytes::copy_from_slice(&matrix.data))
                },
            ),
            int8: copies(int8, n_copies, |_, matrix| matrix.clone()),
            encoded,
            zstd,
            workload,
            level,
            n_threads,
        })
    }

    fn matrix(&self, task: &Task) -> &Matrix {
        &self.workload.matrices[task.matrix % self.workload.matrices.len()]
    }

    fn activations(&self, task: &Task) -> &Activations {
        &self.operands[&self.matrix(task).n_cols]
    }

    fn matvec_bf16(&self) -> Work<'_> {
        Box::new(move |task, scratch| {
            let x = &self.activations(task).operand;
            let y = room(&mut scratch.y, task.rows.len());
            Ok(self.bf16[task.matrix].matvec(self.level, x, task.rows.clone(), y)?)
        })
    }

    fn matvec_int8(&self) -> Work<'_> {
        Box::new(move |task, scratch| {
            let x = &self.activations(task).int8;
            self.int8[task.matrix].product(self.level, x, task.rows.clone(), room(&mut scratch.y, task.rows.len()));
            Ok(())
        })
    }

    fn matvec_encoded<'a>(&'a self, encoded: &'a Encoded) -> Work<'a> {
        Box::new(move |task, scratch| {
            let x = &self.activations(task).operand;
            let y = room(&mut scratch.y, task.rows.len());
            Ok(encoded.matrices[task.matrix].product(self.level, x, task.rows.clone(), y)?)
        })
    }

    fn decode<'a>(&'a self, encoded: &'a Encoded, cpu: Cpu) -> Work<'a> {
        Box::new(move |task, scratch| {
            let tensor = &encoded.matrices[task.matrix];
            for row in task.rows.clone().step_by(DECODE_ROWS) {
                let rows = row..task.rows.end.min(row + DECODE_ROWS);
                let n_codes = rows.len() * tensor.n_cols();
                let codes = if encoded.form.format == Format::Bf16 {
                    CodesMut::U16(room(&mut scratch.wide_codes, n_codes))
                } else {
                    CodesMut::U8(room(&mut scratch.codes, n_codes))
                };
                tensor.decode_codes_into(cpu, rows, codes)?;
            }
            Ok(())
        })
    }

    /// Rows of matrix `m` that are verified: all, or what keeps the slow reference within seconds.
    fn verified_rows(&self, m: usize) -> Range<usize> {
        let Matrix { n_rows, n_cols, .. } = self.workload.matrices[m];
        0..n_rows.min(VERIFY_MAX_WEIGHTS.div_ceil(n_cols).next_multiple_of(BLOCK_ROWS))
    }

    /// Compares every decoder and every product with its reference, on the first matrix of each shape. Returns what was
    /// proven, in words.
    fn verify(&self) -> Result<Vec<String>> {
        eprintln!("verifying");
        let shapes = self.workload.distinct_shapes();
        let mut checks = Vec::new();
        let levels = Cpu::available().map(Cpu::name).collect::<Vec<_>>().join(", ");
        for encoded in &self.encoded {
            for &m in &shapes {
                let tensor = &encoded.matrices[m];
                let rows = self.verified_rows(m);
                let expected = decode(tensor, Cpu::Scalar, rows.clone())?;
                for cpu in Cpu::available() {
                    if decode(tensor, cpu, rows.clone())? != expected {
                        let problem = format!("the {cpu} decoder and the scalar one disagree");
                        return Err(self.failed(m, encoded.form, &problem));
                    }
                }
            }
            checks.push(format!(
                "{}: the decoders ({levels}) agree code for code, on up to 16 M weights of every shape",
                encoded.form
            ));
        }
        for (frame, n_codes) in &self.zstd {
            if zstd::bulk::decompress(frame, *n_codes)?.len() != *n_codes {
                return Err("a Zstandard frame does not decode to its codes".into());
            }
        }

        let mut worst = 0.0f64;
        for &m in &shapes {
            let matrix = &self.workload.matrices[m];
            let plain: Vec<f32> = matrix.data.as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect();
            worst = worst.max(self.check_product(m, "BF16", &self.matvec_bf16(), &plain)?);
            let int8 = self.int8[m].values();
            worst = worst.max(self.check_product(m, "plain INT8", &self.matvec_int8(), &int8)?);
            for encoded in &self.encoded {
                let tensor = &encoded.matrices[m];
                let rows = self.verified_rows(m);
                let mut values = vec![0.0f32; rows.len() * matrix.n_cols];
                tensor.decode_rows(Cpu::Scalar, rows, &mut values)?;
                let name = format!("encoded {}", encoded.form);
                worst = worst.max(self.check_product(m, &name, &self.matvec_encoded(encoded), &values)?);
            }
        }
        checks.push(format!(
            "the products ({}) agree with float64 products of the decoded weights; largest error {worst:.1e} of a \
             row's norm times the activations' rms (at most {PRODUCT_TOLERANCE:.0e})",
            self.level
        ));
        Ok(checks)
    }

    fn failed(&self, matrix: usize, form: impl Display, problem: &str) -> Error {
        let m = &self.workload.matrices[matrix];
        format!(
            "{} ({} x {}), {form}: {problem}. This is a defect of codecllm or of the machine; nothing was measured",
            m.name, m.n_rows, m.n_cols
        )
        .into()
    }

    /// The largest error of the product `work` of matrix `m`, whose first rows are `weights`, relative to a row's norm times the activations' rms.
    fn check_product(&self, m: usize, form: &str, work: &Work<'_>, weights: &[f32]) -> Result<f64> {
        let n_cols = self.workload.matrices[m].n_cols;
        let x = self.operands[&n_cols].operand.token(0);
        let x_rms = (x.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / n_cols as f64).sqrt();
        let mut scratch = Scratch::default();
        work(&Task { matrix: m, rows: self.verified_rows(m) }, &mut scratch)?;
        let errors = weights.par_chunks(n_cols).zip(&scratch.y).map(|(row, &found)| {
            let dot: f64 = row.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum();
            let norm = row.iter().map(|w| f64::from(*w).powi(2)).sum::<f64>().sqrt();
            let error = (f64::from(found) - dot).abs();
            if error == 0.0 { 0.0 } else { error / (norm * x_rms) }
        });
        // Where an error is NaN, so is the sum.
        let (sum, worst) = errors.map(|e| (e, e)).reduce(|| (0.0, 0.0), |a, b| (a.0 + b.0, a.1.max(b.1)));
        if sum.is_nan() || worst > PRODUCT_TOLERANCE {
            return Err(self.failed(
                m,
                form,
                &format!("the product is off by {worst:.1e}, at most {PRODUCT_TOLERANCE:.0e} is right"),
            ));
        }
        Ok(worst)
    }
}

/// The codes of a run of rows, through the call that is measured, on all threads.
fn decode(tensor: &EncodedTensor, cpu: Cpu, rows: Range<usize>) -> Result<Codes<'static>> {
    fn all<T: Clone + Default + Send>(
        rows: Range<usize>,
        n_cols: usize,
        decode: impl Fn(Range<usize>, &mut [T]) -> codecllm_codec::Result<()> + Sync,
    ) -> Result<Vec<T>> {
        let mut codes = vec![T::default(); rows.len() * n_cols];
        codes.par_chunks_mut(DECODE_ROWS * n_cols).enumerate().try_for_each(|(i, codes)| {
            let start = rows.start + i * DECODE_ROWS;
            decode(start..start + codes.len() / n_cols, codes)
        })?;
        Ok(codes)
    }
    let n_cols = tensor.n_cols();
    Ok(if tensor.format() == Format::Bf16 {
        let codes = all(rows, n_cols, |rows, codes| tensor.decode_codes_into(cpu, rows, CodesMut::U16(codes)))?;
        Codes::U16(codes.into())
    } else {
        let codes = all(rows, n_cols, |rows, codes| tensor.decode_codes_into(cpu, rows, CodesMut::U8(codes)))?;
        Codes::U8(codes.into())
    })
}

/// The first `len` elements of a thread's own buffer, which grows when it has to.
fn room<T: Clone + Default>(buffer: &mut Vec<T>, len: usize) -> &mut [T] {
    if buffer.len() < len {
        buffer.resize(len, T::default());
    }
    &mut buffer[..len]
}

/// `items`, then `n - 1` copies of them, made by `copy` from an item and its index.
fn copies<T>(mut items: Vec<T>, n: usize, copy: impl Fn(usize, &T) -> T) -> Vec<T> {
    let len = items.len();
    for i in len..n * len {
        items.push(copy(i % len, &items[i % len]));
    }
    items
}

fn plain_bf16(m: &Matrix, data: Bytes) -> cpu::Matrix {
    cpu::Matrix::Dense { element: DenseType::Bf16, n_rows: m.n_rows, n_cols: m.n_cols, data }
}

fn zstd_frames(codes: &[u8]) -> Result<Vec<(Vec<u8>, usize)>> {
    let frames = codes.par_chunks(ZSTD_CHUNK_BYTES).map(|c| Ok((zstd::bulk::compress(c, ZSTD_LEVEL)?, c.len())));
    frames.collect()
}

fn print_table(report: &Report) {
    println!("{}", report.workload);
    println!(
        "{:.1} M weights a pass, {} {} in memory; products at level {}",
        report.weights_per_pass as f64 / 1e6,
        report.copies,
        if report.copies == 1 { "copy" } else { "copies" },
        report.cpu
    );
    for check in &report.checks {
        println!("verified: {check}");
    }
    println!();
    println!(
        "{:<22} {:>7} {:>19} {:>7} {:>8} {:>12} {:>9}  ratio",
        "", "threads", "", "spread", "passes/s", "bits/weight", "GB/s/core"
    );
    for m in &report.results {
        let (value, unit) = match m.unit {
            "weights/s" => (m.value / 1e9, "G weights/s"),
            "bytes/s" => (m.value / 1e9, "GB/s"),
            unit => (m.value, unit),
        };
        let optional = |x: Option<f64>| x.map_or(String::new(), |x| format!("{x:.2}"));
        println!(
            "{:<22} {:>7} {value:>7.3} {unit:<11} {:>5.0} % {:>8} {:>12} {:>9.2}  {:.3} of {}",
            m.name,
            m.threads,
            100.0 * m.spread,
            optional(m.passes_per_s),
            optional(m.bits_per_weight),
            m.bytes_per_s / 1e9 / m.threads as f64,
            m.ratio,
            m.ratio_to
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_bench_verifies_measures_and_compares() {
        // Rows and columns that fill no block, and no cache to defeat.
        let workload = Workload::of_shape(70, 100, 1, 0);
        let trellis = "rate-trellis".parse().unwrap();
        let forms: Vec<Form> = Format::ALL.iter().copied().map(Form::from).chain([trellis]).collect();
        let bench = Bench::new(workload, &forms, Cpu::detect(), 2, 1).unwrap();
        assert_eq!(bench.verify().unwrap().len(), forms.len() + 1);
        let results = bench.measure(1e-4, 2, 1 << 20).unwrap();
        for name in ["memory.read", "matvec.bf16", "matvec.int8", "matvec.encoded.bf16", "decode.int8.scalar"] {
            let threads: Vec<_> = results.iter().filter(|m| m.name == name).map(|m| m.threads).collect();
            assert_eq!(threads, [1, 2], "{name}");
        }
        assert!(results.iter().all(|m| m.value > 0.0 && m.ratio > 0.0 && m.ratio.is_finite()));
    }

    #[test]
    fn a_wrong_product_is_found() {
        let workload = Workload::of_shape(64, 64, 1, 0);
        let mut bench = Bench::new(workload, &[Format::Int8.into()], Cpu::detect(), 1, 1).unwrap();
        let mut data = bench.workload.matrices[0].data.to_vec();
        data[101] ^= 0x80;
        bench.bf16[0] = plain_bf16(&bench.workload.matrices[0], data.into());
        let problem = bench.verify().unwrap_err().to_string();
        assert!(problem.contains("64x64") && problem.contains("BF16"), "{problem}");
    }
}
