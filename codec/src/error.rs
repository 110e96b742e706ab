//! One error type for the codec; each variant says whose fault it is.

use std::path::PathBuf;

/// The codec's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, and whose fault it is.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused: missing file, full disk, no permission.
    #[error("{path}: {source}{advice}", path = path.display(), advice = advice(source))]
    Io {
        /// The file or folder concerned.
        path: PathBuf,
        /// The system's own error.
        source: std::io::Error,
    },
    /// The input's bytes are not what they claim to be: truncated, corrupted or hostile.
    #[error("{what}: {problem}")]
    Format {
        /// The file or tensor whose bytes are bad.
        what: String,
        /// What was expected and what was found.
        problem: String,
    },
    /// The input is well-formed, but this version does not handle it.
    #[error("{what}: {problem}")]
    Unsupported {
        /// The file, tensor or model concerned.
        what: String,
        /// What is not supported, and what is.
        problem: String,
    },
    /// The caller asked for something that cannot be done.
    #[error("{0}")]
    Parameter(String),
    /// The caller's stop flag was set; nothing was written in the target's place.
    #[error("interrupted")]
    Interrupted,
}

/// What to do about an I/O error, where its own text does not say it.
fn advice(source: &std::io::Error) -> &'static str {
    use std::io::ErrorKind::{QuotaExceeded, StorageFull};
    match source.kind() {
        StorageFull | QuotaExceeded => "; make room there, or choose another place",
        _ => "",
    }
}

impl Error {
    /// An I/O error with the path it happened at.
    pub fn io(path: impl Into<PathBuf>, source: std::io::Error) -> Self {
        Self::Io { path: path.into(), source }
    }

    /// Bad bytes in `what`.
    pub fn format(what: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Format { what: what.into(), problem: problem.into() }
    }

    /// Something valid that this version does not handle.
    pub fn unsupported(what: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Unsupported { what: what.into(), problem: problem.into() }
    }

    /// The same error, with the tensor's name put before its subject.
    pub fn in_tensor(self, name: &str) -> Self {
        self.within(format_args!("tensor `{name}`"))
    }

    /// The same error, with `place` (a file, say) put before its subject.
    pub fn within(self, place: impl std::fmt::Display) -> Self {
        match self {
            Self::Format { what, problem } => Self::Format { what: format!("{place}: {what}"), problem },
            Self::Unsupported { what, problem } => Self::Unsupported { what: format!("{place}: {what}"), problem },
            Self::Parameter(problem) => Self::Parameter(format!("{place}: {problem}")),
            other => other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_os = "linux")]
    fn a_full_disk_is_told_with_what_to_do() {
        use std::io::Write;
        let path = "/dev/full";
        let full = std::fs::File::create(path).and_then(|mut f| f.write_all(b"x")).unwrap_err();
        let text = Error::io(path, full).to_string();
        assert!(
            text.starts_with("/dev/full: ") && text.ends_with("; make room there, or choose another place"),
            "{text}"
        );
        let missing = Error::io("x", std::io::ErrorKind::NotFound.into()).to_string();
        assert!(!missing.contains(';'), "{missing}");
    }
}
