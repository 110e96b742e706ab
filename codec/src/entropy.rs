//! Tabled asymmetric numeral systems over symbols of several parts: the frequency table, its bytes, and the encoder's and
//! decoder's transitions. `docs/format.md`, section 7.
//!
//! Source of the algorithm: J. Duda, "Asymmetric numeral systems: entropy coding combining speed of Huffman coding with
//! compression rate of arithmetic coding", arXiv 1311.2540. Laying several parts in one table entry, and leaving rare
//! combinations to patches rather than to an escape in the stream, is ours: the decoder has no branch on the data.

use crate::error::{Error, Result};

/// Smallest and largest number of table bits.
pub const TABLE_BITS: std::ops::RangeInclusive<u32> = 5..=14;
/// Most bits of a symbol.
pub const SYMBOL_BITS_MAX: u32 = 15;
/// Bits of a table entry for the symbol and the state together: a 32-bit entry less 5 bits of count.
pub const ENTRY_BITS: u32 = 27;
/// Bits of a patch in the archive.
pub const PATCH_BITS: f64 = 32.0;

/// How often each symbol stands among the 2^T slots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FrequencyTable {
    /// T.
    table_bits: u32,
    /// (symbol, frequency), ascending by symbol; the frequencies add up to 2^T.
    entries: Vec<(u16, u16)>,
}

impl FrequencyTable {
    /// The symbols with their frequencies, ascending by symbol.
    pub fn entries(&self) -> &[(u16, u16)] {
        &self.entries
    }

    /// T.
    pub fn table_bits(&self) -> u32 {
        self.table_bits
    }

    /// The table section's bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = (self.entries.len() as u16).to_le_bytes().to_vec();
        let mut previous = -1i32;
        for &(symbol, frequency) in &self.entries {
            push_leb128(&mut out, (i32::from(symbol) - previous) as u32);
            push_leb128(&mut out, frequency.into());
            previous = symbol.into();
        }
        out
    }

    /// Reads a table section.
    ///
    /// # Errors
    /// A section that is truncated, has bytes left over, a symbol of more than `symbol_bits` bits, or frequencies that do
    /// not add up to 2^`table_bits`.
    pub fn from_bytes(bytes: &[u8], table_bits: u32, symbol_bits: u32) -> Result<Self> {
        let bad = |problem: String| Error::format("frequency table", problem);
        let (count, mut rest) =
            bytes.split_first_chunk::<2>().ok_or_else(|| bad("it is shorter than its count".into()))?;
        let n_symbols = u16::from_le_bytes(*count);
        let mut entries = Vec::with_capacity(n_symbols.into());
        let (mut symbol, mut total) = (-1i64, 0u64);
        for i in 0..n_symbols {
            let mut next =
                || read_leb128(&mut rest).ok_or_else(|| bad(format!("it ends within symbol {i} of {n_symbols}")));
            let (difference, frequency) = (next()?, next()?);
            symbol += i64::from(difference);
            total += u64::from(frequency);
            if difference == 0 || symbol >> symbol_bits != 0 {
                return Err(bad(format!("symbol {i} is {symbol}: not above the one before and below 2^{symbol_bits}")));
            }
            if frequency == 0 || total > 1 << table_bits {
                return Err(bad(format!(
                    "the frequencies up to symbol {i} add up to {total}; 2^{table_bits} is the sum"
                )));
            }
            entries.push((symbol as u16, frequency as u16));
        }
        if total != 1 << table_bits {
            return Err(bad(format!("the frequencies add up to {total}, expected 2^{table_bits}")));
        }
        if !rest.is_empty() {
            return Err(bad(format!("{} bytes are left over", rest.len())));
        }
        Ok(Self { table_bits, entries })
    }

    /// The symbol of every slot, and for each the occurrence's count n (section 7, "Spread" and "Transition").
    fn slots(&self) -> impl Iterator<Item = (usize, u32)> {
        let size = 1usize << self.table_bits;
        let step = (size >> 1) + (size >> 3) + 3;
        let mut owner = vec![0u16; size];
        let mut at = 0;
        for (index, &(_, frequency)) in self.entries.iter().enumerate() {
            for _ in 0..frequency {
                owner[at] = index as u16;
                at = (at + step) & (size - 1);
            }
        }
        let mut counts: Vec<u32> = self.entries.iter().map(|&(_, f)| f.into()).collect();
        owner.into_iter().map(move |index| {
            let index = usize::from(index);
            counts[index] += 1;
            (index, counts[index] - 1)
        })
    }

    /// The decoder's transition of every slot.
    pub fn transitions(&self) -> Vec<Transition> {
        self.slots()
            .map(|(index, n)| {
                let n_bits = self.table_bits - n.ilog2();
                Transition {
                    symbol: self.entries[index].0,
                    n_bits: n_bits as u8,
                    base: ((n << n_bits) - (1 << self.table_bits)) as u16,
                }
            })
            .collect()
    }
}

/// What one slot of the decode table says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Transition {
    /// The symbol output.
    pub symbol: u16,
    /// Bits to read for the next state.
    pub n_bits: u8,
    /// The next state is this plus the bits read.
    pub base: u16,
}

fn push_leb128(out: &mut Vec<u8>, mut value: u32) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// One number of at most 21 bits; longer spellings are refused.
fn read_leb128(bytes: &mut &[u8]) -> Option<u32> {
    let mut value = 0;
    for shift in [0, 7, 14] {
        let (&byte, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u32::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

/// The encoder's side of a [`FrequencyTable`]: it works backward, from a lane's last symbol to its first.
pub struct SymbolEncoder {
    table_bits: u32,
    /// By symbol; `frequency` 0 for a symbol that the table lacks.
    symbols: Vec<SymbolCoding>,
    /// Slots of each symbol in ascending order, symbol after symbol.
    slots: Vec<u16>,
}

#[derive(Clone, Copy, Default)]
struct SymbolCoding {
    frequency: u32,
    start: u32,
    n_bits_max: u32,
}

impl SymbolEncoder {
    /// Prepares `table`, whose symbols have at most `symbol_bits` bits.
    pub fn new(table: &FrequencyTable, symbol_bits: u32) -> Self {
        let mut symbols = vec![SymbolCoding::default(); 1 << symbol_bits];
        let mut starts = Vec::with_capacity(table.entries.len());
        let mut start = 0u32;
        for &(symbol, frequency) in &table.entries {
            let frequency = u32::from(frequency);
            let n_bits_max = table.table_bits - frequency.ilog2();
            symbols[usize::from(symbol)] = SymbolCoding { frequency, start, n_bits_max };
            starts.push((start, frequency));
            start += frequency;
        }
        let mut slots = vec![0u16; 1 << table.table_bits];
        for (slot, (index, n)) in table.slots().enumerate() {
            let (start, frequency) = starts[index];
            slots[(start + n - frequency) as usize] = slot as u16;
        }
        Self { table_bits: table.table_bits, symbols, slots }
    }

    /// Whether the table has `symbol`.
    pub fn has(&self, symbol: u16) -> bool {
        self.symbols[usize::from(symbol)].frequency != 0
    }

    /// A state that says `symbol`, for a lane's last. The table must have the symbol.
    pub fn last(&self, symbol: u16) -> u16 {
        self.slots[self.symbols[usize::from(symbol)].start as usize]
    }

    /// Codes `symbol` before what `state` stands for: the new state, the bits that take a decoder from it back to
    /// `state`, and how many those are. The table must have the symbol.
    #[inline(always)]
    pub fn push(&self, state: u16, symbol: u16) -> (u16, u16, u32) {
        let s = self.symbols[usize::from(symbol)];
        debug_assert!(s.frequency != 0);
        let x = u32::from(state) + (1 << self.table_bits);
        let n_bits = s.n_bits_max - u32::from(x >> s.n_bits_max < s.frequency);
        let slot = self.slots[(s.start + (x >> n_bits) - s.frequency) as usize];
        (slot, (x & ((1 << n_bits) - 1)) as u16, n_bits)
    }
}

/// A table chosen for a tensor, and what becomes of the symbols that it lacks.
pub struct TableChoice {
    /// The table.
    pub table: FrequencyTable,
    /// By symbol: itself, or the symbol that stands in its place, equal but for parts that are 0 and patched.
    pub substitutes: Vec<u16>,
    /// Estimated bits of the streams, the patches and the table together.
    pub cost_bits: f64,
}

/// Chooses a table of 2^`table_bits` slots for symbols of `parts` × `part_bits` bits that occur `counts` times.
///
/// A symbol gets slots if coding it beats patching it; one without is coded as another symbol, some of its
/// parts set to 0 (the filler) and patched.
pub fn choose_table(counts: &[u32], parts: u32, part_bits: u32, table_bits: u32) -> TableChoice {
    let size = 1u64 << table_bits;
    let total: u64 = counts.iter().map(|&c| u64::from(c)).sum();
    let part_mask = (1u32 << part_bits) - 1;
    let shifts = || (0..parts).map(|g| g * part_bits);

    let mut marginal = vec![0u64; 1 << part_bits];
    for (symbol, &count) in counts.iter().enumerate().filter(|&(_, &c)| c > 0) {
        shifts().for_each(|s| marginal[(symbol as u32 >> s & part_mask) as usize] += u64::from(count));
    }

    // One slot taken from all others costs each coded symbol log2(e)/2^T bits, and the entry about 17 bits of table; an
    // occurrence that is patched instead costs about a patch less the shorter code of its substitute.
    let saving = PATCH_BITS - 6.0;
    let threshold = (total as f64 * std::f64::consts::LOG2_E / size as f64 + 17.0) / saving;
    let mut wanted: Vec<f64> = counts.iter().map(|&c| f64::from(c)).collect();
    for (symbol, &count) in counts.iter().enumerate() {
        if count > 0 && f64::from(count) < threshold {
            // Its rarest part will be patched: that substitute must be worth a slot, too.
            let rarest = shifts()
                .filter(|&s| symbol as u32 >> s & part_mask != 0)
                .min_by_key(|&s| marginal[(symbol as u32 >> s & part_mask) as usize]);
            if let Some(s) = rarest {
                wanted[symbol & !((part_mask << s) as usize)] += f64::from(count);
            }
        }
    }
    let mut kept: Vec<u16> =
        (0..counts.len()).filter(|&s| s == 0 || wanted[s] >= threshold).map(|s| s as u16).collect();
    let limit = (size as usize * 15 / 16).max(1);
    if kept.len() > limit {
        kept.sort_by(|&a, &b| {
            (b == 0, wanted[usize::from(b)]).partial_cmp(&(a == 0, wanted[usize::from(a)])).unwrap().then(a.cmp(&b))
        });
        kept.truncate(limit);
        kept.sort_unstable();
    }

    let mut is_kept = vec![false; counts.len()];
    kept.iter().for_each(|&s| is_kept[usize::from(s)] = true);
    let mut substitutes: Vec<u16> = (0..counts.len()).map(|s| s as u16).collect();
    let mut coded = vec![0u64; counts.len()];
    let mut patches = 0u64;
    for (symbol, &count) in counts.iter().enumerate() {
        let target =
            if is_kept[symbol] { symbol } else { nearest_kept(symbol as u32, parts, part_bits, &is_kept, &wanted) };
        substitutes[symbol] = target as u16;
        coded[target] += u64::from(count);
        let changed = shifts().filter(|&s| (symbol ^ target) as u32 >> s & part_mask != 0).count();
        patches += u64::from(count) * changed as u64;
    }

    let frequencies = normalize(&kept.iter().map(|&s| coded[usize::from(s)]).collect::<Vec<_>>(), size as u32);
    let table = FrequencyTable { table_bits, entries: kept.iter().copied().zip(frequencies).collect() };
    let stream: f64 = table
        .entries
        .iter()
        .map(|&(s, f)| coded[usize::from(s)] as f64 * (f64::from(table_bits) - f64::from(f).log2()))
        .sum();
    let cost_bits = stream + patches as f64 * PATCH_BITS + table.to_bytes().len() as f64 * 8.0;
    TableChoice { table, substitutes, cost_bits }
}

/// The kept symbol that differs from `symbol` only in parts that it has as 0: with the fewest such parts, then the
/// most frequent. Symbol 0 is always kept.
fn nearest_kept(symbol: u32, parts: u32, part_bits: u32, is_kept: &[bool], weight: &[f64]) -> usize {
    let mask = (1u32 << part_bits) - 1;
    let mut best = (parts + 1, 0.0, 0usize);
    // Every subset of the parts, as a bit set of those that are zeroed: at most 2^8.
    for zeroed in 1u32..1 << parts {
        let n = zeroed.count_ones();
        if n > best.0 {
            continue;
        }
        let keep = (0..parts).filter(|g| zeroed >> g & 1 == 0).fold(0, |m, g| m | mask << (g * part_bits));
        let candidate = (symbol & keep) as usize;
        if is_kept[candidate] && (n < best.0 || weight[candidate] > best.1) {
            best = (n, weight[candidate], candidate);
        }
    }
    best.2
}

/// Frequencies ≥ 1 that add up to `size` and cost the fewest bits, starting from proportional rounding.
fn normalize(counts: &[u64], size: u32) -> Vec<u16> {
    use std::cmp::Reverse;
    use std::collections::BinaryHeap;

    let total: u64 = counts.iter().sum::<u64>().max(1);
    let mut frequencies: Vec<u32> =
        counts.iter().map(|&c| ((c as f64 * f64::from(size) / total as f64).round() as u32).clamp(1, size)).collect();
    let mut sum: u32 = frequencies.iter().sum();
    // Bits gained by one slot more (or lost by one less), as an integer so that the heap's order is total and exact.
    let worth = |count: u64, from: u32, to: u32| {
        ((count.max(1) as f64) * (f64::from(to) / f64::from(from)).log2() * 1024.0) as u64
    };
    if sum > size {
        let mut heap: BinaryHeap<_> = (0..counts.len())
            .filter(|&i| frequencies[i] > 1)
            .map(|i| Reverse((worth(counts[i], frequencies[i] - 1, frequencies[i]), i)))
            .collect();
        while sum > size {
            let Some(Reverse((_, i))) = heap.pop() else { break };
            frequencies[i] -= 1;
            sum -= 1;
            if frequencies[i] > 1 {
                heap.push(Reverse((worth(counts[i], frequencies[i] - 1, frequencies[i]), i)));
            }
        }
    } else if sum < size {
        let mut heap: BinaryHeap<_> =
            (0..counts.len()).map(|i| (worth(counts[i], frequencies[i], frequencies[i] + 1), Reverse(i))).collect();
        while sum < size {
            let Some((_, Reverse(i))) = heap.pop() else { break };
            frequencies[i] += 1;
            sum += 1;
            heap.push((worth(counts[i], frequencies[i], frequencies[i] + 1), Reverse(i)));
        }
    }
    frequencies.into_iter().map(|f| f as u16).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn tables_are_sound_and_survive_their_bytes(
            counts in prop::collection::vec(prop_oneof![3 => Just(0u32), 2 => 0..50u32, 1 => 0..100_000u32], 256),
            (parts, part_bits) in prop_oneof![Just((4, 2)), Just((2, 4)), Just((8, 1)), Just((1, 8))],
            table_bits in TABLE_BITS,
        ) {
            let choice = choose_table(&counts, parts, part_bits, table_bits);
            let bytes = choice.table.to_bytes();
            prop_assert_eq!(&FrequencyTable::from_bytes(&bytes, table_bits, 8).unwrap(), &choice.table);
            for cut in 0..bytes.len() {
                prop_assert!(FrequencyTable::from_bytes(&bytes[..cut], table_bits, 8).is_err());
            }
            let encoder = SymbolEncoder::new(&choice.table, 8);
            prop_assert!(encoder.has(0) && choice.substitutes.iter().all(|&s| encoder.has(s)));

            // Every transition is undone by the encoder, for every value of the bits that it reads.
            for (slot, t) in choice.table.transitions().iter().enumerate() {
                for bits in 0..1u16 << t.n_bits {
                    prop_assert_eq!(encoder.push(t.base + bits, t.symbol), (slot as u16, bits, t.n_bits.into()));
                }
            }
        }
    }

    #[test]
    fn one_symbol_costs_nothing() {
        let choice = choose_table(&[9, 0], 1, 1, 5);
        assert_eq!(choice.table.entries(), [(0, 32)]);
        assert!(choice.table.transitions().iter().all(|t| t.n_bits == 0));
    }

    #[test]
    fn malformed_tables_are_refused() {
        let read = |bytes: &[u8]| FrequencyTable::from_bytes(bytes, 5, 4).map_err(|e| e.to_string());
        assert!(read(&[1, 0, 1, 32]).is_ok());
        assert!(read(&[1, 0, 1, 32, 0]).unwrap_err().contains("left over"));
        assert!(read(&[1, 0, 1, 31]).unwrap_err().contains("add up to 31"));
        assert!(read(&[1, 0, 0, 32]).unwrap_err().contains("not above"));
        assert!(read(&[1, 0, 17, 32]).unwrap_err().contains("below 2^4"));
        assert!(read(&[2, 0, 1, 32, 1, 0]).unwrap_err().contains("add up"));
        assert!(read(&[1, 0, 0x81, 0x80, 0x80, 0, 32]).unwrap_err().contains("ends within"));
    }
}
