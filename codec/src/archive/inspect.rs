//! Where an archive's bytes go.

use super::layers::model_order;
use super::provenance::{PROVENANCE_FILE, Provenance};
use super::{Progress, check_stopped};
use crate::checkpoint::{Checkpoint, Dtype, INDEX_FILE, TensorInfo};
use crate::encoded::{Checks, EncodedTensor, ScaleKind, Sizes};
use crate::error::Result;
use crate::{Cpu, block::Params};
use bytes::Bytes;
use serde::{Serialize, Serializer};
use std::path::Path;

/// Bits per weight by what they are for; they add up to a tensor's bits per weight.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct BitsSplit {
    /// Entropy-coded streams, without the lanes' first words.
    pub payload: f64,
    /// Raw bits.
    pub raw: f64,
    /// Frequency tables.
    pub tables: f64,
    /// Offsets of streams, patches or frames.
    pub offsets: f64,
    /// The coder's states: first words of the lanes.
    pub states: f64,
    /// Scales.
    pub scales: f64,
    /// Weights that the parts cannot express.
    pub patches: f64,
    /// Headers.
    pub header: f64,
    /// Padding to alignments.
    pub padding: f64,
}

impl BitsSplit {
    fn new(sizes: &Sizes, n_weights: u64) -> Self {
        let bits = |bytes: u64| per_weight(bytes, n_weights);
        let Sizes { header, tables, scales, offsets, patches, raw, states, payload, padding } = *sizes;
        Self {
            payload: bits(payload),
            raw: bits(raw),
            tables: bits(tables),
            offsets: bits(offsets),
            states: bits(states),
            scales: bits(scales),
            patches: bits(patches),
            header: bits(header),
            padding: bits(padding),
        }
    }
}

/// The coder's parameters, as JSON names them.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct CoderParams {
    /// Weights that a table look-up yields.
    pub parts_per_symbol: u32,
    /// The table has 2^`table_bits` slots.
    pub table_bits: u32,
    /// Bits of a weight that are stored as they are.
    pub raw_bits: u32,
    /// Bits of a weight that are entropy-coded.
    pub part_bits: u32,
    /// Columns of a block.
    pub block_cols: u32,
    /// Whether the codes are a trellis'.
    pub trellis: bool,
}

impl From<&Params> for CoderParams {
    fn from(p: &Params) -> Self {
        Self {
            parts_per_symbol: p.parts_per_symbol,
            table_bits: p.table_bits,
            raw_bits: p.raw_bits,
            part_bits: p.part_bits,
            block_cols: p.block_cols,
            trellis: p.trellis,
        }
    }
}

/// One tensor of an archive.
#[derive(Debug, Clone, Serialize)]
pub struct TensorReport {
    /// Its name.
    pub name: String,
    /// The shape of the weights, outermost first.
    pub shape: Vec<usize>,
    /// The number format, or the dtype where it is not encoded.
    pub format: String,
    /// The coder, or `none`.
    pub coder: String,
    /// What shares a scale: `none`, `tensor` or `channel`.
    pub scale: &'static str,
    /// Number of weights.
    pub n_weights: u64,
    /// Bytes in the archive.
    pub bytes: u64,
    /// Order-0 entropy of the codes in bits per weight; none where it is not encoded.
    pub entropy_bits: Option<f64>,
    /// All bits over the number of weights.
    pub bits_per_weight: f64,
    /// 16 over the bits per weight.
    pub ratio_bf16: f64,
    /// ‖W − Ŵ‖ / ‖W‖.
    pub relative_error: f32,
    /// The coder's parameters; none without `rans`.
    pub params: Option<CoderParams>,
    /// The bits by what they are for; none where it is not encoded.
    pub bits: Option<BitsSplit>,
}

/// Sums over tensors.
#[derive(Debug, Clone, Serialize)]
pub struct Total {
    /// Number of weights.
    pub n_weights: u64,
    /// Bytes.
    pub bytes: u64,
    /// All bits over the number of weights.
    pub bits_per_weight: f64,
    /// 16 over the bits per weight.
    pub ratio_bf16: f64,
}

impl Total {
    fn new(n_weights: u64, bytes: u64) -> Self {
        let bits_per_weight = per_weight(bytes, n_weights);
        Self { n_weights, bytes, bits_per_weight, ratio_bf16: ratio(bits_per_weight) }
    }
}

/// The tensors that are encoded, in sum.
#[derive(Debug, Clone, Serialize)]
pub struct EncodedTotal {
    /// Weights and bytes.
    #[serde(flatten)]
    pub total: Total,
    /// Order-0 entropy of the codes: the mean over the weights.
    pub entropy_bits: f64,
    /// The bits by what they are for.
    pub bits: BitsSplit,
}

/// What [`inspect`] finds.
#[derive(Debug, Clone, Serialize)]
pub struct Inspection {
    /// The tensors in the model's order.
    pub tensors: Vec<TensorReport>,
    /// The whole model: encoded and other tensors, safetensors headers, index and provenance.
    pub total: Total,
    /// The encoded tensors alone; none where there is none.
    pub encoded: Option<EncodedTotal>,
    /// What the archive was made from, and how; none for a plain checkpoint.
    #[serde(serialize_with = "provenance_summary")]
    pub provenance: Option<Provenance>,
}

/// The provenance without the hashes of the archive's own files.
fn provenance_summary<S: Serializer>(provenance: &Option<Provenance>, serializer: S) -> Result<S::Ok, S::Error> {
    provenance
        .as_ref()
        .map(|p| serde_json::json!({"version": p.version, "options": p.options, "source": p.source}))
        .serialize(serializer)
}

/// Reports on every tensor of an archive or a checkpoint. Decodes each, for the entropy of its codes.
///
/// # Errors
/// A directory that cannot be read; a tensor that is damaged.
pub fn inspect(dir: &Path, progress: &dyn Progress) -> Result<Inspection> {
    let checkpoint = Checkpoint::open(dir)?;
    let provenance = match dir.join(PROVENANCE_FILE).exists() {
        true => Some(Provenance::open(dir)?),
        false => None,
    };
    progress.begin(checkpoint.tensors().iter().map(|t| t.n_bytes as u64).sum());
    let mut tensors = Vec::new();
    let (mut encoded_sizes, mut encoded_weights, mut entropy) = (Sizes::default(), 0, 0.0);
    let mut names: Vec<&str> = checkpoint.names().collect();
    names.sort_by_cached_key(|name| model_order(name));
    for name in names {
        check_stopped(progress)?;
        progress.tensor(name);
        let Some(info) = checkpoint.info(name) else { continue };
        let data = if info.dtype == Dtype::U8 { checkpoint.tensor(name)?.data } else { Bytes::new() };
        if EncodedTensor::is_encoded(&data) {
            let encoded = EncodedTensor::parse(data, Checks::Full).map_err(|e| e.in_tensor(name))?;
            let report = encoded_report(name, &encoded)?;
            encoded_sizes += encoded.sizes();
            encoded_weights += report.n_weights;
            entropy += report.entropy_bits.unwrap_or(0.0) * report.n_weights as f64;
            tensors.push(report);
        } else {
            tensors.push(plain_report(info));
        }
        progress.advance(info.n_bytes as u64);
    }
    let file_bytes = |name: &str| std::fs::metadata(dir.join(name)).map_or(0, |m| m.len());
    let shard_bytes: u64 = checkpoint.shards().iter().map(|s| s.n_bytes).sum();
    let index_bytes = if checkpoint.is_indexed() { file_bytes(INDEX_FILE) } else { 0 };
    Ok(Inspection {
        total: Total::new(
            tensors.iter().map(|t| t.n_weights).sum(),
            shard_bytes + index_bytes + file_bytes(PROVENANCE_FILE),
        ),
        encoded: (encoded_weights > 0).then(|| EncodedTotal {
            total: Total::new(encoded_weights, encoded_sizes.total()),
            entropy_bits: entropy / encoded_weights as f64,
            bits: BitsSplit::new(&encoded_sizes, encoded_weights),
        }),
        tensors,
        provenance,
    })
}

fn encoded_report(name: &str, encoded: &EncodedTensor) -> Result<TensorReport> {
    let n_weights = encoded.n_rows() as u64 * encoded.n_cols() as u64;
    let sizes = encoded.sizes();
    let codes = encoded.coded_numbers(Cpu::detect()).map_err(|e| e.in_tensor(name))?;
    let bits_per_weight = per_weight(sizes.total(), n_weights);
    Ok(TensorReport {
        name: name.into(),
        shape: vec![encoded.n_rows(), encoded.n_cols()],
        format: encoded.format().to_string(),
        coder: encoded.coder().to_string(),
        scale: match encoded.scale_kind() {
            ScaleKind::None => "none",
            ScaleKind::Tensor => "tensor",
            ScaleKind::Channel | ScaleKind::Absmax => "channel",
        },
        n_weights,
        bytes: sizes.total(),
        entropy_bits: Some(codes.entropy_bits()),
        bits_per_weight,
        ratio_bf16: ratio(bits_per_weight),
        relative_error: encoded.relative_error(),
        params: encoded.params().map(CoderParams::from),
        bits: Some(BitsSplit::new(&sizes, n_weights)),
    })
}

fn plain_report(tensor: &TensorInfo) -> TensorReport {
    let n_weights = tensor.n_elements() as u64;
    let bits_per_weight = per_weight(tensor.stored_bytes() as u64, n_weights);
    TensorReport {
        format: tensor.stored_type(),
        coder: "none".into(),
        scale: "none",
        n_weights,
        bytes: tensor.stored_bytes() as u64,
        entropy_bits: None,
        bits_per_weight,
        ratio_bf16: ratio(bits_per_weight),
        relative_error: 0.0,
        params: None,
        bits: None,
        name: tensor.name.clone(),
        shape: tensor.shape.clone(),
    }
}

/// Bits per weight; zero where there is no weight.
fn per_weight(bytes: u64, n_weights: u64) -> f64 {
    if n_weights == 0 { 0.0 } else { 8.0 * bytes as f64 / n_weights as f64 }
}

fn ratio(bits_per_weight: f64) -> f64 {
    if bits_per_weight == 0.0 { 1.0 } else { 16.0 / bits_per_weight }
}
