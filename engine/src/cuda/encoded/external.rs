//! Encoded matrices in the memory of another library (PyTorch, say), multiplied on its stream.
//!
//! Nothing here allocates on the GPU or waits, once an [`External`] is open: whoever calls brings all memory. So every launch
//! may be part of that library's graphs, and its allocator knows of every byte.

use super::{
    BLOCK_ROWS, DENSE_NEEDS, Device, EncodedKernels, EncodedMatrix, Error, Format, Input, Job, Launch, Layout,
    PRODUCT_TOKENS, Result, Scratch, Task, check_layout, groups, product_needs, table_entries,
};

/// A GPU with the kernels loaded, for matrices and streams of another library.
pub struct External {
    device: Device,
    kernels: EncodedKernels,
}

/// A matrix in another library's memory; device addresses.
#[derive(Clone, Copy)]
pub struct ExternalMatrix<'a> {
    /// What the tensor's metadata say.
    pub layout: &'a Layout,
    /// The tensor's bytes, as they lie in the archive; at a multiple of 64.
    pub data: u64,
    /// What [`External::tables`] made. Launches that share it go one after another.
    pub tables: u64,
}

/// The memory of a launch that [`External::workspace_bytes`] counts, cut.
struct Workspace {
    units: u64,
    operand: u64,
    partials: u64,
}

const UNITS_BYTES: usize = 8 * PRODUCT_TOKENS;

fn operand_bytes(n_cols: usize) -> usize {
    n_cols.next_multiple_of(32) * 4 * PRODUCT_TOKENS
}

impl External {
    /// Opens GPU `index`, in its primary context, and loads the kernels.
    ///
    /// # Errors
    /// As [`Device::open`].
    pub fn open(index: usize) -> Result<Self> {
        let device = Device::open(index)?;
        let kernels = EncodedKernels::with_scratch(&device, 0, 0)?;
        Ok(Self { device, kernels })
    }

    /// Most tokens of [`Self::product`].
    pub const fn max_tokens() -> usize {
        PRODUCT_TOKENS
    }

    /// What the kernels look up beside the tensor's own bytes, for the caller to put into the GPU's memory: the decoder's table,
    /// then zeros with which its launches count. Launches leave it as it was.
    ///
    /// # Errors
    /// A tensor that the kernels do not take.
    pub fn tables(layout: &Layout) -> Result<Vec<u64>> {
        let mut words = table_entries(layout, check_layout(layout)?);
        words.resize(words.len() + layout.n_rows().div_ceil(BLOCK_ROWS).div_ceil(2), 0);
        Ok(words)
    }

    fn matrix(&self, matrix: &ExternalMatrix<'_>) -> Result<EncodedMatrix> {
        let ExternalMatrix { layout, data, tables } = *matrix;
        let mut matrix = EncodedMatrix::describe(&self.kernels, layout, data, tables)?;
        matrix.arrived = tables + u64::from(matrix.table_bytes());
        Ok(matrix)
    }

    fn matrices(&self, matrices: &[ExternalMatrix<'_>]) -> Result<Vec<EncodedMatrix>> {
        let matrices: Vec<_> = matrices.iter().map(|m| self.matrix(m)).collect::<Result<_>>()?;
        if matrices.windows(2).any(|pair| pair[0].n_cols() != pair[1].n_cols()) {
            return Err(Error::Parameter("matrices that share an input have as many columns".into()));
        }
        Ok(matrices)
    }

    /// Bytes of working memory that [`Self::product`] needs for these matrices and 1 to 16 tokens.
    ///
    /// # Errors
    /// Matrices that the kernels do not take, or that do not go together.
    pub fn workspace_bytes(&self, matrices: &[ExternalMatrix<'_>], n_tokens: usize) -> Result<usize> {
        let matrices = self.matrices(matrices)?;
        let n_cols = matrices.first().map_or(0, EncodedMatrix::n_cols);
        let jobs: Vec<_> = matrices.iter().collect();
        let mut n_sums = 0;
        for group in groups(&jobs, |m| *m) {
            let needs = product_needs(n_tokens, group[0].format == Format::Int8, n_cols);
            n_sums = n_sums.max(self.kernels.strips(group.iter().copied(), n_tokens, needs)?.n_sums);
        }
        Ok(UNITS_BYTES + operand_bytes(n_cols) + 8 * n_sums)
    }

    /// `out[t] = matrix · x[t] + bias` for each of the matrices, all f32; x `[n_tokens, n_cols]`, 1 to 16 tokens. `outs` holds the
    /// addresses of biases (0 for none) and outputs. What comes out is that of the engine's own products.
    ///
    /// # Safety
    /// The stream is one of the GPU's primary context. Every address has the room that its shape takes (`workspace`: what
    /// [`Self::workspace_bytes`] says, at a multiple of 16), in the GPU's memory, until the stream is through; the matrices' bytes
    /// have the metadata that their layouts were made from.
    pub unsafe fn product(
        &self,
        stream: u64,
        matrices: &[ExternalMatrix<'_>],
        outs: &[(u64, u64)],
        x: u64,
        n_tokens: usize,
        workspace: u64,
    ) -> Result<()> {
        if n_tokens == 0 || n_tokens > PRODUCT_TOKENS || matrices.len() != outs.len() {
            return Err(Error::Parameter(format!(
                "{n_tokens} tokens, {} matrices, {} outputs: a product takes 1 to {PRODUCT_TOKENS} tokens, and an output \
                 for each matrix",
                matrices.len(),
                outs.len()
            )));
        }
        let matrices = self.matrices(matrices)?;
        let n_cols = matrices.first().map_or(0, EncodedMatrix::n_cols);
        let Workspace { units, operand, partials } = Workspace {
            units: workspace,
            operand: workspace + UNITS_BYTES as u64,
            partials: workspace + (UNITS_BYTES + operand_bytes(n_cols)) as u64,
        };
        let scratch = Scratch { partials, arrived: 0, units, operand };
        let input = Input { data: x, n_tokens, norm: 0, eps: 0.0 };
        let jobs: Vec<Job<'_>> = matrices.iter().zip(outs).map(|(m, &(bias, out))| (m, bias, out, false)).collect();
        // SAFETY: the caller's promises; each matrix has counters for its row blocks.
        let device = unsafe { self.device.on_stream(stream as *mut _) };
        for jobs in groups(&jobs, |job| job.0) {
            // SAFETY: the same.
            unsafe { self.kernels.launch_products_at(&device, &scratch, &input, &jobs, false)? };
        }
        Ok(())
    }

    /// Decodes a matrix to BF16 values, row-major, at `out`.
    ///
    /// # Safety
    /// As [`Self::product`].
    pub unsafe fn decode(&self, stream: u64, matrix: &ExternalMatrix<'_>, out: u64) -> Result<()> {
        let matrix = self.matrix(matrix)?;
        let mut launch = Launch { n_tasks: 1, ..Default::default() };
        let n_strips = matrix.description.n_col_blocks;
        let (description, codec) = (matrix.description, matrix.codec);
        launch.tasks[0] = Task { matrix: description, out, strip: 1, n_strips, codec, ..Default::default() };
        // SAFETY: the caller's promises.
        unsafe {
            let device = self.device.on_stream(stream as *mut _);
            self.kernels.launch(&device, &matrix.kernels.decode_values, launch, DENSE_NEEDS)
        }
    }

    /// `out[i] = matrix[rows[i]]`; rows u32 `[n]`, out f32 `[n, n_cols]`. Rows that the matrix does not have are left as they are.
    ///
    /// # Safety
    /// As [`Self::product`].
    pub unsafe fn gather(&self, stream: u64, matrix: &ExternalMatrix<'_>, rows: u64, n: usize, out: u64) -> Result<()> {
        let matrix = self.matrix(matrix)?;
        // The grid's second dimension counts rows.
        const MOST: usize = 65_535;
        for first in (0..n).step_by(MOST) {
            let (rows, out) = (rows + 4 * first as u64, out + (4 * first * matrix.n_cols()) as u64);
            // SAFETY: the caller's promises.
            unsafe {
                let device = self.device.on_stream(stream as *mut _);
                self.kernels.gather_at(&device, &matrix, rows, MOST.min(n - first), out)?;
            }
        }
        Ok(())
    }
}
