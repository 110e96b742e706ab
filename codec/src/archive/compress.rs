//! From a checkpoint to an archive, one tensor in memory at a time.

use super::RateTarget;
use super::partial::{FinishedShard, Partial, Target, write_synced};
use super::provenance::{Calibration, FileRecord, PROVENANCE_FILE, Provenance, Settings, to_pretty_json};
use super::rate::{PlannedTensor, choose_steps};
use super::shard::ShardWriter;
use super::{Layers, Progress, check_stopped, is_companion, read_config};
use crate::checkpoint::{CONFIG_FILE, Checkpoint, Dtype, INDEX_FILE, Shard, TensorInfo, gguf_files};
use crate::encoded::{EncodeOptions, EncodedTensor, encode_tensor};
use crate::error::{Error, Result};
use crate::format::Format;
use crate::gguf::is_gguf;
use serde::Serialize;
use serde_json::{Map, Value, json};
use std::cmp::Reverse;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};

/// How to compress a checkpoint.
#[derive(Debug, Clone, Default)]
pub struct CompressOptions {
    /// How to encode each matrix.
    pub encode: EncodeOptions,
    /// `rate`: what its steps are chosen for; the other formats have no target.
    pub rate: Option<RateTarget>,
    /// Matrices that were encoded for a model's inputs, and how the others are.
    pub calibrated: Option<Calibrated>,
    /// Which matrices to encode.
    pub layers: Layers,
    /// Replace an archive that exists already, once the new one is complete.
    pub force: bool,
    /// Reuse the finished shards of an interrupted run whose source and options were the same.
    pub resume: bool,
}

/// What [`compress`] takes over from a calibration: that needs the model to run, which this crate does not.
#[derive(Debug, Clone)]
pub struct Calibrated {
    /// What it was made with.
    pub record: Calibration,
    /// Of each calibrated matrix, the file that holds it, encoded.
    pub files: HashMap<String, PathBuf>,
    /// Of each other matrix that was selected, how it is encoded.
    pub others: HashMap<String, EncodeOptions>,
}

/// How [`compress`] would encode each matrix as `rate`.
///
/// # Errors
/// As [`compress`], as far as the source and the target are concerned.
pub fn plan(src: &Path, options: &CompressOptions, progress: &dyn Progress) -> Result<Vec<PlannedTensor>> {
    options.encode.check()?;
    let source = Checkpoint::open(src)?;
    refuse_compressed(&source, read_config(src)?.as_ref())?;
    plan_selected(&source, &options.layers.select(&source)?, options, progress)
}

/// Refuses what [`compress`] would refuse before it encodes anything: for callers with long work to do before.
///
/// # Errors
/// As [`compress`], as far as source, place and target are concerned.
pub fn check(src: &Path, dst: &Path, options: &CompressOptions, progress: &dyn Progress) -> Result<()> {
    Target::new(src, dst, options.force, progress)?;
    plan(src, options, progress).map(drop)
}

fn plan_selected(
    source: &Checkpoint,
    selected: &HashSet<&str>,
    options: &CompressOptions,
    progress: &dyn Progress,
) -> Result<Vec<PlannedTensor>> {
    match (options.encode.format, options.rate) {
        (Format::Rate, Some(rate)) => choose_steps(source, selected, rate, &options.encode, progress),
        (Format::Rate, None) => {
            Err(Error::Parameter("format `rate` needs a target: bits per weight, a size, or a KL divergence".into()))
        }
        (format, _) => Err(Error::Parameter(format!(
            "format `{format}` takes no target; bits per weight, a size, or a KL divergence are chosen with format `rate`"
        ))),
    }
}

/// What [`compress`] did.
#[derive(Debug, Clone, Serialize)]
pub struct Summary {
    /// Tensors of the model.
    pub n_tensors: usize,
    /// Those of them that were encoded.
    pub n_encoded: usize,
    /// Weights of the model.
    pub n_weights: u64,
    /// Bytes of the source's weight files.
    pub source_bytes: u64,
    /// Bytes of the archive's weight files, with index and provenance.
    pub archive_bytes: u64,
    /// Shards taken over from an interrupted run.
    pub n_resumed_shards: usize,
}

/// Compresses the checkpoint `src`, a directory or a GGUF file, into the archive `dst`.
///
/// The archive grows in [`super::partial_path`] and takes its place only when it is complete. After an I/O error or an
/// interruption the finished shards stay there for [`CompressOptions::resume`]; after any other failure nothing stays.
/// The archive depends on the source and the options alone, not on the number of threads.
///
/// # Errors
/// A source that cannot be read, or is compressed already; a weight that the format cannot hold; a target that exists; a
/// write that fails; [`Error::Interrupted`].
pub fn compress(src: &Path, dst: &Path, options: &CompressOptions, progress: &dyn Progress) -> Result<Summary> {
    options.encode.check()?;
    let source = Checkpoint::open(src)?;
    let config = read_config(src)?;
    refuse_compressed(&source, config.as_ref())?;
    let selected = options.layers.select(&source)?;
    let settings = Settings::new(options);
    let target = Target::new(src, dst, options.force, progress)?;
    let chosen = match (&options.calibrated, options.encode.format, options.rate) {
        (Some(calibrated), ..) => {
            let is_known = |name: &&str| calibrated.files.contains_key(*name) || calibrated.others.contains_key(*name);
            if let Some(name) = selected.iter().find(|name| !is_known(name)) {
                return Err(Error::Parameter(format!("tensor `{name}` is selected, but the calibration left it out")));
            }
            calibrated.others.clone()
        }
        (None, Format::Rate, _) | (None, _, Some(_)) => {
            let planned = plan_selected(&source, &selected, options, progress)?;
            planned.into_iter().map(|planned| (planned.name, planned.options)).collect()
        }
        _ => HashMap::new(),
    };
    let calibrated = options.calibrated.as_ref().map(|c| &c.files);
    let job = Job { source: &source, selected, encode: options.encode, chosen, calibrated, progress };
    job.note_rounding();
    job.note_exact();
    let mut partial = Partial::open(target, settings.clone(), options.resume, progress)?;
    match job.fill(&mut partial, config, settings) {
        Ok(summary) => partial.install().map(|()| summary),
        Err(e) => {
            partial.abandon(matches!(e, Error::Io { .. } | Error::Interrupted));
            Err(e)
        }
    }
}

fn refuse_compressed(source: &Checkpoint, config: Option<&Map<String, Value>>) -> Result<()> {
    let refuse = |problem: String| Err(Error::unsupported(source.path().display().to_string(), problem));
    let quantization = config.and_then(|c| c.get("quantization_config")).filter(|q| !q.is_null());
    let method = quantization.map(|q| q.get("quant_method").and_then(Value::as_str).unwrap_or("an unnamed method"));
    let mut is_archive = method == Some("codecllm") || source.path().join(PROVENANCE_FILE).exists();
    for info in source.tensors().iter().filter(|t| t.dtype == Dtype::U8) {
        is_archive |= EncodedTensor::is_encoded(&source.tensor(&info.name)?.data);
    }
    match method {
        _ if is_archive => refuse("this is an archive already; compress the checkpoint that it was made from".into()),
        Some(method) => {
            refuse(format!("its weights are quantized already ({method}); compress the original checkpoint"))
        }
        None => Ok(()),
    }
}

struct Job<'a> {
    source: &'a Checkpoint,
    selected: HashSet<&'a str>,
    encode: EncodeOptions,
    /// `rate`: by tensor.
    chosen: HashMap<String, EncodeOptions>,
    /// Files of tensors that are encoded already.
    calibrated: Option<&'a HashMap<String, PathBuf>>,
    progress: &'a dyn Progress,
}

impl Job<'_> {
    fn is_selected(&self, info: &TensorInfo) -> bool {
        self.selected.contains(info.name.as_str())
    }

    fn note_rounding(&self) {
        let mut selected = self.source.tensors().iter().filter(|t| self.is_selected(t));
        if let Some(t) = selected.find(|t| self.encode.format.is_lossless() && t.dtype != Dtype::Bf16) {
            let format = self.encode.format;
            self.progress.note(&format!(
                "`{format}` is lossless for BF16 weights; `{}` and others are {} and will be rounded to BF16",
                t.name, t.dtype
            ));
        }
    }

    fn note_exact(&self) {
        let n = self.chosen.values().filter(|chosen| chosen.format != self.encode.format).count();
        if n > 0 {
            self.progress.note(&format!(
                "8-bit codes end below the target, so {n} of {} matrices are kept as they are, as `{}`",
                self.selected.len(),
                Format::Bf16
            ));
        }
    }

    /// Writes every file of the archive.
    fn fill(&self, partial: &mut Partial, config: Option<Map<String, Value>>, settings: Settings) -> Result<Summary> {
        let (source, tensors) = (self.source, self.source.tensors());
        self.progress.begin(tensors.iter().map(|t| t.n_bytes as u64).sum());
        let mut shards = Vec::new();
        let mut n_resumed_shards = 0;
        for shard in source.shards() {
            let finished = match self.resumable(shard, partial)? {
                Some(finished) => {
                    n_resumed_shards += 1;
                    self.progress.advance(tensors[shard.tensors.clone()].iter().map(|t| t.n_bytes as u64).sum());
                    finished
                }
                None => self.encode_shard(shard, partial)?,
            };
            shards.push(finished);
        }

        let dir = partial.dir();
        let mut sources: Vec<FileRecord> = shards.iter().map(|s| s.source.clone()).collect();
        let mut files: Vec<FileRecord> = shards.iter().map(|s| s.output.clone()).collect();
        for name in companions(source.path())? {
            let path = source.path().join(&name);
            write_synced(&dir.join(&name), &fs::read(&path).map_err(|e| Error::io(path, e))?)?;
            files.push(FileRecord::of(dir, &name)?);
            sources.push(FileRecord::of(source.path(), &name)?);
        }
        let is_gguf = is_gguf(source.path());
        if is_gguf {
            let (texts, lacking) = gguf_files(source.path())?;
            for (name, text) in texts.iter().filter(|(name, _)| *name != CONFIG_FILE) {
                write_synced(&dir.join(name), text.as_bytes())?;
                files.push(FileRecord::of(dir, name)?);
            }
            if let Some(e) = lacking {
                self.progress.note(&format!(
                    "the archive has no tokenizer ({e}); add tokenizer.json and tokenizer_config.json of the original model"
                ));
            }
        }
        let mut rewritten = Vec::new();
        match config {
            Some(mut config) => {
                config.insert("quantization_config".into(), settings.quantization_config());
                rewritten.push((CONFIG_FILE, to_pretty_json(&config)));
            }
            None => {
                self.progress.note(&format!("the source has no {CONFIG_FILE}: the archive holds tensors, not a model"))
            }
        }
        if source.is_indexed() {
            rewritten.push((INDEX_FILE, rewrite_index(source.path(), shards.iter().map(|s| s.tensor_bytes).sum())?));
        }
        for (name, text) in rewritten {
            write_synced(&dir.join(name), text.as_bytes())?;
            files.push(FileRecord::of(dir, name)?);
            // Where the source is a GGUF file, that file is all of it.
            if !is_gguf {
                sources.push(FileRecord::of(source.path(), name)?);
            }
        }
        sources.sort_by(|a, b| a.file.cmp(&b.file));
        files.sort_by(|a, b| a.file.cmp(&b.file));
        let index_bytes: u64 = files.iter().filter(|f| f.file == INDEX_FILE).map(|f| f.bytes).sum();
        let provenance = Provenance::new(settings, sources, files).to_text();
        write_synced(&dir.join(PROVENANCE_FILE), provenance.as_bytes())?;
        let shard_bytes: u64 = shards.iter().map(|s| s.output.bytes).sum();

        Ok(Summary {
            n_tensors: tensors.len(),
            n_encoded: self.selected.len(),
            n_weights: tensors.iter().map(|t| t.n_elements() as u64).sum(),
            source_bytes: shards.iter().map(|s| s.source.bytes).sum(),
            archive_bytes: shard_bytes + index_bytes + provenance.len() as u64,
            n_resumed_shards,
        })
    }

    /// The shard that an interrupted run finished, if it was made from the same file and is undamaged.
    fn resumable(&self, shard: &Shard, partial: &Partial) -> Result<Option<FinishedShard>> {
        let name = &shard.archive_name;
        let Some(finished) = partial.finished(name) else {
            return Ok(None);
        };
        check_stopped(self.progress)?;
        if finished.source != FileRecord::of_path(shard.path(), &shard.file_name)? {
            self.progress
                .note(&format!("{name} of the source has changed since the interrupted run; encoding it anew"));
            return Ok(None);
        }
        if FileRecord::of(partial.dir(), name).ok().as_ref() != Some(&finished.output) {
            self.progress.note(&format!("{name} of the interrupted run is damaged; encoding it anew"));
            return Ok(None);
        }
        Ok(Some(finished.clone()))
    }

    fn encode_shard(&self, shard: &Shard, partial: &mut Partial) -> Result<FinishedShard> {
        let (record, tensor_bytes) = std::thread::scope(|scope| {
            // The source's hash is needed only at the end, and takes a few percent of the time that encoding takes.
            let hash = scope.spawn(|| FileRecord::of_path(shard.path(), &shard.file_name));
            let tensor_bytes = self.write_shard(shard, partial)?;
            let record = hash.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            Ok::<_, Error>((record, tensor_bytes))
        })?;
        partial.finish(record, &shard.archive_name, tensor_bytes)
    }

    /// Writes the shard under its unfinished name; the bytes of its tensors.
    fn write_shard(&self, shard: &Shard, partial: &Partial) -> Result<u64> {
        // Encoded tensors are multiples of 64 bytes long, so that with them in front each starts at such a multiple; the
        // others follow in the order that keeps each aligned to its element.
        let tensors = &self.source.tensors()[shard.tensors.clone()];
        let (encoded, mut kept): (Vec<_>, Vec<_>) = tensors.iter().partition(|t| self.is_selected(t));
        kept.sort_by_key(|t| Reverse(t.dtype.bits()));

        let path = partial.unfinished_path(&shard.archive_name);
        let mut writer = ShardWriter::create(path, shard, tensors.iter(), |name| self.selected.contains(name))?;
        let mut tensor_bytes = 0;
        for info in encoded.into_iter().chain(kept) {
            check_stopped(self.progress)?;
            self.progress.tensor(&info.name);
            let tensor = self.source.tensor(&info.name)?;
            if self.is_selected(info) {
                let bytes = match self.calibrated.and_then(|files| files.get(&info.name)) {
                    Some(path) => fs::read(path).map_err(|e| Error::io(path, e))?,
                    None => {
                        let encode = self.chosen.get(&info.name).unwrap_or(&self.encode);
                        encode_tensor(&tensor, encode)
                            .map_err(|e| e.in_tensor(&info.name).within(shard.path().display()))?
                    }
                };
                writer.append(&info.name, Dtype::U8, &[bytes.len()], &bytes)?;
                tensor_bytes += bytes.len() as u64;
            } else {
                writer.append(&info.name, info.dtype, &info.shape, &tensor.data)?;
                tensor_bytes += info.n_bytes as u64;
            }
            self.progress.advance(info.n_bytes as u64);
        }
        writer.finish()?;
        Ok(tensor_bytes)
    }
}

/// The files of `dir` that are copied, sorted; none where it is a GGUF file.
fn companions(dir: &Path) -> Result<BTreeSet<String>> {
    let mut names = BTreeSet::new();
    if is_gguf(dir) {
        return Ok(names);
    }
    for entry in fs::read_dir(dir).map_err(|e| Error::io(dir, e))? {
        let entry = entry.map_err(|e| Error::io(dir, e))?;
        // The hub's cache consists of links: what counts is what they point to.
        if let Ok(name) = entry.file_name().into_string()
            && is_companion(&name)
            && fs::metadata(entry.path()).is_ok_and(|m| m.is_file())
        {
            names.insert(name);
        }
    }
    Ok(names)
}

/// The source's index with the archive's size. Tensors stay in the files that the source has them in.
fn rewrite_index(dir: &Path, total_size: u64) -> Result<String> {
    let path = dir.join(INDEX_FILE);
    let text = fs::read(&path).map_err(|e| Error::io(&path, e))?;
    let mut index: Map<String, Value> = serde_json::from_slice(&text)
        .map_err(|e| Error::format(path.display().to_string(), format!("not a JSON object: {e}")))?;
    match index.get_mut("metadata") {
        Some(Value::Object(metadata)) => {
            metadata.insert("total_size".into(), json!(total_size));
        }
        _ => {
            index.insert("metadata".into(), json!({"total_size": total_size}));
        }
    }
    Ok(to_pretty_json(&index))
}
