//! Blocks of 32 rows: their geometry, the encoder, and the plain decoder that every fast one is tested against.
//! `docs/format.md`, sections 4 to 7.

use crate::entropy::{SymbolEncoder, TableChoice, Transition};
use crate::error::{Error, Result};
use crate::format::Format;
use crate::trellis::{Grids, PHASES};

/// Rows of a block; lane `l` of a decoder has row `l`.
pub const BLOCK_ROWS: usize = 32;
/// Columns whose raw bits lie together.
pub const UNIT_COLS: usize = 32;
/// Most columns of a block.
pub const BLOCK_COLS_MAX: usize = 2048;
/// Streams begin at multiples of this many bytes.
pub const STREAM_ALIGN: usize = 16;

/// How a tensor's codes are split and coded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct Params {
    /// G: coded parts a symbol, 1, 2, 4 or 8.
    pub parts_per_symbol: u32,
    /// T: the decode table has 2^T slots.
    pub table_bits: u32,
    /// k: raw bits a weight.
    pub raw_bits: u32,
    /// w: bits a part.
    pub part_bits: u32,
    /// C: columns a block, a multiple of 32.
    pub block_cols: u32,
    /// B: added to every magnitude (to every code where k = 0).
    pub bias: i32,
    /// Codes are those of a trellis: [`crate::trellis`].
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub trellis: bool,
}

impl Params {
    /// w·G.
    pub fn symbol_bits(&self) -> u32 {
        self.part_bits * self.parts_per_symbol
    }

    /// Checks the rules of the header (sections 2 and 5).
    pub fn validate(&self, format: Format) -> Result<()> {
        let &Self { parts_per_symbol: g, table_bits: t, raw_bits: k, part_bits: w, block_cols: c, bias: b, trellis } =
            self;
        let bad = |problem: String| Err(Error::format("header", problem));
        let (k_max, code_bits) = if format == Format::Bf16 { (15, 16) } else { (8, 8) };
        if !matches!(g, 1 | 2 | 4 | 8) {
            return bad(format!("{g} parts a symbol; 1, 2, 4 or 8 expected"));
        }
        if !crate::entropy::TABLE_BITS.contains(&t) {
            return bad(format!("{t} table bits; 5 to 14 expected"));
        }
        if k > k_max {
            return bad(format!("{k} raw bits a weight; `{format}` has at most {k_max}"));
        }
        if w == 0 || w * g > crate::entropy::SYMBOL_BITS_MAX || w * g + t > crate::entropy::ENTRY_BITS {
            return bad(format!("{g} parts of {w} bits a symbol and {t} table bits; a table entry does not hold them"));
        }
        if c == 0 || !(c as usize).is_multiple_of(UNIT_COLS) || c as usize > BLOCK_COLS_MAX {
            return bad(format!("{c} columns a block; a multiple of 32 up to {BLOCK_COLS_MAX} expected"));
        }
        let top = i64::from(b) + (1i64 << (w + k.saturating_sub(1)));
        let in_range = match (k, format) {
            (0, Format::Int8 | Format::Rate) => b >= -128 && top <= 128,
            (0, _) => b >= 0 && top <= 1 << code_bits,
            (_, Format::Bf16) => b >= 0 && top <= 1 << 15,
            (_, _) => b == 0 && top <= 128,
        };
        if !in_range {
            return bad(format!("bias {b} with parts of {w} and raw bits of {k} leaves the codes of `{format}`"));
        }
        if trellis && (format != Format::Rate || k == 0 || w + k > 7) {
            return bad(format!(
                "a trellis with `{format}`, {k} raw bits and parts of {w}; `rate` has one, with at least 1 raw bit and at most 7 bits in all"
            ));
        }
        Ok(())
    }

    /// The code that a patched weight stands as.
    pub fn filler(&self, format: Format) -> u16 {
        join(format, self, 0, 0)
    }
}

/// Where everything lies in a matrix of `n_rows` × `n_cols` under `params`.
#[derive(Debug, Clone, Copy)]
pub struct Geometry {
    /// Rows of the matrix.
    pub n_rows: usize,
    /// Columns of the matrix.
    pub n_cols: usize,
    /// Its parameters, validated.
    pub params: Params,
}

impl Geometry {
    /// ⌈n_rows / 32⌉
    pub fn n_row_blocks(&self) -> usize {
        self.n_rows.div_ceil(BLOCK_ROWS)
    }

    /// ⌈n_cols / C⌉
    pub fn n_col_blocks(&self) -> usize {
        self.n_cols.div_ceil(self.params.block_cols as usize)
    }

    /// Blocks in all.
    pub fn n_blocks(&self) -> usize {
        self.n_row_blocks() * self.n_col_blocks()
    }

    /// Units of 32 columns in a row of blocks.
    pub fn n_units(&self) -> usize {
        self.n_cols.div_ceil(UNIT_COLS)
    }

    /// The columns of block column `j`.
    pub fn cols(&self, j: usize) -> std::ops::Range<usize> {
        let start = j * self.params.block_cols as usize;
        start..self.n_cols.min(start + self.params.block_cols as usize)
    }

    /// The rows of block row `i` that the matrix has.
    pub fn rows(&self, i: usize) -> std::ops::Range<usize> {
        i * BLOCK_ROWS..self.n_rows.min((i + 1) * BLOCK_ROWS)
    }

    /// Bytes of a unit's raw bits.
    pub fn unit_raw_bytes(&self) -> usize {
        4 * BLOCK_ROWS * self.params.raw_bits as usize
    }

    /// The raw bytes of block (i, j), within the raw section.
    pub fn raw_range(&self, i: usize, j: usize) -> std::ops::Range<usize> {
        let cols = self.cols(j);
        let unit = i * self.n_units() + cols.start / UNIT_COLS;
        let bytes = self.unit_raw_bytes();
        unit * bytes..(unit + cols.len().div_ceil(UNIT_COLS)) * bytes
    }
}

/// One field of the raw bits: `width` bits from bit `shift` of the raw number, in `width` words from word `first_word` of a unit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RawField {
    /// 8, 4, 2 or 1.
    pub width: u32,
    /// Lowest bit of the raw number that the field holds.
    pub shift: u32,
    /// The field's first word in the unit (each word is 32 lanes × 32 bits).
    pub first_word: u32,
}

/// The fields of `raw_bits` bits, in the order of their words.
pub fn raw_fields(raw_bits: u32) -> impl Iterator<Item = RawField> {
    let mut done = 0;
    [8, 4, 2, 1].into_iter().filter(move |&width| raw_bits & width != 0).map(move |width| {
        let field = RawField { width, shift: done, first_word: done };
        done += width;
        field
    })
}

/// The code of a part and raw bits (section 5).
#[inline(always)]
pub fn join(format: Format, params: &Params, part: u32, raw: u32) -> u16 {
    if params.raw_bits == 0 {
        let code = params.bias.wrapping_add(part as i32);
        return if format == Format::Bf16 { code as u16 } else { code as u8 as u16 };
    }
    let low_bits = params.raw_bits - 1;
    let negative = raw >> low_bits & 1 == 1;
    let magnitude = params.bias as u32 + (part << low_bits) + (raw & ((1 << low_bits) - 1));
    match (format, negative) {
        (Format::Int8 | Format::Rate, true) => !magnitude as u8 as u16,
        (Format::Fp8, true) => magnitude as u16 | 0x80,
        (Format::Bf16, true) => magnitude as u16 | 0x8000,
        (_, false) => magnitude as u16,
    }
}

/// The inverse of [`join`]: part and raw bits of a code, or none if it must be patched.
pub fn split(format: Format, params: &Params, code: u16) -> Option<(u32, u32)> {
    let in_range = |offset: i32, bits: u32| (offset >= 0 && offset >> bits == 0).then_some(offset as u32);
    if params.raw_bits == 0 {
        let value = if format.is_integer() { i32::from(code as u8 as i8) } else { code.into() };
        return in_range(value - params.bias, params.part_bits).map(|part| (part, 0));
    }
    let low_bits = params.raw_bits - 1;
    let (negative, magnitude) = match format {
        Format::Int8 | Format::Rate => {
            let value = i32::from(code as u8 as i8);
            (value < 0, if value < 0 { !value } else { value })
        }
        Format::Fp8 => (code & 0x80 != 0, i32::from(code & 0x7f)),
        Format::Bf16 => (code & 0x8000 != 0, i32::from(code & 0x7fff)),
    };
    in_range(magnitude - params.bias, params.part_bits + low_bits)
        .map(|offset| (offset >> low_bits, u32::from(negative) << low_bits | (offset & ((1 << low_bits) - 1))))
}

/// A weight whose code stands outside the stream (section 5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Patch(pub u32);

impl Patch {
    /// A patch of `code` at `row`, `col` of its block.
    pub fn new(row: usize, col: usize, code: u16) -> Self {
        debug_assert!(row < BLOCK_ROWS && col < BLOCK_COLS_MAX);
        Self((col as u32) << 21 | (row as u32) << 16 | u32::from(code))
    }

    /// Row within the block.
    pub fn row(self) -> usize {
        (self.0 >> 16 & 31) as usize
    }

    /// Column within the block.
    pub fn col(self) -> usize {
        (self.0 >> 21) as usize
    }

    /// The true code.
    pub fn code(self) -> u16 {
        self.0 as u16
    }

    /// With a trellis, where 8 bits are the code's: what stands in the weight's place.
    pub fn stand_in(self) -> i8 {
        (self.0 >> 8) as u8 as i8
    }
}

/// What one block's decoder reads.
#[derive(Debug, Clone, Copy)]
pub struct Block<'a> {
    /// The tensor's bytes from the start of the block's stream to the tensor's end: at least 64 bytes follow the stream.
    pub stream: &'a [u8],
    /// Bytes of the stream itself.
    pub stream_bytes: usize,
    /// The block's raw bits.
    pub raw: &'a [u8],
    /// The block's patches, 4 bytes each.
    pub patches: &'a [[u8; 4]],
    /// Columns.
    pub n_cols: usize,
}

impl<'a> Block<'a> {
    /// The patches, decoded.
    pub fn patches(&self) -> impl Iterator<Item = Patch> + 'a {
        self.patches.iter().map(|b| Patch(u32::from_le_bytes(*b)))
    }
}

/// A stream whose words do not add up.
pub(crate) fn corrupt_stream() -> Error {
    Error::format("stream", "its words do not decode to the block; the payload is corrupt")
}

/// Decodes a block, plainly. `codes` is row-major, 32 × `block.n_cols`.
///
/// # Errors
/// A stream that ends early or has words left over. `codes` then holds no meaningful values.
pub fn decode_block(
    format: Format,
    params: &Params,
    transitions: &[Transition],
    block: &Block<'_>,
    codes: &mut [u16],
) -> Result<()> {
    let n_cols = block.n_cols;
    assert_eq!(codes.len(), BLOCK_ROWS * n_cols);
    let parts_per_symbol = params.parts_per_symbol as usize;
    let part_mask = (1u32 << params.part_bits) - 1;

    let mut words =
        block.stream[..block.stream_bytes].as_chunks::<2>().0.iter().map(|b| u32::from(u16::from_le_bytes(*b)));
    let mut n_words = 0usize;
    let mut next_word = || {
        n_words += 1;
        words.next().ok_or_else(corrupt_stream)
    };

    let mut x = [0u32; BLOCK_ROWS]; // state in the top T bits, then the bits that wait
    let mut position = [params.table_bits; BLOCK_ROWS];
    for x in &mut x {
        *x = next_word()? << 16;
    }
    let fields: Vec<RawField> = raw_fields(params.raw_bits).collect();
    let to_top = 32 - params.table_bits;
    let n_steps = n_cols.div_ceil(parts_per_symbol);
    let mut grids = [Grids::default(); BLOCK_ROWS];
    for step in 0..n_steps {
        for lane in 0..BLOCK_ROWS {
            let slot = x[lane] >> to_top;
            let t = transitions[slot as usize];
            let first = step * parts_per_symbol;
            let row = &mut codes[lane * n_cols..][first..n_cols.min(first + parts_per_symbol)];
            for (g, code) in row.iter_mut().enumerate() {
                let part = u32::from(t.symbol) >> (g as u32 * params.part_bits) & part_mask;
                *code = join(format, params, part, raw_bits(block.raw, params, &fields, lane, first + g));
                if params.trellis {
                    *code = grids[lane].value((first + g) % PHASES, *code as i8) as u8 as u16;
                }
            }
            if step + 1 == n_steps {
                continue; // the last symbol leads nowhere
            }
            // The next state is the base plus the bits read: the shift brings those up, behind what is left of the slot.
            let left = slot << t.n_bits;
            x[lane] = (x[lane] << t.n_bits).wrapping_add(u32::from(t.base).wrapping_sub(left) << to_top);

            let before = position[lane];
            position[lane] += u32::from(t.n_bits);
            if (before ^ position[lane]) & 16 != 0 {
                x[lane] |= next_word()? << (16 - params.table_bits + (position[lane] & 15));
            }
        }
    }
    if (2 * n_words).next_multiple_of(STREAM_ALIGN) != block.stream_bytes {
        return Err(corrupt_stream());
    }
    let code_bits = u16::MAX >> (16 - format.code_bits());
    for patch in block.patches() {
        codes[patch.row() * n_cols + patch.col()] = patch.code() & code_bits;
    }
    Ok(())
}

/// The raw bits of one weight (section 6).
#[inline(always)]
fn raw_bits(raw: &[u8], params: &Params, fields: &[RawField], lane: usize, col: usize) -> u32 {
    let (unit, quad, byte) = (col / UNIT_COLS, (col % UNIT_COLS / 4) as u32, col % 4);
    fields.iter().fold(0, |bits, field| {
        let word = (field.first_word + quad * field.width / 8) as usize;
        let at = 4 * ((unit * params.raw_bits as usize + word) * BLOCK_ROWS + lane) + byte;
        let value = u32::from(raw[at]) >> (quad * field.width % 8) & ((1 << field.width) - 1);
        bits | value << field.shift
    })
}

/// Encodes row blocks of one tensor under a chosen table.
pub struct BlockEncoder<'a> {
    /// The matrix's layout.
    pub geometry: Geometry,
    choice: &'a TableChoice,
    encoder: SymbolEncoder,
    split: &'a SplitTable,
    /// Stands in the rows past the matrix's last.
    cheapest: u16,
}

/// [`split`], tabled by code.
pub struct SplitTable(Vec<SplitCode>);

/// One code, split.
#[derive(Clone, Copy)]
pub struct SplitCode {
    /// The part; 0 where the code must be patched.
    pub part: u16,
    /// The raw bits; 0 where the code must be patched.
    pub raw: u16,
    /// Whether the code must be patched.
    pub patched: bool,
}

impl SplitTable {
    /// The splits of all codes of `format`.
    pub fn new(format: Format, params: &Params) -> Self {
        let all = 0..=u16::MAX >> (16 - format.code_bits());
        Self(
            all.map(|code| match split(format, params, code) {
                Some((part, raw)) => SplitCode { part: part as u16, raw: raw as u16, patched: false },
                None => SplitCode { part: 0, raw: 0, patched: true },
            })
            .collect(),
        )
    }

    /// The split of `code`.
    #[inline(always)]
    pub fn get(&self, code: u16) -> SplitCode {
        self.0[usize::from(code)]
    }
}

/// One row of blocks, encoded.
#[derive(Default)]
pub struct EncodedRowBlock {
    /// Each block's stream, padded.
    pub streams: Vec<Vec<u8>>,
    /// Each block's patches.
    pub patches: Vec<Vec<Patch>>,
}

impl<'a> BlockEncoder<'a> {
    /// An encoder for `choice`, whose codes split by `split`.
    pub fn new(geometry: Geometry, choice: &'a TableChoice, split: &'a SplitTable) -> Self {
        let encoder = SymbolEncoder::new(&choice.table, geometry.params.symbol_bits());
        let cheapest = choice.table.entries().iter().max_by_key(|&&(_, f)| f).map_or(0, |&(s, _)| s);
        Self { geometry, choice, encoder, split, cheapest }
    }

    /// Encodes block row `i`. `code(row, col)` is the code at that place of the matrix, with a trellis that of the stream; `raw` receives the
    /// row block's raw bits, and must be zero before.
    pub fn encode(&self, i: usize, code: impl Fn(usize, usize) -> u16, raw: &mut [u8]) -> EncodedRowBlock {
        let params = &self.geometry.params;
        let (g, w) = (params.parts_per_symbol as usize, params.part_bits);
        let part_mask = (1u16 << w) - 1;
        let rows = self.geometry.rows(i);
        let raw_words: &mut [[u8; 4]] = raw.as_chunks_mut().0;
        let fields: Vec<RawField> = raw_fields(params.raw_bits).collect();
        let mut out = EncodedRowBlock::default();
        let (mut symbols, mut splits) = (Vec::new(), [SplitCode { part: 0, raw: 0, patched: false }; 8]);
        let mut pushed = Vec::new();
        for j in 0..self.geometry.n_col_blocks() {
            let cols = self.geometry.cols(j);
            let n_steps = cols.len().div_ceil(g);
            symbols.clear();
            symbols.resize(n_steps * BLOCK_ROWS, self.cheapest);
            let mut patches = Vec::new();
            for (lane, row) in rows.clone().enumerate() {
                let mut grids = Grids::default();
                for step in 0..n_steps {
                    let first = cols.start + step * g;
                    let n = g.min(cols.end - first);
                    let mut symbol = 0;
                    for (k, s) in splits[..n].iter_mut().enumerate() {
                        *s = self.split.get(code(row, first + k));
                        symbol |= s.part << (k as u32 * w);
                    }
                    let target =
                        if n == g { self.choice.substitutes[usize::from(symbol)] } else { self.ending_in(symbol, n) };
                    symbols[step * BLOCK_ROWS + lane] = target;
                    for (k, s) in splits[..n].iter().enumerate() {
                        let col = first + k;
                        let is_patched = s.patched || (symbol ^ target) >> (k as u32 * w) & part_mask != 0;
                        let mut bits = u32::from(s.raw);
                        if is_patched {
                            let code = code(row, col);
                            if !params.trellis {
                                patches.push(Patch::new(lane, col - cols.start, code));
                                continue;
                            }
                            // What stands there has to leave the grids as they are: 0, or −1, whose sign alone is set.
                            let odd = code & 1;
                            let phase = (col - cols.start) % PHASES;
                            let stand_in = grids.clone().value(phase, -(odd as i8));
                            let value = grids.value(phase, code as i8);
                            patches.push(Patch::new(
                                lane,
                                col - cols.start,
                                u16::from_le_bytes([value as u8, stand_in as u8]),
                            ));
                            bits = u32::from(odd) << (params.raw_bits - 1);
                        } else if params.trellis {
                            grids.value((col - cols.start) % PHASES, code(row, col) as i8);
                        }
                        let (unit, quad, byte) = (col / UNIT_COLS, (col % UNIT_COLS / 4) as u32, col % 4);
                        for f in &fields {
                            let word = (f.first_word + quad * f.width / 8) as usize;
                            let value = (bits >> f.shift & ((1 << f.width) - 1)) << (quad * f.width % 8);
                            raw_words[(unit * params.raw_bits as usize + word) * BLOCK_ROWS + lane][byte] |=
                                value as u8;
                        }
                    }
                }
            }
            patches.sort_unstable();
            out.streams.push(self.encode_stream(&symbols, &mut pushed));
            out.patches.push(patches);
        }
        out
    }

    /// A symbol of the table for the last, shorter step of a row: its first `n` parts are those of `symbol`, or zero.
    fn ending_in(&self, symbol: u16, n: usize) -> u16 {
        let w = self.geometry.params.part_bits;
        let mask = (1u32 << w) - 1;
        let cost = |candidate: u16| {
            (0..n as u32).try_fold(0u32, |patches, k| {
                let (want, have) = (u32::from(symbol) >> (k * w) & mask, u32::from(candidate) >> (k * w) & mask);
                if want == have { Some(patches) } else { (have == 0).then_some(patches + 1) }
            })
        };
        let entries = self.choice.table.entries().iter();
        let best = entries.filter_map(|&(s, f)| cost(s).map(|patches| (patches, std::cmp::Reverse(f), s))).min();
        best.map_or(0, |(_, _, s)| s)
    }

    /// Codes the symbols of a block ([step][lane]) into its stream.
    fn encode_stream(&self, symbols: &[u16], pushed: &mut Vec<(u16, u8)>) -> Vec<u8> {
        let table_bits = self.geometry.params.table_bits;
        // Backward, as the coder works. A lane's last symbol is said by the state alone.
        pushed.clear();
        pushed.resize(symbols.len() - BLOCK_ROWS, (0, 0));
        let last = symbols.len() - BLOCK_ROWS;
        let mut states: [u16; BLOCK_ROWS] = std::array::from_fn(|lane| self.encoder.last(symbols[last + lane]));
        let before_last = symbols[..last].chunks_exact(BLOCK_ROWS);
        for (symbols, pushed) in before_last.zip(pushed.chunks_exact_mut(BLOCK_ROWS)).rev() {
            for lane in 0..BLOCK_ROWS {
                let (state, bits, n_bits) = self.encoder.push(states[lane], symbols[lane]);
                states[lane] = state;
                pushed[lane] = (bits, n_bits as u8);
            }
        }
        // Forward, in the order of the decoder's needs: a word gets its place when it is first needed, and its bits as
        // they come.
        let mut words = vec![0u16; BLOCK_ROWS];
        words.reserve(symbols.len());
        let mut place: [usize; BLOCK_ROWS] = std::array::from_fn(|lane| lane);
        let mut bits: [u32; BLOCK_ROWS] = states.map(u32::from);
        let mut position = [table_bits; BLOCK_ROWS];
        for pushed in pushed.chunks_exact(BLOCK_ROWS) {
            for lane in 0..BLOCK_ROWS {
                let (value, n_bits) = pushed[lane];
                bits[lane] = bits[lane] << n_bits | u32::from(value);
                let before = position[lane];
                position[lane] += u32::from(n_bits);
                if (before ^ position[lane]) & 16 != 0 {
                    words[place[lane]] = (bits[lane] >> (position[lane] & 15)) as u16;
                    place[lane] = words.len();
                    words.push(0);
                }
            }
        }
        for lane in 0..BLOCK_ROWS {
            words[place[lane]] = (bits[lane] << (16 - (position[lane] & 15))) as u16;
        }
        let mut bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        bytes.resize(bytes.len().next_multiple_of(STREAM_ALIGN), 0);
        bytes
    }
}
