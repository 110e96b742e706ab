//! `codecllm bench`: verifies, then measures everything in one run, the contenders taking turns.

mod cpu;
mod cuda;
mod peers;
mod workload;

use crate::model::{DeviceName, MemoryArgs};
use crate::output::CliResult;
use codecllm_codec::block::Params;
use codecllm_codec::{Cpu, Prefer};
use std::path::PathBuf;
use workload::{Form, ModelShape};

type Error = Box<dyn std::error::Error + Send + Sync>;
type Result<T> = std::result::Result<T, Error>;

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

/// Runs the command.
pub fn run(args: Args) -> CliResult {
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
    cpu::run(&args, forms, cpu)
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
}
