//! Rounding with error feedback: each column of a matrix makes up for what the columns before it lost, as far as their
//! inputs are correlated.
//!
//! A product's mean squared error over the inputs is tr(E·H·Eᵀ), where E = W − Ŵ and H holds the inputs' second moments. With
//! H = R·Rᵀ, R upper triangular, that is ‖E·R‖². Column j of E·R is Σ_{k<j} E_k·R_kj + E_j·R_jj: so rounding
//! W_j + Σ_{k<j} E_k·R_kj / R_jj, not W_j, leaves of it only the rounding's own error, times R_jj. This is GPTQ
//! (Frantar et al. 2022) in the form of LDLQ (Chee et al. 2023, "QuIP"). The rounding weighs errors against bits as
//! [`quantize_to_step`](crate::quantize::quantize_to_step) does.

use crate::checkpoint::Tensor;
use crate::error::{Error, Result};
use crate::quantize::{
    Codes, INT8_MAX, QuantizedTensor, TrellisRows, add_counts, cheapest_thresholds, grid_magnitude, matrix_shape,
    read_row, row_steps, scales_of,
};
use crate::trellis::{self, Costs, N_STATES, PHASES, next_state};
use faer::linalg::matmul::matmul;
use faer::linalg::solvers::Llt;
use faer::prelude::Solve;
use faer::{Accum, Mat, MatMut, MatRef, Par, Side};
use rayon::prelude::*;
use std::ops::Range;

/// Columns of a tile of second moments.
const TILE: usize = 256;
/// Columns that are rounded one after the other before the others learn of their errors; with a trellis, of one phase.
const RUN_COLS: usize = 64;
/// Rows that a thread takes through all columns.
const CHUNK_ROWS: usize = 64;
/// One row of so many tells which scale fits best.
const FIT_STRIDE: usize = 16;
/// What the diagonal is raised by, as a share of its mean. It keeps a few inputs from fitting the noise of the text.
const DAMPING: f64 = 0.01;
/// Where even this share makes a matrix of moments not positive definite, it is not one.
const MAX_DAMPING: f64 = 1e3;

/// The second moments Xᵀ·X of a product's inputs.
#[derive(Debug, Clone)]
pub struct Moments {
    width: usize,
    n_inputs: u64,
    /// Tiles of the lower triangle, row by row; each row-major.
    tiles: Vec<Vec<f32>>,
}

/// The place of a tile: its first row and column, and how many it has of both.
fn tiles_of(width: usize) -> impl Iterator<Item = [usize; 4]> {
    let size = move |first: usize| TILE.min(width - first);
    (0..width)
        .step_by(TILE)
        .flat_map(move |row| (0..=row).step_by(TILE).map(move |col| [row, col, size(row), size(col)]))
}

impl Moments {
    /// None yet, of inputs of `width` values.
    pub fn new(width: usize) -> Self {
        let tiles = tiles_of(width).map(|[_, _, n_rows, n_cols]| vec![0.0; n_rows * n_cols]).collect();
        Self { width, n_inputs: 0, tiles }
    }

    /// Values of an input.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Inputs that were added.
    pub fn n_inputs(&self) -> u64 {
        self.n_inputs
    }

    /// Adds inputs `[n, width]`. The sums do not depend on the number of threads.
    ///
    /// # Panics
    /// `x` is no multiple of `width` long.
    pub fn add(&mut self, x: &[f32]) {
        let n = x.len() / self.width;
        assert_eq!(n * self.width, x.len(), "whole inputs");
        let x = MatRef::from_row_major_slice(x, n, self.width);
        let places: Vec<_> = tiles_of(self.width).collect();
        self.tiles.par_iter_mut().zip(places).for_each(|(tile, [row, col, n_rows, n_cols])| {
            let tile = MatMut::from_row_major_slice_mut(tile, n_rows, n_cols);
            matmul(tile, Accum::Add, x.subcols(row, n_rows).transpose(), x.subcols(col, n_cols), 1.0, Par::Seq);
        });
        self.n_inputs += n as u64;
    }

    /// Calls `f` with the row, the column and the mean product, for the lower triangle.
    fn for_each(&self, mut f: impl FnMut(usize, usize, f64)) {
        let scale = 1.0 / self.n_inputs.max(1) as f64;
        for ([row, col, _, n_cols], tile) in tiles_of(self.width).zip(&self.tiles) {
            for (i, values) in tile.chunks_exact(n_cols).enumerate() {
                let until = (row + i + 1 - col).min(n_cols);
                values[..until].iter().enumerate().for_each(|(j, v)| f(row + i, col + j, f64::from(*v) * scale));
            }
        }
    }
}

/// How far a product's inputs are from those that it was made for: the sums Dᵀ·X over inputs X and their differences D from the
/// others.
#[derive(Debug, Clone)]
pub struct Drift {
    width: usize,
    /// `[width, width]`, row-major.
    sums: Vec<f32>,
    /// Σ D².
    power: f64,
}

impl Drift {
    /// None yet, of inputs of `width` values.
    pub fn new(width: usize) -> Self {
        Self { width, sums: vec![0.0; width * width], power: 0.0 }
    }

    /// Adds inputs `[n, width]`, and `differences`: what is to be added to each to make it the one that the product was made for. The
    /// sums do not depend on the number of threads.
    ///
    /// # Panics
    /// The two are not equally long, or no multiple of `width`.
    pub fn add(&mut self, differences: &[f32], x: &[f32]) {
        let n = x.len() / self.width;
        assert!(n * self.width == x.len() && x.len() == differences.len(), "whole inputs and their differences");
        let x = MatRef::from_row_major_slice(x, n, self.width);
        self.power += differences.iter().map(|d| f64::from(*d) * f64::from(*d)).sum::<f64>();
        let differences = MatRef::from_row_major_slice(differences, n, self.width);
        self.sums.par_chunks_mut(TILE * self.width).enumerate().for_each(|(i, band)| {
            let n_rows = band.len() / self.width;
            let band = MatMut::from_row_major_slice_mut(band, n_rows, self.width);
            matmul(band, Accum::Add, differences.subcols(i * TILE, n_rows).transpose(), x, 1.0, Par::Seq);
        });
    }
}

/// Columns that are rounded together, by their places in the order, and their phase.
#[derive(Debug, Clone)]
struct Run {
    places: Range<usize>,
    phase: usize,
}

/// The order in which `n` columns are rounded. A trellis decides on a phase's columns together: so these follow one another.
fn runs_of(n: usize, trellis: bool) -> (Vec<usize>, Vec<Run>) {
    let (mut order, mut runs) = (Vec::with_capacity(n), Vec::new());
    let phases = if trellis { PHASES } else { 1 };
    for start in (0..n).step_by(phases * RUN_COLS) {
        for phase in 0..phases {
            let first = order.len();
            order.extend((start + phase..n.min(start + phases * RUN_COLS)).step_by(phases));
            if order.len() > first {
                runs.push(Run { places: first..order.len(), phase });
            }
        }
    }
    (order, runs)
}

/// The factor R of damped second moments, as error feedback needs it.
#[derive(Debug, Clone)]
pub struct InputFactor {
    width: usize,
    n_inputs: u64,
    trellis: bool,
    /// The order in which columns are rounded, which is that of all of the following; and where in it each column is.
    order: Vec<usize>,
    places: Vec<usize>,
    runs: Vec<Run>,
    /// R in reversed order, as a lower factor.
    reversed: Llt<f64>,
    /// `R[k][j] / R[j][j]` at `k · width + j` for k < j, else 0.
    unit: Vec<f32>,
    /// `R[j][j]`: the root mean square of what input j has that those after it do not tell.
    deviations: Vec<f32>,
    /// What the diagonal was raised by, as a share of its mean.
    damping: f64,
}

impl InputFactor {
    /// Factors moments, for codes of a trellis or for others. Where they lack rank, the diagonal is raised until they have it; inputs that were
    /// always zero leave the identity: plain rounding.
    ///
    /// # Errors
    /// Moments that are not finite.
    pub fn new(moments: &Moments, trellis: bool) -> Result<Self> {
        let n = moments.width;
        let (order, runs) = runs_of(n, trellis);
        let mut places = vec![0; n];
        order.iter().enumerate().for_each(|(place, &col)| places[col] = place);
        // Reversed, so that the lower factor of this is the upper one of the moments.
        let mut reversed = Mat::<f64>::zeros(n, n);
        let (mut trace, mut is_finite) = (0.0, true);
        moments.for_each(|i, j, v| {
            is_finite &= v.is_finite();
            let (first, last) = (places[i].min(places[j]), places[i].max(places[j]));
            reversed[(n - 1 - first, n - 1 - last)] = v;
            trace += if i == j { v } else { 0.0 };
        });
        if !is_finite {
            return Err(Error::Parameter(
                "an input of a product is infinite or not a number on the calibration text; does the model run in float32?"
                    .into(),
            ));
        }
        let mean = if trace > 0.0 { trace / n as f64 } else { 1.0 };
        let mut damping = DAMPING;
        let mut raised = 0.0;
        let factor = loop {
            (0..n).for_each(|i| reversed[(i, i)] += (damping - raised) * mean);
            raised = damping;
            match Llt::new(reversed.as_ref(), Side::Lower) {
                Ok(factor) => break factor,
                Err(_) if damping < MAX_DAMPING => damping *= 10.0,
                Err(e) => return Err(Error::Parameter(format!("the inputs' second moments have no factor: {e:?}"))),
            }
        };
        let lower = factor.L();
        let deviations: Vec<f32> = (0..n).map(|j| lower[(n - 1 - j, n - 1 - j)] as f32).collect();
        let mut unit = vec![0f32; n * n];
        unit.par_chunks_exact_mut(n).enumerate().for_each(|(k, row)| {
            for j in k + 1..n {
                row[j] = (lower[(n - 1 - k, n - 1 - j)] / lower[(n - 1 - j, n - 1 - j)]) as f32;
            }
        });
        let n_inputs = moments.n_inputs;
        Ok(Self { width: n, n_inputs, trellis, order, places, runs, reversed: factor, unit, deviations, damping })
    }

    /// Inputs of the product.
    pub fn width(&self) -> usize {
        self.width
    }

    /// What the diagonal was raised by, as a share of its mean.
    pub fn damping(&self) -> f64 {
        self.damping
    }

    /// What to do about a drift over the same inputs as the moments were summed over: D·H⁻¹, the part of the drift that the inputs
    /// themselves tell (as GPTAQ, Li et al. 2025, has it).
    ///
    /// With few inputs, some of that is chance: of drift that the inputs tell nothing of, `width / n_inputs` seems to be told. So it is
    /// shrunk to the share that is left of it without.
    ///
    /// # Errors
    /// A drift of another width.
    pub fn correction(&self, drift: &Drift) -> Result<Correction> {
        let n = self.width;
        check_width(self.width, drift.width)?;
        let mean = 1.0 / self.n_inputs.max(1) as f64;
        let mut gain = vec![0f32; n * n];
        let told: Vec<f64> = gain
            .par_chunks_mut(CHUNK_ROWS * n)
            .zip(drift.sums.par_chunks(CHUNK_ROWS * n))
            .map(|(gain, sums)| {
                let drift = |j: usize, r: usize| f64::from(sums[r * n + self.order[n - 1 - j]]) * mean;
                let mut solved = Mat::from_fn(n, sums.len() / n, drift);
                self.reversed.solve_in_place(&mut solved);
                let mut told = 0.0;
                for (r, (gain, sums)) in gain.chunks_exact_mut(n).zip(sums.chunks_exact(n)).enumerate() {
                    for (j, (gain, sum)) in gain.iter_mut().zip(sums).enumerate() {
                        let value = solved[(n - 1 - self.places[j], r)];
                        *gain = value as f32;
                        told += value * f64::from(*sum) * mean;
                    }
                }
                told
            })
            .collect();
        // Summed in order, so that it does not depend on the number of threads.
        let (told, power) = (told.iter().sum::<f64>(), drift.power * mean);
        let by_chance = n as f64 * mean;
        let share = match told > 0.0 && by_chance < 1.0 {
            true => ((1.0 - by_chance * power / told) / (1.0 - by_chance)).clamp(0.0, 1.0),
            false => 0.0,
        };
        gain.par_iter_mut().for_each(|gain| *gain *= share as f32);
        Ok(Correction { width: n, gain, share })
    }
}

/// How a product is to differ to make up for the drift of its inputs.
#[derive(Debug, Clone)]
pub struct Correction {
    width: usize,
    /// `[width, width]`, row-major: the drift to expect, by the inputs.
    gain: Vec<f32>,
    /// The share of what the inputs seemed to tell of the drift that was taken to be so.
    share: f64,
}

impl Correction {
    /// The share of what the inputs seemed to tell of the drift that was taken to be so, 0 to 1.
    pub fn share(&self) -> f64 {
        self.share
    }

    /// The matrix `[n_rows, width]` whose products with the drifted inputs come closest to those that `t` has with the inputs that it
    /// was made for.
    ///
    /// # Errors
    /// A tensor that is not a non-empty matrix of BF16, F16 or F32; another width.
    pub fn apply(&self, t: &Tensor) -> Result<Vec<f32>> {
        let (n_rows, n) = matrix_shape(t)?;
        check_width(self.width, n)?;
        let row_bytes = t.data.len() / n_rows;
        let gain = MatRef::from_row_major_slice(&self.gain, n, n);
        let mut corrected = vec![0f32; n_rows * n];
        corrected.par_chunks_mut(CHUNK_ROWS * n).zip(t.data.par_chunks(CHUNK_ROWS * row_bytes)).for_each_init(
            Vec::new,
            |weights, (out, bytes)| {
                read_row(t.dtype, bytes, out);
                weights.clear();
                weights.extend_from_slice(out);
                let n_rows = out.len() / n;
                let weights = MatRef::from_row_major_slice(weights, n_rows, n);
                matmul(MatMut::from_row_major_slice_mut(out, n_rows, n), Accum::Add, weights, gain, 1.0, Par::Seq);
            },
        );
        Ok(corrected)
    }
}

fn check_width(expected: usize, n_cols: usize) -> Result<()> {
    if n_cols == expected {
        return Ok(());
    }
    Err(Error::Parameter(format!("the matrix has {n_cols} columns, but the moments of its inputs have {expected}")))
}

/// What a matrix is rounded to with feedback.
#[derive(Debug, Clone, Copy)]
pub struct Grid<'a> {
    /// Distance of neighbouring points.
    pub step: f32,
    /// Raw bits of the coder, or none where codes are to be the nearest ones.
    pub raw_bits: Option<u32>,
    /// Codes of a trellis, in blocks of so many columns.
    pub trellis: Option<usize>,
    /// The weights to come close to, `[n_rows, n_cols]`, where these are not the matrix's own.
    pub targets: Option<&'a [f32]>,
}

/// Rows of a matrix.
struct Rows<'a> {
    tensor: &'a Tensor,
    n_cols: usize,
    row_bytes: usize,
    targets: Option<&'a [f32]>,
}

impl Rows<'_> {
    /// The weights of a row.
    fn read(&self, row: usize, out: &mut [f32]) {
        read_row(self.tensor.dtype, &self.tensor.data[row * self.row_bytes..][..self.row_bytes], out);
    }

    /// What the weights of a row are to come close to.
    fn read_target(&self, row: usize, out: &mut [f32]) {
        match self.targets {
            Some(targets) => out.copy_from_slice(&targets[row * self.n_cols..][..self.n_cols]),
            None => self.read(row, out),
        }
    }
}

/// Quantizes a matrix to a grid with error feedback. The relative error is that of the weights; it exceeds
/// that of plain rounding, as what is kept small is the error of the product. The result does not depend on the number of threads.
///
/// # Errors
/// A tensor that is not a non-empty matrix of BF16, F16 or F32; a weight that is not finite; a step that is not a positive normal
/// number; a factor of another width.
pub fn quantize_with_feedback(t: &Tensor, grid: &Grid<'_>, factor: &InputFactor) -> Result<QuantizedTensor<'static>> {
    let (n_rows, n_cols) = matrix_shape(t)?;
    let step = grid.step;
    check_width(factor.width, n_cols)?;
    if grid.trellis.is_some() != factor.trellis {
        return Err(Error::Parameter(
            "the factor is for codes of a trellis and these are not, or the other way round".into(),
        ));
    }
    if grid.targets.is_some_and(|targets| targets.len() != n_rows * n_cols || !targets.iter().all(|w| w.is_finite())) {
        return Err(Error::Parameter(format!("a matrix of {n_rows} × {n_cols} needs as many targets, all finite")));
    }
    let row_steps = row_steps(t, n_cols, step, if grid.trellis.is_some() { trellis::MAX_STEPS } else { INT8_MAX })?;
    let rows = Rows { tensor: t, n_cols, row_bytes: t.data.len() / n_rows, targets: grid.targets };
    let rounding = match grid.trellis {
        Some(block_cols) => {
            let rows = TrellisRows { tensor: t, n_cols, steps: &row_steps, block_cols };
            Rounding::Trellis { costs: rows.costs(grid.raw_bits.unwrap_or(1)), block_cols }
        }
        None => Rounding::Grid(rows.thresholds(&row_steps, grid.raw_bits)),
    };

    let mut codes = vec![0u8; n_rows * n_cols];
    let sums: Vec<Sums> = codes
        .par_chunks_mut(CHUNK_ROWS * n_cols)
        .zip(row_steps.par_chunks(CHUNK_ROWS))
        .enumerate()
        .map_init(Scratch::default, |scratch, (i, (codes, steps))| {
            rows.round(i * CHUNK_ROWS, steps, &rounding, factor, scratch, codes)
        })
        .collect();
    // Summed in order, so that the scale does not depend on the number of threads.
    let Sums { weight, cross, point, output_cross, output_point } = sums.iter().fold(Sums::default(), Sums::add);
    // The one with the least error of the products.
    let fit = if output_point > 0.0 { (1.0 + output_cross / output_point).clamp(0.5, 2.0) } else { 1.0 };
    let error = weight - 2.0 * fit * cross + fit * fit * point;
    let scales = scales_of(step, row_steps, fit);
    let relative_error = if weight > 0.0 { (error.max(0.0) / weight).sqrt() as f32 } else { 0.0 };
    Ok(QuantizedTensor { codes: Codes::U8(codes.into()), scales, relative_error })
}

/// How weights become codes.
enum Rounding {
    /// On a grid, from these fractions of a step on to the upper point.
    Grid([f32; 128]),
    /// By a trellis.
    Trellis { costs: Costs, block_cols: usize },
}

/// What a thread reuses.
#[derive(Default)]
struct Scratch {
    row: Vec<f32>,
    original: Vec<f32>,
    weights: Vec<f32>,
    errors: Vec<f32>,
    points: Vec<f32>,
    outputs: Vec<f32>,
    /// In the factor's order.
    codes: Vec<u8>,
    paths: Box<Paths>,
}

/// What a search with feedback keeps of a run's paths: each has errors of its own to make up for.
struct Paths {
    /// By state: what the columns to come are to be rounded to, in steps.
    targets: [[f32; RUN_COLS]; N_STATES],
    next: [[f32; RUN_COLS]; N_STATES],
    /// `[column][state behind it]`: the state before it, and the code.
    steps: [[(u8, i8); N_STATES]; RUN_COLS],
}

impl Default for Paths {
    fn default() -> Self {
        let none = [[0.0; RUN_COLS]; N_STATES];
        Self { targets: none, next: none, steps: [[(0, 0); N_STATES]; RUN_COLS] }
    }
}

/// A row's part of a run, in the factor's order.
struct RowRun<'a> {
    /// What the columns are to be rounded to before any of them is, and what they were before all feedback.
    targets: &'a [f32],
    original: &'a [f32],
    step: f32,
    /// What an error and a bit of each column weigh.
    weights: &'a [f32],
    /// Where the columns are in the matrix.
    cols: &'a [usize],
    block_cols: usize,
}

impl Paths {
    /// The codes of a run from `state` on that cost least, and what they stand for, by Viterbi's algorithm in which every path has its own feedback; the state
    /// behind it. `unit(j)`: what an error of column j adds to the run's columns.
    fn search<'u>(
        &mut self,
        run: &RowRun<'_>,
        unit: impl Fn(usize) -> &'u [f32],
        costs: &Costs,
        state: usize,
        codes: &mut [u8],
        points: &mut [f32],
    ) -> usize {
        let width = codes.len();
        let mut totals = [f32::INFINITY; N_STATES];
        totals[state] = 0.0;
        self.targets[state].iter_mut().zip(run.targets).for_each(|(to, target)| *to = target / run.step);
        let cheapest =
            |totals: &[f32; N_STATES]| (1..N_STATES).fold(0, |a, b| if totals[b] < totals[a] { b } else { a });
        for j in 0..width {
            if run.cols[j] % run.block_cols < PHASES {
                // A block begins, from the first state: of the paths before, the cheapest goes on.
                let best = cheapest(&totals);
                self.targets[0] = self.targets[best];
                totals = [f32::INFINITY; N_STATES];
                totals[0] = 0.0;
                if j > 0 {
                    self.steps[j - 1][0] = self.steps[j - 1][best];
                }
            }
            let mut reached = [(f32::INFINITY, 0usize, 0i8); N_STATES];
            for (before, total) in totals.iter().enumerate().filter(|(_, total)| total.is_finite()) {
                let (x, grid) = (self.targets[before][j], before >> 1);
                for parity in 0..2 {
                    let (code, cost) = trellis::branch(x, grid, parity, costs);
                    let total = total + run.weights[j] * cost;
                    let reached = &mut reached[next_state(before, parity)];
                    if total < reached.0 {
                        *reached = (total, before, code);
                    }
                }
            }
            let unit = &unit(j)[j + 1..width];
            let original = run.original[j] / run.step;
            for (state, &(total, before, code)) in reached.iter().enumerate() {
                totals[state] = total;
                if !total.is_finite() {
                    continue;
                }
                self.steps[j][state] = (before as u8, code);
                let error = original - trellis::point(code, before >> 1);
                let targets = &self.targets[before][j + 1..width];
                for ((next, target), unit) in self.next[state][j + 1..width].iter_mut().zip(targets).zip(unit) {
                    *next = target + error * unit;
                }
            }
            std::mem::swap(&mut self.targets, &mut self.next);
        }
        let end = cheapest(&totals);
        let mut state = end;
        for j in (0..width).rev() {
            let (before, code) = self.steps[j][state];
            codes[j] = code as u8;
            state = before.into();
            points[j] = trellis::point(code, state >> 1) * run.step;
        }
        end
    }
}

/// Sums over rows, from which the scale and the errors follow. A point is code · step.
#[derive(Debug, Default, Clone, Copy)]
struct Sums {
    /// Σ weight².
    weight: f64,
    /// Σ weight · point.
    cross: f64,
    /// Σ point².
    point: f64,
    /// Of some of the rows, over inputs: Σ (error's output · point's output).
    output_cross: f64,
    /// Likewise Σ (point's output)².
    output_point: f64,
}

impl Sums {
    fn add(mut self, other: &Self) -> Self {
        self.weight += other.weight;
        self.cross += other.cross;
        self.point += other.point;
        self.output_cross += other.output_cross;
        self.output_point += other.output_point;
        self
    }
}

impl Rows<'_> {
    /// From which fraction of a step on the upper point costs less, for weights as they are before any feedback.
    fn thresholds(&self, row_steps: &[f32], raw_bits: Option<u32>) -> [f32; 128] {
        let mut thresholds = [0.5f32; 128];
        let Some(raw_bits) = raw_bits else { return thresholds };
        for _ in 0..2 {
            let counts = row_steps
                .par_iter()
                .enumerate()
                .map_init(
                    || vec![0f32; self.n_cols],
                    |row, (r, step)| {
                        self.read_target(r, row);
                        let mut counts = [0u64; 128];
                        row.iter().for_each(|w| counts[usize::from(grid_magnitude(w.abs() / step, &thresholds))] += 1);
                        counts
                    },
                )
                .reduce(|| [0; 128], add_counts);
            thresholds = cheapest_thresholds(&counts, raw_bits);
        }
        thresholds
    }

    /// Rounds the rows from `first` on, `out` being their codes.
    fn round(
        &self,
        first: usize,
        steps: &[f32],
        rounding: &Rounding,
        factor: &InputFactor,
        scratch: &mut Scratch,
        out: &mut [u8],
    ) -> Sums {
        let (n, n_rows) = (self.n_cols, steps.len());
        let Scratch { row, original, weights, errors, points, outputs, codes, paths } = scratch;
        row.resize(n, 0.0);
        original.resize(n_rows * n, 0.0);
        points.resize(n_rows * n, 0.0);
        codes.resize(n_rows * n, 0);
        errors.resize(n_rows * RUN_COLS, 0.0);
        // In the factor's order, as all that follows.
        let read = |original: &mut [f32], row: &mut [f32], is_target: bool| {
            for (r, ordered) in original.chunks_exact_mut(n).enumerate() {
                if is_target {
                    self.read_target(first + r, row)
                } else {
                    self.read(first + r, row)
                }
                ordered.iter_mut().zip(&factor.order).for_each(|(w, &col)| *w = row[col]);
            }
        };
        read(original, row, true);
        weights.clone_from(original);
        let unit = MatRef::from_row_major_slice(&factor.unit, n, n);
        let mut states = vec![[0usize; PHASES]; n_rows];
        let column_weights: Vec<f32> = factor.deviations.iter().map(|d| d * d).collect();
        for Run { places, phase } in &factor.runs {
            let &Range { start, end } = places;
            let width = end - start;
            let unit_of = |j: usize| &factor.unit[(start + j) * n + start..][..width];
            for (r, step) in steps.iter().enumerate() {
                let (row, original) = (&mut weights[r * n..][start..end], &original[r * n..][start..end]);
                let (codes, points) = (&mut codes[r * n..][start..end], &mut points[r * n..][start..end]);
                let errors = &mut errors[r * RUN_COLS..][..width];
                let mut feed_back = |row: &mut [f32], points: &[f32], j: usize| {
                    errors[j] = original[j] - points[j];
                    row[j + 1..].iter_mut().zip(&unit_of(j)[j + 1..]).for_each(|(w, u)| *w += errors[j] * u);
                };
                match rounding {
                    Rounding::Grid(thresholds) => {
                        for j in 0..width {
                            let magnitude = grid_magnitude(row[j].abs() / step, thresholds);
                            codes[j] = if row[j] < 0.0 { magnitude.wrapping_neg() } else { magnitude };
                            points[j] = (f32::from(magnitude) * step).copysign(row[j]);
                            feed_back(row, points, j);
                        }
                    }
                    Rounding::Trellis { costs, block_cols } => {
                        let cols = &factor.order[start..end];
                        let weights = &column_weights[start..end];
                        let (step, block_cols) = (*step, *block_cols);
                        let run = RowRun { targets: row, original, step, weights, cols, block_cols };
                        let state = &mut states[r][*phase];
                        *state = paths.search(&run, unit_of, costs, *state, codes, points);
                        (0..width).for_each(|j| feed_back(row, points, j));
                    }
                }
            }
            if end < n {
                let errors = MatRef::from_row_major_slice_with_stride(errors, n_rows, width, RUN_COLS);
                let rest = MatMut::from_row_major_slice_mut(weights, n_rows, n).subcols_mut(end, n - end);
                matmul(rest, Accum::Add, errors, unit.submatrix(start, end, width, n - end), 1.0, Par::Seq);
            }
        }
        for (codes, out) in codes.chunks_exact(n).zip(out.chunks_exact_mut(n)) {
            codes.iter().zip(&factor.order).for_each(|(code, &col)| out[col] = *code);
        }
        let mut sums = Sums::default();
        if self.targets.is_some() {
            read(original, row, false);
        }
        for (w, p) in original.iter().zip(&*points) {
            let (w, p) = (f64::from(*w), f64::from(*p));
            sums.weight += w * w;
            sums.cross += w * p;
            sums.point += p * p;
        }
        // (Σ over k ≤ j of point_k · R_kj) / R_jj, for some of the rows: one number is to be fitted.
        let sampled = n_rows.div_ceil(FIT_STRIDE);
        outputs.clear();
        outputs.resize(sampled * n, 0.0);
        let points_of = MatRef::from_row_major_slice_with_stride(points, sampled, n, n * FIT_STRIDE.min(n_rows));
        let product = MatMut::from_row_major_slice_mut(outputs, sampled, n);
        matmul(product, Accum::Replace, points_of, unit, 1.0, Par::Seq);
        for (i, outputs) in outputs.chunks_exact(n).enumerate() {
            let row = i * FIT_STRIDE * n..(i * FIT_STRIDE + 1) * n;
            for (((output, p), w), deviation) in
                outputs.iter().zip(&points[row.clone()]).zip(&weights[row]).zip(&factor.deviations)
            {
                let output = f64::from(output + p) * f64::from(*deviation);
                sums.output_cross += f64::from(w - p) * f64::from(*deviation) * output;
                sums.output_point += output * output;
            }
        }
        sums
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::checkpoint::Dtype;
    use crate::quantize::{Scales, quantize_to_step, quantize_to_trellis};

    /// Pseudo-random numbers of about unit variance.
    pub(crate) fn noise(n: usize, seed: u64) -> Vec<f32> {
        let mut state = seed;
        let mut uniform = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 40) as f32 / (1 << 24) as f32 - 0.5
        };
        (0..n).map(|_| 2.0 * (uniform() + uniform() + uniform())).collect()
    }

    fn tensor(values: &[f32], n_cols: usize) -> Tensor {
        let data: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Tensor { name: "w".into(), dtype: Dtype::F32, shape: vec![values.len() / n_cols, n_cols], data: data.into() }
    }

    /// Inputs `[n, width]` that share a few directions.
    fn inputs(n: usize, width: usize, rank: usize, own: f32) -> Vec<f32> {
        let (directions, mut x) = (noise(rank * width, 3), noise(n * width, 4));
        let strengths = noise(n * rank, 5);
        for (x, strengths) in x.chunks_mut(width).zip(strengths.chunks(rank)) {
            for (j, x) in x.iter_mut().enumerate() {
                *x *= own;
                *x += strengths.iter().enumerate().map(|(k, s)| s * directions[k * width + j]).sum::<f32>();
            }
        }
        x
    }

    fn factor(x: &[f32], width: usize) -> InputFactor {
        let mut moments = Moments::new(width);
        moments.add(x);
        InputFactor::new(&moments, false).unwrap()
    }

    fn values(q: &QuantizedTensor<'_>, n_cols: usize) -> Vec<f32> {
        let scale = |row: usize| match &q.scales {
            Scales::Tensor(s) => *s,
            Scales::Channel(s) => s[row],
            other => panic!("{other:?}"),
        };
        (0..q.codes.len()).map(|i| f32::from(q.codes.get(i) as u8 as i8) * scale(i / n_cols)).collect()
    }

    /// Mean squared error of the outputs, relative to the outputs.
    fn output_error(w: &[f32], found: &[f32], x: &[f32], n_cols: usize) -> f64 {
        let (mut error, mut total) = (0.0, 0.0);
        for x in x.chunks(n_cols) {
            for (w, found) in w.chunks(n_cols).zip(found.chunks(n_cols)) {
                let dot = |w: &[f32]| w.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum::<f64>();
                error += (dot(w) - dot(found)).powi(2);
                total += dot(w).powi(2);
            }
        }
        if total > 0.0 { error / total } else { error }
    }

    #[test]
    fn moments_are_sums_of_products_on_any_number_of_threads() {
        // More than one tile, and a last one that is not full.
        let (n, width) = (40, TILE + 37);
        let x = inputs(n, width, 3, 1.0);
        let sums = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut moments = Moments::new(width);
            pool.install(|| x.chunks(8 * width).for_each(|x| moments.add(x)));
            moments
        };
        let moments = sums(3);
        assert_eq!(moments.tiles, sums(1).tiles);
        assert_eq!((moments.width(), moments.n_inputs()), (width, n as u64));
        let mut n_seen = 0;
        moments.for_each(|i, j, mean| {
            n_seen += 1;
            let expected: f64 = x.chunks(width).map(|x| f64::from(x[i]) * f64::from(x[j])).sum::<f64>() / n as f64;
            assert!((mean - expected).abs() < 1e-4 * (1.0 + expected.abs()), "{i} {j}: {mean}, expected {expected}");
        });
        assert_eq!(n_seen, width * (width + 1) / 2);
    }

    #[test]
    fn the_factor_is_one_of_the_moments() {
        let width = 12;
        let x = inputs(100, width, 3, 0.5);
        let mut moments = Moments::new(width);
        moments.add(&x);
        let mut mean = vec![0.0; width * width];
        moments.for_each(|i, j, v| {
            mean[i * width + j] = v;
            mean[j * width + i] = v;
        });
        let raised = DAMPING * (0..width).map(|i| mean[i * width + i]).sum::<f64>() / width as f64;
        (0..width).for_each(|i| mean[i * width + i] += raised);
        let factor = InputFactor::new(&moments, false).unwrap();
        let r = |k: usize, j: usize| {
            let unit = if k == j { 1.0 } else { f64::from(factor.unit[k * width + j]) };
            unit * f64::from(factor.deviations[j])
        };
        for i in 0..width {
            for k in 0..width {
                let product: f64 = (0..width).map(|j| r(i, j) * r(k, j)).sum();
                assert!((product - mean[i * width + k]).abs() < 1e-5 * mean[0], "{i} {k}");
            }
        }
    }

    #[test]
    fn feedback_lowers_the_error_of_the_products() {
        let (n_rows, n_cols) = (70, 150);
        let (w, x) = (noise(n_rows * n_cols, 1), inputs(600, n_cols, 20, 0.3));
        let t = tensor(&w, n_cols);
        let factor = factor(&x, n_cols);
        for (step, raw_bits) in [(0.1, None), (0.4, Some(0)), (1.0, Some(0)), (0.1, Some(2))] {
            let grid = Grid { step, raw_bits, trellis: None, targets: None };
            let found = quantize_with_feedback(&t, &grid, &factor).unwrap();
            let plain = quantize_to_step(&t, step, raw_bits).unwrap();
            let error = |q| output_error(&w, &values(q, n_cols), &x, n_cols);
            assert!(error(&found) < 0.5 * error(&plain), "{step}: {} against {}", error(&found), error(&plain));
            // It costs no bits to speak of.
            assert!(found.codes.entropy_bits() < plain.codes.entropy_bits() + 0.1);
            assert!(found.relative_error >= plain.relative_error);
        }
    }

    #[test]
    fn a_trellis_lowers_the_error_at_the_same_bits() {
        // Blocks that end within a run, and rows of several.
        for (n_rows, n_cols, block_cols) in [(70, 530, 544), (30, 530, 96), (5, 3, 32)] {
            let (w, x) = (noise(n_rows * n_cols, 1), inputs(1200, n_cols, 20, 0.3));
            let t = tensor(&w, n_cols);
            let mut moments = Moments::new(n_cols);
            moments.add(&x);
            let factor = InputFactor::new(&moments, true).unwrap();
            let plain_factor = InputFactor::new(&moments, false).unwrap();
            let grid = |step, trellis| Grid { step, raw_bits: Some(2), trellis, targets: None };
            let of_stream = |q: &QuantizedTensor<'static>| {
                output_error(&w, &values(&q.clone().decoded(n_cols, block_cols), n_cols), &x, n_cols)
            };
            // As many bits: each grid has the same distance.
            let found = quantize_with_feedback(&t, &grid(0.2, Some(block_cols)), &factor).unwrap();
            let plain = quantize_with_feedback(&t, &grid(0.4, None), &plain_factor).unwrap();
            let without = quantize_to_trellis(&t, 0.2, 2, block_cols).unwrap();
            let plain_error = output_error(&w, &values(&plain, n_cols), &x, n_cols);
            let (error, bits) = (of_stream(&found), found.codes.entropy_bits());
            assert!(error < 0.5 * of_stream(&without) || n_cols < 64, "{error}");
            if n_cols > 64 {
                assert!(bits < plain.codes.entropy_bits() + 0.02, "{bits} {}", plain.codes.entropy_bits());
                assert!(error < 0.9 * plain_error, "{n_rows} {block_cols}: {error} against {plain_error}");
            }
            assert!(quantize_with_feedback(&t, &grid(0.2, None), &factor).is_err());
        }
    }

    #[test]
    fn correction_brings_drifted_products_back() {
        let (n_rows, n_cols) = (70, 40);
        let w = noise(n_rows * n_cols, 1);
        let x = inputs(500, n_cols, 12, 0.3);
        // What drifts is a combination of the inputs: so the products can be had back.
        let drifted: Vec<f32> = x
            .chunks(n_cols)
            .flat_map(|x| x.iter().enumerate().map(|(j, v)| 0.8 * v + 0.2 * x[(j + 1) % x.len()]).collect::<Vec<_>>())
            .collect();
        let mut drift = Drift::new(n_cols);
        let differences: Vec<f32> = x.iter().zip(&drifted).map(|(x, d)| x - d).collect();
        for (d, x) in differences.chunks(100 * n_cols).zip(drifted.chunks(100 * n_cols)) {
            drift.add(d, x);
        }
        let (t, factor) = (tensor(&w, n_cols), factor(&drifted, n_cols));
        let correction = factor.correction(&drift).unwrap();
        assert!(correction.share() > 0.9, "{}", correction.share());
        let corrected = correction.apply(&t).unwrap();
        // Outputs of one matrix over one kind of inputs, against those of the other over the other.
        let error = |found: &[f32]| {
            let (mut error, mut total) = (0f64, 0f64);
            for (x, drifted) in x.chunks(n_cols).zip(drifted.chunks(n_cols)) {
                for (w, found) in w.chunks(n_cols).zip(found.chunks(n_cols)) {
                    let dot = |w: &[f32], x: &[f32]| w.iter().zip(x).map(|(w, x)| f64::from(w * x)).sum::<f64>();
                    error += (dot(w, x) - dot(found, drifted)).powi(2);
                    total += dot(w, x).powi(2);
                }
            }
            error / total
        };
        assert!(error(&corrected) < 0.2 * error(&w), "{} against {}", error(&corrected), error(&w));
        let none = factor.correction(&Drift::new(n_cols)).unwrap().apply(&t).unwrap();
        assert_eq!(none, w);
        // Drift of which the inputs tell nothing, but by chance.
        let mut drift = Drift::new(n_cols);
        drift.add(&noise(drifted.len(), 8), &drifted);
        let share = factor.correction(&drift).unwrap().share();
        assert!(share < 0.3, "{share}");
        assert!(factor.correction(&Drift::new(n_cols + 1)).is_err());

        let grid = Grid { step: 0.1, raw_bits: Some(0), trellis: None, targets: Some(&corrected) };
        let q = quantize_with_feedback(&t, &grid, &factor).unwrap();
        assert!(error(&values(&q, n_cols)) < 0.3 * error(&w));
        let grid = Grid { targets: Some(&corrected[1..]), ..grid };
        assert!(quantize_with_feedback(&t, &grid, &factor).is_err());
    }

    #[test]
    fn any_moments_have_a_factor() {
        let width = 80;
        for x in [
            vec![0.0; 3 * width],
            noise(width, 1),
            inputs(2000, width, 1, 0.0),
            vec![1e-20; width],
            (0..width).map(|j| if j == 7 { 1e15 } else { 1e-3 }).collect(),
            Vec::new(),
        ] {
            let factor = factor(&x, width);
            assert!(factor.deviations.iter().chain(&factor.unit).all(|v| v.is_finite()));
            assert!(factor.deviations.iter().all(|d| *d > 0.0), "{:?}", factor.deviations);
            let w = noise(33 * width, 2);
            let grid = Grid { step: 0.3, raw_bits: Some(0), trellis: None, targets: None };
            let q = quantize_with_feedback(&tensor(&w, width), &grid, &factor).unwrap();
            assert!(values(&q, width).iter().all(|v| v.is_finite()));
        }
        let mut moments = Moments::new(width);
        moments.add(&vec![f32::NAN; width]);
        assert!(InputFactor::new(&moments, false).unwrap_err().to_string().contains("not a number"));
    }

    #[test]
    fn degenerate_matrices() {
        let (n_rows, n_cols) = (65, 130);
        let factor = factor(&inputs(500, n_cols, 9, 0.3), n_cols);
        let rank_one: Vec<f32> = {
            let (a, b) = (noise(n_rows, 1), noise(n_cols, 2));
            a.iter().flat_map(|a| b.iter().map(move |b| a * b)).collect()
        };
        let mut outlier = noise(n_rows * n_cols, 6);
        outlier[1234] = 1e6;
        for (w, step) in [
            (vec![0.0; n_rows * n_cols], 1.0),
            (vec![0.7; n_rows * n_cols], 0.3),
            (rank_one, 0.2),
            (outlier.clone(), 0.2),
        ] {
            let grid = Grid { step, raw_bits: Some(0), trellis: None, targets: None };
            let q = quantize_with_feedback(&tensor(&w, n_cols), &grid, &factor).unwrap();
            assert!(q.relative_error.is_finite() && q.relative_error < 0.7, "{}", q.relative_error);
            let found = values(&q, n_cols);
            assert!(found.iter().all(|v| v.is_finite()));
            if w[0] == 0.0 && w[1234] == 0.0 {
                assert!(found.iter().all(|v| *v == 0.0));
            }
        }
        // The outlier's row takes a coarser step; the others keep theirs.
        let grid = Grid { step: 0.2, raw_bits: Some(0), trellis: None, targets: None };
        let q = quantize_with_feedback(&tensor(&outlier, n_cols), &grid, &factor).unwrap();
        let Scales::Channel(scales) = &q.scales else { panic!("a row has its own step") };
        let row = 1234 / n_cols;
        assert!(scales.iter().enumerate().all(|(r, s)| (*s > 1.0) == (r == row)));
        assert!((f64::from(values(&q, n_cols)[1234]) - 1e6).abs() < 1e4);

        let wrong = tensor(&[0.0; 20], 10);
        assert!(quantize_with_feedback(&wrong, &grid, &factor).unwrap_err().to_string().contains("130"));
        let nan = tensor(&vec![f32::NAN; n_cols], n_cols);
        assert!(quantize_with_feedback(&nan, &grid, &factor).is_err());
        let grid = Grid { step: 0.0, ..grid };
        assert!(quantize_with_feedback(&tensor(&outlier, n_cols), &grid, &factor).is_err());
    }
}
