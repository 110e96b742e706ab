//! Trellis-coded quantization of format `rate`: which grid a weight's code is on follows from the codes before it.
//!
//! There are two grids, of even and of odd multiples of the step. Column c of a block belongs to phase c mod 4; the phases
//! do not know of each other. With `q[t]` the code that the stream holds for the t-th column of a phase in its block, the weight stands for
//! `v[t] = 2·q[t] + a[t]` steps, where `a[0] = 0`, `a[1] = q[0] mod 2` and `a[t] = a[t−2] ⊕ (q[t−1] mod 2)`: a machine of four
//! states (Ungerboeck 1982; Marcellin & Fischer 1990; JPEG 2000 part 2). A code costs the bits of a grid of twice the step, while the
//! choice between paths gives the error of nearly that of the finer one.
//!
//! Four phases, so that a decoder that holds four columns in a word needs two words of state and three operations for four weights: the
//! recurrence is linear over GF(2), and goes from word to word without any shift.

use crate::quantize::round_even;

/// Columns of a block whose recurrences run side by side.
pub const PHASES: usize = 4;
/// A row's largest magnitude is at most this many steps: so every code of every grid next to it fits eight bits.
pub(crate) const MAX_STEPS: f32 = 122.0;
/// Codes of the stream, from −64 to 63.
pub(crate) const N_CODES: usize = 128;
/// What a bit is worth in units of the squared step. At high rate the error is about that of a uniform grid of 1.8 steps, and loses 2·ln 2 of
/// it a bit.
const SQUARES_PER_BIT: f32 = 0.4;

/// The grids of the columns to come, by phase.
#[derive(Debug, Clone, Copy, Default)]
pub struct Grids {
    now: [u8; PHASES],
    next: [u8; PHASES],
}

impl Grids {
    /// The value in steps of `code` in the next column of `phase`.
    #[inline(always)]
    pub fn value(&mut self, phase: usize, code: i8) -> i8 {
        let grid = self.now[phase];
        self.now[phase] = self.next[phase] ^ (code as u8 & 1);
        self.next[phase] = grid;
        (code << 1) | grid as i8
    }
}

/// The values in steps of a row's stream codes, in blocks of `block_cols` columns.
pub fn values(codes: &mut [u8], block_cols: usize) {
    for block in codes.chunks_mut(block_cols) {
        let mut grids = Grids::default();
        block.iter_mut().enumerate().for_each(|(c, code)| *code = grids.value(c % PHASES, *code as i8) as u8);
    }
}

/// The stream codes that a weight of `x` steps is near to, whatever grid it will be on: for estimates of what codes cost.
#[inline(always)]
pub(crate) fn nearby_code(x: f32, col: usize) -> i8 {
    // Either grid is as likely.
    let grid = (col / PHASES % 2) as f32;
    round_even((x - grid) * 0.5).clamp(-64.0, 63.0) as i8
}

/// What stream codes cost, in squared steps: `[code + 64]`.
pub(crate) type Costs = [f32; N_CODES];

/// Costs by how often codes occur, with the coder's `raw_bits`: a code's low bits and its sign lie flat, its part costs −log2 of how often it occurs.
pub(crate) fn costs(counts: &[u64; N_CODES], raw_bits: u32) -> Costs {
    let part = |code: usize| {
        let code = code as i32 - 64;
        (if code < 0 { !code } else { code }) as usize >> raw_bits.saturating_sub(1)
    };
    let mut parts = [0u64; N_CODES];
    counts.iter().enumerate().for_each(|(code, count)| parts[part(code)] += count);
    let total = counts.iter().sum::<u64>() as f64;
    std::array::from_fn(|code| {
        let bits = -((parts[part(code)] as f64 + 0.5) / (total + 64.0)).log2();
        // On a coarse grid, so that the last bit of a logarithm does not show.
        (((bits * f64::from(SQUARES_PER_BIT)) * 1024.0).round() / 1024.0) as f32
    })
}

/// A state: the grid of this column, and what the next one's is when this column's code is even.
pub(crate) const N_STATES: usize = 4;

/// The state after a code of parity `parity`.
#[inline(always)]
pub(crate) fn next_state(state: usize, parity: usize) -> usize {
    let (grid, then) = (state >> 1, state & 1);
    (then ^ parity) << 1 | grid
}

/// The code of parity `parity` on grid `grid` whose value is nearest to `x`, of those of eight bits.
#[inline(always)]
fn nearest(x: f32, grid: usize, parity: usize) -> i8 {
    let k = round_even((x.clamp(-124.0, 124.0) - (2 * parity + grid) as f32) * 0.25);
    2 * k as i8 + parity as i8
}

/// The value in steps of a code on grid `grid`.
#[inline(always)]
pub(crate) fn point(code: i8, grid: usize) -> f32 {
    (2 * i32::from(code) + grid as i32) as f32
}

/// The [`nearest`] code to `x`, and what that costs, error and bits.
#[inline(always)]
pub(crate) fn branch(x: f32, grid: usize, parity: usize, costs: &Costs) -> (i8, f32) {
    let code = nearest(x, grid, parity);
    let error = x - point(code, grid);
    (code, error * error + costs[(i32::from(code) + 64) as usize & (N_CODES - 1)])
}

/// Columns of a row's phase, and rows, that go through Viterbi's algorithm together.
const LANES: usize = 4 * PHASES;

/// What a thread reuses.
#[derive(Default)]
pub(crate) struct Search {
    /// `[step][lane]`: for each state behind the step, whether it was reached from the second of its two.
    from: Vec<[u8; LANES]>,
    /// `[step][2 · grid + parity][lane]`: the nearest codes.
    codes: Vec<[[i8; LANES]; 4]>,
}

impl Search {
    /// The stream codes of rows of a block that cost least, by Viterbi's algorithm: error in squared steps, and `costs`. `x[r][c]`: column c of
    /// row r in steps; `codes` likewise. Up to four rows.
    pub(crate) fn rows(&mut self, x: &[&[f32]], costs: &Costs, codes: &mut [&mut [u8]]) {
        let n_cols = x[0].len();
        let n_steps = n_cols.div_ceil(PHASES);
        self.from.resize(n_steps, [0; LANES]);
        self.codes.resize(n_steps, [[0; LANES]; 4]);
        let mut totals = [[f32::INFINITY; LANES]; N_STATES];
        totals[0] = [0.0; LANES];
        let mut before = totals;
        let (from, found) = (&mut self.from[..n_steps], &mut self.codes[..n_steps]);
        for (step, (from, found)) in from.iter_mut().zip(found.iter_mut()).enumerate() {
            let mut at = [0f32; LANES];
            for (at, x) in at.chunks_exact_mut(PHASES).zip(x) {
                let x = &x[step * PHASES..n_cols.min((step + 1) * PHASES)];
                at[..x.len()].copy_from_slice(x);
            }
            let mut more = [[0f32; LANES]; 4];
            for grid in 0..2 {
                for parity in 0..2 {
                    let (more, found) = (&mut more[2 * grid + parity], &mut found[2 * grid + parity]);
                    for lane in 0..LANES {
                        (found[lane], more[lane]) = branch(at[lane], grid, parity, costs);
                    }
                }
            }
            let mut reached = [[0f32; LANES]; N_STATES];
            *from = [0; LANES];
            for (state, reached) in reached.iter_mut().enumerate() {
                // It is reached from the grid that it remembers, from either state of that, with one parity each.
                let (next_grid, grid) = (state >> 1, state & 1);
                for lane in 0..LANES {
                    let first = totals[2 * grid][lane] + more[2 * grid + next_grid][lane];
                    let second = totals[2 * grid + 1][lane] + more[2 * grid + (1 - next_grid)][lane];
                    from[lane] |= u8::from(second < first) << state;
                    reached[lane] = if second < first { second } else { first };
                }
            }
            before = std::mem::replace(&mut totals, reached);
        }
        for (lane, phase) in (0..x.len() * PHASES).map(|lane| (lane, lane % PHASES)) {
            // A phase may end a column before others.
            let n_steps = (n_cols + PHASES - 1 - phase) / PHASES;
            let totals = if n_steps < self.from.len() { &before } else { &totals };
            let mut state =
                (0..N_STATES).fold(0, |best, s| if totals[s][lane] < totals[best][lane] { s } else { best });
            let codes = &mut codes[lane / PHASES];
            for step in (0..n_steps).rev() {
                let then = usize::from(self.from[step][lane] >> state & 1);
                let (next_grid, grid) = (state >> 1, state & 1);
                codes[step * PHASES + phase] = self.codes[step][2 * grid + (next_grid ^ then)][lane] as u8;
                state = grid << 1 | then;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pseudo-random weights in steps.
    fn noise(n: usize, seed: u64) -> Vec<f32> {
        crate::feedback::tests::noise(n, seed).iter().map(|v| 10.0 * v).collect()
    }

    #[test]
    fn states_are_what_the_recurrence_remembers() {
        let codes: Vec<i8> = noise(64, 3).iter().map(|v| *v as i8).collect();
        let (mut grids, mut state) = (Grids::default(), 0);
        let mut seen = Vec::new();
        for (t, &code) in codes.iter().enumerate() {
            let value = grids.value(1, code);
            let grid = value & 1;
            assert_eq!(value, 2 * code + grid);
            assert_eq!(grid as usize, state >> 1);
            state = next_state(state, code as usize & 1);
            let expected = match t {
                0 => 0,
                1 => codes[0] & 1,
                _ => seen[t - 2] ^ (codes[t - 1] & 1),
            };
            assert_eq!(grid, expected);
            seen.push(grid);
        }
    }

    #[test]
    fn the_search_finds_the_cheapest_path() {
        // Against all paths of a short row, for rows that end in any phase.
        let mut counts = [1u64; N_CODES];
        (0..N_CODES).for_each(|c| counts[c] = 1 + 100_000 / (1 + (c as i64 - 64).pow(2) as u64));
        let costs = costs(&counts, 1);
        for n_cols in [1, 4, 7, 18, 21] {
            for n_rows in 1..=4 {
                let x: Vec<Vec<f32>> = (0..n_rows).map(|r| noise(n_cols, 7 + r as u64)).collect();
                let mut codes = vec![vec![0u8; n_cols]; n_rows];
                let rows: Vec<&[f32]> = x.iter().map(|x| &x[..]).collect();
                let mut out: Vec<&mut [u8]> = codes.iter_mut().map(|c| &mut c[..]).collect();
                Search::default().rows(&rows, &costs, &mut out);
                for (x, codes) in x.iter().zip(&codes) {
                    for phase in 0..PHASES.min(n_cols) {
                        let x: Vec<f32> = x.iter().skip(phase).step_by(PHASES).copied().collect();
                        let cost = |codes: &[i8]| {
                            let mut grids = Grids::default();
                            codes.iter().zip(&x).fold(0f64, |sum, (&q, x)| {
                                let error = f64::from(x - f32::from(grids.value(0, q)));
                                sum + error * error + f64::from(costs[(i32::from(q) + 64) as usize])
                            })
                        };
                        let found: Vec<i8> = codes.iter().skip(phase).step_by(PHASES).map(|c| *c as i8).collect();
                        let best = (0..1u32 << x.len())
                            .map(|parities| {
                                let mut grids = Grids::default();
                                let path: Vec<i8> = (0..x.len())
                                    .map(|t| {
                                        let code = nearest(x[t], grids.now[0].into(), (parities >> t & 1) as usize);
                                        grids.value(0, code);
                                        code
                                    })
                                    .collect();
                                cost(&path)
                            })
                            .fold(f64::INFINITY, f64::min);
                        assert!((cost(&found) - best).abs() < 1e-3, "{} columns: {} {best}", n_cols, cost(&found));
                    }
                }
            }
        }
    }
}
