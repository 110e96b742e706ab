//! `codecllm compare --quantizers`: where rounding errors fall, and how many of the codes are used.

use super::Args;
use crate::experiment::{Trial, Variant, align, check_stopped};
use crate::hub;
use crate::output::{self, CliResult, Error};
use crate::report::{Axis, Plot, Point, Report, Series, Style};
use codecllm_codec::archive::Layers;
use codecllm_codec::checkpoint::Tensor;
use codecllm_codec::quantize::read_row;
use codecllm_codec::{Checkpoint, Checks, Cpu, EncodedTensor};
use rayon::prelude::*;
use serde::Serialize;
use std::process::ExitCode;

const DECILES: usize = 10;

/// A quantizer by name, or a format.
pub fn parse(text: &str) -> Result<Variant, String> {
    match text {
        "tensor" => "int8:tensor".parse(),
        "channel" => "int8".parse(),
        "rate" => "rate:4.5".parse(),
        other => other.parse(),
    }
}

#[derive(Serialize)]
struct Outcome {
    source: String,
    n_matrices: usize,
    n_weights: u64,
    quantizers: Vec<Quantizer>,
}

#[derive(Serialize)]
struct Quantizer {
    name: String,
    /// Of the matrices, all of their metadata counted.
    bits_per_weight: f64,
    /// Order-0 entropy of the codes, the mean over the weights.
    entropy_bits: f64,
    /// Distinct codes in a matrix.
    codes_min: usize,
    codes_median: usize,
    codes_max: usize,
    /// ‖W − Ŵ‖ / ‖W‖ over all matrices.
    relative_error: f64,
    /// The same over the channels of each tenth, by the channel's rms within its matrix, least first.
    relative_error_by_decile: Vec<f64>,
    matrices: Vec<MatrixReport>,
}

#[derive(Serialize)]
struct MatrixReport {
    name: String,
    relative_error: f64,
    entropy_bits: f64,
    distinct_codes: usize,
}

/// Squared weights and squared errors.
#[derive(Clone, Copy, Default)]
struct Squares {
    weights: f64,
    errors: f64,
}

impl Squares {
    fn add(&mut self, other: Self) {
        self.weights += other.weights;
        self.errors += other.errors;
    }

    fn relative(self) -> f64 {
        if self.weights > 0.0 { (self.errors / self.weights).sqrt() } else { 0.0 }
    }
}

/// Runs the command.
pub fn run(args: &Args) -> CliResult {
    args.machine.apply()?;
    let report = args.report("Quantizers on")?;
    let source = hub::resolve(&args.source, &args.revision)?;
    let checkpoint = Checkpoint::open(&source)?;
    let layers = match args.layers.as_slice() {
        [] => Layers::All,
        [layers] => layers.clone(),
        _ => return Err(codecllm_codec::Error::Parameter("--quantizers takes one --layers".into()).into()),
    };
    let selected = layers.select(&checkpoint)?;
    let names: Vec<&str> = checkpoint.names().filter(|name| selected.contains(name)).collect();
    output::catch_ctrl_c()?;
    let mut quantizers = Vec::new();
    for (i, variant) in args.quantizers.iter().enumerate() {
        eprintln!("[{}/{}] {variant}", i + 1, args.quantizers.len());
        let trial = Trial::new(&source, &variant.options(&layers))?;
        quantizers.push(measure(variant, &checkpoint, &trial, &names)?);
    }
    let outcome = Outcome {
        source: args.source.clone(),
        n_matrices: names.len(),
        n_weights: names.iter().filter_map(|name| checkpoint.info(name)).map(|t| t.n_elements() as u64).sum(),
        quantizers,
    };
    if let Some(report) = report {
        outcome.write(report)?;
    }
    if args.json {
        output::print_json(&outcome)?;
    } else {
        let (headers, rows) = outcome.overview();
        output::print(align(&headers, &rows))?;
        let (headers, rows) = outcome.deciles();
        output::print(format_args!(
            "\nRelative error of the channels of each tenth, by their rms within a matrix, least first (%)\n{}",
            align(&headers, &rows)
        ))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn measure(variant: &Variant, source: &Checkpoint, trial: &Trial, names: &[&str]) -> Result<Quantizer, Error> {
    let archive = Checkpoint::open(trial.path())?;
    let mut total = Squares::default();
    let mut deciles = [Squares::default(); DECILES];
    let mut matrices = Vec::new();
    let (mut entropy, mut n_weights) = (0.0, 0);
    for name in names {
        check_stopped()?;
        let encoded = EncodedTensor::parse(archive.tensor(name)?.data, Checks::Full).map_err(|e| e.in_tensor(name))?;
        let original = source.tensor(name)?;
        let rows = errors(&original, &encoded)?;
        let mut by_rms: Vec<usize> = (0..rows.len()).collect();
        by_rms.sort_by(|&a, &b| rows[a].weights.total_cmp(&rows[b].weights));
        let mut of_matrix = Squares::default();
        for (rank, &row) in by_rms.iter().enumerate() {
            deciles[rank * DECILES / rows.len()].add(rows[row]);
            of_matrix.add(rows[row]);
        }
        total.add(of_matrix);
        let codes = encoded.coded_numbers(Cpu::detect())?;
        let entropy_bits = codes.entropy_bits();
        entropy += entropy_bits * codes.len() as f64;
        n_weights += codes.len();
        matrices.push(MatrixReport {
            name: name.to_string(),
            relative_error: of_matrix.relative(),
            entropy_bits,
            distinct_codes: codes.histogram().iter().filter(|n| **n > 0).count(),
        });
    }
    let mut distinct: Vec<usize> = matrices.iter().map(|m| m.distinct_codes).collect();
    distinct.sort_unstable();
    Ok(Quantizer {
        name: variant.to_string(),
        bits_per_weight: trial.bits,
        entropy_bits: entropy / n_weights.max(1) as f64,
        codes_min: distinct.first().copied().unwrap_or(0),
        codes_median: distinct.get(distinct.len() / 2).copied().unwrap_or(0),
        codes_max: distinct.last().copied().unwrap_or(0),
        relative_error: total.relative(),
        relative_error_by_decile: deciles.map(Squares::relative).to_vec(),
        matrices,
    })
}

/// The squares of every row.
fn errors(original: &Tensor, encoded: &EncodedTensor) -> Result<Vec<Squares>, Error> {
    const ROWS: usize = 32;
    let (n_rows, n_cols) = (encoded.n_rows(), encoded.n_cols());
    let row_bytes = original.data.len() / n_rows;
    let chunks: Vec<usize> = (0..n_rows).step_by(ROWS).collect();
    let squares = chunks.into_par_iter().map(|first| {
        let rows = first..n_rows.min(first + ROWS);
        let mut values = vec![0.0; rows.len() * n_cols];
        encoded.decode_rows(Cpu::detect(), rows.clone(), &mut values)?;
        let bytes = &original.data[rows.start * row_bytes..rows.end * row_bytes];
        let mut row = vec![0f32; n_cols];
        let squares = values.chunks(n_cols).zip(bytes.chunks(row_bytes)).map(|(values, bytes)| {
            let mut squares = Squares::default();
            read_row(original.dtype, bytes, &mut row);
            for (found, weight) in values.iter().zip(&row) {
                let (found, weight) = (f64::from(*found), f64::from(*weight));
                squares.weights += weight * weight;
                squares.errors += (weight - found) * (weight - found);
            }
            squares
        });
        Ok(squares.collect::<Vec<_>>())
    });
    let squares: Vec<Vec<Squares>> = squares.collect::<Result<_, codecllm_codec::Error>>()?;
    Ok(squares.concat())
}

impl Outcome {
    fn overview(&self) -> (Vec<&'static str>, Vec<Vec<String>>) {
        let row = |q: &Quantizer| {
            vec![
                q.name.clone(),
                format!("{:.3}", q.bits_per_weight),
                format!("{:.3}", q.entropy_bits),
                format!("{} ({}..{})", q.codes_median, q.codes_min, q.codes_max),
                format!("{:.3} %", 100.0 * q.relative_error),
            ]
        };
        let headers = vec!["quantizer", "bits/weight", "entropy", "distinct codes", "relative error"];
        (headers, self.quantizers.iter().map(row).collect())
    }

    fn deciles(&self) -> (Vec<&'static str>, Vec<Vec<String>>) {
        let headers = vec!["quantizer", "1st", "2nd", "3rd", "4th", "5th", "6th", "7th", "8th", "9th", "10th"];
        let row = |q: &Quantizer| {
            let errors = q.relative_error_by_decile.iter().map(|e| format!("{:.2}", 100.0 * e));
            [q.name.clone()].into_iter().chain(errors).collect()
        };
        (headers, self.quantizers.iter().map(row).collect())
    }

    fn write(&self, mut report: Report) -> Result<(), Error> {
        report.paragraph(&format!(
            "{} matrices, {} weights. A channel is an output row; its magnitude is its rms. With one scale for a tensor, \
             small channels have few codes and large relative errors; with one for each channel, all fare alike.",
            self.n_matrices, self.n_weights
        ));
        let (headers, rows) = self.overview();
        report.table("Distinct codes: median over the matrices (least..most)", &headers, &rows);
        let (headers, rows) = self.deciles();
        report.table(
            "Relative error by the channel's magnitude within its matrix, least tenth first, in %",
            &headers,
            &rows,
        );
        let series = self.quantizers.iter().map(|q| {
            let points = q.relative_error_by_decile.iter().enumerate().map(|(i, error)| Point {
                x: (i + 1) as f64,
                y: 100.0 * error,
                label: format!("{}, tenth {}: {:.2} %", q.name, i + 1, 100.0 * error),
            });
            Series { name: q.name.clone(), points: points.collect(), style: Style::Line }
        });
        report.plot(&Plot {
            title: "Relative error by channel magnitude",
            x: Axis { label: "tenth of the channels, by rms", is_log: false },
            y: Axis { label: "relative error, %", is_log: true },
            series: series.collect(),
        });
        let series = self.quantizers.iter().map(|q| {
            let points = q.matrices.iter().map(|m| Point {
                x: m.entropy_bits,
                y: 100.0 * m.relative_error,
                label: format!("{}: {} codes", m.name, m.distinct_codes),
            });
            Series { name: q.name.clone(), points: points.collect(), style: Style::Dots }
        });
        report.plot(&Plot {
            title: "Every matrix: error against entropy",
            x: Axis { label: "entropy of the codes, bits", is_log: false },
            y: Axis { label: "relative error, %", is_log: true },
            series: series.collect(),
        });
        report.finish(self)
    }
}
