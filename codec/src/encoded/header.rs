//! The header, where the sections lie that it describes, and the checksums.

use crate::block::{Geometry, Params};
use crate::checkpoint::Dtype;
use crate::error::{Error, Result};
use crate::format::{Coder, Format};
use std::ops::Range;
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

pub(super) const MAGIC: &[u8; 8] = b"CODECLLM";
const VERSION_MAJOR: u16 = 1;
const VERSION_MINOR: u16 = 1;
/// What a program has to know that reads the tensor: a trellis came with version 1.1.
fn minor_of(params: &Params) -> u16 {
    u16::from(params.trellis)
}
pub(super) const HEADER_BYTES: usize = 128;
pub(super) const SECTION_ALIGN: usize = 64;
/// Zero bytes after the last stream, so that a vector load past its end stays within the tensor.
const TAIL_BYTES: usize = 64;
pub(super) const ZSTD_CHUNK_BYTES: usize = 1 << 16;

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

/// The header's fields (section 2).
#[derive(Debug, Clone)]
pub(super) struct Header {
    pub format: Format,
    pub coder: Coder,
    pub scale_kind: ScaleKind,
    pub source_dtype: Dtype,
    pub n_rows: usize,
    pub n_cols: usize,
    pub params: Params,
    pub table_bytes: usize,
    pub n_patches: usize,
    pub stream_bytes: usize,
    pub relative_error: f32,
    /// `rate`: the step of the grid; 0 in other formats.
    pub step: f32,
    pub total_bytes: usize,
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
    pub(super) fn zstd_chunks(&self) -> usize {
        (self.n_rows * self.n_cols * (self.format.code_bits() as usize / 8)).div_ceil(ZSTD_CHUNK_BYTES)
    }

    pub(super) fn geometry(&self) -> Geometry {
        Geometry { n_rows: self.n_rows, n_cols: self.n_cols, params: self.params }
    }

    /// None where a size overflows.
    pub(super) fn sections(&self) -> Option<Sections> {
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

    pub(super) fn to_bytes(&self) -> [u8; HEADER_BYTES] {
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

    pub(super) fn from_bytes(data: &[u8]) -> Result<Self> {
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

pub(super) fn check_payload(data: &[u8], sections: &Sections) -> Result<()> {
    let stored = u64::from_le_bytes(data[88..96].try_into().expect("8 bytes"));
    if stored == xxh3_64(&data[sections.raw.start..]) {
        return Ok(());
    }
    let problem = "the payload's checksum does not match: it is corrupt; get the archive anew";
    Err(Error::format("encoded tensor", problem))
}

/// The checksum of the metadata, its own field taken as zero.
pub(super) fn metadata_checksum(metadata: &[u8]) -> u64 {
    let mut hasher = Xxh3::new();
    hasher.update(&metadata[..80]);
    hasher.update(&[0; 8]);
    hasher.update(&metadata[88..]);
    hasher.digest()
}
