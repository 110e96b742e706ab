//! One encoded tensor: its bytes (`docs/format.md`), made by [`encode_tensor`] and read through [`EncodedTensor`].

use crate::block::{
    BLOCK_ROWS, Block, BlockEncoder, EncodedRowBlock, Geometry, Params, Patch, STREAM_ALIGN, SplitTable, decode_block,
    raw_fields,
};
use crate::checkpoint::{Dtype, Tensor};
use crate::cpu::Cpu;
use crate::entropy::{FrequencyTable, Transition, choose_table};
use crate::error::{Error, Result};
use crate::feedback::{Grid, InputFactor, quantize_with_feedback};
use crate::format::{Coder, Format, ScaleMode};
#[cfg(target_arch = "x86_64")]
use crate::product::decode_dense;
use crate::quantize::{
    Codes, INT8_MAX, QuantizedTensor, Scales, code_value, matrix_shape, nearby_codes, quantize, quantize_to_step,
    quantize_to_trellis, read_row, row_steps, scale_of,
};
use crate::simd::{Plan, Quads};
use crate::trellis;
use bytes::Bytes;
use rayon::prelude::*;
use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

const MAGIC: &[u8; 8] = b"CODECLLM";
const VERSION_MAJOR: u16 = 1;
const VERSION_MINOR: u16 = 1;
/// What a program has to know that reads the tensor: a trellis came with version 1.1.
fn minor_of(params: &Params) -> u16 {
    u16::from(params.trellis)
}
const HEADER_BYTES: usize = 128;
const SECTION_ALIGN: usize = 64;
/// Zero bytes after the last stream, so that a vector load past its end stays within the tensor.
const TAIL_BYTES: usize = 64;
const ZSTD_CHUNK_BYTES: usize = 1 << 16;
const ZSTD_LEVEL: i32 = 9;

/// What the encoder should favour among parameters that all decode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Prefer {
    /// The smallest archive.
    Size,
    /// Up to about 1 % larger, where that doubles the weights a table look-up yields.
    #[default]
    Balanced,
    /// Short blocks and many weights a look-up, for GPUs.
    Speed,
}

impl Prefer {
    /// What the work of decoding is charged, in bits a weight: look-ups, of which a symbol of more parts needs fewer, and
    /// the fields that raw bits are gathered from.
    fn work_cost(self, format: Format, params: &Params) -> f64 {
        let table = f64::from(params.table_bits.saturating_sub(10));
        let look_ups = match (self, params.parts_per_symbol) {
            (Self::Size, _) => return 0.0,
            (Self::Balanced, 1) => 0.30,
            (Self::Balanced, 2) => 0.08 + 0.002 * table,
            (Self::Balanced, _) => 0.002 * table,
            (Self::Speed, 1) => 1.0,
            // What GPU kernels are made for, where the codes are integers: eight parts of one bit, or four, or two without raw bits.
            (Self::Speed, 2) if !format.is_integer() || params.raw_bits == 0 => 0.45 + 0.01 * table,
            (Self::Speed, 8) if format.is_integer() && (3..=7).contains(&params.raw_bits) => 0.01 * table,
            (Self::Speed, 4) if format.is_integer() && params.raw_bits <= 6 => 0.30 + 0.01 * table,
            (Self::Speed, 4) if !format.is_integer() => 0.16 + 0.01 * table,
            (Self::Speed, _) => 1.0,
        };
        look_ups + 0.008 * raw_fields(params.raw_bits).count() as f64
    }

    /// Columns a block: as even as the limit allows.
    fn block_cols(self, n_cols: usize) -> u32 {
        let limit = match self {
            Self::Size => 2048,
            Self::Balanced => 1024,
            // Many blocks share a GPU's work evenly.
            Self::Speed => 256,
        };
        (n_cols.div_ceil(n_cols.div_ceil(limit)).next_multiple_of(32)) as u32
    }
}

impl std::str::FromStr for Prefer {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        match s {
            "size" => Ok(Self::Size),
            "balanced" => Ok(Self::Balanced),
            "speed" => Ok(Self::Speed),
            _ => Err(Error::Parameter(format!("unknown preference `{s}`; expected size, balanced or speed"))),
        }
    }
}

/// How to encode a tensor.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EncodeOptions {
    /// What a code means.
    pub format: Format,
    /// What shares a scale (ignored by `bf16`).
    pub scale: ScaleMode,
    /// How codes become bytes.
    pub coder: Coder,
    /// What to favour.
    pub prefer: Prefer,
    /// `rate`: the distance of neighbouring grid points, in units of the weights; the others have none.
    pub step: Option<f32>,
    /// `rate`: codes of a [trellis], which have less error at the same bits. Coder `rans` alone has them.
    pub trellis: bool,
    /// The coder's parameters; `None` has the encoder choose them. `prefer` and `trellis` are then without effect, and `zstd` has none.
    pub params: Option<Params>,
}

impl Default for EncodeOptions {
    fn default() -> Self {
        Self {
            format: Format::Int8,
            scale: ScaleMode::Channel,
            coder: Coder::Rans,
            prefer: Prefer::Balanced,
            step: None,
            trellis: false,
            params: None,
        }
    }
}

impl EncodeOptions {
    /// Whether its parts go together.
    pub(crate) fn check(&self) -> Result<()> {
        if self.trellis && (self.format != Format::Rate || self.coder != Coder::Rans) {
            return Err(Error::Parameter(format!(
                "format `{}` with coder `{}` has no trellis; format `rate` with coder `rans` has",
                self.format, self.coder
            )));
        }
        self.params.map_or(Ok(()), |params| params.validate(self.format))
    }
}

/// Which checksums [`EncodedTensor::parse`] compares. The structure is always checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Checks {
    /// Metadata and payload.
    #[default]
    Full,
    /// Only the metadata: decoding stays in bounds, but a damaged payload may decode to other weights.
    Metadata,
    /// None.
    None,
}

/// The kind of scales, as the header spells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScaleKind {
    /// No scale.
    None = 0,
    /// One float32.
    Tensor = 1,
    /// A float32 a row.
    Channel = 2,
    /// A BF16 absmax a row.
    Absmax = 3,
}

/// Bytes of an encoded tensor by what they are for; they add up to its length.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct Sizes {
    /// The header.
    pub header: u64,
    /// The frequency table.
    pub tables: u64,
    /// Scales.
    pub scales: u64,
    /// Offsets of streams and patches, or of zstd frames.
    pub offsets: u64,
    /// Patches.
    pub patches: u64,
    /// Raw bits.
    pub raw: u64,
    /// First words of the lanes: the coder's states.
    pub states: u64,
    /// The rest of the streams; with zstd, the frames.
    pub payload: u64,
    /// Padding to alignments.
    pub padding: u64,
}

impl Sizes {
    /// All bytes.
    pub fn total(&self) -> u64 {
        let Self { header, tables, scales, offsets, patches, raw, states, payload, padding } = *self;
        header + tables + scales + offsets + patches + raw + states + payload + padding
    }
}

impl std::ops::AddAssign for Sizes {
    fn add_assign(&mut self, other: Self) {
        self.header += other.header;
        self.tables += other.tables;
        self.scales += other.scales;
        self.offsets += other.offsets;
        self.patches += other.patches;
        self.raw += other.raw;
        self.states += other.states;
        self.payload += other.payload;
        self.padding += other.padding;
    }
}

/// The header's fields (section 2).
#[derive(Debug, Clone)]
struct Header {
    format: Format,
    coder: Coder,
    scale_kind: ScaleKind,
    source_dtype: Dtype,
    n_rows: usize,
    n_cols: usize,
    params: Params,
    table_bytes: usize,
    n_patches: usize,
    stream_bytes: usize,
    relative_error: f32,
    /// `rate`: the step of the grid; 0 in other formats.
    step: f32,
    total_bytes: usize,
}

/// Where the sections lie, in bytes from the tensor's start (section 4; section 9 with zstd, whose frames are the stream).
#[derive(Debug, Clone, Default)]
pub struct Sections {
    /// The frequency table.
    pub table: Range<usize>,
    /// Scales.
    pub scales: Range<usize>,
    /// Offsets of streams, or of frames.
    pub offsets: Range<usize>,
    /// Offsets of patches.
    pub patch_offsets: Range<usize>,
    /// Patches.
    pub patches: Range<usize>,
    /// Raw bits.
    pub raw: Range<usize>,
    /// Streams.
    pub stream: Range<usize>,
    /// Length of the tensor.
    pub total: usize,
}

impl Header {
    fn zstd_chunks(&self) -> usize {
        (self.n_rows * self.n_cols * (self.format.code_bits() as usize / 8)).div_ceil(ZSTD_CHUNK_BYTES)
    }

    fn geometry(&self) -> Geometry {
        Geometry { n_rows: self.n_rows, n_cols: self.n_cols, params: self.params }
    }

    /// None where a size overflows.
    fn sections(&self) -> Option<Sections> {
        let mut at = HEADER_BYTES;
        let mut section = |bytes: usize| -> Option<Range<usize>> {
            let start = at.checked_next_multiple_of(SECTION_ALIGN)?;
            at = start.checked_add(bytes)?;
            Some(start..at)
        };
        let mut s = Sections { table: section(self.table_bytes)?, ..Default::default() };
        s.scales = section(match self.scale_kind {
            ScaleKind::None => 0,
            ScaleKind::Tensor => 4,
            ScaleKind::Channel => self.n_rows.checked_mul(4)?,
            ScaleKind::Absmax => self.n_rows.checked_mul(2)?,
        })?;
        self.n_rows.checked_mul(self.n_cols)?.checked_mul(4)?;
        match self.coder {
            Coder::Rans => {
                let geometry = self.geometry();
                let offsets = geometry.n_blocks().checked_add(1)?.checked_mul(4)?;
                s.offsets = section(offsets)?;
                s.patch_offsets = section(if self.n_patches > 0 { offsets } else { 0 })?;
                s.patches = section(self.n_patches.checked_mul(4)?)?;
                let units = geometry.n_units().checked_mul(geometry.n_row_blocks())?;
                s.raw = section(geometry.unit_raw_bytes().checked_mul(units)?)?;
            }
            Coder::Zstd => {
                s.offsets = section(self.zstd_chunks().checked_add(1)?.checked_mul(8)?)?;
                s.raw = section(0)?;
            }
        }
        s.stream = section(self.stream_bytes)?;
        s.total = at.checked_add(TAIL_BYTES)?.checked_next_multiple_of(SECTION_ALIGN)?;
        Some(s)
    }

    fn to_bytes(&self) -> [u8; HEADER_BYTES] {
        let mut h = [0u8; HEADER_BYTES];
        h[..8].copy_from_slice(MAGIC);
        h[8..10].copy_from_slice(&VERSION_MAJOR.to_le_bytes());
        h[10..12].copy_from_slice(&minor_of(&self.params).to_le_bytes());
        h[12] = self.format as u8;
        h[13] = self.coder as u8;
        h[14] = self.scale_kind as u8;
        h[15] = match self.source_dtype {
            Dtype::F16 => 1,
            Dtype::F32 => 2,
            _ => 0,
        };
        h[16..24].copy_from_slice(&(self.n_rows as u64).to_le_bytes());
        h[24..32].copy_from_slice(&(self.n_cols as u64).to_le_bytes());
        if self.coder == Coder::Rans {
            let p = &self.params;
            h[32] = p.parts_per_symbol as u8;
            h[33] = p.table_bits as u8;
            h[34] = p.raw_bits as u8;
            h[35] = p.part_bits as u8;
            h[36..40].copy_from_slice(&p.block_cols.to_le_bytes());
            h[40..44].copy_from_slice(&p.bias.to_le_bytes());
        }
        h[44..48].copy_from_slice(&(self.table_bytes as u32).to_le_bytes());
        h[48..56].copy_from_slice(&(self.n_patches as u64).to_le_bytes());
        h[56..64].copy_from_slice(&(self.stream_bytes as u64).to_le_bytes());
        h[64..68].copy_from_slice(&self.relative_error.to_le_bytes());
        h[68..72].copy_from_slice(&self.step.to_le_bytes());
        h[72..80].copy_from_slice(&(self.total_bytes as u64).to_le_bytes());
        h[96] = u8::from(self.params.trellis);
        h
    }

    fn from_bytes(data: &[u8]) -> Result<Self> {
        let bad = |problem: String| Error::format("header", problem);
        if !data.starts_with(MAGIC) {
            return Err(bad("it does not begin with `CODECLLM`: this is no encoded tensor".into()));
        }
        let h: &[u8; HEADER_BYTES] = data
            .first_chunk()
            .ok_or_else(|| bad(format!("{} bytes are too few for the header's {HEADER_BYTES}", data.len())))?;
        let u16_at = |i: usize| u16::from_le_bytes([h[i], h[i + 1]]);
        let u32_at = |i: usize| u32::from_le_bytes(h[i..i + 4].try_into().expect("4 bytes"));
        let size_at = |i: usize, name: &str| {
            let value = u64::from_le_bytes(h[i..i + 8].try_into().expect("8 bytes"));
            usize::try_from(value).map_err(|_| bad(format!("{name} is {value}, more than this machine addresses")))
        };
        let (major, minor) = (u16_at(8), u16_at(10));
        if major != VERSION_MAJOR || minor > VERSION_MINOR {
            return Err(Error::unsupported(
                "header",
                format!(
                    "format version {major}.{minor}; this program reads {VERSION_MAJOR}.0 to \
                     {VERSION_MAJOR}.{VERSION_MINOR}: use the codecllm that wrote it, or a newer one"
                ),
            ));
        }
        let header = Self {
            format: Format::from_byte(h[12])?,
            coder: Coder::from_byte(h[13])?,
            scale_kind: match h[14] {
                0 => ScaleKind::None,
                1 => ScaleKind::Tensor,
                2 => ScaleKind::Channel,
                3 => ScaleKind::Absmax,
                other => return Err(bad(format!("scale kind {other}; 0 to 3 expected"))),
            },
            source_dtype: match h[15] {
                0 => Dtype::Bf16,
                1 => Dtype::F16,
                2 => Dtype::F32,
                other => return Err(bad(format!("source dtype {other}; 0 to 2 expected"))),
            },
            n_rows: size_at(16, "n_rows")?,
            n_cols: size_at(24, "n_cols")?,
            params: Params {
                parts_per_symbol: h[32].into(),
                table_bits: h[33].into(),
                raw_bits: h[34].into(),
                part_bits: h[35].into(),
                block_cols: u32_at(36),
                bias: u32_at(40) as i32,
                trellis: h[96] == 1,
            },
            table_bytes: u32_at(44) as usize,
            n_patches: size_at(48, "n_patches")?,
            stream_bytes: size_at(56, "stream_bytes")?,
            relative_error: f32::from_bits(u32_at(64)),
            step: f32::from_bits(u32_at(68)),
            total_bytes: size_at(72, "total_bytes")?,
        };
        if header.n_rows == 0 || header.n_cols == 0 {
            return Err(bad(format!(
                "the shape is {} × {}; an encoded matrix has weights",
                header.n_rows, header.n_cols
            )));
        }
        if (header.scale_kind == ScaleKind::None) != header.format.is_lossless() {
            return Err(bad(format!("`{}` does not go with scale kind {}", header.format, h[14])));
        }
        if header.format == Format::Rate {
            if header.scale_kind == ScaleKind::Absmax {
                return Err(bad("`rate` does not go with scale kind 3".into()));
            }
            if !(header.step.is_normal() && header.step > 0.0) {
                return Err(bad(format!("the step is {}; a positive number expected", header.step)));
            }
        } else if u32_at(68) != 0 {
            return Err(bad(format!("`{}` has no step, but the header has one", header.format)));
        }
        if h[96] > u8::from(minor >= 1 && header.coder == Coder::Rans) {
            return Err(bad(format!(
                "trellis {} in version {major}.{minor} with coder {}; 0 or 1 expected, and 1 from 1.1 on with `rans`",
                h[96], h[13]
            )));
        }
        if minor != minor_of(&header.params) {
            return Err(bad(format!(
                "version {major}.{minor} has nothing that {major}.{} lacks",
                minor_of(&header.params)
            )));
        }
        if h[97..].iter().any(|&b| b != 0) {
            return Err(bad("reserved bytes are not zero".into()));
        }
        match header.coder {
            Coder::Rans => header.params.validate(header.format)?,
            Coder::Zstd if h[32..56].iter().any(|&b| b != 0) => {
                return Err(bad("fields that a zstd tensor does not use are not zero".into()));
            }
            Coder::Zstd => {}
        }
        Ok(header)
    }
}

/// What decoders look up, built once from the header and the table.
#[derive(Debug)]
pub(crate) struct DecodeTables {
    /// By slot, for the plain decoder.
    pub transitions: Vec<Transition>,
    /// By slot, for the others: bits 0–4 the bits to read, 5–19 the symbol, 20–31 what to XOR into the shifted state, aligned to the top
    /// of the T-bit state (bit 31 is the state's highest).
    pub entries: Vec<u32>,
    /// How codes come from raw words and entries.
    pub plan: Plan,
}

impl DecodeTables {
    fn new(format: Format, params: Params, table: &FrequencyTable) -> Self {
        let transitions = table.transitions();
        let table_bits = table.table_bits();
        let entries = transitions
            .iter()
            .enumerate()
            .map(|(slot, t)| {
                let shifted = (slot as u32) << t.n_bits;
                let delta = (shifted ^ u32::from(t.base)) << (32 - table_bits);
                delta | u32::from(t.symbol) << 5 | u32::from(t.n_bits)
            })
            .collect();
        Self { transitions, entries, plan: Plan::new(format, params) }
    }
}

/// What the metadata say: the same for [`EncodedTensor`] and [`Layout`].
macro_rules! metadata {
    () => {
        /// What a code means.
        pub fn format(&self) -> Format {
            self.header.format
        }

        /// How codes are stored.
        pub fn coder(&self) -> Coder {
            self.header.coder
        }

        /// How scales are stored.
        pub fn scale_kind(&self) -> ScaleKind {
            self.header.scale_kind
        }

        /// The source's element type.
        pub fn source_dtype(&self) -> Dtype {
            self.header.source_dtype
        }

        /// Output channels.
        pub fn n_rows(&self) -> usize {
            self.header.n_rows
        }

        /// Input channels.
        pub fn n_cols(&self) -> usize {
            self.header.n_cols
        }

        /// ‖W − Ŵ‖ / ‖W‖ as the encoder measured it.
        pub fn relative_error(&self) -> f32 {
            self.header.relative_error
        }

        /// `rate`: the distance of neighbouring grid points that its quantizer was given.
        pub fn step(&self) -> Option<f32> {
            (self.header.format == Format::Rate).then_some(self.header.step)
        }

        /// The coder's parameters; none with zstd.
        pub fn params(&self) -> Option<&Params> {
            (self.header.coder == Coder::Rans).then_some(&self.header.params)
        }

        /// Where the sections lie.
        pub fn sections(&self) -> &Sections {
            &self.sections
        }

        /// The decoder's transition of every slot; none with zstd.
        pub fn transitions(&self) -> Option<&[Transition]> {
            self.tables.as_ref().map(|t| &t.transitions[..])
        }

        /// The layout of blocks; meaningful with coder `rans`.
        pub fn geometry(&self) -> Geometry {
            self.header.geometry()
        }
    };
}

/// An encoded tensor, validated. Cloning is cheap.
#[derive(Clone)]
pub struct EncodedTensor {
    data: Bytes,
    header: Header,
    sections: Sections,
    /// None with zstd.
    tables: Option<Arc<DecodeTables>>,
}

impl std::fmt::Debug for EncodedTensor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EncodedTensor").field("header", &self.header).finish_non_exhaustive()
    }
}

/// What a tensor's metadata say, parsed and validated, for a caller who keeps the bytes: [`Layout::bind`] makes a tensor of them
/// again without the cost of parsing. Cloning is cheap.
#[derive(Clone)]
pub struct Layout {
    header_bytes: [u8; HEADER_BYTES],
    header: Header,
    sections: Sections,
    tables: Option<Arc<DecodeTables>>,
}

impl Layout {
    metadata!();

    /// A number that tells tensors with different metadata apart: the checksum in the header.
    pub fn key(&self) -> u64 {
        u64::from_le_bytes(self.header_bytes[80..88].try_into().expect("8 bytes"))
    }

    /// Length of the tensor in bytes.
    pub fn n_bytes(&self) -> usize {
        self.sections.total
    }

    /// The tensor that `data` holds. Its metadata are compared with those that were validated, through their checksum; its
    /// payload is not.
    ///
    /// # Errors
    /// `data` is another tensor, or its metadata have changed.
    pub fn bind(&self, data: Bytes) -> Result<EncodedTensor> {
        let same = data.len() == self.sections.total
            && data.starts_with(&self.header_bytes)
            && metadata_checksum(&data[..self.sections.raw.start]) == self.key();
        if !same {
            return Err(Error::format("encoded tensor", "its bytes are not those that it was prepared from"));
        }
        let Self { header, sections, tables, .. } = self.clone();
        Ok(EncodedTensor { data, header, sections, tables })
    }
}

impl EncodedTensor {
    /// Whether `data` claims to be an encoded tensor.
    pub fn is_encoded(data: &[u8]) -> bool {
        data.starts_with(MAGIC)
    }

    /// Validates `data` and keeps a reference to it.
    ///
    /// # Errors
    /// Any violation of `docs/format.md`, and a checksum of `checks` that does not match.
    pub fn parse(data: Bytes, checks: Checks) -> Result<Self> {
        let header = Header::from_bytes(&data)?;
        let bad = |problem: String| Error::format("encoded tensor", problem);
        let sections =
            header.sections().ok_or_else(|| bad("its header describes more bytes than a machine addresses".into()))?;
        if header.total_bytes != sections.total || data.len() != sections.total {
            return Err(bad(format!(
                "its header describes {} bytes and says {}, but there are {}: it is truncated or corrupt",
                sections.total,
                header.total_bytes,
                data.len()
            )));
        }
        let stored = |i: usize| u64::from_le_bytes(data[i..i + 8].try_into().expect("8 bytes"));
        if checks != Checks::None && stored(80) != metadata_checksum(&data[..sections.raw.start]) {
            return Err(bad("the metadata's checksum does not match: it is corrupt; get the archive anew".into()));
        }
        if checks == Checks::Full {
            check_payload(&data, &sections)?;
        }
        let ends = [
            HEADER_BYTES,
            sections.table.end,
            sections.scales.end,
            sections.offsets.end,
            sections.patch_offsets.end,
            sections.patches.end,
            sections.raw.end,
            sections.stream.end,
        ];
        let gap_end =
            |end: usize| if end == sections.stream.end { sections.total } else { end.next_multiple_of(SECTION_ALIGN) };
        if ends.iter().any(|&end| data[end..gap_end(end)].iter().any(|&b| b != 0)) {
            return Err(bad("padding between its sections is not zero".into()));
        }

        let mut tensor = Self { data, header, sections, tables: None };
        tensor.validate_scales()?;
        tensor.validate_offsets()?;
        if tensor.header.coder == Coder::Rans {
            tensor.validate_patches()?;
            let params = &tensor.header.params;
            let table = FrequencyTable::from_bytes(
                &tensor.data[tensor.sections.table.clone()],
                params.table_bits,
                params.symbol_bits(),
            )?;
            tensor.tables = Some(DecodeTables::new(tensor.header.format, *params, &table).into());
        }
        Ok(tensor)
    }

    /// Compares the payload's checksum: what [`Checks::Full`] does beyond [`Checks::Metadata`], for whoever does something else
    /// with the bytes meanwhile.
    ///
    /// # Errors
    /// It does not match.
    pub fn check_payload(&self) -> Result<()> {
        check_payload(&self.data, &self.sections)
    }

    fn validate_scales(&self) -> Result<()> {
        let bits = self.section(&self.sections.scales);
        let ok = match self.header.scale_kind {
            ScaleKind::None => true,
            ScaleKind::Absmax => bits.as_chunks::<2>().0.iter().all(|b| u16::from_le_bytes(*b) < 0x7f80),
            _ => bits.as_chunks::<4>().0.iter().all(|b| u32::from_le_bytes(*b) < 0x7f80_0000),
        };
        if ok { Ok(()) } else { Err(Error::format("scales", "one is negative, infinite or not a number")) }
    }

    fn validate_offsets(&self) -> Result<()> {
        let bad = || Error::format("offsets", "they decrease, or leave the streams");
        let raw = self.section(&self.sections.offsets);
        let offsets: Vec<u64> = match self.header.coder {
            Coder::Rans => {
                let units = raw.as_chunks::<4>().0.iter().map(|b| u64::from(u32::from_le_bytes(*b)));
                units.map(|u| u * STREAM_ALIGN as u64).collect()
            }
            Coder::Zstd => raw.as_chunks::<8>().0.iter().map(|b| u64::from_le_bytes(*b)).collect(),
        };
        let ascending = offsets.windows(2).all(|w| w[0] <= w[1]);
        if !ascending || offsets[0] != 0 || offsets[offsets.len() - 1] != self.header.stream_bytes as u64 {
            return Err(bad());
        }
        Ok(())
    }

    fn validate_patches(&self) -> Result<()> {
        if self.header.n_patches == 0 {
            return Ok(());
        }
        let geometry = self.geometry();
        let bad = || Error::format("patches", "their offsets or positions leave the blocks, or are out of order");
        let offsets = self.section(&self.sections.patch_offsets).as_chunks::<4>().0;
        let at = |i: usize| u32::from_le_bytes(offsets[i]) as usize;
        if at(0) != 0
            || at(geometry.n_blocks()) != self.header.n_patches
            || (1..offsets.len()).any(|i| at(i - 1) > at(i))
        {
            return Err(bad());
        }
        for i in 0..geometry.n_row_blocks() {
            for j in 0..geometry.n_col_blocks() {
                let mut previous = None;
                for patch in self.block(i, j).patches() {
                    let position = patch.0 >> 16;
                    let inside = patch.row() < geometry.rows(i).len() && patch.col() < geometry.cols(j).len();
                    let fits = match self.header.params.trellis {
                        true => (-2..2).contains(&patch.stand_in()),
                        false => u32::from(patch.code()) >> self.header.format.code_bits() == 0,
                    };
                    if !inside || !fits || previous >= Some(position) {
                        return Err(bad());
                    }
                    previous = Some(position);
                }
            }
        }
        Ok(())
    }

    fn section(&self, range: &Range<usize>) -> &[u8] {
        &self.data[range.clone()]
    }

    metadata!();

    /// The tensor's bytes.
    pub fn bytes(&self) -> &Bytes {
        &self.data
    }

    /// The tensor without its bytes.
    pub fn layout(&self) -> Layout {
        let Self { data, header, sections, tables } = self;
        let header_bytes = *data.first_chunk().expect("a parsed tensor has a header");
        Layout { header_bytes, header: header.clone(), sections: sections.clone(), tables: tables.clone() }
    }

    /// The tables of a `rans` tensor.
    pub(crate) fn tables(&self) -> &DecodeTables {
        self.tables.as_ref().expect("only `rans` tensors are decoded by blocks")
    }

    pub(crate) fn plan(&self) -> &Plan {
        &self.tables().plan
    }

    /// The codes of the rows of block row `i`.
    pub(crate) fn row_block_codes(&self, i: usize) -> Result<Codes<'static>> {
        self.codes(Cpu::Scalar, self.geometry().rows(i))
    }

    /// Bytes by purpose.
    pub fn sizes(&self) -> Sizes {
        let (h, s) = (&self.header, &self.sections);
        let states = match h.coder {
            Coder::Rans => 2 * BLOCK_ROWS * self.geometry().n_blocks(),
            Coder::Zstd => 0,
        };
        let mut sizes = Sizes {
            header: HEADER_BYTES as u64,
            tables: s.table.len() as u64,
            scales: s.scales.len() as u64,
            offsets: (s.offsets.len() + s.patch_offsets.len()) as u64,
            patches: s.patches.len() as u64,
            raw: s.raw.len() as u64,
            states: states as u64,
            payload: s.stream.len().saturating_sub(states) as u64,
            padding: 0,
        };
        sizes.padding = s.total as u64 - sizes.total();
        sizes
    }

    /// The scale of a row (1 for `bf16`).
    pub fn scale(&self, row: usize) -> f32 {
        let bits = self.section(&self.sections.scales);
        let f32_at = |i: usize| f32::from_le_bytes(bits[4 * i..4 * i + 4].try_into().expect("4 bytes"));
        match self.header.scale_kind {
            ScaleKind::None => 1.0,
            ScaleKind::Tensor => f32_at(0),
            ScaleKind::Channel => f32_at(row),
            ScaleKind::Absmax => {
                let absmax = half::bf16::from_le_bytes([bits[2 * row], bits[2 * row + 1]]);
                scale_of(self.header.format, absmax.to_f32())
            }
        }
    }

    /// Block (i, j).
    pub(crate) fn block(&self, i: usize, j: usize) -> Block<'_> {
        let geometry = self.geometry();
        let index = i * geometry.n_col_blocks() + j;
        let at = |range: &Range<usize>, i: usize| {
            let start = range.start + 4 * i;
            u32::from_le_bytes(self.data[start..start + 4].try_into().expect("4 bytes")) as usize
        };
        let (start, end) =
            (at(&self.sections.offsets, index) * STREAM_ALIGN, at(&self.sections.offsets, index + 1) * STREAM_ALIGN);
        let patches = if self.header.n_patches == 0 {
            &[]
        } else {
            let range = at(&self.sections.patch_offsets, index)..at(&self.sections.patch_offsets, index + 1);
            &self.section(&self.sections.patches).as_chunks::<4>().0[range]
        };
        let raw = geometry.raw_range(i, j);
        Block {
            stream: &self.data[self.sections.stream.start + start..],
            stream_bytes: end - start,
            raw: &self.data[self.sections.raw.start + raw.start..self.sections.raw.start + raw.end],
            patches,
            n_cols: geometry.cols(j).len(),
        }
    }

    /// The codes of block row `i` (`rows × n_cols`, row-major), through the decoder for `cpu`.
    fn decode_row_block<T: CodeType>(&self, cpu: Cpu, i: usize, scratch: &mut Scratch, out: &mut [T]) -> Result<()> {
        #[cfg(target_arch = "x86_64")]
        if cpu != Cpu::Scalar {
            return decode_dense(self, cpu, i, &mut scratch.quads, out);
        }
        let _ = cpu;
        let geometry = self.geometry();
        let n_rows = geometry.rows(i).len();
        let codes = &mut scratch.codes;
        for j in 0..geometry.n_col_blocks() {
            let cols = geometry.cols(j);
            codes.resize(BLOCK_ROWS * cols.len(), 0u16);
            decode_block(
                self.header.format,
                &self.header.params,
                &self.tables().transitions,
                &self.block(i, j),
                codes,
            )?;
            for (row, codes) in codes.chunks_exact(cols.len()).take(n_rows).enumerate() {
                let out = &mut out[row * geometry.n_cols..][cols.clone()];
                out.iter_mut().zip(codes).for_each(|(o, &c)| *o = T::from_code(c));
            }
        }
        Ok(())
    }

    /// All codes, through the decoder for `cpu`, on all threads of the current pool.
    ///
    /// # Errors
    /// A payload that does not decode.
    pub fn decode_codes(&self, cpu: Cpu) -> Result<Codes<'static>> {
        self.codes(cpu, 0..self.n_rows())
    }

    /// What the entropy coder was given: all codes, with a trellis the numbers that they follow from.
    ///
    /// # Errors
    /// A payload that does not decode.
    pub fn coded_numbers(&self, cpu: Cpu) -> Result<Codes<'static>> {
        let mut codes = self.decode_codes(cpu)?;
        if let (true, Codes::U8(codes)) = (self.header.params.trellis, &mut codes) {
            codes.to_mut().iter_mut().for_each(|code| *code = (*code as i8 >> 1) as u8);
        }
        Ok(codes)
    }

    fn codes(&self, cpu: Cpu, rows: Range<usize>) -> Result<Codes<'static>> {
        Ok(match self.header.format {
            Format::Bf16 => Codes::U16(Cow::Owned(self.codes_of_rows::<u16>(cpu, rows)?)),
            _ => Codes::U8(Cow::Owned(self.codes_of_rows::<u8>(cpu, rows)?)),
        })
    }

    /// The codes of a run of row blocks into the caller's buffer, on this thread alone.
    ///
    /// # Errors
    /// Rows that do not begin at a multiple of 32 or leave the matrix, a buffer of another size or width, a payload that
    /// does not decode.
    pub fn decode_codes_into(&self, cpu: Cpu, rows: Range<usize>, out: CodesMut<'_>) -> Result<()> {
        match (self.header.format, out) {
            (Format::Bf16, CodesMut::U16(out)) => self.codes_into(cpu, rows, out),
            (Format::Fp8 | Format::Int8 | Format::Rate, CodesMut::U8(out)) => self.codes_into(cpu, rows, out),
            (format, _) => Err(Error::Parameter(format!(
                "codes of `{format}` have {} bits; the buffer's differ",
                format.code_bits()
            ))),
        }
    }

    fn codes_into<T: CodeType>(&self, cpu: Cpu, rows: Range<usize>, out: &mut [T]) -> Result<()> {
        let n_cols = self.n_cols();
        let ends_well = rows.end == self.n_rows() || rows.end.is_multiple_of(BLOCK_ROWS);
        if !rows.start.is_multiple_of(BLOCK_ROWS) || !ends_well || rows.end > self.n_rows() || rows.start > rows.end {
            return Err(Error::Parameter(format!(
                "rows {rows:?} are no row blocks of a matrix of {} rows",
                self.n_rows()
            )));
        }
        if out.len() != rows.len() * n_cols {
            return Err(Error::Parameter(format!("rows {rows:?} of {n_cols} codes do not fit {} codes", out.len())));
        }
        if self.header.coder == Coder::Zstd {
            out.copy_from_slice(&self.zstd_codes(rows)?);
            return Ok(());
        }
        let first_block = rows.start / BLOCK_ROWS;
        let mut scratch = Scratch::default();
        let mut blocks = out.chunks_mut(BLOCK_ROWS * n_cols).enumerate();
        blocks.try_for_each(|(i, out)| self.decode_row_block(cpu, first_block + i, &mut scratch, out))
    }

    /// The codes of a run of rows.
    fn codes_of_rows<T: CodeType>(&self, cpu: Cpu, rows: Range<usize>) -> Result<Vec<T>> {
        let n_cols = self.n_cols();
        if self.header.coder == Coder::Zstd {
            return self.zstd_codes(rows);
        }
        let first_block = rows.start / BLOCK_ROWS;
        let first_row = first_block * BLOCK_ROWS;
        let end = rows.end.next_multiple_of(BLOCK_ROWS).min(self.n_rows());
        let mut codes = vec![T::default(); (end - first_row) * n_cols];
        codes
            .par_chunks_mut(BLOCK_ROWS * n_cols)
            .enumerate()
            .try_for_each_init(Scratch::default, |scratch, (i, out)| {
                self.decode_row_block(cpu, first_block + i, scratch, out)
            })?;
        codes.truncate((rows.end - first_row) * n_cols);
        codes.drain(..(rows.start - first_row) * n_cols);
        Ok(codes)
    }

    fn zstd_codes<T: CodeType>(&self, rows: Range<usize>) -> Result<Vec<T>> {
        let width = size_of::<T>();
        let (first, end) = (rows.start * self.n_cols() * width, rows.end * self.n_cols() * width);
        let total = self.n_rows() * self.n_cols() * width;
        let frames = first / ZSTD_CHUNK_BYTES..end.div_ceil(ZSTD_CHUNK_BYTES);
        let skipped = frames.start * ZSTD_CHUNK_BYTES;
        let mut bytes = vec![0u8; (frames.end * ZSTD_CHUNK_BYTES).min(total) - skipped];
        bytes.par_chunks_mut(ZSTD_CHUNK_BYTES).zip(frames).try_for_each(|(chunk, frame)| {
            let expected = chunk.len();
            match zstd::bulk::decompress_to_buffer(self.zstd_frame(frame), chunk) {
                Ok(n) if n == expected => Ok(()),
                Ok(n) => {
                    Err(Error::format("zstd frame", format!("frame {frame} holds {n} bytes, expected {expected}")))
                }
                Err(e) => Err(Error::format("zstd frame", format!("frame {frame} does not decode: {e}"))),
            }
        })?;
        Ok(bytes[first - skipped..end - skipped].chunks_exact(width).map(T::from_bytes).collect())
    }

    fn zstd_frame(&self, index: usize) -> &[u8] {
        &self.data[self.zstd_frame_range(index)]
    }

    fn zstd_frame_range(&self, index: usize) -> Range<usize> {
        let offsets = self.section(&self.sections.offsets).as_chunks::<8>().0;
        let at = |i: usize| self.sections.stream.start + u64::from_le_bytes(offsets[i]) as usize;
        at(index)..at(index + 1)
    }

    /// Where the frames of a `zstd` tensor lie in [`Self::bytes`]. Each holds 65,536 bytes of the codes, the last one the rest.
    /// None with `rans`.
    pub fn frames(&self) -> Vec<Range<usize>> {
        match self.header.coder {
            Coder::Rans => Vec::new(),
            Coder::Zstd => (0..self.header.zstd_chunks()).map(|i| self.zstd_frame_range(i)).collect(),
        }
    }

    /// The values of a run of rows, row-major; only the blocks that hold them are decoded.
    ///
    /// # Errors
    /// Rows that the matrix does not have, a buffer of another size, a payload that does not decode.
    pub fn decode_rows(&self, cpu: Cpu, rows: Range<usize>, out: &mut [f32]) -> Result<()> {
        let n_cols = self.n_cols();
        if rows.end > self.n_rows() || rows.start > rows.end || out.len() != rows.len() * n_cols {
            return Err(Error::Parameter(format!(
                "rows {rows:?} into {} values: the matrix is {} × {n_cols}",
                out.len(),
                self.n_rows()
            )));
        }
        let codes = self.codes(cpu, rows.clone())?;
        for (r, out) in out.chunks_exact_mut(n_cols).enumerate() {
            let scale = self.scale(rows.start + r);
            let value = |c: usize| code_value(self.header.format, codes.get(r * n_cols + c)) * scale;
            out.iter_mut().enumerate().for_each(|(c, v)| *v = value(c));
        }
        Ok(())
    }

    /// Quantizes `source` anew and compares every code, scale and dtype: none if all are equal, else what differs first.
    ///
    /// # Errors
    /// A source that cannot be quantized, or a payload that does not decode.
    pub fn verify_source(&self, source: &Tensor, cpu: Cpu) -> Result<Option<String>> {
        let (n_rows, n_cols) = matrix_shape(source)?;
        if let Some(difference) = self.kind_difference(source, n_rows, n_cols) {
            return Ok(Some(difference));
        }
        let mode = if self.header.scale_kind == ScaleKind::Tensor { ScaleMode::Tensor } else { ScaleMode::Channel };
        let raw_bits = (self.header.coder == Coder::Rans).then_some(self.header.params.raw_bits);
        let expected = match self.header.format {
            Format::Rate => match self.header.params {
                Params { trellis: true, raw_bits, block_cols, .. } => {
                    let block_cols = block_cols as usize;
                    quantize_to_trellis(source, self.header.step, raw_bits, block_cols)?.decoded(n_cols, block_cols)
                }
                _ => quantize_to_step(source, self.header.step, raw_bits)?,
            },
            format => quantize(source, format, mode)?,
        };
        if self.section(&self.sections.scales) != scale_bytes(&expected.scales) {
            return Ok(Some("the scales are not those that the quantizer yields".into()));
        }
        let codes = self.decode_codes(cpu)?;
        if codes == expected.codes {
            return Ok(None);
        }
        let at = (0..codes.len()).find(|&i| codes.get(i) != expected.codes.get(i)).unwrap_or(0);
        Ok(Some(format!(
            "the code at row {}, column {} is {:#x}, the quantizer yields {:#x}",
            at / n_cols,
            at % n_cols,
            codes.get(at),
            expected.codes.get(at)
        )))
    }
}

/// What stays provable of a matrix that was encoded with error feedback, whose codes follow from more than the matrix.
impl EncodedTensor {
    /// Compares dtype and shape with `source`, the scales with the grid that the header's step yields for it, and the relative error,
    /// computed anew, with the header's: none if all agree, else what differs first.
    ///
    /// # Errors
    /// A source that cannot be quantized, or a payload that does not decode.
    pub fn verify_calibrated(&self, source: &Tensor, cpu: Cpu) -> Result<Option<String>> {
        let (n_rows, n_cols) = matrix_shape(source)?;
        if let Some(difference) = self.kind_difference(source, n_rows, n_cols) {
            return Ok(Some(difference));
        }
        let step = self.header.step;
        let steps =
            row_steps(source, n_cols, step, if self.header.params.trellis { trellis::MAX_STEPS } else { INT8_MAX })?;
        let fit = self.scale(0) / steps[0];
        let is_on_grid = |row: usize| (self.scale(row) / (fit * steps[row]) - 1.0).abs() < 1e-5;
        if !(0.49..2.01).contains(&fit) || !(0..n_rows).all(is_on_grid) {
            return Ok(Some(format!("its scales are not those of a grid of step {step}")));
        }
        let row_bytes = source.data.len() / n_rows;
        let errors = (0..n_rows.div_ceil(BLOCK_ROWS))
            .into_par_iter()
            .map(|i| {
                let rows = i * BLOCK_ROWS..n_rows.min((i + 1) * BLOCK_ROWS);
                let (mut found, mut expected) = (vec![0f32; rows.len() * n_cols], vec![0f32; rows.len() * n_cols]);
                self.decode_rows(cpu, rows.clone(), &mut found)?;
                read_row(source.dtype, &source.data[rows.start * row_bytes..rows.end * row_bytes], &mut expected);
                Ok(found.iter().zip(&expected).fold([0f64; 2], |[error, weight], (found, w)| {
                    let (found, w) = (f64::from(*found), f64::from(*w));
                    [error + (w - found) * (w - found), weight + w * w]
                }))
            })
            .collect::<Result<Vec<_>>>()?;
        let [error, weight] = errors.iter().fold([0f64; 2], |a, b| [a[0] + b[0], a[1] + b[1]]);
        let error = if weight > 0.0 { (error / weight).sqrt() } else { error };
        let recorded = f64::from(self.header.relative_error);
        if (error - recorded).abs() > 1e-4 * recorded + 1e-6 {
            return Ok(Some(format!("its relative error from the source is {error:.6}, not {recorded:.6} as it says")));
        }
        Ok(None)
    }

    fn kind_difference(&self, source: &Tensor, n_rows: usize, n_cols: usize) -> Option<String> {
        if (n_rows, n_cols) != (self.n_rows(), self.n_cols()) {
            let (rows, cols) = (self.n_rows(), self.n_cols());
            return Some(format!("the shape is {rows} × {cols}, the source's is {n_rows} × {n_cols}"));
        }
        let (found, expected) = (self.header.source_dtype, source.dtype);
        (found != expected).then(|| format!("it was encoded from {found:?}, the source is {expected:?}"))
    }
}

/// A caller's buffer for codes, row-major.
#[derive(Debug)]
pub enum CodesMut<'a> {
    /// `fp8` and `int8`.
    U8(&'a mut [u8]),
    /// `bf16`.
    U16(&'a mut [u16]),
}

/// What a thread reuses from block to block of a dense decode.
#[derive(Default)]
struct Scratch {
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    quads: [Quads; 2],
    codes: Vec<u16>,
}

/// The two integers that codes are kept in.
pub(crate) trait CodeType: Copy + Default + Send + Sync + Into<u16> {
    fn from_code(code: u16) -> Self;
    fn from_bytes(bytes: &[u8]) -> Self;
    /// Decoded quads as rows of codes, with the bias added: row `r` at `out[r · stride..]`, `n_cols` codes each.
    ///
    /// # Safety
    /// The machine has AVX2.
    #[cfg(target_arch = "x86_64")]
    unsafe fn from_quads(quads: &Quads, bias: i32, n_cols: usize, out: &mut [Self], stride: usize, n_rows: usize);
}

impl CodeType for u8 {
    fn from_code(code: u16) -> Self {
        code as u8
    }

    fn from_bytes(bytes: &[u8]) -> Self {
        bytes[0]
    }

    #[cfg(target_arch = "x86_64")]
    unsafe fn from_quads(quads: &Quads, bias: i32, n_cols: usize, out: &mut [Self], stride: usize, n_rows: usize) {
        // SAFETY: the caller's promise is the same.
        unsafe { crate::simd::avx2::quads_to_u8(quads, bias, n_cols, out, stride, n_rows) }
    }
}

impl CodeType for u16 {
    fn from_code(code: u16) -> Self {
        code
    }

    fn from_bytes(bytes: &[u8]) -> Self {
        u16::from_le_bytes([bytes[0], bytes[1]])
    }

    #[cfg(target_arch = "x86_64")]
    unsafe fn from_quads(quads: &Quads, bias: i32, n_cols: usize, out: &mut [Self], stride: usize, n_rows: usize) {
        // SAFETY: the caller's promise is the same.
        unsafe { crate::simd::avx2::quads_to_u16(quads, bias, n_cols, out, stride, n_rows) }
    }
}

fn scale_bytes(scales: &Scales) -> Vec<u8> {
    match scales {
        Scales::None => Vec::new(),
        Scales::Tensor(s) => s.to_le_bytes().to_vec(),
        Scales::Channel(s) => s.iter().flat_map(|s| s.to_le_bytes()).collect(),
        Scales::Absmax(a) => a.iter().flat_map(|a| a.to_le_bytes()).collect(),
    }
}

fn check_payload(data: &[u8], sections: &Sections) -> Result<()> {
    let stored = u64::from_le_bytes(data[88..96].try_into().expect("8 bytes"));
    if stored == xxh3_64(&data[sections.raw.start..]) {
        return Ok(());
    }
    let problem = "the payload's checksum does not match: it is corrupt; get the archive anew";
    Err(Error::format("encoded tensor", problem))
}

/// The checksum of the metadata, its own field taken as zero.
fn metadata_checksum(metadata: &[u8]) -> u64 {
    let mut hasher = Xxh3::new();
    hasher.update(&metadata[..80]);
    hasher.update(&[0; 8]);
    hasher.update(&metadata[88..]);
    hasher.digest()
}

/// Encodes a matrix: the bytes of `docs/format.md`. Works on all threads of the current rayon pool; the result does not
/// depend on their number.
///
/// # Errors
/// A tensor that is not a non-empty matrix of BF16, F16 or F32; a weight that the format cannot hold; parameters that break
/// the format's rules.
pub fn encode_tensor(t: &Tensor, options: &EncodeOptions) -> Result<Vec<u8>> {
    let mut params = options.params;
    options.check()?;
    matrix_shape(t)?;
    let q = match (options.format, options.step) {
        (Format::Rate, Some(step)) => {
            let (q, chosen) = quantize_for_coder(t, step, options)?;
            params = chosen;
            q
        }
        (Format::Rate, None) => return Err(Error::Parameter("`rate` needs the step of its grid".into())),
        (format, _) => quantize(t, format, options.scale)?,
    };
    encode_quantized(t, q, params, options)
}

/// Encodes a matrix for inputs whose second moments are known: `rate` with error feedback, which makes the products' error small
/// rather than the weights'. The codes follow from `factor` as well as from the matrix, so that `t` alone does not yield them again.
///
/// `targets`, where given, are the weights to come close to in place of the matrix's own: see [`Correction`](crate::feedback::Correction).
///
/// # Errors
/// As [`encode_tensor`]; a format other than `rate`; a factor or targets that do not fit the matrix.
pub fn encode_with_feedback(
    t: &Tensor,
    options: &EncodeOptions,
    factor: &InputFactor,
    targets: Option<&[f32]>,
) -> Result<Vec<u8>> {
    let (Format::Rate, Some(step)) = (options.format, options.step) else {
        return Err(Error::Parameter("only `rate`, whose grid has a step, is encoded with error feedback".into()));
    };
    options.check()?;
    let (n_rows, n_cols) = matrix_shape(t)?;
    let mut params = options.params;
    let mut grid = Grid { step, raw_bits: None, trellis: None, targets };
    if options.coder == Coder::Rans {
        if params.is_none() {
            let nearest = match options.trellis {
                true => nearby_codes(t, step)?,
                false => quantize_with_feedback(t, &grid, factor)?.codes,
            };
            params = Some(params_for(&nearest, n_rows, n_cols, options));
        }
        grid.raw_bits = params.map(|p| p.raw_bits);
        grid.trellis = params.filter(|p| p.trellis).map(|p| p.block_cols as usize);
    }
    let q = quantize_with_feedback(t, &grid, factor)?;
    encode_quantized(t, q, params, options)
}

/// The bytes of a quantized matrix; `t` says what it was.
fn encode_quantized(
    t: &Tensor,
    q: QuantizedTensor<'_>,
    params: Option<Params>,
    options: &EncodeOptions,
) -> Result<Vec<u8>> {
    let (n_rows, n_cols) = matrix_shape(t)?;
    let header = Header {
        format: options.format,
        coder: options.coder,
        scale_kind: match q.scales {
            Scales::None => ScaleKind::None,
            Scales::Tensor(_) => ScaleKind::Tensor,
            Scales::Channel(_) => ScaleKind::Channel,
            Scales::Absmax(_) => ScaleKind::Absmax,
        },
        source_dtype: t.dtype,
        n_rows,
        n_cols,
        params: Params {
            parts_per_symbol: 0,
            table_bits: 0,
            raw_bits: 0,
            part_bits: 0,
            block_cols: 0,
            bias: 0,
            trellis: false,
        },
        table_bytes: 0,
        n_patches: 0,
        stream_bytes: 0,
        relative_error: q.relative_error,
        step: options.step.filter(|_| options.format == Format::Rate).unwrap_or(0.0),
        total_bytes: 0,
    };
    let scales = scale_bytes(&q.scales);
    match (options.coder, q.codes) {
        (Coder::Zstd, Codes::U8(codes)) => encode_zstd(header, &scales, &codes),
        (Coder::Zstd, Codes::U16(codes)) => {
            let bytes: Vec<u8> = codes.iter().flat_map(|c| c.to_le_bytes()).collect();
            encode_zstd(header, &scales, &bytes)
        }
        (Coder::Rans, Codes::U8(codes)) => encode_rans(header, &scales, codes, options.prefer, params),
        (Coder::Rans, Codes::U16(codes)) => encode_rans(header, &scales, codes, options.prefer, params),
    }
}

/// `rate`: the coder's parameters for the nearest grid points, then the codes that cost least with these.
fn quantize_for_coder<'a>(
    t: &'a Tensor,
    step: f32,
    options: &EncodeOptions,
) -> Result<(QuantizedTensor<'a>, Option<Params>)> {
    if options.coder == Coder::Zstd {
        return Ok((quantize_to_step(t, step, None)?, None));
    }
    let params = match options.params {
        Some(params) => params,
        None => {
            let nearest = match options.trellis {
                true => nearby_codes(t, step)?,
                false => quantize_to_step(t, step, None)?.codes,
            };
            params_for(&nearest, t.shape[0], t.shape[1], options)
        }
    };
    let q = match params.trellis {
        true => quantize_to_trellis(t, step, params.raw_bits, params.block_cols as usize)?,
        false => quantize_to_step(t, step, Some(params.raw_bits))?,
    };
    Ok((q, Some(params)))
}

/// The parameters for codes of `rate`, with a trellis those of the stream.
fn params_for(codes: &Codes<'_>, n_rows: usize, n_cols: usize, options: &EncodeOptions) -> Params {
    let Codes::U8(codes) = codes else { unreachable!("codes of `rate` are bytes") };
    choose_params(Format::Rate, codes, n_rows, n_cols, options.prefer, options.trellis)
}

fn encode_zstd(mut header: Header, scales: &[u8], codes: &[u8]) -> Result<Vec<u8>> {
    let frames: Vec<Vec<u8>> = codes
        .par_chunks(ZSTD_CHUNK_BYTES)
        .map(|chunk| zstd::bulk::compress(chunk, ZSTD_LEVEL))
        .collect::<std::io::Result<_>>()
        .map_err(|e| Error::Parameter(format!("zstd could not compress the codes: {e}")))?;
    let ends = frames.iter().scan(0u64, |at, frame| {
        *at += frame.len() as u64;
        Some(*at)
    });
    let offsets: Vec<u8> = std::iter::once(0).chain(ends).flat_map(u64::to_le_bytes).collect();
    header.stream_bytes = frames.iter().map(Vec::len).sum();
    assemble(header, |s| vec![(s.scales.start, scales), (s.offsets.start, &offsets)], &[], frames.into_iter())
}

fn encode_rans<T: CodeType>(
    mut header: Header,
    scales: &[u8],
    codes: Cow<'_, [T]>,
    prefer: Prefer,
    params: Option<Params>,
) -> Result<Vec<u8>> {
    let (format, n_cols) = (header.format, header.n_cols);
    let params = params.unwrap_or_else(|| choose_params(format, &codes, header.n_rows, n_cols, prefer, false));
    let split = SplitTable::new(format, &params);
    let counts = count_symbols(&codes, n_cols, &params, &split, 1);
    let choice = choose_table(&counts, params.parts_per_symbol, params.part_bits, params.table_bits);
    header.params = params;
    let geometry = header.geometry();
    let encoder = BlockEncoder::new(geometry, &choice, &split);
    let mut raw = vec![0u8; geometry.unit_raw_bytes() * geometry.n_units() * geometry.n_row_blocks()];
    let row_block_raw = geometry.unit_raw_bytes() * geometry.n_units();
    let blocks: Vec<EncodedRowBlock> = if row_block_raw == 0 {
        (0..geometry.n_row_blocks())
            .into_par_iter()
            .map(|i| encoder.encode(i, |row, col| codes[row * n_cols + col].into(), &mut []))
            .collect()
    } else {
        raw.par_chunks_mut(row_block_raw)
            .enumerate()
            .map(|(i, raw)| encoder.encode(i, |row, col| codes[row * n_cols + col].into(), raw))
            .collect()
    };
    drop(codes);

    let table = choice.table.to_bytes();
    let mut offsets = vec![0u32];
    let mut patch_offsets = vec![0u32];
    let mut patches: Vec<u8> = Vec::new();
    for (stream, block_patches) in blocks.iter().flat_map(|b| b.streams.iter().zip(&b.patches)) {
        let end = u64::from(offsets[offsets.len() - 1]) + (stream.len() / STREAM_ALIGN) as u64;
        offsets
            .push(u32::try_from(end).map_err(|_| {
                Error::Parameter("its streams exceed 64 GiB, the format's limit for one tensor".into())
            })?);
        patches.extend(block_patches.iter().flat_map(|p: &Patch| p.0.to_le_bytes()));
        patch_offsets.push((patches.len() / 4) as u32);
    }
    header.table_bytes = table.len();
    header.n_patches = patches.len() / 4;
    header.stream_bytes = offsets[offsets.len() - 1] as usize * STREAM_ALIGN;
    let offsets: Vec<u8> = offsets.into_iter().flat_map(u32::to_le_bytes).collect();
    let patch_offsets: Vec<u8> =
        if patches.is_empty() { Vec::new() } else { patch_offsets.into_iter().flat_map(u32::to_le_bytes).collect() };
    assemble(
        header,
        |s| {
            vec![
                (s.table.start, &table),
                (s.scales.start, scales),
                (s.offsets.start, &offsets),
                (s.patch_offsets.start, &patch_offsets),
                (s.patches.start, &patches),
            ]
        },
        &raw,
        blocks.into_iter().flat_map(|b| b.streams),
    )
}

/// Lays the sections out and adds the checksums.
fn assemble<'a>(
    mut header: Header,
    metadata: impl FnOnce(&Sections) -> Vec<(usize, &'a [u8])>,
    raw: &[u8],
    streams: impl Iterator<Item = Vec<u8>>,
) -> Result<Vec<u8>> {
    let sections = header.sections().ok_or_else(|| Error::Parameter("the matrix is too large to encode".into()))?;
    header.total_bytes = sections.total;
    let mut out = Vec::with_capacity(sections.total);
    out.extend_from_slice(&header.to_bytes());
    out.resize(sections.raw.start, 0);
    for (start, bytes) in metadata(&sections) {
        out[start..start + bytes.len()].copy_from_slice(bytes);
    }
    out.extend_from_slice(raw);
    out.resize(sections.stream.start, 0);
    streams.for_each(|s| out.extend_from_slice(&s));
    debug_assert_eq!(out.len(), sections.stream.end);
    out.resize(sections.total, 0);
    let payload = xxh3_64(&out[sections.raw.start..]);
    out[88..96].copy_from_slice(&payload.to_le_bytes());
    let metadata = metadata_checksum(&out[..sections.raw.start]);
    out[80..88].copy_from_slice(&metadata.to_le_bytes());
    Ok(out)
}

/// How often each symbol occurs in every `stride`-th row block.
fn count_symbols<T: CodeType>(
    codes: &[T],
    n_cols: usize,
    params: &Params,
    split: &SplitTable,
    stride: usize,
) -> Vec<u32> {
    let (g, w) = (params.parts_per_symbol as usize, params.part_bits);
    let row_blocks: Vec<&[T]> = codes.chunks(BLOCK_ROWS * n_cols).step_by(stride).collect();
    let new_counts = || vec![0u32; 1 << params.symbol_bits()];
    row_blocks
        .par_iter()
        .with_min_len(8)
        .fold(new_counts, |mut counts, rows| {
            for row in rows.chunks_exact(n_cols) {
                for symbol in row.chunks_exact(g) {
                    let parts = symbol.iter().enumerate();
                    counts[parts.fold(0, |s, (k, &c)| s | usize::from(split.get(c.into()).part) << (k as u32 * w))] +=
                        1;
                }
            }
            counts
        })
        .reduce(new_counts, |mut a, b| {
            a.iter_mut().zip(b).for_each(|(a, b)| *a = a.saturating_add(b));
            a
        })
}

/// Chooses the parameters by the bytes that they cost, table, patches and raw bits counted, on a sample of the rows.
fn choose_params<T: CodeType>(
    format: Format,
    codes: &[T],
    n_rows: usize,
    n_cols: usize,
    prefer: Prefer,
    trellis: bool,
) -> Params {
    const SAMPLE_WEIGHTS: usize = 1 << 18;
    let stride = codes.len().div_ceil(SAMPLE_WEIGHTS).clamp(1, n_rows.div_ceil(BLOCK_ROWS));
    let code_bits = format.code_bits();
    let mut histogram = vec![0u64; 1 << code_bits];
    for rows in codes.chunks(BLOCK_ROWS * n_cols).step_by(stride) {
        rows.iter().for_each(|&c| histogram[usize::from(c.into())] += 1);
    }
    let block_cols = prefer.block_cols(n_cols);
    let n: u64 = histogram.iter().sum();

    // A candidate's floor: the entropy of single parts, raw bits, and patches of what no part reaches.
    let raw_range = match format {
        Format::Bf16 => 7..=10,
        _ if trellis => 1..=6,
        _ => 0..=7,
    };
    // Of a trellis, the stream's codes have a bit less.
    let all_bits = code_bits - u32::from(trellis);
    let mut candidates: Vec<(f64, Params)> = Vec::new();
    for raw_bits in raw_range {
        for parts_per_symbol in [1u32, 2, 4, 8] {
            let magnitude_bits = all_bits - raw_bits;
            let part_bits = (crate::entropy::SYMBOL_BITS_MAX / parts_per_symbol).min(magnitude_bits).min(8);
            let mut params =
                Params { parts_per_symbol, table_bits: 10, raw_bits, part_bits, block_cols, bias: 0, trellis };
            choose_window(format, &mut params, &histogram);
            let split = SplitTable::new(format, &params);
            let mut parts = vec![0u64; 1 << params.part_bits];
            let mut patched = 0;
            for (code, &count) in histogram.iter().enumerate().filter(|&(_, &c)| c > 0) {
                let s = split.get(code as u16);
                parts[usize::from(s.part)] += count;
                patched += if s.patched { count } else { 0 };
            }
            let entropy: f64 =
                parts.iter().filter(|&&c| c > 0).map(|&c| c as f64 / n as f64).map(|p| -p * p.log2()).sum();
            let floor = entropy + f64::from(raw_bits) + patched as f64 / n as f64 * crate::entropy::PATCH_BITS;
            candidates.push((floor + prefer.work_cost(format, &params), params));
        }
    }
    candidates.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut best: Option<(f64, Params)> = None;
    for (floor, params) in candidates {
        if best.is_some_and(|(cost, _)| floor >= cost) {
            break;
        }
        let split = SplitTable::new(format, &params);
        let counts = count_symbols(codes, n_cols, &params, &split, stride);
        let counted: u64 = codes.chunks(BLOCK_ROWS * n_cols).step_by(stride).map(|rows| rows.len() as u64).sum();
        for table_bits in [10, 11, 12, 13] {
            let params = Params { table_bits, ..params };
            if table_bits + params.symbol_bits() > crate::entropy::ENTRY_BITS {
                continue;
            }
            let choice = choose_table(&counts, params.parts_per_symbol, params.part_bits, table_bits);
            let bits = choice.cost_bits / counted as f64 + f64::from(params.raw_bits);
            let cost = bits + prefer.work_cost(format, &params);
            if best.is_none_or(|(least, _)| cost < least) {
                best = Some((cost, params));
            }
        }
    }
    best.expect("there are candidates, and the first has no cost to exceed").1
}

/// Sets the bias so that the parts reach as many of the codes as they can, and the part bits to no more than those need.
fn choose_window(format: Format, params: &mut Params, histogram: &[u64]) {
    let low_bits = params.raw_bits.saturating_sub(1);
    let signed = format.is_integer() && params.raw_bits == 0;
    // Codes counted by what stands above the low bits; `int8` without raw bits from −128 up.
    let mut parts = vec![0u64; histogram.len()];
    for (code, &count) in histogram.iter().enumerate() {
        let at = match (params.raw_bits, format) {
            (0, Format::Int8 | Format::Rate) => code ^ 0x80,
            (0, _) => code,
            (_, Format::Int8 | Format::Rate) => (if code >= 128 { !code & 0x7f } else { code }) >> low_bits,
            (_, Format::Fp8) => (code & 0x7f) >> low_bits,
            (_, Format::Bf16) => (code & 0x7fff) >> low_bits,
        };
        parts[at] += count;
    }
    let used = parts.iter().rposition(|&c| c > 0).unwrap_or(0) + 1;
    let movable = params.raw_bits == 0 || format == Format::Bf16;
    let first = if movable { parts.iter().position(|&c| c > 0).unwrap_or(0) } else { 0 };
    let needed = (used - first).next_power_of_two().trailing_zeros().max(1);
    params.part_bits = params.part_bits.min(needed);
    let width = 1usize << params.part_bits;
    // The last window that fits the code's range.
    let code_range = match params.raw_bits {
        0 => histogram.len(),
        _ => (histogram.len() / 2) >> low_bits,
    };
    let mut start = 0;
    if movable {
        let mut inside: u64 = parts[..width.min(parts.len())].iter().sum();
        let mut most = inside;
        for s in 1..=code_range.saturating_sub(width) {
            inside = inside - parts[s - 1] + parts[s + width - 1];
            if inside > most {
                (most, start) = (inside, s);
            }
        }
    }
    params.bias = (start as i32) << low_bits;
    if signed {
        params.bias -= 128;
    }
}
