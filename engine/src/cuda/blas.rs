//! Products of many tokens by cuBLAS, where the machine has it.

use super::device::Device;
use crate::error::{Error, Result};
use cudarc::cublas::{CudaBlas, result, sys};
use cudarc::driver::sys::CUdeviceptr;
use cudarc::driver::{CudaSlice, DevicePtrMut};

/// cuBLAS on a device's stream.
pub(super) struct Blas {
    blas: CudaBlas,
    _workspace: Option<CudaSlice<u8>>,
}

/// What the elements of a product are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Element {
    F32,
    Bf16,
}

/// `out[t][row] = matrix[row] · x[t]`, in BF16; the sums are f32.
pub(super) struct Gemm {
    /// `[n_rows, matrix_stride]`, of which `n_cols` columns count.
    pub matrix: CUdeviceptr,
    pub matrix_stride: usize,
    pub n_rows: usize,
    pub n_cols: usize,
    /// `[n_tokens, x_stride]`, likewise.
    pub x: CUdeviceptr,
    pub x_stride: usize,
    pub n_tokens: usize,
    /// f32, `[n_tokens, n_rows]`
    pub out: CUdeviceptr,
    /// Whether the product is added to what `out` holds.
    pub adds: bool,
}

impl Blas {
    /// `None` where the library is not installed.
    pub fn load(device: &Device) -> Result<Option<Self>> {
        // SAFETY: loads the library, as its first use would.
        if !unsafe { sys::is_culib_present() } {
            return Ok(None);
        }
        let blas = CudaBlas::new(device.stream().clone());
        let blas = blas.map_err(|e| Error::device(format!("cuBLAS does not start: {e}")))?;
        Ok(Some(Self { blas, _workspace: None }))
    }

    /// The same with working memory of its own: without, it would allocate some in every graph.
    pub fn with_workspace(self, device: &Device, bytes: usize) -> Result<Self> {
        let mut workspace = device.zeros::<u8>(bytes)?;
        let at = workspace.device_ptr_mut(device.stream()).0;
        // SAFETY: the memory has the size that is given, and lives as long as the handle.
        unsafe { sys::cublasSetWorkspace_v2(*self.blas.handle(), at as *mut _, bytes) }
            .result()
            .map_err(|e| Error::device(format!("cuBLAS refuses working memory: {e}")))?;
        Ok(Self { _workspace: Some(workspace), ..self })
    }

    /// Issues a product.
    ///
    /// # Safety
    /// The pointers have room for the shapes, in the memory of the device.
    pub unsafe fn product(&self, gemm: &Gemm) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.product_as(gemm, Element::F32) }
    }

    /// Issues a product whose elements, at `out`, are of another kind.
    ///
    /// # Safety
    /// As [`Self::product`].
    pub unsafe fn product_as(&self, gemm: &Gemm, element: Element) -> Result<()> {
        let out_type = match element {
            Element::F32 => sys::cudaDataType::CUDA_R_32F,
            Element::Bf16 => sys::cudaDataType::CUDA_R_16BF,
        };
        let &Gemm { matrix, matrix_stride, n_rows, n_cols, x, x_stride, n_tokens, out, adds } = gemm;
        let (alpha, beta) = (1f32, f32::from(u8::from(adds)));
        let bf16 = sys::cudaDataType::CUDA_R_16BF;
        // Columns first, as cuBLAS has it: outᵀ [n_rows, n_tokens] = matrix · xᵀ.
        // SAFETY: as the caller says.
        let done = unsafe {
            result::gemm_ex(
                *self.blas.handle(),
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
                out_type,
                n_rows as i32,
                sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
        };
        done.map_err(|e| Error::device(format!("cuBLAS refuses a product: {e}")))
    }
}
