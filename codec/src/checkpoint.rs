//! Checkpoints in Hugging Face layout: safetensors, one file or shards with an index.

use bytes::Bytes;

/// Element types of source tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dtype {
    /// bfloat16
    Bf16,
    /// IEEE binary16
    F16,
    /// IEEE binary32
    F32,
    /// Bytes: an encoded tensor
    U8,
    /// Anything else that safetensors knows: carried along untouched
    Other(safetensors::Dtype),
}

/// One tensor of a checkpoint; `data` maps the file, nothing is copied.
#[derive(Debug, Clone)]
pub struct Tensor {
    /// Its name in the checkpoint.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Shape, outermost first; a matrix is `[n_rows (outputs), n_cols (inputs)]`.
    pub shape: Vec<usize>,
    /// Little-endian elements, row-major.
    pub data: Bytes,
}

/// A checkpoint or an archive: a directory with safetensors.
#[derive(Debug)]
pub struct Checkpoint {}
