//! Tensors: decoded, encoded in memory, multiplied on the CPU.

use crate::errors;
use bytes::Bytes;
use codecllm_codec::archive::{RateTarget, Silent, steps_of};
use codecllm_codec::block::Params;
use codecllm_codec::quantize::Codes;
use codecllm_codec::{
    Checks, Coder, Cpu, Dtype, EncodeOptions, EncodedTensor, Error, Format, Layout as CodecLayout,
    Result as CodecResult, ScaleMode, Tensor as CodecTensor, encode_tensor,
};
use codecllm_engine::cpu::{CpuBackend, Matrix};
use numpy::{
    PyArray1, PyArray2, PyArrayMethods, PyReadonlyArray1, PyReadonlyArray2, PyUntypedArray, PyUntypedArrayMethods,
};
use pyo3::prelude::*;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

/// Adds this module's functions and classes.
pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<Tensor>()?;
    m.add_class::<Layout>()?;
    m.add_function(wrap_pyfunction!(encode, m)?)?;
    m.add_function(wrap_pyfunction!(choose_steps, m)?)?;
    m.add_function(wrap_pyfunction!(product, m)?)?;
    m.add_function(wrap_pyfunction!(gather, m)?)?;
    m.add_function(wrap_pyfunction!(dequantize, m)?)?;
    m.add_function(wrap_pyfunction!(set_threads, m)?)?;
    m.add_function(wrap_pyfunction!(get_threads, m)?)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How to encode, from the names that Python has.
pub fn encode_options(
    format: &str,
    trellis: bool,
    scale: &str,
    coder: &str,
    prefer: &str,
    step: Option<f32>,
) -> PyResult<EncodeOptions> {
    let parse = || -> CodecResult<EncodeOptions> {
        let (format, scale) = (format.parse::<Format>()?, scale.parse::<ScaleMode>()?);
        let (coder, prefer) = (coder.parse::<Coder>()?, prefer.parse()?);
        Ok(EncodeOptions { format, scale, coder, prefer, step, trellis, params: None })
    };
    parse().map_err(errors::codec)
}

/// The bytes of an array that its caller holds.
struct Borrowed(*const u8, usize);

// SAFETY: it only reads, and what it reads is held by the caller of `borrowed`.
unsafe impl Send for Borrowed {}

impl AsRef<[u8]> for Borrowed {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: the caller of `borrowed` holds the array.
        unsafe { std::slice::from_raw_parts(self.0, self.1) }
    }
}

/// The bytes as the codec takes them, without a copy.
///
/// # Safety
/// No clone of the result outlives the array.
unsafe fn borrowed(bytes: &[u8]) -> Bytes {
    Bytes::from_owner(Borrowed(bytes.as_ptr(), bytes.len()))
}

/// Calls `work` with the bytes as the codec takes them, without a copy. What it returns owns no bytes.
fn borrow<T: OwnsNoBytes>(bytes: &[u8], work: impl FnOnce(Bytes) -> T) -> T {
    // SAFETY: `work` has the only clone, and returns none.
    work(unsafe { borrowed(bytes) })
}

/// Results of [`borrow`].
trait OwnsNoBytes {}
impl<E> OwnsNoBytes for Result<Vec<u8>, E> {}
impl<E> OwnsNoBytes for Result<Vec<f32>, E> {}
impl<E> OwnsNoBytes for Result<CodecLayout, E> {}

/// What tensors' metadata say, by the checksums of those, for as long as a [`Layout`] lives.
static LAYOUTS: Mutex<Option<HashMap<u64, Weak<CodecLayout>>>> = Mutex::new(None);

/// The layout with that key, if a [`Layout`] holds it.
pub fn find_layout(key: i64) -> Option<Arc<CodecLayout>> {
    lock(&LAYOUTS).as_ref()?.get(&(key as u64))?.upgrade()
}

/// An encoded tensor's metadata, parsed and validated; it holds none of its bytes.
#[pyclass(frozen, module = "codecllm._core")]
pub struct Layout(pub Arc<CodecLayout>);

#[pymethods]
impl Layout {
    /// Parses an encoded tensor `[n_bytes]`; compares the payload's checksum, too, where `full`.
    #[new]
    fn new(py: Python<'_>, data: PyReadonlyArray1<'_, u8>, full: bool) -> PyResult<Self> {
        let data = data.as_slice()?;
        let checks = if full { Checks::Full } else { Checks::Metadata };
        let layout = py.detach(|| borrow(data, |data| Ok(EncodedTensor::parse(data, checks)?.layout())));
        let layout = layout.map_err(errors::codec)?;
        let mut layouts = lock(&LAYOUTS);
        let layouts = layouts.get_or_insert_default();
        if let Some(known) = layouts.get(&layout.key()).and_then(Weak::upgrade) {
            return Ok(Self(known));
        }
        layouts.retain(|_, layout| layout.strong_count() > 0);
        let layout = Arc::new(layout);
        layouts.insert(layout.key(), Arc::downgrade(&layout));
        Ok(Self(layout))
    }

    /// Tells tensors with different metadata apart.
    #[getter]
    fn key(&self) -> i64 {
        self.0.key() as i64
    }

    /// `[n_rows, n_cols]`
    #[getter]
    fn shape(&self) -> (usize, usize) {
        (self.0.n_rows(), self.0.n_cols())
    }

    /// The number format.
    #[getter]
    fn format(&self) -> &'static str {
        self.0.format().name()
    }

    /// The entropy coder.
    #[getter]
    fn coder(&self) -> &'static str {
        self.0.coder().name()
    }

    /// The source's element type.
    #[getter]
    fn dtype(&self) -> String {
        self.0.source_dtype().to_string()
    }

    /// Length of the tensor in bytes.
    #[getter]
    fn n_bytes(&self) -> usize {
        self.0.n_bytes()
    }

    /// ‖W − Ŵ‖ / ‖W‖ as the encoder measured it.
    #[getter]
    fn relative_error(&self) -> f32 {
        self.0.relative_error()
    }

    fn __deepcopy__(&self, _memo: Bound<'_, PyAny>) -> Self {
        Self(self.0.clone())
    }
}

/// A tensor of an archive, encoded or as the checkpoint has it.
#[pyclass(frozen, module = "codecllm._core")]
pub struct Tensor {
    source: CodecTensor,
    encoded: Option<EncodedTensor>,
}

impl Tensor {
    /// Validates the tensor, where it is encoded.
    pub fn open(source: CodecTensor, full: bool) -> CodecResult<Self> {
        let checks = if full { Checks::Full } else { Checks::Metadata };
        let is_encoded = source.dtype == Dtype::U8 && EncodedTensor::is_encoded(&source.data);
        let encoded = match is_encoded {
            true => Some(EncodedTensor::parse(source.data.clone(), checks).map_err(|e| e.in_tensor(&source.name))?),
            false => None,
        };
        Ok(Self { source, encoded })
    }

    fn encoded(&self) -> PyResult<&EncodedTensor> {
        self.encoded.as_ref().ok_or_else(|| {
            errors::codec(Error::Parameter(format!("tensor `{}` is not encoded: it has no codes", self.source.name)))
        })
    }
}

#[pymethods]
impl Tensor {
    /// Its name.
    #[getter]
    fn name(&self) -> &str {
        &self.source.name
    }

    /// The shape of the weights.
    #[getter]
    fn shape(&self) -> Vec<usize> {
        match &self.encoded {
            Some(t) => vec![t.n_rows(), t.n_cols()],
            None => self.source.shape.clone(),
        }
    }

    /// Whether it is encoded.
    #[getter]
    fn is_encoded(&self) -> bool {
        self.encoded.is_some()
    }

    /// The number format; of a plain tensor, its element type in lower case.
    #[getter]
    fn format(&self) -> String {
        match &self.encoded {
            Some(t) => t.format().to_string(),
            None => self.source.dtype.to_string().to_lowercase(),
        }
    }

    /// The entropy coder, or `none`.
    #[getter]
    fn coder(&self) -> &'static str {
        self.encoded.as_ref().map_or("none", |t| t.coder().name())
    }

    /// The element type of the source, as safetensors names it.
    #[getter]
    fn dtype(&self) -> String {
        self.encoded.as_ref().map_or(self.source.dtype, EncodedTensor::source_dtype).to_string()
    }

    /// Bytes in the archive.
    #[getter]
    fn n_bytes(&self) -> usize {
        self.source.data.len()
    }

    /// ‖W − Ŵ‖ / ‖W‖ as the encoder measured it; 0 for a plain tensor.
    #[getter]
    fn relative_error(&self) -> f32 {
        self.encoded.as_ref().map_or(0.0, EncodedTensor::relative_error)
    }

    /// The bytes as they lie in the archive, copied.
    fn data<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<u8>> {
        PyArray1::from_slice(py, &self.source.data)
    }

    /// The values of rows `start..end` of an encoded tensor, float32.
    fn values<'py>(&self, py: Python<'py>, start: usize, end: usize) -> PyResult<Bound<'py, PyArray2<f32>>> {
        let t = self.encoded()?;
        let values = py.detach(|| {
            let mut values = vec![0f32; end.saturating_sub(start) * t.n_cols()];
            t.decode_rows(Cpu::detect(), start..end, &mut values).map(|()| values)
        });
        PyArray1::from_vec(py, values.map_err(errors::codec)?).reshape([end - start, t.n_cols()])
    }

    /// The codes of an encoded tensor: uint16 for `bf16`, else uint8.
    fn codes<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyUntypedArray>> {
        let t = self.encoded()?;
        let shape = [t.n_rows(), t.n_cols()];
        Ok(match py.detach(|| t.decode_codes(Cpu::detect())).map_err(errors::codec)? {
            Codes::U8(codes) => PyArray1::from_vec(py, codes.into_owned()).reshape(shape)?.as_untyped().clone(),
            Codes::U16(codes) => PyArray1::from_vec(py, codes.into_owned()).reshape(shape)?.as_untyped().clone(),
        })
    }
}

fn dtype_of(name: &str) -> PyResult<Dtype> {
    match name {
        "BF16" => Ok(Dtype::Bf16),
        "F16" => Ok(Dtype::F16),
        "F32" => Ok(Dtype::F32),
        _ => Err(errors::codec(Error::Parameter(format!(
            "cannot encode elements of type {name}; BF16, F16 and F32 can be"
        )))),
    }
}

/// Encodes a matrix, given as its bytes: the bytes of `docs/format.md`.
#[pyfunction]
#[pyo3(signature = (data, dtype, shape, *, format, trellis, scale, coder, prefer, step, params))]
#[expect(clippy::too_many_arguments, reason = "keyword arguments, named by the caller")]
fn encode<'py>(
    py: Python<'py>,
    data: PyReadonlyArray1<'py, u8>,
    dtype: &str,
    shape: Vec<usize>,
    format: &str,
    trellis: bool,
    scale: &str,
    coder: &str,
    prefer: &str,
    step: Option<f32>,
    params: Option<CoderParams>,
) -> PyResult<Bound<'py, PyArray1<u8>>> {
    let mut options = encode_options(format, trellis, scale, coder, prefer, step)?;
    options.params = params.map(|(parts_per_symbol, table_bits, raw_bits, part_bits, block_cols, bias, trellis)| {
        Params { parts_per_symbol, table_bits, raw_bits, part_bits, block_cols, bias, trellis }
    });
    let (data, dtype) = (data.as_slice()?, dtype_of(dtype)?);
    let encoded = py.detach(|| {
        borrow(data, |data| encode_tensor(&CodecTensor { name: "weight".into(), dtype, shape, data }, &options))
    });
    Ok(PyArray1::from_vec(py, encoded.map_err(errors::codec)?))
}

/// A matrix as its name, bytes, element type and shape.
type Source<'py> = (String, PyReadonlyArray1<'py, u8>, String, Vec<usize>);

/// The coder's parameters: parts a symbol, table bits, raw bits, part bits, columns a block, bias, trellis.
type CoderParams = (u32, u32, u32, u32, u32, i32, bool);

/// The steps of `rate` with which the matrices together take `bits` a weight, each with the coder's parameters.
#[pyfunction]
fn choose_steps(
    py: Python<'_>,
    sources: Vec<Source<'_>>,
    bits: f64,
    trellis: bool,
    coder: &str,
    prefer: &str,
) -> PyResult<Vec<(Option<f32>, Option<CoderParams>)>> {
    let options = encode_options("rate", trellis, "channel", coder, prefer, None)?;
    let slices: Vec<_> = sources
        .iter()
        .map(|(name, data, dtype, shape)| Ok((name.clone(), data.as_slice()?, dtype_of(dtype)?, shape.clone())))
        .collect::<PyResult<_>>()?;
    let steps = py.detach(|| {
        let tensors: Vec<_> = slices
            .into_iter()
            // SAFETY: the tensors end in here; `sources` holds the arrays until after.
            .map(|(name, data, dtype, shape)| CodecTensor { name, dtype, shape, data: unsafe { borrowed(data) } })
            .collect();
        steps_of(&tensors, RateTarget::Bits(bits), &options, &Silent)
    });
    let params =
        |p: Params| (p.parts_per_symbol, p.table_bits, p.raw_bits, p.part_bits, p.block_cols, p.bias, p.trellis);
    Ok(steps.map_err(errors::codec)?.iter().map(|options| (options.step, options.params.map(params))).collect())
}

/// The CPU's threads and kernels, and the process that started them: a fork has the memory of threads, but not the threads.
struct Cores {
    process: u32,
    threads: usize,
    backend: Option<Arc<CpuBackend>>,
}

static CORES: Mutex<Cores> = Mutex::new(Cores { process: 0, threads: 0, backend: None });

fn backend() -> PyResult<Arc<CpuBackend>> {
    let mut cores = lock(&CORES);
    if cores.process != std::process::id() {
        // What ends a pool would wait for threads that are not there.
        std::mem::forget(cores.backend.take());
        cores.process = std::process::id();
    }
    if cores.backend.is_none() {
        cores.backend = Some(Arc::new(CpuBackend::new(Cpu::detect(), cores.threads).map_err(errors::engine)?));
    }
    Ok(cores.backend.clone().expect("set above"))
}

/// Sets the threads of products on the CPU; 0 stands for every core.
#[pyfunction]
fn set_threads(n: usize) {
    let mut cores = lock(&CORES);
    cores.threads = n;
    let old = cores.backend.take();
    if cores.process != std::process::id() {
        std::mem::forget(old);
    }
}

/// The threads of products on the CPU.
#[pyfunction]
fn get_threads() -> PyResult<usize> {
    Ok(backend()?.threads())
}

/// The tensor that `data` holds, by the layout that was parsed before where there is one.
fn bind(data: Bytes, key: i64) -> CodecResult<EncodedTensor> {
    match find_layout(key) {
        Some(layout) => layout.bind(data),
        None => EncodedTensor::parse(data, Checks::Metadata),
    }
}

/// `x · Wᵀ + bias`, f32: weight `[n_bytes]`, x `[n_tokens, n_cols]`, bias `[n_rows]`; the result `[n_tokens, n_rows]`.
#[pyfunction]
fn product<'py>(
    py: Python<'py>,
    weight: PyReadonlyArray1<'py, u8>,
    key: i64,
    n_rows: usize,
    x: PyReadonlyArray2<'py, f32>,
    bias: Option<PyReadonlyArray1<'py, f32>>,
) -> PyResult<Bound<'py, PyArray2<f32>>> {
    let n_tokens = x.shape()[0];
    let (weight, x) = (weight.as_slice()?, x.as_slice()?);
    let bias = bias.as_ref().map(|bias| bias.as_slice()).transpose()?;
    let backend = backend()?;
    let out = py.detach(|| {
        borrow(weight, |weight| {
            let matrix = Matrix::Encoded(bind(weight, key)?);
            let mut out = vec![0f32; n_tokens * n_rows];
            backend.linear(&matrix, x, bias, &mut out).map(|()| out)
        })
    });
    PyArray1::from_vec(py, out.map_err(errors::engine)?).reshape([n_tokens, n_rows])
}

/// Rows of a matrix, f32: weight `[n_bytes]`, rows `[n]`; the result `[n, n_cols]`.
#[pyfunction]
fn gather<'py>(
    py: Python<'py>,
    weight: PyReadonlyArray1<'py, u8>,
    key: i64,
    n_cols: usize,
    rows: PyReadonlyArray1<'py, i64>,
) -> PyResult<Bound<'py, PyArray2<f32>>> {
    let (weight, rows) = (weight.as_slice()?, rows.as_slice()?);
    let backend = backend()?;
    let out = py.detach(|| {
        // A negative row becomes one that no matrix has.
        let rows: Vec<usize> = rows.iter().map(|&row| usize::try_from(row).unwrap_or(usize::MAX)).collect();
        borrow(weight, |weight| {
            let matrix = Matrix::Encoded(bind(weight, key)?);
            let mut out = vec![0f32; rows.len() * n_cols];
            backend.gather(&matrix, &rows, &mut out).map(|()| out)
        })
    });
    let n = rows.len();
    PyArray1::from_vec(py, out.map_err(errors::engine)?).reshape([n, n_cols])
}

/// All values of a matrix, f32.
#[pyfunction]
fn dequantize<'py>(
    py: Python<'py>,
    weight: PyReadonlyArray1<'py, u8>,
    key: i64,
) -> PyResult<Bound<'py, PyArray2<f32>>> {
    let weight = weight.as_slice()?;
    let mut shape = [0; 2];
    let values = py.detach(|| {
        borrow(weight, |weight| {
            let t = bind(weight, key)?;
            shape = [t.n_rows(), t.n_cols()];
            let mut values = vec![0f32; shape[0] * shape[1]];
            t.decode_rows(Cpu::detect(), 0..shape[0], &mut values).map(|()| values)
        })
    });
    PyArray1::from_vec(py, values.map_err(errors::codec)?).reshape(shape)
}
