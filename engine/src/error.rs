//! One error type for the engine; each variant says whose fault it is.

use std::path::PathBuf;

/// The engine's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, and whose fault it is.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The codec's own: a bad archive, an unreadable file.
    #[error(transparent)]
    Codec(#[from] codecllm_codec::Error),
    /// A file beside the weights could not be read.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The file concerned.
        path: PathBuf,
        /// The system's own error.
        source: std::io::Error,
    },
    /// A file beside the weights (`config.json`, the tokenizer's) is not what it should be.
    #[error("{file}: {problem}")]
    Format {
        /// The file's name.
        file: String,
        /// What was expected and what was found.
        problem: String,
    },
    /// The model is well-formed, but this version does not run it.
    #[error("{what}: {problem}")]
    Unsupported {
        /// The setting or file concerned.
        what: String,
        /// What is not supported, and what is.
        problem: String,
    },
    /// A tensor is missing, or does not fit the model's configuration.
    #[error("tensor `{name}`: {problem}")]
    Weights {
        /// The tensor's name in the checkpoint.
        name: String,
        /// What was expected and what was found.
        problem: String,
    },
    /// More tokens than the model or the cache has room for.
    #[error("{wanted} tokens exceed {what} of {limit}; use a shorter prompt or generate fewer tokens")]
    Context {
        /// Which limit: the model's context or the cache's capacity.
        what: &'static str,
        /// The limit, in tokens.
        limit: usize,
        /// The tokens that were asked for, those already in the cache included.
        wanted: usize,
    },
    /// A GPU, its driver or its memory is not what is needed, or failed.
    #[error("CUDA: {0}")]
    Device(String),
    /// The caller asked for something that cannot be done.
    #[error("{0}")]
    Parameter(String),
}

impl Error {
    /// An I/O error with the path it happened at.
    pub fn io(path: impl Into<PathBuf>, source: std::io::Error) -> Self {
        Self::Io { path: path.into(), source }
    }

    /// Bad contents of `file`.
    pub fn format(file: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Format { file: file.into(), problem: problem.into() }
    }

    /// Something valid that this version does not run.
    pub fn unsupported(what: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Unsupported { what: what.into(), problem: problem.into() }
    }

    /// A GPU that cannot be used: what was found, what is needed.
    pub fn device(problem: impl Into<String>) -> Self {
        Self::Device(problem.into())
    }

    /// A tensor that does not fit.
    pub fn weights(name: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Weights { name: name.into(), problem: problem.into() }
    }
}
