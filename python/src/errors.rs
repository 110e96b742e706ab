//! Rust's errors as Python's exceptions, with the same text.

use codecllm_codec::Error as Codec;
use codecllm_engine::Error as Engine;
use pyo3::create_exception;
use pyo3::exceptions::{
    PyFileExistsError, PyFileNotFoundError, PyKeyboardInterrupt, PyOSError, PyPermissionError, PyRuntimeError,
    PyValueError,
};
use pyo3::prelude::*;
use std::io::ErrorKind;

create_exception!(codecllm, FormatError, PyValueError, "A file's or a tensor's bytes are not what they claim to be.");
create_exception!(codecllm, UnsupportedError, PyValueError, "Well-formed, but this version does not handle it.");
create_exception!(codecllm, DeviceError, PyRuntimeError, "A GPU, its driver or its memory is not what is needed.");

/// The exception for an error of the codec.
pub fn codec(e: Codec) -> PyErr {
    let text = e.to_string();
    match e {
        Codec::Io { source, .. } => match source.kind() {
            ErrorKind::NotFound => PyFileNotFoundError::new_err(text),
            ErrorKind::AlreadyExists => PyFileExistsError::new_err(text),
            ErrorKind::PermissionDenied => PyPermissionError::new_err(text),
            _ => PyOSError::new_err(text),
        },
        Codec::Format { .. } => FormatError::new_err(text),
        Codec::Unsupported { .. } => UnsupportedError::new_err(text),
        Codec::Parameter(_) => PyValueError::new_err(text),
        Codec::Interrupted => PyKeyboardInterrupt::new_err(text),
    }
}

/// The exception for an error of the engine.
pub fn engine(e: Engine) -> PyErr {
    match e {
        Engine::Codec(e) => codec(e),
        Engine::Device(_) => DeviceError::new_err(e.to_string()),
        Engine::Unsupported { .. } => UnsupportedError::new_err(e.to_string()),
        Engine::Io { .. } => PyOSError::new_err(e.to_string()),
        _ => PyValueError::new_err(e.to_string()),
    }
}

/// Adds the exceptions.
pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    let py = m.py();
    m.add("FormatError", py.get_type::<FormatError>())?;
    m.add("UnsupportedError", py.get_type::<UnsupportedError>())?;
    m.add("DeviceError", py.get_type::<DeviceError>())
}
