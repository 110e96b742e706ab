//! Archives: a compressed checkpoint as a directory in Hugging Face layout.
//!
//! [`compress`] makes one from a checkpoint, [`verify`] proves it, [`inspect`] says where its bytes go. The tensors lie in
//! safetensors shards under their own names, so that [`Checkpoint`](crate::Checkpoint) opens an archive as it opens
//! what it was made from; `codecllm.json` ([`Provenance`]) says what that was and holds a hash of every file.

mod compress;
mod inspect;
mod layers;
mod partial;
mod provenance;
mod rate;
mod shard;
mod verify;

pub use compress::{Calibrated, CompressOptions, Summary, check, compress, plan};
pub use inspect::{BitsSplit, CoderParams, EncodedTotal, Inspection, TensorReport, Total, inspect};
pub use layers::{Layers, is_embedding_or_head};
pub use partial::partial_path;
pub use provenance::{Calibration, FileRecord, PROVENANCE_FILE, Provenance, Settings};
pub use rate::{PlannedTensor, RateTarget, steps_of};
pub use verify::{Check, Decoder, Decoders, Report, Status, verify, verify_with};

pub(crate) use provenance::to_pretty_json;

use crate::checkpoint::{CONFIG_FILE, INDEX_FILE, read_file};
use crate::error::{Error, Result};
use serde_json::{Map, Value};
use std::path::Path;

/// What a caller is told while an archive is made or read, and how it asks for an early end.
pub trait Progress: Sync {
    /// Work on `total_bytes` bytes of tensors begins.
    fn begin(&self, total_bytes: u64) {
        let _ = total_bytes;
    }

    /// Work on a tensor begins.
    fn tensor(&self, name: &str) {
        let _ = name;
    }

    /// Another `bytes` of the total are done.
    fn advance(&self, bytes: u64) {
        let _ = bytes;
    }

    /// Something that the user should know.
    fn note(&self, text: &str) {
        let _ = text;
    }

    /// Whether to end with [`Error::Interrupted`] before the next tensor.
    fn is_stopped(&self) -> bool {
        false
    }
}

/// Reports nothing and never stops.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Progress for Silent {}

fn check_stopped(progress: &dyn Progress) -> Result<()> {
    if progress.is_stopped() { Err(Error::Interrupted) } else { Ok(()) }
}

/// `config.json` of a model; none where there is none.
fn read_config(src: &Path) -> Result<Option<Map<String, Value>>> {
    let parse = |text: String| {
        serde_json::from_str(&text)
            .map_err(|e| Error::format(src.join(CONFIG_FILE).display().to_string(), format!("not a JSON object: {e}")))
    };
    read_file(src, CONFIG_FILE)?.map(parse).transpose()
}

/// Whether `name` is a file that goes with a model besides weights and configuration, and that [`compress`] copies: the
/// tokenizer's files, generation settings, chat templates, model code, licences and README-like files.
pub fn is_companion(name: &str) -> bool {
    const EXTENSIONS: [&str; 8] = ["json", "jsonl", "jinja", "md", "model", "py", "tiktoken", "txt"];
    const TITLES: [&str; 5] = ["COPYING", "LICENCE", "LICENSE", "NOTICE", "README"];
    let is_own = [CONFIG_FILE, INDEX_FILE, PROVENANCE_FILE].contains(&name);
    let is_index = name.ends_with(".index.json");
    let extension = Path::new(name).extension().and_then(|e| e.to_str()).unwrap_or_default();
    let title = name.to_ascii_uppercase();
    !is_own
        && !is_index
        && !name.starts_with('.')
        && (EXTENSIONS.contains(&extension) || TITLES.iter().any(|t| title.starts_with(t)))
}
