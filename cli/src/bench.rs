//! `codecllm bench`: verifies, then measures everything in one run, the contenders taking turns.

mod cuda;
mod peers;
mod workload;

use crate::model::{DeviceName, MemoryArgs};
use crate::output::CliResult;
use bytes::Bytes;
use codecllm_codec::block::{BLOCK_ROWS, Params};
use codecllm_codec::checkpoint::{Dtype, Tensor};
use codecllm_codec::encoded::{Checks, CodesMut, EncodedTensor, encode_tensor};
use codecllm_codec::product::Operand;
use codecllm_codec::quantize::{Codes, Scales, quantize, scale_of};
use codecllm_codec::{Cpu, Format, Prefer, ScaleMode};
use codecllm_engine::weights::DenseType;
use codecllm_engine::{LoadOptions, Logits, Model, cpu};
use half::bf16;
use peers::{Int8Matrix, Int8Operand, read_memory};
use rand::SeedableRng;
use rand::rngs::SmallRng;
use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};
use serde::Serialize;
use std::collections::{BTreeSet, HashMap};
use std::fmt::Display;
use std::hint::black_box;
use std::ops::Range;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;
use workload::{Form, Matrix, ModelShape, Task, Workload, encode_options, normal};

type Error = Box<dyn std::error::Error + Send + Sync>;
type Result<T> = std::result::Result<T, Error>;

/// Bytes of a Zstandard chunk and the level, as the codec's coder `zstd` has them.
const ZSTD_CHUNK_BYTES: usize = 1 << 16;
const ZSTD_LEVEL: i32 = 9;
/// Codes that zstd is measured on: enough to leave the caches, few enough to compress quickly.
const ZSTD_MAX_CODES: usize = 48 << 20;
/// Weights of the matrix that encoders are measured on, at most, where there is a choice.
const ENCODE_MAX_WEIGHTS: usize = 1 << 24;
/// The largest error of a product that passes, relative to a row's norm times the activations' rms. Activations of 16
/// bits make errors of about 3e-5, and of 2e-4 in the worst of many rows.
const PRODUCT_TOLERANCE: f64 = 5e-4;
/// Rows of a call to a decoder: their codes stay in the caches, and a decoder may work on two row blocks at once.
const DECODE_ROWS: usize = 2 * BLOCK_ROWS;
/// Weights of a matrix that are verified.
const VERIFY_MAX_WEIGHTS: usize = 1 << 24;
/// Seconds of a measurement, in each round, where nothing is said.
const SECONDS: f64 = 0.3;
/// Positions of the caches that generation is measured with.
const GENERATE_CAPACITY: usize = 256;

/// Measure this machine: memory, encoders, decoders, matrix products and whole models
///
/// First verifies: every decoder against the scalar one, code for code, and every product against a float64 product of
/// the decoded weights. Then measures. The contenders take turns, several rounds, and the median counts, so that what
/// disturbs the machine disturbs them alike; each figure comes with its ratio to a peer of the same run. The matrices
/// exist often enough in memory that no cache holds them.
///
/// With --model-shape, and with neither model nor shape, the weights are drawn from a seed, with the row scales and the
/// tails of trained models. A shape too large for the memory is stood for by some of its layers, and then has no
/// tokens/s.
///
/// With --device cuda: single operations (--kernels) and whole models (--model-shape). An operation is compared with the host's, bit for bit
/// where it is exact, and then timed as the replay of a CUDA graph, beside cuBLAS and, where it is installed, NVIDIA's nvCOMP.
#[derive(clap::Args)]
pub struct Args {
    /// A checkpoint or an archive (which is decoded, and encoded anew in each format)
    #[arg(conflicts_with_all = ["shape", "model_shape"])]
    model: Option<PathBuf>,
    /// One matrix, outputs x inputs, as in 5632x2048 [default: 4096x4096]
    ///
    /// On a GPU several, separated by commas [default: seven of Llama models]
    #[arg(long, value_name = "ROWSxCOLS", value_delimiter = ',', value_parser = parse_shape)]
    shape: Vec<(usize, usize)>,
    /// All matrices of a model of this shape; on a GPU the model itself, and several, separated by commas
    #[arg(long, value_enum, value_delimiter = ',')]
    model_shape: Vec<ModelShape>,
    /// What is measured: cpu, or an NVIDIA GPU, cuda or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    device: DeviceName,
    /// The formats to encode in, separated by commas, `rate` with a trellis as rate-trellis [default: bf16,fp8,int8; on a GPU rate, too]
    #[arg(long, value_delimiter = ',')]
    format: Vec<Form>,
    /// Threads of the parallel measurements [default: every core]
    #[arg(long)]
    threads: Option<usize>,
    /// The instruction-set level of the products (decoders are measured at every level) [default: the best]
    #[arg(long)]
    cpu: Option<Cpu>,
    /// Seconds of each measurement, in each round [default: 0.3; on a GPU 0.02]
    #[arg(long)]
    seconds: Option<f64>,
    /// Rounds, of which the median counts
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Seed of the drawn weights and activations
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Print one JSON object instead of the table
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    gpu: GpuArgs,
    #[command(flatten, next_help_heading = "Whole models on a GPU (--device cuda)")]
    memory: MemoryArgs,
}

/// What is measured of single operations on a GPU.
#[derive(clap::Args)]
#[command(next_help_heading = "Operations on a GPU (--device cuda)")]
pub struct GpuArgs {
    /// Measure single operations: reading memory, BF16 products by cuBLAS and by this engine, and each format's decoding and products
    ///
    /// Without this, and without the options below and --shape, --model-shape measures whole models alone; with none of them, both are
    /// measured.
    #[arg(long)]
    kernels: bool,
    /// Tokens of the products, separated by commas, 1 to 16 [default: 1,4,16]
    #[arg(long, value_name = "TOKENS", value_delimiter = ',', value_parser = clap::value_parser!(u8).range(1..=16))]
    batch: Vec<u8>,
    /// Bits a weight that `rate` is to take, all metadata counted [default: 4.5]
    #[arg(long, value_name = "BITS", value_parser = parse_bits)]
    bits: Option<f64>,
    /// What the encoder is to favour: size, balanced or speed [default: speed]
    #[arg(long)]
    prefer: Option<Prefer>,
    /// The coder's parameters, as docs/format.md names them, in place of those that the encoder would choose
    #[arg(long, value_name = "G,T,k,w,C[,B]", value_parser = parse_params)]
    params: Option<Params>,
}

impl GpuArgs {
    fn is_used(&self) -> bool {
        let Self { kernels, batch, bits, prefer, params } = self;
        *kernels || !batch.is_empty() || bits.is_some() || prefer.is_some() || params.is_some()
    }
}

fn parse_bits(text: &str) -> std::result::Result<f64, String> {
    let bits = text.parse().ok().filter(|bits| (1.5..=7.3).contains(bits));
    bits.ok_or_else(|| format!("expected 1.5 to 7.3, as in 4.5; found `{text}`"))
}

fn parse_params(text: &str) -> std::result::Result<Params, String> {
    let numbers: Option<Vec<i32>> = text.split(',').map(|n| n.parse().ok()).collect();
    let (params, bias) = match numbers.as_deref() {
        Some(&[g, t, k, w, c]) => ([g, t, k, w, c], 0),
        Some(&[g, t, k, w, c, bias]) => ([g, t, k, w, c], bias),
        _ => return Err(format!("expected G,T,k,w,C or G,T,k,w,C,B, as in 8,10,4,1,512; found `{text}`")),
    };
    let [Ok(parts_per_symbol), Ok(table_bits), Ok(raw_bits), Ok(part_bits), Ok(block_cols)] = params.map(u32::try_from)
    else {
        return Err(format!("expected numbers that are not negative; found `{text}`"));
    };
    Ok(Params { parts_per_symbol, table_bits, raw_bits, part_bits, block_cols, bias, trellis: false })
}

fn parse_shape(text: &str) -> std::result::Result<(usize, usize), String> {
    let parse = |s: &str| s.parse().ok().filter(|n| (1..=1 << 20).contains(n));
    text.split_once('x')
        .and_then(|(rows, cols)| Some((parse(rows)?, parse(cols)?)))
        .ok_or_else(|| format!("expected ROWSxCOLS with 1 to {} each, as in 5632x2048; found `{text}`", 1 << 20))
}

/// One figure. Bigger is better.
#[derive(Serialize)]
struct Measurement {
    name: String,
    threads: usize,
    /// The median over the rounds.
    value: f64,
    unit: &'static str,
    /// `value` over the peer's; where the peer is `memory.read` and the unit is another, the bytes/s over the peer's.
    ratio: f64,
    ratio_to: String,
    /// Largest less smallest round, over the median.
    spread: f64,
    /// Bytes of the weights, in the form at hand, that were read.
    bytes_per_s: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    bits_per_weight: Option<f64>,
    /// Passes over all of a model's matrices.
    #[serde(skip_serializing_if = "Option::is_none")]
    passes_per_s: Option<f64>,
}

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

/// Runs the command.
pub fn run(args: Args) -> CliResult {
    let n_cores = std::thread::available_parallelism().map_or(1, usize::from);
    let n_threads = args.threads.unwrap_or(n_cores).max(1);
    let mut forms = Vec::new();
    for form in &args.format {
        if !forms.contains(form) {
            forms.push(*form);
        }
    }
    let cpu = args.cpu.unwrap_or_else(Cpu::detect);
    if !(args.seconds.is_none_or(|s| s > 0.0) && args.rounds > 0) {
        return Err("--seconds and --rounds have to be greater than zero".into());
    }
    args.memory.check(args.device)?;
    if let DeviceName::Cuda(index) = args.device {
        if args.model.is_some() {
            return Err("--device cuda draws what it measures; leave out the model".into());
        }
        return cuda::run(index, &args, (!forms.is_empty()).then_some(&forms[..]));
    }
    if args.gpu.is_used() {
        return Err("--kernels, --batch, --bits, --prefer and --params need --device cuda".into());
    }
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

/// What a contender's figure is compared with.
struct Peer {
    name: String,
    threads: usize,
    basis: Basis,
}

enum Basis {
    /// The two values.
    Value,
    /// The bytes that both read a second.
    Bytes,
    /// Tokens/s against passes/s over the matrices.
    Passes,
}

struct Contender<'a> {
    name: String,
    threads: usize,
    unit: &'static str,
    /// Bytes read for each unit of the value.
    bytes_per_unit: f64,
    bits_per_weight: Option<f64>,
    has_passes: bool,
    peer: Peer,
    /// Measures for about so many seconds: units a second.
    run: Box<dyn FnMut(f64) -> Result<f64> + 'a>,
    rounds: Vec<f64>,
}

impl Bench {
    /// Runs all contenders in turns and compares their medians.
    fn measure(&self, seconds: f64, n_rounds: usize, memory_bytes: usize) -> Result<Vec<Measurement>> {
        let memory = vec![1u64; memory_bytes / size_of::<u64>()];
        let models = self.models()?;
        let thread_counts = if self.n_threads == 1 { vec![1] } else { vec![1, self.n_threads] };
        let pools = thread_counts
            .iter()
            .map(|&n| Ok(Team { pool: ThreadPoolBuilder::new().num_threads(n).build()?, scratch: scratch(n) }))
            .collect::<Result<Vec<_>>>()?;
        let mut contenders = Vec::new();
        for team in &pools {
            self.add_memory(&mut contenders, team, &memory);
            self.add_sweeps(&mut contenders, team);
        }
        let team = pools.last().expect("one pool at least");
        self.add_encoders(&mut contenders, team)?;
        for (name, model, bits_per_weight) in &models {
            contenders.push(self.generation(name, model, *bits_per_weight));
        }

        for round in 1..=n_rounds {
            eprintln!("round {round} of {n_rounds}");
            for contender in &mut contenders {
                let value = (contender.run)(seconds)?;
                contender.rounds.push(value);
            }
        }
        Ok(compare(&mut contenders, self.workload.weights_per_pass()))
    }

    fn add_memory<'a>(&'a self, contenders: &mut Vec<Contender<'a>>, team: &'a Team, memory: &'a [u64]) {
        let read = move |n_streams: usize, prefetch: bool, bytes: usize| {
            let part = (bytes / size_of::<u64>()).min(memory.len()) / team.n_threads();
            let start = Instant::now();
            team.pool.broadcast(|thread| {
                let words = &memory[thread.index() * part..][..part];
                black_box(read_memory(words, n_streams, prefetch));
            });
            (part * team.n_threads() * size_of::<u64>()) as f64 / start.elapsed().as_secs_f64()
        };
        let all = size_of_val(memory);
        let ways = [1, 2, 4, 8, 16].into_iter().flat_map(|n_streams| [(n_streams, false), (n_streams, true)]);
        let (best, _) = ways
            .map(|(n_streams, prefetch)| ((n_streams, prefetch), read(n_streams, prefetch, all / 4)))
            .max_by(|a, b| a.1.total_cmp(&b.1))
            .expect("several ways");
        contenders.push(Contender {
            bytes_per_unit: 1.0,
            peer: Peer { name: "memory.read".into(), threads: 1, basis: Basis::Value },
            ..Contender::new("memory.read", team, "bytes/s", move |seconds| {
                let start = Instant::now();
                let mut rates = Vec::new();
                while rates.is_empty() || start.elapsed().as_secs_f64() < seconds {
                    rates.push(read(best.0, best.1, all));
                }
                // The mean over the time: of rates over equal amounts, the harmonic one.
                Ok(rates.len() as f64 / rates.iter().map(|r| 1.0 / r).sum::<f64>())
            })
        });
    }

    /// The contenders that go over the workload's matrices, and zstd.
    fn add_sweeps<'a>(&'a self, contenders: &mut Vec<Contender<'a>>, team: &'a Team) {
        let bf16 = |name: &str| Peer { name: name.into(), threads: team.n_threads(), basis: Basis::Value };
        let mut add = |name: String, bits_per_weight: f64, is_product: bool, peer: Peer, work: Work<'a>| {
            let mut next = vec![0; self.workload.kinds.len()];
            contenders.push(Contender {
                bytes_per_unit: bits_per_weight / 8.0,
                bits_per_weight: Some(bits_per_weight),
                has_passes: is_product,
                peer,
                ..Contender::new(&name, team, "weights/s", move |seconds| self.sweep(team, &mut next, seconds, &work))
            });
        };
        let memory = Peer { name: "memory.read".into(), threads: team.n_threads(), basis: Basis::Bytes };
        add("matvec.bf16".into(), 16.0, true, memory, self.matvec_bf16());
        let n_weights: usize = self.workload.matrices.iter().map(Matrix::n_weights).sum();
        let int8_bytes: usize = self.int8[..self.workload.matrices.len()].iter().map(Int8Matrix::bytes).sum();
        let int8_bits = 8.0 * int8_bytes as f64 / n_weights as f64;
        add("matvec.int8".into(), int8_bits, true, bf16("matvec.bf16"), self.matvec_int8());
        for encoded in &self.encoded {
            let name = format!("matvec.encoded.{}", encoded.form);
            add(name, encoded.bits_per_weight, true, bf16("matvec.bf16"), self.matvec_encoded(encoded));
        }
        for encoded in &self.encoded {
            for cpu in Cpu::available() {
                let name = format!("decode.{}.{cpu}", encoded.form);
                add(name, encoded.bits_per_weight, false, bf16("decode.zstd"), self.decode(encoded, cpu));
            }
        }

        let n_codes: usize = self.zstd.iter().map(|(_, n)| n).sum();
        let bytes: usize = self.zstd.iter().map(|(frame, _)| frame.len()).sum();
        let bits_per_weight = 8.0 * bytes as f64 / n_codes as f64;
        contenders.push(Contender {
            bytes_per_unit: bits_per_weight / 8.0,
            bits_per_weight: Some(bits_per_weight),
            peer: Peer { name: "memory.read".into(), threads: team.n_threads(), basis: Basis::Bytes },
            ..Contender::new("decode.zstd", team, "weights/s", move |seconds| {
                let mut n_done = 0;
                let start = Instant::now();
                while n_done == 0 || start.elapsed().as_secs_f64() < seconds {
                    team.share(&self.zstd, |(frame, n), scratch| {
                        zstd::bulk::decompress_to_buffer(frame, room(&mut scratch.codes, *n))?;
                        Ok(())
                    })?;
                    n_done += n_codes;
                }
                Ok(n_done as f64 / start.elapsed().as_secs_f64())
            })
        });
    }

    /// Goes over groups of every kind in turn for about `seconds`, from where the last sweep stopped: weights a second
    /// over a whole pass.
    fn sweep(&self, team: &Team, next: &mut [usize], seconds: f64, work: &Work<'_>) -> Result<f64> {
        let kinds = &self.workload.kinds;
        let mut elapsed_s = vec![0.0; kinds.len()];
        let mut n_turns = 0;
        let start = Instant::now();
        while n_turns == 0 || start.elapsed().as_secs_f64() < seconds {
            for ((kind, next), elapsed_s) in kinds.iter().zip(&mut *next).zip(&mut elapsed_s) {
                let group = &kind.groups[*next % kind.groups.len()];
                *next += 1;
                let start = Instant::now();
                team.share(&group.tasks, work)?;
                *elapsed_s += start.elapsed().as_secs_f64();
            }
            n_turns += 1;
        }
        let pass_s: f64 = kinds.iter().zip(&elapsed_s).map(|(k, s)| k.per_pass as f64 * s / f64::from(n_turns)).sum();
        Ok(self.workload.weights_per_pass() as f64 / pass_s)
    }

    fn add_encoders<'a>(&'a self, contenders: &mut Vec<Contender<'a>>, team: &'a Team) -> Result<()> {
        let matrices = &self.workload.matrices;
        let fits = matrices.iter().filter(|m| m.n_weights() <= ENCODE_MAX_WEIGHTS);
        let matrix = fits.max_by_key(|m| m.n_weights()).unwrap_or(&matrices[0]);
        let tensor = matrix.tensor();
        let codes: Vec<u8> = self.zstd_codes()?;
        let peer = |name: &str| Peer { name: name.into(), threads: team.n_threads(), basis: Basis::Value };
        for encoded in &self.encoded {
            let options = encode_options(encoded.form, Prefer::Balanced, &tensor)?;
            let tensor = tensor.clone();
            contenders.push(Contender {
                bytes_per_unit: 2.0,
                peer: peer("encode.zstd"),
                ..Contender::new(&format!("encode.{}", encoded.form), team, "weights/s", move |seconds| {
                    repeat(seconds, matrix.n_weights(), || {
                        black_box(team.pool.install(|| encode_tensor(&tensor, &options))?);
                        Ok(())
                    })
                })
            });
        }
        contenders.push(Contender {
            bytes_per_unit: 1.0,
            peer: peer("encode.zstd"),
            ..Contender::new("encode.zstd", team, "weights/s", move |seconds| {
                repeat(seconds, codes.len(), || {
                    black_box(team.pool.install(|| zstd_frames(&codes))?);
                    Ok(())
                })
            })
        });
        Ok(())
    }

    /// Some INT8 codes.
    fn zstd_codes(&self) -> Result<Vec<u8>> {
        let frames = &self.zstd[..self.zstd.len().min(64)];
        let codes =
            frames.iter().map(|(frame, n)| Ok(zstd::bulk::decompress(frame, *n)?)).collect::<Result<Vec<_>>>()?;
        Ok(codes.concat())
    }

    /// The whole model in BF16 and in each format: name, model, bits of a matrix's weight.
    fn models(&self) -> Result<Vec<(String, Model, f64)>> {
        let Some(whole) = &self.workload.model else { return Ok(Vec::new()) };
        let options = LoadOptions { cpu: self.level, threads: self.n_threads, check: Checks::Metadata };
        let load = |matrix: &dyn Fn(usize) -> Tensor| -> Result<Model> {
            let mut tensors = whole.others.clone();
            let names = self.workload.matrices.iter().map(|m| m.name.clone()).enumerate();
            for (i, name) in names.chain(whole.aliases.iter().map(|(name, i)| (*i, name.clone()))) {
                tensors.insert(name, matrix(i));
            }
            Ok(Model::from_source(whole.config.clone(), &tensors, &options)?)
        };
        eprintln!("loading the whole model in each form");
        let mut models = vec![("generate.bf16".to_string(), load(&|i| self.workload.matrices[i].tensor())?, 16.0)];
        for encoded in &self.encoded {
            let model = load(&|i| {
                let data = encoded.matrices[i].bytes().clone();
                Tensor { name: self.workload.matrices[i].name.clone(), dtype: Dtype::U8, shape: vec![data.len()], data }
            })?;
            models.push((format!("generate.encoded.{}", encoded.form), model, encoded.bits_per_weight));
        }
        Ok(models)
    }

    fn generation<'a>(&'a self, name: &str, model: &'a Model, bits_per_weight: f64) -> Contender<'a> {
        let (peer, basis) =
            if name == "generate.bf16" { ("matvec.bf16", Basis::Passes) } else { ("generate.bf16", Basis::Value) };
        let run = move |seconds: f64| -> Result<f64> {
            let mut cache = model.new_cache(GENERATE_CAPACITY.min(model.config().max_positions))?;
            let mut token = 1 % model.config().vocab_size as u32;
            let mut n_tokens = 0;
            let start = Instant::now();
            while n_tokens < 2 || start.elapsed().as_secs_f64() < seconds {
                if cache.len() == cache.capacity() {
                    cache.reset();
                }
                let logits = model.forward(&[token], &mut cache, Logits::Last)?;
                token = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap_or(0) as u32;
                n_tokens += 1;
            }
            Ok(f64::from(n_tokens) / start.elapsed().as_secs_f64())
        };
        Contender {
            name: name.into(),
            threads: self.n_threads,
            unit: "tokens/s",
            bytes_per_unit: self.workload.weights_per_pass() as f64 * bits_per_weight / 8.0,
            bits_per_weight: Some(bits_per_weight),
            has_passes: false,
            peer: Peer { name: peer.into(), threads: self.n_threads, basis },
            run: Box::new(run),
            rounds: Vec::new(),
        }
    }
}

impl<'a> Contender<'a> {
    fn new(name: &str, team: &Team, unit: &'static str, run: impl FnMut(f64) -> Result<f64> + 'a) -> Self {
        let threads = team.n_threads();
        Self {
            name: name.into(),
            threads,
            unit,
            bytes_per_unit: 1.0,
            bits_per_weight: None,
            has_passes: false,
            peer: Peer { name: name.into(), threads, basis: Basis::Value },
            run: Box::new(run),
            rounds: Vec::new(),
        }
    }
}

/// Threads that share tasks, each with its own scratch.
struct Team {
    pool: ThreadPool,
    scratch: Vec<Mutex<Scratch>>,
}

fn scratch(n: usize) -> Vec<Mutex<Scratch>> {
    std::iter::repeat_with(Mutex::default).take(n).collect()
}

impl Team {
    fn n_threads(&self) -> usize {
        self.pool.current_num_threads()
    }

    /// Works off `tasks`, each thread taking the next.
    fn share<T: Sync>(&self, tasks: &[T], work: impl Fn(&T, &mut Scratch) -> Result<()> + Sync) -> Result<()> {
        let next = AtomicUsize::new(0);
        let results = self.pool.broadcast(|thread| {
            let mut scratch = self.scratch[thread.index()].lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            while let Some(task) = tasks.get(next.fetch_add(1, Ordering::Relaxed)) {
                work(task, &mut scratch)?;
                black_box(&mut *scratch);
            }
            Ok(())
        });
        results.into_iter().collect()
    }
}

/// Repeats `work` for about `seconds`: units a second.
fn repeat(seconds: f64, units: usize, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
    let mut n = 0;
    let start = Instant::now();
    while n == 0 || start.elapsed().as_secs_f64() < seconds {
        work()?;
        n += 1;
    }
    Ok((n * units) as f64 / start.elapsed().as_secs_f64())
}

/// The medians, each with its ratio to the peer's, sorted by name.
fn compare(contenders: &mut [Contender<'_>], weights_per_pass: usize) -> Vec<Measurement> {
    for contender in &mut *contenders {
        contender.rounds.sort_by(f64::total_cmp);
    }
    let median = |c: &Contender<'_>| c.rounds[c.rounds.len() / 2];
    contenders
        .iter()
        .map(|c| {
            let value = median(c);
            let peer = contenders.iter().find(|p| p.name == c.peer.name && p.threads == c.peer.threads).unwrap_or(c);
            let ratio = match c.peer.basis {
                Basis::Value => value / median(peer),
                Basis::Bytes => value * c.bytes_per_unit / (median(peer) * peer.bytes_per_unit),
                Basis::Passes => value * weights_per_pass as f64 / median(peer),
            };
            Measurement {
                name: c.name.clone(),
                threads: c.threads,
                value,
                unit: c.unit,
                ratio,
                ratio_to: if c.peer.threads == c.threads {
                    peer.name.clone()
                } else {
                    format!("{} with {} thread", peer.name, peer.threads)
                },
                spread: (c.rounds[c.rounds.len() - 1] - c.rounds[0]) / value,
                bytes_per_s: value * c.bytes_per_unit,
                bits_per_weight: c.bits_per_weight,
                passes_per_s: c.has_passes.then(|| value / weights_per_pass as f64),
            }
        })
        .collect()
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
    fn shapes_are_parsed_or_explained() {
        assert_eq!(parse_shape("5632x2048"), Ok((5632, 2048)));
        for bad in ["", "5632", "0x1", "1x", "-1x2", "1x2x3", "99999999x1"] {
            assert!(parse_shape(bad).unwrap_err().contains("ROWSxCOLS"), "{bad}");
        }
    }

    #[test]
    fn the_coders_parameters_are_parsed_or_explained() {
        let params = Params {
            parts_per_symbol: 4,
            table_bits: 12,
            raw_bits: 9,
            part_bits: 3,
            block_cols: 512,
            bias: 0,
            trellis: false,
        };
        assert_eq!(parse_params("4,12,9,3,512"), Ok(params));
        assert_eq!(parse_params("4,12,9,3,512,13824"), Ok(Params { bias: 13824, ..params }));
        for bad in ["", "4,12,9,3", "4,12,9,3,512,0,0", "4,12,9,3,x", "-4,12,9,3,512"] {
            assert!(parse_params(bad).is_err(), "{bad}");
        }
        assert_eq!(parse_bits("4.5"), Ok(4.5));
        assert!(parse_bits("9").unwrap_err().contains("1.5 to 7.3"));
    }

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
