//! `codecllm inspect`.

use crate::output::{self, Bar, CliResult, Unit};
use codecllm_codec::archive::{self, BitsSplit, Inspection, TensorReport};
use std::path::PathBuf;
use std::process::ExitCode;

/// See where an archive's bytes go
///
/// Lists every tensor with its format and coder, the order-0 entropy of its codes, and its bits per weight by what they
/// are for; then the sums, for the encoded tensors and for the whole model with all metadata. Reads plain checkpoints too.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  codecllm inspect tiny.int8\n  codecllm inspect tiny.int8 --json | jq .total")]
pub struct Args {
    /// Directory of the archive
    archive: PathBuf,
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
    output::catch_ctrl_c()?;
    let inspection = archive::inspect(&args.archive, &Bar::new("reading", Unit::Bytes))?;
    if args.json {
        output::print_json(&inspection)?
    } else {
        print_table(&inspection)?
    }
    Ok(ExitCode::SUCCESS)
}

fn print_table(inspection: &Inspection) -> Result<(), output::Error> {
    let width = inspection.tensors.iter().map(|t| t.name.len()).max().unwrap_or(0).max("whole model".len());
    output::print(format_args!(
        "{:width$} {:>13} {:6} {:5} {:>14} {:>7} {:>8} {:>7}  {}  {:>8}",
        "bits per weight:", "shape", "format", "coder", "G T k C", "entropy", "bits", "ratio", SPLIT_TITLES, "error"
    ))?;
    for tensor in &inspection.tensors {
        output::print(row(tensor, width))?;
    }
    if let Some(encoded) = &inspection.encoded {
        output::print(format_args!(
            "{:width$} {:>13} {:6} {:5} {:>14} {:7.3} {:8.3} {:6.3}x  {}",
            "encoded",
            encoded.total.n_weights,
            "",
            "",
            "",
            encoded.entropy_bits,
            encoded.total.bits_per_weight,
            encoded.total.ratio_bf16,
            split(&encoded.bits)
        ))?;
    }
    let total = &inspection.total;
    output::print(format_args!(
        "{:width$} {:>13} {:6} {:5} {:>14} {:>7} {:8.3} {:6.3}x  {} in all",
        "whole model",
        total.n_weights,
        "",
        "",
        "",
        "",
        total.bits_per_weight,
        total.ratio_bf16,
        output::bytes(total.bytes)
    ))
}

fn row(t: &TensorReport, width: usize) -> String {
    let shape = t.shape.iter().map(usize::to_string).collect::<Vec<_>>().join("x");
    let params = t.params.map_or_else(String::new, |p| {
        format!("{} {} {} {}", p.parts_per_symbol, p.table_bits, p.raw_bits, p.block_cols)
    });
    let entropy = t.entropy_bits.map_or_else(String::new, |bits| format!("{bits:.3}"));
    let mut line = format!(
        "{:width$} {shape:>13} {:6} {:5} {params:>14} {entropy:>7} {:8.3} {:6.3}x",
        t.name, t.format, t.coder, t.bits_per_weight, t.ratio_bf16
    );
    if let Some(bits) = &t.bits {
        line += &format!("  {}  {:8.1e}", split(bits), t.relative_error);
    }
    line
}

const SPLIT_TITLES: &str = "payload    raw  table offset  state  scale  patch header    pad";

fn split(b: &BitsSplit) -> String {
    format!(
        "{:7.3} {:6.3} {:6.3} {:6.3} {:6.3} {:6.3} {:6.3} {:6.3} {:6.3}",
        b.payload, b.raw, b.tables, b.offsets, b.states, b.scales, b.patches, b.header, b.padding
    )
}
