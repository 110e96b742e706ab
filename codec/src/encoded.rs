//! One encoded tensor: its bytes (`docs/format.md`), made by [`encode_tensor`] and read through [`EncodedTensor`].

mod decode;
mod encode;
mod header;
mod verify;

pub use decode::CodesMut;
pub(crate) use decode::{CodeType, DecodeTables};
pub use encode::{EncodeOptions, Prefer, encode_tensor, encode_with_feedback};
pub use header::{ScaleKind, Sections};

use crate::block::{BLOCK_ROWS, Block, Geometry, Params, STREAM_ALIGN};
use crate::checkpoint::Dtype;
use crate::entropy::{FrequencyTable, Transition};
use crate::error::{Error, Result};
use crate::format::{Coder, Format};
use crate::quantize::scale_of;
use crate::simd::Plan;
use bytes::Bytes;
use header::{HEADER_BYTES, Header, MAGIC, SECTION_ALIGN, check_payload, metadata_checksum};
use std::ops::Range;
use std::sync::Arc;

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
}
