//! Encoded matrices in the memory of another library (PyTorch, say), multiplied on its stream.
//!
//! Nothing here allocates on the GPU or waits, once an [`External`] is open: whoever calls brings all memory. So every launch
//! may be part of that library's graphs, and its allocator knows of every byte.

use super::matrix::{DeviceMatrix, check_layout, table_entries};
use super::{
    Device, EncodedKernels, Error, Input, Job, Launch, PRODUCT_TOKENS, Result, Scratch, Task, groups, operand_bytes,
};
use codecllm_codec::Layout;

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
    /// What [`External::table`] made.
    pub table: u64,
}

/// What [`External::product`] reads, and works in; device addresses.
#[derive(Clone, Copy)]
pub struct ExternalInput {
    /// `[n_tokens, n_cols]`
    pub x: u64,
    /// 1 to 16.
    pub n_tokens: usize,
    /// Whether `x`, biases and outputs are BF16, not f32.
    pub bf16: bool,
    /// What [`External::workspace_bytes`] says, at a multiple of 16.
    pub workspace: u64,
}

const UNITS_BYTES: usize = 8 * PRODUCT_TOKENS;

impl External {
    /// Opens GPU `index`, in its primary context, and loads the kernels.
    ///
    /// # Errors
    /// As [`Device::open`].
    pub fn open(index: usize) -> Result<Self> {
        let device = Device::open(index)?;
        let kernels = EncodedKernels::new(&device)?;
        Ok(Self { device, kernels })
    }

    /// Most tokens of [`Self::product`].
    pub const fn max_tokens() -> usize {
        PRODUCT_TOKENS
    }

    /// What the kernels look up beside the tensor's own bytes, for the caller to put into the GPU's memory: the decoder's table.
    ///
    /// # Errors
    /// A tensor that the kernels do not take.
    pub fn table(layout: &Layout) -> Result<Vec<u64>> {
        Ok(table_entries(layout, check_layout(layout)?))
    }

    fn matrix(&self, matrix: &ExternalMatrix<'_>) -> Result<DeviceMatrix> {
        DeviceMatrix::describe(&self.kernels, matrix.layout, matrix.data, matrix.table)
    }

    fn matrices(&self, matrices: &[ExternalMatrix<'_>]) -> Result<Vec<DeviceMatrix>> {
        let matrices: Vec<_> = matrices.iter().map(|m| self.matrix(m)).collect::<Result<_>>()?;
        if matrices.windows(2).any(|pair| pair[0].n_cols() != pair[1].n_cols()) {
            return Err(Error::Parameter("matrices that share an input have as many columns".into()));
        }
        Ok(matrices)
    }

    /// Bytes of working memory that [`Self::product`] needs for matrices of so many columns and 1 to 16 tokens.
    pub fn workspace_bytes(n_cols: usize, n_tokens: usize) -> usize {
        match n_tokens {
            1 => 0,
            _ => UNITS_BYTES + operand_bytes(n_cols),
        }
    }

    /// `out[t] = matrix · x[t] + bias` for each of the matrices. `outs` holds the addresses of biases (0 for none) and outputs. What comes out
    /// is that of the engine's own products, rounded where it is BF16.
    ///
    /// # Safety
    /// The stream is one of the GPU's primary context. Every address has the room that its shape takes, in the GPU's memory, until the
    /// stream is through; the matrices' bytes have the metadata that their layouts were made from.
    pub unsafe fn product(
        &self,
        stream: u64,
        matrices: &[ExternalMatrix<'_>],
        outs: &[(u64, u64)],
        input: ExternalInput,
    ) -> Result<()> {
        let ExternalInput { x, n_tokens, bf16, workspace } = input;
        if n_tokens == 0 || n_tokens > PRODUCT_TOKENS || matrices.len() != outs.len() {
            return Err(Error::Parameter(format!(
                "{n_tokens} tokens, {} matrices, {} outputs: a product takes 1 to {PRODUCT_TOKENS} tokens, and an output \
                 for each matrix",
                matrices.len(),
                outs.len()
            )));
        }
        let matrices = self.matrices(matrices)?;
        let scratch = Scratch { units: workspace, operand: workspace + UNITS_BYTES as u64 };
        let input = Input { data: x, n_tokens, norm: 0, eps: 0.0, bf16 };
        let jobs: Vec<Job<'_>> = matrices.iter().zip(outs).map(|(m, &(bias, out))| (m, bias, out, false)).collect();
        // SAFETY: the caller's promises.
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
        launch.tasks[0] = Task { matrix: matrix.description, out, codec: matrix.codec, ..Default::default() };
        // SAFETY: the caller's promises.
        unsafe {
            let device = self.device.on_stream(stream as *mut _);
            self.kernels.launch_decode(&device, &matrix.encoded_kernels()?.decode_values, launch)
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
