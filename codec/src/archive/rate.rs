//! Format `rate`: the steps of all tensors, chosen so that the archive gets the size that the user asked for.
//!
//! A tensor's step is θ · rms(weights) · the weight of its role; θ is the same for the whole model and is found by bisection on
//! the size. With uniform quantization at high rate, equal slopes dD/dR over tensors mean equal weighted errors,
//! whatever the tensors' bits: so one number suffices.
//!
//! A code has 8 bits, so a grid ends at 255 points a row: about 7.3 bits a weight. Where the target is beyond, some matrices are
//! kept as they are, as `bf16`, and the others have what is left.

use super::layers::{is_embedding_or_head, last_module};
use super::{Progress, check_stopped};
use crate::block::{BLOCK_ROWS, Params};
use crate::checkpoint::{Checkpoint, Tensor};
use crate::encoded::{Checks, EncodeOptions, EncodedTensor, encode_tensor};
use crate::error::{Error, Result};
use crate::format::Format;
use crate::quantize::{matrix_shape, nearby_codes, quantize_to_step, quantize_to_trellis};
use bytes::Bytes;
use rayon::prelude::*;
use std::collections::{HashMap, HashSet};

/// What `rate` aims at.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RateTarget {
    /// Bits a weight: all bytes of the archive's weight files over all weights of the model.
    Bits(f64),
    /// Bits a weight of the selected matrices alone: all of their bytes over all of their weights.
    MatrixBits(f64),
    /// Bytes of the archive's weight files.
    Bytes(u64),
    /// θ itself: a step of this many standard deviations for a tensor of weight 1, whatever size results.
    Step(f64),
}

impl std::fmt::Display for RateTarget {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Bits(bits) => write!(f, "{bits} bits/weight"),
            Self::MatrixBits(bits) => write!(f, "{bits} bits/weight of the selected matrices"),
            Self::Bytes(bytes) => write!(f, "{bytes} bytes"),
            Self::Step(step) => write!(f, "step {step}"),
        }
    }
}

/// Weights that a model's size is estimated from, in equal shares of its tensors but not fewer than `MIN_SAMPLE` of one; whole
/// row blocks, so at least 32 rows.
const SAMPLE_WEIGHTS: usize = 1 << 24;
const MIN_SAMPLE: usize = 1 << 18;
/// About what a shard's header takes for a tensor, its name aside, and what the provenance takes.
const LISTING_BYTES: usize = 90;
const PROVENANCE_BYTES: usize = 2500;
/// θ lies between these: from finer than any 8-bit code resolves, to zeros only.
const THETA: (f64, f64) = (1e-3, 30.0);
/// Where grids do not reach a target, it may be missed by this part of it, rather than that one more matrix is kept exact.
const SHORTFALL: f64 = 0.004;

/// How coarse a step a tensor takes relative to others of the model, by its role: √(weights / sensitivity), where the
/// sensitivity is the KL divergence that quantizing this role alone causes at a given relative error.
///
/// Measured on two Llamas of 5 and 50 million weights, which agree to 15 %; keys and values once the number of query heads that
/// share them is taken out. Against equal relative errors this saves 17 % of the divergence.
///
/// `n_rows_of`: the rows of another tensor of the model.
fn role_weight(name: &str, n_rows: usize, n_rows_of: impl Fn(&str) -> Option<usize>) -> f64 {
    let shared = |weight: f64, role: &str| {
        let query = n_rows_of(&name.replace(role, "q_proj"));
        let share = query.map_or(1.0, |query| n_rows as f64 / query as f64);
        weight * share.min(1.0).sqrt()
    };
    match last_module(name) {
        _ if is_embedding_or_head(name) => 0.76,
        "q_proj" => 1.58,
        "k_proj" => shared(1.42, "k_proj"),
        "v_proj" => shared(0.72, "v_proj"),
        "o_proj" => 0.95,
        "gate_proj" => 1.11,
        "up_proj" => 1.31,
        _ => 1.0,
    }
}

/// A tensor as far as its size depends on θ.
struct Candidate {
    n_weights: usize,
    sample: Tensor,
    /// Step at θ = 1.
    unit: f64,
    /// The weight of its role, which is part of `unit`.
    role: f64,
    /// Whether codes are a trellis'.
    trellis: bool,
    /// Bits a weight as `bf16`, where it is kept so.
    exact: Option<f64>,
    /// The coder's parameters. Its size is smooth in θ only while these stay as they are.
    params: Option<Params>,
    /// Bits a weight beyond the entropy of the codes.
    overhead: f64,
}

impl Candidate {
    /// Of a matrix whose role has the weight `role`.
    fn new(tensor: &Tensor, role: f64, sample_weights: usize, trellis: bool) -> Result<Self> {
        let (n_rows, n_cols) = matrix_shape(tensor)?;
        let row_bytes = tensor.data.len() / n_rows;
        let n_blocks = n_rows.div_ceil(BLOCK_ROWS);
        let wanted = sample_weights.div_ceil(BLOCK_ROWS * n_cols).clamp(1, n_blocks);
        let mut data = Vec::new();
        for i in 0..wanted {
            let first = i * n_blocks / wanted * BLOCK_ROWS;
            let end = (first + BLOCK_ROWS).min(n_rows);
            data.extend_from_slice(&tensor.data[first * row_bytes..end * row_bytes]);
        }
        let shape = vec![data.len() / row_bytes, n_cols];
        let sample = Tensor { name: tensor.name.clone(), dtype: tensor.dtype, shape, data: Bytes::from(data) };
        let rms = crate::quantize::rms(&sample)?;
        let unit = if rms > 0.0 { rms * role } else { 1.0 };
        let n_weights = n_rows * n_cols;
        Ok(Self { n_weights, sample, unit, role, trellis, exact: None, params: None, overhead: 0.05 })
    }

    fn step(&self, theta: f64) -> f32 {
        ((theta * self.unit) as f32).max(f32::MIN_POSITIVE)
    }

    fn entropy(&self, theta: f64) -> Result<f64> {
        let step = self.step(theta);
        Ok(match self.trellis {
            true => nearby_codes(&self.sample, step)?.entropy_bits(),
            false => quantize_to_step(&self.sample, step, None)?.codes.entropy_bits(),
        })
    }

    fn bits(&self, theta: f64) -> Result<f64> {
        let bits = match self.exact {
            Some(bits) => bits,
            None => self.entropy(theta)? + self.overhead,
        };
        Ok(bits * self.n_weights as f64)
    }

    /// How the tensor is encoded.
    fn options(&self, theta: f64, options: &EncodeOptions) -> EncodeOptions {
        match self.exact {
            Some(_) => kept_exact(options),
            None => EncodeOptions { step: Some(self.step(theta)), params: self.params, ..*options },
        }
    }

    /// Learns the overhead from encoding the sample; the parameters that were chosen for it.
    fn measure_overhead(&mut self, theta: f64, options: &EncodeOptions) -> Result<Option<Params>> {
        if self.exact.is_some() {
            return Ok(None);
        }
        let (bits, params) = self.encoded_bits(&self.options(theta, options))?;
        self.overhead = bits - self.entropy(theta)?;
        Ok(params)
    }

    /// Bits a weight of the tensor, from encoding the sample; the coder's parameters.
    fn encoded_bits(&self, options: &EncodeOptions) -> Result<(f64, Option<Params>)> {
        let encoded = EncodedTensor::parse(encode_tensor(&self.sample, options)?.into(), Checks::None)?;
        let sizes = encoded.sizes();
        let fixed = sizes.header + sizes.tables + sizes.padding;
        let bits_of = |bytes: u64, n: usize| 8.0 * bytes as f64 / n as f64;
        let bits = bits_of(sizes.total() - fixed, self.sample.shape[0] * self.sample.shape[1])
            + bits_of(fixed, self.n_weights);
        Ok((bits, encoded.params().copied()))
    }

    /// What it takes and saves to keep the tensor as it is rather than on its finest grid.
    fn exactness(&self, options: &EncodeOptions) -> Result<Exactness> {
        let (bits, _) = self.encoded_bits(&kept_exact(options))?;
        let finest = match self.trellis {
            true => quantize_to_trellis(&self.sample, self.step(THETA.0), 6, self.sample.shape[1])?,
            false => quantize_to_step(&self.sample, self.step(THETA.0), None)?,
        };
        let error = f64::from(finest.relative_error);
        let n_weights = self.n_weights as f64;
        Ok(Exactness {
            bits,
            more_bits: bits * n_weights - self.bits(THETA.0)?,
            saved: n_weights * (error / self.role).powi(2),
        })
    }
}

/// How a tensor is encoded that is kept as it is.
fn kept_exact(options: &EncodeOptions) -> EncodeOptions {
    EncodeOptions { format: Format::Bf16, step: None, trellis: false, params: None, ..*options }
}

/// A tensor as `bf16`, against its finest grid.
struct Exactness {
    /// Bits a weight.
    bits: f64,
    /// Bits that it takes more.
    more_bits: f64,
    /// What it saves: its part of the model's divergence, in a unit that all tensors share.
    saved: f64,
}

/// How a tensor is to be encoded.
#[derive(Debug, Clone)]
pub struct PlannedTensor {
    /// Its name.
    pub name: String,
    /// Step and parameters; `bf16` where it is kept as it is.
    pub options: EncodeOptions,
    /// The bits that it is expected to take, as its share of the target; none where the target is a step.
    pub bits: Option<f64>,
}

/// How each of the selected tensors is encoded, in the order of the checkpoint.
///
/// # Errors
/// A target that the format cannot meet: the message says what it can.
pub(super) fn choose_steps(
    source: &Checkpoint,
    selected: &HashSet<&str>,
    target: RateTarget,
    options: &EncodeOptions,
    progress: &dyn Progress,
) -> Result<Vec<PlannedTensor>> {
    let sample_weights = sample_weights(selected.len());
    let mut candidates = Vec::new();
    for info in source.tensors().iter().filter(|t| selected.contains(t.name.as_str())) {
        check_stopped(progress)?;
        let role = role_weight(&info.name, info.shape[0], |name| source.info(name).map(|other| other.shape[0]));
        let tensor = source.tensor(&info.name)?;
        candidates
            .push(Candidate::new(&tensor, role, sample_weights, options.trellis).map_err(|e| e.in_tensor(&info.name))?);
    }
    let n_weights = source.tensors().iter().map(|t| t.n_elements() as f64).sum();
    let kept = source.tensors().iter().filter(|t| !selected.contains(t.name.as_str()));
    let kept: f64 = kept.map(|t| 8.0 * t.n_bytes as f64).sum();
    let listed: usize = source.tensors().iter().map(|t| t.name.len() + LISTING_BYTES).sum();
    let kept = kept + 8.0 * (listed + PROVENANCE_BYTES) as f64;
    let goal = Goal { target, n_weights, kept, options, keeps_exact: true };
    let theta = search(&mut candidates, &goal, progress)?;
    let is_sized = !matches!(target, RateTarget::Step(_));
    candidates
        .par_iter()
        .map(|c| {
            let bits = if is_sized { Some(c.bits(theta)?) } else { None };
            Ok(PlannedTensor { name: c.sample.name.clone(), options: c.options(theta, options), bits })
        })
        .collect()
}

/// How each of some matrices in memory is encoded, in their order, so that together they meet the target; their names tell their
/// roles.
///
/// # Errors
/// A tensor that cannot be encoded; a target that the format cannot meet; [`Error::Interrupted`].
pub fn steps_of(
    tensors: &[Tensor],
    target: RateTarget,
    options: &EncodeOptions,
    progress: &dyn Progress,
) -> Result<Vec<EncodeOptions>> {
    let sample_weights = sample_weights(tensors.len());
    let n_rows: HashMap<&str, usize> = tensors.iter().map(|t| (t.name.as_str(), t.shape[0])).collect();
    let mut candidates = Vec::new();
    for tensor in tensors {
        check_stopped(progress)?;
        let role = role_weight(&tensor.name, tensor.shape[0], |name| n_rows.get(name).copied());
        candidates.push(
            Candidate::new(tensor, role, sample_weights, options.trellis).map_err(|e| e.in_tensor(&tensor.name))?,
        );
    }
    let n_weights = candidates.iter().map(|c| c.n_weights as f64).sum();
    let goal = Goal { target, n_weights, kept: 0.0, options, keeps_exact: false };
    let theta = search(&mut candidates, &goal, progress)?;
    Ok(candidates.iter().map(|c| c.options(theta, options)).collect())
}

/// Weights that each of `n` tensors' sizes are estimated from.
fn sample_weights(n: usize) -> usize {
    (SAMPLE_WEIGHTS / n.max(1)).max(MIN_SAMPLE)
}

/// What a search is for.
struct Goal<'a> {
    target: RateTarget,
    /// The whole model's.
    n_weights: f64,
    /// Bits of what is not encoded.
    kept: f64,
    options: &'a EncodeOptions,
    /// Whether candidates may be kept as `bf16`, where grids do not reach the target.
    keeps_exact: bool,
}

/// The θ that meets the target.
fn search(candidates: &mut [Candidate], goal: &Goal<'_>, progress: &dyn Progress) -> Result<f64> {
    let wanted = match goal.target {
        RateTarget::Step(theta) => return Ok(theta),
        RateTarget::Bits(bits) => bits * goal.n_weights - goal.kept,
        RateTarget::MatrixBits(bits) => bits * candidates.iter().map(|c| c.n_weights as f64).sum::<f64>(),
        RateTarget::Bytes(bytes) => 8.0 * bytes as f64 - goal.kept,
    };
    let mut theta = theta_for(candidates, wanted, goal)?;
    // The first two looks are at what the encoder chooses and what that costs; the choice then stands.
    for fixed in [false, true, true] {
        check_stopped(progress)?;
        candidates.par_iter_mut().try_for_each(|c| {
            let params = c.measure_overhead(theta, goal.options)?;
            c.params = params.filter(|_| fixed);
            Ok::<_, Error>(())
        })?;
        theta = theta_for(candidates, wanted, goal)?;
    }
    Ok(theta)
}

/// The θ at which the candidates take `wanted` bits together.
fn theta_for(candidates: &mut [Candidate], wanted: f64, goal: &Goal<'_>) -> Result<f64> {
    let (mut low, mut high) = THETA;
    let missing = wanted - total_bits(candidates, low)?;
    if missing > 0.0 && goal.keeps_exact {
        keep_exact(candidates, missing, SHORTFALL * wanted, goal.options)?;
    }
    let (least, most) = (total_bits(candidates, high)?, total_bits(candidates, low)?);
    if !(least..=most / (1.0 - SHORTFALL)).contains(&wanted) {
        return Err(out_of_reach(candidates, wanted, goal)?);
    }
    let wanted = wanted.min(most);
    while high / low > 1.0005 {
        let middle = (low * high).sqrt();
        if total_bits(candidates, middle)? > wanted { low = middle } else { high = middle }
    }
    Ok((low * high).sqrt())
}

/// Why no steps and no choice of exact candidates take `wanted` bits.
fn out_of_reach(candidates: &mut [Candidate], wanted: f64, goal: &Goal<'_>) -> Result<Error> {
    candidates.iter_mut().for_each(|c| c.exact = None);
    let (least, finest) = (total_bits(candidates, THETA.1)?, total_bits(candidates, THETA.0)?);
    if goal.keeps_exact {
        keep_exact(candidates, f64::INFINITY, 0.0, goal.options)?;
    }
    let most = total_bits(candidates, THETA.0)?;
    let of_model = |bits: f64| (bits + goal.kept) / goal.n_weights;
    let found = format!("no steps give {:.2} bits/weight", of_model(wanted));
    Ok(Error::Parameter(match (finest..most).contains(&wanted) {
        true => format!(
            "{found}: the finest grids of 8-bit codes take {:.2}, and to keep any matrix as it is takes too much more",
            of_model(finest)
        ),
        false => format!(
            "{found}: this model takes between {:.2} and {:.2} as `rate`, what is not encoded included",
            of_model(least),
            of_model(most)
        ),
    }))
}

/// Bits of all candidates, summed in their order, so that they do not depend on the number of threads.
fn total_bits(candidates: &[Candidate], theta: f64) -> Result<f64> {
    let bits: Vec<f64> = candidates.par_iter().map(|c| c.bits(theta)).collect::<Result<_>>()?;
    Ok(bits.iter().sum())
}

/// Keeps candidates as `bf16` that take `missing` bits more than on their finest grids: those first that save most for their bits.
/// Where no other is small enough and more than `shortfall` still is missing, one is kept that takes too much, for which the others'
/// steps then make up.
fn keep_exact(candidates: &mut [Candidate], mut missing: f64, shortfall: f64, options: &EncodeOptions) -> Result<()> {
    let found: Vec<Exactness> = candidates.par_iter().map(|c| c.exactness(options)).collect::<Result<_>>()?;
    let may_gain = |i: &usize| candidates[*i].exact.is_none() && found[*i].saved > 0.0;
    let mut order: Vec<usize> = (0..found.len()).filter(may_gain).collect();
    let worth = |i: &usize| found[*i].saved / found[*i].more_bits.max(f64::MIN_POSITIVE);
    order.sort_by(|a, b| worth(b).total_cmp(&worth(a)));
    let mut too_large = Vec::new();
    for i in order {
        if found[i].more_bits <= missing {
            missing -= found[i].more_bits;
            candidates[i].exact = Some(found[i].bits);
        } else {
            too_large.push(i);
        }
    }
    let smallest = too_large.into_iter().min_by(|a, b| found[*a].more_bits.total_cmp(&found[*b].more_bits));
    if let Some(i) = smallest.filter(|_| missing > shortfall) {
        candidates[i].exact = Some(found[i].bits);
    }
    Ok(())
}
