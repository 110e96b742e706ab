//! Kernels on a GPU, on PyTorch's memory and stream: addresses and numbers only, checked by `codecllm.torch`.

use crate::errors;
use crate::tensor::{Layout, find_layout};
use codecllm_codec::{Error, Layout as CodecLayout};
use codecllm_engine::cuda::{External, ExternalInput, ExternalMatrix};
use numpy::PyArray1;
use pyo3::prelude::*;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

/// Adds this module's functions.
pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add("CUDA_MAX_TOKENS", External::max_tokens())?;
    m.add_function(wrap_pyfunction!(cuda_open, m)?)?;
    m.add_function(wrap_pyfunction!(cuda_tables, m)?)?;
    m.add_function(wrap_pyfunction!(cuda_workspace_bytes, m)?)?;
    m.add_function(wrap_pyfunction!(cuda_product, m)?)?;
    m.add_function(wrap_pyfunction!(cuda_decode, m)?)?;
    m.add_function(wrap_pyfunction!(cuda_gather, m)?)
}

/// The GPUs that were opened, by number.
static GPUS: Mutex<Option<HashMap<usize, Arc<External>>>> = Mutex::new(None);

fn gpu(index: usize) -> PyResult<Arc<External>> {
    let mut gpus = GPUS.lock().unwrap_or_else(PoisonError::into_inner);
    let gpus = gpus.get_or_insert_default();
    if let Some(gpu) = gpus.get(&index) {
        return Ok(gpu.clone());
    }
    let gpu = Arc::new(External::open(index).map_err(errors::engine)?);
    gpus.insert(index, gpu.clone());
    Ok(gpu)
}

/// A matrix by its layout's key, and the addresses of its bytes and tables.
type Address = (i64, u64, u64);

fn layouts(matrices: &[Address]) -> PyResult<Vec<Arc<CodecLayout>>> {
    let find = |&(key, ..): &Address| {
        find_layout(key).ok_or_else(|| errors::codec(Error::Parameter("the encoded tensor's layout is gone".into())))
    };
    matrices.iter().map(find).collect()
}

fn with<'a>(layouts: &'a [Arc<CodecLayout>], matrices: &[Address]) -> Vec<ExternalMatrix<'a>> {
    let pairs = layouts.iter().zip(matrices);
    pairs.map(|(layout, &(_, data, table))| ExternalMatrix { layout, data, table }).collect()
}

/// Opens a GPU and loads the kernels, unless that was done.
#[pyfunction]
fn cuda_open(py: Python<'_>, device: usize) -> PyResult<()> {
    py.detach(|| gpu(device).map(drop))
}

/// What the kernels need in the GPU's memory beside the tensor's own bytes.
#[pyfunction]
fn cuda_tables<'py>(py: Python<'py>, layout: &Layout) -> PyResult<Bound<'py, PyArray1<i64>>> {
    let words = External::table(&layout.0).map_err(errors::engine)?;
    Ok(PyArray1::from_vec(py, words.into_iter().map(|word| word as i64).collect()))
}

/// Bytes of working memory that [`cuda_product`] needs for matrices of so many columns.
#[pyfunction]
fn cuda_workspace_bytes(n_cols: usize, n_tokens: usize) -> usize {
    External::workspace_bytes(n_cols, n_tokens)
}

/// Products of 1 to 16 tokens with matrices of one width; `outs`: the addresses of each one's bias (or 0) and output. All are float32, or `bf16`.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "a call from Python that has no keyword is the fastest")]
fn cuda_product(
    device: usize,
    stream: u64,
    matrices: Vec<Address>,
    outs: Vec<(u64, u64)>,
    x: u64,
    n_tokens: usize,
    bf16: bool,
    workspace: u64,
) -> PyResult<()> {
    let layouts = layouts(&matrices)?;
    let matrices = with(&layouts, &matrices);
    let input = ExternalInput { x, n_tokens, bf16, workspace };
    // SAFETY: `codecllm.torch` passes tensors of these shapes, on this device, and the stream that their memory belongs to.
    unsafe { gpu(device)?.product(stream, &matrices, &outs, input) }.map_err(errors::engine)
}

/// Decodes a matrix to BF16.
#[pyfunction]
fn cuda_decode(device: usize, stream: u64, matrix: Address, out: u64) -> PyResult<()> {
    let layouts = layouts(&[matrix])?;
    let matrices = with(&layouts, &[matrix]);
    // SAFETY: as in `cuda_product`.
    unsafe { gpu(device)?.decode(stream, &matrices[0], out) }.map_err(errors::engine)
}

/// Gathers rows, given as uint32, to float32.
#[pyfunction]
fn cuda_gather(device: usize, stream: u64, matrix: Address, rows: u64, n: usize, out: u64) -> PyResult<()> {
    let layouts = layouts(&[matrix])?;
    let matrices = with(&layouts, &[matrix]);
    // SAFETY: as in `cuda_product`.
    unsafe { gpu(device)?.gather(stream, &matrices[0], rows, n, out) }.map_err(errors::engine)
}
