//! How a launch is cut: into thread blocks, with which row blocks, of how many warps, and how much shared memory they take.

use super::super::device::Grid;
use super::matrix::{DeviceMatrix, PLAIN_BLOCK};
use super::{EncodedKernels, Job, MAX_TASKS};
use crate::error::{Error, Result};
use codecllm_codec::Format;
use codecllm_codec::block::BLOCK_ROWS;

/// Warps of a thread block that multiplies, at least: they bring in the activations.
const PRODUCT_WARPS: u32 = 8;
/// Columns of a block whose parts may wait for the activations, at most.
const EARLY_COLS: u32 = 512;
/// The same of a block whose codes may (`BLOCK_UNITS` in tiles.cuh).
const TILES_COLS: u32 = 256;
/// Bytes of a warp that keeps codes: tiles, which are made from the front and so may come to lie on all but what is yet to be read, parts and raw bits at the
/// end (`BlockSink` in tiles.cuh). Always those of the largest block, for all are read, and those that the block does not have count nothing.
const BLOCK_BYTES: u32 = TILES_COLS * BLOCK_ROWS as u32;
/// A unit's tile is longer than its raw bits by 128 bytes for each bit fewer than eight: 3 bits, of which the window has those of six units, are overtaken first.
const _: () = assert!(BLOCK_BYTES >= 5 * (8 - 3) * 128 + RING_BYTES + BLOCK_BYTES / 8);
/// What else their thread blocks need (`End` in encoded.cu).
const END_BYTES: u32 = 16 * 8 + 4 * 32 * 4 + 16 * 32 * 4;
/// How many of their warps a multiprocessor has registers for.
const TILES_WARPS: u32 = 32;
/// How much of what a multiprocessor takes at once a product has at most that counts as small: a thread block for every row block then, so that several
/// fit on a multiprocessor, those of the next kernel beside the last of this one. They decode early, which takes half as many instructions more, and
/// costs nothing while other kernels leave the multiprocessor idle.
const SMALL: f64 = 0.7;
/// Bytes of a warp's window on its stream, and of what else products of one token need.
pub(super) const RING_BYTES: u32 = 2560;
const SCRATCH_BYTES: u32 = 256;
/// What a decode to rows needs: a smaller window, and tiles where warps collect 256 bytes of 32 rows.
pub(super) const DENSE_NEEDS: Needs = Needs { warp_bytes: 2048 + 32 * 256, block_bytes: 0, warps: 20 };
/// Bytes of a warp's window on a plain matrix (`PlainReader` in one_token.cuh).
pub(super) const PLAIN_BYTES: u32 = 4 * 2048;
/// What the kernels declare of shared memory themselves.
pub(super) const DECLARED_BYTES: u32 = 2048;
/// What CUDA keeps of a thread block's shared memory for itself.
const RESERVED_BYTES: u32 = 1024;
/// Row blocks of a thread block that multiplies by one token, at most (`MAX_ROWS` in encoded.cu).
pub(super) const THREAD_BLOCK_ROWS: u32 = 128;
/// Warps of a thread block that multiplies by several tokens: those that decode, or at most, where that saves a round of blocks; and those that multiply, each
/// of which has one row block.
const DECODERS: u32 = 24;
const MOST_DECODERS: u32 = 28;
const MULTIPLIERS: u32 = 8;
const MANY_WARPS: u32 = DECODERS + MULTIPLIERS;
/// Warps of the kernels for one token that have fewer than 32, with more registers each (`product_1_bf16_few` in encoded.cu).
const FEW_WARPS: u32 = 28;
/// Bytes of a decoder's tiles and of their barriers (`Tiles` in tiles.cuh), of the row blocks' barriers, and, for eight tokens, of a multiplier's activations.
const TILES_BYTES: u32 = 4096;
const BARRIER_BYTES: u32 = 64;
const ROWS_BYTES: u32 = 8 * MULTIPLIERS;
const X_BYTES: u32 = 3 * 1024;
/// Of a token's activations, in f32: what each thread that prepares them holds (`Input::held` in activations.cuh), and what its thread block keeps in shared memory
/// at most. So four thread blocks fit on a multiprocessor.
const HELD_BYTES: u32 = 2 * 16;
const KEPT_BYTES: u32 = 40 << 10;

/// What a kernel needs beside its tables: shared memory of each warp, shared memory of a block, and the warps that its
/// registers allow.
#[derive(Clone, Copy)]
pub(super) struct Needs {
    pub warp_bytes: u32,
    pub block_bytes: u32,
    pub warps: u32,
}

/// How a launch of products is cut.
#[derive(Default)]
pub(super) struct Cut {
    pub n_warps: u32,
    /// Those of which decode, for they have blocks.
    pub n_decoders: u32,
    /// By task.
    pub n_ctas: [u32; MAX_TASKS],
    /// One token: slots of sums.
    pub n_slots: u32,
    /// One token: whether no warp has more than one block, whose parts are decoded before the activations are known.
    pub early: bool,
    /// Whether no warp has more than one block, all of which is decoded before the activations are known.
    pub tiles: bool,
    /// One token: whether thread blocks two by two have row blocks together.
    pub paired: bool,
    /// One token: whether at most [`FEW_WARPS`] share the blocks, by the kernel for so many.
    pub few: bool,
    /// One token, or `tiles`: `Launch::window`.
    pub warp_bytes: u32,
    pub table_bytes: u32,
    pub shared_bytes: u32,
}

impl Cut {
    /// Thread blocks that have row blocks together.
    pub fn together(&self) -> u32 {
        1 + u32::from(self.paired)
    }

    /// The most blocks that one of so many warps of a team has, one after the other.
    pub fn turns(&self, jobs: &[Job<'_>], team_warps: u32) -> u32 {
        let together = self.together();
        let of = |(job, n): (&Job<'_>, u32)| {
            let n_blocks = job.0.n_row_blocks().div_ceil(n / together) * job.0.description.n_col_blocks;
            n_blocks.div_ceil(together * team_warps)
        };
        jobs.iter().zip(self.n_ctas).map(of).max().unwrap_or(0)
    }

    /// Thread blocks of the launch: those of a gated product have both matrices.
    pub fn all_ctas(&self, gated: bool) -> u32 {
        if gated { self.n_ctas[0] } else { self.n_ctas.iter().sum() }
    }
}

impl DeviceMatrix {
    /// Whether the kernels can decode a block's parts and keep them: those of one bit, eight a symbol.
    fn decodes_early(&self) -> bool {
        self.kernels.product_early.is_some() && self.codec >> 4 == 8 && self.description.block_cols <= EARLY_COLS
    }

    /// Bytes of a warp that does: its window, and a bit of parts for each weight.
    fn early_bytes(&self) -> u32 {
        RING_BYTES + SCRATCH_BYTES.max(self.description.block_cols * BLOCK_ROWS as u32 / 8)
    }
}

impl EncodedKernels {
    /// The warps of a block, up to `warps`, that the shared memory allows, and how much of that they take: with so many bytes of tables, and so many more
    /// for each warp.
    pub(super) fn fit(&self, table_bytes: u32, needs: Needs, warps: u32, slots_bytes: u32) -> Result<(u32, u32)> {
        let (fixed, each) = (table_bytes + needs.block_bytes, needs.warp_bytes + slots_bytes);
        let n_warps = (self.shared_limit.saturating_sub(fixed) / each).min(warps);
        match n_warps {
            0 => Err(Error::unsupported(
                "matrix",
                format!(
                    "its table and input take {fixed} bytes of shared memory and a warp {each}, the GPU has {} a block; \
                     where the table is large, compress the model with --prefer speed",
                    self.shared_limit
                ),
            )),
            _ => Ok((n_warps, fixed + n_warps * each)),
        }
    }

    /// How a launch of products is cut: which thread blocks, with whole row blocks each, of how many warps.
    pub(super) fn cut(&self, jobs: &[Job<'_>], n_tokens: u32, gated: bool) -> Result<Cut> {
        let cut = match (self.cut_tiles(jobs, n_tokens, gated), n_tokens) {
            (Some(cut), _) => cut,
            (None, 1) => self.cut_one(jobs, gated)?,
            _ => self.cut_many(jobs, n_tokens, gated)?,
        };
        match cut.n_warps {
            0 => Err(Error::Parameter("two matrices of a gated product have no room beside each other".into())),
            _ => Ok(cut),
        }
    }

    /// For one token.
    fn cut_one(&self, jobs: &[Job<'_>], gated: bool) -> Result<Cut> {
        let matrices = || jobs.iter().map(|job| job.0);
        let needs = product_needs(jobs[0].0);
        let (n_teams, n) = (if gated { 2 } else { 1 }, self.n_multiprocessors);
        let total: u64 = matrices().map(DeviceMatrix::n_blocks).sum();
        // Plain matrices have blocks of so few rows that all multiprocessors get as much. No more warps than take as many turns leave room for the next kernel's.
        let plain = jobs[0].0.is_plain();
        let small = total as f64 <= SMALL * f64::from(needs.warps * n) && !plain;
        let widest = matrices().map(|m| m.description.n_col_blocks).max().unwrap_or(1);
        let wanted = match (small, plain) {
            (true, _) => (n_teams * widest).clamp(PRODUCT_WARPS, needs.warps),
            (_, true) => {
                let each = total.div_ceil(n.into());
                let turns = each.div_ceil(needs.warps.into()).max(1);
                each.div_ceil(turns).next_multiple_of(4).clamp(PRODUCT_WARPS.into(), needs.warps.into()) as u32
            }
            _ => needs.warps,
        };
        let mut cut = Cut::default();
        for (n_ctas, m) in cut.n_ctas.iter_mut().zip(matrices()) {
            let n_rows = m.n_row_blocks();
            let share = if gated { n } else { self.share(m.n_blocks(), total) };
            *n_ctas = if small { n_rows } else { share.clamp(n_rows.div_ceil(THREAD_BLOCK_ROWS), n_rows) };
        }
        // For integers, half a row block less is worth no more than waiting for each other; of two matrices it is twice that.
        let pays = gated || jobs.len() == 1 && jobs[0].0.format != Format::Int8;
        cut.paired = !small && !plain && pays && self.pairs(jobs, cut.n_ctas[0]);
        let together = cut.together();
        // Where those take no more turns; and of a small matrix where no multiprocessor has to take two of its thread blocks.
        let few = wanted.min(FEW_WARPS);
        cut.few = jobs[0].0.kernels.product_few.is_some()
            && cut.turns(jobs, few / n_teams) <= cut.turns(jobs, wanted / n_teams)
            && (!small || PRODUCT_WARPS < wanted && cut.all_ctas(gated) <= n);
        let wanted = if cut.few { few } else { wanted };
        let deepest = cut.n_ctas.iter().zip(matrices()).map(|(&n, m)| m.n_row_blocks().div_ceil(n / together));
        let deepest = deepest.max().unwrap_or(1);
        cut.table_bytes = matrices().map(DeviceMatrix::table_bytes).max().unwrap_or(0);
        // A team of warps, of paired thread blocks both's, has a slot for each of them and each row block: the sums of its rows, of 64 bits.
        let slot_bytes = 8 * jobs[0].0.block_rows();
        let fixed = n_teams * (cut.table_bytes + deepest * slot_bytes);
        let fit = |needs| self.fit(fixed, needs, wanted, together * slot_bytes);
        let early = Needs { warp_bytes: matrices().map(DeviceMatrix::early_bytes).max().unwrap_or(0), ..needs };
        cut.early = small
            && matrices().all(DeviceMatrix::decodes_early)
            && fit(early).is_ok_and(|(n_warps, _)| widest * n_teams <= n_warps / n_teams * n_teams);
        let needs = if cut.early { early } else { needs };
        cut.warp_bytes = needs.warp_bytes;
        let (n_warps, shared_bytes) = fit(needs)?;
        cut.n_warps = n_warps / n_teams * n_teams;
        cut.n_decoders = cut.n_warps;
        cut.n_slots = together * cut.n_warps / n_teams + deepest;
        cut.shared_bytes = shared_bytes;
        Ok(cut)
    }

    /// Where a thread block for each row block has a warp for each of its blocks, which keeps its codes, and all of them are on the multiprocessors at once. For
    /// one token each multiprocessor has one of them, beside another kernel's: else those of more kernels lie beside each other where only parts are kept.
    fn cut_tiles(&self, jobs: &[Job<'_>], n_tokens: u32, gated: bool) -> Option<Cut> {
        let matrices = || jobs.iter().map(|job| job.0);
        if !matrices().all(|m| m.decodes_early() && m.description.block_cols <= TILES_COLS) {
            return None;
        }
        let n_teams = if gated { 2 } else { 1 };
        let widest = matrices().map(|m| m.description.n_col_blocks).max()?;
        let table_bytes = matrices().map(DeviceMatrix::table_bytes).max()?;
        let n_warps = (n_teams * widest).max(PRODUCT_WARPS);
        let shared_bytes = n_teams * table_bytes + n_warps * BLOCK_BYTES + END_BYTES;
        let mut cut = Cut { n_warps, n_decoders: n_warps, table_bytes, shared_bytes, ..Default::default() };
        (cut.tiles, cut.warp_bytes) = (true, BLOCK_BYTES);
        cut.n_ctas.iter_mut().zip(matrices()).for_each(|(n, m)| *n = m.n_row_blocks());
        let own = DECLARED_BYTES + RESERVED_BYTES;
        let fit = ((self.shared_limit + own) / (shared_bytes + own)).min(TILES_WARPS / n_warps);
        let each = match n_tokens {
            // The activations come to lie in the tables' place.
            1 => u32::from(fit > 1 && product_needs(jobs[0].0).block_bytes <= n_teams * table_bytes),
            _ => fit,
        };
        (cut.all_ctas(gated) <= each * self.n_multiprocessors).then_some(cut)
    }

    /// For several tokens otherwise.
    fn cut_many(&self, jobs: &[Job<'_>], n_tokens: u32, gated: bool) -> Result<Cut> {
        let matrices = || jobs.iter().map(|job| job.0);
        let n_teams = if gated { 2 } else { 1 };
        let total: u64 = matrices().map(DeviceMatrix::n_blocks).sum();
        let mut small = total as f64 <= SMALL * f64::from(DECODERS * self.n_multiprocessors);
        let widest = matrices().map(|m| m.description.n_col_blocks).max().unwrap_or(1);
        let table_bytes = matrices().map(DeviceMatrix::table_bytes).max().unwrap_or(0);
        let each = RING_BYTES + TILES_BYTES + BARRIER_BYTES;
        let x_bytes = X_BYTES * n_tokens.div_ceil(8);
        let multipliers = |decoders: u32| decoders.min(MULTIPLIERS).min(MANY_WARPS - decoders);
        let fixed = n_teams * table_bytes + ROWS_BYTES;
        let bytes = |decoders: u32| fixed + decoders * each + multipliers(decoders) * x_bytes;
        let fits = |decoders: &u32| bytes(*decoders) <= self.shared_limit;
        // Up to so many decoders, as many of each team.
        let fitting =
            |wanted: u32| (1..=wanted.min(DECODERS) / n_teams).rev().map(|n| n * n_teams).find(fits).unwrap_or(0);
        let mut n_decoders = fitting(if small { n_teams * widest } else { DECODERS });
        // More row blocks than multiprocessors, of which none has room for two thread blocks: all at once all the same.
        let n_rows = matrices().map(DeviceMatrix::n_row_blocks).sum::<u32>() / n_teams;
        let own = DECLARED_BYTES + RESERVED_BYTES;
        let two_fit = 2 * (bytes(n_decoders) + own) <= self.shared_limit + own
            && 2 * (n_decoders + multipliers(n_decoders)) <= MANY_WARPS;
        if small && n_rows > self.n_multiprocessors && !two_fit {
            small = false;
            n_decoders = fitting(n_teams * widest * n_rows.div_ceil(self.n_multiprocessors));
        }
        if n_decoders == 0 {
            if !gated {
                let needs = Needs { warp_bytes: each, block_bytes: x_bytes, warps: 1 };
                self.fit(fixed, needs, 1, 0)?;
            }
            return Ok(Cut::default());
        }
        let cut_for = |n_decoders: u32| {
            let n_multipliers = multipliers(n_decoders);
            let mut cut = Cut { table_bytes, n_decoders, shared_bytes: bytes(n_decoders), ..Default::default() };
            cut.n_warps = n_decoders + n_multipliers;
            for (n_ctas, m) in cut.n_ctas.iter_mut().zip(matrices()) {
                // A multiplier for each row block, in as many rounds as that takes.
                let share = if gated { self.n_multiprocessors } else { self.share(m.n_blocks(), total).max(1) };
                let n_rows = m.n_row_blocks();
                let n_rounds = n_rows.div_ceil(n_multipliers / n_teams).div_ceil(share);
                *n_ctas = if small { n_rows } else { (share * n_rounds).min(n_rows) };
            }
            cut
        };
        let usual = cut_for(n_decoders);
        if small || n_decoders < DECODERS {
            return Ok(usual);
        }
        let wanted = (DECODERS..=MOST_DECODERS).step_by(n_teams as usize).filter(fits).map(cut_for);
        Ok(wanted
            .filter(|cut| cut.n_ctas == usual.n_ctas)
            .min_by_key(|cut| cut.turns(jobs, cut.n_decoders / n_teams))
            .unwrap_or(usual))
    }

    /// The launch that prepares the activations, a thread block a token. Those should fit on the multiprocessors that the product leaves idle, two on each: else
    /// some of its own wait for them. Where those have little to do, that counts most, and half as many threads take half of a multiprocessor. Where they have
    /// more, or wait anyway, the sooner it is over the better, so that each token has a multiprocessor for itself. Beside those of a product that keeps its
    /// codes they come to lie anywhere, and should fit beside 22 warps.
    pub(super) fn prepare_grid(&self, n_tokens: u32, n_cols: u32, jobs: &[Job<'_>], cut: &Cut, all_ctas: u32) -> Grid {
        const MOST: u32 = 1024;
        const BESIDE_TILES: u32 = 576;
        const FEW_ROWS: u32 = 2;
        let fit = 2 * self.n_multiprocessors.saturating_sub(all_ctas) >= n_tokens;
        let few_rows = jobs.iter().zip(cut.n_ctas).all(|(job, n)| job.0.n_row_blocks().div_ceil(n) <= FEW_ROWS);
        let threads = match (cut.tiles, few_rows && !fit) {
            (true, _) => BESIDE_TILES,
            (_, true) => MOST / 2,
            _ => MOST,
        };
        // What the threads do not hold in registers; or more than half of a multiprocessor's.
        let kept_bytes = (4 * n_cols).saturating_sub(HELD_BYTES * threads).min(KEPT_BYTES);
        let shared_bytes =
            if few_rows || fit { kept_bytes } else { kept_bytes.max(self.shared_limit / 2 + RESERVED_BYTES) };
        Grid { blocks: (n_tokens, 1, 1), threads, shared_bytes }
    }

    /// Whether thread blocks, so many of each job, have less to do two by two than each by itself: seven row blocks for two, where that would be four for some.
    fn pairs(&self, jobs: &[Job<'_>], n_ctas: u32) -> bool {
        // Of more row blocks, half a one is too little to save.
        const MAX_ROWS: u32 = 16;
        let most = jobs[0].0.n_row_blocks().div_ceil(n_ctas);
        self.has_clusters
            && n_ctas.is_multiple_of(2)
            && most <= MAX_ROWS
            && jobs[0].0.n_row_blocks().div_ceil(n_ctas / 2) < 2 * most
            // Each gets half of the blocks, of whatever row blocks.
            && jobs.iter().all(|job| job.0.description.n_col_blocks.is_multiple_of(2))
    }

    /// How many of the multiprocessors a matrix has with so many of a launch's blocks.
    pub(super) fn share(&self, n_blocks: u64, total: u64) -> u32 {
        (n_blocks * u64::from(self.n_multiprocessors) / total) as u32
    }
}

/// What a product of one token with such a matrix needs.
fn product_needs(matrix: &DeviceMatrix) -> Needs {
    let is_int8 = matrix.format == Format::Int8;
    let (warp_bytes, warps, cols) = match matrix.is_plain() {
        true => (PLAIN_BYTES, 16, PLAIN_BLOCK.1),
        false => (RING_BYTES + SCRATCH_BYTES, 32, 32),
    };
    // The activations are brought into shared memory, those for integers as two bytes; with what a sum is worth, and zeros.
    let n_cols = matrix.description.n_cols.next_multiple_of(cols);
    let block_bytes = n_cols * if is_int8 { 2 } else { 4 } + if matrix.is_plain() { n_cols / 8 } else { 0 } + 192;
    Needs { warp_bytes, block_bytes, warps }
}

/// Raw bits that each of so many warps asks for at its start, in words a lane (`prefetch_raw` in decode.cuh): what the memory delivers while they start.
pub(super) fn raw_words(n_warps: u64) -> u8 {
    const START_BYTES: u64 = 3 << 20;
    (START_BYTES / 128 / n_warps.max(1)).min(u8::MAX.into()) as u8
}
