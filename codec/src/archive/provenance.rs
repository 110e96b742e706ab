//! `codecllm.json`: what an archive was made from, how, and the hash of every file.

use super::CompressOptions;
use crate::checkpoint::is_plain_file_name;
use crate::error::{Error, Result};
use crate::format::{Coder, Format, ScaleMode};
use crate::{EncodeOptions, Prefer};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// The provenance's file name.
pub const PROVENANCE_FILE: &str = "codecllm.json";
/// The version of the tensor format, as `docs/format.md` numbers it.
const FORMAT_VERSION: &str = "1.0";
/// The same where there is a trellis.
const TRELLIS_VERSION: &str = "1.1";
const HASH_CHUNK_BYTES: usize = 1 << 20;

/// A file, by its name within the directory and its content.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileRecord {
    /// Its name.
    pub file: String,
    /// Its length.
    pub bytes: u64,
    /// SHA-256 in hexadecimal.
    pub sha256: String,
}

impl FileRecord {
    /// Reads and hashes `dir/file`.
    pub fn of(dir: &Path, file: &str) -> Result<Self> {
        Self::of_path(&dir.join(file), file)
    }

    /// Reads and hashes a file of another name.
    pub(super) fn of_path(path: &Path, file: &str) -> Result<Self> {
        let (bytes, sha256) = hash_file(path)?;
        Ok(Self { file: file.into(), bytes, sha256 })
    }

    /// Hashes what would be a file's content.
    pub(super) fn of_text(file: &str, text: &str) -> Self {
        Self { file: file.into(), bytes: text.len() as u64, sha256: hex(&Sha256::digest(text)) }
    }
}

fn hash_file(path: &Path) -> Result<(u64, String)> {
    let io_error = |e| Error::io(path, e);
    let mut file = File::open(path).map_err(io_error)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; HASH_CHUNK_BYTES];
    let mut bytes = 0;
    loop {
        let n = file.read(&mut buffer).map_err(io_error)?;
        if n == 0 {
            return Ok((bytes, hex(&hasher.finalize())));
        }
        hasher.update(&buffer[..n]);
        bytes += n as u64;
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// The options that an archive was made with, as far as its bytes depend on them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Number format.
    pub format: Format,
    /// What shares a scale; none where the format has no scales.
    pub scale: Option<ScaleMode>,
    /// Entropy coder.
    pub coder: Coder,
    /// What the encoder favoured.
    pub prefer: Prefer,
    /// `rate`: whether codes are a trellis'.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub trellis: bool,
    /// Which matrices are encoded, as [`super::Layers`] spells it.
    pub layers: String,
    /// `rate`: what its steps were chosen for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// `rate`: the text whose inputs the linear layers were encoded for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calibration: Option<Calibration>,
}

/// What a calibration was made with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Calibration {
    /// SHA-256 of the tokens, as 32-bit little-endian integers, in hexadecimal.
    pub tokens_sha256: String,
    /// How many there are.
    pub n_tokens: u64,
    /// Tokens of the windows that they ran in.
    pub window: u64,
    /// Matrices that were calibrated.
    pub n_tensors: u64,
}

impl Calibration {
    /// The record of `n_tensors` matrices calibrated on `tokens`.
    pub fn new(tokens: &[u32], window: usize, n_tensors: usize) -> Self {
        let mut hasher = Sha256::new();
        tokens.iter().for_each(|token| hasher.update(token.to_le_bytes()));
        Self {
            tokens_sha256: hex(&hasher.finalize()),
            n_tokens: tokens.len() as u64,
            window: window as u64,
            n_tensors: n_tensors as u64,
        }
    }
}

impl Settings {
    pub(super) fn new(options: &CompressOptions) -> Self {
        let EncodeOptions { format, scale, coder, prefer, step: _, trellis, params: _ } = options.encode;
        Self {
            format,
            scale: matches!(format, Format::Fp8 | Format::Int8).then_some(scale),
            coder,
            prefer,
            trellis,
            layers: options.layers.to_string(),
            target: options.rate.map(|target| target.to_string()),
            calibration: options.calibrated.as_ref().map(|calibrated| calibrated.record.clone()),
        }
    }

    /// The version of the tensor format that a program has to read.
    fn format_version(&self) -> &'static str {
        if self.trellis { TRELLIS_VERSION } else { FORMAT_VERSION }
    }

    /// `quantization_config` of the archive's `config.json`.
    pub(super) fn quantization_config(&self) -> serde_json::Value {
        serde_json::json!({
            "quant_method": "codecllm",
            "version": self.format_version(),
            "format": self.format,
            "coder": self.coder,
            "scale": self.scale,
            "layers": self.layers,
        })
    }
}

/// What an archive was made from, how, and what it consists of. It holds no dates and no paths: the same source and
/// options make the same archive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Provenance {
    /// `codecllm`.
    pub tool: String,
    /// The tool's version.
    pub version: String,
    /// The version of the tensor format.
    pub format_version: String,
    /// The options.
    pub options: Settings,
    /// The files of the source that were read.
    pub source: Vec<FileRecord>,
    /// The files of the archive, but for this one.
    pub files: Vec<FileRecord>,
    /// SHA-256 of this file's text with this field empty, so that damage to the hashes themselves shows.
    pub sha256: String,
}

impl Provenance {
    pub(super) fn new(options: Settings, source: Vec<FileRecord>, files: Vec<FileRecord>) -> Self {
        let mut provenance = Self {
            tool: "codecllm".into(),
            version: env!("CARGO_PKG_VERSION").into(),
            format_version: options.format_version().into(),
            options,
            source,
            files,
            sha256: String::new(),
        };
        provenance.sha256 = provenance.own_hash();
        provenance
    }

    fn own_hash(&self) -> String {
        hex(&Sha256::digest(Self { sha256: String::new(), ..self.clone() }.to_text()))
    }

    pub(super) fn to_text(&self) -> String {
        to_pretty_json(self)
    }

    /// Reads `codecllm.json` of an archive.
    ///
    /// # Errors
    /// A file that cannot be read, is malformed, does not match its own hash, or names files elsewhere.
    pub fn open(archive: &Path) -> Result<Self> {
        let path = archive.join(PROVENANCE_FILE);
        let bad = |problem: String| Error::format(path.display().to_string(), problem);
        let text = std::fs::read(&path).map_err(|e| Error::io(&path, e))?;
        let provenance: Self = serde_json::from_slice(&text).map_err(|e| bad(format!("not a provenance: {e}")))?;
        if provenance.to_text().as_bytes() != text || provenance.sha256 != provenance.own_hash() {
            return Err(bad("it does not match its own SHA-256: it is damaged, or was edited".into()));
        }
        let mut files = provenance.source.iter().chain(&provenance.files).map(|f| &f.file);
        if let Some(name) = files.find(|name| !is_plain_file_name(name)) {
            return Err(bad(format!("it names `{name}`, which is not a file of the same directory")));
        }
        Ok(provenance)
    }
}

/// JSON as the archive's files hold it: indented, with a newline at the end.
pub(crate) fn to_pretty_json(value: &impl Serialize) -> String {
    let mut text = serde_json::to_string_pretty(value).expect("keys are strings and no value fails to serialize");
    text.push('\n');
    text
}
