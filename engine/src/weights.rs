//! From a checkpoint's tensors to the weights of a model: found, checked against the configuration, not yet on a backend.

use crate::error::{Error, Result};
use bytes::Bytes;
use codecllm_codec::archive::{Progress, Silent};
use codecllm_codec::checkpoint::{Checkpoint, Dtype, Tensor};
use codecllm_codec::encoded::{Checks, EncodedTensor};
use codecllm_codec::quantize::read_row;
use std::collections::HashMap;

/// Where a model's tensors come from: a checkpoint, an archive, or a table of synthetic ones.
pub trait TensorSource {
    /// The tensor of that name, or `None` where there is none.
    fn tensor(&self, name: &str) -> Result<Option<Tensor>>;

    /// Bytes of all its tensors, for whoever shows progress; 0 where that is not known.
    fn n_bytes(&self) -> u64 {
        0
    }
}

impl TensorSource for Checkpoint {
    fn tensor(&self, name: &str) -> Result<Option<Tensor>> {
        Ok(if self.contains(name) { Some(Checkpoint::tensor(self, name)?) } else { None })
    }

    fn n_bytes(&self) -> u64 {
        self.tensors().iter().map(|t| t.n_bytes as u64).sum()
    }
}

impl TensorSource for HashMap<String, Tensor> {
    fn tensor(&self, name: &str) -> Result<Option<Tensor>> {
        Ok(self.get(name).cloned())
    }

    fn n_bytes(&self) -> u64 {
        self.values().map(|t| t.data.len() as u64).sum()
    }
}

/// Element types of a matrix that is not encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DenseType {
    /// bfloat16
    Bf16,
    /// IEEE binary16
    F16,
    /// IEEE binary32
    F32,
}

impl DenseType {
    fn from_dtype(dtype: Dtype) -> Option<Self> {
        match dtype {
            Dtype::Bf16 => Some(Self::Bf16),
            Dtype::F16 => Some(Self::F16),
            Dtype::F32 => Some(Self::F32),
            Dtype::U8 | Dtype::Other(_) => None,
        }
    }

    /// Bytes of an element.
    pub const fn bytes(self) -> usize {
        match self {
            Self::Bf16 | Self::F16 => 2,
            Self::F32 => 4,
        }
    }
}

/// A matrix of the model as the checkpoint holds it, its shape checked: what a backend makes its own matrix from.
#[derive(Debug, Clone)]
pub enum Weight {
    /// Plain little-endian elements, row-major.
    Dense {
        /// Their type.
        element: DenseType,
        /// Outputs.
        n_rows: usize,
        /// Inputs.
        n_cols: usize,
        /// `n_rows * n_cols` elements; a slice of the mapped file where there is one, so of any alignment.
        data: Bytes,
    },
    /// Compressed blocks.
    Encoded(EncodedTensor),
}

impl Weight {
    /// Its bytes in the checkpoint.
    pub fn n_bytes(&self) -> u64 {
        match self {
            Self::Dense { data, .. } => data.len() as u64,
            Self::Encoded(tensor) => tensor.bytes().len() as u64,
        }
    }

    /// Compares the checksum of an encoded matrix's payload, where checksums are to be compared in full.
    pub(crate) fn check_payload(&self, name: &str, checks: Checks) -> Result<()> {
        match self {
            Self::Encoded(tensor) if checks == Checks::Full => {
                Ok(tensor.check_payload().map_err(|e| e.in_tensor(name))?)
            }
            _ => Ok(()),
        }
    }
}

/// Finds the tensors of a model by name and checks that they are what the configuration calls for.
pub struct Loader<'a> {
    source: &'a dyn TensorSource,
    checks: Checks,
    progress: &'a dyn Progress,
}

impl<'a> Loader<'a> {
    /// A loader over `source`; `checks` says which checksums of encoded tensors are compared.
    pub fn new(source: &'a dyn TensorSource, checks: Checks) -> Self {
        Self { source, checks, progress: &Silent }
    }

    /// The same, with `progress` told of every tensor, and asked before each whether to go on.
    pub fn with_progress(self, progress: &'a dyn Progress) -> Self {
        Self { progress, ..self }
    }

    /// Says how much there is to load.
    pub(crate) fn begin(&self) {
        self.progress.begin(self.source.n_bytes());
    }

    /// Says that a tensor is where it should be.
    pub(crate) fn done(&self, n_bytes: u64) {
        self.progress.advance(n_bytes);
    }

    /// The matrix `name`, `[n_rows, n_cols]`. Of an encoded one the payload's checksum is left to
    /// [`Weight::check_payload`], so that it takes no time of its own.
    pub(crate) fn matrix(&self, name: &str, n_rows: usize, n_cols: usize) -> Result<Weight> {
        let tensor = self.required(name)?;
        if tensor.dtype == Dtype::U8 && EncodedTensor::is_encoded(&tensor.data) {
            let checks = if self.checks == Checks::None { Checks::None } else { Checks::Metadata };
            let encoded = EncodedTensor::parse(tensor.data, checks).map_err(|e| e.in_tensor(name))?;
            check_shape(name, &[n_rows, n_cols], &[encoded.n_rows(), encoded.n_cols()])?;
            return Ok(Weight::Encoded(encoded));
        }
        let element = dense_type(name, &tensor)?;
        check_shape(name, &[n_rows, n_cols], &tensor.shape)?;
        check_bytes(name, &tensor, element)?;
        Ok(Weight::Dense { element, n_rows, n_cols, data: tensor.data })
    }

    /// Which checksums are to be compared.
    pub(crate) fn checks(&self) -> Checks {
        self.checks
    }

    /// The vector `name` (a norm's weight or a bias), `len` elements, widened to f32, and its bytes as it was.
    pub(crate) fn vector(&self, name: &str, len: usize) -> Result<(Vec<f32>, u64)> {
        let tensor = self.required(name)?;
        let element = dense_type(name, &tensor)?;
        check_shape(name, &[len], &tensor.shape)?;
        check_bytes(name, &tensor, element)?;
        let mut values = vec![0.0; len];
        read_row(tensor.dtype, &tensor.data, &mut values);
        Ok((values, tensor.data.len() as u64))
    }

    fn required(&self, name: &str) -> Result<Tensor> {
        if self.progress.is_stopped() {
            return Err(codecllm_codec::Error::Interrupted.into());
        }
        self.progress.tensor(name);
        self.source.tensor(name)?.ok_or_else(|| {
            Error::weights(name, "is missing; the model's configuration calls for it. Is the checkpoint complete?")
        })
    }
}

fn dense_type(name: &str, tensor: &Tensor) -> Result<DenseType> {
    DenseType::from_dtype(tensor.dtype).ok_or_else(|| {
        Error::weights(name, format!("has dtype {:?}; expected BF16, F16, F32 or an encoded matrix", tensor.dtype))
    })
}

fn check_shape(name: &str, expected: &[usize], found: &[usize]) -> Result<()> {
    if expected != found {
        return Err(Error::weights(
            name,
            format!("has shape {found:?}, but the model's configuration calls for {expected:?}"),
        ));
    }
    Ok(())
}

/// Sources other than checkpoints may hand in tensors whose bytes do not fit their shape.
fn check_bytes(name: &str, tensor: &Tensor, element: DenseType) -> Result<()> {
    let expected = tensor.shape.iter().product::<usize>() * element.bytes();
    if tensor.data.len() != expected {
        return Err(Error::weights(
            name,
            format!("has {} bytes; shape {:?} calls for {expected}", tensor.data.len(), tensor.shape),
        ));
    }
    Ok(())
}
