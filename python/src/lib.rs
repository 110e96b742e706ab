//! `codecllm._core`: the codec and the kernels, as the Python package in `python/codecllm` uses them.
//!
//! Arrays cross as NumPy arrays, which PyTorch's tensors on the CPU share memory with; on a GPU they are addresses, and the
//! stream is the caller's. Work that takes more than microseconds lets other Python threads run.

mod archive;
mod errors;
mod gpu;
mod tensor;

use pyo3::prelude::*;

/// The codec and the kernels of CodecLLM.
#[pymodule]
fn _core(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add("__version__", env!("CARGO_PKG_VERSION"))?;
    errors::register(m)?;
    archive::register(m)?;
    tensor::register(m)?;
    gpu::register(m)
}
