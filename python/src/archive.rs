//! Archives: made, opened, proven, inspected.

use crate::errors;
use crate::tensor::{Tensor, encode_options};
use codecllm_codec::archive::{self, CompressOptions, Progress, RateTarget};
use codecllm_codec::{Checkpoint, Cpu, Error, Format};
use pyo3::prelude::*;
use serde::Serialize;
use std::path::PathBuf;
use std::sync::Mutex;

/// Adds this module's functions and classes.
pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<Archive>()?;
    m.add_function(wrap_pyfunction!(compress, m)?)?;
    m.add_function(wrap_pyfunction!(verify, m)?)?;
    m.add_function(wrap_pyfunction!(inspect, m)?)
}

/// Tells a Python callable, and asks the interpreter whether to stop.
struct Reporter {
    /// `progress(done_bytes, total_bytes, tensor)`
    callback: Option<Py<PyAny>>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    done: u64,
    total: u64,
    tensor: String,
    /// Why the work has to stop: Ctrl-C, or the callable's own exception.
    error: Option<PyErr>,
}

impl Reporter {
    fn new(callback: Option<Py<PyAny>>) -> Self {
        Self { callback, state: Mutex::default() }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn keep(&self, result: PyResult<()>) {
        if let Err(e) = result {
            self.state().error.get_or_insert(e);
        }
    }

    fn tell(&self) {
        let Some(callback) = &self.callback else { return };
        let (done, total, tensor) = {
            let state = self.state();
            (state.done, state.total, state.tensor.clone())
        };
        self.keep(Python::attach(|py| callback.call1(py, (done, total, tensor)).map(drop)));
    }

    /// Runs `work` with other Python threads free to run.
    fn run<T: Send>(self, py: Python<'_>, work: impl FnOnce(&Self) -> Result<T, Error> + Send) -> PyResult<T> {
        let result = py.detach(|| work(&self));
        let error = self.state().error.take();
        match (result, error) {
            (_, Some(e)) => Err(e),
            (result, None) => result.map_err(errors::codec),
        }
    }
}

impl Progress for Reporter {
    fn begin(&self, total_bytes: u64) {
        *self.state() = State { total: total_bytes, ..Default::default() };
        self.tell();
    }

    fn tensor(&self, name: &str) {
        self.state().tensor = name.into();
    }

    fn advance(&self, bytes: u64) {
        self.state().done += bytes;
        self.tell();
    }

    fn note(&self, text: &str) {
        self.keep(Python::attach(|py| {
            let logger = py.import("logging")?.call_method1("getLogger", ("codecllm",))?;
            logger.call_method1("warning", (text,)).map(drop)
        }));
    }

    fn is_stopped(&self) -> bool {
        self.keep(Python::attach(|py| py.check_signals()));
        self.state().error.is_some()
    }
}

/// A result as JSON; the Python side makes a `dict` of it.
fn json(value: &impl Serialize) -> String {
    serde_json::to_string(value).expect("keys are strings and no value fails to serialize")
}

/// Compresses a checkpoint into an archive; see `codecllm.compress`.
#[pyfunction]
#[pyo3(signature = (src, dst, *, format, bits, size, step, trellis, scale, coder, prefer, layers, force, resume, progress))]
#[expect(clippy::too_many_arguments, reason = "keyword arguments, named by the caller")]
fn compress(
    py: Python<'_>,
    src: PathBuf,
    dst: PathBuf,
    format: &str,
    bits: Option<f64>,
    size: Option<u64>,
    step: Option<f64>,
    trellis: bool,
    scale: &str,
    coder: &str,
    prefer: &str,
    layers: &str,
    force: bool,
    resume: bool,
    progress: Option<Py<PyAny>>,
) -> PyResult<String> {
    let targets = [bits.map(RateTarget::Bits), size.map(RateTarget::Bytes), step.map(RateTarget::Step)];
    let mut targets = targets.into_iter().flatten();
    let rate = targets.next();
    let encode = encode_options(format, trellis, scale, coder, prefer, None)?;
    let problem = match (rate, targets.next()) {
        (_, Some(_)) => Some("give one of `bits`, `size` and `step`"),
        (None, None) if encode.format == Format::Rate => Some("format `rate` needs one of `bits`, `size` and `step`"),
        (Some(_), None) if encode.format != Format::Rate => Some("`bits`, `size` and `step` go with format `rate`"),
        _ => None,
    };
    if let Some(problem) = problem {
        return Err(errors::codec(Error::Parameter(problem.into())));
    }
    let layers = layers.parse().map_err(errors::codec)?;
    let options = CompressOptions { encode, rate, layers, force, resume, calibrated: None };
    let summary = Reporter::new(progress).run(py, |progress| archive::compress(&src, &dst, &options, progress))?;
    Ok(json(&summary))
}

/// Proves an archive; see `codecllm.verify`.
#[pyfunction]
#[pyo3(signature = (path, source, cpu, progress))]
fn verify(
    py: Python<'_>,
    path: PathBuf,
    source: Option<PathBuf>,
    cpu: Option<&str>,
    progress: Option<Py<PyAny>>,
) -> PyResult<String> {
    let cpus = match cpu {
        Some(cpu) => vec![cpu.parse().map_err(errors::codec)?],
        None => Cpu::available().collect(),
    };
    let report =
        Reporter::new(progress).run(py, |progress| archive::verify(&path, source.as_deref(), &cpus, progress))?;
    Ok(json(&report))
}

/// Says where an archive's bytes go; see `codecllm.inspect`.
#[pyfunction]
#[pyo3(signature = (path, progress))]
fn inspect(py: Python<'_>, path: PathBuf, progress: Option<Py<PyAny>>) -> PyResult<String> {
    let inspection = Reporter::new(progress).run(py, |progress| archive::inspect(&path, progress))?;
    Ok(json(&inspection))
}

/// The tensors of an archive or a checkpoint, mapped from its files.
#[pyclass(frozen, module = "codecllm._core")]
struct Archive {
    checkpoint: Checkpoint,
}

#[pymethods]
impl Archive {
    /// Opens a directory: reads and validates the headers of its files.
    #[new]
    fn new(py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        let checkpoint = py.detach(|| Checkpoint::open(path)).map_err(errors::codec)?;
        Ok(Self { checkpoint })
    }

    /// The names, in the order of the bytes.
    fn names(&self) -> Vec<&str> {
        self.checkpoint.names().collect()
    }

    /// Whether there is a tensor of that name.
    fn contains(&self, name: &str) -> bool {
        self.checkpoint.contains(name)
    }

    /// Maps and validates a tensor, with the checksum of its payload where `full`.
    fn tensor(&self, py: Python<'_>, name: &str, full: bool) -> PyResult<Tensor> {
        py.detach(|| Tensor::open(self.checkpoint.tensor(name)?, full)).map_err(errors::codec)
    }
}
