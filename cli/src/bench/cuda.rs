//! `bench --device cuda`: single operations at single shapes, and whole models.

mod kernels;
mod models;

use super::workload::{Form, ModelShape};
use super::{Args, Result};
use crate::output;
use codecllm_codec::Format;
use serde::Serialize;
use std::process::ExitCode;

/// Of `--model-shape`, where nothing is chosen.
const MODEL_SHAPES: [ModelShape; 2] = [ModelShape::TinyLlama, ModelShape::Llama3];
/// Seconds of each measurement, in each round, where nothing is said.
const SECONDS: f64 = 0.02;

#[derive(Serialize)]
struct Report {
    device: String,
    has_cublas: bool,
    /// Its version, or why it is not measured.
    nvcomp: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    kernels: Option<kernels::Report>,
    models: Vec<models::Report>,
}

/// Runs what was chosen: operations with `--kernels` or with what only they have, models with `--model-shape`, and both where nothing was.
pub fn run(index: usize, args: &Args, forms: Option<&[Form]>) -> Result<ExitCode> {
    let all: Vec<Form> = Format::ALL.iter().copied().map(Form::from).collect();
    let forms = forms.unwrap_or(&all);
    let wants_kernels = args.gpu.is_used() || !args.shape.is_empty();
    let shapes = match (&args.model_shape[..], wants_kernels) {
        ([], false) => &MODEL_SHAPES,
        (shapes, _) => shapes,
    };
    let options = kernels::Options {
        shapes: &args.shape,
        forms,
        gpu: &args.gpu,
        seconds: args.seconds.unwrap_or(SECONDS),
        rounds: args.rounds,
        seed: args.seed,
    };
    let opened = kernels::open(index, &options)?;
    let mut report = Report {
        device: opened.device().name()?,
        has_cublas: opened.has_blas(),
        nvcomp: opened.nvcomp().unwrap_or_else(|problem| problem),
        kernels: None,
        models: Vec::new(),
    };
    // A table comes line by line, so that what was measured is not lost to whoever stops it.
    let shows = !args.json;
    if shows {
        println!("{}", report.device);
        if !report.has_cublas {
            println!("cuBLAS was not found: nothing to compare with, and prompts are slow");
        }
        println!("nvCOMP: {}", report.nvcomp);
    } else {
        eprintln!("{}", report.device);
    }
    if wants_kernels || args.model_shape.is_empty() {
        report.kernels = Some(kernels::measure(&opened, &options, shows)?);
    }
    // Models have the memory for themselves.
    drop(opened);
    for &shape in shapes {
        report.models.push(models::measure(index, shape, forms, args.seed, args.rounds, &args.memory, shows)?);
    }
    if args.json {
        output::print_json(&report)?;
    }
    Ok(ExitCode::SUCCESS)
}
