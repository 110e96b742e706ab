//! `codecllm verify`.

use crate::hub;
use crate::model::DeviceName;
use crate::output::{self, Bar, CliResult, Unit};
use codecllm_codec::Cpu;
use codecllm_codec::archive::{self, Decoder, Decoders, Status};
use codecllm_engine::cuda::{CudaDecoder, Device};
use std::path::PathBuf;
use std::process::ExitCode;

/// Prove that an archive holds what it should
///
/// Checks every file against its recorded hash, the structure and checksums of every tensor, and that every decoder of
/// this machine yields the same codes as the plain reference decoder; with --device cuda, the GPU's, too. With --source, also that bf16 is bit for bit the
/// checkpoint, that quantized codes and scales are exactly those that the quantizer yields, and that all else is unchanged.
///
/// Exit codes: 0 proven, 1 wrong, 2 could not check
#[derive(clap::Args)]
#[command(after_help = "Example:\n  codecllm verify tiny.int8 --source TinyLlama/TinyLlama-1.1B-Chat-v1.0")]
pub struct Args {
    /// Directory of the archive
    archive: PathBuf,
    /// The checkpoint that it was made from: a directory, a GGUF file, or a Hugging Face repository id
    #[arg(long, value_name = "SRC")]
    source: Option<String>,
    /// Revision of a Hugging Face repository
    #[arg(long, default_value = "main")]
    revision: String,
    /// Check one decoder against the reference: scalar, avx2 or avx512 [default: all that this machine runs]
    #[arg(long)]
    cpu: Option<Cpu>,
    /// Another decoder to check, beside the processor's: cuda is that of an NVIDIA GPU (cuda:1 of the second one)
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    device: DeviceName,
    /// Threads [default: every core]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Print a JSON object
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(args: Args) -> CliResult {
    output::set_threads(args.threads)?;
    let unusable = |e: output::Error| {
        output::fail(e.as_ref());
        Ok(ExitCode::from(output::UNUSABLE))
    };
    let source = match args.source.as_deref().map(|source| hub::resolve(source, &args.revision)).transpose() {
        Ok(source) => source,
        Err(e) => return unusable(e),
    };
    let gpu = match args.device {
        DeviceName::Cpu => None,
        DeviceName::Cuda(index) => match Device::open(index).and_then(CudaDecoder::new) {
            Ok(gpu) => Some(gpu),
            Err(e) => return unusable(e.into()),
        },
    };
    output::catch_ctrl_c()?;
    let cpus: Vec<Cpu> = args.cpu.map_or_else(|| Cpu::available().collect(), |cpu| vec![cpu]);
    let decoders = Decoders { cpus: &cpus, other: gpu.as_ref().map(|gpu| gpu as &dyn Decoder) };
    let bar = Bar::new("verifying", Unit::Bytes);
    let report = archive::verify_with(&args.archive, source.as_deref(), &decoders, &bar)?;
    drop(bar);

    if args.json {
        output::print_json(&report)?;
    } else {
        for check in &report.checks {
            let mark = match check.status {
                Status::Proven => "ok",
                Status::Unchecked => "??",
                Status::Wrong => "WRONG",
            };
            output::print(format_args!("{mark:5}  {:15} {}", check.name, check.detail))?;
        }
        for item in &report.not_checked {
            output::print(format_args!("{:5}  {:15} {item}", "-", "not checked"))?;
        }
        let name = args.archive.display();
        output::print(match report.status {
            Status::Proven => format!("{name}: proven"),
            Status::Unchecked => format!("{name}: could not be checked in full"),
            Status::Wrong => format!("{name}: wrong; compress the checkpoint anew, or get the archive anew"),
        })?;
    }
    Ok(match report.status {
        Status::Proven => ExitCode::SUCCESS,
        Status::Wrong => ExitCode::FAILURE,
        Status::Unchecked => ExitCode::from(output::UNUSABLE),
    })
}
