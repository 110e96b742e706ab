//! Products of many tokens by cuBLAS, where the machine has it.

use super::device::Device;
use crate::error::{Error, Result};
use cudarc::cublas::{CudaBlas, result, sys};
use cudarc::driver::sys::CUdeviceptr;

/// cuBLAS on a device's stream.
pub(super) struct Blas(CudaBlas);

impl Blas {
    /// `None` where the library is not installed.
    pub fn load(device: &Device) -> Result<Option<Self>> {
        // SAFETY: loads the library, as its first use would.
        if !unsafe { sys::is_culib_present() } {
            return Ok(None);
        }
        let blas = CudaBlas::new(device.stream().clone());
        Ok(Some(Self(blas.map_err(|e| Error::device(format!("cuBLAS does not start: {e}")))?)))
    }

    /// `out[t][row] = matrix[row] · x[t]`, added to what is there if it `adds`. Matrix `[n_rows, matrix_stride]` and x
    /// `[n_tokens, x_stride]` are BF16, of which `n_cols` columns count; out `[n_tokens, n_rows]` and the sums are f32.
    ///
    /// # Safety
    /// The pointers have room for these shapes, in the memory of the device.
    pub unsafe fn product(
        &self,
        matrix: CUdeviceptr,
        matrix_stride: usize,
        [n_rows, n_cols]: [usize; 2],
        x: CUdeviceptr,
        x_stride: usize,
        n_tokens: usize,
        out: CUdeviceptr,
        adds: bool,
    ) -> Result<()> {
        let (alpha, beta) = (1f32, f32::from(u8::from(adds)));
        let bf16 = sys::cudaDataType::CUDA_R_16BF;
        // Columns first, as cuBLAS has it: outᵀ [n_rows, n_tokens] = matrix · xᵀ.
        // SAFETY: as the caller says.
        let done = unsafe {
            result::gemm_ex(
                *self.0.handle(),
                sys::cublasOperation_t::CUBLAS_OP_T,
                sys::cublasOperation_t::CUBLAS_OP_N,
                n_rows as i32,
                n_tokens as i32,
                n_cols as i32,
                (&raw const alpha).cast(),
                matrix as *const _,
                bf16,
                matrix_stride as i32,
                x as *const _,
                bf16,
                x_stride as i32,
                (&raw const beta).cast(),
                out as *mut _,
                sys::cudaDataType::CUDA_R_32F,
                n_rows as i32,
                sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
        };
        done.map_err(|e| Error::device(format!("cuBLAS refuses a product: {e}")))
    }
}
