//! Proves an archive: its structure, its decoders against the reference, its weights against the source.

use super::provenance::{FileRecord, PROVENANCE_FILE, Provenance};
use super::{Progress, check_stopped, is_embedding_or_head, read_config};
use crate::Cpu;
use crate::checkpoint::{CONFIG_FILE, Checkpoint, Dtype, INDEX_FILE, TensorInfo, gguf_files};
use crate::encoded::{Checks, EncodedTensor};
use crate::error::{Error, Result};
use crate::format::Format;
use crate::gguf::is_gguf;
use crate::quantize::Codes;
use serde::Serialize;
use serde_json::{Map, Value};
use std::path::Path;

/// Problems of one check that are spelled out; the rest are counted.
const MAX_PROBLEMS: usize = 3;

/// The outcome of a check, best first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Everything that was to be checked holds.
    Proven,
    /// Something could not be read, so that it was not checked.
    Unchecked,
    /// Something is not as it should be.
    Wrong,
}

/// One thing that was checked.
#[derive(Debug, Clone, Serialize)]
pub struct Check {
    /// What was checked: `provenance`, `files`, `structure`, `decoders`, `source.tensors`, `source.weights`,
    /// `source.config` or `source.files`.
    pub name: &'static str,
    /// The outcome.
    pub status: Status,
    /// What was found.
    pub detail: String,
}

/// What [`verify`] finds.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// The worst of the checks.
    pub status: Status,
    /// The checks, in the order in which they were made.
    pub checks: Vec<Check>,
    /// What `proven` says nothing of.
    pub not_checked: Vec<String>,
}

/// A decoder of another machine, for [`verify_with`] to compare with the reference.
pub trait Decoder: Sync {
    /// What the report calls it.
    fn name(&self) -> &str;

    /// The codes of a tensor, row-major.
    ///
    /// # Errors
    /// Why it cannot decode the tensor, in words. This says nothing of the tensor, and leaves the check open.
    fn decode(&self, tensor: &EncodedTensor) -> Result<Codes<'static>, String>;
}

/// A check in progress.
struct Tally {
    name: &'static str,
    status: Status,
    n_passed: usize,
    problems: Vec<String>,
}

impl Tally {
    fn new(name: &'static str) -> Self {
        Self { name, status: Status::Proven, n_passed: 0, problems: Vec::new() }
    }

    fn wrong(&mut self, problem: impl Into<String>) {
        self.status = Status::Wrong;
        self.problems.push(problem.into());
    }

    /// An unreadable file leaves a check open; any other error is the archive's fault.
    fn error(&mut self, e: &Error) {
        let status = if matches!(e, Error::Io { .. }) { Status::Unchecked } else { Status::Wrong };
        self.status = self.status.max(status);
        self.problems.push(e.to_string());
    }

    fn unchecked(&mut self, problem: String) {
        self.status = self.status.max(Status::Unchecked);
        self.problems.push(problem);
    }

    fn expect(&mut self, holds: bool, problem: impl FnOnce() -> String) {
        if holds { self.n_passed += 1 } else { self.wrong(problem()) }
    }

    fn finish(self, passed: impl FnOnce(usize) -> String) -> Check {
        let detail = if self.problems.is_empty() {
            passed(self.n_passed)
        } else {
            let mut shown = self.problems[..self.problems.len().min(MAX_PROBLEMS)].join("; ");
            if self.problems.len() > MAX_PROBLEMS {
                shown += &format!("; and {} more", self.problems.len() - MAX_PROBLEMS);
            }
            shown
        };
        Check { name: self.name, status: self.status, detail }
    }
}

/// Checks an archive: that its files are those that `codecllm.json` lists, that every tensor is well-formed, that every
/// decoder of `cpus` yields the codes of the scalar reference; and with `source`, that the codes and scales are exactly
/// those that the quantizer yields, and all else is the source's.
///
/// # Errors
/// [`Error::Interrupted`] only; whatever is wrong or unreadable stands in the report.
pub fn verify(archive: &Path, source: Option<&Path>, cpus: &[Cpu], progress: &dyn Progress) -> Result<Report> {
    verify_with(archive, source, &Decoders { cpus, other: None }, progress)
}

/// The decoders that are compared with the scalar reference.
#[derive(Clone, Copy)]
pub struct Decoders<'a> {
    /// Those of this crate.
    pub cpus: &'a [Cpu],
    /// Another machine's.
    pub other: Option<&'a dyn Decoder>,
}

/// [`verify`] with another machine's decoder beside those of this crate.
///
/// # Errors
/// As [`verify`].
pub fn verify_with(
    archive: &Path,
    source: Option<&Path>,
    decoders: &Decoders<'_>,
    progress: &dyn Progress,
) -> Result<Report> {
    let cpus = decoders.cpus;
    let mut checks = Vec::new();
    let mut not_checked = Vec::new();

    let provenance = Provenance::open(archive);
    let mut tally = Tally::new("provenance");
    match &provenance {
        Ok(_) => tally.n_passed += 1,
        Err(e) => tally.error(e),
    }
    checks.push(tally.finish(|_| format!("{PROVENANCE_FILE} matches its own SHA-256")));
    let provenance = provenance.ok();
    if let Some(provenance) = &provenance {
        checks.push(check_files(archive, provenance, progress)?);
    } else {
        not_checked.push(format!("the hashes of the files, which {PROVENANCE_FILE} holds"));
    }

    match Checkpoint::open(archive) {
        Ok(checkpoint) => check_tensors(&checkpoint, provenance.as_ref(), source, decoders, progress, &mut checks)?,
        Err(e) => {
            let mut structure = Tally::new("structure");
            structure.error(&e);
            checks.push(structure.finish(|_| String::new()));
        }
    }
    if source.is_some() && provenance.as_ref().is_some_and(|p| p.options.calibration.is_some()) {
        not_checked.push(
            "that the codes of calibrated tensors are those that their calibration yields: this takes its text, and the run anew"
                .into(),
        );
    }
    match (source, &provenance) {
        (Some(source), Some(provenance)) => checks.push(check_companions(source, provenance)),
        (Some(_), None) => {}
        (None, _) => not_checked.push("whether the weights are the source's: give the source with --source".into()),
    }
    let lacking: Vec<&str> = Cpu::ALL.iter().filter(|cpu| !cpus.contains(cpu)).map(|cpu| cpu.name()).collect();
    if !lacking.is_empty() {
        not_checked
            .push(format!("the decoders {}, which were not asked for or which this machine lacks", lacking.join(", ")));
    }
    let status = checks.iter().map(|c| c.status).max().unwrap_or(Status::Unchecked);
    Ok(Report { status, checks, not_checked })
}

fn check_files(archive: &Path, provenance: &Provenance, progress: &dyn Progress) -> Result<Check> {
    let mut tally = Tally::new("files");
    for expected in &provenance.files {
        check_stopped(progress)?;
        match FileRecord::of(archive, &expected.file) {
            Ok(found) => tally.expect(found == *expected, || {
                format!(
                    "{} is damaged or was changed: SHA-256 {} of {} bytes, expected {} of {}",
                    expected.file, found.sha256, found.bytes, expected.sha256, expected.bytes
                )
            }),
            Err(e) => tally.error(&e),
        }
    }
    Ok(tally.finish(|n| format!("{n} files match their SHA-256")))
}

/// One pass over the tensors, for every check that reads them.
fn check_tensors(
    archive: &Checkpoint,
    provenance: Option<&Provenance>,
    source_dir: Option<&Path>,
    compared: &Decoders<'_>,
    progress: &dyn Progress,
    checks: &mut Vec<Check>,
) -> Result<()> {
    let cpus = compared.cpus;
    let mut structure = Tally::new("structure");
    let mut decoders = Tally::new("decoders");
    let mut tensors = Tally::new("source.tensors");
    let mut weights = Tally::new("source.weights");
    let source = source_dir.and_then(|dir| Checkpoint::open(dir).map_err(|e| tensors.error(&e)).ok());
    check_layout(archive, provenance, &mut structure);
    if let Some(source) = &source {
        for name in source.names().filter(|name| !archive.contains(name)) {
            tensors.wrong(format!("the archive lacks tensor `{name}`"));
        }
    }

    let fastest = cpus.iter().max().copied().unwrap_or(Cpu::Scalar);
    let (mut n_encoded, mut n_weights, mut n_rounded, mut n_calibrated) = (0, 0, 0, 0);
    progress.begin(archive.tensors().iter().map(|t| t.n_bytes as u64).sum());
    for info in archive.tensors() {
        check_stopped(progress)?;
        progress.tensor(&info.name);
        let name = &info.name;
        let tensor = match archive.tensor(name) {
            Ok(tensor) => tensor,
            Err(e) => {
                structure.error(&e);
                continue;
            }
        };
        let original = match source.as_ref().map(|source| (source, source.contains(name))) {
            Some((source, true)) => source.tensor(name).map_err(|e| tensors.error(&e)).ok(),
            Some((_, false)) => {
                tensors.wrong(format!("the source has no tensor `{name}`"));
                None
            }
            None => None,
        };
        if info.dtype == Dtype::U8 && EncodedTensor::is_encoded(&tensor.data) {
            n_encoded += 1;
            match EncodedTensor::parse(tensor.data, Checks::Full) {
                Err(e) => structure.error(&e.in_tensor(name)),
                Ok(encoded) => {
                    check_encoded(info, &encoded, provenance, &mut structure);
                    check_decoders(name, &encoded, compared, &mut decoders);
                    n_weights += encoded.n_rows() as u64 * encoded.n_cols() as u64;
                    if let Some(original) = original {
                        tensors.n_passed += 1;
                        n_rounded += usize::from(encoded.format().is_lossless() && original.dtype != Dtype::Bf16);
                        let is_calibrated = provenance.is_some_and(|p| p.options.calibration.is_some())
                            && encoded.format() == Format::Rate
                            && !is_embedding_or_head(name);
                        n_calibrated += usize::from(is_calibrated);
                        let difference = match is_calibrated {
                            true => encoded.verify_calibrated(&original, fastest),
                            false => encoded.verify_source(&original, fastest),
                        };
                        match difference {
                            Ok(None) => weights.n_passed += 1,
                            Ok(Some(difference)) => weights.wrong(format!("tensor `{name}`: {difference}")),
                            Err(e) => weights.error(&e.in_tensor(name)),
                        }
                    }
                }
            }
        } else {
            structure.n_passed += 1;
            if let Some(original) = original {
                let is_same =
                    (tensor.dtype, &tensor.shape) == (original.dtype, &original.shape) && tensor.data == original.data;
                tensors.expect(is_same, || format!("tensor `{name}` is not encoded, and differs from the source's"));
            }
        }
        progress.advance(info.n_bytes as u64);
    }

    checks.push(structure.finish(|n| format!("{n} tensors are well-formed, {n_encoded} of them encoded")));
    let others = cpus.iter().filter(|&&cpu| cpu != Cpu::Scalar).map(|cpu| cpu.name());
    let others: Vec<&str> = others.chain(compared.other.map(Decoder::name)).collect();
    checks.push(decoders.finish(|n| match others.is_empty() {
        true => format!("the scalar reference decodes {n} tensors, {n_weights} weights"),
        false => format!(
            "{} and the scalar reference decode {n} tensors, {n_weights} weights, to the same codes",
            others.join(", ")
        ),
    }));
    if let Some(source_dir) = source_dir {
        let is_other_source = (tensors.status == Status::Wrong || weights.status == Status::Wrong)
            && provenance.is_some_and(|p| is_other_source(source_dir, p));
        if is_other_source {
            tensors.wrong("the source is not the one that the archive was made from: SHA-256 differs");
        }
        checks
            .push(tensors.finish(|n| format!("the source has the same {n} tensors; those not encoded are identical")));
        if source.is_some() {
            checks.push(weights.finish(|n| match (provenance.map(|p| p.options.format), n_rounded) {
                (Some(format), 0) if format.is_lossless() => format!("{n} tensors are bit for bit the source's"),
                (Some(format), _) if format.is_lossless() => {
                    format!("{n} tensors are the source's, rounded to BF16 where the source is not BF16 ({n_rounded})")
                }
                _ if n_calibrated > 0 => format!(
                    "{n_calibrated} calibrated tensors lie on their grids, as far from the source as they say; {} others hold \
                     exactly the codes and scales that the quantizer yields",
                    n.saturating_sub(n_calibrated)
                ),
                _ => format!("{n} tensors hold exactly the codes and scales that the quantizer yields"),
            }));
            checks.push(check_config(source_dir, archive.path()));
        }
    }
    Ok(())
}

/// The rules for the archive as a whole.
fn check_layout(archive: &Checkpoint, provenance: Option<&Provenance>, structure: &mut Tally) {
    if let Some(provenance) = provenance {
        for shard in archive.shards() {
            if !provenance.files.iter().any(|f| f.file == shard.file_name) {
                structure.wrong(format!("{PROVENANCE_FILE} does not list {}, which holds tensors", shard.file_name));
            }
        }
    }
    match read_config(archive.path()) {
        Ok(config) => {
            let method = config.as_ref().and_then(|c| c.get("quantization_config")?.get("quant_method"));
            if config.is_some() && method.and_then(Value::as_str) != Some("codecllm") {
                structure.wrong(format!("`quantization_config.quant_method` of {CONFIG_FILE} is not `codecllm`"));
            }
        }
        Err(e) => structure.error(&e),
    }
}

/// The rules for an encoded tensor as a part of the archive.
fn check_encoded(info: &TensorInfo, encoded: &EncodedTensor, provenance: Option<&Provenance>, structure: &mut Tally) {
    let (format, coder) = (encoded.format(), encoded.coder());
    match provenance.map(|p| &p.options) {
        _ if !info.offset.is_multiple_of(64) => {
            structure.wrong(format!("tensor `{}` starts at byte {}, not a multiple of 64", info.name, info.offset));
        }
        // Beyond what its grids take, an archive of `rate` keeps matrices as `bf16`.
        Some(options) if options.format == Format::Rate && (format, coder) == (Format::Bf16, options.coder) => {
            structure.n_passed += 1;
        }
        Some(options) if (options.format, options.coder) != (format, coder) => {
            structure.wrong(format!(
                "tensor `{}` is {format} with {coder}, but {PROVENANCE_FILE} says {} with {}",
                info.name, options.format, options.coder
            ));
        }
        _ => structure.n_passed += 1,
    }
}

fn check_decoders(name: &str, encoded: &EncodedTensor, compared: &Decoders<'_>, decoders: &mut Tally) {
    let reference = match encoded.decode_codes(Cpu::Scalar) {
        Ok(codes) => codes,
        Err(e) => return decoders.error(&e.in_tensor(name)),
    };
    for &cpu in compared.cpus.iter().filter(|&&cpu| cpu != Cpu::Scalar) {
        match encoded.decode_codes(cpu) {
            Ok(codes) if codes == reference => {}
            Ok(_) => return decoders.wrong(format!("tensor `{name}`: {cpu} decodes other codes than the reference")),
            Err(e) => return decoders.error(&e.within(cpu).in_tensor(name)),
        }
    }
    if let Some(other) = compared.other {
        match other.decode(encoded) {
            Ok(codes) if codes == reference => {}
            Ok(_) => {
                let problem = format!("tensor `{name}`: {} decodes other codes than the reference", other.name());
                return decoders.wrong(problem);
            }
            Err(e) => return decoders.unchecked(format!("tensor `{name}`: {}: {e}", other.name())),
        }
    }
    decoders.n_passed += 1;
}

/// Whether a weight file of `src` differs from the one that the archive was made from.
fn is_other_source(src: &Path, provenance: &Provenance) -> bool {
    if is_gguf(src) {
        // The file may have been renamed.
        let found = FileRecord::of_path(src, "");
        let is_same = |found: &FileRecord| provenance.source.iter().any(|f| f.sha256 == found.sha256);
        return found.is_ok_and(|found| !is_same(&found));
    }
    let mut weights = provenance.source.iter().filter(|f| f.file.ends_with(".safetensors"));
    weights.any(|expected| FileRecord::of(src, &expected.file).is_ok_and(|found| found != *expected))
}

fn check_config(source: &Path, archive: &Path) -> Check {
    let mut tally = Tally::new("source.config");
    let read = |dir: &Path| {
        read_config(dir).map(|config| {
            config.map(|mut config| {
                config.shift_remove("quantization_config");
                config
            })
        })
    };
    match (read(source), read(archive)) {
        (Ok(None), Ok(None)) => return tally.finish(|_| format!("neither source nor archive has a {CONFIG_FILE}")),
        (Ok(expected), Ok(found)) => {
            let key = |a: &Option<Map<String, Value>>, b: &Option<Map<String, Value>>| {
                a.iter().flatten().find(|(k, v)| b.as_ref().and_then(|b| b.get(*k)) != Some(v)).map(|(k, _)| k.clone())
            };
            let difference = key(&expected, &found).or_else(|| key(&found, &expected));
            tally.expect(expected == found, || match difference {
                Some(key) => format!("`{key}` of {CONFIG_FILE} differs from the source's"),
                None => format!("only one of source and archive has a {CONFIG_FILE}"),
            });
        }
        (expected, found) => [expected.err(), found.err()].iter().flatten().for_each(|e| tally.error(e)),
    }
    tally.finish(|_| format!("{CONFIG_FILE} is the source's, but for `quantization_config`"))
}

/// Files that are copied as they are must be the source's; that the archive's own are intact is the check `files`.
fn check_companions(source: &Path, provenance: &Provenance) -> Check {
    let mut tally = Tally::new("source.files");
    let copied = provenance
        .files
        .iter()
        .filter(|f| ![CONFIG_FILE, INDEX_FILE].contains(&f.file.as_str()) && !f.file.ends_with(".safetensors"));
    let made = if is_gguf(source) { gguf_files(source).map(|(files, _)| Some(files)) } else { Ok(None) };
    let record = |name: &str| match &made {
        Ok(Some(files)) => files
            .get(name)
            .map(|text| FileRecord::of_text(name, text))
            .ok_or_else(|| Error::format(source.display().to_string(), format!("its metadata do not make a {name}"))),
        _ => FileRecord::of(source, name),
    };
    if let Err(e) = &made {
        tally.error(e);
    }
    for expected in copied {
        match record(&expected.file) {
            Ok(found) => tally.expect(found == *expected, || format!("{} differs from the source's", expected.file)),
            Err(e) => tally.error(&e),
        }
    }
    tally.finish(|n| format!("{n} files beside the weights are the source's"))
}
